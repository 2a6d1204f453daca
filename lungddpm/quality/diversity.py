"""Diversity of a generator's samples: differences from each other, and from its training cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import cc3d
import numpy as np

from lungddpm.core.volume import per_axis
from lungddpm.quality.similarity import WINDOW, n_scales, similarities


def nearest_case(image: np.ndarray, mask: np.ndarray, cases: Mapping[str, np.ndarray]) -> tuple[str, float]:
    """The case nearest to an image, by root mean squared difference over some of the voxels.

    Args:
        image: (x, y, z), HU.
        mask: the voxels to compare, bool, of that shape; at least one.
        cases: name -> CT of that shape, HU; at least one.

    Returns:
        (name, distance in HU).
    """
    within = image[mask].astype(np.float32)
    distances = {name: float(np.sqrt(np.mean((ct[mask] - within) ** 2))) for name, ct in cases.items()}
    nearest = min(distances, key=lambda name: distances[name])
    return nearest, distances[nearest]


@dataclass(frozen=True)
class Nearness:
    """Nearness of samples to training cases, relative to that of real cases of other patients.

    None of the figures proves or excludes a copy. Distance also shrinks if an image is smoother than a real one: with
    cases that are equal on average, one without any texture is 1 / sqrt 2 times as far as a real one. The ratio of the
    medians does not react to a few copies among many samples; the others do, but the smallest of many distances is also
    small by chance. A shifted or brightened copy escapes all of them.
    """

    ratio: float
    """Of the medians, samples over real cases."""
    smallest_ratio: float
    """Of the smallest distances."""
    n_nearer: int
    """Samples that are nearer than the nearest real case."""


def memorisation(samples: np.ndarray, real: np.ndarray) -> Nearness:
    """Compare the distances of samples to the training cases with those between real cases.

    Args:
        samples: distance of each sample to its nearest training case; at least one.
        real: the same for real cases, itself and its patient left out; at least one.
    """
    nearer = int(np.count_nonzero(samples < real.min()))
    return Nearness(float(np.median(samples) / np.median(real)), float(samples.min() / real.min()), nearer)


@dataclass(frozen=True)
class NoduleDraws:
    """Differences of one nodule of a layout between draws."""

    voxel_sd: float
    """Root of the variance over draws, averaged over its voxels."""
    mean_sd: float
    """Standard deviation over draws of its mean."""
    similarities: list[float]
    """MS-SSIM within it, of every two draws."""
    scales: int
    """Of MS-SSIM; with one it is SSIM."""


def compare_draws(images: Sequence[np.ndarray], nodules: np.ndarray) -> list[NoduleDraws]:
    """Differences between several draws of one layout in each of its nodules (26-connected components).

    Similarity is computed in a box that contains the nodule and its SSIM windows, so that the coarser scales of MS-SSIM
    do not compare distant surroundings. Small nodules allow one scale.

    Args:
        images: (x, y, z) each, in [0, 1]; at least two.
        nodules: bool, of that shape.
    """
    numbers = cc3d.connected_components(nodules, connectivity=26)
    boxes = cc3d.statistics(numbers)["bounding_boxes"][1:]
    return [_compare_nodule(images, numbers == number, box) for number, box in enumerate(boxes, start=1)]


def _compare_nodule(images: Sequence[np.ndarray], nodule: np.ndarray, box: Sequence[slice]) -> NoduleDraws:
    values = np.array([image[nodule] for image in images], np.float64)
    around = per_axis(_seen_from(side, size) for side, size in zip(box, nodule.shape, strict=True))
    within = pairwise_similarity([image[around] for image in images], {"nodule": nodule[around]})["nodule"]
    scales = n_scales(nodule[around].shape)
    voxel_sd = float(np.sqrt(values.var(axis=0, ddof=1).mean()))
    return NoduleDraws(voxel_sd, float(values.mean(axis=1).std(ddof=1)), within, scales)


def _seen_from(side: slice, size: int) -> slice:
    """The extent of the SSIM windows around a part of an axis, within the axis; at least one window long."""
    low, high = max(int(side.start) - WINDOW // 2, 0), min(int(side.stop) + WINDOW // 2, size)
    return slice(max(min(low, size - WINDOW), 0), max(high, min(WINDOW, size)))


def pairwise_similarity(images: Sequence[np.ndarray], masks: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """MS-SSIM of every two images, within each region; lower means more different.

    Args:
        images: (x, y, z) in [0, 1] each.
        masks: region name -> bool mask of that shape.
    """
    found = [similarities(first, second, masks) for first, second in combinations(images, 2)]
    return {region: [pair[region][1] for pair in found] for region in masks}
