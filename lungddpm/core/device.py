"""GPUs for jobs: each job claims a free one and sees only that. Nothing here imports torch.

A claim is a lock in the machine's temporary folder, one per GPU or MIG device, shared by all users. The
kernel releases it when the process ends, however it ends.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lungddpm.core.errors import ConfigError
from lungddpm.core.files import fingerprint, write_json
from lungddpm.core.locks import FileLock, is_alive
from lungddpm.core.progress import LOG, device_record

VISIBLE = "CUDA_VISIBLE_DEVICES"
_POLL_SECONDS = 1.0
_LISTED = re.compile(
    r"^(?:GPU \d+: (?P<gpu>.+)|\s+(?P<mig>MIG .+?)\s+Device +\d+:) \(UUID: (?P<uuid>(?:GPU|MIG)-[^)]+)\)"
)
_SLURM_ASSIGNED = ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE", "SLURM_SHARDS_ON_NODE")
_SAME_LAUNCH = ("MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")


@dataclass(frozen=True)
class Gpu:
    """A GPU, or a MIG device of one.

    Attributes:
        uuid: from the driver; names the lock.
        name: of the product.
        visible_as: its entry in CUDA_VISIBLE_DEVICES: its UUID, or the number given by the user.
    """

    uuid: str
    name: str
    visible_as: str


@contextmanager
def claim_device(device: str) -> Iterator[str]:
    """Claim a GPU for this process, if `device` may be one, and hide the others; before torch is loaded.

    Waits while other jobs hold all suitable GPUs. Of the processes that torchrun starts on this machine, the first
    claims a GPU for each, and all of them see these. GPUs assigned by Slurm are only claimed within the Slurm job:
    between jobs Slurm decides. Without `nvidia-smi`, nothing is claimed, and torch chooses.

    Args:
        device: `auto`, `cuda` (any visible GPU), `cuda:<number>` (that one of the visible GPUs, in the order of
            CUDA_VISIBLE_DEVICES or else of `nvidia-smi`), or another device, for which nothing is claimed.

    Yields:
        The device name for torch: for a claimed `cuda:1`, plain `cuda`.

    Raises:
        ConfigError: the GPU is not available, or there are too few GPUs for the processes.
    """
    gpus = visible_gpus() if device == "auto" or device.partition(":")[0] == "cuda" else []
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    number = device.partition(":")[2]
    if not gpus or (number and processes > 1):
        yield device
        return
    if number:
        gpus, device = [_numbered(gpus, device)], "cuda"
    if processes > len(gpus):
        there = f"{processes} processes share {len(gpus)} GPU{'s' if len(gpus) > 1 else ''}"
        raise ConfigError("device", there, f"Start at most one process per GPU: {_described(gpus)}.")
    with ExitStack() as held:
        if processes == 1:
            visible = _claim(gpus, 1, held)
        elif os.environ.get("LOCAL_RANK") == "0":
            visible = _claim_for_all(gpus, processes, held)
        else:
            visible = _claimed_by_first_process()
        before = os.environ.get(VISIBLE)
        os.environ[VISIBLE] = visible
        try:
            yield device
        finally:
            del os.environ[VISIBLE]
            if before is not None:
                os.environ[VISIBLE] = before


def visible_gpus() -> list[Gpu]:
    """The GPUs that a process may use: those in CUDA_VISIBLE_DEVICES, in its order; all if it is not set.

    Like in CUDA, the list ends at the first entry that does not exist.
    """
    listed = list_gpus()
    given = os.environ.get(VISIBLE)
    if given is None:
        return listed
    visible = []
    for entry in (part.strip() for part in given.split(",")):
        if entry.isdecimal():
            found = listed[int(entry)] if int(entry) < len(listed) else None
        else:
            found = next((gpu for gpu in listed if entry and gpu.uuid.startswith(entry)), None)
        if found is None:
            break
        visible.append(Gpu(found.uuid, found.name, entry))
    return visible


def list_gpus() -> list[Gpu]:
    """All GPUs of this machine, in the order of `nvidia-smi`; for one partitioned by MIG, its MIG devices instead."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    listing = subprocess.run([program, "-L"], capture_output=True, text=True, check=False)
    if listing.returncode != 0:
        return []
    gpus: list[Gpu] = []
    whole = None
    for line in listing.stdout.splitlines():
        if (found := _LISTED.match(line)) is None:
            continue
        gpu = Gpu(found["uuid"], found["gpu"] or found["mig"], found["uuid"])
        if found["gpu"]:
            whole = gpu
        elif gpus and gpus[-1] is whole:
            gpus.pop()
        gpus.append(gpu)
    return gpus


def log_device(device: str, details: str) -> None:
    """Log the device of this stage, and write it to `<log without suffix>.device.json` next to its log."""
    LOG.info("Computing on %s (%s)", device, details)
    for handler in LOG.handlers:
        if isinstance(handler, logging.FileHandler):
            write_json(device_record(Path(handler.baseFilename)), {"device": device, "details": details})


def device_of(log_file: Path) -> str:
    """The device that the stage with this log last used; `cpu` without a record, because only networks use another."""
    try:
        record = json.loads(device_record(log_file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "cpu"
    return f"{record['device']} ({record['details']})"


def _numbered(gpus: Sequence[Gpu], device: str) -> Gpu:
    number = device.partition(":")[2]
    if not number.isdecimal() or int(number) >= len(gpus):
        raise ConfigError(
            "device", f"'{device}' is not available here", f"Use auto, cpu, or one of: {_described(gpus)}."
        )
    return gpus[int(number)]


def _described(gpus: Sequence[Gpu]) -> str:
    return ", ".join(f"cuda:{number} ({gpu.name}, {gpu.uuid})" for number, gpu in enumerate(gpus))


def _claim(gpus: Sequence[Gpu], count: int, held: ExitStack) -> str:
    """Hold the locks of `count` of these GPUs as soon as they are free; return them for CUDA_VISIBLE_DEVICES."""
    locks = {gpu: held.enter_context(_lock(gpu.uuid)) for gpu in gpus}
    claimed: list[Gpu] = []
    is_waiting = False
    while True:
        for gpu, lock in locks.items():
            if len(claimed) < count and gpu not in claimed and lock.take():
                claimed.append(gpu)
        if len(claimed) == count:
            break
        if not is_waiting:
            LOG.warning("Other jobs are using the GPUs: waiting for %d of %s", count - len(claimed), _described(gpus))
            is_waiting = True
        time.sleep(_POLL_SECONDS)
    for gpu in set(gpus) - set(claimed):
        locks[gpu].release()
    return ",".join(gpu.visible_as for gpu in gpus if gpu in claimed)


def _claim_for_all(gpus: Sequence[Gpu], count: int, held: ExitStack) -> str:
    """Claim a GPU for each process of this launch, and inform the other processes.

    Launches that need several GPUs collect them one at a time: two with half of the GPUs each would wait forever.
    """
    with _lock("several") as gate:
        gate.wait()
        visible = _claim(gpus, count, held)
    import psutil

    path = _announcement()
    write_json(path, {"visible": visible, "process": os.getpid(), "began": psutil.Process().create_time()})
    held.callback(path.unlink, missing_ok=True)
    return visible


def _claimed_by_first_process() -> str:
    path = _announcement()
    while True:
        # A killed launch may have left its file.
        with suppress(FileNotFoundError):
            announced = json.loads(path.read_text(encoding="utf-8"))
            if is_alive(announced["process"], announced["began"]):
                return announced["visible"]
        time.sleep(_POLL_SECONDS)


def _announcement() -> Path:
    launch = fingerprint([os.getuid(), *(os.environ.get(name, "") for name in _SAME_LAUNCH)])
    return _folder() / f"lungddpm-launch-{launch[:16]}.json"


@contextmanager
def _lock(name: str) -> Iterator[FileLock]:
    """A lock on this machine that all users can hold, not yet taken."""
    if any(variable in os.environ for variable in _SLURM_ASSIGNED):
        name = f"slurm{os.environ.get('SLURM_JOB_ID', '')}-{name}"
    path = _folder() / f"lungddpm-{name.replace('/', '_')}.lock"
    with suppress(FileExistsError):
        descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.fchmod(descriptor, 0o644)  # whatever the umask
        os.close(descriptor)
    lock = FileLock(path, create=False)
    # A forked child, such as a data loader, would hold the GPU as well.
    os.register_at_fork(after_in_child=lock.close)
    try:
        yield lock
    finally:
        lock.release()


def _folder() -> Path:
    return Path(tempfile.gettempdir())
