"""The nodules: their shapes (smooth, lobulated, spiculated), their attachment (free, on the pleura, on a vessel),
their texture (solid, part-solid, ground-glass), and the positions of other marks of readers: nodules below 3 mm and
findings other than nodules."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from lungddpm.core.volume import Box, per_axis
from lungddpm.sources.phantom.anatomy import Surfaces
from lungddpm.sources.phantom.scanner import HU, Grid, paint, slice_means
from lungddpm.sources.phantom.settings import Phantom, Textures
from lungddpm.sources.phantom.shapes import golden_spiral


@dataclass(frozen=True)
class Shape:
    """A star-shaped body: its radius along the unit vector u is radius * scale * (1 + sum a exp(k (u.v - 1)))."""

    radius_mm: float
    directions: np.ndarray
    """(n, 3), the unit vectors v of its bumps."""
    heights: np.ndarray
    """(n,), a."""
    sharpness: np.ndarray
    """(n,), k."""
    scale: float
    """Makes the volume that of a sphere of `radius_mm`."""

    def radius_along(self, offset_mm: np.ndarray) -> np.ndarray:
        """Radius in mm in the direction of each offset (..., 3) from the centre."""
        norm = np.maximum(np.linalg.norm(offset_mm, axis=-1, keepdims=True), 1e-6)
        bumps = self.heights * np.exp(self.sharpness * ((offset_mm / norm) @ self.directions.T - 1))
        return self.radius_mm * self.scale * (1 + bumps.sum(axis=-1))


@dataclass(frozen=True)
class Nodule:
    """One nodule and its exact truth.

    Attributes:
        mask: bool, the scan's shape: voxels at least half filled by the nodule.
        centre_mm: RAS.
        diameter_mm: of the sphere of equal volume.
        texture: solid | part-solid | ground-glass.
        margin: smooth | lobulated | spiculated.
        attachment: isolated | pleura | vessel.
    """

    mask: np.ndarray
    centre_mm: tuple[float, float, float]
    diameter_mm: float
    texture: str
    margin: str
    attachment: str
    shape: Shape = field(repr=False)


@dataclass(frozen=True)
class Site:
    """A position for a nodule or a mark; its centre in the patient's LPS mm."""

    centre_mm: np.ndarray
    radius_mm: float
    attachment: str

    def clear_of(self, others: list[Site], gap_mm: float) -> bool:
        """Whether all others are more than `gap_mm` away, even where bumps stick out."""
        return all(
            np.linalg.norm(self.centre_mm - o.centre_mm) > 1.5 * (self.radius_mm + o.radius_mm) + gap_mm for o in others
        )


def place_nodules(
    grid: Grid, parameters: Phantom, surfaces: Surfaces, vessel_radius_mm: np.ndarray, rng: np.random.Generator
) -> list[Site]:
    """Sites in the lungs, away from each other and from the mediastinum: the drawn number, or fewer if none fits."""
    # Readers' outlines of two nodules must not come so close that they count as one lesion.
    gap_mm = 6 + 2 * float(grid.step_mm.max())
    low, high = np.log(parameters.nodule_diameter_mm)
    wanted = int(rng.integers(parameters.nodules[0], parameters.nodules[1] + 1))
    sites: list[Site] = []
    for _ in range(10 * wanted):
        if len(sites) == wanted:
            break
        radius_mm = float(np.exp(rng.uniform(low, high))) / 2
        attachment = str(rng.choice(["isolated", "pleura", "vessel"], p=[0.4, 0.35, 0.25]))
        candidates = _candidates(grid, surfaces, vessel_radius_mm, radius_mm, attachment, rng)
        clear = (site for site in candidates if site.clear_of(sites, gap_mm))
        sites += itertools.islice(clear, 1)
    return sites


def _candidates(
    grid: Grid,
    surfaces: Surfaces,
    vessel_radius_mm: np.ndarray,
    radius_mm: float,
    attachment: str,
    rng: np.random.Generator,
) -> Iterator[Site]:
    """At most 200 sites where a nodule of that radius and attachment fits into the lungs, in random order."""
    lateral = surfaces.mediastinum > 1.6 * radius_mm + 4
    fits = lateral & (surfaces.lung < -1.2 * radius_mm - 2)
    if attachment == "pleura":
        start = lateral & (np.abs(surfaces.costal + 0.92 * radius_mm) < grid.pixel_mm / 2)
    elif attachment == "vessel":
        start = lateral & (vessel_radius_mm > 1) & (vessel_radius_mm < 2.5)
    else:
        start = fits & (vessel_radius_mm < 1)
    for index in rng.permutation(np.argwhere(start))[:200]:
        centre_mm = grid.first_mm + (index + rng.uniform(-0.5, 0.5, 3)) * grid.step_mm
        if attachment == "vessel":
            sideways = rng.normal(size=3)
            centre_mm = centre_mm + sideways / np.linalg.norm(sideways) * 0.7 * radius_mm
            near = grid.index_of(centre_mm)
            if not grid.holds(near) or not fits[tuple(near)]:
                continue
        yield Site(centre_mm, radius_mm, attachment)


def place_marks(
    grid: Grid, possible: np.ndarray, most: int, nodules: list[Site], rng: np.random.Generator
) -> np.ndarray:
    """Up to `most` points (n, 3) in `possible` voxels, clear of nodules and of each other; the patient's LPS mm."""
    wanted = rng.integers(0, most + 1)
    marks: list[Site] = []
    for index in rng.permutation(np.argwhere(possible))[:100]:
        if len(marks) == wanted:
            break
        site = Site(grid.first_mm + index * grid.step_mm, 1.5, "isolated")
        if site.clear_of([*nodules, *marks], gap_mm=20):
            marks.append(site)
    return np.array([site.centre_mm for site in marks]).reshape(-1, 3)


def paint_nodule(
    hu: np.ndarray,
    grid: Grid,
    scan: Grid,
    site: Site,
    lung_share: np.ndarray,
    textures: Textures,
    rng: np.random.Generator,
) -> Nodule:
    """Paint one nodule, cut off at the lung's surface; its `centre_mm` is still in the patient's frame.

    `grid` is the painting grid of `scan`, whose voxels the nodule's mask has; `textures` as in the settings.
    """
    shares = np.array([textures.solid, textures.part_solid, textures.ground_glass])
    texture = str(rng.choice(["solid", "part-solid", "ground-glass"], p=shares / shares.sum()))
    odds = {"solid": [0.4, 0.3, 0.3], "part-solid": [0.3, 0.4, 0.3], "ground-glass": [0.7, 0.3, 0.0]}[texture]
    margin = str(rng.choice(["smooth", "lobulated", "spiculated"], p=odds))
    shape = draw_shape(site.radius_mm, margin, rng)
    box, share = shape_share(grid, shape, site.centre_mm)
    share *= lung_share[box]
    # Vessels remain visible in ground glass.
    paint(hu[box], share, HU["solid"] if texture == "solid" else np.maximum(HU["ground_glass"], hu[box]))
    if texture == "part-solid":
        _, core = shape_share(grid, shape, site.centre_mm, relative=rng.uniform(0.45, 0.65))
        paint(hu[box], core * lung_share[box], HU["solid"])
    painted = np.zeros(grid.shape, np.float32)
    painted[box] = share
    seen = slice_means(painted, scan)
    diameter_mm = float(np.cbrt(6 / np.pi * share.sum() * grid.step_mm.prod()))
    # A nodule that does not fill any voxel by half still has one.
    return Nodule(
        seen >= min(0.5, seen.max()), per_axis(site.centre_mm), diameter_mm, texture, margin, site.attachment, shape
    )


def paint_small_nodule(hu: np.ndarray, grid: Grid, centre_mm: np.ndarray, rng: np.random.Generator) -> None:
    """Paint one solid, smooth nodule below 3 mm."""
    box, share = shape_share(grid, draw_shape(rng.uniform(1.0, 1.45), "smooth", rng), centre_mm)
    paint(hu[box], share, HU["solid"])


def draw_shape(radius_mm: float, margin: str, rng: np.random.Generator) -> Shape:
    """A random shape with the volume of a sphere of that radius."""
    count, height, sharpness = {
        "smooth": (3, (0.0, 0.08), (2.0, 3.0)),
        "lobulated": (int(rng.integers(4, 8)), (0.2, 0.45), (6.0, 12.0)),
        "spiculated": (int(rng.integers(9, 16)), (0.35, 0.9), (50.0, 110.0)),
    }[margin]
    directions = rng.normal(size=(count, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    shape = Shape(radius_mm, directions, rng.uniform(*height, count), rng.uniform(*sharpness, count), 1.0)
    share, angle = golden_spiral(4000)
    z = 1 - 2 * share
    sphere = np.stack([np.sqrt(1 - z * z) * np.cos(angle), np.sqrt(1 - z * z) * np.sin(angle), z], axis=1)
    return replace(shape, scale=float(np.mean((shape.radius_along(sphere) / radius_mm) ** 3) ** (-1 / 3)))


def shape_share(
    grid: Grid, shape: Shape, centre_mm: np.ndarray, grown_mm: float = 0.0, relative: float = 1.0
) -> tuple[Box, np.ndarray]:
    """Share of each voxel inside a shape, in its box, by 4 x 4 x 4 samples per voxel.

    Args:
        grown_mm: the surface moved outwards by this.
        relative: the shape made smaller by this factor first.
    """
    reach = shape.radius_mm * shape.scale * (1 + shape.heights.max() * 1.5) + abs(grown_mm)
    box = grid.box(centre_mm - reach, centre_mm + reach)
    parts = (np.arange(4) + 0.5) / 4 - 0.5
    axes = [
        (axis[:, None] + parts * step).ravel() - c
        for axis, step, c in zip((v.ravel() for v in grid.coordinates(box)), grid.step_mm, centre_mm, strict=True)
    ]
    offset = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    inside = np.linalg.norm(offset, axis=-1) < relative * shape.radius_along(offset) + grown_mm
    n, m, k = (s.stop - s.start for s in box)
    return box, inside.reshape(n, 4, m, 4, k, 4).mean(axis=(1, 3, 5)).astype(np.float32)
