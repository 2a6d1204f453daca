"""Prior for nodule positions in real lungs: learned from the cases' layouts, applied to layouts that get new nodules.

A position is described by its distances to the lungs' surface and to the nearest vessel and by its height. The prior is
the ratio of the nodules found at such positions to the number expected if nodules were uniformly distributed in the
lungs (a relative risk, as in case-control studies), so that it carries over to lungs of another form.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from lungddpm.core.labels import Label
from lungddpm.core.volume import Volume, bounding_box

SURFACE_MM = (3.0, 6.0, 10.0, 15.0, 25.0)
VESSEL_MM = (2.0, 5.0, 8.0, 12.0)
HEIGHTS = (0.2, 0.4, 0.6, 0.8)
"""Upper edges of the bins; the last bin of each feature is open."""
BINS = (len(SURFACE_MM) + 1, len(VESSEL_MM) + 1, len(HEIGHTS) + 1)
_FARTHEST_MM = 100.0
"""Used as the distance to a vessel in a layout without vessels."""
_SHARE_IN_LUNGS = 0.5
_BANDWIDTH_BINS = 1.6
"""Standard deviation of the smoothing for one nodule, about the spread of a feature over its bins; it shrinks with the
number n of nodules as n^(-1/7) (Scott, Multivariate Density Estimation, 1992, section 6.3, for three features)."""
_PSEUDO_NODULES = 0.06
"""Added to the found and expected counts of every bin, so that few nodules give a soft prior: about one nodule, spread
over the kernel's bins."""


@dataclass(frozen=True)
class Places:
    """The features of every voxel in the box around the lungs.

    Attributes:
        box: around both lungs.
        inside: bool, lung, vessel or nodule.
        surface_mm: from the voxel's centre to the centre of the nearest voxel outside the lungs; 0 outside.
        vessel_mm: likewise to the nearest vessel.
        height: share of the lungs' volume that lies lower, one value per slice of the box. Unlike a height in mm
            over the lowest voxel, it does not depend on how deep the recesses reach, and lungs fill all heights evenly.
    """

    box: tuple[slice, slice, slice]
    inside: np.ndarray
    surface_mm: np.ndarray
    vessel_mm: np.ndarray
    height: np.ndarray

    def bins(self) -> np.ndarray:
        """Flat index into `BINS` of every voxel of the box."""
        parts = (
            np.searchsorted(SURFACE_MM, self.surface_mm, side="right"),
            np.searchsorted(VESSEL_MM, self.vessel_mm, side="right"),
            np.broadcast_to(np.searchsorted(HEIGHTS, self.height, side="right"), self.inside.shape),
        )
        return np.ravel_multi_index(parts, BINS)


def places_of(layout: Volume) -> Places:
    """The features of every position in a layout's lungs; the layout must have a lung voxel."""
    lungs = layout.array != Label.BACKGROUND
    box = bounding_box(lungs)
    inside = lungs[box]
    within = (slice(1, -1),) * 3
    surface_mm = ndimage.distance_transform_edt(np.pad(inside, 1), layout.spacing_mm)[within]
    vessels = layout.array[box] == Label.VESSEL
    vessel_mm = np.full(inside.shape, _FARTHEST_MM)
    if vessels.any():
        vessel_mm = ndimage.distance_transform_edt(~vessels, layout.spacing_mm)
    in_slice = np.count_nonzero(inside, axis=(0, 1))
    height = (np.cumsum(in_slice) - in_slice / 2) / in_slice.sum()
    return Places(box, inside, surface_mm, vessel_mm, height)


def lies_in_lungs(nodule: dict) -> bool:
    """Whether a nodule of `case.json`'s `qc` is in the lungs, rather than in the mediastinum or the chest wall."""
    return nodule["share_in_or_touching_lungs"] >= _SHARE_IN_LUNGS


def measure_places(layout: Volume, nodules: Sequence[dict]) -> dict:
    """The data of one case for the prior, JSON-like.

    Args:
        layout: uint8 `Label`, with lungs.
        nodules: as in `case.json`'s `qc`.

    Returns:
        `lung_voxels`: lung voxels in each bin, flat in the order of `BINS`; `nodules`: the three features at the
        centroid of each nodule in the lungs.
    """
    places = places_of(layout)
    counts = np.bincount(places.bins()[places.inside], minlength=np.prod(BINS))
    first = [side.start for side in places.box]
    last = np.array(places.inside.shape) - 1
    features = []
    for nodule in filter(lies_in_lungs, nodules):
        centroid_mm = [nodule[f"centroid_{axis}_mm"] for axis in "xyz"]
        voxel = np.rint(np.linalg.solve(layout.affine, [*centroid_mm, 1])[:3]).astype(int)
        i, j, k = np.clip(voxel - first, 0, last)
        features.append(
            {
                "surface_mm": round(float(places.surface_mm[i, j, k]), 2),
                "vessel_mm": round(float(places.vessel_mm[i, j, k]), 2),
                "height": round(float(places.height[k]), 4),
            }
        )
    return {"lung_voxels": counts.tolist(), "nodules": features}


@dataclass(frozen=True)
class Prior:
    """Relative probability of a nodule in each bin, compared with the average over the lungs; all 1 is flat."""

    ratio: np.ndarray
    """Of shape `BINS`, positive."""

    @classmethod
    def learn(cls, measures: Iterable[dict]) -> Prior:
        """The prior of some cases, each described by `measure_places`; flat if they have no nodules.

        Cases are weighted by their number of nodules, both in the found and in the expected counts.
        """
        found, expected = np.zeros(BINS), np.zeros(BINS)
        for case in measures:
            for nodule in case["nodules"]:
                found[
                    np.searchsorted(SURFACE_MM, nodule["surface_mm"], side="right"),
                    np.searchsorted(VESSEL_MM, nodule["vessel_mm"], side="right"),
                    np.searchsorted(HEIGHTS, nodule["height"], side="right"),
                ] += 1
            lung = np.reshape(case["lung_voxels"], BINS)
            expected += len(case["nodules"]) * lung / lung.sum()
        sigma = _BANDWIDTH_BINS * max(found.sum(), 1) ** (-1 / 7)
        # Mass smoothed beyond the edge of the histogram is lost from both counts alike, so the ratio is not biased
        # there.
        found, expected = (ndimage.gaussian_filter(counts, sigma, mode="constant") for counts in (found, expected))
        return cls((found + _PSEUDO_NODULES) / (expected + _PSEUDO_NODULES))

    def weights(self, layout: Volume) -> np.ndarray:
        """Relative probability of a nodule's centre at every voxel: float, 0 outside the lungs."""
        places = places_of(layout)
        weights = np.zeros(layout.shape)
        weights[places.box] = np.where(places.inside, self.ratio.flat[places.bins()], 0.0)
        return weights
