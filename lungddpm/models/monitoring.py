"""Monitoring of a training: loss curve, TensorBoard, and grids of samples drawn from the same noise each time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import nn

from lungddpm.config.sections import GeneratorConfig, TrainedSettings
from lungddpm.core import drawing
from lungddpm.core.files import seed_from, write_table
from lungddpm.core.labels import Label
from lungddpm.core.progress import LOG
from lungddpm.core.volume import to_model_range
from lungddpm.models.data import TrainingData, draw_crop, only_nodule
from lungddpm.models.denoiser import condition_channels
from lungddpm.models.recipe import Preview, Recipe

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

HISTORY = ["loss", "learning_rate", "seconds", "memory_mib"]
"""Figures of each optimizer step; `seconds` since the start, without the time between interruptions."""
_GRID_CASES = 2
_NOT_FALLEN = 0.85
"""Of the loss at the start. Of the trainings in docs/explanation/rivals.md, those that learned nothing ended at 0.98 of
it, the others at 0.6 at most."""
_SHARE, _STEPS = 10, 200
"""Start and end are a tenth of the steps each, and too short to judge in fewer steps than these."""
_SAMPLES = ["step", "case_id", "mse"]


class Monitor:
    """Writes the files for monitoring a running training.

    <output>/history.csv          one row per optimizer step
    <output>/tensorboard/         the same for TensorBoard, where that package is installed
    <output>/samples/step-*.png   reference, layout and sample of a few discovery cases
    <output>/samples.csv          mean squared error of each of those samples where it was drawn, on [0, 1]

    Args:
        output: folder of the run.
        step: optimizer steps taken so far; output of later steps is removed.
    """

    def __init__(self, output: Path, step: int):
        self.output = output
        for picture in (output / "samples").glob("step-*.png"):
            if int(picture.stem.removeprefix("step-")) > step:
                picture.unlink()
        self.samples = _samples_until(output / "samples.csv", step)
        self.board = _open_board(output / "tensorboard", step)

    def add_step(self, step: int, figures: Sequence[float], seconds: float) -> None:
        """Record the figures of a step (see `HISTORY`) and its seconds."""
        if self.board is not None:
            for name, value in zip(HISTORY, figures, strict=True):
                self.board.add_scalar(name, value, step)
            self.board.add_scalar("steps_per_second", 1 / max(seconds, 1e-9), step)

    def write_history(self, history: Sequence[Sequence[float]]) -> None:
        """Write the figures of all steps."""
        table = pd.DataFrame(history, columns=HISTORY)
        table.insert(0, "step", range(1, len(table) + 1))
        write_table(self.output / "history.csv", table)
        if self.board is not None:
            self.board.flush()

    def add_samples(self, step: int, case_ids: Sequence[str], mse: Sequence[float], figure: Figure) -> None:
        """Write a grid of samples and their errors against the references."""
        rows = [dict(zip(_SAMPLES, (step, *row), strict=True)) for row in zip(case_ids, mse, strict=True)]
        self.samples += rows
        write_table(self.output / "samples.csv", pd.DataFrame(self.samples, columns=_SAMPLES))
        path = self.output / f"samples/step-{step:08d}.png"
        drawing.save(figure, path, dpi=100)
        LOG.info("%s: mean squared error %.4f", path, np.mean(mse))
        if self.board is not None:
            self.board.add_scalar("mse", float(np.mean(mse)), step)

    def close(self) -> None:
        """Flush TensorBoard."""
        if self.board is not None:
            self.board.close()


def losses_that_did_not_fall(losses: Sequence[float], phases: Sequence[int]) -> list[tuple[float, float]]:
    """Phases in which the network learned next to nothing.

    Args:
        losses: of all steps.
        phases: number of steps of each (see `Steps`); their losses are not comparable.

    Returns:
        Mean loss of the first and of the last tenth of each such phase.
    """
    found, begin = [], 0
    for steps in phases:
        tenth = steps // _SHARE
        of_phase, begin = losses[begin : begin + steps], begin + steps
        if steps >= _STEPS:
            first, last = float(np.mean(of_phase[:tenth])), float(np.mean(of_phase[-tenth:]))
            if last > _NOT_FALLEN * first:
                found.append((first, last))
    return found


def grid_cases(data: TrainingData) -> list[int]:
    """The first few cases with a nodule, or simply the first ones."""
    having = (case for case, layout in enumerate(data.layout) if (layout == Label.NODULE).any())
    return [case for case, _ in zip(having, range(_GRID_CASES), strict=False)] or [0]


def draw_grid(
    network: nn.Module,
    preview: Preview,
    data: TrainingData,
    chosen: Sequence[int],
    config: GeneratorConfig[TrainedSettings],
    recipe: Recipe,
    accelerator: Accelerator,
) -> tuple[list[float], Figure]:
    """Draw cases, each from its own fixed noise, and plot them.

    A network that draws crops gets one, centred and labelled as its training crops are.

    Returns:
        Mean squared error of each sample where it was drawn, in the lungs or the nodule, on [0, 1] over
        `grid.window_hu`; and a figure with reference, layout and sample side by side, axial, at the middle of the
        largest nodule.
    """
    clean, layouts, drawn, errors = [], [], [], []
    for case in chosen:
        seed = seed_from(config.seed, config.run, "grid", data.case_ids[case])
        whole = data.layout[case]
        where: tuple[slice, ...] = ()
        drawn_size = config.settings.drawn_size(config.grid)
        if drawn_size != config.grid.size:
            chooser = torch.Generator().manual_seed(seed)
            where, centre = draw_crop(whole, drawn_size[0], recipe.crop_centres, chooser)
            whole = only_nodule(whole, centre) if recipe.one_nodule else whole
        layout = whole[where]
        reference = to_model_range(data.ct[case][where], config.grid.window_hu)
        channels = condition_channels(layout.transpose(2, 1, 0), config.settings.classes)
        with accelerator.autocast():
            volume = preview(
                network,
                torch.from_numpy(channels)[None].to(accelerator.device),
                torch.from_numpy(reference)[None, None].to(accelerator.device),
                [torch.Generator(accelerator.device).manual_seed(seed)],
            )
        drawn.append(volume[0, 0].float().cpu().numpy())
        clean.append(reference)
        layouts.append(layout)
        difference = (drawn[-1] - reference)[(channels > 0).any(axis=0)] / 2
        errors.append(float(np.square(difference, dtype=np.float64).mean()))
    names = [data.case_ids[case] for case in chosen]
    return errors, _figure(names, clean, layouts, drawn, errors)


def _figure(
    names: Sequence[str],
    clean: Sequence[np.ndarray],
    layouts: Sequence[np.ndarray],
    drawn: Sequence[np.ndarray],
    errors: Sequence[float],
) -> Figure:
    """One row per case; all arrays (D, H, W)."""
    colours = ListedColormap([colour for _, colour in drawing.LABELS.values()])
    grey, coloured = {"cmap": "gray", "vmin": -1, "vmax": 1}, {"cmap": colours, "vmin": -0.5, "vmax": len(Label) - 0.5}
    figure = Figure(figsize=(7.5, 2.6 * len(names)), layout="constrained")
    for row, axes in enumerate(figure.subplots(len(names), 3, squeeze=False)):
        level = int((layouts[row] == Label.NODULE).sum(axis=(1, 2)).argmax()) or len(layouts[row]) // 2
        panels = (("reference", clean[row], grey), ("layout", layouts[row], coloured), ("sample", drawn[row], grey))
        for axis, (title, volume, style) in zip(axes, panels, strict=True):
            picture = drawing.oriented_slice(volume.transpose(2, 1, 0), drawing.PLANES[0], level)
            axis.imshow(picture, interpolation="nearest", **style)
            axis.set(xticks=[], yticks=[], title=title if row == 0 else None)
        axes[0].set_ylabel(names[row])
        axes[2].set_xlabel(f"MSE {errors[row]:.4f}")
    return figure


def _samples_until(path: Path, step: int) -> list[dict]:
    """The rows of an earlier part of this training."""
    if step == 0 or not path.exists():
        return []
    table = pd.read_csv(path, dtype={"case_id": str})
    return table[table["step"] <= step].to_dict("records")


def _open_board(folder: Path, step: int) -> SummaryWriter | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        LOG.info("TensorBoard is not installed (pip install tensorboard): no event files, history.csv has the figures")
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)
