"""Several scans of one patient: by a table or a pattern, and how roles treat them."""

import json

import nibabel
import numpy as np
import pytest
from pydantic import ValidationError

from lungddpm.arms.splits import assign_roles
from lungddpm.config.models import Config, Roles
from lungddpm.core.errors import InputError
from lungddpm.layouts import compose
from lungddpm.sources.images import Settings
from lungddpm.sources.index import index_source, write_index

AFFINE = np.diag([0.7, 0.8, 2.5, 1.0])
CT = np.random.default_rng(2).integers(-1000, 2000, (8, 7, 6)).astype(np.int16)
SCANS = [f"P{patient:02}_{visit}" for patient in range(6) for visit in ("first", "second")]


@pytest.fixture
def data(tmp_path):
    """Six patients with two scans each."""
    for folder, array in (("images", CT), ("labels", np.zeros(CT.shape, np.uint8))):
        (tmp_path / folder).mkdir()
        for number, scan in enumerate(SCANS):
            suffix = "_0000.nii.gz" if folder == "images" and number % 2 else ".nii.gz"
            nibabel.save(nibabel.Nifti1Image(array, AFFINE), tmp_path / folder / f"{scan}{suffix}")
    return tmp_path


def rows_of(top, **settings):
    return index_source("images", top, reading=(Settings(**settings),))


def patients(rows):
    return {row["case_id"]: row["patient_id"] for row in rows}


TRUTH = {scan: scan.partition("_")[0] for scan in SCANS}
# The name and the text of a table, with the file's name instead of {}.
TABLES = {
    "tabs": ("participants.tsv", "file\tpatient\n", "{}.nii.gz\t{}\n"),
    "commas, other columns": ("patients.csv", "patient,age,file\n", "{1},61,{0}\n"),
    "semicolons and a byte order mark": ("patients.csv", "\ufefffile;patient\r\n", "{}_0000.nii.gz;{}\r\n"),
    "the patient as BIDS names it": ("participants.tsv", "participant_id\tfile\n", "{1}\t{0}.nii.gz\n"),
    "the patient as the tables here name it": ("patients.csv", "file,patient_id\n", "{},{}\n"),
    "folders": ("participants.tsv", "file\tpatient\n", "images/{}_0000.nii.gz\t{}\n"),
    "folders of Windows": ("patients.csv", "file, patient\n", "data\\images\\{}.nii.gz, {}\n"),
}


@pytest.mark.parametrize("form", TABLES)
def test_patients_from_a_table(data, form):
    name, header, line = TABLES[form]
    (data / name).write_text(header + "".join(line.format(*pair) for pair in TRUTH.items()), encoding="utf-8")
    assert patients(rows_of(data, patient_table=name)) == TRUTH


def test_a_patient_that_bids_does_not_know_is_missing(data):
    lines = "".join(f"{scan}\t{' n/a' if scan.startswith('P03') else patient}\n" for scan, patient in TRUTH.items())
    (data / "participants.tsv").write_text("file\tparticipant_id\n" + lines)
    rows = {row["case_id"]: row for row in rows_of(data, patient_table="participants.tsv")}
    unknown = {name for name, row in rows.items() if row["status"] == "excluded"}
    assert unknown == {"P03_first", "P03_second"}
    assert {rows[name]["patient_id"] for name in unknown} == {""}
    assert "has no patient in participants.tsv" in rows["P03_first"]["reason"]


def test_patients_by_a_pattern(data):
    assert patients(rows_of(data, patient_pattern=r"^(P\d+)_")) == TRUTH


def test_without_either_each_scan_is_a_patient(data):
    assert patients(rows_of(data)) == {scan: scan for scan in SCANS}


@pytest.mark.parametrize("way", ["table", "pattern"])
def test_two_scans_of_a_patient_always_have_one_role(data, way):
    lines = "".join(f"{scan}\t{patient}\n" for scan, patient in TRUTH.items())
    (data / "participants.tsv").write_text("file\tpatient\n" + lines)
    rows = rows_of(data, **{"patient_table": "participants.tsv"} if way == "table" else {"patient_pattern": "^(P..)"})
    apart = set()
    for seed in range(30):
        roles = {}
        for row in assign_roles(rows, Roles(discovery=2, reference=2, test=2), seed):
            roles.setdefault(TRUTH[row["case_id"]], set()).add(row["role"])
        assert all(len(found) == 1 for found in roles.values())
        alone = {row["case_id"]: row["role"] for row in assign_roles(rows_of(data), Roles(), seed)}
        apart |= {patient for patient in roles if alone[f"{patient}_first"] != alone[f"{patient}_second"]}
    # As patients of their own, these scans do come apart: the leak that the table is there to close.
    assert apart


def test_scans_whose_patient_is_not_known_are_excluded(data):
    (data / "participants.tsv").write_text("file\tpatient\nP00_first\tP00\nP00_second\t\n")
    rows = {row["case_id"]: row for row in rows_of(data, patient_table="participants.tsv")}
    assert rows["P00_first"]["status"] == "ok"
    assert rows["P00_second"]["reason"].startswith("images/P00_second_0000.nii.gz: has no patient in participants.tsv")
    assert rows["P01_first"]["reason"].startswith("images/P01_first.nii.gz: has no patient in participants.tsv")
    assert rows["P01_first"]["patient_id"] == ""
    rows = {row["case_id"]: row for row in rows_of(data, patient_pattern=r"^(P0[0-2])_")}
    assert rows["P02_second"]["status"] == "ok"
    assert "P03_first.nii.gz: does not match the pattern ^(P0[0-2])_" in rows["P03_first"]["reason"]


BAD_TABLES = {
    "missing": (None, "participants.tsv: does not exist"),
    "empty": ("", "lacks the column file and the column patient (it has none)"),
    "BIDS": (
        "participant_id\tage\nsub-1\t61\n",
        "lacks the column file (it has participant_id, age)",
    ),
    "one column": ("file\nP00_first\n", "lacks the column patient (it has file)"),
    "two patients": ("file\tpatient\na.nii\tP1\na_0000.nii.gz\tP2\n", "gives a_0000.nii.gz two patients"),
    "no text": (b"file\tpatient\n\xff\xfe\n", "participants.tsv: cannot be read"),
}


@pytest.mark.parametrize("error", BAD_TABLES)
def test_tables_that_cannot_be_used_end_the_run(data, error):
    content, reason = BAD_TABLES[error]
    if content is not None:
        (data / "participants.tsv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        rows_of(data, patient_table="participants.tsv")
    assert reason in str(caught.value)


def test_a_patient_in_two_spellings_ends_the_run(data):
    """As two patients, their scans could be trained and tested on."""
    lines = "".join(f"{scan}\t{patient}\n" for scan, patient in TRUTH.items())
    (data / "participants.tsv").write_text("file\tpatient\n" + lines.replace("second\tP03", "second\tp03"))
    with pytest.raises(InputError, match=r"has the patients P03 and p03, which differ only in case"):
        rows_of(data, patient_table="participants.tsv")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"patient_pattern": "^P[0-9]+"}, "needs one group in parentheses, the patient, but has 0"),
        ({"patient_pattern": "^(P)([0-9]+)"}, "needs one group in parentheses, the patient, but has 2"),
        ({"patient_pattern": "^(P"}, "is not a regular expression"),
        ({"patient_pattern": "^(P)", "patient_table": "participants.tsv"}, "set only one of them"),
        ({"patient_table": "../participants.tsv"}, "must be the name of a file in the folder of the data set"),
        ({"patient_table": "/data/participants.tsv"}, "must be the name of a file in the folder of the data set"),
    ],
)
def test_settings_that_say_no_patient_are_refused(settings, reason):
    with pytest.raises(ValidationError) as caught:
        Settings(**settings)
    assert reason in str(caught.value)


def test_a_case_is_prepared_again_when_its_patient_changes(data, monkeypatch):
    """`case.json` names the patient, and the leak guard reads it."""
    written = []

    def write_record(config, source, row, folder):
        written.append((row["case_id"], row["patient_id"]))
        fingerprint = compose._fingerprint(config, source, row, [])
        folder.path.mkdir(parents=True, exist_ok=True)
        for file in (folder.ct, folder.layout, folder.picture):
            file.write_bytes(b"")
        record = {"qc": {"n_nodules": 1}, "sha256": folder.hash(), "nodules_sha256": "", "inputs": []}
        folder.record.write_text(json.dumps({**record, "fingerprint": fingerprint}))
        return record

    monkeypatch.setattr(compose, "_write", write_record)
    results = data / "results"

    def prepare(second):
        (data / "participants.tsv").write_text(f"file\tpatient\nP00_first\tP00\nP00_second\t{second}\n")
        write_index(results / "index.tsv", rows_of(data, patient_table="participants.tsv"))
        compose.run_prepare(Config(), results / "index.tsv", data, results, 0, 1, results / "cases.tsv")

    prepare("P77")
    prepare("P77")
    assert written == [("P00_first", "P00"), ("P00_second", "P77")]
    prepare("P00")
    assert written[2:] == [("P00_second", "P00")]
