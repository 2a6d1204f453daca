"""The decision against published figures, statsmodels, scipy, brute force and simulated truth."""

import itertools
import math
import runpy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, stats
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from lungddpm.verdict.statistics import (
    Effect,
    MeanSquare,
    Scores,
    arm_by_replicate,
    bootstrap_interval,
    caveats,
    compare_arms,
    detectable_text,
    dose_response,
    effect,
    holm,
    minimum_cases,
    sentence,
    wilcoxon_p,
)


def scores_of(*arms, folds=None):
    """`Scores` from (replicates, cases) arrays, the baseline first; replicates of NaN alone were not evaluated."""
    values = np.array(arms, float)
    return Scores.over_scored_cases(values, ~np.isnan(values).all(axis=2), folds)


def compared(scores, baseline, confidence=0.95):
    return compare_arms(scores_of(np.atleast_2d(baseline), np.atleast_2d(scores)), 500, confidence, seed=3)[1]


def crossed(n_arms, n_replicates, n_cases, seed, replicate_sd=0.02):
    """Scores of arms that are alike, with all the variance components of the model."""
    rng = np.random.default_rng(seed)
    return (
        rng.normal(0.4, 0.2, n_cases)
        + rng.normal(0, 0.08, (n_arms, 1, n_cases))
        + rng.normal(0, replicate_sd, (n_arms, n_replicates, 1))
        + rng.normal(0, 0.1, (n_arms, n_replicates, n_cases))
    )


def with_components(mean, replicate_variance, case_variance, n_replicates, n_cases):
    """(replicates, cases) values whose sample variances between replicates' and cases' means are exactly these."""
    rng = np.random.default_rng(0)
    parts = [stats.zscore(rng.normal(size=n), ddof=1) for n in (n_replicates, n_cases)]
    return mean + math.sqrt(replicate_variance) * parts[0][:, None] + math.sqrt(case_variance) * parts[1]


# Van Dyke et al. (1993): 2 modalities, 5 readers, 114 cases, empirical AUC with jackknife covariances, as printed in
# the README of the R package MRMCaov 0.1.5 (Smith, Hillis, Pesce).


def test_published_example_of_two_modalities():
    ms_tr, cov2, cov3 = 0.0005510306, 0.0003440748, 0.0002390284
    difference = with_components(-0.04380032, 2 * ms_tr, 114 * 2 * (cov2 - cov3), 5, 114)
    found = scores_of(np.zeros((5, 114)), difference).contrast({1: 1, 0: -1})
    assert found.standard_error == pytest.approx(0.02074862, rel=1e-6)
    assert found.df == pytest.approx(15.25967, rel=1e-5)
    assert found.p() == pytest.approx(0.05166569, rel=1e-5)
    assert found.interval(0.95) == pytest.approx((-0.0879594986, 0.0003588544), abs=1e-7)


def test_published_example_of_one_modality():
    ms_r, cov2 = 0.003082629, 0.0004839618
    found = effect(with_components(0.8970370, ms_r, 114 * cov2, 5, 114), 1, MeanSquare(ms_r, df=4))
    assert (found.standard_error, found.df) == pytest.approx((0.03317360, 12.74465), rel=1e-5)
    assert found.interval(0.95) == pytest.approx((0.8252236, 0.9688505), abs=1e-6)


@pytest.mark.parametrize(
    ("n_replicates", "n_cases", "replicate_sd"), [(6, 9, 0.02), (6, 9, 0.3), (5, 60, 0.02), (3, 9, 0.02)]
)
def test_two_arms_are_the_mixed_anova_of_arm_replicate_and_case(n_replicates, n_cases, replicate_sd):
    values = crossed(2, n_replicates, n_cases, seed=1, replicate_sd=replicate_sd)
    index = pd.MultiIndex.from_product([range(n) for n in values.shape], names=["arm", "replicate", "case"])
    table = pd.DataFrame({"score": values.ravel()}, index=index).reset_index()
    model = "score ~ C(arm) * C(replicate) + C(arm) * C(case) + C(replicate) * C(case)"
    anova = anova_lm(ols(model, table).fit())
    ms = anova["sum_sq"] / anova["df"]
    runs, cases = ms["C(arm):C(replicate)"], ms["C(arm):C(case)"]
    denominator = runs + max(cases - ms["Residual"], 0)
    found = scores_of(*values).contrast({1: 1, 0: -1})
    assert (found.value / found.standard_error) ** 2 == pytest.approx(ms["C(arm)"] / denominator)
    hillis = denominator**2 / (runs**2 / (n_replicates - 1))
    satterthwaite = denominator**2 / (runs**2 / (n_replicates - 1) + cases**2 / (n_cases - 1))
    expected = hillis if hillis <= n_cases - 1 else max(satterthwaite, n_cases - 1)
    assert found.df == pytest.approx(2 if n_replicates == 3 else expected)


def test_several_arms_agree_with_jackknifed_covariances():
    n_arms, n_replicates, n_cases = 4, 3, 40
    values = crossed(n_arms, n_replicates, n_cases, seed=2)
    without = (values.sum(axis=2, keepdims=True) - values) / (n_cases - 1)  # the mean without each case
    pair = without[[0, 2]].reshape(2 * n_replicates, n_cases)
    covariance = (n_cases - 1) ** 2 / n_cases * np.cov(pair)
    cov2, cov3 = [], []
    for one, other in itertools.product(range(2 * n_replicates), repeat=2):
        if one % n_replicates != other % n_replicates:
            same_arm = one // n_replicates == other // n_replicates
            (cov2 if same_arm else cov3).append(covariance[one, other])
    means = values.mean(axis=2)
    residual = means - means.mean(0) - means.mean(1, keepdims=True) + means.mean()
    ms_tr = (residual**2).sum() / ((n_arms - 1) * (n_replicates - 1))
    denominator = ms_tr + max(n_replicates * (np.mean(cov2) - np.mean(cov3)), 0)
    found = scores_of(*values).contrast({2: 1, 0: -1})
    assert found.standard_error**2 == pytest.approx(2 / n_replicates * denominator)
    assert found.df == pytest.approx(denominator**2 / (ms_tr**2 / ((n_arms - 1) * (n_replicates - 1))))
    assert found.df < n_cases - 1


def test_arm_by_replicate_with_a_missing_run_agrees_with_statsmodels():
    means = crossed(4, 3, 20, seed=3).mean(axis=2)
    means[2, 1] = math.nan
    arm, replicate = np.indices(means.shape)
    table = pd.DataFrame({"mean": means.ravel(), "arm": arm.ravel(), "replicate": replicate.ravel()})
    theirs = ols("mean ~ C(arm) + C(replicate)", table).fit()
    ours = arm_by_replicate(means)
    assert (ours.value, ours.df) == (pytest.approx(theirs.mse_resid), theirs.df_resid)


def test_replicates_have_other_effects_for_each_baseline():
    means = crossed(6, 4, 20, seed=3).mean(axis=2)
    means[4, 1] = math.nan
    groups = [0, 0, 0, 3, 3, 3]
    arm, replicate = np.indices(means.shape)
    columns = {"mean": means.ravel(), "arm": arm.ravel(), "replicate": replicate.ravel()}
    table = pd.DataFrame(columns).assign(group=np.array(groups)[arm.ravel()]).dropna()
    theirs = [ols("mean ~ C(arm) + C(replicate)", part).fit() for _, part in table.groupby("group")]
    df = sum(fit.df_resid for fit in theirs)
    ours = arm_by_replicate(means, groups)
    assert (ours.value, ours.df) == (pytest.approx(sum(fit.ssr for fit in theirs) / df), df)
    # What all runs of a replicate of one number have in common counts for nothing.
    means[:3, 2] += 5
    moved = arm_by_replicate(means, groups)
    assert (moved.value, moved.df) == (pytest.approx(ours.value), ours.df)


def test_each_arm_is_compared_with_its_own_baseline_in_one_family():
    values = crossed(6, 5, 60, seed=11)
    values[2] += 0.2
    values[3:] += 0.3  # more real cases: all arms of that number are better
    values[5] -= 0.2
    scores = Scores(values, np.ones(values.shape[:2], bool), baselines=(0, 0, 0, 3, 3, 3))
    rows = compare_arms(scores, 200, 0.95, seed=1)
    verdicts = ["baseline", "no difference shown", "better", "baseline", "no difference shown", "worse"]
    assert [row.verdict for row in rows] == verdicts
    assert {row.n_compared for row in rows if row.verdict != "baseline"} == {4}
    for arm, baseline in ((1, 0), (2, 0), (4, 3), (5, 3)):
        assert rows[arm].difference == pytest.approx((values[arm] - values[baseline]).mean())
        assert rows[arm].baseline_mean == pytest.approx(values[baseline].mean())
    compared_arms = [row for row in rows if row.verdict != "baseline"]
    _, theirs, _, _ = multipletests([row.p for row in compared_arms], method="holm")
    np.testing.assert_allclose([row.p_holm for row in compared_arms], theirs)


def test_a_number_of_real_cases_without_a_baseline_is_not_measured():
    values = crossed(4, 3, 30, seed=5)
    values[2] = math.nan
    evaluated = ~np.isnan(values).all(axis=2)
    rows = compare_arms(Scores.over_scored_cases(values, evaluated, None, (0, 0, 2, 2)), 100, 0.95, seed=1)
    assert [row.verdict for row in rows[2:]] == ["not measured", "not measured"]
    assert rows[0].verdict == "baseline"
    assert np.isfinite(rows[1].p)


def test_slopes_start_at_their_own_baseline():
    values = crossed(6, 4, 30, seed=6)
    alone = Scores(values[3:], np.ones((3, 4), bool))
    both = Scores(values, np.ones((6, 4), bool), baselines=(0, 0, 0, 3, 3, 3))
    expected, found = dose_response(alone, {1: 1.0, 2: 2.0}, 0.95), dose_response(both, {4: 1.0, 5: 2.0}, 0.95)
    assert found.slope.value == pytest.approx(expected.slope.value)
    np.testing.assert_allclose(found.fitted, expected.fitted)


def test_one_replicate_is_the_paired_t_test_over_cases():
    baseline, scores = crossed(2, 1, 25, seed=4)
    theirs = stats.ttest_rel(scores[0], baseline[0])
    ours = compared(scores, baseline)
    assert ours.p == ours.p_holm == pytest.approx(theirs.pvalue)
    assert (ours.ci_low, ours.ci_high) == pytest.approx(tuple(theirs.confidence_interval(0.95)))
    sd = (scores - baseline).std(ddof=1)
    power = TTestPower().solve_power(nobs=25, alpha=0.05, power=0.8, alternative="two-sided")
    found = scores_of(baseline, scores).contrast({1: 1, 0: -1})
    assert found.detectable(0.05) == pytest.approx(power * sd, rel=1e-4)


@pytest.mark.parametrize(("df", "significance"), [(1, 0.05), (7, 0.05 / 8), (16, 0.05), (249, 0.01)])
def test_detectable_has_the_promised_power(df, significance):
    found = Effect(0.0, 4.0, MeanSquare(0.0, 0), df, 4.0).detectable(significance) / 2
    rng = np.random.default_rng(5)
    t = (rng.normal(found, 1, 200_000)) / np.sqrt(rng.chisquare(df, 200_000) / df)
    assert (2 * stats.t.sf(abs(t), df) < significance).mean() == pytest.approx(0.8, abs=0.004)


def test_detectable_comes_out_too_large_as_often_as_too_small_and_within_its_range():
    run_df, from_patients, from_runs = 4, 0.5, 1.0
    df = run_df * ((from_patients + from_runs) / from_runs) ** 2
    critical = stats.t.isf(0.025, df)
    true = math.sqrt(from_patients + from_runs) * optimize.brentq(
        lambda shift: stats.nct.sf(critical, df, shift) - 0.8, 1, 20
    )
    rng = np.random.default_rng(6)
    effects = [
        Effect(0.0, from_patients, MeanSquare(from_runs * drawn / run_df, run_df), 10_000, from_patients)
        for drawn in rng.chisquare(run_df, 4000)
    ]
    estimates = np.array([found.detectable(0.05) for found in effects])
    assert np.mean(estimates < true) == pytest.approx(0.5, abs=0.02)
    low, high = np.transpose([found.detectable_range(0.05) for found in effects])
    assert (low <= estimates).all()
    assert (estimates <= high).all()
    assert np.mean((low < true) & (true < high)) == pytest.approx(0.8, abs=0.06)


@pytest.mark.parametrize("p", [[0.01, 0.04, 0.03, 0.005], [0.2, 0.2, 0.01], [0.7, 0.9], [0.03], []])
def test_holm_agrees_with_statsmodels(p):
    theirs = multipletests(p, method="holm")[1] if p else []
    assert holm(np.array(p)) == pytest.approx(theirs)


def test_holm_leaves_out_what_has_no_p():
    assert holm(np.array([math.nan, 0.01, 0.04])) == pytest.approx([math.nan, 0.02, 0.04], nan_ok=True)


def test_by_hand():
    result = compared([[0.5, 0.7, 0.2], [0.7, 0.7, 0.4]], [[0.4, 0.7, 0.4], [0.4, 0.7, 0.6]])
    assert (result.n_cases, result.n_replicates) == (3, 2)
    assert (result.mean, result.baseline_mean) == pytest.approx((3.2 / 6, 3.2 / 6))
    assert result.sd == pytest.approx(np.std([0.6, 0.7, 0.3], ddof=1))
    assert (result.difference, result.relative_percent) == pytest.approx((0, 0))
    assert (result.wins, result.ties, result.losses) == (1, 1, 1)
    assert result.verdict == "cannot tell"


def test_a_clear_gain_and_its_mirror_image():
    rng = np.random.default_rng(0)
    baseline = rng.uniform(0.3, 0.5, (3, 20))
    scores = baseline + rng.normal(0.1, 0.02, (3, 20))
    gain, loss = compared(scores, baseline), compared(baseline, scores)
    assert (gain.verdict, loss.verdict) == ("better", "worse")
    assert gain.difference == pytest.approx(-loss.difference)
    assert (gain.ci_low, gain.bootstrap_low) == pytest.approx((-loss.ci_high, -loss.bootstrap_high))
    assert (gain.wins, gain.losses) == (loss.losses, loss.wins) == (20, 0)
    assert (gain.p, gain.detectable_difference) == pytest.approx((loss.p, loss.detectable_difference))


def test_run_to_run_variation_alone_is_not_a_difference_even_if_every_case_agrees():
    baseline = crossed(1, 3, 250, seed=6, replicate_sd=0)[0]
    shifted = baseline + np.array([[0.05], [0.0], [0.01]])
    result = compared(shifted, baseline)
    assert result.p_wilcoxon < 1e-6
    assert result.verdict == "no difference shown"
    assert result.df == pytest.approx(2)


def test_the_more_arms_the_stricter():
    values = crossed(2, 5, 60, seed=7, replicate_sd=0.01)
    values[1] += 0.04 - (values[1] - values[0]).mean()
    alone = compare_arms(scores_of(*values), 100, 0.95, 0)[1]
    rest = crossed(7, 5, 60, seed=8, replicate_sd=0.01)
    among = compare_arms(scores_of(*values, *rest), 100, 0.95, 0)[1]
    assert (alone.verdict, among.verdict) == ("better", "no difference shown")
    assert (alone.n_compared, among.n_compared) == (1, 8)
    assert among.detectable_difference > alone.detectable_difference
    text = sentence("a", "real", "Dice", among, 0.95)
    assert "but not as one of 8 comparisons" in text
    assert "after correction for 8 arms" in text


def test_the_level_of_the_intervals_is_the_level_of_the_decision():
    values = crossed(2, 5, 60, seed=7, replicate_sd=0.01)
    values[1] += 0.03 - (values[1] - values[0]).mean()
    for confidence, verdict in ((0.999, "no difference shown"), (0.7, "better")):
        result = compared(values[1], values[0], confidence)
        assert result.verdict == verdict
        assert (result.ci_low > 0) == (verdict == "better")


def test_few_cases_never_have_more_degrees_of_freedom_than_they_hold():
    values = crossed(2, 5, 8, seed=9, replicate_sd=0)
    assert compared(values[1], values[0]).df <= 7


@pytest.mark.parametrize(("n_cases", "verdict"), [(1, "cannot tell"), (5, "cannot tell"), (6, "better")])
def test_a_handful_of_cases_decides_nothing_however_clear(n_cases, verdict):
    baseline = np.random.default_rng(10).uniform(0.1, 0.2, (2, n_cases))
    result = compared(baseline + 0.6, baseline)
    assert result.verdict == verdict
    assert ("too few to decide anything" in sentence("a", "real", "Dice", result, 0.95)) == (n_cases < 6)


def test_one_case_has_a_difference_and_nothing_else():
    result = compared([[0.9], [0.8]], [[0.1], [0.1]])
    assert result.difference == pytest.approx(0.75)
    assert all(math.isnan(value) for value in (result.p, result.p_holm, result.ci_low, result.df, result.sd))
    text = sentence("a", "real", "Dice", result, 0.95)
    assert "(+0.750, +750.0 %); 1 case, 2 replicates: 1 better" in text
    assert "nan" not in text


def test_cases_that_cannot_be_scored_are_left_out():
    result = compared([[0.5, math.nan, 0.7], [0.5, math.nan, 0.7]], [[0.4, math.nan, 0.4], [0.4, math.nan, 0.4]])
    assert result.n_cases == 2
    assert result.difference == pytest.approx(0.2)


def test_nothing_to_score():
    scores = Scores.over_scored_cases(np.full((2, 2, 3), math.nan), np.ones((2, 2), bool))
    baseline, arm = compare_arms(scores, 100, 0.95, 0)
    assert baseline.verdict == arm.verdict == "not measured"
    assert "no test case has a nodule" in sentence("a", "real", "Dice", arm, 0.95)


def test_arms_and_replicates_that_were_not_evaluated():
    values = crossed(4, 3, 30, seed=11)
    values[1] = math.nan
    values[2, 0] = math.nan
    comparisons = compare_arms(scores_of(*values), 100, 0.95, 0)
    assert [row.n_replicates for row in comparisons] == [3, 0, 2, 3]
    assert [row.n_compared for row in comparisons[2:]] == [2, 2]
    assert [row.n_evaluated for row in comparisons] == [3, 0, 2, 3]
    assert comparisons[2].baseline_mean == pytest.approx(values[0, 1:].mean())
    assert "none of its replicates were evaluated" in sentence("a", "real", "Dice", comparisons[1], 0.95)


def test_equal_arms():
    baseline = crossed(1, 2, 12, seed=12)[0]
    result = compared(baseline, baseline)
    assert (result.p, result.p_wilcoxon, result.ties) == (1, 1, 12)
    assert (result.ci_low, result.ci_high) == pytest.approx((0, 0))
    text = sentence("a", "real", "Dice", result, 0.95)
    assert "Every case scored the same in both arms: check that the arms differ." in text
    assert "A true difference" not in text


def test_baseline_of_zero_has_no_relative_difference():
    assert math.isnan(compared([[0.1, 0.2]], [[0.0, 0.0]]).relative_percent)


def test_slope_of_one_replicate_is_that_of_least_squares_by_case():
    values, doses = crossed(4, 1, 20, seed=13), [0, 0.25, 0.5, 2]
    line = dose_response(scores_of(*values), dict(enumerate(doses[1:], 1)), 0.9)
    slopes, intercepts = np.polyfit(doses, values[:, 0], 1)
    theirs = stats.ttest_1samp(slopes, 0)
    assert (line.slope.value, line.slope.p()) == pytest.approx((slopes.mean(), theirs.pvalue))
    at_end = intercepts + 2 * slopes - values[0, 0]
    assert line.doses[-1] == 2
    assert line.fitted[-1] == pytest.approx(at_end.mean())
    assert (line.low[-1], line.high[-1]) == pytest.approx(tuple(stats.ttest_1samp(at_end, 0).confidence_interval(0.9)))


def test_slope_covers_the_truth_over_replicates_and_cases():
    doses, covered = np.array([0, 0.5, 1, 2]), 0
    for seed in range(200):
        values = crossed(4, 3, 60, seed) + 0.05 * doses[:, None, None]
        low, high = dose_response(scores_of(*values), dict(enumerate(doses[1:], 1)), 0.95).slope.interval(0.95)
        covered += low <= 0.05 <= high
    assert covered / 200 == pytest.approx(0.95, abs=0.04)


def test_wilcoxon_is_exact_for_few_cases():
    differences = np.array([0.3, -0.1, 0.4, 0.15, 0.9, 0.26])
    ranks = stats.rankdata(np.abs(differences))
    observed = abs(ranks @ np.sign(differences))
    signs = np.array(list(itertools.product((-1, 1), repeat=len(ranks))))
    assert wilcoxon_p(differences) == pytest.approx((np.abs(signs @ ranks) >= observed - 1e-9).mean())


def test_interval_of_one_replicate_agrees_with_scipy():
    differences = np.random.default_rng(2).normal(0, 1, 40)
    theirs = stats.bootstrap((differences,), np.mean, n_resamples=20_000, method="percentile", rng=0)
    ours = bootstrap_interval(differences[None], 20_000, 0.95, seed=1)
    assert ours == pytest.approx(tuple(theirs.confidence_interval), abs=0.02)


def test_interval_of_several_replicates_agrees_with_plain_resampling():
    rng = np.random.default_rng(3)
    differences = rng.normal(0, 1, (4, 15)) + rng.normal(0, 0.5, (4, 1))
    means = [
        differences[np.ix_(rng.integers(0, 4, 4), rng.integers(0, 15, 15))].mean() for _ in range(20_000)
    ]  # fmt: skip
    ours = bootstrap_interval(differences, 20_000, 0.95, seed=1)
    assert ours == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.04)


def test_interval_is_reproducible():
    differences = np.random.default_rng(4).normal(0, 1, (2, 9))
    assert bootstrap_interval(differences, 500, 0.9, seed=8) == bootstrap_interval(differences, 500, 0.9, seed=8)


def test_the_verdict_is_rarely_wrong_and_finds_what_it_calls_detectable(repository):
    simulation = runpy.run_path(str(repository / "benchmarks" / "decision_error.py"))
    rates = simulation["measure"](simulation["Scenario"](n_arms=3, n_replicates=3), runs=150, seed=1)
    assert rates.wrong <= 0.08
    assert rates.wilcoxon > 0.2
    assert 0.7 <= rates.power <= 0.9


@pytest.mark.parametrize(
    "design",
    [
        {"n_arms": 3, "n_replicates": 3, "n_cases": 249, "one_in_common": True},
        {"n_arms": 1, "n_replicates": 2},
        {"n_arms": 3, "n_replicates": 2, "n_seeds": 3, "fold_share": 0.6},
        {"n_arms": 1, "n_replicates": 1},
    ],
)
def test_designs_that_with_few_run_degrees_of_freedom_claim_little(repository, design):
    simulation = runpy.run_path(str(repository / "benchmarks" / "decision_error.py"))
    rates = simulation["measure"](simulation["Scenario"](**design), runs=120, seed=1, bootstraps=1)
    assert rates.wrong <= 0.08
    assert rates.refused == (design["n_replicates"] == 1)


def test_a_draw_per_replicate_covers_variation_between_draws(repository):
    simulation = runpy.run_path(str(repository / "benchmarks" / "shared_variance.py"))
    design, shares = simulation["Design"](5, 60), simulation["VarianceShares"]
    shared, own = (simulation["false_claims"](design, shares(0.5, own_draw=own), 150, 1) for own in (False, True))
    assert shared > 0.15
    assert own <= 0.08


def test_one_arm_with_three_replicates_finds_what_it_calls_detectable(repository):
    simulation = runpy.run_path(str(repository / "benchmarks" / "decision_error.py"))
    rates = simulation["measure"](simulation["Scenario"](n_arms=1, n_replicates=3), runs=400, seed=1)
    assert 0.7 <= rates.power <= 0.9


def test_sentence_has_the_claim_the_numbers_and_what_they_do_not_cover():
    values = crossed(4, 4, 12, seed=6, replicate_sd=0.001)
    values[1] += 0.6
    better = compare_arms(scores_of(*values), 100, 0.95, 0, ["", "arms with synthetic CT", "controls", "controls"])[1]
    text = sentence("real+x@1.0", "real", "Dice", better, 0.95)
    assert text.startswith("real+x@1.0: better than real. Mean Dice ")
    for part in ("95 % CI +0.", "p < 0.001)", "12 cases, 4 replicates: 12 better, 0 equal, 0 worse."):
        assert part in text
    assert "Only 12 test cases: too few to represent patients in general." in text


def test_one_replicate_cannot_tell_however_clear():
    rng = np.random.default_rng(6)
    baseline = rng.uniform(0.3, 0.5, (1, 200))
    result = compared(baseline + 0.1 + rng.normal(0, 0.01, (1, 200)), baseline)
    assert result.verdict == "cannot tell"
    text = sentence("real+x@1.0", "real", "Dice", result, 0.95)
    assert text.startswith("real+x@1.0: this run cannot tell whether it differs from real. Mean Dice 0.")
    assert "over patients alone; p < 0.001)" in text
    assert "the run-to-run variance is not known" in text
    assert math.isnan(result.detectable_difference)


def test_no_difference_says_what_could_have_been_shown():
    result = compare_arms(scores_of(*crossed(5, 2, 250, seed=1)), 100, 0.95, 0)[1]
    size = f"about {result.detectable_difference:.2g} ({result.detectable_low:.2g} to {result.detectable_high:.2g})"
    assert f"A true difference of {size} would be detected" in sentence("a", "real", "Dice", result, 0.95)
    assert result.detectable_low < result.detectable_difference < result.detectable_high


@pytest.mark.parametrize(
    ("baseline_mean", "detectable", "expected"),
    [
        (
            0.643,
            0.400,
            ("A true loss of about 0.4 ", "A gain of that size is impossible: real leaves room for 0.357."),
        ),
        (0.2, 0.3, ("A true gain of about 0.3 ", "A loss of that size is impossible: real leaves room for 0.200.")),
        (0.5, 0.3, ("A true difference of about 0.3 ",)),
        (0.5, 0.7, ("too small to detect even the largest possible difference", "a gain of 0.50 and a loss of 0.50")),
    ],
)
def test_no_gain_or_loss_is_promised_that_the_scale_has_no_room_for(baseline_mean, detectable, expected):
    baseline, arm = compare_arms(scores_of(*crossed(2, 5, 30, seed=1)), 100, 0.95, 0)
    changed = replace(arm, baseline_mean=baseline_mean, detectable_difference=detectable, verdict="no difference shown")
    text = detectable_text(changed, "real")
    for part in expected:
        assert part in text
    assert len(text.split(" reliably")) <= 2
    assert detectable_text(baseline, "real") == ""


@pytest.mark.parametrize(
    ("n_cases", "n_independent", "run_df", "n_warnings"),
    [
        (2, 1, 0, 2),
        # With one case nothing but its number counts; the runs are several.
        (1, 4, 0, 1),
        (5, 3, 4, 1),
        (12, 3, 4, 1),
        (12, 1, 0, 2),
        (12, 2, 1, 2),
        (200, 1, 0, 1),
        (200, 1, 4, 1),
        (200, 3, 4, 0),
    ],
)
def test_caveats(n_cases, n_independent, run_df, n_warnings):
    assert len(caveats(n_cases, n_independent, run_df)) == n_warnings


@pytest.mark.parametrize(("n_compared", "needed"), [(1, 6), (2, 7), (3, 7), (4, 8), (8, 9), (10, 9)])
def test_minimum_cases_are_those_whose_unanimity_passes_the_sign_test(n_compared, needed):
    assert minimum_cases(n_compared, 0.95) == needed
    level = 0.05 / n_compared
    assert stats.binomtest(needed, needed).pvalue < level <= stats.binomtest(needed - 1, needed - 1).pvalue


def test_too_few_cases_for_many_arms_decide_nothing():
    values = crossed(9, 3, 8, seed=9, replicate_sd=0)
    values[1:] += 0.5
    assert {row.verdict for row in compare_arms(scores_of(*values), 100, 0.95, 0)[1:]} == {"cannot tell"}
    assert {row.verdict for row in compare_arms(scores_of(*values[:4]), 100, 0.95, 0)[1:]} == {"better"}


def test_a_lost_replicate_never_makes_a_claim_easier():
    values = crossed(3, 3, 40, seed=21, replicate_sd=0.05)
    complete = scores_of(*values).contrast({1: 1, 0: -1})
    values[1, 1:] = math.nan
    scores = scores_of(*values)
    lost = scores.contrast({1: 1, 0: -1})
    differences = values[1, 0] - values[0, 0]
    expected = 2 * scores.interaction.value + differences.var(ddof=1) / 40
    assert lost.standard_error**2 == pytest.approx(expected)
    assert lost.standard_error > complete.standard_error
    assert scores.interaction.df == 2
    assert lost.df == 2
    result = compare_arms(scores, 100, 0.95, 0)[1]
    assert "With fewer than 4 it is often underestimated" in sentence("a", "real", "Dice", result, 0.95)


def test_seeds_of_a_fold_are_averaged_and_folds_counted():
    folds = (0, 0, 1, 1, 2, 2)
    values = crossed(4, 6, 30, seed=22)
    by_fold = values.reshape(4, 3, 2, 30).mean(axis=2)
    ours, theirs = (scores.contrast({2: 1, 0: -1}) for scores in (scores_of(*values, folds=folds), scores_of(*by_fold)))
    assert (ours.value, ours.standard_error, ours.df) == pytest.approx((theirs.value, theirs.standard_error, theirs.df))
    assert scores_of(*values, folds=folds).interaction.df == 6
    row = compare_arms(scores_of(*values, folds=folds), 100, 0.95, 0)[2]
    assert (row.n_replicates, row.n_independent) == (6, 3)
    assert "30 cases, 6 replicates in 3 folds" in sentence("a", "real", "Dice", row, 0.95)


def test_seeds_of_a_single_fold_are_the_replicates():
    values = crossed(3, 4, 30, seed=23)
    ours, theirs = (scores_of(*values, folds=folds).contrast({1: 1, 0: -1}) for folds in ((2, 2, 2, 2), None))
    assert (ours.standard_error, ours.df) == (theirs.standard_error, theirs.df)


def test_a_fold_with_fewer_runs_is_trusted_less():
    values = crossed(2, 8, 30, seed=24)
    folds = (0, 0, 1, 1, 2, 2, 3, 3)
    complete = scores_of(*values, folds=folds)
    values[1, 1] = math.nan
    scores = scores_of(*values, folds=folds)
    lost = scores.contrast({1: 1, 0: -1})
    runs = 8 / (7 / 2 + 1)  # harmonic mean of seven cells of two runs and one of one
    assert scores.runs_per_replicate == pytest.approx(runs)
    common = (1 + 3 / 2) / 4  # mean of 1 / runs in common with the baseline
    assert lost.from_runs.value == pytest.approx(2 * runs * common * scores.interaction.value / 4)
    assert complete.runs_per_replicate == 2
    assert complete.contrast({1: 1, 0: -1}).from_runs.value == pytest.approx(2 * complete.interaction.value / 4)


def test_families_are_corrected_apart():
    values = crossed(6, 5, 60, seed=25, replicate_sd=0.01)
    families = ["", "arms with synthetic CT", "arms with synthetic CT", "controls", "controls", "controls"]
    rows = compare_arms(scores_of(*values), 100, 0.95, 0, families)
    p = np.array([row.p for row in rows])
    assert [row.p_holm for row in rows[1:]] == pytest.approx(
        [*multipletests(p[1:3], method="holm")[1], *multipletests(p[3:], method="holm")[1]]
    )
    assert [row.n_compared for row in rows[1:]] == [2, 2, 3, 3, 3]
    assert "after correction for 3 controls" in sentence("a", "real", "Dice", rows[4], 0.95)


FIRST, REST = "primary arms", "arms with synthetic CT"
GATES = {REST: FIRST}


@pytest.mark.parametrize(("n_first", "seed"), list(itertools.product((1, 2, 3), range(6))))
def test_a_gate_is_the_closed_test_that_asks_the_primary_arms_first(n_first, seed):
    values = crossed(6, 5, 60, seed=seed, replicate_sd=0.01)
    values[1 : 2 + seed % 3] += 0.06
    families = ["", *[FIRST] * n_first, *[REST] * (5 - n_first)]
    rows = compare_arms(scores_of(*values), 1, 0.95, 0, families, GATES)[1:]

    def p_together(arms):
        """Bonferroni of the primary arms in an intersection; of the rest only where none is in it."""
        asked = [arm for arm in arms if arm < n_first] or arms
        return min(1, len(asked) * min(rows[arm].p for arm in asked))

    for arm, row in enumerate(rows):
        others = [other for other in range(5) if other != arm]
        subsets = [s for n in range(5) for s in itertools.combinations(others, n)]
        assert row.p_holm == pytest.approx(max(p_together([arm, *subset]) for subset in subsets))


def test_what_comes_after_an_undecided_primary_arm_is_not_claimed():
    values = crossed(4, 5, 60, seed=27, replicate_sd=0.01)
    values[2] += 0.2
    families = ["", FIRST, REST, REST]
    rows = compare_arms(scores_of(*values), 1, 0.95, 0, families, GATES)
    assert [row.verdict for row in rows[1:]] == ["no difference shown"] * 3
    assert rows[2].p < 0.001
    assert rows[2].p_gate == rows[2].p_holm == rows[1].p
    said = "Not claimed, although it would be significant alone (p < 0.001): the primary arms come first"
    assert said in sentence("b", "real", "Dice", rows[2], 0.95)
    assert "Not claimed: the primary arms come first" in sentence("c", "real", "Dice", rows[3], 0.95)
    values[1] += 0.2
    opened = compare_arms(scores_of(*values), 1, 0.95, 0, families, GATES)
    assert [row.verdict for row in opened[1:]] == ["better", "better", "no difference shown"]


@pytest.mark.parametrize("lost", [slice(None), slice(1, None)])
def test_a_primary_arm_that_cannot_be_decided_keeps_the_gate_closed(lost):
    values = crossed(3, 1 if lost == slice(1, None) else 4, 60, seed=28, replicate_sd=0.001)
    values[1:] += 0.3
    values[1, lost] = math.nan
    rows = compare_arms(scores_of(*values), 1, 0.95, 0, ["", FIRST, REST], GATES)
    assert "better" not in [row.verdict for row in rows]
    assert rows[2].p_holm == rows[2].p_gate == 1


def claims(simulation, difference, runs, **design):
    """Of simulated benchmarks in which the first arm differs: the share that claims the first arm, and any other."""
    generator, scenario = np.random.default_rng(1), simulation["Scenario"](n_replicates=5, n_cases=249, **design)
    judged = [simulation["judge"](scenario, difference, generator) for _ in range(runs)]
    of_first, of_rest = zip(
        *((run[0].verdict == "better", any(arm.verdict in ("better", "worse") for arm in run[1:])) for run in judged),
        strict=True,
    )
    return np.mean(of_first), np.mean(of_rest)


def test_an_arm_named_beforehand_has_twice_the_power_of_one_of_ten(repository):
    simulation = runpy.run_path(str(repository / "benchmarks" / "decision_error.py"))
    assert claims(simulation, 0.032, 200, n_arms=10)[0] == pytest.approx(0.33, abs=0.08)
    named, others = claims(simulation, 0.032, 200, n_arms=10, n_primary=1)
    assert named == pytest.approx(0.64, abs=0.08)
    assert others <= 0.08


@pytest.mark.parametrize("n_primary", [1, 2])
def test_a_gate_keeps_the_rate_of_false_claims(repository, n_primary):
    simulation = runpy.run_path(str(repository / "benchmarks" / "decision_error.py"))
    scenario = simulation["Scenario"](n_arms=4, n_replicates=5, n_cases=60, n_primary=n_primary)
    assert simulation["measure"](scenario, 200, seed=2, bootstraps=1).wrong <= 0.08
    # A primary arm that differs beyond doubt opens the gate where it is the only one.
    found, others = claims(simulation, 0.3, 200, n_arms=4, n_primary=n_primary)
    assert found == 1
    assert others <= 0.08


def test_no_replicate_in_common_is_not_called_none_evaluated():
    values = crossed(2, 2, 10, seed=26)
    values[0, 1], values[1, 0] = math.nan, math.nan
    row = compare_arms(scores_of(*values), 100, 0.95, 0)[1]
    assert row.verdict == "not measured"
    assert "it has no replicate in common with real" in sentence("a", "real", "Dice", row, 0.95)


def test_claims_on_several_test_sets_hold_together():
    rng = np.random.default_rng(5)
    values = rng.normal(0, 0.1, (4, 5, 30)) + np.array([0, 0.03, 0.06, 0])[:, None, None]
    alone, both = (compare_arms(scores_of(*values), 100, 0.95, 1, test_sets=number)[1:] for number in (1, 2))
    theirs = multipletests([row.p for row in alone], method="holm")[1]
    assert [row.p_holm for row in both] == pytest.approx(np.minimum(2 * theirs, 1).tolist())
    assert [(row.n_compared, row.p) for row in both] == [(6, row.p) for row in alone]
    assert [row.detectable_difference for row in both] > [row.detectable_difference for row in alone]


def test_false_claims_on_three_test_sets_that_share_their_runs_are_rare():
    # Nothing differs; the random effect of a run is the same on all sets.
    rng, claims = np.random.default_rng(11), {1: 0, 3: 0}
    for _ in range(150):
        run = rng.normal(0, 0.01, (2, 4, 1))
        sets = [scores_of(*(run + rng.normal(0, 0.05, (2, 4, 25)))) for _ in range(3)]
        for test_sets in claims:
            found = [compare_arms(scores, 100, 0.95, 1, test_sets=test_sets)[1].verdict for scores in sets]
            claims[test_sets] += any(verdict in ("better", "worse") for verdict in found)
    assert claims[3] <= stats.binom.ppf(0.95, 150, 0.05) < claims[1]
