"""DICOM files as found in practice: with or without preamble, in any transfer syntax, read with size limits.

pydicom is imported where it is used: nearly all files of LIDC-IDRI can be indexed without it (see `slices`).
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lungddpm.core.errors import ExcludedCaseError
from lungddpm.core.volume import LARGEST_VOXELS

if TYPE_CHECKING:
    import pydicom

COPY_AGAIN = "Download or copy the file again."
LARGEST_SLICE_BYTES = 64 * 2**20
"""Twice those of 4096 x 4096 pixels; limits the size of a decompressed file."""
LARGEST_MULTIFRAME_BYTES = LARGEST_SLICE_BYTES + 2 * LARGEST_VOXELS
IMPLICIT_LITTLE_ENDIAN, EXPLICIT_LITTLE_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"
EXPLICIT_BIG_ENDIAN, DEFLATED = "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"
LONG_REPRESENTATIONS = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
_REPRESENTATIONS = LONG_REPRESENTATIONS | {
    b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO", b"LT", b"PN", b"SH", b"SL", b"SS",
    b"ST", b"TM", b"UI", b"UL", b"US",
}  # fmt: skip
_MAGIC = b"DICM"
_FIRST_GROUPS = (0x0002, 0x0008)
_LONGEST_FIRST_ELEMENT = 256
_MOST_META_ELEMENTS = 1000


def begin(start: bytes) -> int | None:
    """Offset of the first element of a DICOM file, from its first bytes; None: it is not a DICOM file.

    Part 10 of the standard puts 128 bytes and "DICM" before them; old exports lack one, the other or both.
    """
    if start[128:132] == _MAGIC:
        return 132
    if start[:4] == _MAGIC:
        return 4
    return next((at for at in (0, 128) if _is_first_element(start[at : at + 8])), None)


def read_dataset(
    path: Path, file: BinaryIO, largest_bytes: int = LARGEST_SLICE_BYTES, only: list[str] | None = None
) -> tuple[pydicom.Dataset, BinaryIO, int | None]:
    """Read a file that has a beginning (see `begin`) with pydicom.

    Args:
        path: for messages.
        file: the open file.
        largest_bytes: limit for the inflated size of a deflated file.
        only: keywords of the elements to read, without pixels; None: everything.

    Returns:
        The data set, with the transfer syntax filled in if the file does not name one; the stream that it was read
        from, at the end of the read; and the size of the stream in bytes, None if a deflated file inflates to more than
        `largest_bytes`.

    Raises:
        ExcludedCaseError: the bytes are damaged.
    """
    import pydicom
    from pydicom.uid import UID

    try:
        stream, size = _stream(file, largest_bytes)
        dataset = pydicom.dcmread(stream, force=True, stop_before_pixels=only is not None, specific_tags=only)
        if not dataset.file_meta.get("TransferSyntaxUID"):
            implicit, little_endian = dataset.original_encoding
            explicit = EXPLICIT_LITTLE_ENDIAN if little_endian else EXPLICIT_BIG_ENDIAN
            dataset.file_meta.TransferSyntaxUID = UID(IMPLICIT_LITTLE_ENDIAN if implicit else explicit)
    except OSError:
        raise
    except Exception as error:  # damaged bytes make pydicom fail in any of its functions
        raise ExcludedCaseError(path, f"cannot be read as DICOM ({error})", COPY_AGAIN) from None
    return dataset, stream, size


def frame_value(dataset: pydicom.Dataset, frame: int, sequence: str, keyword: str) -> Any:
    """An element of the functional groups of one frame, or else of the shared ones; None: neither has it.

    See DICOM PS3.3, C.7.6.16.
    """
    of_frames = dataset.get("PerFrameFunctionalGroupsSequence") or []
    for groups in [*of_frames[frame : frame + 1], *(dataset.get("SharedFunctionalGroupsSequence") or [])[:1]]:
        items = groups.get(sequence)
        if items and (value := items[0].get(keyword)) is not None:
            return value
    return None


def text_of(value: bytes, character_set: str) -> str:
    """The text of an element, in the file's Specific Character Set.

    Many files have non-ASCII text without naming a set: then it is UTF-8 if valid, else Windows-1252.
    """
    value = value.strip(b" \0")
    if value.isascii() and b"\x1b" not in value:
        return value.decode("ascii")
    if character_set.strip("\\ ") not in ("", "ISO_IR 6", "ISO 2022 IR 6"):
        from pydicom.charset import convert_encodings, decode_bytes

        return decode_bytes(value, convert_encodings(character_set.split("\\")), {0x5C})
    for encoding in ("utf-8", "windows-1252"):
        try:
            return value.decode(encoding)
        except UnicodeDecodeError:
            continue
    return value.decode("latin-1")


def _is_first_element(element: bytes) -> bool:
    if len(element) < 8:
        return False
    for order in "<>":
        group, _, representation, length = struct.unpack(f"{order}HH2sH", element)
        if group in _FIRST_GROUPS and representation in _REPRESENTATIONS and length <= _LONGEST_FIRST_ELEMENT:
            return True
    group, number, length = struct.unpack("<HHI", element)
    # Without a representation there is less evidence: the number must be one that comes first.
    return group in _FIRST_GROUPS and number <= 0x18 and length <= _LONGEST_FIRST_ELEMENT


def _stream(file: BinaryIO, largest_bytes: int) -> tuple[BinaryIO, int | None]:
    """The stream for pydicom, and its size. On its own, pydicom inflates a deflated file to any size."""
    file.seek(0)
    at = begin(file.read(132 + 8)) or 0
    syntax, end_of_meta = _meta(file, at)
    if syntax == DEFLATED:
        file.seek(end_of_meta)
        unpacking = zlib.decompressobj(-zlib.MAX_WBITS)
        content = unpacking.decompress(file.read(largest_bytes), largest_bytes)
        return io.BytesIO(content), len(content) if unpacking.eof or len(content) < largest_bytes else None
    size = os.fstat(file.fileno()).st_size
    if at in (0, 132) and size <= largest_bytes:
        file.seek(0)
        return file, size
    # pydicom does not support a preamble without "DICM", or the reverse. Too large files are read up to the limit.
    start = at if at in (4, 128) else 0
    file.seek(start)
    return io.BytesIO(file.read(largest_bytes)), size - start


def _meta(file: BinaryIO, at: int) -> tuple[str, int]:
    """The transfer syntax in the meta information, empty if there is none, and the end of the meta information."""
    file.seek(at)
    syntax = ""
    for _ in range(_MOST_META_ELEMENTS):
        head = file.read(8)
        if len(head) < 8:
            break
        group, element, representation, length = struct.unpack("<HH2sH", head)
        if group != 0x0002:
            return syntax, file.tell() - 8
        if representation in LONG_REPRESENTATIONS:
            length = int.from_bytes(file.read(4), "little")
        elif representation not in _REPRESENTATIONS:
            (length,) = struct.unpack_from("<I", head, 4)
        if element == 0x0010:
            syntax = file.read(min(length, 64)).decode("latin-1").strip(" \0")
        else:
            file.seek(length, os.SEEK_CUR)
    return syntax, file.tell()
