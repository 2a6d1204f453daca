"""The torch device of a stage; `core.device` decides which GPUs are visible."""

from __future__ import annotations

import os

import torch

from lungddpm.core.errors import ConfigError
from lungddpm.core.text import plural


def select_device(device: str) -> torch.device:
    """The device of that name; `auto`: a CUDA GPU if there is one, else the CPU.

    Each process started by torchrun on this machine gets the GPU with its own number.

    Args:
        device: `auto`, `cpu`, `cuda`, `cuda:<number>` or `mps`.

    Raises:
        ConfigError: it is unknown or not available, or there are too few GPUs for the processes.
    """
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    present = ["cpu", *(["cuda", *gpus] if gpus else []), *(["mps"] if torch.backends.mps.is_available() else [])]
    if device not in ("auto", *present):
        raise ConfigError("device", f"'{device}' is not available here", f"Use auto, or one of: {', '.join(present)}.")
    chosen = torch.device(("cuda" if gpus else "cpu") if device == "auto" else device)
    if chosen.type != "cuda" or (local_rank := os.environ.get("LOCAL_RANK")) is None:
        return chosen
    if chosen.index is not None or int(local_rank) >= len(gpus):
        raise ConfigError(
            "device",
            f"'{device}' leaves process {local_rank} without a GPU",
            "Use auto, and at most one process per GPU.",
        )
    return torch.device("cuda", int(local_rank))


def device_name(device: torch.device) -> str:
    """Its name in logs and tables: the GPU's product name, or the number of CPU threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return plural(torch.get_num_threads(), "thread")
