"""Can this run detect a gain that exists? The checks shown above the answer, each with its figure and its limit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from lungddpm.config.models import Config, Instrument
from lungddpm.core.arms import BASELINE
from lungddpm.core.text import format_p, plural, signed
from lungddpm.evaluation.measures import deciding_measure
from lungddpm.quality import calibration
from lungddpm.quality.image_quality import (
    CONSTANT_LUNGS,
    LUNGS,
    MEDIAN_RATIO,
    N_NEARER,
    SEAM,
    SEAM_RATIO,
    SMALLEST_RATIO,
    SYNTHETIC,
)
from lungddpm.verdict.convergence import DICE, LOSS
from lungddpm.verdict.design import detectable_by_design, power_of_design
from lungddpm.verdict.families import asked_arms, design_of_run, has_too_few_cases, relevant_difference
from lungddpm.verdict.run_spread import spread_notes
from lungddpm.verdict.statistics import POWER

COLUMNS = ["check", "subject", "measure", "value", "limit_low", "limit_high", "status", "sentence"]
PASSED, FAILED, NOT_MEASURED = "passed", "failed", "not measured"
UNSEEN = "test patients unseen"
POSITIVE, NULL = "positive control found", "null control quiet"
CONVERGED, GENERATOR, MEMORISED = "segmenters converged", "generator calibrated", "no sample near a training case"
ENOUGH, COMPLETE = "enough runs and cases", "nothing missing"
DISTINCT, ALIKE, NAMED = "no run is a copy", "runs scatter alike", "primary arm chosen in advance"
CHECKS = (UNSEEN, POSITIVE, NULL, CONVERGED, GENERATOR, MEMORISED, ENOUGH, COMPLETE, DISTINCT, ALIKE, NAMED)
"""In the order of the page."""
OF_TEST_SET = (POSITIVE, NULL, ENOUGH, COMPLETE)
"""Those that depend on the test cases, so every test set has its own."""
_FALL, _RISE = "share of the loss decrease in the last third", "rise of validation Dice in the last third"
_HU, _STEP = "limits of HU exceeded", "step at the lungs' border, over the references'"
_FIDELITY = "Dice on synthetic CT, over that on real CT"
_TO_MANY = "median distance to the nearest training case, over that of real cases"
_TO_ONE = "smallest distance to a training case, over that of real cases"
SHORT = {
    _FALL: "training loss", _RISE: "validation Dice", _HU: "HU", _STEP: "seam", _FIDELITY: "label fidelity",
    _TO_MANY: "median distance to training cases", _TO_ONE: "smallest distance to a training case",
}  # fmt: skip
"""Short names of the measures of checks that have several."""
POSITIVE_GENERATOR = "reference"
"""The generator that adds real CT, which is expected to help if anything does."""
_LEARNING = 0.05
"""p below which a curve still changes beyond its scatter."""


@dataclass(frozen=True)
class Missing:
    """What a run should have but does not."""

    replicates: Mapping[str, list[str]]
    """By arm, for arms that lack any."""
    test_cases: list[str]
    """Usable test cases that were not evaluated."""


def instrument_table(
    config: Config,
    tables: Mapping[str, pd.DataFrame],
    missing: Missing,
    copies: list[list[str]],
    named_late: list[str],
    shared_patients: Sequence[str] = (),
) -> pd.DataFrame:
    """All checks of a run.

    Args:
        config: of the run.
        tables: `verdict`, `variance_components`, `run_spread`, `convergence`, `calibration`; `image_quality` and
            `label_fidelity` where the run has them.
        missing: runs and cases that were not evaluated.
        copies: groups of replicates that are the same, each as "arm, replicate".
        named_late: replicates that were evaluated before `verdict.primary` was as it is now.
        shared_patients: test patients who have another role as well, with `roles.allow_shared_patients`.

    Returns:
        `COLUMNS`, one row per check and subject (an arm or a generator; empty: the whole run): what was measured, its
        value and limits (NaN: none), `status`, and a sentence. What is not measured never passes.
    """
    verdict = tables["verdict"]
    verdict = verdict[verdict["metric"] == deciding_measure().column]
    asked = [arm.generator for arm in config.arms.all() if not arm.is_control(config.arms.controls)]
    names, limits = [name for name in dict.fromkeys(asked) if name], config.verdict.instrument
    rows = [
        *(_unseen(shared_patients) if config.roles.allow_shared_patients else ()),
        *_controls(config, verdict),
        *_convergence(tables["convergence"], limits),
        *(row for name in names for row in _generator(name, tables, limits)),
        *(row for name in names for row in _memorised(name, tables.get("image_quality"), limits.training_distance)),
        *_size(config, tables["variance_components"], verdict),
        *_complete(missing),
        *_distinct(copies),
        *_alike(tables["run_spread"], 1 - config.verdict.confidence),
        *(_named(named_late) if config.primary_arms() else ()),
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def external_instrument_table(
    config: Config, verdict: pd.DataFrame, components: pd.DataFrame, missing: Missing
) -> pd.DataFrame:
    """The checks `OF_TEST_SET` on an external test set; the others need no test case, so they are those of the run.

    Args:
        config: of the run.
        verdict: rows of `external_verdict.csv` of this set; none if nothing was evaluated on it.
        components: rows of `external_variance_components.csv`, likewise.
        missing: replicates and usable cases of the set that were not evaluated.

    Returns:
        `COLUMNS`, as `instrument_table`.
    """
    verdict = verdict[verdict["metric"] == deciding_measure().column]
    rows = [
        *_controls(config, verdict, " on this test set"),
        *_size(config, components, verdict, len(config.external_tests)),
        *_complete(missing),
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def _row(
    check: str, subject: str, measure: str, value: float, limits: tuple[float, float], status: str, sentence: str
) -> dict[str, object]:
    return dict(zip(COLUMNS, (check, subject, measure, value, *limits, status, sentence), strict=True))


def _judged(value: float, limits: tuple[float, float]) -> str:
    """The status of a value given its limits, either of which may be NaN."""
    if math.isnan(value):
        return NOT_MEASURED
    return FAILED if value < limits[0] or value > limits[1] else PASSED


def _controls(config: Config, verdict: pd.DataFrame, on: str = "") -> list[dict]:
    """Both controls, a row for each control arm; `on` names the test set in the conclusion."""
    significance = 1 - config.verdict.confidence
    controls = [arm for arm in config.arms.all() if arm.real and arm.is_control(config.arms.controls)]
    positive = [arm.name for arm in controls if arm.added == POSITIVE_GENERATOR]
    null = [arm.name for arm in controls if arm.added == BASELINE]
    rows = []
    for row in verdict[verdict["arm"].isin(positive)].to_dict("records"):
        found = row["verdict"] == "better"
        said = (
            f"{row['arm']}, which adds real cases, was called better ({_numbers(row, significance)}): "
            f"the run detects a gain that exists{on}."
            if found
            else f"{row['arm']}, which adds real cases, was not called better ({_numbers(row, significance)}): "
            f"the run does not even detect the gain from more real data{on}."
        )
        rows.append(_control(POSITIVE, row, (math.nan, significance), found, said))
    if not positive:
        said = "No positive control: add `reference` to arms.controls, the references' own CT with their annotations."
        rows.append(_row(POSITIVE, "", "p (Holm)", math.nan, (math.nan, significance), NOT_MEASURED, said))
    for row in verdict[verdict["arm"].isin(null)].to_dict("records"):
        quiet = row["verdict"] not in ("better", "worse")
        called = "called neither better nor worse" if quiet else f"called {row['verdict']}"
        said = f"{row['arm']}, which adds nothing, was {called} ({_numbers(row, significance)})."
        rows.append(_control(NULL, row, (significance, math.nan), quiet, said))
    if not null:
        said = "No null control: add `real` to arms.controls, the real cases again."
        rows.append(_row(NULL, "", "p (Holm)", math.nan, (significance, math.nan), NOT_MEASURED, said))
    return rows


def _control(check: str, row: dict, limits: tuple[float, float], as_it_should: bool, sentence: str) -> dict:
    status = PASSED if as_it_should else FAILED
    if row["verdict"] not in ("better", "worse", "no difference shown"):
        status, sentence = NOT_MEASURED, f"{row['arm']}: {row['verdict']}."
    return _row(check, row["arm"], "p (Holm)", row["p_holm"], limits, status, sentence)


def _numbers(row: dict, significance: float) -> str:
    return f"{signed(row['difference'])}, p {format_p(row['p_holm'], significance)}"


def _convergence(table: pd.DataFrame, limits: Instrument) -> list[dict]:
    """Each arm whose validation Dice still rises and, unless the curves are smooth enough to show a rise of the limit,
    each whose training loss still falls; if there is none, the arm that changes most.

    The loss alone would fail segmenters that have converged: it keeps falling while the learning rate decays and
    training cases are memorised.
    """
    by_dice = _convergence_by(DICE, table, _RISE, "change", limits.validation_rise)
    errors = table[table["measure"] == DICE]["standard_error"]
    by_loss = _convergence_by(LOSS, table, _FALL, "change_of_whole", limits.loss_fall)
    if by_dice[0]["status"] == NOT_MEASURED or not (errors <= limits.validation_rise).all():
        return [*by_loss, *by_dice]
    most = max(by_loss, key=lambda row: row["value"])
    if by_dice[0]["status"] == PASSED and not math.isnan(most["value"]):
        by_dice[0]["sentence"] += f" {_convergence_sentence(LOSS, most['subject'], most['value'])}."
    return by_dice


def _convergence_by(measure: str, table: pd.DataFrame, what: str, column: str, limit: float) -> list[dict]:
    found, limits = table[table["measure"] == measure].dropna(subset=column), (math.nan, limit)
    if found.empty:
        said = f"No curve has four or more saved states, so it is unknown whether the {SHORT[what]} has converged."
        return [_row(CONVERGED, "", what, math.nan, limits, NOT_MEASURED, said)]
    # A change within an arm's scatter does not show that it is still learning.
    moving = found[found["p"] < _LEARNING]
    learning = moving[moving[column] > limit]
    if learning.empty:
        most = (found if moving.empty else moving).sort_values(column).iloc[-1]
        kind = "share" if measure == LOSS else "rise"
        said = f"{_convergence_sentence(measure, most['arm'], most[column])}, the largest {kind} of all arms"
        said += "." if most["p"] < _LEARNING else " (within scatter)."
        return [_row(CONVERGED, most["arm"], what, most[column], limits, PASSED, said)]
    hint = "with more steps, this arm would probably be better"
    return [
        _row(
            CONVERGED, row["arm"], what, row[column], limits, FAILED,
            f"{_convergence_sentence(measure, row['arm'], row[column])}: {hint}.",
        )
        for row in learning.to_dict("records")
    ]  # fmt: skip


def _convergence_sentence(measure: str, arm: str, change: float) -> str:
    if measure == LOSS:
        return f"{arm}: {100 * change:.0f} % of the fall of its training loss was in the last third of the steps"
    return f"{arm}: validation Dice rose by {signed(change, 2)} in the last third of the steps"


def _generator(name: str, tables: Mapping[str, pd.DataFrame], limits: Instrument) -> list[dict]:
    """HU, seam and label fidelity of a generator's samples."""
    return [
        _hounsfield(name, tables["calibration"]),
        _seam(name, tables.get("image_quality"), limits.seam_ratio),
        _fidelity(name, tables.get("label_fidelity"), limits),
    ]


def _hounsfield(name: str, table: pd.DataFrame) -> dict:
    rows = table[(table["generator"] == name) & table["limit_low"].notna()]
    outside = rows["status"] == calibration.FAILED
    known = rows[rows["mean"].notna()]
    value = float(outside.sum()) if len(known) else math.nan
    status = _judged(value, (math.nan, 0))
    if status == PASSED and len(known) < len(rows):
        status = NOT_MEASURED
    if status == FAILED:
        (said,) = calibration.calibration_notes(rows)
    elif len(known):
        parts = [
            f"{row['region'].split()[0]} {signed(row['mean'], 0)} HU (limit ±{row['limit_high']:g})"
            if row["measure"] == calibration.DIFFERENCE
            else f"HU spread in the {row['region'].split()[0]} {row['mean']:.2f} times that of references "
            f"({row['limit_low']:g} to {row['limit_high']:g})"
            for row in known.to_dict("records")
        ]
        unknown = ", ".join(dict.fromkeys(region.split()[0] for region in rows.loc[rows["mean"].isna(), "region"]))
        said = f"{name} against its references: {', '.join(parts)}" + (f"; {unknown} not measured." if unknown else ".")
    else:
        said = f"HU of {name} were not measured."
    return _row(GENERATOR, name, _HU, value, (math.nan, 0.0), status, said)


def _memorised(name: str, quality: pd.DataFrame | None, least: float) -> list[dict]:
    """Nearness of a generator's samples to its training cases: of the median sample, and of the nearest."""
    found: dict[tuple[str, str], dict] = {}
    if quality is not None:
        of_lungs = quality[(quality["generator"] == name) & (quality["region"] == LUNGS)]
        found = of_lungs.set_index(["image", "metric"]).to_dict("index")
    unknown = {"mean": math.nan, "note": "", "n": 0}
    many, one, nearer = (found.get((SYNTHETIC, metric), unknown) for metric in (MEDIAN_RATIO, SMALLEST_RATIO, N_NEARER))
    smooth = found.get((CONSTANT_LUNGS, MEDIAN_RATIO), unknown)["mean"]
    of_many = (
        f"Samples of {name} are {many['mean']:.2f} times as far from their nearest training case as real cases are"
    )
    if math.isfinite(smooth):  # external samples may have no reference to take them from
        of_many += f" (constant lungs, which contain no memorised texture: {smooth:.2f})"
    of_one = (
        f"The nearest sample of {name}: {one['note']}; {nearer['mean']:.0f} of {nearer['n']} samples are nearer to a "
        "training case than any real case is"
    )
    return [
        _distance(name, _TO_MANY, many, least, of_many, "they may be copies, or too smooth"),
        _distance(name, _TO_ONE, one, least, of_one, "check whether this pair is a copy"),
    ]


def _distance(name: str, measure: str, found: dict, least: float, said: str, doubt: str) -> dict:
    """A line of that check; a distance alone does not prove a copy, so a failed one says what to look for."""
    status = _judged(found["mean"], (least, math.nan))
    said += f": {doubt}." if status == FAILED else "."
    if status == NOT_MEASURED:
        why = f": {found['note']}" if found["note"] else ""
        said = f"The distance of {name}'s samples to training cases was not measured{why}."
    return _row(MEMORISED, name, measure, found["mean"], (least, math.nan), status, said)


def _seam(name: str, quality: pd.DataFrame | None, limits: tuple[float, float]) -> dict:
    value = math.nan
    if quality is not None:
        found = quality[
            (quality["generator"] == name) & (quality["image"] == SYNTHETIC) & (quality["region"] == SEAM)
            & (quality["metric"] == SEAM_RATIO)
        ]  # fmt: skip
        value = float(found["mean"].iloc[0]) if len(found) else math.nan
    status = _judged(value, limits)
    said = f"The step of {name} at the border of the lungs was not measured."
    if status != NOT_MEASURED:
        said = f"The step of {name} at the border of the lungs is {value:.2f} times that of its references"
        said += "." if status == PASSED else ": segmenters may learn the seam."
    return _row(GENERATOR, name, _STEP, value, limits, status, said)


def _fidelity(name: str, table: pd.DataFrame | None, limits: Instrument) -> dict:
    lowest, ceiling = limits.label_fidelity, limits.label_fidelity_ceiling
    value, said = math.nan, f"The label fidelity of {name} was not measured."
    if table is not None:
        found = table.set_index("generator")[["dice_of_references", "difference"]]
        real, difference = found.loc[name] if name in found.index else (math.nan, math.nan)
        if real >= ceiling:
            value = 1 + difference / real
        elif not math.isnan(real):
            limit = f"(limit {ceiling:g})"
            said = f"Segmenters of real reach a Dice of {real:.3f} on real CT {limit}: too low to judge {name}."
    status = _judged(value, (lowest, math.nan))
    if status != NOT_MEASURED:
        on_both = f"{real + difference:.2f} on {name} and of {real:.2f} on its references' real CT"
        said = f"Segmenters of real reach a Dice of {on_both}"
        said += "." if status == PASSED else ": its nodules do not look like nodules to them."
    return _row(
        GENERATOR,
        name,
        _FIDELITY,
        value,
        (lowest, math.nan),
        status,
        said,
    )


def _size(config: Config, components: pd.DataFrame, verdict: pd.DataFrame, test_sets: int = 1) -> list[dict]:
    """What the run can detect, next to the relevant difference; nothing if no arm has synthetic CT."""
    arms, relevant, title = asked_arms(config), relevant_difference(config), deciding_measure().title
    verdict = verdict[verdict["arm"].isin(arms)]
    if verdict.empty:
        return []
    name, limits = f"detectable difference, {title}", (math.nan, relevant)
    found = design_of_run(config, components, test_sets)
    if found is None or not found[0].decides:
        return [_row(ENOUGH, "", name, math.nan, limits, FAILED, _why_nothing(config, verdict, test_sets))]
    design, typical = found
    detectable, power = detectable_by_design(design, typical), power_of_design(design, typical, relevant)
    published = "" if config.verdict.relevant_difference else " (the published gain)"
    said = (
        f"A true {title} difference of {detectable:.2g} is detected with a probability of {100 * POWER:.0f} %; "
        f"the relevant one, {relevant:.2g}{published}, with {_percent(power)}."
    )
    room = 1 - float(verdict["baseline_mean"].max())
    if detectable > room:
        said += f" The largest possible gain over real is {room:.2f}."
    return [_row(ENOUGH, "", name, detectable, limits, _judged(detectable, limits), said)]


def _percent(power: float) -> str:
    return "more than 99 %" if power > 0.99 else f"{100 * power:.0f} %"


def _why_nothing(config: Config, verdict: pd.DataFrame, test_sets: int) -> str:
    """Why a run cannot decide anything, in sentences."""
    n_cases, reasons = int(verdict["n_cases"].max()), []
    if has_too_few_cases(config, n_cases, test_sets):
        reasons.append(f"{plural(n_cases, 'test case')} {'is' if n_cases == 1 else 'are'} too few to decide anything.")
    if len(config.segmentation.replicates()) == 1:
        reasons.append("With one replicate, the run-to-run variance is not known: nothing can be decided.")
    elif not reasons:
        reasons.append(
            "No arm has two replicates in common with its baseline yet, so the run-to-run variance is not known: "
            "nothing can be decided."
        )
    return " ".join(reasons)


def _complete(missing: Missing) -> list[dict]:
    rows = [
        _row(
            COMPLETE, arm, "replicates missing", float(len(replicates)), (math.nan, 0.0), FAILED,
            f"Not evaluated and left out: {arm}, {', '.join(replicates)}.",
        )
        for arm, replicates in missing.replicates.items()
    ]  # fmt: skip
    if missing.test_cases:
        shown = ", ".join(missing.test_cases[:5]) + (", ..." if len(missing.test_cases) > 5 else "")
        said = f"Test cases that no run segmented: {shown}."
        lost = float(len(missing.test_cases))
        rows.append(_row(COMPLETE, "", "test cases missing", lost, (math.nan, 0.0), FAILED, said))
    if not rows:
        said = "Every arm has all its replicates, and every replicate all test cases."
        rows.append(_row(COMPLETE, "", "replicates missing", 0.0, (math.nan, 0.0), PASSED, said))
    return rows


def _distinct(copies: list[list[str]]) -> list[dict]:
    said = "No two runs have identical measures in every case."
    if copies:
        groups = ". ".join("; ".join(names) for names in copies)
        said = (
            f"Identical measures in every case: {groups}. Separate trainings do not give identical results: find the "
            "copied folder, and trust no answer until it is replaced."
        )
    limits = (math.nan, 0.0)
    status = FAILED if copies else PASSED
    return [_row(DISTINCT, "", "groups of identical runs", float(len(copies)), limits, status, said)]


def _alike(spread: pd.DataFrame, significance: float) -> list[dict]:
    """Whether the runs of some arm scatter more than those of the others, beyond chance."""
    measure, limits = "smallest p for equal scatter", (significance, math.nan)
    notes = spread_notes(spread, deciding_measure().title, significance)
    smallest = float(spread["p"].min())
    if math.isnan(smallest):
        said = "Whether the runs of all arms scatter alike is not known."
        return [_row(ALIKE, "", measure, smallest, limits, NOT_MEASURED, said)]
    said = f"No arm's runs scatter more than those of the others beyond chance (p {format_p(smallest, significance)})."
    return [_row(ALIKE, "", measure, smallest, limits, _judged(smallest, limits), " ".join(notes) or said)]


def _unseen(shared_patients: Sequence[str]) -> list[dict]:
    said = "No test patient has another role."
    if shared_patients:
        have = "has" if len(shared_patients) == 1 else "have"
        said = (
            f"{plural(len(shared_patients), 'test patient')} also {have} another role ({_first(shared_patients)}), so "
            "segmenters or generators may have learned from them: this run only shows that the pipeline works."
        )
    status, number = FAILED if shared_patients else PASSED, float(len(shared_patients))
    return [_row(UNSEEN, "", "test patients with another role", number, (math.nan, 0.0), status, said)]


def _first(names: Sequence[str]) -> str:
    return "; ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def _named(named_late: list[str]) -> list[dict]:
    said = "The primary arm was chosen before anything was evaluated."
    if named_late:
        said = (
            f"{plural(len(named_late), 'replicate')} had been evaluated before verdict.primary was set to its "
            f"current value: {_first(named_late)}. An arm chosen after seeing results is not a primary arm."
        )
    status = FAILED if named_late else PASSED
    measure = "replicates evaluated before"
    return [_row(NAMED, "", measure, float(len(named_late)), (math.nan, 0.0), status, said)]
