"""From noise to CT: free sampling, anatomically aware sampling (AAS; arXiv 2502.15204), inversion and redrawing.

A `Solver` goes from noise level to noise level, given the clean CT that the denoiser implies. `DiffusionSolver` does so
for denoisers of the diffusion process, with the schedulers of diffusers. Variants of the published systems are in
`published_sampling`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from lungddpm.models.denoiser import open_voxels
from lungddpm.models.prediction import Prediction, clean_of, noise_of
from lungddpm.models.schedule import alphas_cumprod, between_timesteps, spaced_timesteps

Predictor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""The network: (noisy CT and condition (N, 1 + C, D, H, W), times (N,)) -> prediction (N, 1, D, H, W)."""

Sampler = Literal["ddpm", "ddim", "dpmsolver++", "unipc"]
"""`ddpm`: ancestral (Ho et al. 2020); `ddim`: without noise (Song et al. 2021); `dpmsolver++`: multistep (Lu et al.
2022, arXiv 2211.01095); `unipc`: multistep with a corrector (Zhao et al. 2023)."""

# With one level per jump, multistep solvers would stay at first order; longer jumps improve the seam less.
_LEVELS_PER_JUMP = 2


class Solver(Protocol):
    """Takes states from one noise level to the next: state = signal * clean CT + noise * standard normal noise."""

    @property
    def times(self) -> Sequence[float]:
        """What the network receives as its time at each level; the clean CT, as the last level, has none."""

    @property
    def signal(self) -> Sequence[float]:
        """Scale of the clean CT at each level, from the first level visited to the last."""

    @property
    def noise(self) -> Sequence[float]:
        """Standard deviation of the noise at each level."""

    def start(self, index: int, *, pasting: bool) -> None:
        """Forget the steps taken; the next one leaves level `index`.

        Args:
            index: of a level.
            pasting: whether states are edited between steps. If so, a solver must not correct a state afterwards from
                the one before it: that would undo the edit.
        """

    def clean(self, index: int, state: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        """The clean CT in [-1, 1] that a state at level `index` and the network's prediction for it imply."""

    def step(
        self, index: int, state: torch.Tensor, clean: torch.Tensor, generators: Sequence[torch.Generator]
    ) -> torch.Tensor:
        """From level `index` to the next one; only a solver that adds noise uses the generators."""


@dataclass(frozen=True)
class NoiseLevels:
    """Noise levels of the diffusion process in the order in which they are visited.

    Attributes:
        timesteps: of each level on the schedule; the clean CT, as the last level, has none.
        times: the same as the network receives them.
        signal: scale of the clean CT at each level.
        noise: standard deviation of the noise at each level.
    """

    timesteps: Sequence[float]
    times: Sequence[float]
    signal: Sequence[float]
    noise: Sequence[float]

    @staticmethod
    def of(timesteps: Sequence[float], variances: torch.Tensor) -> NoiseLevels:
        """From timesteps and the share of the signal's variance at each level."""
        return NoiseLevels(timesteps, timesteps, variances.sqrt().tolist(), (1 - variances).sqrt().tolist())

    def reversed(self) -> NoiseLevels:
        """From the least noisy level to the noisiest, without the clean CT."""
        noisy = slice(len(self.timesteps) - 1, None, -1)
        backwards = slice(None, None, -1)
        return NoiseLevels(self.timesteps[backwards], self.times[backwards], self.signal[noisy], self.noise[noisy])


def noise_levels(sampler: Sampler, betas: torch.Tensor, steps: int) -> NoiseLevels:
    """Levels evenly spaced in log signal-to-noise ratio, and the clean CT at their end.

    Args:
        sampler: `ddpm` alone can take all T; the others leave out those that are pure noise.
        betas: (T,) float64 noise schedule.
        steps: distinct levels to visit before the clean CT.

    Raises:
        ValueError: fewer than one step, or more than T.
    """
    if not 1 <= steps <= len(betas):
        raise ValueError(f"{steps} steps do not fit {len(betas)} timesteps")
    signal = alphas_cumprod(betas)
    # Only the ancestral sampler can start at pure noise, where the state implies nothing about the clean CT.
    takes_all = sampler == "ddpm" and steps == len(betas)
    timesteps = list(reversed(range(steps))) if takes_all else spaced_timesteps(signal, steps)
    return NoiseLevels.of(timesteps, torch.cat([between_timesteps(signal, timesteps), signal.new_ones(1)]))


def clamp(implied: torch.Tensor) -> torch.Tensor:
    """A CT within the range that the denoiser was trained on, [-1, 1]."""
    return implied.clamp(-1, 1)


class DiffusionSolver:
    """A `Solver` for networks of the diffusion process; wraps a scheduler of diffusers.

    Args:
        sampler: the scheduler.
        order: 2 or 3, of `dpmsolver++` and `unipc`.
        betas: (T,) float64 noise schedule.
        levels: the noise levels to visit.
        prediction: what the network predicts.
        limit: brings the implied clean CT into [-1, 1].
    """

    def __init__(
        self,
        sampler: Sampler,
        order: int,
        betas: torch.Tensor,
        levels: NoiseLevels,
        prediction: Prediction = "epsilon",
        limit: Callable[[torch.Tensor], torch.Tensor] = clamp,
    ):
        self.levels = levels
        self.times, self.signal, self.noise = levels.times, levels.signal, levels.noise
        self._settings = sampler, order, betas
        self.prediction, self._limit = prediction, limit
        self.scheduler = _scheduler(sampler, order, betas)

    def start(self, index: int, *, pasting: bool) -> None:
        """See `Solver.start`; of these schedulers, UniPC corrects."""
        timesteps = list(self.levels.timesteps)
        if isinstance(self.scheduler, DDPMScheduler):
            self.scheduler.set_timesteps(timesteps=timesteps)
            return
        if isinstance(self.scheduler, UniPCMultistepScheduler):
            self.scheduler.disable_corrector = list(range(len(timesteps))) if pasting else []
        # The scheduler's own timesteps are too few, repeat, or end far from the clean CT, depending on the spacing.
        self.scheduler.set_timesteps(len(timesteps))
        self.scheduler.timesteps = torch.tensor(timesteps)
        self.scheduler.sigmas = torch.tensor([n / s for n, s in zip(self.noise, self.signal, strict=True)])
        self.scheduler.set_begin_index(index)

    def clean(self, index: int, state: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        """See `Solver.clean`."""
        return self._limit(clean_of(self.prediction, state, prediction, self.signal[index], self.noise[index]))

    def step(
        self, index: int, state: torch.Tensor, clean: torch.Tensor, generators: Sequence[torch.Generator]
    ) -> torch.Tensor:
        """See `Solver.step`; only `ddpm` adds noise."""
        ancestral = {"generator": list(generators)} if isinstance(self.scheduler, DDPMScheduler) else {}
        return self.scheduler.step(clean, self.levels.timesteps[index], state, **ancestral).prev_sample

    def reversed(self) -> DiffusionSolver:
        """A solver in the opposite direction, from the least noisy level to the noisiest; not with `ddpm`."""
        return DiffusionSolver(*self._settings, self.levels.reversed(), self.prediction, self._limit)


def make_solver(
    sampler: Sampler,
    order: int,
    betas: torch.Tensor,
    steps: int,
    prediction: Prediction = "epsilon",
    limit: Callable[[torch.Tensor], torch.Tensor] = clamp,
) -> DiffusionSolver:
    """A solver that visits `noise_levels`; for the other arguments see `DiffusionSolver`.

    Raises:
        ValueError: fewer than one step, or more than T.
    """
    return DiffusionSolver(sampler, order, betas, noise_levels(sampler, betas, steps), prediction, limit)


def _scheduler(
    sampler: Sampler, order: int, betas: torch.Tensor
) -> DDPMScheduler | DPMSolverMultistepScheduler | UniPCMultistepScheduler:
    shared = {"num_train_timesteps": len(betas), "trained_betas": betas.tolist(), "prediction_type": "sample"}
    if sampler == "ddpm":
        scheduler = DDPMScheduler(**shared, variance_type="fixed_small", clip_sample=False)
        # diffusers keeps these in float32, which loses the early timesteps' small noise.
        scheduler.alphas_cumprod = alphas_cumprod(betas)
        return scheduler
    if sampler == "unipc":
        return UniPCMultistepScheduler(**shared, solver_order=order)
    # First-order DPM-Solver++ is DDIM; diffusers' DDIMScheduler takes steps of T // n whatever the timesteps.
    return DPMSolverMultistepScheduler(**shared, solver_order=1 if sampler == "ddim" else order)


@torch.inference_mode()
def sample_free(
    predict: Predictor,
    solver: Solver,
    condition: torch.Tensor,
    generators: Sequence[torch.Generator],
    start: torch.Tensor | None = None,
    channels: int = 1,
) -> torch.Tensor:
    """Generate whole CT volumes for layouts.

    Args:
        predict: the network.
        solver: of the network's process.
        condition: (N, C, D, H, W), see `condition_channels`.
        generators: one per volume, so that a volume does not depend on its batch; on the device of `condition`.
        start: (N, 1, D, H, W) states at the solver's first level; None draws noise.
        channels: of the output, if it is not CT.

    Returns:
        (N, channels, D, H, W) float32, on the device of `condition`.
    """
    take_step = stepper(predict, solver, condition, generators, channels)
    solver.start(0, pasting=False)
    state = draw_noise(condition, generators, channels) if start is None else start
    for index in range(len(solver.signal) - 1):
        state = take_step(index, state)
    return state


@torch.inference_mode()
def sample_aas(
    predict: Predictor,
    solver: Solver,
    condition: torch.Tensor,
    reference: torch.Tensor,
    generators: Sequence[torch.Generator],
    resampling: int = 1,
) -> torch.Tensor:
    """Generate the voxels that the layouts label; a reference CT fills those that they leave open (AAS).

    After each step the reference is pasted at the noise level that the state has reached, so that the last step
    restores it exactly. With resampling, generated voxels can adapt to what is pasted beside them (RePaint, Lugmayr et
    al. 2022).

    Args:
        predict, solver, condition, generators: see `sample_free`.
        reference: (N, 1, D, H, W) CT in [-1, 1].
        resampling: how often each pair of levels is visited, going back with fresh noise in between.

    Returns:
        (N, 1, D, H, W) float32, on the device of `condition`.
    """
    take_step = stepper(predict, solver, condition, generators)
    is_open = open_voxels(condition)
    solver.start(0, pasting=True)
    state = draw_noise(condition, generators)
    for index, following in pairwise(_visited(len(solver.signal), resampling)):
        if following < index:
            state = _add_noise(solver, index, following, state, draw_noise(condition, generators))
            # The history of a multistep solver belongs to other noise.
            solver.start(following, pasting=True)
        else:
            state = take_step(index, state)
            pasted = _at_level(solver, following, reference, draw_noise(condition, generators))
            state = torch.where(is_open, pasted, state)
    return state


@torch.inference_mode()
def invert(predict: Predictor, solver: DiffusionSolver, condition: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """Find the noise from which free sampling reproduces given CT volumes, and the path to it.

    It follows the same flow in reverse (Song et al. 2021, section 4.3), over the same levels and with as many calls of
    the network. From the clean CT to the least noisy level, it uses the noise predicted there for the whole step, with
    the clean CT in place of the state; how exactly the CT is reproduced depends on the number of steps. An error of a
    network that predicts the CT becomes one of the noise, divided by the little noise of that level.

    Args:
        predict, condition: see `sample_free`.
        solver: the solver for sampling; not `ddpm`.
        clean: (N, 1, D, H, W) CT in [-1, 1].

    Returns:
        (n, N, 1, D, H, W) float32: the states at the n levels of the solver, from the noise to `clean` itself.
    """
    back = solver.reversed()
    take_step = stepper(predict, back, condition, ())
    back.start(0, pasting=False)
    states = [clean]
    if solver.noise[-1] == 0:  # no solver can leave the clean CT, whose signal-to-noise ratio is infinite
        predicted = predictor_of(predict, condition, back.times)(0, clean)
        least = noise_of(solver.prediction, clean, predicted, back.signal[0], back.noise[0])
        states.append(_at_level(back, 0, clean, least))
    for index in range(len(back.signal) - 1):
        states.append(take_step(index, states[-1]))
    return torch.stack(states[::-1])


@torch.inference_mode()
def redraw(
    predict: Predictor,
    solver: Solver,
    condition: torch.Tensor,
    start: torch.Tensor,
    path: torch.Tensor,
    fixed_mask: torch.Tensor,
) -> torch.Tensor:
    """Generate a part of CT volumes; the rest follows the path of their inversion, back to the CT itself.

    Args:
        predict, condition: see `sample_free`.
        solver: the solver of the inversion.
        start: (N, 1, D, H, W) states at the solver's first level.
        path: (n, N, 1, D, H, W) states at all levels, from `invert`.
        fixed_mask: (N, 1, D, H, W) bool: the voxels that follow the path.

    Returns:
        (N, 1, D, H, W) float32, on the device of `condition`.
    """
    take_step = stepper(predict, solver, condition, ())
    solver.start(0, pasting=True)
    state = start
    for index in range(len(solver.signal) - 1):
        state = torch.where(fixed_mask, path[index + 1], take_step(index, state))
    return state


def stepper(
    predict: Predictor,
    solver: Solver,
    condition: torch.Tensor,
    generators: Sequence[torch.Generator],
    channels: int = 1,
) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """(index, state with these channels at this level) -> state at the next level."""
    predict_at = predictor_of(predict, condition, solver.times, channels)

    def take_step(index: int, state: torch.Tensor) -> torch.Tensor:
        clean = solver.clean(index, state, predict_at(index, state))
        return solver.step(index, state, clean, generators)

    return take_step


def predictor_of(
    predict: Predictor, condition: torch.Tensor, times: Sequence[float], channels: int = 1
) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """(index, state with these channels at this level) -> the network's prediction, float32."""
    # Made once, so that a step neither copies the condition nor sends a time to the device.
    of_batch = torch.tensor(times, device=condition.device)[:, None].repeat(1, len(condition))
    inputs = torch.cat([condition.new_empty(len(condition), channels, *condition.shape[2:]), condition], dim=1)

    def predict_at(index: int, state: torch.Tensor) -> torch.Tensor:
        inputs[:, :channels] = state
        return predict(inputs, of_batch[index]).float()

    return predict_at


def draw_noise(condition: torch.Tensor, generators: Sequence[torch.Generator], channels: int = 1) -> torch.Tensor:
    """Standard normal (N, channels, D, H, W), each volume from its own generator."""
    shape = (1, channels, *condition.shape[2:])
    return torch.cat([torch.randn(shape, generator=generator, device=generator.device) for generator in generators])


def _at_level(solver: Solver, index: int, clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    return solver.signal[index] * clean + solver.noise[index] * noise


def _add_noise(solver: Solver, index: int, earlier: int, state: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """From level `index` back to an earlier, noisier one, with fresh noise."""
    kept = solver.signal[earlier] / solver.signal[index]
    added = (solver.noise[earlier] ** 2 - (kept * solver.noise[index]) ** 2) ** 0.5
    return kept * state + added * noise


def _visited(levels: int, resampling: int) -> list[int]:
    """Levels in the order of their visits: two steps at a time, each pair of steps `resampling` times."""
    visited = [0]
    for first in range(0, levels - 1, _LEVELS_PER_JUMP):
        last = min(first + _LEVELS_PER_JUMP, levels - 1)
        forward = list(range(first + 1, last + 1))
        visited += forward + (resampling - 1) * [first, *forward]
    return visited
