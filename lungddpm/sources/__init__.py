"""Sources of scans. Each module or package here is one, except `index`, which lists what they find.

A module declares:

TITLE: str                    short description
CITATION: str                 the work to cite
find_series(path, cache) -> list[Series]
                              reads headers only; nothing is dropped, excluded series have a reason
load_scan(path, case) -> Scan
                              reads one series of the index in full

and, if applicable:

Settings                      its keys in `source.<name>` of the config: a subclass of `Section`. Unless the source
                              simulates, they control how scans are read: `find_series` and `load_scan` get them as a
                              third argument. A property `caveat` is a sentence about the labels that is shown in the
                              report; a property `tables` names files beside the scans, where there are any, such as a
                              table of patients: when one changes, the scans are listed again
size(settings) -> Size        number of scans, for `lungddpm plan`; `settings` is None without `Settings`
simulate(settings, seed, output, threads)
                              writes its cohort into a folder, from which `find_series` reads it, on `threads` cores,
                              the same files for any number of cores. Such a source needs `Settings`, and `size` is
                              exact, but no `source.path`; the report states that its patients are simulated

Messages name keys as they are in `source`, e.g. `source.path` or `source.<name>.<key>`; those about an external test
set get its key instead.

A module imports heavy libraries only inside its functions, because light commands import it for its declarations. Of
the configuration it imports only `lungddpm.config.sections`.
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
"""Other modules in this folder."""


READERS = 4
"""Of a scan of LIDC-IDRI."""


@dataclass(frozen=True)
class Series:
    """One CT series as described by its headers: a row of the index."""

    case_id: str
    patient_id: str
    series_uid: str
    size: tuple[int, int, int] = (0, 0, 0)
    spacing_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)
    n_nodules: int | None = 0
    """None: unknown before the labels are read."""
    path: str = ""
    annotations: tuple[str, ...] = ()
    excluded: str = ""
    """Why the series cannot be used; empty if it can."""
    notes: tuple[str, ...] = ()
    """Remarks for the user on how it is read, a clause each."""


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
    """The outlines of one reader for one nodule of at least 3 mm."""

    reader: int
    contours: tuple[Contour, ...]
    characteristics: dict[str, int] = field(default_factory=dict)
    region: Region | None = None
    """The voxels of the nodule, if these are stored; the contours are then derived from them."""


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
    """Thickness of a slice, if the headers give it; it can differ from the distance between slices."""
    files: tuple[Path, ...] = ()
    """Every file that was read, for provenance."""
    notes: tuple[str, ...] = ()
    """Remarks for the user on how it was read, a clause each; stored in `qc.notes` of `case.json`."""
    readers: int = READERS
    """How many people read the scan, at most: a group of more annotations marks several nodules."""


@dataclass(frozen=True)
class Size:
    """Number of scans of a source, before any is read."""

    scans: int
    voxels: float
    """Of one scan, on average."""
    origin: str
    """Source of this information, as a clause."""


@dataclass(frozen=True)
class Source:
    """The declaration of a module in this folder; see the top of this file."""

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
    """The declaration of a source.

    Raises:
        ConfigError: there is no such source, or its module lacks a declaration.
    """
    if kind not in names():
        raise ConfigError("source.kind", f"there is no source '{kind}'", f"Available: {', '.join(names())}.")
    module = importlib.import_module(f"{__name__}.{kind}")
    required = (*_REQUIRED, "Settings", "size") if hasattr(module, "simulate") else _REQUIRED
    if missing := [name for name in required if not hasattr(module, name)]:
        remedy = "See docs/how-to/add-a-generator-or-source.md."
        raise ConfigError(module.__file__ or kind, f"does not declare {', '.join(missing)}", remedy)
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
