"""Generators: what turns a reference CT, a layout and a seed into a synthetic CT. A new one is one new module here.

CITATION: str                 the work to cite
DENOISER: str | None          section of the config that describes the denoiser whose weights `load` needs, if any
LAYOUTS: tuple[str, str]      where the layouts are from when a reference with nodules is used first, and again: each
                              `OWN`, `JITTERED` or `ADDED`, depending on what its CT can show. References without a
                              nodule get placed ones; where both are `OWN`, they are left out
load(config, weights, device) -> Generator

A module imports heavy libraries inside its functions only: light commands import it to read the three constants.
Names in `arms.external` are no modules: the module `external` takes in what other systems made under them.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lungddpm.config.models import Config
from lungddpm.core import cases
from lungddpm.core.code import stage_fingerprint
from lungddpm.core.errors import ConfigError, InputError
from lungddpm.core.files import fingerprint, lock_if_free, read_json, seed_from, sha256_of, write_json
from lungddpm.core.progress import LOG, Progress
from lungddpm.core.roles import DISCOVERY, REFERENCE, SYNTHETIC
from lungddpm.core.volume import Volume, write_volume

if TYPE_CHECKING:
    from lungddpm.layouts.placement import Bank, MadeLayout

OWN, PLACED, JITTERED, ADDED = "reference", "placed", "jittered", "added"
"""Where a sample's layout is from: it is the reference's own; nodules were placed in a reference that has none; the
reference's nodules were moved; they are where they were, and others were placed beside them."""


@dataclass(frozen=True)
class Task:
    """One synthetic CT to make.

    Attributes:
        reference: int16 HU; fills what the layout leaves open.
        layout: uint8 labels on the same grid.
        seed: of every random number in this CT.
        made: how the layout was made; None for the reference's own.
        donors: folder of every case that one of its nodules is from, by case id.
    """

    reference: Volume
    layout: Volume
    seed: int
    made: MadeLayout | None = None
    donors: Mapping[str, cases.CaseFolder] = field(default_factory=dict)


@dataclass(frozen=True)
class Generator:
    """A generator ready to work.

    Attributes:
        make: tasks on grids of one size -> one (x, y, z) int16 HU array each, on its reference's grid. Where the
            layout is background, the array equals the reference exactly (but for published AAS, which leaves noise in
            it, and for `med_ddpm`, which has no AAS). A task's array does not depend on the others.
        device: what it computes on, for the record.
    """

    make: Callable[[list[Task]], list[np.ndarray]]
    device: str = "cpu"


@dataclass(frozen=True)
class PlannedSample:
    """One entry of the plan.

    Attributes:
        sample_id: its name and folder.
        reference: row of the case table.
        repeat: how many times the reference was used before.
        seed: of every random number in the CT.
        layout_origin: `OWN`, `PLACED`, `JITTERED` or `ADDED`.
        layout_seed: of every random number in the layout; None for `OWN`. The same for all generators of a run, so that
            those that can show the same layouts get the same ones.
    """

    sample_id: str
    reference: pd.Series
    repeat: int
    seed: int
    layout_origin: str
    layout_seed: int | None


def module_of(name: str, config: Config) -> ModuleType:
    """The module behind a generator's name: `external` for those in `arms.external`."""
    return importlib.import_module(f"{__name__}.{'external' if name in config.arms.external else name}")


def samples_wanted(config: Config, generator: str, table: pd.DataFrame, dose: float | None = None) -> int:
    """How many samples make up a dose (by default the largest): that times the usable discovery cases, rounded.

    Raises:
        ConfigError: no arm uses the generator.
    """
    doses = config.arms.largest_doses()
    if generator not in doses:
        raise ConfigError("arms", f"no arm uses the generator '{generator}'", f"In use are: {', '.join(doses)}.")
    return round((dose or doses[generator]) * len(cases.usable(table, DISCOVERY)))


def plan_samples(config: Config, generator: str, table: pd.DataFrame, dose: float | None = None) -> list[PlannedSample]:
    """The samples of a dose (by default the largest), in order; a smaller dose is the first ones of a larger one.

    References take turns, in table order, until there are `samples_wanted`. Those with nodules get layouts as
    the generator's `LAYOUTS` says, those without get placed nodules; without `synthesis.place_nodules`, and for
    generators that show own layouts only, they are left out. Without `synthesis.jitter_repeats`, the layout stays the
    same each time.

    Args:
        config: doses, run name, root seed and `synthesis`.
        generator: one that the config uses.
        table: all cases.
        dose: as a multiple of the real training cases.

    Raises:
        ConfigError: no arm uses the generator.
        InputError: there is no reference to use.
    """
    number = samples_wanted(config, generator, table, dose)
    first, again = module_of(generator, config).LAYOUTS
    with_nodule = first == again == OWN or not config.synthesis.place_nodules
    references = cases.usable(table, REFERENCE)
    if with_nodule:
        references = references[references["n_nodules"] > 0]
    references = [row for _, row in references.iterrows()]
    if number and not references:
        raise InputError(
            cases.CASES,
            f"has no usable reference case{' with a nodule' if with_nodule else ''} for the generator '{generator}'",
            "Give more patients the role reference.",
        )
    plan = []
    for index in range(number):
        repeat, place = divmod(index, len(references))
        case_id = references[place]["case_id"]
        varies = repeat > 0 and config.synthesis.jitter_repeats
        origin = PLACED if references[place]["n_nodules"] == 0 else again if varies else first
        names = config.seed, config.diffusion.run
        plan.append(
            PlannedSample(
                sample_id=f"{case_id}_s{repeat:03d}",
                reference=references[place],
                repeat=repeat,
                seed=seed_from(*names, generator, case_id, repeat),
                layout_origin=origin,
                # Where repeats are not to differ, all of them take the layout of the first.
                layout_seed=None if origin == OWN else seed_from(*names, "layout", case_id, repeat if varies else 0),
            )
        )
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
    dose: float | None = None,
    external: Path | None = None,
) -> None:
    """Make the samples `shard`, `shard + shards`, ... of a dose and the table that lists them.

    Writes `<output>/<sample>/{ct.nii.gz,layout.nii.gz,sample.json}` and one row a sample, in the order of the plan:
    row k of shard s is number k * shards + s of the dose. `path` in the table is relative to `output`. Samples that
    are complete and were made from the same inputs with the same settings are left as they are; what another process
    is making for another dose is left to it.

    Args:
        config: the whole config.
        generator: module of `lungddpm/generators/`.
        cases_table: table of the real cases.
        weights: trained denoiser, for generators that need one.
        output: folder of this generator's samples.
        shard: 0-based number of this share of the work.
        shards: how many shares there are.
        table: the table to write.
        device: see `lungddpm.models.accelerator.make_accelerator`.
        dose: by default the largest that an arm takes.
        external: folder of a generator in `arms.external`; by default the one named there.

    Raises:
        ConfigError: no arm uses the generator, or the section of its denoiser is not set.
        InputError: no usable reference, missing or unfit weights, a case that breaks its contract, or one in whose
            lungs no nodule can be placed.
    """
    real_cases = cases.read_cases(cases_table)
    if generator in config.arms.external:
        folder = external or config.arms.external[generator]
        wanted = samples_wanted(config, generator, real_cases, dose)
        take_in = module_of(generator, config).take_in
        rows = take_in(config, folder, generator, wanted, cases_table, real_cases, output)
        cases.write_cases(table, rows[shard::shards])
        return
    mine = plan_samples(config, generator, real_cases, dose)[shard::shards]
    module = module_of(generator, config)
    if module.DENOISER and weights is None:
        raise InputError(f"generator '{generator}'", "needs the weights of a denoiser", "Give --weights.")
    of_denoiser = config.for_denoiser(module.DENOISER) if module.DENOISER else config
    settings = _settings(of_denoiser, generator, weights if module.DENOISER else None)
    bank = _open_bank(config, cases_table, real_cases) if any(s.layout_origin != OWN for s in mine) else None
    wanted = [_provenance(sample, settings, config, bank, cases_table) for sample in mine]
    missing = [
        (sample, provenance)
        for sample, provenance in zip(mine, wanted, strict=True)
        if not is_complete(cases.CaseFolder(output / sample.sample_id), provenance["fingerprint"])
    ]
    if len(missing) < len(mine):
        LOG.info("%d of %d samples are complete already", len(mine) - len(missing), len(mine))
    if missing:
        loaded: Generator = module.load(config, weights, device)
        # On a CPU, batches bring nothing, and a volume's sums would depend on its batch by a last digit.
        size = 1 if loaded.device == "cpu" else of_denoiser.diffusion.sampling.batch_size
        with Progress(f"synthesis with {generator}", len(missing)) as progress:
            while missing:
                with ExitStack() as locks:
                    batch, left = _claim(missing, size, output, locks)
                    if batch:
                        _make(batch, loaded, config, bank, cases_table, output)
                for _ in range(len(missing) - len(left)):
                    progress.advance()
                if len(left) == len(missing):
                    time.sleep(1)
                missing = left
    cases.write_cases(table, [_row(sample, generator, output) for sample in mine])


def _claim(
    missing: list[tuple[PlannedSample, dict[str, Any]]], size: int, output: Path, locks: ExitStack
) -> tuple[list[tuple[PlannedSample, dict[str, Any]]], list[tuple[PlannedSample, dict[str, Any]]]]:
    """Lock the next `size` missing samples; returns them, and those that are missing still.

    What another process holds stays missing for now; what one has made meanwhile does not.
    """
    batch, left = [], []
    for place, (sample, provenance) in enumerate(missing):
        if len(batch) == size:
            return batch, left + missing[place:]
        folder = cases.CaseFolder(output / sample.sample_id)
        if not locks.enter_context(lock_if_free(folder.path / ".lock")):
            left.append((sample, provenance))
        elif not is_complete(folder, provenance["fingerprint"]):
            batch.append((sample, provenance))
    return batch, left


def _settings(config: Config, generator: str, weights: Path | None) -> dict[str, Any]:
    """What decides a sample besides its reference, its layout and its seed."""
    settings = {"generator": generator, "code": stage_fingerprint("draw", generator)}
    sampling = config.diffusion.sampling.model_dump(mode="json", exclude={"batch_size"})
    sampling["orientation"] = config.diffusion.orientation
    if weights is None:
        return {**settings, **dict.fromkeys(sampling), "weights_sha256": None}
    if not weights.exists():
        raise InputError(weights, "does not exist", "Train the denoiser first (lungddpm train).")
    return {**settings, **sampling, "weights_sha256": sha256_of(weights)}


def _open_bank(config: Config, cases_table: Path, real_cases: pd.DataFrame) -> Bank:
    # Placement imports scipy, which light commands do without.
    from lungddpm.layouts.placement import open_bank

    return open_bank(cases_table, real_cases, config.roles.allow_shared_patients)


def _provenance(
    sample: PlannedSample, settings: dict[str, Any], config: Config, bank: Bank | None, cases_table: Path
) -> dict[str, Any]:
    folder = cases.folder_of(cases_table, sample.reference)
    provenance = {
        "sample_id": sample.sample_id,
        "reference_case_id": sample.reference["case_id"],
        "reference_patient_id": sample.reference["patient_id"],
        "reference_sha256": folder.hash(),
        "layout_origin": sample.layout_origin,
        "layout_seed": sample.layout_seed,
        "layout_inputs": _layout_inputs(sample, config, bank, folder),
        "repeat": sample.repeat,
        "seed": sample.seed,
        **settings,
    }
    return {**provenance, "fingerprint": fingerprint(provenance)}


def _layout_inputs(sample: PlannedSample, config: Config, bank: Bank | None, reference: cases.CaseFolder) -> str | None:
    """Fingerprint of what decides a made layout besides its seed and the reference's own layout; None for `OWN`."""
    if sample.layout_origin == OWN:
        return None
    inputs = {"synthesis": config.synthesis, "code": stage_fingerprint("make_layout"), "bank": bank.fingerprint}
    if sample.layout_origin == JITTERED:
        inputs["nodules"] = _hash_nodules(reference.nodules)
    return fingerprint(inputs)


def _hash_nodules(path: Path) -> str:
    try:
        return sha256_of(path)
    except FileNotFoundError:
        raise InputError(path, "does not exist", "Delete the case's folder and prepare it again.") from None


def is_complete(folder: cases.CaseFolder, wanted_fingerprint: str) -> bool:
    """Whether a sample's files are there, unchanged, and were made from what the fingerprint stands for."""
    try:
        record = read_json(folder.sample_record)
        return record["fingerprint"] == wanted_fingerprint and record["sha256"] == folder.hash()
    except (KeyError, InputError):
        return False


def _make(
    batch: list[tuple[PlannedSample, dict[str, Any]]],
    generator: Generator,
    config: Config,
    bank: Bank | None,
    cases_table: Path,
    output: Path,
) -> None:
    tasks = [_task_of(sample, config, bank, cases_table) for sample, _ in batch]
    began = time.monotonic()
    made = generator.make(tasks)
    seconds = (time.monotonic() - began) / len(batch)
    for (sample, provenance), task, hu in zip(batch, tasks, made, strict=True):
        folder = cases.CaseFolder(output / sample.sample_id)
        write_volume(folder.ct, task.reference.like(hu))
        write_volume(folder.layout, task.layout)
        nodules = task.made.nodules if task.made else ()
        kept = 0 if sample.layout_origin == JITTERED else int(sample.reference["n_nodules"])
        record = {
            "n_nodules": kept + len(nodules),
            "nodules": [asdict(nodule) for nodule in nodules],
            "seconds": round(seconds, 3),
            "device": generator.device,
            "sha256": folder.hash(),
        }
        write_json(folder.sample_record, {**provenance, **record})


def _task_of(sample: PlannedSample, config: Config, bank: Bank | None, cases_table: Path) -> Task:
    """What the plan asks for, its layout made."""
    folder = cases.folder_of(cases_table, sample.reference)
    ct, own = folder.read()
    if sample.layout_origin == OWN:
        return Task(ct, own, sample.seed)
    from lungddpm.layouts.placement import jitter, place, read_shapes

    rng, case_id = np.random.default_rng(sample.layout_seed), sample.reference["case_id"]
    if sample.layout_origin == JITTERED:
        shapes = read_shapes(folder, case_id, sample.reference["patient_id"])
        made = jitter(own, shapes, bank, config.synthesis, rng)
    else:
        made = place(own, bank, config.synthesis, rng)
    if not made.nodules:
        raise InputError(
            folder.layout,
            "has no room in its lungs for any nodule of the discovery cases",
            "Lower synthesis.scale, or name other patients in roles.reference.",
        )
    return Task(ct, made.layout, sample.seed, made, {**bank.folders, case_id: folder})


def _row(sample: PlannedSample, generator: str, output: Path) -> dict[str, Any]:
    folder = cases.CaseFolder(output / sample.sample_id)
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
