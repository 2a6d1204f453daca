"""SSIM and MS-SSIM against scikit-image and MONAI."""

import math

import numpy as np
import pytest
import torch
from monai.metrics.regression import compute_ms_ssim, compute_ssim_and_cs
from scipy.ndimage import gaussian_filter
from skimage.metrics import structural_similarity

from lungddpm.quality.similarity import n_scales, similarities, similarity_maps


@pytest.fixture
def pair():
    """Two images with structure at several scales."""
    rng = np.random.default_rng(1)
    smooth = gaussian_filter(rng.normal(0, 1, (48, 44, 46)), 3)
    reference = np.clip(0.5 + 2 * smooth, 0, 1).astype(np.float32)
    return np.clip(reference + rng.normal(0, 0.05, reference.shape), 0, 1).astype(np.float32), reference


def whole(shape):
    return {"whole": np.ones(shape, bool)}


def test_the_map_is_that_of_scikit_image(pair):
    _, theirs = structural_similarity(
        *pair, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
    )
    assert similarity_maps(*pair)[0] == pytest.approx(theirs, abs=1e-4)


def test_ms_ssim_is_the_product_over_scales_of_what_monai_finds(pair):
    """MONAI takes windows within the image only, so the images are mirrored at their edges first."""
    factors, images = [], pair
    for _ in range(3):
        padded = [torch.from_numpy(np.pad(image, 5, mode="symmetric"))[None, None] for image in images]
        ssim, contrast_structure = compute_ssim_and_cs(
            *padded, spatial_dims=3, kernel_size=(11,) * 3, kernel_sigma=(1.5,) * 3, data_range=1.0
        )
        factors.append((float(ssim.mean()), float(contrast_structure.mean())))
        images = [torch.nn.functional.avg_pool3d(torch.from_numpy(i)[None, None], 2)[0, 0].numpy() for i in images]
    total = 0.0448 + 0.2856 + 0.3001
    wanted = factors[0][1] ** (0.0448 / total) * factors[1][1] ** (0.2856 / total) * factors[2][0] ** (0.3001 / total)
    ssim, ms_ssim = similarities(*pair, whole(pair[0].shape))["whole"]
    assert ssim == pytest.approx(factors[0][0], abs=1e-4)
    assert ms_ssim == pytest.approx(wanted, abs=1e-4)
    assert 0.1 < ms_ssim < 0.99


def test_one_scale_is_ssim_as_monai_has_it():
    image, reference = np.random.default_rng(2).random((2, 21, 20, 20)).astype(np.float32)
    inner = {"inner": np.zeros(image.shape, bool)}
    inner["inner"][5:-5, 5:-5, 5:-5] = True
    theirs = compute_ms_ssim(*(torch.from_numpy(i)[None, None] for i in (image, reference)), 3, weights=(1.0,))
    ssim, ms_ssim = similarities(image, reference, inner)["inner"]
    assert n_scales(image.shape) == 1
    assert ssim == pytest.approx(float(theirs), abs=1e-4)
    assert ms_ssim == pytest.approx(float(theirs), abs=1e-4)


@pytest.mark.parametrize(
    ("edge", "scales"), [(10, 0), (11, 1), (43, 2), (48, 3), (64, 3), (128, 4), (176, 5), (512, 5)]
)
def test_a_grid_has_as_many_scales_as_the_window_fits_on(edge, scales):
    assert n_scales((edge, 512, 512)) == scales


def test_only_what_differs_within_reach_of_a_region_counts(pair):
    image, reference = pair[1].copy(), pair[1]
    image[40:] = 1 - image[40:]
    masks = {"far": np.zeros(image.shape, bool), "there": np.zeros(image.shape, bool)}
    masks["far"][:8], masks["there"][42:] = True, True
    found = similarities(image, reference, masks)
    assert found["far"] == (pytest.approx(1), pytest.approx(1))
    assert found["there"][0] < 0.5
    assert found["there"][1] < 0.5


def test_opposites_have_a_similarity_of_zero_not_a_negative_one(pair):
    assert similarities(1 - pair[1], pair[1], whole(pair[1].shape))["whole"][1] == 0


@pytest.mark.parametrize("shape", [(10, 20, 20), (20, 20, 20)])
def test_empty_regions_and_grids_below_the_window_are_not_measured(shape):
    image = np.zeros(shape, np.float32)
    mask = np.zeros(shape, bool) if min(shape) > 10 else np.ones(shape, bool)
    assert all(math.isnan(value) for value in similarities(image, image, {"region": mask})["region"])
