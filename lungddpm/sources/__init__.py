"""Sources: where scans come from. A new source is one new module here with `find_series` and `load_scan`.

find_series(path) -> list[Series]            reads headers only; nothing is dropped, excluded series carry a reason
load_scan(path, case) -> Scan                reads one series of the index in full
"""

from __future__ import annotations

import csv
import importlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from lungddpm import cases
from lungddpm.errors import InputError
from lungddpm.files import atomic_path
from lungddpm.volume import Volume

if TYPE_CHECKING:
    import pandas as pd

INDEX_COLUMNS = [*cases.COLUMNS, "annotations"]
"""The index is a case table before any voxel is read: `path` and `annotations` (a JSON list) are relative to the
source's folder, sizes and spacings are the scan's own, `n_nodules` counts what readers marked."""


@dataclass(frozen=True)
class Series:
    """One CT series as its headers describe it: a row of the index."""

    case_id: str
    patient_id: str
    series_uid: str
    size: tuple[int, int, int] = (0, 0, 0)
    spacing_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)
    n_nodules: int = 0
    path: str = ""
    annotations: tuple[str, ...] = ()
    excluded: str = ""
    """Why the series cannot be used; empty if it can."""


@dataclass(frozen=True)
class Contour:
    """One reader's outline on one slice. The points are the first voxels OUTSIDE the nodule (LIDC's rule)."""

    slice_index: int
    points: np.ndarray
    """(n, 2) int: column, row, 0-based."""
    inclusion: bool = True
    """False: the outlined region is cut out of the nodule."""


@dataclass(frozen=True)
class Annotation:
    """What one reader drew for one nodule of at least 3 mm."""

    reader: int
    contours: tuple[Contour, ...]
    characteristics: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Scan:
    """One scan in full resolution, with what is known about its nodules."""

    ct: Volume
    """int16 HU, indexed (column, row, slice); the affine is true but need not be canonical."""
    annotations: tuple[Annotation, ...] = ()
    """Readers' contours, in the index space of `ct.array`."""
    labels: np.ndarray | None = None
    """Ready labels instead of contours, same shape: 1 lung, 2 nodule, 3 vessel."""
    slice_thickness_mm: float | None = None
    """Thickness of a slice where the headers tell it; it can differ from the distance between slices."""
    files: tuple[Path, ...] = ()
    """Every file that was read, for provenance."""


def module_of(kind: str) -> ModuleType:
    """The source module of that name."""
    return importlib.import_module(f"{__name__}.{kind}")


def case_ids(names: Iterable[str]) -> list[str]:
    """Distinct names that are safe for folders, in the order given; the second of equal names gets `_2`, and so on."""
    given: list[str] = []
    for name in names:
        safe = re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip(".") or "unnamed"
        candidate, count = safe, 1
        # Case-insensitive file systems would put "a" and "A" into one folder.
        while candidate.casefold() in (other.casefold() for other in given):
            count += 1
            candidate = f"{safe}_{count}"
        given.append(candidate)
    return given


def index_source(kind: str, path: Path) -> list[dict]:
    """One row a series, in order of case id, `role` still empty (see `INDEX_COLUMNS`).

    Raises:
        InputError: the folder is missing, or holds no series at all.
    """
    if not path.is_dir():
        raise InputError(path, "is not a folder", "Set source.path to the folder of the data set.")
    found = sorted(module_of(kind).find_series(path), key=lambda series: series.case_id)
    if not found:
        raise InputError(path, f"holds no CT series that the source '{kind}' can read", "Check source.path and kind.")
    return [_row(kind, series) for series in found]


def read_index(path: Path) -> pd.DataFrame:
    """Read an index written by `write_index`."""
    return cases.read_cases(path)


def write_index(path: Path, index: list[dict]) -> None:
    """Write the index as a tab-separated table, atomically. Without pandas, which takes longer than ten headers."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, INDEX_COLUMNS, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(index)


def _row(kind: str, series: Series) -> dict:
    sizes = dict(zip(("size_x", "size_y", "size_z"), series.size, strict=True))
    spacings = dict(zip(("spacing_x_mm", "spacing_y_mm", "spacing_z_mm"), series.spacing_mm, strict=True))
    return {
        "case_id": series.case_id,
        "patient_id": series.patient_id,
        "source": kind,
        "role": "",
        "series_uid": series.series_uid,
        **sizes,
        **spacings,
        "n_nodules": series.n_nodules,
        "status": "excluded" if series.excluded else "ok",
        "reason": series.excluded,
        "path": series.path,
        "sha256": "",
        "annotations": json.dumps(series.annotations),
    }
