"""Locks with flock, and on disks that have none."""

import errno
import fcntl
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from lungddpm.core import locks
from lungddpm.core.files import exclusive_lock, lock_if_free
from lungddpm.core.locks import FileLock


@pytest.fixture(params=[None, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], ids=["flock", "Lustre", "NFS", "SMB"])
def disk(request, tmp_path, monkeypatch):
    """A folder on a disk with locks, and on some without."""
    monkeypatch.delenv("LUNGDDPM_WARNED_LOCKS", raising=False)
    monkeypatch.setattr(locks, "_POLL_SECONDS", 0.01)
    if request.param is not None:

        def flock(_file, _operation):
            raise OSError(request.param, os.strerror(request.param))

        monkeypatch.setattr(fcntl, "flock", flock)
    yield tmp_path
    os.environ.pop("LUNGDDPM_WARNED_LOCKS", None)


@pytest.fixture
def without_locks(tmp_path, monkeypatch):
    def flock(_file, _operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setenv("LUNGDDPM_WARNED_LOCKS", "1")
    return tmp_path


def test_one_holds_it_at_a_time(disk):
    first, second = FileLock(disk / "a/.lock"), FileLock(disk / "a/.lock")
    assert first.take()
    assert not second.take()
    with lock_if_free(disk / "b/.lock") as free:
        assert free, "of another folder"
    first.release()
    assert second.take()
    second.release()
    with exclusive_lock(disk / "a/.lock", "working"), lock_if_free(disk / "a/.lock") as free:
        assert not free
    assert not list(disk.rglob("*.held*"))


def test_a_killed_process_leaves_it_free(disk):
    context = multiprocessing.get_context("fork")
    holds = context.Event()

    def hold():
        assert FileLock(disk / ".lock").take()
        holds.set()
        signal.pause()

    holder = context.Process(target=hold)
    holder.start()
    holds.wait()
    lock = FileLock(disk / ".lock")
    assert not lock.take()
    holder.kill()
    holder.join()
    assert lock.take()
    lock.release()


def test_a_waiting_process_gets_it(disk):
    context = multiprocessing.get_context("fork")
    holds, go = context.Event(), context.Event()

    def hold():
        with exclusive_lock(disk / ".lock", "working"):
            holds.set()
            go.wait()

    holder = context.Process(target=hold)
    holder.start()
    holds.wait()
    lock = FileLock(disk / ".lock")
    assert not lock.take()
    go.set()
    lock.wait()
    holder.join()
    lock.release()


def test_looking_whether_it_is_held_leaves_it_as_it_is(disk):
    path = disk / ".lock"
    assert not locks.is_held(path)
    assert not path.exists()
    lock = FileLock(path)
    assert not locks.is_held(path)
    assert lock.take()
    assert locks.is_held(path)
    assert locks.is_held(path)
    lock.release()
    assert not locks.is_held(path)
    assert [each.name for each in disk.iterdir()] == [".lock"]


def test_a_lock_until_exit_ends_with_its_process_and_is_not_inherited(disk):
    path, context = disk / "stage.log", multiprocessing.get_context("fork")
    path.write_text("said\n")
    holds = context.Event()

    def stage():
        locks.hold_until_exit(path)
        child = multiprocessing.get_context("fork").Process(target=signal.pause)
        child.start()
        (disk / "child").write_text(str(child.pid))
        holds.set()
        signal.pause()

    holder = context.Process(target=stage)
    holder.start()
    holds.wait()
    assert locks.is_held(path)
    holder.kill()
    holder.join()
    assert not locks.is_held(path)
    os.kill(int((disk / "child").read_text()), signal.SIGKILL)
    assert path.read_text() == "said\n"


def test_a_patient_process_gets_a_lock_that_is_held_for_an_instant(disk):
    held, lock = FileLock(disk / ".lock"), FileLock(disk / ".lock")
    assert held.take()
    threading.Timer(0.1, held.release).start()
    assert lock.take(patience=60.0)
    lock.release()


def test_what_is_missing_is_reported_once(disk, caplog):
    for _ in range(3):
        with exclusive_lock(disk / ".lock", "working"):
            pass
    reported = [record for record in caplog.records if "has no file locks" in record.getMessage()]
    assert len(reported) == (fcntl.flock.__module__ == __name__)


def held_by(folder, host, process, began, seconds_ago=0.0):
    path = folder / ".lock.held"
    path.write_text(f"{host} {process} {began}\n")
    touched = path.stat().st_mtime - seconds_ago
    os.utime(path, (touched, touched))
    lock = FileLock(folder / ".lock")
    taken = lock.take()
    lock.release()
    return not taken


def test_a_process_with_the_id_of_a_dead_one_does_not_hold_it(without_locks):
    mine = locks._describe(os.getpid()).split()[2]
    assert held_by(without_locks, socket.gethostname(), os.getpid(), mine)
    assert not held_by(without_locks, socket.gethostname(), os.getpid(), float(mine) - 3600)


def test_a_lock_of_another_machine_holds_while_it_is_touched(without_locks):
    assert held_by(without_locks, "another", 1, 0.0)
    assert held_by(without_locks, "another", 1, 0.0, locks.STALE_AFTER_SECONDS - 60)
    assert not held_by(without_locks, "another", 1, 0.0, locks.STALE_AFTER_SECONDS + 60)


def test_a_holder_touches_it(without_locks, monkeypatch):
    monkeypatch.setattr(locks, "SECONDS_BETWEEN_TOUCHES", 0.01)
    lock = FileLock(without_locks / ".lock")
    assert lock.take()
    os.utime(lock.held, (0, 0))
    while lock.held.stat().st_mtime == 0:
        time.sleep(0.01)
    lock.release()


def test_it_is_shared_with_a_process_that_outlives_its_holder(without_locks):
    survivor = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)

    def hold_and_die():
        lock = FileLock(without_locks / ".lock")
        assert lock.take()
        lock.share_with(survivor.pid)
        os.kill(os.getpid(), signal.SIGKILL)

    holder = multiprocessing.get_context("fork").Process(target=hold_and_die)
    holder.start()
    holder.join()
    lock = FileLock(without_locks / ".lock")
    assert not lock.take()
    survivor.communicate(b"\n")
    assert lock.take()
    lock.release()


def test_a_lock_that_was_given_back_closes_nothing_in_forked_children(tmp_path):
    with exclusive_lock(tmp_path / ".lock", "working"):
        pass
    with (tmp_path / "other").open("w") as other:  # gets the lock's old number

        def write():
            other.write("written")
            other.flush()

        child = multiprocessing.get_context("fork").Process(target=write)
        child.start()
        child.join()
        assert child.exitcode == 0
