"""Nearest cases, the signs of memorisation, and similarity within a layout, on small cases."""

import numpy as np
import pytest

from lungddpm.quality.diversity import Nearness, compare_draws, memorisation, nearest_case, pairwise_similarity
from lungddpm.quality.similarity import similarity_maps


def test_the_nearest_case_is_nearest_where_it_counts():
    mask = np.zeros((4, 4, 4), bool)
    mask[0, 0, :2] = True
    image = np.zeros(mask.shape, np.int16)
    near, far = np.full(mask.shape, 900, np.int16), np.zeros(mask.shape, np.int16)
    near[0, 0, :2] = 3, -4
    far[0, 0, 0] = 100
    assert nearest_case(image, mask, {"far": far, "near": near}) == ("near", pytest.approx(np.sqrt(12.5)))
    assert nearest_case(near, mask, {"far": far, "near": near}) == ("near", 0)


def test_memorisation_compares_medians_and_the_nearest_of_all():
    found = memorisation(np.array([20.0, 80.0, 100.0, 150.0]), np.array([100.0, 120.0, 140.0]))
    assert found == Nearness(pytest.approx(90 / 120), pytest.approx(20 / 100), 2)


def test_an_image_without_texture_is_nearer_than_a_real_one_by_the_root_of_two():
    """Cases of independent noise: what the limit of the check stands for."""
    rng = np.random.default_rng(2)
    cases = {str(number): rng.normal(-850, 50, (20, 20, 20)) for number in range(6)}
    everywhere = np.ones((20, 20, 20), bool)
    real = [
        nearest_case(hu, everywhere, {other: cases[other] for other in cases if other != name})[1]
        for name, hu in cases.items()
    ]
    _, smooth = nearest_case(np.full((20, 20, 20), -850.0), everywhere, cases)
    found = memorisation(np.array([smooth]), np.array(real))
    assert found.ratio == pytest.approx(np.sqrt(0.5), rel=0.02)
    assert found.smallest_ratio == pytest.approx(np.sqrt(0.5), rel=0.02)


def test_draws_of_a_nodule_have_the_spread_that_they_were_made_with():
    """Each draw has its own level (sd 0.1) and its own noise (sd 0.05) in each voxel; the mean has the level alone."""
    rng = np.random.default_rng(3)
    nodules = np.zeros((24, 24, 24), bool)
    nodules[7:17, 7:17, 7:17] = True
    found = []
    for _ in range(60):
        draws = [rng.normal(0.5 + 0.1 * rng.normal(), 0.05, nodules.shape) for _ in range(3)]
        (one,) = compare_draws(draws, nodules)
        found.append((one.voxel_sd**2, one.mean_sd**2))
        assert len(one.similarities) == 3
    voxels, means = np.mean(found, axis=0)
    of_means = np.std(found, axis=0)[1] / np.sqrt(60)
    assert voxels == pytest.approx(0.1**2 + 0.05**2, abs=4 * of_means)
    assert means == pytest.approx(0.1**2 + 0.05**2 / 1000, abs=4 * of_means)


def test_equal_draws_do_not_differ():
    image = np.random.default_rng(4).random((16, 16, 16)).astype(np.float32)
    nodules = np.zeros(image.shape, bool)
    nodules[0, 0, 0] = nodules[8, 8, 8] = True
    for one in compare_draws([image, image.copy(), image.copy()], nodules):
        assert (one.voxel_sd, one.mean_sd, one.scales) == (0, 0, 1)
        assert one.similarities == pytest.approx([1, 1, 1])


def test_small_nodules_are_compared_by_ssim_as_the_whole_volume_shows_it():
    rng = np.random.default_rng(5)
    first, other = rng.random((2, 40, 40, 40)).astype(np.float32)
    nodules = np.zeros(first.shape, bool)
    nodules[18:21, 20:23, 17:20] = True
    (one,) = compare_draws([first, other], nodules)
    ssim, _ = similarity_maps(first, other)
    assert one.scales == 1
    assert one.similarities == [pytest.approx(max(float(ssim[nodules].mean()), 0), abs=1e-5)]


def test_large_nodules_have_more_scales():
    first, other = np.random.default_rng(6).random((2, 40, 40, 40)).astype(np.float32)
    nodules = np.zeros(first.shape, bool)
    nodules[10:24, 10:24, 10:24] = True
    (one,) = compare_draws([first, other], nodules)
    assert one.scales == 2
    assert compare_draws([first, other], np.zeros(first.shape, bool)) == []


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
