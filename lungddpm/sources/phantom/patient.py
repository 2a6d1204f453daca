"""One patient: from a seed to a chest CT and its ground truth. Every part of the patient (body, scanner, vessels,
nodules, noise, marks) has its own random numbers, so that e.g. different noise does not change the anatomy."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from lungddpm.core.volume import Volume, per_axis
from lungddpm.sources.phantom.anatomy import Physique, paint_soft_tissue, parenchyma, surfaces_of
from lungddpm.sources.phantom.nodules import Nodule, paint_nodule, paint_small_nodule, place_marks, place_nodules
from lungddpm.sources.phantom.scanner import (
    HU,
    LPS_TO_RAS,
    acquire,
    field_of_view,
    paint,
    painting_grid,
    slice_means,
)
from lungddpm.sources.phantom.settings import Phantom
from lungddpm.sources.phantom.skeleton import paint_skeleton
from lungddpm.sources.phantom.vessels import paint_vessels


@dataclass(frozen=True)
class Thorax:
    """One scan and its ground truth; every array has the shape of `ct`.

    Attributes:
        ct: int16 HU, indexed (column, row, slice); the affine is RAS mm.
        lungs: bool, both lungs with the vessels and nodules inside, without trachea and main bronchi.
        vessels: bool, lung voxels at least half filled by vessels; never a nodule.
        vessel_radius_mm: float32, radius of the widest vessel that reaches into the voxel, 0 where there is none.
        nodules: at least 3 mm, mutually disjoint, inside the lungs.
        small_nodules_mm: (n, 3) RAS, centres of nodules below 3 mm, of which readers only mark the centre.
        distractors_mm: (n, 3) RAS, vessel forks that readers mark as findings other than nodules.
    """

    ct: Volume
    lungs: np.ndarray
    vessels: np.ndarray
    vessel_radius_mm: np.ndarray
    nodules: tuple[Nodule, ...]
    small_nodules_mm: np.ndarray
    distractors_mm: np.ndarray


def thorax(parameters: Phantom, seed: int) -> Thorax:
    """One patient's chest CT and its exact truth.

    Args:
        parameters: size of the scan, kernel, noise, number and size of nodules.
        seed: of this patient; equal seeds give equal scans.

    Takes about 2 s and 0.4 GB at the default size, 12 s and 1.6 GB at 320 x 320 x 200; slices thicker than the pixel
    width are painted in parts, at the cost of thin slices.
    """
    body_rng, scanner_rng, tree_rng, nodule_rng, noise_rng, mark_rng = np.random.default_rng(seed).spawn(6)
    physique = Physique.draw(body_rng)
    scan, shift_mm = field_of_view(parameters, physique.size, physique.height_mm, scanner_rng)
    grid = painting_grid(scan)
    surfaces = surfaces_of(grid, physique)

    hu = np.full(grid.shape, HU["air"], np.float32)
    paint_soft_tissue(hu, grid, physique, surfaces)
    paint_skeleton(hu, grid, physique, surfaces)
    lung_share = grid.share(surfaces.lung)
    paint(hu, lung_share, parenchyma(grid, physique, scanner_rng))
    vessel_share, vessel_radius_mm = paint_vessels(hu, grid, physique, surfaces.lung, tree_rng)

    sites = place_nodules(grid, parameters, surfaces, vessel_radius_mm, nodule_rng)
    textures = parameters.nodule_textures
    nodules = [paint_nodule(hu, grid, scan, site, lung_share, textures, nodule_rng) for site in sites]
    deep = surfaces.lung < -6
    small_nodules = place_marks(grid, deep & (vessel_radius_mm == 0), 3, sites, mark_rng)
    for centre_mm in small_nodules:
        paint_small_nodule(hu, grid, centre_mm, mark_rng)
    forks = place_marks(grid, deep & (vessel_radius_mm > 1.5), 4, sites, mark_rng)
    # Painted in parts of slices; from here on averaged over the scan's slices.
    parts = grid.shape[2] // scan.shape[2]
    widest_mm = vessel_radius_mm.reshape(*scan.shape, parts).max(axis=3)
    for nodule in nodules:
        widest_mm[nodule.mask] = 0

    def to_ras(points_mm: ArrayLike) -> np.ndarray:
        return LPS_TO_RAS * (np.asarray(points_mm) + shift_mm)

    affine = np.diag([*(LPS_TO_RAS * scan.step_mm), 1.0])
    affine[:3, 3] = to_ras(scan.first_mm)
    return Thorax(
        ct=Volume(acquire(slice_means(hu, scan), scan, parameters.kernel, parameters.noise_hu, noise_rng), affine),
        lungs=slice_means(lung_share, scan) >= 0.5,
        vessels=(slice_means(vessel_share, scan) >= 0.5) & (widest_mm > 0),
        vessel_radius_mm=widest_mm,
        nodules=tuple(replace(n, centre_mm=per_axis(map(float, to_ras(n.centre_mm)))) for n in nodules),
        small_nodules_mm=to_ras(small_nodules),
        distractors_mm=to_ras(forks),
    )
