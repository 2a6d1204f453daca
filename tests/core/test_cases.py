"""The contract of cases: tables and folders, and every way to break it."""

import numpy as np
import pandas as pd
import pytest

from lungddpm.config.loading import parse_config
from lungddpm.config.models import Config
from lungddpm.core.cases import COLUMNS, NODULE_COLUMNS, check_case, read_cases, usable, write_cases
from lungddpm.core.errors import ExcludedCaseError, InputError
from lungddpm.core.files import write_json
from lungddpm.core.volume import Volume
from lungddpm.layouts.collect import run_collect


def row(case_id, role="discovery", status="ok", **values):
    numbers = {column: 1 for column in COLUMNS if column.startswith(("size", "spacing")) or column == "n_nodules"}
    texts = {column: "" for column in COLUMNS if column not in numbers}
    return {**texts, **numbers, "case_id": case_id, "role": role, "status": status, "path": case_id, **values}


def test_tables_round_trip_with_text_as_text(tmp_path):
    write_cases(tmp_path / "cases.tsv", [row("0012", patient_id="NA", spacing_x_mm=0.703125, n_nodules=3)])
    table = read_cases(tmp_path / "cases.tsv")
    assert table.loc[0, ["case_id", "patient_id", "reason"]].tolist() == ["0012", "NA", ""]
    assert (table.loc[0, "spacing_x_mm"], table.loc[0, "n_nodules"]) == (0.703125, 3)


def test_usable_knows_roles_and_exclusions(tmp_path):
    rows = [row("a"), row("b", role="test"), row("c", status="excluded"), row("d", role="reference+test")]
    write_cases(tmp_path / "cases.tsv", rows)
    table = read_cases(tmp_path / "cases.tsv")
    assert [usable(table, role)["case_id"].tolist() for role in ("discovery", "reference", "test")] == [
        ["a"], ["d"], ["b", "d"],
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "case_id\trole\na\ttest\n", "\x00\x01"])
def test_damaged_tables_are_reported(tmp_path, text):
    path = tmp_path / "cases.tsv"
    path.write_text(text)
    with pytest.raises(InputError, match=r"cases.tsv.*Delete it"):
        read_cases(path)


def volumes(ct=None, layout=None, affine=None):
    ct = np.arange(64, dtype=np.int16).reshape(4, 4, 4) if ct is None else ct
    layout = np.zeros((4, 4, 4), np.uint8) if layout is None else layout
    return Volume(ct, np.eye(4)), Volume(layout, np.eye(4) if affine is None else affine)


def test_a_good_case_passes():
    check_case(*volumes(), "case")


BROKEN = {
    "shape": (volumes(layout=np.zeros((4, 4, 5), np.uint8)), "differ in shape"),
    "affine": (volumes(affine=np.diag([1, 1, 2, 1])), "different affines"),
    "NaN": (volumes(ct=np.full((4, 4, 4), np.nan)), "NaN"),
    "constant": (volumes(ct=np.full((4, 4, 4), -1000, np.int16)), r"constant \(-1000 HU\)"),
    "labels": (volumes(layout=np.full((4, 4, 4), 7, np.uint8)), "labels contain 7"),
}


@pytest.mark.parametrize(("pair", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_cases_are_excluded_with_the_reason(pair, message):
    with pytest.raises(ExcludedCaseError, match=message) as caught:
        check_case(*pair, "case_1")
    assert str(caught.value).startswith("case_1: ")


# ---------------------------------------------------------------- collecting the shards

FIGURES = dict.fromkeys(NODULE_COLUMNS[3:]) | {
    "readers": 2,
    "flagged": False,
    "malignancy": 3.5,
    "notes": "open contours: 1",
}


def shard_table(path, data_set="internal", **rows):
    """A case table of (role, nodules, reason) by case id, and the record of each case that is not excluded."""
    numbers = {f"{what}_{axis}{unit}": 1 for axis in "xyz" for what, unit in (("size", ""), ("spacing", "_mm"))}
    write_cases(
        path,
        [
            {
                **numbers, "case_id": name, "patient_id": f"0{name}", "source": "fake", "data_set": data_set,
                "role": role, "series_uid": name, "n_nodules": nodules, "status": "excluded" if reason else "ok",
                "reason": reason, "path": "" if reason else name, "sha256": "",
            }
            for name, (role, nodules, reason) in rows.items()
        ],
    )  # fmt: skip
    for name, (_, nodules, reason) in rows.items():
        if not reason:
            figures = [FIGURES | {"volume_mm3": 10.0 * (number + 1)} for number in range(nodules)]
            write_json(path.parent / name / "case.json", {"qc": {"nodules": figures}})
    return path


def three_shards(folder):
    return [
        shard_table(folder / "0.tsv", a=("discovery", 1, ""), c=("test", 1, "")),
        shard_table(folder / "1.tsv", b=("reference", 2, ""), d=("test", 0, "bad"), e=("test", 0, "")),
        shard_table(folder / "2.tsv"),
    ]


def test_shards_are_merged_by_case_id(tmp_path):
    run_collect(Config(), three_shards(tmp_path), tmp_path / "cases.tsv")
    assert read_cases(tmp_path / "cases.tsv")["case_id"].tolist() == ["a", "b", "c", "d", "e"]


def test_the_nodules_of_usable_cases_are_listed(tmp_path):
    run_collect(Config(), three_shards(tmp_path), tmp_path / "cases.tsv")
    table = pd.read_csv(tmp_path / "nodules.tsv", sep="\t", dtype={"patient_id": str})
    assert table.columns.tolist() == NODULE_COLUMNS
    assert table[["case_id", "patient_id", "nodule", "volume_mm3"]].to_numpy().tolist() == [
        ["a", "0a", 1, 10.0], ["b", "0b", 1, 10.0], ["b", "0b", 2, 20.0], ["c", "0c", 1, 10.0],
    ]  # fmt: skip
    assert table["flagged"].dtype == bool
    assert (table["malignancy"] == 3.5).all()
    assert table["subtlety"].isna().all()
    assert (table["notes"] == "open contours: 1").all()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda path: path.unlink(), "does not exist"),
        (lambda path: path.write_text('{"qc": {}}'), "does not describe the case's nodules"),
    ],
)
def test_a_missing_or_damaged_record_is_reported(tmp_path, damage, problem):
    tables = three_shards(tmp_path)
    damage(tmp_path / "b" / "case.json")
    with pytest.raises(InputError, match=rf"b/case.json: {problem}.*Delete the table of its case"):
        run_collect(Config(), tables, tmp_path / "cases.tsv")
    assert not (tmp_path / "cases.tsv").exists()
    assert not (tmp_path / "nodules.tsv").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"t": ("test", 1, "only one lung")}, r"roles.test.*no usable case is left.*only one lung \(1 x\)"),
        ({"t": ("test", 0, "")}, r"roles.test.*no usable case with a nodule is left"),
        ({}, r"roles.test.*excluded: none"),
    ],
)
def test_a_role_without_usable_cases_is_reported(tmp_path, rows, message):
    others = {"a": ("discovery", 1, ""), "b": ("reference", 1, "")}
    table = shard_table(tmp_path / "0.tsv", **others, **rows)
    with pytest.raises(InputError, match=message):
        run_collect(Config(), [table], tmp_path / "cases.tsv")
    assert not (tmp_path / "cases.tsv").exists()
    assert not (tmp_path / "nodules.tsv").exists()


@pytest.mark.parametrize(
    ("own", "externals", "message"),
    [
        (1, {}, r"external_tests\.ours: no usable case is left; excluded: none"),
        (1, {"x": ("test", 0, "")}, r"external_tests\.ours: no usable case with a nodule is left"),
        (1, {"x": ("", 0, "cut lungs")}, r"external_tests\.ours: no usable case is left; excluded: cut lungs \(1 x\)"),
        # An external test set does not stand for the test patients of `source`.
        (0, {"x": ("test", 1, "")}, r"roles\.test.*no usable case with a nodule"),
    ],
)
def test_each_test_set_has_a_nodule_of_its_own(tmp_path, own, externals, message):
    others = {"a": ("discovery", 1, ""), "b": ("reference", 1, ""), "c": ("test", own, "")}
    tables = [shard_table(tmp_path / "0.tsv", **others), shard_table(tmp_path / "1.tsv", "ours", **externals)]
    config = parse_config({"external_tests": {"ours": {"kind": "lidc", "path": "x"}}})
    with pytest.raises(InputError, match=message):
        run_collect(config, tables, tmp_path / "cases.tsv")


def test_all_test_sets_are_in_one_table(tmp_path):
    external = shard_table(tmp_path / "ours.tsv", "ours", bb=("test", 1, ""))
    config = parse_config({"external_tests": {"ours": {"kind": "lidc", "path": "x"}}})
    run_collect(config, [*three_shards(tmp_path), external], tmp_path / "cases.tsv")
    table = read_cases(tmp_path / "cases.tsv")
    assert table["case_id"].tolist() == ["a", "b", "bb", "c", "d", "e"]
    assert usable(table, "test")["data_set"].tolist() == ["ours", "internal", "internal"]
