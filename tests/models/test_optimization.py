import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from lungddpm.config.sections import Training
from lungddpm.models.optimization import Learner, learning_rate


@pytest.fixture
def scaling():
    """Makes an accelerator whose losses are scaled as in fp16 on a GPU; the numbers themselves are fp32."""

    def make(accumulation):
        AcceleratorState._reset_state(True)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        return accelerator

    yield make
    AcceleratorState._reset_state(True)


def test_two_networks_learn_from_unscaled_gradients_under_accumulation(scaling):
    """Two passes are one with the mean of both losses; only Adam's first moment shows the size of gradients."""

    def moments(passes):
        accelerator = scaling(len(passes))
        learners = [
            Learner(nn.Linear(1, 1, bias=False), Training(learning_rate=1e-3, gradient_clip=1e9), accelerator)
            for _ in range(2)
        ]
        for factors in passes:
            with accelerator.accumulate(*(learner.prepared for learner in learners)):
                for learner, factor in zip(learners, factors, strict=True):
                    learner.learn(factor * learner.prepared(torch.ones(1, 1)).sum())
        return [next(iter(learner.optimizer.state.values()))["exp_avg"].item() for learner in learners]

    assert moments([(1.0, 3.0), (1.0, 5.0)]) == pytest.approx([0.1 * 1, 0.1 * 4])
    assert moments([(1.0, 4.0)]) == pytest.approx([0.1 * 1, 0.1 * 4])


def test_the_learning_rate_is_that_of_torchs_schedulers():
    training = Training(steps=20, learning_rate=0.1, learning_rate_schedule="cosine", warmup_steps=5)
    optimizer = SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    rising, falling = LinearLR(optimizer, 1 / 5, 1, total_iters=4), CosineAnnealingLR(optimizer, 15)
    scheduler = SequentialLR(optimizer, [rising, falling], milestones=[5])
    expected = []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert [learning_rate(training, step) for step in range(20)] == pytest.approx(expected)


def test_a_constant_rate_stays_at_its_peak_after_the_warmup():
    training = Training(steps=6, learning_rate=0.1, warmup_steps=2)
    assert [learning_rate(training, step) for step in range(4)] == pytest.approx([0.05, 0.1, 0.1, 0.1])


def test_a_training_that_is_shorter_than_its_warmup_stays_below_the_peak():
    training = Training(steps=3, learning_rate=0.1, learning_rate_schedule="cosine", warmup_steps=5)
    assert [learning_rate(training, step) for step in range(3)] == pytest.approx([0.02, 0.04, 0.06])
