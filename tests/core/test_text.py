"""Numbers in prose, by hand."""

import math

import pytest

from lungddpm.core.text import (
    bound,
    format_duration,
    format_number,
    format_p,
    format_span,
    format_spread,
    plural,
    signed,
)


def test_numbers_in_prose():
    assert [signed(value) for value in (0.0321, -0.117, 0.0001, -0.0001)] == ["+0.032", "−0.117", "0.000", "0.000"]
    assert [format_p(p) for p in (0.0001, 0.0342, 0.5)] == ["< 0.001", "= 0.034", "= 0.50"]


def test_numbers_show_on_which_side_of_their_limit_they_lie():
    assert [format_p(p, 0.05) for p in (0.0497, 0.04996, 0.05, 0.0503)] == [
        "= 0.0497",
        "= 0.04996",
        "= 0.050",
        "= 0.050",
    ]
    assert [format_p(p, 0.1) for p in (0.0998, 0.1, 0.1004)] == ["= 0.0998", "= 0.10", "= 0.10"]
    assert [bound(value) for value in (0.0321, 0.0002, -0.00004, 0.0)] == ["+0.032", "+0.0002", "−0.00004", "0.000"]


@pytest.mark.parametrize(
    ("value", "form", "shown"),
    [
        (0.6117, ".3f", "0.612"), (-0.6117, ".3f", "−0.612"), (-0.6117, "+.1f", "−0.6"), (0.04, "+.1f", "0.0"),
        (-1e-7, ".3g", "−1e−07"), (None, ".3f", ""), (math.nan, ".3f", ""), (math.inf, ".1f", "∞"),
        (-math.inf, "+.1f", "−∞"), (462.3, ".2g", "462"), (-1234.0, ".3g", "−1234"), (41.8, ".3g", "41.8"),
    ],
)  # fmt: skip
def test_numbers_in_tables(value, form, shown):
    assert format_number(value, form) == shown


def test_spreads_durations_and_counts():
    assert format_spread(-35.2, 4.06, "+.1f") == "−35.2 ± 4.1"
    assert format_spread(0.5, math.nan, ".2f") == "0.50"
    assert [format_duration(seconds) for seconds in (0.4, 61.5, 3725)] == ["0:00:00", "0:01:02", "1:02:05"]
    assert [plural(number, "case") for number in (0, 1, 2)] == ["0 cases", "1 case", "2 cases"]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.2, "0 s"), (99, "99 s"), (100, "1.7 min"), (599, "10 min"), (1500, "25 min"), (6000, "1.7 h"),
        (36_000, "10 h"), (172_800, "2.0 days"), (216_000, "2.5 days"),
    ],
)  # fmt: skip
def test_a_span_has_the_unit_that_suits_it(seconds, said):
    assert format_span(seconds) == said
