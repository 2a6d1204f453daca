"""Locks between processes: flock if the disk supports it, or else a file that names the holder.

Some disks have no locks: Lustre without `-o flock` (ENOSYS), NFS without lockd (ENOLCK), some of SMB and FUSE. There
`<name>.held` replaces the lock of `<name>`. It records machine, process and start time, and its holder touches it
regularly: the lock of a killed process is free immediately on the same machine, and after a while on others.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

from lungddpm.core.progress import LOG

SECONDS_BETWEEN_TOUCHES = 30
STALE_AFTER_SECONDS = 300
"""Seconds without a touch after which the lock of a process on another machine is free."""
_POLL_SECONDS = 1.0
_TOLERANCE_SECONDS = 5.0
"""Tolerance in seconds: the start time of a process depends on the clock, which may be adjusted."""


class FileLock:
    """An exclusive lock, not yet taken.

    Args:
        path: its file; it is created and kept.
        create: False for an existing file that may belong to another user; flock only needs read access.

    Raises:
        OSError: the file cannot be created or opened.
    """

    def __init__(self, path: Path, create: bool = True):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.held = path, path.with_name(f"{path.name}.held")
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT if create else os.O_RDONLY, 0o666)
        self._released: threading.Event | None = None

    def take(self) -> bool:
        """Take the lock if it is free; return whether it was."""
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            _check_missing(error, self.path)
            return self._take_file()
        return True

    def wait(self) -> None:
        """Take the lock as soon as it is free."""
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX)
        except OSError as error:
            _check_missing(error, self.path)
            while not self._take_file():
                time.sleep(_POLL_SECONDS)

    def share_with(self, process: int) -> None:
        """Let the lock be held for as long as this process lives as well; flock does so if it inherits `descriptor`."""
        if self._released is not None:
            with self.held.open("a", encoding="utf-8") as file:
                file.write(_describe(process))

    def release(self) -> None:
        """Release the lock."""
        self.close()
        if self._released is not None:
            self._released.set()
            self._released = None
            self.held.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the lock's file in a forked child, which would otherwise hold the lock as well."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _take_file(self) -> bool:
        try:
            with self.held.open("x", encoding="utf-8") as file:
                file.write(_describe(os.getpid()))
        except FileExistsError:
            return self._remove_stale() and self._take_file()
        self._released = threading.Event()
        threading.Thread(target=self._touch, args=(self._released,), daemon=True).start()
        return True

    def _remove_stale(self) -> bool:
        """Remove the substitute file if nobody holds it; return whether it is gone."""
        try:
            holders = self.held.read_text(encoding="utf-8")
            if _is_held(holders, self.held):
                return False
            # Of several processes that find it stale, one gets it; if it belongs to another by now, it is put back.
            aside = self.held.with_name(f"{self.held.name}-{socket.gethostname()}-{os.getpid()}")
            self.held.rename(aside)
            if aside.read_text(encoding="utf-8") != holders:
                aside.rename(self.held)
                return False
            aside.unlink()
        except FileNotFoundError:
            pass
        return True

    def _touch(self, released: threading.Event) -> None:
        while not released.wait(SECONDS_BETWEEN_TOUCHES):
            with suppress(OSError):
                os.utime(self.held)


def warn_once(key: str, message: str, *values: object) -> None:
    """Warn once about a missing feature of a disk, and not again in child processes."""
    variable = f"LUNGDDPM_WARNED_{key}"
    if variable not in os.environ:
        os.environ[variable] = "1"
        LOG.warning(message, *values)


def _check_missing(error: OSError, path: Path) -> None:
    """Report that the disk has no locks, or raise any other error."""
    if error.errno == errno.EBADF:
        raise error
    warn_once(
        "LOCKS",
        "%s: this disk has no file locks (%s); files named *.held are used instead",
        path.parent,
        error.strerror,
    )


def _describe(process: int) -> str:
    import psutil

    return f"{socket.gethostname()} {process} {psutil.Process(process).create_time():.2f}\n"


def _is_held(holders: str, path: Path) -> bool:
    """Whether one of the processes named in a substitute file is alive, as far as can be known from here."""
    entries = [line.split(" ") for line in holders.splitlines()]
    if entries and all(len(entry) == 3 and entry[0] == socket.gethostname() for entry in entries):
        return any(is_alive(int(process), float(began)) for _, process, began in entries)
    # From another machine, or not fully written.
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-") as probe:
        now = os.fstat(probe.fileno()).st_mtime  # by the disk's clock, like the touches
    return now - path.stat().st_mtime < STALE_AFTER_SECONDS


def is_alive(process: int, began: float) -> bool:
    """Whether the process with this id and start time (seconds since 1970) is alive."""
    import psutil

    try:
        found = psutil.Process(process)
        return abs(found.create_time() - began) < _TOLERANCE_SECONDS and found.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
