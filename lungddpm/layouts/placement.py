"""New plausible nodules: real ones of the discovery cases, rotated, scaled and placed in lungs; and moving existing
ones.

The published protocol had radiologists place nodules in references that have none (arXiv 2502.15204). Here the shapes
are those of the discovery cases' nodules, the positions follow a prior learned from them (`prior`), and these
rules apply to every placed nodule:

- Only lung and vessel become nodule. The part beyond the lungs is cut off, at most `CUT_SHARE` of a nodule, so that it
  can be attached to the pleura.
- It touches neither another nodule nor a medial surface, that is one with more of the same lung further lateral:
  mediastinum, hilum, airways, and most of the diaphragm's dome, which no label separates from the heart.
- At most `VESSEL_SHARE` of its volume comes from vessels, so it can be attached to a vessel but does not swallow a
hilar one.

All functions are deterministic given their random number generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from lungddpm.config.models import Synthesis
from lungddpm.core import cases
from lungddpm.core.errors import InputError
from lungddpm.core.files import fingerprint, read_json
from lungddpm.core.labels import Label
from lungddpm.core.progress import LOG
from lungddpm.core.roles import DISCOVERY, TEST
from lungddpm.core.volume import Volume, bounding_box, per_axis, read_volume
from lungddpm.layouts.compose import nodules_on_grid
from lungddpm.layouts.prior import Prior, lies_in_lungs

if TYPE_CHECKING:
    import pandas as pd

CUT_SHARE = 0.15
VESSEL_SHARE = 0.3
DROP_PROBABILITY = ADD_PROBABILITY = 0.25
"""Probability of removing or adding one nodule when a layout is jittered."""
_SHAPES_TRIED = 10
_PLACES_TRIED = 20_000
_PLACES_AT_ONCE = 500
_CELLS_TRIED = 60
_SCALES_TRIED = 10
_LUNG_AROUND = 0.3
"""A nodule with less lung around it is in the mediastinum or the chest wall: moving it would leave lung there."""
_FREE, _VESSEL, _OUTSIDE, _FORBIDDEN = range(4)
_NEIGHBOURS = np.ones((3, 3, 3), bool)


@dataclass(frozen=True)
class Shape:
    """A real nodule.

    Attributes:
        mask: bool, at the resolution of its scan, RAS+; cropped to the nodule.
        case_id: its case.
        patient_id: its patient.
        number: of the nodule in its case, from 1.
        ratings: `cases.RATINGS`, medians over its readers; empty if nobody rated.
    """

    mask: Volume
    case_id: str
    patient_id: str
    number: int
    ratings: dict[str, float] = field(default_factory=dict)

    @property
    def centre_mm(self) -> np.ndarray:
        """Its centroid, RAS, shape (3,)."""
        return _to_mm(self.mask, np.argwhere(self.mask.array).mean(axis=0))


@dataclass(frozen=True)
class PlacedNodule:
    """One placed nodule of a layout: the origin of its shape, and how it was placed.

    Attributes:
        case_id: case of the shape.
        patient_id: patient of the shape.
        nodule: its number in that case.
        scale: factor on its diameter.
        rotation_degrees: rotation vector about its centre, along the axes of the grid.
        centre_mm: centroid of the whole nodule, including the part cut off beyond the lungs, RAS.
        position_mm: of its centroid in the made layout, RAS.
        volume_mm3: in the made layout.
        ratings: of the nodule whose shape it has, see `Shape`.
    """

    case_id: str
    patient_id: str
    nodule: int
    scale: float
    rotation_degrees: tuple[float, float, float]
    centre_mm: tuple[float, float, float]
    position_mm: tuple[float, float, float]
    volume_mm3: float
    ratings: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class MadeLayout:
    """A layout with placed or moved nodules."""

    layout: Volume
    """uint8 `Label`, on the grid of the layout that it was made from."""
    nodules: tuple[PlacedNodule, ...]
    numbers: np.ndarray
    """(x, y, z) uint16: 0, or the position in `nodules`, from 1, of the voxel's nodule."""


@dataclass(frozen=True)
class Donor:
    """A nodule that provides its shape, which is read when it is drawn."""

    folder: cases.CaseFolder
    case_id: str
    patient_id: str
    number: int
    volume_mm3: float

    def shape(self) -> Shape:
        """Read it.

        Raises:
            InputError: the case lacks it.
        """
        for shape in read_shapes(self.folder, self.case_id, self.patient_id):
            if shape.number == self.number:
                return shape
        raise InputError(self.folder.nodules, f"has no nodule {self.number}", "Delete its folder and prepare it again.")


@dataclass(frozen=True)
class NoduleLibrary:
    """The donors and prior that new nodules are drawn from."""

    donors: tuple[Donor, ...]
    counts: tuple[int, ...]
    """Nodules of each case that has any."""
    prior: Prior
    fingerprint: str
    """Fingerprint of everything that a draw depends on."""

    @property
    def folders(self) -> dict[str, cases.CaseFolder]:
        """The folder of every case that has a donor, by case id."""
        return {donor.case_id: donor.folder for donor in self.donors}


def open_library(
    cases_table: Path, table: pd.DataFrame, allow_shared_patients: bool, discovery: pd.DataFrame | None = None
) -> NoduleLibrary:
    """The nodules of the usable discovery cases, excluding patients that are also tested on unless that is allowed.

    Only `case.json` of each case is read here.

    Args:
        cases_table: path of the table, next to the cases' folders.
        table: all cases.
        allow_shared_patients: see `roles.allow_shared_patients`.
        discovery: the discovery cases that provide nodules; all by default.

    Raises:
        InputError: there are no such nodules, or a case has no readable record.
    """
    tested = set(cases.of_role(table, TEST)["patient_id"])
    donors, counts, measures, identity = [], [], [], []
    discovery = cases.usable(table, DISCOVERY) if discovery is None else discovery
    for _, row in discovery.iterrows():
        if row["n_nodules"] == 0 or (row["patient_id"] in tested and not allow_shared_patients):
            continue
        folder = cases.folder_of(cases_table, row)
        record = _read_record(folder.record)
        numbered = [item for item in enumerate(record["nodules"], start=1) if lies_in_lungs(item[1])]
        if not numbered:
            continue
        names = row["case_id"], row["patient_id"]
        donors += [Donor(folder, *names, number, nodule["volume_mm3"]) for number, nodule in numbered]
        counts.append(len(numbered))
        measures.append(record["placement"])
        identity.append([*names, record])
    if not donors:
        raise InputError(
            cases_table,
            f"has no nodule in the lungs of its {len(discovery)} discovery cases to make new ones from",
            "Raise arms.real_cases, give roles.discovery other patients, or set synthesis.place_nodules and "
            "jitter_repeats to false.",
        )
    return NoduleLibrary(tuple(donors), tuple(counts), Prior.learn(measures), fingerprint(identity))


def read_shapes(folder: cases.CaseFolder, case_id: str, patient_id: str) -> list[Shape]:
    """The nodules of a case at its scan's resolution, in the order of their numbers.

    Raises:
        InputError: `nodules.nii.gz` is missing or unreadable.
    """
    volume = read_volume(folder.nodules)
    boxes = ndimage.find_objects(volume.array.astype(np.int32))
    figures = dict(enumerate(folder.nodule_figures(), start=1))
    return [
        Shape(
            volume.like(volume.array == number).crop(box),
            case_id,
            patient_id,
            number,
            {name: value for name in cases.RATINGS if (value := figures.get(number, {}).get(name)) is not None},
        )
        for number, box in enumerate(boxes, start=1)
        if box is not None
    ]


def place(layout: Volume, library: NoduleLibrary, settings: Synthesis, rng: np.random.Generator) -> MadeLayout:
    """Place new nodules in a layout: as many as some discovery case has, each with the shape of a real one.

    Args:
        layout: uint8 `Label`, RAS+; its own nodules are kept.
        library: shapes, numbers and positions to draw from.
        settings: `scale` is used.
        rng: for all draws.

    Returns:
        The layout, with fewer nodules or none if there is no room for more.
    """
    lungs = _Lungs(layout)
    weights = library.prior.weights(layout)
    wanted = int(rng.choice(library.counts))
    while len(lungs.nodules) < wanted and _add(lungs, weights, library, settings, rng):
        pass
    if len(lungs.nodules) < wanted:
        LOG.info("%d nodules to place, %d fit into the lungs", wanted, len(lungs.nodules))
    return lungs.made()


def jitter(
    layout: Volume, own: Sequence[Shape], library: NoduleLibrary, settings: Synthesis, rng: np.random.Generator
) -> MadeLayout:
    """Move and scale the nodules of a layout; occasionally one is removed (never the last), or one is added.

    All are first removed, which leaves lung; large ones, which have less room, choose first. Each gets a factor within
    `settings.scale` and a shift that is uniform in a ball of `settings.shift_mm`, both conditional on fitting; if
    nothing fits it is unchanged. Nodules that barely touch the lungs are not moved.

    Args:
        layout: uint8 `Label`, RAS+, with nodules.
        own: their shapes; their grids are parallel to the layout's.
        library: to draw an added one from.
        settings: `scale` and `shift_mm` are used.
        rng: for all draws.
    """
    was = layout.array == Label.NODULE
    cells = np.where(was, nodules_on_grid([shape.mask for shape in own], layout.affine, layout.shape), 0)
    own_cells = {number: np.argwhere(cells == number) for number in range(1, len(own) + 1)}
    kept = sorted((n for n, at in own_cells.items() if len(at)), key=lambda n: len(own_cells[n]), reverse=True)
    staying = [n for n in kept if _lung_around(layout.array, cells == n) < _LUNG_AROUND]
    moving = [n for n in kept if n not in staying]
    lifted = np.where(was & ~np.isin(cells, staying), np.uint8(Label.LUNG), layout.array)
    chance = rng.random()
    if chance < DROP_PROBABILITY and len(kept) > 1 and moving:
        moving.remove(int(rng.choice(moving)))

    lungs = _Lungs(layout.like(lifted))
    for n in staying:
        lungs.put_unmoved(own_cells[n], own[n - 1])
    for n in moving:
        if not _move(lungs, own[n - 1], settings, rng):
            lungs.put_back(own_cells[n], own[n - 1])
    if chance > 1 - ADD_PROBABILITY:
        _add(lungs, library.prior.weights(layout), library, settings, rng)
    return lungs.made()


def transformed(mask: Volume, rotation: np.ndarray, scale: float, step_mm: float) -> Volume:
    """A body rotated about its centroid and scaled, with the scaled volume exact to half a voxel.

    The surface is interpolated from the signed distance, so thick slices do not leave steps.

    Args:
        mask: bool, at any spacing; only the spacing of its affine is used.
        rotation: (3, 3).
        scale: factor on lengths.
        step_mm: edge of the result's voxels.

    Returns:
        bool, cropped to the body; its affine has the axes of the array and the centroid of `mask` as its origin.
    """
    spacing_mm = mask.spacing_mm
    body = np.pad(mask.array, 2)
    signed_mm = ndimage.distance_transform_edt(~body, spacing_mm) - ndimage.distance_transform_edt(body, spacing_mm)
    inside = np.argwhere(body)
    centre = inside.mean(axis=0)
    reach_mm = scale * (np.linalg.norm((inside - centre) * spacing_mm, axis=1).max() + np.linalg.norm(spacing_mm))
    half = int(np.ceil(reach_mm / step_mm))
    to_source = (rotation.T / spacing_mm[:, None]) * (step_mm / scale)
    sampled = ndimage.affine_transform(
        signed_mm,
        to_source,
        offset=centre - to_source @ np.full(3, half),
        output_shape=(2 * half + 1,) * 3,
        order=1,
        cval=signed_mm.max(),
    )
    wanted = max(1, round(len(inside) * mask.voxel_mm3 * scale**3 / step_mm**3))
    result = np.zeros(sampled.shape, bool)
    result.flat[np.argpartition(sampled, wanted - 1, axis=None)[:wanted]] = True
    affine = np.diag([step_mm] * 3 + [1.0])
    affine[:3, 3] = -half * step_mm
    return Volume(result, affine).crop(bounding_box(result))


class _Lungs:
    """A layout in which nodules are being placed."""

    def __init__(self, layout: Volume):
        lungs = layout.array != Label.BACKGROUND
        self.layout = layout.like(layout.array.copy())
        self.nodules: list[PlacedNodule] = []
        self._numbers = np.zeros(layout.shape, np.uint16)
        self._codes = np.full(layout.shape, _FREE, np.uint8)
        self._codes[layout.array == Label.VESSEL] = _VESSEL
        self._codes[~lungs] = _OUTSIDE
        forbidden = _medial(lungs) | (layout.array == Label.NODULE)
        self._codes[ndimage.binary_dilation(forbidden, _NEIGHBOURS)] = _FORBIDDEN

    def first_fit(self, cells: np.ndarray, places: np.ndarray) -> np.ndarray | None:
        """The first of these positions, (m, 3), at which all of a nodule's cells, (n, 3) offsets, fit; (3,)."""
        reach = int(np.abs(cells).max())
        codes = np.pad(self._codes, reach, constant_values=_OUTSIDE)
        strides = np.array([codes.shape[1] * codes.shape[2], codes.shape[2], 1])
        codes, steps = codes.ravel(), cells @ strides
        # Most positions of a large nodule fail, which a few of its cells show.
        some_steps = steps[:: 1 + len(steps) // _CELLS_TRIED]
        for first in range(0, len(places), _PLACES_AT_ONCE):
            at_once = places[first : first + _PLACES_AT_ONCE]
            starts = (at_once + reach) @ strides
            possible = (codes[starts[:, None] + some_steps] != _FORBIDDEN).all(axis=1)
            for number in np.flatnonzero(possible):
                found = np.bincount(codes[starts[number] + steps], minlength=4) / len(steps)
                if not found[_FORBIDDEN] and found[_OUTSIDE] <= CUT_SHARE and found[_VESSEL] <= VESSEL_SHARE:
                    return at_once[number]
        return None

    def put(self, cells: np.ndarray, shape: Shape, scale: float, rotation: Rotation, centre_mm: np.ndarray) -> None:
        """Turn cells, (n, 3), into a nodule, as far as they are in the lungs."""
        labels = self.layout.array
        cells = cells[((cells >= 0) & (cells < labels.shape)).all(axis=1)]
        cells = cells[labels[tuple(cells.T)] != Label.BACKGROUND]
        labels[tuple(cells.T)] = Label.NODULE
        self._numbers[tuple(cells.T)] = len(self.nodules) + 1
        for offset in np.argwhere(_NEIGHBOURS) - 1:
            near = np.clip(cells + offset, 0, np.array(labels.shape) - 1)
            self._codes[tuple(near.T)] = _FORBIDDEN
        position_mm = _to_mm(self.layout, cells.mean(axis=0))
        self.nodules.append(
            PlacedNodule(
                shape.case_id,
                shape.patient_id,
                shape.number,
                round(float(scale), 4),
                _rounded(rotation.as_rotvec(degrees=True)),
                _rounded(centre_mm),
                _rounded(position_mm),
                round(len(cells) * self.layout.voxel_mm3, 1),
                shape.ratings,
            )
        )

    def put_unmoved(self, cells: np.ndarray, shape: Shape) -> None:
        """Turn the cells of a nodule of this layout's own case into that nodule."""
        self.put(cells, shape, 1.0, Rotation.identity(), shape.centre_mm)

    def put_back(self, cells: np.ndarray, shape: Shape) -> None:
        """Keep a nodule in place, unless another one is now too close."""
        taken = ndimage.binary_dilation(self.layout.array == Label.NODULE, _NEIGHBOURS)
        if taken[tuple(cells.T)].any():
            LOG.info("nodule %d of %s no longer fits anywhere and is left out", shape.number, shape.case_id)
        else:
            self.put_unmoved(cells, shape)

    def made(self) -> MadeLayout:
        """The current layout."""
        return MadeLayout(self.layout, tuple(self.nodules), self._numbers)


def _add(
    lungs: _Lungs, weights: np.ndarray, library: NoduleLibrary, settings: Synthesis, rng: np.random.Generator
) -> bool:
    """Place a new nodule at a weighted random position where it fits; False if none was found."""
    places = np.argwhere(weights > 0)
    log_weights = np.log(weights[weights > 0])
    for attempt in range(_SHAPES_TRIED + 1):
        donor, scale = library.donors[rng.integers(len(library.donors))], _draw_scale(settings.scale, rng)
        if attempt == _SHAPES_TRIED:
            donor, scale = min(library.donors, key=lambda donor: donor.volume_mm3), settings.scale[0]
        shape = donor.shape()
        rotation, offset = Rotation.random(rng=rng), rng.uniform(-0.5, 0.5, 3)
        cells = _cells_of(shape, rotation.as_matrix(), scale, offset, lungs.layout.spacing_mm)
        # Gumbel trick: the order of weighted sampling without replacement.
        order = np.argsort(-(log_weights + rng.gumbel(size=len(places))))[:_PLACES_TRIED]
        if (at := lungs.first_fit(cells, places[order])) is not None:
            lungs.put(at + cells, shape, scale, rotation, _to_mm(lungs.layout, at + offset))
            return True
    return False


def _move(lungs: _Lungs, shape: Shape, settings: Synthesis, rng: np.random.Generator) -> bool:
    """Put a removed nodule back, scaled and shifted; False if it does not fit within the shift at the scales tried."""
    spacing_mm = lungs.layout.spacing_mm
    centre = np.linalg.solve(lungs.layout.affine, [*shape.centre_mm, 1])[:3]
    low, high = settings.scale
    for _ in range(_SCALES_TRIED):
        scale = _draw_scale((low, high), rng)
        direction = rng.normal(size=3)
        shift_mm = direction / np.linalg.norm(direction) * settings.shift_mm * rng.random() ** (1 / 3)
        target = centre + shift_mm / spacing_mm
        # All positions in the ball with the same offset within the cell, so that one resampled shape serves all.
        offset = target - np.rint(target)
        reach = np.ceil(settings.shift_mm / spacing_mm).astype(int) + 1
        places = np.argwhere(np.ones(2 * reach + 1, bool)) - reach + np.rint(centre).astype(int)
        places = places[((places >= 0) & (places < lungs.layout.shape)).all(axis=1)]
        apart_mm = np.linalg.norm((places + offset - centre) * spacing_mm, axis=1)
        places = rng.permutation(places[apart_mm <= settings.shift_mm + 1e-6])
        cells = _cells_of(shape, np.eye(3), scale, offset, spacing_mm)
        if (at := lungs.first_fit(cells, places)) is not None:
            lungs.put(at + cells, shape, scale, Rotation.identity(), _to_mm(lungs.layout, at + offset))
            return True
        high = scale
    return False


def _to_mm(volume: Volume, index: np.ndarray) -> np.ndarray:
    return (volume.affine @ [*index, 1])[:3]


def _rounded(vector: np.ndarray) -> tuple[float, float, float]:
    return per_axis(round(float(x), 2) for x in vector)


def _draw_scale(limits: tuple[float, float], rng: np.random.Generator) -> float:
    """A factor between the limits; enlarging and shrinking by the same factor are equally likely."""
    return float(np.exp(rng.uniform(*np.log(limits))))


def _cells_of(
    shape: Shape, rotation: np.ndarray, scale: float, offset: np.ndarray, spacing_mm: np.ndarray
) -> np.ndarray:
    """The cells of a nodule, (n, 3), counted from the cell whose centre lies `offset` cells before the nodule's."""
    diameter_mm = scale * np.cbrt(6 / np.pi * np.count_nonzero(shape.mask.array) * shape.mask.voxel_mm3)
    body = transformed(shape.mask, rotation, scale, min(spacing_mm.min() / 3, diameter_mm / 8))
    corners_mm = body.affine[:3, 3], body.affine[:3, 3] + (np.array(body.shape) - 1) * body.spacing_mm
    reach = int(np.ceil((np.abs(corners_mm) / spacing_mm).max())) + 1
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = -(reach + offset) * spacing_mm
    return np.argwhere(nodules_on_grid([body], affine, (2 * reach + 1,) * 3)) - reach


def _medial(lungs: np.ndarray) -> np.ndarray:
    """Voxels outside the lungs with lung further lateral in the same row: mediastinum, hila, airways."""
    side = bounding_box(lungs)[0]
    middle = (side.start + side.stop) // 2
    lateral = np.concatenate(
        [
            np.logical_or.accumulate(lungs[:middle], axis=0),
            np.logical_or.accumulate(lungs[middle:][::-1], axis=0)[::-1],
        ]
    )
    return lateral & ~lungs


def _lung_around(labels: np.ndarray, nodule: np.ndarray) -> float:
    """Share of a nodule's neighbours, not counting other nodules, that are lung or vessel."""
    around = labels[ndimage.binary_dilation(nodule, _NEIGHBOURS) & ~nodule]
    around = around[around != Label.NODULE]
    return float((around != Label.BACKGROUND).mean()) if around.size else 0.0


def _read_record(path: Path) -> dict:
    """The part of `prepare`'s record of a case that is needed here."""
    remedy = "Delete its folder and prepare it again."
    record = read_json(path, remedy)
    try:
        return {
            "nodules": record["qc"]["nodules"],
            "placement": record["placement"],
            "fingerprint": record["fingerprint"],
        }
    except (KeyError, TypeError) as error:
        raise InputError(path, f"does not give the positions of the case's nodules ({error!r})", remedy) from None
