"""The feature network of FID and MMD: MedicalNet's 3-D ResNet-50 as used in HA-GAN's evaluation.

Architecture and weights: Chen et al. 2019, "Med3D", arXiv 1904.00625. Layers 3 and 4 keep the resolution of layer 2 and
dilate their convolutions by 2 and 4, so that the last map has an eighth of the grid's edge; its mean over all positions
is the feature vector. Use in evaluation: Sun et al. 2022, "HA-GAN", IEEE JBHI 26:3966: volumes in [-1, 1], in their own
size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from monai.networks.nets.resnet import ResNet, ResNetBottleneck
from torch import nn

from lungddpm.core.errors import InputError
from lungddpm.core.files import sha256_of
from lungddpm.core.torch_files import load_checked, problem_of, unwrapped
from lungddpm.quality.feature_distances import MEDICALNET

MEDICALNET_CHANNELS = 64
"""Of the first layer; 32 times as many features come out: 2048."""
RANDOM_CHANNELS = 16
"""Of the network with random weights: 512 features, for a sixteenth of the time."""
RANDOM_SEED = 0
"""Seed of those weights. Not from the config: distances are only comparable between runs with the same network."""
_HUB_REPOSITORY, _HUB_FILE = "TencentMedicalNet/MedicalNet-Resnet50", "resnet_50.pth"
_SEGMENTATION_HEAD = "conv_seg."
_COPY_AGAIN = f"Download MedicalNet's public file {_HUB_FILE} again and set image_quality.weights to it."
_PROBLEMS_SHOWN = 3


def build_network(channels: int) -> nn.Module:
    """MONAI's 3-D ResNet-50, dilated where MedicalNet's is: volumes (N, 1, D, H, W) -> features (N, 32 * channels).

    Args:
        channels: of the first layer.
    """
    network = ResNet(
        ResNetBottleneck, [3, 4, 6, 3], [channels * 2**n for n in range(4)], n_input_channels=1, conv1_t_stride=2,
        bias_downsample=False, feed_forward=False,
    )  # fmt: skip
    # MONAI's layers 3 and 4 halve the resolution instead.
    for layer, dilation in ((network.layer3, 2), (network.layer4, 4)):
        for module in layer.modules():
            if isinstance(module, nn.Conv3d):
                module.stride = (1, 1, 1)
                if module.kernel_size == (3, 3, 3):
                    module.dilation = module.padding = (dilation,) * 3
    return network


@dataclass(frozen=True)
class Extractor:
    """A feature network ready to use.

    Attributes:
        network: volumes (N, 1, D, H, W) in [-1, 1] -> (N, features).
        name: in tables.
        weights_sha256: of the weights file, or of the parameters themselves if they are random.
    """

    network: nn.Module
    name: str
    weights_sha256: str

    @torch.inference_mode()
    def features(self, volumes: list[np.ndarray]) -> np.ndarray:
        """Features of volumes on one grid, taken as one batch.

        Args:
            volumes: (x, y, z) in [0, 1] each; the network gets them as (z, y, x) in [-1, 1], in their own size.

        Returns:
            (volumes, features) float64.
        """
        batch = torch.from_numpy(np.stack([volume.transpose(2, 1, 0) for volume in volumes])[:, None])
        return self.network(batch.float() * 2 - 1).double().numpy()


def load_extractor(weights: Path | Literal["hub"] | None) -> Extractor:
    """MedicalNet with its public weights; without them, a narrower network of the same architecture with random
    weights.

    Args:
        weights: the public file; `hub` fetches it from Hugging Face (needs network access); None for random weights.

    Raises:
        InputError: the file is missing, damaged or something else, or the hub cannot be reached.
    """
    if weights is None:
        return _random_extractor()
    path = _from_hub() if weights == "hub" else weights
    with torch.device("meta"):
        network = build_network(MEDICALNET_CHANNELS)
    state = read_resnet_weights(path, network)
    network.to_empty(device="cpu").load_state_dict(state, strict=False)
    return Extractor(network.eval(), MEDICALNET, sha256_of(path))


def read_resnet_weights(path: Path, network: nn.Module) -> dict[str, torch.Tensor]:
    """Read a MedicalNet file, {state_dict: {module.<key>: tensor}}, without its segmentation head.

    No code in the file is run. BatchNorm's batch counters are not used and may be missing.

    Raises:
        InputError: missing, damaged, or not exactly the keys and shapes of the network; names the wrong keys.
    """
    try:
        content = load_checked(path)
        state = content.get("state_dict") if isinstance(content, Mapping) else None
        if not isinstance(state, Mapping):
            raise ValueError("has no weights of MedicalNet: there is no entry 'state_dict'")
        state = unwrapped(state)
    except FileNotFoundError:
        raise InputError(path, "does not exist", _COPY_AGAIN) from None
    except ValueError as error:
        raise InputError(path, str(error), _COPY_AGAIN) from None
    state = {key: value for key, value in state.items() if not key.startswith(_SEGMENTATION_HEAD)}
    if problems := _problems(state, network.state_dict()):
        more = f" and {len(problems) - _PROBLEMS_SHOWN} more" if len(problems) > _PROBLEMS_SHOWN else ""
        problem = f"is not a ResNet-50 of MedicalNet: {', '.join(problems[:_PROBLEMS_SHOWN])}{more}"
        raise InputError(path, problem, _COPY_AGAIN)
    return {key: value.float() for key, value in state.items() if not _is_counter(key)}


def _problems(found: Mapping[str, Any], wanted: Mapping[str, torch.Tensor]) -> list[str]:
    problems = [f"key {key} is missing" for key in wanted if key not in found and not _is_counter(key)]
    for key, value in found.items():
        if key not in wanted:
            problems.append(f"key {key} is unexpected")
        elif _is_counter(key):
            continue
        elif (problem := problem_of(value)) is not None:
            problems.append(f"key {key} {problem}")
        elif value.shape != wanted[key].shape:
            problems.append(f"key {key} has the shape {tuple(value.shape)} instead of {tuple(wanted[key].shape)}")
    return problems


def _is_counter(key: str) -> bool:
    return key.endswith(".num_batches_tracked")


def _random_extractor() -> Extractor:
    with torch.device("meta"):
        network = build_network(RANDOM_CHANNELS)
    network.to_empty(device="cpu")
    generator, digest = torch.Generator().manual_seed(RANDOM_SEED), hashlib.sha256()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.reset_parameters()
        elif isinstance(module, nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
            digest.update(module.weight.detach().numpy().tobytes())
    name = f"ResNet-50, random weights (seed {RANDOM_SEED}, {32 * RANDOM_CHANNELS} features)"
    return Extractor(network.eval(), name, digest.hexdigest())


def _from_hub() -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(_HUB_REPOSITORY, _HUB_FILE))
    except Exception as error:  # no network, no such file, a full disk: the hub's client raises different errors
        problem = f"{_HUB_FILE} of {_HUB_REPOSITORY} is not available ({type(error).__name__})"
        remedy = f"Download {_HUB_FILE} of MedicalNet with network access, and give its path."
        raise InputError("image_quality.weights: hub", problem, remedy) from None
