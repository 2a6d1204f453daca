"""Costs beside quality, from tables whose numbers are known."""

import math

import pandas as pd
import pytest

from lungddpm.config.loading import parse_config
from lungddpm.verdict.cost import COLUMNS, cost_table, function_evaluations
from lungddpm.verdict.records import DRAWING_COLUMNS

CONFIG = parse_config({"arms": {"generators": ["lung_ddpm", "maisi"], "external": {"maisi": "maisi"}}})
DRAWN = pd.DataFrame(
    [("lung_ddpm", 4, 2.0, 50.0, 900.0, "cpu"), ("maisi", 0, math.nan, math.nan, math.nan, "")],
    columns=DRAWING_COLUMNS,
)


@pytest.mark.parametrize(
    ("generator", "settings", "passes"),
    [
        ("lung_ddpm", {"sampling": {"sampler": "dpmsolver++", "steps": 20, "resampling": 2}}, 40),
        ("rectified_flow", {"sampling": {"steps": 4}}, 4),
        ("pix2pix3d", {}, 1),
        ("paste_constant", {}, 0),
    ],
)
def test_function_evaluations_are_the_passes_of_the_network(generator, settings, passes):
    arms = {"generators": [generator], "controls": ["real"]}
    config = parse_config({"arms": arms, "generators": {generator: settings} if settings else {}})
    assert function_evaluations(config, generator) == passes


@pytest.mark.parametrize(("nodules", "passes"), [(3.0, 60), (1.5, 30), (math.nan, 50)])
def test_what_is_drawn_nodule_by_nodule_counts_the_nodules_of_its_volumes(nodules, passes):
    """Ten steps to the noise of each nodule's crop and ten back; 2.5 nodules where no sample has a record."""
    settings = {"lung_ddpm_plus": {"sampling": {"steps": 10}}}
    config = parse_config({"arms": {"generators": ["lung_ddpm_plus", "lung_ddpm"]}, "generators": settings})
    drawn = [(name, 4, nodules, 1.0, 900.0, "cpu") for name in ("lung_ddpm_plus", "lung_ddpm")]
    table = cost_table(config, pd.DataFrame(drawn, columns=DRAWING_COLUMNS), {}).set_index("generator")
    assert table["function_evaluations"].drop("(real CT)").to_dict() == {"lung_ddpm_plus": passes, "lung_ddpm": 250}


def test_of_other_systems_the_cost_is_not_known():
    assert math.isnan(function_evaluations(CONFIG, "maisi"))


def quality_row(generator, image, region, metric, mean, error=math.nan):
    row = {"generator": generator, "image": image, "region": region, "metric": metric, "mean": mean}
    return row | {"standard_error": error, "extractor": "a network" if metric in ("fid", "kid") else ""}


def test_quality_is_next_to_cost():
    rows = [
        quality_row("lung_ddpm", "synthetic", "nodules", "hu_difference", -20.0),
        quality_row("lung_ddpm", "synthetic", "lungs", "hu_difference", 1.0),
        quality_row("lung_ddpm", "synthetic", "lungs", "fid", 3.0),
        quality_row("lung_ddpm", "synthetic", "whole volume", "fid", 99.0),
        quality_row("lung_ddpm", "synthetic", "lungs", "kid", 0.5, 0.1),
        quality_row("lung_ddpm", "constant lungs", "lungs", "kid", 7.0, 1.0),
        *(
            quality_row(name, "other patients", "lungs", metric, mean, 0.2)
            for name in ("lung_ddpm", "maisi")
            for metric, mean in (("fid", 2.0), ("kid", 0.3))
        ),
    ]
    fidelity = pd.DataFrame([("(real CT)", 0.8), ("lung_ddpm", 0.6)], columns=["generator", "dice_mean"])
    table = cost_table(CONFIG, DRAWN, {"image_quality": pd.DataFrame(rows), "label_fidelity": fidelity})
    assert list(table.columns) == COLUMNS
    real, drawn, external = table.to_dict("records")
    assert (real["generator"], real["label_fidelity_dice"], real["fid_lungs"], real["kid_lungs"]) == (
        "(real CT)",
        0.8,
        2,
        0.3,
    )
    assert math.isnan(real["seconds_per_volume"])
    cost = (drawn["function_evaluations"], drawn["n_volumes"], drawn["seconds_per_volume"], drawn["memory_mib"])
    assert cost == (250, 4, 50, 900)
    assert (drawn["label_fidelity_dice"], drawn["nodule_hu_difference"], drawn["fid_lungs"]) == (0.6, -20, 3)
    assert (drawn["kid_lungs"], drawn["kid_lungs_standard_error"], drawn["extractor"]) == (0.5, 0.1, "a network")
    assert math.isnan(external["label_fidelity_dice"])
    assert external["extractor"] == ""


def test_what_was_not_measured_is_left_open():
    table = cost_table(CONFIG, DRAWN, {})
    assert table["generator"].tolist() == ["(real CT)", "lung_ddpm", "maisi"]
    assert table.loc[1, "function_evaluations"] == 250
    assert table[["label_fidelity_dice", "fid_lungs", "kid_lungs"]].isna().all().all()
