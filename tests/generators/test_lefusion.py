"""LeFusion as a generator: nodules alone are drawn, each with the histogram that its sample's record names."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from made_up_trainings import run_command, train_by_command, train_interrupted
from safetensors.torch import load_file
from scipy import ndimage

from lungddpm.config.loading import load_config, parse_config
from lungddpm.core import cases
from lungddpm.core.errors import ConfigError, InputError
from lungddpm.core.files import sha256_of
from lungddpm.core.labels import Label
from lungddpm.generators import Task, lefusion, lung_ddpm_plus
from lungddpm.models import lesions
from lungddpm.models.checkpoint import read_metadata, save_network
from lungddpm.models.data import SampleStream, TrainingData
from lungddpm.models.optimization import Optimization
from lungddpm.operations.plan import Cohort, known_speed, plan_run

SETTINGS = {
    "timesteps": 20,
    "denoiser": {"base_channels": 4, "multipliers": [1, 2], "norm_groups": 2, "attention": False},
    "training": {
        "steps": 4, "batch_size": 2, "accumulation": 1, "crop": 8, "precision": "fp32", "ema_start": 1,
        "save_every": 2, "sample_every": 2, "augmentation": "mild",
    },
    "sampling": {"steps": 3},
}  # fmt: skip
VALUES = {
    "grid": {"size": [16, 16, 16]},
    "generators": {"lefusion": SETTINGS},
    "arms": {"generators": ["lefusion"], "doses": [1.0], "controls": []},
}


def changed(**keys):
    return {**VALUES, "generators": {"lefusion": {**SETTINGS, **keys}}}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(yaml.safe_dump(VALUES))
    return path


@pytest.fixture(scope="module")
def trained(config, tiny_cohort, tmp_path_factory):
    """Folder of a training by the command."""
    return train_by_command("lefusion", config, tiny_cohort, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def weights(trained):
    return trained / "model.safetensors"


def load(weights, values=VALUES):
    return lefusion.load(parse_config(values).for_generator("lefusion"), weights, "cpu")


@pytest.fixture
def task(tiny_cohort):
    return Task(*cases.CaseFolder(tiny_cohort.parent / "case03").read(), seed=5)


def with_nodules(task, *boxes, seed=5):
    """The same reference, with these boxes as nodules and lung everywhere else."""
    layout = np.full((16, 16, 16), Label.LUNG, np.uint8)
    for box in boxes:
        layout[box] = Label.NODULE
    return Task(task.reference, task.layout.like(layout), seed)


def test_the_training_leaves_what_every_training_does(trained, tiny_cohort):
    history = pd.read_csv(trained / "history.csv")
    assert history["step"].tolist() == [1, 2, 3, 4]
    # A fresh network predicts zero: the error is that of the noise, sqrt(2 / pi).
    assert history["loss"][0] == pytest.approx(0.8, abs=0.2)
    assert sorted(path.name for path in (trained / "samples").iterdir()) == ["step-00000002.png", "step-00000004.png"]
    kept = read_metadata(trained / "model.safetensors").kept["nodules"]
    assert [one["case_id"] for one in kept] == ["case00", "case01", "case02"]
    for one in kept:
        ct, layout = cases.CaseFolder(tiny_cohort.parent / one["case_id"]).read()
        expected, _ = np.histogram(ct.array[layout.array == Label.NODULE], bins=16, range=(-1024, 600))
        assert one["counts"] == expected.tolist()


def test_interrupted_training_ends_bit_identical(trained, config, tiny_cohort, tmp_path, monkeypatch):
    settings = load_config(config).for_training("lefusion")
    train_interrupted(monkeypatch, Optimization, 3, settings, tiny_cohort, tmp_path, "cpu")
    first, second = (load_file(folder / "model.safetensors") for folder in (trained, tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)
    kept = [read_metadata(folder / "model.safetensors").kept for folder in (trained, tmp_path)]
    assert kept[0] == kept[1]


def test_samples_are_the_reference_but_for_their_nodules(weights, config, tiny_cohort, tmp_path):
    where = ["--cases", tiny_cohort, "--output", tmp_path, "--device", "cpu", "--threads", "1"]
    run_command("synthesize", "--generator", "lefusion", "--configfile", config, "--weights", weights, *where)
    table = cases.read_cases(tmp_path / "samples-1.0-0.tsv")
    assert table["case_id"].tolist() == ["case03_s000", "case04_s000", "case03_s001"]
    origins = []
    for name in table["case_id"]:
        record = json.loads((tmp_path / name / "sample.json").read_text())
        origins.append(record["layout_origin"])
        assert record["weights_sha256"] == sha256_of(weights)
        ct, layout = cases.CaseFolder(tmp_path / name).read()
        reference, _ = cases.CaseFolder(tiny_cohort.parent / record["reference_case_id"]).read()
        nodule = layout.array == Label.NODULE
        assert np.array_equal(ct.array[~nodule], reference.array[~nodule])
        assert (ct.array != reference.array)[nodule].mean() > 0.9
        _, count = ndimage.label(nodule, np.ones((3, 3, 3)))
        assert [one["nodule"] for one in record["histograms"]] == list(range(1, count + 1))
        assert {one["case_id"] for one in record["histograms"]} <= {"case00", "case01", "case02"}
    assert origins == ["reference", "reference", "added"]


def test_the_recorded_histogram_is_the_one_that_the_network_saw(weights, task, monkeypatch):
    """Two nodules of other sizes; the network sees a crop around each, one after the other."""
    kept = {"nodules": [{"case_id": "a", "number": 1, "counts": [0] * 5 + [3, 1] + [0] * 9},
                        {"case_id": "b", "number": 2, "counts": [0] * 9 + [60] + [0] * 6}]}  # fmt: skip
    metadata = read_metadata(weights)
    monkeypatch.setattr(lesions, "read_metadata", lambda path: type(metadata)(**{**vars(metadata), "kept": kept}))
    seen = []
    draw_nodules = lesions.draw_nodules

    def watching(network, solver, condition, *rest):
        seen.append(condition)
        return draw_nodules(network, solver, condition, *rest)

    monkeypatch.setattr(lesions, "draw_nodules", watching)
    small, large = np.s_[2:4, 2, 2:4], np.s_[9:13, 9:13, 9:13]
    two = with_nodules(task, small, large)
    generator = load(weights)
    generator.make([two])
    recorded = generator.describe(two)["histograms"]
    assert [(one["nodule"], one["case_id"], one["of_nodule"]) for one in recorded] == [(1, "a", 1), (2, "b", 2)]
    assert recorded[0]["histogram"] == [0] * 5 + [0.75, 0.25] + [0] * 9
    assert len(seen) == 2
    for condition, one in zip(seen, recorded, strict=True):
        inside = condition[0, 0] > 0
        expected = 2 * torch.tensor(one["histogram"]) - 1
        assert torch.equal(condition[0, 1:, inside], expected[:, None].expand(-1, int(inside.sum())))


def test_a_nodule_beside_another_gets_its_own_histogram_in_training(tiny_cohort):
    """Two nodules of a constant HU in every crop: the network is shown one, with its histogram, and learns that one."""
    layout = np.full((1, 16, 16, 16), Label.LUNG, np.uint8)
    hu = np.full((1, 16, 16, 16), -850, np.int16)
    for box, value in ((np.s_[0, 6:9, 6:9, 5:7], -400), (np.s_[0, 6:9, 6:9, 8:10], 20)):
        layout[box], hu[box] = Label.NODULE, value
    values = changed(training={**SETTINGS["training"], "augmentation": "none", "batch_size": 8})
    settings = parse_config(values).for_training("lefusion")
    recipe = lefusion.recipe(settings)
    objective = recipe.objective(torch.device("cpu"))
    batch = SampleStream(TrainingData(["a"], hu, layout), settings, recipe, objective, torch.device("cpu")).batch(0)
    shown = []
    for clean, nodule in zip(batch.clean, batch.condition, strict=True):
        shown += set(((clean[nodule > 0] + 1) * 812 - 1024).round().int().tolist())
        # The other one is in the crop all the same.
        assert (clean > -0.5).sum() > (nodule > 0).sum()
    assert len(shown) == 8
    assert set(shown) == {-400, 20}


def test_a_nodule_is_drawn_without_showing_those_beside_it(weights, task, monkeypatch):
    given = []
    draw_nodules = lesions.draw_nodules

    def watching(network, solver, condition, reference, drawn, *rest):
        given.append((condition[0, 0] > 0, drawn[0, 0]))
        return draw_nodules(network, solver, condition, reference, drawn, *rest)

    monkeypatch.setattr(lesions, "draw_nodules", watching)
    load(weights).make([with_nodules(task, *BOXES["two beside one another"])])
    assert [int(shown.sum()) for shown, _ in given] == [27, 18]
    assert all(torch.equal(shown, drawn) for shown, drawn in given)


BOXES = {
    "in a corner": [np.s_[0:2, 0:2, 0:2]],
    "two beside one another": [np.s_[3:6, 3:6, 3:6], np.s_[7:9, 3:6, 3:6]],
    "larger than a crop": [np.s_[2:13, 5:8, 5:8]],
}


@pytest.mark.parametrize("boxes", BOXES.values(), ids=BOXES)
def test_nodules_are_drawn_wherever_they_lie(weights, task, boxes):
    placed = with_nodules(task, *boxes)
    (made,) = load(weights).make([placed])
    nodule = placed.layout.array == Label.NODULE
    assert np.array_equal(made[~nodule], task.reference.array[~nodule])
    assert (made != task.reference.array)[nodule].mean() > 0.9
    assert (made.dtype, made.shape) == (np.int16, (16, 16, 16))


def test_parts_of_a_large_nodule_see_what_was_drawn_before(weights, task, monkeypatch):
    """Crops of 8 draw parts of at most 4 voxels; each later part has fewer voxels left to draw in its crop."""
    given = []
    draw_nodules = lesions.draw_nodules

    def watching(network, solver, condition, reference, drawn, *rest):
        given.append((condition[0, 0] > 0, drawn[0, 0], reference[0, 0]))
        return draw_nodules(network, solver, condition, reference, drawn, *rest)

    monkeypatch.setattr(lesions, "draw_nodules", watching)
    placed = with_nodules(task, np.s_[4:12, 6:10, 6:10])
    (made,) = load(weights).make([placed])
    (first, second) = given
    # Along x, the last axis: the crops are [2, 10) and [6, 14), the parts [4, 8) and [8, 12).
    assert torch.equal(first[0], first[1])
    assert second[0].any(dim=(0, 1)).tolist() == [True] * 6 + [False] * 2
    assert second[1].any(dim=(0, 1)).tolist() == [False] * 2 + [True] * 4 + [False] * 2
    window = (made[6:8, 6:10, 6:10].transpose(2, 1, 0) + 1024) / 812 - 1
    np.testing.assert_allclose(second[2][2:6, 2:6, :2].numpy(), window, atol=1e-5)


def test_a_sample_depends_on_its_seed_and_not_on_its_batch(weights, task):
    generator = load(weights)
    tasks = [
        task,
        with_nodules(task, *BOXES["two beside one another"], seed=6),
        with_nodules(task, *BOXES["in a corner"]),
    ]
    together = generator.make(tasks)
    for one, made in zip(tasks, together, strict=True):
        assert np.array_equal(generator.make([one])[0], made)
    other = generator.make([Task(task.reference, task.layout, seed=6)])[0]
    assert not np.array_equal(other, together[0])


@pytest.mark.parametrize("sampling", [{"sampler": "dpmsolver++"}, {"sampler": "unipc"}, {"resampling": 2}])
def test_samplers_and_resampling_make_another_nodule(weights, task, sampling):
    usual, other = (load(weights, changed(sampling={"steps": 3, **keys})).make([task])[0] for keys in ({}, sampling))
    nodule = task.layout.array == Label.NODULE
    assert np.array_equal(other[~nodule], task.reference.array[~nodule])
    assert (other != usual)[nodule].any()


def test_a_layout_without_a_nodule_is_refused(weights, task):
    with pytest.raises(InputError, match=r"got a layout without a nodule\. Exclude the reference"):
        load(weights).make([with_nodules(task)])


def test_weights_without_histograms_are_refused(weights, tmp_path):
    settings = parse_config(VALUES).for_training("lefusion")
    metadata = read_metadata(weights)
    path = tmp_path / "model.safetensors"
    save_network(path, lefusion.recipe(settings).load(weights), type(metadata)(**{**vars(metadata), "kept": {}}))
    with pytest.raises(InputError, match=r"model.safetensors: has no histograms of nodules\. Train"):
        load(path)


def test_weights_of_another_generator_are_refused(weights):
    both = {"generators": {**VALUES["generators"], "lung_ddpm_plus": SETTINGS}}
    own = parse_config({**VALUES, **both}).for_generator("lung_ddpm_plus")
    with pytest.raises(InputError, match="trained with generator lefusion, but the config has lung_ddpm_plus"):
        lung_ddpm_plus.load(own, weights, "cpu")
    with pytest.raises(InputError, match=r"training.crop 8, but the config has 16"):
        load(weights, changed(training={**SETTINGS["training"], "crop": 16}))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"classes": ["lung", "nodule"]}, r"lefusion.classes"),
        ({"training": {"crop": None}}, r"lefusion.training.crop"),
        ({"training": {"lesion_weight": 10}}, r"lefusion.training.lesion_weight"),
        ({"sampling": {"aas": "published"}}, r"aas must be corrected"),
        ({"sampling": {"intensities": "published"}}, r"intensities must be corrected"),
        ({"sampling": {"steps": 21}}, r"sampling.steps 21 exceeds timesteps 20"),
    ],
)
def test_wrong_settings_are_named(keys, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(changed(**keys))


def test_crops_larger_than_the_grid_are_refused():
    values = changed(training={**SETTINGS["training"], "crop": 32})
    with pytest.raises(ConfigError, match=r"training.crop 32 is larger than grid.size"):
        parse_config(values)


def test_the_estimate_counts_the_histograms_channels(config):
    """The first convolution has 18 inputs (CT, nodule, 16 bins) instead of 2: 16 x 4 x 27 weights more."""
    output = run_command(
        "train", "--generator", "lefusion", "--configfile", config, "--estimate", "--device", "cpu", "--threads", "1"
    )
    plus = parse_config(
        {**VALUES, "generators": {"lung_ddpm_plus": SETTINGS}, "arms": {"generators": ["lung_ddpm_plus"]}}
    )
    bare = lung_ddpm_plus.recipe(plus.for_training("lung_ddpm_plus")).build()
    parameters = sum(parameter.numel() for parameter in bare.parameters()) + 16 * 4 * 27
    assert f"{parameters:,}" in output
    assert "of the process's memory at most" in output


def test_the_plan_counts_a_pass_per_step_visit_and_nodule():
    def hours(**sampling):
        values = changed(timesteps=4000, sampling=sampling)
        stages = plan_run(parse_config(values), Cohort(6, 1e6, 3, 2, 1, "here"), known_speed("a100"))
        return next(stage for stage in stages if stage.name == "synthesize").gpu_hours

    one, four, visited = hours(steps=1000), hours(steps=4000), hours(steps=1000, resampling=4)
    assert visited == pytest.approx(four)
    assert four > one


def test_the_published_defaults():
    settings = parse_config({"grid": {"size": [128, 128, 128]}}).for_training("lefusion").settings
    assert (settings.timesteps, settings.prediction, settings.sampling.sampler) == (300, "epsilon", "ddpm")
    assert (settings.training.learning_rate, settings.training.loss, settings.training.steps) == (1e-4, "l1", 50_000)
