"""Rectified flow: straight paths from noise to CT (Liu et al. 2023, arXiv 2209.03003), their training and Euler steps.

At time t from 0 (CT) to 1 (noise) a state is (1 - t) x + t e, of the clean CT x and standard normal noise e. The
network predicts the velocity v = e - x, so that x = state - t v and e = state + (1 - t) v. Networks of diffusion models
expect times as indices up to 1000, so they receive 1000 t.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from lungddpm.models.objectives import WeightedError
from lungddpm.models.recipe import Batch, Network
from lungddpm.models.sampling import clamp

NETWORK_TIME = 1000.0

Times = Literal["uniform", "logit_normal"]
"""How training draws its times: uniformly, or as the logistic function of standard normal numbers, which favours the
middle (Esser et al. 2024, arXiv 2403.03206)."""


class VelocityPrediction:
    """The mean error of the predicted velocity.

    Args:
        times: how times are drawn.
        error: of the velocity.
    """

    def __init__(self, times: Times, error: WeightedError):
        self.times, self.error = times, error

    def draw_level(self, generator: torch.Generator) -> torch.Tensor:
        """A time: float32, from 0 to 1."""
        if self.times == "uniform":
            return torch.rand((), generator=generator)
        return torch.randn((), generator=generator).sigmoid()

    def loss(self, network: Network, batch: Batch) -> torch.Tensor:
        """See `Objective.loss`."""
        noisy = at_time(batch.clean, batch.noise, batch.levels)
        predicted = network(torch.cat([noisy, batch.condition], dim=1), NETWORK_TIME * batch.levels)
        return self.error(predicted, batch.noise - batch.clean, batch.condition)


class FlowSolver:
    """A `Solver` that takes Euler steps of equal length from t = 1 to t = 0.

    Args:
        steps: how many, which is also the number of network calls.

    Raises:
        ValueError: fewer than one step.
    """

    def __init__(self, steps: int):
        if steps < 1:
            raise ValueError(f"{steps} steps are too few")
        self.noise = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
        self.signal = [1 - t for t in self.noise]
        self.times = [NETWORK_TIME * t for t in self.noise[:-1]]

    def start(self, index: int, *, pasting: bool) -> None:
        """See `Solver.start`; this solver keeps no history."""

    def clean(self, index: int, state: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        """See `Solver.clean`."""
        return clamp(state - self.noise[index] * prediction)

    def step(
        self, index: int, state: torch.Tensor, clean: torch.Tensor, generators: Sequence[torch.Generator]
    ) -> torch.Tensor:
        """See `Solver.step`: to the next time on the straight line through the state and the clean CT."""
        noise = (state - self.signal[index] * clean) / self.noise[index]
        return self.signal[index + 1] * clean + self.noise[index + 1] * noise


def at_time(clean: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """States of the flow.

    Args:
        clean: (N, 1, D, H, W) CT in [-1, 1].
        noise: standard normal, same shape.
        times: (N,) from 0 to 1.
    """
    t = times.view(-1, 1, 1, 1, 1)
    return (1 - t) * clean + t * noise
