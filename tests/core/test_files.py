"""Atomic writes, hashes, seeds."""

import errno
import hashlib
import json
import math
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest

from lungddpm.core.errors import InputError
from lungddpm.core.files import (
    atomic_path,
    exclusive_lock,
    fingerprint,
    json_text,
    link_or_copy,
    lock_if_free,
    read_json,
    seed_from,
    sha256_of,
    write_json,
    write_table,
)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    path = tmp_path / "a.nii.gz"

    def die_half_way():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    killed = multiprocessing.get_context("fork").Process(target=die_half_way)
    killed.start()
    killed.join()
    (left,) = tmp_path.iterdir()
    other = tmp_path / "b.nii.gz"
    with atomic_path(other):
        assert left.exists(), "it is not of this file"
    with atomic_path(path) as living:
        assert not left.exists()
        with atomic_path(path) as second:
            second.write_text("second")
        assert living.exists()
        living.write_text("first")
    assert path.read_text() == "first"
    assert {entry.name for entry in tmp_path.iterdir()} == {"a.nii.gz", "b.nii.gz"}


def test_a_child_that_lives_on_does_not_hold_the_lock(tmp_path):
    context = multiprocessing.get_context("fork")
    children = context.Queue()

    def hold_and_die():
        with exclusive_lock(tmp_path / ".lock", "training"):
            child = context.Process(target=signal.pause)
            child.start()
            children.put(child.pid)
            children.close()
            children.join_thread()
            os.kill(os.getpid(), signal.SIGKILL)

    parent = context.Process(target=hold_and_die)
    parent.start()
    child = psutil.Process(children.get())
    parent.join()
    try:
        with lock_if_free(tmp_path / ".lock") as free:
            assert free
        assert child.is_running()
    finally:
        child.kill()


def test_temporary_keeps_suffixes_and_folder(tmp_path):
    with atomic_path(tmp_path / "deep" / "scan.nii.gz") as temporary:
        assert temporary.parent == tmp_path / "deep"
        assert temporary.name.endswith(".nii.gz")
        temporary.write_bytes(b"x")
    assert (tmp_path / "deep" / "scan.nii.gz").read_bytes() == b"x"


def test_files_are_readable_by_others(tmp_path):
    write_json(tmp_path / "a.json", {})
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EPERM])
def test_disks_without_modes_and_flushing_are_written_all_the_same(tmp_path, monkeypatch, number):
    def refuse(*_arguments, **_options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(os, "chmod", refuse)
    write_json(tmp_path / "a.json", {"n": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"n": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_disk_that_fails_to_flush_is_an_error(tmp_path, monkeypatch):
    def fail(_descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        write_json(tmp_path / "a.json", {"n": 1})
    assert not os.listdir(tmp_path)


def test_a_folder_is_copied_where_there_are_no_links(tmp_path, monkeypatch):
    def refuse(*_arguments, **_options):
        raise OSError(errno.ENOSYS, "Function not implemented")

    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/a.txt").write_text("a")
    link_or_copy(tmp_path / "labels", tmp_path / "link")
    assert (tmp_path / "link").readlink() == Path("labels")
    monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.setenv("LUNGDDPM_WARNED_LINKS", "1")
    link_or_copy(tmp_path / "labels", tmp_path / "copy")
    assert not (tmp_path / "copy").is_symlink()
    assert (tmp_path / "copy/a.txt").read_text() == "a"


def test_json_is_strict(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"dice": float("nan")})
    assert not list(tmp_path.iterdir())
    write_json(tmp_path / "b.json", {"n": np.int64(3), "a": np.arange(2)})
    assert json.loads((tmp_path / "b.json").read_text()) == {"n": 3, "a": [0, 1]}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "does not exist"),
        ("{", "cannot be read as JSON"),
        ("", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[]", "is not a JSON object"),
        ('{"a": {"b": 1, "c": 2, "b": 3}}', "an object has the key 'b' twice"),
    ],
)
def test_json_that_cannot_be_read_is_reported_with_the_way_out(tmp_path, text, problem):
    if text is not None:
        (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=f"a.json: .*{problem}.*Make it again[.]$"):
        read_json(tmp_path / "a.json", "Make it again.")


def test_json_that_is_not_utf_8_or_is_a_folder(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"name": "M\xfcller"}')
    (tmp_path / "folder.json").mkdir()
    for name in ("a.json", "folder.json"):
        with pytest.raises(InputError, match="cannot be read as JSON"):
            read_json(tmp_path / name)


def test_names_that_are_not_utf_8_come_back_from_json(tmp_path):
    name = os.fsdecode(b"M\xfcller/1.dcm")
    write_json(tmp_path / "a.json", {"inputs": [name, "−"]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"inputs": [name, "−"]}


def test_tables_choose_their_separator(tmp_path):
    table = pd.DataFrame({"a": [1], "b": ["x,y"]})
    write_table(tmp_path / "t.tsv", table)
    write_table(tmp_path / "t.csv", table)
    assert (tmp_path / "t.tsv").read_text() == "a\tb\n1\tx,y\n"
    assert (tmp_path / "t.csv").read_text() == 'a,b\n1,"x,y"\n'


def test_hashes(tmp_path):
    (tmp_path / "f").write_bytes(b"lung")
    assert sha256_of(tmp_path / "f") == hashlib.sha256(b"lung").hexdigest()
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1}) != fingerprint({"a": 1, "b": [3]})


def test_seeds_are_stable_distinct_and_in_range():
    # The value is a contract: seeds must not change between versions, or interrupted runs would not continue.
    assert seed_from(1, "main", "case", 0) == 6685482984341975558
    seeds = {seed_from(1, run, case, i) for run in "ab" for case in "cd" for i in range(50)}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_second_process_waits_and_reports_it(tmp_path, caplog):
    order = []

    def second():
        with exclusive_lock(tmp_path / "lock", "training"):
            order.append("second")

    with exclusive_lock(tmp_path / "lock", "training"):
        thread = threading.Thread(target=second)
        thread.start()
        while "Another process is training: waiting" not in caplog.text:
            time.sleep(0.01)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_json_for_other_programs_is_strict_and_ascii():
    values = {
        "path": Path("results/a"), "unknown": [math.nan, np.float32("inf"), None], "n": np.int64(3),
        "array": np.array([0.5, np.nan]), "text": "−0.05 ± 1", "pair": (True, 2),
    }  # fmt: skip
    text = json_text(values)
    assert text.isascii()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "path": "results/a", "unknown": [None, None, None], "n": 3, "array": [0.5, None], "text": "−0.05 ± 1",
        "pair": [True, 2],
    }  # fmt: skip
