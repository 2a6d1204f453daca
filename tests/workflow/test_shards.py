"""No job starts without work: never more shards than scans and samples, however many the config allows."""

import re
import shutil

import pandas as pd
import pytest
from test_dry_run import jobs

pytestmark = pytest.mark.workflow

MANY = {"workflow": {"case_shards": 32, "synthesis_shards": 32}}
WITHOUT_NETWORKS = {"arms": {"generators": ["paste_constant"], "controls": [], "synthetic_only": []}}


def started(output, rule):
    return len(re.findall(rf"^(?:local)?(?:rule|checkpoint) {rule}:$", output, re.MULTILINE))


def test_of_the_phantom_cohort_they_are_known_before(make_benchmark, tmp_path):
    planned = jobs(make_benchmark(tmp_path, {**MANY, **WITHOUT_NETWORKS}).run("--dry-run").stdout)
    assert (planned["prepare"], planned["synthesize"]) == (6, 3)


def test_of_scans_they_are_counted_once_these_are_known(tiny_benchmark, make_benchmark, tmp_path):
    shutil.copytree(tiny_benchmark.results / "source", tmp_path / "scans")
    for readers in (tmp_path / "scans/PHANTOM-0002").rglob("*.xml"):
        readers.unlink()  # without them, a scan is left out
    roles = {"discovery": 2, "reference": 1, "test": 2}
    overlay = {"source": {"kind": "lidc", "path": str(tmp_path / "scans")}, "roles": roles}
    benchmark = make_benchmark(
        tmp_path / "run", {**MANY, **WITHOUT_NETWORKS, **overlay, "segmentation": {"n_folds": 2}}
    )
    target = "results/arms/real+paste_constant@1.0/draws/fold0_seed0/draw.json"
    run = benchmark.run("--keep-going", target)  # after the flag, as options before it take lists
    assert run.returncode == 0, run.stdout[-5000:]
    index, cases = (
        pd.read_csv(benchmark.results / f"cases/{name}.tsv", sep="\t", keep_default_na=False)
        for name in ("index", "cases")
    )
    assert index["status"].tolist().count("excluded") == 1
    # In five shards, the second would have the excluded scan alone.
    assert started(run.stdout, "prepare") == 4
    assert started(run.stdout, "synthesize") == 2
    shards = [pd.read_csv(path, sep="\t") for path in sorted(benchmark.results.glob("cases/cases-*.tsv"))]
    assert [(shard["status"] == "ok").any() for shard in shards] == [True] * 4
    assert sorted(case for shard in shards for case in shard["case_id"]) == sorted(cases["case_id"])
    assert "Nothing to be done" in benchmark.run("--dry-run", target).stdout
