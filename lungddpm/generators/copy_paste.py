"""Control: nodules of other patients blended into the reference, in addition to its own. Augmentation without a
model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lungddpm.config.sections import GeneratorConfig, GeneratorSettings
from lungddpm.core.cases import CaseFolder
from lungddpm.core.labels import Label
from lungddpm.core.volume import AIR_HU, Volume, bounding_box, per_axis
from lungddpm.generators import ADDED, Generator, Task

if TYPE_CHECKING:
    from lungddpm.layouts.placement import MadeLayout, PlacedNodule

TITLE = "Control: nodules of other patients blended into the reference"
CITATION = (
    "Pezeshk, Petrick, Chen, Sahiner: Seamless Lesion Insertion for Data Augmentation in CAD Training, "
    "IEEE Transactions on Medical Imaging 36:1005, 2017 (the idea; the blending here is simpler)."
)
Settings = GeneratorSettings
LAYOUTS = ADDED, ADDED
FEATHER_VOXELS = 3
"""Distance from a pasted nodule beyond which only the reference remains."""
_GAIN_LIMITS = (0.5, 2.0)
_NEARLY_NOTHING_HU = 1.0


@dataclass(frozen=True)
class Original:
    """A nodule in its original case.

    Attributes:
        spline: (x, y, z) float32 cubic spline coefficients of its case's CT in HU.
        lung: bool, on that grid: lung and nodule, without voxels that touch vessels or walls.
        spacing_mm: of that grid, (3,).
        centre: voxel coordinates of its centroid there, (3,).
        mean_hu: over its voxels there.
    """

    spline: np.ndarray
    lung: np.ndarray
    spacing_mm: np.ndarray
    centre: np.ndarray
    mean_hu: float


def load(config: GeneratorConfig[Settings], weights: Path | None, device: str) -> Generator:
    """Needs no weights, only the donors' cases."""
    # Neighbouring samples share donors, but those of a whole cohort would not fit into memory.
    read = lru_cache(maxsize=16)(read_original)

    def make(task: Task) -> np.ndarray:
        originals = [read(task.donors[nodule.case_id], nodule.nodule) for nodule in _made(task).nodules]
        return paste_nodules(task, originals)

    return Generator(make=lambda tasks: [make(task) for task in tasks])


def read_original(folder: CaseFolder, number: int) -> Original:
    """Nodule `number` of a case.

    Raises:
        InputError: the case breaks its contract.
    """
    from scipy import ndimage

    from lungddpm.layouts.compose import nodules_on_grid
    from lungddpm.layouts.placement import read_shapes

    ct, layout = folder.read()
    (shape,) = (shape for shape in read_shapes(folder, folder.path.name, "") if shape.number == number)
    own = nodules_on_grid([shape.mask], ct.affine, ct.shape) > 0
    return Original(
        spline=ndimage.spline_filter(ct.array.astype(np.float32), output=np.float32),
        lung=ndimage.binary_erosion(np.isin(layout.array, [Label.LUNG, Label.NODULE])),
        spacing_mm=ct.spacing_mm,
        centre=np.linalg.solve(ct.affine, [*shape.centre_mm, 1])[:3],
        mean_hu=float(ct.array[own].mean()),
    )


def paste_nodules(task: Task, originals: list[Original]) -> np.ndarray:
    """The reference with the nodules that the layout adds, each rotated and scaled as it was placed.

    A linear map of HU keeps the mean HU of a nodule and makes its surrounding lung as dark as the lung at its new
    place. Around it, the reference takes over within `FEATHER_VOXELS`. Voxels outside the lungs and of other nodules
    stay exactly as they are.

    Args:
        task: with a made layout.
        originals: the nodules of that layout, in their order.

    Returns:
        (x, y, z) int16 HU.
    """
    hu, made = task.reference.array.astype(np.float32), _made(task)
    for number, (nodule, original) in enumerate(zip(made.nodules, originals, strict=True), start=1):
        cells = made.numbers == number
        box = per_axis(
            slice(max(side.start - 2 * FEATHER_VOXELS, 0), side.stop + 2 * FEATHER_VOXELS)
            for side in bounding_box(cells)
        )
        hu[box] = _blend(hu[box], task.reference.crop(box), task.layout.array[box], cells[box], nodule, original)
    return np.rint(hu).astype(np.int16)


def _made(task: Task) -> MadeLayout:
    """The task's layout, which must have added nodules, as required by `LAYOUTS`."""
    if task.made is None:
        raise ValueError("copy_paste needs a layout with an added nodule")
    return task.made


def _blend(
    hu: np.ndarray,
    reference: Volume,
    labels: np.ndarray,
    cells: np.ndarray,
    nodule: PlacedNodule,
    original: Original,
) -> np.ndarray:
    """A box of the CT with one more nodule, at `cells`."""
    from scipy import ndimage

    values, lung = _turned(original, nodule, reference)
    around = ~cells & (labels == Label.LUNG)
    is_pasted_hu = values[cells].mean()
    was_around_hu = _median(values[around & lung], is_pasted_hu)
    lies_around_hu = _median(reference.array[around], was_around_hu)
    contrast_hu = is_pasted_hu - was_around_hu
    gain = (original.mean_hu - lies_around_hu) / contrast_hu if abs(contrast_hu) > _NEARLY_NOTHING_HU else 1.0
    matched = original.mean_hu + np.clip(gain, *_GAIN_LIMITS) * (values - is_pasted_hu)
    # Vessels and walls beside the nodule are not copied.
    matched = np.maximum(np.where(cells | lung, matched, lies_around_hu), AIR_HU)
    weight = np.clip(1 - ndimage.distance_transform_edt(~cells) / FEATHER_VOXELS, 0, 1)
    weight[~cells & np.isin(labels, [Label.BACKGROUND, Label.NODULE])] = 0
    return hu + weight * (matched - hu)


def _turned(original: Original, nodule: PlacedNodule, grid: Volume) -> tuple[np.ndarray, np.ndarray]:
    """The CT around the original nodule, resampled to the grid on which the nodule is placed, and its lung mask."""
    from scipy import ndimage
    from scipy.spatial.transform import Rotation

    centre = np.linalg.solve(grid.affine, [*nodule.centre_mm, 1])[:3]
    from_centre_mm = (np.moveaxis(np.indices(grid.shape), 0, -1) - centre) * grid.spacing_mm
    turned_back_mm = Rotation.from_rotvec(nodule.rotation_degrees, degrees=True).inv().as_matrix() @ (
        from_centre_mm[..., None] / nodule.scale
    )
    at = original.centre + turned_back_mm[..., 0] / original.spacing_mm
    at = np.moveaxis(at, -1, 0)
    values = ndimage.map_coordinates(original.spline, at, order=3, mode="mirror", prefilter=False)
    return values, ndimage.map_coordinates(original.lung, at, order=0, mode="constant", cval=False)


def _median(hu: np.ndarray, otherwise: float) -> float:
    return float(np.median(hu)) if hu.size else float(otherwise)
