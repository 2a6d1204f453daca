"""Random augmentation of a training sample, CT and layout together.

Changes stay within the normal variation of real scans (pose, size, calibration), because a generative model learns
them as part of its output. The published training has no augmentation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from lungddpm.models.accelerator import send

_LARGEST_TURN_RAD = math.radians(5)
_LARGEST_SCALING = 0.05
_LARGEST_SHIFT_VOXELS = 2.0
# In units of [-1, 1]: 8 HU with the default window of 1624 HU.
_LARGEST_OFFSET = 0.01
_LARGEST_GAIN = 0.01


@dataclass(frozen=True)
class Augmentation:
    """How one sample is changed.

    Attributes:
        flip: swap left and right.
        affine: (3, 4), displacement in voxels (x, y, z) from the crop's centre in the changed volume -> displacement
            from it in the given one; None leaves every voxel where it is, without interpolation.
        gain: factor on the CT, in the model's range.
        offset: what is added to it afterwards.
    """

    flip: bool
    affine: torch.Tensor | None
    gain: float
    offset: float


def draw_augmentation(kind: Literal["none", "mild", "standard"], generator: torch.Generator) -> Augmentation | None:
    """Draw a flip with probability 1/2 and a small change of intensity; `standard`: an affine map in half of them."""
    if kind == "none":
        return None
    flip, turn = (torch.rand(2, generator=generator) < 0.5).tolist()
    u = torch.rand(9, generator=generator, dtype=torch.float64) * 2 - 1
    affine = _affine(u[:3] * _LARGEST_TURN_RAD, u[3:4] * _LARGEST_SCALING, u[4:7] * _LARGEST_SHIFT_VOXELS)
    return Augmentation(
        flip,
        affine if turn and kind == "standard" else None,
        1 + _LARGEST_GAIN * float(u[7]),
        _LARGEST_OFFSET * float(u[8]),
    )


def augment(
    clean: torch.Tensor, labels: torch.Tensor, change: Augmentation, crop: Sequence[slice]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply an augmentation: the CT is interpolated linearly, labels take their nearest neighbour's.

    Args:
        clean: (channels, D, H, W) CT in [-1, 1]: the whole volume where the augmentation is affine, else the crop.
        labels: (D, H, W) uint8 on the same grid.
        change: the augmentation.
        crop: which voxels of the whole volume the result covers. Beyond the volume its outermost voxels are repeated.

    Returns:
        CT and labels of the crop.
    """
    if change.affine is not None:
        edges = [side.stop - side.start for side in crop]
        theta = send(_crop_to_volume(change.affine, labels.shape, crop).float(), clean.device)
        grid = F.affine_grid(theta[None], [1, 1, *edges], align_corners=False)
        clean = F.grid_sample(clean[None], grid, "bilinear", padding_mode="border", align_corners=False)[0]
        nearest = F.grid_sample(labels[None, None].float(), grid, "nearest", padding_mode="border", align_corners=False)
        labels = nearest[0, 0].to(labels.dtype)
    if change.flip:
        clean, labels = clean.flip(-1), labels.flip(-1)
    return (clean * change.gain + change.offset).clamp(-1, 1), labels


def _affine(angles_rad: torch.Tensor, scaling: torch.Tensor, shift_voxels: torch.Tensor) -> torch.Tensor:
    """(3, 4): rotations about x, y and z in turn, scaled by 1 + scaling, then a shift."""
    matrix = torch.eye(3, dtype=torch.float64) * (1 + scaling)
    for (first, second), angle in zip(((1, 2), (0, 2), (0, 1)), angles_rad.tolist(), strict=True):
        turn = torch.eye(3, dtype=torch.float64)
        turn[first, first] = turn[second, second] = math.cos(angle)
        turn[first, second], turn[second, first] = -math.sin(angle), math.sin(angle)
        matrix = matrix @ turn
    return torch.cat([matrix, shift_voxels[:, None]], dim=1)


def _crop_to_volume(affine: torch.Tensor, shape: Sequence[int], crop: Sequence[slice]) -> torch.Tensor:
    """(3, 4) for `affine_grid`: from [-1, 1] across the crop (its voxels' outer edges) to [-1, 1] across the volume."""
    sizes = affine.new_tensor(shape[::-1])
    starts = affine.new_tensor([side.start for side in reversed(crop)])
    edges = affine.new_tensor([side.stop - side.start for side in reversed(crop)])
    centre = starts + (edges - 1) / 2
    matrix = affine[:, :3] * edges / sizes[:, None]
    offset = (2 * (centre + affine[:, 3]) + 1) / sizes - 1
    return torch.cat([matrix, offset[:, None]], dim=1)
