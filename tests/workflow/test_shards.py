"""No job starts without work: never more shards than scans and samples, however many the config allows.

Where the scans are counted first, test_module.py checks it.
"""

import pytest
from test_dry_run import jobs

pytestmark = pytest.mark.workflow

MANY = {"workflow": {"case_shards": 32, "synthesis_shards": 32}}
WITHOUT_NETWORKS = {"arms": {"generators": ["paste_constant"], "controls": [], "synthetic_only": []}}


def test_of_the_phantom_cohort_they_are_known_before(make_benchmark, tmp_path):
    planned = jobs(make_benchmark(tmp_path, {**MANY, **WITHOUT_NETWORKS}).run("--dry-run").stdout)
    assert (planned["prepare"], planned["synthesize"]) == (6, 3)
