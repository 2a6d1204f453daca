"""Tables from the run's other records: image quality, sampling times, and the times of its jobs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd

from lungddpm.arms.compose import draw_record
from lungddpm.config.models import Config
from lungddpm.core.cases import CaseFolder
from lungddpm.core.device import device_of
from lungddpm.core.files import read_json
from lungddpm.segmentation.nnunet import segmenter_curve

CURVE_COLUMNS = ["arm", "replicate", "step", "training_loss", "pseudo_dice"]
"""Means since the previous saved state: loss of the training patches, Dice of the validation patches."""
DRAWING_COLUMNS = ["generator", "n_volumes", "nodules_per_volume", "seconds_per_volume", "memory_mib", "device"]
KEPT_COLUMNS = [
    "arm", "replicate", "found_limit", "found_mean", "judged", "kept", "share_kept", "wanted", "taken",
]  # fmt: skip
"""For a filtered arm, or one replicate's draw: the number of samples judged, kept, wanted and taken; the mean share of
a sample's nodule voxels that was found. `replicate` is empty if all share one draw."""
TIMING_COLUMNS = ["stage", "job", "seconds", "cpu_seconds", "max_rss_mb", "device"]


def quality_files(results: Path, generators: list[str]) -> dict[str, Path]:
    """Paths of the measures of samples, by generator; those not measured are left out."""
    paths = {name: results / "quality" / f"{name}.csv" for name in generators}
    return {name: path for name, path in paths.items() if path.exists()}


def quality_table(samples: pd.DataFrame, sets: pd.DataFrame) -> pd.DataFrame:
    """The results of `lungddpm quality` over all samples; one row per generator, image, region and metric.

    Args:
        samples: rows of `image_quality.COLUMNS`; summarised. Undefined values (empty regions) do not count towards n; a
            copy of the reference has an infinite mean PSNR.
        sets: rows of `image_quality.SET_COLUMNS`; their value becomes the mean. Those without a value are kept, with n
            = 0, because their note gives the reason.

    Returns:
        generator, image, region, metric, n, mean, sd, standard_error (of a set's value, where it is known), n_real
        (real cases that the set was compared with), extractor (feature network), weights_sha256, note.
    """
    keys = ["generator", "image", "region", "metric"]
    last = ["standard_error", "n_real", "extractor", "weights_sha256", "note"]
    with np.errstate(invalid="ignore"):
        summary = (
            samples.dropna(subset="value")
            .groupby(keys, sort=False)
            .agg(n=("value", "count"), mean=("value", "mean"), sd=("value", "std"), note=("note", _common))
            .reset_index()
        )
    together = sets.rename(columns={"value": "mean"})
    together["n"] = together["n"].where(together["mean"].notna(), 0)
    found = pd.concat([summary, together], ignore_index=True)[[*keys, "n", "mean", "sd", *last]]
    order = {name: place for place, name in enumerate(found["generator"].unique())}
    return (
        found.astype({"n_real": "Int64"})
        .fillna({"extractor": "", "weights_sha256": "", "note": ""})
        .sort_values("generator", key=lambda names: names.map(order), kind="stable", ignore_index=True)
    )


def _common(notes: pd.Series) -> str:
    """The note of all samples, if they have the same one."""
    return notes.iloc[0] if notes.nunique(dropna=False) == 1 else ""


def drawing_costs(results: Path, generators: list[str]) -> pd.DataFrame:
    """The cost of drawing the samples, from their records: `DRAWING_COLUMNS`, one row per generator.

    `n_volumes` have a record of their time; `nodules_per_volume` is the mean of these; `seconds_per_volume` is the
    median, which a stalled machine does not move; `memory_mib` is the largest peak of a process.
    """
    rows, samples = [], CaseFolder(Path("*/*")).sample_record.as_posix()
    for name in generators:
        records = list(map(read_json, sorted((results / "synthetic" / name).glob(samples))))
        timed = [record for record in records if record.get("seconds") is not None]
        known = [record["memory_mib"] for record in timed if record.get("memory_mib") is not None]
        seconds = float(np.median([record["seconds"] for record in timed])) if timed else math.nan
        nodules = [record["n_nodules"] for record in timed if record.get("n_nodules") is not None]
        devices = "; ".join(dict.fromkeys(record["device"] for record in timed if "device" in record))
        mean = float(np.mean(nodules)) if nodules else math.nan
        rows.append((name, len(timed), mean, seconds, max(known, default=math.nan), devices))
    return pd.DataFrame(rows, columns=DRAWING_COLUMNS)


def seconds_per_volume(results: Path, generators: list[str]) -> dict[str, float]:
    """Median sampling time in seconds by generator, where recorded."""
    return drawing_costs(results, generators).set_index("generator")["seconds_per_volume"].dropna().to_dict()


def filter_table(config: Config, results: Path) -> pd.DataFrame:
    """The outcome of the quality filter for each arm and draw that has one: `KEPT_COLUMNS`."""
    rows = []
    for arm in config.arms.all():
        if not arm.filtered:
            continue
        folder = results / "arms" / arm.name
        records = {"": folder / "arm.json"}
        records |= {name: draw_record(folder, name) for name in config.segmentation.replicates()}
        for replicate, path in records.items():
            kept = read_json(path).get("filter") if path.exists() else None
            if kept is not None:
                row = {name: kept[name] for name in ("found_mean", "judged", "kept", "wanted", "taken")}
                row |= {"found_limit": kept["found"], "share_kept": kept["kept"] / kept["judged"]}
                rows.append({"arm": arm.name, "replicate": replicate, **row})
    return pd.DataFrame(rows, columns=KEPT_COLUMNS)


def training_curves(config: Config, results: Path) -> pd.DataFrame:
    """The training curve of every replicate that has a log, one row per saved state: `CURVE_COLUMNS`."""
    rows = []
    for arm in config.arms.names():
        for fold in config.segmentation.folds:
            for seed in config.segmentation.seeds:
                curve = segmenter_curve(results / "arms" / arm, fold, seed, config.segmentation.save_every)
                rows += [(arm, config.segmentation.replicate_name(fold, seed), *point) for point in curve]
    return pd.DataFrame(rows, columns=CURVE_COLUMNS)


def timing_table(results: Path) -> pd.DataFrame:
    """One row per job timed by Snakemake: `TIMING_COLUMNS`.

    Read from `<results>/benchmarks/**/<stage>-<job>.tsv`, the device from the record beside the log of the same name;
    jobs too short to be sampled have NaN memory.
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
                    "device": device_of(results / "logs" / f"{job}.log"),
                }
            )
    return pd.DataFrame(rows, columns=TIMING_COLUMNS)
