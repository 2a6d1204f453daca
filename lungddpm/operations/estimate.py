"""Estimate the cost of a training before it starts."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lungddpm.config.sections import GeneratorConfig, TrainedSettings
from lungddpm.core.labels import Label
from lungddpm.core.memory import explain_out_of_memory, peak_memory_mib
from lungddpm.core.progress import LOG, waiting
from lungddpm.generators import plugin
from lungddpm.models.accelerator import make_accelerator
from lungddpm.models.data import TrainingData
from lungddpm.models.optimization import checkpoint_stages, start_optimization
from lungddpm.models.recipe import Recipe, Steps
from lungddpm.models.training import MEMORY_OPTIONS, initial_network

_BYTES_A_WEIGHT = 4
_KEPT_A_WEIGHT = 4  # the weight, its average and the two moments of Adam


@dataclass(frozen=True)
class Part:
    """One network during the steps of a training in which it learns."""

    network: str
    """Its class."""
    phase: int
    """Which of the training's phases this is, counted from 0."""
    is_opponent: bool
    """Whether it judges what another one draws; it is not part of the result."""
    first_step: int
    """Counted from 0."""
    steps: int
    parameters: int
    """Those that learn."""
    forward_flop: int
    """Of a forward pass over a batch."""
    step_flop: int
    """Of an optimizer step of one process: all passes forward and backward; of an opponent also those of its judgement
    that the other network learns from."""
    kept_bytes: int
    """What a forward pass keeps for the backward pass, in fp32."""

    @property
    def memory_bytes(self) -> int:
        """Weights, gradients, averages (not of an opponent) and two moments, and what a forward pass keeps, in fp32."""
        copies = _KEPT_A_WEIGHT + (0 if self.is_opponent else 1)
        return copies * _BYTES_A_WEIGHT * self.parameters + self.kept_bytes


def run_estimate(config: GeneratorConfig[TrainedSettings], device: str = "auto") -> None:
    """Count parameters and operations, take two steps of each phase, extrapolate, and print. Writes nothing.

    Args:
        config: of the generator; no cases are needed, the volumes are synthetic noise.
        device: see `make_accelerator`.

    Raises:
        ConfigError: the device is not available, or ran out of memory.
    """
    training, parts = config.settings.training, parts_of(config)
    parameters, of_opponent = count(config)[0], max((part.parameters for part in parts if part.is_opponent), default=0)
    accelerator = make_accelerator(device, training.precision, training.accumulation)
    processes = accelerator.num_processes
    of_phases = [sum(part.step_flop for part in parts if part.phase == phase) for phase in range(1 + parts[-1].phase)]
    LOG.info("Taking two steps of %s each", ", then of ".join(_flop(processes * each) for each in of_phases))
    with waiting("taking steps"), explain_out_of_memory("training", MEMORY_OPTIONS):
        recipe = recipe_of(config)
        optimization = start_optimization(config, recipe, initial_network(config, recipe), made_up(config), accelerator)
        seconds = _step_seconds(optimization)
        whole = sum(steps * each for steps, each in zip(optimization.phases, seconds, strict=True))
    kept = parameters * _KEPT_A_WEIGHT + of_opponent * (_KEPT_A_WEIGHT - 1)  # they have no average
    state_mib = kept * _BYTES_A_WEIGHT / 2**20
    cache_mib = 3 * math.prod(config.grid.size) / 2**20
    kind = "of GPU memory" if accelerator.device.type == "cuda" else "of the process's memory"
    peak_mib = peak_memory_mib(str(accelerator.device))
    rows = {
        "memory": f"{peak_mib:,.0f} MiB {kind} at most; by count, as in 'lungddpm plan', "
        f"{training_memory(config) / 2**20:,.0f} MiB",
        "step time": f"{', then '.join(f'{each:.3g} s' for each in seconds)}, "
        f"{_flop(of_phases[-1] / seconds[-1])}/s per process",
        "whole training": f"{_duration(whole)} for {training.steps:,} steps, without grids of samples; "
        f"{_flop(processes * sum(part.steps * part.step_flop for part in parts))}",
        "disk": f"2 states of {state_mib:.3g} MiB, 3 while one is written; {cache_mib:.3g} MiB per discovery case",
    }
    accelerator.print(
        _table_of_parts(parts, processes) + "\n" + "\n".join(f"{name:<18}{value}" for name, value in rows.items())
    )


def _table_of_parts(parts: Sequence[Part], processes: int) -> str:
    """What each network takes, in columns."""
    rows = {
        "network": [part.network for part in parts],
        "parameters": [f"{part.parameters:,}" for part in parts],
        "forward pass": [_flop(part.forward_flop) for part in parts],
        "optimizer step": [_flop(processes * part.step_flop) for part in parts],
        "steps": [
            f"{part.first_step + 1:,} to {part.first_step + part.steps:,}" if part.steps else "none" for part in parts
        ],
        "memory by count": [f"{part.memory_bytes / 2**20:,.0f} MiB" for part in parts],
    }
    widths = [max(map(len, column)) for column in zip(*rows.values(), strict=True)]
    return "\n".join(
        f"{name:<18}{'  '.join(f'{cell:<{width}}' for cell, width in zip(cells, widths, strict=True))}".rstrip()
        for name, cells in rows.items()
    )


def parts_of(config: GeneratorConfig[TrainedSettings]) -> list[Part]:
    """Every network that a training trains, in the order of its phases, each before its opponent."""
    parts, begin = [], 0
    for phase, (steps, of_phase, recipe) in enumerate(phases_of(config)):
        shape, passes = training_shape(of_phase), of_phase.settings.training.accumulation
        learned, (_, forward, both) = _count(of_phase, shape, recipe)
        name, kept = type(_on_meta(recipe.build)).__name__, kept_by_network(recipe, shape)
        parts.append(Part(name, phase, False, begin, steps, learned, forward, both * passes, kept))
        if recipe.opponent is not None:
            parts.append(_opponent_of(of_phase, recipe, recipe.opponent, phase, begin))
        begin += steps
    return parts


def _opponent_of(
    config: GeneratorConfig[TrainedSettings], recipe: Recipe, build: Callable[[], nn.Module], phase: int, begin: int
) -> Part:
    """What judges in a phase that begins with that step."""
    opponent, volumes = _on_meta(build), _on_meta(lambda: recipe.inputs(training_shape(config))[0])
    with FlopCounterMode(display=False) as forward:
        kept = kept_bytes(opponent, lambda: opponent(volumes))
    parameters, both = count_opponent(config, recipe)
    training, name = config.settings.training, type(opponent).__name__
    steps, flop = max(0, training.steps - begin - recipe.opponent_from), both * training.accumulation
    first = begin + recipe.opponent_from
    return Part(name, phase, True, first, steps, parameters, forward.get_total_flops(), flop, kept)


def training_memory(config: GeneratorConfig[TrainedSettings]) -> int:
    """Bytes that a training takes at most on a device, in fp32, by count.

    Weights, gradients, averages and moments of all networks, and what the largest phase keeps for its backward passes:
    an opponent first judges what the network draws, then that and real CT.
    """
    parts, kept = parts_of(config), []
    for network in (part for part in parts if not part.is_opponent):
        judges = [part.kept_bytes for part in parts if part.is_opponent and part.phase == network.phase]
        kept.append(max(network.kept_bytes, judges[0]) + judges[0] if judges else network.kept_bytes)
    of_opponent = max((part.parameters for part in parts if part.is_opponent), default=0)
    # A phase's networks and those of others stay where they are.
    copies = (_KEPT_A_WEIGHT + 1) * count(config)[0] + _KEPT_A_WEIGHT * of_opponent
    return _BYTES_A_WEIGHT * copies + max(kept)


def kept_by_network(recipe: Recipe, shape: tuple[int, ...]) -> int:
    """Bytes that a training pass over (N, D, H, W) voxels keeps, `gradient_checkpointing` apart."""
    network, inputs = _pass_of(recipe, shape)
    return kept_bytes(network, lambda: network(*inputs))


def _pass_of(recipe: Recipe, shape: tuple[int, ...]) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A network and its inputs, without values."""
    return _on_meta(recipe.build), _on_meta(lambda: recipe.inputs(shape))


def kept_bytes(network: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes that a forward pass keeps for the backward pass, weights apart; on the meta device nothing is computed."""
    weights = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for storage, tensor in kept.items() if storage not in weights)


def drawing_memory(config: GeneratorConfig[TrainedSettings], shape: tuple[int, ...]) -> int:
    """Bytes that drawing (N, D, H, W) voxels takes besides the weights, in fp32, by count.

    Of several networks, the one that takes most counts: an autoencoder decodes latents into maps of whole volumes.
    """
    return max(drawing_bytes_of(*_pass_of(recipe, shape)) for _, _, recipe in phases_of(config))


def drawing_bytes_of(network: nn.Module, inputs: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors that a forward pass without gradients makes and still refers to, at most at one time.

    Workspaces of libraries and what an allocator holds in reserve are not counted.
    """
    with torch.no_grad(), _LiveBytes() as live:
        network(*inputs)
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of new storages until nothing refers to them any more.

    Attributes:
        peak: the most at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Weights, inputs, and what is written in place.
        self._known.update(_storages((args, kwargs)))
        made = func(*args, **(kwargs or {}))
        for storage in _storages(made) - set(self._known):
            self._known.add(storage)
            self._now += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self._now)
        return made

    def _free(self, size: int) -> None:
        self._now -= size


def _storages(values: object) -> set[torch.UntypedStorage]:
    return {value.untyped_storage() for value in tree_leaves(values) if isinstance(value, torch.Tensor)}


def _on_meta(build: Callable[[], Any]) -> Any:
    """What is built on the meta device: without values."""
    with torch.device("meta"):
        return build()


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
    return _count(config, shape or training_shape(config), recipe or recipe_of(config))[1]


def _count(
    config: GeneratorConfig[TrainedSettings], shape: tuple[int, ...], recipe: Recipe
) -> tuple[int, tuple[int, int, int]]:
    """Parameters that learn in such a pass, and what `count` gives."""
    model, inputs = _on_meta(recipe.build), _on_meta(lambda: recipe.inputs(shape))
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
    learned = sum(parameter.numel() for parameter in model.parameters() if parameter.grad is not None)
    return learned, (parameters, one, one + both + beside.get_total_flops())


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
