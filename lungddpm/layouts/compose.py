"""From a scan to a case: CT and layout on the model grid, with quality figures of the layout."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd

from lungddpm import __version__
from lungddpm.config.models import Config
from lungddpm.config.sections import Section
from lungddpm.core.cases import CaseFolder, check_case, hash_voxels, write_cases
from lungddpm.core.code import stage_fingerprint
from lungddpm.core.drawing import save
from lungddpm.core.errors import ExcludedCaseError, InputError
from lungddpm.core.files import fingerprint, read_json, sha256_of, write_json
from lungddpm.core.labels import Label
from lungddpm.core.progress import LOG, Progress
from lungddpm.core.roles import INTERNAL
from lungddpm.core.volume import (
    AIR_HU,
    Volume,
    bounding_box,
    is_sheared,
    model_grid,
    occupancy,
    resample_image,
    resample_upright,
    write_volume,
)
from lungddpm.layouts.hounsfield import hounsfield_problem, recognised_problem, remedy_of
from lungddpm.layouts.lungs import check_lungs, segment_lungs, split_lungs
from lungddpm.layouts.nodules import Nodule, centroid_mm, find_nodules, number_voxels
from lungddpm.layouts.pictures import draw_case
from lungddpm.layouts.prior import measure_places
from lungddpm.layouts.quality import CONTACT_MM, Segmented, check_layout, measure_layout, surroundings, touches
from lungddpm.layouts.vessels import segment_vessels
from lungddpm.sources import Scan, source_of
from lungddpm.sources.index import check_folder, key_of, keys_below, read_index, reason_of

LUNG_OCCUPANCY = 0.5
VESSEL_OCCUPANCY = 0.25
"""Below one half: a vessel thinner than a cell never fills half of it."""
_SHARE_PER_MM = (1e-6, 0.05, 0.5, 50.0)
"""Penalty on a cell's share per mm of distance. The smallest only breaks ties, and is used if every cell that the
nodule fills is taken."""
_NAME_FOLDER = "Run 'lungddpm index' again, with the same external_tests and folders as here."
_OF_SCAN = ("patient_id", "source", "series_uid", "size_x", "size_y", "size_z", "path", "annotations")
"""Columns of the index that a case depends on."""
_LIBRARIES = (
    "numpy",
    "scipy",
    "scikit-image",
    "connected-components-3d",
    "nibabel",
    "pydicom",
    "imagecodecs",
    "SimpleITK",
)


@dataclass(frozen=True)
class Case:
    """A scan on the model grid.

    Attributes:
        ct: int16 HU.
        layout: uint8 `Label`, same grid.
        qc: figures on the layout (see `measure_layout`), and `notes` on how the scan was read and what was left out.
        found: the segmentation behind the layout, in the scan's own resolution.
    """

    ct: Volume
    layout: Volume
    qc: dict
    found: Segmented


def build_case(scan: Scan, config: Config) -> Case:
    """Label lungs, vessels and nodules, and resample CT and labels to the model grid.

    Labels of the scan are used if there are any; lungs and vessels missing from them are segmented.

    Raises:
        ExcludedCaseError: the CT is not in HU (see `hounsfield_problem`), the scan does not cover both lungs (see
            `segment_lungs`), or the layout is outside the limits of the config (see `check_layout`).
    """
    ct = scan.ct.canonical()
    ct = ct.like(np.maximum(ct.array, AIR_HU))
    nodules, notes = find_nodules(scan, config.layouts)
    nodules = [nodule.canonical(scan.ct) for nodule in nodules]
    if is_sheared(ct.affine):
        # Contours are defined in the tilted slices, so only their masks can be resampled.
        nodules = [nodule.upright(ct) for nodule in nodules]
        ct = resample_upright(ct)
    numbers = number_voxels(nodules, ct.shape)
    labels = None if scan.labels is None else scan.ct.like(scan.labels).canonical().array
    lungs_lr = _lungs(ct, labels, nodules, config)
    vessels = _vessels(ct, labels, lungs_lr)
    vessels[numbers > 0] = False
    found = Segmented(ct, lungs_lr, vessels, numbers)

    lungs = lungs_lr > 0
    affine = model_grid(ct, config.grid.size)
    if config.grid.extent == "lungs":
        affine = model_grid(ct, config.grid.size, lungs | (numbers > 0), config.grid.margin_mm)
    grid_ct = resample_image(ct, affine, config.grid.size)
    layout = np.full(config.grid.size, Label.BACKGROUND, np.uint8)
    layout[occupancy(ct.like(lungs), affine, config.grid.size) >= LUNG_OCCUPANCY] = Label.LUNG
    vessel_cells = occupancy(ct.like(vessels), affine, config.grid.size) >= VESSEL_OCCUPANCY
    layout[vessel_cells & (layout == Label.LUNG)] = Label.VESSEL
    cells = nodules_on_grid([nodule.volume_in(ct) for nodule in nodules], affine, config.grid.size)
    layout[cells > 0] = Label.NODULE

    qc = {"notes": [*scan.notes, *notes], **measure_layout(found, nodules, grid_ct.like(cells))}
    check_layout(qc, config.layouts.limits)
    return Case(grid_ct.like(np.rint(grid_ct.array).astype(np.int16)), grid_ct.like(layout), qc, found)


def nodules_on_grid(masks: list[Volume], affine: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Give each nodule the number of cells that corresponds to its volume, at least one, choosing those it fills most.

    No two nodules share a cell; small nodules choose first. If the fullest cells would move the nodule's centroid by
    more than half a cell along an axis, as for some thin ones, nearer cells are used.

    Args:
        masks: bool, one nodule each, on grids parallel to the target.
        affine: (4, 4) of the target grid.
        shape: cells of the target along x, y, z.

    Returns:
        int32 of `shape`: 0, or the nodule's place in `masks`, from 1.
    """
    cells = np.zeros(shape, np.int32)
    cell_mm3 = abs(np.linalg.det(affine[:3, :3]))
    for number in sorted(range(1, len(masks) + 1), key=lambda number: _volume_mm3(masks[number - 1])):
        mask = masks[number - 1]
        share = occupancy(mask, affine, shape)
        wanted = max(1, round(_volume_mm3(mask) / cell_mm3))
        centre = np.linalg.solve(affine, [*centroid_mm(mask), 1])[:3]
        distance_mm = _distance_mm(centre, affine, shape)
        for per_mm in _SHARE_PER_MM:
            rank = np.where(cells == 0, share - per_mm * distance_mm, -np.inf)
            chosen = np.unravel_index(np.argpartition(rank, -wanted, axis=None)[-wanted:], shape)
            if np.abs(np.mean(chosen, axis=1) - centre).max() <= 0.5:
                break
        cells[chosen] = number
    return cells


def run_prepare(
    config: Config,
    index: Path,
    source: Path,
    output: Path,
    shard: int,
    shards: int,
    table: Path,
    external: Mapping[str, Path] | None = None,
) -> None:
    """Prepare the cases of one shard: every row of the index whose number modulo `shards` is `shard`.

    Writes `<output>/<case_id>/{ct.nii.gz, layout.nii.gz, nodules.nii.gz, qc.png, case.json}`, then the shard's case
    table. `nodules.nii.gz` holds the numbers of the nodules in the scan's own resolution, cropped to them; a case
    without nodules does not have this file. A complete case whose inputs, settings and code have not changed is
    kept.

    Args:
        config: `grid` and `layouts` are used, kinds of sources through the index, and their settings.
        index: table written by `lungddpm index`.
        source: folder of the data set.
        output: folder of the cases.
        shard: 0-based number of this shard.
        shards: number of shards.
        table: case table to write.
        external: folders of the external test sets, by name.

    Raises:
        InputError: the index or a data set is missing. A case that cannot be used is not an error: its row gives the
            reason.
    """
    rows = read_index(index).iloc[shard::shards]
    folders = {INTERNAL: source, **(external or {})}
    for name, folder in folders.items():
        check_folder(folder, key_of(name))
    if unknown := sorted(set(rows["data_set"]) - folders.keys()):
        raise InputError(index, f"has scans of the data set '{unknown[0]}', whose folder is not known", _NAME_FOLDER)
    prepared = []
    with Progress("cases", total=len(rows)) as progress:
        for _, row in rows.iterrows():
            prepared.append(_prepare(config, folders[row["data_set"]], row, CaseFolder(output / row["case_id"])))
            progress.note(case=row["case_id"])
            progress.advance()
    write_cases(table, prepared)


def _prepare(config: Config, source: Path, row: pd.Series, folder: CaseFolder) -> dict:
    """The case table's row for one row of the index, after updating the case's folder."""
    if row["status"] != "ok":
        return _excluded(row, folder, row["reason"])
    record = _finished(config, source, row, folder)
    if record is None:
        try:
            record = _write(config, source, row, folder)
        except ExcludedCaseError as error:
            reason = reason_of(error, source)
            LOG.warning("%s is excluded: %s", row["case_id"], reason)
            return _excluded(row, folder, reason)
    return {**row, "path": row["case_id"], "n_nodules": record["qc"]["n_nodules"], "sha256": record["sha256"]}


def _write(config: Config, source: Path, row: pd.Series, folder: CaseFolder) -> dict:
    with keys_below(key_of(row["data_set"]), row["source"]):
        scan = source_of(row["source"]).load_scan(source, row, *_reading(config, row))
    for note in scan.notes:
        LOG.info("%s: %s", row["case_id"], note)
    case = build_case(scan, config)
    check_case(case.ct, case.layout, row["case_id"])
    write_volume(folder.ct, case.ct)
    write_volume(folder.layout, case.layout)
    _write_nodules(folder.nodules, case.found)
    save(draw_case(case.found, case.layout, f"{row['case_id']}: layout over the scan"), folder.picture, dpi=100)
    names = sorted(file.relative_to(source).as_posix() for file in scan.files)
    record = {
        "case_id": row["case_id"],
        "patient_id": row["patient_id"],
        "series_uid": row["series_uid"],
        "scan_sha256": hash_voxels(case.found.ct),
        "sha256": folder.hash(),
        "nodules_sha256": _hash_nodules(folder.nodules),
        "fingerprint": _fingerprint(config, source, row, names),
        "inputs": names,
        "versions": {"lungddpm": __version__, "python": platform.python_version()}
        | {library: version(library) for library in _LIBRARIES},
        "qc": case.qc,
        "placement": measure_places(case.layout, case.qc["nodules"]),
    }
    # Last: its presence means that the case is complete.
    write_json(folder.record, record)
    return record


def _reading(config: Config, row: pd.Series) -> tuple[Section, ...]:
    """The settings by which a row's scan is read."""
    return config.data_sets()[row["data_set"]].reading(row["source"])


def _finished(config: Config, source: Path, row: pd.Series, folder: CaseFolder) -> dict | None:
    """The record of a case that does not need to be prepared again."""
    try:
        record = read_json(folder.record)
        unchanged = record["fingerprint"] == _fingerprint(config, source, row, record["inputs"])
        intact = record["sha256"] == folder.hash() and record["nodules_sha256"] == _hash_nodules(folder.nodules)
        return record if unchanged and intact and folder.picture.exists() else None
    except (InputError, KeyError, TypeError):
        return None


def _write_nodules(path: Path, found: Segmented) -> None:
    if found.nodules.any():
        write_volume(path, found.ct.like(found.nodules).crop(bounding_box(found.nodules)))
    else:
        path.unlink(missing_ok=True)


def _hash_nodules(path: Path) -> str:
    """SHA-256 of the file of nodules; empty if there is none."""
    return sha256_of(path) if path.exists() else ""


def _fingerprint(config: Config, source: Path, row: pd.Series, inputs: Iterable[str]) -> str:
    """Dependencies of a case: settings, code, the scan's row of the index, the content of the input files."""
    return fingerprint(
        {
            "grid": config.grid,
            "layouts": config.layouts,
            "code": stage_fingerprint("prepare", row["source"]),
            # The size: files that a series gets later are not among the inputs.
            "row": {column: str(row[column]) for column in _OF_SCAN},
            "reading": _reading(config, row),
            "inputs": {name: sha256_of(source / name) for name in inputs},
        }
    )


def _excluded(row: pd.Series, folder: CaseFolder, reason: str) -> dict:
    for path in (folder.ct, folder.layout, folder.nodules, folder.picture, folder.record):
        path.unlink(missing_ok=True)
    return {**row, "status": "excluded", "reason": reason, "path": "", "sha256": ""}


def _lungs(ct: Volume, labels: np.ndarray | None, nodules: list[Nodule], config: Config) -> np.ndarray:
    limits = config.layouts.limits
    if labels is None or not (labels == Label.LUNG).any():
        try:
            lungs_lr = segment_lungs(ct, config.layouts)
        except ExcludedCaseError:
            # Lungs are found by their HU: if these are wrong, that is the reason to report.
            _check_hounsfield(recognised_problem(ct.array, limits))
            raise
        _check_hounsfield(hounsfield_problem(ct.array, lungs_lr > 0, limits))
        return lungs_lr
    _check_hounsfield(hounsfield_problem(ct.array, labels == Label.LUNG, limits))
    lungs = (labels == Label.LUNG) | (labels == Label.VESSEL)
    for nodule in nodules:
        around, mask = surroundings(nodule, ct, CONTACT_MM)
        if touches(mask, lungs[around], ct.spacing_mm):
            nodule.paste(lungs)
    lungs_lr = split_lungs(ct.like(lungs))
    check_lungs(ct.like(lungs_lr), config.layouts)
    return lungs_lr


def _check_hounsfield(problem: str | None) -> None:
    if problem is not None:
        raise ExcludedCaseError("CT", problem, remedy_of(problem))


def _vessels(ct: Volume, labels: np.ndarray | None, lungs: np.ndarray) -> np.ndarray:
    if labels is None or not (labels == Label.VESSEL).any():
        return segment_vessels(ct, lungs)
    return labels == Label.VESSEL


def _volume_mm3(mask: Volume) -> float:
    return np.count_nonzero(mask.array) * mask.voxel_mm3


def _distance_mm(centre: np.ndarray, affine: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Distance of every cell to a position given in cells, (3,); the grid's axes are never sheared."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    x, y, z = (((np.arange(n) - c) * step) ** 2 for n, c, step in zip(shape, centre, spacing, strict=True))
    return np.sqrt(x[:, None, None] + y[:, None] + z)
