"""The scanner: attenuation of each tissue, voxel positions, partial volume, kernels and noise.

Attenuation (HU) is that of unenhanced 120 kVp CT:
    lung about -850, denser at the back of supine patients: Verschakelen et al., Am. J. Roentgenol. 161:713-717, 1993
    air -1000, fat -100, blood 40, muscle 50, liver 60, cancellous bone 200, cortical bone 700: Bushberg et al., The
        Essential Physics of Medical Imaging, 3rd ed. 2012, chapter 10
    solid nodule 30, ground glass -600: Henschke et al., Am. J. Roentgenol. 178:1053-1057, 2002 (the textures); Wang et
        al., Iran. J. Radiol. 15:e61846, 2018 (HU of ground glass)

Kernels follow the textbook (Bushberg et al. 2012, chapter 10): a sharp one lifts high spatial frequencies, so that
edges overshoot and the noise of neighbouring pixels differs; a soft one blurs both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from lungddpm.core.volume import Box, per_axis
from lungddpm.sources.phantom.settings import Phantom

HU = {
    "air": -1000.0, "foam": -930.0, "couch": -150.0, "fat": -100.0, "skin": 10.0, "muscle": 50.0, "gland": 20.0,
    "blood": 40.0, "airway_wall": 0.0, "liver": 60.0, "spleen": 50.0, "fluid": 15.0, "disc": 80.0, "cartilage": 110.0,
    "cancellous": 200.0, "cortical": 700.0, "lung": -850.0, "ground_glass": -600.0, "solid": 30.0,
}  # fmt: skip
PADDING_HU = -2000
"""Outside the scanner's circle: a value that must never reach a model."""
LOWEST_HU, HIGHEST_HU = -1024, 3071
"""The range of a 12-bit scanner."""
LPS_TO_RAS = np.array([-1, -1, 1])
"""Factors that turn LPS coordinates into RAS, and back."""


@dataclass(frozen=True)
class Kernel:
    """A reconstruction kernel: its in-plane effect on an image, in addition to averaging over pixels."""

    blur_mm: float
    """Standard deviation of its Gaussian blur."""
    gain: float
    """Amplification of structures finer than `lifted_mm`."""
    lifted_mm: float
    noise_pixels: float
    """Standard deviation of the Gaussian that correlates the noise of neighbouring pixels before the kernel."""


_KERNELS = {
    # B20f, B40f and B70f are similar kernels of one vendor.
    "soft": Kernel(blur_mm=1.0, gain=0.0, lifted_mm=0.0, noise_pixels=0.6),
    "standard": Kernel(blur_mm=0.0, gain=0.0, lifted_mm=0.0, noise_pixels=0.6),
    "sharp": Kernel(blur_mm=0.0, gain=0.7, lifted_mm=0.9, noise_pixels=0.0),
}

_EVERYWHERE: Box = (slice(None), slice(None), slice(None))


@dataclass(frozen=True)
class Grid:
    """Voxel centres in LPS mm, one array per axis."""

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    pixel_mm: float
    slice_mm: float

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.x), len(self.y), len(self.z)

    @property
    def first_mm(self) -> np.ndarray:
        return np.array([self.x[0], self.y[0], self.z[0]])

    @property
    def step_mm(self) -> np.ndarray:
        return np.array([self.pixel_mm, self.pixel_mm, self.slice_mm])

    def box(self, low_mm: ArrayLike, high_mm: ArrayLike) -> Box:
        """Slices with all voxel centres between two corners, plus one voxel on each side."""
        first = np.floor((np.asarray(low_mm) - self.first_mm) / self.step_mm).astype(int)
        last = np.ceil((np.asarray(high_mm) - self.first_mm) / self.step_mm).astype(int)
        return per_axis(
            slice(min(max(a, 0), n), max(min(b + 1, n), 0)) for a, b, n in zip(first, last, self.shape, strict=True)
        )

    def coordinates(self, box: Box = _EVERYWHERE) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x, y and z in a box, each broadcasting along its own axis."""
        return self.x[box[0], None, None], self.y[None, box[1], None], self.z[None, None, box[2]]

    def share(self, distance_mm: np.ndarray) -> np.ndarray:
        """Share of each voxel behind a surface, from the signed distance of its centre (negative inside).

        True for voxels that are nearly cubes, see `painting_grid`.
        """
        return np.clip(0.5 - distance_mm / np.float32((2 * self.pixel_mm + self.slice_mm) / 3), 0, 1)

    def index_of(self, points_mm: np.ndarray) -> np.ndarray:
        """Indices of the voxels that contain the points (..., 3); may be outside the grid."""
        return np.rint((points_mm - self.first_mm) / self.step_mm).astype(int)

    def holds(self, index: np.ndarray) -> np.ndarray:
        """Whether the voxels (..., 3) are in the grid."""
        return np.all((index >= 0) & (index < self.shape), axis=-1)


def paint(hu: np.ndarray, share: np.ndarray, value: float | np.ndarray) -> None:
    """Replace that share of each voxel by a tissue of that value, in place."""
    hu += share * (value - hu)


def field_of_view(
    parameters: Phantom, body_size: float, lung_height_mm: float, rng: np.random.Generator
) -> tuple[Grid, np.ndarray]:
    """The scan's grid in the patient's frame, and the shift from that frame to the scanner's (LPS mm).

    The field of view follows the patient's size, as technologists set it.
    """
    pixel = round(parameters.pixel_mm * float(np.clip(1 + 0.7 * (body_size - 1) + rng.normal(0, 0.01), 0.95, 1.05)), 4)
    half = (parameters.matrix - 1) / 2 * pixel
    across = np.arange(parameters.matrix) * pixel - half
    off_centre = rng.normal((0, 6), 2.5)
    bottom, top = -rng.uniform(22, 38), lung_height_mm + rng.uniform(12, 24)
    z = np.arange(bottom, top, parameters.slice_mm)
    x, y, z = (a.astype(np.float32) for a in (across + off_centre[0], across + off_centre[1], z))
    grid = Grid(x, y, z, pixel, parameters.slice_mm)
    # Whole micrometres, so that DICOM's decimal strings hold the position exactly.
    first = np.round([-half, -half, rng.uniform(-400, -250)], 3)
    return grid, first - grid.first_mm


def painting_grid(scan: Grid) -> Grid:
    """The grid to paint a scan on: every slice cut into equal parts about as thick as a pixel is wide."""
    parts = max(1, round(scan.slice_mm / scan.pixel_mm))
    part_mm = scan.slice_mm / parts
    middles = (np.arange(parts) - (parts - 1) / 2) * part_mm
    z = (scan.z[:, None] + middles.astype(np.float32)).ravel()
    return Grid(scan.x, scan.y, z, scan.pixel_mm, part_mm)


def slice_means(painted: np.ndarray, scan: Grid) -> np.ndarray:
    """The mean over each slice's thickness of an array on the scan's painting grid."""
    parts = painted.shape[2] // scan.shape[2]
    total = sum((painted[:, :, part::parts] for part in range(parts)), start=np.zeros(scan.shape, np.float32))
    return total / np.float32(parts)


def acquire(hu: np.ndarray, grid: Grid, kernel: str, noise_hu: float, rng: np.random.Generator) -> np.ndarray:
    """The scanner's int16 HU for a noiseless float32 `hu` on its grid, with the kernel `soft`, `standard` or
    `sharp`."""
    noisy = _reconstruct(hu, _KERNELS[kernel], grid.pixel_mm) + _noise(grid, _KERNELS[kernel], noise_hu, rng)
    scan = np.clip(np.rint(noisy), LOWEST_HU, HIGHEST_HU).astype(np.int16)
    radius_mm = grid.pixel_mm * len(grid.x) / 2
    scan[np.hypot(grid.x[:, None] - grid.x.mean(), grid.y - grid.y.mean()) > radius_mm] = PADDING_HU
    return scan


def _reconstruct(image: np.ndarray, kernel: Kernel, pixel_mm: float) -> np.ndarray:
    """An image after the kernel, slice by slice."""
    if kernel.blur_mm:
        image = _blurred(image, kernel.blur_mm / pixel_mm)
    if kernel.gain:
        image = image + np.float32(kernel.gain) * (image - _blurred(image, kernel.lifted_mm / pixel_mm))
    return image


def _noise(grid: Grid, kernel: Kernel, sigma_hu: float, rng: np.random.Generator) -> np.ndarray:
    """Noise with that standard deviation, correlated by the kernel."""
    white = rng.standard_normal(grid.shape, np.float32)
    noise = _reconstruct(_blurred(white, kernel.noise_pixels, 0.35, mode="wrap"), kernel, grid.pixel_mm)
    return noise * np.float32(sigma_hu / noise.std())


def _blurred(image: np.ndarray, pixels: float, slices: float = 0.0, mode: str = "nearest") -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(image, (pixels, pixels, slices), mode=mode)
