"""Orientation and planes against a marked volume; files that come out the same twice."""

import numpy as np
import pytest
from matplotlib import pyplot as plt

from lungddpm.core.drawing import PLANES, largest_nodule, oriented_slice, save
from lungddpm.core.labels import Label
from lungddpm.core.volume import Volume

AXIAL, CORONAL, SAGITTAL = PLANES


@pytest.mark.parametrize(
    ("plane", "voxel", "place"),
    [
        # RAS+: high x is the patient's right-to-left end on R, high y is anterior, high z is the head.
        (AXIAL, (9, 4, 3), (3, 0)),
        (AXIAL, (5, 7, 3), (0, 4)),
        (CORONAL, (9, 4, 3), (2, 0)),
        (CORONAL, (5, 4, 5), (0, 4)),
        (SAGITTAL, (5, 7, 3), (2, 0)),
        (SAGITTAL, (5, 4, 5), (0, 3)),
    ],
)
def test_pictures_follow_radiological_convention(plane, voxel, place):
    array = np.zeros((10, 8, 6))
    array[voxel] = 1
    picture = oriented_slice(array, plane, voxel[plane.axis])
    assert [tuple(index) for index in np.argwhere(picture)] == [place]


def test_sides_name_what_lies_at_each_edge():
    # In RAS+, +x is right (left edge of the page), +y anterior, +z head.
    assert AXIAL.sides == ("R", "L", "A", "P")
    assert CORONAL.sides == ("R", "L", "H", "F")
    assert SAGITTAL.sides == ("A", "P", "H", "F")


@pytest.fixture
def layout():
    array = np.zeros((20, 18, 16), np.uint8)
    array[4, 5, 5] = Label.NODULE
    array[12:15, 8:11, 9:12] = Label.NODULE
    return Volume(array, np.diag([3.0, 4.0, 5.0, 1.0]))


def test_planes_go_through_the_largest_nodule(layout):
    assert largest_nodule(layout) == (13, 9, 10)
    assert largest_nodule(layout.like(np.zeros_like(layout.array))) == (10, 9, 8)


def test_a_curved_nodule_is_cut_where_it_is(layout):
    ring = np.zeros_like(layout.array)
    ring[5:12, 5:12, 8] = Label.NODULE
    ring[6:11, 6:11, 8] = 0
    assert ring[largest_nodule(layout.like(ring))] == Label.NODULE


def test_figures_saved_twice_are_identical(tmp_path):
    for name in ("first", "second"):
        figure, axis = plt.subplots()
        axis.plot([1, 2], label="a line")
        save(figure, tmp_path / f"{name}.svg", tmp_path / f"{name}.png")
    for suffix in (".svg", ".png"):
        assert (tmp_path / f"first{suffix}").read_bytes() == (tmp_path / f"second{suffix}").read_bytes()
