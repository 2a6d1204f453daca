"""The optimization: network, average (EMA) and Adam, and what one step does to them.

`Optimization` trains one network. A family that also trains others, as adversarial training does, has its own subclass,
named in its recipe, which adds learners and defines what a forward pass does to each.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from lungddpm.config.sections import GeneratorConfig, TrainedSettings, Training
from lungddpm.models.data import SampleStream, TrainingData
from lungddpm.models.denoiser import Stage
from lungddpm.models.hints import seeing
from lungddpm.models.recipe import Batch, Recipe, Steps


class Learner:
    """A network and its Adam.

    Args:
        network: it is trained in place.
        training: of the generator.
        accelerator: device, precision and processes.
        betas: decay of Adam's two moments.
    """

    def __init__(
        self,
        network: nn.Module,
        training: Training,
        accelerator: Accelerator,
        betas: tuple[float, float] = (0.9, 0.999),
    ):
        self.network, self.training, self.accelerator = network.to(accelerator.device), training, accelerator
        if training.compile:
            self.network.compile(dynamic=False)  # in place, so that weights keep their names
        optimizer = torch.optim.Adam(
            self.network.parameters(), training.learning_rate, betas, fused=accelerator.device.type == "cuda"
        )
        self.prepared, self.optimizer = accelerator.prepare(self.network, optimizer)

    def learn(self, loss: torch.Tensor) -> None:
        """Backpropagate a loss; within `accumulate`, the weights change in the last pass of a step."""
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients and self.training.gradient_clip is not None:
            # Not by `accelerator.clip_grad_norm_`, which unscales the gradients of all learners.
            self.accelerator.unscale_gradients(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), self.training.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def set_learning_rate(self, rate: float) -> None:
        """Set the learning rate of the following steps."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def tensors(self) -> list[torch.Tensor]:
        """Weights and moments."""
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        return [*self.network.parameters(), *moments]


class Optimization:
    """The state of a training that changes from step to step, in one of its processes.

    Each process takes `accumulation` of a step's forward passes; gradients and losses are means over all of them, so
    that n processes compute what one does with n times the accumulation, up to rounding.

    Args:
        config: of the generator.
        recipe: how it is trained.
        model: the network with its initial weights; it is trained in place.
        data: the cases.
        accelerator: device, precision and processes; made with the config's `accumulation`.
    """

    betas = 0.9, 0.999
    """Decay of Adam's two moments."""

    def __init__(
        self,
        config: GeneratorConfig[TrainedSettings],
        recipe: Recipe,
        model: nn.Module,
        data: TrainingData,
        accelerator: Accelerator,
    ):
        self.training, self.accelerator = config.settings.training, accelerator
        self.model = model.to(accelerator.device)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.objective = recipe.objective(accelerator.device)
        self.samples = SampleStream(data, config, recipe, self.objective, accelerator.device)
        if self.training.gradient_checkpointing:
            checkpoint_stages(self.model)
        self.learner = Learner(self.model, self.training, accelerator, self.betas)
        self.optimizer = self.learner.optimizer
        self.learners = [self.learner]

    def take_step(self, step: int, asked_to_stop: Callable[[], bool] = lambda: False) -> torch.Tensor:
        """Take one optimizer step.

        Args:
            step: its number, from 0.
            asked_to_stop: called at its end, in every process.

        Returns:
            (2,) on the device: mean loss, and the share of processes that were asked to stop. They may still
            be computed when this returns.
        """
        for learner in self.learners:
            learner.set_learning_rate(self.learning_rate(step))
        processes, accumulation = self.accelerator.num_processes, self.training.accumulation
        losses = []
        for number in range(accumulation):
            batch = self.samples.batch((step * accumulation + number) * processes + self.accelerator.process_index)
            with self.accelerator.accumulate(*(learner.prepared for learner in self.learners)):
                losses.append(self._pass(batch, step))
        self._update_average(step)
        loss = torch.stack(losses).mean()
        return self.accelerator.reduce(torch.stack([loss, torch.full_like(loss, float(asked_to_stop()))]), "mean")

    @property
    def phases(self) -> list[int]:
        """See `Steps`: all steps are alike."""
        return [self.training.steps]

    def learning_rate(self, step: int) -> float:
        """The learning rate of a 0-based step."""
        return learning_rate(self.training, step)

    def is_finite(self) -> bool:
        """Whether all weights, averages and moments of Adam are finite."""
        tensors = [*self.average.parameters(), *(tensor for learner in self.learners for tensor in learner.tensors())]
        device = self.accelerator.device
        return bool(torch.stack([tensor.isfinite().all().to(device) for tensor in tensors]).all())

    def state_dict(self) -> dict[str, Any]:
        """The state to resume from; the weights have the published names."""
        scaler = self.accelerator.scaler
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from `state_dict`."""
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _pass(self, batch: Batch, step: int) -> torch.Tensor:
        """Forward and backward; in the last pass of a step, the weights change. Returns the loss, on the device."""
        loss = self.objective.loss(seeing(self.learner.prepared, batch.shown), batch)
        self.learner.learn(loss)
        return loss.detach()

    def _update_average(self, step: int) -> None:
        taken = step + 1
        if taken % self.training.ema_every and taken != self.training.steps:
            return
        weight = 1.0 if taken < self.training.ema_start else 1 - self.training.ema_decay
        for average, current in zip(self.average.parameters(), self.model.parameters(), strict=True):
            average.lerp_(current.detach(), weight)


def start_optimization(
    config: GeneratorConfig[TrainedSettings],
    recipe: Recipe,
    model: nn.Module,
    data: TrainingData,
    accelerator: Accelerator,
) -> Steps:
    """The optimization that a recipe asks for; the arguments are those of `Optimization`."""
    of_family: Callable[..., Steps] = recipe.optimization or Optimization
    return of_family(config, recipe, model, data, accelerator)


def learning_rate(training: Training, step: int) -> float:
    """The learning rate of a 0-based step: linear warmup to the peak, then constant or a half cosine to zero."""
    peak, after = training.learning_rate, step - training.warmup_steps
    if after < 0:
        return peak * (step + 1) / training.warmup_steps
    if training.learning_rate_schedule == "constant":
        return peak
    return peak * (1 + math.cos(math.pi * after / (training.steps - training.warmup_steps))) / 2


def checkpoint_stages(model: nn.Module) -> None:
    """Turn on gradient checkpointing: each stage stores only its input, and recomputes the rest for gradients."""
    for stage in model.modules():
        if isinstance(stage, Stage):
            stage.keeps_input_only = True
