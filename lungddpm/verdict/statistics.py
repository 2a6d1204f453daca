"""Is an arm better than `real`? Both training runs and patients are treated as random samples.

An observed difference depends on two random choices: the patients of the test set, and the outcome of the training
runs. Multi-reader multi-case analysis, radiology's standard for crossed readers and cases, covers both; here
independent training runs are its readers and the arms its modalities. Its figure of merit is a mean over cases, so the
covariances that it needs are those of the cases themselves, without a jackknife.

With theta_ij the mean score of arm i in replicate j, and R replicates (Obuchowski & Rockette's model):

    Var(arm - baseline) = 2/R [MS(TR) + R max(Cov2 - Cov3, 0)] = T + P

MS(TR) is the mean square of arm x replicate, i.e. the run-to-run variance. It is estimated from all arms, as is usual
with more than two modalities, because the few runs of a single pair estimate it too poorly.
If there are several baselines (the real cases alone, for several numbers of real cases), each arm is compared with its
own, and the common effect of a replicate is removed separately for the arms of each baseline: they train on different
real cases, so fold 0 of one is not fold 0 of another.
P is the variance due to the choice of patients, common to all replicates; it is estimated from the compared pair
alone, because its cases estimate it well and it differs between arms.

Degrees of freedom. Hillis gives (T + P)^2 / (T^2 / df(TR)), which takes P as known. If that exceeds the number of
cases minus one, there are too few cases for it, and Satterthwaite's formula with both terms is used:
(T + P)^2 / (T^2 / df(TR) + B^2 / (cases - 1)), B being the variance between cases, which includes P; the
result is never below cases - 1. With fewer than `MINIMUM_RUN_DF` degrees of freedom MS(TR) comes out near 0 too often
by chance, and df(TR) itself is used.

Order of the tests. Arms of a family are corrected by Holm. A family may have another family as its gate: then its arms
are tested only if every arm of the gate was decided (serial gatekeeping; with a gate of one arm, the fixed-sequence
test). Both are tested at the full level, and the familywise error stays at that level: if some arm of the gate truly
does not differ, the rest is reached only after a false claim in the gate; if all of them differ, false claims are only
possible in the rest, where its own correction limits them.

Several test sets. If the same arms are compared on further test sets, each is a comparison of its own: cases are
paired within a set, training runs are the same. The error of the claims on all sets together is controlled: p after
Holm's correction within a set is multiplied by the number of sets (Bonferroni), which holds for any dependence.

Independent runs. Runs of the same fold share its split of the training cases, so seeds are averaged within a fold and
folds are counted. If only one fold is trained, its seeds are the replicates, and variation between folds is not
covered. Without any estimate of MS(TR) (a single replicate everywhere) nothing is decided.

Sources: Obuchowski & Rockette (1995), Communications in Statistics - Simulation and Computation 24:285; degrees of
freedom by Hillis (2007), Statistics in Medicine 26:596; Satterthwaite (1946), Biometrics Bulletin 2:110; power by
Hillis, Obuchowski & Berbaum (2011), Academic Radiology 18:129; Holm (1979), Scandinavian Journal of Statistics 6:65;
gatekeeping by Westfall & Krishen (2001), Journal of Statistical Planning and Inference 99:25, and Dmitrienko & Tamhane
(2007), Pharmaceutical Statistics 6:171; the range of a sum of variances by Graybill & Wang (1980), Journal of the
American Statistical Association 75:869.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from scipy import special, stats

from lungddpm.core.text import bound, format_p, plural, signed

Outcome = Literal["baseline", "better", "worse", "no difference shown", "cannot tell", "not measured"]
POWER = 0.8
"""Power: probability of detecting the difference called detectable."""
RANGE = 0.8
"""Level of the range given with a detectable difference."""
MINIMUM_CASES = 6
"""With fewer cases nothing is decided: five that all agree give p = 0.06 in the two-sided sign test."""
MINIMUM_RUN_DF = 4
"""Below this, the test uses df(TR) alone: in simulations, more would give 7 % false claims with 3 and 12 % with 1."""
SMALL_TEST_SET = 30
"""With fewer cases the sentence warns."""
_EQUAL = 1e-9
_BAND_POINTS = 41


def minimum_cases(n_compared: int, confidence: float) -> int:
    """Test cases needed for a decision: the fewest that are significant if all agree (two-sided sign test).

    Args:
        n_compared: arms in the family; the strictest level of Holm's correction is divided by this number.
        confidence: of the decision, e.g. 0.95.
    """
    strictest = (1 - confidence) / n_compared
    return max(MINIMUM_CASES, math.floor(1 - math.log2(strictest)) + 1)


@dataclass(frozen=True)
class MeanSquare:
    """A mean square of an analysis of variance; `value` is NaN if `df` is 0."""

    value: float
    df: int


@dataclass(frozen=True)
class Effect:
    """A weighted sum of arms' mean scores, with its standard error over trainings and patients.

    Standard error and degrees of freedom are NaN with a single case.
    """

    value: float
    from_patients: float
    """Variance due to the choice of patients (P)."""
    from_runs: MeanSquare
    """Variance due to training runs (T); 0 with 0 degrees of freedom if unknown."""
    case_df: float
    """Cases minus one; NaN if that is 0."""
    between_cases: float
    """Variance of its mean over replicates if only the cases were random (B); NaN with a single case."""

    @property
    def covers_runs(self) -> bool:
        """Whether `standard_error` covers variation between training runs."""
        return self.from_runs.df > 0

    @property
    def variance(self) -> float:
        """The square of `standard_error`."""
        return self.from_patients + self.from_runs.value

    @property
    def standard_error(self) -> float:
        """Of `value`."""
        return math.sqrt(self.variance)

    @property
    def df(self) -> float:
        """Degrees of freedom of `standard_error`."""
        runs = self.from_runs
        if not runs.df:
            return self.case_df
        if runs.df < MINIMUM_RUN_DF:
            return float(runs.df)
        if not runs.value:
            return self.case_df
        hillis = runs.df * (self.variance / runs.value) ** 2
        if hillis <= self.case_df:
            return hillis
        both = self.variance**2 / (runs.value**2 / runs.df + self.between_cases**2 / self.case_df)
        return max(both, self.case_df)

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
        """The true effect that a two-sided test at `significance` would detect with probability `POWER`.

        By the noncentral t distribution. The variance of a few runs is underestimated more often than not, so here,
        where no test corrects for that, its median-unbiased estimate is used. It remains an estimate: see
        `detectable_range`.
        """
        return self._median_unbiased()._detectable(significance)

    def detectable_range(self, significance: float) -> tuple[float, float]:
        """(low, high): range of `detectable` given the uncertainty of the variances; level `RANGE`.

        The range of the sum of both variances is that of Graybill and Wang.
        """
        estimate = self.detectable(significance)
        low, high = (
            self._at_limit(quantile)._detectable(significance) for quantile in ((1 + RANGE) / 2, (1 - RANGE) / 2)
        )
        return min(low, estimate), max(high, estimate)

    def _at_limit(self, quantile: float) -> Effect:
        """`detectable` with each variance at the chi-squared `quantile` of its estimate, combined."""
        parts = (self.from_runs.value, self.from_runs.df), (self.between_cases, self.case_df)
        steps = [value * (df / float(stats.chi2.ppf(quantile, df)) - 1) if df else 0.0 for value, df in parts]
        length = math.hypot(*steps)
        of_runs, of_cases = (step * abs(step) / length if length else 0.0 for step in steps)
        runs, cases = self.from_runs, self.between_cases
        return replace(
            self,
            from_runs=replace(runs, value=max(runs.value + of_runs, 0.0)),
            from_patients=max(self.from_patients + of_cases, 0.0),
            between_cases=max(cases + of_cases, 0.0),
        )

    def _detectable(self, significance: float) -> float:
        critical = stats.t.isf(significance / 2, self.df)
        return float(special.nctdtrinc(self.df, 1 - POWER, critical)) * self.standard_error

    def _median_unbiased(self) -> Effect:
        runs = self.from_runs
        if not runs.df:
            return self
        return replace(self, from_runs=replace(runs, value=runs.value * runs.df / float(stats.chi2.median(runs.df))))


def effect(sums: np.ndarray, squared_weights: float, interaction: MeanSquare, scale: float = 1.0) -> Effect:
    """Infer a weighted sum of arms from its value in every replicate and case.

    Without MS(TR), only the variance over patients is known: this is the one-sample t test over cases. With MS(TR) but
    one replicate, the case variance includes the residual of the runs, so a small part is counted twice.

    Args:
        sums: (replicates, cases), finite; e.g. scores of an arm minus those of the baseline. Replicates are
            independent of each other.
        squared_weights: sum of the arms' squared weights; 2 for a difference of two arms.
        interaction: MS(TR), from `arm_by_replicate`.
        scale: factor on MS(TR), if the replicates are averages over fewer runs than those it was estimated from.
    """
    n_replicates, n_cases = sums.shape
    value, case_df, no_runs = float(sums.mean()), n_cases - 1, MeanSquare(0.0, 0)
    if n_cases < 2:
        return Effect(value, math.nan, no_runs, math.nan, math.nan)
    # Covariance of the replicates over cases; for a difference of two arms its off-diagonal mean is 2 (Cov2 - Cov3).
    covariance = np.atleast_2d(np.cov(sums)) / n_cases
    between_cases = float(covariance.mean())
    from_patients = between_cases
    if n_replicates > 1:
        shared = (covariance.sum() - covariance.trace()) / (n_replicates * (n_replicates - 1))
        from_patients = max(float(shared), 0.0)
    from_runs = no_runs
    if interaction.df:
        from_runs = MeanSquare(squared_weights * scale * interaction.value / n_replicates, interaction.df)
    return Effect(value, from_patients, from_runs, case_df, between_cases)


def arm_by_replicate(means: np.ndarray, groups: Sequence[int] | None = None) -> MeanSquare:
    """MS(TR): residual mean square of the arms' mean scores after removing arm and replicate effects.

    Args:
        means: (arms, replicates), NaN if a replicate of an arm is missing.
        groups: group index of each arm: replicate effects differ between groups; None if there is one group.
    """
    n_arms, n_replicates = means.shape
    arm, replicate = np.nonzero(np.isfinite(means))
    group = np.zeros(n_arms, int) if groups is None else np.array(groups)
    design = np.hstack([np.eye(n_arms)[arm], np.eye(n_arms * n_replicates)[group[arm] * n_replicates + replicate]])
    observed = means[arm, replicate]
    fit, _, rank, _ = np.linalg.lstsq(design, observed)
    df = len(observed) - int(rank)
    residual = observed - design @ fit
    return MeanSquare(float(residual @ residual) / df if df else math.nan, df)


@dataclass(frozen=True)
class Paired:
    """Arms restricted to their common runs and cases."""

    scores: np.ndarray
    """(arms, independent replicates, cases): averages over the common runs of each replicate."""
    n_runs: np.ndarray
    """(independent replicates,): number of runs averaged."""


@dataclass(frozen=True)
class Scores:
    """One measure of all arms; larger is better.

    Runs are paired over arms by fold and seed, cases by identity.
    """

    values: np.ndarray
    """(arms, runs, cases); finite wherever `evaluated`."""
    evaluated: np.ndarray
    """(arms, runs), bool: whether that run of the arm is there."""
    folds: tuple[int, ...] | None = None
    """The fold of each run; None if all are different."""
    baselines: tuple[int, ...] | None = None
    """The arm that each arm is compared with, for a baseline itself; None: the first arm for all."""

    @classmethod
    def over_scored_cases(
        cls,
        values: np.ndarray,
        evaluated: np.ndarray,
        folds: tuple[int, ...] | None = None,
        baselines: tuple[int, ...] | None = None,
    ) -> Scores:
        """Leave out cases that are NaN in any evaluated run."""
        return cls(values[:, :, np.isfinite(values[evaluated]).all(axis=0)], evaluated, folds, baselines)

    def baseline_of(self, arm: int) -> int:
        """The arm that an arm is compared with."""
        return self.baselines[arm] if self.baselines is not None else 0

    @cached_property
    def replicates(self) -> list[list[int]]:
        """The runs of each independent replicate: those of a fold, or each run alone if there is one fold or none."""
        runs = range(self.evaluated.shape[1])
        if self.folds is None or len(set(self.folds)) == 1:
            return [[run] for run in runs]
        return [[run for run in runs if self.folds[run] == fold] for fold in dict.fromkeys(self.folds)]

    @cached_property
    def interaction(self) -> MeanSquare:
        """MS(TR) over all arms."""
        means = np.full((len(self.values), len(self.replicates)), math.nan)
        for arm, replicate in np.ndindex(means.shape):
            found = self.paired(arm, replicates=[self.replicates[replicate]]).scores
            if found.size:
                means[arm, replicate] = found.mean()
        return arm_by_replicate(means, self.baselines)

    @cached_property
    def runs_per_replicate(self) -> float:
        """Harmonic mean over the arms' replicates of the number of runs in the averages behind `interaction`."""
        counts = np.array([self.evaluated[:, runs].sum(axis=1) for runs in self.replicates])
        return 1 / float((1 / counts[counts > 0]).mean())

    def paired(self, *arms: int, replicates: list[list[int]] | None = None) -> Paired:
        """These arms, restricted to the runs that all of them have."""
        common = np.all(self.evaluated[list(arms)], axis=0)
        shared = [[run for run in runs if common[run]] for runs in replicates or self.replicates]
        shared = [runs for runs in shared if runs]
        scores = [self.values[np.ix_(arms, runs)].mean(axis=1) for runs in shared]
        empty = np.empty((len(arms), 0, self.values.shape[2]))
        return Paired(np.stack(scores, axis=1) if scores else empty, np.array([len(runs) for runs in shared]))

    def contrast(self, weights: dict[int, float]) -> Effect:
        """Infer the sum of arms' mean scores with these weights (which add up to 0), by arm."""
        paired = self.paired(*weights)
        sums = np.tensordot(list(weights.values()), paired.scores, axes=1)
        # This assumes that all variance is that of single runs: averages of fewer of them then scatter more.
        scale = self.runs_per_replicate * float((1 / paired.n_runs).mean())
        return effect(sums, sum(weight**2 for weight in weights.values()), self.interaction, scale)


@dataclass(frozen=True)
class Comparison:
    """One arm against the baseline in one measure; differences are arm minus baseline."""

    n_cases: int
    n_replicates: int
    """Runs (fold x seed) that the arm has in common with the baseline."""
    n_independent: int
    """Independent ones among them: folds, or seeds if there is one fold."""
    n_evaluated: int
    """Runs of the arm that were evaluated."""
    mean: float
    sd: float
    """sd over cases, of their means over replicates."""
    baseline_mean: float
    verdict: Outcome
    family: str = ""
    """Arms that Holm's correction covers together."""
    difference: float = math.nan
    relative_percent: float = math.nan
    ci_low: float = math.nan
    """From the multi-reader multi-case analysis, like `p` and `df`; for this comparison alone, without Holm."""
    ci_high: float = math.nan
    bootstrap_low: float = math.nan
    bootstrap_high: float = math.nan
    p: float = math.nan
    p_holm: float = math.nan
    """Corrected for the `n_compared` comparisons of the family, and at least `p_gate`; decides."""
    n_compared: int = 0
    """Arms of the family, times the test sets whose claims hold together."""
    p_gate: float = math.nan
    """The largest `p_holm` of the arms that must be decided before this one; NaN if there are none."""
    p_wilcoxon: float = math.nan
    standard_error: float = math.nan
    df: float = math.nan
    run_df: int = 0
    """Degrees of freedom of MS(TR), i.e. of the run-to-run variance; 0 if it is unknown."""
    wins: int = 0
    ties: int = 0
    losses: int = 0
    detectable_difference: float = math.nan
    """Detected with probability `POWER` at the strictest level of Holm's correction for `n_compared` arms."""
    detectable_low: float = math.nan
    """Uncertainty of `detectable_difference`, at level `RANGE`."""
    detectable_high: float = math.nan


def compare_arms(
    scores: Scores,
    bootstraps: int,
    confidence: float,
    seed: int,
    families: Sequence[str] | None = None,
    gates: Mapping[str, str] | None = None,
    test_sets: int = 1,
) -> list[Comparison]:
    """Compare every arm with its baseline.

    An arm is better or worse if p after Holm's correction over the arms of its family is below 1 - `confidence`, and so
    are those of all arms of the family's gate. Nothing is decided ("cannot tell") with fewer test cases than
    `minimum_cases`, or if the run-to-run variance is unknown.

    Args:
        scores: of all arms.
        bootstraps: resamples for the bootstrap interval, which is descriptive only.
        confidence: level of both intervals, e.g. 0.95.
        seed: of the resampling.
        families: a name for each arm (not used for baselines): arms of the same name are corrected together,
            whatever their baselines; None: all arms are one family.
        gates: a family -> the family whose arms must all be decided first. A gate cannot have a gate itself.
        test_sets: number of test sets, including this one, on which the same arms are compared and whose claims are
            corrected together.

    Returns:
        One comparison per arm, in their order; a baseline has a row of its own.
    """
    n_arms = len(scores.values)
    families = [""] * n_arms if families is None else list(families)
    baselines = [scores.baseline_of(arm) for arm in range(n_arms)]
    effects = {
        arm: scores.contrast({arm: 1, baseline: -1})
        for arm, baseline in enumerate(baselines)
        if arm != baseline and scores.paired(arm, baseline).scores.size
    }
    corrected = _corrected(effects, families, test_sets)
    n_cases = scores.values.shape[2]
    decidable = {
        arm
        for arm, (_, n_compared) in corrected.items()
        if n_compared and n_cases >= minimum_cases(n_compared, confidence) and effects[arm].covers_runs
    }
    compared = [arm for arm, baseline in enumerate(baselines) if arm != baseline]
    p_gates = {
        family: max(corrected[arm][0] if arm in decidable else 1.0 for arm in compared if families[arm] == gate)
        for family, gate in (gates or {}).items()
    }
    counts = scores.evaluated.sum(axis=1)
    rows = []
    for arm, baseline in enumerate(baselines):
        paired = scores.paired(arm, baseline)
        if arm == baseline and paired.scores.size:
            rows.append(_row(paired, 0, int(counts[arm]), "baseline"))
            continue
        if arm not in effects:
            rows.append(_nothing(paired, int(counts[arm])))
            continue
        found, (p_holm, n_compared) = effects[arm], corrected[arm]
        p_gate = p_gates.get(families[arm], math.nan)
        p_holm = float(np.fmax(p_holm, p_gate)) if n_compared else p_holm
        differences = paired.scores[0] - paired.scores[1]
        verdict: Outcome = "no difference shown"
        if arm not in decidable:
            verdict = "cannot tell"
        elif p_holm < 1 - confidence:
            verdict = "better" if found.value > 0 else "worse"
        per_case = differences.mean(axis=0)
        wins, losses = int((per_case > _EQUAL).sum()), int((per_case < -_EQUAL).sum())
        ci_low, ci_high = found.interval(confidence)
        bootstrap_low, bootstrap_high = bootstrap_interval(differences, bootstraps, confidence, seed)
        detectable = low = high = math.nan
        if verdict != "cannot tell":
            level = (1 - confidence) / n_compared
            detectable, (low, high) = found.detectable(level), found.detectable_range(level)
        baseline_mean = float(paired.scores[1].mean())
        rows.append(
            replace(
                _row(paired, 1, int(counts[arm]), verdict),
                family=families[arm],
                difference=found.value,
                relative_percent=100 * found.value / baseline_mean if baseline_mean else math.nan,
                ci_low=ci_low,
                ci_high=ci_high,
                bootstrap_low=bootstrap_low,
                bootstrap_high=bootstrap_high,
                p=found.p(),
                p_holm=p_holm,
                n_compared=n_compared,
                p_gate=p_gate,
                p_wilcoxon=wilcoxon_p(per_case),
                standard_error=found.standard_error,
                df=found.df,
                run_df=found.from_runs.df,
                wins=wins,
                ties=len(per_case) - wins - losses,
                losses=losses,
                detectable_difference=detectable,
                detectable_low=low,
                detectable_high=high,
            )
        )
    return rows


def _corrected(effects: Mapping[int, Effect], families: Sequence[str], test_sets: int) -> dict[int, tuple[float, int]]:
    """p after Holm's correction within the arm's family and Bonferroni's over test sets, and the number of comparisons
    it is corrected for, by arm."""
    corrected: dict[int, tuple[float, int]] = {}
    for family in dict.fromkeys(families[arm] for arm in effects):
        members = [arm for arm in effects if families[arm] == family]
        adjusted = np.minimum(test_sets * holm(np.array([effects[arm].p() for arm in members])), 1)
        n_compared = test_sets * int(np.isfinite(adjusted).sum())
        corrected |= {arm: (float(p), n_compared) for arm, p in zip(members, adjusted, strict=True)}
    return corrected


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's step-down correction of (n,) p values; NaN stays NaN and is not counted."""
    corrected = np.full(len(p), math.nan)
    order = np.argsort(p)[: np.isfinite(p).sum()]
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1)
    return corrected


@dataclass(frozen=True)
class DoseResponse:
    """A straight line through the arms of one generator over their dose, their baseline being dose 0."""

    slope: Effect
    """Gain per dose of 1, i.e. for as many synthetic as real cases."""
    doses: np.ndarray
    """(points,), from 0 to the largest dose."""
    fitted: np.ndarray
    """(points,), the line as a difference from the baseline's own mean."""
    low: np.ndarray
    high: np.ndarray
    """(points,), pointwise confidence limits of `fitted`."""


def dose_response(scores: Scores, doses: dict[int, float], confidence: float) -> DoseResponse:
    """Fit a line by least squares; each of its values is a contrast of arms, with the inference of one.

    Args:
        scores: of all arms.
        doses: by arm, at least two different ones with the same baseline, which is added at dose 0.
        confidence: level of the band.
    """
    doses = {scores.baseline_of(min(doses)): 0.0} | doses
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
    """Two-sided Wilcoxon signed-rank p of (cases,) differences; 1 if no case differs."""
    differences = np.where(np.abs(differences) <= _EQUAL, 0, differences)
    if not differences.any():
        return 1.0
    # Rounding keeps equal differences tied that differ in binary floating point.
    return float(stats.wilcoxon(np.round(differences, 12)).pvalue)


def sentence(arm: str, baseline: str, measure: str, comparison: Comparison, confidence: float) -> str:
    """The claim about an arm, with its numbers and their limits.

    The measure must be between 0 and 1.
    """
    c = comparison
    if c.verdict == "not measured":
        why = "because no test case has a nodule"
        if not c.n_replicates:
            why = (
                f"because it has no replicate in common with {baseline}"
                if c.n_evaluated
                else "because none of its replicates were evaluated"
            )
        return f"{arm}: {measure} was not measured {why}."
    size = f"{plural(c.n_cases, 'case')}, {plural(c.n_replicates, 'replicate')}"
    if c.n_independent < c.n_replicates:
        size += f" in {plural(c.n_independent, 'fold')}"
    if c.verdict == "baseline":
        spread = "" if math.isnan(c.sd) else f" (sd over cases {c.sd:.3f})"
        return f"{arm}: mean {measure} {c.mean:.3f}{spread}; {size}. The other arms are compared with this one."
    claim = {
        "no difference shown": f"no difference from {baseline} shown",
        "cannot tell": f"this run cannot tell whether it differs from {baseline}",
    }.get(c.verdict, f"{c.verdict} than {baseline}")
    relative = "" if math.isnan(c.relative_percent) else f", {signed(c.relative_percent, 1)} %"
    numbers = [signed(c.difference) + relative]
    if not math.isnan(c.p):
        scope = " over patients alone" if not c.run_df else ""
        others = c.family or "arms"
        correction = f" after correction for {c.n_compared} {others}" if c.n_compared > 1 else ""
        numbers += [
            f"{100 * confidence:g} % CI {bound(c.ci_low)} to {bound(c.ci_high)}{scope}",
            f"p {format_p(c.p_holm, 1 - confidence)}{correction}",
        ]
    parts = [
        f"{arm}: {claim}. Mean {measure} {c.mean:.3f} against {c.baseline_mean:.3f} ({'; '.join(numbers)}); "
        f"{size}: {c.wins} better, {c.ties} equal, {c.losses} worse.",
        *_limits(c, baseline, confidence),
        *caveats(c.n_cases, c.n_independent, c.run_df, minimum_cases(max(c.n_compared, 1), confidence)),
    ]
    return " ".join(parts)


def caveats(n_cases: int, n_independent: int, run_df: int, needed_cases: int = MINIMUM_CASES) -> list[str]:
    """The limits of a comparison of this size, as sentences.

    Args:
        n_cases: test cases scored.
        n_independent: replicates with different folds, or seeds of a single fold.
        run_df: degrees of freedom of MS(TR), over all arms.
        needed_cases: from `minimum_cases`.
    """
    warnings = []
    if n_cases < needed_cases:
        warnings.append(
            f"Only {plural(n_cases, 'test case')}: too few to decide anything. With fewer than {needed_cases}, "
            "all cases agree by chance too often."
        )
    elif n_cases < SMALL_TEST_SET:
        warnings.append(f"Only {n_cases} test cases: too few to represent patients in general.")
    if not run_df and n_independent == 1:
        warnings.append(
            "One replicate: the run-to-run variance is not known, and another seed may reverse the result. "
            "Nothing is decided."
        )
    elif 0 < run_df < MINIMUM_RUN_DF:
        warnings.append(
            f"The run-to-run variance is estimated with {plural(run_df, 'degree')} of freedom. With fewer than "
            f"{MINIMUM_RUN_DF} it is often underestimated, so the test is stricter. More replicates would help."
        )
    elif n_independent == 1:
        warnings.append("One replicate in common: the run-to-run variance is taken from the other arms.")
    return warnings


def detectable_text(comparison: Comparison, baseline: str) -> str:
    """The true difference that the comparison could have detected, as a sentence; empty if unknown.

    The measure is between 0 and 1: the sentence does not mention a gain or loss for which the baseline leaves no room.
    """
    c = comparison
    if math.isnan(c.detectable_difference) or c.detectable_difference <= _EQUAL:
        return ""
    size = f"about {c.detectable_difference:.2g} ({c.detectable_low:.2g} to {c.detectable_high:.2g})"
    room = {"gain": 1 - c.baseline_mean, "loss": c.baseline_mean}
    possible = [name for name, most in room.items() if c.detectable_difference <= most]
    if not possible:
        return (
            f"This run is too small to detect even the largest possible difference reliably: that would take {size}, "
            f"but {baseline} leaves room for a gain of {room['gain']:.2f} and a loss of {room['loss']:.2f}."
        )
    shown = "difference" if len(possible) == 2 else possible[0]
    text = f"A true {shown} of {size} would be detected with {100 * POWER:.0f} % probability; a smaller one may exist."
    if len(possible) == 1:
        other = "loss" if shown == "gain" else "gain"
        text += f" A {other} of that size is impossible: {baseline} leaves room for {room[other]:.3f}."
    return text


def _resampling_weights(n: int, bootstraps: int, generator: np.random.Generator) -> np.ndarray:
    """(bootstraps, n): frequency of each of n units in n draws with replacement."""
    drawn = generator.integers(0, n, (bootstraps, n)) + n * np.arange(bootstraps)[:, None]
    return np.bincount(drawn.ravel(), minlength=n * bootstraps).reshape(bootstraps, n) / n


def _limits(c: Comparison, baseline: str, confidence: float) -> list[str]:
    """Caveats against over-interpreting a comparison, as sentences."""
    limits = []
    if not c.wins and not c.losses:
        limits.append("Every case scored the same in both arms: check that the arms differ.")
    if c.verdict != "no difference shown":
        return limits
    if c.p_gate >= 1 - confidence:
        alone = (
            f", although it would be significant alone (p {format_p(c.p, 1 - confidence)})"
            if c.p < 1 - confidence
            else ""
        )
        return [*limits, f"Not claimed{alone}: the primary arms come first, and not all of them were decided."]
    if c.p < 1 - confidence <= c.p_holm:
        alone = format_p(c.p, 1 - confidence)
        limits.append(f"Significant alone (p {alone}), but not as one of {c.n_compared} comparisons.")
    if text := detectable_text(c, baseline):
        limits.append(text)
    return limits


def _row(paired: Paired, baseline: int, n_evaluated: int, verdict: Outcome) -> Comparison:
    """A comparison of the first paired arm with the `baseline`-th, without any inference."""
    own = paired.scores[0]
    per_case = own.mean(axis=0)
    sd = float(per_case.std(ddof=1)) if own.shape[1] > 1 else math.nan
    sizes = (own.shape[1], int(paired.n_runs.sum()), own.shape[0], n_evaluated)
    return Comparison(*sizes, float(own.mean()), sd, float(paired.scores[baseline].mean()), verdict)


def _nothing(paired: Paired, n_evaluated: int) -> Comparison:
    sizes = (paired.scores.shape[2], int(paired.n_runs.sum()), len(paired.n_runs), n_evaluated)
    return Comparison(*sizes, math.nan, math.nan, math.nan, "not measured")
