"""What holds for every geometry: canonical orientation, cropping, model grids, resampling, occupancy."""

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from lungddpm.core.volume import Volume, bounding_box, model_grid, occupancy, resample_image

quick = settings(derandomize=True, max_examples=60, deadline=None)
sizes = st.tuples(*[st.integers(2, 9)] * 3)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def volumes(draw):
    """Noise with axes in any order and direction, tilted by up to 25 degrees, anywhere in the patient."""
    random = np.random.default_rng(draw(seeds))
    axes, signs = draw(st.permutations(range(3))), draw(st.tuples(*[st.sampled_from([-1, 1])] * 3))
    spacing = draw(st.tuples(*[st.floats(0.4, 6)] * 3))
    degrees = draw(st.tuples(*[st.floats(-14, 14)] * 3))
    affine = np.eye(4)
    turn = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    affine[:3, :3] = turn @ (np.eye(3)[:, axes] * np.multiply(spacing, signs))
    affine[:3, 3] = draw(st.tuples(*[st.floats(-400, 400)] * 3))
    return Volume(random.normal(size=draw(sizes)), affine)


def positions_mm(volume):
    """(x, y, z, 3): where each voxel's centre lies."""
    index = np.stack(np.indices(volume.shape), axis=-1)
    return index @ volume.affine[:3, :3].T + volume.affine[:3, 3]


def by_position(volume):
    """Values and positions of all voxels, in the order of the values."""
    order = np.argsort(volume.array, axis=None)
    return volume.array.ravel()[order], positions_mm(volume).reshape(-1, 3)[order]


@quick
@given(volumes())
def test_canonical_moves_no_voxel(volume):
    turned = volume.canonical()
    for before, after in zip(by_position(volume), by_position(turned), strict=True):
        np.testing.assert_allclose(after, before, atol=1e-9)
    steps = turned.affine[:3, :3]
    assert (np.abs(steps).argmax(axis=0) == range(3)).all()
    assert (np.diag(steps) > 0).all()
    again = turned.canonical()
    np.testing.assert_array_equal(again.array, turned.array)
    np.testing.assert_allclose(again.affine, turned.affine)


@quick
@given(volumes(), st.data())
def test_a_crop_moves_no_voxel(volume, data):
    starts = [data.draw(st.integers(0, n - 1)) for n in volume.shape]
    box = tuple(
        slice(start, data.draw(st.integers(start + 1, n))) for start, n in zip(starts, volume.shape, strict=True)
    )
    cropped = volume.crop(box)
    np.testing.assert_array_equal(cropped.array, volume.array[box])
    np.testing.assert_allclose(positions_mm(cropped), positions_mm(volume)[box], atol=1e-9)


@quick
@given(volumes(), sizes)
def test_a_model_grid_covers_the_scan_and_nothing_else(volume, size):
    scan = volume.canonical()
    affine = model_grid(scan, size)
    for corner in np.ndindex(2, 2, 2):
        edges = [
            grid[:3, :3] @ (np.array(corner) * shape - 0.5) + grid[:3, 3]
            for grid, shape in ((affine, size), (scan.affine, scan.shape))
        ]
        np.testing.assert_allclose(*edges, atol=1e-8)


@quick
@given(volumes(), sizes, st.tuples(*[st.floats(-3, 3)] * 3))
def test_a_linear_ramp_is_resampled_exactly_away_from_the_edges(volume, size, slope):
    ramp = volume.like(positions_mm(volume) @ slope)
    affine = model_grid(volume.canonical(), size)
    made = resample_image(ramp, affine, size)
    # Within half a voxel of the scan's edge the interpolant is constant.
    reach = np.array(volume.canonical().shape) / np.array(size)
    index = np.stack(np.indices(size), axis=-1)
    inner = ((index * reach >= 0.5) & ((index + 1) * reach <= np.array(volume.canonical().shape) - 0.5)).all(axis=-1)
    expected = positions_mm(made) @ slope
    np.testing.assert_allclose(made.array[inner], expected[inner], rtol=1e-4, atol=0.02)


@quick
@given(volumes(), sizes)
def test_a_constant_stays_constant(volume, size):
    constant = volume.like(np.full(volume.shape, -731.0))
    made = resample_image(constant, model_grid(volume.canonical(), size), size)
    np.testing.assert_allclose(made.array, -731.0, atol=1e-2)


@quick
@given(volumes(), sizes, st.floats(0, 20))
def test_occupancy_keeps_the_volume(volume, size, margin_mm):
    mask = volume.like(volume.array > 0.3).canonical()
    assume(mask.array.any())
    affine = model_grid(mask, size, mask.array, margin_mm)
    share = occupancy(mask, affine, size)
    assert ((share >= 0) & (share <= 1)).all()
    cell_mm3 = abs(np.linalg.det(affine[:3, :3]))
    volume_mm3 = np.count_nonzero(mask.array) * mask.voxel_mm3
    np.testing.assert_allclose(share.sum(dtype=float) * cell_mm3, volume_mm3, rtol=1e-4)
    own = occupancy(mask, mask.affine, mask.shape)
    np.testing.assert_allclose(own, mask.array, atol=1e-5)


@quick
@given(volumes(), sizes, st.floats(0, 10))
def test_a_model_grid_around_a_mask_holds_it_with_its_margin(volume, size, margin_mm):
    mask = volume.like(volume.array >= volume.array.max()).canonical()
    affine = model_grid(mask, size, mask.array, margin_mm)
    spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)
    widths_mm = [
        (side.stop - side.start) * step for side, step in zip(bounding_box(mask.array), mask.spacing_mm, strict=True)
    ]
    np.testing.assert_allclose(spacing_mm * size, np.array(widths_mm) + 2 * margin_mm)
