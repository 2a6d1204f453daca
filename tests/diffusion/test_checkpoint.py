import pytest
import torch
from safetensors.torch import save_file

from lungddpm.config import parse_config
from lungddpm.diffusion.checkpoint import Metadata, check_fits, load_denoiser, read_metadata, save_denoiser
from lungddpm.diffusion.denoiser import build_denoiser
from lungddpm.errors import InputError

VALUES = {
    "grid": {"size": [16, 16, 16]},
    "diffusion": {"denoiser": {"base_channels": 4, "multipliers": [1, 2], "norm_groups": 2, "attention": False}},
}


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    config = parse_config(VALUES)
    denoiser = build_denoiser(config)
    path = tmp_path / "model.safetensors"
    save_denoiser(path, denoiser, Metadata(config, 7, "config", "data"))
    return path, denoiser


def test_round_trip(saved):
    path, denoiser = saved
    loaded, metadata = load_denoiser(path, "cpu")
    assert metadata == Metadata(parse_config(VALUES), 7, "config", "data")
    assert not loaded.training
    for name, tensor in denoiser.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_metadata(tmp_path / "model.safetensors")


def test_file_cut_short(saved):
    path, _ = saved
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="cut short"):
        load_denoiser(path, "cpu")


def test_file_of_others(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="holds no denoiser trained by lungddpm"):
        load_denoiser(path, "cpu")


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        ("diffusion", {"classes": ["lung", "nodule", "vessel"]}, r"diffusion.classes \['lung', 'nodule'\]"),
        ("grid", {"size": [32, 32, 32]}, r"grid.size \[16, 16, 16\]"),
        ("grid", {"window_hu": [-1000, 500]}, "grid.window_hu"),
    ],
)
def test_weights_for_another_task_are_refused(saved, section, value, message):
    path, _ = saved
    asked = parse_config({**VALUES, section: {**VALUES[section], **value}})
    with pytest.raises(InputError, match=message):
        check_fits(path, read_metadata(path), asked)
    check_fits(path, read_metadata(path), parse_config(VALUES))
