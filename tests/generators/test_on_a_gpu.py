"""Every generator keeps its tensors on its device: on a stand-in for a GPU it trains and draws as on the CPU."""

import numpy as np
import pytest
import torch
from made_up_trainings import train
from safetensors.torch import load_file

from lungddpm import generators
from lungddpm.config.loading import parse_config
from lungddpm.core import cases
from lungddpm.generators import Task, latent_diffusion, plugin
from lungddpm.models import monitoring

NETWORK = {"base_channels": 4, "multipliers": [1, 2], "norm_groups": 2, "attention": False}
TRAINING = {
    "steps": 3, "batch_size": 2, "learning_rate": 2e-3, "precision": "fp32", "gradient_clip": 1.0, "ema_start": 1,
    "save_every": 2, "sample_every": 3,
}  # fmt: skip
ON_CROPS = {**TRAINING, "crop": 8, "accumulation": 2, "augmentation": "standard"}
DIFFUSION = {"timesteps": 20, "denoiser": NETWORK, "training": ON_CROPS}
SOLVED = {"sampler": "dpmsolver++", "steps": 3}
CALIBRATED = {**NETWORK, "norm": "voxel", "padding": "replicate", "time_conditioning": "scale_shift"}
LATENT = {
    **DIFFUSION, "training": TRAINING, "sampling": SOLVED,
    "autoencoder": {"channels": [4, 8], "norm_groups": 2, "steps": 2, "crop": 8, "adversarial_from": 1},
}  # fmt: skip
TRAINED = {
    "lung_ddpm": {**DIFFUSION, "sampling": {"steps": 20, "resampling": 2}},
    "published": {**DIFFUSION, "sampling": {"steps": 20, "aas": "published"}},
    "calibrated": {
        **DIFFUSION, "prediction": "v", "denoiser": CALIBRATED, "training": {**ON_CROPS, "lesion_weight": 10},
        "sampling": SOLVED,
    },
    "attending": {
        **DIFFUSION, "denoiser": {**NETWORK, "attention": True}, "sampling": SOLVED,
        "training": {**TRAINING, "batch_size": 1, "accumulation": 1, "gradient_checkpointing": True},
    },
    "slice": {**DIFFUSION, "hint": "slice", "sampling": SOLVED},
    "volume": {**DIFFUSION, "hint": "volume", "sampling": SOLVED},
    "wavelet": {**DIFFUSION, "prediction": "clean", "denoiser": {**NETWORK, "wavelet": True}, "sampling": SOLVED},
    "lung_ddpm_plus": {**DIFFUSION, "prediction": "v", "sampling": SOLVED},
    "rectified_flow": {"denoiser": NETWORK, "training": ON_CROPS, "sampling": {"steps": 3}},
    "lefusion": {**DIFFUSION, "sampling": {"steps": 3}},
    "pix2pix3d": {
        "network": {"widths": [4] * 6, "norm_groups": 2}, "discriminator": {"channels": 4, "layers": 1},
        "training": TRAINING,
    },
    "latent_diffusion": LATENT,
}  # fmt: skip
"""Settings of each generator that is trained, and of variants of `lung_ddpm`."""
OTHERS = {"lung_ddpm": ["med_ddpm"], "latent_diffusion": ["reconstruct"]}
"""Generators that draw with the weights of another one."""


def config_of(name):
    kind = {} if name in generators.names() else {"kind": "lung_ddpm"}
    others = {"med_ddpm": {"sampling": SOLVED}} if name == "lung_ddpm" else {}
    return parse_config({"grid": {"size": [16, 16, 16]}, "generators": {name: {**kind, **TRAINED[name]}, **others}})


def draw(config, name, weights, device, tasks):
    """The device that the generator reports, and its samples."""
    part = config.for_generator(name)
    generator = plugin(part.kind).load(part, weights, device)
    return generator.device, np.stack(generator.make(tasks)).astype(int)


@pytest.fixture(autouse=True)
def quick(one_thread, monkeypatch):
    """A grid of samples that takes no time."""
    monkeypatch.setattr(monitoring, "_GRID_CASES", 1)
    monkeypatch.setattr(latent_diffusion, "PREVIEW_STEPS", 2)


def test_every_generator_with_a_network_is_tried_here():
    drawn = {name for name in generators.names() if plugin(name).weights_of}
    assert drawn <= {*TRAINED, *(name for names in OTHERS.values() for name in names)}


@pytest.mark.parametrize("name", TRAINED)
def test_a_gpu_trains_and_draws_what_a_cpu_does(name, stand_in_gpu, tiny_cohort, tmp_path):
    config, weights = config_of(name), tmp_path / "cpu" / "model.safetensors"
    folders = [cases.CaseFolder(tiny_cohort.parent / case) for case in ("case03", "case04")]
    tasks = [Task(*folder.read(), seed=number) for number, folder in enumerate(folders)]
    drawing = [name, *OTHERS.get(name, [])]
    train(config.for_training(name), tiny_cohort, tmp_path / "cpu", "cpu")
    of_cpu = [draw(config, other, weights, "cpu", tasks) for other in drawing]
    with stand_in_gpu():
        train(config.for_training(name), tiny_cohort, tmp_path / "gpu", "cuda")
        of_gpu = [draw(config, other, weights, "cuda", tasks) for other in drawing]
    for (_, there), (device, here) in zip(of_cpu, of_gpu, strict=True):
        assert device.startswith("cuda")
        assert np.abs(here - there).max() <= 1
    ours, theirs = load_file(tmp_path / "gpu" / "model.safetensors"), load_file(weights)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, atol=1e-6, rtol=0)


def test_a_tensor_left_on_the_cpu_is_found(stand_in_gpu):
    """The stand-in itself: it refuses what a GPU refuses, and nothing else."""
    with stand_in_gpu():
        there, here = torch.arange(3.0), torch.arange(3.0, device="cuda")
        for mistake in (
            lambda: here + there,
            lambda: torch.stack([here, there]),
            lambda: torch.nn.Linear(3, 1)(here),
            lambda: torch.randn(3, generator=torch.Generator(), device="cuda"),
        ):
            with pytest.raises(AssertionError, match="CPU"):
                mistake()
        with pytest.raises(RuntimeError, match="numpy"):
            here.numpy()
        assert (here.cpu() + there).tolist() == [0, 2, 4]
        assert (here + torch.tensor(1.0)).tolist() == [1, 2, 3]
        assert here[there > 0].tolist() == [1, 2]
    assert torch.arange(3.0).device.type == "cpu"
