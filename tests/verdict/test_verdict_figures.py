"""Orientation and planes against a marked volume; files that come out the same twice."""

import numpy as np
import pandas as pd
import pytest

from lungddpm.layouts import Label
from lungddpm.verdict.figures import (
    PLANES,
    case_plot,
    forest_plot,
    largest_nodule,
    montage,
    oriented_slice,
    save,
    training_curve,
)
from lungddpm.volume import Volume

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


def volumes():
    layout = np.zeros((20, 18, 16), np.uint8)
    layout[2:18, 3:15, 2:14] = Label.LUNG
    layout[4, 5, 5] = Label.NODULE
    layout[12:15, 8:11, 9:12] = Label.NODULE
    ct = np.where(layout == Label.LUNG, -850, 30).astype(np.int16)
    affine = np.diag([3.0, 4.0, 5.0, 1.0])
    return Volume(ct, affine), Volume(layout, affine), Volume(ct + 10 * (layout > 0), affine)


def test_planes_go_through_the_largest_nodule():
    _, layout, _ = volumes()
    assert largest_nodule(layout) == (13, 9, 10)
    assert largest_nodule(layout.like(np.zeros_like(layout.array))) == (10, 9, 8)


def test_a_curved_nodule_is_cut_where_it_is():
    _, layout, _ = volumes()
    ring = np.zeros_like(layout.array)
    ring[5:12, 5:12, 8] = Label.NODULE
    ring[6:11, 6:11, 8] = 0
    assert ring[largest_nodule(layout.like(ring))] == Label.NODULE


def test_montage_has_true_proportions_and_the_nodule_in_the_close_up():
    figure = montage(*volumes(), title="a sample")
    axes = np.array(figure.axes[:16]).reshape(4, 4)
    assert axes[0, 0].images[0].get_extent() == [0, 60, 0, 72]
    assert axes[1, 0].images[0].get_extent() == [0, 60, 0, 80]
    assert axes[2, 0].images[0].get_extent() == [0, 72, 0, 80]
    assert all(axis.get_aspect() == 1 for axis in axes.flat)
    (left, right), (bottom, top) = axes[3, 0].get_xlim(), axes[3, 0].get_ylim()
    assert left <= 60 - 13.5 * 3 <= right
    assert bottom <= 9.5 * 4 <= top
    assert {text.get_text() for text in axes[0, 0].texts} == set("RLAP")


def test_montage_without_a_layout_does_not_fail():
    reference, layout, synthetic = volumes()
    montage(reference, layout.like(np.zeros_like(layout.array)), synthetic, title="background only")


def test_figures_are_saved_twice_alike(tmp_path):
    history = pd.DataFrame({"step": range(10), "loss": np.linspace(1, 0.1, 10)})
    first = save(training_curve(history), tmp_path / "first" / "training")
    second = save(training_curve(history), tmp_path / "second" / "training")
    assert [path.suffix for path in first] == [".svg", ".png"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_forest_plot_shows_arms_but_not_the_baseline():
    row = {"metric": "dice", "ci_low": -0.1, "ci_high": 0.2, "verdict": "no difference shown"}
    verdict = pd.DataFrame([{"arm": "real", "difference": np.nan, **row}, {"arm": "other", "difference": 0.05, **row}])
    (axis,) = forest_plot(verdict, {"dice": "Dice"}, confidence=0.95).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["other"]
    assert axis.texts[0].get_text() == "+0.050  (−0.100 to +0.200)"
    assert "95 % CI" in axis.get_xlabel()


def test_plots_of_nothing_say_so():
    verdict = pd.DataFrame([{"arm": "real", "metric": "dice", "difference": np.nan}])
    cases = pd.DataFrame([{"arm": "real", "case_id": "a", "dice": np.nan}])
    assert forest_plot(verdict, {"dice": "Dice"}, 0.95).texts[0].get_text() == "no arm could be compared"
    assert "no test case" in case_plot(cases, "dice", "Dice").texts[0].get_text()
