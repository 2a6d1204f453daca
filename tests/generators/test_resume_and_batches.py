"""What holds for every diffusion generator: interruptions leave no trace, and neighbours in a batch none either.

Those with two phases, adversaries or histograms are tested in their own modules, too.
"""

import re

import numpy as np
import pytest
import torch
from made_up_trainings import train, train_interrupted
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves

from lungddpm import generators
from lungddpm.config.loading import parse_config
from lungddpm.core import cases
from lungddpm.generators import Task, plugin
from lungddpm.models.optimization import Optimization
from lungddpm.operations.estimate import run_estimate

NETWORK = {"base_channels": 4, "multipliers": [1, 2], "norm_groups": 2, "attention": False}
TRAINING = {
    "steps": 5, "batch_size": 2, "accumulation": 1, "learning_rate": 2e-3, "crop": 8, "precision": "fp32",
    "ema_start": 1, "save_every": 2, "sample_every": 5, "augmentation": "mild",
}  # fmt: skip
SOLVED = {"timesteps": 20, "sampling": {"sampler": "dpmsolver++", "steps": 3}}
WAVELET = {"kind": "lung_ddpm", "prediction": "clean", "denoiser": {**NETWORK, "wavelet": True}}
TRAINED = {
    "lung_ddpm": SOLVED,
    "rectified_flow": {"sampling": {"steps": 3}},
    "lung_ddpm_plus": {**SOLVED, "prediction": "v"},
    "wavelet": {**SOLVED, **WAVELET},
}
"""Settings of those that are trained here, and of a variant with another network."""
DRAWN_WITH = {**{name: name for name in TRAINED}, "med_ddpm": "lung_ddpm"}
ELSEWHERE = {"lefusion", "pix2pix3d", "latent_diffusion"}


def config():
    sections = {name: {"denoiser": NETWORK, "training": TRAINING, **keys} for name, keys in TRAINED.items()}
    return parse_config(
        {"grid": {"size": [16, 16, 16]}, "generators": {**sections, "med_ddpm": {"sampling": SOLVED["sampling"]}}}
    )


def test_every_trained_generator_is_tested_here_or_in_its_own_module():
    trained = {name for name in generators.names() if plugin(name).weights_of == name}
    assert trained == (set(TRAINED) - {"wavelet"}) | ELSEWHERE


@pytest.fixture(scope="module")
def uninterrupted(tiny_cohort, tmp_path_factory):
    """Folder of a finished training, by name; each is made once."""
    folders = {}

    def folder_of(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            train(config().for_training(name), tiny_cohort, folders[name], "cpu")
        return folders[name]

    return folder_of


@pytest.mark.parametrize("name", TRAINED)
def test_an_interrupted_training_ends_bit_identical(name, uninterrupted, tiny_cohort, tmp_path, monkeypatch):
    train_interrupted(monkeypatch, Optimization, 3, config().for_training(name), tiny_cohort, tmp_path, "cpu")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path, uninterrupted(name)))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", DRAWN_WITH)
def test_a_sample_does_not_depend_on_its_batch(name, uninterrupted, tiny_cohort):
    part = config().for_generator(name)
    weights = uninterrupted(DRAWN_WITH[name]) / "model.safetensors"
    generator = plugin(part.kind).load(part, weights, "cpu")
    folders = [cases.CaseFolder(tiny_cohort.parent / case) for case in ("case03", "case04")]
    tasks = [Task(*folder.read(), seed=number) for number, folder in enumerate(folders)]
    together = generator.make(tasks)
    assert not np.array_equal(*together)
    for task, made in zip(tasks, together, strict=True):
        # Libraries may choose another algorithm for another batch size: the last digit of HU may round the other way.
        assert np.abs(generator.make([task])[0].astype(int) - made).max() <= 1


@pytest.mark.parametrize("name", TRAINED)
def test_the_estimate_is_that_of_the_training(name, uninterrupted, tmp_path, monkeypatch, capsys):
    """Weights, their average and two moments are what a real training saved; nothing is written."""
    monkeypatch.chdir(tmp_path)
    part = config().for_training(name)
    run_estimate(part, "cpu")
    shown = capsys.readouterr().out
    state = torch.load(next((uninterrupted(name) / "state").glob("*.pt")), weights_only=True)
    parameters = sum(value.numel() for value in state["model"].values())
    assert re.search(rf"^parameters +{parameters:,}$", shown, re.MULTILINE)
    held = [value for value in tree_leaves(state) if isinstance(value, torch.Tensor) and value.is_floating_point()]
    mib = sum(value.numel() * value.element_size() for value in held) / 2**20
    (estimated,) = re.findall(r"2 states of ([\d.]+) MiB", shown)
    assert float(estimated) == pytest.approx(mib, rel=0.02)
    assert f"for {TRAINING['steps']} steps" in shown
    assert ("WaveletUNet" in shown) == (name == "wavelet")
    assert not list(tmp_path.iterdir())
