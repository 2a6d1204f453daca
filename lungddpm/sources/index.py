"""From a source's folder to the index: one row per series, and what its headers said, cached."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lungddpm.config.sections import Section
from lungddpm.core import cases
from lungddpm.core.code import stage_fingerprint
from lungddpm.core.errors import InputError, printable
from lungddpm.core.files import atomic_path, fingerprint, read_json, write_text
from lungddpm.core.progress import LOG
from lungddpm.core.roles import INTERNAL
from lungddpm.sources import Series, source_of

if TYPE_CHECKING:
    import pandas as pd

INDEX_COLUMNS = [*cases.COLUMNS, "annotations", "notes"]
"""The index is a case table before any voxel is read: `path` and `annotations` (a JSON list) are relative to the
source's folder, sizes and spacings are the scan's own, `n_nodules` counts what readers marked, if that is known.
`notes` (a JSON list) holds what a user should know about a series that can be used."""
LONGEST_NAME = 64
"""Characters of a case id before what distinguishes it from an equal one; no DICOM identifier may have more."""


class Cache:
    """What was read from files, for as long as their names, sizes and times stay what they were.

    In its file: JSON of the code that has read, and for every key the state of its files and what they said. A cache
    that other code has written, or that cannot be read, counts as empty.

    Args:
        path: file of the cache; None keeps nothing beyond this run.
        kind: source that it belongs to.
    """

    def __init__(self, path: Path | None, kind: str):
        self._path = path
        self._made_by = fingerprint([kind, stage_fingerprint("find_series", kind)])
        self._before = self._load()
        self._entries: dict[str, list] = {}

    def recall(
        self, key: str, files: Iterable[Path], read: Callable[[], Any], keep: Callable[[Any], bool] = lambda value: True
    ) -> Any:
        """What `read()` gave when these files were last read, or gives now if one of them has changed since.

        Args:
            key: names the entry; one that no call names any more is forgotten.
            files: all that `read` looks at.
            read: gives a JSON value without tuples; what it raises is passed on, and not kept.
            keep: whether a value is kept; those with errors are better read again.
        """
        # Before reading: a file that changes meanwhile has another state the next time.
        state = _state(files)
        known = self._before.get(key)
        if known is not None and known[0] == state:
            self._entries[key] = known
            return known[1]
        value = read()
        if keep(value):
            self._entries[key] = [state, value]
        return value

    def save(self) -> None:
        """Write the entries of this run."""
        if self._path is not None and self._entries != self._before:
            write_text(self._path, json.dumps({"made_by": self._made_by, "entries": self._entries}))

    def _load(self) -> dict[str, list]:
        try:
            content = read_json(self._path) if self._path is not None else {}
            return content["entries"] if content["made_by"] == self._made_by else {}
        except (InputError, KeyError):
            return {}


def case_ids(names: Iterable[str], others: Iterable[str] = ()) -> list[str]:
    """Distinct names that are safe for folders, in the order given; the second of equal names gets `_2`, and so on.

    Args:
        names: of cases, whatever they consist of.
        others: case ids that are given already.
    """
    given: list[str] = []
    taken: dict[str, int] = {name.casefold(): 1 for name in others}
    for name in names:
        safe = re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip(".")[:LONGEST_NAME] or "unnamed"
        # Tables and the cache lie in the folder of the cases.
        candidate = safe = re.sub(r"(?i)\.(tsv|json)$", r"_\1", safe)
        # Case-insensitive file systems would put "a" and "A" into one folder.
        while candidate.casefold() in taken:
            taken[safe.casefold()] += 1
            candidate = f"{safe}_{taken[safe.casefold()]}"
        taken[candidate.casefold()] = 1
        given.append(candidate)
    return given


def reason_of(error: InputError, top: Path) -> str:
    """An error as tables show it: in one line, files relative to the data set."""
    message = str(error)
    for root in (top, top.resolve()):
        message = message.replace(printable(f"{root}/"), "")
    return " ".join(message.split())


def files_below(top: Path) -> tuple[list[Path], dict[str, str]]:
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


def relative_name(path: Path, top: Path) -> str:
    """A path as tables and caches have it."""
    return path.relative_to(top).as_posix()


def check_folder(path: Path, key: str = "source") -> None:
    """Make sure that the data set's folder is there.

    Args:
        path: of the folder.
        key: of the data set in the config, for messages.

    Raises:
        InputError: it is not; the message has the whole path, as a relative one starts in the working directory.
    """
    if not path.is_dir():
        remedy = f"Set {key}.path to the folder of the data set; a relative path starts in the working directory."
        raise InputError(path.absolute(), "is not a folder", remedy)


def index_source(
    kind: str, path: Path, cache: Path | None = None, reading: tuple[Section, ...] = (), key: str = "source"
) -> list[dict]:
    """One row per series, in order of case id, those without a patient last; `role` is still empty.

    Args:
        kind: module of the source.
        path: folder of the data set.
        cache: file that remembers what the headers said, so that only what has changed is read the next time.
        reading: settings by which the source reads, `config.source.reading()`.
        key: of the data set in the config, for messages.

    Raises:
        InputError: the folder is missing, or holds no series at all.
    """
    check_folder(path, key)
    remembered = Cache(cache, kind)
    found = source_of(kind).find_series(path, remembered, *reading)
    remembered.save()
    if not found:
        problem = f"holds no CT series that the source '{kind}' can read"
        raise InputError(path.absolute(), problem, f"Check {key}.path and {key}.kind.")
    rows = [_row(kind, series) for series in sorted(found, key=lambda series: (not series.patient_id, series.case_id))]
    which = "" if key == "source" else f"{key}: "
    LOG.info("%s%d of %d series can be used", which, sum(row["status"] == "ok" for row in rows), len(rows))
    cases.log_excluded(rows)
    return rows


def join_data_sets(
    internal: list[dict], externals: Mapping[str, list[dict]], distinct: Collection[str] = ()
) -> list[dict]:
    """One index of several data sets: those of `source` first, as they are, then those of each external test set.

    The case ids of an external test set begin with its name.

    Args:
        internal: rows of `index_source`.
        externals: the same of each external test set, by its name.
        distinct: external test sets whose patients are other people, even where an id is the same; their patient ids
            get the name of the data set in front.

    Raises:
        InputError: two data sets share a patient, or a series.
    """
    joined = list(internal)
    for name, rows in externals.items():
        named = [f"{name}-{row['case_id']}" for row in rows]
        ids = case_ids(named, [row["case_id"] for row in joined])
        own = [{**row, "case_id": case_id, "data_set": name} for row, case_id in zip(rows, ids, strict=True)]
        if name in distinct:
            own = [row | {"patient_id": row["patient_id"] and f"{name}:{row['patient_id']}"} for row in own]
        _check_apart(name, own, joined)
        joined += own
    return joined


def _check_apart(name: str, rows: list[dict], others: list[dict]) -> None:
    """Make sure that an external test set has no patient and no series of another data set."""
    remedies = {
        "patient_id": f"If they are other people, set external_tests.{name}.distinct_patients: true; if they are the "
        "same, take their scans out of one of the two.",
        "series_uid": "It is the same scan: take it out of one of the two.",
    }
    for column, remedy in remedies.items():
        owner = {row[column]: row["data_set"] for row in others if row[column]}
        if shared := sorted({row[column] for row in rows} & owner.keys()):
            what = {"patient_id": "patient", "series_uid": "series"}[column]
            more = f" and {len(shared) - 3} more" if len(shared) > 3 else ""
            problem = f"has the {what} {', '.join(shared[:3])}{more}, as the data set '{owner[shared[0]]}' has"
            raise InputError(f"external_tests.{name}", problem, remedy)


def read_index(path: Path) -> pd.DataFrame:
    """Read an index written by `write_index`."""
    index = cases.read_cases(path)
    index["path"] = index["path"].map(_with_its_bytes)
    return index


def write_index(path: Path, index: list[dict]) -> None:
    """Write the index as a tab-separated table, atomically. Without pandas, which takes longer than ten headers."""
    with (
        atomic_path(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.DictWriter(file, INDEX_COLUMNS, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(index)


def _with_its_bytes(path: str) -> str:
    """A path of a table as the file system knows it: `printable` undone."""
    return re.sub(r"\\u(dc[89a-f][0-9a-f])", lambda escape: chr(int(escape[1], 16)), path)


def _state(files: Iterable[Path]) -> str:
    """A hash that changes with every file that comes, goes or is written; one that cannot be read has a state too."""
    states: list[list[str | int]] = []
    for file in files:
        try:
            status = file.stat()
        except OSError:
            states.append([file.name])
        else:
            # The change time tells files apart that were replaced by others of the same size and date.
            states.append([file.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns])
    return fingerprint(states)


def _row(kind: str, series: Series) -> dict:
    sizes = dict(zip(("size_x", "size_y", "size_z"), series.size, strict=True))
    spacings = dict(zip(("spacing_x_mm", "spacing_y_mm", "spacing_z_mm"), series.spacing_mm, strict=True))
    return {
        "case_id": series.case_id,
        "patient_id": printable(series.patient_id),
        "source": kind,
        "data_set": INTERNAL,
        "role": "",
        "series_uid": series.series_uid,
        **sizes,
        **spacings,
        "n_nodules": "" if series.n_nodules is None else series.n_nodules,
        "status": "excluded" if series.excluded else "ok",
        "reason": series.excluded,
        "path": series.path,
        "sha256": "",
        "annotations": json.dumps(series.annotations),
        "notes": json.dumps(series.notes),
    }
