"""Training on a GPU; skipped where there is none."""

import pytest
import torch
from accelerate.state import AcceleratorState

from lungddpm.generators import lung_ddpm
from lungddpm.models.accelerator import make_accelerator
from lungddpm.models.data import TrainingData
from lungddpm.models.optimization import Optimization
from lungddpm.models.training import initial_network

pytestmark = [
    pytest.mark.needs_gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


@pytest.fixture
def make(training_config):
    def optimization(precision, **changes):
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(4, (2, 16, 16, 16), generator=generator, dtype=torch.uint8)
        data = TrainingData(["a", "b"], (labels.short() * 300 - 900).numpy(), labels.numpy())
        config = training_config(precision=precision, steps=100, **changes)
        AcceleratorState._reset_state(True)
        recipe, accelerator = lung_ddpm.recipe(config), make_accelerator("cuda", precision, 2)
        return Optimization(config, recipe, initial_network(config, recipe), data, accelerator)

    yield optimization
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_learns_in_every_precision(make, precision):
    optimization = make(precision, gradient_checkpointing=True, augmentation="standard", crop=None)
    losses = [optimization.take_step(step).tolist()[0] for step in range(60)]
    assert losses[0] == pytest.approx(0.798, abs=0.03)
    assert sum(losses[-10:]) / 10 < 0.85 * losses[0]
    assert optimization.is_finite()


def test_resumes_from_a_state(make):
    first = make("fp32")
    for step in range(2):
        first.take_step(step)
    state = first.state_dict()
    copied = {name: {key: value.clone() for key, value in state[name].items()} for name in ("model", "average")}
    second = make("fp32")
    second.load_state_dict({**state, **copied})
    torch.testing.assert_close(second.take_step(2), first.take_step(2), atol=1e-4, rtol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_host_never_waits_for_the_gpu(make, precision):
    optimization = make(precision, augmentation="standard")
    optimization.take_step(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimization.take_step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
