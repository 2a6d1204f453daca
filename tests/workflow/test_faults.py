"""Errors of disks, clocks and people during a run: each is reported, and the run still ends with the same tables."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from tiny import finished_rules, rules_of

pytestmark = [pytest.mark.workflow, pytest.mark.slow]

LUNGDDPM = Path(sys.executable).with_name("lungddpm")
TABLES = ["cases.csv", "verdict.csv", "lesions.csv"]
FOLD = "nnUNet_results/seed0/Dataset501_LungNodule/LungDDPMTrainer__nnUNetPlans__lungddpm/fold_0"


@pytest.fixture
def copied(tiny_benchmark, make_benchmark, tmp_path):
    """A copy of the finished tiny benchmark in a folder of another name, to be damaged."""
    benchmark = make_benchmark(tmp_path / "copied")
    for name in ("results", ".snakemake"):
        shutil.copytree(tiny_benchmark.folder / name, benchmark.folder / name, symlinks=True)
    return benchmark


@pytest.fixture
def mounted(tmp_path):
    """A function that mounts something on a new folder, until the test ends."""
    folders = []

    def mount(*options: str) -> Path:
        folder = tmp_path / f"mounted{len(folders)}"
        folder.mkdir()
        done = subprocess.run(["mount", *options, folder], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no right to mount: {done.stderr.strip()}")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", folder], check=True)


def assert_same_tables(benchmark, other):
    for name in TABLES:
        pd.testing.assert_frame_equal(benchmark.table(name), other.table(name))


PREPARE = "prepare --index results/cases/index.tsv --source results/source --table results/cases/cases-0.tsv"
TRAIN = "train --generator lung_ddpm --cases results/cases/cases.tsv --threads 1"
SEGMENT = "segment train --arm-folder results/arms/real --fold 0 --seed 0 --threads 1"
REPLICATE = "results/segmentation/real/fold0_seed0"
EVALUATE = f"evaluate --cases results/cases/cases.tsv --predictions {REPLICATE}/predictions --output {REPLICATE}"


@pytest.mark.parametrize(
    ("stage", "made", "free_kib"),
    [
        (PREPARE, "cases/PHANTOM-0001/ct.nii.gz", 16),
        (TRAIN, "models/lung_ddpm/main/all/model.safetensors", 16),  # while it decodes the cases
        (TRAIN, "models/lung_ddpm/main/all/model.safetensors", 600),  # while it saves its state
        (SEGMENT, f"arms/real/{FOLD}/checkpoint_final.pth", 64),
        (EVALUATE, "segmentation/real/fold0_seed0/metrics.csv", 0),
    ],
)
def test_a_full_disk_is_reported_and_nothing_is_lost(tiny_benchmark, mounted, stage, made, free_kib):
    disk = mounted("-t", "tmpfs", "-o", "size=300m", "tmpfs")
    results, ballast = disk / "results", disk / "ballast"
    shutil.copytree(tiny_benchmark.results, results, symlinks=True)
    if stage == EVALUATE:
        (results / made).unlink()
    else:
        shutil.rmtree((results / made).parent)
    command = [LUNGDDPM, *stage.split(), "--configfile", "results/config.json"]
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - free_kib * 1024)
    full = subprocess.run(command, cwd=disk, capture_output=True, text=True, check=False)
    assert full.returncode == 2, full.stderr
    assert "no space left on the device. Free some space" in full.stderr
    assert "Traceback" not in full.stderr
    assert not (results / made).exists()
    assert not [path for path in results.rglob(".*-*") if path.is_file()], "no half-written file stays"
    ballast.unlink()
    freed = subprocess.run(command, cwd=disk, capture_output=True, text=True, check=False)
    assert freed.returncode == 0, freed.stderr
    if not made.endswith(".pth"):  # nnU-Net's checkpoints hold the time
        assert (results / made).read_bytes() == (tiny_benchmark.results / made).read_bytes()


def sums_of(results):
    """Hash of every file that does not hold the time, by name; of blosc2's not either, which differ by threads."""
    lines = [line.split("  ", 1) for line in (results / "SHA256SUMS").read_text().splitlines()]
    varying = ("checkpoint_final.pth", ".b2nd", ".pkl", ".csv", ".json")
    return {name: digest for digest, name in lines if not name.endswith(varying)}


def test_truncated_files_are_found_and_made_again(tiny_benchmark, copied):
    reported = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=copied.results, check=False)
    assert reported.returncode == 0
    moved = copied.run("--dry-run")
    assert "Nothing to be done" in moved.stdout, "a folder may be moved"
    cut_short = [
        f"arms/real/{FOLD}/checkpoint_final.pth",
        "arms/real/nnUNet_preprocessed/Dataset501_LungNodule/nnUNetPlans_3d_fullres/PHANTOM-0002.b2nd",
        "cases/PHANTOM-0001/ct.nii.gz",
        "cases/PHANTOM-0002/layout.nii.gz",
        "cases/PHANTOM-0003/qc.png",
        "label_fidelity/fold0_seed0/metrics.csv",
        "models/lung_ddpm/main/all/model.safetensors",
        "qc/cases/PHANTOM-0004.html",
        "quality/lung_ddpm.csv",
        "segmentation/real+real/fold0_seed0/metrics.csv",
        "segmentation/real/fold0_seed0/predictions/PHANTOM-0001.nii.gz",
        "synthetic/lung_ddpm/all-fold0_seed0/PHANTOM-0003_fold0_seed0_s000/ct.nii.gz",
        "tables/verdict.md",
    ]
    for name in cut_short:
        path = copied.results / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (copied.results / "figures/forest.png").unlink()
    verify = [LUNGDDPM, "verify", "--results", copied.results]
    reported = subprocess.run(verify, capture_output=True, text=True, check=False)
    assert reported.returncode == 2
    assert [line.split("copied/results/")[1] for line in reported.stderr.splitlines() if " has changed" in line] == [
        f"{name} has changed" for name in sorted(cut_short)
    ]
    assert "figures/forest.png is missing" in reported.stderr
    assert subprocess.run([*verify, "--repair"], capture_output=True, check=False).returncode == 0

    run = copied.run()
    assert run.returncode == 0, run.stdout[-5000:]
    done = set(finished_rules(run.stdout))
    expected = {"prepare", "train_generator", "synthesize", "plan", "train_segmenter", "predict", "quality", "qc"}
    assert expected | {"label_fidelity"} <= done
    assert not {"simulate", "index"} & done
    assert_same_tables(copied, tiny_benchmark)
    assert sums_of(copied.results) == sums_of(tiny_benchmark.results)
    assert subprocess.run(verify, capture_output=True, check=False).returncode == 0
    assert "Nothing to be done" in copied.run("--dry-run").stdout


def test_a_clock_that_went_back_does_not_stop_the_run(tiny_benchmark, copied):
    for path in [*copied.results.rglob("*")]:
        tomorrow = path.lstat().st_mtime + 86400
        os.utime(path, (tomorrow, tomorrow), follow_symlinks=False)
    (copied.results / "report.html").unlink()
    run = copied.run()
    assert run.returncode == 0, run.stdout[-5000:]
    assert "had future time stamps" in run.stdout
    assert rules_of(run.stdout) == {"write_report": 1, "checksums": 1}
    assert_same_tables(copied, tiny_benchmark)
    assert "Nothing to be done" in copied.run("--dry-run").stdout


def hashes(folder):
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_scans_may_be_on_a_disk_that_cannot_be_written(tiny_benchmark, make_benchmark, mounted, tmp_path):
    scans = mounted("--bind", tiny_benchmark.results / "source")
    subprocess.run(["mount", "-o", "remount,bind,ro", scans], check=True)
    benchmark = make_benchmark(tmp_path / "read-only", {"source": {"kind": "lidc", "path": str(scans)}})
    run = benchmark.run("--until", "collect")
    assert run.returncode == 0, run.stdout[-5000:]
    ours, theirs = (hashes(b.results / "cases") for b in (benchmark, tiny_benchmark))
    volumes = {path: digest for path, digest in theirs.items() if path.name.endswith(".nii.gz")}
    assert volumes
    assert {path: ours.get(path) for path in volumes} == volumes
