"""Saved states: what survives, what is ignored."""

import logging

import pytest
import torch

from lungddpm.core.torch_files import load_checked
from lungddpm.models.training_states import newest_state, save_state

WANTED = {"config_fingerprint": "a", "data_fingerprint": "b"}


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger="lungddpm")
    return caplog


def state(value=0.0, **changes):
    return {**WANTED, "model": {"w": torch.full((1000,), value)}, **changes}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_and_the_previous_state_are_kept(tmp_path):
    previous = None
    for step in (10, 20, 30):
        previous = save_state(tmp_path, step, state(step), previous)
    assert names(tmp_path) == ["step-00000020.pt", "step-00000030.pt"]
    assert load_checked(newest_state(tmp_path, WANTED))["model"]["w"][0] == 30


def test_the_previous_state_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    previous = save_state(tmp_path, 20, state(), save_state(tmp_path, 10, state(), None))

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_state(tmp_path, 30, state(), previous)
    assert names(tmp_path) == ["step-00000010.pt", "step-00000020.pt"]


def test_what_a_killed_process_left_goes_with_the_next_state(tmp_path):
    (tmp_path / ".step-00000020-x.pt").write_bytes(b"half")
    save_state(tmp_path, 30, state(), None)
    assert names(tmp_path) == ["step-00000030.pt"]


@pytest.mark.parametrize("length", [0, 5, 3000, -1])
def test_a_truncated_state_falls_back_to_the_previous(tmp_path, length, log):
    previous = save_state(tmp_path, 10, state(), None)
    newest = save_state(tmp_path, 20, state(), previous)
    newest.write_bytes(newest.read_bytes()[:length])
    assert newest_state(tmp_path, WANTED) == previous
    assert "step-00000020.pt is damaged and is ignored" in log.text


def test_a_flipped_bit_is_noticed(tmp_path, log):
    newest = save_state(tmp_path, 20, state(1.0), save_state(tmp_path, 10, state(), None))
    content = bytearray(newest.read_bytes())
    content[content.find(torch.ones(50).numpy().tobytes()) + 100] ^= 1
    newest.write_bytes(content)
    assert torch.load(newest, weights_only=True)["model"]["w"].unique().numel() == 2  # torch does not notice
    with pytest.raises(ValueError, match="differs from its checksum"):
        load_checked(newest)
    assert newest_state(tmp_path, WANTED).name == "step-00000010.pt"
    assert "differs from its checksum" in log.text


def test_code_in_a_state_is_not_run(tmp_path, log):
    torch.save({"history": Exception("pickled object")}, tmp_path / "step-00000004.pt")
    assert newest_state(tmp_path, WANTED) is None
    assert "is damaged and is ignored: it holds code" in log.text
    assert "weights_only" not in log.text


@pytest.mark.parametrize("content", [[1, 2], {"config_fingerprint": "a"}, state(data_fingerprint="c")])
def test_states_of_other_trainings_are_ignored(tmp_path, content, log):
    torch.save(content, tmp_path / "step-00000004.pt")
    assert newest_state(tmp_path, WANTED) is None
    assert "is ignored" in log.text


def test_no_folder_no_state(tmp_path):
    assert newest_state(tmp_path / "none", WANTED) is None
