"""Lungs against the phantom's truth and real scans."""

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from lungddpm.config.models import Layouts
from lungddpm.core.errors import ExcludedCaseError
from lungddpm.core.labels import LEFT, RIGHT
from lungddpm.core.volume import AIR_HU, Volume, bounding_box, read_volume
from lungddpm.layouts.lungs import _amid, _close, check_lungs, segment_lungs, split_lungs
from lungddpm.sources.lidc import load_scan


def dice(a, b):
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


@pytest.fixture(scope="module")
def lungs_lr(patient):
    return segment_lungs(patient.ct)


def test_lungs_match_the_truth(patient, lungs_lr):
    assert lungs_lr.dtype == np.uint8
    assert dice(lungs_lr > 0, patient.lungs) > 0.985


def test_nodules_on_the_pleura_are_inside(patient, lungs_lr):
    assert [lungs_lr[nodule].astype(bool).mean() > 0.9 for nodule in patient.nodules] == [True] * 3


@pytest.mark.parametrize("spacing", [(1, 1, 1), (1.4, 1.4, 2.5), (0.7, 0.9, 5)])
@pytest.mark.parametrize("radius_mm", [2.0, 5.0])
def test_voxels_amid_a_mask_are_those_far_from_its_outside(spacing, radius_mm):
    """The same voxels as those of a distance transform, whose array extends beyond the mask."""
    rng = np.random.default_rng(3)
    mask = rng.random((24, 22, 20)) > 5e-4
    distance_mm = ndimage.distance_transform_edt(np.pad(mask, 1), spacing)[1:-1, 1:-1, 1:-1]
    asked = np.flatnonzero(mask & (rng.random(mask.shape) > 0.3))
    found = _amid(mask, asked, radius_mm, np.array(spacing, float))
    assert 0 < len(found) < len(asked)
    assert found.tolist() == [place for place in asked if distance_mm.flat[place] > radius_mm]


def test_right_is_right(patient, lungs_lr):
    x = np.indices(patient.lungs.shape)[0]
    middle = x[patient.lungs].mean()
    assert (x[lungs_lr == RIGHT] > middle).mean() > 0.99
    assert (x[lungs_lr == LEFT] < middle).mean() > 0.99
    assert np.count_nonzero(lungs_lr == LEFT) < np.count_nonzero(lungs_lr == RIGHT)


def test_the_trachea_is_outside(patient, lungs_lr):
    top = bounding_box(patient.lungs)[2].stop - 4
    gas = (patient.ct.array[:, :, top - 20 : top] < -950) & ~patient.lungs[:, :, top - 20 : top]
    body = ndimage.binary_fill_holes((patient.ct.array[:, :, top - 20 : top] > -300).any(axis=2))
    assert np.count_nonzero(gas & body[..., None]) > 500
    assert (lungs_lr[:, :, top - 20 : top] > 0)[gas & body[..., None]].mean() < 0.02


@pytest.mark.parametrize("noise_hu", [100.0])
def test_a_sharp_kernel_does_no_harm(patient, noise_hu):
    noise = np.random.default_rng(0).normal(0, noise_hu, patient.ct.shape)
    noisy = segment_lungs(patient.ct.like(np.maximum(patient.ct.array + noise, AIR_HU).astype(np.int16)))
    assert dice(noisy > 0, patient.lungs) > 0.975


def test_finer_pixels_give_the_same_lungs(patient):
    """Pixels below 1.4 mm go through the coarser working grid and back."""
    finer = Volume(patient.ct.array.repeat(2, axis=0), patient.ct.affine @ np.diag([0.5, 1, 1, 1]))
    assert dice(segment_lungs(finer) > 0, patient.lungs.repeat(2, axis=0)) > 0.98


def centre_of(mask):
    return np.argwhere(mask).mean(axis=0)


def ball(patient, centre, radius_mm):
    """Voxels within a distance of a place (voxel indices)."""
    offsets = np.indices(patient.ct.shape).T - centre
    return (np.linalg.norm(offsets * patient.ct.spacing_mm, axis=-1) < radius_mm).T


def test_a_nodule_of_30_mm_on_the_chest_wall_is_inside(patient):
    """Its centre is 12 mm deep; the lung closes over it on a chord, which the wall's curve oversteps by a voxel."""
    right = patient.lungs & (np.indices(patient.ct.shape)[0] > centre_of(patient.lungs)[0])
    _, y, z = np.rint(centre_of(right)).astype(int)
    x = np.flatnonzero(right[:, y, z])[-1] - 12 / patient.ct.spacing_mm[0]
    nodule = ball(patient, [x, y, z], 15) & right
    found = segment_lungs(patient.ct.like(np.where(nodule, 30, patient.ct.array)))
    assert np.count_nonzero(nodule) * patient.ct.voxel_mm3 > 0.75 * 14137
    assert (found == RIGHT)[nodule].mean() > 0.93
    assert dice(found > 0, patient.lungs) > 0.985


def test_gas_in_bowel_and_stomach_is_not_lung(patient):
    """A bubble of 70 mm under each half of the diaphragm, 5 mm of tissue between it and the lung."""
    depth_mm = ndimage.distance_transform_edt(~patient.lungs, patient.ct.spacing_mm)
    gas = np.zeros(patient.ct.shape, bool)
    x, y, z = centre_of(patient.lungs)
    for side in (-1, 1):
        bubble = ball(patient, [x + side * 60 / patient.ct.spacing_mm[0], y, 14], 35) & (depth_mm > 5)
        gas |= bubble & (np.indices(patient.ct.shape)[2] < z)
    found = segment_lungs(patient.ct.like(np.where(gas, -1000, patient.ct.array)))
    assert np.count_nonzero(gas) * patient.ct.voxel_mm3 > 1e5
    assert not (found > 0)[gas].any()
    assert dice(found > 0, patient.lungs) > 0.98


def test_contrast_does_no_harm(patient):
    """Heart, great vessels and the lungs' vessels at 350 HU."""
    middle = np.abs(np.indices(patient.ct.shape)[0] - centre_of(patient.lungs)[0]) * patient.ct.spacing_mm[0] < 70
    blood = patient.vessels | (middle & ~patient.lungs & (patient.ct.array > 0) & (patient.ct.array < 90))
    found = segment_lungs(patient.ct.like(np.where(blood, 350, patient.ct.array)))
    assert dice(found > 0, patient.lungs) > 0.98


def cut(patient, x=slice(None), y=slice(None), z=slice(None)):
    return patient.ct.like(patient.ct.array[x, y, z])


FACES = {"left": (0, 0), "right": (0, 1), "back": (1, 0), "front": (1, 1), "bottom": (2, 0), "top": (2, 1)}


def ending_near(patient, face, gap_mm):
    """The part of the scan that ends so far beyond the lungs at a face."""
    axis, end = FACES[face]
    side, gap = bounding_box(patient.lungs)[axis], round(gap_mm / patient.ct.spacing_mm[axis])
    kept = [slice(None)] * 3
    kept[axis] = slice(0, side.stop + gap) if end else slice(max(0, side.start - gap), None)
    return tuple(kept)


@pytest.fixture(scope="module")
def closed(patient, lungs_lr):
    """Both lungs as they are, closed in the whole scan; without airways, which are another matter."""
    true_lungs = np.where(patient.lungs, lungs_lr, 0)
    return true_lungs, _close(true_lungs, np.zeros(lungs_lr.shape, bool), patient.ct.spacing_mm)


@pytest.mark.parametrize("gap_mm", [0, 10])
@pytest.mark.parametrize("face", FACES)
def test_closing_is_the_same_at_the_edge_of_the_scan(patient, closed, face, gap_mm):
    """Beyond the edge there is no lung: what lies between both is not closed over."""
    kept = ending_near(patient, face, gap_mm)
    lungs, whole = (array[kept] for array in closed)
    near = _close(lungs, np.zeros(lungs.shape, bool), patient.ct.spacing_mm)
    np.testing.assert_array_equal(near, whole)


@pytest.mark.parametrize("gap_mm", [0, 2, 6])
@pytest.mark.parametrize("face", FACES)
def test_lungs_near_the_edge_of_the_scan_match_the_truth(patient, face, gap_mm):
    kept = ending_near(patient, face, gap_mm)
    ct, truth = patient.ct.like(patient.ct.array[kept]), patient.lungs[kept]
    if gap_mm == 0 and face not in ("bottom", "top"):
        with pytest.raises(ExcludedCaseError, match="cut off at the side"):
            segment_lungs(ct)
        return
    found = segment_lungs(ct) > 0
    assert dice(found, truth) > 0.993
    tissue = np.count_nonzero(found & ~truth & (ct.array > -200))
    assert tissue * ct.voxel_mm3 < 6000


def without_left_lung(patient):
    array = patient.ct.array.copy()
    x = np.indices(array.shape)[0]
    array[patient.lungs & (x < x[patient.lungs].mean())] = 40
    return patient.ct.like(array)


def seen_through_a_small_circle(patient):
    """The scanner's circle cuts a little off both lungs; what lies outside it is padding, read as air."""
    from_axis = np.hypot(*(np.indices(patient.ct.shape[:2]) - (np.array(patient.ct.shape[:2])[:, None, None] - 1) / 2))
    outside = from_axis[..., None] > 0.95 * from_axis[patient.lungs.any(axis=2)].max()
    return patient.ct.like(np.where(outside, AIR_HU, patient.ct.array))


def with_foam_table(patient):
    array = patient.ct.array.copy()
    array[:, :6] = -930
    array[:, 6] = 200
    return patient.ct.like(array)


def unusable(patient):
    """Scans that show no lungs, not both, or not all of them, each with its true reason."""
    side_x, side_y, height = bounding_box(patient.lungs)
    middle_z = (height.start + height.stop) // 2
    return {
        "upper abdomen": ("no lungs were found", cut(patient, z=slice(0, height.start))),
        "tissue only": ("no lungs were found", patient.ct.like(np.full(patient.ct.shape, 40, np.int16))),
        "air only": ("no lungs were found", patient.ct.like(np.full(patient.ct.shape, -1000, np.int16))),
        "abdomen with the lungs' bases": ("cut off at the top", cut(patient, z=slice(0, height.start + 15))),
        "without the apices": ("cut off at the top", cut(patient, z=slice(0, middle_z))),
        "without the bases": ("cut off at the bottom", cut(patient, z=slice(middle_z, None))),
        "cut at the left": ("cut off at the side", cut(patient, x=slice(side_x.start + 10, None))),
        "cut at the right": ("cut off at the side", cut(patient, x=slice(0, side_x.stop - 4))),
        "cut in front": ("cut off at the side", cut(patient, y=slice(0, side_y.stop - 4))),
        "small circle": ("cut off at the side", seen_through_a_small_circle(patient)),
        "pneumonectomy": ("only one lung was found", without_left_lung(patient)),
    }


UNUSABLE = [
    "upper abdomen", "tissue only", "air only", "abdomen with the lungs' bases", "without the apices",
    "without the bases", "cut at the left", "cut at the right", "cut in front", "small circle", "pneumonectomy",
]  # fmt: skip


@pytest.mark.parametrize("scan", UNUSABLE)
def test_unusable_scans_are_reported_with_the_true_reason(patient, scan):
    reason, ct = unusable(patient)[scan]
    with pytest.raises(ExcludedCaseError, match=reason):
        segment_lungs(ct)


@pytest.mark.parametrize("axis", [0, 1])
def test_ready_lungs_that_are_cut_at_the_side_are_reported(patient, lungs_lr, axis):
    box = bounding_box(lungs_lr > 0)
    whole, parted = (
        np.take(lungs_lr, range(box[axis].start + margin, lungs_lr.shape[axis]), axis) for margin in (0, 10)
    )
    check_lungs(patient.ct.like(whole), Layouts())
    with pytest.raises(ExcludedCaseError, match="cut off at the side"):
        check_lungs(patient.ct.like(parted), Layouts())


def test_too_little_lung_is_reported(patient):
    with pytest.raises(ExcludedCaseError, match=r"is \d\.\d\d litres, outside 9 to 12 \(layouts.limits.lung_litres\)"):
        segment_lungs(patient.ct, Layouts(limits={"lung_litres": (9, 12)}))


def test_a_table_filled_with_foam_is_not_lung(patient):
    assert dice(segment_lungs(with_foam_table(patient)) > 0, patient.lungs) > 0.98


def test_lungs_that_touch_are_distinguished():
    x, y, z = np.ogrid[:90, :60, :70]
    right = ((x - 62) / 19) ** 2 + ((y - 30) / 25) ** 2 + ((z - 35) / 30) ** 2 < 1
    left = ((x - 27) / 19) ** 2 + ((y - 30) / 25) ** 2 + ((z - 35) / 30) ** 2 < 1
    lungs_lr = split_lungs(Volume(right | left, np.diag([2.0, 2.0, 3.0, 1.0])))
    assert ((lungs_lr > 0) == (right | left)).all()
    assert (lungs_lr == RIGHT)[right & ~left].mean() > 0.995
    assert (lungs_lr == LEFT)[left & ~right].mean() > 0.995


def test_a_real_scan(shared_data):
    """LIDC-IDRI-0001 has bowel gas, a table, thick slices and a solid nodule on the pleura; takes about 10 s."""
    (folder,) = (shared_data / "lidc").glob("LIDC-IDRI-0001/*/*")
    row = {"path": str(folder.relative_to(shared_data / "lidc")), "series_uid": folder.name, "annotations": "[]"}
    ct = load_scan(shared_data / "lidc", row).ct.canonical()
    lungs_lr = segment_lungs(ct)
    litres = [np.count_nonzero(lungs_lr == side) * ct.voxel_mm3 / 1e6 for side in (RIGHT, LEFT)]
    assert litres == pytest.approx([1.97, 1.76], abs=0.1)
    nodule = read_volume(shared_data / "lidc-oracle" / "LIDC-IDRI-0001_consensus050.nii.gz").array > 0
    assert (lungs_lr > 0)[nodule].mean() > 0.96


def test_the_published_sample(shared_data):
    """Case 0, within the agreement of two automatic methods; its 8 bit become HU by air (3) and muscle (150)."""
    folder = shared_data / "published-samples"
    image, layout = (
        np.asarray(nibabel.load(folder / f"case0_{name}.nii.gz").dataobj).transpose(2, 1, 0)[::-1, ::-1]
        for name in ("reference", "layout")
    )
    hu = (image - 3.0) / 147 * 1040 - 1000
    assert dice(segment_lungs(Volume(hu, np.diag([2.7, 2.7, 2.5, 1.0]))) > 0, layout > 0) >= 0.97
