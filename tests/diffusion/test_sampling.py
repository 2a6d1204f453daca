import pytest
import torch

from lungddpm.diffusion.sampling import open_voxels, sample
from lungddpm.diffusion.schedule import alphas_cumprod, cosine_betas

BETAS = cosine_betas(250)
MEAN, SPREAD = 0.2, 0.15


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def ideal_denoiser(betas, spread=SPREAD):
    """The best possible noise prediction where voxels are independent, normal (MEAN, spread)."""
    signal = alphas_cumprod(betas)

    def predict_noise(inputs, timesteps):
        share = signal[timesteps].view(-1, 1, 1, 1, 1)
        residual = inputs[:, :1] - share.sqrt() * MEAN
        return (1 - share).sqrt() * residual / (share * spread**2 + 1 - share)

    return predict_noise


@pytest.fixture
def half_open():
    """Two layouts whose first half (along depth) is open, and a reference."""
    condition = torch.ones(2, 2, 16, 16, 16)
    condition[:, :, :8] = -1
    return condition, torch.rand(2, 1, 16, 16, 16, generator=seeded(5)) * 2 - 1


@pytest.mark.parametrize(
    ("key", "pasting"),
    [
        ("plain_T12_seed4321", None),
        ("aas_T12_seed4321", {"blend_from": None}),
        ("aas_T12_seed4321_blend_from6", {"blend_from": 6}),
    ],
)
def test_published_sampling_equals_the_golden_volumes(golden, golden_denoiser, key, pasting):
    condition = golden["layout"][:1].float() * 2 - 1
    aas = {} if pasting is None else {"reference": golden["x0"][:1], "mode": "published", **pasting}
    drawn = sample(golden_denoiser, condition, cosine_betas(12), "ddpm", 12, [seeded(4321)], **aas)
    torch.testing.assert_close(drawn, golden[key], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("sampler", "timesteps", "steps", "tolerance"),
    [
        ("ddpm", 250, 250, 0.05),
        ("ddpm", 1000, 1000, 0.015),
        ("dpmsolver++", 250, 20, 0.15),
        ("dpmsolver++", 250, 50, 0.01),
        ("dpmsolver++", 1000, 100, 0.01),
    ],
)
def test_ideal_denoiser_recovers_mean_and_spread(sampler, timesteps, steps, tolerance):
    betas = cosine_betas(timesteps)
    drawn = sample(ideal_denoiser(betas), torch.ones(1, 1, 24, 24, 24), betas, sampler, steps, [seeded(1)])
    # 24^3 voxels: standard error 0.0013 of the mean, 0.6 % of the spread.
    assert drawn.mean().item() == pytest.approx(MEAN, abs=0.005)
    assert drawn.std().item() == pytest.approx(SPREAD, rel=tolerance + 0.01)


def test_dpm_solver_carries_each_voxel_along_the_exact_path():
    # With normal data the probability flow is linear: the start's quantile is the end's quantile.
    drawn = sample(ideal_denoiser(BETAS), torch.ones(1, 1, 8, 8, 8), BETAS, "dpmsolver++", 100, [seeded(3)])
    start = torch.randn(1, 1, 8, 8, 8, generator=seeded(3))
    torch.testing.assert_close(drawn, MEAN + SPREAD * start, rtol=0, atol=0.01)


@pytest.mark.parametrize("steps", [1, 3, 20, 249, 250])
def test_dpm_solver_is_finite_and_visits_no_timestep_twice(steps):
    visited = []

    def predict_noise(inputs, timesteps):
        visited.append(int(timesteps[0]))
        return inputs[:, :1]

    drawn = sample(predict_noise, torch.ones(1, 1, 4, 4, 4), BETAS, "dpmsolver++", steps, [seeded(0)])
    assert drawn.isfinite().all()
    assert visited == sorted(set(visited), reverse=True)
    assert len(visited) == min(steps, 249)
    assert visited[0] == 248


def test_ddpm_needs_all_steps():
    with pytest.raises(ValueError, match="visits all 250"):
        sample(ideal_denoiser(BETAS), torch.ones(1, 1, 4, 4, 4), BETAS, "ddpm", 20, [seeded(0)])


@pytest.mark.parametrize(("sampler", "steps"), [("ddpm", 250), ("dpmsolver++", 20)])
def test_corrected_aas_restores_the_reference_exactly(half_open, sampler, steps):
    condition, reference = half_open
    drawn = sample(ideal_denoiser(BETAS), condition, BETAS, sampler, steps, [seeded(1), seeded(2)], reference)
    background = open_voxels(condition)
    assert background[:, :, :8].all()
    assert not background[:, :, 8:].any()
    assert torch.equal(drawn[background], reference[background])
    generated = drawn[~background]
    assert generated.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert generated.std().item() == pytest.approx(SPREAD, rel=0.2)


def test_corrected_aas_pastes_at_the_level_of_the_state(half_open):
    """At every call the background's noise has the standard deviation that the timestep says."""
    condition, reference = half_open
    signal, noise_levels = alphas_cumprod(BETAS), []

    def predict_noise(inputs, timesteps):
        share = signal[timesteps[0]]
        residual = inputs[:, :1, :8] - share.sqrt() * reference[:, :, :8]
        noise_levels.append((residual.std() / (1 - share).sqrt()).item())
        return ideal_denoiser(BETAS)(inputs, timesteps)

    for sampler, steps in (("ddpm", 250), ("dpmsolver++", 20)):
        noise_levels.clear()
        sample(predict_noise, condition, BETAS, sampler, steps, [seeded(1), seeded(2)], reference)
        assert min(noise_levels) > 0.94
        assert max(noise_levels) < 1.06


def test_published_aas_leaves_noise_in_the_background(half_open):
    condition, reference = half_open
    generators = [seeded(1), seeded(2)]
    drawn = sample(ideal_denoiser(BETAS), condition, BETAS, "ddpm", 250, generators, reference, mode="published")
    left = (drawn - reference)[open_voxels(condition)]
    assert left.std().item() == pytest.approx(0.0139, rel=0.05)


@pytest.mark.parametrize(("sampler", "steps"), [("ddpm", 250), ("dpmsolver++", 10)])
def test_a_volume_depends_on_its_own_generator_only(half_open, sampler, steps):
    condition, reference = half_open
    global_state = torch.get_rng_state()
    together = sample(ideal_denoiser(BETAS), condition, BETAS, sampler, steps, [seeded(1), seeded(2)], reference)
    alone = sample(ideal_denoiser(BETAS), condition[1:], BETAS, sampler, steps, [seeded(2)], reference[1:])
    torch.testing.assert_close(together[1:], alone, rtol=0, atol=1e-6)
    assert not torch.equal(together[:1], together[1:])
    assert torch.equal(torch.get_rng_state(), global_state)
