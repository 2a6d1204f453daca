"""Rectified flow as a generator: trained and drawn by the commands, refused where it cannot be."""

import json
import re
import textwrap

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from made_up_trainings import run_command, train_by_command

from lungddpm.config.loading import load_config, parse_config
from lungddpm.core import cases
from lungddpm.core.errors import ConfigError, InputError
from lungddpm.core.files import sha256_of
from lungddpm.core.labels import Label
from lungddpm.generators import Task, lung_ddpm, rectified_flow
from lungddpm.models.published_checkpoint import export_published
from lungddpm.operations.plan import Cohort, known_speed, plan_run

NETWORK = {"base_channels": 4, "multipliers": [1, 2], "norm_groups": 2, "attention": False}
TRAINING = {
    "steps": 3, "batch_size": 2, "accumulation": 1, "learning_rate": 2e-3, "crop": 8, "precision": "fp32",
    "ema_start": 1, "save_every": 2, "sample_every": 2, "lesion_weight": 10,
}  # fmt: skip
VALUES = {
    "grid": {"size": [16, 16, 16]},
    "generators": {
        "rectified_flow": {"denoiser": NETWORK, "training": TRAINING, "sampling": {"steps": 3}},
        "lung_ddpm": {"denoiser": NETWORK, "timesteps": 20, "sampling": {"steps": 3}},
    },
    "arms": {"generators": ["rectified_flow"], "doses": [1.0], "controls": []},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(yaml.safe_dump(VALUES))
    return path


@pytest.fixture(scope="module")
def trained(config, tiny_cohort, tmp_path_factory):
    """Folder of a training by the command."""
    return train_by_command("rectified_flow", config, tiny_cohort, tmp_path_factory.mktemp("trained"))


def test_the_training_leaves_what_every_training_does(trained):
    history = pd.read_csv(trained / "history.csv")
    assert history["step"].tolist() == [1, 2, 3]
    assert np.isfinite(history["loss"]).all()
    # A fresh network predicts zero: the error is that of noise minus CT, some 0.8 at least.
    assert 0.5 < history["loss"][0] < 2
    assert sorted(path.name for path in (trained / "samples").iterdir()) == ["step-00000002.png", "step-00000003.png"]


def test_samples_are_made_by_the_command(trained, config, tiny_cohort, tmp_path):
    weights = trained / "model.safetensors"
    where = ["--cases", tiny_cohort, "--output", tmp_path, "--device", "cpu", "--threads", "1"]
    run_command("synthesize", "--generator", "rectified_flow", "--configfile", config, "--weights", weights, *where)
    table = cases.read_cases(tmp_path / "samples-1.0-0.tsv")
    assert table["case_id"].tolist() == ["case03_s000", "case04_s000", "case03_s001"]
    for name in table["case_id"]:
        record = json.loads((tmp_path / name / "sample.json").read_text())
        assert record["weights_sha256"] == sha256_of(weights)
        assert record["settings"]["sampling"] == {"steps": 3, "background": "reference"}
        ct, layout = cases.CaseFolder(tmp_path / name).read()
        reference, _ = cases.CaseFolder(tiny_cohort.parent / record["reference_case_id"]).read()
        background = layout.array == Label.BACKGROUND
        assert np.array_equal(ct.array[background], reference.array[background])
        assert (ct.array != reference.array)[~background].mean() > 0.9


def load(values, weights, module=rectified_flow):
    return module.load(parse_config(values).for_generator(module.__name__.rpartition(".")[2]), weights, "cpu")


def changed(**keys):
    flow = {**VALUES["generators"]["rectified_flow"], **keys}
    return {**VALUES, "generators": {**VALUES["generators"], "rectified_flow": flow}}


def test_the_background_can_be_generated(trained, tiny_cohort):
    ct, layout = cases.CaseFolder(tiny_cohort.parent / "case03").read()
    task = Task(ct, layout, seed=5)
    drawn = {
        background: load(changed(sampling={"steps": 3, "background": background}), trained / "model.safetensors").make(
            [task]
        )[0]
        for background in ("reference", "generated")
    }
    is_open = layout.array == Label.BACKGROUND
    assert np.array_equal(drawn["reference"][is_open], ct.array[is_open])
    assert (drawn["generated"] != ct.array)[is_open].mean() > 0.9


def test_samples_do_not_depend_on_their_batch(trained, tiny_cohort):
    generator = load(VALUES, trained / "model.safetensors")
    folders = [cases.CaseFolder(tiny_cohort.parent / name) for name in ("case03", "case04")]
    tasks = [Task(*folder.read(), seed=number) for number, folder in enumerate(folders)]
    together = generator.make(tasks)
    for task, made in zip(tasks, together, strict=True):
        assert np.abs(generator.make([task])[0].astype(int) - made).max() <= 1


def test_weights_of_another_generator_are_refused(trained, tmp_path):
    weights = trained / "model.safetensors"
    with pytest.raises(InputError, match="trained with generator rectified_flow, but the config has lung_ddpm"):
        load(VALUES, weights, lung_ddpm)
    with pytest.raises(InputError, match=r"denoiser.base_channels 4, but the config has 8"):
        load(changed(denoiser={**NETWORK, "base_channels": 8}), weights)
    with pytest.raises(InputError, match="was trained by rectified_flow, which is not a diffusion model"):
        export_published(weights, tmp_path / "out.pt")


def test_the_training_continues_from_its_own_weights(trained, config):
    settings = load_config(config).for_training("rectified_flow")
    network = rectified_flow.recipe(settings).load(trained / "model.safetensors")
    assert all(torch.isfinite(parameter).all() for parameter in network.parameters())


def test_wrong_settings_are_named():
    for keys, message in (
        ({"training": {"lesion_weight": 0}}, "generators.rectified_flow.training.lesion_weight"),
        ({"times": "cosine"}, "generators.rectified_flow.times"),
        ({"training": {"crop": 7}}, "training.crop 7 is not divisible by 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config(changed(**keys))


def test_the_plan_counts_a_pass_per_step():
    stages = {
        steps: plan_run(
            parse_config(changed(sampling={"steps": steps})), Cohort(6, 1e6, 3, 2, 1, "here"), known_speed("a100")
        )
        for steps in (1000, 4000)
    }
    hours = {steps: next(s for s in stages[steps] if s.name == "synthesize").gpu_hours for steps in stages}
    start = (4 * hours[1000] - hours[4000]) / 3
    # Of two jobs, which load torch, for the draw of each of five replicates.
    assert start == pytest.approx(5 * 2 * 5 / 3600, rel=0.01)


def test_the_example_in_the_docs_trains_as_the_demo_does(repository):
    page = (repository / "docs/explanation/diffusion.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"(?m)^    generators:\n      rectified_flow:\n(?:    .*\n)+", page)
    config = parse_config({"preset": "demo", **yaml.safe_load(textwrap.dedent(block))})
    ours, demo = (config.for_generator(name).settings for name in ("rectified_flow", "lung_ddpm"))
    assert ours.classes == demo.classes
    assert ours.denoiser == demo.denoiser
    how_often = {"save_every", "sample_every"}
    assert ours.training.model_dump(exclude=how_often) == demo.training.model_dump(exclude=how_often)
