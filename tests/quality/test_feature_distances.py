"""FID and MMD against closed forms, scipy's matrix root and a double loop."""

import math

import numpy as np
import pytest
from scipy.linalg import sqrtm

from lungddpm.quality.feature_distances import distances_of_sets, frechet_distance, median_distance, squared_mmd


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


def test_sets_are_compared_region_by_region_with_one_bandwidth():
    rng = np.random.default_rng(7)
    references, others = list(rng.normal(size=(6, 2, 3))), list(rng.normal(size=(5, 2, 3)))
    moved = [x + np.array([[0.0], [5.0]]) for x in references]
    rows = distances_of_sets({"copies": references, "moved": moved, "none": []}, references, others, ("a", "b"))
    found = {(row["image"], row["region"], row["metric"]): row for row in rows}
    assert len(rows) == len(found) == 2 * 2 * 2
    assert found["moved", "a", "fid"]["value"] == 0
    assert found["moved", "b", "fid"]["value"] == pytest.approx(3 * 25)
    assert found["moved", "b", "mmd_squared"]["value"] > 0.5
    bandwidths = {found[image, "b", "mmd_squared"]["note"] for image in ("copies", "moved")}
    assert bandwidths == {f"bandwidth {median_distance(np.array([x[1] for x in [*references, *others]])):.4g}"}
    assert all((row["n"], row["n_real"]) == (6, 6) for row in rows)


def test_small_sets_say_what_their_distances_are_worth():
    rng = np.random.default_rng(8)
    real = list(rng.normal(size=(4, 1, 30)))
    rows = distances_of_sets({"few": real[:3], "one": real[:1]}, real, [], ("a",))
    values = {(row["image"], row["metric"]): (row["value"], row["note"]) for row in rows}
    assert "biased upwards" in values["few", "fid"][1]
    assert math.isnan(values["one", "fid"][0])
    assert math.isnan(values["one", "mmd_squared"][0])
    assert "two images" in values["one", "fid"][1]
