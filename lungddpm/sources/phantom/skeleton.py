"""The bones: spine, ribs with their cartilage, sternum, shoulder blades and collar bones. Each has a dense rim around
cancellous bone; the ribs, thinner than a few voxels, are rods with an elliptical cross-section."""

from __future__ import annotations

import numpy as np

from lungddpm.sources.phantom.anatomy import Physique, Surfaces
from lungddpm.sources.phantom.scanner import HU, Grid, paint
from lungddpm.sources.phantom.shapes import curve, fill_rods, join_rods, oval, rods_between, tube

_RIB_RADII_MM = (3.8, 6.5)
"""Across and along the chest wall."""


def paint_skeleton(hu: np.ndarray, grid: Grid, p: Physique, surfaces: Surfaces) -> None:
    """All bones of the chest."""
    _paint_spine(hu, grid, p)
    _paint_ribs(hu, grid, p)
    _paint_sternum(hu, grid, p)
    _paint_shoulder_blades(hu, grid, p, surfaces)
    _paint_collar_bones(hu, grid, p)


def _paint_spine(hu: np.ndarray, grid: Grid, p: Physique) -> None:
    box = grid.box((-45, 0, -500), (45, p.half_depth_mm + 60, 900))
    x, y, z = grid.coordinates(box)
    y = y - p.spine_y(z).astype(np.float32)
    pitch = np.float32(p.height_mm / 11)
    # Distance from the middle of a vertebra.
    phase = np.abs((z / pitch) % 1 - 0.5) * pitch
    waist = 1.5 * np.cos(phase * np.float32(2 * np.pi / pitch))
    column = oval(x, y, np.float32(17) - waist, np.float32(14.5) - waist, 2.2)
    vertebra = np.maximum(column, phase - (pitch / 2 - 2))
    canal = oval(x, y - 23, np.float32(9), np.float32(8), 2)
    arch = np.maximum(np.abs(canal - 2.5) - 2.5, phase - 0.38 * pitch)
    spinous = np.maximum(np.maximum(np.abs(x) - 3, np.abs(y - 46) - 15), np.abs(phase - 0.1 * pitch) - 0.22 * pitch)
    transverse = np.maximum(np.hypot(y - 20 - 0.15 * np.abs(x), phase) - 5.5, np.abs(x) - 33)
    paint(hu[box], grid.share(column), HU["disc"])
    paint(hu[box], grid.share(vertebra), 0.7 * HU["cortical"])
    paint(hu[box], grid.share(vertebra + 2.2), HU["cancellous"])
    processes = np.minimum(np.minimum(arch, spinous), np.maximum(transverse, -canal))
    paint(hu[box], grid.share(processes), 0.6 * HU["cortical"])
    paint(hu[box], grid.share(canal), HU["fluid"])


def _paint_ribs(hu: np.ndarray, grid: Grid, p: Physique) -> None:
    step_mm = 0.7 * float(grid.step_mm.min())
    bones, cartilages = [], []
    for side in (-1, 1):
        for number in range(1, 13):
            points, last_of_bone = _rib(p, side, number, step_mm)
            bones.append(points[: last_of_bone + 1])
            if len(points) > last_of_bone + 1:
                cartilages.append(points[last_of_bone:])
    for lines, tissue, relative in (
        (cartilages, "cartilage", 1.0),
        (bones, "cortical", 1.0),
        (bones, "cancellous", 0.6),
    ):
        rods = []
        for points in lines:
            start, end = points[:-1], points[1:]
            radii = np.tile(np.multiply(_RIB_RADII_MM, relative), (len(start), 1))
            rods.append(rods_between(start, end, radii, across=start * (1, 1, 0)))
        paint(hu, fill_rods(grid, join_rods(rods))[0], HU[tissue])


def _rib(p: Physique, side: int, number: int, step_mm: float) -> tuple[np.ndarray, int]:
    """Centre line of a rib, from the spine in steps of `step_mm`, and the index of the last point of the bone."""
    back_z = p.height_mm * (1.02 - 0.088 * (number - 1))
    drop = np.interp(number, [1, 3, 7, 10, 12], [28, 55, 88, 70, 45]) * p.height_mm / 248
    end = np.interp(number, [1, 7, 8, 10, 11, 12], [0.93, 0.93, 0.8, 0.7, 0.5, 0.36]) * np.pi
    angle = np.linspace(0.09 * np.pi, end, 200)
    z = back_z - drop * (1 - np.cos(angle)) / 2
    half_width, half_depth = p.wall_half_axes(np.clip(z, 0, p.height_mm * 0.97), side)
    sine, cosine = np.sin(angle), np.cos(angle)
    x = side * (half_width + 5.5) * np.abs(sine) ** 0.8
    y = p.middle_y(z) + (half_depth + 5.5) * np.sign(cosine) * np.abs(cosine) ** 0.8
    head = (side * 15, p.spine_y(back_z) + 8, back_z + 2)
    points = np.concatenate([[head], np.stack([x, y, z], axis=1)])
    way = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
    steps = np.linspace(0, way[-1], int(way[-1] / step_mm) + 2)
    even = np.stack([np.interp(steps, way, axis) for axis in points.T], axis=1)
    ends_as_bone = end <= 0.76 * np.pi
    bony_way = way[-1] if ends_as_bone else way[1 + np.searchsorted(angle, 0.76 * np.pi)]
    return even, int(np.searchsorted(steps, bony_way))


def _paint_sternum(hu: np.ndarray, grid: Grid, p: Physique) -> None:
    h = p.height_mm
    box = grid.box((-40, -200, 0.22 * h), (40, 0, 0.86 * h))
    x, y, z = grid.coordinates(box)
    front = (p.middle_y(z) - p.wall_half_axes(z, 1)[1] - 8).astype(np.float32)
    half_width = 15 + 90 * np.clip(z / h - 0.7, 0, 0.15)
    plate = np.maximum(
        oval(x, y - front - 0.004 * x * x, half_width, np.float32(5.5), 3), np.abs(z - 0.54 * h) - 0.31 * h
    )
    paint(hu[box], grid.share(plate), 0.6 * HU["cortical"])
    paint(hu[box], grid.share(plate + 2), HU["cancellous"] * 0.7)


def _paint_shoulder_blades(hu: np.ndarray, grid: Grid, p: Physique, surfaces: Surfaces) -> None:
    h = p.height_mm
    box = grid.box((-400, 0, 0.5 * h), (400, 400, 1.2 * h))
    x, _, z = grid.coordinates(box)
    # They follow the back.
    depth = np.maximum(np.abs(surfaces.torso[box] + p.fat_mm + 13) - 2.5, 13 - surfaces.chest_wall[box])
    outline = (np.hypot((np.abs(x) - 92) / 38, (z - 0.86 * h) / np.float32(0.3 * h)) - 1) * 30
    paint(hu[box], grid.share(np.maximum(depth, outline)), 0.6 * HU["cortical"])


def _paint_collar_bones(hu: np.ndarray, grid: Grid, p: Physique) -> None:
    h = p.height_mm
    for side in (-1, 1):
        top = float(p.middle_y(h) - p.wall_half_axes(0.85 * h, side)[1])
        points = curve([(side * 24, top - 4, 0.87 * h), (side * 70, top + 4, 0.95 * h), (side * 130, 10, 1.08 * h)])
        box, distance = tube(grid, points, 6.0, margin_mm=5)
        paint(hu[box], grid.share(distance), 0.8 * HU["cortical"])
        paint(hu[box], grid.share(distance + 2.5), HU["cancellous"])
