"""Pix2pix3D: a conditional GAN draws the CT of a layout in one pass; the reference may fill the rest.

It has the losses of pix2pixHD in 3-D (see `lungddpm.models.adversarial`), with an L1 error of the HU instead of the
perceptual loss. Noise is an input of the network, but no loss rewards its use: two CT of one layout differ only in fine
noise.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from lungddpm.config.sections import Background, GeneratorConfig, Grid, HintedSettings, PositiveInt, Section, Training
from lungddpm.generators import JITTERED, LAYOUT, OWN, Drawing, Generator
from lungddpm.generators.lung_ddpm import whole_volumes

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from lungddpm.config.sections import Hint
    from lungddpm.models.adversarial import Translator
    from lungddpm.models.recipe import Preview, Recipe

TITLE = "Pix2pix3D: a conditional GAN draws the lungs in one pass, the reference fills the rest"
CITATION = (
    "High-Resolution Image Synthesis and Semantic Manipulation with Conditional GANs, CVPR 2018, arXiv 1711.11585 "
    "(pix2pixHD; here in 3-D, with an L1 error of the HU instead of its perceptual loss)."
)
FAMILY = "one-pass GAN"
PUBLISHED_AS = {LAYOUT: "Pix2pix3D"}
LAYOUTS = OWN, JITTERED

_REDUCTION = 16
"""Factor by which the deepest feature map is smaller than the grid."""
_POOLED = 2
"""Factor by which the second discriminator's grid is smaller."""
_SMALLEST_MAP = 3
"""Edge of the map before a discriminator's last two convolutions, each of which removes one voxel."""


class Translation(Section):
    """The generator network: a U-Net with five levels."""

    widths: Annotated[list[PositiveInt], Field(min_length=6, max_length=6)] = [32, 32, 64, 128, 256, 32]
    """Channels of its five levels, each of which but the last halves the grid, then of its last layer."""
    norm_groups: PositiveInt = 8
    """Groups of every GroupNorm; must divide all `widths`."""

    @model_validator(mode="after")
    def _groups(self) -> Translation:
        for width in self.widths:
            if width % self.norm_groups:
                raise ValueError(f"norm_groups {self.norm_groups} does not divide {width} of widths {self.widths}")
        return self


class Discriminator(Section):
    """The two patch discriminators: one at full and one at half resolution. Used only in training."""

    channels: PositiveInt = 64
    """Channels of the first layer; they double with every further layer."""
    layers: int = 3
    """Layers between the first one and the logits. The maximum depends on the grid (or the crop): 3 at 48 voxels per
    edge, 4 at 128."""


class LossWeights(Section):
    """Weights of the network's losses; the adversarial loss has weight 1."""

    reconstruction: Annotated[float, Field(ge=0)] = 100.0
    """Weight of the error of the HU, in units of half of `grid.window_hu` (as in pix2pix; pix2pixHD has a perceptual
    loss)."""
    feature_matching: Annotated[float, Field(ge=0)] = 10.0
    """Weight of the feature matching loss: discriminator features of drawn against real CT (as published)."""


class AdversarialTraining(Training):
    """Training of the network and its discriminators, with the same learning rate."""

    steps: PositiveInt = 160_000
    """Optimizer steps of both (published: 200 passes over the cases)."""
    loss: Literal["l1", "l2"] = "l1"
    """Error of the HU: absolute (`l1`) or squared (`l2`)."""
    accumulation: PositiveInt = 1
    """Forward passes per optimizer step; per process if several share the training."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate of both Adams, whose betas are .5 and .999."""
    learning_rate_schedule: Literal["constant", "cosine"] = "cosine"
    """`cosine` decays to zero over `steps` (published: constant for the first half, then linear to zero)."""
    gradient_checkpointing: Literal[False] = False
    """Fixed: this network needs little memory."""


class TranslationSampling(Section):
    """From layout to CT."""

    background: Background = "reference"
    """Content of the voxels that the layout leaves open: `reference`: its CT, pasted; `generated`: drawn by the
    network."""


class Settings(HintedSettings):
    """Pix2pix3D: networks, losses, training, drawing."""

    network: Translation = Translation()
    discriminator: Discriminator = Discriminator()
    loss_weights: LossWeights = LossWeights()
    training: AdversarialTraining = AdversarialTraining()
    sampling: TranslationSampling = TranslationSampling()

    def decides_fit(self) -> dict[str, Any]:
        network = self.network.model_dump(mode="json")
        return super().decides_fit() | {f"network.{key}": value for key, value in network.items()}

    def check_grid(self, grid: Grid) -> None:
        super().check_grid(grid)
        crop, layers = self.training.crop, self.discriminator.layers
        for name, edges in {"grid.size": grid.size, "training.crop": grid.size if crop is None else (crop,)}.items():
            if any(edge % _REDUCTION for edge in edges):
                raise ValueError(f"{name} {list(edges)} is not divisible by {_REDUCTION}, as required by five levels")
        most = most_layers(min(grid.size) if crop is None else crop)
        if not 1 <= layers <= most:
            where = f"grid.size {list(grid.size)}" if crop is None else f"training.crop {crop}"
            raise ValueError(f"discriminator.layers {layers} does not fit {where}: it must be from 1 to {most}")


def most_layers(edge: int) -> int:
    """The largest number of discriminator layers for volumes of this edge, which must be at least 16."""
    # All but the last halve their input, and so does the layer before them.
    return (edge // _POOLED // _SMALLEST_MAP).bit_length() - 1


def recipe(config: GeneratorConfig[Settings]) -> Recipe:
    """Trained on whole volumes, or on crops around labelled voxels, where norms see other means than in drawing."""
    import torch

    from lungddpm.models.adversarial import AdversarialOptimization, Discriminators, TranslationObjective
    from lungddpm.models.denoiser import input_channels
    from lungddpm.models.objectives import WeightedError
    from lungddpm.models.recipe import Recipe

    settings = config.settings
    channels, judge, weights = input_channels(config), settings.discriminator, settings.loss_weights
    objective = TranslationObjective(WeightedError.of(settings), weights.reconstruction, weights.feature_matching)
    return Recipe(
        build=lambda: _build(config),
        load=lambda path: _load_network(path, config, "cpu"),
        objective=lambda device: objective,
        inputs=lambda shape: (torch.zeros(shape[0], channels, *shape[1:]),),
        hint=settings.hint,
        optimization=AdversarialOptimization,
        opponent=lambda: Discriminators(channels, judge.channels, judge.layers),
    )


def preview(config: GeneratorConfig[Settings]) -> Preview:
    """One pass, whatever the background in `sampling`."""
    hint = config.settings.hint
    return lambda network, condition, reference, generators: _paste(
        _draw(network, hint, condition, reference, generators), condition, reference
    )


def drawing(config: GeneratorConfig[Settings]) -> Drawing:
    """One pass."""
    return Drawing(1)


def load(config: GeneratorConfig[Settings], weights: Path, device: str) -> Generator:
    """Load the network onto the device.

    Raises:
        InputError: see `load_network`.
    """
    from lungddpm.models.accelerator import make_accelerator

    hint = config.settings.hint
    accelerator = make_accelerator(device, config.settings.training.precision)
    network = _load_network(weights, config, accelerator.device)

    def sample(condition: torch.Tensor, reference: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        with accelerator.autocast():
            return _draw(network, hint, condition, reference, generators)

    make = whole_volumes(config, sample, accelerator.device, fill=config.settings.sampling.background == "reference")
    return Generator(make, str(accelerator.device))


def _draw(
    network: torch.nn.Module,
    hint: Hint,
    condition: torch.Tensor,
    reference: torch.Tensor,
    generators: Sequence[torch.Generator],
) -> torch.Tensor:
    """(N, C, D, H, W), (N, 1, D, H, W) and a generator per volume -> CT (N, 1, D, H, W) float32.

    One pass per volume, so that it does not depend on the others.
    """
    import torch

    from lungddpm.models.hints import show
    from lungddpm.models.sampling import draw_noise

    inputs = torch.cat([draw_noise(condition, generators), condition, show(hint, reference, condition)], dim=1)
    with torch.inference_mode():
        return torch.cat([network(each[None]).float() for each in inputs])


def _paste(drawn: torch.Tensor, condition: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    from lungddpm.models.sampling import open_voxels

    return reference.where(open_voxels(condition), drawn)


def _build(config: GeneratorConfig[Settings]) -> Translator:
    from lungddpm.models.adversarial import Translator
    from lungddpm.models.denoiser import input_channels

    settings = config.settings
    network = settings.network
    return Translator(input_channels(config), network.widths, network.norm_groups, settings.orientation)


def _load_network(weights: Path, config: GeneratorConfig[Settings], device: str | torch.device) -> Translator:
    from lungddpm.models.checkpoint import load_network

    return load_network(weights, config, lambda: _build(config), device)
