"""The Python interface, against the phantom's truth, known constants and other libraries."""

import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

import lungddpm
from lungddpm.config.loading import parse_config
from lungddpm.core.errors import ConfigError, ExcludedCaseError, InputError
from lungddpm.core.labels import Label
from lungddpm.core.volume import Volume, write_volume
from lungddpm.sources.phantom.patient import thorax
from lungddpm.sources.phantom.settings import Phantom

CONFIG = parse_config({"grid": {"size": [48, 48, 48], "extent": "lungs"}})


@pytest.fixture(scope="module")
def chest():
    return thorax(Phantom(nodules=(2, 2), nodule_diameter_mm=(22, 28)), seed=4)


@pytest.fixture(scope="module")
def nodules(chest):
    return np.any([nodule.mask for nodule in chest.nodules], axis=0)


@pytest.fixture(scope="module")
def case(chest, nodules):
    return lungddpm.make_layout(chest.ct, nodules, CONFIG)


def test_a_layout_has_the_volumes_of_the_truth(chest, nodules, case):
    ct, layout = case
    assert ct.shape == layout.shape == (48, 48, 48)
    assert ct.same_grid(layout)
    litres = np.count_nonzero(layout.array != Label.BACKGROUND) * layout.voxel_mm3
    assert litres == pytest.approx(np.count_nonzero(chest.lungs) * chest.ct.voxel_mm3, rel=0.05)
    found = np.count_nonzero(layout.array == Label.NODULE) * layout.voxel_mm3
    assert found == pytest.approx(np.count_nonzero(nodules) * chest.ct.voxel_mm3, rel=0.05)


def test_a_chest_without_nodules_has_none(chest):
    _, layout = lungddpm.make_layout(chest.ct, config=CONFIG)
    assert not (layout.array == Label.NODULE).any()
    assert (layout.array == Label.VESSEL).any()


def test_a_mask_of_another_shape_is_refused(chest, nodules):
    with pytest.raises(InputError, match="shape"):
        lungddpm.make_layout(chest.ct, nodules[1:])


def test_what_is_not_in_hounsfield_units_is_refused(chest, nodules):
    with pytest.raises(ExcludedCaseError):
        lungddpm.make_layout(chest.ct.like(chest.ct.array // 8), nodules, CONFIG)


def test_generators_without_weights_draw_what_they_declare(case):
    ct, layout = case
    np.testing.assert_array_equal(lungddpm.synthesize(ct, layout, "reference", config=CONFIG).array, ct.array)
    grey = lungddpm.synthesize(ct, layout, "paste_constant", config=CONFIG).array
    inside = layout.array != Label.BACKGROUND
    np.testing.assert_array_equal(grey[~inside], ct.array[~inside])
    assert set(np.unique(grey[inside])) == {round(ct.array[layout.array == Label.LUNG].mean())}


def test_a_trained_generator_draws_by_its_seed(case, tmp_path):
    from lungddpm.models.checkpoint import Metadata, save_network
    from lungddpm.models.denoiser import build_denoiser

    small = {"base_channels": 8, "multipliers": [1, 2], "norm_groups": 4, "attention": False}
    settings = {"denoiser": small, "sampling": {"sampler": "dpmsolver++", "steps": 2}}
    config = parse_config({"grid": CONFIG.grid.model_dump(), "generators": {"lung_ddpm": settings}})
    own = config.for_generator("lung_ddpm")
    weights = tmp_path / "model.safetensors"
    save_network(weights, build_denoiser(own), Metadata.of(own, 1, "config", "data"))

    ct, layout = case
    first, again, other = (
        lungddpm.synthesize(ct, layout, "lung_ddpm", weights, seed, config, "cpu").array for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    inside = layout.array != Label.BACKGROUND
    assert (first != other)[inside].mean() > 0.5
    np.testing.assert_array_equal(first[~inside], ct.array[~inside])
    with pytest.raises(InputError, match="needs weights"):
        lungddpm.synthesize(ct, layout, "lung_ddpm", config=config)


def test_generators_that_cannot_draw_from_one_case_are_refused(case):
    with pytest.raises(ConfigError, match="other cases"):
        lungddpm.synthesize(*case, "copy_paste", config=CONFIG)
    with pytest.raises(ConfigError, match="there is no generator"):
        lungddpm.synthesize(*case, "gan", config=CONFIG)


def test_a_case_is_read_as_it_was_written(case, tmp_path):
    ct, layout = case
    write_volume(tmp_path / "ct.nii.gz", ct)
    write_volume(tmp_path / "layout.nii.gz", layout)
    read = lungddpm.read_case(str(tmp_path))
    for ours, theirs in zip(read, case, strict=True):
        np.testing.assert_array_equal(ours.array, theirs.array)
        np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-4)


def test_measures_of_two_cubes():
    first, second = np.zeros((2, 20, 20, 20), bool)
    first[5:15, 5:15, 5:15] = second[10:20, 5:15, 5:15] = True
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    found = lungddpm.measure(Volume(first, affine), Volume(second, affine))
    assert found["dice"] == found["sensitivity"] == pytest.approx(0.5)
    assert found["volume_error_mm3"] == pytest.approx(0)
    with pytest.raises(InputError, match="grid"):
        lungddpm.measure(Volume(first, affine), Volume(second, np.eye(4)))


def scores(gain, noise=0.02):
    """Two arms, three folds, twenty cases; the second arm is better by `gain` on average."""
    random = np.random.default_rng(3)
    hard = random.normal(0, 0.1, 20)
    return pd.DataFrame(
        {"arm": arm, "fold": fold, "seed": 0, "case_id": f"case{number}", "dice": 0.6 + hard[number] + shift + error}
        for arm, shift in (("real+mine", gain), ("real", 0.0))
        for fold in range(3)
        for number, error in enumerate(random.normal(0, noise, 20))
    )


def test_arms_are_compared_case_by_case():
    table = scores(0.1)
    found = lungddpm.compare(table).set_index("arm")
    assert list(found.index) == ["real", "real+mine"]
    means = table.groupby("arm")["dice"].mean()
    assert found.loc["real+mine", "difference"] == pytest.approx(means["real+mine"] - means["real"])
    assert found.loc["real+mine", "verdict"] == "better"
    assert lungddpm.compare(scores(0.0)).loc[1, "verdict"] == "no difference shown"
    assert lungddpm.compare(table, baseline="real+mine").loc[1, "verdict"] == "worse"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.drop(columns="seed"), "seed"),
        (lambda table: table[table["arm"] != "real"], "no arm 'real'"),
        (lambda table: table.drop(index=3), "same cases"),
    ],
)
def test_scores_that_do_not_fit_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        lungddpm.compare(change(scores(0.1)))


def test_the_package_is_imported_without_its_libraries():
    code = "import sys, lungddpm; assert not {'numpy', 'torch', 'pandas'} & set(sys.modules); print(lungddpm.compare)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_documented_example_runs(repository, chest, nodules, tmp_path):
    write_volume(tmp_path / "chest.nii.gz", chest.ct)
    write_volume(tmp_path / "nodules.nii.gz", chest.ct.like(nodules.astype(np.uint8)))
    page = (repository / "docs/reference/python-api.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "better" in run.stdout
