"""The design of a benchmark before it is run: what a number of replicates and test cases can show, and its cost.

The decision is that of `statistics`. Given the variance components, its mean squares are chi-squared and independent of
the observed difference, so the power is the average of a normal probability over their distribution; nothing is
simulated. The noncentral t distribution, which takes the estimated variances for the true ones,
is close to it with about 16 test cases or more and too optimistic below.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import optimize, stats

from lungddpm.verdict.statistics import POWER, Effect, MeanSquare, Scores, minimum_cases

COMPONENT_COLUMNS = ["arm", "family", "metric", "n_independent", "n_cases", "run_df", "run_sd", "residual_sd",
                     "arm_case_sd"]  # fmt: skip
_NODES = (24, 12, 8)
"""Nodes of the quadrature over the mean squares of runs, cases and residual."""
_MOST_REPLICATES = 50
_MORE_CASES = (1.0, 1.5, 2.0, 3.0, 4.0)
_LARGEST = 1e3
"""Upper bound of a detectable difference, in units of its standard error."""


@dataclass(frozen=True)
class Components:
    """Standard deviations of an arm's scores, in the measure's unit, apart from what all arms share."""

    run_sd: float
    """Between training runs (arm x run), of the mean over infinitely many cases."""
    residual_sd: float
    """Residual (arm x run x case)."""
    arm_case_sd: float
    """Between cases (arm x case), the same in all runs."""


MEASURED_ON_PHANTOMS = Components(0.045, 0.08, 0.09)
"""Of the demo's arm with synthetic CT, root mean square over the runs in docs/explanation/demo-seeds/ (two cores, AMD
EPYC); single runs gave 0.023 to 0.069, 0.068 to 0.105, and 0.063 to 0.111."""
ASSUMED = Components(0.015, 0.1, 0.1)
"""The values behind the simulated rates in docs/reference/measures.md; no real cohort has been measured."""


@dataclass(frozen=True)
class Design:
    """The size of a benchmark."""

    n_arms: int
    """All arms including the baseline: the run-to-run variance is estimated from all."""
    n_compared: int
    """Arms in one family of Holm's correction."""
    n_independent: int
    """Independent replicates: folds, or seeds of a single fold."""
    n_cases: int
    """Test cases with a nodule."""
    confidence: float
    n_baselines: int = 1
    """Baselines among the `n_arms`."""
    runs_each: int = 1
    """Runs that are averaged in an independent replicate: the seeds of a fold, if several folds are trained."""

    @property
    def run_df(self) -> int:
        """Degrees of freedom of MS(TR)."""
        return (self.n_arms - self.n_baselines) * (self.n_independent - 1)

    @property
    def decides(self) -> bool:
        """Whether anything can be decided."""
        return self.n_independent > 1 and self.n_cases >= minimum_cases(self.n_compared, self.confidence)


def power_of_design(design: Design, components: Components, difference: float) -> float:
    """Probability of detecting a true difference `difference`, at the strictest level of Holm's correction.

    Args:
        design: of the benchmark; the power is 0 if it cannot decide anything.
        components: known, not estimated.
        difference: positive, in the measure's unit.
    """
    if not design.decides:
        return 0.0
    thresholds, sd = _thresholds(design, components)
    return float(stats.norm.sf(thresholds, difference, sd).mean()) if sd else float(difference > 0)


def detectable_by_design(design: Design, components: Components) -> float:
    """The true difference with a power of `POWER`; infinite if the design cannot decide anything."""
    if not design.decides:
        return math.inf
    thresholds, sd = _thresholds(design, components)
    if not sd:
        return 0.0
    return float(optimize.brentq(lambda d: stats.norm.sf(thresholds, d, sd).mean() - POWER, 0, _LARGEST * sd))


def _thresholds(design: Design, components: Components) -> tuple[np.ndarray, float]:
    """Equally probable thresholds above which an arm is called better, and the sd of a difference."""
    n_independent, n_cases = design.n_independent, design.n_cases
    n_runs = n_independent * design.runs_each
    residual = 2 * components.residual_sd**2 / (n_runs * n_cases)
    between_cases = 2 * components.arm_case_sd**2 / n_cases + residual
    from_runs = 2 * components.run_sd**2 / n_runs + residual
    degrees = design.run_df, n_cases - 1, (n_cases - 1) * (n_independent - 1)
    nodes = [
        value * stats.chi2.ppf((np.arange(n) + 0.5) / n, df) / df
        for value, df, n in zip((from_runs, between_cases, residual), degrees, _NODES, strict=True)
    ]
    estimates = [
        Effect(0.0, max(cases - within, 0.0), MeanSquare(runs, design.run_df), n_cases - 1, cases)
        for runs, cases, within in itertools.product(*nodes)
    ]
    critical = stats.t.isf(
        (1 - design.confidence) / design.n_compared / 2, np.array([estimate.df for estimate in estimates])
    )
    errors = np.array([estimate.standard_error for estimate in estimates])
    return critical * errors, math.sqrt(from_runs + between_cases - residual)


def components_of(scores: Scores, arm: int, baseline: int = 0) -> Components | None:
    """Estimate the components from an arm and its baseline; None with one replicate or one case.

    The run-to-run variance, estimated from all arms, is the median-unbiased estimate, as in `Effect.detectable`. If
    seeds are averaged within folds, both variances of runs are scaled up to those of single ones, as in
    `Scores.contrast`.
    """
    paired, interaction = scores.paired(arm, baseline), scores.interaction
    _, n_independent, n_cases = paired.scores.shape
    if n_independent < 2 or n_cases < 2 or not interaction.df:
        return None
    covariance = np.cov(paired.scores[0] - paired.scores[1])
    within = float(covariance.diagonal().mean())
    shared = float(covariance[~np.eye(len(covariance), dtype=bool)].mean())
    residual = max(within - shared, 0.0) / 2 / float((1 / paired.n_runs).mean())
    averages = interaction.value * interaction.df / float(stats.chi2.median(interaction.df))
    run = max(averages * scores.runs_per_replicate - residual / n_cases, 0.0)
    return Components(math.sqrt(run), math.sqrt(residual), math.sqrt(max(shared, 0.0) / 2))


def typical_components(table: pd.DataFrame, arms: Sequence[str]) -> Components | None:
    """The median over arms of each variance; None if no arm has one.

    Args:
        table: rows of `variance_components.csv` of one measure.
        arms: the arms to use.
    """
    rows = table[table["arm"].isin(arms)].dropna(subset="run_sd")
    if rows.empty:
        return None
    run_sd, residual_sd, arm_case_sd = rows[["run_sd", "residual_sd", "arm_case_sd"]].pow(2).median().pow(0.5)
    return Components(float(run_sd), float(residual_sd), float(arm_case_sd))


TRAIN_SEGMENTER = "train_segmenter"
STAGES_PER_RUN = {TRAIN_SEGMENTER: False, "predict": True, "evaluate": True}
"""Stages with a job per arm and replicate, and whether its time grows with the test cases."""
STAGES_PER_SCAN = ("simulate", "index", "prepare", "collect", "qc", "checksums")
"""Stages that process all scans."""


@dataclass(frozen=True)
class Costs:
    """Hours of the stages of a benchmark, and the size of benchmark they were measured on."""

    hours_of: Mapping[str, float]
    """By stage, summed over all its jobs."""
    replicates: int
    """Independent ones."""
    test_cases: int
    scans: int
    per_replicate: tuple[str, ...] = ()
    """Further stages that grow with the replicates."""

    def hours(self, replicates: int, test_cases: int) -> float:
        """Hours of the same arms with these numbers of independent replicates and test cases."""
        more_runs, more_cases = replicates / self.replicates, test_cases / self.test_cases
        more_scans = (self.scans + test_cases - self.test_cases) / self.scans
        total = 0.0
        for stage, hours in self.hours_of.items():
            if stage in self.per_replicate:
                total += hours * more_runs
            elif stage in STAGES_PER_RUN:
                total += hours * more_runs * (more_cases if STAGES_PER_RUN[stage] else 1.0)
            else:
                total += hours * (more_scans if stage in STAGES_PER_SCAN else 1.0)
        return total


def costs_of_timing(
    timing: pd.DataFrame,
    n_runs: int,
    replicates: int,
    test_cases: int,
    scans: int,
    per_replicate: tuple[str, ...] = (),
) -> Costs:
    """The costs of a benchmark of `n_runs` runs, from the times of one that may have had more or fewer.

    Args:
        timing: rows of `timing.csv`.
        n_runs: arms x replicates (fold x seed) to account for.
        replicates: independent ones, in `n_runs`.
        test_cases: of the run that was timed.
        scans: all scans of that run, of any role.
        per_replicate: further stages that grow with the replicates.
    """
    by_stage = timing.groupby("stage")["seconds"]
    hours = {
        str(stage): (seconds.mean() * n_runs if stage in STAGES_PER_RUN else seconds.sum()) / 3600
        for stage, seconds in by_stage
    }
    return Costs(hours, replicates, test_cases, scans, per_replicate)


def sufficient_designs(design: Design, components: Components, difference: float, costs: Costs | None) -> list[Design]:
    """Designs with a power of `POWER` for a difference: one with the present test cases, and a cheaper one with more.

    Args:
        design: of the run.
        components: known, not estimated.
        difference: positive, in the measure's unit.
        costs: of the run; None takes replicates x test cases as the cost.

    Returns:
        None, one or two designs, each with the fewest replicates that suffice.
    """

    def price(one: Design) -> float:
        return hours_of_design(one, design, costs) if costs else float(one.n_independent * one.n_cases)

    least = max(design.n_cases, minimum_cases(design.n_compared, design.confidence))
    able = [
        found
        for n_cases in dict.fromkeys(round(least * factor) for factor in _MORE_CASES)
        if (found := _fewest_replicates(replace(design, n_cases=n_cases), components, difference)) is not None
    ]
    as_many = [one for one in able if one.n_cases == design.n_cases]
    cheapest = min(able, key=price, default=None)
    if cheapest is not None and (not as_many or price(cheapest) < price(as_many[0])):
        return [*as_many, cheapest]
    return as_many


def hours_of_design(wanted: Design, own: Design, costs: Costs) -> float:
    """Hours of a design; `own` has its cases with a nodule among the test cases of `costs`."""
    return costs.hours(wanted.n_independent, round(costs.test_cases * wanted.n_cases / own.n_cases))


def _fewest_replicates(design: Design, components: Components, difference: float) -> Design | None:
    low, high = 1, _MOST_REPLICATES
    if power_of_design(replace(design, n_independent=high), components, difference) < POWER:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        enough = power_of_design(replace(design, n_independent=middle), components, difference) >= POWER
        low, high = (low, middle) if enough else (middle, high)
    return replace(design, n_independent=high)
