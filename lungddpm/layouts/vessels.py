"""Pulmonary vessels from CT: multi-scale tubes by the Hessian, hysteresis, growth into the vessels' walls.

The measure is the second eigenvalue of the Hessian of a Gaussian-smoothed image, scale-normalised (Lindeberg, Int. J.
Comput. Vis. 30:117-154, 1998): high along bright tubes, low on bright sheets such as fissures and the pleura (Sato et
al., Med. Image Anal. 2:143-168, 1998). The eigenvalues of symmetric 3 x 3 matrices in closed form are those of Smith,
Commun. ACM 4:168, 1961.
"""

from __future__ import annotations

import cc3d
import numpy as np
from scipy import ndimage

from lungddpm.core.volume import Volume, bounding_box, model_grid, occupancy, per_axis, resample_image
from lungddpm.layouts.lungs import pieces_holding

_FINEST_MM = 1.0
_REFINEMENT = 0.7
"""Step of the working grid as a share of a coarse scan's pixel; a finer grid adds no information."""
_SCALES_MM = (0.8, 1.3, 2.1, 3.4)
_HU_RANGE = (-1000.0, 100.0)
_FAINT_HU, _CLEAR_HU = 45.0, 110.0
"""Hysteresis; a Gaussian tube of contrast C responds with C / 4 at its own scale."""
_ABOVE_LUNG_HU = 250.0
_TISSUE_HU = -550.0
_SPECK_MM3 = 30.0
_RIM_MM, _DEEP_SHARE = 5.0, 0.5
"""Components with a smaller share inside the lungs' rim are pleura, fat, scar or partial volume of the diaphragm."""


def segment_vessels(ct: Volume, lungs: np.ndarray) -> np.ndarray:
    """Arteries and veins of about 1 to 10 mm inside the lungs; dense nodules respond as well and must be removed.

    Args:
        ct: HU, RAS+, at any spacing.
        lungs: (x, y, z) bool or labels, non-zero inside the lungs.

    Returns:
        bool of the CT's shape, true only inside the lungs.
    """
    lungs = lungs > 0
    if not lungs.any():
        return np.zeros(ct.shape, bool)
    spacing_mm = max(_FINEST_MM, _REFINEMENT * float(ct.spacing_mm.min()))
    margin_mm = 3 * spacing_mm
    box = bounding_box(lungs)
    sides_mm = [(side.stop - side.start) * step for side, step in zip(box, ct.spacing_mm, strict=True)]
    shape = per_axis(int(np.ceil((side + 2 * margin_mm) / spacing_mm)) for side in sides_mm)
    affine = model_grid(ct, shape, lungs, margin_mm)
    hu = resample_image(ct, affine, shape).array
    np.clip(hu, *_HU_RANGE, out=hu)
    inside = occupancy(ct.like(lungs), affine, shape) >= 0.5
    # The grid's step differs slightly between axes, because its edges match those of the box.
    vessels = _tubes(hu, inside, np.linalg.norm(affine[:3, :3], axis=0))
    target = ct.like(lungs).crop(box)
    result = np.zeros(ct.shape, bool)
    result[box] = (occupancy(Volume(vessels, affine), target.affine, target.shape) >= 0.5) & target.array
    return result


def _tubes(hu: np.ndarray, inside: np.ndarray, spacing_mm: np.ndarray) -> np.ndarray:
    """Vessels on the working grid, whose outermost voxels must be outside the lungs."""
    # Filled, because the bright chest wall would dominate its neighbours; the lungs' outermost voxels are part wall.
    core = ndimage.binary_erosion(inside)
    lung_hu = np.median(hu[inside])
    filled = np.where(core, hu, lung_hu)
    response = np.zeros(hu.shape, np.float32)
    for scale_mm in _SCALES_MM:
        smooth = ndimage.gaussian_filter(filled, scale_mm / spacing_mm, truncate=3)
        # Far from any tube the mean curvature is not even negative: most voxels are excluded here.
        bent = _bent(smooth, core, spacing_mm, scale_mm)
        tubeness = _tubeness(smooth, bent, spacing_mm) * scale_mm**2
        response.flat[bent] = np.maximum(response.flat[bent], tubeness)
    clear, faint = response > _CLEAR_HU, response > _FAINT_HU
    tubes = pieces_holding(clear, faint) & (hu > lung_hu + _ABOVE_LUNG_HU)
    grown = tubes | (ndimage.binary_dilation(tubes) & (hu > _TISSUE_HU) & inside)
    reach = np.rint(_RIM_MM / spacing_mm).astype(int)
    deep = ndimage.minimum_filter(inside.view(np.uint8), 2 * reach + 1, mode="constant").astype(bool)
    labels, count = cc3d.connected_components(grown, connectivity=26, return_N=True)
    sizes, deep_sizes = (np.bincount(labels[part], minlength=count + 1) for part in (grown, grown & deep))
    keep = (sizes * spacing_mm.prod() >= _SPECK_MM3) & (deep_sizes >= _DEEP_SHARE * sizes)
    keep[0] = False
    return keep[labels]


def _bent(image: np.ndarray, core: np.ndarray, spacing_mm: np.ndarray, scale_mm: float) -> np.ndarray:
    """Flat indices of the core's voxels with negative mean curvature; none may be on the rim."""
    xx_mm2, yy_mm2, zz_mm2 = (step**2 for step in spacing_mm)
    found = [np.empty(0, int)]
    # Plane by plane, so that the data of each step stays in the CPU cache.
    for x in np.flatnonzero(core.any(axis=(1, 2))):
        twice = 2 * image[x, 1:-1, 1:-1]
        laplacian = (image[x + 1, 1:-1, 1:-1] - twice + image[x - 1, 1:-1, 1:-1]) / xx_mm2
        laplacian += (image[x, 2:, 1:-1] - twice + image[x, :-2, 1:-1]) / yy_mm2
        laplacian += (image[x, 1:-1, 2:] - twice + image[x, 1:-1, :-2]) / zz_mm2
        y, z = np.nonzero((laplacian * scale_mm**2 < -_FAINT_HU) & core[x, 1:-1, 1:-1])
        found.append((x * image.shape[1] + y + 1) * image.shape[2] + z + 1)
    return np.concatenate(found)


def _second(image: np.ndarray, places: np.ndarray, spacing_mm: np.ndarray, a: int, b: int) -> np.ndarray:
    """Second derivative along two axes by central differences; no position may be on the image's rim."""
    flat = image.ravel()
    strides = (image.shape[1] * image.shape[2], image.shape[2], 1)
    i, j = strides[a], strides[b]
    if a == b:
        return (flat[places + i] - 2 * flat[places] + flat[places - i]) / spacing_mm[a] ** 2
    corners = flat[places + i + j] - flat[places + i - j] - flat[places - i + j] + flat[places - i - j]
    return corners / (4 * spacing_mm[a] * spacing_mm[b])


def _tubeness(image: np.ndarray, places: np.ndarray, spacing_mm: np.ndarray) -> np.ndarray:
    """Minus the middle eigenvalue of the Hessian at some voxels (flat indices), 0 where it is positive; per mm2."""
    axes = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))
    xx, yy, zz, xy, xz, yz = (_second(image, places, spacing_mm, a, b) for a, b in axes)
    mean = (xx + yy + zz) / 3
    xx, yy, zz = xx - mean, yy - mean, zz - mean
    off = xy**2 + xz**2 + yz**2
    spread = np.sqrt((xx**2 + yy**2 + zz**2 + 2 * off) / 6)
    determinant = xx * (yy * zz - yz**2) - xy * (xy * zz - yz * xz) + xz * (xy * yz - yy * xz)
    angle = np.arccos(np.clip(determinant / np.maximum(2 * spread**3, 1e-12), -1, 1)) / 3
    middle = mean + 2 * spread * np.cos(angle - 2 * np.pi / 3)
    return np.maximum(-middle, 0)
