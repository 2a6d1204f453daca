"""Trained denoisers on disk: `model.safetensors`, EMA weights with the config that made them in the metadata."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from lungddpm.config import Config, parse_config
from lungddpm.diffusion.denoiser import UNet, build_denoiser
from lungddpm.errors import ConfigError, InputError
from lungddpm.files import atomic_path

_FORMAT = "lungddpm-denoiser-1"
_RETRAIN = "Train the denoiser anew (lungddpm train), or give the path of its model.safetensors."


@dataclass(frozen=True)
class Metadata:
    """What is written beside the weights.

    Attributes:
        config: the whole config of the training run.
        steps: optimizer steps taken.
        config_fingerprint: of the keys that decide what training computes.
        data_fingerprint: of the cases that it saw.
    """

    config: Config
    steps: int
    config_fingerprint: str
    data_fingerprint: str


def save_denoiser(path: Path, denoiser: UNet, metadata: Metadata) -> None:
    """Write weights and metadata, atomically."""
    texts = {
        "format": _FORMAT,
        "classes": json.dumps(metadata.config.diffusion.classes),
        "steps": str(metadata.steps),
        "config_fingerprint": metadata.config_fingerprint,
        "data_fingerprint": metadata.data_fingerprint,
        "config": metadata.config.model_dump_json(),
    }
    weights = {name: tensor.cpu().contiguous() for name, tensor in denoiser.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(weights, temporary, texts)


def read_metadata(path: Path) -> Metadata:
    """Read what is written beside the weights; cheap.

    Raises:
        InputError: missing, cut short, or not a denoiser of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            texts = file.metadata() or {}
    except FileNotFoundError:
        raise InputError(path, "does not exist", _RETRAIN) from None
    except (OSError, SafetensorError) as error:
        raise InputError(path, f"is cut short or no safetensors file ({error})", _RETRAIN) from None
    if texts.get("format") != _FORMAT:
        raise InputError(path, "holds no denoiser trained by lungddpm", _RETRAIN)
    try:
        config = parse_config(json.loads(texts["config"]), path)
    except ConfigError as error:
        raise InputError(path, f"was trained by another version ({error.problem})", _RETRAIN) from None
    return Metadata(config, int(texts["steps"]), texts["config_fingerprint"], texts["data_fingerprint"])


def load_denoiser(path: Path, device: str | torch.device) -> tuple[UNet, Metadata]:
    """Build the denoiser that a file describes and load its weights, ready to predict.

    Raises:
        InputError: missing, cut short, or not a denoiser of ours.
    """
    metadata = read_metadata(path)
    denoiser = build_denoiser(metadata.config)
    try:
        denoiser.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise InputError(path, f"does not fit its own config ({error})", _RETRAIN) from None
    return denoiser.to(device).eval().requires_grad_(False), metadata


def check_fits(path: Path, metadata: Metadata, config: Config) -> None:
    """Check that a denoiser was trained for what a config asks of it.

    Raises:
        InputError: naming the first key that differs.
    """
    asked_and_trained = {
        "diffusion.classes": (config.diffusion.classes, metadata.config.diffusion.classes),
        "diffusion.timesteps": (config.diffusion.timesteps, metadata.config.diffusion.timesteps),
        "grid.size": (list(config.grid.size), list(metadata.config.grid.size)),
        "grid.extent": (config.grid.extent, metadata.config.grid.extent),
        "grid.window_hu": (list(config.grid.window_hu), list(metadata.config.grid.window_hu)),
    }
    for key, (asked, trained) in asked_and_trained.items():
        if asked != trained:
            raise InputError(path, f"was trained with {key} {trained}, the config says {asked}", _RETRAIN)
