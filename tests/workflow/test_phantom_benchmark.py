"""The whole benchmark on a tiny phantom cohort: what it leaves, how it continues, what makes it run again."""

import json
import os
import re
import shutil
import signal
import subprocess
import time

import nibabel
import numpy as np
import pandas as pd
import psutil
import pytest
from tiny import BIN, TWO_ARMS, assert_same_measures, finished_rules

pytestmark = pytest.mark.workflow

ARMS = ["real", "real+lung_ddpm@1.0", "synthetic:lung_ddpm", "real+real"]


def test_every_contract_is_kept(tiny_benchmark):
    results = tiny_benchmark.results
    cases = pd.read_csv(results / "cases/cases.tsv", sep="\t")
    assert cases["role"].value_counts().to_dict() == {"discovery": 3, "test": 2, "reference": 1}
    for case_id in cases.loc[cases["status"] == "ok", "case_id"]:
        ct, layout = (nibabel.load(results / "cases" / case_id / f"{name}.nii.gz") for name in ("ct", "layout"))
        assert ct.shape == layout.shape == (32, 32, 32)
        assert np.allclose(ct.affine, layout.affine)
        assert (ct.get_data_dtype(), layout.get_data_dtype()) == (np.int16, np.uint8)
        assert set(np.unique(layout.dataobj)) == {0, 1, 2, 3}
    for path in (
        "models/lung_ddpm/main/all/model.safetensors",
        "models/lung_ddpm/main/all/history.csv",
        "report.html",
        "manifest.json",
    ):
        assert (results / path).stat().st_size > 0, path
    assert {path.name for path in (results / "arms").iterdir()} == set(ARMS)


def test_synthetic_cases_keep_their_reference_outside_the_lungs(tiny_benchmark):
    results = tiny_benchmark.results
    samples = pd.read_csv(results / "synthetic/lung_ddpm/all-fold0_seed0/samples-1.0-0.tsv", sep="\t")
    assert len(samples) == 3  # dose 1.0 of three discovery cases
    for sample in samples["path"]:
        folder = results / "synthetic/lung_ddpm/all-fold0_seed0" / sample
        record = json.loads((folder / "sample.json").read_text())
        ct = np.asarray(nibabel.load(folder / "ct.nii.gz").dataobj)
        reference = np.asarray(nibabel.load(results / "cases" / record["reference_case_id"] / "ct.nii.gz").dataobj)
        outside = np.asarray(nibabel.load(folder / "layout.nii.gz").dataobj) == 0
        assert (ct[outside] == reference[outside]).all()
        assert (ct[~outside] != reference[~outside]).mean() > 0.5


def test_no_test_patient_is_in_any_arm(tiny_benchmark):
    results = tiny_benchmark.results
    cases = pd.read_csv(results / "cases/cases.tsv", sep="\t")
    tested = set(cases.loc[cases["role"] == "test", "patient_id"])
    for arm in ARMS:
        record = json.loads((results / "arms" / arm / "arm.json").read_text())
        patients = {case["patient_id"] for case in record["cases"]}
        assert patients
        assert not patients & tested


def test_every_arm_has_the_same_plans_and_steps(tiny_benchmark):
    arms = tiny_benchmark.results / "arms"
    plans = [next((arms / arm / "nnUNet_preprocessed").glob("*/*lans*.json")).read_bytes() for arm in ARMS]
    assert len(set(plans)) == 1


def test_the_verdict_agrees_with_the_measures_of_the_cases(tiny_benchmark):
    cases, verdict = tiny_benchmark.table("cases.csv"), tiny_benchmark.table("verdict.csv")
    means = cases.groupby("arm")["dice"].mean()
    stated = verdict[verdict["metric"] == "dice"].set_index("arm")["mean"]
    assert set(stated.index) == set(ARMS)
    for arm in ARMS:
        assert stated[arm] == pytest.approx(means[arm], abs=1e-9, nan_ok=True)


def test_every_sample_and_reference_is_judged_by_real(tiny_benchmark):
    results = tiny_benchmark.results
    metrics = pd.read_csv(results / "label_fidelity/fold0_seed0/metrics.csv").set_index("case_id")
    samples = pd.read_csv(results / "synthetic/lung_ddpm/all-fold0_seed0/samples-1.0-0.tsv", sep="\t")
    cases = pd.read_csv(results / "cases/cases.tsv", sep="\t")
    references = cases.loc[cases["role"] == "reference", "case_id"]
    assert metrics.index.tolist() == [*references, *samples["case_id"]]
    for sample in samples["path"]:
        record = json.loads((results / "synthetic/lung_ddpm/all-fold0_seed0" / sample / "sample.json").read_text())
        assert metrics.loc[sample, "own_layout"] == (record["layout_origin"] == "reference")
        assert metrics.loc[sample, "reference"] == record["reference_case_id"]
    assert not metrics["patient_seen"].any()
    table = tiny_benchmark.table("label_fidelity.csv").set_index("generator")
    assert table["n_cases"].to_dict() == {"(real CT)": 1, "lung_ddpm": 3}
    assert table.loc["lung_ddpm", "dice_mean"] == pytest.approx(metrics.loc[samples["case_id"], "dice"].mean())


def test_copies_of_the_references_are_at_the_ceiling(tiny_benchmark, tmp_path):
    results, arm = tiny_benchmark.results, tmp_path / "real"
    shutil.copytree(results / "arms/real", arm, symlinks=True)
    config = ["config.yaml", tiny_benchmark.overlay, '{"arms": {"controls": ["reference"]}}']
    common = [word for source in config for word in ("--configfile", source)] + ["--cases", results / "cases/cases.tsv"]
    copies = tmp_path / "samples.tsv"
    for command in (
        ["synthesize", "--generator", "reference", "--output", tmp_path, "--table", copies],
        ["label-fidelity", copies, "--arm-folder", arm, "--output", tmp_path / "judged", "--device", "cpu"],
    ):
        run = subprocess.run(
            [BIN / "lungddpm", *command, *common], cwd=tiny_benchmark.repository, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr[-3000:]
    found = pd.read_csv(tmp_path / "judged/metrics.csv")
    real, drawn = found[found["generator"] == "(real CT)"], found[found["generator"] == "reference"]
    assert (len(real), len(drawn)) == (1, 3)
    assert set(drawn["dice"]) == set(real["dice"])
    # What is judged with all others is judged alike.
    judged = pd.read_csv(results / "label_fidelity/fold0_seed0/metrics.csv")
    assert set(judged.loc[judged["generator"] == "(real CT)", "dice"]) == set(real["dice"])


def test_a_finished_run_has_nothing_left_to_do(tiny_benchmark):
    run = tiny_benchmark.run("--dry-run")
    assert "Nothing to be done" in run.stdout, run.stdout[-3000:]


ONE_ARM = {"compose": 1, "plan": 1, "train_segmenter": 1, "predict": 1, "evaluate": 1}
ONE_ARM_OF_A_GENERATOR = {**ONE_ARM, "compose_draw": 1}
# Their real cases, and with them what nnU-Net planned, stay.
BOTH_ARMS_OF_A_GENERATOR = dict.fromkeys(["compose_draw", "train_segmenter", "predict", "evaluate"], 2)
SEGMENT_ALL_ARMS = {"train_segmenter": 4, "predict": 4, "evaluate": 4, "label_fidelity": 1}
JUDGE_SAMPLES = {"quality": 1, "label_fidelity": 1}


@pytest.mark.parametrize(
    ("change", "rerun"),
    [
        ("verdict={'bootstraps': 300}", {}),
        ("workflow={'case_shards': 1}", None),  # as it was
        ("segmentation={'steps': 25}", SEGMENT_ALL_ARMS),
        ("segmentation={'test_time_mirroring': True}", {"predict": 4, "evaluate": 4, "label_fidelity": 1}),
        # The replicates of seed 0 stay.
        ("segmentation={'seeds': [0, 1]}", {**SEGMENT_ALL_ARMS, "synthesize": 1, "compose_draw": 2, "quality": 1}),
        (
            "generators={'lung_ddpm': {'sampling': {'steps': 5}}}",
            {"synthesize": 1, **JUDGE_SAMPLES, **BOTH_ARMS_OF_A_GENERATOR},
        ),
        # One more of anything leaves alone what is there: a smaller dose only lists samples, a larger one makes more.
        ("arms={'doses': [0.5, 1.0]}", {"synthesize": 1, **ONE_ARM_OF_A_GENERATOR}),
        ("arms={'doses': [1.0, 2.0]}", {"synthesize": 1, **JUDGE_SAMPLES, **ONE_ARM_OF_A_GENERATOR}),
        (
            "arms={'generators': ['lung_ddpm', 'copy_paste']}",
            {"synthesize": 1, **JUDGE_SAMPLES, **ONE_ARM_OF_A_GENERATOR},
        ),
        ("arms={'controls': ['real', 'reference']}", {"synthesize": 1, **JUDGE_SAMPLES, **ONE_ARM_OF_A_GENERATOR}),
    ],
)
def test_a_changed_config_reruns_only_what_depends_on_it(tiny_benchmark, change, rerun):
    run = tiny_benchmark.run("--dry-run", "--config", change)
    counts = {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", run.stdout, re.MULTILINE)}
    counts.pop("all", None)
    counts.pop("total", None)
    always = {"merge_config": 1, "write_report": 1, "checksums": 1}
    assert counts == ({} if rerun is None else {**rerun, **always}), run.stdout[-3000:]


@pytest.mark.parametrize(
    "change",
    [
        "generators={'lung_ddpm': {'training': {'save_every': 10}}}",
        "generators={'med_ddpm': {'sampling': {'steps': 5}}}",  # in no arm
    ],
)
def test_a_key_that_decides_no_result_reruns_no_stage(tiny_benchmark, change):
    run = tiny_benchmark.run("--dry-run", "--config", change)
    counts = {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", run.stdout, re.MULTILINE)}
    assert counts == {"merge_config": 1, "checksums": 1, "all": 1, "total": 3}, run.stdout[-3000:]


@pytest.mark.slow
def test_lung_ddpm_plus_continues_from_the_same_cases(tiny_benchmark, make_benchmark, tmp_path):
    plus = {
        "denoiser": {"base_channels": 8, "multipliers": [1, 2], "norm_groups": 4, "attention": False},
        "training": {"steps": 5, "crop": 16, "save_every": 5},
        "sampling": {"steps": 4},
    }
    benchmark = make_benchmark(
        tmp_path / "plus",
        {"generators": {"lung_ddpm_plus": plus}, "arms": {"generators": ["lung_ddpm_plus"], "controls": []}},
    )
    for name in ("results", ".snakemake"):
        shutil.copytree(tiny_benchmark.folder / name, benchmark.folder / name)
    run = benchmark.run("--until", "synthesize")
    assert run.returncode == 0, run.stdout[-5000:]
    done = set(finished_rules(run.stdout))
    assert {"train_generator", "synthesize"} <= done
    assert not {"simulate", "index", "prepare"} & done
    samples = benchmark.results / "synthetic/lung_ddpm_plus"
    records = [json.loads(path.read_text()) for path in samples.rglob("sample.json")]
    assert {record["layout_origin"] for record in records} == {"reference", "added"}
    assert {record["settings"]["sampling"]["steps"] for record in records} == {4}


def kill_during(process, log):
    """Kill -9 Snakemake and all its jobs as soon as `log` has been written to."""
    while not (log.exists() and log.stat().st_size):
        assert process.poll() is None, "the run ended before it could be interrupted"
        time.sleep(0.1)
    time.sleep(1.0)  # wherever the job is then
    for victim in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        try:
            victim.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.wait()


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_tables(tiny_benchmark, make_benchmark, tmp_path):
    benchmark = make_benchmark(tmp_path, TWO_ARMS)
    for log in ("train_generator-lung_ddpm-main-all.log", "train_segmenter-real-fold0_seed0.log"):
        with open(os.devnull, "w") as nowhere:
            process = subprocess.Popen(
                benchmark.command(), cwd=benchmark.repository, stdout=nowhere, stderr=subprocess.STDOUT
            )
        kill_during(process, benchmark.results / "logs" / log)
    run = benchmark.run()
    assert run.returncode == 0, run.stdout[-5000:]
    assert_same_measures(benchmark, tiny_benchmark)
