"""Prediction on a CPU, beside the weighted mean of all tiles in float64."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from lungddpm.segmentation.network import suit_to_device
from lungddpm.segmentation.prediction import CpuPredictor

TILE = (16, 12, 16)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv3d(1, 8, 3, padding=1), nn.InstanceNorm3d(8, affine=True), nn.LeakyReLU(), nn.Conv3d(8, 2, 3, padding=1)
    ).eval()


def weights_of_a_tile() -> np.ndarray:
    """A Gaussian around the tile's middle with a deviation of an eighth of its sides, nowhere zero."""
    peak = np.zeros(TILE)
    peak[tuple(n // 2 for n in TILE)] = 1
    weights = ndimage.gaussian_filter(peak, [n / 8 for n in TILE], mode="constant")
    return np.maximum(weights, weights[weights > 0].min())


@pytest.mark.parametrize("shape", [(16, 12, 16), (16, 12, 24), (24, 18, 40)], ids=["one tile", "two", "many"])
def test_logits_are_the_weighted_mean_of_all_tiles(network, shape):
    predictor = CpuPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.network = network
    predictor.configuration_manager = SimpleNamespace(patch_size=list(TILE))
    predictor.label_manager = SimpleNamespace(num_segmentation_heads=2)
    image = torch.randn(1, *shape)
    exact, total, weights = np.zeros((2, *shape)), np.zeros(shape), weights_of_a_tile()
    reference = network.double()
    starts = [range(0, n - t + 1, t // 2) for n, t in zip(shape, TILE, strict=True)]
    for corner in itertools.product(*starts):
        box = tuple(slice(c, c + t) for c, t in zip(corner, TILE, strict=True))
        with torch.inference_mode():
            exact[(slice(None), *box)] += weights * reference(image[(slice(None), *box)][None].double())[0].numpy()
        total[box] += weights
    network.float()
    suit_to_device(network, torch.device("cpu"))
    predicted = predictor.predict_sliding_window_return_logits(image)
    np.testing.assert_allclose(predicted.numpy(), exact / total, atol=1e-4)


def test_only_cpus_get_the_channels_last(network):
    before = {name: weights.clone() for name, weights in network.state_dict().items()}
    suit_to_device(network, torch.device("cuda"))
    assert network[0].weight.is_contiguous()
    suit_to_device(network, torch.device("cpu"))
    assert network[3].weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert all(torch.equal(before[name], weights) for name, weights in network.state_dict().items())
