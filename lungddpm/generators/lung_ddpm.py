"""Lung-DDPM: the denoiser draws the labelled voxels, the reference fills the rest (anatomically aware sampling)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from lungddpm.config.sections import DiffusionSettings, GeneratorConfig, Grid, Intensities, Solving, TrainedSettings
from lungddpm.core.labels import Label
from lungddpm.core.volume import Window, slice_windows, to_hu, to_model_range
from lungddpm.generators import JITTERED, LAYOUT, OWN, VOLUME, Drawing, Generator, Task

if TYPE_CHECKING:
    import torch

    from lungddpm.models.recipe import Preview, Recipe

TITLE = "Lung-DDPM: a diffusion model draws the lungs, the reference fills the rest (anatomically aware sampling)"
CITATION = "Lung-DDPM: Semantic Layout-guided Diffusion Models for Thoracic CT Image Synthesis, arXiv 2502.15204, 2025."
FAMILY = "pixel diffusion"
PUBLISHED_AS = {LAYOUT: "Med-DDPM", VOLUME: "Lung-DDPM"}
LAYOUTS = OWN, JITTERED
PREVIEW_STEPS = 20
"""Steps for the grids of samples drawn during training."""


class Settings(DiffusionSettings):
    """Lung-DDPM: network, schedule, training, sampling; the defaults are the published ones."""


def recipe(config: GeneratorConfig[Settings]) -> Recipe:
    """Trained on whole volumes, or on crops around labelled voxels."""
    from lungddpm.models.objectives import diffusion_recipe

    return diffusion_recipe(config)


def preview(config: GeneratorConfig[DiffusionSettings]) -> Preview:
    """DPM-Solver++ with a few steps."""
    from lungddpm.models.hints import seeing, show
    from lungddpm.models.sampling import make_solver, sample_aas
    from lungddpm.models.schedule import cosine_betas

    timesteps, prediction, hint = config.settings.timesteps, config.settings.prediction, config.settings.hint
    solver = make_solver("dpmsolver++", 2, cosine_betas(timesteps), min(PREVIEW_STEPS, timesteps), prediction)
    return lambda network, condition, reference, generators: sample_aas(
        seeing(network, show(hint, reference, condition)), solver, condition, reference, generators
    )


def load(config: GeneratorConfig[Settings], weights: Path, device: str) -> Generator:
    """Load the denoiser onto the device.

    With `aas: published`, open voxels keep the noise that this mode leaves in them.

    Raises:
        InputError: see `load_denoiser`.
    """
    sampling = config.settings.sampling
    aas = None if sampling.background == "generated" else sampling.aas
    return load_sampler(config, sampling, weights, device, resampling=sampling.resampling, aas=aas)


def drawing(config: GeneratorConfig[Settings]) -> Drawing:
    """One pass per noise level and visit."""
    sampling = config.settings.sampling
    return Drawing(sampling.steps * sampling.resampling, sampling.batch_size)


def load_sampler(
    config: GeneratorConfig[DiffusionSettings],
    solving: Solving,
    weights: Path,
    device: str,
    *,
    resampling: int = 1,
    aas: Literal["corrected", "published"] | None,
) -> Generator:
    """Load a denoiser of whole volumes.

    Args:
        config: of the generator for which the denoiser was trained.
        solving: settings of the solver.
        weights: of the denoiser.
        device: see `make_accelerator`.
        resampling: see `Sampling`.
        aas: see `Sampling`; None: the open voxels are drawn as well.

    Raises:
        InputError: see `load_denoiser`.
    """
    from lungddpm.models.accelerator import make_accelerator
    from lungddpm.models.hints import seeing, show
    from lungddpm.models.published_checkpoint import load_denoiser
    from lungddpm.models.published_sampling import choose_solver, sample_published_aas
    from lungddpm.models.sampling import sample_aas, sample_free
    from lungddpm.models.schedule import cosine_betas

    accelerator = make_accelerator(device, config.settings.training.precision)
    denoiser = load_denoiser(weights, config, accelerator.device)
    settings = config.settings
    solver = choose_solver(solving, cosine_betas(settings.timesteps), settings.prediction)

    def sample(condition: torch.Tensor, reference: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        predict = seeing(denoiser, show(settings.hint, reference, condition))
        with accelerator.autocast():
            if aas is None:
                return sample_free(predict, solver, condition, generators)
            if aas == "published":
                return sample_published_aas(predict, solver, condition, reference, generators)
            return sample_aas(predict, solver, condition, reference, generators, resampling)

    make = whole_volumes(config, sample, accelerator.device, fill=aas == "corrected", intensities=solving.intensities)
    return Generator(make, str(accelerator.device), solving.batch_size)


def whole_volumes(
    config: GeneratorConfig[TrainedSettings],
    sample: Callable[[torch.Tensor, torch.Tensor, list[torch.Generator]], torch.Tensor],
    device: torch.device,
    *,
    fill: bool,
    intensities: Intensities = "corrected",
) -> Callable[[list[Task]], list[np.ndarray]]:
    """The `Generator.make` of a network that draws whole volumes and was trained on `condition_channels`.

    Args:
        config: of the generator for which the network was trained.
        sample: (condition (N, C, D, H, W), reference (N, 1, D, H, W), a generator per task) -> CT (N, 1, D, H, W).
        device: of these tensors.
        fill: whether to fill open voxels with the reference.
        intensities: see `Solving`.
    """
    import torch

    from lungddpm.models.denoiser import condition_channels

    def make(tasks: list[Task]) -> list[np.ndarray]:
        windows = [window_of(task.reference.array, intensities, config.grid) for task in tasks]
        references = [
            to_model_range(task.reference.array, window).transpose(2, 1, 0)[None]
            for task, window in zip(tasks, windows, strict=True)
        ]
        conditions = [condition_channels(task.layout.array, config.settings.classes) for task in tasks]
        drawn = sample(
            torch.from_numpy(np.stack(conditions)).to(device),
            torch.from_numpy(np.stack(references)).to(device),
            [torch.Generator(device).manual_seed(task.seed) for task in tasks],
        )
        made = [
            to_hu(volume[0].transpose(2, 1, 0), window)
            for volume, window in zip(drawn.cpu().numpy(), windows, strict=True)
        ]
        return [fill_open_voxels(task, hu) for task, hu in zip(tasks, made, strict=True)] if fill else made

    return make


def window_of(hu: np.ndarray, intensities: Intensities, grid: Grid) -> Window:
    """The HU range that the denoiser maps to [-1, 1], for an (x, y, z) CT; see `Solving.intensities`."""
    return slice_windows(hu, axis=2) if intensities == "published" else grid.window_hu


def fill_open_voxels(task: Task, hu: np.ndarray) -> np.ndarray:
    """Generated HU at labelled voxels, the reference's own elsewhere, even beyond the model's window."""
    return np.where(task.layout.array == Label.BACKGROUND, task.reference.array.astype(np.int16), hu)
