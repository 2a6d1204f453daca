"""Contact of a nodule with pleura and vessels on hand-made scans, and on phantoms whose truth is known."""

import numpy as np
import pytest
from scipy import ndimage

from lungddpm.config.models import Config
from lungddpm.core.labels import Label
from lungddpm.core.volume import Volume
from lungddpm.layouts.compose import build_case
from lungddpm.layouts.nodules import Nodule
from lungddpm.layouts.quality import CONTACT_MM, Segmented, measure_layout, surroundings, touches
from lungddpm.sources import Scan
from lungddpm.sources.phantom.patient import thorax
from lungddpm.sources.phantom.settings import Phantom

SHAPE = (60, 60, 30)
AFFINE = np.diag([1.0, 1.0, 2.5, 1.0])
NODULE = Nodule((20, 20, 10), np.ones((6, 6, 3), bool))


def figures_of(nodule=NODULE, lungs=np.s_[5:55, 5:55, 3:27], vessels=(), spacing=(1.0, 1.0, 2.5)):
    """Figures of one nodule; the model grid is the scan's own."""
    lungs_lr, tubes, numbers = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, bool), np.zeros(SHAPE, np.uint8)
    lungs_lr[lungs] = 1
    lungs_lr[0, 0, 0] = 2
    for vessel in vessels:
        tubes[vessel] = True
    nodule.paste(numbers)
    tubes[numbers > 0] = False
    ct = Volume(np.zeros(SHAPE, np.int16), np.diag([*spacing, 1.0]))
    return measure_layout(Segmented(ct, lungs_lr, tubes, numbers), [nodule], ct.like(numbers))["nodules"][0]


def test_a_nodule_is_measured():
    figures = figures_of()
    assert (figures["volume_mm3"], figures["layout_volume_mm3"], figures["volume_error"]) == (270, 270, 0)
    assert figures["equivalent_diameter_mm"] == 8.02
    # An octagon: the box of 6 x 6 mm with its corners cut by half a pixel.
    assert (figures["long_axis_mm"], figures["short_axis_mm"]) == (7.81, 7.81)
    assert figures["elongation"] == 0.8
    assert [figures[f"centroid_{axis}_mm"] for axis in "xyz"] == [22.5, 22.5, 27.5]
    assert figures["share_in_or_touching_lungs"] == 1
    assert not figures["touches_pleura"]
    assert not figures["touches_vessel"]


def test_ratings_and_notes_are_kept_under_their_columns():
    nodule = Nodule(
        (20, 20, 10), NODULE.mask, 3, True, {"internalStructure": 1.0, "texture": 4.5}, {"open contours": 2, "b": 1}
    )
    figures = figures_of(nodule)
    assert (figures["readers"], figures["flagged"], figures["notes"]) == (3, True, "open contours: 2; b: 1")
    assert (figures["internal_structure"], figures["texture"], figures["malignancy"]) == (1.0, 4.5, None)


@pytest.mark.parametrize(
    ("lungs", "contact"),
    [
        (np.s_[20:55, 5:55, 3:27], True),
        (np.s_[19:55, 5:55, 3:27], True),
        (np.s_[18:55, 5:55, 3:27], False),
        (np.s_[5:55, 5:28, 3:27], False),
        (np.s_[5:55, 5:27, 3:27], True),
        # Slices are 2.5 mm apart: the next one touches, the one after it does not.
        (np.s_[5:55, 5:55, 10:27], True),
        (np.s_[5:55, 5:55, 9:27], False),
        # Half of the nodule sticks out.
        (np.s_[23:55, 5:55, 3:27], True),
    ],
)
def test_contact_with_the_pleura_is_within_2_mm(lungs, contact):
    assert figures_of(lungs=lungs)["touches_pleura"] is contact


@pytest.mark.parametrize(
    ("vessels", "contact"),
    [
        ([np.s_[8:20, 22, 11]], True),
        ([np.s_[8:19, 22, 11]], True),
        ([np.s_[8:18, 22, 11]], False),
        # Its own rim, which looks like a vessel, and a rim that continues as one.
        ([np.s_[18:28, 18:28, 9:14]], False),
        ([np.s_[18:28, 18:28, 9:14], np.s_[28:40, 22, 11]], True),
        # Near, long enough, but it passes by.
        ([np.s_[16, 5:55, 11]], False),
    ],
)
def test_contact_with_a_vessel_needs_one_that_continues(vessels, contact):
    assert figures_of(vessels=vessels)["touches_vessel"] is contact


def test_direct_neighbours_touch_at_any_spacing():
    mask, other = np.zeros((3, 3, 3), bool), np.zeros((3, 3, 3), bool)
    mask[1, 1, 1] = other[1, 1, 2] = True
    assert touches(mask, other, np.array([0.7, 0.7, 10.0]))
    assert not touches(mask, np.zeros_like(mask), np.ones(3))


def test_surroundings_end_with_the_scan():
    scan = Volume(np.zeros((10, 10, 4), np.int16), AFFINE)
    box, mask = surroundings(Nodule((1, 6, 1), np.ones((2, 4, 2), bool)), scan, 4.0)
    assert box == (slice(0, 7), slice(2, 10), slice(0, 4))
    assert np.argwhere(mask).min(axis=0).tolist() == [1, 4, 1]
    assert mask.sum() == 16


@pytest.mark.parametrize(("slice_mm", "kernel", "seed"), [(3.0, "standard", 6), (4.0, "sharp", 8)])
def test_contact_agrees_with_the_truth_of_phantoms(slice_mm, kernel, seed):
    """Lungs and vessels are found in the CT; takes about 4 s each."""
    truth = thorax(Phantom(nodules=(6, 6), nodule_diameter_mm=(6, 24), slice_mm=slice_mm, kernel=kernel), seed)
    labels = np.where(np.any([nodule.mask for nodule in truth.nodules], axis=0), np.uint8(Label.NODULE), np.uint8(0))
    case = build_case(Scan(truth.ct, labels=labels), Config())
    lungs, vessels = (truth.ct.like(array).canonical().array for array in (truth.lungs, truth.vessels))
    spacing_mm = case.found.ct.spacing_mm
    to_pleura = ndimage.distance_transform_edt(lungs | (case.found.nodules > 0), spacing_mm)
    to_vessel = ndimage.distance_transform_edt(~vessels, spacing_mm)
    wrong = {"pleura": 0, "vessel": 0}
    for number, figures in enumerate(case.qc["nodules"], start=1):
        mask = case.found.nodules == number
        for what, gap_mm in (("pleura", to_pleura[mask].min()), ("vessel", to_vessel[mask].min())):
            # What lies about as far away as the rule asks may go either way.
            clear = gap_mm > CONTACT_MM + 2 * spacing_mm.max() or gap_mm <= spacing_mm.min()
            wrong[what] += bool(clear and figures[f"touches_{what}"] != (gap_mm <= spacing_mm.max()))
    assert wrong["pleura"] == 0
    assert wrong["vessel"] <= 1
