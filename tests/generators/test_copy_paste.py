"""Pasted nodules, compared with phantoms of known HU: a ball in noise-free or noisy lungs."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from lungddpm.config.loading import parse_config
from lungddpm.config.models import Synthesis
from lungddpm.core import cases
from lungddpm.core.labels import Label
from lungddpm.core.volume import Volume, read_volume, write_volume
from lungddpm.generators import Task, copy_paste
from lungddpm.layouts.placement import open_library, place
from lungddpm.synthesis.run import SynthesisJob, run_synthesize

SIZE = (40, 36, 32)
AFFINE = np.diag([3.0, 3.0, 4.0, 1.0])
DONOR_LUNG, LUNG, NODULE, WALL = -700, -880, 60, 40


def ball(centre_mm, radius_mm):
    at_mm = (np.moveaxis(np.indices(SIZE), 0, -1)) * np.diag(AFFINE)[:3]
    return np.linalg.norm(at_mm - centre_mm, axis=-1) < radius_mm


def write_case(folder, lung_hu, nodule_hu, centre_mm, radius_mm, noise_hu, seed, vessel=False):
    """A box of lung in soft tissue, with one nodule; its border is blurred as a scanner's is."""
    layout = np.zeros(SIZE, np.uint8)
    layout[4:-4, 4:-4, 3:-3] = Label.LUNG
    nodule = ball(centre_mm, radius_mm)
    if vessel:
        shell = ball(centre_mm, radius_mm + 9) & ~ball(centre_mm, radius_mm + 5)
        layout[shell & (np.indices(SIZE)[0] * AFFINE[0, 0] > centre_mm[0])] = Label.VESSEL
    layout[nodule] = Label.NODULE
    hu = np.choose(layout, [WALL, lung_hu, nodule_hu, 100]).astype(float)
    hu = ndimage.gaussian_filter(hu, 0.6) + np.random.default_rng(seed).normal(0, noise_hu, SIZE)
    write_volume(folder / "ct.nii.gz", Volume(np.rint(hu).astype(np.int16), AFFINE))
    write_volume(folder / "layout.nii.gz", Volume(layout, AFFINE))


@pytest.fixture
def scene(tmp_path, write_nodules):
    """A function that makes a donor, a reference and the task of pasting; `scale` fixes the factor on diameters."""

    def make(scale=1.0, noise_hu=0, radius_mm=10, nodule_hu=NODULE, seed=0, vessel=False):
        write_case(tmp_path / "donor", DONOR_LUNG, nodule_hu, (60, 50, 64), radius_mm, noise_hu, 1, vessel)
        write_case(tmp_path / "reference", LUNG, 0, (30, 70, 40), 9, noise_hu, 2)
        rows = []
        for name, role in (("donor", "discovery"), ("reference", "reference")):
            write_nodules(tmp_path / name)
            row = dict.fromkeys(cases.COLUMNS, "") | {"case_id": name, "patient_id": name, "role": role, "path": name}
            numbers = [c for c in cases.COLUMNS if c.startswith(("size", "spacing"))]
            rows.append(row | dict.fromkeys(numbers, 1) | {"n_nodules": 1, "status": "ok"})
        cases.write_cases(tmp_path / "cases.tsv", rows)
        library = open_library(tmp_path / "cases.tsv", cases.read_cases(tmp_path / "cases.tsv"), False)
        ct, own = cases.CaseFolder(tmp_path / "reference").read()
        made = place(own, library, Synthesis(scale=(scale, scale)), np.random.default_rng(seed))
        return Task(ct, made.layout, 0, made, library.folders), own

    return make


def paste(task):
    (made,) = copy_paste.load(parse_config({}).for_generator("copy_paste"), None, "cpu").make([task])
    assert made.dtype == np.int16
    return made


def mean_in_nodule(folder):
    ct, layout = cases.CaseFolder(folder).read()
    return ct.array[layout.array == Label.NODULE].mean()


@pytest.mark.parametrize("scale", [0.75, 1.0, 1.33])
@pytest.mark.parametrize("radius_mm", [6, 14])
def test_a_pasted_nodule_keeps_its_mean(scene, tmp_path, scale, radius_mm):
    task, _ = scene(scale, radius_mm=radius_mm)
    pasted = task.made.numbers == 1
    assert pasted.sum() * 36 == pytest.approx(4 / 3 * np.pi * (radius_mm * scale) ** 3, rel=0.3)
    assert paste(task)[pasted].mean() == pytest.approx(mean_in_nodule(tmp_path / "donor"), abs=1)


def test_all_else_stays_as_it_is(scene):
    task, own = scene(noise_hu=20)
    made, reference = paste(task), task.reference.array
    changed = made != reference
    assert not changed[own.array == Label.BACKGROUND].any()
    assert not changed[own.array == Label.NODULE].any()
    assert not changed[away_from(task.made.numbers > 0, copy_paste.FEATHER_VOXELS - 0.01)].any()
    assert changed[task.made.numbers > 0].mean() > 0.95


@pytest.mark.parametrize("vessel", [False, True])
def test_the_lung_around_a_nodule_is_the_references(scene, vessel):
    """The donor's lung is 180 HU denser, and vessels embrace its nodule: neither comes along."""
    task, _ = scene(radius_mm=12, vessel=vessel, seed=3)
    made, pasted = paste(task), task.made.numbers == 1
    lung = (task.layout.array == Label.LUNG) & away_from(task.layout.array == Label.BACKGROUND, 2)
    ring = lung & away_from(pasted, 1.5) & ~away_from(pasted, copy_paste.FEATHER_VOXELS)
    assert ring.sum() > 100
    assert abs(np.median(made[ring]) - LUNG) < 10
    assert made[ring].max() < LUNG + 150


def away_from(mask, voxels=1):
    """Voxels farther from a mask than that."""
    return ndimage.distance_transform_edt(~mask) > voxels


def steps_across(hu, inside, among):
    """Mean absolute difference of neighbours of which one is inside, both of them among certain voxels."""
    steps = []
    for axis in range(3):
        border = (np.diff(inside.astype(int), axis=axis) != 0) & ~np.diff(among, axis=axis)
        border &= np.take(among, range(1, among.shape[axis]), axis=axis)
        steps.append(np.abs(np.diff(hu.astype(float), axis=axis))[border])
    return np.concatenate(steps).mean()


def test_no_border_shows_where_blending_ends(scene):
    task, own = scene(noise_hu=20, radius_mm=12)
    made, pasted = paste(task), task.made.numbers > 0
    inner = away_from(own.array != Label.LUNG, 2)
    steps = [np.abs(np.diff(task.reference.array.astype(float), axis=0))[inner[1:] & inner[:-1]].mean()]
    steps += [steps_across(made, ~away_from(pasted, edge), inner) for edge in (2.1, 2.5, 2.9, 3.3)]
    assert max(steps) < 1.25 * steps[0]
    # Around the nodule itself there is the step that its donor has, as much higher as its new lung is darker.
    donor, layout = task.donors["donor"].read()
    of_donor = steps_across(donor.array, layout.array == Label.NODULE, np.ones(SIZE, bool))
    expected = of_donor * (NODULE - LUNG) / (NODULE - DONOR_LUNG)
    assert steps_across(made, pasted, inner) == pytest.approx(expected, rel=0.25)


def test_faint_nodules_stay_faint(scene, tmp_path):
    """Ground glass of 100 HU over its lung: the map to a darker lung must not blow it up without a limit."""
    task, _ = scene(nodule_hu=DONOR_LUNG + 100, radius_mm=12)
    made, pasted = paste(task), task.made.numbers == 1
    assert made[pasted].mean() == pytest.approx(mean_in_nodule(tmp_path / "donor"), abs=1)
    assert made[pasted].max() < DONOR_LUNG + 200


def test_a_nodule_turns_as_its_layout_does(scene, tmp_path, write_nodules):
    """A bar along x, brighter at one end; wherever it is turned, HU and labels agree."""
    task, own = scene()
    folder = tmp_path / "donor"
    layout = np.full(SIZE, Label.LUNG, np.uint8)
    layout[10:26, 16:20, 15:18] = Label.NODULE
    hu = np.where(layout == Label.NODULE, 0, DONOR_LUNG) + 400 * (np.indices(SIZE)[0] > 20) * (layout == Label.NODULE)
    write_volume(folder / "ct.nii.gz", Volume(hu.astype(np.int16), AFFINE))
    write_volume(folder / "layout.nii.gz", Volume(layout, AFFINE))
    write_nodules(folder)
    library = open_library(tmp_path / "cases.tsv", cases.read_cases(tmp_path / "cases.tsv"), False)
    for seed in range(3):
        made = place(own, library, Synthesis(scale=(1, 1)), np.random.default_rng(seed))
        task = replace(task, layout=made.layout, made=made)
        hu, pasted = paste(task), made.numbers == 1
        lung = (made.layout.array == Label.LUNG) & away_from(made.layout.array == Label.BACKGROUND, 2)
        assert np.median(hu[pasted]) > -300
        assert np.median(hu[lung & ~away_from(pasted)]) < -500
        at_mm = np.argwhere(pasted) * np.diag(AFFINE)[:3]
        _, _, axes = np.linalg.svd(at_mm - at_mm.mean(axis=0))
        assert abs(np.corrcoef(at_mm @ axes[0], hu[pasted])[0, 1]) > 0.5


def test_samples_record_whose_nodules_they_show(tiny_cohort, tmp_path):
    config = parse_config({"arms": {"generators": ["copy_paste"]}, "grid": {"size": [16, 16, 16]}})
    out = tmp_path / "out"
    run_synthesize(config, SynthesisJob("copy_paste", tiny_cohort, out, out / "samples.tsv"))
    table = cases.read_cases(out / "samples.tsv")
    assert len(table) == 3
    for _, row in table.iterrows():
        record = json.loads((out / row["path"] / "sample.json").read_text())
        own = read_volume(tiny_cohort.parent / record["reference_case_id"] / "layout.nii.gz").array
        layout = read_volume(out / row["path"] / "layout.nii.gz").array
        assert record["layout_origin"] == "added"
        assert record["n_nodules"] == row["n_nodules"] == 1 + len(record["nodules"]) >= 2
        assert {nodule["patient_id"] for nodule in record["nodules"]} <= {f"patient0{n}" for n in range(3)}
        assert (layout[own == Label.NODULE] == Label.NODULE).all()
        _, count = ndimage.label(layout == Label.NODULE, np.ones((3, 3, 3)))
        assert count == row["n_nodules"]
