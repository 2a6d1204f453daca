"""Latent diffusion: an autoencoder, and a denoiser that draws its latents (Rombach et al. 2022, arXiv 2112.10752).

The denoiser learns the means of the latents, each channel scaled to mean 0 and variance 1 over the training cases. It
does not learn draws from their distributions, whose noise it would reproduce. Layouts and hints are not downsampled:
the voxels of a latent become its channels. The reference is pasted in voxels, after decoding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from monai.networks.nets import AutoencoderKL
from monai.networks.nets.autoencoderkl import AsymmetricPad
from monai.networks.utils import pixelshuffle, pixelunshuffle
from torch import nn

from lungddpm.config.sections import Autoencoder, GeneratorConfig, Hint, LatentSettings, Norm, Padding
from lungddpm.models.denoiser import GroupNorm32, UNet, body_arguments, input_channels
from lungddpm.models.hints import seeing, show
from lungddpm.models.objectives import WeightedError
from lungddpm.models.recipe import Batch
from lungddpm.models.sampling import Solver, sample_free

_FRESH_LOG_VARIANCE = -6.0


class VoxelAutoencoder(nn.Module):
    """MONAI's `AutoencoderKL` without attention; its noise is an argument.

    Args:
        settings: sizes, padding and norm.
        checkpointing: store only the inputs of encoder and decoder, and recompute the rest for gradients.
    """

    def __init__(self, settings: Autoencoder, checkpointing: bool = False):
        super().__init__()
        self.reduction, self.latent_channels = settings.reduction, settings.latent_channels
        self.network = AutoencoderKL(
            spatial_dims=3,
            num_res_blocks=settings.residual_blocks,
            channels=settings.channels,
            attention_levels=[False] * len(settings.channels),
            latent_channels=settings.latent_channels,
            norm_num_groups=settings.norm_groups,
            with_encoder_nonlocal_attn=False,
            with_decoder_nonlocal_attn=False,
            use_checkpoint=checkpointing,
        )
        _see_as(self.network, settings.padding, settings.norm)
        # Otherwise a fresh network drowns its latents in noise, and short trainings never use all channels.
        nn.init.constant_(self.network.get_parameter("quant_conv_log_sigma.conv.bias"), _FRESH_LOG_VARIANCE)

    def encode(self, volumes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, 1, D, H, W) CT -> mean and standard deviation of its latents, (N, latent_channels, d, h, w) each."""
        mean, sd = self.network.encode(volumes)
        return mean, sd

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(N, latent_channels, d, h, w) -> CT (N, 1, D, H, W)."""
        return self.network.decode(latents)

    def forward(self, volumes: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Encode and decode as in training, with a draw from the latents' distributions.

        Args:
            volumes: (N, 1, D, H, W) CT.
            noise: (N, latent_channels, d, h, w) standard normal.

        Returns:
            The decoded CT, and what `encode` gives.
        """
        mean, sd = self.encode(volumes)
        return self.decode(mean + sd * noise), mean, sd


class LatentDiffusion(nn.Module):
    """An autoencoder, the scale of its latents, and a denoiser of scaled latents.

    Args:
        autoencoder: of CT.
        denoiser: its inputs are noisy latents, and `in_latents` of condition and hint.
    """

    mean: torch.Tensor
    sd: torch.Tensor

    def __init__(self, autoencoder: VoxelAutoencoder, denoiser: nn.Module):
        super().__init__()
        self.autoencoder, self.denoiser = autoencoder, denoiser
        self.channels, self.reduction = autoencoder.latent_channels, autoencoder.reduction
        for name in ("mean", "sd"):
            self.register_buffer(name, torch.zeros(self.channels))

    @property
    def knows_scale(self) -> bool:
        """Whether the autoencoder is trained and its latents are measured."""
        return bool((self.sd > 0).all())

    def encode(self, volumes: torch.Tensor) -> torch.Tensor:
        """(N, 1, D, H, W) CT in [-1, 1] -> means of its scaled latents (N, channels, d, h, w) float32."""
        mean, _ = self.autoencoder.encode(volumes)
        return (mean.float() - _per_channel(self.mean)) / _per_channel(self.sd)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(N, channels, d, h, w) scaled latents -> CT (N, 1, D, H, W) float32."""
        return self.autoencoder.decode(latents * _per_channel(self.sd) + _per_channel(self.mean)).float()

    @torch.inference_mode()
    def reconstruct(self, volumes: torch.Tensor) -> torch.Tensor:
        """(N, 1, D, H, W) CT -> the same, encoded and decoded; float32."""
        mean, _ = self.autoencoder.encode(volumes)
        return self.autoencoder.decode(mean).float()

    def forward(self, inputs: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """What the denoiser predicts: see `UNet`."""
        return self.denoiser(inputs, times)


def build_latent_diffusion(config: GeneratorConfig[LatentSettings]) -> LatentDiffusion:
    """The networks that a config describes, with fresh weights from torch's global generator."""
    settings = config.settings
    autoencoder = VoxelAutoencoder(settings.autoencoder, settings.training.gradient_checkpointing)
    edge = settings.drawn_size(config.grid)[0] // autoencoder.reduction
    channels = autoencoder.latent_channels
    denoiser = UNet(
        channels + denoiser_channels(config), **body_arguments(settings.denoiser, edge), out_channels=channels
    )
    return LatentDiffusion(autoencoder, denoiser)


def denoiser_channels(config: GeneratorConfig[LatentSettings]) -> int:
    """Input channels of the denoiser besides noisy latents: layout and hint, a channel per voxel of a latent."""
    return (input_channels(config) - 1) * config.settings.autoencoder.reduction**3


def in_latents(volumes: torch.Tensor, reduction: int) -> torch.Tensor:
    """Volumes on the grid of latents, without loss (space to depth): (N, C, D, H, W) -> (N, C r^3, d, h, w).

    The voxels of a latent are channels one after the other, z before y before x.
    """
    if not volumes.shape[1]:
        return volumes[:, :, ::reduction, ::reduction, ::reduction]
    return pixelunshuffle(volumes, 3, reduction)


def in_voxels(latents: torch.Tensor, reduction: int) -> torch.Tensor:
    """The inverse of `in_latents`."""
    return pixelshuffle(latents, 3, reduction)


def latent_noise(noise: torch.Tensor, reduction: int, channels: int) -> torch.Tensor:
    """Standard normal (N, channels, d, h, w) from that of voxels, (N, 1, D, H, W); each number is used once."""
    return in_latents(noise, reduction)[:, :channels]


def batch_in_latents(network: LatentDiffusion, batch: Batch) -> Batch:
    """Encode a batch, as the denoiser is trained on it; draws no random numbers."""
    with torch.no_grad():
        clean = network.encode(batch.clean)
    reduction = network.reduction
    return Batch(
        clean,
        in_latents(batch.condition, reduction),
        latent_noise(batch.noise, reduction, network.channels),
        batch.levels,
        None if batch.shown is None else in_latents(batch.shown, reduction),
    )


class LatentError(WeightedError):
    """The weighted mean error of latents: those with a nodule voxel may count more.

    Args:
        error: per latent.
        reduction: voxels along the edge of a latent.
    """

    def __init__(self, error: WeightedError, reduction: int):
        self.error, self.lesion_weight, self.nodule_channel = error.error, error.lesion_weight, error.nodule_channel
        self.reduction = reduction

    def __call__(self, predicted: torch.Tensor, target: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """A scalar, from tensors (N, channels, d, h, w) and `in_latents` of the condition."""
        voxels = in_voxels(condition, self.reduction)
        return super().__call__(predicted, target, F.max_pool3d(voxels, self.reduction))


def divergence(mean: torch.Tensor, sd: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of normal distributions from the standard one, summed over a sample's latents.

    Args:
        mean: (N, C, d, h, w).
        sd: standard deviations, same shape.

    Returns:
        A scalar: the mean over samples, in nats.
    """
    mean, sd = mean.float(), sd.float()
    return (mean.square() + sd.square() - 1 - 2 * sd.log()).flatten(1).sum(dim=1).mean() / 2


@torch.inference_mode()
def draw_by_latents(
    network: LatentDiffusion,
    solver: Solver,
    hint: Hint,
    condition: torch.Tensor,
    reference: torch.Tensor,
    generators: Sequence[torch.Generator],
) -> torch.Tensor:
    """Draw latents for layouts and decode them; open voxels are drawn as well.

    Args:
        network: the autoencoder and the denoiser.
        solver: of the denoiser's process.
        hint: what the denoiser sees of the reference.
        condition: (N, C, D, H, W), see `condition_channels`.
        reference: (N, 1, D, H, W) CT in [-1, 1].
        generators: one per volume, on the device of `condition`.

    Returns:
        (N, 1, D, H, W) float32 CT.
    """
    shown = in_latents(show(hint, reference, condition), network.reduction)
    cells = in_latents(condition, network.reduction)
    latents = sample_free(seeing(network, shown), solver, cells, generators, channels=network.channels)
    return network.decode(latents)


def _per_channel(values: torch.Tensor) -> torch.Tensor:
    return values.view(1, -1, 1, 1, 1)


def _see_as(network: nn.Module, padding: Padding, norm: Norm) -> None:
    """Give MONAI's convolutions and norms our padding and norm; their weights keep their names."""
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.GroupNorm):
            own = GroupNorm32(module.num_groups, module.num_channels, module.eps)
            own.per_voxel = norm == "voxel"
            network.set_submodule(name, own)
        elif isinstance(module, AsymmetricPad) and padding == "replicate":
            network.set_submodule(name, nn.ReplicationPad3d((0, 1, 0, 1, 0, 1)))
        elif isinstance(module, nn.Conv3d):
            module.padding_mode = padding
