"""Training of the denoiser in several processes: what the job asks for, how it starts them, and what they compute."""

import os
import re
import subprocess

import numpy as np
import pandas as pd
import pytest
from test_dry_run import dry_run, jobs
from tiny import BIN

# Slurm's srun, on nodes that are all this machine: the command once for each.
SRUN = """#!/bin/bash
nodes=$2
echo "$@" > "$(dirname "$0")/asked"
while [ "$1" != torchrun ]; do shift; done
for ((node = 0; node < nodes; node++)); do "$@" & started+=($!); done
for process in "${started[@]}"; do wait "$process" || exit; done
"""
ON_ONE_CPU = {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("keys", "launcher", "asked"),
    [
        ("{}", "", {"gpu=1"}),
        (
            "{'training_gpus': 4}",
            "torchrun --standalone --nproc-per-node 4 --no-python --",
            {"gpu=4"},
        ),
        (
            "{'training_gpus': 4, 'training_nodes': 2}",
            "srun --nodes 2 --ntasks 2 --cpus-per-task 8 --kill-on-bad-exit=1 torchrun --nnodes 2 --nproc-per-node 4 "
            '--rdzv-backend c10d --rdzv-endpoint "$(hostname):$((20000 + SLURM_JOB_ID % 10000))" '
            '--rdzv-id "$SLURM_JOB_ID" --no-python --',
            {"gpu=8", "nodes=2", "tasks=2", "tasks_per_gpu=0", "gres=gpu:4", "mpi=srun"},
        ),
    ],
)
def test_the_job_asks_for_its_gpus_and_starts_a_process_on_each(repository, tmp_path, keys, launcher, asked):
    arguments = ["--workflow-profile", "profiles/slurm", "--cores", "8", "--printshellcmds"]
    run = dry_run(repository, tmp_path, *arguments, "--config", f"workflow={keys}")
    assert run.returncode == 0, run.stderr
    reported = re.search(r"rule train_generator:.*?resources: (.*?)\nShell command: (.*?)\n", run.stdout, re.DOTALL)
    resources = set(reported[1].split(", "))
    of_launch = re.compile("gpu|nodes|tasks|gres|mpi")
    assert {resource for resource in resources if of_launch.match(resource)} == asked
    before, _, after = reported[2].partition(" lungddpm ")
    assert before.strip() == launcher
    # The stage itself divides them among the processes of a node.
    assert after.endswith("--threads 8")


def test_every_gpu_of_a_workstation_has_a_job(repository, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    listed = "\n".join(f"GPU {number}: NVIDIA A100 (UUID: GPU-{number})" for number in range(4))
    program.write_text(f"#!/bin/sh\necho '{listed}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for gpus in (1, 2):
        run = dry_run(repository, tmp_path, "--cores", "16", "--config", f"workflow={{'training_gpus': {gpus}}}")
        assert run.returncode == 0, run.stderr
        threads = threads_of_rules(run.stdout)
        assert (threads["train_segmenter"], threads["synthesize"], threads["train_generator"]) == (4, 4, 4 * gpus)


def threads_of_rules(output):
    """The threads of each rule's jobs; Snakemake prints no 1."""
    found = re.findall(r"^(?:local)?rule (\w+):\n((?:    .*\n)+)", output, re.MULTILINE)
    return {name: int(m[1]) if (m := re.search(r"threads: (\d+)", text)) else 1 for name, text in found}


def test_a_cluster_has_the_threads_of_its_profile(repository, tmp_path):
    command = [BIN / "lungddpm", "run", "--dry-run", "--workflow-profile", "profiles/slurm", "--directory", tmp_path]
    run = subprocess.run(command, cwd=repository, text=True, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr
    threads = threads_of_rules(run.stdout)
    few, many = (
        ("simulate", "synthesize", "predict", "label_fidelity", "quality"),
        ("train_generator", "train_segmenter"),
    )
    assert {name: threads[name] for name in (*few, *many)} == {**dict.fromkeys(few, 4), **dict.fromkeys(many, 8)}


def test_a_cluster_needs_no_number_of_cores(repository, tmp_path):
    # No dry run, in which Snakemake has one core; this job is not one of the cluster's.
    command = [BIN / "lungddpm", "run", "--workflow-profile", "profiles/slurm", "--until", "merge_config"]
    run = subprocess.run(
        [*command, "--directory", tmp_path], cwd=repository, text=True, capture_output=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert (tmp_path / "results/config.json").exists()
    assert "Provided cores" not in run.stdout + run.stderr


@pytest.mark.slow
@pytest.mark.workflow
def test_two_nodes_compute_what_two_processes_of_one_do(make_benchmark, tmp_path, monkeypatch):
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    environment = {**ON_ONE_CPU, "SLURM_JOB_ID": str(os.getpid()), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def benchmark_with(nodes, accumulation):
        training = {"steps": 3, "accumulation": accumulation}
        cohort = {"source": {"phantom": {"patients": 3}}, "roles": {"discovery": 1, "reference": 1, "test": 1}}
        overlay = {"workflow": {"training_nodes": nodes}, "generators": {"lung_ddpm": {"training": training}}}
        return make_benchmark(tmp_path / "run", {**cohort, **overlay})

    benchmark = benchmark_with(nodes=2, accumulation=1)
    run = benchmark.run("--until", "train_generator", "merge_config")
    assert run.returncode == 0, run.stdout[-5000:]
    assert (tmp_path / "asked").read_text().startswith("--nodes 2 --ntasks 2 ")
    assert "2 processes" in (benchmark.results / "logs/train_generator-lung_ddpm-main-all.log").read_text()

    standalone = [BIN / "torchrun", "--standalone", "--nproc-per-node", "2", "--no-python", "--", BIN / "lungddpm"]
    files = ["--configfile", "results/config.json", "--cases", "results/cases/cases.tsv", "--output", tmp_path / "one"]
    subprocess.run(
        [*standalone, "train", "--generator", "lung_ddpm", *files, "--threads", "1"], cwd=benchmark.folder, check=True
    )
    histories = [
        pd.read_csv(folder / "history.csv")
        for folder in (benchmark.results / "models/lung_ddpm/main/all", tmp_path / "one")
    ]
    assert len(histories[0]) == 3
    np.testing.assert_allclose(*(history["loss"] for history in histories), atol=1e-4, rtol=0)

    # One process with twice the accumulation computes the same; with the same accumulation it does not.
    for accumulation, to_train in ((2, 0), (1, 1)):
        planned = benchmark_with(nodes=1, accumulation=accumulation).run("--until", "train_generator", "--dry-run")
        assert planned.returncode == 0, planned.stdout
        assert jobs(planned.stdout).get("train_generator", 0) == to_train
