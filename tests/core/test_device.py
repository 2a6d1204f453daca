"""Claims of GPUs, on machines whose `nvidia-smi` is a script of the test; no GPU is needed."""

import json
import os
import select
import stat
import subprocess
import sys
import tempfile

import pytest

from lungddpm.core import device
from lungddpm.core.device import claim_device, device_of, list_gpus, log_device, visible_gpus
from lungddpm.core.errors import ConfigError
from lungddpm.core.progress import start_logging

A, B, C = (f"GPU-{letter * 8}-0000-0000-0000-000000000000" for letter in "abc")
MIG_1, MIG_2 = (f"MIG-{number * 8}-0000-0000-0000-000000000000" for number in "12")
THREE = "".join(f"GPU {n}: NVIDIA RTX A6000 (UUID: {uuid})\n" for n, uuid in enumerate((A, B, C)))
SPLIT = (
    f"GPU 0: NVIDIA A100-SXM4-40GB (UUID: {A})\n"
    f"  MIG 3g.20gb     Device  0: (UUID: {MIG_1})\n"
    f"  MIG 1g.5gb      Device  1: (UUID: {MIG_2})\n"
    f"GPU 1: NVIDIA A100-SXM4-40GB (UUID: {B})\n"
)

HOLDER = """
import os, sys
from lungddpm.core import device
from lungddpm.core.progress import start_logging
start_logging()
device._POLL_SECONDS = 0.01
with device.claim_device(sys.argv[1]) as claimed:
    print(claimed, os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
    sys.stdin.readline()
"""


class Job:
    """A process that claims a device and holds it until it is released."""

    def __init__(self, asked="auto", script=HOLDER, **variables):
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, asked], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env={**os.environ, **variables},
        )  # fmt: skip

    def claimed(self) -> list[str]:
        """The device to ask torch for and what the process sees, as soon as it holds a claim."""
        return self.process.stdout.readline().split()

    def said(self) -> str:
        """The next line of its log."""
        return self.process.stderr.readline()

    def release(self) -> None:
        assert self.process.communicate("\n")[0] == ""
        assert self.process.returncode == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def start():
    """A function that starts a `Job`; those still running at the end are killed."""
    jobs = []

    def start_job(*arguments, **variables) -> Job:
        jobs.append(Job(*arguments, **variables))
        return jobs[-1]

    yield start_job
    for job in jobs:
        job.kill()


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that sets what `nvidia-smi -L` prints; locks are in the test's own folder."""
    programs, locks = tmp_path / "bin", tmp_path / "tmp"
    programs.mkdir()
    locks.mkdir()
    for variable in [device.VISIBLE, "SLURM_JOB_ID", "LOCAL_RANK", "LOCAL_WORLD_SIZE", *device._SLURM_ASSIGNED]:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(locks))
    monkeypatch.setattr(tempfile, "tempdir", str(locks))

    def lists(text: str, status: int = 0) -> None:
        program = programs / "nvidia-smi"
        program.write_text(f'#!/bin/sh\n[ "$*" = -L ] || exit 3\ncat <<END\n{text}END\nexit {status}\n')
        program.chmod(0o755)

    return lists


def test_gpus_are_listed_with_mig_devices_instead_of_a_split_one(machine):
    machine(THREE)
    assert [(gpu.uuid, gpu.name) for gpu in list_gpus()] == [(uuid, "NVIDIA RTX A6000") for uuid in (A, B, C)]
    machine(SPLIT)
    assert [gpu.uuid for gpu in list_gpus()] == [MIG_1, MIG_2, B]
    assert list_gpus()[1].name == "MIG 1g.5gb"
    machine("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", status=9)
    assert list_gpus() == []


@pytest.mark.parametrize(
    ("given", "uuids"),
    [
        (None, [A, B, C]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("2,0", [C, A]),
        (" 1 , 2 ", [B, C]),
        (f"{B},0", [B, A]),
        ("GPU-bbbb", [B]),
        # CUDA ignores what follows an entry that is not there.
        ("1,7,0", [B]),
    ],
)
def test_visible_are_the_gpus_that_cuda_would_see(machine, monkeypatch, given, uuids):
    machine(THREE)
    if given is not None:
        monkeypatch.setenv(device.VISIBLE, given)
    assert [gpu.uuid for gpu in visible_gpus()] == uuids
    with claim_device("auto") as claimed:
        assert claimed == "auto"
        expected = (given or A).split(",")[0].strip() if uuids else given
        assert os.environ.get(device.VISIBLE) == expected
    assert os.environ.get(device.VISIBLE) == given


def test_each_job_holds_its_own_gpu_and_latecomers_wait(machine, start):
    machine(THREE)
    jobs = [start("auto"), start("cuda"), start("cuda")]
    held = [job.claimed() for job in jobs]
    assert [claimed for claimed, _ in held] == ["auto", "cuda", "cuda"]
    assert {gpu for _, gpu in held} == {A, B, C}
    late = start("cuda")
    assert f"waiting for 1 of cuda:0 (NVIDIA RTX A6000, {A}), cuda:1" in late.said()
    jobs[1].release()
    assert late.claimed() == held[1]


def test_no_two_of_many_jobs_ever_hold_the_same(machine, start, tmp_path):
    machine(THREE)
    # mkdir fails where another holder has made the folder.
    script = f"""
import os, sys
from lungddpm.core import device
device._POLL_SECONDS = 0.001
for _ in range(15):
    with device.claim_device(sys.argv[1]):
        folder = os.path.join({str(tmp_path)!r}, os.environ["CUDA_VISIBLE_DEVICES"])
        os.mkdir(folder)
        os.rmdir(folder)
"""
    jobs = [start(asked, script) for asked in ("auto", "cuda", "cuda:0", "auto", "cuda:2")]
    for job in jobs:
        job.release()


def test_a_killed_jobs_gpu_is_free_though_its_data_loader_lives(machine, start):
    machine(f"GPU 0: NVIDIA RTX A6000 (UUID: {A})\n")
    script = HOLDER.replace("    sys.stdin", "    print(os.fork() or sys.stdin.read(), flush=True)\n    sys.stdin")
    killed = start("auto", script)
    assert killed.claimed() == ["auto", A]
    loader = int(killed.process.stdout.readline())
    waiting = start("auto")
    assert "waiting for 1" in waiting.said()
    killed.process.kill()
    killed.process.wait()
    os.kill(loader, 0)
    assert waiting.claimed() == ["auto", A]
    killed.process.communicate()  # ends the loader's input


def test_an_explicit_gpu_is_claimed_and_no_other(machine, start, monkeypatch):
    machine(THREE)
    first = start("cuda:1")
    assert first.claimed() == ["cuda", B]
    second = start("cuda:1")
    assert f"waiting for 1 of cuda:0 (NVIDIA RTX A6000, {B})\n" in second.said()
    assert start("cuda:0").claimed() == ["cuda", A]
    first.release()
    assert second.claimed() == ["cuda", B]
    monkeypatch.setenv(device.VISIBLE, "2,0")
    with claim_device("cuda:0") as claimed:
        assert (claimed, os.environ[device.VISIBLE]) == ("cuda", "2")


def test_mig_devices_are_claimed_one_by_one(machine, start):
    machine(SPLIT)
    assert [start("cuda").claimed()[1] for _ in range(3)] == [MIG_1, MIG_2, B]
    assert "waiting for 1" in start("cuda:1").said()


@pytest.mark.parametrize("asked", ["cuda:5", "cuda:x"])
def test_a_missing_gpu_is_refused_with_those_that_are_there(machine, monkeypatch, asked):
    machine(THREE)
    monkeypatch.setenv(device.VISIBLE, "1,2")
    with (
        pytest.raises(ConfigError, match=rf"'{asked}' is not available.*cuda:0 \(NVIDIA RTX A6000, {B}\), cuda:1 "),
        claim_device(asked),
    ):
        pass


@pytest.mark.parametrize("asked", ["cpu", "mps", "abacus"])
def test_other_devices_claim_nothing(machine, asked):
    machine(THREE)
    with claim_device(asked) as claimed:
        assert (claimed, os.environ.get(device.VISIBLE)) == (asked, None)
    assert not list(device._folder().iterdir())


@pytest.mark.parametrize("asked", ["auto", "cuda", "cuda:1"])
def test_without_nvidia_smi_torch_decides(machine, monkeypatch, asked):
    monkeypatch.setenv("PATH", "")
    with claim_device(asked) as claimed:
        assert (claimed, os.environ.get(device.VISIBLE)) == (asked, None)


def test_slurms_assignment_is_only_divided_within_its_job(machine, start):
    machine(THREE)
    assigned = {"SLURM_JOB_GPUS": "1", device.VISIBLE: "1"}
    # Slurm lets two jobs share a GPU if the site allows it.
    assert start("auto", SLURM_JOB_ID="7", **assigned).claimed() == ["auto", "1"]
    assert start("auto", SLURM_JOB_ID="8", **assigned).claimed() == ["auto", "1"]
    assert "waiting for 1" in start("auto", SLURM_JOB_ID="7", **assigned).said()


def test_processes_of_one_launch_see_the_same_gpus_and_claim_them_at_once(machine, start):
    machine(THREE)

    def launch(port):
        of_launch = {"MASTER_PORT": port, "LOCAL_WORLD_SIZE": "2"}
        return [start("auto", LOCAL_RANK=rank, **of_launch) for rank in ("1", "0")]

    assert start("cuda:0").claimed() == ["cuda", A]
    first = launch("29500")
    assert [job.claimed() for job in first] == [["auto", f"{B},{C}"]] * 2
    second = launch("29501")
    assert "waiting for 2 of" in second[1].said()
    for job in first:
        job.release()
    assert [job.claimed() for job in second] == [["auto", f"{B},{C}"]] * 2


def test_two_launches_that_race_for_all_gpus_do_not_wait_for_each_other(machine, start):
    machine(THREE)
    launches = {
        jobs[0].process.stdout: jobs
        for port in ("29500", "29501")
        if (jobs := [start("auto", LOCAL_RANK=rank, LOCAL_WORLD_SIZE="3", MASTER_PORT=port) for rank in "012"])
    }
    while launches:
        (done, *_), _, _ = select.select(launches, [], [])
        jobs = launches.pop(done)
        assert [job.claimed() for job in jobs] == [["auto", f"{A},{B},{C}"]] * 3
        for job in jobs:
            job.release()


def test_what_a_killed_launch_announced_is_ignored(machine, start):
    machine(THREE)
    launch = {"MASTER_PORT": "29500", "LOCAL_WORLD_SIZE": "2"}
    killed = start("auto", LOCAL_RANK="0", **launch)
    assert killed.claimed() == ["auto", f"{A},{B}"]
    killed.kill()
    assert len(list(device._folder().glob("lungddpm-launch-*.json"))) == 1
    assert start("cuda:0").claimed() == ["cuda", A]
    second = start("auto", LOCAL_RANK="1", **launch)
    first = start("auto", LOCAL_RANK="0", **launch)
    assert [job.claimed() for job in (first, second)] == [["auto", f"{B},{C}"]] * 2


def test_more_processes_than_gpus_are_refused(machine, monkeypatch):
    machine(THREE)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=r"4 processes share 3 GPUs.*cuda:2"), claim_device("auto"):
        pass


def test_locks_can_be_held_by_all_users_whatever_the_umask(machine):
    machine(THREE)
    before = os.umask(0o077)
    try:
        with claim_device("auto"):
            (lock, *_) = device._folder().glob(f"lungddpm-{A}.lock")
    finally:
        os.umask(before)
    assert stat.S_IMODE(lock.stat().st_mode) == 0o644


def test_the_device_is_recorded_beside_the_log(tmp_path):
    log = tmp_path / "synthesize-lung_ddpm-1.0-0.log"
    assert device_of(log) == "cpu"
    start_logging(log)
    log_device("cpu", "2 threads, fp32")
    log_device("cuda", "NVIDIA H200, bf16")
    record = tmp_path / "synthesize-lung_ddpm-1.0-0.device.json"
    assert json.loads(record.read_text()) == {"device": "cuda", "details": "NVIDIA H200, bf16"}
    assert device_of(log) == "cuda (NVIDIA H200, bf16)"
    assert "Computing on cuda (NVIDIA H200, bf16)" in log.read_text()
    start_logging(log)
    assert device_of(log) == "cpu", "the same job, now without a network"
