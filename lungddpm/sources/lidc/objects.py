"""What SEG and RTSTRUCT objects have in common: marked parts with labels, and a place on the slices of a CT."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lungddpm.core.errors import ExcludedCaseError
from lungddpm.core.volume import per_axis
from lungddpm.sources import Region
from lungddpm.sources.lidc.dicom import COPY_AGAIN, LARGEST_MULTIFRAME_BYTES, read_dataset
from lungddpm.sources.lidc.slices import Stack

if TYPE_CHECKING:
    import pydicom

LABEL_EXAMPLE = "Nodule 1 - Annotation IL057_127364"
ON_GRID = 0.25
"""Tolerance of a position relative to the grid, in voxels."""
_LABEL = re.compile(r"(?i)nodule\s*(\d+)\s*-\s*annotation[\s:]+(.*\S)")
_NODULE = re.compile("(?i)nodule")
_NUMBERED = re.compile(r"(?i)nodule[\s_#-]*\d")


@dataclass(frozen=True)
class Marked:
    """The header of an object whose parts (segments, ROIs) are annotations."""

    uid: str
    series_uid: str
    """Of the CT; empty if it names none."""
    parts: dict[int, tuple[str, str]]
    """Number of the nodule and annotation id, by number of the segment or ROI."""
    others: tuple[str, ...]
    """Labels of the parts without an annotation."""
    problem: tuple[str, str] | None
    """Why it cannot be used, and what to do; None if it can."""

    @property
    def lost_nodule(self) -> str:
        """The label of a part that is called a nodule, but has no annotation, unlike others; empty if none.

        In an object without any annotation, only numbered nodules count: others are segments of another tool.
        """
        if not self.parts:
            return numbered_nodule(self.others)
        return next((label for label in self.others if _NODULE.search(label)), "")


def numbered_nodule(labels: Iterable[str]) -> str:
    """The first label that is called a nodule with a number, as in 'Nodule 2'; empty if none."""
    return next((label for label in labels if _NUMBERED.search(label)), "")


def annotated(texts: Iterable[str]) -> tuple[str, str] | None:
    """Number of the nodule and annotation id from the first text that has both."""
    return next(((str(int(found[1])), found[2]) for text in texts if (found := _LABEL.search(text))), None)


def problem_of_header(named: Iterable[str], numbers: Iterable[int], parts: str) -> tuple[str, str] | None:
    """See `Marked.problem`.

    Args:
        named: UIDs of the series that an object names.
        numbers: of its parts.
        parts: what these are called.
    """
    if len(series := sorted(set(named))) > 1:
        return f"names several series ({', '.join(series)})", "Export one object per CT series."
    if twice := [number for number, count in Counter(numbers).items() if count > 1]:
        return f"has several {parts} with the number {twice[0]}", "Export it again."
    return None


def region(path: Path, part: str, found: list[np.ndarray], stack: Stack) -> Region:
    """The voxels of a part of an object, given as lists of indices, (n, 3) each.

    Raises:
        ExcludedCaseError: there are none, or they are not all in the stack.
    """
    voxels = np.concatenate([np.empty((0, 3), int), *found])
    if not len(voxels):
        raise ExcludedCaseError(path, f"has no voxels in its {part}", COPY_AGAIN)
    low, high = voxels.min(axis=0), voxels.max(axis=0) + 1
    if (low < 0).any() or (high > stack.size).any():
        raise other_grid(path, f"it reaches beyond the {stack.size[0]} x {stack.size[1]} pixels")
    mask = np.zeros(high - low, bool)
    mask[tuple((voxels - low).T)] = True
    return Region(per_axis(int(first) for first in low), mask)


def other_grid(path: Path, why: str) -> ExcludedCaseError:
    """The error for an object that does not fit the slices."""
    return ExcludedCaseError(path, f"is not on the grid of the slices: {why}", "Export it on the grid of its CT.")


def read_object(path: Path, only: list[str] | None = None) -> pydicom.Dataset:
    """Read an object, or only these elements of it.

    Raises:
        ExcludedCaseError: the file cannot be read, or is too large.
    """
    from pydicom import config

    try:
        with config.disable_value_validation(), path.open("rb") as file:
            dataset, _, size = read_dataset(path, file, LARGEST_MULTIFRAME_BYTES, only)
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        raise ExcludedCaseError(path, problem, "Check the file and its permissions.") from None
    if size is None:
        raise ExcludedCaseError(
            path, f"decompresses to more than {LARGEST_MULTIFRAME_BYTES >> 20} MiB", "Check the file."
        )
    return dataset
