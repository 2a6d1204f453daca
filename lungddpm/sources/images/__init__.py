"""Chest CT as image files (NIfTI, NRRD, MetaImage) with labels under the same name, in one of these folders:

images/, labels/                          this project's own
imagesTr/, labelsTr/, dataset.json        nnU-Net's raw data and the Medical Segmentation Decathlon; imagesTs/ counts
                                          if labelsTs/ has its labels

nnU-Net's channel suffix on the image (`case_0000.nii.gz` with the label `case.nii.gz`) is optional. One module
per question: `files` (formats), `folders` (pairs), `meanings` (of labels), `specks` (in labels), `patients`.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lungddpm.core.cases import check_case
from lungddpm.core.errors import ExcludedCaseError, InputError
from lungddpm.core.progress import LOG, Progress
from lungddpm.core.text import plural
from lungddpm.core.volume import (
    AIR_HU,
    LARGEST_VOXELS,
    SMALLEST_RANGE_HU,
    Header,
    Volume,
    is_sheared,
    resample_upright,
    tilt_degrees,
    upright_grid,
    whole_hu,
)
from lungddpm.sources import Scan, Series
from lungddpm.sources.images.files import files_of, read_header, read_labels, read_volume, suffix_of
from lungddpm.sources.images.folders import DATASET, Pair, case_name, describe_unread, find_pairs, only_unread
from lungddpm.sources.images.meanings import meanings_of, translate
from lungddpm.sources.images.patients import PatientOf, patient_finder
from lungddpm.sources.images.settings import Images as Settings
from lungddpm.sources.images.specks import SMALLEST_MM, fill_specks
from lungddpm.sources.index import Cache, case_ids, reason_of

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["CITATION", "TITLE", "Settings", "find_series", "load_scan"]

TITLE = "chest CT as NIfTI, NRRD or MetaImage, in folders of your own, of nnU-Net or of the Decathlon"
CITATION = "None: cite the data set."

_DEFAULTS = Settings()


def find_series(path: Path, cache: Cache, settings: Settings = _DEFAULTS) -> list[Series]:
    """One series per image, from the headers of image and label; labels without an image also have a row.

    `n_nodules` is unknown: headers do not show how many nodules the labels contain.

    Raises:
        InputError: no images; or dataset.json or the table of patients is missing or invalid.
        ConfigError: the settings name a label that does not exist.
    """
    found = find_pairs(path)
    meanings_of(path, settings)
    patient_of = patient_finder(path, settings)
    if found.unlabelled:
        LOG.info("%s: %d images without labels are not cases", found.unlabelled[0].parent.name, len(found.unlabelled))
    if found.unread:
        LOG.info("%s", describe_unread(path, found.unread))
    series = []
    of_name: dict[str, list[Path]] = defaultdict(list)
    for pair in found.pairs:
        of_name[pair.name].append(pair.image)
    with Progress("headers of images", total=len(found.pairs)) as progress:
        for pair in found.pairs:
            copies = [_within(path, image) for image in of_name[pair.name] if image != pair.image]
            series.append(_series(path, cache, pair, patient_of, copies, found.unread))
            progress.advance()
    for label in found.lonely:
        series.append(_without_image(path, label, found.unread))
    names = case_ids(each.case_id for each in series)
    return [replace(each, case_id=name) for each, name in zip(series, names, strict=True)]


def load_scan(path: Path, case: pd.Series, settings: Settings = _DEFAULTS) -> Scan:
    """Read CT and labels of one case in the closest RAS+ orientation.

    Args:
        path: folder of the data set.
        case: row of the index; `path` is the image, `annotations` names the labels.
        settings: meaning of the labels.

    Returns:
        The CT in HU, at least -1024, with its labels but for specks; only `build_case` can judge whether it is in HU.

    Raises:
        ExcludedCaseError: an unreadable file, different grids, a CT that holds NaN or is constant, or unknown labels.
        InputError: dataset.json is missing or invalid.
        ConfigError: the settings name a label that does not exist.
    """
    image, label = path / case["path"], path / json.loads(case["annotations"])[0]
    meanings, dataset = meanings_of(path, settings), path / DATASET
    try:
        ours, theirs = read_header(image), read_header(label)
        notes = (*ours.notes, *(f"labels: {note}" for note in theirs.notes))
        carry = _carry(image, ours, label, theirs)
        ct, stored = read_volume(image), read_labels(label)
        labels = stored.like(translate(stored.array, meanings, label))
    except InputError as error:
        raise ExcludedCaseError(error.what, error.problem, error.remedy) from None
    # From here on the CT's own grid: the labels' header may be rounded or less precise.
    labels = ct.like(Volume(labels.array, carry @ labels.affine).canonical().array)
    check_case(ct, labels, image)
    low, high = float(ct.array.min()), float(ct.array.max())
    # A smaller range is not HU. `build_case` describes what the values look like, which rounding or
    # padding with air would hide.
    if high - low > SMALLEST_RANGE_HU:
        ct = ct.like(whole_hu(ct.array))
        low = AIR_HU
    labels, specks = fill_specks(labels)
    if specks:
        parts = plural(specks, "part") + " of the nodule label " + ("is" if specks == 1 else "are")
        notes = (*notes, f"{parts} smaller than a sphere of {SMALLEST_MM:g} mm and left out")
    if is_sheared(ct.affine):
        notes = (
            *notes,
            f"its axes were sheared by {tilt_degrees(ct.affine):.1f} degrees (tilted gantry): CT and labels were "
            "resampled to an upright grid",
        )
        ct, labels = resample_upright(ct, outside=low), resample_upright(labels, labels=True)
    files = (*files_of(image), *files_of(label), *([dataset] if dataset.is_file() else []))
    return Scan(ct=ct, labels=labels.array, files=files, notes=notes)


def _series(
    top: Path, cache: Cache, pair: Pair, patient_of: PatientOf, copies: list[str], unread: tuple[Path, ...]
) -> Series:
    """The series of one image before its voxels are read; `case_id` is not yet safe for folders.

    `copies`: other images of the same name; `unread`: files of the data set that are not images by their suffix.
    """
    files = [pair.image, *([pair.label] if pair.label else [])]
    grid = cache.recall(
        " ".join(_within(top, file) for file in files),
        [held for file in files for held in files_of(file)],
        lambda: _describe(top, pair, unread),
        keep=lambda grid: not grid["excluded"],
    )
    patient, excluded = "", grid["excluded"]
    try:
        patient = patient_of(pair.image)
        _check_channels(pair)
        _check_labels(pair, top)
        if copies:
            problem = f"exists more than once ({', '.join(copies)})"
            raise InputError(pair.image, problem, "Keep one copy of it.")
    except InputError as error:
        excluded = excluded or reason_of(error, top)
    return Series(
        case_id=pair.name,
        patient_id=patient,
        series_uid="",
        size=tuple(grid["size"]),
        spacing_mm=tuple(grid["spacing_mm"]),
        n_nodules=None,
        path=_within(top, pair.image),
        annotations=(_within(top, pair.label),) if pair.label else (),
        excluded=excluded,
    )


def _without_image(top: Path, label: Path, unread: tuple[Path, ...]) -> Series:
    name, images = case_name(label.name), label.parent.name.replace("labels", "images")
    problem = f"has no image of its name in {images}/{only_unread(unread, images, name)}"
    error = InputError(label, problem, "Add the image, or ignore this row.")
    return Series(name, "", "", n_nodules=None, path=_within(top, label), excluded=reason_of(error, top))


def _check_channels(pair: Pair) -> None:
    if pair.image in pair.others:
        remedy = "Add the CT as channel 0000, without the others."
        raise InputError(pair.image, "is not channel 0000, which should be the CT but is missing", remedy)
    if pair.others:
        others = ", ".join(file.name for file in pair.others)
        problem = f"has further channels ({others}), but a CT has one"
        raise InputError(pair.image, problem, "Use a copy of the data set with only channel 0000, if that is the CT.")


def _check_labels(pair: Pair, top: Path) -> None:
    if pair.copies:
        labels = ", ".join(_within(top, label) for label in (pair.label, *pair.copies) if label)
        raise InputError(pair.image, f"has several labels ({labels})", "Keep those that are right.")


def _describe(top: Path, pair: Pair, unread: tuple[Path, ...]) -> dict:
    """The headers of an image and its label, ready for the cache."""
    size, spacing_mm, excluded = [0, 0, 0], [0.0, 0.0, 0.0], ""
    try:
        header = read_header(pair.image)
        grid = header.grid
        size, spacing_mm = list(grid.shape), grid.spacing_mm.tolist()
        if is_sheared(grid.affine) and math.prod(upright_grid(grid.affine, grid.shape)[1]) > LARGEST_VOXELS:
            problem = f"has axes that are sheared by {tilt_degrees(grid.affine):.0f} degrees, too much to be resampled"
            raise InputError(pair.image, problem, "Write the file with its true geometry.")
        if pair.label is None:
            labels = pair.image.parent.name.replace("images", "labels")
            problem = f"has no label {labels}/{pair.name}{suffix_of(pair.image.name)}"
            problem += only_unread(unread, labels, pair.name)
            raise InputError(pair.image, problem, "Add it, or ignore this row.")
        _carry(pair.image, header, pair.label, read_header(pair.label))
    except InputError as error:
        excluded = reason_of(error, top)
    return {"size": size, "spacing_mm": spacing_mm, "excluded": excluded}


def _carry(image: Path, ours: Header, label: Path, theirs: Header) -> np.ndarray:
    """The transform of positions in mm from the label's affine (see `read_labels`) to the image's, (4, 4).

    The grids are equal if any affine of one header agrees with any of the other to within half a voxel: some labels
    have rounded headers, only a qform (which cannot express a tilt), or the qform of their CT.

    Raises:
        InputError: shapes or affines that do not agree.
    """
    for mine, my_grid in zip(ours.affines, ours.grids, strict=True):
        for other, other_grid in zip(theirs.affines, theirs.grids, strict=True):
            if my_grid.same_grid(other_grid, tolerance_mm=my_grid.spacing_mm.min() / 2):
                return ours.affines[0] @ np.linalg.inv(mine) @ other @ np.linalg.inv(theirs.affines[0])
    image_name = f"{image.parent.name}/{image.name}"
    if ours.grid.shape != theirs.grid.shape:
        raise InputError(
            label,
            f"has shape {theirs.grid.shape}, but {image_name} has {ours.grid.shape}",
            "Export both on the same grid.",
        )
    raise InputError(label, f"has a different affine than {image_name}", "Export both with the same geometry.")


def _within(top: Path, file: Path) -> str:
    return file.relative_to(top).as_posix()
