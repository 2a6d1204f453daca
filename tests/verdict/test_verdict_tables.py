"""Tables assembled from a results folder, against numbers computed from its files."""

import numpy as np
import pandas as pd
import pytest

from lungddpm.errors import InputError
from lungddpm.verdict.tables import (
    VERDICT_COLUMNS,
    detection_table,
    quality_table,
    scores_of,
    seconds_per_volume,
    timing_table,
    write_tables,
)


def test_verdict_follows_from_the_metrics_files(make_results):
    config, results = make_results()
    tables, written = write_tables(config, results)
    verdict = tables["verdict"]
    assert list(verdict.columns) == VERDICT_COLUMNS
    assert verdict["arm"].unique().tolist() == config.arms.names()
    mean = {
        arm: np.mean(
            [pd.read_csv(path)["dice"].mean() for path in (results / "segmentation" / arm).glob("*/metrics.csv")]
        )
        for arm in config.arms.names()
    }
    dice = verdict[verdict["metric"] == "dice"].set_index("arm")
    arm = "real+lung_ddpm@1.0"
    assert dice.loc[arm, "mean"] == pytest.approx(mean[arm])
    assert dice.loc[arm, "difference"] == pytest.approx(mean[arm] - mean["real"])
    assert dice.loc[arm, "verdict"] == "better"
    assert dice.loc["real", "verdict"] == "baseline"
    assert dice.loc["real+real", "verdict"] == "no difference shown"
    names = {path.name for path in written}
    assert {"verdict.csv", "verdict.md", "cases.csv", "lesions.csv", "image_quality.csv", "timing.csv"} <= names
    assert all(path.exists() for path in written)


def test_markdown_says_the_same_as_the_table(make_results):
    config, results = make_results(n_test=2, n_replicates=1, extras=False)
    tables, _ = write_tables(config, results)
    lines = (results / "tables" / "verdict.md").read_text().splitlines()
    assert len(lines) == 2 + len(tables["verdict"])
    assert "nan" not in "".join(lines)


def test_missing_metrics_are_named(make_results):
    config, results = make_results(n_test=1, n_replicates=1, extras=False)
    (results / "segmentation" / "real+real" / "fold0_seed0" / "metrics.csv").unlink()
    with pytest.raises(InputError, match=r"real\+real.*metrics.csv"):
        write_tables(config, results)


def test_arms_must_cover_the_same_cases():
    rows = [("real", "a"), ("real", "b"), ("other", "a")]
    cases = pd.DataFrame([{"arm": arm, "replicate": "r", "case_id": case, "dice": 0.5} for arm, case in rows])
    assert scores_of(cases, "real", "dice").shape == (1, 2)
    with pytest.raises(InputError, match="do not cover the same cases"):
        scores_of(cases, "other", "dice")


def test_detection_by_size():
    cases = pd.DataFrame(
        [
            {"arm": "real", "replicate": replicate, "n_lesions": n, "n_false_positives": 2, "false_positive_mm3": 30.0}
            for replicate in "ab"
            for n in (2, 0)
        ]
    )
    found = [("< 6 mm", True), ("> 10 mm", True), ("< 6 mm", False), ("> 10 mm", True)]
    lesions = pd.DataFrame([{"arm": "real", "size_bin": size, "found": hit} for size, hit in found])
    (row,) = detection_table(cases, lesions).to_dict("records")
    assert (row["n_lesions"], row["found_percent"], row["n_empty_cases"]) == (2, 75, 1)
    assert (row["found_percent_below_6_mm"], row["found_percent_above_10_mm"]) == (50, 100)
    assert np.isnan(row["found_percent_6_to_10_mm"])
    assert (row["false_positives_per_scan"], row["empty_false_positive_mm3"]) == (2, 30)


def test_quality_is_summarised_over_samples_with_the_region():
    keys = {"generator": "g", "image": "synthetic", "region": "nodules", "metric": "mse"}
    (row,) = quality_table(pd.DataFrame([keys | {"value": value} for value in (1.0, 3.0, np.nan)])).to_dict("records")
    assert (row["n"], row["mean"], row["sd"]) == (2, 2.0, pytest.approx(2**0.5))


def test_times_come_from_benchmarks_and_samples(make_results):
    _, results = make_results(n_test=1, n_replicates=1)
    (job,) = timing_table(results).to_dict("records")
    assert (job["stage"], job["job"], job["seconds"]) == ("evaluate", "evaluate-real-fold0_seed0", 61.5)
    assert np.isnan(job["max_rss_mb"])
    assert seconds_per_volume(results, ["lung_ddpm", "reference"]) == {"lung_ddpm": 2.5}
