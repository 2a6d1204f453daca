"""Speed of the denoiser by option, each measured alternately with the plain module.

Machines are noisy and shared. So every option gets a separate process, which alternates with one of the base
(contiguous fp32, eager), and the median of the ratios of neighbouring rounds is reported.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from torch import nn

from lungddpm.config.loading import parse_config
from lungddpm.config.sections import DiffusionSettings, GeneratorConfig
from lungddpm.core.errors import ConfigError
from lungddpm.core.files import write_json
from lungddpm.core.memory import explain_out_of_memory, keep_freed_memory, peak_memory_mib
from lungddpm.core.progress import LOG
from lungddpm.models.accelerator import make_accelerator
from lungddpm.models.denoiser import UNet
from lungddpm.models.objectives import diffusion_recipe
from lungddpm.models.optimization import Optimization
from lungddpm.models.sampling import Predictor, Sampler, make_solver, sample_aas
from lungddpm.models.schedule import cosine_betas
from lungddpm.models.training import initial_network
from lungddpm.operations.estimate import count, made_up

SAMPLERS = {"ddpm 250": ("ddpm", 250), "dpmsolver++ 50": ("dpmsolver++", 50), "dpmsolver++ 20": ("dpmsolver++", 20)}
MEASURED = "measured"
_PASSES = {"cpu": 1, "cuda": 10}  # per round; single passes on a GPU are too short to be timed
_MATRIX_EDGE = {"cpu": 2048, "cuda": 8192}
_STEPS_EXTRAPOLATED_FROM = 2
_SMALL_EDGE = 16
_FAILURES = (RuntimeError, MemoryError)  # of a compiler, of memory, or of a process that the system ended
_workbench: Workbench | None = None

Call = Callable[..., Any]
"""(name of a method of `Workbench`, its arguments) -> what it returns, in the process of an option."""


@dataclass(frozen=True)
class Option:
    """One or several optimizations; without any, the base.

    Attributes:
        keep_memory: see `keep_freed_memory`; CPU only.
        channels_last: see `UNet.arrange`.
        winograd: see `UNet.arrange`; CPU only.
        bf16: autocast to bfloat16.
        compile: torch.compile.
        graphs: CUDA graphs, in sampling only.
        batch: volumes per pass.
    """

    keep_memory: bool = False
    channels_last: bool = False
    winograd: bool = False
    bf16: bool = False
    compile: bool = False
    graphs: bool = False
    batch: int = 1

    @property
    def name(self) -> str:
        """Everything that differs from the base."""
        words = {
            "memory kept": self.keep_memory,
            "channels_last_3d": self.channels_last,
            "Winograd": self.winograd,
            "bf16": self.bf16,
            "compile": self.compile,
            "CUDA graphs": self.graphs,
            f"batch {self.batch}": self.batch > 1,
        }
        return " + ".join(word for word, is_on in words.items() if is_on) or "base"

    def exists_on(self, device: str) -> bool:
        """Whether `cpu` or `cuda` has this option."""
        return not (self.graphs if device == "cpu" else self.keep_memory or self.winograd)


BASE = Option()
USED = {"cpu": Option(keep_memory=True, channels_last=True, winograd=True), "cuda": Option(bf16=True)}
"""The default of sampling (see `place`, `make_accelerator`); training never uses planes."""
_ALL_OF_A_GPU = Option(channels_last=True, bf16=True, compile=True, graphs=True)
OPTIONS = [
    BASE,
    Option(keep_memory=True),
    Option(channels_last=True),
    Option(channels_last=True, winograd=True),
    Option(bf16=True),
    Option(compile=True),
    Option(graphs=True),
    Option(batch=2),
    Option(batch=4),
    USED["cpu"],
    Option(keep_memory=True, channels_last=True, winograd=True, batch=2),
    Option(channels_last=True, bf16=True),
    Option(channels_last=True, bf16=True, compile=True),
    _ALL_OF_A_GPU,
    Option(channels_last=True, bf16=True, compile=True, graphs=True, batch=4),
]


@dataclass(frozen=True)
class Row:
    """The results of an option; None if not measured.

    Attributes:
        option: its name.
        status: `measured`, or the reason why not.
        pass_seconds: of a forward pass in inference, per volume: median over the rounds.
        ratio: base's seconds over the option's, per volume: median over the rounds, with minimum and maximum.
        max_difference: between the predicted noise and the base's.
        flop_per_second: operations of the direct network (see `estimate.count`) per second.
        matrix_fraction: this as a fraction of the rate of matrix products in the same process and precision.
        training_steps_per_second: optimizer steps on `batch` volumes, forward and backward.
        training_ratio: base's seconds over the option's, per volume.
        sampling_seconds: of each of `SAMPLERS`, per volume.
        extrapolated: samplers that were extrapolated from a few steps.
        sampling_memory_mib, training_memory_mib: peak so far: tensors on a GPU, otherwise the whole process.
    """

    option: str
    status: str
    pass_seconds: float | None = None
    ratio: float | None = None
    ratio_least: float | None = None
    ratio_most: float | None = None
    max_difference: float | None = None
    flop_per_second: float | None = None
    matrix_fraction: float | None = None
    training_steps_per_second: float | None = None
    training_ratio: float | None = None
    sampling_seconds: dict[str, float] | None = None
    extrapolated: list[str] | None = None
    sampling_memory_mib: float | None = None
    training_memory_mib: float | None = None


@dataclass(frozen=True)
class SamplerRow:
    """The results of a sampler, measured in full on a small grid; `ratio` as in `Row`, to the first of `SAMPLERS`."""

    sampler: str
    seconds: float
    ratio: float
    ratio_least: float
    ratio_most: float


@dataclass(frozen=True)
class Problem:
    """The task that all options compute.

    Attributes:
        device: `cpu`, `cuda` or `cuda:<number>`.
        size: voxels per edge.
        base_channels: width of the published network.
    """

    device: str
    size: int
    base_channels: int

    @property
    def kind(self) -> str:
        """`cpu` or `cuda`."""
        return self.device.partition(":")[0]

    def config(self, option: Option = BASE) -> GeneratorConfig[DiffusionSettings]:
        """The published network and recipe, with one forward pass per optimizer step."""
        training = {
            "batch_size": option.batch,
            "accumulation": 1,
            "precision": "bf16" if option.bf16 else "fp32",
            "compile": option.compile,
        }
        settings = {"denoiser": {"base_channels": self.base_channels}, "training": training}
        values = {"grid": {"size": [self.size] * 3}, "generators": {"lung_ddpm": settings}}
        return parse_config(values).for_generator("lung_ddpm")


def run_bench(
    device: str,
    size: int,
    base_channels: int,
    names: Sequence[str],
    rounds: int,
    longest_s: float,
    training: bool,
    output: Path,
) -> None:
    """Measure options and samplers, print two tables and write them to a JSON file.

    Args:
        device: see `make_accelerator`; CPU or CUDA.
        size: voxels per edge.
        base_channels: width of the published network.
        names: options to measure besides the base; empty: all.
        rounds: rounds per option.
        longest_s: samplings that would take longer are extrapolated from two steps, and the comparison of samplers on a
            small grid is left out; 0: none is measured in full.
        training: whether to measure training as well.
        output: the JSON file.

    Raises:
        ConfigError: the device is not available or is neither a CPU nor CUDA, the network does not fit the size, or an
            option is unknown.
    """
    if unknown := set(names) - {option.name for option in OPTIONS}:
        known = "; ".join(option.name for option in OPTIONS)
        raise ConfigError("--option", f"there is no option '{min(unknown)}'", f"Available: {known}.")
    found = make_accelerator(device, "fp32").device
    problem = Problem(str(found), size, base_channels)
    if problem.kind not in _PASSES:
        raise ConfigError("--device", f"there are no options for '{found.type}'", "Use cpu or cuda.")
    parameters, flop, _ = count(problem.config())
    asked = [option for option in OPTIONS if option == BASE or not names or option.name in names]
    with explain_out_of_memory("bench", "Lower --size or --base."), _process(problem, BASE) as base:
        rows = [_row(problem, base, option, rounds, longest_s, training, flop) for option in asked]
    small = replace(problem, size=min(size, _SMALL_EDGE)) if problem.kind == "cpu" else problem
    samplers = _measure_samplers(small, rounds, longest_s)
    result = {
        "device": problem.device,
        "device_name": torch.cuda.get_device_name(found) if problem.kind == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "size": size,
        "base_channels": base_channels,
        "parameters": parameters,
        "flop_per_pass": flop,
        "rounds": rounds,
        "options": [asdict(row) for row in rows],
        "samplers_size": small.size,
        "samplers": [asdict(row) for row in samplers],
    }
    write_json(output, result)
    print(describe(result))
    LOG.info("Written to %s", output)


def _row(problem: Problem, base: Call, option: Option, rounds: int, longest_s: float, training: bool, flop: int) -> Row:
    """A row of the table, even if the device lacks the option or it fails."""
    if not option.exists_on(problem.kind):
        return Row(option.name, "not on this device")
    try:
        with _process(problem, option) as call:
            return _measure(call, base, option, rounds, longest_s, training, flop)
    except _FAILURES as error:
        LOG.warning("%s failed: %s", option.name, _first_line(error))
        return Row(option.name, f"failed: {_first_line(error)}")


def ratios(base: Sequence[float], option: Sequence[float]) -> tuple[float, float, float]:
    """Speed-up of an option: median, minimum and maximum of the ratios of neighbouring rounds."""
    of_rounds = [b / s for b, s in zip(base, option, strict=True)]
    return statistics.median(of_rounds), min(of_rounds), max(of_rounds)


def describe(result: dict[str, Any]) -> str:
    """The tables for a terminal."""
    from rich.console import Console
    from rich.table import Table

    printed = StringIO()
    console = Console(file=printed, width=200, no_color=True, highlight=False)
    heads = [
        "option", "s/pass", "ratio", "(min-max)", "difference", "of matrix rate", "training steps/s", "ratio",
        *(f"{name}, s" for name in SAMPLERS), "MiB sampling", "MiB training",
    ]  # fmt: skip
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="")
    for head in heads:
        table.add_column(head, justify="left" if head == "option" else "right", no_wrap=head == "option")
    for row in result["options"]:
        if row["status"] != MEASURED:
            table.add_row(row["option"], row["status"])
            continue
        spread = f"({_number(row['ratio_least'])}-{_number(row['ratio_most'])})"
        sampling = [
            ("~" if name in row["extrapolated"] else "") + _number(row["sampling_seconds"][name]) for name in SAMPLERS
        ]
        table.add_row(
            row["option"], _number(row["pass_seconds"]), _number(row["ratio"]), spread,
            f"{row['max_difference']:.0e}", f"{row['matrix_fraction']:.0%}", _number(row["training_steps_per_second"]),
            _number(row["training_ratio"]), *sampling, _whole(row["sampling_memory_mib"]),
            _whole(row["training_memory_mib"]),
        )  # fmt: skip
    console.print(table)
    console.print(
        f"\n{result['size']}^3 voxels, base {result['base_channels']}, {result['flop_per_pass'] / 1e12:.3g} TFLOP per "
        f"pass; {result['device_name']}, {result['threads']} threads, torch {result['torch']}. Times are per volume; "
        f"ratios to the base are medians of {result['rounds']} alternating rounds. ~: extrapolated from "
        f"{_STEPS_EXTRAPOLATED_FROM} steps.",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    if result["samplers"]:
        console.print(f"\nSamplers, in full at {result['samplers_size']}^3:\n", markup=False)
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="")
        for head in ("sampler", "s/volume", "ratio", "(min-max)"):
            table.add_column(head, justify="left" if head == "sampler" else "right")
        for row in result["samplers"]:
            spread = f"({_number(row['ratio_least'])}-{_number(row['ratio_most'])})"
            table.add_row(row["sampler"], _number(row["seconds"]), _number(row["ratio"]), spread)
        console.print(table)
    return "\n".join(line.rstrip() for line in printed.getvalue().splitlines())


class GraphedPredictor:
    """A predictor whose kernels are recorded once as a CUDA graph and then launched together.

    Args:
        predict: the denoiser; always called with tensors of these shapes and types.
        noisy, timesteps: its arguments.
    """

    def __init__(self, predict: Predictor, noisy: torch.Tensor, timesteps: torch.Tensor):
        self.noisy, self.timesteps = noisy.clone(), timesteps.clone()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries choose their kernels on the first calls
            for _ in range(3):
                predict(self.noisy, self.timesteps)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.predicted = predict(self.noisy, self.timesteps)

    def __call__(self, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """See `Predictor`; the next call overwrites the result."""
        self.noisy.copy_(noisy)
        self.timesteps.copy_(timesteps)
        self.graph.replay()
        return self.predicted


class Workbench:
    """A denoiser prepared for an option, with timers; runs in its own process.

    Args:
        problem: the task.
        option: the optimizations.
    """

    def __init__(self, problem: Problem, option: Option):
        if option.keep_memory:
            keep_freed_memory()
        self.problem, self.option, self.config = problem, option, problem.config(option)
        self.device = torch.device(problem.device)
        if problem.kind == "cuda":
            torch.cuda.set_device(self.device)
        self.accelerator = Accelerator(cpu=problem.kind == "cpu", mixed_precision="bf16" if option.bf16 else "no")
        self.recipe = diffusion_recipe(self.config)
        self.denoiser = self._arranged(with_numbers(self._fresh())).eval().requires_grad_(False)
        if option.compile:
            self.denoiser.compile(dynamic=False)
        generator = torch.Generator().manual_seed(0)
        shape = (1, 1 + len(self.config.settings.classes), *[problem.size] * 3)
        self.noisy = torch.randn(shape, generator=generator).repeat(option.batch, 1, 1, 1, 1).to(self.device)
        self.timesteps = torch.full((option.batch,), 100, device=self.device)
        self.predict: Predictor = self.denoiser
        with torch.inference_mode(), self.accelerator.autocast():
            if option.graphs:
                self.predict = GraphedPredictor(self.denoiser, self.noisy, self.timesteps)
            self.predicted = self.predict(self.noisy, self.timesteps).float().cpu()
        self.optimization: Optimization | None = None

    def output(self) -> np.ndarray:
        """(1, 1, D, H, W) float32: the noise predicted in the first volume."""
        return self.predicted[:1].numpy()

    def pass_seconds(self) -> float:
        """Of a forward pass, per volume."""
        passes = _PASSES[self.problem.kind]
        with torch.inference_mode(), self.accelerator.autocast():
            seconds = self._timed(lambda: [self.predict(self.noisy, self.timesteps) for _ in range(passes)])
        return seconds / passes / self.option.batch

    def matrix_rate(self) -> float:
        """FLOP/s of a large matrix product in the option's precision: the best of three."""
        edge = _MATRIX_EDGE[self.problem.kind]
        factor = torch.randn(
            edge, edge, device=self.device, dtype=torch.bfloat16 if self.option.bf16 else torch.float32
        )
        product = torch.empty_like(factor)
        seconds = [self._timed(lambda: torch.mm(factor, factor, out=product)) for _ in range(4)][1:]
        return 2 * edge**3 / min(seconds)

    def sampling_seconds(self, sampler: Sampler, steps: int) -> float:
        """Of sampling with AAS, per volume."""
        condition = self.noisy[:, 1:].sign()
        reference = self.noisy[:, :1].clamp(-1, 1)
        generators = [torch.Generator(self.device).manual_seed(seed) for seed in range(self.option.batch)]
        solver = make_solver(sampler, 2, cosine_betas(self.config.settings.timesteps), steps)

        def draw() -> torch.Tensor:
            with self.accelerator.autocast():
                return sample_aas(self.predict, solver, condition, reference, generators)

        return self._timed(draw) / self.option.batch

    def training_seconds(self) -> float:
        """Of an optimizer step, per volume. The first call sets up the training and takes one extra step."""
        optimization = self.optimization or self._set_up()
        self.optimization = optimization
        return self._timed(lambda: optimization.take_step(1)) / self.option.batch

    def _set_up(self) -> Optimization:
        if self.problem.kind == "cuda":
            torch.cuda.reset_peak_memory_stats()
        data = made_up(self.config)
        optimization = Optimization(self.config, self.recipe, self._fresh(), data, self.accelerator)
        self._arranged(optimization.model)
        optimization.take_step(0)
        return optimization

    def memory_mib(self) -> float:
        """See `monitoring.memory_mib`."""
        return peak_memory_mib(str(self.device))

    def free_memory_mib(self) -> float:
        """Of the GPU, or of the machine."""
        free = torch.cuda.mem_get_info()[0] if self.problem.kind == "cuda" else psutil.virtual_memory().available
        return free / 2**20

    def _fresh(self) -> nn.Module:
        return initial_network(self.config, self.recipe)

    def _arranged(self, network: nn.Module) -> nn.Module:
        network = network.to(self.device)
        if isinstance(network, UNet):
            network.arrange(self.option.channels_last, self.option.winograd)
        return network

    def _timed(self, work: Callable[[], Any]) -> float:
        self._wait()
        began = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.problem.kind == "cuda":
            torch.cuda.synchronize()


def with_numbers(network: nn.Module) -> nn.Module:
    """The network with weights that make every layer matter: initial ones predict zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.data = drawn / math.sqrt(parameter[0].numel()) if parameter.dim() > 1 else parameter.data + drawn / 10
    return network


def _measure(call: Call, base: Call, option: Option, rounds: int, longest_s: float, training: bool, flop: int) -> Row:
    """A row of the table, from an option's process and the base's."""
    difference = float(np.abs(base("output") - call("output")).max())
    turns: list[tuple[float, float, float]] = []
    for number in range(rounds):
        turns.append((base("pass_seconds"), call("pass_seconds"), call("matrix_rate")))
        ratio = turns[-1][0] / turns[-1][1]
        LOG.info("%s: round %d of %d, %.3g times the base", option.name, number + 1, rounds, ratio)
    base_seconds, seconds, rates = zip(*turns, strict=True)
    pass_seconds = statistics.median(seconds)
    middle, least, most = ratios(base_seconds, seconds)
    sampling, extrapolated = _sampling_seconds(call, pass_seconds, longest_s)
    sampling_memory = call("memory_mib")
    training_seconds, training_ratio, training_memory = (
        _training(call, base, option, rounds) if training and not option.graphs else (None, None, None)
    )
    return Row(
        option=option.name,
        status=MEASURED,
        pass_seconds=pass_seconds,
        ratio=middle,
        ratio_least=least,
        ratio_most=most,
        max_difference=difference,
        flop_per_second=flop / pass_seconds,
        matrix_fraction=flop / pass_seconds / statistics.median(rates),
        training_steps_per_second=None if training_seconds is None else 1 / (training_seconds * option.batch),
        training_ratio=training_ratio,
        sampling_seconds=sampling,
        extrapolated=extrapolated,
        sampling_memory_mib=sampling_memory,
        training_memory_mib=training_memory,
    )


def _training(
    call: Call, base: Call, option: Option, rounds: int
) -> tuple[float, float, float] | tuple[None, None, None]:
    """Seconds of an optimizer step per volume, ratio to the base, MiB; None each if not possible."""
    try:
        base("training_seconds")
        if option.batch * base("memory_mib") > call("free_memory_mib"):
            LOG.warning("%s: training is not measured, it might run out of memory", option.name)
            return None, None, None
        turns = [(base("training_seconds"), call("training_seconds")) for _ in range(rounds)]
    except _FAILURES as error:
        LOG.warning("%s: training failed: %s", option.name, _first_line(error))
        return None, None, None
    base_seconds, seconds = zip(*turns, strict=True)
    return statistics.median(seconds), ratios(base_seconds, seconds)[0], call("memory_mib")


def _sampling_seconds(call: Call, pass_seconds: float, longest_s: float) -> tuple[dict[str, float], list[str]]:
    """Seconds per volume of each sampler, and which of them are extrapolated."""
    seconds, extrapolated = {}, []
    for name, (sampler, steps) in SAMPLERS.items():
        if steps * pass_seconds > longest_s:
            extrapolated.append(name)
            few = _STEPS_EXTRAPOLATED_FROM
            seconds[name] = call("sampling_seconds", sampler, few) / few * steps
        else:
            seconds[name] = call("sampling_seconds", sampler, steps)
    return seconds, extrapolated


def _measure_samplers(problem: Problem, rounds: int, longest_s: float) -> list[SamplerRow]:
    """The samplers alternately, in full; empty if the longest would take too long."""
    first = next(iter(SAMPLERS))
    if longest_s <= 0:
        return []
    with _process(problem, USED[problem.kind]) as call:
        if call("pass_seconds") * SAMPLERS[first][1] > longest_s:
            LOG.warning("Samplers are not compared: sampling would take longer than %g s", longest_s)
            return []
        turns = []
        for number in range(rounds):
            turns.append({name: call("sampling_seconds", *sampler) for name, sampler in SAMPLERS.items()})
            LOG.info("samplers: round %d of %d", number + 1, rounds)
    seconds = {name: [turn[name] for turn in turns] for name in SAMPLERS}
    return [
        SamplerRow(name, statistics.median(seconds[name]), *ratios(seconds[first], seconds[name])) for name in SAMPLERS
    ]


@contextmanager
def _process(problem: Problem, option: Option) -> Iterator[Call]:
    """A process with a workbench; yields a function that calls its methods by name."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(_set_up, problem, option).result()
        yield lambda method, *arguments: pool.submit(_call, method, *arguments).result()


def _set_up(problem: Problem, option: Option) -> None:
    global _workbench
    _workbench = Workbench(problem, option)


def _call(method: str, *arguments: Any) -> Any:
    return getattr(_workbench, method)(*arguments)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"
