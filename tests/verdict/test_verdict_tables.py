"""Tables assembled from a results folder, against numbers computed from its files."""

import logging
import math
import shutil

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lungddpm.config.loading import parse_config
from lungddpm.core.device import log_device
from lungddpm.core.errors import InputError
from lungddpm.core.files import write_json
from lungddpm.core.progress import LOG
from lungddpm.evaluation.froc import BAND_COLUMNS, FROC_COLUMNS, RATES
from lungddpm.evaluation.measures import MEASURES
from lungddpm.evaluation.segmentation import run_evaluate
from lungddpm.quality import label_fidelity
from lungddpm.quality.image_quality import SET_COLUMNS
from lungddpm.report.sections import show_fidelity_strata, show_strata
from lungddpm.verdict.instrument import COLUMNS, COMPLETE, ENOUGH, NULL, POSITIVE
from lungddpm.verdict.records import drawing_costs, quality_table, seconds_per_volume, timing_table
from lungddpm.verdict.tables import (
    VERDICT_COLUMNS,
    detection_table,
    dose_tables,
    external_tables,
    gather,
    identical_replicates,
    measures_table,
    named_late,
    run_means,
    scores_of,
    strata_table,
    verdict_table,
    write_both,
    write_tables,
)


def simulated_cases(config, gain=0.0, n_cases=30):
    """Rows of `cases.csv`, scores growing by `gain` a dose."""
    rng = np.random.default_rng(3)
    of_case, rows = rng.uniform(0.2, 0.6, n_cases), []
    for arm in config.arms.all():
        dose = 0 if arm.generator is None else arm.dose
        for replicate in config.segmentation.replicates():
            for number, score in enumerate(of_case + gain * dose + rng.normal(0, 0.02, n_cases)):
                row = {"arm": arm.name, "replicate": replicate, "case_id": f"case-{number}"}
                rows.append(row | {"dice": score, "sensitivity": 1 - score})
    return pd.DataFrame(rows)


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


def test_numbers_of_one_replicate_agree_with_scipy():
    config = parse_config({"arms": {"controls": []}, "segmentation": {"folds": [0]}})
    cases = simulated_cases(config, gain=0.02)
    real, arm = (cases[cases["arm"] == name]["dice"].to_numpy() for name in config.arms.names())
    baseline, row = verdict_table(cases, config, 10).query("metric == 'dice'").to_dict("records")
    theirs = stats.ttest_rel(arm, real)
    assert (row["p"], row["p_holm"], row["df"]) == pytest.approx((theirs.pvalue, theirs.pvalue, 29))
    assert (row["ci_low"], row["ci_high"]) == pytest.approx(tuple(theirs.confidence_interval(0.95)))
    assert row["p_wilcoxon"] == pytest.approx(stats.wilcoxon(arm - real).pvalue)
    assert row["baseline_mean"] == baseline["mean"] == pytest.approx(real.mean())
    assert (row["wins"], row["losses"]) == ((arm > real).sum(), (arm < real).sum())


def test_an_arm_that_was_not_evaluated_does_not_stop_the_others(make_results, caplog):
    config, results = make_results(n_test=7, n_replicates=2, extras=False)
    shutil.rmtree(results / "segmentation" / "real+real")
    (results / "segmentation" / "real+lung_ddpm@1.0" / "fold1_seed0" / "metrics.csv").unlink()
    tables, _ = write_tables(config, results)
    rows = tables["verdict"].query("metric == 'dice'").set_index("arm")
    assert rows["verdict"].tolist() == ["baseline", "cannot tell", "not measured"]
    assert rows["n_replicates"].tolist() == [2, 1, 0]
    assert rows.loc["real+lung_ddpm@1.0", "sentence"].endswith("Not evaluated and left out: fold1_seed0.")
    assert rows.loc["real+lung_ddpm@1.0", "n_compared"] == 1
    assert tables["detection"]["n_lesions"].tolist() == [7, 7]
    assert "real+real has no metrics of fold0_seed0, fold1_seed0: the verdict leaves them out" in caplog.text


def test_without_the_baseline_there_is_no_verdict(make_results):
    config, results = make_results(n_test=1, n_replicates=1, extras=False)
    (results / "segmentation" / "real" / "fold0_seed0" / "metrics.csv").unlink()
    with pytest.raises(InputError, match=r"segmentation/real.*metrics.csv"):
        write_tables(config, results)


def test_generators_and_controls_are_corrected_apart_and_seeds_averaged_in_folds():
    arms = {
        "generators": ["lung_ddpm"],
        "doses": [0.5, 2.0],
        "controls": ["real", "reference"],
        "synthetic_only": ["lung_ddpm"],
    }
    config = parse_config({"arms": arms, "segmentation": {"folds": [0, 1, 2], "seeds": [0, 1]}})
    rows = (
        verdict_table(simulated_cases(config), config, 10).query("metric == 'dice' and arm != 'real'").set_index("arm")
    )
    assert rows["family"].to_dict() == {
        "real+lung_ddpm@0.5": "arms with synthetic CT", "real+lung_ddpm@2.0": "arms with synthetic CT",
        "synthetic:lung_ddpm": "arms with synthetic CT", "real+real": "controls", "real+reference@1.0": "controls",
    }  # fmt: skip
    assert rows["n_compared"].tolist() == [3, 3, 3, 2, 2]
    assert rows["n_replicates"].tolist() == [6] * 5
    assert rows["n_independent"].tolist() == [3] * 5
    assert rows["run_df"].tolist() == [5 * 2] * 5


def test_primary_arms_are_a_family_of_their_own_and_are_called_so():
    arms = {"generators": ["lung_ddpm"], "doses": [0.5, 2.0], "controls": ["real"], "synthetic_only": ["lung_ddpm"]}
    verdict = {"primary": "real+lung_ddpm@2"}
    config = parse_config({"arms": arms, "verdict": verdict, "segmentation": {"folds": [0, 1, 2]}})
    rows = (
        verdict_table(simulated_cases(config), config, 8).query("metric == 'dice' and arm != 'real'").set_index("arm")
    )
    primary = "real+lung_ddpm@2.0"
    assert rows["family"].value_counts().to_dict() == {
        "arms with synthetic CT": 2, "primary arms": 1, "controls": 1,
    }  # fmt: skip
    assert rows.loc[primary, ["family", "n_compared"]].tolist() == ["primary arms", 1]
    assert rows["sentence"].str.contains("(primary): ", regex=False).tolist() == [arm == primary for arm in rows.index]
    assert rows["p_gate"].notna().tolist() == [True, False, True, False]
    assert (rows["p_gate"].dropna() == rows.loc[primary, "p_holm"]).all()


def test_a_primary_arm_that_was_named_after_an_evaluation_is_found(make_results):
    config, results = make_results(n_test=1, n_replicates=2, extras=False)
    assert named_late(results, config) == []
    later = parse_config(config.model_dump() | {"verdict": {"primary": ["real+lung_ddpm@1.0"]}})
    assert len(named_late(results, later)) == 6
    folder = results / "segmentation" / "real" / "fold0_seed0"
    run_evaluate(later, results / "cases" / "cases.tsv", folder / "predictions", folder)
    assert len(named_late(results, later)) == 5
    assert named_late(results, config) == ["real, fold0_seed0"]


def test_wilcoxon_against_a_repeated_baseline_is_reported_as_run_to_run_variation():
    config = parse_config({"arms": {"controls": ["real"]}, "segmentation": {"folds": [0, 1, 2]}})
    cases = simulated_cases(config)
    cases.loc[(cases["arm"] == "real+real") & (cases["replicate"] == "fold0_seed0"), "dice"] += 0.05
    row = verdict_table(cases, config, 10).query("metric == 'dice'").set_index("arm").loc["real+real"]
    assert row["p_wilcoxon"] < 0.01
    assert row["verdict"] == "no difference shown"
    assert "its true difference is 0: the Wilcoxon p of " in row["sentence"]


def test_arms_must_cover_the_same_cases():
    config = parse_config({"segmentation": {"folds": [0]}})
    cases = simulated_cases(config, n_cases=2)
    assert scores_of(cases, config, "dice").values.shape == (3, 1, 2)
    with pytest.raises(InputError, match="do not cover the same cases"):
        scores_of(cases.iloc[:-1], config, "dice")
    with pytest.raises(InputError, match="do not cover the same cases"):
        scores_of(pd.concat([cases, cases.iloc[-1:]]), config, "dice")


def test_dose_response_of_every_generator_with_two_doses():
    arms = {"generators": ["lung_ddpm", "reference"], "doses": [0.5, 2.0], "controls": []}
    config = parse_config({"arms": arms, "segmentation": {"folds": [0, 1, 2]}})
    tables = dose_tables(simulated_cases(config, gain=0.1), config)
    lines = tables["dose_response"].query("metric == 'dice'").set_index("generator")
    assert lines.index.tolist() == ["lung_ddpm", "reference"]
    assert lines["slope"].tolist() == pytest.approx([0.1, 0.1], abs=0.01)
    assert (lines["ci_low"] > 0).all()
    assert (lines["p"] < 0.001).all()
    band = tables["dose_response_band"].query("metric == 'dice' and generator == 'reference'")
    assert (band["dose"].min(), band["dose"].max()) == (0, 2)
    assert band["fitted"].iloc[-1] - band["fitted"].iloc[0] == pytest.approx(2 * lines.loc["reference", "slope"])
    assert (band["ci_low"] < band["fitted"]).all()
    assert (band["fitted"] < band["ci_high"]).all()


def test_means_of_runs_are_over_the_cases_that_every_run_scored():
    config = parse_config({"segmentation": {"folds": [0, 1], "seeds": [0, 1]}})
    cases = simulated_cases(config, n_cases=4)
    cases.loc[5, "dice"] = np.nan  # case-1 of one run: it counts in none
    cases = cases[(cases["arm"] != "real+real") | (cases["replicate"] != "fold1_seed0")]
    means = run_means(scores_of(cases, config, "dice"))
    expected = cases[cases["case_id"] != "case-1"].groupby(["arm", "replicate"])["dice"].mean()
    for (arm, replicate), mean in expected.items():
        place = config.arms.names().index(arm), config.segmentation.replicates().index(replicate)
        assert means[place] == pytest.approx(mean)
    assert np.isnan(means).sum() == 1
    assert np.isnan(run_means(scores_of(cases.assign(dice=np.nan), config, "dice"))).all()


def test_one_dose_has_no_dose_response():
    config = parse_config({"segmentation": {"folds": [0]}})
    assert dose_tables(simulated_cases(config), config) == {}


def test_detection_by_texture_and_size():
    # By replicate: two of ground glass, one solid, and a large one that nobody rated.
    textures, small, large = [1.0, 2.0, 5.0, None], "< 6 mm", "> 10 mm"
    of_run = pd.DataFrame({"arm": "real", "texture": textures, "size_bin": [small, small, small, large]})
    runs = {"a": [True, False, True, True], "b": [False, False, True, True]}
    lesions = pd.concat([of_run.assign(replicate=name, found=found) for name, found in runs.items()])
    table = strata_table(lesions)
    assert table.to_numpy().tolist() == [
        ["real", "ground glass", "< 6 mm", 2, 25.0],
        ["real", "solid", "< 6 mm", 1, 100.0],
    ]
    shown = show_strata(table)
    assert shown.rows == [["ground glass", "< 6 mm", "2", "25"], ["solid", "< 6 mm", "1", "100"]]
    unrated = strata_table(lesions.assign(texture=None))
    assert unrated.columns.tolist() == table.columns.tolist()
    assert show_strata(unrated) is None


def test_label_fidelity_by_texture_and_size():
    """Two replicates look at one solid lesion of real CT and at two drawn ones, of which one is not rated."""
    columns = ["generator", "images", "case_id", "sha256", "lesion", "texture", "size_bin", "found"]
    small, large = "< 6 mm", "> 10 mm"
    real, drawn = ("(real CT)", "reference", "a", "0"), ("flow", "synthetic", "b", "1")
    lesions = pd.DataFrame(
        [
            (*real, 1, "solid", small, True), (*drawn, 1, "ground glass", large, True), (*drawn, 2, None, small, True),
            (*real, 1, "solid", small, False), (*drawn, 1, "ground glass", large, True), (*drawn, 2, None, small, True),
        ],
        columns=columns,
    )  # fmt: skip
    table = label_fidelity.strata_table(lesions)
    assert table.to_numpy().tolist() == [
        ["(real CT)", "reference", "solid", "< 6 mm", 1, 50.0],
        ["flow", "synthetic", "ground glass", "> 10 mm", 1, 100.0],
    ]
    shown = show_fidelity_strata(table)
    assert shown.heads == ["texture", "size", "(real CT)", "flow"]
    assert shown.rows == [["ground glass", "> 10 mm", "", "100 % of 1"], ["solid", "< 6 mm", "50 % of 1", ""]]
    unrated = label_fidelity.strata_table(lesions.assign(texture=None))
    assert unrated.columns.tolist() == table.columns.tolist()
    assert show_fidelity_strata(unrated) is None


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
    cpm = pd.DataFrame([{"arm": "real", "cpm": 0.7, "cpm_ci_low": 0.6, "cpm_ci_high": 0.8}])
    (row,) = detection_table(cases, lesions, cpm).to_dict("records")
    assert (row["n_lesions"], row["found_percent"], row["n_empty_cases"]) == (2, 75, 1)
    assert (row["n_lesions_below_6_mm"], row["n_lesions_6_to_10_mm"], row["n_lesions_above_10_mm"]) == (1, 0, 1)
    assert (row["found_percent_below_6_mm"], row["found_percent_above_10_mm"]) == (50, 100)
    assert np.isnan(row["found_percent_6_to_10_mm"])
    assert (row["false_positives_per_scan"], row["empty_false_positive_mm3"]) == (2, 30)
    assert (row["cpm"], row["cpm_ci_low"], row["cpm_ci_high"]) == (0.7, 0.6, 0.8)
    assert np.isnan(detection_table(cases, lesions, cpm.iloc[:0])["cpm"].item())


def test_scores_of_candidates_reach_froc_and_cpm(make_results):
    config, results = make_results(n_test=4, n_replicates=2, extras=False)
    tables, written = write_tables(config, results)
    # Each scan has its lesion at 0.8 and one false positive at 0.4.
    assert len(tables["froc"]) == len(config.arms.names()) * 2 * 7
    assert (tables["froc"]["sensitivity"] == 1).all()
    assert (tables["detection"]["cpm"] == 1).all()
    assert {"froc.csv", "froc_band.csv", "measures.csv"} <= {path.name for path in written}


def test_without_probabilities_only_the_scores_are_missing(make_results):
    config, results = make_results(n_test=2, n_replicates=1, extras=False, probabilities=False)
    tables, _ = write_tables(config, results)
    assert tables["froc"].empty
    assert tables["detection"]["cpm"].isna().all()
    assert tables["detection"]["found_percent"].notna().all()


def test_measures_of_the_cases_with_a_lesion():
    keys = {"arm": "real", "n_lesions": 1, **dict.fromkeys(MEASURES, 0.5)}
    rows = [
        keys | {"replicate": replicate, "case_id": case_id, "hausdorff_95_mm": distance}
        for replicate, case_id, distance in [("a", "p", 4), ("b", "p", 8), ("a", "q", 10), ("b", "q", np.nan)]
    ]
    rows.append(rows[0] | {"case_id": "empty", "n_lesions": 0, "hausdorff_95_mm": np.nan, "specificity": 0.1})
    # The other arm has lost the run "b" of case p, and has a value for q where `real` has none.
    rows += [
        keys
        | {"arm": "real+real", "replicate": replicate, "case_id": case_id, "hausdorff_95_mm": distance, "dice": 0.8}
        for replicate, case_id, distance in [("a", "p", 5), ("a", "q", 13), ("b", "q", 40)]
    ]
    measures = measures_table(pd.DataFrame(rows)).set_index(["arm", "metric"])
    assert measures.loc[("real", "hausdorff_95_mm"), ["n_cases", "n_undefined", "mean"]].tolist() == [2, 1, 8]
    assert measures.loc[("real", "hausdorff_95_mm"), "sd"] == pytest.approx(8**0.5)
    assert measures.loc[("real", "specificity"), ["n_cases", "n_undefined", "mean"]].tolist() == [2, 0, 0.5]
    assert measures.loc["real", "difference"].isna().all()
    # Paired by case and replicate: p 5 - 4, q 13 - 10; the unpaired means would differ by 15.75 - 8.
    assert measures.loc[("real+real", "hausdorff_95_mm"), ["mean", "difference", "n_compared"]].tolist() == [
        15.75,
        2,
        2,
    ]
    assert measures.loc[("real+real", "dice"), ["difference", "n_compared"]].tolist() == [pytest.approx(0.3), 2]
    # A bias nearer to zero may be larger or smaller.
    assert np.isnan(measures.loc[("real+real", "volume_error_mm3"), "difference"])


def test_differences_of_measures_are_those_of_the_verdict(make_results):
    config, results = make_results(extras=False)
    tables, _ = write_tables(config, results)
    summary = tables["measures"].set_index(["arm", "metric"])
    for row in tables["verdict"].dropna(subset="difference").to_dict("records"):
        assert summary.loc[(row["arm"], row["metric"]), "difference"] == pytest.approx(row["difference"])
        assert summary.loc[(row["arm"], row["metric"]), "mean"] == pytest.approx(row["mean"])


@pytest.mark.parametrize("name", ["metrics.csv", "lesions.csv", "candidates.csv"])
def test_a_table_edited_by_hand_stops_the_verdict(make_results, name):
    config, results = make_results(n_test=2, n_replicates=1, extras=False)
    path = results / "segmentation" / "real+real" / "fold0_seed0" / name
    path.write_text(path.read_text().replace("patient-02", "patient-03"))
    with pytest.raises(InputError, match=rf"real\+real/fold0_seed0/{name}: was changed.*lungddpm evaluate"):
        write_tables(config, results)


def test_all_references_empty(make_results):
    config, results = make_results(n_test=3, n_replicates=2, nodules=False, extras=False)
    tables, _ = write_tables(config, results)
    assert set(tables["verdict"]["verdict"]) <= {"baseline", "not measured"}
    detection = tables["detection"]
    assert (detection["n_lesions"] == 0).all()
    assert (detection["n_empty_cases"] == 3).all()
    assert detection["empty_false_positive_mm3"].tolist() == pytest.approx([80] * 3)
    assert detection[["found_percent", "cpm"]].isna().all(axis=None)
    assert tables["froc"].empty
    assert (tables["measures"]["n_cases"] == 0).all()


def test_identical_arms_show_no_difference(make_results):
    config, results = make_results(n_test=7, n_replicates=2, extras=False)
    for arm in config.arms.names()[1:]:
        shutil.rmtree(results / "segmentation" / arm)
        shutil.copytree(results / "segmentation" / "real", results / "segmentation" / arm)
    tables, _ = write_tables(config, results)
    for row in tables["verdict"].query("arm != 'real'").to_dict("records"):
        assert (row["difference"], row["verdict"], row["p_holm"]) == (0, "no difference shown", 1)
        assert (row["wins"], row["ties"], row["losses"]) == (0, 7, 0)
    assert identical_replicates(tables["cases"]) == [
        [f"{arm}, {replicate}" for arm in config.arms.names()] for replicate in config.segmentation.replicates()
    ]
    assert tables["froc_band"].groupby("false_positives_per_scan")[["ci_low", "ci_high"]].nunique().eq(1).all(axis=None)


def test_quality_is_summarised_over_samples_with_the_region():
    keys = {"generator": "g", "image": "synthetic", "region": "nodules", "metric": "mse", "note": "same"}
    samples = pd.DataFrame([keys | {"value": value} for value in (1.0, 3.0, np.nan)])
    (row,) = quality_table(samples, pd.DataFrame(columns=SET_COLUMNS)).to_dict("records")
    assert (row["n"], row["mean"], row["sd"], row["note"]) == (2, 2.0, pytest.approx(2**0.5), "same")
    assert row["extractor"] == ""


def test_sets_are_next_to_their_generators_samples(tmp_path):
    keys = {"image": "synthetic", "region": "lungs", "note": "", "standard_error": 0.1}
    samples = [keys | {"generator": name, "metric": "mse", "value": 1.0, "note": note} for name, note in ("ax", "by")]
    network = {"extractor": "network", "weights_sha256": "1f", "n": 4, "n_real": 7}
    sets = [
        keys | network | {"generator": name, "metric": "fid", "value": value, "note": f"of {name}"}
        for name, value in (("a", 0.5), ("b", np.nan))
    ]
    table = quality_table(pd.DataFrame(samples), pd.DataFrame(sets)[SET_COLUMNS])
    assert table["generator"].tolist() == ["a", "a", "b", "b"]
    assert table["metric"].tolist() == ["mse", "fid", "mse", "fid"]
    distance, absent = table.iloc[1], table.iloc[3]
    assert (distance["mean"], distance["n"], distance["n_real"], distance["extractor"]) == (0.5, 4, 7, "network")
    assert (distance["standard_error"], distance["sd"]) == (0.1, pytest.approx(np.nan, nan_ok=True))
    assert (absent["n"], absent["note"]) == (0, "of b")
    csv, markdown = write_both(tmp_path / "image_quality", table)
    assert pd.read_csv(csv)["n_real"].tolist()[1] == 7
    assert "nan" not in markdown.read_text().lower()
    assert "<na>" not in markdown.read_text().lower()


def test_times_come_from_benchmarks_and_samples(make_results):
    _, results = make_results(n_test=1, n_replicates=1)
    (job,) = timing_table(results).query("stage == 'evaluate'").to_dict("records")
    assert (job["stage"], job["job"], job["seconds"]) == ("evaluate", "evaluate-real-fold0_seed0", 61.5)
    assert np.isnan(job["max_rss_mb"])
    assert job["device"] == "cpu"
    drawn, nothing = drawing_costs(results, ["lung_ddpm", "reference"]).to_dict("records")
    assert drawn == {
        "generator": "lung_ddpm",
        "n_volumes": 2,
        "nodules_per_volume": 1.5,
        "seconds_per_volume": 2.5,
        "memory_mib": 810,
        "device": "cpu",
    }
    assert (nothing["n_volumes"], nothing["device"]) == (0, "")
    assert np.isnan([nothing["seconds_per_volume"], nothing["nodules_per_volume"]]).all()
    assert seconds_per_volume(results, ["lung_ddpm", "reference"]) == {"lung_ddpm": 2.5}


def test_a_volume_during_which_the_machine_stalled_does_not_count(tmp_path):
    for n, seconds in enumerate((3.0, 2.0, 1000.0)):
        write_json(tmp_path / f"synthetic/flow/all/sample-{n}/sample.json", {"seconds": seconds})
    assert seconds_per_volume(tmp_path, ["flow"]) == {"flow": 3.0}


def test_the_device_is_the_one_that_the_stage_used_last(make_results):
    _, results = make_results(n_test=1, n_replicates=1)
    (results / "logs").mkdir()
    handler = logging.FileHandler(results / "logs" / "evaluate-real-fold0_seed0.log")
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    for device, details in (("cpu", "2 threads, fp32"), ("cuda", "NVIDIA H200, bf16")):
        log_device(device, details)
        LOG.info("training: 5 of 10")
    LOG.removeHandler(handler)
    handler.close()
    timing = timing_table(results).query("stage == 'evaluate'")
    assert timing["device"].tolist() == ["cuda (NVIDIA H200, bf16)"]


def dice_of(results, arm, prefix):
    """Dice of the cases whose names begin so, from the file of the only replicate."""
    table = pd.read_csv(results / "segmentation" / arm / "fold0_seed0" / "metrics.csv")
    return table[table["case_id"].str.startswith(prefix)]["dice"].to_numpy()


def test_each_test_set_has_a_verdict_of_its_own(make_results):
    arms = {"controls": ["reference"], "control_dose": 1.0}
    config, results = make_results(
        n_test=6, n_replicates=1, extras=False, run_sd=0.1, arms=arms, external={"task06": 8, "ours": 5}
    )
    tables, written = write_tables(config, results)
    verdicts = {"case-": tables["verdict"]}
    verdicts |= {f"{name}-": rows for name, rows in tables["external_verdict"].groupby("data_set")}
    for prefix, n_cases, n_sets in (("case-", 6, 1), ("task06-", 8, 2), ("ours-", 5, 2)):
        row = verdicts[prefix].query("metric == 'dice'").set_index("arm").loc["real+lung_ddpm@1.0"]
        arm, real = (dice_of(results, name, prefix) for name in ("real+lung_ddpm@1.0", "real"))
        theirs = stats.ttest_rel(arm, real)
        assert row["n_cases"] == len(arm) == n_cases
        assert (row["difference"], row["p"]) == pytest.approx(((arm - real).mean(), theirs.pvalue))
        assert row["p_holm"] == pytest.approx(min(1, n_sets * theirs.pvalue))
        assert row["n_compared"] == n_sets
    sentences = tables["external_verdict"].query("metric == 'dice' and data_set == 'ours'")["sentence"]
    assert sentences.str.match(r"real\S* on ours: ").all()
    assert list(tables["external_verdict"]) == ["data_set", *VERDICT_COLUMNS]
    assert set(tables["cases"]["case_id"].str[:5]) == set(tables["lesions"]["case_id"].str[:5]) == {"case-"}
    assert tables["external_cases"].groupby("data_set")["case_id"].nunique().to_dict() == {"task06": 8, "ours": 5}
    assert tables["external_detection"].set_index(["data_set", "arm"]).loc[("task06", "real"), "n_lesions"] == 8
    assert {"external_verdict.csv", "external_measures.md", "external_lesions.csv"} <= {path.name for path in written}


def test_external_cases_that_were_not_evaluated_are_missing(make_results):
    config, results = make_results(n_test=2, n_replicates=1, extras=False, external={"ours": 1})
    for folder in (results / "segmentation").glob("*/*"):
        for prediction in folder.rglob("ours-*.nii.gz"):
            prediction.rename(folder / prediction.name)
    text = (results / "cases/cases.tsv").read_text()
    (results / "cases/cases.tsv").write_text("".join(line for line in text.splitlines(True) if "ours-" not in line))
    for folder in (results / "segmentation").glob("*/*"):
        run_evaluate(config, results / "cases/cases.tsv", folder / "predictions", folder)
    (results / "cases/cases.tsv").write_text(text)
    tables, _ = write_tables(config, results)
    assert "external_verdict" not in tables
    row = tables["external_instrument"].query("measure == 'test cases missing'").iloc[0]
    assert (row["data_set"], row["status"], row["value"]) == ("ours", "failed", 1)
    assert "Test cases that no run segmented: ours-04." in row["sentence"]
    # The answer is that of the test patients of `source`, all of whom were evaluated.
    assert tables["instrument"].query("check == 'nothing missing'")["status"].tolist() == ["passed"]


def test_external_test_sets_change_nothing_of_the_run(make_results):
    config, results = make_results(n_test=7, n_replicates=2, run_sd=0.05, external={"task06": 8})
    tables, _ = write_tables(config, results)
    alone, _ = write_tables(config.model_copy(update={"external_tests": {}}), results)
    beside = {name: table for name, table in tables.items() if not name.startswith("external_")}
    assert list(beside) == list(alone)
    for name, table in alone.items():
        pd.testing.assert_frame_equal(beside[name], table)


def test_each_external_test_set_has_its_own_checks(make_results):
    arms = {"controls": ["real", "reference"], "control_dose": 1.0}
    config, results = make_results(
        n_test=8, n_replicates=4, extras=False, run_sd=0.02, arms=arms, external={"task06": 9, "ours": 3}
    )
    gone = results / "segmentation/real+reference@1.0/fold3_seed0"
    shutil.rmtree(gone)
    tables, written = write_tables(config, results)
    checks = tables["external_instrument"]
    assert list(checks) == ["data_set", *COLUMNS]
    found = {name: rows.set_index("check") for name, rows in checks.groupby("data_set", sort=False)}
    assert list(found) == ["task06", "ours"]
    for rows in found.values():
        assert list(rows.index) == [POSITIVE, NULL, ENOUGH, COMPLETE]
        assert rows.loc[COMPLETE, "sentence"] == "Not evaluated and left out: real+reference@1.0, fold3_seed0."
    verdict = tables["external_verdict"].query("metric == 'dice'").set_index(["data_set", "arm"])
    for check, arm in ((POSITIVE, "real+reference@1.0"), (NULL, "real+real")):
        row, of_set = found["task06"].loc[check], verdict.loc[("task06", arm)]
        assert (row["subject"], row["value"], row["status"]) == (arm, of_set["p_holm"], "passed")
        assert of_set["verdict"] == ("better" if check == POSITIVE else "no difference shown")
        assert found["ours"].loc[check, "status"] == "not measured"
    # Both corrected for two sets; the other estimate is by the noncentral t distribution.
    row, of_arm = found["task06"].loc[ENOUGH], verdict.loc[("task06", "real+lung_ddpm@1.0")]
    assert of_arm["detectable_low"] < row["value"] < of_arm["detectable_high"]
    assert found["ours"].loc[ENOUGH, "sentence"] == "3 test cases are too few to decide anything."
    assert "external_instrument.csv" in {path.name for path in written}


def test_froc_of_an_external_test_set_is_that_of_its_own_lesions(make_results):
    config, results = make_results(n_test=2, n_replicates=2, extras=False, external={"task06": 3, "ours": 4})
    replicates = {arm: config.segmentation.replicates() for arm in config.arms.names()}
    cases, lesions, candidates = (
        gather(results, replicates, name) for name in ("metrics.csv", "lesions.csv", "candidates.csv")
    )
    # Every nodule has a score of 0.8, the false positive of each scan 0.4. One nodule of four is now lost.
    lost = cases.loc[cases["case_id"].str.startswith("ours-"), "case_id"].min()
    lesions.loc[lesions["case_id"] == lost, "score"] = math.nan
    candidates = candidates[(candidates["case_id"] != lost) | candidates["lesions"].isna()]
    data_sets = {name: name.split("-")[0] for name in cases["case_id"] if not name.startswith("case-")}
    tables = external_tables(config, cases, lesions, candidates, data_sets, 1)
    points = tables["external_froc"]
    assert list(points) == ["data_set", *FROC_COLUMNS]
    assert len(points) == 2 * len(config.arms.names()) * 2 * len(RATES)
    shares = points.groupby("data_set")["sensitivity"].unique()
    assert (shares["task06"].tolist(), shares["ours"].tolist()) == ([1.0], [0.75])
    assert list(tables["external_froc_band"]) == ["data_set", *BAND_COLUMNS]
    cpm = tables["external_detection"].groupby("data_set")["cpm"].unique()
    assert (cpm["task06"].tolist(), cpm["ours"].tolist()) == ([1.0], [0.75])
