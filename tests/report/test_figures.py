"""What the figures show, read from their axes."""

import numpy as np
import pandas as pd
import pytest

from lungddpm.core.labels import Label
from lungddpm.core.volume import Volume
from lungddpm.report.figures import (
    case_plot,
    cost_plot,
    dose_response_plot,
    fidelity_plot,
    forest_plot,
    froc_plot,
    montage,
    paired_plot,
    quality_bars,
    real_cases_plot,
    run_plot,
    segmenter_curves,
    side_by_side,
)


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


def test_generators_are_side_by_side_with_true_proportions_and_one_scale():
    reference, layout, synthetic = volumes()
    drawn = {name: synthetic.like(synthetic.array + n) for n, name in enumerate("abcd")}
    axes = [axis for axis in side_by_side(reference, layout, drawn).axes if axis.get_visible()]
    titles = {axis.get_title(): axis for axis in axes if axis.get_title()}
    assert list(titles) == ["reference CT", "layout", "a", "b", "c", "d"]
    assert len(axes) == 2 * len(titles)
    # Every picture of CT shows its own volume at the same place, in the same window.
    for name, axis in titles.items():
        (image,) = axis.images
        assert image.get_extent() == [0, 60, 0, 72]
        if name in drawn:
            assert image.get_clim() == titles["reference CT"].images[0].get_clim()
            difference = np.asarray(image.get_array()) - np.asarray(titles["a"].images[0].get_array())
            assert np.all(difference == list(drawn).index(name))


def test_forest_plot_shows_arms_but_not_the_baseline():
    row = {"metric": "dice", "baseline": "real", "ci_low": -0.1, "ci_high": 0.2, "verdict": "no difference shown"}
    verdict = pd.DataFrame([{"arm": "real", "difference": np.nan, **row}, {"arm": "other", "difference": 0.05, **row}])
    (axis,) = forest_plot(verdict, {"dice": "Dice"}, confidence=0.95).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["other"]
    assert axis.texts[0].get_text() == "+0.050  (−0.100 to +0.200)"
    assert "95 % CI" in axis.get_xlabel()


def test_narrow_forest_plot_is_half_as_wide_and_names_arms_above_their_lines():
    row = {"metric": "dice", "baseline": "real", "ci_low": -0.1, "ci_high": 0.2, "verdict": "not trusted"}
    verdict = pd.DataFrame([{"arm": "real+lung_ddpm@1.0", "difference": 0.05, **row}])
    figure = forest_plot(verdict, {"dice": "Dice"}, confidence=0.95, narrow=True)
    (axis,) = figure.axes
    # 420 pixels of a telephone hold 3.6 inches at 108 pixels an inch: 8.5 points are 13 pixels.
    assert figure.get_figwidth() == 3.6
    assert axis.texts[0].get_text() == "real+lung_ddpm@1.0\n+0.050  (−0.100 to +0.200)"
    assert axis.lines[-1].get_marker() == "o"  # no claim


def test_plots_of_nothing_say_so():
    verdict = pd.DataFrame([{"arm": "real", "metric": "dice", "difference": np.nan}])
    cases = pd.DataFrame([{"arm": "real", "case_id": "a", "dice": np.nan}])
    assert forest_plot(verdict, {"dice": "Dice"}, 0.95).texts[0].get_text() == "no arm could be compared"
    assert "no test case" in case_plot(cases, "dice", "Dice").texts[0].get_text()
    verdict["real_cases"] = 4
    assert real_cases_plot(verdict, "Dice", 0.95).texts[0].get_text() == "no arm could be compared"


def test_froc_shows_every_arm_beside_the_baseline():
    rates = 2.0 ** np.arange(-3, 4)
    band = pd.concat(
        pd.DataFrame(
            {"arm": arm, "false_positives_per_scan": rates, "sensitivity": at, "ci_low": at - 0.1, "ci_high": at + 0.1}
        )
        for arm, at in (("real", 0.4), ("real+one@1.0", 0.5), ("real+two@1.0", 0.6))
    )
    panels = froc_plot(band, confidence=0.95).axes
    assert [axis.get_title(loc="left") for axis in panels] == ["real+one@1.0", "real+two@1.0"]
    for axis, at in zip(panels, (0.5, 0.6), strict=True):
        assert [set(line.get_ydata()) for line in axis.lines] == [{0.4}, {at}]
        assert [label.get_text() for label in axis.get_xticklabels()] == ["1/8", "1/4", "1/2", "1", "2", "4", "8"]
    assert len(froc_plot(band[band["arm"] == "real"], confidence=0.95).axes) == 1
    assert froc_plot(band.iloc[:0], confidence=0.95).texts[0].get_text() == "no lesion has a score"


def test_quality_bars_show_generators_above_the_floors():
    rows = [
        {"generator": generator, "image": image, "region": region, "metric": metric, "mean": mean, "sd": np.nan}
        | {"extractor": "ResNet-50, random weights" if metric == "mmd_squared" else ""}
        for generator, at in (("first", 1.0), ("second", 2.0))
        for image, mean in (("synthetic", at), ("constant lungs", 10 * at), ("shifted references", at / 4))
        for region, metric in (("lungs", "mse"), ("lungs", "mmd_squared"))
    ]
    figure = quality_bars(pd.DataFrame(rows))
    names = ["first", "second", "copies of the references", "constant lungs", "other patients"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == names
    assert figure.axes[0].get_ylim()[0] > figure.axes[0].get_ylim()[1]  # from top to bottom
    mse, fid = figure.axes[0], figure.axes[3]
    assert [bar.get_width() for bar in mse.patches][:2] == [1, 2]
    assert mse.patches[3].get_width() == 15
    # Each generator beside references of its own brightness.
    (own_floor,) = [line for line in mse.lines if line.get_marker() == "|"]
    assert own_floor.get_xdata().tolist() == [0.25, 0.5]
    assert [text.get_text() for text in mse.texts] == ["1", "2", "not measured", "15", "not measured"]
    labels = [axis.get_xlabel() for axis in figure.axes]
    assert [label.endswith("(random weights)") for label in labels] == [False, False, False, True, True, True]
    assert {text.get_text() for text in fid.texts} == {"not measured"}
    assert "no sample" in quality_bars(pd.DataFrame(rows).query("image != 'synthetic'")).texts[0].get_text()


def test_paired_plot_compares_a_case_with_itself_in_the_same_replicate():
    rows = [("real", "r0", "a", 0.5), ("real", "r0", "b", 0.4), ("real", "r1", "a", 0.9), ("real", "r1", "b", 0.9)]
    rows += [("real+one@1.0", "r0", "a", 0.6), ("real+one@1.0", "r0", "b", 0.1)]
    (axis,) = paired_plot(pd.DataFrame(rows, columns=["arm", "replicate", "case_id", "dice"]), "dice", "Dice").axes
    np.testing.assert_allclose(axis.lines[0].get_xdata(), [-0.3, 0.1])
    np.testing.assert_allclose(axis.lines[1].get_xdata(), [-0.1, -0.1])
    assert [text.get_text() for text in axis.texts] == ["−0.100", "mean"]


def test_run_plot_shows_the_mean_of_every_run():
    rows = [("real", "r0", "a", 0.5), ("real", "r0", "b", 0.3), ("real", "r1", "a", 0.9), ("real", "r1", "b", 0.7)]
    rows += [("one", "r0", "a", 0.6), ("one", "r0", "b", 0.2)]
    (axis,) = run_plot(pd.DataFrame(rows, columns=["arm", "replicate", "case_id", "dice"]), "dice", "Dice").axes
    np.testing.assert_allclose(axis.lines[0].get_xdata(), [0.4, 0.8])
    np.testing.assert_allclose(axis.lines[2].get_xdata(), [0.4])
    assert [label.get_text() for label in axis.get_yticklabels()] == ["real", "one"]


def test_dose_response_has_a_panel_for_each_generator():
    band = pd.DataFrame(
        [(name, dose, dose / 10, dose / 10 - 0.1, dose / 10 + 0.1) for name in ("a", "b") for dose in (0.0, 1.0, 2.0)],
        columns=["generator", "dose", "fitted", "ci_low", "ci_high"],
    ).assign(baseline="real")
    rows = [("real", np.nan, "baseline"), ("real+a@1.0", 0.1, "better"), ("real+a@2.0", np.nan, "not measured")]
    verdict = pd.DataFrame(rows, columns=["arm", "difference", "verdict"]).assign(
        baseline="real", ci_low=0.0, ci_high=0.2
    )
    figure = dose_response_plot(verdict, band, "Dice", 0.9)
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["a", "b"]
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xydata(), [[0, 0], [1, 0.1], [2, 0.2]])
    points = [line.get_xydata().tolist() for line in figure.axes[0].lines if line.get_marker() == "s"]
    assert points == [[[1.0, 0.1]]]
    assert "90 % CI" in figure.get_supylabel()


def test_gains_over_the_number_of_real_cases_have_a_panel_per_generator_and_a_line_per_dose():
    rows = [
        (f"real{'' if number == 16 else number}{added}", number, at + number / 100)
        for number in (4, 8, 16)
        for added, at in (("+a@1.0", 0.1), ("+a@2.0", 0.3), ("+real", -0.1))
    ]
    verdict = pd.DataFrame(rows, columns=["arm", "real_cases", "difference"])
    verdict = verdict.assign(ci_low=verdict["difference"] - 0.2, ci_high=verdict["difference"] + 0.2, verdict="better")
    baseline = {"arm": "real4", "real_cases": 4, "difference": np.nan, "verdict": "baseline"}
    figure = real_cases_plot(pd.concat([verdict, pd.DataFrame([baseline])]), "Dice", 0.95)
    panels = {axis.get_title(loc="left"): axis for axis in figure.axes}
    assert list(panels) == ["real+a", "real+real"]
    lines = [line.get_xydata() for line in panels["real+a"].lines if len(line.get_xdata()) == 3]
    np.testing.assert_allclose(lines, [[[4, at + 0.04], [8, at + 0.08], [16, at + 0.16]] for at in (0.1, 0.3)])
    assert [text.get_text() for text in panels["real+a"].get_legend().get_texts()] == ["1 x", "2 x"]
    assert [label.get_text() for label in panels["real+real"].get_xticklabels()] == ["4", "8", "16"]
    assert len(panels["real+a"].collections) == 2


@pytest.mark.parametrize("measure", ["training_loss", "pseudo_dice"])
def test_segmenter_curves_have_a_panel_for_each_arm(measure):
    rows = [(arm, f"r{n}", step, n + 1 / step) for arm in ("real", "real+real") for n in (0, 1) for step in (50, 150)]
    figure = segmenter_curves(pd.DataFrame(rows, columns=["arm", "replicate", "step", measure]), measure, "title")
    real, other = figure.axes
    assert (real.get_title(loc="left"), other.get_title(loc="left")) == ("real", "real+real")
    assert len(other.lines) == 3
    np.testing.assert_allclose(other.lines[0].get_ydata(), [0.5 + 1 / 50, 0.5 + 1 / 150])
    (shaded,) = other.patches
    assert (shaded.get_x(), shaded.get_x() + shaded.get_width()) == (100, 150)
    assert figure.get_supylabel() == "title"


def test_every_panel_has_figures_on_its_axis_of_steps():
    arms = ("real", "real+real", "real+lung_ddpm@1.0", "real+reference@1.0")
    rows = [(arm, "r0", step, 1 / step) for arm in arms for step in (50, 100)]
    curves = pd.DataFrame(rows, columns=["arm", "replicate", "step", "training_loss"])
    figure = segmenter_curves(curves, "training_loss", "loss")
    figure.canvas.draw()
    # Three panels and, in the second row, one: below the second and the third there is none.
    for axis in (axis for axis in figure.axes if axis.get_visible()):
        assert any(label.get_visible() and label.get_text() for label in axis.get_xticklabels())


def test_label_fidelity_has_a_line_for_each_generator_below_the_ceiling():
    names = {"lung_ddpm": 0.2, "(real CT)": 0.6, "paste_constant": 0.0}
    runs = pd.DataFrame(
        [(name, f"fold{fold}", value + 0.1 * fold, value) for name, value in names.items() for fold in (0, 1)],
        columns=["generator", "replicate", "dice", "recall"],
    )
    # Not the means of the dots: replicates judge different numbers of cases.
    table = pd.DataFrame(
        [("(real CT)", 0.62, 0.61), ("lung_ddpm", 0.27, 0.2), ("paste_constant", 0.04, 0.0)],
        columns=["generator", "dice_mean", "recall"],
    )
    figure = fidelity_plot(runs, table)
    dice, recall = figure.axes
    assert [label.get_text() for label in dice.get_yticklabels()] == ["(real CT)", "lung_ddpm", "paste_constant"]
    assert [text.get_text() for text in dice.texts] == ["0.62", "0.27", "0.04"]
    assert [text.get_text() for text in recall.texts] == ["0.61", "0.20", "0.00"]
    assert dice.lines[0].get_xdata() == pytest.approx([0.62, 0.62])


def test_costs_have_a_row_for_each_measure_and_a_column_for_each_cost():
    real = {"generator": "(real CT)", "label_fidelity_dice": 0.8, "kid_lungs": 0.1, "kid_lungs_standard_error": 0.01}
    slow = {"generator": "slow", "function_evaluations": 250, "seconds_per_volume": 50, "memory_mib": 900}
    slow |= {
        "label_fidelity_dice": 0.7,
        "nodule_hu_difference": -20,
        "kid_lungs": 0.3,
        "kid_lungs_standard_error": 0.05,
    }
    none = {"generator": "none", "function_evaluations": 0, "seconds_per_volume": 0.1, "memory_mib": 200}
    none |= {"label_fidelity_dice": 0.1, "nodule_hu_difference": 300, "kid_lungs": 0.9}
    external = {"generator": "of unknown cost", "label_fidelity_dice": 0.5}
    table = pd.DataFrame([real, slow, none, external]).assign(fid_lungs=np.nan)
    figure = cost_plot(table)
    axes = np.array(figure.axes).reshape(3, 3)
    assert [axis.get_ylabel().split("\n(")[0] for axis in axes[:, 0]] == [
        "label fidelity,\nDice", "nodule HU\nvs reference", "KID, lungs",
    ]  # fmt: skip
    assert [axis.get_xlabel() for axis in axes[-1]] == ["function evaluations", "seconds per volume", "memory, MiB"]
    for row, at in zip(axes, (0.8, 0, 0.1), strict=True):
        assert [axis.lines[0].get_ydata()[0] for axis in row] == [at] * 3
    points = [line.get_xydata().tolist() for line in axes[0, 0].lines if line.get_marker() not in ("None", "")]
    assert points == [[[250, 0.7]], [[0, 0.1]]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["slow", "none", "real CT"]
    left, right = axes[0, 0].get_xlim()
    assert left < 0 < 250 < right
    (bars,) = axes[2, 1].collections
    assert bars.get_segments()[0][:, 1].tolist() == pytest.approx([0.25, 0.35])
    assert "measured" in cost_plot(table[["generator"]].reindex(columns=table.columns)).texts[0].get_text()


def test_more_generators_than_colours_have_marks_of_their_own():
    names = [f"generator {number}" for number in range(20)]
    table = pd.DataFrame({"generator": names}).assign(
        function_evaluations=1, seconds_per_volume=1, memory_mib=1, label_fidelity_dice=0.5,
        nodule_hu_difference=np.nan, fid_lungs=np.nan, kid_lungs=np.nan, kid_lungs_standard_error=np.nan,
    )  # fmt: skip
    handles = cost_plot(table).legends[0].legend_handles[:-1]
    assert len({(handle.get_color(), handle.get_marker()) for handle in handles}) == 20
