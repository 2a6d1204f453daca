"""The tables of the verdict, from the files that the other rooms wrote to a results folder."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd

from lungddpm.config.models import Config
from lungddpm.core.arms import BASELINE, Arm, is_baseline
from lungddpm.core.cases import CASES, internal, read_cases, usable
from lungddpm.core.errors import InputError
from lungddpm.core.files import seed_from, write_table, write_text
from lungddpm.core.progress import LOG
from lungddpm.core.roles import DISCOVERY, INTERNAL, REFERENCE, TEST
from lungddpm.evaluation.froc import froc_tables
from lungddpm.evaluation.lesions import SIZE_COLUMNS, TEXTURES, texture_class
from lungddpm.evaluation.measures import MEASURES, deciding_measure, verdict_measures
from lungddpm.evaluation.segmentation import EVALUATION, check_unchanged, read_evaluation
from lungddpm.quality import image_quality, label_fidelity
from lungddpm.quality.calibration import calibration_table
from lungddpm.verdict.answer import answer_row
from lungddpm.verdict.convergence import convergence_table
from lungddpm.verdict.cost import cost_table
from lungddpm.verdict.design import COMPONENT_COLUMNS, components_of
from lungddpm.verdict.families import (
    PRIMARY,
    external_family,
    family_of,
    gates_of,
    timed_costs,
)
from lungddpm.verdict.instrument import COLUMNS, Missing, external_instrument_table, instrument_table
from lungddpm.verdict.ladder import ladder_table, published_generators
from lungddpm.verdict.published import published_comparison
from lungddpm.verdict.records import (
    drawing_costs,
    filter_table,
    quality_files,
    quality_table,
    seconds_per_volume,
    timing_table,
    training_curves,
)
from lungddpm.verdict.run_spread import run_spread_table
from lungddpm.verdict.statistics import Scores, compare_arms, dose_response, sentence

NOT_TRUSTED = "not trusted"
"""Verdict instead of "better" or "worse" in a run with copied replicates."""
VERDICT_COLUMNS = [
    "arm", "real_cases", "baseline", "family", "metric", "n_cases", "n_replicates", "n_independent", "mean", "sd",
    "baseline_mean", "difference", "relative_percent", "ci_low", "ci_high", "p", "p_holm", "p_gate",
    "n_compared", "standard_error", "df", "run_df", "detectable_difference", "detectable_low", "detectable_high",
    "bootstrap_low", "bootstrap_high", "p_wilcoxon", "wins", "ties", "losses", "confidence", "verdict", "sentence",
]  # fmt: skip

STRATA_COLUMNS = ["arm", "texture", "size", "n_lesions", "found_percent"]


def evaluated_replicates(results: Path, config: Config) -> dict[str, list[str]]:
    """Replicates that have metrics, by arm; a warning names those without.

    Raises:
        InputError: the real cases alone have none, so there is nothing to compare with.
    """
    found = {}
    for arm in config.arms.names():
        present = {
            replicate: (results / "segmentation" / arm / replicate / "metrics.csv").exists()
            for replicate in config.segmentation.replicates()
        }
        found[arm] = [replicate for replicate, there in present.items() if there]
        if missing := [replicate for replicate, there in present.items() if not there]:
            LOG.warning("%s has no metrics of %s: the verdict leaves them out", arm, ", ".join(missing))
    baselines = [name for name in found if is_baseline(name)]
    if not any(found[name] for name in baselines):
        raise InputError(
            results / "segmentation" / baselines[0], "has no metrics.csv", "Evaluate it first (lungddpm evaluate)."
        )
    return found


def gather(results: Path, replicates: dict[str, list[str]], name: str) -> pd.DataFrame:
    """One table of all arms and replicates: `<results>/segmentation/<arm>/<replicate>/<name>`, with both as columns.

    Args:
        results: of the run.
        replicates: by arm.
        name: of the file.

    Raises:
        InputError: a file is missing, is not a table, or was changed after `lungddpm evaluate` wrote it.
    """
    tables = []
    for arm, names in replicates.items():
        for replicate in names:
            path = results / "segmentation" / arm / replicate / name
            table = read_csv(path)
            check_unchanged(path)
            table.insert(0, "arm", arm)
            table.insert(1, "replicate", replicate)
            tables.append(table)
    return pd.concat(tables, ignore_index=True)


def read_csv(path: Path) -> pd.DataFrame:
    """Read a comma-separated table; identifiers stay text.

    Raises:
        InputError: missing, or not a table.
    """
    identifiers = {name: str for name in ("case_id", "patient_id", "reference", "lesions")}
    try:
        return pd.read_csv(path, dtype=identifiers)
    except FileNotFoundError:
        raise InputError(path, "does not exist", "Run the stage that writes it first (see lungddpm --help).") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise InputError(path, f"is not a table ({error})", "Delete it and run again.") from None


def scores_of(cases: pd.DataFrame, config: Config, measure: str) -> Scores:
    """One measure of all arms and replicates of the config; see `collect_scores`."""
    arms = config.arms.all()
    scores = collect_scores(cases, config.arms.names(), folds_of(config), measure)
    return replace(scores, baselines=tuple(arms.index(arm.baseline) for arm in arms))


def folds_of(config: Config) -> dict[str, int]:
    """The fold of each replicate, by its name."""
    segmentation = config.segmentation
    return {segmentation.replicate_name(fold, seed): fold for fold in segmentation.folds for seed in segmentation.seeds}


def collect_scores(cases: pd.DataFrame, arms: Sequence[str], folds: Mapping[str, int], measure: str) -> Scores:
    """One measure of these arms and replicates; cases in the order of the table.

    Args:
        cases: one row per arm, replicate and case, with these three as columns and the measure.
        arms: their names.
        folds: of all replicates, by their names.
        measure: column of the measure.

    Raises:
        InputError: an evaluated replicate lacks a case or has it twice.
    """
    names = cases["case_id"].unique()
    replicates = list(folds)
    values = np.full((len(arms), len(replicates), len(names)), np.nan)
    evaluated = np.zeros(values.shape[:2], bool)
    for (arm, replicate), rows in cases.groupby(["arm", "replicate"]):
        if sorted(rows["case_id"]) != sorted(names):
            raise InputError(
                f"metrics of {arm}, {replicate}",
                "do not cover the same cases as the others",
                "Evaluate all arms again.",
            )
        where = list(arms).index(arm), replicates.index(replicate)
        values[where], evaluated[where] = rows.set_index("case_id").loc[names, measure], True
    return Scores.over_scored_cases(values, evaluated, tuple(folds.values()))


def run_means(scores: Scores) -> np.ndarray:
    """Mean score of every run over cases, (arms, replicates); NaN if not evaluated or no case was scored."""
    means = np.full(scores.evaluated.shape, np.nan)
    if scores.values.shape[2]:
        means[scores.evaluated] = scores.values[scores.evaluated].mean(axis=1)
    return means


def missing_replicates(cases: pd.DataFrame, config: Config) -> dict[str, list[str]]:
    """Replicates of the config without a row in `cases`, by arm; complete arms are left out."""
    there = cases.groupby("arm")["replicate"].unique().to_dict()
    missing = {
        arm: [name for name in config.segmentation.replicates() if name not in there.get(arm, ())]
        for arm in config.arms.names()
    }
    return {arm: names for arm, names in missing.items() if names}


def identical_replicates(cases: pd.DataFrame) -> list[list[str]]:
    """Replicates, each as "arm, replicate", that agree in every measure of every case; separate trainings never do.

    Those that predicted nothing are left out, because they may well agree.
    """
    alike: dict[str, list[str]] = {}
    for (arm, replicate), rows in cases.groupby(["arm", "replicate"], sort=False):
        if not (rows["dice"] > 0).any() and not (rows["false_positive_mm3"] > 0).any():
            continue
        measures = rows.drop(columns=["arm", "replicate"]).sort_values("case_id").to_csv(index=False)
        alike.setdefault(measures, []).append(f"{arm}, {replicate}")
    return [names for names in alike.values() if len(names) > 1]


def shared_patients(cases: pd.DataFrame) -> list[str]:
    """Test patients with another role, among the usable cases."""
    tested, *others = (set(usable(cases, role)["patient_id"]) for role in (TEST, DISCOVERY, REFERENCE))
    return sorted(tested & set.union(*others))


def named_late(results: Path, config: Config) -> list[str]:
    """Replicates, each as "arm, replicate", that were evaluated with a different `verdict.primary`."""
    evaluated = {
        f"{arm}, {replicate}": results / "segmentation" / arm / replicate
        for arm in config.arms.names()
        for replicate in config.segmentation.replicates()
    }
    return [
        name
        for name, folder in evaluated.items()
        if (folder / EVALUATION).exists() and read_evaluation(folder).get("primary", []) != config.primary_arms()
    ]


def verdict_table(
    cases: pd.DataFrame, config: Config, n_discovery: int, external_test: str | None = None
) -> pd.DataFrame:
    """One row per arm and measure, `VERDICT_COLUMNS`; differences are to the real cases alone, in the unit of the
    measure.

    Args:
        cases: `metrics.csv` of all arms and replicates.
        config: the run's config.
        n_discovery: number of real training cases of the arms that use all of them.
        external_test: name of the external test set of these cases; None for those of `source`, which are corrected
            for no other test set.

    Raises:
        InputError: the arms do not cover the same cases.
    """
    families, gates = [family_of(arm, config) for arm in config.arms.all()], gates_of(config)
    if external_test is not None:
        families = list(map(external_family, families))
        gates = {external_family(family): external_family(gate) for family, gate in gates.items()}
    settings, missing, rows, arms = config.verdict, missing_replicates(cases, config), [], config.arms.all()
    comparisons = {
        measure.column: compare_arms(
            scores_of(cases, config, measure.column),
            settings.bootstraps,
            settings.confidence,
            seed_from(config.seed, "verdict", measure.column),
            families,
            gates,
            1 if external_test is None else len(config.external_tests),
        )
        for measure in verdict_measures()
    }
    for number, arm in enumerate(arms):
        for measure in verdict_measures():
            comparison = comparisons[measure.column][number]
            name = f"{arm.name} (primary)" if family_of(arm, config) == PRIMARY else arm.name
            name += "" if external_test is None else f" on {external_test}"
            text = sentence(name, arm.baseline.name, measure.title, comparison, settings.confidence)
            if arm.name in missing and comparison.n_replicates:
                text += f" Not evaluated and left out: {', '.join(missing[arm.name])}."
            if arm.added == BASELINE and comparison.p_wilcoxon < 1 - settings.confidence:
                text += (
                    f" It repeats the real cases, so its true difference is 0: the Wilcoxon p of "
                    f"{comparison.p_wilcoxon:.2g} shows the effect of run-to-run variation on a test over cases."
                )
            keys = {"arm": arm.name, "baseline": arm.baseline.name, "real_cases": arm.real_cases or n_discovery}
            keys |= {"metric": measure.column, "confidence": settings.confidence}
            rows.append(keys | asdict(comparison) | {"sentence": text})
    return pd.DataFrame(rows)[VERDICT_COLUMNS]


def component_table(cases: pd.DataFrame, config: Config) -> pd.DataFrame:
    """The variance components of every compared arm and every measure: `COMPONENT_COLUMNS`, NaN if unknown."""
    rows = []
    for measure in verdict_measures():
        scores = scores_of(cases, config, measure.column)
        for number, arm in enumerate(config.arms.all()):
            baseline = scores.baseline_of(number)
            if number == baseline:
                continue
            paired, found = scores.paired(number, baseline).scores, components_of(scores, number, baseline)
            keys = {"arm": arm.name, "family": family_of(arm, config), "metric": measure.column}
            sizes = {"n_independent": paired.shape[1], "n_cases": paired.shape[2], "run_df": scores.interaction.df}
            rows.append(keys | sizes | (asdict(found) if found else {}))
    return pd.DataFrame(rows, columns=COMPONENT_COLUMNS)


def without_trust(verdict: pd.DataFrame) -> pd.DataFrame:
    """Withdraw every claim of a verdict table, for a run with copied replicates.

    Copies hide the run-to-run variance, which all comparisons use, so no p of such a run is valid.
    """
    claimed = verdict["verdict"].isin(["better", "worse"])
    numbers = verdict["sentence"].str.partition(". ")[2]
    names = verdict["sentence"].str.partition(": ")[0]
    instead = names + ": not trusted, because replicates of this run are copies. " + numbers
    return verdict.assign(
        verdict=verdict["verdict"].mask(claimed, NOT_TRUSTED), sentence=verdict["sentence"].mask(claimed, instead)
    )


def dose_tables(cases: pd.DataFrame, config: Config) -> dict[str, pd.DataFrame]:
    """The lines over dose for each measure, generator and number of real cases with at least two doses; empty if there
    are none.

    Returns:
        `dose_response`: generator, baseline, metric, n_doses (without 0), slope (gain per dose of 1), ci_low, ci_high,
        standard_error, df, p (of the slope, uncorrected). `dose_response_band`: generator, baseline,
        metric, dose, fitted difference from the baseline, ci_low, ci_high (pointwise).
    """
    lines, bands = [], []
    arms = config.arms.all()
    for measure in verdict_measures():
        scores = scores_of(cases, config, measure.column)
        for number, generator in itertools.product(config.arms.numbers(), config.arms.generators):
            doses = {
                place: arm.dose
                for place, arm in enumerate(arms)
                if (arm.real, arm.filtered, arm.generator, arm.real_cases) == (True, False, generator, number)
                and scores.evaluated[place].any()
            }
            if len(doses) < 2 or not scores.paired(scores.baseline_of(min(doses)), *doses).scores.size:
                continue
            line = dose_response(scores, doses, config.verdict.confidence)
            ci_low, ci_high = line.slope.interval(config.verdict.confidence)
            baseline = Arm(True, None, 0.0, number).name
            keys = {"generator": generator, "baseline": baseline, "metric": measure.column}
            lines.append(
                keys
                | {"n_doses": len(doses), "slope": line.slope.value, "ci_low": ci_low, "ci_high": ci_high}
                | {"standard_error": line.slope.standard_error, "df": line.slope.df, "p": line.slope.p()}
            )
            values = {"dose": line.doses, "fitted": line.fitted, "ci_low": line.low, "ci_high": line.high}
            bands.append(pd.DataFrame(keys | values))
    if not lines:
        return {}
    return {"dose_response": pd.DataFrame(lines), "dose_response_band": pd.concat(bands, ignore_index=True)}


def measures_table(cases: pd.DataFrame) -> pd.DataFrame:
    """Every measure of every arm over the cases with a lesion, one row each.

    Args:
        cases: `metrics.csv` of all arms and replicates.

    Returns:
        arm, metric, n_cases (scored in at least one replicate), n_undefined (cases x replicates without a value because
        nothing was predicted), mean and sd over cases, of their means over replicates; difference from the real cases
        alone and n_compared, the number of cases in that mean: paired by case and replicate, for measures with a
        direction.
    """
    rows = []
    judged = cases[cases["n_lesions"] > 0].set_index(["arm", "case_id", "replicate"])
    arms = judged.index.get_level_values("arm")
    by_arm = {arm: judged[arms == arm].droplevel("arm") for arm in cases["arm"].unique()}
    for arm, scored in by_arm.items():
        for metric, measure in MEASURES.items():
            by_case = scored[metric].groupby("case_id").mean().dropna()
            counts = {"n_cases": len(by_case), "n_undefined": int(scored[metric].isna().sum())}
            row = {"arm": arm, "metric": metric, **counts, "mean": by_case.mean(), "sd": by_case.std()}
            baseline = Arm.parse(arm).baseline.name
            if arm != baseline and baseline in by_arm and measure.better != "near 0":
                differences = (scored[metric] - by_arm[baseline][metric]).groupby("case_id").mean().dropna()
                row |= {"difference": differences.mean(), "n_compared": len(differences)}
            rows.append(row)
    columns = ["arm", "metric", "n_cases", "n_undefined", "mean", "sd", "difference", "n_compared"]
    return pd.DataFrame(rows, columns=columns).astype({"n_compared": "Int64"})


def detection_table(cases: pd.DataFrame, lesions: pd.DataFrame, cpm: pd.DataFrame) -> pd.DataFrame:
    """Lesions found by size, and false positives per scan; one row per arm, means over replicates.

    Args:
        cases: `metrics.csv` of all arms and replicates.
        lesions: `lesions.csv`, likewise.
        cpm: of `froc_tables`; arms without scores have no row.

    Returns:
        arm, n_lesions and found_percent, for all lesions and each size bin (NaN if there is no such lesion),
        false_positives_per_scan, cpm with its band, and for cases without a lesion: n_empty_cases,
        empty_false_positive_mm3.
    """
    rows = []
    for arm in cases["arm"].unique():
        scans, marked = cases[cases["arm"] == arm], lesions[lesions["arm"] == arm]
        n_replicates = scans["replicate"].nunique()
        empty = scans[scans["n_lesions"] == 0]
        of_size = {column: marked.loc[marked["size_bin"] == size, "found"] for size, column in SIZE_COLUMNS.items()}
        rows.append(
            {"arm": arm, "n_lesions": len(marked) // n_replicates, "found_percent": 100 * marked["found"].mean()}
            | {f"n_lesions_{column}": len(found) // n_replicates for column, found in of_size.items()}
            | {f"found_percent_{column}": 100 * found.mean() for column, found in of_size.items()}
            | {
                "false_positives_per_scan": scans["n_false_positives"].mean(),
                "n_empty_cases": len(empty) // n_replicates,
                "empty_false_positive_mm3": empty["false_positive_mm3"].mean(),
            }
        )
    return pd.DataFrame(rows).merge(cpm, on="arm", how="left")


def strata_table(lesions: pd.DataFrame) -> pd.DataFrame:
    """Lesions found by size and texture, means over replicates; lesions without a texture rating are left out.

    Args:
        lesions: `lesions.csv` of all arms and replicates.

    Returns:
        `STRATA_COLUMNS`, one row per arm and stratum that has a lesion; no rows if nothing was rated.
    """
    if "texture" not in lesions:  # evaluated by an earlier version
        return pd.DataFrame(columns=STRATA_COLUMNS)
    lesions = lesions.assign(texture_class=lesions["texture"].astype(float).map(texture_class))
    rows = []
    for arm in lesions["arm"].unique():
        marked = lesions[lesions["arm"] == arm]
        n_replicates = marked["replicate"].nunique()
        for texture, size in itertools.product(TEXTURES, SIZE_COLUMNS):
            found = marked.loc[(marked["texture_class"] == texture) & (marked["size_bin"] == size), "found"]
            if len(found):
                rows.append((arm, texture, size, len(found) // n_replicates, 100 * found.mean()))
    return pd.DataFrame(rows, columns=STRATA_COLUMNS)


def external_tables(
    config: Config,
    cases: pd.DataFrame,
    lesions: pd.DataFrame,
    candidates: pd.DataFrame,
    data_sets: Mapping[str, str],
    n_discovery: int,
) -> dict[str, pd.DataFrame]:
    """What was measured on the external test sets, each compared by itself; nothing where there are none.

    Args:
        config: of the run.
        cases: `metrics.csv` of all arms and replicates.
        lesions: `lesions.csv`, likewise.
        candidates: `candidates.csv`, likewise.
        data_sets: the external test set of each case that is of one.
        n_discovery: real training cases of the arms that have all of them.

    Returns:
        `external_verdict`, `external_variance_components`, `external_measures`, `external_detection`,
        `external_froc`, `external_froc_band`, `external_cases`, `external_lesions`: the columns of the table without
        `external_`, after `data_set`.
    """
    tables: dict[str, list[pd.DataFrame]] = {}
    for name in config.external_tests:
        own, marked, found = (
            table[table["case_id"].map(data_sets) == name].reset_index(drop=True)
            for table in (cases, lesions, candidates)
        )
        if own.empty:  # evaluated before the set was named: its own check reports that its cases are missing
            continue
        seed = seed_from(config.seed, "verdict", "froc", name)
        froc = froc_tables(own, marked, found, config.verdict.confidence, seed)
        of_set = {
            "verdict": verdict_table(own, config, n_discovery, name),
            "variance_components": component_table(own, config),
            "measures": measures_table(own),
            "detection": detection_table(own, marked, froc.pop("cpm")),
            **froc,
            "cases": own,
            "lesions": marked,
        }
        for kind, table in of_set.items():
            tables.setdefault(f"external_{kind}", []).append(table.assign(data_set=name))
    return {kind: _joined(parts) for kind, parts in tables.items()}


def _joined(parts: list[pd.DataFrame]) -> pd.DataFrame:
    """The tables of several external test sets as one, `data_set` first."""
    filled = [part for part in parts if len(part)] or parts[:1]  # an empty one would change the types of columns
    table = pd.concat(filled, ignore_index=True)
    return table[["data_set", *table.columns.drop("data_set")]]


def check_external(config: Config, all_cases: pd.DataFrame, tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The rows of `external_instrument.csv`: the checks of every external test set, after `data_set`.

    Args:
        config: of the run.
        all_cases: rows of `cases.tsv`.
        tables: of `external_tables`.
    """
    nothing = {
        "external_verdict": VERDICT_COLUMNS,
        "external_variance_components": COMPONENT_COLUMNS,
        "external_cases": ["case_id"],
    }
    known = {kind: tables.get(kind, pd.DataFrame(columns=["data_set", *columns])) for kind, columns in nothing.items()}
    checks = []
    for name in config.external_tests:
        verdict, components, scored = (table[table["data_set"] == name] for table in known.values())
        planned = usable(all_cases[all_cases["data_set"] == name], TEST)["case_id"]
        # If no run was tested on the set, naming its cases says all.
        replicates = missing_replicates(scored, config) if len(scored) else {}
        missing = Missing(replicates, sorted(set(planned) - set(scored["case_id"])))
        checks.append(external_instrument_table(config, verdict, components, missing).assign(data_set=name))
    return _joined(checks)


def fidelity_tables(results: Path, config: Config) -> dict[str, pd.DataFrame]:
    """The results of `lungddpm label-fidelity` over the replicates of `real` that judged; empty if there are none.

    Returns:
        `label_fidelity`: `label_fidelity.TABLE_COLUMNS`. `label_fidelity_runs`: `label_fidelity.RUN_COLUMNS`.
        `label_fidelity_by_stratum`: `label_fidelity.STRATUM_COLUMNS`.
    """
    folds, gathered = folds_of(config), []
    for name in (label_fidelity.METRICS, label_fidelity.LESIONS):
        paths = {replicate: results / "label_fidelity" / replicate / name for replicate in folds}
        tables = [read_csv(path).assign(replicate=replicate) for replicate, path in paths.items() if path.exists()]
        gathered.append(pd.concat(tables, ignore_index=True) if tables else pd.DataFrame())
    metrics, lesions = gathered
    if metrics.empty:
        return {}
    generators = list(config.arms.largest_doses())
    return {
        "label_fidelity": label_fidelity.fidelity_table(metrics, lesions, generators, folds, config.verdict.confidence),
        "label_fidelity_runs": label_fidelity.runs_table(metrics, lesions),
        "label_fidelity_by_stratum": label_fidelity.strata_table(lesions),
    }


def write_both(path: Path, table: pd.DataFrame) -> list[Path]:
    """Write `<path>.csv` in full precision and `<path>.md` for reading (four digits); return both paths."""
    csv, markdown = path.with_suffix(".csv"), path.with_suffix(".md")
    write_table(csv, table)
    shown = table.astype(object).where(table.notna(), "")
    shown = shown.map(lambda value: f"{value:.4g}" if isinstance(value, float) else value)
    text = shown.to_markdown(index=False, disable_numparse=True)
    write_text(markdown, text + "\n")
    return [csv, markdown]


def check_instrument(
    config: Config, results: Path, tables: dict[str, pd.DataFrame], copies: list[list[str]]
) -> pd.DataFrame:
    """The rows of `instrument.csv`: all checks of a run, and finally whether its answer stands.

    Args:
        config: of the run.
        results: its folder.
        tables: all other tables of the run.
        copies: from `identical_replicates`.

    Raises:
        InputError: `cases/cases.tsv` is missing.
    """
    cases, verdict, components = tables["cases"], tables["verdict"], tables["variance_components"]
    all_cases = read_cases(results / "cases" / CASES)
    test_cases = usable(internal(all_cases), TEST)["case_id"]
    missing = Missing(missing_replicates(cases, config), sorted(set(test_cases) - set(cases["case_id"])))
    shared = shared_patients(internal(all_cases))
    checks = instrument_table(config, tables, missing, copies, named_late(results, config), shared)
    costs = timed_costs(config, tables["timing"], all_cases) if "timing" in tables else None
    answer = answer_row(checks, verdict, components, config, costs)
    return pd.concat([checks, pd.DataFrame([answer], columns=COLUMNS)], ignore_index=True)


def write_tables(config: Config, results: Path) -> tuple[dict[str, pd.DataFrame], list[Path]]:
    """Assemble all tables of a run and write them to `<results>/tables/` as CSV and Markdown.

    Returns:
        (tables by name, paths written). Tables: cases, lesions, measures, verdict, instrument, variance_components,
        run_spread, training_curves, convergence, calibration, detection, detection_by_stratum, froc, froc_band, ladder,
        published_comparison; and if the run has them dose_response, image_quality, label_fidelity, quality_and_cost,
        sample_filter, timing, external_instrument, and those of `external_tables`. All others cover the test cases of
        `source`.

    Raises:
        InputError: `real` was not evaluated, metrics do not match, or a file was edited by hand.
    """
    generators = list(config.arms.largest_doses())
    replicates = evaluated_replicates(results, config)
    cases, lesions, candidates = (
        gather(results, replicates, name) for name in ("metrics.csv", "lesions.csv", "candidates.csv")
    )
    real = read_cases(results / "cases" / CASES)
    n_discovery = len(usable(real, DISCOVERY))
    outside = real[real["data_set"] != INTERNAL].set_index("case_id")["data_set"].to_dict()
    external = external_tables(config, cases, lesions, candidates, outside, n_discovery)
    cases, lesions, candidates = (
        table[~table["case_id"].isin(outside)].reset_index(drop=True) for table in (cases, lesions, candidates)
    )
    froc = froc_tables(cases, lesions, candidates, config.verdict.confidence, seed_from(config.seed, "verdict", "froc"))
    verdict, copies = verdict_table(cases, config, n_discovery), identical_replicates(cases)
    if copies and external:
        external["external_verdict"] = without_trust(external["external_verdict"])
    tables = {
        "verdict": without_trust(verdict) if copies else verdict,
        "variance_components": component_table(cases, config),
        **dose_tables(cases, config),
        "detection": detection_table(cases, lesions, froc.pop("cpm")),
        "detection_by_stratum": strata_table(lesions),
        "measures": measures_table(cases),
        **froc,
        "cases": cases,
        "lesions": lesions,
        **external,
    }
    if measured := quality_files(results, generators):
        samples, sets = (
            pd.concat([read_csv(path)[columns] for path in paths], ignore_index=True)
            for paths, columns in (
                (measured.values(), image_quality.COLUMNS),
                (map(image_quality.sets_beside, measured.values()), image_quality.SET_COLUMNS),
            )
        )
        tables["image_quality"] = quality_table(samples, sets)
    tables |= fidelity_tables(results, config)
    tables["calibration"] = calibration_table(tables.get("image_quality"), generators, config.verdict.calibration)
    runs = scores_of(cases, config, deciding_measure().column)
    tables["run_spread"] = run_spread_table(
        config.arms.names(),
        run_means(runs),
        runs.replicates,
        seed_from(config.seed, "verdict", "run spread"),
        runs.baselines,
    )
    tables["training_curves"] = training_curves(config, results)
    tables["convergence"] = convergence_table(tables["training_curves"])
    passes: dict[str, float] = {}
    if generators:
        costs = tables["quality_and_cost"] = cost_table(config, drawing_costs(results, generators), tables)
        passes = costs[costs["function_evaluations"] > 0].set_index("generator")["function_evaluations"].to_dict()
    tables["ladder"] = ladder_table(
        config, tables["verdict"], tables.get("image_quality"), tables.get("label_fidelity")
    )
    tables["published_comparison"] = published_comparison(
        tables["verdict"],
        published_generators(config),
        tables.get("image_quality"),
        seconds_per_volume(results, generators),
        simulated=config.source.is_simulated,
        measures=tables["measures"],
        passes=passes,
    )
    if len(kept := filter_table(config, results)):
        tables["sample_filter"] = kept
    if len(timing := timing_table(results)):
        tables["timing"] = timing
    tables["instrument"] = check_instrument(config, results, tables, copies)
    if config.external_tests:
        tables["external_instrument"] = check_external(config, real, external)
    written = [path for name, table in tables.items() for path in write_both(results / "tables" / name, table)]
    return tables, written
