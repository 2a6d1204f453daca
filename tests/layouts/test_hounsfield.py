"""Whether a CT is in HU: the phantom as it is, as real scans differ, and as other tools spoil it."""

import re

import numpy as np
import pytest
from scipy import ndimage

from lungddpm.config.models import Config, LayoutLimits
from lungddpm.core.errors import ExcludedCaseError
from lungddpm.core.labels import Label
from lungddpm.core.volume import AIR_HU, bounding_box
from lungddpm.layouts.compose import build_case
from lungddpm.layouts.hounsfield import find_landmarks, hounsfield_problem, recognised_problem
from lungddpm.sources import Scan
from lungddpm.sources.lidc import load_scan

LIMITS = LayoutLimits()


def noise(patient, sd):
    return np.random.default_rng(5).normal(0, sd, patient.ct.shape)


def from_axis(patient):
    """Distance of each column from the middle of the field of view, in pixels."""
    width, depth = patient.ct.shape[:2]
    return np.hypot(*np.ogrid[-width / 2 : width / 2, -depth / 2 : depth / 2])[..., None]


def padded(patient, value):
    return np.where(from_axis(patient) > patient.ct.shape[0] / 2, value, patient.ct.array)


def with_metal(patient):
    hu = patient.ct.array.astype(float)
    x, y, _ = (int(place) for place in np.argwhere(patient.lungs).mean(axis=0))
    hu[x - 3 : x + 3, y - 3 : y + 3] = 30_000
    hu[:, y - 5 : y + 5] += 400 * np.sign(np.sin(np.arange(hu.shape[0])))[:, None, None]
    return hu


def with_contrast(patient):
    hu = patient.ct.array
    middle = np.abs(np.indices(hu.shape)[0] - hu.shape[0] / 2) * patient.ct.spacing_mm[0] < 70
    return np.where(patient.vessels | (middle & ~patient.lungs & (hu > 0) & (hu < 90)), 350, hu)


def emphysema(patient, level):
    return np.where(patient.lungs & (patient.ct.array < -500), level + noise(patient, 30), patient.ct.array)


def consolidated(patient):
    """Two thirds of the lungs, from the back, hold fluid."""
    y = np.indices(patient.ct.shape)[1]
    back = y < np.percentile(y[patient.lungs], 45)
    return np.where(patient.lungs & back, -20 + noise(patient, 20), patient.ct.array)


VARIETY = {
    "as it is": lambda patient: patient.ct.array,
    "padding -2000": lambda patient: padded(patient, -2000),
    "padding -3024": lambda patient: padded(patient, -3024),
    "padding set to air": lambda patient: padded(patient, AIR_HU),
    "contrast": with_contrast,
    "metal": with_metal,
    "emphysema": lambda patient: emphysema(patient, -970),
    "emphysema at low dose": lambda patient: np.maximum(emphysema(patient, -950) + noise(patient, 150), AIR_HU),
    "low dose": lambda patient: patient.ct.array + noise(patient, 200),
    "low dose, cut at -1024": lambda patient: np.maximum(patient.ct.array + noise(patient, 200), AIR_HU),
    "expiration": lambda patient: np.where(patient.lungs, patient.ct.array * 0.7, patient.ct.array),
    "consolidation": consolidated,
    "window of -1000 to 400": lambda patient: np.clip(patient.ct.array, -1000, 400),
    "12 bit": lambda patient: np.clip(patient.ct.array, -1024, 3071),
    "float": lambda patient: patient.ct.array.astype(np.float32) + np.float32(0.25),
    "calibrated 40 HU too high": lambda patient: patient.ct.array + 40,
}


@pytest.mark.parametrize("case", VARIETY)
def test_what_scans_differ_in_passes(patient, case):
    hu = VARIETY[case](patient)
    assert hounsfield_problem(hu, patient.lungs, LIMITS) is None
    assert recognised_problem(hu, LIMITS) is None


def test_a_field_of_view_inside_the_body_passes(patient):
    inner = (slice(None), *(slice(40, -40) for _ in range(1)), slice(None))
    assert hounsfield_problem(patient.ct.array[inner], patient.lungs[inner], LIMITS) is None


@pytest.mark.parametrize("around", [40, -1000])
def test_a_phantom_without_noise_passes(patient, around):
    hu = np.where(patient.lungs, -850, 40)
    hu[:2] = hu[-2:] = hu[:, :2] = hu[:, -2:] = around
    hu[40:44, 80:84, 90:] = -1000
    assert hounsfield_problem(hu, patient.lungs, LIMITS) is None


def test_scaled_values_inside_the_body_are_not_called_inverted(patient):
    box = bounding_box(patient.lungs)
    hu = np.rint(window(patient.ct.array[box], -1000, 400, 1000))
    assert "look scaled, from 0 to 1000" in hounsfield_problem(hu, patient.lungs[box], LIMITS)


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_lungs_that_are_drawn_wider_or_closer_pass(patient, extra):
    grow = {-1: ndimage.binary_erosion, 0: lambda mask: mask, 1: ndimage.binary_dilation}[extra]
    assert hounsfield_problem(patient.ct.array, grow(patient.lungs), LIMITS) is None


def window(hu, low, high, top):
    return (np.clip(hu, low, high) - low) * (top / (high - low))


def standardised(hu):
    return (hu - hu.mean()) / hu.std()


TOO_HIGH = "are about 1024 too high, like .* rescale intercept was not applied"
TOO_LOW = "are about 1024 too low, .* rescaled twice"
SPOILT = {
    "stored values": (lambda hu: hu + 1024, TOO_HIGH),
    "stored values, air at 0": (lambda hu: np.maximum(hu, -1000) + 1000, "are about 1024 too high"),
    "stored values of uint16": (lambda hu: hu + 32768.0, "are about 32768 too high"),
    "offset of 500": (lambda hu: hu + 500, "are about 5.0 too high"),
    "rescaled twice": (lambda hu: hu - 1024, TOO_LOW),
    "rescaled twice, cut": (lambda hu: np.maximum(hu - 1024, -1024), TOO_LOW),
    "[0, 1]": (lambda hu: window(hu, -1024, 600, 1), r"normalised to \[0, 1\]"),
    "[0, 1] of 12 bit": (lambda hu: window(hu, -1024, 3071, 1), r"normalised to \[0, 1\]"),
    "[-1, 1]": (lambda hu: window(hu, -1024, 600, 2) - 1, r"normalised to \[-1, 1\]"),
    "z-scores": (standardised, "standardised"),
    "thousandths": (lambda hu: hu / 1000, "divided by 1000"),
    "grey values of the lung window": (lambda hu: window(hu, -1350, 150, 255), "8-bit grey values"),
    "grey values of all": (lambda hu: np.rint(window(hu, -1024, 3071, 255)), "8-bit grey values|scaled"),
    "grey values of a wide window": (lambda hu: np.rint(window(hu, -1000, 400, 255)), "8-bit grey values"),
    "16 bit of a window": (lambda hu: np.rint(window(hu, -1000, 400, 65535)), "look scaled, from 0 to 6.55"),
    "per mille of a window": (lambda hu: np.rint(window(hu, -1000, 400, 1000)), "look scaled, from 0 to 1000"),
    "halved": (lambda hu: hu / 2, "look scaled"),
    "doubled": (lambda hu: np.maximum(hu * 2, -1024), "look scaled"),
    "inverted": (lambda hu: -hu, "inverted"),
    "inverted grey values": (lambda hu: 255 - np.rint(window(hu, -1000, 400, 255)), "grey values|inverted"),
    "unsigned": (lambda hu: np.where(hu < 0, hu + 65536.0, hu), "unsigned"),
    "unsigned, cut": (lambda hu: np.minimum(np.where(hu < 0, hu + 65536.0, hu), 32767), "unsigned"),
    "grey values of the soft-tissue window": (lambda hu: np.rint(window(hu, -160, 240, 255)), "8-bit grey values"),
    "soft-tissue window": (lambda hu: np.clip(hu, -160, 240), "no voxel is below -160 HU"),
    "window without lung": (lambda hu: np.clip(hu, -600, 400), "no voxel is below -600 HU"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILT)
@pytest.mark.parametrize("low_dose", [False, True])
def test_what_is_not_in_hounsfield_units_is_described(patient, case, low_dose):
    spoil, description = SPOILT[case]
    hu = np.maximum(patient.ct.array + noise(patient, 100 * low_dose), AIR_HU)
    error = hounsfield_problem(spoil(hu), patient.lungs, LIMITS)
    assert error is not None
    assert re.search(description, error), error


def test_levels(patient):
    found = find_landmarks(patient.ct.array, patient.lungs)
    assert found.lung == pytest.approx(np.median(patient.ct.array[patient.lungs]), abs=5)
    assert found.tissue == pytest.approx(40, abs=40)


@pytest.mark.parametrize("padding", [-2000, 0])
def test_stored_values_with_padding_are_described(patient, padding):
    hu = padded(patient, padding - 1024) + 1024
    assert re.search(TOO_HIGH, hounsfield_problem(hu, patient.lungs, LIMITS))


@pytest.mark.parametrize(
    "case", ["stored values", "rescaled twice", "[0, 1]", "[-1, 1]", "z-scores", "unsigned", "inverted"]
)
def test_without_lungs_it_is_described_alike(patient, case):
    spoil, description = SPOILT[case]
    assert re.search(description, recognised_problem(spoil(np.maximum(patient.ct.array, AIR_HU)), LIMITS))


def test_wrong_values_in_air_are_described(patient):
    body = ndimage.binary_fill_holes((patient.ct.array > -300).any(axis=2))[..., None]
    masked = np.where(body, patient.ct.array, 0)
    assert "has 0 HU around the patient" in hounsfield_problem(masked, patient.lungs, LIMITS)


def test_masked_tissue_is_described(patient):
    masked = np.where(patient.lungs, patient.ct.array, -1000)
    assert "everything except the lungs was masked" in hounsfield_problem(masked, patient.lungs, LIMITS)


@pytest.mark.parametrize("wrong", ["a tumour", "all of the body"])
def test_labels_that_are_not_lung_are_distinguished_from_wrong_values(patient, wrong):
    labels = {
        "a tumour": max(patient.nodules, key=lambda nodule: np.median(patient.ct.array[nodule])),
        "all of the body": patient.ct.array > -500,
    }
    error = hounsfield_problem(patient.ct.array, labels[wrong], LIMITS)
    assert "looks like Hounsfield units, but what is labelled lung is not lung" in error


def scan_of(patient, hu, *names):
    masks = {Label.LUNG: patient.lungs, Label.VESSEL: patient.vessels, Label.NODULE: np.any(patient.nodules, axis=0)}
    labels = np.zeros(hu.shape, np.uint8)
    for name in names:
        labels[masks[name]] = name
    return Scan(patient.ct.like(hu), labels=labels)


@pytest.mark.parametrize(
    "labels", [(Label.LUNG, Label.VESSEL, Label.NODULE), (Label.LUNG, Label.NODULE), (Label.NODULE,)]
)
@pytest.mark.parametrize("case", ["stored values", "rescaled twice, cut", "[0, 1]"])
def test_no_case_is_made_of_it_whatever_the_labels(patient, labels, case):
    spoil, description = SPOILT[case]
    hu = spoil(np.maximum(patient.ct.array, AIR_HU))
    with pytest.raises(ExcludedCaseError, match=f"not in Hounsfield units: .*{description}") as error:
        build_case(scan_of(patient, hu, *labels), Config())
    # Nothing about labels: DICOM has none, and those of nnU-Net or of the config have other numbers.
    assert error.value.remedy == "Export the CT in Hounsfield units (air -1000, water 0)."


def test_the_remedy_for_a_wrong_label_is_about_the_label(patient):
    scan = scan_of(patient, patient.ct.array, Label.NODULE)
    scan.labels[patient.ct.array > -500] = Label.LUNG
    with pytest.raises(ExcludedCaseError, match="what is labelled lung is not lung") as error:
        build_case(scan, Config())
    assert "1" not in error.value.problem.partition("(")[0]
    assert error.value.remedy == "Correct the labels."


def test_the_limits_are_those_of_the_config(patient):
    hu = patient.ct.array + 300
    assert hounsfield_problem(hu, patient.lungs, LIMITS) is None
    assert hounsfield_problem(hu, patient.lungs, LayoutLimits(tissue_hu=(-250, 200)))
    assert hounsfield_problem(patient.ct.array, patient.lungs, LayoutLimits(lung_hu=(-800, -250)))


@pytest.mark.parametrize("name", ["LIDC-IDRI-0001", "LIDC-IDRI-0003"])
def test_real_scans(shared_data, name):
    """With the oracle's nodules only: the middle of the scan stands for lung and tissue."""
    (folder,) = (shared_data / "lidc").glob(f"{name}/*/*")
    row = {"path": str(folder.relative_to(shared_data / "lidc")), "series_uid": folder.name, "annotations": "[]"}
    hu = load_scan(shared_data / "lidc", row).ct.canonical().array
    found = find_landmarks(hu)
    assert found.lung == pytest.approx(-870, abs=30)
    assert found.tissue == pytest.approx(40, abs=40)
    assert recognised_problem(hu, LIMITS) is None
    for case in ("stored values", "rescaled twice, cut", "[-1, 1]", "grey values of the lung window"):
        spoil, description = SPOILT[case]
        assert re.search(description, recognised_problem(spoil(hu), LIMITS))
