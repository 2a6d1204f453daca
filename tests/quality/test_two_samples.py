"""Precision and recall on lines and spheres, and a classifier where its AUC is known in closed form."""

import math

import numpy as np
import pytest
from scipy.stats import norm

from lungddpm.quality.two_samples import classifier_auc, share_within

LINE = np.arange(5.0)[:, None]
"""Third nearest neighbour of 0, 1, 2, 3, 4: at 3, 2, 2, 2, 3."""


def names(count, start=0):
    return [f"patient-{number}" for number in range(start, start + count)]


@pytest.mark.parametrize(
    ("points", "share"),
    [([-3.0, 7.0], 1), ([-3.1, 7.1], 0), ([-3.0, -3.1, 2.5, 100], 0.5)],
)
def test_a_set_reaches_as_far_as_the_third_neighbours_of_its_members(points, share):
    assert share_within(np.array(points)[:, None], LINE, names(len(points), 5), names(5)) == share


def test_a_set_reaches_its_copy_and_nothing_of_a_set_far_away():
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(12, 512))
    assert share_within(centres, centres, names(12, 12), names(12)) == 1
    assert share_within(centres + 1e3, centres, names(12), names(12)) == 0


def test_the_own_patient_neither_covers_a_point_nor_is_a_neighbour():
    """The third other patient of 0, 1, 2, 3, 4 remains the third if each has a second image close by."""
    twice, of_twice = np.repeat(LINE, 2, axis=0), [each for each in names(5) for _ in range(2)]
    twice[1::2] += 1e-3
    assert share_within(np.array([[-2.9], [-3.1], [7.2]]), twice, names(3, 5), of_twice) == pytest.approx(1 / 3)
    # Only the centre at 0 reaches -2.5; it is of the point's own patient.
    point = np.array([[-2.5]])
    assert share_within(point, LINE, names(1, 5), names(5)) == 1
    assert share_within(point, LINE, names(1), names(5)) == 0


@pytest.mark.parametrize("alike", [0.0, 0.5, 0.95])
def test_samples_of_references_are_judged_like_unpaired_ones(alike):
    """A generator far off its references, and one that draws from their distribution: precision and recall of paired
    samples are those of as many independent patients, however near each sample is to its own reference."""
    rng = np.random.default_rng(8)

    def judge(draws, alike, shift):
        of_patient = math.sqrt(alike) * rng.normal(size=(12, 64))
        noise = [math.sqrt(1 - alike) * rng.normal(size=(n * 12, 64)) for n in (draws, 1)]
        made, real = np.repeat(of_patient, draws, axis=0) + noise[0] + shift / 8, of_patient + noise[1]
        of_made = [each for each in names(12) for _ in range(draws)]
        of_real = names(12) if alike else names(12, 12)
        return share_within(made, real, of_made, of_real), share_within(real, made, of_real, of_made)

    for shift in (0, 6):
        paired = np.mean([judge(4, alike, shift) for _ in range(40)], axis=0)
        independent = np.mean([judge(1, 0.0, shift) for _ in range(40)], axis=0)
        assert paired == pytest.approx(independent, abs=0.13)


def test_a_set_of_one_mode_has_precision_but_no_recall():
    """Real images are of two kinds, made ones of the first alone."""
    rng = np.random.default_rng(2)
    one, other = rng.normal(size=(60, 2)), rng.normal(100, 1, size=(60, 2))
    made = rng.normal(size=(60, 2))
    real = np.concatenate([one, other])
    assert share_within(made, real, names(60), names(120, 60)) > 0.9
    assert 0.4 < share_within(real, made, names(120, 60), names(60)) <= 0.5


def test_the_auc_of_gaussians_apart_is_that_of_the_best_line():
    """Two normal distributions, d apart along one axis: no classifier is right in more of the pairs."""
    rng = np.random.default_rng(3)
    made, real = rng.normal(size=(600, 2)), rng.normal(size=(600, 2))
    made[:, 0] += 1.0
    auc = classifier_auc(made, real, names(600), names(600, 600))
    of_mann_whitney = math.sqrt(1201 / 12 / 600 / 600)
    assert auc == pytest.approx(norm.cdf(1 / math.sqrt(2)), abs=3 * of_mann_whitney)


def test_equal_distributions_are_distinguished_by_chance_only():
    rng = np.random.default_rng(4)
    aucs = [
        classifier_auc(rng.normal(size=(20, 8)), rng.normal(size=(12, 8)), names(20), names(12, 20)) for _ in range(60)
    ]
    assert np.mean(aucs) == pytest.approx(0.5, abs=4 * np.std(aucs) / math.sqrt(len(aucs)))


def test_copies_cannot_be_distinguished_from_their_originals():
    real = np.random.default_rng(5).normal(size=(12, 512))
    auc = classifier_auc(np.repeat(real, 4, axis=0), real, [each for each in names(12) for _ in range(4)], names(12))
    assert auc == pytest.approx(0.5)


def test_what_a_classifier_memorised_does_not_help_it():
    """Each patient has a mark, which is the same in all their images: folds by image would find it."""
    rng = np.random.default_rng(6)
    marks = 5 * rng.normal(size=(20, 30))
    made = np.repeat(marks[:10], 6, axis=0) + 0.01 * rng.normal(size=(60, 30))
    real = np.repeat(marks[10:], 6, axis=0) + 0.01 * rng.normal(size=(60, 30))
    patients = [each for each in names(20) for _ in range(6)]
    auc = classifier_auc(made, real, patients[:60], patients[60:])
    assert 0.2 < auc < 0.8
    by_image = classifier_auc(made, real, names(60), names(60, 60))
    assert by_image > 0.99


def test_sets_that_differ_are_distinguished_and_single_patients_are_not_judged():
    rng = np.random.default_rng(7)
    made, real = rng.normal(3, 1, size=(8, 512)), rng.normal(size=(6, 512))
    assert classifier_auc(made, real, names(8), names(6, 8)) == 1
    assert math.isnan(classifier_auc(made, real, ["one"] * 8, names(6)))
