"""LIDC-IDRI: chest CT as DICOM (`slices`), and what four readers drew, as XML (`readings`) or SEG (`segmentations`).

All layouts of the download are read: the XML beside the slices, or in a tree of its own, or SEG objects in series of
their own; each file belongs to the series that its header names. Armato et al., Medical Physics 38:915-931, 2011,
doi 10.1118/1.3528204.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lungddpm.core.errors import ExcludedCaseError, InputError
from lungddpm.core.files import fingerprint
from lungddpm.core.progress import LOG, Progress
from lungddpm.core.volume import Volume, per_axis
from lungddpm.sources import Scan, Series, Size
from lungddpm.sources.index import Cache, case_ids, reason_of
from lungddpm.sources.lidc.dicom import COPY_AGAIN
from lungddpm.sources.lidc.headers import Header, read_headers
from lungddpm.sources.lidc.pixels import can_be_decoded, hounsfield, name_of_syntax
from lungddpm.sources.lidc.readings import Reads, in_scan, merged, named_series, read_xml
from lungddpm.sources.lidc.segmentations import (
    LABEL_EXAMPLE,
    annotations_in,
    read_segmentation,
    readers_of,
)
from lungddpm.sources.lidc.segmentations import MODALITY as SEGMENTATION
from lungddpm.sources.lidc.slices import stack_of

if TYPE_CHECKING:
    import pandas as pd

TITLE = "LIDC-IDRI, as DICOM series with the readers' XML or DICOM SEG"
CITATION = "Lung Image Database Consortium and Image Database Resource Initiative, Medical Physics 38:915, 2011."

_CORRECTION = re.compile("(?i)erratum|correction|resubmitted")
_DOCUMENTS = {"KO", "PR", "SR"}
"""Modalities without an image: notes about images."""
_SHOWN_FILES = 3


@dataclass(frozen=True)
class _Part:
    """What one folder holds of one series, as the cache keeps it."""

    folder: str
    series_uid: str
    patients: list[str]
    modalities: list[str]
    syntaxes: list[str]
    size: Sequence[int]
    spacing_mm: Sequence[float]
    fault: str
    """Why these slices are no scan; empty if they are."""
    notes: Sequence[str]
    """What was left out of them, and why."""


@dataclass(frozen=True)
class _Marked:
    """What one XML file says, as the cache keeps it."""

    series_uid: str
    is_ct: bool
    marks: list[list]
    """Reader and a hash of the outlines of every mark."""
    message: str
    sessions: int
    """See `Reads`."""

    def withdraws_from(self, other: _Marked) -> bool:
        """Whether this is the same message as the other, sent again without some of its nodules."""
        same_message = self.message and (self.message, self.sessions) == (other.message, other.sessions)
        return bool(same_message) and {*map(tuple, self.marks)} < {*map(tuple, other.marks)}


@dataclass(frozen=True)
class _Drawn:
    """What the header of one SEG object says, as the cache keeps it."""

    file: str
    uid: str
    series_uid: str
    """Of the CT; empty if it names none."""
    annotation_ids: list[str]
    fault: str
    """Why it cannot be used; empty if it can."""


@dataclass(frozen=True)
class _AllReads:
    """What all XML files and SEG objects say."""

    of_series: dict[str, dict[str, _Marked]]
    """By series UID and XML file."""
    drawn: dict[str, list[_Drawn]]
    """By series UID."""
    faults: dict[str, str]
    """By series UID, why one of its XML files cannot be read."""
    without_images: list[Series]
    """Rows for what only such files name, and for those that cannot be read and belong to no series here."""


def size(_settings: None) -> Size:
    """The collection as published: 244,527 slices of 512 x 512 in 1,018 scans."""
    origin = "LIDC-IDRI as published; a table of 'lungddpm index' or --cases is more exact"
    return Size(1018, 512**2 * 244_527 / 1018, origin)


def find_series(path: Path, cache: Cache) -> list[Series]:
    """All series below a folder, from the headers of their slices and their readers' XML or SEG objects.

    What only these name has a row as well, and so has a folder of which nothing can be read. `n_nodules` is the
    largest number of nodules of at least 3 mm that any one reader marked: which marks of different readers mean the
    same nodule is known only once their contours are compared (`lungddpm.layouts.nodules`).
    """
    files, nameless = _files_below(path)
    xml_files = [file for file in files if file.suffix.lower() == ".xml"]
    parts, drawn, damaged = _read_folders(path, [file for file in files if file.suffix.lower() != ".xml"], cache)
    nameless |= damaged
    reads = _read_annotations(path, xml_files, parts, drawn, cache)
    parts = {uid: _keep_one_copy(path, of_series, cache) for uid, of_series in parts.items()}
    found = [
        _describe(uid, of_series, nameless, _readings_of(uid, of_series[0].folder, reads))
        for uid, of_series in parts.items()
        if {modality for part in of_series for modality in part.modalities} - _DOCUMENTS
    ]
    if documents := len(parts) - len(found):
        LOG.info("%d series hold documents, not images (%s)", documents, ", ".join(sorted(_DOCUMENTS)))
    with_slices = {part.folder for of_series in parts.values() for part in of_series}
    found += [Series("", "", "", path=name, excluded=nameless[name]) for name in nameless if name not in with_slices]
    found += reads.without_images
    found.sort(key=lambda series: (not series.patient_id, series.patient_id, bool(series.excluded), series.series_uid))
    names = case_ids(series.patient_id or series.series_uid or series.path for series in found)
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
    slices, fault = read_headers(_files_in(folder))
    if fault is not None:
        raise fault
    if case["series_uid"] not in slices:
        raise ExcludedCaseError(folder, f"no longer holds series {case['series_uid']}", "Index the data set again.")
    stack = stack_of(slices[case["series_uid"]])
    slices_hu = hounsfield(stack.headers, stack.size[1::-1])
    first = next(slices_hu)
    # Only now: a damaged header could ask for more memory than there is. Fortran order keeps a slice in one piece, here
    # and in the NIfTI file.
    array = np.empty(stack.size, np.int16, order="F")
    array[:, :, 0] = first.T
    for k, slice_hu in enumerate(slices_hu, start=1):
        array[:, :, k] = slice_hu.T
    readings = [path / name for name in json.loads(case["annotations"])]
    if readings[0].suffix.lower() == ".xml":
        marks = merged([_read_or_exclude(file) for file in readings])
        annotations = [in_scan(mark, stack, readings[0]) for mark in marks]
    else:
        annotations = annotations_in(readings, stack)
    return Scan(
        ct=Volume(array, stack.affine),
        annotations=tuple(annotations),
        slice_thickness_mm=stack.thickness_mm,
        files=(*dict.fromkeys(header.path for header in stack.headers), *readings),
        notes=tuple(json.loads(case.get("notes") or "[]")),
    )


def _files_in(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.glob("*")) if file.is_file()]


def _files_below(top: Path) -> tuple[list[Path], dict[str, str]]:
    """All files that are not hidden, and the reason for each folder that cannot be listed."""
    files, seen, faults = [], set(), {}

    def note(error: OSError) -> None:
        folder = Path(error.filename)
        fault = InputError(folder, f"cannot be listed ({error.strerror})", "Check the folder and its rights.")
        faults[folder.relative_to(top).as_posix()] = reason_of(fault, top)

    for folder, subfolders, names in os.walk(top, onerror=note, followlinks=True):
        # Links to folders are common where only a part of the data set is used; a link upwards must not loop.
        if (real := os.path.realpath(folder)) in seen:
            subfolders.clear()
            continue
        seen.add(real)
        # Hidden folders hold snapshots, hidden files what macOS adds: copies of what is read elsewhere, or no data.
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        files += [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
    return files, faults


def _read_folders(
    top: Path, files: list[Path], cache: Cache
) -> tuple[dict[str, list[_Part]], list[_Drawn], dict[str, str]]:
    """What folders hold of every series but SEG, all SEG objects, and for each folder with files whose series is
    unknown the reason of the first.
    """
    in_folder: dict[Path, list[Path]] = defaultdict(list)
    for file in files:
        in_folder[file.parent].append(file)
    parts: dict[str, list[_Part]] = defaultdict(list)
    drawn: list[_Drawn] = []
    nameless: dict[str, str] = {}
    with Progress("slice headers", total=len(files)) as progress:
        for folder, inside in in_folder.items():
            done = progress.done
            found = cache.recall(
                f"slices {_relative(folder, top)}",
                inside,
                partial(_read_folder, top, inside, progress.advance),
                keep=lambda found: not found["nameless"],
            )
            progress.advance(done + len(inside) - progress.done)
            for part in found["parts"]:
                parts[part["series_uid"]].append(_Part(**part))
            drawn += [_Drawn(**each) for each in found["drawn"]]
            if found["nameless"]:
                nameless[_relative(folder, top)] = found["nameless"]
    return parts, drawn, nameless


def _read_folder(top: Path, files: list[Path], advance: Callable[[], None]) -> dict:
    """What the files of one folder hold, ready for the cache."""

    def each() -> Iterable[Path]:
        for file in files:
            yield file
            advance()

    slices, fault = read_headers(each())
    drawn = {
        header.path: header for headers in slices.values() for header in headers if header["Modality"] == SEGMENTATION
    }
    parts = [headers for headers in slices.values() if headers[0].path not in drawn]
    return {
        "parts": [asdict(_part(top, headers)) for headers in parts],
        "drawn": [asdict(_drawn(top, header)) for header in drawn.values()],
        "nameless": reason_of(fault, top) if fault else "",
    }


def _drawn(top: Path, header: Header) -> _Drawn:
    """What the header of a SEG object says, of which one frame's is given."""
    file = _relative(header.path, top)
    try:
        found = read_segmentation(header.path)
    except ExcludedCaseError as error:
        return _Drawn(file, "", "", [], reason_of(error, top))
    fault = ""
    if header.fault:
        fault = reason_of(ExcludedCaseError(header.path, header.fault, COPY_AGAIN), top)
    elif not found.is_binary:
        remedy = "Export it as a binary segmentation."
        fault = reason_of(ExcludedCaseError(header.path, "holds fractions or labels, not bits", remedy), top)
    return _Drawn(file, found.uid, found.series_uid, list(found.segments.values()), fault)


def _part(top: Path, headers: list[Header]) -> _Part:
    size: tuple[int, int, int] = (0, 0, 0)
    spacing_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)
    notes: tuple[str, ...] = ()
    fault = ""
    try:
        stack = stack_of(headers)
        size, spacing_mm, notes = stack.size, stack.spacing_mm, stack.notes
    except ExcludedCaseError as error:
        fault = reason_of(error, top)
    return _Part(
        folder=_relative(headers[0].path.parent, top),
        series_uid=headers[0]["SeriesInstanceUID"],
        patients=sorted({header["PatientID"] for header in headers}),
        modalities=sorted({header["Modality"] for header in headers}),
        syntaxes=sorted({header["TransferSyntaxUID"] for header in headers}),
        size=size,
        spacing_mm=spacing_mm,
        fault=fault,
        notes=notes,
    )


def _keep_one_copy(top: Path, parts: list[_Part], cache: Cache) -> list[_Part]:
    """The parts of one series; of a series whose folders are copies of each other, the first complete one."""
    if len(parts) == 1 or len({patient for part in parts for patient in part.patients}) > 1:
        return parts
    folders = [part.folder for part in parts]
    files = [file for folder in folders for file in _files_in(top / folder)]
    number = cache.recall(f"copies in {json.dumps(folders)}", files, lambda: _complete_copy(top, parts))
    if number is None:
        return parts
    note = f"copies of these slices elsewhere were left out ({', '.join(f for f in folders if f != folders[number])})"
    return [replace(parts[number], notes=[*parts[number].notes, note])]


def _complete_copy(top: Path, parts: list[_Part]) -> int | None:
    """The number of the first part that holds all slices of the others, with equal content."""
    of_part = [read_headers(_files_in(top / part.folder))[0].get(part.series_uid, []) for part in parts]
    for number, part in enumerate(parts):
        if part.fault:
            continue
        try:
            size = stack_of(of_part[number]).size
            others = [headers for other, headers in enumerate(of_part) if other != number]
            if all(stack_of(of_part[number] + headers).size == size for headers in others):
                return number
        except ExcludedCaseError:
            continue
    return None


@dataclass(frozen=True)
class _Readings:
    """What the readers of one series say."""

    files: tuple[str, ...] = ()
    n_nodules: int = 0
    fault: str = ""
    """Why it cannot be used, or that there is none; empty if it can."""
    notes: tuple[str, ...] = ()


def _readings_of(uid: str, folder: str, reads: _AllReads) -> _Readings:
    """The readings of a series that count: XML, which knows its readers, before SEG."""
    in_force = _in_force(reads.of_series.get(uid, {}))
    of_ct = {file: read for file, read in in_force.items() if read.is_ct}
    drawn = reads.drawn.get(uid, [])
    if of_ct:
        marks = {(reader, outlines) for read in of_ct.values() for reader, outlines in read.marks}
        notes = (f"{len(drawn)} SEG object(s) were left out: the readers' XML is here",) if drawn else ()
        readings = _Readings(tuple(of_ct), _most(reader for reader, _ in marks), notes=notes)
    elif drawn:
        readings = _from_segmentations(drawn)
    elif in_force:
        fault = f"{next(iter(in_force))}: holds reads of a chest radiograph, not of CT. Add the XML of the CT."
        readings = _Readings(fault=fault)
    else:
        problem = "no reader XML names this series, and no SEG object"
        readings = _Readings(fault=f"{folder}: {problem}. Add its readers' XML or SEG objects.")
    return replace(readings, fault=reads.faults.get(uid, "") or readings.fault)


def _from_segmentations(drawn: list[_Drawn]) -> _Readings:
    """What the SEG objects of one series say; those without a reader, and copies, are left out."""
    read = [each for each in drawn if each.annotation_ids]
    if not read:
        problem = f"no segment is called by nodule and reader's annotation, as in '{LABEL_EXAMPLE}'"
        remedy = "Label the segments so, or export labels for source.kind: images."
        return _Readings(fault=f"{drawn[0].file}: {problem}. {remedy}")
    kept: dict[str, _Drawn] = {}
    for each in read:
        kept.setdefault(each.uid, each)
    notes = []
    if nameless := [each.file for each in drawn if not each.annotation_ids]:
        shown = ", ".join(nameless[:_SHOWN_FILES]) + (", ..." if len(nameless) > _SHOWN_FILES else "")
        notes.append(f"{len(nameless)} SEG object(s) that name no reader's annotation were left out ({shown})")
    if len(kept) < len(read):
        notes.append(f"{len(read) - len(kept)} SEG object(s) are stored more than once: one was kept")
    annotation_ids = [name for each in kept.values() for name in each.annotation_ids]
    readers = readers_of(annotation_ids)
    return _Readings(
        files=tuple(each.file for each in kept.values()),
        n_nodules=_most(readers[name] for name in annotation_ids),
        fault=next((each.fault for each in kept.values() if each.fault), ""),
        notes=tuple(notes),
    )


def _most(readers: Iterable[int]) -> int:
    """The largest number of nodules that any one reader marked, from the reader of each mark."""
    return max(Counter(readers).values(), default=0)


def _describe(uid: str, parts: list[_Part], nameless: dict[str, str], readings: _Readings) -> Series:
    """One row of the index, `case_id` still empty.

    Args:
        uid: SeriesInstanceUID.
        parts: what the folders hold of it.
        nameless: for folders with damaged files, the reason.
        readings: what the readers of this series say.
    """
    first = parts[0]
    return Series(
        case_id="",
        patient_id=first.patients[0],
        series_uid=uid,
        size=per_axis(first.size),
        spacing_mm=per_axis(first.spacing_mm),
        n_nodules=readings.n_nodules,
        path=first.folder,
        annotations=readings.files,
        excluded=_fault_of_slices(parts, nameless) or readings.fault,
        notes=(*first.notes, *readings.notes),
    )


def _fault_of_slices(parts: list[_Part], nameless: dict[str, str]) -> str:
    folders = [part.folder for part in parts]
    modalities = sorted({modality or "missing" for part in parts for modality in part.modalities})
    if "RTSTRUCT" in modalities:
        remedy = "Convert it to DICOM SEG or to labels for source.kind: images, e.g. with 3D Slicer."
        return f"{folders[0]}: holds contours as RTSTRUCT, which is not read. {remedy}"
    if modalities != ["CT"]:
        kind = "is a chest radiograph" if set(modalities) <= {"CR", "DX"} else "is no CT"
        return f"{folders[0]}: {kind} (modality {', '.join(modalities)}). Leave it out."
    if damaged := next((nameless[folder] for folder in folders if folder in nameless), ""):
        return damaged
    if len(parts) > 1:
        return f"{folders[0]}: series is spread over {len(folders)} folders. Keep one copy of it."
    if len(parts[0].patients) > 1 or not parts[0].patients[0]:
        return f"{folders[0]}: the slices do not name one patient (PatientID). Fix the headers."
    if undecodable := next((syntax for syntax in parts[0].syntaxes if not can_be_decoded(syntax)), ""):
        return (
            f"{folders[0]}: is in a transfer syntax that cannot be decoded, {name_of_syntax(undecodable)}. "
            "Convert it, e.g. to JPEG 2000."
        )
    return parts[0].fault


def _relative(path: Path, top: Path) -> str:
    return path.relative_to(top).as_posix()


def _read_annotations(
    top: Path, files: list[Path], parts: dict[str, list[_Part]], drawn: list[_Drawn], cache: Cache
) -> _AllReads:
    """Read what belongs to the series found; of other files, what they name."""
    of_series: dict[str, dict[str, _Marked]] = defaultdict(dict)
    absent: dict[str, list[Path]] = defaultdict(list)
    unreadable: list[tuple[Path, str, str]] = []
    with Progress("readers' XML", total=len(files)) as progress:
        for file in files:
            name, uid = _relative(file, top), ""
            try:
                uid = cache.recall(f"series of {name}", [file], partial(named_series, file))
                if not uid or uid in parts:
                    read = _Marked(**cache.recall(f"reads of {name}", [file], partial(_marked, file)))
                    uid = read.series_uid
                    if uid in parts:
                        of_series[uid][name] = read
                if uid and uid not in parts:
                    absent[uid].append(file)
            except InputError as error:
                unreadable.append((file, uid, reason_of(error, top)))
            progress.advance()

    drawn_of: dict[str, list[_Drawn]] = defaultdict(list)
    for each in drawn:
        if each.series_uid in parts:
            drawn_of[each.series_uid].append(each)
        elif each.series_uid:
            absent[each.series_uid].append(top / each.file)
        else:
            lacking = ExcludedCaseError(top / each.file, "names no CT series", "Export it with its CT.")
            unreadable.append((top / each.file, "", each.fault or reason_of(lacking, top)))

    faults: dict[str, str] = {}
    without_images = []
    for uid, named_by in absent.items():
        lacking = InputError(
            named_by[0], "names a series whose images are not here", "Download them, or ignore this row."
        )
        names = tuple(_relative(file, top) for file in named_by)
        without_images.append(Series("", "", uid, path=names[0], annotations=names, excluded=reason_of(lacking, top)))
    for file, uid, reason in unreadable:
        folder = _relative(file.parent, top)
        beside = [near for near, its_parts in parts.items() if folder in [part.folder for part in its_parts]]
        # One that does not even name its series belongs to those beside it that have no other.
        owners = [uid] if uid else [near for near in beside if near not in of_series and near not in drawn_of]
        for owner in owners:
            faults.setdefault(owner, reason)
        if not owners:
            without_images.append(Series("", "", "", path=_relative(file, top), excluded=reason))
    return _AllReads(of_series, drawn_of, faults, without_images)


def _marked(file: Path) -> dict:
    """What one XML file says, ready for the cache."""
    read = read_xml(file)
    marks = [
        [mark.reader, fingerprint([[o.sop_uid, o.z_mm, o.inclusion, o.points] for o in mark.outlines])[:16]]
        for mark in read.marks
    ]
    return asdict(_Marked(read.series_uid, read.is_ct, marks, read.message, read.sessions))


def _in_force(reads: dict[str, _Marked]) -> dict[str, _Marked]:
    """The files that count: a correction replaces what it corrects.

    LIDC-IDRI-0101 has one, `161-resubmitted-correction-3-9-12.xml`. Its header is that of the file that it corrects;
    what differs is that a nodule is gone.
    """
    named = {file: read for file, read in reads.items() if _CORRECTION.search(Path(file).name)}
    left = named or reads
    return {file: read for file, read in left.items() if not any(other.withdraws_from(read) for other in left.values())}


def _read_or_exclude(path: Path) -> Reads:
    try:
        return read_xml(path)
    except InputError as fault:
        raise ExcludedCaseError(fault.what, fault.problem, fault.remedy) from None
