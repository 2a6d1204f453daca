"""From headers to a grid: rounded positions, and what lies among the slices of a series without being one."""

from pathlib import Path

import numpy as np
import pytest
from lidc_files import UPRIGHT

from lungddpm.errors import ExcludedCaseError
from lungddpm.sources import lidc


def stack_at(positions, axes=UPRIGHT):
    """The stack of slices whose headers have these positions, (slices, 3) in mm, and `axes` as in `write_slice`."""
    orientation = np.concatenate([axes[:, 0], axes[:, 1]])
    elements = {"Rows": "12", "Columns": "10", "PixelSpacing": "0.8\\0.7", "ImageOrientationPatient": text(orientation)}
    headers = [
        lidc.Header(Path("series", f"{k:04d}.dcm"), elements | {"ImagePositionPatient": text(position)})
        for k, position in enumerate(positions)
    ]
    return lidc.stack_of(headers[::-1])


def text(values):
    return "\\".join(map(repr, map(float, values)))


def line(spacing, count, start, direction=(0, 0, 1)):
    return np.array([-170.0, -171.37, start]) + np.outer(np.arange(count) * spacing, direction)


def middle_of(stack):
    """Where the first pixel of the middle of the stack lies, LPS."""
    return (stack.affine @ [0, 0, (stack.size[2] - 1) / 2, 1])[:3] * [-1, -1, 1]


# ---------------------------------------------------------------- rounded positions

ROUNDED = {
    "1.25 mm to 1 decimal": (1.25, 120, 1),
    "0.625 mm to 1 decimal": (0.625, 300, 1),
    "0.625 mm to 2 decimals": (0.625, 300, 2),
    "0.7 mm to 1 decimal": (0.7, 60, 1),
    "2.5 mm to whole mm": (2.5, 60, 0),
    "1.25 mm to 1 decimal, five slices": (1.25, 5, 1),
    "0.625 mm to 1 decimal, three slices": (0.625, 3, 1),
    "a third of a mm to 1 decimal": (1 / 3, 60, 1),
    "0.8 mm to 6 decimals": (0.8, 60, 6),
}


@pytest.mark.parametrize("start", [-100.0, -101.37, 0.03, 7.777])
@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_positions_make_an_even_grid(name, start):
    spacing, count, decimals = ROUNDED[name]
    truth = line(spacing, count, start)
    stack = stack_at(truth.round(decimals))
    # Many rounded positions tell the spacing better than two.
    assert stack.spacing_mm[2] == pytest.approx(spacing, abs=1.5 * 10**-decimals / count)
    np.testing.assert_allclose(middle_of(stack), truth.mean(axis=0), atol=0.51 * 10**-decimals)
    np.testing.assert_allclose(stack.affine[:2, 2], 0, atol=1e-12)


def test_rounding_in_plane_is_no_tilt():
    angle = np.deg2rad(20)
    axes = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    truth = line(1.25, 80, -50.0, axes[:, 2])
    stack = stack_at(truth.round(1), axes)
    np.testing.assert_allclose(stack.affine[:3, 2] * [-1, -1, 1], 1.25 * axes[:, 2], atol=2e-3)
    columns, rows, slices = stack.affine[:3, :3].T
    assert abs(slices @ columns) < 1e-9
    assert abs(slices @ rows) < 1e-9


@pytest.mark.parametrize("gone", [1, 5, 20])
@pytest.mark.parametrize("name", [name for name in ROUNDED if "slices" not in name])
def test_missing_slices_are_found_among_rounded_positions(name, gone):
    spacing, count, decimals = ROUNDED[name]
    positions = np.delete(line(spacing, count, -101.37), range(20, 20 + gone), axis=0)
    with pytest.raises(ExcludedCaseError, match=rf": {gone} slice\(s\) missing between 0019.dcm and 0020.dcm"):
        stack_at(positions.round(decimals))


@pytest.mark.parametrize(("spacing", "decimals", "moved"), [(1.25, 1, 0.2), (0.625, 2, 0.05), (2.5, 3, 0.06)])
def test_a_slice_out_of_place_is_found_among_rounded_positions(spacing, decimals, moved):
    positions = line(spacing, 40, -100.0)
    positions[17, 2] += moved
    with pytest.raises(ExcludedCaseError, match=r"001[678].dcm are .* mm apart, the others"):
        stack_at(positions.round(decimals))


def test_a_slice_shifted_sideways_is_named():
    positions = line(1.25, 40, -100.0)
    positions[17, 0] += 0.5
    with pytest.raises(ExcludedCaseError, match="0017.dcm is shifted sideways"):
        stack_at(positions.round(1))


def test_even_positions_keep_their_grid():
    positions = line(2.5, 40, -340.125)
    stack = stack_at(positions)
    np.testing.assert_allclose(stack.affine[:3, 3] * [-1, -1, 1], positions[0], rtol=0, atol=1e-9)
    np.testing.assert_allclose(stack.affine[:3, 2], [0, 0, 2.5], rtol=0, atol=1e-12)
