"""The power of a design against simulated benchmarks, an independent simulation's table, and a textbook's t test."""

import math
import re
import runpy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.power import TTestPower

from lungddpm.verdict.design import (
    MEASURED_ON_PHANTOMS,
    STAGES_PER_RUN,
    STAGES_PER_SCAN,
    Components,
    Costs,
    Design,
    components_of,
    costs_of_timing,
    detectable_by_design,
    hours_of_design,
    power_of_design,
    sufficient_designs,
    typical_components,
)
from lungddpm.verdict.statistics import Scores

DEMO = Components(0.034, 0.066, 0.0)
QUIETER = Components(0.023, 0.066, 0.0)


# From a simulation by other code, of some hundred benchmarks a cell: four arms, of which three are compared.
@pytest.mark.parametrize(
    ("n_replicates", "n_cases", "components", "detectable", "power"),
    [
        (3, 16, DEMO, 0.132, 0.36), (4, 16, DEMO, 0.104, 0.55), (5, 24, DEMO, 0.086, 0.72), (6, 40, DEMO, 0.075, 0.86),
        (8, 40, DEMO, 0.063, 0.96), (3, 16, QUIETER, 0.100, 0.59), (4, 24, QUIETER, 0.074, 0.84),
        (5, 40, QUIETER, 0.060, 0.98),
    ],
)  # fmt: skip
def test_design_table(n_replicates, n_cases, components, detectable, power):
    design = Design(4, 3, n_replicates, n_cases, 0.95)
    assert detectable_by_design(design, components) == pytest.approx(detectable, rel=0.04)
    assert power_of_design(design, components, 0.08) == pytest.approx(power, abs=0.05)


@pytest.mark.parametrize(
    ("n_arms", "n_replicates", "n_cases", "components"),
    [
        (3, 5, 9, MEASURED_ON_PHANTOMS),
        (3, 2, 40, MEASURED_ON_PHANTOMS),
        (8, 3, 60, Components(0.0, 0.1, 0.1)),
        (1, 6, 30, Components(0.03, 0.02, 0.1)),
    ],
)
def test_a_difference_called_detectable_is_found_in_four_of_five_simulated_benchmarks(
    repository, n_arms, n_replicates, n_cases, components
):
    simulation = runpy.run_path(str(repository / "benchmarks" / "decision_error.py"))
    design = Design(1 + n_arms, n_arms, n_replicates, n_cases, 0.95)
    difference = detectable_by_design(design, components)
    assert power_of_design(design, components, difference) == pytest.approx(0.8)
    sds = dict(zip(("replicate_sd", "residual_sd", "arm_case_sd"), vars(components).values(), strict=True))
    scenario, generator = simulation["Scenario"](n_arms, n_replicates, n_cases, **sds), np.random.default_rng(1)
    # Holm asks for no less than the strictest level of the arm with the smallest p.
    judged = [simulation["judge"](scenario, difference, generator)[0] for _ in range(200)]
    found = [arm.p < 0.05 / n_arms and arm.difference > 0 for arm in judged]
    assert np.mean(found) == pytest.approx(0.8, abs=0.06)


def test_without_run_to_run_variation_it_is_the_power_of_a_t_test_over_cases():
    design, components = Design(2, 1, 200, 40, 0.95), Components(0.0, 0.001, 0.1)
    theirs = TTestPower().power(effect_size=0.5 / math.sqrt(2), nobs=40, alpha=0.05)
    assert power_of_design(design, components, 0.05) == pytest.approx(theirs, abs=0.01)


def test_an_arm_named_beforehand_has_twice_the_power_of_one_of_ten():
    powers = [
        power_of_design(Design(11, n, 5, 249, 0.95), Components(0.015, 0.1, 0.1), 0.032) for n in (1, 10)
    ]  # fmt: skip
    assert powers == pytest.approx([0.64, 0.33], abs=0.03)


@pytest.mark.parametrize("too_small", [{"n_independent": 1}, {"n_cases": 6}])
def test_a_design_that_decides_nothing_has_no_power(too_small):
    design = replace(Design(4, 3, 4, 16, 0.95), **too_small)
    assert (power_of_design(design, DEMO, 0.5), detectable_by_design(design, DEMO)) == (0, math.inf)


@pytest.mark.parametrize("n_seeds", [1, 3])
def test_seeds_of_a_fold_are_averaged_in_simulated_benchmarks_as_well(repository, n_seeds):
    simulation = runpy.run_path(str(repository / "benchmarks" / "decision_error.py"))
    design, components = Design(3, 2, 4, 20, 0.95, runs_each=n_seeds), Components(0.1, 0.1, 0.02)
    sds = dict(zip(("replicate_sd", "residual_sd", "arm_case_sd"), vars(components).values(), strict=True))
    scenario = simulation["Scenario"](2, 4, 20, n_seeds=n_seeds, **sds)
    generator = np.random.default_rng(1)
    judged = [simulation["judge"](scenario, 0.15, generator)[0] for _ in range(300)]
    found = [arm.p < 0.05 / 2 and arm.difference > 0 for arm in judged]
    assert power_of_design(design, components, 0.15) == pytest.approx(np.mean(found), abs=0.07)


def test_runs_that_never_differ_show_everything():
    design, nothing = Design(4, 3, 4, 16, 0.95), Components(0.0, 0.0, 0.0)
    assert (power_of_design(design, nothing, 0.001), detectable_by_design(design, nothing)) == (1, 0)


def simulated(components, n_arms, n_replicates, n_cases, rng, n_seeds=1):
    n_runs = n_replicates * n_seeds
    values = (
        rng.normal(0.4, 0.2, n_cases)
        + rng.normal(0, components.arm_case_sd, (n_arms, 1, n_cases))
        + rng.normal(0, components.run_sd, (n_arms, n_runs, 1))
        + rng.normal(0, components.residual_sd, (n_arms, n_runs, n_cases))
    )
    folds = tuple(run // n_seeds for run in range(n_runs))
    return Scores.over_scored_cases(values, np.ones(values.shape[:2], bool), folds)


@pytest.mark.parametrize("n_seeds", [1, 4])
def test_components_are_those_that_the_single_runs_were_made_with(n_seeds):
    rng, true = np.random.default_rng(2), Components(0.03, 0.07, 0.05)
    found = [components_of(simulated(true, 4, 5, 60, rng, n_seeds), 1) for _ in range(200)]
    estimates = pd.DataFrame([vars(each) for each in found])
    # The median: that of the runs is made to be right half of the time.
    assert estimates["run_sd"].median() == pytest.approx(true.run_sd, rel=0.05)
    assert estimates["residual_sd"].mean() == pytest.approx(true.residual_sd, rel=0.02)
    assert estimates["arm_case_sd"].mean() == pytest.approx(true.arm_case_sd, rel=0.03)


@pytest.mark.parametrize(("n_replicates", "n_cases"), [(1, 20), (3, 1)])
def test_one_replicate_or_one_case_has_no_components(n_replicates, n_cases):
    assert components_of(simulated(DEMO, 3, n_replicates, n_cases, np.random.default_rng(1)), 1) is None


def test_typical_components_are_the_median_of_the_arms_that_count():
    rows = [("a", 0.01), ("b", 0.02), ("c", 0.5), ("control", 9.0)]
    table = pd.DataFrame([{"arm": a, "run_sd": 0.03, "residual_sd": s, "arm_case_sd": 2 * s} for a, s in rows])
    found = typical_components(table, ["a", "b", "c"])
    assert tuple(vars(found).values()) == pytest.approx((0.03, 0.02, 0.04))
    assert typical_components(table.assign(run_sd=math.nan), ["a"]) is None


COSTS = Costs({"prepare": 2.0, "train_generator": 3.0, "train_segmenter": 16.0, "predict": 4.0}, 2, 10, 40)


def test_hours_grow_with_the_runs_and_the_cases():
    assert COSTS.hours(2, 10) == 25
    # Twice the runs: training and prediction. Twice the test cases: 10 of 40 scans more, and prediction.
    assert COSTS.hours(4, 10) == 3 + 2 + 2 * (16 + 4)
    assert COSTS.hours(2, 20) == 3 + 2 * 50 / 40 + 16 + 2 * 4


def test_hours_of_a_timed_run_are_those_of_as_many_runs_as_are_paid_for():
    jobs = [("prepare", 1800.0), ("prepare", 1800.0), ("train_segmenter", 3600.0), ("train_segmenter", 7200.0)]
    timing = pd.DataFrame(jobs, columns=["stage", "seconds"])
    costs = costs_of_timing(timing, n_runs=8, replicates=4, test_cases=10, scans=40)
    assert costs.hours_of == {"prepare": 1.0, "train_segmenter": 12.0}
    assert costs.hours(4, 10) == 13


def test_every_stage_that_grows_is_one_that_the_workflow_times(repository):
    rules = "".join(path.read_text() for path in (repository / "workflow" / "rules").glob("*.smk"))
    timed = set(re.findall(r"results/benchmarks/(\w+)", rules))
    assert {*STAGES_PER_RUN, *STAGES_PER_SCAN} <= timed


def test_what_would_be_able_is_the_smallest_that_is():
    design = Design(4, 3, 2, 16, 0.95)
    as_many, *_ = found = sufficient_designs(design, DEMO, 0.07, COSTS)
    assert as_many.n_cases == 16
    assert 1 <= len(found) <= 2
    for one in found:
        assert power_of_design(one, DEMO, 0.07) >= 0.8
        assert power_of_design(replace(one, n_independent=one.n_independent - 1), DEMO, 0.07) < 0.8
    prices = [hours_of_design(one, design, COSTS) for one in found]
    assert prices == sorted(prices, reverse=True)


def test_too_few_cases_take_more_cases_and_nothing_shows_what_patients_hide():
    patients_vary = Components(0.0, 0.05, 0.2)
    (more,) = sufficient_designs(Design(2, 1, 3, 30, 0.95), patients_vary, 0.1, None)
    assert more.n_cases > 30
    assert sufficient_designs(Design(2, 1, 3, 30, 0.95), patients_vary, 0.001, None) == []


def test_the_components_of_the_demo_are_those_of_its_recorded_runs(repository):
    rows = pd.read_csv(repository / "docs/explanation/demo-seeds/variance_components.csv")
    rows = rows[(rows["metric"] == "dice") & (rows["arm"] == "real+lung_ddpm@3.0")]
    assert rows["seed"].nunique() == len(rows) >= 5
    names = ["run_sd", "residual_sd", "arm_case_sd"]
    root_mean_square = rows[names].pow(2).mean().pow(0.5)
    assert vars(MEASURED_ON_PHANTOMS) == pytest.approx(root_mean_square.to_dict(), rel=0.1)
