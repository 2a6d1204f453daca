"""Arms of filtered samples: which samples they take, who chose them, and which filters are refused."""

import json

import pandas as pd
import pytest

from lungddpm.arms.compose import FILTER_COLUMNS, FILTER_TABLE, draw_record, run_compose, run_compose_draw
from lungddpm.config.loading import parse_config
from lungddpm.core.cases import read_cases, write_cases
from lungddpm.core.errors import InputError, LeakError
from lungddpm.core.files import sha256_of, write_json, write_table

ROLES = ["discovery"] * 4 + ["reference"] * 2 + ["test"] * 2
ARM = "real+lung_ddpm.filtered@1.0"
SHARES = [0.9, 0.6, 0.7, 0.2, 0.8, 1.0]
"""Of the nodule voxels of s0 to s5 that a segmenter found."""


def config_of(found=0.7, draws=1.5, own_draws=False):
    arms = {"filtered": ["lung_ddpm"], "filter": {"found": found, "draws": draws}}
    segmentation = {"n_folds": 2, "folds": [0, 1]}
    return parse_config(
        {"arms": arms, "segmentation": segmentation, "synthesis": {"draw_per_replicate": own_draws}}
    )  # fmt: skip


@pytest.fixture
def cohort(tmp_path, write_blob_case):
    """Eight patients (four discovery, two reference, two test), six samples, and the arm `real`."""
    rows = [write_blob_case(tmp_path / "cases" / f"P{i}_0", f"P{i}", role, size=8) for i, role in enumerate(ROLES)]
    write_cases(tmp_path / "cases" / "cases.tsv", rows)
    folder = tmp_path / "synthetic"
    rows = [
        write_blob_case(folder / f"s{i}", "P4", source="lung_ddpm", size=8, reference_case_id="P4_0", number=i)
        for i in range(6)
    ]
    write_cases(folder / "samples.tsv", rows)
    run_compose(config_of(), "real", tmp_path / "cases" / "cases.tsv", [], tmp_path / "arms" / "real")
    return tmp_path


def write_filter(cohort, shares=SHARES, replicate="fold0_seed0", arm=ARM):
    """The output of `lungddpm filter` for a segmenter of the arm `real` of this cohort."""
    real = json.loads((cohort / "arms" / "real" / "arm.json").read_text())
    rows = read_cases(cohort / "synthetic" / "samples.tsv").to_dict("records")
    table = [
        (i, row["case_id"], row["sha256"], 9, share) for i, (row, share) in enumerate(zip(rows, shares, strict=True))
    ]
    folder = cohort / "filter" / replicate
    write_table(folder / FILTER_TABLE, pd.DataFrame(table, columns=FILTER_COLUMNS))
    segmenter = {"arm": "real", "replicate": replicate, "arm_fingerprint": real["fingerprint"]}
    segmenter["cases"] = [{key: case[key] for key in ("case_id", "patient_id", "sha256")} for case in real["cases"]]
    record = {"arm": arm, "segmenter": segmenter, "samples_sha256": sha256_of(folder / FILTER_TABLE)}
    write_json(folder / "filter.json", record)
    return folder / "filter.json"


def compose(cohort, filters, config=None):
    tables = cohort / "cases" / "cases.tsv", [cohort / "synthetic" / "samples.tsv"]
    run_compose(config or config_of(), ARM, *tables, cohort / "arms" / ARM, filters)
    return json.loads((cohort / "arms" / ARM / "arm.json").read_text())


def samples_in(record):
    return [case["case_id"] for case in record["cases"] if case["source"] == "lung_ddpm"]


def test_the_first_that_are_kept_are_taken_as_many_as_without_the_filter(cohort):
    arm = compose(cohort, [write_filter(cohort, [0.9, 0.6, 0.7, 0.8, 0.8, 1.0])])
    assert samples_in(arm) == ["s0", "s2", "s3", "s4"]
    assert arm["filter"] | {"segmenters": None, "leak_guard": None} == {
        "found": 0.7, "found_mean": pytest.approx(0.8), "judged": 6, "kept": 5, "wanted": 4, "taken": 4,
        "segmenters": None, "leak_guard": None,
    }  # fmt: skip


def test_where_fewer_are_kept_the_arm_is_smaller_and_reports_it(cohort):
    arm = compose(cohort, [write_filter(cohort)], config_of(found=0.75))
    assert samples_in(arm) == ["s0", "s4", "s5"]
    assert (arm["filter"]["kept"], arm["filter"]["taken"], arm["filter"]["wanted"]) == (3, 3, 4)


def test_a_sample_counts_by_the_mean_over_all_segmenters_that_judged(cohort):
    filters = [write_filter(cohort), write_filter(cohort, [0.1, 0.8, 0.7, 0.2, 0.8, 0.4], "fold1_seed0")]
    arm = compose(cohort, filters)
    # Means: .5, .7, .7, .2, .8, .7.
    assert samples_in(arm) == ["s1", "s2", "s4", "s5"]
    assert [each["replicate"] for each in arm["filter"]["segmenters"]] == ["fold0_seed0", "fold1_seed0"]


def test_a_sample_at_the_limit_is_kept_however_many_segmenters_judged(cohort):
    shares = [0.7, 0.7, 0.699, 0.2, 0.2, 0.2]
    # The mean of three times 0.7 is rounded to less.
    filters = [write_filter(cohort, shares, f"fold{fold}_seed0") for fold in range(3)]
    assert samples_in(compose(cohort, filters)) == ["s0", "s1"]


def test_the_record_proves_that_no_test_patient_is_behind_the_choice(cohort):
    arm = compose(cohort, [write_filter(cohort)])
    assert arm["filter"]["leak_guard"]["disjoint"]
    assert arm["leak_guard"]["test_patients"] == ["P6", "P7"]
    real = json.loads((cohort / "arms" / "real" / "arm.json").read_text())
    assert {case["case_id"] for case in real["cases"]} <= {case["case_id"] for case in arm["cases"]}


def test_a_segmenter_that_saw_a_test_patient_is_refused(cohort):
    path = write_filter(cohort)
    record = json.loads(path.read_text())
    test_case = read_cases(cohort / "cases" / "cases.tsv").set_index("case_id").loc["P6_0"]
    record["segmenter"]["cases"].append({"case_id": "P6_0", "patient_id": "P6", "sha256": test_case["sha256"]})
    write_json(path, record)
    with pytest.raises(LeakError, match="not in this arm or have changed since: P6_0"):
        compose(cohort, [path])
    assert not (cohort / "arms" / ARM / "arm.json").exists()


def test_a_segmenter_of_a_case_as_it_was_before_is_refused(cohort):
    path = write_filter(cohort)
    record = json.loads(path.read_text())
    record["segmenter"]["cases"][0]["sha256"] = "0" * 64
    write_json(path, record)
    with pytest.raises(LeakError, match="that are not in this arm or have changed since"):
        compose(cohort, [path])


def test_a_filter_that_keeps_nothing_stops_with_a_message(cohort):
    with pytest.raises(InputError) as refused:
        compose(cohort, [write_filter(cohort, [0.1, 0.2, 0.41, 0.3, 0.0, 0.0])])
    message = str(refused.value)
    assert "keeps none of 6 samples for real+lung_ddpm.filtered@1.0" in message
    assert "find at most 41 % of a sample's nodule voxels, and arms.filter.found is 0.7" in message
    assert "lower arms.filter.found" in message


def test_no_filter_and_one_of_other_samples_are_refused(cohort):
    with pytest.raises(InputError, match="Run 'lungddpm filter' first"):
        compose(cohort, [])
    path = write_filter(cohort)
    (path.parent / FILTER_TABLE).write_text("case_id\n")
    with pytest.raises(InputError, match="was changed after it was written"):
        compose(cohort, [path])
    with pytest.raises(InputError, match=r"belongs to real\+other.filtered@1.0"):
        compose(cohort, [write_filter(cohort, arm="real+other.filtered@1.0")])
    path = write_filter(cohort)
    rows = read_cases(cohort / "synthetic" / "samples.tsv")
    write_cases(cohort / "synthetic" / "samples.tsv", rows.iloc[[1, 0, 2, 3, 4, 5]])
    with pytest.raises(InputError, match="does not match the present samples"):
        compose(cohort, [path])


def test_a_draw_is_chosen_by_its_own_segmenter(cohort):
    config = config_of(own_draws=True)
    shared = compose(cohort, [], config)
    assert samples_in(shared) == []
    assert "filter" not in shared
    tables = cohort / "cases" / "cases.tsv", [cohort / "synthetic" / "samples.tsv"]
    folder = cohort / "arms" / ARM
    run_compose_draw(config, ARM, "fold0_seed0", *tables, folder, [write_filter(cohort)])
    draw = json.loads(draw_record(folder, "fold0_seed0").read_text())
    assert samples_in(draw) == ["s0", "s2", "s4", "s5"]
    assert draw["filter"]["leak_guard"]["disjoint"]
    assert draw["filter"]["segmenters"][0]["replicate"] == "fold0_seed0"
