"""Training objectives of diffusion models: predict the noise in a CT (arXiv 2502.15204, section III), or the CT."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

from lungddpm.config.sections import DiffusionSettings, GeneratorConfig, TrainedSettings, UNetSettings
from lungddpm.core.labels import Label
from lungddpm.models.denoiser import UNet, build_denoiser, input_channels
from lungddpm.models.prediction import Prediction, target_of
from lungddpm.models.published_checkpoint import load_denoiser
from lungddpm.models.recipe import INSIDE, Batch, Network, Recipe
from lungddpm.models.schedule import add_noise, alphas_cumprod, cosine_betas

Loss = Literal["l1", "l2"]
ERRORS: dict[Loss, Callable[..., torch.Tensor]] = {"l1": F.l1_loss, "l2": F.mse_loss}
"""Losses per voxel, as functions of torch."""
Error = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(prediction and target (N, 1, D, H, W), condition (N, C, D, H, W)) -> a scalar."""


class WeightedError:
    """The weighted mean error of a prediction: nodule voxels may count more. The weights of a batch have the mean 1.

    Args:
        loss: per voxel.
        lesion_weight: of a nodule voxel, relative to others.
        nodule_channel: of the condition.
    """

    def __init__(self, loss: Loss, lesion_weight: float, nodule_channel: int):
        self.error, self.lesion_weight, self.nodule_channel = ERRORS[loss], lesion_weight, nodule_channel

    @classmethod
    def of(cls, settings: TrainedSettings) -> WeightedError:
        """With the settings of a generator's training."""
        training = settings.training
        return cls(training.loss, training.lesion_weight, settings.classes.index("nodule"))

    def __call__(self, predicted: torch.Tensor, target: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """A scalar, from tensors (N, 1, D, H, W) and the condition (N, C, D, H, W)."""
        error = self.error(predicted.float(), target, reduction="none")
        weight = torch.where(condition[:, self.nodule_channel, None] > 0, self.lesion_weight, 1.0)
        return (weight * error).mean() / weight.mean()


class DiffusionLoss:
    """The mean error of the network's prediction, at a timestep drawn uniformly.

    Args:
        timesteps: noise levels T of the cosine schedule.
        prediction: what is predicted.
        error: of the prediction.
        device: where the batches are.
    """

    def __init__(self, timesteps: int, prediction: Prediction, error: Error, device: torch.device):
        self.timesteps, self.prediction, self.error = timesteps, prediction, error
        exact = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
        self.signal = alphas_cumprod(cosine_betas(timesteps)).to(device, exact)

    def draw_level(self, generator: torch.Generator) -> torch.Tensor:
        """A timestep: int64, from 0 to T - 1."""
        return torch.randint(self.timesteps, (), generator=generator)

    def loss(self, network: Network, batch: Batch) -> torch.Tensor:
        """See `Objective.loss`."""
        noisy = add_noise(batch.clean, batch.noise, batch.levels, self.signal)
        variance = self.signal[batch.levels].view(-1, 1, 1, 1, 1)
        scales = variance.sqrt().to(noisy), (1 - variance).sqrt().to(noisy)
        target = target_of(self.prediction, batch.clean, batch.noise, *scales)
        predicted = network(torch.cat([noisy, batch.condition], dim=1), batch.levels)
        return self.error(predicted, target, batch.condition)


def unet_inputs(
    config: GeneratorConfig[UNetSettings], shape: Sequence[int], further_channels: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy CT with condition and hint, and times, for (N, D, H, W) volumes; see `build_denoiser`."""
    size, *edges = shape
    return torch.zeros(size, input_channels(config) + further_channels, *edges), torch.zeros(size).long()


def diffusion_recipe(
    config: GeneratorConfig[DiffusionSettings], crop_centres: Sequence[Label] = INSIDE, needs_nodule: bool = False
) -> Recipe:
    """The training of a denoiser of `config`, starting from fresh or from published weights."""

    def load(path: Path) -> UNet:
        # For gradients, convolutions of planes need 1.5 times the memory and are not faster.
        return load_denoiser(path, config).arrange(channels_last=False, winograd=False)

    settings = config.settings
    return Recipe(
        build=lambda: build_denoiser(config),
        load=load,
        objective=lambda device: DiffusionLoss(
            settings.timesteps, settings.prediction, WeightedError.of(settings), device
        ),
        inputs=lambda shape: unet_inputs(config, shape),
        crop_centres=crop_centres,
        needs_nodule=needs_nodule,
        hint=settings.hint,
    )
