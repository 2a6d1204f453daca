"""The tables and sentences of the report page, each made from a table of the verdict."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from string import ascii_lowercase

import pandas as pd

from lungddpm.config.models import Config, Source
from lungddpm.core import cases
from lungddpm.core.arms import is_baseline
from lungddpm.core.roles import INTERNAL, ROLES, TEST
from lungddpm.core.tables import DisplayTable
from lungddpm.core.text import bound, format_duration, format_number, format_p, format_spread, plural
from lungddpm.evaluation.froc import RATES
from lungddpm.evaluation.lesions import SIZE_COLUMNS, TEXTURE_COLUMNS, TEXTURES
from lungddpm.evaluation.measures import MEASURES, Measure, deciding_measure
from lungddpm.generators import GIVEN, NOTHING
from lungddpm.quality.calibration import DIFFERENCE, NODULES, SPREAD
from lungddpm.quality.image_quality import (
    COPIES,
    LUNGS,
    MEAN_SD,
    MEDIAN_RATIO,
    N_NEARER,
    PAIRWISE,
    SEAM,
    SEAM_RATIO,
    SMALLEST_RATIO,
    VOXEL_SD,
    WHOLE,
)
from lungddpm.verdict.answer import ANSWER, MANY
from lungddpm.verdict.instrument import FAILED, NOT_MEASURED, PASSED, SHORT
from lungddpm.verdict.ladder import NOT_IN_RUN, has_wavelets
from lungddpm.verdict.statistics import caveats, minimum_cases
from lungddpm.verdict.tables import missing_replicates

WAVELET_CITATION = (
    "Friedrich et al.: WDM: 3D Wavelet Diffusion Models for High-Resolution Medical Image Synthesis, DGM4MICCAI 2024, "
    "arXiv 2402.19043 (whose diffusion runs on the sub-bands; here on voxels)."
)
SHARED_VARIANCE = (
    "In simulated benchmarks of three arms whose replicates share half their variance, false claims rise from 5 % to "
    "16 % (3 replicates, 40 cases) or 37 % (5 replicates, 249 cases)."
)


def limits_of_size(verdict: pd.DataFrame, cases: pd.DataFrame, confidence: float) -> list[str]:
    """What the test cases and replicates of one test set are too few for, as sentences.

    Args:
        verdict: rows of `verdict.csv`, or those of an external test set.
        cases: the measures of its cases.
        confidence: of the decision.
    """
    needed = minimum_cases(max(int(verdict["n_compared"].max()), 1), confidence)
    n_cases, n_independent, run_df = (int(verdict[column].max()) for column in ("n_cases", "n_independent", "run_df"))
    limits = caveats(n_cases, n_independent, run_df, needed)
    n_patients, n_scans = cases["patient_id"].nunique(), cases["case_id"].nunique()
    if n_patients < n_scans:
        limits.append(
            f"{n_scans} test cases come from {plural(n_patients, 'patient')}, but are treated as independent."
        )
    return limits


def limits_of(config: Config, tables: dict[str, pd.DataFrame]) -> list[str]:
    """What this run cannot tell, as sentences."""
    verdict, cases_scored = tables["verdict"], tables["cases"]
    n_replicates = int(verdict["n_replicates"].max())
    limits = [
        f"Not evaluated and left out: {arm}, {', '.join(replicates)}."
        for arm, replicates in missing_replicates(cases_scored, config).items()
    ]
    n_independent = int(verdict["n_independent"].max())
    limits += limits_of_size(verdict, cases_scored, config.verdict.confidence)
    if n_independent < n_replicates:
        limits.append(
            f"{n_replicates} replicates in {plural(n_independent, 'fold')}: seeds of a fold share its split of the "
            "data, so they are averaged and each fold counts once."
        )
    elif len(config.segmentation.folds) == 1:
        limits.append("All replicates share one fold: variation between splits of the training cases is not covered.")
    limits += covered_variation(config)
    if n_empty := cases_scored.loc[cases_scored["n_lesions"] == 0, "case_id"].nunique():
        limits.append(
            f"Test cases without a nodule: {n_empty}. They do not count towards Dice and sensitivity; "
            "their false positives are under “Lesions found”."
        )
    x, y, z = config.grid.size
    limits.append(f"All CT was resampled to {x} × {y} × {z} voxels: nodules of one or two voxels can vanish or merge.")
    return limits


PARTLY = "passed in part, the rest not measured"
_WORST_FIRST = [FAILED, NOT_MEASURED, PASSED]
_MARKS = {PASSED: "✓ ", FAILED: "✗ ", NOT_MEASURED: ""}


@dataclass(frozen=True)
class DisplayCheck:
    """A check of the instrument for display: its outcome, and a line for each of its subjects."""

    name: str
    status: str
    lines: list[dict[str, str]]
    """Figure, limit, status and sentence of each subject."""
    overview: DisplayTable | None
    """A row per subject and a column per measure, if there are many subjects."""

    @property
    def passed(self) -> str:
        """For how many of its subjects all lines passed, in words."""
        subjects = {line["subject"] for line in self.lines}
        n_open = len({line["subject"] for line in self.lines if line["status"] != PASSED})
        if not n_open:
            return f"Passed for all {len(subjects)}"
        return f"Passed for {len(subjects) - n_open} of {len(subjects)}; the others {PARTLY}"


def show_checks(table: pd.DataFrame) -> list[DisplayCheck]:
    """The checks of `instrument.csv` for display; `PARTLY` if some lines passed and the others were not measured."""
    shown = []
    for name, rows in table[table["check"] != ANSWER].groupby("check", sort=False):
        lines = [
            {
                "subject": row["subject"],
                "figure": _check_figure(row["value"]),
                "measure": row["measure"],
                "limit": _limit_text(row["limit_low"], row["limit_high"]),
                "status": row["status"],
                "sentence": row["sentence"],
            }
            for row in rows.to_dict("records")
        ]
        statuses = {line["status"] for line in lines}
        status = PARTLY if statuses == {PASSED, NOT_MEASURED} else min(statuses, key=_WORST_FIRST.index)
        overview = _overview(lines) if rows["subject"].nunique() > MANY else None
        shown.append(DisplayCheck(str(name), status, lines, overview))
    return shown


def _overview(lines: list[dict[str, str]]) -> DisplayTable:
    measures = {line["measure"]: f"{_head(line['measure'])} (limit: {line['limit']})" for line in lines}
    cells = {(line["subject"], line["measure"]): _MARKS[line["status"]] + (line["figure"] or "–") for line in lines}
    subjects = dict.fromkeys(line["subject"] for line in lines)
    return DisplayTable(
        ["", *measures.values()],
        [[subject, *(cells.get((subject, measure), "") for measure in measures)] for subject in subjects],
        [False, *(True for _ in measures)],
    )


def _head(measure: str) -> str:
    """The measure itself if it is short enough for a column, else its short name."""
    return measure if len(measure) < 25 else SHORT.get(measure, measure)


def outcome_of(table: pd.DataFrame) -> dict[str, str]:
    """Status and sentence of the answer, the last row of `instrument.csv`."""
    row = table[table["check"] == ANSWER].iloc[-1]
    return {"status": row["status"], "sentence": row["sentence"]}


def _check_figure(value: float) -> str:
    if 0 < value < 0.0005:  # would read as zero, which a p is not
        return "< 0.001"
    form = ".0f" if float(value).is_integer() else ".3g" if abs(value) >= 1 else ".3f" if abs(value) < 0.1 else ".2f"
    return format_number(value, form)


def _limit_text(low: float, high: float) -> str:
    if pd.isna(low):
        return f"at most {high:.3g}" if high else "0"
    return f"at least {low:.3g}" if pd.isna(high) else f"{low:.3g} to {high:.3g}"


def covered_variation(config: Config) -> list[str]:
    """The random variation that the comparison covers and does not cover, in sentences; none without synthetic CT."""
    generators = config.arms.largest_doses()
    if not generators:
        return []
    plugins = [name for name in generators if name not in config.arms.external]
    trained = bool(config.trained_generators())
    covered = ["choice of test patients", "training of the segmenter"]
    open_: list[str] = []
    if plugins:
        (covered if config.synthesis.draw_per_replicate else open_).append("draw of the samples")
    if trained:
        (covered if config.synthesis.training_per_replicate else open_).append("training of the generator")
    if external := [name for name in generators if name in config.arms.external]:
        open_.append(f"randomness of the other system ({', '.join(external)}: one set of samples)")
    text = f"Random variation that the comparison covers: {', '.join(covered)}."
    if open_:
        text += f" Not covered, because all replicates share it: {', '.join(open_)}. {SHARED_VARIANCE}"
    return [text]


def show_verdict(verdict: pd.DataFrame, measure: Measure, confidence: str, significance: float) -> DisplayTable:
    """The rows of one measure in `verdict.csv` for display."""
    rows = [
        [
            row["arm"], format_spread(row["mean"], row["sd"], ".3f"), format_number(row["difference"], "+.3f"),
            interval_text(row), format_number(row["relative_percent"], "+.1f"),
            p_text(row["p"], significance), p_text(row["p_holm"], significance),
            _detectable(row), row["verdict"],
        ]
        for row in verdict[verdict["metric"] == measure.column].to_dict("records")
    ]  # fmt: skip
    heads = ["arm", f"{measure.title} ± sd", "difference", f"{confidence} CI", "difference, %", "p", "p, Holm",
             "detectable", "verdict"]  # fmt: skip
    return DisplayTable(heads, rows, [False, *[True] * 7, False])


def show_description(verdict: pd.DataFrame, measure: Measure, confidence: str, significance: float) -> DisplayTable:
    """Descriptive columns of the comparisons of one measure, which do not decide them."""
    rows = [
        [
            row["arm"], format_number(row["difference"], "+.3f"), interval_text(row, "bootstrap"),
            p_text(row["p_wilcoxon"], significance),
            f"{row['wins']} / {row['ties']} / {row['losses']}", format_number(row["standard_error"], ".4f"),
            format_number(row["df"], ".1f"),
        ]
        for row in verdict[(verdict["metric"] == measure.column) & verdict["difference"].notna()].to_dict("records")
    ]  # fmt: skip
    heads = ["arm", f"difference, {measure.title}", f"{confidence} CI, bootstrap", "p, Wilcoxon",
             "wins / ties / losses", "standard error", "df"]  # fmt: skip
    return DisplayTable(heads, rows, [False, *[True] * 6])


def show_calibration(calibration: pd.DataFrame) -> DisplayTable:
    """`calibration.csv` for display."""
    names = {DIFFERENCE: ("mean difference, HU", "+.1f"), SPREAD: ("spread of HU, ratio of sd", ".3f")}
    rows = []
    for row in calibration.to_dict("records"):
        name, form = names[row["measure"]]
        limits = [format_number(row[key], "g") for key in ("limit_low", "limit_high")]
        rows.append(
            [
                row["generator"], row["region"], name, str(row["n_samples"]),
                format_spread(row["mean"], row["sd"], form),
                "" if pd.isna(row["limit_low"]) else " to ".join(limits), row["status"],
                format_number(row["training_difference"], "+.1f"),
            ]
        )  # fmt: skip
    heads = ["generator", "region", "measure", "samples", "mean ± sd", "limits of the mean", "check", "training cases"]
    return DisplayTable(heads, rows, [False, False, False, True, True, True, False, True])


def show_run_spread(spread: pd.DataFrame, significance: float) -> DisplayTable:
    """`run_spread.csv` for display."""
    rows = [
        [
            row["arm"], str(row["n_replicates"]), format_number(row["mean"], ".3f"),
            format_number(row["lowest"], ".3f"), format_number(row["highest"], ".3f"),
            format_number(row["range"], ".3f"), format_number(row["sd"], ".3f"),
            p_text(row["p"], significance),
        ]
        for row in spread.to_dict("records")
    ]  # fmt: skip
    mean = f"mean {deciding_measure().title}"
    heads = ["arm", "runs", mean, "lowest", "highest", "range", "sd", "p"]
    return DisplayTable(heads, rows, [False, *[True] * 7])


def show_dose_response(lines: pd.DataFrame, confidence: str, significance: float) -> DisplayTable:
    """`dose_response.csv` for display."""
    rows = [
        [
            row["generator"], row["baseline"], MEASURES[row["metric"]].title, str(row["n_doses"]),
            format_number(row["slope"], "+.3f"),
            interval_text(row), p_text(row["p"], significance),
        ]
        for row in lines.to_dict("records")
    ]  # fmt: skip
    heads = ["generator", "from", "measure", "doses", "slope", f"{confidence} CI", "p, uncorrected"]
    return DisplayTable(heads, rows, [False, False, False, True, True, True, True])


def show_measures(summary: pd.DataFrame) -> DisplayTable:
    """`measures.csv` for display: a row per arm, a column per measure; in brackets the number of scored cases, if it is
    lower than for another measure."""
    rows = []
    for arm, of_arm in summary.groupby("arm", sort=False):
        values, n_cases = of_arm.set_index("metric"), int(of_arm["n_cases"].max())
        cells = []
        for column, measure in MEASURES.items():
            value = values.loc[column]
            fewer = f" (n = {value['n_cases']})" if value["n_cases"] < n_cases else ""
            cells.append(format_spread(value["mean"], value["sd"], measure.form) + fewer)
        rows.append([arm, str(n_cases), *cells])
    heads = ["arm", "cases", *(measure.head for measure in MEASURES.values())]
    return DisplayTable(heads, rows, [False, *[True] * (1 + len(MEASURES))])


def show_measure_differences(summary: pd.DataFrame) -> DisplayTable:
    """Differences from `real` in `measures.csv`, for the measures with a direction."""
    directed = {column: measure for column, measure in MEASURES.items() if measure.better != "near 0"}
    rows = [
        [
            arm,
            *(
                format_number(value, f"+{measure.form.removeprefix('+')}")
                for measure, value in zip(
                    directed.values(), of_arm.set_index("metric").loc[[*directed], "difference"], strict=True
                )
            ),
        ]
        for arm, of_arm in summary[~summary["arm"].map(is_baseline)].groupby("arm", sort=False)
    ]
    return DisplayTable(
        ["arm", *(measure.head for measure in directed.values())], rows, [False, *[True] * len(directed)]
    )


def show_unscored(summary: pd.DataFrame, cases_scored: pd.DataFrame) -> DisplayTable | None:
    """Predictions without a value of a measure because nothing was predicted; None if there are none."""
    judged = cases_scored[cases_scored["n_lesions"] > 0]
    n_predictions, n_cases = judged.groupby("arm").size(), judged.groupby("arm")["case_id"].nunique()
    rows = [
        [
            row["arm"], MEASURES[row["metric"]].title,
            f"{n_predictions[row['arm']] - row['n_undefined']} of {n_predictions[row['arm']]}",
            f"{row['n_cases']} of {n_cases[row['arm']]}",
        ]
        for row in summary[summary["n_undefined"] > 0].to_dict("records")
    ]  # fmt: skip
    heads = ["arm", "measure", "predictions scored", "cases scored in at least one replicate"]
    return DisplayTable(heads, rows, [False, False, True, True]) if rows else None


def show_detection(detection: pd.DataFrame) -> DisplayTable:
    """`detection.csv` for display."""
    heads = ["arm", "found", *[f"found, {size}" for size in SIZE_COLUMNS], "false positives per scan", "CPM",
             "scans without nodule", "false positives there, mm³"]  # fmt: skip
    rows = []
    for row in detection.to_dict("records"):
        found = [
            f"{row[f'found_percent{size}']:.0f} % of {row[f'n_lesions{size}']}" if row[f"n_lesions{size}"] else ""
            for size in ("", *(f"_{column}" for column in SIZE_COLUMNS.values()))
        ]
        rows.append(
            [
                row["arm"], *found, format_number(row["false_positives_per_scan"], ".2f"),
                format_number(row["cpm"], ".3f"), str(row["n_empty_cases"]),
                format_number(row["empty_false_positive_mm3"], ".0f"),
            ]
        )  # fmt: skip
    return DisplayTable(heads, rows, [False, *[True] * 8])


def show_sensitivity(band: pd.DataFrame, detection: pd.DataFrame, confidence: str) -> DisplayTable | None:
    """FROC in numbers, mean over replicates; None if no arm has a curve.

    Args:
        band: rows of `froc_band.csv`; the rates `RATES` are shown.
        detection: rows of `detection.csv`, for CPM.
        confidence: level of its limits, as text.
    """
    if band.empty:
        return None
    heads = ["arm", *(f"at {Fraction(rate)}" for rate in RATES), f"CPM ({confidence} band)"]
    at_rates = band.pivot(index="arm", columns="false_positives_per_scan", values="sensitivity")[list(RATES)]
    rows = [
        [row["arm"], *(f"{value:.2f}" for value in at_rates.loc[row["arm"]]),
         f"{row['cpm']:.3f} ({row['cpm_ci_low']:.3f} to {row['cpm_ci_high']:.3f})"]
        for row in detection.dropna(subset="cpm").to_dict("records")
    ]  # fmt: skip
    return DisplayTable(heads, rows, [False, *[True] * (len(RATES) + 1)])


def show_strata(strata: pd.DataFrame) -> DisplayTable | None:
    """`detection_by_stratum.csv` for display, a column per arm; None if no lesion has a texture rating."""
    if strata.empty:
        return None
    arms = list(dict.fromkeys(strata["arm"]))
    rows = [
        [texture, size, str(of_stratum["n_lesions"].iloc[0]),
         *(format_number(of_stratum.loc[of_stratum["arm"] == arm, "found_percent"].mean(), ".0f") for arm in arms)]
        for (texture, size), of_stratum in strata.groupby(["texture", "size"], sort=False)
    ]  # fmt: skip
    heads = ["texture", "size", "lesions", *(f"{arm}, % found" for arm in arms)]
    return DisplayTable(heads, rows, [False, False, *[True] * (len(arms) + 1)])


def show_case_scores(cases_scored: pd.DataFrame) -> DisplayTable:
    """The deciding measure of every case and arm, mean over replicates."""
    measure = deciding_measure()
    wide = cases_scored.pivot_table(index="case_id", columns="arm", values=measure.column, sort=False, dropna=False)
    wide = wide[list(dict.fromkeys(cases_scored["arm"]))]
    rows = [
        [str(case), *(format_number(value, measure.form) for value in scores)]
        for case, scores in zip(wide.index, wide.to_numpy(), strict=True)
    ]
    return DisplayTable(["case", *wide.columns], rows, [False, *[True] * wide.shape[1]])


def show_quality(quality: pd.DataFrame) -> DisplayTable:
    """The voxelwise comparisons in `image_quality.csv` for display: a row per generator, image and region; copies of
    the references are left out, because they do not differ."""
    columns = {"mse": ("MSE × 1000", 1000, ".2f"), "psnr_db": ("PSNR, dB", 1, ".1f"), "ssim": ("SSIM", 1, ".3f"),
               "ms_ssim": ("MS-SSIM", 1, ".3f"), "mean_difference_hu": ("mean difference, HU", 1, "+.0f")}  # fmt: skip
    rows, by_voxel = [], quality[quality["metric"].isin(columns) & (quality["image"] != COPIES)]
    for (generator, image, region), group in by_voxel.groupby(["generator", "image", "region"], sort=False):
        values = group.set_index("metric").reindex(columns)
        cells = [
            format_spread(factor * values.loc[metric, "mean"], factor * values.loc[metric, "sd"], form)
            for metric, (_, factor, form) in columns.items()
        ]
        rows.append([generator, image, region, str(int(values["n"].max())), *cells])
    heads = ["generator", "image", "region", "samples", *(name for name, _, _ in columns.values())]
    return DisplayTable(heads, rows, [False, False, False, *[True] * 6])


def show_sets(quality: pd.DataFrame) -> DisplayTable:
    """The comparisons of sets in `image_quality.csv` for display: one row per generator and image."""
    return _by_image(quality, {
        ("fid", WHOLE): ("FID, whole volume", ".3g"), ("fid", LUNGS): ("FID, lungs", ".3g"),
        ("kid", WHOLE): ("KID ± se, whole volume", ".2g"), ("kid", LUNGS): ("KID ± se, lungs", ".2g"),
        ("mmd_squared", WHOLE): ("MMD², whole volume", "+.3f"), ("mmd_squared", LUNGS): ("MMD², lungs", "+.3f"),
        ("feature_precision", LUNGS): ("precision, lungs", ".2f"), ("feature_recall", LUNGS): ("recall, lungs", ".2f"),
        ("classifier_auc", LUNGS): ("AUC of a classifier, lungs", ".2f"),
        (SEAM_RATIO, SEAM): ("step at the lungs' border", ".2f"),
    })  # fmt: skip


def show_memorisation_and_diversity(quality: pd.DataFrame) -> DisplayTable:
    """Nearness of images to training cases, and diversity of the draws of one layout, for display."""
    return _by_image(quality, {
        (MEDIAN_RATIO, LUNGS): ("distance to training case, median", ".2f"),
        (SMALLEST_RATIO, LUNGS): ("smallest", ".2f"), (N_NEARER, LUNGS): ("nearer than any real", ".0f"),
        (PAIRWISE, LUNGS): ("MS-SSIM of draws, lungs", ".3f"),
        (PAIRWISE, NODULES): ("MS-SSIM of draws, nodules", ".3f"),
        (VOXEL_SD, NODULES): ("sd of a nodule's voxels, HU", ".0f"),
        (MEAN_SD, NODULES): ("sd of a nodule's mean, HU", ".0f"),
    })  # fmt: skip


def _by_image(quality: pd.DataFrame, columns: dict[tuple[str, str], tuple[str, str]]) -> DisplayTable:
    """One row per generator and image that has any of these values, one column per (metric, region).

    Args:
        quality: rows of `image_quality.csv`.
        columns: metric and region -> head and format; a standard error is shown next to its value.
    """
    rows = []
    for (generator, image), group in quality.groupby(["generator", "image"], sort=False):
        of_image = group.set_index(["metric", "region"])[["mean", "standard_error"]].reindex(list(columns))
        if of_image["mean"].notna().any():
            cells = [
                format_spread(value, error, form)
                for (value, error), (_, form) in zip(of_image.to_numpy(), columns.values(), strict=True)
            ]
            rows.append([generator, image, *cells])
    heads = ["generator", "images", *(head for head, _ in columns.values())]
    return DisplayTable(heads, rows, [False, False, *[True] * len(columns)])


def show_costs(costs: pd.DataFrame) -> DisplayTable:
    """`quality_and_cost.csv` for display."""
    rows = [
        [
            row["generator"], format_number(row["function_evaluations"], ".3g"),
            format_number(row["seconds_per_volume"], ".3g"), format_number(row["memory_mib"], ".0f"), row["device"],
            format_number(row["label_fidelity_dice"], ".3f"), format_number(row["nodule_hu_difference"], "+.0f"),
            format_number(row["fid_lungs"], ".3g"),
            format_spread(row["kid_lungs"], row["kid_lungs_standard_error"], ".2g"),
        ]
        for row in costs.to_dict("records")
    ]  # fmt: skip
    heads = ["CT", "function evaluations", "seconds per volume", "memory, MiB", "device", "label fidelity, Dice",
             "nodules, HU error", "FID, lungs", "KID ± se, lungs"]  # fmt: skip
    return DisplayTable(heads, rows, [False, True, True, True, False, *[True] * 4])


def show_fidelity(fidelity: pd.DataFrame) -> DisplayTable:
    """`label_fidelity.csv` for display; textures without a lesion are left out."""
    kinds = {size: f"_{column}" for size, column in SIZE_COLUMNS.items()}
    kinds |= {text: f"_{column}" for text, column in TEXTURE_COLUMNS.items() if fidelity[f"n_lesions_{column}"].any()}
    rows = []
    for row in fidelity.to_dict("records"):
        recalls = [
            f"{100 * row[f'recall{kind}']:.0f} % of {row[f'n_lesions{kind}']}" if row[f"n_lesions{kind}"] else ""
            for kind in ("", *kinds.values())
        ]
        rows.append(
            [
                row["generator"], str(row["n_cases"]), format_spread(row["dice_mean"], row["dice_sd"], ".3f"),
                format_number(row["difference"], "+.3f"), interval_text(row),
                *recalls, format_number(100 * row["recall_difference"], "+.0f"),
                format_number(row["false_positives_per_scan"], ".2f"),
            ]
        )  # fmt: skip
    heads = ["CT", "cases", "Dice ± sd", "from the ceiling", "CI", "lesions found",
             *[f"found, {kind}" for kind in kinds], "from the ceiling, points",
             "false positives per scan"]  # fmt: skip
    return DisplayTable(heads, rows, [False, *[True] * (len(heads) - 1)])


def show_fidelity_strata(strata: pd.DataFrame) -> DisplayTable | None:
    """`label_fidelity_by_stratum.csv` for reading, a column per generator; None if no lesion's texture is known."""
    if strata.empty:
        return None
    generators = list(dict.fromkeys(strata["generator"]))
    cells = {
        (row["texture"], row["size"], row["generator"]): f"{row['found_percent']:.0f} % of {row['n_lesions']}"
        for row in strata.to_dict("records")
    }
    order = [(texture, size) for texture in TEXTURES for size in SIZE_COLUMNS]
    rows = [[*stratum, *(cells.get((*stratum, generator), "") for generator in generators)] for stratum in order]
    rows = [row for row in rows if any(row[2:])]
    return DisplayTable(["texture", "size", *generators], rows, [False, False, *[True] * len(generators)])


def show_ladder(ladder: pd.DataFrame, confidence: str) -> tuple[DisplayTable, DisplayTable, list[str]]:
    """`ladder.csv` for display: families crossed with the given information, then a row per generator, and notes on
    published methods. Cells of the former have several lines.

    Args:
        ladder: `LADDER_COLUMNS`.
        confidence: of the intervals, e.g. "95 %".
    """
    crossed = []
    for family, rows in ladder.groupby("family", sort=False):
        cells = [[_in_cell(row) for row in rows[rows["given"] == given].to_dict("records")] for given in GIVEN]
        crossed.append([str(family), *("\n\n".join(cell) for cell in cells)])
    heads = ["family", *("nothing" if given == NOTHING else given.replace("+", " + ") for given in GIVEN)]
    listed = [
        [
            row["family"], row["given"].replace("+", " + "), row["generator"], row["stands_for"],
            format_number(row["fid"], ".3g"), format_number(row["fid_lungs"], ".3g"),
            format_number(row["fidelity_dice"], ".3f"), format_number(row["fidelity_difference"], "+.3f"),
            row["arm"], format_number(row["difference"], "+.3f"), interval_text(row), row["verdict"],
        ]
        for row in ladder[ladder["generator"] != ""].to_dict("records")
    ]  # fmt: skip
    names = ["family", "given", "generator", "published method", "FID, whole volume", "FID, lungs",
             "label fidelity, Dice", "from the ceiling", "arm", "difference from real", f"{confidence} CI",
             "verdict"]  # fmt: skip
    numeric = [False] * 4 + [True] * 4 + [False, True, True, False]
    return (
        DisplayTable(heads, crossed, [False] * len(heads)),
        DisplayTable(names, listed, numeric),
        [note for note in ladder["note"].unique() if note not in ("", NOT_IN_RUN)],
    )


def _in_cell(row: dict) -> str:
    """A generator with the published method that it represents, and a line for each of its image quality, its label
    fidelity and its arm's difference from `real`, where measured; or that method alone."""
    if not row["generator"]:
        return f"({row['stands_for']}: {NOT_IN_RUN})"
    method = f" = {row['stands_for']}" if row["stands_for"] else ""
    whole, lungs, dice, below, difference = (
        format_number(row[name], form)
        for name, form in {
            "fid": ".3g", "fid_lungs": ".3g", "fidelity_dice": ".3f", "fidelity_difference": "+.3f",
            "difference": "+.3f",
        }.items()
    )  # fmt: skip
    fids = [f"{value} {where}" for value, where in ((whole, "whole volume"), (lungs, "lungs")) if value]
    lines = {
        "FID": ", ".join(fids),
        "fidelity": f"{dice} ({below})" if dice and below else dice,
        "difference": difference,
    }
    return "\n".join([row["generator"] + method, *(f"{name} {text}" for name, text in lines.items() if text)])


def generators_of(config: Config) -> list[tuple[str, str, str]]:
    """Name, title and citation of every generator in use.

    The citation is empty for samples of another system and for controls without one.
    """
    described = []
    for name in config.arms.largest_doses():
        if name in config.arms.external:
            described.append((name, "external: samples of another system", ""))
        else:
            declared = config.plugin_of(name)
            variant = "" if config.kind_of(name) == name else f"Variant of {config.kind_of(name)}. "
            title, citation = variant + declared.title, cited(declared.citation)
            if has_wavelets(config, name):
                title, citation = f"{title}; its network works on wavelets", f"{citation} {WAVELET_CITATION}".strip()
            described.append((name, title, citation))
    return described


def source_note(source: Source) -> str:
    """Title, citation and caveat of a source, in a line."""
    return " ".join(filter(None, (f"{source.declared.title}.", cited(source.declared.citation), source.caveat)))


def cited(citation: str) -> str:
    """A declared citation; empty where a module declares that there is none ("None: ...")."""
    return "" if citation.startswith("None") else citation


def extractors_of(quality: pd.DataFrame) -> list[str]:
    """The feature networks behind FID and MMD, each with the first digits of its weights' SHA-256."""
    used = quality.loc[quality["extractor"] != "", ["extractor", "weights_sha256"]].drop_duplicates()
    return [f"{name} ({digest[:12]})" for name, digest in used.itertuples(index=False)]


def show_published(comparison: pd.DataFrame) -> tuple[DisplayTable, list[str]]:
    """`published_comparison.csv` for display, and the reasons that its last column refers to, (a) first."""
    reasons = comparison["why_not"].unique().tolist()
    rows = []
    for row in comparison.to_dict("records"):
        form = {"sampling": ".1f", "image_quality": ".4f"}.get(row["table"], ".3f")
        form = {"function_evaluations": ".0f", "specificity": ".4f"}.get(row["metric"], form)
        data = row["training_set"] or row["cohort"]
        if row["table"] == "context":
            data = ", ".join(filter(None, (row["cohort"], row["training_set"])))
        published = format_spread(row["published_mean"], row["published_sd"], form)
        measured = format_spread(row["measured_mean"], row["measured_sd"], form)
        rows.append(
            [
                row["method"],
                _as_dimensions(data) + (f", {row['steps']} steps" if row["steps"] else ""),
                MEASURES[row["metric"]].title if row["metric"] in MEASURES else row["metric"].replace("_", " "),
                published if row["reported"] == "yes" else "not reported",
                format_number(row["published_change"], "+.3f"),
                row["arm"],
                measured + (" (MMD²)" if measured and row["measured_metric"] == "mmd_squared" else ""),
                format_number(row["measured_change"], "+.3f"),
                f"{row['comparable']} ({ascii_lowercase[reasons.index(row['why_not'])]})",
            ]
        )
    heads = ["method", "data", "measure", "published", "change", "here", "measured", "change", "comparable?"]
    return DisplayTable(heads, rows, [False, False, False, True, True, False, True, True, False]), reasons


def _as_dimensions(text: str) -> str:
    """The sizes in a text as they are printed: 128³ for 128^3, 512 × 512 × 16 for 512x512x16."""
    return re.sub(r"(?<=\d)x(?=\d)", " × ", text.replace("^3", "³"))


def show_roles(case_table: pd.DataFrame) -> DisplayTable:
    """Patients, cases and nodules of every role, and of every external test set."""
    groups = {role: cases.usable(cases.internal(case_table), role) for role in ROLES}
    for name in case_table["data_set"].unique():
        if name != INTERNAL:
            groups[f"test, external: {name}"] = cases.usable(case_table[case_table["data_set"] == name], TEST)
    rows = []
    for what, members in groups.items():
        counts = (members["patient_id"].nunique(), len(members), int(members["n_nodules"].sum()))
        rows.append([what, *map(str, counts)])
    return DisplayTable(["role", "patients", "cases", "nodules"], rows, [False, True, True, True])


def show_arms(arms: dict[str, dict]) -> DisplayTable:
    """The training set of every arm and the result of its leak guard, from the parsed `arm.json` files with their draws
    (see `read_arms`)."""
    rows = []
    for arm, content in arms.items():
        draws = content["draws"]
        shared_cases = [case for case in content["cases"] if case["trained_on"]]
        # Draws have the same size, except where a filter kept too few samples.
        trained_on = shared_cases + (draws[0]["cases"] if draws else [])
        sizes = sorted({len(shared_cases) + len(draw["cases"]) for draw in draws} or {len(shared_cases)})
        sources = Counter(case["source"] + (" again" if case["name"] != case["case_id"] else "") for case in trained_on)
        drawn = {case["source"] for draw in draws for case in draw["cases"]}
        everybody = shared_cases + [case for draw in draws for case in draw["cases"]]
        patients = {case["patient_id"] for case in everybody} - {"none"}
        proofs = [content["leak_guard"], *(draw["leak_guard"] for draw in draws)]
        shared = sorted({patient for proof in proofs for patient in proof["shared_patients"]})
        made_of = ", ".join(
            f"{count} {source}" + (f" (different ones in each of {len(draws)} replicates)" if source in drawn else "")
            for source, count in sources.items()
        )
        guard = f"SHARED: {', '.join(shared)}" if shared else "no test patients"
        rows.append(
            [arm, " to ".join(map(str, dict.fromkeys((sizes[0], sizes[-1])))), made_of, str(len(patients)), guard]
        )
    return DisplayTable(
        ["arm", "training cases", "from", "patients", "leak guard"], rows, [False, True, False, True, False]
    )


def show_filter(kept: pd.DataFrame) -> DisplayTable:
    """`sample_filter.csv` for display."""
    rows = [
        [
            row["arm"], row["replicate"] or "all", str(row["judged"]), f"{100 * row['found_mean']:.0f} %",
            f"{row['kept']} ({100 * row['share_kept']:.0f} %)", f"{row['taken']} of {row['wanted']}",
        ]
        for row in kept.to_dict("records")
    ]  # fmt: skip
    heads = ["arm", "replicate", "judged", "nodule voxels found, mean", "kept", "taken"]
    return DisplayTable(heads, rows, [False, False, *[True] * 4])


def show_timing(timing: pd.DataFrame) -> DisplayTable:
    """Time and memory by stage; `max_rss_mb` is in MiB, as Snakemake measures it."""
    stages = timing.groupby("stage", sort=False).agg(
        jobs=("job", "size"), seconds=("seconds", "sum"), longest=("seconds", "max"), memory=("max_rss_mb", "max"),
        device=("device", lambda devices: "; ".join(dict.fromkeys(devices))),
    )  # fmt: skip
    rows = [
        [
            stage,
            str(row.jobs),
            format_duration(row.seconds),
            format_duration(row.longest),
            format_number(row.memory, ".0f"),
            row.device,
        ]
        for stage, row in zip(stages.index, stages.itertuples(), strict=True)
    ]
    heads = ["stage", "jobs", "total time", "longest job", "peak memory, MiB", "device"]
    return DisplayTable(heads, rows, [False, *[True] * 4, False])


def interval_text(row: dict, kind: str = "ci") -> str:
    """The limits of an interval, from a row of `verdict.csv`."""
    low, high = row[f"{kind}_low"], row[f"{kind}_high"]
    return "" if pd.isna(low) else f"{bound(low)} to {bound(high)}"


def p_text(value: float, significance: float) -> str:
    """A p with enough digits to show on which side of the level it is."""
    return "" if pd.isna(value) else format_p(value, round(significance, 12)).removeprefix("= ")


def _detectable(row: dict) -> str:
    if pd.isna(row["detectable_difference"]):
        return ""
    return f"{row['detectable_difference']:.2g} ({row['detectable_low']:.2g} to {row['detectable_high']:.2g})"
