"""A series of a tilted gantry, from DICOM to a case, against the same patient upright."""

import json

import numpy as np
import pytest
from lidc_files import nodule, roi, write_slice, xml
from scipy.ndimage import distance_transform_edt, map_coordinates

from lungddpm.config.models import Config
from lungddpm.layouts.compose import build_case
from lungddpm.sources import lidc
from lungddpm.sources.index import index_source
from lungddpm.sources.phantom.cohort import write_cohort
from lungddpm.sources.phantom.settings import Phantom

PHANTOM = Phantom(
    patients=1, matrix=80, pixel_mm=4.4, slice_mm=6, nodules=(1, 1), nodule_diameter_mm=(16, 30), noise_hu=0
)
CONFIG = Config(grid={"size": [32, 32, 32]}, source={"phantom": PHANTOM.model_dump()})
PIXEL_MM, SLICE_MM, SIDE = 3.0, 3.0, 128
RADIUS_MM, BALL_HU = 13.0, 400
LPS = np.diag([-1, -1, 1])


@pytest.fixture(scope="module")
def upright(tmp_path_factory):
    """The upright patient's case, and a place deep in a lung, (3,) mm, RAS+."""
    top = tmp_path_factory.mktemp("upright")
    write_cohort(PHANTOM, CONFIG.seed, top)
    (row,) = index_source("lidc", top)
    case = build_case(lidc.load_scan(top, row), CONFIG)
    free = distance_transform_edt(
        (case.found.lungs_lr > 0) & (case.found.nodules == 0), sampling=case.found.ct.spacing_mm
    )
    deepest = np.unravel_index(np.argmax(free), free.shape)
    assert free[deepest] > RADIUS_MM + 5
    return case, (case.found.ct.affine @ [*deepest, 1])[:3]


def true_hu(case, centre, places):
    """HU at places, (..., 3) mm RAS+: the upright scan between and beyond its voxels, with a ball in it."""
    ct = case.found.ct
    voxels = np.linalg.solve(ct.affine[:3, :3], (places - ct.affine[:3, 3])[..., None])[..., 0]
    hu = map_coordinates(ct.array.astype(float), np.moveaxis(voxels, -1, 0), order=1, mode="nearest")
    return np.where(np.linalg.norm(places - centre, axis=-1) < RADIUS_MM, BALL_HU, hu)


def write_tilted(folder, case, centre, degrees):
    """The patient in slices that lean by an angle while the table moves along z, the ball outlined by a reader."""
    angle = np.deg2rad(degrees)
    axes = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    row, column, normal = axes.T
    ct = case.found.ct
    middle = LPS @ (ct.affine @ [*(np.array(ct.shape) - 1) / 2, 1])[:3]
    count = int(ct.shape[2] * ct.spacing_mm[2] / SLICE_MM)
    first = middle - (SIDE - 1) / 2 * PIXEL_MM * (row + column) - (count - 1) / 2 * np.array([0, 0, SLICE_MM])
    columns, rows = np.meshgrid(np.arange(SIDE), np.arange(SIDE))
    outlines = []
    for k in range(count):
        corner = first + k * np.array([0, 0, SLICE_MM])
        places = (corner + PIXEL_MM * (columns[..., None] * row + rows[..., None] * column)) @ LPS
        stored = np.rint(true_hu(case, centre, places) + 1024).astype("<i2")
        write_slice(
            folder / f"{k}.dcm", k, axes=axes, Rows=SIDE, Columns=SIDE, PixelSpacing=[PIXEL_MM, PIXEL_MM],
            ImagePositionPatient=corner.tolist(), PixelData=stored.tobytes(), SliceThickness=str(SLICE_MM),
        )  # fmt: skip
        away = LPS @ centre - corner
        if abs(away @ normal) < RADIUS_MM:
            # The points are the first pixels outside.
            radius = np.sqrt(RADIUS_MM**2 - (away @ normal) ** 2) / PIXEL_MM + 0.5
            turn = np.linspace(0, 2 * np.pi, 90)
            circle = [away @ row, away @ column] + radius * PIXEL_MM * np.stack([np.cos(turn), np.sin(turn)], axis=1)
            points = dict.fromkeys(map(tuple, np.rint(circle / PIXEL_MM).astype(int).tolist()))
            outlines.append(roi(k, points))
    (folder / "reads.xml").write_text(xml(nodule(*outlines)))


@pytest.mark.parametrize("degrees", [12, -25])
def test_a_tilted_series_gives_the_upright_patient(upright, tmp_path, degrees):
    truth, centre = upright
    write_tilted(tmp_path, truth, centre, degrees)
    (row,) = index_source("lidc", tmp_path)
    assert (row["status"], row["reason"]) == ("ok", "")
    note = f"the gantry was tilted by {abs(degrees):.1f} degrees: CT and nodules are resampled to an upright grid"
    assert json.loads(row["notes"]) == [note]
    scan = lidc.load_scan(tmp_path, row)
    case = build_case(scan, CONFIG)
    assert case.qc["notes"] == [note]

    found = case.found
    axes = found.ct.affine[:3, :3] / found.ct.spacing_mm
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-9)
    (ball,) = case.qc["nodules"]
    place = [ball[f"centroid_{axis}_mm"] for axis in "xyz"]
    np.testing.assert_allclose(place, centre, atol=0.5)
    assert ball["volume_mm3"] == pytest.approx(4 / 3 * np.pi * RADIUS_MM**3, rel=0.1)
    places = np.stack(np.meshgrid(*map(np.arange, found.ct.shape), indexing="ij"), -1) @ found.ct.affine[:3, :3].T
    places += found.ct.affine[:3, 3]
    error = np.abs(found.ct.array - true_hu(truth, centre, places))[np.abs(places - centre).max(axis=-1) < 80]
    # Edges are interpolated twice.
    assert (error.mean() < 8, np.median(error) < 2, np.percentile(error, 90) < 20) == (True, True, True)
    for side in (1, 2):
        litres = [np.count_nonzero(one.lungs_lr == side) * one.ct.voxel_mm3 / 1e6 for one in (found, truth.found)]
        assert litres[0] == pytest.approx(litres[1], rel=0.05)
