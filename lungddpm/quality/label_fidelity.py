"""Label fidelity: do segmenters that learned from real nodules find the nodules that a generator drew?

A replicate of `real` segments synthetic CT, and its masks are compared with the layout that the CT was drawn from. The
same on the references' real CT, against their own layouts, is the ceiling: these patients are as new to the segmenter.
Samples near the ceiling show nodules that look like nodules, where the layout says; samples far below it do not, and a
segmenter that trains on them learns from wrong labels. Where the ceiling itself is low, the segmenter knows too little
to judge.
"""

from __future__ import annotations

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
from lungddpm.evaluation.lesions import SIZE_COLUMNS, TEXTURE_COLUMNS, Lesion
from lungddpm.evaluation.segmentation import case_columns, evaluate_case
from lungddpm.quality.image_quality import SYNTHETIC, reference_of
from lungddpm.quality.textures import KnownNodule, RealNodules, lesion_textures
from lungddpm.segmentation.nnunet import open_segmenter

REAL_CT = "(real CT)"
"""What stands for a generator in the rows of the references; no generator can have this name."""
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
"""One row per lesion. `texture`: see `textures`; empty where it is not known."""
STRATA = [*SIZE_COLUMNS.values(), *TEXTURE_COLUMNS.values()]
"""Kinds of lesions, as columns have them: by size, and by texture."""
RUN_COLUMNS = ["generator", "images", "replicate", "dice", "recall", "false_positives_per_scan"]
TABLE_COLUMNS = [
    "generator", "images", "n_replicates", "n_cases", "n_empty_cases", "n_lesions", "dice_mean", "dice_sd", "recall",
    *(f"{what}_{stratum}" for stratum in STRATA for what in ("n_lesions", "recall")),
    "false_positives_per_scan", "n_paired", "difference", "ci_low", "ci_high",
    "recall_difference", "recall_ci_low", "recall_ci_high", "note",
]  # fmt: skip


@dataclass(frozen=True)
class JudgedCase:
    """A CT to segment, with the layout that its nodules should be found by.

    Attributes:
        who: the columns of `METRIC_COLUMNS` that say what it is.
        folder: CT and layout.
        nodules: of the layout, as far as they are known.
    """

    who: dict[str, object]
    folder: CaseFolder
    nodules: Sequence[KnownNodule] = ()


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
    """Let one replicate segment the samples of all generators and the references, and judge its masks.

    Writes to `output`: `lesions.csv` (`LESION_COLUMNS`) and, last, `metrics.csv` (`METRIC_COLUMNS`).

    Args:
        config: the run's config; `label_fidelity.samples` cases of each generator are judged, and as many references.
        arm_dir: folder of the arm, which is trained on real cases alone.
        fold: fold of the replicate.
        seed: seed of the replicate.
        cases_table: `cases.tsv`.
        sample_tables: case tables of all generators, the shards of each in their order.
        output: folder of the replicate.
        device: auto, cpu, cuda (the first visible GPU) or mps.
        processes: threads that nnU-Net may use at most.

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
    """The references, then the samples of every generator: the first ones of its plan.

    References that the chosen samples were made from are among them, however many these are.

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
    nodules = RealNodules(cases_table)
    judged = [
        JudgedCase(
            _who(row, REAL_CT, REFERENCE, row["case_id"], own_layout=True, seen=seen.of_reference(row)),
            cases.unchanged_folder_of(cases_table, row),
            nodules.of_case(row["case_id"]),
        )
        for _, row in ceiling.iterrows()
    ]
    layouts = {case.who["case_id"]: read_volume(case.folder.layout) for case in judged}
    for (_, row), folder, reference in zip(chosen, folders, made_from, strict=True):
        own = _is_same(read_volume(folder.layout), layouts.get(reference))
        who = _who(row, row["source"], SYNTHETIC, reference, own_layout=own, seen=seen.of_sample(row, folder))
        known = nodules.of_sample(read_json(folder.sample_record), reference, own_layout=own)
        judged.append(JudgedCase(who, folder, known))
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
    """Whom the segmenter was trained on, by `arm.json`, and who of them is in a case.

    Args:
        arm_dir: folder of the arm.
        real_cases: all cases.
        forbidden_in: the table to name where a reference's patient is one of them; None allows it.
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
        """The same of a sample: by its reference, and by whose nodules were placed in it or went into it elsewhere."""
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
    """Segment every case and compare the mask with its layout; a CT and layout that come twice are segmented once.

    Args:
        chosen: as of `cases_to_judge`.
        segment: path of a CT (HU) -> its nodules, 0 or 1, on the grid of the CT.
        what: is done, for the progress.

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
            if files not in found:
                _, layout = case.folder.read()
                mask = segment(case.folder.ct)
                measures, detection = evaluate_case(
                    layout.like(layout.array == Label.NODULE), layout.like(mask.array.astype(bool))
                )
                found[files] = measures, detection.lesions
            measures, of_case = found[files]
            textures = lesion_textures(read_volume(case.folder.layout), case.nodules)
            metrics.append(case.who | measures)
            lesions += [
                {**case.who, **asdict(lesion), "lesion": number, "texture": texture}
                | {"size_bin": lesion.size_bin, "found": lesion.found}
                for number, (lesion, texture) in enumerate(zip(of_case, textures, strict=True), start=1)
            ]
            progress.advance()
    return pd.DataFrame(metrics, columns=METRIC_COLUMNS), pd.DataFrame(lesions, columns=LESION_COLUMNS)


def runs_table(metrics: pd.DataFrame, lesions: pd.DataFrame) -> pd.DataFrame:
    """What each replicate found in the CT of each generator and in real CT: `RUN_COLUMNS`.

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
    """Label fidelity of every generator beside the ceiling: `TABLE_COLUMNS`, one row each, the ceiling first.

    Dice is a mean over cases with a nodule of their means over replicates, and its sd is over cases; recall is pooled
    over lesions and replicates. Differences to the ceiling are over the `n_paired` samples that have the layout of
    their reference, each against that reference in the same replicate; where there is none, they are differences of
    means.
    Their intervals are t intervals over independent replicates (folds, or seeds of a single fold): they cover the luck
    of training a segmenter on real cases, for these samples and references as they are.

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
            gaps = [_means(drawn, "dice") - _means(real, "dice")]
            gaps.append(_means(drawn_lesions, "found") - _means(real_lesions, "found"))
        else:
            of_pairs = drawn_lesions.merge(pairs[["replicate", "case_id", "reference"]], on=["replicate", "case_id"])
            gaps = [
                _paired(pairs, real, "dice", ["replicate"]),
                _paired(of_pairs, real_lesions, "found", ["replicate", "lesion"]),
            ]
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
        of_kind = lesions[chosen]
        row[f"n_lesions{suffix}"] = len(of_kind[[*_ONE, "lesion"]].drop_duplicates())
        row[f"recall{suffix}"] = of_kind["found"].astype(float).mean()
    return row


def _means(table: pd.DataFrame, column: str) -> pd.Series:
    return table.astype({column: float}).groupby("replicate")[column].mean()


def _paired(drawn: pd.DataFrame, real: pd.DataFrame, column: str, keys: list[str]) -> pd.Series:
    """Mean difference of samples to their references in each replicate."""
    real = real[[*keys, "case_id", column]].rename(columns={"case_id": "reference", column: "ceiling"})
    pairs = drawn.merge(real, on=[*keys, "reference"])
    return (pairs[column].astype(float) - pairs["ceiling"].astype(float)).groupby(pairs["replicate"]).mean()


def _interval(by_replicate: pd.Series, folds: Mapping[str, int], confidence: float) -> tuple[float, float, float]:
    """Mean over independent replicates and its t interval; NaN limits where there is one, all NaN where none."""
    found = by_replicate.dropna()
    if len(set(folds.values())) > 1:
        found = found.groupby(found.index.map(folds)).mean()
    if len(found) < 2:
        return (float(found.mean()) if len(found) else math.nan), math.nan, math.nan
    half = float(stats.t.isf((1 - confidence) / 2, len(found) - 1)) * float(found.sem())
    return float(found.mean()), float(found.mean()) - half, float(found.mean()) + half


def _note(drawn: pd.DataFrame, n_paired: int) -> str:
    """What a reader of a generator's row has to know, as clauses."""
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
