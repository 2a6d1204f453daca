"""Nodules from contours: analytic cases, and pylidc 0.2.3 as oracle on two scans of the release where they are."""

import nibabel
import numpy as np
import pandas as pd
import pytest

from lungddpm.config import Layouts
from lungddpm.layouts import nodules
from lungddpm.sources import Annotation, Contour, Scan, index_source, lidc
from lungddpm.volume import Volume

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
    (nodule,) = nodules.find_nodules(scan_of(first, second, other), Layouts(consensus=1.0))
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


def test_characteristics_are_medians():
    nodule = nodules.consensus([drawn(0, malignancy=1), drawn(1, malignancy=4), drawn(2, malignancy=5, texture=2)], 0.5)
    assert nodule.characteristics == {"malignancy": 4.0, "texture": 2.0}


def test_fewer_readers_than_asked_for_and_empty_consensus_are_left_out():
    pair = [drawn(0, slices=(3,)), drawn(1, slices=(4,))]
    assert nodules.find_nodules(scan_of(*pair), Layouts(consensus=1.0)) == []
    assert len(nodules.find_nodules(scan_of(*pair), Layouts(consensus=0.5))) == 1
    assert nodules.find_nodules(scan_of(*pair), Layouts(consensus=0.5, minimum_readers=3)) == []
    assert nodules.find_nodules(scan_of(), Layouts()) == []


def test_labels_give_components_that_touch_at_corners_as_one():
    labels = np.zeros((40, 40, 20), np.uint8)
    labels[:20] = 1
    labels[3:5, 3:5, 3] = labels[5, 5, 4] = 2
    labels[10, 10, 1] = 2
    labels[30, 30, 10] = 3
    found = nodules.find_nodules(scan_of(labels=labels), Layouts(minimum_readers=3))
    assert [(nodule.corner, nodule.voxels, nodule.readers) for nodule in found] == [
        ((10, 10, 1), 1, 1),
        ((3, 3, 3), 5, 1),
    ]
    painted = np.zeros_like(labels)
    for nodule in found:
        nodule.paste(painted, 2)
    np.testing.assert_array_equal(painted, np.where(labels == 2, 2, 0))


@pytest.fixture(scope="module")
def real_scans(shared_data):
    index = pd.DataFrame(index_source("lidc", shared_data / "lidc"))
    return {case["case_id"]: lidc.load_scan(shared_data / "lidc", case) for _, case in index.iterrows()}


@pytest.mark.parametrize("patient", ["LIDC-IDRI-0001", "LIDC-IDRI-0003"])
@pytest.mark.parametrize("level", [0.25, 0.5, 0.75, 1.0])
def test_equals_the_oracle_voxel_for_voxel(real_scans, shared_data, patient, level):
    oracle = shared_data / "lidc-oracle"
    found = nodules.find_nodules(real_scans[patient], Layouts(consensus=level))
    painted = np.zeros(real_scans[patient].ct.shape, bool)
    for nodule in found:
        nodule.paste(painted)
    expected = np.asarray(nibabel.load(oracle / f"{patient}_consensus{level * 100:03.0f}.nii.gz").dataobj) > 0
    assert np.array_equal(painted, expected)
    rows = pd.read_csv(oracle / "oracle.csv")
    rows = rows[(rows["patient"] == patient) & (rows["level"] == str(level))]
    assert sorted((nodule.voxels, nodule.readers) for nodule in found) == sorted(
        zip(rows["voxels"], rows["n_ann"], strict=True)
    )


@pytest.mark.parametrize("patient", ["LIDC-IDRI-0001", "LIDC-IDRI-0003"])
def test_every_annotation_equals_the_oracle(real_scans, shared_data, patient):
    rows = pd.read_csv(shared_data / "lidc-oracle" / "oracle.csv")
    rows = rows[(rows["patient"] == patient) & rows["level"].str.startswith("ann")]
    masks = [nodules.annotation_mask(annotation)[1] for annotation in real_scans[patient].annotations]
    assert sorted(int(mask.sum()) for mask in masks) == sorted(rows["voxels"])
