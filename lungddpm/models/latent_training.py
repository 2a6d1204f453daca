"""Training of latent diffusion: the first steps train the autoencoder, the others the denoiser of its latents.

Each phase is an `Optimization` of its own; together they are one training, with one counter of steps, one state and
one file of weights. So the denoiser always comes with the autoencoder that it was trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import nn

from lungddpm.config.sections import Autoencoder, GeneratorConfig, LatentSettings, Training
from lungddpm.core.labels import Label
from lungddpm.core.progress import LOG
from lungddpm.core.volume import to_model_range
from lungddpm.models.adversarial import AdversarialOptimization, Discriminators, adversarial_loss, judging_loss
from lungddpm.models.data import TrainingData
from lungddpm.models.latent import LatentDiffusion, VoxelAutoencoder, batch_in_latents, divergence, latent_noise
from lungddpm.models.objectives import WeightedError
from lungddpm.models.optimization import Optimization
from lungddpm.models.recipe import Batch, Recipe

_LEAST_VARIANCE = 1e-8
_OPPONENT_CHANNELS, _OPPONENT_LAYERS = 32, 3


class LatentOptimization:
    """Takes the steps of both phases; see `Steps`.

    Args:
        config: of the generator.
        recipe: how its denoiser is trained.
        model: with its initial weights; it is trained in place.
        data: the cases.
        accelerator: see `Optimization`.
    """

    def __init__(
        self,
        config: GeneratorConfig[LatentSettings],
        recipe: Recipe,
        model: LatentDiffusion,
        data: TrainingData,
        accelerator: Accelerator,
    ):
        self.data, self.window_hu, self.accelerator = data, config.grid.window_hu, accelerator
        of_autoencoder, of_first = autoencoder_phase(config, recipe)
        of_denoiser = _with_training(config, config.settings.phases()[1])
        self.first = AutoencoderOptimization(of_autoencoder, of_first, model.autoencoder, data, accelerator)
        self.second = DenoiserOptimization(of_denoiser, recipe, model.denoiser, data, accelerator)
        whole = LatentDiffusion(cast(VoxelAutoencoder, self.first.average), self.second.average)
        self.average = self.second.whole = whole.to(accelerator.device)

    @property
    def phases(self) -> list[int]:
        """See `Steps`: those of the autoencoder, then those of the denoiser."""
        return [*self.first.phases, *self.second.phases]

    def take_step(self, step: int, asked_to_stop: Callable[[], bool] = lambda: False) -> torch.Tensor:
        """See `Optimization.take_step`."""
        begin = self.phases[0]
        if step < begin:
            return self.first.take_step(step, asked_to_stop)
        if step == begin:
            with self.accelerator.autocast():
                measure_latents(self.average, self.data, self.window_hu)
        return self.second.take_step(step - begin, asked_to_stop)

    def learning_rate(self, step: int) -> float:
        """The learning rate of a 0-based step; each phase has its own warmup and decay."""
        begin = self.phases[0]
        return self.first.learning_rate(step) if step < begin else self.second.learning_rate(step - begin)

    def is_finite(self) -> bool:
        """See `Optimization.is_finite`."""
        return self.first.is_finite() and self.second.is_finite()

    def state_dict(self) -> dict[str, Any]:
        """The state of both phases, and the scale of the latents."""
        scale = {name: getattr(self.average, name) for name in ("mean", "sd")}
        return {"autoencoder": self.first.state_dict(), "denoiser": self.second.state_dict(), "scale": scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from `state_dict`."""
        self.first.load_state_dict(state["autoencoder"])
        self.second.load_state_dict(state["denoiser"])
        for name, values in state["scale"].items():
            getattr(self.average, name).copy_(values)


class AutoencoderObjective:
    """What a `VoxelAutoencoder` minimises: an `AdversarialObjective`.

    Args:
        error: loss per voxel, with weight 1.
        settings: of the autoencoder, with the other weights.
    """

    def __init__(self, error: WeightedError, settings: Autoencoder):
        self.error, self.settings = error, settings

    def draw_level(self, generator: torch.Generator) -> torch.Tensor:
        """There is one level only."""
        return torch.zeros(())

    def alone(self, network: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Without an opponent: error and divergence, a scalar, and the decoded CT."""
        noise = latent_noise(batch.noise, self.settings.reduction, self.settings.latent_channels)
        decoded, mean, sd = network(batch.clean, noise)
        error = self.error(decoded, batch.clean, batch.condition)
        return error + self.settings.kl_weight * divergence(mean, sd), decoded

    def loss(self, network: nn.Module, batch: Batch, opponent: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """See `AdversarialObjective.loss`."""
        loss, decoded = self.alone(network, batch)
        fooled = adversarial_loss(opponent(decoded), taken_for_real=True)
        return loss + self.settings.adversarial_weight * fooled, decoded

    def opponent_loss(self, opponent: nn.Module, batch: Batch, drawn: torch.Tensor) -> torch.Tensor:
        """See `AdversarialObjective.opponent_loss`."""
        return judging_loss(opponent, batch.clean, drawn)


class AutoencoderOptimization(AdversarialOptimization):
    """An `AdversarialOptimization` of an autoencoder, whose opponent joins after some steps."""

    betas = 0.9, 0.999

    def __init__(self, config: GeneratorConfig[LatentSettings], *others: Any):
        super().__init__(config, *others)
        self.adversarial_from = config.settings.autoencoder.adversarial_from

    def _pass(self, batch: Batch, step: int) -> torch.Tensor:
        if step >= self.adversarial_from:
            return super()._pass(batch, step)
        loss, _ = self.objective.alone(self.learner.prepared, batch)
        self.learner.learn(loss)
        return loss.detach()


def autoencoder_phase(
    config: GeneratorConfig[LatentSettings], recipe: Recipe
) -> tuple[GeneratorConfig[LatentSettings], Recipe]:
    """The config and the recipe of the steps that train the autoencoder, given those of the whole training."""
    of_autoencoder = _with_training(config, config.settings.phases()[0])
    return of_autoencoder, autoencoder_recipe(of_autoencoder, recipe)


def autoencoder_recipe(config: GeneratorConfig[LatentSettings], recipe: Recipe) -> Recipe:
    """How the autoencoder is trained, given how the denoiser is."""
    settings, training = config.settings, config.settings.training
    error = WeightedError("l1", training.lesion_weight, settings.classes.index("nodule"))
    edge = training.crop or min(config.grid.size)
    latents, reduction = settings.autoencoder.latent_channels, settings.autoencoder.reduction
    return replace(
        recipe,
        build=lambda: VoxelAutoencoder(settings.autoencoder, training.gradient_checkpointing),
        inputs=lambda shape: (
            torch.zeros(shape[0], 1, *shape[1:]),
            torch.zeros(shape[0], latents, *(edge // reduction for edge in shape[1:])),
        ),
        before=None,
        prepares=None,
        objective=lambda device: AutoencoderObjective(error, settings.autoencoder),
        opponent=lambda: Discriminators(1, _OPPONENT_CHANNELS, opponent_layers(edge), scales=1),
        opponent_from=settings.autoencoder.adversarial_from,
        # It encodes whole volumes, so it learns from all voxels, not only from those to draw.
        crop_centres=tuple(Label),
        hint="none",
    )


def opponent_layers(edge: int) -> int:
    """Layers of the opponent for volumes with this edge (at least 6): three, or as many as fit."""
    # The first convolution and all layers but one halve the volume; the last two convolutions remove a voxel each.
    return min(_OPPONENT_LAYERS, (edge // 3).bit_length() - 1)


class DenoiserOptimization(Optimization):
    """An `Optimization` of a denoiser of latents.

    Attributes:
        whole: the averages of autoencoder and denoiser, with the scale of the latents.
    """

    whole: LatentDiffusion

    def _pass(self, batch: Batch, step: int) -> torch.Tensor:
        with self.accelerator.autocast():
            encoded = batch_in_latents(self.whole, batch)
        return super()._pass(encoded, step)


@torch.no_grad()
def measure_latents(network: LatentDiffusion, data: TrainingData, window_hu: tuple[float, float]) -> None:
    """Set the scale of the latents: mean and standard deviation of each channel over all cases."""
    sums = torch.zeros(3, network.channels, dtype=torch.float64)
    for ct in data.ct:
        volume = torch.from_numpy(to_model_range(ct, window_hu))[None, None].to(network.mean.device)
        mean, _ = network.autoencoder.encode(volume)
        values = mean.cpu().double().flatten(2)[0]
        sums += torch.stack([torch.full_like(values[:, 0], values.shape[1]), values.sum(1), values.square().sum(1)])
    number, total, squares = sums
    mean = total / number
    # A channel that the autoencoder does not use is a constant, up to rounding.
    sd = (squares / number - mean.square()).clamp(min=_LEAST_VARIANCE).sqrt()
    network.mean.copy_(mean)
    network.sd.copy_(sd)
    spread = ", ".join(f"{value:.3g}" for value in sd.tolist())
    LOG.info("Autoencoder trained; standard deviations of its latents: %s", spread)


def _with_training(config: GeneratorConfig[LatentSettings], training: Training) -> GeneratorConfig[LatentSettings]:
    return replace(config, settings=config.settings.model_copy(update={"training": training}))
