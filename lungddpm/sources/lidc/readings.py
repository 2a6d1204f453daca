"""Readings: the outlines of LIDC-IDRI's readers, from XML files to the index space of a scan."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lungddpm.core.errors import ExcludedCaseError, InputError
from lungddpm.sources import Annotation, Contour
from lungddpm.sources.lidc.dicom import COPY_AGAIN
from lungddpm.sources.lidc.headers import LARGEST_NUMBER
from lungddpm.sources.lidc.slices import Stack

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

_LARGEST_XML_BYTES = 16 * 2**20
"""Many times the largest file of LIDC-IDRI; limits time and memory per file."""
_SERIES_UID_IN_XML = re.compile(rb"<(?:\w+:)?SeriesInstanceU[iI][dD]>\s*([0-9.]+)\s*<")
_POINT = rb"<edgeMap>_<xCoord>_[0-9]{1,6}_</xCoord>_<yCoord>_[0-9]{1,6}_</yCoord>_</edgeMap>_"
_POINTS = re.compile(b"(?:" + _POINT.replace(b"_", rb"[ \t\r\n]*") + b")+")
_OUTLINE = "edgeMaps"
"""Our own element: the points of successive `edgeMap` elements as one text, x and y alternating."""
_DIGITS_ONLY = bytes(byte if byte in b"0123456789" else 0x20 for byte in range(256))
_RADIOGRAPH, _CT = "IdriReadMessage", "LidcReadMessage"
_SHOWN_CHARACTERS = 120


@dataclass(frozen=True)
class Outline:
    """One `roi` of the XML: a contour that still names its slice by UID and position."""

    sop_uid: str
    z_mm: float
    inclusion: bool
    points: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Mark:
    """One reader's nodule of at least 3 mm."""

    reader: int
    outlines: tuple[Outline, ...]
    characteristics: dict[str, int]


@dataclass(frozen=True)
class Reads:
    """The content of one XML file."""

    series_uid: str
    is_ct: bool
    """False for the reads of a chest radiograph."""
    marks: tuple[Mark, ...]
    message: str = ""
    """Identifies the message in the file; empty if unknown. A correction keeps it."""
    sessions: int = 0
    """Reading sessions, with and without nodules of at least 3 mm."""


def read_xml(path: Path) -> Reads:
    """Read one XML file of LIDC-IDRI: the nodules of at least 3 mm, each reader's own.

    One-point marks (nodules below 3 mm) and other findings are left out. Reading sessions number the readers.

    Raises:
        InputError: the file is too large, cannot be parsed, has a document type (and with it perhaps an entity bomb),
            or has invalid coordinates.
    """
    return _parse_xml(_bytes_of(path), path)


def named_series(file: Path) -> str:
    """The series that an XML file seems to name, without parsing it; empty if not found."""
    named = _SERIES_UID_IN_XML.search(_bytes_of(file))
    return named[1].decode() if named else ""


def merged(reads: Iterable[Reads]) -> list[Mark]:
    """The marks of several files of one series, without those already in an earlier file.

    Six series have two to six files with the same reads in the same order of sessions.
    """
    marks: list[Mark] = []
    seen: set[tuple[int, Outline]] = set()
    for read in reads:
        new = [
            Mark(mark.reader, left, mark.characteristics)
            for mark in read.marks
            if (left := tuple(outline for outline in mark.outlines if (mark.reader, outline) not in seen))
        ]
        seen |= {(mark.reader, outline) for mark in new for outline in mark.outlines}
        marks += new
    return marks


def in_scan(mark: Mark, stack: Stack, origin: Path) -> Annotation:
    """A mark in the index space of the stack.

    Raises:
        ExcludedCaseError: a contour is not on any slice, or outside the matrix.
    """
    uids = [header["SOPInstanceUID"] for header in stack.headers]
    # Frames of one file share its UID, which then does not identify any of them.
    slice_of = {uid: k for k, uid in enumerate(uids)} if len(set(uids)) == len(uids) else {}
    z_mm = stack.positions_mm[:, 2]
    contours = []
    for outline in mark.outlines:
        k = slice_of.get(outline.sop_uid)
        if k is None:
            k = int(np.argmin(np.abs(z_mm - outline.z_mm)))
            if not abs(z_mm[k] - outline.z_mm) <= np.abs(np.diff(z_mm)).max() / 2:
                raise ExcludedCaseError(
                    origin, f"has a contour at z {outline.z_mm:g} mm, where there is no slice", "Match XML and series."
                )
        points = np.array(outline.points)
        if points.min() < 0 or (points >= stack.size[:2]).any():
            raise ExcludedCaseError(
                origin, f"has a contour outside the {stack.size[0]} x {stack.size[1]} pixels", "Match XML and series."
            )
        contours.append(Contour(k, points, outline.inclusion))
    return Annotation(mark.reader, tuple(contours), mark.characteristics)


def _bytes_of(path: Path) -> bytes:
    try:
        if not path.is_file() and path.exists():
            raise InputError(path, "is not a file", "Move it out of the data set.")
        with path.open("rb") as file:
            data = file.read(_LARGEST_XML_BYTES + 1)
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})", "Check the file and its permissions.") from None
    if len(data) > _LARGEST_XML_BYTES:
        raise InputError(
            path, f"is larger than the {_LARGEST_XML_BYTES >> 20} MiB allowed for a reading", "Check the file."
        )
    return data


def _parse_xml(data: bytes, path: Path) -> Reads:
    from xml.parsers.expat import ExpatError

    try:
        root = _compact_tree(data)
        header = root.find("ResponseHeader")
        uid = (
            "" if header is None else header.findtext("SeriesInstanceUid") or header.findtext("SeriesInstanceUID") or ""
        )
        # Only children, no descendants: nested sessions would be read repeatedly.
        marks = [
            mark
            for reader, session in enumerate(root.findall("readingSession"))
            for nodule in session.findall("unblindedReadNodule")
            if (mark := _mark(reader, nodule)) is not None
        ]
    except (ExpatError, LookupError, ValueError, TypeError) as error:
        problem = f"cannot be read as LIDC XML ({type(error).__name__}: {str(error)[:_SHOWN_CHARACTERS]})"
        raise InputError(path, problem, COPY_AGAIN) from None
    if root.tag in (_CT, _RADIOGRAPH) and not uid.strip():
        raise InputError(path, "cannot be read as LIDC XML (it names no series)", COPY_AGAIN)
    message = "" if header is None else (header.findtext("MessageId") or "").strip()
    return Reads(uid.strip(), root.tag == _CT, tuple(marks), message, len(root.findall("readingSession")))


def _compact_tree(data: bytes) -> Element:
    """The elements of a document, except the points of outlines: each run of them is one `_OUTLINE`.

    Points make up most of a file, with three elements each: without them it is read twice as fast.
    """
    from xml.parsers.expat import ExpatError

    name = _OUTLINE.encode()
    if name not in data:
        compact = _POINTS.sub(lambda run: b"<%b>%b</%b>" % (name, run[0].translate(_DIGITS_ONLY), name), data)
        try:
            return _tree(compact)
        except ExpatError:
            pass  # for the position of the error in the file itself
    return _tree(data)


def _tree(data: bytes) -> Element:
    """The elements of a document, with names without prefix.

    Document types are rejected, because bombs of entities and of default attributes need one. Namespaces are not
    resolved, because expat would copy a long one into the name of every element.
    """
    from xml.etree.ElementTree import TreeBuilder
    from xml.parsers import expat

    def refuse(*_: object) -> None:
        raise ValueError("it has a document type (DTD), which could hide an entity bomb")

    builder = TreeBuilder()
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler = builder.start, builder.end
    parser.CharacterDataHandler = builder.data
    parser.Parse(data, True)
    root = builder.close()
    for element in root.iter():
        element.tag = element.tag.rpartition(":")[2]
    return root


def _mark(reader: int, nodule: Element) -> Mark | None:
    """One `unblindedReadNodule`; None unless it is a nodule of at least 3 mm, with an outline."""
    described = nodule.find("characteristics")
    values = (
        {}
        if described is None
        else {item.tag: _whole_number(item.text) for item in described if (item.text or "").strip()}
    )
    outlines = [
        Outline(
            sop_uid=(roi.findtext("imageSOP_UID") or "").strip(),
            z_mm=_position_mm(roi),
            inclusion=(roi.findtext("inclusion") or "").strip().upper() != "FALSE",
            points=tuple(point for edge in roi for point in _points_of(edge)),
        )
        for roi in nodule.findall("roi")
    ]
    if sum(len(outline.points) for outline in outlines) < 2 or not any(values.values()):
        return None
    return Mark(reader, tuple(outline for outline in outlines if outline.points), values)


def _points_of(edge: Element) -> Iterable[tuple[int, int]]:
    """The points of an element within a `roi`: one, several, or none."""
    if edge.tag == _OUTLINE:
        numbers = [int(number) for number in (edge.text or "").split()]
        return zip(numbers[::2], numbers[1::2], strict=True)
    if edge.tag == "edgeMap":
        return [(_whole_number(edge.findtext("xCoord")), _whole_number(edge.findtext("yCoord")))]
    return []


def _whole_number(text: str | None) -> int:
    if text is None:
        raise ValueError("a coordinate or a rating is missing")
    number = int(text)
    if abs(number) > LARGEST_NUMBER:
        raise ValueError(f"{number} is neither a pixel nor a rating")
    return number


def _position_mm(roi: Element) -> float:
    """The position of an outline; if it has none, NaN, always the same object so that equal outlines are equal."""
    position = float(roi.findtext("imageZposition") or "nan")
    return position if math.isfinite(position) else math.nan
