"""Generators: what turns a reference CT, a layout and a seed into a synthetic CT. A new one is one new module here.

CITATION: str                 the work to cite
NEEDS_DENOISER: bool          whether `load` needs the weights of a trained denoiser
KEEPS_LAYOUT: bool            whether it works with the references' own layouts only, because its CT shows the nodules
                              that the reference has; all others are given placed and jittered layouts, too, the same
                              ones each
load(config, weights, device) -> Generator

A module imports heavy libraries inside its functions only: light commands import it to read the three constants.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lungddpm import cases
from lungddpm.config import Config
from lungddpm.errors import ConfigError, InputError
from lungddpm.files import code_fingerprint, fingerprint, seed_from, sha256_of, write_json
from lungddpm.progress import LOG, Progress
from lungddpm.volume import Volume, write_volume

if TYPE_CHECKING:
    from lungddpm.layouts.placement import Bank

OWN, PLACED, JITTERED = "reference", "placed", "jittered"
"""Where a sample's layout is from: it is the reference's own; nodules were placed in a reference that has none; the
reference's nodules were moved."""


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
            layout is background, the array equals the reference exactly (but for published AAS, which leaves noise in
            it). A task's array does not depend on the others.
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
        layout_origin: `OWN`, `PLACED` or `JITTERED`.
        layout_seed: of every random number in the layout; None for `OWN`. The same for all generators of a run, so that
            they can be compared.
    """

    sample_id: str
    reference: pd.Series
    repeat: int
    seed: int
    layout_origin: str
    layout_seed: int | None


def module_of(name: str) -> ModuleType:
    """The generator module of that name."""
    return importlib.import_module(f"{__name__}.{name}")


def plan_samples(config: Config, generator: str, table: pd.DataFrame) -> list[PlannedSample]:
    """Everything that a generator makes in a run, in order; an arm with a smaller dose takes the first ones.

    The number is the largest dose times the usable discovery cases, rounded. References take turns, in table order:
    first each with its own layout, or with one of placed nodules where it has none, then with jittered ones. Without
    `synthesis.place_nodules`, and for generators that keep the layout, references without nodules are left out; without
    `synthesis.jitter_repeats`, the layout stays the same each time.

    Args:
        config: doses, run name, root seed and `synthesis`.
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
    keeps_layout = module_of(generator).KEEPS_LAYOUT
    with_nodule = keeps_layout or not config.synthesis.place_nodules
    references = cases.usable(table, "reference")
    if with_nodule:
        references = references[references["n_nodules"] > 0]
    references = [row for _, row in references.iterrows()]
    if number and not references:
        raise InputError(
            "cases.tsv",
            f"has no usable reference case{' with a nodule' if with_nodule else ''} for the generator '{generator}'",
            "Give more patients the role reference.",
        )
    plan = []
    for index in range(number):
        repeat, place = divmod(index, len(references))
        case_id = references[place]["case_id"]
        jitters = repeat > 0 and config.synthesis.jitter_repeats and not keeps_layout
        origin = PLACED if references[place]["n_nodules"] == 0 else JITTERED if jitters else OWN
        names = config.seed, config.diffusion.run
        plan.append(
            PlannedSample(
                sample_id=f"{case_id}_s{repeat:03d}",
                reference=references[place],
                repeat=repeat,
                seed=seed_from(*names, generator, case_id, repeat),
                layout_origin=origin,
                # Where repeats are not to differ, all of them take the layout of the first.
                layout_seed=None if origin == OWN else seed_from(*names, "layout", case_id, repeat if jitters else 0),
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
        InputError: no usable reference, missing or unfit weights, a case that breaks its contract, or one in whose
            lungs no nodule can be placed.
    """
    real_cases = cases.read_cases(cases_table)
    mine = plan_samples(config, generator, real_cases)[shard::shards]
    module = module_of(generator)
    if module.NEEDS_DENOISER and weights is None:
        raise InputError(f"generator '{generator}'", "needs the weights of a denoiser", "Give --weights.")
    settings = _settings(config, generator, weights if module.NEEDS_DENOISER else None)
    bank = _open_bank(config, cases_table, real_cases) if any(s.layout_origin != OWN for s in mine) else None
    wanted = [_provenance(sample, settings, config, bank, cases_table) for sample in mine]
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
                _make(missing[first : first + size], loaded, config, bank, cases_table, output)
                for _ in missing[first : first + size]:
                    progress.advance()
    cases.write_cases(table, [_row(sample, generator, output) for sample in mine])


def _settings(config: Config, generator: str, weights: Path | None) -> dict[str, Any]:
    """What decides a sample besides its reference, its layout and its seed."""
    settings = {"generator": generator, "code": code_fingerprint("diffusion", "generators")}
    sampling = config.diffusion.sampling.model_dump(mode="json", exclude={"batch_size"})
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
        "reference_sha256": cases.hash_case(folder),
        "layout_origin": sample.layout_origin,
        "layout_seed": sample.layout_seed,
        "layout_inputs": _layout_inputs(sample, config, bank, folder),
        "repeat": sample.repeat,
        "seed": sample.seed,
        **settings,
    }
    return {**provenance, "fingerprint": fingerprint(provenance)}


def _layout_inputs(sample: PlannedSample, config: Config, bank: Bank | None, reference: Path) -> str | None:
    """Fingerprint of what decides a made layout besides its seed and the reference's own layout; None for `OWN`."""
    if sample.layout_origin == OWN:
        return None
    inputs = {"synthesis": config.synthesis, "code": code_fingerprint("layouts"), "bank": bank.fingerprint}
    if sample.layout_origin == JITTERED:
        inputs["nodules"] = _hash_nodules(reference)
    return fingerprint(inputs)


def _hash_nodules(folder: Path) -> str:
    path = folder / "nodules.nii.gz"
    try:
        return sha256_of(path)
    except FileNotFoundError:
        raise InputError(path, "does not exist", "Delete the case's folder and prepare it anew.") from None


def _is_complete(folder: Path, wanted_fingerprint: str) -> bool:
    try:
        record = json.loads((folder / "sample.json").read_text(encoding="utf-8"))
        return record["fingerprint"] == wanted_fingerprint and record["sha256"] == cases.hash_case(folder)
    except (FileNotFoundError, ValueError, KeyError, TypeError, InputError):
        return False


def _make(
    batch: list[tuple[PlannedSample, dict[str, Any]]],
    generator: Generator,
    config: Config,
    bank: Bank | None,
    cases_table: Path,
    output: Path,
) -> None:
    tasks, nodules = [], []
    for sample, _ in batch:
        folder = cases.folder_of(cases_table, sample.reference)
        ct, own_layout = cases.read_case(folder)
        layout, placed = _layout_of(sample, own_layout, config, bank, folder)
        tasks.append(Task(ct, layout, sample.seed))
        nodules.append(placed)
    began = time.monotonic()
    made = generator.make(tasks)
    seconds = (time.monotonic() - began) / len(batch)
    for (sample, provenance), task, placed, hu in zip(batch, tasks, nodules, made, strict=True):
        folder = output / sample.sample_id
        write_volume(folder / "ct.nii.gz", task.reference.like(hu))
        write_volume(folder / "layout.nii.gz", task.layout)
        record = {
            "n_nodules": int(sample.reference["n_nodules"]) if placed is None else len(placed),
            "nodules": placed,
            "seconds": round(seconds, 3),
            "device": generator.device,
            "sha256": cases.hash_case(folder),
        }
        write_json(folder / "sample.json", {**provenance, **record})


def _layout_of(
    sample: PlannedSample, own: Volume, config: Config, bank: Bank | None, reference: Path
) -> tuple[Volume, list[dict[str, Any]] | None]:
    """The layout that the plan asks for, and what stands in `sample.json` on its nodules (None for `OWN`)."""
    if sample.layout_origin == OWN:
        return own, None
    from lungddpm.layouts.placement import jitter, place, read_shapes

    rng = np.random.default_rng(sample.layout_seed)
    if sample.layout_origin == PLACED:
        made = place(own, bank, config.synthesis, rng)
    else:
        shapes = read_shapes(reference, sample.reference["case_id"], sample.reference["patient_id"])
        made = jitter(own, shapes, bank, config.synthesis, rng)
    if not made.nodules:
        raise InputError(
            reference / "layout.nii.gz",
            "has no room in its lungs for any nodule of the discovery cases",
            "Lower synthesis.scale, or name other patients in roles.reference.",
        )
    return made.layout, [asdict(nodule) for nodule in made.nodules]


def _row(sample: PlannedSample, generator: str, output: Path) -> dict[str, Any]:
    record = json.loads((output / sample.sample_id / "sample.json").read_text(encoding="utf-8"))
    return {
        **sample.reference,
        "case_id": sample.sample_id,
        "source": generator,
        "role": "synthetic",
        "n_nodules": record["n_nodules"],
        "path": sample.sample_id,
        "sha256": cases.hash_case(output / sample.sample_id),
    }
