"""The spread of training runs: its numbers, and how often its test raises a false alarm or notices an unruly arm."""

import math

import numpy as np
import pytest
from scipy import stats

from lungddpm.verdict.run_spread import run_spread_table, spread_notes, spread_test


def alarms(arms, replicates, unruly=1.0, of_replicates=1.0, missing=(), tables=1000):
    """Share of tables (arms x replicates) with an arm below p = 0.05; the last arm scatters `unruly` times as much."""
    rng, found = np.random.default_rng(7), 0
    for number in range(tables):
        scatter = rng.normal(size=(arms, replicates))
        scatter[-1] *= unruly
        means = 0.4 + 0.03 * (scatter + of_replicates * rng.normal(size=replicates) + rng.normal(size=(arms, 1)))
        for place in missing:
            means[place] = math.nan
        p = spread_test(means, seed=number, draws=499)
        found += (p < 0.05).any()
    return found / tables


@pytest.mark.parametrize(("arms", "replicates"), [(2, 2), (2, 5), (3, 2), (3, 5), (5, 2), (5, 5)])
@pytest.mark.parametrize("of_replicates", [0, 2])
def test_runs_that_scatter_alike_raise_few_alarms(arms, replicates, of_replicates):
    # 5 % of 1000 tables, with three standard errors of such a share above; the truth is 5 % or less.
    assert alarms(arms, replicates, of_replicates=of_replicates) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1000)


def test_missing_runs_do_not_raise_alarms():
    assert alarms(4, 4, missing=[(0, 3), (2, 0), (2, 1), (2, 2)]) <= 0.071


def test_an_unruly_arm_is_noticed_more_often_the_more_runs_there_are():
    few, many = (alarms(5, replicates, unruly=5, tables=300) for replicates in (3, 5))
    assert few > 0.4
    assert many > 0.8


def test_an_unruly_arm_stands_out_of_what_replicates_do_to_all_arms():
    rng = np.random.default_rng(2)
    own = 0.001 * rng.normal(size=(5, 5))
    own[3] *= 30
    p = spread_test(own + 0.5 * rng.normal(size=5) + np.array([[0.1], [0.2], [0.3], [0.4], [0.5]]), seed=1)
    assert p[3] < 0.01
    assert (np.delete(p, 3) > 0.5).all()


def test_two_arms_have_the_p_of_the_f_test():
    means = np.random.default_rng(3).normal(size=(2, 5)) * [[1], [4]]
    p = spread_test(means, 1, draws=200_000)
    ratio = means[1].var(ddof=1) / means[0].var(ddof=1)
    assert p[1] == pytest.approx(2 * stats.f.sf(ratio, 4, 4), rel=0.05)
    assert p[0] == pytest.approx(1, abs=1e-4)


def test_table_has_the_moments_of_the_runs():
    means = np.array([[0.4, 0.5, 0.6], [0.3, math.nan, 0.34], [math.nan] * 3, [0.2, math.nan, math.nan]])
    table = run_spread_table(["real", "two", "none", "one"], means, [[0], [1], [2]], seed=1).set_index("arm")
    assert table["n_replicates"].tolist() == [3, 2, 0, 1]
    assert table.loc["real", ["mean", "sd", "lowest", "highest", "range"]].tolist() == pytest.approx(
        [0.5, 0.1, 0.4, 0.6, 0.2]
    )
    assert table.loc["two", "sd"] == pytest.approx(0.04 / math.sqrt(2))
    assert table.loc["none", "mean":].isna().all()
    assert math.isnan(table.loc["one", "sd"])
    assert math.isnan(table.loc["one", "p"])


def test_seeds_of_a_fold_count_once():
    rng = np.random.default_rng(5)
    means = rng.normal(size=(3, 4))
    folds = run_spread_table(["real", "a", "b"], means, [[0, 1], [2, 3]], seed=1)
    assert folds["p"].tolist() == spread_test((means[:, ::2] + means[:, 1::2]) / 2, seed=1).tolist()
    assert folds["sd"].tolist() == pytest.approx(means.std(axis=1, ddof=1))


@pytest.mark.parametrize("means", [np.ones((3, 3)), np.ones((3, 1)), np.full((2, 2), math.nan), np.ones((1, 4))])
def test_no_spread_has_no_p(means):
    p = spread_test(means, 1)
    assert np.isnan(p).all()


def test_the_note_names_the_arm_and_the_numbers():
    rng = np.random.default_rng(4)
    means = 0.5 + rng.normal(size=(5, 5)) * np.array([[0.01], [0.01], [0.2], [0.01], [0.01]])
    arms = ["real", *(f"real+{name}@1.0" for name in "abcd")]
    table = run_spread_table(arms, means, [[run] for run in range(5)], seed=1)
    (note,) = spread_notes(table, "Dice", 0.05)
    assert note.startswith("Training runs of real+b@1.0 scatter more than those of the other arms, beyond chance")
    assert f"(sd of mean Dice {means[2].std(ddof=1):.3f} over 5 replicates; others 0.0" in note
    assert "claims about this arm" in note
    assert spread_notes(table, "Dice", 1e-9) == []
    (note,) = spread_notes(table.assign(p=[0.01, 1, 1, 1, 1]), "Dice", 0.05)
    assert "claims about every arm compared with it are" in note
    second = table.assign(arm=[*arms[:2], "real4", *arms[3:]])
    (note,) = spread_notes(second, "Dice", 0.05)
    assert note.startswith("Training runs of real4")
    assert "claims about every arm compared with it are" in note
