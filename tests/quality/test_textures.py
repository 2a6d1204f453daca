"""Textures of lesions: by hand-made tables and layouts, and as layouts are made."""

import numpy as np
import pandas as pd
import pytest

from lungddpm.core.cases import NODULE_COLUMNS
from lungddpm.core.files import write_table
from lungddpm.core.labels import Label
from lungddpm.core.volume import Volume
from lungddpm.evaluation.lesions import lesion_measures
from lungddpm.quality.textures import KnownNodule, RealNodules, lesion_textures

AFFINE = np.array([[4.0, 0, 0, -40], [0, 4, 0, 10], [0, 0, 5, 100], [0, 0, 0, 1]])
SPACING_MM = np.array([4.0, 4.0, 5.0])


def position(voxel):
    return tuple(float(x) for x in (AFFINE @ [*voxel, 1])[:3])


def layout_of(*cubes):
    """Lungs with cubes of 3 voxels per edge around these voxels."""
    labels = np.full((20, 20, 20), Label.LUNG, np.uint8)
    for x, y, z in cubes:
        labels[x - 1 : x + 2, y - 1 : y + 2, z - 1 : z + 2] = Label.NODULE
    return Volume(labels, AFFINE)


def test_each_lesion_has_the_texture_of_the_nodule_in_it():
    layout = layout_of((15, 5, 5), (4, 12, 12), (10, 10, 4), (4, 4, 16))
    nodules = [
        KnownNodule(position((4, 12, 12)), "ground glass"),
        # In the corner, and just outside it.
        KnownNodule(position((16, 6, 6)), "solid"),
        KnownNodule(position((10, 10, 5.9)), "part-solid"),
        # Of no lesion: it vanished on the grid.
        KnownNodule(position((17, 17, 17)), "solid"),
    ]
    lesions = lesion_measures(layout.array == Label.NODULE, layout.array == Label.NODULE, SPACING_MM).lesions
    textures = lesion_textures(layout, nodules)
    assert len(textures) == len(lesions) == 4
    assert sorted(textures) == ["", "ground glass", "part-solid", "solid"]
    # In the order of the lesions: cut one away, and its overlap falls.
    without = layout.array == Label.NODULE
    without[3:6, 11:14, 11:14] = False
    overlaps = [each.overlap for each in lesion_measures(layout.array == Label.NODULE, without, SPACING_MM).lesions]
    assert [texture for texture, overlap in zip(textures, overlaps, strict=True) if not overlap] == ["ground glass"]


def test_nodules_that_grew_together_have_a_texture_if_they_agree():
    layout = layout_of((5, 5, 5), (8, 5, 5))
    one, other = position((5, 5, 5)), position((8, 5, 5))
    assert lesion_textures(layout, [KnownNodule(one, "solid"), KnownNodule(other, "solid")]) == ["solid"]
    assert lesion_textures(layout, [KnownNodule(one, "solid"), KnownNodule(other, "ground glass")]) == [""]
    assert lesion_textures(layout, [KnownNodule(one, "solid"), KnownNodule(other, "")]) == [""]
    assert lesion_textures(layout_of(), [KnownNodule(one, "solid")]) == []


@pytest.fixture
def table(tmp_path):
    """`cases.tsv` beside a table of three nodules of two cases."""
    rows = [("ref", 1, (5, 5, 5), 1.0), ("ref", 2, (5, 15, 5), 5.0), ("donor", 1, (9, 9, 9), 3.0)]
    rows = [
        {"case_id": case, "nodule": number, "texture": texture}
        | {f"centroid_{axis}_mm": at for axis, at in zip("xyz", position(voxel), strict=True)}
        for case, number, voxel, texture in rows
    ]
    write_table(tmp_path / "nodules.tsv", pd.DataFrame(rows, columns=NODULE_COLUMNS))
    return tmp_path / "cases.tsv"


@pytest.mark.parametrize(
    ("origin", "own_layout", "textures"),
    [
        ("reference", True, ["ground glass", "solid"]),
        ("added", False, ["ground glass", "solid", "part-solid"]),
        ("jittered", False, ["part-solid"]),
        (None, False, ["part-solid"]),
    ],
)
def test_a_sample_has_the_nodules_of_its_reference_and_of_its_donors(table, origin, own_layout, textures):
    placed = {"case_id": "donor", "nodule": 1, "position_mm": position((12, 12, 12))}
    unknown = {"case_id": "nobody", "nodule": 7, "position_mm": position((1, 1, 1))}
    record = {"layout_origin": origin, "nodules": [] if origin == "reference" else [placed, unknown]}
    found = RealNodules(table).of_sample(record, "ref", own_layout=own_layout)
    assert [nodule.texture for nodule in found] == textures
    if origin != "reference":
        assert found[-1].position_mm == position((12, 12, 12))


def test_without_a_table_of_nodules_nothing_is_known(tmp_path):
    assert RealNodules(tmp_path / "cases.tsv").of_case("ref") == []
