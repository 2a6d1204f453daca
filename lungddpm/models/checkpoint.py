"""Trained networks on disk: `model.safetensors`, with EMA weights and their training settings in the metadata."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lungddpm.config.sections import GeneratorConfig, TrainedSettings
from lungddpm.core.code import CodeFromStep
from lungddpm.core.errors import InputError
from lungddpm.core.files import atomic_path
from lungddpm.core.torch_files import problem_of

N = TypeVar("N", bound=nn.Module)

_FORMAT = "lungddpm-model-4"
_EARLIER_FORMATS = "lungddpm-denoiser", "lungddpm-model-"
_RETRAIN = "Train the generator again (lungddpm train), or give the path of its model.safetensors."
_BEFORE_THE_KEY = {"hint": "none"}
"""Values for keys that older weights do not have."""
ADAPT = "Set the config to the settings of the weights, or use other weights."
_PROBLEMS_SHOWN = 3


@dataclass(frozen=True)
class Metadata:
    """The metadata of weights.

    Attributes:
        config: of the generator (see `GeneratorConfig.dump`).
        fit: settings that their use must match (see `GeneratorConfig.decides_fit`).
        steps: optimizer steps taken.
        config_fingerprint: of the keys that affect training.
        data_fingerprint: of the training cases.
        trained_on: patients of the training cases, and of those of the weights that the training started from.
        code: which code version ran which steps, if known.
        kept: see `Recipe.keep`.
    """

    config: dict[str, Any]
    fit: dict[str, Any]
    steps: int
    config_fingerprint: str
    data_fingerprint: str
    trained_on: list[str]
    code: list[CodeFromStep] = field(default_factory=list)
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def trained_for(self) -> dict[str, Any]:
        """`fit`, with all current keys."""
        return {**_BEFORE_THE_KEY, **self.fit}

    @classmethod
    def of(
        cls,
        config: GeneratorConfig[TrainedSettings],
        steps: int,
        config_fingerprint: str,
        data_fingerprint: str,
        trained_on: Sequence[str] = (),
        code: Sequence[CodeFromStep] = (),
    ) -> Metadata:
        """What a generator's training writes."""
        return cls(
            config.dump(),
            config.decides_fit(),
            steps,
            config_fingerprint,
            data_fingerprint,
            list(trained_on),
            list(code),
        )


def save_network(path: Path, network: nn.Module, metadata: Metadata) -> None:
    """Write weights and metadata, atomically."""
    description = asdict(metadata)
    weights = {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
    # One key only: safetensors writes several in varying order, so that equal weights would give different files.
    texts = {_FORMAT: json.dumps({**description, "sha256": _checksum(description, weights)})}
    with atomic_path(path) as temporary:
        save_file(weights, temporary, texts)


def read_metadata(path: Path) -> Metadata:
    """Read the metadata of weights in our format; cheap.

    Raises:
        InputError: missing, truncated, or not weights trained here.
    """
    held = {"kept": {}, **_read_description(path)}  # older files have no such entry
    try:
        return Metadata(**{each.name: held[each.name] for each in fields(Metadata)})
    except KeyError as error:
        raise InputError(path, f"has damaged metadata (no {error})", _RETRAIN) from None


def patients_of(weights: Path) -> list[str] | None:
    """The patients that weights were trained on, for the leak guard; None if the format does not record them.

    Raises:
        InputError: see `read_metadata`.
    """
    return read_metadata(weights).trained_on if weights.suffix == ".safetensors" else None


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read weights in our format (float32, by key) and verify their checksum.

    Raises:
        InputError: missing, truncated, damaged, or not a denoiser trained here.
    """
    held = _read_description(path)
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(path, f"is truncated or damaged ({error})", _RETRAIN) from None
    refuse_unfit(path, weights, _RETRAIN)
    if held.pop("sha256", None) != _checksum(held, weights):
        raise InputError(path, "is damaged: it differs from the checksum that was written with it", _RETRAIN)
    return weights


def load_network(
    path: Path,
    config: GeneratorConfig[TrainedSettings],
    build: Callable[[], N],
    device: str | torch.device = "cpu",
) -> N:
    """Build a network with the EMA weights of a file, ready to predict.

    Args:
        path: a file written here.
        config: of the network's generator.
        build: the network, with any weights.
        device: where the network goes.

    Raises:
        InputError: missing, truncated, damaged, not weights trained here, or trained with other settings than the
            config's.
    """
    check_fit(path, config)
    return fill(path, build, read_weights(path), device)


def check_fit(path: Path, config: GeneratorConfig[TrainedSettings]) -> None:
    """Check that weights trained here match the config.

    Raises:
        InputError: they do not; names the key.
    """
    trained, asked = read_metadata(path).trained_for, {**_BEFORE_THE_KEY, **config.decides_fit()}
    for key in dict.fromkeys([*trained, *asked]):
        if trained.get(key) != asked.get(key):
            raise InputError(
                path, f"was trained with {key} {trained.get(key)}, but the config has {asked.get(key)}", ADAPT
            )


def fill(
    path: Path,
    build: Callable[[], N],
    weights: Mapping[str, torch.Tensor],
    device: str | torch.device,
    prefix: str = "",
) -> N:
    """The network with these weights, on the device, ready to predict.

    Args:
        path: of the weights, for messages.
        build: the network, with any weights.
        weights: float32, by the network's keys.
        device: where the network goes.
        prefix: of every key in the file.

    Raises:
        InputError: keys or shapes differ.
    """
    with torch.device("meta"):
        network = build()
    if problems := problems_of(weights, network):
        shown = ", ".join(f"key {prefix}{problem}" for problem in problems[:_PROBLEMS_SHOWN])
        more = f" and {len(problems) - _PROBLEMS_SHOWN} more" if len(problems) > _PROBLEMS_SHOWN else ""
        raise InputError(path, f"does not match the network of the config: {shown}{more}", ADAPT)
    network.to_empty(device=device).load_state_dict(weights)
    return network.eval().requires_grad_(False)


def _read_description(path: Path) -> dict[str, Any]:
    """The metadata written by `save_network`."""
    if path.is_dir():
        raise InputError(path, "is a folder, not a file", _RETRAIN)
    try:
        with safe_open(path, framework="pt") as file:
            texts = file.metadata() or {}
    except FileNotFoundError:
        raise InputError(path, "does not exist", _RETRAIN) from None
    except (OSError, SafetensorError) as error:
        raise InputError(path, f"is truncated or not a safetensors file ({error})", _RETRAIN) from None
    if _FORMAT not in texts and any(name.startswith(_EARLIER_FORMATS) for name in texts):
        raise InputError(path, "was trained by an earlier version, whose weights are no longer supported", _RETRAIN)
    if _FORMAT not in texts:
        raise InputError(path, "has no weights trained by lungddpm", _RETRAIN)
    try:
        return dict(json.loads(texts[_FORMAT]))
    except (ValueError, TypeError) as error:
        raise InputError(path, f"has damaged metadata ({error})", _RETRAIN) from None


def _checksum(description: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of weights and metadata."""
    digest = hashlib.sha256(json.dumps(description).encode())
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].numpy().data)
    return digest.hexdigest()


def refuse_unfit(path: Path, weights: Mapping[str, Any], remedy: str) -> None:
    """Reject anything but tensors of finite numbers; the error names the key."""
    for key, value in weights.items():
        if (problem := problem_of(value)) is not None:
            raise InputError(path, f"key {key} {problem}", remedy)


def problems_of(weights: Mapping[str, torch.Tensor], network: nn.Module) -> list[str]:
    """What is wrong with the weights of a network, key by key; empty if they fit."""
    shapes = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    found = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    return [
        *(f"{key} is missing" for key in shapes if key not in found),
        *(f"{key} is unexpected" for key in found if key not in shapes),
        *(
            f"{key} has the shape {found[key]} instead of {shape}"
            for key, shape in shapes.items()
            if key in found and found[key] != shape
        ),
    ]
