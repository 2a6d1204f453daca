"""From noise to CT: samplers, anatomically aware sampling (AAS; arXiv 2502.15204), and inversion (from CT to noise).

Under AAS, voxels that the layout leaves open are pasted from a reference CT while the rest is generated. The solvers
are diffusers' own, told the clean CT that the denoiser implies; it is clamped to the model's range [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from lungddpm.models.schedule import alphas_cumprod, between_timesteps, spaced_timesteps

Predictor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(noisy CT and condition (N, 1 + C, D, H, W), timesteps (N,)) -> predicted noise (N, 1, D, H, W)."""

# With one level a jump, multistep solvers would never get beyond first order; longer jumps mend the seam less.
_LEVELS_A_JUMP = 2
_PUBLISHED_TIMES = 1000

Times = Literal["corrected", "published"]
"""`corrected` tells the denoiser the timestep, as in training; `published` scales it to T = 1000, as Lung-DDPM+ does
(arXiv 2508.09327)."""

Levels = Literal["corrected", "published"]
"""Which noise levels `dpmsolver++` visits. `corrected`: timesteps at even distances of the log signal-to-noise ratio,
and the clean CT at their end; the clean CT that the denoiser implies is clamped to [-1, 1]. `published`: as Lung-DDPM+
(arXiv 2508.09327) does, even distances of time from T - 1 to 0, with fractions, where a CT counts as clean at timestep
0; what the denoiser implies is thresholded dynamically (Saharia et al. 2022, arXiv 2205.11487, section 2.3)."""
_THRESHOLD_QUANTILE = 0.995


class Solver:
    """Takes a state from noise level to noise level with a scheduler of diffusers; every sampling needs its own.

    Args:
        sampler: see `sample`.
        order: of `dpmsolver++` and `unipc`.
        betas: (T,) float64 noise schedule.
        steps: levels to visit.
        corrector: whether UniPC may correct a state after the fact. It does so from the state before, which undoes
            what was pasted meanwhile.
        inverting: whether it goes the other way, from the least noisy level to the noisiest; not with `ddpm`.
        levels: see `Levels`; `published` with `dpmsolver++` alone.

    Attributes:
        steps: how many it takes from the first level to the last; the denoiser is called before each of them.
        timesteps: of the levels, falling, rising when inverting; the clean CT after the last step has none.
        signal: scales of the clean CT in the state at each level.
        noise: standard deviations of the noise in the state at each level.
    """

    def __init__(
        self,
        sampler: Literal["ddpm", "ddim", "dpmsolver++", "unipc"],
        order: int,
        betas: torch.Tensor,
        steps: int,
        corrector: bool = True,
        inverting: bool = False,
        levels: Levels = "corrected",
    ):
        if not 1 <= steps <= len(betas):
            raise ValueError(f"{steps} steps do not fit {len(betas)} timesteps")
        self.levels = levels
        signal = alphas_cumprod(betas)
        if levels == "published":
            self.timesteps = torch.linspace(len(betas) - 1, 0, steps + 1, dtype=betas.dtype).tolist()
        else:
            # Only the ancestral sampler can start at pure noise, where nothing of the clean CT is left to tell.
            takes_all = sampler == "ddpm" and steps == len(betas)
            self.timesteps = list(reversed(range(steps))) if takes_all else spaced_timesteps(signal, steps)
        if inverting:
            self.timesteps.reverse()
        visited = between_timesteps(signal, self.timesteps)
        if levels == "corrected" and not inverting:
            visited = torch.cat([visited, signal.new_ones(1)])
        self.steps = len(visited) - 1
        self.signal, self.noise = visited.sqrt().tolist(), (1 - visited).sqrt().tolist()
        shared = {"num_train_timesteps": len(betas), "trained_betas": betas.tolist(), "prediction_type": "sample"}
        if sampler == "ddpm":
            self.scheduler = DDPMScheduler(**shared, variance_type="fixed_small", clip_sample=False)
            # diffusers keeps these in float32, which loses the early timesteps' small noise.
            self.scheduler.alphas_cumprod = signal
        elif sampler == "unipc":
            off = [] if corrector else list(range(len(self.timesteps)))
            self.scheduler = UniPCMultistepScheduler(**shared, solver_order=order, disable_corrector=off)
        else:
            # First-order DPM-Solver++ is DDIM; diffusers' DDIMScheduler takes steps of T // n whatever the timesteps.
            # To the clean CT the last step has to be of first order.
            end = "sigma_min" if levels == "published" else "zero"
            order = 1 if sampler == "ddim" else order
            self.scheduler = DPMSolverMultistepScheduler(**shared, solver_order=order, final_sigmas_type=end)
        self.start(0)

    def start(self, index: int) -> None:
        """Forget the steps taken; the next one leaves level `index`."""
        if isinstance(self.scheduler, DDPMScheduler):
            self.scheduler.set_timesteps(timesteps=self.timesteps)
            return
        # Its own timesteps are too few, repeat themselves, or end far from the clean CT, depending on the spacing.
        self.scheduler.set_timesteps(len(self.timesteps))
        self.scheduler.timesteps = torch.tensor(self.timesteps)
        self.scheduler.sigmas = torch.tensor([n / s for n, s in zip(self.noise, self.signal, strict=True)])
        self.scheduler.set_begin_index(index)

    def clean(self, index: int, state: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The clean CT in [-1, 1] that a state at level `index` and its predicted noise imply."""
        implied = (state - self.noise[index] * noise) / self.signal[index]
        if self.levels == "corrected":
            return implied.clamp(-1, 1)
        largest = implied.abs().flatten(1).quantile(_THRESHOLD_QUANTILE, dim=1).clamp(min=1)
        largest = largest[:, None, None, None, None]
        return implied.clamp(-largest, largest) / largest

    def step(
        self, index: int, state: torch.Tensor, clean: torch.Tensor, generators: Sequence[torch.Generator]
    ) -> torch.Tensor:
        """From level `index` to the next one."""
        ancestral = {"generator": list(generators)} if isinstance(self.scheduler, DDPMScheduler) else {}
        return self.scheduler.step(clean, self.timesteps[index], state, **ancestral).prev_sample

    def back(self, index: int, earlier: int, state: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """From level `index` back to an earlier, noisier one, by adding fresh noise."""
        kept = self.signal[earlier] / self.signal[index]
        return kept * state + (1 - kept**2) ** 0.5 * noise


def open_voxels(condition: torch.Tensor) -> torch.Tensor:
    """Where the layout leaves the CT open: (N, C, D, H, W) channels of -1 and +1 -> (N, 1, D, H, W) bool."""
    return (condition < 0).all(dim=1, keepdim=True)


@torch.inference_mode()
def sample(
    predict_noise: Predictor,
    condition: torch.Tensor,
    betas: torch.Tensor,
    sampler: Literal["ddpm", "ddim", "dpmsolver++", "unipc"],
    steps: int,
    generators: Sequence[torch.Generator],
    reference: torch.Tensor | None = None,
    *,
    order: int = 2,
    resampling: int = 1,
    aas: Literal["corrected", "published"] = "corrected",
    blend_from: int | None = None,
    times: Times = "corrected",
    levels: Levels = "corrected",
    start: torch.Tensor | None = None,
    path: torch.Tensor | None = None,
    held: torch.Tensor | None = None,
) -> torch.Tensor:
    """Generate CT volumes for layouts.

    Args:
        predict_noise: the denoiser.
        condition: (N, C, D, H, W), see `condition_channels`.
        betas: (T,) float64 noise schedule.
        sampler: `ddpm`, ancestral (Ho et al. 2020); `ddim` (Song et al. 2021, without noise); `dpmsolver++`, multistep
            (Lu et al. 2022, arXiv 2211.01095); `unipc` (Zhao et al. 2023), whose corrector is off under AAS.
        steps: noise levels to visit, at most T, none twice. `ddpm` alone can take all T; the others leave out those
            that are pure noise.
        generators: one for each volume, so that a volume does not depend on its batch; on the device of `condition`.
        reference: (N, 1, D, H, W) CT in [-1, 1] that fills the open voxels; None generates the whole volume.
        order: 2 or 3, of `dpmsolver++` and `unipc`.
        resampling: times that two levels at a time are visited, going back with fresh noise in between (RePaint,
            Lugmayr et al. 2022), so that generated voxels can adapt to what is pasted beside them.
        aas: `corrected` pastes the reference at the level that the state has reached after each step, and the
            reference itself after the last. `published` pastes it at the level before the step, which leaves noise in
            the background.
        blend_from: in mode `published`, paste only at timesteps up to this one (default: at all).
        times: see `Times`.
        levels: see `Levels`.
        start: (N, 1, D, H, W) state at the noisiest level; None draws one.
        path: states of another CT at all levels, from `invert` with the same sampler, order, steps and levels.
        held: (N, 1, D, H, W) bool: voxels that follow `path`, without a reference; None holds none.

    Returns:
        (N, 1, D, H, W) float32, on the device of `condition`.

    Raises:
        ValueError: fewer than one step, or more than T.
    """
    solver = Solver(sampler, order, betas, steps, corrector=reference is None and held is None, levels=levels)
    shape = (len(condition), 1, *condition.shape[2:])
    is_open = open_voxels(condition)
    predict = _with_times(predict_noise, condition, solver, betas, times)

    def one_step(index: int, state: torch.Tensor) -> torch.Tensor:
        state = solver.step(index, state, solver.clean(index, state, predict(index, state)), generators)
        if held is not None:
            return torch.where(held, path[index + 1], state)
        if reference is None:
            return state
        timestep = solver.timesteps[index]
        if aas == "published" and timestep == 0:
            _draw(shape, generators)  # the published loop draws ancestral noise at the last step, times zero
        level = index + 1 if aas == "corrected" else index
        pasted = solver.signal[level] * reference + solver.noise[level] * _draw(shape, generators)
        if aas == "published" and blend_from is not None and timestep > blend_from:
            return state
        return torch.where(is_open, pasted, state)

    state = _draw(shape, generators) if start is None else start
    for first in range(0, solver.steps, _LEVELS_A_JUMP):
        jump = range(first, min(first + _LEVELS_A_JUMP, solver.steps))
        for visit in range(resampling):
            if visit > 0:
                state = solver.back(jump.stop, first, state, _draw(shape, generators))
                # What a multistep solver remembers belongs to another noise.
                solver.start(first)
            for index in jump:
                state = one_step(index, state)
    return state


@torch.inference_mode()
def invert(
    predict_noise: Predictor,
    condition: torch.Tensor,
    betas: torch.Tensor,
    sampler: Literal["ddim", "dpmsolver++", "unipc"],
    steps: int,
    clean: torch.Tensor,
    *,
    order: int = 2,
    times: Times = "corrected",
    levels: Levels = "corrected",
) -> torch.Tensor:
    """Find the noise from which `sample`, without a reference, generates given CT volumes again, and the way there.

    It follows the same flow the other way (Song et al. 2021, section 4.3), visits the same levels, and calls the
    denoiser as often. The way from clean CT to the least noisy level takes the denoiser's noise there for the whole
    step (not where the levels are `published`); how exactly the CT comes back depends on the steps.

    Args:
        predict_noise, condition, betas, sampler, steps, order, times, levels: see `sample`.
        clean: (N, 1, D, H, W) CT in [-1, 1].

    Returns:
        (n + 1, N, 1, D, H, W) float32: the states at the levels of `sample`, from the noise to `clean` itself.

    Raises:
        ValueError: fewer than one step, or more than T.
    """
    solver = Solver(sampler, order, betas, steps, inverting=True, levels=levels)
    predict = _with_times(predict_noise, condition, solver, betas, times)
    states = [clean]
    if levels == "corrected":
        states.append(solver.signal[0] * clean + solver.noise[0] * predict(0, clean))
    for index in range(solver.steps):
        implied = solver.clean(index, states[-1], predict(index, states[-1]))
        states.append(solver.step(index, states[-1], implied, []))
    return torch.stack(states[::-1])


def _with_times(
    predict_noise: Predictor, condition: torch.Tensor, solver: Solver, betas: torch.Tensor, times: Times
) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """The noise in a state at level `index` of a solver, float32."""
    told = [t if times == "corrected" else t * _PUBLISHED_TIMES / len(betas) for t in solver.timesteps]
    # Made once, so that a step neither copies the condition nor sends a timestep to the device.
    timesteps = torch.tensor(told, device=condition.device)[:, None].repeat(1, len(condition))
    inputs = torch.cat([torch.empty_like(condition[:, :1]), condition], dim=1)

    def predict(index: int, state: torch.Tensor) -> torch.Tensor:
        inputs[:, :1] = state
        return predict_noise(inputs, timesteps[index]).float()

    return predict


def _draw(shape: tuple[int, ...], generators: Sequence[torch.Generator]) -> torch.Tensor:
    volumes = [torch.randn((1, *shape[1:]), generator=generator, device=generator.device) for generator in generators]
    return torch.cat(volumes)
