"""The tables of the verdict, from the files that the other rooms left in a results folder."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from lungddpm.config import Config
from lungddpm.errors import InputError
from lungddpm.files import seed_from, write_table, write_text
from lungddpm.verdict import image_quality
from lungddpm.verdict.published import published_comparison
from lungddpm.verdict.segmentation import SIZE_BINS
from lungddpm.verdict.statistics import compare, describe_baseline, sentence

BASELINE = "real"
MEASURES = {"dice": "Dice", "sensitivity": "sensitivity"}
"""What the verdict is about: column of `metrics.csv` -> its name in prose. The first decides, the others support."""
_FOUND_BY_SIZE = dict(
    zip(SIZE_BINS, ("found_percent_below_6_mm", "found_percent_6_to_10_mm", "found_percent_above_10_mm"), strict=True)
)
VERDICT_COLUMNS = [
    "arm", "metric", "n_cases", "n_replicates", "mean", "sd", "difference", "relative_percent",
    "ci_low", "ci_high", "p_wilcoxon", "wins", "ties", "losses", "verdict", "sentence",
]  # fmt: skip


def gather(results: Path, arms: list[str], replicates: list[str], name: str) -> pd.DataFrame:
    """One table of all arms and replicates: `<results>/segmentation/<arm>/<replicate>/<name>`, with both as columns.

    Raises:
        InputError: a file is missing or is no table.
    """
    tables = []
    for arm in arms:
        for replicate in replicates:
            table = read_csv(results / "segmentation" / arm / replicate / name)
            table.insert(0, "arm", arm)
            table.insert(1, "replicate", replicate)
            tables.append(table)
    return pd.concat(tables, ignore_index=True)


def read_csv(path: Path) -> pd.DataFrame:
    """Read a comma-separated table; identifiers stay text.

    Raises:
        InputError: missing, or not a table.
    """
    identifiers = {name: str for name in ("case_id", "patient_id", "reference")}
    try:
        return pd.read_csv(path, dtype=identifiers)
    except FileNotFoundError:
        raise InputError(path, "does not exist", "Run the stage that writes it first (see lungddpm --help).") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise InputError(path, f"is not a table ({error})", "Delete it and run again.") from None


def scores_of(cases: pd.DataFrame, arm: str, measure: str) -> np.ndarray:
    """Scores of an arm, (replicates, cases), both in the order of their first appearance in the table.

    Raises:
        InputError: a replicate of the arm lacks a case, or has one twice.
    """
    replicates, names = cases["replicate"].unique(), cases["case_id"].unique()
    rows = cases[cases["arm"] == arm]
    complete = len(rows) == len(replicates) * len(names) == len(rows[["replicate", "case_id"]].drop_duplicates())
    if not complete:
        raise InputError(f"metrics of {arm}", "do not cover the same cases as the others", "Evaluate all arms again.")
    return rows.pivot(index="replicate", columns="case_id", values=measure).loc[replicates, names].to_numpy(float)


def verdict_table(cases: pd.DataFrame, config: Config) -> pd.DataFrame:
    """One row an arm and measure, `VERDICT_COLUMNS`; differences are to `real`, in the measure's own unit.

    Raises:
        InputError: the arms do not cover the same cases.
    """
    settings, rows = config.verdict, []
    for arm in cases["arm"].unique():
        for measure, prose in MEASURES.items():
            scores = scores_of(cases, arm, measure)
            if arm == BASELINE:
                comparison = describe_baseline(scores)
            else:
                seed = seed_from(config.seed, "verdict", arm, measure)
                baseline = scores_of(cases, BASELINE, measure)
                comparison = compare(scores, baseline, settings.bootstraps, settings.confidence, seed)
            text = sentence(arm, BASELINE, prose, comparison, settings.confidence)
            rows.append({"arm": arm, "metric": measure, **asdict(comparison), "sentence": text})
    return pd.DataFrame(rows)[VERDICT_COLUMNS]


def detection_table(cases: pd.DataFrame, lesions: pd.DataFrame) -> pd.DataFrame:
    """Lesions found by size, and false positives a scan; one row an arm, means over replicates.

    Returns:
        arm, n_lesions, found_percent of all and of each size bin (NaN where there is no such lesion),
        false_positives_per_scan, and for cases without a lesion: n_empty_cases, empty_false_positive_mm3.
    """
    rows = []
    n_replicates = cases["replicate"].nunique()
    for arm in cases["arm"].unique():
        scans, marked = cases[cases["arm"] == arm], lesions[lesions["arm"] == arm]
        empty = scans[scans["n_lesions"] == 0]
        by_size = marked.groupby("size_bin")["found"].mean().reindex(SIZE_BINS)
        rows.append(
            {"arm": arm, "n_lesions": len(marked) // n_replicates, "found_percent": 100 * marked["found"].mean()}
            | {column: 100 * by_size[size] for size, column in _FOUND_BY_SIZE.items()}
            | {
                "false_positives_per_scan": scans["n_false_positives"].mean(),
                "n_empty_cases": len(empty) // n_replicates,
                "empty_false_positive_mm3": empty["false_positive_mm3"].mean(),
            }
        )
    return pd.DataFrame(rows)


def quality_files(results: Path, generators: list[str]) -> dict[str, Path]:
    """The measured image qualities, by generator; those not measured are left out."""
    paths = {name: results / "quality" / f"{name}.csv" for name in generators}
    return {name: path for name, path in paths.items() if path.exists()}


def quality_table(samples: pd.DataFrame) -> pd.DataFrame:
    """Summary of `lungddpm quality` tables: generator, image, region, metric, n, mean, sd over samples.

    Undefined values (empty regions) do not count towards n; a copy of the reference has an infinite mean PSNR.
    """
    keys = ["generator", "image", "region", "metric"]
    defined = samples.dropna(subset="value")
    if defined.empty:
        return pd.DataFrame(columns=[*keys, "n", "mean", "sd"])
    with np.errstate(invalid="ignore"):
        return defined.groupby(keys, sort=False)["value"].agg(n="count", mean="mean", sd="std").reset_index()


def seconds_per_volume(results: Path, generators: list[str]) -> dict[str, float]:
    """Mean sampling time in seconds by generator, from the `seconds` of the samples' provenance, where recorded."""
    means = {}
    for name in generators:
        records = (json.loads(path.read_text()) for path in (results / "synthetic" / name).glob("*/sample.json"))
        seconds = [record["seconds"] for record in records if record.get("seconds") is not None]
        if seconds:
            means[name] = float(np.mean(seconds))
    return means


def timing_table(results: Path) -> pd.DataFrame:
    """One row a job that Snakemake timed: stage, job, seconds, cpu_seconds, max_rss_mb.

    Read from `<results>/benchmarks/**/<stage>-<job>.tsv`; jobs that were too short to be sampled have NaN memory.
    """
    rows = []
    folder = results / "benchmarks"
    for path in sorted(folder.rglob("*.tsv")):
        job = path.relative_to(folder).with_suffix("").as_posix()
        for run in pd.read_csv(path, sep="\t", na_values=["-"]).to_dict("records"):
            rows.append(
                {
                    "stage": job.split("-")[0],
                    "job": job,
                    "seconds": run["s"],
                    "cpu_seconds": run.get("cpu_time"),
                    "max_rss_mb": run.get("max_rss"),
                }
            )
    return pd.DataFrame(rows, columns=["stage", "job", "seconds", "cpu_seconds", "max_rss_mb"])


def write_both(path: Path, table: pd.DataFrame) -> list[Path]:
    """Write `<path>.csv` in full precision and `<path>.md` for reading (four digits); returns both paths."""
    csv, markdown = path.with_suffix(".csv"), path.with_suffix(".md")
    write_table(csv, table)
    shown = table.map(lambda value: f"{value:.4g}" if isinstance(value, float) else value)
    text = shown.replace("nan", "").to_markdown(index=False, disable_numparse=True)
    write_text(markdown, text + "\n")
    return [csv, markdown]


def write_tables(config: Config, results: Path) -> tuple[dict[str, pd.DataFrame], list[Path]]:
    """Assemble all tables of a run and write them to `<results>/tables/` as CSV and Markdown.

    Returns:
        (tables by name, paths written). Tables: cases, lesions, verdict, detection, published_comparison; and
        image_quality and timing where the run measured them.

    Raises:
        InputError: metrics of an arm or replicate are missing or do not fit the others.
    """
    arms, replicates = config.arms.names(), config.segmentation.replicates()
    generators = list(config.arms.largest_doses())
    cases = gather(results, arms, replicates, "metrics.csv")
    lesions = gather(results, arms, replicates, "lesions.csv")
    tables = {
        "verdict": verdict_table(cases, config),
        "detection": detection_table(cases, lesions),
        "cases": cases,
        "lesions": lesions,
    }
    if measured := quality_files(results, generators):
        samples = pd.concat([read_csv(path) for path in measured.values()], ignore_index=True)
        tables["image_quality"] = quality_table(samples[image_quality.COLUMNS])
    tables["published_comparison"] = published_comparison(
        tables["verdict"],
        tables.get("image_quality"),
        seconds_per_volume(results, generators),
        phantoms=config.source.kind == "phantom",
    )
    if len(timing := timing_table(results)):
        tables["timing"] = timing
    written = [path for name, table in tables.items() for path in write_both(results / "tables" / name, table)]
    return tables, written
