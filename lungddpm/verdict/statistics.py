"""Is an arm better than `real`? Trainings and patients are both taken as samples of many more.

Two things decide by chance whether a difference comes out: which patients are in the test set, and how a training run
happens to end. Multi-reader multi-case analysis, radiology's standard where readers and cases are crossed, covers
both; here the replicates (fold x seed) are its readers and the arms its modalities. Its figure of merit is a mean over
cases, so the covariances that it needs are those of the cases themselves, without a jackknife.

With theta_ij the mean score of arm i in replicate j, and R replicates (Obuchowski & Rockette's model):

    Var(arm - baseline) = 2/R [MS(TR) + R max(Cov2 - Cov3, 0)]
    df = [MS(TR) + R max(Cov2 - Cov3, 0)]^2 / {MS(TR)^2 / df(TR)}

MS(TR) is the mean square of arm x replicate: how differently training runs end that should end alike. It comes from
all arms, as is usual with more than two modalities, because the few runs of a single pair tell it too poorly.
Cov2 - Cov3 is how far the choice of patients moves the difference in all replicates alike; it comes from the compared
pair alone, because hundreds of cases tell it well and arms differ in it. One thing is added for small test sets: df is
never larger than the number of cases less one, which is what it would be if only the choice of patients mattered.

Sources: Obuchowski & Rockette (1995), Communications in Statistics - Simulation and Computation 24:285; degrees of
freedom by Hillis (2007), Statistics in Medicine 26:596; power by Hillis, Obuchowski & Berbaum (2011), Academic
Radiology 18:129; Holm (1979), Scandinavian Journal of Statistics 6:65.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from scipy import special, stats

Outcome = Literal["baseline", "better", "worse", "no difference shown", "not measured"]
POWER = 0.8
"""Probability with which a run should show the difference that it is said to be able to show."""
MINIMUM_CASES = 6
"""Below this many cases nothing is decided: with five that all agree, the two-sided sign test gives p = 0.06."""
SMALL_TEST_SET = 30
"""Below this many cases the sentence warns."""
_EQUAL = 1e-9
_BAND_POINTS = 41


@dataclass(frozen=True)
class MeanSquare:
    """A mean square of an analysis of variance; `value` is NaN where `df` is 0."""

    value: float
    df: int


@dataclass(frozen=True)
class Effect:
    """A weighted sum of arms' mean scores, with its standard error over trainings and patients.

    Standard error and degrees of freedom are NaN where there is only one case.
    """

    value: float
    from_patients: float
    """Variance that the choice of patients gives it."""
    from_runs: MeanSquare
    """Variance that the luck of training runs gives it; 0 where it cannot be told, with one replicate."""
    case_df: float
    """Cases less one; NaN where that is 0."""

    @property
    def standard_error(self) -> float:
        """Of `value`."""
        return math.sqrt(self.from_patients + self.from_runs.value)

    @property
    def df(self) -> float:
        """Degrees of freedom of `standard_error`."""
        if not self.from_runs.value:
            return self.case_df
        share = self.from_runs.value / (self.from_patients + self.from_runs.value)
        return min(self.from_runs.df / share**2, self.case_df)

    def p(self) -> float:
        """Two-sided p of the t test that the effect is 0."""
        if self.value == 0 and self.standard_error == 0:
            return 1.0
        with np.errstate(divide="ignore"):
            return float(2 * stats.t.sf(abs(np.divide(self.value, self.standard_error)), self.df))

    def interval(self, confidence: float) -> tuple[float, float]:
        """(low, high) of the t interval."""
        half = float(stats.t.isf((1 - confidence) / 2, self.df)) * self.standard_error
        return self.value - half, self.value + half

    def detectable(self, significance: float) -> float:
        """The true effect that a two-sided test at `significance` would show with probability `POWER`.

        By the noncentral t distribution. The scatter of a few runs comes out too small more often than not, so here,
        where no test corrects for that, its median-unbiased estimate is taken.
        """
        runs = self.from_runs
        if runs.value:
            runs = MeanSquare(runs.value * runs.df / float(stats.chi2.median(runs.df)), runs.df)
        expected = replace(self, from_runs=runs)
        critical = stats.t.isf(significance / 2, expected.df)
        return float(special.nctdtrinc(expected.df, 1 - POWER, critical)) * expected.standard_error


def effect(sums: np.ndarray, squared_weights: float, interaction: MeanSquare) -> Effect:
    """Infer a weighted sum of arms from its value in every replicate and case.

    With one replicate only the choice of patients can be inferred from: the one-sample t test over cases.

    Args:
        sums: (replicates, cases), finite; e.g. scores of an arm minus those of the baseline.
        squared_weights: sum of the arms' squared weights; 2 for a difference of two arms.
        interaction: MS(TR), from `arm_by_replicate`.
    """
    n_replicates, n_cases = sums.shape
    value, case_df, no_runs = float(sums.mean()), n_cases - 1, MeanSquare(0.0, 0)
    if n_cases < 2:
        return Effect(value, math.nan, no_runs, math.nan)
    # Of the replicates' means; for a difference of two arms its off-diagonal mean is 2 (Cov2 - Cov3).
    covariance = np.atleast_2d(np.cov(sums)) / n_cases
    if n_replicates == 1:
        return Effect(value, float(covariance[0, 0]), no_runs, case_df)
    shared = (covariance.sum() - covariance.trace()) / (n_replicates * (n_replicates - 1))
    from_runs = MeanSquare(squared_weights * interaction.value / n_replicates, interaction.df)
    return Effect(value, max(float(shared), 0.0), from_runs, case_df)


def arm_by_replicate(means: np.ndarray) -> MeanSquare:
    """MS(TR): what is left of the arms' mean scores after an effect of each arm and one of each replicate.

    Args:
        means: (arms, replicates), NaN where a replicate of an arm is missing.
    """
    arm, replicate = np.nonzero(np.isfinite(means))
    design = np.hstack([np.eye(means.shape[0])[arm], np.eye(means.shape[1])[replicate]])
    observed = means[arm, replicate]
    fit, _, rank, _ = np.linalg.lstsq(design, observed)
    df = len(observed) - int(rank)
    residual = observed - design @ fit
    return MeanSquare(float(residual @ residual) / df if df else math.nan, df)


@dataclass(frozen=True)
class Scores:
    """One measure of all arms, larger is better; the first arm is the baseline.

    Replicates are paired over arms by fold and seed, cases by identity.
    """

    values: np.ndarray
    """(arms, replicates, cases); finite wherever `evaluated`."""
    evaluated: np.ndarray
    """(arms, replicates), bool: whether that replicate of the arm is there."""

    @classmethod
    def over_scored_cases(cls, values: np.ndarray, evaluated: np.ndarray) -> Scores:
        """Leave out the cases that are NaN in any replicate that was evaluated."""
        return cls(values[:, :, np.isfinite(values[evaluated]).all(axis=0)], evaluated)

    @cached_property
    def interaction(self) -> MeanSquare:
        """MS(TR) over all arms."""
        means = np.full(self.evaluated.shape, math.nan)
        means[self.evaluated] = self.values[self.evaluated].mean(axis=1)
        return arm_by_replicate(means)

    def paired(self, *arms: int) -> np.ndarray:
        """Scores of these arms in the replicates that all of them have, (arms, replicates, cases)."""
        return self.values[list(arms)][:, self.evaluated[list(arms)].all(axis=0)]

    def contrast(self, weights: dict[int, float]) -> Effect:
        """Infer the sum of arms' mean scores with these weights (which add up to 0), by arm."""
        sums = np.tensordot(list(weights.values()), self.paired(*weights), axes=1)
        return effect(sums, sum(weight**2 for weight in weights.values()), self.interaction)


@dataclass(frozen=True)
class Comparison:
    """One arm against the baseline in one measure; differences are arm minus baseline."""

    n_cases: int
    n_replicates: int
    """Those that the arm has in common with the baseline."""
    mean: float
    sd: float
    """Over cases, of their means over replicates."""
    baseline_mean: float
    verdict: Outcome
    difference: float = math.nan
    relative_percent: float = math.nan
    ci_low: float = math.nan
    """Of the multi-reader multi-case analysis, as are `p` and `df`; for this comparison alone, without Holm."""
    ci_high: float = math.nan
    bootstrap_low: float = math.nan
    bootstrap_high: float = math.nan
    p: float = math.nan
    p_holm: float = math.nan
    """Corrected for `n_compared` arms; decides."""
    n_compared: int = 0
    p_wilcoxon: float = math.nan
    standard_error: float = math.nan
    df: float = math.nan
    wins: int = 0
    ties: int = 0
    losses: int = 0
    detectable_difference: float = math.nan
    """Shown with probability `POWER` at the strictest level that Holm asks of one of `n_compared` arms."""


def compare_arms(scores: Scores, bootstraps: int, confidence: float, seed: int) -> list[Comparison]:
    """Compare every arm with the first.

    An arm is better or worse where p after Holm's correction over all arms is below 1 - `confidence`, and there are at
    least `MINIMUM_CASES` cases.

    Args:
        scores: of all arms, the baseline first.
        bootstraps: resamples for the bootstrap interval, which describes and does not decide.
        confidence: level of both intervals, e.g. 0.95.
        seed: of the resampling.

    Returns:
        One comparison an arm, in their order; the baseline's own row first.
    """
    own = scores.paired(0)[0]
    measured = own.size > 0
    effects = {
        arm: scores.contrast({arm: 1, 0: -1})
        for arm in range(1, len(scores.values))
        if measured and scores.paired(arm, 0).size
    }
    corrected = dict(zip(effects, holm(np.array([found.p() for found in effects.values()])), strict=True))
    n_compared = int(np.isfinite(list(corrected.values())).sum())
    rows = [_row(own, own, "baseline") if measured else _nothing(own)]
    for arm in range(1, len(scores.values)):
        own, baseline = scores.paired(arm, 0)
        if arm not in effects:
            rows.append(_nothing(own))
            continue
        found, p_holm = effects[arm], float(corrected[arm])
        decidable = own.shape[1] >= MINIMUM_CASES
        verdict: Outcome = "no difference shown"
        if decidable and p_holm < 1 - confidence:
            verdict = "better" if found.value > 0 else "worse"
        per_case = (own - baseline).mean(axis=0)
        wins, losses = int((per_case > _EQUAL).sum()), int((per_case < -_EQUAL).sum())
        ci_low, ci_high = found.interval(confidence)
        bootstrap_low, bootstrap_high = bootstrap_interval(own - baseline, bootstraps, confidence, seed)
        rows.append(
            _row(
                own,
                baseline,
                verdict,
                difference=found.value,
                relative_percent=100 * found.value / baseline.mean() if baseline.any() else math.nan,
                ci_low=ci_low,
                ci_high=ci_high,
                bootstrap_low=bootstrap_low,
                bootstrap_high=bootstrap_high,
                p=found.p(),
                p_holm=p_holm,
                n_compared=n_compared,
                p_wilcoxon=wilcoxon_p(per_case),
                standard_error=found.standard_error,
                df=found.df,
                wins=wins,
                ties=len(per_case) - wins - losses,
                losses=losses,
                detectable_difference=found.detectable((1 - confidence) / n_compared) if decidable else math.nan,
            )
        )
    return rows


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's step-down correction of (n,) p values; NaN stays NaN and does not count."""
    corrected = np.full(len(p), math.nan)
    order = np.argsort(p)[: np.isfinite(p).sum()]
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1)
    return corrected


@dataclass(frozen=True)
class DoseResponse:
    """A straight line through the arms of one generator over their dose, `real` being dose 0."""

    slope: Effect
    """Gain a dose of 1, i.e. for as many synthetic cases as there are real ones."""
    doses: np.ndarray
    """(points,), from 0 to the largest dose."""
    fitted: np.ndarray
    """(points,), the line as a difference to the baseline's own mean."""
    low: np.ndarray
    high: np.ndarray
    """(points,), pointwise confidence limits of `fitted`."""


def dose_response(scores: Scores, doses: dict[int, float], confidence: float) -> DoseResponse:
    """Fit a line by least squares; every value of it is a contrast of arms and inferred like one.

    Args:
        scores: of all arms, the baseline first.
        doses: by arm, at least two different ones; the baseline is added at dose 0.
        confidence: level of the band.
    """
    doses = {0: 0.0} | doses
    given = np.array(list(doses.values()))
    spread = float(((given - given.mean()) ** 2).sum())
    centred = (given - given.mean()) / spread
    points = np.linspace(0, given.max(), _BAND_POINTS)
    line = []
    for point in points:
        weights = 1 / len(given) + (point - given.mean()) * centred
        weights[0] -= 1
        line.append(scores.contrast(dict(zip(doses, weights, strict=True))))
    low, high = np.transpose([value.interval(confidence) for value in line])
    slope = scores.contrast(dict(zip(doses, centred, strict=True)))
    return DoseResponse(slope, points, np.array([value.value for value in line]), low, high)


def bootstrap_interval(differences: np.ndarray, bootstraps: int, confidence: float, seed: int) -> tuple[float, float]:
    """Percentile interval of the mean difference; each resample draws replicates, then cases, with replacement.

    Replicates and cases are crossed (every replicate sees every case), so a resample draws one set of cases for all
    its replicates, as in Owen (2007), Annals of Applied Statistics 1:386 ("pigeonhole bootstrap").

    Args:
        differences: (replicates, cases), finite.
        bootstraps: number of resamples.
        confidence: level of the interval.
        seed: of the resampling.

    Returns:
        (low, high).
    """
    generator = np.random.default_rng(seed)
    of_replicates, of_cases = (_resampling_weights(n, bootstraps, generator) for n in differences.shape)
    means = ((of_cases @ differences.T) * of_replicates).sum(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def wilcoxon_p(differences: np.ndarray) -> float:
    """Two-sided Wilcoxon signed-rank p of (cases,) differences; 1 where no case differs."""
    differences = np.where(np.abs(differences) <= _EQUAL, 0, differences)
    if not differences.any():
        return 1.0
    # Rounding keeps equal differences tied that binary fractions would tell apart.
    return float(stats.wilcoxon(np.round(differences, 12)).pvalue)


def sentence(arm: str, baseline: str, measure: str, comparison: Comparison, confidence: float) -> str:
    """What a person may say about the arm, with the numbers and what they do not cover.

    The measure is one that lies between 0 and 1.
    """
    c = comparison
    if c.verdict == "not measured":
        why = "no test case has a nodule" if c.n_replicates else "none of its replicates was evaluated"
        return f"{arm}: {measure} was not measured, {why}."
    size = f"{count(c.n_cases, 'case')}, {count(c.n_replicates, 'replicate')}"
    if c.verdict == "baseline":
        spread = "" if math.isnan(c.sd) else f" (sd over cases {c.sd:.3f})"
        return f"{arm}: mean {measure} {c.mean:.3f}{spread}; {size}. The other arms are compared with this one."
    claim = f"no difference to {baseline} shown"
    if c.verdict != "no difference shown":
        claim = f"{c.verdict} than {baseline}" + (" in one training run" if c.n_replicates == 1 else "")
    relative = "" if math.isnan(c.relative_percent) else f", {signed(c.relative_percent, 1)} %"
    numbers = [signed(c.difference) + relative]
    if not math.isnan(c.p):
        correction = f" after correction for {c.n_compared} arms" if c.n_compared > 1 else ""
        numbers += [
            f"{100 * confidence:g} % CI {signed(c.ci_low)} to {signed(c.ci_high)}",
            f"p {format_p(c.p_holm)}{correction}",
        ]
    parts = [
        f"{arm}: {claim}. Mean {measure} {c.mean:.3f} against {c.baseline_mean:.3f} ({'; '.join(numbers)}); "
        f"{size}: {c.wins} better, {c.ties} equal, {c.losses} worse.",
        *_limits(c, confidence),
        *caveats(c.n_cases, c.n_replicates),
    ]
    return " ".join(parts)


def caveats(n_cases: int, n_replicates: int) -> list[str]:
    """What a comparison of this size does not cover, as sentences."""
    warnings = []
    if n_cases < MINIMUM_CASES:
        warnings.append(
            f"With {count(n_cases, 'test case')} nothing can be decided: fewer than {MINIMUM_CASES} agree too easily."
        )
    elif n_cases < SMALL_TEST_SET:
        warnings.append(f"Only {n_cases} test cases: they hardly stand for patients in general.")
    if n_replicates == 1:
        warnings.append("One replicate: the luck of a training run is not covered, another seed may turn the result.")
    return warnings


def signed(value: float, digits: int = 3) -> str:
    """A difference with its sign, a true minus, and no sign where it rounds to zero: "+0.032", "−0.117", "0.000"."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if text.strip("+-0.") else text[1:]


def format_p(p: float) -> str:
    """ "= 0.034", "= 0.21" or "< 0.001"."""
    return "< 0.001" if p < 0.001 else f"= {p:.3f}" if p < 0.1 else f"= {p:.2f}"


def count(number: int, noun: str) -> str:
    """ "1 case", "2 cases"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _resampling_weights(n: int, bootstraps: int, generator: np.random.Generator) -> np.ndarray:
    """(bootstraps, n): how often each of n units is drawn in n draws with replacement, divided by n."""
    drawn = generator.integers(0, n, (bootstraps, n)) + n * np.arange(bootstraps)[:, None]
    return np.bincount(drawn.ravel(), minlength=n * bootstraps).reshape(bootstraps, n) / n


def _limits(c: Comparison, confidence: float) -> list[str]:
    """What stands against reading more into a comparison than it shows, as sentences."""
    if c.verdict != "no difference shown":
        return []
    limits = []
    if not c.wins and not c.losses:
        limits.append("Every case scored the same in both: check that the arms differ.")
    if c.p < 1 - confidence <= c.p_holm:
        limits.append(f"Alone it would count (p {format_p(c.p)}), as one of {c.n_compared} comparisons it does not.")
    if c.detectable_difference > max(c.baseline_mean, 1 - c.baseline_mean):
        limits.append("A run of this size is not able to show even the largest possible difference reliably.")
    elif c.detectable_difference > _EQUAL:
        limits.append(
            f"A true difference of {c.detectable_difference:.3f} would have been shown with a probability of "
            f"{100 * POWER:.0f} %; a smaller one may exist."
        )
    return limits


def _row(own: np.ndarray, baseline: np.ndarray, verdict: Outcome, **inferred: float) -> Comparison:
    """A comparison from the (replicates, cases) scores of an arm and the baseline, and what was inferred of them."""
    n_replicates, n_cases = own.shape
    per_case = own.mean(axis=0)
    sd = float(per_case.std(ddof=1)) if n_cases > 1 else math.nan
    return Comparison(n_cases, n_replicates, float(own.mean()), sd, float(baseline.mean()), verdict, **inferred)


def _nothing(own: np.ndarray) -> Comparison:
    return Comparison(own.shape[1], own.shape[0], math.nan, math.nan, math.nan, "not measured")
