"""A phantom patient against anatomy and physics."""

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.ndimage import binary_dilation, binary_erosion, label

from lungddpm.sources.phantom.nodules import draw_shape, shape_share
from lungddpm.sources.phantom.patient import Thorax, thorax
from lungddpm.sources.phantom.scanner import PADDING_HU, Grid, acquire, painting_grid, slice_means
from lungddpm.sources.phantom.settings import Phantom
from lungddpm.sources.phantom.shapes import fill_rods, rods_between
from lungddpm.sources.phantom.vessels import grow_tree

# ------------------------------------------------------------------ anatomy


def test_tissues_have_their_attenuation(clean: Thorax):
    hu = clean.ct.array
    inside = binary_erosion(clean.lungs, iterations=3)
    parenchyma = inside & (clean.vessel_radius_mm == 0) & ~np.any([n.mask for n in clean.nodules], axis=0)
    assert np.median(hu[parenchyma]) == pytest.approx(-850, abs=40)
    rows = np.nonzero(parenchyma)[1]
    front, back = np.quantile(rows, [0.2, 0.8])
    values = hu[parenchyma]
    assert 15 < np.median(values[rows > back]) - np.median(values[rows < front]) < 100
    assert hu[80, 5, 50] == -1000
    assert np.median(hu[binary_erosion(clean.vessels & (clean.vessel_radius_mm > 4))]) == pytest.approx(40, abs=15)
    peaks = np.bincount((hu[hu > -200] + 200).ravel(), minlength=1000)
    for tissue, low, high in (("fat", -110, -90), ("muscle", 45, 55), ("blood", 35, 45), ("liver", 55, 65)):
        assert peaks[low + 200 : high + 201].sum() > 3000, tissue
    assert 1000 < (hu > 250).sum() < 0.1 * hu.size
    assert hu.max() <= 720


def test_nodules_have_the_attenuation_of_their_texture(patients: list[Thorax]):
    seen = set()
    for truth in patients:
        for nodule in truth.nodules:
            core = binary_erosion(nodule.mask)
            if nodule.margin == "smooth" and core.any():
                middle = np.median(truth.ct.array[core])
                low, high = {"solid": (0, 40), "ground-glass": (-640, -500), "part-solid": (-640, 40)}[nodule.texture]
                assert low <= middle <= high, (nodule.texture, middle)
                seen.add(nodule.texture)
    assert {"solid", "ground-glass"} <= seen


def test_textures_have_the_shares_of_the_settings():
    textures = {"solid": 0, "part_solid": 0}
    ground_glass = Phantom(matrix=64, pixel_mm=5, slice_mm=6, nodules=(3, 3), nodule_textures=textures)
    found = {nodule.texture for seed in range(3) for nodule in thorax(ground_glass, seed).nodules}
    assert found == {"ground-glass"}
    with pytest.raises(ValidationError, match="at least one texture"):
        Phantom(nodule_textures={**textures, "ground_glass": 0})


def test_lungs_are_of_human_size_and_two(clean: Thorax, patients: list[Thorax]):
    for truth in [clean, *patients]:
        assert 3 <= truth.lungs.sum() * truth.ct.voxel_mm3 / 1e6 <= 7
        parts, count = label(truth.lungs)
        sizes = np.sort(np.bincount(parts.ravel())[1:])[::-1]
        assert count >= 2
        assert sizes[:2].sum() > 0.999 * truth.lungs.sum()
        assert sizes[1] > 0.6 * sizes[0]
        assert not truth.lungs[:, :, -1].any()
        assert not truth.lungs[:, :, 0].any()
    assert np.ptp([truth.lungs.sum() * truth.ct.voxel_mm3 for truth in patients]) > 3e5


def test_noise_has_the_wanted_strength_and_is_correlated(small: Phantom, patients: list[Thorax]):
    quiet = patients[5].ct.array.astype(float)
    noisy = thorax(small, 5).ct.array.astype(float)
    difference = np.where((quiet > -900) & (quiet < 500), noisy - quiet, np.nan)
    assert np.nanstd(difference) == pytest.approx(small.noise_hu, rel=0.1)
    assert np.nanmean(difference[1:] * difference[:-1]) > 0.2 * small.noise_hu**2


def test_only_the_outside_of_the_scanners_circle_is_padding(clean: Thorax):
    hu = clean.ct.array
    columns, rows = np.indices(hu.shape[:2]) - (hu.shape[0] - 1) / 2
    outside = np.hypot(columns, rows) > hu.shape[0] / 2
    assert ((hu == PADDING_HU) == outside[..., None]).all()
    assert hu[~outside].min() >= -1024


# ------------------------------------------------------------------ slices and kernels


def slab(thickness_mm: float) -> Grid:
    axis = 1.5 * np.arange(40, dtype=np.float32)
    return Grid(axis, axis, (thickness_mm * np.arange(60 // thickness_mm)).astype(np.float32), 1.5, thickness_mm)


@pytest.mark.parametrize("thickness_mm", [1.0, 1.5, 3.0, 5.0])
def test_slices_average_over_their_thickness(thickness_mm: float):
    """A level surface fills the slice that holds it by the share below it, to an eighth of its thickness."""
    scan = slab(thickness_mm)
    grid = painting_grid(scan)
    assert grid.slice_mm == pytest.approx(grid.pixel_mm, rel=0.35)
    for height in np.linspace(28, 33, 11):
        surface = np.broadcast_to(grid.coordinates()[2] - np.float32(height), grid.shape)
        column = slice_means(grid.share(surface), scan)[0, 0]
        exact = np.clip((height - scan.z) / thickness_mm + 0.5, 0, 1)
        assert np.abs(column - exact).max() < 0.13
        assert column.sum() * thickness_mm == pytest.approx(height + thickness_mm / 2, abs=0.05)


def test_thick_slices_show_the_mean_of_thin_ones():
    """A scan of 9 mm slices is the mean of three 3 mm slices, but in the lungs, whose vessels and nodules differ."""
    thick, thin = (
        thorax(Phantom(matrix=100, pixel_mm=3.3, slice_mm=slice_mm, noise_hu=0, nodule_diameter_mm=(16, 30)), 4)
        for slice_mm in (9.0, 3.0)
    )
    # Both begin with the same middle of a slice.
    n = min(thick.ct.shape[2], (thin.ct.shape[2] - 1) // 3) - 1

    def in_thirds(array: np.ndarray) -> np.ndarray:
        return array[:, :, 2 : 2 + 3 * n].reshape(100, 100, n, 3)

    lungs, thin_lungs = thick.lungs[:, :, 1 : 1 + n], in_thirds(thin.lungs)
    body = ~binary_dilation(thin_lungs.any(axis=3), iterations=2)
    difference = thick.ct.array[:, :, 1 : 1 + n] - in_thirds(thin.ct.array.astype(float)).mean(axis=3)
    assert np.abs(difference[body]).max() <= 1
    assert (lungs | ~thin_lungs.all(axis=3)).all()
    assert (thin_lungs.any(axis=3) | ~lungs).all()


@pytest.fixture(scope="module")
def by_kernel() -> dict[str, np.ndarray]:
    """A step from lung to tissue along x as each kernel shows it, without noise; 1.4 mm pixels."""
    x = 1.4 * np.arange(60, dtype=np.float32)
    grid = Grid(x, x, x[:4], 1.4, 1.4)
    step = np.broadcast_to(np.where(x < 42, -850, 40)[:, None, None], grid.shape).astype(np.float32)
    rng = np.random.default_rng(0)
    scans = {kernel: acquire(step, grid, kernel, 0.0, rng) for kernel in ("soft", "standard", "sharp")}
    return {kernel: scan[:, 30, 2].astype(float) for kernel, scan in scans.items()}


def test_sharp_edges_overshoot_and_soft_ones_are_wide(by_kernel: dict[str, np.ndarray]):
    inner = {kernel: profile[10:50] for kernel, profile in by_kernel.items()}
    assert (inner["standard"].min(), inner["standard"].max()) == (-850, 40)
    # A tenth to a fifth of the step, as bone kernels show it.
    for overshoot in (inner["sharp"].max() - 40, -850 - inner["sharp"].min()):
        assert 0.08 * 890 < overshoot < 0.22 * 890
    assert (inner["soft"].min(), inner["soft"].max()) == pytest.approx((-850, 40), abs=2)
    mixed = {kernel: np.count_nonzero((p > -850 + 45) & (p < 40 - 45)) for kernel, p in inner.items()}
    assert mixed["sharp"] == mixed["standard"] == 0
    assert mixed["soft"] >= 2


def test_noise_is_as_fine_as_its_kernel():
    x = 1.4 * np.arange(80, dtype=np.float32)
    grid = Grid(x, x, x[:20], 1.4, 1.4)
    neighbours = {}
    for kernel in ("soft", "standard", "sharp"):
        noise = acquire(np.zeros(grid.shape, np.float32), grid, kernel, 30.0, np.random.default_rng(1)).astype(float)
        inner = noise[20:60, 20:60]
        assert inner.std() == pytest.approx(30, rel=0.05)
        neighbours[kernel] = np.corrcoef(inner[1:].ravel(), inner[:-1].ravel())[0, 1]
    assert neighbours["soft"] > 0.6 > neighbours["standard"] > 0.3 > 0.1 > neighbours["sharp"]


@pytest.mark.parametrize("kernel", ["soft", "sharp"])
def test_the_truth_does_not_depend_on_the_kernel(small: Phantom, patients: list[Thorax], kernel: str):
    other = thorax(small.model_copy(update={"noise_hu": 0.0, "kernel": kernel}), 1)
    assert (other.ct.array != patients[1].ct.array).any()
    for name in ("lungs", "vessels", "vessel_radius_mm"):
        np.testing.assert_array_equal(getattr(other, name), getattr(patients[1], name))
    for one, another in zip(other.nodules, patients[1].nodules, strict=True):
        np.testing.assert_array_equal(one.mask, another.mask)


# ------------------------------------------------------------------ vessels


def test_tree_obeys_murrays_law():
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 100, (2000, 3))
    tree = grow_tree(points, np.zeros(3), np.array([1.0, 0, 0]), 6.0, rng)
    assert tree.radius_mm[0] == 6.0
    assert tree.parent[0] == -1
    assert (tree.parent[1:] < np.arange(1, len(tree.parent))).all()
    children = np.bincount(tree.parent[1:], minlength=len(tree.parent))
    assert set(children.tolist()) == {0, 2}
    cubes = np.bincount(tree.parent[1:], tree.radius_mm[1:] ** 3, minlength=len(tree.parent))
    forks = children == 2
    np.testing.assert_allclose(cubes[forks], tree.radius_mm[forks] ** 3, rtol=1e-9)
    np.testing.assert_allclose(tree.start[1:], tree.end[tree.parent[1:]])
    # Volume-filling: no point of the tissue is far from a vessel's end.
    ends = tree.end[~forks]
    assert max(np.linalg.norm(ends - p, axis=1).min() for p in points) < 20


def test_vessels_lie_in_the_lungs_and_taper(clean: Thorax):
    assert (clean.lungs | ~clean.vessels).all()
    assert (clean.vessel_radius_mm[clean.vessels] > 0).all()
    share = clean.vessels.sum() / clean.lungs.sum()
    assert 0.01 < share < 0.1
    lateral_mm = np.abs(clean.ct.affine[0, 0] * np.arange(clean.ct.shape[0]) + clean.ct.affine[0, 3])
    widest = [clean.vessel_radius_mm[(lateral_mm > low) & (lateral_mm <= low + 20)].max() for low in (50, 80, 110)]
    assert widest[0] > 1.5 * widest[1] > 1.5 * widest[2] > 0


def test_rods_keep_the_volume_of_tubes_thinner_than_a_voxel():
    axis = np.arange(20, dtype=np.float32)
    grid = Grid(2 * axis, 2 * axis, 3 * axis, 2.0, 3.0)
    points = np.linspace([8, 9, 9], [30, 25, 48], 80)
    for radius in (0.3, 0.6, 2.5):
        share, widest = fill_rods(grid, rods_between(points[:-1], points[1:], np.full((79, 2), radius)))
        length = np.linalg.norm(points[-1] - points[0])
        assert share.sum() * 12 == pytest.approx(np.pi * radius**2 * length, rel=0.03)
        assert (widest[share > 0] == np.float32(radius)).all()
        assert (widest[share == 0] == 0).all()


# ------------------------------------------------------------------ nodules


def test_nodules_are_in_the_lungs_and_disjoint(clean: Thorax, patients: list[Thorax]):
    for truth in [clean, *patients]:
        assert 1 <= len(truth.nodules) <= 3
        assert not truth.vessels[np.any([n.mask for n in truth.nodules], axis=0)].any()
        for nodule in truth.nodules:
            assert (truth.lungs | ~nodule.mask).mean() == 1
            touches = (binary_dilation(nodule.mask, iterations=2) & ~truth.lungs).any()
            if nodule.attachment == "pleura":
                assert touches
            if nodule.attachment == "isolated" and nodule.margin == "smooth":
                assert not (binary_dilation(nodule.mask) & ~truth.lungs).any()
            voxel = np.rint(np.linalg.inv(truth.ct.affine) @ (*nodule.centre_mm, 1))[:3].astype(int)
            assert nodule.mask[tuple(voxel)]
        assert np.sum([n.mask for n in truth.nodules], axis=0).max() == 1
        _, parts = label(binary_dilation(np.any([n.mask for n in truth.nodules], axis=0)), np.ones((3, 3, 3)))
        assert parts == len(truth.nodules)


def test_smooth_nodule_fills_the_sphere_of_its_diameter():
    parameters = Phantom(matrix=110, pixel_mm=3.2, slice_mm=4, nodules=(3, 3), nodule_diameter_mm=(26, 26))
    checked = 0
    for seed in (0, 1, 2):
        truth = thorax(parameters, seed)
        for nodule in truth.nodules:
            volume = nodule.mask.sum() * truth.ct.voxel_mm3
            assert volume == pytest.approx(np.pi / 6 * nodule.diameter_mm**3, rel=0.1)
            if nodule.margin == "smooth" and nodule.attachment != "pleura":
                assert nodule.diameter_mm == pytest.approx(26, rel=0.02)
                checked += 1
    assert checked


@pytest.mark.parametrize("margin", ["smooth", "lobulated", "spiculated"])
def test_shapes_have_the_volume_of_their_sphere(margin: str):
    rng = np.random.default_rng(2)
    axis = np.arange(-30, 31, 2, dtype=np.float32)
    grid = Grid(axis, axis, axis, 2.0, 2.0)
    shape = draw_shape(10.0, margin, rng)
    _, share = shape_share(grid, shape, np.zeros(3))
    assert share.sum() * 8 == pytest.approx(4 / 3 * np.pi * 1000, rel=0.03)


# ------------------------------------------------------------------ seeds


def test_equal_seeds_give_equal_patients_and_others_differ(
    small: Phantom, cohort_seeds: list[int], cohort_truths: list[Thorax]
):
    first, other = cohort_truths
    again = thorax(small, cohort_seeds[0])
    np.testing.assert_array_equal(first.ct.array, again.ct.array)
    np.testing.assert_array_equal(first.ct.affine, again.ct.affine)
    np.testing.assert_array_equal(first.vessel_radius_mm, again.vessel_radius_mm)
    assert [n.diameter_mm for n in first.nodules] == [n.diameter_mm for n in again.nodules]
    assert first.ct.shape != other.ct.shape or (first.ct.array != other.ct.array).mean() > 0.5
