"""The quality filter, with masks that are known by hand instead of a trained segmenter."""

import contextlib
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from lungddpm.arms.compose import FILTER_TABLE, run_compose
from lungddpm.config.loading import parse_config
from lungddpm.core.cases import CaseFolder, read_cases, write_cases
from lungddpm.core.errors import InputError
from lungddpm.core.files import sha256_of
from lungddpm.core.labels import Label
from lungddpm.core.volume import Volume, read_volume, write_volume
from lungddpm.quality import sample_filter

ARM = "real+lung_ddpm.filtered@1.0"
CONFIG = parse_config(
    {
        "arms": {"filtered": ["lung_ddpm"], "filter": {"draws": 1.5}},
        "segmentation": {"n_folds": 2, "folds": [0, 1]},
    }
)


@pytest.fixture
def cohort(tmp_path, write_blob_case):
    """Two discovery, one reference and one test patient; three samples, the last without a nodule; the arm `real`."""
    roles = ["discovery", "discovery", "reference", "test"]
    rows = [write_blob_case(tmp_path / "cases" / f"P{i}_0", f"P{i}", role, size=8) for i, role in enumerate(roles)]
    write_cases(tmp_path / "cases" / "cases.tsv", rows)
    folder, rows = tmp_path / "synthetic", []
    for number, nodule in enumerate(((slice(2, 6), 3, 3), (slice(2, 7), 4, 4), (slice(0, 0), 0, 0))):
        made = write_blob_case(folder / f"s{number}", "P2", source="lung_ddpm", size=8, reference_case_id="P2_0")
        layout = np.full((8, 8, 8), Label.LUNG, np.uint8)
        layout[nodule] = Label.NODULE
        ct = read_volume(folder / f"s{number}" / "ct.nii.gz")
        write_volume(folder / f"s{number}" / "layout.nii.gz", Volume(layout, ct.affine))
        rows.append({**made, "sha256": CaseFolder(folder / f"s{number}").hash()})
    write_cases(folder / "samples.tsv", rows)
    run_compose(CONFIG, "real", tmp_path / "cases" / "cases.tsv", [], tmp_path / "arms" / "real")
    return tmp_path


def first_three(ct):
    """A mask of x below 5, of all y and z: three of the four voxels of s0's nodule, three of the five of s1's."""
    mask = np.zeros((8, 8, 8), np.uint8)
    mask[:5] = 1
    return read_volume(ct).like(mask)


def run(cohort, monkeypatch, arm_folder="real"):
    @contextlib.contextmanager
    def segmenter(config, arm_dir, fold, seed, device, processes):
        yield SimpleNamespace(mask=first_three)

    monkeypatch.setattr(sample_filter, "open_segmenter", segmenter)
    output = cohort / "filter" / "fold1_seed0"
    arguments = cohort / "cases" / "cases.tsv", [cohort / "synthetic" / "samples.tsv"], output
    sample_filter.run_filter(CONFIG, ARM, cohort / "arms" / arm_folder, 1, 0, *arguments)
    return json.loads((output / "filter.json").read_text()), output / FILTER_TABLE


def test_the_share_of_nodule_voxels_that_is_found_is_counted(cohort, monkeypatch):
    record, path = run(cohort, monkeypatch)
    table = pd.read_csv(path)
    assert table["case_id"].tolist() == ["s0", "s1", "s2"]
    assert table["n_nodule_voxels"].tolist() == [4, 5, 0]
    assert table["found"].tolist()[:2] == [3 / 4, 3 / 5]
    assert np.isnan(table["found"][2])
    assert record["samples_sha256"] == sha256_of(path)


def test_the_record_names_whom_the_segmenter_was_trained_on(cohort, monkeypatch):
    record, _ = run(cohort, monkeypatch)
    hashes = read_cases(cohort / "cases" / "cases.tsv").set_index("case_id")["sha256"]
    assert record["arm"] == ARM
    assert (record["segmenter"]["arm"], record["segmenter"]["replicate"]) == ("real", "fold1_seed0")
    assert record["segmenter"]["cases"] == [
        {"case_id": f"P{number}_0", "patient_id": f"P{number}", "sha256": hashes[f"P{number}_0"]} for number in (0, 1)
    ]


def test_another_arm_than_the_baseline_does_not_judge(cohort, monkeypatch):
    run_compose(CONFIG, "real+real", cohort / "cases" / "cases.tsv", [], cohort / "arms" / "real+real")
    with pytest.raises(InputError, match=r"is the folder of real\+real. Use that of real"):
        run(cohort, monkeypatch, "real+real")


def test_a_sample_that_was_changed_is_refused(cohort, monkeypatch):
    path = cohort / "synthetic" / "s1" / "ct.nii.gz"
    write_volume(path, read_volume(path).like(np.zeros((8, 8, 8), np.int16)))
    with pytest.raises(InputError, match="s1"):
        run(cohort, monkeypatch)
