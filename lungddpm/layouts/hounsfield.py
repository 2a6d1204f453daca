"""Check whether a CT is in Hounsfield units by the levels of lung, soft tissue and air; if not, describe its values.

Every CT is checked here: scans on their way to a case, and synthetic CT of other systems. Nothing is corrected: a
wrongly guessed offset would shift every value.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from skimage.filters import threshold_otsu

from lungddpm.config.models import LayoutLimits
from lungddpm.core.volume import SMALLEST_RANGE_HU, bounding_box

_OTHER_LABEL = "looks like Hounsfield units, but what is labelled lung is not lung"
_SAMPLE = 1_000_000
"""Number of sampled voxels: enough for percentiles."""
_FEWEST = 8
"""Minimum number of voxels to judge a tissue."""
_LUNG_HU, _TISSUE_HU, _AIR_HU = -850, 40, -1000
"""Usual values, for messages."""
_TISSUE_PERCENTILE = 60.0
"""Percentile of the surroundings of the lungs: above air and fat, below bone, contrast and metal."""
_CONTRAST_HU = (350.0, 1350.0)
"""Soft tissue minus lung, for any lungs: values with a larger or smaller difference are scaled."""
_DARKEST_HU = (-1600.0, -800.0)
"""1st percentile of any lungs."""
_ROUNDING = 1e-3
_DARK_OF_UNSIGNED = 5000.0
_TISSUE_SPREAD_HU = 150.0
_OFFSETS = (1024, 2048, 8192, 32768)
"""Intercepts of scanners, and the middle of uint16."""
_OFFSET_TOLERANCE = 300.0
_SMALLEST_OFFSET = 200.0
_INVERTED_TOLERANCE = 120.0
_CUT_SHARE, _CUT_HU = 0.25, -900.0
"""If this share of the lung has the lowest value, and that is above this level, a window has clipped it."""
_FILLED_SHARE = 0.5
_DARK_HU = -700.0
_AERATED_HU = -520.0
"""Some lung is darker, even in expiration, unless the values are scaled down."""


@dataclass(frozen=True)
class Landmarks:
    """Levels of a CT, in its own unit.

    Attributes:
        lung: median of the lungs.
        tissue: level of the soft tissue around them; None if nothing surrounds them.
        darkest: 1st percentile of the lungs.
        guessed: whether lung and tissue are the darker and the brighter part of the scan; False if lungs are given.
        cut: the lungs' lowest value, if many lung voxels have it and nothing in the scan is lower; else None.
        sides: median of the voxels on the lateral faces of the scan.
        filling: the same, if most of these voxels have that one value; else None.
        low: lowest value of the lungs and what surrounds them.
        high: highest value of the same.
    """

    lung: float
    tissue: float | None
    darkest: float
    guessed: bool
    cut: float | None
    sides: float
    filling: float | None
    low: float
    high: float


def find_landmarks(ct: np.ndarray, lungs: np.ndarray | None = None) -> Landmarks | None:
    """The levels of a CT.

    Args:
        ct: (x, y, z), any unit, finite.
        lungs: bool of the same shape; None uses the darker and the brighter part of the middle of the scan (Otsu's
            threshold) as lung and soft tissue, which works for every chest in any unit.

    Returns:
        None without lungs to judge, or if all values are equal.
    """
    step = max(1, round((ct.size / _SAMPLE) ** (1 / 3)))
    values = ct[::step, ::step, ::step]
    if lungs is None:
        width, depth, _ = values.shape
        middle = values[width // 4 : width - width // 4, depth // 4 : depth - depth // 4]
        # Bone, contrast and metal would pull the threshold up.
        likely = np.clip(middle, *np.percentile(middle, [0.5, 90]))
        if likely.min() == likely.max():
            return None
        dark = likely <= threshold_otsu(likely)
        lung, around = middle[dark], middle[~dark]
        tissue = float(np.median(around)) if around.size else None
    else:
        inside = lungs[::step, ::step, ::step]
        if np.count_nonzero(inside) < _FEWEST:
            return None
        box = bounding_box(inside)
        middle = values[box]
        lung, around = values[inside], middle[~inside[box]]
        tissue = float(np.percentile(around, _TISSUE_PERCENTILE)) if around.size >= _FEWEST else None
    lowest = lung.min()
    sides = np.concatenate([face.ravel() for face in (values[0], values[-1], values[:, 0], values[:, -1])])
    usual = np.median(sides)
    return Landmarks(
        lung=float(np.median(lung)),
        tissue=tissue,
        darkest=float(np.percentile(lung, 1)),
        guessed=lungs is None,
        cut=float(lowest) if lowest <= values.min() and np.mean(lung == lowest) >= _CUT_SHARE else None,
        sides=float(usual),
        filling=float(usual) if np.mean(sides == usual) >= _FILLED_SHARE else None,
        low=float(middle.min()),
        high=float(middle.max()),
    )


def hounsfield_problem(ct: np.ndarray, lungs: np.ndarray, limits: LayoutLimits) -> str | None:
    """What is wrong with a CT's values, as a clause that describes them; None if they are HU.

    Normal differences between scans pass: padding, contrast, metal, emphysema, noise, a field of view inside the body,
    air clipped at -1000.

    Args:
        ct: (x, y, z), finite.
        lungs: bool of the same shape, labelled or segmented, with or without vessels and nodules.
        limits: `lung_hu` and `tissue_hu` are used.
    """
    found = find_landmarks(ct, lungs)
    if found is None:
        return None
    if _in_hounsfield(found, limits):
        # A field of view inside the body of a patient without noise, as of a phantom, has tissue on its sides.
        is_tissue = found.tissue is not None and found.filling is not None and abs(found.filling - found.tissue) <= 1
        if found.filling is not None and found.filling > _DARK_HU and not is_tissue:
            return (
                f"has {found.filling:g} HU around the patient, where air should be {_AIR_HU} HU: it was masked or "
                "padded"
            )
        return None
    levels = _tell(found)
    if cut := _cut_to_a_window(found):
        return cut
    without_labels = find_landmarks(ct)
    if not _in_place(found, limits) and without_labels is not None and _in_hounsfield(without_labels, limits):
        return f"{_OTHER_LABEL} ({levels}): the label marks another structure, or the labels belong to another scan"
    if _between(found.lung, limits.lung_hu) and found.tissue is not None and found.tissue <= _DARK_HU:
        return f"has no soft tissue around the lungs: everything except the lungs was masked ({levels})"
    looks = _look(found, limits) or _scaled(found)
    return f"is not in Hounsfield units: {looks} ({levels})"


def recognised_problem(ct: np.ndarray, limits: LayoutLimits) -> str | None:
    """The same if no lungs can be found: None also if nothing indicates that the values are not HU."""
    found = find_landmarks(ct)
    if found is None or _in_hounsfield(found, limits):
        return None
    if cut := _cut_to_a_window(found):
        return cut
    looks = _look(found, limits) or (_scaled(found) if found.low >= 0 else None)
    return looks and f"is not in Hounsfield units: {looks} ({_tell(found)})"


def remedy_of(problem: str) -> str:
    """What the user can do about a problem that was found here, as a sentence."""
    if problem.startswith(_OTHER_LABEL):
        return "Correct the labels."
    return "Export the CT in Hounsfield units (air -1000, water 0)."


def _in_hounsfield(found: Landmarks, limits: LayoutLimits) -> bool:
    dark_enough = found.darkest <= _AERATED_HU and (found.cut is None or found.cut <= _CUT_HU)
    return _in_place(found, limits) and dark_enough


def _in_place(found: Landmarks, limits: LayoutLimits) -> bool:
    tissue = found.tissue is None or _between(found.tissue, limits.tissue_hu)
    return tissue and _between(found.lung, limits.lung_hu)


def _cut_to_a_window(found: Landmarks) -> str | None:
    if found.cut is None or not _CUT_HU < found.cut < 0 or found.high - found.low <= SMALLEST_RANGE_HU:
        return None
    return f"is clipped to a window: no voxel is below {found.cut:g} HU, where most of the lungs should be"


def _look(found: Landmarks, limits: LayoutLimits) -> str | None:
    """What the values look like; None if that is not clear."""
    low, high, lung = found.low, found.high, found.lung
    tissue = lung if found.tissue is None else found.tissue
    if high - low <= 1e-6:
        return None
    if high - low <= SMALLEST_RANGE_HU:
        thousandths = _between(1000 * lung, limits.lung_hu) and abs(1000 * tissue - _TISSUE_HU) <= _TISSUE_SPREAD_HU
        if low >= -_ROUNDING and high <= 1 + _ROUNDING:
            return "its values are normalised to [0, 1]"
        if low >= -1 - _ROUNDING and high <= 1 + _ROUNDING:
            return f"its values are normalised to [-1, 1]{', or HU divided by 1000' if thousandths else ''}"
        if thousandths:
            return "its values are HU divided by 1000"
        return "its values are standardised (z-scores), with a mean near 0 and a standard deviation near 1"
    if low >= -0.5 and high <= 255.5 and high > 127:
        return "it has 8-bit grey values (0 to 255) of a display window"
    # Without labels, the brighter part of the scan counts as tissue.
    dark_is_tissue = found.guessed and _between(lung, limits.tissue_hu)
    air = tissue if dark_is_tissue else lung
    if low < _DARK_OF_UNSIGNED and (_between(air - 2**16, limits.lung_hu) or air >= np.iinfo(np.int16).max):
        return "its negative values were read as unsigned 16-bit numbers, so that air is bright"
    offset = tissue - _TISSUE_HU
    # Without labels, again: the air around the patient is bright then.
    swapped = dark_is_tissue and found.sides > (lung + tissue) / 2
    if lung - tissue > _SMALLEST_OFFSET or (swapped and abs(offset - _OFFSETS[0]) > _INVERTED_TOLERANCE):
        return "its values are inverted: lung is brighter than soft tissue"
    shifted = abs(offset) > _SMALLEST_OFFSET
    if shifted and _between(tissue - lung, _CONTRAST_HU) and _between(found.darkest - offset, _DARKEST_HU):
        if offset > 0:
            return (
                f"its values are {_named(offset)} too high, like stored values whose rescale intercept was not applied"
            )
        return _rescaled_twice(-offset)
    # Values below -1024 were set to -1024: of values rescaled twice, only soft tissue and bone are left above.
    if lung <= limits.lung_hu[0] and _between(tissue, (lung, _DARK_HU)):
        return _rescaled_twice(-offset)
    return None


def _scaled(found: Landmarks) -> str:
    return f"its values look scaled, from {found.low:.4g} to {found.high:.4g}, such as grey values of a window"


def _rescaled_twice(offset: float) -> str:
    return (
        f"its values are {_named(offset)} too low, like values that were rescaled twice (the rescale "
        "intercept was applied a second time)"
    )


def _named(offset: float) -> str:
    """The size of an offset, rounded to a usual one if one is near."""
    near = [usual for usual in _OFFSETS if abs(offset - usual) <= _OFFSET_TOLERANCE]
    return f"about {near[0] if near else round(offset, -1):g}"


def _tell(found: Landmarks) -> str:
    tissue = "" if found.tissue is None else f", soft tissue at {found.tissue:.4g}"
    return f"lung is at {found.lung:.4g}{tissue}; in HU these are about {_LUNG_HU} and {_TISSUE_HU}"


def _between(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]
