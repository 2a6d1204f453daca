"""What the published systems do differently: Lung-DDPM (arXiv 2502.15204), Lung-DDPM+ (arXiv 2508.09327).

- AAS of Lung-DDPM pastes the reference one noise level late: `sample_published_aas`.
- Lung-DDPM+ visits noise levels that are evenly spaced in time: `published_levels`.
- It thresholds the clean CT that the denoiser implies: `threshold_dynamically`.
- Its denoiser, trained on times below T, receives them on a scale of 1000: `with_published_times`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from lungddpm.config.sections import Solving
from lungddpm.models.denoiser import open_voxels
from lungddpm.models.prediction import Prediction
from lungddpm.models.sampling import (
    DiffusionSolver,
    NoiseLevels,
    Predictor,
    clamp,
    draw_noise,
    noise_levels,
    stepper,
)
from lungddpm.models.schedule import alphas_cumprod, between_timesteps

_PUBLISHED_TIMES = 1000
_THRESHOLD_QUANTILE = 0.995


def choose_solver(solving: Solving, betas: torch.Tensor, prediction: Prediction) -> DiffusionSolver:
    """The solver of `make_solver`, with published times or levels if the settings ask for them.

    Args:
        solving: `times: published`: see `with_published_times`; `levels: published`: see `published_levels` and
            `threshold_dynamically`.
        betas: (T,) float64 noise schedule.
        prediction: what the network predicts.

    Raises:
        ValueError: see `noise_levels` and `published_levels`.
    """
    is_published = solving.levels == "published"
    visited = (
        published_levels(betas, solving.steps) if is_published else noise_levels(solving.sampler, betas, solving.steps)
    )
    if solving.times == "published":
        visited = with_published_times(visited, len(betas))
    limit = threshold_dynamically if is_published else clamp
    return DiffusionSolver(solving.sampler, solving.order, betas, visited, prediction, limit)


def published_levels(betas: torch.Tensor, steps: int) -> NoiseLevels:
    """Levels evenly spaced in time from T - 1 to 0, with fractions; a CT counts as clean at timestep 0.

    Args:
        betas: (T,) float64 noise schedule.
        steps: number of steps, one less than levels.

    Raises:
        ValueError: fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"{steps} steps are too few")
    timesteps = torch.linspace(len(betas) - 1, 0, steps + 1, dtype=betas.dtype).tolist()
    return NoiseLevels.of(timesteps, between_timesteps(alphas_cumprod(betas), timesteps))


def with_published_times(levels: NoiseLevels, timesteps: int) -> NoiseLevels:
    """The same levels, with times scaled from `timesteps`, on which the denoiser was trained, to 1000."""
    return replace(levels, times=[time * _PUBLISHED_TIMES / timesteps for time in levels.times])


def threshold_dynamically(implied: torch.Tensor) -> torch.Tensor:
    """Divide each CT that exceeds [-1, 1] by the 0.995 quantile of its absolute values, clipped to it.

    From Saharia et al. 2022 (arXiv 2205.11487, section 2.3).

    Args:
        implied: (N, 1, D, H, W).

    Returns:
        Same shape, in [-1, 1].
    """
    largest = implied.abs().flatten(1).quantile(_THRESHOLD_QUANTILE, dim=1).clamp(min=1)
    largest = largest[:, None, None, None, None]
    return implied.clamp(-largest, largest) / largest


@torch.inference_mode()
def sample_published_aas(
    predict: Predictor,
    solver: DiffusionSolver,
    condition: torch.Tensor,
    reference: torch.Tensor,
    generators: Sequence[torch.Generator],
    blend_from: int | None = None,
) -> torch.Tensor:
    """AAS as Lung-DDPM does it: the reference is pasted at the level before the step, so its noise remains.

    Args:
        predict, solver, condition, reference, generators: see `sample_aas`.
        blend_from: paste only at timesteps up to this one; None pastes at all of them.

    Returns:
        (N, 1, D, H, W) float32, on the device of `condition`.
    """
    take_step = stepper(predict, solver, condition, generators)
    is_open = open_voxels(condition)
    solver.start(0, pasting=True)
    state = draw_noise(condition, generators)
    for index in range(len(solver.signal) - 1):
        timestep = solver.levels.timesteps[index]
        state = take_step(index, state)
        if timestep == 0:
            draw_noise(condition, generators)  # the published loop also draws noise here, and multiplies it by zero
        pasted = solver.signal[index] * reference + solver.noise[index] * draw_noise(condition, generators)
        if blend_from is None or timestep <= blend_from:
            state = torch.where(is_open, pasted, state)
    return state
