"""NIfTI: CT in Hounsfield units in `images/`, labels in `labels/`, under the same file name.

nnU-Net's channel suffix on the image (`case_0000.nii.gz` with the label `case.nii.gz`) is accepted too. The stem names
the case and the patient: one scan per patient.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lungddpm.core.cases import check_case
from lungddpm.core.errors import ExcludedCaseError, InputError
from lungddpm.core.progress import Progress
from lungddpm.core.volume import (
    AIR_HU,
    LARGEST_VOXELS,
    Volume,
    is_sheared,
    read_grid,
    read_header,
    read_labels,
    read_volume,
    resample_upright,
    tilt_degrees,
    upright_grid,
)
from lungddpm.sources import Scan, Series
from lungddpm.sources.index import Cache, case_ids, reason_of

if TYPE_CHECKING:
    import pandas as pd

TITLE = "chest CT as NIfTI, in folders `images/` and `labels/`"
CITATION = "None: cite the data set."

_SUFFIXES = (".nii.gz", ".nii")
_CHANNEL = "_0000"
_NORMALISED_RANGE = 60.0
"""A CT of fewer HU from its lowest to its highest value is none."""


def find_series(path: Path, cache: Cache) -> list[Series]:
    """One series per image, from the headers of image and label; labels without an image have a row as well.

    `n_nodules` is unknown: how many nodules the labels hold, no header shows.
    """
    images = [file for file in sorted((path / "images").glob("[!.]*")) if file.name.endswith(_SUFFIXES)]
    labels = {image: _label_of(path, image) for image in images}
    found = []
    with Progress("NIfTI headers", total=len(images)) as progress:
        for image, label in labels.items():
            files = [image, label] if label else [image]
            key = " ".join(file.relative_to(path).as_posix() for file in files)
            grid = cache.recall(
                key,
                files,
                partial(_describe, path, image, label),
                keep=lambda grid: not grid["excluded"],
            )
            found.append(
                Series(
                    case_id="",
                    patient_id=_stem(image).removesuffix(_CHANNEL),
                    series_uid="",
                    size=tuple(grid["size"]),
                    spacing_mm=tuple(grid["spacing_mm"]),
                    n_nodules=None,
                    path=image.relative_to(path).as_posix(),
                    annotations=(label.relative_to(path).as_posix(),) if label else (),
                    excluded=grid["excluded"],
                )
            )
            progress.advance()
    for label in sorted(set((path / "labels").glob("[!.]*")) - set(labels.values())):
        if label.name.endswith(_SUFFIXES):
            fault = InputError(label, "has no image of its name in images/", "Add the image, or ignore this row.")
            name = label.relative_to(path).as_posix()
            found.append(Series("", _stem(label), "", n_nodules=None, path=name, excluded=reason_of(fault, path)))
    names = case_ids(series.patient_id for series in found)
    return [replace(series, case_id=name) for series, name in zip(found, names, strict=True)]


def load_scan(path: Path, case: pd.Series) -> Scan:
    """Read CT and labels of one case in the closest RAS+ orientation.

    Args:
        path: folder of the data set.
        case: row of the index; `path` is the image, `annotations` names the labels.

    Returns:
        The CT in HU, at least -1024, with its labels; whether it is in HU, only `build_case` can judge.

    Raises:
        ExcludedCaseError: an unreadable file, different grids, a CT that holds NaN or is constant, or unknown labels.
    """
    image, label = path / case["path"], path / json.loads(case["annotations"])[0]
    try:
        notes = (*read_header(image).notes, *(f"labels: {note}" for note in read_header(label).notes))
        carry = _carry(image, label)
        ct, labels = read_volume(image), read_labels(label)
    except InputError as fault:
        raise ExcludedCaseError(fault.what, fault.problem, fault.remedy) from None
    # On the CT's own grid from here: the labels' header may be rounded, or hold less.
    labels = ct.like(Volume(labels.array, carry @ labels.affine).canonical().array)
    check_case(ct, labels, image)
    labels = labels.like(labels.array.astype(np.uint8))
    low, high = float(ct.array.min()), float(ct.array.max())
    # Values of a smaller range are not HU. `build_case` says what they look like, which rounding or
    # padding with air would hide.
    if high - low > _NORMALISED_RANGE:
        ct = ct.like(np.clip(np.rint(ct.array), AIR_HU, np.iinfo(np.int16).max).astype(np.int16))
        low = AIR_HU
    if is_sheared(ct.affine):
        notes = (
            *notes,
            f"its axes were sheared by {tilt_degrees(ct.affine):.1f} degrees (tilted gantry): CT and labels were "
            "resampled to an upright grid",
        )
        ct, labels = resample_upright(ct, outside=low), resample_upright(labels, labels=True)
    return Scan(ct=ct, labels=labels.array, files=(image, label), notes=notes)


def _describe(top: Path, image: Path, label: Path | None) -> dict:
    """What the headers of an image and its label say, ready for the cache."""
    size, spacing_mm, excluded = [0, 0, 0], [0.0, 0.0, 0.0], ""
    try:
        grid = read_grid(image)
        size, spacing_mm = list(grid.shape), grid.spacing_mm.tolist()
        if is_sheared(grid.affine) and math.prod(upright_grid(grid.affine, grid.shape)[1]) > LARGEST_VOXELS:
            problem = f"has axes that are sheared by {tilt_degrees(grid.affine):.0f} degrees, too much to be resampled"
            raise InputError(image, problem, "Write the file with its true geometry.")
        if label is None:
            name = _stem(image).removesuffix(_CHANNEL)
            raise InputError(image, f"has no label labels/{name}.nii.gz", "Add it, with 1 lung, 2 nodule, 3 vessel.")
        _carry(image, label)
    except InputError as fault:
        excluded = reason_of(fault, top)
    return {"size": size, "spacing_mm": spacing_mm, "excluded": excluded}


def _stem(file: Path) -> str:
    return next(file.name.removesuffix(suffix) for suffix in _SUFFIXES if file.name.endswith(suffix))


def _label_of(top: Path, image: Path) -> Path | None:
    stem = _stem(image)
    candidates = [
        top / "labels" / (name + suffix) for name in (stem, stem.removesuffix(_CHANNEL)) for suffix in _SUFFIXES
    ]
    return next((label for label in candidates if label.is_file()), None)


def _carry(image: Path, label: Path) -> np.ndarray:
    """What takes a label's place in mm, as `read_labels` has it, to its place by the image's header, (4, 4).

    The voxels are the same where any affine of one header agrees with any of the other, to within half a voxel: labels
    are written with rounded headers, with a qform only (which cannot hold a tilt), or with the qform of their CT.

    Raises:
        InputError: a header that cannot be used, or shapes or affines that do not agree.
    """
    ours, theirs = read_header(image), read_header(label)
    for mine, my_grid in zip(ours.affines, ours.grids, strict=True):
        for other, other_grid in zip(theirs.affines, theirs.grids, strict=True):
            if my_grid.same_grid(other_grid, tolerance_mm=my_grid.spacing_mm.min() / 2):
                return ours.affines[0] @ np.linalg.inv(mine) @ other @ np.linalg.inv(theirs.affines[0])
    if ours.grid.shape != theirs.grid.shape:
        raise InputError(
            label,
            f"has shape {theirs.grid.shape}, but images/{image.name} has {ours.grid.shape}",
            "Export both on one grid.",
        )
    raise InputError(label, f"has another affine than images/{image.name}", "Export both with one geometry.")
