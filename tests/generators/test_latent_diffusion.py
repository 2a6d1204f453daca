"""Latent diffusion and its floor as generators: trained in two phases of one training, drawn, refused."""

import json
import logging
import math
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from made_up_trainings import sees
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lungddpm.config.loading import parse_config
from lungddpm.core import cases
from lungddpm.core.errors import ConfigError, InputError
from lungddpm.core.labels import Label
from lungddpm.generators import Task, latent_diffusion, plugin, reconstruct
from lungddpm.models import monitoring
from lungddpm.models.accelerator import make_accelerator
from lungddpm.models.latent import LatentDiffusion, build_latent_diffusion
from lungddpm.models.latent_training import LatentOptimization, measure_latents
from lungddpm.models.optimization import start_optimization
from lungddpm.models.training import initial_network, run_train
from lungddpm.operations.estimate import made_up, run_estimate
from lungddpm.operations.plan import Cohort, known_speed, network_cost, plan_run

SETTINGS = {
    "denoiser": {"base_channels": 4, "multipliers": [1, 2], "norm_groups": 2, "attention": False},
    "autoencoder": {
        "channels": [4, 8], "norm_groups": 2, "steps": 3, "learning_rate": 4e-3, "crop": 8, "adversarial_from": 1,
    },
    "timesteps": 20,
    "training": {
        "steps": 7, "batch_size": 2, "accumulation": 2, "learning_rate": 2e-3, "learning_rate_schedule": "cosine",
        "warmup_steps": 1, "ema_decay": 0.5, "ema_every": 2, "ema_start": 2, "precision": "fp32", "save_every": 1,
        "sample_every": 4,
    },
    "sampling": {"sampler": "dpmsolver++", "steps": 3},
}  # fmt: skip


def config_of(name="latent_diffusion", **changes):
    settings = {**SETTINGS, **{key: _over(SETTINGS.get(key), value) for key, value in changes.items()}}
    values = {
        "grid": {"size": [16, 16, 16]},
        "generators": {"latent_diffusion": settings},
        "arms": {"generators": [name], "doses": [1.0], "controls": []},
    }
    return parse_config(values)


def _over(old, new):
    return {**old, **new} if isinstance(old, dict) else new


def settings_of(name="latent_diffusion", **changes):
    return config_of(name, **changes).for_generator(name)


def train(config, table, output):
    run_train(config, *plugin(config.name).training(config), table, output, "cpu")


@pytest.fixture(scope="module", autouse=True)
def quick(one_thread):
    """A grid of samples that takes no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monitoring, "_GRID_CASES", 1)
        patch.setattr(latent_diffusion, "PREVIEW_STEPS", 2)
        yield


@pytest.fixture(scope="module")
def trained(tiny_cohort, tmp_path_factory):
    """Folder of a training that nothing interrupted, and the states of its autoencoder by step."""
    folder, states = tmp_path_factory.mktemp("trained"), {}
    with pytest.MonkeyPatch.context() as patch:
        take_step = LatentOptimization.take_step

        def watched(self, step, *rest):
            kept = self.first.average.state_dict(), self.first.opponent.network.state_dict()
            states[step] = {name: value.clone() for held in kept for name, value in held.items()}
            return take_step(self, step, *rest)

        patch.setattr(LatentOptimization, "take_step", watched)
        train(settings_of(), tiny_cohort, folder)
    return folder, states


@pytest.fixture(scope="module")
def weights(trained):
    return trained[0] / "model.safetensors"


@pytest.fixture(scope="module")
def task(tiny_cohort):
    return Task(*cases.CaseFolder(tiny_cohort.parent / "case03").read(), seed=5)


def test_the_first_steps_train_the_autoencoder_and_the_others_leave_it(trained, weights):
    _, states = trained
    final = load_file(weights)
    assert list(states) == list(range(7))
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])
    for step in (3, 4, 5, 6):
        assert all(torch.equal(states[step][name], states[3][name]) for name in states[3])
    assert all(
        torch.equal(value, states[3][name.removeprefix("autoencoder.")])
        for name, value in final.items()
        if name.startswith("autoencoder.")
    )
    # Zero in a fresh denoiser.
    assert final["denoiser.out.2.weight"].abs().max() > 0


def test_the_opponent_joins_at_its_step_and_is_not_part_of_the_weights(trained, weights):
    _, states = trained
    of_opponent = [name for name in states[0] if name.startswith("of_scale.")]
    assert of_opponent
    changed = [any(not torch.equal(states[k][n], states[k + 1][n]) for n in of_opponent) for k in range(6)]
    assert changed == [False, True, True, False, False, False]
    assert not any("of_scale" in name for name in load_file(weights))


def test_each_phase_has_its_own_learning_rates(trained):
    history = pd.read_csv(trained[0] / "history.csv")
    falling = [(1 + np.cos(np.pi * step / left)) / 2 for left in (2, 3) for step in range(left)]
    expected = [4e-3 * rate for rate in (1, *falling[:2])] + [2e-3 * rate for rate in (1, *falling[2:])]
    assert history["learning_rate"].tolist() == pytest.approx(expected)
    assert np.isfinite(history["loss"]).all()


def test_the_scale_of_the_latents_is_stored_with_the_weights(weights, tiny_cohort):
    network = latent_diffusion.load_latent_diffusion(weights, settings_of(), "cpu")
    rows = cases.usable(cases.read_cases(tiny_cohort), "discovery")
    latents = []
    for _, row in rows.iterrows():
        hu = cases.folder_of(tiny_cohort, row).read()[0].array.transpose(2, 1, 0)
        clean = np.clip((hu + 1024) / 812 - 1, -1, 1).astype(np.float32)
        latents.append(network.encode(torch.from_numpy(clean.copy())[None, None])[0].flatten(1).numpy())
    latents = np.concatenate(latents, axis=1)
    assert latents.mean(axis=1) == pytest.approx([0] * 4, abs=1e-3)
    assert latents.std(axis=1) == pytest.approx([1] * 4, abs=1e-3)


@pytest.mark.parametrize("step", [2, 3, 4])
def test_an_interrupted_training_ends_bit_identical(trained, tiny_cohort, tmp_path, monkeypatch, caplog, step):
    """In the autoencoder's steps, between the two, and in the denoiser's."""
    caplog.set_level(logging.INFO, logger="lungddpm")
    take_step = LatentOptimization.take_step

    def killed(self, number, *rest):
        if number == step:
            raise KeyboardInterrupt
        return take_step(self, number, *rest)

    monkeypatch.setattr(LatentOptimization, "take_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(settings_of(), tiny_cohort, tmp_path)
    monkeypatch.undo()
    train(settings_of(), tiny_cohort, tmp_path)
    assert f"Resuming from step {step} of 7" in caplog.text
    first, second = (load_file(folder / "model.safetensors") for folder in (trained[0], tmp_path))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    losses = [pd.read_csv(folder / "history.csv")["loss"].tolist() for folder in (trained[0], tmp_path)]
    assert losses[0] == losses[1]
    assert (trained[0] / "samples.csv").read_text() == (tmp_path / "samples.csv").read_text()


def test_what_the_layout_leaves_open_is_the_references_own(weights, task):
    is_open = task.layout.array == Label.BACKGROUND
    for module, name in ((latent_diffusion, "latent_diffusion"), (reconstruct, "reconstruct")):
        (made,) = module.load(settings_of(name), weights, "cpu").make([task])
        assert made.dtype == np.int16
        assert np.array_equal(made[is_open], task.reference.array[is_open])
        assert (made != task.reference.array)[~is_open].mean() > 0.9
    generated = settings_of(sampling={"background": "generated"})
    (made,) = latent_diffusion.load(generated, weights, "cpu").make([task])
    assert (made != task.reference.array)[is_open].mean() > 0.9


def test_the_floor_is_the_autoencoder_alone(weights, task):
    """It does not see the layout, nor the seed."""
    generator = reconstruct.load(settings_of("reconstruct"), weights, "cpu")
    (made,) = generator.make([task])
    whole = task.layout.like(np.full_like(task.layout.array, Label.NODULE))
    (other,) = generator.make([Task(task.reference, whole, seed=9)])
    inside = task.layout.array != Label.BACKGROUND
    assert np.array_equal(made[inside], other[inside])
    network = latent_diffusion.load_latent_diffusion(weights, settings_of(), "cpu")
    clean = np.clip((task.reference.array.transpose(2, 1, 0) + 1024) / 812 - 1, -1, 1).astype(np.float32)
    mean, _ = network.autoencoder.encode(torch.from_numpy(clean.copy())[None, None])
    decoded = network.autoencoder.decode(mean)[0, 0].detach().numpy().transpose(2, 1, 0)
    expected = np.clip(decoded, -1, 1) * 812 - 212
    assert np.abs(other - expected).max() < 0.51


@pytest.mark.parametrize("name", ["latent_diffusion", "reconstruct"])
def test_samples_do_not_depend_on_their_batch(weights, tiny_cohort, name):
    generator = plugin(name).load(settings_of(name), weights, "cpu")
    folders = [cases.CaseFolder(tiny_cohort.parent / each) for each in ("case03", "case04")]
    tasks = [Task(*folder.read(), seed=number) for number, folder in enumerate(folders)]
    for task, made in zip(tasks, generator.make(tasks), strict=True):
        assert np.abs(generator.make([task])[0].astype(int) - made).max() <= 1


def test_samples_have_seeds(weights, task):
    generator = latent_diffusion.load(settings_of(), weights, "cpu")
    seeds = [5, 5, 6]
    first, again, other = (generator.make([Task(task.reference, task.layout, seed)])[0] for seed in seeds)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("hint", ["none", "slice", "volume"])
def test_what_is_drawn_depends_on_what_is_shown(tiny_cohort, tmp_path, task, hint):
    changes = {"hint": hint, "sampling": {"background": "generated"}, "training": {"steps": 4, "save_every": 9}}
    train(settings_of(**changes), tiny_cohort, tmp_path)
    changed = sees(latent_diffusion.load(settings_of(**changes), tmp_path / "model.safetensors", "cpu"), task)
    assert changed == {"none": [False] * 3, "slice": [True, False, False], "volume": [True, True, False]}[hint]


def test_an_autoencoder_of_another_training_is_refused(weights, tiny_cohort, tmp_path):
    """Its denoiser has learned other latents; shapes and settings are the same."""
    other = tmp_path / "other"
    train(replace(settings_of(training={"steps": 4, "save_every": 9}), seed=7), tiny_cohort, other)
    ours, theirs = load_file(weights), load_file(other / "model.safetensors")
    swapped = {name: theirs[name] if name.startswith("autoencoder.") else value for name, value in ours.items()}
    assert any(not torch.equal(ours[name], swapped[name]) for name in ours)
    with safe_open(weights, framework="pt") as file:
        save_file(ours, tmp_path / "copied.safetensors", file.metadata())
        save_file(swapped, tmp_path / "swapped.safetensors", file.metadata())
    for name in ("latent_diffusion", "reconstruct"):
        plugin(name).load(settings_of(name), tmp_path / "copied.safetensors", "cpu")
        with pytest.raises(InputError, match="differs from the checksum that was written with it"):
            plugin(name).load(settings_of(name), tmp_path / "swapped.safetensors", "cpu")


@pytest.mark.parametrize("spoiled", ["network", "opponent"])
def test_nan_in_the_steps_of_the_autoencoder_stops_with_the_last_good_state(
    tiny_cohort, tmp_path, monkeypatch, spoiled
):
    take_step = LatentOptimization.take_step

    def poisoned(self, step, *rest):
        if step == 2:
            network = {"network": self.first.model, "opponent": self.first.opponent.network}[spoiled]
            next(network.parameters()).data.fill_(float("nan"))
        return take_step(self, step, *rest)

    monkeypatch.setattr(LatentOptimization, "take_step", poisoned)
    with pytest.raises(InputError, match=r"no longer finite at step 3.*step-00000002\.pt"):
        train(settings_of(), tiny_cohort, tmp_path)
    state = torch.load(tmp_path / "state/step-00000002.pt", weights_only=True)
    held = [value for value in tree_leaves(state) if isinstance(value, torch.Tensor)]
    assert len(held) > 50
    assert all(tensor.isfinite().all() for tensor in held)
    assert not (tmp_path / "model.safetensors").exists()
    # The same command resumes from there.
    monkeypatch.undo()
    train(settings_of(), tiny_cohort, tmp_path)
    assert len(pd.read_csv(tmp_path / "history.csv")) == 7


def test_weights_that_do_not_fit_are_refused(weights):
    for changes, message in (
        ({"hint": "slice"}, "trained with hint none, but the config has slice"),
        ({"autoencoder": {"latent_channels": 2}}, "trained with autoencoder.latent_channels 4, but the config has 2"),
        ({"autoencoder": {"norm": "voxel"}}, "trained with autoencoder.norm volume, but the config has voxel"),
        ({"prediction": "clean"}, "trained with prediction v, but the config has clean"),
    ):
        for name in ("latent_diffusion", "reconstruct"):
            with pytest.raises(InputError, match=message):
                plugin(name).load(settings_of(name, **changes), weights, "cpu")
    # How it was trained is not what it is.
    latent_diffusion.load(settings_of(autoencoder={"steps": 2, "kl_weight": 1e-3}), weights, "cpu")
    with pytest.raises(InputError, match="trained with generator latent_diffusion, but the config has lung_ddpm"):
        plugin("lung_ddpm").load(config_of("lung_ddpm").for_generator("lung_ddpm"), weights, "cpu")


def test_wrong_settings_are_named():
    for changes, message in (
        ({"autoencoder": {"steps": 7}}, "autoencoder.steps 7 leave none of training.steps 7 to the denoiser"),
        ({"autoencoder": {"latent_channels": 9}}, "latent_channels 9 exceeds 8"),
        ({"autoencoder": {"norm_groups": 3}}, "norm_groups 3 does not divide 4 channels"),
        ({"autoencoder": {"crop": 7}}, "autoencoder.crop 7 is not divisible by 2"),
        ({"autoencoder": {"crop": 4}}, "discriminator needs at least 6 voxels per edge"),
        ({"autoencoder": {"crop": 32}}, "autoencoder.crop 32 is larger than grid.size"),
        ({"training": {"crop": 6}}, "training.crop 6 is not divisible by 4"),
        ({"autoencoder": {"channels": [4] * 5, "crop": None}}, r"grid.size \[16, 16, 16\] is not divisible by 32"),
        ({"sampling": {"steps": 21}}, "sampling.steps 21 exceeds timesteps 20"),
        ({"orientation": "published"}, "generators.latent_diffusion.orientation"),
    ):
        with pytest.raises(ConfigError, match=message):
            settings_of(**changes)


def test_the_estimate_counts_both_phases(monkeypatch, capsys):
    from lungddpm.operations import estimate

    seconds = {3: 1.0, 4: 3.0}
    monkeypatch.setattr(estimate, "_step_seconds", lambda optimization: [seconds[n] for n in optimization.phases])
    run_estimate(settings_of(), "cpu")
    shown = capsys.readouterr().out
    assert "1 s, then 3 s" in shown
    assert "15 seconds for 7 steps" in shown  # 3 of 1 s, 4 of 3 s


def test_the_plan_counts_what_the_steps_of_both_phases_take():
    """Against the operations of a real training: 3 steps of the autoencoder, the last 2 with an opponent, then 4."""
    config = settings_of()
    recipe, _ = plugin("latent_diffusion").training(config)
    accelerator = make_accelerator("cpu", "fp32", 2)
    optimization = start_optimization(config, recipe, initial_network(config, recipe), made_up(config), accelerator)
    taken = []
    for step in range(7):
        if step == 3:  # what measures the latents once is not a step's
            measure_latents(optimization.average, optimization.data, (-1024.0, 600.0))
        with FlopCounterMode(display=False) as counter:
            optimization.second.take_step(step - 3) if step >= 3 else optimization.take_step(step)
        taken.append(counter.get_total_flops())
    assert network_cost(config).training_flop == pytest.approx(sum(taken), rel=0.05)
    # The steps of the denoiser alone, as they were counted before there was a first phase, are about half.
    assert sum(taken[3:]) < 0.55 * sum(taken)
    assert network_cost(config).step_flop == pytest.approx(taken[-1], rel=0.01)


def test_the_estimate_takes_steps_of_both_phases_and_shows_each_network(capsys):
    config = settings_of(autoencoder={"steps": 30, "adversarial_from": 10}, training={"steps": 50})
    run_estimate(config, "cpu")
    shown = capsys.readouterr().out
    assert "for 50 steps" in shown
    rows = {line[:18].strip(): re.split(" {2,}", line[18:].strip()) for line in shown.splitlines()}
    assert rows["network"] == ["VoxelAutoencoder", "Discriminators", "LatentDiffusion"]
    assert rows["steps"] == ["1 to 30", "11 to 30", "31 to 50"]
    network, autoencoder = build_latent_diffusion(config), plugin("latent_diffusion").training(config)[0].before()[1]
    of_networks = [
        sum(p.numel() for p in each.parameters())
        for each in (autoencoder.build(), autoencoder.opponent(), network.denoiser)
    ]
    assert [int(number.replace(",", "")) for number in rows["parameters"]] == of_networks
    cost = network_cost(config)
    assert cost.opponent_parameters == of_networks[1]
    assert cost.parameters == of_networks[0] + of_networks[2]
    assert f"by count, as in 'lungddpm plan', {cost.memory_bytes / 2**20:,.0f} MiB" in shown


def test_the_plan_counts_the_memory_of_the_decoder():
    """Maps of all its channels on whole volumes; the denoiser works on half the edge."""
    channels = 16
    config = settings_of(autoencoder={"channels": [channels, channels]})
    one = 4 * channels * math.prod(config.grid.size)
    # At least a map and what is made of it, and never all of those that training keeps.
    assert 2 * one <= network_cost(config).drawing_bytes < 8 * one


@pytest.mark.parametrize(("name", "passes"), [("latent_diffusion", 3 + 1), ("reconstruct", 2)])
def test_the_plan_counts_its_passes(name, passes):
    config = config_of(name)
    assert plugin(name).drawing(config.for_generator(name)).passes == passes
    stages = plan_run(config, Cohort(6, 1e6, 3, 2, 1, "here"), known_speed("a100"))
    assert {"train_generator", "synthesize"} <= {stage.name for stage in stages}


def test_the_commands_train_and_draw(trained, weights, tiny_cohort, tmp_path):
    from typer.testing import CliRunner

    from lungddpm.cli import app

    config = tmp_path / "config.json"
    values = {"generators": {"latent_diffusion": SETTINGS}, "grid": {"size": [16] * 3}}
    config.write_text(json.dumps(values | {"arms": {"generators": ["reconstruct"], "doses": [1.0], "controls": []}}))
    where = ["--cases", tiny_cohort, "--output", tmp_path / "out", "--device", "cpu", "--threads", "1"]
    arguments = ["synthesize", "--generator", "reconstruct", "--configfile", config, "--weights", weights, *where]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    table = cases.read_cases(tmp_path / "out" / "samples-1.0-0.tsv")
    assert table["case_id"].tolist() == ["case03_s000", "case04_s000", "case03_s001"]
    record = json.loads((tmp_path / "out" / "case03_s000" / "sample.json").read_text())
    assert record["settings"]["weights_from"]["generator"] == "latent_diffusion"
    assert record["settings"]["weights_from"]["autoencoder.channels"] == [4, 8]
    assert record["trained_on"] == ["patient00", "patient01", "patient02"]


def test_until_the_latents_are_measured_the_preview_is_the_reconstruction(task):
    config = settings_of()
    network = latent_diffusion.recipe(config).build().eval()
    assert isinstance(network, LatentDiffusion)
    condition = torch.ones(1, 2, 16, 16, 16)
    condition[..., :4] = -1
    reference = torch.rand(1, 1, 16, 16, 16)
    draw = latent_diffusion.preview(config)
    generators = [torch.Generator().manual_seed(0)]
    shown = draw(network, condition, reference, generators)
    assert torch.equal(shown[..., 4:], network.reconstruct(reference)[..., 4:])
    assert torch.equal(shown[..., :4], reference[..., :4])
    network.sd.fill_(1)
    drawn = draw(network, condition, reference, generators)
    assert not torch.allclose(drawn[..., 4:], shown[..., 4:])
    assert torch.equal(drawn[..., :4], reference[..., :4])
