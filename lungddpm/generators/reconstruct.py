"""Floor: the reference through the autoencoder of latent diffusion. Shows the loss before any latent is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lungddpm.config.sections import GeneratorConfig, GeneratorSettings
from lungddpm.generators import OWN, Drawing, Generator
from lungddpm.generators.latent_diffusion import load_latent_diffusion
from lungddpm.generators.lung_ddpm import whole_volumes

if TYPE_CHECKING:
    import torch

TITLE = "Floor: the reference, encoded and decoded by the autoencoder of latent diffusion"
CITATION = "None: the reference CT itself, as far as the autoencoder of `latent_diffusion` keeps it."
WEIGHTS_OF = "latent_diffusion"
LAYOUTS = OWN, OWN
Settings = GeneratorSettings


def load(config: GeneratorConfig[Settings], weights: Path, device: str) -> Generator:
    """Load the autoencoder onto the device.

    Raises:
        InputError: see `load_network`.
    """
    from lungddpm.models.accelerator import make_accelerator

    of_weights = config.of_weights
    accelerator = make_accelerator(device, of_weights.settings.training.precision)
    network = load_latent_diffusion(weights, of_weights, accelerator.device)

    def sample(condition: torch.Tensor, reference: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        with accelerator.autocast():
            return network.reconstruct(reference)

    make = whole_volumes(of_weights, sample, accelerator.device, fill=True)
    return Generator(make, str(accelerator.device))


def drawing(config: GeneratorConfig[Settings]) -> Drawing:
    """Encoding and decoding cost about as much as two passes of the denoiser."""
    return Drawing(2)
