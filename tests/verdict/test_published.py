"""The published figures against the file they were copied from, and their comparison with a run."""

import numpy as np
import pandas as pd
import pytest

from lungddpm.quality.feature_distances import MEDICALNET
from lungddpm.report.sections import show_published
from lungddpm.verdict import published
from lungddpm.verdict.published import published_figures, published_gain

STAND_INS = {"Lung-DDPM": "lung_ddpm", "Med-DDPM": "med_ddpm", "Pix2pix3D": "pix2pix3d"}


def published_comparison(verdict, *arguments, **options):
    return published.published_comparison(verdict, STAND_INS, *arguments, **options)


@pytest.fixture
def verdict():
    arms = {"real": (0.30, np.nan), "real+lung_ddpm@1.0": (0.35, 0.05), "real+lung_ddpm@0.25": (0.32, 0.02)}
    return pd.DataFrame(
        [
            {"arm": arm, "baseline": "real", "real_cases": 10, "metric": metric}
            | {"mean": mean, "sd": 0.1, "difference": difference}
            for arm, (mean, difference) in arms.items()
            for metric in ("dice", "sensitivity")
        ]
    )


def row_of(comparison, **wanted):
    rows = comparison[np.logical_and.reduce([comparison[name] == value for name, value in wanted.items()])]
    assert len(rows) == 1
    return rows.iloc[0]


def test_figures_equal_their_source(shared_data):
    source = pd.read_csv(shared_data.parent / "reference" / "published_results.csv", keep_default_na=False, dtype=str)
    ours = published_figures().head(len(source))
    names = ["table", "source", "cohort", "method", "condition", "training_set", "metric"]
    assert ours[names].equals(source[names])
    assert ours["mean"].tolist() == source["mean"].astype(float).tolist()
    assert ours["sd"].isna().tolist() == (source["sd"] == "").tolist()


def test_what_the_source_file_lacks_was_added():
    figures = published_figures()
    specificity = figures[figures["metric"] == "specificity"]
    # Of real data alone, and of four methods on three training sets: .9999, but for two.
    assert len(specificity[specificity["reported"] == "yes"]) == 1 + 4 * 3
    other = specificity[specificity["mean"] != 0.9999].dropna(subset="mean").set_index("method")
    assert other["mean"].to_dict() == {"GEM-3D": 0.9980, "Med-DDPM": 0.9998}
    assert set(other["training_set"]) == {"800 real + 183 LIDC synthetic"}
    seconds = figures[(figures["cohort"] == "512x512x16")].set_index("method")["mean"]
    assert seconds.to_dict() == {"Lung-DDPM+": 3.79, "Lung-DDPM": 45.42, "Med-DDPM": 45.89, "GEM-3D": 34.10}
    evaluations = figures[figures["metric"] == "function_evaluations"].set_index("method")["mean"]
    assert evaluations.to_dict() == {"Lung-DDPM": 250, "Med-DDPM": 250, "GEM-3D": 1800, "Lung-DDPM+": 102}
    steps = figures[figures["table"] == "sampling"].groupby("method")["steps"].unique().map(list)
    assert steps.to_dict() == {"Lung-DDPM": ["250"], "Med-DDPM": ["250"], "GEM-3D": ["200"], "Lung-DDPM+": ["50"]}
    maisi = figures[(figures["method"] == "MAISI-v2") & (figures["metric"] == "FID")].set_index("steps")["mean"]
    assert maisi.to_dict() == {"5": 20.33, "10": 4.42, "20": 2.65, "30": 2.32, "50": 2.06, "100": 1.97}
    # Dice of segmenters trained on real data, and with each system's CT added.
    dice = figures[figures["source"].str.startswith("MAISI-v2") & (figures["metric"] == "dice")]
    assert {key: rows.set_index("method")["mean"].to_dict() for key, rows in dice.groupby("cohort")} == {
        "lung tumours": {
            "real only": 0.581, "MAISI-v2": 0.655, "MAISI v1": 0.635, "ControlNet without contrast loss": 0.627,
        },
        "colon tumours": {"real only": 0.449, "ControlNet without contrast loss": 0.402},
    }  # fmt: skip
    assert (dice["table"] == "context").all()
    lefusion = figures[figures["source"].str.startswith("LeFusion")]
    assert lefusion["mean"].tolist() == [0.7826, 0.7877, 0.8062, 0.8344]


def test_what_was_not_published_has_rows_that_say_so():
    figures = published_figures()
    missing = figures[figures["reported"] == "no"]
    assert set(zip(missing["method"], missing["metric"], strict=True)) == {
        (method, metric) for method in ("HA-GAN", "Pix2pix3D") for metric in ("dice", "sensitivity", "specificity")
    }
    assert len(missing) == 2 * 3 * 3
    assert missing["mean"].isna().all()
    assert figures.loc[figures["reported"] == "yes", "mean"].notna().all()


def test_what_a_spread_is_over_is_said_of_every_spread():
    figures = published_figures()
    assert set(figures["reported"]) == {"yes", "no"}
    assert set(figures.loc[figures["sd"].notna(), "spread_over"]) <= {"folds", "cases", "unknown"}
    assert (figures.loc[figures["sd"].isna(), "spread_over"] == "").all()
    segmentation = figures[(figures["table"] == "segmentation") & (figures["reported"] == "yes")]
    assert set(segmentation["n"]) == {"249"}


def test_what_was_not_reported_is_next_to_what_was_measured():
    rows = [
        {"arm": arm, "baseline": "real", "real_cases": 10, "metric": "dice", "mean": 0.4, "sd": 0.1, "difference": 0.1}
        for arm in ("real", "real+pix2pix3d@1.0")
    ]
    row = row_of(
        published_comparison(pd.DataFrame(rows)),
        method="Pix2pix3D", training_set="800 real + 800 IUCPQ synthetic", metric="dice",
    )  # fmt: skip
    assert (row["arm"], row["measured_mean"], row["why_not"]) == ("real+pix2pix3d@1.0", 0.4, "not reported")
    shown, reasons = show_published(pd.DataFrame([row]))
    assert shown.rows[0][shown.heads.index("published")] == "not reported"
    assert reasons == ["not reported"]


def test_the_row_of_a_method_without_layouts_says_where_its_ct_may_enter(verdict):
    rows = published_comparison(verdict)
    for why_not in rows.loc[rows["method"] == "HA-GAN", "why_not"]:
        assert "without a layout" in why_not
        assert "image quality" in why_not


def test_measures_that_the_verdict_lacks_are_those_of_the_other_table(verdict):
    measured = [
        {"arm": arm, "metric": "specificity", "mean": mean, "sd": 0.001, "difference": difference}
        for arm, mean, difference in (("real", 0.997, np.nan), ("real+lung_ddpm@1.0", 0.998, 0.001))
    ]
    row = row_of(
        published_comparison(verdict, measures=pd.DataFrame(measured)),
        method="Lung-DDPM", training_set="800 real + 800 IUCPQ synthetic", metric="specificity",
    )  # fmt: skip
    assert (row["measured_mean"], row["measured_change"]) == (0.998, 0.001)


def test_passes_of_this_run_are_next_to_published_function_evaluations(verdict):
    comparison = published_comparison(verdict, passes={"lung_ddpm": 20.0})
    row = row_of(comparison, method="Lung-DDPM", metric="function_evaluations")
    assert (row["published_mean"], row["measured_mean"], row["comparable"]) == (250, 20, "no")


def test_context_of_other_data_compares_with_nothing(verdict):
    context = published_comparison(verdict).query("table == 'context'")
    assert len(context) == 6 + 6 + 4
    assert (context["arm"] == "").all()
    assert set(context["comparable"]) == {"no"}


def test_every_published_figure_keeps_its_row(verdict):
    assert len(published_comparison(verdict)) == len(published_figures())


def test_arms_of_the_same_dose_are_next_to_each_other(verdict):
    row = row_of(
        published_comparison(verdict), method="Lung-DDPM", training_set="800 real + 800 IUCPQ synthetic", metric="dice"
    )
    assert (row["arm"], row["measured_mean"], row["measured_change"]) == ("real+lung_ddpm@1.0", 0.35, 0.05)
    assert row["published_change"] == pytest.approx(0.3914 - 0.3598)
    assert row["comparable"] == "change only"


def test_183_of_800_is_a_dose_of_a_quarter_and_half_is_missing(verdict):
    comparison = published_comparison(verdict)
    lidc = row_of(comparison, method="Lung-DDPM", training_set="800 real + 183 LIDC synthetic", metric="dice")
    half = row_of(comparison, method="Lung-DDPM", training_set="800 real + 400 IUCPQ synthetic", metric="dice")
    assert lidc["arm"] == "real+lung_ddpm@0.25"
    assert half["arm"] == ""
    assert "0.5" in half["why_not"]


def test_levels_never_compare_and_every_row_says_why(verdict):
    comparison = published_comparison(verdict)
    assert (comparison["why_not"] != "").all()
    assert set(comparison["comparable"]) == {"no", "change only"}
    assert row_of(comparison, method="real only", metric="dice", table="segmentation")["comparable"] == "no"


def test_simulated_patients_compare_with_nothing(verdict):
    comparison = published_comparison(verdict, simulated=True)
    assert set(comparison["comparable"]) == {"no"}
    assert "simulated" in row_of(comparison, method="real only", metric="dice", table="segmentation")["why_not"]


def test_image_quality_and_sampling_time_are_filled_in(verdict):
    keys = {"generator": "lung_ddpm", "image": "synthetic", "region": "whole volume", "metric": "mse"}
    quality = pd.DataFrame([keys | {"mean": 0.002, "sd": 0.1, "extractor": ""}])
    comparison = published_comparison(verdict, quality, {"lung_ddpm": 7.0})
    mse = comparison[(comparison["method"] == "Lung-DDPM") & (comparison["metric"] == "MSE")]
    assert mse["measured_mean"].tolist() == [0.002, 0.002]
    seconds = comparison[(comparison["method"] == "Lung-DDPM") & (comparison["metric"] == "seconds_per_volume")]
    assert seconds["measured_mean"].tolist() == [7.0, 7.0]
    assert comparison[comparison["metric"] == "FID"]["measured_mean"].isna().all()


@pytest.mark.parametrize(
    ("extractor", "reason"), [("ResNet-50, random weights", "random weights"), (MEDICALNET, "number of volumes")]
)
def test_feature_distances_never_compare_and_say_why(verdict, extractor, reason):
    keys = {"generator": "lung_ddpm", "image": "synthetic", "region": "whole volume", "sd": np.nan}
    measured = {"fid": 1.5, "mmd_squared": np.nan}
    rows = [keys | {"metric": metric, "mean": value, "extractor": extractor} for metric, value in measured.items()]
    comparison = published_comparison(verdict, pd.DataFrame(rows)).query("method == 'Lung-DDPM'")
    fid, mmd = (comparison[comparison["metric"] == metric] for metric in ("FID", "MMD"))
    assert fid["measured_mean"].tolist() == [1.5, 1.5]
    assert (fid["comparable"] == "no").all()
    assert fid["why_not"].str.contains(reason).all()
    assert mmd["why_not"].str.startswith("not measured").all()


def test_mmd_is_measured_as_its_square_and_labelled_so(verdict):
    row = {"generator": "lung_ddpm", "image": "synthetic", "region": "whole volume", "metric": "mmd_squared"}
    row |= {"mean": 0.03, "sd": np.nan, "extractor": MEDICALNET}
    comparison = published_comparison(verdict, pd.DataFrame([row]))
    mmd = comparison[(comparison["metric"] == "MMD") & (comparison["method"] == "Lung-DDPM")]
    assert set(mmd["measured_metric"]) == {"mmd_squared"}
    assert mmd["why_not"].str.startswith("what is measured here is MMD²").all()
    shown, _ = show_published(mmd)
    assert {line[shown.heads.index("measured")] for line in shown.rows} == {"0.0300 (MMD²)"}


def test_an_unmeasured_run_is_reported(verdict):
    verdict["mean"] = np.nan
    assert row_of(published_comparison(verdict), method="real only", metric="dice", table="segmentation")[
        "why_not"
    ].startswith("not measured")


def test_the_published_gain_is_that_of_the_poster():
    assert published_gain("dice") == pytest.approx(0.3914 - 0.3597, abs=1e-4)
    assert published_gain("sensitivity") == pytest.approx(0.4393 - 0.3704, abs=1e-4)
