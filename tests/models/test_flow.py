"""Rectified flow where the exact velocity is known: a single CT, and voxels that are normally distributed."""

import numpy as np
import pytest
import torch

from lungddpm.models.flow import FlowSolver, VelocityPrediction
from lungddpm.models.objectives import WeightedError
from lungddpm.models.recipe import Batch
from lungddpm.models.sampling import sample_aas, sample_free

SHAPE = (2, 1, 6, 6, 6)


@pytest.fixture
def clean():
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8


@pytest.fixture
def condition():
    """Lung in the left half, with a nodule; the right half is open."""
    channels = torch.full((2, 2, 6, 6, 6), -1.0)
    channels[:, 0, :, :, :3] = 1
    channels[:, 0, 2:4, 2:4, 1] = -1
    channels[:, 1, 2:4, 2:4, 1] = 1
    return channels


def generators():
    return [torch.Generator().manual_seed(seed) for seed in (3, 4)]


def towards(clean):
    """The exact velocity where there is only one CT: every path ends there."""

    def velocity(inputs, times):
        return (inputs[:, :1] - clean) / (times / 1000).view(-1, 1, 1, 1, 1).float()

    return velocity


@pytest.mark.parametrize("steps", [1, 4, 30])
def test_euler_steps_along_straight_paths_end_at_the_ct(clean, condition, steps):
    made = sample_free(towards(clean), FlowSolver(steps), condition, generators())
    torch.testing.assert_close(made, clean, rtol=0, atol=1e-5)


def test_normally_distributed_voxels_are_transported_as_known():
    """The flow from N(0, 1) to N(mean, sd^2) is linear: noise z becomes mean + sd z; Euler steps are of first order."""
    mean, sd = 0.1, 0.15

    def velocity(inputs, times):
        t = (times / 1000).view(-1, 1, 1, 1, 1).double()
        from_mean = inputs[:, :1].double() - (1 - t) * mean
        # Of jointly normal CT, noise and state: the expected noise minus the expected CT, given the state.
        variance = (1 - t) ** 2 * sd**2 + t**2
        return t * from_mean / variance - (mean + (1 - t) * sd**2 * from_mean / variance)

    start = torch.randn((1, 1, 8, 8, 8), generator=torch.Generator().manual_seed(1))
    layout = torch.ones(1, 1, 8, 8, 8)
    errors = []
    for steps in (50, 100, 200):
        made = sample_free(velocity, FlowSolver(steps), layout, generators()[:1], start=start)
        errors.append((made - (mean + sd * start)).abs().max().item())
    assert errors[2] < 0.01
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.15)


def test_open_voxels_come_back_exactly(clean, condition):
    reference = -clean
    for wrong in (towards(clean), lambda inputs, times: torch.zeros_like(inputs[:, :1])):
        made = sample_aas(wrong, FlowSolver(5), condition, reference, generators())
        assert torch.equal(made[..., 3:], reference[..., 3:])
    drawn = sample_aas(towards(clean), FlowSolver(5), condition, reference, generators())
    torch.testing.assert_close(drawn[..., :3], clean[..., :3], rtol=0, atol=1e-5)


def test_there_is_at_least_one_step():
    with pytest.raises(ValueError, match="0 steps are too few"):
        FlowSolver(0)


@pytest.fixture
def batch(clean, condition):
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    return Batch(clean, condition, noise, torch.tensor([0.3, 0.9]))


@pytest.mark.parametrize("lesion_weight", [1.0, 10.0])
def test_the_exact_velocity_has_no_loss(batch, lesion_weight):
    objective = VelocityPrediction("uniform", WeightedError("l1", lesion_weight, nodule_channel=1))
    assert objective.loss(towards(batch.clean), batch).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("lesion_weight", [1.0, 10.0])
@pytest.mark.parametrize(("loss", "power"), [("l1", 1), ("l2", 2)])
def test_nodules_count_more_and_weights_have_the_mean_one(batch, lesion_weight, loss, power):
    objective = VelocityPrediction("uniform", WeightedError(loss, lesion_weight, nodule_channel=1))
    exact, nodule = towards(batch.clean), batch.condition[:, 1:] > 0
    off_by = 0.5
    everywhere = objective.loss(lambda *inputs: exact(*inputs) + off_by, batch)
    assert everywhere.item() == pytest.approx(off_by**power, abs=1e-5)
    in_nodules = objective.loss(lambda *inputs: exact(*inputs) + off_by * nodule, batch)
    share = 4 / 216
    expected = lesion_weight * share * off_by**power / (lesion_weight * share + 1 - share)
    assert in_nodules.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("times", "within_one_sd"), [("uniform", 0.462), ("logit_normal", 0.683)])
def test_times_are_spread_as_they_should(times, within_one_sd):
    objective, generator = VelocityPrediction(times, WeightedError("l1", 1.0, 1)), torch.Generator().manual_seed(0)
    drawn = np.array([objective.draw_level(generator).item() for _ in range(4000)])
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    assert drawn.mean() == pytest.approx(0.5, abs=0.02)
    # Logistic function of -1 and of 1.
    assert ((drawn > 0.2689) & (drawn < 0.7311)).mean() == pytest.approx(within_one_sd, abs=0.03)
