"""A run under random kill -9 ends as an undisturbed one does."""

import os
import random
import re
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pandas as pd
import psutil
import pytest

pytestmark = [pytest.mark.workflow, pytest.mark.slow]

SEED = 906
JOBS_BETWEEN_KILLS = (3, 9)
SECONDS_INTO_A_JOB = (0, 10)
HANGS_AFTER_SECONDS = 3 * 3600
"""Against waiting forever; no result depends on it."""
TARGETS = ["everything", "run", "snakemake", "job"]
TABLES = ["cases.csv", "verdict.csv", "lesions.csv", "image_quality.csv"]
COHORT = {
    "source": {"phantom": {"patients": 12}},
    "roles": {"discovery": 6, "reference": 2, "test": 4},
    "generators": {"lung_ddpm": {"training": {"steps": 120, "save_every": 10}}},
    "arms": {"controls": [], "synthetic_only": []},
    "segmentation": {"steps": 40, "save_every": 5, "seeds": [0, 1]},
    "workflow": {"case_shards": 4, "synthesis_shards": 3},
}  # fmt: skip
# As `atomic_path` names what is not complete yet: ".ct-k3v9a_x1.nii.gz".
TEMPORARY = re.compile(r"\..*-[a-z0-9_]{8}(\..*)?")


class DisturbedRun:
    """`lungddpm run`, restarted whenever it ends, and killed in parts or as a whole."""

    def __init__(self, benchmark):
        self.benchmark, self.random = benchmark, random.Random(SEED)
        self.kills, self.sessions = [], []
        self.began = time.monotonic()
        self.begin()

    def begin(self):
        """The same command, in a session of its own, by which its processes are known."""
        self.output = self.benchmark.folder / f"run-{len(self.sessions)}.log"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                self.benchmark.command(), cwd=self.benchmark.repository, stdout=output, stderr=subprocess.STDOUT,
                env={**os.environ, "NO_COLOR": "1"}, start_new_session=True,
            )  # fmt: skip
        self.sessions.append(self.process.pid)
        self.was_hit = False

    def finish(self):
        """Kill and restart until the run succeeds."""
        next_kill = self.random.randint(*JOBS_BETWEEN_KILLS)
        while (code := self.process.poll()) != 0:
            assert self.seconds() < HANGS_AFTER_SECONDS, f"is not at its end yet: {self.story()}"
            if code is not None:
                if "another run is working in this folder" in self.output.read_text():
                    time.sleep(2)
                else:
                    assert self.was_hit, f"ended with {code} though nothing was killed: {self.story()}"
                self.begin()
            if self.jobs_begun() >= next_kill:
                time.sleep(self.random.uniform(*SECONDS_INTO_A_JOB))
                self.kill(self.random.choice(TARGETS))
                next_kill = self.jobs_begun() + self.random.randint(*JOBS_BETWEEN_KILLS)
            time.sleep(0.2)

    def jobs_begun(self):
        """By all runs so far, including restarts."""
        logs = [path.read_text() for path in self.benchmark.folder.glob(".snakemake/log/*.log")]
        return sum(len(re.findall(r"^(?:local)?(?:rule|checkpoint) \w+:$", text, re.MULTILINE)) for text in logs)

    def kill(self, target):
        """Kill -9 the target or, if it does not live now, everything."""
        alive = self.processes()
        jobs = {process: stage for process, _, words in alive if (stage := stage_of(words))}
        place = int(self.random.random() * len(jobs))
        snakemake = {process: parent for process, parent, words in alive if is_program(words, "snakemake")}
        by_target = {
            "everything": [process for process, _, _ in alive],
            # Not one that is about to be refused because a Snakemake without its own still works.
            "run": [p for p, _, words in alive if is_program(words, "lungddpm") and p.pid in snakemake.values()],
            "snakemake": list(snakemake),
            "job": list(jobs)[place : place + 1],
        }
        target = target if by_target[target] else "everything"
        # When Snakemake dies, `run` ends the jobs; if that was killed before, they live on.
        ends_jobs = target == "everything" or (target == "snakemake" and by_target["run"])
        stages = sorted(set(jobs.values()) if ends_jobs else {jobs[p] for p in by_target[target] if p in jobs})
        for victim in by_target[target]:
            with suppress(psutil.NoSuchProcess):
                victim.kill()
        self.was_hit = True
        self.kills.append((round(self.seconds()), target, stages))
        print(f"{self.kills[-1]}, running: {sorted(jobs.values())}", flush=True)

    def processes(self):
        """All that lives of it, each with its parent's id and its command line."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                if os.getsid(process.pid) in self.sessions and (words := process.cmdline()):
                    found.append((process, process.ppid(), words))
        return found

    def end(self):
        """Leave nothing alive."""
        for process, _, _ in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def seconds(self):
        """Since the first start."""
        return time.monotonic() - self.began

    def story(self):
        """What happened, for a person who has to find out why."""
        done = len(list((self.benchmark.results / "benchmarks").glob("*.tsv")))
        log = self.output.read_text()[-5000:]
        return f"{self.seconds():.0f} s, {done} jobs done, kills {self.kills}, last output:\n{log}"


def is_program(words, name):
    """Whether a command line is Python with this script."""
    return len(words) > 1 and Path(words[1]).name == name


def stage_of(words):
    """The rule whose job a command line is; None for other processes."""
    if not is_program(words, "lungddpm") or words[2:3] != ["--log"]:
        return None
    return Path(words[3]).stem.partition("-")[0]


def test_random_kills_change_nothing(make_benchmark, tmp_path):
    undisturbed = make_benchmark(tmp_path / "undisturbed", COHORT)
    began = time.monotonic()
    run = undisturbed.run()
    assert run.returncode == 0, run.stdout[-5000:]
    print(f"undisturbed: {time.monotonic() - began:.0f} s", flush=True)

    disturbed = DisturbedRun(make_benchmark(tmp_path / "disturbed", COHORT))
    try:
        disturbed.finish()
        print(f"disturbed: {disturbed.seconds():.0f} s, {len(disturbed.sessions)} starts", flush=True)
        assert not disturbed.processes()
    finally:
        disturbed.end()
    assert len(disturbed.kills) >= 5
    assert len({stage for _, _, stages in disturbed.kills for stage in stages}) >= 3, disturbed.kills
    for name in TABLES:
        pd.testing.assert_frame_equal(disturbed.benchmark.table(name), undisturbed.table(name))
    left = [path for path in disturbed.benchmark.results.rglob(".*") if TEMPORARY.fullmatch(path.name)]
    assert not left, left
    again = disturbed.benchmark.run("--dry-run")
    assert "Nothing to be done" in again.stdout, again.stdout[-3000:]
