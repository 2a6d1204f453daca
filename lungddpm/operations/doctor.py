"""`lungddpm doctor`: what this machine has, and what is missing for a run."""

from __future__ import annotations

import importlib
import os
import shutil
from pathlib import Path

from lungddpm.core.versions import LIBRARIES, installed_versions


def describe() -> list[str]:
    """One line per fact: versions, devices, cores, memory, disk."""
    import psutil

    memory = psutil.virtual_memory()
    lines = [f"{name} {version}" for name, version in installed_versions().items()]
    lines.append(
        f"cores: {os.cpu_count()}; memory: {memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"
    )
    lines.append(f"disk: {shutil.disk_usage(Path('.')).free / 2**30:.1f} GiB free in this folder")
    return lines + _devices()


def problems() -> list[str]:
    """What would stop a run: missing libraries, a torchvision that does not load, a torch with known problems."""
    found = installed_versions()
    problems = [f"{name} (pip install -c constraints.txt -e .)" for name in LIBRARIES if name not in found]
    if problems:
        return problems
    if found["torch"].startswith("2.9."):
        problems.append("another torch version: 2.9.* runs 3-D convolutions under autocast four times slower")
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        problems.append(f"a torchvision that matches torch: nnU-Net needs it to find its classes ({error})")
    return problems


def _devices() -> list[str]:
    if "torch" not in installed_versions():
        return ["devices: unknown without torch"]
    import torch

    lines = [
        f"cuda:{i}: {torch.cuda.get_device_name(i)}, "
        f"{torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB, "
        f"bf16 {'yes' if torch.cuda.is_bf16_supported() else 'no'}"
        for i in range(torch.cuda.device_count())
    ]
    return lines or ["devices: CPU only"]
