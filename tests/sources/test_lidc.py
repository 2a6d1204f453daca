"""LIDC-IDRI reader: DICOM written here with pydicom, trap files and whole scans of the release where they are."""

import json
import re
import shutil
import sys
from subprocess import run

import nibabel
import numpy as np
import pandas as pd
import pydicom
import pytest
from lidc_files import (
    COLUMNS,
    ROWS,
    SLICES,
    SPACING,
    SQUARE,
    STORED,
    UPRIGHT,
    find,
    load,
    nodule,
    only,
    roi,
    write_case,
    write_series,
    write_slice,
    xml,
)  # fmt: skip
from pydicom.uid import ImplicitVRLittleEndian, RLELossless

from lungddpm.core.errors import ExcludedCaseError, InputError
from lungddpm.layouts.nodules import annotation_mask
from lungddpm.sources import Annotation, Contour, lidc
from lungddpm.sources.index import index_source, read_index, write_index
from lungddpm.sources.lidc.readings import merged


def test_scan_is_sorted_by_position_and_true_to_the_patient(tmp_path):
    write_case(tmp_path)
    series, scan = only(tmp_path), load(tmp_path)
    assert not series.excluded
    assert (series.case_id, series.size, series.n_nodules) == ("P-01", (COLUMNS, ROWS, SLICES), 1)
    np.testing.assert_allclose(series.spacing_mm, SPACING)
    np.testing.assert_array_equal(scan.ct.array, STORED - 1024)
    assert scan.ct.array.dtype == np.int16
    np.testing.assert_allclose(scan.ct.affine, np.diag([-0.7, -0.8, 2.5, 1]) + np.outer([20, 30, -40, 0], [0, 0, 0, 1]))
    assert scan.slice_thickness_mm == 3.0
    assert len(scan.files) == SLICES + 1


def test_oblique_and_reversed_orientation(tmp_path):
    angle = np.deg2rad(20)
    tilt = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    axes = tilt @ np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1.0]])
    write_case(tmp_path, axes=axes)
    scan = load(tmp_path)
    lps = np.array([-20.0, -30.0, -40.0]) + axes @ (np.array([3, 7, 2]) * SPACING)
    np.testing.assert_allclose((scan.ct.affine @ [3, 7, 2, 1])[:3], lps * [-1, -1, 1], atol=1e-4)
    np.testing.assert_array_equal(scan.ct.array, STORED - 1024)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, RLELossless])
def test_other_transfer_syntaxes(tmp_path, syntax):
    write_case(tmp_path, syntax=syntax)
    assert not only(tmp_path).excluded
    np.testing.assert_array_equal(load(tmp_path).ct.array, STORED - 1024)


@pytest.mark.parametrize("padding", [-2000, 63536])
def test_padding_becomes_air(tmp_path, padding):
    pixels = STORED[:, :, 0].T.astype("<i2")
    pixels[0, :3] = [-2000, -500, -2600]
    # Rescaling lifts the padding value to -500 HU, and leaves -2600 at -1100 HU.
    write_case(tmp_path, PixelData=pixels.tobytes(), RescaleIntercept=1500)
    for file in tmp_path.rglob("*.dcm"):
        dataset = pydicom.dcmread(file)
        dataset.add_new("PixelPaddingValue", "SS" if padding < 0 else "US", padding)
        dataset.save_as(file)
    assert load(tmp_path).ct.array[:3, 0, 0].tolist() == [-1024, 1000, -1024]


def test_contours_by_sop_uid_then_by_position(tmp_path):
    folder = write_case(tmp_path)
    stray = roi(3, series="9.9")
    (folder / "reads.xml").write_text(
        xml(nodule(roi(1, z=999), stray, roi(1, [(4, 4)], inclusion="FALSE")), "", nodule(roi(2)))
    )
    first, second = load(tmp_path).annotations
    assert [contour.slice_index for contour in first.contours] == [1, 3, 1]
    assert [contour.inclusion for contour in first.contours] == [True, True, False]
    assert (first.reader, second.reader, first.characteristics) == (0, 2, {"malignancy": 4})
    assert first.contours[0].points.tolist() == [list(point) for point in SQUARE]


@pytest.mark.parametrize(
    ("outline", "problem"),
    [(roi(7, z=500), "where there is no slice"), (roi(1, [(3, 3), (10, 3)]), "outside the 10 x 12")],
)
def test_contours_that_do_not_fit_exclude_the_case(tmp_path, outline, problem):
    folder = write_case(tmp_path)
    (folder / "reads.xml").write_text(xml(nodule(outline)))
    with pytest.raises(ExcludedCaseError, match=problem):
        load(tmp_path)


def test_small_and_unrated_marks_are_dropped(tmp_path):
    file = tmp_path / "reads.xml"
    unrated = "<unblindedReadNodule><characteristics/>" + roi(1) + "</unblindedReadNodule>"
    other = "<nonNodule>" + roi(1) + "</nonNodule>"
    file.write_text(xml(nodule(roi(1, [(3, 3)])), nodule(roi(1), rating=0), unrated + other, nodule(roi(1))))
    assert [mark.reader for mark in lidc.read_xml(file).marks] == [3]


def points_of(text, path):
    path.write_text(text)
    (mark,) = lidc.read_xml(path).marks
    return [outline.points for outline in mark.outlines]


def test_points_are_read_however_they_are_written(tmp_path):
    """Runs of points take a short cut, which must read what an XML parser reads."""
    plain = [(3, 4), (5, 6), (7, 8), (9, 10)]
    edges = [f"<edgeMap><xCoord>{x}</xCoord><yCoord>{y}</yCoord></edgeMap>" for x, y in plain]
    untidy = roi(0, plain)
    for edge, instead in zip(
        edges,
        (
            "<edgeMap>\r\n\t<xCoord> 3</xCoord> <yCoord>4\n</yCoord></edgeMap>\n",
            "<!-- <edgeMap><xCoord>1</xCoord><yCoord>1</yCoord></edgeMap> -->"
            + edges[1]
            + "<![CDATA["
            + edges[0]
            + "]]>",
            "<edgeMap note='x'><xCoord>7</xCoord><yCoord>8</yCoord></edgeMap>",
            "<edgeMap><yCoord>+10</yCoord><xCoord>009</xCoord></edgeMap>",
        ),
        strict=True,
    ):
        untidy = untidy.replace(edge, instead)
    for text in (roi(0, plain), untidy):
        assert points_of(xml(nodule(text)), tmp_path / "a.xml") == [tuple(plain)]
    prefixed = xml(nodule(roi(0, plain))).replace("</", "</n:").replace("<", "<n:").replace("<n:/n:", "</n:")
    prefixed = prefixed.replace("<n:?xml", "<?xml").replace("xmlns=", "xmlns:n=")
    assert points_of(prefixed, tmp_path / "b.xml") == [tuple(plain)]


def test_an_error_behind_points_is_placed_where_it_is_in_the_file(tmp_path):
    path = tmp_path / "a.xml"
    path.write_text(xml(nodule("\n".join([roi(0), roi(1).replace("</inclusion>", "")]))))
    with pytest.raises(InputError, match="mismatched tag: line 3, column 5"):
        lidc.read_xml(path)


def test_xml_in_a_tree_of_its_own_and_read_twice(tmp_path):
    folder = write_case(tmp_path)
    tree = tmp_path / "tcia-lidc-xml" / "157"
    tree.mkdir(parents=True)
    text = "\ufeff" + (folder / "reads.xml").read_text()
    (folder / "reads.xml").rename(tree / "158.xml")
    (tree / "159.xml").write_text(text, encoding="utf-8")
    (tree / "160.xml").write_text(xml(nodule(roi(1, series="7")), series="7"))
    series, without_images = find(tmp_path)
    assert series.annotations == ("tcia-lidc-xml/157/158.xml", "tcia-lidc-xml/157/159.xml")
    assert (without_images.case_id, without_images.patient_id, without_images.series_uid) == ("7", "", "7")
    assert (series.n_nodules, series.excluded) == (1, "")
    (annotation,) = load(tmp_path).annotations
    assert len(annotation.contours) == 2


def test_erratum_replaces_what_it_corrects(tmp_path):
    folder = write_case(tmp_path)
    (folder / "erratum-reads.xml").write_text(xml("", nodule(roi(3))))
    (annotation,) = load(tmp_path).annotations
    assert (annotation.reader, annotation.contours[0].slice_index) == (1, 3)


def reads(*sessions, message="77"):
    return xml(*sessions).replace("<SeriesInst", f"<MessageId>{message}</MessageId><SeriesInst", 1)


FIRST_READ = reads(nodule(roi(1)), nodule(roi(1)) + nodule(roi(3)), nodule(roi(2)), "")
OTHER_READS = {
    "withdraws a nodule": (reads(nodule(roi(1)), nodule(roi(1)), nodule(roi(2)), ""), ["a.xml"]),
    "withdraws two nodules": (reads("", nodule(roi(1)), nodule(roi(2)), ""), ["a.xml"]),
    "is the same": (FIRST_READ, ["a.xml", "z.xml"]),
    "changes a nodule": (
        reads(nodule(roi(1)), nodule(roi(1)) + nodule(roi(2)), nodule(roi(2)), ""), ["a.xml", "z.xml"],
    ),
    "is another message": (reads(nodule(roi(1)), nodule(roi(1)), "", "", message="78"), ["a.xml", "z.xml"]),
    "has other sessions": (reads(nodule(roi(1)), nodule(roi(1))), ["a.xml", "z.xml"]),
}  # fmt: skip


@pytest.mark.parametrize("other", OTHER_READS)
def test_a_message_sent_again_without_a_nodule_replaces_the_first(tmp_path, other):
    text, in_force = OTHER_READS[other]
    folder = write_case(tmp_path)
    (folder / "reads.xml").unlink()
    (folder / "z.xml").write_text(FIRST_READ)
    (folder / "a.xml").write_text(text)
    assert [name.rpartition("/")[2] for name in only(tmp_path).annotations] == in_force


BOMB = '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><LidcReadMessage>&b;</LidcReadMessage>'


UNREADABLE = [
    BOMB,
    "<LidcReadMessage>",
    "",
    xml(nodule(roi(1, [("a", 1), (2, 2)]))),
    xml(nodule(roi(1))).replace("xCoord", "x"),
]


@pytest.mark.parametrize("text", UNREADABLE)
def test_unreadable_xml_excludes_its_series_only(tmp_path, text):
    folder = write_case(tmp_path)
    write_case(tmp_path, "P-02", "1.2.4")
    (folder / "reads.xml").write_text(text)
    first, second = find(tmp_path)
    assert "reads.xml: cannot be read as LIDC XML" in first.excluded
    assert not second.excluded
    with pytest.raises(InputError, match="cannot be read as LIDC XML"):
        lidc.read_xml(folder / "reads.xml")


def test_unreadable_xml_elsewhere_is_found_by_the_series_it_names(tmp_path):
    folder = write_case(tmp_path)
    (tmp_path / "tree").mkdir()
    (folder / "reads.xml").rename(tmp_path / "tree" / "1.xml")
    text = (tmp_path / "tree" / "1.xml").read_text()
    (tmp_path / "tree" / "1.xml").write_text(text[:-30])
    assert only(tmp_path).excluded.startswith("tree/1.xml: cannot be read as LIDC XML")


def cut(folder, bytes_left):
    file = folder / "000088.dcm"
    file.write_bytes(file.read_bytes()[:bytes_left])


def drop_reads(folder):
    (folder / "reads.xml").unlink()


def as_radiograph(folder):
    for k in range(SLICES):
        write_slice(folder / f"{90 - k:06d}.dcm", k, Modality="DX")


ERRORS = {
    "missing slice": (lambda f: (f / "000088.dcm").unlink(), "1 slice(s) missing between 000089.dcm and 000087.dcm"),
    "doubled slice": (
        lambda f: write_slice(f / "copy.dcm", 2, RescaleIntercept=-1000),
        "are different slices at the same position",
    ),
    "irregular": (lambda f: write_slice(f / "000090.dcm", 0, ImagePositionPatient=[-20, -30, -40.7]), "3.2 mm apart"),
    "two orientations": (lambda f: write_slice(f / "x.dcm", 1, axes=UPRIGHT[:, [0, 2, 1]]), "differs in orientation"),
    "two patients": (lambda f: write_slice(f / "000090.dcm", 0, patient="P-02"), "do not have one PatientID"),
    "truncated": (lambda f: cut(f, -1), "000088.dcm: is truncated"),
    "cut in the header": (lambda f: cut(f, 600), "000088.dcm: has no pixel data, or is truncated"),
    "empty": (lambda f: cut(f, 0), "000088.dcm: is empty"),
    "no reads": (drop_reads, "no reader XML names this series"),
    "radiograph": (as_radiograph, "chest radiograph (modality DX)"),
    "radiograph reads": (
        lambda f: (f / "reads.xml").write_text(xml(root="IdriReadMessage")),
        "readings of a chest radiograph",
    ),
    "single slice": (lambda f: [(f / f"{90 - k:06d}.dcm").unlink() for k in range(1, SLICES)], "single slice"),
}


@pytest.mark.parametrize("error", ERRORS)
def test_bad_series_keep_a_row_with_the_reason(tmp_path, error):
    harm, reason = ERRORS[error]
    harm(write_case(tmp_path))
    write_case(tmp_path, "P-02", "1.2.4")
    index = pd.DataFrame(index_source("lidc", tmp_path))
    assert index["status"].tolist() == ["excluded", "ok"]
    assert reason in index["reason"][0]
    assert str(tmp_path) not in index["reason"][0]


def test_errors_that_appear_after_indexing_exclude_the_case(tmp_path):
    folder = write_case(tmp_path)
    case, *_ = index_source("lidc", tmp_path)
    write_slice(folder / "000088.dcm", 2, PixelData=b"\0\0")
    with pytest.raises(ExcludedCaseError, match=r"000088.dcm: pixels cannot be decoded"):
        lidc.load_scan(tmp_path, case)
    write_slice(folder / "000088.dcm", 2)
    (folder / "reads.xml").unlink()
    with pytest.raises(ExcludedCaseError, match=r"reads.xml: cannot be read"):
        lidc.load_scan(tmp_path, case)


def test_two_series_in_one_folder_and_extra_files(tmp_path):
    folder = write_case(tmp_path)
    for k in range(3):
        write_slice(folder / f"other {k}.dcm", k, series="1.2.9", Rows=ROWS)
    (folder / "second.xml").write_text(xml("", series="1.2.9"))
    (folder / "notes.txt").write_text("not an image")
    (folder / "._000090.dcm").write_bytes(b"\0" * 300)
    (folder / "unrelated.xml").write_text("<settings/>")
    first, second = find(tmp_path)
    assert (first.case_id, first.size[2], second.case_id, second.size[2]) == ("P-01", 5, "P-01_2", 3)
    assert (first.excluded, second.excluded, second.n_nodules) == ("", "", 0)
    assert load(tmp_path).ct.shape == (COLUMNS, ROWS, 5)


@pytest.mark.parametrize(
    ("patient", "case_id"), [("../../etc", "_.._etc"), (".hidden", "hidden"), ("a/b c", "a_b_c"), ("..", "unnamed")]
)
def test_patient_ids_never_lead_outside(tmp_path, patient, case_id):
    write_series(tmp_path / "x", patient=patient)
    assert only(tmp_path).case_id == case_id


def test_damaged_files_without_a_series_keep_a_row(tmp_path):
    (tmp_path / "P-07").mkdir()
    (tmp_path / "P-07" / "1.dcm").write_bytes(b"nothing")
    series = only(tmp_path)
    assert (series.case_id, series.patient_id) == ("P-07", "")
    assert series.excluded.startswith("P-07/1.dcm: is empty or not a DICOM file.")


def test_links_are_followed_once(tmp_path):
    folder = write_case(tmp_path / "data")
    (tmp_path / "subset").mkdir()
    (tmp_path / "subset" / "P-01").symlink_to(tmp_path / "data" / "P-01")
    (folder / "loop").symlink_to(tmp_path / "subset")
    assert not only(tmp_path / "subset").excluded


def test_index_survives_its_file(tmp_path):
    write_case(tmp_path / "data")
    index = index_source("lidc", tmp_path / "data")
    write_index(tmp_path / "index.tsv", index)
    case = read_index(tmp_path / "index.tsv").iloc[0]
    assert lidc.load_scan(tmp_path / "data", case).ct.shape == (COLUMNS, ROWS, SLICES)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no CT series"):
        index_source("lidc", tmp_path / "empty")


def test_indexing_plain_files_needs_neither_pydicom_nor_nibabel(tmp_path):
    write_case(tmp_path)
    code = (
        "import sys, pathlib; from lungddpm.sources.index import index_source\n"
        "index_source('lidc', pathlib.Path(sys.argv[1]))\n"
        "sys.exit(' '.join({'pydicom', 'nibabel', 'scipy', 'skimage', 'torch'} & set(sys.modules)))"
    )
    assert run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True).stderr.strip() == ""


def test_quick_header_reader_agrees_with_pydicom(shared_data):
    for file in sorted((shared_data / "lidc").rglob("*.dcm"))[::10]:
        elements, end = lidc.headers._explicit_elements(file.read_bytes()[:8192])
        dataset = pydicom.dcmread(file)
        for keyword in set(elements) - {"TransferSyntaxUID"}:
            value = dataset[keyword].value
            text = "\\".join(map(str, value)) if dataset[keyword].VM > 1 else str(value)
            assert elements[keyword] == text
        assert end == file.stat().st_size


@pytest.mark.parametrize(
    ("file", "nodules_of_readers"),
    [
        ("157-161.xml", {0: 1, 1: 1, 3: 1}),
        ("erratum-157-161.xml", {1: 1, 3: 1}),
        ("188-011.xml", {0: 1, 1: 1, 2: 1, 3: 1}),
        ("188-264.xml", {0: 1, 2: 1}),
        ("188-283.xml", {0: 6, 1: 5, 2: 3, 3: 4}),
        ("189-110.xml", {0: 1, 1: 1, 2: 1}),
        ("189-173.xml", {0: 1, 3: 1}),
        ("185-068.xml", {}),
    ],
)
def test_traps_of_the_release(shared_data, file, nodules_of_readers):
    reads = lidc.read_xml(shared_data / "lidc-xml" / file)
    readers = [mark.reader for mark in reads.marks]
    assert {reader: readers.count(reader) for reader in readers} == nodules_of_readers
    assert reads.is_ct == (file != "185-068.xml")


def test_same_reads_in_two_files_count_once(shared_data):
    reads = [lidc.read_xml(shared_data / "lidc-xml" / name) for name in ("189-173.xml", "189-174.xml")]
    assert reads[0].series_uid == reads[1].series_uid
    assert merged(reads) == list(reads[0].marks)


def test_real_scans(shared_data):
    index = pd.DataFrame(index_source("lidc", shared_data / "lidc")).set_index("case_id")
    assert index["status"].tolist() == ["ok", "ok"]
    assert index["n_nodules"].to_dict() == {"LIDC-IDRI-0001": 1, "LIDC-IDRI-0003": 4}
    scan = lidc.load_scan(shared_data / "lidc", index.loc["LIDC-IDRI-0003"])
    oracle = nibabel.load(shared_data / "lidc-oracle" / "LIDC-IDRI-0003_consensus050.nii.gz")
    assert scan.ct.shape == oracle.shape
    np.testing.assert_allclose(scan.ct.affine, oracle.affine, atol=1e-4)
    assert (scan.ct.array.min(), scan.ct.array.max()) == (-1024, 5892)
    assert [annotation.reader for annotation in scan.annotations] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 4


def marks_by_pattern(text):
    """Points, cut-out outlines and sum of ratings of every mark of 3 mm or more, reader by reader, without a parser."""
    for reader, session in enumerate(re.findall(r"<readingSession>(.*?)</readingSession>", text, re.DOTALL)):
        for mark in re.findall(r"<unblindedReadNodule>(.*?)</unblindedReadNodule>", session, re.DOTALL):
            ratings = re.search(r"<characteristics>(.*?)</characteristics>", mark, re.DOTALL)
            total = sum(map(int, re.findall(r">\s*(\d+)\s*<", ratings[1]))) if ratings else 0
            points = len(re.findall(r"<xCoord>", mark))
            if points > 1 and total > 0:
                yield reader, points, len(re.findall(r"<inclusion>\s*FALSE", mark)), total


def test_every_outline_and_rating_of_the_release_is_read(shared_data):
    files = [file for file in (shared_data / "lidc-xml").glob("*.xml") if file.name != "185-068.xml"]
    files += (shared_data / "lidc").glob("*/*/*/*.xml")
    for file in files:
        expected = list(marks_by_pattern(file.read_text("utf-8-sig")))
        marks = lidc.read_xml(file).marks
        assert [
            (
                mark.reader,
                sum(len(outline.points) for outline in mark.outlines),
                sum(not outline.inclusion for outline in mark.outlines),
                sum(mark.characteristics.values()),
            )
            for mark in marks
        ] == expected
        assert all(np.isfinite(outline.z_mm) for mark in marks for outline in mark.outlines)
        assert all(1 <= value <= 6 for mark in marks for value in mark.characteristics.values())


@pytest.mark.parametrize(("file", "sessions"), [("188-011.xml", 8), ("189-110.xml", 3), ("189-173.xml", 4)])
def test_sessions_of_the_release_number_the_readers(shared_data, file, sessions):
    text = (shared_data / "lidc-xml" / file).read_text()
    assert text.count("<readingSession>") == sessions
    # Of eight sessions, only the first four hold nodules of 3 mm and more.
    assert max(mark.reader for mark in lidc.read_xml(shared_data / "lidc-xml" / file).marks) < 4


def index_beside(top, shared_data, patient, *names, as_=None):
    """The row of a series that these files of the release name, its slices small ones made here.

    `as_`: other names for the files.
    """
    uid = lidc.read_xml(shared_data / "lidc-xml" / names[0]).series_uid
    folder = write_series(top / patient / uid, series=uid, patient=patient)
    (top / "tcia-lidc-xml").mkdir()
    for name, other in zip(names, as_ or names, strict=True):
        shutil.copy(shared_data / "lidc-xml" / name, top / "tcia-lidc-xml" / other)
    (row,) = index_source("lidc", top)
    assert row["path"] == folder.relative_to(top).as_posix()
    return row


def voxels_of(mark):
    """Voxels in one reader's outlines, each slice by itself."""
    slices = sorted({outline.z_mm for outline in mark.outlines})
    contours = tuple(Contour(slices.index(o.z_mm), np.array(o.points), o.inclusion) for o in mark.outlines)
    return int(annotation_mask(Annotation(mark.reader, contours))[1].sum())


@pytest.mark.filterwarnings("ignore:The value length")
def test_the_published_erratum_replaces_the_bogus_contour(shared_data, tmp_path):
    original = index_beside(tmp_path / "a", shared_data, "LIDC-IDRI-0101", "157-161.xml")
    both = index_beside(tmp_path / "b", shared_data, "LIDC-IDRI-0101", "157-161.xml", "erratum-157-161.xml")
    assert json.loads(original["annotations"]) == ["tcia-lidc-xml/157-161.xml"]
    assert json.loads(both["annotations"]) == ["tcia-lidc-xml/erratum-157-161.xml"]
    # Whatever the files are called, in either order.
    for first, second in [("157.xml", "161-resubmitted-correction-3-9-12.xml"), ("b.xml", "a.xml")]:
        top = tmp_path / second
        row = index_beside(
            top, shared_data, "LIDC-IDRI-0101", "157-161.xml", "erratum-157-161.xml", as_=(first, second)
        )
        assert json.loads(row["annotations"]) == [f"tcia-lidc-xml/{second}"]
        assert row["n_nodules"] == 1
    marks = lidc.read_xml(shared_data / "lidc-xml" / "erratum-157-161.xml").marks
    assert [voxels_of(mark) for mark in marks] == [65, 115]
    bogus, *_ = lidc.read_xml(shared_data / "lidc-xml" / "157-161.xml").marks
    assert (bogus.reader, len(bogus.outlines), voxels_of(bogus)) == (0, 23, 142_290)


@pytest.mark.filterwarnings("ignore:The value length")
def test_two_files_of_one_series_are_merged_and_never_multiplied(shared_data, tmp_path):
    row = index_beside(tmp_path, shared_data, "LIDC-IDRI-0127", "189-173.xml", "189-174.xml")
    assert len(json.loads(row["annotations"])) == 2
    assert (row["n_nodules"], row["status"]) == (1, "ok")
