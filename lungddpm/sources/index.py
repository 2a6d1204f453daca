"""From a source's folder to the index: one row per series, with a cache of the headers."""

from __future__ import annotations

import csv
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lungddpm.config.sections import Section
from lungddpm.core import cases
from lungddpm.core.code import stage_fingerprint
from lungddpm.core.errors import InputError, UserError, printable
from lungddpm.core.files import atomic_path, fingerprint, read_json, write_text
from lungddpm.core.progress import LOG, waiting
from lungddpm.core.roles import INTERNAL
from lungddpm.sources import Series, source_of

if TYPE_CHECKING:
    import pandas as pd

INDEX_COLUMNS = [*cases.COLUMNS, "annotations", "notes"]
"""The index is a case table before any voxel is read: `path` and `annotations` (a JSON list) are relative to the
source's folder, sizes and spacings are the scan's own, `n_nodules` counts the readers' marks, if known.
`notes` (a JSON list) has remarks on a usable series."""
LONGEST_NAME = 64
"""Characters of a case id before what distinguishes it from an equal one; no DICOM identifier may have more."""


class Cache:
    """Values read from files, valid as long as the files' names, sizes and times do not change.

    Stored as JSON: the fingerprint of the reading code, and for every key the state of its files and the value. A cache
    written by other code, or unreadable, counts as empty.

    Args:
        path: file of the cache; None: nothing is kept beyond this run.
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
        """The cached value of `read()`, or a new one if a file has changed since.

        Args:
            key: names the entry; entries that no call uses any more are dropped.
            files: all files that `read` depends on.
            read: returns a JSON value without tuples; exceptions are passed on and not cached.
            keep: whether to cache a value; those with errors should be read again.
        """
        # Before reading: a file that changes meanwhile will have another state next time.
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
    """Distinct names that are safe for folders, in the order given; the second of two equal names gets `_2`, and so
    on.

    Args:
        names: of cases, with any characters.
        others: case ids that are taken already.
    """
    given: list[str] = []
    taken: dict[str, int] = {name.casefold(): 1 for name in others}
    for name in names:
        safe = re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip(".")[:LONGEST_NAME] or "unnamed"
        # Tables and the cache are in the folder of the cases.
        candidate = safe = re.sub(r"(?i)\.(tsv|json)$", r"_\1", safe)
        # Case-insensitive file systems would put "a" and "A" into one folder.
        while candidate.casefold() in taken:
            taken[safe.casefold()] += 1
            candidate = f"{safe}_{taken[safe.casefold()]}"
        taken[candidate.casefold()] = 1
        given.append(candidate)
    return given


def reason_of(error: InputError, top: Path) -> str:
    """An error for tables: in one line, with paths relative to the data set."""
    message = str(error)
    for root in (top, top.resolve()):
        message = message.replace(printable(f"{root}/"), "")
    return " ".join(message.split())


def key_of(data_set: str) -> str:
    """The key of a data set in the config, by its name in the column `data_set`."""
    return "source" if data_set == INTERNAL else f"external_tests.{data_set}"


@contextmanager
def keys_below(key: str, kind: str) -> Iterator[None]:
    """Errors of a source name their keys below that of the data set: sources only know those of `source`."""
    try:
        yield
    except UserError as error:
        raise type(error)(*(_below(key, kind, text) for text in (error.what, error.problem, error.remedy))) from None


def _below(key: str, kind: str, text: str) -> str:
    # Not where a path or a file's name continues.
    return re.sub(rf"(?<![\w./-])source(?=\.(?:path|kind|{kind})\b)", lambda _: key, text)


def files_below(top: Path) -> tuple[list[Path], dict[str, str]]:
    """All files that are not hidden, and the reason for each folder that cannot be listed."""
    files, seen, problems = [], set(), {}

    def note(error: OSError) -> None:
        folder = Path(error.filename)
        problem = InputError(folder, f"cannot be listed ({error.strerror})", "Check the folder and its permissions.")
        problems[folder.relative_to(top).as_posix()] = reason_of(problem, top)

    with waiting("listing files"):
        for folder, subfolders, names in os.walk(top, onerror=note, followlinks=True):
            # Links to folders are common if only part of a data set is used; a link upwards must not loop.
            if (real := os.path.realpath(folder)) in seen:
                subfolders.clear()
                continue
            seen.add(real)
            # Hidden folders are snapshots, hidden files are from macOS: copies of other files, or not data.
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            files += [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
    return files, problems


def relative_name(path: Path, top: Path) -> str:
    """A path as stored in tables and caches."""
    return path.relative_to(top).as_posix()


def check_folder(path: Path, key: str = "source") -> None:
    """Check that the folder of the data set exists.

    Args:
        path: of the folder.
        key: of the data set in the config, for messages.

    Raises:
        InputError: it does not; the message has the absolute path, because relative ones depend on the working
            directory.
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
        cache: file that caches the headers, so that only changes are read the next time.
        reading: settings for reading the source, `config.source.reading()`.
        key: of the data set in the config, for messages.

    Raises:
        InputError: the folder is missing or has no series, or two patients whose ids differ only in case.
    """
    check_folder(path, key)
    remembered = Cache(cache, kind)
    with keys_below(key, kind):
        found = source_of(kind).find_series(path, remembered, *reading)
    found = [replace(series, excluded=_below(key, kind, series.excluded)) for series in found]
    remembered.save()
    if not found:
        problem = f"has no CT series that the source '{kind}' can read"
        raise InputError(path.absolute(), problem, f"Check {key}.path and {key}.kind.")
    _check_spelling(path, found)
    rows = [_row(kind, series) for series in sorted(found, key=lambda series: (not series.patient_id, series.case_id))]
    which = "" if key == "source" else f"{key}: "
    LOG.info("%s%d of %d series are usable", which, sum(row["status"] == "ok" for row in rows), len(rows))
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
        InputError: two data sets share a patient, or a usable series.
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
    """Make sure that an external test set has no patient and no usable series of another data set.

    A series that only an XML file names is not a scan: each part of a divided LIDC-IDRI may have the XML of all.
    """
    remedies = {
        "patient_id": f"If they are other people, set external_tests.{name}.distinct_patients: true; if they are the "
        "same, take their scans out of one of the two.",
        "series_uid": "It is the same scan: take it out of one of the two.",
    }
    for column, remedy in remedies.items():
        ours, theirs = (
            [row for row in side if row[column] and (column == "patient_id" or row["status"] == "ok")]
            for side in (rows, others)
        )
        owner = {row[column].casefold(): row["data_set"] for row in theirs}
        if shared := sorted({row[column] for row in ours if row[column].casefold() in owner}):
            what = {"patient_id": "patient ids", "series_uid": "series"}[column]
            more = f" and {len(shared) - 3} more" if len(shared) > 3 else ""
            other = owner[shared[0].casefold()]
            problem = f"shares {what} with the data set '{other}': {', '.join(shared[:3])}{more}"
            raise InputError(f"external_tests.{name}", problem, remedy)


def _check_spelling(path: Path, found: Iterable[Series]) -> None:
    """Make sure that no patient has two spellings: as two patients, they could be trained and tested on."""
    spellings: dict[str, set[str]] = defaultdict(set)
    for series in found:
        spellings[series.patient_id.casefold()].add(series.patient_id)
    if twice := next((sorted(ids) for ids in spellings.values() if len(ids) > 1), None):
        problem = f"has the patients {' and '.join(twice)}, which differ only in case"
        raise InputError(
            path.absolute(), problem, "Give each patient one spelling, and different patients different ids."
        )


def read_index(path: Path) -> pd.DataFrame:
    """Read an index written by `write_index`."""
    index = cases.read_cases(path)
    index["path"] = index["path"].map(_with_its_bytes)
    return index


def write_index(path: Path, index: list[dict]) -> None:
    """Write the index as a tab-separated table, atomically. Without pandas, whose import takes longer than ten
    headers."""
    with (
        atomic_path(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.DictWriter(file, INDEX_COLUMNS, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(index)


def _with_its_bytes(path: str) -> str:
    """A path from a table in file system form: the inverse of `printable`."""
    return re.sub(r"\\u(dc[89a-f][0-9a-f])", lambda escape: chr(int(escape[1], 16)), path)


def _state(files: Iterable[Path]) -> str:
    """A hash that changes when a file is added, removed or written; unreadable files have a state, too."""
    states: list[list[str | int]] = []
    for file in files:
        try:
            status = file.stat()
        except OSError:
            states.append([file.name])
        else:
            # The change time detects files replaced by others of the same size and date.
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
