"""Accuracy, time and memory of layouts on a phantom cohort whose truth is exact, by slice thickness.

    OMP_NUM_THREADS=1 python benchmarks/layout_accuracy.py
    OMP_NUM_THREADS=1 python benchmarks/layout_accuracy.py --patients 5 --matrix 160 --pixel-mm 2.2

Every patient is scanned with another slice thickness, kernel and noise. Lungs and vessels are compared at the scan's
own resolution, nodules on the model grid:

    lung Dice       both lungs against the truth
    vessel recall   share of true vessel voxels of at least 2 mm radius that are found
    precision       share of found vessel voxels into which a true vessel of any width reaches
    nodules         share that have a cell of their own in the layout of 128 x 128 x 128
    seconds         of one core: lungs, vessels, and the way to the model grid
    GB              peak resident memory meanwhile, with the scan and its truth (sampled)
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pandas as pd
import psutil

from lungddpm.config.models import Config
from lungddpm.core.errors import ExcludedCaseError
from lungddpm.core.files import seed_from
from lungddpm.core.labels import Label
from lungddpm.core.volume import Volume, occupancy
from lungddpm.layouts.compose import build_case
from lungddpm.layouts.lungs import segment_lungs
from lungddpm.layouts.vessels import segment_vessels
from lungddpm.sources import Scan
from lungddpm.sources.phantom.patient import Thorax, thorax
from lungddpm.sources.phantom.settings import Phantom

SLICES_MM = (1.0, 1.5, 2.0, 3.0, 5.0)
KERNELS = ("standard", "sharp", "soft", "sharp")
NOISE_HU = {"soft": (10, 18), "standard": (15, 35), "sharp": (30, 60)}
LARGE_RADIUS_MM = 2.0
CONFIG = Config(grid={"size": (128, 128, 128)})


def main() -> None:
    """Print one row per scan as it is done, then the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patients", type=int, default=20)
    parser.add_argument("--matrix", type=int, default=256)
    parser.add_argument("--pixel-mm", type=float, default=1.4)
    options = parser.parse_args()
    rows = []
    for number in range(options.patients):
        rows.append(measure(protocol(number, options.matrix, options.pixel_mm), seed_from("layouts", number)))
        print(pd.DataFrame(rows[-1:]).round(3).to_csv(sep="\t", index=False, header=number == 0), end="", flush=True)
    print(summary(pd.DataFrame(rows)).to_markdown(floatfmt=".3f"))


def protocol(number: int, matrix: int, pixel_mm: float) -> Phantom:
    """How the patient of that number is scanned."""
    rng = np.random.default_rng(seed_from("protocol", number))
    kernel = KERNELS[number % len(KERNELS)]
    return Phantom(
        matrix=matrix,
        pixel_mm=pixel_mm,
        slice_mm=SLICES_MM[number % len(SLICES_MM)],
        kernel=kernel,
        noise_hu=rng.uniform(*NOISE_HU[kernel]),
        nodules=(2, 4),
        nodule_diameter_mm=(3, 30),
    )


def measure(parameters: Phantom, seed: int) -> dict:
    """Scan a patient, make the layout, compare it with the truth."""
    truth = canonical(thorax(parameters, seed))
    row = {"slice_mm": parameters.slice_mm, "kernel": parameters.kernel, "noise_hu": parameters.noise_hu}
    began = time.process_time()
    with peak_memory() as peak_bytes:
        try:
            lungs, vessels, layout = make_layout(truth)
        except ExcludedCaseError as error:
            print(error)
            return row | dict.fromkeys(("lung_dice", "vessel_recall", "vessel_precision", "nodules_present"), 0.0)
    seconds = time.process_time() - began
    large = truth.vessels & (truth.vessel_radius_mm >= LARGE_RADIUS_MM)
    cells = layout.array == Label.NODULE
    present = [(occupancy(truth.ct.like(n.mask), layout.affine, layout.shape)[cells] > 0).any() for n in truth.nodules]
    return row | {
        "lung_dice": 2 * np.count_nonzero(lungs & truth.lungs) / (np.count_nonzero(lungs) + truth.lungs.sum()),
        "vessel_recall": vessels[large].mean(),
        "vessel_precision": (truth.vessel_radius_mm > 0)[vessels].mean(),
        "nodules_present": np.mean(present),
        "seconds": seconds,
        "gigabytes": peak_bytes[0] / 1e9,
    }


def make_layout(truth: Thorax) -> tuple[np.ndarray, np.ndarray, Volume]:
    """Lungs and vessels (without the nodules) at the scan's resolution, and the layout on the model grid."""
    lungs_lr = segment_lungs(truth.ct, CONFIG.layouts)
    nodules = np.any([nodule.mask for nodule in truth.nodules], axis=0)
    vessels = segment_vessels(truth.ct, lungs_lr) & ~nodules
    labels = np.select([nodules, vessels, lungs_lr > 0], [Label.NODULE, Label.VESSEL, Label.LUNG]).astype(np.uint8)
    return lungs_lr > 0, vessels, build_case(Scan(truth.ct, labels=labels), CONFIG).layout


def canonical(truth: Thorax) -> Thorax:
    """The truth with every array turned to RAS+, as layouts are made."""

    def turned(array: np.ndarray) -> np.ndarray:
        return truth.ct.like(array).canonical().array

    return replace(
        truth,
        ct=truth.ct.canonical(),
        nodules=tuple(replace(nodule, mask=turned(nodule.mask)) for nodule in truth.nodules),
        **{name: turned(getattr(truth, name)) for name in ("lungs", "vessels", "vessel_radius_mm")},
    )


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """A list whose only entry is the peak resident memory of this process since the start, in bytes."""
    peak, stop, process = [0], threading.Event(), psutil.Process()

    def sample() -> None:
        while not stop.wait(0.02):
            peak[0] = max(peak[0], process.memory_info().rss)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield peak
    finally:
        stop.set()
        sampler.join()


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Means (and the worst lung Dice) for each slice thickness and overall."""
    groups = {f"{thickness:g} mm": group for thickness, group in rows.groupby("slice_mm")} | {"all": rows}
    columns = ["vessel_recall", "vessel_precision", "nodules_present", "seconds", "gigabytes"]
    return pd.DataFrame(
        {
            name: {"scans": len(group), "lung_dice": group["lung_dice"].mean(), "worst": group["lung_dice"].min()}
            | group[columns].mean().to_dict()
            for name, group in groups.items()
        }
    ).T


if __name__ == "__main__":
    main()
