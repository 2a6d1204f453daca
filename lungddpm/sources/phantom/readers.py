"""Four readers, who mark a scan as those of LIDC-IDRI did (Armato et al., Med. Phys. 38:915-931, 2011): outlines of
nodules of at least 3 mm, which differ between readers and are occasionally missing; one point for a smaller nodule or
for a finding that is not a nodule."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lungddpm.core.volume import Volume
from lungddpm.sources.phantom.nodules import Nodule, shape_share
from lungddpm.sources.phantom.patient import Thorax
from lungddpm.sources.phantom.scanner import LPS_TO_RAS, Grid

_READERS = 4
_CROSS = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], bool)


@dataclass(frozen=True)
class Reading:
    """What one reader marks in a scan; indices are those of the `Thorax`.

    Attributes:
        masks: nodule -> bool mask of the scan's shape.
        small_nodules, distractors: the ones marked.
    """

    masks: dict[int, np.ndarray]
    small_nodules: tuple[int, ...]
    distractors: tuple[int, ...]


def read(truth: Thorax, seed: int) -> tuple[Reading, ...]:
    """Four readers' marks: each outlines slightly wider, tighter or shifted, and misses faint nodules.

    Every nodule is found by at least one reader.
    """
    rng = np.random.default_rng(seed)
    generous_mm = rng.normal(0, 0.4, _READERS)
    finders = []
    for nodule in truth.nodules:
        missed = 0.4 if nodule.diameter_mm < 6 else 0.15 if nodule.texture == "ground-glass" else 0.04
        finds = rng.random(_READERS) >= missed
        finds[rng.integers(_READERS)] = True
        finders.append(finds)
    return tuple(
        Reading(
            masks={
                i: _outlined(truth, nodule, generous_mm[reader] + rng.normal(0, 0.3), rng.normal(0, 0.4, 3))
                for i, nodule in enumerate(truth.nodules)
                if finders[i][reader]
            },
            small_nodules=tuple(np.flatnonzero(rng.random(len(truth.small_nodules_mm)) < 0.6).tolist()),
            distractors=tuple(np.flatnonzero(rng.random(len(truth.distractors_mm)) < 0.5).tolist()),
        )
        for reader in range(_READERS)
    )


def _outlined(truth: Thorax, nodule: Nodule, grown_mm: float, moved_mm: np.ndarray) -> np.ndarray:
    """A reader's mask: the nodule grown and moved, without the notches and holes that an outline cannot show."""
    grid = _grid_of(truth.ct)
    centre = nodule.centre_mm * LPS_TO_RAS + moved_mm
    grown_mm = max(grown_mm, -0.25 * nodule.diameter_mm)
    box, share = shape_share(grid, nodule.shape, centre, grown_mm)
    mask = np.zeros(grid.shape, bool)
    mask[box] = (share >= min(0.5, share.max())) & truth.lungs[box]
    if not mask.any():
        mask |= nodule.mask
    for k in np.flatnonzero(mask.any(axis=(0, 1))):
        mask[:, :, k] = outlinable(mask[:, :, k])
    return mask


def _grid_of(ct: Volume) -> Grid:
    """The grid of a scan in the scanner's LPS frame."""
    first, step = ct.affine[:3, 3] * LPS_TO_RAS, ct.spacing_mm
    x, y, z = (first[i] + step[i] * np.arange(ct.shape[i]) for i in range(3))
    return Grid(x, y, z, float(step[0]), float(step[2]))


def outlinable(mask: np.ndarray) -> np.ndarray:
    """The smallest mask around a 2-D mask that equals what its outer outlines enclose."""
    from scipy.ndimage import binary_dilation, binary_erosion, binary_fill_holes

    while True:
        closed = binary_erosion(binary_fill_holes(binary_dilation(mask, _CROSS)), _CROSS)
        if (closed == mask).all():
            return mask
        mask = closed


def outlines(mask: np.ndarray) -> list[np.ndarray]:
    """Outlines of a 2-D mask by LIDC's rule: closed chains of the first pixels outside it.

    Args:
        mask: bool (column, row), from `outlinable`; must not touch the image's border.

    Returns:
        One (n, 2) int array of (column, row) for each 8-connected part, first point repeated at the end. The pixels
        whose centres are inside by the even-odd rule, less the listed ones, are the part.
    """
    from scipy.ndimage import binary_dilation, binary_fill_holes, label
    from skimage.measure import find_contours

    parts, count = label(mask, np.ones((3, 3), int))
    chains = []
    for part in range(1, count + 1):
        around = binary_fill_holes(binary_dilation(parts == part, _CROSS))
        (crossings,) = find_contours(np.pad(around, 1).astype(float), 0.5, fully_connected="high")
        crossings = crossings - 1
        low, high = np.floor(crossings).astype(int), np.ceil(crossings).astype(int)
        # A crossing is halfway between a pixel of the outline and one beyond it.
        is_low = (low >= 0).all(axis=1)
        is_low[is_low] = around[tuple(low[is_low].T)]
        chain = np.where(is_low[:, None], low, high)
        chains.append(chain[np.concatenate([[True], (np.diff(chain, axis=0) != 0).any(axis=1)])])
    return chains
