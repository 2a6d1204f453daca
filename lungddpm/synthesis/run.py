"""Synthesis of a cohort by several concurrent jobs: complete samples are kept, missing ones are made once."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lungddpm.config.models import Config
from lungddpm.config.sections import GeneratorConfig, GeneratorSettings
from lungddpm.core import cases
from lungddpm.core.cases import CaseFolder
from lungddpm.core.code import stage_fingerprint
from lungddpm.core.cohorts import SHARED, Cohort, training_cases
from lungddpm.core.errors import InputError
from lungddpm.core.files import fingerprint, lock_if_free, read_json, sha256_of, write_json
from lungddpm.core.memory import explain_out_of_memory, peak_memory_mib
from lungddpm.core.progress import LOG, Progress, waiting
from lungddpm.core.roles import SYNTHETIC
from lungddpm.core.volume import write_volume
from lungddpm.generators import JITTERED, OWN, Generator, Plugin, Task
from lungddpm.synthesis.external import import_external
from lungddpm.synthesis.plan import PlannedSample, plan_samples, samples_wanted
from lungddpm.synthesis.records import is_complete

if TYPE_CHECKING:
    from lungddpm.layouts.placement import NoduleLibrary

_MEMORY_OPTIONS = "Lower sampling.batch_size, or free the device; complete samples are kept."
_SHOWN = 5


@dataclass(frozen=True)
class SynthesisJob:
    """One job's share of the synthesis with a generator.

    Attributes:
        generator: a plug-in, or a name in `arms.external`.
        cases_table: table of the real cases.
        output: folder of this generator's samples.
        table: the table to write.
        shard: 0-based number of this share of the work.
        shards: number of shares.
        dose: as a multiple of the real training cases; by default the largest of any arm.
        weights: of the trained network, for generators that need one.
        external: folder of samples of another system; by default the one in `arms.external`.
        device: see `lungddpm.models.accelerator.make_accelerator`.
        cohort: number of real training cases, and the replicate of the draw.
    """

    generator: str
    cases_table: Path
    output: Path
    table: Path
    shard: int = 0
    shards: int = 1
    dose: float | None = None
    weights: Path | None = None
    external: Path | None = None
    device: str = "auto"
    cohort: Cohort = SHARED


@dataclass(frozen=True)
class _Missing:
    """A sample that is still to be made, and its provenance."""

    sample: PlannedSample
    provenance: dict[str, Any]

    def is_made(self, output: Path) -> bool:
        return is_complete(CaseFolder(output / self.sample.sample_id), self.provenance["fingerprint"])


def run_synthesize(config: Config, job: SynthesisJob) -> None:
    """Make the samples `shard`, `shard + shards`, ... of a dose and the table that lists them.

    Writes `<output>/<sample>/{ct.nii.gz,layout.nii.gz,sample.json}` and one row per sample, in the order of the plan:
    row k of shard s is number k * shards + s of the dose. `path` in the table is relative to `output`. Complete
    samples with the same inputs and settings are kept; samples that another process is making for another dose are left
    to it.

    Raises:
        ConfigError: no arm uses the generator, it cannot work with this config, or memory ran out.
        InputError: no usable reference, missing or unsuitable weights, a case that breaks its contract, or one without
            room for a nodule in its lungs.
    """
    real_cases = cases.read_cases(job.cases_table)
    if job.generator in config.arms.external:
        wanted = samples_wanted(config, job.generator, real_cases, job.dose, job.cohort)
        folder = job.external or config.arms.external[job.generator]
        rows = import_external(config, folder, job.generator, wanted, job.cases_table, real_cases, job.output)
        cases.write_cases(job.table, rows[job.shard :: job.shards])
        return
    with waiting("planning the samples"):
        planned = plan_samples(config, job.generator, real_cases, job.dose, job.cohort)[job.shard :: job.shards]
        synthesis = _Synthesis(config, job, real_cases, planned)
    synthesis.make_missing()
    cases.write_cases(job.table, [_row(sample, job.generator, job.output) for sample in planned])


class _Synthesis:
    """The samples of one job under way."""

    plugin: Plugin

    def __init__(self, config: Config, job: SynthesisJob, real_cases: pd.DataFrame, planned: list[PlannedSample]):
        self.config, self.job, self.planned = config, job, planned
        self.plugin = config.plugin_of(job.generator)
        self.of_generator = config.for_generator(job.generator, job.cohort)
        self.weights = _weights_for(job.generator, config.weights_owner(job.generator), job.weights)
        self.library: NoduleLibrary | None = None
        if any(sample.layout_origin != OWN for sample in planned):
            # Placement imports scipy, which light commands do not need.
            from lungddpm.layouts.placement import open_library

            donors = training_cases(real_cases, self.of_generator.trained_for.real_cases, config.seed)
            self.library = open_library(job.cases_table, real_cases, config.roles.allow_shared_patients, donors)

    def make_missing(self) -> None:
        """Make the samples that are not complete."""
        with waiting("looking for samples that are complete"):
            missing = self._missing()
        if len(missing) < len(self.planned):
            LOG.info("%d of %d samples are already complete", len(self.planned) - len(missing), len(self.planned))
        if not missing:
            return
        with explain_out_of_memory(f"synthesis with {self.job.generator}", _MEMORY_OPTIONS):
            self._make_all(missing)

    def _make_all(self, missing: list[_Missing]) -> None:
        with waiting(f"loading {self.job.generator}"):
            generator = self.plugin.load(self.of_generator, self.weights, self.job.device)
        # On a CPU, batches are not faster, and results would depend on the batch in the last digit.
        size = 1 if generator.device == "cpu" else generator.batch_size
        is_waiting = False
        with Progress(f"synthesis with {self.job.generator}", len(missing)) as progress:
            while missing:
                with ExitStack() as locks:
                    batch, left = _claim(missing, size, self.job.output, locks)
                    if batch:
                        self._make(batch, generator)
                for _ in range(len(missing) - len(left)):
                    progress.advance()
                if len(left) == len(missing):
                    if not is_waiting:
                        LOG.warning("Other processes are making %s: waiting for them", _shown(missing))
                        is_waiting = True
                    time.sleep(1)
                missing = left

    def _missing(self) -> list[_Missing]:
        settings = _settings(self.of_generator, self.weights)
        wanted = [_Missing(sample, self._provenance(sample, settings)) for sample in self.planned]
        return [each for each in wanted if not each.is_made(self.job.output)]

    def _provenance(self, sample: PlannedSample, settings: dict[str, Any]) -> dict[str, Any]:
        folder = cases.folder_of(self.job.cases_table, sample.reference)
        provenance = {
            "sample_id": sample.sample_id,
            "reference_case_id": sample.reference["case_id"],
            "reference_patient_id": sample.reference["patient_id"],
            "reference_sha256": folder.hash(),
            "layout_origin": sample.layout_origin,
            "layout_seed": sample.layout_seed,
            "layout_inputs": self._layout_inputs(sample, folder),
            "repeat": sample.repeat,
            "seed": sample.seed,
            **settings,
        }
        return {**provenance, "fingerprint": fingerprint(provenance)}

    def _layout_inputs(self, sample: PlannedSample, reference: CaseFolder) -> str | None:
        """Fingerprint of the inputs of a made layout besides its seed and the reference's own; None for `OWN`."""
        if sample.layout_origin == OWN or self.library is None:
            return None
        inputs = {
            "synthesis": self.config.synthesis.decides_layouts(),
            "code": stage_fingerprint("make_layout"),
            "library": self.library.fingerprint,
        }
        if sample.layout_origin == JITTERED:
            inputs["nodules"] = _hash_nodules(reference.nodules)
        return fingerprint(inputs)

    def _make(self, batch: list[_Missing], generator: Generator) -> None:
        tasks = [self._task_of(each.sample) for each in batch]
        began = time.monotonic()
        made = generator.make(tasks)
        seconds = (time.monotonic() - began) / len(batch)
        for each, task, hu in zip(batch, tasks, made, strict=True):
            sample, folder = each.sample, CaseFolder(self.job.output / each.sample.sample_id)
            write_volume(folder.ct, task.reference.like(hu))
            write_volume(folder.layout, task.layout)
            nodules = task.made.nodules if task.made else ()
            kept = 0 if sample.layout_origin == JITTERED else int(sample.reference["n_nodules"])
            record = {
                **generator.describe(task),
                "n_nodules": kept + len(nodules),
                "nodules": [asdict(nodule) for nodule in nodules],
                "seconds": round(seconds, 3),
                "memory_mib": round(peak_memory_mib(generator.device)),
                "device": generator.device,
                "sha256": folder.hash(),
            }
            write_json(folder.sample_record, {**each.provenance, **record})

    def _task_of(self, sample: PlannedSample) -> Task:
        """The task for a planned sample, with its layout."""
        folder = cases.folder_of(self.job.cases_table, sample.reference)
        ct, own = folder.read()
        if sample.layout_origin == OWN or self.library is None:
            return Task(ct, own, sample.seed)
        from lungddpm.layouts.placement import jitter, place, read_shapes

        rng, case_id = np.random.default_rng(sample.layout_seed), sample.reference["case_id"]
        if sample.layout_origin == JITTERED:
            shapes = read_shapes(folder, case_id, sample.reference["patient_id"])
            made = jitter(own, shapes, self.library, self.config.synthesis, rng)
        else:
            made = place(own, self.library, self.config.synthesis, rng)
        if not made.nodules:
            raise InputError(
                folder.layout,
                "has no room in its lungs for a nodule of the discovery cases",
                "Lower synthesis.scale, or use other patients in roles.reference.",
            )
        return Task(ct, made.layout, sample.seed, made, {**self.library.folders, case_id: folder})


def _shown(missing: list[_Missing]) -> str:
    names = ", ".join(each.sample.sample_id for each in missing[:_SHOWN])
    return names if len(missing) <= _SHOWN else f"{names} and {len(missing) - _SHOWN} more"


def _claim(missing: list[_Missing], size: int, output: Path, locks: ExitStack) -> tuple[list[_Missing], list[_Missing]]:
    """Lock the next `size` missing samples; return them, and those still missing.

    Samples held by another process remain missing for now; samples made meanwhile do not.
    """
    batch: list[_Missing] = []
    left: list[_Missing] = []
    for place, each in enumerate(missing):
        if len(batch) == size:
            return batch, left + missing[place:]
        if not locks.enter_context(lock_if_free(output / each.sample.sample_id / ".lock")):
            left.append(each)
        elif not each.is_made(output):
            batch.append(each)
    return batch, left


def _weights_for(generator: str, owner: str | None, given: Path | None) -> Path | None:
    """The weights of a generator; None if it needs none, even if some are given."""
    if owner is None:
        return None
    if given is None:
        problem = f"needs the weights of a trained {owner}"
        raise InputError(f"generator '{generator}'", problem, "Pass --weights.")
    if not given.exists():
        remedy = f"Train it first (lungddpm train --generator {owner})."
        raise InputError(given, "does not exist", remedy)
    return given


def _settings(config: GeneratorConfig[GeneratorSettings], weights: Path | None) -> dict[str, Any]:
    """Everything that determines a sample besides its reference, layout and seed."""
    of_weights: dict[str, Any] = {"weights_sha256": None, "trained_on": None}
    if weights is not None:
        from lungddpm.models.checkpoint import patients_of

        of_weights = {"weights_sha256": sha256_of(weights), "trained_on": patients_of(weights)}
    return {
        "generator": config.name,
        "code": stage_fingerprint("draw", config.kind),
        "settings": config.decides_samples(),
        **of_weights,
    }


def _hash_nodules(path: Path) -> str:
    try:
        return sha256_of(path)
    except FileNotFoundError:
        raise InputError(path, "does not exist", "Delete the case's folder and prepare it again.") from None


def _row(sample: PlannedSample, generator: str, output: Path) -> dict[str, Any]:
    folder = CaseFolder(output / sample.sample_id)
    record = read_json(folder.sample_record)
    return {
        **sample.reference,
        "case_id": sample.sample_id,
        "source": generator,
        "role": SYNTHETIC,
        "n_nodules": record["n_nodules"],
        "path": sample.sample_id,
        "sha256": folder.hash(),
    }
