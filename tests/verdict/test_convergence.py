"""Whether segmenters still learn: curves of known shape, and statsmodels' regression."""

import math

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm

from lungddpm.verdict.convergence import DICE, LOSS, convergence_table


def curves_of(shapes, n_points=30, n_runs=3, noise=0.01, seed=1):
    """Curves of each arm, its loss a function of the share of the training that is done; Dice is 0.1 minus it."""
    rng, rows = np.random.default_rng(seed), []
    for arm, shape in shapes.items():
        for run in range(n_runs):
            for point in range(1, n_points + 1):
                loss = shape(point / n_points) + noise * rng.normal()
                rows.append((arm, f"r{run}", 50 * point, loss, 0.1 - loss))
    return pd.DataFrame(rows, columns=["arm", "replicate", "step", LOSS, DICE])


def found(table, arm, measure=LOSS):
    return table.set_index(["arm", "measure"]).loc[(arm, measure)]


def test_a_loss_that_falls_to_the_end_is_distinguished_from_one_that_has_stopped():
    table = convergence_table(curves_of({"falls": lambda done: -done, "stopped": lambda done: -min(1, 2 * done)}))
    falls, stopped = found(table, "falls"), found(table, "stopped")
    # A straight line from the first saved state on: a third of the steps is a third of 30/29 of the fall.
    assert falls["change"] == pytest.approx(-1 / 3, abs=0.02)
    assert falls["change_of_whole"] == pytest.approx(30 / 29 / 3, abs=0.02)
    assert falls["p"] < 1e-6
    assert abs(stopped["change"]) < 3 * stopped["standard_error"]
    assert stopped["p"] > 0.05
    assert found(table, "falls", DICE)["change"] == pytest.approx(1 / 3, abs=0.02)


def test_slope_and_error_of_one_arm_are_those_of_least_squares():
    curves = curves_of({"arm": lambda done: -math.sqrt(done)}, n_runs=2)
    row = found(convergence_table(curves), "arm")
    last = curves[curves["step"] > 1000]
    # One slope, and an intercept for each run: the same as the mean of both slopes, as the steps are the same.
    design = pd.get_dummies(last["replicate"], dtype=float).assign(step=last["step"])
    theirs = sm.OLS(last[LOSS], design).fit()
    assert row["change"] == pytest.approx(500 * theirs.params["step"])
    # Ours gives each run a slope of its own: one degree of freedom less, of 17.
    assert row["standard_error"] == pytest.approx(500 * theirs.bse["step"], rel=0.15)


def test_arms_that_have_stopped_are_rarely_called_learning():
    called = [
        found(convergence_table(curves_of({"a": lambda done: 0.0}, n_points=12, seed=seed)), "a")["p"] < 0.05
        for seed in range(300)
    ]
    assert np.mean(called) == pytest.approx(0.05, abs=0.035)


def test_three_saved_states_or_fewer_are_too_few():
    assert convergence_table(curves_of({"a": lambda done: -done}, n_points=3)).empty
    assert convergence_table(curves_of({})).empty
    assert len(convergence_table(curves_of({"a": lambda done: -done}, n_points=4))) == 2


def test_patches_without_a_nodule_leave_the_other_points():
    curves = curves_of({"a": lambda done: -done})
    curves.loc[::4, DICE] = math.nan
    assert found(convergence_table(curves), "a", DICE)["change"] == pytest.approx(1 / 3, abs=0.03)
    assert convergence_table(curves.assign(pseudo_dice=math.nan))["measure"].tolist() == [LOSS]
