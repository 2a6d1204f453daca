"""Vessels against the phantom's truth and analytic tubes."""

import numpy as np
import pytest
from scipy import ndimage

from lungddpm.core.volume import Volume
from lungddpm.layouts.vessels import segment_vessels


@pytest.fixture(scope="module")
def vessels(patient):
    found = segment_vessels(patient.ct, patient.lungs)
    # A layout gives nodules priority.
    return found & ~np.any(patient.nodules, axis=0)


def test_vessels_of_2_mm_radius_and_more_are_found(patient, vessels):
    assert vessels[patient.vessels & (patient.vessel_radius_mm >= 2)].mean() > 0.95


def test_what_is_found_is_vessel(patient, vessels):
    near = ndimage.binary_dilation(patient.vessel_radius_mm > 0, np.ones((3, 3, 3)))
    assert near[vessels].mean() > 0.97
    assert np.count_nonzero(vessels) < 1.4 * np.count_nonzero(patient.vessels)


def test_vessels_stay_in_the_lungs(patient, vessels):
    assert vessels.dtype == bool
    assert not (vessels & ~patient.lungs).any()


def scene(spacing):
    """A lung of -850 HU in tissue, 60 mm wide, sampled with partial volume: coordinates in mm and share function."""
    shape = np.ceil(np.array([60, 60, 60]) / spacing).astype(int)
    grid = np.meshgrid(*[(np.arange(n) + 0.5) * s for n, s in zip(shape, spacing, strict=True)], indexing="ij")
    lungs = np.all([(g > 6) & (g < 54) for g in grid], axis=0)
    return grid, lungs, np.diag([*spacing, 1.0])


def volume_of(distance_mm, lungs, affine, spacing, noise_hu=20):
    share = np.clip(0.5 - distance_mm / np.mean(spacing), 0, 1)
    hu = np.where(lungs, -850 + 890 * share, 40) + np.random.default_rng(0).normal(0, noise_hu, lungs.shape)
    return Volume(hu.astype(np.int16), affine)


FINE, THICK, COARSE = (0.7, 0.7, 1.25), (1.0, 1.0, 2.5), (2.2, 2.2, 3.0)


@pytest.mark.parametrize(
    ("spacing", "radius_mm"), [(FINE, 1.5), (FINE, 4.0), (THICK, 1.5), (THICK, 2.0), (COARSE, 2.0), (COARSE, 4.0)]
)
@pytest.mark.parametrize("along", [0, 2])
def test_a_straight_tube(spacing, radius_mm, along):
    grid, lungs, affine = scene(np.array(spacing))
    across = [g for axis, g in enumerate(grid) if axis != along]
    distance = np.hypot(across[0] - 30.3, across[1] - 29.6) - radius_mm
    found = segment_vessels(volume_of(distance, lungs, affine, spacing), lungs)
    inner = lungs & (grid[along] > 12) & (grid[along] < 48)
    assert found[inner & (distance < -0.3)].mean() > 0.9
    assert not found[inner & (distance > 1.5 * max(spacing))].any()


def test_a_fissure_is_not_a_vessel():
    spacing = (1.0, 1.0, 1.25)
    grid, lungs, affine = scene(np.array(spacing))
    distance = np.abs(grid[0] + 0.4 * grid[2] - 42) / np.hypot(1, 0.4) - 0.6
    assert not segment_vessels(volume_of(distance, lungs, affine, spacing), lungs).any()


def test_noise_alone_is_not_a_vessel():
    spacing = (0.7, 0.7, 1.25)
    grid, lungs, affine = scene(np.array(spacing))
    assert not segment_vessels(volume_of(grid[0] + 99, lungs, affine, spacing, noise_hu=60), lungs).any()


def test_a_plaque_on_the_pleura_is_not_a_vessel():
    """20 mm long and wide, 4 mm thick: its edges bend like a vessel."""
    spacing = (0.7, 0.7, 1.25)
    grid, lungs, affine = scene(np.array(spacing))
    plaque = np.maximum(grid[0] - 10, np.maximum(np.abs(grid[1] - 30), np.abs(grid[2] - 30)) - 10)
    assert not segment_vessels(volume_of(plaque, lungs, affine, spacing), lungs).any()


def test_contrast_and_a_sharp_kernel_do_no_harm(patient):
    noise = np.random.default_rng(0).normal(0, 60, patient.ct.shape)
    hu = np.where(patient.vessels, 350, patient.ct.array) + noise
    found = segment_vessels(patient.ct.like(hu.astype(np.int16)), patient.lungs)
    found &= ~np.any(patient.nodules, axis=0)
    near = ndimage.binary_dilation(patient.vessel_radius_mm > 0, np.ones((3, 3, 3)))
    assert found[patient.vessels & (patient.vessel_radius_mm >= 2)].mean() > 0.95
    assert near[found].mean() > 0.95


def test_without_lungs_there_are_no_vessels(patient):
    assert not segment_vessels(patient.ct, np.zeros(patient.ct.shape, np.uint8)).any()
