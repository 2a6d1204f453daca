import importlib.util

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from lungddpm.models.sampling import Solver, invert, open_voxels, sample
from lungddpm.models.schedule import alphas_cumprod, cosine_betas

BETAS = cosine_betas(250)
SIGNAL = alphas_cumprod(BETAS)
MEAN, SPREAD = 0.2, 0.15
SOLVERS = [("ddim", 2), ("dpmsolver++", 2), ("dpmsolver++", 3), ("unipc", 2), ("unipc", 3)]
SAMPLERS = [("ddpm", 2), *SOLVERS]

# From the golden file (aas_* need its random reference): voxels of plain_T12_seed4321.
GOLDEN_VOXELS = {
    (0, 0, 0): -0.84949380,
    (4, 20, 11): 0.13771763,
    (8, 16, 24): 0.74975562,
    (15, 12, 9): 1.0,
    (16, 16, 16): -0.94697189,
    (31, 31, 31): 1.0,
}
GOLDEN_MEAN, GOLDEN_SPREAD = 0.37074180, 0.78240824


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


@pytest.fixture(scope="module")
def accuracy(repository):
    """The benchmark's module: data whose best denoiser and conditional distribution are known in closed form."""
    path = repository / "benchmarks" / "sampler_accuracy.py"
    spec = importlib.util.spec_from_file_location("sampler_accuracy", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def half_open():
    """Two layouts whose first half (along depth) is open, and a reference."""
    condition = torch.ones(2, 2, 16, 16, 16)
    condition[:, :, :8] = -1
    return condition, torch.rand(2, 1, 16, 16, 16, generator=seeded(5)) * 2 - 1


@pytest.fixture(scope="module")
def plain_sample(golden_denoiser):
    """plain_T12_seed4321, computed anew; its layout is two boxes with a box in one of them."""
    layout = np.zeros((2, 32, 32, 32), bool)
    layout[0, 6:26, 5:27, 4:15] = layout[0, 6:26, 5:27, 17:28] = True
    layout[1, 14:18, 10:15, 8:12] = True
    layout[0] &= ~layout[1]
    condition = torch.from_numpy(layout)[None].float() * 2 - 1
    return condition, sample(golden_denoiser, condition, cosine_betas(12), "ddpm", 12, [seeded(4321)])


def test_plain_sampling_meets_the_golden_voxels(plain_sample):
    _, drawn = plain_sample
    assert drawn.mean().item() == pytest.approx(GOLDEN_MEAN, abs=1e-5)
    assert drawn.std().item() == pytest.approx(GOLDEN_SPREAD, abs=1e-4)
    for voxel, value in GOLDEN_VOXELS.items():
        assert drawn[(0, 0, *voxel)].item() == pytest.approx(value, abs=1e-4)


def test_plain_sampling_equals_the_golden_volume(plain_sample, golden):
    condition, drawn = plain_sample
    assert torch.equal(condition, golden["layout"][:1].float() * 2 - 1)
    torch.testing.assert_close(drawn, golden["plain_T12_seed4321"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("key", "blend_from"), [("aas_T12_seed4321", None), ("aas_T12_seed4321_blend_from6", 6)])
def test_published_aas_equals_the_golden_volumes(golden, golden_denoiser, key, blend_from):
    condition = golden["layout"][:1].float() * 2 - 1
    aas = {"reference": golden["x0"][:1], "aas": "published", "blend_from": blend_from}
    drawn = sample(golden_denoiser, condition, cosine_betas(12), "ddpm", 12, [seeded(4321)], **aas)
    torch.testing.assert_close(drawn, golden[key], rtol=0, atol=1e-4)


@pytest.mark.parametrize("blend_from", [None, 6])
def test_published_aas_equals_the_published_loop(half_open, blend_from):
    """The loop as the publication describes it, written out; it draws the same noise in the same order."""
    condition, reference = (tensor[:1] for tensor in half_open)
    betas, generator = cosine_betas(12), seeded(7)
    signal, predict = alphas_cumprod(betas), ideal_denoiser(betas)
    before = torch.cat([torch.ones(1, dtype=signal.dtype), signal[:-1]])
    state = torch.randn(reference.shape, generator=generator)
    for t in range(11, -1, -1):
        noise = predict(torch.cat([state, condition], dim=1), torch.tensor([t]))
        clean = ((state - (1 - signal[t]).sqrt() * noise) / signal[t].sqrt()).clamp(-1, 1)
        of_clean = before[t].sqrt() * betas[t] / (1 - signal[t])
        of_state = (1 - betas[t]).sqrt() * (1 - before[t]) / (1 - signal[t])
        deviation = (betas[t] * (1 - before[t]) / (1 - signal[t])).sqrt()
        ancestral = torch.randn(reference.shape, generator=generator)
        state = of_clean * clean + of_state * state + (t > 0) * deviation * ancestral
        pasted = signal[t].sqrt() * reference
        pasted = pasted + (1 - signal[t]).sqrt() * torch.randn(reference.shape, generator=generator)
        if blend_from is None or t <= blend_from:
            state = torch.where(open_voxels(condition), pasted, state)
    aas = {"reference": reference, "aas": "published", "blend_from": blend_from}
    drawn = sample(predict, condition, betas, "ddpm", 12, [seeded(7)], **aas)
    torch.testing.assert_close(drawn, state.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("sampler", "order", "timesteps", "steps", "tolerance"),
    [
        ("ddpm", 2, 250, 250, 0.05),
        ("ddpm", 2, 250, 50, 0.09),
        ("ddpm", 2, 1000, 1000, 0.015),
        ("ddim", 2, 250, 50, 0.06),
        ("dpmsolver++", 2, 250, 20, 0.01),
        ("dpmsolver++", 2, 1000, 50, 0.01),
        ("dpmsolver++", 3, 250, 20, 0.01),
        ("unipc", 2, 250, 20, 0.01),
        ("unipc", 3, 250, 20, 0.01),
    ],
)
def test_ideal_denoiser_recovers_mean_and_spread(sampler, order, timesteps, steps, tolerance):
    betas, condition = cosine_betas(timesteps), torch.ones(1, 1, 24, 24, 24)
    drawn = sample(ideal_denoiser(betas), condition, betas, sampler, steps, [seeded(1)], order=order)
    # 24^3 voxels: standard error 0.0013 of the mean, 0.6 % of the spread.
    assert drawn.mean().item() == pytest.approx(MEAN, abs=0.005)
    assert drawn.std().item() == pytest.approx(SPREAD, rel=tolerance + 0.01)


@pytest.mark.parametrize(
    ("sampler", "order", "least", "most"),
    [
        ("ddim", 2, 0.9, 1.1),
        ("dpmsolver++", 2, 1.8, 2.2),
        # diffusers' third-order update takes half of the second difference: fewer errors, but no third order.
        ("dpmsolver++", 3, 2.1, 2.7),
        # The corrector adds an order.
        ("unipc", 2, 2.7, 3.3),
        ("unipc", 3, 3.0, 5.0),
    ],
)
def test_errors_fall_at_the_order_of_the_solver(accuracy, sampler, order, least, most):
    steps = (20, 40, 80)
    errors = [accuracy.flow_error(sampler, order, count) for count in steps]
    assert least < accuracy.order_of(errors, steps) < most


def test_ddim_takes_its_true_steps():
    """Song et al. 2021, eq. 12 without noise, between the timesteps that are visited: 7 does not divide 250."""
    solver, predict = Solver("ddim", 2, BETAS, 7), ideal_denoiser(BETAS)
    condition = torch.ones(1, 1, 4, 4, 4)
    state = torch.randn(1, 1, 4, 4, 4, generator=seeded(3))
    levels = [*SIGNAL[solver.timesteps], torch.tensor(1.0)]
    for timestep, here, there in zip(solver.timesteps, levels, levels[1:], strict=False):
        noise = predict(torch.cat([state, condition], dim=1), torch.tensor([timestep]))
        clean = (state - (1 - here).sqrt() * noise) / here.sqrt()
        state = there.sqrt() * clean + (1 - there).sqrt() * noise
    drawn = sample(predict, condition, BETAS, "ddim", 7, [seeded(3)])
    torch.testing.assert_close(drawn, state.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("sampler", "order"), SAMPLERS)
@pytest.mark.parametrize("steps", [1, 3, 20, 60, 249, 250])
def test_timesteps_are_as_many_as_asked_and_reach_from_noise_to_ct(sampler, order, steps):
    solver = Solver(sampler, order, BETAS, steps)
    first, most = (249, 250) if (sampler, steps) == ("ddpm", 250) else (248, 249)
    assert solver.timesteps[0] == first
    assert len(solver.timesteps) == min(steps, most)
    assert solver.timesteps == sorted(set(solver.timesteps), reverse=True)
    assert steps == 1 or solver.timesteps[-1] == 0


@pytest.mark.parametrize("steps", [0, 251])
def test_steps_that_do_not_fit(steps):
    with pytest.raises(ValueError, match=f"{steps} steps do not fit 250 timesteps"):
        sample(ideal_denoiser(BETAS), torch.ones(1, 1, 4, 4, 4), BETAS, "dpmsolver++", steps, [seeded(0)])


@pytest.mark.parametrize(("sampler", "order"), SOLVERS)
def test_solver_is_at_the_level_that_is_pasted(sampler, order):
    """Our levels, in float64, are those of diffusers' own state after each step; the last is clean."""
    solver = Solver(sampler, order, BETAS, 12)
    assert solver.noise[-2] == pytest.approx((1 - SIGNAL[0]).sqrt().item(), rel=1e-12)
    state = torch.zeros(1, 1, 2, 2, 2)
    for index in range(12):
        state = solver.step(index, state, state, [])
        scheduler = solver.scheduler
        signal, noise = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[scheduler.step_index])
        assert signal.item() == pytest.approx(solver.signal[index + 1], rel=1e-5)
        assert noise.item() == pytest.approx(solver.noise[index + 1], rel=1e-5, abs=1e-12)
    assert (solver.signal[-1], solver.noise[-1]) == (1, 0)


@pytest.mark.parametrize(("sampler", "order"), SAMPLERS)
@pytest.mark.parametrize("steps", [20, 250])
def test_errors_of_the_noise_do_not_explode(sampler, order, steps):
    """Where the state is nearly pure noise, they grow up to 5,000-fold in the clean CT."""
    ideal = ideal_denoiser(BETAS)

    def predict_noise(inputs, timesteps):
        return ideal(inputs, timesteps) + 0.02 * torch.randn(inputs[:, :1].shape, generator=seeded(int(timesteps[0])))

    condition = torch.ones(1, 1, 16, 16, 16)
    drawn = sample(predict_noise, condition, BETAS, sampler, steps, [seeded(1)], order=order)
    assert drawn.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert drawn.std().item() == pytest.approx(SPREAD, rel=0.25)


def test_clamp_is_dynamic_thresholding_with_its_default_cap():
    scheduler = DPMSolverMultistepScheduler(thresholding=True)
    implied = torch.randn(1, 1, 8, 8, 8, generator=seeded(2)) * 3
    torch.testing.assert_close(scheduler._threshold_sample(implied), implied.clamp(-1, 1), rtol=0, atol=0)
    # Unlike dynamic thresholding, the clamp has no largest volume.
    large = torch.full((1, 1, 257, 256, 256), 0.5)
    assert Solver("dpmsolver++", 2, BETAS, 1).clean(0, large, large).max() <= 1


def test_corrector_would_undo_what_is_pasted():
    """Why UniPC goes without it under AAS: it rebuilds the state from the one before."""

    def after_two_steps(corrector, pasted):
        solver = Solver("unipc", 2, BETAS, 5, corrector)
        state = solver.step(0, torch.ones(1, 1, 2, 2, 2), torch.zeros(1, 1, 2, 2, 2), [])
        return solver.step(1, state + pasted, torch.zeros(1, 1, 2, 2, 2), [])

    assert torch.equal(after_two_steps(True, 0.5), after_two_steps(True, 0.0))
    assert not torch.equal(after_two_steps(False, 0.5), after_two_steps(False, 0.0))


@pytest.mark.parametrize("resampling", [1, 2])
@pytest.mark.parametrize(("sampler", "order"), SAMPLERS)
def test_corrected_aas_restores_the_reference_exactly(half_open, sampler, order, resampling):
    condition, reference = half_open
    changes = {"order": order, "resampling": resampling}
    generators = [seeded(1), seeded(2)]
    drawn = sample(ideal_denoiser(BETAS), condition, BETAS, sampler, 25, generators, reference, **changes)
    background = open_voxels(condition)
    assert background[:, :, :8].all()
    assert not background[:, :, 8:].any()
    assert torch.equal(drawn[background], reference[background])
    generated = drawn[~background]
    assert generated.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert generated.std().item() == pytest.approx(SPREAD, rel=0.2)


@pytest.mark.parametrize(("sampler", "order"), SAMPLERS)
def test_corrected_aas_pastes_at_the_level_of_the_state(half_open, sampler, order):
    """At every call the background's noise has the standard deviation that the timestep says."""
    condition, reference = half_open
    noise_levels = []

    def predict_noise(inputs, timesteps):
        share = SIGNAL[timesteps[0]]
        residual = inputs[:, :1, :8] - share.sqrt() * reference[:, :, :8]
        noise_levels.append((residual.std() / (1 - share).sqrt()).item())
        return ideal_denoiser(BETAS)(inputs, timesteps)

    generators = [seeded(1), seeded(2)]
    sample(predict_noise, condition, BETAS, sampler, 20, generators, reference, order=order, resampling=2)
    assert len(noise_levels) == 40
    assert min(noise_levels) > 0.94
    assert max(noise_levels) < 1.06


def test_published_aas_leaves_noise_in_the_background(half_open):
    condition, reference = half_open
    generators = [seeded(1), seeded(2)]
    drawn = sample(ideal_denoiser(BETAS), condition, BETAS, "ddpm", 250, generators, reference, aas="published")
    left = (drawn - reference)[open_voxels(condition)]
    assert left.std().item() == pytest.approx(0.0139, rel=0.05)


def test_resampling_mends_the_seam_and_keeps_the_spread(accuracy):
    data = accuracy.correlated("rough", 6)
    once, twice, often = (
        accuracy.seam_deviation(data, "dpmsolver++", 2, 20, resampling, columns=1024) for resampling in (1, 2, 8)
    )
    assert once[0] > 1.5
    assert twice[0] < once[0] - 0.15
    assert often[0] < 1.15
    # A multistep solver that went on after a jump without forgetting would spread far too much here.
    assert often[2] == pytest.approx(1, abs=0.08)


@pytest.mark.parametrize(("times", "told"), [("corrected", [248, 0]), ("published", [992, 0])])
def test_published_times_are_on_a_scale_of_1000(times, told):
    seen = []

    def predict_noise(inputs, timesteps):
        seen.append(timesteps.item())
        return inputs[:, :1]

    sample(predict_noise, torch.ones(1, 1, 4, 4, 4), BETAS, "dpmsolver++", 2, [seeded(0)], times=times)
    assert seen == told


@pytest.mark.parametrize(
    ("sampler", "order", "least", "error"),
    [
        ("ddim", 2, 0.8, 0.1),
        # What is left is that of the first and last step, from and to the clean CT.
        ("dpmsolver++", 2, 2, 0.002),
        ("dpmsolver++", 3, 2, 0.002),
        ("unipc", 2, 2, 0.003),
        ("unipc", 3, 2, 0.002),
    ],
)
def test_sampling_finds_again_what_was_inverted(accuracy, sampler, order, least, error):
    """The error falls with the steps, on data of several voxels that depend on each other."""
    data = accuracy.correlated("rough", 6)
    clean, predict = data.draw(256, seeded(0)), data.best_denoiser(BETAS)
    condition = torch.ones_like(clean)
    errors = []
    for steps in (12, 25, 50):
        path = invert(predict, condition, BETAS, sampler, steps, clean, order=order)
        found = sample(predict, condition, BETAS, sampler, steps, [seeded(1)], order=order, start=path[0])
        errors.append((found - clean).abs().max().item())
    assert errors[2] < error
    assert accuracy.order_of(errors, (12, 25, 50)) > least
    assert path[0].std().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(path[-1], clean)


@pytest.mark.parametrize(("sampler", "order"), SOLVERS)
def test_held_voxels_keep_to_the_path(half_open, sampler, order):
    """At every call they are where the inversion was at that level, and at the end they are the CT itself."""
    condition, reference = half_open
    ideal, held = ideal_denoiser(BETAS), open_voxels(condition)
    path = invert(ideal, condition, BETAS, sampler, 20, reference, order=order)
    calls = iter(path)

    def predict_noise(inputs, timesteps):
        assert torch.equal(inputs[:, :1][held], next(calls)[held])
        return ideal(inputs, timesteps)

    start = torch.where(held, path[0], torch.randn(reference.shape, generator=seeded(3)))
    changes = {"order": order, "start": start, "path": path, "held": held}
    drawn = sample(predict_noise, condition, BETAS, sampler, 20, [seeded(1), seeded(2)], **changes)
    assert torch.equal(drawn[held], reference[held])
    assert drawn[~held].std().item() == pytest.approx(SPREAD, rel=0.15)


@pytest.mark.parametrize(("times", "told"), [("corrected", [0, 0, 248]), ("published", [0, 0, 992])])
def test_inversion_calls_the_denoiser_once_a_step(times, told):
    seen = []

    def predict_noise(inputs, timesteps):
        seen.append(timesteps.item())
        return torch.zeros_like(inputs[:, :1])

    clean = torch.full((1, 1, 4, 4, 4), 0.5)
    state = invert(predict_noise, torch.ones_like(clean), BETAS, "dpmsolver++", 3, clean, times=times)[0]
    assert len(seen) == 3
    assert seen[::2] == [told[0], seen[2]]
    assert seen == sorted(seen)
    # Without noise, nothing but the signal's scale at the noisiest level is left.
    torch.testing.assert_close(state, SIGNAL[248].sqrt().float() * clean)


@pytest.mark.parametrize(("sampler", "steps"), [("ddpm", 250), ("dpmsolver++", 10), ("unipc", 10)])
def test_a_volume_depends_on_its_own_generator_only(half_open, sampler, steps):
    condition, reference = half_open
    global_state = torch.get_rng_state()
    together = sample(ideal_denoiser(BETAS), condition, BETAS, sampler, steps, [seeded(1), seeded(2)], reference)
    alone = sample(ideal_denoiser(BETAS), condition[1:], BETAS, sampler, steps, [seeded(2)], reference[1:])
    torch.testing.assert_close(together[1:], alone, rtol=0, atol=1e-6)
    assert not torch.equal(together[:1], together[1:])
    assert torch.equal(torch.get_rng_state(), global_state)


def log_share(t):
    """Logarithm of alpha at a fractional timestep: linear between whole ones."""
    return np.interp(t, np.arange(250), torch.log(SIGNAL).numpy() / 2)


def any_time_denoiser(data):
    """The best denoiser of `GaussianColumns` at fractional timesteps."""
    variances, axes = np.linalg.eigh(data.covariance)

    def predict_noise(inputs, timesteps):
        alpha = np.exp(log_share(float(timesteps[0])))
        sigma = np.sqrt(1 - alpha**2)
        columns = inputs[0, 0, :, :, 0].double().numpy()
        noise = axes @ ((sigma / (alpha**2 * variances + sigma**2))[:, None] * (axes.T @ columns))
        return torch.from_numpy(noise).float().reshape(inputs[:, :1].shape)

    return predict_noise


def dpm_solver_plus_plus(predict_noise, state, times):
    """Lu et al. 2022 (arXiv 2211.01095): multistep of order 3 after one step each of order 1 and 2, in float64."""
    alpha = np.exp([log_share(t) for t in times])
    sigma = np.sqrt(1 - alpha**2)
    place = np.log(alpha / sigma)
    implied = []
    for i, time in enumerate(times[:-1]):
        noise = predict_noise(state.float(), torch.tensor([time])).double()
        clean = (state - sigma[i] * noise) / alpha[i]
        limit = max(np.quantile(clean.abs().numpy(), 0.995), 1)
        implied.append(clean.clamp(-limit, limit) / limit)
        h = place[i + 1] - place[i]
        e1 = -np.expm1(-h)
        state = sigma[i + 1] / sigma[i] * state + alpha[i + 1] * e1 * implied[i]
        if i == 1:
            slope = (implied[1] - implied[0]) / (place[1] - place[0])
            state = state + alpha[2] * e1 * h / 2 * slope
        if i > 1:
            # Newton's divided differences of what is implied, at the last three places.
            first, second = ((implied[k] - implied[k - 1]) / (place[k] - place[k - 1]) for k in (i, i - 1))
            step, before = place[i] - place[i - 1], place[i - 1] - place[i - 2]
            bend = (first - second) / (step + before)
            slope = first + step * bend
            e2 = h - e1
            state = state + alpha[i + 1] * (e2 * slope + (h**2 / 2 - e2) * bend)
    return state


@pytest.fixture(scope="module")
def chest_like(accuracy):
    """Spread and correlation of this order gave the figures that are known of the released sampler."""
    return accuracy.correlated("rough", 8, 64, 0.14)


def test_published_levels_are_those_of_the_released_sampler(chest_like):
    """50 steps evenly from 249 to 0: its inverted noise has a spread of 0.876, and 0.03 of the CT's is lost."""
    clean, predict = chest_like.draw(256, seeded(0)), any_time_denoiser(chest_like)
    called = []

    def watched(inputs, timesteps):
        called.append(timesteps.item())
        return predict(inputs, timesteps)

    options = {"order": 3, "levels": "published"}
    condition = torch.ones_like(clean)
    path = invert(watched, condition, BETAS, "dpmsolver++", 50, clean, **options)
    found = sample(watched, condition, BETAS, "dpmsolver++", 50, [seeded(1)], start=path[0], **options)
    assert len(path) == 51
    assert path[0].std().item() == pytest.approx(0.876, abs=0.01)
    lost = (found - clean).square().mean().sqrt() / clean.std()
    assert lost.item() == pytest.approx(0.03, abs=0.005)
    times = np.linspace(249, 0, 51)
    assert times[1] == pytest.approx(244.02)
    # The released one calls the denoiser at the last level of each way, too, and does not use it.
    np.testing.assert_allclose(called, [*times[::-1][:-1], *times[:-1]], atol=1e-4)
    expected = dpm_solver_plus_plus(predict, clean.double(), times[::-1])
    torch.testing.assert_close(path[0].double(), expected, rtol=0, atol=1e-4)
    back = dpm_solver_plus_plus(predict, path[0].double(), times)
    torch.testing.assert_close(found.double(), back, rtol=0, atol=1e-4)


def test_published_thresholding_divides_by_the_quantile_of_each_volume():
    solver = Solver("dpmsolver++", 3, BETAS, 50, levels="published")
    ramp = torch.linspace(-1, 1, 20001)[:, None, None, None].expand(2, 1, 20001, 1, 1, 1)[..., 0]
    implied = ramp * torch.tensor([0.5, 4.0]).view(2, 1, 1, 1, 1)
    found = solver.clean(50, implied * solver.signal[50], torch.zeros_like(implied))
    torch.testing.assert_close(found[0], implied[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[1], (implied[1] / (0.995 * 4)).clamp(-1, 1), rtol=0, atol=1e-4)
