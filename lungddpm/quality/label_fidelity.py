"""Label fidelity: do segmenters trained on real nodules find the nodules that a generator drew?

A replicate of `real` segments synthetic CT, and its masks are compared with the layout that the CT was drawn from. The
same for the references' real CT, against their own layouts, is the ceiling: these patients are also new to the
segmenter. Samples near the ceiling show recognisable nodules where their layout has them; samples far below it do not,
and a segmenter trained on them learns from wrong labels. If the ceiling itself is low, the segmenter is too poor to
judge.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from lungddpm.arms import splits
from lungddpm.arms.compose import planned_samples
from lungddpm.config.models import Config
from lungddpm.core import cases
from lungddpm.core.cases import CaseFolder
from lungddpm.core.errors import InputError
from lungddpm.core.files import read_json, write_table
from lungddpm.core.labels import Label
from lungddpm.core.progress import Progress, waiting
from lungddpm.core.roles import REFERENCE
from lungddpm.core.text import plural
from lungddpm.core.volume import Volume, read_volume
from lungddpm.evaluation.lesions import (
    SIZE_COLUMNS,
    TEXTURE_COLUMNS,
    TEXTURES,
    Lesion,
    RatedNodule,
    nodules_of_case,
    nodules_of_sample,
    ratings_of,
    texture_class,
)
from lungddpm.evaluation.segmentation import case_columns, evaluate_case
from lungddpm.quality.image_quality import SYNTHETIC, reference_of
from lungddpm.segmentation.nnunet import open_segmenter

REAL_CT = "(real CT)"
"""Replaces the generator in the rows of the references; no generator can have this name."""
METRICS, LESIONS = "metrics.csv", "lesions.csv"
_CASE = ["generator", "images", "case_id", "patient_id", "sha256"]
_ONE = ["case_id", "sha256"]  # Draws of several replicates may give a name to different CT.
METRIC_COLUMNS = [
    *_CASE, "reference", "own_layout", "patient_seen", "nodules_seen",
    *(column for column in case_columns() if column not in (*_CASE, "n_candidates")),
]  # fmt: skip
"""One row per case. `sha256`: of its CT and layout; `reference`: case whose CT it was made from; `own_layout`: it has
the layout of that case; `patient_seen`, `nodules_seen`: the segmenter was trained on that patient, or on patients whose
nodules are in it."""
LESION_COLUMNS = [*_CASE, "lesion", "diameter_mm", "size_bin", "texture", "found", "overlap"]
"""One row per lesion. `texture`: that of the real nodule that the lesion is, or has the shape of; empty if nobody
rated it. A layout does not specify it, and most generators do not know it: recall by texture shows how they draw it."""
STRATA = [*SIZE_COLUMNS.values(), *TEXTURE_COLUMNS.values()]
"""Kinds of lesions in column names: by size, and by texture."""
RUN_COLUMNS = ["generator", "images", "replicate", "dice", "recall", "false_positives_per_scan"]
TABLE_COLUMNS = [
    "generator", "images", "n_replicates", "n_cases", "n_empty_cases", "n_lesions", "dice_mean", "dice_sd", "recall",
    *(f"{what}_{stratum}" for stratum in STRATA for what in ("n_lesions", "recall")),
    "false_positives_per_scan", "n_paired", "dice_of_references", "difference", "ci_low", "ci_high",
    "recall_difference", "recall_ci_low", "recall_ci_high", "note",
]  # fmt: skip
STRATUM_COLUMNS = ["generator", "images", "texture", "size", "n_lesions", "found_percent"]


@dataclass(frozen=True)
class JudgedCase:
    """A CT to segment, with the layout to compare its nodules with.

    Attributes:
        who: the columns of `METRIC_COLUMNS` that identify it.
        folder: CT and layout.
        nodules: of the layout, as far as known.
    """

    who: dict[str, object]
    folder: CaseFolder
    nodules: Sequence[RatedNodule] = ()


def run_label_fidelity(
    config: Config,
    arm_dir: Path,
    fold: int,
    seed: int,
    cases_table: Path,
    sample_tables: list[Path],
    output: Path,
    device: str = "auto",
    processes: int = 1,
) -> None:
    """Segment the samples of all generators and the references with one replicate, and evaluate its masks.

    Writes to `output`: `lesions.csv` (`LESION_COLUMNS`) and, last, `metrics.csv` (`METRIC_COLUMNS`).

    Args:
        config: the run's config; `label_fidelity.samples` sets the number of samples per generator and of references.
        arm_dir: folder of the arm, which is trained on real cases alone.
        fold: fold of the replicate.
        seed: seed of the replicate.
        cases_table: `cases.tsv`.
        sample_tables: case tables of all generators, the shards of each in their order.
        output: folder of the replicate.
        device: auto, cpu, cuda (the first visible GPU) or mps.
        processes: maximum number of threads of nnU-Net.

    Raises:
        ConfigError: no such device.
        InputError: the replicate is not trained, a case or sample is missing, was changed or breaks its contract, or a
            reference's patient is in the training set.
    """
    with waiting("checking the cases to be judged"):
        chosen = cases_to_judge(config, arm_dir, cases_table, sample_tables)
    with open_segmenter(config, arm_dir, fold, seed, device, processes) as segmenter:
        metrics, lesions = judge(chosen, segmenter.mask, f"label fidelity, fold {fold} seed {seed}")
    write_table(output / LESIONS, lesions)
    write_table(output / METRICS, metrics)


def cases_to_judge(config: Config, arm_dir: Path, cases_table: Path, sample_tables: list[Path]) -> list[JudgedCase]:
    """The references, then the first planned samples of every generator.

    References that the chosen samples were made from are always included.

    Raises:
        InputError: see `run_label_fidelity`.
    """
    real, limit = cases.read_cases(cases_table), config.label_fidelity.samples
    references = cases.usable(real, REFERENCE).set_index("case_id", drop=False)
    chosen = [sample for tables in _by_generator(sample_tables) for sample in _first_usable(tables, limit)]
    folders = [cases.unchanged_folder_of(*sample) for sample in chosen]
    made_from = [reference_of(folder) or "" for folder in folders]
    ceiling = references[(np.arange(len(references)) < limit) | references["case_id"].isin(made_from)]
    seen = _Seen(arm_dir, real, None if config.roles.allow_shared_patients else cases_table)
    real_folders = {row["case_id"]: cases.unchanged_folder_of(cases_table, row) for _, row in ceiling.iterrows()}
    layouts = {case_id: read_volume(folder.layout) for case_id, folder in real_folders.items()}
    figures = {case_id: folder.nodule_figures() for case_id, folder in real_folders.items()}
    judged = [
        JudgedCase(
            _who(row, REAL_CT, REFERENCE, row["case_id"], own_layout=True, seen=seen.of_reference(row)),
            real_folders[row["case_id"]],
            nodules_of_case(figures[row["case_id"]]),
        )
        for _, row in ceiling.iterrows()
    ]
    for (_, row), folder, reference in zip(chosen, folders, made_from, strict=True):
        own = _is_same(read_volume(folder.layout), layouts.get(reference))
        who = _who(row, row["source"], SYNTHETIC, reference, own_layout=own, seen=seen.of_sample(row, folder))
        record = read_json(folder.sample_record)
        judged.append(JudgedCase(who, folder, nodules_of_sample(record, figures.get(reference, []), own_layout=own)))
    return judged


def _by_generator(sample_tables: Iterable[Path]) -> list[list[Path]]:
    """The tables of each generator, by their column `source`; those without a sample are left out."""
    tables: dict[str, list[Path]] = {}
    for path in sample_tables:
        for source in cases.read_cases(path)["source"].unique()[:1]:
            tables.setdefault(source, []).append(path)
    return list(tables.values())


def _first_usable(tables: list[Path], limit: int) -> list[tuple[Path, pd.Series]]:
    first = [sample for _, sample in sorted(planned_samples(tables).items(), key=lambda item: item[0])[:limit]]
    return [(table, row) for table, row in first if row["status"] == "ok"]


def _who(
    row: pd.Series, generator: str, images: str, reference: str, *, own_layout: bool, seen: dict[str, bool]
) -> dict[str, object]:
    who = {"generator": generator, "images": images, **row[["case_id", "patient_id", "sha256"]]}
    return {**who, "reference": reference, "own_layout": own_layout, **seen}


def _is_same(layout: Volume, other: Volume | None) -> bool:
    return other is not None and layout.same_grid(other) and np.array_equal(layout.array, other.array)


class _Seen:
    """The training patients of the segmenter, from `arm.json`, and whether they are in a case.

    Args:
        arm_dir: folder of the arm.
        real_cases: all cases.
        forbidden_in: the table to name in the error if a reference's patient is one of them; None allows it.
    """

    def __init__(self, arm_dir: Path, real_cases: pd.DataFrame, forbidden_in: Path | None):
        arm = read_json(arm_dir / "arm.json", "Run 'lungddpm compose' for this arm first.")
        self._patients = {case["patient_id"] for case in arm["cases"]}
        self._register, self._forbidden_in = splits.read_register(real_cases), forbidden_in

    def of_reference(self, row: pd.Series) -> dict[str, bool]:
        """The columns `patient_seen` and `nodules_seen` of a real case."""
        seen = row["patient_id"] in self._patients
        if seen and self._forbidden_in:
            problem = f"gives {row['patient_id']} the role reference, but the segmenter was trained on that patient"
            raise InputError(self._forbidden_in, problem, "Rebuild cases and arms with disjoint roles.")
        return {"patient_seen": seen, "nodules_seen": seen}

    def of_sample(self, row: pd.Series, folder: CaseFolder) -> dict[str, bool]:
        """The same for a sample: by its reference, and by the origin of its nodules."""
        record = read_json(folder.sample_record)
        donors = {"nodules": record.get("nodules", []), "donors": record.get("declared", {}).get("donors", [])}
        of_nodules = splits.patients_named_in(donors, self._register)
        return {
            "patient_seen": row["patient_id"] in self._patients,
            "nodules_seen": not self._patients.isdisjoint(of_nodules),
        }


def judge(
    chosen: Iterable[JudgedCase], segment: Callable[[Path], Volume], what: str
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Segment every case and compare the mask with its layout; duplicate pairs of CT and layout are segmented once.

    Args:
        chosen: from `cases_to_judge`.
        segment: path of a CT (HU) -> its nodules, 0 or 1, on the grid of the CT.
        what: description for the progress bar.

    Returns:
        (`METRIC_COLUMNS`, `LESION_COLUMNS`).

    Raises:
        InputError: a CT or layout is missing, unreadable or breaks the contract of a case.
    """
    chosen = list(chosen)
    found: dict[object, tuple[dict, list[Lesion]]] = {}
    metrics, lesions = [], []
    with Progress(what, len(chosen)) as progress:
        for case in chosen:
            files = case.who["sha256"]
            _, layout = case.folder.read()
            nodules = layout.like(layout.array == Label.NODULE)
            if files not in found:
                mask = layout.like(segment(case.folder.ct).array.astype(bool))
                measures, detection = evaluate_case(nodules, mask)
                found[files] = measures, detection.lesions
            measures, of_case = found[files]
            textures = [texture_class(ratings["texture"]) for ratings in ratings_of(nodules, case.nodules)]
            metrics.append(case.who | measures)
            lesions += [
                {**case.who, **asdict(lesion), "lesion": number, "texture": texture}
                | {"size_bin": lesion.size_bin, "found": lesion.found}
                for number, (lesion, texture) in enumerate(zip(of_case, textures, strict=True), start=1)
            ]
            progress.advance()
    return pd.DataFrame(metrics, columns=METRIC_COLUMNS), pd.DataFrame(lesions, columns=LESION_COLUMNS)


def runs_table(metrics: pd.DataFrame, lesions: pd.DataFrame) -> pd.DataFrame:
    """The results of each replicate on the CT of each generator and on real CT: `RUN_COLUMNS`.

    Args:
        metrics: `METRIC_COLUMNS` of all replicates, with `replicate` as a column.
        lesions: `LESION_COLUMNS`, likewise.

    Returns:
        Dice is the mean over cases with a nodule, recall the share of the lesions found.
    """
    keys = ["generator", "images", "replicate"]
    by_run = metrics.groupby(keys, sort=False)
    table = by_run.agg(dice=("dice", "mean"), false_positives_per_scan=("n_false_positives", "mean"))
    table["recall"] = lesions.groupby(keys, sort=False)["found"].mean()
    return table.reset_index()[RUN_COLUMNS]


def fidelity_table(
    metrics: pd.DataFrame,
    lesions: pd.DataFrame,
    generators: list[str],
    folds: Mapping[str, int],
    confidence: float,
) -> pd.DataFrame:
    """Label fidelity of every generator and the ceiling: `TABLE_COLUMNS`, one row each, the ceiling first.

    Dice is a mean over cases with a nodule of their means over replicates, and its sd is over cases; recall is pooled
    over lesions and replicates. Differences from the ceiling are over the `n_paired` samples that have the layout of
    their reference, each against that reference in the same replicate; if there are none, they are differences of
    means. `dice_of_references` is the ceiling of these pairs alone, to compare `difference` with: replicates judge
    different samples, and references differ in how hard their nodules are to find.
    Their intervals are t intervals over independent replicates (folds, or seeds of a single fold): they cover
    variation between trainings of a segmenter on real cases, for these samples and references.

    Args:
        metrics: as for `runs_table`.
        lesions: likewise.
        generators: of the run.
        folds: of each replicate, by its name.
        confidence: level of the intervals.
    """
    real, real_lesions = _of(REAL_CT, metrics), _of(REAL_CT, lesions)
    rows = [{"generator": REAL_CT, "images": REFERENCE, **_summary(real, real_lesions), "note": ""}]
    for generator in generators:
        drawn, drawn_lesions = _of(generator, metrics), _of(generator, lesions)
        row = {"generator": generator, "images": SYNTHETIC, **_summary(drawn, drawn_lesions)}
        pairs = drawn[drawn["own_layout"].astype(bool) & drawn["dice"].notna()]
        if pairs.empty:
            ceilings = _means(real, "dice")
            gaps = [_means(drawn, "dice") - ceilings, _means(drawn_lesions, "found") - _means(real_lesions, "found")]
        else:
            of_pairs = drawn_lesions.merge(pairs[["replicate", "case_id", "reference"]], on=["replicate", "case_id"])
            ceilings, of_dice = _paired(pairs, real, "dice", ["replicate"])
            _, of_recall = _paired(of_pairs, real_lesions, "found", ["replicate", "lesion"])
            gaps = [of_dice, of_recall]
        row["dice_of_references"], *_ = _interval(ceilings, folds, confidence)
        for prefix, by_replicate in zip(("", "recall_"), gaps, strict=True):
            values = _interval(by_replicate, folds, confidence)
            row |= dict(zip((f"{prefix}difference", f"{prefix}ci_low", f"{prefix}ci_high"), values, strict=True))
        n_paired = len(pairs[_ONE].drop_duplicates())
        rows.append(row | {"n_paired": n_paired, "note": _note(drawn, n_paired)})
    return pd.DataFrame(rows, columns=TABLE_COLUMNS).astype({"n_paired": "Int64"})


def _of(generator: str, table: pd.DataFrame) -> pd.DataFrame:
    return table[table["generator"] == generator]


def _summary(metrics: pd.DataFrame, lesions: pd.DataFrame) -> dict[str, float]:
    by_case = metrics.groupby(_ONE).agg(dice=("dice", "mean"), n_lesions=("n_lesions", "max"))
    row = {
        "n_replicates": metrics["replicate"].nunique(),
        "n_cases": len(by_case),
        "n_empty_cases": int((by_case["n_lesions"] == 0).sum()),
        "dice_mean": by_case["dice"].mean(),
        "dice_sd": by_case["dice"].std(),
        "false_positives_per_scan": metrics["n_false_positives"].mean(),
    }
    strata = {f"_{column}": lesions["size_bin"] == size for size, column in SIZE_COLUMNS.items()}
    strata |= {f"_{column}": lesions["texture"] == texture for texture, column in TEXTURE_COLUMNS.items()}
    for suffix, chosen in {"": lesions["size_bin"].notna(), **strata}.items():
        row[f"n_lesions{suffix}"], row[f"recall{suffix}"] = _recall(lesions[chosen])
    return row


def _recall(lesions: pd.DataFrame) -> tuple[int, float]:
    """How many lesions there are, and the share that was found, over lesions and replicates."""
    return len(lesions[[*_ONE, "lesion"]].drop_duplicates()), lesions["found"].astype(float).mean()


def strata_table(lesions: pd.DataFrame) -> pd.DataFrame:
    """Lesions found by texture and size: `STRATUM_COLUMNS`, one row per generator and stratum that has a lesion.

    Args:
        lesions: as for `runs_table`; those whose texture is not known are in no stratum.
    """
    rows = []
    for (generator, images), drawn in lesions.groupby(["generator", "images"], sort=False):
        for texture, size in itertools.product(TEXTURES, SIZE_COLUMNS):
            number, recall = _recall(drawn[(drawn["texture"] == texture) & (drawn["size_bin"] == size)])
            if number:
                rows.append((generator, images, texture, size, number, 100 * recall))
    return pd.DataFrame(rows, columns=STRATUM_COLUMNS)


def _means(table: pd.DataFrame, column: str) -> pd.Series:
    return table.astype({column: float}).groupby("replicate")[column].mean()


def _paired(drawn: pd.DataFrame, real: pd.DataFrame, column: str, keys: list[str]) -> tuple[pd.Series, pd.Series]:
    """Means in each replicate: of the samples' references, and of the differences of the samples to them."""
    real = real[[*keys, "case_id", column]].rename(columns={"case_id": "reference", column: "ceiling"})
    pairs = drawn.merge(real, on=[*keys, "reference"]).astype({column: float, "ceiling": float})
    by_replicate = pairs.assign(gap=pairs[column] - pairs["ceiling"]).groupby("replicate")
    return by_replicate["ceiling"].mean(), by_replicate["gap"].mean()


def _interval(by_replicate: pd.Series, folds: Mapping[str, int], confidence: float) -> tuple[float, float, float]:
    """Mean over independent replicates and its t interval; NaN limits with one replicate, all NaN with none."""
    found = by_replicate.dropna()
    if len(set(folds.values())) > 1:
        found = found.groupby(found.index.map(folds)).mean()
    if len(found) < 2:
        return (float(found.mean()) if len(found) else math.nan), math.nan, math.nan
    half = float(stats.t.isf((1 - confidence) / 2, len(found) - 1)) * float(found.sem())
    return float(found.mean()), float(found.mean()) - half, float(found.mean()) + half


def _note(drawn: pd.DataFrame, n_paired: int) -> str:
    """Remarks on a generator's row, as clauses."""
    if drawn.empty:
        return "not judged"
    each = drawn.drop_duplicates(_ONE)
    with_nodule = int(each["dice"].notna().sum())
    clauses = []
    if not n_paired:
        clauses.append("no sample has its reference's own layout: difference of means")
    elif n_paired < with_nodule:
        clauses.append(f"differences over the {n_paired} of {with_nodule} samples with their reference's own layout")
    for column, what in (("patient_seen", "from patients"), ("nodules_seen", "with nodules of patients")):
        if number := int(each[column].astype(bool).sum()):
            clauses.append(f"{number} of {plural(len(each), 'sample')} {what} that the segmenters were trained on")
    return "; ".join(clauses)
