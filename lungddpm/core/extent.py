"""Length, width and elongation of a body, as radiologists measure nodules."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import spatial


@dataclass(frozen=True)
class Extent:
    """Long axis, short axis and elongation of a body.

    The axes are those of RECIST 1.1 (Eisenhauer et al., European J. Cancer 45:228, 2009): the long axis is the largest
    distance between two points of the outline in any axial slice, its maximum Feret diameter; the short axis is how
    wide the body is perpendicular to it, in the same slice. An outline runs midway between voxel centres inside and
    outside, as that of scikit-image's Feret diameter: a single pixel is one pixel long.

    Elongation is the square root of the second largest principal moment over the largest (IBSI: Zwanenburg et al.,
    Radiology 295:328, 2020): 1 is a body as wide as long, 0 a line. Voxels count as boxes, not as points.
    """

    long_axis_mm: float
    short_axis_mm: float
    elongation: float


def extent_of(mask: np.ndarray, spacing_mm: np.ndarray) -> Extent:
    """Measure a body.

    Args:
        mask: bool, (x, y, z), z across axial slices, with at least one voxel.
        spacing_mm: (3,).
    """
    spacing_mm = np.asarray(spacing_mm, float)
    axes = [_axes_mm(mask[:, :, k], spacing_mm[:2]) for k in np.flatnonzero(mask.any(axis=(0, 1)))]
    long_axis_mm, short_axis_mm = max(axes, key=lambda pair: pair[0])
    places_mm = np.argwhere(mask) * spacing_mm
    moments = np.cov(places_mm.T, bias=True) + np.diag(spacing_mm**2 / 12)
    _, second, first = np.linalg.eigvalsh(moments)
    return Extent(long_axis_mm, short_axis_mm, float(np.sqrt(second / first)))


def _axes_mm(region: np.ndarray, spacing_mm: np.ndarray) -> tuple[float, float]:
    """The longest diameter of a region's outline in its plane, and the width perpendicular to it."""
    pixels = np.argwhere(region)
    halves = np.array([(0.5, 0), (-0.5, 0), (0, 0.5), (0, -0.5)])
    outline_mm = (pixels[:, None] + halves).reshape(-1, 2) * spacing_mm
    corners_mm = outline_mm[spatial.ConvexHull(outline_mm).vertices]
    apart_mm = spatial.distance.cdist(corners_mm, corners_mm)
    one, other = np.unravel_index(apart_mm.argmax(), apart_mm.shape)
    along = (corners_mm[other] - corners_mm[one]) / apart_mm[one, other]
    return float(apart_mm[one, other]), float(np.ptp(corners_mm @ (-along[1], along[0])))
