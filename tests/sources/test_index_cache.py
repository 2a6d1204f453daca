"""The cache of the index: it saves reading, and never hides a change."""

import json
import os
import shutil

import nibabel
import numpy as np
import pytest
from lidc_files import SLICES, nodule, roi, write_case, write_series, write_slice, xml

from lungddpm.sources import images, lidc
from lungddpm.sources import index as source_index
from lungddpm.sources.index import index_source


@pytest.fixture
def tree(tmp_path):
    """Three series, and an XML file whose images are elsewhere."""
    for number in (1, 2, 3):
        write_case(tmp_path / "data", f"P-0{number}", f"1.2.{number}")
    (tmp_path / "data" / "tree").mkdir()
    (tmp_path / "data" / "tree" / "160.xml").write_text(xml(nodule(roi(1, series="7")), series="7"))
    return tmp_path


def index(tree, kind="lidc"):
    return index_source(kind, tree / "data", tree / "index.cache.json")


def count_reads(monkeypatch, *functions):
    """The files that these functions, each a module and a name, are given from now on."""
    read = []
    for module, name in functions:
        true = getattr(module, name)
        monkeypatch.setattr(module, name, lambda path, *rest, true=true: read.append(path.name) or true(path, *rest))
    return read


def test_an_unchanged_tree_is_not_read_again(tree, monkeypatch):
    first = index(tree)
    assert first == index_source("lidc", tree / "data")
    read = count_reads(monkeypatch, (lidc.headers, "_read_header"), (lidc.readings, "_bytes_of"))
    assert index(tree) == first
    assert read == []


def replace_slice(folder):
    # A tool that keeps dates: same name, same size, same modification time.
    file = folder / "000088.dcm"
    before = file.stat()
    write_slice(file, 2, series="1.2.2", patient="P-92")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def add_slice_of_its_position(folder):
    write_slice(folder / "copy.dcm", 2, series="1.2.2", patient="P-02", RescaleSlope=2)


def add_reads(folder):
    (folder / "more.xml").write_text(xml("", nodule(roi(3)) + nodule(roi(0)), series="1.2.2"))


def spoil_reads(folder):
    (folder / "reads.xml").write_text("<LidcReadMessage>")


CHANGES = {
    "replaced slice": (replace_slice, "do not have one PatientID"),
    "deleted slice": (lambda folder: (folder / "000088.dcm").unlink(), "1 slice(s) missing"),
    "new slice": (lambda f: add_slice_of_its_position(f), "slices at the same position"),
    "deleted reads": (lambda folder: (folder / "reads.xml").unlink(), "no reader XML"),
    "changed reads": (spoil_reads, "cannot be read as LIDC XML"),
    "new reads": (add_reads, ""),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(tree, change, monkeypatch):
    harm, reason = CHANGES[change]
    before = index(tree)
    (folder,) = (tree / "data" / "P-02").glob("*/*")
    harm(folder)
    read = count_reads(monkeypatch, (lidc.headers, "_read_header"), (lidc.readings, "_bytes_of"))
    rows = index(tree)
    assert len(read) <= SLICES + 3
    assert rows == index_source("lidc", tree / "data")
    assert (rows[0], rows[2], rows[3]) == (before[0], before[2], before[3])
    assert reason in rows[1]["reason"]
    assert rows[1] != before[1]


def test_copies_are_compared_once_and_again_when_one_changes(tree, monkeypatch):
    (folder,) = (tree / "data" / "P-02").glob("*/*")
    copy = shutil.copytree(folder, tree / "data" / "P-02" / "copy" / "1.2.2")
    first = index(tree)
    assert first[1]["status"] == "ok"
    assert "copy/1.2.2" in first[1]["notes"]
    read = count_reads(monkeypatch, (lidc.headers, "_read_header"), (lidc.readings, "_bytes_of"))
    assert index(tree) == first
    assert read == []
    write_slice(copy / "000088.dcm", 2, series="1.2.2", patient="P-02", RescaleSlope=2)
    rows = index(tree)
    assert rows == index_source("lidc", tree / "data")
    assert "spread over 2 folders" in rows[1]["reason"]


def test_series_in_the_same_folders_are_kept_apart(tree):
    """One is divided over two folders, of the other there is a copy in the second one."""
    first, second = tree / "data" / "one", tree / "data" / "other"
    write_series(first, [0, 1, 2], series="1.2.4", patient="P-04")
    write_series(second, [3, 4], series="1.2.4", patient="P-04")
    for k in range(SLICES):
        for folder in (first, second):
            write_slice(folder / f"b{k}.dcm", k, series="1.2.5", patient="P-05")
    for number in (4, 5):
        (first / f"{number}.xml").write_text(xml(nodule(roi(1, series=f"1.2.{number}")), series=f"1.2.{number}"))
    expected = index_source("lidc", tree / "data")
    assert [row["status"] for row in expected] == ["ok"] * 5 + ["excluded"]
    assert [row["path"] for row in expected[3:5]] == [".", "one"]
    assert index(tree) == index(tree) == expected


def test_images_that_arrive_later_find_their_reads(tree):
    assert index(tree)[3]["status"] == "excluded"
    folder = write_case(tree / "data", "P-04", "7")
    (folder / "reads.xml").unlink()
    assert [row["status"] for row in index(tree)] == ["ok"] * 4


def test_patients_that_are_gone_leave_the_table_and_the_cache(tree):
    index(tree)
    size = (tree / "index.cache.json").stat().st_size
    shutil.rmtree(tree / "data" / "P-02")
    assert [row["case_id"] for row in index(tree)] == ["P-01", "P-03", "7"]
    assert (tree / "index.cache.json").stat().st_size < size
    assert "P-02" not in (tree / "index.cache.json").read_text()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe\x00", b"[]", b'{"made_by": "1", "entries": 3}', b"[" * 99999]
)
def test_a_damaged_cache_is_rebuilt(tree, content):
    first = index(tree)
    good = (tree / "index.cache.json").read_text()
    (tree / "index.cache.json").write_bytes(content)
    assert index(tree) == first
    assert (tree / "index.cache.json").read_text() == good


def test_what_other_code_has_read_does_not_count(tree, monkeypatch):
    first = index(tree)
    stale = (tree / "index.cache.json").read_text().replace('["P-02"]', '["P-99"]')
    (tree / "index.cache.json").write_text(stale)
    assert [row["patient_id"] for row in index(tree)] == ["P-01", "P-03", "P-99", ""]
    monkeypatch.setattr(source_index, "stage_fingerprint", lambda stage, kind: "newer")
    assert index(tree) == first


def test_an_error_is_looked_at_again(tree, monkeypatch):
    first = index(tree)
    (tree / "index.cache.json").unlink()

    def fail(*_, **__):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(type(tree), "open", fail)
        rows = index(tree)
    assert all("cannot be read (Input/output error)" in row["reason"] for row in rows)
    assert index(tree) == first


def test_the_cache_is_small(tree):
    index(tree)
    entries = json.loads((tree / "index.cache.json").read_text())["entries"]
    assert len(json.dumps(entries)) / 3 < 1500


def test_headers_of_images_are_not_read_again(tmp_path, monkeypatch):
    image = nibabel.Nifti1Image(np.zeros((4, 5, 6), np.uint8), np.eye(4))
    for name in ("images/a.nii.gz", "labels/a.nii.gz", "images/b.nii.gz"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(image, tmp_path / "data" / name)
    first = index(tmp_path, "images")
    read = count_reads(monkeypatch, (images, "read_header"))
    assert index(tmp_path, "images") == first
    # Bad series are checked again.
    assert read == ["b.nii.gz"]
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 5, 7), np.uint8), np.eye(4)), tmp_path / "data/labels/a.nii.gz")
    assert "has shape (4, 5, 7)" in index(tmp_path, "images")[0]["reason"]
