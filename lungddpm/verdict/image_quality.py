"""How close synthetic CT comes to its reference: whole volume, lungs, nodules, beside a floor that needs no model.

Intensities are compared on [0, 1] over `grid.window_hu`. The similarity index is SSIM with a 3-D Gaussian window of
sigma 1.5 voxels (Wang et al. 2004, IEEE TIP 13:600, as in scikit-image), because the five scales of MS-SSIM need 176
voxels an edge and the model grids have 64 or 128. A region's SSIM is the mean of the index map within the region.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from skimage.metrics import structural_similarity

from lungddpm import cases
from lungddpm.config import Config
from lungddpm.errors import InputError
from lungddpm.files import write_table
from lungddpm.layouts import Label
from lungddpm.progress import Progress
from lungddpm.volume import Volume, to_model_range

COLUMNS = ["generator", "case_id", "reference", "image", "region", "metric", "value"]
"""`image` is what is compared with the reference: `SYNTHETIC`, or the floor `CONSTANT_LUNGS`."""
SYNTHETIC, CONSTANT_LUNGS = "synthetic", "constant lungs"
METRICS = ("mse", "psnr_db", "ssim", "mean_difference_hu")
_SSIM_WINDOW = 11


def unit_range(hu: np.ndarray, window_hu: tuple[float, float]) -> np.ndarray:
    """HU -> [0, 1] float32, linear over the window, clipped outside it."""
    return (to_model_range(hu, window_hu) + 1) / 2


@dataclass(frozen=True)
class Sample:
    """A synthetic case beside the reference that it was made from; all on one grid.

    Attributes:
        reference_id: case id of the reference.
        ct: synthetic, HU.
        layout: what it was made from.
        reference: CT of the reference, HU.
        reference_layout: the reference's own layout; another one where nodules were placed or moved.
    """

    reference_id: str
    ct: Volume
    layout: Volume
    reference: Volume
    reference_layout: Volume


def regions(layout: np.ndarray, reference_layout: np.ndarray) -> dict[str, np.ndarray]:
    """Masks of the regions in which a synthetic CT can be compared with its reference; lungs include nodules.

    Where nodules were placed or moved, the reference shows something else: those voxels are left out of the lungs, and
    the nodules are not compared at all.
    """
    same = layout == reference_layout
    return {
        "whole volume": np.ones(layout.shape, bool),
        "lungs": (layout != Label.BACKGROUND) & same,
        "nodules": (layout == Label.NODULE) & same.all(),
    }


def constant_lungs(reference: np.ndarray, lungs: np.ndarray) -> np.ndarray:
    """The floor: the reference with one constant in the lungs, the one of least squared error (their mean)."""
    return np.where(lungs, reference[lungs].mean() if lungs.any() else 0, reference).astype(reference.dtype)


def compare_images(
    image: np.ndarray, reference: np.ndarray, masks: dict[str, np.ndarray], window_hu: tuple[float, float]
) -> list[dict]:
    """MSE, PSNR (dB), SSIM, and mean difference (HU, image minus reference) within each region.

    Args:
        image: (x, y, z) in [0, 1].
        reference: same shape and range.
        masks: region name -> bool mask of that shape.
        window_hu: the HU range that [0, 1] stands for.

    Returns:
        One dict {region, metric, value} a region and metric. Values of an empty region are NaN, as is SSIM on grids
        with fewer than 11 voxels an edge; the PSNR of identical images is infinite.
    """
    difference = image - reference
    similarity = np.full(image.shape, np.nan, np.float32)
    if min(image.shape) >= _SSIM_WINDOW:
        _, similarity = structural_similarity(
            image, reference, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
        )
    rows = []
    for region, mask in masks.items():
        values = dict.fromkeys(METRICS, math.nan)
        if mask.any():
            mse = float(np.square(difference[mask], dtype=np.float64).mean())
            values = {
                "mse": mse,
                "psnr_db": -10 * math.log10(mse) if mse else math.inf,
                "ssim": float(similarity[mask].mean(dtype=np.float64)),
                "mean_difference_hu": float(difference[mask].mean(dtype=np.float64)) * (window_hu[1] - window_hu[0]),
            }
        rows += [{"region": region, "metric": metric, "value": value} for metric, value in values.items()]
    return rows


def list_samples(sample_tables: list[Path]) -> pd.DataFrame:
    """The usable rows of a generator's case tables, in order, with the `folder` of each sample."""
    tables = []
    for path in sample_tables:
        table = cases.read_cases(path)
        table["folder"] = [cases.folder_of(path, row) for _, row in table.iterrows()]
        tables.append(table[table["status"] == "ok"])
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=[*cases.COLUMNS, "folder"])


def read_sample(sample_folder: Path, cases_table: Path) -> Sample:
    """A synthetic case and the case it was made from.

    Raises:
        InputError: `sample.json` names no known reference, or the two CTs lie on different grids.
    """
    origin = sample_folder / "sample.json"
    try:
        name = json.loads(origin.read_text(encoding="utf-8"))["reference_case_id"]
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        raise InputError(origin, "does not name its reference", "Delete the sample and synthesize it again.") from None
    table = cases.read_cases(cases_table)
    found = table[table["case_id"] == name]
    if found.empty:
        raise InputError(origin, f"names the reference {name}, which is not in {cases_table}", "Synthesize again.")
    synthetic, layout = cases.read_case(sample_folder)
    reference, reference_layout = cases.read_case(cases.folder_of(cases_table, found.iloc[0]))
    if not synthetic.same_grid(reference):
        raise InputError(sample_folder, f"is not on the grid of its reference {name}", "Synthesize it again.")
    return Sample(name, synthetic, layout, reference, reference_layout)


def run_quality(config: Config, cases_table: Path, sample_tables: list[Path], generator: str, output: Path) -> None:
    """Compare every sample of a generator with its reference, and the floor with it too.

    Writes `output`, a CSV with `COLUMNS`, one row a sample, image, region and metric.

    Args:
        config: the run's config; `grid.window_hu` is used.
        cases_table: `cases.tsv`, where the references are.
        sample_tables: the generator's case tables, one a shard.
        generator: its name.
        output: the CSV file to write.

    Raises:
        InputError: a file is missing or breaks the contract of a case.
    """
    window = config.grid.window_hu
    samples, rows = list_samples(sample_tables), []
    with Progress(f"image quality of {generator}", total=len(samples)) as progress:
        for case_id, folder in zip(samples["case_id"], samples["folder"], strict=True):
            sample = read_sample(folder, cases_table)
            masks = regions(sample.layout.array, sample.reference_layout.array)
            truth = unit_range(sample.reference.array, window)
            images = {
                SYNTHETIC: unit_range(sample.ct.array, window),
                CONSTANT_LUNGS: constant_lungs(truth, sample.layout.array != Label.BACKGROUND),
            }
            who = {"generator": generator, "case_id": case_id, "reference": sample.reference_id}
            for image, values in images.items():
                rows += [who | {"image": image} | row for row in compare_images(values, truth, masks, window)]
            progress.advance()
    write_table(output, pd.DataFrame(rows, columns=COLUMNS))
