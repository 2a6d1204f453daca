"""Whether the samples of a generator differ: from each other, and from the cases that it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import numpy as np

from lungddpm.quality.similarity import similarities


def nearest_case(image: np.ndarray, mask: np.ndarray, cases: Mapping[str, np.ndarray]) -> tuple[str, float]:
    """The case that is nearest to an image, by the root of the mean squared difference over some of the voxels.

    Args:
        image: (x, y, z), HU.
        mask: the voxels that count, bool, of that shape; at least one.
        cases: name -> CT of that shape, HU; at least one.

    Returns:
        (name, distance in HU).
    """
    within = image[mask].astype(np.float32)
    distances = {name: float(np.sqrt(np.mean((ct[mask] - within) ** 2))) for name, ct in cases.items()}
    nearest = min(distances, key=lambda name: distances[name])
    return nearest, distances[nearest]


def memorisation(samples: np.ndarray, real: np.ndarray) -> tuple[float, int]:
    """Whether samples lie nearer to the training cases than real cases lie to each other.

    Args:
        samples: distance of each sample to its nearest training case.
        real: the same of real cases, itself and its patient left out; at least one.

    Returns:
        Ratio of the medians (samples over real), and number of samples that are nearer than the nearest real case.
        Distance also shrinks where an image is smoother than a real one, so neither proves a copy by itself.
    """
    return float(np.median(samples) / np.median(real)), int(np.count_nonzero(samples < real.min()))


def pairwise_similarity(images: list[np.ndarray], masks: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """MS-SSIM of every two images, within each region; the lower, the more they differ.

    Args:
        images: (x, y, z) in [0, 1] each.
        masks: region name -> bool mask of that shape.
    """
    found = [similarities(first, second, masks) for first, second in combinations(images, 2)]
    return {region: [pair[region][1] for pair in found] for region in masks}
