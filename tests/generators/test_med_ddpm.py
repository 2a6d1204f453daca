"""Med-DDPM beside Lung-DDPM, with an untrained denoiser."""

import numpy as np
import pytest
import torch

from lungddpm.config.loading import parse_config
from lungddpm.core.labels import Label
from lungddpm.core.volume import Volume
from lungddpm.generators import Task, lung_ddpm, med_ddpm
from lungddpm.models.checkpoint import Metadata, save_denoiser
from lungddpm.models.denoiser import build_denoiser


def make_config(**sampling):
    diffusion = {
        "timesteps": 20,
        "denoiser": {"base_channels": 4, "multipliers": [1, 2], "norm_groups": 2, "attention": False},
        "sampling": {"sampler": "dpmsolver++", "steps": 3, **sampling},
    }
    return parse_config({"grid": {"size": [16, 16, 16]}, "diffusion": diffusion})


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_denoiser(path, build_denoiser(make_config()), Metadata(make_config(), 1, "config", "data"))
    return path


def task_of(background_hu):
    layout = np.full((16, 16, 16), Label.BACKGROUND, np.uint8)
    layout[4:12, 4:12, 4:12] = Label.LUNG
    hu = np.full(layout.shape, background_hu, np.int16)
    return Task(Volume(hu, np.eye(4)), Volume(layout, np.eye(4)), seed=3)


def test_nothing_of_the_reference_is_seen(weights):
    generator = med_ddpm.load(make_config(), weights, "cpu")
    one, other = (generator.make([task_of(hu)])[0] for hu in (900, -700))
    assert one.dtype == np.int16
    assert np.array_equal(one, other)
    # Nor is it constant anywhere: the untrained denoiser leaves noise.
    outside = task_of(0).layout.array == Label.BACKGROUND
    assert one[outside].std() > 100


def test_modes_of_aas_and_resampling_do_nothing(weights):
    task = task_of(40)
    made = [
        med_ddpm.load(make_config(**modes), weights, "cpu").make([task])[0]
        for modes in ({}, {"resampling": 2}, {"aas": "published"})
    ]
    assert np.array_equal(made[0], made[1])
    assert np.array_equal(made[0], made[2])


def test_lung_ddpm_differs_by_what_it_pastes(weights):
    task = task_of(40)
    (drawn,), (filled,) = (module.load(make_config(), weights, "cpu").make([task]) for module in (med_ddpm, lung_ddpm))
    outside = task.layout.array == Label.BACKGROUND
    assert (filled[outside] == 40).all()
    assert (drawn[outside] != 40).mean() > 0.9
