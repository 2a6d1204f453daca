import fcntl
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState
from made_up_trainings import train
from safetensors.torch import load_file

from lungddpm.core import cases
from lungddpm.core.cohorts import Cohort, training_cases
from lungddpm.core.errors import ConfigError, InputError
from lungddpm.core.files import fingerprint
from lungddpm.core.torch_files import load_checked
from lungddpm.generators import lung_ddpm
from lungddpm.models import monitoring, training
from lungddpm.models.checkpoint import read_metadata
from lungddpm.models.denoiser import build_denoiser
from lungddpm.models.optimization import Optimization

KILLED_WHILE_SAVING = """
import os, signal, sys, torch
from pathlib import Path
from lungddpm.config.loading import load_config
from lungddpm.generators import lung_ddpm
from lungddpm.models import training, training_states

torch.set_num_threads(1)
save, saved = torch.save, []

def save_or_die(state, file):
    saved.append(file)
    if len(saved) == 2:
        file.write(b"half of a st")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(state, file)

training_states.torch.save = save_or_die
config, cohort, output = map(Path, sys.argv[1:])
config = load_config(config).for_training("lung_ddpm")
training.run_train(config, lung_ddpm.recipe(config), lung_ddpm.preview(config), cohort, output, "cpu")
"""


@pytest.fixture(scope="module", autouse=True)
def quick(one_thread):
    """A grid of samples that takes no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monitoring, "_GRID_CASES", 1)
        patch.setattr(lung_ddpm, "PREVIEW_STEPS", 2)
        yield


@pytest.fixture(scope="module")
def uninterrupted(tiny_cohort, training_config, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    train(training_config(), tiny_cohort, output, "cpu")
    return output


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger="lungddpm")
    return caplog


def at_step(monkeypatch, step, act):
    """Call `act` with the optimization when this many steps have been taken, before the next one."""
    take_step = Optimization.take_step

    def acting(self, number, *rest):
        if number == step:
            act(self)
        return take_step(self, number, *rest)

    monkeypatch.setattr(Optimization, "take_step", acting)


def stop(_optimization):
    raise KeyboardInterrupt


def history_of(output):
    return pd.read_csv(output / "history.csv")[["step", "loss", "learning_rate"]]


def states_of(output):
    return sorted(path.name for path in (output / "state").iterdir())


def assert_same_end(first, second):
    """Same weights, bit by bit, same losses, same samples."""
    weights = [load_file(output / "model.safetensors") for output in (first, second)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    pd.testing.assert_frame_equal(history_of(first), history_of(second))
    assert (first / "samples.csv").read_text() == (second / "samples.csv").read_text()


def test_writes_all_outputs(uninterrupted, training_config):
    history = pd.read_csv(uninterrupted / "history.csv")
    assert history.columns.tolist() == ["step", "loss", "learning_rate", "seconds", "memory_mib"]
    assert history["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert history["learning_rate"].tolist() == pytest.approx([1e-3 * (1 + np.cos(np.pi * k / 6)) for k in range(6)])
    assert history["seconds"].is_monotonic_increasing
    assert history["memory_mib"].between(50, 50_000).all()
    assert states_of(uninterrupted) == ["step-00000006.pt"]
    assert not (uninterrupted / "cache").exists()
    metadata = read_metadata(uninterrupted / "model.safetensors")
    assert metadata.config == training_config().dump()
    assert metadata.steps == 6


def test_grids_of_samples_are_drawn_on_the_way_and_at_the_end(uninterrupted):
    pictures = sorted(path.name for path in (uninterrupted / "samples").iterdir())
    assert pictures == ["step-00000004.png", "step-00000006.png"]
    assert pd.read_csv(uninterrupted / "samples.csv")["step"].tolist() == [4, 6]


def test_tensorboard_holds_the_history(uninterrupted):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = accumulator.EventAccumulator(str(uninterrupted / "tensorboard")).Reload()
    history = pd.read_csv(uninterrupted / "history.csv")
    for name in ("loss", "learning_rate", "memory_mib"):
        scalars = board.Scalars(name)
        assert [scalar.step for scalar in scalars] == history["step"].tolist()
        assert [scalar.value for scalar in scalars] == pytest.approx(history[name].tolist(), rel=1e-6)
    assert min(scalar.value for scalar in board.Scalars("steps_per_second")) > 0
    assert [scalar.step for scalar in board.Scalars("mse")] == [4, 6]


def test_a_missing_tensorboard_is_not_an_error(tiny_cohort, training_config, tmp_path, monkeypatch, log):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    train(training_config(steps=1), tiny_cohort, tmp_path, "cpu")
    assert log.text.count("TensorBoard is not installed") == 1
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize("steps", [1, 5])
def test_interrupted_training_ends_bit_identical(
    uninterrupted, tiny_cohort, training_config, tmp_path, monkeypatch, steps, log
):
    with monkeypatch.context() as patch:
        at_step(patch, steps, stop)
        with pytest.raises(KeyboardInterrupt):
            train(training_config(), tiny_cohort, tmp_path, "cpu")
    assert not (tmp_path / "model.safetensors").exists()
    torch.manual_seed(steps)  # nothing may depend on the global generator
    train(training_config(), tiny_cohort, tmp_path, "cpu")
    begin = "Starting from the beginning" if steps < 2 else f"Resuming from step {steps // 2 * 2} of 6"
    assert begin in log.text
    assert_same_end(tmp_path, uninterrupted)


def test_killed_while_saving(uninterrupted, tiny_cohort, training_config, write_config, tmp_path, log):
    write_config(tmp_path / "config.json", training_config())
    output = tmp_path / "run"
    arguments = [sys.executable, "-c", KILLED_WHILE_SAVING, tmp_path / "config.json", tiny_cohort, output]
    assert subprocess.run(arguments, check=False).returncode == -signal.SIGKILL
    half, whole = states_of(output)
    assert half.startswith(".step-00000004")
    assert whole == "step-00000002.pt"
    train(training_config(), tiny_cohort, output, "cpu")
    assert "Resuming from step 2" in log.text
    assert states_of(output) == ["step-00000006.pt"]
    assert_same_end(output, uninterrupted)


def test_two_states_are_kept_and_a_damaged_one_falls_back(
    uninterrupted, tiny_cohort, training_config, tmp_path, monkeypatch, log
):
    with monkeypatch.context() as patch:
        at_step(patch, 5, stop)
        with pytest.raises(KeyboardInterrupt):
            train(training_config(), tiny_cohort, tmp_path, "cpu")
    assert states_of(tmp_path) == ["step-00000002.pt", "step-00000004.pt"]
    newest = tmp_path / "state/step-00000004.pt"
    damaged = bytearray(newest.read_bytes())
    history = load_checked(newest)["history"].numpy().tobytes()
    damaged[damaged.index(history) + 3] ^= 1  # one bit of one number, which torch.load would not notice
    newest.write_bytes(damaged)
    train(training_config(save_every=3), tiny_cohort, tmp_path, "cpu")
    assert "step-00000004.pt is damaged and is ignored" in log.text
    assert "Resuming from step 2 of 6" in log.text
    assert_same_end(tmp_path, uninterrupted)


def interrupt(monkeypatch, config, cohort, output, step):
    """Train until this many steps have been taken."""
    with monkeypatch.context() as patch:
        at_step(patch, step, stop)
        with pytest.raises(KeyboardInterrupt):
            train(config, cohort, output, "cpu")


def recorded_code(output):
    """Which code took which steps, by the weights' metadata and by the file beside them."""
    metadata = read_metadata(output / "model.safetensors").code
    assert json.loads((output / "training.json").read_text())["code"] == metadata
    return metadata


def test_a_training_under_way_survives_changed_code(
    uninterrupted, tiny_cohort, training_config, tmp_path, monkeypatch, log
):
    (own,) = recorded_code(uninterrupted)
    assert own["from_step"] == 1
    interrupt(monkeypatch, training_config(), tiny_cohort, tmp_path, 3)
    monkeypatch.setattr(training, "stage_fingerprint", lambda *_: "changed")
    # These steps are lost: 3 and 4 are taken by the code after.
    interrupt(monkeypatch, training_config(), tiny_cohort, tmp_path, 3)
    monkeypatch.setattr(training, "stage_fingerprint", lambda *_: "changed again")
    log.clear()
    train(training_config(), tiny_cohort, tmp_path, "cpu")
    assert f"has changed since step 2 ({own['code'][:12]}, now changed agai)" in log.text
    assert "Resuming from step 2 of 6" in log.text
    assert recorded_code(tmp_path) == [own, {"from_step": 3, "code": "changed again"}]
    assert_same_end(tmp_path, uninterrupted)
    # It is complete, and its last state as good as any other.
    (tmp_path / "model.safetensors").unlink()
    with monkeypatch.context() as patch:
        at_step(patch, 0, stop)
        train(training_config(), tiny_cohort, tmp_path, "cpu")
    assert len(recorded_code(tmp_path)) == 2
    monkeypatch.undo()
    # Of other code, it is not.
    log.clear()
    train(training_config(), tiny_cohort, tmp_path, "cpu")
    assert "complete: nothing to do" not in log.text
    assert recorded_code(tmp_path) == [own]
    assert_same_end(tmp_path, uninterrupted)


@pytest.mark.parametrize("rule_reruns", [True, False])
def test_a_finished_training_of_other_code_starts_over(
    uninterrupted, tiny_cohort, training_config, tmp_path, monkeypatch, log, rule_reruns
):
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(training, "stage_fingerprint", lambda *_: "changed")
    if rule_reruns:  # Snakemake deletes the output of a rule that it runs again
        (tmp_path / "model.safetensors").unlink()
    interrupt(monkeypatch, training_config(), tiny_cohort, tmp_path, 1)
    assert states_of(tmp_path) == ["step-00000006.pt"], "kept until the new training has saved"
    assert "finished by other code" in log.text
    log.clear()
    interrupt(monkeypatch, training_config(), tiny_cohort, tmp_path, 3)
    assert "Resuming" not in log.text, "nor does the next start take it for its own"
    assert states_of(tmp_path) == ["step-00000002.pt"]
    train(training_config(), tiny_cohort, tmp_path, "cpu")
    assert recorded_code(tmp_path) == [{"from_step": 1, "code": "changed"}]
    assert_same_end(tmp_path, uninterrupted)


def test_restart_starts_over_and_keeps_the_states_until_the_first_new_one(
    uninterrupted, tiny_cohort, training_config, tmp_path, monkeypatch, log
):
    interrupt(monkeypatch, training_config(), tiny_cohort, tmp_path, 5)
    with monkeypatch.context() as patch:
        at_step(patch, 1, stop)
        with pytest.raises(KeyboardInterrupt):
            train(training_config(), tiny_cohort, tmp_path, "cpu", restart=True)
    assert states_of(tmp_path) == ["step-00000002.pt", "step-00000004.pt"]
    log.clear()
    train(training_config(), tiny_cohort, tmp_path, "cpu", restart=True)
    assert "Resuming" not in log.text
    assert_same_end(tmp_path, uninterrupted)
    steps = []
    take_step = Optimization.take_step
    monkeypatch.setattr(Optimization, "take_step", lambda *args: (steps.append(args[1]), take_step(*args))[1])
    train(training_config(), tiny_cohort, tmp_path, "cpu", restart=True)
    assert steps == [0, 1, 2, 3, 4, 5], "also where it is complete"


def test_states_of_another_config_are_kept_until_the_new_training_has_saved(
    uninterrupted, tiny_cohort, training_config, tmp_path, monkeypatch, log
):
    interrupt(monkeypatch, training_config(), tiny_cohort, tmp_path, 5)
    interrupt(monkeypatch, training_config(seed=2), tiny_cohort, tmp_path, 1)
    assert states_of(tmp_path) == ["step-00000002.pt", "step-00000004.pt"]
    train(training_config(), tiny_cohort, tmp_path, "cpu")
    assert "Resuming from step 4 of 6" in log.text
    assert_same_end(tmp_path, uninterrupted)


def test_after_sigterm_the_step_is_finished_and_saved_and_training_resumes(
    uninterrupted, tiny_cohort, training_config, tmp_path, monkeypatch, log
):
    former = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as ended:
            train(training_config(), tiny_cohort, tmp_path, "cpu")
    assert ended.value.code == 143
    assert "step 3 is saved" in log.text
    assert states_of(tmp_path)[-1] == "step-00000003.pt"
    assert signal.getsignal(signal.SIGTERM) == former
    train(training_config(), tiny_cohort, tmp_path, "cpu")
    assert "Resuming from step 3" in log.text
    assert_same_end(tmp_path, uninterrupted)


def test_complete_training_is_left_alone(uninterrupted, tiny_cohort, training_config, monkeypatch, log):
    at_step(monkeypatch, 0, stop)
    only_how = training_config(save_every=3, sample_every=1, gradient_checkpointing=True)
    train(only_how, tiny_cohort, uninterrupted, "cpu")
    assert "nothing to do" in log.text


def test_lost_model_is_written_from_the_last_state(uninterrupted, tiny_cohort, training_config, tmp_path, monkeypatch):
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    at_step(monkeypatch, 0, stop)
    train(training_config(), tiny_cohort, tmp_path, "cpu")
    assert_same_end(tmp_path, uninterrupted)


def test_damaged_model_is_written_from_the_last_state(
    uninterrupted, tiny_cohort, training_config, tmp_path, monkeypatch, log
):
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[-9] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    at_step(monkeypatch, 0, stop)
    train(training_config(), tiny_cohort, tmp_path, "cpu")
    assert "differs from the checksum" in log.text
    assert_same_end(tmp_path, uninterrupted)


def test_another_config_or_other_cases_start_over(uninterrupted, tiny_cohort, training_config, tmp_path, log):
    shutil.copytree(uninterrupted, tmp_path / "run")
    other = training_config(seed=2, steps=2)
    train(other, tiny_cohort, tmp_path / "run", "cpu")
    assert "different config and is ignored" in log.text
    assert not history_of(tmp_path / "run").equals(history_of(uninterrupted)[:2])
    assert [path.name for path in (tmp_path / "run/samples").iterdir()] == ["step-00000002.png"]

    shutil.copytree(tiny_cohort.parent, tmp_path / "cohort")
    table = cases.read_cases(tiny_cohort)
    cases.write_cases(tmp_path / "cohort/cases.tsv", table[table["case_id"] != "case00"])
    train(other, tmp_path / "cohort/cases.tsv", tmp_path / "run", "cpu")
    assert "different data and is ignored" in log.text


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_last_good_state(
    tiny_cohort, training_config, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        Optimization, "take_step", lambda self, step, *_: torch.tensor([float("nan") if step == 2 else 0.5, 0.0])
    )
    with pytest.raises(InputError, match=r"the loss is no longer finite at step 3.*step-00000002\.pt"):
        train(training_config(), tiny_cohort, tmp_path, "cpu")
    assert states_of(tmp_path) == ["step-00000002.pt"]
    assert not (tmp_path / "model.safetensors").exists()


def spoil_weights(optimization):
    next(optimization.model.parameters()).data[0] = float("inf")


def spoil_average(optimization):
    next(optimization.average.parameters()).data[0] = float("nan")


def spoil_moments(optimization):
    next(iter(optimization.optimizer.state.values()))["exp_avg_sq"].fill_(float("inf"))


@pytest.mark.parametrize("spoil", [spoil_weights, spoil_average, spoil_moments])
def test_a_state_on_disk_is_good_even_where_the_loss_shows_nothing(
    tiny_cohort, training_config, tmp_path, monkeypatch, spoil
):
    take_step = Optimization.take_step

    def quietly_wrong(self, step, *rest):
        result = take_step(self, step, *rest)
        if step == 3:
            spoil(self)
        return result

    monkeypatch.setattr(Optimization, "take_step", quietly_wrong)
    with pytest.raises(InputError, match=r"diverged: weights or .* no longer finite at step 4.*step-00000002\.pt"):
        train(training_config(), tiny_cohort, tmp_path, "cpu")
    state = torch.load(tmp_path / "state/step-00000002.pt", weights_only=True)
    moments = [value for moments in state["optimizer"]["state"].values() for value in moments.values()]
    tensors = [*state["model"].values(), *state["average"].values(), *moments]
    assert len(tensors) > 20
    assert all(tensor.isfinite().all() for tensor in tensors)
    assert states_of(tmp_path) == ["step-00000002.pt"]


def test_waits_for_the_process_that_holds_the_folder(
    uninterrupted, tiny_cohort, training_config, tmp_path, monkeypatch, log
):
    at_step(monkeypatch, 0, stop)
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = threading.Thread(target=train, args=(training_config(), tiny_cohort, tmp_path, "cpu"))
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


def test_learns_whole_volumes(tiny_cohort, training_config, tmp_path):
    config = training_config(steps=40, crop=None, accumulation=1, learning_rate=5e-3, save_every=40, sample_every=40)
    train(config, tiny_cohort, tmp_path, "cpu")
    loss = history_of(tmp_path)["loss"]
    assert loss[0] == pytest.approx(np.sqrt(2 / np.pi), abs=0.02)  # mean |noise|: a fresh denoiser predicts zero
    assert loss[-10:].mean() < 0.75 * loss[0]


def losses_of(config, cohort, output):
    train(config, cohort, output, "cpu")
    return history_of(output)["loss"].to_numpy()


def test_gradient_checkpointing_changes_nothing(uninterrupted, tiny_cohort, training_config, tmp_path):
    losses = losses_of(training_config(gradient_checkpointing=True), tiny_cohort, tmp_path)
    np.testing.assert_allclose(losses, history_of(uninterrupted)["loss"], atol=1e-6, rtol=0)


def test_a_batch_equals_its_accumulation(uninterrupted, tiny_cohort, training_config, tmp_path):
    losses = losses_of(training_config(batch_size=1, accumulation=4), tiny_cohort, tmp_path)
    np.testing.assert_allclose(losses, history_of(uninterrupted)["loss"], atol=1e-4, rtol=0)


def test_compiled_training_keeps_losses_and_names_of_weights(
    uninterrupted, tiny_cohort, training_config, write_config, tmp_path, monkeypatch
):
    compile_module, compiled = torch.nn.Module.compile, []

    def trace_only(self, **options):  # all but the C++ compiler's minute
        compiled.append(self)
        compile_module(self, backend="eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", trace_only)
    config = training_config(compile=True, gradient_checkpointing=True)
    np.testing.assert_allclose(
        losses_of(config, tiny_cohort, tmp_path), history_of(uninterrupted)["loss"], atol=1e-5, rtol=0
    )
    assert len(compiled) == 1
    published = build_denoiser(config).state_dict().keys()
    state = torch.load(tmp_path / "state/step-00000006.pt", weights_only=True)
    assert state["model"].keys() == state["average"].keys() == published
    assert load_file(tmp_path / "model.safetensors").keys() == published


def test_bf16_stays_close_and_keeps_weights_in_fp32(uninterrupted, tiny_cohort, training_config, tmp_path):
    AcceleratorState._reset_state(True)
    try:
        losses = losses_of(training_config(precision="bf16"), tiny_cohort, tmp_path)
    finally:
        AcceleratorState._reset_state(True)
    expected = history_of(uninterrupted)["loss"].to_numpy()
    np.testing.assert_allclose(losses, expected, rtol=0.01)
    assert not np.array_equal(losses, expected)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[...] can't allocate memory: you tried ...")]
)
def test_out_of_memory_names_the_options(tiny_cohort, training_config, tmp_path, monkeypatch, error):
    def fail(_optimization):
        raise error

    at_step(monkeypatch, 3, fail)
    with pytest.raises(ConfigError, match=r"th.* ran out of memory.*gradient_checkpointing.*--estimate"):
        train(training_config(), tiny_cohort, tmp_path, "cpu")
    assert states_of(tmp_path) == ["step-00000002.pt"]


def test_no_discovery_case(tiny_cohort, training_config, tmp_path):
    table = cases.read_cases(tiny_cohort)
    cases.write_cases(tmp_path / "cases.tsv", table[table["role"] == "test"])
    with pytest.raises(InputError, match="no usable discovery case"):
        train(training_config(), tmp_path / "cases.tsv", tmp_path, "cpu")


def test_unknown_device(tiny_cohort, training_config, tmp_path):
    with pytest.raises(ConfigError, match="'abacus' is not available"):
        train(training_config(), tiny_cohort, tmp_path, "abacus")


def test_no_fp16_on_a_cpu(tiny_cohort, training_config, tmp_path):
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        train(training_config(precision="fp16"), tiny_cohort, tmp_path, "cpu")


def test_two_processes_continue_as_one_with_twice_the_accumulation(
    uninterrupted, tiny_cohort, training_config, write_config, tmp_path, monkeypatch
):
    shared = tmp_path / "shared"
    with monkeypatch.context() as patch:
        at_step(patch, 3, stop)
        with pytest.raises(KeyboardInterrupt):
            train(training_config(), tiny_cohort, shared, "cpu")
    half = training_config(accumulation=training_config().settings.training.accumulation // 2)
    write_config(tmp_path / "config.json", half)
    launched = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python", "--"),
        *(Path(sys.executable).with_name("lungddpm"), "--log", tmp_path / "log", "train", "--generator", "lung_ddpm"),
        *("--threads", "2"),
        *("--configfile", tmp_path / "config.json", "--cases", tiny_cohort, "--output", shared, "--device", "cpu"),
    ]
    subprocess.run(launched, check=True, capture_output=True, env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"})
    said = (tmp_path / "log").read_text()
    assert "2 processes" in said
    assert said.count("Resuming from step 2 of 6") == 1
    np.testing.assert_allclose(history_of(shared)["loss"], history_of(uninterrupted)["loss"], atol=1e-4, rtol=0)
    weights = [load_file(output / "model.safetensors") for output in (uninterrupted, shared)]
    for name in weights[0]:
        torch.testing.assert_close(*(each[name] for each in weights), atol=1e-4, rtol=0)
    assert states_of(shared) == ["step-00000006.pt"]


def test_a_subset_sees_its_own_cases_and_nobody_else(tiny_cohort, training_config, tmp_path, monkeypatch):
    decoded = []
    read = cases.CaseFolder.read
    monkeypatch.setattr(cases.CaseFolder, "read", lambda self: decoded.append(self.path.name) or read(self))
    table = cases.read_cases(tiny_cohort)
    patients = dict(zip(table["case_id"], table["patient_id"], strict=True))
    subset = training_cases(table, 2, 1)
    for number, expected in ((2, set(subset["case_id"])), (None, {"case00", "case01", "case02"})):
        decoded.clear()
        config, folder = replace(training_config(steps=2), trained_for=Cohort(number)), tmp_path / str(number)
        train(config, tiny_cohort, folder, "cpu")
        assert set(decoded) == expected
        metadata = read_metadata(folder / "model.safetensors")
        assert metadata.trained_on == sorted(patients[case] for case in expected)
        hashes = [cases.CaseFolder(tiny_cohort.parent / case).hash() for case in sorted(expected)]
        assert metadata.data_fingerprint == fingerprint(hashes)
    with pytest.raises(ConfigError, match=r"arms\.real_cases: names 3, but there are 3 usable"):
        train(replace(training_config(), trained_for=Cohort(3)), tiny_cohort, tmp_path, "cpu")


def test_a_training_for_one_replicate_has_its_own_random_numbers(tiny_cohort, training_config, tmp_path):
    weights = {}
    for name in ("all", "all-fold0_seed0", "all-fold0_seed1", "real2-fold0_seed0"):
        config = replace(training_config(steps=1), trained_for=Cohort.parse(name))
        weights[name] = training.initial_network(config, lung_ddpm.recipe(config)).state_dict()
    first = {name: next(iter(values.values())) for name, values in weights.items()}
    assert not torch.equal(first["all"], first["all-fold0_seed0"])
    assert not torch.equal(first["all-fold0_seed0"], first["all-fold0_seed1"])
    # Numbers of real cases differ in their cases alone.
    assert torch.equal(first["all-fold0_seed0"], first["real2-fold0_seed0"])
