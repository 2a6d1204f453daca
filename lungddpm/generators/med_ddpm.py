"""Med-DDPM: the denoiser draws the whole volume for a layout; without AAS, all around the lungs is invented, too."""

from __future__ import annotations

from pathlib import Path

from lungddpm.config.models import Config
from lungddpm.generators import JITTERED, OWN, Generator
from lungddpm.generators.lung_ddpm import load_sampler

CITATION = (
    "Conditional Diffusion Models for Semantic 3D Brain MRI Synthesis, IEEE Journal of Biomedical and Health "
    "Informatics 28:4084, 2024 (here with the denoiser of Lung-DDPM)."
)
DENOISER = "diffusion"
LAYOUTS = OWN, JITTERED


def load(config: Config, weights: Path, device: str) -> Generator:
    """Load the denoiser onto the device; `aas` and `resampling` of `diffusion.sampling` have no meaning here.

    Raises:
        InputError: see `load_denoiser`.
    """
    return load_sampler(config, weights, device, aas=False)
