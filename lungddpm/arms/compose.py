"""Training sets: real and synthetic cases become an nnU-Net raw dataset, behind the leak guard.

<arm>/nnUNet_raw/Dataset501_LungNodule/   imagesTr (links to the cases' CT), labelsTr, dataset.json, splits_final.json
<arm>/arm.json                            every case with its patient and hash, the folds, the result of the leak guard
<arm>/draws/<replicate>/                  imagesTr, labelsTr: the samples for this replicate only
<arm>/draws/<replicate>/draw.json         the same as `arm.json`, for these samples

An arm `real+<generator>.filtered@<dose>` takes the first candidates whose nodules the segmenters of its baseline
found, from the output of `lungddpm.quality.sample_filter`; both records then give their number.

If replicates have their own draws, the dataset has the cases that all of them share, and each draw is stored next to
it, so an additional replicate does not change the training data of the others.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lungddpm.arms import splits
from lungddpm.config.models import Config
from lungddpm.core.arms import BASELINE, Arm
from lungddpm.core.cases import CaseFolder, hash_voxels, read_cases, unchanged_folder_of, usable
from lungddpm.core.cohorts import training_cases
from lungddpm.core.errors import ConfigError, InputError, LeakError
from lungddpm.core.files import exclusive_lock, fingerprint, link_or_copy, read_json, sha256_of, write_json
from lungddpm.core.labels import Label
from lungddpm.core.progress import LOG, Progress, waiting
from lungddpm.core.roles import DISCOVERY, TEST
from lungddpm.core.volume import read_volume, write_volume

DATASET = "Dataset501_LungNodule"
FILE_ENDING = ".nii.gz"
FILTER_TABLE = "samples.csv"
_ROUNDING = 1e-9
"""Next to each `filter.json`: one row per candidate of a filtered arm."""
FILTER_COLUMNS = ["number", "case_id", "sha256", "n_nodule_voxels", "found"]
"""`number`: in the plan of the synthesis; `found`: share of the nodule voxels that the segmenter found, NaN if the
layout has none."""


@dataclass(frozen=True)
class TrainingCase:
    """One entry of nnU-Net's training set."""

    name: str
    """nnU-Net's identifier; a repeated case has a different name than its original."""
    case_id: str
    patient_id: str
    source: str
    series_uid: str
    folder: CaseFolder
    sha256: str


def run_compose(
    config: Config,
    arm: str,
    cases_table: Path,
    sample_tables: list[Path],
    output: Path,
    filters: Sequence[Path] = (),
) -> None:
    """Compose one arm from scratch: nnU-Net's raw dataset and, last, `arm.json`.

    The first `round(dose x real cases)` samples of the synthesis plan are taken, so that a smaller dose is a subset of
    a larger one. If replicates have their own draws, none are: see `run_compose_draw`. Synthetic and repeated
    cases are only used for training, never for validation; real ones are used for validation even if the arm trains
    only on synthetic ones.

    Args:
        config: decides the real cases, the folds and whether patients may be shared.
        arm: its name, see `Arm.parse`.
        cases_table: table of the real cases, with roles.
        sample_tables: tables of all shards of the arm's generator, in the order of shards.
        output: folder of the arm.
        filters: `filter.json` of every segmenter that judged the samples of a filtered arm.

    Raises:
        ConfigError: not an arm, there are not as many real cases, or the folds cannot be made.
        InputError: no training case with a nodule, too few samples, files that differ from their table, or a filter
            that keeps nothing.
        LeakError: a test patient is in the training set or behind the filter, or a patient beyond the arm's real cases.
    """
    # The old marker goes first: an arm.json is never next to a dataset that it does not describe.
    (output / "arm.json").unlink(missing_ok=True)
    around = _Surroundings.read(config, Arm.parse(arm), cases_table)
    recipe, real, segmentation = around.arm, around.real, config.segmentation
    nodule_mm3 = {case.case_id: _nodule_mm3(case) for case in real}
    folds = splits.folds(
        around.discovery, nodule_mm3, segmentation.n_folds, segmentation.folds, config.seed, around.shared
    )
    own_draws = recipe.generator is not None and config.draws(recipe.generator) != [None]
    added: list[TrainingCase] = []
    kept: dict[str, Any] = {}
    if recipe.added == BASELINE:
        added = [replace(case, name=_repeated_name(case.name)) for case in real]
        folds = [{**fold, "train": fold["train"] + [_repeated_name(name) for name in fold["train"]]} for fold in folds]
    elif recipe.generator is not None:
        if not own_draws:
            added, kept = _samples_of_arm(config, around, sample_tables, filters)
        names = [case.name for case in added]
        folds = [{**fold, "train": (fold["train"] if recipe.real else []) + names} for fold in folds]
    trained = {name for fold in folds for name in fold["train"]}
    training = [*real, *added]
    proof = around.guard(training)
    with _replaced_folder(output / "nnUNet_raw") as raw:
        nodule_voxels = _write_dataset(raw / DATASET, output / "nnUNet_raw" / DATASET, training, folds)
        if not any(nodule_voxels[case.name] for case in real):
            among = "" if recipe.real_cases is None else f" among the {recipe.real_cases} of arms.real_cases"
            raise InputError(
                cases_table,
                f"has no discovery case with a nodule{among}",
                "Give roles.discovery other patients, or raise arms.real_cases.",
            )
    content = {
        "arm": recipe.name,
        "dataset": DATASET,
        "own_draws": own_draws,
        "folds": folds,
        "cases": [_entry(case, nodule_voxels, case.name in trained) for case in training],
        **_filter_entry(kept, proof),
    }
    write_json(output / "arm.json", {**content, "leak_guard": proof, "fingerprint": fingerprint(content)})
    n_real = sum(case.name in trained for case in real)
    LOG.info("arm %s: %d real cases, %d added, %d folds", recipe.name, n_real, len(added), len(folds))


def run_compose_draw(
    config: Config,
    arm: str,
    replicate: str,
    cases_table: Path,
    sample_tables: list[Path],
    arm_folder: Path,
    filters: Sequence[Path] = (),
) -> None:
    """Compose what one replicate alone trains on: images and labels of the samples of its draw and, last, `draw.json`.

    Args:
        config: decides the real cases, which a dose is a multiple of, and whether patients may be shared.
        arm: its name.
        replicate: its name, e.g. `fold0_seed1`.
        cases_table: table of the real cases, with roles.
        sample_tables: tables of all shards of this draw, in the order of shards.
        arm_folder: folder of the composed arm.
        filters: as for `run_compose`; of this replicate only, so that replicates stay independent.

    Raises:
        ConfigError: not an arm with its own draws.
        InputError: too few samples, files that differ from their table, an arm that is not composed, or a filter that
            keeps nothing.
        LeakError: as for `run_compose`.
    """
    record = draw_record(arm_folder, replicate)
    record.unlink(missing_ok=True)
    around = _Surroundings.read(config, Arm.parse(arm), cases_table)
    composed = read_json(arm_folder / "arm.json", "Run 'lungddpm compose' for this arm first.")
    if not composed["own_draws"]:
        raise ConfigError(
            "--replicate", f"the replicates of {around.arm.name} share their cases", "Compose it without --replicate."
        )
    samples, kept = _samples_of_arm(config, around, sample_tables, filters)
    proof = around.guard([*around.real, *samples])
    with _replaced_folder(record.parent) as folder:
        nodule_voxels, _ = _write_images(folder, record.parent, samples)
        content = {
            "arm": around.arm.name,
            "replicate": replicate,
            "arm_fingerprint": composed["fingerprint"],
            "cases": [_entry(case, nodule_voxels, True) for case in samples],
            **_filter_entry(kept, proof),
        }
        write_json(folder / record.name, {**content, "leak_guard": proof, "fingerprint": fingerprint(content)})
    LOG.info("arm %s: %d samples for %s only", around.arm.name, len(samples), replicate)


def draw_record(arm_folder: Path, replicate: str) -> Path:
    """The `draw.json` of a replicate with its own draw, in the same folder as images and labels."""
    return arm_folder / "draws" / replicate / "draw.json"


@dataclass(frozen=True)
class _Surroundings:
    """An arm's real cases, and the cases that the leak guard compares it with."""

    arm: Arm
    shared: bool
    """Whether patients may have several roles."""
    discovery: pd.DataFrame
    """The arm's real cases, as rows of their table."""
    real: list[TrainingCase]
    test: list[TrainingCase]
    usable: list[TrainingCase]
    """All real cases."""
    register: splits.Register
    outsiders: frozenset[str]
    """Discovery patients beyond the arm's real cases, who must not be in the arm."""

    @classmethod
    def read(cls, config: Config, arm: Arm, cases_table: Path) -> _Surroundings:
        """Read the cases and compare them with their table.

        Raises:
            ConfigError: there are not enough real cases.
            InputError: a role has no case, or files differ from their table.
        """
        cases = read_cases(cases_table)
        discovery, test = usable(cases, DISCOVERY), usable(cases, TEST)
        for role, chosen in ((DISCOVERY, discovery), (TEST, test)):
            if chosen.empty:
                raise InputError(cases_table, f"has no usable {role} case", f"See its column reason; set roles.{role}.")
        of_arm = training_cases(cases, arm.real_cases, config.seed)
        outsiders = frozenset[str]()
        if config.arms.generators_learn_from == "same" and not config.roles.allow_shared_patients:
            outsiders = frozenset(discovery["patient_id"]) - frozenset(of_arm["patient_id"])
        with waiting("comparing the cases with their hashes"):
            real, tested, every = (
                _training_cases(cases_table, rows) for rows in (of_arm, test, cases[cases["status"] == "ok"])
            )
        shared = config.roles.allow_shared_patients
        return cls(arm, shared, of_arm, real, tested, every, splits.read_register(cases), outsiders)

    def guard(self, training: list[TrainingCase]) -> dict:
        """The result of the leak guard for these training cases.

        Raises:
            InputError: a duplicate name.
            LeakError: a test patient is in them, or a patient beyond the arm's real cases.
        """
        _check_names(training)
        known = {case: _origin(case, self.register) for case in self.usable}
        origins = [known.get(replace(case, name=case.case_id)) or _origin(case, self.register) for case in training]
        splits.check_subset(origins, self.outsiders)
        tested = [known[case] for case in self.test]
        return splits.check_leaks(origins, tested, self.shared, known.values())


def _samples_of_arm(
    config: Config, around: _Surroundings, tables: list[Path], filters: Sequence[Path]
) -> tuple[list[TrainingCase], dict[str, Any]]:
    """The samples that an arm takes from a cohort, and the record of its filter; empty if it has none."""
    arm, n_real = around.arm, len(around.real)
    if not (wanted := round(arm.dose * n_real)):
        raise ConfigError("arms.doses", f"{arm.dose} of {n_real} real cases is less than one case", "Raise the dose.")
    drawn = first_samples(tables, round(config.arms.drawn_dose(arm) * n_real))
    kept: dict[str, Any] = {}
    if arm.filtered:
        drawn, kept = _filtered(config.arms.filter.found, around, drawn, wanted, filters)
    return [_training_case(*sample) for sample in drawn[:wanted]], kept


def _filtered(
    limit: float, around: _Surroundings, drawn: list[tuple[Path, pd.Series]], wanted: int, filters: Sequence[Path]
) -> tuple[list[tuple[Path, pd.Series]], dict[str, Any]]:
    """The samples in which the segmenters, on average, found at least this share of the nodule voxels, and the record.

    Raises:
        InputError: the filter was not run, was run on other samples, or keeps nothing.
        LeakError: a segmenter was trained on a case that is not a real case of this arm.
    """
    if not filters:
        raise InputError("--filter", f"is required: {around.arm.name} is filtered", "Run 'lungddpm filter' first.")
    shares, segmenters = [], []
    for path in filters:
        record = read_json(path, "Run 'lungddpm filter' first.")
        _check_segmenter(path, record, around)
        shares.append(_shares_of(path, record, drawn))
        segmenters.append({key: record["segmenter"][key] for key in ("arm", "replicate", "arm_fingerprint")})
    found = np.mean(shares, axis=0)
    # A mean of shares at the limit may be rounded to less.
    kept = [sample for sample, share in zip(drawn, found, strict=True) if share >= limit - _ROUNDING]
    if not kept:
        best = "no sample has a nodule" if np.isnan(found).all() else f"at most {100 * np.nanmax(found):.0f} %"
        raise InputError(
            filters[0],
            f"keeps none of {len(drawn)} samples for {around.arm.name}: the segmenters of "
            f"{around.arm.baseline.name} find {best} of a sample's nodule voxels, and arms.filter.found is {limit:g}",
            "Check the label fidelity: train the generator or the segmenters longer, lower arms.filter.found, raise "
            "arms.filter.draws, or remove the generator from arms.filtered.",
        )
    return kept, {
        "found": limit,
        "found_mean": float(np.nanmean(found)),
        "judged": len(drawn),
        "kept": len(kept),
        "wanted": wanted,
        "taken": min(wanted, len(kept)),
        "segmenters": segmenters,
    }


def _check_segmenter(path: Path, record: dict[str, Any], around: _Surroundings) -> None:
    """Check that the judging segmenter was trained only on this arm's real cases, by their ids and hashes."""
    if record["arm"] != around.arm.name:
        raise InputError(path, f"belongs to {record['arm']}, not to {around.arm.name}", "Run 'lungddpm filter' again.")
    known = {(case.case_id, case.sha256) for case in around.real}
    strangers = [
        case["case_id"] for case in record["segmenter"]["cases"] if (case["case_id"], case["sha256"]) not in known
    ]
    if strangers:
        raise LeakError(
            "leak guard",
            f"the segmenter that chose the samples of {around.arm.name} was trained on cases that are not in this arm "
            f"or have changed since: {', '.join(strangers[:3])}",
            "Train the segmenters of its real cases and run 'lungddpm filter' again.",
        )


def _shares_of(path: Path, record: dict[str, Any], drawn: list[tuple[Path, pd.Series]]) -> list[float]:
    """The share of each of these samples that a segmenter found."""
    table = path.with_name(FILTER_TABLE)
    if not table.exists() or sha256_of(table) != record["samples_sha256"]:
        raise InputError(table, "is missing or was changed after it was written", "Run 'lungddpm filter' again.")
    judged = pd.read_csv(table, dtype={"case_id": str})
    samples = [(row["case_id"], row["sha256"]) for _, row in drawn]
    if list(zip(judged["case_id"], judged["sha256"], strict=True)) != samples:
        raise InputError(table, "does not match the present samples", "Run 'lungddpm filter' again.")
    return judged["found"].tolist()


def _filter_entry(kept: dict[str, Any], proof: dict[str, Any]) -> dict[str, Any]:
    """The entry about the filter in `arm.json` and `draw.json`, with the proof that no test patient influenced it."""
    if not kept:
        return {}
    guard = {
        "disjoint": proof["disjoint"],
        "checked": "the segmenters were trained only on the real cases of this arm, by id and hash; "
        "these are among the training cases that leak_guard compares with the test cases",
    }
    return {"filter": {**kept, "leak_guard": guard}}


def _entry(case: TrainingCase, nodule_voxels: dict[str, int], trained_on: bool) -> dict[str, Any]:
    """The entry about a case in `arm.json` and `draw.json`."""
    return {
        "name": case.name,
        "case_id": case.case_id,
        "patient_id": case.patient_id,
        "source": case.source,
        "sha256": case.sha256,
        "nodule_voxels": nodule_voxels[case.name],
        "trained_on": trained_on,
    }


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
                f"has no sample {number}; the arm needs {count}, but there are {len(planned)}",
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
    """The patients in a case, from its table, provenance file and CT."""
    sample = case.folder.sample_record
    provenance = sample if sample.exists() else case.folder.record
    record = read_json(provenance, "Without it the patients in this case are unknown. Make the case again.")
    patients = splits.patients_named_in(record, register)
    if provenance == sample and not patients and not splits.declares_nobody(record):
        raise InputError(
            sample, "does not name a known patient as its reference", "Synthesize it from this run's cases."
        )
    marks = {case.series_uid, record.get("scan_sha256", ""), hash_voxels(read_volume(case.folder.ct))}
    return splits.Origin(case.case_id, patients | {case.patient_id}, frozenset(marks - {""}))


def _nodule_mm3(case: TrainingCase) -> float:
    """Volume of all nodules of the layout."""
    layout = read_volume(case.folder.layout)
    return np.count_nonzero(layout.array == Label.NODULE) * layout.voxel_mm3


def _write_dataset(
    folder: Path, final_folder: Path, training: list[TrainingCase], folds: list[dict[str, list[str]]]
) -> dict[str, int]:
    """Write the raw dataset into `folder`, which will be renamed; return the nodule voxels of every case."""
    nodule_voxels, entries = _write_images(folder, final_folder, training)
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


def _write_images(
    folder: Path, final_folder: Path, training: list[TrainingCase]
) -> tuple[dict[str, int], dict[str, dict[str, Any]]]:
    """Write images and labels with nnU-Net's names into `folder`, which will be renamed.

    Returns:
        By name, the nodule voxels of every case, and its entry in nnU-Net's list of files.
    """
    (folder / "imagesTr").mkdir(parents=True)
    nodule_voxels, entries = {}, {}
    with Progress("training cases", len(training)) as progress:
        for case in training:
            _, layout = case.folder.read()
            nodule = (layout.array == Label.NODULE).astype(np.uint8)
            nodule_voxels[case.name] = int(nodule.sum())
            image, label = image_and_label(case.name)
            link_or_copy(case.folder.ct, folder / image, final_folder / "imagesTr")
            write_volume(folder / label, layout.like(nodule))
            entries[case.name] = {"images": [image], "label": label}
            progress.advance()
    return nodule_voxels, entries


def image_and_label(name: str) -> tuple[str, str]:
    """nnU-Net's paths of the image and the label of a training case, below its dataset."""
    return f"imagesTr/{name}_0000{FILE_ENDING}", f"labelsTr/{name}{FILE_ENDING}"


@contextmanager
def _replaced_folder(target: Path) -> Iterator[Path]:
    """An empty folder next to `target` that replaces it if the block succeeds; one process at a time."""
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
