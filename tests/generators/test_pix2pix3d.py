"""Pix2pix3D as a generator: trained and drawn by the commands, refused where it cannot be."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from made_up_trainings import run_command, sees, train_by_command
from safetensors.torch import load_file

from lungddpm.config.loading import load_config, parse_config
from lungddpm.core import cases
from lungddpm.core.errors import ConfigError, InputError
from lungddpm.core.files import sha256_of
from lungddpm.core.labels import Label
from lungddpm.generators import Task, pix2pix3d, plugin, rectified_flow
from lungddpm.models.checkpoint import read_metadata, save_network
from lungddpm.operations.estimate import count, count_opponent, run_estimate
from lungddpm.operations.plan import Cohort, known_speed, network_cost, plan_run

SETTINGS = {
    "network": {"widths": [4, 4, 4, 4, 4, 4], "norm_groups": 2},
    "discriminator": {"channels": 4, "layers": 1},
    "training": {
        "steps": 3, "learning_rate": 2e-3, "precision": "fp32", "ema_start": 1, "save_every": 2, "sample_every": 2,
        "lesion_weight": 10,
    },
}  # fmt: skip


def changed(**keys):
    return {
        "grid": {"size": [16, 16, 16]},
        "generators": {"pix2pix3d": {**SETTINGS, **keys}},
        "arms": {"generators": ["pix2pix3d"], "doses": [1.0], "controls": []},
    }


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(yaml.safe_dump(changed()))
    return path


@pytest.fixture(scope="module")
def trained(config, tiny_cohort, tmp_path_factory):
    """Folder of a training by the command."""
    return train_by_command("pix2pix3d", config, tiny_cohort, tmp_path_factory.mktemp("trained"))


def load(values, weights, module=pix2pix3d):
    return module.load(parse_config(values).for_generator(module.__name__.rpartition(".")[2]), weights, "cpu")


@pytest.fixture
def tasks(tiny_cohort):
    folders = [cases.CaseFolder(tiny_cohort.parent / name) for name in ("case03", "case04")]
    return [Task(*folder.read(), seed=number) for number, folder in enumerate(folders)]


def test_the_training_leaves_what_every_training_does(trained):
    history = pd.read_csv(trained / "history.csv")
    assert history["step"].tolist() == [1, 2, 3]
    # A fresh network draws a CT of about 0, that is -212 HU: the error is some .7, 100 times, for which L1 counts.
    assert 20 < history["loss"][0] < 150
    assert sorted(path.name for path in (trained / "samples").iterdir()) == ["step-00000002.png", "step-00000003.png"]
    # Discriminators have done their work by then.
    assert all(name.startswith("unet.") for name in load_file(trained / "model.safetensors"))


def test_samples_are_made_by_the_command(trained, config, tiny_cohort, tmp_path):
    weights = trained / "model.safetensors"
    where = ["--cases", tiny_cohort, "--output", tmp_path, "--device", "cpu", "--threads", "1"]
    run_command("synthesize", "--generator", "pix2pix3d", "--configfile", config, "--weights", weights, *where)
    table = cases.read_cases(tmp_path / "samples-1.0-0.tsv")
    assert table["case_id"].tolist() == ["case03_s000", "case04_s000", "case03_s001"]
    for name in table["case_id"]:
        record = json.loads((tmp_path / name / "sample.json").read_text())
        assert record["weights_sha256"] == sha256_of(weights)
        assert record["settings"]["sampling"] == {"background": "reference"}
        ct, layout = cases.CaseFolder(tmp_path / name).read()
        reference, _ = cases.CaseFolder(tiny_cohort.parent / record["reference_case_id"]).read()
        background = layout.array == Label.BACKGROUND
        assert np.array_equal(ct.array[background], reference.array[background])
        assert (ct.array != reference.array)[~background].mean() > 0.9


def test_the_background_can_be_generated(trained, tasks):
    task = tasks[0]
    (drawn,) = load(changed(sampling={"background": "generated"}), trained / "model.safetensors").make([task])
    is_open = task.layout.array == Label.BACKGROUND
    assert (drawn != task.reference.array)[is_open].mean() > 0.9
    # Within the layout, both are the same drawing.
    (pasted,) = load(changed(), trained / "model.safetensors").make([task])
    assert np.array_equal(drawn[~is_open], pasted[~is_open])
    assert np.array_equal(task.reference.array[is_open], pasted[is_open])


def test_samples_do_not_depend_on_their_batch(trained, tasks):
    generator = load(changed(), trained / "model.safetensors")
    for task, made in zip(tasks, generator.make(tasks), strict=True):
        assert np.array_equal(generator.make([task])[0], made)


def test_noise_is_an_input_and_the_seed_decides_it(trained, tasks):
    generator = load(changed(), trained / "model.safetensors")
    seeds = [Task(tasks[0].reference, tasks[0].layout, seed) for seed in (1, 1, 2)]
    first, again, other = generator.make(seeds)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("hint", ["slice", "volume"])
def test_what_is_drawn_depends_on_what_is_shown(tiny_cohort, tasks, tmp_path, hint):
    """Against a network that sees all of the reference, or the voxels to draw."""
    values = changed(hint=hint, sampling={"background": "generated"})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    weights = train_by_command("pix2pix3d", tmp_path / "config.yaml", tiny_cohort, tmp_path) / "model.safetensors"
    differs = sees(load(values, weights), tasks[0])
    assert differs == {"slice": [True, False, False], "volume": [True, True, False]}[hint]
    with pytest.raises(InputError, match=f"trained with hint {hint}, but the config has none"):
        load(changed(), weights)


def test_weights_and_trainings_from_before_there_was_a_hint_are_used(trained, tasks, tmp_path):
    path = trained / "model.safetensors"
    metadata = read_metadata(path)
    del metadata.fit["hint"]
    del metadata.config["settings"]["hint"]
    old = tmp_path / "model.safetensors"
    save_network(old, pix2pix3d.recipe(parse_config(changed()).for_training("pix2pix3d")).load(path), metadata)
    first, again = (load(changed(), each).make(tasks[:1])[0] for each in (path, old))
    assert np.array_equal(first, again)
    with pytest.raises(InputError, match="trained with hint none, but the config has slice"):
        load(changed(hint="slice"), old)
    # By which a training knows its own states.
    assert "hint" not in parse_config(changed()).for_training("pix2pix3d").settings.decides_weights(1)
    assert parse_config(changed(hint="slice")).for_training("pix2pix3d").settings.decides_weights(1)["hint"] == "slice"


def test_both_networks_see_the_hint(trained):
    recipes = {
        hint: pix2pix3d.recipe(parse_config(changed(hint=hint)).for_training("pix2pix3d"))
        for hint in ("none", "slice", "volume")
    }
    first_layers = {
        hint: [next(build().parameters()).shape[1] for build in (recipe.build, recipe.opponent)]
        for hint, recipe in recipes.items()
    }
    assert first_layers == {"none": [3, 3], "slice": [4, 4], "volume": [4, 4]}
    assert {hint: recipe.hint for hint, recipe in recipes.items()} == {hint: hint for hint in recipes}


def test_a_preview_has_the_reference_where_the_layout_is_open():
    class Shows7(torch.nn.Module):
        def forward(self, inputs):
            return torch.full_like(inputs[:, :1], 0.7)

    condition = torch.tensor([[1.0, -1, -1], [-1, 1, -1]]).view(1, 2, 1, 1, 3)
    reference = torch.tensor([0.1, 0.2, 0.3]).view(1, 1, 1, 1, 3)
    preview = pix2pix3d.preview(parse_config(changed()).for_training("pix2pix3d"))
    drawn = preview(Shows7(), condition, reference, [torch.Generator().manual_seed(1)])
    assert drawn.flatten().tolist() == pytest.approx([0.7, 0.7, 0.3])


def test_weights_of_another_generator_or_network_are_refused(trained):
    weights = trained / "model.safetensors"
    with pytest.raises(InputError, match="trained with generator pix2pix3d, but the config has rectified_flow"):
        load(changed(), weights, rectified_flow)
    with pytest.raises(
        InputError, match=r"network.widths \[4, 4, 4, 4, 4, 4\], but the config has \[4, 4, 4, 4, 8, 4\]"
    ):
        load(changed(network={"widths": [4, 4, 4, 4, 8, 4], "norm_groups": 2}), weights)


def test_the_training_continues_from_its_own_weights(trained, config):
    network = pix2pix3d.recipe(load_config(config).for_training("pix2pix3d")).load(trained / "model.safetensors")
    assert all(torch.isfinite(parameter).all() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("grid", "keys", "message"),
    [
        (16, {"discriminator": {"layers": 0}}, "layers 0 does not fit grid.size [16, 16, 16]: it must be from 1 to 1"),
        (48, {"discriminator": {"layers": 4}}, "layers 4 does not fit grid.size [48, 48, 48]: it must be from 1 to 3"),
        (
            64,
            {"training": {"crop": 32}, "discriminator": {"layers": 3}},
            "layers 3 does not fit training.crop 32: it must be from 1 to 2",
        ),
        (40, {}, "grid.size [40, 40, 40] is not divisible by 16, as required by five levels"),
        (64, {"training": {"crop": 24}}, "training.crop [24] is not divisible by 16"),
        (16, {"training": {"crop": 32}}, "training.crop 32 is larger than grid.size [16, 16, 16]"),
        (
            16,
            {"network": {"widths": [8, 8, 8, 8, 12, 8]}},
            "norm_groups 8 does not divide 12 of widths [8, 8, 8, 8, 12",
        ),
        (16, {"network": {"widths": [8, 8]}}, "generators.pix2pix3d.network.widths"),
        (16, {"loss_weights": {"reconstruction": -1}}, "generators.pix2pix3d.loss_weights.reconstruction"),
        (16, {"training": {"gradient_checkpointing": True}}, "generators.pix2pix3d.training.gradient_checkpointing"),
    ],
)
def test_wrong_settings_are_named(grid, keys, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_config({**changed(**keys), "grid": {"size": [grid] * 3}}).for_training("pix2pix3d")


def published():
    return parse_config({"grid": {"size": [128, 128, 128]}}).for_training("pix2pix3d")


def test_the_published_networks_have_as_many_weights_as_counted_by_hand():
    def convolution(inputs, outputs, edge=3):
        return inputs * outputs * edge**3 + outputs

    def two(inputs, outputs):  # convolutions, each with a norm
        return convolution(inputs, outputs) + convolution(outputs, outputs) + 4 * outputs

    down = two(3, 32) + two(32, 32) + two(32, 64) + two(64, 128) + two(128, 256)
    ways = [(256, 128, 128), (128, 64, 64), (64, 32, 32)]  # from below, from beside, to
    up = sum(convolution(below, below // 2, 1) + two(below // 2 + beside, to) for below, beside, to in ways)
    up += two(32 + 32, 32)  # the last one keeps its channels
    assert count(published())[0] == down + up + convolution(32, 1, 1)
    layers = [(64, 128), (128, 256), (256, 512)]
    judge = convolution(3, 64, 4) + sum(inputs * outputs * 64 for inputs, outputs in layers) + convolution(512, 1, 4)
    assert count_opponent(published())[0] == 2 * judge


def test_the_opponent_counts_in_operations_and_memory():
    config = parse_config(changed()).for_training("pix2pix3d")
    _, operations = count_opponent(config)
    # Convolutions of edge 4 on both scales: 3 -> 4 halves, 4 -> 8 and 8 -> 1 take one voxel off.
    one = sum(2 * 64 * (3 * 4 * (e // 2) ** 3 + 4 * 8 * (e // 2 - 1) ** 3 + 8 * (e // 2 - 2) ** 3) for e in (16, 8))
    first = sum(2 * 64 * 3 * 4 * (edge // 2) ** 3 for edge in (16, 8))
    # Six passes' worth for itself, but for the gradient of its input; a pass; and one with the gradient of its input.
    assert operations == 2 * (3 * one - first) + one + 2 * one
    cost = network_cost(config)
    assert cost.step_flop == count(config)[2] + operations
    assert cost.opponent_parameters > 0
    wider = network_cost(parse_config(changed(discriminator={"channels": 8, "layers": 1})).for_training("pix2pix3d"))
    assert wider.memory_bytes > cost.memory_bytes
    assert (wider.forward_flop, wider.weights_bytes) == (cost.forward_flop, cost.weights_bytes)


def test_the_estimate_shows_the_opponent(capsys):
    run_estimate(parse_config(changed()).for_training("pix2pix3d"), "cpu")
    rows = dict(re.findall(r"^(\S+(?: \S+)*?)  +(.+)$", capsys.readouterr().out, re.MULTILINE))
    assert rows["network"].split() == ["Translator", "Discriminators"]
    # As the networks themselves have them.
    recipe, _ = plugin("pix2pix3d").training(parse_config(changed()).for_training("pix2pix3d"))
    of_networks = [sum(p.numel() for p in build().parameters()) for build in (recipe.build, recipe.opponent)]
    assert [int(number.replace(",", "")) for number in rows["parameters"].split()] == of_networks
    assert all(re.fullmatch(r"[\d,]+ MiB", cell) for cell in re.split(" {2,}", rows["memory by count"]))


def test_the_plan_counts_one_pass_per_sample():
    stages = plan_run(parse_config(changed()), Cohort(6, 1e6, 3, 2, 1, "here"), known_speed("a100"))
    names = [stage.name for stage in stages]
    assert {"train_generator", "synthesize"} <= set(names)
    assert pix2pix3d.drawing(parse_config(changed()).for_generator("pix2pix3d")).passes == 1
