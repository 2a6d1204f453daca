"""Sources: where scans come from. Each module or package here is one, but for `index`, which lists what they find.

A module declares:

TITLE: str                    what it is, in a few words
CITATION: str                 the work to cite
find_series(path, cache) -> list[Series]
                              reads headers only; nothing is dropped, excluded series carry a reason
load_scan(path, case) -> Scan
                              reads one series of the index in full

and where it applies:

Settings                      its keys in `source.<name>` of the config: a subclass of `Section`. Unless the source
                              simulates, they say how scans are read: `find_series` and `load_scan` get them as a third
                              argument. A property `caveat` is a sentence that the report shows: what a reader of it
                              has to know of the labels
size(settings) -> Size        how many scans it has, for `lungddpm plan`; `settings` is None without `Settings`
simulate(settings, seed, output, threads)
                              writes its cohort into a folder, from which `find_series` reads it, on so many cores, the
                              same files whatever their number. Such a source needs
                              `Settings`, and `size` is exact, but it needs no `source.path`; the report says that its
                              patients are not real

A module imports heavy libraries inside its functions only: light
commands import it to read what it declares. It imports no other part of the configuration than
`lungddpm.config.sections`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lungddpm.config.sections import Section
from lungddpm.core.errors import ConfigError
from lungddpm.core.volume import Volume

_REQUIRED = ("TITLE", "CITATION", "find_series", "load_scan")
_NO_SOURCES = {"index"}
"""What else lies in this folder."""


@dataclass(frozen=True)
class Series:
    """One CT series as its headers describe it: a row of the index."""

    case_id: str
    patient_id: str
    series_uid: str
    size: tuple[int, int, int] = (0, 0, 0)
    spacing_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)
    n_nodules: int | None = 0
    """None: only the labels themselves would show it."""
    path: str = ""
    annotations: tuple[str, ...] = ()
    excluded: str = ""
    """Why the series cannot be used; empty if it can."""
    notes: tuple[str, ...] = ()
    """What a user should know about how it is read, a clause each."""


@dataclass(frozen=True)
class Contour:
    """One reader's outline on one slice. The points are the first voxels OUTSIDE the nodule (LIDC's rule)."""

    slice_index: int
    points: np.ndarray
    """(n, 2) int: column, row, 0-based."""
    inclusion: bool = True
    """False: the outlined region is cut out of the nodule."""


@dataclass(frozen=True)
class Region:
    """Voxels of a scan, in a box."""

    corner: tuple[int, int, int]
    """Index of the box's first voxel in the scan."""
    mask: np.ndarray
    """bool."""


@dataclass(frozen=True)
class Annotation:
    """What one reader drew for one nodule of at least 3 mm."""

    reader: int
    contours: tuple[Contour, ...]
    characteristics: dict[str, int] = field(default_factory=dict)
    region: Region | None = None
    """The voxels of the nodule where these are what is stored; the contours are then derived from them."""


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
    """Thickness of a slice where the headers give it; it can differ from the distance between slices."""
    files: tuple[Path, ...] = ()
    """Every file that was read, for provenance."""
    notes: tuple[str, ...] = ()
    """What a user should know about how it was read, a clause each; `case.json` keeps them in `qc.notes`."""


@dataclass(frozen=True)
class Size:
    """How many scans a source has, before any is read."""

    scans: int
    voxels: float
    """Of one scan, on average."""
    origin: str
    """How this is known, as a clause."""


@dataclass(frozen=True)
class Source:
    """What a module in this folder declares; see the top of this file."""

    name: str
    """Of the module."""
    title: str
    citation: str
    find_series: Callable[..., list[Series]]
    load_scan: Callable[..., Scan]
    settings: type[Section] | None
    size: Callable[[Any], Size] | None
    simulate: Callable[[Any, int, Path, int], None] | None


def names() -> list[str]:
    """All sources, in alphabetical order."""
    return sorted({module.name for module in pkgutil.iter_modules(__path__)} - _NO_SOURCES)


def source_of(kind: str) -> Source:
    """What a source declares.

    Raises:
        ConfigError: there is no such source, or its module lacks a declaration.
    """
    if kind not in names():
        raise ConfigError("source.kind", f"there is no source '{kind}'", f"Available: {', '.join(names())}.")
    module = importlib.import_module(f"{__name__}.{kind}")
    required = (*_REQUIRED, "Settings", "size") if hasattr(module, "simulate") else _REQUIRED
    if missing := [name for name in required if not hasattr(module, name)]:
        remedy = "See docs/how-to/add-a-generator-or-source.md."
        raise ConfigError(module.__file__ or kind, f"declares no {', no '.join(missing)}", remedy)
    return Source(
        name=kind,
        title=module.TITLE,
        citation=module.CITATION,
        find_series=module.find_series,
        load_scan=module.load_scan,
        settings=getattr(module, "Settings", None),
        size=getattr(module, "size", None),
        simulate=getattr(module, "simulate", None),
    )
