import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from lungddpm import cases, generators
from lungddpm.config import parse_config
from lungddpm.diffusion.checkpoint import Metadata, save_denoiser
from lungddpm.diffusion.denoiser import build_denoiser
from lungddpm.errors import ConfigError, InputError
from lungddpm.files import write_json
from lungddpm.generators import Task, paste_constant
from lungddpm.layouts import Label
from lungddpm.volume import Volume

NAMES = ["lung_ddpm", "reference", "paste_constant"]


def make_config(**changes):
    values = {
        "grid": {"size": [16, 16, 16]},
        "diffusion": {
            "timesteps": 20,
            "denoiser": {"base_channels": 4, "multipliers": [1, 2], "norm_groups": 2, "attention": False},
            "sampling": {"sampler": "dpmsolver++", "steps": 3, "batch_size": 2},
        },
        "arms": {"generators": NAMES, "doses": [0.5, 1.0], "controls": []},
    }
    return parse_config({**values, **changes})


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """An untrained denoiser."""
    torch.manual_seed(0)
    config = make_config()
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_denoiser(path, build_denoiser(config), Metadata(config, 1, "config", "data"))
    return path


@pytest.fixture
def synthesize(tiny_cohort, weights, tmp_path):
    """Run one generator; returns its table (or one shard of it)."""

    def run(name, shard=0, shards=1, folder="out", **changes):
        table = tmp_path / folder / f"samples-{shard}.tsv"
        arguments = (name, tiny_cohort, weights, tmp_path / folder, shard, shards, table, "cpu")
        generators.run_synthesize(make_config(**changes), *arguments)
        return cases.read_cases(table)

    return run


def test_light_import_of_every_generator():
    code = (
        "import sys, lungddpm.generators as g\n"
        f"modules = [g.module_of(name) for name in {NAMES}]\n"
        "assert [bool(m.CITATION) and m.NEEDS_DENOISER for m in modules] == [True, False, False]\n"
        "assert not {'torch', 'scipy', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_plan_takes_references_in_turn(tiny_cohort):
    table = cases.read_cases(tiny_cohort)
    plan = generators.plan_samples(make_config(), "lung_ddpm", table)
    assert [sample.sample_id for sample in plan] == ["case03_s000", "case04_s000", "case03_s001"]
    assert len({sample.seed for sample in plan}) == 3
    assert [s.seed for s in plan] == [s.seed for s in generators.plan_samples(make_config(), "lung_ddpm", table)]
    assert plan[0].seed != generators.plan_samples(make_config(), "reference", table)[0].seed
    assert plan[0].seed != generators.plan_samples(make_config(seed=2), "lung_ddpm", table)[0].seed


def test_plan_leaves_out_references_without_nodules_and_excluded_ones(tiny_cohort):
    table = cases.read_cases(tiny_cohort)
    table.loc[table["case_id"] == "case03", "n_nodules"] = 0
    plan = generators.plan_samples(make_config(), "reference", table)
    assert {sample.reference["case_id"] for sample in plan} == {"case04"}
    table.loc[table["case_id"] == "case04", "status"] = "excluded"
    with pytest.raises(InputError, match="no usable reference case with a nodule"):
        generators.plan_samples(make_config(), "reference", table)


@pytest.mark.parametrize("name", NAMES)
def test_samples_fulfil_the_case_contract(synthesize, tiny_cohort, tmp_path, name):
    table = synthesize(name)
    assert table["case_id"].tolist() == ["case03_s000", "case04_s000", "case03_s001"]
    assert table["patient_id"].tolist() == ["patient03", "patient04", "patient03"]
    assert set(table["source"]) == {name}
    assert set(table["role"]) == {"synthetic"}
    for _, row in table.iterrows():
        folder = tmp_path / "out" / row["path"]
        ct, layout = cases.read_case(folder)
        reference, reference_layout = cases.read_case(tiny_cohort.parent / row["case_id"].split("_")[0])
        assert ct.array.dtype == np.int16
        assert ct.same_grid(reference)
        assert np.array_equal(layout.array, reference_layout.array)
        background = layout.array == Label.BACKGROUND
        assert reference.array[background].max() > 600  # beyond the model's window
        assert np.array_equal(ct.array[background], reference.array[background])
        assert np.array_equal(ct.array, reference.array) == (name == "reference")
        assert row["sha256"] == cases.hash_case(folder)
        record = json.loads((folder / "sample.json").read_text())
        assert record["reference_case_id"] == row["case_id"].split("_")[0]
        assert record["generator"] == name
        assert (record["weights_sha256"] is None) == (name != "lung_ddpm")


def test_same_reference_and_layout_give_new_lungs_each_time(synthesize, tmp_path):
    synthesize("lung_ddpm")
    first, second = (cases.read_case(tmp_path / "out" / f"case03_s00{k}")[0].array for k in (0, 1))
    assert (first != second).any()


def test_shards_make_the_same_samples_as_one_job(synthesize, tmp_path):
    whole = synthesize("lung_ddpm")
    shards = [synthesize("lung_ddpm", shard, 2, folder="sharded") for shard in (0, 1)]
    interleaved = [shards[index % 2].iloc[index // 2]["case_id"] for index in range(3)]
    assert interleaved == whole["case_id"].tolist()
    for sample in interleaved:
        ct, alone = (cases.read_case(tmp_path / folder / sample)[0].array for folder in ("out", "sharded"))
        # Batches differ between the two, which may turn the rounding of a voxel.
        assert np.abs(ct.astype(int) - alone).max() <= 1


def test_complete_samples_are_kept_and_broken_ones_made_again(synthesize, tmp_path, monkeypatch):
    synthesize("lung_ddpm")
    made = []
    monkeypatch.setattr(generators, "_make", lambda batch, *_: made.extend(sample.sample_id for sample, _ in batch))
    synthesize("lung_ddpm")
    assert made == []
    ct = tmp_path / "out/case04_s000/ct.nii.gz"
    ct.write_bytes(ct.read_bytes()[:-20])
    record = tmp_path / "out/case03_s001/sample.json"
    write_json(record, {**json.loads(record.read_text()), "fingerprint": "of another run"})
    synthesize("lung_ddpm")
    assert made == ["case04_s000", "case03_s001"]
    made.clear()
    steps = {"sampler": "dpmsolver++", "steps": 4}
    synthesize("lung_ddpm", diffusion={**make_config().diffusion.model_dump(), "sampling": steps})
    assert len(made) == 3


def test_generator_that_no_arm_uses(synthesize):
    with pytest.raises(ConfigError, match="no arm uses the generator 'reference'"):
        synthesize("reference", arms={"generators": ["lung_ddpm"]})


def test_denoiser_is_asked_for(tiny_cohort, tmp_path):
    for weights, message in ((None, "needs the weights"), (tmp_path / "none.safetensors", "does not exist")):
        with pytest.raises(InputError, match=message):
            generators.run_synthesize(
                make_config(), "lung_ddpm", tiny_cohort, weights, tmp_path, 0, 1, tmp_path / "samples.tsv"
            )


def test_constant_is_the_mean_of_lung_voxels():
    layout = np.array([Label.BACKGROUND, Label.LUNG, Label.LUNG, Label.NODULE, Label.VESSEL]).reshape(5, 1, 1)
    hu = np.array([900, -800, -841, 30, -20], np.int16).reshape(5, 1, 1)
    made = paste_constant.fill_with_mean_lung(Task(Volume(hu, np.eye(4)), Volume(layout, np.eye(4)), seed=0))
    assert made.dtype == np.int16
    assert made.ravel().tolist() == [900, -820, -820, -820, -820]
