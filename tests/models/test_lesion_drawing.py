"""Networks that draw only nodules: histograms, the loss around a nodule, and a network that follows a histogram."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from lungddpm.core.labels import Label
from lungddpm.core.volume import to_model_range
from lungddpm.models.checkpoint import Metadata, save_network
from lungddpm.models.denoiser import UNet
from lungddpm.models.lesions import (
    BINS,
    DiscoveryNodule,
    LesionError,
    LesionLoss,
    choose_histogram,
    count_bins,
    draw_nodules,
    histograms_of,
    keep_histograms,
    read_histograms,
    show,
)
from lungddpm.models.recipe import Batch
from lungddpm.models.sampling import make_solver
from lungddpm.models.schedule import cosine_betas

WINDOW = (-1024, 600)
CPU = torch.device("cpu")


def ball(size, radius):
    """(1, 1, size, size, size): +1 in a ball at the middle, -1 outside."""
    places = torch.stack(torch.meshgrid(*[torch.arange(size) - size // 2] * 3, indexing="ij"))
    return torch.where(places.square().sum(dim=0) <= radius**2, 1.0, -1.0)[None, None]


@pytest.mark.parametrize(
    ("hu", "expected"), [(-1024, 0), (-923, 0), (-922, 1), (0, 10), (40, 10), (599, 15), (600, 15)]
)
def test_the_histogram_of_a_constant_nodule_is_one_bin(hu, expected):
    """Bins of 1624 / 16 = 101.5 HU: the second one begins at -922.5."""
    nodule = ball(9, 3)
    clean = torch.where(nodule > 0, to_model_range(np.array(hu), WINDOW).item(), -0.7)
    one_hot = [float(number == expected) for number in range(BINS)]
    assert histograms_of(clean, nodule > 0).tolist() == [one_hot]


def test_counts_are_those_of_numpy():
    random = np.random.default_rng(0)
    hu, nodule = random.integers(-1100, 700, (3, 1, 6, 6, 6)), random.random((3, 1, 6, 6, 6)) < 0.3
    found = count_bins(torch.from_numpy(to_model_range(hu, WINDOW)), torch.from_numpy(nodule))
    for place in range(3):
        expected, _ = np.histogram(np.clip(hu[place][nodule[place]], *WINDOW), bins=16, range=WINDOW)
        assert found[place].tolist() == expected.tolist()


def test_without_a_nodule_all_shares_are_zero():
    assert histograms_of(torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 1, 4, 4, 4, dtype=torch.bool)).tolist() == [
        [0.0] * BINS
    ]


def test_the_network_sees_the_shares_within_the_nodule_alone():
    nodule = torch.cat([ball(5, 1), ball(5, 2)])
    histograms = torch.rand(2, BINS, generator=torch.Generator().manual_seed(0))
    condition = show(nodule, histograms)
    assert condition.shape == (2, 1 + BINS, 5, 5, 5)
    assert torch.equal(condition[:, :1], nodule)
    for sample in range(2):
        inside = nodule[sample, 0] > 0
        assert (condition[sample][:, ~inside] == -1).all()
        planes = (condition[sample, 1:, inside] + 1) / 2
        torch.testing.assert_close(planes, histograms[sample][:, None].expand_as(planes))


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_the_loss_ignores_all_beyond_one_voxel_around_the_nodule(loss):
    nodule = torch.cat([ball(9, 2), ball(9, 1)])
    predicted, target = torch.randn(2, 2, 1, 9, 9, 9, generator=torch.Generator().manual_seed(1))
    error = LesionError(loss)
    whole = error(predicted, target, nodule)
    near = torch.from_numpy(
        np.stack([ndimage.binary_dilation(one[0] > 0, np.ones((3, 3, 3)))[None] for one in nodule.numpy()])
    )
    for elsewhere in (100.0, math.inf, math.nan):
        assert error(torch.where(near, predicted, elsewhere), target, nodule) == whole
    # Each voxel that counts does: changed alone, it changes the loss.
    gradient = torch.func.grad(lambda guess: error(guess, target, nodule))(predicted)
    assert torch.equal(gradient != 0, near)
    by_hand = (predicted - target).abs() if loss == "l1" else (predicted - target) ** 2
    means = [by_hand[sample][near[sample]].mean() for sample in range(2)]
    assert whole.item() == pytest.approx(float(sum(means) / 2), rel=1e-5)


def test_the_loss_does_not_depend_on_the_size_of_the_nodule():
    target = torch.zeros(1, 1, 15, 15, 15)
    losses = [LesionError("l1")(target + 0.3, target, ball(15, radius)).item() for radius in (0, 2, 6)]
    assert losses == pytest.approx([0.3] * 3)
    both = LesionError("l1")(
        torch.cat([target + 0.1, target + 0.3]), torch.cat([target, target]), torch.cat([ball(15, 6), ball(15, 0)])
    )
    assert both.item() == pytest.approx(0.2)
    nothing = torch.full_like(target, -1)
    assert LesionError("l1")(target + 0.3, target, nothing) == 0


def test_training_shows_each_sample_its_own_histogram():
    nodule = torch.cat([ball(8, 2), ball(8, 3)])
    clean = torch.where(nodule > 0, torch.tensor([-0.5, 0.43])[:, None, None, None, None], -0.8)
    seen = []

    def network(inputs, times):
        seen.append(inputs)
        return torch.zeros_like(inputs[:, :1])

    batch = Batch(clean, nodule, torch.randn(clean.shape), torch.tensor([3, 7]))
    LesionLoss(10, "epsilon", LesionError("l1"), CPU).loss(network, batch)
    (inputs,) = seen
    # -0.5 lies at (0.5 / 2) 16 = 4, 0.43 in bin floor(1.43 / 2 * 16) = 11.
    for sample, filled in enumerate((4, 11)):
        inside = nodule[sample, 0] > 0
        assert (inputs[sample, 2 + filled][inside] == 1).all()
        assert (inputs[sample, 2:].sum(dim=0)[inside] == 1 - 15).all()


def nodule_of(voxels, name="case"):
    return DiscoveryNodule(name, 1, (voxels, *[0] * (BINS - 1)))


def test_a_nodule_gets_the_histogram_of_one_of_similar_size_or_of_the_nearest():
    nodules = [nodule_of(voxels) for voxels in (3, 100, 150, 400, 5000)]
    drawn = [choose_histogram(nodules, 120, seed).voxels for seed in range(60)]
    assert set(drawn) == {100, 150}  # between half and twice as many
    assert 15 < drawn.count(100) < 45
    assert drawn[:5] == [choose_histogram(nodules, 120, seed).voxels for seed in range(5)]
    for voxels, nearest in ((1, 3), (20, 3 if 20 / 3 < 100 / 20 else 100), (1000, 400), (90_000, 5000)):
        assert {choose_histogram(nodules, voxels, seed).voxels for seed in range(5)} == {nearest}


@pytest.fixture
def cases():
    """Two cases (n, D, H, W): two nodules of a constant HU in the first, one in the second."""
    ct, layout = np.full((2, 10, 12, 14), -850, np.int16), np.full((2, 10, 12, 14), Label.LUNG, np.uint8)
    for case, box, hu in ((0, np.s_[6:9, 1:3, 8:10], -700), (0, np.s_[1:3, 8:11, 2:6], 20), (1, np.s_[3:5, 3, 3], 120)):
        layout[case][box], ct[case][box] = Label.NODULE, hu
    ct[0, 6, 1, 8] = 5000
    return ["a", "b"], ct, layout


def test_histograms_of_all_training_nodules_are_kept(cases):
    kept = keep_histograms(WINDOW)(*cases)
    found = {
        (one["case_id"], one["number"]): {k: v for k, v in enumerate(one["counts"]) if v} for one in kept["nodules"]
    }
    # Numbered along x: the one at x 2 to 5 comes first. -700 HU lies in bin 3, 20 in 10, 120 in 11, metal in the last.
    assert found == {("a", 1): {10: 24}, ("a", 2): {3: 11, 15: 1}, ("b", 1): {11: 2}}


def test_histograms_are_in_the_file_of_the_weights(cases, training_config, tmp_path):
    config, path = training_config(), tmp_path / "model.safetensors"
    kept = keep_histograms(WINDOW)(*cases)
    network = UNet(3, 4, [1, 2], 2, None)
    save_network(path, network, Metadata(config.dump(), config.decides_fit(), 1, "", "", [], kept=kept))
    nodules = read_histograms(path)
    assert [nodule.voxels for nodule in nodules] == [24, 12, 2]
    assert nodules[1].histogram == pytest.approx([0, 0, 0, 11 / 12, *[0] * 11, 1 / 12])


def wild(inputs, times):
    return torch.tanh(3 * inputs.sum(dim=1, keepdim=True))


@pytest.mark.parametrize("resampling", [1, 3])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmsolver++", "unipc"])
def test_what_is_not_drawn_equals_the_reference(sampler, resampling):
    nodule = ball(8, 3)
    reference = torch.rand(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    drawn = (nodule > 0) & (torch.arange(8) < 4)
    condition = show(nodule, torch.full((1, BINS), 1 / BINS))
    solver = make_solver(sampler, 2, cosine_betas(20), 6)
    made = draw_nodules(
        wild, solver, condition, reference, drawn, [torch.Generator().manual_seed(1)], resampling=resampling
    )
    assert torch.equal(made[~drawn], reference[~drawn])
    assert (made != reference)[drawn].all()


def test_a_trained_network_follows_its_histogram():
    """Dark and bright nodules in dark lungs: the histogram alone says which one is asked for."""
    torch.manual_seed(0)
    network, nodule = UNet(2 + BINS, 8, [1, 2], 4, None, padding="replicate"), ball(8, 2)
    objective = LesionLoss(50, "clean", LesionError("l2"), CPU)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    nodules, dark, bright = nodule.expand(4, -1, -1, -1, -1), -0.4375, 0.5625  # the middles of bins 4 and 12
    for _ in range(100):
        clean = torch.where(nodules > 0, torch.tensor([dark, bright]).repeat(2)[:, None, None, None, None], -0.8)
        objective.loss(network, Batch(clean, nodules, torch.randn(clean.shape), torch.randint(50, (4,)))).backward()
        optimizer.step()
        optimizer.zero_grad()
    solver = make_solver("dpmsolver++", 2, cosine_betas(50), 4, "clean")
    reference = torch.full((1, 1, 8, 8, 8), -0.8)
    means = []
    for filled in (4, 12):
        condition, generators = show(nodule, torch.eye(BINS)[[filled]]), [torch.Generator().manual_seed(3)]
        made = draw_nodules(network.eval(), solver, condition, reference, nodule > 0, generators, resampling=1)
        means.append(made[nodule > 0].mean().item())
    assert means[0] < -0.2 < 0.1 < means[1]
