"""Lesions found and false positives of one case: connected components of the masks, and candidates with scores.

Two views of the same prediction. The mask shows which lesions a reader of the mask would see. The probabilities give
candidates: regions that may be a nodule, with a confidence, from which FROC is computed (see `froc`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import cc3d
import numpy as np
from scipy import ndimage, spatial

from lungddpm.core.cases import ADDED, RATINGS
from lungddpm.core.extent import extent_of
from lungddpm.core.volume import Volume, per_axis

SIZE_BINS = ("< 6 mm", "6-10 mm", "> 10 mm")
SIZE_COLUMNS = dict(zip(SIZE_BINS, ("below_6_mm", "6_to_10_mm", "above_10_mm"), strict=True))
"""The size bins in column names."""
TEXTURES = ("ground glass", "part-solid", "solid")
"""By the rating of texture: 1 ground glass, 3 part-solid, 5 solid."""
TEXTURE_COLUMNS = dict(zip(TEXTURES, ("ground_glass", "part_solid", "solid"), strict=True))
"""The textures in column names."""
CANDIDATE_PROBABILITY = 0.1
"""A candidate is a connected region of at least this probability: low, so that lesions missing from a mask at 0.5 can
be found at a lower score; not lower, so that neighbours do not merge."""
_TOUCHING = 26


@dataclass(frozen=True)
class Lesion:
    """One connected component of the reference mask."""

    diameter_mm: float
    """Diameter of the sphere of equal volume."""
    overlap: float
    """Share of the lesion's voxels that the prediction covers."""
    long_axis_mm: float = math.nan
    """See `extent.Extent`, also for the next two."""
    short_axis_mm: float = math.nan
    elongation: float = math.nan
    score: float = math.nan
    """Highest score of the candidates that hit it; NaN if none does, or without probabilities."""

    @property
    def found(self) -> bool:
        """Overlap matching: one predicted voxel within the lesion is enough."""
        return self.overlap > 0

    @property
    def size_bin(self) -> str:
        """One of `SIZE_BINS`; 6 and 10 mm themselves belong to the middle one."""
        return SIZE_BINS[int(self.diameter_mm >= 6) + int(self.diameter_mm > 10)]


@dataclass(frozen=True)
class RatedNodule:
    """A nodule of a layout: a real one, or one that has its shape.

    Attributes:
        position_mm: of its centroid, RAS.
        volume_mm3: its volume.
        ratings: `RATINGS` of the real nodule, medians over its readers; None if not rated.
    """

    position_mm: tuple[float, float, float]
    volume_mm3: float
    ratings: Mapping[str, float | None]


@dataclass(frozen=True)
class Candidate:
    """One connected region that may be a nodule."""

    score: float
    """Highest probability in it, between 0 and 1."""
    volume_mm3: float
    lesions: tuple[int, ...]
    """Numbers of the lesions, from 1, that it shares a voxel with; empty for a false positive."""


@dataclass(frozen=True)
class Detection:
    """Lesion-wise agreement of one case."""

    lesions: list[Lesion]
    n_false_positives: int
    """Connected components of the predicted mask that touch no lesion."""
    candidates: list[Candidate] | None
    """None without probabilities."""


def lesion_measures(
    reference: np.ndarray, prediction: np.ndarray, spacing_mm: np.ndarray, probability: np.ndarray | None = None
) -> Detection:
    """Lesion-wise agreement of a reference with a prediction; lesions are 26-connected components.

    Args:
        reference: bool, (x, y, z).
        prediction: bool, same shape.
        spacing_mm: of the voxels, (3,).
        probability: of nodule, 0 to 1, same shape.
    """
    voxel_mm3 = float(np.prod(spacing_mm))
    numbers, n_lesions = cc3d.connected_components(reference, connectivity=_TOUCHING, return_N=True)
    n_voxels = np.bincount(numbers.ravel(), minlength=n_lesions + 1)[1:]
    n_covered = np.bincount(numbers[prediction], minlength=n_lesions + 1)[1:]
    components, n_components = cc3d.connected_components(prediction, connectivity=_TOUCHING, return_N=True)
    n_matched = np.count_nonzero(np.unique(components[reference]))
    candidates = None if probability is None else find_candidates(numbers, probability, voxel_mm3)
    scores = np.full(n_lesions, math.nan)
    for candidate in candidates or ():
        for number in candidate.lesions:
            scores[number - 1] = np.fmax(scores[number - 1], candidate.score)
    extents = [
        extent_of(numbers[box] == number, spacing_mm)
        for number, box in enumerate(ndimage.find_objects(numbers.astype(np.int32)), start=1)
    ]
    lesions = [
        Lesion((6 * voxels * voxel_mm3 / math.pi) ** (1 / 3), covered / voxels, **asdict(extent), score=score)
        for voxels, covered, extent, score in zip(
            n_voxels.tolist(), n_covered.tolist(), extents, scores.tolist(), strict=True
        )
    ]
    return Detection(lesions, n_components - n_matched, candidates)


def nodules_of_case(figures: Sequence[Mapping[str, Any]]) -> list[RatedNodule]:
    """The nodules of a real case.

    Args:
        figures: `CaseFolder.nodule_figures`.
    """
    return [_rated(nodule, [nodule[f"centroid_{axis}_mm"] for axis in "xyz"], nodule) for nodule in figures]


def nodules_of_sample(
    record: Mapping[str, Any], reference: Sequence[Mapping[str, Any]], *, own_layout: bool
) -> list[RatedNodule]:
    """The nodules of a synthetic case: its reference's own if they are still there, and those that were placed.

    Args:
        record: its `sample.json`.
        reference: figures of the reference's nodules, see `nodules_of_case`; empty if there is none.
        own_layout: it has the layout of its reference.
    """
    own = nodules_of_case(reference) if own_layout or record.get("layout_origin") == ADDED else []
    placed = [_rated(nodule, nodule["position_mm"], nodule.get("ratings", {})) for nodule in record.get("nodules", [])]
    return [*own, *placed]


def _rated(nodule: Mapping[str, Any], position_mm: Iterable[float], ratings: Mapping[str, Any]) -> RatedNodule:
    return RatedNodule(per_axis(position_mm), nodule["volume_mm3"], {name: ratings.get(name) for name in RATINGS})


def ratings_of(reference: Volume, nodules: Iterable[RatedNodule]) -> list[dict[str, float | None]]:
    """The readers' ratings of each lesion: `RATINGS`, each None if not rated.

    A nodule is the lesion that its position is in, or next to, within the diagonal of a voxel: positions are rounded,
    or lie in the hollow of a nodule. Nodules that merged on the grid are one lesion, which has the ratings of
    the largest.

    Args:
        reference: bool; its lesions are numbered as by `lesion_measures`.
        nodules: of that layout, as far as they are known.
    """
    numbers, n_lesions = cc3d.connected_components(reference.array, connectivity=_TOUCHING, return_N=True)
    ratings: list[dict[str, float | None]] = [dict.fromkeys(RATINGS) for _ in range(n_lesions)]
    if not n_lesions:
        return ratings
    places = np.argwhere(numbers)
    nearest = spatial.KDTree(places @ reference.affine[:3, :3].T + reference.affine[:3, 3])
    diagonal_mm = float(np.linalg.norm(reference.spacing_mm))
    for nodule in sorted(nodules, key=lambda nodule: nodule.volume_mm3):
        apart_mm, at = nearest.query(nodule.position_mm)
        if apart_mm <= diagonal_mm:
            ratings[numbers[tuple(places[at])] - 1] = dict(nodule.ratings)
    return ratings


def texture_class(rating: float | None) -> str:
    """One of `TEXTURES` for a median rating from 1 to 5, of which 3 is part-solid; empty if not rated."""
    if rating is None or math.isnan(rating):
        return ""
    return TEXTURES[int(rating >= 2.5) + int(rating > 3.5)]


def find_candidates(lesions: np.ndarray, probability: np.ndarray, voxel_mm3: float) -> list[Candidate]:
    """26-connected regions of at least `CANDIDATE_PROBABILITY`, and the lesions that each of them hits.

    Args:
        lesions: number of the lesion in each voxel, 0 for none, (x, y, z).
        probability: of nodule, 0 to 1, same shape.
        voxel_mm3: volume of a voxel in mm3.
    """
    likely = probability >= CANDIDATE_PROBABILITY
    regions, n_regions = cc3d.connected_components(likely, connectivity=_TOUCHING, return_N=True)
    of_voxel = regions[likely]
    n_voxels = np.bincount(of_voxel, minlength=n_regions + 1)
    scores = np.zeros(n_regions + 1)
    np.maximum.at(scores, of_voxel, probability[likely])
    hits: list[list[int]] = [[] for _ in range(n_regions + 1)]
    hit = likely & (lesions > 0)
    for region, lesion in np.unique(np.stack([regions[hit], lesions[hit]], axis=1), axis=0).tolist():
        hits[region].append(lesion)
    return [
        Candidate(float(scores[region]), float(n_voxels[region] * voxel_mm3), tuple(hits[region]))
        for region in range(1, n_regions + 1)
    ]
