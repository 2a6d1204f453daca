"""From headers to a grid: rounded positions, and what lies among the slices of a series without being one."""

import json
import shutil
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
from lidc_files import (
    COLUMNS,
    ROWS,
    SLICES,
    SPACING,
    STORED,
    UPRIGHT,
    enhance,
    find,
    item,
    load,
    nodule,
    only,
    roi,
    write_case,
    write_series,
    write_slice,
    xml,
)  # fmt: skip
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless

from lungddpm.core.errors import ExcludedCaseError
from lungddpm.sources import lidc
from lungddpm.sources.index import index_source
from lungddpm.sources.lidc.headers import Header
from lungddpm.sources.lidc.slices import stack_of


def stack_at(positions, axes=UPRIGHT):
    """The stack of slices whose headers have these positions, (slices, 3) in mm, and `axes` as in `write_slice`."""
    orientation = np.concatenate([axes[:, 0], axes[:, 1]])
    elements = {"Rows": "12", "Columns": "10", "PixelSpacing": "0.8\\0.7", "ImageOrientationPatient": text(orientation)}
    headers = [
        Header(Path("series", f"{k:04d}.dcm"), elements | {"ImagePositionPatient": text(position)})
        for k, position in enumerate(positions)
    ]
    return stack_of(headers[::-1])


def text(values):
    return "\\".join(map(repr, map(float, values)))


def line(spacing, count, start, direction=(0, 0, 1)):
    return np.array([-170.0, -171.37, start]) + np.outer(np.arange(count) * spacing, direction)


def middle_of(stack):
    """Where the first pixel of the middle of the stack lies, LPS."""
    return (stack.affine @ [0, 0, (stack.size[2] - 1) / 2, 1])[:3] * [-1, -1, 1]


# ---------------------------------------------------------------- rounded positions

ROUNDED = {
    "1.25 mm to 1 decimal": (1.25, 120, 1),
    "0.625 mm to 1 decimal": (0.625, 300, 1),
    "0.625 mm to 2 decimals": (0.625, 300, 2),
    "0.7 mm to 1 decimal": (0.7, 60, 1),
    "2.5 mm to whole mm": (2.5, 60, 0),
    "1.25 mm to 1 decimal, five slices": (1.25, 5, 1),
    "0.625 mm to 1 decimal, three slices": (0.625, 3, 1),
    "a third of a mm to 1 decimal": (1 / 3, 60, 1),
    "0.8 mm to 6 decimals": (0.8, 60, 6),
}


@pytest.mark.parametrize("start", [-100.0, -101.37, 0.03, 7.777])
@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_positions_make_an_even_grid(name, start):
    spacing, count, decimals = ROUNDED[name]
    truth = line(spacing, count, start)
    stack = stack_at(truth.round(decimals))
    # Many rounded positions tell the spacing better than two.
    assert stack.spacing_mm[2] == pytest.approx(spacing, abs=1.5 * 10**-decimals / count)
    np.testing.assert_allclose(middle_of(stack), truth.mean(axis=0), atol=0.51 * 10**-decimals)
    np.testing.assert_allclose(stack.affine[:2, 2], 0, atol=1e-12)


def test_rounding_in_plane_is_not_a_tilt():
    angle = np.deg2rad(20)
    axes = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    truth = line(1.25, 80, -50.0, axes[:, 2])
    stack = stack_at(truth.round(1), axes)
    np.testing.assert_allclose(stack.affine[:3, 2] * [-1, -1, 1], 1.25 * axes[:, 2], atol=2e-3)
    columns, rows, slices = stack.affine[:3, :3].T
    assert abs(slices @ columns) < 1e-9
    assert abs(slices @ rows) < 1e-9


@pytest.mark.parametrize("gone", [1, 5, 20])
@pytest.mark.parametrize("name", [name for name in ROUNDED if "slices" not in name])
def test_missing_slices_are_found_among_rounded_positions(name, gone):
    spacing, count, decimals = ROUNDED[name]
    positions = np.delete(line(spacing, count, -101.37), range(20, 20 + gone), axis=0)
    with pytest.raises(ExcludedCaseError, match=rf": {gone} slice\(s\) missing between 0019.dcm and 0020.dcm"):
        stack_at(positions.round(decimals))


@pytest.mark.parametrize(("spacing", "decimals", "moved"), [(1.25, 1, 0.2), (0.625, 2, 0.05), (2.5, 3, 0.06)])
def test_a_slice_out_of_place_is_found_among_rounded_positions(spacing, decimals, moved):
    positions = line(spacing, 40, -100.0)
    positions[17, 2] += moved
    with pytest.raises(ExcludedCaseError, match=r"001[678].dcm are .* mm apart, the others"):
        stack_at(positions.round(decimals))


def test_a_slice_far_from_the_others_is_not_taken_for_a_copy():
    positions = np.concatenate([line(1.25, 40, -100.0), [[-170.0, -171.37, 1000.0]]])
    with pytest.raises(ExcludedCaseError, match=r"840 slice\(s\) missing between 0039.dcm and 0040.dcm"):
        stack_at(positions)


def test_slices_that_lean_too_far_are_refused():
    lean = np.array([0, np.sin(1.0), np.cos(1.0)])
    with pytest.raises(ExcludedCaseError, match="shifted sideways by 57 degrees"):
        stack_at(line(2.5, 40, -100.0, lean))


def test_slices_that_lean_over_many_tiny_pixels_are_refused():
    positions = line(400.0, 900, -100.0, [0, 0.7, 0.7])
    with pytest.raises(ExcludedCaseError, match="shifted sideways by 45 degrees"):
        stack_at(positions)


def test_a_slice_shifted_sideways_is_named():
    positions = line(1.25, 40, -100.0)
    positions[17, 0] += 0.5
    with pytest.raises(ExcludedCaseError, match="0017.dcm is shifted sideways"):
        stack_at(positions.round(1))


def test_even_positions_keep_their_grid():
    positions = line(2.5, 40, -340.125)
    stack = stack_at(positions)
    np.testing.assert_allclose(stack.affine[:3, 3] * [-1, -1, 1], positions[0], rtol=0, atol=1e-9)
    np.testing.assert_allclose(stack.affine[:3, 2], [0, 0, 2.5], rtol=0, atol=1e-12)


# ---------------------------------------------------------------- what else is in a series

CORONAL = UPRIGHT[:, [0, 2, 1]]
LOCALIZER = ["ORIGINAL", "PRIMARY", "LOCALIZER"]


def notes_of(top):
    """The notes of the only row, which `load_scan` hands on."""
    row, *others = index_source("lidc", top)
    assert (row["status"], row["reason"], others) == ("ok", "", [])
    assert load(top).notes == tuple(json.loads(row["notes"]))
    return json.loads(row["notes"])


def assert_true_scan(top):
    scan = load(top)
    np.testing.assert_array_equal(scan.ct.array, STORED - 1024)
    np.testing.assert_allclose(scan.ct.affine[:3, 3], [20, 30, -40])
    np.testing.assert_allclose(scan.ct.spacing_mm, SPACING)


@pytest.mark.parametrize("name", ["000000.dcm", "zzz.dcm"])
def test_localizers_are_left_out_and_noted(tmp_path, name):
    folder = write_case(tmp_path)
    write_slice(folder / name, 1, axes=CORONAL, ImageType=LOCALIZER, Rows=8, PixelData=bytes(160))
    write_slice(folder / f"2{name}", 2, axes=CORONAL, ImageType=LOCALIZER)
    (note,) = notes_of(tmp_path)
    assert note.startswith("2 localizer(s) among the slices were left out (")
    assert name in note
    assert_true_scan(tmp_path)


def test_a_localizer_in_the_plane_of_the_slices_is_left_out(tmp_path):
    write_slice(write_case(tmp_path) / "000000.dcm", 1, ImageType=LOCALIZER, ImagePositionPatient=[-20, -30, 300])
    assert len(notes_of(tmp_path)) == 1
    assert_true_scan(tmp_path)


def test_screenshots_are_left_out_and_noted(tmp_path):
    folder = write_case(tmp_path)
    capture = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7", "Rows": 4, "PixelData": bytes(80)}
    write_slice(folder / "dose.dcm", 1, ImagePositionPatient=None, **capture)
    write_slice(folder / "report.dcm", 1, ImageType=["DERIVED", "SECONDARY"], ImagePositionPatient=None)
    assert notes_of(tmp_path) == ["2 screenshot(s) among the slices were left out (dose.dcm, report.dcm)"]
    assert_true_scan(tmp_path)


def test_slices_that_a_converter_has_written_are_slices(tmp_path):
    write_case(tmp_path, SOPClassUID="1.2.840.10008.5.1.4.1.1.7", ImageType=["DERIVED", "SECONDARY"])
    assert notes_of(tmp_path) == []
    assert_true_scan(tmp_path)


def test_a_series_of_localizers_is_reported_as_such(tmp_path):
    write_case(tmp_path, ImageType=LOCALIZER)
    assert "has only localizers (scout images)" in only(tmp_path).excluded


@pytest.mark.parametrize("joined", [False, True], ids=["slices", "multi-frame"])
@pytest.mark.parametrize("syntax", [pydicom.uid.ExplicitVRLittleEndian, pydicom.uid.ImplicitVRLittleEndian])
def test_a_series_marked_as_synthetic_is_left_out(tmp_path, syntax, joined):
    """Synthetic Data (0008,001C), PS3.3 C.7.5.1; an absent, empty or NO element is what real scans have."""
    folders = {
        value: write_case(tmp_path, f"P-{value}", f"1.2.{k}", syntax=syntax, SyntheticData=value)
        for k, value in enumerate(["NO", "", "YES"], start=3)
    }
    if joined:
        for folder in folders.values():
            enhance(folder)
    found = {series.patient_id.removeprefix("P-"): series.excluded for series in find(tmp_path)}
    name = "enhanced.dcm" if joined else "000086.dcm"
    assert found.pop("YES").endswith(
        f"{name}: is marked as synthetic CT (Synthetic Data (0008,001C) is YES). Take the series out of this data set; "
        "to use synthetic CT in an arm, list it under arms.external."
    )
    assert found == {"NO": "", "": ""}


def test_one_synthetic_slice_makes_a_series_synthetic(tmp_path):
    folder = write_case(tmp_path)
    row, *_ = index_source("lidc", tmp_path)
    write_slice(folder / "000088.dcm", 2, SyntheticData="YES")
    assert "000088.dcm: is marked as synthetic CT" in only(tmp_path).excluded
    with pytest.raises(ExcludedCaseError, match=r"000088\.dcm: is marked as synthetic CT"):
        lidc.load_scan(tmp_path, row)


@pytest.mark.parametrize("name", ["000000.dcm", "zzz.dcm"])
def test_the_odd_slice_is_named_not_a_good_one(tmp_path, name):
    write_slice(write_case(tmp_path) / name, 1, axes=CORONAL)
    assert f"{name}: differs in orientation" in only(tmp_path).excluded


def test_slices_that_are_there_twice_count_once(tmp_path):
    folder = write_case(tmp_path)
    shutil.copy(folder / "000088.dcm", folder / "copy.dcm")
    # Sent again under another name and in another syntax.
    write_slice(folder / "again.dcm", 3, SOPInstanceUID="1.2.3.99", syntax=pydicom.uid.RLELossless)
    assert notes_of(tmp_path) == ["2 slice(s) are stored more than once, with equal content: one was kept"]
    assert_true_scan(tmp_path)
    (annotation,) = load(tmp_path).annotations
    assert [contour.slice_index for contour in annotation.contours] == [1, 2]


def test_every_slice_twice_counts_once(tmp_path):
    folder = write_case(tmp_path)
    for file in list(folder.glob("*.dcm")):
        shutil.copy(file, folder / f"copy of {file.name}")
    assert len(notes_of(tmp_path)) == 1
    assert_true_scan(tmp_path)


@pytest.mark.parametrize("change", [{"RescaleIntercept": -1000}, {"PixelData": bytes(2 * ROWS * COLUMNS)}])
def test_different_slices_of_one_position_stay_an_error(tmp_path, change):
    write_slice(write_case(tmp_path) / "copy.dcm", 2, **change)
    assert "000088.dcm and copy.dcm are different slices at the same position" in only(tmp_path).excluded


@pytest.mark.parametrize("kept", [range(SLICES), [1, 2]])
def test_second_copies_of_a_series_are_left_out_and_noted(tmp_path, kept):
    folder = write_case(tmp_path)
    again = write_series(tmp_path / "P-01" / "zz backup", kept)
    shutil.copy(folder / "reads.xml", again)
    assert notes_of(tmp_path) == ["copies of these slices elsewhere were left out (P-01/zz backup)"]
    assert_true_scan(tmp_path)
    assert len(load(tmp_path).annotations) == 1


def test_the_complete_copy_is_kept(tmp_path):
    (write_case(tmp_path) / "000088.dcm").unlink()
    write_series(tmp_path / "P-01" / "zz backup")
    assert notes_of(tmp_path) == ["copies of these slices elsewhere were left out (P-01/a study/1.2.3)"]
    assert_true_scan(tmp_path)


def test_copies_that_differ_stay_an_error(tmp_path):
    write_case(tmp_path)
    again = write_series(tmp_path / "P-01" / "zz backup")
    write_slice(again / "000088.dcm", 2, PixelData=bytes(2 * ROWS * COLUMNS))
    assert only(tmp_path).excluded == (
        "P-01: series is spread over 2 folders (P-01/a study/1.2.3, P-01/zz backup). P-01/a study/1.2.3: 000088.dcm "
        "and 000088.dcm are different slices at the same position. Keep one of them."
    )


DIVIDED = {
    "halves": [[0, 1, 2], [3, 4]],
    "every other slice": [[0, 2, 4], [1, 3]],
    "a folder each": [[k] for k in range(SLICES)],
    "with a copy of a half": [[0, 1, 2], [3, 4], [0, 1]],
    "overlapping": [[0, 1, 2], [2, 3, 4]],
}


@pytest.mark.parametrize("name", DIVIDED)
def test_a_series_divided_over_folders_is_one_scan(tmp_path, name):
    """As on CDs and in exports of a PACS."""
    for number, slices in enumerate(DIVIDED[name]):
        write_series(tmp_path / "cd" / f"DIR{number:03d}", slices)
    (tmp_path / "cd" / "reads.xml").write_text(xml(nodule(roi(1), roi(2))))
    (row,) = index_source("lidc", tmp_path)
    assert (row["status"], row["size_z"], row["path"]) == ("ok", SLICES, "cd")
    note, *_ = notes_of(tmp_path)
    assert note.startswith(f"its slices are in {len(DIVIDED[name])} folders (cd/DIR000, cd/DIR001")
    assert_true_scan(tmp_path)
    scan = load(tmp_path)
    assert [contour.slice_index for contour in scan.annotations[0].contours] == [1, 2]
    assert len(scan.files) == SLICES + 1


def test_a_part_may_be_in_a_folder_below_another(tmp_path):
    folder = write_series(tmp_path / "ct", [0, 1, 2])
    write_series(folder / "more", [3, 4])
    (folder / "reads.xml").write_text(xml(nodule(roi(1))))
    assert_true_scan(tmp_path)


def test_slices_missing_from_a_divided_series_are_missed(tmp_path):
    write_series(tmp_path / "DIR000", [0, 1])
    write_series(tmp_path / "DIR001", [3, 4])
    assert "series is spread over 2 folders (DIR000, DIR001). DIR000: 1 slice(s) missing" in only(tmp_path).excluded


def test_damage_beside_a_part_excludes_the_series(tmp_path):
    write_series(tmp_path / "DIR000", [0, 1, 2])
    write_series(tmp_path / "DIR001", [3, 4])
    (tmp_path / "reads.xml").write_text(xml(nodule(roi(1))))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.dcm").write_bytes(b"nothing")
    row, other = index_source("lidc", tmp_path)
    assert (row["status"], other["status"]) == ("ok", "excluded")
    assert lidc.load_scan(tmp_path, row).ct.shape[2] == SLICES
    (tmp_path / "elsewhere" / "x.dcm").rename(tmp_path / "DIR001" / "x.dcm")
    (row,) = index_source("lidc", tmp_path)
    assert row["reason"].startswith("DIR001/x.dcm: is empty or not a DICOM file")
    with pytest.raises(ExcludedCaseError, match="x.dcm: is empty"):
        lidc.load_scan(tmp_path, row)


def test_a_divided_series_of_two_patients_is_refused(tmp_path):
    write_series(tmp_path / "DIR000", [0, 1, 2])
    write_series(tmp_path / "DIR001", [3, 4], patient="P-02")
    assert only(tmp_path).excluded == "DIR000: the slices do not have one PatientID. Fix the headers."


# ---------------------------------------------------------------- multi-frame files


@pytest.mark.parametrize("order", [range(SLICES), [4, 3, 2, 1, 0], [2, 0, 4, 1, 3]])
@pytest.mark.parametrize("syntax", [None, pydicom.uid.RLELossless])
def test_enhanced_ct(tmp_path, order, syntax):
    enhance(write_case(tmp_path), order, syntax=syntax)
    assert only(tmp_path).size == (COLUMNS, ROWS, SLICES)
    assert_true_scan(tmp_path)
    scan = load(tmp_path)
    assert scan.slice_thickness_mm == 3.0
    assert [file.name for file in scan.files] == ["enhanced.dcm", "reads.xml"]
    # All frames share the UID of what was the first slice: the positions tell where contours are.
    assert [contour.slice_index for contour in scan.annotations[0].contours] == [1, 2]


def test_enhanced_ct_in_jpeg_2000(tmp_path):
    def compress(dataset):
        frames = [np.ascontiguousarray(STORED[:, :, k].T.astype(np.uint16)) for k in range(SLICES)]
        code = [imagecodecs.jpeg2k_encode(frame, codecformat="j2k", reversible=True) for frame in frames]
        dataset.PixelData, dataset.file_meta.TransferSyntaxUID = encapsulate(code), JPEG2000Lossless
        dataset["PixelData"].VR = "OB"

    enhance(write_case(tmp_path), change=compress)
    assert_true_scan(tmp_path)


def test_enhanced_ct_with_a_rescale_of_each_frame(tmp_path):
    enhance(write_case(tmp_path), [3, 1, 0, 2, 4], shared_rescale=False)
    k = np.arange(SLICES)
    truth = np.clip(STORED * (1 + k) - 1024 - 10 * k, -1024, 32767)
    np.testing.assert_array_equal(load(tmp_path).ct.array, truth)


def test_enhanced_ct_of_one_frame_per_file(tmp_path):
    folder = write_case(tmp_path)
    for file in sorted(folder.glob("*.dcm")):
        one = tmp_path / "one"
        one.mkdir()
        file.rename(one / file.name)
        enhance(one, [0])
        (one / "enhanced.dcm").rename(file)
        one.rmdir()
    assert_true_scan(tmp_path)


def test_frames_that_were_slices_are_found_by_their_uids(tmp_path):
    def name_sources(dataset):
        for k, groups in enumerate(dataset.PerFrameFunctionalGroupsSequence):
            groups.ConversionSourceAttributesSequence = [item(ReferencedSOPInstanceUID=f"1.2.3.{k + 1}")]

    folder = write_case(tmp_path)
    (folder / "reads.xml").write_text(xml(nodule(roi(1, z=999), roi(3, z=999))))
    enhance(folder, change=name_sources)
    (annotation,) = load(tmp_path).annotations
    assert [contour.slice_index for contour in annotation.contours] == [1, 3]


def test_localizer_frames_are_left_out(tmp_path):
    def mark(dataset):
        for k, groups in enumerate(dataset.PerFrameFunctionalGroupsSequence):
            groups.CTImageFrameTypeSequence = [
                item(FrameType=LOCALIZER if k == 4 else ["ORIGINAL", "PRIMARY", "AXIAL"])
            ]

    enhance(write_case(tmp_path), change=mark)
    assert notes_of(tmp_path) == ["1 localizer(s) among the slices were left out (frame 5 of enhanced.dcm)"]
    np.testing.assert_array_equal(load(tmp_path).ct.array, STORED[:, :, :4] - 1024)


MULTIFRAME_ERRORS = {
    "no position": (
        lambda d: delattr(d.PerFrameFunctionalGroupsSequence[2], "PlanePositionSequence"),
        "enhanced.dcm: has no ImagePositionPatient",
    ),
    "fewer frames described": (lambda d: d.PerFrameFunctionalGroupsSequence.pop(), "has 5 frames, but describes 4"),
    "no functional groups": (
        lambda d: (delattr(d, "SharedFunctionalGroupsSequence"), delattr(d, "PerFrameFunctionalGroupsSequence")),
        "has 5 frames without positions",
    ),
    "two frames of one position": (
        lambda d: d.PerFrameFunctionalGroupsSequence.__setitem__(3, d.PerFrameFunctionalGroupsSequence[2]),
        "frame 3 of enhanced.dcm and frame 4 of enhanced.dcm are different slices at the same position",
    ),
    "truncated": (lambda d: setattr(d, "PixelData", d.PixelData[:-2]), "prepare:pixels cannot be decoded"),
    "no rescale": (
        lambda d: delattr(d.SharedFunctionalGroupsSequence[0], "PixelValueTransformationSequence"),
        "prepare:has no rescale slope",
    ),
}


@pytest.mark.parametrize("error", MULTIFRAME_ERRORS)
def test_errors_of_multi_frame_files_are_named(tmp_path, error):
    change, reason = MULTIFRAME_ERRORS[error]
    enhance(write_case(tmp_path), change=change)
    if reason.startswith("prepare:"):
        with pytest.raises(ExcludedCaseError, match=reason.removeprefix("prepare:")):
            load(tmp_path)
    else:
        assert reason in only(tmp_path).excluded
