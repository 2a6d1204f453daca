"""The registry of measures: how well a predicted nodule mask agrees with the readers' mask, one number per case.

An entry defines its column in `metrics.csv` and `cases.csv`, its rows in `measures.csv`, its role in the verdict and
in the report, and its line in `docs/reference/measures.md`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from scipy import ndimage, spatial

from lungddpm.core.volume import Volume


@dataclass(frozen=True)
class MaskPair:
    """The readers' mask and the predicted one, with quantities that several measures share, computed once.

    A mask's surface is its voxels with a face neighbour outside it, all lesions together.
    """

    reference: Volume
    """bool; the readers' mask."""
    prediction: Volume
    """bool, same grid."""

    @cached_property
    def n_hit(self) -> int:
        """Voxels in both masks."""
        return int(np.count_nonzero(self.reference.array & self.prediction.array))

    @cached_property
    def n_reference(self) -> int:
        """Voxels of the reference."""
        return int(np.count_nonzero(self.reference.array))

    @cached_property
    def n_predicted(self) -> int:
        """Voxels of the prediction."""
        return int(np.count_nonzero(self.prediction.array))

    @property
    def n_false_positive(self) -> int:
        """Voxels of the prediction outside the reference."""
        return self.n_predicted - self.n_hit

    @property
    def n_outside(self) -> int:
        """Voxels outside the reference."""
        return self.reference.array.size - self.n_reference

    @property
    def voxel_mm3(self) -> float:
        """Volume of a voxel in mm3."""
        return self.reference.voxel_mm3

    @property
    def tolerance_mm(self) -> float:
        """Distance within which two surfaces agree: one voxel of the grid's largest spacing, so that neighbours along
        every axis are within it."""
        return float(self.reference.spacing_mm.max())

    @cached_property
    def surface_distances_mm(self) -> tuple[np.ndarray, np.ndarray]:
        """Distance of each surface voxel of the reference to the prediction's surface, and the other way round; neither
        mask may be empty."""
        of_reference, of_prediction = _surface_mm(self.reference), _surface_mm(self.prediction)
        return (
            spatial.KDTree(of_prediction).query(of_reference)[0],
            spatial.KDTree(of_reference).query(of_prediction)[0],
        )


@dataclass(frozen=True)
class Measure:
    """An entry of the registry.

    Raises:
        ValueError: it decides or supports the verdict, but is not a share for which larger is better.
    """

    column: str
    """In `metrics.csv`, with the unit."""
    title: str
    """Its name within a sentence."""
    meaning: str
    """Its definition, as a phrase."""
    compute: Callable[[MaskPair], float]
    """Called only if neither `without_nodule` nor `without_prediction` applies; NaN if undefined."""
    better: Literal["larger", "smaller", "near 0"]
    form: str
    """Format of a value, e.g. ".3f"; a "+" shows the sign."""
    unit: str = ""
    limits: tuple[float, float] = (0.0, 1.0)
    """Smallest and largest possible value."""
    without_nodule: float | None = math.nan
    """Value of a case whose reference is empty; None: computed as for any other case."""
    without_prediction: float | None = math.nan
    """Value where nothing was predicted in a case with a nodule; None: computed as for any other case."""
    role: Literal["decides", "supports", "describes"] = "describes"
    """Its role in the verdict."""

    def __post_init__(self) -> None:
        if self.role != "describes" and (self.better, self.limits) != ("larger", (0.0, 1.0)):
            raise ValueError(f"measure {self.column}: it {self.role}, so it must be in 0 to 1, larger being better")

    def of(self, masks: MaskPair) -> float:
        """Its value for one case; NaN if it has none."""
        fixed = None
        if not masks.n_reference:
            fixed = self.without_nodule
        elif not masks.n_predicted:
            fixed = self.without_prediction
        return self.compute(masks) if fixed is None else fixed

    @property
    def head(self) -> str:
        """Head of a table's column: title, unit, and in which direction values are better."""
        # No-break spaces keep the mark on the same line as the word before.
        unit = f", {self.unit}" if self.unit else ""
        return f"{self.title[0].upper()}{self.title[1:]}{unit}\N{NO-BREAK SPACE}{_ARROWS[self.better]}"


_ARROWS = {"larger": "↑", "smaller": "↓", "near 0": "→\N{NO-BREAK SPACE}0"}


def _ratio(numerator: int, denominator: int) -> float:
    return numerator / denominator if denominator else math.nan


def _surface_dice(masks: MaskPair) -> float:
    # Positions in mm are products: rounding may put neighbours slightly farther apart than the spacing.
    within = np.concatenate(masks.surface_distances_mm) <= masks.tolerance_mm * (1 + 1e-6)
    return float(within.mean())


def _hausdorff_95(masks: MaskPair) -> float:
    return float(max(np.quantile(directed, 0.95) for directed in masks.surface_distances_mm))


_ENTRIES = (
    Measure(
        "dice", "Dice", "twice the voxels in both masks, over the voxels of each",
        lambda masks: _ratio(2 * masks.n_hit, masks.n_reference + masks.n_predicted),
        "larger", ".3f", without_prediction=0.0, role="decides",
    ),
    Measure(
        "sensitivity", "sensitivity", "share of the nodules' voxels that were predicted",
        lambda masks: _ratio(masks.n_hit, masks.n_reference),
        "larger", ".3f", without_prediction=0.0, role="supports",
    ),
    Measure(
        "specificity", "specificity", "share of all other voxels of the volume that were left alone; near 1 for any "
        "prediction, as nodules are small",
        lambda masks: _ratio(masks.n_outside - masks.n_false_positive, masks.n_outside),
        "larger", ".4f", without_nodule=None, without_prediction=None,
    ),
    Measure(
        "precision", "precision", "share of the predicted voxels that are nodule",
        lambda masks: _ratio(masks.n_hit, masks.n_predicted),
        "larger", ".3f",
    ),
    Measure(
        "iou", "IoU", "voxels in both masks, over the voxels in either",
        lambda masks: _ratio(masks.n_hit, masks.n_reference + masks.n_false_positive),
        "larger", ".3f", without_prediction=0.0,
    ),
    Measure(
        "surface_dice", "surface Dice", "share of both surfaces within one voxel (`surface_tolerance_mm`, the grid's "
        "largest spacing) of the other; Nikolov et al. 2021, J Med Internet Res 23:e26151, with voxels for areas",
        _surface_dice, "larger", ".3f", without_prediction=0.0,
    ),
    Measure(
        "hausdorff_95_mm", "95 % Hausdorff distance",
        "the larger of the two directed 95th percentiles of the distances "
        "from one surface to the other",
        _hausdorff_95, "smaller", ".1f", "mm", (0.0, math.inf),
    ),
    Measure(
        "volume_error_mm3", "volume error", "predicted minus true volume: its mean is the bias",
        lambda masks: (masks.n_predicted - masks.n_reference) * masks.voxel_mm3,
        "near 0", "+.0f", "mm³", (-math.inf, math.inf), without_nodule=None, without_prediction=None,
    ),
    Measure(
        "false_positive_mm3", "false-positive volume", "predicted volume outside the nodules",
        lambda masks: masks.n_false_positive * masks.voxel_mm3,
        "smaller", ".0f", "mm³", (0.0, math.inf), without_nodule=None, without_prediction=None,
    ),
)  # fmt: skip
MEASURES = {measure.column: measure for measure in _ENTRIES}
"""Every measure of the segmenters, by its column."""


def measure_masks(masks: MaskPair) -> dict[str, float]:
    """Every measure of one case, by column; NaN if it has no value."""
    return {column: measure.of(masks) for column, measure in MEASURES.items()}


def deciding_measure() -> Measure:
    """The measure that decides the verdict."""
    return next(measure for measure in MEASURES.values() if measure.role == "decides")


def verdict_measures() -> list[Measure]:
    """The measures of the verdict: the deciding one, then those that support it."""
    return [deciding_measure(), *(measure for measure in MEASURES.values() if measure.role == "supports")]


def _surface_mm(mask: Volume) -> np.ndarray:
    """Positions of the mask's voxels with a face neighbour outside it, (n, 3) in mm along the grid's axes."""
    (box,) = ndimage.find_objects(mask.array.astype(np.uint8))
    inside = mask.array[box]
    edge = inside & ~ndimage.binary_erosion(inside)
    return (np.argwhere(edge) + [side.start for side in box]) * mask.spacing_mm
