"""Every shipped config and profile gives a workflow that Snakemake accepts."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SNAKEMAKE = Path(sys.executable).with_name("snakemake")


def dry_run(repository, folder, *arguments):
    command = [SNAKEMAKE, "--dry-run", "--directory", folder, *arguments]
    return subprocess.run(command, cwd=repository, text=True, capture_output=True, check=False)


def jobs(output):
    """Number of jobs of each rule, from Snakemake's table."""
    return {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", output, re.MULTILINE)}


@pytest.fixture
def overlay_with_path(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"source: {{path: '{tmp_path}'}}\n")
    return path


def test_the_demo(repository, tmp_path):
    run = dry_run(repository, tmp_path, "--cores", "2")
    assert run.returncode == 0, run.stderr
    counts = jobs(run.stdout + run.stderr)
    assert {name: counts[name] for name in ("simulate", "train_generator", "compose", "plan")} == {
        "simulate": 1, "train_generator": 1, "compose": 4, "plan": 4,
    }  # fmt: skip
    assert counts["train_segmenter"] == counts["evaluate"] == counts["predict"]
    assert counts["train_segmenter"] % 4 == 0
    assert not (tmp_path / "results").exists(), "a dry run writes nothing"


@pytest.mark.parametrize(("overlay", "arms", "replicates"), [("lidc", 5, 3), ("paper", 21, 5)])
def test_overlays(repository, tmp_path, overlay_with_path, overlay, arms, replicates):
    run = dry_run(repository, tmp_path, "--cores", "2", "--configfile", f"config/{overlay}.yaml", overlay_with_path)
    assert run.returncode == 0, run.stderr
    counts = jobs(run.stdout + run.stderr)
    assert (counts["compose"], counts["train_segmenter"]) == (arms, arms * replicates)
    assert "simulate" not in counts


def test_the_rivals_train_each_network_once(repository, tmp_path):
    run = dry_run(repository, tmp_path, "--cores", "2", "--printshellcmds", "--configfile", "config/rivals.yaml")
    assert run.returncode == 0, run.stderr
    shown = run.stdout + run.stderr
    # Twelve networks; three controls, and seventeen generators with arms, one of them also filtered, three without.
    assert (jobs(shown)["train_generator"], jobs(shown)["compose"], jobs(shown)["quality"]) == (12, 21, 21)
    assert re.search("--generator flow_4 .*--weights results/models/rectified_flow/main/all/model.safetensors ", shown)
    assert re.search("--generator gem_3d .*--weights results/models/gem_3d/main/all/model.safetensors ", shown)


def test_a_filtered_arm_waits_for_segmenters_of_the_same_real_cases(repository, tmp_path):
    arms = "arms={'filtered': ['lung_ddpm'], 'real_cases': [3, 'all'], 'doses': [1.0], 'controls': []}"
    for shared, names in ((False, ["fold0_seed1"]), (True, [f"fold0_seed{seed}" for seed in range(4)])):
        draws = f"synthesis={{'draw_per_replicate': {not shared}}}"
        run = dry_run(repository, tmp_path, "--cores", "2", "--printshellcmds", "--config", arms, draws)
        assert run.returncode == 0, run.stderr
        shown = run.stdout + run.stderr
        assert jobs(shown)["filter_samples"] == 2 * 4
        arm = "real3+lung_ddpm.filtered@1.0"
        cohort = "real3" if shared else "real3-fold0_seed1"
        (judged,) = re.findall(rf" filter (\S+) .*--arm {re.escape(arm)} --arm-folder (\S+) --fold 0 --seed 1 ", shown)
        assert judged == (f"results/synthetic/lung_ddpm/{cohort}/samples-2.0-0.tsv", "results/arms/real3")
        stage = f"compose .*--arm {re.escape(arm)} "
        composed = re.search(stage if shared else f"{stage}--replicate fold0_seed1 .*", shown)[0]
        line = next(line for line in shown.splitlines() if composed in line)
        assert re.findall(r"--filter (\S+)", line) == [f"results/filter/{arm}/{name}/filter.json" for name in names]


def test_slurm_profile(repository, tmp_path):
    run = dry_run(repository, tmp_path, "--workflow-profile", "profiles/slurm")
    assert run.returncode == 0, run.stderr
    training = re.search(r"rule train_generator:.*?resources: ([^\n]*)", run.stdout + run.stderr, re.DOTALL)[1]
    assert {"mem_mb=32000", "runtime=2880", "gpu=1", "slurm_partition=main"} <= set(training.replace(",", "").split())


@pytest.mark.parametrize(("lungs", "gpus"), [("classical", 0), ("lungmask", 1), ("totalsegmentator", 1)])
def test_prepare_asks_for_a_gpu_where_a_network_finds_the_lungs(repository, tmp_path, lungs, gpus):
    run = dry_run(repository, tmp_path, "--cores", "2", "--config", f"layouts={{'lungs': '{lungs}'}}")
    assert run.returncode == 0, run.stderr
    asked = re.findall(r"rule prepare:.*?resources: ([^\n]*)", run.stdout + run.stderr, re.DOTALL)
    assert {int(re.search(r"gpu=(\d+)", resources)[1]) for resources in asked} == {gpus}


def test_a_feature_network_keeps_its_path_in_jobs_and_only_its_name_in_results(repository, tmp_path):
    weights = tmp_path / "my networks" / "resnet_50.pth"
    weights.parent.mkdir()
    weights.touch()
    values = f"image_quality={{'weights': '{weights}'}}"
    run = dry_run(repository, tmp_path, "--cores", "2", "--printshellcmds", "--config", values)
    assert run.returncode == 0, run.stderr
    (job,) = re.findall(r"rule quality:.*?Shell command: (.*?)\n", run.stdout, re.DOTALL)[:1]
    assert f" --weights '{weights}' " in job
    assert str(weights) not in job.partition("--configfile")[2].partition(" --generator ")[0]
    # A missing file ends the run before its long jobs, not after them.
    weights.unlink()
    run = dry_run(repository, tmp_path, "--cores", "2", "--config", values)
    assert run.returncode != 0
    assert "resnet_50.pth" in run.stdout + run.stderr


def test_nested_values_on_the_command_line(repository, tmp_path):
    run = dry_run(repository, tmp_path, "--cores", "2", "--config", 'segmentation={"seeds": [0], "steps": "100"}')
    assert run.returncode == 0, run.stderr
    assert jobs(run.stdout + run.stderr)["train_segmenter"] == 4


def test_every_trained_generator_has_weights_of_its_own(repository, tmp_path):
    generators = "arms={'generators': ['lung_ddpm_plus'], 'controls': ['med_ddpm']}"
    run = dry_run(repository, tmp_path, "--cores", "2", "--config", generators)
    assert run.returncode != 0
    assert "generators.lung_ddpm_plus: training.crop 64 is larger than grid.size" in run.stdout + run.stderr
    settings = "generators={'lung_ddpm_plus': {'training': {'crop': 16}}}"
    run = dry_run(repository, tmp_path, "--cores", "2", "--printshellcmds", "--config", generators, settings)
    assert run.returncode == 0, run.stderr
    assert jobs(run.stdout + run.stderr)["train_generator"] == 2
    shown = run.stdout + run.stderr
    for name, folder in (("lung_ddpm", "lung_ddpm/main"), ("lung_ddpm_plus", "lung_ddpm_plus/plus")):
        assert re.search(f"train .*--generator {name} --cohort all .*--output results/models/{folder}/all ", shown)
    for name, folder in (("med_ddpm", "lung_ddpm/main"), ("lung_ddpm_plus", "lung_ddpm_plus/plus")):
        assert re.search(f"--generator {name} .*--weights results/models/{folder}/all/model.safetensors ", shown)


def test_a_subset_has_trainings_samples_and_plans_of_its_own_number(repository, tmp_path):
    arms = "arms={'real_cases': [2, 3], 'doses': [2.0], 'controls': ['real']}"
    run = dry_run(repository, tmp_path, "--cores", "2", "--printshellcmds", "--config", arms)
    assert run.returncode == 0, run.stderr
    shown = run.stdout + run.stderr
    counts = jobs(shown)
    assert (counts["compose"], counts["train_generator"], counts["plan"]) == (6, 2, 6)
    assert counts["compose_draw"] == counts["train_segmenter"] / 3
    for number in (2, 3):
        weights = f"results/models/lung_ddpm/main/real{number}/model.safetensors"
        assert re.search(f"synthesize .*--cohort real{number}-fold0_seed0 --dose 2.0 .*--weights {weights} ", shown)
    # The plans are made on the most real cases.
    planned = re.findall(r"segment plan .*--arm-folder (\S+) --plans-from (\S+) ", shown)
    assert {origin for _, origin in planned} == {"results/arms/real3"}
    assert "results/arms/real3" in {arm for arm, _ in planned}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("arms={'real_cases': [4, 'all']}", "arms.real_cases: names 4, but there are 4 usable discovery cases"),
        (
            "synthesis={'draw_per_replicate': False, 'training_per_replicate': True}",
            "needs synthesis.draw_per_replicate",
        ),
    ],
)
def test_what_a_simulated_cohort_cannot_give_is_said_before_it_is_made(repository, tmp_path, values, message):
    run = dry_run(repository, tmp_path, "--cores", "2", "--config", values)
    assert run.returncode != 0
    assert message in run.stdout + run.stderr


def test_a_key_of_an_earlier_version_names_the_new_one(repository, tmp_path):
    run = dry_run(repository, tmp_path, "--cores", "2", "--config", "diffusion={'sampling': {'steps': 5}}")
    assert run.returncode != 0
    assert "diffusion: is now generators.lung_ddpm" in run.stdout + run.stderr


def test_a_typo_is_refused_by_name(repository, tmp_path):
    run = dry_run(repository, tmp_path, "--cores", "2", "--config", "grdi=1")
    assert run.returncode != 0
    assert "grdi: there is no such key" in run.stdout + run.stderr
    assert not (tmp_path / "results").exists()


def test_a_repeated_key_is_refused_by_plain_snakemake(repository, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("seed: 1\ngrid:\n  margin_mm: 1\n  margin_mm: 2\n")
    run = dry_run(repository, tmp_path, "--cores", "2", "--configfile", mine)
    assert run.returncode != 0
    assert "mine.yaml: has the key grid.margin_mm twice, in line 3 and in line 4" in run.stdout + run.stderr
    assert not (tmp_path / "results").exists()


def test_a_clone_in_the_working_folder_does_not_hide_the_package(repository, tmp_path):
    (tmp_path / "lungddpm/lungddpm").mkdir(parents=True)
    (tmp_path / "lungddpm/lungddpm/__init__.py").touch()
    command = [sys.executable, "-m", "snakemake", "--dry-run", "--cores", "1", "--snakefile", repository / "Snakefile"]
    run = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr
    assert jobs(run.stdout + run.stderr)["index"] == 1


def test_a_folder_that_hides_the_package_is_named(repository, tmp_path):
    # An import hook instead of a path is asked last. Beside the Snakefile there is no package, as in a wheel.
    (tmp_path / "lungddpm").mkdir()
    (tmp_path / "run").mkdir()
    for name in ("workflow", "profiles"):
        shutil.copytree(repository / name, tmp_path / "run" / name)
    for name in ("Snakefile", "config.yaml"):
        shutil.copyfile(repository / name, tmp_path / "run" / name)
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "sys.path[:] = [p for p in sys.path if not Path(p, 'lungddpm/__init__.py').exists()]\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]\n"
    )
    command = [SNAKEMAKE, "--dry-run", "--cores", "1"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(command, cwd=tmp_path / "run", env=environment, text=True, capture_output=True, check=False)
    assert run.returncode != 0
    assert f"{tmp_path / 'lungddpm'}: a folder of this name hides the installed package" in run.stdout + run.stderr
