"""Lung-DDPM+: nodule by nodule, the denoiser redraws a crop of the reference; all else stays the reference's own.

The crop is drawn from the noise that gives the reference again (its inversion), but for the nodule, where the noise is
fresh. So it resembles the reference around the nodule, and is blended into it over some distance.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lungddpm.config.models import Config
from lungddpm.core.errors import InputError
from lungddpm.core.labels import Label
from lungddpm.core.volume import to_hu, to_model_range
from lungddpm.generators import ADDED, OWN, Generator, Task
from lungddpm.generators.lung_ddpm import fill_open_voxels, window_of

CITATION = (
    "Lung-DDPM+: Efficient Thoracic CT Image Synthesis using Diffusion Probabilistic Model, arXiv 2508.09327, 2025."
)
DENOISER = "lung_ddpm_plus"
LAYOUTS = OWN, ADDED


@dataclass(frozen=True)
class Crop:
    """A cube of a volume in which nodule voxels are drawn.

    Attributes:
        where: its place in the volume.
        drawn: (edge, edge, edge) bool: the nodule voxels that this crop draws.
        weight: (edge, edge, edge) float32: the share of what is drawn in the result; 1 in the nodule and one voxel
            around it, then falling to 0, which it is where the crop meets the rest of the volume.
    """

    where: tuple[slice, slice, slice]
    drawn: np.ndarray
    weight: np.ndarray


def load(config: Config, weights: Path, device: str) -> Generator:
    """Load the denoiser onto the device.

    Raises:
        ConfigError: the config has no section `lung_ddpm_plus`.
        InputError: see `load_denoiser`.
    """
    import torch

    from lungddpm.models.accelerator import make_accelerator
    from lungddpm.models.checkpoint import load_denoiser
    from lungddpm.models.denoiser import condition_channels
    from lungddpm.models.published_sampling import choose_solver
    from lungddpm.models.sampling import invert, redraw, sample_free
    from lungddpm.models.schedule import cosine_betas

    config = config.for_denoiser(DENOISER)
    accelerator = make_accelerator(device, config.diffusion.training.precision)
    denoiser = load_denoiser(weights, config, accelerator.device)
    sampling, classes = config.diffusion.sampling, config.diffusion.classes
    betas = cosine_betas(config.diffusion.timesteps)
    solver = choose_solver(sampling.sampler, sampling.order, betas, sampling.steps, sampling.times, sampling.levels)

    def to_device(arrays: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.stack(arrays).transpose(0, 3, 2, 1)[:, None].copy()).to(accelerator.device)

    def draw(
        clean: list[np.ndarray], layouts: list[np.ndarray], crops: list[Crop], generators: list[torch.Generator]
    ) -> np.ndarray:
        """Crops with other nodules; (x, y, z) arrays in and out, CT in [-1, 1]."""
        condition = torch.from_numpy(np.stack([condition_channels(layout, classes) for layout in layouts]))
        condition = condition.to(accelerator.device)
        drawn = to_device([crop.drawn for crop in crops])
        # What does not count in the result.
        outside = [
            (crop.weight == 0) | (layout == Label.BACKGROUND) for crop, layout in zip(crops, layouts, strict=True)
        ]
        fresh = [torch.randn(drawn.shape[1:], generator=each, device=each.device) for each in generators]
        with accelerator.autocast():
            path = invert(denoiser, solver, condition, to_device(clean))
            start = torch.where(drawn, torch.stack(fresh), path[0])
            if sampling.aas == "published":
                made = sample_free(denoiser, solver, condition, generators, start)
            else:
                made = redraw(denoiser, solver, condition, start, path, fixed_mask=to_device(outside))
        return made[:, 0].cpu().numpy().transpose(0, 3, 2, 1)

    def make(tasks: list[Task]) -> list[np.ndarray]:
        crops = [plan_crops(task.layout.array, config.diffusion.training.crop) for task in tasks]
        generators = [torch.Generator(accelerator.device).manual_seed(task.seed) for task in tasks]
        volumes = [task.reference.array.astype(np.float32) for task in tasks]
        for turn in range(max(map(len, crops))):
            busy = [place for place, planned in enumerate(crops) if turn < len(planned)]
            chosen = [crops[place][turn] for place in busy]
            before = [volumes[place][crop.where] for place, crop in zip(busy, chosen, strict=True)]
            windows = [window_of(hu, config) for hu in before]
            made = draw(
                [to_model_range(hu, window) for hu, window in zip(before, windows, strict=True)],
                [tasks[place].layout.array[crop.where] for place, crop in zip(busy, chosen, strict=True)],
                chosen,
                [generators[place] for place in busy],
            )
            for hu, crop, values, window in zip(before, chosen, made, windows, strict=True):
                hu += crop.weight * (to_hu(values, window) - hu)
        rounded = [np.rint(volume).astype(np.int16) for volume in volumes]
        return [fill_open_voxels(task, hu) for task, hu in zip(tasks, rounded, strict=True)]

    return Generator(make, str(accelerator.device))


def plan_crops(layout: np.ndarray, edge: int) -> list[Crop]:
    """Crops that draw every nodule voxel of a layout once, nodule by nodule.

    What a crop draws is a quarter of its edge away from where it meets the rest of the volume. A nodule for which that
    leaves too little room is drawn in parts, in overlapping crops; each sees what those before it have drawn.

    Args:
        layout: (x, y, z) uint8 labels.
        edge: of the crops in voxels, at least 8, at most the layout's shortest.

    Raises:
        InputError: the layout has no nodule.
    """
    from scipy import ndimage

    numbers, count = ndimage.label(layout == Label.NODULE, np.ones((3, 3, 3)))
    if not count:
        raise InputError(DENOISER, "got a layout without a nodule", "Exclude the reference, or fix its layout.")
    # Where a crop is as long as the volume, it does not meet any rest of it.
    longest = [edge if size == edge else edge - 2 * (edge // 4) for size in layout.shape]
    crops = []
    for number, box in enumerate(ndimage.find_objects(numbers), start=1):
        for part in itertools.product(*map(_parts, box, longest)):
            nodule = numbers[part] == number
            if nodule.any():
                crops.append(_crop_around(part, nodule, layout.shape, edge))
    return crops


def _parts(side: slice, longest: int) -> list[slice]:
    """The fewest parts of about equal length."""
    count = -(-(side.stop - side.start) // longest)
    bounds = np.linspace(side.start, side.stop, count + 1).astype(int).tolist()
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def _crop_around(part: Sequence[slice], nodule: np.ndarray, shape: Sequence[int], edge: int) -> Crop:
    """The crop that draws the nodule voxels of a part of the volume, within the volume."""
    middles = [(side.start + side.stop) // 2 for side in part]
    starts = [min(max(middle - edge // 2, 0), size - edge) for middle, size in zip(middles, shape, strict=True)]
    drawn = np.zeros((edge,) * 3, bool)
    inside = [slice(side.start - start, side.stop - start) for side, start in zip(part, starts, strict=True)]
    drawn[tuple(inside)] = nodule
    return Crop(tuple(slice(start, start + edge) for start in starts), drawn, _weight(drawn))


def _weight(drawn: np.ndarray) -> np.ndarray:
    """See `Crop.weight`: half a cosine of the distance to the nearest drawn voxel."""
    from scipy import ndimage

    distance = ndimage.distance_transform_edt(~drawn)
    reach = len(drawn) // 4
    falling = np.clip((distance - 1) / (reach - 1), 0, 1)
    return np.where(falling < 1, (1 + np.cos(np.pi * falling)) / 2, 0).astype(np.float32)
