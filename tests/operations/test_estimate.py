"""The memory of a forward pass, against sums over its maps by hand."""

import pytest
import torch
from torch import nn

from lungddpm.operations.estimate import drawing_bytes_of

EDGE = 8
MAP = 4 * EDGE**3
"""Bytes of one channel."""


class Skip(nn.Module):
    """Keeps its first map until the end."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 2, 3, padding=1)

    def forward(self, volumes):
        first = self.first(volumes)
        return torch.cat([first, self.second(first)], dim=1)


NETWORKS = {
    # The second map is made while the first is there; then the first can go.
    "a chain": (lambda: nn.Sequential(nn.Conv3d(1, 4, 1), nn.Conv3d(4, 4, 1), nn.Conv3d(4, 1, 1)), 4 + 4),
    "a narrowing chain": (lambda: nn.Sequential(nn.Conv3d(1, 6, 1), nn.Conv3d(6, 1, 1), nn.Conv3d(1, 2, 1)), 6 + 1),
    "a skip": (Skip, 4 + 2 + 6),
    "in place": (lambda: nn.Sequential(nn.Conv3d(1, 4, 1), nn.ReLU(inplace=True)), 4),
    "views": (lambda: nn.Sequential(nn.Conv3d(1, 4, 1), nn.Flatten(), nn.Unflatten(1, (4, EDGE, EDGE, EDGE))), 4),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("batch", [1, 3])
def test_drawing_takes_the_maps_that_are_there_at_one_time(name, batch):
    build, maps = NETWORKS[name]
    with torch.device("meta"):
        network, volumes = build(), torch.zeros(batch, 1, EDGE, EDGE, EDGE)
    assert drawing_bytes_of(network, [volumes]) == batch * maps * MAP


def test_weights_and_inputs_are_not_counted():
    with torch.device("meta"):
        network, volumes = nn.Conv3d(1, 1, 5, padding=2), torch.zeros(1, 1, EDGE, EDGE, EDGE)
    assert drawing_bytes_of(network, [volumes]) == MAP
