"""Volumes: array plus affine, NIfTI in and out, the model grid, and the model's intensity range.

Arrays are indexed (x, y, z); affines map voxel indices to patient coordinates in mm, RAS+ (NIfTI's convention).
nibabel is imported where it is used: the import takes a quarter of a second, which commands without images avoid.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from lungddpm.core.errors import InputError
from lungddpm.core.files import atomic_path

if TYPE_CHECKING:
    from nibabel import Nifti1Header
    from nibabel.spatialimages import SpatialImage

AIR_HU = -1024
SMALLEST_RANGE_HU = 60.0
"""Smallest range of a CT: values with a smaller one are normalised."""
LABEL_TOLERANCE = 1e-3
"""Tolerance between a stored label and the whole number that it means."""
SHEAR_TOLERANCE_DEGREES = 0.05
"""Tolerance for perpendicular axes: rounded headers stay below it, the smallest gantry tilt is above."""
LARGEST_VOXELS = 2**29
"""Limit for a file, four times the largest chest CT: a small file can claim, or unpack to, any size."""
_DISAGREE_MM = 0.1
_UNITS_MM = {"meter": 1000.0, "micron": 0.001}
"""NIfTI's other units of length."""
_BAND_CELLS = 64
"""Cells along an axis that are resampled by one matrix product."""
_CHUNK = 2**20

Window = tuple[float, float] | tuple[np.ndarray, np.ndarray]
"""Lowest and highest HU: of a whole volume, or arrays that broadcast over it."""
Box = tuple[slice, slice, slice]
"""Voxels along x, y, z, each from a start to a stop."""
T = TypeVar("T")


@dataclass(frozen=True)
class Volume:
    """A 3-D array on a patient grid.

    Attributes:
        array: (x, y, z).
        affine: (4, 4) float64, voxel index -> mm, RAS+.
    """

    array: np.ndarray
    affine: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along x, y, z."""
        return self.array.shape

    @property
    def spacing_mm(self) -> np.ndarray:
        """Voxel edge lengths along x, y, z in mm, shape (3,)."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    @property
    def voxel_mm3(self) -> float:
        """Volume of one voxel in mm3."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))

    def like(self, array: np.ndarray) -> Volume:
        """Another array on the same grid."""
        return Volume(array, self.affine)

    def crop(self, box: Box) -> Volume:
        """A box of the volume, with non-negative starts, at its position in the patient."""
        to_box = np.eye(4)
        to_box[:3, 3] = [side.start for side in box]
        return Volume(self.array[box], self.affine @ to_box)

    def canonical(self) -> Volume:
        """The same volume with axes permuted and flipped to the closest RAS+ orientation; no resampling."""
        from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

        orientation = io_orientation(self.affine)
        to_original = inv_ornt_aff(orientation, self.shape)
        return Volume(apply_orientation(self.array, orientation), self.affine @ to_original)

    def same_grid(self, other: Volume, tolerance_mm: float = 1e-2) -> bool:
        """Whether shape and affine agree, the corners of the grid to within `tolerance_mm`."""
        return self.shape == other.shape and self.distance_mm(other) <= tolerance_mm

    def distance_mm(self, other: Volume) -> float:
        """Largest distance between the corners of two grids of the same shape, along any axis of the patient."""
        corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)], float)
        corners[:, :3] *= np.array(self.shape) - 1
        return float(np.abs(corners @ (self.affine - other.affine).T).max())


@dataclass(frozen=True)
class Header:
    """The geometry of an image file.

    Attributes:
        shape: voxels along the stored axes.
        affines: (4, 4) each, stored index -> mm, RAS+; the first is used, the others are also in the header.
        notes: remarks for the user, a clause each.
    """

    shape: tuple[int, int, int]
    affines: tuple[np.ndarray, ...]
    notes: tuple[str, ...] = ()

    @property
    def grid(self) -> Volume:
        """The grid in the closest RAS+ orientation; the array has no memory or meaning."""
        return self.grids[0]

    @property
    def grids(self) -> tuple[Volume, ...]:
        """The grids from each of the affines."""
        nothing = np.broadcast_to(np.uint8(0), self.shape)
        return tuple(Volume(nothing, affine).canonical() for affine in self.affines)


def read_volume(path: Path) -> Volume:
    """Read a 3-D NIfTI file in the closest RAS+ orientation, values as stored (scaled if the header has a scale).

    Raises:
        InputError: as `read_header`, or the voxels are truncated or damaged, or do not fit into memory.
    """
    image, header = _open_image(path)
    return Volume(_read_array(path, image, header), header.affines[0]).canonical()


def read_labels(path: Path) -> Volume:
    """Read a volume of labels, whole numbers that may be stored as something else.

    Some tools write labels as floats that are slightly off, or scaled with the CT's header. Values within
    `LABEL_TOLERANCE` of a whole number, or within half a step of the stored integers, are rounded to it.

    Returns:
        uint8 if every value is a label from 0 to 255, in the closest RAS+ orientation; otherwise as stored.

    Raises:
        InputError: as `read_volume`.
    """
    image, header = _open_image(path)
    array = _read_array(path, image, header)
    step = 0.0 if array.dtype.kind in "biu" else abs(_stored_step(image))
    return Volume(whole_numbers(array, max(LABEL_TOLERANCE, 0.51 * step)), header.affines[0]).canonical()


def read_grid(path: Path) -> Volume:
    """The grid of a NIfTI file in the closest RAS+ orientation, from its header; the array has no memory or meaning.

    Raises:
        InputError: as `read_header`.
    """
    return read_header(path).grid


def read_header(path: Path) -> Header:
    """The geometry of a NIfTI file.

    The sform is used if its code is set and it is invertible, else the qform if its code is set. If neither is,
    only the voxel sizes are known: the axes are nibabel's default, x to the left, the origin in the middle. Metres and
    micrometres are converted to mm.

    Raises:
        InputError: missing or unreadable, not 3-D, without voxels or with more than `LARGEST_VOXELS`, not one real
            number per voxel, without voxel size, or an affine that cannot be inverted.
    """
    return _open_image(path)[1]


def _open_image(path: Path) -> tuple[SpatialImage, Header]:
    """A NIfTI file whose header is that of a volume."""
    try:
        image = _load(path)
    except FileNotFoundError:
        raise InputError(path, "does not exist", "Check the path.") from None
    except Exception as error:  # damaged bytes make nibabel fail in any of its functions
        raise _unreadable(path, error) from None
    stored = tuple(int(n) for n in image.shape)
    shape = volume_shape(path, stored)
    if image.get_data_dtype().kind not in "biuf":
        raise InputError(path, "has colours or complex numbers", "Store one number per voxel.")
    affines, notes = _affines(path, image, shape)
    return image, volume_header(path, stored, tuple(affines), notes)


def _load(path: Path) -> SpatialImage:
    """The image in a file, before its voxels are read."""
    import nibabel

    for form in (nibabel.Nifti1Image, nibabel.Nifti2Image):
        if form.path_maybe_image(path)[0]:
            # By its very name: nibabel.load looks for a.nii.gz where a.Nii.gz is meant.
            return form.from_file_map({"image": nibabel.FileHolder(filename=str(path))})
    return nibabel.load(path)


def volume_shape(path: Path, stored: tuple[int, ...]) -> tuple[int, int, int]:
    """The shape of the volume in a file, without further dimensions of length 1.

    Args:
        path: the file, for messages.
        stored: the shape in its header.

    Raises:
        InputError: not 3-D, without voxels, or with more than `LARGEST_VOXELS`.
    """
    shape = stored
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        held = {4: "a volume for each of several times or channels", 5: "a vector for each voxel"}.get(len(shape), "")
        problem = f"has {len(shape)} dimensions instead of 3 (its shape is {stored}{held and f': {held}'})"
        raise InputError(path, problem, "Store one 3-D volume per file.")
    if min(shape) < 1:
        raise InputError(path, f"has no voxels (its shape is {shape})", "Convert or copy the file again.")
    if math.prod(shape) > LARGEST_VOXELS:
        raise InputError(
            path, f"claims {shape} voxels, more than {LARGEST_VOXELS:,}", "Check its header, or crop the scan."
        )
    return per_axis(shape)


def volume_header(
    path: Path, stored: tuple[int, ...], affines: tuple[np.ndarray, ...], notes: tuple[str, ...]
) -> Header:
    """The header of a file of that shape (see `volume_shape`), from those of its affines that can be inverted.

    Raises:
        InputError: as `volume_shape`, or an affine that cannot be inverted.
    """
    shape, affines = volume_shape(path, stored), tuple(affine for affine in affines if _invertible(affine))
    if not affines:
        raise InputError(path, "has an affine that cannot be inverted", "Write the file with its true geometry.")
    if len(stored) > 3:
        notes = (*notes, f"further dimensions of length 1 were dropped (its shape is {stored})")
    return Header(shape, affines, notes)


def _affines(path: Path, image: SpatialImage, shape: tuple[int, int, int]) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """The invertible affines of a header in mm, the one to use first, and notes on them.

    Raises:
        InputError: only pixdim could give the voxel size, and does not.
    """
    to_mm, unit_notes = _length_unit(image)
    sform, qform = (_coded(image.header, kind) for kind in ("sform", "qform"))
    if sform is None or qform is not None:
        sizes = _stored_sizes(image)
        if 0 in sizes and sform is None:
            shown = ", ".join(f"{size:g}" for size in sizes)
            remedy = "Write the file with its true geometry."
            raise InputError(path, f"has no voxel size (pixdim is {shown})", remedy)
        qform = None if 0 in sizes else qform
    usable, notes = _chosen(image, shape, sform, qform, to_mm)
    return usable, (*unit_notes, *notes)


def _chosen(
    image: SpatialImage, shape: tuple[int, int, int], sform: np.ndarray | None, qform: np.ndarray | None, to_mm: float
) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """The invertible ones of sform and qform in mm, and a note if one of them is not used."""
    scale = np.diag([to_mm, to_mm, to_mm, 1.0])
    if sform is None and qform is None:
        note = "neither sform nor qform is set: only the voxel sizes are known, and left and right may be swapped"
        return [scale @ np.asarray(image.affine, float)], (note,)
    coded = {name: scale @ affine for name, affine in (("sform", sform), ("qform", qform)) if affine is not None}
    usable = {name: affine for name, affine in coded.items() if _invertible(affine)}
    if len(coded) == 2 and len(usable) == 1:
        return list(usable.values()), (f"only its {next(iter(usable))} is invertible, and is used",)
    if len(usable) == 2:
        nothing = np.broadcast_to(np.uint8(0), shape)
        apart_mm = Volume(nothing, usable["sform"]).distance_mm(Volume(nothing, usable["qform"]))
        if apart_mm > _DISAGREE_MM:
            note = f"sform and qform disagree by up to {apart_mm:.3g} mm: the sform is used"
            return list(usable.values()), (note,)
    return list(usable.values()), ()


def _length_unit(image: SpatialImage) -> tuple[float, tuple[str, ...]]:
    """The length in mm of a header's unit, and a note if it is not 1; many headers leave it unknown, and mean mm."""
    try:
        unit = image.header.get_xyzt_units()[0]
    except (AttributeError, KeyError):  # not a code of NIfTI
        return 1.0, ()
    if unit not in _UNITS_MM:
        return 1.0, ()
    return _UNITS_MM[unit], (f"its lengths were converted to mm: its header has the unit {unit}",)


def _stored_sizes(image: SpatialImage) -> list[float]:
    """The voxel sizes in pixdim as stored; nibabel replaces 0 by 1."""
    sizes = [float(size) for size in image.header.get_zooms()[:3]]
    if 1 in sizes:
        with image.file_map["image"].get_prepare_fileobj("rb") as file:
            stored = type(image.header).from_fileobj(file, check=False)
        sizes = [abs(float(size)) for size in stored["pixdim"][1:4]]
    return sizes


def _coded(header: Nifti1Header, kind: str) -> np.ndarray | None:
    """The sform or qform of a header; None if its code is 0, or its numbers are not an affine."""
    try:
        affine, code = getattr(header, f"get_{kind}")(coded=True)
    except Exception:  # a quaternion of arbitrary bytes
        return np.full((4, 4), np.nan)
    return np.asarray(affine, float) if code else None


def _invertible(affine: np.ndarray) -> bool:
    return bool(np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) >= 1e-9)


def _read_array(path: Path, image: SpatialImage, header: Header) -> np.ndarray:
    """The voxels in the machine's byte order, (x, y, z) along the stored axes."""
    try:
        array = _stored_array(path, image).reshape(header.shape)
    except InputError:
        raise
    except MemoryError:
        raise InputError(
            path, f"{image.shape} voxels do not fit into memory", "Check its header, or crop it."
        ) from None
    except Exception as error:  # damaged bytes make nibabel fail in any of its functions
        raise _unreadable(path, error) from None
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _stored_array(path: Path, image: SpatialImage) -> np.ndarray:
    """The voxels as nibabel returns them; those of a gzip file are checked."""
    from nibabel.arrayproxy import ArrayProxy

    stored = image.dataobj
    if not (str(path).lower().endswith(".gz") and isinstance(stored, ArrayProxy)):
        return np.asarray(stored)
    with gzip.open(path) as file:
        spec = (stored.shape, stored.dtype, stored.offset, stored.slope, stored.inter)
        array = np.asarray(ArrayProxy(file, spec))
        _read_to_the_end(path, file)
    return array


def _read_to_the_end(path: Path, file: gzip.GzipFile) -> None:
    """Make gzip check the voxels, which it does only where its stream ends; nibabel stops before.

    Raises:
        InputError: there is far more than the voxels.
        OSError, EOFError, zlib.error: the stream is damaged or truncated.
    """
    left = LARGEST_VOXELS
    try:
        while chunk := file.read(_CHUNK):
            left -= len(chunk)
            if left < 0:
                raise InputError(path, "unpacks to far more than its header claims", "Convert or copy the file again.")
    except gzip.BadGzipFile as error:
        # Bytes that are not gzip's may follow the stream, which is intact; only the text of the error shows it.
        if "Not a gzipped file" not in str(error):
            raise


def _stored_step(image: SpatialImage) -> float:
    """Difference of neighbouring stored integers; 0 if floats are stored."""
    slope = getattr(image.dataobj, "slope", 0.0)
    return float(slope) if image.get_data_dtype().kind in "biu" and np.isfinite(slope) else 0.0


def whole_numbers(array: np.ndarray, tolerance: float = LABEL_TOLERANCE) -> np.ndarray:
    """Labels, (x, y, z), as uint8 where each is at most this far from a number from 0 to 255; otherwise unchanged."""
    if array.dtype == np.uint8:
        return array
    largest, whole = np.iinfo(np.uint8).max, np.empty(array.shape, np.uint8)
    # Slice by slice: a scaled volume is float64, and another copy of it would be too large.
    for k in range(array.shape[2]):
        values = array[:, :, k]
        rounded = np.clip(np.rint(values), 0, largest)
        # "not <=" is true for NaN as well.
        if not (np.abs(values - rounded) <= min(tolerance, 0.01)).all():
            return array
        whole[:, :, k] = rounded
    return whole


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(path, f"cannot be read as NIfTI ({error})", "Convert or copy the file again.")


def write_volume(path: Path, volume: Volume) -> None:
    """Write a volume as NIfTI, atomically, in the array's dtype; equal volumes give identical files."""
    import nibabel

    image = nibabel.Nifti1Image(volume.array, volume.affine, dtype=volume.array.dtype)
    image.header.set_xyzt_units("mm")
    image.set_sform(volume.affine, code="scanner")
    image.set_qform(volume.affine, code="scanner")
    with atomic_path(path) as temporary:
        nibabel.save(image, temporary)


def model_grid(
    volume: Volume, size: tuple[int, int, int], mask: np.ndarray | None = None, margin_mm: float = 0.0
) -> np.ndarray:
    """The affine of a grid of `size` cells along the axes of `volume`, true to the patient.

    The outer edges of the grid's cells (not their centres) lie on the outer edges of the volume's voxels, or, with a
    mask, on those of the mask's bounding box plus the margin, which may reach beyond the volume.

    Args:
        volume: the scan, RAS+.
        size: cells along x, y, z.
        mask: (x, y, z) bool with at least one voxel; None covers the whole field of view.
        margin_mm: distance from the mask's box to the grid's edge on each side, in mm.

    Returns:
        (4, 4) affine, cell index -> mm.
    """
    low, high = np.zeros(3), np.array(volume.shape, float)
    if mask is not None:
        margin = margin_mm / volume.spacing_mm
        box = bounding_box(mask)
        low = np.array([side.start for side in box]) - margin
        high = np.array([side.stop for side in box]) + margin
    step = (high - low) / np.array(size)
    cell_to_voxel = np.diag([*step, 1.0])
    cell_to_voxel[:3, 3] = low + step / 2 - 0.5
    return volume.affine @ cell_to_voxel


def per_axis(values: Iterable[T]) -> tuple[T, T, T]:
    """Three values for x, y and z as a tuple: a shape, a `Box`, a position."""
    x, y, z = values
    return x, y, z


def bounding_box(mask: np.ndarray) -> Box:
    """The bounding box of the true voxels of a mask; the mask must have one."""
    used = (np.flatnonzero(mask.any(axis=others)) for others in ((1, 2), (0, 2), (0, 1)))
    return per_axis(slice(int(indices[0]), int(indices[-1]) + 1) for indices in used)


def resample_image(volume: Volume, affine: np.ndarray, shape: tuple[int, int, int], outside: float = AIR_HU) -> Volume:
    """Resample onto a grid with parallel axes without aliasing: the mean of the linear interpolant over each cell.

    Larger cells average their area, smaller ones interpolate linearly. From the outermost voxel centres to the
    volume's edge the interpolant is constant; beyond the edge it is `outside`.

    Args:
        volume: the image, in any orientation.
        affine: (4, 4) of the target grid, RAS+, its axes parallel to the volume's (see `model_grid`).
        shape: cells of the target along x, y, z.
        outside: value beyond the volume.

    Returns:
        float32 on the target grid.

    Raises:
        ValueError: the axes are not parallel.
    """
    source = volume.canonical()
    weights = [
        _interpolant_weights(n, edges) for n, edges in zip(source.shape, _edges(source, affine, shape), strict=True)
    ]
    return Volume(_weighted_means(source.array, weights, outside), np.array(affine, float))


def occupancy(mask: Volume, affine: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """The share of each target cell covered by a mask, exact for grids with parallel axes, finer or coarser.

    Args:
        mask: bool, in any orientation.
        affine: (4, 4) of the target grid, RAS+, its axes parallel to the mask's (see `model_grid`).
        shape: cells of the target along x, y, z.

    Returns:
        float32 in [0, 1], of `shape`.

    Raises:
        ValueError: the axes are not parallel.
    """
    source = mask.canonical()
    if not source.array.any():
        return np.zeros(shape, np.float32)
    weights = [_overlap_weights(n, edges) for n, edges in zip(source.shape, _edges(source, affine, shape), strict=True)]
    box = bounding_box(source.array)
    within = [axis_weights[:, side] for axis_weights, side in zip(weights, box, strict=True)]
    share = _weighted_means(source.array[box], within, 0.0)
    return np.clip(share, 0.0, 1.0, out=share)


def _edges(source: Volume, affine: np.ndarray, shape: tuple[int, int, int]) -> list[np.ndarray]:
    """For each axis the edges of the target's cells in voxel coordinates of the source (voxel i spans i +- 0.5)."""
    cell_to_voxel = np.linalg.solve(source.affine, np.asarray(affine, float))
    steps = np.diag(cell_to_voxel)[:3]
    drift = np.abs(cell_to_voxel[:3, :3] - np.diag(steps)) * np.array(shape)
    if (steps <= 0).any() or drift.max() > 0.05:
        raise ValueError("the axes of the target grid are not parallel to the volume's")
    return [
        first + (np.arange(n + 1) - 0.5) * step
        for n, step, first in zip(shape, steps, cell_to_voxel[:3, 3], strict=True)
    ]


def _overlap_weights(voxels: int, edges: np.ndarray) -> np.ndarray:
    """(cells, voxels): the share of each cell that each voxel covers."""
    covered = np.clip(edges[:, None] - np.arange(voxels) + 0.5, 0, 1)
    return np.diff(covered, axis=0) / np.diff(edges)[:, None]


def _interpolant_weights(voxels: int, edges: np.ndarray) -> np.ndarray:
    """(cells, voxels): each voxel's weight in the mean of the linear interpolant over each cell."""
    # An extra voxel at each end repeats the outermost value, which makes the interpolant constant there.
    offset = np.clip(edges, -0.5, voxels - 0.5)[:, None] - np.arange(-1, voxels + 1)
    rising = np.clip(offset + 1, 0, 1) ** 2 / 2
    falling = (1 - np.clip(1 - offset, 0, 1) ** 2) / 2
    weights = np.diff(rising + falling * (offset > 0), axis=0) / np.diff(edges)[:, None]
    weights[:, 1] += weights[:, 0]
    weights[:, -2] += weights[:, -1]
    return weights[:, 1:-1]


def _weighted_means(array: np.ndarray, weights: list[np.ndarray], outside: float) -> np.ndarray:
    """The separable weighted sum over a volume; the part of a cell outside all voxels counts as `outside`."""
    x, y, z = (axis_weights.astype(np.float32) for axis_weights in weights)
    used = np.flatnonzero(z.any(axis=0))
    in_plane = np.zeros((len(x), len(y), len(used)), np.float32)
    along_x, along_y = _bands(x), _bands(y)
    rows_done = np.empty((len(x), array.shape[1]), np.float32)
    # Slice by slice: an additional float copy of the scan might not fit into memory.
    for place, k in enumerate(used):
        values = array[:, :, k].astype(np.float32) - np.float32(outside)
        for cells, voxels, part in along_x:
            np.matmul(part, values[voxels], out=rows_done[cells])
        for cells, voxels, part in along_y:
            in_plane[:, cells, place] = rows_done[:, voxels] @ part.T
    means = in_plane @ z[:, used].T
    means += np.float32(outside)
    return means


def _bands(weights: np.ndarray) -> list[tuple[slice, slice, np.ndarray]]:
    """Some cells, the voxels that they depend on, and their weights: nearly all others of (cells, voxels) are 0."""
    bands = []
    for first in range(0, len(weights), _BAND_CELLS):
        cells = slice(first, min(first + _BAND_CELLS, len(weights)))
        used = np.flatnonzero(weights[cells].any(axis=0))
        voxels = slice(int(used[0]), int(used[-1]) + 1) if used.size else slice(0, 0)
        bands.append((cells, voxels, np.ascontiguousarray(weights[cells, voxels])))
    return bands


def tilt_degrees(affine: np.ndarray) -> float:
    """Deviation of the axes of an affine, (4, 4), from perpendicular, in degrees."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return float(np.degrees(np.arcsin(np.clip(np.abs(axes.T @ axes - np.eye(3)).max(), 0, 1))))


def is_sheared(affine: np.ndarray) -> bool:
    """Whether the axes of an affine, (4, 4), are not perpendicular, e.g. because the gantry was tilted."""
    return tilt_degrees(affine) > SHEAR_TOLERANCE_DEGREES


def upright_grid(affine: np.ndarray, shape: tuple[int, int, int]) -> tuple[np.ndarray, tuple[int, int, int]]:
    """The orthogonal grid that covers a sheared one, edge to edge.

    The slices (z) keep their planes: only their offsets within the plane change. So there is no interpolation between
    slices, no air is added above or below them, and a lung that is cut off by the scan's last slice still ends on the
    last slice.

    Args:
        affine: (4, 4), voxel index -> mm, in the closest RAS+ orientation.
        shape: voxels of the sheared grid along x, y, z.

    Returns:
        (affine, shape) of the orthogonal grid, RAS+.
    """
    directions, sheared = np.linalg.qr(affine[:3, :3])
    # A QR decomposition is unique up to signs: the new axes point where the old ones do.
    signs = np.sign(np.diag(sheared))
    directions, sheared = directions * signs, sheared * signs[:, None]
    spacing = np.diag(sheared)
    corners = np.stack(np.meshgrid(*([-0.5, n - 0.5] for n in shape), indexing="ij"), -1).reshape(-1, 3)
    reached = corners @ sheared.T / spacing
    low, high = reached.min(axis=0), reached.max(axis=0)
    upright = np.eye(4)
    upright[:3, :3] = directions * spacing
    upright[:3, 3] = affine[:3, 3] + upright[:3, :3] @ (low + 0.5)
    return upright, per_axis(int(n) for n in np.ceil(high - low - 1e-6))


def resample_upright(volume: Volume, labels: bool = False, outside: float = AIR_HU) -> Volume:
    """Resample a volume with a sheared affine (see `is_sheared`) onto the orthogonal grid that covers it.

    The grid depends only on affine and shape (see `upright_grid`): a CT and its labels end up on the same grid.

    Args:
        volume: HU, or labels; in any orientation.
        labels: nearest voxel, and 0 outside; otherwise linear interpolation.
        outside: value beyond the volume, except for labels.

    Returns:
        The volume in the closest RAS+ orientation, with the input's dtype (bool as bool).
    """
    import SimpleITK

    source = volume.canonical()
    affine, shape = upright_grid(source.affine, source.shape)
    # SimpleITK's images cannot have sheared axes. So both grids are index spaces (spacing 1, no directions), and the
    # transform from the target's indices to the source's holds the whole geometry.
    to_source = np.linalg.solve(source.affine, affine)
    transform = SimpleITK.AffineTransform(3)
    transform.SetMatrix(to_source[:3, :3].ravel().tolist())
    transform.SetTranslation(to_source[:3, 3].tolist())
    stored = source.array.view(np.uint8) if source.array.dtype == bool else source.array
    moved = SimpleITK.Resample(
        SimpleITK.GetImageFromArray(stored.T),
        shape,
        transform,
        SimpleITK.sitkNearestNeighbor if labels else SimpleITK.sitkLinear,
        (0.0, 0.0, 0.0),
        (1.0, 1.0, 1.0),
        np.eye(3).ravel().tolist(),
        0.0 if labels else float(outside),
        SimpleITK.sitkUnknown if labels else SimpleITK.sitkFloat32,
    )
    array = SimpleITK.GetArrayFromImage(moved).T
    if source.array.dtype.kind in "iu" and not labels:
        array = np.rint(array)
    return Volume(array.astype(source.array.dtype), affine)


def slice_windows(hu: np.ndarray, axis: int) -> Window:
    """The minimum and maximum HU of each slice across an axis, for `to_model_range` and `to_hu`.

    Published Lung-DDPM scales its volumes this way (arXiv 2502.15204), which loses the HU common to all slices.

    Returns:
        Two float32 arrays that broadcast over `hu`; a slice of one value gets a window of 1 HU above it.
    """
    others = tuple(place for place in range(hu.ndim) if place != axis)
    low = hu.min(axis=others, keepdims=True).astype(np.float32)
    return low, np.maximum(hu.max(axis=others, keepdims=True).astype(np.float32), low + 1)


def whole_hu(values: np.ndarray) -> np.ndarray:
    """HU as int16: rounded, at least -1024, at most what int16 can hold."""
    whole = np.rint(values) if values.dtype.kind == "f" else values
    return np.clip(whole, AIR_HU, np.iinfo(np.int16).max).astype(np.int16)


def to_model_range(hu: np.ndarray, window_hu: Window) -> np.ndarray:
    """HU -> [-1, 1] float32, linear over the window, clipped outside it."""
    low, high = window_hu
    return (np.clip(hu, low, high).astype(np.float32) - low) * (2 / (high - low)) - 1


def to_hu(values: np.ndarray, window_hu: Window) -> np.ndarray:
    """A network's [-1, 1] -> HU as int16, the inverse of `to_model_range` up to rounding.

    Raises:
        InputError: NaN or infinite values.
    """
    if not np.isfinite(values).all():
        remedy = "Set training.precision: bf16 or fp32 if it is fp16, or train the generator again."
        raise InputError("drawing", "the network returned NaN or infinite values", remedy)
    low, high = window_hu
    return np.rint((np.clip(values, -1, 1).astype(np.float64) + 1) * ((high - low) / 2) + low).astype(np.int16)
