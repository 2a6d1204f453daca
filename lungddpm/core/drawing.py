"""Shared by all pictures of scans: planes in radiological convention, windows, colours, and saving.

Colours are those of Okabe & Ito (2008), which any colour vision can distinguish.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import cc3d
import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from lungddpm.core.files import atomic_path
from lungddpm.core.labels import Label
from lungddpm.core.volume import Volume, per_axis

LUNG_WINDOW_HU = (-1350.0, 150.0)
"""Level -600, width 1500: the radiologist's lung window."""
MEDIASTINAL_WINDOW_HU = (-160.0, 240.0)
"""Level 40, width 400."""
LABELS = {
    Label.BACKGROUND: ("background", "#000000"),
    Label.LUNG: ("lung", "#56B4E9"),
    Label.NODULE: ("nodule", "#F0E442"),
    Label.VESSEL: ("vessel", "#D55E00"),
}
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "svg.hashsalt": "lungddpm",
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans"],
}


@dataclass(frozen=True)
class Plane:
    """An orthogonal plane of a RAS+ volume in radiological convention."""

    name: str
    axis: int
    """Voxel axis perpendicular to the plane."""
    sides: tuple[str, str, str, str]
    """Sides of the patient at the left, right, top and bottom of the picture."""


PLANES = (
    Plane("axial", axis=2, sides=("R", "L", "A", "P")),
    Plane("coronal", axis=1, sides=("R", "L", "H", "F")),
    Plane("sagittal", axis=0, sides=("A", "P", "H", "F")),
)
"""The patient's right on the left, anterior up (axial) or left (sagittal), feet down."""


def save(figure: Figure, *paths: Path, dpi: int = 160) -> None:
    """Write a figure to each path, in the format of its suffix, atomically and without dates; closes the figure."""
    for path in paths:
        metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        with plt.rc_context(STYLE), atomic_path(path) as temporary:
            figure.savefig(
                temporary, format=path.suffix[1:], dpi=dpi, metadata=metadata, facecolor="white", bbox_inches="tight"
            )
    plt.close(figure)


def oriented_slice(array: np.ndarray, plane: Plane, index: int) -> np.ndarray:
    """One slice of a RAS+ array as a picture (rows from top to bottom), in radiological convention."""
    # RAS+ axes run left to right, back to front, feet to head; every picture here runs against both of its axes.
    cut: list[slice | int] = [slice(None)] * 3
    cut[plane.axis] = index
    return array[tuple(cut)].T[::-1, ::-1]


def largest_nodule(layout: Volume) -> tuple[int, int, int]:
    """A voxel inside the layout's largest nodule, nearest its centre of mass; the grid's centre if there is none."""
    largest = cc3d.largest_k(layout.array == Label.NODULE, k=1, connectivity=26)
    return inner_voxel(largest, layout.spacing_mm) if largest.any() else per_axis(edge // 2 for edge in layout.shape)


def inner_voxel(mask: np.ndarray, spacing_mm: np.ndarray) -> tuple[int, int, int]:
    """The voxel of a mask that is nearest its centre of mass."""
    voxels = np.argwhere(mask)
    nearest = np.square((voxels - voxels.mean(axis=0)) * spacing_mm).sum(axis=1).argmin()
    return tuple(voxels[nearest].tolist())


def difference_limit(difference_hu: np.ndarray, layout: np.ndarray) -> int:
    """Limit of the colour scale of a difference: its 98th percentile in the labelled voxels, in whole hundreds of
    HU."""
    made = np.abs(difference_hu[layout != Label.BACKGROUND])
    return max(100, 100 * math.ceil(np.quantile(made, 0.98) / 100)) if made.size else 100


def size_mm(volume: Volume, plane: Plane) -> tuple[float, float]:
    """Width and height of a volume's picture in that plane."""
    sizes = np.array(volume.shape) * volume.spacing_mm
    width, height = (float(sizes[axis]) for axis in range(3) if axis != plane.axis)
    return width, height


def mark_sides(axis: plt.Axes, plane: Plane) -> None:
    """Label the four edges of a picture with the sides of the patient."""
    left_and_right = ((0.03, 0.5, "left", "center"), (0.97, 0.5, "right", "center"))
    places = (*left_and_right, (0.5, 0.97, "center", "top"), (0.5, 0.03, "center", "bottom"))
    for side, (x, y, horizontal, vertical) in zip(plane.sides, places, strict=True):
        axis.text(
            x, y, side, transform=axis.transAxes, ha=horizontal, va=vertical, color="white", fontsize=7.5,
            fontweight="bold", path_effects=[withStroke(linewidth=2, foreground="black")],
        )  # fmt: skip
