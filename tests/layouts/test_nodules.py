"""Nodules from contours: analytic cases, and pylidc 0.2.3 as oracle on two scans of the release where they are."""

import ast
import itertools
from collections import Counter
from dataclasses import replace

import nibabel
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lungddpm.config.models import Layouts
from lungddpm.core.errors import ExcludedCaseError
from lungddpm.core.volume import Volume
from lungddpm.layouts import nodules
from lungddpm.sources import Annotation, Contour, Scan, lidc
from lungddpm.sources.index import index_source

AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])


def ring(low, high, shift=0):
    """The closed square contour from pixel `low` to pixel `high`, every pixel listed, moved by `shift` columns."""
    side = np.arange(low, high)
    top, right = np.c_[side, np.full_like(side, low)], np.c_[np.full_like(side, high), side]
    return np.add(np.r_[top, right, (low + high) - top, (low + high) - right], [shift, 0])


def drawn(reader=0, low=2, high=8, slices=(3,), shift=0, **characteristics):
    contours = tuple(Contour(k, ring(low, high, shift)) for k in slices)
    return Annotation(reader, contours, characteristics)


def scan_of(*annotations, labels=None):
    ct = Volume(np.zeros((40, 40, 20), np.int16), AFFINE)
    return Scan(ct, tuple(annotations), labels)


def readers_of(clusters):
    return [[annotation.reader for annotation in cluster] for cluster in clusters]


def test_contour_is_the_first_voxel_outside():
    mask = nodules.contour_mask(ring(2, 8), (12, 12))
    expected = np.zeros((12, 12), bool)
    expected[3:8, 3:8] = True
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("points", [ring(2, 8)[:-1], ring(2, 8)[::-1], ring(2, 8)[::6]])
def test_open_reversed_and_gappy_contours_enclose_the_same(points):
    np.testing.assert_array_equal(nodules.contour_mask(points, (12, 12)), nodules.contour_mask(ring(2, 8), (12, 12)))


def test_columns_come_before_rows():
    points = np.array([(1, 1), (6, 1), (6, 3), (1, 3)])
    assert np.argwhere(nodules.contour_mask(points, (9, 5))).tolist() == [[column, 2] for column in range(2, 6)]


def test_self_touching_contour_follows_the_even_odd_rule():
    # The pen runs round the outer square, along a bridge, round the inner square, and back: the hole stays a hole.
    points = np.r_[ring(0, 10), [[0, 0]], ring(3, 7), [[3, 3]], [[0, 0]]]
    mask = nodules.contour_mask(points, (11, 11))
    assert not mask[4:7, 4:7].any()
    assert mask[5, 1]
    assert mask[8, 8]


@pytest.mark.parametrize("points", [[(4, 4)], [(4, 4), (5, 4)], [(4, 4), (5, 4), (6, 4), (5, 4)]])
def test_contours_without_interior_are_empty(points):
    assert not nodules.contour_mask(np.array(points), (9, 9)).any()


def test_excluded_region_is_cut_out_with_its_edge():
    annotation = Annotation(
        0, (Contour(3, ring(4, 6), inclusion=False), Contour(3, ring(2, 8)), Contour(4, ring(2, 8)))
    )
    corner, mask = nodules.annotation_mask(annotation)
    assert corner.tolist() == [2, 2, 3]
    expected = np.zeros((7, 7), bool)
    expected[1:6, 1:6] = True
    np.testing.assert_array_equal(mask[:, :, 1], expected)
    expected[2:5, 2:5] = False
    np.testing.assert_array_equal(mask[:, :, 0], expected)


def test_several_contours_on_a_slice_are_joined():
    # The second contour's edge runs through the first one's interior: it must not take voxels away.
    annotation = Annotation(0, (Contour(3, ring(2, 8)), Contour(3, ring(2, 8, shift=4))))
    _, mask = nodules.annotation_mask(annotation)
    assert mask[1:10, 1:6, 0].sum() == 45
    assert mask.sum() == 45


@pytest.mark.parametrize(("gap", "clusters"), [(2, 1), (3, 2)])
def test_linkage_is_the_smallest_distance_up_to_a_slice_thickness(gap, clusters):
    pair = [drawn(0), drawn(1, shift=6 + gap)]
    assert len(nodules.cluster_annotations(pair, AFFINE)) == clusters
    assert len(nodules.cluster_annotations(pair, AFFINE, slice_thickness_mm=3.0)) == 1


def test_distance_is_measured_in_mm_across_slices():
    pair = [drawn(0, slices=(3,)), drawn(1, slices=(5,))]
    assert len(nodules.cluster_annotations(pair, AFFINE, 2.5)) == 2
    assert len(nodules.cluster_annotations(pair, AFFINE, 4.0)) == 1


def test_single_linkage_chains():
    chain = [drawn(reader, shift=8 * reader) for reader in range(3)]
    assert readers_of(nodules.cluster_annotations(chain, AFFINE)) == [[0, 1, 2]]


def test_tolerance_shrinks_until_no_reader_is_repeated():
    near = [drawn(reader) for reader in range(4)]
    neighbour = drawn(0, shift=7)
    clusters = nodules.cluster_annotations([neighbour, *near], AFFINE)
    assert readers_of(clusters) == [[0], [0, 1, 2, 3]]
    assert clusters[0] == [neighbour]


def test_tolerance_of_other_clusters_does_not_shrink():
    far = [drawn(1, shift=20), drawn(2, shift=28)]
    clusters = nodules.cluster_annotations([drawn(0), drawn(0, shift=7), *far], AFFINE)
    assert readers_of(clusters) == [[0], [0], [1, 2]]


def test_repeated_reader_who_touches_is_united_and_flagged():
    first, second, other = drawn(0, slices=(3,), m=2), drawn(0, slices=(3,), shift=6, m=5), drawn(1, high=14, m=4)
    (nodule,), _ = nodules.find_nodules(scan_of(first, second, other), Layouts(consensus=1.0))
    assert (nodule.readers, nodule.flagged, nodule.characteristics) == (2, True, {"m": 4.0})
    assert nodule.voxels == 2 * 25


@pytest.mark.parametrize(("level", "edge"), [(0.25, 11), (0.5, 9), (0.51, 7), (0.75, 7), (1.0, 5)])
def test_consensus_counts_shares_of_the_readers_who_drew(level, edge):
    cluster = [drawn(reader, 10 - half, 10 + half) for reader, half in enumerate((6, 5, 4, 3))]
    nodule = nodules.consensus(cluster, level)
    assert nodule.mask.shape == (edge, edge, 1)
    assert nodule.voxels == edge**2
    assert nodule.corner == (10 - edge // 2, 10 - edge // 2, 3)
    assert nodules.consensus(cluster[:1], level).voxels == 11**2


def test_consensus_of_thirds_is_free_of_rounding():
    cluster = [drawn(0, 4, 16), drawn(1, 6, 14), drawn(2, 7, 13)]
    assert nodules.consensus(cluster, 1 / 3).voxels == 11**2
    assert nodules.consensus(cluster, 2 / 3).voxels == 7**2


def expectation_maximization(masks):
    """STAPLE as Warfield et al. (2004) write it: (probability, sensitivities, specificities)."""
    masks = masks.astype(float)
    prior, p, q = masks.mean(), np.full(len(masks), 0.99), np.full(len(masks), 0.99)
    for _ in range(500):
        nodule, other = prior, 1 - prior
        for mask, sensitivity, specificity in zip(masks, p, q, strict=True):
            nodule = nodule * np.where(mask, sensitivity, 1 - sensitivity)
            other = other * np.where(mask, 1 - specificity, specificity)
        probability = nodule / (nodule + other)
        p = np.array([(probability * mask).sum() for mask in masks]) / probability.sum()
        q = np.array([((1 - probability) * (1 - mask)).sum() for mask in masks]) / (1 - probability).sum()
    return probability, p, q


def test_staple_finds_how_reliable_readers_are():
    """Readers who miss and add voxels by chance at known rates, of a ball: their masks and what EM makes of them."""
    rng = np.random.default_rng(5)
    truth = np.square(np.indices((14, 14, 14)) - 6.5).sum(axis=0) < 36
    rates = ((0.95, 0.97), (0.9, 0.95), (0.6, 0.9), (0.55, 0.85))
    masks = np.stack([np.where(truth, rng.random(truth.shape) < p, rng.random(truth.shape) > q) for p, q in rates])
    found = nodules.staple(masks)
    probability, p, _ = expectation_maximization(np.pad(masks, [(0, 0)] + [(1, 1)] * 3))
    np.testing.assert_allclose(found, probability[1:-1, 1:-1, 1:-1], atol=1e-6)
    np.testing.assert_allclose(p, [rate for rate, _ in rates], atol=0.03)
    by_vote = masks.mean(axis=0) >= 0.5
    assert np.count_nonzero((found >= 0.5) != truth) < 0.8 * np.count_nonzero(by_vote != truth)


def test_staple_of_readers_who_agree_is_what_they_drew():
    cluster = [drawn(reader) for reader in range(3)]
    by_vote, by_staple = (nodules.consensus(cluster, 0.5, by) for by in ("vote", "staple"))
    assert np.array_equal(by_staple.mask, by_vote.mask)
    assert by_staple.corner == by_vote.corner
    single = nodules.consensus([drawn(0)], 0.5, "staple")
    assert np.array_equal(single.mask, by_vote.mask)
    dot = nodules.consensus([drawn(0, 8, 10), drawn(1, 8, 10)], 0.5, "staple")
    assert dot.voxels == 1


def test_staple_is_chosen_in_the_config():
    """Two readers drew 7 x 7 pixels, a third 9 x 9: one of three has drawn the rim, but he is alone with it."""
    scan = scan_of(drawn(0, 6, 14), drawn(1, 6, 14), drawn(2, 5, 15))
    masks = np.ones((3, 9, 9, 1), bool)
    masks[:2] = np.pad(np.ones((1, 7, 7, 1), bool), [(0, 0), (1, 1), (1, 1), (0, 0)])
    probability, _, _ = expectation_maximization(np.pad(masks, [(0, 0)] + [(1, 1)] * 3))
    (by_vote,), _ = nodules.find_nodules(scan, Layouts(consensus=1 / 3))
    (by_staple,), _ = nodules.find_nodules(scan, Layouts(consensus=1 / 3, consensus_by="staple"))
    assert by_vote.voxels == 9**2
    assert by_staple.voxels == np.count_nonzero(probability >= 1 / 3) == 7**2


def test_characteristics_are_medians():
    nodule = nodules.consensus([drawn(0, malignancy=1), drawn(1, malignancy=4), drawn(2, malignancy=5, texture=2)], 0.5)
    assert nodule.characteristics == {"malignancy": 4.0, "texture": 2.0}


def test_fewer_readers_than_asked_for_and_empty_consensus_are_left_out():
    pair = [drawn(0, slices=(3,)), drawn(1, slices=(4,))]
    note = "1 nodule has no voxel at layouts.consensus 1 and was left out"
    assert nodules.find_nodules(scan_of(*pair), Layouts(consensus=1.0)) == ([], (note,))
    found, notes = nodules.find_nodules(scan_of(*pair), Layouts(consensus=0.5))
    assert (len(found), notes) == (1, ())
    # What the user asks for needs no note.
    for level in (0.5, 1.0):
        assert nodules.find_nodules(scan_of(*pair), Layouts(consensus=level, minimum_readers=3)) == ([], ())
    assert nodules.find_nodules(scan_of(), Layouts()) == ([], ())


def test_nodules_without_a_consensus_are_counted():
    """STAPLE trusts neither of two readers who share no voxel."""
    pairs = [drawn(reader, slices=(3 + reader,), shift=shift) for shift in (0, 20) for reader in (0, 1)]
    found, notes = nodules.find_nodules(scan_of(*pairs), Layouts(consensus_by="staple"))
    assert found == []
    assert notes == ("2 nodules have no voxel at layouts.consensus 0.5 and were left out",)


def test_labels_give_components_that_touch_at_corners_as_one():
    labels = np.zeros((40, 40, 20), np.uint8)
    labels[:20] = 1
    labels[3:5, 3:5, 3] = labels[5, 5, 4] = 2
    labels[10, 10, 1] = 2
    labels[30, 30, 10] = 3
    found, _ = nodules.find_nodules(scan_of(labels=labels), Layouts(minimum_readers=3))
    assert [(nodule.corner, nodule.voxels, nodule.readers) for nodule in found] == [
        ((10, 10, 1), 1, 1),
        ((3, 3, 3), 5, 1),
    ]
    painted = np.zeros_like(labels)
    for nodule in found:
        nodule.paste(painted, 2)
    np.testing.assert_array_equal(painted, np.where(labels == 2, 2, 0))


def test_nodules_run_from_feet_to_head_whichever_way_the_slices_do():
    labels = np.zeros((40, 40, 20), np.uint8)
    labels[5, 5, 4] = labels[30:33, 5, 9] = labels[5:7, 30, 15] = 2
    upright = Scan(Volume(np.zeros(labels.shape, np.int16), AFFINE), labels=labels)
    turn = np.diag([1.0, 1, -1, 1])
    turn[2, 3] = labels.shape[2] - 1
    turned = Scan(Volume(upright.ct.array, AFFINE @ turn), labels=labels[:, :, ::-1])
    assert [[n.voxels for n in nodules.find_nodules(scan, Layouts())[0]] for scan in (upright, turned)] == [
        [1, 3, 2]
    ] * 2


def test_numbers_of_nodules_show_the_smaller_one_on_top():
    large, small = (
        nodules.Nodule((2, 2, 2), np.ones((5, 5, 5), bool)),
        nodules.Nodule((6, 6, 6), np.ones((2, 2, 2), bool)),
    )
    for order in ([large, small], [small, large]):
        numbers = nodules.number_voxels(order, (10, 10, 10))
        assert np.bincount(numbers.ravel()).tolist()[1:] == [n.voxels - (n is large) for n in order]
        assert numbers[6, 6, 6] == order.index(small) + 1


def test_more_nodules_than_can_be_numbered_are_reported():
    specks = [nodules.Nodule((i, 0, 0), np.ones((1, 1, 1), bool)) for i in range(256)]
    assert nodules.number_voxels(specks[:255], (256, 1, 1))[254] == 255
    with pytest.raises(ExcludedCaseError, match="there are 256, but at most 255"):
        nodules.number_voxels(specks, (256, 1, 1))


# ---------------------------------------------------------------- untidy contours


def closed(points):
    return np.r_[points, points[:1]]


STEPS = np.arange(6)
BOW_TIE = np.r_[
    np.c_[STEPS, STEPS], [(5, y) for y in (4, 3, 2, 1)], np.c_[5 - STEPS, STEPS], [(0, y) for y in (4, 3, 2, 1)]
]
"""Its diagonals cross between pixels: no point is listed twice."""
UNTIDY = {
    "tidy": (closed(ring(2, 8)), []),
    "last point beside the first": (ring(2, 8), []),
    "open": (ring(2, 8)[:-2], ["open contours"]),
    "gap": (closed(ring(2, 8)[np.arange(24) != 3]), ["contours with gaps over 1 px"]),
    "touching": (closed(np.r_[ring(0, 4), [(1, 1), (2, 2), (1, 1)]]), ["contours that touch or cross themselves"]),
    "crossing": (closed(BOW_TIE), ["contours that touch or cross themselves"]),
    "one point": (np.array([(4, 4)]), ["contours with an empty interior", "contours of at most two points"]),
    "two points": (
        np.array([(4, 4), (5, 4), (4, 4)]), ["contours with an empty interior", "contours of at most two points"],
    ),
    "a line": (
        closed(np.array([(4, 4), (5, 4), (6, 4), (5, 4)])),
        ["contours with an empty interior", "contours that touch or cross themselves"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("points", "errors"), UNTIDY.values(), ids=UNTIDY)
def test_untidy_contours_are_noted(points, errors):
    annotation = Annotation(0, (Contour(3, points), Contour(4, ring(2, 8))))
    assert nodules.untidy_contours([annotation]) == dict.fromkeys(errors, 1)
    assert nodules.untidy_contours([annotation, annotation, annotation]) == {
        **dict.fromkeys(errors, 3),
        "readers who drew it more than once": 1,
    }


def test_several_outlines_on_a_slice_are_noted_unless_they_are_cut_out():
    two = Annotation(0, (Contour(3, ring(2, 8)), Contour(3, ring(9, 12)), Contour(4, ring(2, 8))))
    cut = Annotation(1, (Contour(3, ring(2, 8)), Contour(3, ring(4, 6), inclusion=False)))
    assert nodules.untidy_contours([two, cut]) == {"slices with several outlines by one reader": 1}
    assert nodules.consensus([two, cut], 0.5).untidy == {"slices with several outlines by one reader": 1}


KNOWN_UNTIDY = {
    # Counted by hand: repeated points, steps and ends more than a pixel apart, an outline around no pixel.
    "lidc-xml/157-161.xml": {"open contours": 1, "contours with gaps over 1 px": 1, "touch": 1},
    "lidc-xml/188-011.xml": {},
    "lidc-xml/188-264.xml": {},
    "lidc-xml/188-283.xml": {"contours with an empty interior": 1},
    "lidc-xml/189-110.xml": {},
    "lidc-xml/189-173.xml": {"touch": 3},
    "lidc/*/*/*/069.xml": {"contours with gaps over 1 px": 2, "touch": 3},
    "lidc/*/*/*/072.xml": {"contours with gaps over 1 px": 1, "touch": 1},
}
"""The whole release has 76 open contours, 417 gapped, 65 of at most two points, 212 empty: less than one a series."""


@pytest.mark.parametrize("pattern", KNOWN_UNTIDY)
def test_untidy_contours_of_real_readers(shared_data, pattern):
    (path,) = shared_data.glob(pattern)
    cluster = [
        Annotation(number, tuple(Contour(round(o.z_mm * 100), np.array(o.points), o.inclusion) for o in mark.outlines))
        for number, mark in enumerate(lidc.read_xml(path).marks)
    ]
    found = nodules.untidy_contours(cluster)
    # Contours that cross between pixels repeat no point.
    assert found.pop("contours that touch or cross themselves", 0) >= KNOWN_UNTIDY[pattern].get("touch", 0)
    assert found == {error: n for error, n in KNOWN_UNTIDY[pattern].items() if error != "touch"}


# ---------------------------------------------------------------- what holds for any readers


@st.composite
def clusters(draw):
    """Up to five annotations by up to four readers: convex and notched polygons near each other."""
    polygon = st.lists(st.tuples(st.integers(2, 14), st.integers(2, 14)), min_size=1, max_size=7)
    contour = st.builds(
        lambda k, points, inclusion: Contour(k, np.array(points), inclusion),
        st.integers(3, 5), polygon, st.sampled_from([True, True, True, False]),
    )  # fmt: skip
    annotation = st.builds(
        lambda reader, contours, rating: Annotation(reader, tuple(contours), {"malignancy": rating}),
        st.integers(0, 3), st.lists(contour, min_size=1, max_size=4), st.integers(1, 5),
    )  # fmt: skip
    return draw(st.lists(annotation, min_size=1, max_size=5))


def voxels_of(cluster, level):
    nodule = nodules.consensus(cluster, level)
    painted = np.zeros((24, 24, 12), bool)
    if nodule is not None:
        nodule.paste(painted)
    return painted


def voxels_of_reader(cluster, reader):
    return np.any([voxels_of([annotation], 1.0) for annotation in cluster if annotation.reader == reader], axis=0)


quick = settings(derandomize=True, max_examples=60, deadline=None)
LEVELS = (0.01, 0.25, 1 / 3, 0.5, 2 / 3, 0.75, 1.0)


@quick
@given(clusters())
def test_consensus_shrinks_with_the_level_from_union_to_intersection(cluster):
    by_level = [voxels_of(cluster, level) for level in LEVELS]
    for lower, higher in itertools.pairwise(by_level):
        assert not (higher & ~lower).any()
    drawn = [voxels_of_reader(cluster, reader) for reader in {annotation.reader for annotation in cluster}]
    np.testing.assert_array_equal(by_level[0], np.any(drawn, axis=0))
    np.testing.assert_array_equal(by_level[-1], np.all(drawn, axis=0))
    np.testing.assert_array_equal(by_level[3], 2 * np.sum(drawn, axis=0) >= len(drawn))


@quick
@given(clusters(), st.sampled_from(LEVELS), st.randoms(use_true_random=False))
def test_consensus_does_not_depend_on_the_order_of_readers(cluster, level, random):
    shuffled = random.sample(cluster, len(cluster))
    one, other = nodules.consensus(cluster, level), nodules.consensus(shuffled, level)
    np.testing.assert_array_equal(voxels_of(cluster, level), voxels_of(shuffled, level))
    if one is not None:
        assert (one.corner, one.readers, one.flagged) == (other.corner, other.readers, other.flagged)
        assert (one.characteristics, one.untidy) == (other.characteristics, other.untidy)


@quick
@given(clusters(), st.sampled_from(LEVELS), st.tuples(st.integers(-2, 6), st.integers(-2, 6), st.integers(-3, 5)))
def test_consensus_moves_with_the_contours(cluster, level, shift):
    moved = [
        replace(
            annotation,
            contours=tuple(
                replace(contour, slice_index=contour.slice_index + shift[2], points=contour.points + shift[:2])
                for contour in annotation.contours
            ),
        )
        for annotation in cluster
    ]
    expected = np.roll(voxels_of(cluster, level), shift, axis=(0, 1, 2))
    np.testing.assert_array_equal(voxels_of(moved, level), expected)


@quick
@given(
    st.permutations(range(3)),
    st.tuples(*[st.booleans()] * 3),
    st.tuples(*[st.integers(0, 5)] * 3),
    st.tuples(*[st.integers(1, 4)] * 3),
)
def test_canonical_nodules_lie_where_the_canonical_scan_has_them(axes, flips, corner, size):
    affine = np.eye(4)
    affine[:3, :3] = np.diag([0.7, 0.8, 2.5])[:, axes] * np.where(flips, -1, 1)
    affine[:3, 3] = (-120, 40, 300)
    scan = Volume(np.zeros((9, 10, 11), np.int16), affine)
    mask = np.arange(np.prod(size)).reshape(size) % 3 != 1
    nodule = nodules.Nodule(corner, mask)
    painted = np.zeros(scan.shape, bool)
    nodule.paste(painted)
    turned = np.zeros(scan.canonical().shape, bool)
    nodule.canonical(scan).paste(turned)
    np.testing.assert_array_equal(turned, scan.like(painted).canonical().array)
    centres = [nodules.centroid_mm(nodule.volume_in(scan)), nodules.centroid_mm(scan.like(painted))]
    np.testing.assert_allclose(*centres)


# ---------------------------------------------------------------- the oracle


@pytest.fixture(scope="module")
def real_scans(shared_data):
    index = pd.DataFrame(index_source("lidc", shared_data / "lidc"))
    return {case["case_id"]: lidc.load_scan(shared_data / "lidc", case) for _, case in index.iterrows()}


@pytest.fixture(scope="module")
def oracle(shared_data):
    rows = pd.read_csv(shared_data / "lidc-oracle" / "oracle.csv")
    # Boxes are (row, column, slice) there.
    boxes = [tuple(slice(*edge) for edge in ast.literal_eval(text)) for text in rows["bbox_ijk"]]
    return rows.assign(box=[(columns, rows_, slices) for rows_, columns, slices in boxes])


def box_of(annotations):
    """The box around all contours of these annotations."""
    points = np.concatenate([nodules._contour_points(annotation) for annotation in annotations])
    return tuple(
        slice(int(low), int(high) + 1) for low, high in zip(points.min(axis=0), points.max(axis=0), strict=True)
    )


@pytest.mark.parametrize("patient", ["LIDC-IDRI-0001", "LIDC-IDRI-0003"])
@pytest.mark.parametrize("level", [0.25, 0.5, 0.75, 1.0])
def test_equals_the_oracle_voxel_for_voxel(real_scans, shared_data, oracle, patient, level):
    found, _ = nodules.find_nodules(real_scans[patient], Layouts(consensus=level))
    painted = np.zeros(real_scans[patient].ct.shape, bool)
    for nodule in found:
        nodule.paste(painted)
    path = shared_data / "lidc-oracle" / f"{patient}_consensus{level * 100:03.0f}.nii.gz"
    expected = np.asarray(nibabel.load(path).dataobj) > 0
    assert np.array_equal(painted, expected)
    rows = oracle[(oracle["patient"] == patient) & (oracle["level"] == str(level))]
    assert sorted((nodule.voxels, nodule.readers) for nodule in found) == sorted(
        zip(rows["voxels"], rows["n_ann"], strict=True)
    )


@pytest.mark.parametrize("patient", ["LIDC-IDRI-0001", "LIDC-IDRI-0003"])
def test_every_nodule_equals_the_oracle_at_every_level(real_scans, shared_data, oracle, patient):
    scan = real_scans[patient]
    clusters = nodules.cluster_annotations(scan.annotations, scan.ct.affine, scan.slice_thickness_mm)
    rows = oracle[(oracle["patient"] == patient) & ~oracle["level"].str.startswith("ann")]
    assert Counter(map(str, (box_of(cluster) for cluster in clusters for _ in range(4)))) == Counter(
        map(str, rows["box"])
    )
    for level, at_level in rows.groupby("level"):
        path = shared_data / "lidc-oracle" / f"{patient}_consensus{float(level) * 100:03.0f}.nii.gz"
        union = np.asarray(nibabel.load(path).dataobj) > 0
        for _, row in at_level.iterrows():
            (cluster,) = [cluster for cluster in clusters if box_of(cluster) == row["box"]]
            nodule = nodules.consensus(cluster, float(level))
            assert (nodule.voxels, nodule.readers) == (row["voxels"], row["n_ann"])
            assert nodule.voxels * scan.ct.voxel_mm3 == pytest.approx(row["volume_mm3"], rel=1e-4)
            painted = np.zeros(scan.ct.shape, bool)
            nodule.paste(painted)
            # The boxes of these two scans' nodules do not overlap: in its box the union is the nodule.
            np.testing.assert_array_equal(painted[row["box"]], union[row["box"]])
            assert np.count_nonzero(painted) == np.count_nonzero(union[row["box"]])


@pytest.mark.parametrize("patient", ["LIDC-IDRI-0001", "LIDC-IDRI-0003"])
def test_every_annotation_equals_the_oracle(real_scans, oracle, patient):
    rows = oracle[(oracle["patient"] == patient) & oracle["level"].str.startswith("ann")]
    annotations = real_scans[patient].annotations
    found = [
        (str(box_of([annotation])), int(nodules.annotation_mask(annotation)[1].sum())) for annotation in annotations
    ]
    assert sorted(found) == sorted(zip(map(str, rows["box"]), rows["voxels"], strict=True))
