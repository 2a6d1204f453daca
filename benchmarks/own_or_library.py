"""What our own code does better than the libraries that offer the same: processor time of one thread, and errors.

    OMP_NUM_THREADS=1 python benchmarks/own_or_library.py [vessels|resampling|ssim|fid|froc|ema ...]

vessels     tubes in a box of 96^3 voxels of 1 mm, a lung in it, at the four scales of `layouts.vessels`
resampling  white noise of 1 HU onto cells of 2.5 times the edge: standard deviation that is left, in HU; what a mean
            over each cell does not leave is aliasing
ssim        maps of two factors, for regions, of a pair of 128^3 voxels
fid         two sets of 8 images with 512 features each, the second shifted by a known vector: relative error of the
            distance, whose truth is the vector's squared length
froc        CPM of four lesions found, after one false positive, in four scans: nothing is found at 1/8 false positives
            per scan, all from 1/4 on, so that the truth is 6/7
ema         how much of the initial weights the average still holds after 100 updates with decay 0.995
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import SimpleITK
import torch
from diffusers.training_utils import EMAModel
from monai.metrics.fid import FIDMetric
from monai.metrics.froc import compute_froc_curve_data, compute_froc_score
from monai.metrics.regression import compute_ssim_and_cs
from scipy import ndimage
from skimage.filters import sato
from skimage.transform import resize

from lungddpm.config.sections import Training
from lungddpm.core.volume import Volume, resample_image
from lungddpm.evaluation.froc import RATES, Findings
from lungddpm.layouts.vessels import _SCALES_MM, segment_vessels
from lungddpm.models.optimization import Optimization
from lungddpm.quality.feature_distances import frechet_distance
from lungddpm.quality.similarity import similarity_maps

DECAY, UPDATES = 0.995, 100
Row = tuple[str, str, float | None, float | None]
"""what, by which code, processor seconds, figure"""


def main() -> None:
    """Print a table, one row per code."""
    torch.set_num_threads(1)
    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    measures = {
        "vessels": vessels, "resampling": resampling, "ssim": ssim, "fid": fid, "froc": froc, "ema": ema,
    }  # fmt: skip
    rows: list[Row] = []
    for name in sys.argv[1:] or measures:
        rows += measures[name]()
    table = pd.DataFrame(rows, columns=["what", "code", "processor s", "figure"])
    print(table.to_markdown(index=False, floatfmt=".3g"))


def vessels() -> Iterator[Row]:
    """Multi-scale tubeness; for our code, the whole segmentation."""
    x, y, z = np.indices((96, 96, 96)) - 47.5
    lung = x**2 + y**2 + (z / 1.2) ** 2 < 38**2
    tubes = (np.hypot((x % 16) - 8, (y % 16) - 8) < 2) & lung
    noise = np.random.default_rng(0).normal(0, 20, lung.shape)
    hu = (np.where(tubes, 0, np.where(lung, -850, 40)) + noise).astype(np.float32)
    ct = Volume(hu, np.eye(4))
    yield "vessels", "own", timed(segment_vessels, ct, lung)[0], None
    yield "vessels", "scikit-image sato", timed(sato, hu, _SCALES_MM, black_ridges=False)[0], None

    def objectness() -> None:
        image = SimpleITK.GetImageFromArray(hu)
        for scale in _SCALES_MM:
            smooth = SimpleITK.SmoothingRecursiveGaussian(image, scale)
            SimpleITK.ObjectnessMeasure(smooth, objectDimension=1)

    yield "vessels", "SimpleITK objectness", timed(objectness)[0], None


def resampling() -> Iterator[Row]:
    """Noise left by way of each code; the inner cells only, for edges are treated differently."""
    coarse, factor = 48, 2.5
    fine = int(coarse * factor)
    noise = np.random.default_rng(0).normal(0, 1, (fine,) * 3).astype(np.float32)
    affine = np.diag([factor, factor, factor, 1.0])
    affine[:3, 3] = (factor - 1) / 2

    def by_simpleitk() -> np.ndarray:
        grid = SimpleITK.Image([coarse] * 3, SimpleITK.sitkFloat32)
        grid.SetSpacing([factor] * 3)
        grid.SetOrigin([(factor - 1) / 2] * 3)
        return SimpleITK.GetArrayFromImage(SimpleITK.Resample(SimpleITK.GetImageFromArray(noise), grid))

    ways: dict[str, Callable[[], np.ndarray]] = {
        "own": lambda: resample_image(Volume(noise, np.eye(4)), affine, (coarse,) * 3).array,
        "SimpleITK linear": by_simpleitk,
        "scikit-image resize, anti-aliasing": lambda: resize(noise, (coarse,) * 3, order=1, anti_aliasing=True),
        "scipy zoom, linear": lambda: ndimage.zoom(noise, 1 / factor, order=1, grid_mode=True, mode="nearest"),
    }
    for name, way in ways.items():
        seconds, array = timed(way)
        yield "resampling", name, seconds, float(array[3:-3, 3:-3, 3:-3].std())


def ssim() -> Iterator[Row]:
    """SSIM and its part without luminance."""
    pair = np.random.default_rng(0).random((2, 128, 128, 128)).astype(np.float32)
    tensors = [torch.from_numpy(image)[None, None] for image in pair]
    options = {"spatial_dims": 3, "kernel_size": (11,) * 3, "kernel_sigma": (1.5,) * 3, "data_range": 1.0}
    yield "ssim", "own", timed(similarity_maps, *pair)[0], None
    yield "ssim", "MONAI", timed(compute_ssim_and_cs, *tensors, **options)[0], None


def fid() -> Iterator[Row]:
    """Error of the distance of two singular Gaussians, relative to the truth."""
    random = np.random.default_rng(0)
    features = random.normal(size=(8, 512))
    shift = random.normal(0, 0.1, 512)
    seconds, found = timed(frechet_distance, features, features + shift)
    yield "fid", "own", seconds, abs(found / (shift @ shift) - 1)
    tensors = (torch.from_numpy(features + shift), torch.from_numpy(features))
    seconds, found = timed(FIDMetric(), *tensors)
    yield "fid", "MONAI", seconds, abs(float(found) / (shift @ shift) - 1)


def froc() -> Iterator[Row]:
    """The candidate with the lowest score is a true one."""
    true, false, scans = np.array([0.9, 0.8, 0.7, 0.6]), np.array([0.95]), np.arange(4)
    findings = Findings(4, true, scans, false, np.array([0]))
    yield "froc", "own", None, float(findings.sensitivity(np.array(RATES), np.ones((1, 4))).mean())
    curve = compute_froc_curve_data(false, true, num_targets=4, num_images=4)
    yield "froc", "MONAI", None, float(compute_froc_score(*curve, eval_thresholds=RATES))


def ema() -> Iterator[Row]:
    """Weights that jump from 0 to 1 after the first update: by definition, 0.995^100 = 0.606 of the start is left."""
    model, own = (torch.nn.Linear(1, 1, bias=False) for _ in range(2))
    of_run: Any = SimpleNamespace(
        model=model, average=own, training=Training(ema_decay=DECAY, ema_every=1, ema_start=0, steps=UPDATES)
    )
    torch.nn.init.zeros_(own.weight)
    torch.nn.init.zeros_(model.weight)
    of_diffusers = EMAModel(model.parameters(), decay=DECAY)
    of_diffusers.step(model.parameters())
    torch.nn.init.ones_(model.weight)
    with torch.no_grad():
        for step in range(UPDATES):
            Optimization._update_average(of_run, step)
            of_diffusers.step(model.parameters())
    yield "ema", "own", None, 1 - own.weight.item()
    yield "ema", "diffusers", None, 1 - of_diffusers.shadow_params[0].item()


def timed(work: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[float, Any]:
    """Processor seconds, the least of three calls, and what the last one returned."""
    seconds, result = [], None
    for _ in range(3):
        began = time.process_time()
        result = work(*arguments, **options)
        seconds.append(time.process_time() - began)
    return min(seconds), result


if __name__ == "__main__":
    main()
