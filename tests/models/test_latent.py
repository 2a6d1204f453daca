"""Latents: scaled, never drawn, and layouts shown to their denoiser without loss."""

import numpy as np
import pytest
import torch
from monai.networks.nets import AutoencoderKL
from torch.distributions import Normal, kl_divergence

from lungddpm.config.loading import parse_config
from lungddpm.config.sections import Autoencoder
from lungddpm.core.volume import to_model_range
from lungddpm.models.adversarial import Discriminators
from lungddpm.models.data import TrainingData
from lungddpm.models.latent import (
    LatentDiffusion,
    LatentError,
    VoxelAutoencoder,
    batch_in_latents,
    build_latent_diffusion,
    divergence,
    draw_by_latents,
    in_latents,
    in_voxels,
    latent_noise,
)
from lungddpm.models.latent_training import AutoencoderObjective, measure_latents, opponent_layers
from lungddpm.models.objectives import WeightedError
from lungddpm.models.recipe import Batch
from lungddpm.models.sampling import DiffusionSolver, noise_levels
from lungddpm.models.schedule import cosine_betas

WINDOW = (-1024.0, 600.0)
SMALL = {"channels": [4, 8], "norm_groups": 2, "latent_channels": 3}


def make_config(hint="none", **autoencoder):
    settings = {
        "hint": hint,
        "denoiser": {"base_channels": 4, "multipliers": [1, 2], "norm_groups": 2, "attention": False},
        "autoencoder": {**SMALL, **autoencoder},
        "timesteps": 20,
        "sampling": {"steps": 3},
    }
    values = {"grid": {"size": [16] * 3}, "generators": {"latent_diffusion": settings}}
    return parse_config({**values, "arms": {"generators": ["latent_diffusion"]}}).for_training("latent_diffusion")


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = build_latent_diffusion(make_config()).eval().requires_grad_(False)
    network.mean.copy_(torch.tensor([0.1, -0.2, 0.3]))
    network.sd.copy_(torch.tensor([0.5, 0.7, 0.9]))
    return network


@pytest.mark.parametrize("reduction", [2, 4])
def test_no_voxel_is_lost_on_the_grid_of_latents(reduction):
    volumes = torch.randn(2, 3, 8, 12, 16, generator=torch.Generator().manual_seed(0))
    latents = in_latents(volumes, reduction)
    assert torch.equal(in_voxels(latents, reduction), volumes)
    # Each channel is every r-th voxel, from each start; classes stay together.
    steps = range(reduction)
    expected = [
        volumes[:, c, z::reduction, y::reduction, x::reduction]
        for c in range(3) for z in steps for y in steps for x in steps
    ]  # fmt: skip
    assert torch.equal(latents, torch.stack(expected, dim=1))
    assert in_latents(volumes[:, :0], reduction).shape == (2, 0, 8 // reduction, 12 // reduction, 16 // reduction)


def test_each_number_of_the_noise_is_used_once():
    noise = torch.randn(5, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    of_latents = latent_noise(noise, 2, 8)
    assert torch.equal(of_latents.flatten().sort().values, noise.flatten().sort().values)
    assert torch.equal(latent_noise(noise, 2, 3), of_latents[:, :3])


def test_latents_have_unit_variance_over_the_cases(network):
    random = np.random.default_rng(0)
    ct = np.stack([random.normal(level, 200, (16, 16, 16)).astype(np.int16) for level in (-700, 0)])
    measure_latents(network, TrainingData(["a", "b"], ct, np.zeros_like(ct, np.uint8)), WINDOW)
    volumes = torch.from_numpy(to_model_range(ct, WINDOW))[:, None]
    latents = network.encode(volumes).transpose(0, 1).flatten(1).numpy()
    assert latents.mean(axis=1) == pytest.approx([0] * 3, abs=1e-4)
    assert latents.std(axis=1) == pytest.approx([1] * 3, abs=1e-4)
    assert network.knows_scale
    # Scaling is undone before decoding.
    assert torch.allclose(network.decode(network.encode(volumes)), network.reconstruct(volumes), atol=1e-5)


def test_a_channel_that_is_not_used_stays_finite(network):
    network.autoencoder.network.quant_conv_mu.conv.weight[1] = 0
    ct = np.zeros((1, 16, 16, 16), np.int16)
    measure_latents(network, TrainingData(["a"], ct, ct.astype(np.uint8)), WINDOW)
    assert network.encode(torch.zeros(1, 1, 16, 16, 16)).isfinite().all()


def test_latents_are_means_and_never_drawn(network):
    batch = Batch(
        torch.rand(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1,
        torch.ones(2, 2, 8, 8, 8),
        torch.randn(2, 1, 8, 8, 8),
        torch.tensor([3, 4]),
        torch.rand(2, 1, 8, 8, 8),
    )
    torch.manual_seed(1)
    first = batch_in_latents(network, batch)
    torch.manual_seed(2)
    assert torch.equal(batch_in_latents(network, batch).clean, first.clean)
    # Nor does their distribution's width matter.
    network.autoencoder.network.quant_conv_log_sigma.conv.weight.fill_(5)
    assert torch.equal(batch_in_latents(network, batch).clean, first.clean)
    means, _ = network.autoencoder.network.encode(batch.clean)
    assert torch.allclose(first.clean[:, 1], (means[:, 1] + 0.2) / 0.7)
    assert first.clean.shape == first.noise.shape == (2, 3, 4, 4, 4)
    assert first.condition.shape == (2, 16, 4, 4, 4)
    assert first.shown.shape == (2, 8, 4, 4, 4)


@pytest.mark.parametrize("value", [-1.0, 0.3])
def test_a_constant_field_stays_one(value):
    torch.manual_seed(0)
    autoencoder = VoxelAutoencoder(Autoencoder(**SMALL, padding="replicate", norm="voxel")).eval()
    field = torch.full((1, 1, 12, 8, 16), value)
    mean, sd = autoencoder.encode(field)
    decoded = autoencoder.decode(mean)
    assert decoded.shape == field.shape
    for values in (mean, sd, decoded):
        assert values.flatten(2).std(dim=2).max() < 1e-5
    # With zeros beyond the volume, its faces differ.
    torch.manual_seed(0)
    plain = VoxelAutoencoder(Autoencoder(**SMALL)).eval()
    assert plain.decode(plain.encode(field)[0]).std() > 1e-3


def test_a_crop_is_encoded_as_within_its_volume():
    """With norms of voxels, but for what lies near its faces; with norms of the volume, it is not."""
    volume = torch.rand(1, 1, 40, 8, 8, generator=torch.Generator().manual_seed(0))
    volume[:, :, 20:] += 3
    differences = {}
    for norm in ("voxel", "volume"):
        torch.manual_seed(0)
        autoencoder = VoxelAutoencoder(Autoencoder(**SMALL, padding="replicate", norm=norm)).eval()
        whole, crop = (autoencoder.encode(part)[0] for part in (volume, volume[:, :, :20]))
        differences[norm] = (whole[:, :, :3] - crop[:, :, :3]).abs().max().item()
    assert differences["voxel"] < 1e-5
    assert differences["volume"] > 1e-2


def test_the_plain_autoencoder_is_monais():
    torch.manual_seed(0)
    own = VoxelAutoencoder(Autoencoder(**SMALL, residual_blocks=2)).eval()
    other = AutoencoderKL(
        3, 1, 1, 2, [4, 8], [False] * 2, 3, 2, with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False
    ).eval()
    other.load_state_dict(own.network.state_dict())
    volumes, noise = torch.rand(2, 1, 8, 8, 8), torch.randn(2, 3, 4, 4, 4)
    mean, sd = other.encode(volumes)
    expected = other.decode(mean + sd * noise)
    for ours, theirs in zip(own(volumes, noise), (expected, mean, sd), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_fresh_autoencoder_does_not_drown_its_latents_in_noise():
    torch.manual_seed(0)
    mean, sd = VoxelAutoencoder(Autoencoder()).encode(torch.rand(1, 1, 16, 16, 16) * 2 - 1)
    assert (sd.mean(dim=(2, 3, 4)) < mean.std(dim=(2, 3, 4))).all()


def test_the_divergence_is_torchs():
    mean, sd = torch.randn(4, 3, 2, 2, 2), torch.rand(4, 3, 2, 2, 2) + 0.1
    expected = kl_divergence(Normal(mean, sd), Normal(0.0, 1.0)).sum(dim=(1, 2, 3, 4)).mean()
    assert divergence(mean, sd).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_latent_counts_as_nodule_where_one_voxel_does():
    error = LatentError(WeightedError("l1", 4.0, nodule_channel=1), 2)
    condition = -torch.ones(1, 2, 4, 2, 2)
    condition[0, 0] = 1  # lung
    condition[0, 1, 3, 1, 0] = 1  # one nodule voxel, in the second of two latents
    predicted, target = torch.tensor([1.0, 3.0, 0.0, 2.0]).view(1, 2, 2, 1, 1), torch.zeros(1, 2, 2, 1, 1)
    # Two channels of two latents with the weights 1 and 4, whose mean is 2.5.
    expected = np.mean([1 * 1, 4 * 3, 1 * 0, 4 * 2]) / 2.5
    assert error(predicted, target, in_latents(condition, 2)).item() == pytest.approx(expected)


class _Shifted(torch.nn.Module):
    """Decodes everything 0.1 too bright, from latents of mean 0.5 and standard deviation 2."""

    def forward(self, volumes, noise):
        return volumes + 0.1, torch.full_like(noise, 0.5), torch.full_like(noise, 2.0)


class _Undecided(torch.nn.Module):
    """Gives real CT 0.9 and decoded CT 0.25, which it distinguishes by their brightness."""

    def forward(self, volumes):
        logits = torch.where(volumes.mean(dim=(1, 2, 3, 4)) > 0.05, 0.25, 0.9)
        return [[logits.view(-1, 1, 1, 1, 1)]]


def test_the_autoencoders_losses_are_those_computed_by_hand():
    settings = Autoencoder(**SMALL, kl_weight=1e-3, adversarial_weight=0.1)
    objective = AutoencoderObjective(WeightedError("l1", 1.0, 1), settings)
    zeros = torch.zeros(2, 1, 4, 4, 4)
    batch = Batch(zeros, torch.ones(2, 2, 4, 4, 4), torch.randn(2, 1, 4, 4, 4), torch.zeros(2))
    # 3 channels of 2^3 latents; their divergence is (m^2 + s^2 - 1) / 2 - log s each.
    expected = 0.1 + 1e-3 * 24 * ((0.25 + 4 - 1) / 2 - np.log(2))
    alone, decoded = objective.alone(_Shifted(), batch)
    assert alone.item() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(decoded, zeros + 0.1)
    loss, _ = objective.loss(_Shifted(), batch, _Undecided())
    assert loss.item() == pytest.approx(expected + 0.1 * (1 - 0.25) ** 2, rel=1e-5)
    opponent = objective.opponent_loss(_Undecided(), batch, decoded)
    assert opponent.item() == pytest.approx(((1 - 0.9) ** 2 + 0.25**2) / 2, rel=1e-5)


@pytest.mark.parametrize(("edge", "layers"), [(6, 1), (8, 1), (12, 2), (16, 2), (24, 3), (128, 3)])
def test_the_opponent_fits_its_volumes(edge, layers):
    assert opponent_layers(edge) == layers
    if edge < 30:
        (features,) = Discriminators(1, 2, layers, scales=1)(torch.zeros(2, 1, edge, edge, edge))
        assert min(features[-1].shape[2:]) > 0


class _Ideal(torch.nn.Module):
    """The best denoiser of latents that are constant: it predicts the clean latents."""

    def forward(self, inputs, times):
        return torch.full_like(inputs[:, :3], 0.25)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmsolver++", "unipc"])
def test_drawing_ends_at_the_latents_that_the_denoiser_knows(network, sampler):
    betas = cosine_betas(20)
    solver = DiffusionSolver(sampler, 2, betas, noise_levels(sampler, betas, 5), "clean", limit=lambda implied: implied)
    ideal = LatentDiffusion(network.autoencoder, _Ideal())
    ideal.mean.copy_(network.mean)
    ideal.sd.copy_(network.sd)
    condition, reference = torch.ones(2, 2, 16, 16, 16), torch.zeros(2, 1, 16, 16, 16)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    drawn = draw_by_latents(ideal, solver, "none", condition, reference, generators)
    latents = 0.25 * network.sd + network.mean
    expected = network.autoencoder.decode(latents.view(1, 3, 1, 1, 1).expand(2, 3, 8, 8, 8))
    assert torch.allclose(drawn, expected, atol=1e-4)
