"""Every stage that computes with a network goes through the claim of a GPU, and torch is loaded after it."""

import json
import os
import subprocess
import sys
import tempfile

import pytest
from typer.testing import CliRunner
from yte import process_yaml

from lungddpm.cli import app
from lungddpm.core.device import VISIBLE
from lungddpm.core.errors import ConfigError

A, B = (f"GPU-{letter * 8}-0000-0000-0000-000000000000" for letter in "ab")
ARM = ["--arm-folder", "results/arms/real"]
STAGES = {
    "train": ("lungddpm.models.training.run_train", ["train", "--generator", "lung_ddpm"]),
    "estimate": ("lungddpm.operations.estimate.run_estimate", ["train", "--generator", "lung_ddpm", "--estimate"]),
    "synthesize": (
        "lungddpm.synthesis.run.run_synthesize",
        ["synthesize", "--generator", "lung_ddpm", "--weights", "model.safetensors"],
    ),
    "segment train": ("lungddpm.segmentation.nnunet.run_train_segmenter", ["segment", "train", *ARM]),
    "segment predict": ("lungddpm.segmentation.nnunet.run_predict", ["segment", "predict", *ARM, "--output", "masks"]),
    "label-fidelity": (
        "lungddpm.quality.label_fidelity.run_label_fidelity",
        ["label-fidelity", "samples.tsv", "--output", "label_fidelity"],
    ),
    "bench": ("lungddpm.operations.bench.run_bench", ["bench"]),
}


@pytest.fixture
def two_gpus(tmp_path, monkeypatch):
    """A machine whose `nvidia-smi` lists two GPUs, and a config file in the working folder."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho 'GPU 0: NVIDIA L4 (UUID: {A})'\necho 'GPU 1: NVIDIA L4 (UUID: {B})'\n")
    program.chmod(0o755)
    for variable in [name for name in os.environ if name.startswith(("SLURM_", "LOCAL_", "CUDA_VISIBLE"))]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("{}")


@pytest.fixture
def run(two_gpus, monkeypatch):
    """A function that runs a verb; returns the device that its stage got and the GPUs that it would see."""

    def run_verb(stage, *arguments):
        seen = []

        def run_stage(*given, **options):
            devices = [getattr(value, "device", value) for value in given]
            seen.extend([device for device in devices if device in ("auto", "cpu", "cuda")] + [visible()])

        monkeypatch.setattr(stage, run_stage)
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return seen

    return run_verb


def visible():
    return os.environ.get(VISIBLE)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_sees_the_gpu_that_was_asked_for_and_no_other(run, name):
    stage, arguments = STAGES[name]
    assert run(stage, *arguments, "--device", "cuda:1") == ["cuda", B]
    assert run(stage, *arguments) == ["auto", A]
    assert run(stage, *arguments, "--device", "cpu") == ["cpu", None]
    assert visible() is None
    with pytest.raises(ConfigError, match=rf"'cuda:5' is not available here.*cuda:1 \(NVIDIA L4, {B}\)"):
        run(stage, *arguments, "--device", "cuda:5")


@pytest.mark.parametrize(("lungs", "seen"), [("classical", None), ("lungmask", A), ("totalsegmentator", A)])
def test_prepare_claims_a_gpu_where_a_network_finds_the_lungs(run, tmp_path, lungs, seen):
    (tmp_path / "config.yaml").write_text(json.dumps({"layouts": {"lungs": lungs}}))
    assert run("lungddpm.layouts.compose.run_prepare", "prepare") == [seen]


def test_a_generator_without_a_network_claims_none(run):
    assert run(STAGES["synthesize"][0], "synthesize", "--generator", "reference") == ["cpu", None]


def test_the_claim_does_not_load_torch():
    code = "import sys, lungddpm.cli, lungddpm.core.device; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("given", "jobs"), [(None, 2), (B, 1), ("", 1000)])
def test_the_default_profile_starts_one_job_per_visible_gpu(two_gpus, monkeypatch, repository, given, jobs):
    if given is not None:
        monkeypatch.setenv(VISIBLE, given)
    with (repository / "profiles/default/profile.yaml").open() as profile:
        assert process_yaml(profile, require_use_yte=True)["resources"] == [f"gpu={jobs}"]
