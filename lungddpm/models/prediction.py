"""What a denoiser predicts at a noise level, and what its prediction implies.

A state is a x + s e, of the clean CT x and standard normal noise e, with a^2 + s^2 = 1. The network predicts the noise
e (`epsilon`, Ho et al. 2020), the velocity a e - s x (`v`, Salimans & Ho 2022, arXiv 2202.00512) or x itself
(`clean`). A prediction error d becomes an error of d s / a, d s or d in the implied x: under `epsilon`, a small error
at the noisiest levels, where s / a is 100 and more, moves the mean of a whole volume.
"""

from __future__ import annotations

from typing import Literal, TypeVar

import torch

Prediction = Literal["epsilon", "v", "clean"]

Scale = TypeVar("Scale", float, torch.Tensor)
"""A number for a batch at one level, or (N, 1, 1, 1, 1) for one at several."""


def target_of(
    prediction: Prediction, clean: torch.Tensor, noise: torch.Tensor, signal: Scale, sigma: Scale
) -> torch.Tensor:
    """The network's target.

    Args:
        prediction: its kind.
        clean: (N, 1, D, H, W) CT in [-1, 1].
        noise: standard normal, same shape.
        signal: a, the scale of the clean CT.
        sigma: s, the standard deviation of the noise.
    """
    if prediction == "epsilon":
        return noise
    if prediction == "v":
        return signal * noise - sigma * clean
    return clean


def clean_of(
    prediction: Prediction, state: torch.Tensor, predicted: torch.Tensor, signal: Scale, sigma: Scale
) -> torch.Tensor:
    """The clean CT that a prediction implies, see `target_of`."""
    if prediction == "epsilon":
        return (state - sigma * predicted) / signal
    if prediction == "v":
        return signal * state - sigma * predicted
    return predicted


def noise_of(
    prediction: Prediction, state: torch.Tensor, predicted: torch.Tensor, signal: Scale, sigma: Scale
) -> torch.Tensor:
    """The noise that a prediction implies; for `clean` only at levels with noise.

    Raises:
        ValueError: `clean` at the level without noise.
    """
    if prediction == "epsilon":
        return predicted
    if prediction == "v":
        return sigma * state + signal * predicted
    if not isinstance(sigma, torch.Tensor) and sigma == 0:
        raise ValueError("a prediction of the clean CT implies nothing about the noise where there is none")
    return (state - signal * predicted) / sigma
