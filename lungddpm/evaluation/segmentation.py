"""Evaluates a replicate's predictions: the measures of each case, its lesions, and the candidates with scores."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lungddpm.config.models import Config
from lungddpm.core import cases
from lungddpm.core.cases import RATINGS
from lungddpm.core.errors import InputError
from lungddpm.core.files import read_json, sha256_of, write_json, write_table
from lungddpm.core.labels import Label
from lungddpm.core.progress import LOG, Progress
from lungddpm.core.roles import TEST
from lungddpm.core.volume import Volume, read_labels, read_volume
from lungddpm.evaluation.lesions import Detection, lesion_measures, nodules_of_case, ratings_of
from lungddpm.evaluation.measures import MEASURES, MaskPair, measure_masks

LESION_COLUMNS = [
    "case_id", "patient_id", "lesion", "diameter_mm", "long_axis_mm", "short_axis_mm", "elongation", "size_bin",
    *RATINGS, "found", "overlap", "score",
]  # fmt: skip
"""Sizes are those on the model grid; ratings are medians over the readers, empty if nobody rated."""
CANDIDATE_COLUMNS = ["case_id", "patient_id", "candidate", "score", "volume_mm3", "lesions"]
"""`lesions`: numbers as in `lesions.csv`, several joined by "+"; empty for a false positive."""
PROBABILITY = "probability"
EVALUATION = "evaluation.json"
_EVALUATE_AGAIN = "Run 'lungddpm evaluate' for this replicate again (lungddpm run does, once the file is deleted)."


def case_columns() -> list[str]:
    """Columns of `metrics.csv`, one for every registered measure."""
    facts = ["surface_tolerance_mm", "reference_mm3", "n_false_positives", "n_candidates"]
    return ["case_id", "patient_id", "n_lesions", *MEASURES, *facts]


def evaluate_case(
    reference: Volume, prediction: Volume, probability: np.ndarray | None = None
) -> tuple[dict[str, float | None], Detection]:
    """All measures and facts of one case.

    Args:
        reference: bool mask.
        prediction: bool mask, same grid.
        probability: of nodule, 0 to 1, same shape; without it there are no scores.

    Returns:
        (`case_columns` without identifiers, lesions and candidates).
    """
    masks = MaskPair(reference, prediction)
    detection = lesion_measures(reference.array, prediction.array, reference.spacing_mm, probability)
    return measure_masks(masks) | {
        "n_lesions": len(detection.lesions),
        "surface_tolerance_mm": masks.tolerance_mm,
        "reference_mm3": masks.n_reference * masks.voxel_mm3,
        "n_false_positives": detection.n_false_positives,
        "n_candidates": None if detection.candidates is None else len(detection.candidates),
    }, detection


def run_evaluate(config: Config, cases_table: Path, predictions: Path, output: Path) -> None:
    """Evaluate one replicate's predictions for every usable test case.

    Writes to `output`: `metrics.csv` (`case_columns`, one row per case), `lesions.csv` (`LESION_COLUMNS`),
    `candidates.csv` (`CANDIDATE_COLUMNS`; no row without probabilities), and last `evaluation.json` (hashes of inputs
    and outputs, and the current `verdict.primary`).

    Args:
        config: the run's config.
        cases_table: `cases.tsv`.
        predictions: folder with `<case_id>.nii.gz`, 0 background and 1 nodule, on the case's grid; and, for
            scores, `probability/<case_id>.nii.gz`, unsigned integers whose largest value means 1.
        output: folder of the replicate.

    Raises:
        InputError: predictions are missing, are for unknown cases, are on another grid, or have other values; a case
            has changed since it was prepared.
    """
    test_cases = cases.usable(cases.read_cases(cases_table), TEST)
    folders = {"prediction": predictions}
    if any((predictions / PROBABILITY).glob("*.nii.gz")):
        folders["probability"] = predictions / PROBABILITY
    for folder in folders.values():
        _check_complete(set(test_cases["case_id"]), folder)
    if "probability" not in folders:
        LOG.warning("%s has no probabilities: lesions have no scores, FROC and CPM are left out", predictions)
    case_rows, lesion_rows, candidate_rows, inputs = [], [], [], {}
    with Progress(f"evaluate {predictions}", total=len(test_cases)) as progress:
        for _, case in test_cases.iterrows():
            case_folder = cases.unchanged_folder_of(cases_table, case)
            layout = read_volume(case_folder.layout)
            nodules = layout.like(layout.array == Label.NODULE)
            paths = {what: folder / f"{case['case_id']}.nii.gz" for what, folder in folders.items()}
            measures, detection = evaluate_case(
                nodules,
                read_mask(paths["prediction"], layout),
                _read_probability(paths["probability"], layout) if "probability" in paths else None,
            )
            who = {"case_id": case["case_id"], "patient_id": case["patient_id"]}
            case_rows.append(who | measures)
            rated = ratings_of(nodules, nodules_of_case(case_folder.nodule_figures()))
            lesion_rows += [
                who | asdict(lesion) | {"lesion": number, "size_bin": lesion.size_bin, "found": lesion.found} | ratings
                for number, (lesion, ratings) in enumerate(zip(detection.lesions, rated, strict=True), start=1)
            ]
            candidate_rows += [
                who | asdict(candidate) | {"candidate": number, "lesions": "+".join(map(str, candidate.lesions))}
                for number, candidate in enumerate(detection.candidates or (), start=1)
            ]
            inputs[case["case_id"]] = {"case": case["sha256"]} | {what: sha256_of(path) for what, path in paths.items()}
            progress.advance()
    tables = {
        "metrics.csv": pd.DataFrame(case_rows, columns=case_columns()),
        "lesions.csv": pd.DataFrame(lesion_rows, columns=LESION_COLUMNS),
        "candidates.csv": pd.DataFrame(candidate_rows, columns=CANDIDATE_COLUMNS),
    }
    for name, table in tables.items():
        write_table(output / name, table)
    hashes = {name: sha256_of(output / name) for name in tables}
    # Shows whether the primary arm was chosen before there were results.
    primary = {"primary": config.primary_arms()}
    write_json(output / EVALUATION, {"sha256": hashes, "inputs_sha256": inputs} | primary)


def read_evaluation(folder: Path) -> dict[str, Any]:
    """The `evaluation.json` of a replicate.

    Raises:
        InputError: it is missing, or is not JSON.
    """
    return read_json(folder / EVALUATION, _EVALUATE_AGAIN)


def check_unchanged(path: Path) -> None:
    """Check that a table is unchanged since `run_evaluate` wrote it, by the hash in `evaluation.json`.

    Raises:
        InputError: it was changed, or there is no such hash.
    """
    content = read_evaluation(path.parent)
    try:
        written = content["sha256"][path.name]
    except (KeyError, TypeError):
        raise InputError(path.with_name(EVALUATION), f"has no hash of {path.name}", _EVALUATE_AGAIN) from None
    if sha256_of(path) != written:
        raise InputError(path, "was changed after it was evaluated: its hash is not the one recorded", _EVALUATE_AGAIN)


def read_mask(path: Path, layout: Volume) -> Volume:
    """Read a prediction of nodules: bool, on the grid of its case.

    Raises:
        InputError: it is missing or unreadable, lies on another grid, or has labels other than 0 and 1.
    """
    mask = _on_grid(path, read_labels(path), layout)
    if unknown := sorted(set(np.unique(mask.array).tolist()) - {0, 1}):
        raise InputError(path, f"has the label {unknown[0]:g}", "Use 0 for background and 1 for nodule.")
    return mask.like(mask.array == 1)


def _check_complete(expected: set[str], predictions: Path) -> None:
    present = {path.name.removesuffix(".nii.gz") for path in predictions.glob("*.nii.gz")}
    if missing := sorted(expected - present):
        raise InputError(
            predictions, f"lacks predictions for {_some(missing)}", "Run 'lungddpm segment predict' again."
        )
    if extra := sorted(present - expected):
        raise InputError(
            predictions,
            f"has predictions for {_some(extra)}, which are not usable test cases",
            "Delete the folder, predict again.",
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _read_probability(path: Path, layout: Volume) -> np.ndarray:
    array = _on_grid(path, read_volume(path), layout).array
    if array.dtype.kind != "u":
        problem = f"has values of type {array.dtype}, not unsigned integers"
        raise InputError(path, problem, "Store 65535 times the nodule probability as uint16.")
    return array / np.iinfo(array.dtype).max


def _on_grid(path: Path, volume: Volume, layout: Volume) -> Volume:
    if not volume.same_grid(layout):
        raise InputError(
            path, f"is not on the grid of its case ({volume.shape} against {layout.shape})", "Predict it again."
        )
    return volume
