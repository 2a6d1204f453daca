"""Training of the denoiser: L1 on the noise (arXiv 2502.15204), resumable at any moment.

<output>/state/step-*.pt     everything needed to go on; the newest one is kept
<output>/history.csv         step, loss, learning_rate, seconds; one row an optimizer step
<output>/samples/step-*.png  reference, layout and sample of one discovery case, at the end
<output>/model.safetensors   EMA weights, written last: where it stands, the training is complete
"""

from __future__ import annotations

import copy
import math
import pickle
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator

from lungddpm import cases
from lungddpm.config import Config, Training
from lungddpm.diffusion.checkpoint import Metadata, read_metadata, save_denoiser
from lungddpm.diffusion.denoiser import UNet, build_denoiser, condition_channels
from lungddpm.diffusion.device import make_accelerator
from lungddpm.diffusion.sampling import sample
from lungddpm.diffusion.schedule import add_noise, alphas_cumprod, cosine_betas
from lungddpm.errors import InputError
from lungddpm.files import atomic_path, code_fingerprint, exclusive_lock, fingerprint, seed_from, write_table
from lungddpm.layouts import Label
from lungddpm.progress import LOG, Progress
from lungddpm.volume import to_model_range

_HISTORY = ["loss", "learning_rate", "seconds"]
_PICTURE_STEPS = 20


@dataclass(frozen=True)
class TrainingCase:
    """CT and layout in memory, as (x, y, z) arrays: int16 HU and uint8 labels."""

    ct: np.ndarray
    layout: np.ndarray


def run_train(config: Config, cases_table: Path, output: Path, device: str = "auto") -> None:
    """Train the denoiser on the usable discovery cases and write `model.safetensors`.

    A training of the same config on the same cases is continued from its last saved state; on a CPU it ends
    bit-identical to one that was never interrupted. One that is complete is left as it is.

    Args:
        config: the whole config; `diffusion`, `grid` and `seed` decide what is trained.
        cases_table: table of cases.
        output: folder of the run.
        device: see `make_accelerator`.

    Raises:
        InputError: no usable case, a case that breaks its contract, or a loss that is no longer a number.
    """
    rows = cases.usable(cases.read_cases(cases_table), "discovery")
    if rows.empty:
        raise InputError(cases_table, "has no usable discovery case", "See its columns role, status and reason.")
    folders = [cases.folder_of(cases_table, row) for _, row in rows.iterrows()]
    metadata = Metadata(
        config=config,
        steps=config.diffusion.training.steps,
        config_fingerprint=_config_fingerprint(config),
        data_fingerprint=fingerprint([cases.hash_case(folder) for folder in folders]),
    )
    model_path = output / "model.safetensors"
    if _is_complete(model_path, metadata):
        return
    with exclusive_lock(output / ".lock", f"training into {output}"):
        if _is_complete(model_path, metadata):  # by the process that held the lock
            return
        data = [_read(folder) for folder in folders]
        accelerator = make_accelerator(
            device, config.diffusion.training.precision, config.diffusion.training.accumulation
        )
        run = _Run(config, metadata, data, output, accelerator)
        run.resume()
        run.train()
        _write_picture(output / f"samples/step-{metadata.steps:06d}.png", run.average, config, data, accelerator)
        save_denoiser(model_path, run.average, metadata)


def learning_rate(training: Training, step: int) -> float:
    """The learning rate of a 0-based step: constant, or a half cosine from the peak to zero."""
    if training.learning_rate_schedule == "constant":
        return training.learning_rate
    return training.learning_rate * (1 + math.cos(math.pi * step / training.steps)) / 2


def draw_crop(layout: np.ndarray, edge: int, generator: torch.Generator) -> tuple[slice, slice, slice]:
    """A random cube around something to generate; open voxels are pasted later, so they matter less.

    A label is drawn from those in the layout (so that the few nodule voxels are seen as often as lung), then one of
    its voxels as the centre; the cube is moved to lie inside the volume.

    Args:
        layout: (x, y, z) labels.
        edge: voxels along each side, at most those of the layout.
        generator: source of the draws.
    """
    labels = [label for label in Label if label != Label.BACKGROUND and (layout == label).any()]
    if labels:
        chosen = np.flatnonzero(layout == labels[_integer(len(labels), generator)])
        centre = np.unravel_index(chosen[_integer(len(chosen), generator)], layout.shape)
    else:
        centre = [_integer(size, generator) for size in layout.shape]
    starts = [min(max(int(c) - edge // 2, 0), size - edge) for c, size in zip(centre, layout.shape, strict=True)]
    return tuple(slice(start, start + edge) for start in starts)


def draw_batch(
    data: Sequence[TrainingCase], config: Config, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random cases (with replacement), crops and timesteps.

    Returns:
        (clean, condition, timesteps): (N, 1, D, H, W) in [-1, 1], (N, C, D, H, W), and (N,) int64, on the CPU.
    """
    training = config.diffusion.training
    clean, condition = [], []
    for _ in range(training.batch_size):
        case = data[_integer(len(data), generator)]
        where = (slice(None),) * 3 if training.crop is None else draw_crop(case.layout, training.crop, generator)
        clean.append(to_model_range(case.ct[where], config.grid.window_hu).transpose(2, 1, 0)[None])
        condition.append(condition_channels(case.layout[where], config.diffusion.classes))
    timesteps = torch.randint(config.diffusion.timesteps, (training.batch_size,), generator=generator)
    return torch.from_numpy(np.stack(clean)), torch.from_numpy(np.stack(condition)), timesteps


class _Run:
    """A training under way: all that changes from step to step, and how it is saved."""

    def __init__(
        self,
        config: Config,
        metadata: Metadata,
        data: Sequence[TrainingCase],
        output: Path,
        accelerator: Accelerator,
    ):
        self.config, self.training = config, config.diffusion.training
        self.metadata, self.data, self.output, self.accelerator = metadata, data, output, accelerator
        self.signal = alphas_cumprod(cosine_betas(config.diffusion.timesteps))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_from(config.seed, config.diffusion.run, "weights"))
            model = build_denoiser(config)
        self.average: UNet = copy.deepcopy(model).to(accelerator.device).eval().requires_grad_(False)
        optimizer = torch.optim.Adam(model.parameters(), lr=self.training.learning_rate)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        # Crops and timesteps are drawn on the CPU, noise where it is used.
        self.generators = {
            "batch": torch.Generator().manual_seed(seed_from(config.seed, config.diffusion.run, "batch")),
            "noise": torch.Generator(accelerator.device).manual_seed(
                seed_from(config.seed, config.diffusion.run, "noise")
            ),
        }
        self.history: list[list[float]] = []

    def train(self) -> None:
        """Take the steps that are left."""
        began = time.monotonic() - (self.history[-1][-1] if self.history else 0.0)
        with Progress("denoiser", self.training.steps, start=len(self.history)) as progress:
            for step in progress.steps():
                rate = learning_rate(self.training, step)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                loss = self._optimizer_step()
                if not math.isfinite(loss):
                    raise self._diverged(step)
                self._update_average(step)
                self.history.append([loss, rate, time.monotonic() - began])
                progress.note(loss=loss)
                if (step + 1) % self.training.save_every == 0 or step + 1 == self.training.steps:
                    self.save()

    def _optimizer_step(self) -> float:
        device, losses = self.accelerator.device, []
        for _ in range(self.training.accumulation):
            clean, condition, timesteps = draw_batch(self.data, self.config, self.generators["batch"])
            clean, condition = clean.to(device), condition.to(device)
            noise = torch.randn(clean.shape, generator=self.generators["noise"], device=device)
            noisy = add_noise(clean, noise, timesteps, self.signal)
            with self.accelerator.accumulate(self.model):
                predicted = self.model(torch.cat([noisy, condition], dim=1), timesteps.to(device))
                loss = (predicted.float() - noise).abs().mean()
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients and self.training.gradient_clip is not None:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), self.training.gradient_clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses).mean().item()

    def _update_average(self, step: int) -> None:
        taken = step + 1
        if taken % self.training.ema_every and taken != self.training.steps:
            return
        weight = 1.0 if taken < self.training.ema_start else 1 - self.training.ema_decay
        for average, current in zip(self.average.parameters(), self.model.parameters(), strict=True):
            average.lerp_(current.detach(), weight)

    def save(self) -> None:
        """Write the state, then the history that belongs to it, then remove older states."""
        if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
            raise self._diverged(len(self.history) - 1)
        state = {
            "config_fingerprint": self.metadata.config_fingerprint,
            "data_fingerprint": self.metadata.data_fingerprint,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generators": {name: generator.get_state() for name, generator in self.generators.items()},
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
            "history": torch.tensor(self.history, dtype=torch.float64),
        }
        path = self.output / f"state/step-{len(self.history):08d}.pt"
        with atomic_path(path) as temporary:
            torch.save(state, temporary)
        self._write_history()
        for older in _states(self.output):
            if older != path:
                older.unlink()

    def resume(self) -> None:
        """Go on from the newest state of this very training, if there is one."""
        for path in _states(self.output):
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
                LOG.warning("%s cannot be read and is passed over: %s", path, str(error).splitlines()[0])
                continue
            if state["config_fingerprint"] != self.metadata.config_fingerprint:
                LOG.info("%s stems from a training with a different config or code and is passed over", path)
                continue
            if state["data_fingerprint"] != self.metadata.data_fingerprint:
                LOG.info("%s stems from a training on different cases and is passed over", path)
                continue
            self._restore(state)
            LOG.info("Going on from step %d of %d", len(self.history), self.training.steps)
            return
        LOG.info("Starting anew: no saved state of this training in %s", self.output)
        self._write_history()

    def _restore(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, generator in self.generators.items():
            generator.set_state(state["generators"][name])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.history = state["history"].tolist()
        self._write_history()

    def _write_history(self) -> None:
        table = pd.DataFrame(self.history, columns=_HISTORY)
        table.insert(0, "step", range(1, len(table) + 1))
        write_table(self.output / "history.csv", table)

    def _diverged(self, step: int) -> InputError:
        saved = _states(self.output)
        kept = f"The last good state is kept in {saved[0]}." if saved else "No state was saved before."
        return InputError(
            self.output,
            f"the training diverged: the loss is no longer finite at step {step + 1}",
            f"Lower diffusion.training.learning_rate or set gradient_clip. {kept}",
        )


def _config_fingerprint(config: Config) -> str:
    diffusion = config.diffusion.model_dump(mode="json", exclude={"sampling": True, "training": {"save_every"}})
    code = code_fingerprint("diffusion")
    return fingerprint({"seed": config.seed, "window_hu": config.grid.window_hu, "diffusion": diffusion, "code": code})


def _is_complete(model_path: Path, wanted: Metadata) -> bool:
    if not model_path.exists():
        return False
    try:
        found = read_metadata(model_path)
    except InputError as error:
        LOG.warning("%s: training anew", error)
        return False
    found_by, wanted_by = ((m.config_fingerprint, m.data_fingerprint) for m in (found, wanted))
    if found_by == wanted_by:
        LOG.info("%s is complete: nothing to do", model_path)
    return found_by == wanted_by


def _states(output: Path) -> list[Path]:
    """Saved states, newest first."""
    return sorted((output / "state").glob("step-*.pt"), reverse=True)


def _read(folder: Path) -> TrainingCase:
    ct, layout = cases.read_case(folder)
    return TrainingCase(ct.array.astype(np.int16), layout.array.astype(np.uint8))


def _integer(below: int, generator: torch.Generator) -> int:
    return int(torch.randint(below, (), generator=generator))


def _write_picture(
    path: Path, denoiser: UNet, config: Config, data: Sequence[TrainingCase], accelerator: Accelerator
) -> None:
    """Middle of the largest nodule of the discovery cases: reference, layout, sample (20 DPM-Solver++ steps)."""
    from matplotlib.figure import Figure

    case = max(data, key=lambda case: int((case.layout == Label.NODULE).sum()))
    clean = to_model_range(case.ct, config.grid.window_hu).transpose(2, 1, 0)
    reference = torch.from_numpy(clean[None, None].copy()).to(accelerator.device)
    condition = torch.from_numpy(condition_channels(case.layout, config.diffusion.classes))[None]
    generator = torch.Generator(accelerator.device).manual_seed(seed_from(config.seed, config.diffusion.run, "picture"))
    with accelerator.autocast():
        drawn = sample(
            denoiser,
            condition.to(accelerator.device),
            cosine_betas(config.diffusion.timesteps),
            "dpmsolver++",
            min(_PICTURE_STEPS, config.diffusion.timesteps),
            [generator],
            reference,
        )
    layout = case.layout.transpose(2, 1, 0)
    level = int((layout == Label.NODULE).sum(axis=(1, 2)).argmax()) or len(layout) // 2
    panels = {"reference": clean, "layout": layout, "sample": drawn[0, 0].float().cpu().numpy()}
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    for axes, (title, volume) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        limits = (0, max(Label)) if title == "layout" else (-1, 1)
        axes.imshow(volume[level], cmap="gray", vmin=limits[0], vmax=limits[1], origin="lower")
        axes.set(title=title, xticks=[], yticks=[])
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100)
