"""Lung-DDPM+: nodule by nodule, the denoiser redraws a crop of the reference; all else is copied from the reference.

The crop is drawn from the noise that reproduces the reference (its inversion), except in the nodule, where the noise is
fresh. So it resembles the reference around the nodule, and is blended into it over some distance.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, Field

from lungddpm.config.sections import (
    Denoiser,
    DiffusionSettings,
    GeneratorConfig,
    Grid,
    Layer,
    Name,
    PositiveInt,
    Sampling,
    Size3,
    Training,
)
from lungddpm.core.errors import InputError
from lungddpm.core.labels import Label
from lungddpm.core.volume import Box, per_axis, to_hu, to_model_range
from lungddpm.generators import ADDED, OWN, VOLUME, Drawing, Generator, Task, lung_ddpm
from lungddpm.generators.lung_ddpm import fill_open_voxels, window_of

if TYPE_CHECKING:
    import torch

    from lungddpm.models.recipe import Preview, Recipe

TITLE = "Lung-DDPM+: a diffusion model redraws crops around nodules of the reference"
CITATION = (
    "Lung-DDPM+: Efficient Thoracic CT Image Synthesis using Diffusion Probabilistic Model, arXiv 2508.09327, 2025."
)
FAMILY = "pixel diffusion in crops"
PUBLISHED_AS = {VOLUME: "Lung-DDPM+"}
LAYOUTS = OWN, ADDED


class PlusDenoiser(Denoiser):
    """The published network of Lung-DDPM+ (39.0 million parameters): one level fewer than that of Lung-DDPM."""

    multipliers: Annotated[list[PositiveInt], Field(min_length=2)] = [1, 2, 3, 4]
    """Channels of each level as multiples of `base_channels`; each level but the last halves the crop."""


class PlusTraining(Training):
    """Training on crops around nodules; as far as published, the recipe is that of Lung-DDPM."""

    crop: Annotated[int, Field(ge=8)] = 64
    """Edge of the cubic crops in voxels, each around a voxel of a nodule; sampling uses crops of the same edge."""


class PlusSampling(Sampling):
    """From the inverted reference to CT: the solver, which also computes the inversion (the same number of steps
    again)."""

    sampler: Literal["ddim", "dpmsolver++", "unipc"] = "dpmsolver++"
    """`ddim`: first order; `dpmsolver++` (as published), `unipc`: multistep."""
    order: Annotated[int, Field(ge=2, le=3)] = 3
    """Order of `dpmsolver++` and `unipc`."""
    steps: PositiveInt = 50
    """Noise levels visited, at most `timesteps`, in each direction."""
    resampling: Annotated[int, Field(ge=1, le=1)] = 1
    """Fixed: fresh noise during sampling would undo the inversion."""
    aas: Literal["corrected", "published"] = "corrected"
    """`published`: a crop starts from the reference's noise and is then drawn freely; `corrected`: voxels of the crop
    that are not used in the result follow the reference at all noise levels."""
    background: Literal["reference"] = "reference"
    """Everything except the nodules is the reference's own."""


def nodules_only(classes: list[Layer]) -> list[Layer]:
    """Allow no classes other than nodules."""
    if classes != ["nodule"]:
        raise ValueError("classes must be [nodule]")
    return classes


class CropSettings(DiffusionSettings):
    """Settings of a generator that draws nodules in crops around them."""

    classes: Annotated[list[Layer], AfterValidator(nodules_only)] = ["nodule"]
    """Layout classes that condition the denoiser: only nodules."""
    denoiser: PlusDenoiser = PlusDenoiser()
    hint: Literal["none"] = "none"
    """Fixed: the denoiser works on the reference's own crop."""
    training: PlusTraining = PlusTraining()

    def drawn_size(self, grid: Grid) -> Size3:
        """The shape of a crop."""
        return (self.training.crop,) * 3

    def decides_samples(self) -> dict[str, Any]:
        return {**super().decides_samples(), "training.crop": self.training.crop}

    def decides_fit(self) -> dict[str, Any]:
        return {**super().decides_fit(), "training.crop": self.training.crop}


class Settings(CropSettings):
    """Lung-DDPM+: its own denoiser, for crops around nodules; the defaults are the published ones."""

    run: Name = "plus"
    """Name of the run: the folder under `results/models/lung_ddpm_plus/`, part of every sample's seed."""
    sampling: PlusSampling = PlusSampling()


@dataclass(frozen=True)
class Crop:
    """A cube of a volume in which nodule voxels are drawn.

    Attributes:
        where: its place in the volume.
        nodule: number of the nodule that it draws, from `scipy.ndimage.label` with all 26 neighbours.
        drawn: (edge, edge, edge) bool: the nodule voxels that this crop draws.
        weight: (edge, edge, edge) float32: the weight of the drawn crop in the result; 1 in the nodule and one voxel
            around it, falling to 0 where the crop meets the rest of the volume.
    """

    where: Box
    nodule: int
    drawn: np.ndarray
    weight: np.ndarray


def recipe(config: GeneratorConfig[Settings]) -> Recipe:
    """Trained on crops around nodules."""
    from lungddpm.models.objectives import diffusion_recipe

    return diffusion_recipe(config, crop_centres=[Label.NODULE], needs_nodule=True)


def preview(config: GeneratorConfig[Settings]) -> Preview:
    """The nodules of a crop are drawn, the rest is pasted."""
    return lung_ddpm.preview(config)


def load(config: GeneratorConfig[Settings], weights: Path, device: str) -> Generator:
    """Load the denoiser onto the device.

    Raises:
        InputError: see `load_denoiser`.
    """
    import torch

    from lungddpm.models.accelerator import make_accelerator
    from lungddpm.models.denoiser import condition_channels
    from lungddpm.models.published_checkpoint import load_denoiser
    from lungddpm.models.published_sampling import choose_solver
    from lungddpm.models.sampling import invert, redraw, sample_free
    from lungddpm.models.schedule import cosine_betas

    accelerator = make_accelerator(device, config.settings.training.precision)
    denoiser = load_denoiser(weights, config, accelerator.device)
    sampling, classes = config.settings.sampling, config.settings.classes
    solver = choose_solver(sampling, cosine_betas(config.settings.timesteps), config.settings.prediction)

    def draw(
        clean: list[np.ndarray], layouts: list[np.ndarray], crops: list[Crop], generators: list[torch.Generator]
    ) -> np.ndarray:
        """Crops with other nodules; (x, y, z) arrays in and out, CT in [-1, 1]."""
        device = accelerator.device
        condition = torch.from_numpy(np.stack([condition_channels(layout, classes) for layout in layouts])).to(device)
        drawn = to_device([crop.drawn for crop in crops], device)
        # Voxels that are not used in the result.
        outside = [
            (crop.weight == 0) | (layout == Label.BACKGROUND) for crop, layout in zip(crops, layouts, strict=True)
        ]
        fresh = [torch.randn(drawn.shape[1:], generator=each, device=each.device) for each in generators]
        with accelerator.autocast():
            path = invert(denoiser, solver, condition, to_device(clean, device))
            start = torch.where(drawn, torch.stack(fresh), path[0])
            if sampling.aas == "published":
                made = sample_free(denoiser, solver, condition, generators, start)
            else:
                made = redraw(denoiser, solver, condition, start, path, fixed_mask=to_device(outside, device))
        return made[:, 0].cpu().numpy().transpose(0, 3, 2, 1)

    def make(tasks: list[Task]) -> list[np.ndarray]:
        crops = [plan_crops(task.layout.array, config.settings.training.crop) for task in tasks]
        generators = [torch.Generator(accelerator.device).manual_seed(task.seed) for task in tasks]
        volumes = [task.reference.array.astype(np.float32) for task in tasks]
        for turn in range(max(map(len, crops))):
            busy = [place for place, planned in enumerate(crops) if turn < len(planned)]
            chosen = [crops[place][turn] for place in busy]
            before = [volumes[place][crop.where] for place, crop in zip(busy, chosen, strict=True)]
            windows = [window_of(hu, sampling.intensities, config.grid) for hu in before]
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

    return Generator(make, str(accelerator.device), sampling.batch_size)


def drawing(config: GeneratorConfig[Settings]) -> Drawing:
    """Passes to the noise and back for each nodule."""
    sampling = config.settings.sampling
    return Drawing(2 * sampling.steps, sampling.batch_size, per_nodule=True)


def to_device(arrays: Sequence[np.ndarray], device: torch.device) -> torch.Tensor:
    """Crops (x, y, z) as a batch (N, 1, D, H, W) on the device."""
    import torch

    return torch.from_numpy(np.stack(arrays).transpose(0, 3, 2, 1)[:, None].copy()).to(device)


def plan_crops(layout: np.ndarray, edge: int) -> list[Crop]:
    """Crops that draw every nodule voxel of a layout once, nodule by nodule.

    The drawn voxels of a crop are a quarter of its edge away from where it meets the rest of the volume. A nodule that
    does not fit is drawn in parts, in overlapping crops; each sees the result of those before it.

    Args:
        layout: (x, y, z) uint8 labels.
        edge: of the crops in voxels, at least 8, at most the layout's shortest edge.

    Raises:
        InputError: the layout has no nodule.
    """
    from scipy import ndimage

    numbers, count = ndimage.label(layout == Label.NODULE, np.ones((3, 3, 3)))
    if not count:
        remedy = "Exclude the reference, or fix its layout."
        raise InputError("drawing nodule by nodule", "got a layout without a nodule", remedy)
    # Along an axis on which a crop spans the volume there is no border.
    longest = [edge if size == edge else edge - 2 * (edge // 4) for size in layout.shape]
    crops = []
    for number, box in enumerate(ndimage.find_objects(numbers), start=1):
        for part in itertools.product(*map(_parts, box, longest)):
            nodule = numbers[part] == number
            if nodule.any():
                crops.append(_crop_around(part, number, nodule, layout.shape, edge))
    return crops


def _parts(side: slice, longest: int) -> list[slice]:
    """The fewest parts of about equal length."""
    count = -(-(side.stop - side.start) // longest)
    bounds = np.linspace(side.start, side.stop, count + 1).astype(int).tolist()
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def _crop_around(part: Sequence[slice], number: int, nodule: np.ndarray, shape: Sequence[int], edge: int) -> Crop:
    """The crop that draws the nodule voxels of a part of the volume, within the volume."""
    middles = [(side.start + side.stop) // 2 for side in part]
    starts = [min(max(middle - edge // 2, 0), size - edge) for middle, size in zip(middles, shape, strict=True)]
    drawn = np.zeros((edge,) * 3, bool)
    inside = [slice(side.start - start, side.stop - start) for side, start in zip(part, starts, strict=True)]
    drawn[tuple(inside)] = nodule
    return Crop(per_axis(slice(start, start + edge) for start in starts), number, drawn, _weight(drawn))


def _weight(drawn: np.ndarray) -> np.ndarray:
    """See `Crop.weight`: half a cosine of the distance to the nearest drawn voxel."""
    from scipy import ndimage

    distance = ndimage.distance_transform_edt(~drawn)
    reach = len(drawn) // 4
    falling = np.clip((distance - 1) / (reach - 1), 0, 1)
    return np.where(falling < 1, (1 + np.cos(np.pi * falling)) / 2, 0).astype(np.float32)
