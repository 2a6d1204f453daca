"""LUNA16: 888 CT of LIDC-IDRI as MetaImage, subset0/ to subset9/, each file named after its series.

Nodules are the outlines of LIDC-IDRI's readers: XML files anywhere below the folder, matched by the series that they
name. Without them, and only on request, they are spheres from `annotations.csv`. Setio et al., Medical Image Analysis
42:1-13, 2017, doi 10.1016/j.media.2017.06.015.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import AfterValidator

from lungddpm.config.sections import Section
from lungddpm.core.errors import ExcludedCaseError, InputError
from lungddpm.core.labels import Label
from lungddpm.core.progress import Progress
from lungddpm.core.text import plural
from lungddpm.core.volume import Volume, per_axis, whole_hu
from lungddpm.sources import Scan, Series
from lungddpm.sources.images.files import files_of, read_header, read_stored, stem_of, suffix_of
from lungddpm.sources.images.patients import PatientOf, patient_finder
from lungddpm.sources.images.settings import Images, check_table
from lungddpm.sources.index import Cache, case_ids, files_below, reason_of, relative_name
from lungddpm.sources.lidc.pairing import annotations_of, read_all, readings_of
from lungddpm.sources.lidc.slices import Stack

if TYPE_CHECKING:
    import pandas as pd

TITLE = "LUNA16, as MetaImage with LIDC-IDRI's reader XML"
CITATION = "Setio et al., Medical Image Analysis 42:1, 2017, and Armato et al., Medical Physics 38:915, 2011."

TABLE = "annotations.csv"
_COLUMNS = ("seriesuid", "coordX", "coordY", "coordZ", "diameter_mm")
_SUFFIXES = (".mhd", ".mha")
_LUNGS = "seg-lungs"
"""Folders with this prefix have LUNA16's lung masks, under the names of the images."""
_LARGEST_MM = 1e6
_KEY = "source.luna16.nodules"
SPHERES = f"nodules are spheres of the diameters in {TABLE}, not readers' outlines"


class Settings(Section):
    """Reading of LUNA16. Used when `source.kind` is `luna16`."""

    nodules: Literal["readers", "spheres"] = "readers"
    """`readers`: LIDC-IDRI's XML, which must be below `source.path` as well. `spheres`: spheres with the positions and
    diameters of annotations.csv, without readers and shape."""
    patient_table: Annotated[str | None, AfterValidator(check_table)] = None
    """A table with the columns `file` (the series) and `patient` (or `patient_id`, or BIDS's `participant_id`) in the
    folder of the data set. null: each scan counts as a separate patient, although LIDC-IDRI has patients with two
    scans."""

    @property
    def tables(self) -> tuple[str, ...]:
        """See `lungddpm.sources`."""
        spheres = [TABLE] if self.nodules == "spheres" else []
        return (*spheres, *([self.patient_table] if self.patient_table else []))

    @property
    def caveat(self) -> str:
        """The caveat about the nodules in the report."""
        return f"The {SPHERES}." if self.nodules == "spheres" else ""


_DEFAULTS = Settings()


@dataclass(frozen=True)
class Sphere:
    """One row of `annotations.csv`."""

    centre_mm: tuple[float, float, float]
    """LPS."""
    diameter_mm: float


def find_series(path: Path, cache: Cache, settings: Settings = _DEFAULTS) -> list[Series]:
    """One series per image, from the headers of the images and the readers' XML, or from `annotations.csv`.

    XML of other series and of chest radiographs has no row: LUNA16 is a subset of LIDC-IDRI.

    Raises:
        InputError: `annotations.csv` or the table of patients is needed, but missing or invalid.
    """
    files, problems = files_below(path)
    patient_of = patient_finder(path, Images(patient_table=settings.patient_table), "source.luna16")
    images: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        if suffix_of(file.name) in _SUFFIXES and not _is_mask(file, path):
            images[stem_of(file.name)].append(file)
    found = [Series("", "", "", path=name, excluded=reason) for name, reason in problems.items()]
    with Progress("headers of images", total=len(images)) as progress:
        for copies in images.values():
            found.append(_described(path, cache, copies, patient_of))
            progress.advance()
    annotated = _with_spheres if settings.nodules == "spheres" else _with_readings
    found = annotated(path, cache, files, found)
    names = case_ids(each.series_uid or each.path for each in found)
    return [replace(each, case_id=name) for each, name in zip(found, names, strict=True)]


def load_scan(path: Path, case: pd.Series, settings: Settings = _DEFAULTS) -> Scan:
    """Read one scan of the index in full, in its stored voxel order, which the outlines refer to.

    Args:
        path: folder of the data set.
        case: row of the index; `path`, `series_uid` and `annotations` are used.
        settings: source of the nodules.

    Raises:
        ExcludedCaseError: an unreadable file, or outlines that do not match the image.
        InputError: `annotations.csv` is invalid.
    """
    image = path / case["path"]
    annotated = [path / name for name in json.loads(case["annotations"])]
    try:
        stored = read_stored(image)
    except InputError as error:
        raise ExcludedCaseError(error.what, error.problem, error.remedy) from None
    array = stored.array
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ExcludedCaseError(image, "has NaN or infinite values", "Copy it again.")
    ct = stored.like(whole_hu(array))
    files = (*files_of(image), *annotated)
    if settings.nodules == "spheres":
        spheres = read_spheres(annotated[0]).get(case["series_uid"], [])
        labels = paint(ct, spheres, image)
        return Scan(ct=ct, labels=labels, files=files, notes=(SPHERES,))
    return Scan(ct=ct, annotations=tuple(annotations_of(annotated, _stack(ct))), files=files)


def read_spheres(table: Path) -> dict[str, list[Sphere]]:
    """The rows of `annotations.csv`, by series.

    Raises:
        InputError: the table cannot be read, lacks a column, has no rows, or an invalid position or diameter.
    """
    try:
        read = csv.DictReader(table.read_text(encoding="utf-8-sig").splitlines())
        rows, named = list(read), read.fieldnames or ()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(table.absolute(), f"cannot be read ({error})", "Copy it again.") from None
    must = f"It must have the columns {', '.join(_COLUMNS)}."
    if absent := [column for column in _COLUMNS if column not in named]:
        raise InputError(table.absolute(), f"lacks {', '.join(absent)}", must)
    if not rows:
        raise InputError(table.absolute(), "has no rows, so no scan would have a nodule", "Copy it again.")
    spheres: dict[str, list[Sphere]] = defaultdict(list)
    for number, row in enumerate(rows, start=2):
        if missing := [column for column in _COLUMNS if row.get(column) is None]:
            raise InputError(table.absolute(), f"lacks {', '.join(missing)} in line {number}", must)
        try:
            x, y, z, diameter = (float(row[column]) for column in _COLUMNS[1:])
        except ValueError:
            x = y = z = diameter = float("nan")
        if not (all(abs(value) < _LARGEST_MM for value in (x, y, z)) and 0 < diameter < _LARGEST_MM):
            raise InputError(
                table.absolute(), f"has no valid position and diameter in line {number}", "Correct the line."
            )
        spheres[row["seriesuid"].strip()].append(Sphere((x, y, z), diameter))
    return dict(spheres)


def paint(ct: Volume, spheres: list[Sphere], origin: Path) -> np.ndarray:
    """Labels with a nodule in every voxel whose centre is in a sphere, and at least in the voxel at its centre.

    Args:
        ct: the scan.
        spheres: of it.
        origin: its file, for messages.

    Returns:
        uint8 `Label`, of the scan's shape.

    Raises:
        ExcludedCaseError: a centre is outside the scan.
    """
    labels = np.zeros(ct.shape, np.uint8)
    to_index = np.linalg.inv(ct.affine)
    for sphere in spheres:
        centre_mm = np.array(sphere.centre_mm) * [-1, -1, 1]  # LPS to RAS
        centre = to_index[:3, :3] @ centre_mm + to_index[:3, 3]
        nearest = np.rint(centre).astype(int)
        if (nearest < 0).any() or (nearest >= ct.shape).any():
            raise ExcludedCaseError(origin, f"does not contain a nodule of {TABLE}", "Match the table and the images.")
        # Along an index axis, a sphere in mm extends as far as the norm of that row of the inverse affine.
        reach = np.linalg.norm(to_index[:3, :3], axis=1) * sphere.diameter_mm / 2
        low = np.maximum(np.floor(centre - reach), 0).astype(int)
        high = np.minimum(np.ceil(centre + reach).astype(int) + 1, ct.shape)
        inside = per_axis(slice(first, last) for first, last in zip(low.tolist(), high.tolist(), strict=True))
        offsets = np.moveaxis(np.indices(high - low), 0, -1) + low - centre
        near = np.linalg.norm(offsets @ ct.affine[:3, :3].T, axis=-1) <= sphere.diameter_mm / 2
        labels[inside][near] = Label.NODULE
        labels[tuple(nearest)] = Label.NODULE
    return labels


def _is_mask(image: Path, top: Path) -> bool:
    return any(part.lower().startswith(_LUNGS) for part in image.relative_to(top).parts[:-1])


def _described(top: Path, cache: Cache, copies: list[Path], patient_of: PatientOf) -> Series:
    """The header of an image and its patient; `case_id` is still empty."""
    image, *others = copies

    def describe() -> dict:
        try:
            grid = read_header(image).grid
            return {"size": list(grid.shape), "spacing_mm": grid.spacing_mm.tolist(), "excluded": ""}
        except InputError as error:
            return {"size": [0, 0, 0], "spacing_mm": [0.0, 0.0, 0.0], "excluded": reason_of(error, top)}

    name = relative_name(image, top)
    header = cache.recall(name, files_of(image), describe, keep=lambda header: not header["excluded"])
    patient, excluded = "", header["excluded"]
    try:
        patient = patient_of(image)
        if others:
            named = ", ".join(relative_name(other, top) for other in others)
            raise InputError(image, f"exists more than once ({named})", "Keep one copy of it.")
    except InputError as error:
        excluded = excluded or reason_of(error, top)
    return Series(
        case_id="",
        patient_id=patient,
        series_uid=stem_of(image.name),
        size=tuple(header["size"]),
        spacing_mm=tuple(header["spacing_mm"]),
        path=name,
        excluded=excluded,
    )


def _with_readings(top: Path, cache: Cache, files: list[Path], found: list[Series]) -> list[Series]:
    """The series with the data of their readers' XML, and a row for unreadable XML."""
    xml_files = [file for file in files if file.suffix.lower() == ".xml"]
    folders = {each.series_uid: [Path(each.path).parent.as_posix()] for each in found if each.series_uid}
    reads = read_all(top, xml_files, folders, [], cache)

    def read(series: Series) -> Series:
        readings = readings_of(series.series_uid, series.path, reads)
        problem = readings.problem
        if not {series.series_uid} & (set(reads.of_series) | set(reads.problems)):
            problem = f"{series.path}: no reader XML names this series. Add LIDC-IDRI's XML, or set {_KEY}: spheres."
        return replace(
            series,
            n_nodules=readings.n_nodules,
            annotations=readings.files,
            excluded=series.excluded or problem,
        )

    return [
        *(read(series) if series.series_uid else series for series in found),
        *(row for row in reads.without_images if not row.series_uid),
    ]


def _with_spheres(top: Path, _cache: Cache, files: list[Path], found: list[Series]) -> list[Series]:
    """The series with the data of `annotations.csv`."""
    table = next((file for file in files if file.name == TABLE), None)
    if table is None:
        remedy = f"Add it, or set {_KEY}: readers."
        raise InputError(top.absolute(), f"has no {TABLE}, which {_KEY}: spheres needs", remedy)
    spheres, name = read_spheres(table), relative_name(table, top)
    series = {each.series_uid for each in found if each.series_uid}
    if series and not series & set(spheres):
        problem = f"names none of the {plural(len(series), 'image')}"
        raise InputError(table.absolute(), problem, "Use the table of these images; its seriesuid is their file name.")
    return [
        replace(each, n_nodules=len(spheres.get(each.series_uid, ())), annotations=(name,), notes=(SPHERES,))
        if each.series_uid
        else each
        for each in found
    ]


def _stack(ct: Volume) -> Stack:
    """The slices of an image, which outlines in XML find by position, because an image has no UIDs."""
    positions = np.outer(np.arange(ct.shape[2]), ct.affine[:3, 2]) + ct.affine[:3, 3]
    return Stack((), ct.shape, ct.affine, positions * [-1, -1, 1], None)
