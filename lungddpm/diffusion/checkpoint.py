"""Trained denoisers on disk, in two formats that this module reads and writes.

Ours is `model.safetensors`: EMA weights, with the config that made them in the metadata. The published one is a `.pt`
file of torch: {step, model, ema}, the last two holding the network under the prefix `denoise_fn.` beside the
coefficients of the diffusion process.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from lungddpm.config import Config, Denoiser, parse_config
from lungddpm.diffusion.denoiser import (
    ATTENTION_EDGE,
    UNet,
    build_denoiser,
    inferred_arguments,
    network_arguments,
)
from lungddpm.diffusion.device import place
from lungddpm.diffusion.schedule import cosine_betas, published_buffers
from lungddpm.errors import ConfigError, InputError
from lungddpm.files import atomic_path

_FORMAT = "lungddpm-denoiser-2"
_PREFIX = "denoise_fn."
_RETRAIN = "Train the denoiser anew (lungddpm train), or give the path of its model.safetensors."
_COPY_ANEW = "Copy or download the published checkpoint anew."
_ADAPT = "Set the config to what the weights were trained with, or give other weights."
# Keys of the denoiser's section, be it `diffusion` or `lung_ddpm_plus`, and of `grid`.
_CONFIG_KEYS = {
    "in_channels": "classes",
    "base_channels": "denoiser.base_channels",
    "multipliers": "denoiser.multipliers",
    "attention_factor": "grid.size and denoiser.attention",
}
_FAULTS_SHOWN = 3


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
    description = {
        "classes": metadata.config.diffusion.classes,
        "schedule": {"kind": "cosine", "timesteps": metadata.config.diffusion.timesteps},
        "steps": metadata.steps,
        "config_fingerprint": metadata.config_fingerprint,
        "data_fingerprint": metadata.data_fingerprint,
        "config": metadata.config.without_folders().model_dump(mode="json"),
    }
    # One key: safetensors writes several in an order that changes, and equal weights would not be equal files.
    texts = {_FORMAT: json.dumps(description)}
    weights = {name: tensor.cpu().contiguous() for name, tensor in denoiser.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(weights, temporary, texts)


def read_metadata(path: Path) -> Metadata:
    """Read what is written beside the weights of our format; cheap.

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
    if _FORMAT not in texts:
        raise InputError(path, "holds no denoiser trained by lungddpm", _RETRAIN)
    try:
        held = json.loads(texts[_FORMAT])
        config = parse_config(held["config"], path)
        return Metadata(config, held["steps"], held["config_fingerprint"], held["data_fingerprint"])
    except ConfigError as error:
        raise InputError(path, f"was trained by another version ({error.problem})", _RETRAIN) from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(path, f"has damaged metadata ({error})", _RETRAIN) from None


def load_denoiser(path: Path, config: Config, device: str | torch.device = "cpu") -> UNet:
    """Build the denoiser of a config with the EMA weights of a file, ready to predict.

    Args:
        path: `.safetensors`: ours; anything else: the published format. No code in it is run.
        config: what the denoiser is to be used for: classes, grid, noise levels, size.
        device: where the denoiser goes.

    Raises:
        InputError: missing, cut short, damaged, of neither format, with code inside, or made for something else than
            the config asks; names the keys that are wrong.
    """
    if path.suffix == ".safetensors":
        _check_fits(path, read_metadata(path), config)
        weights, prefix = load_file(path), ""
    else:
        weights, prefix = _read_published(path, config), _PREFIX
    with torch.device("meta"):
        denoiser = build_denoiser(config)
    _check_keys(path, weights, denoiser, config, prefix)
    denoiser.to_empty(device=device).load_state_dict(weights)
    return place(denoiser, device).eval().requires_grad_(False)


def export_published(weights: Path, output: Path) -> None:
    """Write a denoiser of ours in the published format, its EMA weights in both places.

    Raises:
        InputError: the weights are missing, cut short, or not a denoiser of ours; or the output is not named `.pt`.
    """
    if output.suffix != ".pt":
        raise InputError(output, "is no name for a published checkpoint", "End it in .pt.")
    metadata = read_metadata(weights)
    process = published_buffers(cosine_betas(metadata.config.diffusion.timesteps))
    network = {_PREFIX + name: tensor for name, tensor in load_file(weights).items()}
    with atomic_path(output) as temporary:
        torch.save({"step": metadata.steps, "model": process | network, "ema": process | network}, temporary)


def _check_fits(path: Path, metadata: Metadata, config: Config) -> None:
    def decisive(chosen: Config) -> dict[str, Any]:
        diffusion, grid = chosen.diffusion, chosen.grid
        return {
            "classes": diffusion.classes,
            "timesteps": diffusion.timesteps,
            **{f"denoiser.{name}": getattr(diffusion.denoiser, name) for name in Denoiser.model_fields},
            **({"training.crop": diffusion.training.crop} if diffusion.nodule_centred else {}),
            "grid.size": list(grid.size),
            "grid.extent": grid.extent,
            "grid.window_hu": list(grid.window_hu),
        }

    asked = decisive(config)
    for key, trained in decisive(metadata.config).items():
        if trained != asked[key]:
            raise InputError(path, f"was trained with {key} {trained}, the config says {asked[key]}", _ADAPT)


def _read_published(path: Path, config: Config) -> dict[str, torch.Tensor]:
    """The EMA weights of a published checkpoint, by their keys without the prefix."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(path, "does not exist", _COPY_ANEW) from None
    except Exception as error:  # damaged bytes make torch fail in any of its functions
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        problem = f"is cut short, no checkpoint of torch, or holds code, which is never run ({reason})"
        raise InputError(path, problem, _COPY_ANEW) from None
    average = content.get("ema") if isinstance(content, dict) else None
    if not isinstance(average, dict):
        problem = "is no published checkpoint: it has no entry 'ema' with the weights"
        raise InputError(path, problem, "Give a file with step, model and ema, or a model.safetensors.")
    if foreign := [key for key, value in average.items() if not isinstance(value, torch.Tensor)]:
        raise InputError(path, f"key {foreign[0]} holds no tensor", _COPY_ANEW)
    _check_schedule(path, average.get("betas"), config)
    network = {key.removeprefix(_PREFIX): value for key, value in average.items() if key.startswith(_PREFIX)}
    if not network:
        raise InputError(path, f"has no key that starts with {_PREFIX}", _COPY_ANEW)
    if broken := [key for key, value in network.items() if not value.isfinite().all()]:
        raise InputError(path, f"key {_PREFIX}{broken[0]} holds numbers that are not finite", _COPY_ANEW)
    return {key: value.float() for key, value in network.items()}


def _check_schedule(path: Path, betas: torch.Tensor | None, config: Config) -> None:
    if betas is None:
        raise InputError(path, "has no key betas, the noise schedule", _COPY_ANEW)
    timesteps = config.diffusion.timesteps
    if betas.shape != (timesteps,):
        trained = betas.numel()
        raise InputError(path, f"was trained with timesteps {trained}, the config says {timesteps}", _ADAPT)
    if not torch.allclose(betas.double(), cosine_betas(timesteps), rtol=0, atol=1e-5):
        raise InputError(path, "was trained with another noise schedule than the cosine one", "Give other weights.")


def _check_keys(path: Path, weights: Mapping[str, torch.Tensor], denoiser: UNet, config: Config, prefix: str) -> None:
    """Refuse weights whose keys or shapes are not those of the config's network."""
    faults = _faults(weights, denoiser)
    if not faults:
        return
    inferred = inferred_arguments(weights)
    if inferred is not None:
        with torch.device("meta"):
            other = UNet(**inferred, norm_groups=1)
        if not _faults(weights, other):
            asked = network_arguments(config)
            differing = [
                f"{_CONFIG_KEYS[name]}: {_in_words(name, value)} (the config says {_in_words(name, asked[name])})"
                for name, value in inferred.items()
                if value != asked[name]
            ]
            raise InputError(path, f"holds another network, {'; '.join(differing)}", _ADAPT)
    shown = ", ".join(f"key {prefix}{fault}" for fault in faults[:_FAULTS_SHOWN])
    more = f" and {len(faults) - _FAULTS_SHOWN} more" if len(faults) > _FAULTS_SHOWN else ""
    raise InputError(path, f"does not hold the network of the config: {shown}{more}", _ADAPT)


def _faults(weights: Mapping[str, torch.Tensor], denoiser: UNet) -> list[str]:
    """What is wrong with the weights of a network, key by key; empty where all is right."""
    shapes = {key: tuple(tensor.shape) for key, tensor in denoiser.state_dict().items()}
    found = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    return [
        *(f"{key} is missing" for key in shapes if key not in found),
        *(f"{key} has no place in it" for key in found if key not in shapes),
        *(
            f"{key} has the shape {found[key]} instead of {shape}"
            for key, shape in shapes.items()
            if key in found and found[key] != shape
        ),
    ]


def _in_words(argument: str, value: Any) -> str:
    if argument == "in_channels":
        return f"{value - 1} classes"
    if argument == "attention_factor":
        if value is None:
            return "no attention"
        return f"attention for {value * ATTENTION_EDGE:g} voxels an edge" if value else "attention in the middle alone"
    return str(value)
