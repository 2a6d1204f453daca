"""Distances between two sets of CT volumes in the features of a network: FID, MMD, KID, and those of `two_samples`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from scipy.spatial.distance import cdist, pdist

MEDICALNET = "MedicalNet ResNet-50"
"""Name in tables of the feature network with its public weights."""
_ROUNDING = 1e-12
_TOO_FEW = "needs two images on each side"
_TOO_FEW_NEIGHBOURS = "needs four images on each side"
_TOO_FEW_PATIENTS = "needs two patients on each side"
_SINGULAR = "fewer images than features: biased upwards, compare with the floors only"


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """FID: the Frechet distance of two Gaussians fitted to feature vectors (Heusel et al. 2017, arXiv 1706.08500).

    |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2). With A = (X - m1) / sqrt(n1 - 1), so that S1 = A^T A, and B
    likewise, the last trace is the sum of the singular values of A B^T: this avoids the root of a singular,
    non-symmetric matrix.

    Args:
        first: (n1, features), n1 >= 2; may be fewer than features.
        second: (n2, features), n2 >= 2.
    """
    mean_difference = first.mean(axis=0) - second.mean(axis=0)
    a, b = ((x - x.mean(axis=0)) / np.sqrt(len(x) - 1) for x in (first, second))
    shared, total = np.linalg.svd(a @ b.T, compute_uv=False).sum(), (a**2).sum() + (b**2).sum()
    distance = mean_difference @ mean_difference + total - 2 * shared
    # Equal sets differ by rounding, in either direction.
    return float(distance) if distance > _ROUNDING * total else 0.0


def squared_mmd(first: np.ndarray, second: np.ndarray, bandwidth: float) -> float:
    """Squared maximum mean discrepancy, unbiased (Gretton et al. 2012, JMLR 13:723, eq. 3), with one Gaussian kernel.

    Its expectation is 0 for two sets from the same distribution, so single values may be negative.

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


@dataclass(frozen=True)
class ImageSet:
    """Features of several images, and their patients.

    Attributes:
        features: (regions, features) of each.
        patients: a name for each; images of one patient are not independent of each other.
    """

    features: list[np.ndarray] = field(default_factory=list)
    patients: list[str] = field(default_factory=list)

    def add(self, features: np.ndarray, patient: str) -> None:
        """One more image."""
        self.features.append(features)
        self.patients.append(patient)

    def of_region(self, place: int) -> np.ndarray:
        """(images, features) of one region."""
        return np.array([each[place] for each in self.features])


def kernel_distance(
    first: np.ndarray, second: np.ndarray, first_patients: list[str], second_patients: list[str]
) -> tuple[float, float]:
    """KID: the squared MMD, unbiased, with the kernel (x y / features + 1)^3 (Binkowski et al. 2018, arXiv 1801.01401).

    Unlike that of FID, its expectation does not depend on the numbers of images. All pairs of images are used, not
    random blocks. The standard error is a jackknife over patients: each is left out once, with all images on both
    sides, because images of one patient are similar. If both sets are from the same distribution, it is too large.

    Args:
        first: (n1, features), n1 >= 2.
        second: (n2, features), n2 >= 2.
        first_patients: of whom each image is.
        second_patients: likewise.

    Returns:
        (distance, standard error); the latter is NaN if leaving out a patient leaves fewer than two images on a side.
    """

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    matrices = kernel(first, first), kernel(second, second), kernel(first, second)
    named = np.array(first_patients), np.array(second_patients)
    patients = sorted({*first_patients, *second_patients})
    left = [_of_pairs(*matrices, *(names != patient for names in named)) for patient in patients]
    spread = (len(left) - 1) * float(np.var(left)) if len(left) > 1 else math.nan
    everybody = (np.ones(len(names), bool) for names in named)
    return _of_pairs(*matrices, *everybody), math.sqrt(spread)


def _of_pairs(
    within_first: np.ndarray, within_second: np.ndarray, across: np.ndarray, in_first: np.ndarray, in_second: np.ndarray
) -> float:
    """The unbiased estimate from the kernel's values, over some of the images on either side."""
    if min(in_first.sum(), in_second.sum()) < 2:
        return math.nan
    within = 0.0
    for matrix, chosen in ((within_first, in_first), (within_second, in_second)):
        number, pairs = int(chosen.sum()), matrix[np.ix_(chosen, chosen)]
        within += float(pairs.sum() - pairs.trace()) / (number * (number - 1))
    return within - 2 * float(across[np.ix_(in_first, in_second)].mean())


@dataclass(frozen=True)
class _Measured:
    """A figure of two sets, with remarks."""

    value: float
    note: str
    standard_error: float = math.nan


def distances_of_sets(
    sets: dict[str, ImageSet], references: ImageSet, others: ImageSet, regions: tuple[str, ...]
) -> list[dict]:
    """Distances of sets of images to the references: FID, squared MMD, KID, precision, recall, and a classifier's AUC.

    Args:
        sets: image -> its volumes.
        references: the real cases that they are compared with.
        others: all other real cases: the median distance between all real cases is the bandwidth of MMD's kernel, one
            for all sets, so that they can be compared.
        regions: their names.

    Returns:
        One dict {image, region, metric, value, standard_error, n, n_real, note} a set, region and metric; the value is
        NaN, with the reason in the note, if a set has too few images.
    """
    rows = []
    for place, region in enumerate(regions):
        real = references.of_region(place)
        every_real = np.array([each[place] for each in [*references.features, *others.features]])
        for image, volumes in sets.items():
            if not volumes.features:
                continue
            made = volumes.of_region(place)
            found = _moments(made, real, every_real) | _samples(made, real, volumes.patients, references.patients)
            rows += [
                {"image": image, "region": region, "metric": metric, "value": one.value}
                | {"standard_error": one.standard_error, "n": len(made), "n_real": len(real), "note": one.note}
                for metric, one in found.items()
            ]
    return rows


def _moments(made: np.ndarray, real: np.ndarray, every_real: np.ndarray) -> dict[str, _Measured]:
    """FID and squared MMD."""
    if min(len(made), len(real)) < 2:
        return dict.fromkeys(("fid", "mmd_squared"), _Measured(math.nan, _TOO_FEW))
    bandwidth, few = median_distance(every_real), min(len(made), len(real)) <= made.shape[1]
    return {
        "fid": _Measured(frechet_distance(made, real), _SINGULAR if few else ""),
        "mmd_squared": _Measured(squared_mmd(made, real, bandwidth), f"bandwidth {bandwidth:.4g}"),
    }


def _samples(
    made: np.ndarray, real: np.ndarray, made_patients: list[str], real_patients: list[str]
) -> dict[str, _Measured]:
    """KID, precision, recall, and the AUC of a classifier."""
    # They import scikit-learn, which is not needed for reading the results.
    from lungddpm.quality.two_samples import NEIGHBOURS, classifier_auc, share_within

    found = {"kid": _Measured(math.nan, _TOO_FEW)}
    if min(len(made), len(real)) > 1:
        kid, standard_error = kernel_distance(made, real, made_patients, real_patients)
        found["kid"] = _Measured(kid, "standard error: patients left out in turn", standard_error)
    enough = min(len(made), len(real)) > NEIGHBOURS
    for metric, points, centres in (("feature_precision", made, real), ("feature_recall", real, made)):
        share = share_within(points, centres) if enough else math.nan
        found[metric] = _Measured(share, f"{NEIGHBOURS} neighbours" if enough else _TOO_FEW_NEIGHBOURS)
    auc = classifier_auc(made, real, made_patients, real_patients)
    return found | {"classifier_auc": _Measured(auc, _TOO_FEW_PATIENTS if math.isnan(auc) else "")}
