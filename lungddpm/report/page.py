"""The verdict of a run: tables, figures, one self-contained page, and a manifest of what it was made from."""

from __future__ import annotations

import base64
import math
import platform
import subprocess
import textwrap
from collections import Counter
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pandas as pd
import yaml
from rich.console import Console
from rich.table import Table

import lungddpm
from lungddpm import generators
from lungddpm.config.models import Config
from lungddpm.core import cases, drawing
from lungddpm.core.arms import BASELINE
from lungddpm.core.files import read_json, sha256_of, write_json, write_text
from lungddpm.core.progress import LOG
from lungddpm.core.roles import ROLES
from lungddpm.evaluation.measures import MEASURES, Measure, deciding_measure, verdict_measures
from lungddpm.operations.doctor import versions
from lungddpm.quality.calibration import DIFFERENCE, SPREAD, calibration_summary
from lungddpm.quality.feature_distances import MEDICALNET
from lungddpm.quality.image_quality import (
    COPIES,
    LUNGS,
    SEAM,
    SEAM_RATIO,
    SYNTHETIC,
    WHOLE,
    list_samples,
    read_sample,
    reference_of,
)
from lungddpm.report import figures
from lungddpm.report.html import Shown, render, show_excluded
from lungddpm.report.viewer import ShownSample, viewer_values
from lungddpm.segmentation.nnunet import training_curve
from lungddpm.verdict.statistics import (
    MINIMUM_CASES,
    MINIMUM_RUN_DF,
    POWER,
    bound,
    caveats,
    count,
    format_p,
    minimum_cases,
    signed,
)
from lungddpm.verdict.tables import (
    SIZE_COLUMNS,
    missing_replicates,
    quality_files,
    read_csv,
    write_tables,
)


def run_report(config: Config, results: Path) -> None:
    """Reach the verdict of a run.

    Reads the metrics of all arms and replicates in the config, the cases, and what else the run left (image quality,
    samples, training history, arms, benchmarks; each may be missing). Writes `<results>/tables/`, `figures/`,
    `report.html` and `manifest.json`.

    Raises:
        InputError: metrics or `cases/cases.tsv` are missing or do not fit together.
    """
    case_table = cases.read_cases(results / "cases" / cases.CASES)
    tables, written = write_tables(config, results)
    shown = samples_to_show(config, results)
    drawn = draw_figures(config, results, tables, shown)
    written += [path for paths in drawn.values() for path in paths]
    composed = arm_files(config, results)
    arms = {arm: read_json(path) for arm, path in composed.items()}
    manifest = describe_run(config, results, [*written, *composed.values()])
    write_text(
        results / "report.html",
        render_report(config, case_table, tables, drawn, shown, arms, manifest, (results / "qc/index.html").exists()),
    )
    manifest["sha256"]["report.html"] = sha256_of(results / "report.html")
    write_json(results / "manifest.json", manifest)
    LOG.info("report: %s", results / "report.html")


def verdict_table_text(results: Path) -> str:
    """The verdict as plain text for a terminal: notes, the deciding measure of each arm in a table and in
    sentences, and where the report lies.

    Raises:
        InputError: the run has no verdict yet.
    """
    verdict, notes = read_csv(results / "tables" / "verdict.csv"), results / "tables" / "notes.csv"
    notes = read_csv(notes).to_dict("records") if notes.exists() else []
    measure = deciding_measure()
    rows = verdict[verdict["metric"] == measure.column]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="")
    for head in ("arm", measure.title, "difference", "CI", "p", "verdict"):
        table.add_column(head, justify="left" if head in ("arm", "verdict") else "right", no_wrap=True)
    for row in rows.to_dict("records"):
        table.add_row(
            row["arm"], _number(row["mean"], ".3f"), _number(row["difference"], "+.3f"), _interval(row),
            _p(row["p_holm"], 1 - row.get("confidence", 0.95)), row["verdict"],
        )  # fmt: skip
    console = Console(file=StringIO(), width=100, no_color=True, highlight=False)
    for note in notes:
        mark = "! " if note["warning"] else ""
        lines = textwrap.fill(note["note"], 98, initial_indent=mark, subsequent_indent=" " * len(mark))
        console.print(lines, markup=False)
    if len(notes):
        console.print()
    console.print(table)
    console.print()
    for text in rows["sentence"]:
        console.print(textwrap.fill(text, 98, initial_indent="- ", subsequent_indent="  "), markup=False)
    console.print(f"\nReport: {results / 'report.html'}", markup=False, soft_wrap=True)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def draw_figures(
    config: Config, results: Path, tables: dict[str, pd.DataFrame], shown: list[ShownSample]
) -> dict[str, list[Path]]:
    """Draw every figure that the run has data for, into `<results>/figures/`; SVG and PNG paths by figure name.

    Names: forest, forest_narrow, dose_response, dice_by_arm, paired, runs, froc, image_quality, montage-<generator>,
    training, segmenter_training.
    """
    folder = results / "figures"
    measure, prose = deciding_measure().column, deciding_measure().title
    titles = {measure.column: measure.title for measure in verdict_measures()}
    drawn = {
        "forest": figures.forest_plot(tables["verdict"], titles, config.verdict.confidence),
        "forest_narrow": figures.forest_plot(tables["verdict"], titles, config.verdict.confidence, narrow=True),
        "dice_by_arm": figures.case_plot(tables["cases"], measure, prose),
        "paired": figures.paired_plot(tables["cases"], measure, prose),
        "runs": figures.run_plot(tables["cases"], measure, prose),
    }
    if "dose_response_band" in tables:
        verdict, band = (
            table[table["metric"] == measure] for table in (tables["verdict"], tables["dose_response_band"])
        )
        drawn["dose_response"] = figures.dose_response_plot(verdict, band, prose, config.verdict.confidence)
    if "froc_band" in tables:
        drawn["froc"] = figures.froc_plot(tables["froc_band"], BASELINE, config.verdict.confidence)
    if "image_quality" in tables:
        drawn["image_quality"] = figures.quality_bars(tables["image_quality"])
    for one in first_samples(shown):
        sample = one.sample
        title = f"{one.generator}: sample {one.case_id}, made from {sample.reference_id}"
        drawn[f"montage-{one.generator}"] = figures.montage(sample.reference, sample.layout, sample.ct, title)
    for trained in config.trained_generators():
        history = results / trained.model_folder / "history.csv"
        if history.exists():
            drawn[f"training-{trained.name}"] = figures.training_curve(read_csv(history))
    if len(curves := segmenter_training(config, results)):
        drawn["segmenter_training"] = figures.segmenter_curves(curves)
    paths = {name: [folder / f"{name}{suffix}" for suffix in (".svg", ".png")] for name in drawn}
    for name, figure in drawn.items():
        drawing.save(figure, *paths[name])
    return paths


def segmenter_training(config: Config, results: Path) -> pd.DataFrame:
    """Training loss of every replicate whose log is there: arm, replicate, step, loss."""
    rows = []
    for arm in config.arms.names():
        for fold in config.segmentation.folds:
            for seed in config.segmentation.seeds:
                curve = training_curve(results / "arms" / arm, fold, seed, config.segmentation.save_every)
                rows += [(arm, config.segmentation.replicate_name(fold, seed), step, loss) for step, loss in curve]
    return pd.DataFrame(rows, columns=["arm", "replicate", "step", "loss"])


def samples_to_show(config: Config, results: Path) -> list[ShownSample]:
    """Of every generator a typical sample, then of every generator one of its worst."""
    ranked = {generator: ranked_samples(results, generator) for generator in config.arms.largest_doses()}
    several = {name: folders for name, folders in ranked.items() if len(folders) > 1}
    chosen = [(name, folders[0], "") for name, folders in ranked.items() if len(folders) == 1]
    chosen += [(name, folders[len(folders) // 2], "median error in the lungs") for name, folders in several.items()]
    chosen += [(name, folders[-1], "largest error in the lungs") for name, folders in several.items()]
    return [
        ShownSample(generator, folder.path.name, why, read_sample(folder, results / "cases" / cases.CASES))
        for generator, folder, why in chosen
    ]


def first_samples(shown: list[ShownSample]) -> list[ShownSample]:
    """The first sample of each generator, of those that have a reference to stand beside."""
    first = {}
    for one in shown:
        if one.sample.reference is not None:
            first.setdefault(one.generator, one)
    return list(first.values())


def ranked_samples(results: Path, generator: str) -> list[cases.CaseFolder]:
    """Folders of the samples that can be judged by eye beside a reference, by squared error in the lungs: those with
    the reference's own nodules, if any has, else those with a nodule.

    Without measured image quality only the first sample with a nodule.
    """
    samples = list_samples(sorted((results / "synthetic" / generator).glob("samples-*.tsv")))
    folders = samples[samples["n_nodules"] > 0].set_index("case_id")["folder"]
    folders = folders[[reference_of(folder) is not None for folder in folders]]
    if folders.empty:
        return []
    if path := quality_files(results, [generator]).get(generator):
        quality = read_csv(path)
        mse = quality[(quality["image"] == SYNTHETIC) & (quality["metric"] == "mse")]
        mse = mse[mse["case_id"].isin(folders.index)].pivot(index="case_id", columns="region", values="value")
        # Beside a reference whose nodules are elsewhere, a sample says little: those with its own layout come first.
        own = mse[mse["nodules"].notna()]
        if len(ranked := (mse if own.empty else own).sort_values("lungs").index):
            return folders[ranked].tolist()
    return folders.iloc[:1].tolist()


def arm_files(config: Config, results: Path) -> dict[str, Path]:
    """The `arm.json` of every arm that has one."""
    paths = {arm: results / "arms" / arm / "arm.json" for arm in config.arms.names()}
    return {arm: path for arm, path in paths.items() if path.exists()}


def describe_run(config: Config, results: Path, files: list[Path]) -> dict[str, Any]:
    """What the verdict was made with and from; nothing in it names a machine, a user or an absolute path.

    Args:
        config: the run's config.
        results: its folder.
        files: the files to hash, in that folder.

    Returns:
        JSON-like: written (UTC), git_commit, platform, versions, config, sha256 by relative path.
    """
    return {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": _git_commit(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
        "config": config.without_folders().model_dump(mode="json"),
        "sha256": {path.relative_to(results).as_posix(): sha256_of(path) for path in files},
    }


def describe_generator(name: str, config: Config) -> str:
    """What a generator is and whom to cite for it, as sentences."""
    if name in config.arms.external:
        return "Synthetic CT that another system made. Cite that system."
    declared = generators.plugin(name)
    return f"{declared.title}. {declared.citation}"


def render_report(
    config: Config,
    case_table: pd.DataFrame,
    tables: dict[str, pd.DataFrame],
    drawn: dict[str, list[Path]],
    shown: list[ShownSample],
    arms: dict[str, dict],
    manifest: dict[str, Any],
    layouts: bool,
) -> str:
    """The page as HTML, complete in itself: figures, slices and scripts inlined, no network.

    Args:
        config: the run's config.
        case_table: all cases, excluded ones too.
        tables: as of `write_tables`.
        drawn: SVG and PNG path by figure name.
        shown: samples to look through, the most important first.
        arms: parsed `arm.json` by arm.
        manifest: as of `describe_run`.
        layouts: whether the pages of the layouts are there to point to.
    """
    images = {
        name: "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
        for name, paths in drawn.items()
        for path in paths
        if path.suffix == ".png"
    }
    verdict, decisive = tables["verdict"], deciding_measure()
    extractors = extractors_of(tables["image_quality"]) if "image_quality" in tables else []
    confidence, significance = f"{100 * config.verdict.confidence:g} %", 1 - config.verdict.confidence
    return render(
        "report.html.jinja",
        generators=config.arms.generators,
        shared_patients=config.roles.allow_shared_patients,
        phantom=config.source.kind == "phantom",
        warnings=tables["notes"].query("warning")["note"].tolist(),
        notes=tables["notes"].query("not warning")["note"].tolist(),
        run_spread=show_run_spread(tables["run_spread"], significance),
        calibration=show_calibration(tables["calibration"]),
        calibration_summary=calibration_summary(tables["calibration"]),
        decisive=decisive.title,
        supporting=[measure.title for measure in verdict_measures()[1:]],
        answers=verdict[(verdict["metric"] == decisive.column) & (verdict["arm"] != BASELINE)].to_dict("records"),
        supports=verdict[(verdict["metric"] != decisive.column) & (verdict["arm"] != BASELINE)].to_dict("records"),
        controls=[arm.name for arm in config.arms.all() if arm.is_control(config.arms.generators)],
        images=images,
        montages=[(one.generator, images[f"montage-{one.generator}"], one.why) for one in first_samples(shown)],
        viewer=viewer_values(shown),
        numbers=[show_verdict(verdict, measure, confidence, significance) for measure in verdict_measures()],
        description=[show_description(verdict, measure, confidence, significance) for measure in verdict_measures()],
        cases_and_replicates=", ".join(
            (count(verdict["n_cases"].max(), "test case"), count(verdict["n_replicates"].max(), "replicate"))
        ),
        dose_response=(
            show_dose_response(tables["dose_response"], confidence, significance) if "dose_response" in tables else None
        ),
        measures=show_measures(tables["measures"]),
        measure_differences=show_measure_differences(tables["measures"]),
        unscored=show_unscored(tables["measures"], tables["cases"]),
        detection=show_detection(tables["detection"]),
        scores_by_case=show_case_scores(tables["cases"]),
        quality=show_quality(tables["image_quality"]) if "image_quality" in tables else None,
        quality_sets=show_sets(tables["image_quality"]) if "image_quality" in tables else None,
        extractors=extractors,
        random_weights=any(not name.startswith(MEDICALNET) for name in extractors),
        compared=show_published(tables["published_comparison"].query("arm != ''")),
        published=show_published(tables["published_comparison"].query("arm == ''")),
        arms=show_arms(arms),
        generator_notes={name: describe_generator(name, config) for name in config.arms.largest_doses()},
        arm_cases={
            arm: [case["name"] for case in content["cases"] if case["trained_on"]] for arm, content in arms.items()
        },
        roles=show_roles(case_table),
        excluded=show_excluded(case_table),
        layouts=layouts,
        limits=limits_of(config, tables),
        timing=show_timing(tables["timing"]) if "timing" in tables else None,
        confidence=confidence,
        significance=f"{significance:g}",
        families=verdict[verdict["n_compared"] > 1].groupby("family", sort=False)["n_compared"].max().to_dict(),
        minimum_cases=MINIMUM_CASES,
        minimum_run_df=MINIMUM_RUN_DF,
        power=f"{100 * POWER:g} %",
        config_text=yaml.safe_dump(manifest["config"], sort_keys=False, allow_unicode=True),
        manifest=manifest,
    )


SHARED_LUCK = (
    "Trained once, sampled once: all replicates of an arm see the same synthetic CT, from one training of its "
    "generator. That luck is not covered. In simulated benchmarks of three arms where it is half of all luck of "
    "training, false claims rise from 5 % to 29 % (3 replicates, 40 cases) or 54 % (5 replicates, 249 cases)."
)


def limits_of(config: Config, tables: dict[str, pd.DataFrame]) -> list[str]:
    """What this run cannot tell, as sentences."""
    verdict, cases_scored = tables["verdict"], tables["cases"]
    n_cases, n_replicates = int(verdict["n_cases"].max()), int(verdict["n_replicates"].max())
    limits = [
        f"Not evaluated, and left out: {arm}, {', '.join(replicates)}."
        for arm, replicates in missing_replicates(cases_scored, config).items()
    ]
    run_df, n_independent = int(verdict["run_df"].max()), int(verdict["n_independent"].max())
    needed = minimum_cases(max(int(verdict["n_compared"].max()), 1), config.verdict.confidence)
    limits += caveats(n_cases, n_independent, run_df, needed)
    if n_independent < n_replicates:
        limits.append(
            f"{n_replicates} replicates in {count(n_independent, 'fold')}: seeds of a fold share its luck, so they are "
            "averaged, and folds are counted."
        )
    elif len(config.segmentation.folds) == 1:
        limits.append("All replicates share one fold: the luck of that split of the training cases is not covered.")
    if config.arms.largest_doses():
        limits.append(SHARED_LUCK)
    if (n_patients := cases_scored["patient_id"].nunique()) < (n_scans := cases_scored["case_id"].nunique()):
        limits.append(
            f"{n_scans} test cases come from {n_patients} patients, but count as if each were a patient of its own."
        )
    if n_empty := cases_scored.loc[cases_scored["n_lesions"] == 0, "case_id"].nunique():
        limits.append(
            f"Test cases without a nodule: {n_empty}. They do not count towards Dice and sensitivity; "
            "what was wrongly marked in them is under “Lesions found”."
        )
    x, y, z = config.grid.size
    limits.append(f"All CT was resampled to {x} x {y} x {z} voxels: nodules of a voxel or two can vanish or merge.")
    return limits


def show_verdict(verdict: pd.DataFrame, measure: Measure, confidence: str, significance: float) -> Shown:
    """The rows of one measure in `verdict.csv` for reading."""
    rows = [
        [
            row["arm"], _spread(row["mean"], row["sd"], ".3f"), _number(row["difference"], "+.3f"), _interval(row),
            _number(row["relative_percent"], "+.1f"),
            _p(row["p"], significance), _p(row["p_holm"], significance),
            _detectable(row), row["verdict"],
        ]
        for row in verdict[verdict["metric"] == measure.column].to_dict("records")
    ]  # fmt: skip
    heads = ["arm", f"{measure.title} ± sd", "difference", f"{confidence} CI", "in %", "p", "p, Holm", "detectable",
             "verdict"]  # fmt: skip
    return Shown(heads, rows, [False, *[True] * 7, False])


def show_description(verdict: pd.DataFrame, measure: Measure, confidence: str, significance: float) -> Shown:
    """What describes the comparisons of one measure without deciding them."""
    rows = [
        [
            row["arm"], _number(row["difference"], "+.3f"), _interval(row, "bootstrap"),
            _p(row["p_wilcoxon"], significance),
            f"{row['wins']} / {row['ties']} / {row['losses']}", _number(row["standard_error"], ".4f"),
            _number(row["df"], ".1f"),
        ]
        for row in verdict[(verdict["metric"] == measure.column) & verdict["difference"].notna()].to_dict("records")
    ]  # fmt: skip
    heads = ["arm", f"difference, {measure.title}", f"{confidence} CI, bootstrap", "p, Wilcoxon",
             "wins / ties / losses", "standard error", "df"]  # fmt: skip
    return Shown(heads, rows, [False, *[True] * 6])


def show_calibration(calibration: pd.DataFrame) -> Shown:
    """`calibration.csv` for reading."""
    names = {DIFFERENCE: ("mean difference, HU", "+.1f"), SPREAD: ("spread of HU, ratio of sd", ".3f")}
    rows = []
    for row in calibration.to_dict("records"):
        name, form = names[row["measure"]]
        limits = [f"{row[key]:g}".replace("-", "−") for key in ("limit_low", "limit_high")]
        rows.append(
            [
                row["generator"], row["region"], name, str(row["n_samples"]), _spread(row["mean"], row["sd"], form),
                "" if pd.isna(row["limit_low"]) else " to ".join(limits), row["status"],
            ]
        )  # fmt: skip
    heads = ["generator", "region", "measure", "samples", "mean ± sd", "limits of the mean", "check"]
    return Shown(heads, rows, [False, False, False, True, True, True, False])


def show_run_spread(spread: pd.DataFrame, significance: float) -> Shown:
    """`run_spread.csv` for reading."""
    rows = [
        [
            row["arm"], str(row["n_replicates"]), _number(row["mean"], ".3f"), _number(row["lowest"], ".3f"),
            _number(row["highest"], ".3f"), _number(row["range"], ".3f"), _number(row["sd"], ".3f"),
            _p(row["p"], significance),
        ]
        for row in spread.to_dict("records")
    ]  # fmt: skip
    mean = f"mean {deciding_measure().title}"
    heads = ["arm", "runs", mean, "lowest", "highest", "range", "sd", "p"]
    return Shown(heads, rows, [False, *[True] * 7])


def show_dose_response(lines: pd.DataFrame, confidence: str, significance: float) -> Shown:
    """`dose_response.csv` for reading."""
    rows = [
        [
            row["generator"], MEASURES[row["metric"]].title, str(row["n_doses"]), _number(row["slope"], "+.3f"),
            _interval(row), _p(row["p"], significance),
        ]
        for row in lines.to_dict("records")
    ]  # fmt: skip
    heads = ["generator", "measure", "doses", "slope", f"{confidence} CI", "p, uncorrected"]
    return Shown(heads, rows, [False, False, True, True, True, True])


def show_measures(summary: pd.DataFrame) -> Shown:
    """`measures.csv` for reading: one row per arm, one column per measure; in brackets the scored cases where they are
    fewer than for another measure."""
    rows = []
    for arm, of_arm in summary.groupby("arm", sort=False):
        values, n_cases = of_arm.set_index("metric"), int(of_arm["n_cases"].max())
        cells = []
        for column, measure in MEASURES.items():
            value = values.loc[column]
            fewer = f" (n = {value['n_cases']})" if value["n_cases"] < n_cases else ""
            cells.append(_spread(value["mean"], value["sd"], measure.form) + fewer)
        rows.append([arm, str(n_cases), *cells])
    heads = ["arm", "cases", *(measure.head for measure in MEASURES.values())]
    return Shown(heads, rows, [False, *[True] * (1 + len(MEASURES))])


def show_measure_differences(summary: pd.DataFrame) -> Shown:
    """Differences to `real` in `measures.csv`, of the measures that are better in one direction."""
    directed = {column: measure for column, measure in MEASURES.items() if measure.better != "near 0"}
    rows = [
        [
            arm,
            *(
                _number(value, f"+{measure.form.removeprefix('+')}")
                for measure, value in zip(
                    directed.values(), of_arm.set_index("metric").loc[[*directed], "difference"], strict=True
                )
            ),
        ]
        for arm, of_arm in summary[summary["arm"] != BASELINE].groupby("arm", sort=False)
    ]
    return Shown(["arm", *(measure.head for measure in directed.values())], rows, [False, *[True] * len(directed)])


def show_unscored(summary: pd.DataFrame, cases_scored: pd.DataFrame) -> Shown | None:
    """Predictions without a value of a measure, as nothing was predicted; None where there are none."""
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
    heads = ["arm", "measure", "predictions scored", "cases scored in a replicate at least"]
    return Shown(heads, rows, [False, False, True, True]) if rows else None


def show_detection(detection: pd.DataFrame) -> Shown:
    """`detection.csv` for reading."""
    heads = ["arm", "found", *[f"found, {size}" for size in SIZE_COLUMNS], "false positives a scan", "CPM",
             "scans without nodule", "false positives there, mm³"]  # fmt: skip
    rows = []
    for row in detection.to_dict("records"):
        found = [
            f"{row[f'found_percent{size}']:.0f} % of {row[f'n_lesions{size}']}" if row[f"n_lesions{size}"] else ""
            for size in ("", *(f"_{column}" for column in SIZE_COLUMNS.values()))
        ]
        rows.append(
            [
                row["arm"], *found, _number(row["false_positives_per_scan"], ".2f"), _number(row["cpm"], ".3f"),
                str(row["n_empty_cases"]), _number(row["empty_false_positive_mm3"], ".0f"),
            ]
        )  # fmt: skip
    return Shown(heads, rows, [False, *[True] * 8])


def show_case_scores(cases_scored: pd.DataFrame) -> Shown:
    """The deciding measure of every case and arm, mean over replicates."""
    measure = deciding_measure()
    wide = cases_scored.pivot_table(index="case_id", columns="arm", values=measure.column, sort=False, dropna=False)
    wide = wide[list(dict.fromkeys(cases_scored["arm"]))]
    rows = [
        [str(case), *(_number(value, measure.form) for value in scores)]
        for case, scores in zip(wide.index, wide.to_numpy(), strict=True)
    ]
    return Shown(["case", *wide.columns], rows, [False, *[True] * wide.shape[1]])


def show_quality(quality: pd.DataFrame) -> Shown:
    """What compares voxels in `image_quality.csv`, for reading: one row a generator, image and region; copies of the
    references are left out, as nothing differs in them."""
    columns = {"mse": ("MSE × 1000", 1000, ".2f"), "psnr_db": ("PSNR, dB", 1, ".1f"), "ssim": ("SSIM", 1, ".3f"),
               "ms_ssim": ("MS-SSIM", 1, ".3f"), "mean_difference_hu": ("mean difference, HU", 1, "+.0f")}  # fmt: skip
    rows, by_voxel = [], quality[quality["metric"].isin(columns) & (quality["image"] != COPIES)]
    for (generator, image, region), group in by_voxel.groupby(["generator", "image", "region"], sort=False):
        values = group.set_index("metric").reindex(columns)
        cells = [
            _spread(factor * values.loc[metric, "mean"], factor * values.loc[metric, "sd"], form)
            for metric, (_, factor, form) in columns.items()
        ]
        rows.append([generator, image, region, str(int(values["n"].max())), *cells])
    heads = ["generator", "image", "region", "samples", *(name for name, _, _ in columns.values())]
    return Shown(heads, rows, [False, False, False, *[True] * 6])


def show_sets(quality: pd.DataFrame) -> Shown:
    """The rest of `image_quality.csv`, for reading: one row a generator and image, samples taken together."""
    columns = {
        ("fid", WHOLE): ("FID, whole volume", ".3g"), ("fid", LUNGS): ("FID, lungs", ".3g"),
        ("mmd_squared", WHOLE): ("MMD², whole volume", "+.3f"), ("mmd_squared", LUNGS): ("MMD², lungs", "+.3f"),
        (SEAM_RATIO, SEAM): ("step at the lungs' border", ".2f"),
        ("nearest_training_ratio", LUNGS): ("distance to training case", ".2f"),
        ("n_nearer_than_any_real", LUNGS): ("nearer than any real", ".0f"),
        ("pairwise_ms_ssim", LUNGS): ("MS-SSIM within a layout, lungs", ".3f"),
    }  # fmt: skip
    rows = []
    for (generator, image), group in quality.groupby(["generator", "image"], sort=False):
        values = group.set_index(["metric", "region"])["mean"].reindex(list(columns))
        cells = [_number(value, form) for value, (_, form) in zip(values, columns.values(), strict=True)]
        rows.append([generator, image, *cells])
    heads = ["generator", "images", *(head for head, _ in columns.values())]
    return Shown(heads, rows, [False, False, *[True] * len(columns)])


def extractors_of(quality: pd.DataFrame) -> list[str]:
    """The feature networks behind FID and MMD, each with the beginning of its weights' SHA-256."""
    used = quality.loc[quality["extractor"] != "", ["extractor", "weights_sha256"]].drop_duplicates()
    return [f"{name} ({digest[:12]})" for name, digest in used.itertuples(index=False)]


def show_published(comparison: pd.DataFrame) -> tuple[Shown, list[str]]:
    """`published_comparison.csv` for reading, and the reasons to which its last column points, (a) first."""
    reasons = comparison["why_not"].unique().tolist()
    rows = []
    for row in comparison.to_dict("records"):
        form = {"sampling": ".1f", "image_quality": ".4f"}.get(row["table"], ".3f")
        measured = _spread(row["measured_mean"], row["measured_sd"], form)
        rows.append(
            [
                row["method"],
                row["training_set"] or row["cohort"],
                MEASURES[row["metric"]].title if row["metric"] in MEASURES else row["metric"].replace("_", " "),
                _spread(row["published_mean"], row["published_sd"], form),
                _number(row["published_change"], "+.3f"),
                row["arm"],
                measured + (" (MMD²)" if measured and row["measured_metric"] == "mmd_squared" else ""),
                _number(row["measured_change"], "+.3f"),
                f"{row['comparable']} ({ascii_lowercase[reasons.index(row['why_not'])]})",
            ]
        )
    heads = ["method", "data", "measure", "published", "change", "here", "measured", "change", "comparable?"]
    return Shown(heads, rows, [False, False, False, True, True, False, True, True, False]), reasons


def show_roles(case_table: pd.DataFrame) -> Shown:
    """Patients, cases and nodules of every role."""
    rows = []
    for role in ROLES:
        members = cases.usable(case_table, role)
        counts = (members["patient_id"].nunique(), len(members), int(members["n_nodules"].sum()))
        rows.append([role, *map(str, counts)])
    return Shown(["role", "patients", "cases", "nodules"], rows, [False, True, True, True])


def show_arms(arms: dict[str, dict]) -> Shown:
    """What every arm is trained on, and what its leak guard found; from the parsed `arm.json` files."""
    rows = []
    for arm, content in arms.items():
        trained_on = [case for case in content["cases"] if case["trained_on"]]
        sources = Counter(case["source"] + (" again" if case["name"] != case["case_id"] else "") for case in trained_on)
        patients = {case["patient_id"] for case in trained_on} - {"none"}
        shared = content["leak_guard"]["shared_patients"]
        made_of = ", ".join(f"{count} {source}" for source, count in sources.items())
        guard = f"SHARED: {', '.join(shared)}" if shared else "no test patient in it"
        rows.append([arm, str(len(trained_on)), made_of, str(len(patients)), guard])
    return Shown(["arm", "training cases", "from", "patients", "leak guard"], rows, [False, True, False, True, False])


def show_timing(timing: pd.DataFrame) -> Shown:
    """Time and memory by stage."""
    stages = timing.groupby("stage", sort=False).agg(
        jobs=("job", "size"), seconds=("seconds", "sum"), longest=("seconds", "max"), memory=("max_rss_mb", "max"),
        device=("device", lambda told: "; ".join(dict.fromkeys(told))),
    )  # fmt: skip
    rows = [
        [stage, str(row.jobs), _duration(row.seconds), _duration(row.longest), _number(row.memory, ".0f"), row.device]
        for stage, row in zip(stages.index, stages.itertuples(), strict=True)
    ]
    heads = ["stage", "jobs", "time of all", "longest job", "peak memory, MB", "device"]
    return Shown(heads, rows, [False, *[True] * 4, False])


def _number(value: float, form: str) -> str:
    if pd.isna(value):
        return ""
    if math.isinf(value):
        return "∞"
    return signed(value, int(form[2])) if form.startswith("+") else format(value, form).replace("-", "−")


def _spread(mean: float, sd: float, form: str) -> str:
    unsigned = form.removeprefix("+")
    return _number(mean, form) + ("" if pd.isna(sd) else f" ± {_number(sd, unsigned)}")


def _interval(row: dict, kind: str = "ci") -> str:
    low, high = row[f"{kind}_low"], row[f"{kind}_high"]
    return "" if pd.isna(low) else f"{bound(low)} to {bound(high)}"


def _p(value: float, significance: float) -> str:
    return "" if pd.isna(value) else format_p(value, round(significance, 12)).removeprefix("= ")


def _detectable(row: dict) -> str:
    if pd.isna(row["detectable_difference"]):
        return ""
    return f"{row['detectable_difference']:.2g} ({row['detectable_low']:.2g} to {row['detectable_high']:.2g})"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def _git_commit() -> str | None:
    """The commit of the code that runs, marked where it has been changed since; None outside a git checkout."""

    def git(*arguments: str) -> subprocess.CompletedProcess:
        folder = str(Path(lungddpm.__file__).parent)
        command = ["git", "-C", folder, *arguments]
        return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)

    try:
        # An environment inside somebody's repository is not a checkout of ours.
        if git("ls-files", "--error-unmatch", "__init__.py").returncode:
            return None
        commit = git("rev-parse", "HEAD").stdout.strip()
        return f"{commit} with changes" if git("status", "--porcelain", "--", ".").stdout else commit
    except FileNotFoundError:
        return None
