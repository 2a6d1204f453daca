"""Med-DDPM beside Lung-DDPM, with an untrained denoiser."""

import numpy as np
import pytest
import torch

from lungddpm.config.loading import parse_config
from lungddpm.core.errors import ConfigError
from lungddpm.core.labels import Label
from lungddpm.core.volume import Volume
from lungddpm.generators import Task, lung_ddpm, med_ddpm
from lungddpm.models.checkpoint import Metadata, save_network
from lungddpm.models.denoiser import build_denoiser


def make_config(**sampling):
    diffusion = {
        "timesteps": 20,
        "denoiser": {"base_channels": 4, "multipliers": [1, 2], "norm_groups": 2, "attention": False},
        "sampling": {"sampler": "dpmsolver++", "steps": 3},
    }
    settings = {"lung_ddpm": diffusion, "med_ddpm": {"sampling": {"sampler": "dpmsolver++", "steps": 3, **sampling}}}
    return parse_config({"grid": {"size": [16, 16, 16]}, "generators": settings})


def load(module, weights, **sampling):
    name = module.__name__.rpartition(".")[2]
    return module.load(make_config(**sampling).for_generator(name), weights, "cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    config = make_config().for_generator("lung_ddpm")
    save_network(path, build_denoiser(config), Metadata.of(config, 1, "config", "data"))
    return path


def task_of(background_hu):
    layout = np.full((16, 16, 16), Label.BACKGROUND, np.uint8)
    layout[4:12, 4:12, 4:12] = Label.LUNG
    hu = np.full(layout.shape, background_hu, np.int16)
    return Task(Volume(hu, np.eye(4)), Volume(layout, np.eye(4)), seed=3)


def test_nothing_of_the_reference_is_seen(weights):
    generator = load(med_ddpm, weights)
    one, other = (generator.make([task_of(hu)])[0] for hu in (900, -700))
    assert one.dtype == np.int16
    assert np.array_equal(one, other)
    # Nor is it constant anywhere: the untrained denoiser leaves noise.
    outside = task_of(0).layout.array == Label.BACKGROUND
    assert one[outside].std() > 100


def test_it_samples_as_its_own_settings_say(weights):
    task = task_of(40)
    drawn = [load(med_ddpm, weights, sampler=sampler).make([task])[0] for sampler in ("dpmsolver++", "ddpm")]
    assert not np.array_equal(*drawn)
    for mode in ("aas", "resampling"):  # without a pasted reference, these have no meaning
        with pytest.raises(ConfigError, match=f"generators.med_ddpm.sampling.{mode}: there is no such key"):
            make_config(**{mode: 2})


def test_more_steps_than_the_network_has_timesteps():
    with pytest.raises(ConfigError, match=r"generators.med_ddpm: sampling.steps 21 exceeds timesteps 20 of lung_ddpm"):
        make_config(steps=21).for_generator("med_ddpm")


def test_lung_ddpm_differs_by_what_it_pastes(weights):
    task = task_of(40)
    (drawn,), (filled,) = (load(module, weights).make([task]) for module in (med_ddpm, lung_ddpm))
    outside = task.layout.array == Label.BACKGROUND
    assert (filled[outside] == 40).all()
    assert (drawn[outside] != 40).mean() > 0.9
