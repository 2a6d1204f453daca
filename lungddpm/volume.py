"""Volumes: array plus affine, NIfTI in and out, the model grid, and the model's intensity range.

Arrays are indexed (x, y, z); affines map voxel indices to patient coordinates in mm, RAS+ (NIfTI's convention).
nibabel is imported where it is used: it takes a quarter of a second, which commands without images need not pay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lungddpm.errors import InputError
from lungddpm.files import atomic_path

if TYPE_CHECKING:
    import nibabel

AIR_HU = -1024
SHEAR_TOLERANCE = 1e-3
"""Cosine of the angle between two axes: rounded headers stay below it, the smallest tilt of a gantry is well above."""
LARGEST_VOXELS = 2**29
"""Of a file that is read, four times those of the largest chest CT: a small file can claim, or unpack to, any size."""

Window = tuple[float, float] | tuple[np.ndarray, np.ndarray]
"""Lowest and highest HU: of a whole volume, or arrays that broadcast over it."""


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

    def crop(self, box: tuple[slice, slice, slice]) -> Volume:
        """A box of the volume, with non-negative starts, at its place in the patient."""
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
        if self.shape != other.shape:
            return False
        corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)], float)
        corners[:, :3] *= np.array(self.shape) - 1
        return bool(np.abs(corners @ (self.affine - other.affine).T).max() <= tolerance_mm)


def read_volume(path: Path) -> Volume:
    """Read a 3-D NIfTI file in the closest RAS+ orientation, values as stored (scaled where the header says so).

    Raises:
        InputError: as `read_grid`, or the voxels are cut short or damaged, or fill more memory than there is.
    """
    image = _open_image(path)
    try:
        array = np.asarray(image.dataobj)
    except MemoryError:
        raise InputError(
            path, f"{image.shape} voxels do not fit into memory", "Check its header, or use less."
        ) from None
    except Exception as error:  # damaged bytes make nibabel fail in any of its functions
        raise _unreadable(path, error) from None
    return Volume(array, np.asarray(image.affine, float)).canonical()


def read_grid(path: Path) -> Volume:
    """The grid of a NIfTI file in the closest RAS+ orientation, from its header; the array has no memory or meaning.

    Raises:
        InputError: missing or unreadable, not 3-D, without voxels or with more than `LARGEST_VOXELS`, not one real
            number a voxel, or an affine that cannot be inverted.
    """
    image = _open_image(path)
    return Volume(np.broadcast_to(np.uint8(0), image.shape), np.asarray(image.affine, float)).canonical()


def _open_image(path: Path) -> nibabel.spatialimages.SpatialImage:
    """A NIfTI file whose header is that of a volume."""
    import nibabel

    try:
        image = nibabel.load(path)
        affine = np.asarray(image.affine, float)
    except FileNotFoundError:
        raise InputError(path, "does not exist", "Check the path.") from None
    except Exception as error:  # damaged bytes make nibabel fail in any of its functions
        raise _unreadable(path, error) from None
    if len(image.shape) != 3:
        raise InputError(path, f"has {len(image.shape)} dimensions instead of 3", "Store one 3-D volume a file.")
    if min(image.shape) < 1:
        raise InputError(path, f"has no voxels (its shape is {image.shape})", "Convert or copy the file anew.")
    if math.prod(image.shape) > LARGEST_VOXELS:
        raise InputError(
            path, f"claims {image.shape} voxels, more than {LARGEST_VOXELS:,}", "Check its header, or crop the scan."
        )
    if image.get_data_dtype().kind not in "biuf":
        raise InputError(path, "holds colours or complex numbers", "Store one number a voxel.")
    if not np.isfinite(affine).all() or not abs(np.linalg.det(affine[:3, :3])) >= 1e-9:
        raise InputError(path, "has an affine that cannot be inverted", "Write the file with its true geometry.")
    return image


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(path, f"cannot be read as NIfTI ({error})", "Convert or copy the file anew.")


def write_volume(path: Path, volume: Volume) -> None:
    """Write a volume as NIfTI, atomically, in the array's dtype; equal volumes give equal bytes."""
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
    mask, on those of the mask's bounding box widened by the margin, which may reach beyond the volume.

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


def bounding_box(mask: np.ndarray) -> tuple[slice, slice, slice]:
    """The smallest box that holds every true voxel of a mask; the mask must have one."""
    x, y = (np.flatnonzero(mask.any(axis=axes)) for axes in ((1, 2), (0, 2)))
    z = np.flatnonzero(mask.any(axis=(0, 1)))
    return tuple(slice(int(used[0]), int(used[-1]) + 1) for used in (x, y, z))


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
    """The share of each target cell that a mask covers, exact for grids with parallel axes, finer or coarser.

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
    weights = [_overlap_weights(n, edges) for n, edges in zip(source.shape, _edges(source, affine, shape), strict=True)]
    return np.clip(_weighted_means(source.array, weights, 0.0), 0.0, 1.0)


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
    # One more voxel at each end repeats the outermost value, which makes the interpolant constant there.
    offset = np.clip(edges, -0.5, voxels - 0.5)[:, None] - np.arange(-1, voxels + 1)
    rising = np.clip(offset + 1, 0, 1) ** 2 / 2
    falling = (1 - np.clip(1 - offset, 0, 1) ** 2) / 2
    weights = np.diff(rising + falling * (offset > 0), axis=0) / np.diff(edges)[:, None]
    weights[:, 1] += weights[:, 0]
    weights[:, -2] += weights[:, -1]
    return weights[:, 1:-1]


def _weighted_means(array: np.ndarray, weights: list[np.ndarray], outside: float) -> np.ndarray:
    """The separable weighted sum over a volume; the part of a cell that no voxel covers counts as `outside`."""
    x, y, z = (axis_weights.astype(np.float32) for axis_weights in weights)
    used = np.flatnonzero(z.any(axis=0))
    in_plane = np.zeros((len(x), len(y), len(used)), np.float32)
    # Slice by slice: a float copy of a whole scan would not fit beside it in a small memory.
    for place, k in enumerate(used):
        in_plane[:, :, place] = x @ (array[:, :, k].astype(np.float32) - np.float32(outside)) @ y.T
    return in_plane @ z[:, used].T + np.float32(outside)


def is_sheared(affine: np.ndarray) -> bool:
    """Whether the axes of an affine, (4, 4), are not perpendicular, as where the scanner's gantry was tilted."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.abs(axes.T @ axes - np.eye(3)).max() > SHEAR_TOLERANCE)


def upright_grid(affine: np.ndarray, shape: tuple[int, int, int]) -> tuple[np.ndarray, tuple[int, int, int]]:
    """The orthogonal grid that covers a sheared one, edge to edge.

    The slices (z) stay where they are, in their own planes: only their offsets within the plane differ. So nothing is
    interpolated between slices, no air is added above or below them, and a lung that is cut by the scan's last slice
    still ends on a last slice.

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
    return upright, tuple(int(n) for n in np.ceil(high - low - 1e-6))


def resample_upright(volume: Volume, labels: bool = False) -> Volume:
    """Resample a volume with a sheared affine (see `is_sheared`) onto the orthogonal grid that covers it.

    The grid depends on affine and shape alone (see `upright_grid`): a CT and its labels come out on one grid.

    Args:
        volume: HU, or labels; in any orientation.
        labels: take the nearest voxel, and 0 outside; else interpolate linearly, with air outside.

    Returns:
        The volume in the closest RAS+ orientation, of the dtype that came in (bool as bool).
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
        0.0 if labels else float(AIR_HU),
        SimpleITK.sitkUnknown if labels else SimpleITK.sitkFloat32,
    )
    array = SimpleITK.GetArrayFromImage(moved).T
    if source.array.dtype.kind in "iu" and not labels:
        array = np.rint(array)
    return Volume(array.astype(source.array.dtype), affine)


def slice_windows(hu: np.ndarray, axis: int) -> Window:
    """The least and the greatest HU of each slice across an axis, for `to_model_range` and `to_hu`.

    Published Lung-DDPM scales its volumes so (arXiv 2502.15204), which loses the HU that slices have in common.

    Returns:
        Two float32 arrays that broadcast over `hu`; a slice of one value gets a window of 1 HU above it.
    """
    others = tuple(place for place in range(hu.ndim) if place != axis)
    low = hu.min(axis=others, keepdims=True).astype(np.float32)
    return low, np.maximum(hu.max(axis=others, keepdims=True).astype(np.float32), low + 1)


def to_model_range(hu: np.ndarray, window_hu: Window) -> np.ndarray:
    """HU -> [-1, 1] float32, linear over the window, clipped outside it."""
    low, high = window_hu
    return (np.clip(hu, low, high).astype(np.float32) - low) * (2 / (high - low)) - 1


def to_hu(values: np.ndarray, window_hu: Window) -> np.ndarray:
    """[-1, 1] -> HU as int16, the inverse of `to_model_range` up to rounding."""
    low, high = window_hu
    return np.rint((np.clip(values, -1, 1).astype(np.float64) + 1) * ((high - low) / 2) + low).astype(np.int16)
