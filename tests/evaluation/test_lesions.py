"""Lesions, candidates and their scores on small volumes that can be counted by hand."""

import math

import numpy as np
import pytest
from scipy import ndimage

from lungddpm.core.volume import Volume
from lungddpm.evaluation.lesions import (
    CANDIDATE_PROBABILITY,
    SIZE_BINS,
    Candidate,
    Lesion,
    find_candidates,
    lesion_measures,
    ratings_of,
    texture_class,
)

SHAPE = (24, 5, 5)


def along_x(*spans, values=None):
    """A volume with bars of one voxel's thickness from start to end (exclusive), True or of the given values."""
    volume = np.zeros(SHAPE, bool if values is None else float)
    for number, (start, end) in enumerate(spans):
        volume[start:end, 2, 2] = True if values is None else values[number]
    return volume


def detect(lesions, probability):
    return lesion_measures(lesions, probability > 0.5, spacing_mm=(1, 1, 2), probability=probability)


def test_lesions_agree_with_scipy():
    rng = np.random.default_rng(0)
    reference, prediction = rng.random((9, 8, 7)) < 0.2, rng.random((9, 8, 7)) < 0.3
    detection = lesion_measures(reference, prediction, spacing_mm=(1, 1, 1))
    around = np.ones((3, 3, 3))
    labels, n_lesions = ndimage.label(reference, around)
    overlaps = ndimage.mean(prediction, labels, range(1, n_lesions + 1))
    assert sorted(lesion.overlap for lesion in detection.lesions) == pytest.approx(sorted(overlaps))
    components, n_components = ndimage.label(prediction, around)
    touching = ndimage.maximum(reference, components, range(1, n_components + 1))
    assert detection.n_false_positives == sum(not touch for touch in touching)


def test_spheres_are_measured_matched_and_binned():
    x, y, z = np.indices((60, 40, 40))
    large = (x - 15) ** 2 + (y - 20) ** 2 + (z - 20) ** 2 < 12**2
    small = (x - 45) ** 2 + (y - 20) ** 2 + (z - 20) ** 2 < 5**2
    prediction = np.zeros_like(large)
    prediction[15, 20, 20] = prediction[55, 5, 5] = True
    detection = lesion_measures(large | small, prediction, spacing_mm=(0.5, 0.5, 0.5))
    assert [lesion.diameter_mm for lesion in detection.lesions] == pytest.approx([12, 5], rel=0.03)
    assert [lesion.found for lesion in detection.lesions] == [True, False]
    assert [lesion.size_bin for lesion in detection.lesions] == [SIZE_BINS[2], SIZE_BINS[0]]
    assert detection.n_false_positives == 1


def test_lesions_have_axes():
    bars = along_x((2, 7)) | along_x((10, 12))
    bars[10:12, 3, 2] = True
    bar, plate = lesion_measures(bars, bars, spacing_mm=(0.8, 1.0, 2.0)).lesions
    assert (bar.long_axis_mm, bar.short_axis_mm) == pytest.approx((4.0, 1.0))
    # From the middle of a pixel's lower edge to that of the upper edge of its diagonal neighbour.
    assert plate.long_axis_mm == pytest.approx(math.hypot(0.8, 2.0))
    assert bar.elongation == pytest.approx(math.sqrt(2**2 / (5 * 0.8) ** 2))


def rated(centre_mm, volume_mm3=30.0, **ratings):
    centroid = {f"centroid_{axis}_mm": value for axis, value in zip("xyz", centre_mm, strict=True)}
    return {"volume_mm3": volume_mm3, "texture": None, "malignancy": None, "subtlety": None} | centroid | ratings


def test_lesions_have_the_ratings_of_their_nodules():
    """Two nodules that touch are one lesion and have the larger one's ratings; a third has none."""
    affine = np.diag([2.0, 1.0, 1.0, 1.0])
    affine[:3, 3] = -10, 5, 7
    reference = Volume(along_x((2, 9), (14, 16)), affine)
    small, large = rated((-4.2, 7, 9), 10.0, texture=1.0), rated((2, 7, 9), texture=4.5, malignancy=2.0, subtlety=3.0)
    for nodules in ([small, large], [large, small]):
        first, second = ratings_of(reference, nodules)
        assert first == {"texture": 4.5, "malignancy": 2.0, "subtlety": 3.0}
        assert set(second.values()) == {None}
    _, second = ratings_of(reference, [rated((19.3, 7.2, 8.8), malignancy=5.0)])
    assert second["malignancy"] == 5.0
    assert ratings_of(Volume(along_x(), affine), []) == []


@pytest.mark.parametrize(
    ("rating", "expected"),
    [(1, "ground glass"), (2, "ground glass"), (2.5, "part-solid"), (3.5, "part-solid"), (4, "solid"), (math.nan, "")],
)
def test_textures_by_their_rating(rating, expected):
    assert texture_class(rating) == expected


def test_voxels_that_touch_at_a_corner_are_one_lesion():
    reference = np.zeros((3, 3, 3), bool)
    reference[0, 0, 0] = reference[1, 1, 1] = True
    assert len(lesion_measures(reference, reference, spacing_mm=(1, 1, 1)).lesions) == 1


@pytest.mark.parametrize(("diameter_mm", "expected"), [(5.9, 0), (6.0, 1), (10.0, 1), (10.1, 2)])
def test_bin_limits(diameter_mm, expected):
    assert Lesion(diameter_mm, overlap=0.0).size_bin == SIZE_BINS[expected]


def test_a_lesion_hit_by_two_candidates_has_the_higher_score():
    detection = detect(along_x((4, 12)), along_x((3, 6), (8, 13), values=(0.3, 0.7)))
    assert [lesion.score for lesion in detection.lesions] == [0.7]
    assert detection.candidates == [Candidate(0.3, 6.0, (1,)), Candidate(0.7, 10.0, (1,))]


def test_one_candidate_that_hits_two_lesions_finds_both():
    detection = detect(along_x((2, 5), (8, 10), (20, 21)), along_x((4, 9), values=(0.6,)))
    assert [lesion.score for lesion in detection.lesions][:2] == [0.6, 0.6]
    assert math.isnan(detection.lesions[2].score)
    assert detection.candidates == [Candidate(0.6, 10.0, (1, 2))]


def test_a_candidate_too_faint_for_the_mask_still_has_a_score():
    detection = detect(along_x((2, 5)), along_x((2, 4), values=(0.2,)))
    assert (detection.lesions[0].found, detection.lesions[0].score) == (False, 0.2)


def test_the_score_is_the_highest_probability_of_a_region_above_the_threshold():
    probability = along_x((2, 3), (3, 4), (4, 5), (5, 6), values=(0.2, 0.9, CANDIDATE_PROBABILITY, 0.09))
    (candidate,) = find_candidates(np.zeros(SHAPE, int), probability, voxel_mm3=2.0)
    assert candidate == Candidate(0.9, 6.0, ())


def test_no_candidate_and_no_lesion():
    lesion, nothing = along_x((2, 5)), np.zeros(SHAPE)
    silent = detect(lesion, nothing)
    assert (silent.candidates, silent.n_false_positives) == ([], 0)
    assert math.isnan(silent.lesions[0].score)
    healthy = detect(lesion & False, along_x((2, 5), (9, 10), values=(0.8, 0.3)))
    assert healthy.lesions == []
    assert healthy.candidates == [Candidate(0.8, 6.0, ()), Candidate(0.3, 2.0, ())]
    assert healthy.n_false_positives == 1


def test_without_probabilities_nothing_has_a_score():
    detection = lesion_measures(along_x((2, 5)), along_x((2, 5)), spacing_mm=(1, 1, 1))
    assert detection.candidates is None
    assert math.isnan(detection.lesions[0].score)
