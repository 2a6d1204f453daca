"""Fetching LIDC-IDRI: the plan against facts of the published index, the transfer against one made here."""

import sys

import pandas as pd
import pytest
import typer.testing
import yaml

from lungddpm import cli
from lungddpm.config.loading import load_config
from lungddpm.core.errors import InputError, OutputError, UserError
from lungddpm.operations import fetch

READINGS = "dicom_lidc_idri_nodules"


def series(patient, modality="CT", uid="1", files=2, size=300, result=None):
    study = f"{patient}-study"
    return ("lidc_idri", result, patient, study, f"{patient}.{modality}.{uid}", modality, files, size / 10**6)


INDEX = pd.DataFrame(
    [
        series("P-3"),
        series("P-3", "SEG", result=READINGS, files=1, size=40),
        series("P-1"),
        series("P-1", "DX"),
        series("P-1", "SEG", result=READINGS, files=1, size=50),
        series("P-1", "SEG", "2", result=READINGS, files=1, size=60),
        series("P-1", "SEG", "3", result="qin_lungct_seg"),
        series("P-1", "SR", result=READINGS),
        series("P-2"),
    ],
    columns=list(fetch._COLUMNS.values()),
)


def names(items):
    return [item.series for item in items]


class Transfer:
    """What a download would leave, of files of equal size; it can be stopped, or leave less."""

    def __init__(self, index=INDEX):
        self.index, self.calls, self.stop_at, self.short = index.set_index("series"), [], None, set()

    def __call__(self, wanted, folder):
        self.calls.append(list(wanted))
        for uid in wanted:
            row = self.index.loc[uid]
            target = folder / row["patient"] / row["study"] / f"{row['modality']}_{uid}"
            target.mkdir(parents=True)
            sizes = [round(row["megabytes"] * 10**6) // row["files"]] * row["files"]
            for number, size in enumerate(sizes):
                (target / f"{number}.dcm").write_bytes(bytes(size - (uid in self.short)))
                if uid == self.stop_at:
                    raise KeyboardInterrupt


def test_a_number_takes_patients_with_nodules_in_order():
    assert names(fetch.select(INDEX, "1")) == ["P-1.CT.1", "P-1.SEG.1", "P-1.SEG.2"]
    assert {item.patient for item in fetch.select(INDEX, "2")} == {"P-1", "P-3"}
    assert fetch.select(INDEX, "99") == fetch.select(INDEX, "all") == fetch.select(INDEX, "2")


def test_patients_by_name_need_no_nodule():
    items = fetch.select(INDEX, "P-2, P-3,P-2")
    assert names(items) == ["P-2.CT.1", "P-3.CT.1", "P-3.SEG.1"]
    plan = fetch.describe(items, items[:1], "out")
    assert plan == [
        "2 patients: 2 CT series, 1 SEG object, 5 files, 0.00 GB",
        "here already: 2 series; to fetch: 0.00 GB into out",
        "without a nodule of at least 3 mm, so the scan will not be used: P-2",
    ]


@pytest.mark.parametrize(
    ("patients", "problem"),
    [("P-9", "not in LIDC-IDRI"), ("0", "does not name a patient"), (",", "does not name a patient")],
)
def test_unknown_patients_are_refused(patients, problem):
    with pytest.raises(InputError, match=problem):
        fetch.select(INDEX, patients)


def test_it_resumes_where_it_was_stopped(tmp_path):
    items, transfer = fetch.select(INDEX, "2"), Transfer()
    transfer.stop_at = "P-3.CT.1"
    with pytest.raises(KeyboardInterrupt):
        fetch.fetch(items, tmp_path, transfer)
    transfer.stop_at = None
    fetch.fetch(items, tmp_path, transfer)
    assert transfer.calls == [
        ["P-1.CT.1", "P-1.SEG.1", "P-1.SEG.2"], ["P-3.CT.1", "P-3.SEG.1"], ["P-3.CT.1", "P-3.SEG.1"],
    ]  # fmt: skip
    assert all(item.is_complete(tmp_path) for item in items)
    fetch.fetch(items, tmp_path, transfer)
    assert len(transfer.calls) == 3


def test_sizes_that_differ_are_an_error_and_are_fetched_again(tmp_path):
    items, transfer = fetch.select(INDEX, "1"), Transfer()
    transfer.short = {"P-1.SEG.2"}
    with pytest.raises(UserError, match="SEG_P-1.SEG.2: 1 of 3 series are incomplete"):
        fetch.fetch(items, tmp_path, transfer)
    transfer.short = set()
    fetch.fetch(items, tmp_path, transfer)
    assert transfer.calls[-1] == ["P-1.SEG.2"]


def test_without_a_network_it_stops_at_the_first_patient(tmp_path):
    calls = []
    with pytest.raises(UserError, match="P-1: none of its files arrived. Check the network"):
        fetch.fetch(fetch.select(INDEX, "2"), tmp_path, lambda wanted, folder: calls.append(wanted))
    assert calls == [["P-1.CT.1", "P-1.SEG.1", "P-1.SEG.2"]]


def test_a_later_patient_without_files_does_not_stop_the_others(tmp_path):
    items, transfer = fetch.select(INDEX, "P-1,P-2,P-3"), Transfer()

    def without_the_second(wanted, folder):
        if wanted != ["P-2.CT.1"]:
            transfer(wanted, folder)

    with pytest.raises(UserError, match="1 of 6 series are incomplete"):
        fetch.fetch(items, tmp_path, without_the_second)
    assert [item.series for item in items if not item.is_complete(tmp_path)] == ["P-2.CT.1"]


def test_a_disk_that_is_too_small(tmp_path):
    item = fetch.Item("P", "1", "2", "CT", 1, 10**18)
    with pytest.raises(OutputError, match="1000000000.0 GB are needed"):
        fetch.fetch([item], tmp_path, Transfer())


def test_the_config_names_the_folder_whatever_it_is_called(tmp_path):
    folder = tmp_path / "a: #ö 'b'"
    folder.mkdir()
    path = fetch.write_config(folder)
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == {"source": {"kind": "lidc", "path": str(folder)}}
    assert load_config(str(path)).source.path == folder


@pytest.fixture
def call(monkeypatch, tmp_path):
    """The command with the index and a transfer of this file; gives its exit code and what it printed."""
    transfer = Transfer()
    monkeypatch.setattr(fetch, "read_index", lambda: INDEX)
    monkeypatch.setattr(fetch, "by_idc", transfer)

    def run(*words):
        done = typer.testing.CliRunner().invoke(cli.app, ["fetch", "lidc", "--output", str(tmp_path / "d"), *words])
        return done, transfer.calls

    return run


def test_the_command_fetches_and_says_how_to_continue(call, tmp_path):
    done, calls = call("--patients", "1")
    assert (done.exit_code, len(calls)) == (0, 1)
    assert "CC BY 3.0" in done.stdout
    assert "10.7937/TCIA.2018.h7umfurq" in done.stdout
    assert f"--configfile config/lidc.yaml --configfile {tmp_path / 'd' / 'lidc.yaml'}" in done.stdout
    assert (tmp_path / "d" / "lidc.yaml").is_file()


def test_an_estimate_fetches_nothing(call, tmp_path):
    done, calls = call("--patients", "all", "--estimate")
    assert (done.exit_code, calls) == (0, [])
    assert "2 patients: 2 CT series, 3 SEG objects" in done.stdout
    assert not (tmp_path / "d").exists()


def test_more_than_20_gb_needs_yes(call, monkeypatch):
    monkeypatch.setattr(fetch, "LARGE_BYTES", 300)
    done, calls = call("--patients", "1")
    assert isinstance(done.exception, InputError)
    assert "--yes: is needed for more than 20 GB" in str(done.exception)
    assert calls == []
    done, calls = call("--patients", "1", "--yes")
    assert (done.exit_code, len(calls)) == (0, 1)
    # What is here is not asked for again.
    assert call("--patients", "1")[0].exit_code == 0


def test_without_the_package_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "idc_index_data", None)
    with pytest.raises(UserError, match="is not installed .* pip install idc-index"):
        fetch.read_index()


def test_the_published_index_holds_the_published_collection():
    pytest.importorskip("idc_index_data", reason="idc-index is not installed")
    index = fetch.read_index()
    # Slices of the scans, and readers' nodules in their XML.
    items = fetch.select(index, "LIDC-IDRI-0001,LIDC-IDRI-0003")
    assert [(item.patient, item.files) for item in items if item.modality == "CT"] == [
        ("LIDC-IDRI-0001", 133),
        ("LIDC-IDRI-0003", 140),
    ]
    assert [sum(item.patient == name and item.modality == "SEG" for item in items) for name in (
        "LIDC-IDRI-0001", "LIDC-IDRI-0003",
    )] == [4, 13]  # fmt: skip
    everything = fetch.select(index, "all")
    # Fedorov et al., 2020: 6,859 annotations of 875 patients.
    assert len({item.patient for item in everything}) == 875
    assert sum(item.modality == "SEG" for item in everything) == 6859
