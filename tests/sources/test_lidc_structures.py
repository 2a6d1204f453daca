"""RTSTRUCT instead of reader XML: contours in mm become the voxels that they enclose."""

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
from pydicom.dataset import Dataset
from scipy import ndimage
from scipy.spatial.transform import Rotation
from skimage.measure import find_contours

from lungddpm.config.models import Layouts
from lungddpm.core.errors import ExcludedCaseError
from lungddpm.layouts.nodules import annotation_mask, find_nodules

LABEL = "Nodule 1 - Annotation anna_1"
ORIGIN = np.array([-20.0, -30.0, -40.0])
TURNED = Rotation.from_euler("xyz", (10, -20, 30), degrees=True).as_matrix()
SQUARE = [(3, 4), (5, 4), (5, 6), (3, 6)]


def in_mm(points, k, axes=None):
    """Points in pixels (column, row) of slice k, in mm (LPS)."""
    steps = (np.eye(3) if axes is None else axes) * SPACING
    return ORIGIN + np.column_stack([points, np.broadcast_to(k, len(points))]) @ steps.T


def outlined(mask, axes=None):
    """Contours halfway between the voxels inside and outside a mask, slice by slice, by scikit-image."""
    padded = np.pad(mask, ((1, 1), (1, 1), (0, 0))).astype(float)
    return [
        in_mm(polygon[:-1] - 1, k, axes)
        for k in range(mask.shape[2])
        for polygon in find_contours(padded[:, :, k], 0.5)
    ]


def write(top, contours, *, axes=None, **options):
    """A CT without XML, and an RTSTRUCT object beside it."""
    folder = write_series(top / "CT", **({} if axes is None else {"axes": axes}))
    write_rtstruct(top / "RTSTRUCT" / "x.dcm", contours, **options)
    return folder


def voxels_of(annotation):
    drawn = np.zeros((COLUMNS, ROWS, SLICES), bool)
    corner, mask = annotation_mask(annotation)
    drawn[tuple(slice(first, first + n) for first, n in zip(corner, mask.shape, strict=True))] = mask
    return drawn


def read(top):
    (annotation,) = load(top).annotations
    return voxels_of(annotation)


def blob(seed):
    """A random body, with holes and several parts on some slices."""
    noise = np.random.default_rng(seed).normal(size=(COLUMNS, ROWS, SLICES))
    return ndimage.gaussian_filter(noise, 0.7) > 0.1


@pytest.mark.parametrize("axes", [np.eye(3), TURNED], ids=["upright", "turned"])
@pytest.mark.parametrize("seed", range(5))
def test_contours_between_voxels_give_the_mask_that_they_outline(tmp_path, seed, axes):
    mask = blob(seed)
    write(tmp_path, {LABEL: outlined(mask, axes)}, axes=axes)
    np.testing.assert_array_equal(read(tmp_path), mask)


def test_contours_along_the_centres_of_the_outermost_voxels_include_them(tmp_path):
    """As converters of masks draw them; in mm their points are rounded."""
    write(tmp_path, {LABEL: [in_mm(SQUARE, k) for k in (1, 2)]})
    expected = np.zeros((COLUMNS, ROWS, SLICES), bool)
    expected[3:6, 4:7, 1:3] = True
    np.testing.assert_array_equal(read(tmp_path), expected)


def test_a_finely_drawn_ellipse_holds_the_voxels_whose_centres_are_in_it(tmp_path):
    angles = np.linspace(0, 2 * np.pi, 720, endpoint=False)
    points = np.column_stack([4.3 + 3.1 * np.cos(angles), 5.6 + 4.4 * np.sin(angles)])
    write(tmp_path, {LABEL: [in_mm(points, 2)]})
    x, y = np.indices((COLUMNS, ROWS))
    distance = ((x - 4.3) / 3.1) ** 2 + ((y - 5.6) / 4.4) ** 2
    assert abs(distance - 1).min() > 0.005  # no centre is on it
    np.testing.assert_array_equal(read(tmp_path)[:, :, 2], distance < 1)


OUTER, INNER = [(0.5, 0.5), (7.5, 0.5), (7.5, 8.5), (0.5, 8.5)], [(2.5, 2.5), (5.5, 2.5), (5.5, 6.5), (2.5, 6.5)]
HOLES = {
    "a contour in a contour": [OUTER, INNER],
    # Outer ring, a bridge to the hole, the hole the other way round, and back over the bridge.
    "a keyhole": [[*OUTER, OUTER[0], INNER[0], INNER[3], INNER[2], INNER[1], INNER[0]]],
    "the outer contour twice": [OUTER, INNER, OUTER],
}


@pytest.mark.parametrize("form", HOLES)
def test_holes_are_cut_out(tmp_path, form):
    write(tmp_path, {LABEL: [in_mm(points, 1) for points in HOLES[form]]})
    expected = np.zeros((COLUMNS, ROWS), bool)
    expected[1:8, 1:9] = True
    expected[3:6, 3:7] = False
    np.testing.assert_array_equal(read(tmp_path)[:, :, 1], expected)


def test_the_consensus_is_that_of_segmentations(tmp_path):
    masks = {
        f"Nodule {n} - Annotation {name}_{n}": blob(seed) for seed, (n, name) in enumerate([(1, "anna"), (1, "ben")])
    }
    write(tmp_path / "rt", {name: outlined(mask) for name, mask in masks.items()})
    write_series(tmp_path / "seg" / "CT")
    write_seg(tmp_path / "seg" / "SEG" / "x.dcm", masks)
    of_both = []
    for form in ("rt", "seg"):
        series = only(tmp_path / form)
        assert (series.excluded, series.n_nodules, series.notes) == ("", 1, ())
        of_both.append(find_nodules(load(tmp_path / form), Layouts())[0])
    for mine, theirs in zip(*of_both, strict=True):
        np.testing.assert_array_equal(mine.mask, theirs.mask)


def test_xml_and_segmentations_count_before_contours(tmp_path):
    folder = write(tmp_path, {LABEL: [in_mm(SQUARE, 1)]})
    write_seg(tmp_path / "SEG" / "x.dcm", {LABEL: blob(1)})
    series = only(tmp_path)
    assert series.annotations == ("SEG/x.dcm",)
    assert series.notes == ("1 RTSTRUCT object(s) were left out, because there is SEG",)
    (folder / "reads.xml").write_text(xml(nodule(roi(1))))
    series = only(tmp_path)
    assert series.annotations == ("CT/reads.xml",)
    assert series.notes == ("2 SEG or RTSTRUCT object(s) were left out, because there is readers' XML",)


def test_other_structures_are_left_out_with_a_note(tmp_path):
    def change(dataset):  # a marker
        dataset.ROIContourSequence[1].ContourSequence[0].ContourGeometricType = "POINT"

    write(tmp_path, {LABEL: [in_mm(SQUARE, 1)], "GTV-1": [in_mm(SQUARE, 2)]}, change=change)
    assert only(tmp_path).notes == ("ROIs without a reader's annotation were left out ('GTV-1')",)
    assert len(load(tmp_path).annotations) == 1


def test_the_label_may_be_the_description_of_the_structure(tmp_path):
    def change(dataset):
        dataset.StructureSetROISequence[0].ROIDescription = LABEL

    write(tmp_path, {"ROI": [in_mm(SQUARE, 1)]}, change=change)
    assert read(tmp_path).sum() == 9


def open_contour(dataset):
    dataset.ROIContourSequence[0].ContourSequence[0].ContourGeometricType = "OPEN_PLANAR"


def two_points(dataset):
    contour = dataset.ROIContourSequence[0].ContourSequence[0]
    contour.ContourData = contour.ContourData[:6]


def half_a_point(dataset):
    contour = dataset.ROIContourSequence[0].ContourSequence[0]
    contour.ContourData = contour.ContourData[:-1]


def without_contours(dataset):
    del dataset.ROIContourSequence


BAD_CONTOURS = {
    "between slices": (in_mm(SQUARE, 1.4), None, "a contour of its ROI 1 does not lie on a slice"),
    "beyond the slices": (in_mm(SQUARE, 9), None, "a contour of its ROI 1 does not lie on a slice"),
    "across slices": (in_mm(SQUARE, np.array([1, 1, 1, 2])), None, "does not lie on a slice"),
    "beyond the pixels": (in_mm(np.add(SQUARE, 6), 1), None, "reaches beyond the 10 x 12 pixels"),
    "far away": (in_mm(np.add(SQUARE, 1e9), 1), None, "reaches beyond the 10 x 12 pixels"),
    "between voxels": (in_mm([(3.1, 3.1), (3.4, 3.1), (3.4, 3.4)], 1), None, "has no voxels in its ROI 1"),
    "open": (in_mm(SQUARE, 1), open_contour, r"that is not closed \(OPEN_PLANAR, 4 points\)"),
    "a line": (in_mm(SQUARE, 1), two_points, r"that is not closed \(CLOSED_PLANAR, 2 points\)"),
    "half a point": (in_mm(SQUARE, 1), half_a_point, "has contours that cannot be read"),
    "none": (in_mm(SQUARE, 1), without_contours, "has no voxels in its ROI 1"),
}


@pytest.mark.parametrize("harm", BAD_CONTOURS)
def test_contours_that_do_not_fit_exclude_the_case(tmp_path, harm):
    points, change, reason = BAD_CONTOURS[harm]
    write(tmp_path, {LABEL: [points]}, **({"change": change} if change else {}))
    with pytest.raises(ExcludedCaseError, match=reason):
        load(tmp_path)


def names_two_series(dataset):
    study = dataset.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence[0]
    other = Dataset()
    other.SeriesInstanceUID = "7.7"
    study.RTReferencedSeriesSequence.append(other)


def same_number(dataset):
    dataset.StructureSetROISequence.append(dataset.StructureSetROISequence[0])


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("GTV-1", None, "no segment or ROI is labelled with nodule and reader's annotation"),
        (LABEL, names_two_series, "names several series (1.2.3, 7.7)"),
        (LABEL, same_number, "has several ROIs with the number 1"),
    ],
)
def test_headers_that_cannot_be_used_exclude_the_series(tmp_path, name, change, reason):
    write(tmp_path, {name: [in_mm(SQUARE, 1)]}, **({"change": change} if change else {}))
    assert reason in only(tmp_path).excluded


def test_a_structure_set_of_another_series_has_a_row_of_its_own(tmp_path):
    write(tmp_path, {LABEL: [in_mm(SQUARE, 1)]}, ct="9.9")
    ct, other = find(tmp_path)
    assert "no reader XML names this series, and no SEG or RTSTRUCT object" in ct.excluded
    assert other.excluded.startswith("RTSTRUCT/x.dcm: names a series whose images are missing")


@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_exclude_and_never_crash(tmp_path):
    write(tmp_path, {LABEL: [in_mm(SQUARE, k) for k in (1, 2)]})
    assert outcomes_of_damage(tmp_path, tmp_path / "RTSTRUCT" / "x.dcm") == {"read", "excluded", "index"}
