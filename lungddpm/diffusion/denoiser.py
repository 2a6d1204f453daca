"""The published 3-D U-Net that predicts the noise in a CT, given its layout (arXiv 2502.15204, section III).

Module names and their order follow the published weights' state dict, so that those weights load strictly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lungddpm.config import Config
from lungddpm.layouts import Label

ATTENTION_EDGE = 16
_TIME_PERIOD = 1000


def condition_channels(layout: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """The channels that tell the denoiser what to draw where.

    Args:
        layout: (x, y, z) uint8 labels.
        classes: `lung`, `nodule` and possibly `vessel`, in channel order. Without `vessel`, vessels count as lung.

    Returns:
        (class, z, y, x) float32, +1 inside the class and -1 outside. A voxel that is -1 in every channel is open: the
        reference CT fills it.
    """
    labels = {"lung": [Label.LUNG], "nodule": [Label.NODULE], "vessel": [Label.VESSEL]}
    if "vessel" not in classes:
        labels["lung"].append(Label.VESSEL)
    masks = [np.isin(layout.transpose(2, 1, 0), labels[name]) for name in classes]
    return np.stack(masks).astype(np.float32) * 2 - 1


def build_denoiser(config: Config) -> UNet:
    """The denoiser that a config describes, with fresh weights from torch's global generator."""
    return UNet(**network_arguments(config))


def network_arguments(config: Config) -> dict[str, Any]:
    """The arguments of `UNet` that a config describes."""
    settings = config.diffusion.denoiser
    return {
        "in_channels": 1 + len(config.diffusion.classes),
        "base_channels": settings.base_channels,
        "multipliers": settings.multipliers,
        "norm_groups": settings.norm_groups,
        "attention_factor": config.grid.size[0] / ATTENTION_EDGE if settings.attention else None,
    }


def inferred_arguments(weights: Mapping[str, torch.Tensor]) -> dict[str, Any] | None:
    """The arguments of the `UNet` that weights belong to; None where they are not intelligible as such.

    `norm_groups` is missing: it leaves no trace in the weights.
    """
    first = weights.get("input_blocks.0.0.weight")
    if first is None or first.dim() != 5:
        return None
    widths, attention_factor = [], 0 if "middle_block.1.qkv.weight" in weights else None
    block = 1
    while (convolution := weights.get(f"input_blocks.{block}.0.in_layers.2.weight")) is not None:
        if f"input_blocks.{block}.1.qkv.weight" in weights:
            attention_factor = 2 ** len(widths)
        widths.append(len(convolution))
        block += 2  # over the downsampling between two levels
    if not widths or any(width % len(first) for width in widths):
        return None
    return {
        "in_channels": first.shape[1],
        "base_channels": len(first),
        "multipliers": [width // len(first) for width in widths],
        "attention_factor": attention_factor,
    }


class UNet(nn.Module):
    """Residual U-Net: one residual block a level on the way down, two on the way up.

    Args:
        in_channels: noisy CT plus layout classes.
        base_channels: channels of the first level.
        multipliers: channels of each level as multiples of `base_channels`.
        norm_groups: groups of every GroupNorm.
        attention_factor: downsampling factor at which self-attention sits besides the middle. None leaves out all
            attention; the middle is then `middle_block.0` and `.1`, two residual blocks.
    """

    def __init__(
        self,
        in_channels: int,
        base_channels: int,
        multipliers: Sequence[int],
        norm_groups: int,
        attention_factor: float | None,
    ):
        super().__init__()
        self.base_channels = base_channels
        embedding = 4 * base_channels
        deepest = len(multipliers) - 1

        def residual(inputs: int, outputs: int) -> ResidualBlock:
            return ResidualBlock(inputs, outputs, embedding, norm_groups)

        def attention(level: int, channels: int) -> list[nn.Module]:
            return [SelfAttention(channels, norm_groups)] if attention_factor == 2**level else []

        self.time_embed = nn.Sequential(nn.Linear(base_channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        channels = base_channels
        self.input_blocks = nn.ModuleList([Stage(_convolution(in_channels, channels))])
        skips = [channels]
        for level, multiplier in enumerate(multipliers):
            outputs = base_channels * multiplier
            self.input_blocks.append(Stage(residual(channels, outputs), *attention(level, outputs)))
            channels = outputs
            skips.append(channels)
            if level < deepest:
                self.input_blocks.append(Stage(Downsample(channels)))
                skips.append(channels)

        middle = [] if attention_factor is None else [SelfAttention(channels, norm_groups)]
        self.middle_block = Stage(residual(channels, channels), *middle, residual(channels, channels))

        self.output_blocks = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(multipliers))):
            outputs = base_channels * multiplier
            for last in (False, True):
                upsample = [Upsample(outputs)] if last and level > 0 else []
                block = residual(channels + skips.pop(), outputs)
                self.output_blocks.append(Stage(block, *attention(level, outputs), *upsample))
                channels = outputs

        self.out = nn.Sequential(GroupNorm32(norm_groups, channels), nn.SiLU(), _zeroed(_convolution(channels, 1)))

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Predict the noise.

        Args:
            noisy: (N, 1 + classes, D, H, W) noisy CT and condition; D, H, W divisible by the network's reduction.
            timesteps: (N,) integer indices of the noise level.

        Returns:
            (N, 1, D, H, W).
        """
        embedding = self.time_embed(time_features(timesteps, self.base_channels))
        h, skips = noisy, []
        for block in self.input_blocks:
            h = block(h, embedding)
            skips.append(h)
        h = self.middle_block(h, embedding)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), embedding)
        return self.out(h)


def time_features(timesteps: torch.Tensor, channels: int) -> torch.Tensor:
    """(N,) indices -> (N, channels) float32: cosines, then sines, of frequencies down to 1/1000."""
    half = channels // 2
    frequencies = torch.exp(-math.log(_TIME_PERIOD) * torch.arange(half, device=timesteps.device) / half)
    angles = timesteps[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Stage(nn.Sequential):
    """Layers in sequence; residual blocks also receive the time embedding."""

    def forward(self, h: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        for layer in self:
            h = layer(h, embedding) if isinstance(layer, ResidualBlock) else layer(h)
        return h


class ResidualBlock(nn.Module):
    """Two convolutions around the time embedding, added to the input (or to its 1x1x1 projection)."""

    def __init__(self, inputs: int, outputs: int, embedding: int, norm_groups: int):
        super().__init__()
        self.in_layers = nn.Sequential(GroupNorm32(norm_groups, inputs), nn.SiLU(), _convolution(inputs, outputs))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, outputs))
        # The published weights count a dropout (of rate zero) between activation and convolution.
        self.out_layers = nn.Sequential(
            GroupNorm32(norm_groups, outputs), nn.SiLU(), nn.Identity(), _zeroed(_convolution(outputs, outputs))
        )
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv3d(inputs, outputs, 1)

    def forward(self, h: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        residual = self.in_layers(h) + self.emb_layers(embedding)[:, :, None, None, None]
        return self.skip_connection(h) + self.out_layers(residual)


class SelfAttention(nn.Module):
    """Single-head self-attention over all voxels, added to the input."""

    def __init__(self, channels: int, norm_groups: int):
        super().__init__()
        self.norm = GroupNorm32(norm_groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = _zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        voxels = h.flatten(2)
        query, key, value = (part.transpose(1, 2) for part in self.qkv(self.norm(voxels)).chunk(3, dim=1))
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        return (voxels + self.proj_out(attended)).reshape(h.shape)


class Downsample(nn.Module):
    """Stride-2 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = _convolution(channels, channels, stride=2)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.op(h)


class Upsample(nn.Module):
    """Trilinear interpolation to twice the size, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = _convolution(channels, channels)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(h, scale_factor=2, mode="trilinear", align_corners=False))


class GroupNorm32(nn.GroupNorm):
    """GroupNorm in float32 whatever the precision around it."""

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return super().forward(h.float()).type(h.dtype)


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Conv3d:
    return nn.Conv3d(inputs, outputs, 3, stride=stride, padding=1)


def _zeroed(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
