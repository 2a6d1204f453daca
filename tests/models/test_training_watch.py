"""Grids of samples, and the estimate of what a training costs."""

import re

import numpy as np
import pandas as pd
import pytest
import torch
from made_up_trainings import train
from PIL import Image

from lungddpm.config.loading import parse_config
from lungddpm.core.labels import Label
from lungddpm.generators import lung_ddpm, plugin
from lungddpm.models import monitoring
from lungddpm.models.accelerator import make_accelerator
from lungddpm.models.data import TrainingData
from lungddpm.models.monitoring import Monitor, draw_grid, grid_cases, losses_that_did_not_fall
from lungddpm.models.schedule import alphas_cumprod, cosine_betas
from lungddpm.operations.estimate import count, run_estimate


@pytest.fixture
def data():
    layout = np.zeros((3, 16, 16, 16), np.uint8)
    layout[:, 2:14, 2:14, 2:14] = Label.LUNG
    layout[1:, 5:8, 3:6, 3:6] = Label.NODULE
    return TrainingData(["none", "first", "second"], np.full((3, 16, 16, 16), -850, np.int16), layout)


def perfect(noisy, timesteps):
    """The noise in a CT that is -850 HU everywhere, at the level of the timestep."""
    level = alphas_cumprod(cosine_betas(20))[timesteps].view(-1, 1, 1, 1, 1).float()
    clean = (-850 + 1024) / 812 - 1
    return (noisy[:, :1] - level.sqrt() * clean) / (1 - level).sqrt()


def grid_of(network, data, chosen, config):
    accelerator = make_accelerator("cpu", "fp32")
    return draw_grid(network, lung_ddpm.preview(config), data, chosen, config, lung_ddpm.recipe(config), accelerator)


def test_the_grid_measures_the_distance_in_the_lungs(data, training_config):
    config = training_config()
    assert grid_cases(data) == [1, 2]
    assert grid_cases(TrainingData(["none"], data.ct[:1], data.layout[:1])) == [0]
    errors, _ = grid_of(perfect, data, [1, 2], config)
    assert errors == pytest.approx([0, 0], abs=1e-6)
    far = TrainingData(data.case_ids, data.ct + np.where(data.layout > 0, 406, 0).astype(np.int16), data.layout)
    errors, _ = grid_of(perfect, far, [1], config)
    assert errors == pytest.approx([0.25**2], rel=1e-3)  # 406 of the window's 1624 HU


@pytest.mark.parametrize(("generator", "drawn"), [("lung_ddpm_plus", (16, 16, 16)), ("lung_ddpm", (48, 32, 16))])
def test_a_network_of_crops_draws_a_crop_on_any_grid(generator, drawn):
    """Even where the crop is as long as the grid's shortest edge."""
    layout = np.full((1, 48, 32, 16), Label.LUNG, np.uint8)
    layout[0, 20:23, 10:13, 6:9] = Label.NODULE
    small = {
        "denoiser": {"base_channels": 4, "multipliers": [1, 2], "norm_groups": 2, "attention": False},
        "training": {"crop": 16},
    }
    settings = {"lung_ddpm": small, "lung_ddpm_plus": small}
    config = parse_config({"grid": {"size": [16, 32, 48]}, "generators": settings}).for_training(generator)
    data, shapes = TrainingData(["one"], np.full(layout.shape, -850, np.int16), layout), []

    def preview(network, condition, reference, generators):
        shapes.append(tuple(condition.shape[2:]))
        return reference

    recipe, accelerator = plugin(generator).recipe(config), make_accelerator("cpu", "fp32")
    draw_grid(torch.nn.Identity(), preview, data, [0], config, recipe, accelerator)
    assert shapes == [drawn]


def test_the_same_noise_for_a_case_at_each_call(data, training_config):
    def knows_nothing(noisy, timesteps):
        return torch.zeros_like(noisy[:, :1])

    config = training_config()
    together, figure = grid_of(knows_nothing, data, [1, 2], config)
    alone, _ = grid_of(knows_nothing, data, [2], config)
    assert alone[0] == together[1] != together[0]
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:3] == ["reference", "layout", "sample"]
    assert [axes.get_ylabel() for axes in figure.axes[::3]] == ["first", "second"]
    nodule = figure.axes[1].images[0].get_array() == Label.NODULE
    assert nodule.sum() == 9  # the slice through the nodule


def test_output_beyond_the_step_is_removed(tmp_path):
    def add(monitor, step):
        monitor.add_samples(step, ["a"], [step / 100], monitoring.Figure())

    monitor = Monitor(tmp_path, 0)
    for step in (10, 20, 30):
        add(monitor, step)
    monitor.close()
    monitor = Monitor(tmp_path, 20)
    add(monitor, 25)
    monitor.close()
    assert pd.read_csv(tmp_path / "samples.csv")["step"].tolist() == [10, 20, 25]
    assert sorted(path.name[:13] for path in (tmp_path / "samples").iterdir()) == [
        "step-00000010",
        "step-00000020",
        "step-00000025",
    ]
    assert Image.open(tmp_path / "samples/step-00000025.png").format == "PNG"
    Monitor(tmp_path, 0).close()
    assert not list((tmp_path / "samples").iterdir())


def test_the_published_network_costs_what_the_design_page_says():
    parameters, forward, both = count(parse_config({"grid": {"size": [128, 128, 128]}}).for_training("lung_ddpm"))
    assert parameters == 40_226_433
    assert forward / 1e12 == pytest.approx(5.54, abs=0.005)
    assert both / forward == pytest.approx(3, abs=0.02)  # two gradients, of inputs and of weights


def test_operations_counted_by_hand_and_with_checkpointing(training_config):
    _, forward, both = count(training_config(crop=None, batch_size=1))
    once = 2 * 27 * 16**3  # a 3x3x3 convolution from one channel to one, at the finest level
    residual = [(4, 4, 1), (4, 8, 8), (8, 8, 8), (8, 8, 8), (16, 8, 8), (12, 8, 8), (12, 4, 1), (8, 4, 1)]
    convolutions = sum((i * o + o * o + (i != o) * i * o / 27) / part for i, o, part in residual)
    convolutions += 4 * 4 + 4 * 4 / 8 + 8 * 8 + 4 * 1  # first, downsampling, upsampling, last
    linear = 2 * (4 * 16 + 16 * 16 + 16 * sum(o for _, o, _ in residual))
    assert forward == pytest.approx(once * convolutions + linear, rel=1e-3)
    # Of each stage, what leads to its last convolution is computed again.
    assert 1.15 < count(training_config(crop=None, batch_size=1, gradient_checkpointing=True))[2] / both < 4 / 3


def test_the_estimate_reports_everything_and_writes_nothing(training_config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_estimate(training_config(steps=1000), "cpu")
    reported = capsys.readouterr().out
    for what in (
        "network",
        "parameters",
        "forward pass",
        "optimizer step",
        "memory",
        "step time",
        "whole training",
        "disk",
    ):
        assert re.search(rf"^{what} +\S", reported, re.MULTILINE)
    assert "27,577" in reported
    assert "1,000 steps" in reported
    assert not list(tmp_path.iterdir())


def test_a_loss_that_does_not_fall_is_found_in_each_phase():
    noise = 0.05 * np.random.default_rng(0).standard_normal(1000)
    plateau, falling = 0.6 + noise, 0.1 + 0.5 * np.exp(-np.arange(1000) / 300) + noise
    ((first, last),) = losses_that_did_not_fall(plateau.tolist(), [1000])
    assert first == pytest.approx(0.6, abs=0.02)
    assert last == pytest.approx(0.6, abs=0.02)
    assert losses_that_did_not_fall(falling.tolist(), [1000]) == []
    # The autoencoder's loss ends far below the one with which the denoiser's begins.
    assert losses_that_did_not_fall([*falling, *(5 + falling / 2)], [1000, 1000]) == [
        pytest.approx((5 + falling[:100].mean() / 2, 5 + falling[-100:].mean() / 2))
    ]
    assert losses_that_did_not_fall([*falling, *(5 * falling)], [1000, 1000]) == []
    assert losses_that_did_not_fall([0.6] * 199, [199]) == []


@pytest.mark.parametrize(("rate", "warned"), [(1e-9, True), (5e-3, False)])
def test_a_training_that_learned_nothing_warns(tiny_cohort, training_config, tmp_path, caplog, rate, warned):
    caplog.set_level("WARNING", logger="lungddpm")
    changes = {"steps": 300, "accumulation": 1, "learning_rate": rate, "save_every": 300, "sample_every": 300}
    train(training_config(**changes), tiny_cohort, tmp_path, "cpu")
    assert ("lung_ddpm has probably learned nothing: its loss was " in caplog.text) == warned
