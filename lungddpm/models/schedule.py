"""The noise schedule: how much noise a CT carries at each timestep (Ho et al. 2020; Nichol & Dhariwal 2021)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

_OFFSET = 0.008
_LARGEST_BETA = 0.999
# Of 250 cosine timesteps, this drops only the last, where the clean CT amplifies an error in the noise 5,000-fold.
_LOWEST_LOG_SNR = -5.1


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


def spaced_timesteps(signal: torch.Tensor, steps: int) -> list[int]:
    """Timesteps evenly spaced in log signal-to-noise ratio (Lu et al. 2022, arXiv 2206.00927).

    They end at timestep 0. From there to the clean CT, every solver is of first order, which reduces the spread of HU
    the more, the more noise is left.

    Args:
        signal: (T,) float64 `alphas_cumprod`.
        steps: how many; fewer are returned if it exceeds the timesteps that are not pure noise.

    Returns:
        Distinct indices in descending order.
    """
    log_snr = torch.log(signal / (1 - signal)) / 2
    first = int((log_snr >= _LOWEST_LOG_SNR).sum()) - 1
    wanted = torch.linspace(log_snr[first], log_snr[0], min(steps, first + 1), dtype=log_snr.dtype)
    timesteps: list[int] = []
    for place, value in enumerate(wanted):
        nearest = int((log_snr - value).abs().argmin())
        # Near both ends, several values have the same nearest timestep.
        latest = timesteps[-1] - 1 if timesteps else first
        timesteps.append(max(min(nearest, latest), len(wanted) - 1 - place))
    return timesteps


def between_timesteps(signal: torch.Tensor, timesteps: Sequence[float]) -> torch.Tensor:
    """The share of the signal's variance at fractional timesteps; its logarithm is interpolated linearly.

    Args:
        signal: (T,) float64 `alphas_cumprod`.
        timesteps: n of them, from 0 to T - 1.

    Returns:
        (n,) float64; at whole timesteps those of `signal`, exactly.
    """
    places = torch.tensor(timesteps, dtype=signal.dtype)
    below = places.floor().long()
    share = places - below
    above = (below + 1).clamp(max=len(signal) - 1)
    return signal[below] * (signal[above] / signal[below]) ** share


def published_buffers(betas: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a published checkpoint contains besides the network: coefficients of the diffusion process (Ho et al. 2020).

    The names are those of the public `denoising-diffusion-pytorch`, and `posterior_mean_coef3`, which the published
    code adds; its strict loading needs them all.

    Args:
        betas: (T,) float64.

    Returns:
        (T,) float32 each.
    """
    signal = alphas_cumprod(betas)
    before = torch.cat([signal.new_ones(1), signal[:-1]])
    variance = betas * (1 - before) / (1 - signal)
    of_noisy = (1 - before) * (1 - betas).sqrt() / (1 - signal)
    buffers = {
        "betas": betas,
        "alphas_cumprod": signal,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": signal.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - signal).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - signal).log(),
        "sqrt_recip_alphas_cumprod": signal.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / signal - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * before.sqrt() / (1 - signal),
        "posterior_mean_coef2": of_noisy,
        "posterior_mean_coef3": 1 - of_noisy,
    }
    return {name: values.float() for name, values in buffers.items()}


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
