import fcntl
import logging
import shutil
import threading

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from lungddpm import cases
from lungddpm.config import parse_config
from lungddpm.diffusion import training
from lungddpm.diffusion.checkpoint import read_metadata
from lungddpm.errors import ConfigError, InputError
from lungddpm.layouts import Label


def tiny_config(seed=1, **changes):
    settings = {
        "steps": 6, "batch_size": 2, "accumulation": 2, "learning_rate": 2e-3, "learning_rate_schedule": "cosine",
        "gradient_clip": 1.0, "crop": 8, "ema_decay": 0.5, "ema_every": 2, "ema_start": 3, "precision": "fp32",
        "save_every": 2,
    }  # fmt: skip
    denoiser = {"base_channels": 4, "multipliers": [1, 2], "norm_groups": 2, "attention": False}
    diffusion = {
        "classes": ["lung", "nodule", "vessel"],
        "timesteps": 20,
        "denoiser": denoiser,
        "training": {**settings, **changes},
        "sampling": {"steps": 20},
    }
    return parse_config({"seed": seed, "grid": {"size": [16, 16, 16]}, "diffusion": diffusion})


@pytest.fixture(scope="module")
def uninterrupted(tiny_cohort, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    training.run_train(tiny_config(), tiny_cohort, output, "cpu")
    return output


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger="lungddpm")
    return caplog


def interrupt_after(monkeypatch, steps):
    """Make the training stop like a killed process, after so many optimizer steps."""
    take_step, taken = training._Run._optimizer_step, []

    def stop(run):
        if len(taken) == steps:
            raise KeyboardInterrupt
        taken.append(run)
        return take_step(run)

    monkeypatch.setattr(training._Run, "_optimizer_step", stop)
    return taken


def history_of(output):
    return pd.read_csv(output / "history.csv")[["step", "loss", "learning_rate"]]


def assert_same_weights(first, second):
    first, second = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_writes_all_outputs(uninterrupted):
    history = pd.read_csv(uninterrupted / "history.csv")
    assert history.columns.tolist() == ["step", "loss", "learning_rate", "seconds"]
    assert history["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert history["learning_rate"].tolist() == pytest.approx([1e-3 * (1 + np.cos(np.pi * k / 6)) for k in range(6)])
    assert history["seconds"].is_monotonic_increasing
    assert [path.name for path in (uninterrupted / "state").iterdir()] == ["step-00000006.pt"]
    assert (uninterrupted / "samples/step-000006.png").read_bytes().startswith(b"\x89PNG")
    metadata = read_metadata(uninterrupted / "model.safetensors")
    assert metadata.config == tiny_config()
    assert metadata.steps == 6


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_interrupted_training_ends_bit_identical(uninterrupted, tiny_cohort, tmp_path, monkeypatch, steps):
    with monkeypatch.context() as patch:
        interrupt_after(patch, steps)
        with pytest.raises(KeyboardInterrupt):
            training.run_train(tiny_config(), tiny_cohort, tmp_path, "cpu")
    assert not (tmp_path / "model.safetensors").exists()
    taken = interrupt_after(monkeypatch, 6)
    training.run_train(tiny_config(), tiny_cohort, tmp_path, "cpu")
    assert len(taken) == 6 - steps // 2 * 2
    assert_same_weights(tmp_path, uninterrupted)
    pd.testing.assert_frame_equal(history_of(tmp_path), history_of(uninterrupted))


def test_complete_training_is_left_alone(uninterrupted, tiny_cohort, monkeypatch, log):
    interrupt_after(monkeypatch, 0)
    training.run_train(tiny_config(save_every=3), tiny_cohort, uninterrupted, "cpu")
    assert "nothing to do" in log.text


def test_lost_model_is_written_from_the_last_state(uninterrupted, tiny_cohort, tmp_path, monkeypatch):
    shutil.copytree(uninterrupted / "state", tmp_path / "state")
    interrupt_after(monkeypatch, 0)
    training.run_train(tiny_config(), tiny_cohort, tmp_path, "cpu")
    assert_same_weights(tmp_path, uninterrupted)


def test_unreadable_state_is_passed_over(uninterrupted, tiny_cohort, tmp_path, log):
    (tmp_path / "state").mkdir()
    (tmp_path / "state/step-00000004.pt").write_bytes(b"cut short")
    training.run_train(tiny_config(), tiny_cohort, tmp_path, "cpu")
    assert "cannot be read" in log.text
    assert_same_weights(tmp_path, uninterrupted)


def test_state_runs_no_code(tiny_cohort, tmp_path, log):
    (tmp_path / "state").mkdir()
    torch.save({"history": Exception("pickled object")}, tmp_path / "state/step-00000004.pt")
    training.run_train(tiny_config(), tiny_cohort, tmp_path, "cpu")
    assert "cannot be read" in log.text


def test_another_config_or_other_cases_start_anew(uninterrupted, tiny_cohort, tmp_path, log):
    shutil.copytree(uninterrupted, tmp_path / "run")
    training.run_train(tiny_config(seed=2), tiny_cohort, tmp_path / "run", "cpu")
    assert "different config or code and is passed over" in log.text
    assert not history_of(tmp_path / "run").equals(history_of(uninterrupted))

    shutil.copytree(tiny_cohort.parent, tmp_path / "cohort")
    table = cases.read_cases(tiny_cohort)
    cases.write_cases(tmp_path / "cohort/cases.tsv", table[table["case_id"] != "case00"])
    training.run_train(tiny_config(seed=2), tmp_path / "cohort/cases.tsv", tmp_path / "run", "cpu")
    assert "different cases and is passed over" in log.text


def test_diverging_training_stops_and_keeps_the_last_good_state(tiny_cohort, tmp_path, monkeypatch):
    take_step, losses = training._Run._optimizer_step, iter([False, False, True])
    monkeypatch.setattr(training._Run, "_optimizer_step", lambda run: float("nan") if next(losses) else take_step(run))
    with pytest.raises(InputError, match=r"no longer finite at step 3.*step-00000002\.pt"):
        training.run_train(tiny_config(), tiny_cohort, tmp_path, "cpu")
    state = torch.load(tmp_path / "state/step-00000002.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    assert not (tmp_path / "model.safetensors").exists()


def test_waits_for_the_process_that_holds_the_folder(uninterrupted, tiny_cohort, tmp_path, monkeypatch, log):
    interrupt_after(monkeypatch, 0)
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = threading.Thread(target=training.run_train, args=(tiny_config(), tiny_cohort, tmp_path, "cpu"))
        second.start()
        for _ in range(100):
            if "waiting" in log.text:
                break
            second.join(0.1)
        assert "waiting" in log.text
        shutil.copy(uninterrupted / "model.safetensors", tmp_path)
    second.join(10)
    assert not second.is_alive()
    assert not (tmp_path / "state").exists()


def test_learns_whole_volumes(tiny_cohort, tmp_path):
    training.run_train(
        tiny_config(steps=40, crop=None, accumulation=1, learning_rate=5e-3, save_every=40),
        tiny_cohort,
        tmp_path,
        "cpu",
    )
    loss = history_of(tmp_path)["loss"]
    assert loss[0] == pytest.approx(np.sqrt(2 / np.pi), abs=0.02)  # mean |noise|: a fresh denoiser predicts zero
    assert loss[-10:].mean() < 0.75 * loss[0]


def test_crops_lie_inside_and_hold_something_to_generate():
    layout = np.zeros((16, 20, 24), np.uint8)
    layout[:4, 5:9, 20:] = Label.LUNG
    layout[2, 6, 22] = Label.NODULE
    generator = torch.Generator().manual_seed(0)
    with_nodule = 0
    for _ in range(100):
        where = training.draw_crop(layout, 4, generator)
        assert layout[where].shape == (4, 4, 4)
        assert (layout[where] != Label.BACKGROUND).any()
        with_nodule += (layout[where] == Label.NODULE).any()
    assert with_nodule > 40
    assert layout[training.draw_crop(np.zeros((16, 20, 24), np.uint8), 8, generator)].shape == (8, 8, 8)


def test_batches_keep_ct_and_condition_aligned(tiny_cohort):
    table = cases.read_cases(tiny_cohort)
    ct, layout = cases.read_case(cases.folder_of(tiny_cohort, table.iloc[0]))
    data = [training.TrainingCase(ct.array, layout.array)]
    clean, condition, timesteps = training.draw_batch(data, tiny_config(), torch.Generator().manual_seed(0))
    assert clean.shape == (2, 1, 8, 8, 8)
    assert condition.shape == (2, 3, 8, 8, 8)
    assert ((timesteps >= 0) & (timesteps < 20)).all()
    lung, nodule = condition[:, :1] > 0, condition[:, 1:2] > 0
    assert clean[lung].mean() < -0.75  # -850 HU
    assert clean[nodule].mean() > 0.2  # 20 HU


def test_no_discovery_case(tiny_cohort, tmp_path):
    table = cases.read_cases(tiny_cohort)
    cases.write_cases(tmp_path / "cases.tsv", table[table["role"] == "test"])
    with pytest.raises(InputError, match="no usable discovery case"):
        training.run_train(tiny_config(), tmp_path / "cases.tsv", tmp_path, "cpu")


def test_unknown_device(tiny_cohort, tmp_path):
    with pytest.raises(ConfigError, match="'abacus' is not available"):
        training.run_train(tiny_config(), tiny_cohort, tmp_path, "abacus")
