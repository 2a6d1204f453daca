"""Jobs by name; tests/workflow/test_plan.py checks that they are the jobs that Snakemake plans."""

from lungddpm.operations.jobs import jobs_of, shards_of_scans
from lungddpm.operations.plan import load_plan_config


def test_every_shard_has_a_usable_scan(repository):
    config = load_plan_config(repository / "config.yaml", '{"workflow": {"case_shards": 4}}')
    # In four turns, the second job would have the excluded scans alone.
    assert shards_of_scans(config, [True, False, True, True, True, False]) == 3
    assert shards_of_scans(config, [True] * 6) == 4
    assert shards_of_scans(config, [True, False]) == 1


def test_a_directory_alone_is_not_done(tmp_path, repository):
    config = load_plan_config(repository / "config.yaml")
    job = next(job for job in jobs_of(config, 1, 4) if job.stage == "predict")
    assert not job.is_done(tmp_path)
    (tmp_path / job.output).mkdir(parents=True)
    assert not job.is_done(tmp_path)
    (tmp_path / job.times).parent.mkdir()
    (tmp_path / job.times).write_text("s\n3.0\n")
    assert job.is_done(tmp_path)
