"""Pixels: slices of any transfer syntax in HU."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lungddpm.core.errors import ExcludedCaseError
from lungddpm.core.volume import AIR_HU, whole_hu
from lungddpm.sources.lidc.dicom import (
    COPY_AGAIN,
    EXPLICIT_BIG_ENDIAN,
    EXPLICIT_LITTLE_ENDIAN,
    IMPLICIT_LITTLE_ENDIAN,
    LARGEST_MULTIFRAME_BYTES,
    LARGEST_SLICE_BYTES,
    frame_value,
    read_dataset,
)

if TYPE_CHECKING:
    import pydicom

    from lungddpm.sources.lidc.headers import Header

_RLE = "1.2.840.10008.1.2.5"
_NATIVE = ("", IMPLICIT_LITTLE_ENDIAN, EXPLICIT_LITTLE_ENDIAN, EXPLICIT_BIG_ENDIAN)
_JPEG, _JPEG_LS, _JPEG_2000 = "jpeg8_decode", "jpegls_decode", "jpeg2k_decode"
_CODECS = {
    "1.2.840.10008.1.2.4.50": _JPEG,
    "1.2.840.10008.1.2.4.51": _JPEG,
    "1.2.840.10008.1.2.4.57": _JPEG,
    "1.2.840.10008.1.2.4.70": _JPEG,
    "1.2.840.10008.1.2.4.80": _JPEG_LS,
    "1.2.840.10008.1.2.4.81": _JPEG_LS,
    "1.2.840.10008.1.2.4.90": _JPEG_2000,
    "1.2.840.10008.1.2.4.91": _JPEG_2000,
    "1.2.840.10008.1.2.4.201": _JPEG_2000,
    "1.2.840.10008.1.2.4.202": _JPEG_2000,
    "1.2.840.10008.1.2.4.203": _JPEG_2000,
}
"""imagecodecs' decoder for each JPEG syntax. The decoders available to pydicom support neither JPEG Lossless nor
JPEG-LS. High-throughput JPEG 2000 also uses OpenJPEG: imagecodecs' own decoder ignores errors."""
_LARGEST_INTERCEPT = 2**16
_JPEG_2000_START = b"\xff\x4f\xff\x51"
_LONGEST_JP2_BOXES = 512
"""The standard requires bare codestreams; some files have those of a JP2 file, preceded by its boxes."""
_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_JPEG_FRAME_MARKERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
"""Start of frame in JPEG, JPEG Lossless and JPEG-LS (SOF55)."""


def can_be_decoded(syntax: str) -> bool:
    """Whether pixels of a transfer syntax, given by its UID, can be read."""
    return syntax in _NATIVE or syntax == _RLE or syntax in _CODECS


def name_of_syntax(syntax: str) -> str:
    """The name of a transfer syntax, or its UID if it has no name."""
    from pydicom.uid import UID

    return UID(syntax).name


def hounsfield(headers: Sequence[Header], shape: tuple[int, int]) -> Iterator[np.ndarray]:
    """The slices of these headers in HU, one after the other.

    Each is (rows, columns) int16, padding and all below -1024 set to -1024.

    Args:
        headers: slices, or frames of multi-frame files.
        shape: rows and columns that each must have.

    Raises:
        ExcludedCaseError: a file cannot be read, or its pixels cannot be decoded or have no Hounsfield units.
    """
    for path, group in groupby(headers, key=lambda header: header.path):
        of_file = list(group)
        largest = LARGEST_SLICE_BYTES if of_file[0].frames == 1 else LARGEST_MULTIFRAME_BYTES
        try:
            with path.open("rb") as file:
                dataset, _, size = read_dataset(path, file, largest)
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
            raise ExcludedCaseError(path, problem, "Check the file and its permissions.") from None
        if size is None:
            raise ExcludedCaseError(path, f"decompresses to more than {largest >> 20} MiB", "Check the file.")
        frames = [header.frame for header in of_file]
        for frame, (stored, values) in zip(frames, _decode_or_exclude(path, dataset, frames, shape), strict=True):
            yield _in_hu(stored, values, dataset, frame, path)


def _decode_or_exclude(
    path: Path, dataset: pydicom.Dataset, frames: list[int], shape: tuple[int, int]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The data set, and for each of these frames the values of its stored bits."""
    syntax = dataset.file_meta.TransferSyntaxUID
    decoded = _decode(dataset, syntax, frames, shape)
    for _ in frames:
        try:
            stored, precision = next(decoded)
            values = _used_bits(stored, precision, dataset)
        except Exception as error:  # damaged bytes make the decoders fail in any of their functions
            problem = f"pixels cannot be decoded ({name_of_syntax(syntax)}: {error})"
            raise ExcludedCaseError(path, problem, COPY_AGAIN) from None
        if stored.shape != shape:
            raise ExcludedCaseError(path, f"has an image of {stored.shape} instead of {shape} pixels", COPY_AGAIN)
        yield stored, values


def _decode(
    dataset: pydicom.Dataset, syntax: str, frames: list[int], shape: tuple[int, int]
) -> Iterator[tuple[np.ndarray, int | None]]:
    """The stored pixels of each frame, and the bits per pixel of a JPEG image; None for other syntaxes."""
    if 4 * shape[0] * shape[1] > LARGEST_SLICE_BYTES:
        raise ValueError(f"{shape[0]} x {shape[1]} pixels are too many for a slice")
    if syntax not in _CODECS:
        from pydicom.pixels import get_decoder

        for stored, _ in get_decoder(syntax).iter_array(dataset, indices=frames, raw=True, correct_unused_bits=False):
            yield stored, None
        return
    import imagecodecs
    from pydicom.encaps import generate_frames

    decode = getattr(imagecodecs, _CODECS[syntax])
    coded = list(generate_frames(dataset.PixelData, number_of_frames=int(dataset.get("NumberOfFrames") or 1)))
    for frame in frames:
        if frame >= len(coded):
            raise ValueError(f"frame {frame + 1} of {len(coded)} is missing")
        image, claimed, precision = _inspect(coded[frame])
        # Before decoding, because the claimed size determines the memory.
        if claimed != shape:
            raise ValueError(f"the compressed image has {claimed} instead of {shape} pixels")
        yield decode(image), precision


def _inspect(coded: bytes) -> tuple[bytes, tuple[int, int], int]:
    """A JPEG 2000, JPEG or JPEG-LS image without leading bytes, its rows and columns, and its bits per pixel."""
    if (start := coded.find(_JPEG_2000_START, 0, _LONGEST_JP2_BOXES)) >= 0:
        coded = coded[start:]
        right, bottom, left, top = struct.unpack_from(">4I", coded, 8)
        return coded, (bottom - top, right - left), (coded[42] & 0x7F) + 1
    if coded[:2] != _JPEG_START:
        raise ValueError("the compressed image has no beginning")
    # libjpeg would invent the rest.
    if not coded.rstrip(b"\0").endswith(_JPEG_END):
        raise ValueError("the compressed image has no end")
    at = 2
    while True:
        mark, marker, length = struct.unpack_from(">BBH", coded, at)
        if mark != 0xFF:
            raise ValueError("the compressed image is damaged")
        if marker == 0xFF:  # padding
            at += 1
        elif marker in _JPEG_FRAME_MARKERS:
            precision, rows, columns = struct.unpack_from(">BHH", coded, at + 4)
            return coded, (rows, columns), precision
        else:
            at += 2 + length


def _used_bits(stored: np.ndarray, precision: int | None, dataset: pydicom.Dataset) -> np.ndarray:
    """The values of the stored bits; the other bits can contain anything, e.g. an overlay (PS3.5, 8.1.1).

    A JPEG image may have more or fewer bits than BitsStored, and does not need to record that it is signed.
    """
    bits, highest = int(dataset.BitsStored), int(dataset.HighBit)
    if precision is not None:
        bits = min(bits, precision)
        highest = bits - 1
    if not 0 < bits <= highest + 1:
        raise ValueError(f"BitsStored {bits} and HighBit {highest} contradict each other")
    width = 8 * stored.itemsize
    values = stored.astype(f"{'i' if dataset.PixelRepresentation else 'u'}{stored.itemsize}", copy=False)
    return values << max(0, width - 1 - highest) >> width - bits if bits < width else values


def _in_hu(stored: np.ndarray, values: np.ndarray, dataset: pydicom.Dataset, frame: int, path: Path) -> np.ndarray:
    no_rescale = ExcludedCaseError(path, "has no rescale slope and intercept, so no Hounsfield units", COPY_AGAIN)
    try:
        slope, intercept = (float(_rescale(dataset, frame, of)) for of in ("RescaleSlope", "RescaleIntercept"))
        if not np.isfinite([slope, intercept]).all():
            raise no_rescale
        if slope == 1 and abs(intercept) < _LARGEST_INTERCEPT and intercept.is_integer() and values.itemsize <= 2:
            hu: np.ndarray = values + np.int32(intercept)  # by far the most frequent case, and twice as fast
        else:
            hu = values * slope + intercept
        if (padding := dataset.get("PixelPaddingValue")) is not None:
            # Headers often give a negative value as unsigned (63536 for -2000): wrap it like the pixels.
            # It may use bits beyond those of the image.
            padding = np.asarray(padding)
            hu[values == padding.astype(values.dtype)] = AIR_HU
            if values is not stored:
                hu[stored == padding.astype(stored.dtype)] = AIR_HU
    except KeyError:
        raise no_rescale from None
    except (TypeError, ValueError, OverflowError) as error:
        problem = f"rescale or padding value is not a number ({error})"
        raise ExcludedCaseError(path, problem, COPY_AGAIN) from None
    return whole_hu(hu)


def _rescale(dataset: pydicom.Dataset, frame: int, keyword: str) -> Any:
    of_frame = frame_value(dataset, frame, "PixelValueTransformationSequence", keyword)
    return dataset[keyword].value if of_frame is None else of_frame
