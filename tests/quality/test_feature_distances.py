"""FID, MMD and KID against closed forms, scipy's matrix root, double loops, MONAI, and simulated paired samples."""

import math

import numpy as np
import pytest
from scipy.linalg import sqrtm

from lungddpm.quality.feature_distances import (
    ImageSet,
    distances_of_sets,
    frechet_distance,
    kernel_distance,
    median_distance,
    squared_mmd,
)


def by_matrix_root(first, second):
    """The definition, for more samples than features."""
    covariances = [np.cov(x, rowvar=False) for x in (first, second)]
    mean_difference = first.mean(axis=0) - second.mean(axis=0)
    root = sqrtm(covariances[0] @ covariances[1]).real
    return mean_difference @ mean_difference + np.trace(covariances[0] + covariances[1] - 2 * root)


def sample_of(rng, count, features, shift=0.0):
    return shift + rng.normal(size=(count, features)) @ rng.normal(size=(features, features))


def with_moments(rng, mean, sd, count=200):
    """Vectors whose mean and (diagonal) covariance are exactly these."""
    draws = rng.normal(size=(count, len(mean)))
    independent, _ = np.linalg.qr(draws - draws.mean(axis=0))
    return independent * math.sqrt(count - 1) * np.array(sd) + np.array(mean)


def test_frechet_distance_of_two_gaussians_has_its_closed_form():
    rng = np.random.default_rng(1)
    first, second = with_moments(rng, [0, 1, 2], [1, 2, 3]), with_moments(rng, [1, 1, 4], [2, 2, 0.5])
    assert frechet_distance(first, second) == pytest.approx(1 + 4 + 1 + 0 + 2.5**2)


def test_frechet_distance_agrees_with_the_matrix_root():
    rng = np.random.default_rng(2)
    first, second = sample_of(rng, 60, 6), sample_of(rng, 40, 6, shift=0.5)
    assert frechet_distance(first, second) == pytest.approx(by_matrix_root(first, second), rel=1e-9)
    assert frechet_distance(second, first) == pytest.approx(frechet_distance(first, second), rel=1e-9)


def test_fewer_samples_than_features_change_nothing():
    """The same vectors, laid into a space of many more dimensions than there are samples."""
    rng = np.random.default_rng(3)
    first, second = sample_of(rng, 9, 3), sample_of(rng, 7, 3, shift=1)
    into_many, _ = np.linalg.qr(rng.normal(size=(500, 3)))
    embedded = frechet_distance(first @ into_many.T, second @ into_many.T)
    assert embedded == pytest.approx(by_matrix_root(first, second), rel=1e-9)


def test_equal_sets_are_at_distance_zero():
    features = np.random.default_rng(4).normal(size=(5, 512)) * 100
    assert frechet_distance(features, features[::-1]) == 0


def test_squared_mmd_equals_a_double_loop():
    rng = np.random.default_rng(5)
    first, second = rng.normal(size=(6, 4)), rng.normal(0.5, 1, size=(9, 4))

    def kernel(x, y):
        return math.exp(-sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / (2 * 1.7**2))

    within = [
        sum(kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j) / (len(x) * (len(x) - 1))
        for x in (first, second)
    ]
    across = sum(kernel(x, y) for x in first for y in second) / 54
    assert squared_mmd(first, second, 1.7, names(6), names(9, 6)) == pytest.approx(sum(within) - 2 * across)


def test_squared_mmd_is_unbiased():
    rng = np.random.default_rng(6)
    draws = [(rng.normal(size=(5, 3)), rng.normal(size=(5, 3))) for _ in range(4000)]
    found = [squared_mmd(*draw, 2.0, names(5), names(5, 5)) for draw in draws]
    assert np.mean(found) == pytest.approx(0, abs=4 * np.std(found) / math.sqrt(len(found)))
    assert min(found) < 0


def from_references(rng, count, draws, alike, scale=1.0):
    """References and several samples of each, of one distribution if `scale` is 1; the patient's own part of the
    features is `alike` of the variance and shared by all its images."""
    of_patient = math.sqrt(alike) * rng.normal(size=(count, 8))
    noise = [math.sqrt(1 - alike) * rng.normal(size=(n * count, 8)) for n in (draws, 1)]
    samples = scale * (np.repeat(of_patient, draws, axis=0) + noise[0])
    return samples, of_patient + noise[1], [each for each in names(count) for _ in range(draws)], names(count)


def expected_kid(scale):
    """Of normal vectors of 8 features, variances scale^2 and 1: E k = 1 + 3 E[(x y / 8)^2], by independence."""
    (of_samples, across, of_real) = (1 + 3 * a * a * b * b / 8 for a, b in ((scale, scale), (scale, 1), (1, 1)))
    return of_samples + of_real - 2 * across


def expected_mmd(scale, bandwidth):
    """Of the same: E exp(-d^2 / 2s^2) of a normal difference of variance v is (1 + v / s^2)^(-8 / 2)."""
    of_samples, across, of_real = ((1 + variance / bandwidth**2) ** -4 for variance in (2 * scale**2, scale**2 + 1, 2))
    return of_samples + of_real - 2 * across


@pytest.mark.parametrize(("alike", "scale"), [(0.95, 1.0), (0.95, 1.4), (0.5, 1.4)])
def test_samples_of_references_are_measured_without_bias(alike, scale):
    """Each sample is near its own reference, which is the pairing's doing and says nothing about the distributions."""
    rng = np.random.default_rng(14)
    draws = [from_references(rng, 12, 4, alike, scale) for _ in range(600)]
    kids, errors = np.array([kernel_distance(*draw) for draw in draws]).T
    mmds = [squared_mmd(*draw[:2], 4.0, *draw[2:]) for draw in draws]
    for found, truth in ((kids, expected_kid(scale)), (mmds, expected_mmd(scale, 4.0))):
        assert np.mean(found) == pytest.approx(truth, abs=4 * np.std(found) / math.sqrt(len(found)))
    # The jackknife is conservative, the more so where nothing differs.
    assert 0.95 < np.sqrt(np.mean(errors**2)) / kids.std() < 1.6


@pytest.mark.parametrize("draws", [1, 4])
def test_copies_of_the_references_are_at_distance_zero(draws):
    real = 30 * np.random.default_rng(9).normal(size=(5, 512))
    patients = [each for each in names(5) for _ in range(draws)]
    copies = np.repeat(real, draws, axis=0)
    assert squared_mmd(copies, real, 900.0, patients, names(5)) == 0
    assert kernel_distance(copies, real, patients, names(5)) == (0, 0)


def test_median_distance_of_three_points_on_a_line():
    assert median_distance(np.array([[0.0], [1.0], [5.0]])) == 4


def names(count, start=0):
    return [f"patient-{number}" for number in range(start, start + count)]


def image_set(features, start=0):
    return ImageSet(list(features), names(len(features), start))


def test_kid_of_three_numbers_by_hand():
    """k(x, y) = (x y + 1)^3 of {0, 1} and {1, 2}: within k(0, 1) = 1 and k(1, 2) = 27; across 1, 1, 8, 27."""
    kid, _ = kernel_distance(np.array([[0.0], [1.0]]), np.array([[1.0], [2.0]]), names(2), names(2, 2))
    assert kid == pytest.approx(1 + 27 - 2 * (1 + 1 + 8 + 27) / 4)


def test_kid_equals_that_of_the_kernels_own_features():
    """(x y / 2 + 1)^3 is the product of ten features; of these MONAI takes the unbiased squared MMD."""
    import torch
    from monai.metrics.mmd import compute_mmd

    rng = np.random.default_rng(10)
    first, second = rng.normal(size=(7, 2)), rng.normal(0.5, 1, size=(7, 2))

    def expanded(points):
        powers = [(a, b, 3 - a - b) for a in range(4) for b in range(4 - a)]
        weights = [math.sqrt(6 / math.prod(map(math.factorial, p)) / 2 ** (p[0] + p[1])) for p in powers]
        columns = [w * points[:, 0] ** a * points[:, 1] ** b for w, (a, b, _) in zip(weights, powers, strict=True)]
        return torch.from_numpy(np.stack(columns, axis=1))

    theirs = compute_mmd(expanded(first), expanded(second), None)
    assert kernel_distance(first, second, names(7), names(7, 7))[0] == pytest.approx(float(theirs))


def test_kid_is_unbiased_for_any_number_of_images():
    """Of two normal numbers with means 0 and 1, the kernel's expectations are known from moments up to the third."""
    rng = np.random.default_rng(11)
    moments = {mean: (mean, mean**2 + 1, mean**3 + 3 * mean) for mean in (0.0, 1.0)}

    def expected(one, other):
        return 1 + sum(c * a * b for c, a, b in zip((3, 3, 1), moments[one], moments[other], strict=True))

    truth = expected(0.0, 0.0) + expected(1.0, 1.0) - 2 * expected(0.0, 1.0)
    for sizes in ((3, 5), (12, 8)):
        draws = [[rng.normal(mean, 1, size=(n, 1)) for mean, n in zip((0, 1), sizes, strict=True)] for _ in range(3000)]
        found = [kernel_distance(*draw, names(sizes[0]), names(sizes[1], sizes[0]))[0] for draw in draws]
        assert np.mean(found) == pytest.approx(truth, abs=4 * np.std(found) / math.sqrt(len(found)))


def test_standard_error_of_kid_is_that_of_repeated_draws_of_patients():
    """Two images of each patient that are nearly the same: to count them as independent would be too sure."""
    rng = np.random.default_rng(12)

    def draw():
        first, second = rng.normal(size=(20, 3)), rng.normal(0.8, 1, size=(15, 3))
        twice = np.repeat(first, 2, axis=0) + 0.01 * rng.normal(size=(40, 3))
        return kernel_distance(twice, second, [each for each in names(20) for _ in range(2)], names(15, 20))

    values, errors = np.array([draw() for _ in range(150)]).T
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(values.std(), rel=0.3)


def test_standard_error_of_kid_leaves_out_each_patient_on_both_sides():
    rng = np.random.default_rng(13)
    first, second = rng.normal(size=(6, 4)), rng.normal(size=(4, 4))
    first_patients, second_patients = np.array([*"aabcdd"]), np.array([*"abee"])

    def by_pairs(left_out):
        """The definition, over pairs of images of different patients."""
        means = []
        for (x, of_x), (y, of_y) in (
            ((first, first_patients), (first, first_patients)),
            ((second, second_patients), (second, second_patients)),
            ((first, first_patients), (second, second_patients)),
        ):
            pairs = [
                (a @ b / 4 + 1) ** 3
                for a, p in zip(x, of_x, strict=True)
                for b, q in zip(y, of_y, strict=True)
                if p != q and left_out not in (p, q)
            ]
            means.append(np.mean(pairs))
        return means[0] + means[1] - 2 * means[2]

    left = [by_pairs(patient) for patient in "abcde"]
    kid, error = kernel_distance(first, second, list(first_patients), list(second_patients))
    assert kid == pytest.approx(by_pairs(None))
    assert error == pytest.approx(math.sqrt(4 / 5 * sum((value - np.mean(left)) ** 2 for value in left)))


def test_few_patients_have_no_kid_or_no_standard_error():
    first, second = np.random.default_rng(15).normal(size=(2, 4, 3))
    assert np.isnan(kernel_distance(first, second, ["a"] * 4, names(4))).all()
    kid, error = kernel_distance(first, second, [*"aabb"], [*"cdef"])
    assert not math.isnan(kid)
    assert math.isnan(error)


def test_sets_are_compared_region_by_region_with_one_bandwidth():
    rng = np.random.default_rng(7)
    references, others = rng.normal(size=(9, 2, 3)), rng.normal(size=(5, 2, 3))
    moved = references + np.array([[0.0], [5.0]])
    sets = {"copies": image_set(references), "moved": image_set(moved), "none": ImageSet()}
    rows = distances_of_sets(sets, image_set(references), image_set(others, 9), ("a", "b"))
    found = {(row["image"], row["region"], row["metric"]): row for row in rows}
    assert len(rows) == len(found) == 2 * 2 * 6
    assert found["moved", "a", "fid"]["value"] == 0
    assert found["moved", "b", "fid"]["value"] == pytest.approx(3 * 25)
    assert found["moved", "b", "mmd_squared"]["value"] > 0.5
    bandwidths = {found[image, "b", "mmd_squared"]["note"] for image in ("copies", "moved")}
    assert bandwidths == {f"bandwidth {median_distance(np.array([x[1] for x in [*references, *others]])):.4g}"}
    assert all((row["n"], row["n_real"]) == (9, 9) for row in rows)
    # One reference is beyond the reach of the eight others.
    for metric, values in {
        "feature_precision": (8 / 9, 0),
        "feature_recall": (8 / 9, 0),
        "classifier_auc": (0.5, 1),
    }.items():
        assert [found["moved", region, metric]["value"] for region in "ab"] == pytest.approx(values)
    assert found["moved", "b", "kid"]["value"] > found["moved", "a", "kid"]["value"] == 0
    with_error = {metric for (_, _, metric), row in found.items() if not math.isnan(row["standard_error"])}
    assert with_error == {"kid"}


def test_small_sets_note_the_bias_of_their_distances():
    rng = np.random.default_rng(8)
    real = rng.normal(size=(9, 1, 30))
    several = ImageSet(list(np.repeat(real[:8], 4, axis=0)), [each for each in names(8) for _ in range(4)])
    sets = {"few": image_set(real[:3]), "several": several, "one": image_set(real[:1])}
    sets["of one patient"] = ImageSet(list(real[:2]), names(1) * 2)
    rows = distances_of_sets(sets, image_set(real), ImageSet(), ("a",))
    values = {(row["image"], row["metric"]): (row["value"], row["note"]) for row in rows}
    assert "biased upwards" in values["few", "fid"][1]
    assert not math.isnan(values["of one patient", "fid"][0])
    assert values["one", "fid"][1] == "needs two images on each side"
    assert math.isnan(values["one", "fid"][0])
    for metric in ("mmd_squared", "kid", "classifier_auc"):
        for image in ("one", "of one patient"):
            assert math.isnan(values[image, metric][0])
            assert values[image, metric][1] == "needs two patients on each side"
    for metric in ("feature_precision", "feature_recall"):
        for image in ("few", "several"):
            assert math.isnan(values[image, metric][0])
            assert values[image, metric][1] == "needs 9 patients on each side"
