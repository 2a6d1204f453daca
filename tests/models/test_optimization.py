import pytest
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from lungddpm.config.sections import Training
from lungddpm.models.optimization import learning_rate


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
