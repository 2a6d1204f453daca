"""NIfTI source: files written here with nibabel, and the 8-bit samples published with Lung-DDPM where they are."""

import nibabel
import numpy as np
import pandas as pd
import pytest

from lungddpm.errors import ExcludedCaseError
from lungddpm.sources import index_source, nifti

SHAPE = (8, 7, 6)
AFFINE = np.diag([0.7, 0.8, 2.5, 1.0])
CT = np.random.default_rng(2).integers(-1000, 2000, SHAPE).astype(np.int16)
LABELS = np.random.default_rng(3).integers(0, 4, SHAPE).astype(np.uint8)


def save(path, array, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def write_case(top, ct=CT, labels=LABELS, image="a_0000.nii.gz", label="a.nii.gz", **label_options):
    save(top / "images" / image, ct)
    save(top / "labels" / label, labels, **label_options)


def load(top):
    return nifti.load_scan(top, index_source("nifti", top)[0])


@pytest.mark.parametrize(
    ("image", "label", "case_id"),
    [
        ("a b.nii.gz", "a b.nii.gz", "a_b"),
        ("a_0000.nii.gz", "a.nii.gz", "a"),
        ("a_0000.nii.gz", "a_0000.nii.gz", "a"),
        ("a.nii", "a.nii.gz", "a"),
    ],
)
def test_pairs_by_name(tmp_path, image, label, case_id):
    write_case(tmp_path, image=image, label=label)
    (series,) = nifti.find_series(tmp_path)
    assert (series.case_id, series.size, series.excluded) == (case_id, SHAPE, "")
    np.testing.assert_allclose(series.spacing_mm, (0.7, 0.8, 2.5))
    scan = load(tmp_path)
    np.testing.assert_array_equal(scan.ct.array, CT)
    np.testing.assert_array_equal(scan.labels, LABELS)
    assert scan.files == (tmp_path / "images" / image, tmp_path / "labels" / label)


def test_orientation_becomes_canonical(tmp_path):
    # Stored as (z, -x, y).
    affine = np.array([[0, -0.7, 0, 10], [0, 0, 0.8, 0], [2.5, 0, 0, -5], [0, 0, 0, 1.0]])
    stored_ct, stored_labels = (array[::-1].transpose(2, 0, 1) for array in (CT, LABELS))
    save(tmp_path / "images" / "a.nii.gz", stored_ct, affine)
    save(tmp_path / "labels" / "a.nii.gz", stored_labels, affine)
    (series,) = nifti.find_series(tmp_path)
    assert series.size == SHAPE
    np.testing.assert_allclose(series.spacing_mm, (0.7, 0.8, 2.5))
    scan = load(tmp_path)
    np.testing.assert_array_equal(scan.ct.array, CT)
    np.testing.assert_array_equal(scan.labels, LABELS)
    np.testing.assert_allclose(scan.ct.affine[:3, 3], [10 - 0.7 * 7, 0, -5])


def test_values_outside_int16_hu_are_clamped(tmp_path):
    ct = CT.astype(np.float32) + 0.25
    ct[0, 0, :2] = [-3024, 1e6]
    write_case(tmp_path, ct=ct)
    array = load(tmp_path).ct.array
    assert array.dtype == np.int16
    assert array[0, 0, :2].tolist() == [-1024, 32767]
    np.testing.assert_array_equal(array[1:], CT[1:])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"labels": LABELS[1:]}, "labels/a.nii.gz: has shape (7, 7, 6)"),
        ({"affine": np.diag([0.7, 0.8, 2.6, 1])}, "labels/a.nii.gz: has another affine"),
        ({"label": "b.nii.gz"}, "images/a_0000.nii.gz: has no label"),
        ({"ct": CT[..., None]}, "images/a_0000.nii.gz: has 4 dimensions"),
    ],
)
def test_headers_that_do_not_fit_keep_a_row_with_the_reason(tmp_path, options, reason):
    write_case(tmp_path, **options)
    write_case(tmp_path, image="good.nii.gz", label="good.nii.gz")
    index = pd.DataFrame(index_source("nifti", tmp_path)).set_index("case_id")
    assert index["status"].to_dict() == {"a": "excluded", "good": "ok"}
    assert index["reason"]["a"].startswith(reason)


NAN = np.where(LABELS > 0, CT, np.float32(np.nan))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"ct": NAN}, "NaN"),
        ({"ct": np.full(SHAPE, 40, np.int16)}, "constant"),
        ({"ct": (CT - CT.min()) % 256}, "8-bit grey values"),
        ({"labels": LABELS + 3}, "labels hold 4"),
        ({"labels": LABELS.astype(np.float32) / 2}, "labels hold 0.5"),
    ],
)
def test_contents_that_cannot_be_used_exclude_the_case(tmp_path, options, problem):
    write_case(tmp_path, **options)
    with pytest.raises(ExcludedCaseError, match=problem):
        load(tmp_path)


def test_truncated_file(tmp_path):
    write_case(tmp_path)
    file = tmp_path / "labels" / "a.nii.gz"
    file.write_bytes(file.read_bytes()[:-60])
    with pytest.raises(ExcludedCaseError, match=r"a.nii.gz: cannot be read"):
        load(tmp_path)
    file.write_bytes(b"")
    assert nifti.find_series(tmp_path)[0].excluded.startswith("labels/a.nii.gz: cannot be read")


def test_two_images_of_one_stem_stay_apart(tmp_path):
    write_case(tmp_path, image="a.nii.gz")
    write_case(tmp_path)
    assert [series.case_id for series in nifti.find_series(tmp_path)] == ["a", "a_2"]
    assert {series.patient_id for series in nifti.find_series(tmp_path)} == {"a"}


def test_published_samples_are_not_hounsfield(tmp_path, shared_data):
    for folder, name in (("images", "reference"), ("labels", "layout")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "case0.nii.gz").symlink_to(shared_data / "published-samples" / f"case0_{name}.nii.gz")
    with pytest.raises(ExcludedCaseError, match="Hounsfield"):
        load(tmp_path)
