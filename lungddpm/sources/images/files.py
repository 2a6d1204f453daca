"""Image files: NIfTI through nibabel, NRRD and MetaImage through SimpleITK, with the same rules.

SimpleITK's images are in LPS; this module returns RAS. Its MetaImage reader returns damaged or truncated compressed
voxels without an error, so they are first decompressed and counted here. SimpleITK is imported where it is used:
folders of NIfTI do not need it.
"""

from __future__ import annotations

import math
import re
import zlib
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING

import numpy as np

from lungddpm.core import volume as nifti
from lungddpm.core.errors import InputError
from lungddpm.core.volume import Header, Volume, volume_header, volume_shape, whole_numbers

if TYPE_CHECKING:
    from SimpleITK import ImageFileReader

SUFFIXES = (".nii.gz", ".nii", ".seg.nrrd", ".nrrd", ".mha", ".mhd")
"""Of images, in any case; 3D Slicer saves its segmentations as .seg.nrrd."""
_FORMATS = {".seg.nrrd": "NRRD", ".nrrd": "NRRD", ".mha": "MetaImage", ".mhd": "MetaImage"}
_READERS = {"NRRD": "NrrdImageIO", "MetaImage": "MetaImageIO"}
_DTYPES = ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8")
"""Of SimpleITK's first pixel types; the others are complex numbers and vectors."""
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_ANATOMICAL_SPACES = {
    "right-anterior-superior", "left-anterior-superior", "left-posterior-superior", "ras", "las", "lps"
}  # fmt: skip
"""NRRD spaces that define the patient's sides."""
_MILLIMETRES = ("mm", "millimeter", "millimeters", "millimetre", "millimetres", "", "?", "???", "none", "unknown")
"""Units of length in headers; a missing one is taken to be mm."""
_LONGEST_TEXT = 2**20
_LONGEST_REASON = 200
_CHUNK = 2**16
"""Bytes to decompress at once, to at most 64 MiB."""


def suffix_of(name: str) -> str:
    """The suffix of a file's name among `SUFFIXES`; empty if none."""
    return next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")


def stem_of(name: str) -> str:
    """A file's name without its suffix, if that is one of `SUFFIXES`."""
    return name[: len(name) - len(suffix_of(name))]


def read_header(path: Path) -> Header:
    """The geometry of an image file; its voxels are not read.

    Raises:
        InputError: missing or unreadable, not 3-D, without voxels or with more than `LARGEST_VOXELS`, not one real
            number per voxel, without voxel size or not in mm, an affine that cannot be inverted, or voxels in another
            file than the one beside it.
    """
    return nifti.read_header(path) if suffix_of(path.name) not in _FORMATS else _open(path).header


def read_volume(path: Path) -> Volume:
    """Read a 3-D image in the closest RAS+ orientation, values as stored (scaled if a NIfTI header has a scale).

    Raises:
        InputError: as `read_header`, or the voxels are truncated or damaged, or do not fit into memory.
    """
    return nifti.read_volume(path) if suffix_of(path.name) not in _FORMATS else read_stored(path).canonical()


def read_stored(path: Path) -> Volume:
    """Read an NRRD file or a MetaImage with its voxels in the order in which they are stored.

    Raises:
        InputError: as `read_volume`.
    """
    file = _open(path)
    return Volume(_read_array(file), file.header.affines[0])


def read_labels(path: Path) -> Volume:
    """Read a volume of labels: whole numbers, which may be stored as something else (see `core.volume.read_labels`).

    Returns:
        uint8 if every value is a label from 0 to 255, in the closest RAS+ orientation; otherwise as stored.

    Raises:
        InputError: as `read_volume`.
    """
    if suffix_of(path.name) not in _FORMATS:
        return nifti.read_labels(path)
    file = _open(path)
    return Volume(whole_numbers(_read_array(file)), file.header.affines[0]).canonical()


def files_of(path: Path) -> tuple[Path, ...]:
    """The file itself and, if it is only a header, the file next to it with the voxels, if it exists."""
    try:
        data = _read_text(path).data if suffix_of(path.name) in _FORMATS else None
    except InputError:
        data = None
    return (path,) if data is None else (path, data)


@dataclass(frozen=True)
class _Text:
    """The text at the start of a file.

    Attributes:
        fields: values by key, keys in lower case.
        size: of the text, in bytes.
        data: file with the voxels, if it is another one.
    """

    fields: dict[str, str]
    size: int
    data: Path | None


@dataclass(frozen=True)
class _File:
    """The header of a file that SimpleITK reads."""

    path: Path
    reader: ImageFileReader
    header: Header
    text: _Text


def _open(path: Path) -> _File:
    import SimpleITK

    text = _read_text(path)
    reader = SimpleITK.ImageFileReader()
    try:
        # By name: otherwise SimpleITK would try all of its formats.
        reader.SetImageIO(_READERS[_FORMATS[suffix_of(path.name)]])
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
    except (RuntimeError, UnicodeError) as error:
        raise _unreadable(path, error) from None
    if reader.GetNumberOfComponents() > 1 or reader.GetPixelIDValue() >= len(_DTYPES):
        raise InputError(path, "holds vectors, colours or complex numbers", "Store one number per voxel.")
    stored = tuple(int(n) for n in reader.GetSize())
    volume_shape(path, stored)  # before assuming three axes
    _check_sizes(path, text.fields)
    affine = np.eye(4)
    directions = np.array(reader.GetDirection()).reshape(len(stored), len(stored))
    affine[:3, :3] = directions[:3, :3] * reader.GetSpacing()[:3]
    affine[:3, 3] = reader.GetOrigin()[:3]
    header = volume_header(path, stored, (_LPS_TO_RAS @ affine,), _notes(text.fields))
    return _File(path, reader, header, text)


def _read_text(path: Path) -> _Text:
    """The text at the start of an NRRD file (up to an empty line) or a MetaImage (up to `ElementDataFile`).

    Raises:
        InputError: missing or unreadable, or the voxels are neither in the file nor in one next to it.
    """
    is_nrrd = _FORMATS[suffix_of(path.name)] == "NRRD"
    separator, last = (":", "") if is_nrrd else ("=", "elementdatafile")
    fields, size = {}, 0
    try:
        with path.open("rb") as file:
            while line := file.readline(_LONGEST_TEXT):
                size += len(line)
                key, _, value = line.decode("utf-8", "replace").strip().partition(separator)
                key = key.strip().lower()
                fields[key] = value.strip()
                if key == last or (is_nrrd and key in ("data file", "datafile")) or size > _LONGEST_TEXT:
                    break
    except FileNotFoundError:
        raise InputError(path, "does not exist", "Check the path.") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    return _Text(fields, size, _data_file(path, fields))


def _data_file(path: Path, fields: dict[str, str]) -> Path | None:
    """The file with the voxels next to this one; None if it contains them itself.

    Raises:
        InputError: they are elsewhere, or the file is missing.
    """
    if {"data file", "datafile"} & set(fields):
        raise InputError(path, "keeps its voxels in other files", "Store header and voxels as one .nrrd file.")
    name = fields.get("elementdatafile", "LOCAL").removeprefix("./")
    if name.upper() == "LOCAL":
        return None
    if name.upper().startswith("LIST") or "%" in name:
        raise InputError(path, "keeps its voxels in several files", "Store it as .mha, or as .mhd with one .raw.")
    if PureWindowsPath(name).name != name:
        raise InputError(path, f"keeps its voxels in another folder, {name}", "Put the .raw next to its .mhd file.")
    data = path.with_name(name)
    if not data.is_file():
        raise InputError(path, f"keeps its voxels in {name}, which does not exist", "Copy that file as well.")
    return data


def _check_sizes(path: Path, fields: dict[str, str]) -> None:
    """Check that a header has voxel sizes, in mm; SimpleITK would assume 1 mm, and ignores units.

    Raises:
        InputError: it does not.
    """
    by_axis = re.findall(r"\([^)]*\)", fields.get("space directions", ""))  # "none" for an axis that is not in space
    spacings = [size for size in fields.get("spacings", "").split() if size.lower() != "nan"]
    if not ({"elementspacing", "elementsize"} & set(fields) or len(by_axis) >= 3 or len(spacings) >= 3):
        raise InputError(path, "has no voxel size", "Write the file with its true geometry.")
    units = [unit for key in ("space units", "units") for unit in re.findall(r'"(.*?)"', fields.get(key, ""))[:3]]
    for unit in (*units, fields.get("distanceunits", "")):
        if unit.strip().lower() not in _MILLIMETRES:
            raise InputError(path, f"has its lengths in {unit}", "Write the file in mm.")


def _notes(fields: dict[str, str]) -> tuple[str, ...]:
    """Notes if a header does not define the patient's sides."""
    swapped = "left and right may be swapped"
    if not {"transformmatrix", "orientation", "rotation", "space directions"} & set(fields):
        return (f"its header has no directions: only the voxel sizes are known, and {swapped}",)
    space = fields.get("space", "").lower()
    if "space directions" in fields and space not in _ANATOMICAL_SPACES:
        return (f"its header has the space '{space or 'none'}', assumed to be left-posterior-superior: {swapped}",)
    return ()


def _read_array(file: _File) -> np.ndarray:
    """The voxels, (x, y, z) along the stored axes."""
    import SimpleITK

    if file.text.fields.get("compresseddata", "").lower() in ("true", "1"):
        _check_compressed(file)
    else:
        _check_raw(file)
    try:
        array = SimpleITK.GetArrayFromImage(file.reader.Execute())
    except (RuntimeError, MemoryError) as error:
        raise _unreadable(file.path, error) from None
    return array.T.reshape(file.header.shape)


def _check_compressed(file: _File) -> None:
    """Check that the compressed voxels of a MetaImage are complete and intact, which SimpleITK does not.

    Raises:
        InputError: they are not.
    """
    left = _bytes_of_voxels(file)
    unpack = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # zlib's own header, or gzip's
    try:
        packed = int(file.text.fields["compresseddatasize"])
        with (file.text.data or file.path).open("rb") as data:
            data.seek(0 if file.text.data else file.text.size)
            while packed > 0 and left >= 0 and (chunk := data.read(min(packed, _CHUNK))):
                packed -= len(chunk)
                left -= len(unpack.decompress(chunk))
    except (KeyError, ValueError, OSError, zlib.error) as error:
        raise _unreadable(file.path, error) from None
    if left or not unpack.eof:
        raise _unreadable(file.path, "its compressed voxels are truncated or damaged")


def _check_raw(file: _File) -> None:
    """Check that the file next to an .mhd header has as many bytes as its voxels; SimpleITK reads a longer one.

    Raises:
        InputError: it does not.
    """
    fields = file.text.fields
    is_binary = fields.get("binarydata", "true").lower() in ("true", "1")
    if file.text.data is None or "headersize" in fields or not is_binary:
        return
    size, needed = file.text.data.stat().st_size, _bytes_of_voxels(file)
    if size != needed:
        raise _unreadable(file.path, f"it has {size} bytes of voxels instead of {needed}")


def _bytes_of_voxels(file: _File) -> int:
    return math.prod(file.header.shape) * np.dtype(_DTYPES[file.reader.GetPixelIDValue()]).itemsize


def _unreadable(path: Path, error: object) -> InputError:
    # SimpleITK's messages start with their location in its code and an object's address, and end with the cause.
    said = re.split("ITK ERROR: |itk::ERROR: ", str(error))[-1].replace(str(path), path.name)
    reason = " ".join(re.sub(r"\(0x[0-9a-f]+\)", "", said).split())
    if len(reason) > _LONGEST_REASON:
        reason = "... " + reason[-_LONGEST_REASON:].partition(" ")[2]
    return InputError(path, f"cannot be read as {_FORMATS[suffix_of(path.name)]} ({reason})", "Copy the file again.")
