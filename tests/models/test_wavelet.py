"""The Haar transform against its definition, and networks that work on its sub-bands."""

import numpy as np
import pytest
import torch
from made_up_trainings import train

from lungddpm.config.loading import parse_config
from lungddpm.core import cases
from lungddpm.core.errors import ConfigError, InputError
from lungddpm.core.labels import Label
from lungddpm.generators import Task, plugin
from lungddpm.models.checkpoint import Metadata, save_network
from lungddpm.models.denoiser import UNet, WaveletUNet, build_denoiser
from lungddpm.models.published_checkpoint import export_published, load_denoiser
from lungddpm.models.wavelet import haar, inverse_haar, space_to_depth
from lungddpm.operations.plan import network_cost


@pytest.fixture
def volumes():
    return torch.randn(2, 1, 6, 8, 10, generator=torch.Generator().manual_seed(0))


def test_sub_bands_are_those_of_the_definition(volumes):
    """Per cube: sums and differences of neighbours over sqrt(2), along z, then y, then x."""
    step = np.array([[1, 1], [1, -1]]) / 2**0.5
    matrix = np.kron(step, np.kron(step, step))
    found = haar(volumes)
    assert found.shape == (2, 8, 3, 4, 5)
    for z, y, x in np.ndindex(3, 4, 5):
        cubes = volumes[:, 0, 2 * z : 2 * z + 2, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].reshape(2, 8).numpy()
        np.testing.assert_allclose(found[:, :, z, y, x], cubes @ matrix.T, atol=1e-6)


def test_a_constant_volume_is_in_the_low_band_alone():
    bands = haar(torch.full((1, 1, 4, 4, 4), 3.0))
    torch.testing.assert_close(bands[:, :1], torch.full((1, 1, 2, 2, 2), 3.0 * 8**0.5))
    assert (bands[:, 1:] == 0).all()


def test_the_transform_is_undone_to_float_precision_and_keeps_the_energy(volumes):
    bands = haar(volumes)
    torch.testing.assert_close(inverse_haar(bands), volumes, rtol=0, atol=1e-6)
    torch.testing.assert_close(haar(inverse_haar(bands)), bands, rtol=0, atol=1e-6)
    torch.testing.assert_close(bands.double().square().sum(), volumes.double().square().sum(), rtol=1e-6, atol=0)


def test_white_noise_stays_white():
    noise = torch.randn(1, 1, 64, 64, 64, generator=torch.Generator().manual_seed(0))
    bands = haar(noise)[0].flatten(1)
    covariance = torch.cov(bands)
    assert (covariance - torch.eye(8)).abs().max() < 5 * (2 / bands.shape[1]) ** 0.5
    neighbours = haar(noise)[0]
    for band in neighbours:
        assert abs((band[1:] * band[:-1]).mean()) < 5 / bands.shape[1] ** 0.5


def test_labels_keep_their_places():
    volumes = torch.randn(2, 3, 4, 6, 8)
    channels = space_to_depth(volumes).unflatten(1, (3, 8))
    for z, y, x in np.ndindex(2, 2, 2):
        assert torch.equal(channels[:, :, 4 * z + 2 * y + x], volumes[:, :, z::2, y::2, x::2])


def wavelet_network(base_channels, norm_groups, **arguments):
    return WaveletUNet(
        3, base_channels=base_channels, multipliers=[1, 2], norm_groups=norm_groups, attention_factor=0, **arguments
    )


@pytest.mark.parametrize("orientation", ["ras", "published"])
def test_a_network_that_returns_its_sub_bands_returns_the_ct(monkeypatch, orientation, volumes):
    inputs = torch.cat([volumes[..., :8], torch.ones(2, 2, 6, 8, 8)], dim=1)
    seen = []

    def predict(self, bands, timesteps):
        seen.append(bands)
        return bands[:, :8]

    monkeypatch.setattr(UNet, "_predict", predict)
    network = wavelet_network(4, 2, orientation=orientation)
    torch.testing.assert_close(network(inputs, torch.zeros(2)), inputs[:, :1], rtol=0, atol=1e-6)
    assert seen[0].shape[1] == 8 * 3
    assert (seen[0][:, 8:] == 1).all()


NETWORK = {"base_channels": 4, "multipliers": [1, 2], "norm_groups": 2, "attention": False, "wavelet": True}
TRAINING = {"steps": 1, "batch_size": 2, "accumulation": 1, "crop": 8, "precision": "fp32", "ema_start": 1}
DIFFUSION = {"timesteps": 20, "denoiser": NETWORK, "training": TRAINING, "sampling": {"steps": 3}}
VALUES = {
    "grid": {"size": [16, 16, 16]},
    "generators": {
        "lung_ddpm": DIFFUSION,
        "lung_ddpm_plus": DIFFUSION,
        "lefusion": DIFFUSION,
        "med_ddpm": {"sampling": {"steps": 3}},
        "rectified_flow": {"denoiser": NETWORK, "training": TRAINING, "sampling": {"steps": 3}},
    },
    "arms": {"controls": []},
}


def with_denoiser(**keys):
    own = {**DIFFUSION, "denoiser": {**NETWORK, **keys}}
    return {**VALUES, "generators": {**VALUES["generators"], "lung_ddpm": own}}


@pytest.mark.parametrize("owner", ["lung_ddpm", "lung_ddpm_plus", "lefusion", "rectified_flow"])
def test_every_diffusion_generator_trains_and_draws_with_it(owner, tiny_cohort, tmp_path):
    config = parse_config(VALUES)
    train(config.for_training(owner), tiny_cohort, tmp_path, "cpu")
    task = Task(*cases.CaseFolder(tiny_cohort.parent / "case03").read(), seed=5)
    is_open = task.layout.array == Label.BACKGROUND
    for name in {"lung_ddpm": ["lung_ddpm", "med_ddpm"]}.get(owner, [owner]):
        generator = plugin(name).load(config.for_generator(name), tmp_path / "model.safetensors", "cpu")
        (made,) = generator.make([task])
        assert (made != task.reference.array)[task.layout.array == Label.NODULE].mean() > 0.9
        assert np.array_equal(made[is_open], task.reference.array[is_open]) == (name != "med_ddpm")


def test_channels_last_and_planes_compute_the_same():
    torch.manual_seed(0)
    network = wavelet_network(8, 4, norm="voxel", padding="replicate")
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    inputs, times = torch.randn(1, 3, 8, 8, 8), torch.tensor([3])
    with torch.inference_mode():
        expected = network(inputs, times)
        found = network.arrange(channels_last=True, winograd=True)(inputs, times)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_attention_sits_where_the_map_is_16_voxels_wide():
    """Of 64 voxels per edge, the sub-bands' first level has 32 and the second 16: one attention on the way down."""
    values = {**VALUES, "grid": {"size": [64, 64, 64]}, "arms": {"generators": [], "doses": [], "controls": []}}
    denoiser = {"base_channels": 8, "multipliers": [1, 2, 2], "norm_groups": 4, "wavelet": True}
    values["generators"] = {"lung_ddpm": {"denoiser": denoiser}}
    keys = build_denoiser(parse_config(values).for_training("lung_ddpm")).state_dict()
    assert [key for key in keys if key.startswith("input_blocks") and key.endswith("qkv.weight")] == [
        "input_blocks.3.1.qkv.weight"
    ]


def test_it_keeps_a_fraction_of_the_memory_and_takes_a_fraction_of_the_operations():
    """An eighth of the voxels in every level; the weights stay, but for the first and the last convolution."""
    costs = {}
    for wavelet in (False, True):
        denoiser = {"wavelet": wavelet, "base_channels": 32, "multipliers": [1, 1, 2], "attention": False}
        values = {"grid": {"size": [32] * 3}, "generators": {"lung_ddpm": {"denoiser": denoiser}}}
        costs[wavelet] = network_cost(parse_config(values).for_training("lung_ddpm"))
    # 24 inputs instead of 3, 8 outputs instead of 1.
    assert costs[True].parameters - costs[False].parameters == 21 * 32 * 27 + 7 * 32 * 27 + 7
    kept = {on: cost.memory_bytes - 5 * 4 * cost.parameters for on, cost in costs.items()}
    assert 6 < kept[False] / kept[True] < 8
    assert 6 < costs[False].forward_flop / costs[True].forward_flop < 8


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {**with_denoiser(), "grid": {"size": [18, 18, 18]}},
            r"grid.size \[18, 18, 18\] is not divisible by 4, as required by 2 denoiser levels and the wavelet",
        ),
        (
            {**VALUES, "generators": {"lung_ddpm": {**DIFFUSION, "training": {**TRAINING, "crop": 6}}}},
            "training.crop 6 is not divisible by 4, as required by 2 denoiser levels and the wavelet transform",
        ),
    ],
)
def test_sizes_that_cannot_be_halved_often_enough_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(values)


def test_weights_without_it_are_refused_and_those_with_it_are_not_exported(tmp_path):
    wavelet, plain = (parse_config(with_denoiser(wavelet=on)).for_training("lung_ddpm") for on in (True, False))
    for name, config in (("wavelet", wavelet), ("plain", plain)):
        path = tmp_path / f"{name}.safetensors"
        save_network(path, build_denoiser(config), Metadata.of(config, 1, "", ""))
    with pytest.raises(InputError, match="trained with denoiser.wavelet False, but the config has True"):
        load_denoiser(tmp_path / "plain.safetensors", wavelet)
    with pytest.raises(InputError, match=r"denoiser.wavelet True: the published code would give it voxels"):
        export_published(tmp_path / "wavelet.safetensors", tmp_path / "out.pt")
    export_published(tmp_path / "plain.safetensors", tmp_path / "plain.pt")
    with pytest.raises(InputError, match=r"has a network with denoiser.wavelet False \(the config has True\)"):
        load_denoiser(tmp_path / "plain.pt", wavelet)
