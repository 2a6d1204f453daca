"""The quality filter: how much of a sample's nodules do segmenters trained on real cases find?

After FreeTumor (Wu et al. 2024, arXiv 2406.01264), where a synthetic lesion counts only if the baseline segmenter finds
at least 70 % of its voxels. Here every candidate for an arm is judged as a whole; `lungddpm.arms.compose` then keeps
those above `arms.filter.found`. The segmenters are trained only on the arm's own real cases, so no other patient
influences the choice.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from lungddpm.arms.compose import FILTER_COLUMNS, FILTER_TABLE, first_samples
from lungddpm.config.models import Config
from lungddpm.core.arms import Arm
from lungddpm.core.cases import read_cases, unchanged_folder_of
from lungddpm.core.cohorts import training_cases
from lungddpm.core.errors import InputError
from lungddpm.core.files import read_json, sha256_of, write_json, write_table
from lungddpm.core.labels import Label
from lungddpm.core.progress import Progress
from lungddpm.core.volume import Volume
from lungddpm.segmentation.nnunet import open_segmenter


def run_filter(
    config: Config,
    arm: str,
    arm_dir: Path,
    fold: int,
    seed: int,
    cases_table: Path,
    sample_tables: list[Path],
    output: Path,
    device: str = "auto",
    processes: int = 1,
) -> None:
    """Segment an arm's candidates with one replicate of its baseline.

    Writes to `output`: `samples.csv` (`FILTER_COLUMNS`) and, last, `filter.json`: the segmenter and
    its training cases.

    Args:
        config: the run's config.
        arm: its name.
        arm_dir: folder of its baseline, the same real cases alone.
        fold: fold of the judging replicate.
        seed: its seed.
        cases_table: `cases.tsv`.
        sample_tables: tables of the candidates, in the order of shards.
        output: folder of this replicate and arm.
        device: auto, cpu, cuda (the first visible GPU) or mps.
        processes: maximum number of threads of nnU-Net.

    Raises:
        ConfigError: not an arm, or no such device.
        InputError: the replicate is not trained or belongs to another arm, or a sample is missing or was changed.
    """
    record = output / "filter.json"
    record.unlink(missing_ok=True)
    judged = Arm.parse(arm)
    composed = read_json(arm_dir / "arm.json", "Run 'lungddpm compose' for this arm first.")
    if composed["arm"] != judged.baseline.name:
        raise InputError(arm_dir, f"is the folder of {composed['arm']}", f"Use that of {judged.baseline.name}.")
    n_real = len(training_cases(read_cases(cases_table), judged.real_cases, config.seed))
    candidates = first_samples(sample_tables, round(config.arms.drawn_dose(judged) * n_real))
    with open_segmenter(config, arm_dir, fold, seed, device, processes) as segmenter:
        table = judge_candidates(candidates, segmenter.mask, f"filter of {judged.name}, fold {fold} seed {seed}")
    write_table(output / FILTER_TABLE, table)
    write_json(
        record,
        {
            "arm": judged.name,
            "segmenter": {
                "arm": composed["arm"],
                "replicate": config.segmentation.replicate_name(fold, seed),
                "arm_fingerprint": composed["fingerprint"],
                "cases": [
                    {key: case[key] for key in ("case_id", "patient_id", "sha256")} for case in composed["cases"]
                ],
            },
            "samples_sha256": sha256_of(output / FILTER_TABLE),
        },
    )


def judge_candidates(
    candidates: list[tuple[Path, pd.Series]], segment: Callable[[Path], Volume], what: str
) -> pd.DataFrame:
    """The share of the nodule voxels found in each sample: `FILTER_COLUMNS`.

    Args:
        candidates: rows of sample tables, each with its table, in the order of the plan.
        segment: path of a CT (HU) -> its nodules, 0 or 1, on the grid of the CT.
        what: description for the progress bar.

    Raises:
        InputError: a CT or layout is missing, was changed or breaks the contract of a case.
    """
    rows = []
    with Progress(what, len(candidates)) as progress:
        for number, (table, row) in enumerate(candidates):
            folder = unchanged_folder_of(table, row)
            _, layout = folder.read()
            nodule = layout.array == Label.NODULE
            found = segment(folder.ct).array.astype(bool)[nodule]
            share = float(found.mean()) if found.size else np.nan
            rows.append((number, row["case_id"], row["sha256"], int(found.size), share))
            progress.advance()
    return pd.DataFrame(rows, columns=FILTER_COLUMNS)
