"""The calibration check against known shifts, and its result where nothing was measured."""

import math
import shutil

import numpy as np
import pandas as pd
import pytest

from lungddpm.config.loading import parse_config
from lungddpm.config.models import Calibration
from lungddpm.core.cases import CaseFolder
from lungddpm.core.errors import ConfigError
from lungddpm.core.labels import Label
from lungddpm.core.volume import Volume, read_volume, write_volume
from lungddpm.quality.calibration import (
    CHECKS,
    DIFFERENCE,
    FAILED,
    LUNGS_ALONE,
    NO_LIMIT,
    NODULES,
    NOT_MEASURED,
    PASSED,
    SPREAD,
    TRAINING,
    VESSELS,
    calibration_notes,
    calibration_table,
    compare_hu,
    mean_hu,
)
from lungddpm.quality.image_quality import OTHER_PATIENTS, run_quality
from lungddpm.verdict.tables import write_tables


@pytest.fixture
def reference():
    """CT (HU) and layout of a block of lung with a vessel and a nodule."""
    layout = np.zeros((12, 12, 12), np.uint8)
    layout[1:11, 1:11, 1:11] = Label.LUNG
    layout[2:10, 3, 3] = Label.VESSEL
    layout[5:8, 5:8, 5:8] = Label.NODULE
    means = np.array([40.0, -850, 30, -100])[layout]
    return means + np.random.default_rng(1).normal(0, 20, layout.shape), layout


def found_in(ct, reference, layout=None):
    real, own = reference
    rows = compare_hu(ct, real, own if layout is None else layout, own)
    return {(row["region"], row["metric"]): row["value"] for row in rows}


def test_a_shift_of_the_lungs_is_found_to_the_last_digit(reference):
    ct, layout = reference
    found = found_in(ct - 58.0 * (layout == Label.LUNG) - 58.0 * (layout == Label.VESSEL), reference)
    assert found[LUNGS_ALONE, DIFFERENCE] == pytest.approx(-58)
    assert found[VESSELS, DIFFERENCE] == pytest.approx(-58)
    assert found[LUNGS_ALONE, SPREAD] == pytest.approx(1)
    assert found[NODULES, DIFFERENCE] == 0
    assert found[NODULES, SPREAD] == 1


def test_a_nodule_is_judged_by_itself(reference):
    ct, layout = reference
    found = found_in(ct + 185.0 * (layout == Label.NODULE), reference)
    assert found == {
        (LUNGS_ALONE, DIFFERENCE): 0, (LUNGS_ALONE, SPREAD): 1, (VESSELS, DIFFERENCE): 0,
        (NODULES, DIFFERENCE): pytest.approx(185), (NODULES, SPREAD): pytest.approx(1),
    }  # fmt: skip


def test_spread_is_a_ratio_of_standard_deviations(reference):
    ct, layout = reference
    lungs = (layout == Label.LUNG) | (layout == Label.VESSEL)
    narrow = np.where(lungs, ct[lungs].mean() + 0.6 * (ct - ct[lungs].mean()), ct)
    found = found_in(narrow, reference)
    assert found[LUNGS_ALONE, SPREAD] == pytest.approx(0.6)
    assert found[LUNGS_ALONE, DIFFERENCE] == pytest.approx(0, abs=1e-9)
    assert math.isnan(found_in(ct, (np.zeros_like(ct), layout))[LUNGS_ALONE, SPREAD])


def test_speckle_in_a_nodule_shows_in_its_spread(reference):
    """Noise of three times the nodule's own standard deviation makes the total sqrt(1 + 9) times as large."""
    ct, layout = reference
    nodule = layout == Label.NODULE
    own = ct[nodule] - ct[nodule].mean()
    noise = np.random.default_rng(2).normal(size=own.shape)
    noise -= noise.mean() + own * (noise @ own) / (own @ own)  # uncorrelated with the nodule's own, exactly
    noise -= noise.mean()
    speckled = ct.copy()
    speckled[nodule] += 3 * own.std() / noise.std() * noise
    found = found_in(speckled, reference)
    assert found[NODULES, SPREAD] == pytest.approx(math.sqrt(10))
    assert found[NODULES, DIFFERENCE] == pytest.approx(0, abs=1e-9)
    assert found[LUNGS_ALONE, SPREAD] == 1


def test_moved_nodules_are_left_out(reference):
    ct, layout = reference
    moved = np.where(layout == Label.NODULE, Label.LUNG, layout).astype(np.uint8)
    moved[2:5, 6:9, 6:9] = Label.NODULE
    changed = moved != layout
    found = found_in(np.where(changed, 5000, ct - 3), reference, moved)
    assert found[LUNGS_ALONE, DIFFERENCE] == pytest.approx(-3)
    assert math.isnan(found[NODULES, DIFFERENCE])
    assert math.isnan(found[NODULES, SPREAD])


def test_the_mean_of_a_region_is_that_of_its_voxels(reference):
    ct, layout = reference
    lungs = (layout == Label.LUNG) | (layout == Label.VESSEL)
    assert mean_hu(ct, layout) == {
        LUNGS_ALONE: pytest.approx(ct[lungs].mean()),
        VESSELS: pytest.approx(ct[layout == Label.VESSEL].mean()),
        NODULES: pytest.approx(ct[layout == Label.NODULE].mean()),
    }
    assert math.isnan(mean_hu(ct, np.where(layout == Label.NODULE, Label.LUNG, layout))[NODULES])


def quality_of(training=None, **values):
    """Rows of `image_quality.csv`: lungs, spread, vessels, nodules and speckle of samples, and the mean HU of the lungs
    of the training cases minus that of the references."""
    names = dict(zip(CHECKS, ("lungs", "spread", "vessels", "nodules", "speckle"), strict=True))
    rows = [
        {"generator": "g", "image": "synthetic", "region": region, "metric": metric, "n": 4, "sd": 2.0}
        | {"mean": values[names[region, metric]]}
        for region, metric in CHECKS
        if names[region, metric] in values
    ]
    other = {"generator": "g", "image": "synthetic", "region": "lungs", "metric": "mse", "n": 4, "sd": 1, "mean": 1}
    if training is not None:
        row = {"generator": "g", "image": OTHER_PATIENTS, "region": LUNGS_ALONE, "metric": TRAINING, "n": 2}
        rows.append({**row, "mean": training})
    return pd.DataFrame([*rows, other])


def status_of(limits=None, **values):
    return calibration_table(quality_of(**values), ["g"], limits or Calibration())["status"].tolist()


def test_limits_hold_to_either_side_and_include_themselves():
    own = {"lungs": 10, "spread": 0.9, "vessels": -300, "nodules": -40, "speckle": 1.4}
    assert status_of(**own) == [PASSED, PASSED, NO_LIMIT, PASSED, PASSED]
    outside = {"lungs": -10.1, "spread": 0.89, "vessels": 0, "nodules": 40.1, "speckle": 0.69}
    assert status_of(**outside) == [FAILED, FAILED, NO_LIMIT, FAILED, FAILED]
    assert status_of(lungs=-58, spread=1.11) == [FAILED, FAILED, *[NOT_MEASURED] * 3]
    wide = Calibration(lungs_hu=60, spread_ratio=(0.5, 2), vessels_hu=5, nodules_spread_ratio=(0.5, 2))
    assert status_of(wide, lungs=-58, spread=1.11, vessels=6, speckle=1.9) == [
        PASSED, PASSED, FAILED, NOT_MEASURED, PASSED,
    ]  # fmt: skip


def test_what_was_not_measured_never_passes():
    table = calibration_table(None, ["g", "h"], Calibration())
    assert set(table["status"]) == {NOT_MEASURED}
    assert (table["n_samples"] == 0).all()
    assert calibration_notes(table) == []
    nowhere = calibration_table(quality_of(lungs=math.nan, spread=math.nan), ["g"], Calibration())
    assert set(nowhere["status"]) == {NOT_MEASURED}


def test_failures_are_reported_with_their_limits():
    table = calibration_table(quality_of(lungs=-58.2, spread=0.5, nodules=10), ["g"], Calibration())
    (note,) = calibration_notes(table)
    assert note.startswith(
        "HU calibration of g failed: lungs too dark, −58 HU against the references (limit ±10); "
        "the spread of HU in the lungs is 0.50 times that of the references (limits 0.9 to 1.1)."
    )
    (note,) = calibration_notes(calibration_table(quality_of(lungs=0, speckle=1.83), ["g"], Calibration()))
    assert "the spread of HU in the nodules is 1.83 times that of the references (limits 0.7 to 1.4)" in note
    (note,) = calibration_notes(calibration_table(quality_of(lungs=10.4, spread=1), ["g"], Calibration()))
    assert "lungs too bright, +10.4 HU against the references (limit ±10)" in note
    passed = calibration_table(quality_of(lungs=1, spread=1), ["g", "h"], Calibration())
    assert calibration_notes(passed) == []


def test_training_cases_that_differ_themselves_are_named_and_excuse_nothing():
    """A perfect generator draws the brightness of its training cases, which may be that of other patients."""
    table = calibration_table(quality_of(lungs=-18.2, spread=1, training=-10.6), ["g"], Calibration())
    found = table.set_index(["region", "measure"])["training_difference"]
    assert found[LUNGS_ALONE, DIFFERENCE] == -10.6
    assert found.drop((LUNGS_ALONE, DIFFERENCE)).isna().all()
    assert table["status"][0] == FAILED
    (note,) = calibration_notes(table)
    assert "lungs too dark, −18 HU against the references (limit ±10; the training cases: −11)." in note


def test_limits_that_no_sample_can_keep_are_refused():
    for name in ("spread_ratio", "nodules_spread_ratio"):
        with pytest.raises(ConfigError, match=rf"\b{name}: 1 must be between"):
            parse_config({"verdict": {"calibration": {name: [1.1, 0.9]}}})


@pytest.mark.parametrize("shift", [0, -58])
def test_a_run_whose_lungs_are_too_dark_reports_it(make_results, shift):
    """Samples are the reference itself, darker by a number of HU in all that the layout names."""
    config, results = make_results(n_test=1, n_replicates=1)
    folder, reference = results / "synthetic" / "lung_ddpm" / "all-fold0_seed0", results / "cases" / "case-01"
    ct, layout = (read_volume(reference / name) for name in ("ct.nii.gz", "layout.nii.gz"))
    for number in range(2):
        shutil.copy(reference / "layout.nii.gz", folder / f"sample-{number}" / "layout.nii.gz")
        shifted = ct.array + np.int16(shift) * (layout.array != Label.BACKGROUND)
        write_volume(folder / f"sample-{number}" / "ct.nii.gz", Volume(shifted.astype(np.int16), ct.affine))
    tables = [folder / f"samples-{number}.tsv" for number in range(2)]
    run_quality(config, results / "cases" / "cases.tsv", tables, "lung_ddpm", results / "quality" / "lung_ddpm.csv")
    write_tables(config, results)
    table = pd.read_csv(results / "tables" / "calibration.csv").set_index(["region", "measure"])
    assert table.loc[(LUNGS_ALONE, DIFFERENCE), "mean"] == pytest.approx(shift, abs=1e-6)
    assert table.loc[(NODULES, DIFFERENCE), "mean"] == pytest.approx(shift, abs=1e-6)
    assert table.loc[(LUNGS_ALONE, SPREAD), "mean"] == pytest.approx(1, abs=1e-6)
    assert table.loc[(LUNGS_ALONE, DIFFERENCE), "n_samples"] == 2
    expected = [FAILED if shift else PASSED, PASSED, NOT_MEASURED, FAILED if shift else PASSED, PASSED]
    assert table["status"].tolist() == expected
    # One training case and one reference, each with its own noise: equal but for that.
    training, real = (results / "cases" / name for name in ("case-00", "case-01"))
    lungs = [
        ct.array[np.isin(layout.array, (Label.LUNG, Label.VESSEL))].mean()
        for ct, layout in (CaseFolder(path).read() for path in (training, real))
    ]
    assert table.loc[(LUNGS_ALONE, DIFFERENCE), "training_difference"] == pytest.approx(lungs[0] - lungs[1], abs=1e-3)
