"""Distances between two sets of CT volumes, in the features of a network: FID and MMD."""

from __future__ import annotations

import math

import numpy as np
from scipy.spatial.distance import cdist, pdist

MEDICALNET = "MedicalNet ResNet-50"
"""What tables call the feature network with its public weights."""
_ROUNDING = 1e-12
_TOO_FEW = "needs two images on each side"
_SINGULAR = "fewer images than features: biased upwards, compare with the floors only"


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """FID: the Frechet distance of two Gaussians fitted to feature vectors (Heusel et al. 2017, arXiv 1706.08500).

    |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2). With A = (X - m1) / sqrt(n1 - 1), so that S1 = A^T A, and B
    likewise, the last trace is the sum of the singular values of A B^T: the root of a singular matrix without symmetry
    need not be taken.

    Args:
        first: (n1, features), n1 >= 2; may be fewer than features.
        second: (n2, features), n2 >= 2.
    """
    mean_difference = first.mean(axis=0) - second.mean(axis=0)
    a, b = ((x - x.mean(axis=0)) / np.sqrt(len(x) - 1) for x in (first, second))
    shared, total = np.linalg.svd(a @ b.T, compute_uv=False).sum(), (a**2).sum() + (b**2).sum()
    distance = mean_difference @ mean_difference + total - 2 * shared
    # Equal sets differ by rounding, to either side.
    return float(distance) if distance > _ROUNDING * total else 0.0


def squared_mmd(first: np.ndarray, second: np.ndarray, bandwidth: float) -> float:
    """Squared maximum mean discrepancy, unbiased (Gretton et al. 2012, JMLR 13:723, eq. 3), with one Gaussian kernel.

    Its expectation is 0 for two sets from one distribution, so that single values may well be below.

    Args:
        first: (n1, features), n1 >= 2.
        second: (n2, features), n2 >= 2.
        bandwidth: s of the kernel exp(-d^2 / (2 s^2)).
    """

    def kernel(squared_distances: np.ndarray) -> float:
        return float(np.exp(-squared_distances / (2 * bandwidth**2)).mean())

    within = [kernel(pdist(x, "sqeuclidean")) for x in (first, second)]
    return sum(within) - 2 * kernel(cdist(first, second, "sqeuclidean"))


def median_distance(features: np.ndarray) -> float:
    """The median Euclidean distance between two of several feature vectors (n, features), n >= 2."""
    return float(np.median(pdist(features)))


def distances_of_sets(
    sets: dict[str, list[np.ndarray]], references: list[np.ndarray], others: list[np.ndarray], regions: tuple[str, ...]
) -> list[dict]:
    """FID and squared MMD of sets of images against the references.

    Args:
        sets: image -> (regions, features) of each volume.
        references: the same of each reference.
        others: the same of each other real case: the median distance between all real cases is the kernel's bandwidth,
            one for all sets, so that they can be compared.
        regions: their names.

    Returns:
        One dict {image, region, metric, value, n, n_real, note} a set, region and metric; the value is NaN, and the
        note says why, where a set has fewer than two images.
    """
    rows = []
    for place, region in enumerate(regions):
        real, every_real = (np.array([x[place] for x in cases]) for cases in (references, [*references, *others]))
        for image, volumes in sets.items():
            if not volumes:
                continue
            features = np.array([x[place] for x in volumes])
            values, notes = {"fid": math.nan, "mmd_squared": math.nan}, dict.fromkeys(("fid", "mmd_squared"), _TOO_FEW)
            if min(len(features), len(real)) > 1:
                bandwidth = median_distance(every_real)
                values = {
                    "fid": frechet_distance(features, real),
                    "mmd_squared": squared_mmd(features, real, bandwidth),
                }
                few = min(len(features), len(real)) <= features.shape[1]
                notes = {"fid": _SINGULAR if few else "", "mmd_squared": f"bandwidth {bandwidth:.4g}"}
            rows += [
                {"image": image, "region": region, "metric": metric, "value": value, "n": len(features)}
                | {"n_real": len(real), "note": notes[metric]}
                for metric, value in values.items()
            ]
    return rows
