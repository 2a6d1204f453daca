"""The headers of all DICOM images in a folder."""

from __future__ import annotations

import os
import struct
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from lungddpm.core.errors import ExcludedCaseError
from lungddpm.sources.lidc.dicom import (
    COPY_AGAIN,
    EXPLICIT_LITTLE_ENDIAN,
    LARGEST_MULTIFRAME_BYTES,
    LARGEST_SLICE_BYTES,
    LONG_REPRESENTATIONS,
    begin,
    frame_value,
    read_dataset,
    text_of,
)

if TYPE_CHECKING:
    import pydicom

LARGEST_NUMBER = 1e6
"""Above every valid position (mm), size and direction, and far below numeric overflow."""

_TAGS = {
    0x00020010: "TransferSyntaxUID",
    0x00080005: "SpecificCharacterSet",
    0x00080008: "ImageType",
    0x00080016: "SOPClassUID",
    0x00080018: "SOPInstanceUID",
    0x0008001C: "SyntheticData",
    0x00080060: "Modality",
    0x00100020: "PatientID",
    0x00180050: "SliceThickness",
    0x0020000E: "SeriesInstanceUID",
    0x00200032: "ImagePositionPatient",
    0x00200037: "ImageOrientationPatient",
    0x00280008: "NumberOfFrames",
    0x00280010: "Rows",
    0x00280011: "Columns",
    0x00280030: "PixelSpacing",
}
_IN_FUNCTIONAL_GROUPS = {
    "ImagePositionPatient": ("PlanePositionSequence", "ImagePositionPatient"),
    "ImageOrientationPatient": ("PlaneOrientationSequence", "ImageOrientationPatient"),
    "PixelSpacing": ("PixelMeasuresSequence", "PixelSpacing"),
    "SliceThickness": ("PixelMeasuresSequence", "SliceThickness"),
    "ImageType": ("CTImageFrameTypeSequence", "FrameType"),
    # The original slice of a frame, to which the readers' XML refers.
    "SOPInstanceUID": ("ConversionSourceAttributesSequence", "ReferencedSOPInstanceUID"),
}
"""Location in multi-frame files of the elements of a slice header."""
_FUNCTIONAL_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
_GROUP_TAGS = (0x52009229, 0x52009230)
_PIXEL_DATA = 0x7FE00010
_HEADER_BYTES = 8192


@dataclass(frozen=True)
class Header:
    """What one slice's header says, as text ("0.7\\\\0.7"); an element that is missing is empty."""

    path: Path
    elements: dict[str, str]
    problem: str = ""
    """Problem of the file beyond its header, as a clause."""
    frame: int = 0
    """Index of the image in the file."""
    frames: int = 1
    """Number of images in the file."""

    def __getitem__(self, keyword: str) -> str:
        return self.elements.get(keyword, "")

    @property
    def name(self) -> str:
        """The slice in messages."""
        return self.path.name if self.frames == 1 else f"frame {self.frame + 1} of {self.path.name}"

    def numbers(self, keyword: str, count: int) -> list[float]:
        """The element as `count` numbers.

        Raises:
            ExcludedCaseError: it is missing, not that many numbers, or implausible.
        """
        try:
            values = [float(part) for part in self[keyword].split("\\")]
        except ValueError:
            values = []
        if len(values) != count or not all(abs(value) < LARGEST_NUMBER for value in values):
            raise ExcludedCaseError(self.path, f"has no {keyword} of {count} number(s)", COPY_AGAIN)
        return values


def read_headers(files: Iterable[Path]) -> tuple[dict[str, list[Header]], ExcludedCaseError | None]:
    """Slices by series UID, and the first error of a DICOM file whose series is unknown."""
    slices: dict[str, list[Header]] = defaultdict(list)
    first = None
    for path in files:
        try:
            headers = _read_header(path)
        except ExcludedCaseError as problem:
            first = first or problem
        else:
            for header in headers:
                slices[header["SeriesInstanceUID"]].append(header)
    return slices, first


def _read_header(path: Path) -> list[Header]:
    """The header of every image in a file; none for a file that is not a DICOM image.

    Raises:
        ExcludedCaseError: a DICOM file that does not name its series.
    """
    if path.name.startswith(".") or path.name.upper() == "DICOMDIR":
        return []
    try:
        # Opening a named pipe would wait forever.
        if not path.is_file() and path.exists():
            return []
        with path.open("rb") as file:
            start = file.read(_HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
            if begin(start) is None:
                if path.suffix.lower() == ".dcm":
                    raise ExcludedCaseError(path, "is empty or not a DICOM file", COPY_AGAIN)
                return []
            unpacked: int | None = size
            if quick := _explicit_elements(start):
                images, problem, end = [quick[0]], "", quick[1]
            else:
                images, problem, end, unpacked = _elements_by_pydicom(path, file)
    except OSError as error:
        raise ExcludedCaseError(
            path, f"cannot be read ({error.strerror})", "Check the file and its permissions."
        ) from None
    largest = LARGEST_SLICE_BYTES if len(images) == 1 else LARGEST_MULTIFRAME_BYTES
    if size > largest:
        raise ExcludedCaseError(path, f"is larger than the {largest >> 20} MiB allowed for a slice", "Check the file.")
    if not images[0].get("SeriesInstanceUID"):
        raise ExcludedCaseError(path, "is truncated, or lacks its SeriesInstanceUID", COPY_AGAIN)
    if len(images) == 1 and unpacked is None:
        problem = f"decompresses to more than the {largest >> 20} MiB allowed for a slice"
    elif end is None:
        problem = problem or "has no pixel data, or is truncated before it"
    elif unpacked is not None and end > unpacked:
        problem = problem or "is truncated"
    return [Header(path, elements, problem, frame, len(images)) for frame, elements in enumerate(images)]


def _explicit_elements(start: bytes) -> tuple[dict[str, str], int | None] | None:
    """The elements of `_TAGS` and where the pixel data end, from the first bytes of a file (DICOM PS3.5, 7.1.2).

    The end is None in a file without pixel data. Only for plain explicit-VR little-endian files of one image, as
    nearly all of LIDC-IDRI are; None for others. The data set has 244,527 slices: importing pydicom and reading as
    many headers with it takes ten times as long.
    """
    if start[128:132] != b"DICM":
        return None
    elements: dict[str, str] = {}
    at = 132
    while at + 12 <= len(start):
        group, element, representation, length = struct.unpack_from("<HH2sH", start, at)
        at += 8
        if representation in LONG_REPRESENTATIONS:
            (length,) = struct.unpack_from("<I", start, at)
            at += 4
        tag = group << 16 | element
        if length == 0xFFFFFFFF or not representation.isalpha():
            return None
        if tag == _PIXEL_DATA:
            return elements, at + length
        if (name := _TAGS.get(tag)) is not None:
            value = start[at : at + length]
            if representation == b"US":
                elements[name] = str(int.from_bytes(value, "little"))
            elif name == "PatientID":
                elements[name] = text_of(value, elements.get("SpecificCharacterSet", ""))
            else:
                elements[name] = value.decode("latin-1").strip(" \0")
            if tag == 0x00020010 and elements[name] != EXPLICIT_LITTLE_ENDIAN:
                return None
            if tag == 0x00280008 and elements[name] not in ("", "1"):
                return None
        elif tag in _GROUP_TAGS:  # geometry is in there
            return None
        at += length
    return (elements, None) if len(start) < _HEADER_BYTES else None


def _elements_by_pydicom(path: Path, file: BinaryIO) -> tuple[list[dict[str, str]], str, int | None, int | None]:
    """The same for every other file: the elements of each image, and where the pixel data end.

    The end of compressed pixel data is only known after decoding: then it is 0. Also returns what is wrong with the
    images, as a clause, and the size of the data set in bytes (see `read_dataset`).
    """
    from pydicom import config

    with config.disable_value_validation():
        dataset, stream, size = read_dataset(path, file, only=[*_TAGS.values(), *_FUNCTIONAL_GROUPS])
        try:
            images, problem = _images_of(dataset)
        except Exception as error:  # damaged bytes make pydicom fail in any of its functions
            raise ExcludedCaseError(path, f"cannot be read as DICOM ({error})", COPY_AGAIN) from None
        return images, problem, _end_of_pixels(dataset, stream), size


def _images_of(dataset: pydicom.Dataset) -> tuple[list[dict[str, str]], str]:
    """The elements of each image of a data set, and what is wrong with the images as a clause."""
    patient = dataset.get_item("PatientID")
    values = {name: value for name in _TAGS.values() if (value := dataset.get(name)) is not None}
    values["TransferSyntaxUID"] = dataset.file_meta.get("TransferSyntaxUID", "")
    elements = {name: _text(value) for name, value in values.items()}
    if patient is not None and isinstance(patient.value, bytes):
        elements["PatientID"] = text_of(patient.value, elements.get("SpecificCharacterSet", ""))
    frames = int(elements.get("NumberOfFrames") or 1)
    if not any(groups in dataset for groups in _FUNCTIONAL_GROUPS):
        return [elements], f"has {frames} frames without positions" if frames != 1 else ""
    described = len(dataset.get("PerFrameFunctionalGroupsSequence") or [None])
    if described != frames:
        return [elements], f"has {frames} frames, but describes {described}"
    images = []
    for frame in range(described):
        of_frame = {
            name: _text(value)
            for name, place in _IN_FUNCTIONAL_GROUPS.items()
            if (value := frame_value(dataset, frame, *place)) is not None
        }
        images.append(elements | of_frame)
    return images, ""


def _text(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "\\".join(map(str, value))
    return str(value)


def _end_of_pixels(dataset: pydicom.Dataset, stream: BinaryIO) -> int | None:
    """End of the pixel data that begin at the stream's position; None if there are none, 0 if unknown."""
    at, element = stream.tell(), stream.read(12)
    if len(element) < 12:
        return None
    implicit, little_endian = dataset.original_encoding
    length_at = 4 if implicit else 8
    (length,) = struct.unpack_from("<I" if little_endian else ">I", element, length_at)
    return 0 if length == 0xFFFFFFFF else at + length_at + 4 + length
