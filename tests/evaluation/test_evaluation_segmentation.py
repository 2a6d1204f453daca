"""The contract of `run_evaluate` on disk."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from lungddpm.config.models import Config
from lungddpm.core.cases import CaseFolder
from lungddpm.core.errors import InputError
from lungddpm.core.files import sha256_of, write_json
from lungddpm.core.volume import Volume, read_volume, write_volume
from lungddpm.evaluation.segmentation import (
    CANDIDATE_COLUMNS,
    LESION_COLUMNS,
    case_columns,
    check_unchanged,
    run_evaluate,
)


def replicate_of(results, config):
    return results / "segmentation" / "real" / config.segmentation.replicates()[0]


def test_run_evaluate_writes_a_row_per_case_and_per_lesion(make_results):
    config, results = make_results(n_test=3, extras=False)
    folder = replicate_of(results, config)
    scored, lesions, candidates = (pd.read_csv(folder / f"{name}.csv") for name in ("metrics", "lesions", "candidates"))
    assert [scored.columns.tolist(), lesions.columns.tolist()] == [case_columns(), LESION_COLUMNS]
    assert scored["case_id"].tolist() == ["case-02", "case-03", "case-04"]
    assert scored["patient_id"].tolist() == ["patient-02", "patient-03", "patient-04"]
    assert scored["reference_mm3"].tolist() == pytest.approx([27 * 80] * 3)
    assert scored["false_positive_mm3"].tolist() == pytest.approx([80] * 3)
    assert (scored["n_false_positives"] == 1).all()
    assert len(lesions) == 3
    assert lesions["overlap"].tolist() == pytest.approx(scored["sensitivity"].tolist())
    assert lesions["found"].all()
    assert candidates.columns.tolist() == CANDIDATE_COLUMNS
    assert scored["n_candidates"].tolist() == [2, 2, 2]
    # In each case the false positive, at the volume's corner, comes first.
    assert candidates["score"].tolist() == pytest.approx([0.4, 0.8] * 3)
    assert candidates["volume_mm3"].tolist() == pytest.approx([80, 27 * 80] * 3)
    assert candidates["lesions"].tolist() == pytest.approx([math.nan, 1] * 3, nan_ok=True)
    assert lesions["score"].tolist() == pytest.approx([0.8] * 3)


def test_run_evaluate_records_what_it_read_and_wrote(make_results):
    config, results = make_results(n_test=2, n_replicates=1, extras=False)
    folder = replicate_of(results, config)
    record = json.loads((folder / "evaluation.json").read_text())
    names = ["metrics.csv", "lesions.csv", "candidates.csv"]
    assert record["sha256"] == {name: sha256_of(folder / name) for name in names}
    assert record["inputs_sha256"]["case-02"] == {
        "case": CaseFolder(results / "cases" / "case-02").hash(),
        "prediction": sha256_of(folder / "predictions" / "case-02.nii.gz"),
        "probability": sha256_of(folder / "predictions" / "probability" / "case-02.nii.gz"),
    }
    check_unchanged(folder / "lesions.csv")


def test_a_table_edited_by_hand_is_reported_with_the_way_out(make_results):
    config, results = make_results(n_test=1, n_replicates=1, extras=False)
    path = replicate_of(results, config) / "metrics.csv"
    path.write_text(path.read_text().replace("case-02", "case-03"))
    with pytest.raises(InputError, match=r"metrics\.csv: was changed after it was evaluated.*lungddpm evaluate"):
        check_unchanged(path)
    record = path.with_name("evaluation.json")
    record.write_text(json.dumps({"sha256": {}}))
    with pytest.raises(InputError, match=r"evaluation\.json: has no hash of metrics\.csv"):
        check_unchanged(path)
    record.unlink()
    with pytest.raises(InputError, match=r"evaluation\.json: does not exist.*lungddpm evaluate"):
        check_unchanged(path)


def test_masks_without_probabilities_have_all_but_scores(make_results, caplog):
    config, results = make_results(n_test=2, n_replicates=1, extras=False, probabilities=False)
    folder = replicate_of(results, config)
    scored, lesions = pd.read_csv(folder / "metrics.csv"), pd.read_csv(folder / "lesions.csv")
    assert "has no probabilities: lesions have no scores, FROC and CPM are left out" in caplog.text
    assert scored["n_candidates"].isna().all()
    assert lesions["score"].isna().all()
    assert scored["dice"].notna().all()
    assert pd.read_csv(folder / "candidates.csv").empty


def test_lesions_have_the_axes_and_the_ratings_of_the_case(make_results):
    """The nodule of a made-up case is a cube of 12 x 12 x 15 mm."""
    config, results = make_results(n_test=2, n_replicates=1, extras=False)
    figures = {"volume_mm3": 2160.0, "centroid_x_mm": 36.0, "centroid_y_mm": 28.0, "centroid_z_mm": 30.0}
    record = {"qc": {"nodules": [figures | {"texture": 2.5, "malignancy": 4.0, "subtlety": None}]}}
    write_json(CaseFolder(results / "cases" / "case-02").record, record)
    folder = replicate_of(results, config)
    run_evaluate(Config(), results / "cases" / "cases.tsv", folder / "predictions", folder)
    lesions = pd.read_csv(folder / "lesions.csv")
    assert lesions["texture"].tolist() == pytest.approx([2.5, math.nan], nan_ok=True)
    assert lesions["malignancy"].tolist() == pytest.approx([4.0, math.nan], nan_ok=True)
    assert lesions["subtlety"].isna().all()
    # From the middle of one edge of the outline to that of the opposite one, a pixel aside.
    assert lesions["long_axis_mm"].tolist() == pytest.approx([math.hypot(12, 8)] * 2)
    assert lesions["elongation"].tolist() == pytest.approx([12 / 15] * 2)


def test_predictions_beside_whole_numbers_are_those_numbers(make_results):
    config, results = make_results(n_test=2, extras=False)
    folder = replicate_of(results, config) / "predictions"

    def metrics():
        run_evaluate(Config(), results / "cases" / "cases.tsv", folder, folder.parent)
        return (folder.parent / "metrics.csv").read_bytes()

    exact = metrics()
    for path in folder.glob("*.nii.gz"):
        mask = read_volume(path)
        write_volume(path, mask.like(mask.array * np.float32(0.9999999)))
    assert metrics() == exact


def test_a_layout_edited_after_it_was_prepared_is_refused(make_results):
    config, results = make_results(n_test=2, n_replicates=1, extras=False)
    folder, case = replicate_of(results, config), CaseFolder(results / "cases" / "case-02")
    layout = read_volume(case.layout)
    write_volume(case.layout, layout.like(layout.array[::-1].copy()))
    with pytest.raises(InputError, match=r"case-02: does not match its hash in .*cases\.tsv"):
        run_evaluate(Config(), results / "cases" / "cases.tsv", folder / "predictions", folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder, mask: (folder / "case-03.nii.gz").unlink(), "lacks predictions for case-03"),
        (lambda folder, mask: write_volume(folder / "stray.nii.gz", mask), "predictions for stray"),
        (
            lambda folder, mask: write_volume(folder / "case-02.nii.gz", Volume(mask.array, mask.affine * 1.1)),
            "not on the grid",
        ),
        (lambda folder, mask: write_volume(folder / "case-02.nii.gz", mask.like(mask.array + 2)), "label 2"),
        (
            lambda folder, mask: write_volume(folder / "case-02.nii.gz", mask.like(mask.array + np.float32(0.5))),
            "has the label 0.5",
        ),
        (
            lambda folder, mask: (folder / "probability" / "case-02.nii.gz").unlink(),
            "probability: lacks predictions for case-02",
        ),
        (
            lambda folder, mask: write_volume(folder / "probability" / "case-02.nii.gz", mask.crop((slice(0, 9),) * 3)),
            "probability/case-02.nii.gz: is not on the grid",
        ),
        (
            lambda folder, mask: write_volume(
                folder / "probability" / "case-02.nii.gz", mask.like(mask.array.astype(np.float32))
            ),
            "values of type float32",
        ),
    ],
)
def test_run_evaluate_refuses_predictions_that_do_not_fit(make_results, spoil, message):
    config, results = make_results(n_test=2, extras=False)
    folder = replicate_of(results, config) / "predictions"
    spoil(folder, Volume(np.zeros((20, 18, 16), np.uint8), np.diag([4.0, 4.0, 5.0, 1.0])))
    with pytest.raises(InputError, match=message):
        run_evaluate(Config(), results / "cases" / "cases.tsv", folder, folder.parent)
