"""LUNA16: MetaImage with LIDC-IDRI's XML gives what DICOM with the same XML gives; spheres where they are asked for."""

import numpy as np
import pytest
import SimpleITK
from lidc_files import COLUMNS, ROWS, SLICES, SPACING, STORED, find, load, nodule, roi, write_case, xml

from lungddpm.config.models import Config, Layouts
from lungddpm.core.errors import ExcludedCaseError, InputError
from lungddpm.core.volume import Volume
from lungddpm.layouts.nodules import annotation_mask, find_nodules
from lungddpm.sources import lidc, luna16
from lungddpm.sources.index import Cache, index_source

UID = "1.3.6.1.4.1.14519.5.2.1.6279.6001.123"
READERS, SPHERES = luna16.Settings(), luna16.Settings(nodules="spheres")
READS = xml(nodule(roi(1, series=UID), roi(2, series=UID)), nodule(roi(2, series=UID)), series=UID)


def write_image(path, array=STORED - 1024, turned=False):
    """An image with the geometry of `lidc_files`; turned by half around the axis as scans of prone patients are."""
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(array.T).astype(np.int16))
    image.SetSpacing(SPACING)
    image.SetOrigin((-20, -30, -40))
    if turned:
        image.SetDirection(np.diag([-1.0, -1.0, 1.0]).ravel().tolist())
    path.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(image, str(path))
    return path


def write_luna(top, reads=READS, rows=(), **options):
    image = write_image(top / "subset0" / f"{UID}.mhd", **options)
    # LUNA16's own lung masks have the names of the images.
    write_image(top / "seg-lungs-LUNA16" / f"{UID}.mhd")
    if reads:
        (top / "tcia-lidc-xml" / "157").mkdir(parents=True)
        (top / "tcia-lidc-xml" / "157" / "158.xml").write_text(reads)
    lines = ["seriesuid,coordX,coordY,coordZ,diameter_mm", *(",".join(map(str, row)) for row in rows)]
    (top / "annotations.csv").write_text("\n".join(lines) + "\n")
    return image


def found(top, settings=READERS):
    return luna16.find_series(top, Cache(None, "luna16"), settings)


def scan_of(top, settings=READERS):
    (row,) = index_source("luna16", top, reading=(settings,))
    return luna16.load_scan(top, row, settings)


@pytest.mark.parametrize("patient", ["LIDC-IDRI-0001", "LIDC-IDRI-0003"])
def test_real_scans_have_the_nodules_that_their_dicom_series_have(tmp_path, shared_data, patient):
    source = shared_data / "lidc" / patient
    (row,) = (row for row in index_source("lidc", source) if row["status"] == "ok")
    theirs = lidc.load_scan(source, row)
    to_lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ theirs.ct.affine
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(theirs.ct.array.T))
    image.SetSpacing(theirs.ct.spacing_mm.tolist())
    image.SetDirection((to_lps[:3, :3] / theirs.ct.spacing_mm).ravel().tolist())
    image.SetOrigin(to_lps[:3, 3].tolist())
    (tmp_path / "subset0").mkdir()
    SimpleITK.WriteImage(image, str(tmp_path / "subset0" / f"{row['series_uid']}.mhd"))
    (reads,) = (file for file in theirs.files if file.suffix == ".xml")
    (tmp_path / reads.name).write_bytes(reads.read_bytes())
    ours = scan_of(tmp_path)
    assert (ours.ct.array == theirs.ct.array).all()
    found_here, expected = (find_nodules(scan, Layouts())[0] for scan in (ours, theirs))
    assert [each.corner for each in found_here] == [each.corner for each in expected] != []
    for here, there in zip(found_here, expected, strict=True):
        np.testing.assert_array_equal(here.mask, there.mask)


@pytest.mark.parametrize("turned", [False, True])
def test_it_holds_what_dicom_and_the_same_xml_hold(tmp_path, turned):
    axes = np.diag([-1.0, -1.0, 1.0]) if turned else np.eye(3)
    folder = write_case(tmp_path / "dicom", series=UID, axes=axes)
    (folder / "reads.xml").write_text(READS)
    write_luna(tmp_path / "luna", turned=turned)
    (series,), (theirs,) = found(tmp_path / "luna"), find(tmp_path / "dicom")
    assert (series.size, series.n_nodules, series.excluded) == (theirs.size, theirs.n_nodules, "")
    ours, dicom = scan_of(tmp_path / "luna"), load(tmp_path / "dicom")
    np.testing.assert_allclose(ours.ct.affine, dicom.ct.affine, atol=1e-5)
    np.testing.assert_array_equal(ours.ct.array, dicom.ct.array)
    for one, other in zip(ours.annotations, dicom.annotations, strict=True):
        assert (one.reader, one.characteristics) == (other.reader, other.characteristics)
        for mine, its in zip(annotation_mask(one), annotation_mask(other), strict=True):
            np.testing.assert_array_equal(mine, its)
    names = [file.name for file in ours.files]
    assert names == [f"{UID}.mhd", f"{UID}.raw", "158.xml"]


def test_padding_becomes_air(tmp_path):
    array = STORED - 1024
    array[0, :3, 0] = [-3024, -2000, 3000]
    write_luna(tmp_path, array=array)
    assert scan_of(tmp_path).ct.array[0, :3, 0].tolist() == [-1024, -1024, 3000]


def test_spheres_are_painted_by_centres_of_voxels(tmp_path):
    centre = (-20 + 4 * SPACING[0], -30 + 5 * SPACING[1], -40 + 2 * SPACING[2])
    write_luna(tmp_path, reads="", rows=[(UID, *centre, 3.0), (UID, -20, -30, -40, 0.1), ("9.9", 1, 2, 3, 4)])
    (series,) = found(tmp_path, SPHERES)
    assert (series.n_nodules, series.excluded, series.notes) == (2, "", (luna16.SPHERES,))
    scan = scan_of(tmp_path, SPHERES)
    x, y, z = np.indices((COLUMNS, ROWS, SLICES))
    distance = np.sqrt(((x - 4) * 0.7) ** 2 + ((y - 5) * 0.8) ** 2 + ((z - 2) * 2.5) ** 2)
    expected = np.where(distance <= 1.5, 2, 0)
    expected[0, 0, 0] = 2  # smaller than a voxel
    np.testing.assert_array_equal(scan.labels, expected)
    assert scan.notes == (luna16.SPHERES,)
    assert [file.name for file in scan.files] == [f"{UID}.mhd", f"{UID}.raw", "annotations.csv"]


def test_a_sphere_has_the_volume_of_one():
    ct = Volume(np.zeros((60, 70, 40), np.int16), np.diag([-0.5, -0.6, 1.25, 1]) + np.eye(4, k=3) * 7)
    centre = ct.affine @ [30.2, 34.7, 19.9, 1]
    labels = luna16.paint(ct, [luna16.Sphere((-centre[0], -centre[1], centre[2]), 20)], "ct")
    assert np.count_nonzero(labels) * ct.voxel_mm3 == pytest.approx(4 / 3 * np.pi * 10**3, rel=0.01)


def test_a_scan_without_a_row_has_no_nodule(tmp_path):
    write_luna(tmp_path, reads="", rows=[("1.9", -20, -30, -40, 3)])
    write_image(tmp_path / "subset1" / "1.9.mhd")
    rows = {row["series_uid"]: row for row in index_source("luna16", tmp_path, reading=(SPHERES,))}
    assert {uid: (row["n_nodules"], row["reason"]) for uid, row in rows.items()} == {UID: (0, ""), "1.9": (1, "")}
    assert not luna16.load_scan(tmp_path, rows[UID], SPHERES).labels.any()


def test_without_xml_a_scan_is_excluded_and_spheres_are_the_named_way_out(tmp_path):
    write_luna(tmp_path, reads="", rows=[(UID, 0, 0, 0, 5)])
    (series,) = found(tmp_path)
    assert series.excluded == (
        f"subset0/{UID}.mhd: no reader XML names this series. "
        "Add LIDC-IDRI's XML, or set source.luna16.nodules: spheres."
    )


def test_other_xml_of_lidc_has_no_rows_and_damaged_xml_has_one(tmp_path):
    write_luna(tmp_path)
    (tmp_path / "a.xml").write_text(xml(nodule(roi(1)), series="7.7"))
    assert len(found(tmp_path)) == 1
    (tmp_path / "b.xml").write_text("<LidcReadMessage>")
    usable, damaged = found(tmp_path)
    assert not usable.excluded
    assert damaged.excluded.startswith("b.xml: cannot be read as LIDC XML")


def test_patients_by_a_table(tmp_path):
    write_luna(tmp_path)
    assert found(tmp_path)[0].patient_id == UID
    (tmp_path / "patients.csv").write_text(f"file,patient\n{UID}.mhd,LIDC-IDRI-0009\n")
    (series,) = found(tmp_path, luna16.Settings(patient_table="patients.csv"))
    assert (series.patient_id, series.case_id) == ("LIDC-IDRI-0009", UID)
    (tmp_path / "patients.csv").write_text("file,patient\nother.mhd,1\n")
    (series,) = found(tmp_path, luna16.Settings(patient_table="patients.csv"))
    assert "has no patient in patients.csv" in series.excluded


def test_an_image_that_is_there_twice_is_excluded(tmp_path):
    write_luna(tmp_path)
    write_image(tmp_path / "subset1" / f"{UID}.mhd")
    (series,) = found(tmp_path)
    assert series.excluded == (f"subset0/{UID}.mhd: exists more than once (subset1/{UID}.mhd). Keep one copy of it.")


def test_xml_of_another_grid_excludes_the_case(tmp_path):
    write_luna(tmp_path, reads=xml(nodule(roi(1, z=500)), series=UID))
    with pytest.raises(ExcludedCaseError, match="a contour at z 500 mm, where there is no slice"):
        scan_of(tmp_path)


BROKEN = {
    "a column": ("seriesuid,coordX,coordY,coordZ\n1,2,3,4\n", "lacks diameter_mm"),
    "a cell": (
        f"seriesuid,coordX,coordY,coordZ,diameter_mm\n{UID},1,2,3\n",
        "lacks diameter_mm in line 2",
    ),
    "a number": (
        f"seriesuid,coordX,coordY,coordZ,diameter_mm\n{UID},1,2,x,4\n",
        "no valid position and diameter in line 2",
    ),
    "a size": (
        f"seriesuid,coordX,coordY,coordZ,diameter_mm\n{UID},1,2,3,-4\n",
        "no valid position and diameter in line 2",
    ),
    "text": ("\0\udcff", "cannot be read"),
    "everything": ("", "lacks seriesuid, coordX, coordY, coordZ, diameter_mm"),
    "rows": ("seriesuid,coordX,coordY,coordZ,diameter_mm\n", "has no rows, so no scan would have a nodule"),
    "its head": ("seriesuid;coordX;coordY;coordZ;diameter_mm\n", "lacks seriesuid, coordX"),
    "these images": ("seriesuid,coordX,coordY,coordZ,diameter_mm\n1.2.3,1,2,3,4\n", "names none of the 1 image"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_table_ends_the_run(tmp_path, what):
    text, problem = BROKEN[what]
    write_luna(tmp_path, reads="")
    (tmp_path / "annotations.csv").write_text(text, errors="surrogateescape")
    with pytest.raises(InputError, match=problem):
        found(tmp_path, SPHERES)


def test_a_missing_table_and_a_place_outside_the_scan(tmp_path):
    write_luna(tmp_path, reads="", rows=[(UID, 900, 0, 0, 5)])
    with pytest.raises(ExcludedCaseError, match="does not contain a nodule of annotations.csv"):
        scan_of(tmp_path, SPHERES)
    (tmp_path / "annotations.csv").unlink()
    with pytest.raises(InputError, match="has no annotations.csv, which source.luna16.nodules: spheres needs"):
        found(tmp_path, SPHERES)


def test_the_report_is_informed_of_spheres():
    chosen = Config(source={"kind": "luna16", "path": "x", "luna16": {"nodules": "spheres"}})
    assert chosen.source.caveat == (
        "The nodules are spheres of the diameters in annotations.csv, not readers' outlines."
    )
    assert Config(source={"kind": "luna16", "path": "x"}).source.caveat == ""
    assert Config().source.caveat == ""
