"""Progress: a bar on a terminal, plain lines in a log file, the same figures in both."""

import io
import re
import sys

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
    assert re.search(r"denoiser: 1 of 3, loss 0.5, \d+ s, \d+ s left$", lines[0])
    assert re.search(r"denoiser: 3 of 3, loss 0.1667, \d+ s$", lines[-1])
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


def test_a_stage_that_fails_does_not_say_that_it_ended(log_file):
    path = log_file(io.StringIO())
    with pytest.raises(RuntimeError), progress.Progress("denoiser", total=3):
        raise RuntimeError
    assert path.read_text() == ""


def test_of_several_processes_only_the_first_speaks_but_all_tell_of_errors(log_file, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    stream = Terminal()
    path = log_file(stream)
    count_to_three()
    progress.LOG.info("Computing on two GPUs")
    progress.LOG.error("error: out of memory")
    assert stream.getvalue() == "error: out of memory\n"
    assert not path.exists()
