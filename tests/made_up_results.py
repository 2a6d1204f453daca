"""A results folder as the other rooms leave it: metrics of arms, samples, training logs, history, benchmarks."""

import functools
import json

import numpy as np
import pandas as pd
import pytest

from lungddpm.config.loading import parse_config
from lungddpm.core.arms import Arm
from lungddpm.core.cases import CaseFolder, write_cases
from lungddpm.core.files import write_json, write_table, write_text
from lungddpm.core.labels import Label
from lungddpm.core.volume import Volume, read_volume, write_volume
from lungddpm.evaluation.segmentation import run_evaluate
from lungddpm.quality.image_quality import run_quality
from lungddpm.quality.label_fidelity import cases_to_judge, judge
from lungddpm.segmentation.nnunet import fold_folder

SIZE = (20, 18, 16)
AFFINE = np.diag([4.0, 4.0, 5.0, 1.0])


def case_row(case_id, patient_id, role, **changes):
    row = {
        "case_id": case_id, "patient_id": patient_id, "source": "phantom", "data_set": "internal", "role": role,
        "series_uid": f"1.2.{case_id}", "size_x": SIZE[0], "size_y": SIZE[1], "size_z": SIZE[2],
        "spacing_x_mm": 4.0, "spacing_y_mm": 4.0, "spacing_z_mm": 5.0, "n_nodules": 1,
        "status": "ok", "reason": "", "path": case_id, "sha256": "0" * 64,
    }  # fmt: skip
    return row | changes


def write_case(folder, rng, nodule=True, provenance=None, offset_hu=0):
    """A block of lung with one cubic nodule of 3 voxels per edge."""
    layout = np.zeros(SIZE, np.uint8)
    layout[3:17, 3:15, 3:13] = Label.LUNG
    if nodule:
        layout[8:11, 6:9, 5:8] = Label.NODULE
    ct = np.where(layout == Label.LUNG, -850 + offset_hu, 40) + rng.normal(0, 20, SIZE)
    write_volume(folder / "ct.nii.gz", Volume(ct.astype(np.int16), AFFINE))
    write_volume(folder / "layout.nii.gz", Volume(layout, AFFINE))
    write_json(folder / ("sample.json" if provenance else "case.json"), provenance or {})
    return layout


SHARES = {"real+lung_ddpm": 0.9, "real+reference": 0.9}
"""Share of a nodule that an arm's segmenters find; all others find half."""


@pytest.fixture
def make_results(tmp_path):
    """A function that writes a results folder and returns (config, folder): `write_results` in the test's own."""
    return functools.partial(write_results, tmp_path / "results")


def write_results(
    results,
    n_test=7,
    n_replicates=2,
    nodules=True,
    extras=True,
    probabilities=True,
    learning=False,
    offset_hu=0,
    run_sd=0.0,
    shares=SHARES,
    external=None,
    **overrides,
):
    """Write a results folder and return (config, folder).

    Args:
        results: the folder.
        n_test: test cases.
        n_replicates: folds.
        nodules: whether test cases have one.
        extras: samples, arms, logs, history and times as well.
        probabilities: of the predictions.
        learning: whether the segmenters' loss still falls at the end.
        offset_hu: how much brighter than their reference the samples' lungs are.
        run_sd: sd of the share of nodules that a run finds.
        shares: mean share that an arm's runs find; 0.5 where it is not named.
        external: how many test cases each external test set has, by its name.
        overrides: of the config.
    """
    external = external or {}
    values = {"arms": {"controls": ["real"]}, "segmentation": {"folds": list(range(n_replicates))}} | overrides
    values["external_tests"] = {name: {"kind": "lidc", "path": f"/data/{name}"} for name in external}
    config, rng = parse_config(values), np.random.default_rng(4)
    table = results / "cases" / "cases.tsv"
    rows, layouts = [], {}
    for number in range(2 + n_test):
        role = ("discovery", "reference")[number] if number < 2 else "test"
        case_id = f"case-{number:02d}"
        layouts[case_id] = write_case(table.parent / case_id, rng, nodule=nodules or number < 2)
        sha256 = CaseFolder(table.parent / case_id).hash()
        rows.append(case_row(case_id, f"patient-{number:02d}", role, sha256=sha256))
    for name in [name for name, n_cases in external.items() for _ in range(n_cases)]:
        case_id = f"{name}-{len(rows):02d}"
        layouts[case_id] = write_case(table.parent / case_id, rng)
        sha256 = CaseFolder(table.parent / case_id).hash()
        rows.append(case_row(case_id, f"patient-{case_id}", "test", data_set=name, sha256=sha256))
    tested = rows[2:]
    rows.append(case_row("case-99", "patient-99", "test", status="excluded", reason="holds <b>no</b> lungs"))
    write_cases(table, rows)
    for arm in config.arms.names():
        for replicate in config.segmentation.replicates():
            folder = results / "segmentation" / arm / replicate
            share = shares.get(Arm.parse(arm).recipe.name.split("@")[0], 0.5) + run_sd * rng.normal()
            for row in tested:
                nodule = layouts[row["case_id"]] == Label.NODULE
                mask = nodule & (rng.random(SIZE) < share)
                mask[0, 0, 0] = True
                path = folder / "predictions" / f"{row['case_id']}.nii.gz"
                write_volume(path, Volume(mask.astype(np.uint8), AFFINE))
                if probabilities:
                    # 0.8 in the nodule, 0.4 in the false positive.
                    probability = np.where(nodule, 52428, 26214 * mask).astype(np.uint16)
                    write_volume(path.parent / "probability" / path.name, Volume(probability, AFFINE))
            run_evaluate(config, table, folder / "predictions", folder)
    if extras:
        _write_extras(config, results, rng, offset_hu)
        _write_logs(config, results, rng, learning)
    return config, results


def _write_logs(config, results, rng, learning):
    """nnU-Net's logs of all replicates, of 12 saved states: the loss falls to the end, or only in the first half."""
    for arm in config.arms.names():
        for fold in config.segmentation.folds:
            for seed in config.segmentation.seeds:
                done = np.linspace(0, 1, 12) if learning else np.linspace(0, 2, 12).clip(0, 1)
                loss = 0.2 - 0.9 * done + rng.normal(0, 0.005, 12)
                dice = 0.6 * done + rng.normal(0, 0.005, 12).clip(0)
                lines = [
                    f"9: Epoch {epoch} \n9: Current learning rate: 0.1 \n9: train_loss {a:.4f}, pseudo Dice {b:.4f} \n"
                    for epoch, (a, b) in enumerate(zip(loss, dice, strict=True))
                ]
                write_text(fold_folder(results / "arms" / arm, fold, seed) / "training_log_1.txt", "".join(lines))


def _write_extras(config, results, rng, offset_hu):
    (cohort, *_) = config.cohorts("lung_ddpm", config.arms.largest_number())
    folder = results / "synthetic" / "lung_ddpm" / cohort.name
    for number in range(2):
        cost = {"seconds": 2.0 + number, "memory_mib": 800 + 10 * number, "device": "cpu"}
        provenance = {"reference_case_id": "case-01", "n_nodules": 1 + number, **cost}
        write_case(folder / f"sample-{number}", rng, provenance=provenance, offset_hu=offset_hu)
        sha256 = CaseFolder(folder / f"sample-{number}").hash()
        row = case_row(f"sample-{number}", "patient-01", "", source="lung_ddpm", sha256=sha256)
        write_cases(folder / f"samples-{number}.tsv", [row])
    tables = [folder / "samples-0.tsv", folder / "samples-1.tsv"]
    output = results / "quality" / "lung_ddpm.csv"
    run_quality(config, results / "cases" / "cases.tsv", tables, "lung_ddpm", output)
    steps = np.arange(1, 101)
    write_table(
        results / config.trained_generators()[0].model_folder / "history.csv",
        pd.DataFrame({"step": steps, "loss": 1 / steps}),
    )
    for arm in config.arms.names():
        entry = {"name": "case-00", "case_id": "case-00", "patient_id": "patient-00", "source": "phantom"}
        entry["trained_on"] = True
        write_json(
            results / "arms" / arm / "arm.json",
            {"arm": arm, "cases": [entry], "leak_guard": {"shared_patients": []}},
        )
    times = {f"train_segmenter-{arm}-{name}": 1800.0 for arm, name in _runs(config)}
    for job, seconds in (times | {"evaluate-real-fold0_seed0": 61.5}).items():
        text = f"s\th:m:s\tmax_rss\tcpu_time\n{seconds}\t0:01:01\t-\t60.0\n"
        write_text(results / "benchmarks" / f"{job}.tsv", text)
    judged = cases_to_judge(config, results / "arms" / "real", results / "cases" / "cases.tsv", tables)
    for number, replicate in enumerate(config.segmentation.replicates()):
        # Each replicate loses more of every synthetic nodule, and nothing of a real one.
        found = judge(judged, lambda ct, lost=number + 1: _without(ct, lost * ("sample" in ct.parent.name)), replicate)
        for name, table in zip(("metrics.csv", "lesions.csv"), found, strict=True):
            write_table(results / "label_fidelity" / replicate / name, table)


def _runs(config):
    return [(arm, name) for arm in config.arms.names() for name in config.segmentation.replicates()]


def _without(ct, lost):
    """The nodule of a CT, without this many of its voxels."""
    layout = read_volume(ct.with_name("layout.nii.gz"))
    mask = layout.array == Label.NODULE
    mask[tuple(np.argwhere(mask)[:lost].T)] = False
    return layout.like(mask)


@pytest.fixture
def read_manifest():
    """Parse a results folder's manifest.json."""
    return lambda results: json.loads((results / "manifest.json").read_text())
