"""Generators: what turns a reference CT, a layout and a seed into a synthetic CT. A new one is one new module here.

CITATION: str                 the work to cite
NEEDS_DENOISER: bool          whether `load` needs the weights of a trained denoiser
load(config, weights, device) -> Generator

A module imports heavy libraries inside its functions only: light commands import it to read the two constants.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd

from lungddpm import cases
from lungddpm.config import Config
from lungddpm.errors import ConfigError, InputError
from lungddpm.files import code_fingerprint, fingerprint, seed_from, sha256_of, write_json
from lungddpm.progress import LOG, Progress
from lungddpm.volume import Volume, write_volume


@dataclass(frozen=True)
class Task:
    """One synthetic CT to make.

    Attributes:
        reference: int16 HU; fills what the layout leaves open.
        layout: uint8 labels on the same grid.
        seed: of every random number in this CT.
    """

    reference: Volume
    layout: Volume
    seed: int


@dataclass(frozen=True)
class Generator:
    """A generator ready to work.

    Attributes:
        make: tasks on grids of one size -> one (x, y, z) int16 HU array each, on its reference's grid. Where the
            layout is background, the array equals the reference exactly. A task's array does not depend on the others.
        device: what it computes on, for the record.
    """

    make: Callable[[list[Task]], list[np.ndarray]]
    device: str = "cpu"


@dataclass(frozen=True)
class PlannedSample:
    """One entry of the plan: which reference, how many times it was used before, with which seed."""

    sample_id: str
    reference: pd.Series
    repeat: int
    seed: int


def module_of(name: str) -> ModuleType:
    """The generator module of that name."""
    return importlib.import_module(f"{__name__}.{name}")


def plan_samples(config: Config, generator: str, table: pd.DataFrame) -> list[PlannedSample]:
    """Everything that a generator makes in a run, in order; an arm with a smaller dose takes the first ones.

    The number is the largest dose times the usable discovery cases, rounded. References with nodules take turns, in
    table order, each with its own layout.

    Args:
        config: doses, run name and root seed.
        generator: one that the config uses.
        table: all cases.

    Raises:
        ConfigError: no arm uses the generator.
        InputError: there is no reference to use.
    """
    doses = config.arms.largest_doses()
    if generator not in doses:
        raise ConfigError("arms", f"no arm uses the generator '{generator}'", f"In use are: {', '.join(doses)}.")
    number = round(doses[generator] * len(cases.usable(table, "discovery")))
    references = cases.usable(table, "reference")
    references = [row for _, row in references[references["n_nodules"] > 0].iterrows()]
    if number and not references:
        raise InputError(
            "cases.tsv", "has no usable reference case with a nodule", "Give more patients the role reference."
        )
    plan = []
    for index in range(number):
        repeat, place = divmod(index, len(references))
        case_id = references[place]["case_id"]
        seed = seed_from(config.seed, config.diffusion.run, generator, case_id, repeat)
        plan.append(PlannedSample(f"{case_id}_s{repeat:03d}", references[place], repeat, seed))
    return plan


def run_synthesize(
    config: Config,
    generator: str,
    cases_table: Path,
    weights: Path | None,
    output: Path,
    shard: int,
    shards: int,
    table: Path,
    device: str = "auto",
) -> None:
    """Make the samples `shard`, `shard + shards`, ... of the plan and the table that lists them.

    Writes `<output>/<sample>/{ct.nii.gz,layout.nii.gz,sample.json}` and one row a sample, in the order of the plan:
    row k of shard s is number k * shards + s of the whole plan. `path` in the table is relative to `output`. Samples
    that are complete and were made from the same inputs with the same settings are left as they are.

    Args:
        config: the whole config.
        generator: module of `lungddpm/generators/`.
        cases_table: table of the real cases.
        weights: trained denoiser, for generators that need one.
        output: folder of this generator's samples.
        shard: 0-based number of this share of the work.
        shards: how many shares there are.
        table: the table to write.
        device: see `lungddpm.diffusion.device.make_accelerator`.

    Raises:
        ConfigError: no arm uses the generator.
        InputError: no usable reference, missing or unfit weights, or a case that breaks its contract.
    """
    mine = plan_samples(config, generator, cases.read_cases(cases_table))[shard::shards]
    module = module_of(generator)
    if module.NEEDS_DENOISER and weights is None:
        raise InputError(f"generator '{generator}'", "needs the weights of a denoiser", "Give --weights.")
    settings = _settings(config, generator, weights if module.NEEDS_DENOISER else None)
    wanted = [_provenance(sample, generator, settings, cases_table) for sample in mine]
    missing = [
        (sample, provenance)
        for sample, provenance in zip(mine, wanted, strict=True)
        if not _is_complete(output / sample.sample_id, provenance["fingerprint"])
    ]
    if len(missing) < len(mine):
        LOG.info("%d of %d samples are complete already", len(mine) - len(missing), len(mine))
    if missing:
        loaded: Generator = module.load(config, weights, device)
        size = config.diffusion.sampling.batch_size
        with Progress(f"synthesis with {generator}", len(missing)) as progress:
            for first in range(0, len(missing), size):
                _make(missing[first : first + size], loaded, cases_table, output)
                for _ in missing[first : first + size]:
                    progress.advance()
    cases.write_cases(table, [_row(sample, generator, output) for sample in mine])


def _settings(config: Config, generator: str, weights: Path | None) -> dict[str, Any]:
    """What decides a sample besides its reference, its layout and its seed."""
    settings = {"generator": generator, "code": code_fingerprint("diffusion", "generators")}
    if weights is None:
        return {**settings, "sampler": None, "steps": None, "aas_mode": None, "weights_sha256": None}
    if not weights.exists():
        raise InputError(weights, "does not exist", "Train the denoiser first (lungddpm train).")
    return {
        **settings,
        "sampler": config.diffusion.sampling.sampler,
        "steps": config.diffusion.sampling.steps,
        "aas_mode": "corrected",
        "weights_sha256": sha256_of(weights),
    }


def _provenance(sample: PlannedSample, generator: str, settings: dict[str, Any], cases_table: Path) -> dict[str, Any]:
    folder = cases.folder_of(cases_table, sample.reference)
    provenance = {
        "sample_id": sample.sample_id,
        "reference_case_id": sample.reference["case_id"],
        "reference_patient_id": sample.reference["patient_id"],
        "reference_sha256": cases.hash_case(folder),
        "layout_origin": "reference",
        "repeat": sample.repeat,
        "seed": sample.seed,
        **settings,
    }
    return {**provenance, "fingerprint": fingerprint(provenance)}


def _is_complete(folder: Path, wanted_fingerprint: str) -> bool:
    try:
        record = json.loads((folder / "sample.json").read_text(encoding="utf-8"))
        return record["fingerprint"] == wanted_fingerprint and record["sha256"] == cases.hash_case(folder)
    except (FileNotFoundError, ValueError, KeyError, TypeError, InputError):
        return False


def _make(
    batch: list[tuple[PlannedSample, dict[str, Any]]], generator: Generator, cases_table: Path, output: Path
) -> None:
    tasks = []
    for sample, _ in batch:
        ct, layout = cases.read_case(cases.folder_of(cases_table, sample.reference))
        tasks.append(Task(ct, layout, sample.seed))
    began = time.monotonic()
    made = generator.make(tasks)
    seconds = (time.monotonic() - began) / len(batch)
    for (sample, provenance), task, hu in zip(batch, tasks, made, strict=True):
        folder = output / sample.sample_id
        write_volume(folder / "ct.nii.gz", task.reference.like(hu))
        write_volume(folder / "layout.nii.gz", task.layout)
        record = {"seconds": round(seconds, 3), "device": generator.device, "sha256": cases.hash_case(folder)}
        write_json(folder / "sample.json", {**provenance, **record})


def _row(sample: PlannedSample, generator: str, output: Path) -> dict[str, Any]:
    return {
        **sample.reference,
        "case_id": sample.sample_id,
        "source": generator,
        "role": "synthetic",
        "path": sample.sample_id,
        "sha256": cases.hash_case(output / sample.sample_id),
    }
