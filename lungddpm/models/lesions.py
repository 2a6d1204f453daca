"""Networks that draw only nodules: their condition and their training (LeFusion, arXiv 2403.14066).

Besides the noisy crop, such a network sees where the nodule is, and its histogram: the shares of its voxels in `BINS`
bins of equal width over the model's range [-1, 1], that is over `grid.window_hu`. Each bin is a channel that is
constant within the nodule. So the network is that of the other generators with more channels, and the histogram reaches
every voxel of the nodule in the first layer. Cross attention would need another network, and sits at levels where a
nodule of a few voxels almost disappears.

The histograms to draw with are those of the nodules that the network was trained on, stored with its weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from lungddpm.core.errors import InputError
from lungddpm.core.labels import Label
from lungddpm.core.volume import Window, to_model_range
from lungddpm.models.checkpoint import read_metadata
from lungddpm.models.objectives import ERRORS, DiffusionLoss, Loss
from lungddpm.models.recipe import Batch, Network
from lungddpm.models.sampling import Solver, sample_aas

BINS = 16
_KEPT = "nodules"
_SIMILAR = 2.0
_NEIGHBOURS = np.ones((3, 3, 3))


@dataclass(frozen=True)
class DiscoveryNodule:
    """A nodule that a network was trained on.

    Attributes:
        case_id: its case.
        number: which of the case's nodules in the layout, from 1.
        counts: its voxels in each bin, on the model grid.
    """

    case_id: str
    number: int
    counts: tuple[int, ...]

    @property
    def voxels(self) -> int:
        """Its number of voxels."""
        return sum(self.counts)

    @property
    def histogram(self) -> list[float]:
        """The share of its voxels in each bin."""
        return [count / self.voxels for count in self.counts]


class LesionError:
    """The mean error in the nodule and one voxel around it; each sample counts the same, whatever the size of its
    nodule.

    Args:
        loss: per voxel.
    """

    def __init__(self, loss: Loss):
        self.error = ERRORS[loss]

    def __call__(self, predicted: torch.Tensor, target: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """A scalar, from tensors (N, 1, D, H, W) and the condition (N, 1 + C, D, H, W), the nodule first."""
        near = F.max_pool3d(condition[:, :1], 3, stride=1, padding=1) > 0
        # Selected, not multiplied: predictions elsewhere may be infinite or NaN.
        error = torch.where(near, self.error(predicted.float(), target, reduction="none"), 0)
        return (error.flatten(1).sum(dim=1) / near.flatten(1).sum(dim=1).clamp(min=1)).mean()


class LesionLoss(DiffusionLoss):
    """A diffusion model's loss, with the histogram of each sample's nodule in the condition: its layout shows one only,
    see `Recipe.one_nodule`."""

    def loss(self, network: Network, batch: Batch) -> torch.Tensor:
        """See `Objective.loss`; the batch's condition is the nodule alone."""
        histograms = histograms_of(batch.clean, batch.condition > 0)
        return super().loss(network, replace(batch, condition=show(batch.condition, histograms)))


def count_bins(clean: torch.Tensor, nodule: torch.Tensor) -> torch.Tensor:
    """How many nodule voxels fall in each bin.

    Args:
        clean: (N, ...) CT in [-1, 1].
        nodule: bool, same shape.

    Returns:
        (N, BINS) float32.
    """
    bins = ((clean + 1) * (BINS / 2)).long().clamp(0, BINS - 1)
    counts = torch.zeros(len(clean), BINS, device=clean.device)
    return counts.scatter_add_(1, bins.flatten(1), nodule.flatten(1).float())


def histograms_of(clean: torch.Tensor, nodule: torch.Tensor) -> torch.Tensor:
    """The shares of the nodule voxels in each bin: (N, BINS), all 0 where there is none; see `count_bins`."""
    counts = count_bins(clean, nodule)
    return counts / counts.sum(dim=1, keepdim=True).clamp(min=1)


def show(nodule: torch.Tensor, histograms: torch.Tensor) -> torch.Tensor:
    """The condition of the network.

    Args:
        nodule: (N, 1, D, H, W), +1 inside and -1 outside.
        histograms: (N, BINS) shares.

    Returns:
        (N, 1 + BINS, D, H, W): the nodule; the shares, mapped from [0, 1] to [-1, 1], inside it, -1 outside.
    """
    planes = (2 * histograms - 1)[:, :, None, None, None]
    return torch.cat([nodule, torch.where(nodule > 0, planes, -1.0)], dim=1)


def draw_nodules(
    network: Network,
    solver: Solver,
    condition: torch.Tensor,
    reference: torch.Tensor,
    drawn: torch.Tensor,
    generators: Sequence[torch.Generator],
    resampling: int,
) -> torch.Tensor:
    """Draw nodule voxels; everywhere else the reference is pasted at every noise level.

    Args:
        network, solver, reference, generators, resampling: see `sample_aas`.
        condition: (N, 1 + BINS, D, H, W) that the network sees, see `show`: one nodule of each volume.
        drawn: (N, 1, D, H, W) bool: the voxels to draw, some or all of the nodule's.

    Returns:
        (N, 1, D, H, W) CT.
    """

    def predict(inputs: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        return network(torch.cat([inputs[:, :1], condition], dim=1), times)

    return sample_aas(predict, solver, drawn.float() * 2 - 1, reference, generators, resampling)


def keep_histograms(window_hu: Window) -> Callable[[Sequence[str], np.ndarray, np.ndarray], dict[str, Any]]:
    """What `Recipe.keep` is for networks that draw nodules: the histograms of those that they were trained on."""

    def keep(case_ids: Sequence[str], ct: np.ndarray, layout: np.ndarray) -> dict[str, Any]:
        nodules: list[DiscoveryNodule] = []
        for case_id, hu, labels in zip(case_ids, ct, layout, strict=True):
            nodules += _nodules_of(case_id, to_model_range(hu, window_hu), labels)
        return {_KEPT: [asdict(nodule) for nodule in nodules]}

    return keep


def read_histograms(weights: Path) -> list[DiscoveryNodule]:
    """The nodules that a network was trained on.

    Raises:
        InputError: the file was not written by lungddpm, or has no histograms.
    """
    kept = read_metadata(weights).kept.get(_KEPT)
    if not kept:
        raise InputError(weights, "has no histograms of nodules", "Train the generator again (lungddpm train).")
    return [DiscoveryNodule(one["case_id"], one["number"], tuple(one["counts"])) for one in kept]


def choose_histogram(nodules: Sequence[DiscoveryNodule], voxels: int, seed: int) -> DiscoveryNodule:
    """Draw one of the nodules with half to twice as many voxels; if there are none, the nearest in size.

    Size is in voxels: the fewer a nodule has, the larger the share of them that is partly lung.

    Args:
        nodules: to draw from, at least one.
        voxels: of the nodule that is to be drawn.
        seed: of the draw.
    """

    def distance(nodule: DiscoveryNodule) -> float:
        return abs(math.log(nodule.voxels / voxels))

    similar = [nodule for nodule in nodules if distance(nodule) <= math.log(_SIMILAR)]
    if not similar:
        return min(nodules, key=distance)
    return similar[int(np.random.default_rng(seed).integers(len(similar)))]


def _nodules_of(case_id: str, clean: np.ndarray, layout: np.ndarray) -> list[DiscoveryNodule]:
    # Numbered along x, y, z, as everywhere.
    numbers, count = ndimage.label(layout.transpose(2, 1, 0) == Label.NODULE, _NEIGHBOURS)
    values = [torch.from_numpy(clean.transpose(2, 1, 0)[numbers == number])[None] for number in range(1, count + 1)]
    counts = [count_bins(one, torch.ones_like(one, dtype=torch.bool))[0] for one in values]
    return [
        DiscoveryNodule(case_id, number, tuple(map(int, each.tolist()))) for number, each in enumerate(counts, start=1)
    ]
