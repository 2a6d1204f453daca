"""Slices: DICOM headers, the stack that a series' slices make, and their pixels in HU."""

from __future__ import annotations

import os
import struct
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from lungddpm.errors import ExcludedCaseError
from lungddpm.volume import AIR_HU

if TYPE_CHECKING:
    import pydicom

COPY_AGAIN = "Download or copy the file anew."
LARGEST_NUMBER = 1e6
"""Beyond every true position (mm), size and direction, and far from where arithmetic overflows."""
POSITION_TOLERANCE = 0.01
"""How far a slice may lie from its place, as a share of the slice spacing."""

_TAGS = {
    0x00020010: "TransferSyntaxUID",
    0x00080018: "SOPInstanceUID",
    0x00080060: "Modality",
    0x00100020: "PatientID",
    0x00180050: "SliceThickness",
    0x0020000E: "SeriesInstanceUID",
    0x00200032: "ImagePositionPatient",
    0x00200037: "ImageOrientationPatient",
    0x00280010: "Rows",
    0x00280011: "Columns",
    0x00280030: "PixelSpacing",
}
_PIXEL_DATA = 0x7FE00010
_IMPLICIT_LITTLE_ENDIAN, _EXPLICIT_LITTLE_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"
_DEFLATED = "1.2.840.10008.1.2.1.99"
_LONG_REPRESENTATIONS = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
_HEADER_BYTES = 8192
_LARGEST_SLICE_BYTES = 64 * 2**20
"""Twice those of 4096 x 4096 pixels; bounds what a compressed file can unpack to."""


@dataclass(frozen=True)
class Header:
    """What one slice's header says, as text ("0.7\\\\0.7"); an element that is missing is empty."""

    path: Path
    elements: dict[str, str]
    fault: str = ""
    """What is wrong with the file beyond its header, as a clause."""

    def __getitem__(self, keyword: str) -> str:
        return self.elements.get(keyword, "")

    def numbers(self, keyword: str, count: int) -> list[float]:
        """The element as so many numbers.

        Raises:
            ExcludedCaseError: it is missing, or is something else, or no scanner could mean it.
        """
        try:
            values = [float(part) for part in self[keyword].split("\\")]
        except ValueError:
            values = []
        if len(values) != count or not all(abs(value) < LARGEST_NUMBER for value in values):
            raise ExcludedCaseError(self.path, f"has no {keyword} of {count} number(s)", COPY_AGAIN)
        return values


@dataclass(frozen=True)
class Stack:
    """The slices of one series in order, and the grid that they make."""

    headers: tuple[Header, ...]
    """Ascending along the slice normal."""
    size: tuple[int, int, int]
    affine: np.ndarray
    positions_mm: np.ndarray
    """(slices, 3) LPS: where the first pixel of each slice lies."""
    thickness_mm: float | None

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between columns, rows and slices."""
        return tuple(np.linalg.norm(self.affine[:3, :3], axis=0).tolist())


def read_headers(files: Iterable[Path]) -> tuple[dict[str, list[Header]], ExcludedCaseError | None]:
    """Slices by series UID, and the first fault of a DICOM file whose series is unknown."""
    slices: dict[str, list[Header]] = defaultdict(list)
    first = None
    for path in files:
        try:
            header = _read_header(path)
        except ExcludedCaseError as fault:
            first = first or fault
        else:
            if header is not None:
                slices[header["SeriesInstanceUID"]].append(header)
    return slices, first


def _read_header(path: Path) -> Header | None:
    """The header of one slice; None for a file that is no DICOM image.

    Raises:
        ExcludedCaseError: a DICOM file that does not tell its series.
    """
    if path.name.startswith(".") or path.name.upper() == "DICOMDIR":
        return None
    try:
        # Opening a named pipe would wait for ever.
        if not path.is_file() and path.exists():
            return None
        with path.open("rb") as file:
            start = file.read(_HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
            if start[128:132] != b"DICM":
                if path.suffix.lower() == ".dcm":
                    raise ExcludedCaseError(path, "is empty or no DICOM file", COPY_AGAIN)
                return None
            elements, end = _explicit_elements(start) or _elements_by_pydicom(path, file)
    except OSError as error:
        raise ExcludedCaseError(path, f"cannot be read ({error.strerror})", "Check the file and its rights.") from None
    if size > _LARGEST_SLICE_BYTES:
        raise ExcludedCaseError(
            path, f"is larger than the {_LARGEST_SLICE_BYTES >> 20} MiB that a slice can take", "Check what it is."
        )
    if not elements.get("SeriesInstanceUID"):
        raise ExcludedCaseError(path, "is cut short, or lacks its SeriesInstanceUID", COPY_AGAIN)
    fault = "has no pixel data, or is cut short before them" if end is None else "is cut short" if end > size else ""
    return Header(path, elements, fault)


def _explicit_elements(start: bytes) -> tuple[dict[str, str], int | None] | None:
    """The elements of `_TAGS` and where the pixel data end, from the first bytes of a file (DICOM PS3.5, 7.1.2).

    The end is None in a file without pixel data. Only for plain explicit-VR little-endian files, as nearly all of
    LIDC-IDRI are; None for others. The data set has 244,527 slices: importing pydicom and reading as many headers with
    it takes ten times as long.
    """
    elements: dict[str, str] = {}
    at = 132
    while at + 12 <= len(start):
        group, element, representation, length = struct.unpack_from("<HH2sH", start, at)
        at += 8
        if representation in _LONG_REPRESENTATIONS:
            (length,) = struct.unpack_from("<I", start, at)
            at += 4
        tag = group << 16 | element
        if length == 0xFFFFFFFF or not representation.isalpha():
            return None
        if tag == _PIXEL_DATA:
            return elements, at + length
        if tag in _TAGS:
            value = start[at : at + length]
            numeric = representation == b"US"
            elements[_TAGS[tag]] = (
                str(int.from_bytes(value, "little")) if numeric else value.decode("latin-1").strip(" \0")
            )
            if tag == 0x00020010 and elements["TransferSyntaxUID"] != _EXPLICIT_LITTLE_ENDIAN:
                return None
        at += length
    return (elements, None) if len(start) < _HEADER_BYTES else None


def _elements_by_pydicom(path: Path, file: BinaryIO) -> tuple[dict[str, str], int | None]:
    """The same for every other file. Where compressed pixel data end, only decoding them would tell: then it is 0."""
    from pydicom import config

    _refuse_deflated(path)
    file.seek(0)
    with config.disable_value_validation():
        dataset = _dataset(path, file, stop_before_pixels=True, specific_tags=list(_TAGS.values()))
        try:
            values = {name: value for name in _TAGS.values() if (value := dataset.get(name)) is not None}
            values["TransferSyntaxUID"] = dataset.file_meta.get("TransferSyntaxUID", "")
            elements = {
                name: "\\".join(map(str, value)) if _is_list(value) else str(value) for name, value in values.items()
            }
        except Exception as error:
            raise ExcludedCaseError(path, f"cannot be read as DICOM ({error})", COPY_AGAIN) from None
        return elements, _end_of_pixels(dataset, file)


def _refuse_deflated(path: Path) -> None:
    """Pydicom unpacks a deflated file in one go, a thousand times its size if it is made for that."""
    from pydicom.filereader import read_file_meta_info

    try:
        syntax = read_file_meta_info(path).get("TransferSyntaxUID", "")
    except Exception as error:  # damaged bytes make pydicom fail in any of its functions
        raise ExcludedCaseError(path, f"cannot be read as DICOM ({error})", COPY_AGAIN) from None
    if syntax == _DEFLATED:
        raise ExcludedCaseError(path, "is deflated, and could unpack to any size", "Convert it, e.g. by dcmconv +te.")


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _end_of_pixels(dataset: pydicom.Dataset, file: BinaryIO) -> int | None:
    """Where the pixel data end that begin at the file's position; None if there are none, 0 if they do not tell."""
    at, element = file.tell(), file.read(12)
    if len(element) < 12:
        return None
    implicit, little_endian = dataset.original_encoding
    length_at = 4 if implicit else 8
    (length,) = struct.unpack_from("<I" if little_endian else ">I", element, length_at)
    return 0 if length == 0xFFFFFFFF else at + length_at + 4 + length


def _dataset(path: Path, file: BinaryIO | Path, **options: object) -> pydicom.Dataset:
    import pydicom

    try:
        return pydicom.dcmread(file, **options)
    except Exception as error:  # damaged bytes make pydicom fail in any of its functions
        raise ExcludedCaseError(path, f"cannot be read as DICOM ({error})", COPY_AGAIN) from None


def stack_of(headers: list[Header]) -> Stack:
    """Order slices along their normal and check that they fill a regular grid.

    Raises:
        ExcludedCaseError: naming the first slice that does not fit.
    """
    first = headers[0]
    folder = first.path.parent
    for header in headers:
        if header.fault:
            raise ExcludedCaseError(header.path, header.fault, COPY_AGAIN)
    if len(headers) < 2:
        raise ExcludedCaseError(folder, "has a single slice", "Download the whole series.")
    in_plane = np.array(
        [
            header.numbers("ImageOrientationPatient", 6)
            + header.numbers("PixelSpacing", 2)
            + header.numbers("Rows", 1)
            + header.numbers("Columns", 1)
            for header in headers
        ]
    )
    if (odd := np.flatnonzero(np.abs(in_plane - in_plane[0]).max(axis=1) > 1e-4)).size:
        raise ExcludedCaseError(
            headers[odd[0]].path,
            f"differs in orientation, pixel spacing or matrix from {first.path.name}",
            "Keep one stack of slices a series.",
        )
    along_row, along_column = in_plane[0, :3], in_plane[0, 3:6]
    row_mm, column_mm, rows, columns = in_plane[0, 6:]
    if min(row_mm, column_mm, rows, columns) <= 0:
        raise ExcludedCaseError(first.path, "has no rows, no columns, or pixels without a size", COPY_AGAIN)
    if np.abs([along_row @ along_row - 1, along_column @ along_column - 1, along_row @ along_column]).max() > 1e-3:
        raise ExcludedCaseError(first.path, "has axes that are not perpendicular unit vectors", COPY_AGAIN)
    normal = np.cross(along_row, along_column)
    positions = np.array([header.numbers("ImagePositionPatient", 3) for header in headers])
    order = np.argsort(positions @ normal, kind="stable")
    headers, positions = [headers[i] for i in order], positions[order]
    _check_spacing(headers, positions, normal)
    step = (positions[-1] - positions[0]) / (len(headers) - 1)
    affine = np.eye(4)
    affine[:3] = np.column_stack([along_row * column_mm, along_column * row_mm, step, positions[0]])
    affine[:2] *= -1  # LPS to RAS
    thickness_mm = headers[0].numbers("SliceThickness", 1)[0] if headers[0]["SliceThickness"] else 0.0
    return Stack(
        tuple(headers),
        (int(columns), int(rows), len(headers)),
        affine,
        positions,
        thickness_mm if thickness_mm > 0 else None,
    )


def _check_spacing(headers: list[Header], positions: np.ndarray, normal: np.ndarray) -> None:
    folder = headers[0].path.parent
    steps = np.diff(positions, axis=0)
    gaps = steps @ normal
    true_gaps = np.sort(gaps[gaps > POSITION_TOLERANCE * gaps.max()])
    spacing = float(true_gaps[(len(true_gaps) - 1) // 2]) if gaps.max() > 0 else 0.0
    tolerance = POSITION_TOLERANCE * spacing
    for k, gap in enumerate(gaps):
        pair = f"{headers[k].path.name} and {headers[k + 1].path.name}"
        if gap <= tolerance:
            raise ExcludedCaseError(folder, f"{pair} are slices of one position", "Keep one of them.")
        if abs(gap - spacing) > tolerance:
            missing = round(gap / spacing) - 1
            problem = (
                f"{missing} slice(s) missing between {pair}"
                if missing and abs(gap - (missing + 1) * spacing) <= tolerance
                else f"{pair} are {gap:.3g} mm apart, the others {spacing:.3g} mm"
            )
            raise ExcludedCaseError(folder, problem, "Download the whole series.")
    if np.abs(steps - np.outer(gaps, normal)).max() > tolerance:
        raise ExcludedCaseError(folder, "slices are shifted sideways (tilted gantry)", "Resample it to upright slices.")


def hounsfield(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """One slice in HU, (rows, columns) int16, padding and all below -1024 set to -1024."""
    from pydicom.pixels import apply_rescale

    dataset = _dataset(path, path)
    try:
        stored = dataset.pixel_array
    except Exception as error:  # damaged bytes make pydicom and its decoders fail in any of their functions
        raise ExcludedCaseError(path, f"pixels cannot be decoded ({error})", COPY_AGAIN) from None
    if stored.shape != shape:
        raise ExcludedCaseError(path, f"holds an image of {stored.shape} instead of {shape} pixels", COPY_AGAIN)
    try:
        hu = np.rint(apply_rescale(stored, dataset))
        if (padding := dataset.get("PixelPaddingValue")) is not None:
            # Headers often give a negative value in its unsigned reading (63536 for -2000): wrap it like the pixels.
            hu[stored == np.asarray(padding).astype(stored.dtype)] = AIR_HU
    except (TypeError, ValueError, OverflowError) as error:
        raise ExcludedCaseError(path, f"rescale or padding value is no number ({error})", COPY_AGAIN) from None
    if "RescaleSlope" not in dataset or "RescaleIntercept" not in dataset or not np.isfinite(hu).all():
        raise ExcludedCaseError(path, "has no rescale slope and intercept, so no Hounsfield units", COPY_AGAIN)
    return np.clip(hu, AIR_HU, np.iinfo(np.int16).max).astype(np.int16)


def can_be_decoded(syntax: str) -> bool:
    if syntax in ("", _IMPLICIT_LITTLE_ENDIAN, _EXPLICIT_LITTLE_ENDIAN):
        return True
    from pydicom.pixels import get_decoder

    try:
        return get_decoder(syntax).is_available
    except (NotImplementedError, ValueError):
        return False


def name_of_syntax(syntax: str) -> str:
    from pydicom.uid import UID

    return UID(syntax).name
