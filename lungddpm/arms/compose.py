"""Training sets: real and synthetic cases become an nnU-Net raw dataset, behind the leak guard.

<arm>/nnUNet_raw/Dataset501_LungNodule/   imagesTr (links to the cases' CT), labelsTr, dataset.json, splits_final.json
<arm>/arm.json                            every case with its patient and hash, the folds, the leak guard's proof
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from lungddpm.arms import splits
from lungddpm.config.models import Config
from lungddpm.core.arms import BASELINE, Arm
from lungddpm.core.cases import CaseFolder, hash_voxels, read_cases, unchanged_folder_of, usable
from lungddpm.core.errors import ConfigError, InputError
from lungddpm.core.files import exclusive_lock, fingerprint, link_or_copy, read_json, write_json
from lungddpm.core.labels import Label
from lungddpm.core.progress import LOG
from lungddpm.core.roles import DISCOVERY, TEST
from lungddpm.core.volume import read_volume, write_volume

DATASET = "Dataset501_LungNodule"
FILE_ENDING = ".nii.gz"


@dataclass(frozen=True)
class TrainingCase:
    """One entry of nnU-Net's training set."""

    name: str
    """nnU-Net's identifier; a repeated case has another name than its original."""
    case_id: str
    patient_id: str
    source: str
    series_uid: str
    folder: CaseFolder
    sha256: str


def run_compose(config: Config, arm: str, cases_table: Path, sample_tables: list[Path], output: Path) -> None:
    """Compose one arm from scratch: nnU-Net's raw dataset and, last, `arm.json`.

    The first `round(dose x real cases)` samples of the synthesis plan are taken, so that a smaller dose is a subset of
    a larger one. Synthetic and repeated cases are only ever trained on, never validated on; real ones are validated on
    even where the arm is trained on synthetic ones alone.

    Args:
        config: decides the folds and whether patients may be shared.
        arm: its name, see `Arm.parse`.
        cases_table: table of the real cases, with roles.
        sample_tables: tables of all shards of the arm's generator, in the order of shards.
        output: folder of the arm.

    Raises:
        ConfigError: not an arm, or the folds cannot be made.
        InputError: no training case with a nodule, too few samples, or files that differ from their table.
        LeakError: a test patient is in the training set.
    """
    recipe = Arm.parse(arm)
    # The old marker goes first: an arm.json never stands beside a dataset that it does not describe.
    (output / "arm.json").unlink(missing_ok=True)
    cases = read_cases(cases_table)
    discovery, test = usable(cases, DISCOVERY), usable(cases, TEST)
    for role, chosen in ((DISCOVERY, discovery), (TEST, test)):
        if chosen.empty:
            raise InputError(cases_table, f"has no usable {role} case", f"See its column reason; set roles.{role}.")
    shared = config.roles.allow_shared_patients
    segmentation = config.segmentation
    real = _training_cases(cases_table, discovery)
    nodule_mm3 = {case.case_id: _nodule_mm3(case) for case in real}
    folds = splits.folds(discovery, nodule_mm3, segmentation.n_folds, segmentation.folds, config.seed, shared)

    added: list[TrainingCase] = []
    if recipe.added == BASELINE:
        added = [replace(case, name=_repeated_name(case.name)) for case in real]
        folds = [{**fold, "train": fold["train"] + [_repeated_name(name) for name in fold["train"]]} for fold in folds]
    elif recipe.added is not None:
        if not (wanted := round(recipe.dose * len(real))):
            raise ConfigError(
                "arms.doses", f"{recipe.dose} of {len(real)} real cases is not one case", "Raise the dose."
            )
        added = [_training_case(*sample) for sample in first_samples(sample_tables, wanted)]
        names = [case.name for case in added]
        folds = [{**fold, "train": (fold["train"] if recipe.real else []) + names} for fold in folds]
    trained = {name for fold in folds for name in fold["train"]}
    training = [*real, *added]
    _check_names(training)

    register = splits.read_register(cases)
    known = {case: _origin(case, register) for case in _training_cases(cases_table, cases[cases["status"] == "ok"])}
    proof = splits.check_leaks(
        [known.get(replace(case, name=case.case_id)) or _origin(case, register) for case in training],
        [known[case] for case in _training_cases(cases_table, test)],
        shared,
        known.values(),
    )
    with _replaced_folder(output / "nnUNet_raw") as raw:
        nodule_voxels = _write_dataset(raw / DATASET, output / "nnUNet_raw" / DATASET, training, folds)
        if not any(nodule_voxels[case.name] for case in real):
            raise InputError(cases_table, "has no discovery case with a nodule", "Give roles.discovery other patients.")
    entries = [
        {
            "name": case.name,
            "case_id": case.case_id,
            "patient_id": case.patient_id,
            "source": case.source,
            "sha256": case.sha256,
            "nodule_voxels": nodule_voxels[case.name],
            "trained_on": case.name in trained,
        }
        for case in training
    ]
    content = {"arm": recipe.name, "dataset": DATASET, "folds": folds, "cases": entries}
    write_json(output / "arm.json", {**content, "leak_guard": proof, "fingerprint": fingerprint(content)})
    n_real = sum(case.name in trained for case in real)
    LOG.info("arm %s: %d real cases, %d added, %d folds", recipe.name, n_real, len(added), len(folds))


def first_samples(tables: list[Path], count: int) -> list[tuple[Path, pd.Series]]:
    """The first samples of the synthesis plan, as rows with their table: row k of shard s is sample k * shards + s.

    Raises:
        InputError: one of them was not made.
    """
    planned = planned_samples(tables)
    for number in range(count):
        if number not in planned:
            raise InputError(
                tables[number % len(tables)] if tables else "--samples",
                f"has no sample {number}; the arm needs {count} and there are {len(planned)}",
                "Synthesize more, or lower the dose.",
            )
        table, sample = planned[number]
        if sample["status"] != "ok":
            raise InputError(table, f"has no CT for {sample['case_id']} ({sample['reason']})", "Synthesize it again.")
    return [planned[number] for number in range(count)]


def planned_samples(tables: list[Path]) -> dict[int, tuple[Path, pd.Series]]:
    """The samples of a generator by their number in the synthesis plan, as rows with their table.

    Args:
        tables: of all shards, in their order: row k of shard s is sample k * shards + s.
    """
    return {
        row * len(tables) + shard: (table, sample)
        for shard, table in enumerate(tables)
        for row, (_, sample) in enumerate(read_cases(table).iterrows())
    }


def _training_case(table: Path, row: pd.Series) -> TrainingCase:
    folder = unchanged_folder_of(table, row)
    return TrainingCase(
        row["case_id"], row["case_id"], row["patient_id"], row["source"], row["series_uid"], folder, row["sha256"]
    )


def _training_cases(table: Path, rows: pd.DataFrame) -> list[TrainingCase]:
    return [_training_case(table, row) for _, row in rows.iterrows()]


def _repeated_name(name: str) -> str:
    return f"{name}__again"


def _check_names(training: list[TrainingCase]) -> None:
    names = [case.name for case in training]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"case {twice[0]}", "is listed twice", "Give every case and sample its own case_id.")


def _origin(case: TrainingCase, register: splits.Register) -> splits.Origin:
    """Who is in a case, by its table, by its provenance file and by its CT."""
    sample = case.folder.sample_record
    provenance = sample if sample.exists() else case.folder.record
    record = read_json(provenance, "Without it nobody knows who is in this case. Make the case again.")
    patients = splits.patients_named_in(record, register)
    if provenance == sample and not patients and not splits.declares_nobody(record):
        raise InputError(sample, "names no known patient as its reference", "Synthesize it from the cases of this run.")
    marks = {case.series_uid, record.get("scan_sha256", ""), hash_voxels(read_volume(case.folder.ct))}
    return splits.Origin(case.case_id, patients | {case.patient_id}, frozenset(marks - {""}))


def _nodule_mm3(case: TrainingCase) -> float:
    """Volume of all nodules of the layout."""
    layout = read_volume(case.folder.layout)
    return np.count_nonzero(layout.array == Label.NODULE) * layout.voxel_mm3


def _write_dataset(
    folder: Path, final_folder: Path, training: list[TrainingCase], folds: list[dict[str, list[str]]]
) -> dict[str, int]:
    """Write the raw dataset into `folder`, which will be renamed; returns the nodule voxels of every case."""
    (folder / "imagesTr").mkdir(parents=True)
    nodule_voxels, entries = {}, {}
    for case in training:
        _, layout = case.folder.read()
        nodule = (layout.array == Label.NODULE).astype(np.uint8)
        nodule_voxels[case.name] = int(nodule.sum())
        image, label = f"imagesTr/{case.name}_0000{FILE_ENDING}", f"labelsTr/{case.name}{FILE_ENDING}"
        link_or_copy(case.folder.ct, folder / image, final_folder / "imagesTr")
        write_volume(folder / label, layout.like(nodule))
        entries[case.name] = {"images": [image], "label": label}
    dataset = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "nodule": 1},
        "numTraining": len(training),
        "file_ending": FILE_ENDING,
        "overwrite_image_reader_writer": "SimpleITKIO",
        # Without this list nnU-Net starts twelve processes to match file names.
        "dataset": entries,
    }
    write_json(folder / "dataset.json", dataset)
    write_json(folder / "splits_final.json", folds)
    return nodule_voxels


@contextmanager
def _replaced_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside `target` that takes its place if the block ends well; one process at a time."""
    new, old = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
    with exclusive_lock(target.with_name(".lock"), f"making {target}"):
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
        new.mkdir(parents=True)
        try:
            yield new
            if target.exists():
                target.rename(old)
            new.rename(target)
        finally:
            for leftover in (new, old):
                shutil.rmtree(leftover, ignore_errors=True)
