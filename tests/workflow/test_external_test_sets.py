"""A second data set beside the source, from its folder to the table of all cases."""

import re

import pandas as pd
import pytest

from lungddpm.sources.phantom.cohort import write_cohort
from lungddpm.sources.phantom.settings import Phantom

pytestmark = pytest.mark.workflow


def test_an_external_test_set_is_read_beside_a_simulated_source(make_benchmark, tmp_path):
    phantom = {"patients": 2, "matrix": 80, "pixel_mm": 4.4, "slice_mm": 6, "nodule_diameter_mm": [16, 30]}
    folder = tmp_path / "the clinic's scans"
    write_cohort(Phantom(**phantom), 9, folder)
    # Its patients are called as those of the source are.
    clinic = {"kind": "lidc", "path": str(folder), "distinct_patients": True}
    benchmark = make_benchmark(tmp_path / "run", {"external_tests": {"clinic": clinic}})
    run = benchmark.run("--keep-going", "results/cases/cases.tsv")  # after a flag, as options before it take lists
    assert run.returncode == 0, run.stdout[-5000:]
    cases = pd.read_csv(benchmark.results / "cases/cases.tsv", sep="\t", keep_default_na=False)
    assert cases.groupby("data_set")["role"].value_counts().to_dict() == {
        ("internal", "discovery"): 3, ("internal", "reference"): 1, ("internal", "test"): 2, ("clinic", "test"): 2,
    }  # fmt: skip
    assert set(cases.loc[cases["data_set"] == "clinic", "patient_id"]) == {"clinic:PHANTOM-0001", "clinic:PHANTOM-0002"}
    assert (cases["status"] == "ok").all()
    # How many cases there are is counted, as for any data set whose number is not known before.
    assert re.search("^(?:local)?checkpoint count_cases:$", run.stdout, re.MULTILINE)
    assert "Nothing to be done" in benchmark.run("--dry-run", "--keep-going", "results/cases/cases.tsv").stdout
