"""What a run prints: which jobs have ended and what they say of themselves, not the files of each."""

import re
from pathlib import Path

import pytest
from tiny import finished_rules

pytestmark = pytest.mark.workflow

BLOCK = re.compile(r"^(?:local)?rule (\w+):\n    ", re.MULTILINE)
"""The beginning of what Snakemake lists of a job: its files, wildcards and resources."""


def test_jobs_are_reported_without_their_files_and_errors_with_their_logs(make_benchmark, tmp_path):
    benchmark = make_benchmark(tmp_path)
    (benchmark.results / "source").mkdir(parents=True)
    (benchmark.results / "source/PHANTOM-0001").write_text("a file where a folder should be")
    run = benchmark.run("--until", "merge_config", "simulate")
    assert run.returncode != 0
    assert finished_rules(run.stdout) == ["merge_config"]
    assert re.search(r"^1 of \d+ steps \(\d+%\) done$", run.stdout, re.MULTILINE)
    assert "Error in rule simulate:" in run.stdout
    assert "log: results/logs/simulate.log (check log file(s) for error details)" in run.stdout
    assert BLOCK.findall(run.stdout) == []
    assert "jobs to execute" not in run.stdout
    # The log that Snakemake keeps has all of it.
    (kept,) = re.findall(r"^Complete log\(s\): (.*)$", run.stdout, re.MULTILINE)
    assert set(BLOCK.findall(Path(kept).read_text())) == {"merge_config", "simulate"}


def test_an_option_shows_the_files_of_each_job(make_benchmark, tmp_path):
    run = make_benchmark(tmp_path).run("--until", "merge_config", "--printshellcmds")
    assert run.returncode == 0, run.stdout
    assert BLOCK.findall(run.stdout) == ["merge_config"]
