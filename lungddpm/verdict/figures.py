"""The figures of the verdict: each a function from data to a matplotlib figure.

Colours are told apart with any colour vision; shape or position always says the same, so
that a grey print loses nothing.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from lungddpm.drawing import (
    LABELS,
    LUNG_WINDOW_HU,
    PLANES,
    STYLE,
    Plane,
    largest_nodule,
    mark_sides,
    oriented_slice,
    size_mm,
)  # fmt: skip
from lungddpm.layouts import Label
from lungddpm.verdict.statistics import signed
from lungddpm.volume import Volume

_OUTCOMES = {"better": ("#0072B2", "s"), "worse": ("#D55E00", "D"), "no difference shown": ("#555555", "o")}
_MANY_CASES = 60
_CLOSE_UP_MM = 80.0


def forest_plot(verdict: pd.DataFrame, measures: dict[str, str], confidence: float) -> Figure:
    """Differences to `real` with their intervals, one panel a measure, one line an arm; numbers at the right.

    Args:
        verdict: rows of `verdict.csv` (baseline rows are left out).
        measures: column -> its name in prose, in the order of the panels.
        confidence: level of the intervals, for the axis label.
    """
    compared = verdict[verdict["difference"].notna()]
    arms = list(dict.fromkeys(compared["arm"]))
    if not arms:
        return _empty_figure("no arm could be compared")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(measures), 1, figsize=(7.2, len(measures) * (1.0 + 0.32 * len(arms))), squeeze=False, sharex=True,
            layout="constrained",
        )  # fmt: skip
        for axis, (measure, prose) in zip(axes[:, 0], measures.items(), strict=True):
            rows = compared[compared["metric"] == measure].set_index("arm")
            axis.axvline(0, color="#777777", linewidth=1, zorder=1)
            for line, arm in enumerate(arms):
                row = rows.loc[arm]
                colour, marker = _OUTCOMES[row["verdict"]]
                filled = colour if row["verdict"] != "no difference shown" else "white"
                axis.plot([row["ci_low"], row["ci_high"]], [line, line], color=colour, linewidth=2, zorder=2)
                axis.plot(row["difference"], line, marker, color=colour, markerfacecolor=filled, markersize=7, zorder=3)
                interval = "" if np.isnan(row["ci_low"]) else f"  ({signed(row['ci_low'])} to {signed(row['ci_high'])})"
                axis.annotate(
                    signed(row["difference"]) + interval,
                    (1.02, line), xycoords=("axes fraction", "data"), va="center", fontsize=8.5,
                )  # fmt: skip
            axis.set(ylim=(len(arms) - 0.4, -0.6), yticks=range(len(arms)), yticklabels=arms)
            axis.set_title(f"{prose[0].upper()}{prose[1:]}", loc="left")
            axis.tick_params(axis="y", length=0)
            axis.spines["left"].set_visible(False)
            axis.grid(axis="x", color="#eeeeee")
        axes[-1, 0].set_xlabel(f"difference to real, with {100 * confidence:g} % CI  (left: worse, right: better)")
    return figure


def case_plot(cases: pd.DataFrame, measure: str, prose: str) -> Figure:
    """Every case's score in every arm (mean over replicates), lines joining a case, bars the arms' means.

    Args:
        cases: rows of `cases.csv`.
        measure: its column.
        prose: its name.
    """
    scores = cases.pivot_table(index="case_id", columns="arm", values=measure, sort=False, dropna=False).dropna()
    arms = list(dict.fromkeys(cases["arm"]))
    if scores.empty:
        return _empty_figure(f"no test case has a {prose}")
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7.2, 1.1 + 0.55 * len(arms)), layout="constrained")
        few = len(scores) <= _MANY_CASES
        lines = np.arange(len(arms))
        for _, case in scores[arms].iterrows():
            axis.plot(case, lines, color="#cccccc", linewidth=0.7 if few else 0.3, alpha=1 if few else 0.4, zorder=1)
        for line, arm in enumerate(arms):
            axis.plot(
                scores[arm], np.full(len(scores), line), "o", markersize=5 if few else 3, zorder=2,
                color="#0072B2", markeredgecolor="white", markeredgewidth=0.5, alpha=0.85,
            )  # fmt: skip
            mean = scores[arm].mean()
            axis.plot([mean, mean], [line - 0.28, line + 0.28], color="black", linewidth=2.5, zorder=3)
            axis.annotate(f"{mean:.3f}", (1.02, line), xycoords=("axes fraction", "data"), va="center")
        axis.annotate(
            "mean", (1.02, -0.6), xycoords=("axes fraction", "data"), va="center", fontsize=8, color="#555555"
        )
        axis.set(xlim=(-0.02, 1.02), ylim=(len(arms) - 0.5, -0.6), yticks=lines, yticklabels=arms)
        axis.set_xlabel(f"{prose} of each test case (n = {len(scores)}), mean over replicates; bar: mean over cases")
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
        axis.grid(axis="x", color="#eeeeee")
    return figure


def montage(reference: Volume, layout: Volume, synthetic: Volume, title: str) -> Figure:
    """Reference, layout, synthetic CT and their difference: three planes through the largest nodule, and a close-up.

    Args:
        reference: CT in HU, RAS+.
        layout: labels, same grid.
        synthetic: CT in HU, same grid.
        title: what is shown.
    """
    centre = largest_nodule(layout)
    difference = synthetic.array.astype(np.float32) - reference.array
    made = np.abs(difference[layout.array != Label.BACKGROUND])
    limit = max(100, 100 * math.ceil(np.quantile(made, 0.98) / 100)) if made.size else 100
    lung_window = {"cmap": "gray", "vmin": LUNG_WINDOW_HU[0], "vmax": LUNG_WINDOW_HU[1]}
    colours = ListedColormap([colour for _, colour in LABELS.values()])
    columns = (
        ("reference CT", reference.array, lung_window),
        ("layout", layout.array, {"cmap": colours, "vmin": -0.5, "vmax": len(LABELS) - 0.5}),
        ("synthetic CT", synthetic.array, lung_window),
        ("synthetic − reference", difference, {"cmap": "PuOr_r", "vmin": -limit, "vmax": limit}),
    )
    views = [(plane.name, plane, False) for plane in PLANES] + [("axial, nodule", PLANES[0], True)]
    sizes_mm = [size_mm(layout, plane) for _, plane, _ in views]
    width_mm = max(width for width, _ in sizes_mm)
    heights = [1.0 if close else height / width_mm for (_, _, close), (_, height) in zip(views, sizes_mm, strict=True)]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(views), len(columns), figsize=(8.6, 1.0 + 1.95 * sum(heights)), layout="constrained",
            gridspec_kw={"height_ratios": heights},
        )  # fmt: skip
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02)
        for row, (view, plane, close) in enumerate(views):
            width, height = sizes_mm[row]
            box = _box_around(centre, layout, plane)
            for column, (_, array, style) in enumerate(columns):
                axis = axes[row, column]
                drawn = axis.imshow(
                    oriented_slice(array, plane, centre[plane.axis]), interpolation="nearest",
                    extent=(0, width, 0, height), **style,
                )  # fmt: skip
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
                if close:
                    axis.set(xlim=(box[0], box[1]), ylim=(box[2], box[3]))
                elif plane is PLANES[0] and array is not difference:
                    corner, edges = (box[0], box[2]), (box[1] - box[0], box[3] - box[2])
                    axis.add_patch(Rectangle(corner, *edges, fill=False, edgecolor="white", linewidth=0.8))
            axes[row, 0].set_ylabel(view)
            if not close:
                mark_sides(axes[row, 0], plane)
        for axis, (name, _, _) in zip(axes[0], columns, strict=True):
            axis.set_title(name, fontsize=9.5)
        figure.colorbar(drawn, ax=axes[:, -1], label="difference (HU)", shrink=0.5, aspect=30, extend="both")
        handles = [Patch(facecolor=colour, label=name) for label, (name, colour) in LABELS.items() if label]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
        figure.suptitle(title, fontsize=9.5)
    return figure


def training_curve(history: pd.DataFrame) -> Figure:
    """The denoiser's training loss over optimizer steps, raw and as a running mean (log scale).

    Args:
        history: rows of `history.csv` with `step` and `loss`.
    """
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7.2, 2.6), layout="constrained")
        window = max(1, len(history) // 50)
        smooth = history["loss"].rolling(window, min_periods=1).mean()
        axis.plot(history["step"], history["loss"], color="#bbbbbb", linewidth=0.8, label="as recorded")
        axis.plot(history["step"], smooth, color="#0072B2", linewidth=1.8, label=f"mean of the last {window}")
        axis.set(yscale="log", xlabel="optimizer step", ylabel="training loss")
        axis.grid(color="#eeeeee")
        axis.legend(frameon=False)
    return figure


def _box_around(centre: tuple[int, int, int], volume: Volume, plane: Plane) -> tuple[float, float, float, float]:
    """Left, right, bottom, top (mm on the page) of the close-up, kept within the picture."""
    edges = []
    for axis, extent_mm in zip((axis for axis in range(3) if axis != plane.axis), size_mm(volume, plane), strict=True):
        half = min(_CLOSE_UP_MM, extent_mm) / 2
        middle = (centre[axis] + 0.5) * volume.spacing_mm[axis]
        if not edges:  # the horizontal axis runs against the page
            middle = extent_mm - middle
        middle = min(max(middle, half), extent_mm - half)
        edges += [middle - half, middle + half]
    return tuple(edges)


def _empty_figure(why: str) -> Figure:
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(7.2, 1.0))
        figure.text(0.5, 0.5, why, ha="center", va="center", color="#555555")
    return figure
