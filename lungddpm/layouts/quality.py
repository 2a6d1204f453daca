"""Quality figures of a layout, and their limits, outside which its case is excluded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import cc3d
import numpy as np
from scipy import ndimage

from lungddpm.config.models import LayoutLimits
from lungddpm.core.cases import CHARACTERISTICS
from lungddpm.core.errors import ExcludedCaseError
from lungddpm.core.extent import extent_of
from lungddpm.core.labels import Label
from lungddpm.core.volume import Box, Volume, per_axis
from lungddpm.layouts.lungs import measure_lungs
from lungddpm.layouts.nodules import Nodule, centroid_mm

CONTACT_MM = 2.0
"""Voxels within this distance of a nodule touch it: readers' contours differ by a pixel or two."""
VESSEL_REACH_MM = 8.0
"""A vessel extends at least this far: shorter ones are the nodule's own rim, which looks like a vessel."""


@dataclass(frozen=True)
class Segmented:
    """The segmentation of a scan, in the scan's own resolution.

    Attributes:
        ct: int16 HU, RAS+.
        lungs_lr: uint8 of the CT's shape: 0 outside the lungs, `lungs.RIGHT`, `lungs.LEFT`.
        vessels: bool of the CT's shape; no nodules.
        nodules: uint8 of the CT's shape: 0, or the number of the nodule, from 1.
    """

    ct: Volume
    lungs_lr: np.ndarray
    vessels: np.ndarray
    nodules: np.ndarray

    def labels(self) -> np.ndarray:
        """uint8 `Label` of the CT's shape."""
        labels = np.where(self.lungs_lr > 0, np.uint8(Label.LUNG), np.uint8(Label.BACKGROUND))
        labels[self.vessels] = Label.VESSEL
        labels[self.nodules > 0] = Label.NODULE
        return labels


def measure_layout(found: Segmented, nodules: Sequence[Nodule], cells: Volume) -> dict:
    """The figures of a case, JSON-like: those for `check_layout`, and a dict for each nodule.

    Volumes and shares are at the scan's own resolution, except the nodules' `layout_volume_mm3`.

    Args:
        found: the scan and its segmentation.
        nodules: in the index space of `found.ct`, in the order of their numbers.
        cells: on the model grid: 0, or the number of the nodule.
    """
    lungs = found.lungs_lr > 0
    figures = [_measure_nodule(found, lungs, nodule, number, cells) for number, nodule in enumerate(nodules, start=1)]
    voxels = np.array([nodule.voxels for nodule in nodules])
    near = np.array([nodule["share_in_or_touching_lungs"] for nodule in figures])
    return {
        **{name: round(value, 4) for name, value in measure_lungs(found.ct.like(found.lungs_lr)).items()},
        "vessel_share_of_lungs": round(float(np.count_nonzero(found.vessels) / np.count_nonzero(lungs)), 4),
        "nodule_share_in_or_touching_lungs": round(float(voxels @ near / voxels.sum()), 3) if nodules else None,
        "n_nodules": len(nodules),
        "nodules": figures,
    }


def check_layout(figures: dict, limits: LayoutLimits) -> None:
    """Check vessels and nodules against the limits (the lungs are checked by `lungs.check_lungs`).

    Args:
        figures: from `measure_layout`.
        limits: from the config.

    Raises:
        ExcludedCaseError: with the figure, the limit, and the key of the limit.
    """
    share, (least, most) = figures["vessel_share_of_lungs"], limits.vessel_share
    if not least <= share <= most:
        raise ExcludedCaseError(
            "vessels",
            f"they fill {share:.2%} of the lungs; the limits are {least:.2%} to {most:.2%}"
            " (layouts.limits.vessel_share)",
            "Look for noise, contrast or lung contents that explain it.",
        )
    share = figures["nodule_share_in_or_touching_lungs"]
    if share is not None and share < limits.nodule_share:
        raise ExcludedCaseError(
            "nodules",
            f"{share:.1%} of their voxels are in the lungs or touch them, less than {limits.nodule_share:.1%}"
            " (layouts.limits.nodule_share)",
            "Check that the readers' XML or the labels belong to this scan, and the segmentation of its lungs.",
        )


def surroundings(nodule: Nodule, scan: Volume, margin_mm: float) -> tuple[Box, np.ndarray]:
    """A wider box around a nodule, within the scan, and the nodule's mask in it."""
    margin = np.ceil(margin_mm / scan.spacing_mm).astype(int)
    sides = zip(nodule.box, margin, scan.shape, strict=True)
    box = per_axis(slice(max(0, side.start - n), min(size, side.stop + n)) for side, n, size in sides)
    inner = tuple(slice(i.start - o.start, i.stop - o.start) for i, o in zip(nodule.box, box, strict=True))
    mask = np.zeros([side.stop - side.start for side in box], bool)
    mask[inner] = nodule.mask
    return box, mask


def touches(mask: np.ndarray, other: np.ndarray, spacing_mm: np.ndarray) -> bool:
    """Whether any two voxels of two masks are within `CONTACT_MM`, centre to centre.

    A longer step between neighbouring voxels counts as `CONTACT_MM`, so that direct neighbours touch at any spacing.
    """
    if not other.any():
        return False
    distance_mm = ndimage.distance_transform_edt(~other, np.minimum(spacing_mm, CONTACT_MM))
    return bool(distance_mm[mask].min() <= CONTACT_MM)


def _measure_nodule(found: Segmented, lungs: np.ndarray, nodule: Nodule, number: int, cells: Volume) -> dict:
    """The columns of `cases.NODULE_COLUMNS` that describe the nodule itself.

    The pleura is the lungs' whole outer surface: it includes hilum and mediastinum, and has no fissures.
    """
    volume_mm3 = nodule.voxels * found.ct.voxel_mm3
    layout_mm3 = np.count_nonzero(cells.array == number) * cells.voxel_mm3
    centre = dict(zip("xyz", centroid_mm(nodule.volume_in(found.ct)), strict=True))
    ratings = {_snake_case(name): value for name, value in nodule.characteristics.items()}

    spacing_mm = found.ct.spacing_mm
    around, mask = surroundings(nodule, found.ct, VESSEL_REACH_MM + CONTACT_MM)
    nearby = lungs[around]
    vessels = _reaching(found.vessels[around], mask, spacing_mm)
    share_near = ndimage.binary_dilation(nearby, np.ones((3, 3, 3), bool))[mask].mean()
    return {
        "readers": nodule.readers,
        "flagged": nodule.flagged,
        "volume_mm3": round(volume_mm3, 1),
        "equivalent_diameter_mm": round((6 * volume_mm3 / np.pi) ** (1 / 3), 2),
        **{name: round(value, 2) for name, value in asdict(extent_of(nodule.mask, found.ct.spacing_mm)).items()},
        **{f"centroid_{axis}_mm": round(float(position), 2) for axis, position in centre.items()},
        **{name: ratings.get(name) for name in CHARACTERISTICS},
        "touches_pleura": touches(mask, ~(nearby | mask), spacing_mm),
        "touches_vessel": touches(mask, vessels, spacing_mm),
        "share_in_or_touching_lungs": round(float(share_near), 3),
        "layout_volume_mm3": round(layout_mm3, 1),
        "volume_error": round(layout_mm3 / volume_mm3 - 1, 3),
        "notes": "; ".join(f"{what}: {count}" for what, count in nodule.untidy.items()),
    }


def _reaching(vessels: np.ndarray, mask: np.ndarray, spacing_mm: np.ndarray) -> np.ndarray:
    """The connected components of vessels that extend away from a nodule."""
    pieces = cc3d.connected_components(vessels, connectivity=26)
    far = ndimage.distance_transform_edt(~mask, spacing_mm) >= VESSEL_REACH_MM
    kept = np.zeros(pieces.max() + 1, bool)
    kept[np.unique(pieces[far])] = True
    kept[0] = False
    return kept[pieces]


def _snake_case(name: str) -> str:
    """`internalStructure`, as the XML has it -> `internal_structure`."""
    return re.sub("([A-Z])", r"_\1", name).lower()
