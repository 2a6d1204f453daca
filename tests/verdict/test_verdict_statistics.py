"""Comparisons against hand-computed cases, scipy, brute force, and simulated truth."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from lungddpm.verdict.statistics import (
    bootstrap_interval,
    caveats,
    compare,
    describe_baseline,
    format_p,
    sentence,
    signed,
    smallest_p,
    wilcoxon_p,
)


def compared(scores, baseline, bootstraps=2000):
    return compare(np.atleast_2d(scores), np.atleast_2d(baseline), bootstraps, confidence=0.95, seed=3)


def test_by_hand():
    result = compared([[0.5, 0.7, 0.2], [0.7, 0.7, 0.4]], [[0.4, 0.7, 0.4], [0.4, 0.7, 0.6]])
    assert (result.n_cases, result.n_replicates) == (3, 2)
    assert result.mean == pytest.approx(3.2 / 6)
    assert result.sd == pytest.approx(np.std([0.6, 0.7, 0.3], ddof=1))
    assert result.difference == pytest.approx((0.2 + 0 - 0.2) / 3)
    assert result.relative_percent == pytest.approx(0)
    assert (result.wins, result.ties, result.losses) == (1, 1, 1)
    assert result.verdict == "no difference shown"


def test_a_clear_gain_and_its_mirror_image():
    rng = np.random.default_rng(0)
    baseline = rng.uniform(0.3, 0.5, (3, 20))
    scores = baseline + rng.normal(0.1, 0.02, (3, 20))
    gain, loss = compared(scores, baseline), compared(baseline, scores)
    assert (gain.verdict, loss.verdict) == ("better", "worse")
    assert gain.difference == pytest.approx(-loss.difference)
    assert gain.ci_low == pytest.approx(-loss.ci_high)
    assert (gain.wins, gain.losses) == (loss.losses, loss.wins) == (20, 0)


def test_two_cases_can_never_decide():
    result = compared([[0.9, 0.9]], [[0.1, 0.1]])
    assert result.ci_low > 0
    assert result.p_wilcoxon == smallest_p(2) == 0.5
    assert result.verdict == "no difference shown"


def test_cases_that_cannot_be_scored_are_left_out():
    result = compared([[0.5, math.nan, 0.7], [0.5, math.nan, 0.7]], [[0.4, math.nan, 0.4], [0.4, math.nan, 0.4]])
    assert result.n_cases == 2
    assert result.difference == pytest.approx(0.2)


def test_nothing_to_score():
    result = compared([[math.nan]], [[math.nan]])
    assert result.verdict == "not measured"
    assert "no test case has a nodule" in sentence("a", "real", "Dice", result, 0.95)
    assert describe_baseline(np.array([[math.nan]])).verdict == "not measured"


def test_equal_arms():
    result = compared([[0.3, 0.5]], [[0.3, 0.5]])
    assert (result.p_wilcoxon, result.ties, result.ci_low, result.ci_high) == (1, 2, 0, 0)


def test_baseline_of_zero_has_no_relative_difference():
    assert math.isnan(compared([[0.1, 0.2]], [[0.0, 0.0]]).relative_percent)


def test_wilcoxon_is_exact_for_few_cases():
    differences = np.array([0.3, -0.1, 0.4, 0.15, 0.9, 0.26])
    ranks = stats.rankdata(np.abs(differences))
    observed = abs(ranks @ np.sign(differences))
    signs = np.array(list(itertools.product((-1, 1), repeat=len(ranks))))
    assert wilcoxon_p(differences) == pytest.approx((np.abs(signs @ ranks) >= observed - 1e-9).mean())


def test_wilcoxon_agrees_with_scipy_for_many_cases():
    differences = np.random.default_rng(1).normal(0.1, 1, 120)
    assert wilcoxon_p(differences) == pytest.approx(stats.wilcoxon(differences).pvalue)


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


def test_interval_covers_a_known_truth_and_no_difference_stays_none():
    rng = np.random.default_rng(5)
    truth, covered, cried = 0.03, 0, 0
    for seed in range(200):
        case_effects = rng.normal(0, 0.1, 50)
        baseline = rng.uniform(0.3, 0.6, (2, 50))
        noise = rng.normal(0, 0.05, (2, 50))
        low, high = bootstrap_interval(truth + case_effects + noise, 500, 0.95, seed)
        covered += low <= truth <= high
        cried += compare(baseline + case_effects + noise, baseline, 500, 0.95, seed).verdict != "no difference shown"
    assert covered / 200 == pytest.approx(0.95, abs=0.04)
    assert cried / 200 <= 0.09


def test_sentence_has_the_claim_the_numbers_and_what_they_do_not_cover():
    rng = np.random.default_rng(6)
    baseline = rng.uniform(0.3, 0.5, (1, 12))
    text = sentence(
        "real+x@1.0", "real", "Dice", compared(baseline + 0.1 + rng.normal(0, 0.01, (1, 12)), baseline), 0.95
    )
    assert text.startswith("real+x@1.0: better than real. Mean Dice 0.")
    for part in ("95 % CI +0.", "Wilcoxon p < 0.001", "12 cases, 1 replicate: 12 better, 0 equal, 0 worse."):
        assert part in text
    assert "Only 12 test cases" in text
    assert "luck of a training run is not covered" in text


@pytest.mark.parametrize(
    ("n_cases", "n_replicates", "n_warnings"), [(2, 1, 2), (5, 3, 1), (12, 3, 1), (12, 1, 2), (200, 1, 1), (200, 3, 0)]
)
def test_caveats(n_cases, n_replicates, n_warnings):
    assert len(caveats(n_cases, n_replicates)) == n_warnings


def test_numbers_in_prose():
    assert [signed(value) for value in (0.0321, -0.117, 0.0001, -0.0001)] == ["+0.032", "−0.117", "0.000", "0.000"]
    assert [format_p(p) for p in (0.0001, 0.0342, 0.5)] == ["< 0.001", "= 0.034", "= 0.50"]
