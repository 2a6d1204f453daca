"""`lungddpm status` on folders as runs leave them: against what was put there, and estimates added up by hand."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import datetime
from types import SimpleNamespace

import pytest
from documented import documented_keys, keys_of
from typer.testing import CliRunner

from lungddpm.cli import app
from lungddpm.core import locks
from lungddpm.core.cases import COLUMNS, write_cases
from lungddpm.core.files import json_text
from lungddpm.core.locks import FileLock
from lungddpm.core.roles import DISCOVERY
from lungddpm.operations import status as reading
from lungddpm.operations.jobs import jobs_of
from lungddpm.operations.plan import Stage, load_plan_config

CONFIG = {
    "source": {"phantom": {"patients": 6}},
    "roles": {"discovery": 2, "reference": 1, "test": 3},
    "arms": {"generators": ["copy_paste"], "controls": [], "doses": [1.0]},
    "segmentation": {"n_folds": 2, "folds": [0], "seeds": [0, 1]},
    "workflow": {"case_shards": 1, "synthesis_shards": 1},
}
NOW = time.time()


class Run:
    """A results folder to fill."""

    def __init__(self, results):
        self.results = results
        self.config = load_plan_config(json.dumps(CONFIG))
        self.jobs = {job.name: job for job in jobs_of(self.config, 1, self.config.roles.counts(6)[DISCOVERY])}

    def of(self, stage):
        return [job for job in self.jobs.values() if job.stage == stage]

    def finish(self, job, seconds=10.0, ended=NOW):
        output = self.results / job.output
        if job.output.suffix or job.output.name.startswith("."):
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text("\t".join(COLUMNS) + "\n" if output.suffix == ".tsv" else "made")
        else:
            output.mkdir(parents=True, exist_ok=True)
        times = self.results / job.times
        times.parent.mkdir(parents=True, exist_ok=True)
        times.write_text(f"s\th:m:s\tmax_rss\n{seconds}\t0:00:10\t-\n")
        os.utime(times, (ended, ended))
        self.say(job, "INFO fine", seconds_ago=NOW - ended)

    def say(self, job, *lines, seconds_ago=0.0):
        log = self.results / job.log
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("".join(f"2026-11-29 04:00:00,123 {line}\n" for line in lines))
        os.utime(log, (NOW - seconds_ago, NOW - seconds_ago))

    def status(self):
        return reading.run_status(self.config, self.results)

    def state_of(self, job):
        return next(each for each in self.status().jobs if each.job == job)


def shown(status):
    """Its text, in one line."""
    return " ".join(reading.describe_status(status).split())


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run with a cost model that is made up: 10 s for a job of any stage."""
    made = Run(tmp_path / "results")
    of_stage = {job.stage: len(made.of(job.stage)) for job in made.jobs.values()}
    threads = max(1, (os.cpu_count() or 1) // 2)

    def plan_run(*_):
        large = reading._HALF_THE_CORES
        return [
            Stage(name, jobs, 0.0, jobs * 10 * (threads if name in large else 1) / 3600, 1.0, None, 1.0)
            for name, jobs in of_stage.items()
        ]

    monkeypatch.setattr(reading, "plan_run", plan_run)
    monkeypatch.setattr(reading, "time", SimpleNamespace(time=lambda: NOW))
    return made


@pytest.fixture(params=["flock", "no flock"])
def disk(request, monkeypatch):
    """A disk with locks, and one without."""
    if request.param == "no flock":

        def flock(_file, _operation):
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr(fcntl, "flock", flock)
        monkeypatch.setenv("LUNGDDPM_WARNED_LOCKS", "1")
    return request.param


def test_a_folder_without_a_run_is_reported_at_once(run, monkeypatch):
    monkeypatch.setattr(reading, "plan_run", None)  # it loads torch
    found = run.status()
    assert (found.state, found.locked, found.silent_seconds, found.left) == ("not started", False, None, None)
    assert shown(found).startswith(f"{run.results}: nothing has been started here. 'lungddpm run'")
    assert not run.results.exists() or list(run.results.iterdir()) == []


def test_a_run_is_under_way_as_long_as_its_lock_is_held(run, disk):
    run.finish(run.jobs["simulate"])
    lock = FileLock(run.results / ".lock")
    assert run.status().state == "stopped"
    assert lock.take()
    (run.results / ".lock").touch()
    found = run.status()
    assert (found.state, found.locked) == ("running", True)
    assert found.of("running") == []
    lock.release()
    assert (run.status().state, run.status().locked) == ("stopped", False)
    assert "The same 'lungddpm run' continues" in shown(run.status())


def test_a_lock_that_another_machine_left_behind_does_not_count(run, disk):
    if disk == "flock":
        pytest.skip("such locks end with their process")
    run.finish(run.jobs["simulate"])
    (run.results / ".lock").touch()
    held = run.results / ".lock.held"
    held.write_text("another 1 0.0\n")
    assert run.status().state == "running"
    old = NOW - locks.STALE_AFTER_SECONDS - 60
    os.utime(held, (old, old))
    assert run.status().state == "stopped"


STAGE = """
import sys, time
from lungddpm.cli import app
from lungddpm.core.progress import LOG

@app.command()
def wait():
    LOG.info("training real: 120 of 400, loss 0.1, 60 s, 2/s, 140 s left")
    time.sleep(3600)

sys.argv = ["lungddpm", "--log", sys.argv[1], "wait"]
app()
"""


def test_a_job_runs_as_long_as_its_process_does(run, tmp_path):
    """Without 'lungddpm run', as started by hand or by plain snakemake."""
    job = run.of("train_segmenter")[0]
    (run.results / job.log).parent.mkdir(parents=True)
    process = subprocess.Popen([sys.executable, "-c", STAGE, str(run.results / job.log)])
    try:
        while run.state_of(job).count is None:
            assert process.poll() is None
            time.sleep(0.05)
        found = run.status()
        assert (found.state, found.locked) == ("running", False)
        (state,) = found.of("running")
        assert (state.job, state.count.done, state.count.total, state.count.per_second) == (job, 120, 400, 2.0)
        text = shown(found)
        assert "jobs are running without 'lungddpm run'" in text
        assert re.search(rf"{re.escape(job.name)}: training real, 120 of 400, 2/s, 2.3 min left", text)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert run.state_of(job).state == "stopped"
    assert run.status().state == "stopped"


def test_done_failed_stopped_and_waiting_are_distinguished(run):
    done, failed, stopped, waiting = run.of("train_segmenter")
    run.finish(done)
    run.say(failed, "INFO training", "ERROR error: x.dcm: is truncated. Copy it again.", seconds_ago=90)
    run.say(stopped, "ERROR error: of an earlier try", "INFO training real: 3 of 10, 5 s, 3 s each", seconds_ago=90)
    states = {each.job: each for each in run.status().jobs}
    assert [states[job].state for job in (done, failed, stopped, waiting)] == ["done", "failed", "stopped", "waiting"]
    assert states[failed].message == "error: x.dcm: is truncated. Copy it again."
    text = shown(run.status())
    assert f"{failed.name}: error: x.dcm: is truncated. Copy it again. ({run.results / failed.log})" in text
    assert "train_segmenter 1 4 10 s 1 failed, 1 stopped" in text
    assert f"killed: {stopped.name}" in text


def test_a_traceback_gives_its_last_line(run):
    job = run.jobs["collect"]
    run.say(job, "INFO x", "ERROR Traceback (most recent call last):\n  File 'x'\nValueError: a bug", seconds_ago=90)
    assert run.state_of(job).message == "ValueError: a bug"


def test_what_failed_before_this_run_waits_for_it(run):
    failed, now_failed, ending = run.of("train_segmenter")[:3]
    run.say(failed, "ERROR error: a", seconds_ago=500)
    run.say(now_failed, "ERROR error: b", seconds_ago=100)
    run.say(ending, "INFO all is done", seconds_ago=1)
    lock = FileLock(run.results / ".lock")
    assert lock.take()
    os.utime(lock.path, (NOW - 300, NOW - 300))
    assert [run.state_of(job).state for job in (failed, now_failed, ending)] == ["waiting", "failed", "waiting"]
    assert run.status().running_seconds == pytest.approx(300)
    lock.release()
    assert run.state_of(failed).state == "failed"


def test_a_truncated_prediction_is_not_done(run):
    job = run.of("predict")[0]
    (run.results / job.output).mkdir(parents=True)
    assert run.state_of(job).state == "waiting"
    run.finish(job)
    assert run.state_of(job).state == "done"


def test_a_finished_run_needs_no_estimate(run, monkeypatch):
    monkeypatch.setattr(reading, "plan_run", None)
    for job in run.jobs.values():
        run.finish(job)
    found = run.status()
    assert (found.state, found.left) == ("finished", None)
    assert {each.state for each in found.jobs} == {"done"}
    assert "finished" in shown(found)
    (run.results / run.of("evaluate")[0].output).unlink()
    assert run.status().state == "stopped", "what was deleted has to be made again"


def test_the_end_is_that_of_the_times_added_by_hand(run):
    large = {"synthesize", "train_segmenter", "predict", "quality", "label_fidelity"}
    small = [job for job in run.jobs.values() if job.stage not in large | {"evaluate", "write_report", "checksums"}]
    for place, job in enumerate(small):  # one after the other
        run.finish(job, 10.0, NOW - 10_000 + 10 * place)
    # Two at a time: samples, then trainings; the third training alone.
    for job in run.of("synthesize"):
        run.finish(job, 20.0, NOW - 3000 + 20)
    for job, seconds, ended in zip(run.of("train_segmenter"), (90.0, 100.0, 110.0), (120, 120, 230), strict=False):
        run.finish(job, seconds, NOW - 3000 + ended)
    # 340 s of work in 230 s. By the cost model 5 jobs take 10 s each, so others of their kind take 68 s, not 10 s:
    # 4 predictions, 2 of label fidelity, quality. Those of one core took what they should: 4 evaluations and the end.
    left, at_a_time = run.status().left, 340 / 230
    assert left.expected == pytest.approx((100 + 7 * 68) / at_a_time + 6 * 10)
    assert left.low == pytest.approx((90 + 7 * 34) / at_a_time + 6 * 5)
    assert left.high == pytest.approx((110 + 7 * 136) / at_a_time + 6 * 20)
    assert run.status().modelled == [
        "predict", "evaluate", "quality", "label_fidelity", "write_report", "checksums"
    ]  # fmt: skip


def test_what_waits_for_each_other_does_not_run_side_by_side(run):
    *before, report, checksums = run.jobs.values()
    for job in before:  # all at once, as on a cluster
        run.finish(job, 10.0, NOW - 5000)
    assert run.status().left.expected == pytest.approx(10 + 10)
    run.finish(report, 10.0)
    assert run.status().left.expected == pytest.approx(10)
    assert checksums.stage == "checksums"
    assert "About 10 s left (5 s to 20 s) once it resumes." in shown(run.status())


def test_a_training_under_way_is_estimated_by_its_count(run, monkeypatch):
    *others, last = run.jobs.values()
    (training,) = (job for job in others if job == run.of("train_segmenter")[0])
    for job in others:
        if job != training:
            run.finish(job, 10.0, NOW - 5000)
    run.finish(last)
    run.say(training, "INFO training real: 3 of 10, 30 s, 10 s each, 70 s left", seconds_ago=20)
    lock = FileLock(run.results / training.log)
    assert lock.take()
    left = run.status().left
    assert left.expected == pytest.approx(50)
    assert (left.low / left.expected, left.high / left.expected) == pytest.approx((0.8, 1.25))
    # What it counts before its training says nothing of that: others of its stage took 10 s.
    run.say(training, "INFO preprocessing the draw of fold0_seed1: 3 of 10, 300 s, 100 s each, 700 s left")
    assert run.status().left.expected == pytest.approx(5)
    lock.release()


def test_the_cost_model_is_asked_once(run, monkeypatch):
    run.finish(run.jobs["simulate"])
    left = run.status().left
    monkeypatch.setattr(reading, "plan_run", None)
    assert run.status().left == left
    run.config = load_plan_config(json.dumps({**CONFIG, "seed": 7}))
    with pytest.raises(TypeError):
        run.status()


def test_scans_that_are_not_indexed_are_not_known(tmp_path):
    values = {"source": {"kind": "images"}, "arms": {"generators": ["copy_paste"]}}
    found = reading.run_status(load_plan_config(json.dumps(values)), tmp_path / "results")
    assert (found.state, found.complete, found.left) == ("not started", False, None)
    assert [each.job.name for each in found.jobs] == ["index"]


def test_a_test_set_that_was_added_since_is_counted_once_it_is_indexed(tmp_path):
    """The tables of the run before do not list it."""
    row = dict.fromkeys(["case_id", "patient_id", "series_uid", "reason", "path", "sha256"], "")
    row |= {"source": "images", "data_set": "internal", "status": "ok", "n_nodules": 1}
    row |= {f"size_{axis}": 100 for axis in "xyz"} | {f"spacing_{axis}_mm": 1.0 for axis in "xyz"}
    internal = [{**row, "role": role} for role in ("discovery", "discovery", "reference", "test")]
    cases, index = (tmp_path / "cases" / name for name in ("cases.tsv", "index.tsv"))
    cases.parent.mkdir()
    for table in (cases, index):
        write_cases(table, internal)
    values = {**CONFIG, "source": {"kind": "images"}, "external_tests": {"clinic": {"kind": "images"}}}
    config = load_plan_config(json.dumps(values))
    found = reading.run_status(config, tmp_path)
    assert (found.state, found.complete) == ("stopped", False)
    assert [each.job.name for each in found.jobs] == ["index"]
    write_cases(index, [*internal, {**row, "data_set": "clinic", "role": "test"}])
    found = reading.run_status(config, tmp_path)
    assert found.complete
    assert "predict-real-fold0_seed0" in {each.job.name for each in found.jobs}


def test_the_command_takes_the_config_that_the_run_left(run, monkeypatch):
    run.finish(run.jobs["simulate"])
    (run.results / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.chdir(run.results.parent)
    result = CliRunner().invoke(app, ["status", "--json"])
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["results"] == "results"
    assert (values["state"], values["total"]["jobs"], values["total"]["done"]) == ("stopped", len(run.jobs), 1)
    assert values["estimate"]["ends"] is None


def test_its_json_has_the_keys_of_the_docs(run):
    failed, stopped, running, *_ = run.of("train_segmenter")
    run.finish(run.jobs["simulate"])
    run.say(failed, "ERROR error: x", seconds_ago=90)
    run.say(stopped, "INFO training", seconds_ago=90)
    run.say(running, "INFO training real: 3 of 10, 30 s, 10 s each, 70 s left")
    lock = FileLock(run.results / running.log)
    assert lock.take()
    values = json.loads(json_text(reading.status_values(run.status())))
    lock.release()
    assert documented_keys("status") - {"estimate"} == keys_of(values)
    (counted,) = values["running_jobs"]
    assert (counted["job"], counted["done"], counted["of"], counted["per_second"]) == (running.name, 3, 10, 0.1)
    assert (values["state"], values["locked"], values["running_seconds"]) == ("running", False, None)
    assert datetime.fromisoformat(values["estimate"]["ends"]).tzinfo is not None
