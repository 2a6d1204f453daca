"""The slice viewer of the report: reference, layout, synthetic CT and difference side by side, in three planes.

plotly draws the panels (and brings its own JavaScript); `viewer.html.jinja` fills them with slices. A volume travels
once, compressed, and the browser cuts the slices of all planes from it: pictures of slices would hold every voxel once
for each plane and window, and not its HU.
"""

from __future__ import annotations

import base64
import gzip
from typing import Any

import cc3d
import numpy as np
from plotly import graph_objects
from plotly.subplots import make_subplots

from lungddpm.core.drawing import (
    LABELS,
    LUNG_WINDOW_HU,
    MEDIASTINAL_WINDOW_HU,
    PLANES,
    Plane,
    difference_limit,
    inner_voxel,
)
from lungddpm.core.labels import Label
from lungddpm.quality.image_quality import Sample
from lungddpm.report.samples import DisplaySample

PANELS = ("reference CT", "layout", "synthetic CT", "synthetic − reference")
_OUTLINED = (0, 2)
"""Panels over which the nodules' outlines can be drawn."""
_LIMIT_BYTES = 14_000_000
"""For all volumes as embedded in the page; plotly takes 5 MB, and the page should stay under 25 MB."""
_ENDS = (("L", "R"), ("P", "A"), ("F", "H"))
"""Side of the first and the last slice across each voxel axis."""
_GAP, _BAR = 0.008, 0.055
"""Shares of a figure's width: between panels, and for the colour bar at the right."""
_PANEL = (1 - _BAR - _GAP * (len(PANELS) - 1)) / len(PANELS)


def viewer_values(shown: list[DisplaySample], limit_bytes: int = _LIMIT_BYTES) -> dict[str, Any] | None:
    """What `viewer.html.jinja` needs.

    Args:
        shown: samples, the most important first; the first is always included.
        limit_bytes: later samples are included as long as all volumes stay within it.

    Returns:
        panels (HTML by plane name), labels (name and colour), data (JSON-like, what the script reads), left_out
        (samples that did not fit); None if there is no sample.
    """
    if not shown:
        return None
    volumes: dict[str, str] = {}
    samples: list[dict[str, Any]] = []
    left_out: list[str] = []
    for one in shown:
        packed, arrays = _pack(one)
        new = {name: text for name, text in arrays.items() if name not in volumes}
        if samples and sum(len(text) for text in (volumes | new).values()) > limit_bytes:
            left_out.append(f"{one.generator} {one.case_id}")
            continue
        volumes |= new
        samples.append(packed)
    planes = [{"name": plane.name, "axis": plane.axis, "ends": _ENDS[plane.axis]} for plane in PLANES]
    windows = {"lung": LUNG_WINDOW_HU, "mediastinum": MEDIASTINAL_WINDOW_HU}
    return {
        "panels": {plane.name: _panels(plane) for plane in PLANES},
        "labels": list(LABELS.values()),
        "data": {
            "panel_share": _PANEL,
            "planes": planes,
            "windows": windows,
            "labels": [name for name, _ in LABELS.values()],
            "nodule": int(Label.NODULE),
            "outlined": _OUTLINED,
            "samples": samples,
            "volumes": volumes,
        },
        "left_out": left_out,
    }


def list_nodules(sample: Sample) -> list[dict[str, Any]]:
    """The nodules of a sample's layout (26-connected), the largest first.

    Returns:
        One dict per nodule: voxel (x, y, z indices of a voxel inside it, nearest its centre of mass), diameter_mm (of
        the sphere of equal volume), volume_mm3, synthetic_hu and reference_hu (means over its voxels; None without a
        reference).
    """
    numbers = cc3d.connected_components(sample.layout.array == Label.NODULE, connectivity=26)
    nodules = []
    for number in range(1, numbers.max() + 1):
        mask = numbers == number
        volume_mm3 = float(mask.sum() * sample.layout.voxel_mm3)
        nodules.append(
            {
                "voxel": inner_voxel(mask, sample.layout.spacing_mm),
                "diameter_mm": float((6 * volume_mm3 / np.pi) ** (1 / 3)),
                "volume_mm3": volume_mm3,
                "synthetic_hu": float(sample.ct.array[mask].mean()),
                "reference_hu": None if sample.reference is None else float(sample.reference.ct.array[mask].mean()),
            }
        )
    return sorted(nodules, key=lambda nodule: -nodule["volume_mm3"])


def _pack(one: DisplaySample) -> tuple[dict[str, Any], dict[str, str]]:
    """A sample as embedded in the page: its description, and its volumes by the names used in the description.

    Outside the lungs most generators copy the reference, so the difference compresses better than the synthetic CT,
    which is embedded only if there is no reference.
    """
    sample, who = one.sample, f"{one.generator}/{one.case_id}"
    arrays = {"layout": (f"{who}/layout", sample.layout.array.astype("u1"))}
    limit_hu, origin = None, ""
    if sample.reference is None:
        arrays["synthetic"] = (f"{who}/synthetic", sample.ct.array.astype("<i2"))
    else:
        reference_hu = sample.reference.ct.array.astype("<i2")
        difference = sample.ct.array.astype("<i2") - reference_hu
        arrays["reference"] = (f"reference/{sample.reference.case_id}", reference_hu)
        arrays["difference"] = (f"{who}/difference", difference)
        limit_hu = difference_limit(difference, sample.layout.array)
        origin = f" from {sample.reference.case_id}"
    packed = {
        "generator": one.generator,
        "title": one.case_id + origin + (f" ({one.why})" if one.why else ""),
        "shape": sample.ct.shape,
        "spacing_mm": sample.ct.spacing_mm.tolist(),
        "affine": sample.ct.affine.tolist(),
        "limit_hu": limit_hu,
        "volumes": {name: key for name, (key, _) in arrays.items()},
        "nodules": list_nodules(sample),
    }
    return packed, {key: _compressed(array) for key, array in arrays.values()}


def _compressed(array: np.ndarray) -> str:
    return base64.b64encode(gzip.compress(np.ascontiguousarray(array).tobytes(), mtime=0)).decode()


def _panels(plane: Plane) -> str:
    """The four panels of a plane as HTML, without slices yet."""
    figure = make_subplots(
        rows=1,
        cols=len(PANELS),
        horizontal_spacing=_GAP,
        subplot_titles=PANELS if plane is PLANES[0] else None,
    )
    grey: dict[str, Any] = {"colorscale": "gray", "showscale": False}
    steps = np.repeat(np.linspace(0, 1, len(LABELS) + 1), 2)[1:-1]
    colours = np.repeat([colour for _, colour in LABELS.values()], 2)
    labels = {"colorscale": list(zip(steps, colours, strict=True)), "showscale": False}
    bar = {"title": {"text": "HU", "side": "top"}, "thickness": 8, "x": 1 - _BAR + 0.004, "xanchor": "left", "xpad": 0}
    difference = {"colorscale": "PuOr_r", "colorbar": bar}
    for column, style in enumerate((grey, labels, grey, difference), start=1):
        figure.add_trace(graph_objects.Heatmap(z=[[None]], zsmooth=False, hoverinfo="none", **style), row=1, col=column)
    outline = {"start": 0.5, "end": 0.5, "size": 1, "coloring": "none"}
    for panel in _OUTLINED:
        figure.add_trace(
            graph_objects.Contour(
                z=[[None]], contours=outline, hoverinfo="skip", showscale=False, showlegend=False,
                line={"color": LABELS[Label.NODULE][1], "width": 1.5, "smoothing": 0},
            ),
            row=1, col=panel + 1,
        )  # fmt: skip
    hidden = {"showgrid": False, "zeroline": False, "showticklabels": False, "ticks": "", "constrain": "domain"}
    for column in range(1, len(PANELS) + 1):
        left = (column - 1) * (_PANEL + _GAP)
        # All panels follow the first, which keeps one mm across as long as one mm up.
        kept, moved = ({"scaleanchor": "y"}, {}) if column == 1 else ({"matches": "x"}, {"matches": "y"})
        # Radiological convention: every picture runs against its horizontal axis.
        figure.update_xaxes(domain=[left, left + _PANEL], autorange="reversed", **kept, **hidden, row=1, col=column)
        figure.update_yaxes(**moved, **hidden, row=1, col=column)
    for title, column in zip(figure.layout.annotations, range(len(PANELS)), strict=False):
        title.update(x=column * (_PANEL + _GAP) + _PANEL / 2, font={"size": 13})
    for side, (x, y, anchor_x, anchor_y) in zip(
        plane.sides, ((0, 0.5, "left", "middle"), (1, 0.5, "right", "middle"), (0.5, 1, "center", "top"),
                      (0.5, 0, "center", "bottom")), strict=True,
    ):  # fmt: skip
        figure.add_annotation(
            text=f"<b>{side}</b>", x=x, y=y, xref="x domain", yref="y domain", xanchor=anchor_x, yanchor=anchor_y,
            showarrow=False, font={"color": "white", "size": 11}, bgcolor="rgba(0, 0, 0, 0.5)", borderpad=1,
        )  # fmt: skip
    margin = {"l": 0, "r": 0, "t": 24 if plane is PLANES[0] else 2, "b": 2}
    figure.update_layout(height=240, margin=margin, plot_bgcolor="black", dragmode="zoom", template="none")
    return figure.to_html(
        full_html=False,
        include_plotlyjs=plane is PLANES[0],
        div_id=f"viewer-{plane.name}",
        config={"displaylogo": False, "displayModeBar": False},
    )
