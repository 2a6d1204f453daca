"""What the network sees of the reference: nothing more than it should, in training and in sampling alike."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lungddpm.config.loading import parse_config
from lungddpm.core.errors import ConfigError, InputError
from lungddpm.core.labels import Label
from lungddpm.core.volume import Volume, to_model_range
from lungddpm.generators import Task, plugin
from lungddpm.models.checkpoint import Metadata, save_network
from lungddpm.models.data import SampleStream, TrainingData
from lungddpm.models.denoiser import build_denoiser, condition_channels
from lungddpm.models.hints import MASKED, show
from lungddpm.models.optimization import Optimization
from lungddpm.models.published_checkpoint import export_published, load_denoiser
from lungddpm.models.training import initial_network

CPU = torch.device("cpu")
SHAPE = (12, 14, 16)
MIDDLE = 5
"""The layout below reaches from slice 3 to slice 8."""


def make_config(hint, name="lung_ddpm", **training):
    settings = {
        "hint": hint,
        "denoiser": {"base_channels": 4, "multipliers": [1, 2], "norm_groups": 2, "attention": False},
        "training": {"crop": 8, "batch_size": 6, "accumulation": 1, **training},
        "sampling": {"steps": 3},
    }
    if name != "rectified_flow":
        settings |= {"timesteps": 20}
    values = {"grid": {"size": [16, 14, 12]}, "generators": {name: settings}, "arms": {"generators": [name]}}
    return parse_config(values).for_training(name)


@pytest.fixture
def case():
    """(CT, layout) of (D, H, W): noise everywhere, and a lung with a nodule and a vessel in it."""
    layout = np.zeros(SHAPE, np.uint8)
    layout[3:9, 3:12, 3:14] = Label.LUNG
    layout[4:7, 4:9, 4:8] = Label.NODULE
    layout[5:8, 9:11, 9:13] = Label.VESSEL
    return np.random.default_rng(1).integers(-1000, 500, SHAPE, dtype=np.int16), layout


def batch_of(config, ct, layout, number=0):
    recipe = plugin(config.name).recipe(config)
    data = TrainingData(["a"], ct[None], layout[None])
    return SampleStream(data, config, recipe, recipe.objective(CPU), CPU).batch(number)


def tensors(ct, layout):
    clean = torch.from_numpy(to_model_range(ct, (-1024, 600)))[None, None]
    return clean, torch.from_numpy(condition_channels(layout.transpose(2, 1, 0), ["lung", "nodule"]))[None]


def test_the_volume_is_masked_where_the_layout_names_anything(case):
    clean, condition = tensors(*case)
    shown = show("volume", clean, condition)
    named = torch.from_numpy(case[1] != 0)
    assert torch.equal(shown[0, 0][~named], clean[0, 0][~named])
    assert (shown[0, 0][named] == MASKED).all()


def test_the_slice_is_that_halfway_up_the_layout(case):
    clean, condition = tensors(*case)
    shown = show("slice", clean, condition)
    assert all(torch.equal(one, clean[0, 0, MIDDLE]) for one in shown[0, 0])
    # Each volume of a batch has a slice of its own; a layout that names nothing has the middle of the volume.
    other = condition.flip(2)
    both = show("slice", torch.cat([clean] * 3), torch.cat([condition, other, -torch.ones_like(condition)]))
    assert torch.equal(both[0], shown[0])
    assert torch.equal(both[1, 0, 0], clean[0, 0, (3 + 8) // 2 + (SHAPE[0] - 1 - 11)])
    assert torch.equal(both[2, 0, 0], clean[0, 0, (SHAPE[0] - 1) // 2])


def test_without_a_hint_there_is_no_channel(case):
    clean, condition = tensors(*case)
    assert show("none", clean, condition).shape == (1, 0, *SHAPE)


@pytest.mark.parametrize("augmentation", ["none", "mild", "standard"])
@pytest.mark.parametrize("crop", [8, None])
def test_in_training_nothing_of_what_is_to_draw_is_in_the_volume(case, augmentation, crop):
    ct, layout = case
    config = make_config("volume", augmentation=augmentation, crop=crop)
    other = ct.copy()
    other[layout != 0] = np.random.default_rng(2).integers(-1000, 500, int((layout != 0).sum()))
    for number in range(3):  # 18 samples: turned ones among them
        one, two = batch_of(config, ct, layout, number), batch_of(config, other, layout, number)
        assert not torch.equal(one.clean, two.clean)
        assert torch.equal(one.shown, two.shown)
        named = (one.condition > 0).any(dim=1, keepdim=True)
        assert (one.shown[named] == MASKED).all()
        assert (one.shown[~named] > MASKED).float().mean() > 0.9


def test_in_training_the_hint_goes_with_the_ct_through_every_change(case):
    """Where no interpolation mixes voxels, what is shown of open voxels is the CT itself."""
    for crop in (8, None):
        batch = batch_of(make_config("volume", augmentation="mild", crop=crop), *case)
        is_open = (batch.condition < 0).all(dim=1, keepdim=True)
        assert torch.equal(batch.shown[is_open], batch.clean[is_open])


def test_in_training_the_slice_is_that_of_the_whole_volume(case):
    ct, layout = case
    whole = batch_of(make_config("slice", crop=None), ct, layout)
    expected = torch.from_numpy(to_model_range(ct[MIDDLE], (-1024, 600)))
    assert all(torch.equal(one, expected) for volume in whole.shown[:, 0] for one in volume)
    # A crop sees its part of it, also where the slice itself is not in the crop.
    ct[:, :, :] = np.arange(14)[:, None] * 16 + np.arange(16)
    ct[MIDDLE] += 300
    crops = batch_of(make_config("slice"), ct, layout)
    found = torch.round((crops.shown + 1) * 812 - 1024)
    inside = torch.round((crops.clean + 1) * 812 - 1024)
    assert torch.equal(found, torch.where(inside >= 300, inside, inside + 300))


def test_a_hint_changes_nothing_else_of_a_sample(case):
    batches = [batch_of(make_config(hint, augmentation="standard"), *case) for hint in ("none", "slice", "volume")]
    for other in batches[1:]:
        for name in ("clean", "condition", "noise", "levels"):
            assert torch.equal(getattr(batches[0], name), getattr(other, name))


@pytest.mark.parametrize("name", ["lung_ddpm", "rectified_flow"])
@pytest.mark.parametrize("hint", ["slice", "volume"])
def test_a_network_with_a_hint_trains(case, name, hint):
    from lungddpm.models.accelerator import make_accelerator

    config = make_config(hint, name, precision="fp32")
    recipe = plugin(name).recipe(config)
    data = TrainingData(["a"], case[0][None], case[1][None])
    optimization = Optimization(config, recipe, initial_network(config, recipe), data, make_accelerator("cpu", "fp32"))
    assert optimization.model.input_blocks[0][0].weight.shape[1] == 4
    losses = [optimization.take_step(step)[0].item() for step in range(3)]
    assert np.isfinite(losses).all()
    # The first convolution has learned from all its channels.
    moment = optimization.optimizer.state_dict()["state"]
    first = next(
        i for i, (key, _) in enumerate(optimization.model.named_parameters()) if key == "input_blocks.0.0.weight"
    )
    assert (moment[first]["exp_avg"].abs().amax(dim=(0, 2, 3, 4)) > 0).all()


@pytest.fixture
def weights(tmp_path):
    """Saves a denoiser of random weights for a config."""

    def save(config):
        torch.manual_seed(0)
        denoiser = build_denoiser(config)
        for parameter in denoiser.parameters():  # a fresh denoiser predicts zero
            torch.nn.init.normal_(parameter, std=0.1)
        path = tmp_path / f"{config.settings.hint}.safetensors"
        save_network(path, denoiser, Metadata.of(config, 1, "config", "data"))
        return path

    return save


def task_of(case, ct):
    return Task(Volume(ct.transpose(2, 1, 0), np.eye(4)), Volume(case[1].transpose(2, 1, 0), np.eye(4)), seed=3)


@pytest.mark.parametrize("name", ["lung_ddpm", "rectified_flow", "med_ddpm"])
@pytest.mark.parametrize("hint", ["none", "slice", "volume"])
def test_what_is_drawn_depends_on_what_is_shown(case, weights, name, hint):
    ct, layout = case
    owner = "lung_ddpm" if name == "med_ddpm" else name
    trained = make_config(hint, owner)
    settings = {
        owner: trained.settings.model_dump(mode="json"),
        "med_ddpm": {"sampling": {"steps": 3}},
    }
    if name != "med_ddpm":
        settings[owner]["sampling"]["background"] = "generated"
    values = {"grid": {"size": [16, 14, 12]}, "generators": settings, "arms": {"generators": [name]}}
    config = parse_config(values).for_generator(name)
    generator = plugin(name).load(config, weights(trained), "cpu")
    in_slice, outside, inside = ct.copy(), ct.copy(), ct.copy()
    in_slice[MIDDLE] += 90
    outside[layout == 0] += 90
    outside[MIDDLE] = ct[MIDDLE]
    inside[layout != 0] += 90
    inside[MIDDLE] = ct[MIDDLE]
    (drawn,) = generator.make([task_of(case, ct)])
    changed = [
        not np.array_equal(drawn, generator.make([task_of(case, other)])[0]) for other in (in_slice, outside, inside)
    ]
    assert changed == {"none": [False] * 3, "slice": [True, False, False], "volume": [True, True, False]}[hint]


def test_a_hint_does_not_depend_on_the_batch(case, weights):
    ct, _ = case
    config = make_config("volume")
    generator = plugin("lung_ddpm").load(config, weights(config), "cpu")
    tasks = [task_of(case, ct), replace(task_of(case, ct[::-1].copy()), seed=4)]
    together = generator.make(tasks)
    for task, made in zip(tasks, together, strict=True):
        assert np.abs(generator.make([task])[0].astype(int) - made).max() <= 1


def test_weights_of_another_hint_are_refused(weights, tmp_path):
    path, plain = weights(make_config("volume")), weights(make_config("none"))
    with pytest.raises(InputError, match="was trained with hint volume, but the config has none"):
        load_denoiser(path, make_config("none"))
    with pytest.raises(InputError, match="was trained with hint none, but the config has slice"):
        load_denoiser(plain, make_config("slice"))
    with pytest.raises(
        InputError, match="was trained with hint volume: the published code would not give it the reference"
    ):
        export_published(path, tmp_path / "out.pt")
    export_published(plain, tmp_path / "out.pt")
    with pytest.raises(InputError, match="has a network with hint none .the config has volume"):
        load_denoiser(tmp_path / "out.pt", make_config("volume"))


def test_weights_older_than_hints_are_those_without_one(tmp_path):
    config = make_config("none")
    known = Metadata.of(config, 1, "config", "data")
    path = tmp_path / "model.safetensors"
    save_network(path, build_denoiser(config), replace(known, fit={k: v for k, v in known.fit.items() if k != "hint"}))
    load_denoiser(path, config)
    export_published(path, tmp_path / "out.pt")
    with pytest.raises(InputError, match="was trained with hint none, but the config has slice"):
        load_denoiser(path, make_config("slice"))
    # Nor is a training that is under way thrown away.
    assert "hint" not in config.settings.decides_weights(1)
    assert make_config("slice").settings.decides_weights(1)["hint"] == "slice"


def test_wrong_settings_are_named():
    for name, settings, message in (
        ("lung_ddpm", {"hint": "all"}, "generators.lung_ddpm.hint"),
        ("lung_ddpm_plus", {"hint": "volume"}, "generators.lung_ddpm_plus.hint"),
        ("lung_ddpm_plus", {"sampling": {"background": "generated"}}, "lung_ddpm_plus.sampling.background"),
        ("lung_ddpm", {"sampling": {"background": "generated", "resampling": 2}}, "need background: reference"),
        ("lung_ddpm", {"sampling": {"background": "generated", "aas": "published"}}, "need background: reference"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config({"generators": {name: settings}})
