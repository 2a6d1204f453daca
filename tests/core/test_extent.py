"""Long axis, short axis and elongation against ellipsoids whose axes are known, and against ITK."""

import numpy as np
import pytest
import SimpleITK
from scipy.spatial.transform import Rotation
from skimage.draw import polygon2mask

from lungddpm.core.extent import extent_of

SPACINGS = [(0.7, 0.7, 1.25), (0.6, 0.6, 2.5), (1.0, 1.4, 0.8), (2.5, 2.5, 2.5)]
BODIES = [((12, 7, 5), (0, 0, 0)), ((12, 7, 5), (30, 20, 65)), ((9, 8.5, 4), (90, 0, 0)), ((14, 6, 6), (10, 50, 140))]


def matrix_of(semi_axes_mm, degrees):
    """A of the ellipsoid x' A x <= 1."""
    turn = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    return turn @ np.diag(1 / np.square(semi_axes_mm, dtype=float)) @ turn.T


def ellipsoid(matrix, spacing_mm):
    n = 2 * np.ceil(16 / np.array(spacing_mm)).astype(int) + 1
    x = (np.indices(n).reshape(3, -1).T - (n - 1) / 2 + [0.2, 0.1, 0.0]) * spacing_mm
    return (np.einsum("ni,ij,nj->n", x, matrix, x) <= 1).reshape(n)


@pytest.mark.parametrize("spacing_mm", SPACINGS)
@pytest.mark.parametrize(("semi_axes_mm", "degrees"), BODIES)
def test_axes_are_those_of_the_ellipse_in_the_central_slice(semi_axes_mm, degrees, spacing_mm):
    matrix = matrix_of(semi_axes_mm, degrees)
    # Slices of an ellipsoid are ellipses of one form, the central one the largest.
    short_mm, long_mm = sorted(2 / np.sqrt(np.linalg.eigvalsh(matrix[:2, :2])))
    found = extent_of(ellipsoid(matrix, spacing_mm), spacing_mm)
    pixel_mm = max(spacing_mm[:2])
    assert found.long_axis_mm == pytest.approx(long_mm, abs=pixel_mm)
    assert found.short_axis_mm == pytest.approx(short_mm, abs=1.5 * pixel_mm)


@pytest.mark.parametrize("spacing_mm", SPACINGS)
@pytest.mark.parametrize(("semi_axes_mm", "degrees"), BODIES)
def test_elongation_is_that_of_the_semi_axes_however_it_is_turned(semi_axes_mm, degrees, spacing_mm):
    longest, second, _ = sorted(semi_axes_mm, reverse=True)
    found = extent_of(ellipsoid(matrix_of(semi_axes_mm, degrees), spacing_mm), spacing_mm)
    # Voxels count as boxes, which rounds a body off where its slices are thick.
    assert found.elongation == pytest.approx(second / longest, abs=0.05)


@pytest.mark.parametrize("degrees", [0, 20, 65, 110])
def test_axes_agree_with_the_feret_diameter_of_itk(degrees):
    mask = ellipsoid(matrix_of((12, 7, 5), (0, 0, degrees)), (0.7, 0.7, 1.0))
    middle = int(np.count_nonzero(mask, axis=(0, 1)).argmax())
    image = SimpleITK.GetImageFromArray(mask[:, :, middle].T.astype(np.uint8))
    image.SetSpacing((0.7, 0.7))
    shape = SimpleITK.LabelShapeStatisticsImageFilter()
    shape.ComputeFeretDiameterOn()
    shape.Execute(image)
    # ITK measures between pixel centres, half a pixel inside the outline at either end.
    feret_mm = shape.GetFeretDiameter(1)
    assert feret_mm < extent_of(mask, (0.7, 0.7, 1.0)).long_axis_mm <= feret_mm + 0.7 + 1e-6


def test_a_single_voxel_and_a_line_have_their_own_size():
    mask = np.zeros((5, 4, 3), bool)
    mask[2, 1, 1] = True
    single = extent_of(mask, (0.5, 2.0, 1.0))
    assert (single.long_axis_mm, single.short_axis_mm, single.elongation) == pytest.approx((2.0, 0.5, 0.5))
    mask[1:4, 1, 1] = True
    line = extent_of(mask, (1.0, 1.0, 1.0))
    assert (line.long_axis_mm, line.short_axis_mm) == pytest.approx((3.0, 1.0))
    assert line.elongation == pytest.approx(1 / 3)


def test_the_long_axis_lies_within_one_slice():
    """A rod that rises through the slices is as long as what any one slice shows of it."""
    mask = np.zeros((12, 3, 12), bool)
    mask[range(12), 1, range(12)] = True
    assert extent_of(mask, (1.0, 1.0, 1.0)).long_axis_mm == 1.0


def test_the_short_axis_is_the_longest_chord_across_the_long_one_not_the_width_of_the_whole_body():
    """RECIST's short axis lies in the body: a bow is as wide as its band is thick, however far it bends."""
    bow = np.zeros((13, 9, 3), bool)
    for x in range(13):
        bow[x, abs(x - 6) : abs(x - 6) + 2, 1] = True
    found = extent_of(bow, (1.0, 1.0, 1.0))
    assert found.long_axis_mm == pytest.approx(13, abs=0.1)
    assert found.short_axis_mm == pytest.approx(2, abs=0.2)


def test_the_short_axis_of_a_sheared_body_is_shorter_than_its_width():
    """Across the long diagonal of a parallelogram, no chord is longer than between the long sides, 10 mm apart."""
    corners_mm = np.array([(10, 10), (60, 10), (70, 20), (20, 20)])
    region = polygon2mask((320, 120), corners_mm / 0.25)
    found = extent_of(region[:, :, None], (0.25, 0.25, 1.0))
    diagonal_mm = np.hypot(60, 10)
    assert found.long_axis_mm == pytest.approx(diagonal_mm, abs=0.5)
    # The corners beside the diagonal are 16.4 mm apart across it.
    assert found.short_axis_mm == pytest.approx(10 * diagonal_mm / 60, abs=0.5)


def test_the_short_axis_does_not_bridge_a_gap():
    """Two prongs in one slice, joined in the next."""
    fork = np.zeros((9, 5, 3), bool)
    fork[1:8, [1, 3], 1] = True
    fork[1, 1:4, 2] = True
    assert extent_of(fork, (1.0, 1.0, 1.0)).short_axis_mm == pytest.approx(1, abs=0.1)
