"""Progress of a stage: a bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import codecs
import io
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

LOG = logging.getLogger("lungddpm")
_SECONDS_BETWEEN_LINES = 15.0
_SECONDS_BETWEEN_LOOKS = 0.5
_SILENT_SECONDS = 3.0
"""Shorter operations are not reported."""

_IN_ASCII = {
    "\N{NON-BREAKING HYPHEN}": "-", "\N{NO-BREAK SPACE}": " ",
    "–": "-", "—": "-", "−": "-", "∞": "inf", "×": "x", "·": "*", "±": "+/-", "≥": ">=", "≤": "<=", "≈": "~",
    "→": "->", "…": "...", "‘": "'", "’": "'", "“": '"', "”": '"', "•": "*", "²": "^2", "³": "^3", "µ": "u", "Δ": "d",
}  # fmt: skip
_IN_OTHER_ENCODINGS = "lungddpm.spell"


def adapt_terminal() -> None:
    """Let standard output and error spell out characters that their encoding lacks: in Latin-1, "≥" becomes ">="."""
    codecs.register_error(_IN_OTHER_ENCODINGS, _spell)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_IN_OTHER_ENCODINGS)


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    spelt = (_IN_ASCII.get(c, c.encode("ascii", "backslashreplace").decode("ascii")) for c in characters)
    return "".join(spelt), error.end


def start_logging(log_file: str | Path | None = None) -> None:
    """Send messages of the package to standard error and, if given, to a file as well.

    Of several processes started by torchrun, only the first logs; the others report errors only.
    """
    # If the disk is full, the log cannot be written either: the message matters, not the failure to write it.
    logging.raiseExceptions = False
    is_first = is_first_process()
    LOG.setLevel(logging.INFO if is_first else logging.ERROR)
    LOG.handlers.clear()
    console = logging.StreamHandler(sys.stderr)
    console.setFormatter(logging.Formatter("%(message)s"))
    LOG.addHandler(console)
    if log_file is not None and is_first:
        handler = logging.FileHandler(log_file, mode="w", encoding="utf-8", errors="backslashreplace")
        handler.setFormatter(_FileFormatter("%(asctime)s %(levelname)s %(message)s"))
        LOG.addHandler(handler)
        device_record(Path(log_file)).unlink(missing_ok=True)


def is_first_process() -> bool:
    """Whether this is the process that logs, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def device_record(log_file: Path) -> Path:
    """The file next to a log in which `core.device.log_device` records the device of the stage."""
    return log_file.with_suffix(".device.json")


def shorten_paths(text: str) -> str:
    """Text for a file of the run: paths without the machine's folders, which may reveal who ran it and where.

    These are the working directory, the software, the home folder, and absolute paths on the command line.
    """
    given = [word.rpartition("=")[2] for word in sys.argv[1:]]
    folders = [os.getcwd(), str(Path(__file__).parents[2]), sys.prefix, sys.base_prefix, os.path.expanduser("~")]
    folders += [
        path for word in given if os.path.isabs(word) for path in (os.path.normpath(word), os.path.realpath(word))
    ]
    # Without a home folder its path is empty.
    for folder in sorted(filter(os.path.isabs, set(folders) - {os.sep}), key=len, reverse=True):
        text = text.replace(folder + os.sep, "").replace(folder, os.path.basename(folder))
    return text


class _FileFormatter(logging.Formatter):
    """For logs, which are results: see `shorten_paths`. The terminal shows full paths."""

    def format(self, record: logging.LogRecord) -> str:
        return shorten_paths(super().format(record))


class Progress:
    """Counts steps towards a total.

    On a terminal: a tqdm bar with rate and time left. In any case: a log line every 15 s and at the end, so that log
    files do not depend on the terminal; `read_count` reads it.

    Example:
        with Progress("denoiser", total=1000) as progress:
            for step in progress.steps():
                progress.note(loss=0.1)
    """

    def __init__(self, what: str, total: int, start: int = 0):
        self.what, self.total, self.done = what, total, start
        self._first, self._began = start, time.monotonic()
        self._last_line = self._began
        self._notes: dict[str, str] = {}
        self._bar: tqdm | None = None

    def __enter__(self) -> Progress:
        if (terminal := _terminal()) is not None:
            from tqdm import tqdm

            self._bar = tqdm(
                desc=self.what, total=self.total, initial=self.done, leave=False, mininterval=0.5, file=terminal
            )
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.close()
        if exc_info[0] is None:
            self._line()

    def steps(self) -> Iterator[int]:
        """The remaining steps, 0-based, advancing by one after each."""
        for step in range(self.done, self.total):
            yield step
            self.advance()

    def note(self, **notes: float | str) -> None:
        """Values to show next to the count, e.g. the loss."""
        self._notes = {name: f"{v:.4g}" if isinstance(v, float) else str(v) for name, v in notes.items()}

    def advance(self, steps: int = 1) -> None:
        """Count one or more steps as done."""
        self.done += steps
        if self._bar is not None:
            self._bar.set_postfix(self._notes, refresh=False)
            self._bar.update(steps)
        if time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES and self.done < self.total:
            self._line()

    def _line(self) -> None:
        self._last_line = time.monotonic()
        elapsed = self._last_line - self._began
        rate = (self.done - self._first) / elapsed if elapsed > 0 else 0.0
        pace = f", {format_pace(rate)}" if rate else ""
        left = f", {(self.total - self.done) / rate:.0f} s left" if rate and self.done < self.total else ""
        notes = "".join(f", {name} {value}" for name, value in self._notes.items())
        _write_line(f"{self.what}: {self.done} of {self.total}{notes}, {elapsed:.0f} s{pace}{left}", self._bar is None)


@dataclass(frozen=True)
class Count:
    """What a line of `Progress` says."""

    what: str
    done: int
    total: int
    per_second: float | None
    """None before the first step."""
    seconds_left: float | None
    """None where there is no rate, and where all is done."""


_COUNT = re.compile(
    r"(?P<what>.+): (?P<done>\d+) of (?P<total>\d+)(?P<notes>, .+)?, \d+ s"
    r"(, ((?P<rate>[\d.e+-]+)/s|(?P<each>[\d.e+-]+) s each))?(, (?P<left>\d+) s left)?"
)


def read_count(line: str) -> Count | None:
    """What a line of a log counts, without its time and level; None where it is another line."""
    if (found := _COUNT.fullmatch(line)) is None:
        return None
    rate = float(found["rate"]) if found["rate"] else 1 / float(found["each"]) if found["each"] else None
    left = float(found["left"]) if found["left"] else None
    return Count(found["what"], int(found["done"]), int(found["total"]), rate, left)


def format_pace(rate: float) -> str:
    """ "5.2/s", or "12.3 s each" of what takes longer than a second."""
    return f"{rate:.3g}/s" if rate >= 1 else f"{1 / rate:.3g} s each"


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Report that an operation of unknown length is running, such as the import of a large library.

    Nothing for 3 s; then on a terminal how long it has taken, in a log a line every 15 s, and at the end how long it
    took.
    """
    began, ended = time.monotonic(), threading.Event()
    speaker = threading.Thread(target=_report_that_it_runs, args=(what, began, ended), daemon=True)
    speaker.start()
    try:
        yield
    finally:
        ended.set()
        speaker.join()


def _report_that_it_runs(what: str, began: float, ended: threading.Event) -> None:
    if ended.wait(_SILENT_SECONDS):
        return
    terminal, next_line, bar = _terminal(), began + _SECONDS_BETWEEN_LINES, None
    if terminal is not None:
        from tqdm import tqdm

        bar = tqdm(desc=what, bar_format="{desc}{postfix}", leave=False, file=terminal)
    while not ended.wait(_SECONDS_BETWEEN_LOOKS):
        seconds = time.monotonic() - began
        if bar is not None:
            bar.set_postfix_str(f"{seconds:.0f} s")
        if began + seconds >= next_line:
            next_line += _SECONDS_BETWEEN_LINES
            _write_line(f"{what}: {seconds:.0f} s so far", bar is None)
    if bar is not None:
        bar.close()
    _write_line(f"{what}: done, {time.monotonic() - began:.0f} s", bar is None)


def _terminal() -> TextIO | None:
    """Standard error as logging has it, where a person watches it."""
    if not LOG.isEnabledFor(logging.INFO):
        return None
    streams = [h.stream for h in LOG.handlers if type(h) is logging.StreamHandler]
    return next((stream for stream in streams if not stream.closed and stream.isatty()), None)


def _write_line(text: str, to_console: bool) -> None:
    """A line for log files, and for the console where no bar shows the same."""
    if not LOG.isEnabledFor(logging.INFO):
        return
    record = LOG.makeRecord(LOG.name, logging.INFO, __file__, 0, text, (), None)
    for handler in LOG.handlers:
        if to_console or isinstance(handler, logging.FileHandler):
            handler.handle(record)
