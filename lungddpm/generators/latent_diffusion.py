"""Latent diffusion: an autoencoder compresses CT, and a diffusion model draws its latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

from pydantic import Field, model_validator

from lungddpm.config.sections import Background, GeneratorConfig, LatentSettings, PositiveInt, Section
from lungddpm.generators import JITTERED, LAYOUT, OWN, SLICE, Drawing, Generator
from lungddpm.generators.lung_ddpm import whole_volumes

if TYPE_CHECKING:
    import torch

    from lungddpm.models.latent import LatentDiffusion
    from lungddpm.models.recipe import Preview, Recipe
    from lungddpm.models.sampling import DiffusionSolver

TITLE = "Latent diffusion: a diffusion model draws the latents of an autoencoder; the reference fills the rest"
CITATION = (
    "Rombach et al.: High-Resolution Image Synthesis with Latent Diffusion Models, CVPR 2022, arXiv 2112.10752 (here "
    "in 3-D). Of this family: Zhu et al.: Make-A-Volume, MICCAI 2023, arXiv 2307.10094; Zhu et al.: Generative "
    "Enhancement for 3D Medical Images (GEM-3D), 2024, arXiv 2403.12852."
)
FAMILY = "latent diffusion"
PUBLISHED_AS = {LAYOUT: "Make-A-Volume", SLICE: "GEM-3D"}
LAYOUTS = OWN, JITTERED
PREVIEW_STEPS = 20
"""Steps for the grids of samples drawn during training."""


class LatentSampling(Section):
    """From noise to latents, and from latents to CT."""

    sampler: Literal["ddpm", "ddim", "dpmsolver++", "unipc"] = "ddim"
    """`ddpm`: ancestral; `ddim`: first order, as GEM-3D; `dpmsolver++`, `unipc`: multistep, 20 steps suffice."""
    order: Annotated[int, Field(ge=2, le=3)] = 2
    """Order of `dpmsolver++` and `unipc`; the other samplers have none."""
    steps: PositiveInt = 200
    """Noise levels visited, at most `timesteps`."""
    background: Background = "reference"
    """Content of the voxels that the layout leaves open: `reference`: its CT, pasted after decoding; `generated`: the
    decoded CT."""
    batch_size: PositiveInt = 1
    """Volumes sampled at once on a GPU; on a CPU one at a time, so that they do not depend on each other."""


class Settings(LatentSettings):
    """Latent diffusion: autoencoder, denoiser (of latents), training of both, sampling."""

    sampling: LatentSampling = LatentSampling()

    @model_validator(mode="after")
    def _steps(self) -> Settings:
        if self.sampling.steps > self.timesteps:
            raise ValueError(f"sampling.steps {self.sampling.steps} exceeds timesteps {self.timesteps}")
        return self


def recipe(config: GeneratorConfig[Settings]) -> Recipe:
    """The autoencoder, then the denoiser: on whole volumes, or on crops around labelled voxels."""
    import torch

    from lungddpm.models.latent import LatentDiffusion, LatentError, build_latent_diffusion, denoiser_channels
    from lungddpm.models.latent_training import LatentOptimization, autoencoder_phase
    from lungddpm.models.objectives import DiffusionLoss, WeightedError
    from lungddpm.models.recipe import Recipe

    settings, reduction = config.settings, config.settings.autoencoder.reduction
    channels = settings.autoencoder.latent_channels + denoiser_channels(config)
    error = LatentError(WeightedError.of(settings), reduction)
    whole = Recipe(
        build=lambda: build_latent_diffusion(config),
        load=lambda path: load_latent_diffusion(path, config, "cpu"),
        objective=lambda device: DiffusionLoss(settings.timesteps, settings.prediction, error, device),
        inputs=lambda shape: (
            torch.zeros(shape[0], channels, *(edge // reduction for edge in shape[1:])),
            torch.zeros(shape[0]).long(),
        ),
        hint=settings.hint,
        optimization=LatentOptimization,
        # The denoiser learns from the latents of a batch.
        prepares=lambda network, shape: cast(LatentDiffusion, network).autoencoder.encode(
            torch.zeros(shape[0], 1, *shape[1:])
        ),
    )
    return replace(whole, before=lambda: autoencoder_phase(config, whole))


def preview(config: GeneratorConfig[Settings]) -> Preview:
    """DPM-Solver++ with a few steps; while the autoencoder is trained, its reconstruction of the reference."""
    import torch

    from lungddpm.models.denoiser import open_voxels
    from lungddpm.models.latent import LatentDiffusion, draw_by_latents

    solver = _solver(config, LatentSampling(sampler="dpmsolver++", steps=min(PREVIEW_STEPS, config.settings.timesteps)))

    def draw(
        network: torch.nn.Module,
        condition: torch.Tensor,
        reference: torch.Tensor,
        generators: Sequence[torch.Generator],
    ) -> torch.Tensor:
        if not isinstance(network, LatentDiffusion):
            raise TypeError(f"{type(network).__name__} does not draw latents")
        if network.knows_scale:
            drawn = draw_by_latents(network, solver, config.settings.hint, condition, reference, generators)
        else:
            drawn = network.reconstruct(reference)
        return torch.where(open_voxels(condition), reference, drawn)

    return draw


def load(config: GeneratorConfig[Settings], weights: Path, device: str) -> Generator:
    """Load autoencoder and denoiser onto the device.

    Raises:
        InputError: see `load_network`.
    """
    from lungddpm.models.accelerator import make_accelerator
    from lungddpm.models.latent import draw_by_latents

    sampling, hint = config.settings.sampling, config.settings.hint
    accelerator = make_accelerator(device, config.settings.training.precision)
    network = load_latent_diffusion(weights, config, accelerator.device)
    solver = _solver(config, sampling)

    def sample(condition: torch.Tensor, reference: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        with accelerator.autocast():
            return draw_by_latents(network, solver, hint, condition, reference, generators)

    make = whole_volumes(config, sample, accelerator.device, fill=sampling.background == "reference")
    return Generator(make, str(accelerator.device), sampling.batch_size)


def drawing(config: GeneratorConfig[Settings]) -> Drawing:
    """One pass per noise level; decoding costs about one more."""
    return Drawing(config.settings.sampling.steps + 1, config.settings.sampling.batch_size)


def load_latent_diffusion(
    weights: Path, config: GeneratorConfig[LatentSettings], device: str | torch.device
) -> LatentDiffusion:
    """The networks of a config with the weights of a file, ready to draw.

    Raises:
        InputError: see `load_network`.
    """
    from lungddpm.models.checkpoint import load_network
    from lungddpm.models.latent import build_latent_diffusion

    return load_network(weights, config, lambda: build_latent_diffusion(config), device)


def _solver(config: GeneratorConfig[Settings], sampling: LatentSampling) -> DiffusionSolver:
    """Latents are unbounded, so the denoiser's estimate is not clipped."""
    from lungddpm.models.sampling import make_solver
    from lungddpm.models.schedule import cosine_betas

    betas, prediction = cosine_betas(config.settings.timesteps), config.settings.prediction
    return make_solver(sampling.sampler, sampling.order, betas, sampling.steps, prediction, limit=lambda it: it)
