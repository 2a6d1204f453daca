import json

import numpy as np
import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D

from lungddpm.config.loading import parse_config
from lungddpm.core.files import fingerprint
from lungddpm.core.labels import Label
from lungddpm.models.denoiser import (
    GroupNorm32,
    ResidualBlock,
    UNet,
    build_denoiser,
    condition_channels,
    inferred_arguments,
    place_on_device,
)
from lungddpm.operations.bench import with_numbers

# Of the published key lists; the fingerprints are of {key: shape}.
PUBLISHED = [
    (32, 32, 9_966_273, "4a2336bf2761e352ccae9ed5d72e041fd16f398c4299b3ac1b9df51650983926"),
    (128, 64, 40_226_433, "09f673ee6b751270652bc5c522ad34014315046e1521ef7664bd88d369974276"),
]


@pytest.fixture(params=PUBLISHED, ids=["32", "128"])
def published(request):
    """A published network without memory, with its grid, width, number of parameters and fingerprint."""
    edge, base, *_ = request.param
    values = {"grid": {"size": [edge] * 3}, "generators": {"lung_ddpm": {"denoiser": {"base_channels": base}}}}
    config = parse_config(values).for_training("lung_ddpm")
    with torch.device("meta"):
        return build_denoiser(config), *request.param


def test_state_dict_has_the_published_size_and_fingerprint(published):
    denoiser, _, _, parameters, expected = published
    assert fingerprint({key: list(tensor.shape) for key, tensor in denoiser.state_dict().items()}) == expected
    assert sum(parameter.numel() for parameter in denoiser.parameters()) == parameters


def test_state_dict_has_the_published_keys_and_shapes(published, reference_folder):
    denoiser, edge, base, *_ = published
    listed = json.loads((reference_folder / f"lung_ddpm_{edge}_c{base}_state_keys.json").read_text())
    assert {key: list(tensor.shape) for key, tensor in denoiser.state_dict().items()} == listed


def test_arguments_are_inferred_from_the_weights(published):
    denoiser, edge, base, *_ = published
    assert inferred_arguments(denoiser.state_dict()) == {
        "in_channels": 3,
        "base_channels": base,
        "multipliers": [1, 1, 2, 3, 4],
        "attention_factor": edge / 16,
    }


def test_lung_ddpm_plus_has_the_published_size():
    """39.0 million parameters (arXiv 2508.09327), with attention where the map of a crop is 16 voxels wide."""
    config = parse_config({}).for_training("lung_ddpm_plus")
    with torch.device("meta"):
        denoiser = build_denoiser(config)
    assert sum(parameter.numel() for parameter in denoiser.parameters()) == 39_051_393
    assert inferred_arguments(denoiser.state_dict()) == {
        "in_channels": 2,
        "base_channels": 64,
        "multipliers": [1, 2, 3, 4],
        "attention_factor": 64 / 16,
    }


@pytest.mark.parametrize(("scaled", "theirs"), [(False, "default"), (True, "scale_shift")])
def test_residual_blocks_use_the_time_as_those_of_diffusers(scaled, theirs):
    """On one slice, a 3-D block is the 2-D block of its kernels' middle planes."""
    block = with_numbers(ResidualBlock(8, 16, 12, 4, scaled=scaled)).eval()
    plane = ResnetBlock2D(
        in_channels=8, out_channels=16, temb_channels=12, groups=4, eps=1e-5, time_embedding_norm=theirs
    )
    pairs = [
        (plane.norm1, block.in_layers[0]),
        (plane.conv1, block.in_layers[2]),
        (plane.time_emb_proj, block.emb_layers[1]),
        (plane.norm2, block.out_layers[0]),
        (plane.conv2, block.out_layers[3]),
        (plane.conv_shortcut, block.skip_connection),
    ]
    for their, our in pairs:
        weight = our.weight if our.weight.dim() < 5 else our.weight[:, :, our.weight.shape[2] // 2]
        their.load_state_dict({"weight": weight, "bias": our.bias})
    torch.manual_seed(0)
    h, embedding = torch.randn(2, 8, 6, 7), torch.randn(2, 12)
    with torch.inference_mode():
        torch.testing.assert_close(block(h[:, :, None], embedding)[:, :, 0], plane(h, embedding), rtol=0, atol=1e-5)


def test_output_equals_the_golden_output(golden, golden_denoiser):
    predicted = golden_denoiser(golden["denoiser_in"], golden["denoiser_t"])
    torch.testing.assert_close(predicted, golden["denoiser_out"], rtol=0, atol=1e-5)


def random_norm(channels):
    norm = GroupNorm32(32, channels).requires_grad_(False)
    torch.nn.init.normal_(norm.weight, 1, 0.1)
    torch.nn.init.normal_(norm.bias, 0, 0.1)
    return norm


@pytest.mark.parametrize(
    ("shape", "mean", "spread"),
    [
        ((1, 32, 64, 64, 64), 0, 1),
        ((1, 64, 64, 64, 64), 5, 1),
        ((1, 32, 64, 64, 64), 100, 1),
        ((1, 32, 64, 64, 64), -5, 0.05),
        ((2, 64, 16, 24, 40), 5, 1),
        ((1, 128, 16, 16, 16), 5, 1),  # a map with attention
        ((1, 32, 1, 64, 64), 0, 1),
    ],
)
def test_group_norm_is_exact_with_channels_last(shape, mean, spread):
    """Against float64 and the definition (Wu & He 2018, eq. 1, 2); float32 itself holds a mean of 100 to 1e-5."""
    torch.manual_seed(0)
    norm = random_norm(shape[1])
    # Batch items of their own mean: statistics must not mix.
    offsets = mean * (1 + torch.arange(shape[0])).view(-1, 1, 1, 1, 1)
    h = (torch.randn(shape) * spread + offsets).contiguous(memory_format=torch.channels_last_3d)
    groups = h.double().reshape(shape[0], 32, -1)
    centred = groups - groups.mean(dim=2, keepdim=True)
    scaled = (centred / (centred.square().mean(dim=2, keepdim=True) + 1e-5).sqrt()).reshape(shape)
    expected = scaled * norm.weight.view(-1, 1, 1, 1) + norm.bias.view(-1, 1, 1, 1)
    normalised = norm(h)
    assert normalised.stride() == h.stride()
    torch.testing.assert_close(normalised.double(), expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize(("value", "tolerance"), [(0.0, 1e-6), (0.3, 1e-5), (1e3, 5e-2)])
def test_group_norm_of_a_constant_volume_is_its_bias(value, tolerance):
    norm = random_norm(32)
    h = torch.full((1, 32, 8, 8, 8), value).contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(norm(h), norm.bias.view(1, -1, 1, 1, 1).expand_as(h), rtol=0, atol=tolerance)


def test_group_norm_passes_gradients_with_channels_last():
    torch.manual_seed(0)
    norm, h = random_norm(32), torch.randn(2, 32, 4, 4, 4, requires_grad=True)
    weighted = torch.randn(h.shape)
    (expected,) = torch.autograd.grad((norm(h) * weighted).sum(), h)
    (found,) = torch.autograd.grad((norm(h.contiguous(memory_format=torch.channels_last_3d)) * weighted).sum(), h)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_placed_denoiser_is_exact_on_a_large_grid(monkeypatch):
    """The published network at 64^3 and base 32 as sampling computes it; the plain module with norms in float64.

    (With everything in float64, which takes half a minute, the difference is 1.1e-5.)
    """

    def in_float64(norm, h):
        weight, bias = norm.weight.double(), norm.bias.double()
        return torch.nn.functional.group_norm(h.double(), norm.num_groups, weight, bias, norm.eps).float()

    torch.manual_seed(0)
    inputs, timesteps = torch.randn(1, 3, 64, 64, 64), torch.tensor([7])
    exact, placed = (UNet(3, 32, [1, 1, 2, 3, 4], 32, attention_factor=4) for _ in range(2))
    placed.load_state_dict(with_numbers(exact).state_dict())
    with torch.inference_mode():
        predicted = place_on_device(placed, "cpu")(inputs, timesteps)
        monkeypatch.setattr(GroupNorm32, "forward", in_float64)
        expected = exact(inputs, timesteps)
    assert expected.std() > 0.1
    torch.testing.assert_close(predicted, expected, rtol=0, atol=3e-5)


@pytest.fixture(scope="module")
def small_denoiser():
    torch.manual_seed(0)
    settings = {"base_channels": 4, "multipliers": [1, 2, 4], "norm_groups": 2, "attention": False}
    classes = ["lung", "nodule", "vessel"]
    values = {"generators": {"lung_ddpm": {"classes": classes, "denoiser": settings}}}
    return build_denoiser(parse_config(values).for_training("lung_ddpm"))


def test_without_attention_any_divisible_size_fits(small_denoiser):
    timesteps = torch.tensor([3, 9])
    for shape in ((8, 8, 8), (12, 16, 20)):
        assert small_denoiser(torch.zeros(2, 4, *shape), timesteps).shape == (2, 1, *shape)
    assert not [key for key in small_denoiser.state_dict() if "qkv" in key]
    assert len(small_denoiser.middle_block) == 2


def test_fresh_denoiser_predicts_zero(small_denoiser):
    # The last convolution starts at zero, so that training starts from the mean.
    assert not small_denoiser(torch.randn(1, 4, 8, 8, 8), torch.tensor([5])).any()


@pytest.fixture
def replicating():
    torch.manual_seed(0)
    return with_numbers(UNet(3, 8, [1, 2, 4], 2, None, padding="replicate"))


def test_without_zeros_beyond_it_the_size_of_an_even_volume_changes_nothing(replicating):
    """Why a network that is trained on crops should replicate: at its deepest level, most voxels touch a border."""
    values, timesteps = torch.tensor([-0.7, 1.0, -1.0]).view(1, 3, 1, 1, 1), torch.tensor([100])
    zeros = UNet(3, 8, [1, 2, 4], 2, None)
    zeros.load_state_dict(replicating.state_dict())
    with torch.inference_mode():
        small, large = (values.expand(1, 3, *[edge] * 3) for edge in (16, 32))
        torch.testing.assert_close(replicating(large, timesteps)[..., :16, :16, :16], replicating(small, timesteps))
        assert (zeros(large, timesteps).mean() - zeros(small, timesteps).mean()).abs() > 1e-3


@pytest.mark.parametrize(("norm", "sees_beyond"), [("voxel", False), ("volume", True)])
def test_with_norms_of_voxels_a_crop_is_seen_as_in_its_volume(norm, sees_beyond):
    """But near its border: the convolutions of two levels reach some 32 voxels."""
    torch.manual_seed(0)
    network = with_numbers(UNet(3, 8, [1, 2], 2, None, padding="replicate", norm=norm))
    volume, timesteps = torch.randn(1, 3, 88, 88, 88), torch.tensor([100])
    volume[..., 80:] += 5  # a chest wall
    crop = volume[..., 8:80, 8:80, 8:80]
    with torch.inference_mode():
        of_volume = network(volume, timesteps)[..., 43:45, 43:45, 43:45]
        of_crop = network(crop, timesteps)[..., 35:37, 35:37, 35:37]
    assert (of_volume - of_crop).abs().max() > 1e-3 if sees_beyond else torch.allclose(of_volume, of_crop, atol=1e-5)


def test_a_voxels_norm_is_over_its_channels():
    norm = GroupNorm32(2, 4)
    norm.per_voxel = True
    torch.nn.init.normal_(norm.weight)
    h = torch.randn(2, 4, 3, 3, 3)
    expected = torch.nn.functional.layer_norm(h[1, :, 0, 1, 2], (4,), norm.weight, norm.bias)
    torch.testing.assert_close(norm(h)[1, :, 0, 1, 2], expected)
    last = norm(h.contiguous(memory_format=torch.channels_last_3d))
    torch.testing.assert_close(last, norm(h))


@pytest.mark.parametrize("shape", [(8, 8, 8), (12, 8, 16)])
def test_planes_of_a_replicating_network_compute_the_same(replicating, shape):
    inputs, timesteps = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 90])
    with torch.inference_mode():
        expected = replicating(inputs, timesteps)
        found = replicating.arrange(channels_last=True, winograd=True)(inputs, timesteps)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_condition_channels_are_disjoint_and_in_zyx_order():
    layout = np.zeros((4, 5, 6), np.uint8)
    layout[1, 2, 3], layout[1, 2, 4], layout[3, 0, 5] = Label.LUNG, Label.NODULE, Label.VESSEL
    channels = condition_channels(layout, ["lung", "nodule", "vessel"])
    assert channels.shape == (3, 6, 5, 4)
    assert set(np.unique(channels)) == {-1, 1}
    assert np.argwhere(channels > 0).tolist() == [[0, 3, 2, 1], [1, 4, 2, 1], [2, 5, 0, 3]]


def test_vessels_count_as_lung_without_a_class_of_their_own():
    layout = np.array([[[Label.BACKGROUND, Label.LUNG, Label.NODULE, Label.VESSEL]]], np.uint8)
    lung, nodule = condition_channels(layout, ["lung", "nodule"])
    assert lung.ravel().tolist() == [-1, 1, -1, 1]
    assert nodule.ravel().tolist() == [-1, -1, 1, -1]


def in_published_orientation(volumes):
    """By index, for (..., z up, y back to front, x left to right): (..., z up, x right to left, y front to back)."""
    found = torch.empty(*volumes.shape[:-2], volumes.shape[-1], volumes.shape[-2])
    for from_right in range(volumes.shape[-1]):
        for from_front in range(volumes.shape[-2]):
            found[..., from_right, from_front] = volumes[..., -1 - from_front, -1 - from_right]
    return found


@pytest.mark.parametrize("shape", [(16, 16, 16), (8, 12, 16)])
def test_the_denoiser_sees_the_chest_as_its_orientation_says(shape):
    torch.manual_seed(0)
    plain, turning = (UNet(3, 4, [1, 2], 2, None, orientation=name) for name in ("ras", "published"))
    plain.load_state_dict(with_numbers(turning).state_dict())
    inputs, timesteps = torch.randn(2, 3, *shape), torch.tensor([3, 9])
    seen = []
    turning.input_blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.inference_mode():
        predicted, expected = turning(inputs, timesteps), plain(in_published_orientation(inputs), timesteps)
        differing = plain(inputs, timesteps)
    assert torch.equal(seen[0], in_published_orientation(inputs))
    assert predicted.shape == (2, 1, *shape)
    torch.testing.assert_close(in_published_orientation(predicted), expected, rtol=0, atol=1e-6)
    assert (predicted - differing).abs().max() > 0.1
