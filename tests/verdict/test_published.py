"""The published figures against the file they were copied from, and their comparison with a run."""

import numpy as np
import pandas as pd
import pytest

from lungddpm.quality.feature_distances import MEDICALNET
from lungddpm.report.sections import show_published
from lungddpm.verdict.published import published_comparison, published_figures, published_gain


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
    ours = published_figures()
    assert ours[["method", "training_set", "metric"]].equals(source[["method", "training_set", "metric"]])
    assert ours["mean"].tolist() == source["mean"].astype(float).tolist()
    assert ours["sd"].isna().tolist() == (source["sd"] == "").tolist()


def test_every_published_figure_keeps_its_row(verdict):
    assert len(published_comparison(verdict)) == len(published_figures())


def test_arms_of_the_same_dose_stand_beside_each_other(verdict):
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
    assert row_of(comparison, method="real only", metric="dice")["comparable"] == "no"


def test_simulated_patients_compare_with_nothing(verdict):
    comparison = published_comparison(verdict, simulated=True)
    assert set(comparison["comparable"]) == {"no"}
    assert "simulated" in row_of(comparison, method="real only", metric="dice")["why_not"]


def test_image_quality_and_sampling_time_are_filled_in(verdict):
    keys = {"generator": "lung_ddpm", "image": "synthetic", "region": "whole volume", "metric": "mse"}
    quality = pd.DataFrame([keys | {"mean": 0.002, "sd": 0.1, "extractor": ""}])
    comparison = published_comparison(verdict, quality, {"lung_ddpm": 7.0})
    mse = comparison[(comparison["method"] == "Lung-DDPM") & (comparison["metric"] == "MSE")]
    assert mse["measured_mean"].tolist() == [0.002, 0.002]
    assert row_of(comparison, method="Lung-DDPM", metric="seconds_per_volume")["measured_mean"] == 7.0
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


def test_mmd_is_measured_as_its_square_and_says_so(verdict):
    row = {"generator": "lung_ddpm", "image": "synthetic", "region": "whole volume", "metric": "mmd_squared"}
    row |= {"mean": 0.03, "sd": np.nan, "extractor": MEDICALNET}
    comparison = published_comparison(verdict, pd.DataFrame([row]))
    mmd = comparison[(comparison["metric"] == "MMD") & (comparison["method"] == "Lung-DDPM")]
    assert set(mmd["measured_metric"]) == {"mmd_squared"}
    assert mmd["why_not"].str.startswith("what is measured here is MMD²").all()
    shown, _ = show_published(mmd)
    assert {line[shown.heads.index("measured")] for line in shown.rows} == {"0.0300 (MMD²)"}


def test_an_unmeasured_run_says_so(verdict):
    verdict["mean"] = np.nan
    assert row_of(published_comparison(verdict), method="real only", metric="dice")["why_not"].startswith(
        "not measured"
    )


def test_the_published_gain_is_that_of_the_poster():
    assert published_gain("dice") == pytest.approx(0.3914 - 0.3597, abs=1e-4)
    assert published_gain("sensitivity") == pytest.approx(0.4393 - 0.3704, abs=1e-4)
