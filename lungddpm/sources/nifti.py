"""NIfTI: CT in Hounsfield units in `images/`, labels in `labels/`, under the same file name.

nnU-Net's channel suffix on the image (`case_0000.nii.gz` with the label `case.nii.gz`) is accepted too. The stem names
the case and the patient: one scan a patient.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lungddpm.cases import check_case
from lungddpm.errors import ExcludedCaseError, InputError
from lungddpm.progress import Progress
from lungddpm.sources import Scan, Series, case_ids
from lungddpm.volume import AIR_HU, Volume, read_volume

if TYPE_CHECKING:
    import pandas as pd

_SUFFIXES = (".nii.gz", ".nii")
_CHANNEL = "_0000"


def find_series(path: Path) -> list[Series]:
    """One series an image, from the headers of image and label.

    `n_nodules` stays 0: how many nodules the labels hold, no header tells.
    """
    images = [file for file in sorted((path / "images").glob("[!.]*")) if file.name.endswith(_SUFFIXES)]
    patients = [_stem(image).removesuffix(_CHANNEL) for image in images]
    found = []
    with Progress("NIfTI headers", total=len(images)) as progress:
        for image, patient, case_id in zip(images, patients, case_ids(patients), strict=True):
            found.append(_describe(path, image, patient, case_id))
            progress.advance()
    return found


def load_scan(path: Path, case: pd.Series) -> Scan:
    """Read CT and labels of one case in the closest RAS+ orientation.

    Args:
        path: folder of the data set.
        case: row of the index; `path` is the image, `annotations` names the labels.

    Returns:
        The CT in HU, at least -1024, with its labels.

    Raises:
        ExcludedCaseError: an unreadable file, different grids, a CT that is not in HU, or unknown labels.
    """
    image, label = path / case["path"], path / json.loads(case["annotations"])[0]
    try:
        ct, labels = read_volume(image), read_volume(label)
    except InputError as fault:
        raise ExcludedCaseError(fault.what, fault.problem, fault.remedy) from None
    check_case(ct, labels, image)
    if ct.array.min() >= 0 and ct.array.max() <= 255 and (ct.array == np.rint(ct.array)).all():
        raise ExcludedCaseError(
            image,
            "holds 8-bit grey values (0 to 255), not Hounsfield units",
            "Convert the CT back to HU, air at -1000.",
        )
    hu = np.clip(np.rint(ct.array), AIR_HU, np.iinfo(np.int16).max).astype(np.int16)
    return Scan(ct=ct.like(hu), labels=labels.array.astype(np.uint8), files=(image, label))


def _describe(top: Path, image: Path, patient: str, case_id: str) -> Series:
    label = _label_of(top, image)
    grid, excluded = None, ""
    try:
        grid = _grid(image)
        if label is None:
            raise ExcludedCaseError(
                image, f"has no label labels/{patient}.nii.gz", "Add it, with 1 lung, 2 nodule, 3 vessel."
            )
        _check_same_grid(image, grid, label)
    except InputError as fault:
        excluded = f"{Path(fault.what).relative_to(top).as_posix()}: {fault.problem}"
    return Series(
        case_id=case_id,
        patient_id=patient,
        series_uid="",
        size=grid.shape if grid else (0, 0, 0),
        spacing_mm=tuple(grid.spacing_mm.tolist()) if grid else (0.0, 0.0, 0.0),
        path=image.relative_to(top).as_posix(),
        annotations=(label.relative_to(top).as_posix(),) if label else (),
        excluded=excluded,
    )


def _stem(file: Path) -> str:
    return next(file.name.removesuffix(suffix) for suffix in _SUFFIXES if file.name.endswith(suffix))


def _label_of(top: Path, image: Path) -> Path | None:
    stem = _stem(image)
    candidates = [
        top / "labels" / (name + suffix) for name in (stem, stem.removesuffix(_CHANNEL)) for suffix in _SUFFIXES
    ]
    return next((label for label in candidates if label.is_file()), None)


def _grid(file: Path) -> Volume:
    """The grid of a file in the closest RAS+ orientation, from its header; the array is a placeholder without memory.

    Raises:
        ExcludedCaseError: the header cannot be read, or is not that of a 3-D volume.
    """
    import nibabel

    try:
        image = nibabel.load(file)
    except (nibabel.filebasedimages.ImageFileError, OSError, EOFError, ValueError) as error:
        raise ExcludedCaseError(file, f"cannot be read as NIfTI ({error})", "Convert or copy the file anew.") from None
    if len(image.shape) != 3:
        raise ExcludedCaseError(file, f"has {len(image.shape)} dimensions instead of 3", "Store one volume a file.")
    affine = np.asarray(image.affine, float)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ExcludedCaseError(file, "has an affine that cannot be inverted", "Write it with its true geometry.")
    return Volume(np.broadcast_to(np.uint8(0), image.shape), affine).canonical()


def _check_same_grid(image: Path, grid: Volume, label: Path) -> None:
    other = _grid(label)
    if grid.shape != other.shape:
        raise ExcludedCaseError(
            label, f"has shape {other.shape}, but images/{image.name} has {grid.shape}", "Export both on one grid."
        )
    if not grid.same_grid(other):
        raise ExcludedCaseError(label, f"has another affine than images/{image.name}", "Export both with one geometry.")
