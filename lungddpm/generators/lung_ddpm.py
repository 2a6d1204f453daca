"""Lung-DDPM: the denoiser draws what the layout names, the reference fills the rest (anatomically aware sampling)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lungddpm.config.models import Config
from lungddpm.core.labels import Label
from lungddpm.core.volume import Window, slice_windows, to_hu, to_model_range
from lungddpm.generators import JITTERED, OWN, Generator, Task

CITATION = "Lung-DDPM: Semantic Layout-guided Diffusion Models for Thoracic CT Image Synthesis, arXiv 2502.15204, 2025."
DENOISER = "diffusion"
LAYOUTS = OWN, JITTERED


def load(config: Config, weights: Path, device: str) -> Generator:
    """Load the denoiser onto the device.

    In the mode `published` of AAS, open voxels keep the noise that this mode leaves in them.

    Raises:
        InputError: see `load_denoiser`.
    """
    return load_sampler(config, weights, device, aas=True)


def load_sampler(config: Config, weights: Path, device: str, *, aas: bool) -> Generator:
    """Load the denoiser of whole volumes; without AAS it draws the open voxels as well.

    Raises:
        InputError: see `load_denoiser`.
    """
    import torch

    from lungddpm.models.accelerator import make_accelerator
    from lungddpm.models.checkpoint import load_denoiser
    from lungddpm.models.denoiser import condition_channels
    from lungddpm.models.published_sampling import choose_solver, sample_published_aas
    from lungddpm.models.sampling import sample_aas, sample_free
    from lungddpm.models.schedule import cosine_betas

    accelerator = make_accelerator(device, config.diffusion.training.precision)
    denoiser = load_denoiser(weights, config, accelerator.device)
    sampling = config.diffusion.sampling
    betas = cosine_betas(config.diffusion.timesteps)
    solver = choose_solver(sampling.sampler, sampling.order, betas, sampling.steps, sampling.times, sampling.levels)

    def sample(condition: torch.Tensor, reference: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        if not aas:
            return sample_free(denoiser, solver, condition, generators)
        if sampling.aas == "published":
            return sample_published_aas(denoiser, solver, condition, reference, generators)
        return sample_aas(denoiser, solver, condition, reference, generators, sampling.resampling)

    def make(tasks: list[Task]) -> list[np.ndarray]:
        windows = [window_of(task.reference.array, config) for task in tasks]
        references = [
            to_model_range(task.reference.array, window).transpose(2, 1, 0)[None]
            for task, window in zip(tasks, windows, strict=True)
        ]
        conditions = [condition_channels(task.layout.array, config.diffusion.classes) for task in tasks]
        with accelerator.autocast():
            drawn = sample(
                torch.from_numpy(np.stack(conditions)).to(accelerator.device),
                torch.from_numpy(np.stack(references)).to(accelerator.device),
                [torch.Generator(accelerator.device).manual_seed(task.seed) for task in tasks],
            )
        volumes = [
            to_hu(volume[0].transpose(2, 1, 0), window)
            for volume, window in zip(drawn.cpu().numpy(), windows, strict=True)
        ]
        if not aas or sampling.aas == "published":
            return volumes
        return [fill_open_voxels(task, volume) for task, volume in zip(tasks, volumes, strict=True)]

    return Generator(make, str(accelerator.device))


def window_of(hu: np.ndarray, config: Config) -> Window:
    """The HU range that the denoiser knows as [-1, 1], for an (x, y, z) CT; see `sampling.intensities`."""
    published = config.diffusion.sampling.intensities == "published"
    return slice_windows(hu, axis=2) if published else config.grid.window_hu


def fill_open_voxels(task: Task, hu: np.ndarray) -> np.ndarray:
    """Generated HU where the layout names a class, the reference's own elsewhere, also beyond the model's window."""
    return np.where(task.layout.array == Label.BACKGROUND, task.reference.array.astype(np.int16), hu)
