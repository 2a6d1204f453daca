"""Files of a finished run that have changed, and what makes them again; tests/workflow/test_faults.py does it."""

import hashlib
import json

import pytest

from lungddpm.core.cases import COLUMNS
from lungddpm.operations.verify import outputs_to_make_again, run_checksums, run_verify

ARM, SAMPLES, MODEL = "real+lung_ddpm@1.0", "synthetic/lung_ddpm/all-fold0_seed0", "models/lung_ddpm/main/all"
FOLD = "nnUNet_results/seed0/Dataset501_LungNodule/LungDDPMTrainer__nnUNetPlans__lungddpm/fold_0"
MADE_BY = {
    "source/P1/scan/1.dcm": ["source/.complete"],
    "cases/index.tsv": ["cases/index.tsv"],
    "cases/cases-0.tsv": ["cases/cases-0.tsv"],
    "cases/cases.tsv": ["cases/cases.tsv"],
    "cases/nodules.tsv": ["cases/nodules.tsv"],
    "cases/P1/ct.nii.gz": ["cases/cases-0.tsv"],
    "qc/cases/P1.html": ["qc/index.html"],
    f"{MODEL}/model.safetensors": [f"{MODEL}/model.safetensors"],
    f"{MODEL}/history.csv": [f"{MODEL}/model.safetensors"],
    f"{SAMPLES}/samples-1.0-0.tsv": [f"{SAMPLES}/samples-1.0-0.tsv"],
    f"{SAMPLES}/S1/ct.nii.gz": [f"{SAMPLES}/samples-1.0-0.tsv"],
    f"arms/{ARM}/arm.json": [f"arms/{ARM}/arm.json"],
    f"arms/{ARM}/plan.json": [f"arms/{ARM}/plan.json"],
    f"arms/{ARM}/nnUNet_raw/Dataset501_LungNodule/dataset.json": [f"arms/{ARM}/arm.json"],
    f"arms/{ARM}/nnUNet_preprocessed/Dataset501_LungNodule/dataset.json": [f"arms/{ARM}/plan.json"],
    f"arms/{ARM}/draws/fold0_seed0/labelsTr/S1.nii.gz": [f"arms/{ARM}/draws/fold0_seed0/draw.json"],
    f"arms/{ARM}/{FOLD}/checkpoint_final.pth": [f"arms/{ARM}/{FOLD}/checkpoint_final.pth"],
    "segmentation/real/fold0_seed0/predictions/P1.nii.gz": ["segmentation/real/fold0_seed0/predictions"],
    "segmentation/real/fold0_seed0/metrics.csv": ["segmentation/real/fold0_seed0/metrics.csv"],
    "quality/lung_ddpm.csv": ["quality/lung_ddpm.csv"],
    "quality/lung_ddpm-sets.csv": ["quality/lung_ddpm-sets.csv"],
    "label_fidelity/fold0_seed0/metrics.csv": ["label_fidelity/fold0_seed0/metrics.csv"],
    "report.html": ["report.html"],
    "tables/verdict.csv": ["manifest.json"],
}
"""What each rule of the workflow declares as its output, by a file that it writes."""
NOT_OF_THE_RUN = [
    "cases/notes.txt", "quality/notes.csv", "arms/real+gem_3d@1.0/arm.json", "synthetic/gem_3d/all/samples-1.0-0.tsv",
    "segmentation/real+gem_3d@1.0/fold0_seed0/metrics.csv", "models/gem_3d/main/all/model.safetensors",
    "segmentation/real/fold0_seed7/metrics.csv", f"arms/{ARM}/draws/fold0_seed7/draw.json",
    f"arms/{ARM}/{FOLD.replace('seed0', 'seed7')}/checkpoint_final.pth",
]  # fmt: skip
NOT_SUMMED = [
    "bench.json", "workflow-report.html", "README.md", "cases/index.cache.json", "cases/index.task06.cache.json",
    f"{MODEL}/state/step-5.pt", f"arms/{ARM}/{FOLD}/training_log.txt", "cases/.tables", "logs/index.log",
]  # fmt: skip


@pytest.fixture
def results(tmp_path):
    """A finished run."""
    for name in [*MADE_BY, *NOT_OF_THE_RUN, *NOT_SUMMED]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("made")
    for table, case in (("cases/cases-0.tsv", "P1"), (f"{SAMPLES}/samples-1.0-0.tsv", "S1")):
        row = {**dict.fromkeys(COLUMNS, "0"), "path": case}
        (tmp_path / table).write_text("\t".join(COLUMNS) + "\n" + "\t".join(row[name] for name in COLUMNS) + "\n")
    config = {"arms": {"generators": ["lung_ddpm"], "controls": [], "doses": [1.0]}, "segmentation": {"seeds": [0]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shown = {name: hashlib.sha256(b"made").hexdigest() for name in ("report.html", "tables/verdict.csv")}
    (tmp_path / "manifest.json").write_text(json.dumps({"sha256": shown}))
    run_checksums(tmp_path)
    return tmp_path


def test_every_hash_is_of_a_file_that_stages_write(results):
    listed = [line.split("  ")[1] for line in (results / "SHA256SUMS").read_text().splitlines()]
    assert listed == sorted(
        [name for name in [*MADE_BY, *NOT_OF_THE_RUN] if name not in ("report.html", "tables/verdict.csv")]
    )
    assert run_verify(results, repair=False) == []


@pytest.mark.parametrize("name", MADE_BY)
def test_a_changed_file_is_made_again_by_its_rule(results, name):
    (results / name).write_text("changed")
    (damage,) = run_verify(results, repair=True)
    assert [str(output) for output in damage.outputs] == MADE_BY[name]
    assert not (results / name).exists()
    assert outputs_to_make_again(results) == MADE_BY[name]


@pytest.mark.parametrize("name", NOT_OF_THE_RUN)
def test_what_no_rule_makes_is_kept_and_summed_again(results, name):
    (results / name).write_text("changed")
    (damage,) = run_verify(results, repair=True)
    assert damage.outputs == ()
    assert (results / name).read_text() == "changed"
    assert outputs_to_make_again(results) == ["SHA256SUMS"]
    run_checksums(results)
    assert run_verify(results, repair=True) == []
    assert outputs_to_make_again(results) == []
