"""Slices: the stack of a series."""

from __future__ import annotations

import filecmp
import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lungddpm.core.errors import ExcludedCaseError
from lungddpm.core.volume import LARGEST_VOXELS, Volume, is_sheared, upright_grid
from lungddpm.sources.lidc.dicom import COPY_AGAIN
from lungddpm.sources.lidc.headers import Header
from lungddpm.sources.lidc.pixels import hounsfield

POSITION_TOLERANCE = 0.01
"""Tolerance of a slice position as a share of the slice spacing, in addition to rounding."""
IN_PLANE_TOLERANCE = 1e-4
"""Tolerance between orientation, pixel spacing and matrix of two slices."""

_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_SHOWN_FILES = 3
_GREATEST_TILT = 45
"""Degrees; scanners tilt by 30 at most."""
_MOST_DECIMALS = 6
_EQUAL_MM = 1e-7
_SAME_POSITION_MM = 0.02
"""Far below the spacing of any chest CT, and well above the noise of positions."""
_ROUNDS = 40


@dataclass(frozen=True)
class Stack:
    """The slices of one series in order, and their grid."""

    headers: tuple[Header, ...]
    """Ascending along the slice normal."""
    size: tuple[int, int, int]
    affine: np.ndarray
    """Sheared if the gantry was tilted: slices are then shifted sideways."""
    positions_mm: np.ndarray
    """(slices, 3) LPS: position of the first pixel of each slice."""
    thickness_mm: float | None
    notes: tuple[str, ...] = ()
    """Notes on what was left out, a clause each."""

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between columns, rows and slices."""
        return tuple(np.linalg.norm(self.affine[:3, :3], axis=0).tolist())

    @property
    def steps_mm(self) -> np.ndarray:
        """(2, 3) LPS: to the next column and to the next row."""
        return self.affine[:3, :2].T * [-1, -1, 1]

    def nearest_slice(self, points_mm: np.ndarray) -> tuple[int, np.ndarray]:
        """The slice nearest to the first of these points, and how far off its plane all of them are.

        Args:
            points_mm: (n, 3) LPS.

        Returns:
            Index of the slice; (n,) in distances of slices.
        """
        normal = np.cross(*self.steps_mm)
        normal /= np.linalg.norm(normal)
        heights, along = self.positions_mm @ normal, points_mm @ normal
        k = int(np.argmin(np.abs(heights - along[0])))
        return k, (along - heights[k]) / np.abs(np.diff(heights)).max()

    def pixels_of(self, points_mm: np.ndarray, k: int) -> np.ndarray:
        """Points (n, 3) LPS in pixels of slice k, (n, 2): column, row."""
        steps = self.steps_mm
        return (points_mm - self.positions_mm[k]) @ steps.T / np.square(steps).sum(axis=1)


def stack_of(headers: list[Header]) -> Stack:
    """Order slices along their normal and check that they fill a regular grid.

    Other images of a series (localizers, screenshots) and duplicate slices are left out. Positions may be rounded: the
    grid is fitted to all of them, and their distance from it is checked.

    Raises:
        ExcludedCaseError: names the first slice that does not fit, or that is marked as synthetic.
    """
    headers, notes = _without_other_images(headers)
    first = headers[0]
    folder = first.path.parent
    for header in headers:
        if header["SyntheticData"].upper() == "YES":
            raise ExcludedCaseError(
                header.path,
                "is marked as synthetic CT (Synthetic Data (0008,001C) is YES)",
                "Take the series out of this data set; to use synthetic CT in an arm, list it under arms.external.",
            )
        if header.problem:
            raise ExcludedCaseError(header.path, header.problem, COPY_AGAIN)
    along_row, along_column, row_mm, column_mm, rows, columns = _common_plane(headers)
    if min(row_mm, column_mm, rows, columns) <= 0:
        raise ExcludedCaseError(first.path, "has no rows, no columns, or pixels without a size", COPY_AGAIN)
    if np.abs([along_row @ along_row - 1, along_column @ along_column - 1, along_row @ along_column]).max() > 1e-3:
        raise ExcludedCaseError(first.path, "has axes that are not perpendicular unit vectors", COPY_AGAIN)
    normal = np.cross(along_row, along_column)
    positions = np.array([header.numbers("ImagePositionPatient", 3) for header in headers])
    order = np.argsort(positions @ normal, kind="stable")
    headers, positions = [headers[i] for i in order], positions[order]
    kept = _without_copies(headers, positions @ normal, (int(rows), int(columns)))
    if len(kept) < len(headers):
        notes += (f"{len(headers) - len(kept)} slice(s) are stored more than once, with equal content: one was kept",)
        headers, positions = [headers[i] for i in kept], positions[kept]
    if len(headers) < 2:
        raise ExcludedCaseError(folder, "has a single slice", "Download the whole series.")
    first_mm, step = _even_grid(headers, positions, normal)
    affine = np.eye(4)
    affine[:3] = np.column_stack([along_row * column_mm, along_column * row_mm, step, first_mm])
    affine[:2] *= -1  # LPS to RAS
    size = (int(columns), int(rows), len(headers))
    if is_sheared(affine):
        notes += (_note_on_tilt(folder, size, affine, normal @ step / np.linalg.norm(step)),)
    thickness_mm = headers[0].numbers("SliceThickness", 1)[0] if headers[0]["SliceThickness"] else 0.0
    return Stack(
        tuple(headers),
        size,
        affine,
        positions,
        thickness_mm if thickness_mm > 0 else None,
        notes,
    )


def _without_other_images(headers: list[Header]) -> tuple[list[Header], tuple[str, ...]]:
    """The slices among the images of a series, and notes on what else there is."""
    slices = [header for header in headers if "LOCALIZER" not in _image_type(header)]
    if not slices:
        folder = headers[0].path.parent
        raise ExcludedCaseError(folder, "has only localizers (scout images), no slices", "Leave it out.")
    # E.g. dose reports. A series of nothing else may be slices written by a converter.
    pure = [header for header in slices if not _is_capture(header)] or slices
    notes = []
    for kind, before, after in (("localizer", headers, slices), ("screenshot", slices, pure)):
        if len(after) < len(before):
            stay = {id(header) for header in after}
            out = [header.name for header in before if id(header) not in stay]
            shown = ", ".join(out[:_SHOWN_FILES]) + (", ..." if len(out) > _SHOWN_FILES else "")
            notes.append(f"{len(out)} {kind}(s) among the slices were left out ({shown})")
    return pure, tuple(notes)


def _image_type(header: Header) -> list[str]:
    return header["ImageType"].upper().split("\\")


def _is_capture(header: Header) -> bool:
    derived = "SECONDARY" in _image_type(header) and not header["ImagePositionPatient"]
    return derived or header["SOPClassUID"].startswith(_SECONDARY_CAPTURE)


def _common_plane(headers: list[Header]) -> tuple[np.ndarray, np.ndarray, float, float, float, float]:
    """Direction cosines of rows and columns, row and column spacing in mm, rows and columns of all slices.

    Raises:
        ExcludedCaseError: names the first slice that differs from the majority.
    """
    planes = np.array(
        [
            header.numbers("ImageOrientationPatient", 6)
            + header.numbers("PixelSpacing", 2)
            + header.numbers("Rows", 1)
            + header.numbers("Columns", 1)
            for header in headers
        ]
    )
    common = planes[0]
    if (np.abs(planes - common).max(axis=1) > IN_PLANE_TOLERANCE).any():
        kinds, counts = np.unique(planes.round(3), axis=0, return_counts=True)
        most = int(np.argmax((planes.round(3) == kinds[np.argmax(counts)]).all(axis=1)))
        common = planes[most]
        odd = np.flatnonzero(np.abs(planes - common).max(axis=1) > IN_PLANE_TOLERANCE)[0]
        raise ExcludedCaseError(
            headers[odd].path,
            f"differs in orientation, pixel spacing or matrix from {headers[most].name}",
            "Keep one stack of slices per series.",
        )
    return common[:3], common[3:6], *common[6:]


def _without_copies(headers: list[Header], along: np.ndarray, shape: tuple[int, int]) -> list[int]:
    """Which slices to keep so that each position has one.

    Args:
        headers: in order of position.
        along: (slices,) positions along the normal, mm.
        shape: rows and columns.

    Raises:
        ExcludedCaseError: two slices at one position differ.
    """
    gaps = np.diff(along)
    apart = gaps[gaps > _SAME_POSITION_MM]
    spacing = _usual(apart) if apart.size else 0.0
    kept = [0]
    for k, gap in enumerate(gaps, start=1):
        if gap > POSITION_TOLERANCE * spacing:
            kept.append(k)
        elif not _same_content(headers[kept[-1]], headers[k], shape):
            raise ExcludedCaseError(
                headers[0].path.parent,
                f"{headers[kept[-1]].name} and {headers[k].name} are different slices at the same position",
                "Keep one of them.",
            )
    return kept


def _same_content(one: Header, other: Header, shape: tuple[int, int]) -> bool:
    """Whether two slices have equal HU, however they are stored."""
    with suppress(OSError):
        if one.frame == other.frame and filecmp.cmp(one.path, other.path, shallow=False):
            return True
    first, second = (next(hounsfield([header], shape)) for header in (one, other))
    return np.array_equal(first, second)


def _even_grid(headers: list[Header], positions: np.ndarray, normal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first position and the step (mm, LPS) of the regular grid that best fits positions in order.

    Raises:
        ExcludedCaseError: slices are missing, or are farther from the grid than rounding explains.
    """
    folder = headers[0].path.parent
    along = positions @ normal
    rounding = _rounding_mm(positions)
    slack = float(np.abs(normal) @ rounding)
    gaps = np.diff(along)
    usual = _usual(gaps)
    spacing = gaps[np.abs(gaps - usual) <= min(0.1 * usual + 2 * slack, usual / 2)].mean()
    tolerance = POSITION_TOLERANCE * spacing + slack
    steps = np.maximum(np.rint(gaps / spacing), 1)
    uneven = _distance_from_line(np.concatenate([[0], np.cumsum(steps)]), along) > tolerance
    odd = np.abs(gaps - steps * spacing) if uneven else steps
    worst = int(np.argmax(odd))
    pair = f"{headers[worst].name} and {headers[worst + 1].name}"
    if uneven:
        problem = f"{pair} are {gaps[worst]:.3g} mm apart, the others {spacing:.3g} mm"
        raise ExcludedCaseError(folder, problem, "Download the whole series.")
    if (missing := int(steps[worst]) - 1) > 0:
        problem = f"{missing} slice(s) missing between {pair}"
        raise ExcludedCaseError(folder, problem, "Download the whole series.")
    numbers = np.arange(len(along)) - (len(along) - 1) / 2
    step = numbers @ positions / (numbers @ numbers)
    centre = positions.mean(axis=0)
    strayed = np.abs(positions - centre - np.outer(numbers, step)) - 2 * rounding
    if (strayed > POSITION_TOLERANCE * spacing).any():
        worst = int(np.argmax(strayed.max(axis=1)))
        problem = f"{headers[worst].name} is shifted sideways relative to the others"
        raise ExcludedCaseError(folder, problem, "Download the whole series.")
    sideways = step - (step @ normal) * normal
    if (np.abs(sideways) <= 2 * rounding / (len(along) - 1)).all():
        step = step - sideways
    return centre + numbers[0] * step, step


def _note_on_tilt(folder: Path, size: tuple[int, int, int], affine: np.ndarray, cosine: float) -> str:
    """A note for the user about slices that are shifted sideways.

    Raises:
        ExcludedCaseError: too much tilt for a gantry, or the upright grid would be too large.
    """
    degrees = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
    upright = Volume(np.broadcast_to(np.uint8(0), size), affine).canonical()
    _, shape = upright_grid(upright.affine, upright.shape)
    if degrees > _GREATEST_TILT or math.prod(shape) > LARGEST_VOXELS:
        problem = f"slices are shifted sideways by {degrees:.0f} degrees, too much for a tilted gantry"
        raise ExcludedCaseError(folder, problem, "Write the series with its true positions.")
    return f"the gantry was tilted by {degrees:.1f} degrees: CT and nodules are resampled to an upright grid"


def _usual(gaps: np.ndarray) -> float:
    """The lower median."""
    return float(np.sort(gaps)[(len(gaps) - 1) // 2])


def _rounding_mm(positions: np.ndarray) -> np.ndarray:
    """Half a unit of the last decimal used in the positions, for x, y and z, (3,)."""
    units = np.full(3, 10.0**-_MOST_DECIMALS)
    for decimals in range(_MOST_DECIMALS - 1, -1, -1):
        fits = (np.abs(positions - positions.round(decimals)) < _EQUAL_MM).all(axis=0)
        units[fits] = 10.0**-decimals
    return units / 2


def _distance_from_line(numbers: np.ndarray, values: np.ndarray) -> float:
    """The largest distance of values from the best straight line in the Chebyshev sense."""

    def farthest(slope: float) -> float:
        return float(np.ptp(values - slope * numbers)) / 2

    # Convex in the slope: each iteration removes a third of the bracket that cannot contain the minimum.
    mean = (values[-1] - values[0]) / numbers[-1]
    reach = 2 * farthest(mean) / numbers[-1]
    low, high = mean - reach, mean + reach
    for _ in range(_ROUNDS):
        third = (high - low) / 3
        if farthest(low + third) < farthest(high - third):
            high -= third
        else:
            low += third
    return farthest((low + high) / 2)
