"""`lungddpm status`: what a run has done, what it is doing, and when it will end, read from its files alone.

A job is done when its output is there, and runs when a process holds the lock of its log (see `core.locks`): so the
answer is the same from another terminal, from another node that shares the disk, and after the run has died.
"""

from __future__ import annotations

import csv
import os
import re
import textwrap
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from lungddpm import __version__
from lungddpm.config.models import Config
from lungddpm.core.device import device_of
from lungddpm.core.errors import ConfigError, InputError
from lungddpm.core.files import fingerprint, read_json, write_json
from lungddpm.core.locks import is_held
from lungddpm.core.progress import Count, format_pace, read_count, waiting
from lungddpm.core.roles import DISCOVERY
from lungddpm.core.tables import DisplayTable
from lungddpm.core.text import format_span, plural, styled
from lungddpm.operations.jobs import Job, jobs_of, shards_of_scans
from lungddpm.operations.plan import (
    CPU,
    PEAK_TFLOP_PER_S,
    Cohort,
    count_cohort,
    first_table,
    known_speed,
    plan_run,
)

DONE, RUNNING, FAILED, STOPPED, WAITING = "done", "running", "failed", "stopped", "waiting"
FINISHED, NOT_STARTED = "finished", "not started"
_HALF_THE_CORES = {
    "train_generator", "synthesize", "quality", "train_segmenter", "predict", "filter_samples", "label_fidelity",
}  # fmt: skip
"""Stages whose jobs take half the cores each, or a GPU; those of others take one core."""
_TRAININGS = {"train_generator", "train_segmenter"}
_ENDING_SECONDS = 60.0
"""Between the last line of a job's log and its output; on a cluster, its files take a while to be seen."""
_SPREAD_OF_ONE = 1.5
_SPREAD_OF_PLAN = 2.0
_SPREAD_OF_COUNT = 1.25
"""By what factor a job may take more or less: after one job of its stage, by the cost model of `lungddpm plan`, and
while it counts its own steps."""
_TAIL_BYTES = 2**16
_WIDTH = 100
_NAMED_STAGES = 4
"""This many are named; beyond that only the number is given."""
_RECORD = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (?P<level>[A-Z]+) ", re.MULTILINE)
_PLAN = ".plan.json"


@dataclass(frozen=True)
class JobState:
    """What is known of one job."""

    job: Job
    state: str
    seconds: float | None = None
    """That it took, where Snakemake timed it."""
    ended: float | None = None
    """When, in seconds since 1970."""
    count: Count | None = None
    """The last count of its log, while it runs."""
    silent_seconds: float = 0.0
    """Since the last line of its log."""
    message: str = ""
    """Why it failed."""


@dataclass(frozen=True)
class Span:
    """A time in seconds, with its uncertainty."""

    low: float
    expected: float
    high: float


@dataclass(frozen=True)
class Status:
    """What is known of a run."""

    results: Path
    state: str
    """`running`, `stopped`, `finished` or `not started`."""
    locked: bool
    """Whether a `lungddpm run` that lives holds the folder; jobs may run without."""
    running_seconds: float | None
    """Since that one began."""
    silent_seconds: float | None
    """Since the last line of any job's log; None where there is none."""
    jobs: list[JobState]
    complete: bool
    """Whether these are all jobs: those of scans that are not indexed are not known."""
    left: Span | None
    """Until the end, if it continues now; None before the start, after the end, and where it cannot be estimated."""
    modelled: list[str]
    """Stages that none has finished of, whose times are those of the cost model."""

    def of(self, state: str) -> list[JobState]:
        """The jobs in this state."""
        return [each for each in self.jobs if each.state == state]


def run_status(config: Config, results: Path) -> Status:
    """Read what a run has left so far, and estimate when it will end.

    Args:
        config: of the run; no folder of scans needs to be there.
        results: its folder, which may be missing.

    Raises:
        InputError: a table of cases cannot be read.
        ConfigError: `arms.real_cases` does not fit the cases.
    """
    now, lock = time.time(), results / ".lock"
    locked = is_held(lock)
    began = lock.stat().st_mtime if locked else None
    # Those of an earlier run may be of other data sets.
    tables = [results / "cases/cases.tsv", results / "cases/index.tsv"]
    cohort: Cohort | None = None
    with suppress(ConfigError):  # not indexed yet
        cohort = count_cohort(config, first_table(tables, config), None)
    jobs = [Job("index", "", Path("cases/index.tsv"))] if cohort is None else _jobs(config, cohort, results)
    states = [_state_of(job, results, began, now) for job in jobs]
    found = {each.state for each in states}
    state = STOPPED
    if locked or RUNNING in found:
        state = RUNNING
    elif found == {DONE} and cohort is not None:
        state = FINISHED
    elif found == {WAITING}:
        state = NOT_STARTED
    left, modelled = None, list[str]()
    if cohort is not None and state not in (FINISHED, NOT_STARTED):
        left, modelled = _left(config, cohort, states, results)
    logs = [written for path in results.glob("logs/*.log") if (written := _written(path)) is not None]
    return Status(
        results,
        state,
        locked,
        None if began is None else max(0.0, now - began),
        max(0.0, now - max(logs)) if logs else None,
        states,
        cohort is not None,
        left,
        modelled,
    )


def _jobs(config: Config, cohort: Cohort, results: Path) -> list[Job]:
    index = results / "cases/index.tsv"
    if config.source.is_simulated:
        size = config.source.declared.size(config.source.settings)
        return jobs_of(config, config.workflow.prepare_jobs(size.scans), config.roles.counts(size.scans)[DISCOVERY])
    if not index.exists():
        return jobs_of(config, config.workflow.prepare_jobs(cohort.scans), cohort.discovery)
    with index.open(encoding="utf-8", newline="") as file:
        usable = [row["status"] == "ok" for row in csv.DictReader(file, delimiter="\t")]
    return jobs_of(config, shards_of_scans(config, usable), cohort.discovery)


def _state_of(job: Job, results: Path, began: float | None, now: float) -> JobState:
    """The state of a job; `began` is when the run that is under way did."""
    log = results / job.log
    held, written = is_held(log), _written(log)
    if held and written is not None:
        records, silent = _records(log), max(0.0, now - written)
        counts = [count for _, text in records if (count := read_count(text)) is not None]
        return JobState(job, RUNNING, count=counts[-1] if counts else None, silent_seconds=silent)
    if job.is_done(results):
        return JobState(job, DONE, *_timed(results / job.times))
    if written is None:
        return JobState(job, WAITING)
    if began is not None and (written < began or now - written < _ENDING_SECONDS):
        return JobState(job, WAITING)  # of an earlier run, or just about to leave its output
    records = _records(log)
    if records and records[-1][0] == "ERROR":
        return JobState(job, FAILED, message=records[-1][1].strip().splitlines()[-1])
    return JobState(job, STOPPED, silent_seconds=max(0.0, now - written))


def _written(log: Path) -> float | None:
    """When a log was last written; None where it is not there, as it is deleted when its job starts again."""
    try:
        return log.stat().st_mtime
    except FileNotFoundError:
        return None


def _records(log: Path) -> list[tuple[str, str]]:
    """Level and text of the last messages of a log."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            tail = file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return []
    heads = list(_RECORD.finditer(tail))
    ends = [head.start() for head in heads[1:]] + [len(tail)]
    return [(head["level"], tail[head.end() : end].rstrip("\n")) for head, end in zip(heads, ends, strict=True)]


def _timed(times: Path) -> tuple[float | None, float | None]:
    """Seconds that a job took, and when it ended; None for one that Snakemake did not time."""
    try:
        with times.open(encoding="utf-8", newline="") as file:
            return float(next(csv.DictReader(file, delimiter="\t"))["s"]), times.stat().st_mtime
    except (FileNotFoundError, StopIteration, KeyError, ValueError):
        return None, None


def _left(config: Config, cohort: Cohort, states: Sequence[JobState], results: Path) -> tuple[Span, list[str]]:
    """Seconds until the end if it continues now, and the stages for which the cost model had to be asked."""
    measured: dict[str, list[float]] = defaultdict(list)
    for each in states:
        if each.seconds is not None:
            measured[each.job.stage].append(each.seconds)
    open_jobs = [each for each in states if each.state != DONE]
    counted = {each.job.name: span for each in open_jobs if (span := _counted_span(each)) is not None}
    uncounted = [each for each in open_jobs if each.job.name not in counted]
    needed = list(dict.fromkeys(each.job.stage for each in uncounted if each.job.stage not in measured))
    planned = _planned_seconds(config, cohort, states, results) if needed else {}
    whole = {stage: _measured_span(seconds) for stage, seconds in measured.items()}
    whole |= {stage: _planned_span(planned, measured, stage) for stage in needed}
    spans = [
        (each.job.stage, counted.get(each.job.name) or _left_of(each, whole[each.job.stage])) for each in open_jobs
    ]
    low, expected, high = (
        _wall(states, [(stage, getattr(span, end)) for stage, span in spans]) for end in ("low", "expected", "high")
    )
    return Span(low, expected, high), needed


def _measured_span(seconds: Sequence[float]) -> Span:
    mean = sum(seconds) / len(seconds)
    if len(seconds) == 1:
        return Span(mean / _SPREAD_OF_ONE, mean, mean * _SPREAD_OF_ONE)
    return Span(min(seconds), mean, max(seconds))


def _planned_span(planned: dict[str, float], measured: dict[str, list[float]], stage: str) -> Span:
    """The time of a job by the cost model, times what jobs of its kind took beyond theirs so far."""
    alike = [name for name in measured if name in planned and (name in _HALF_THE_CORES) == (stage in _HALF_THE_CORES)]
    took = sum(sum(measured[name]) for name in alike)
    expected = sum(len(measured[name]) * planned[name] for name in alike)
    seconds = planned[stage] * (took / expected if expected else 1.0)
    return Span(seconds / _SPREAD_OF_PLAN, seconds, seconds * _SPREAD_OF_PLAN)


def _counted_span(state: JobState) -> Span | None:
    """What is left of a job by its own count; None for one that counts what it does before its training, or nothing."""
    left = _counted_left(state)
    if left is None or state.count is None:
        return None
    if state.job.stage in _TRAININGS and not state.count.what.startswith("training "):
        return None
    return Span(left / _SPREAD_OF_COUNT, left, left * _SPREAD_OF_COUNT)


def _left_of(state: JobState, whole: Span) -> Span:
    """What is left of a job that takes this long in total."""
    return Span(0.0, whole.expected / 2, whole.high) if state.state == RUNNING else whole


def _wall(states: Sequence[JobState], left: Sequence[tuple[str, float]]) -> float:
    """Seconds that jobs take, as many at a time as so far; not less than one job of each stage in turn."""
    longest: dict[str, float] = defaultdict(float)
    for stage, seconds in left:
        longest[stage] = max(longest[stage], seconds)
    shared = 0.0
    for is_large in (False, True):
        work = sum(seconds for stage, seconds in left if (stage in _HALF_THE_CORES) == is_large)
        alike = [each for each in states if (each.job.stage in _HALF_THE_CORES) == is_large]
        shared += work / _at_a_time(alike, is_large)
    return max(shared, sum(longest.values()))


def _at_a_time(states: Sequence[JobState], is_large: bool) -> float:
    """How many jobs ran side by side, while any did; before any has ended, what one machine runs."""
    timed = [(each.ended - each.seconds, each.ended) for each in states if each.ended and each.seconds]
    running = sum(each.state == RUNNING for each in states)
    busy, until = 0.0, 0.0
    for start, end in sorted(timed):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    if not busy:
        return max(1, running, 2 if is_large else os.cpu_count() or 1)
    return max(1.0, running, sum(end - start for start, end in timed) / busy)


def _planned_seconds(config: Config, cohort: Cohort, states: Sequence[JobState], results: Path) -> dict[str, float]:
    """Seconds of a job of each stage by the cost model. It needs torch, so its result is cached next to the results."""
    device = _device(states, results)
    key = fingerprint([config, asdict(cohort), device, os.cpu_count(), __version__])
    with suppress(InputError):
        if (kept := read_json(results / _PLAN)).get("key") == key:
            return kept["seconds"]
    with waiting("counting the operations of what has not run yet"):
        stages = plan_run(config, cohort, known_speed(device))
    hours: dict[str, float] = defaultdict(float)
    jobs: dict[str, int] = defaultdict(int)
    for stage in stages:
        threads = max(1, (os.cpu_count() or 1) // 2) if stage.name in _HALF_THE_CORES else 1
        hours[stage.name] += stage.gpu_hours + stage.core_hours / threads
        jobs[stage.name] += stage.jobs
    seconds = {name: 3600 * hours[name] / max(1, jobs[name]) for name in hours}
    with suppress(OSError):
        write_json(results / _PLAN, {"key": key, "seconds": seconds})
    return seconds


def _device(states: Sequence[JobState], results: Path) -> str:
    """What the cost model calls the device that networks have run on so far."""
    used = {device_of(results / each.job.log).lower() for each in states if each.job.stage in _HALF_THE_CORES}
    return next((name for name in PEAK_TFLOP_PER_S if any(name in device for device in used)), CPU)


def describe_status(status: Status) -> str:
    """The status as text for a terminal."""
    parts = [_headline(status)]
    if status.state != NOT_STARTED:
        parts.append(_stage_table(status))
    if running := status.of(RUNNING):
        parts.append("\n".join(["Now:", *(f"  {_doing(each)}" for each in running)]))
    if failed := status.of(FAILED):
        lines = [f"  {each.job.name}: {each.message} ({status.results / each.job.log})" for each in failed]
        parts.append("\n".join([styled("Failed:", "red"), *lines]))
    if stopped := status.of(STOPPED):
        names = ", ".join(each.job.name for each in stopped)
        parts.append(textwrap.fill(f"Stopped without an error message, e.g. killed: {names}", _WIDTH))
    if status.state not in (FINISHED, NOT_STARTED):
        parts.append(_end(status))
    return "\n\n".join([textwrap.fill(parts[0], _WIDTH), *parts[1:]])


def _headline(status: Status) -> str:
    silent = ""
    if status.silent_seconds is not None:
        silent = f"; last log line {format_span(status.silent_seconds)} ago"
    if status.state == FINISHED:
        return f"{status.results}: {styled('finished', 'green')}. 'lungddpm verdict' shows the answer."
    if status.state == NOT_STARTED:
        return (
            f"{status.results}: nothing has been started here. 'lungddpm run' starts a run, 'lungddpm plan' estimates "
            "what it needs."
        )
    if status.locked:
        since = format_span(status.running_seconds or 0.0)
        return f"{status.results}: {styled('under way', 'green')} for {since}{silent}."
    if status.state == RUNNING:
        return (
            f"{status.results}: {styled('jobs are running', 'yellow')} without 'lungddpm run': started by hand or by "
            f"plain snakemake, or left over{silent}."
        )
    text = f"{status.results}: {styled('stopped', 'yellow')}{silent}. The same 'lungddpm run' continues."
    if status.silent_seconds is not None and status.silent_seconds < _ENDING_SECONDS:
        text += " It may be running on another machine whose locks are not visible here: run 'lungddpm status' there."
    return text


def _stage_table(status: Status) -> str:
    rows = []
    for stage, of_stage in _by_stage(status).items():
        counts = {state: sum(each.state == state for each in of_stage) for state in (DONE, RUNNING, FAILED, STOPPED)}
        seconds = _mean_seconds(of_stage)
        mean = "" if seconds is None else format_span(seconds)
        others = ", ".join(f"{counts[state]} {state}" for state in (RUNNING, FAILED, STOPPED) if counts[state])
        rows.append([stage, str(counts[DONE]), str(len(of_stage)), mean, others])
    heads = ["stage", "done", "of", "each", "now"]
    return DisplayTable(heads, rows, [False, True, True, True, False]).text(_WIDTH)


def _doing(state: JobState) -> str:
    count = state.count
    if count is None:
        return state.job.name
    pace = "" if count.per_second is None else f", {format_pace(count.per_second)}"
    seconds = _counted_left(state)
    left = "" if seconds is None else f", {format_span(seconds)} left"
    return f"{state.job.name}: {count.what}, {count.done} of {count.total}{pace}{left}"


def _counted_left(state: JobState) -> float | None:
    """Seconds that are left of what a job counts: what its log says, less the time since."""
    if state.count is None or state.count.seconds_left is None:
        return None
    return max(0.0, state.count.seconds_left - state.silent_seconds)


def _by_stage(status: Status) -> dict[str, list[JobState]]:
    found: dict[str, list[JobState]] = defaultdict(list)
    for each in status.jobs:
        found[each.job.stage].append(each)
    return found


def _mean_seconds(states: Sequence[JobState]) -> float | None:
    timed = [each.seconds for each in states if each.seconds is not None]
    return sum(timed) / len(timed) if timed else None


def _end(status: Status) -> str:
    if status.left is None:
        return "The number of jobs is unknown until the scans are indexed."
    done, left, now = len(status.of(DONE)), status.left, datetime.now()
    low, expected, high = (format_span(seconds) for seconds in (left.low, left.expected, left.high))
    lines = [f"{done} of {plural(len(status.jobs), 'job')} are done. About {expected} left ({low} to {high})"]
    if status.state == RUNNING:
        at = [_clock(now, seconds) for seconds in (left.expected, left.low, left.high)]
        lines[0] += f"; expected end {at[0]} ({at[1]} to {at[2]})."
    else:
        lines[0] += " once it resumes."
    timed = sum(each.seconds is not None for each in status.jobs)
    basis = [f"the times of {plural(timed, 'finished job')}"] if timed else []
    if few := status.modelled:
        which = ", ".join(few) if len(few) <= _NAMED_STAGES else f"the {len(few)} stages that have not run yet"
        basis.append(f"the cost model of 'lungddpm plan', good to a factor of two, for {which}")
    lines.append(f"Estimated from {' and '.join(basis or ['the counts of running jobs'])}.")
    return "\n".join(textwrap.fill(line, _WIDTH) for line in lines)


def _clock(now: datetime, seconds: float) -> str:
    """A time of day, with its date where that is another."""
    at = now + timedelta(seconds=seconds)
    return at.strftime("%H:%M") if at.date() == now.date() else at.strftime("%Y-%m-%d %H:%M")


def status_values(status: Status) -> dict[str, Any]:
    """The same for `--json`; the keys are those of docs/reference/command-line.md."""
    states = (DONE, RUNNING, FAILED, STOPPED, WAITING)

    def counts(jobs: Sequence[JobState]) -> dict[str, int]:
        return {"jobs": len(jobs), **{state: sum(each.state == state for each in jobs) for state in states}}

    def name(each: JobState) -> dict[str, Any]:
        return {"job": each.job.name, "stage": each.job.stage, "log": status.results / each.job.log}

    stages = [
        {"stage": stage, **counts(of_stage), "seconds_per_job": _mean_seconds(of_stage)}
        for stage, of_stage in _by_stage(status).items()
    ]
    return {
        "results": status.results,
        "state": status.state,
        "locked": status.locked,
        "running_seconds": status.running_seconds,
        "silent_seconds": status.silent_seconds,
        "complete": status.complete,
        "total": counts(status.jobs),
        "stages": stages,
        "running_jobs": [{**name(each), **_count_values(each)} for each in status.of(RUNNING)],
        "failed_jobs": [{**name(each), "message": each.message} for each in status.of(FAILED)],
        "stopped_jobs": [name(each) for each in status.of(STOPPED)],
        "estimate": _estimate_values(status),
    }


def _count_values(state: JobState) -> dict[str, Any]:
    values: dict[str, Any] = dict.fromkeys(("doing", "done", "of", "per_second"))
    if (count := state.count) is not None:
        values = {"doing": count.what, "done": count.done, "of": count.total, "per_second": count.per_second}
    return values | {"seconds_left": _counted_left(state), "silent_seconds": state.silent_seconds}


def _estimate_values(status: Status) -> dict[str, Any] | None:
    if status.left is None:
        return None
    now = datetime.now().astimezone()
    ends = (now + timedelta(seconds=status.left.expected)).isoformat(timespec="seconds")
    return {
        "seconds_left": status.left.expected,
        "seconds_left_low": status.left.low,
        "seconds_left_high": status.left.high,
        "ends": ends if status.state == RUNNING else None,
        "modelled_stages": status.modelled,
    }
