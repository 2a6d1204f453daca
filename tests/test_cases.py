"""The contract of cases: tables and folders, and every way to break it."""

import numpy as np
import pytest

from lungddpm.cases import COLUMNS, check_case, read_cases, usable, write_cases
from lungddpm.errors import ExcludedCaseError, InputError
from lungddpm.volume import Volume


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
def test_damaged_tables_are_told(tmp_path, text):
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
    "labels": (volumes(layout=np.full((4, 4, 4), 7, np.uint8)), "labels hold 7"),
}


@pytest.mark.parametrize(("pair", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_cases_are_excluded_with_the_reason(pair, message):
    with pytest.raises(ExcludedCaseError, match=message) as caught:
        check_case(*pair, "case_1")
    assert str(caught.value).startswith("case_1: ")
