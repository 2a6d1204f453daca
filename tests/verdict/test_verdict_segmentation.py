"""Voxel and lesion measures against sklearn, scipy and analytic spheres; the contract of `run_evaluate` on disk."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import ndimage
from sklearn import metrics

from lungddpm.config import Config
from lungddpm.errors import InputError
from lungddpm.verdict.segmentation import SIZE_BINS, Lesion, lesion_measures, run_evaluate, voxel_measures
from lungddpm.volume import Volume, write_volume


@pytest.fixture
def masks():
    rng = np.random.default_rng(0)
    return rng.random((9, 8, 7)) < 0.2, rng.random((9, 8, 7)) < 0.3


def test_ratios_agree_with_sklearn(masks):
    reference, prediction = masks
    ours = voxel_measures(reference, prediction, voxel_mm3=2.0)
    flat = reference.ravel(), prediction.ravel()
    assert ours["dice"] == pytest.approx(metrics.f1_score(*flat))
    assert ours["sensitivity"] == pytest.approx(metrics.recall_score(*flat))
    assert ours["specificity"] == pytest.approx(metrics.recall_score(*flat, pos_label=False))
    assert ours["precision"] == pytest.approx(metrics.precision_score(*flat))
    assert ours["iou"] == pytest.approx(metrics.jaccard_score(*flat))


def test_volumes_are_in_mm3(masks):
    reference, prediction = masks
    ours = voxel_measures(reference, prediction, voxel_mm3=2.5)
    assert ours["reference_mm3"] == 2.5 * reference.sum()
    assert ours["volume_error_mm3"] == 2.5 * (int(prediction.sum()) - int(reference.sum()))
    assert ours["false_positive_mm3"] == 2.5 * (prediction & ~reference).sum()


def test_empty_reference_gives_no_ratio_but_a_false_positive_volume():
    prediction = np.zeros((4, 4, 4), bool)
    prediction[0, 0, :3] = True
    ours = voxel_measures(np.zeros_like(prediction), prediction, voxel_mm3=2.0)
    assert all(math.isnan(ours[name]) for name in ("dice", "sensitivity", "precision", "iou"))
    assert ours["specificity"] == 61 / 64
    assert ours["false_positive_mm3"] == 6.0


def test_empty_prediction_scores_zero_and_has_no_precision():
    reference = np.zeros((4, 4, 4), bool)
    reference[1, 1, 1] = True
    ours = voxel_measures(reference, np.zeros_like(reference), voxel_mm3=1.0)
    assert (ours["dice"], ours["sensitivity"], ours["iou"]) == (0, 0, 0)
    assert math.isnan(ours["precision"])


def test_lesions_agree_with_scipy(masks):
    reference, prediction = masks
    lesions, n_false_positives = lesion_measures(reference, prediction, voxel_mm3=1.0)
    around = np.ones((3, 3, 3))
    labels, n_lesions = ndimage.label(reference, around)
    overlaps = ndimage.mean(prediction, labels, range(1, n_lesions + 1))
    assert sorted(lesion.overlap for lesion in lesions) == pytest.approx(sorted(overlaps))
    candidates, n_candidates = ndimage.label(prediction, around)
    touching = ndimage.maximum(reference, candidates, range(1, n_candidates + 1))
    assert n_false_positives == sum(not touch for touch in touching)


def test_spheres_are_measured_matched_and_binned():
    x, y, z = np.indices((60, 40, 40))
    large = (x - 15) ** 2 + (y - 20) ** 2 + (z - 20) ** 2 < 12**2
    small = (x - 45) ** 2 + (y - 20) ** 2 + (z - 20) ** 2 < 5**2
    prediction = np.zeros_like(large)
    prediction[15, 20, 20] = prediction[55, 5, 5] = True
    lesions, n_false_positives = lesion_measures(large | small, prediction, voxel_mm3=0.5**3)
    assert [lesion.diameter_mm for lesion in lesions] == pytest.approx([12, 5], rel=0.03)
    assert [lesion.found for lesion in lesions] == [True, False]
    assert [lesion.size_bin for lesion in lesions] == [SIZE_BINS[2], SIZE_BINS[0]]
    assert n_false_positives == 1


def test_voxels_that_touch_at_a_corner_are_one_lesion():
    reference = np.zeros((3, 3, 3), bool)
    reference[0, 0, 0] = reference[1, 1, 1] = True
    lesions, _ = lesion_measures(reference, reference, voxel_mm3=1.0)
    assert len(lesions) == 1


@pytest.mark.parametrize(("diameter_mm", "expected"), [(5.9, 0), (6.0, 1), (10.0, 1), (10.1, 2)])
def test_bin_limits(diameter_mm, expected):
    assert Lesion(diameter_mm, overlap=0.0).size_bin == SIZE_BINS[expected]


def test_run_evaluate_writes_a_row_a_case_and_a_row_a_lesion(make_results):
    config, results = make_results(n_test=3, extras=False)
    folder = results / "segmentation" / "real" / config.segmentation.replicates()[0]
    scored, lesions = pd.read_csv(folder / "metrics.csv"), pd.read_csv(folder / "lesions.csv")
    assert scored["case_id"].tolist() == ["case-02", "case-03", "case-04"]
    assert scored["patient_id"].tolist() == ["patient-02", "patient-03", "patient-04"]
    assert scored["reference_mm3"].tolist() == pytest.approx([27 * 80] * 3)
    assert scored["false_positive_mm3"].tolist() == pytest.approx([80] * 3)
    assert (scored["n_false_positives"] == 1).all()
    assert len(lesions) == 3
    assert lesions["overlap"].tolist() == pytest.approx(scored["sensitivity"].tolist())
    assert lesions["found"].all()


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
    ],
)
def test_run_evaluate_refuses_predictions_that_do_not_fit(make_results, spoil, message):
    config, results = make_results(n_test=2, extras=False)
    folder = results / "segmentation" / "real" / config.segmentation.replicates()[0] / "predictions"
    spoil(folder, Volume(np.zeros((20, 18, 16), np.uint8), np.diag([4.0, 4.0, 5.0, 1.0])))
    with pytest.raises(InputError, match=message):
        run_evaluate(Config(), results / "cases" / "cases.tsv", folder, folder.parent)
