"""Label fidelity by segmenters whose answers are known; which cases are judged; the table and its intervals."""

import shutil

import numpy as np
import pandas as pd
import pytest
from made_up_results import AFFINE, SIZE, case_row, write_case

from lungddpm.config.loading import parse_config
from lungddpm.core.cases import CaseFolder, write_cases
from lungddpm.core.errors import InputError
from lungddpm.core.files import write_json
from lungddpm.core.labels import Label
from lungddpm.core.volume import Volume, read_volume, write_volume
from lungddpm.quality import label_fidelity
from lungddpm.quality.label_fidelity import (
    LESION_COLUMNS,
    METRIC_COLUMNS,
    REAL_CT,
    cases_to_judge,
    fidelity_table,
    judge,
    run_label_fidelity,
    runs_table,
)

CONFIG = parse_config({})


class Cohort:
    """A table of cases with their folders, an arm that was trained on the discovery case, and samples to add."""

    def __init__(self, folder):
        self.folder, self.rng, self.tables = folder, np.random.default_rng(4), []
        self.table, self.arm = folder / "cases" / "cases.tsv", folder / "arms" / "real"
        self.rows = []
        for number, role in enumerate(["discovery", "reference", "reference", "reference", "test"]):
            self.add_case(f"case-{number}", f"patient-{number}", role)
        entry = {"case_id": "case-0", "patient_id": "patient-0", "trained_on": True}
        write_json(self.arm / "arm.json", {"arm": "real", "cases": [entry], "folds": []})

    def add_case(self, case_id, patient_id, role, nodule=True):
        folder = self.table.parent / case_id
        write_case(folder, self.rng, nodule=nodule)
        self.rows.append(case_row(case_id, patient_id, role, sha256=CaseFolder(folder).hash()))
        write_cases(self.table, self.rows)

    def add_samples(self, generator, references, layout="own", nodule=True, shards=1, **provenance):
        """One sample per reference; `layout` is `own` or `moved`."""
        folder, rows = self.folder / "synthetic" / generator, []
        for number, reference in enumerate(references):
            name = f"{reference}_s{number:03d}"
            write_case(folder / name, self.rng, nodule, {"reference_case_id": reference} | provenance)
            if layout == "moved":
                path = folder / name / "layout.nii.gz"
                moved = read_volume(path)
                write_volume(path, moved.like(np.roll(moved.array, 1, axis=1)))
            patient = next((row["patient_id"] for row in self.rows if row["case_id"] == reference), "none")
            sha256 = CaseFolder(folder / name).hash()
            rows.append(case_row(name, patient, "synthetic", source=generator, sha256=sha256))
        for shard in range(shards):
            self.tables.append(folder / f"samples-1.0-{shard}.tsv")
            write_cases(self.tables[-1], rows[shard::shards])
        return folder

    def chosen(self, config=CONFIG):
        return cases_to_judge(config, self.arm, self.table, self.tables)

    def judged(self, segment, config=CONFIG):
        return judge(self.chosen(config), segment, "judging")


@pytest.fixture
def cohort(tmp_path):
    return Cohort(tmp_path)


def nodules_of(ct):
    layout = read_volume(ct.with_name("layout.nii.gz"))
    return layout.like((layout.array == Label.NODULE).astype(np.uint8))


def nothing_in(ct):
    return read_volume(ct).like(np.zeros(SIZE, np.uint8))


def shifted_in(ct):
    mask = nodules_of(ct)
    return mask.like(np.roll(mask.array, 1, axis=0))


def dark_in(ct):
    """What a segmenter that sees only the CT might predict: every voxel below -880 HU."""
    volume = read_volume(ct)
    return volume.like((volume.array < -880).astype(np.uint8))


def table_of(*of_replicates, generators=("lung_ddpm",), folds=None):
    folds = folds or {f"fold{number}_seed0": number for number in range(len(of_replicates))}
    metrics, lesions = (
        pd.concat([found[place].assign(replicate=name) for name, found in zip(folds, of_replicates, strict=True)])
        for place in (0, 1)
    )
    return fidelity_table(metrics, lesions, list(generators), folds, 0.95).set_index("generator")


# The nodule of every case is a cube of 3 voxels per edge. Shifted by one voxel, 18 of 27 are hit: Dice 2 x 18 / 54.
@pytest.mark.parametrize(
    ("segment", "dice", "recall", "overlap", "false_positives"),
    [(nodules_of, 1, 1, 1, 0), (nothing_in, 0, 0, 0, 0), (shifted_in, 2 / 3, 1, 2 / 3, 0)],
)
def test_segmenters_whose_answers_are_known(cohort, segment, dice, recall, overlap, false_positives):
    cohort.add_samples("lung_ddpm", ["case-1", "case-2"])
    metrics, lesions = cohort.judged(segment)
    assert list(metrics) == METRIC_COLUMNS
    assert list(lesions) == LESION_COLUMNS
    assert metrics["case_id"].tolist() == ["case-1", "case-2", "case-3", "case-1_s000", "case-2_s001"]
    assert metrics["dice"].tolist() == pytest.approx([dice] * 5)
    assert metrics["n_false_positives"].tolist() == [false_positives] * 5
    assert lesions["found"].astype(float).tolist() == [recall] * 5
    assert lesions["overlap"].tolist() == pytest.approx([overlap] * 5)
    # 27 voxels of 4 x 4 x 5 mm: as a ball, 16 mm across.
    assert set(lesions["size_bin"]) == {"> 10 mm"}
    table = table_of((metrics, lesions))
    for name, images, n_cases in ((REAL_CT, "reference", 3), ("lung_ddpm", "synthetic", 2)):
        row = table.loc[name]
        assert (row["images"], row["n_cases"], row["n_lesions"], row["n_lesions_above_10_mm"]) == (
            images, n_cases, n_cases, n_cases,
        )  # fmt: skip
        assert (row["dice_mean"], row["recall"], row["recall_above_10_mm"]) == pytest.approx((dice, recall, recall))
        assert row["n_lesions_below_6_mm"] == 0
        assert np.isnan(row["recall_below_6_mm"])
    assert table.loc["lung_ddpm", "difference"] == pytest.approx(0)


def test_a_case_without_a_nodule_counts_false_positives_and_no_dice(cohort):
    cohort.add_samples("lung_ddpm", ["case-1"])
    cohort.add_samples("paste_constant", ["case-2"], nodule=False)

    def one_voxel_more(ct):
        mask = nodules_of(ct)
        mask.array[0, 0, 0] = 1
        return mask

    table = table_of(cohort.judged(one_voxel_more), generators=["lung_ddpm", "paste_constant"])
    row = table.loc["paste_constant"]
    assert (row["n_cases"], row["n_empty_cases"], row["n_lesions"], row["false_positives_per_scan"]) == (1, 1, 0, 1)
    assert np.isnan(row["dice_mean"])
    assert np.isnan(row["difference"])
    assert table.loc["lung_ddpm", "dice_mean"] == pytest.approx(2 * 27 / 55)


def test_lesions_are_counted_by_texture(cohort):
    """The nodule of every case is at voxels 8 to 10, 6 to 8, 5 to 7; a segmenter finds none of ground glass."""
    at = dict(zip(("centroid_x_mm", "centroid_y_mm", "centroid_z_mm"), (AFFINE @ [9, 7, 6, 1])[:3], strict=True))
    for number, rating in ((1, 1.0), (2, 5.0)):
        nodule = at | {"volume_mm3": 30.0, "texture": rating, "malignancy": None, "subtlety": None}
        write_json(CaseFolder(cohort.table.parent / f"case-{number}").record, {"qc": {"nodules": [nodule]}})
    cohort.add_samples("lung_ddpm", ["case-1", "case-2", "case-3"])

    def solid_alone(ct):
        return nothing_in(ct) if ct.parent.name.startswith("case-1") else nodules_of(ct)

    metrics, lesions = cohort.judged(solid_alone)
    assert lesions["texture"].tolist() == ["ground glass", "solid", ""] * 2
    for _, row in table_of((metrics, lesions)).iterrows():
        assert (row["n_lesions"], row["n_lesions_ground_glass"], row["n_lesions_solid"]) == (3, 1, 1)
        assert (row["recall_ground_glass"], row["recall_solid"], row["recall"]) == pytest.approx((0, 1, 2 / 3))
        assert row["n_lesions_part_solid"] == 0
        assert np.isnan(row["recall_part_solid"])


def test_copies_of_the_references_are_at_the_ceiling(cohort):
    folder = cohort.add_samples("reference", ["case-1", "case-2", "case-3", "case-1"])
    rows = []
    for name in ("case-1_s000", "case-2_s001", "case-3_s002", "case-1_s003"):
        for file in ("ct.nii.gz", "layout.nii.gz"):
            shutil.copyfile(cohort.table.parent / name[:6] / file, folder / name / file)
        sha256 = CaseFolder(folder / name).hash()
        rows.append(case_row(name, f"patient-{name[5]}", "synthetic", source="reference", sha256=sha256))
    write_cases(folder / "samples-1.0-0.tsv", rows)
    segmented = []

    def seen_by(ct):
        segmented.append(ct)
        return dark_in(ct)

    judged = cohort.judged(seen_by)
    assert len(segmented) == 3, "the same CT and layout are segmented once"
    found = judged[0].set_index("case_id")
    for name in ("case-1_s000", "case-2_s001", "case-3_s002", "case-1_s003"):
        for column in ("dice", "n_false_positives", "hausdorff_95_mm"):
            assert found.loc[name, column] == found.loc[name[:6], column]
    row = table_of(judged, generators=["reference"]).loc["reference"]
    assert (row["difference"], row["recall_difference"], row["n_paired"]) == (0, 0, 4)


def test_samples_are_compared_with_their_own_references(cohort):
    """Means would differ by other references; pairs do not."""
    cohort.add_samples("lung_ddpm", ["case-1", "case-1"])

    def blind_to_case_2_and_3(ct):
        return nothing_in(ct) if ct.parent.name in ("case-2", "case-3") else nodules_of(ct)

    table = table_of(cohort.judged(blind_to_case_2_and_3))
    assert table.loc[REAL_CT, "dice_mean"] == pytest.approx(1 / 3)
    row = table.loc["lung_ddpm"]
    assert (row["dice_mean"], row["difference"], row["recall_difference"], row["n_paired"]) == (1, 0, 0, 2)
    assert row["dice_of_references"] == 1  # not 1/3: case-1 alone
    assert row["note"] == ""


def test_moved_nodules_have_no_counterpart_in_the_reference(cohort):
    cohort.add_samples("lung_ddpm", ["case-1"], layout="moved")
    cohort.add_samples("med_ddpm", ["case-1"])
    cohort.add_samples("med_ddpm_again", ["case-2"], layout="moved")

    def blind_to_real_ct(ct):
        return nodules_of(ct) if "_s" in ct.parent.name else nothing_in(ct)

    metrics, lesions = cohort.judged(blind_to_real_ct)
    assert metrics.set_index("case_id").loc["case-1_s000", "own_layout"].tolist() == [False, True]
    both = metrics.replace({"generator": {"med_ddpm_again": "med_ddpm"}})
    both_lesions = lesions.replace({"generator": {"med_ddpm_again": "med_ddpm"}})
    table = table_of((both, both_lesions), generators=["lung_ddpm", "med_ddpm"])
    row = table.loc["lung_ddpm"]
    assert (row["n_paired"], row["difference"], row["recall_difference"]) == (0, 1, 1)
    assert row["note"] == "no sample has its reference's own layout: difference of means"
    row = table.loc["med_ddpm"]
    assert (row["n_paired"], row["difference"]) == (1, 1)
    assert row["note"] == "differences over the 1 of 2 samples with their reference's own layout"


def replicate_with(cohort, shift):
    """Judged with a mask that has lost this many of the nine columns of every synthetic nodule."""

    def segment(ct):
        mask = nodules_of(ct)
        if "_s" in ct.parent.name:
            places = np.argwhere(mask.array.any(axis=2))[:shift]
            mask.array[tuple(places.T)] = 0
        return mask

    return cohort.judged(segment)


def test_intervals_are_those_of_a_t_test_over_replicates(cohort):
    cohort.add_samples("lung_ddpm", ["case-1", "case-2"])
    replicates = [replicate_with(cohort, shift) for shift in (0, 3, 6)]
    # Of 27 voxels 27, 18 and 9 are left: Dice 1, 36 / 45 and 18 / 36, against a ceiling of 1.
    values = np.array([0, 0.8 - 1, 0.5 - 1])
    # Student's t for 95 % and 2 degrees of freedom, by a printed table: 4.303.
    half = 4.302653 * values.std(ddof=1) / np.sqrt(3)
    row = table_of(*replicates).loc["lung_ddpm"]
    assert (row["difference"], row["ci_low"], row["ci_high"]) == pytest.approx(
        (values.mean(), values.mean() - half, values.mean() + half)
    )
    assert (row["dice_mean"], row["dice_sd"], row["n_replicates"]) == pytest.approx((1 + values.mean(), 0, 3))
    assert (row["recall_difference"], row["recall_ci_low"], row["recall_ci_high"]) == (0, 0, 0)
    # Two seeds of one fold share its split: they are averaged, and folds are counted (12.706: 1 degree of freedom).
    folds = {"fold0_seed0": 0, "fold0_seed1": 0, "fold1_seed0": 1}
    of_folds = np.array([-0.1, -0.5])
    row = table_of(*replicates, folds=folds).loc["lung_ddpm"]
    assert (row["difference"], row["ci_low"]) == pytest.approx((-0.3, -0.3 - 12.7062 * of_folds.std(ddof=1) / 2**0.5))
    alone = table_of(replicates[1]).loc["lung_ddpm"]
    assert alone["difference"] == pytest.approx(-0.2)
    assert np.isnan(alone["ci_low"])


def test_samples_of_several_draws_are_cases_of_their_own(tmp_path):
    """Two replicates that judge different CT of one name, one with a nodule less."""
    judged = []
    for number in (0, 1):
        cohort = Cohort(tmp_path / f"draw-{number}")
        cohort.add_samples("lung_ddpm", ["case-1", "case-2"])
        cohort.add_samples("med_ddpm", ["case-1"], nodule=number == 0)
        metrics, lesions = cohort.judged(nodules_of)
        drawn = metrics["images"] == "synthetic"
        metrics.loc[drawn, "sha256"] += f"-{number}"
        lesions.loc[lesions["images"] == "synthetic", "sha256"] += f"-{number}"
        judged.append((metrics, lesions))
    table = table_of(*judged, generators=["lung_ddpm", "med_ddpm"])
    assert table["n_cases"].to_dict() == {REAL_CT: 3, "lung_ddpm": 4, "med_ddpm": 2}
    assert table["n_empty_cases"].to_dict() == {REAL_CT: 0, "lung_ddpm": 0, "med_ddpm": 1}
    assert table["n_lesions"].to_dict() == {REAL_CT: 3, "lung_ddpm": 4, "med_ddpm": 1}
    assert table["n_paired"].dropna().to_dict() == {"lung_ddpm": 4, "med_ddpm": 1}


def test_runs_have_a_row_for_each_generator_and_replicate(cohort):
    cohort.add_samples("lung_ddpm", ["case-1", "case-2"])
    metrics, lesions = replicate_with(cohort, 3)
    runs = runs_table(metrics.assign(replicate="fold0_seed0"), lesions.assign(replicate="fold0_seed0"))
    assert runs["generator"].tolist() == [REAL_CT, "lung_ddpm"]
    assert runs["dice"].tolist() == pytest.approx([1, 0.8])
    assert runs["recall"].tolist() == [1, 1]


def test_a_generator_without_samples_is_not_judged(cohort):
    cohort.add_samples("lung_ddpm", [])
    row = table_of(cohort.judged(nodules_of)).loc["lung_ddpm"]
    assert (row["n_cases"], row["note"]) == (0, "not judged")


def test_the_first_samples_of_the_plan_are_judged_and_the_references_they_are_from(cohort):
    cohort.add_samples("lung_ddpm", ["case-3", "case-2", "case-1", "case-1"], shards=2)
    cohort.add_samples("med_ddpm", ["case-1"])
    names = [case.who["case_id"] for case in cohort.chosen(parse_config({"label_fidelity": {"samples": 2}}))]
    assert names == ["case-1", "case-2", "case-3", "case-3_s000", "case-2_s001", "case-1_s000"]
    names = [case.who["case_id"] for case in cohort.chosen(parse_config({"label_fidelity": {"samples": 1}}))]
    assert names == ["case-1", "case-3", "case-3_s000", "case-1_s000"]


def test_samples_without_a_reference_are_judged(cohort):
    cohort.add_samples("maisi", [None], declared={"trained_on": "none", "reference": "none", "donors": "none"})
    metrics, _ = cohort.judged(nodules_of)
    row = metrics.iloc[-1]
    assert (row["reference"], row["own_layout"], row["patient_seen"], row["dice"]) == ("", False, False, 1)


def test_a_reference_that_the_segmenter_was_trained_on_is_refused_or_marked(cohort):
    cohort.add_case("case-5", "patient-0", "discovery+reference")
    with pytest.raises(InputError, match=r"cases\.tsv: gives patient-0 the role reference.*disjoint roles"):
        cohort.chosen()
    cohort.add_samples("lung_ddpm", ["case-5"])
    metrics, lesions = cohort.judged(nodules_of, parse_config({"roles": {"allow_shared_patients": True}}))
    assert metrics.loc[metrics["patient_seen"], "case_id"].tolist() == ["case-5", "case-5_s000"]
    note = table_of((metrics, lesions)).loc["lung_ddpm", "note"]
    assert note == "1 of 1 sample from patients that the segmenters were trained on"


def test_nodules_of_patients_that_the_segmenter_was_trained_on_are_marked(cohort):
    place = {"position_mm": (0.0, 0.0, 0.0), "volume_mm3": 30.0}
    for generator, number in (("copy_paste", 0), ("lung_ddpm", 1)):
        whose = {"case_id": f"case-{number}", "patient_id": f"patient-{number}"}
        cohort.add_samples(generator, ["case-1"], nodules=[whose | place])
    cohort.add_samples("maisi", ["case-1"], declared={"trained_on": ["patient-0"], "donors": ["case-0"]})
    metrics, lesions = cohort.judged(nodules_of)
    seen = dict(zip(metrics["generator"], metrics["nodules_seen"], strict=True))
    assert seen == {REAL_CT: False, "copy_paste": True, "lung_ddpm": False, "maisi": True}
    table = table_of((metrics, lesions), generators=["copy_paste"])
    assert table.loc["copy_paste", "note"].startswith("1 of 1 sample with nodules of patients")


def test_what_is_missing_or_changed_is_named(cohort, tmp_path, monkeypatch):
    folder = cohort.add_samples("lung_ddpm", ["case-1", "case-2"])
    sample = CaseFolder(folder / "case-2_s001")
    whole = sample.ct.read_bytes()
    write_volume(sample.ct, nothing_in(sample.ct))
    with pytest.raises(InputError, match=r"case-2_s001: does not match its hash in .*samples-1\.0-0\.tsv"):
        cohort.chosen()
    sample.ct.unlink()
    with pytest.raises(InputError, match=r"case-2_s001/ct\.nii\.gz: does not exist"):
        cohort.chosen()
    sample.ct.write_bytes(whole)
    sample.sample_record.unlink()
    with pytest.raises(InputError, match=r"case-2_s001/sample\.json: does not exist"):
        cohort.chosen()
    (cohort.arm / "arm.json").unlink()
    write_json(sample.sample_record, {"reference_case_id": "case-2"})
    with pytest.raises(InputError, match=r"arm\.json.*lungddpm compose"):
        cohort.chosen()


def test_a_layout_on_another_grid_is_refused(cohort):
    folder = cohort.add_samples("lung_ddpm", ["case-1"])
    sample = CaseFolder(folder / "case-1_s000")
    layout = read_volume(sample.layout)
    write_volume(sample.layout, Volume(layout.array, AFFINE @ np.diag([1.5, 1, 1, 1])))
    patient = {"source": "lung_ddpm", "sha256": sample.hash()}
    write_cases(cohort.tables[0], [case_row("case-1_s000", "patient-1", "synthetic", **patient)])
    with pytest.raises(InputError, match=r"case-1_s000: CT and labels have different affines"):
        cohort.judged(nodules_of)


def test_without_trained_weights_nothing_is_written(cohort, tmp_path):
    cohort.add_samples("lung_ddpm", ["case-1"])
    plan = {"arm_fingerprint": "f", "plans_sha256": "p", "nnunetv2": "2"}
    write_json(cohort.arm / "plan.json", plan)
    arm = {"arm": "real", "own_draws": False, "fingerprint": "f", "folds": [{"train": [], "val": []}], "cases": []}
    write_json(cohort.arm / "arm.json", arm)
    output = tmp_path / "label_fidelity"
    with pytest.raises(InputError, match=r"no finished training of this arm.*segment train"):
        run_label_fidelity(CONFIG, cohort.arm, 0, 0, cohort.table, cohort.tables, output, "cpu")
    assert not output.exists()
    assert label_fidelity.METRICS == "metrics.csv"
