"""The modes of Lung-DDPM, with an untrained denoiser (predicts zero noise)."""

import numpy as np
import pytest
import torch

from lungddpm.cli import export_checkpoint
from lungddpm.config.loading import parse_config
from lungddpm.core.labels import Label
from lungddpm.core.volume import Volume, slice_windows, to_hu, to_model_range
from lungddpm.generators import Task, lung_ddpm
from lungddpm.models import published_checkpoint
from lungddpm.models.checkpoint import Metadata, save_network
from lungddpm.models.denoiser import build_denoiser
from lungddpm.models.published_checkpoint import load_denoiser


def make_config(**sampling):
    settings = {"sampler": "dpmsolver++", "steps": 3, **sampling}
    denoiser = {"base_channels": 4, "multipliers": [1, 2], "norm_groups": 2, "attention": False}
    diffusion = {"timesteps": 20, "denoiser": denoiser, "sampling": settings}
    return parse_config({"grid": {"size": [16, 16, 16]}, "generators": {"lung_ddpm": diffusion}}).for_generator(
        "lung_ddpm"
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_network(path, build_denoiser(make_config()), Metadata.of(make_config(), 1, "config", "data"))
    return path


@pytest.fixture(scope="module")
def task():
    layout = np.full((16, 16, 16), Label.BACKGROUND, np.uint8)
    layout[4:12, 4:12, 4:12] = Label.LUNG
    # Slices along z differ in range; the brightest voxels lie beyond the model's window.
    hu = np.linspace(-1000, 900, 16)[:, None, None] * np.linspace(0.5, 1, 16) * np.ones((1, 16, 1))
    return Task(Volume(hu.astype(np.int16), np.eye(4)), Volume(layout, np.eye(4)), seed=3)


@pytest.fixture
def make(weights, task):
    def make(path=weights, **sampling):
        (made,) = lung_ddpm.load(make_config(**sampling), path, "cpu").make([task])
        assert made.dtype == np.int16
        return made

    return make


def test_published_checkpoint_makes_the_same_samples(make, weights, tmp_path):
    export_checkpoint(weights, tmp_path / "published.pt")
    assert np.array_equal(make(tmp_path / "published.pt"), make())


def test_the_network_is_shown_the_published_orientation(weights, task, monkeypatch):
    """(z up, x right to left, y front to back) of a layout whose nodule lies right, in front and below."""
    seen = []

    def load_and_watch(*arguments):
        denoiser = load_denoiser(*arguments)
        denoiser.input_blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        return denoiser

    monkeypatch.setattr(published_checkpoint, "load_denoiser", load_and_watch)
    layout = np.full((16, 16, 16), Label.BACKGROUND, np.uint8)
    layout[13, 11, 2] = Label.NODULE  # third from the right, fifth from the front, third from below
    asked = Task(task.reference, Volume(layout, np.eye(4)), seed=3)
    (made,) = lung_ddpm.load(make_config(), weights, "cpu").make([asked])
    assert np.argwhere(seen[0][0, 2].numpy() > 0).tolist() == [[2, 2, 4]]
    assert np.argwhere(made != task.reference.array).tolist() == [[13, 11, 2]]


@pytest.mark.parametrize(
    "sampling",
    [
        {"sampler": "ddpm", "steps": 20},
        {"sampler": "ddim"},
        {"order": 3, "steps": 5},
        {"sampler": "unipc"},
        {"resampling": 2},
        {"times": "published"},
        {"intensities": "published"},
        {"levels": "published"},
    ],
)
def test_every_mode_but_published_aas_keeps_the_reference(make, task, sampling):
    made = make(**sampling)
    background = task.layout.array == Label.BACKGROUND
    assert np.array_equal(made[background], task.reference.array[background])
    assert (made != task.reference.array)[~background].mean() > 0.9


def test_published_aas_leaves_its_noise_in_the_background(make, task):
    made = make(sampler="ddpm", steps=20, aas="published")
    inside = (task.layout.array == Label.BACKGROUND) & (np.abs(task.reference.array + 212) < 600)
    left = (made - task.reference.array)[inside]
    # sqrt(beta_0) = 0.0896 with 20 timesteps; [-1, 1] is 1624 HU.
    assert left.std() == pytest.approx(0.0896 * 812, rel=0.05)


def test_slices_have_windows_of_their_own(task):
    hu = task.reference.array.copy()
    hu[:, :, 5] = -1024
    low, high = slice_windows(hu, axis=2)
    assert low.shape == high.shape == (1, 1, 16)
    scaled = to_model_range(hu, (low, high))
    others = np.arange(16) != 5
    assert scaled.min(axis=(0, 1))[others] == pytest.approx(-1)
    assert scaled.max(axis=(0, 1))[others] == pytest.approx(1)
    assert (scaled[:, :, 5] == -1).all()
    assert np.array_equal(to_hu(scaled, (low, high)), hu)
