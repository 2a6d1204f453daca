"""Pairing of readers' XML files, SEG and RTSTRUCT objects with series, and the choice between them."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from lungddpm.core.errors import ExcludedCaseError, InputError
from lungddpm.core.files import fingerprint
from lungddpm.core.progress import Progress
from lungddpm.sources import Annotation, Region, Series
from lungddpm.sources.index import Cache, reason_of, relative_name
from lungddpm.sources.lidc.dicom import COPY_AGAIN
from lungddpm.sources.lidc.headers import Header
from lungddpm.sources.lidc.objects import LABEL_EXAMPLE, numbered_nodule, read_object
from lungddpm.sources.lidc.readings import Reads, in_scan, merged, named_series, read_xml
from lungddpm.sources.lidc.segmentations import (
    SEG,
    most_readers,
    name_readers,
    outlines,
    read_segmentation,
    readers_of,
    repeats,
    segments_in,
)
from lungddpm.sources.lidc.slices import Stack
from lungddpm.sources.lidc.structures import RTSTRUCT, read_structures, structures_in

OBJECTS = (SEG, RTSTRUCT)
"""Modalities of objects with annotations, by precedence."""

_CORRECTION = re.compile("(?i)erratum|correction|resubmitted")
_SHOWN = 3


@dataclass(frozen=True)
class _Marked:
    """The content of one XML file, as cached."""

    series_uid: str
    is_ct: bool
    marks: list[list]
    """Reader and hash of the outlines of every mark."""
    message: str
    sessions: int
    """See `Reads`."""

    def withdraws_from(self, other: _Marked) -> bool:
        """Whether this is the same message as the other, sent again without some of its nodules."""
        same_message = self.message and (self.message, self.sessions) == (other.message, other.sessions)
        return bool(same_message) and {*map(tuple, self.marks)} < {*map(tuple, other.marks)}


@dataclass(frozen=True)
class Drawn:
    """The header of one SEG or RTSTRUCT object, as cached."""

    file: str
    modality: str
    uid: str
    series_uid: str
    """Of the CT; empty if it names none."""
    annotations: list[list[str]]
    """Number of the nodule and annotation id, of each segment or ROI that has them."""
    others: list[str]
    """Labels of the other segments or ROIs."""
    problem: str
    """Why it cannot be used; empty if it can."""


@dataclass(frozen=True)
class AllReads:
    """The content of all XML files, SEG and RTSTRUCT objects."""

    of_series: dict[str, dict[str, _Marked]]
    """By series UID and XML file."""
    drawn: dict[str, list[Drawn]]
    """By series UID."""
    problems: dict[str, str]
    """By series UID, why one of its XML files cannot be read."""
    without_images: list[Series]
    """Rows for series named only in such files, and for unreadable files that belong to no series here."""


@dataclass(frozen=True)
class Readings:
    """The readings of one series."""

    files: tuple[str, ...] = ()
    n_nodules: int = 0
    problem: str = ""
    """Why it cannot be used, or that it is missing; empty if it can."""
    notes: tuple[str, ...] = ()


def drawn_in(top: Path, header: Header) -> Drawn:
    """The header of a SEG or RTSTRUCT object, from that of one of its frames."""
    file, modality = relative_name(header.path, top), header["Modality"]
    read = read_segmentation if modality == SEG else read_structures
    try:
        found = read(header.path)
    except ExcludedCaseError as error:
        return Drawn(file, modality, "", "", [], [], reason_of(error, top))
    problem = ""
    if header.problem and modality == SEG:  # of its pixels, which RTSTRUCT does not have
        problem = reason_of(ExcludedCaseError(header.path, header.problem, COPY_AGAIN), top)
    elif found.problem:
        problem = reason_of(ExcludedCaseError(header.path, *found.problem), top)
    elif label := found.lost_nodule:
        lost = f"has a nodule without a reader's annotation ('{label}')"
        remedy = f"Label it as in '{LABEL_EXAMPLE}', or take it out."
        problem = reason_of(ExcludedCaseError(header.path, lost, remedy), top)
    annotations = [list(each) for each in found.parts.values()]
    return Drawn(file, modality, found.uid, found.series_uid, annotations, list(found.others), problem)


def read_all(
    top: Path, xml_files: list[Path], folders: Mapping[str, list[str]], drawn: list[Drawn], cache: Cache
) -> AllReads:
    """Read the files that belong to the series found, and the series named in other files.

    Args:
        top: folder of the data set.
        xml_files: all XML files.
        folders: folders of the images of every series, relative to `top`.
        drawn: all SEG and RTSTRUCT objects.
        cache: of the source.
    """
    of_series: dict[str, dict[str, _Marked]] = defaultdict(dict)
    absent: dict[str, list[Path]] = defaultdict(list)
    unreadable: list[tuple[Path, str, str]] = []
    with Progress("readers' XML", total=len(xml_files)) as progress:
        for file in xml_files:
            name, uid = relative_name(file, top), ""
            try:
                uid = cache.recall(f"series of {name}", [file], partial(named_series, file))
                if not uid or uid in folders:
                    read = _Marked(**cache.recall(f"reads of {name}", [file], partial(_marked, file)))
                    uid = read.series_uid
                    if uid in folders:
                        of_series[uid][name] = read
                if uid and uid not in folders:
                    absent[uid].append(file)
            except InputError as error:
                unreadable.append((file, uid, reason_of(error, top)))
            progress.advance()

    drawn_of: dict[str, list[Drawn]] = defaultdict(list)
    for each in drawn:
        if each.series_uid in folders:
            drawn_of[each.series_uid].append(each)
        elif each.series_uid:
            absent[each.series_uid].append(top / each.file)
        else:
            nameless = ExcludedCaseError(top / each.file, "names no CT series", "Export it with its CT.")
            unreadable.append((top / each.file, "", each.problem or reason_of(nameless, top)))

    problems: dict[str, str] = {}
    without_images: list[Series] = []
    for uid, named_by in absent.items():
        lacking = InputError(
            named_by[0], "names a series whose images are missing", "Download them, or ignore this row."
        )
        names = tuple(relative_name(file, top) for file in named_by)
        without_images.append(Series("", "", uid, path=names[0], annotations=names, excluded=reason_of(lacking, top)))
    for file, uid, reason in unreadable:
        folder = relative_name(file.parent, top)
        beside = [near for near, its_folders in folders.items() if folder in its_folders]
        # A file that does not name its series belongs to the series next to it that have no other.
        owners = [uid] if uid else [near for near in beside if near not in of_series and near not in drawn_of]
        for owner in owners:
            problems.setdefault(owner, reason)
        if not owners:
            without_images.append(Series("", "", "", path=relative_name(file, top), excluded=reason))
    return AllReads(of_series, drawn_of, problems, without_images)


def readings_of(uid: str, folder: str, reads: AllReads) -> Readings:
    """The readings of a series: XML, which identifies its readers, takes precedence over SEG, and SEG over RTSTRUCT."""
    in_force = _in_force(reads.of_series.get(uid, {}))
    of_ct = {file: read for file, read in in_force.items() if read.is_ct}
    drawn = reads.drawn.get(uid, [])
    if of_ct:
        marks = {(reader, outlines) for read in of_ct.values() for reader, outlines in read.marks}
        notes = (f"{_counted(drawn)} were left out, because there is readers' XML",) if drawn else ()
        readings = Readings(tuple(of_ct), _most(reader for reader, _ in marks), notes=notes)
    elif drawn:
        readings = _from_objects(drawn)
    elif in_force:
        problem = f"{next(iter(in_force))}: has readings of a chest radiograph, not of CT. Add the XML of the CT."
        readings = Readings(problem=problem)
    else:
        problem = "no reader XML names this series, and no SEG or RTSTRUCT object"
        readings = Readings(problem=f"{folder}: {problem}. Add its readers' XML or such objects.")
    return replace(readings, problem=reads.problems.get(uid, "") or readings.problem)


def _from_objects(drawn: list[Drawn]) -> Readings:
    """The readings from the SEG or else the RTSTRUCT objects of one series, without copies and those without a
    reader."""
    marked = [each for each in drawn if each.annotations]
    preferred = next((modality for modality in OBJECTS if any(each.modality == modality for each in marked)), "")
    read = [each for each in marked if each.modality == preferred]
    if not read:
        problem = f"no segment or ROI is labelled with nodule and reader's annotation, as in '{LABEL_EXAMPLE}'"
        remedy = "Label them like this, or export labels for source.kind: images."
        return Readings(problem=f"{drawn[0].file}: {problem}. {remedy}")
    kept: dict[str, Drawn] = {}
    for each in read:
        kept.setdefault(each.uid, each)
    notes = []
    if nameless := [each for each in drawn if not each.annotations]:
        files = _shown([each.file for each in nameless])
        notes.append(f"{_counted(nameless)} without a reader's annotation were left out ({files})")
    if others_marked := [each for each in marked if each.modality != preferred]:
        notes.append(f"{_counted(others_marked)} were left out, because there is {preferred}")
    if copies := read[len(kept) :]:
        notes.append(f"{_counted(copies)} are stored more than once: one was kept")
    if others := list(dict.fromkeys(f"'{label}'" for each in kept.values() for label in each.others)):
        parts = "segments" if preferred == SEG else "ROIs"
        notes.append(f"{parts} without a reader's annotation were left out ({_shown(others)})")
    annotations = [(nodule, name) for each in kept.values() for nodule, name in each.annotations]
    lost = [each for each in nameless if numbered_nodule(each.others)]
    problem = next((each.problem for each in (*kept.values(), *lost) if each.problem), "")
    for nodule, names in repeats(annotations).items():
        if name_readers(annotations):
            problem = problem or (
                f"{read[0].file}: 'Nodule {nodule}' has several annotations ({_shown(names)}) that look like one "
                "reader's. Give each reader a prefix of their own, as in 'Nodule 1 - Annotation anna_1'."
            )
        else:
            notes.append(f"going by their ids, one reader drew 'Nodule {nodule}' more than once ({_shown(names)})")
    readers = readers_of(name for _, name in annotations)
    return Readings(
        files=tuple(each.file for each in kept.values()),
        n_nodules=_most(readers[name] for _, name in annotations),
        problem=problem,
        notes=tuple(notes),
    )


def _counted(drawn: Sequence[Drawn]) -> str:
    kinds = [modality for modality in OBJECTS if any(each.modality == modality for each in drawn)]
    return f"{len(drawn)} {' or '.join(kinds)} object(s)"


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _most(readers: Iterable[int]) -> int:
    """The largest number of nodules that any one reader marked, from the reader of each mark."""
    return max(Counter(readers).values(), default=0)


def annotations_of(xml_files: Sequence[Path], stack: Stack) -> list[Annotation]:
    """The annotations in the XML files of one series, in the index space of the stack.

    Raises:
        ExcludedCaseError: a file cannot be read, or does not match the slices.
    """
    return [in_scan(mark, stack, xml_files[0]) for mark in merged([_read_or_exclude(file) for file in xml_files])]


def annotations_in(files: Sequence[Path], stack: Stack) -> tuple[list[Annotation], int]:
    """The annotations in the SEG or RTSTRUCT objects of one series, in the index space of the stack.

    The contours follow LIDC's rule: the first voxels outside the nodule.

    Returns:
        The annotations, and how many people can have drawn them (see `most_readers`).

    Raises:
        ExcludedCaseError: an object is damaged, empty, or does not fit the slices.
    """
    drawn = [part for file in files for part in _parts_in(file)(file, stack)]
    readers = readers_of(name for name, _ in drawn)
    annotations = [Annotation(readers[name], outlines(region), region=region) for name, region in drawn]
    return annotations, most_readers(readers)


def _parts_in(file: Path) -> Callable[[Path, Stack], list[tuple[str, Region]]]:
    modality = str(read_object(file, only=["Modality"]).get("Modality", ""))
    return structures_in if modality == RTSTRUCT else segments_in


def _marked(file: Path) -> dict:
    """The content of one XML file, ready for the cache."""
    read = read_xml(file)
    marks = [
        [mark.reader, fingerprint([[o.sop_uid, o.z_mm, o.inclusion, o.points] for o in mark.outlines])[:16]]
        for mark in read.marks
    ]
    return asdict(_Marked(read.series_uid, read.is_ct, marks, read.message, read.sessions))


def _in_force(reads: dict[str, _Marked]) -> dict[str, _Marked]:
    """The files to use: a correction replaces the original.

    LIDC-IDRI-0101 has one, `161-resubmitted-correction-3-9-12.xml`. Its header equals that of the file that it
    corrects; it only lacks a nodule.
    """
    named = {file: read for file, read in reads.items() if _CORRECTION.search(Path(file).name)}
    left = named or reads
    return {file: read for file, read in left.items() if not any(other.withdraws_from(read) for other in left.values())}


def _read_or_exclude(path: Path) -> Reads:
    try:
        return read_xml(path)
    except InputError as problem:
        raise ExcludedCaseError(problem.what, problem.problem, problem.remedy) from None
