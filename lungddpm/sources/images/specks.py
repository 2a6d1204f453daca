"""Slips of the brush: parts of a nodule label that are too small to be a nodule."""

from __future__ import annotations

import math

import numpy as np

from lungddpm.core.labels import Label
from lungddpm.core.volume import Volume, per_axis

SMALLEST_MM = 3.0
"""Diameter of the smallest nodules outlined in LIDC-IDRI (Armato et al., Medical Physics 38:915-931, 2011)."""
_SMALLEST_MM3 = math.pi / 6 * SMALLEST_MM**3


def fill_specks(labels: Volume) -> tuple[Volume, int]:
    """Replace 26-connected parts of the nodule label below the volume of a sphere of 3 mm by the label around them.

    As nodules of their own they would count like the others: on a coarse grid each has at least one cell, which can be
    30 times its volume.

    Args:
        labels: uint8 `Label`.

    Returns:
        The labels, and how many parts were replaced.
    """
    import cc3d
    from scipy.ndimage import binary_dilation

    parts = cc3d.connected_components(labels.array == Label.NODULE, connectivity=26)
    found = cc3d.statistics(parts)
    too_small = found["voxel_counts"] * labels.voxel_mm3 < _SMALLEST_MM3
    too_small[0] = False  # what is not nodule
    filled = labels.array.copy()
    for number in np.flatnonzero(too_small):
        around = per_axis(slice(max(side.start - 1, 0), side.stop + 1) for side in found["bounding_boxes"][number])
        speck = parts[around] == number
        shell = binary_dilation(speck, np.ones((3, 3, 3))) & ~speck
        filled[around][speck] = np.bincount(labels.array[around][shell], minlength=1).argmax()
    return labels.like(filled), int(too_small.sum())
