"""The verdict of a run: tables, figures, one self-contained page, and a manifest of its inputs."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from matplotlib.figure import Figure

from lungddpm.config.models import Config
from lungddpm.core import cases, drawing
from lungddpm.core.files import sha256_of, write_json, write_text
from lungddpm.core.progress import LOG, waiting
from lungddpm.core.text import plural
from lungddpm.evaluation.measures import deciding_measure, verdict_measures
from lungddpm.quality.feature_distances import MEDICALNET
from lungddpm.report import figures
from lungddpm.report.external import not_tested, show_external
from lungddpm.report.html import render, show_excluded
from lungddpm.report.manifest import arm_files, describe_run, draw_files, read_arms
from lungddpm.report.samples import DisplaySample, first_of_generators, samples_to_show, shared_sample
from lungddpm.report.sections import (
    extractors_of,
    generators_of,
    limits_of,
    outcome_of,
    show_arms,
    show_calibration,
    show_case_scores,
    show_checks,
    show_costs,
    show_description,
    show_detection,
    show_dose_response,
    show_fidelity,
    show_fidelity_strata,
    show_filter,
    show_ladder,
    show_measure_differences,
    show_measures,
    show_memorisation_and_diversity,
    show_published,
    show_quality,
    show_roles,
    show_run_spread,
    show_sensitivity,
    show_sets,
    show_strata,
    show_timing,
    show_unscored,
    show_verdict,
    source_note,
)
from lungddpm.report.viewer import viewer_values
from lungddpm.verdict.answer import doubted_arms
from lungddpm.verdict.convergence import DICE, LOSS
from lungddpm.verdict.statistics import MINIMUM_CASES, MINIMUM_RUN_DF, POWER
from lungddpm.verdict.tables import read_csv, write_tables


def run_report(config: Config, results: Path) -> None:
    """Compute the verdict of a run.

    Reads the metrics of all arms and replicates in the config, the cases, and the run's other results (image quality,
    samples, training history, arms, benchmarks; each may be missing). Writes `<results>/tables/`, `figures/`,
    `report.html` and `manifest.json`.

    Raises:
        InputError: metrics or `cases/cases.tsv` are missing or do not match.
    """
    case_table = cases.read_cases(results / "cases" / cases.CASES)
    with waiting("statistics and tables"):
        tables, written = write_tables(config, results)
    with waiting("figures"):
        shown = samples_to_show(config, results)
        drawn = draw_figures(config, results, tables, shown)
    written += [path for paths in drawn.values() for path in paths]
    arms, draws = read_arms(config, results), draw_files(config, results)
    composed = [*arm_files(config, results).values(), *(path for records in draws.values() for path in records)]
    manifest = describe_run(config, results, [*written, *composed])
    has_layouts = (results / "qc/index.html").exists()
    with waiting("the page"):
        page = render_report(config, case_table, tables, drawn, shown, arms, manifest, has_layouts)
    write_text(results / "report.html", page)
    manifest["sha256"]["report.html"] = sha256_of(results / "report.html")
    write_json(results / "manifest.json", manifest)
    LOG.info("report: %s", results / "report.html")


def draw_figures(
    config: Config, results: Path, tables: dict[str, pd.DataFrame], shown: list[DisplaySample]
) -> dict[str, list[Path]]:
    """Draw every figure that the run has data for, into `<results>/figures/`; SVG and PNG paths by figure name.

    Names: forest, forest_narrow, forest-<external test set>, froc-<external test set>, dose_response, real_cases,
    dice_by_arm, paired, runs, froc, image_quality, label_fidelity, quality_and_cost, montage-<generator>, side_by_side,
    training-<generator>, segmenter_validation, segmenter_training.
    """
    paths = {}
    # One by one, because saving frees a figure's memory: many generators make many figures.
    for name, figure in chain(
        _figures_of_tables(config, tables),
        _figures_of_samples(config, results, shown),
        _learning_curves(config, results, tables),
    ):
        paths[name] = [results / "figures" / f"{name}{suffix}" for suffix in (".svg", ".png")]
        drawing.save(figure, *paths[name])
    return paths


def _figures_of_tables(config: Config, tables: dict[str, pd.DataFrame]) -> Iterator[tuple[str, Figure]]:
    measure, prose = deciding_measure().column, deciding_measure().title
    titles = {measure.column: measure.title for measure in verdict_measures()}
    confidence = config.verdict.confidence
    yield "forest", figures.forest_plot(tables["verdict"], titles, confidence)
    yield "forest_narrow", figures.forest_plot(tables["verdict"], titles, confidence, narrow=True)
    yield "dice_by_arm", figures.case_plot(tables["cases"], measure, prose)
    yield "paired", figures.paired_plot(tables["cases"], measure, prose)
    yield "runs", figures.run_plot(tables["cases"], measure, prose)
    verdict = tables["verdict"][tables["verdict"]["metric"] == measure]
    if "dose_response_band" in tables:
        band = tables["dose_response_band"]
        yield "dose_response", figures.dose_response_plot(verdict, band[band["metric"] == measure], prose, confidence)
    if tables["verdict"]["real_cases"].nunique() > 1:
        yield "real_cases", figures.real_cases_plot(verdict, prose, confidence)
    if "external_verdict" in tables:
        for name, rows in tables["external_verdict"].groupby("data_set", sort=False):
            yield f"forest-{name}", figures.forest_plot(rows, titles, confidence)
        for name, rows in tables["external_froc_band"].groupby("data_set", sort=False):
            yield f"froc-{name}", figures.froc_plot(rows, confidence)
    if "froc_band" in tables:
        yield "froc", figures.froc_plot(tables["froc_band"], confidence)
    if "image_quality" in tables:
        yield "image_quality", figures.quality_bars(tables["image_quality"])
    if "label_fidelity_runs" in tables:
        yield "label_fidelity", figures.fidelity_plot(tables["label_fidelity_runs"], tables["label_fidelity"])
    if "quality_and_cost" in tables and tables["quality_and_cost"]["seconds_per_volume"].notna().any():
        yield "quality_and_cost", figures.cost_plot(tables["quality_and_cost"])


def _figures_of_samples(config: Config, results: Path, shown: list[DisplaySample]) -> Iterator[tuple[str, Figure]]:
    for one in first_of_generators(shown):
        sample, reference = one.sample, one.sample.reference
        if reference is not None:
            title = f"{one.generator}: sample {one.case_id}, reference {reference.case_id}"
            yield f"montage-{one.generator}", figures.montage(reference.ct, sample.layout, sample.ct, title)
    if shared := shared_sample(config, results, shown):
        yield "side_by_side", figures.side_by_side(shared.reference, shared.layout, shared.drawn)


def _learning_curves(config: Config, results: Path, tables: dict[str, pd.DataFrame]) -> Iterator[tuple[str, Figure]]:
    for trained in config.trained_generators():
        history = results / trained.model_folder / "history.csv"
        if history.exists():
            yield f"training-{trained.name}", figures.denoiser_curve(read_csv(history))
    for name, measure, title in (
        ("segmenter_validation", DICE, "Dice of validation patches"),
        ("segmenter_training", LOSS, "training loss"),
    ):
        if tables["training_curves"][measure].notna().any():
            yield name, figures.segmenter_curves(tables["training_curves"], measure, title)


def render_report(
    config: Config,
    case_table: pd.DataFrame,
    tables: dict[str, pd.DataFrame],
    drawn: dict[str, list[Path]],
    shown: list[DisplaySample],
    arms: dict[str, dict],
    manifest: dict[str, Any],
    layouts: bool,
) -> str:
    """The page as self-contained HTML: figures, slices and scripts are inlined, nothing is loaded from the network.

    Args:
        config: the run's config.
        case_table: all cases, excluded ones too.
        tables: from `write_tables`.
        drawn: SVG and PNG path by figure name.
        shown: samples for the viewer, the most important first.
        arms: from `read_arms`.
        manifest: from `describe_run`.
        layouts: whether layout pages exist to link to.
    """
    images = {
        name: "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
        for name, paths in drawn.items()
        for path in paths
        if path.suffix == ".png"
    }
    verdict, decisive = tables["verdict"], deciding_measure()
    compared = verdict[verdict["arm"] != verdict["baseline"]]
    extractors = extractors_of(tables["image_quality"]) if "image_quality" in tables else []
    confidence, significance = f"{100 * config.verdict.confidence:g} %", 1 - config.verdict.confidence
    return render(
        "report.html.jinja",
        generators=config.arms.generators,
        shared_patients=config.roles.allow_shared_patients,
        simulated=config.source.is_simulated,
        source=config.source.kind,
        source_note=source_note(config.source),
        checks=show_checks(tables["instrument"]),
        outcome=outcome_of(tables["instrument"]),
        doubted=doubted_arms(tables["instrument"], verdict, config),
        run_spread=show_run_spread(tables["run_spread"], significance),
        calibration=show_calibration(tables["calibration"]),
        decisive=decisive.title,
        supporting=[measure.title for measure in verdict_measures()[1:]],
        external=show_external(config, tables),
        n_external=len(config.external_tests),
        primary=config.primary_arms(),
        not_tested=not_tested(tables),
        answers=compared[compared["metric"] == decisive.column].to_dict("records"),
        supports=compared[compared["metric"] != decisive.column].to_dict("records"),
        controls=[arm.name for arm in config.arms.all() if arm.is_control(config.arms.controls)],
        images=images,
        montages=[(one.generator, images[f"montage-{one.generator}"], one.why) for one in first_of_generators(shown)],
        viewer=viewer_values(shown),
        numbers=[show_verdict(verdict, measure, confidence, significance) for measure in verdict_measures()],
        description=[show_description(verdict, measure, confidence, significance) for measure in verdict_measures()],
        cases_and_replicates=", ".join(
            (plural(verdict["n_cases"].max(), "test case"), plural(verdict["n_replicates"].max(), "replicate"))
        ),
        dose_response=(
            show_dose_response(tables["dose_response"], confidence, significance) if "dose_response" in tables else None
        ),
        measures=show_measures(tables["measures"]),
        measure_differences=show_measure_differences(tables["measures"]),
        unscored=show_unscored(tables["measures"], tables["cases"]),
        detection=show_detection(tables["detection"]),
        sensitivity=show_sensitivity(tables["froc_band"], tables["detection"], confidence),
        strata=show_strata(tables["detection_by_stratum"]),
        scores_by_case=show_case_scores(tables["cases"]),
        quality=show_quality(tables["image_quality"]) if "image_quality" in tables else None,
        quality_sets=show_sets(tables["image_quality"]) if "image_quality" in tables else None,
        quality_nearness=show_memorisation_and_diversity(tables["image_quality"])
        if "image_quality" in tables
        else None,
        costs=show_costs(tables["quality_and_cost"]) if "quality_and_cost" in tables else None,
        fidelity=show_fidelity(tables["label_fidelity"]) if "label_fidelity" in tables else None,
        fidelity_strata=(
            show_fidelity_strata(tables["label_fidelity_by_stratum"]) if "label_fidelity_by_stratum" in tables else None
        ),
        fidelity_notes=(
            tables["label_fidelity"].query("note != ''")[["generator", "note"]].to_dict("records")
            if "label_fidelity" in tables
            else []
        ),
        extractors=extractors,
        random_weights=any(not name.startswith(MEDICALNET) for name in extractors),
        ladder=show_ladder(tables["ladder"], confidence),
        compared=show_published(tables["published_comparison"].query("arm != ''")),
        published=show_published(tables["published_comparison"].query("arm == ''")),
        arms=show_arms(arms),
        kept=show_filter(tables["sample_filter"]) if "sample_filter" in tables else None,
        filter_limit=f"{100 * config.arms.filter.found:g} %",
        generators_in_use=generators_of(config),
        arm_cases={
            arm: [case["name"] for case in content["cases"] if case["trained_on"]]
            + [case["name"] for draw in content["draws"] for case in draw["cases"]]
            for arm, content in arms.items()
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
        changed_code=[
            f"{name} (from step {later['from_step']} on)"
            for name, code in manifest["training_code"].items()
            for later in code[1:]
        ],
    )
