"""The parts of a training that differ between families of models. The rest (data, averaging, states, monitoring) is
shared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from lungddpm.config.sections import GeneratorConfig, Hint, TrainedSettings
from lungddpm.core.files import seed_from
from lungddpm.core.labels import Label

Network = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(noisy CT, condition and, if it sees one, hint (N, channels, D, H, W), times (N,)) -> prediction (N, 1, D, H, W)."""

Preview = Callable[[nn.Module, torch.Tensor, torch.Tensor, Sequence[torch.Generator]], torch.Tensor]
"""(network, condition (N, C, D, H, W), reference (N, 1, D, H, W), generators) -> CT (N, 1, D, H, W): a quick sample for
monitoring, in which the reference fills the open voxels."""

INSIDE = (Label.LUNG, Label.NODULE, Label.VESSEL)
"""Labelled voxels: open voxels are pasted later, so they matter less."""


@dataclass(frozen=True)
class Batch:
    """Samples on the training device.

    Attributes:
        clean: (N, 1, D, H, W) float32 CT in [-1, 1].
        condition: (N, C, D, H, W) float32, see `condition_channels`.
        noise: standard normal, shaped like `clean`.
        levels: (N,) noise levels, as `Objective.draw_level` gives them.
        shown: (N, channels, D, H, W) the hint, see `hints.show`; None if there is none.
    """

    clean: torch.Tensor
    condition: torch.Tensor
    noise: torch.Tensor
    levels: torch.Tensor
    shown: torch.Tensor | None = None


class Objective(Protocol):
    """What an optimizer step minimises, on one device."""

    def draw_level(self, generator: torch.Generator) -> torch.Tensor:
        """The noise level of one sample: a scalar on the CPU."""

    def loss(self, network: Network, batch: Batch) -> torch.Tensor:
        """The mean loss of a batch: a scalar. Must not wait for the device."""


class Steps(Protocol):
    """Takes the steps of a training; `Optimization` takes those of one network."""

    @property
    def average(self) -> nn.Module:
        """The averaged weights: the result."""

    @property
    def phases(self) -> Sequence[int]:
        """Number of steps of each phase; within a phase, steps are alike."""

    def take_step(self, step: int, asked_to_stop: Callable[[], bool] = ...) -> torch.Tensor:
        """See `Optimization.take_step`."""

    def learning_rate(self, step: int) -> float:
        """The learning rate of a 0-based step."""

    def is_finite(self) -> bool:
        """Whether all of the state is finite."""

    def state_dict(self) -> dict[str, Any]:
        """The state that changes from step to step."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from `state_dict`."""


@dataclass(frozen=True)
class Recipe:
    """How a generator's network is trained.

    Attributes:
        build: the network, with fresh weights from torch's global generator.
        load: the network with the weights of a file, on the CPU; raises InputError where they do not fit.
        objective: what is minimised, for a device: an `Objective`, or what `optimization` minimises instead.
        inputs: shape (N, D, H, W) of volumes -> network inputs of that size, for counting operations.
        crop_centres: labels that the centre of a training crop may have.
        needs_nodule: whether only cases with a nodule count.
        one_nodule: whether a crop around a nodule shows only that one in its layout; others are lung there.
        keep: (names, CT (n, D, H, W) int16 HU, layouts (n, D, H, W)) of all cases -> what sampling needs to know
            about them, as JSON-like values; stored with the weights.
        hint: what the network sees of the reference.
        optimization: what takes the steps, called with the arguments of `Optimization`; None: `Optimization` itself.
        opponent: in adversarial training, builds the network that judges volumes shaped like the first of `inputs`.
        opponent_from: the first step in which it judges.
        before: config and recipe of a first phase that trains another network, for `training.steps` of that config;
            None if all steps are alike. Only for counting operations: `optimization` takes these steps.
        prepares: (network, shape (N, D, H, W) of volumes): what a pass computes in addition, without gradients.
    """

    build: Callable[[], nn.Module]
    load: Callable[[Path], nn.Module]
    objective: Callable[[torch.device], Any]
    inputs: Callable[[Sequence[int]], tuple[torch.Tensor, ...]]
    crop_centres: Sequence[Label] = INSIDE
    needs_nodule: bool = False
    one_nodule: bool = False
    keep: Callable[[Sequence[str], np.ndarray, np.ndarray], dict[str, Any]] = lambda *_: {}
    hint: Hint = "none"
    optimization: Callable[..., Steps] | None = None
    opponent: Callable[[], nn.Module] | None = None
    opponent_from: int = 0
    before: Callable[[], tuple[GeneratorConfig[Any], Recipe]] | None = None
    prepares: Callable[[nn.Module, Sequence[int]], Any] | None = None


def fresh(build: Callable[[], nn.Module], config: GeneratorConfig[TrainedSettings], what: str) -> nn.Module:
    """A network with random weights that depend only on the config's seed and run, and on a name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_from(config.seed, config.run, what))
        return build()
