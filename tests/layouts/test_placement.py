"""New and moved nodules: against shapes, distances and distributions that are known in closed form."""

import json
from dataclasses import replace
from types import SimpleNamespace

import cc3d
import numpy as np
import pytest
from scipy import ndimage, stats
from scipy.spatial.transform import Rotation

from lungddpm.config.models import Synthesis
from lungddpm.core.cases import CaseFolder, read_cases
from lungddpm.core.errors import InputError
from lungddpm.core.files import write_json
from lungddpm.core.labels import Label
from lungddpm.core.volume import Volume, write_volume
from lungddpm.layouts import prior
from lungddpm.layouts.placement import (
    CUT_SHARE,
    VESSEL_SHARE,
    NoduleLibrary,
    Shape,
    jitter,
    open_library,
    place,
    read_shapes,
    transformed,
)
from lungddpm.layouts.prior import Prior, measure_places

FLAT = Prior(np.ones(prior.BINS))
EVERYWHERE = np.ones((3, 3, 3), bool)
LUNG_X_MM, LUNG_RADII_MM = 70.0, (55.0, 80.0, 100.0)


def chest(spacing=(3.0, 3.0, 4.0)):
    """Two ellipsoids with straight vessels from a hilum each; the origin lies between them."""
    spacing = np.array(spacing)
    shape = np.ceil(np.array([270, 180, 220]) / spacing).astype(int)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -(shape - 1) / 2 * spacing
    x, y, z = mm_of(affine, shape)
    layout = np.zeros(shape, np.uint8)
    layout[((abs(x) - LUNG_X_MM) / 55) ** 2 + (y / 80) ** 2 + (z / 100) ** 2 < 1] = Label.LUNG
    for direction in Rotation.random(14, rng=np.random.default_rng(5)).as_matrix()[:, 0]:
        for side in (-1, 1):
            offset = np.stack([x - side * 40, y, z], axis=-1)
            along = offset @ direction
            near = np.linalg.norm(offset - along[..., None] * direction, axis=-1) < 4
            layout[near & (layout == Label.LUNG) & (abs(along) < 60)] = Label.VESSEL
    return Volume(layout, affine)


def mm_of(affine, shape):
    return np.moveaxis(np.stack(np.indices(shape), -1) @ affine[:3, :3] + affine[:3, 3], -1, 0)


def ellipsoid(radii_mm, centre_mm=(0, 0, 0), spacing=(0.7, 0.7, 2.0), number=1):
    """A nodule at a scan's resolution."""
    spacing, centre_mm = np.array(spacing), np.array(centre_mm, float)
    half = np.ceil(np.array(radii_mm) / spacing).astype(int)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = centre_mm - half * spacing
    offset = mm_of(affine, 2 * half + 1) - centre_mm[:, None, None, None]
    mask = sum((o / r) ** 2 for o, r in zip(offset, radii_mm, strict=True)) <= 1
    return Shape(Volume(mask, affine), "donor case", "donor patient", number)


def volume_mm3(shape):
    return np.count_nonzero(shape.mask.array) * shape.mask.voxel_mm3


def library_of(*shapes, counts=(1,), likely=FLAT):
    donors = [SimpleNamespace(volume_mm3=volume_mm3(shape), shape=lambda shape=shape: shape) for shape in shapes]
    return NoduleLibrary(tuple(donors), counts, likely, "")


def random(seed):
    return np.random.default_rng(seed)


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize("scale", [0.75, 1.0, 1.33])
@pytest.mark.parametrize("spacing", [(0.7, 0.7, 0.7), (0.6, 0.6, 3.0)])
def test_turning_and_scaling_an_ellipsoid(scale, spacing):
    shape, radii = ellipsoid((6, 9, 14), spacing=spacing), np.array([6, 9, 14])
    rotation = Rotation.from_euler("xyz", [30, 50, 70], degrees=True).as_matrix()
    body = transformed(shape.mask, rotation, scale, 0.6)
    assert np.count_nonzero(body.array) * body.voxel_mm3 == pytest.approx(volume_mm3(shape) * scale**3, abs=0.2)
    points = np.argwhere(body.array) * 0.6 + body.affine[:3, 3]
    assert np.abs(points.mean(axis=0)).max() < 0.3
    # The second moments of a solid ellipsoid are a fifth of its squared radii.
    expected = rotation @ np.diag((scale * radii) ** 2 / 5) @ rotation.T
    assert np.abs(np.cov(points.T) - expected).max() < 0.08 * expected.max()


def test_one_voxel_has_its_volume_too():
    shape = ellipsoid((0.1, 0.1, 0.1), spacing=(0.7, 0.7, 2.5))
    assert shape.mask.array.sum() == 1
    body = transformed(shape.mask, np.eye(3), 2.0, 0.25)
    assert np.count_nonzero(body.array) * 0.25**3 == pytest.approx(8 * 0.7 * 0.7 * 2.5, rel=0.02)


# ---------------------------------------------------------------- placing


def check_nodules(before, made, shapes):
    """The rules that hold for every nodule, with nothing taken from the code that follows them."""
    labels, old = made.layout.array, before.array
    nodules = labels == Label.NODULE
    assert np.isin(old[nodules], (Label.LUNG, Label.VESSEL)).all()
    assert (labels[~nodules] == old[~nodules]).all()
    parts, count = cc3d.connected_components(nodules, connectivity=26, return_N=True)
    assert count == len(made.nodules), "they touch, or fall apart"
    x, y, z = mm_of(before.affine, before.shape)
    _, b, c = LUNG_RADII_MM
    medial = (old == Label.BACKGROUND) & (abs(x) < LUNG_X_MM) & ((y / b) ** 2 + (z / c) ** 2 < 0.95)
    assert not (ndimage.binary_dilation(nodules, EVERYWHERE) & medial).any()
    for nodule in made.nodules:
        at = np.rint(np.linalg.solve(before.affine, [*nodule.position_mm, 1])[:3]).astype(int)
        part = parts == parts[tuple(at)]
        assert parts[tuple(at)] > 0
        assert nodule.volume_mm3 == pytest.approx(np.count_nonzero(part) * before.voxel_mm3, abs=0.1)
        wanted_mm3 = volume_mm3(shapes[nodule.nodule - 1]) * nodule.scale**3
        # Beside the cells, the scale is rounded in the record, and the turned body has voxels of its own.
        half_a_cell = before.voxel_mm3 / 2 + 1 + 2e-4 * wanted_mm3
        assert (1 - CUT_SHARE) * (wanted_mm3 - half_a_cell) <= nodule.volume_mm3 <= wanted_mm3 + half_a_cell
        inside = ndimage.binary_erosion(old != Label.BACKGROUND, EVERYWHERE)
        if not (part & ~inside).any():
            assert nodule.volume_mm3 == pytest.approx(wanted_mm3, abs=half_a_cell)
        assert (old[part] == Label.VESSEL).mean() <= VESSEL_SHARE / (1 - CUT_SHARE)


def test_placed_nodules_keep_the_rules():
    before, settings = chest(), Synthesis()
    shapes = [ellipsoid(radii, number=n) for n, radii in enumerate([(3, 3, 4), (6, 9, 14), (20, 15, 22)], start=1)]
    library = library_of(*shapes, counts=(2, 4))
    made = [place(before, library, settings, random(seed)) for seed in range(12)]
    for one in made:
        check_nodules(before, one, shapes)
        assert all(settings.scale[0] <= nodule.scale <= settings.scale[1] for nodule in one.nodules)
        assert {(nodule.case_id, nodule.patient_id) for nodule in one.nodules} == {("donor case", "donor patient")}
    assert {len(one.nodules) for one in made} == {2, 4}
    assert {nodule.nodule for one in made for nodule in one.nodules} == {1, 2, 3}
    assert (before.array != Label.NODULE).all(), "the layout given is left as it was"


def rated(shape, texture):
    return replace(shape, ratings={"texture": texture, "malignancy": 6.0 - texture})


def test_placed_nodules_have_the_ratings_of_those_whose_shape_they_have():
    shapes = [rated(ellipsoid((4 + n, 5, 6), number=n), float(n)) for n in (1, 2, 3)]
    library = library_of(*shapes, counts=(3,))
    placed = [
        nodule for seed in range(4) for nodule in place(chest((5, 5, 6)), library, Synthesis(), random(seed)).nodules
    ]
    assert {nodule.nodule for nodule in placed} == {1, 2, 3}
    for nodule in placed:
        assert nodule.ratings == {"texture": nodule.nodule, "malignancy": 6 - nodule.nodule}


def test_some_nodules_touch_the_pleura():
    before, shape = chest(), ellipsoid((6, 6, 6))
    pleura = (before.array != Label.BACKGROUND) & ~ndimage.binary_erosion(before.array != Label.BACKGROUND)
    on_it = [
        (pleura & (place(before, library_of(shape), Synthesis(), random(seed)).layout.array == Label.NODULE)).any()
        for seed in range(20)
    ]
    assert 2 <= sum(on_it) <= 18


def test_one_seed_gives_one_layout():
    before, library = chest((5, 5, 6)), library_of(ellipsoid((6, 9, 14)), ellipsoid((4, 4, 4)), counts=(1, 2, 3))
    first, again, other = (place(before, library, Synthesis(), random(seed)) for seed in (1, 1, 2))
    assert first.nodules == again.nodules
    assert (first.layout.array == again.layout.array).all()
    assert (first.layout.array != other.layout.array).any()


def test_a_giant_gives_way_to_the_smallest_shape():
    before, shapes = chest((5, 5, 6)), [ellipsoid((110, 110, 110), spacing=(5, 5, 5)), ellipsoid((4, 4, 4), number=2)]
    library = library_of(*[shapes[0]] * 200, shapes[1])
    (nodule,) = place(before, library, Synthesis(), random(0)).nodules
    assert (nodule.nodule, nodule.scale) == (2, Synthesis().scale[0])


def test_without_room_there_is_no_nodule():
    layout = np.zeros((12, 12, 12), np.uint8)
    layout[5:7, 5:7, 5:7] = Label.LUNG
    made = place(Volume(layout, np.diag([3.0, 3, 3, 1])), library_of(ellipsoid((10, 10, 10))), Synthesis(), random(0))
    assert made.nodules == ()
    assert (made.layout.array == layout).all()


# ---------------------------------------------------------------- the prior


def test_features_of_a_box():
    layout = np.zeros((40, 30, 50), np.uint8)
    layout[5:35, 5:25, 10:40] = Label.LUNG
    layout[20, 15, 10:40] = Label.VESSEL
    grid = Volume(layout, np.diag([2.0, 2.0, 3.0, 1]))
    nodule = {"share_in_or_touching_lungs": 1.0}
    inside = nodule | {f"centroid_{axis}_mm": mm for axis, mm in zip("xyz", (2 * 8, 2 * 15, 3 * 34.2), strict=True)}
    outside = inside | {"share_in_or_touching_lungs": 0.2}
    measured = measure_places(grid, [inside, outside])
    assert sum(measured["lung_voxels"]) == 30 * 20 * 30
    # Four voxels of 2 mm from the face at x, twelve from the vessel; 24.5 of 30 slices lie below the centre.
    assert measured["nodules"] == [{"surface_mm": 8.0, "vessel_mm": 24.0, "height": round(24.5 / 30, 4)}]
    json.dumps(measured)
    assert len(measure_places(grid.like(np.where(layout > 0, 1, 0)), [inside])["nodules"]) == 1, "no vessel at all"


def draws(relative_risk, number, seed):
    """Cases whose nodules lie in the bins by a known relative risk."""
    rng = random(seed)
    lung = rng.integers(200, 2000, prior.BINS)
    chance = (lung * relative_risk).ravel() / (lung * relative_risk).sum()
    middles = [np.array([0, *edges]) + 0.5 for edges in (prior.SURFACE_MM, prior.VESSEL_MM)]
    middles.append(np.array([0, *prior.HEIGHTS]) + 0.05)
    bins = np.unravel_index(rng.choice(len(chance), number, p=chance), prior.BINS)
    values = (middle[b] for middle, b in zip(middles, bins, strict=True))
    nodules = [{"surface_mm": s, "vessel_mm": v, "height": h} for s, v, h in zip(*values, strict=True)]
    return [{"lung_voxels": lung.ravel().tolist(), "nodules": nodules}]


def test_the_prior_is_the_relative_risk():
    surface, _, height = np.indices(prior.BINS)
    risk = np.exp(-0.35 * surface + 0.3 * height)
    learned = Prior.learn(draws(risk, 20_000, 0)).ratio
    expected = risk * learned.mean() / risk.mean()
    assert np.median(np.abs(learned / expected - 1)) < 0.1
    assert np.corrcoef(np.log(learned).ravel(), np.log(risk).ravel())[0, 1] > 0.97
    flat = Prior.learn(draws(np.ones(prior.BINS), 20_000, 1)).ratio
    assert 0.65 < flat.min() < flat.max() < 1.5


def test_few_nodules_give_a_soft_prior():
    only_here = np.zeros(prior.BINS)
    only_here[1, 1, 4] = 1
    one, many = (Prior.learn(draws(only_here, number, 2)).ratio for number in (1, 500))
    assert 1.2 < one.max() < 3
    assert 0.7 < one.min() < 1
    assert many.max() > 10 > 0.2 > many.min()
    assert np.unravel_index(many.argmax(), prior.BINS) == (1, 1, 4)
    assert (Prior.learn([{"lung_voxels": [1] * np.prod(prior.BINS), "nodules": []}]).ratio == 1).all()


def constructed_prior():
    """Nine times as likely near the pleura and high up."""
    ratio = np.ones(prior.BINS)
    ratio[: np.searchsorted(prior.SURFACE_MM, 10.0) + 1, :, np.searchsorted(prior.HEIGHTS, 0.6) + 1 :] = 9
    return Prior(ratio)


@pytest.mark.parametrize(
    ("likely", "factor"), [(FLAT, 1), (constructed_prior(), 9)], ids=["flat", "high, at the pleura"]
)
def test_places_follow_the_prior(likely, factor):
    before = chest((9, 9, 10))
    cell = ellipsoid((3, 3, 3))  # becomes one cell, which fits everywhere but beside mediastinum
    found = []
    for seed in range(300):
        layout = place(before, library_of(cell, likely=likely), Synthesis(), random(seed)).layout.array
        found.append(np.argwhere(layout == Label.NODULE)[0])
    x, y, z = mm_of(before.affine, before.shape)
    lungs = before.array != Label.BACKGROUND
    medial = ~lungs & (abs(x) < LUNG_X_MM) & ((y / 80) ** 2 + (z / 100) ** 2 < 1)
    possible = (before.array == Label.LUNG) & ~ndimage.binary_dilation(medial, EVERYWHERE)
    near = ndimage.distance_transform_edt(lungs, before.spacing_mm) < 10
    below = np.cumsum(lungs.sum(axis=(0, 1))) - lungs.sum(axis=(0, 1)) / 2
    favoured = near & (below / lungs.sum() >= 0.6)
    weight = np.where(favoured, factor, 1.0) * possible
    hits = sum(favoured[tuple(at)] for at in found)
    expected = weight[favoured].sum() / weight.sum()
    assert all(possible[tuple(at)] for at in found)
    assert stats.binomtest(int(hits), len(found), expected).pvalue > 0.01
    # And within the favoured part, and outside it, all places are alike: to the left or right, front or back.
    for part in (favoured, ~favoured):
        inside = [at for at in found if part[tuple(at)]]
        right = (part & possible)[x > 0].sum() / (part & possible).sum()
        front = (part & possible)[y > 0].sum() / (part & possible).sum()
        for axis, share in ((0, right), (1, front)):
            beyond = sum((before.affine @ [*at, 1])[axis] > 0 for at in inside)
            assert stats.binomtest(beyond, len(inside), share).pvalue > 0.005


# ---------------------------------------------------------------- jitter


@pytest.fixture(scope="module")
def with_nodules():
    """A chest with three nodules in the lungs, one of them on the pleura, and one in the mediastinum."""
    bare = chest((4, 4, 5))
    centres, radii = (
        [(75, 20, 40), (-70, -40, -30), (-119, 10, 20), (0, 0, 0)],
        [(8, 8, 8), (5, 7, 9), (9, 9, 9), (7, 7, 7)],
    )
    own = [ellipsoid(r, c, number=n) for n, (c, r) in enumerate(zip(centres, radii, strict=True), start=1)]
    x = mm_of(bare.affine, bare.shape)
    layout = bare.array.copy()
    for centre, r in zip(centres, radii, strict=True):
        layout[sum(((x[i] - centre[i]) / r[i]) ** 2 for i in range(3)) <= 1] = Label.NODULE
    return bare, bare.like(layout), own


def own_part(layout, shape):
    """The cells of one nodule of a layout."""
    parts, _ = ndimage.label(layout.array == Label.NODULE)
    return parts == parts[tuple(np.rint(np.linalg.solve(layout.affine, [*shape.centre_mm, 1])[:3]).astype(int))]


def test_jittered_nodules_keep_the_rules(with_nodules):
    bare, layout, own = with_nodules
    settings, library = Synthesis(shift_mm=12), library_of(ellipsoid((4, 4, 5), number=9))
    mediastinal = own_part(layout, own[3])
    for seed in range(15):
        made = jitter(layout, own, library, settings, random(seed))
        assert (made.layout.array[mediastinal] == Label.NODULE).all(), "barely in the lungs: it is not moved"
        moved = [nodule for nodule in made.nodules if nodule.nodule in (1, 2, 3)]
        added = [nodule for nodule in made.nodules if nodule.nodule == 9]
        labels = np.where(mediastinal, np.uint8(Label.BACKGROUND), made.layout.array)
        lungs = np.where(layout.array == Label.NODULE, np.uint8(Label.LUNG), layout.array)
        lungs[mediastinal] = Label.BACKGROUND
        without = SimpleNamespace(layout=layout.like(labels), nodules=[*moved, *added])
        check_nodules(layout.like(lungs), without, [*own, *[None] * 4, ellipsoid((4, 4, 5))])
        for nodule in moved:
            apart_mm = np.linalg.norm(np.subtract(nodule.position_mm, own[nodule.nodule - 1].centre_mm))
            assert apart_mm <= settings.shift_mm + 2, "cells do not tell a centroid exactly"
            assert settings.scale[0] <= nodule.scale <= settings.scale[1]
    assert (bare.array != Label.NODULE).all()


def test_jittered_nodules_keep_their_ratings(with_nodules):
    """Whether they are moved, stay, or are put back; one that is added has those of its donor."""
    _, layout, own = with_nodules
    own = [rated(shape, float(shape.number)) for shape in own]
    library = library_of(rated(ellipsoid((4, 4, 5), number=9), 1.5))
    expected = {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 9: 1.5}
    for settings, seeds in ((Synthesis(shift_mm=12), range(8)), (Synthesis(shift_mm=0.1, scale=(3.9, 4)), range(2))):
        made = [nodule for seed in seeds for nodule in jitter(layout, own, library, settings, random(seed)).nodules]
        assert {1, 2, 3, 4} <= {nodule.nodule for nodule in made}
        assert [nodule.ratings["texture"] for nodule in made] == [expected[nodule.nodule] for nodule in made]


def test_shifts_fill_the_ball(with_nodules):
    _, layout, own = with_nodules
    shifts = []
    for seed in range(50):
        made = jitter(layout, own[:1], library_of(own[0]), Synthesis(shift_mm=12), random(seed))
        shifts += [np.subtract(n.position_mm, own[0].centre_mm) for n in made.nodules[:1]]
    # Far from any obstacle: the cube of the relative distance is uniform, the direction has no preference.
    assert stats.kstest((np.linalg.norm(shifts, axis=1) / 12) ** 3, "uniform").pvalue > 0.01
    assert np.abs(np.mean(shifts, axis=0)).max() < 3 * 12 / np.sqrt(5 * len(shifts))


def test_nodules_come_and_go_but_never_the_last(with_nodules):
    bare, layout, own = with_nodules
    numbers = [
        len(jitter(layout, own[:3], library_of(own[1]), Synthesis(), random(seed)).nodules) for seed in range(50)
    ]
    for count in (2, 4):
        assert stats.binomtest(numbers.count(count), len(numbers), 0.25).pvalue > 0.01
    assert set(numbers) == {2, 3, 4}
    lone = layout.like(np.where(own_part(layout, own[1]), Label.NODULE, bare.array).astype(np.uint8))
    lone_numbers = [
        len(jitter(lone, own[1:2], library_of(own[1]), Synthesis(), random(seed)).nodules) for seed in range(12)
    ]
    assert set(lone_numbers) == {1, 2}


def test_a_nodule_of_the_mediastinum_leaves_no_lung_behind(with_nodules):
    _, layout, own = with_nodules
    outside = own_part(layout, own[3])
    for seed in range(6):
        made = jitter(layout, own, library_of(own[1]), Synthesis(shift_mm=90, scale=(0.5, 0.6)), random(seed))
        assert (made.layout.array[outside] == Label.NODULE).all()
        assert [nodule.scale for nodule in made.nodules if nodule.nodule == 4] == [1.0]


def test_no_shift_and_no_scale_change_next_to_nothing(with_nodules):
    _, layout, own = with_nodules
    still = Synthesis(shift_mm=0, scale=(1, 1))
    made = [jitter(layout, own[:2], library_of(own[1]), still, random(seed)) for seed in range(8)]
    kept = next(one for one in made if [n.nodule for n in one.nodules] == [1, 2])
    for nodule, shape in zip(kept.nodules, own[:2], strict=True):
        assert np.linalg.norm(np.subtract(nodule.position_mm, shape.centre_mm)) < 1
        assert nodule.volume_mm3 == pytest.approx(volume_mm3(shape), abs=layout.voxel_mm3)


def test_a_nodule_that_fits_nowhere_stays_as_it_was():
    layout = np.zeros((14, 14, 14), np.uint8)
    layout[4:10, 4:10, 4:10] = Label.NODULE
    layout[3, 3:11, 3:11] = layout[10, 3:11, 3:11] = Label.LUNG
    layout[4:10, 3:11, 3] = layout[4:10, 3:11, 10] = Label.LUNG
    affine = np.diag([3.0, 3, 3, 1])
    cube = Shape(Volume(np.ones((6, 6, 6), bool), affine + np.array([[0, 0, 0, 12]] * 3 + [[0] * 4])), "a", "b", 1)
    made = jitter(Volume(layout, affine), [cube], library_of(cube), Synthesis(scale=(1.3, 1.33)), random(1))
    assert (made.layout.array == layout).all()
    assert [nodule.scale for nodule in made.nodules] == [1.0]


# ---------------------------------------------------------------- the library


def cohort(folder, write_nodules, **roles):
    """A case of one nodule for each role, its number in the nodule's size; the table of all."""
    from lungddpm.core.cases import COLUMNS, write_cases

    rows = []
    for number, (name, role) in enumerate(roles.items()):
        layout = np.zeros((20, 20, 20), np.uint8)
        layout[2:18, 2:18, 2:18] = Label.LUNG
        layout[8 : 9 + number, 8:10, 8:10] = Label.NODULE
        write_volume(folder / name / "layout.nii.gz", Volume(layout, np.diag([2.0, 2, 2, 1])))
        write_volume(folder / name / "ct.nii.gz", Volume(layout.astype(np.int16), np.diag([2.0, 2, 2, 1])))
        write_nodules(folder / name)
        row = dict.fromkeys(COLUMNS, "") | dict.fromkeys([c for c in COLUMNS if c.startswith(("size", "spacing"))], 1)
        row |= {"case_id": name, "patient_id": f"patient {name}", "role": role, "path": name}
        rows.append(row | {"n_nodules": 1, "status": "ok"})
    write_cases(folder / "cases.tsv", rows)
    return folder / "cases.tsv"


def test_only_discovery_patients_lend_shapes(tmp_path, write_nodules):
    table = cohort(tmp_path, write_nodules, a="discovery", b="reference", c="test", d="discovery", e="discovery+test")
    traps = [tmp_path / name / file for name in "bce" for file in ("case.json", "nodules.nii.gz")]
    for trap in traps:
        trap.write_bytes(b"who opens this fails")
    library = open_library(table, read_cases(table), allow_shared_patients=False)
    shapes = [donor.shape() for donor in library.donors]
    assert [(shape.case_id, shape.patient_id) for shape in shapes] == [("a", "patient a"), ("d", "patient d")]
    assert [volume_mm3(shape) for shape in shapes] == pytest.approx([4 * 8, 16 * 8])
    assert library.counts == (1, 1)
    with pytest.raises(InputError, match=r"e/case.json: cannot be read as JSON .* prepare it again"):
        open_library(table, read_cases(table), allow_shared_patients=True)


def test_a_patient_in_two_cases_is_known_by_both(tmp_path, write_nodules):
    table = cohort(tmp_path, write_nodules, a="discovery", b="discovery", c="test")
    rows = read_cases(table)
    rows.loc[rows["case_id"].isin(["b", "c"]), "patient_id"] = "twice"
    rows.loc[rows["case_id"] == "c", "status"] = "excluded"
    assert [donor.case_id for donor in open_library(table, rows, allow_shared_patients=False).donors] == ["a"]
    assert [donor.case_id for donor in open_library(table, rows, allow_shared_patients=True).donors] == ["a", "b"]


def test_the_library_without_a_nodule_and_without_files(tmp_path, write_nodules):
    table = cohort(tmp_path, write_nodules, a="discovery", b="test")
    rows = read_cases(table)
    before = open_library(table, rows, allow_shared_patients=False)
    (tmp_path / "a" / "nodules.nii.gz").unlink()
    assert open_library(table, rows, allow_shared_patients=False).fingerprint == before.fingerprint, (
        "shapes are read late"
    )
    with pytest.raises(InputError, match=r"nodules.nii.gz: does not exist"):
        before.donors[0].shape()
    rows["n_nodules"] = 0
    with pytest.raises(InputError, match="no nodule in the lungs of its 1 discovery cases"):
        open_library(table, rows, allow_shared_patients=False)


def test_the_library_is_known_by_what_it_holds(tmp_path, write_nodules):
    first = cohort(tmp_path / "1", write_nodules, a="discovery", b="discovery", c="reference")
    other = cohort(tmp_path / "2", write_nodules, a="discovery", b="reference", c="discovery")
    again = cohort(tmp_path / "3", write_nodules, a="discovery", b="discovery", c="reference")
    prints = [open_library(t, read_cases(t), False).fingerprint for t in (first, other, again)]
    assert prints[0] == prints[2] != prints[1]


def test_shapes_keep_number_and_place(tmp_path):
    numbers = np.zeros((9, 8, 7), np.uint8)
    numbers[1:3, 1:3, 1:3], numbers[5:8, 4, 2:6] = 1, 3
    affine = np.diag([0.7, 0.7, 2.5, 1])
    affine[:3, 3] = -100, 20, 30
    write_volume(tmp_path / "nodules.nii.gz", Volume(numbers, affine))
    first, third = read_shapes(CaseFolder(tmp_path), "case", "patient")
    assert (first.number, third.number, third.ratings) == (1, 3, {})
    figures = [{}, {}, {"texture": 4.0, "malignancy": None, "sphericity": 3.0}]
    write_json(CaseFolder(tmp_path).record, {"qc": {"nodules": figures}})
    assert [shape.ratings for shape in read_shapes(CaseFolder(tmp_path), "case", "patient")] == [{}, {"texture": 4.0}]
    assert third.mask.shape == (3, 1, 4)
    np.testing.assert_allclose(third.centre_mm, [-100 + 6 * 0.7, 20 + 4 * 0.7, 30 + 3.5 * 2.5], atol=1e-4)
