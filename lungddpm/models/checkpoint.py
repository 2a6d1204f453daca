"""Trained denoisers on disk, in two formats that this module reads and writes.

Ours is `model.safetensors`: EMA weights, with the generator's config that made them in the metadata. The published one
is a `.pt` file of torch: {step, model, ema}, the last two holding the network under the prefix `denoise_fn.` beside the
coefficients of the diffusion process. It does not say how its network sees the chest; the config does
(`orientation`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from lungddpm.config.sections import DiffusionSettings, GeneratorConfig, TrainedSettings
from lungddpm.core.code import CodeFromStep
from lungddpm.core.errors import InputError
from lungddpm.core.files import atomic_path
from lungddpm.core.progress import LOG
from lungddpm.core.torch_files import fault_of, load_checked, unwrapped
from lungddpm.models.denoiser import ATTENTION_EDGE, UNet, build_denoiser, inferred_arguments, network_arguments, place
from lungddpm.models.schedule import cosine_betas, published_buffers

_FORMAT = "lungddpm-model-3"
_EARLIER_FORMATS = "lungddpm-denoiser"
_PREFIX = "denoise_fn."
_RETRAIN = "Train the generator again (lungddpm train), or give the path of its model.safetensors."
_COPY_AGAIN = "Copy or download the published checkpoint again."
_ADAPT = "Set the config to what the weights were trained with, or give other weights."
# Keys of the generator's settings, and of `grid`.
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
        config: of the generator (see `GeneratorConfig.dump`).
        fit: what their use must agree with (see `GeneratorConfig.decides_fit`).
        steps: optimizer steps taken.
        config_fingerprint: of the keys that decide what training computes.
        data_fingerprint: of the cases that it saw.
        code: which code took which steps, where that is known.
    """

    config: dict[str, Any]
    fit: dict[str, Any]
    steps: int
    config_fingerprint: str
    data_fingerprint: str
    code: list[CodeFromStep] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        config: GeneratorConfig[TrainedSettings],
        steps: int,
        config_fingerprint: str,
        data_fingerprint: str,
        code: Sequence[CodeFromStep] = (),
    ) -> Metadata:
        """What a generator's training writes."""
        return cls(config.dump(), config.decides_fit(), steps, config_fingerprint, data_fingerprint, list(code))


def save_denoiser(path: Path, denoiser: UNet, metadata: Metadata) -> None:
    """Write weights and metadata, atomically."""
    description = asdict(metadata)
    weights = {name: tensor.cpu().contiguous() for name, tensor in denoiser.state_dict().items()}
    # One key: safetensors writes several in an order that changes, and equal weights would not be equal files.
    texts = {_FORMAT: json.dumps({**description, "sha256": _checksum(description, weights)})}
    with atomic_path(path) as temporary:
        save_file(weights, temporary, texts)


def read_metadata(path: Path) -> Metadata:
    """Read what is written beside the weights of our format; cheap.

    Raises:
        InputError: missing, cut short, or not weights of ours.
    """
    held = _read_description(path)
    try:
        return Metadata(**{each.name: held[each.name] for each in fields(Metadata)})
    except KeyError as error:
        raise InputError(path, f"has damaged metadata (no {error})", _RETRAIN) from None


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read the weights of our format, float32, by their keys, and compare the checksum that was written with them.

    Raises:
        InputError: missing, cut short, damaged, or not a denoiser of ours.
    """
    held = _read_description(path)
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(path, f"is cut short or damaged ({error})", _RETRAIN) from None
    _refuse_unfit(path, weights, _RETRAIN)
    if held.pop("sha256", None) != _checksum(held, weights):
        raise InputError(path, "is damaged: it differs from the checksum that was written with it", _RETRAIN)
    return weights


def load_denoiser(path: Path, config: GeneratorConfig[DiffusionSettings], device: str | torch.device = "cpu") -> UNet:
    """Build the denoiser of a config with the EMA weights of a file, ready to predict.

    Args:
        path: `.safetensors`: ours; anything else: the published format. No code in it is run.
        config: of the generator that the denoiser is of: classes, grid, noise levels, size.
        device: where the denoiser goes.

    Raises:
        InputError: missing, cut short, damaged, of neither format, with code inside, or made for something else than
            the config asks; names the keys that are wrong.
    """
    if path.suffix == ".safetensors":
        _check_fits(path, read_metadata(path), config)
        weights, prefix = read_weights(path), ""
    else:
        weights, prefix = _read_published(path, config), _PREFIX
    with torch.device("meta"):
        denoiser = build_denoiser(config)
    _check_keys(path, weights, denoiser, config, prefix)
    denoiser.to_empty(device=device).load_state_dict(weights)
    return place(denoiser, device).eval().requires_grad_(False)


def export_published(weights: Path, output: Path) -> None:
    """Write a denoiser of ours in the published format, its EMA weights in both places.

    The published code shows it volumes in the published orientation, so it must have been trained in that one. Kernels
    cannot be flipped for it afterwards: a stride-2 convolution of an even number of voxels starts at one end.

    Raises:
        InputError: the weights are missing, cut short, not a denoiser of ours, or of the orientation `ras`; or the
            output is not named `.pt`.
    """
    if output.suffix != ".pt":
        raise InputError(output, "is no name for a published checkpoint", "End it in .pt.")
    metadata = read_metadata(weights)
    settings = metadata.config["settings"]
    if (orientation := settings["orientation"]) != "published":
        problem = f"was trained with orientation {orientation}: the published code would show it every chest turned"
        raise InputError(weights, problem, "Train it with orientation: published, then export it.")
    process = published_buffers(cosine_betas(settings["timesteps"]))
    network = {_PREFIX + name: tensor for name, tensor in read_weights(weights).items()}
    with atomic_path(output) as temporary:
        torch.save({"step": metadata.steps, "model": process | network, "ema": process | network}, temporary)


def _check_fits(path: Path, metadata: Metadata, config: GeneratorConfig[TrainedSettings]) -> None:
    asked = config.decides_fit()
    for key in dict.fromkeys([*metadata.fit, *asked]):
        if (trained := metadata.fit.get(key)) != asked.get(key):
            raise InputError(path, f"was trained with {key} {trained}, the config says {asked.get(key)}", _ADAPT)


def _read_description(path: Path) -> dict[str, Any]:
    """What `save_denoiser` wrote beside the weights."""
    if path.is_dir():
        raise InputError(path, "is a folder, not a file", _RETRAIN)
    try:
        with safe_open(path, framework="pt") as file:
            texts = file.metadata() or {}
    except FileNotFoundError:
        raise InputError(path, "does not exist", _RETRAIN) from None
    except (OSError, SafetensorError) as error:
        raise InputError(path, f"is cut short or not a safetensors file ({error})", _RETRAIN) from None
    if any(name.startswith(_EARLIER_FORMATS) for name in texts):
        raise InputError(path, "was trained by an earlier version, whose weights are not read any more", _RETRAIN)
    if _FORMAT not in texts:
        raise InputError(path, "holds no weights trained by lungddpm", _RETRAIN)
    try:
        return dict(json.loads(texts[_FORMAT]))
    except (ValueError, TypeError) as error:
        raise InputError(path, f"has damaged metadata ({error})", _RETRAIN) from None


def _checksum(description: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of weights and of what is written beside them."""
    digest = hashlib.sha256(json.dumps(description).encode())
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].numpy())
    return digest.hexdigest()


def _read_published(path: Path, config: GeneratorConfig[DiffusionSettings]) -> dict[str, torch.Tensor]:
    """The EMA weights of a published checkpoint, float32, by their keys without the prefix."""
    try:
        content = load_checked(path)
        average = content.get("ema") if isinstance(content, Mapping) else None
        if not isinstance(average, Mapping):
            problem = "is not a published checkpoint: it has no entry 'ema' with the weights"
            raise InputError(path, problem, "Give a file with step, model and ema, or a model.safetensors.")
        average = unwrapped(average)
    except FileNotFoundError:
        raise InputError(path, "does not exist", _COPY_AGAIN) from None
    except ValueError as error:
        raise InputError(path, str(error), _COPY_AGAIN) from None
    network = {key: value for key, value in average.items() if key.startswith(_PREFIX)}
    if not network:
        raise InputError(path, f"has no key that starts with {_PREFIX}", _COPY_AGAIN)
    if "betas" not in average:
        raise InputError(path, "has no key betas, the noise schedule", _COPY_AGAIN)
    _refuse_unfit(path, {"betas": average["betas"], **network}, _COPY_AGAIN)
    _check_schedule(path, average["betas"], config)
    if others := {value.dtype for value in network.values()} - {torch.float32}:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in others))
        LOG.info("%s holds weights in %s: they are taken as float32", path, names)
    return {key.removeprefix(_PREFIX): value.float() for key, value in network.items()}


def _refuse_unfit(path: Path, weights: Mapping[str, Any], remedy: str) -> None:
    for key, value in weights.items():
        if (fault := fault_of(value)) is not None:
            raise InputError(path, f"key {key} {fault}", remedy)


def _check_schedule(path: Path, betas: torch.Tensor, config: GeneratorConfig[DiffusionSettings]) -> None:
    timesteps = config.settings.timesteps
    if betas.shape != (timesteps,):
        trained = betas.numel()
        raise InputError(path, f"was trained with timesteps {trained}, the config says {timesteps}", _ADAPT)
    rounding = torch.finfo(betas.dtype).eps
    if not torch.allclose(betas.double(), cosine_betas(timesteps), rtol=rounding, atol=1e-5):
        raise InputError(path, "was trained with another noise schedule than the cosine one", "Give other weights.")


def _check_keys(
    path: Path,
    weights: Mapping[str, torch.Tensor],
    denoiser: UNet,
    config: GeneratorConfig[DiffusionSettings],
    prefix: str,
) -> None:
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
