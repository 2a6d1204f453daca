"""The two LIDC-IDRI scans through the same Snakefile to a verdict."""

import json

import pandas as pd
import pytest
from tiny import TWO_ARMS

pytestmark = pytest.mark.workflow

SHARED = {
    "roles": {
        "discovery": ["LIDC-IDRI-0001", "LIDC-IDRI-0003"],
        "reference": ["LIDC-IDRI-0001"],
        "test": ["LIDC-IDRI-0003"],
        "allow_shared_patients": True,
    },
    "grid": {"size": [48, 48, 48]},
    "segmentation": {"network": {"patch": [32, 32, 32]}, "n_folds": 2},
    "workflow": {"case_shards": 2},
}


# A denoiser and its training are the same on any scans.
@pytest.mark.parametrize("generator", ["paste_constant", pytest.param("lung_ddpm", marks=pytest.mark.slow)])
def test_two_lidc_scans_reach_a_verdict(shared_data, make_benchmark, tmp_path, generator):
    source = {"kind": "lidc", "path": str(shared_data / "lidc")}
    arms = {"arms": {**TWO_ARMS["arms"], "generators": [generator]}}
    benchmark = make_benchmark(tmp_path, {**SHARED, **arms, "source": source})
    run = benchmark.run()
    assert run.returncode == 0, run.stdout[-8000:]
    cases = pd.read_csv(benchmark.results / "cases/cases.tsv", sep="\t").set_index("case_id")
    assert cases["n_nodules"].to_dict() == {"LIDC-IDRI-0001": 1, "LIDC-IDRI-0003": 4}  # lidc.md
    verdict = benchmark.table("verdict.csv")
    assert set(verdict["arm"]) == {"real", f"real+{generator}@1.0"}
    assert verdict.loc[verdict["metric"] == "dice", "mean"].between(0, 1).all()
    assert "allow_shared_patients" in (benchmark.results / "report.html").read_text(encoding="utf-8")
    manifest = json.loads((benchmark.results / "manifest.json").read_text())
    assert str(shared_data) not in json.dumps(manifest)


def test_shared_patients_are_refused_without_the_switch(shared_data, make_benchmark, tmp_path):
    roles = {**SHARED["roles"], "allow_shared_patients": False}
    source = {"kind": "lidc", "path": str(shared_data / "lidc")}
    run = make_benchmark(tmp_path, {**SHARED, "roles": roles, "source": source}).run()
    assert run.returncode == 2
    assert "LIDC-IDRI-0001 is in roles.discovery and in roles.reference" in run.stdout
