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
    RatedNodule,
    find_candidates,
    lesion_measures,
    nodules_of_case,
    nodules_of_sample,
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


AFFINE = np.array([[4.0, 0, 0, -40], [0, 4, 0, 10], [0, 0, 5, 100], [0, 0, 0, 1]])
UNRATED = {"texture": None, "malignancy": None, "subtlety": None}


def position(voxel):
    return tuple(float(x) for x in (AFFINE @ [*voxel, 1])[:3])


def rated(voxel, texture, volume_mm3=30.0):
    return RatedNodule(position(voxel), volume_mm3, UNRATED | {"texture": texture})


def cubes(*centres):
    """Cubes of 3 voxels an edge around these voxels."""
    mask = np.zeros((20, 20, 20), bool)
    for x, y, z in centres:
        mask[x - 1 : x + 2, y - 1 : y + 2, z - 1 : z + 2] = True
    return Volume(mask, AFFINE)


def test_each_lesion_has_the_ratings_of_the_nodule_in_it():
    reference = cubes((15, 5, 5), (4, 12, 12), (10, 10, 4), (4, 4, 16))
    nodules = [
        rated((4, 12, 12), 1.0),
        # In the corner of a cube, and just outside one.
        rated((16, 6, 6), 5.0),
        rated((10, 10, 5.9), 3.0),
        # Of no lesion: it vanished on the grid.
        rated((17, 17, 17), 4.0),
    ]
    textures = [ratings["texture"] for ratings in ratings_of(reference, nodules)]
    assert sorted(textures, key=str) == [1.0, 3.0, 5.0, None]
    # In the order of the lesions: cut one away, and its overlap falls.
    without = reference.array.copy()
    without[3:6, 11:14, 11:14] = False
    overlaps = [lesion.overlap for lesion in lesion_measures(reference.array, without, (4, 4, 5)).lesions]
    assert [texture for texture, overlap in zip(textures, overlaps, strict=True) if not overlap] == [1.0]


def test_nodules_that_grew_together_have_the_ratings_of_the_largest():
    reference = cubes((5, 5, 5), (8, 5, 5), (15, 15, 15))
    small, large = rated((5, 5, 5), 1.0), rated((8, 5, 5), 4.5, volume_mm3=31.0)
    for nodules in ([small, large], [large, small]):
        assert sorted((each["texture"] for each in ratings_of(reference, nodules)), key=str) == [4.5, None]
    unrated = rated((8, 5, 5), None, volume_mm3=31.0)
    assert [each["texture"] for each in ratings_of(reference, [small, unrated])] == [None, None]
    assert ratings_of(cubes(), [small]) == []


def figures(voxel, texture):
    """Of one nodule, as `case.json` has them."""
    centroid = {f"centroid_{axis}_mm": value for axis, value in zip("xyz", position(voxel), strict=True)}
    return {"volume_mm3": 30.0, "texture": texture, "malignancy": 2.0, "subtlety": None, "margin": 5.0} | centroid


def test_a_real_case_has_the_nodules_of_its_record():
    (nodule,) = nodules_of_case([figures((5, 6, 7), 1.5)])
    assert nodule == RatedNodule(position((5, 6, 7)), 30.0, {"texture": 1.5, "malignancy": 2.0, "subtlety": None})
    assert nodules_of_case([]) == []


@pytest.mark.parametrize(
    ("origin", "own_layout", "textures"),
    [
        ("reference", True, [1.0, 5.0]),
        ("added", False, [1.0, 5.0, 3.0, None]),
        ("jittered", False, [3.0, None]),
        ("placed", False, [3.0, None]),
        (None, False, [3.0, None]),
    ],
)
def test_a_sample_has_the_nodules_of_its_reference_and_those_that_were_placed(origin, own_layout, textures):
    placed = {"position_mm": list(position((12, 12, 12))), "volume_mm3": 20.0, "ratings": {"texture": 3.0}}
    unrated = {"position_mm": list(position((1, 1, 1))), "volume_mm3": 10.0, "ratings": {}}
    record = {"layout_origin": origin, "nodules": [] if origin == "reference" else [placed, unrated]}
    reference = [figures((5, 5, 5), 1.0), figures((5, 15, 5), 5.0)]
    found = nodules_of_sample(record, reference, own_layout=own_layout)
    assert [nodule.ratings["texture"] for nodule in found] == textures
    if origin != "reference":
        assert found[-2] == RatedNodule(position((12, 12, 12)), 20.0, UNRATED | {"texture": 3.0})


@pytest.mark.parametrize(
    ("rating", "expected"),
    [
        (1, "ground glass"),
        (2, "ground glass"),
        (2.5, "part-solid"),
        (3.5, "part-solid"),
        (4, "solid"),
        (math.nan, ""),
        (None, ""),
    ],
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
