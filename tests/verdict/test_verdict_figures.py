"""What the figures show, read from their axes."""

import numpy as np
import pandas as pd

from lungddpm.layouts import Label
from lungddpm.verdict.figures import case_plot, forest_plot, montage
from lungddpm.volume import Volume


def volumes():
    layout = np.zeros((20, 18, 16), np.uint8)
    layout[2:18, 3:15, 2:14] = Label.LUNG
    layout[4, 5, 5] = Label.NODULE
    layout[12:15, 8:11, 9:12] = Label.NODULE
    ct = np.where(layout == Label.LUNG, -850, 30).astype(np.int16)
    affine = np.diag([3.0, 4.0, 5.0, 1.0])
    return Volume(ct, affine), Volume(layout, affine), Volume(ct + 10 * (layout > 0), affine)


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
