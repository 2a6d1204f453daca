"""Hints: what a network sees of the reference CT beside the layout: nothing, a slice, or all voxels not to draw.

A hint is one more input channel. In training the reference is the case's own CT, so `volume` must not show the voxels
to draw. `slice` does show those of its slice, as GEM-3D does.
"""

from __future__ import annotations

import torch

from lungddpm.config.sections import Hint
from lungddpm.models.denoiser import open_voxels
from lungddpm.models.recipe import Network

MASKED = -1.0
"""Value in `volume` of the voxels to draw: air, so that interpolation produces realistic borders of lungs."""


def show(hint: Hint, reference: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    """The hint for volumes; for `slice` they are whole ones.

    Args:
        hint: `none`; `slice`: the reference's axial slice halfway between the lowest and the highest voxel that the
            layout names (halfway up the volume where it names none), repeated in all slices; `volume`: the reference
            with `MASKED` in all voxels that the layout names.
        reference: (N, 1, D, H, W) CT in [-1, 1].
        condition: (N, C, D, H, W), see `condition_channels`.

    Returns:
        (N, channels, D, H, W), see `denoiser.HINT_CHANNELS`.
    """
    if hint == "none":
        return reference[:, :0]
    is_open = open_voxels(condition)
    if hint == "volume":
        return reference.where(is_open, MASKED)
    return torch.stack([_repeated_slice(*volumes) for volumes in zip(reference, is_open, strict=True)])


def seeing(network: Network, shown: torch.Tensor | None) -> Network:
    """A network that adds a hint to its inputs before it predicts.

    Args:
        network: its input is the noisy CT, the condition and the hint, in this order.
        shown: (N, channels, D, H, W) of the batch that it is given; None or no channels leaves the network as it is.
    """
    if shown is None or not shown.shape[1]:
        return network
    return lambda inputs, times: network(torch.cat([inputs, shown], dim=1), times)


def _repeated_slice(reference: torch.Tensor, is_open: torch.Tensor) -> torch.Tensor:
    """(1, D, H, W) each -> (1, D, H, W)."""
    levels = (~is_open).any(dim=(0, 2, 3)).nonzero()
    lowest, highest = (int(levels[0]), int(levels[-1])) if len(levels) else (0, reference.shape[1] - 1)
    return reference[:, (lowest + highest) // 2, None].expand_as(reference)
