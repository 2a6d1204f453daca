"""The published denoisers: the U-Net from our files or from `.pt` files of the published systems, and back.

A `.pt` file of torch has {step, model, ema}, the last two with the network under the prefix `denoise_fn.` and the
coefficients of the diffusion process. It does not record the orientation of the chest; the config does (`orientation`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lungddpm.config.sections import DiffusionSettings, GeneratorConfig
from lungddpm.core.errors import InputError
from lungddpm.core.files import atomic_path
from lungddpm.core.progress import LOG
from lungddpm.core.torch_files import load_checked, unwrapped
from lungddpm.models.checkpoint import (
    ADAPT,
    fill,
    load_network,
    problems_of,
    read_metadata,
    read_weights,
    refuse_unfit,
)
from lungddpm.models.denoiser import (
    ATTENTION_EDGE,
    UNet,
    build_denoiser,
    inferred_arguments,
    network_arguments,
    place_on_device,
)
from lungddpm.models.schedule import cosine_betas, published_buffers

_PREFIX = "denoise_fn."
_COPY_AGAIN = "Copy or download the published checkpoint again."
# Keys of the generator's settings, and of `grid`.
_CONFIG_KEYS = {
    "in_channels": "classes",
    "base_channels": "denoiser.base_channels",
    "multipliers": "denoiser.multipliers",
    "attention_factor": "grid.size and denoiser.attention",
}

_PUBLISHED = {
    "prediction": ("epsilon", "interpret its prediction as noise"),
    "denoiser.padding": ("zeros", "pad it with zeros"),
    "denoiser.norm": ("volume", "normalize over the volume"),
    "denoiser.time_conditioning": ("shift", "only shift features by the noise level"),
    "denoiser.wavelet": (False, "give it voxels instead of sub-bands"),
    "hint": ("none", "not give it the reference"),
}
"""Settings common to all published files, and what the published code would do with other weights."""


def load_denoiser(path: Path, config: GeneratorConfig[DiffusionSettings], device: str | torch.device = "cpu") -> UNet:
    """Build the denoiser of a config with the EMA weights of a file, ready to predict.

    Args:
        path: `.safetensors`: ours; anything else: the published format. No code in it is run.
        config: of the denoiser's generator: classes, grid, noise levels, size.
        device: where the denoiser goes.

    Raises:
        InputError: missing, truncated, damaged, of neither format, with code inside, or made with other settings than
            the config's; names these.
    """

    def build() -> UNet:
        return build_denoiser(config)

    if path.suffix == ".safetensors":
        denoiser = load_network(path, config, build, device)
    else:
        weights = _read_published(path, config)
        _explain_other_network(path, weights, config)
        denoiser = fill(path, build, weights, device, _PREFIX)
    return place_on_device(denoiser, device)


def export_published(weights: Path, output: Path) -> None:
    """Write a denoiser trained here in the published format, its EMA weights in both places.

    The published code shows it volumes in the published orientation, so it must have been trained in that one. Kernels
    cannot be flipped for it afterwards: a stride-2 convolution of an even number of voxels starts at one end.

    Raises:
        InputError: the weights are missing, truncated, not a denoiser of voxels trained here, of the orientation `ras`,
            or of inputs, a prediction or a padding that are not published; or the output is not named `.pt`.
    """
    if output.suffix != ".pt":
        raise InputError(output, "is not a name for a published checkpoint", "It must end in .pt.")
    metadata = read_metadata(weights)
    settings, network = metadata.config["settings"], read_weights(weights)
    inferred = inferred_arguments(network)
    if "timesteps" not in settings or inferred is None:
        problem = f"was trained by {metadata.config['generator']}, which is not a diffusion model of voxels"
        raise InputError(weights, problem, "Give other weights.")
    turned = {"orientation": ("published", "rotate every chest")}
    for key, (published, consequence) in {**turned, **_PUBLISHED}.items():
        if (own := metadata.trained_for[key]) != published:
            problem = f"was trained with {key} {own}: the published code would {consequence}"
            raise InputError(weights, problem, f"Train it with {key}: {published}, then export it.")
    if further := inferred["in_channels"] - 1 - len(settings["classes"]):
        problem = f"has {further} input channels besides CT and layout, which the published code does not fill"
        raise InputError(weights, problem, "Give other weights.")
    process = published_buffers(cosine_betas(settings["timesteps"]))
    network = {_PREFIX + name: tensor for name, tensor in network.items()}
    with atomic_path(output) as temporary:
        torch.save({"step": metadata.steps, "model": process | network, "ema": process | network}, temporary)


def _read_published(path: Path, config: GeneratorConfig[DiffusionSettings]) -> dict[str, torch.Tensor]:
    """The EMA weights of a published checkpoint, float32, by their keys without the prefix."""
    try:
        content = load_checked(path)
        average = content.get("ema") if isinstance(content, Mapping) else None
        if not isinstance(average, Mapping):
            problem = "is not a published checkpoint: it has no entry 'ema' with the weights"
            raise InputError(path, problem, "Use a file with step, model and ema, or a model.safetensors.")
        average = unwrapped(average)
    except FileNotFoundError:
        raise InputError(path, "does not exist", _COPY_AGAIN) from None
    except ValueError as error:
        raise InputError(path, str(error), _COPY_AGAIN) from None
    network = {key: value for key, value in average.items() if key.startswith(_PREFIX)}
    if not network:
        raise InputError(path, f"has no key that starts with {_PREFIX}", _COPY_AGAIN)
    for key, (published, _) in _PUBLISHED.items():
        if (asked := config.decides_fit()[key]) != published:
            raise InputError(path, f"has a network with {key} {published} (the config has {asked})", ADAPT)
    if "betas" not in average:
        raise InputError(path, "has no key betas, the noise schedule", _COPY_AGAIN)
    refuse_unfit(path, {"betas": average["betas"], **network}, _COPY_AGAIN)
    _check_schedule(path, average["betas"], config)
    if others := {value.dtype for value in network.values()} - {torch.float32}:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in others))
        LOG.info("%s has weights in %s: they are converted to float32", path, names)
    return {key.removeprefix(_PREFIX): value.float() for key, value in network.items()}


def _check_schedule(path: Path, betas: torch.Tensor, config: GeneratorConfig[DiffusionSettings]) -> None:
    timesteps = config.settings.timesteps
    if betas.shape != (timesteps,):
        trained = betas.numel()
        raise InputError(path, f"was trained with timesteps {trained}, but the config has {timesteps}", ADAPT)
    rounding = torch.finfo(betas.dtype).eps
    if not torch.allclose(betas.double(), cosine_betas(timesteps), rtol=rounding, atol=1e-5):
        raise InputError(path, "was trained with a noise schedule other than cosine", "Use other weights.")


def _explain_other_network(
    path: Path, weights: Mapping[str, torch.Tensor], config: GeneratorConfig[DiffusionSettings]
) -> None:
    """Reject weights of a `UNet` with other settings, and name these."""
    inferred = inferred_arguments(weights)
    if inferred is None:
        return
    with torch.device("meta"):
        other = UNet(**inferred, norm_groups=1)
    asked = network_arguments(config)
    differing = [
        f"{_CONFIG_KEYS[name]}: {_in_words(name, value)} (the config has {_in_words(name, asked[name])})"
        for name, value in inferred.items()
        if value != asked[name]
    ]
    if differing and not problems_of(weights, other):
        raise InputError(path, f"has a different network, {'; '.join(differing)}", ADAPT)


def _in_words(argument: str, value: Any) -> str:
    if argument == "in_channels":
        return f"{value - 1} classes"
    if argument == "attention_factor":
        if value is None:
            return "no attention"
        return f"attention for {value * ATTENTION_EDGE:g} voxels per edge" if value else "attention in the middle alone"
    return str(value)
