"""The noise schedule: how much noise a CT carries at each timestep (Ho et al. 2020; Nichol & Dhariwal 2021)."""

from __future__ import annotations

import math

import torch

_OFFSET = 0.008
_LARGEST_BETA = 0.999


def cosine_betas(timesteps: int) -> torch.Tensor:
    """Variances of the noise added at each timestep (Nichol & Dhariwal 2021, eq. 17).

    Returns:
        (timesteps,) float64.
    """
    position = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    signal = torch.cos((position + _OFFSET) / (1 + _OFFSET) * math.pi / 2) ** 2
    signal = signal / signal[0]
    return (1 - signal[1:] / signal[:-1]).clamp(0, _LARGEST_BETA)


def alphas_cumprod(betas: torch.Tensor) -> torch.Tensor:
    """Share of the signal's variance that is left at each timestep: (T,) float64, of the clipped betas."""
    return torch.cumprod(1 - betas, dim=0)


def add_noise(clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, signal: torch.Tensor) -> torch.Tensor:
    """A CT at given timesteps (Ho et al. 2020, eq. 4).

    Args:
        clean: (N, 1, D, H, W) in [-1, 1].
        noise: standard normal, same shape.
        timesteps: (N,) indices, on the device of `signal`.
        signal: (T,) float64 `alphas_cumprod`.

    Returns:
        Same shape, dtype and device as `clean`.
    """
    level = signal[timesteps].view(-1, 1, 1, 1, 1)
    return level.sqrt().to(clean) * clean + (1 - level).sqrt().to(clean) * noise
