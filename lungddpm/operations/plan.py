"""Estimate the cost of a run in advance: jobs, hours, memory and disk of every stage."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lungddpm.config.loading import load_config
from lungddpm.config.models import Config, Segmentation, Source, Workflow
from lungddpm.config.sections import GeneratorConfig, TrainedSettings
from lungddpm.core.arms import Arm
from lungddpm.core.cohorts import count_real_cases
from lungddpm.core.errors import ConfigError, InputError
from lungddpm.core.files import read_json
from lungddpm.core.progress import waiting
from lungddpm.core.roles import ROLES, TEST
from lungddpm.core.tables import DisplayTable
from lungddpm.core.volume import per_axis
from lungddpm.operations.jobs import jobs_of
from lungddpm.sources import Size

if TYPE_CHECKING:
    from lungddpm.generators import Drawing

GIB = 2**30
PEAK_TFLOP_PER_S = {
    "rtx3090": 71, "rtx4090": 165, "a6000": 155, "l40s": 362, "a100": 312, "h100": 989, "h200": 989, "b200": 2250,
}  # fmt: skip
"""Dense bf16 matrix products with fp32 accumulation, from the vendors' data sheets."""
UTILISATION = 0.15
"""Share of the peak that 3-D networks reach. nnU-Net's default network for 128^3 voxels takes 1.53e18 operations (1000
epochs of 250 steps and 50 validations) and 9 hours on an A100 (Isensee et al., arXiv 2404.09556, runtimes in nnU-Net's
documentation): 47 of 312 TFLOP/s."""
CPU = "cpu"
CORE_FLOP_PER_S = 40e9
"""Of one server core: 55e9 in the demo's denoiser, 25e9 in its segmenters, including all overhead."""
_SCAN_VOXELS = 512**2 * 240
"""Of a chest CT, if the size of the scans is unknown."""

_CACHE_BYTES = 3
"""Per voxel and case of a training's cache."""
_LARGEST_PATCH = 128
"""Patch edge that nnU-Net plans for 8 GB of GPU memory and isotropic voxels."""
_TORCH_GIB, _CUDA_HOST_GIB = 1.2, 8.0
"""Of a process with torch, without its network; with a GPU, CUDA's libraries and nnU-Net's loader processes come on
top, which was not measured."""
_START_S, _TORCH_START_S = 1.0, 5.0
"""Of each job: Python and its libraries."""


@dataclass(frozen=True)
class _Rate:
    """Cost of a stage without a GPU, on one core."""

    seconds: float
    """A case."""
    seconds_per_mvoxel: float = 0.0
    memory_gib: float = 0.2
    memory_bytes_per_voxel: float = 0.0
    """Of the one volume that is worked on."""
    disk_bytes: float = 1e3
    """A case."""
    disk_bytes_per_voxel: float = 0.0


_RATES = {
    "simulate": _Rate(0.2, 1.0, memory_bytes_per_voxel=100, disk_bytes=1e5, disk_bytes_per_voxel=2),
    "index": _Rate(0.1),
    "prepare": _Rate(1.5, 0.4, memory_bytes_per_voxel=36, disk_bytes=5e5),
    "collect": _Rate(0.01),
    "qc": _Rate(0.05, disk_bytes=1e4),
    "synthesize": _Rate(0.1, 1.0, memory_gib=0.5, disk_bytes=1e4),
    "quality": _Rate(0.05, 1.0, memory_gib=0.5),
    "compose": _Rate(0.01, 0.1, disk_bytes_per_voxel=0.03),
    "compose_draw": _Rate(0.01),
    "plan": _Rate(0.05, 0.5, memory_gib=1.7, disk_bytes_per_voxel=2),
    "evaluate": _Rate(0.05, 1.0, memory_gib=0.3),
    "write_report": _Rate(10, memory_gib=0.5, disk_bytes=8e6),
    "checksums": _Rate(0.01, 0.01),
}  # fmt: skip
"""Measured on the demo and, for `prepare`, on two scans of LIDC-IDRI (benchmarks/case_stages.py)."""
_CASE_BYTES_PER_VOXEL = 1.6
"""CT and layout on the grid, compressed."""
_PREDICTION_BYTES_PER_VOXEL = 1.0
"""Mask and probability, compressed: 0.1 to 1.8, growing with the network's uncertainty."""


@dataclass(frozen=True)
class Cohort:
    """The scans of a run."""

    scans: int
    voxels: float
    """Of one scan, on average."""
    discovery: int
    reference: int
    test: int
    origin: str
    """Source of this information, as a clause."""
    external: int = 0
    """Scans of external test sets; included in `scans`, but not in `test`."""
    test_without_nodule: int = 0
    """Test cases that are known to have no nodule; included in `test`."""


@dataclass(frozen=True)
class Speed:
    """How fast the networks compute."""

    device: str
    flop_per_s: float
    """Of a GPU, or of one core of a CPU."""
    origin: str
    """Source of this information, as a clause."""

    @property
    def is_gpu(self) -> bool:
        """Whether hours are those of GPUs."""
        return self.device != CPU


@dataclass(frozen=True)
class Stage:
    """Total cost of all jobs of a rule; memory is that of the largest job."""

    name: str
    jobs: int
    gpu_hours: float
    core_hours: float
    """Of jobs without a GPU."""
    memory_gib: float
    """On one node."""
    gpu_memory_gib: float | None
    """On one GPU, without the savings of `gradient_checkpointing`; None for jobs without a GPU."""
    disk_gib: float
    """Peak while the stage runs; training states and caches are removed when it ends."""


@dataclass(frozen=True)
class NetworkCost:
    """Cost of training and applying one network."""

    parameters: int
    forward_flop: int
    """Of one volume (or patch)."""
    step_flop: int
    """Of one optimizer step; if a training has several phases, of the last one."""
    memory_bytes: int
    """In training: weights, their gradients, averages and moments, and the activations kept for the backward pass,
    in fp32. The savings of mixed precision go into what libraries need besides: nnU-Net's default network, 7.2 GiB by
    this count, takes 7.7 GB (see `UTILISATION`)."""
    weights_bytes: int
    drawing_bytes: int
    """To apply it to one volume (or patch), besides the weights: the maps that are there at one time, in fp32."""
    opponent_parameters: int = 0
    """Of the discriminators in adversarial training."""
    training_flop: int = 0
    """Of all steps of a generator's training, of one process."""


@dataclass(frozen=True)
class Plan:
    """What a run will cost, and what that rests on."""

    cohort: Cohort
    speed: Speed
    stages: list[Stage]


def run_plan(
    configs: Sequence[Path | str],
    tables: Sequence[Path],
    scans: int | None,
    device: str = CPU,
    step_seconds: float | None = None,
    bench: Path | None = None,
) -> Plan:
    """The plan of a run (see `describe_plan`). Writes nothing.

    Args:
        configs: files of the config, or JSON texts; `source.path` may be missing, as no scan is read.
        tables: tables that may list the scans; the first that lists those of the config is used.
        scans: number of scans, overriding the tables; None: from a table or the source.
        device: `cpu`, or a GPU of `PEAK_TFLOP_PER_S`, or any name if `step_seconds` is given.
        step_seconds: of an optimizer step on that device (of one core, on a CPU); see `measured_speed`.
        bench: output of `lungddpm bench`; then the device is the one measured.

    Raises:
        ConfigError: the config is wrong, the device unknown, or the number of scans unknown.
        InputError: a table, or the file of `bench`, cannot be read.
    """
    config = load_plan_config(*configs)
    cohort = count_cohort(config, first_table(tables, config), scans)
    speed = choose_speed(config, device, step_seconds, bench)
    with waiting("counting the operations of its networks"):
        return Plan(cohort, speed, plan_run(config, cohort, speed))


def first_table(tables: Sequence[Path], config: Config) -> Path | None:
    """The first of these tables that exists and is of the config's data sets."""
    there = (table for table in tables if table.exists())
    return next((table for table in there if _cohort_of_table(config, table) is not None), None)


def choose_speed(config: Config, device: str, step_seconds: float | None, bench: Path | None) -> Speed:
    """The speed of a device, from a benchmark, a timed step, or its data sheet; see `run_plan`.

    Raises:
        ConfigError: the device is not known.
        InputError: the file of `bench` cannot be read.
    """
    if bench is not None:
        return benchmarked_speed(bench)
    return known_speed(device) if step_seconds is None else measured_speed(config, device, step_seconds)


def load_plan_config(*sources: Path | str) -> Config:
    """A config for planning: `source.path` may be missing, because no scan is read."""
    return load_config(*sources, needs_source=False)


def count_cohort(config: Config, index: Path | None, scans: int | None) -> Cohort:
    """The number of scans, their size, and their roles.

    Args:
        config: `source`, `external_tests` and `roles` are used.
        index: table of `lungddpm index` or `collect`; one of other data sets is ignored.
        scans: number of scans of `source` if there is no table; None: from the source.

    Raises:
        ConfigError: the number of scans is unknown.
    """
    if scans is None and index is not None and (known := _cohort_of_table(config, index)) is not None:
        return known
    size = _declared_size(config.source)
    voxels = _SCAN_VOXELS if size is None else size.voxels
    if scans is not None:
        number, origin = scans, "--cases"
    elif size is not None:
        number, origin = size.scans, size.origin
    else:
        remedy = "Give --cases N, or --index FILE of 'lungddpm index'."
        raise ConfigError("--cases", "is required, as no index lists the scans", remedy)
    sizes = {name: _declared_size(each) for name, each in config.external_tests.items()}
    external = sum(each.scans for each in sizes.values() if each is not None)
    if unknown := [name for name, each in sizes.items() if each is None]:
        names = ", ".join(f"external_tests.{name}" for name in unknown)
        origin += f"; {names} not counted: no index lists {'its' if len(unknown) == 1 else 'their'} scans"
    return Cohort(number + external, voxels, **config.roles.counts(number), origin=origin, external=external)


def _declared_size(source: Source) -> Size | None:
    """The size that a source declares; None if it declares none."""
    declared = source.declared.size
    size: Size | None = None if declared is None else declared(source.settings)
    return size


def known_speed(device: str) -> Speed:
    """The speed of a named device, from its data sheet.

    Raises:
        ConfigError: the device is not known.
    """
    if device == CPU:
        return Speed(CPU, CORE_FLOP_PER_S, f"{CORE_FLOP_PER_S / 1e9:g} GFLOP/s per core, good to a factor of two")
    if device not in PEAK_TFLOP_PER_S:
        known = ", ".join([CPU, *PEAK_TFLOP_PER_S])
        raise ConfigError("--device", f"'{device}' is not known", f"Use one of {known}, or give --step-seconds.")
    peak = PEAK_TFLOP_PER_S[device]
    return Speed(device, UTILISATION * peak * 1e12, f"{UTILISATION:.0%} of {peak} TFLOP/s, good to a factor of two")


def measured_speed(config: Config, device: str, step_seconds: float) -> Speed:
    """The speed of a device on which one optimizer step was timed (`lungddpm train --estimate`).

    Args:
        config: the one that was timed; if several generators are trained, for the first one in use.
        device: its device; for `cpu`, one core.
        step_seconds: of one optimizer step.

    Raises:
        ConfigError: the config trains no generator.
    """
    trained = config.trained_generators()
    if not trained:
        raise ConfigError("--step-seconds", "the config has no trained generator", "Give a device.")
    rate = network_cost(trained[0]).step_flop / step_seconds
    return Speed(device, rate, f"{rate / 1e12:.3g} TFLOP/s, from {step_seconds:g} s per step of {trained[0].name}")


def benchmarked_speed(path: Path) -> Speed:
    """The speed that `lungddpm bench` measured with the default options, in training if it was measured.

    Raises:
        InputError: the file is missing, or is not a result of `lungddpm bench`.
    """
    from lungddpm.operations.bench import BASE, MEASURED, USED

    remedy = "Create it with 'lungddpm bench'."
    result = read_json(path, remedy)
    try:
        is_cpu = result["device"] == CPU
        rows = {row["option"]: row for row in result["options"] if row["status"] == MEASURED}
        row = rows.get(USED["cpu" if is_cpu else "cuda"].name) or rows[BASE.name]
        rate = row["flop_per_second"]
        if row["training_steps_per_second"]:
            # Forward and backward pass of a step take three times the operations of a forward pass.
            rate = 3 * result["flop_per_pass"] * row["training_steps_per_second"]
        rate /= result["threads"] if is_cpu else 1
        return Speed(result["device_name"], rate, f"{rate / 1e12:.3g} TFLOP/s, from {path.as_posix()}")
    except (KeyError, TypeError, AttributeError) as error:
        problem = f"is not a result of 'lungddpm bench' ({type(error).__name__}: {error})"
        raise InputError(path, problem, remedy) from None


def plan_run(config: Config, cohort: Cohort, speed: Speed) -> list[Stage]:
    """Every stage of a run from scratch, in order.

    Hours of networks are their operations at the given speed; those of the other stages were measured on the demo and
    on scans of LIDC-IDRI, on one core.
    """
    grid = math.prod(config.grid.size)
    numbers = {number: count_real_cases(number, cohort.discovery) for number in config.arms.numbers()}
    most = numbers[config.arms.largest_number()]
    made_for = {name: [numbers[number] for number in config.arms.numbers_of(name)] for name in config.arms.doses_of()}
    samples = {
        name: len(config.draws(name)) * sum(round(doses[-1] * number) for number in made_for[name])
        for name, doses in config.arms.drawn_doses_of().items()
    }
    of_most = {name: round(dose * most) for name, dose in config.arms.largest_doses().items()}
    listed = jobs_of(config, config.workflow.prepare_jobs(cohort.scans), cohort.discovery)
    jobs = Counter(job.stage for job in listed)
    # Doses share samples, but each is a separate job.
    drawing_jobs = Counter(job.output.parts[1] for job in listed if job.stage == "synthesize")
    training_jobs = Counter(job.output.parts[1] for job in listed if job.stage == "train_generator")
    arms = config.arms.all()
    draws = {arm: config.draws(arm.generator) if arm.generator else [None] for arm in arms}
    training_cases = sum(_training_cases(arm, numbers[arm.real_cases], len(draws[arm])) for arm in arms)
    predictions = (cohort.test + cohort.external) * jobs["predict"]

    stages = [
        _light("index", jobs["index"], cohort.scans),
        _light("prepare", jobs["prepare"], cohort.scans, cohort.voxels, grid * _CASE_BYTES_PER_VOXEL),
        _light("collect", jobs["collect"], cohort.scans),
        _light("qc", jobs["qc"], cohort.scans),
    ]
    if speed.is_gpu and config.layouts.lungs != "classical":  # its jobs hold a GPU as long as they run
        stages[1] = replace(stages[1], gpu_hours=stages[1].core_hours, core_hours=0.0)
    if config.source.is_simulated:
        stages.insert(0, _light("simulate", 1, cohort.scans, cohort.voxels))
    costs = {}
    for trained in config.trained_generators():
        cost = costs[trained.name] = network_cost(trained)
        trainings = training_jobs[trained.name]
        stages.append(_train_generator(config.workflow, cost, grid * cohort.discovery, trainings, speed))
    light = []
    for name, number in samples.items():
        owner = None if name in config.arms.external else config.weights_owner(name)
        if owner is None:
            light.append(name)
        else:
            drawing = config.plugin_of(name).drawing(config.for_generator(name))
            stages.append(_draw(drawing, costs[owner], drawing_jobs[name], number, grid, speed))
    if light:
        made = sum(samples[name] for name in light)
        light_jobs = sum(drawing_jobs[name] for name in light)
        stages.append(_light("synthesize", light_jobs, made, grid, grid * _CASE_BYTES_PER_VOXEL))
    if samples:
        of_quality = sum(len(config.draws(name)) * number for name, number in of_most.items())
        stages.append(_light("quality", jobs["quality"], of_quality, grid))
    segmenter, judged = segmenter_cost(config), []
    replicates = len(config.segmentation.replicates())
    if filtered := [arm for arm in arms if arm.filtered]:
        candidates = sum(round(config.arms.drawn_dose(arm) * numbers[arm.real_cases]) for arm in filtered)
        volumes = replicates * candidates
        judged.append(_predict("filter_samples", config, segmenter, jobs["filter_samples"], volumes, speed))
    if samples:
        limit = config.label_fidelity.samples
        volumes = replicates * sum(min(number, limit) for number in [*of_most.values(), cohort.reference])
        judged.append(_predict("label_fidelity", config, segmenter, jobs["label_fidelity"], volumes, speed))
    return [
        *stages,
        _light("compose", jobs["compose"], training_cases, grid),
        *([_light("compose_draw", jobs["compose_draw"], 0)] if jobs["compose_draw"] else []),
        _light("plan", jobs["plan"], training_cases, grid),
        _train_segmenter(config.segmentation, segmenter, jobs["train_segmenter"], speed),
        _predict("predict", config, segmenter, jobs["predict"], predictions, speed, _PREDICTION_BYTES_PER_VOXEL),
        *judged,
        _light("evaluate", jobs["evaluate"], predictions, grid),
        _light("write_report", 1, 1),
        _light("checksums", 1, cohort.scans + training_cases, grid),
    ]


def network_cost(config: GeneratorConfig[TrainedSettings]) -> NetworkCost:
    """Operations and memory of the network of a trained generator.

    Those of a step are for its crops, if any, in the last phase of the training; memory is that of the largest phase.
    The forward pass is that of drawing.
    """
    from lungddpm.operations.estimate import count, drawing_memory, parts_of, training_memory

    drawn, parts = (1, *config.settings.drawn_size(config.grid)[::-1]), parts_of(config)
    parameters, forward, _ = count(config, drawn)
    last = max(part.phase for part in parts)
    return NetworkCost(
        parameters,
        forward,
        sum(part.step_flop for part in parts if part.phase == last),
        training_memory(config),
        4 * parameters,
        drawing_memory(config, drawn),
        max((part.parameters for part in parts if part.is_opponent), default=0),
        sum(part.steps * part.step_flop for part in parts),
    )


def segmenter_cost(config: Config) -> NetworkCost:
    """Operations and memory of nnU-Net: the network of the config, or the one that nnU-Net plans for such a grid."""
    import torch
    from dynamic_network_architectures.architectures.unet import PlainConvUNet
    from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props
    from torch import nn
    from torch.utils.flop_counter import FlopCounterMode

    from lungddpm.operations.estimate import drawing_bytes_of, kept_bytes

    segmentation, patch = config.segmentation, _patch(config)
    if segmentation.network is None:
        _, strides, kernels, patch, _ = get_pool_and_conv_props((1, 1, 1), patch, 4, 999)
        features = [min(320, 32 * 2**stage) for stage in range(len(strides))]
    else:
        features = segmentation.network.features
        strides, kernels = [1] + [2] * (len(features) - 1), [3] * len(features)
    with torch.device("meta"):
        network = PlainConvUNet(
            1, len(features), features, nn.Conv3d, kernels, strides, 2, 2, 2, True, nn.InstanceNorm3d,
            {"affine": True}, nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True}, deep_supervision=True,
        )  # fmt: skip
        patches = torch.zeros(segmentation.batch_size, 1, *map(int, patch))
    with FlopCounterMode(display=False) as forward:
        outputs = network(patches)
    with FlopCounterMode(display=False) as backward:
        sum(output.mean() for output in outputs).backward()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    one_pass = forward.get_total_flops()
    kept = kept_bytes(network, lambda: network(patches))
    # A tenth as many validation passes (see LungDDPMTrainer). Weight, gradient and two moments at most.
    step = round(1.1 * one_pass) + backward.get_total_flops()
    volume = segmentation.batch_size
    drawing = drawing_bytes_of(network, [patches]) // volume
    return NetworkCost(parameters, one_pass // volume, step, kept + 4 * 4 * parameters, 4 * parameters, drawing)


def describe_plan(plan: Plan) -> str:
    """The plan as a table for a terminal, with its assumptions."""
    cohort, speed, stages = plan.cohort, plan.speed, plan.stages
    heads = ["stage", "jobs", "GPU hours", "core hours", "memory, GiB", "GPU memory, GiB", "disk, GiB"]
    totals = [
        "total", str(sum(stage.jobs for stage in stages)), _number(sum(stage.gpu_hours for stage in stages)),
        _number(sum(stage.core_hours for stage in stages)), "", "", _number(sum(stage.disk_gib for stage in stages)),
    ]  # fmt: skip
    rows = []
    for stage in stages:
        figures = stage.gpu_hours, stage.core_hours, stage.memory_gib, stage.gpu_memory_gib, stage.disk_gib
        rows.append([stage.name, str(stage.jobs), *map(_number, figures)])
    table = DisplayTable(heads, [*rows, totals], [head != "stage" for head in heads])
    external = f", {cohort.external} external test" if cohort.external else ""
    return (
        f"{table.text(100)}\n\n"
        f"{cohort.scans} scans ({cohort.origin}): {cohort.discovery} discovery, {cohort.reference} reference, "
        f"{cohort.test} test{external}.\n{speed.device}: {speed.origin}.\nMemory is per job; disk is the peak of a "
        "stage. Without a GPU, GPU jobs are counted in core hours."
    )


def plan_values(plan: Plan) -> dict[str, Any]:
    """The same for `--json`; the keys are those of docs/reference/command-line.md."""
    return {
        "scans": {
            "total": plan.cohort.scans,
            **{role: getattr(plan.cohort, role) for role in ROLES},
            "external": plan.cohort.external,
            "voxels": plan.cohort.voxels,
            "origin": plan.cohort.origin,
        },
        "speed": {
            "device": plan.speed.device, "flop_per_second": plan.speed.flop_per_s, "origin": plan.speed.origin
        },
        "stages": [{("stage" if key == "name" else key): v for key, v in vars(each).items()} for each in plan.stages],
        "total": {
            "jobs": sum(each.jobs for each in plan.stages),
            "gpu_hours": sum(each.gpu_hours for each in plan.stages),
            "core_hours": sum(each.core_hours for each in plan.stages),
            "disk_gib": sum(each.disk_gib for each in plan.stages),
        },
    }  # fmt: skip


def _cohort_of_table(config: Config, index: Path) -> Cohort | None:
    """The cohort of a table of cases; None if it is of other data sets."""
    from lungddpm.core.cases import internal, read_cases, usable

    table = read_cases(index)
    table = table[table["size_z"] > 0]
    kinds = {name: each.kind for name, each in config.data_sets().items()}
    if set(table["data_set"]) != kinds.keys() or (table["source"] != table["data_set"].map(kinds)).any():
        return None
    voxels = (table["size_x"] * table["size_y"] * table["size_z"]).mean()
    counts = {role: len(usable(internal(table), role)) for role in ROLES}
    external = len(usable(table, TEST)) - counts[TEST]
    # An index does not know the nodules yet.
    empty = int((usable(internal(table), TEST)["n_nodules"] == 0).sum()) if "n_nodules" in table else 0
    return Cohort(
        len(table), float(voxels), **counts, origin=index.as_posix(), external=external, test_without_nodule=empty
    )


def _light(name: str, jobs: int, cases: int, voxels: float = 0.0, further_disk_bytes: float = 0.0) -> Stage:
    """A stage without a GPU: `cases` volumes of `voxels` each, shared among the jobs."""
    rate = _RATES[name]
    seconds = jobs * _START_S + cases * (rate.seconds + rate.seconds_per_mvoxel * voxels / 1e6)
    memory = rate.memory_gib + rate.memory_bytes_per_voxel * voxels / GIB
    disk = cases * (rate.disk_bytes + rate.disk_bytes_per_voxel * voxels + further_disk_bytes)
    return Stage(name, jobs, 0.0, seconds / 3600, memory, None, disk / GIB)


def _heavy(
    name: str, jobs: int, flop: float, memory_bytes: float, disk_bytes: float, speed: Speed, processes: int = 1
) -> Stage:
    """A stage with GPUs, one for each process of a node; without a GPU it runs on cores."""
    hours = (jobs * _TORCH_START_S + flop / speed.flop_per_s) / 3600
    network = memory_bytes / GIB
    if speed.is_gpu:
        return Stage(name, jobs, hours, 0.0, processes * _CUDA_HOST_GIB, network, disk_bytes / GIB)
    return Stage(name, jobs, 0.0, hours, processes * (_TORCH_GIB + network), None, disk_bytes / GIB)


def _train_generator(
    workflow: Workflow,
    cost: NetworkCost,
    voxels: int,
    trainings: int,
    speed: Speed,
) -> Stage:
    # Three states of weights, average and moments while one is written, and the result; discriminators have no average.
    disk = 4 * (13 * cost.parameters + 9 * cost.opponent_parameters) + _CACHE_BYTES * voxels
    # Each process makes its own forward passes.
    flop = cost.training_flop * workflow.training_processes
    return _heavy(
        "train_generator", trainings, trainings * flop, cost.memory_bytes, trainings * disk, speed,
        workflow.training_gpus,
    )  # fmt: skip


def _draw(drawing: Drawing, cost: NetworkCost, jobs: int, samples: int, grid: int, speed: Speed) -> Stage:
    flop = samples * drawing.passes_for() * cost.forward_flop
    disk = samples * (_RATES["synthesize"].disk_bytes + _CASE_BYTES_PER_VOXEL * grid)
    memory = cost.weights_bytes + drawing.batch_size * cost.drawing_bytes
    return _heavy("synthesize", jobs, flop, memory, disk, speed)


def _train_segmenter(segmentation: Segmentation, cost: NetworkCost, runs: int, speed: Speed) -> Stage:
    moments = 1 if segmentation.optimizer == "sgd" else 2
    # Two checkpoints while one is written.
    disk = runs * 2 * (1 + moments) * 4 * cost.parameters
    return _heavy("train_segmenter", runs, runs * segmentation.steps * cost.step_flop, cost.memory_bytes, disk, speed)


def _predict(
    name: str, config: Config, cost: NetworkCost, jobs: int, volumes: int, speed: Speed, bytes_per_voxel: float = 0.0
) -> Stage:
    # nnU-Net's windows overlap by half.
    windows = math.prod(
        2 * math.ceil(edge / side) - 1 for edge, side in zip(config.grid.size, _patch(config), strict=True)
    )
    flop = volumes * windows * cost.forward_flop * config.segmentation.predictions_per_case
    disk = volumes * bytes_per_voxel * math.prod(config.grid.size)
    return _heavy(name, jobs, flop, cost.weights_bytes + cost.drawing_bytes, disk, speed)


def _training_cases(arm: Arm, real: int, draws: int) -> int:
    """Real and synthetic cases of an arm, of all its draws."""
    return arm.real * real + draws * round(arm.dose * real)


def _patch(config: Config) -> tuple[int, int, int]:
    """Edges of nnU-Net's patches along x, y, z."""
    network = config.segmentation.network
    return network.patch if network is not None else per_axis(min(edge, _LARGEST_PATCH) for edge in config.grid.size)


def _number(value: float | None) -> str:
    return "–" if not value else f"{value:,.0f}" if value >= 100 else f"{value:.2g}" if value >= 0.01 else "<0.01"
