"""LIDC-IDRI: chest CT as DICOM, and the outlines that four readers drew, as XML.

Both layouts of the download are read: the XML beside the slices, or in a tree of its own; an XML file belongs to the
series that its header names. Armato et al., Medical Physics 38:915-931, 2011, doi 10.1118/1.3528204.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lungddpm.errors import ExcludedCaseError, InputError
from lungddpm.progress import LOG, Progress
from lungddpm.sources import Annotation, Contour, Scan, Series, case_ids
from lungddpm.volume import AIR_HU, Volume

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

    import pandas as pd
    import pydicom

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
_EXPLICIT_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"
_LONG_REPRESENTATIONS = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
_HEADER_BYTES = 8192
_SERIES_UID_IN_XML = re.compile(rb"<(?:\w+:)?SeriesInstanceU[iI][dD]>\s*([0-9.]+)\s*<")
_DECODING_ERRORS = (AttributeError, KeyError, OSError, EOFError, RuntimeError, ValueError, struct.error)
"""What pydicom raises on damaged files, and where a plugin for their compression is missing."""
_COPY_AGAIN = "Download or copy the file anew."


@dataclass(frozen=True)
class _Header:
    """What one slice's header says, as text ("0.7\\\\0.7"); an element that is missing is empty."""

    path: Path
    elements: dict[str, str]

    def __getitem__(self, keyword: str) -> str:
        return self.elements.get(keyword, "")

    def numbers(self, keyword: str, count: int) -> list[float]:
        """The element as so many numbers.

        Raises:
            ExcludedCaseError: it is missing, or is something else.
        """
        try:
            values = [float(part) for part in self[keyword].split("\\")]
        except ValueError:
            values = []
        if len(values) != count or not all(map(math.isfinite, values)):
            raise ExcludedCaseError(self.path, f"has no {keyword} of {count} number(s)", _COPY_AGAIN)
        return values


@dataclass(frozen=True)
class _Stack:
    """The slices of one series in order, and the grid that they make."""

    headers: tuple[_Header, ...]
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
    """What one XML file says."""

    series_uid: str
    is_ct: bool
    """False for the reads of a chest radiograph."""
    marks: tuple[Mark, ...]


def find_series(path: Path) -> list[Series]:
    """All series below a folder, from the headers of their slices and their readers' XML.

    `n_nodules` is the largest number of nodules of at least 3 mm that any one reader marked: which marks of different
    readers mean the same nodule is known only once their contours are compared (`lungddpm.layouts.nodules`).
    """
    files = _files_below(path)
    xml_files = [file for file in files if file.suffix.lower() == ".xml"]
    slices, faults = _read_headers(_with_progress("slice headers", [f for f in files if f.suffix.lower() != ".xml"]))
    reads, unreadable = _read_annotations(_with_progress("readers' XML", xml_files), set(slices))
    found = [
        _describe(path, headers, _in_force(reads.get(uid, {})), unreadable, faults) for uid, headers in slices.items()
    ]
    # A folder with damaged files only: they name no patient, so their folder has to.
    for folder in set(faults) - {header.path.parent for headers in slices.values() for header in headers}:
        reason = _reason(faults[folder], path)
        found.append(Series("", folder.name, "", path=_relative(folder, path), excluded=reason))
    found.sort(key=lambda series: (series.patient_id, bool(series.excluded), series.series_uid, series.path))
    names = case_ids(series.patient_id for series in found)
    return [replace(series, case_id=name) for series, name in zip(found, names, strict=True)]


def load_scan(path: Path, case: pd.Series) -> Scan:
    """Read one series of the index in full.

    Args:
        path: folder of the data set.
        case: row of the index; `path`, `series_uid` and `annotations` are used.

    Returns:
        The CT in HU, at least -1024, with the contours of every reader.

    Raises:
        ExcludedCaseError: slices are missing, doubled or damaged, or the XML does not fit them.
    """
    folder = path / case["path"]
    slices, faults = _read_headers(file for file in sorted(folder.glob("*")) if file.is_file())
    if faults:
        raise faults[folder]
    if case["series_uid"] not in slices:
        raise ExcludedCaseError(folder, f"no longer holds series {case['series_uid']}", "Index the data set again.")
    stack = _stack(slices[case["series_uid"]])
    # Fortran order keeps a slice in one piece, here and in the NIfTI file.
    array = np.empty(stack.size, np.int16, order="F")
    for k, header in enumerate(stack.headers):
        array[:, :, k] = _hounsfield(header.path, stack.size[1::-1]).T
    xml_files = [path / name for name in json.loads(case["annotations"])]
    marks = _merged([_read_or_exclude(file) for file in xml_files])
    return Scan(
        ct=Volume(array, stack.affine),
        annotations=tuple(_annotation(mark, stack, xml_files[0]) for mark in marks),
        slice_thickness_mm=stack.thickness_mm,
        files=(*(header.path for header in stack.headers), *xml_files),
    )


def read_xml(path: Path) -> Reads:
    """Read one XML file of LIDC-IDRI: the nodules of at least 3 mm, each reader's own.

    One-point marks (nodules below 3 mm) and other findings are left out. Reading sessions number the readers.

    Raises:
        InputError: the file cannot be parsed, is an entity bomb, or holds coordinates that are none.
    """
    return _parse_xml(_bytes_of(path), path)


# --- slices -----------------------------------------------------------------------------------------------------------


def _files_below(top: Path) -> list[Path]:
    files, seen = [], set()
    for folder, subfolders, names in os.walk(top, followlinks=True):
        # Links to folders are common where only a part of the data set is used; a link upwards must not loop.
        if (real := os.path.realpath(folder)) in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()
        files += [Path(folder, name) for name in sorted(names)]
    return files


def _with_progress(what: str, files: list[Path]) -> Iterator[Path]:
    with Progress(what, total=len(files)) as progress:
        for step in progress.steps():
            yield files[step]


def _read_headers(files: Iterable[Path]) -> tuple[dict[str, list[_Header]], dict[Path, ExcludedCaseError]]:
    """Slices by series UID, and for each folder with damaged DICOM files the first fault."""
    slices: dict[str, list[_Header]] = defaultdict(list)
    faults: dict[Path, ExcludedCaseError] = {}
    for path in files:
        try:
            header = _read_header(path)
        except ExcludedCaseError as fault:
            faults.setdefault(path.parent, fault)
        else:
            if header is not None:
                slices[header["SeriesInstanceUID"]].append(header)
    return slices, faults


def _read_header(path: Path) -> _Header | None:
    """The header of one slice; None for a hidden file and for one that is no DICOM image.

    Raises:
        ExcludedCaseError: a DICOM file that is damaged or cut short.
    """
    if path.name.startswith(".") or path.name == "DICOMDIR":
        return None
    try:
        with path.open("rb") as file:
            start = file.read(_HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ExcludedCaseError(path, f"cannot be read ({error.strerror})", "Check the file and its rights.") from None
    if start[128:132] != b"DICM":
        if path.suffix.lower() == ".dcm":
            raise ExcludedCaseError(path, "is empty or no DICOM file", _COPY_AGAIN)
        return None
    elements, end = _explicit_elements(start) or (_elements_by_pydicom(path), 0)
    if not elements.get("SeriesInstanceUID") or end > size:
        raise ExcludedCaseError(path, "is cut short, or lacks its SeriesInstanceUID", _COPY_AGAIN)
    return _Header(path, elements)


def _explicit_elements(start: bytes) -> tuple[dict[str, str], int] | None:
    """The elements of `_TAGS` and where the pixel data end, from the first bytes of a file (DICOM PS3.5, 7.1.2).

    Only for plain explicit-VR little-endian files, as nearly all of LIDC-IDRI are; None for others. The data set has
    244,527 slices: importing pydicom and reading as many headers with it takes ten times as long.
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
    if len(start) < _HEADER_BYTES and elements.get("Modality") == "CT":
        return elements, len(start) + 1  # the whole file was seen, and no pixel data
    return None


def _elements_by_pydicom(path: Path) -> dict[str, str]:
    dataset = _dataset(path, stop_before_pixels=True, specific_tags=list(_TAGS.values()))
    values = {name: value for name in _TAGS.values() if (value := dataset.get(name)) is not None}
    return {
        name: "\\".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
        for name, value in values.items()
    }


def _dataset(path: Path, **options: object) -> pydicom.Dataset:
    import pydicom

    try:
        return pydicom.dcmread(path, **options)
    except (pydicom.errors.InvalidDicomError, *_DECODING_ERRORS) as error:
        raise ExcludedCaseError(path, f"cannot be read as DICOM ({error})", _COPY_AGAIN) from None


def _stack(headers: list[_Header]) -> _Stack:
    """Order slices along their normal and check that they fill a regular grid.

    Raises:
        ExcludedCaseError: naming the first slice that does not fit.
    """
    first = headers[0]
    folder = first.path.parent
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
    if np.abs([along_row @ along_row - 1, along_column @ along_column - 1, along_row @ along_column]).max() > 1e-3:
        raise ExcludedCaseError(first.path, "has axes that are not perpendicular unit vectors", _COPY_AGAIN)
    normal = np.cross(along_row, along_column)
    positions = np.array([header.numbers("ImagePositionPatient", 3) for header in headers])
    order = np.argsort(positions @ normal, kind="stable")
    headers, positions = [headers[i] for i in order], positions[order]
    _check_spacing(headers, positions, normal)
    step = (positions[-1] - positions[0]) / (len(headers) - 1)
    affine = np.eye(4)
    affine[:3] = np.column_stack([along_row * column_mm, along_column * row_mm, step, positions[0]])
    affine[:2] *= -1  # LPS to RAS
    thickness = headers[0]["SliceThickness"]
    return _Stack(
        tuple(headers),
        (int(columns), int(rows), len(headers)),
        affine,
        positions,
        headers[0].numbers("SliceThickness", 1)[0] if thickness else None,
    )


def _check_spacing(headers: list[_Header], positions: np.ndarray, normal: np.ndarray) -> None:
    folder = headers[0].path.parent
    steps = np.diff(positions, axis=0)
    gaps = steps @ normal
    spacing = float(np.median(gaps[gaps > POSITION_TOLERANCE * gaps.max()])) if gaps.max() > 0 else 0.0
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


def _hounsfield(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """One slice in HU, (rows, columns) int16, padding and all below -1024 set to -1024."""
    from pydicom.pixels import apply_rescale

    dataset = _dataset(path)
    try:
        stored = dataset.pixel_array
    except _DECODING_ERRORS as error:
        raise ExcludedCaseError(path, f"pixels cannot be decoded ({error})", _COPY_AGAIN) from None
    if stored.shape != shape:
        raise ExcludedCaseError(path, f"holds an image of {stored.shape} instead of {shape} pixels", _COPY_AGAIN)
    if "RescaleSlope" not in dataset or "RescaleIntercept" not in dataset:
        raise ExcludedCaseError(path, "has no rescale slope and intercept, so no Hounsfield units", _COPY_AGAIN)
    hu = np.rint(apply_rescale(stored, dataset))
    if (padding := dataset.get("PixelPaddingValue")) is not None:
        # Headers often give a negative value in its unsigned reading (63536 for -2000): wrap it like the pixels.
        hu[stored == np.asarray(padding).astype(stored.dtype)] = AIR_HU
    return np.clip(hu, AIR_HU, np.iinfo(np.int16).max).astype(np.int16)


# --- series -----------------------------------------------------------------------------------------------------------


def _describe(
    top: Path,
    headers: list[_Header],
    reads: dict[Path, Reads],
    unreadable: dict[Path, tuple[str, InputError]],
    faults: dict[Path, ExcludedCaseError],
) -> Series:
    """One row of the index, `case_id` still empty."""
    stack, excluded = None, ""
    try:
        _check_modality(headers[0])
        _check_one_place(headers, faults)
        stack = _stack(headers)
        _check_reads(headers[0], reads, unreadable)
    except InputError as fault:
        excluded = _reason(fault, top)
    marks = Counter(mark.reader for mark in _merged(reads.values()))
    return Series(
        case_id="",
        patient_id=headers[0]["PatientID"],
        series_uid=headers[0]["SeriesInstanceUID"],
        size=stack.size if stack else (0, 0, 0),
        spacing_mm=stack.spacing_mm if stack else (0.0, 0.0, 0.0),
        n_nodules=max(marks.values(), default=0),
        path=_relative(headers[0].path.parent, top),
        annotations=tuple(_relative(file, top) for file in reads),
        excluded=excluded,
    )


def _check_modality(header: _Header) -> None:
    modality = header["Modality"] or "missing"
    if modality != "CT":
        kind = "is a chest radiograph" if modality in ("CR", "DX") else "is no CT"
        raise ExcludedCaseError(header.path.parent, f"{kind} (modality {modality})", "Leave it out.")


def _check_one_place(headers: list[_Header], faults: dict[Path, ExcludedCaseError]) -> None:
    folders = sorted({header.path.parent for header in headers})
    for folder in folders:
        if folder in faults:
            raise faults[folder]
    if len(folders) > 1:
        raise ExcludedCaseError(folders[0], f"series is spread over {len(folders)} folders", "Keep one copy of it.")
    patients = {header["PatientID"] for header in headers}
    if len(patients) > 1 or "" in patients:
        raise ExcludedCaseError(folders[0], "the slices do not name one patient (PatientID)", "Mend the headers.")


def _check_reads(header: _Header, reads: dict[Path, Reads], unreadable: dict[Path, tuple[str, InputError]]) -> None:
    for file, (named_uid, fault) in unreadable.items():
        if named_uid == header["SeriesInstanceUID"] or (not reads and file.parent == header.path.parent):
            raise fault
    if not reads:
        raise ExcludedCaseError(header.path.parent, "no reader XML names this series", "Add its readers' XML.")
    for file, read in reads.items():
        if not read.is_ct:
            raise ExcludedCaseError(file, "holds reads of a chest radiograph, not of CT", "Leave it out.")


def _relative(path: Path, top: Path) -> str:
    return path.relative_to(top).as_posix()


def _reason(fault: InputError, top: Path) -> str:
    what = Path(fault.what)
    return f"{_relative(what, top) if what.is_relative_to(top) else what.name}: {fault.problem}"


# --- readers' XML -----------------------------------------------------------------------------------------------------


def _read_annotations(
    files: Iterable[Path], wanted: set[str]
) -> tuple[dict[str, dict[Path, Reads]], dict[Path, tuple[str, InputError]]]:
    """Reads by series UID and file, and the files that cannot be read with the UID that they seem to name."""
    reads: dict[str, dict[Path, Reads]] = defaultdict(dict)
    unreadable: dict[Path, tuple[str, InputError]] = {}
    without_images = 0
    for path in files:
        uid = ""
        try:
            data = _bytes_of(path)
            if named := _SERIES_UID_IN_XML.search(data):
                uid = named[1].decode()
                if uid not in wanted:
                    without_images += 1
                    continue
            read = _parse_xml(data, path)
        except InputError as fault:
            LOG.warning("%s", fault)
            unreadable[path] = uid, fault
        else:
            reads[read.series_uid][path] = read
    if without_images:
        LOG.info("%d XML files name series whose images are not here", without_images)
    return reads, unreadable


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})", "Check the file and its rights.") from None


def _in_force(reads: dict[Path, Reads]) -> dict[Path, Reads]:
    """The files that count: a published erratum replaces what it corrects (LIDC-IDRI-0101 has one)."""
    errata = {path: read for path, read in reads.items() if "erratum" in path.name.lower()}
    return errata or reads


def _read_or_exclude(path: Path) -> Reads:
    try:
        return read_xml(path)
    except InputError as fault:
        raise ExcludedCaseError(fault.what, fault.problem, fault.remedy) from None


def _parse_xml(data: bytes, path: Path) -> Reads:
    from xml.etree.ElementTree import ParseError

    import defusedxml.ElementTree
    from defusedxml.common import DefusedXmlException

    try:
        root = defusedxml.ElementTree.fromstring(data)
        for element in root.iter():
            element.tag = element.tag.rpartition("}")[2]
        marks = [
            mark
            for reader, session in enumerate(root.iter("readingSession"))
            for nodule in session.iter("unblindedReadNodule")
            if (mark := _mark(reader, nodule)) is not None
        ]
    except (ParseError, DefusedXmlException, LookupError, ValueError, TypeError) as error:
        problem = f"cannot be read as LIDC XML ({type(error).__name__}: {error})"
        raise InputError(path, problem, _COPY_AGAIN) from None
    header = root.find("ResponseHeader")
    uid = "" if header is None else header.findtext("SeriesInstanceUid") or header.findtext("SeriesInstanceUID") or ""
    return Reads(uid.strip(), root.tag == "LidcReadMessage", tuple(marks))


def _mark(reader: int, nodule: Element) -> Mark | None:
    """One `unblindedReadNodule`; None unless it is a nodule of at least 3 mm, with an outline."""
    described = nodule.find("characteristics")
    values = {} if described is None else {item.tag: int(item.text) for item in described if (item.text or "").strip()}
    outlines = [
        Outline(
            sop_uid=(roi.findtext("imageSOP_UID") or "").strip(),
            z_mm=float(roi.findtext("imageZposition") or "nan"),
            inclusion=(roi.findtext("inclusion") or "").strip().upper() != "FALSE",
            points=tuple((int(edge.findtext("xCoord")), int(edge.findtext("yCoord"))) for edge in roi.iter("edgeMap")),
        )
        for roi in nodule.iter("roi")
    ]
    if sum(len(outline.points) for outline in outlines) < 2 or not any(values.values()):
        return None
    return Mark(reader, tuple(outline for outline in outlines if outline.points), values)


def _merged(reads: Iterable[Reads]) -> list[Mark]:
    """The marks of several files of one series, without what an earlier file already holds.

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


def _annotation(mark: Mark, stack: _Stack, origin: Path) -> Annotation:
    """A mark in the index space of the stack.

    Raises:
        ExcludedCaseError: a contour lies on no slice, or outside the matrix.
    """
    slice_of = {header["SOPInstanceUID"]: k for k, header in enumerate(stack.headers)}
    z_mm = stack.positions_mm[:, 2]
    contours = []
    for outline in mark.outlines:
        k = slice_of.get(outline.sop_uid)
        if k is None:
            k = int(np.argmin(np.abs(z_mm - outline.z_mm)))
            if not abs(z_mm[k] - outline.z_mm) <= np.abs(np.diff(z_mm)).max() / 2:
                raise ExcludedCaseError(
                    origin, f"has a contour at z {outline.z_mm:g} mm, where no slice lies", "Match XML and series."
                )
        points = np.array(outline.points)
        if points.min() < 0 or (points >= stack.size[:2]).any():
            raise ExcludedCaseError(
                origin, f"has a contour outside the {stack.size[0]} x {stack.size[1]} pixels", "Match XML and series."
            )
        contours.append(Contour(k, points, outline.inclusion))
    return Annotation(mark.reader, tuple(contours), mark.characteristics)
