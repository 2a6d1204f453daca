"""The leak guard on DICOM as hospitals export it: numbers for names, and one patient under two of them."""

import json
from collections import defaultdict

import pydicom
import pytest
from pydicom.uid import ImplicitVRLittleEndian, generate_uid

from lungddpm.arms.compose import run_compose
from lungddpm.arms.splits import assign_roles
from lungddpm.config.loading import parse_config
from lungddpm.core.cases import read_cases
from lungddpm.core.errors import LeakError
from lungddpm.layouts.collect import run_collect
from lungddpm.layouts.compose import run_prepare
from lungddpm.sources.index import index_source, join_data_sets, write_index
from lungddpm.sources.phantom.cohort import write_cohort

PHANTOM = {"patients": 4, "matrix": 80, "pixel_mm": 4.4, "slice_mm": 6, "nodules": [1, 1]}
EXPORTED_AGAIN = "5"


def config(discovery):
    return parse_config(
        {
            "source": {"phantom": {**PHANTOM, "nodule_diameter_mm": [20, 30]}},
            "roles": {"discovery": discovery, "reference": ["2"], "test": ["3"]},
            "grid": {"size": [32, 32, 32], "extent": "lungs"},
            "segmentation": {"n_folds": 2, "folds": [0]},
        }
    )


def number(phantom, patient, folder, new):
    """Give a patient another number, and folders that are numbered as well: <patient>/<study 3>/<series 1>/1, 2, ..."""
    (folder / new / "3/1").mkdir(parents=True)
    for place, path in enumerate(sorted((phantom / patient).rglob("*.dcm")), start=1):
        slice_ = pydicom.dcmread(path)
        slice_.PatientID = new
        slice_.save_as(folder / new / "3/1" / str(place))
    for path in (phantom / patient).rglob("*.xml"):
        (folder / new / "3/1" / path.name).write_bytes(path.read_bytes())


def export_again(folder, patient, new):
    """The same scan from another system: other names, identifiers, order, encoding and rescaling."""
    (folder / new / "3/1").mkdir(parents=True)
    new_uid = defaultdict(generate_uid)
    slices = [pydicom.dcmread(path) for path in (folder / patient).rglob("*") if path.is_file() and path.suffix == ""]
    for place, slice_ in enumerate(sorted(slices, key=lambda s: -s.ImagePositionPatient[2]), start=1):
        stored = slice_.pixel_array + 100
        slice_.PatientID = new
        for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "SOPInstanceUID"):
            setattr(slice_, name, new_uid[slice_[name].value])
        slice_.file_meta.MediaStorageSOPInstanceUID = slice_.SOPInstanceUID
        slice_.RescaleIntercept -= 100
        slice_.PixelData = stored.astype(slice_.pixel_array.dtype).tobytes()
        slice_.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        path = folder / new / "3/1" / str(place)
        slice_.save_as(path, implicit_vr=True, little_endian=True, enforce_file_format=True)
    for path in (folder / patient).rglob("*.xml"):
        text = path.read_text(encoding="utf-8")
        for old, uid in new_uid.items():
            text = text.replace(old, uid)
        (folder / new / "3/1" / path.name).write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A function: discovery patients -> table of the cases of patients 1 to 4 and of the last one exported again."""
    root = tmp_path_factory.mktemp("numbered")
    settings = config(["1", "4"])
    write_cohort(settings.source.phantom, settings.seed, root / "phantom")
    for place, patient in enumerate(sorted(path for path in (root / "phantom").iterdir() if path.is_dir()), start=1):
        number(root / "phantom", patient.name, root / "data", str(place))
    export_again(root / "data", "3", EXPORTED_AGAIN)
    found = index_source("lidc", root / "data")

    def prepare(discovery):
        settings, cases = config(discovery), root / "cases"
        write_index(cases / "index.tsv", assign_roles(found, settings.roles, 1))
        run_prepare(settings, cases / "index.tsv", root / "data", cases, 0, 1, cases / "cases-0.tsv")
        run_collect(settings, [cases / "cases-0.tsv"], cases / "cases.tsv")
        return settings, cases / "cases.tsv"

    return prepare


def test_patients_and_folders_with_the_same_numbers_are_not_a_leak(prepared, tmp_path):
    settings, table = prepared(["1", "4"])
    assert read_cases(table)["status"].tolist() == ["ok"] * 5
    run_compose(settings, "real", table, [], tmp_path / "real")
    proof = json.loads((tmp_path / "real/arm.json").read_text())["leak_guard"]
    assert (proof["training_patients"], proof["test_patients"]) == (["1", "4"], ["3"])


def test_a_test_patient_that_was_exported_again_is_found(prepared, tmp_path):
    settings, table = prepared(["1", EXPORTED_AGAIN])
    records = [json.loads((table.parent / name / "case.json").read_text()) for name in ("3", EXPORTED_AGAIN, "1")]
    assert records[0]["scan_sha256"] == records[1]["scan_sha256"] != records[2]["scan_sha256"]
    assert (records[1]["patient_id"], records[1]["series_uid"] != records[0]["series_uid"]) == (EXPORTED_AGAIN, True)
    with pytest.raises(LeakError, match=r"the training set contains 1 test patient \(3 in 5\)"):
        run_compose(settings, "real", table, [], tmp_path / "real")


def test_a_discovery_patient_in_an_external_test_set_is_found_under_another_name(prepared, tmp_path):
    # The hospital's archive holds a scan of patient 1 of the public data set, under a name of its own.
    _, table = prepared(["1", "4"])
    data = table.parent.parent / "data"
    export_again(data, "1", "archive")
    (data / "archive").rename(tmp_path / "archive")
    settings = config(["1", "4"])
    external = {"ours": {"kind": "lidc", "path": str(tmp_path / "archive")}}
    settings = settings.model_copy(update={"external_tests": parse_config({"external_tests": external}).external_tests})
    externals = {"ours": index_source("lidc", tmp_path / "archive")}
    rows = assign_roles(join_data_sets(index_source("lidc", data), externals), settings.roles, 1)
    cases = tmp_path / "cases"
    write_index(cases / "index.tsv", rows)
    paths = cases / "index.tsv", data, cases, 0, 1, cases / "cases-0.tsv"
    run_prepare(settings, *paths, external={"ours": tmp_path / "archive"})
    run_collect(settings, [cases / "cases-0.tsv"], cases / "cases.tsv")
    with pytest.raises(LeakError, match=r"the training set contains 1 test patient \(archive in 1\)"):
        run_compose(settings, "real", cases / "cases.tsv", [], tmp_path / "real")
