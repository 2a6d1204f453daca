"""The vessels and bronchi in the lungs. Arteries and veins branch by Murray's law, Proc. Natl. Acad. Sci. 12:207-214,
1926, on trees that are grown into the lung's volume as in Tawhai et al., J. Appl. Physiol. 97:2310-2321, 2004; bronchi
run beside the wider arteries."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from lungddpm.sources.phantom.anatomy import Physique
from lungddpm.sources.phantom.scanner import HU, Grid, paint
from lungddpm.sources.phantom.shapes import Rods, fill_rods, join_rods, rods_between

_SUPPLIED_POINTS = 4000
"""A vessel tree and lung: some 1400 terminal branches of 0.4 to 0.6 mm radius."""


@dataclass(frozen=True)
class Branches:
    """A tree of vessels; row i is one branch, whose parent is in an earlier row.

    Attributes:
        parent: (n,) int, -1 for the root.
        start, control, end: (n, 3) mm, the points of a quadratic Bezier curve.
        radius_mm: (n,).
    """

    parent: np.ndarray
    start: np.ndarray
    control: np.ndarray
    end: np.ndarray
    radius_mm: np.ndarray


def paint_vessels(
    hu: np.ndarray, grid: Grid, p: Physique, lung_mm: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Paint arteries, veins and bronchi; `lung_mm` is the signed distance to the lungs' surface.

    Returns:
        Share of each voxel that is vessel, and radius in mm of the widest vessel in it, 0 outside the lungs; float32.
    """
    lung_share = grid.share(lung_mm)
    arteries, veins = _grow_vessels(grid, p, lung_mm, rng)
    walls, lumina = _bronchus_rods(arteries)
    paint(hu, fill_rods(grid, walls)[0] * lung_share, HU["airway_wall"])
    paint(hu, fill_rods(grid, lumina)[0] * lung_share, HU["air"])
    share, radius_mm = fill_rods(grid, join_rods([arteries, veins]))
    share *= lung_share
    radius_mm[lung_share < 0.5] = 0
    paint(hu, share, HU["blood"])
    return share, radius_mm


def grow_tree(
    supplied_mm: np.ndarray,
    root_mm: np.ndarray,
    direction: np.ndarray,
    radius_mm: float,
    rng: np.random.Generator,
    smallest_supply: int = 4,
) -> Branches:
    """Grow a tree into a cloud of points, each of which represents an equal volume of tissue.

    Every branch runs 40 % of the way to the centre of the points it supplies, which a plane along the branch then
    shares out between two children (Tawhai et al. 2004, volume-filling growth). Flow is proportional to supplied
    volume, so r^3 proportional to it fulfils Murray's law r0^3 = r1^3 + r2^3 exactly.

    Args:
        supplied_mm: (n, 3) points.
        root_mm, direction: (3,) start and direction of the root.
        radius_mm: of the root.
        smallest_supply: points of a branch that no longer divides.
    """
    rows: list[tuple] = []
    stack = [(-1, np.asarray(root_mm, float), np.asarray(direction, float), supplied_mm)]
    while stack:
        parent, start, heading, points = stack.pop()
        reach = points.mean(axis=0) - start
        is_last = len(points) <= smallest_supply
        end = start + reach * (1.0 if is_last else 0.4)
        control = start + 0.4 * np.linalg.norm(end - start) * heading
        rows.append((parent, start, control, end, radius_mm * (len(points) / len(supplied_mm)) ** (1 / 3)))
        if is_last:
            continue
        onward = reach / max(np.linalg.norm(reach), 1e-6)
        heading = 0.5 * heading + onward
        heading /= max(np.linalg.norm(heading), 1e-6)
        spread = points - points.mean(axis=0)
        spread -= (spread @ onward)[:, None] * onward
        widest = np.linalg.eigh(spread.T @ spread)[1][:, -1]
        order = np.argsort(spread @ widest)
        cut = min(max(int(len(points) * rng.uniform(0.25, 0.75)), 1), len(points) - 1)
        for part in (order[:cut], order[cut:]):
            stack.append((len(rows) - 1, end, heading, points[part]))
    return Branches(*(np.array(column) for column in zip(*rows, strict=True)))


def _grow_vessels(grid: Grid, p: Physique, lung_mm: np.ndarray, rng: np.random.Generator) -> tuple[Rods, Rods]:
    """Arteries and veins of both lungs as rods; `lung_mm` is the signed distance to the lungs' surface."""
    h, s = p.height_mm, p.heart_scale
    inner = np.argwhere(lung_mm < -5)
    inner_mm = grid.first_mm + inner * grid.step_mm
    arteries: list[Rods] = []
    veins: list[Rods] = []
    for side, (artery_x, artery_y), (vein_x, vein_y) in ((-1, (-52, 9), (-48, 14)), (1, (54, 17), (50, 18))):
        own = inner_mm[inner_mm[:, 0] * side > 0]
        for rods, root, radius in (
            (arteries, (artery_x * s, artery_y, 0.50 * h), 6.5 * s),
            (veins, (vein_x * s, vein_y, 0.40 * h), 5.5 * s),
        ):
            points = own[rng.integers(len(own), size=_SUPPLIED_POINTS)] + rng.uniform(-1, 1, (_SUPPLIED_POINTS, 3))
            tree = grow_tree(points, np.array(root), np.array([side, 0.0, 0.0]), radius, rng)
            rods.append(_tree_rods(tree, step_mm=0.7 * float(grid.step_mm.min())))
    return join_rods(arteries), join_rods(veins)


def _tree_rods(tree: Branches, step_mm: float) -> Rods:
    """The branches cut into rods of about `step_mm`."""
    pieces = np.maximum(np.ceil(np.linalg.norm(tree.end - tree.start, axis=1) / step_mm), 2).astype(int)
    rods = []
    for count in np.unique(pieces):
        chosen = pieces == count
        t = np.linspace(0, 1, count + 1)[None, :, None]
        a, b, c = (part[chosen][:, None] for part in (tree.start, tree.control, tree.end))
        points = (1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c
        radius = np.repeat(tree.radius_mm[chosen], count)
        start, end = points[:, :-1].reshape(-1, 3), points[:, 1:].reshape(-1, 3)
        rods.append(rods_between(start, end, np.stack([radius, radius], axis=1)))
    return join_rods(rods)


def _bronchus_rods(arteries: Rods) -> tuple[Rods, Rods]:
    """Walls and lumina of the bronchi that run beside the wider arteries."""
    artery = arteries[arteries.radii[:, 0] > 1.6]
    outer = 0.85 * artery.radii
    beside = artery.upright * np.where(artery.upright[:, 2:] < 0, -1, 1)
    centre = artery.centre + beside * (artery.radii + outer)[:, :1]
    return replace(artery, centre=centre, radii=outer), replace(artery, centre=centre, radii=0.72 * outer)
