"""Image measures against closed forms and MONAI; the floor; the table on disk."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from monai.metrics.regression import compute_ssim_and_cs

from lungddpm.errors import InputError
from lungddpm.files import write_json
from lungddpm.generators import run_synthesize
from lungddpm.layouts import Label
from lungddpm.verdict.image_quality import (
    CONSTANT_LUNGS,
    METRICS,
    SYNTHETIC,
    compare_images,
    constant_lungs,
    regions,
    run_quality,
    unit_range,
)

WINDOW = (-1024.0, 600.0)


@pytest.fixture
def reference():
    return np.random.default_rng(1).random((20, 18, 16)).astype(np.float32)


def values_of(rows, region):
    return {row["metric"]: row["value"] for row in rows if row["region"] == region}


def test_a_shift_in_one_region_has_its_closed_form(reference):
    layout = np.zeros(reference.shape, np.uint8)
    layout[2:12, 2:12, 2:12] = Label.LUNG
    layout[5:7, 5:7, 5:7] = Label.NODULE
    masks = regions(layout, layout)
    rows = compare_images(reference + 0.1 * masks["nodules"], reference, masks, WINDOW)
    nodules, lungs, whole = (values_of(rows, region) for region in ("nodules", "lungs", "whole volume"))
    assert nodules["mse"] == pytest.approx(0.01, rel=1e-4)
    assert nodules["psnr_db"] == pytest.approx(20, rel=1e-4)
    assert nodules["mean_difference_hu"] == pytest.approx(162.4, rel=1e-4)
    assert lungs["mse"] == pytest.approx(0.01 * 8 / 1000, rel=1e-4)
    assert whole["mse"] == pytest.approx(0.01 * 8 / reference.size, rel=1e-4)


def test_moved_nodules_are_not_compared_with_what_the_reference_shows_there(reference):
    own = np.full(reference.shape, Label.LUNG, np.uint8)
    own[5:7, 5:7, 5:7] = Label.NODULE
    moved = np.full(reference.shape, Label.LUNG, np.uint8)
    moved[6:8, 5:7, 5:7] = Label.NODULE
    masks = regions(moved, own)
    assert not masks["nodules"].any()
    assert np.argwhere(~masks["lungs"]).tolist() == np.argwhere(moved != own).tolist()
    assert np.count_nonzero(~masks["lungs"]) == 8


def test_identical_images(reference):
    whole = values_of(
        compare_images(reference, reference, {"whole volume": np.ones(reference.shape, bool)}, WINDOW), "whole volume"
    )
    assert whole == {"mse": 0, "psnr_db": math.inf, "ssim": pytest.approx(1), "mean_difference_hu": 0}


def test_ssim_agrees_with_monai(reference):
    image = np.clip(reference + np.random.default_rng(2).normal(0, 0.1, reference.shape), 0, 1).astype(np.float32)
    inner = np.zeros(image.shape, bool)
    inner[5:-5, 5:-5, 5:-5] = True  # MONAI's window of 11 leaves the border out
    ours = values_of(compare_images(image, reference, {"inner": inner}, WINDOW), "inner")["ssim"]
    theirs, _ = compute_ssim_and_cs(
        *(torch.from_numpy(array)[None, None] for array in (image, reference)),
        spatial_dims=3, kernel_size=(11,) * 3, kernel_sigma=(1.5,) * 3, data_range=1.0,
    )  # fmt: skip
    assert ours == pytest.approx(float(theirs.mean()), abs=1e-4)


def test_empty_regions_and_small_grids_are_not_measured():
    image = np.zeros((8, 8, 8), np.float32)
    empty = np.zeros(image.shape, np.uint8)
    rows = compare_images(image, image, regions(empty, empty), WINDOW)
    assert all(math.isnan(value) for value in values_of(rows, "nodules").values())
    assert math.isnan(values_of(rows, "whole volume")["ssim"])


def test_no_other_constant_is_a_better_floor(reference):
    lungs = reference > 0.3
    floor = constant_lungs(reference, lungs)
    assert np.array_equal(floor[~lungs], reference[~lungs])
    assert len(np.unique(floor[lungs])) == 1
    best = np.square(floor - reference).mean()
    for constant in np.linspace(0, 1, 21):
        assert best <= np.square(np.where(lungs, constant, reference) - reference).mean() + 1e-6


def test_unit_range_clips_to_the_window():
    assert unit_range(np.array([-3000, -1024, -212, 600, 3000]), WINDOW).tolist() == [0, 0, 0.5, 1, 1]


def test_table_has_a_row_a_sample_image_region_and_metric(make_results):
    _, results = make_results(n_test=1, n_replicates=1)
    table = pd.read_csv(results / "quality" / "lung_ddpm.csv")
    keys = ["case_id", "image", "region", "metric"]
    assert len(table) == len(table[keys].drop_duplicates()) == 2 * 2 * 3 * len(METRICS)
    assert set(table["image"]) == {SYNTHETIC, CONSTANT_LUNGS}
    assert set(table["reference"]) == {"case-01"}


@pytest.mark.parametrize(
    ("provenance", "message"), [({}, "does not name"), ({"reference_case_id": "nobody"}, "nobody")]
)
def test_a_sample_without_a_known_reference_is_refused(make_results, provenance, message):
    config, results = make_results(n_test=1, n_replicates=1)
    folder = results / "synthetic" / "lung_ddpm"
    write_json(folder / "sample-0" / "sample.json", provenance)
    with pytest.raises(InputError, match=message):
        run_quality(config, results / "cases" / "cases.tsv", [folder / "samples-0.tsv"], "lung_ddpm", results / "q.csv")


def test_samples_of_the_generators_are_understood(make_results):
    config, results = make_results(n_test=1, n_replicates=1, extras=False, arms={"controls": ["reference"]})
    cases_table, folder = results / "cases" / "cases.tsv", results / "synthetic" / "reference"
    run_synthesize(config, "reference", cases_table, None, folder, 0, 1, folder / "samples-0.tsv", device="cpu")
    run_quality(config, cases_table, [folder / "samples-0.tsv"], "reference", results / "quality.csv")
    table = pd.read_csv(results / "quality.csv")
    copy = table[(table["image"] == SYNTHETIC) & (table["region"] == "lungs")].set_index("metric")["value"]
    assert (copy["mse"], copy["psnr_db"], copy["mean_difference_hu"]) == (0, math.inf, 0)
