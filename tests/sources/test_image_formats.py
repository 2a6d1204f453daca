"""NRRD and MetaImage beside NIfTI: one volume written by SimpleITK and by nibabel, and files with one error each."""

import itertools
import json
import re
import zlib

import nibabel
import numpy as np
import pytest
import SimpleITK

from lungddpm.core.errors import ExcludedCaseError, InputError
from lungddpm.sources import images
from lungddpm.sources.images.files import files_of, read_header, read_labels, read_volume
from lungddpm.sources.index import Cache, index_source

SHAPE = (8, 7, 6)
CT = np.random.default_rng(2).integers(-1000, 2000, SHAPE).astype(np.int16)
LABELS = np.random.default_rng(8).integers(0, 4, SHAPE).astype(np.uint8)
"""One nodule, without a speck."""
SPACING, ORIGIN = (0.7, 0.8, 2.5), (10.0, -20.0, 30.0)
NAMES = ["a.nii", "a.nii.gz", "a.nrrd", "a.mha", "a.mhd"]


def rotation(x, y, z):
    """About the three axes in turn, by degrees."""
    turned = np.eye(3)
    for axis, angle in enumerate(np.radians([x, y, z])):
        about = np.eye(3)
        (first, second) = [k for k in range(3) if k != axis]
        about[[first, first, second, second], [first, second, first, second]] = [
            np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        ]  # fmt: skip
        turned = about @ turned
    return turned


DIRECTIONS = {
    "as the patient lies": np.eye(3),
    "slices from the head down": np.diag([1.0, 1.0, -1.0]),
    "all flipped": np.diag([-1.0, -1.0, -1.0]),
    "sagittal slices": np.array([[0.0, 0, 1], [1, 0, 0], [0, -1, 0]]),
    "rotated": rotation(4, -7, 20),
    "rotated and flipped": rotation(11, 3, -25) @ np.diag([1.0, -1.0, 1.0]),
}


def write(path, array, directions=DIRECTIONS["as the patient lies"], compressed=True):
    """Write an (x, y, z) array with LPS directions in columns."""
    image = SimpleITK.GetImageFromArray(array.T)
    image.SetSpacing(SPACING)
    image.SetOrigin(ORIGIN)
    image.SetDirection(directions.ravel().tolist())
    path.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(image, str(path), useCompression=compressed)
    return path


def ras_affine(directions):
    """Of the same, by the definition of NIfTI: x and y count to the right and to the front."""
    affine = np.eye(4)
    affine[:3, :3] = np.diag([-1.0, -1.0, 1.0]) @ directions @ np.diag(SPACING)
    affine[:3, 3] = [-ORIGIN[0], -ORIGIN[1], ORIGIN[2]]
    return affine


def as_nibabel_has_it(array, affine):
    """Voxels and affine in the closest RAS+ orientation, by nibabel alone."""
    image = nibabel.as_closest_canonical(nibabel.Nifti1Image(array, affine))
    return np.asarray(image.dataobj), image.affine


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("directions", DIRECTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_a_volume_is_the_same_in_every_format(tmp_path, name, directions, compressed):
    path = write(tmp_path / name, CT, DIRECTIONS[directions], compressed)
    array, affine = as_nibabel_has_it(CT, ras_affine(DIRECTIONS[directions]))
    for volume in (read_volume(path), read_header(path).grid):
        np.testing.assert_allclose(volume.affine, affine, atol=1e-4)
        assert volume.shape == array.shape
    np.testing.assert_array_equal(read_volume(path).array, array)
    assert read_volume(path).array.dtype == np.int16
    labels = write(tmp_path / f"labels-{name}", LABELS.astype(np.float32), DIRECTIONS[directions], compressed)
    np.testing.assert_array_equal(
        read_labels(labels).array, as_nibabel_has_it(LABELS, ras_affine(DIRECTIONS[directions]))[0]
    )
    assert read_labels(labels).array.dtype == np.uint8


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
def test_every_type_of_real_numbers_is_read(tmp_path, name, dtype):
    path = write(tmp_path / name, np.abs(CT % 100).astype(dtype))
    volume = read_volume(path)
    assert volume.array.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(volume.array, np.abs(CT % 100)[::-1, ::-1])


PAIRS = list(itertools.product(["a.nii.gz", "a.nrrd", "a.mha", "a.mhd"], ["a.nrrd", "a.seg.nrrd", "a.mhd", "a.nii.gz"]))


@pytest.mark.parametrize(("image", "label"), PAIRS)
def test_a_pair_of_any_two_formats_is_read(tmp_path, image, label):
    directions = DIRECTIONS["rotated and flipped"]
    write(tmp_path / "images" / image, CT, directions)
    write(tmp_path / "labels" / label, LABELS, directions)
    (row,) = index_source("images", tmp_path)
    assert (row["case_id"], row["status"], row["path"]) == ("a", "ok", f"images/{image}")
    scan = images.load_scan(tmp_path, row)
    array, affine = as_nibabel_has_it(CT, ras_affine(directions))
    np.testing.assert_array_equal(scan.ct.array, array)
    np.testing.assert_allclose(scan.ct.affine, affine, atol=1e-4)
    np.testing.assert_array_equal(scan.labels, as_nibabel_has_it(LABELS, ras_affine(directions))[0])
    assert scan.notes == ()


CAPITALS = ["NII", "NII.GZ", "NRRD", "SEG.NRRD", "MHA", "MHD"]
MIXED = ["Nii", "Nii.gz", "nii.GZ", "nII.Gz", "Nrrd", "Seg.nrrd", "Mha", "Mhd"]


@pytest.mark.parametrize("suffix", [*CAPITALS, *MIXED])
def test_suffixes_in_capitals(tmp_path, suffix):
    for folder, array in (("images", CT), ("labels", LABELS)):
        # Not all of SimpleITK's writers take them.
        written = write(tmp_path / folder / f"b.{suffix.lower()}", array)
        written.rename(written.with_name(f"b.{suffix}"))
    (row,) = index_source("images", tmp_path)
    assert (row["case_id"], row["status"]) == ("b", "ok")
    np.testing.assert_array_equal(images.load_scan(tmp_path, row).ct.array, CT[::-1, ::-1])
    # Not another file whose name nibabel prefers.
    if suffix.lower().startswith("nii"):
        write(tmp_path / "images" / f"b.{suffix.lower()}", CT + 1)
        np.testing.assert_array_equal(read_volume(tmp_path / "images" / f"b.{suffix}").array, CT[::-1, ::-1])


def write_files(top, *names):
    for name in names:
        write(top / "written.nii.gz", CT if name.startswith("images") else LABELS)
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / "written.nii.gz").rename(top / name)


def test_files_of_other_formats_are_named_in_one_line(tmp_path, caplog):
    caplog.set_level("INFO")
    pairs = [f"{folder}/{name}" for folder in ("images", "labels") for name in ("a.nii.gz", "b.nhdr", "c.mgz")]
    write_files(tmp_path, *pairs, "images/notes.txt", "labels/._a.nii.gz")
    write(tmp_path / "images" / "d.mhd", CT, compressed=False)
    write(tmp_path / "labels" / "d.mhd", LABELS)  # a .zraw
    rows = index_source("images", tmp_path)
    assert [(row["case_id"], row["status"]) for row in rows] == [("a", "ok"), ("d", "ok")]
    (line,) = [message for message in caplog.messages if "not read" in message]
    assert line == (
        "5 files are not read: images/b.nhdr, images/c.mgz, images/notes.txt and 2 more (read are .nii.gz, .nii, "
        ".seg.nrrd, .nrrd, .mha, .mhd)"
    )


@pytest.mark.parametrize("name", ["a.nhdr", "a_0000.mgz"])
def test_the_reason_names_an_image_or_label_of_another_format(tmp_path, name):
    write_files(tmp_path, f"images/{name}", "labels/a.nii.gz", "images/b.nii.gz", "labels/b.nhdr", "labels/b2.nhdr")
    label, image = sorted((row["reason"] for row in index_source("images", tmp_path)), reverse=True)
    assert label == (
        f"labels/a.nii.gz: has no image of its name in images/, only {name}, which is not read. "
        "Add the image, or ignore this row."
    )
    assert image == (
        "images/b.nii.gz: has no label labels/b.nii.gz, only b.nhdr, which is not read. Add it, or ignore this row."
    )


def test_the_file_of_the_voxels_is_an_input_as_well(tmp_path):
    for folder, array in (("images", CT), ("labels", LABELS)):
        write(tmp_path / folder / "a.mhd", array, compressed=False)
    cache = tmp_path / "cache.json"
    (row,) = index_source("images", tmp_path, cache)
    files = {file.relative_to(tmp_path).as_posix() for file in images.load_scan(tmp_path, row).files}
    assert files == {"images/a.mhd", "images/a.raw", "labels/a.mhd", "labels/a.raw"}
    (tmp_path / "labels" / "a.raw").unlink()
    (row,) = index_source("images", tmp_path, cache)
    assert "labels/a.mhd: keeps its voxels in a.raw, which does not exist" in row["reason"]


def test_a_tilted_gantry_is_made_upright_as_for_nifti(tmp_path):
    shear = np.eye(3)
    shear[:, 2] = [0, np.sin(np.radians(18)), np.cos(np.radians(18))]
    affine = ras_affine(shear)
    for folder, array in (("images", CT), ("labels", LABELS)):
        write(tmp_path / "nrrd" / folder / "a.nrrd", array, shear)
        (tmp_path / "nifti" / folder).mkdir(parents=True)
        image = nibabel.Nifti1Image(array, affine)
        image.set_qform(None)
        nibabel.save(image, tmp_path / "nifti" / folder / "a.nii.gz")
    scans = []
    for name in ("nrrd", "nifti"):
        (row,) = index_source("images", tmp_path / name)
        scans.append(images.load_scan(tmp_path / name, row))
    np.testing.assert_array_equal(scans[0].ct.array, scans[1].ct.array)
    np.testing.assert_array_equal(scans[0].labels, scans[1].labels)
    np.testing.assert_allclose(scans[0].ct.affine, scans[1].ct.affine, atol=1e-5)
    assert "sheared by 18.0 degrees" in scans[0].notes[-1]


def change(path, **fields):
    """Give keys of a header other values; None takes the line out, and what follows the header stays."""
    content = path.read_bytes()
    for key, value in fields.items():
        words = key.replace("_", " ") if path.suffix == ".nrrd" else key
        line = re.compile(rb"(?m)^" + words.encode() + rb" ?[:=].*\n")
        assert line.search(content), words
        separator = ": " if path.suffix == ".nrrd" else " = "
        new = b"" if value is None else f"{words}{separator}{value}\n".encode()
        content = line.sub(lambda _, new=new: new, content, count=1)
    path.write_bytes(content)


SPACES = {
    "left-posterior-superior": (np.diag([-1.0, -1, 1, 1]), ""),
    "right-anterior-superior": (np.eye(4), ""),
    "RAS": (np.eye(4), ""),
    "left-anterior-superior": (np.diag([-1.0, 1, 1, 1]), ""),
    "scanner-xyz": (np.diag([-1.0, -1, 1, 1]), "its header has the space 'scanner-xyz'"),
}


@pytest.mark.parametrize("space", SPACES)
def test_spaces_of_nrrd(tmp_path, space):
    to_ras, note = SPACES[space]
    path = write(tmp_path / "a.nrrd", CT)
    change(path, space=space)
    stored = np.diag([*SPACING, 1.0])
    stored[:3, 3] = ORIGIN
    array, affine = as_nibabel_has_it(CT, to_ras @ stored)
    np.testing.assert_allclose(read_volume(path).affine, affine, atol=1e-6)
    np.testing.assert_array_equal(read_volume(path).array, array)
    assert "".join(read_header(path).notes).startswith(note) if note else read_header(path).notes == ()


def test_a_header_without_directions_is_noted(tmp_path):
    path = write(tmp_path / "a.mha", CT)
    change(path, TransformMatrix=None)
    assert read_header(path).notes[0].startswith("its header has no directions: only the voxel sizes are known")
    np.testing.assert_array_equal(read_volume(path).array, CT[::-1, ::-1])


def test_sizes_without_directions_are_used(tmp_path):
    mha, nrrd = write(tmp_path / "a.mha", CT), write(tmp_path / "a.nrrd", CT)
    # Size of an element instead of the distance to the next.
    change(mha, ElementSpacing="1 1 1\nDistanceUnits = mm")
    mha.write_bytes(mha.read_bytes().replace(b"ElementSpacing = 1 1 1", b"ElementSize = 0.7 0.8 2.5"))
    change(nrrd, space_directions=None, space_origin=None, space='spacings: 0.7 0.8 2.5\nunits: "mm" "mm" "mm"')
    nrrd.write_bytes(nrrd.read_bytes().replace(b"space: spacings", b"spacings"))
    for file in (mha, nrrd):
        np.testing.assert_allclose(read_header(file).grid.spacing_mm, SPACING)


def test_the_file_beside_may_be_named_with_its_folder(tmp_path):
    path = write(tmp_path / "a.mhd", CT)
    name = re.search(r"ElementDataFile = (.*)", path.read_text())[1]
    change(path, ElementDataFile=f"./{name}")
    np.testing.assert_array_equal(read_volume(path).array, read_volume(write(tmp_path / "b.mhd", CT)).array)


def write_4d(path, volumes):
    image = SimpleITK.JoinSeries([SimpleITK.GetImageFromArray(volume.T) for volume in volumes])
    SimpleITK.WriteImage(image, str(path))


def test_a_fourth_dimension_of_length_one_is_dropped(tmp_path):
    write_4d(tmp_path / "a.mha", [CT])
    assert "dimensions of length 1 were dropped (its shape is (8, 7, 6, 1))" in read_header(tmp_path / "a.mha").notes[0]
    np.testing.assert_array_equal(read_volume(tmp_path / "a.mha").array, CT[::-1, ::-1])


def cut_short(path, by):
    path.write_bytes(path.read_bytes()[:-by])


def stored_shorter(path):
    """A stream that ends early, in a header that agrees with it: the reader of MetaImage fills up with nothing."""
    size = int(re.search(rb"CompressedDataSize = (\d+)", path.read_bytes())[1])
    change(path, CompressedDataSize=size - 100)
    cut_short(path, 100)


def damage(path, place=-40):
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(bytes(content))


def of_colours(path):
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(np.zeros((*SHAPE, 3), np.uint8), isVector=True), str(path))


def of_complex_numbers(path):
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(np.zeros(SHAPE, np.complex64)), str(path))


KINDS = "domain domain domain"
# The file, what is done to it, and the reason: in the index, or after "prepare:" when it is read.
ERRORS = {
    "4D": ("a.mha", lambda p: write_4d(p, [CT, CT]), "has 4 dimensions instead of 3 (its shape is (8, 7, 6, 2)"),
    "2D": ("a.mha", lambda p: SimpleITK.WriteImage(SimpleITK.GetImageFromArray(CT[0]), str(p)), "has 2 dimensions"),
    "colours": ("a.nrrd", of_colours, "holds vectors, colours"),
    "colours in MetaImage": ("a.mhd", of_colours, "holds vectors, colours"),
    "complex": ("a.nrrd", of_complex_numbers, "holds vectors, colours or complex numbers"),
    "no voxels": ("a.mha", lambda p: change(p, DimSize="8 0 6"), "has no voxels (its shape is (8, 0, 6))"),
    "no voxels in NRRD": ("a.nrrd", lambda p: change(p, sizes="8 0 6"), "axis 1 size is zero"),
    "negative size": ("a.mha", lambda p: change(p, DimSize="8 -7 6"), "voxels, more than 536,870,912"),
    "larger than memory": ("a.mha", lambda p: change(p, DimSize="32767 32767 32767"), "more than 536,870,912"),
    "NRRD larger than memory": ("a.nrrd", lambda p: change(p, sizes="32767 32767 32767"), "more than 536,870,912"),
    "singular": ("a.mha", lambda p: change(p, TransformMatrix="0 0 0 0 1 0 0 0 1"), "affine that cannot be inverted"),
    "no spacing": ("a.mha", lambda p: change(p, ElementSpacing="0 1 1"), "affine that cannot be inverted"),
    "no spacing at all": ("a.mha", lambda p: change(p, ElementSpacing=None), "has no voxel size"),
    "lengths in um": (
        "a.mha", lambda p: change(p, ElementSpacing="1 1 1\nDistanceUnits = um"), "has its lengths in um",
    ),
    "NRRD without spacings": (
        "a.nrrd", lambda p: change(p, space_directions=None, space=None, space_origin=None), "has no voxel size",
    ),
    "NRRD with a spacing that is not a number": (
        "a.nrrd",
        lambda p: change(p, space_directions=None, space=None, space_origin=None, kinds=f"{KINDS}\nspacings: 1 nan 1"),
        "has no voxel size",
    ),
    "NRRD without the distance of slices": (
        "a.nrrd", lambda p: change(p, space_directions="(1,0,0) (0,1,0) none"), "has no voxel size",
    ),
    "NRRD in um": (
        "a.nrrd", lambda p: change(p, kinds=f'{KINDS}\nspace units: "um" "um" "um"'),
        "has its lengths in um",
    ),
    "NRRD singular": (
        "a.nrrd", lambda p: change(p, space_directions="(1,0,0) (0,1,0) (0,2,0)"), "affine that cannot be inverted",
    ),
    "data missing": ("a.mhd", lambda p: p.with_suffix(".zraw").unlink(), "keeps its voxels in a.zraw, which does not"),
    "data in several files": (
        "a.mhd", lambda p: change(p, ElementDataFile="slice%02d.raw 1 6 1"), "keeps its voxels in several files",
    ),
    "data in a list": ("a.mhd", lambda p: change(p, ElementDataFile="LIST"), "keeps its voxels in several files"),
    "data elsewhere": ("a.mhd", lambda p: change(p, ElementDataFile="../a.raw"), "in another folder, ../a.raw"),
    "data of the system": ("a.mhd", lambda p: change(p, ElementDataFile="/etc/passwd"), "folder, /etc/passwd"),
    "NRRD of a header": ("a.nrrd", lambda p: change(p, encoding="raw\ndata file: a.raw"), "its voxels in other files"),
    "empty": ("a.nrrd", lambda p: p.write_bytes(b""), "a.nrrd: cannot be read as NRRD"),
    "empty MetaImage": ("a.mhd", lambda p: p.write_bytes(b""), "a.mhd: cannot be read as MetaImage"),
    "no MetaImage": ("a.mha", lambda p: p.write_bytes(b"x" * 999), "a.mha: cannot be read as MetaImage"),
    "a picture": ("a.mha", lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" * 99), "a.mha: cannot be read as MetaImage"),
    "truncated": ("a.mha", lambda p: cut_short(p, 20), "prepare:compressed voxels are truncated or damaged"),
    "truncated, consistently": ("a.mha", stored_shorter, "prepare:compressed voxels are truncated or damaged"),
    "NRRD truncated": ("a.nrrd", lambda p: cut_short(p, 30), "prepare:a.nrrd: cannot be read as NRRD"),
    "zraw truncated": ("a.mhd", lambda p: cut_short(p.with_suffix(".zraw"), 9), "prepare:voxels are truncated"),
    "damaged": ("a.mha", damage, "prepare:a.mha: cannot be read as MetaImage"),
    "NRRD damaged": ("a.nrrd", damage, "prepare:a.nrrd: cannot be read as NRRD"),
    "no size of the packed voxels": (
        "a.mha", lambda p: change(p, CompressedDataSize=None), "prepare:cannot be read as MetaImage",
    ),
}  # fmt: skip


@pytest.mark.parametrize("role", ["images", "labels"])
@pytest.mark.parametrize("error", ERRORS)
def test_each_error_is_reported(tmp_path, error, role):
    name, harm, reason = ERRORS[error]
    for folder, array in (("images", CT), ("labels", LABELS)):
        write(tmp_path / folder / name, array)
    harm(tmp_path / role / name)
    (row,) = index_source("images", tmp_path)
    if reason.startswith("prepare:"):
        assert row["status"] == "ok"
        with pytest.raises(ExcludedCaseError) as caught:
            images.load_scan(tmp_path, row)
        assert reason.removeprefix("prepare:") in str(caught.value)
        said = str(caught.value).partition("cannot be read")[2]
        assert not re.search(r"0x[0-9a-f]{4}|\.cxx|/", said)  # the same in the next run, and for every user
    else:
        assert reason in row["reason"]
        assert row["reason"].startswith(f"{role}/")
        assert str(tmp_path) not in row["reason"]


@pytest.mark.parametrize("by", [-1000, -1, 1, 20, 300])
def test_raw_voxels_of_another_number_than_the_header_claims(tmp_path, by):
    for folder, array in (("images", CT), ("labels", LABELS)):
        write(tmp_path / folder / "a.mhd", array, compressed=False)
    raw = tmp_path / "images" / "a.raw"
    size = 2 * CT.size - by
    raw.write_bytes((raw.read_bytes() + bytes(1000))[:size])
    (row,) = index_source("images", tmp_path)
    reason = rf"images/a.mhd: cannot be read as MetaImage \(it has {size} bytes of voxels instead of {2 * CT.size}\)"
    with pytest.raises(ExcludedCaseError, match=reason):
        images.load_scan(tmp_path, row)


def test_bytes_before_the_raw_voxels_are_skipped(tmp_path):
    path = write(tmp_path / "a.mhd", CT, compressed=False)
    raw = path.with_suffix(".raw")
    raw.write_bytes(bytes(100) + raw.read_bytes())
    for size in (100, -1):
        change(path, CenterOfRotation=f"0 0 0\nHeaderSize = {size}")
        np.testing.assert_array_equal(read_volume(path).array, CT[::-1, ::-1])
        change(path, HeaderSize=None)


def test_packed_voxels_that_would_fill_the_memory_are_not_unpacked(tmp_path):
    path = write(tmp_path / "a.mha", CT)
    header = path.read_bytes().partition(b"ElementDataFile = LOCAL\n")[0]
    packed = zlib.compress(bytes(50_000_000))
    header = re.sub(rb"CompressedDataSize = \d+", b"CompressedDataSize = %d" % len(packed), header)
    path.write_bytes(header + b"ElementDataFile = LOCAL\n" + packed)
    with pytest.raises(InputError, match="truncated or damaged"):
        read_volume(path)


def test_a_missing_file_is_reported(tmp_path):
    for name in ("a.nrrd", "a.mha", "a.nii"):
        with pytest.raises(InputError, match=f"{name}: does not exist"):
            read_header(tmp_path / name)
    assert files_of(tmp_path / "a.mhd") == (tmp_path / "a.mhd",)


def test_headers_alone_are_read_for_the_index(tmp_path, monkeypatch):
    for folder, array in (("images", CT), ("labels", LABELS)):
        write(tmp_path / folder / "a.nrrd", array)
    monkeypatch.setattr(SimpleITK.ImageFileReader, "Execute", None)
    monkeypatch.setattr(SimpleITK, "ReadImage", None)
    (series,) = images.find_series(tmp_path, Cache(None, "images"))
    assert (series.size, series.excluded, json.dumps(series.spacing_mm)) == (SHAPE, "", "[0.7, 0.8, 2.5]")
