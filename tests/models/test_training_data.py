"""The cache of decoded cases, and the samples drawn from it."""

import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from scipy import ndimage

from lungddpm.config.loading import parse_config
from lungddpm.core import cases
from lungddpm.core.errors import InputError
from lungddpm.core.labels import Label
from lungddpm.core.volume import to_model_range
from lungddpm.generators import plugin
from lungddpm.models.augmentation import Augmentation, augment, draw_augmentation
from lungddpm.models.data import SampleStream, TrainingData, draw_crop, open_cache
from lungddpm.models.denoiser import condition_channels

CPU = torch.device("cpu")


@pytest.fixture
def discovery(tiny_cohort):
    """(names, folders, hashes) of the discovery cases."""
    rows = cases.usable(cases.read_cases(tiny_cohort), "discovery")
    folders = [cases.folder_of(tiny_cohort, row) for _, row in rows.iterrows()]
    return rows["case_id"].tolist(), folders, [folder.hash() for folder in folders]


@pytest.fixture
def read_count(monkeypatch):
    """How many cases were decoded."""
    read, decoded = cases.CaseFolder.read, []
    monkeypatch.setattr(cases.CaseFolder, "read", lambda folder: decoded.append(folder) or read(folder))
    return decoded


def test_the_cache_holds_the_cases_and_is_read_once(discovery, training_config, tmp_path, read_count):
    for _ in range(2):
        data = open_cache(tmp_path, *discovery, training_config().grid.size)
    assert read_count == discovery[1]
    assert isinstance(data.ct, np.memmap)
    assert (data.ct.dtype, data.layout.dtype) == (np.int16, np.uint8)
    for number, folder in enumerate(discovery[1]):
        ct, layout = folder.read()
        assert np.array_equal(data.ct[number].transpose(2, 1, 0), ct.array)
        assert np.array_equal(data.layout[number].transpose(2, 1, 0), layout.array)
    sizes = sum(path.stat().st_size for path in tmp_path.glob("*.npy"))
    assert sizes == pytest.approx(3 * 3 * 16**3, abs=300)  # three cases of three bytes per voxel, and headers


def test_a_stale_or_damaged_cache_is_ignored_and_removed(discovery, training_config, tmp_path, read_count, caplog):
    names, folders, hashes = discovery
    open_cache(tmp_path, names, folders, ["another scan", *hashes[1:]], training_config().grid.size)
    stale = set(tmp_path.glob("*.npy"))
    (tmp_path / ".half-written.npy").write_bytes(b"left by a killed process")
    data = open_cache(tmp_path, names, folders, hashes, training_config().grid.size)
    assert len(read_count) == 6
    files = set(tmp_path.iterdir()) - {tmp_path / ".lock"}
    assert len(files) == 2
    assert not files & stale

    caplog.set_level(logging.WARNING, logger="lungddpm")
    expected = data.ct.copy()
    path = next(tmp_path.glob("*-ct.npy"))
    whole = path.read_bytes()
    for damaged in (b"", whole[:5], whole[:80], whole[:-100], b"garbage" * 100):
        path.write_bytes(damaged)
        caplog.clear()
        assert np.array_equal(open_cache(tmp_path, names, folders, hashes, training_config().grid.size).ct, expected)
        assert "is damaged and is made again" in caplog.text


def test_processes_that_build_the_cache_at_once_decode_once(discovery, training_config, tmp_path, read_count):
    # Threads of one process hold locks of their own, as processes do, because each opens the lock file again.
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: open_cache(tmp_path, *discovery, training_config().grid.size), range(4)))
    assert len(read_count) == 3
    assert all(np.array_equal(data.ct, opened[0].ct) for data in opened)


def test_a_case_on_another_grid_is_refused(discovery, tmp_path):
    with pytest.raises(InputError, match=r"case00.*\(16, 16, 16\) voxels, but grid.size is \(16, 16, 32\)"):
        open_cache(tmp_path, *discovery, (16, 16, 32))
    assert not list(tmp_path.glob("*.npy"))


@pytest.fixture
def asymmetric():
    """Two cases of (D, H, W) = (12, 14, 16) whose CT shows the label; the nodule is on the left."""
    layout = np.zeros((2, 12, 14, 16), np.uint8)
    layout[:, 2:10, 2:12, 2:14] = Label.LUNG
    layout[:, 4:8, 3:9, 3:7] = Label.NODULE
    layout[:, 8:10, 3:5, 9:13] = Label.VESSEL
    ct = np.choose(layout, [60, -850, 20, -100]).astype(np.int16)
    return TrainingData(["a", "b"], ct, layout)


def stream_of(data, config):
    recipe = plugin(config.name).recipe(config)
    return SampleStream(data, config, recipe, recipe.objective(CPU), CPU)


def stream(data, training_config, **changes):
    return stream_of(data, training_config(**changes))


def test_plain_samples_are_the_cases_themselves(asymmetric, training_config):
    batch = stream(asymmetric, training_config, crop=None, batch_size=3).batch(0)
    config = training_config()
    expected = to_model_range(asymmetric.ct[0], config.grid.window_hu)
    assert batch.clean.shape == batch.noise.shape == (3, 1, 12, 14, 16)
    assert all(np.array_equal(clean[0], expected) for clean in batch.clean.numpy())
    channels = condition_channels(asymmetric.layout[0].transpose(2, 1, 0), config.settings.classes)
    assert all(np.array_equal(condition, channels) for condition in batch.condition.numpy())
    assert batch.clean.dtype == batch.condition.dtype == batch.noise.dtype == torch.float32


def test_crops_keep_ct_and_condition_aligned(asymmetric, training_config):
    batch = stream(asymmetric, training_config, crop=8, batch_size=20).batch(3)
    assert batch.clean.shape == (20, 1, 8, 8, 8)
    lung, nodule, vessel = ((batch.condition[:, [k]] > 0) for k in range(3))
    for mask, hu in ((lung, -850), (nodule, 20), (vessel, -100), (~(lung | nodule | vessel), 60)):
        assert torch.unique(batch.clean[mask]).tolist() == pytest.approx([(hu + 1024) / 812 - 1], abs=1e-6)


def test_samples_depend_on_their_number_alone(asymmetric, training_config):
    one_by_one = stream(asymmetric, training_config, batch_size=1, augmentation="standard")
    singles = [one_by_one.batch(number) for number in (5, 4, 3, 2, 1, 0)][::-1]
    torch.manual_seed(99)
    pairs = [stream(asymmetric, training_config, batch_size=2, augmentation="standard").batch(k) for k in range(3)]
    for name in ("clean", "condition", "noise", "levels"):
        first = torch.cat([getattr(batch, name) for batch in singles])
        assert torch.equal(first, torch.cat([getattr(batch, name) for batch in pairs]))
    other_seed = stream(asymmetric, training_config, seed=2, batch_size=2).batch(0)
    assert not torch.equal(other_seed.noise, pairs[0].noise)


def test_noise_and_timesteps_are_spread_as_they_should(asymmetric, training_config):
    batch = stream(asymmetric, training_config, batch_size=400, crop=4).batch(0)
    assert batch.noise.mean().item() == pytest.approx(0, abs=0.03)
    assert batch.noise.std().item() == pytest.approx(1, abs=0.03)
    counts = np.bincount(batch.levels.numpy(), minlength=20)
    assert len(counts) == 20
    assert counts.min() > 5  # 20 expected of each
    assert torch.corrcoef(batch.noise.flatten(1))[np.triu_indices(400, 1)].abs().mean() < 0.15


def test_every_case_comes_once_before_any_comes_again(training_config):
    marks = np.arange(5, dtype=np.int16) * 100 - 500
    data = TrainingData(
        list("abcde"), np.broadcast_to(marks[:, None, None, None], (5, 8, 8, 8)), np.ones((5, 8, 8, 8), np.uint8)
    )
    batch = stream(data, training_config, batch_size=20, crop=None).batch(0)
    drawn = np.rint((batch.clean[:, 0, 0, 0, 0].numpy() + 1) * 812 - 1024).astype(int).reshape(4, 5)
    assert all(sorted(epoch) == marks.tolist() for epoch in drawn)
    assert len({tuple(epoch) for epoch in drawn}) > 1


def test_crops_lie_inside_and_hold_something_to_generate():
    layout = np.zeros((16, 20, 24), np.uint8)
    layout[:4, 5:9, 20:] = Label.LUNG
    layout[2, 6, 22] = Label.NODULE
    generator = torch.Generator().manual_seed(0)
    with_nodule = 0
    for _ in range(100):
        where, centre = draw_crop(layout, 4, [Label.LUNG, Label.NODULE], generator)
        assert layout[where].shape == (4, 4, 4)
        assert all(side.start <= at < side.stop for side, at in zip(where, centre, strict=True))
        assert layout[centre] != Label.BACKGROUND
        with_nodule += (layout[where] == Label.NODULE).any()
    assert with_nodule > 40
    nothing = np.zeros((16, 20, 24), np.uint8)
    assert layout[draw_crop(nothing, 8, [Label.NODULE], generator)[0]].shape == (8, 8, 8)


def test_crops_of_lung_ddpm_plus_lie_around_nodule_voxels():
    layout = np.full((1, 16, 16, 16), Label.LUNG, np.uint8)
    layout[0, 10:12, 7, 5] = Label.NODULE
    plus = {"denoiser": {"attention": False, "multipliers": [1, 2]}, "training": {"crop": 8, "batch_size": 30}}
    values = {"grid": {"size": [16, 16, 16]}, "generators": {"lung_ddpm_plus": plus}}
    config = parse_config(values).for_training("lung_ddpm_plus")
    batch = stream_of(TrainingData(["a"], np.zeros((1, 16, 16, 16), np.int16), layout), config).batch(0)
    assert batch.condition.shape == (30, 1, 8, 8, 8)
    # The crop's middle is one of the two voxels, but where that would lead out of the volume.
    nodules = [frozenset(map(tuple, torch.argwhere(one[0] > 0).tolist())) for one in batch.condition]
    assert set(nodules) == {frozenset({(4, 4, 4), (5, 4, 4)}), frozenset({(3, 4, 4), (4, 4, 4)})}


def everything(shape):
    return tuple(slice(0, size) for size in shape)


def test_flip_swaps_left_and_right_of_ct_and_layout(asymmetric):
    labels = torch.from_numpy(asymmetric.layout[0])
    clean = torch.from_numpy(to_model_range(asymmetric.ct[0], (-1024, 600)))[None]
    flipped, flipped_labels = augment(clean, labels, Augmentation(True, None, 1.0, 0.0), everything(labels.shape))
    assert np.array_equal(flipped[0], clean[0].numpy()[:, :, ::-1])
    assert np.array_equal(flipped_labels, labels.numpy()[:, :, ::-1])
    assert (flipped_labels == Label.NODULE).nonzero()[:, 2].min() >= 8  # from the left half to the right one


@pytest.mark.parametrize("crop", [everything((12, 14, 16)), (slice(2, 10), slice(5, 13), slice(6, 14))])
def test_affine_map_agrees_with_scipy(asymmetric, crop):
    generator = torch.Generator().manual_seed(3)
    change = next(c for c in iter(lambda: draw_augmentation("standard", generator), None) if c.affine is not None)
    change = Augmentation(False, change.affine, 1.0, 0.0)
    random = np.random.default_rng(0)
    clean = ndimage.gaussian_filter(random.uniform(-1, 1, (12, 14, 16)), 1).astype(np.float32)
    labels = torch.from_numpy(asymmetric.layout[0])
    moved, moved_labels = augment(torch.from_numpy(clean)[None], labels, change, crop)

    matrix = change.affine.numpy()[::-1, :3][:, ::-1]  # from (x, y, z) to array axes
    shift = change.affine.numpy()[::-1, 3]
    start = np.array([side.start for side in crop])
    middle = start + (np.array(moved.shape[1:]) - 1) / 2
    where = {"offset": middle + shift + matrix @ (start - middle), "output_shape": moved.shape[1:], "mode": "nearest"}
    np.testing.assert_allclose(moved[0], ndimage.affine_transform(clean, matrix, order=1, **where), atol=2e-5)
    agree = moved_labels.numpy() == ndimage.affine_transform(labels.numpy(), matrix, order=0, **where)
    assert agree.mean() > 0.999  # ties of the nearest neighbour apart


def test_standard_augmentation_is_small_fair_and_aligned(asymmetric, training_config):
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_augmentation("standard", generator) for _ in range(400)]
    assert np.mean([change.flip for change in drawn]) == pytest.approx(0.5, abs=0.08)
    assert np.mean([change.affine is not None for change in drawn]) == pytest.approx(0.5, abs=0.08)
    matrices = np.stack([change.affine[:, :3].numpy() for change in drawn if change.affine is not None])
    scales = np.linalg.det(matrices) ** (1 / 3)
    assert 0.95 <= scales.min() < 0.96 < 1.04 < scales.max() <= 1.05
    angles = np.degrees(np.arccos((np.trace(matrices / scales[:, None, None], axis1=1, axis2=2) - 1) / 2))
    assert 6 < angles.max() < 5 * 3**0.5 + 0.2
    assert np.abs([change.offset * 812 for change in drawn]).max() <= 8.2  # HU

    batch = stream(asymmetric, training_config, crop=None, batch_size=60, augmentation="standard").batch(0)
    nodule = batch.condition[:, 1] > 0
    sides = torch.stack([mask.nonzero()[:, 2].float().mean() for mask in nodule])
    assert 15 < int((sides > 7.5).sum()) < 45
    inside = torch.stack([clean[0][mask].mean() for clean, mask in zip(batch.clean, nodule, strict=True)])
    assert inside.min() > -0.15  # lung is at -0.79, nodule at 0.29 or, at its edge, between them
    assert set(torch.unique(batch.condition).tolist()) == {-1.0, 1.0}
    assert batch.clean.abs().max() <= 1


def test_mild_augmentation_interpolates_nothing(asymmetric, training_config):
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_augmentation("mild", generator) for _ in range(100)]
    assert 30 < sum(change.flip for change in drawn) < 70
    assert all(change.affine is None for change in drawn)
    batch = stream(asymmetric, training_config, crop=None, batch_size=20, augmentation="mild").batch(0)
    plain = to_model_range(asymmetric.ct[0], (-1024, 600))
    for clean in batch.clean[:, 0].numpy():
        assert min(np.abs(clean - plain).max(), np.abs(clean - plain[:, :, ::-1]).max()) < 0.025  # 20 HU
