"""A second data set beside the source, from its images to the report."""

import json

import nibabel
import numpy as np
import pandas as pd
import pytest
from tiny import TWO_ARMS, finished_rules, merged

from lungddpm.core.labels import Label
from lungddpm.sources.phantom.patient import thorax
from lungddpm.sources.phantom.settings import Phantom

pytestmark = pytest.mark.workflow

SMALL = {
    "source": {"phantom": {"patients": 4}},
    "roles": {"discovery": 2, "reference": 1, "test": 1},
    "segmentation": {"n_folds": 2},
    "arms": {"generators": ["paste_constant"]},
}
"""As few cases as there can be, and a generator that is not trained."""


def write_images(folder, names):
    """Thoraces and their truth, as a hospital may have them."""
    for directory in ("images", "labels"):
        (folder / directory).mkdir(parents=True)
    scan = Phantom(matrix=80, pixel_mm=4.4, slice_mm=6, nodules=(2, 2), nodule_diameter_mm=(16, 30))
    for seed, name in enumerate(names):
        patient = thorax(scan, seed)
        labels = np.where(patient.lungs, np.uint8(Label.LUNG), np.uint8(Label.BACKGROUND))
        labels[patient.vessels] = Label.VESSEL
        for nodule in patient.nodules:
            labels[nodule.mask] = Label.NODULE
        for directory, array in (("images", patient.ct.array), ("labels", labels)):
            nibabel.save(nibabel.Nifti1Image(array, patient.ct.affine), folder / directory / f"{name}.nii.gz")


def dice_of(prediction, layout):
    found = np.asarray(nibabel.load(prediction).dataobj) == 1
    truth = np.asarray(nibabel.load(layout).dataobj) == Label.NODULE
    return 2 * (found & truth).sum() / (found.sum() + truth.sum())


def test_images_beside_a_simulated_source_reach_the_report(make_benchmark, tmp_path):
    folder = tmp_path / "the clinic's scans"
    # Its patients are called as those of the source are.
    write_images(folder, ["PHANTOM-0001", "PHANTOM-0002"])
    clinic = {"kind": "images", "path": str(folder), "distinct_patients": True}
    benchmark = make_benchmark(tmp_path / "run", merged(TWO_ARMS, SMALL | {"external_tests": {"clinic": clinic}}))
    run = benchmark.run()
    assert run.returncode == 0, run.stdout[-5000:]
    results = benchmark.results
    cases = pd.read_csv(results / "cases/cases.tsv", sep="\t", keep_default_na=False)
    assert cases.groupby("data_set")["role"].value_counts().to_dict() == {
        ("internal", "discovery"): 2, ("internal", "reference"): 1, ("internal", "test"): 1, ("clinic", "test"): 2,
    }  # fmt: skip
    own = cases[cases["data_set"] == "clinic"]
    assert set(own["patient_id"]) == {"clinic:PHANTOM-0001", "clinic:PHANTOM-0002"}
    assert (cases["status"] == "ok").all()
    # How many cases there are is counted, as for any data set whose number is not known before.
    assert "count_cases" in finished_rules(run.stdout)
    arms = ["real", "real+paste_constant@1.0"]
    for arm in arms:
        record = json.loads((results / "arms" / arm / "arm.json").read_text())
        assert not {case["patient_id"] for case in record["cases"]} & set(own["patient_id"])
    # The verdict is that of `source`; the set has its own figures, checks and FROC.
    assert set(benchmark.table("verdict.csv")["n_cases"]) == {1}
    scored = benchmark.table("external_cases.csv").set_index(["arm", "case_id"])["dice"]
    assert set(scored.index) == {(arm, case_id) for arm in arms for case_id in own["case_id"]}
    for (arm, case_id), dice in scored.items():
        prediction = results / "segmentation" / arm / "fold0_seed0/predictions" / f"{case_id}.nii.gz"
        assert dice == pytest.approx(dice_of(prediction, results / "cases" / case_id / "layout.nii.gz"))
    checks = benchmark.table("external_instrument.csv").set_index("check")
    assert set(checks["data_set"]) == {"clinic"}
    assert checks["status"].to_dict() == {
        "positive control found": "not measured",
        "null control quiet": "not measured",
        "enough runs and cases": "failed",
        "nothing missing": "passed",
    }
    assert set(benchmark.table("external_froc.csv")["arm"]) == set(arms)
    page = (results / "report.html").read_text(encoding="utf-8")
    assert 'id="external-clinic"' in page
    assert 'id="checks-clinic"' in page
    assert str(folder) not in page
    assert "Nothing to be done" in benchmark.run("--dry-run").stdout
