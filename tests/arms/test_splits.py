"""Roles, folds and the leak guard against small cohorts whose right answer can be counted by hand."""

import logging
import statistics
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lungddpm.arms import splits
from lungddpm.config.models import Roles
from lungddpm.core.cases import COLUMNS
from lungddpm.core.errors import ConfigError, LeakError


def cohort(n_patients: int, series_each: int = 1) -> pd.DataFrame:
    empty = dict.fromkeys(COLUMNS, "") | {"data_set": "internal"}
    rows = [
        empty | {"case_id": f"P{p:03d}_{s}", "patient_id": f"P{p:03d}", "status": "ok", "n_nodules": p % 2}
        for p in range(n_patients)
        for s in range(series_each)
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def assign(index: pd.DataFrame, roles: Roles, seed: int) -> pd.DataFrame:
    return pd.DataFrame(splits.assign_roles(index.to_dict("records"), roles, seed))


def patients_of(index: pd.DataFrame) -> dict[str, set[str]]:
    return {role: set(group["patient_id"]) for role, group in index.groupby("role") if role}


def test_shares_and_counts_give_the_expected_numbers():
    assigned = patients_of(assign(cohort(24), Roles(), seed=1))
    assert {role: len(patients) for role, patients in assigned.items()} == {"discovery": 12, "reference": 5, "test": 7}
    counts = patients_of(assign(cohort(24), Roles(discovery=3, reference=2, test=0.5), seed=1))
    assert {role: len(patients) for role, patients in counts.items()} == {"discovery": 3, "reference": 2, "test": 12}


@given(st.integers(3, 60), st.integers(1, 3), st.integers(0, 5))
def test_default_shares_use_every_patient_once_with_all_series(n_patients, series_each, seed):
    index = assign(cohort(n_patients, series_each), Roles(), seed)
    assert set(index["role"]) == set(splits.ROLES)
    assert (index.groupby("patient_id")["role"].nunique() == 1).all()


def test_roles_do_not_depend_on_the_order_of_the_table_but_on_the_seed():
    index = cohort(30)
    first = patients_of(assign(index, Roles(), 1))
    assert first == patients_of(assign(index.sample(frac=1, random_state=0), Roles(), 1))
    assert first != patients_of(assign(index, Roles(), 2))


def test_unneeded_patients_and_excluded_series_say_why_they_have_no_role():
    index = cohort(10)
    index.loc[4, ["status", "reason"]] = ["excluded", "slices are missing"]
    assigned = assign(index, Roles(discovery=2, reference=1, test=1), 1)
    assert assigned.loc[4, ["role", "status", "reason"]].tolist() == ["", "excluded", "slices are missing"]
    unused = assigned[(assigned["role"] == "") & (assigned["status"] == "ok")]
    assert len(unused) == 5
    assert set(unused["reason"]) == {splits.UNUSED}


def test_lists_are_taken_literally_and_numbers_draw_from_the_rest():
    roles = Roles(discovery=["P000", "P001"], reference=1, test=["P007"])
    assigned = patients_of(assign(cohort(8), roles, 1))
    assert assigned["discovery"] == {"P000", "P001"}
    assert assigned["test"] == {"P007"}
    assert not assigned["reference"] & {"P000", "P001", "P007"}


@pytest.mark.parametrize(
    ("roles", "n_patients", "key", "says"),
    [
        (Roles(discovery=5, reference=2, test=3), 9, "roles.test", "9 usable patients"),
        (Roles(discovery=["P999"]), 9, "roles.discovery", "P999"),
        (Roles(test=[f"X{n}" for n in range(7)]), 9, "roles.test", "X4 and 2 more, not in the source .7 are named"),
        (Roles(), 2, "roles.reference", "2 usable patients"),
        (Roles(), 0, "roles.discovery", "0 usable patients"),
        (Roles(discovery=3, reference=1, test=1, allow_shared_patients=True), 2, "roles.discovery", "2 usable"),
    ],
)
def test_impossible_roles_name_the_key_and_the_number_there_is(roles, n_patients, key, says):
    with pytest.raises(ConfigError, match=says) as error:
        assign(cohort(n_patients), roles, 1)
    assert error.value.what == key


def test_a_role_without_a_patient_names_every_remedy():
    roles = Roles(discovery=0.5, reference=0.25, test=0.25)
    assign(cohort(3), roles, 1)
    # With two patients, no number of its own would help: the other roles have both.
    remedy = "Raise its number, lower those of the other roles, or use a source with more patients"
    with pytest.raises(ConfigError, match=remedy):
        assign(cohort(2), roles, 1)


def test_patients_are_shared_only_when_allowed_and_with_a_warning(caplog):
    caplog.set_level(logging.WARNING, "lungddpm")
    index = assign(cohort(1), Roles(allow_shared_patients=True), 1)
    assert index["role"].tolist() == ["discovery+reference+test"]
    assert "only shows that the pipeline runs" in caplog.text


def folds_of(cases: pd.DataFrame, volumes: Sequence[float], n_folds: int, wanted: list[int], seed: int = 1, **rest):
    return splits.folds(cases, dict(zip(cases["case_id"], volumes, strict=True)), n_folds, wanted, seed, **rest)


@pytest.mark.filterwarnings("error")
@given(st.integers(2, 12), st.integers(1, 3), st.integers(2, 6), st.data())
def test_folds_are_grouped_by_patient_and_validate_every_case_once(n_patients, series_each, n_folds, data):
    cases = cohort(n_patients, series_each)
    volumes = data.draw(st.lists(st.floats(0, 1e5), min_size=len(cases), max_size=len(cases)))
    folds = folds_of(cases, volumes, n_folds, [0])
    assert len(folds) == min(n_folds, n_patients)
    assert sorted(name for fold in folds for name in fold["val"]) == sorted(cases["case_id"])
    for fold in folds:
        assert fold["train"]
        assert fold["val"]
        assert sorted(fold["train"] + fold["val"]) == sorted(cases["case_id"])
        assert not {name[:4] for name in fold["train"]} & {name[:4] for name in fold["val"]}


def test_folds_do_not_depend_on_the_order_of_the_table_but_on_the_seed():
    cases = cohort(12).assign(mm3=np.random.default_rng(0).lognormal(6, 1, 12))
    shuffled = cases.sample(frac=1, random_state=0)
    first = folds_of(cases, cases["mm3"], 3, [0])
    assert first == folds_of(shuffled, shuffled["mm3"], 3, [0])
    assert first != folds_of(cases, cases["mm3"], 3, [0], seed=2)


def test_every_fold_has_a_case_of_every_size():
    cases = cohort(20)
    sizes = {name: rank // 5 for rank, name in enumerate(cases["case_id"])}
    for fold in folds_of(cases, np.geomspace(30, 30_000, 20), 5, [0]):
        assert sorted(sizes[name] for name in fold["val"]) == [0, 1, 2, 3]


def spread(folds: list[list[float]]) -> float:
    """Standard deviation over folds of their mean volume, over its mean."""
    means = [statistics.mean(fold) for fold in folds]
    return statistics.stdev(means) / statistics.mean(means)


@pytest.mark.parametrize(("n_patients", "at_most"), [(10, 0.85), (60, 0.55)])
def test_volumes_are_spread_less_over_folds_than_by_chance(n_patients, at_most):
    cases, balanced, by_chance = cohort(n_patients), [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        volumes = rng.lognormal(6, 1, n_patients)
        of_case = dict(zip(cases["case_id"], volumes, strict=True))
        folds = folds_of(cases, volumes, 5, [0], seed)
        balanced.append(spread([[of_case[name] for name in fold["val"]] for fold in folds]))
        by_chance.append(spread(np.split(rng.permutation(volumes), 5)))
    assert statistics.mean(balanced) < at_most * statistics.mean(by_chance)


def test_folds_with_too_few_patients():
    assert len(folds_of(cohort(3), [5, 1, 1], 5, [0, 2])) == 3
    with pytest.raises(ConfigError, match="fold 3"):
        folds_of(cohort(3), [5, 1, 1], 5, [0, 3])
    with pytest.raises(ConfigError, match="1 usable discovery patient"):
        folds_of(cohort(1), [5], 2, [0])
    shared = folds_of(cohort(1), [5], 2, [0, 1], allow_shared_patients=True)
    assert shared == [{"train": ["P000_0"], "val": ["P000_0"]}] * 2


def origin(case_id: str, patients: str, mark: str = "") -> splits.Origin:
    return splits.Origin(case_id, frozenset(patients.split()), frozenset([mark or case_id]))


def test_the_leak_guard_passes_disjoint_sets_with_a_proof():
    proof = splits.check_leaks([origin("a", "A"), origin("s", "A R")], [origin("t", "T")], False)
    assert proof["disjoint"]
    assert (proof["training_patients"], proof["test_patients"], proof["shared_patients"]) == (["A", "R"], ["T"], [])


@pytest.mark.parametrize("leak", [origin("s", "A T"), origin("s", "T"), origin("renamed", "A", "t")])
def test_the_leak_guard_finds_patients_references_and_renamed_copies(leak, caplog):
    training, test = [origin("a", "A"), leak], [origin("t", "T")]
    with pytest.raises(LeakError, match=f"T in {leak.case_id}"):
        splits.check_leaks(training, test, False)
    caplog.set_level(logging.WARNING, "lungddpm")
    proof = splits.check_leaks(training, test, True)
    assert not proof["disjoint"]
    assert proof["shared_patients"] == ["T"]
    assert "WARNING" in caplog.text


def test_a_test_patient_is_found_under_a_second_name(caplog):
    # Q is a reference whose scan is T's; a sample that was made from Q holds T.
    known = [origin("a", "A"), origin("q", "Q", "t"), origin("t", "T")]
    with pytest.raises(LeakError, match="T in s"):
        splits.check_leaks([origin("a", "A"), origin("s", "Q")], [origin("t", "T")], False, known)
    assert splits.check_leaks([origin("a", "A")], [origin("t", "T")], False, known)["disjoint"]


def register(**ids_of: list[str]) -> splits.Register:
    """Patients by name, each with its case, its series and the hash of its files."""
    rows = [dict(zip(("case_id", "series_uid", "sha256"), ids, strict=True), patient_id=p) for p, ids in ids_of.items()]
    return splits.read_register(pd.DataFrame(rows))


def test_ids_and_hashes_are_found_at_any_depth_and_words_of_paths_are_not():
    ids = {"1": ["1", "1.2.1", "aa"], "2": ["2", "1.2.2", "bb"], "3": ["3", "1.2.3", "cc"], "4": ["4", "1.2.4", "dd"]}
    known = register(**ids)
    paths = {"inputs": ["1/3/1/1.dcm", "2", "4"], "files": {"3": "3"}, "device": "4", "versions": {"lungddpm": "3"}}
    assert splits.patients_named_in({"case_id": "1", **paths}, known) == {"1"}
    record = {"reference_case_id": "1", "nodules": [{"from": {"patient_id": "2"}}], "reference_sha256": "cc"}
    assert splits.patients_named_in({**record, **paths}, known) == {"1", "2", "3"}
    declared = {"trained_on": ["1", "1.2.2"], "donors": ["3"], "reference": "none"}
    assert splits.patients_named_in({"declared": declared}, known) == {"1", "2", "3"}


def test_a_case_and_a_patient_of_one_name_are_distinguished():
    # The second scan of patient a, and the only one of a patient called a_2.
    known = splits.read_register(
        pd.DataFrame(
            {"case_id": ["a", "a_2", "a_2_2"], "patient_id": ["a", "a", "a_2"], "series_uid": "", "sha256": ""}
        )
    )
    assert splits.patients_named_in({"case_id": "a_2"}, known) == {"a"}
    assert splits.patients_named_in({"patient_id": "a_2"}, known) == {"a_2"}
    assert splits.patients_named_in({"donors": ["a_2"]}, known) == {"a", "a_2"}
