"""The published figures (published.csv is their only copy) next to this run's, and whether the two are comparable.

Sources: the poster of Lung-DDPM (arXiv 2502.15204), the README of its successor, Lung-DDPM+, and the code of both. What
MAISI-v2 and LeFusion report for their own data is included as context.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files

import numpy as np
import pandas as pd

from lungddpm.core.arms import Arm
from lungddpm.quality.feature_distances import MEDICALNET
from lungddpm.quality.image_quality import SYNTHETIC, WHOLE

REAL_CASES = 800
"""Real training cases in the published segmentation experiment."""
_QUALITY_METRICS = {"MSE": "mse", "FID": "fid", "MMD": "mmd_squared"}
_SEGMENTATION = (
    "its 249 test patients are private, and it does not state what the sd is over: "
    "compare the change against real data, not the level"
)
_OTHER_SCALE = (
    "its intensity scaling and references differ from ours; with 84-90 % of the voxels copied from the reference, "
    "the whole-volume figure mostly reflects the size of the lungs"
)
_OTHER_FEATURES = (
    "the feature network here has random weights, so its distances are only comparable with each other "
    "(set image_quality.weights to MedicalNet's)"
)
_OTHER_INPUT = (
    "distances are only comparable with the same feature network, input range, grid and number of volumes; of these, "
    "only the network is the published one"
)
_SQUARED = (
    "what is measured here is MMD², its unbiased estimate; whether the published MMD is squared is not stated, and "
)
_OTHER_MACHINE = "sampling time depends on the machine and the grid, which differ"
_OTHER_SETTINGS = "forward passes per sample as configured here; their networks and grids differ"
_NOT_MEASURED = "not measured in this run"
_SIMULATED = "the patients of this run are simulated"
_NOT_REPORTED = "not reported"
_CONTEXT = "other data and another task: context only"
WITHOUT_LAYOUT = {
    "HA-GAN": "HA-GAN draws without a layout. Its CT has no labels, so it cannot train a segmenter; it can be "
    "judged by its image quality, from a folder (arms.quality_only)"
}
"""Published methods that no generator here can represent."""


def published_figures() -> pd.DataFrame:
    """The published figures, one row each.

    Columns: table (image_quality, segmentation, sampling, or context), source, cohort, method, condition (what part of
    the target the method is given), training_set, metric, mean, sd, n (cases), spread_over (what the sd is over: folds,
    cases or unknown), network (that was trained on the set), steps (of sampling), reported ("no": that experiment was
    not published, and there is no mean). What is not stated is an empty text or NaN.
    """
    with files(__package__).joinpath("published.csv").open(encoding="utf-8") as file:
        return pd.read_csv(file, keep_default_na=False, dtype=str).assign(
            **{name: lambda table, name=name: pd.to_numeric(table[name]) for name in ("mean", "sd")}
        )


def published_gain(metric: str) -> float:
    """The largest published gain of Lung-DDPM over real data alone, in the unit of the metric."""
    figures = published_figures().query("table == 'segmentation' and metric == @metric").set_index("method")["mean"]
    return float(figures.loc[["Lung-DDPM"]].max() - figures.loc["real only"])


def published_comparison(
    verdict: pd.DataFrame,
    generators: Mapping[str, str],
    image_quality: pd.DataFrame | None = None,
    seconds_per_volume: Mapping[str, float] | None = None,
    simulated: bool = False,
    *,
    measures: pd.DataFrame | None = None,
    passes: Mapping[str, float] | None = None,
) -> pd.DataFrame:
    """Published figures and this run's, row by row.

    Args:
        verdict: rows of `verdict.csv`.
        generators: published methods -> the generators of this run that represent them.
        image_quality: rows of `image_quality.csv`, if measured.
        seconds_per_volume: median sampling time by generator, if known.
        simulated: the run's patients are simulated, so nothing is comparable.
        measures: rows of `measures.csv`, for measures that the verdict does not have.
        passes: forward passes per sample by generator, for those with a network.

    Returns:
        The published rows with: published_change (against real only), arm (the closest one of this run, or generator),
         measured_metric (its column here: MMD is measured as mmd_squared), measured_mean, measured_sd,
        measured_change, comparable ("no" or "change only"), why_not.
    """
    rows = []
    figures = published_figures()
    of_segmenters = figures[figures["table"] == "segmentation"]
    real_only = of_segmenters[of_segmenters["method"] == "real only"].set_index("metric")["mean"]
    # The arms with the most real cases, as in the publication.
    verdict = verdict[verdict["real_cases"] == verdict["real_cases"].max()]
    scores = verdict if measures is None else pd.concat([verdict, measures[measures["arm"].isin(verdict["arm"])]])
    drawing = {"seconds_per_volume": seconds_per_volume or {}, "function_evaluations": passes or {}}
    for figure in figures.to_dict("records"):
        kept = ("table", "source", "cohort", "method", "training_set", "metric", "n", "spread_over", "network", "steps")
        row = {name: figure[name] for name in (*kept, "reported")}
        row |= {"published_mean": figure["mean"], "published_sd": figure["sd"], "published_change": np.nan}
        row |= {
            "arm": "",
            "measured_metric": "",
            "measured_mean": np.nan,
            "measured_sd": np.nan,
            "measured_change": np.nan,
        }
        if figure["table"] == "segmentation":
            if figure["method"] != "real only":
                row["published_change"] = figure["mean"] - real_only[figure["metric"]]
            row |= _segmentation(figure, generators, verdict, scores)
        elif figure["table"] == "image_quality":
            row |= _quality(figure, generators, image_quality)
        elif figure["table"] == "sampling":
            row |= _sampling(figure, generators, drawing[figure["metric"]])
        else:
            row |= {"comparable": "no", "why_not": _CONTEXT}
        if figure["reported"] == "no" and row["arm"]:
            row |= {"comparable": "no", "why_not": _NOT_REPORTED}
        if simulated and row["arm"]:
            row |= {"comparable": "no", "why_not": _SIMULATED}
        rows.append(row)
    return pd.DataFrame(rows)


def _segmentation(figure: dict, generators: Mapping[str, str], verdict: pd.DataFrame, scores: pd.DataFrame) -> dict:
    if figure["method"] == "real only":
        arm = verdict["baseline"].iloc[0]
    elif figure["method"] in generators:
        dose = int(figure["training_set"].split("+")[1].split()[0]) / REAL_CASES
        arm = _arm_of_dose(verdict["arm"], generators[figure["method"]], dose)
        if not arm:
            return {"comparable": "no", "why_not": f"this run has no arm with a dose close to {dose:.2g}"}
    else:
        return _absent(figure)
    found = scores[(scores["arm"] == arm) & (scores["metric"] == figure["metric"])].dropna(subset="mean")
    if found.empty:
        return {"comparable": "no", "why_not": _NOT_MEASURED}
    measured = found.iloc[0]
    return {
        "arm": arm,
        "measured_metric": figure["metric"],
        "measured_mean": measured["mean"],
        "measured_sd": measured["sd"],
        "measured_change": measured["difference"],
        "comparable": "no" if figure["method"] == "real only" else "change only",
        "why_not": _SEGMENTATION,
    }


def _arm_of_dose(arms: pd.Series, generator: str, dose: float) -> str:
    """The generator's arm whose dose is closest to `dose` and within a tenth of it (0.23 passes for 0.25)."""
    distance = {
        name: abs(arm.dose / dose - 1)
        for name, arm in zip(arms, map(Arm.parse, arms), strict=True)
        if arm.real and not arm.filtered and arm.generator == generator
    }
    closest = min(distance, key=lambda name: distance[name], default="")
    return closest if closest and distance[closest] <= 0.1 else ""


def _quality(figure: dict, generators: Mapping[str, str], image_quality: pd.DataFrame | None) -> dict:
    if figure["method"] not in generators:
        return _absent(figure)
    generator = generators[figure["method"]]
    if image_quality is not None:
        rows = image_quality[
            (image_quality["generator"] == generator) & (image_quality["image"] == SYNTHETIC)
            & (image_quality["region"] == WHOLE) & (image_quality["metric"] == _QUALITY_METRICS[figure["metric"]])
        ].dropna(subset="mean")  # fmt: skip
        if not rows.empty:
            row = rows.iloc[0]
            why_not = _OTHER_SCALE
            if figure["metric"] != "MSE":
                why_not = _OTHER_INPUT if row["extractor"] == MEDICALNET else _OTHER_FEATURES
            if figure["metric"] == "MMD":
                why_not = _SQUARED + why_not
            measured = {"measured_metric": row["metric"], "measured_mean": row["mean"], "measured_sd": row["sd"]}
            return {"arm": generator, **measured, "comparable": "no", "why_not": why_not}
    return {"comparable": "no", "why_not": _NOT_MEASURED}


def _sampling(figure: dict, generators: Mapping[str, str], by_generator: Mapping[str, float]) -> dict:
    generator = generators.get(figure["method"])
    if generator is None:
        return _absent(figure)
    if generator not in by_generator:
        return {"comparable": "no", "why_not": _NOT_MEASURED}
    return {
        "arm": generator,
        "measured_metric": figure["metric"],
        "measured_mean": by_generator[generator],
        "comparable": "no",
        "why_not": _OTHER_MACHINE if figure["metric"] == "seconds_per_volume" else _OTHER_SETTINGS,
    }


def _absent(figure: dict) -> dict:
    method = figure["method"]
    return {"comparable": "no", "why_not": WITHOUT_LAYOUT.get(method, f"no generator of this run represents {method}")}
