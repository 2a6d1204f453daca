"""Volumes: array plus affine, NIfTI in and out, the model grid, and the model's intensity range.

Arrays are indexed (x, y, z); affines map voxel indices to patient coordinates in mm, RAS+ (NIfTI's convention).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np

from lungddpm.errors import InputError
from lungddpm.files import atomic_path

AIR_HU = -1024


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

    def canonical(self) -> Volume:
        """The same volume with axes permuted and flipped to the closest RAS+ orientation; no resampling."""
        image = nibabel.as_closest_canonical(nibabel.Nifti1Image(self.array, self.affine, dtype=self.array.dtype))
        return Volume(np.asarray(image.dataobj), image.affine)

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
        InputError: missing, unreadable or cut short, not 3-D, or an affine that cannot be inverted.
    """
    try:
        image = nibabel.load(path)
        array = np.asarray(image.dataobj)
    except FileNotFoundError:
        raise InputError(path, "does not exist", "Check the path.") from None
    except (nibabel.filebasedimages.ImageFileError, OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(path, f"cannot be read as NIfTI ({error})", "Convert or copy the file anew.") from None
    if array.ndim != 3:
        raise InputError(path, f"has {array.ndim} dimensions instead of 3", "Store one 3-D volume a file.")
    affine = np.asarray(image.affine, float)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise InputError(path, "has an affine that cannot be inverted", "Write the file with its true geometry.")
    return Volume(array, affine).canonical()


def write_volume(path: Path, volume: Volume) -> None:
    """Write a volume as NIfTI, atomically, in the array's dtype; equal volumes give equal bytes."""
    image = nibabel.Nifti1Image(volume.array, volume.affine, dtype=volume.array.dtype)
    image.header.set_xyzt_units("mm")
    image.set_sform(volume.affine, code="scanner")
    image.set_qform(volume.affine, code="scanner")
    with atomic_path(path) as temporary:
        nibabel.save(image, temporary)


def to_model_range(hu: np.ndarray, window_hu: tuple[float, float]) -> np.ndarray:
    """HU -> [-1, 1] float32, linear over the window, clipped outside it."""
    low, high = window_hu
    return (np.clip(hu, low, high).astype(np.float32) - low) * (2 / (high - low)) - 1


def to_hu(values: np.ndarray, window_hu: tuple[float, float]) -> np.ndarray:
    """[-1, 1] -> HU as int16, the inverse of `to_model_range` up to rounding."""
    low, high = window_hu
    return np.rint((np.clip(values, -1, 1).astype(np.float64) + 1) * ((high - low) / 2) + low).astype(np.int16)
