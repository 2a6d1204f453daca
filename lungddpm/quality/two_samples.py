"""Two sets of feature vectors, image by image: is each near the other set, and can a classifier distinguish them?"""

from __future__ import annotations

import math

import numpy as np
from scipy.spatial.distance import cdist
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

NEIGHBOURS = 3
"""Neighbour that defines the radius around a vector; as published."""
FEWEST_PATIENTS = 3 * NEIGHBOURS
"""On each side: with fewer, the third nearest of the others is not near, and everything is covered."""
_FOLDS = 5


def share_within(
    points: np.ndarray, centres: np.ndarray, point_patients: list[str], centre_patients: list[str]
) -> float:
    """Share of points covered by the centres: as near to one as its third nearest other patient, or nearer.

    Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991). With synthetic images as points and real
    ones as centres it is precision: how many look real. The other way round it is recall: how much of the real
    distribution they cover. A sample is near its own reference, and samples of one reference are near each other,
    whatever the distributions. So centres of a point's own patient do not cover it, and neighbours are counted by
    patient, at their nearest image. If every image is of a patient of its own, this is the published definition.

    Args:
        points: (n, features).
        centres: (m, features).
        point_patients: of whom each point is; of a synthetic image, whose CT it was made from.
        centre_patients: likewise, more than `NEIGHBOURS` different ones.
    """
    between, of_centres = cdist(centres, centres), np.array(centre_patients)
    nearest = []
    for patient in set(centre_patients):
        own = of_centres == patient
        nearest.append(np.where(own, np.inf, between[own].min(axis=0)))
    radii = np.partition(nearest, NEIGHBOURS - 1, axis=0)[NEIGHBOURS - 1]
    of_others = np.array(point_patients)[:, None] != of_centres
    return float(((cdist(points, centres) <= radii) & of_others).any(axis=1).mean())


def classifier_auc(made: np.ndarray, real: np.ndarray, made_patients: list[str], real_patients: list[str]) -> float:
    """How well a classifier separates unseen synthetic from real images: 0.5 is chance, 1 is perfect.

    Classifier two-sample test (Lopez-Paz and Oquab 2017, arXiv 1610.06545): logistic regression on standardized
    features, its AUC. Up to five folds; images of one patient are all in one fold. Only images of one fold are compared
    with each other, as classifiers of different folds score on different scales.

    Args:
        made: (n1, features).
        real: (n2, features).
        made_patients: of whom each image is; of a made one, whose CT it was made from.
        real_patients: likewise.

    Returns:
        The share of pairs, one synthetic and one real, in which the synthetic one scores higher; NaN if a side has
        fewer than two patients.
    """
    folds = min(_FOLDS, len(set(made_patients)), len(set(real_patients)))
    if folds < 2:
        return math.nan
    features, is_made = np.concatenate([made, real]), np.repeat([1, 0], [len(made), len(real)])
    right, pairs = 0.0, 0
    for train, test in StratifiedGroupKFold(folds).split(features, is_made, [*made_patients, *real_patients]):
        in_fold = int(is_made[test].sum() * (1 - is_made[test]).sum())
        if not in_fold or len(set(is_made[train])) < 2:
            continue
        classifier = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
        scores = classifier.fit(features[train], is_made[train]).decision_function(features[test])
        right += in_fold * float(roc_auc_score(is_made[test], scores))
        pairs += in_fold
    return right / pairs if pairs else math.nan
