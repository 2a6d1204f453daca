"""The adapters to published networks, against fake packages with the real ones' interface."""

import inspect
import sys
from types import ModuleType

import nibabel
import numpy as np
import pytest
import requests
import torch

from lungddpm.config.models import Layouts
from lungddpm.core.errors import ExcludedCaseError, UserError
from lungddpm.core.labels import LEFT, RIGHT
from lungddpm.layouts import networks
from lungddpm.layouts.lungs import segment_lungs

# Numbers of lungs and trachea in TotalSegmentator 2, task "total".
CLASSES = {
    10: "lung_upper_lobe_left", 11: "lung_lower_lobe_left", 12: "lung_upper_lobe_right", 13: "lung_middle_lobe_right",
    14: "lung_lower_lobe_right", 16: "trachea", 51: "heart",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_model_is_kept():
    networks._lungmask_model.cache_clear()
    yield
    networks._lungmask_model.cache_clear()


@pytest.fixture
def lungs_lr(patient):
    """The truth as the adapters should give it: the midline is where the lungs' middle is."""
    x = np.indices(patient.lungs.shape)[0]
    return np.where(patient.lungs, np.where(x > x[patient.lungs].mean(), RIGHT, LEFT), 0).astype(np.uint8)


@pytest.fixture
def install(monkeypatch):
    """A function that puts a module of that name with these attributes instead of an installed one."""

    def put(name, **attributes):
        module = ModuleType(name)
        for attribute, value in attributes.items():
            setattr(module, attribute, value)
        monkeypatch.setitem(sys.modules, name, module)

    return put


def lungmask_that(give):
    class LMInferer:
        def __init__(self, modelname="R231", modelpath=None, fillmodel=None, fillmodel_path=None, force_cpu=False,
                     batch_size=20, volume_postprocessing=True, tqdm_disable=False):  # fmt: skip
            assert modelname == "R231"
            self.device = torch.device("cpu")

        def apply(self, image):
            return give(image)

    return LMInferer


def totalsegmentator_that(give):
    def totalsegmentator(input, output=None, ml=False, fast=False, task="total", roi_subset=None, quiet=False,
                         verbose=False, skip_saving=False, device="gpu"):  # fmt: skip
        assert isinstance(input, nibabel.Nifti1Image)
        assert (output, ml, task) == (None, True, "total")
        assert set(roi_subset) == {name for name in CLASSES.values() if name.startswith("lung")}
        return nibabel.Nifti1Image(give(input), input.affine)

    return totalsegmentator


def install_totalsegmentator(install, give):
    install("totalsegmentator")
    install("totalsegmentator.map_to_binary", class_map={"total": CLASSES})
    install("totalsegmentator.python_api", totalsegmentator=totalsegmentator_that(give))


def test_lungmask_gets_lps_slices_and_gives_sides(patient, lungs_lr, install):
    def segment(image):
        """Slice 0 is the lowest, row 0 the front, column 0 the patient's right."""
        np.testing.assert_array_equal(image, patient.ct.array[::-1, ::-1].T)
        middle = lungs_lr[::-1, ::-1].T
        columns = np.arange(image.shape[2])
        assert columns[(middle == RIGHT).any(axis=(0, 1))].mean() < columns[(middle == LEFT).any(axis=(0, 1))].mean()
        return np.where(middle == RIGHT, 1, np.where(middle == LEFT, 2, 0)).astype(np.uint8)

    install("lungmask", LMInferer=lungmask_that(segment))
    found = segment_lungs(patient.ct, Layouts(lungs="lungmask"))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, lungs_lr)


def test_totalsegmentator_gets_the_scan_and_its_lobes_become_sides(patient, lungs_lr, install):
    def segment(image):
        np.testing.assert_array_equal(np.asarray(image.dataobj), patient.ct.array)
        np.testing.assert_array_equal(image.affine, patient.ct.affine)
        height = np.indices(image.shape)[2] / image.shape[2]
        right = np.select([height > 0.6, height > 0.4], [12, 13], 14)
        left = np.where(height > 0.5, 10, 11)
        labels = np.where(lungs_lr == RIGHT, right, np.where(lungs_lr == LEFT, left, 0))
        labels[(lungs_lr == 0) & (height > 0.9)] = 16
        return labels.astype(np.uint8)

    install_totalsegmentator(install, segment)
    found = segment_lungs(patient.ct, Layouts(lungs="totalsegmentator"))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, lungs_lr)


@pytest.mark.parametrize(("keep", "reason"), [([], "no lungs were found"), ([RIGHT], "only one lung was found")])
def test_what_a_network_does_not_find_excludes_the_case(patient, lungs_lr, install, keep, reason):
    install("lungmask", LMInferer=lungmask_that(lambda image: (lungs_lr * np.isin(lungs_lr, keep))[::-1, ::-1].T))
    with pytest.raises(ExcludedCaseError, match=reason):
        segment_lungs(patient.ct, Layouts(lungs="lungmask"))


@pytest.mark.parametrize("name", ["lungmask", "totalsegmentator"])
def test_a_missing_package_is_reported_with_its_extra(patient, monkeypatch, name):
    # None in sys.modules makes the import fail, whether the package is there or not.
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"pip install 'lungddpm\[" + name) as caught:
        segment_lungs(patient.ct, Layouts(lungs=name))
    assert not isinstance(caught.value, ExcludedCaseError)


@pytest.mark.parametrize(
    "error", [OSError("<urlopen error no network>"), RuntimeError('invalid hash value (expected "d5d')]
)
def test_lungmask_without_weights_is_reported(patient, install, error):
    class LMInferer:
        def __init__(self, **options):
            raise error

    install("lungmask", LMInferer=LMInferer)
    with pytest.raises(UserError, match=r"weights are not available .*LMInferer\(\)"):
        segment_lungs(patient.ct, Layouts(lungs="lungmask"))


def test_totalsegmentator_without_weights_is_reported(patient, install):
    def fail(image):
        raise requests.ConnectionError("Max retries exceeded")

    install_totalsegmentator(install, fail)
    with pytest.raises(UserError, match=r"weights are not available \(Max retries.*totalseg_download_weights -t total"):
        segment_lungs(patient.ct, Layouts(lungs="totalsegmentator"))


def test_the_real_lungmask_has_this_interface():
    lungmask = pytest.importorskip("lungmask")
    options = inspect.signature(lungmask.LMInferer).parameters
    assert {"modelname", "tqdm_disable"} <= set(options)
    assert list(inspect.signature(lungmask.LMInferer.apply).parameters) == ["self", "image"]


def test_the_real_totalsegmentator_has_this_interface():
    api = pytest.importorskip("totalsegmentator.python_api")
    options = inspect.signature(api.totalsegmentator).parameters
    assert {"input", "output", "ml", "task", "roi_subset", "quiet", "device"} <= set(options)
    names = pytest.importorskip("totalsegmentator.map_to_binary").class_map["total"]
    assert set(networks._LOBES) <= set(names.values())
