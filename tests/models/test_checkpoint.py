import json
import pickle
import random
import re

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lungddpm.config.loading import parse_config
from lungddpm.core.errors import InputError
from lungddpm.generators import plugin
from lungddpm.models.checkpoint import Metadata, read_metadata, save_network
from lungddpm.models.denoiser import UNet, build_denoiser
from lungddpm.models.published_checkpoint import export_published, load_denoiser
from lungddpm.models.schedule import cosine_betas
from lungddpm.operations.bench import with_numbers

GRID = {"size": [32, 32, 32]}
SETTINGS = {"denoiser": {"base_channels": 4, "multipliers": [1, 2], "norm_groups": 2}}
CONVOLUTION = "denoise_fn.input_blocks.0.0.weight"
# What the published code registers beside the network; its strict loading needs exactly these.
BUFFERS = [
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "posterior_mean_coef3",
]  # fmt: skip


def with_grid(**values):
    config = parse_config({"grid": {**GRID, **values}, "generators": {"lung_ddpm": SETTINGS}})
    return config.for_training("lung_ddpm")


def changed(**values):
    config = parse_config({"grid": GRID, "generators": {"lung_ddpm": {**SETTINGS, **values}}})
    return config.for_training("lung_ddpm")


PLAIN = changed()
RAS = changed(orientation="ras")


def resized(**values):
    return changed(denoiser={**SETTINGS["denoiser"], **values})


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    denoiser = build_denoiser(PLAIN)
    for parameter in denoiser.parameters():  # a fresh denoiser predicts zero
        torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path / "model.safetensors"
    save_network(path, denoiser, Metadata.of(PLAIN, 7, "config", "data"))
    return path, denoiser


@pytest.fixture
def published(saved):
    path = saved[0].with_name("published.pt")
    export_published(saved[0], path)
    return path


def change(path, edit):
    content = torch.load(path, weights_only=True)
    edit(content)
    torch.save(content, path)


@pytest.mark.parametrize("kind", ["ours", "published"])
def test_round_trip(saved, published, kind):
    path, denoiser = saved
    loaded = load_denoiser(path if kind == "ours" else published, PLAIN)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    for name, tensor in denoiser.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    inputs, timesteps = torch.randn(1, 3, 32, 32, 32), torch.tensor([5])
    with torch.inference_mode():
        torch.testing.assert_close(loaded(inputs, timesteps), denoiser(inputs, timesteps), rtol=0, atol=1e-5)


def test_metadata(saved):
    path, _ = saved
    assert read_metadata(path) == Metadata.of(PLAIN, 7, "config", "data")
    with safe_open(path, framework="pt") as file:
        (text,) = file.metadata().values()
    held = json.loads(text)
    assert (held["config"]["generator"], held["config"]["settings"]["timesteps"]) == ("lung_ddpm", 250)
    assert held["data_fingerprint"] == "data"


def test_equal_weights_are_equal_files(saved, tmp_path):
    path, denoiser = saved
    for number in range(5):
        save_network(tmp_path / f"{number}.safetensors", denoiser, read_metadata(path))
        assert (tmp_path / f"{number}.safetensors").read_bytes() == path.read_bytes()


def test_published_format(saved, published):
    """Step, and the network twice, under its prefix beside what the sampling loop needs (Ho et al. 2020, eq. 4, 7)."""
    content = torch.load(published, weights_only=True)
    assert content.keys() == {"step", "model", "ema"}
    assert content["step"] == 7
    ema = content["ema"]
    assert {key for key in ema if key.startswith("denoise_fn.")} == {f"denoise_fn.{k}" for k in saved[1].state_dict()}
    betas = cosine_betas(250)
    torch.testing.assert_close(ema["betas"].double(), betas, rtol=1e-6, atol=0)
    noisy, clean, signal = 0.3, 0.7, torch.cumprod(1 - betas, 0)[100].item()
    assert ema["sqrt_alphas_cumprod"][100].item() == pytest.approx(signal**0.5)
    noise = (noisy - signal**0.5 * clean) / (1 - signal) ** 0.5
    implied = ema["sqrt_recip_alphas_cumprod"][100] * noisy - ema["sqrt_recipm1_alphas_cumprod"][100] * noise
    assert implied.item() == pytest.approx(clean, rel=1e-5)
    mean = ema["posterior_mean_coef1"][100] * clean + ema["posterior_mean_coef2"][100] * noisy
    beta = betas[100].item()
    assert mean.item() == pytest.approx((noisy - beta / (1 - signal) ** 0.5 * noise) / (1 - beta) ** 0.5, rel=1e-5)
    assert ema["posterior_log_variance_clipped"][0].item() == pytest.approx(-46.05, abs=0.01)
    assert {key: tensor.shape for key, tensor in ema.items() if not key.startswith("denoise_fn.")} == dict.fromkeys(
        BUFFERS, (250,)
    )
    # Of the mean without noise: what is not the noisy CT's share.
    share = (1 - signal / (1 - beta)) * (1 - beta) ** 0.5 / (1 - signal)
    assert ema["posterior_mean_coef3"][100].item() == pytest.approx(1 - share, rel=1e-5)
    assert ema["posterior_mean_coef3"][0].item() == 1
    assert {tensor.dtype for tensor in ema.values()} == {torch.float32}


@pytest.mark.parametrize("name", ["model.safetensors", "published.pt"])
def test_missing_file(tmp_path, name):
    with pytest.raises(InputError, match="does not exist"):
        load_denoiser(tmp_path / name, PLAIN)


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["ours", "published"])
def test_truncated_file(saved, published, kind, kept):
    path = saved[0] if kind == "ours" else published
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept if kept > 1 else kept * len(whole))])
    with pytest.raises(InputError, match="truncated"):
        load_denoiser(path, PLAIN)


def test_a_file_of_another_program_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="has no weights trained by lungddpm"):
        load_denoiser(path, PLAIN)
    path = tmp_path / "state.pt"
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="has no entry 'ema'"):
        load_denoiser(path, PLAIN)
    for content in (b"no checkpoint at all", b"\x80\x02garbage", b"\x00" * 64):
        path.write_bytes(content)
        with pytest.raises(InputError, match="not a checkpoint of torch"):
            load_denoiser(path, PLAIN)


class Intruder:
    """What runs code when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


@pytest.mark.parametrize("archive", [True, False])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, archive):
    path, trace = tmp_path / "published.pt", tmp_path / "trace"
    content = {"step": 1, "model": {}, "ema": Intruder(trace)}
    if archive:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(InputError, match=r"holds code \(io.open\), which is never run") as refused:
        load_denoiser(path, PLAIN)
    assert not trace.exists()
    # Torch advises to run it.
    assert not re.search(r"weights.only|safe_globals|trust|\x1b", str(refused.value))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda ema: ema.pop(CONVOLUTION), f"key {CONVOLUTION} is missing"),
        (lambda ema: ema.pop("denoise_fn.out.2.bias"), "key denoise_fn.out.2.bias is missing"),
        (lambda ema: ema.update({"denoise_fn.new": torch.zeros(1)}), "key denoise_fn.new is unexpected"),
        (
            lambda ema: ema.update({CONVOLUTION: torch.zeros(4, 3, 3, 3, 2)}),
            r"weight has the shape \(4, 3, 3, 3, 2\) instead of \(4, 3, 3, 3, 3\)",
        ),
        (
            lambda ema: ema.update({"denoise_fn.out.2.bias": torch.tensor([float("nan")])}),
            "key denoise_fn.out.2.bias holds numbers that are not finite",
        ),
        (lambda ema: ema.update({"denoise_fn.out.2.bias": 3}), "key denoise_fn.out.2.bias holds no tensor"),
        (lambda ema: ema.update({"denoise_fn.out.2.bias": torch.ones(1).to_sparse()}), "bias holds a sparse tensor"),
        (
            lambda ema: ema.update({"denoise_fn.out.2.bias": torch.ones(1, device="meta")}),
            "bias holds a tensor without numbers",
        ),
        (
            lambda ema: ema.update({"denoise_fn.out.2.bias": torch.ones(1, dtype=torch.complex64)}),
            "bias holds numbers of type complex64",
        ),
        (
            lambda ema: ema.update({"denoise_fn.out.2.bias": torch.ones(1, dtype=torch.int64)}),
            "bias holds numbers of type int64",
        ),
        (
            lambda ema: ema.update({"denoise_fn.out.2.bias": torch.tensor([1e300], dtype=torch.float64)}),
            "bias holds numbers that are not finite",
        ),
        (
            lambda ema: ema.update(
                {"denoise_fn.out.2.bias": torch.quantize_per_tensor(torch.ones(1), 0.1, 0, torch.qint8)}
            ),
            "bias holds quantised numbers",
        ),
        (lambda ema: ema.update({3: torch.ones(1)}), "has a key that is not text: 3"),
        (lambda ema: ema.update({"\x1b[1mbold": torch.ones(1)}), r"has a key that is not text: '\\x1b\[1mbold'"),
        (lambda ema: ema.update({"module.denoise_fn.out.2.bias": torch.ones(1)}), "key denoise_fn.out.2.bias twice"),
        (lambda ema: ema.update(betas=torch.tensor(0.1).to_sparse()), "key betas holds a sparse tensor"),
        (lambda ema: ema.update(betas="linear"), "key betas holds no tensor"),
        (lambda ema: ema.pop("betas"), "has no key betas"),
        (lambda ema: ema.update(betas=cosine_betas(1000)), "timesteps 1000, but the config has 250"),
        (lambda ema: ema.update(betas=torch.linspace(1e-4, 0.02, 250)), "a noise schedule other than cosine"),
        (
            lambda ema: [ema.pop(key) for key in list(ema) if key.startswith("denoise_fn.")],
            "no key that starts with denoise_fn.",
        ),
    ],
)
def test_wrong_key_is_named(published, edit, message):
    change(published, lambda content: edit(content["ema"]))
    with pytest.raises(InputError, match=message):
        load_denoiser(published, PLAIN)


def test_only_a_few_wrong_keys_are_shown(saved):
    path, _ = saved
    save_network(path, torch.nn.Linear(2, 2), read_metadata(path))
    with pytest.raises(InputError, match=r"(key \S+ is missing, ){2}key \S+ is missing and \d+ more"):
        load_denoiser(path, PLAIN)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (resized(base_channels=8), r"denoiser.base_channels: 4 \(the config has 8\)"),
        (resized(multipliers=[1, 2, 2]), r"denoiser.multipliers: \[1, 2\] \(the config has \[1, 2, 2\]\)"),
        (
            resized(attention=False),
            r"denoiser.attention: attention for 32 voxels per edge \(the config has no attention\)",
        ),
        (with_grid(size=[16, 16, 16]), "grid.size .* 32 voxels per edge .the config has .* 16 voxels per edge"),
        (
            changed(classes=["lung", "nodule", "vessel"]),
            r"classes: 2 classes \(the config has 3 classes\)",
        ),
        (changed(timesteps=1000), "timesteps 250, but the config has 1000"),
    ],
)
def test_published_weights_of_another_network_are_refused(published, config, message):
    with pytest.raises(InputError, match=message):
        load_denoiser(published, config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed(classes=["lung", "nodule", "vessel"]), r"classes \['lung', 'nodule'\]"),
        (with_grid(size=[64, 64, 64]), r"grid.size \[32, 32, 32\]"),
        (with_grid(window_hu=[-1000, 500]), "grid.window_hu"),
        (resized(norm_groups=4), "denoiser.norm_groups 2, but the config has 4"),
    ],
)
def test_weights_trained_here_for_another_task_are_refused(saved, config, message):
    with pytest.raises(InputError, match=message):
        load_denoiser(saved[0], config)


def test_exported_network_is_right_in_the_published_orientation(tmp_path):
    """Fed by the published code (z up, x right to left, y front to back), it predicts what ours does, so turned."""
    torch.manual_seed(0)
    config = resized(attention=False)
    trained = with_numbers(build_denoiser(config))
    save_network(tmp_path / "ours.safetensors", trained, Metadata.of(config, 1, "", ""))
    export_published(tmp_path / "ours.safetensors", tmp_path / "theirs.pt")
    exported = torch.load(tmp_path / "theirs.pt", weights_only=True)["ema"]
    theirs = UNet(3, 4, [1, 2], 2, None)  # as it comes, without any turning
    theirs.load_state_dict(
        {k.removeprefix("denoise_fn."): v for k, v in exported.items() if k.startswith("denoise_fn")}
    )
    inputs, timesteps = torch.randn(1, 3, 8, 8, 8), torch.tensor([5])
    x = y = np.arange(7, -1, -1)
    with torch.inference_mode():
        expected = load_denoiser(tmp_path / "ours.safetensors", config)(inputs, timesteps)
        found = theirs(inputs[..., y, :][..., x].transpose(-2, -1), timesteps)
        imported = load_denoiser(tmp_path / "theirs.pt", config)(inputs, timesteps)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected[..., y, :][..., x].transpose(-2, -1), rtol=0, atol=1e-5)
    torch.testing.assert_close(imported, expected, rtol=0, atol=1e-5)


def test_orientation_of_published_weights_can_be_set(published):
    inputs, timesteps = torch.randn(1, 3, 32, 32, 32), torch.tensor([5])
    usual, other = (load_denoiser(published, config) for config in (PLAIN, RAS))
    with torch.inference_mode():
        turned = usual(inputs.transpose(-2, -1).flip(-2, -1), timesteps).transpose(-2, -1).flip(-2, -1)
        torch.testing.assert_close(other(inputs, timesteps), turned, rtol=0, atol=1e-5)


def test_weights_of_earlier_versions_are_named_as_such(saved):
    path, denoiser = saved
    save_file(
        {key: tensor.contiguous() for key, tensor in denoiser.state_dict().items()}, path, {"lungddpm-denoiser-2": "{}"}
    )
    with pytest.raises(InputError, match="was trained by an earlier version.*Train the generator again"):
        load_denoiser(path, PLAIN)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (RAS, "orientation ras"),
        (changed(prediction="v"), "prediction v"),
        (resized(padding="replicate"), "denoiser.padding replicate"),
        (resized(norm="voxel"), "denoiser.norm voxel"),
    ],
)
def test_what_leaves_no_trace_in_weights_is_compared(saved, published, tmp_path, config, key):
    path, denoiser = saved
    name, value = key.split()
    save_network(path, denoiser, Metadata.of(config, 7, "", ""))
    load_denoiser(path, config)
    usual = PLAIN.decides_fit()[name]
    with pytest.raises(InputError, match=f"was trained with {key}, but the config has {usual}"):
        load_denoiser(path, PLAIN)
    with pytest.raises(InputError, match=f"was trained with {key}: the published code would .*Train it with {name}"):
        export_published(path, tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()
    if name != "orientation":  # the config decides how published files see the chest
        with pytest.raises(InputError, match=f"has a network with {name} {usual} .the config has {value}"):
            load_denoiser(published, config)


def test_export_refuses_what_it_cannot_do(saved, tmp_path):
    with pytest.raises(InputError, match="It must end in .pt"):
        export_published(saved[0], tmp_path / "out.safetensors")
    with pytest.raises(InputError, match="does not exist"):
        export_published(tmp_path / "nothing.safetensors", tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize(
    ("generator", "settings", "problem"),
    [
        (
            "latent_diffusion",
            {**SETTINGS, "autoencoder": {"channels": [8, 8], "norm_groups": 8}},
            "was trained by latent_diffusion, which is not a diffusion model of voxels",
        ),
        ("lefusion", {**SETTINGS, "training": {"crop": 16}}, "has 16 input channels besides CT and layout"),
        ("rectified_flow", SETTINGS, "was trained by rectified_flow, which is not a diffusion model"),
    ],
)
def test_networks_without_a_published_form_are_not_exported(tmp_path, generator, settings, problem):
    own = {"denoiser": {**settings["denoiser"], "attention": False}}
    config = parse_config({"grid": GRID, "generators": {generator: {**settings, **own}}}).for_training(generator)
    path = tmp_path / "model.safetensors"
    save_network(path, plugin(generator).recipe(config).build(), Metadata.of(config, 7, "", ""))
    with pytest.raises(InputError, match=problem):
        export_published(path, tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize(("edge", "attention"), [(48, True), (32, True), (16, True), (48, False)])
def test_only_what_differs_is_named(tmp_path, edge, attention):
    """Where no map is 16 voxels wide, attention sits in the middle alone, whatever the classes."""

    def config(classes):
        settings = {"classes": classes, "denoiser": {**SETTINGS["denoiser"], "attention": attention}}
        values = {"grid": {"size": [edge] * 3}, "generators": {"lung_ddpm": settings}}
        return parse_config(values).for_training("lung_ddpm")

    trained, asked = config(["lung", "nodule"]), config(["lung", "nodule", "vessel"])
    save_network(tmp_path / "ours.safetensors", build_denoiser(trained), Metadata.of(trained, 1, "", ""))
    export_published(tmp_path / "ours.safetensors", tmp_path / "theirs.pt")
    load_denoiser(tmp_path / "theirs.pt", trained)
    with pytest.raises(InputError) as refused:
        load_denoiser(tmp_path / "theirs.pt", asked)
    assert refused.value.problem == "has a different network, classes: 2 classes (the config has 3 classes)"


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: f"module.{key}",
        lambda key: key.replace("denoise_fn.", "denoise_fn.module."),
        lambda key: f"module.{key.replace('denoise_fn.', 'denoise_fn.module._orig_mod.')}",
    ],
)
def test_names_of_wrapped_networks_are_understood(saved, published, rename):
    change(published, lambda content: content.update(ema={rename(key): v for key, v in content["ema"].items()}))
    loaded = load_denoiser(published, PLAIN).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved[1].state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_understood(saved, published, dtype, caplog):
    caplog.set_level("INFO", logger="lungddpm")
    change(published, lambda content: content.update(ema={k: v.to(dtype) for k, v in content["ema"].items()}))
    loaded = load_denoiser(published, PLAIN).state_dict()
    for name, tensor in saved[1].state_dict().items():
        assert torch.equal(loaded[name], tensor.to(dtype).float())
    assert f"has weights in {str(dtype).removeprefix('torch.')}" in caplog.text


def test_a_half_precise_schedule_must_be_the_cosine_one_still(published):
    linear = torch.linspace(1e-4, 0.02, 250).half()
    change(published, lambda content: content["ema"].update(betas=linear))
    with pytest.raises(InputError, match="a noise schedule other than cosine"):
        load_denoiser(published, PLAIN)


@pytest.mark.parametrize("kind", ["ours", "published"])
def test_a_flipped_bit_is_noticed(saved, published, kind):
    """Wherever it is: the file is refused in words, or holds exactly the weights that were written."""
    path, denoiser = saved[0] if kind == "ours" else published, saved[1]
    whole, chooser, refused = path.read_bytes(), random.Random(1), []
    for _ in range(80):
        damaged = bytearray(whole)
        damaged[chooser.randrange(len(whole))] ^= 1 << chooser.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded = load_denoiser(path, PLAIN).state_dict()
        except InputError as error:
            refused.append(str(error))
        else:
            assert all(torch.equal(loaded[name], tensor) for name, tensor in denoiser.state_dict().items())
    assert len(refused) > 40
    assert all(message.isprintable() and "weights_only" not in message for message in refused)


@pytest.mark.parametrize("kind", ["ours", "published"])
def test_damage_among_the_weights_is_named(saved, published, kind):
    path = saved[0] if kind == "ours" else published
    content, chooser = bytearray(path.read_bytes()), random.Random(2)
    start = content.find(saved[1].state_dict()["input_blocks.1.0.in_layers.2.weight"].numpy().tobytes())
    assert start > 0
    for place in chooser.sample(range(start, start + 1700), 1000):
        content[place] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(InputError, match="differs from (its|the) checksum|damaged"):
        load_denoiser(path, PLAIN)
    with pytest.raises(InputError):
        export_published(path, path.with_name("exported.pt"))


def test_a_folder_is_not_a_checkpoint(tmp_path):
    for name in ("model.safetensors", "published.pt"):
        (tmp_path / name).mkdir()
        with pytest.raises(InputError, match="is a folder"):
            load_denoiser(tmp_path / name, PLAIN)


def test_the_format_of_old_torch_has_no_checksums_which_is_reported(saved, published, caplog):
    content = torch.load(published, weights_only=True)
    torch.save(content, published, _use_new_zipfile_serialization=False)
    loaded = load_denoiser(published, PLAIN).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved[1].state_dict().items())
    assert "without checksums" in caplog.text
