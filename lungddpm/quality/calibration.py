"""The calibration check: do a generator's samples have the HU of their references, region by region?

A segmenter learns brightness before shape: lungs that are darker than real ones can explain a loss, or a gain, that has
nothing to do with nodules. Layout and anatomy are the reference's own. Its brightness need not be: a generator learns
that of its training cases, which are other patients. With few of these, the difference may be theirs.
"""

from __future__ import annotations

import math
from itertools import count

import numpy as np
import pandas as pd

from lungddpm.config.models import Calibration
from lungddpm.core.labels import Label
from lungddpm.core.text import signed

LUNGS_ALONE, VESSELS, NODULES = "lungs without nodules", "vessels", "nodules"
"""Regions. The first includes vessels: denoisers that do not know where these are draw as many, but elsewhere."""
DIFFERENCE, SPREAD = "hu_difference", "hu_spread_ratio"
"""Mean HU of a sample minus that of its reference; standard deviation of its HU over that of the reference's."""
TRAINING = "training_hu_difference"
"""Mean HU of the training cases minus that of the references."""
CHECKS = (
    (LUNGS_ALONE, DIFFERENCE), (LUNGS_ALONE, SPREAD), (VESSELS, DIFFERENCE), (NODULES, DIFFERENCE), (NODULES, SPREAD),
)  # fmt: skip
"""Region and measure of every line of the check."""
PASSED, FAILED, NO_LIMIT, NOT_MEASURED = "within limits", "outside limits", "no limit", "not measured"
COLUMNS = [
    "generator", "region", "measure", "n_samples", "mean", "sd", "limit_low", "limit_high", "status",
    "training_difference",
]  # fmt: skip


def compare_hu(
    image: np.ndarray, reference: np.ndarray, layout: np.ndarray, reference_layout: np.ndarray
) -> list[dict]:
    """Compare the HU of a sample with those of its reference.

    Where nodules were placed or moved, the reference shows something else: those voxels are left out of the lungs, and
    nodules are compared only if the sample has the reference's own layout.

    Args:
        image: (x, y, z), HU.
        reference: same shape, HU.
        layout: labels that the sample was made from, same shape.
        reference_layout: labels of the reference, same shape.

    Returns:
        One dict {region, metric, value, note} for each of `CHECKS`; NaN if there is nothing to compare.
    """
    same = layout == reference_layout
    masks = {region: mask & same for region, mask in _masks(layout).items()}
    masks[NODULES] &= same.all()
    measures = {DIFFERENCE: _difference, SPREAD: _spread_ratio}
    rows = []
    for region, metric in CHECKS:
        made, real = (hu[masks[region]].astype(np.float64) for hu in (image, reference))
        rows.append({"region": region, "metric": metric, "value": measures[metric](made, real), "note": ""})
    return rows


def mean_hu(hu: np.ndarray, layout: np.ndarray) -> dict[str, float]:
    """Mean HU of each region; NaN where it is empty.

    Args:
        hu: (x, y, z).
        layout: labels, same shape.
    """
    return {
        region: float(hu[mask].mean(dtype=np.float64)) if mask.any() else math.nan
        for region, mask in _masks(layout).items()
    }


def _masks(layout: np.ndarray) -> dict[str, np.ndarray]:
    return {
        LUNGS_ALONE: (layout == Label.LUNG) | (layout == Label.VESSEL),
        VESSELS: layout == Label.VESSEL,
        NODULES: layout == Label.NODULE,
    }


def _difference(made: np.ndarray, real: np.ndarray) -> float:
    return float(made.mean() - real.mean()) if made.size else math.nan


def _spread_ratio(made: np.ndarray, real: np.ndarray) -> float:
    return float(made.std() / real.std()) if real.size and real.std() else math.nan


def calibration_table(quality: pd.DataFrame | None, generators: list[str], limits: Calibration) -> pd.DataFrame:
    """The check of every generator, one row each of `CHECKS`.

    Args:
        quality: rows of `image_quality.csv`; None if image quality was not measured.
        generators: all generators of the run.
        limits: of the config.

    Returns:
        `COLUMNS`: mean and sd over samples, the limits of the mean (NaN: none), the status, and the mean difference of
            the training cases to the references, which changes nothing in the status. Measures without a value are
            marked as such and never pass.
    """
    measured, of_training = {}, {}
    if quality is not None:
        training = quality[quality["metric"] == TRAINING]
        of_training = training.set_index(["generator", "region"])["mean"].to_dict()
        found = quality[quality["metric"].isin([DIFFERENCE, SPREAD])]
        measured = found.set_index(["generator", "region", "metric"])[["n", "mean", "sd"]].to_dict("index")
    rows = []
    for generator in generators:
        for region, measure in CHECKS:
            found = measured.get((generator, region, measure), {"n": 0, "mean": math.nan, "sd": math.nan})
            low, high = _limits(limits, region, measure)
            values = (int(found["n"]), found["mean"], found["sd"], low, high, _status(found["mean"], low, high))
            own = of_training.get((generator, region), math.nan) if measure == DIFFERENCE else math.nan
            rows.append((generator, region, measure, *values, own))
    return pd.DataFrame(rows, columns=COLUMNS)


def _limits(limits: Calibration, region: str, measure: str) -> tuple[float, float]:
    if measure == SPREAD:
        return limits.nodules_spread_ratio if region == NODULES else limits.spread_ratio
    largest = {LUNGS_ALONE: limits.lungs_hu, VESSELS: limits.vessels_hu, NODULES: limits.nodules_hu}[region]
    return (math.nan, math.nan) if largest is None else (-largest, largest)


def _status(mean: float, low: float, high: float) -> str:
    if math.isnan(mean):
        return NOT_MEASURED
    if math.isnan(low):
        return NO_LIMIT
    return PASSED if low <= mean <= high else FAILED


def calibration_notes(table: pd.DataFrame) -> list[str]:
    """A sentence for each generator that fails the check, with what fails and the limit."""
    return [
        f"HU calibration of {generator} failed: {'; '.join(map(_failure, rows.to_dict('records')))}. "
        "Brightness or texture alone may explain what this generator's arms gain or lose."
        for generator, rows in table[table["status"] == FAILED].groupby("generator", sort=False)
    ]


def _failure(row: dict) -> str:
    region, low, high = row["region"].split()[0], row["limit_low"], row["limit_high"]
    if row["measure"] == SPREAD:
        ratio = f"{row['mean']:.{_digits(row, 2)}f}"
        limits = f"(limits {low:g} to {high:g})"
        return f"the spread of HU in the {region} is {ratio} times that of the references {limits}"
    how = "too bright" if row["mean"] > 0 else "too dark"
    own = row["training_difference"]
    limit = f"limit ±{high:g}" + ("" if math.isnan(own) else f"; the training cases: {signed(own, 0)}")
    return f"{region} {how}, {signed(row['mean'], _digits(row, 0))} HU against the references ({limit})"


def _digits(row: dict, least: int) -> int:
    """Digits that show a mean outside its limits: -10.4 is not within -10 to 10."""
    return next(n for n in count(least) if not row["limit_low"] <= round(row["mean"], n) <= row["limit_high"])
