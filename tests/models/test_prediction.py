import pytest
import torch
from diffusers import DDPMScheduler

from lungddpm.models.objectives import DiffusionLoss, WeightedError
from lungddpm.models.prediction import clean_of, noise_of, target_of
from lungddpm.models.recipe import Batch
from lungddpm.models.sampling import invert, make_solver, sample_aas, sample_free
from lungddpm.models.schedule import alphas_cumprod, cosine_betas

KINDS = ["epsilon", "v", "clean"]
BETAS = cosine_betas(250)
SIGNAL = alphas_cumprod(BETAS)
MEAN, SPREAD = 0.2, 0.15


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def clean():
    return torch.rand(2, 1, 6, 6, 6, generator=seeded(1)) * 2 - 1


@pytest.fixture
def noise():
    return torch.randn(2, 1, 6, 6, 6, generator=seeded(2))


def ideal(kind):
    """The best possible prediction where voxels are independent, normal (MEAN, SPREAD)."""

    def predict(inputs, timesteps):
        share = SIGNAL[timesteps].view(-1, 1, 1, 1, 1)
        a, s = share.sqrt(), (1 - share).sqrt()
        gain = a * SPREAD**2 / (share * SPREAD**2 + 1 - share)
        expected = MEAN + gain * (inputs[:, :1] - a * MEAN)
        expected_noise = (inputs[:, :1] - a * expected) / s
        return {"epsilon": expected_noise, "v": a * expected_noise - s * expected, "clean": expected}[kind]

    return predict


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("timestep", [0, 100, 240])
def test_a_perfect_prediction_implies_the_clean_ct_and_the_noise(kind, timestep, clean, noise):
    a, s = SIGNAL[timestep].sqrt().item(), (1 - SIGNAL[timestep]).sqrt().item()
    state, target = (each.double() for each in (a * clean + s * noise, target_of(kind, clean, noise, a, s)))
    torch.testing.assert_close(clean_of(kind, state, target, a, s), clean.double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(noise_of(kind, state, target, a, s), noise.double(), rtol=0, atol=1e-4)


def test_the_velocity_is_that_of_diffusers(clean, noise):
    scheduler = DDPMScheduler(num_train_timesteps=250, trained_betas=BETAS.tolist())
    timesteps = torch.tensor([3, 200])
    share = SIGNAL[timesteps].view(-1, 1, 1, 1, 1)
    found = target_of("v", clean, noise, share.sqrt().float(), (1 - share).sqrt().float())
    torch.testing.assert_close(found, scheduler.get_velocity(clean, noise, timesteps), rtol=0, atol=1e-5)


def test_without_noise_a_predicted_ct_implies_nothing_about_it(clean):
    with pytest.raises(ValueError, match="where there is none"):
        noise_of("clean", clean, clean, 1.0, 0.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "power"), [("l1", 1), ("l2", 2)])
@pytest.mark.parametrize("lesion_weight", [1.0, 50.0])
def test_the_loss_is_the_mean_error_of_what_is_predicted(kind, name, power, lesion_weight, clean, noise):
    condition = torch.ones(2, 2, 6, 6, 6)
    condition[:, 1, 2:] = 0
    batch = Batch(clean, condition, noise, torch.tensor([10, 220]))
    objective = DiffusionLoss(250, kind, WeightedError(name, lesion_weight, 1), torch.device("cpu"))
    found = objective.loss(lambda inputs, _: 0.5 * inputs[:, :1], batch)
    a, s = (share.sqrt().view(-1, 1, 1, 1, 1) for share in (SIGNAL[[10, 220]], 1 - SIGNAL[[10, 220]]))
    target = {"epsilon": noise, "v": a * noise - s * clean, "clean": clean}[kind]
    error = ((a * clean + s * noise) / 2 - target).abs().pow(power)
    # The nodule fills a third.
    of_nodule, of_others = error[:, :, :2].mean().item(), error[:, :, 2:].mean().item()
    expected = (lesion_weight * of_nodule + 2 * of_others) / (lesion_weight + 2)
    assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmsolver++", "unipc"])
def test_ideal_networks_of_all_kinds_draw_the_same(kind, sampler):
    condition = torch.ones(1, 1, 12, 12, 12)
    drawn = sample_free(ideal(kind), make_solver(sampler, 2, BETAS, 20, kind), condition, [seeded(3)])
    expected = sample_free(ideal("epsilon"), make_solver(sampler, 2, BETAS, 20), condition, [seeded(3)])
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_aas_keeps_the_reference_under_every_kind(kind, clean):
    condition = torch.ones(2, 2, 6, 6, 6)
    condition[:, :, :3] = -1
    drawn = sample_aas(ideal(kind), make_solver("dpmsolver++", 2, BETAS, 10, kind), condition, clean, [seeded(4)] * 2)
    assert torch.equal(drawn[:, :, :3], clean[:, :, :3])


@pytest.mark.parametrize("kind", KINDS)
def test_an_inverted_ct_is_reproduced(kind):
    clean = MEAN + SPREAD * torch.randn(1, 1, 12, 12, 12, generator=seeded(5))
    condition, solver = torch.ones_like(clean), make_solver("dpmsolver++", 2, BETAS, 50, kind)
    path = invert(ideal(kind), solver, condition, clean)
    expected = invert(ideal("epsilon"), make_solver("dpmsolver++", 2, BETAS, 50), condition, clean)
    torch.testing.assert_close(path, expected, rtol=0, atol=1e-3)
    noisiest = path[0]
    back = sample_free(ideal(kind), solver, condition, [seeded(6)], noisiest)
    # Limited by the steps, see test_sampling.
    assert (back - clean).std().item() < 0.02 * SPREAD


def test_an_error_at_the_noisiest_level_moves_the_brightness_under_epsilon_alone():
    """The same small error of the network everywhere: as many times as large in the CT as there is noise per signal."""
    state, a = torch.zeros(1, 1, 2, 2, 2), SIGNAL[245].sqrt().item()
    s = (1 - a**2) ** 0.5
    moved = {kind: clean_of(kind, state, torch.full_like(state, 0.01), a, s).abs().max().item() for kind in KINDS}
    assert moved["epsilon"] == pytest.approx(0.01 * s / a)
    assert moved["epsilon"] > 0.2
    assert moved["v"] <= 0.01
    assert moved["clean"] == pytest.approx(0.01)
