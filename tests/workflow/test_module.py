"""The workflow as a module of another one: Snakemake's `module` with and without `prefix`, in the other's folder."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import yaml
from test_dry_run import SNAKEMAKE, jobs
from tiny import TINY, TWO_ARMS, merged

OUTER = """
configfile: "benchmark.yaml"

rule all:
    input: "summary.txt"

module lungddpm:
    snakefile: "{snakefile}"
    config: config
    {prefix}

use rule * from lungddpm as lungddpm_*

rule summary:
    input: "{folder}results/tables/verdict.csv", "{folder}results/SHA256SUMS"
    output: "summary.txt"
    shell: "cp {{input[0]}} {{output}}"
"""


@pytest.fixture
def outer(repository, tmp_path):
    """A function that writes another workflow which uses ours, and runs Snakemake in its folder."""

    def run(*arguments, prefix="bench", overlay=None):
        line, folder = (f'prefix: "{prefix}"', f"{prefix}/") if prefix else ("", "")
        snakefile = OUTER.format(snakefile=repository / "workflow/Snakefile", prefix=line, folder=folder)
        (tmp_path / "Snakefile").write_text(snakefile)
        demo = yaml.safe_load((repository / "config.yaml").read_text())
        (tmp_path / "benchmark.yaml").write_text(yaml.safe_dump(merged(merged(demo, TINY), overlay or {})))
        return subprocess.run(
            [SNAKEMAKE, "--cores", "2", *arguments], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env={**os.environ, "NO_COLOR": "1"}, check=False,
        )  # fmt: skip

    return run


@pytest.mark.parametrize("prefix", ["bench", ""])
def test_all_rules_are_planned(outer, tmp_path, prefix):
    run = outer("--dry-run", "--printshellcmds", prefix=prefix)
    assert run.returncode == 0, run.stdout[-3000:]
    planned = jobs(run.stdout)
    assert (planned["lungddpm_train_segmenter"], planned["lungddpm_checksums"]) == (4, 1)
    assert planned["summary"] == planned["all"] == 1, "the default target is the other workflow's"
    commands = re.findall(r"^Shell command: (.*lungddpm .*)$", run.stdout, re.MULTILINE)
    assert len(commands) > 25
    for command in commands:
        paths = [Path(word) for word in command.split() if "results" in word and not word.startswith("-")]
        assert all(path.is_relative_to(Path(prefix, "results")) for path in paths), command
    assert not (tmp_path / "results").exists()


def test_external_folders_have_no_prefix(outer, tmp_path):
    case = tmp_path / "theirs/synthetic-1"
    case.mkdir(parents=True)
    (case / "ct.nii.gz").touch()
    arms = {"generators": ["theirs"], "external": {"theirs": "theirs"}, "synthetic_only": [], "controls": []}
    run = outer("--dry-run", "--printshellcmds", overlay={"arms": arms})
    assert run.returncode == 0, run.stdout[-3000:]
    assert "--external theirs " in run.stdout
    assert re.search(r"input: .*, theirs/synthetic-1/ct\.nii\.gz", run.stdout)


def test_a_wrong_key_is_named(outer):
    run = outer("--dry-run", overlay={"grdi": {}})
    assert run.returncode != 0
    assert "grdi: there is no such key" in run.stdout


@pytest.mark.slow
def test_it_runs_below_its_prefix_to_the_verdict_of_a_run_of_its_own(outer, tiny_benchmark, tmp_path):
    run = outer(overlay=TWO_ARMS)
    assert run.returncode == 0, run.stdout[-5000:]
    ours = pd.read_csv(tmp_path / "bench/results/tables/cases.csv")
    alone = tiny_benchmark.table("cases.csv")
    pd.testing.assert_frame_equal(ours, alone[alone["arm"].isin(ours["arm"])].reset_index(drop=True))
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {"Snakefile", "benchmark.yaml", "bench", "summary.txt", ".snakemake"}
    assert "Nothing to be done" in outer("--dry-run", overlay=TWO_ARMS).stdout


@pytest.mark.workflow
def test_scans_are_counted_below_the_prefix(outer, tiny_benchmark, tmp_path):
    """However many shards the config allows, no job starts without a usable scan, or without a sample to make."""
    shutil.copytree(tiny_benchmark.results / "source", tmp_path / "scans")
    for readers in (tmp_path / "scans/PHANTOM-0002").rglob("*.xml"):
        readers.unlink()  # without them, a scan is left out
    overlay = {
        "source": {"kind": "lidc", "path": str(tmp_path / "scans")},
        "roles": {"discovery": 2, "reference": 1, "test": 2},
        "arms": {"generators": ["paste_constant"], "controls": [], "synthetic_only": []},
        "segmentation": {"n_folds": 2},
        "workflow": {"case_shards": 32, "synthesis_shards": 32},
    }
    results = tmp_path / "bench/results"
    arms = results.relative_to(tmp_path) / "arms"
    targets = [f"{arms}/real/arm.json", f"{arms}/real+paste_constant@1.0/draws/fold0_seed0/draw.json"]
    run = outer("--keep-going", *targets, overlay=overlay)
    assert run.returncode == 0, run.stdout[-5000:]
    index, cases = (
        pd.read_csv(results / f"cases/{name}.tsv", sep="\t", keep_default_na=False) for name in ("index", "cases")
    )
    assert index["status"].tolist().count("excluded") == 1
    started = re.findall(r"^(?:local)?(?:rule|checkpoint) lungddpm_(\w+):$", run.stdout, re.MULTILINE)
    # In five shards, the second would have the excluded scan alone.
    assert (started.count("prepare"), started.count("synthesize")) == (4, 2)
    assert len(list((results / "synthetic/paste_constant").glob("*/samples-*.tsv"))) == 2
    shards = [pd.read_csv(path, sep="\t") for path in sorted(results.glob("cases/cases-*.tsv"))]
    assert [(shard["status"] == "ok").any() for shard in shards] == [True] * 4
    assert sorted(case for shard in shards for case in shard["case_id"]) == sorted(cases["case_id"])
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {"Snakefile", "benchmark.yaml", "bench", "scans", ".snakemake"}
    assert "Nothing to be done" in outer("--dry-run", *targets, overlay=overlay).stdout
