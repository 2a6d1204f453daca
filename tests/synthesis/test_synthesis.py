import json
import shutil
from contextlib import ExitStack

import numpy as np
import pandas as pd
import pytest
import torch

from lungddpm.arms import splits
from lungddpm.config.loading import parse_config
from lungddpm.config.models import Synthesis
from lungddpm.core import cases
from lungddpm.core.cohorts import Cohort, training_cases
from lungddpm.core.errors import ConfigError, InputError, LeakError
from lungddpm.core.files import lock_if_free, read_json, write_json
from lungddpm.core.labels import Label
from lungddpm.core.volume import Volume, read_volume, write_volume
from lungddpm.generators import Generator, Task, lung_ddpm, paste_constant, reference
from lungddpm.layouts.collect import run_collect
from lungddpm.layouts.compose import run_prepare
from lungddpm.models.checkpoint import Metadata, save_network
from lungddpm.models.denoiser import build_denoiser
from lungddpm.sources.index import index_source, write_index
from lungddpm.sources.phantom.cohort import write_cohort
from lungddpm.synthesis import run as running
from lungddpm.synthesis.plan import plan_samples
from lungddpm.synthesis.run import SynthesisJob, run_synthesize

NAMES = ["lung_ddpm", "reference", "paste_constant"]
LUNG_DDPM = {
    "timesteps": 20,
    "denoiser": {"base_channels": 4, "multipliers": [1, 2], "norm_groups": 2, "attention": False},
    "sampling": {"sampler": "dpmsolver++", "steps": 3, "batch_size": 2},
}


def make_config(**changes):
    values = {
        "grid": {"size": [16, 16, 16]},
        "generators": {"lung_ddpm": LUNG_DDPM},
        "arms": {"generators": NAMES, "doses": [0.5, 1.0], "controls": []},
    }
    return parse_config({**values, **changes})


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """An untrained denoiser."""
    torch.manual_seed(0)
    config = make_config().for_generator("lung_ddpm")
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_network(path, build_denoiser(config), Metadata.of(config, 1, "config", "data"))
    return path


@pytest.fixture
def synthesize(tiny_cohort, weights, tmp_path):
    """Run one generator; returns its table (or one shard of it)."""

    def run(name, shard=0, shards=1, folder="out", dose=None, **changes):
        table = tmp_path / folder / f"samples-{shard}.tsv"
        job = SynthesisJob(name, tiny_cohort, tmp_path / folder, table, shard, shards, dose, weights, device="cpu")
        run_synthesize(make_config(**changes), job)
        return cases.read_cases(table)

    return run


def test_plan_takes_references_in_turn(tiny_cohort):
    table = cases.read_cases(tiny_cohort)
    plan = plan_samples(make_config(), "lung_ddpm", table)
    assert [sample.sample_id for sample in plan] == ["case03_s000", "case04_s000", "case03_s001"]
    assert len({sample.seed for sample in plan}) == 3
    assert [s.seed for s in plan] == [s.seed for s in plan_samples(make_config(), "lung_ddpm", table)]
    assert plan[0].seed != plan_samples(make_config(), "reference", table)[0].seed
    assert plan[0].seed != plan_samples(make_config(seed=2), "lung_ddpm", table)[0].seed


def test_a_variant_with_the_weights_of_another_draws_from_the_same_noise(tiny_cohort):
    """Of two numbers of steps, only the steps differ; a variant that is trained itself has its own noise."""
    variants = {
        "lung_2": {"kind": "lung_ddpm", "weights_of": "lung_ddpm", "sampling": {"steps": 2}},
        "again": {"kind": "lung_ddpm"},
    }
    config = make_config(
        generators={"lung_ddpm": LUNG_DDPM, **variants},
        arms={"generators": ["lung_ddpm", *variants], "doses": [1.0], "controls": []},
    )
    table = cases.read_cases(tiny_cohort)
    names = "lung_ddpm", "lung_2", "again"
    first, fewer, trained = ([each.seed for each in plan_samples(config, name, table)] for name in names)
    assert first == fewer == [each.seed for each in plan_samples(make_config(), "lung_ddpm", table)]
    assert not {*first} & {*trained}


def origins(plan):
    return [(sample.sample_id, sample.layout_origin) for sample in plan]


def test_plan_says_where_layouts_are_from(tiny_cohort):
    table = cases.read_cases(tiny_cohort)
    table.loc[table["case_id"] == "case03", "n_nodules"] = 0
    doses = {"arms": {"generators": NAMES, "doses": [1.67], "controls": []}}
    plan = plan_samples(make_config(**doses), "lung_ddpm", table)
    assert origins(plan) == [
        ("case03_s000", "placed"), ("case04_s000", "reference"), ("case03_s001", "placed"),
        ("case04_s001", "jittered"), ("case03_s002", "placed"),
    ]  # fmt: skip
    seeds = [sample.layout_seed for sample in plan]
    assert seeds[1] is None
    assert len(set(seeds)) == 5
    others = plan_samples(make_config(**doses), "paste_constant", table)
    assert [sample.layout_seed for sample in others] == seeds
    assert not {sample.seed for sample in others} & {sample.seed for sample in plan}

    calm = make_config(**doses, synthesis={"jitter_repeats": False})
    plan = plan_samples(calm, "lung_ddpm", table)
    assert [origin for _, origin in origins(plan)] == ["placed", "reference"] * 2 + ["placed"]
    assert [sample.layout_seed for sample in plan] == [seeds[0], None] * 2 + [seeds[0]]
    assert len({sample.seed for sample in plan}) == 5


def test_each_draw_has_its_own_order_layouts_and_noise_whatever_the_number_of_real_cases(tiny_cohort):
    table = cases.read_cases(tiny_cohort)
    # Six more references: with two, every other draw would have the order of the table.
    more = [table.iloc[3].to_dict() | {"case_id": f"more{n}", "patient_id": f"more{n}"} for n in range(6)]
    table = pd.concat([table, pd.DataFrame(more)], ignore_index=True)
    config = make_config(arms={"generators": NAMES, "doses": [6.0], "controls": [], "real_cases": [2, "all"]})
    shared = plan_samples(config, "lung_ddpm", table)
    draws = [plan_samples(config, "lung_ddpm", table, None, Cohort(None, f"fold0_seed{k}")) for k in (0, 1)]
    for plan in draws:
        first, again = ([sample.reference["case_id"] for sample in plan[start : start + 8]] for start in (0, 8))
        assert first == again
        assert sorted(first) == sorted(sample.reference["case_id"] for sample in shared[:8])
    orders = [[sample.reference["case_id"] for sample in plan] for plan in (shared, *draws)]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    everything = [*shared, *draws[0], *draws[1]]
    assert len({sample.sample_id for sample in everything}) == len({sample.seed for sample in everything}) == 3 * 18
    layouts = [sample.layout_seed for sample in everything if sample.layout_seed is not None]
    assert len(set(layouts)) == len(layouts) == 3 * 10
    # Common random numbers: the same layouts for all generators, the same samples for all numbers of real cases.
    other = plan_samples(config, "paste_constant", table, None, Cohort(None, "fold0_seed0"))
    assert [s.layout_seed for s in other] == [s.layout_seed for s in draws[0]]
    assert [s.reference["case_id"] for s in other] == orders[1]
    fewer = plan_samples(config, "lung_ddpm", table, None, Cohort(2, "fold0_seed0"))
    assert [(s.sample_id, s.seed, s.layout_seed) for s in fewer] == [
        (s.sample_id, s.seed, s.layout_seed) for s in draws[0][:12]
    ]


@pytest.mark.parametrize("learn_from", ["same", "all"])
def test_nodules_of_a_cohort_are_those_of_its_real_cases(tiny_cohort, weights, tmp_path, learn_from):
    table = cases.read_cases(tiny_cohort)
    arms = {"generators": ["copy_paste", "lung_ddpm"], "doses": [12.0], "controls": [], "real_cases": [1, "all"]}
    config = make_config(arms={**arms, "generators_learn_from": learn_from})
    (allowed,) = training_cases(table, 1, config.seed)["patient_id"]
    for name in arms["generators"]:
        folder = tmp_path / name
        job = SynthesisJob(name, tiny_cohort, folder, folder / "t.tsv", weights=weights, device="cpu", cohort=Cohort(1))
        run_synthesize(config, job)
        samples = cases.read_cases(folder / "t.tsv")["case_id"]
        assert len(samples) == 12
        records = [read_json(folder / sample / "sample.json") for sample in samples]
        moved = {nodule["patient_id"] for record in records for nodule in record["nodules"]}
        donors = moved - {record["reference_patient_id"] for record in records}
        assert donors
        assert (donors == {allowed}) == (learn_from == "same")


def test_a_sample_names_whom_its_weights_were_trained_on(tiny_cohort, tmp_path):
    config = make_config()
    generator, path = config.for_generator("lung_ddpm"), tmp_path / "model.safetensors"
    save_network(
        path, build_denoiser(generator), Metadata.of(generator, 1, "config", "data", ["patient00", "patient05"])
    )
    job = SynthesisJob("lung_ddpm", tiny_cohort, tmp_path, tmp_path / "t.tsv", weights=path, device="cpu")
    run_synthesize(config, job)
    record = read_json(tmp_path / "case03_s000" / "sample.json")
    assert record["trained_on"] == ["patient00", "patient05"]
    # patient05 is tested on: what its generator has learned from is part of a training set.
    register = splits.read_register(cases.read_cases(tiny_cohort))
    assert splits.patients_named_in(record, register) == {"patient00", "patient03", "patient05"}


def test_plan_adds_nodules_for_generators_that_keep_the_own_ones(tiny_cohort):
    table = cases.read_cases(tiny_cohort)
    table.loc[table["case_id"] == "case03", "n_nodules"] = 0
    names = ["copy_paste", "lung_ddpm_plus", "lung_ddpm"]
    settings = {"lung_ddpm": LUNG_DDPM, "lung_ddpm_plus": {"training": {"crop": 16}}}
    config = make_config(arms={"generators": names, "doses": [4 / 3], "controls": []}, generators=settings)
    pasted, plus, drawn = (plan_samples(config, name, table) for name in names)
    assert [origin for _, origin in origins(pasted)] == ["placed", "added", "placed", "added"]
    assert [origin for _, origin in origins(plus)] == ["placed", "reference", "placed", "added"]
    assert (
        [s.layout_seed for s in pasted][2:] == [s.layout_seed for s in plus][2:] == [s.layout_seed for s in drawn][2:]
    )
    calm = config.model_copy(update={"synthesis": Synthesis(place_nodules=False, jitter_repeats=False)})
    pasted, plus, _ = (plan_samples(calm, name, table) for name in names)
    assert {sample_id for sample_id, _ in origins(pasted)} == {f"case04_s00{repeat}" for repeat in range(4)}
    assert {origin for _, origin in origins(pasted)} == {"added"}
    assert {origin for _, origin in origins(plus)} == {"reference"}
    assert len({sample.layout_seed for sample in pasted}) == 1


def test_plan_leaves_out_references_without_nodules_where_none_are_placed(tiny_cohort):
    table = cases.read_cases(tiny_cohort)
    table.loc[table["case_id"] == "case03", "n_nodules"] = 0
    without = make_config(synthesis={"place_nodules": False})
    for config, name in ((without, "lung_ddpm"), (make_config(), "reference")):
        assert {sample.reference["case_id"] for sample in plan_samples(config, name, table)} == {"case04"}
    assert {origin for _, origin in origins(plan_samples(make_config(), "reference", table))} == {"reference"}
    table.loc[table["case_id"] == "case04", "status"] = "excluded"
    for config, name in ((without, "lung_ddpm"), (make_config(), "reference")):
        with pytest.raises(InputError, match="no usable reference case with a nodule"):
            plan_samples(config, name, table)
    table.loc[table["case_id"] == "case03", "status"] = "excluded"
    with pytest.raises(InputError, match="no usable reference case for"):
        plan_samples(make_config(), "lung_ddpm", table)


@pytest.mark.parametrize("name", NAMES)
def test_samples_fulfil_the_case_contract(synthesize, tiny_cohort, tmp_path, name):
    table = synthesize(name)
    assert table["case_id"].tolist() == ["case03_s000", "case04_s000", "case03_s001"]
    assert table["patient_id"].tolist() == ["patient03", "patient04", "patient03"]
    assert set(table["source"]) == {name}
    assert set(table["role"]) == {"synthetic"}
    for _, row in table.iterrows():
        folder = tmp_path / "out" / row["path"]
        ct, layout = cases.CaseFolder(folder).read()
        reference, reference_layout = cases.CaseFolder(tiny_cohort.parent / row["case_id"].split("_")[0]).read()
        assert ct.array.dtype == np.int16
        assert ct.same_grid(reference)
        own = name == "reference" or row["case_id"].endswith("s000")
        assert np.array_equal(layout.array, reference_layout.array) == own
        background = layout.array == Label.BACKGROUND
        assert reference.array[background].max() > 600  # beyond the model's window
        assert np.array_equal(ct.array[background], reference.array[background])
        assert np.array_equal(ct.array, reference.array) == (name == "reference")
        assert row["sha256"] == cases.CaseFolder(folder).hash()
        record = json.loads((folder / "sample.json").read_text())
        assert record["reference_case_id"] == row["case_id"].split("_")[0]
        assert record["generator"] == name
        assert record["memory_mib"] > 0
        assert record["layout_origin"] == ("reference" if own else "jittered")
        assert (record["weights_sha256"] is None) == (name != "lung_ddpm")
        modes = {"sampler": "dpmsolver++", "order": 2, "steps": 3, "resampling": 1, "background": "reference"}
        modes |= dict.fromkeys(["aas", "intensities", "times", "levels"], "corrected")
        assert record["settings"].get("sampling") == (modes if name == "lung_ddpm" else None)


def test_same_reference_and_layout_give_new_lungs_each_time(synthesize, tmp_path):
    synthesize("lung_ddpm", synthesis={"jitter_repeats": False})
    first, second = (cases.CaseFolder(tmp_path / "out" / f"case03_s00{k}").read()[0].array for k in (0, 1))
    assert (first != second).any()


def test_shards_make_the_same_samples_as_one_job(synthesize, tmp_path):
    whole = synthesize("lung_ddpm")
    shards = [synthesize("lung_ddpm", shard, 2, folder="sharded") for shard in (0, 1)]
    interleaved = [shards[index % 2].iloc[index // 2]["case_id"] for index in range(3)]
    assert interleaved == whole["case_id"].tolist()
    for sample in interleaved:
        ct, alone = (cases.CaseFolder(tmp_path / folder / sample).read()[0].array for folder in ("out", "sharded"))
        # Batches differ between the two, which may turn the rounding of a voxel.
        assert np.abs(ct.astype(int) - alone).max() <= 1


def test_complete_samples_are_kept_and_broken_ones_made_again(synthesize, tmp_path, monkeypatch):
    synthesize("lung_ddpm")
    made = []

    def note(_synthesis, batch, _generator):
        made.extend(each.sample.sample_id for each in batch)

    monkeypatch.setattr(running._Synthesis, "_make", note)
    synthesize("lung_ddpm")
    assert made == []
    ct = tmp_path / "out/case04_s000/ct.nii.gz"
    ct.write_bytes(ct.read_bytes()[:-20])
    record = tmp_path / "out/case03_s001/sample.json"
    write_json(record, {**json.loads(record.read_text()), "fingerprint": "of another run"})
    synthesize("lung_ddpm")
    assert made == ["case04_s000", "case03_s001"]
    made.clear()
    synthesize("lung_ddpm", synthesis={"shift_mm": 7})
    assert made == ["case04_s000", "case03_s001"], "only the jittered one, beside the one that is broken still"
    made.clear()
    steps = {"sampler": "dpmsolver++", "steps": 4}
    synthesize("lung_ddpm", generators={"lung_ddpm": {**LUNG_DDPM, "sampling": steps}})
    assert len(made) == 3
    made.clear()
    in_fp32 = {"lung_ddpm": {**LUNG_DDPM, "training": {"precision": "fp32"}}}
    synthesize("lung_ddpm", generators=in_fp32)
    assert len(made) == 3, "with the same weights file"


def test_a_smaller_dose_is_the_first_samples_of_a_larger_one(synthesize, tmp_path, monkeypatch):
    table = synthesize("lung_ddpm")
    monkeypatch.setattr(lung_ddpm, "load", None)  # nothing is left to be made
    smaller = synthesize("lung_ddpm", dose=0.67)
    assert smaller["case_id"].tolist() == table["case_id"].tolist()[:2]


@pytest.mark.parametrize("dose", [0.0, -1.0, float("nan"), float("inf")])
def test_a_dose_without_samples_is_refused(synthesize, tmp_path, dose):
    with pytest.raises(ConfigError, match="--dose"):
        synthesize("reference", dose=dose)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("device", "sizes"), [("cpu", [1, 1, 1]), ("cuda:0", [2, 1])])
def test_a_cpu_takes_samples_one_by_one(synthesize, monkeypatch, device, sizes):
    """What is left of a batch depends on what other jobs make, and a CPU's sums on the batch by a last digit."""
    taken = []

    def make(tasks):
        taken.append(len(tasks))
        return [paste_constant.fill_with_mean_lung(task) for task in tasks]

    monkeypatch.setattr(paste_constant, "load", lambda *_: Generator(make, device, 2))
    synthesize("paste_constant")
    assert taken == sizes


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_network_that_returns_no_numbers_writes_no_sample(synthesize, tmp_path, monkeypatch, value):
    def sample(condition, reference, generators):
        drawn = reference.clone()
        drawn[0, 0, 3, 4, 5] = value
        return drawn

    config = make_config().for_generator("lung_ddpm")
    make = lung_ddpm.whole_volumes(config, sample, torch.device("cpu"), fill=True)
    monkeypatch.setattr(paste_constant, "load", lambda *_: Generator(make))
    with pytest.raises(InputError, match=r"returned NaN or infinite values.*training\.precision"):
        synthesize("paste_constant")
    assert not [*(tmp_path / "out").rglob("sample*")]


@pytest.mark.parametrize(
    ("error", "where"),
    [(torch.OutOfMemoryError("CUDA out of memory."), "the GPU"), (MemoryError(), "this machine")],
)
def test_out_of_memory_in_drawing_is_explained(synthesize, monkeypatch, error, where):
    def make(tasks):
        raise error

    monkeypatch.setattr(paste_constant, "load", lambda *_: Generator(make))
    with pytest.raises(ConfigError, match=rf"paste_constant: {where} ran out of memory.*sampling\.batch_size"):
        synthesize("paste_constant")


def test_two_jobs_share_the_samples_of_their_doses(synthesize, tmp_path, caplog):
    """Another job is at the first sample: the others are made meanwhile, that one is waited for and not made twice."""
    whole = synthesize("paste_constant", folder="whole")
    first = tmp_path / "out/case03_s000"
    made = []

    def make(tasks):
        made.extend(tasks)
        return [paste_constant.fill_with_mean_lung(task) for task in tasks]

    with ExitStack() as other_job, pytest.MonkeyPatch.context() as patch:
        assert other_job.enter_context(lock_if_free(first / ".lock"))

        sleeps = []

        def finish(seconds):
            sleeps.append(seconds)
            if len(sleeps) < 3:
                return
            shutil.copytree(tmp_path / "whole/case03_s000", first, dirs_exist_ok=True)
            other_job.close()

        patch.setattr(paste_constant, "load", lambda *_: Generator(make))
        patch.setattr(running.time, "sleep", finish)
        table = synthesize("paste_constant")
    assert len(made) == 2
    assert table["sha256"].tolist() == whole["sha256"].tolist()
    waited = [record.getMessage() for record in caplog.records if "waiting" in record.getMessage()]
    assert waited == ["Other processes are making case03_s000: waiting for them"]


def test_generator_that_no_arm_uses(synthesize):
    with pytest.raises(ConfigError, match="no arm uses the generator 'reference'"):
        synthesize("reference", arms={"generators": ["lung_ddpm"]})


def test_denoiser_is_asked_for(tiny_cohort, tmp_path):
    for weights, message in ((None, "needs the weights"), (tmp_path / "none.safetensors", "does not exist")):
        with pytest.raises(InputError, match=message):
            job = SynthesisJob("lung_ddpm", tiny_cohort, tmp_path, tmp_path / "samples.tsv", weights=weights)
            run_synthesize(make_config(), job)


@pytest.mark.parametrize("spoiled", ["excluded", "another role", "truncated"])
def test_a_hint_without_a_usable_reference_is_an_error(tiny_cohort, tmp_path, spoiled):
    table = cases.read_cases(tiny_cohort)
    config = make_config(generators={"lung_ddpm": {**LUNG_DDPM, "hint": "slice"}})
    of_hint = tmp_path / "model.safetensors"
    part = config.for_generator("lung_ddpm")
    save_network(of_hint, build_denoiser(part), Metadata.of(part, 1, "config", "data"))
    is_reference = table["role"] == "reference"
    if spoiled == "excluded":
        table.loc[is_reference, "status"] = "excluded"
    elif spoiled == "another role":
        table.loc[is_reference, "role"] = "test"
    shutil.copytree(tiny_cohort.parent, tmp_path / "cases")
    cases.write_cases(tmp_path / "cases" / "cases.tsv", table)
    if spoiled == "truncated":
        ct = tmp_path / "cases" / "case03" / "ct.nii.gz"
        ct.write_bytes(ct.read_bytes()[:-200])
    output = tmp_path / "out"
    job = SynthesisJob(
        "lung_ddpm", tmp_path / "cases" / "cases.tsv", output, output / "samples.tsv", weights=of_hint, device="cpu"
    )
    message = "case03" if spoiled == "truncated" else "no usable reference case for the generator 'lung_ddpm'"
    with pytest.raises(InputError, match=message):
        run_synthesize(config, job)
    assert not (output / "samples.tsv").exists()


def test_constant_is_the_mean_of_lung_voxels():
    layout = np.array([Label.BACKGROUND, Label.LUNG, Label.LUNG, Label.NODULE, Label.VESSEL]).reshape(5, 1, 1)
    hu = np.array([900, -800, -841, 30, -20], np.int16).reshape(5, 1, 1)
    made = paste_constant.fill_with_mean_lung(Task(Volume(hu, np.eye(4)), Volume(layout, np.eye(4)), seed=0))
    assert made.dtype == np.int16
    assert made.ravel().tolist() == [900, -820, -820, -820, -820]


# ---------------------------------------------------------------- made layouts


@pytest.fixture
def partly_bare_cohort(tiny_cohort, write_nodules, tmp_path):
    """The tiny cohort on its own, its first reference without nodules; table and folder may be changed."""
    folder = tmp_path / "cohort"
    shutil.copytree(tiny_cohort.parent, folder)
    bare = folder / "case03"
    layout = read_volume(bare / "layout.nii.gz")
    write_volume(bare / "layout.nii.gz", layout.like(np.where(layout.array == Label.NODULE, 1, layout.array)))
    write_nodules(bare)
    table = cases.read_cases(folder / "cases.tsv")
    table.loc[table["case_id"] == "case03", "n_nodules"] = 0
    table["sha256"] = [cases.CaseFolder(folder / path).hash() for path in table["path"]]
    cases.write_cases(folder / "cases.tsv", table)
    return folder / "cases.tsv"


def run(cohort, folder, name="paste_constant", shard=0, shards=1, **changes):
    table = folder / f"samples-{shard}.tsv"
    doses = {"arms": {"generators": NAMES, "doses": [4 / 3], "controls": []}}
    run_synthesize(make_config(**doses, **changes), SynthesisJob(name, cohort, folder, table, shard, shards))
    return cases.read_cases(table)


def layouts_in(folder):
    return {path.parent.name: read_volume(path).array for path in sorted(folder.glob("*/layout.nii.gz"))}


def test_references_without_nodules_get_some(partly_bare_cohort, tmp_path):
    for number in range(3):
        donor = cases.CaseFolder(partly_bare_cohort.parent / f"case{number:02d}").record
        record = read_json(donor)
        for nodule in record["qc"]["nodules"]:
            nodule |= {"texture": 1.0 + number, "malignancy": None}
        write_json(donor, record)
    table = run(partly_bare_cohort, tmp_path / "out").set_index("case_id")
    assert table.index.tolist() == ["case03_s000", "case04_s000", "case03_s001", "case04_s001"]
    known = {f"case{n:02d}": f"patient{n:02d}" for n in range(3)}
    for name in ("case03_s000", "case03_s001"):
        record = json.loads((tmp_path / "out" / name / "sample.json").read_text())
        assert (record["layout_origin"], record["n_nodules"]) == ("placed", table.loc[name, "n_nodules"])
        assert len(record["nodules"]) == record["n_nodules"] > 0
        for nodule in record["nodules"]:
            assert nodule["patient_id"] == known[nodule["case_id"]], "discovery cases only"
            assert set(nodule) == {
                "case_id", "patient_id", "nodule", "scale", "rotation_degrees", "centre_mm", "position_mm",
                "volume_mm3", "ratings",
            }  # fmt: skip
            assert nodule["ratings"] == {"texture": 1.0 + int(nodule["case_id"].removeprefix("case"))}
    made = layouts_in(tmp_path / "out")
    before = read_volume(partly_bare_cohort.parent / "case03/layout.nii.gz").array
    assert (made["case03_s000"] != made["case03_s001"]).any()
    for name in ("case03_s000", "case03_s001"):
        assert (made[name] == Label.NODULE).any()
        assert (before[made[name] == Label.NODULE] != Label.BACKGROUND).all()
        assert ((made[name] == before) | (made[name] == Label.NODULE)).all()


def test_generators_and_shards_agree_on_layouts(partly_bare_cohort, tmp_path, monkeypatch):
    run(partly_bare_cohort, tmp_path / "one")
    # Any other generator that takes made layouts.
    monkeypatch.setattr(reference, "LAYOUTS", ("reference", "jittered"))
    run(partly_bare_cohort, tmp_path / "other", "reference")
    for shard in (2, 0, 1):
        run(partly_bare_cohort, tmp_path / "sharded", shard=shard, shards=3)
    one, other, sharded = (layouts_in(tmp_path / folder) for folder in ("one", "other", "sharded"))
    assert set(one) == set(other) == set(sharded)
    for name in one:
        assert np.array_equal(one[name], other[name])
        assert np.array_equal(one[name], sharded[name])


def test_the_leak_guard_finds_who_lent_a_nodule(partly_bare_cohort, tmp_path):
    run(partly_bare_cohort, tmp_path / "out")
    register = splits.read_register(cases.read_cases(partly_bare_cohort))
    record = read_json(tmp_path / "out/case03_s000/sample.json")
    lenders = {nodule["patient_id"] for nodule in record["nodules"]}
    assert splits.patients_named_in(record, register) == {"patient03"} | lenders
    origin = splits.Origin("case03_s000", splits.patients_named_in(record, register), frozenset(["hash"]))
    tested = splits.Origin("a test case", frozenset(sorted(lenders)[:1]), frozenset(["other hash"]))
    with pytest.raises(LeakError, match=f"{min(lenders)} in case03_s000"):
        splits.check_leaks([origin], [tested], allow_shared_patients=False)


def test_layouts_are_made_again_when_what_decides_them_changes(partly_bare_cohort, tmp_path, monkeypatch):
    run(partly_bare_cohort, tmp_path / "out")
    made = []

    def note(_synthesis, batch, _generator):
        made.extend(each.sample.sample_id for each in batch)

    monkeypatch.setattr(running._Synthesis, "_make", note)
    run(partly_bare_cohort, tmp_path / "out")
    assert made == []
    run(partly_bare_cohort, tmp_path / "out", synthesis={"scale": [1, 1.2]})
    assert made == ["case03_s000", "case03_s001", "case04_s001"]
    made.clear()
    record = partly_bare_cohort.parent / "case01/case.json"
    write_json(record, {**json.loads(record.read_text()), "fingerprint": "prepared by other code"})
    run(partly_bare_cohort, tmp_path / "out")
    assert made == ["case03_s000", "case03_s001", "case04_s001"]


def test_missing_nodules_and_full_lungs_are_reported(partly_bare_cohort, tmp_path):
    nodules = partly_bare_cohort.parent / "case04/nodules.nii.gz"
    nodules.rename(tmp_path / "kept")
    with pytest.raises(InputError, match=r"case04/nodules.nii.gz: does not exist"):
        run(partly_bare_cohort, tmp_path / "out")
    (tmp_path / "kept").rename(nodules)
    layout = read_volume(partly_bare_cohort.parent / "case03/layout.nii.gz")
    small = np.zeros_like(layout.array)
    small[8, 8, 8] = Label.LUNG
    write_volume(partly_bare_cohort.parent / "case03/layout.nii.gz", layout.like(small))
    with pytest.raises(InputError, match=r"case03/layout.nii.gz: has no room in its lungs"):
        run(partly_bare_cohort, tmp_path / "out")


def test_a_phantom_without_nodules_becomes_a_reference(tmp_path):
    """From DICOM to the sample, with nothing in between made by hand."""
    phantom = {
        "patients": 3,
        "matrix": 96,
        "pixel_mm": 3.6,
        "slice_mm": 6.0,
        "nodules": [0, 1],
        "nodule_diameter_mm": [16, 24],
    }
    config = make_config(
        seed=5, source={"phantom": phantom}, grid={"size": [32, 32, 32], "extent": "lungs"},
        arms={"generators": ["paste_constant"], "doses": [1.0], "controls": []},
    )  # fmt: skip
    write_cohort(config.source.phantom, config.seed, tmp_path / "source")
    write_index(tmp_path / "index.tsv", index_source("phantom", tmp_path / "source"))
    folder = tmp_path / "cases"
    run_prepare(config, tmp_path / "index.tsv", tmp_path / "source", folder, 0, 1, folder / "cases-0.tsv")
    table = cases.read_cases(folder / "cases-0.tsv")
    assert set(table["status"]) == {"ok"}
    assert table["n_nodules"].tolist() == [1, 0, 1]
    table["role"] = ["discovery", "reference", "test"]
    cases.write_cases(folder / "cases-0.tsv", table)
    run_collect(config, [folder / "cases-0.tsv"], folder / "cases.tsv")
    out = tmp_path / "out"
    run_synthesize(config, SynthesisJob("paste_constant", folder / "cases.tsv", out, out / "s.tsv"))
    samples = cases.read_cases(out / "s.tsv")
    assert samples[["case_id", "n_nodules"]].to_numpy().tolist() == [["PHANTOM-0002_s000", 1]]
    ct, layout = cases.CaseFolder(out / "PHANTOM-0002_s000").read()
    assert (layout.array == Label.NODULE).sum() >= 2
    assert len(np.unique(ct.array[layout.array != Label.BACKGROUND])) == 1
    with pytest.raises(InputError, match=r"roles.reference.*no usable case with a nodule"):
        run_collect(
            config.model_copy(update={"synthesis": Synthesis(place_nodules=False)}),
            [folder / "cases-0.tsv"],
            folder / "other.tsv",
        )
