"""The orthonormal Haar transform of volumes: eight sub-bands of half the size, and back without loss.

As it is orthonormal, white noise stays white noise of the same variance. So a network that works on sub-bands can
predict noise, velocity or CT of voxels, and noise levels, solvers and pasting stay as they are. The idea is that of WDM
(Friedrich et al. 2024, arXiv 2402.19043), whose diffusion runs on the sub-bands themselves.
"""

from __future__ import annotations

import torch
from monai.networks.utils import pixelunshuffle

BANDS = 8
"""Of a volume: each of z, y, x either low (sums of neighbours) or high (their differences)."""


def haar(volumes: torch.Tensor) -> torch.Tensor:
    """The sub-bands of volumes.

    Args:
        volumes: (N, 1, D, H, W); D, H, W even.

    Returns:
        (N, 8, D/2, H/2, W/2): low and high along z, y and x, x changing fastest; the first is low along all.
    """
    return _sums_and_differences(space_to_depth(volumes))


def inverse_haar(bands: torch.Tensor) -> torch.Tensor:
    """The volumes of sub-bands: (N, 8, D/2, H/2, W/2) -> (N, 1, D, H, W)."""
    octants = _sums_and_differences(bands).unflatten(1, (2, 2, 2))
    return octants.permute(0, 4, 1, 5, 2, 6, 3).flatten(5, 6).flatten(3, 4).flatten(1, 2)[:, None]


def space_to_depth(volumes: torch.Tensor) -> torch.Tensor:
    """Voxels of each cube of 2x2x2 as channels, so that labels keep their places.

    Args:
        volumes: (N, C, D, H, W); D, H, W even.

    Returns:
        (N, 8 C, D/2, H/2, W/2): of each channel in turn, z, y, x of the voxel in its cube, x changing fastest.
    """
    return pixelunshuffle(volumes, 3, 2)


def _sums_and_differences(octants: torch.Tensor) -> torch.Tensor:
    """(N, 8, ...) -> the same: sums and differences along each axis of the cube over sqrt(2); its own inverse."""
    cube = octants.unflatten(1, (2, 2, 2))
    for axis in (1, 2, 3):
        first, second = cube.unbind(axis)
        cube = torch.stack([first + second, first - second], dim=axis)
    return cube.flatten(1, 3) * BANDS**-0.5
