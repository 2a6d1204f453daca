"""Adversarial training: a network draws CT for a layout, discriminators learn to distinguish it from real CT.

The losses are those of pix2pixHD (Wang et al. 2018, arXiv 1711.11585), here in 3-D: least squares (Mao et al. 2017,
arXiv 1611.04076) on patches at two scales, and feature matching. An HU error replaces the perceptual loss, whose
network was trained on photographs. Networks and the adversarial loss are MONAI's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from monai.losses import PatchAdversarialLoss
from monai.networks.nets import BasicUNet, PatchDiscriminator
from torch import nn

from lungddpm.config.sections import GeneratorConfig, Orientation, TrainedSettings
from lungddpm.models.denoiser import turned
from lungddpm.models.objectives import WeightedError
from lungddpm.models.optimization import Learner, Optimization
from lungddpm.models.recipe import Batch, Recipe, fresh

SCALES = 2
_MATCHED_LAYERS = 4
"""Feature matching is published as a sum over four layers of a discriminator; with more or fewer, it is scaled."""

Features = list[list[torch.Tensor]]
"""Per scale, the outputs of the discriminator's layers, from the first one to the logits of the patches."""


class Translator(nn.Module):
    """Draws a CT in one pass: MONAI's `BasicUNet`, with its output limited to (-1, 1) by a hyperbolic tangent.

    Args:
        in_channels: noise, layout classes and hint.
        widths: channels of the five levels, then of the last layer.
        norm_groups: groups of every GroupNorm; they divide all widths.
        orientation: of the network, see `turned`; `ras`: that of the grid.
    """

    def __init__(self, in_channels: int, widths: Sequence[int], norm_groups: int, orientation: Orientation):
        super().__init__()
        self.orientation = orientation
        norm = ("group", {"num_groups": norm_groups})
        # Transposed convolutions cause checkerboard artefacts.
        self.unet = BasicUNet(3, in_channels, 1, tuple(widths), norm=norm, upsample="nontrainable")

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, D, H, W), each edge a multiple of 16 -> (N, 1, D, H, W)."""
        if self.orientation == "published":
            return turned(self.unet(turned(inputs)).tanh())
        return self.unet(inputs).tanh()


class Discriminators(nn.Module):
    """One patch discriminator per scale; each further one sees the volume at half the resolution of the one before.

    Args:
        in_channels: CT, layout classes and hint.
        channels: of the first layer; each further one has twice as many.
        layers: between the first one and the logits.
        scales: how many discriminators.
    """

    def __init__(self, in_channels: int, channels: int, layers: int, scales: int = SCALES):
        super().__init__()
        # Batch norm would make the result for a sample depend on the others.
        of_scale = (PatchDiscriminator(3, channels, in_channels, 1, layers, norm="INSTANCE") for _ in range(scales))
        self.of_scale = nn.ModuleList(of_scale)

    def forward(self, volumes: torch.Tensor) -> Features:
        """(N, in_channels, D, H, W) -> features of each scale, (N, C, d, h, w) each."""
        features = []
        for scale, discriminator in enumerate(self.of_scale):
            if scale:
                volumes = F.avg_pool3d(volumes, 3, 2, 1, count_include_pad=False)
            features.append(discriminator(volumes))
        return features


class AdversarialObjective(Protocol):
    """The losses that an `AdversarialOptimization` minimises in turn, on one device."""

    def draw_level(self, generator: torch.Generator) -> torch.Tensor:
        """See `Objective.draw_level`."""

    def loss(self, network: nn.Module, batch: Batch, opponent: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """The network's loss (a scalar), and its output, which the opponent judges."""

    def opponent_loss(self, opponent: nn.Module, batch: Batch, drawn: torch.Tensor) -> torch.Tensor:
        """The opponent's loss: a scalar; `drawn` has no gradient."""


class TranslationObjective:
    """The losses of pix2pixHD, with an error of the HU instead of the perceptual one.

    Args:
        error: loss per voxel.
        reconstruction: its weight; that of the adversarial loss is 1.
        feature_matching: weight of the difference of features.
    """

    def __init__(self, error: WeightedError, reconstruction: float, feature_matching: float):
        self.error, self.reconstruction, self.feature_matching = error, reconstruction, feature_matching

    def draw_level(self, generator: torch.Generator) -> torch.Tensor:
        """There is one level only."""
        return torch.zeros(())

    def loss(self, network: nn.Module, batch: Batch, opponent: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """See `AdversarialObjective.loss`."""
        given = _given(batch)
        drawn = network(torch.cat([batch.noise, given], dim=1)).float()
        judged = opponent(torch.cat([drawn, given], dim=1))
        with torch.no_grad():
            real = opponent(torch.cat([batch.clean, given], dim=1))
        loss = (
            adversarial_loss(judged, taken_for_real=True)
            + self.feature_matching * feature_distance(judged, real)
            + self.reconstruction * self.error(drawn, batch.clean, batch.condition)
        )
        return loss, drawn

    def opponent_loss(self, opponent: nn.Module, batch: Batch, drawn: torch.Tensor) -> torch.Tensor:
        """See `AdversarialObjective.opponent_loss`."""
        given = _given(batch)
        return judging_loss(opponent, *(torch.cat([volumes, given], dim=1) for volumes in (batch.clean, drawn)))


def _given(batch: Batch) -> torch.Tensor:
    """What the network and its opponent are given: condition and hint, (N, C, D, H, W)."""
    return batch.condition if batch.shown is None else torch.cat([batch.condition, batch.shown], dim=1)


def adversarial_loss(features: Features, *, taken_for_real: bool) -> torch.Tensor:
    """Least squares: the mean over scales of the mean squared distance of logits from 1 (real) or 0.

    pix2pixHD sums over its scales, here two. Relative to the other losses, this one has half of its published weight.

    Args:
        features: of discriminators; the last ones are the logits.
        taken_for_real: whether the loss rewards classifying the volumes as real.
    """
    # Without the last argument, MONAI applies a leaky ReLU to the logits before squaring.
    loss = PatchAdversarialLoss("mean", "least_squares", no_activation_leastsq=True)
    return loss([scale[-1].float() for scale in features], taken_for_real, for_discriminator=True)


def judging_loss(opponent: nn.Module, real: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """The loss of discriminators, a scalar, for as many real as drawn volumes (N, C, D, H, W), in one pass."""
    judged = opponent(torch.cat([real, made]))
    of_real, of_made = ([[layer.chunk(2)[half] for layer in scale] for scale in judged] for half in range(2))
    return (adversarial_loss(of_real, taken_for_real=True) + adversarial_loss(of_made, taken_for_real=False)) / 2


def feature_distance(drawn: Features, real: Features) -> torch.Tensor:
    """Mean absolute difference of features without the logits: four times the mean over layers, mean over scales."""
    of_scales = []
    for ours, theirs in zip(drawn, real, strict=True):
        pairs = zip(ours[:-1], theirs[:-1], strict=True)
        of_scales.append(torch.stack([F.l1_loss(one.float(), other.float()) for one, other in pairs]).mean())
    return _MATCHED_LAYERS * torch.stack(of_scales).mean()


class AdversarialOptimization(Optimization):
    """An `Optimization` that also trains the recipe's opponent.

    Each pass trains the network first, then the opponent on the network's output. Each has its own Adam, with the same
    learning rate. The reported losses are the network's.
    """

    betas = 0.5, 0.999

    def __init__(self, config: GeneratorConfig[TrainedSettings], recipe: Recipe, *others: Any):
        super().__init__(config, recipe, *others)
        if recipe.opponent is None:
            raise ValueError("adversarial training needs an opponent")
        opponent = fresh(recipe.opponent, config, "opponent")
        self.opponent = Learner(opponent, self.training, self.accelerator, self.betas)
        self.learners.append(self.opponent)

    def state_dict(self) -> dict[str, Any]:
        state = {"opponent": self.opponent.network, "opponent_optimizer": self.opponent.optimizer}
        return {**super().state_dict(), **{name: each.state_dict() for name, each in state.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.opponent.network.load_state_dict(state["opponent"])
        self.opponent.optimizer.load_state_dict(state["opponent_optimizer"])

    def _pass(self, batch: Batch, step: int) -> torch.Tensor:
        # Without its wrapper for several processes, which counts the opponent's own forward passes.
        with _frozen(self.opponent.network) as judge:
            loss, drawn = self.objective.loss(self.learner.prepared, batch, judge)
            self.learner.learn(loss)
        self.opponent.learn(self.objective.opponent_loss(self.opponent.prepared, batch, drawn.detach()))
        return loss.detach()


@contextmanager
def _frozen(network: nn.Module) -> Iterator[nn.Module]:
    """Within the block, gradients pass through the network without accumulating in it."""
    network.requires_grad_(False)
    try:
        yield network
    finally:
        network.requires_grad_(True)
