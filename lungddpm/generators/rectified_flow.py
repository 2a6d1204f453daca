"""Rectified flow: a network that predicts velocities draws the labelled voxels along straight paths from noise."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lungddpm.config.sections import Background, GeneratorConfig, PositiveInt, Section, UNetSettings
from lungddpm.generators import JITTERED, OWN, Drawing, Generator
from lungddpm.generators.lung_ddpm import whole_volumes

if TYPE_CHECKING:
    import torch

    from lungddpm.models.denoiser import UNet
    from lungddpm.models.recipe import Preview, Recipe

TITLE = "Rectified flow: straight paths from noise to CT, in a few Euler steps; the reference fills the rest"
CITATION = (
    "Liu, Gong, Liu: Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow, arXiv "
    "2209.03003, 2022; as in MAISI-v2, arXiv 2508.05772, 2025 (here on voxels, with the network of Lung-DDPM)."
)
FAMILY = "rectified flow"
LAYOUTS = OWN, JITTERED
PREVIEW_STEPS = 10
"""Steps for the grids of samples drawn during training."""


class FlowSampling(Section):
    """From noise to CT in Euler steps."""

    steps: PositiveInt = 30
    """Steps of equal length, each a forward pass; MAISI-v2 uses 30, and its FID is nearly as good with 10."""
    background: Background = "reference"
    """Content of the voxels that the layout leaves open: `reference`: its CT, pasted after each step (AAS);
    `generated`: drawn by the network."""
    batch_size: PositiveInt = 1
    """Volumes sampled at once on a GPU; on a CPU one at a time, so that they do not depend on each other."""


class Settings(UNetSettings):
    """Rectified flow: network, training, sampling."""

    times: Literal["uniform", "logit_normal"] = "uniform"
    """Distribution of the times in training: uniform, or the logistic function of standard normal numbers, which puts
    more weight on the middle between CT and noise."""
    sampling: FlowSampling = FlowSampling()


def recipe(config: GeneratorConfig[Settings]) -> Recipe:
    """Trained on whole volumes, or on crops around labelled voxels."""
    from lungddpm.models.denoiser import build_denoiser
    from lungddpm.models.flow import VelocityPrediction
    from lungddpm.models.objectives import WeightedError, unet_inputs
    from lungddpm.models.recipe import Recipe

    settings = config.settings
    objective = VelocityPrediction(settings.times, WeightedError.of(settings))
    return Recipe(
        build=lambda: build_denoiser(config),
        load=lambda path: _load_network(path, config, "cpu").arrange(channels_last=False, winograd=False),
        objective=lambda device: objective,
        inputs=lambda shape: unet_inputs(config, shape),
        hint=settings.hint,
    )


def preview(config: GeneratorConfig[Settings]) -> Preview:
    """A few Euler steps, whatever `sampling` sets."""
    from lungddpm.models.flow import FlowSolver
    from lungddpm.models.hints import seeing, show
    from lungddpm.models.sampling import sample_aas

    hint = config.settings.hint
    return lambda network, condition, reference, generators: sample_aas(
        seeing(network, show(hint, reference, condition)), FlowSolver(PREVIEW_STEPS), condition, reference, generators
    )


def drawing(config: GeneratorConfig[Settings]) -> Drawing:
    """One pass per step."""
    return Drawing(config.settings.sampling.steps, config.settings.sampling.batch_size)


def load(config: GeneratorConfig[Settings], weights: Path, device: str) -> Generator:
    """Load the network onto the device.

    Raises:
        InputError: see `load_network`.
    """
    from lungddpm.models.accelerator import make_accelerator
    from lungddpm.models.flow import FlowSolver
    from lungddpm.models.hints import seeing, show
    from lungddpm.models.sampling import sample_aas, sample_free

    sampling = config.settings.sampling
    accelerator = make_accelerator(device, config.settings.training.precision)
    network = _load_network(weights, config, accelerator.device)
    solver = FlowSolver(sampling.steps)

    def sample(condition: torch.Tensor, reference: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        predict = seeing(network, show(config.settings.hint, reference, condition))
        with accelerator.autocast():
            if sampling.background == "generated":
                return sample_free(predict, solver, condition, generators)
            return sample_aas(predict, solver, condition, reference, generators)

    make = whole_volumes(config, sample, accelerator.device, fill=sampling.background == "reference")
    return Generator(make, str(accelerator.device), sampling.batch_size)


def _load_network(weights: Path, config: GeneratorConfig[Settings], device: str | torch.device) -> UNet:
    from lungddpm.models.checkpoint import load_network
    from lungddpm.models.denoiser import build_denoiser, place_on_device

    return place_on_device(load_network(weights, config, lambda: build_denoiser(config), device), device)
