"""How well a predicted nodule mask agrees with the readers' mask: by voxel and by lesion, a case at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import cc3d
import numpy as np
import pandas as pd

from lungddpm import cases
from lungddpm.config import Config
from lungddpm.errors import InputError
from lungddpm.files import write_table
from lungddpm.layouts import Label
from lungddpm.progress import Progress
from lungddpm.volume import Volume, read_volume

RATIOS = ("dice", "sensitivity", "specificity", "precision", "iou")
CASE_COLUMNS = [
    "case_id", "patient_id", "n_lesions", *RATIOS,
    "volume_error_mm3", "false_positive_mm3", "reference_mm3", "n_false_positives",
]  # fmt: skip
LESION_COLUMNS = ["case_id", "patient_id", "lesion", "diameter_mm", "size_bin", "found", "overlap"]
SIZE_BINS = ("< 6 mm", "6-10 mm", "> 10 mm")
_TOUCHING = 26


@dataclass(frozen=True)
class Lesion:
    """One connected component of the reference mask."""

    diameter_mm: float
    """Diameter of the sphere of equal volume."""
    overlap: float
    """Share of the lesion's voxels that the prediction covers."""

    @property
    def found(self) -> bool:
        """Overlap matching: one predicted voxel within the lesion is enough."""
        return self.overlap > 0

    @property
    def size_bin(self) -> str:
        """One of `SIZE_BINS`; 6 and 10 mm themselves belong to the middle one."""
        return SIZE_BINS[int(self.diameter_mm >= 6) + int(self.diameter_mm > 10)]


def voxel_measures(reference: np.ndarray, prediction: np.ndarray, voxel_mm3: float) -> dict[str, float]:
    """Voxel-wise agreement of two masks.

    Ratios are NaN where they are not defined: all but specificity for an empty reference (the false-positive volume
    then speaks for the case), precision also for an empty prediction.

    Args:
        reference: bool, any shape.
        prediction: bool, same shape.
        voxel_mm3: volume of a voxel in mm3.

    Returns:
        The ratios in `RATIOS`, and volumes in mm3; `volume_error_mm3` is predicted minus reference.
    """
    hit = int(np.count_nonzero(reference & prediction))
    n_reference, n_prediction = int(np.count_nonzero(reference)), int(np.count_nonzero(prediction))
    false_positive = n_prediction - hit
    n_outside = reference.size - n_reference
    judged = n_reference > 0
    return {
        "dice": _ratio(2 * hit, n_reference + n_prediction, judged),
        "sensitivity": _ratio(hit, n_reference, judged),
        "specificity": _ratio(n_outside - false_positive, n_outside),
        "precision": _ratio(hit, n_prediction, judged),
        "iou": _ratio(hit, n_reference + false_positive, judged),
        "volume_error_mm3": (n_prediction - n_reference) * voxel_mm3,
        "false_positive_mm3": false_positive * voxel_mm3,
        "reference_mm3": n_reference * voxel_mm3,
    }


def lesion_measures(reference: np.ndarray, prediction: np.ndarray, voxel_mm3: float) -> tuple[list[Lesion], int]:
    """Lesion-wise agreement of two masks; lesions are 26-connected components.

    Args:
        reference: bool, (x, y, z).
        prediction: bool, same shape.
        voxel_mm3: volume of a voxel in mm3.

    Returns:
        (lesions of the reference, number of predicted components that touch none of them).
    """
    lesions, n_lesions = cc3d.connected_components(reference, connectivity=_TOUCHING, return_N=True)
    n_voxels = np.bincount(lesions.ravel(), minlength=n_lesions + 1)[1:]
    n_covered = np.bincount(lesions[prediction], minlength=n_lesions + 1)[1:]
    candidates, n_candidates = cc3d.connected_components(prediction, connectivity=_TOUCHING, return_N=True)
    n_matched = np.count_nonzero(np.unique(candidates[reference]))
    found = [
        Lesion(diameter_mm=(6 * voxels * voxel_mm3 / math.pi) ** (1 / 3), overlap=covered / voxels)
        for voxels, covered in zip(n_voxels.tolist(), n_covered.tolist(), strict=True)
    ]
    return found, n_candidates - n_matched


def evaluate_case(reference: Volume, prediction: Volume) -> tuple[dict[str, float], list[Lesion]]:
    """All measures of one case; both volumes are bool masks on one grid."""
    measures = voxel_measures(reference.array, prediction.array, reference.voxel_mm3)
    lesions, n_false_positives = lesion_measures(reference.array, prediction.array, reference.voxel_mm3)
    return measures | {"n_lesions": len(lesions), "n_false_positives": n_false_positives}, lesions


def run_evaluate(config: Config, cases_table: Path, predictions: Path, output: Path) -> None:
    """Judge one replicate's predictions for every usable test case.

    Writes `<output>/metrics.csv` (`CASE_COLUMNS`, a row a case) and `<output>/lesions.csv` (`LESION_COLUMNS`).

    Args:
        config: the run's config.
        cases_table: `cases.tsv`.
        predictions: folder with `<case_id>.nii.gz`, 0 background and 1 nodule, on the case's grid.
        output: folder of the replicate.

    Raises:
        InputError: predictions are missing, are for unknown cases, lie on another grid, or hold other labels.
    """
    test_cases = cases.usable(cases.read_cases(cases_table), "test")
    _check_complete(set(test_cases["case_id"]), predictions)
    case_rows, lesion_rows = [], []
    with Progress(f"evaluate {predictions}", total=len(test_cases)) as progress:
        for _, case in test_cases.iterrows():
            layout = read_volume(cases.folder_of(cases_table, case) / "layout.nii.gz")
            reference = layout.like(layout.array == Label.NODULE)
            prediction = _read_prediction(predictions / f"{case['case_id']}.nii.gz", layout)
            measures, lesions = evaluate_case(reference, prediction)
            who = {"case_id": case["case_id"], "patient_id": case["patient_id"]}
            case_rows.append(who | measures)
            lesion_rows += [
                who | {
                    "lesion": number, "diameter_mm": lesion.diameter_mm, "size_bin": lesion.size_bin,
                    "found": lesion.found, "overlap": lesion.overlap,
                }
                for number, lesion in enumerate(lesions, start=1)
            ]  # fmt: skip
            progress.advance()
    write_table(output / "metrics.csv", pd.DataFrame(case_rows, columns=CASE_COLUMNS))
    write_table(output / "lesions.csv", pd.DataFrame(lesion_rows, columns=LESION_COLUMNS))


def _ratio(numerator: int, denominator: int, defined: bool = True) -> float:
    return numerator / denominator if defined and denominator else math.nan


def _check_complete(expected: set[str], predictions: Path) -> None:
    present = {path.name.removesuffix(".nii.gz") for path in predictions.glob("*.nii.gz")}
    if missing := sorted(expected - present):
        raise InputError(
            predictions, f"lacks predictions for {_some(missing)}", "Run 'lungddpm segment predict' again."
        )
    if extra := sorted(present - expected):
        raise InputError(
            predictions,
            f"has predictions for {_some(extra)}, no usable test cases",
            "Delete the folder, predict again.",
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _read_prediction(path: Path, layout: Volume) -> Volume:
    prediction = read_volume(path)
    if not prediction.same_grid(layout):
        raise InputError(
            path, f"is not on the grid of its case ({prediction.shape} against {layout.shape})", "Predict it again."
        )
    if unknown := sorted(set(np.unique(prediction.array).tolist()) - {0, 1}):
        raise InputError(path, f"holds the label {unknown[0]:g}", "Use 0 for background and 1 for nodule.")
    return prediction.like(prediction.array == 1)
