"""FID, MMD and KID against closed forms, scipy's matrix root, double loops and MONAI."""

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
    assert squared_mmd(first, second, 1.7) == pytest.approx(sum(within) - 2 * across)


def test_squared_mmd_is_unbiased():
    rng = np.random.default_rng(6)
    found = [squared_mmd(rng.normal(size=(5, 3)), rng.normal(size=(5, 3)), 2.0) for _ in range(4000)]
    assert np.mean(found) == pytest.approx(0, abs=4 * np.std(found) / math.sqrt(len(found)))
    assert min(found) < 0


def test_squared_mmd_of_a_set_and_its_copy_is_below_zero():
    """Pairs of a vector with itself (kernel 1) count between the sets, but not within them."""
    x = np.random.default_rng(9).normal(size=(5, 4))
    distances = np.linalg.norm(x[:, None] - x[None], axis=2)[~np.eye(5, dtype=bool)]
    kernel = np.exp(-(distances**2) / (2 * 2.0**2)).mean()
    assert squared_mmd(x, x, 2.0) == pytest.approx(-2 / 5 * (1 - kernel))


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
        found = [kernel_distance(*draw, ["a"] * sizes[0], ["b"] * sizes[1])[0] for draw in draws]
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
    first_patients, second_patients = ["a", "a", "b", "c", "d", "d"], ["a", "b", "e", "e"]
    left = []
    for patient in "abcde":
        mine, theirs = (np.array(p) != patient for p in (first_patients, second_patients))
        left.append(kernel_distance(first[mine], second[theirs], ["x"] * mine.sum(), ["y"] * theirs.sum())[0])
    _, error = kernel_distance(first, second, first_patients, second_patients)
    assert error == pytest.approx(math.sqrt(4 / 5 * sum((value - np.mean(left)) ** 2 for value in left)))
    assert math.isnan(kernel_distance(first, second, ["a"] * 6, second_patients)[1])


def test_sets_are_compared_region_by_region_with_one_bandwidth():
    rng = np.random.default_rng(7)
    references, others = rng.normal(size=(6, 2, 3)), rng.normal(size=(5, 2, 3))
    moved = references + np.array([[0.0], [5.0]])
    sets = {"copies": image_set(references), "moved": image_set(moved), "none": ImageSet()}
    rows = distances_of_sets(sets, image_set(references), image_set(others, 6), ("a", "b"))
    found = {(row["image"], row["region"], row["metric"]): row for row in rows}
    assert len(rows) == len(found) == 2 * 2 * 6
    assert found["moved", "a", "fid"]["value"] == 0
    assert found["moved", "b", "fid"]["value"] == pytest.approx(3 * 25)
    assert found["moved", "b", "mmd_squared"]["value"] > 0.5
    bandwidths = {found[image, "b", "mmd_squared"]["note"] for image in ("copies", "moved")}
    assert bandwidths == {f"bandwidth {median_distance(np.array([x[1] for x in [*references, *others]])):.4g}"}
    assert all((row["n"], row["n_real"]) == (6, 6) for row in rows)
    expected = {"a": (1, 1, 0.5), "b": (0, 0, 1)}
    for region, values in expected.items():
        of_region = [
            found["moved", region, m]["value"] for m in ("feature_precision", "feature_recall", "classifier_auc")
        ]
        assert of_region == pytest.approx(values)
    assert found["moved", "b", "kid"]["value"] > found["moved", "a", "kid"]["value"]
    with_error = {metric for (_, _, metric), row in found.items() if not math.isnan(row["standard_error"])}
    assert with_error == {"kid"}


def test_small_sets_note_the_bias_of_their_distances():
    rng = np.random.default_rng(8)
    real = rng.normal(size=(4, 1, 30))
    rows = distances_of_sets(
        {"few": image_set(real[:3]), "one": image_set(real[:1])}, image_set(real), ImageSet(), ("a",)
    )
    values = {(row["image"], row["metric"]): (row["value"], row["note"]) for row in rows}
    assert "biased upwards" in values["few", "fid"][1]
    for metric in ("fid", "mmd_squared", "kid"):
        assert math.isnan(values["one", metric][0])
        assert values["one", metric][1] == "needs two images on each side"
    for metric in ("feature_precision", "feature_recall"):
        assert math.isnan(values["few", metric][0])
        assert values["few", metric][1] == "needs four images on each side"
    assert math.isnan(values["one", "classifier_auc"][0])
    assert values["one", "classifier_auc"][1] == "needs two patients on each side"
