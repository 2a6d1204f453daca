"""nnU-Net's network, as the device runs it well."""

from __future__ import annotations

import torch

from lungddpm.core.memory import keep_freed_memory


def suit_to_device(network: torch.nn.Module, device: torch.device) -> None:
    """On a CPU, keep the weights with their channels last, and freed memory in the process: a fifth less time per step.

    Outputs of the convolutions follow their weights. InstanceNorm copies them to the usual order and is as accurate as
    there; GroupNorm would not be (see `models.denoiser`).
    """
    if device.type == "cpu":
        keep_freed_memory()
        network.to(memory_format=torch.channels_last_3d)
