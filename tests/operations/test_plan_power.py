"""`lungddpm plan --power` against simulated benchmarks, a run's own times, and what it is given."""

import json
import runpy

import numpy as np
import pandas as pd
import pytest
from documented import documented_keys, keys_of
from typer.testing import CliRunner

from lungddpm.cli import app
from lungddpm.core.cases import read_cases, write_cases
from lungddpm.core.files import write_table

CONFIG = {
    "preset": "demo", "arms": {"controls": ["real"], "doses": [0.5, 1.0]},
    "segmentation": {"folds": [0], "seeds": [0, 1, 2, 3]}, "verdict": {"relevant_difference": 0.1},
}  # fmt: skip


def design_rows(*options, config=CONFIG):
    """The rows of the table by (replicates, test cases), and the lines below."""
    result = CliRunner().invoke(app, ["plan", "--power", "--configfile", json.dumps(config), *map(str, options)])
    assert result.exit_code == 0, result.output
    table, below = result.stdout.split("\n\n", 1)
    heads, *lines = table.splitlines()
    rows = {}
    for line in lines:
        own, cells = line.startswith("*"), line.lstrip("*").split()
        rows[int(cells[0]), int(cells[1])] = (own, *cells[2:])
    return heads, rows, below


@pytest.fixture
def finished(tmp_path):
    """A folder with what the table takes of a finished run: 4 arms, 2 replicates, 8 test cases of 23 scans."""
    columns = ["arm", "family", "metric", "n_independent", "n_cases", "run_df", "run_sd", "residual_sd", "arm_case_sd"]
    rows = [("real+lung_ddpm@1.0", "arms with synthetic CT", "dice", 2, 8, 3, 0.02, 0.06, 0.01)]
    rows += [("real+lung_ddpm@1.0", "arms with synthetic CT", "sensitivity", 2, 8, 3, 0.9, 0.9, 0.9)]
    rows += [("real+real", "controls", "dice", 2, 8, 3, 0.02, 0.9, 0.9)]
    write_table(tmp_path / "tables" / "variance_components.csv", pd.DataFrame(rows, columns=columns))
    jobs = [("train_segmenter", 1800.0)] * 8 + [("predict", 360.0)] * 8 + [("train_generator", 3600.0)]
    write_table(tmp_path / "tables" / "timing.csv", pd.DataFrame(jobs, columns=["stage", "seconds"]))
    row = dict.fromkeys(["case_id", "patient_id", "series_uid", "reason", "path", "sha256"], "")
    row |= {"source": "phantom", "data_set": "internal", "status": "ok", "n_nodules": 1}
    row |= {f"size_{axis}": 48 for axis in "xyz"} | {f"spacing_{axis}_mm": 6.0 for axis in "xyz"}
    roles = ["discovery"] * 10 + ["reference"] * 5 + ["test"] * 8
    write_cases(tmp_path / "cases" / "cases.tsv", [{**row, "role": role} for role in roles])
    return tmp_path


def test_power_is_that_of_simulated_benchmarks(repository, finished):
    heads, rows, below = design_rows("--results", finished)
    assert heads.split() == ["replicates", "test", "cases", "detectable", "power", "for", "0.100", "job", "hours"]
    assert [key for key, row in rows.items() if row[0]] == [(4, 8)]
    simulation = runpy.run_path(str(repository / "benchmarks" / "decision_error.py"))
    # Four arms of which two are compared: the third keeps to a family of its own.
    scenario = simulation["Scenario"](3, 4, 8, replicate_sd=0.02, residual_sd=0.06, arm_case_sd=0.01)
    generator = np.random.default_rng(1)
    judged = [simulation["judge"](scenario, 0.1, generator)[0] for _ in range(300)]
    simulated = np.mean([arm.p < 0.05 / 2 for arm in judged])
    assert float(rows[4, 8][2]) == pytest.approx(simulated, abs=0.07)
    assert "Sd of Dice: run 0.02, residual 0.06, arm x case 0.01 (from " in below


def test_hours_are_those_of_the_run_for_as_many_runs_and_cases(finished):
    _, rows, below = design_rows("--results", finished)
    # 16 runs of half an hour, 16 predictions of 0.1 h, and the generator once.
    assert rows[4, 8][3] == f"{8 + 1.6 + 1:.0f}"
    assert rows[8, 16][3] == f"{16 + 2 * 3.2 + 1:.0f}"
    assert "Hours: as measured in " in below


def test_without_times_hours_are_planned(finished):
    (finished / "tables" / "timing.csv").unlink()
    heads, rows, below = design_rows("--results", finished)
    assert heads.split()[-2:] == ["core", "hours"]
    assert float(rows[8, 8][3]) > float(rows[4, 8][3]) > 0
    assert "Hours: estimated for cpu" in below


def test_what_is_stated_counts(finished):
    _, rows, below = design_rows("--results", finished, "--run-sd", 0.05)
    assert "run 0.05, residual 0.06, arm x case 0.01 (run sd as given, the rest from" in below
    _, without, _ = design_rows("--results", finished)
    assert float(rows[4, 8][2]) < float(without[4, 8][2])
    _, _, below = design_rows("--run-sd", 0, "--residual-sd", 0.1, "--arm-case-sd", 0.1)
    assert "run 0, residual 0.1, arm x case 0.1 (as given)" in below


def test_a_fold_with_several_seeds_has_more_power_and_costs_more():
    of_folds = [
        CONFIG | {"segmentation": {"n_folds": 4, "folds": [0, 1, 2, 3], "seeds": seeds}} for seeds in ([0], [0, 1, 2])
    ]
    sds = ("--run-sd", 0.1, "--residual-sd", 0.1, "--arm-case-sd", 0.02)
    (_, once, below), (_, thrice, below_thrice) = (design_rows(*sds, config=config) for config in of_folds)
    assert float(thrice[4, 24][1]) < 0.7 * float(once[4, 24][1])
    assert float(thrice[4, 24][-1]) > float(once[4, 24][-1])
    assert "4 arms, 4 folds (or seeds of one fold)," in below
    assert "4 arms, 4 folds of 3 seeds each," in below_thrice


def test_the_components_are_those_of_the_instrument_check(finished):
    # The arm in question has one replicate so far, so those of the control are used.
    path = finished / "tables" / "variance_components.csv"
    table = pd.read_csv(path)
    table.loc[table["arm"] != "real+real", "run_sd"] = np.nan
    write_table(path, table)
    _, _, below = design_rows("--results", finished)
    assert "Sd of Dice: run 0.02, residual 0.9, arm x case 0.9 (from " in below


def test_test_cases_without_a_nodule_decide_nothing(finished):
    path = finished / "cases" / "cases.tsv"
    table = read_cases(path)
    table.loc[table.index[-2:], "n_nodules"] = 0
    write_cases(path, table.to_dict("records"))
    _, rows, _ = design_rows("--results", finished)
    assert [key for key, row in rows.items() if row[0]] == [(4, 6)]
    # The hours are those of all eight test cases, as before.
    assert rows[4, 6][3] == f"{8 + 1.6 + 1:.0f}"


def test_a_primary_arm_needs_less():
    named = CONFIG | {"verdict": {"relevant_difference": 0.1, "primary": "real+lung_ddpm@1"}}
    (_, among, _), (_, alone, below) = design_rows(), design_rows(config=named)
    assert float(alone[4, 24][2]) > float(among[4, 24][2])
    assert "4 arms, 4 seeds, primary: real+lung_ddpm@1.0." in below


def test_a_run_that_knows_nothing_of_its_scatter_is_refused(finished):
    path = finished / "tables" / "variance_components.csv"
    write_table(path, pd.read_csv(path).assign(run_sd=np.nan))
    result = CliRunner().invoke(app, ["plan", "--power", "--results", str(finished)])
    assert result.exit_code != 0
    assert "has no variance components" in str(result.exception)


def test_its_json_has_the_figures_of_the_table_and_the_keys_of_the_docs(finished):
    _, rows, _ = design_rows("--results", finished)
    arguments = ["plan", "--power", "--json", "--configfile", json.dumps(CONFIG), "--results", str(finished)]
    values = json.loads(CliRunner().invoke(app, arguments).stdout)
    found = {(row["independent_replicates"], row["test_cases"]): row for row in values["designs"]}
    assert found.keys() == rows.keys()
    for key, (own, detectable, power, hours) in rows.items():
        assert found[key]["is_own"] == own
        assert found[key]["detectable"] is None if detectable == "nothing" else True
        assert f"{found[key]['power']:.2f}" == power
        assert found[key]["job_hours"] == pytest.approx(float(hours), abs=0.5)
    hours_of = {f"designs[].{kind}_hours" for kind in ("gpu", "core")}
    assert documented_keys("plan", part=1) - hours_of == keys_of(values)
    assert values["components"]["run_sd"] == pytest.approx(0.02)


def test_the_json_of_costs_has_the_keys_of_the_docs():
    shown = CliRunner().invoke(app, ["plan", "--json", "--configfile", json.dumps(CONFIG), "--device", "a100"])
    values = json.loads(shown.stdout)
    assert documented_keys("plan") == keys_of(values)
    assert values["total"]["gpu_hours"] == pytest.approx(sum(stage["gpu_hours"] for stage in values["stages"]))
    assert values["speed"]["flop_per_second"] == pytest.approx(0.15 * 312e12)
    assert values["scans"]["total"] == sum(
        values["scans"][role] for role in ("discovery", "reference", "test", "external")
    )
    of_stage = {stage["stage"]: stage for stage in values["stages"]}
    assert of_stage["train_segmenter"]["jobs"] == 16
    assert of_stage["index"]["gpu_memory_gib"] is None
