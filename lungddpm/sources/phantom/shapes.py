"""Drawing primitives of the body. Large bodies are signed distances to their surface (mm, negative inside),
which the grid turns into shares of voxels; tubes thinner than a few voxels are chains of rods, filled with points that
are counted by voxel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from lungddpm.core.volume import Box
from lungddpm.sources.phantom.scanner import Grid


def golden_spiral(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Shares in (0, 1) and angles of `count` evenly spread points on a disc or a sphere, not in rows."""
    k = np.arange(count) + 0.5
    return k / count, k * np.pi * (3 - np.sqrt(5))


def smooth_min(a: np.ndarray, b: np.ndarray, width_mm: float) -> np.ndarray:
    """Union of two distance fields with a fillet of that width."""
    overlap = np.maximum(width_mm - np.abs(a - b), 0)
    return np.minimum(a, b) - overlap * overlap / np.float32(4 * width_mm)


def ellipsoid(xyz: Iterable[np.ndarray], centre: Iterable[float], radii: Sequence[float]) -> np.ndarray:
    """Approximate signed distance, first order at the surface."""
    terms = [((c - c0) / r) for c, c0, r in zip(xyz, centre, radii, strict=True)]
    level = np.sqrt(sum(t * t for t in terms))
    slope = np.sqrt(sum((t / r) ** 2 for t, r in zip(terms, radii, strict=True)))
    return level * (level - 1) / np.maximum(slope, np.float32(1e-6))


def oval(x: np.ndarray, y: np.ndarray, a: ArrayLike, b: ArrayLike, power: float) -> np.ndarray:
    """Radial distance to a superellipse with half axes a, b (mm)."""
    level = (np.abs(x / np.maximum(a, 0.1)) ** power + np.abs(y / np.maximum(b, 0.1)) ** power) ** (1 / power)
    return np.hypot(x, y) * (1 - 1 / np.maximum(level, np.float32(1e-3)))


def curve(knots: Sequence[tuple[float, float, float]], step_mm: float = 6.0) -> np.ndarray:
    """(n, 3) points along a smooth (Catmull-Rom) curve through the knots."""
    p = np.array([knots[0], *knots, knots[-1]], float)
    pieces = []
    for a, b, c, d in zip(p[:-3], p[1:-2], p[2:-1], p[3:], strict=True):
        t = np.linspace(0, 1, max(2, round(np.linalg.norm(c - b) / step_mm)), endpoint=False)[:, None]
        pieces.append(0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * (b - c) + d - a) * t**3))
    return np.concatenate([*pieces, p[-1:]])


def tube(grid: Grid, points_mm: np.ndarray, radius_mm: float, margin_mm: float) -> tuple[Box, np.ndarray]:
    """Signed distance to a tube in the box that holds it; `margin_mm` and more outside it is only a lower bound."""
    reach = (radius_mm + margin_mm) * np.ones(3)
    outer = grid.box(points_mm.min(0) - reach, points_mm.max(0) + reach)
    distance = np.full([s.stop - s.start for s in outer], margin_mm, np.float32)
    for a, b in pairwise(points_mm):
        part = grid.box(np.minimum(a, b) - reach, np.maximum(a, b) + reach)
        x, y, z = grid.coordinates(part)
        along = b - a
        s = np.clip(((x - a[0]) * along[0] + (y - a[1]) * along[1] + (z - a[2]) * along[2]) / (along @ along), 0, 1)
        gap = (x - a[0] - s * along[0]) ** 2 + (y - a[1] - s * along[1]) ** 2 + (z - a[2] - s * along[2]) ** 2
        inner = distance[tuple(slice(p.start - o.start, p.stop - o.start) for p, o in zip(part, outer, strict=True))]
        np.minimum(inner, np.sqrt(gap) - radius_mm, out=inner)
    return outer, distance


@dataclass(frozen=True)
class Rods:
    """Short elliptical cylinders, one per row."""

    centre: np.ndarray
    """(n, 3) mm."""
    length: np.ndarray
    """(n,) mm."""
    across: np.ndarray
    """(n, 3) unit vectors of the first radius."""
    upright: np.ndarray
    """(n, 3) unit vectors of the second radius."""
    radii: np.ndarray
    """(n, 2) mm."""

    def __getitem__(self, chosen: np.ndarray) -> Rods:
        return Rods(*(getattr(self, column.name)[chosen] for column in fields(self)))


def rods_between(start: np.ndarray, end: np.ndarray, radii: np.ndarray, across: np.ndarray | None = None) -> Rods:
    """Rods from `start` to `end` (n, 3); `across` (n, 3) hints at the direction of the first radius."""
    along = end - start
    length = np.linalg.norm(along, axis=1)
    along = along / np.maximum(length, 1e-6)[:, None]
    if across is None:
        across = np.where(np.abs(along[:, 2:]) < 0.7, [[0.0, 0.0, 1.0]], [[1.0, 0.0, 0.0]])
    upright = np.cross(along, across)
    upright /= np.maximum(np.linalg.norm(upright, axis=1), 1e-6)[:, None]
    return Rods((start + end) / 2, length, np.cross(upright, along), upright, radii)


def join_rods(rods: list[Rods]) -> Rods:
    """All rods in one."""
    return Rods(*(np.concatenate([getattr(r, column.name) for r in rods]) for column in fields(Rods)))


def fill_rods(grid: Grid, rods: Rods) -> tuple[np.ndarray, np.ndarray]:
    """Share of each voxel inside the rods, and the (first) radius of the widest rod in it or 0; both float32.

    Counts evenly spread points: unlike a distance field, this keeps the true partial volume of vessels far thinner
    than a voxel.
    """
    volume_mm3 = np.zeros(np.prod(grid.shape), np.float64)
    widest_mm = np.zeros(len(volume_mm3), np.float32)
    counts = _points_per_rod(rods, 0.45 * float(grid.step_mm.min()))
    for count in np.unique(counts):
        chosen = np.flatnonzero(counts == count)
        # From thin to wide, so that the widest of several rods in a voxel is written last.
        some = rods[chosen[np.argsort(rods.radii[chosen, 0], kind="stable")]]
        index = grid.index_of(_points_in(some, count))
        inside = grid.holds(index)
        flat = np.ravel_multi_index(tuple(index[inside].T), grid.shape)
        weight = np.pi * some.radii.prod(axis=1) * some.length / count
        volume_mm3 += np.bincount(flat, np.broadcast_to(weight[:, None], inside.shape)[inside], len(volume_mm3))
        widest_mm[flat] = np.broadcast_to(some.radii[:, :1], inside.shape)[inside]
    share = np.minimum(volume_mm3 / grid.step_mm.prod(), 1).astype(np.float32)
    return share.reshape(grid.shape), widest_mm.reshape(grid.shape)


def _points_per_rod(rods: Rods, step_mm: float) -> np.ndarray:
    """Number of points, about `step_mm` apart, that fill the cross-section of each rod: powers of two, so that
    many agree."""
    count = np.clip(np.ceil(np.pi * rods.radii.prod(axis=1) / step_mm**2), 4, 4000)
    return (2 ** np.ceil(np.log2(count))).astype(int)


def _points_in(rods: Rods, count: int) -> np.ndarray:
    """(n, count, 3) points, evenly spread in each rod."""
    # Sunflower pattern: equal areas, no rows that could alias with the voxels.
    share, angle = golden_spiral(count)
    r = np.sqrt(share)
    u, v = r * np.cos(angle), r * np.sin(angle)
    shift = (np.arange(count) * 0.618) % 1 - 0.5
    along = np.cross(rods.across, rods.upright)
    return (
        rods.centre[:, None]
        + u[:, None] * (rods.radii[:, :1] * rods.across)[:, None]
        + v[:, None] * (rods.radii[:, 1:] * rods.upright)[:, None]
        + shift[:, None] * (rods.length[:, None] * along)[:, None]
    )
