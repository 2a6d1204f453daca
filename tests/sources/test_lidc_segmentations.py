"""DICOM SEG (by highdicom) or RTSTRUCT instead of reader XML: the same nodules, voxel for voxel."""

import shutil

import highdicom
import numpy as np
import pytest
from lidc_files import (
    COLUMNS,
    ROWS,
    SLICES,
    SPACING,
    find,
    load,
    nodule,
    only,
    outcomes_of_damage,
    roi,
    write_rtstruct,
    write_seg,
    write_series,
    xml,
)  # fmt: skip
from pydicom import Dataset, dcmread
from pydicom.pixels import pack_bits
from pydicom.sr.codedict import codes
from skimage.measure import find_contours

from lungddpm.config.models import Layouts
from lungddpm.core.errors import ExcludedCaseError
from lungddpm.layouts.nodules import annotation_mask, cluster_annotations, find_nodules
from lungddpm.sources import Region, lidc
from lungddpm.sources.index import index_source
from lungddpm.sources.lidc.segmentations import outlines, readers_of

LABEL = "Nodule 1 - Annotation {}"


def box(columns, rows, slices):
    mask = np.zeros((COLUMNS, ROWS, SLICES), bool)
    mask[slice(*columns), slice(*rows), slice(*slices)] = True
    return mask


NODULE = box((3, 6), (4, 6), (1, 3))


def write_idc(top, masks=None, **options):
    """A CT without XML, and a SEG object in a folder of its own for each annotation id or label."""
    folder = write_series(top / "P-01" / "a study" / "CT_1.2.3")
    for name, mask in ({"12": NODULE} if masks is None else masks).items():
        label = name if "Annotation" in name else LABEL.format(name)
        write_seg(top / "P-01" / "a study" / f"SEG_{name}" / "seg.dcm", {label: mask}, **options)
    return folder


def test_voxels_become_annotations_of_their_readers(tmp_path):
    write_idc(tmp_path, {"12": NODULE, "Nodule 001": box((4, 7), (4, 6), (2, 4)), "15": box((8, 9), (1, 2), (0, 1))})
    series = only(tmp_path)
    assert not series.excluded
    # 12 and 15 are one reader's.
    assert (len(series.annotations), series.n_nodules) == (3, 2)
    scan = load(tmp_path)
    assert sorted(annotation.reader for annotation in scan.annotations) == [0, 0, 1]
    drawn = np.zeros((COLUMNS, ROWS, SLICES), int)
    for annotation in scan.annotations:
        corner, mask = annotation_mask(annotation)
        drawn[tuple(slice(first, first + n) for first, n in zip(corner, mask.shape, strict=True))] += mask
    expected = 1 * NODULE + box((4, 7), (4, 6), (2, 4)) + box((8, 9), (1, 2), (0, 1))
    np.testing.assert_array_equal(drawn, expected)
    assert len(scan.files) == SLICES + 3


def test_outlines_are_the_voxels_beside_a_region():
    region = Region((4, 5, 6), np.array([[1, 1], [1, 0]], bool)[:, :, np.newaxis])
    (contour,) = outlines(region)
    around = {(4, 4), (5, 4), (3, 5), (6, 5), (3, 6), (5, 6), (4, 7)}
    assert contour.slice_index == 6
    assert set(map(tuple, contour.points.tolist())) == around


# Sessions of the readers' XML: of LIDC-IDRI-0003, -0566 (first four), -0700 and -0822.
SESSIONS = {
    "0003": [
        ["Nodule 001", "Nodule 003", "Nodule 002"],
        ["IL057_130591", "IL057_130598", "IL057_130602"],
        ["MI014_16595", "MI014_16599", "MI014_16588"],
        ["0", "8", "9", "12"],
    ],
    "0566": [["Nodule 002", "Nodule 001"], ["13227", "13216", "13228", "13212"], ["1341", "1330", "1342"], ["0", "8"]],
    "0700": [["Nodule 001", "Nodule 004"], ["0", "5", "12"], ["11569", "11552", "11548", "11562"]],
    "0822": [["76634", "76657", "76632"], ["Nodule 009", "Nodule 010"], ["15440", "15456"], ["0", "3", "12"]],
}


@pytest.mark.parametrize("patient", SESSIONS)
def test_readers_are_known_by_how_they_count(patient):
    readers = readers_of(name for session in SESSIONS[patient] for name in session)
    numbers = [{readers[name] for name in session} for session in SESSIONS[patient]]
    assert sorted(numbers, key=min) == [{reader} for reader in range(len(numbers))]


@pytest.mark.parametrize("names", [["reader1", "reader2"], ["1", "2", "3", "4"], ["R1", "R2"]])
def test_readers_that_look_like_one_exclude_the_series(tmp_path, names):
    write_idc(tmp_path, dict.fromkeys(names, NODULE))
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    assert only(tmp_path).excluded == (
        f"P-01/a study/SEG_{names[0]}/seg.dcm: 'Nodule 1' has several annotations ({shown}) that look like "
        "one reader's. Give each reader a prefix of their own, as in 'Nodule 1 - Annotation anna_1'."
    )


def test_readers_that_look_like_one_beside_another_exclude_the_series(tmp_path):
    """An annotation's id is unique in LIDC-IDRI; where it is not, it names a reader."""
    write_idc(tmp_path, {f"Nodule {n} - Annotation {name}": NODULE for n in "12" for name in ("R1", "R2", "expert")})
    assert "'Nodule 1' has several annotations (R1, R2)" in only(tmp_path).excluded
    with_prefixes = {f"Nodule {n} - Annotation {name}_{n}": NODULE for n in "12" for name in ("anna", "ben")}
    write_idc(tmp_path / "good", with_prefixes, ct="1.2.3")
    (series,) = find(tmp_path / "good")
    assert (series.excluded, series.n_nodules, series.notes) == ("", 2, ())


# Of the release: a reader's two annotations of one nodule, in two nodules of LIDC-IDRI's 2,651.
TWICE = [
    ["Nodule 001", "Nodule 002", "20976", "20972", "0", "1", "11786", "11782"],
    ["Nodule 003", "IL057_127736", "IL057_127735", "MI014_18032", "MI014_18037", "0"],
]


@pytest.mark.parametrize("names", TWICE)
def test_a_nodule_that_a_reader_of_the_release_drew_twice_is_noted(tmp_path, names):
    write_idc(tmp_path, dict.fromkeys(names, NODULE))
    series = only(tmp_path)
    assert series.excluded == ""
    assert series.notes[0].startswith("going by their ids, one reader drew 'Nodule 1' more than once (")


def test_labels_in_any_case_and_spacing(tmp_path):
    write_idc(tmp_path)
    write_seg(tmp_path / "b" / "seg.dcm", {"NODULE 1 -  ANNOTATION Nodule 001": NODULE})
    write_seg(tmp_path / "c" / "seg.dcm", {"nodule 1-annotation: ben_1": NODULE})
    series = only(tmp_path)
    assert (len(series.annotations), series.notes) == (3, ())
    assert {annotation.reader for annotation in load(tmp_path).annotations} == {0, 1, 2}


def test_segments_without_a_reader_beside_others_are_noted(tmp_path):
    write_idc(tmp_path)
    write_seg(tmp_path / "b" / "seg.dcm", {LABEL.format("ben_1"): NODULE, "heart": NODULE, "left lung": NODULE})
    series = only(tmp_path)
    assert series.excluded == ""
    assert series.notes == ("segments without a reader's annotation were left out ('heart', 'left lung')",)


def test_a_nodule_without_a_reader_beside_others_excludes_the_series(tmp_path):
    write_idc(tmp_path)
    write_seg(tmp_path / "b" / "seg.dcm", {LABEL.format("ben_1"): NODULE, "Lung nodule 2": NODULE})
    assert only(tmp_path).excluded == (
        "b/seg.dcm: has a nodule without a reader's annotation ('Lung nodule 2'). Label it as in "
        "'Nodule 1 - Annotation IL057_127364', or take it out."
    )


@pytest.mark.parametrize("label", ["Nodule 2", "Lung nodule_2", "nodule #3"])
def test_a_numbered_nodule_without_a_reader_in_an_object_of_its_own_excludes_the_series(tmp_path, label):
    write_idc(tmp_path)
    write_seg(tmp_path / "b" / "seg.dcm", {"heart": NODULE, label: NODULE})
    assert only(tmp_path).excluded == (
        f"b/seg.dcm: has a nodule without a reader's annotation ('{label}'). Label it as in "
        "'Nodule 1 - Annotation IL057_127364', or take it out."
    )


@pytest.mark.parametrize("label", ["Nodules", "Lesion 2", "Lung 2"])
def test_what_carries_no_number_of_a_nodule_in_an_object_of_its_own_is_noted(tmp_path, label):
    write_idc(tmp_path)
    write_seg(tmp_path / "b" / "seg.dcm", {label: NODULE})
    series = only(tmp_path)
    assert series.excluded == ""
    assert series.notes == ("1 SEG object(s) without a reader's annotation were left out (b/seg.dcm)",)


def two_of_a_number(dataset):
    dataset.SegmentSequence[1].SegmentNumber = 1


def test_two_segments_of_one_number_exclude_the_series(tmp_path):
    folder = write_series(tmp_path / "ct")
    write_seg(folder / "seg.dcm", {LABEL.format("7"): NODULE, LABEL.format("ben_1"): NODULE}, change=two_of_a_number)
    assert only(tmp_path).excluded == "ct/seg.dcm: has several segments with the number 1. Export it again."


def test_an_object_of_several_series_excludes_the_first(tmp_path):
    def change(dataset):
        dataset.ReferencedSeriesSequence.append(Dataset())
        dataset.ReferencedSeriesSequence[1].SeriesInstanceUID = "9.9"

    write_idc(tmp_path, change=change)
    assert "names several series (1.2.3, 9.9). Export one object per CT series." in only(tmp_path).excluded


def test_a_cluster_is_split_where_a_reader_drew_both(tmp_path):
    one, other = box((2, 4), (2, 4), (1, 3)), box((6, 8), (2, 4), (1, 3))
    for ids, nodules in {("3", "4"): 2, ("3", "Nodule 001"): 1}.items():
        top = tmp_path / ids[1]
        write_idc(top, {LABEL.format(ids[0]): one, f"Nodule 2 - Annotation {ids[1]}": other})
        scan = load(top)
        assert len(cluster_annotations(scan.annotations, scan.ct.affine, scan.slice_thickness_mm)) == nodules


NESTED = [box((k, 10 - k), (k, 12 - k), (1, 3)) for k in (1, 2, 3, 4, 4)]


@pytest.mark.parametrize(
    ("ids", "nodules"),
    [
        # Five people, by their prefixes.
        (["anna_1", "ben_1", "cleo_1", "dan_1", "eva_1"], 1),
        (["anna_1", "ben_1", "cleo_1", "dan_1", "7"], 1),
        # Four of LIDC-IDRI's: the gap between 7 and 500 makes two of one.
        (["IL057_1", "MI014_1", "Nodule 001", "7", "500"], 4),
    ],
)
def test_a_nodule_may_have_as_many_readers_as_are_named(tmp_path, ids, nodules):
    write_idc(tmp_path, dict(zip(ids, NESTED, strict=True)))
    found, _ = find_nodules(load(tmp_path), Layouts())
    assert len(found) == nodules
    if nodules == 1:
        assert found[0].readers == 5
        assert found[0].voxels == np.count_nonzero(NESTED[2])


def test_several_segments_in_one_object_and_frames_of_a_part_of_the_slice(tmp_path):
    folder = write_series(tmp_path / "ct")

    masks = {LABEL.format("7"): NODULE, LABEL.format("Nodule 001"): NODULE, "heart": NODULE}

    def crop(dataset):
        dataset.Rows, dataset.Columns = 4, 6
        move(SPACING[0], 3 * SPACING[1], 0)(dataset)
        dataset.PixelData = pack_bits(np.array([NODULE[1:7, 3:7, k].T for _ in masks for k in (1, 2)]))

    write_seg(folder / "seg.dcm", masks, change=crop)
    scan = load(tmp_path)
    assert len(scan.annotations) == 2
    for annotation in scan.annotations:
        corner, mask = annotation_mask(annotation)
        assert (corner.tolist(), mask.shape, mask.all()) == ([3, 4, 1], (3, 2, 2), True)


def test_xml_counts_before_segmentations(tmp_path):
    folder = write_idc(tmp_path)
    (folder / "reads.xml").write_text(xml(nodule(roi(1))))
    series = only(tmp_path)
    assert [name.rpartition("/")[2] for name in series.annotations] == ["reads.xml"]
    assert series.notes == ("1 SEG object(s) were left out, because there is readers' XML",)
    assert load(tmp_path).annotations[0].region is None


def test_copies_and_segmentations_without_a_reader_are_left_out(tmp_path):
    write_idc(tmp_path)
    shutil.copytree(tmp_path / "P-01" / "a study" / "SEG_12", tmp_path / "copy")
    write_seg(tmp_path / "other" / "lung.dcm", {"Lesion": NODULE})
    series = only(tmp_path)
    assert not series.excluded
    assert len(series.annotations) == 1
    assert series.notes == (
        "1 SEG object(s) without a reader's annotation were left out (other/lung.dcm)",
        "1 SEG object(s) are stored more than once: one was kept",
    )
    assert len(load(tmp_path).annotations) == 1


def test_reports_are_not_series(tmp_path):
    write_idc(tmp_path)
    write_seg(tmp_path / "SR" / "x.dcm", {"any": NODULE}, change=lambda dataset: setattr(dataset, "Modality", "SR"))
    assert not only(tmp_path).excluded


def set_first(sequence, keyword, value):
    def change(dataset):
        setattr(dataset.SharedFunctionalGroupsSequence[0][sequence].value[0], keyword, value)

    return change


def move(*millimetres):
    def change(dataset):
        for frame in dataset.PerFrameFunctionalGroupsSequence:
            place = frame.PlanePositionSequence[0]
            place.ImagePositionPatient = (np.array(place.ImagePositionPatient) + millimetres).tolist()

    return change


def blank(dataset):
    dataset.PixelData = bytes(len(dataset.PixelData))


OFF_GRID = {
    "other pixels": (set_first("PixelMeasuresSequence", "PixelSpacing", [0.8, 0.8]), "a different size or direction"),
    "other direction": (
        set_first("PlaneOrientationSequence", "ImageOrientationPatient", [-1, 0, 0, 0, 1, 0]),
        "a different size or direction",
    ),
    "between slices": (move(0, 0, 1.25), "its frame 1 does not lie on a slice"),
    "beyond the slices": (move(0, 0, 40), "its frame 1 does not lie on a slice"),
    "between pixels": (move(0.35, 0, 0), "shifted by a fraction of a pixel"),
    "beyond the pixels": (move(7, 0, 0), "reaches beyond the 10 x 12 pixels"),
    "nowhere": (
        lambda dataset: delattr(dataset, "PerFrameFunctionalGroupsSequence"),
        "does not give segment and position of its frame 1",
    ),
    "far away": (move(1e9, 0, 0), "frame 1 is far away"),
    "empty": (blank, "has no voxels in its segment 1"),
    "too few bits": (lambda dataset: setattr(dataset, "NumberOfFrames", 9), "pixels cannot be decoded|truncated"),
}


@pytest.mark.parametrize("harm", OFF_GRID)
def test_what_does_not_fit_the_slices_excludes_the_case(tmp_path, harm):
    change, reason = OFF_GRID[harm]
    write_idc(tmp_path, change=change)
    with pytest.raises(ExcludedCaseError, match=reason):
        load(tmp_path)


def test_rounded_positions_are_on_the_grid(tmp_path):
    write_idc(tmp_path, change=move(0.05, -0.05, 0.1))
    np.testing.assert_array_equal(load(tmp_path).annotations[0].region.corner, [3, 4, 1])


def fractions(dataset):
    dataset.SegmentationType = "FRACTIONAL"


REFUSED = {
    "fractions": (fractions, "has fractions or labels instead of bits"),
    "no reader": (
        lambda dataset: setattr(dataset.SegmentSequence[0], "SegmentLabel", "Tumour"),
        "no segment or ROI is labelled with nodule and reader's annotation, as in 'Nodule 1 - Annotation IL057_127364'",
    ),
    "no segment": (lambda dataset: delattr(dataset, "SegmentSequence"), "no segment or ROI is labelled"),
}


@pytest.mark.parametrize("harm", REFUSED)
def test_headers_that_cannot_be_used_exclude_the_series(tmp_path, harm):
    change, reason = REFUSED[harm]
    write_idc(tmp_path, change=change)
    assert reason in only(tmp_path).excluded


def test_a_truncated_segmentation_excludes_its_series(tmp_path):
    write_idc(tmp_path)
    file = tmp_path / "P-01" / "a study" / "SEG_12" / "seg.dcm"
    file.write_bytes(file.read_bytes()[:-10])
    assert only(tmp_path).excluded == "P-01/a study/SEG_12/seg.dcm: is truncated. Download or copy the file again."


@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_exclude_and_never_crash(tmp_path):
    write_idc(tmp_path)
    file = tmp_path / "P-01" / "a study" / "SEG_12" / "seg.dcm"
    assert outcomes_of_damage(tmp_path, file) == {"read", "excluded", "index"}


@pytest.mark.parametrize("named", ["another series", "none"])
def test_a_segmentation_of_another_series_has_a_row_of_its_own(tmp_path, named):
    def change(dataset):
        if named == "none":
            del dataset.ReferencedSeriesSequence

    write_idc(tmp_path, ct="9.9", change=change)
    ct, other = find(tmp_path)
    assert "no reader XML names this series, and no SEG or RTSTRUCT object" in ct.excluded
    expected = {"another series": "names a series whose images are missing", "none": "names no CT series"}
    assert other.excluded.startswith(f"P-01/a study/SEG_12/seg.dcm: {expected[named]}")


def test_the_label_may_be_the_series_description_of_a_single_segment(tmp_path):
    def change(dataset):
        dataset.SegmentSequence[0].SegmentLabel = "Nodule"
        dataset.SeriesDescription = "Segmentation of Nodule 1 - Annotation MI014_12127"

    write_idc(tmp_path, change=change)
    assert not only(tmp_path).excluded


def export_contours(scan, slices, folder):
    """Write what readers outlined as contours halfway between voxels, in one structure set."""
    sources = sorted((dcmread(file) for file in slices), key=lambda one: one.ImagePositionPatient[2])
    contours = {}
    for number, annotation in enumerate(scan.annotations):
        corner, mask = annotation_mask(annotation)
        drawn = contours[f"Nodule {number} - Annotation R{annotation.reader}_{number}"] = []
        for k in range(mask.shape[2]):
            source = sources[corner[2] + k]
            row_mm, column_mm = source.PixelSpacing
            steps = np.array(source.ImageOrientationPatient).reshape(2, 3) * [[column_mm], [row_mm]]
            for polygon in find_contours(np.pad(mask[:, :, k], 1).astype(float), 0.5):
                drawn.append(np.array(source.ImagePositionPatient) + (polygon[:-1] - 1 + corner[:2]) @ steps)
    write_rtstruct(folder / "RTSTRUCT" / "x.dcm", contours, ct=str(sources[0].SeriesInstanceUID))


def export(scan, slices, folder):
    """Write what readers outlined with highdicom, one object for each annotation, as IDC has them."""
    sources = sorted((dcmread(file) for file in slices), key=lambda one: one.ImagePositionPatient[2])
    for source in sources:
        source.SOPClassUID = source.file_meta.MediaStorageSOPClassUID
        for keyword in ("PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate", "StudyTime"):
            if keyword not in source:
                setattr(source, keyword, "")
    for number, annotation in enumerate(scan.annotations):
        corner, mask = annotation_mask(annotation)
        voxels = np.zeros(scan.ct.shape, bool)
        voxels[tuple(slice(first, first + n) for first, n in zip(corner, mask.shape, strict=True))] = mask
        described = highdicom.seg.SegmentDescription(
            segment_number=1,
            segment_label=f"Nodule {number} - Annotation R{annotation.reader}_{number}",
            segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
            segmented_property_type=codes.SCT.Nodule,
            algorithm_type="MANUAL",
        )
        written = highdicom.seg.Segmentation(
            source_images=sources,
            pixel_array=voxels.transpose(2, 1, 0),
            segmentation_type="BINARY",
            segment_descriptions=[described],
            series_instance_uid=highdicom.UID(),
            series_number=number + 1,
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="x",
            manufacturer_model_name="x",
            software_versions="1",
            device_serial_number="1",
        )
        file = folder / f"SEG_{number}" / "seg.dcm"
        file.parent.mkdir(parents=True)
        written.save_as(file)


def without_xml(top, source, row, write):
    """The same scan with objects instead of its XML; returns what both readings hold."""
    scan = lidc.load_scan(source, row)
    slices = [file for file in scan.files if file.suffix != ".xml"]
    write(scan, slices, top)
    (top / "CT").mkdir()
    for file in slices:
        (top / "CT" / file.name).symlink_to(file.resolve())
    (other,) = index_source("lidc", top)
    assert other["status"] == "ok"
    return scan, lidc.load_scan(top, other)


def assert_same_nodules(by_xml, by_object, level, **keys):
    one, other = (find_nodules(scan, Layouts(consensus=level, **keys))[0] for scan in (by_xml, by_object))
    assert [nodule.corner for nodule in one] == [nodule.corner for nodule in other]
    assert [nodule.readers for nodule in one] == [nodule.readers for nodule in other]
    for nodule_of_xml, nodule_of_object in zip(one, other, strict=True):
        np.testing.assert_array_equal(nodule_of_xml.mask, nodule_of_object.mask)
    return [nodule.voxels for nodule in other]


FORMS = pytest.mark.parametrize("write", [export, export_contours], ids=["SEG", "RTSTRUCT"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("patient", [0, 1])
@FORMS
def test_an_exported_phantom_has_the_nodules_of_its_xml(cohort, tmp_path, patient, write):
    row = index_source("lidc", cohort)[patient]
    by_xml, by_object = without_xml(tmp_path, cohort, row, write)
    for level in (0.25, 0.5, 0.75, 1.0):
        assert assert_same_nodules(by_xml, by_object, level)
    assert assert_same_nodules(by_xml, by_object, 0.5, minimum_readers=4)


# What pylidc finds: `oracle.csv`.
VOXELS = {
    "LIDC-IDRI-0001": {0.25: [6547], 0.5: [5428], 0.75: [4812], 1.0: [4184]},
    "LIDC-IDRI-0003": {0.5: [2542, 3241, 261, 704]},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("patient", VOXELS)
@FORMS
def test_an_exported_scan_of_the_release_has_the_nodules_of_its_xml(shared_data, tmp_path, patient, write):
    top = shared_data / "lidc" / patient
    (row,) = (row for row in index_source("lidc", top) if row["status"] == "ok")
    by_xml, by_object = without_xml(tmp_path, top, row, write)
    for level, voxels in VOXELS[patient].items():
        # Theirs are in the order of clusters, ours from feet to head.
        assert sorted(assert_same_nodules(by_xml, by_object, level)) == sorted(voxels)
