"""Saved states of a training on disk: the newest one and the one before it, in case the newest turns out damaged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lungddpm.core.files import atomic_path
from lungddpm.core.progress import LOG
from lungddpm.core.torch_files import load_checked


def save_state(folder: Path, step: int, state: Mapping[str, Any], previous: Path | None) -> Path:
    """Write a state; when it is complete, remove all others but the previous one.

    Args:
        folder: for the states of this training and nothing else.
        step: optimizer steps taken.
        state: tensors, numbers, text and containers of them.
        previous: the state that was saved or loaded last.

    Returns:
        Where it was written.
    """
    path = folder / f"step-{step:08d}.pt"
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        # Given a path, torch writes the file itself and does not distinguish a full disk from other errors.
        torch.save(state, file)
    keep_states(folder, path, previous)
    return path


def keep_states(folder: Path, *kept: Path | None) -> None:
    """Remove all other states, and partial files of killed processes."""
    for other in folder.iterdir():
        if other not in kept:
            other.unlink()


def newest_state(folder: Path, wanted: Mapping[str, str]) -> Path | None:
    """The newest undamaged state of a training; logs which ones are ignored, and why.

    Args:
        folder: of the states.
        wanted: required values of the state's entries, e.g. of `config_fingerprint`.
    """
    for path in sorted(folder.glob("step-*.pt"), reverse=True):
        try:
            state = load_checked(path)
        except ValueError as error:
            LOG.warning("%s is damaged and is ignored: it %s", path, error)
            continue
        held = state if isinstance(state, dict) else {}
        different = [name for name, value in wanted.items() if held.get(name) != value]
        if not different:
            return path
        what = " and ".join(name.removesuffix("_fingerprint") for name in different)
        LOG.info("%s is from a training with different %s and is ignored", path, what)
    return None
