"""Distances between two sets of CT volumes in the features of a network: FID, MMD, KID, and those of `two_samples`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from scipy.spatial.distance import cdist, pdist

from lungddpm.core.text import plural

MEDICALNET = "MedicalNet ResNet-50"
"""Name in tables of the feature network with its public weights."""
_ROUNDING = 1e-12
_TOO_FEW = "needs two images on each side"
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


def squared_mmd(
    first: np.ndarray, second: np.ndarray, bandwidth: float, first_patients: list[str], second_patients: list[str]
) -> float:
    """Squared maximum mean discrepancy, unbiased (Gretton et al. 2012, JMLR 13:723, eq. 3), with one Gaussian kernel.

    Its expectation is 0 for two sets from the same distribution, so single values may be negative. Only pairs of images
    of different patients count, within and between the sets; see `kernel_distance`.

    Args:
        first: (n1, features).
        second: (n2, features).
        bandwidth: s of the kernel exp(-d^2 / (2 s^2)).
        first_patients: of whom each image is; of a synthetic one, whose CT it was made from.
        second_patients: likewise.

    Returns:
        NaN if a side has fewer than two patients.
    """

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.exp(-cdist(x, y, "sqeuclidean") / (2 * bandwidth**2))

    matrices = kernel(first, first), kernel(second, second), kernel(first, second)
    return _PairSums.of(*matrices, first_patients, second_patients).discrepancy()


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

    Unlike that of FID, its expectation does not depend on the numbers of images. All pairs of images of different
    patients are used, not random blocks. A sample and its reference are not independent, so their pair, and pairs of
    samples of one reference, would bias it: a generator whose samples have the distribution of the references, but are
    like their own, would get a distance far below 0. Without shared patients, this is the usual estimate.

    The standard error is a jackknife over patients: each is left out once, with all images on both sides, because
    images of one patient are similar. If both sets are from the same distribution, it is too large.

    Args:
        first: (n1, features).
        second: (n2, features).
        first_patients: of whom each image is; of a synthetic one, whose CT it was made from.
        second_patients: likewise.

    Returns:
        (distance, standard error); the former is NaN if a side has fewer than two patients, the latter if it has after
        leaving one out.
    """

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    sums = _PairSums.of(
        kernel(first, first), kernel(second, second), kernel(first, second), first_patients, second_patients
    )
    left = sums.discrepancies_without_each()
    return sums.discrepancy(), math.sqrt((len(left) - 1) * float(np.var(left)))


@dataclass(frozen=True)
class _PairSums:
    """Kernel values of pairs of images, added up by patient; pairs of one patient are left out.

    Attributes:
        values: (3, patients, patients): within the first set, within the second, between them.
        pairs: their numbers, same shape.
    """

    values: np.ndarray
    pairs: np.ndarray

    @classmethod
    def of(
        cls,
        within_first: np.ndarray,
        within_second: np.ndarray,
        across: np.ndarray,
        first_patients: list[str],
        second_patients: list[str],
    ) -> _PairSums:
        """From the kernel's values: (n1, n1), (n2, n2) and (n1, n2)."""
        patients = np.array(sorted({*first_patients, *second_patients}))
        a, b = ((patients[:, None] == np.array(names)).astype(float) for names in (first_patients, second_patients))
        values = np.array([a @ within_first @ a.T, b @ within_second @ b.T, a @ across @ b.T])
        pairs = np.array([np.outer(x.sum(axis=1), y.sum(axis=1)) for x, y in ((a, a), (b, b), (a, b))])
        different = ~np.eye(len(patients), dtype=bool)
        return cls(values * different, pairs * different)

    def discrepancy(self) -> float:
        """The unbiased estimate; NaN if one of its terms has no pair."""
        return float(_discrepancy(self.values.sum(axis=(1, 2)), self.pairs.sum(axis=(1, 2))))

    def discrepancies_without_each(self) -> np.ndarray:
        """(patients,): the estimate without all pairs of a patient."""
        left = [
            table.sum(axis=(1, 2))[:, None] - table.sum(axis=1) - table.sum(axis=2)
            for table in (self.values, self.pairs)
        ]
        return _discrepancy(*left)


def _discrepancy(values: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """From sums over pairs, (3, ...) as in `_PairSums`."""
    of_first, of_second, across = values / np.where(pairs, pairs, np.nan)
    found = of_first + of_second - 2 * across
    # Equal sets differ by rounding, in either direction.
    return np.where(np.abs(found) <= _ROUNDING * (np.abs(of_first) + np.abs(of_second)), 0.0, found)


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
            patients = volumes.patients, references.patients
            found = _moments(made, real) | _pairs(made, real, every_real, *patients) | _samples(made, real, *patients)
            rows += [
                {"image": image, "region": region, "metric": metric, "value": one.value}
                | {"standard_error": one.standard_error, "n": len(made), "n_real": len(real), "note": one.note}
                for metric, one in found.items()
            ]
    return rows


def _moments(made: np.ndarray, real: np.ndarray) -> dict[str, _Measured]:
    """FID."""
    if min(len(made), len(real)) < 2:
        return {"fid": _Measured(math.nan, _TOO_FEW)}
    few = min(len(made), len(real)) <= made.shape[1]
    return {"fid": _Measured(frechet_distance(made, real), _SINGULAR if few else "")}


def _pairs(
    made: np.ndarray, real: np.ndarray, every_real: np.ndarray, made_patients: list[str], real_patients: list[str]
) -> dict[str, _Measured]:
    """Squared MMD and KID."""
    if min(len(set(made_patients)), len(set(real_patients))) < 2:
        return dict.fromkeys(("mmd_squared", "kid"), _Measured(math.nan, _TOO_FEW_PATIENTS))
    bandwidth = median_distance(every_real)
    mmd = squared_mmd(made, real, bandwidth, made_patients, real_patients)
    kid, standard_error = kernel_distance(made, real, made_patients, real_patients)
    return {
        "mmd_squared": _Measured(mmd, f"bandwidth {bandwidth:.4g}"),
        "kid": _Measured(kid, "standard error: patients left out in turn", standard_error),
    }


def _samples(
    made: np.ndarray, real: np.ndarray, made_patients: list[str], real_patients: list[str]
) -> dict[str, _Measured]:
    """Precision, recall, and the AUC of a classifier."""
    # They import scikit-learn, which is not needed for reading the results.
    from lungddpm.quality.two_samples import FEWEST_PATIENTS, NEIGHBOURS, classifier_auc, share_within

    of_made, of_real = (made, made_patients), (real, real_patients)
    found: dict[str, _Measured] = {}
    enough = min(len(set(made_patients)), len(set(real_patients))) >= FEWEST_PATIENTS
    note = f"{NEIGHBOURS} neighbours" if enough else f"needs {plural(FEWEST_PATIENTS, 'patient')} on each side"
    for metric, (points, of_points), (centres, of_centres) in (
        ("feature_precision", of_made, of_real), ("feature_recall", of_real, of_made),
    ):  # fmt: skip
        share = share_within(points, centres, of_points, of_centres) if enough else math.nan
        found[metric] = _Measured(share, note)
    auc = classifier_auc(made, real, made_patients, real_patients)
    return found | {"classifier_auc": _Measured(auc, _TOO_FEW_PATIENTS if math.isnan(auc) else "")}
