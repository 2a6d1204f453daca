"""The picture for checking a case by eye: contours of its layout over the scan, three planes, every nodule."""

from __future__ import annotations

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy import ndimage

from lungddpm.core.drawing import (
    LABELS,
    LUNG_WINDOW_HU,
    PLANES,
    STYLE,
    Plane,
    largest_nodule,
    mark_sides,
    oriented_slice,
    size_mm,
)
from lungddpm.core.labels import Label
from lungddpm.core.volume import Box, Volume, bounding_box, per_axis
from lungddpm.layouts.quality import Segmented

_MARGIN_MM = 20.0
_CLOSE_UP_MM = 50.0
_CLOSE_UPS = 6
_CELLS_COLOUR = "#009E73"
_AXIAL = PLANES[0]


def draw_case(found: Segmented, layout: Volume, title: str) -> Figure:
    """Three planes through the largest nodule, without and with contours, and a close-up of each nodule.

    Args:
        found: the scan and its segmentation, whose contours are solid.
        layout: the layout on the model grid, parallel to the scan's; dashed in the close-ups.
        title: of the picture. With more than six nodules, only the largest are shown, and the title gives the number
            hidden.
    """
    labels = found.labels()
    box = _around(found.ct, labels > 0)
    scan, labels, nodules = found.ct.crop(box), labels[box], found.nodules[box]
    centre = largest_nodule(scan.like(labels))
    shown = _largest(nodules)
    widths, heights = zip(*(size_mm(scan, plane) for plane in PLANES), strict=True)
    inches_per_mm = 9.6 / sum(widths)
    ratios = [max(heights), max(heights), 1.05 * sum(widths) / _CLOSE_UPS][: 2 + bool(shown)]
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(9.6, inches_per_mm * sum(ratios) + 0.7), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0.01, hspace=0.01)
        rows = figure.add_gridspec(len(ratios), 1, height_ratios=ratios)
        for row in (0, 1):
            axes = rows[row].subgridspec(1, 3, width_ratios=widths).subplots()
            for axis, plane in zip(axes, PLANES, strict=True):
                _show(axis, scan, plane, centre[plane.axis])
                if row == 0:
                    mark_sides(axis, plane)
                    continue
                picture = oriented_slice(labels, plane, centre[plane.axis])
                _outline(axis, scan, picture > 0, plane, LABELS[Label.LUNG][1], 1.0)
                for label, width in ((Label.VESSEL, 0.5), (Label.NODULE, 1.2)):
                    _outline(axis, scan, picture == label, plane, LABELS[label][1], width)
        if shown:
            axes = rows[2].subgridspec(1, _CLOSE_UPS).subplots()
            for axis in axes[len(shown) :]:
                axis.set_axis_off()
            for axis, (number, inside) in zip(axes, shown.items(), strict=False):
                _close_up(axis, scan, nodules, inside, layout, number)
        handles = [Line2D([], [], color=colour, label=name) for label, (name, colour) in LABELS.items() if label]
        handles.append(Line2D([], [], color=_CELLS_COLOUR, linestyle="dashed", label="nodule on the model grid"))
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
        hidden = int(nodules.max()) - len(shown)
        figure.suptitle(f"{title}{f' ({hidden} smaller nodules not shown)' if hidden else ''}", fontsize=9.5)
    return figure


def _around(ct: Volume, mask: np.ndarray) -> Box:
    """The box of a mask with a margin, within the scan."""
    margins = np.ceil(_MARGIN_MM / ct.spacing_mm).astype(int)
    return per_axis(
        slice(max(0, side.start - margin), side.stop + margin)
        for side, margin in zip(bounding_box(mask), margins, strict=True)
    )


def _cells_on_slice(layout: Volume, scan: Volume, k: int) -> np.ndarray:
    """The layout's labels at the voxels of an axial slice of a scan with parallel axes, (x, y, 1).

    Background outside the layout's grid.
    """
    to_cells = np.linalg.solve(layout.affine, scan.affine)
    places, inside = [], []
    for axis, n in enumerate(scan.shape):
        nearest = np.rint(to_cells[axis, axis] * np.arange(n) + to_cells[axis, 3]).astype(int)
        inside.append((nearest >= 0) & (nearest < layout.shape[axis]))
        places.append(nearest.clip(0, layout.shape[axis] - 1))
    on_slice = layout.array[np.ix_(places[0], places[1], places[2][k : k + 1])]
    return on_slice * (inside[0][:, None, None] & inside[1][:, None] & inside[2][k])


def _largest(nodules: np.ndarray) -> dict[int, Box]:
    """Numbers of the nodules to show, in their order, and the box of each."""
    boxes = {number: box for number, box in enumerate(ndimage.find_objects(nodules), start=1) if box is not None}
    voxels = {number: np.count_nonzero(nodules[box] == number) for number, box in boxes.items()}
    largest = sorted(boxes, key=lambda number: -voxels[number])[:_CLOSE_UPS]
    return {number: boxes[number] for number in sorted(largest)}


def _show(axis: plt.Axes, scan: Volume, plane: Plane, index: int) -> None:
    width, height = size_mm(scan, plane)
    axis.imshow(
        oriented_slice(scan.array, plane, index), cmap="gray", vmin=LUNG_WINDOW_HU[0], vmax=LUNG_WINDOW_HU[1],
        extent=(0, width, 0, height), interpolation="bilinear",
    )  # fmt: skip
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def _outline(
    axis: plt.Axes,
    scan: Volume,
    picture: np.ndarray,
    plane: Plane,
    colour: str,
    width: float,
    style: str = "solid",
) -> None:
    if picture.any():
        extent = (0, size_mm(scan, plane)[0], 0, size_mm(scan, plane)[1])
        axis.contour(
            picture, levels=[0.5], colors=colour, linewidths=width, linestyles=style, extent=extent, origin="upper"
        )


def _close_up(axis: plt.Axes, scan: Volume, nodules: np.ndarray, inside: Box, layout: Volume, number: int) -> None:
    """The axial slice on which a nodule is largest."""
    k = inside[2].start + int(np.count_nonzero(nodules[inside] == number, axis=(0, 1)).argmax())
    cells = _cells_on_slice(layout, scan, k) == Label.NODULE
    _show(axis, scan, _AXIAL, k)
    _outline(axis, scan, oriented_slice(cells, _AXIAL, 0), _AXIAL, _CELLS_COLOUR, 1.0, "dashed")
    _outline(axis, scan, oriented_slice(nodules, _AXIAL, k) == number, _AXIAL, LABELS[Label.NODULE][1], 1.2)
    width, _ = size_mm(scan, _AXIAL)
    x, y = (np.argwhere(nodules[:, :, k] == number).mean(axis=0) + 0.5) * scan.spacing_mm[:2]
    half = _CLOSE_UP_MM / 2
    # The horizontal axis is reversed: the patient's right is on the left.
    axis.set(xlim=(width - x - half, width - x + half), ylim=(y - half, y + half), facecolor="black")
    axis.set_title(str(number), fontsize=8, pad=2)
