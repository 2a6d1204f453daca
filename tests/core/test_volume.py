"""Volumes against analytic cases and against SimpleITK."""

import numpy as np
import pytest
import SimpleITK
from scipy import ndimage

from lungddpm.core.volume import (
    AIR_HU,
    Volume,
    bounding_box,
    is_sheared,
    model_grid,
    occupancy,
    resample_image,
    resample_upright,
    whole_hu,
)


def affine(spacing=(0.7, 0.9, 2.5), origin=(-30.0, 12.0, -200.0), angle=0.0):
    rotation = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    matrix = np.eye(4)
    matrix[:3, :3] = rotation * spacing
    matrix[:3, 3] = origin
    return matrix


def world(grid, index):
    return (grid @ [*index, 1])[:3]


def corners(grid, shape):
    """Outer voxel edges at both ends, in mm."""
    return world(grid, [-0.5] * 3), world(grid, np.array(shape) - 0.5)


def blob(shape=(60, 52, 30), centre=(33.4, 20.7, 14.2), sigma=(6, 5, 3)):
    axes = np.ogrid[tuple(slice(n) for n in shape)]
    exponent = sum(((a - c) / s) ** 2 for a, c, s in zip(axes, centre, sigma, strict=True))
    return np.exp(-exponent / 2).astype(np.float32)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([-3024.0, -1024.4, -0.6, 41.5, 42.5, 1e9]), [-1024, -1024, -1, 42, 42, 32767]),
        (np.array([-3024, 7, 70_000], np.int32), [-1024, 7, 32767]),
        (np.array([0, 65535], np.uint16), [0, 32767]),
    ],
)
def test_whole_hu(values, expected):
    hu = whole_hu(values)
    assert (hu.dtype, hu.tolist()) == (np.int16, expected)


@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, -1, 1), (1, -1, -1)])
@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 2, 0), (2, 1, 0)])
@pytest.mark.parametrize("dtype", [bool, np.int16, np.float32])
def test_canonical_moves_no_voxel_in_the_patient(flips, axes, dtype):
    array = np.zeros((4, 5, 6), dtype)
    array[1, 3, 2] = 1
    matrix = np.eye(4)
    matrix[:3, :3] = (np.diag(flips) * [0.7, 0.9, 2.5])[:, axes]
    matrix[:3, 3] = (10, 20, 30)
    moved = Volume(array, matrix).canonical()
    assert (np.diag(moved.affine)[:3] > 0).all()
    assert moved.array.dtype == dtype
    np.testing.assert_allclose(world(moved.affine, np.argwhere(moved.array)[0]), world(matrix, (1, 3, 2)))


def test_crop_keeps_its_place():
    volume = Volume(blob(), affine(angle=0.2))
    cropped = volume.crop((slice(10, 40), slice(5, 9), slice(2, 20)))
    assert cropped.array[3, 1, 4] == volume.array[13, 6, 6]
    np.testing.assert_allclose(world(cropped.affine, (3, 1, 4)), world(volume.affine, (13, 6, 6)))


@pytest.mark.parametrize("size", [(16, 16, 16), (64, 32, 48), (61, 52, 7)])
def test_the_full_grid_covers_the_field_of_view_to_the_voxel_edges(size):
    volume = Volume(blob(), affine(angle=0.1))
    np.testing.assert_allclose(corners(model_grid(volume, size), size), corners(volume.affine, volume.shape), atol=1e-9)


def test_the_lungs_grid_covers_the_box_plus_margin_even_beyond_the_scan():
    volume = Volume(blob(), affine())
    mask = np.zeros(volume.shape, bool)
    mask[0:20, 10:30, 5:12] = True
    low, high = corners(model_grid(volume, (32, 32, 16), mask, 10.0), (32, 32, 16))
    np.testing.assert_allclose(low, world(volume.affine, (-0.5, 9.5, 4.5)) - 10)
    np.testing.assert_allclose(high, world(volume.affine, (19.5, 29.5, 11.5)) + 10)
    assert bounding_box(mask) == (slice(0, 20), slice(10, 30), slice(5, 12))


def test_beyond_the_scan_there_is_air():
    volume = Volume(np.full((20, 20, 20), 50, np.int16), np.eye(4))
    grid = model_grid(volume, (30, 30, 30), np.ones(volume.shape, bool), 5.0)
    result = resample_image(volume, grid, (30, 30, 30)).array
    expected = np.full((30, 30, 30), AIR_HU, np.float32)
    expected[5:25, 5:25, 5:25] = 50
    np.testing.assert_allclose(result, expected, atol=1e-3)


@pytest.mark.parametrize("size", [(16, 16, 16), (23, 40, 31), (60, 52, 30), (90, 77, 100)])
def test_resampling_keeps_mean_and_centroid(size):
    volume = Volume(blob() * 900 - 1000, affine())
    moved = resample_image(volume, model_grid(volume, size), size)
    assert moved.array.mean() == pytest.approx(volume.array.mean(), abs=1e-2)
    before, after = (world(v.affine, ndimage.center_of_mass(v.array.astype(float) + 1000)) for v in (volume, moved))
    assert np.abs(before - after).max() < 0.05


def test_a_pattern_finer_than_the_cells_turns_into_its_mean():
    checks = np.indices((48, 48, 48)).sum(axis=0) % 2 * 1000.0
    volume = Volume(checks, np.eye(4))
    for size in ((16, 16, 16), (13, 13, 13)):
        inner = resample_image(volume, model_grid(volume, size), size).array[1:-1, 1:-1, 1:-1]
        assert np.abs(inner - 500).max() < 20


def test_there_and_back_keeps_a_smooth_image():
    volume = Volume(blob() * 900 - 1000, affine())
    size = (90, 80, 60)
    there = resample_image(volume, model_grid(volume, size), size)
    back = resample_image(there, volume.affine, volume.shape)
    assert np.abs(back.array - volume.array).max() < 40


@pytest.mark.parametrize(("size", "tolerance"), [((90, 77, 100), 25), ((30, 26, 15), 45)])
def test_resampling_agrees_with_simpleitk(size, tolerance):
    """A smooth image through SimpleITK's B-spline: the area mean differs only by its slight blur."""
    volume = Volume(blob() * 900 - 1000, affine())
    grid = model_grid(volume, size)
    to_lps = np.diag([-1.0, -1.0, 1.0, 1.0])

    def image(array, matrix):
        result = SimpleITK.GetImageFromArray(array.transpose(2, 1, 0))
        result.SetSpacing(np.linalg.norm(matrix[:3, :3], axis=0).tolist())
        result.SetOrigin((to_lps @ matrix)[:3, 3].tolist())
        direction = (to_lps @ matrix)[:3, :3] / np.linalg.norm(matrix[:3, :3], axis=0)
        result.SetDirection(direction.ravel().tolist())
        return result

    target = image(np.zeros(size, np.float32), grid)
    moved = SimpleITK.Resample(
        image(volume.array, volume.affine), target, SimpleITK.Transform(), SimpleITK.sitkBSpline, float(AIR_HU)
    )
    inner = (slice(2, -2),) * 3
    difference = SimpleITK.GetArrayFromImage(moved).transpose(2, 1, 0) - resample_image(volume, grid, size).array
    assert np.abs(difference[inner]).max() < tolerance


@pytest.mark.parametrize("size", [(8, 8, 8), (17, 40, 31), (60, 52, 30), (150, 111, 90)])
def test_occupancy_conserves_volume(size):
    mask = blob() > 0.4
    volume = Volume(mask, affine(angle=0.3))
    grid = model_grid(volume, size)
    share = occupancy(volume, grid, size)
    assert share.min() >= 0
    assert share.max() <= 1
    cell_mm3 = abs(np.linalg.det(grid[:3, :3]))
    assert share.sum(dtype=float) * cell_mm3 == pytest.approx(mask.sum() * volume.voxel_mm3, rel=1e-5)


def test_occupancy_is_the_exact_overlap_of_boxes():
    mask = np.zeros((10, 10, 10), bool)
    mask[2:5, 3:4, 6:10] = True
    grid = np.diag([2.5, 2.0, 5.0, 1.0])
    grid[:3, 3] = (0.75, 0.5, 2.0)  # cells of 2.5 x 2 x 5 mm from the outer edge on

    def overlaps(low, high, step, n):
        return [max(0, min(high, (i + 1) * step) - max(low, i * step)) / step for i in range(n)]

    expected = np.einsum("i,j,k", overlaps(2, 5, 2.5, 4), overlaps(3, 4, 2, 5), overlaps(6, 10, 5, 2))
    np.testing.assert_allclose(occupancy(Volume(mask, np.eye(4)), grid, (4, 5, 2)), expected, atol=1e-6)


def test_occupancy_of_a_finer_grid_repeats_the_voxels():
    mask = np.random.default_rng(0).random((6, 7, 8)) > 0.5
    volume = Volume(mask, affine())
    fine = occupancy(volume, model_grid(volume, (18, 14, 32)), (18, 14, 32))
    np.testing.assert_allclose(fine, mask.repeat(3, 0).repeat(2, 1).repeat(4, 2), atol=1e-5)


def test_any_orientation_gives_the_same_picture():
    volume = Volume(blob() * 900 - 1000, affine())
    flipped = Volume(volume.array[::-1, ::-1].transpose(1, 0, 2), None)
    matrix = volume.affine @ np.array([[0, -1, 0, 59], [-1, 0, 0, 51], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    size = (16, 20, 24)
    grid = model_grid(volume, size)
    np.testing.assert_allclose(
        resample_image(Volume(flipped.array, matrix), grid, size).array,
        resample_image(volume, grid, size).array,
        atol=1e-2,
    )


def test_skewed_grids_are_refused():
    volume = Volume(blob(), affine())
    with pytest.raises(ValueError, match="not parallel"):
        resample_image(volume, affine(angle=0.1), (16, 16, 16))
    with pytest.raises(ValueError, match="not parallel"):
        occupancy(Volume(blob() > 0.5, affine()), affine(angle=0.1), (16, 16, 16))


def tilted(degrees, plane_tilts, spacing=(1.4, 1.6, 3.0), origin=(-60.0, 35.0, -200.0)):
    """A gantry's tilt: the slices' planes lean while the table moves along z, or, turned, the slices slide back."""
    angle = np.radians(degrees)
    matrix = np.diag([*spacing, 1.0])
    lean = [0, np.cos(angle), np.sin(angle)] if plane_tilts else [0, np.sin(angle), np.cos(angle)]
    matrix[:3, 1 if plane_tilts else 2] = np.array(lean) * spacing[1 if plane_tilts else 2]
    matrix[:3, 3] = origin
    return matrix


def places(grid, shape):
    """Where each voxel lies in mm, (*shape, 3)."""
    return np.moveaxis(np.indices(shape), 0, -1) @ grid[:3, :3].T + grid[:3, 3]


SHEARED_SHAPE = (60, 50, 40)


@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, -1, 1), (1, 1, -1)])
@pytest.mark.parametrize("plane_tilts", [True, False])
@pytest.mark.parametrize("degrees", [-12.0, 0.5, 25.0])
def test_a_sheared_volume_is_resampled_to_its_place_in_the_patient(degrees, plane_tilts, flips):
    sheared = tilted(degrees, plane_tilts) @ np.diag([*flips, 1.0])
    assert is_sheared(sheared)
    # Linear interpolation keeps a linear function exactly, so inside the truth is known at every voxel.
    slope = np.array([0.9, -0.7, 0.4])
    ramp = Volume((places(sheared, SHEARED_SHAPE) @ slope).astype(np.float32), sheared)
    moved = resample_upright(ramp)
    axes = moved.affine[:3, :3] / moved.spacing_mm
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-12)
    assert (np.diag(moved.affine)[:3] > 0).all()
    index = places(np.linalg.inv(sheared) @ moved.affine, moved.shape)
    inside = ((index >= 0) & (index <= np.array(SHEARED_SHAPE) - 1)).all(axis=-1)
    beyond = ((index < -0.51) | (index > np.array(SHEARED_SHAPE) - 0.49)).any(axis=-1)
    np.testing.assert_allclose(moved.array[inside], (places(moved.affine, moved.shape) @ slope)[inside], atol=2e-3)
    assert inside.sum() > 0.9 * np.prod(SHEARED_SHAPE)
    assert (moved.array[beyond] == AIR_HU).all()
    # The slices keep their planes, so their number stays; no corner of the sheared volume is left out.
    assert moved.shape[2] == SHEARED_SHAPE[2]
    ends = [[x, y, z] for x in (0, 59) for y in (0, 49) for z in (0, 39)]
    within = [np.linalg.solve(moved.affine, [*world(sheared, end), 1])[:3] for end in ends]
    assert np.min(within) > -0.51
    assert (np.max(within, axis=0) < np.array(moved.shape) - 0.49).all()


@pytest.mark.parametrize("plane_tilts", [True, False])
@pytest.mark.parametrize("dtype", [np.uint8, bool])
def test_labels_of_a_sheared_volume_stay_labels_on_the_grid_of_their_ct(plane_tilts, dtype):
    sheared = tilted(20.0, plane_tilts)
    centre = world(sheared, (28.0, 25.0, 20.0))
    away_mm = np.linalg.norm(places(sheared, SHEARED_SHAPE) - centre, axis=-1)
    labels = Volume(((away_mm < 20).astype(np.uint8) * 2).astype(dtype), sheared)
    moved = resample_upright(labels, labels=True)
    assert moved.array.dtype == dtype
    assert set(np.unique(moved.array).tolist()) == ({False, True} if dtype is bool else {0, 2})
    assert moved.same_grid(resample_upright(Volume(np.zeros(SHEARED_SHAPE, np.int16), sheared)))
    truth = np.linalg.norm(places(moved.affine, moved.shape) - centre, axis=-1) < 20
    found = moved.array > 0
    assert 2 * (truth & found).sum() / (truth.sum() + found.sum()) > 0.97
    np.testing.assert_allclose(places(moved.affine, moved.shape)[found].mean(axis=0), centre, atol=0.1)


def test_whole_numbers_are_rounded_not_cut():
    sheared, slope = tilted(15.0, False), [3.7, 2.3, 1.9]
    ramp = Volume(np.rint(places(sheared, SHEARED_SHAPE) @ slope).astype(np.int16), sheared)
    moved = resample_upright(ramp)
    index = places(np.linalg.inv(sheared) @ moved.affine, moved.shape)
    inside = ((index >= 0) & (index <= np.array(SHEARED_SHAPE) - 1)).all(axis=-1)
    error = (moved.array - places(moved.affine, moved.shape) @ slope)[inside]
    assert moved.array.dtype == np.int16
    assert abs(error.mean()) < 0.02
    assert np.abs(error).max() <= 1.001


@pytest.mark.parametrize("angle", [0.0, 0.3])
def test_rotated_and_rounded_affines_are_not_sheared(angle):
    assert not is_sheared(affine(angle=angle))
    assert not is_sheared(np.round(affine(angle=angle), 4).astype(np.float32))
