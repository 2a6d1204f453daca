"""How well a predicted nodule mask agrees with the readers' mask: voxels, surfaces and lesions, a case at a time."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import ndimage, spatial

from lungddpm.config.models import Config
from lungddpm.core import cases
from lungddpm.core.errors import InputError
from lungddpm.core.files import read_json, sha256_of, write_json, write_table
from lungddpm.core.labels import Label
from lungddpm.core.progress import LOG, Progress
from lungddpm.core.roles import TEST
from lungddpm.core.volume import Volume, read_labels, read_volume
from lungddpm.evaluation.lesions import Detection, lesion_measures

RATIOS = ("dice", "sensitivity", "specificity", "precision", "iou")
CASE_COLUMNS = [
    "case_id", "patient_id", "n_lesions", *RATIOS, "surface_dice", "surface_tolerance_mm", "hausdorff_95_mm",
    "volume_error_mm3", "false_positive_mm3", "reference_mm3", "n_false_positives", "n_candidates",
]  # fmt: skip
LESION_COLUMNS = ["case_id", "patient_id", "lesion", "diameter_mm", "size_bin", "found", "overlap", "score"]
CANDIDATE_COLUMNS = ["case_id", "patient_id", "candidate", "score", "volume_mm3", "lesions"]
"""`lesions`: numbers as in `lesions.csv`, several joined by "+"; empty for a false positive."""
PROBABILITY = "probability"
EVALUATION = "evaluation.json"


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


def surface_measures(reference: Volume, prediction: Volume) -> dict[str, float]:
    """Agreement of two masks' surfaces: their voxels with a face neighbour outside the mask, all lesions together.

    The 95 % Hausdorff distance is the larger of the two directed 95th percentiles of distances to the nearest voxel of
    the other surface. The surface Dice (Nikolov et al. 2021, J Med Internet Res 23:e26151; voxels, not areas) is the
    share of both surfaces' voxels that lie within the tolerance of the other: one voxel, by the grid's largest spacing,
    so that neighbours along every axis are within it.

    Args:
        reference: bool.
        prediction: bool, same grid.

    Returns:
        `hausdorff_95_mm`, NaN where a mask is empty; `surface_dice`, 0 for an empty prediction, NaN for an empty
        reference; `surface_tolerance_mm`.
    """
    tolerance = float(reference.spacing_mm.max())
    measures = {"hausdorff_95_mm": math.nan, "surface_dice": math.nan, "surface_tolerance_mm": tolerance}
    if not reference.array.any():
        return measures
    if not prediction.array.any():
        return measures | {"surface_dice": 0.0}
    of_reference, of_prediction = _surface_mm(reference), _surface_mm(prediction)
    distances = (
        spatial.KDTree(of_prediction).query(of_reference)[0],
        spatial.KDTree(of_reference).query(of_prediction)[0],
    )
    # Places in mm are products: neighbours may come out farther apart than the spacing by the last digit.
    within = np.concatenate(distances) <= tolerance * (1 + 1e-6)
    return measures | {
        "hausdorff_95_mm": float(max(np.quantile(directed, 0.95) for directed in distances)),
        "surface_dice": float(within.mean()),
    }


def evaluate_case(
    reference: Volume, prediction: Volume, probability: np.ndarray | None = None
) -> tuple[dict[str, float], Detection]:
    """All measures of one case.

    Args:
        reference: bool mask.
        prediction: bool mask, same grid.
        probability: of nodule, 0 to 1, same shape; without it nothing has a score.

    Returns:
        (`CASE_COLUMNS` without identifiers, lesions and candidates).
    """
    detection = lesion_measures(reference.array, prediction.array, reference.voxel_mm3, probability)
    measures = voxel_measures(reference.array, prediction.array, reference.voxel_mm3)
    measures |= surface_measures(reference, prediction)
    return measures | {
        "n_lesions": len(detection.lesions),
        "n_false_positives": detection.n_false_positives,
        "n_candidates": None if detection.candidates is None else len(detection.candidates),
    }, detection


def run_evaluate(config: Config, cases_table: Path, predictions: Path, output: Path) -> None:
    """Judge one replicate's predictions for every usable test case.

    Writes to `output`: `metrics.csv` (`CASE_COLUMNS`, a row a case), `lesions.csv` (`LESION_COLUMNS`), `candidates.csv`
    (`CANDIDATE_COLUMNS`; no row without probabilities), and last `evaluation.json` (hashes of what was read and
    written).

    Args:
        config: the run's config.
        cases_table: `cases.tsv`.
        predictions: folder with `<case_id>.nii.gz`, 0 background and 1 nodule, on the case's grid; and, unless nothing
            shall have a score, `probability/<case_id>.nii.gz`, unsigned integers whose largest value stands for 1.
        output: folder of the replicate.

    Raises:
        InputError: predictions are missing, are for unknown cases, lie on another grid, or hold other values.
    """
    test_cases = cases.usable(cases.read_cases(cases_table), TEST)
    folders = {"prediction": predictions}
    if any((predictions / PROBABILITY).glob("*.nii.gz")):
        folders["probability"] = predictions / PROBABILITY
    for folder in folders.values():
        _check_complete(set(test_cases["case_id"]), folder)
    if "probability" not in folders:
        LOG.warning("%s holds no probabilities: no lesion has a score, FROC and CPM are left out", predictions)
    case_rows, lesion_rows, candidate_rows, inputs = [], [], [], {}
    with Progress(f"evaluate {predictions}", total=len(test_cases)) as progress:
        for _, case in test_cases.iterrows():
            layout = read_volume(cases.folder_of(cases_table, case).layout)
            paths = {what: folder / f"{case['case_id']}.nii.gz" for what, folder in folders.items()}
            measures, detection = evaluate_case(
                layout.like(layout.array == Label.NODULE),
                _read_mask(paths["prediction"], layout),
                _read_probability(paths["probability"], layout) if "probability" in paths else None,
            )
            who = {"case_id": case["case_id"], "patient_id": case["patient_id"]}
            case_rows.append(who | measures)
            lesion_rows += [
                who | asdict(lesion) | {"lesion": number, "size_bin": lesion.size_bin, "found": lesion.found}
                for number, lesion in enumerate(detection.lesions, start=1)
            ]
            candidate_rows += [
                who | asdict(candidate) | {"candidate": number, "lesions": "+".join(map(str, candidate.lesions))}
                for number, candidate in enumerate(detection.candidates or (), start=1)
            ]
            inputs[case["case_id"]] = {"case": case["sha256"]} | {what: sha256_of(path) for what, path in paths.items()}
            progress.advance()
    tables = {
        "metrics.csv": pd.DataFrame(case_rows, columns=CASE_COLUMNS),
        "lesions.csv": pd.DataFrame(lesion_rows, columns=LESION_COLUMNS),
        "candidates.csv": pd.DataFrame(candidate_rows, columns=CANDIDATE_COLUMNS),
    }
    for name, table in tables.items():
        write_table(output / name, table)
    hashes = {name: sha256_of(output / name) for name in tables}
    write_json(output / EVALUATION, {"sha256": hashes, "inputs_sha256": inputs})


def check_unchanged(path: Path) -> None:
    """Make sure that a table is as `run_evaluate` wrote it, by the hash in `evaluation.json` beside it.

    Raises:
        InputError: it was changed since, or there is no such hash.
    """
    remedy = "Run 'lungddpm evaluate' for this replicate again (lungddpm run does, once the file is deleted)."
    record = path.with_name(EVALUATION)
    content = read_json(record, remedy)
    try:
        written = content["sha256"][path.name]
    except (KeyError, TypeError):
        raise InputError(record, f"holds no hash of {path.name}", remedy) from None
    if sha256_of(path) != written:
        raise InputError(path, "was changed after it was evaluated: its hash is not the one recorded", remedy)


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


def _read_mask(path: Path, layout: Volume) -> Volume:
    mask = _on_grid(path, read_labels(path), layout)
    if unknown := sorted(set(np.unique(mask.array).tolist()) - {0, 1}):
        raise InputError(path, f"holds the label {unknown[0]:g}", "Use 0 for background and 1 for nodule.")
    return mask.like(mask.array == 1)


def _read_probability(path: Path, layout: Volume) -> np.ndarray:
    array = _on_grid(path, read_volume(path), layout).array
    if array.dtype.kind != "u":
        problem = f"holds values of type {array.dtype}, not unsigned integers"
        raise InputError(path, problem, "Store 65535 times the probability of nodule as uint16.")
    return array / np.iinfo(array.dtype).max


def _on_grid(path: Path, volume: Volume, layout: Volume) -> Volume:
    if not volume.same_grid(layout):
        raise InputError(
            path, f"is not on the grid of its case ({volume.shape} against {layout.shape})", "Predict it again."
        )
    return volume


def _surface_mm(mask: Volume) -> np.ndarray:
    """Places of the mask's voxels that have a face neighbour outside it, (n, 3) in mm along the grid's axes."""
    (box,) = ndimage.find_objects(mask.array.astype(np.uint8))
    inside = mask.array[box]
    edge = inside & ~ndimage.binary_erosion(inside)
    return (np.argwhere(edge) + [side.start for side in box]) * mask.spacing_mm
