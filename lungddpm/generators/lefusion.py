"""LeFusion: a diffusion model draws nodules into the reference, each with a given histogram; all else is unchanged.

The network sees a crop around the nodule, where in it this nodule is, and a histogram of HU; other nodules in the crop
are part of the surroundings. Outside the nodule the reference is pasted at every noise level, so that the nodule
matches its surroundings. The published method also repeats noise levels (RePaint jumps), off here by default: see
`sampling.resampling`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from lungddpm.config.sections import (
    GeneratorConfig,
    PositiveFloat,
    PositiveInt,
    Sampling,
)
from lungddpm.core.files import seed_from
from lungddpm.core.labels import Label
from lungddpm.core.volume import to_hu, to_model_range
from lungddpm.generators import ADDED, OWN, Drawing, Generator, Task
from lungddpm.generators.lung_ddpm_plus import Crop, CropSettings, PlusTraining, plan_crops, to_device

if TYPE_CHECKING:
    import torch

    from lungddpm.models.denoiser import UNet
    from lungddpm.models.lesions import DiscoveryNodule
    from lungddpm.models.recipe import Preview, Recipe

TITLE = "LeFusion: a diffusion model draws nodules with given histograms, all else is the reference"
CITATION = (
    "LeFusion: Controllable Pathology Synthesis via Lesion-Focused Diffusion Models, ICLR 2025, arXiv 2403.14066 "
    "(here with the network of Lung-DDPM+)."
)
FAMILY = "nodule inpainting"
LAYOUTS = OWN, ADDED
PREVIEW_STEPS = 20
"""Steps for the grids of samples drawn during training."""


class LesionTraining(PlusTraining):
    """Training on crops around nodules; the loss covers only the nodule and one voxel around it. Published crops have
    64 x 64 x 32 voxels."""

    steps: PositiveInt = 50_000
    """Optimizer steps (published: 20,000 to 50,000)."""
    learning_rate: PositiveFloat = 1e-4
    """Peak learning rate of Adam (published)."""
    lesion_weight: Annotated[float, Field(ge=1, le=1)] = 1.0
    """Fixed: only nodules count in the loss."""


class LesionSampling(Sampling):
    """From noise to nodules; the reference is pasted around them at every noise level. The published method uses
    RePaint jumps: set `resampling` for them, at that many times the cost."""

    steps: PositiveInt = 300
    """Noise levels visited, at most `timesteps`; as published, `ddpm` visits all."""

    background: Literal["reference"] = "reference"
    """Everything except the nodules is the reference's own."""

    @model_validator(mode="after")
    def _corrected(self) -> LesionSampling:
        for key in ("aas", "intensities", "times", "levels"):
            if getattr(self, key) != "corrected":
                raise ValueError(f"{key} must be corrected: the published mode belongs to other systems")
        return self


class Settings(CropSettings):
    """LeFusion: its own network, for crops around nodules."""

    timesteps: PositiveInt = 300
    """Noise levels T of the cosine schedule (published)."""
    training: LesionTraining = LesionTraining()
    sampling: LesionSampling = LesionSampling()


def recipe(config: GeneratorConfig[Settings]) -> Recipe:
    """Trained on crops around nodules, with a loss inside the nodules; stores their histograms."""
    from lungddpm.models.lesions import BINS, LesionError, LesionLoss, keep_histograms
    from lungddpm.models.objectives import unet_inputs
    from lungddpm.models.recipe import Recipe

    settings = config.settings
    error = LesionError(settings.training.loss)
    return Recipe(
        build=lambda: _build_network(config),
        load=lambda path: _load_network(path, config, "cpu").arrange(channels_last=False, winograd=False),
        objective=lambda device: LesionLoss(settings.timesteps, settings.prediction, error, device),
        inputs=lambda shape: unet_inputs(config, shape, further_channels=BINS),
        crop_centres=[Label.NODULE],
        needs_nodule=True,
        one_nodule=True,
        keep=keep_histograms(config.grid.window_hu),
    )


def preview(config: GeneratorConfig[Settings]) -> Preview:
    """The nodule of a crop with its own histogram, by DPM-Solver++ with a few steps."""
    from lungddpm.models.lesions import draw_nodules, histograms_of, show
    from lungddpm.models.sampling import make_solver
    from lungddpm.models.schedule import cosine_betas

    settings = config.settings
    steps = min(PREVIEW_STEPS, settings.timesteps)
    solver = make_solver("dpmsolver++", 2, cosine_betas(settings.timesteps), steps, settings.prediction)

    def draw(
        network: torch.nn.Module, nodule: torch.Tensor, reference: torch.Tensor, generators: Sequence[torch.Generator]
    ) -> torch.Tensor:
        condition = show(nodule, histograms_of(reference, nodule > 0))
        return draw_nodules(network, solver, condition, reference, nodule > 0, generators, resampling=1)

    return draw


def drawing(config: GeneratorConfig[Settings]) -> Drawing:
    """One pass per noise level and visit, for each nodule."""
    sampling = config.settings.sampling
    return Drawing(sampling.steps * sampling.resampling, sampling.batch_size, per_nodule=True)


def load(config: GeneratorConfig[Settings], weights: Path, device: str) -> Generator:
    """Load the network onto the device.

    Raises:
        InputError: see `load_network` and `read_histograms`.
    """
    import torch

    from lungddpm.models.accelerator import make_accelerator
    from lungddpm.models.lesions import draw_nodules, read_histograms, show
    from lungddpm.models.sampling import make_solver
    from lungddpm.models.schedule import cosine_betas

    settings, sampling, window = config.settings, config.settings.sampling, config.grid.window_hu
    accelerator = make_accelerator(device, settings.training.precision)
    network = _load_network(weights, config, accelerator.device)
    discovery = read_histograms(weights)
    betas = cosine_betas(settings.timesteps)
    solver = make_solver(sampling.sampler, sampling.order, betas, sampling.steps, settings.prediction)

    def draw(
        hu: list[np.ndarray],
        nodules: list[np.ndarray],
        drawn: list[np.ndarray],
        histograms: list[list[float]],
        generators: list[torch.Generator],
    ) -> np.ndarray:
        """Crops, each with another nodule; (x, y, z) arrays in and out."""
        device = accelerator.device
        condition = show(2 * to_device(nodules, device).float() - 1, torch.tensor(histograms, device=device))
        reference, mask = to_device([to_model_range(each, window) for each in hu], device), to_device(drawn, device)
        with accelerator.autocast():
            made = draw_nodules(network, solver, condition, reference, mask, generators, sampling.resampling)
        return to_hu(made[:, 0].cpu().numpy().transpose(0, 3, 2, 1), window)

    def make(tasks: list[Task]) -> list[np.ndarray]:
        crops = [plan_crops(task.layout.array, settings.training.crop) for task in tasks]
        chosen = [choose_histograms(planned, discovery, task.seed) for planned, task in zip(crops, tasks, strict=True)]
        generators = [torch.Generator(accelerator.device).manual_seed(task.seed) for task in tasks]
        volumes = [task.reference.array.astype(np.int16) for task in tasks]
        numbers = [_number_voxels(planned, task.layout.shape) for planned, task in zip(crops, tasks, strict=True)]
        missing = [task.layout.array == Label.NODULE for task in tasks]
        for turn in range(max(map(len, crops))):
            busy = [place for place, planned in enumerate(crops) if turn < len(planned)]
            now = [crops[place][turn] for place in busy]
            nodules = [numbers[place][crop.where] == crop.nodule for place, crop in zip(busy, now, strict=True)]
            made = draw(
                [volumes[place][crop.where] for place, crop in zip(busy, now, strict=True)],
                nodules,
                # Includes voxels of the nodule that later crops will draw; their present content is not part of it.
                [missing[place][crop.where] & own for place, crop, own in zip(busy, now, nodules, strict=True)],
                [chosen[place][crop.nodule].histogram for place, crop in zip(busy, now, strict=True)],
                [generators[place] for place in busy],
            )
            for place, crop, hu in zip(busy, now, made, strict=True):
                volumes[place][crop.where][crop.drawn] = hu[crop.drawn]
                missing[place][crop.where][crop.drawn] = False
        return volumes

    def describe(task: Task) -> dict[str, Any]:
        crops = plan_crops(task.layout.array, settings.training.crop)
        chosen = choose_histograms(crops, discovery, task.seed)
        return {
            "histograms": [
                {"nodule": number, "case_id": one.case_id, "of_nodule": one.number, "histogram": one.histogram}
                for number, one in chosen.items()
            ]
        }

    return Generator(make, str(accelerator.device), sampling.batch_size, describe)


def choose_histograms(
    crops: Sequence[Crop], discovery: Sequence[DiscoveryNodule], seed: int
) -> dict[int, DiscoveryNodule]:
    """The discovery nodule whose histogram each drawn nodule gets, by number.

    Args:
        crops: of one layout.
        discovery: nodules to choose from.
        seed: of the task.
    """
    from lungddpm.models.lesions import choose_histogram

    voxels: Counter[int] = Counter()
    for crop in crops:
        voxels[crop.nodule] += int(crop.drawn.sum())
    return {
        number: choose_histogram(discovery, size, seed_from(seed, "histogram", number))
        for number, size in voxels.items()
    }


def _number_voxels(crops: Sequence[Crop], shape: Sequence[int]) -> np.ndarray:
    """The number of the nodule that each voxel is part of, 0 elsewhere."""
    numbers = np.zeros(shape, np.int32)
    for crop in crops:
        numbers[crop.where][crop.drawn] = crop.nodule
    return numbers


def _build_network(config: GeneratorConfig[Settings]) -> UNet:
    from lungddpm.models.denoiser import build_denoiser
    from lungddpm.models.lesions import BINS

    return build_denoiser(config, further_channels=BINS)


def _load_network(weights: Path, config: GeneratorConfig[Settings], device: str | torch.device) -> UNet:
    from lungddpm.models.checkpoint import load_network
    from lungddpm.models.denoiser import place_on_device

    return place_on_device(load_network(weights, config, lambda: _build_network(config), device), device)
