"""The exceptions that users see. Each message names the file or key, the problem, and the fix."""

from __future__ import annotations

import errno
from pathlib import Path


def printable(text: str) -> str:
    """Text that can be written as UTF-8: other bytes of file names become escapes, as in JSON.

    Python holds such a byte, e.g. 0xFC, as a lone surrogate, U+DCFC, which becomes `\\udcfc`.
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class UserError(Exception):
    """Something the user can fix: the command ends with exit code 2 and this message, without a traceback.

    Args:
        what: the file, folder or config key.
        problem: what is wrong, as a clause ("has no CT series").
        remedy: what the user can do, as a sentence.
    """

    def __init__(self, what: str | Path, problem: str, remedy: str):
        self.what, self.problem, self.remedy = str(what), problem, remedy
        super().__init__(printable(f"{what}: {problem}. {remedy}"))


class ConfigError(UserError):
    """The config has a typo, a wrong type, or a combination that cannot work."""


class InputError(UserError):
    """A user's file or folder is missing, unreadable, or breaks its contract."""


class ExcludedCaseError(InputError):
    """One case cannot be used. The run continues without it; the reason is kept in `cases.tsv`."""


class LeakError(UserError):
    """A test patient is in a training set."""


class OutputError(UserError):
    """The output folder cannot be written: full, read-only, or locked by another run."""


_OUTPUT_PROBLEMS = {
    errno.ENOSPC: ("there is no space left on the device", "Free some space and run the same command again."),
    errno.EDQUOT: ("the disk quota is exceeded", "Free some space and run the same command again."),
    errno.EROFS: ("the file system is read-only", "Choose a writable results folder (--directory)."),
    errno.EEXIST: ("a file is in the way of the folder", "Move the file, or choose another folder (--directory)."),
    errno.ENOTDIR: ("a file is in the way of the folder", "Move the file, or choose another folder (--directory)."),
    errno.EACCES: ("permission is denied", "Choose a folder that you may read and write (--directory)."),
    errno.EPERM: ("permission is denied", "Choose a folder that you may read and write (--directory)."),
}


def from_os_error(error: BaseException | None) -> OutputError | None:
    """The user-facing form of a full or read-only disk; None if `error` is something else.

    Libraries wrap the system's error in their own, so the causes of an exception are checked as well.
    """
    if error is None:
        return None
    if isinstance(error, OSError) and error.errno in _OUTPUT_PROBLEMS:
        return OutputError(error.filename or "results", *_OUTPUT_PROBLEMS[error.errno])
    return from_os_error(error.__cause__ if error.__suppress_context__ else error.__context__)
