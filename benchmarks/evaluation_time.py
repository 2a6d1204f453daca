"""How long the measures take: a case of 128^3 voxels, and the FROC of a whole benchmark.

    OMP_NUM_THREADS=1 python benchmarks/evaluation_time.py

    nodules        eight balls of 5 to 30 mm on a grid of 2.5 mm; the prediction shifts and misses some, and adds others
    everything     the same, but the prediction marks a quarter of all voxels at random, as no trained network does
    FROC           8 arms x 5 replicates x 250 cases, 2 lesions and about 10 candidates per case, tables of the report

CPU seconds, the best of three, reading and writing the files included.
"""

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
from scipy import ndimage

from lungddpm.config.models import Config
from lungddpm.core.cases import write_cases
from lungddpm.core.labels import Label
from lungddpm.core.volume import Volume, write_volume
from lungddpm.evaluation.froc import froc_tables
from lungddpm.evaluation.segmentation import run_evaluate

SIZE, SPACING_MM = 128, 2.5
AFFINE = np.diag([SPACING_MM] * 3 + [1.0])


def balls(centres: np.ndarray, diameters_mm: np.ndarray) -> np.ndarray:
    """Union of balls, bool."""
    indices = np.indices((SIZE,) * 3)
    squared = [((indices - centre[:, None, None, None]) ** 2).sum(axis=0) for centre in centres]
    radii = diameters_mm / 2 / SPACING_MM
    return np.any([distance <= radius**2 for distance, radius in zip(squared, radii, strict=True)], axis=0)


def write_benchmark_case(folder: Path, everywhere: bool) -> tuple[Path, Path]:
    """One test case with prediction and probabilities; returns table of cases and folder of predictions."""
    rng = np.random.default_rng(0)
    centres, diameters = rng.integers(16, SIZE - 16, (8, 3)), np.linspace(5, 30, 8)
    nodules = balls(centres, diameters)
    others = rng.integers(16, SIZE - 16, (6, 3))
    predicted = balls(np.vstack([centres[2:] + 1, others]), np.concatenate([diameters[2:], np.full(6, 8.0)]))
    probability = ndimage.gaussian_filter(predicted.astype(float), 1) + 0.02 * rng.random(predicted.shape)
    if everywhere:
        probability = 2 / 3 * rng.random(predicted.shape)
    table, predictions = folder / "cases.tsv", folder / "predictions"
    layout = np.where(nodules, Label.NODULE, Label.LUNG).astype(np.uint8)
    write_volume(folder / "case" / "layout.nii.gz", Volume(layout, AFFINE))
    write_volume(predictions / "case.nii.gz", Volume((probability > 0.5).astype(np.uint8), AFFINE))
    stored = np.rint(65535 * probability.clip(0, 1)).astype(np.uint16)
    write_volume(predictions / "probability" / "case.nii.gz", Volume(stored, AFFINE))
    row = {"case_id": "case", "patient_id": "patient", "role": "test", "status": "ok", "path": "case"}
    numbers = {f"size_{axis}": SIZE for axis in "xyz"} | {f"spacing_{axis}_mm": SPACING_MM for axis in "xyz"}
    write_cases(table, [row | numbers | {"n_nodules": 8}])
    return table, predictions


def simulated_tables(n_arms: int, n_replicates: int, n_cases: int) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Metrics, lesions and candidates of a benchmark, the columns that FROC needs."""
    rng = np.random.default_rng(0)
    keys = pd.MultiIndex.from_product(
        [range(n_arms), range(n_replicates), range(n_cases)], names=["arm", "replicate", "case_id"]
    ).to_frame(index=False)
    lesions = keys.loc[keys.index.repeat(2)].reset_index(drop=True)
    lesions["score"] = np.where(rng.random(len(lesions)) < 0.8, rng.beta(4, 1, len(lesions)), np.nan)
    candidates = keys.loc[keys.index.repeat(rng.poisson(8, len(keys)))].reset_index(drop=True)
    candidates["score"], candidates["lesions"] = rng.beta(1, 2, len(candidates)), None
    return keys.assign(n_candidates=10), lesions, candidates


def best_of_three(work, *arguments) -> float:
    """CPU seconds."""
    seconds = []
    for _ in range(3):
        start = time.process_time()
        work(*arguments)
        seconds.append(time.process_time() - start)
    return min(seconds)


def main() -> None:
    for name, everywhere in (("nodules", False), ("everything", True)):
        with TemporaryDirectory() as folder:
            table, predictions = write_benchmark_case(Path(folder), everywhere)
            seconds = best_of_three(run_evaluate, Config(), table, predictions, Path(folder) / "out")
            scored = pd.read_csv(Path(folder) / "out" / "metrics.csv").iloc[0]
        print(f"{name:12} {seconds:6.2f} s  {scored['n_lesions']} lesions, {scored['n_candidates']} candidates")
    seconds = best_of_three(froc_tables, *simulated_tables(8, 5, 250), 0.95, 0)
    print(f"{'FROC':12} {seconds:6.2f} s")


if __name__ == "__main__":
    main()
