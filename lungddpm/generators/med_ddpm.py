"""Med-DDPM: the denoiser draws the whole volume for a layout; without AAS, even the anatomy around the lungs is
drawn."""

from __future__ import annotations

from pathlib import Path

from lungddpm.config.sections import DiffusionSettings, GeneratorConfig, GeneratorSettings, Solving, TrainedSettings
from lungddpm.generators import JITTERED, LAYOUT, OWN, Drawing, Generator
from lungddpm.generators.lung_ddpm import load_sampler

TITLE = "Med-DDPM: the diffusion model of Lung-DDPM draws the whole volume"
CITATION = (
    "Conditional Diffusion Models for Semantic 3D Brain MRI Synthesis, IEEE Journal of Biomedical and Health "
    "Informatics 28:4084, 2024 (here with the denoiser of Lung-DDPM)."
)
FAMILY = "pixel diffusion"
PUBLISHED_AS = {LAYOUT: "Med-DDPM"}
WEIGHTS_OF = "lung_ddpm"
LAYOUTS = OWN, JITTERED


class Settings(GeneratorSettings):
    """Med-DDPM: its sampling. The network is that of `lung_ddpm`."""

    sampling: Solving = Solving()

    def check_weights(self, trained: TrainedSettings) -> None:
        if isinstance(trained, DiffusionSettings) and self.sampling.steps > trained.timesteps:
            raise ValueError(
                f"sampling.steps {self.sampling.steps} exceeds timesteps {trained.timesteps} of {WEIGHTS_OF}"
            )


def load(config: GeneratorConfig[Settings], weights: Path, device: str) -> Generator:
    """Load the denoiser of Lung-DDPM onto the device.

    Raises:
        InputError: see `load_denoiser`.
    """
    return load_sampler(config.of_weights, config.settings.sampling, weights, device, aas=None)


def drawing(config: GeneratorConfig[Settings]) -> Drawing:
    """One pass per noise level."""
    return Drawing(config.settings.sampling.steps, config.settings.sampling.batch_size)
