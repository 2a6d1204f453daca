"""LIDC-IDRI: chest CT as DICOM (`slices`), with the outlines of four readers as XML (`readings`), SEG
(`segmentations`) or RTSTRUCT (`structures`).

All forms of the download are read: the XML next to the slices or in a separate tree, or objects in separate
series; each file belongs to the series named in its header. Armato et al., Medical Physics 38:915-931, 2011,
doi 10.1118/1.3528204.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lungddpm.core.errors import ExcludedCaseError
from lungddpm.core.progress import LOG, Progress
from lungddpm.core.volume import Volume, per_axis
from lungddpm.sources import READERS, Scan, Series, Size
from lungddpm.sources.index import Cache, case_ids, files_below, reason_of, relative_name
from lungddpm.sources.lidc.headers import Header, read_headers
from lungddpm.sources.lidc.pairing import (
    OBJECTS,
    Drawn,
    Readings,
    annotations_in,
    annotations_of,
    drawn_in,
    read_all,
    readings_of,
)
from lungddpm.sources.lidc.pixels import can_be_decoded, hounsfield, name_of_syntax
from lungddpm.sources.lidc.readings import read_xml
from lungddpm.sources.lidc.slices import stack_of

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["CITATION", "TITLE", "find_series", "load_scan", "read_xml", "size"]

TITLE = "LIDC-IDRI, as DICOM series with the readers' XML, DICOM SEG or RTSTRUCT"
CITATION = "Lung Image Database Consortium and Image Database Resource Initiative, Medical Physics 38:915, 2011."

_DOCUMENTS = {"KO", "PR", "SR"}
"""Modalities without an image: documents about images."""
_SHOWN = 3


@dataclass(frozen=True)
class _Part:
    """Slices of one series, as cached: those in one folder, or in several if it is divided over them."""

    folder: str
    """That has them all, itself or in folders below."""
    folders: Sequence[str]
    """That have slices."""
    series_uid: str
    patients: list[str]
    modalities: list[str]
    syntaxes: list[str]
    size: Sequence[int]
    spacing_mm: Sequence[float]
    problem: str
    """Why these slices are not a scan; empty if they are."""
    notes: Sequence[str]
    """Notes on what was left out, and why."""


def size(_settings: None) -> Size:
    """The collection as published: 244,527 slices of 512 x 512 in 1,018 scans."""
    origin = "LIDC-IDRI as published; a table of 'lungddpm index' or --cases is more exact"
    return Size(1018, 512**2 * 244_527 / 1018, origin)


def find_series(path: Path, cache: Cache) -> list[Series]:
    """All series below a folder, from the headers of their slices and their readers' XML, SEG or RTSTRUCT objects.

    Series named only in these also have a row, and so does a folder in which nothing can be read. `n_nodules` is the
    largest number of nodules of at least 3 mm that any one reader marked: which marks of different readers belong to
    the same nodule is only known after comparing their contours (`lungddpm.layouts.nodules`).
    """
    files, nameless = files_below(path)
    xml_files = [file for file in files if file.suffix.lower() == ".xml"]
    parts, drawn, damaged = _read_folders(path, [file for file in files if file.suffix.lower() != ".xml"], cache)
    nameless |= damaged
    folders = {uid: [part.folder for part in of_series] for uid, of_series in parts.items()}
    reads = read_all(path, xml_files, folders, drawn, cache)
    parts = {uid: _joined(path, of_series, cache) for uid, of_series in parts.items()}
    found = [
        _describe(uid, of_series, nameless, readings_of(uid, of_series[0].folder, reads))
        for uid, of_series in parts.items()
        if {modality for part in of_series for modality in part.modalities} - _DOCUMENTS
    ]
    if documents := len(parts) - len(found):
        LOG.info("%d series are documents, not images (%s)", documents, ", ".join(sorted(_DOCUMENTS)))
    with_slices = {folder for of_series in parts.values() for part in of_series for folder in part.folders}
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
        ExcludedCaseError: slices are missing, duplicated or damaged, or the XML does not match them.
    """
    stack = stack_of(_slices_below(path / case["path"], case["series_uid"]))
    slices_hu = hounsfield(stack.headers, stack.size[1::-1])
    first = next(slices_hu)
    # Only now: a damaged header could request more memory than there is. Fortran order keeps slices contiguous, here
    # and in the NIfTI file.
    array = np.empty(stack.size, np.int16, order="F")
    array[:, :, 0] = first.T
    for k, slice_hu in enumerate(slices_hu, start=1):
        array[:, :, k] = slice_hu.T
    readings = [path / name for name in json.loads(case["annotations"])]
    if all(reading.suffix.lower() == ".xml" for reading in readings):
        annotations, readers = annotations_of(readings, stack), READERS
    else:
        annotations, readers = annotations_in(readings, stack)
    return Scan(
        ct=Volume(array, stack.affine),
        annotations=tuple(annotations),
        readers=readers,
        slice_thickness_mm=stack.thickness_mm,
        files=(*dict.fromkeys(header.path for header in stack.headers), *readings),
        notes=tuple(json.loads(case.get("notes") or "[]")),
    )


def _slices_below(folder: Path, uid: str) -> list[Header]:
    """The slices of a series in a folder and those below it.

    Raises:
        ExcludedCaseError: there are none, or a file among them does not name its series.
    """
    found: list[Header] = []
    for inside in _by_folder(files_below(folder)[0]).values():
        slices, problem = read_headers(inside)
        if uid in slices and problem is not None:
            raise problem
        found += slices.get(uid, [])
    if not found:
        raise ExcludedCaseError(folder, f"no longer has series {uid}", "Index the data set again.")
    return found


def _by_folder(files: Iterable[Path]) -> dict[Path, list[Path]]:
    in_folder: dict[Path, list[Path]] = defaultdict(list)
    for file in files:
        in_folder[file.parent].append(file)
    return in_folder


def _files_in(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.glob("*")) if file.is_file()]


def _read_folders(
    top: Path, files: list[Path], cache: Cache
) -> tuple[dict[str, list[_Part]], list[Drawn], dict[str, str]]:
    """The parts of every series except SEG and RTSTRUCT by folder, all such objects, and for each folder with files of
    unknown series the reason for the first.
    """
    parts: dict[str, list[_Part]] = defaultdict(list)
    drawn: list[Drawn] = []
    nameless: dict[str, str] = {}
    with Progress("slice headers", total=len(files)) as progress:
        for folder, inside in _by_folder(files).items():
            done = progress.done
            found = cache.recall(
                f"slices {relative_name(folder, top)}",
                inside,
                partial(_read_folder, top, inside, progress.advance),
                keep=lambda found: not found["nameless"],
            )
            progress.advance(done + len(inside) - progress.done)
            for part in found["parts"]:
                parts[part["series_uid"]].append(_Part(**part))
            drawn += [Drawn(**each) for each in found["drawn"]]
            if found["nameless"]:
                nameless[relative_name(folder, top)] = found["nameless"]
    return parts, drawn, nameless


def _read_folder(top: Path, files: list[Path], advance: Callable[[], None]) -> dict:
    """The contents of the files of one folder, ready for the cache."""

    def each() -> Iterable[Path]:
        for file in files:
            yield file
            advance()

    slices, problem = read_headers(each())
    drawn = {header.path: header for headers in slices.values() for header in headers if header["Modality"] in OBJECTS}
    parts = [headers for headers in slices.values() if headers[0].path not in drawn]
    return {
        "parts": [asdict(_part(top, headers)) for headers in parts],
        "drawn": [asdict(drawn_in(top, header)) for header in drawn.values()],
        "nameless": reason_of(problem, top) if problem else "",
    }


def _part(top: Path, headers: list[Header]) -> _Part:
    size: tuple[int, int, int] = (0, 0, 0)
    spacing_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)
    notes: tuple[str, ...] = ()
    problem = ""
    try:
        stack = stack_of(headers)
        size, spacing_mm, notes = stack.size, stack.spacing_mm, stack.notes
    except ExcludedCaseError as error:
        problem = reason_of(error, top)
    folders = sorted({header.path.parent for header in headers})
    return _Part(
        folder=relative_name(Path(os.path.commonpath(folders)), top),
        folders=[relative_name(folder, top) for folder in folders],
        series_uid=headers[0]["SeriesInstanceUID"],
        patients=sorted({header["PatientID"] for header in headers}),
        modalities=sorted({header["Modality"] for header in headers}),
        syntaxes=sorted({header["TransferSyntaxUID"] for header in headers}),
        size=size,
        spacing_mm=spacing_mm,
        problem=problem,
        notes=notes,
    )


def _joined(top: Path, parts: list[_Part], cache: Cache) -> list[_Part]:
    """The folders of one series as one part; those of several patients as they are."""
    if len(parts) == 1 or len({patient for part in parts for patient in part.patients}) > 1:
        return parts
    folders = [part.folder for part in parts]
    files = [file for folder in folders for file in _files_in(top / folder)]
    key = f"series {parts[0].series_uid} in {json.dumps(folders)}"
    return [_Part(**cache.recall(key, files, lambda: asdict(_join(top, parts))))]


def _join(top: Path, parts: list[_Part]) -> _Part:
    """The first folder that is complete, if the others are copies of its slices; else the slices of all together."""
    folders = [part.folder for part in parts]
    of_part = [read_headers(_files_in(top / part.folder))[0].get(part.series_uid, []) for part in parts]
    if (number := _complete_copy(parts, of_part)) is not None:
        others = ", ".join(folder for folder in folders if folder != folders[number])
        note = f"copies of these slices elsewhere were left out ({others})"
        return replace(parts[number], notes=[*parts[number].notes, note])
    whole = _part(top, [header for headers in of_part for header in headers])
    where = f"{len(folders)} folders ({', '.join(folders[:_SHOWN])}{', ...' if len(folders) > _SHOWN else ''})"
    if whole.problem:
        return replace(whole, problem=f"{whole.folder}: series is spread over {where}. {whole.problem}")
    return replace(whole, notes=[f"its slices are in {where}", *whole.notes])


def _complete_copy(parts: list[_Part], of_part: list[list[Header]]) -> int | None:
    """The number of the first part with all slices of the others, with equal content."""
    for number, part in enumerate(parts):
        if part.problem:
            continue
        try:
            size = stack_of(of_part[number]).size
            others = [headers for other, headers in enumerate(of_part) if other != number]
            if all(stack_of(of_part[number] + headers).size == size for headers in others):
                return number
        except ExcludedCaseError:
            continue
    return None


def _describe(uid: str, parts: list[_Part], nameless: dict[str, str], readings: Readings) -> Series:
    """One row of the index, `case_id` still empty.

    Args:
        uid: SeriesInstanceUID.
        parts: of the series; several only if these have different patients.
        nameless: the reason for each folder with damaged files.
        readings: of this series.
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
        excluded=_problem_of_slices(parts, nameless) or readings.problem,
        notes=(*first.notes, *readings.notes),
    )


def _problem_of_slices(parts: list[_Part], nameless: dict[str, str]) -> str:
    folders = [folder for part in parts for folder in part.folders]
    modalities = sorted({modality or "missing" for part in parts for modality in part.modalities})
    if modalities != ["CT"]:
        kind = "is a chest radiograph" if set(modalities) <= {"CR", "DX"} else "is not CT"
        return f"{folders[0]}: {kind} (modality {', '.join(modalities)}). Leave it out."
    if damaged := next((nameless[folder] for folder in folders if folder in nameless), ""):
        return damaged
    if len({patient for part in parts for patient in part.patients}) > 1 or not parts[0].patients[0]:
        return f"{folders[0]}: the slices do not have one PatientID. Fix the headers."
    if undecodable := next((syntax for syntax in parts[0].syntaxes if not can_be_decoded(syntax)), ""):
        return (
            f"{folders[0]}: is in a transfer syntax that cannot be decoded, {name_of_syntax(undecodable)}. "
            "Convert it, e.g. to JPEG 2000."
        )
    return parts[0].problem
