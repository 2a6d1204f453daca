"""Where the denoiser computes, how precisely, and in how many processes."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator

from lungddpm.core.errors import ConfigError
from lungddpm.core.progress import log_device

_ACCELERATE_NAMES = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
# Parameters of glibc's mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def make_accelerator(device: str, precision: str, accumulation: int = 1) -> Accelerator:
    """Choose device and precision, join the other processes if torchrun or accelerate started several, and say so.

    Args:
        device: `auto` (a CUDA GPU if there is one, else the CPU), `cpu`, `cuda`, `cuda:<number>` or `mps`. Several
            processes take a GPU each.
        precision: `auto` (bf16 on a GPU that has it, else fp32), `fp32`, `bf16` or `fp16`.
        accumulation: forward passes an optimizer step.

    Raises:
        ConfigError: the device is unknown or not there, too few GPUs for the processes, or the device has no fp16.
    """
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    present = ["cpu", *(["cuda", *gpus] if gpus else []), *(["mps"] if torch.backends.mps.is_available() else [])]
    if device not in ("auto", *present):
        raise ConfigError("device", f"'{device}' is not available here", f"Use auto, or one of: {', '.join(present)}.")
    chosen, _, number = (("cuda" if gpus else "cpu") if device == "auto" else device).partition(":")
    if chosen == "cuda" and (local_rank := os.environ.get("LOCAL_RANK")) is not None:
        if number or int(local_rank) >= len(gpus):
            raise ConfigError(
                "device", f"'{device}' gives no GPU to process {local_rank}", "Use auto, and a process a GPU at most."
            )
        number = local_rank
    if number:
        torch.cuda.set_device(int(number))
    if precision == "auto":
        precision = "bf16" if chosen == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if precision == "fp16" and chosen == "cpu":
        raise ConfigError("diffusion.training.precision", "fp16 needs a GPU", "Use auto, bf16 or fp32.")
    if chosen == "cpu":
        keep_freed_memory()
    accelerator = Accelerator(
        cpu=chosen == "cpu", mixed_precision=_ACCELERATE_NAMES[precision], gradient_accumulation_steps=accumulation
    )
    name = torch.cuda.get_device_name() if chosen == "cuda" else f"{torch.get_num_threads()} threads"
    processes = f", {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    log_device(str(accelerator.device), f"{name}, {precision}{processes}")
    return accelerator


def keep_freed_memory() -> None:
    """Let this process keep what it frees, for its next arrays; where the C library is not glibc, do nothing.

    By default every large array is fresh memory from the kernel, which hands it out page by page.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_MMAP_MAX, 0)
        set_option(_M_TRIM_THRESHOLD, -1)


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor from the CPU to a device, without waiting until a GPU has done what it was told before."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@contextmanager
def explain_out_of_memory(remedy: str) -> Iterator[None]:
    """Turn a device's or the machine's lack of memory into a message that names the levers.

    Raises:
        ConfigError: memory ran out inside the block.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        on_gpu = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
        if not on_gpu and not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        problem = f"the memory of {'the GPU' if on_gpu else 'this machine'} does not suffice"
        raise ConfigError("training", problem, remedy) from None
