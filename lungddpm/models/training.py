"""Training of a generator, in one or several processes, resumable at any time.

<output>/state/step-*.pt     everything needed to resume: the newest state and the one before it
<output>/history.csv         step, loss, learning_rate, seconds, memory_mib; one row per optimizer step
<output>/samples/, samples.csv, tensorboard/   see `monitoring.Monitor`
<output>/cache/              the decoded cases, while the training runs
<output>/model.safetensors   EMA weights: if it exists, the training is complete
<output>/training.json       written last: fingerprints of config and data, steps, and which code version ran them
"""

from __future__ import annotations

import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from lungddpm.config.sections import GeneratorConfig, TrainedSettings
from lungddpm.core import cases
from lungddpm.core.code import CodeFromStep, code_of_steps, stage_fingerprint
from lungddpm.core.cohorts import training_cases
from lungddpm.core.errors import InputError
from lungddpm.core.files import exclusive_lock, fingerprint, read_json, sha256_of, write_json
from lungddpm.core.memory import explain_out_of_memory, peak_memory_mib
from lungddpm.core.progress import LOG, Progress
from lungddpm.core.torch_files import load_checked
from lungddpm.models.accelerator import make_accelerator
from lungddpm.models.checkpoint import Metadata, patients_of, read_metadata, read_weights, save_network
from lungddpm.models.data import TrainingData, open_cache
from lungddpm.models.monitoring import Monitor, draw_grid, grid_cases, losses_that_did_not_fall
from lungddpm.models.optimization import start_optimization
from lungddpm.models.recipe import Preview, Recipe, fresh
from lungddpm.models.training_states import keep_states, newest_state, save_state

MEMORY_OPTIONS = (
    "Set training.gradient_checkpointing: true or training.precision: bf16, lower training.batch_size, train on crops, "
    "or lower denoiser.base_channels; 'lungddpm train --estimate' shows the requirements. Saved states are intact."
)


def run_train(
    config: GeneratorConfig[TrainedSettings],
    recipe: Recipe,
    preview: Preview,
    cases_table: Path,
    output: Path,
    device: str = "auto",
    initial: Path | None = None,
    *,
    restart: bool = False,
) -> None:
    """Train a generator on the usable discovery cases, or on its subset of them; write `model.safetensors`.

    A training with the same config on the same cases continues from its last saved state, even if the code has
    changed, which is recorded; on a CPU it ends bit-identical to one that was never interrupted. A complete one is
    kept, unless other code ran it. Started by torchrun or `accelerate launch`, all processes share the
    training and the first one writes.

    Args:
        config: of the generator.
        recipe: how it is trained.
        preview: what draws the grids of samples.
        cases_table: table of cases.
        output: folder of the run.
        device: see `make_accelerator`.
        initial: weights to start from (see `Recipe.load`); None starts from random ones.
        restart: start over even if states were saved. They are removed once the new training has saved its own.

    Raises:
        InputError: no usable case, a case that breaks its contract, initial weights that are missing or do not fit, or
            a loss that is no longer a number.
        ConfigError: the device is not available, it ran out of memory, or there are not enough cases.
        SystemExit: code 143 after SIGTERM, when the step under way is done and saved.
    """
    number = config.trained_for.real_cases
    rows = training_cases(cases.read_cases(cases_table), number, config.seed)
    if recipe.needs_nodule:
        rows = rows[rows["n_nodules"] > 0]
    if rows.empty:
        what = "discovery case with a nodule" if recipe.needs_nodule else "discovery case"
        among = "" if number is None else f" among the {number} of arms.real_cases"
        raise InputError(cases_table, f"has no usable {what}{among}", "Check its columns role, status and reason.")
    if initial is not None and not initial.exists():
        raise InputError(initial, "does not exist", "Pass the path of a model.safetensors or a published .pt.")
    folders = [cases.folder_of(cases_table, row) for _, row in rows.iterrows()]
    hashes = [folder.hash() for folder in folders]
    training = config.settings.training
    accelerator = make_accelerator(device, training.precision, training.accumulation)
    metadata = Metadata.of(
        config,
        steps=training.steps,
        config_fingerprint=_config_fingerprint(config, accelerator.num_processes, initial),
        data_fingerprint=fingerprint(hashes),
        trained_on=sorted({*rows["patient_id"], *_patients_before(initial)}),
        code=code_of_steps([], 0, stage_fingerprint("train", config.kind)),
    )
    with _held_by_main_process(output, accelerator), explain_out_of_memory("training", MEMORY_OPTIONS):
        if restart or not _is_complete(output / "model.safetensors", metadata):
            data = open_cache(output / "cache", rows["case_id"].tolist(), folders, hashes, config.grid.size)
            model = initial_network(config, recipe, initial)
            run = _Run(config, recipe, preview, metadata, data, output, accelerator, model)
            run.resume(restart)
            run.train()
            run.finish()
            if initial is None:
                run.warn_if_nothing_was_learned()
    accelerator.end_training()


def initial_network(config: GeneratorConfig[TrainedSettings], recipe: Recipe, weights: Path | None = None) -> nn.Module:
    """The network that training starts from: with these weights, or with those that belong to the config's seed."""
    if weights is not None:
        return recipe.load(weights).train().requires_grad_(True)
    return fresh(recipe.build, config, "weights")


class _Run:
    """A training under way: its steps and its output."""

    def __init__(
        self,
        config: GeneratorConfig[TrainedSettings],
        recipe: Recipe,
        preview: Preview,
        metadata: Metadata,
        data: TrainingData,
        output: Path,
        accelerator: Accelerator,
        model: nn.Module,
    ):
        self.config, self.training = config, config.settings.training
        self.recipe, self.preview = recipe, preview
        self.data, self.output, self.accelerator = data, output, accelerator
        self.metadata = metadata
        self.fingerprints = {
            "config_fingerprint": metadata.config_fingerprint,
            "data_fingerprint": metadata.data_fingerprint,
        }
        self.code: list[CodeFromStep] = metadata.code
        self.optimization = start_optimization(config, recipe, model, data, accelerator)
        self.history: list[list[float]] = []
        self.under_way: list[torch.Tensor] = []
        self.stopping = False
        self.saved: Path | None = None
        self.monitor: Monitor | None = None

    def resume(self, restart: bool) -> None:
        """Resume from the newest state of this training, if there is one; all processes use the same one."""
        found = self._newest_state() if self.accelerator.is_main_process and not restart else None
        (self.saved,) = broadcast_object_list([found])
        if self.saved is None:
            LOG.info("Starting from the beginning: no saved state of this training in %s", self.output)
        else:
            state = load_checked(self.saved)
            self.optimization.load_state_dict(state)
            self.history = state["history"].tolist()
            LOG.info("Resuming from step %d of %d", len(self.history), self.training.steps)
            self.code = code_of_steps(state["code"], len(self.history), self.code[-1]["code"], "give --restart")
        if self.accelerator.is_main_process:
            self.monitor = Monitor(self.output, len(self.history))
            self.monitor.write_history(self.history)

    def train(self) -> None:
        """Take the remaining steps."""
        self.began = time.monotonic() - (self.history[-1][2] if self.history else 0.0)
        with (
            closing(self.monitor) if self.monitor else nullcontext(),
            _sigterm_noted() as asked_to_stop,
            Progress(f"training of {self.config.name}", self.training.steps, start=len(self.history)) as progress,
        ):
            for step in progress.steps():
                self.under_way.append(self.optimization.take_step(step, asked_to_stop))
                # A loss is fetched from a GPU while the next step runs, so that the GPU never idles.
                self._settle(still_under_way=int(self.accelerator.device.type == "cuda"))
                if self._is_due(step, self.training.sample_every):
                    self._draw_grid()
                if self._is_due(step, self.training.save_every) or self.stopping:
                    self._save()
                if self.stopping:
                    self._stop()
                if self.history:
                    progress.note(loss=self.history[-1][0], memory_mib=f"{self.history[-1][3]:.0f}")

    def finish(self) -> None:
        """Write the result, and remove what only a running training needs."""
        if self.accelerator.is_main_process:
            keep_states(self.output / "state", self.saved)
            kept = self.recipe.keep(self.data.case_ids, self.data.ct, self.data.layout)
            metadata = replace(self.metadata, code=self.code, kept=kept)
            # On a network disk, a file that is still open leaves a trace until the process ends.
            shutil.rmtree(self.output / "cache", ignore_errors=True)
            save_network(self.output / "model.safetensors", self.optimization.average, metadata)
            write_json(self._record, {**self.fingerprints, "steps": metadata.steps, "code": self.code})

    def warn_if_nothing_was_learned(self) -> None:
        """Warn if the loss ended about where it began, as after a learning rate that was too high."""
        for first, last in losses_that_did_not_fall([row[0] for row in self.history], self.optimization.phases):
            LOG.warning(
                "%s has probably learned nothing: its loss was %.2f in the first tenth of the steps and %.2f in the "
                "last. Try a lower training.learning_rate, or more training.warmup_steps.",
                self.config.name, first, last,
            )  # fmt: skip

    def _newest_state(self) -> Path | None:
        """The newest state of this training; None if it is the last one of a training that other code finished."""
        found = newest_state(self.output / "state", self.fingerprints)
        if found is None or not self._record.exists():
            return found
        record = read_json(self._record)
        if {**record, **self.fingerprints} != record or record["code"][-1]["code"] == self.code[-1]["code"]:
            return found
        LOG.info("%s: this training was finished by other code and is ignored", found)
        return None

    @property
    def _record(self) -> Path:
        return self.output / "training.json"

    def _is_due(self, step: int, every: int) -> bool:
        return (step + 1) % every == 0 or step + 1 == self.training.steps

    def _settle(self, still_under_way: int = 0) -> None:
        """Wait for steps, record their figures, and check that losses are finite."""
        while len(self.under_way) > still_under_way:
            loss, stop = self.under_way.pop(0).tolist()
            step = len(self.history)
            if not math.isfinite(loss):
                raise self._diverged("the loss is", step)
            self.stopping |= stop > 0
            before = self.history[-1][2] if self.history else 0.0
            seconds = time.monotonic() - self.began
            memory = peak_memory_mib(str(self.accelerator.device))
            self.history.append([loss, self.optimization.learning_rate(step), seconds, memory])
            if self.monitor is not None:
                self.monitor.add_step(step + 1, self.history[-1], seconds - before)

    def _draw_grid(self) -> None:
        self._settle()
        if self.monitor is not None:
            shown = grid_cases(self.data)
            average, recipe = self.optimization.average, self.recipe
            errors, figure = draw_grid(average, self.preview, self.data, shown, self.config, recipe, self.accelerator)
            names = [self.data.case_ids[case] for case in shown]
            self.monitor.add_samples(len(self.history), names, errors, figure)

    def _save(self) -> None:
        """Write the state, then the history that belongs to it."""
        self._settle()
        if not self.optimization.is_finite():
            raise self._diverged("weights or Adam's moments are", len(self.history) - 1)
        if self.monitor is not None:
            history = torch.tensor(self.history, dtype=torch.float64)
            training = {**self.fingerprints, "code": self.code, "history": history}
            state = {**training, **self.optimization.state_dict()}
            self.saved = save_state(self.output / "state", len(self.history), state, previous=self.saved)
            # The record of a finished training does not hold for this state.
            self._record.unlink(missing_ok=True)
            self.monitor.write_history(self.history)

    def _stop(self) -> None:
        LOG.warning("Stopped by SIGTERM: step %d is saved, the same command resumes from it", len(self.history))
        self.accelerator.end_training()
        raise SystemExit(128 + signal.SIGTERM)

    def _diverged(self, what: str, step: int) -> InputError:
        kept = f"The last good state is kept in {self.saved}." if self.saved else "No state was saved before."
        return InputError(
            self.output,
            f"the training diverged: {what} no longer finite at step {step + 1}",
            f"Lower training.learning_rate or set training.gradient_clip. {kept}",
        )


def _config_fingerprint(config: GeneratorConfig[TrainedSettings], processes: int, initial: Path | None) -> str:
    """Of everything that decides what training computes, except the code: a training under way survives its change."""
    decisive = {
        "seed": config.seed,
        "window_hu": config.grid.window_hu,
        "generator": config.name,
        "run": config.run,
        "settings": config.settings.decides_weights(processes),
        "initial_sha256": None if initial is None else sha256_of(initial),
    }
    return fingerprint(decisive)


def _patients_before(initial: Path | None) -> list[str]:
    """The patients that the initial weights, if any, were trained on, as far as they record them."""
    patients = [] if initial is None else patients_of(initial)
    if patients is None:
        LOG.warning(
            "%s does not record the patients that it was trained on: the leak guard cannot know whether it has seen "
            "test cases of this run.",
            initial,
        )
    return patients or []


def _is_complete(model_path: Path, wanted: Metadata) -> bool:
    if not model_path.exists():
        return False
    try:
        found = read_metadata(model_path)
        read_weights(model_path)
    except InputError as error:
        LOG.warning("%s Training again.", error)
        return False
    found_by, wanted_by = (
        (m.config_fingerprint, m.data_fingerprint, [last["code"] for last in m.code[-1:]]) for m in (found, wanted)
    )
    if found_by == wanted_by:
        LOG.info("%s is complete: nothing to do", model_path)
    return found_by == wanted_by


@contextmanager
def _held_by_main_process(output: Path, accelerator: Accelerator) -> Iterator[None]:
    """Keep other trainings out of the folder; the processes of this one wait until the first one holds it."""
    lock = exclusive_lock(output / ".lock", f"training into {output}")
    with lock if accelerator.is_main_process else nullcontext():
        accelerator.wait_for_everyone()
        yield


@contextmanager
def _sigterm_noted() -> Iterator[Callable[[], bool]]:
    """Within the block, SIGTERM (sent by clusters before the time limit) is only noted; yields whether it arrived."""
    noted = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
        yield noted.is_set
        return
    former = signal.signal(signal.SIGTERM, lambda *_: noted.set())
    try:
        yield noted.is_set
    finally:
        signal.signal(signal.SIGTERM, former)
