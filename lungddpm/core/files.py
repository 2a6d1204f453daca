"""Atomic writes and hashes: a reader sees the old file or the new one, never a partial one."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lungddpm.core.errors import InputError
from lungddpm.core.locks import FileLock, warn_once
from lungddpm.core.progress import LOG

if TYPE_CHECKING:
    import pandas as pd


_NOT_SUPPORTED = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.EINVAL}
"""Error codes of disks that lack an operation, such as exFAT, SMB and FUSE."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of `path`; it is synced and renamed to `path` if the block succeeds.

    The temporary name keeps all suffixes of `path` (".nii.gz"), because writers choose the format by them. Remains of
    killed processes are removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = "".join(path.suffixes[-2:])
    prefix = f".{path.name.removesuffix(suffix)}-"
    _remove_left_behind(path.parent, prefix, suffix)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=suffix)
    temporary = Path(name)
    try:
        # Held until this process ends; some network disks have no locks.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield temporary
        with temporary.open("rb") as written:
            _sync(written.fileno())
        # mkstemp makes files private, but results are read by colleagues. Some disks do not store modes.
        with suppress(OSError):
            temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def exclusive_lock(path: Path, work: str) -> Iterator[None]:
    """Hold a lock file while the block runs; wait for another process that holds it, such as a killed run's orphan.

    Args:
        path: the lock file; it is created and kept.
        work: what the other process is doing, for the message ("training into results/models/lung_ddpm/main").
    """
    lock = FileLock(path)
    # A forked child would hold the lock as well, and nnU-Net's loaders survive a killed training.
    os.register_at_fork(after_in_child=lock.close)
    try:
        if not lock.take():
            LOG.warning("Another process is %s: waiting for it to end", work)
            lock.wait()
        yield
    finally:
        lock.release()


@contextmanager
def lock_if_free(path: Path) -> Iterator[bool]:
    """Hold a lock file while the block runs, unless another process does; yields whether this one holds it."""
    lock = FileLock(path)
    try:
        yield lock.take()
    finally:
        lock.release()


def link_or_copy(target: Path, link: Path, seen_from: Path | None = None) -> None:
    """Make a relative symbolic link to a file or folder, or a copy if the disk has no links.

    Args:
        target: of the link.
        link: the link to make.
        seen_from: final folder of the link, if it will be moved.
    """
    try:
        link.symlink_to(os.path.relpath(target.resolve(), (seen_from or link.parent).resolve()))
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        warn_once("LINKS", "%s: this disk has no symbolic links (%s); files are copied", link.parent, error.strerror)
        copy = shutil.copytree if target.is_dir() else shutil.copyfile
        copy(target, link)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically; characters outside UTF-8 are written as by `printable`."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON (no NaN), indented, keys in the given order, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=_plain) + "\n")


def json_text(value: Any) -> str:
    """A value as strict JSON for other programs: ASCII, so that any terminal prints it; NaN and infinities are null."""
    return json.dumps(_without_nan(value), indent=2, allow_nan=False, default=_plain)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(each) for each in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return _without_nan(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path, remedy: str = "Delete it and run again.") -> dict[str, Any]:
    """Read a JSON file that contains an object.

    Args:
        path: the file.
        remedy: what the user can do if it cannot be read, as a sentence.

    Raises:
        InputError: it is missing, unreadable, damaged, or not an object; or has a duplicate key, of which
            Python would drop the first.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_distinct_keys)
    except FileNotFoundError:
        raise InputError(path, "does not exist", remedy) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(path, f"cannot be read as JSON ({error})", remedy) from None
    if not isinstance(content, dict):
        raise InputError(path, "is not a JSON object", remedy)
    return content


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a data frame atomically, tab-separated for `.tsv`, else comma-separated; no index column."""
    with atomic_path(path) as temporary:
        separator = "\t" if path.suffix == ".tsv" else ","
        table.to_csv(temporary, index=False, sep=separator, lineterminator="\n", errors="backslashreplace")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_archive(path: Path) -> None:
    """Compare the checksums of a zip archive, such as torch.save writes; torch.load does not.

    Raises:
        BadZipFile: it is truncated, or a part differs from its checksum.
    """
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"{damaged} differs from its checksum")


def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON-like value: equal values, equal fingerprints, whatever the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_plain).encode()).hexdigest()


def seed_from(*parts: int | str) -> int:
    """A seed in [0, 2**63) for a random generator, derived from what names the draw, e.g. (run seed, case, index)."""
    return int(fingerprint(list(parts))[:16], 16) >> 1


def seeded_order(names: Iterable[str], seed: int, draw: str) -> list[str]:
    """Distinct names in an order that depends only on the seed and the names, not on their original order."""
    return sorted(set(names), key=lambda name: (seed_from(seed, draw, name), name))


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"an object has the key '{twice}' twice")
    return content


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return value.as_posix()
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return value.tolist()
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _remove_left_behind(folder: Path, prefix: str, suffix: str) -> None:
    """Remove temporary files with these names that nobody holds a lock on, because their process has ended."""
    for path in folder.glob(f"{glob.escape(prefix)}{'[a-z0-9_]' * 8}{glob.escape(suffix)}"):
        with suppress(OSError), path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _sync(descriptor: int) -> None:
    """Sync a file's bytes to disk, if the file system supports it."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
