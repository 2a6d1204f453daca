"""Progress: a bar on a terminal, plain lines in a log file, the same figures in both."""

import io
import re
import sys
import time

import pytest

from lungddpm.core import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def log_file(tmp_path, monkeypatch):
    def start(stream):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
        progress.start_logging(tmp_path / "stage.log")
        return tmp_path / "stage.log"

    yield start
    progress.LOG.handlers.clear()


def count_to_three(start=0):
    with progress.Progress("denoiser", total=3, start=start) as shown:
        for step in shown.steps():
            shown.note(loss=0.5 / (step + 1))


def test_a_log_file_gets_plain_lines_with_loss_and_time_left(log_file):
    stream = io.StringIO()
    path = log_file(stream)
    count_to_three()
    lines = path.read_text().splitlines()
    assert len(lines) == 3
    assert re.search(r"denoiser: 1 of 3, loss 0.5, \d+ s, [\d.e+]+/s, \d+ s left$", lines[0])
    assert re.search(r"denoiser: 3 of 3, loss 0.1667, \d+ s, [\d.e+]+/s$", lines[-1])
    assert [line.split("INFO ")[1] for line in lines] == stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue()


def test_a_terminal_gets_a_bar_and_the_log_file_its_lines(log_file):
    stream = Terminal()
    path = log_file(stream)
    count_to_three()
    assert "\r" in stream.getvalue()
    assert "denoiser:" in stream.getvalue()
    assert "denoiser: 3 of 3" not in stream.getvalue()
    assert len(path.read_text().splitlines()) == 3


def test_a_resumed_stage_counts_on(log_file):
    path = log_file(io.StringIO())
    count_to_three(start=2)
    assert "denoiser: 3 of 3" in path.read_text().splitlines()[-1]
    assert "1 of 3" not in path.read_text()


def test_a_console_that_is_closed_stops_nothing(log_file):
    stream = io.TextIOWrapper(io.BytesIO())
    path = log_file(stream)
    stream.close()
    count_to_three()
    assert "denoiser: 3 of 3" in path.read_text().splitlines()[-1]


def test_a_stage_that_fails_does_not_report_its_end(log_file):
    path = log_file(io.StringIO())
    with pytest.raises(RuntimeError), progress.Progress("denoiser", total=3):
        raise RuntimeError
    assert path.read_text() == ""


def test_of_several_processes_only_the_first_reports_progress_but_all_report_errors(log_file, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    stream = Terminal()
    path = log_file(stream)
    count_to_three()
    progress.LOG.info("Computing on two GPUs")
    progress.LOG.error("error: out of memory")
    assert stream.getvalue() == "error: out of memory\n"
    assert not path.exists()


class Clock:
    """Seconds that pass only on demand."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)

    def pass_by(self, seconds):
        self.now += seconds


@pytest.mark.parametrize(
    ("seconds", "pace", "per_second", "left"), [(0.5, "2/s", 2.0, "49 s left"), (40.0, "40 s each", 0.025, "3920 s")]
)
def test_a_line_counts_with_its_rate_and_is_read_again(log_file, monkeypatch, seconds, pace, per_second, left):
    path, clock = log_file(io.StringIO()), Clock(monkeypatch)
    with progress.Progress("training real+lung_ddpm@1.0 fold 0: it", total=200, start=100) as shown:
        shown.note(loss=0.25, memory_mib="812")
        for _ in range(2):
            clock.pass_by(seconds)
            shown.advance()
        # What was done before this process does not count for its rate.
        line = path.read_text().splitlines()[-1].split("INFO ")[1]
        assert f", {2 * seconds:.0f} s, {pace}, {left}" in line
        found = progress.read_count(line)
        assert (found.what, found.done, found.total) == ("training real+lung_ddpm@1.0 fold 0: it", 102, 200)
        assert found.per_second == pytest.approx(per_second)
        assert found.seconds_left == pytest.approx(98 * seconds)
        clock.pass_by(seconds)
        shown.advance(98)
    found = progress.read_count(path.read_text().splitlines()[-1].split("INFO ")[1])
    assert (found.done, found.total, found.seconds_left) == (200, 200, None)


@pytest.mark.parametrize("line", ["Computing on cpu (2 threads)", "error: x: 3 of 4 are wrong", "a: 1 of 2, 3 s, b"])
def test_other_lines_count_nothing(line):
    assert progress.read_count(line) is None


@pytest.fixture
def impatient(monkeypatch):
    """Messages that would appear after seconds appear at once."""
    monkeypatch.setattr(progress, "_SILENT_SECONDS", 0.0)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LOOKS", 0.01)


def wait_until(condition):
    while not condition():
        time.sleep(0.01)


def test_a_long_wait_is_announced_and_its_time_reported(log_file, impatient):
    stream = io.StringIO()
    path = log_file(stream)
    with progress.waiting("loading torch"):
        wait_until(lambda: "so far" in path.read_text())
    said = [line.split("INFO ")[1] for line in path.read_text().splitlines()]
    assert re.fullmatch(r"loading torch: \d+ s so far", said[0])
    assert re.fullmatch(r"loading torch: done, \d+ s", said[-1])
    assert said == stream.getvalue().splitlines()


def test_on_a_terminal_it_is_a_line_that_goes_away(log_file, impatient):
    stream = Terminal()
    path = log_file(stream)
    with progress.waiting("loading torch"):
        wait_until(lambda: "loading torch, " in stream.getvalue())
    assert "done" not in stream.getvalue()
    assert stream.getvalue().endswith("\r")
    assert "loading torch: done" in path.read_text()


def test_a_short_wait_prints_nothing(log_file):
    path = log_file(io.StringIO())
    with progress.waiting("loading json"):
        pass
    with pytest.raises(RuntimeError), progress.waiting("failing"):
        raise RuntimeError
    assert path.read_text() == ""
