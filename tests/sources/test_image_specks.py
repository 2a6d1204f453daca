"""Slips of the brush: parts of a nodule label that are smaller than any nodule."""

import numpy as np
import pytest
from test_images import load, save

from lungddpm.config.models import Layouts
from lungddpm.core.labels import Label
from lungddpm.layouts.nodules import find_nodules

SPACING = np.array([0.7, 0.7, 1.25])
SHAPE = (64, 64, 40)
CT = np.random.default_rng(4).integers(-1000, 400, SHAPE).astype(np.int16)
SPECKS = [(5, 5, 5), (50, 8, 30), (6, 55, 12)]


def ball(diameter_mm, centre=(32, 32, 20)):
    offsets = (np.moveaxis(np.indices(SHAPE), 0, -1) - centre) * SPACING
    return np.linalg.norm(offsets, axis=-1) <= diameter_mm / 2


def write(top, labels):
    for folder, array in (("images", CT), ("labels", labels.astype(np.uint8))):
        save(top / folder / "a.nii.gz", array, np.diag([*SPACING, 1]))


def test_a_tumour_and_slips_of_the_brush_are_one_nodule_and_a_note(tmp_path):
    tumour = ball(20)
    labels = np.where(tumour, Label.NODULE, Label.BACKGROUND)
    for speck in SPECKS:
        labels[speck] = Label.NODULE
    write(tmp_path, labels)
    scan = load(tmp_path)
    (nodule,), _ = find_nodules(scan, Layouts())
    assert nodule.voxels == np.count_nonzero(tumour)
    assert scan.notes == ("3 parts of the nodule label are smaller than a sphere of 3 mm and left out",)


def test_a_speck_takes_the_label_around_it(tmp_path):
    labels = np.full(SHAPE, Label.BACKGROUND)
    labels[:, :, 10:] = Label.LUNG
    for speck in SPECKS:
        labels[speck] = Label.NODULE
    write(tmp_path, labels)
    around = [Label.BACKGROUND, Label.LUNG, Label.LUNG]
    found = load(tmp_path).labels
    assert [found[speck] for speck in SPECKS] == around
    assert np.count_nonzero(found == Label.LUNG) == np.prod(SHAPE) * 3 // 4


@pytest.mark.parametrize(("diameter_mm", "nodules"), [(2.7, 0), (3.3, 1)])
def test_a_nodule_of_3_mm_is_kept(tmp_path, diameter_mm, nodules):
    """LIDC-IDRI's readers outlined nodules of 3 mm and more."""
    write(tmp_path, np.where(ball(diameter_mm), Label.NODULE, Label.LUNG))
    scan = load(tmp_path)
    assert (len(find_nodules(scan, Layouts())[0]), len(scan.notes)) == (nodules, 1 - nodules)
