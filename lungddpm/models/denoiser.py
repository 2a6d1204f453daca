"""The published 3-D U-Net that predicts the noise in a CT, given its layout (arXiv 2502.15204, section III).

Module names and their order follow the published weights' state dict, so that those weights load strictly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lungddpm.config.sections import (
    Denoiser,
    GeneratorConfig,
    Hint,
    HintedSettings,
    Norm,
    Orientation,
    Padding,
    TimeConditioning,
    UNetSettings,
)
from lungddpm.core.labels import Label
from lungddpm.models.wavelet import BANDS, haar, inverse_haar, space_to_depth

ATTENTION_EDGE = 16
HINT_CHANNELS: dict[Hint, int] = {"none": 0, "slice": 1, "volume": 1}
"""Number of channels that `hints.show` returns."""
_TIME_PERIOD = 1000
Layer = TypeVar("Layer", bound=nn.Module)


def condition_channels(layout: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """Encode a layout as input channels of the denoiser.

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


def open_voxels(condition: torch.Tensor) -> torch.Tensor:
    """Where the layout leaves the CT open: (N, C, D, H, W) channels of -1 and +1 -> (N, 1, D, H, W) bool."""
    return (condition < 0).all(dim=1, keepdim=True)


def build_denoiser(config: GeneratorConfig[UNetSettings], further_channels: int = 0) -> UNet:
    """The denoiser that a config describes, with fresh weights from torch's global generator.

    Args:
        config: of the generator.
        further_channels: of the condition, in addition to the layout's classes and the hint.
    """
    arguments = network_arguments(config)
    kind = WaveletUNet if config.settings.denoiser.wavelet else UNet
    return kind(**{**arguments, "in_channels": arguments["in_channels"] + further_channels})


def input_channels(config: GeneratorConfig[HintedSettings]) -> int:
    """Number of the network's input channels: noise or noisy CT, layout classes, hint."""
    return 1 + len(config.settings.classes) + HINT_CHANNELS[config.settings.hint]


def network_arguments(config: GeneratorConfig[UNetSettings]) -> dict[str, Any]:
    """The arguments of `UNet`, or of `WaveletUNet`, that a config describes."""
    settings = config.settings
    edge = settings.drawn_size(config.grid)[0] / (2 if settings.denoiser.wavelet else 1)
    return {
        "in_channels": input_channels(config),
        "orientation": settings.orientation,
        **body_arguments(settings.denoiser, edge),
    }


def body_arguments(settings: Denoiser, edge: float) -> dict[str, Any]:
    """The arguments of `UNet` for its levels; `edge`: voxels along the first level's feature map when it draws."""
    factor = edge / ATTENTION_EDGE
    # If no level's feature map has that edge, only the middle has attention.
    is_a_level = factor in [2**level for level in range(len(settings.multipliers))]
    return {
        "base_channels": settings.base_channels,
        "multipliers": settings.multipliers,
        "norm_groups": settings.norm_groups,
        "attention_factor": (factor if is_a_level else 0) if settings.attention else None,
        "padding": settings.padding,
        "norm": settings.norm,
        "time_conditioning": settings.time_conditioning,
    }


def inferred_arguments(weights: Mapping[str, torch.Tensor]) -> dict[str, Any] | None:
    """The arguments of the `UNet` that weights belong to; None if they are not those of a `UNet`.

    `norm_groups` and `orientation` are missing: they leave no trace in the weights.
    """
    first = weights.get("input_blocks.0.0.weight")
    if first is None or first.dim() != 5:
        return None
    attention_factor = 0 if "middle_block.1.qkv.weight" in weights else None
    widths: list[int] = []
    block = 1
    while (convolution := weights.get(f"input_blocks.{block}.0.in_layers.2.weight")) is not None:
        if f"input_blocks.{block}.1.qkv.weight" in weights:
            attention_factor = 2 ** len(widths)
        widths.append(len(convolution))
        block += 2  # skips the downsampling between two levels
    if not widths or any(width % len(first) for width in widths):
        return None
    return {
        "in_channels": first.shape[1],
        "base_channels": len(first),
        "multipliers": [width // len(first) for width in widths],
        "attention_factor": attention_factor,
    }


class UNet(nn.Module):
    """Residual U-Net: one residual block per level of the encoder, two per level of the decoder.

    Args:
        in_channels: noisy CT, layout classes and hint.
        base_channels: channels of the first level.
        multipliers: channels of each level as multiples of `base_channels`.
        norm_groups: groups of every GroupNorm.
        attention_factor: downsampling factor of the level with self-attention, which the middle has as well; 0: only
            the middle has it. None: no attention; the middle is then two residual blocks, `middle_block.0` and `.1`.
        orientation: in which the network sees its inputs, see `turned`; `ras`: unchanged.
        padding: what convolutions see beyond the volume: zeros, or its outermost voxels (`replicate`).
        norm: whether norms take mean and variance over a `volume`, per group of channels, or over the channels of each
            `voxel`.
        time_conditioning: how residual blocks use the time embedding, see `ResidualBlock`.
        out_channels: of the prediction.
    """

    def __init__(
        self,
        in_channels: int,
        base_channels: int,
        multipliers: Sequence[int],
        norm_groups: int,
        attention_factor: float | None,
        orientation: Orientation = "ras",
        padding: Padding = "zeros",
        norm: Norm = "volume",
        time_conditioning: TimeConditioning = "shift",
        out_channels: int = 1,
    ):
        super().__init__()
        self.base_channels = base_channels
        self.orientation = orientation
        embedding = 4 * base_channels
        deepest = len(multipliers) - 1

        def residual(inputs: int, outputs: int) -> ResidualBlock:
            return ResidualBlock(inputs, outputs, embedding, norm_groups, scaled=time_conditioning == "scale_shift")

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

        final = _zeroed(_convolution(channels, out_channels))
        self.out = nn.Sequential(GroupNorm32(norm_groups, channels), SiLUInPlace(), final)
        for module in self.modules():
            if isinstance(module, Convolution):
                module.padding_mode = padding
            elif isinstance(module, GroupNorm32):
                module.per_voxel = norm == "voxel"

    def arrange(self, channels_last: bool, winograd: bool) -> UNet:
        """Choose memory layout and convolution algorithm; the results stay the same up to rounding.

        Args:
            channels_last: store the channels of a voxel together in memory.
            winograd: fewer operations through two-dimensional convolutions, see `convolve_winograd`. Needs
                `channels_last`.
        """
        self.to(memory_format=torch.channels_last_3d if channels_last else torch.contiguous_format)
        for module in self.modules():
            if isinstance(module, Convolution):
                module.winograd = winograd
        return self

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Predict the noise.

        Args:
            noisy: (N, channels, D, H, W) noisy CT, condition and hint; D, H, W divisible by the network's reduction.
                They are z, y, x of RAS+ whatever the network's orientation.
            timesteps: (N,) integer indices of the noise level.

        Returns:
            (N, out_channels, D, H, W).
        """
        if self.orientation == "published":
            return turned(self._predict(turned(noisy), timesteps))
        return self._predict(noisy, timesteps)

    def _predict(self, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The same in the network's own orientation."""
        embedding = self.time_embed(time_features(timesteps, self.base_channels))
        h, skips = noisy, []
        for block in self.input_blocks:
            h = block(h, embedding)
            skips.append(h)
        h = self.middle_block(h, embedding)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), embedding)
        return self.out(h)


class WaveletUNet(UNet):
    """The same network on the Haar sub-bands of the noisy CT; it predicts those of the noise.

    Its first level has half the edge of the volume: less than an eighth of the memory of a `UNet` of the same width.
    The condition is concatenated to the sub-bands voxel by voxel (`space_to_depth`).

    Args:
        in_channels, arguments: see `UNet`; inputs and outputs are the same, with D, H, W divisible by twice its
            reduction. `attention_factor` counts from the first level.
    """

    def __init__(self, in_channels: int, **arguments: Any):
        super().__init__(**{**arguments, "in_channels": BANDS * in_channels, "out_channels": BANDS})

    def _predict(self, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        bands = torch.cat([haar(noisy[:, :1]), space_to_depth(noisy[:, 1:])], dim=1)
        return inverse_haar(super()._predict(bands, timesteps).float())


def turned(volumes: torch.Tensor) -> torch.Tensor:
    """From RAS+ to the orientation of the published weights, and back: exact, and its own inverse.

    Args:
        volumes: (N, C, z from feet to head, y from back to front, x from left to right).

    Returns:
        (N, C, z from feet to head, x from right to left, y from front to back).
    """
    return volumes.transpose(-2, -1).flip(-2, -1).contiguous()


def time_features(timesteps: torch.Tensor, channels: int) -> torch.Tensor:
    """(N,) indices -> (N, channels) float32: cosines, then sines, of frequencies down to 1/1000."""
    half = channels // 2
    frequencies = torch.exp(-math.log(_TIME_PERIOD) * torch.arange(half, device=timesteps.device) / half)
    angles = timesteps[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Stage(nn.ModuleList):
    """Layers in sequence; residual blocks also receive the time embedding."""

    keeps_input_only = False
    """Gradient checkpointing: recompute everything but the input in the backward pass (less memory, more time)."""

    def __init__(self, *layers: nn.Module):
        super().__init__(layers)

    def forward(self, h: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        if self.keeps_input_only:
            # The network draws no random numbers, so the generator's state need not be saved.
            return checkpoint(self._in_turn, h, embedding, use_reentrant=False, preserve_rng_state=False)
        return self._in_turn(h, embedding)

    def _in_turn(self, h: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        for layer in self:
            h = layer(h, embedding) if isinstance(layer, ResidualBlock) else layer(h)
        return h


class ResidualBlock(nn.Module):
    """Two convolutions around the time embedding, added to the input (or to its 1x1x1 projection).

    A projection of the embedding is added to the features before the second norm. `scaled`: scale and shift of the
    features after that norm are projected from it (Dhariwal & Nichol 2021, arXiv 2105.05233, section 4).
    """

    def __init__(self, inputs: int, outputs: int, embedding: int, norm_groups: int, *, scaled: bool = False):
        super().__init__()
        self.scaled = scaled
        self.in_layers = nn.Sequential(GroupNorm32(norm_groups, inputs), SiLUInPlace(), _convolution(inputs, outputs))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, outputs * (1 + scaled)))
        # In the published weights, a dropout (rate 0) takes the index between activation and convolution.
        self.out_layers = nn.Sequential(
            GroupNorm32(norm_groups, outputs), SiLUInPlace(), nn.Identity(), _zeroed(_convolution(outputs, outputs))
        )
        self.skip_connection = nn.Identity() if inputs == outputs else Convolution(inputs, outputs, 1)

    def forward(self, h: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        residual, time = self.in_layers(h), self.emb_layers(embedding)[:, :, None, None, None]
        if not self.scaled:
            return self.skip_connection(h) + self.out_layers(residual + time)
        scale, shift = time.chunk(2, dim=1)
        norm, *further = self.out_layers
        residual = norm(residual) * (1 + scale) + shift
        for layer in further:
            residual = layer(residual)
        return self.skip_connection(h) + residual


class SelfAttention(nn.Module):
    """Single-head self-attention over all voxels, added to the input."""

    def __init__(self, channels: int, norm_groups: int):
        super().__init__()
        self.norm = GroupNorm32(norm_groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = _zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        voxels = self.norm(h).flatten(2).transpose(1, 2)
        # One head as an axis of its own: fused kernels need four axes.
        query, key, value = _pointwise(self.qkv, voxels)[:, None].chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(query, key, value)[:, 0]
        return h + _pointwise(self.proj_out, attended).transpose(1, 2).unflatten(2, h.shape[2:])


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
    """GroupNorm in float32 at any surrounding precision; with `per_voxel`, a norm over all channels of each voxel."""

    per_voxel = False

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        if self.per_voxel:
            last = h.movedim(1, -1).float()
            return F.layer_norm(last, last.shape[-1:], self.weight, self.bias, self.eps).movedim(-1, 1).type(h.dtype)
        # For other memory layouts, torch's own makes copies on GPUs; on CPUs it sums a volume in float32, voxel by
        # voxel: off by 2e-4 at 64^3, by 4e-3 at 128^3, and by more if the mean is not zero.
        if not h.is_contiguous() and h.device.type in ("cpu", "cuda"):
            return _group_norm(h.float(), self).type(h.dtype)
        return super().forward(h.float()).type(h.dtype)


class SiLUInPlace(nn.Module):
    """SiLU of a tensor that nothing else reads; in place if no gradient is needed."""

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return F.silu(h, inplace=not torch.is_grad_enabled())


class Convolution(nn.Conv3d):
    """Convolution of 3x3x3 or 1x1x1 voxels, which `UNet.arrange` can replace by convolutions of planes."""

    winograd = False
    bias: torch.Tensor

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        if not self.winograd or self.stride != (1, 1, 1):
            return super().forward(h)
        if self.kernel_size == (1, 1, 1):
            return _volumes(F.conv2d(_planes(h), self.weight[:, :, 0], self.bias), len(h))
        return convolve_winograd(h, self.weight, self.bias, replicate=self.padding_mode == "replicate")


def convolve_winograd(
    h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, replicate: bool = False
) -> torch.Tensor:
    """3x3x3 convolution with padding 1, as four two-dimensional ones for two planes of the output.

    Minimal filtering F(2, 3) along the depth (Winograd; Lavin and Gray 2016, arXiv 1509.09308, section 4.1): two thirds
    of the multiplications, and 2-D kernels, which are better tuned on CPUs than 3-D ones.

    Args:
        h: (N, C, D, H, W).
        weight: (K, C, 3, 3, 3).
        bias: (K,).
        replicate: pad with the outermost voxels instead of zeros.

    Returns:
        (N, K, D, H, W), channels last in memory.
    """
    depth = h.shape[2]
    h = F.pad(h, (1,) * 6, mode="replicate") if replicate else F.pad(h, (0, 0, 0, 0, 1, 1))
    pairs = F.pad(h, (0, 0, 0, 0, 0, depth % 2)).unflatten(2, (-1, 2))
    (d0, d1), (d2, d3) = pairs[:, :, :-1].unbind(3), pairs[:, :, 1:].unbind(3)
    w0, w1, w2 = weight.unbind(2)
    halved = (w0 + w2) / 2

    def convolved(difference: torch.Tensor, kernel: torch.Tensor, offset: torch.Tensor | None = None) -> torch.Tensor:
        kernel = kernel.contiguous(memory_format=torch.channels_last)
        return F.conv2d(_planes(difference), kernel, offset, padding=int(not replicate)).permute(0, 2, 3, 1)

    total, contrast = convolved(d1 + d2, halved + w1 / 2), convolved(d2 - d1, halved - w1 / 2)
    even = convolved(d0 - d2, w0, bias) + total + contrast
    odd = total - contrast - convolved(d1 - d3, w2, -bias)
    planes = torch.stack([even, odd], dim=1).flatten(0, 1).permute(0, 3, 1, 2)
    return _volumes(planes, len(h))[:, :, :depth]


def _planes(h: torch.Tensor) -> torch.Tensor:
    """(N, C, D, H, W) -> (N D, C, H, W), without copying where channels are last in memory."""
    return h.transpose(1, 2).flatten(0, 1)


def _volumes(planes: torch.Tensor, number: int) -> torch.Tensor:
    """(N D, C, H, W) -> (N, C, D, H, W), without copying."""
    return planes.unflatten(0, (number, -1)).transpose(1, 2)


def _group_norm(h: torch.Tensor, norm: nn.GroupNorm) -> torch.Tensor:
    """GroupNorm that keeps the memory layout of h: (N, C, D, H, W) float32."""
    if h.is_cuda:
        variance, mean = torch.var_mean(h.unflatten(1, (norm.num_groups, -1)), dim=(2, 3, 4, 5), correction=0)
    else:
        variance, mean = _exact_moments(h, norm.num_groups)
    weight, bias = (values.view(norm.num_groups, -1) for values in (norm.weight, norm.bias))
    scale = weight * (variance + norm.eps).rsqrt()[..., None]
    shift = bias - mean[..., None] * scale
    # On the axes of h: with a separate axis for groups, the result gets other strides if N is 1, and is copied.
    scale, shift = (values.float().flatten(1)[..., None, None, None] for values in (scale, shift))
    return torch.addcmul(shift, h, scale)


def _exact_moments(h: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Variance and mean of each group of channels, summed in float64: (N, C, D, H, W) -> (N, groups) each.

    Plane by plane: a plane in float64 fits into the cache; a volume would be read and written again.
    """
    nothing = torch.zeros(2, h.shape[1], dtype=torch.float64, device=h.device)
    sums = torch.stack([sum((_power_sums(plane.double()) for plane in volume.unbind(1)), nothing) for volume in h])
    mean, square = (sums / h[0, 0].numel()).unflatten(2, (groups, -1)).mean(dim=3).unbind(1)
    return (square - mean**2).clamp(min=0), mean


def _power_sums(plane: torch.Tensor) -> torch.Tensor:
    """Sum and sum of squares of each channel: (C, H, W) -> (2, C)."""
    return torch.stack([plane.sum(dim=(1, 2)), plane.square().sum(dim=(1, 2))])


def _pointwise(layer: nn.Conv1d, voxels: torch.Tensor) -> torch.Tensor:
    """A 1x1 convolution of voxels whose channels come last: (N, V, C) -> (N, V, K)."""
    return F.linear(voxels, layer.weight[:, :, 0], layer.bias)


def _convolution(inputs: int, outputs: int, stride: int = 1) -> Convolution:
    return Convolution(inputs, outputs, 3, stride=stride, padding=1)


def _zeroed(layer: Layer) -> Layer:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def place_on_device(denoiser: UNet, device: torch.device | str) -> UNet:
    """Move a denoiser to a device, in the arrangement that predicts fastest there (measured by `lungddpm bench`)."""
    on_cpu = torch.device(device).type == "cpu"
    return denoiser.to(device).arrange(channels_last=on_cpu, winograd=on_cpu)
