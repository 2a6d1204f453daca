"""Accelerate for the denoiser: device, precision and processes."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from lungddpm.core.device import log_device
from lungddpm.core.errors import ConfigError
from lungddpm.core.memory import keep_freed_memory
from lungddpm.core.torch_device import device_name, select_device

_ACCELERATE_NAMES = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def make_accelerator(device: str, precision: str, accumulation: int = 1) -> Accelerator:
    """Choose and log device and precision, and join the other processes if torchrun or accelerate started several.

    Args:
        device: see `select_device`; `core.device.claim_device` decides which GPUs are visible.
        precision: `auto` (bf16 on a GPU that supports it, else fp32), `fp32`, `bf16` or `fp16`.
        accumulation: forward passes per optimizer step.

    Raises:
        ConfigError: see `select_device`; or the device has no fp16.
    """
    chosen = select_device(device)
    if chosen.index is not None:
        torch.cuda.set_device(chosen)
    if precision == "auto":
        has_bf16 = chosen.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if has_bf16 else "fp32"
    if precision == "fp16" and chosen.type == "cpu":
        raise ConfigError("training.precision", "fp16 needs a GPU", "Use auto, bf16 or fp32.")
    if chosen.type == "cpu":
        keep_freed_memory()
    accelerator = Accelerator(
        cpu=chosen.type == "cpu", mixed_precision=_ACCELERATE_NAMES[precision], gradient_accumulation_steps=accumulation
    )
    processes = f", {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    log_device(str(accelerator.device), f"{device_name(accelerator.device)}, {precision}{processes}")
    return accelerator


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor from the CPU to a device, without waiting for a GPU to finish earlier work."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
