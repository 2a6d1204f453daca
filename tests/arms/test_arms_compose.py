"""Composed arms: what nnU-Net will read, compared with the cases that went in."""

import errno
import json
import os
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest

from lungddpm.arms.compose import DATASET, draw_record, first_samples, run_compose, run_compose_draw
from lungddpm.config.loading import parse_config
from lungddpm.core.cases import CaseFolder, read_cases, write_cases
from lungddpm.core.errors import ConfigError, InputError, LeakError
from lungddpm.core.files import write_json
from lungddpm.core.labels import Label
from lungddpm.core.volume import Volume, read_volume, write_volume

SHARED_DRAW = {"draw_per_replicate": False}
CONFIG = parse_config({"segmentation": {"n_folds": 2, "folds": [0, 1]}, "synthesis": SHARED_DRAW})
ROLES = ["discovery"] * 4 + ["reference"] * 2 + ["test"] * 2


@pytest.fixture
def cohort(tmp_path, write_blob_case) -> Path:
    """Eight patients (four discovery, two reference, two test) and two shards of three samples."""
    rows = [write_blob_case(tmp_path / "cases" / f"P{i}_0", f"P{i}", role, size=8) for i, role in enumerate(ROLES)]
    write_cases(tmp_path / "cases" / "cases.tsv", rows)
    for shard in range(2):
        folder = tmp_path / "synthetic"
        rows = [
            write_blob_case(
                folder / f"s{number}", "P4", source="lung_ddpm", size=8, reference_case_id="P4_0", number=number
            )
            for number in (shard, shard + 2, shard + 4)
        ]
        write_cases(folder / f"samples-{shard}.tsv", rows)
    return tmp_path


def compose(cohort: Path, arm: str, config=CONFIG) -> tuple[dict, Path]:
    tables = [cohort / "synthetic" / f"samples-{shard}.tsv" for shard in range(2)]
    output = cohort / "arms" / arm
    run_compose(config, arm, cohort / "cases" / "cases.tsv", tables, output)
    return json.loads((output / "arm.json").read_text()), output / "nnUNet_raw" / DATASET


def edit(table: Path, case_id: str, **values: str) -> None:
    rows = read_cases(table)
    rows.loc[rows["case_id"] == case_id, list(values)] = list(values.values())
    write_cases(table, rows)


def test_real_links_the_images_and_maps_nodules_to_one(cohort):
    arm, raw = compose(cohort, "real")
    assert [case["case_id"] for case in arm["cases"]] == ["P0_0", "P1_0", "P2_0", "P3_0"]
    for case in arm["cases"]:
        image, label = (
            raw / kind for kind in (f"imagesTr/{case['name']}_0000.nii.gz", f"labelsTr/{case['name']}.nii.gz")
        )
        assert not image.readlink().is_absolute()
        original = cohort / "cases" / case["case_id"]
        assert image.resolve() == (original / "ct.nii.gz").resolve()
        layout, written = read_volume(original / "layout.nii.gz"), read_volume(label)
        assert ((layout.array == Label.NODULE) == (written.array == 1)).all()
        assert written.same_grid(layout)
        assert case["nodule_voxels"] == written.array.sum() > 0
    assert json.loads((raw / "splits_final.json").read_text()) == arm["folds"]
    assert json.loads((raw / "dataset.json").read_text())["numTraining"] == 4
    assert arm["leak_guard"]["disjoint"]
    assert arm["leak_guard"]["test_patients"] == ["P6", "P7"]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP], ids=["exFAT", "SMB"])
def test_without_symbolic_links_the_images_are_copies(cohort, monkeypatch, caplog, number):
    def symlink(*_arguments, **_options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "symlink", symlink)
    monkeypatch.setenv("LUNGDDPM_WARNED_LINKS", "1")
    monkeypatch.delenv("LUNGDDPM_WARNED_LINKS")
    arm, raw = compose(cohort, "real")
    for case in arm["cases"]:
        image = raw / f"imagesTr/{case['name']}_0000.nii.gz"
        assert not image.is_symlink()
        assert image.read_bytes() == (cohort / "cases" / case["case_id"] / "ct.nii.gz").read_bytes()
    assert caplog.text.count("has no symbolic links") == 1


def test_repeated_cases_are_never_copies_of_validation_cases(cohort):
    arm, _ = compose(cohort, "real+real")
    case_of = {case["name"]: case["case_id"] for case in arm["cases"]}
    real, _ = compose(cohort, "real")
    for fold, real_fold in zip(arm["folds"], real["folds"], strict=True):
        assert fold["val"] == real_fold["val"]
        assert sorted(case_of[name] for name in fold["train"]) == sorted(2 * real_fold["train"])


def test_doses_are_nested_and_synthetic_cases_are_only_trained_on(cohort):
    added = {}
    for dose in (0.25, 0.5, 1.0, 1.5):
        arm, _ = compose(cohort, f"real+lung_ddpm@{dose}")
        added[dose] = [case["case_id"] for case in arm["cases"] if case["source"] == "lung_ddpm"]
        for fold in arm["folds"]:
            assert set(added[dose]) <= set(fold["train"])
            assert all(name.startswith("P") for name in fold["val"])
    assert added == {0.25: ["s0"], 0.5: ["s0", "s1"], 1.0: ["s0", "s1", "s2", "s3"], 1.5: [f"s{i}" for i in range(6)]}
    with pytest.raises(InputError, match="needs 8, but there are 6"):
        compose(cohort, "real+lung_ddpm@2.0")
    with pytest.raises(ConfigError, match="less than one case"):
        compose(cohort, "real+lung_ddpm@0.1")


def test_synthetic_alone_is_validated_on_the_same_real_cases(cohort):
    real, _ = compose(cohort, "real")
    arm, raw = compose(cohort, "synthetic:lung_ddpm")
    assert [case["case_id"] for case in arm["cases"] if case["trained_on"]] == ["s0", "s1", "s2", "s3"]
    assert all(case["patient_id"] and case["sha256"] for case in arm["cases"])
    assert all(case["trained_on"] for case in real["cases"])
    for fold, real_fold in zip(arm["folds"], real["folds"], strict=True):
        assert fold == {"train": ["s0", "s1", "s2", "s3"], "val": real_fold["val"]}
        # nnU-Net finds the files that it is to use.
        for name in fold["train"] + fold["val"]:
            assert (raw / f"imagesTr/{name}_0000.nii.gz").resolve().exists()
            assert (raw / f"labelsTr/{name}.nii.gz").exists()


def test_a_sample_that_failed_is_named(cohort):
    tables = [cohort / "synthetic" / f"samples-{shard}.tsv" for shard in range(2)]
    edit(tables[1], "s3", status="excluded", reason="the CT is constant")
    assert len(first_samples(tables, 3)) == 3
    with pytest.raises(InputError, match="s3 .the CT is constant"):
        first_samples(tables, 4)


def test_composing_again_leaves_nothing_stale_and_changes_nothing(cohort):
    first, raw = compose(cohort, "real")
    (raw / "labelsTr" / "stale.nii.gz").touch()
    results = cohort / "arms" / "real" / "nnUNet_results" / "keep"
    results.mkdir(parents=True)
    second, raw = compose(cohort, "real")
    assert first == second
    assert not (raw / "labelsTr" / "stale.nii.gz").exists()
    assert results.exists()
    assert sorted(path.name for path in (cohort / "arms" / "real").iterdir()) == [
        ".lock",
        "arm.json",
        "nnUNet_raw",
        "nnUNet_results",
    ]


def test_changed_files_are_refused(cohort):
    ct = cohort / "cases" / "P1_0" / "ct.nii.gz"
    ct.write_bytes((cohort / "cases" / "P2_0" / "ct.nii.gz").read_bytes())
    with pytest.raises(InputError, match="does not match its hash"):
        compose(cohort, "real")


def test_a_cohort_without_nodules_or_with_too_few_patients_is_refused(cohort):
    table = cohort / "cases" / "cases.tsv"
    for i in range(4):
        path = cohort / "cases" / f"P{i}_0" / "layout.nii.gz"
        layout = read_volume(path)
        write_volume(path, layout.like(np.where(layout.array == Label.NODULE, Label.LUNG, layout.array)))
        edit(table, f"P{i}_0", sha256=CaseFolder(path.parent).hash())
    with pytest.raises(InputError, match="no discovery case with a nodule"):
        compose(cohort, "real")
    for i in range(1, 4):
        edit(table, f"P{i}_0", role="reference")
    with pytest.raises(ConfigError, match="1 usable discovery patient"):
        compose(cohort, "real")


class TestLeaks:
    """Every known way for a test patient to get into an arm, whatever the tables claim."""

    def test_a_sample_whose_file_names_a_test_patient(self, cohort):
        write_json(cohort / "synthetic" / "s1" / "sample.json", {"reference_case_id": "P4_0", "nodules": ["P6_0"]})
        with pytest.raises(LeakError, match="P6 in s1"):
            compose(cohort, "real+lung_ddpm@1.0")
        compose(cohort, "real+lung_ddpm@0.25")

    def test_a_table_that_was_edited_to_hide_the_test_patient(self, cohort):
        table = cohort / "cases" / "cases.tsv"
        edit(table, "P6_0", role="discovery", patient_id="P6")
        edit(table, "P0_0", role="test", patient_id="P6")
        with pytest.raises(LeakError, match="P6 in P6_0"):
            compose(cohort, "real")

    def test_a_row_that_points_to_a_test_patients_folder(self, cohort):
        table = cohort / "cases" / "cases.tsv"
        rows = read_cases(table)
        edit(table, "P0_0", path="P7_0", sha256=rows.set_index("case_id").loc["P7_0", "sha256"])
        with pytest.raises(LeakError, match="P7 in P0_0"):
            compose(cohort, "real")

    def test_a_copy_of_a_test_patient_under_another_name(self, cohort, write_blob_case):
        table = cohort / "cases" / "cases.tsv"
        row = write_blob_case(cohort / "cases" / "Q_0", "Q", "discovery", size=8)
        for name in ("ct.nii.gz", "layout.nii.gz"):
            (cohort / "cases" / "Q_0" / name).write_bytes((cohort / "cases" / "P7_0" / name).read_bytes())
        row["sha256"] = read_cases(table).set_index("case_id").loc["P7_0", "sha256"]
        write_cases(table, pd.concat([read_cases(table), pd.DataFrame([row])]))
        with pytest.raises(LeakError, match="P7 in Q_0"):
            compose(cohort, "real")

    def test_numeric_names_and_folders_are_not_a_leak(self, cohort):
        # Patients called P0, P1, ..., in folders that bear other patients' names.
        for i in range(len(ROLES)):
            record = {"case_id": f"P{i}_0", "inputs": ["P6/P7_0/a.dcm", "P6"], "versions": {"P7": "P7"}}
            write_json(cohort / "cases" / f"P{i}_0" / "case.json", record)
        arm, _ = compose(cohort, "real+lung_ddpm@1.0")
        assert arm["leak_guard"]["training_patients"] == ["P0", "P1", "P2", "P3", "P4"]

    def test_a_sample_that_was_made_from_a_test_patients_files(self, cohort):
        sha256 = read_cases(cohort / "cases" / "cases.tsv").set_index("case_id").loc["P6_0", "sha256"]
        record = {"reference_case_id": "P4_0", "reference_sha256": sha256}
        write_json(cohort / "synthetic" / "s0" / "sample.json", record)
        with pytest.raises(LeakError, match="P6 in s0"):
            compose(cohort, "real+lung_ddpm@1.0")

    def test_a_reference_that_is_a_test_patient_under_another_name(self, cohort):
        for name in ("P4_0", "P7_0"):
            write_json(cohort / "cases" / name / "case.json", {"case_id": name, "scan_sha256": "the same"})
        compose(cohort, "real")
        with pytest.raises(LeakError, match="P7 in s0, s1, s2"):
            compose(cohort, "real+lung_ddpm@1.0")

    def test_the_series_of_a_test_patient_under_another_name(self, cohort):
        table = cohort / "cases" / "cases.tsv"
        edit(table, "P0_0", series_uid="1.2.3")
        edit(table, "P7_0", series_uid="1.2.3")
        with pytest.raises(LeakError, match="P7 in P0_0"):
            compose(cohort, "real")

    def test_a_copy_with_other_compression(self, cohort):
        table, copy = cohort / "cases" / "cases.tsv", cohort / "cases" / "P0_0"
        original = nibabel.load(cohort / "cases" / "P7_0" / "ct.nii.gz")
        affine = original.affine + 1e-4
        nibabel.save(nibabel.Nifti1Image(np.asarray(original.dataobj), affine), copy / "ct.nii.gz")
        layout = read_volume(copy / "layout.nii.gz")
        write_volume(copy / "layout.nii.gz", Volume(layout.array, affine))
        edit(table, "P0_0", sha256=CaseFolder(copy).hash())
        with pytest.raises(LeakError, match="P7 in P0_0"):
            compose(cohort, "real")

    def test_a_sample_without_provenance(self, cohort):
        write_json(cohort / "synthetic" / "s0" / "sample.json", {"reference_case_id": "someone else"})
        with pytest.raises(InputError, match="does not name a known patient"):
            compose(cohort, "real+lung_ddpm@1.0")

    def test_a_sample_of_another_system_declares_its_patients(self, cohort):
        path = cohort / "synthetic" / "s0" / "sample.json"
        nobody = {"reference": "none", "donors": "none", "trained_on": "none"}
        write_json(path, {"reference_case_id": None, "declared": nobody})
        compose(cohort, "synthetic:lung_ddpm")
        write_json(path, {"reference_case_id": None, "declared": nobody | {"trained_on": ["elsewhere"]}})
        with pytest.raises(InputError, match="does not name a known patient"):
            compose(cohort, "synthetic:lung_ddpm")
        write_json(path, {"reference_case_id": None, "declared": nobody | {"trained_on": ["P7"]}})
        with pytest.raises(LeakError, match="P7 in s0"):
            compose(cohort, "synthetic:lung_ddpm")

    def test_no_arm_is_left_behind(self, cohort):
        compose(cohort, "real+lung_ddpm@1.0")
        write_json(cohort / "synthetic" / "s1" / "sample.json", {"reference_case_id": "P6_0"})
        with pytest.raises(LeakError):
            compose(cohort, "real+lung_ddpm@1.0")
        assert not (cohort / "arms" / "real+lung_ddpm@1.0" / "arm.json").exists()

    def test_shared_patients_pass_where_they_are_allowed_and_the_proof_names_them(self, cohort):
        config = parse_config(
            {
                "roles": {"allow_shared_patients": True},
                "segmentation": {"n_folds": 2, "folds": [0]},
                "synthesis": SHARED_DRAW,
            }
        )
        edit(cohort / "cases" / "cases.tsv", "P6_0", role="discovery+test")
        with pytest.raises(LeakError):
            compose(cohort, "real")
        arm, _ = compose(cohort, "real", config)
        assert not arm["leak_guard"]["disjoint"]
        assert arm["leak_guard"]["shared_patients"] == ["P6"]


class TestFewerRealCases:
    """Arms of a subset of the real cases."""

    NUMBERS = {"real_cases": [2, "all"], "doses": [0.5, 1.0]}

    def config(self, **arms):
        return parse_config(
            {"arms": self.NUMBERS | arms, "segmentation": {"n_folds": 2, "folds": [0, 1]}, "synthesis": SHARED_DRAW}
        )

    def test_all_arms_of_a_number_have_the_same_real_cases_and_folds(self, cohort):
        config = self.config()
        arms = {name: compose(cohort, name, config)[0] for name in ("real2", "real2+real", "real2+lung_ddpm@1.0")}
        real = {name: [c["case_id"] for c in arm["cases"] if c["source"] == "phantom"] for name, arm in arms.items()}
        assert len(real["real2"]) == 2
        assert real["real2+real"] == 2 * real["real2"]
        assert real["real2+lung_ddpm@1.0"] == real["real2"]
        assert set(real["real2"]) < {case["case_id"] for case in compose(cohort, "real", config)[0]["cases"]}
        # A dose is a multiple of these real cases.
        assert [case["case_id"] for case in arms["real2+lung_ddpm@1.0"]["cases"][2:]] == ["s0", "s1"]
        for arm in arms.values():
            assert [fold["val"] for fold in arm["folds"]] == [fold["val"] for fold in arms["real2"]["folds"]]

    def test_a_fold_that_a_subset_cannot_have_is_refused(self, cohort):
        config = parse_config({"arms": self.NUMBERS, "segmentation": {"n_folds": 3, "folds": [0, 2]}})
        with pytest.raises(ConfigError, match=r"names fold 2, but with 2 usable.*raise arms\.real_cases"):
            compose(cohort, "real2", config)
        with pytest.raises(ConfigError, match=r"arms\.real_cases: names 4, but there are 4"):
            compose(cohort, "real4", config)

    def test_a_subset_without_a_nodule_is_refused(self, cohort):
        for case_id in [case["case_id"] for case in compose(cohort, "real2", self.config())[0]["cases"]]:
            path = cohort / "cases" / case_id / "layout.nii.gz"
            layout = read_volume(path)
            write_volume(path, layout.like(np.where(layout.array == Label.NODULE, Label.LUNG, layout.array)))
            edit(cohort / "cases" / "cases.tsv", case_id, sha256=CaseFolder(path.parent).hash())
        with pytest.raises(InputError, match=r"no discovery case with a nodule among the 2 of arms\.real_cases"):
            compose(cohort, "real2", self.config())
        compose(cohort, "real", self.config())

    @pytest.mark.parametrize(
        "provenance",
        [
            {"trained_on": ["{patient}"]},
            {"nodules": [{"case_id": "{patient}_0", "patient_id": "{patient}"}]},
            {"declared": {"trained_on": "none", "donors": ["{patient}"]}},
        ],
        ids=["trained on", "nodule of", "declared donor"],
    )
    def test_nothing_of_the_other_discovery_patients_may_be_in_a_sample(self, cohort, provenance):
        config = self.config()
        inside = {case["patient_id"] for case in compose(cohort, "real2", config)[0]["cases"]}
        (outsider, *_) = sorted({f"P{i}" for i in range(4)} - inside)
        record = json.loads(json.dumps(provenance).replace("{patient}", outsider))
        write_json(cohort / "synthetic" / "s1" / "sample.json", {"reference_case_id": "P4_0", **record})
        with pytest.raises(LeakError, match=rf"beyond the real cases of this arm.*{outsider} in s1.*learn_from: all"):
            compose(cohort, "real2+lung_ddpm@1.0", config)
        compose(cohort, "real2+lung_ddpm@0.5", config)
        compose(cohort, "real+lung_ddpm@1.0", config)
        compose(cohort, "real2+lung_ddpm@1.0", self.config(generators_learn_from="all"))


class TestDraws:
    """Replicates with samples of their own."""

    CONFIG = parse_config({"segmentation": {"n_folds": 2, "folds": [0, 1]}})
    ARM = "real+lung_ddpm@1.0"

    def compose_draw(self, cohort, replicate, first=0):
        table = cohort / "synthetic" / f"{replicate}.tsv"
        rows = pd.concat([read_cases(cohort / "synthetic" / f"samples-{shard}.tsv") for shard in range(2)])
        write_cases(table, rows.sort_values("case_id").iloc[first:])
        folder = cohort / "arms" / self.ARM
        run_compose_draw(self.CONFIG, self.ARM, replicate, cohort / "cases" / "cases.tsv", [table], folder)
        record = draw_record(folder, replicate)
        return json.loads(record.read_text()), record.parent

    def test_a_draw_is_next_to_the_cases_that_all_share(self, cohort):
        shared, raw = compose(cohort, self.ARM, self.CONFIG)
        real, _ = compose(cohort, "real", self.CONFIG)
        assert (shared["own_draws"], real["own_draws"]) == (True, False)
        assert (shared["cases"], shared["folds"]) == (real["cases"], real["folds"])
        before = {path: path.stat().st_mtime_ns for path in raw.rglob("*")}
        draw, folder = self.compose_draw(cohort, "fold0_seed0")
        assert [case["case_id"] for case in draw["cases"]] == ["s0", "s1", "s2", "s3"]
        for case in draw["cases"]:
            assert (folder / f"imagesTr/{case['name']}_0000.nii.gz").resolve().exists()
            assert read_volume(folder / f"labelsTr/{case['name']}.nii.gz").array.sum() == case["nodule_voxels"]
        assert draw["leak_guard"]["disjoint"]
        assert draw["leak_guard"]["n_training_cases"] == 8
        assert draw["arm_fingerprint"] == shared["fingerprint"]
        first = (folder / "draw.json").read_bytes()
        other, _ = self.compose_draw(cohort, "fold1_seed0", first=2)
        assert [case["case_id"] for case in other["cases"]] == ["s2", "s3", "s4", "s5"]
        assert (folder / "draw.json").read_bytes() == first
        assert {path: path.stat().st_mtime_ns for path in raw.rglob("*")} == before

    def test_synthetic_alone_shares_no_training_case(self, cohort):
        arm, _ = compose(cohort, "synthetic:lung_ddpm", self.CONFIG)
        assert [fold["train"] for fold in arm["folds"]] == [[], []]
        assert all(fold["val"] for fold in arm["folds"])

    def test_a_draw_is_guarded(self, cohort):
        compose(cohort, self.ARM, self.CONFIG)
        write_json(cohort / "synthetic" / "s1" / "sample.json", {"reference_case_id": "P4_0", "trained_on": ["P6"]})
        with pytest.raises(LeakError, match="P6 in s1"):
            self.compose_draw(cohort, "fold0_seed0")
        assert not draw_record(cohort / "arms" / self.ARM, "fold0_seed0").exists()

    def test_an_arm_without_draws_takes_none(self, cohort):
        compose(cohort, "real", self.CONFIG)
        with pytest.raises(ConfigError, match="the replicates of real share their cases"):
            run_compose_draw(
                self.CONFIG, "real", "fold0_seed0", cohort / "cases" / "cases.tsv", [], cohort / "arms" / "real"
            )
