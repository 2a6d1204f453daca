"""FROC and CPM: small cases by hand, LUNA16's way by sklearn, and the bands against the binomial distribution."""

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics

from lungddpm.evaluation.froc import BAND_COLUMNS, FROC_COLUMNS, RATES, Findings, findings_of, froc_tables


def findings(n_scans, lesions=(), false=()):
    """From (scan, score) pairs."""
    lesions, false = (np.array(pairs, float).reshape(-1, 2) for pairs in (lesions, false))
    return Findings(n_scans, lesions[:, 1], lesions[:, 0].astype(int), false[:, 1], false[:, 0].astype(int))


def curve(found, rates=RATES):
    return found.sensitivity(np.array(rates), np.ones((1, found.n_scans)))[0]


def test_by_hand():
    lesions = [(0, 0.9), (1, 0.5), (1, np.nan)]
    found = findings(2, lesions, [(0, 0.7), (0, 0.5), (1, 0.2), (0, 0.2)])
    # Cuts at 0.9, 0.7, 0.5, 0.2: false positives per scan 0, 1/2, 1, 2; found 1, 1, 2, 2 of 3.
    assert curve(found) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 2 / 3, 2 / 3])
    assert curve(found, [0.75]) == pytest.approx([1 / 2])


def test_equal_scores_are_cut_together():
    assert curve(findings(1, [(0, 0.5)], [(0, 0.5)])) == pytest.approx([1 / 8, 1 / 4, 1 / 2, 1, 1, 1, 1])


def test_a_scan_without_a_lesion_counts_for_its_false_positives():
    found = findings(2, [(0, 0.4)], [(1, 0.9), (1, 0.8)])
    assert curve(found) == pytest.approx([0, 0, 0, 1, 1, 1, 1])
    assert curve(findings(4, [(0, 0.4)], [(1, 0.9), (1, 0.8)])) == pytest.approx([0, 0, 1, 1, 1, 1, 1])


def test_no_candidate_finds_nothing_and_no_lesion_has_no_sensitivity():
    assert curve(findings(3, [(0, np.nan), (2, np.nan)])).tolist() == [0] * 7
    assert np.isnan(curve(findings(3, [], [(0, 0.5)]))).all()


@pytest.fixture
def random_findings():
    rng = np.random.default_rng(2)
    lesions = np.stack([rng.integers(0, 20, 40), rng.integers(3, 10, 40) / 10], axis=1)
    lesions[::5, 1] = np.nan
    false = np.stack([rng.integers(0, 20, 60), rng.integers(1, 9, 60) / 10], axis=1)
    return lesions, false


def test_agrees_with_luna16s_way(random_findings):
    lesions, false = random_findings
    hit = lesions[np.isfinite(lesions[:, 1]), 1]
    truth, scores = np.r_[np.ones(len(hit)), np.zeros(len(false))], np.r_[hit, false[:, 1]]
    false_rate, true_rate, _ = metrics.roc_curve(truth, scores, drop_intermediate=False)
    theirs = np.interp(RATES, false_rate * len(false) / 20, true_rate * len(hit) / len(lesions))
    assert curve(findings(20, lesions, false)) == pytest.approx(theirs)


def test_a_weight_is_how_often_a_scan_is_there(random_findings):
    lesions, false = random_findings
    counts = np.random.default_rng(5).integers(0, 4, 20)
    copies = [(scan, 100 * copy + scan) for scan, count in enumerate(counts) for copy in range(count)]
    names = {name: number for number, (_, name) in enumerate(copies)}
    repeated = [
        [(names[name], score) for scan, name in copies for score in pairs[pairs[:, 0] == scan, 1]]
        for pairs in (lesions, false)
    ]
    weighted = findings(20, lesions, false).sensitivity(np.array(RATES), counts[None])
    assert weighted[0] == pytest.approx(curve(findings(len(copies), *repeated)))


def tables_of(found_by, n_cases, false=(), replicates=("a",), arms=("real",)):
    """Tables of arms x replicates where case k has a lesion of score `found_by(k, replicate)`."""
    cases, lesions, candidates = [], [], []
    for arm in arms:
        for replicate in replicates:
            keys = {"arm": arm, "replicate": replicate}
            cases += [keys | {"case_id": f"c{k:03d}", "n_candidates": 1} for k in range(n_cases)]
            lesions += [keys | {"case_id": f"c{k:03d}", "score": found_by(k, replicate)} for k in range(n_cases)]
            candidates += [keys | {"case_id": f"c{k:03d}", "score": score, "lesions": None} for k, score in false]
    columns = ["arm", "replicate", "case_id", "score", "lesions"]
    return pd.DataFrame(cases), pd.DataFrame(lesions), pd.DataFrame(candidates, columns=columns)


def test_findings_follow_the_case_not_the_order_of_rows():
    cases, lesions, candidates = tables_of(lambda k, _: k / 10, 5, false=[(3, 0.9)])
    candidates.loc[len(candidates)] = ["real", "a", "c001", 0.8, "1+2"]
    found = findings_of(cases.iloc[::-1], lesions.iloc[::-1], candidates)
    assert found.lesion_scores.tolist() == [0.4, 0.3, 0.2, 0.1, 0.0]
    assert found.lesion_scans.tolist() == [4, 3, 2, 1, 0]
    assert (found.false_scores.tolist(), found.false_scans.tolist()) == ([0.9], [3])


def test_replicates_are_averaged_and_the_band_is_about_the_choice_of_cases():
    rng = np.random.default_rng(1)
    hit = rng.random(400) < 0.7
    tables = froc_tables(*tables_of(lambda k, _: 0.8 if hit[k] else np.nan, 400), 0.95, seed=0)
    assert tables["froc"].columns.tolist() == FROC_COLUMNS
    assert tables["froc_band"].columns.tolist() == BAND_COLUMNS
    assert tables["froc"]["false_positives_per_scan"].tolist() == list(RATES)
    share = hit.mean()
    assert tables["froc"]["sensitivity"].tolist() == pytest.approx([share] * 7)
    (cpm,) = tables["cpm"].to_dict("records")
    half = 1.96 * (share * (1 - share) / 400) ** 0.5
    assert cpm["cpm"] == pytest.approx(share)
    assert (cpm["cpm_ci_low"], cpm["cpm_ci_high"]) == pytest.approx((share - half, share + half), abs=0.15 * half)
    # Two replicates, one of which finds nothing: half of it, and a band that reaches from one to the other.
    found_by = {"a": 0.8, "b": np.nan}
    tables = froc_tables(*tables_of(lambda _, replicate: found_by[replicate], 30, replicates="ab"), 0.95, seed=0)
    assert set(tables["froc_band"]["sensitivity"]) == {0.5}
    assert tables["cpm"].iloc[0, 1:].tolist() == [0.5, 0, 1]


def test_an_arm_without_scores_or_without_lesions_is_left_out():
    cases, lesions, candidates = tables_of(lambda k, _: 0.5, 4, false=[(0, 0.6)], arms=("real", "other"))
    cases.loc[cases["arm"] == "other", "n_candidates"] = np.nan
    tables = froc_tables(cases, lesions, candidates, 0.95, seed=0)
    assert {arm for table in tables.values() for arm in table["arm"]} == {"real"}
    for table in froc_tables(cases, lesions.iloc[:0], candidates, 0.95, seed=0).values():
        assert table.empty
