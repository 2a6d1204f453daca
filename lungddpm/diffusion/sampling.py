"""From noise to CT: ancestral sampling, DPM-Solver++, and anatomically aware sampling (AAS; arXiv 2502.15204).

Under AAS, voxels that the layout leaves open are pasted from a reference CT while the rest is generated. The solvers
are diffusers' own, told the clean CT that the denoiser implies; it is clamped to the model's range [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

from lungddpm.diffusion.schedule import alphas_cumprod

Predictor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(noisy CT and condition (N, 1 + C, D, H, W), timesteps (N,)) -> predicted noise (N, 1, D, H, W)."""

# Drops only the last of 250 cosine timesteps, where an error of the noise grows 5,000-fold in the clean CT.
_LOWEST_LOG_SNR = -5.1


@dataclass(frozen=True)
class _Solver:
    """A diffusers scheduler with the noise levels it passes through. It keeps state: every sampling needs its own.

    Attributes:
        scheduler: turns the clean CT implied at one level into the state at the next.
        timesteps: n indices at which the denoiser is called, falling.
        signal: n + 1 scales of the clean CT in the state at each of them, and 1 after the last step.
        noise: n + 1 standard deviations of the noise in the state; 0 after the last step.
    """

    scheduler: DDPMScheduler | DPMSolverMultistepScheduler
    timesteps: list[int]
    signal: list[float]
    noise: list[float]


def _make_solver(sampler: Literal["ddpm", "dpmsolver++"], betas: torch.Tensor, steps: int) -> _Solver:
    signal = alphas_cumprod(betas)
    if sampler == "ddpm":
        if steps != len(betas):
            raise ValueError(f"the ddpm sampler visits all {len(betas)} timesteps, asked for {steps}")
        scheduler = DDPMScheduler(
            len(betas),
            trained_betas=betas.tolist(),
            variance_type="fixed_small",
            prediction_type="sample",
            clip_sample=False,
        )
    else:
        scheduler = DPMSolverMultistepScheduler(
            len(betas),
            trained_betas=betas.tolist(),
            prediction_type="sample",
            timestep_spacing="trailing",
            lambda_min_clipped=_LOWEST_LOG_SNR,
            final_sigmas_type="zero",
        )
    # diffusers keeps these in float32, which loses the early timesteps' small noise.
    scheduler.alphas_cumprod = signal
    scheduler.set_timesteps(steps)
    if sampler == "dpmsolver++":
        scheduler.set_begin_index(0)
    timesteps = scheduler.timesteps.tolist()
    visited = torch.cat([signal[timesteps], torch.ones(1, dtype=signal.dtype)])
    return _Solver(scheduler, timesteps, visited.sqrt().tolist(), (1 - visited).sqrt().tolist())


def open_voxels(condition: torch.Tensor) -> torch.Tensor:
    """Where the layout leaves the CT open: (N, C, D, H, W) channels of -1 and +1 -> (N, 1, D, H, W) bool."""
    return (condition < 0).all(dim=1, keepdim=True)


@torch.inference_mode()
def sample(
    predict_noise: Predictor,
    condition: torch.Tensor,
    betas: torch.Tensor,
    sampler: Literal["ddpm", "dpmsolver++"],
    steps: int,
    generators: Sequence[torch.Generator],
    reference: torch.Tensor | None = None,
    mode: Literal["corrected", "published"] = "corrected",
    blend_from: int | None = None,
) -> torch.Tensor:
    """Generate CT volumes for layouts.

    Args:
        predict_noise: the denoiser.
        condition: (N, C, D, H, W), see `condition_channels`.
        betas: (T,) float64 noise schedule.
        sampler: `ddpm`, ancestral (Ho et al. 2020), or `dpmsolver++`, second-order multistep (Lu et al. 2022).
        steps: denoiser calls. `ddpm` visits all T timesteps; `dpmsolver++` visits none twice, and therefore fewer
            where `steps` is close to T.
        generators: one for each volume, so that a volume does not depend on its batch; on the device of `condition`.
        reference: (N, 1, D, H, W) CT in [-1, 1] that fills the open voxels; None generates the whole volume.
        mode: `corrected` pastes the reference at the level that the state has reached after each step, and the
            reference itself after the last. `published` pastes it at the level before the step, which leaves noise in
            the background.
        blend_from: in mode `published`, paste only at timesteps up to this one (default: at all).

    Returns:
        (N, 1, D, H, W) float32, on the device of `condition`.
    """
    solver = _make_solver(sampler, betas, steps)
    shape = (len(condition), 1, *condition.shape[2:])
    state = _draw(shape, generators)
    is_open = open_voxels(condition)
    for index, timestep in enumerate(solver.timesteps):
        times = torch.full((len(condition),), timestep, device=condition.device)
        noise = predict_noise(torch.cat([state, condition], dim=1), times).float()
        clean = ((state - solver.noise[index] * noise) / solver.signal[index]).clamp(-1, 1)
        state = solver.scheduler.step(clean, timestep, state, generator=list(generators)).prev_sample
        if reference is None:
            continue
        if mode == "corrected":
            level = index + 1
        else:
            level = index
            if timestep == 0:
                _draw(shape, generators)  # the published loop draws ancestral noise at the last step, times zero
        pasted = solver.signal[level] * reference + solver.noise[level] * _draw(shape, generators)
        if mode == "corrected" or blend_from is None or timestep <= blend_from:
            state = torch.where(is_open, pasted, state)
    return state


def _draw(shape: tuple[int, ...], generators: Sequence[torch.Generator]) -> torch.Tensor:
    volumes = [torch.randn((1, *shape[1:]), generator=generator, device=generator.device) for generator in generators]
    return torch.cat(volumes)
