"""Names that are not UTF-8, of folders, files and patients: from headers to tables, caches, logs and case.json."""

import json
import os
import shutil

import pytest
from lidc_files import find, only, write_case, write_slice
from pydicom.uid import ImplicitVRLittleEndian

from lungddpm.config.models import Config
from lungddpm.core.cases import read_cases
from lungddpm.core.errors import InputError
from lungddpm.core.progress import LOG, start_logging
from lungddpm.layouts.compose import run_prepare
from lungddpm.sources.index import index_source, read_index, write_index


def renamed(path, name):
    """Give a file or folder a name in bytes, e.g. from an archive that was packed on Windows."""
    new = os.fsencode(path.parent) + b"/" + name
    try:
        os.rename(path, new)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    return type(path)(os.fsdecode(new))


@pytest.fixture
def tree(tmp_path, cohort):
    """A scan in a folder with a Latin-1 byte, its XML as well; and one that cannot be used."""
    shutil.copytree(cohort / "PHANTOM-0001", tmp_path / "data" / "PHANTOM-0001")
    folder = renamed(tmp_path / "data" / "PHANTOM-0001", b"M\xfcller")
    (reads,) = folder.rglob("*.xml")
    renamed(reads, b"Le\xe7ture.xml")
    renamed(write_case(tmp_path / "data", "P-02") / "000088.dcm", b"\xe4.dcm")
    (slice_file,) = [file for file in (tmp_path / "data" / "P-02").rglob("*.dcm") if "\udce4" in file.name]
    slice_file.write_bytes(slice_file.read_bytes()[:-1])
    return tmp_path


def test_a_scan_in_a_folder_that_is_not_utf_8_is_prepared(tree):
    start_logging(tree / "log.txt")
    index = index_source("lidc", tree / "data", tree / "index.cache.json")
    for row in index:
        row["role"] = "test"
    write_index(tree / "index.tsv", index)
    for text in ("index.tsv", "index.cache.json"):
        (tree / text).read_text(encoding="utf-8")
    bad, good = read_index(tree / "index.tsv").to_dict("records")
    assert (good["patient_id"], good["status"]) == ("PHANTOM-0001", "ok")
    assert (tree / "data" / good["path"]).is_dir()
    assert bad["reason"].startswith("P-02/a study/1.2.3/\\udce4.dcm: is truncated")

    config = Config(grid={"size": [32, 32, 32]})
    results = tree / "results"

    def prepare():
        run_prepare(config, tree / "index.tsv", tree / "data", results, 0, 1, results / "cases-0.tsv")
        return read_cases(results / "cases-0.tsv").set_index("case_id")

    table = prepare()
    assert table["status"].tolist() == ["excluded", "ok"]
    assert table["reason"].tolist() == [bad["reason"], ""]
    record = json.loads((results / "PHANTOM-0001" / "case.json").read_text(encoding="utf-8"))
    assert all((tree / "data" / name).is_file() for name in record["inputs"])
    # What is up to date is left as it is, so the names are read back as they were.
    made = (results / "PHANTOM-0001" / "case.json").stat().st_mtime_ns
    prepare()
    assert (results / "PHANTOM-0001" / "case.json").stat().st_mtime_ns == made
    for handler in LOG.handlers:
        handler.flush()
    assert "P-02: excluded: P-02/a study/1.2.3/\\udce4.dcm: is truncated" in (tree / "log.txt").read_text("utf-8")
    assert index_source("lidc", tree / "data", tree / "index.cache.json")[1]["path"] == good["path"]


def test_a_data_set_whose_own_folder_is_not_utf_8(tmp_path):
    write_case(tmp_path / "data")
    top = renamed(tmp_path / "data", b"\xfc")
    (top / "P-01" / "a study" / "1.2.3" / "reads.xml").write_text("<a>")
    assert only(top).excluded.startswith("P-01/a study/1.2.3/reads.xml: cannot be read as LIDC XML")
    with pytest.raises(InputError) as caught:
        index_source("lidc", top / "nowhere")
    str(caught.value).encode("utf-8")


PATIENTS = {
    "Windows-1252, no set": (b"P\xc4TIENT", None, "PÄTIENT"),
    "a dash of Windows-1252": (b"P\x96TIENT", None, "P–TIENT"),
    "UTF-8, no set": ("PÄTIENT".encode(), None, "PÄTIENT"),
    "UTF-8": ("PÄTIENT".encode(), "ISO_IR 192", "PÄTIENT"),
    "Latin-1": (b"P\xc4TIENT", "ISO_IR 100", "PÄTIENT"),
    "Cyrillic": ("ПАЦИЕНТ".encode("iso8859_5"), "ISO_IR 144", "ПАЦИЕНТ"),
    "no such set": (b"P\xc4TIENT", "ISO_IR 999", "PÄTIENT"),
}


@pytest.mark.parametrize("syntax", ["explicit", "implicit"])
@pytest.mark.parametrize("name", PATIENTS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_patient_ids_in_any_character_set(tmp_path, name, syntax):
    value, character_set, patient = PATIENTS[name]
    options = {"syntax": ImplicitVRLittleEndian} if syntax == "implicit" else {}
    if character_set:
        options["SpecificCharacterSet"] = character_set if character_set != "ISO_IR 999" else "ISO_IR 100"
    folder = write_case(tmp_path, "X" * len(value), **options)
    for file in folder.glob("*.dcm"):
        content = file.read_bytes().replace(b"X" * len(value), value)
        file.write_bytes(content.replace(b"ISO_IR 100", b"ISO_IR 999") if name == "no such set" else content)
    series = only(tmp_path)
    assert (series.patient_id, series.excluded) == (patient, "")
    index = index_source("lidc", tmp_path)
    write_index(tmp_path / "index.tsv", index)
    assert read_index(tmp_path / "index.tsv")["patient_id"].tolist() == [patient]


def test_xml_files_of_one_name_but_for_a_byte_stay_apart(tmp_path):
    folder = write_case(tmp_path)
    shutil.copy(folder / "reads.xml", folder / "b.xml")
    shutil.copy(folder / "reads.xml", folder / "c.xml")
    renamed(folder / "b.xml", b"\xe4.xml")
    renamed(folder / "c.xml", b"\xf6.xml")
    (series,) = find(tmp_path)
    assert len(set(series.annotations)) == 3
    write_slice(folder / "x.dcm", 9, ImagePositionPatient=[-20, -30, 20])
    assert "missing" in only(tmp_path).excluded
