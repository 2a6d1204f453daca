"""The tiny benchmark as jobs of a real Slurm: one node, on loopback, with a fake GPU."""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from tiny import TWO_ARMS, assert_same_measures

pytestmark = [pytest.mark.workflow, pytest.mark.slow]

CONFIG = Path("/etc/slurm/slurm.conf")
OURS = "# Written by a test of lungddpm"
HANGS_AFTER_SECONDS = 1800
"""Against waiting forever for a node that stays down; no result depends on it."""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel")


class Slurm:
    """A cluster of this machine alone.

    Its configuration lies where Debian's Slurm looks for it, because SLURM_* variables do not reach the jobs.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        host = socket.gethostname().split(".")[0]
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        settings = {
            "ClusterName": "test",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmctldPort": 16817,
            "SlurmdPort": 16818,
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={self.folder / 'munge.socket'}",
            "CredType": "cred/munge",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core_Memory",
            "AccountingStorageType": "accounting_storage/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "StateSaveLocation": self.folder / "state",
            "SlurmdSpoolDir": self.folder / "spool",
            "SlurmctldPidFile": self.folder / "slurmctld.pid",
            "SlurmdPidFile": self.folder / "slurmd.pid",
            "ReturnToService": 2,
            # However busy the machine is: no daemon counts as lost, and no job as one that does not start or end.
            "MessageTimeout": 100,
            "SlurmdTimeout": 0,
            "BatchStartTimeout": 600,
            "KillWait": 600,
            "UnkillableStepTimeout": 1800,
            "MinJobAge": 7200,
            "GresTypes": "gpu",
        }
        lines = [OURS, *(f"{key}={value}" for key, value in settings.items())]
        lines.append(f"NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=12000 Gres=gpu:1 State=UNKNOWN")
        lines.append(f"PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP")
        CONFIG.write_text("\n".join(lines) + "\n")
        CONFIG.with_name("gres.conf").write_text("Name=gpu File=/dev/null\n")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = [f"--{name}-file={self.folder / f'munge.{name}'}" for name in ("pid", "log", "seed")]
        socket_option = f"--socket={self.folder / 'munge.socket'}"
        self._launch("munged", "--foreground", "--force", f"--key-file={key}", socket_option, *files)
        self._launch("slurmctld", "-D")
        self._launch("slurmd", "-D")

    def stop(self) -> None:
        subprocess.run(["scancel", "--user", "root"], check=False, capture_output=True)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
            daemon.wait()
        CONFIG.unlink()
        CONFIG.with_name("gres.conf").unlink()

    def is_up(self) -> bool:
        """Whether the node takes jobs."""
        state = subprocess.run(["sinfo", "--noheader", "--format=%t"], capture_output=True, text=True, check=False)
        return state.stdout.strip() in ("idle", "mix", "alloc")

    def died(self) -> str | None:
        """The daemon that has ended, if one has."""
        return next((name for name, daemon in self.daemons.items() if daemon.poll() is not None), None)

    def kill_node_daemon(self) -> None:
        """kill -9 of slurmd, as a node's out-of-memory killer would; then it is started again."""
        self.daemons["slurmd"].send_signal(signal.SIGKILL)
        self.daemons["slurmd"].wait()
        time.sleep(2)
        self._launch("slurmd", "-D")

    def requeue(self, job: str) -> None:
        """End a job with SIGTERM and start it again, without the two minutes that Slurm waits."""
        subprocess.run(["scontrol", "requeue", job], check=True)
        while subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=False).returncode:
            assert self.died() is None, "the cluster is gone"
            time.sleep(1)

    def jobs(self) -> list[dict[str, str]]:
        """What Slurm remembers of every job."""
        reported = subprocess.run(
            ["scontrol", "show", "jobs", "--oneliner"], capture_output=True, text=True, check=True
        )
        return [
            dict(re.findall(r"([\w/:.]+)=(\S*)", line)) for line in reported.stdout.splitlines() if "JobId=" in line
        ]

    def running(self, rule: str) -> dict[str, str] | None:
        """The first running job of a rule, if there is one."""
        started = [job for job in self.jobs() if rule in job["Comment"] and job["JobState"] == "RUNNING"]
        return started[0] if started else None

    def _launch(self, name: str, *arguments: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.daemons[name] = subprocess.Popen([shutil.which(name), *arguments], stdout=log, stderr=log)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A running cluster."""
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        pytest.skip(f"no {', '.join(missing)}: install the Debian packages slurm-wlm and munge")
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons are started as root")
    if CONFIG.exists() and OURS not in CONFIG.read_text():
        pytest.skip(f"{CONFIG} exists: this machine belongs to another cluster")
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    cluster.start()
    try:
        end = time.monotonic() + HANGS_AFTER_SECONDS
        while not cluster.is_up():
            if cluster.died() or time.monotonic() > end:
                logs = "\n".join(path.read_text()[-1000:] for path in cluster.folder.glob("*.log"))
                pytest.skip(f"Slurm does not run on this machine:\n{logs}")
            time.sleep(0.5)
        yield cluster
    finally:
        cluster.stop()


GPU_RULES = {"train_generator", "synthesize", "train_segmenter", "predict", "label_fidelity"}
# The profile's threads and memory are for a cluster's nodes; everything else is the profile's.
ON_TWO_CORES = [
    "--workflow-profile", "profiles/slurm", "--jobs", "4", "--latency-wait", "10",
    "--slurm-no-account", "--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "3",
    "--default-resources", "slurm_partition=main", "mem_mb=1000", "runtime=30",
    "--set-resources", *(f"{rule}:mem_mb=3000" for rule in {"plan", *GPU_RULES}),
    "--set-threads", *(f"{rule}=1" for rule in GPU_RULES),
]  # fmt: skip


def wait_for(condition, process):
    """Wait until `condition` holds, while the run continues."""
    while not condition():
        assert process.poll() is None, "the run ended before it could be disturbed"
        time.sleep(0.2)


def test_a_disturbed_cluster_run_ends_with_the_same_tables(slurm, tiny_benchmark, make_benchmark, tmp_path):
    benchmark = make_benchmark(tmp_path / "disturbed", TWO_ARMS)
    said = tmp_path / "said.log"
    with said.open("w") as log:
        run = subprocess.Popen(
            benchmark.command(*ON_TWO_CORES), cwd=benchmark.repository, stdout=log, stderr=subprocess.STDOUT,
            env={**os.environ, "NO_COLOR": "1"},
        )  # fmt: skip
    state = benchmark.results / "models/lung_ddpm/main/all/state"
    wait_for(lambda: state.exists() and any(state.glob("step-*.pt")), run)
    slurm.kill_node_daemon()
    wait_for(slurm.is_up, run)
    # What follows a time limit or a lost node: SIGTERM, and the same job again.
    slurm.requeue(slurm.running("train_generator")["JobId"])
    wait_for(lambda: slurm.running("train_segmenter"), run)
    subprocess.run(["scancel", "--signal=KILL", "--full", slurm.running("train_segmenter")["JobId"]], check=True)
    assert run.wait() == 0, said.read_text()[-5000:]

    assert_same_measures(benchmark, tiny_benchmark)
    assert set(benchmark.table("verdict.csv")["arm"]) == {"real", "real+lung_ddpm@1.0"}
    jobs = [(re.match("rule_(.+?)(_wildcards.*)?$", job["Comment"])[1], job) for job in slurm.jobs()]
    assert {rule for rule, _ in jobs} >= {"simulate", "prepare", *GPU_RULES, "evaluate", "write_report"}
    assert [rule for rule, job in jobs if job["Restarts"] != "0"] == ["train_generator"]
    assert [rule for rule, job in jobs if job["JobState"] != "COMPLETED"] == ["train_segmenter"]
    for rule, job in jobs:
        assert (job.get("TresPerJob") == "gres:gpu:1") == (rule in GPU_RULES), rule
        assert job["Partition"] == "main"
    asked = {rule: (job["TimeLimit"], job["MinMemoryNode"]) for rule, job in jobs}
    # Time from the profile, memory from the command line, and both from the rule.
    assert asked["train_generator"] == ("2-00:00:00", "3000M")
    assert asked["evaluate"] == ("01:00:00", "4000M")
