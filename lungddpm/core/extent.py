"""Length, width and elongation of a body, as radiologists measure nodules."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import spatial
from skimage.measure import find_contours


@dataclass(frozen=True)
class Extent:
    """Long axis, short axis and elongation of a body.

    The axes are those of RECIST 1.1 (Eisenhauer et al., European J. Cancer 45:228, 2009): the long axis is the largest
    distance between two points of the outline in any axial slice, its maximum Feret diameter; the short axis is the
    longest chord perpendicular to it in the same slice that stays inside the body. An outline runs midway between voxel
    centres inside and outside, as that of scikit-image's Feret diameter: a single pixel is one pixel long.

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
    outlines_mm = [_outline(mask[:, :, k]) * spacing_mm[:2] for k in np.flatnonzero(mask.any(axis=(0, 1)))]
    edges_mm, axis_mm = max(((edges, _long_axis(edges)) for edges in outlines_mm), key=lambda pair: np.hypot(*pair[1]))
    long_axis_mm = float(np.hypot(*axis_mm))
    along = axis_mm / long_axis_mm
    short_axis_mm = _longest_chord(edges_mm @ np.array([along, (-along[1], along[0])]).T)
    places_mm = np.argwhere(mask) * spacing_mm
    moments = np.cov(places_mm.T, bias=True) + np.diag(spacing_mm**2 / 12)
    _, second, first = np.linalg.eigvalsh(moments)
    return Extent(long_axis_mm, short_axis_mm, float(np.sqrt(second / first)))


def _outline(region: np.ndarray) -> np.ndarray:
    """The edges of a region's outline, holes included, (n, 2 ends, 2 coordinates), in pixels."""
    polygons = find_contours(np.pad(region, 1).astype(float), 0.5, fully_connected="high")
    return np.concatenate([np.stack([polygon[:-1], polygon[1:]], axis=1) for polygon in polygons])


def _long_axis(edges: np.ndarray) -> np.ndarray:
    """The vector between the two corners that are farthest apart."""
    corners = edges[spatial.ConvexHull(edges[:, 0]).vertices, 0]
    apart = spatial.distance.cdist(corners, corners)
    one, other = np.unravel_index(apart.argmax(), apart.shape)
    return corners[other] - corners[one]


def _longest_chord(edges: np.ndarray) -> float:
    """The longest chord along the second coordinate inside closed polygons.

    Between neighbouring corners the length is linear in the chord's position, so it is largest at a corner, or just
    beside it where it jumps.
    """
    corners = edges[:, 0, 0]
    beside = 1e-9 * np.ptp(corners)
    longest = 0.0
    for position in np.unique(np.concatenate([corners - beside, corners + beside])):
        (x0, y0), (x1, y1) = np.moveaxis(edges[(edges[:, :, 0] < position).sum(axis=1) == 1], 0, -1)
        crossings = np.sort(y0 + (position - x0) / (x1 - x0) * (y1 - y0))
        longest = max(longest, *(crossings[1::2] - crossings[::2]), 0.0)
    return float(longest)
