"""Voxel and surface measures against sklearn, MONAI and SimpleITK; the contract of `run_evaluate` on disk."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import SimpleITK
from scipy import ndimage
from sklearn import metrics

from lungddpm.config.models import Config
from lungddpm.core.errors import InputError
from lungddpm.core.files import sha256_of
from lungddpm.core.volume import Volume, read_volume, write_volume
from lungddpm.evaluation.segmentation import (
    CANDIDATE_COLUMNS,
    CASE_COLUMNS,
    LESION_COLUMNS,
    check_unchanged,
    run_evaluate,
    surface_measures,
    voxel_measures,
)


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


SPACING_MM = (0.7, 1.1, 2.3)


def surfaces(reference, prediction, spacing_mm=SPACING_MM):
    affine = np.diag([*spacing_mm, 1.0])
    return surface_measures(Volume(reference, affine), Volume(prediction, affine))


@pytest.fixture(params=range(4))
def blobs(request):
    """Two overlapping sets of blobs, some of which touch the border."""
    rng = np.random.default_rng(request.param)
    shared, *own = (ndimage.gaussian_filter(rng.normal(size=(24, 22, 18)), 2) for _ in range(3))
    return [shared + 0.7 * noise > 0.12 for noise in own]


def test_surfaces_agree_with_monai(blobs):
    import torch
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    ours = surfaces(*blobs)
    reference, prediction = (torch.from_numpy(mask)[None, None] for mask in blobs)
    keywords = {"include_background": True, "spacing": SPACING_MM}
    assert ours["hausdorff_95_mm"] == pytest.approx(
        compute_hausdorff_distance(prediction, reference, percentile=95, **keywords).item(), rel=1e-5
    )
    assert ours["surface_dice"] == pytest.approx(
        compute_surface_dice(prediction, reference, class_thresholds=[2.3], **keywords).item(), rel=1e-5
    )
    assert 0.1 < ours["surface_dice"] < 1


def test_dice_and_surfaces_agree_with_simpleitk(blobs):
    images = [SimpleITK.GetImageFromArray(np.pad(mask, 1).T.astype(np.uint8)) for mask in blobs]
    for image in images:
        image.SetSpacing(SPACING_MM)
    overlap = SimpleITK.LabelOverlapMeasuresImageFilter()
    overlap.Execute(*images)
    voxels, ours = voxel_measures(*blobs, voxel_mm3=1.0), surfaces(*blobs)
    assert voxels["dice"] == pytest.approx(overlap.GetDiceCoefficient())
    assert voxels["iou"] == pytest.approx(overlap.GetJaccardCoefficient())
    edges = [SimpleITK.LabelContour(image) for image in images]
    far = [
        SimpleITK.GetArrayFromImage(
            SimpleITK.Abs(SimpleITK.SignedMaurerDistanceMap(to, squaredDistance=False, useImageSpacing=True))
        )[SimpleITK.GetArrayFromImage(of) > 0]
        for of, to in (edges, edges[::-1])
    ]
    assert ours["hausdorff_95_mm"] == pytest.approx(max(np.percentile(distances, 95) for distances in far), rel=1e-5)
    assert ours["surface_dice"] == pytest.approx(np.mean(np.concatenate(far) <= 2.3001))


def test_surfaces_of_two_shifted_plates_by_hand():
    # Every voxel of a plate one voxel thick is surface; all distances are the shift.
    plates = np.zeros((2, 20, 5, 4), bool)
    for shift, dice in ((1, 1), (3, 1), (4, 0)):
        plates[:] = False
        plates[0, 4], plates[1, 4 + shift] = True, True
        ours = surfaces(*plates)
        assert ours["hausdorff_95_mm"] == pytest.approx(0.7 * shift)
        assert (ours["surface_dice"], ours["surface_tolerance_mm"]) == (dice, 2.3)


def test_neighbours_along_the_coarsest_axis_are_within_the_tolerance():
    for place in range(30):
        masks = np.zeros((2, 2, 2, 40), bool)
        masks[0, 0, 0, place] = masks[1, 0, 0, place + 1] = True
        assert surfaces(*masks)["surface_dice"] == 1


def test_the_inside_of_a_mask_is_no_surface():
    reference = np.zeros((12, 12, 12), bool)
    reference[2:9, 2:9, 2:9] = True
    hollow = reference.copy()
    hollow[3:8, 3:8, 3:8] = False
    ours = surfaces(reference, hollow, spacing_mm=(1.0, 1.0, 1.0))
    assert (ours["hausdorff_95_mm"], ours["surface_dice"]) == (0, 1)


def test_empty_masks_have_no_distance():
    ball, empty = np.zeros((2, 5, 5, 5), bool)
    ball[2, 2, 2] = True
    missed, healthy = surfaces(ball, empty), surfaces(empty, ball)
    assert math.isnan(missed["hausdorff_95_mm"])
    assert missed["surface_dice"] == 0
    for ours in (healthy, surfaces(empty, empty)):
        assert math.isnan(ours["hausdorff_95_mm"])
        assert math.isnan(ours["surface_dice"])


def replicate_of(results, config):
    return results / "segmentation" / "real" / config.segmentation.replicates()[0]


def test_run_evaluate_writes_a_row_a_case_and_a_row_a_lesion(make_results):
    config, results = make_results(n_test=3, extras=False)
    folder = replicate_of(results, config)
    scored, lesions, candidates = (pd.read_csv(folder / f"{name}.csv") for name in ("metrics", "lesions", "candidates"))
    assert [scored.columns.tolist(), lesions.columns.tolist()] == [CASE_COLUMNS, LESION_COLUMNS]
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
        "case": "0" * 64,
        "prediction": sha256_of(folder / "predictions" / "case-02.nii.gz"),
        "probability": sha256_of(folder / "predictions" / "probability" / "case-02.nii.gz"),
    }
    check_unchanged(folder / "lesions.csv")


def test_a_table_edited_by_hand_is_told_with_the_way_out(make_results):
    config, results = make_results(n_test=1, n_replicates=1, extras=False)
    path = replicate_of(results, config) / "metrics.csv"
    path.write_text(path.read_text().replace("case-02", "case-03"))
    with pytest.raises(InputError, match=r"metrics\.csv: was changed after it was evaluated.*lungddpm evaluate"):
        check_unchanged(path)
    record = path.with_name("evaluation.json")
    record.write_text(json.dumps({"sha256": {}}))
    with pytest.raises(InputError, match=r"evaluation\.json: holds no hash of metrics\.csv"):
        check_unchanged(path)
    record.unlink()
    with pytest.raises(InputError, match=r"evaluation\.json: does not exist.*lungddpm evaluate"):
        check_unchanged(path)


def test_masks_without_probabilities_have_all_but_scores(make_results, caplog):
    config, results = make_results(n_test=2, n_replicates=1, extras=False, probabilities=False)
    folder = replicate_of(results, config)
    scored, lesions = pd.read_csv(folder / "metrics.csv"), pd.read_csv(folder / "lesions.csv")
    assert "holds no probabilities: no lesion has a score, FROC and CPM are left out" in caplog.text
    assert scored["n_candidates"].isna().all()
    assert lesions["score"].isna().all()
    assert scored["dice"].notna().all()
    assert pd.read_csv(folder / "candidates.csv").empty


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
            "holds the label 0.5",
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
