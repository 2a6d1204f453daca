"""Every measure against sklearn, MONAI, SimpleITK or by hand; its policy where a mask is empty; one entry is enough."""

import inspect
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import SimpleITK
from scipy import ndimage
from sklearn import metrics

from lungddpm.core.volume import Volume
from lungddpm.evaluation import reference as generated
from lungddpm.evaluation.measures import MEASURES, MaskPair, Measure, measure_masks, verdict_measures
from lungddpm.evaluation.segmentation import evaluate_case
from lungddpm.report.page import run_report

SPACING_MM = (0.7, 1.1, 2.3)


def volume(mask, spacing_mm=SPACING_MM):
    return Volume(mask, np.diag([*spacing_mm, 1.0]))


def measured(reference, prediction, spacing_mm=SPACING_MM):
    return measure_masks(MaskPair(volume(reference, spacing_mm), volume(prediction, spacing_mm)))


@pytest.fixture
def masks():
    rng = np.random.default_rng(0)
    return rng.random((9, 8, 7)) < 0.2, rng.random((9, 8, 7)) < 0.3


def test_ratios_agree_with_sklearn(masks):
    reference, prediction = masks
    ours = measured(reference, prediction)
    flat = reference.ravel(), prediction.ravel()
    assert ours["dice"] == pytest.approx(metrics.f1_score(*flat))
    assert ours["sensitivity"] == pytest.approx(metrics.recall_score(*flat))
    assert ours["specificity"] == pytest.approx(metrics.recall_score(*flat, pos_label=False))
    assert ours["precision"] == pytest.approx(metrics.precision_score(*flat))
    assert ours["iou"] == pytest.approx(metrics.jaccard_score(*flat))


def test_volumes_are_in_mm3(masks):
    reference, prediction = masks
    facts, _ = evaluate_case(volume(reference, (1, 1, 2.5)), volume(prediction, (1, 1, 2.5)))
    assert facts["reference_mm3"] == 2.5 * reference.sum()
    assert facts["surface_tolerance_mm"] == 2.5
    assert facts["volume_error_mm3"] == 2.5 * (int(prediction.sum()) - int(reference.sum()))
    assert facts["false_positive_mm3"] == 2.5 * (prediction & ~reference).sum()


NAN = math.nan
ONE_VOXEL_MM3 = 2.0


@pytest.mark.parametrize(
    ("n_reference", "n_predicted", "expected"),
    [
        # What the documentation says of empty masks, in numbers: three voxels marked where there is no nodule, ...
        (0, 3, {"specificity": 61 / 64, "volume_error_mm3": 6.0, "false_positive_mm3": 6.0}),
        # ... nothing marked where there is none, ...
        (0, 0, {"specificity": 1.0, "volume_error_mm3": 0.0, "false_positive_mm3": 0.0}),
        # ... and nothing marked where there is a nodule of two voxels.
        (
            2, 0,
            {"dice": 0.0, "sensitivity": 0.0, "iou": 0.0, "surface_dice": 0.0, "specificity": 1.0,
             "volume_error_mm3": -4.0, "false_positive_mm3": 0.0},
        ),
    ],
)  # fmt: skip
def test_empty_masks(n_reference, n_predicted, expected):
    reference, prediction = np.zeros((2, 4, 4, 4), bool)
    reference[0, 0, :n_reference] = prediction[0, 0, :n_predicted] = True
    ours = measured(reference, prediction, (1.0, 1.0, ONE_VOXEL_MM3))
    assert ours == pytest.approx(dict.fromkeys(MEASURES, NAN) | expected, nan_ok=True)


@pytest.fixture(params=range(4))
def blobs(request):
    """Two overlapping sets of blobs, some of which touch the border."""
    rng = np.random.default_rng(request.param)
    shared, *own = (ndimage.gaussian_filter(rng.normal(size=(24, 22, 18)), 2) for _ in range(3))
    return [shared + 0.7 * noise > 0.12 for noise in own]


def test_surfaces_agree_with_monai(blobs):
    import torch
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    ours = measured(*blobs)
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
    ours = measured(*blobs)
    assert ours["dice"] == pytest.approx(overlap.GetDiceCoefficient())
    assert ours["iou"] == pytest.approx(overlap.GetJaccardCoefficient())
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
        ours = measured(*plates)
        assert ours["hausdorff_95_mm"] == pytest.approx(0.7 * shift)
        assert ours["surface_dice"] == dice


def test_neighbours_along_the_coarsest_axis_are_within_the_tolerance():
    for place in range(30):
        masks = np.zeros((2, 2, 2, 40), bool)
        masks[0, 0, 0, place] = masks[1, 0, 0, place + 1] = True
        assert measured(*masks)["surface_dice"] == 1


def test_the_inside_of_a_mask_is_not_a_surface():
    reference = np.zeros((12, 12, 12), bool)
    reference[2:9, 2:9, 2:9] = True
    hollow = reference.copy()
    hollow[3:8, 3:8, 3:8] = False
    ours = measured(reference, hollow, spacing_mm=(1.0, 1.0, 1.0))
    assert (ours["hausdorff_95_mm"], ours["surface_dice"]) == (0, 1)


def test_one_measure_decides_the_verdict():
    assert [measure.column for measure in MEASURES.values() if measure.role == "decides"] == ["dice"]
    assert [measure.column for measure in verdict_measures()] == ["dice", "sensitivity"]
    with pytest.raises(ValueError, match="must be in 0 to 1"):
        replace(MEASURES["hausdorff_95_mm"], role="supports")


def test_every_entry_is_complete():
    for column, measure in MEASURES.items():
        assert column == measure.column
        assert measure.title
        assert measure.meaning
        assert len(inspect.signature(measure.compute).parameters) == 1
        low, high = measure.limits
        assert low < high
        # The unit is in the column, as in all tables.
        assert column.endswith({"": column, "mm": "_mm", "mm³": "_mm3"}[measure.unit])


def test_values_stay_within_their_limits(blobs):
    shifted = np.roll(blobs[0], 1, axis=0)
    for pair in (blobs, blobs[::-1], [blobs[0]] * 2, [blobs[0], shifted], [blobs[0], ~blobs[0]]):
        for column, value in measured(*pair).items():
            low, high = MEASURES[column].limits
            assert low <= value <= high
    same = measured(blobs[0], blobs[0])
    best = {"larger": lambda measure: measure.limits[1], "smaller": lambda measure: measure.limits[0]}
    assert same == {name: best.get(entry.better, lambda _: 0.0)(entry) for name, entry in MEASURES.items()}


def test_the_documentation_has_the_table_of_the_registry(repository):
    page = repository / "docs" / "reference" / "measures.md"
    text = page.read_text(encoding="utf-8")
    assert generated.insert_table(text) == text, "run `make docs`"
    with pytest.raises(ValueError, match="lacks the marks"):
        generated.insert_table("a page without a place for it")


def test_a_measure_is_one_entry(make_results, monkeypatch):
    """From a new entry follow its column, its rows, its place on the page and its line in the documentation."""
    toy = Measure(
        "predicted_mm3", "predicted volume", "volume of all that was predicted",
        lambda masks: masks.n_predicted * masks.voxel_mm3, "near 0", ".1f", "mm³", (0.0, math.inf),
        without_nodule=None,
    )  # fmt: skip
    monkeypatch.setitem(MEASURES, toy.column, toy)
    config, results = make_results(n_test=3, n_replicates=1, extras=False)
    run_report(config, results)
    folder = results / "segmentation" / "real" / "fold0_seed0"
    scored = pd.read_csv(folder / "metrics.csv", dtype={"case_id": str}).set_index("case_id")
    for case_id, row in scored.iterrows():
        mask = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(folder / "predictions" / f"{case_id}.nii.gz"))
        assert row["predicted_mm3"] == pytest.approx(80.0 * mask.sum())
    summary = pd.read_csv(results / "tables" / "measures.csv").query("metric == 'predicted_mm3'").set_index("arm")
    assert summary.loc["real", "mean"] == pytest.approx(scored["predicted_mm3"].mean())
    page = (results / "report.html").read_text(encoding="utf-8")
    assert "Predicted volume, mm³ → 0" in page.replace("\N{NO-BREAK SPACE}", " ")
    assert f"{scored['predicted_mm3'].mean():.1f} ± {scored['predicted_mm3'].std():.1f}" in page
    assert (
        "| `predicted_mm3` | predicted volume (mm³) | volume of all that was predicted | 0 to ∞ | near 0 | as usual "
        "| empty | – |\n" in generated.markdown_table()
    )
