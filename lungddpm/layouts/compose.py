"""From a scan to a case: CT and layout on the model grid, with the figures that tell how good the layout is."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import ndimage

from lungddpm import __version__
from lungddpm.cases import check_case, hash_case, write_cases
from lungddpm.config import Config
from lungddpm.errors import ExcludedCaseError, InputError
from lungddpm.files import code_fingerprint, fingerprint, sha256_of, write_json
from lungddpm.layouts import Label
from lungddpm.layouts.lungs import LEFT, RIGHT, check_lungs, segment_lungs, split_lungs
from lungddpm.layouts.nodules import Nodule, find_nodules
from lungddpm.layouts.vessels import segment_vessels
from lungddpm.progress import LOG, Progress
from lungddpm.sources import Scan, module_of, read_index
from lungddpm.volume import AIR_HU, Volume, model_grid, occupancy, resample_image, write_volume

LUNG_OCCUPANCY = 0.5
VESSEL_OCCUPANCY = 0.25
"""Below one half: a vessel thinner than a cell never fills half of it."""
_FILES = ("ct.nii.gz", "layout.nii.gz", "case.json")
_LIBRARIES = ("numpy", "scipy", "scikit-image", "connected-components-3d", "nibabel", "pydicom")


@dataclass(frozen=True)
class Case:
    """A scan on the model grid.

    Attributes:
        ct: int16 HU.
        layout: uint8 `Label`, same grid.
        qc: figures on the layout, JSON-like; litres and shares refer to the scan's own resolution.
    """

    ct: Volume
    layout: Volume
    qc: dict


def build_case(scan: Scan, config: Config) -> Case:
    """Label lungs, vessels and nodules, and take CT and labels to the model grid.

    Ready labels are used where the scan brings them; what they lack of lungs and vessels is segmented.

    Raises:
        ExcludedCaseError: the scan does not show both lungs in full (see `segment_lungs`).
    """
    ct = scan.ct.canonical()
    ct = ct.like(np.maximum(ct.array, AIR_HU))
    nodules = find_nodules(scan, config.layouts)
    masks = [_mask_of(nodule, scan.ct) for nodule in nodules]
    labels = None if scan.labels is None else scan.ct.like(scan.labels).canonical().array
    sides = _lungs(ct, labels, config)
    vessels = _vessels(ct, labels, sides)

    lungs = sides > 0
    affine = model_grid(ct, config.grid.size)
    if config.grid.extent == "lungs":
        affine = model_grid(ct, config.grid.size, _with_nodules(ct, lungs, masks), config.grid.margin_mm)
    grid_ct = resample_image(ct, affine, config.grid.size)
    layout = np.full(config.grid.size, Label.BACKGROUND, np.uint8)
    layout[occupancy(ct.like(lungs), affine, config.grid.size) >= LUNG_OCCUPANCY] = Label.LUNG
    vessel_cells = occupancy(ct.like(vessels), affine, config.grid.size) >= VESSEL_OCCUPANCY
    layout[vessel_cells & (layout == Label.LUNG)] = Label.VESSEL
    cells = place_nodules(masks, affine, config.grid.size)
    layout[cells > 0] = Label.NODULE

    litre = ct.voxel_mm3 / 1e6
    qc = {
        "lung_litres_right": round(np.count_nonzero(sides == RIGHT) * litre, 3),
        "lung_litres_left": round(np.count_nonzero(sides == LEFT) * litre, 3),
        "vessel_share_of_lungs": round(np.count_nonzero(vessels) / np.count_nonzero(lungs), 4),
        "n_nodules": len(nodules),
        "nodules": [
            {
                "readers": nodule.readers,
                "flagged": nodule.flagged,
                "volume_mm3": round(_volume_mm3(mask), 1),
                "layout_volume_mm3": round(np.count_nonzero(cells == number) * grid_ct.voxel_mm3, 1),
                "share_in_or_touching_lungs": round(_share_near(mask, ct, lungs), 3),
            }
            for number, (nodule, mask) in enumerate(zip(nodules, masks, strict=True), start=1)
        ],
    }
    for figures in qc["nodules"]:
        figures["volume_error"] = round(figures["layout_volume_mm3"] / figures["volume_mm3"] - 1, 3)
    return Case(grid_ct.like(np.rint(grid_ct.array).astype(np.int16)), grid_ct.like(layout), qc)


def place_nodules(masks: list[Volume], affine: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Give each nodule as many cells as its volume fills, at least one, where it fills them most.

    No two nodules share a cell; small nodules, which have less to spare, choose first.

    Args:
        masks: bool, one nodule each, on grids parallel to the target.
        affine: (4, 4) of the target grid.
        shape: cells of the target along x, y, z.

    Returns:
        int32 of `shape`: 0, or the nodule's place in `masks`, counted from 1.
    """
    cells = np.zeros(shape, np.int32)
    cell_mm3 = abs(np.linalg.det(affine[:3, :3]))
    for number in sorted(range(1, len(masks) + 1), key=lambda number: _volume_mm3(masks[number - 1])):
        mask = masks[number - 1]
        share = occupancy(mask, affine, shape)
        wanted = max(1, round(_volume_mm3(mask) / cell_mm3))
        # Distance decides between equal shares, and where every cell that the nodule fills is taken.
        rank = np.where(cells == 0, share - 1e-6 * _distance_mm(mask, affine, shape), -np.inf)
        cells.flat[np.argpartition(rank, -wanted, axis=None)[-wanted:]] = number
    return cells


def run_prepare(config: Config, index: Path, source: Path, output: Path, shard: int, shards: int, table: Path) -> None:
    """Prepare the cases of one shard: every row of the index whose number leaves `shard` on division by `shards`.

    Writes `<output>/<case_id>/{ct.nii.gz, layout.nii.gz, case.json}`, then the shard's case table. A case that is
    complete and whose inputs, settings and code have not changed is left as it is.

    Args:
        config: `grid` and `layouts` are used, and `source.kind` through the index.
        index: table written by `lungddpm index`.
        source: folder of the data set.
        output: folder of the cases.
        shard: 0-based number of this shard.
        shards: number of shards.
        table: case table to write.

    Raises:
        InputError: the index or the source is missing. A case that cannot be used is no error: its row says why.
    """
    rows = read_index(index).iloc[shard::shards]
    if not source.is_dir():
        raise InputError(source, "is not a folder", "Set source.path to the folder of the data set.")
    prepared = []
    with Progress("cases", total=len(rows)) as progress:
        for _, row in rows.iterrows():
            prepared.append(_prepare(config, source, row, output / row["case_id"]))
            progress.note(case=row["case_id"])
            progress.advance()
    write_cases(table, prepared)


def _prepare(config: Config, source: Path, row: pd.Series, folder: Path) -> dict:
    """The case table's row for one row of the index, once the case's folder is up to date."""
    if row["status"] != "ok":
        return _excluded(row, folder, row["reason"])
    record = _finished(config, source, row, folder)
    if record is None:
        try:
            record = _write(config, source, row, folder)
        except ExcludedCaseError as error:
            reason = _without_paths(str(error), source)
            LOG.warning("%s is excluded: %s", row["case_id"], reason)
            return _excluded(row, folder, reason)
    return {**row, "path": row["case_id"], "n_nodules": record["qc"]["n_nodules"], "sha256": record["sha256"]}


def _write(config: Config, source: Path, row: pd.Series, folder: Path) -> dict:
    scan = module_of(row["source"]).load_scan(source, row)
    case = build_case(scan, config)
    check_case(case.ct, case.layout, row["case_id"])
    write_volume(folder / "ct.nii.gz", case.ct)
    write_volume(folder / "layout.nii.gz", case.layout)
    names = sorted(file.relative_to(source).as_posix() for file in scan.files)
    record = {
        "case_id": row["case_id"],
        "sha256": hash_case(folder),
        "fingerprint": _fingerprint(config, source, row, names),
        "inputs": names,
        "versions": {"lungddpm": __version__, "python": platform.python_version()}
        | {library: version(library) for library in _LIBRARIES},
        "qc": case.qc,
    }
    # Last: its presence says that the case is complete.
    write_json(folder / "case.json", record)
    return record


def _finished(config: Config, source: Path, row: pd.Series, folder: Path) -> dict | None:
    """The record of a case that need not be prepared again."""
    try:
        record = json.loads((folder / "case.json").read_text(encoding="utf-8"))
        unchanged = record["fingerprint"] == _fingerprint(config, source, row, record["inputs"])
        return record if unchanged and record["sha256"] == hash_case(folder) else None
    except (FileNotFoundError, InputError, ValueError, KeyError, TypeError):
        return None


def _fingerprint(config: Config, source: Path, row: pd.Series, inputs: Iterable[str]) -> str:
    """What a case depends on: settings, code, the row of the index, the bytes of the input files."""
    return fingerprint(
        {
            "grid": config.grid,
            "layouts": config.layouts,
            "code": code_fingerprint("sources", "layouts"),
            "row": {column: row[column] for column in ("source", "series_uid", "path", "annotations")},
            "inputs": {name: sha256_of(source / name) for name in inputs},
        }
    )


def _excluded(row: pd.Series, folder: Path, reason: str) -> dict:
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
    return {**row, "status": "excluded", "reason": reason, "path": "", "sha256": ""}


def _without_paths(message: str, source: Path) -> str:
    """A message as it may stand in a table: one line, files relative to the data set."""
    for root in {source, source.resolve()}:
        message = message.replace(f"{root}/", "")
    return " ".join(message.split())


def _lungs(ct: Volume, labels: np.ndarray | None, config: Config) -> np.ndarray:
    if labels is None or not (labels == Label.LUNG).any():
        return segment_lungs(ct, config.layouts)
    sides = split_lungs(ct.like(labels != Label.BACKGROUND))
    check_lungs(ct.like(sides), config.layouts)
    return sides


def _vessels(ct: Volume, labels: np.ndarray | None, lungs: np.ndarray) -> np.ndarray:
    if labels is None or not (labels == Label.VESSEL).any():
        return segment_vessels(ct, lungs)
    return labels == Label.VESSEL


def _mask_of(nodule: Nodule, scan: Volume) -> Volume:
    """A nodule's own small volume, RAS+."""
    to_box = np.eye(4)
    to_box[:3, 3] = nodule.corner
    return Volume(nodule.mask, scan.affine @ to_box).canonical()


def _box_in(ct: Volume, mask: Volume, margin: int = 0) -> tuple[slice, slice, slice]:
    """Where a nodule's volume lies in the canonical scan, with a margin in voxels."""
    corner = np.rint(np.linalg.solve(ct.affine, mask.affine)[:3, 3]).astype(int)
    return tuple(slice(max(0, first - margin), first + n + margin) for first, n in zip(corner, mask.shape, strict=True))


def _with_nodules(ct: Volume, lungs: np.ndarray, masks: list[Volume]) -> np.ndarray:
    together = lungs.copy()
    for mask in masks:
        together[_box_in(ct, mask)] |= mask.array
    return together


def _share_near(mask: Volume, ct: Volume, lungs: np.ndarray) -> float:
    """Share of a nodule's voxels that lie in the lungs or touch them, at edges and corners too."""
    box = _box_in(ct, mask, margin=1)
    near = ndimage.binary_dilation(lungs[box], np.ones((3, 3, 3), bool))
    inner = _box_in(ct, mask)
    place = tuple(slice(i.start - b.start, i.stop - b.start) for i, b in zip(inner, box, strict=True))
    return float(near[place][mask.array].mean())


def _volume_mm3(mask: Volume) -> float:
    return np.count_nonzero(mask.array) * mask.voxel_mm3


def _distance_mm(mask: Volume, affine: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Distance of every cell's centre to the nodule's centroid; the axes are those of the grid, never sheared."""
    centroid = mask.affine @ [*np.argwhere(mask.array).mean(axis=0), 1]
    cell = np.linalg.solve(affine, centroid)[:3]
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    x, y, z = (((np.arange(n) - centre) * step) ** 2 for n, centre, step in zip(shape, cell, spacing, strict=True))
    return np.sqrt(x[:, None, None] + y[:, None] + z)
