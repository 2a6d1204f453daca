"""The figures of the verdict: each is a function from data to a matplotlib figure.

The palette is safe for colour-blind readers, and shape or position always carries the same information, so nothing is
lost in greyscale print.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import NullLocator

from lungddpm.core.arms import Arm, is_baseline
from lungddpm.core.drawing import (
    LABELS,
    LUNG_WINDOW_HU,
    PLANES,
    STYLE,
    Plane,
    difference_limit,
    largest_nodule,
    mark_sides,
    oriented_slice,
    size_mm,
)
from lungddpm.core.text import bound, format_number, signed
from lungddpm.core.volume import Volume
from lungddpm.evaluation.froc import BAND_COLUMNS, RATES
from lungddpm.quality.feature_distances import MEDICALNET
from lungddpm.quality.image_quality import (
    CONSTANT_LUNGS,
    COPIES,
    LUNGS,
    OTHER_PATIENTS,
    SEAM,
    SEAM_RATIO,
    SHIFTED,
    SYNTHETIC,
    WHOLE,
)
from lungddpm.quality.label_fidelity import REAL_CT

_OUTCOMES = {"better": ("#0072B2", "s"), "worse": ("#D55E00", "D")}
_NO_CLAIM = ("#555555", "o")
_FLOORS = [COPIES, CONSTANT_LUNGS, OTHER_PATIENTS]
_OWN_FLOOR: dict[str, Any] = {
    "color": "black",
    "marker": "|",
    "markersize": 15,
    "markeredgewidth": 1.8,
    "linestyle": "",
}
_GENERATOR_BAR: dict[str, Any] = {"color": "#0072B2"}
_FLOOR_BAR: dict[str, Any] = {"facecolor": "#e2e2e2", "edgecolor": "#8a8a8a", "hatch": "//"}
_LOWER, _HIGHER, _AT_ONE = "lower: closer", "higher: closer", "1: like the reference"
_QUALITY_PANELS = {
    ("mse", LUNGS): ("MSE, lungs", _LOWER),
    ("ms_ssim", LUNGS): ("MS-SSIM, lungs", _HIGHER),
    (SEAM_RATIO, SEAM): ("step at the lungs' border", _AT_ONE),
    ("fid", WHOLE): ("FID, whole volume", _LOWER),
    ("fid", LUNGS): ("FID, lungs", _LOWER),
    ("mmd_squared", LUNGS): ("MMD², lungs", _LOWER),
}
"""Metric and region -> title, and which direction is better."""
_FIDELITY_PANELS = {"dice": "Dice against the layout", "recall": "Share of lesions found"}
_COSTS = {
    "function_evaluations": "function evaluations",
    "seconds_per_volume": "seconds per volume",
    "memory_mib": "memory, MiB",
}
_WORTH = {
    "label_fidelity_dice": ("label fidelity,\nDice", "higher"),
    "nodule_hu_difference": ("nodule HU\nvs reference", "near 0"),
    "fid_lungs": ("FID, lungs", "lower"),
    "kid_lungs": ("KID, lungs", "lower"),
}
"""Column of `quality_and_cost.csv` -> label, and which direction is better."""
_COLOURS, _SHAPES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#8a8a8a"), "osD^vPX<"
_MARKS = [(colour, _SHAPES[(n + turn) % 8]) for turn in range(8) for n, colour in enumerate(_COLOURS)]
"""Colours and shapes of points: each pair is used once, and neighbours differ in both."""
_BY_NETWORK = ("fid", "mmd_squared")
_LINES = (("#0072B2", "-"), ("#E69F00", "--"), ("#009E73", "-."), ("#CC79A7", ":"))
"""Colour and dashes of lines in one panel."""
_MANY_CASES = 60
_CLOSE_UP_MM = 80.0
_TILES_ABREAST = 5


def forest_plot(verdict: pd.DataFrame, measures: dict[str, str], confidence: float, narrow: bool = False) -> Figure:
    """Differences from the real cases alone with their intervals: a panel per measure, a line per arm, numbers on the
    right.

    Args:
        verdict: rows of `verdict.csv` (baseline rows are left out).
        measures: column -> display name, in the order of the panels.
        confidence: level of the intervals, for the axis label.
        narrow: for phone screens: names and numbers above the lines instead of beside them.
    """
    compared = verdict[verdict["difference"].notna()]
    arms = list(dict.fromkeys(compared["arm"]))
    if not arms:
        return _empty_figure("no arm could be compared", 3.6 if narrow else 7.2)
    width, per_arm = (3.6, 0.62) if narrow else (7.2, 0.32)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(measures), 1, figsize=(width, len(measures) * (1.0 + per_arm * len(arms))), squeeze=False, sharex=True,
            layout="constrained",
        )  # fmt: skip
        for axis, (measure, prose) in zip(axes[:, 0], measures.items(), strict=True):
            rows = compared[compared["metric"] == measure].set_index("arm")
            axis.axvline(0, color="#777777", linewidth=1, zorder=1)
            for line, arm in enumerate(arms):
                row = rows.loc[arm]
                colour, marker, filled = _outcome_style(row["verdict"])
                axis.plot([row["ci_low"], row["ci_high"]], [line, line], color=colour, linewidth=2, zorder=2)
                axis.plot(row["difference"], line, marker, color=colour, markerfacecolor=filled, markersize=7, zorder=3)
                interval = "" if np.isnan(row["ci_low"]) else f"  ({bound(row['ci_low'])} to {bound(row['ci_high'])})"
                numbers = signed(row["difference"]) + interval
                if narrow:
                    axis.annotate(
                        f"{arm}\n{numbers}", (0, line - 0.2), xycoords=("axes fraction", "data"), va="bottom",
                        fontsize=8.5, linespacing=1.25, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
                    )  # fmt: skip
                else:
                    axis.annotate(numbers, (1.02, line), xycoords=("axes fraction", "data"), va="center", fontsize=8.5)
            axis.set(ylim=(len(arms) - 0.4, -0.9 if narrow else -0.6), yticks=range(len(arms)))
            axis.set_yticklabels([""] * len(arms) if narrow else arms)
            axis.set_title(f"{prose[0].upper()}{prose[1:]}", loc="left")
            axis.tick_params(axis="y", length=0)
            axis.spines["left"].set_visible(False)
            axis.grid(axis="x", color="#eeeeee")
        ends = ("\n" if narrow else "  ") + "(left: worse, right: better)"
        baseline = "real" if compared["baseline"].nunique() == 1 else "the same real cases alone"
        axes[-1, 0].set_xlabel(f"difference from {baseline}, with {100 * confidence:g} % CI{ends}")
    return figure


def case_plot(cases: pd.DataFrame, measure: str, prose: str) -> Figure:
    """Every case's score in every arm (mean over replicates): a line per arm, bars at the arms' means.

    Args:
        cases: rows of `cases.csv`.
        measure: its column.
        prose: its display name.
    """
    scores = cases.pivot_table(index="case_id", columns="arm", values=measure, sort=False, dropna=False).dropna()
    scores = scores[list(dict.fromkeys(cases["arm"]))]
    if scores.empty:
        return _empty_figure(f"no test case has a {prose}")
    with plt.rc_context(STYLE):
        figure, axis = _strips({arm: scores[arm].to_numpy() for arm in scores}, "{:.3f}".format)
        axis.set(xlim=(-0.02, 1.02))
        axis.set_xlabel(f"{prose} of each test case (n = {len(scores)}), mean over replicates; bar: mean over cases")
    return figure


def run_plot(cases: pd.DataFrame, measure: str, prose: str) -> Figure:
    """Every training run's mean score over cases: a line per arm, bars at the arms' means.

    Args:
        cases: rows of `cases.csv`.
        measure: its column.
        prose: its display name.
    """
    scores = cases.pivot(index="case_id", columns=["arm", "replicate"], values=measure).dropna()
    if scores.empty:
        return _empty_figure(f"no test case has a {prose}")
    runs = scores.mean()
    by_arm = {arm: runs[arm].to_numpy() for arm in dict.fromkeys(cases["arm"])}
    with plt.rc_context(STYLE):
        figure, axis = _strips(by_arm, "{:.3f}".format)
        axis.set_xlabel(f"mean {prose} of each training run; bar: mean over runs")
    return figure


def paired_plot(cases: pd.DataFrame, measure: str, prose: str) -> Figure:
    """Every case's difference from its own score under the arm's real cases alone in the same replicate (means over
    replicates): a line per arm, bars at the means.

    Args:
        cases: rows of `cases.csv`.
        measure: its column.
        prose: its display name.
    """
    baselines = {arm: Arm.parse(arm).baseline.name for arm in dict.fromkeys(cases["arm"])}
    scores = cases.pivot(index=["case_id", "replicate"], columns="arm", values=measure)
    differences = {
        arm: (scores[arm] - scores[baseline]).groupby("case_id").mean().dropna().to_numpy()
        for arm, baseline in baselines.items()
        if arm != baseline and baseline in scores
    }
    differences = {arm: of_cases for arm, of_cases in differences.items() if of_cases.size}
    if not differences:
        return _empty_figure("no test case was scored both in real and in another arm")
    with plt.rc_context(STYLE):
        figure, axis = _strips(differences, signed)
        axis.axvline(0, color="#777777", linewidth=1, zorder=1)
        axis.set_xlabel(
            f"{prose} of each test case minus its score under the same real cases alone  (left: worse, right: better)"
        )
    return figure


def froc_plot(band: pd.DataFrame, confidence: float) -> Figure:
    """Sensitivity over false positives per scan with bands: a panel per arm, the same real cases alone dashed.

    Args:
        band: rows of `froc_band.csv`.
        confidence: level of the bands, for the caption.
    """
    curves = dict(iter(band.groupby("arm", sort=False)))
    if not curves:
        return _empty_figure("no lesion has a score")
    arms = [arm for arm in curves if not is_baseline(arm)] or list(curves)
    with plt.rc_context(STYLE):
        figure, panels = _panels(len(arms))
        for axis, arm in zip(panels, arms, strict=True):
            for name, colour, dashes in ((Arm.parse(arm).baseline.name, "#777777", "--"), (arm, "#0072B2", "-")):
                if name in curves:
                    _, rates, mean, low, high = (curves[name][column] for column in BAND_COLUMNS)
                    axis.fill_between(rates, low, high, color=colour, alpha=0.2, linewidth=0)
                    axis.plot(rates, mean, dashes, color=colour, linewidth=1.8)
            axis.set_xscale("log", base=2)
            axis.set(
                xlim=(RATES[0], RATES[-1]), ylim=(0, 1), xticks=RATES, xticklabels=[*map(str, map(Fraction, RATES))]
            )
            axis.tick_params(axis="x", labelsize=8)
            axis.set_title(arm, loc="left", fontsize=9)
            axis.grid(color="#eeeeee")
        handles = [
            Line2D([], [], color="#0072B2", label="arm"),
            Line2D([], [], color="#777777", linestyle="--", label="the same real cases alone"),
        ]
        panels[0].legend(handles=handles, frameon=False, loc="lower right")
        figure.supxlabel(f"false positives per scan  (bands: {100 * confidence:g} %)", fontsize="medium")
        figure.supylabel("sensitivity for nodules", fontsize="medium")
    return figure


def montage(reference: Volume, layout: Volume, synthetic: Volume, title: str) -> Figure:
    """Reference, layout, synthetic CT and their difference: three planes through the largest nodule, and a close-up.

    Args:
        reference: CT in HU, RAS+.
        layout: labels, same grid.
        synthetic: CT in HU, same grid.
        title: of the figure.
    """
    centre = largest_nodule(layout)
    difference = synthetic.array.astype(np.float32) - reference.array
    limit = difference_limit(difference, layout.array)
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


def side_by_side(reference: Volume, layout: Volume, drawn: Mapping[str, Volume]) -> Figure:
    """The same sample by several generators: axial through the largest nodule, and a close-up below each.

    Args:
        reference: CT in HU, RAS+.
        layout: labels, same grid; all generators drew it.
        drawn: CT in HU by generator, same grid.
    """
    centre, plane = largest_nodule(layout), PLANES[0]
    gray = {"cmap": "gray", "vmin": LUNG_WINDOW_HU[0], "vmax": LUNG_WINDOW_HU[1]}
    colours = ListedColormap([colour for _, colour in LABELS.values()])
    tiles = [
        ("reference CT", reference.array, gray),
        ("layout", layout.array, {"cmap": colours, "vmin": -0.5, "vmax": len(LABELS) - 0.5}),
        *((name, volume.array, gray) for name, volume in drawn.items()),
    ]
    (width, height), box = size_mm(layout, plane), _box_around(centre, layout, plane)
    n_rows = math.ceil(len(tiles) / _TILES_ABREAST)
    ratios = [height / width, 1.0] * n_rows
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            2 * n_rows, _TILES_ABREAST, figsize=(8.6, 0.4 + 1.7 * sum(ratios)), layout="constrained",
            gridspec_kw={"height_ratios": ratios}, squeeze=False,
        )  # fmt: skip
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02)
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[], visible=False)
            axis.spines[:].set_visible(False)
        for n, (name, array, style) in enumerate(tiles):
            row, column = divmod(n, _TILES_ABREAST)
            whole, close = axes[2 * row : 2 * row + 2, column]
            for axis in (whole, close):
                axis.set(visible=True)
                picture = oriented_slice(array, plane, centre[plane.axis])
                axis.imshow(picture, interpolation="nearest", extent=(0, width, 0, height), **style)
            close.set(xlim=box[:2], ylim=box[2:])
            corner, edges = (box[0], box[2]), (box[1] - box[0], box[3] - box[2])
            whole.add_patch(Rectangle(corner, *edges, fill=False, edgecolor="white", linewidth=0.8))
            whole.set_title(name, fontsize=8.5)
        mark_sides(axes[0, 0], plane)
        handles = [Patch(facecolor=colour, label=name) for label, (name, colour) in LABELS.items() if label]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def dose_response_plot(verdict: pd.DataFrame, band: pd.DataFrame, prose: str, confidence: float) -> Figure:
    """Difference from the real cases alone over the dose, a panel per generator and number of real cases: the arms with
    their intervals, the line with its band.

    Args:
        verdict: rows of `verdict.csv` of one measure.
        band: rows of `dose_response_band.csv` of that measure.
        prose: its display name.
        confidence: level of intervals and band.
    """
    several = band["baseline"].nunique() > 1
    lines = dict(iter(band.groupby(["generator", "baseline"], sort=False)))
    with plt.rc_context(STYLE):
        figure, panels = _panels(len(lines))
        for axis, ((generator, baseline), line) in zip(panels, lines.items(), strict=False):
            axis.fill_between(line["dose"], line["ci_low"], line["ci_high"], color="#d9d9d9", linewidth=0)
            axis.plot(line["dose"], line["fitted"], color="black", linewidth=1.2)
            axis.axhline(0, color="#777777", linewidth=1, zorder=1)
            of_baseline = verdict[verdict["difference"].notna() & (verdict["baseline"] == baseline)]
            for row in of_baseline.to_dict("records"):
                arm = Arm.parse(row["arm"])
                if not arm.real or arm.filtered or arm.generator != generator:
                    continue
                colour, marker, filled = _outcome_style(row["verdict"])
                axis.plot([arm.dose, arm.dose], [row["ci_low"], row["ci_high"]], color=colour, linewidth=2)
                axis.plot(arm.dose, row["difference"], marker, color=colour, markerfacecolor=filled, markersize=7)
            axis.set_title(f"{baseline}+{generator}" if several else generator, loc="left", fontsize=9)
            axis.grid(axis="y", color="#eeeeee")
        figure.supxlabel("dose: synthetic cases as a multiple of the real training cases", fontsize=9)
        figure.supylabel(f"difference from real, {prose}\n({100 * confidence:g} % CI)", fontsize=9)
    return figure


def real_cases_plot(verdict: pd.DataFrame, prose: str, confidence: float) -> Figure:
    """Difference from the real cases alone over their number: a panel per generator, a line with a band per dose.

    Args:
        verdict: rows of `verdict.csv` of one measure.
        prose: its display name.
        confidence: level of the bands.
    """
    compared = verdict[verdict["difference"].notna()].sort_values("real_cases")
    if compared.empty:
        return _empty_figure("no arm could be compared")
    recipes = compared["arm"].map(lambda name: Arm.parse(name).recipe)
    lines = {recipe: compared[recipes == recipe] for recipe in dict.fromkeys(recipes)}
    by_panel: dict[str, list[Arm]] = {}
    for recipe in sorted(lines, key=lambda recipe: recipe.dose):
        by_panel.setdefault(replace(recipe, dose=1.0).name.partition("@")[0], []).append(recipe)
    numbers = sorted(set(compared["real_cases"]))
    with plt.rc_context(STYLE):
        figure, panels = _panels(len(by_panel))
        for axis, (title, recipes_of_panel) in zip(panels, by_panel.items(), strict=True):
            axis.axhline(0, color="#777777", linewidth=1, zorder=1)
            for recipe, (colour, dashes) in zip(recipes_of_panel, itertools.cycle(_LINES)):
                rows = lines[recipe]
                axis.fill_between(
                    rows["real_cases"], rows["ci_low"], rows["ci_high"], color=colour, alpha=0.15, linewidth=0
                )
                label = f"{recipe.dose:g} x" if recipe.generator else None
                axis.plot(rows["real_cases"], rows["difference"], dashes, color=colour, linewidth=1.5, label=label)
                for row in rows.to_dict("records"):
                    _, marker, filled = _outcome_style(row["verdict"])
                    face = colour if filled != "white" else "white"
                    axis.plot(
                        row["real_cases"], row["difference"], marker, color=colour, markerfacecolor=face, markersize=6
                    )
            # The numbers usually double from one to the next.
            axis.set_xscale("log", base=2)
            axis.set_xticks(numbers, [str(number) for number in numbers])
            axis.xaxis.set_minor_locator(NullLocator())
            axis.set_title(title, loc="left", fontsize=9)
            axis.grid(axis="y", color="#eeeeee")
            if len(recipes_of_panel) > 1:
                axis.legend(frameon=False, fontsize=7.5, title="dose", title_fontsize=7.5)
        figure.supxlabel("real training cases", fontsize=9)
        figure.supylabel(f"difference from the same real cases alone,\n{prose} ({100 * confidence:g} % CI)", fontsize=9)
    return figure


def segmenter_curves(curves: pd.DataFrame, measure: str, title: str) -> Figure:
    """Training curves of the segmenter: a panel per arm, a line per replicate; in grey the mean of the arm's real cases
    alone, shaded the last third of the steps.

    Args:
        curves: rows of `training_curves.csv`.
        measure: its column.
        title: of the vertical axis.
    """
    arms, end = list(dict.fromkeys(curves["arm"])), curves["step"].max()
    with plt.rc_context(STYLE):
        figure, panels = _panels(len(arms))
        for axis, arm in zip(panels, arms, strict=False):
            axis.axvspan(end * 2 / 3, end, color="#f3f3f3", zorder=0)
            of_baseline = curves[curves["arm"] == Arm.parse(arm).baseline.name].groupby("step")[measure].mean()
            axis.plot(of_baseline.index, of_baseline, color="#bbbbbb", linewidth=3)
            for _, run in curves[curves["arm"] == arm].groupby("replicate"):
                axis.plot(run["step"], run[measure], color="#0072B2", linewidth=1)
            axis.set_title(arm, loc="left", fontsize=9)
            axis.grid(color="#eeeeee")
        figure.supxlabel("optimizer step", fontsize=9)
        figure.supylabel(title, fontsize=9)
    return figure


def denoiser_curve(history: pd.DataFrame) -> Figure:
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


def quality_bars(quality: pd.DataFrame) -> Figure:
    """Image quality of every generator beside the floors: six panels, one per measure and region.

    Args:
        quality: rows of `image_quality.csv`. Floors differ with the generators' layouts; their means are shown.
            References shifted to a generator's brightness are its own floor, a line across its bar.
    """
    generators = list(dict.fromkeys(quality.loc[quality["image"] == SYNTHETIC, "generator"]))
    names = [*generators, *_FLOORS]
    trained = quality["extractor"].isin(["", MEDICALNET]).all()
    if not generators:
        return _empty_figure("no sample was measured")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 3, figsize=(7.2, 1.9 + 0.44 * len(names)), sharey=True, layout="constrained")
        for axis, ((metric, region), (title, better)) in zip(axes.flat, _QUALITY_PANELS.items(), strict=True):
            rows = quality[(quality["metric"] == metric) & (quality["region"] == region)]
            made = rows[rows["image"] == SYNTHETIC].set_index("generator")[["mean", "sd"]].reindex(generators)
            floors = rows.groupby("image")["mean"].mean().reindex(_FLOORS)
            own_floor = rows[rows["image"] == SHIFTED].set_index("generator")["mean"].reindex(generators)
            axis.barh(generators, made["mean"], xerr=made["sd"].fillna(0), **_GENERATOR_BAR)
            axis.plot(own_floor, generators, **_OWN_FLOOR)
            axis.barh(_FLOORS, floors, **_FLOOR_BAR)
            axis.axvline(better == _AT_ONE, color="#777777", linewidth=1)
            for place, value in enumerate([*made["mean"], *floors]):
                text = format_number(value, ".3g") or "not measured"
                axis.annotate(
                    text, (1.0, place), xycoords=("axes fraction", "data"), ha="right", va="center", fontsize=7.5
                )
            network = "" if metric not in _BY_NETWORK or trained else " (random weights)"
            axis.set_title(title, loc="left", fontsize=8.5)
            axis.set_xlabel(better + network, fontsize=8)
            axis.set_xmargin(0.35)
            if made["mean"].isna().all() and floors.isna().all():
                axis.set(xlim=(0, 1), xticks=[])
            axis.tick_params(axis="x", labelsize=7.5)
            axis.tick_params(axis="y", length=0)
            axis.spines["left"].set_visible(False)
        axes[0, 0].invert_yaxis()
        handles = [
            Patch(label="generator (line: sd over samples)", **_GENERATOR_BAR),
            Line2D([], [], label="its floor: references of its brightness", **_OWN_FLOOR),
            Patch(label="floor: made without a generator", **_FLOOR_BAR),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def fidelity_plot(runs: pd.DataFrame, table: pd.DataFrame) -> Figure:
    """Dice and share of lesions found in the CT of every generator: a dot per replicate, the ceiling dashed.

    Args:
        runs: rows of `label_fidelity_runs.csv`.
        table: rows of `label_fidelity.csv`, whose means are drawn: replicates judge different cases, so the mean of the
            dots is another one.
    """
    names = list(dict.fromkeys(runs["generator"]))
    means = table.rename(columns={"dice_mean": "dice"}).set_index("generator")
    lines = sorted(names, key=lambda name: name != REAL_CT)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(7.2, 1.0 + 0.34 * len(lines)), sharey=True, layout="constrained")
        for axis, (measure, title) in zip(axes, _FIDELITY_PANELS.items(), strict=True):
            axis.axvline(means.loc[REAL_CT, measure], color="#777777", linestyle="--", linewidth=1, zorder=1)
            for line, name in enumerate(lines):
                found = runs.loc[runs["generator"] == name, measure].dropna()
                colour = "#777777" if name == REAL_CT else "#0072B2"
                axis.plot(
                    found, np.full(len(found), line), "o", markersize=5, color=colour, markeredgecolor="white",
                    markeredgewidth=0.5, alpha=0.85, zorder=2,
                )  # fmt: skip
                mean = float(means.loc[name, measure])
                axis.plot([mean] * 2, [line - 0.3, line + 0.3], color="black", linewidth=2.5, zorder=3)
                axis.annotate(
                    format_number(mean, ".2f"), (1.02, line), xycoords=("axes fraction", "data"),
                    va="center", fontsize=8.5,
                )  # fmt: skip
            axis.set(xlim=(-0.02, 1.02), ylim=(len(lines) - 0.5, -0.6), yticks=range(len(lines)), yticklabels=lines)
            axis.set_title(title, loc="left", fontsize=9)
            axis.tick_params(axis="y", length=0)
            axis.spines["left"].set_visible(False)
            axis.grid(axis="x", color="#eeeeee")
        figure.supxlabel(
            "dot: one replicate of real; bar: mean over cases (Dice), lesions (share); dashed: ceiling (real CT)",
            fontsize=9,
        )
    return figure


def cost_plot(costs: pd.DataFrame) -> Figure:
    """Quality of the generators over the cost per volume: a row per measure, a column per cost, a mark per generator;
    dashed: real CT.

    Args:
        costs: rows of `quality_and_cost.csv`; for several runs, with distinct names.
    """
    real = costs[costs["generator"] == REAL_CT]
    made = costs[(costs["generator"] != REAL_CT) & costs[list(_COSTS)].notna().any(axis=1)]
    worth = {column: text for column, text in _WORTH.items() if made[column].notna().any()}
    if not worth:
        return _empty_figure("no generator has both cost and quality measured")
    marks = dict(zip(made["generator"], itertools.cycle(_MARKS)))
    legend_rows = math.ceil(len(marks) / 3)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(worth), len(_COSTS), figsize=(7.2, 0.6 + 1.45 * len(worth) + 0.22 * legend_rows), squeeze=False,
            sharex="col", sharey="row", layout="constrained",
        )  # fmt: skip
        for line, (measure, (title, better)) in zip(axes, worth.items(), strict=True):
            for axis, cost in zip(line, _COSTS, strict=True):
                for at in real[measure].dropna() if measure != "nodule_hu_difference" else (0,):
                    axis.axhline(at, color="#777777", linestyle="--", linewidth=1, zorder=1)
                for row in made.to_dict("records"):
                    colour, marker = marks[row["generator"]]
                    spread = row["kid_lungs_standard_error"] if measure == "kid_lungs" else math.nan
                    axis.errorbar(
                        row[cost], row[measure], None if math.isnan(spread) else spread, fmt=marker, color=colour,
                        markersize=6.5, markeredgecolor="white", markeredgewidth=0.5, elinewidth=1, zorder=2,
                    )  # fmt: skip
                axis.grid(color="#eeeeee")
                axis.tick_params(labelsize=7.5)
            line[0].set_ylabel(f"{title}\n({better}: better)", fontsize=8)
            line[0].margins(y=0.15)
        for axis, (cost, title) in zip(axes[-1], _COSTS.items(), strict=True):
            most = made[cost].max()
            if cost == "memory_mib":
                axis.set_xlim(0, 1.15 * most if most > 0 else 1)
            else:
                # Generators without a network make no evaluations, and may take no measurable time.
                axis.set_xscale("symlog", linthresh=1)
                axis.set_xlim(-0.4, 3 * most if most > 0 else 1)
            axis.xaxis.set_major_formatter("{x:g}")
            axis.set_xlabel(title, fontsize=8)
        handles = [
            Line2D([], [], color=colour, marker=marker, linestyle="", label=name)
            for name, (colour, marker) in marks.items()
        ]
        handles.append(Line2D([], [], color="#777777", linestyle="--", linewidth=1, label="real CT"))
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def _strips(values: dict[str, np.ndarray], form: Callable[[float], str]) -> tuple[Figure, plt.Axes]:
    """A line per name, a dot per value, a bar at the mean, and the formatted mean on the right."""
    figure, axis = plt.subplots(figsize=(7.2, 0.9 + 0.38 * len(values)), layout="constrained")
    for line, of_cases in enumerate(values.values()):
        # Golden-ratio steps spread neighbouring ranks apart, and are the same in every drawing.
        height = line + 0.5 * ((np.arange(of_cases.size) * 0.618) % 1 - 0.5)
        axis.plot(
            np.sort(of_cases), height, "o", markersize=5 if of_cases.size <= _MANY_CASES else 3, zorder=2,
            color="#0072B2", markeredgecolor="white", markeredgewidth=0.5, alpha=0.85,
        )  # fmt: skip
        axis.plot([of_cases.mean()] * 2, [line - 0.36, line + 0.36], color="black", linewidth=2.5, zorder=3)
        axis.annotate(
            form(of_cases.mean()), (1.02, line), xycoords=("axes fraction", "data"), va="center", fontsize=8.5
        )
    axis.annotate("mean", (1.02, -0.75), xycoords=("axes fraction", "data"), va="center", fontsize=8, color="#555555")
    axis.set(ylim=(len(values) - 0.5, -0.85), yticks=range(len(values)), yticklabels=list(values))
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.grid(axis="x", color="#eeeeee")
    return figure, axis


def _outcome_style(verdict: str) -> tuple[str, str, str]:
    """Colour, marker and fill."""
    colour, marker = _OUTCOMES.get(verdict, _NO_CLAIM)
    return colour, marker, colour if verdict in _OUTCOMES else "white"


def _panels(count: int) -> tuple[Figure, list[plt.Axes]]:
    """Panels of equal size and scale, at most three per row; unused ones are hidden."""
    columns = min(3, count)
    rows = math.ceil(count / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(7.2, 0.5 + 2.1 * rows), squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    # A panel without one below it would have no figures on its axis.
    for axis in axes.flat[:count]:
        axis.tick_params(axis="x", labelbottom=True)
    return figure, list(axes.flat[:count])


def _box_around(centre: tuple[int, int, int], volume: Volume, plane: Plane) -> tuple[float, float, float, float]:
    """Left, right, bottom, top (mm on the page) of the close-up, kept within the picture."""
    width_mm, height_mm = size_mm(volume, plane)
    from_left_mm, from_bottom_mm = (
        float((centre[axis] + 0.5) * volume.spacing_mm[axis]) for axis in range(3) if axis != plane.axis
    )
    # The horizontal axis runs against the page.
    return *_close_up(width_mm - from_left_mm, width_mm), *_close_up(from_bottom_mm, height_mm)


def _close_up(middle_mm: float, extent_mm: float) -> tuple[float, float]:
    """Both ends of the close-up along one side of a picture, centred on `middle_mm` as far as the picture allows."""
    half = min(_CLOSE_UP_MM, extent_mm) / 2
    middle_mm = min(max(middle_mm, half), extent_mm - half)
    return middle_mm - half, middle_mm + half


def _empty_figure(why: str, width: float = 7.2) -> Figure:
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(width, 1.0))
        figure.text(0.5, 0.5, why, ha="center", va="center", color="#555555")
    return figure
