"""Image measures against closed forms, the published samples and a sampler with known seams; floors; the tables."""

import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from lungddpm.core.cases import write_cases
from lungddpm.core.errors import InputError
from lungddpm.core.files import write_json
from lungddpm.core.labels import Label
from lungddpm.core.volume import Volume, read_volume, write_volume
from lungddpm.models.published_sampling import sample_published_aas
from lungddpm.models.sampling import make_solver, sample_aas
from lungddpm.models.schedule import alphas_cumprod, cosine_betas
from lungddpm.quality.calibration import CHECKS
from lungddpm.quality.image_quality import (
    CONSTANT_LUNGS,
    COPIED,
    COPIES,
    METRICS,
    NEAREST,
    OTHER_PATIENTS,
    SEAM_RATIO,
    SHIFTED,
    SYNTHETIC,
    compare_images,
    constant_lungs,
    nodule_means,
    regions,
    run_quality,
    seam_ratio,
    sets_beside,
    shifted_lungs,
    unit_range,
)
from lungddpm.synthesis.run import SynthesisJob, run_synthesize

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
    same = {"ssim": pytest.approx(1), "ms_ssim": pytest.approx(1)}
    assert whole == {"mse": 0, "psnr_db": math.inf, **same, "mean_difference_hu": 0}


def test_the_shell_reaches_two_voxels_around_nodules_but_not_beyond_the_layout():
    layout = np.zeros((12, 12, 12), np.uint8)
    layout[:, :7] = Label.LUNG
    layout[5, 5, 5] = Label.NODULE
    shell = regions(layout, layout)["nodules and shell"]
    assert np.array_equal(np.argwhere(shell).min(axis=0), [3, 3, 3])
    assert np.array_equal(np.argwhere(shell).max(axis=0), [7, 6, 7])
    assert np.count_nonzero(shell) == 5 * 4 * 5


def test_ms_ssim_notes_its_number_of_scales():
    image = np.random.default_rng(3).random((24, 24, 24)).astype(np.float32)
    rows = compare_images(image, image, {"whole volume": np.ones(image.shape, bool)}, WINDOW)
    assert {row["metric"]: row["note"] for row in rows}["ms_ssim"] == "2 scales"


def test_seam_counts_the_faces_of_the_border():
    reference = np.zeros((6, 6, 6), np.float32)
    reference[3:] = 0.2
    layout = np.where(reference > 0, Label.LUNG, Label.BACKGROUND)
    image = reference.copy()
    image[3:, :3] += 0.1  # half of the 36 faces
    image[5] = 0.9  # not at the border
    same = np.ones(layout.shape, bool)
    assert seam_ratio(image, reference, layout, same) == pytest.approx(1.25)
    assert seam_ratio(reference, reference, layout, same) == 1
    same[:, :3] = False
    assert seam_ratio(image, reference, layout, same) == 1
    assert math.isnan(seam_ratio(image, np.zeros_like(reference), layout, same))


def test_published_aas_has_a_seam_that_corrected_aas_has_not():
    """The denoiser has memorised the reference, so any seam comes from how it is pasted."""
    betas, ramp = cosine_betas(50), torch.linspace(-0.5, 0.5, 32).expand(1, 1, 32, 32, 32)
    signal, condition = alphas_cumprod(betas), torch.ones(1, 2, 32, 32, 32)
    condition[..., :16] = -1

    def predict_noise(inputs, timesteps):
        share = signal[timesteps].view(-1, 1, 1, 1, 1)
        return (inputs[:, :1] - share.sqrt() * ramp) / (1 - share).sqrt()

    ratios, solver = {}, make_solver("ddpm", 2, betas, 50)
    for aas, sample in (("corrected", sample_aas), ("published", sample_published_aas)):
        generators = [torch.Generator().manual_seed(1)]
        drawn = sample(predict_noise, solver, condition.double(), ramp.double(), generators)
        image, reference = ((volume[0, 0].numpy() + 1) / 2 for volume in (drawn, ramp))
        layout = np.where(condition[0, 0].numpy() > 0, Label.LUNG, Label.BACKGROUND)
        ratios[aas] = seam_ratio(image, reference, layout, np.ones(layout.shape, bool))
    assert ratios["corrected"] == pytest.approx(1, abs=0.01)
    assert ratios["published"] > 1.05


@pytest.fixture
def published(shared_data):
    """Volumes in [0, 1] by name, and the layout; axis 0 is the slice."""
    names = ("reference", "lung-ddpm", "med-ddpm", "mav", "gem-3d")
    folder = shared_data / "published-samples"
    volumes = {name: read_volume(folder / f"case0_{name}.nii.gz").array.astype(np.float32) / 255 for name in names}
    return volumes, read_volume(folder / "case0_layout.nii.gz").array


def test_published_samples(published):
    """The ranking within the lungs and its floor of 0.0018 are known for two published cases; this is the first one."""
    volumes, layout = published
    reference, masks = volumes.pop("reference"), regions(layout, layout)
    lungs = masks["lungs"]
    assert 0.84 < 1 - lungs.mean() < 0.90
    whole = {name: np.square(volume - reference).mean() for name, volume in volumes.items()}
    inside = {name: np.square((volume - reference)[lungs]).mean() for name, volume in volumes.items()}
    rows = compare_images(volumes["lung-ddpm"], reference, masks, WINDOW)
    assert values_of(rows, "lungs")["mse"] == pytest.approx(inside["lung-ddpm"], rel=1e-4)
    assert values_of(rows, "whole volume")["mse"] == pytest.approx(0.0021, abs=5e-5)
    published_mse = {"lung-ddpm": 0.0021, "med-ddpm": 0.0522, "mav": 0.0876, "gem-3d": 0.0719}
    assert {name: round(float(value), 4) for name, value in whole.items()} == published_mse
    # What sets Lung-DDPM 25 times apart is the pasted background: within the lungs it is less than 1.5 times.
    assert sorted(whole, key=whole.get) == ["lung-ddpm", "med-ddpm", "gem-3d", "mav"]
    assert sorted(inside, key=inside.get)[1:] == ["gem-3d", "mav", "med-ddpm"]
    assert whole["med-ddpm"] / whole["lung-ddpm"] > 20
    assert inside["med-ddpm"] / inside["lung-ddpm"] < 1.5
    # A constant within the lungs beats all of them over the whole volume.
    floor = np.square(constant_lungs(reference, lungs) - reference).mean()
    assert floor == pytest.approx(0.0020, abs=5e-5)
    assert floor < min(whole.values())


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


def test_the_shifted_floor_has_the_brightness_of_the_image_and_nothing_else_of_it(reference):
    layout = np.where(reference > 0.3, Label.LUNG, Label.BACKGROUND)
    same = np.ones(layout.shape, bool)
    same[:2] = False  # where nodules were moved, the image does not measure brightness
    lungs = layout == Label.LUNG
    image = np.where(lungs, 1000 * reference[::-1] - 58, 0)
    image[:2] = 9999
    floor = shifted_lungs(image, 1000 * reference, layout, same)
    shift = image[lungs & same].mean() - 1000 * reference[lungs & same].mean()
    np.testing.assert_allclose(floor, 1000 * reference + shift * lungs, rtol=1e-5)
    empty = np.zeros_like(layout)
    np.testing.assert_array_equal(shifted_lungs(image, reference, empty, same), reference)


def test_a_generator_that_changes_nothing_but_brightness_is_as_far_away_as_its_floor(make_results):
    config, results = make_results(n_test=3, n_replicates=1)
    table = results / "cases" / "cases.tsv"
    cases = pd.read_csv(table, sep="\t", dtype=str, keep_default_na=False)
    write_cases(table, cases.assign(role=cases["role"].replace("test", "reference")))
    folder = results / "synthetic" / "lung_ddpm" / "all-fold0_seed0"
    for number in range(2):
        case_id = f"case-0{number + 2}"
        ct, layout = (read_volume(results / "cases" / case_id / f"{name}.nii.gz") for name in ("ct", "layout"))
        darker = ct.array - 58 * (layout.array != Label.BACKGROUND)
        write_volume(folder / f"sample-{number}" / "ct.nii.gz", Volume(darker.astype(np.int16), ct.affine))
        shutil.copy(results / "cases" / case_id / "layout.nii.gz", folder / f"sample-{number}")
        write_json(folder / f"sample-{number}" / "sample.json", {"reference_case_id": case_id})
        rows = pd.read_csv(folder / f"samples-{number}.tsv", sep="\t", dtype=str, keep_default_na=False)
        write_cases(folder / f"samples-{number}.tsv", rows.assign(patient_id=f"patient-0{number + 2}"))
    table, sets = judged(config, results, [folder / f"samples-{number}.tsv" for number in range(2)])
    for region in ("whole volume", "lungs"):
        for metric in ("fid", "mmd_squared"):
            value = {image: sets.loc[(image, region, metric), "value"] for image in (SYNTHETIC, SHIFTED, COPIES)}
            assert value[SHIFTED] == pytest.approx(value[SYNTHETIC], rel=1e-3)
            assert value[SHIFTED] > value[COPIES]
    mse = table[(table["metric"] == "mse") & (table["region"] == "lungs")].groupby("image")["value"].mean()
    assert mse[SHIFTED] == pytest.approx(mse[SYNTHETIC], rel=1e-3)
    assert mse[SHIFTED] == pytest.approx((58 / 1624) ** 2, rel=1e-3)


def test_nodules_that_touch_by_a_corner_are_one():
    layout = np.full((8, 8, 8), Label.LUNG, np.uint8)
    layout[1, 1, 1] = layout[2, 2, 2] = layout[6, 6, 6] = Label.NODULE
    hu = np.full(layout.shape, -850)
    hu[1, 1, 1], hu[2, 2, 2], hu[6, 6, 6] = 10, 30, -500
    assert nodule_means(hu, layout) == [20, -500]
    assert nodule_means(hu, np.zeros_like(layout)) == []


def test_unit_range_clips_to_the_window():
    assert unit_range(np.array([-3000, -1024, -212, 600, 3000]), WINDOW).tolist() == [0, 0, 0.5, 1, 1]


def test_table_has_a_row_per_sample_image_region_and_metric(make_results):
    _, results = make_results(n_test=1, n_replicates=1)
    table = pd.read_csv(results / "quality" / "lung_ddpm.csv")
    keys = ["case_id", "image", "region", "metric"]
    compared = table[table["metric"] != NEAREST]
    assert len(compared) == len(compared[keys].drop_duplicates()) == 2 * (5 * (4 * len(METRICS) + 1) + len(CHECKS))
    assert set(compared["image"]) == {SYNTHETIC, SHIFTED, CONSTANT_LUNGS, COPIES, OTHER_PATIENTS}
    assert set(compared["reference"]) == {"case-01"}
    nearest = table[table["metric"] == NEAREST].dropna(subset="value")
    assert nearest["image"].value_counts().to_dict() == {SYNTHETIC: 2, CONSTANT_LUNGS: 2, OTHER_PATIENTS: 1}
    assert set(nearest["note"]) == {"case-00"}


def test_floors_come_out_as_floors(make_results):
    _, results = make_results(n_test=1, n_replicates=1)
    table = pd.read_csv(results / "quality" / "lung_ddpm.csv")
    mean = table.groupby(["image", "region", "metric"])["value"].mean()
    assert mean[COPIES, "lungs", "mse"] == 0
    assert mean[COPIES, "lungs", "ms_ssim"] == pytest.approx(1)
    assert mean[COPIES, "seam", SEAM_RATIO] == 1
    # Noise of 20 HU in both; the constant lacks a nodule of 27 voxels and 890 HU among 1680.
    assert mean[SYNTHETIC, "lungs", "mse"] == pytest.approx(2 * (20 / 1624) ** 2, rel=0.05)
    share = 27 / 1680
    assert mean[CONSTANT_LUNGS, "lungs", "mse"] == pytest.approx(
        (20**2 + share * (1 - share) * 890**2) / 1624**2, rel=0.05
    )
    sets = pd.read_csv(sets_beside(results / "quality" / "lung_ddpm.csv"))
    distances = sets[sets["extractor"].notna()]
    assert len(distances) == 5 * 2 * 6
    assert distances["extractor"].str.contains("random weights").all()
    assert distances["weights_sha256"].str.len().eq(64).all()
    assert distances["value"].isna().all()  # there is one reference only
    notes = distances.groupby("metric")["note"].unique().map(list)
    assert notes["fid"] == ["needs two images on each side"]
    assert notes["kid"] == notes["mmd_squared"] == notes["classifier_auc"] == ["needs two patients on each side"]
    assert notes["feature_precision"] == notes["feature_recall"] == ["needs 9 patients on each side"]


def add_sample(results, name, source):
    """One more sample with the CT and layout of a case."""
    folder = results / "synthetic" / "lung_ddpm" / "all-fold0_seed0" / name
    shutil.copytree(results / "cases" / source, folder)
    write_json(folder / "sample.json", {"reference_case_id": "case-01"})
    table = pd.read_csv(folder.parent / "samples-0.tsv", sep="\t").assign(case_id=name, path=name)
    write_cases(folder.parent / f"{name}.tsv", table)
    return folder.parent / f"{name}.tsv"


def judged(config, results, tables):
    output = results / "judged.csv"
    run_quality(config, results / "cases" / "cases.tsv", tables, "lung_ddpm", output)
    sets = pd.read_csv(sets_beside(output)).set_index(["image", "region", "metric"])
    return pd.read_csv(output), sets


def test_a_training_case_among_the_samples_is_flagged(make_results):
    config, results = make_results(n_test=1, n_replicates=1)
    others = [results / "synthetic" / "lung_ddpm" / "all-fold0_seed0" / f"samples-{number}.tsv" for number in range(2)]
    _, before = judged(config, results, others)
    table, after = judged(config, results, [*others, add_sample(results, "stolen", "case-00")])
    distance = table[(table["metric"] == NEAREST) & (table["image"] == SYNTHETIC)].set_index("case_id")["value"]
    assert distance["stolen"] == 0
    assert distance.drop("stolen").min() > 20
    nearest = [sets.loc[(SYNTHETIC, "lungs", "smallest_training_ratio")] for sets in (before, after)]
    assert nearest[0]["value"] > 0.7
    assert nearest[1]["value"] == 0
    assert nearest[1]["note"].startswith("stolen is 0 HU from case-00; real: ")
    flagged = [sets.loc[(SYNTHETIC, "lungs", "n_nearer_than_any_real")] for sets in (before, after)]
    assert flagged[1]["value"] == flagged[0]["value"] + 1
    assert (flagged[1]["n"], flagged[1]["n_real"]) == (3, 1)
    assert flagged[1]["note"].endswith("by chance 1.5")  # three samples, one real distance


def test_nearness_is_not_measured_in_lungs_that_are_copied(make_results):
    """Its nodules are a training case's own, but the lungs around them are far from it."""
    config, results = make_results(n_test=1, n_replicates=1)
    folder = results / "synthetic" / "lung_ddpm" / "all-fold0_seed0"
    reference, training = (read_volume(results / "cases" / f"case-0{n}" / "ct.nii.gz") for n in (1, 0))
    nodules = read_volume(folder / "sample-0" / "layout.nii.gz").array == Label.NODULE
    drawn = np.where(nodules, training.array, reference.array)
    write_volume(folder / "sample-0" / "ct.nii.gz", Volume(drawn, reference.affine))
    table, sets = judged(config, results, [folder / "samples-0.tsv"])
    nearest = table[(table["metric"] == NEAREST) & (table["case_id"] == "sample-0")].set_index("image")
    assert math.isnan(nearest.loc[SYNTHETIC, "value"])
    assert nearest.loc[CONSTANT_LUNGS, "value"] > 0
    for metric in ("nearest_training_ratio", "smallest_training_ratio", "n_nearer_than_any_real"):
        found = sets.loc[(SYNTHETIC, "lungs", metric)]
        assert math.isnan(found["value"])
        assert (found["n"], found["note"]) == (0, COPIED)
        assert sets.loc[(CONSTANT_LUNGS, "lungs", metric)]["n"] == 1


def test_samples_of_one_layout_are_compared_with_each_other(make_results):
    config, results = make_results(n_test=1, n_replicates=1)
    tables = [results / "synthetic" / "lung_ddpm" / "all-fold0_seed0" / f"samples-{number}.tsv" for number in range(2)]
    _, sets = judged(config, results, tables)
    noise = sets.loc[(SYNTHETIC, "lungs", "pairwise_ms_ssim")]
    assert (noise["n"], noise["note"]) == (1, "1 scale, 1 layout")
    assert 0.9 < noise["value"] < 0.999
    # Two draws of independent noise of 20 HU, in one nodule of 27 voxels.
    voxels, means = (sets.loc[(SYNTHETIC, "nodules", metric)] for metric in ("voxel_sd_hu", "nodule_mean_sd_hu"))
    assert voxels["value"] == pytest.approx(20, rel=0.3)
    assert means["value"] < 20
    assert {(row["n"], row["note"]) for row in (voxels, means)} == {(1, "1 nodule, 1 layout")}
    pair = sets.loc[(SYNTHETIC, "nodules", "pairwise_ms_ssim")]
    assert (pair["n"], pair["note"]) == (1, "1 scale, 1 nodule, 1 layout")
    of_real = sets.loc[(OTHER_PATIENTS, "nodules", "nodule_mean_sd_hu")]
    assert (of_real["n"], of_real["note"]) == (1, "1 real nodule, each of its own layout")
    assert math.isnan(of_real["value"])
    _, sets = judged(
        config, results, [tables[0], add_sample(results, "again", "../synthetic/lung_ddpm/all-fold0_seed0/sample-0")]
    )
    assert sets.loc[(SYNTHETIC, "lungs", "pairwise_ms_ssim")]["value"] == pytest.approx(1)
    assert sets.loc[(SYNTHETIC, "nodules", "pairwise_ms_ssim")]["value"] == pytest.approx(1)
    assert sets.loc[(SYNTHETIC, "nodules", "voxel_sd_hu")]["value"] == 0
    _, sets = judged(config, results, tables[:1])
    alone = sets.loc[(SYNTHETIC, "lungs", "pairwise_ms_ssim")]
    assert (alone["n"], alone["note"]) == (0, "no two samples share a layout")
    assert sets.loc[(SYNTHETIC, "nodules", "voxel_sd_hu")]["note"] == "no two samples share a layout"
    assert math.isnan(alone["value"])


def test_samples_without_a_reference_are_judged_as_far_as_they_can_be(make_results):
    config, results = make_results(n_test=1, n_replicates=1)
    folder = results / "synthetic" / "lung_ddpm" / "all-fold0_seed0"
    write_json(folder / "sample-0" / "sample.json", {"reference_case_id": None})
    table, sets = judged(config, results, [folder / "samples-0.tsv"])
    assert set(table.dropna(subset="value")["metric"]) == {NEAREST}
    assert set(sets.xs("fid", level="metric").index.get_level_values("image")) == {SYNTHETIC, OTHER_PATIENTS}


@pytest.mark.parametrize(
    ("provenance", "message"), [({}, "does not name"), ({"reference_case_id": "nobody"}, "nobody")]
)
def test_a_sample_without_a_known_reference_is_refused(make_results, provenance, message):
    config, results = make_results(n_test=1, n_replicates=1)
    folder = results / "synthetic" / "lung_ddpm" / "all-fold0_seed0"
    write_json(folder / "sample-0" / "sample.json", provenance)
    with pytest.raises(InputError, match=message):
        run_quality(config, results / "cases" / "cases.tsv", [folder / "samples-0.tsv"], "lung_ddpm", results / "q.csv")


def test_samples_of_the_generators_are_understood(make_results):
    config, results = make_results(n_test=1, n_replicates=1, extras=False, arms={"controls": ["reference"]})
    cases_table, folder = results / "cases" / "cases.tsv", results / "synthetic" / "reference"
    run_synthesize(config, SynthesisJob("reference", cases_table, folder, folder / "samples-0.tsv", device="cpu"))
    run_quality(config, cases_table, [folder / "samples-0.tsv"], "reference", results / "quality.csv")
    table = pd.read_csv(results / "quality.csv")
    copy = table[(table["image"] == SYNTHETIC) & (table["region"] == "lungs")].set_index("metric")["value"]
    assert (copy["mse"], copy["psnr_db"], copy["mean_difference_hu"]) == (0, math.inf, 0)
