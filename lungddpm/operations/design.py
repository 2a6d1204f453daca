"""Power and cost of designs around the config's: the table of `lungddpm plan --power`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lungddpm.config.models import Config
from lungddpm.core.cases import read_cases
from lungddpm.core.errors import InputError
from lungddpm.core.progress import waiting
from lungddpm.core.tables import DisplayTable
from lungddpm.core.text import plural
from lungddpm.evaluation.measures import deciding_measure
from lungddpm.operations.plan import Cohort, Stage, choose_speed, count_cohort, first_table, load_plan_config, plan_run
from lungddpm.verdict.design import (
    ASSUMED,
    MEASURED_ON_PHANTOMS,
    Components,
    Costs,
    Design,
    detectable_by_design,
    hours_of_design,
    power_of_design,
    sufficient_designs,
)
from lungddpm.verdict.families import (
    design_of,
    design_of_run,
    relevant_difference,
    replicates_in_words,
    stages_per_replicate,
    timed_costs,
)
from lungddpm.verdict.statistics import POWER
from lungddpm.verdict.tables import read_csv

_REPLICATES = (0.5, 1.0, 1.5, 2.0, 3.0)
_CASES = (0.5, 1.0, 2.0, 4.0)
"""Rows of the table, as multiples of the config's own design."""


@dataclass(frozen=True)
class Assumed:
    """Variance components given by the user; None takes those of the run, or the defaults."""

    run_sd: float | None = None
    residual_sd: float | None = None
    arm_case_sd: float | None = None


@dataclass(frozen=True)
class DesignRow:
    """What one design can show, and what it costs."""

    design: Design
    is_own: bool
    """Whether it is the config's."""
    detectable: float
    """Difference that is found with a probability of `POWER`; infinite where none is."""
    power: float
    """For the relevant difference."""
    hours: dict[str, float]
    """By head of column."""


@dataclass(frozen=True)
class Designs:
    """Designs around the config's, with what they rest on."""

    rows: list[DesignRow]
    able: list[Design]
    """The smallest that can show the relevant difference."""
    relevant: float
    components: Components
    origin: str
    """Of the components, as a clause."""
    of_hours: str
    """The same of the hours."""
    notes: list[str]


def run_design(
    configs: Sequence[Path | str],
    tables: Sequence[Path],
    scans: int | None,
    device: str,
    step_seconds: float | None,
    bench: Path | None,
    results: Path | None,
    assumed: Assumed,
) -> Designs:
    """The designs: detectable difference, power and hours for replicates x test cases. Writes nothing.

    Args:
        configs: see `run_plan`, also for tables, scans, device, step_seconds and bench.
        tables: of the scans; with `results`, that run's are used.
        scans: their number.
        device: to estimate the hours for, if no run was timed.
        step_seconds: of an optimizer step on that device.
        bench: output of `lungddpm bench`.
        results: folder of a finished run, whose variance components and times are used.
        assumed: components that override those of the run.

    Raises:
        ConfigError: see `run_plan`.
        InputError: `results` has no usable table of variance components.
    """
    config = load_plan_config(*configs)
    tables = tables if results is None else [results / "cases" / "cases.tsv"]
    cohort = count_cohort(config, first_table(tables, config), scans)
    components, origin = _components(config, results, assumed)
    own = design_of(config, cohort.test - cohort.test_without_nodule)
    costs = {} if results is None else _timed_costs(config, results)
    of_hours = f"as measured in {results}, one job after another"
    if not costs:
        speed = choose_speed(config, device, step_seconds, bench)
        with waiting("counting the operations of its networks"):
            costs = _planned_costs(config, plan_run(config, cohort, speed), own, cohort)
        of_hours = f"estimated for {speed.device}, {speed.origin}"
    relevant = relevant_difference(config)
    able = sufficient_designs(own, components, relevant, next(iter(costs.values()), None))
    notes = _notes(config, own, components, relevant, able)
    rows = _rows(own, components, relevant, costs)
    return Designs(rows, able, relevant, components, origin, of_hours, notes)


def describe_designs(designs: Designs) -> str:
    """The designs as a table for a terminal, a row each, the config's own marked; with what it rests on."""
    rows = [
        [
            "*" if row.is_own else "", str(row.design.n_independent), str(row.design.n_cases),
            f"{row.detectable:.3f}" if math.isfinite(row.detectable) else "nothing", f"{row.power:.2f}",
            *map(_hours, row.hours.values()),
        ]
        for row in designs.rows
    ]  # fmt: skip
    heads = ["", "replicates", "test cases", "detectable", f"power for {designs.relevant:.3f}", *designs.rows[0].hours]
    table = DisplayTable(heads, rows, [False, *[True] * (len(heads) - 1)]).text(100)
    *notes, last = designs.notes
    return "\n".join([table, "", *notes, f"{last} ({designs.origin}).", f"Hours: {designs.of_hours}."])


def design_values(designs: Designs) -> dict[str, Any]:
    """The same for `--json`; the keys are those of docs/reference/command-line.md."""
    return {
        "relevant_difference": designs.relevant,
        "wanted_power": POWER,
        "components": {**vars(designs.components), "origin": designs.origin},
        "hours_origin": designs.of_hours,
        "designs": [
            {
                "independent_replicates": row.design.n_independent,
                "runs_each": row.design.runs_each,
                "test_cases": row.design.n_cases,
                "is_own": row.is_own,
                "detectable": row.detectable,
                "power": row.power,
                **{head.replace(" ", "_").lower(): hours for head, hours in row.hours.items()},
            }
            for row in designs.rows
        ],
        "able": [{"independent_replicates": each.n_independent, "test_cases": each.n_cases} for each in designs.able],
    }


def _components(config: Config, results: Path | None, assumed: Assumed) -> tuple[Components, str]:
    """The components to plan with, and where they come from."""
    if results is not None:
        path = results / "tables" / "variance_components.csv"
        table = read_csv(path)
        of_run = design_of_run(config, table)
        if of_run is None:
            raise InputError(path, "has no variance components", "Use a run with at least two replicates.")
        found = of_run[1]
        run_df = int(table.loc[table["metric"] == deciding_measure().column, "run_df"].max())
        origin = f"from {path}, that of runs with {plural(run_df, 'degree')} of freedom"
    elif config.source.is_simulated:
        found, origin = MEASURED_ON_PHANTOMS, "measured on the phantom cohort's demo"
    else:
        found, origin = ASSUMED, "assumed: no real cohort has been measured"
    given = {name: value for name, value in vars(assumed).items() if value is not None}
    if given:
        origin = f"{', '.join(name.replace('_', ' ') for name in given)} as given, the rest {origin}"
    return replace(found, **given), "as given" if len(given) == len(vars(assumed)) else origin


def _timed_costs(config: Config, results: Path) -> dict[str, Costs]:
    """The costs of the design from the times of a run, by column head; empty if it has no times."""
    timing, cases = results / "tables" / "timing.csv", results / "cases" / "cases.tsv"
    if not timing.exists() or not cases.exists():
        return {}
    return {"job hours": timed_costs(config, read_csv(timing), read_cases(cases))}


def _planned_costs(config: Config, stages: Sequence[Stage], own: Design, cohort: Cohort) -> dict[str, Costs]:
    """The planned costs: GPU hours, if GPUs are used, and core hours."""
    hours: dict[str, dict[str, float]] = {"GPU hours": {}, "core hours": {}}
    for stage in stages:
        for head, value in (("GPU hours", stage.gpu_hours), ("core hours", stage.core_hours)):
            hours[head][stage.name] = hours[head].get(stage.name, 0.0) + value
    sizes = own.n_independent, cohort.test, cohort.scans
    grow = stages_per_replicate(config)
    return {head: Costs(of_stage, *sizes, grow) for head, of_stage in hours.items() if any(of_stage.values())}


def _rows(own: Design, components: Components, relevant: float, costs: dict[str, Costs]) -> list[DesignRow]:
    rows = []
    for n_independent in sorted(
        {max(2, round(own.n_independent * factor)) for factor in _REPLICATES} | {own.n_independent}
    ):
        for n_cases in sorted({max(1, round(own.n_cases * factor)) for factor in _CASES}):
            design = replace(own, n_independent=n_independent, n_cases=n_cases)
            hours = {head: hours_of_design(design, own, each) for head, each in costs.items()}
            detectable = detectable_by_design(design, components)
            power = power_of_design(design, components, relevant)
            rows.append(DesignRow(design, design == own, detectable, power, hours))
    return rows


def _notes(config: Config, own: Design, components: Components, relevant: float, able: Sequence[Design]) -> list[str]:
    """The assumptions of the table, and the smallest designs that can detect the relevant difference."""
    measure, primary = deciding_measure().title, config.primary_arms()
    compared = f"primary: {', '.join(primary)}" if primary else f"{own.n_compared} compared together"
    shown = " or ".join(f"{replicates_in_words(one, config)} with {plural(one.n_cases, 'test case')}" for one in able)
    whose = "of the config" if config.verdict.relevant_difference else "the published gain"
    return [
        f"* the config's own design: {plural(own.n_arms, 'arm')}, {replicates_in_words(own, config)}, {compared}.",
        f"Detectable: the true difference in {measure} that is detected with a probability of {100 * POWER:.0f} %.",
        f"Needed for {relevant:.3f} ({whose}): {shown}."
        if able
        else f"No feasible design detects {relevant:.3f} ({whose}) with a probability of {100 * POWER:.0f} %.",
        f"Sd of {measure}: run {components.run_sd:.3g}, residual {components.residual_sd:.3g}, arm x case "
        f"{components.arm_case_sd:.3g}",
    ]


def _hours(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 0.1 else f"{value:.2f}"
