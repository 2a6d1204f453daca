"""Lungs against the phantom's truth and real scans."""

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from lungddpm.config import Layouts
from lungddpm.errors import ExcludedCaseError
from lungddpm.layouts.lungs import LEFT, RIGHT, segment_lungs, split_lungs
from lungddpm.sources.lidc import find_series, load_scan
from lungddpm.volume import AIR_HU, Volume, bounding_box, read_volume


def dice(a, b):
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


@pytest.fixture(scope="module")
def sides(patient):
    return segment_lungs(patient.ct)


def test_lungs_match_the_truth(patient, sides):
    assert sides.dtype == np.uint8
    assert dice(sides > 0, patient.lungs) > 0.985


def test_nodules_on_the_pleura_are_inside(patient, sides):
    assert [sides[nodule].astype(bool).mean() > 0.9 for nodule in patient.nodules] == [True] * 3


def test_right_is_right(patient, sides):
    x = np.indices(patient.lungs.shape)[0]
    middle = x[patient.lungs].mean()
    assert (x[sides == RIGHT] > middle).mean() > 0.99
    assert (x[sides == LEFT] < middle).mean() > 0.99
    assert np.count_nonzero(sides == LEFT) < np.count_nonzero(sides == RIGHT)


def test_the_trachea_is_outside(patient, sides):
    top = bounding_box(patient.lungs)[2].stop - 4
    gas = (patient.ct.array[:, :, top - 20 : top] < -950) & ~patient.lungs[:, :, top - 20 : top]
    body = ndimage.binary_fill_holes((patient.ct.array[:, :, top - 20 : top] > -300).any(axis=2))
    assert np.count_nonzero(gas & body[..., None]) > 500
    assert (sides[:, :, top - 20 : top] > 0)[gas & body[..., None]].mean() < 0.02


@pytest.mark.parametrize("noise_hu", [100.0])
def test_a_sharp_kernel_does_no_harm(patient, noise_hu):
    noise = np.random.default_rng(0).normal(0, noise_hu, patient.ct.shape)
    noisy = segment_lungs(patient.ct.like(np.maximum(patient.ct.array + noise, AIR_HU).astype(np.int16)))
    assert dice(noisy > 0, patient.lungs) > 0.975


def test_finer_pixels_give_the_same_lungs(patient):
    """Pixels below 1.4 mm go through the coarser working grid and back."""
    finer = Volume(patient.ct.array.repeat(2, axis=0), patient.ct.affine @ np.diag([0.5, 1, 1, 1]))
    assert dice(segment_lungs(finer) > 0, patient.lungs.repeat(2, axis=0)) > 0.98


def test_thick_slices_do(patient):
    thick = Volume(patient.ct.array[:, :, ::2], patient.ct.affine @ np.diag([1, 1, 2, 1]))
    assert dice(segment_lungs(thick) > 0, patient.lungs[:, :, ::2]) > 0.975


def cut(patient, x=slice(None), y=slice(None), z=slice(None)):
    return patient.ct.like(patient.ct.array[x, y, z])


def without_left_lung(patient):
    array = patient.ct.array.copy()
    x = np.indices(array.shape)[0]
    array[patient.lungs & (x < x[patient.lungs].mean())] = 40
    return patient.ct.like(array)


def with_foam_table(patient):
    array = patient.ct.array.copy()
    array[:, :6] = -930
    array[:, 6] = 200
    return patient.ct.like(array)


def unusable(patient):
    side_x, _, height = bounding_box(patient.lungs)
    middle_z = (height.start + height.stop) // 2
    shape = patient.ct.shape
    return {
        "cut off at the top": cut(patient, z=slice(0, middle_z)),
        "cut off at the bottom": cut(patient, z=slice(middle_z, None)),
        "cut off at the side": cut(patient, x=slice(side_x.start + 10, None)),
        "only one lung": without_left_lung(patient),
        "no lungs were found": cut(patient, z=slice(0, height.start)),
        "no lungs": Volume(np.full(shape, 40, np.int16), patient.ct.affine),
        "no lungs were": Volume(np.full(shape, -1000, np.int16), patient.ct.affine),
    }


REASONS = [
    "cut off at the top", "cut off at the bottom", "cut off at the side", "only one lung",
    "no lungs were found", "no lungs", "no lungs were",
]  # fmt: skip


@pytest.mark.parametrize("reason", REASONS)
def test_unusable_scans_are_told_with_the_true_reason(patient, reason):
    with pytest.raises(ExcludedCaseError, match=reason):
        segment_lungs(unusable(patient)[reason])


def test_too_little_lung_is_told(patient):
    with pytest.raises(ExcludedCaseError, match=r"hold \d\.\d\d litres, less than the 9 required"):
        segment_lungs(patient.ct, Layouts(limits={"lung_litres": (9, 12)}))


def test_a_table_filled_with_foam_is_no_lung(patient):
    assert dice(segment_lungs(with_foam_table(patient)) > 0, patient.lungs) > 0.98


def test_lungs_that_touch_are_told_apart():
    x, y, z = np.ogrid[:90, :60, :70]
    right = ((x - 62) / 19) ** 2 + ((y - 30) / 25) ** 2 + ((z - 35) / 30) ** 2 < 1
    left = ((x - 27) / 19) ** 2 + ((y - 30) / 25) ** 2 + ((z - 35) / 30) ** 2 < 1
    sides = split_lungs(Volume(right | left, np.diag([2.0, 2.0, 3.0, 1.0])))
    assert ((sides > 0) == (right | left)).all()
    assert (sides == RIGHT)[right & ~left].mean() > 0.995
    assert (sides == LEFT)[left & ~right].mean() > 0.995


def test_a_real_scan(shared_data):
    """LIDC-IDRI-0001 has bowel gas, a table, thick slices and a solid nodule on the pleura; takes about 10 s."""
    (series,) = [s for s in find_series(shared_data / "lidc") if "LIDC-IDRI-0001" in s.path]
    row = {"path": series.path, "series_uid": series.series_uid, "annotations": "[]"}
    ct = load_scan(shared_data / "lidc", row).ct.canonical()
    sides = segment_lungs(ct)
    litres = [np.count_nonzero(sides == side) * ct.voxel_mm3 / 1e6 for side in (RIGHT, LEFT)]
    assert litres == pytest.approx([1.97, 1.76], abs=0.1)
    nodule = read_volume(shared_data / "lidc-oracle" / "LIDC-IDRI-0001_consensus050.nii.gz").array > 0
    assert (sides > 0)[nodule].mean() > 0.96


def test_the_published_sample(shared_data):
    """Case 0, within the agreement of two automatic methods; its 8 bit become HU by air (3) and muscle (150)."""
    folder = shared_data / "published-samples"
    image, layout = (
        np.asarray(nibabel.load(folder / f"case0_{name}.nii.gz").dataobj).transpose(2, 1, 0)[::-1, ::-1]
        for name in ("reference", "layout")
    )
    hu = (image - 3.0) / 147 * 1040 - 1000
    assert dice(segment_lungs(Volume(hu, np.diag([2.7, 2.7, 2.5, 1.0]))) > 0, layout > 0) > 0.96
