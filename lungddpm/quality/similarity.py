"""Structural similarity of two CT volumes, at one scale (SSIM) and at several (MS-SSIM), within regions.

SSIM: Wang et al. 2004, IEEE TIP 13:600. MS-SSIM: Wang, Simoncelli and Bovik 2003, Asilomar Conference 37:1398. Both on
[0, 1], with a 3-D Gaussian window of sigma 1.5 and 11 voxels. Implemented here, because regions need the maps of both
factors, which scikit-image does not return, and MONAI only slowly (4 s per pair at 128^3: its window is not separable).
"""

from __future__ import annotations

import math

import numpy as np
from scipy.ndimage import gaussian_filter

WINDOW = 11
"""Edge of the window in voxels; similarity is undefined on smaller grids."""
_SIGMA = 1.5
_C1, _C2 = 0.01**2, 0.03**2
_SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Of MS-SSIM, the finest scale first."""


def n_scales(shape: tuple[int, int, int]) -> int:
    """Number of MS-SSIM scales on a grid: the window must fit the coarsest (5 from 176 voxels, 4 from 88).

    Returns:
        0 to 5; with fewer than 5, the weights are rescaled to a sum of 1.
    """
    return sum(min(shape) >> scale >= WINDOW for scale in range(len(_SCALE_WEIGHTS)))


def similarity_maps(image: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """SSIM and its part without luminance (contrast x structure) at every voxel; volumes are mirrored at their edges.

    Args:
        image: (x, y, z) in [0, 1].
        reference: same shape and range.

    Returns:
        (ssim, contrast_structure), float32, of that shape.
    """

    def mean(values: np.ndarray) -> np.ndarray:
        return gaussian_filter(values, _SIGMA, radius=WINDOW // 2)

    image, reference = np.asarray(image, np.float32), np.asarray(reference, np.float32)
    of_image, of_reference = mean(image), mean(reference)
    variance = mean(image * image) - of_image**2 + mean(reference * reference) - of_reference**2
    covariance = mean(image * reference) - of_image * of_reference
    contrast_structure = (2 * covariance + _C2) / (variance + _C2)
    luminance = (2 * of_image * of_reference + _C1) / (of_image**2 + of_reference**2 + _C1)
    return luminance * contrast_structure, contrast_structure


def similarities(
    image: np.ndarray, reference: np.ndarray, masks: dict[str, np.ndarray]
) -> dict[str, tuple[float, float]]:
    """SSIM and MS-SSIM within regions: means of the maps, where coarser voxels are weighted by their share within.

    Args:
        image: (x, y, z) in [0, 1].
        reference: same shape and range.
        masks: region name -> bool mask of that shape.

    Returns:
        (ssim, ms_ssim) by region; NaN if the region is empty or the grid smaller than the window. MS-SSIM takes
        negative means as 0.
    """
    scales = n_scales(image.shape)
    weights = {name: mask.astype(np.float32) for name, mask in masks.items() if mask.any()}
    if not scales:
        weights = {}
    means: dict[str, list[tuple[float, float]]] = {name: [] for name in weights}
    for scale in range(scales):
        if scale:
            image, reference = _halve(image), _halve(reference)
            weights = {name: _halve(weight) for name, weight in weights.items()}
        maps = similarity_maps(image, reference)
        for name, weight in weights.items():
            # At the far edge of an odd grid, halving loses a layer, and a thin region with it.
            total = float(weight.sum(dtype=np.float64))
            ssim, contrast_structure = (
                float((part * weight).sum(dtype=np.float64)) / total if total else math.nan for part in maps
            )
            means[name].append((ssim, contrast_structure))
    nothing = math.nan, math.nan
    return {name: (means[name][0][0], _over_scales(means[name])) if name in means else nothing for name in masks}


def _over_scales(means: list[tuple[float, float]]) -> float:
    """MS-SSIM from the mean (SSIM, contrast x structure) of each scale: luminance only counts at the coarsest."""
    factors = [*(contrast_structure for _, contrast_structure in means[:-1]), means[-1][0]]
    weights = np.array(_SCALE_WEIGHTS[: len(means)])
    return float(np.prod(np.maximum(factors, 0) ** (weights / weights.sum())))


def _halve(volume: np.ndarray) -> np.ndarray:
    """Means over blocks of 2 x 2 x 2 voxels; the last layer of an odd edge is left out."""
    x, y, z = (edge // 2 for edge in volume.shape)
    return volume[: 2 * x, : 2 * y, : 2 * z].reshape(x, 2, y, 2, z, 2).mean(axis=(1, 3, 5))
