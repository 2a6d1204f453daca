"""Estimate the cost of a training before it starts."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from lungddpm.config.sections import GeneratorConfig, TrainedSettings
from lungddpm.core.labels import Label
from lungddpm.core.progress import LOG
from lungddpm.generators import plugin
from lungddpm.models.accelerator import explain_out_of_memory, make_accelerator
from lungddpm.models.data import TrainingData
from lungddpm.models.monitoring import memory_mib
from lungddpm.models.optimization import checkpoint_stages, start_optimization
from lungddpm.models.recipe import Recipe, Steps
from lungddpm.models.training import MEMORY_OPTIONS, initial_network

_BYTES_A_WEIGHT = 4
_KEPT_A_WEIGHT = 4  # the weight, its average and the two moments of Adam


def run_estimate(config: GeneratorConfig[TrainedSettings], device: str = "auto") -> None:
    """Count parameters and operations, take two steps of each phase, extrapolate, and print. Writes nothing.

    Args:
        config: of the generator; no cases are needed, the volumes are synthetic noise.
        device: see `make_accelerator`.

    Raises:
        ConfigError: the device is not available, or ran out of memory.
    """
    training = config.settings.training
    parameters, forward, whole_pass = count(config)
    of_opponent, opponent_pass = count_opponent(config)
    accelerator = make_accelerator(device, training.precision, training.accumulation)
    processes = accelerator.num_processes
    operations = (whole_pass + opponent_pass) * training.accumulation * processes
    LOG.info("Taking two steps of %s each", _flop(operations))
    with explain_out_of_memory(MEMORY_OPTIONS):
        recipe = recipe_of(config)
        optimization = start_optimization(config, recipe, initial_network(config, recipe), made_up(config), accelerator)
        seconds = _step_seconds(optimization)
        whole = sum(steps * each for steps, each in zip(optimization.phases, seconds, strict=True))
    kept = parameters * _KEPT_A_WEIGHT + of_opponent * (_KEPT_A_WEIGHT - 1)  # they have no average
    state_mib = kept * _BYTES_A_WEIGHT / 2**20
    cache_mib = 3 * math.prod(config.grid.size) / 2**20
    kind = "of GPU memory" if accelerator.device.type == "cuda" else "of the process's memory"
    rows = {
        "parameters": f"{parameters:,}" + (f", and {of_opponent:,} of its discriminators" if of_opponent else ""),
        "forward pass": f"{_flop(forward)} (batch of {training.batch_size})",
        "optimizer step": f"{_flop(operations)} (passes: {training.accumulation}, processes: {processes})",
        "memory": f"{memory_mib(accelerator.device):,.0f} MiB {kind} at most",
        "step time": f"{', then '.join(f'{each:.3g} s' for each in seconds)}, "
        f"{_flop(operations / processes / seconds[-1])}/s per process",
        "whole training": f"{_duration(whole)} for {training.steps:,} steps, without grids of samples",
        "disk": f"2 states of {state_mib:.3g} MiB, 3 while one is written; {cache_mib:.3g} MiB per discovery case",
    }
    accelerator.print("\n".join(f"{name:<16}{value}" for name, value in rows.items()))


def recipe_of(config: GeneratorConfig[TrainedSettings]) -> Recipe:
    """How a generator is trained."""
    return plugin(config.kind).training(config)[0]


def training_shape(config: GeneratorConfig[TrainedSettings]) -> tuple[int, ...]:
    """(N, D, H, W) of the input of a forward pass in training."""
    crop, batch_size = config.settings.training.crop, config.settings.training.batch_size
    return (batch_size, *(config.grid.size[::-1] if crop is None else (crop,) * 3))


def phases_of(
    config: GeneratorConfig[TrainedSettings],
) -> list[tuple[int, GeneratorConfig[TrainedSettings], Recipe]]:
    """The phases of a training, in order: number of steps, config and recipe of each."""
    recipe, steps = recipe_of(config), config.settings.training.steps
    if recipe.before is None:
        return [(steps, config, recipe)]
    first, of_first = recipe.before()
    begin = first.settings.training.steps
    return [(begin, first, of_first), (steps - begin, config, recipe)]


def count(
    config: GeneratorConfig[TrainedSettings], shape: tuple[int, ...] | None = None, recipe: Recipe | None = None
) -> tuple[int, int, int]:
    """Parameters, and floating point operations of a forward pass and of a forward and backward pass.

    Multiplications and additions are counted separately, and only those of convolutions and matrix products. Nothing is
    computed: the tensors are empty.

    Args:
        config: of the generator.
        shape: (N, D, H, W) of the input; by default `training_shape`.
        recipe: of a phase of its training; by default that of the whole.
    """
    recipe, shape = recipe or recipe_of(config), shape or training_shape(config)
    with torch.device("meta"):
        model, inputs = recipe.build(), recipe.inputs(shape)
    if config.settings.training.gradient_checkpointing:
        checkpoint_stages(model)
    with FlopCounterMode(display=False) as forward:
        predicted = model(*inputs)
    with FlopCounterMode(display=False) as beside, torch.no_grad(), torch.device("meta"):
        if recipe.prepares is not None:
            recipe.prepares(model, shape)
    outputs = predicted if isinstance(predicted, tuple) else (predicted,)
    with FlopCounterMode(display=False) as backward:
        torch.stack([output.mean() for output in outputs]).sum().backward()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    one, both = (counter.get_total_flops() for counter in (forward, backward))
    return parameters, one, one + both + beside.get_total_flops()


def count_opponent(config: GeneratorConfig[TrainedSettings], recipe: Recipe | None = None) -> tuple[int, int]:
    """Parameters of the discriminators of an adversarial training, and operations that they add per pass; 0 without it.

    They see real and drawn CT twice: in the network's step, which needs a gradient of the drawn CT, and in their own
    step.
    """
    recipe = recipe or recipe_of(config)
    if recipe.opponent is None:
        return 0, 0
    with torch.device("meta"):
        opponent, (volumes, *_) = recipe.opponent(), recipe.inputs(training_shape(config))
    with FlopCounterMode(display=False) as counter:
        for _ in range(2):
            summed(opponent(volumes)).backward()
        with torch.no_grad():
            opponent(volumes)
        opponent.requires_grad_(False)
        summed(opponent(volumes.requires_grad_(True))).backward()
    return sum(parameter.numel() for parameter in opponent.parameters()), counter.get_total_flops()


def summed(outputs: Any) -> torch.Tensor:
    """The sum of the last tensors in lists of a network's outputs."""
    if isinstance(outputs, torch.Tensor):
        return outputs.sum()
    last = outputs if isinstance(outputs[0], list) else outputs[-1:]
    return torch.stack([summed(output) for output in last]).sum()


def made_up(config: GeneratorConfig[TrainedSettings]) -> TrainingData:
    """One case of noise, with every label."""
    random = np.random.default_rng(0)
    shape = (1, *config.grid.size[::-1])
    return TrainingData(
        ["made up"],
        random.integers(-1000, 500, shape, dtype=np.int16),
        random.integers(0, len(Label), shape, dtype=np.uint8),
    )


def _step_seconds(optimization: Steps) -> list[float]:
    """Seconds of a step of each phase: of the second step, because the first includes one-off work."""
    begins = [sum(optimization.phases[:phase]) for phase in range(len(optimization.phases))]
    return [[_timed_step(optimization, begin + step) for step in range(2)][1] for begin in begins]


def _timed_step(optimization: Steps, step: int) -> float:
    """Seconds of a step."""
    began = time.perf_counter()
    optimization.take_step(step).tolist()
    return time.perf_counter() - began


def _flop(operations: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9)):
        if operations >= size:
            return f"{operations / size:.3g} {unit}FLOP"
    return f"{operations / 1e6:.3g} MFLOP"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} seconds"
