"""Nothing leaves a run that names a patient, a hospital or the machine: everything that is written is searched."""

import json
import sys

import pydicom
import pytest
import yaml
from typer.testing import CliRunner
from written_files import files_that_tell

from lungddpm.cli import app
from lungddpm.config.loading import load_config
from lungddpm.core.progress import shorten_paths
from lungddpm.sources.phantom.cohort import write_cohort
from lungddpm.sources.phantom.settings import Phantom

PERSONAL = {
    "PatientName": "Montague^Jacqueline",
    "PatientBirthDate": "19410203",
    "PatientBirthName": "Capulet^Jacqueline",
    "OtherPatientIDs": "OTHER-ID-5150",
    "PatientAddress": "13 Elm Street",
    "PatientTelephoneNumbers": "555-0199",
    "PatientComments": "teaches piano",
    "InstitutionName": "St. Eligius Hospital",
    "InstitutionAddress": "Boston, Franklin Square",
    "InstitutionalDepartmentName": "Radiology East",
    "ReferringPhysicianName": "Westphall^Donald",
    "PerformingPhysicianName": "Craigson^Marcus",
    "OperatorsName": "Rosenthal^Helena",
    "AccessionNumber": "ACC4711",
    "StudyID": "STUDY0815",
    "StudyDate": "19821026",
    "StudyDescription": "Thorax after fall",
    "SeriesDescription": "lung of the mayor",
    "StationName": "CTROOM7",
    "DeviceSerialNumber": "SN-99887766",
    "ImageComments": "see letter of 3 May",
}
PRIVATE = "Insurance 078-05-1120"
IN_XML = "Auschlander^Daniel"


def stuff(file):
    """Write what a hospital's scanner might write into a phantom's slice."""
    slice_ = pydicom.dcmread(file)
    for keyword, value in PERSONAL.items():
        setattr(slice_, keyword, value)
    block = slice_.private_block(0x0009, "ACME CT", create=True)
    block.add_new(0x01, "LO", PRIVATE)
    slice_.file_meta.SourceApplicationEntityTitle = "CTROOM7"
    slice_.save_as(file)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Four phantom patients with all of that in every slice; one of them is truncated."""
    folder = tmp_path_factory.mktemp("hospital")
    phantom = {"patients": 4, "matrix": 80, "pixel_mm": 4.4, "slice_mm": 6, "nodule_diameter_mm": [16, 30]}
    write_cohort(Phantom(**phantom), 1, folder)
    for file in folder.rglob("*.dcm"):
        stuff(file)
    for file in folder.rglob("*.xml"):
        text = file.read_text(encoding="utf-8")
        header = "</ResponseHeader>"
        assert header in text
        file.write_text(text.replace(header, f"<PatientName>{IN_XML}</PatientName>{header}"), encoding="utf-8")
    damaged = min((folder / "PHANTOM-0004").rglob("*.dcm"))
    damaged.write_bytes(damaged.read_bytes()[:-5000])
    return folder


@pytest.fixture(scope="module")
def results(cohort, tmp_path_factory):
    """What `index`, `prepare`, `collect` and `qc` write, their logs included."""
    folder = tmp_path_factory.mktemp("run")
    values = {"source": {"kind": "lidc", "path": str(cohort)}, "grid": {"size": [32, 32, 32]}}
    roles = {"discovery": ["PHANTOM-0001"], "reference": ["PHANTOM-0002"], "test": ["PHANTOM-0003"]}
    (folder / "config.yaml").write_text(yaml.safe_dump({**values, "roles": roles}))
    (folder / "results/logs").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for verb, *arguments in (
            ("index", "--source", str(cohort)),
            ("prepare", "--source", str(cohort)),
            ("collect", "results/cases/cases-0.tsv"),
            ("qc",),
        ):
            patch.setattr("sys.argv", ["lungddpm", "--log", f"results/logs/{verb}.log", verb, *arguments])
            run = CliRunner().invoke(app, sys.argv[1:])
            assert run.exit_code == 0, run.exception
    return folder / "results"


def test_nothing_personal_in_a_scan_leaves_the_reader(cohort, results):
    words = [*PERSONAL.values(), *(word for name in PERSONAL.values() for word in name.split("^")), PRIVATE]
    words += [IN_XML, *IN_XML.split("^"), "078-05-1120"]
    assert len(files_that_tell(cohort, words)) > 100, "the search finds what is there"
    assert files_that_tell(results, words) == {}


def test_the_run_found_cases_to_write_about(results):
    reported = (results / "cases/cases.tsv").read_text()
    assert reported.count("\tok\t") == 3
    assert "is truncated" in reported
    assert (results / "qc/cases/PHANTOM-0001.html").exists()
    assert (results / "cases/PHANTOM-0001/qc.png").exists()


def test_the_data_and_the_folder_of_the_run_are_not_disclosed(cohort, results):
    assert files_that_tell(results, [str(cohort), str(results)]) == {}


def test_the_config_of_the_results_has_folders_by_name_only(tmp_path):
    mine = tmp_path / "mine.yaml"
    external = {"generators": ["maisi"], "doses": [1.0], "external": {"maisi": "/home/jane/maisi"}}
    mine.write_text(yaml.safe_dump({"source": {"kind": "lidc", "path": "/home/jane/LIDC-IDRI"}, "arms": external}))
    shown = load_config(mine).without_folders()
    assert "jane" not in json.dumps(shown.model_dump(mode="json"))
    assert (shown.source.path.name, shown.arms.external["maisi"].name) == ("LIDC-IDRI", "maisi")


def test_nothing_that_a_whole_run_wrote_has_an_absolute_path(tiny_benchmark):
    machine = [str(tiny_benchmark.folder), str(tiny_benchmark.repository)]
    assert files_that_tell(tiny_benchmark.results, machine) == {}


@pytest.mark.parametrize(
    ("text", "reported"),
    [
        ("error: /data/jane/LIDC/p 1/a.dcm: is truncated", "error: p 1/a.dcm: is truncated"),
        ("/data/jane/LIDC: is not a folder", "LIDC: is not a folder"),
        ("reads ../x and 1/2", "reads ../x and 1/2"),
    ],
)
def test_logs_shorten_the_paths_that_a_command_was_given(monkeypatch, text, reported):
    monkeypatch.setattr("sys.argv", ["lungddpm", "index", "--source=/data/jane/LIDC/", "--output", "results/a"])
    assert shorten_paths(text) == reported
