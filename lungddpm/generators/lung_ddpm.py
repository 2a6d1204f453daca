"""Lung-DDPM: the denoiser draws what the layout names, the reference fills the rest (anatomically aware sampling)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lungddpm.config import Config
from lungddpm.generators import Generator, Task
from lungddpm.layouts import Label
from lungddpm.volume import to_hu, to_model_range

CITATION = "Lung-DDPM: Semantic Layout-guided Diffusion Models for Thoracic CT Image Synthesis, arXiv 2502.15204, 2025."
NEEDS_DENOISER = True


def load(config: Config, weights: Path, device: str) -> Generator:
    """Load the denoiser onto the device.

    Raises:
        InputError: the weights are missing, cut short, not ours, or trained for another grid or other classes.
    """
    import torch

    from lungddpm.diffusion.checkpoint import check_fits, load_denoiser
    from lungddpm.diffusion.denoiser import condition_channels
    from lungddpm.diffusion.device import make_accelerator
    from lungddpm.diffusion.sampling import sample
    from lungddpm.diffusion.schedule import cosine_betas

    accelerator = make_accelerator(device, config.diffusion.training.precision)
    denoiser, metadata = load_denoiser(weights, accelerator.device)
    check_fits(weights, metadata, config)
    betas = cosine_betas(config.diffusion.timesteps)
    sampling, window_hu = config.diffusion.sampling, config.grid.window_hu

    def make(tasks: list[Task]) -> list[np.ndarray]:
        references = [to_model_range(task.reference.array, window_hu).transpose(2, 1, 0)[None] for task in tasks]
        conditions = [condition_channels(task.layout.array, config.diffusion.classes) for task in tasks]
        with accelerator.autocast():
            drawn = sample(
                denoiser,
                torch.from_numpy(np.stack(conditions)).to(accelerator.device),
                betas,
                sampling.sampler,
                sampling.steps,
                [torch.Generator(accelerator.device).manual_seed(task.seed) for task in tasks],
                torch.from_numpy(np.stack(references)).to(accelerator.device),
            )
        return [
            fill_open_voxels(task, to_hu(volume[0].transpose(2, 1, 0), window_hu))
            for task, volume in zip(tasks, drawn.cpu().numpy(), strict=True)
        ]

    return Generator(make, str(accelerator.device))


def fill_open_voxels(task: Task, hu: np.ndarray) -> np.ndarray:
    """Generated HU where the layout names a class, the reference's own elsewhere, also beyond the model's window."""
    return np.where(task.layout.array == Label.BACKGROUND, task.reference.array.astype(np.int16), hu)
