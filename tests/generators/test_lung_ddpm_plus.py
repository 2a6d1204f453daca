"""Lung-DDPM+: its crops, and what it makes with the best denoiser for data that are known in closed form."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from made_up_trainings import train

from lungddpm.config.loading import parse_config
from lungddpm.core import cases
from lungddpm.core.errors import ConfigError, InputError
from lungddpm.core.files import sha256_of
from lungddpm.core.labels import Label
from lungddpm.core.volume import Volume
from lungddpm.generators import Task, lung_ddpm, lung_ddpm_plus
from lungddpm.models import published_checkpoint
from lungddpm.models.schedule import cosine_betas
from lungddpm.synthesis.run import SynthesisJob, run_synthesize

EDGE = 16
# [-1, 1] is 1624 HU.
SPREAD_HU = 0.25 * 812


def make_config(**sampling):
    plus = {"training": {"crop": EDGE}, "sampling": {"steps": 25, **sampling}}
    config = parse_config({"grid": {"size": [32, 32, 32]}, "generators": {"lung_ddpm_plus": plus}})
    return config.for_generator("lung_ddpm_plus")


@pytest.fixture(scope="module")
def accuracy(repository):
    """The benchmark's module."""
    path = repository / "benchmarks" / "sampler_accuracy.py"
    spec = importlib.util.spec_from_file_location("sampler_accuracy_of_plus", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rough(accuracy):
    """Columns along z with correlated voxels: a whole volume's, and a crop's."""
    return accuracy.correlated("rough", 6, 32), accuracy.correlated("rough", 6, EDGE)


@pytest.fixture
def ideal(rough, monkeypatch):
    """The best denoiser of a crop takes the place of trained weights."""

    def load_denoiser(path, config, device):
        predict = rough[1].best_denoiser(cosine_betas(config.settings.timesteps))
        # It takes one volume at a time, and knows no times on a scale of 1000.
        return lambda inputs, times: torch.cat([predict(one[None], times[:1].clamp(max=249)) for one in inputs])

    monkeypatch.setattr(published_checkpoint, "load_denoiser", load_denoiser)


@pytest.fixture
def make(ideal):
    def make(tasks, **sampling):
        return lung_ddpm_plus.load(make_config(**sampling), None, "cpu").make(tasks)

    return make


@pytest.fixture(scope="module")
def task(rough):
    layout = np.full((32, 32, 32), Label.BACKGROUND, np.uint8)
    layout[2:30, 2:30, 2:] = Label.LUNG
    layout[12:20, 12:20, 14:18] = Label.NODULE
    values = rough[0].draw(32 * 32, torch.Generator().manual_seed(0))
    hu = values.numpy().reshape(32, 32, 32).transpose(1, 2, 0) * 812 - 212
    return Task(Volume(hu.astype(np.int16), np.eye(4)), Volume(layout, np.eye(4)), seed=3)


def layout_with(*boxes, size=32):
    layout = np.full((size, size, size), Label.LUNG, np.uint8)
    for box in boxes:
        layout[tuple(slice(*side) for side in box)] = Label.NODULE
    return layout


LAYOUTS = {
    "one": ([[(14, 18)] * 3], 1),
    "two": ([[(4, 7)] * 3, [(20, 28)] * 3], 2),
    "in a corner": ([[(0, 2)] * 3], 1),
    "longer than a crop": ([[(3, 30), (10, 14), (10, 14)]], 4),
    "wider than what a crop draws": ([[(10, 20)] * 3], 8),
    "bent": ([[(2, 30), (10, 12), (10, 12)], [(2, 4), (10, 30), (10, 12)]], 6),
}


@pytest.mark.parametrize(("boxes", "count"), LAYOUTS.values(), ids=LAYOUTS)
def test_crops_draw_every_nodule_voxel_once_and_fade_out(boxes, count):
    layout = layout_with(*boxes)
    crops = lung_ddpm_plus.plan_crops(layout, EDGE)
    assert len(crops) == count
    times_drawn = np.zeros(layout.shape, int)
    for crop in crops:
        times_drawn[crop.where] += crop.drawn
        assert crop.weight[crop.drawn].min() == 1
        for axis, side in enumerate(crop.where):
            assert 0 <= side.start < side.stop == side.start + EDGE <= 32
            faces = np.moveaxis(crop.weight, axis, 0)
            assert side.start == 0 or faces[0].max() < 1e-6
            assert side.stop == 32 or faces[-1].max() < 1e-6
        # No step anywhere: a cosine from 1 to 0 over three voxels, and diagonal neighbours.
        assert max(np.abs(np.diff(crop.weight, axis=axis)).max() for axis in range(3)) < 0.6
    assert np.array_equal(times_drawn, layout == Label.NODULE)


def test_a_crop_can_be_the_whole_volume():
    layout = layout_with([(0, 8)] * 3, size=8)
    (crop,) = lung_ddpm_plus.plan_crops(layout, 8)
    assert crop.drawn.all()
    assert (crop.weight == 1).all()


def test_a_layout_without_a_nodule_is_refused():
    with pytest.raises(InputError, match="without a nodule"):
        lung_ddpm_plus.plan_crops(layout_with(), EDGE)


def gradient(hu, axis, places):
    """Mean absolute difference between neighbours at these places along an axis, within the crop's other sides."""
    across = np.abs(np.diff(hu.astype(float), axis=axis))
    inside = [slice(8, 24)] * 3
    inside[axis] = places
    return across[tuple(inside)].mean()


def test_no_block_edge_shows(make, task):
    """The crop is [8, 24) along each axis; only z has correlated neighbours."""
    (made,) = make([task])
    before, changed = task.reference.array, made != task.reference.array
    nodule = task.layout.array == Label.NODULE
    assert changed[nodule].mean() > 0.9
    assert made[nodule].std() == pytest.approx(SPREAD_HU, rel=0.2)
    box = np.zeros_like(changed)
    box[8:24, 8:24, 8:24] = True
    assert not changed[~box].any()
    for axis in range(3):
        assert gradient(made, axis, [7, 23]) == gradient(before, axis, [7, 23])
    # Above and below the nodule, where the drawn and the reference's voxels are mixed; a plain paste would have a step.
    mixed = np.abs(np.diff(made.astype(float), axis=2))[12:20, 12:20, [10, 11, 12, 13, 17, 18, 19, 20]].mean()
    truth = np.abs(np.diff(before.astype(float), axis=2)).mean()
    assert mixed == pytest.approx(truth, rel=0.1)


def test_the_rest_of_the_crop_is_found_again(make, task):
    """Columns without a nodule voxel come back from their inverted noise, whatever the weight."""
    (made,) = make([task])
    beside = np.zeros((32, 32, 32), bool)
    beside[11, 11:21, 13:19] = True  # weight 1, but independent of the nodule's columns
    assert np.abs(made[beside] - task.reference.array[beside]).max() <= 5


@pytest.mark.parametrize(
    "sampling",
    [
        {"sampler": "ddim"},
        {"sampler": "unipc"},
        {"order": 2},
        {"aas": "published"},
        {"times": "published"},
        {"intensities": "published"},
        {"levels": "published"},
    ],
)
def test_every_mode_keeps_the_background_and_differs(make, task, sampling):
    (usual,), (made,) = make([task], steps=8), make([task], **{"steps": 8, **sampling})
    background = task.layout.array == Label.BACKGROUND
    assert np.array_equal(made[background], task.reference.array[background])
    assert not np.array_equal(made, usual)


def test_a_task_does_not_depend_on_the_others(make, task):
    more = Task(task.reference, Volume(layout_with(*LAYOUTS["two"][0]), np.eye(4)), seed=4)
    together = make([task, more], steps=6)
    for alone, made in zip((task, more), together, strict=True):
        assert np.abs(make([alone], steps=6)[0] - made).max() <= 1
    assert not np.array_equal(make([Task(task.reference, task.layout, seed=5)], steps=6)[0], together[0])


@pytest.mark.parametrize("sampler", ["ddim", "unipc"])
def test_published_levels_are_those_of_one_solver(sampler):
    with pytest.raises(ConfigError, match=r"levels: published needs sampler: dpmsolver\+\+"):
        make_config(sampler=sampler, levels="published")


@pytest.fixture(scope="module")
def tiny_config():
    """The denoiser of a few steps; the main one of this config cannot be loaded in its place."""
    training = {
        "steps": 2, "batch_size": 2, "accumulation": 1, "crop": 8, "precision": "fp32", "ema_start": 1, "save_every": 2,
    }  # fmt: skip
    plus = {
        "timesteps": 20,
        "denoiser": {"base_channels": 4, "multipliers": [1, 2], "norm_groups": 2, "attention": False},
        "training": training,
        "sampling": {"steps": 3, "batch_size": 2, "times": "published"},
    }
    arms = {"generators": ["lung_ddpm_plus"], "doses": [1.0], "controls": []}
    return parse_config({"grid": {"size": [16, 16, 16]}, "generators": {"lung_ddpm_plus": plus}, "arms": arms})


@pytest.fixture(scope="module")
def trained(tiny_cohort, tiny_config, tmp_path_factory):
    """Folder of a finished training."""
    folder = tmp_path_factory.mktemp("plus")
    train(tiny_config.for_training("lung_ddpm_plus"), tiny_cohort, folder, "cpu")
    return folder


def test_trained_denoiser_makes_samples(trained, tiny_cohort, tiny_config, tmp_path):
    weights = trained / "model.safetensors"
    job = SynthesisJob(
        "lung_ddpm_plus", tiny_cohort, tmp_path, tmp_path / "samples-0.tsv", weights=weights, device="cpu"
    )
    run_synthesize(tiny_config, job)
    table = cases.read_cases(tmp_path / "samples-0.tsv")
    assert table["case_id"].tolist() == ["case03_s000", "case04_s000", "case03_s001"]
    records = [json.loads((tmp_path / name / "sample.json").read_text()) for name in table["case_id"]]
    assert [record["layout_origin"] for record in records] == ["reference", "reference", "added"]
    sampling = {"sampler": "dpmsolver++", "order": 3, "steps": 3, "times": "published", "levels": "corrected"}
    for name, record in zip(table["case_id"], records, strict=True):
        assert (record["generator"], record["settings"]["orientation"]) == ("lung_ddpm_plus", "published")
        assert sampling.items() <= record["settings"]["sampling"].items()
        assert record["weights_sha256"] == sha256_of(weights)
        ct, layout = cases.CaseFolder(tmp_path / name).read()
        reference, _ = cases.CaseFolder(tiny_cohort.parent / record["reference_case_id"]).read()
        changed = ct.array != reference.array
        assert not changed[layout.array == Label.BACKGROUND].any()
        assert changed[layout.array == Label.NODULE].mean() > 0.9
    assert (trained / "samples/step-00000002.png").exists()


def test_weights_of_another_crop_or_denoiser_are_refused(trained, tiny_config):
    values = tiny_config.model_dump(mode="json")
    values["generators"]["lung_ddpm_plus"]["training"]["crop"] = 16
    other = parse_config(values).for_generator("lung_ddpm_plus")
    with pytest.raises(InputError, match=r"training.crop 8, but the config has 16"):
        lung_ddpm_plus.load(other, trained / "model.safetensors", "cpu")
    with pytest.raises(InputError, match=r"trained with generator lung_ddpm_plus, but the config has lung_ddpm"):
        lung_ddpm.load(tiny_config.for_generator("lung_ddpm"), trained / "model.safetensors", "cpu")


def test_cases_without_a_nodule_are_not_trained_on(tiny_cohort, tiny_config, tmp_path):
    table = cases.read_cases(tiny_cohort)
    table["path"] = [str(tiny_cohort.parent / path) for path in table["path"]]
    table.loc[table["role"] == "discovery", "n_nodules"] = 0
    cases.write_cases(tmp_path / "cases.tsv", table)
    with pytest.raises(InputError, match="no usable discovery case with a nodule"):
        train(tiny_config.for_training("lung_ddpm_plus"), tmp_path / "cases.tsv", tmp_path / "out", "cpu")
