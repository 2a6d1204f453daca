"""What a run can show, against the scale and the published gain."""

import math

import pandas as pd
import pytest

from lungddpm.verdict.power import run_power
from lungddpm.verdict.published import published_gain

ROW = {
    "difference": 0.01, "baseline_mean": 0.6, "run_df": 4, "standard_error": 0.02, "n_cases": 12,
    "detectable_difference": 0.1, "detectable_low": 0.05, "detectable_high": 0.2,
}  # fmt: skip
UNKNOWN = dict.fromkeys(("detectable_difference", "detectable_low", "detectable_high"), math.nan)


def power(*rows):
    return run_power(pd.DataFrame([ROW | row for row in rows]), "Dice", 0.032)


@pytest.mark.parametrize(
    ("rows", "too_small", "said"),
    [
        ([{}], False, "a true gain of about 0.1 Dice (0.05 to 0.2) or more with a probability of 80 %"),
        ([{}], False, "a gain as small as the published one, 0.032, would mostly stay hidden."),
        ([{"detectable_difference": 0.02}], False, "the published gain is 0.032."),
        ([{"detectable_difference": 0.45}, {"detectable_difference": 0.3}], False, "about 0.3 Dice"),
        ([{"detectable_difference": 0.45}], True, "above real there is room for 0.40 only"),
        ([UNKNOWN | {"run_df": 0}], True, "with one replicate, how much training runs scatter is not known"),
        ([UNKNOWN | {"n_cases": 5}], True, "5 test cases are too few"),
        ([{"detectable_difference": 0.0, "standard_error": 0.0}], True, "every case scored the same in all arms"),
    ],
)
def test_what_a_run_can_show(rows, too_small, said):
    found = power(*rows)
    assert found.too_small == too_small
    assert said in found.sentence


def test_a_run_without_synthetic_arms_says_nothing():
    assert power({"difference": math.nan}).sentence == ""


def test_the_published_gain_is_that_of_the_poster():
    assert published_gain("dice") == pytest.approx(0.3914 - 0.3597, abs=1e-4)
    assert published_gain("sensitivity") == pytest.approx(0.4393 - 0.3704, abs=1e-4)
