"""Where the denoiser computes, and how precisely."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from lungddpm.errors import ConfigError
from lungddpm.progress import LOG

_ACCELERATE_NAMES = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def make_accelerator(device: str, precision: str, accumulation: int = 1) -> Accelerator:
    """Choose device and precision, and say so once.

    Args:
        device: `auto` (a CUDA GPU if there is one, else the CPU), `cpu`, `cuda`, `cuda:<number>` or `mps`.
        precision: `auto` (bf16 on a GPU that has it, else fp32), `fp32`, `bf16` or `fp16`.
        accumulation: forward passes an optimizer step.

    Raises:
        ConfigError: the device is unknown or not there, or it has no fp16.
    """
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    present = ["cpu", *(["cuda", *gpus] if gpus else []), *(["mps"] if torch.backends.mps.is_available() else [])]
    if device not in ("auto", *present):
        raise ConfigError("device", f"'{device}' is not available here", f"Use auto, or one of: {', '.join(present)}.")
    chosen, _, number = (("cuda" if gpus else "cpu") if device == "auto" else device).partition(":")
    if number:
        torch.cuda.set_device(int(number))
    if precision == "auto":
        precision = "bf16" if chosen == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if precision == "fp16" and chosen == "cpu":
        raise ConfigError("diffusion.training.precision", "fp16 needs a GPU", "Use auto, bf16 or fp32.")
    accelerator = Accelerator(
        cpu=chosen == "cpu", mixed_precision=_ACCELERATE_NAMES[precision], gradient_accumulation_steps=accumulation
    )
    name = torch.cuda.get_device_name() if chosen == "cuda" else f"{torch.get_num_threads()} threads"
    LOG.info("Computing on %s (%s) in %s", accelerator.device, name, precision)
    return accelerator
