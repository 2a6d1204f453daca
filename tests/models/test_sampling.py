import importlib.util

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from lungddpm.config.sections import Solving
from lungddpm.models.published_sampling import (
    choose_solver,
    sample_published_aas,
    threshold_dynamically,
)
from lungddpm.models.sampling import (
    invert,
    make_solver,
    noise_levels,
    open_voxels,
    redraw,
    sample_aas,
    sample_free,
)
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
    """plain_T12_seed4321, computed here; its layout is two boxes with a box in one of them."""
    layout = np.zeros((2, 32, 32, 32), bool)
    layout[0, 6:26, 5:27, 4:15] = layout[0, 6:26, 5:27, 17:28] = True
    layout[1, 14:18, 10:15, 8:12] = True
    layout[0] &= ~layout[1]
    condition = torch.from_numpy(layout)[None].float() * 2 - 1
    solver = make_solver("ddpm", 2, cosine_betas(12), 12)
    return condition, sample_free(golden_denoiser, solver, condition, [seeded(4321)])


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
    solver = make_solver("ddpm", 2, cosine_betas(12), 12)
    drawn = sample_published_aas(golden_denoiser, solver, condition, golden["x0"][:1], [seeded(4321)], blend_from)
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
    solver = make_solver("ddpm", 2, betas, 12)
    drawn = sample_published_aas(predict, solver, condition, reference, [seeded(7)], blend_from)
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
    drawn = sample_free(ideal_denoiser(betas), make_solver(sampler, order, betas, steps), condition, [seeded(1)])
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
    solver, predict = make_solver("ddim", 2, BETAS, 7), ideal_denoiser(BETAS)
    timesteps = solver.levels.timesteps
    condition = torch.ones(1, 1, 4, 4, 4)
    state = torch.randn(1, 1, 4, 4, 4, generator=seeded(3))
    levels = [*SIGNAL[timesteps], torch.tensor(1.0)]
    for timestep, here, there in zip(timesteps, levels, levels[1:], strict=False):
        noise = predict(torch.cat([state, condition], dim=1), torch.tensor([timestep]))
        clean = (state - (1 - here).sqrt() * noise) / here.sqrt()
        state = there.sqrt() * clean + (1 - there).sqrt() * noise
    drawn = sample_free(predict, solver, condition, [seeded(3)])
    torch.testing.assert_close(drawn, state.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmsolver++", "unipc"])
@pytest.mark.parametrize("steps", [1, 3, 20, 60, 249, 250])
def test_timesteps_are_as_many_as_asked_and_reach_from_noise_to_ct(sampler, steps):
    timesteps = noise_levels(sampler, BETAS, steps).timesteps
    first, most = (249, 250) if (sampler, steps) == ("ddpm", 250) else (248, 249)
    assert timesteps[0] == first
    assert len(timesteps) == min(steps, most)
    assert timesteps == sorted(set(timesteps), reverse=True)
    assert steps == 1 or timesteps[-1] == 0


@pytest.mark.parametrize("steps", [0, 251])
def test_steps_that_do_not_fit(steps):
    with pytest.raises(ValueError, match=f"{steps} steps do not fit 250 timesteps"):
        make_solver("dpmsolver++", 2, BETAS, steps)


@pytest.mark.parametrize(("sampler", "order"), SOLVERS)
def test_solver_is_at_the_level_that_is_pasted(sampler, order):
    """Our levels, in float64, are those of diffusers' own state after each step; the last is clean."""
    solver = make_solver(sampler, order, BETAS, 12)
    solver.start(0, pasting=False)
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
    drawn = sample_free(predict_noise, make_solver(sampler, order, BETAS, steps), condition, [seeded(1)])
    assert drawn.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert drawn.std().item() == pytest.approx(SPREAD, rel=0.25)


def test_clamp_is_dynamic_thresholding_with_its_default_cap():
    scheduler = DPMSolverMultistepScheduler(thresholding=True)
    implied = torch.randn(1, 1, 8, 8, 8, generator=seeded(2)) * 3
    torch.testing.assert_close(scheduler._threshold_sample(implied), implied.clamp(-1, 1), rtol=0, atol=0)
    # Unlike dynamic thresholding, the clamp has no largest volume.
    large = torch.full((1, 1, 257, 256, 256), 0.5)
    assert make_solver("dpmsolver++", 2, BETAS, 1).clean(0, large, large).max() <= 1


def test_corrector_would_undo_what_is_pasted():
    """Why UniPC goes without it under AAS: it rebuilds the state from the one before."""
    solver = make_solver("unipc", 2, BETAS, 5)

    def after_two_steps(pasting, pasted):
        solver.start(0, pasting=pasting)
        state = solver.step(0, torch.ones(1, 1, 2, 2, 2), torch.zeros(1, 1, 2, 2, 2), [])
        return solver.step(1, state + pasted, torch.zeros(1, 1, 2, 2, 2), [])

    assert torch.equal(after_two_steps(False, 0.5), after_two_steps(False, 0.0))
    assert not torch.equal(after_two_steps(True, 0.5), after_two_steps(True, 0.0))


@pytest.mark.parametrize("resampling", [1, 2])
@pytest.mark.parametrize(("sampler", "order"), SAMPLERS)
def test_corrected_aas_restores_the_reference_exactly(half_open, sampler, order, resampling):
    condition, reference = half_open
    solver, generators = make_solver(sampler, order, BETAS, 25), [seeded(1), seeded(2)]
    drawn = sample_aas(ideal_denoiser(BETAS), solver, condition, reference, generators, resampling)
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

    solver, generators = make_solver(sampler, order, BETAS, 20), [seeded(1), seeded(2)]
    sample_aas(predict_noise, solver, condition, reference, generators, resampling=2)
    assert len(noise_levels) == 40
    assert min(noise_levels) > 0.94
    assert max(noise_levels) < 1.06


class StraightFlow:
    """Rectified flow (Liu et al. 2023): state = (1 - t) clean + t noise, t falling evenly; v = noise - clean."""

    def __init__(self, steps):
        self.noise = [1 - place / steps for place in range(steps + 1)]
        self.signal = [1 - t for t in self.noise]
        self.times = self.noise[:-1]

    def start(self, index, *, pasting):
        """Euler steps have no history."""

    def clean(self, index, state, prediction):
        return state - self.noise[index] * prediction

    def step(self, index, state, clean, generators):
        noise = (state - self.signal[index] * clean) / self.noise[index]
        return self.signal[index + 1] * clean + self.noise[index + 1] * noise


@pytest.mark.parametrize("resampling", [1, 3])
def test_aas_works_with_a_solver_of_another_process(half_open, resampling):
    """Flow from noise to independent voxels, normal (MEAN, SPREAD): the best velocity is E[noise - clean | state]."""
    condition, reference = half_open
    noise_levels = []

    def best_velocity(inputs, times):
        t = times[0].item()
        variance = (1 - t) ** 2 * SPREAD**2 + t**2
        residual = inputs[:, :1] - (1 - t) * MEAN
        noise_levels.append((inputs[:, :1, :8] - (1 - t) * reference[:, :, :8]).std().item() / t)
        return (t - (1 - t) * SPREAD**2) / variance * residual - MEAN

    generators = [seeded(1), seeded(2)]
    drawn = sample_aas(best_velocity, StraightFlow(200), condition, reference, generators, resampling)
    background = open_voxels(condition)
    assert torch.equal(drawn[background], reference[background])
    assert len(noise_levels) == 200 * resampling
    assert noise_levels == pytest.approx([1] * len(noise_levels), abs=0.06)
    generated = drawn[~background]
    assert generated.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert generated.std().item() == pytest.approx(SPREAD, rel=0.1)


def test_published_aas_leaves_noise_in_the_background(half_open):
    condition, reference = half_open
    solver, generators = make_solver("ddpm", 2, BETAS, 250), [seeded(1), seeded(2)]
    drawn = sample_published_aas(ideal_denoiser(BETAS), solver, condition, reference, generators)
    left = (drawn - reference)[open_voxels(condition)]
    assert left.std().item() == pytest.approx(0.0139, rel=0.05)


def test_resampling_improves_the_seam_and_keeps_the_spread(accuracy):
    data = accuracy.correlated("rough", 6)
    once, twice, often = (
        accuracy.seam_deviation(data, "dpmsolver++", 2, 20, resampling, columns=1024) for resampling in (1, 2, 8)
    )
    assert once[0] > 1.5
    assert twice[0] < once[0] - 0.15
    assert often[0] < 1.15
    # A multistep solver that kept its history after a jump would spread far too much here.
    assert often[2] == pytest.approx(1, abs=0.08)


@pytest.mark.parametrize(("times", "expected"), [("corrected", [248, 0]), ("published", [992, 0])])
def test_published_times_are_on_a_scale_of_1000(times, expected):
    seen = []

    def predict_noise(inputs, timesteps):
        seen.append(timesteps.item())
        return inputs[:, :1]

    solver = choose_solver(Solving(sampler="dpmsolver++", steps=2, times=times), BETAS, "epsilon")
    sample_free(predict_noise, solver, torch.ones(1, 1, 4, 4, 4), [seeded(0)])
    assert seen == expected


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
def test_sampling_reproduces_what_was_inverted(accuracy, sampler, order, least, error):
    """The error falls with the steps, on data of several voxels that depend on each other."""
    data = accuracy.correlated("rough", 6)
    clean, predict = data.draw(256, seeded(0)), data.best_denoiser(BETAS)
    condition = torch.ones_like(clean)
    errors = []
    for steps in (12, 25, 50):
        solver = make_solver(sampler, order, BETAS, steps)
        path = invert(predict, solver, condition, clean)
        found = sample_free(predict, solver, condition, [seeded(1)], path[0])
        errors.append((found - clean).abs().max().item())
    assert errors[2] < error
    assert accuracy.order_of(errors, (12, 25, 50)) > least
    assert path[0].std().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(path[-1], clean)


@pytest.mark.parametrize(("sampler", "order"), SOLVERS)
def test_fixed_voxels_follow_the_path(half_open, sampler, order):
    """At every call they are where the inversion was at that level, and at the end they are the CT itself."""
    condition, reference = half_open
    ideal, fixed_mask = ideal_denoiser(BETAS), open_voxels(condition)
    solver = make_solver(sampler, order, BETAS, 20)
    path = invert(ideal, solver, condition, reference)
    calls = iter(path)

    def predict_noise(inputs, timesteps):
        assert torch.equal(inputs[:, :1][fixed_mask], next(calls)[fixed_mask])
        return ideal(inputs, timesteps)

    start = torch.where(fixed_mask, path[0], torch.randn(reference.shape, generator=seeded(3)))
    drawn = redraw(predict_noise, solver, condition, start, path, fixed_mask)
    assert torch.equal(drawn[fixed_mask], reference[fixed_mask])
    assert drawn[~fixed_mask].std().item() == pytest.approx(SPREAD, rel=0.15)


@pytest.mark.parametrize(("times", "scale"), [("corrected", 1), ("published", 4)])
def test_inversion_calls_the_denoiser_once_per_step(times, scale):
    seen = []

    def predict_noise(inputs, timesteps):
        seen.append(timesteps.item())
        return torch.zeros_like(inputs[:, :1])

    clean = torch.full((1, 1, 4, 4, 4), 0.5)
    solver = choose_solver(Solving(sampler="dpmsolver++", steps=3, times=times), BETAS, "epsilon")
    state = invert(predict_noise, solver, torch.ones_like(clean), clean)[0]
    # From the clean CT to the least noisy level, and from each level to the next noisier one.
    assert seen == [0, 0, scale * noise_levels("dpmsolver++", BETAS, 3).timesteps[1]]
    # Without noise, nothing but the signal's scale at the noisiest level is left.
    torch.testing.assert_close(state, SIGNAL[248].sqrt().float() * clean)


@pytest.mark.parametrize(("sampler", "steps"), [("ddpm", 250), ("dpmsolver++", 10), ("unipc", 10)])
def test_a_volume_depends_on_its_own_generator_only(half_open, sampler, steps):
    condition, reference = half_open
    global_state = torch.get_rng_state()
    ideal, solver = ideal_denoiser(BETAS), make_solver(sampler, 2, BETAS, steps)
    together = sample_aas(ideal, solver, condition, reference, [seeded(1), seeded(2)])
    alone = sample_aas(ideal, solver, condition[1:], reference[1:], [seeded(2)])
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

    solver = choose_solver(Solving(sampler="dpmsolver++", order=3, steps=50, levels="published"), BETAS, "epsilon")
    condition = torch.ones_like(clean)
    path = invert(watched, solver, condition, clean)
    found = sample_free(watched, solver, condition, [seeded(1)], path[0])
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
    ramp = torch.linspace(-1, 1, 20001)[:, None, None, None].expand(2, 1, 20001, 1, 1, 1)[..., 0]
    implied = ramp * torch.tensor([0.5, 4.0]).view(2, 1, 1, 1, 1)
    found = threshold_dynamically(implied)
    torch.testing.assert_close(found[0], implied[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[1], (implied[1] / (0.995 * 4)).clamp(-1, 1), rtol=0, atol=1e-4)
