"""`lungddpm doctor`: what this machine has, and what is missing for a run."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import shutil
from pathlib import Path
from typing import Any

from lungddpm.core.versions import git_commit, installed_versions

_GIB = 2**30


def machine() -> dict[str, Any]:
    """What this machine has, as values: versions, cores, memory, disk, devices; the keys are those of `--json`.

    `git_commit` is None outside a source checkout. `devices` is None without torch, empty where there is only the CPU.
    """
    import psutil

    memory = psutil.virtual_memory()
    return {
        "versions": installed_versions(),
        "git_commit": git_commit(),
        "cores": os.cpu_count(),
        "memory_gib": memory.total / _GIB,
        "memory_free_gib": memory.available / _GIB,
        "disk_free_gib": shutil.disk_usage(Path(".")).free / _GIB,
        "devices": _devices(),
        "missing": problems(),
    }


def describe(values: dict[str, Any]) -> list[str]:
    """One line per fact of `machine`, except what is missing."""
    lines = [f"{name} {version}" for name, version in values["versions"].items()]
    if values["git_commit"]:
        lines.insert(1, f"commit of lungddpm: {values['git_commit']}")
    lines.append(
        f"cores: {values['cores']}; memory: {values['memory_free_gib']:.1f} of {values['memory_gib']:.1f} GiB free"
    )
    lines.append(f"disk: {values['disk_free_gib']:.1f} GiB free in this folder")
    if values["devices"] is None:
        return [*lines, "devices: unknown without torch"]
    found = [
        f"{each['device']}: {each['name']}, {each['memory_gib']:.0f} GiB, bf16 {'yes' if each['bf16'] else 'no'}"
        for each in values["devices"]
    ]
    return lines + (found or ["devices: CPU only"])


def problems() -> list[str]:
    """What would stop a run: missing libraries, a torchvision that does not load, a torch with known problems."""
    missing = [name for name in _required() if not _is_installed(name)]
    if missing:
        return [f"{name} (pip install -c constraints.txt {name})" for name in missing]
    problems = []
    if importlib.metadata.version("torch").startswith("2.9."):
        problems.append("a torch other than 2.9.*, which runs 3-D convolutions under autocast four times slower")
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        problems.append(f"a torchvision that matches torch: nnU-Net needs it to find its classes ({error})")
    return problems


def _required() -> list[str]:
    """The libraries that lungddpm declares to need, without those of its extras."""
    declared = importlib.metadata.requires("lungddpm") or []
    names = [re.match(r"[\w.-]+", requirement) for requirement in declared if "extra ==" not in requirement]
    return [name[0] for name in names if name is not None]


def _is_installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def _devices() -> list[dict[str, Any]] | None:
    if "torch" not in installed_versions():
        return None
    import torch

    return [
        {
            "device": f"cuda:{number}",
            "name": torch.cuda.get_device_name(number),
            "memory_gib": torch.cuda.get_device_properties(number).total_memory / _GIB,
            "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        }
        for number in range(torch.cuda.device_count())
    ]
