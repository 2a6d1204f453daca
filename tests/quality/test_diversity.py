"""Nearest cases, the signs of memorisation, and similarity within a layout, on small cases."""

import numpy as np
import pytest

from lungddpm.quality.diversity import memorisation, nearest_case, pairwise_similarity


def test_the_nearest_case_is_nearest_where_it_counts():
    mask = np.zeros((4, 4, 4), bool)
    mask[0, 0, :2] = True
    image = np.zeros(mask.shape, np.int16)
    near, far = np.full(mask.shape, 900, np.int16), np.zeros(mask.shape, np.int16)
    near[0, 0, :2] = 3, -4
    far[0, 0, 0] = 100
    assert nearest_case(image, mask, {"far": far, "near": near}) == ("near", pytest.approx(np.sqrt(12.5)))
    assert nearest_case(near, mask, {"far": far, "near": near}) == ("near", 0)


def test_memorisation_counts_the_samples_nearer_than_any_real_case():
    ratio, nearer = memorisation(np.array([0.0, 80.0, 100.0, 150.0]), np.array([100.0, 120.0, 140.0]))
    assert (ratio, nearer) == (pytest.approx(90 / 120), 2)


def test_every_two_images_are_compared_once():
    rng = np.random.default_rng(1)
    first, other = rng.random((2, 16, 16, 16)).astype(np.float32)
    half = np.zeros(first.shape, bool)
    half[:8] = True
    found = pairwise_similarity([first, first.copy(), other], {"all": ~np.zeros_like(half), "half": half})
    assert sorted(found) == ["all", "half"]
    assert [len(values) for values in found.values()] == [3, 3]
    assert found["all"][0] == pytest.approx(1)
    assert max(found["all"][1:]) < 0.3
