"""Weights in torch files, our own and others': no code in them is run, and damaged or unsuitable files are rejected."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lungddpm.core.files import check_archive
from lungddpm.core.progress import LOG

_ZIP_START = b"PK\x03\x04"
# Prefixes that DataParallel and torch.compile add to names.
_WRAPPERS = {"module", "_orig_mod"}
# numpy scalars, which nnU-Net stores in its checkpoints: by default torch only reads tensors and plain Python.
_NUMPY_NUMBERS: list[Any] = [np.float64(0).__reduce__()[0], np.dtype, *(type(np.dtype(kind)) for kind in "efdilq")]


def load_checked(path: Path) -> Any:
    """Load tensors, numbers, text and containers written by `torch.save` onto the CPU, verifying checksums.

    Files written by torch before version 1.6 are not zip archives and have no checksums, which is logged.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, is damaged, is not a torch file, or contains code; a clause for a message.
    """
    if path.is_dir():
        raise ValueError("is a folder, not a file")
    try:
        with path.open("rb") as file:
            is_archive = file.read(len(_ZIP_START)) == _ZIP_START
        if is_archive:
            check_archive(path)
        with torch.serialization.safe_globals(_NUMPY_NUMBERS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # damaged bytes make torch and zipfile fail in any of their functions
        raise ValueError(_problem(error)) from None
    if not is_archive:
        LOG.warning("%s has the format of torch before 1.6, without checksums: damage cannot be detected", path)
    return content


def unwrapped(weights: Mapping[Any, Any]) -> dict[str, Any]:
    """The weights under the names that they have in the network itself, without prefixes of DataParallel and
    torch.compile.

    Raises:
        ValueError: a key is not text, or two keys have the same name; a clause for a message.
    """
    named: dict[str, Any] = {}
    for key, value in weights.items():
        if not isinstance(key, str) or not key.isprintable():
            raise ValueError(f"has a key that is not text: {key!r:.80}")
        name = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
        if name in named:
            raise ValueError(f"has key {name} twice, with and without a prefix such as 'module.'")
        named[name] = value
    return named


def problem_of(value: Any) -> str | None:
    """Why a network cannot take a value as a weight, as a clause ("holds a sparse tensor"); None if it can."""
    if not isinstance(value, torch.Tensor):
        return "holds no tensor"
    if value.is_meta:
        return "holds a tensor without numbers (of the meta device)"
    if value.layout != torch.strided:
        return "holds a sparse tensor"
    if value.is_quantized:
        return "holds quantised numbers"
    if not value.is_floating_point():
        return f"holds numbers of type {_type_name(value)}, not floating-point ones"
    try:
        finite = bool(value.float().isfinite().all())
    except RuntimeError:
        return f"holds numbers of type {_type_name(value)}, which this torch cannot convert"
    return None if finite else "holds numbers that are not finite"


def _type_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _problem(error: Exception) -> str:
    """What is wrong with a file, as a clause, without torch's advice to run the code in it."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    if code := re.search(r"GLOBAL ([\w.]+)", text):
        return f"holds code ({code[1]}), which is never run"
    if "TorchScript" in text:
        return "holds code (TorchScript), which is never run"
    reason = re.sub(r"\x1b\[[0-9;]*m", "", text).partition("\n")[0][:200]
    shown = f" ({reason})" if reason.isprintable() and reason and "weights" not in reason.lower() else ""
    if isinstance(error, zipfile.BadZipFile):
        return f"is truncated or damaged{shown}"
    return f"is truncated, damaged, or not a checkpoint of torch{shown}"
