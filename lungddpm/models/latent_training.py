"""Training of latent diffusion: the first steps train the autoencoder, the others the denoiser of its latents.

Each phase is an `Optimization` of its own; together they are one training, with one counter of steps, one state and
one file of weights. So the denoiser cannot meet another autoencoder than the one that it was trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from accelerate import Accelerator

from lungddpm.config.sections import GeneratorConfig, LatentSettings, Training
from lungddpm.core.labels import Label
from lungddpm.core.progress import LOG
from lungddpm.core.volume import to_model_range
from lungddpm.models.data import TrainingData
from lungddpm.models.latent import LatentDiffusion, VoxelAutoencoder, batch_in_latents, divergence, latent_noise
from lungddpm.models.objectives import WeightedError
from lungddpm.models.optimization import Optimization
from lungddpm.models.recipe import Batch, Recipe

_LEAST_VARIANCE = 1e-8


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
        of_autoencoder, of_denoiser = (_with_training(config, training) for training in config.settings.phases())
        # It encodes whole volumes, so that it learns from all of them, not only from where there is something to draw.
        anywhere = replace(recipe, crop_centres=tuple(Label), hint="none")
        self.first = AutoencoderOptimization(of_autoencoder, anywhere, model.autoencoder, data, accelerator)
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
        """Of a 0-based step: each phase has its own warmup and decay."""
        begin = self.phases[0]
        return self.first.learning_rate(step) if step < begin else self.second.learning_rate(step - begin)

    def is_finite(self) -> bool:
        """See `Optimization.is_finite`."""
        return self.first.is_finite() and self.second.is_finite()

    def state_dict(self) -> dict[str, Any]:
        """That of both phases, and the scale of the latents."""
        scale = {name: getattr(self.average, name) for name in ("mean", "sd")}
        return {"autoencoder": self.first.state_dict(), "denoiser": self.second.state_dict(), "scale": scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.first.load_state_dict(state["autoencoder"])
        self.second.load_state_dict(state["denoiser"])
        for name, values in state["scale"].items():
            getattr(self.average, name).copy_(values)


class AutoencoderOptimization(Optimization):
    """An `Optimization` of an autoencoder, see `VoxelAutoencoder`."""

    def __init__(self, config: GeneratorConfig[LatentSettings], recipe: Recipe, model: VoxelAutoencoder, *others: Any):
        super().__init__(config, recipe, model, *others)
        self.kl_weight = config.settings.autoencoder.kl_weight
        self.reduction, self.channels = model.reduction, model.latent_channels
        nodule = config.settings.classes.index("nodule")
        self.error = WeightedError("l1", self.training.lesion_weight, nodule)

    def _pass(self, batch: Batch, step: int) -> torch.Tensor:
        """See `Optimization`: the mean absolute error, and the divergence of the latents."""
        noise = latent_noise(batch.noise, self.reduction, self.channels)
        decoded, mean, sd = self.learner.prepared(batch.clean, noise)
        loss = self.error(decoded, batch.clean, batch.condition) + self.kl_weight * divergence(mean, sd)
        self.learner.learn(loss)
        return loss.detach()


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
    LOG.info("The autoencoder is trained: its latents spread by %s", ", ".join(f"{value:.3g}" for value in sd.tolist()))


def _with_training(config: GeneratorConfig[LatentSettings], training: Training) -> GeneratorConfig[LatentSettings]:
    return replace(config, settings=config.settings.model_copy(update={"training": training}))
