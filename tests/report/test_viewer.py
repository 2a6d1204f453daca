"""What the slice viewer of the report is given."""

import base64
import gzip

import numpy as np
import pytest

from lungddpm.core.labels import Label
from lungddpm.core.volume import Volume
from lungddpm.quality.image_quality import Reference, Sample
from lungddpm.report.samples import DisplaySample
from lungddpm.report.viewer import list_nodules, viewer_values

SHAPE = (10, 9, 8)
AFFINE = np.array([[2.0, 0, 0, -30], [0, 3.0, 0, 40], [0, 0, 4.0, -500], [0, 0, 0, 1]])


@pytest.fixture
def sample():
    layout = np.zeros(SHAPE, np.uint8)
    layout[1:9, 1:8, 1:7] = Label.LUNG
    layout[2, 2, 2] = Label.NODULE
    layout[5:8, 4:7, 3:6] = Label.NODULE
    reference = np.random.default_rng(1).integers(-1000, 400, SHAPE).astype(np.int16)
    synthetic = np.where(layout > 0, reference + 150, reference).astype(np.int16)
    own, made = Volume(reference, AFFINE), Volume(synthetic, AFFINE)
    return Sample(made, Volume(layout, AFFINE), Reference("case-1", own, Volume(layout, AFFINE)))


def unpacked(data, name, kind, sample=0):
    text = data["volumes"][data["samples"][sample]["volumes"][name]]
    return np.frombuffer(gzip.decompress(base64.b64decode(text)), kind).reshape(SHAPE)


def test_nodules_are_listed_from_the_largest(sample):
    large, small = list_nodules(sample)
    assert (large["voxel"], small["voxel"]) == ((6, 5, 4), (2, 2, 2))
    assert (large["volume_mm3"], small["volume_mm3"]) == pytest.approx((27 * 24, 24))
    assert small["diameter_mm"] == pytest.approx(2 * (24 * 3 / (4 * np.pi)) ** (1 / 3))
    assert small["reference_hu"] == sample.reference.ct.array[2, 2, 2]
    assert large["synthetic_hu"] - large["reference_hu"] == pytest.approx(150)


def test_volumes_arrive_unchanged_and_in_their_place(sample):
    data = viewer_values([DisplaySample("lung_ddpm", "a", "why", sample)])["data"]
    reference, difference = unpacked(data, "reference", "<i2"), unpacked(data, "difference", "<i2")
    np.testing.assert_array_equal(reference, sample.reference.ct.array)
    np.testing.assert_array_equal(reference + difference, sample.ct.array)
    np.testing.assert_array_equal(unpacked(data, "layout", "u1"), sample.layout.array)
    (packed,) = data["samples"]
    assert packed["title"] == "a from case-1 (why)"
    assert packed["spacing_mm"] == [2, 3, 4]
    np.testing.assert_array_equal(packed["affine"], AFFINE)
    assert packed["limit_hu"] == 200


def test_a_sample_without_a_reference_is_shown_alone(sample):
    alone = Sample(sample.ct, sample.layout, reference=None)
    data = viewer_values([DisplaySample("external", "a", "", alone)])["data"]
    assert set(data["samples"][0]["volumes"]) == {"layout", "synthetic"}
    np.testing.assert_array_equal(unpacked(data, "synthetic", "<i2"), sample.ct.array)
    assert [nodule["reference_hu"] for nodule in data["samples"][0]["nodules"]] == [None, None]


def test_samples_are_taken_while_there_is_room(sample):
    shown = [DisplaySample("lung_ddpm", name, "", sample) for name in "abc"]
    size = sum(map(len, viewer_values(shown[:1])["data"]["volumes"].values()))
    everything = viewer_values(shown)
    assert len(everything["data"]["samples"]) == 3
    assert everything["left_out"] == []
    # Three samples of one reference hold it once.
    assert len(everything["data"]["volumes"]) == 7
    first = viewer_values(shown, limit_bytes=size)
    assert [packed["title"] for packed in first["data"]["samples"]] == ["a from case-1"]
    assert first["left_out"] == ["lung_ddpm b", "lung_ddpm c"]
    assert len(viewer_values(shown, limit_bytes=1)["data"]["samples"]) == 1
    assert viewer_values([]) is None
