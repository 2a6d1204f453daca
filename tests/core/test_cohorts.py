"""Numbers of real cases and names of synthetic cohorts."""

import re

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lungddpm.core.cohorts import PATTERN, SHARED, Cohort, training_cases
from lungddpm.core.errors import ConfigError

COHORTS = st.builds(
    Cohort,
    real_cases=st.none() | st.integers(1, 10**6),
    replicate=st.none() | st.builds("fold{}_seed{}".format, st.integers(0, 99), st.integers(0, 10**6)),
)


@pytest.mark.parametrize(
    ("name", "cohort"),
    [
        ("all", SHARED),
        ("real4", Cohort(4)),
        ("all-fold0_seed1", Cohort(None, "fold0_seed1")),
        ("real4-fold0_seed1", Cohort(4, "fold0_seed1")),
    ],
)
def test_names_of_cohorts(name, cohort):
    assert (Cohort.parse(name), cohort.name) == (cohort, name)


@given(COHORTS)
def test_every_cohort_is_read_back_from_its_name(cohort):
    assert Cohort.parse(cohort.name) == cohort
    assert re.fullmatch(PATTERN, cohort.name)


@pytest.mark.parametrize("wrong", ["", "real", "real0", "real04", "real-1", "all-", "all-fold0", "all/x", "all\n", "4"])
def test_wrong_names_are_refused(wrong):
    assert not re.fullmatch(PATTERN, wrong)
    with pytest.raises(ConfigError, match="is not the name of a cohort"):
        Cohort.parse(wrong)


def table(cases_of_patients: dict[str, int]) -> pd.DataFrame:
    rows = [(f"{name}_{n}", name, "discovery", "ok") for name, count in cases_of_patients.items() for n in range(count)]
    rows += [("P0_broken", "P0", "discovery", "excluded"), ("R_0", "R", "reference", "ok"), ("T_0", "T", "test", "ok")]
    return pd.DataFrame(rows, columns=["case_id", "patient_id", "role", "status"])


COUNTS = st.dictionaries(st.sampled_from([f"P{n}" for n in range(12)]), st.integers(1, 3), min_size=2)


@given(COUNTS, st.integers(0, 10**6))
def test_subsets_are_nested_and_keep_patients_together(counts, seed):
    everything, before = table(counts), set()
    n_cases = sum(counts.values())
    for number in range(1, n_cases):
        chosen = training_cases(everything, number, seed)
        names = set(chosen["case_id"])
        assert len(names) == len(chosen) == number
        assert before < names
        # Of one patient at most, some cases are in and some are not.
        cut = [name for name, n in chosen["patient_id"].value_counts().items() if n < counts[name]]
        assert len(cut) <= 1
        assert list(chosen.index) == sorted(chosen.index)
        before = names
    assert len(training_cases(everything, None, seed)) == n_cases


@given(COUNTS, st.integers(0, 10**6), st.randoms())
def test_a_subset_does_not_depend_on_the_order_of_the_table_of_patients(counts, seed, random):
    names = list(counts)
    random.shuffle(names)
    number = max(1, sum(counts.values()) - 1)
    subset, of_shuffled = (
        set(training_cases(each, number, seed)["case_id"])
        for each in (table(counts), table({name: counts[name] for name in names}))
    )
    assert subset == of_shuffled


def test_another_seed_draws_other_patients():
    everything = table({f"P{n}": 1 for n in range(20)})
    subsets = {frozenset(training_cases(everything, 5, seed)["case_id"]) for seed in range(5)}
    assert len(subsets) == 5


@pytest.mark.parametrize("number", [3, 4])
def test_as_many_as_there_are_or_more_is_refused_by_key_and_number(number):
    with pytest.raises(ConfigError, match=rf"arms\.real_cases: names {number}, but there are 3 usable discovery cases"):
        training_cases(table({"P0": 2, "P1": 1}), number, 1)
