"""NIfTI source: files written here with nibabel, and the 8-bit samples published with Lung-DDPM where they are."""

import gzip
import struct

import nibabel
import numpy as np
import pandas as pd
import pytest

from lungddpm.arms.splits import assign_roles
from lungddpm.cases import read_cases
from lungddpm.config import Config, Roles
from lungddpm.errors import ExcludedCaseError
from lungddpm.layouts import compose
from lungddpm.sources import Cache, index_source, nifti, read_index, write_index

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


def find(top):
    return nifti.find_series(top, Cache(None, "nifti"))


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
    (series,) = find(tmp_path)
    assert (series.case_id, series.size, series.excluded) == (case_id, SHAPE, "")
    assert (series.n_nodules, index_source("nifti", tmp_path)[0]["n_nodules"]) == (None, "")
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
    (series,) = find(tmp_path)
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
    assert index["status"][["a", "good"]].tolist() == ["excluded", "ok"]
    assert index["reason"]["a"].startswith(reason)


NAN = np.where(LABELS > 0, CT, np.float32(np.nan))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"ct": NAN}, "NaN"),
        ({"ct": np.full(SHAPE, 40, np.int16)}, "constant"),
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
    assert find(tmp_path)[0].excluded.startswith("labels/a.nii.gz: cannot be read")


def test_two_images_of_one_stem_stay_apart(tmp_path):
    write_case(tmp_path, image="a.nii.gz")
    write_case(tmp_path)
    assert [series.case_id for series in find(tmp_path)] == ["a", "a_2"]
    assert {series.patient_id for series in find(tmp_path)} == {"a"}


def test_published_samples_are_not_hounsfield(tmp_path, shared_data):
    for folder, name in (("images", "reference"), ("labels", "layout")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "case0.nii.gz").symlink_to(shared_data / "published-samples" / f"case0_{name}.nii.gz")
    with pytest.raises(ExcludedCaseError, match="not in Hounsfield units: it holds 8-bit grey values"):
        compose.build_case(load(tmp_path), Config())


def test_normalised_values_are_not_rounded_away(tmp_path):
    ct = (CT.astype(np.float32) + 1024) / 4096
    write_case(tmp_path, ct=ct)
    np.testing.assert_array_equal(load(tmp_path).ct.array, ct)


def test_roles_do_not_claim_to_know_the_nodules(tmp_path, caplog):
    caplog.set_level("INFO")
    for name in "abc":
        write_case(tmp_path, image=f"{name}.nii.gz", label=f"{name}.nii.gz")
    rows = assign_roles(index_source("nifti", tmp_path), Roles(discovery=1, reference=1, test=1), seed=1)
    assert "role test: 1 patients, nodules not counted yet" in caplog.messages
    write_index(tmp_path / "index.tsv", rows)
    assert read_index(tmp_path / "index.tsv")["n_nodules"].tolist() == [0, 0, 0]


def patch(file, offset, value):
    """Overwrite bytes of a compressed file, such as a field of the header (NIfTI-1, nifti1.h)."""
    content = bytearray(gzip.decompress(file.read_bytes()))
    content[offset : offset + len(value)] = value
    file.write_bytes(gzip.compress(bytes(content)))


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-20])


COLOURS = np.zeros(SHAPE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
SIZES, SROW_X, SROW_Y = 40, 280, 296
LARGE = {"ct": np.tile(CT, (4, 4, 4)), "labels": np.tile(LABELS, (4, 4, 4))}
HUGE = struct.pack("<3h", 32767, 32767, 32767)
# What is written instead of a good pair, what is done to image and label, and the reason: in the index or, after
# "prepare:", in the case table.
FAULTS = {
    "singular affine": ({}, lambda image, label: patch(image, SROW_Y, bytes(16)), "affine that cannot be inverted"),
    "affine that is no number": ({}, lambda image, label: patch(image, SROW_X, b"\0\0\xc0\x7f"), "be inverted"),
    "singular label": ({}, lambda image, label: patch(label, SROW_Y, bytes(16)), "labels/bad.nii.gz: has an affine"),
    "4D": ({"ct": np.stack([CT, CT], -1)}, None, "images/bad.nii.gz: has 4 dimensions"),
    "4D label": ({"labels": np.stack([LABELS] * 2, -1)}, None, "labels/bad.nii.gz: has 4 dimensions"),
    "colours": ({"ct": COLOURS}, None, "holds colours or complex numbers"),
    "half labels": ({"labels": LABELS / np.float32(2)}, None, "prepare:labels hold 0.5"),
    "labels that are no number": ({"labels": np.where(LABELS, LABELS, np.float32("nan"))}, None, "prepare:hold nan"),
    "image cut short": (LARGE, lambda image, label: cut_short(image), "prepare:images/bad.nii.gz: cannot be read"),
    "label cut short": (LARGE, lambda image, label: cut_short(label), "prepare:labels/bad.nii.gz: cannot be read"),
    "empty": ({}, lambda image, label: image.write_bytes(b""), "images/bad.nii.gz: cannot be read"),
    "no NIfTI": ({}, lambda image, label: image.write_bytes(gzip.compress(b"x" * 999)), "cannot be read as NIfTI"),
    "negative size": ({}, lambda image, label: patch(image, SIZES + 2, struct.pack("<h", -5)), "bad.nii.gz: "),
    "no voxels": ({}, lambda image, label: patch(image, SIZES + 2, struct.pack("<h", 0)), "has no voxels"),
    "larger than memory": (
        {}, lambda *both: [patch(file, SIZES + 2, HUGE) for file in both],
        "images/bad.nii.gz: claims (32767, 32767, 32767) voxels, more than 536,870,912",
    ),
    "unknown type": ({}, lambda image, label: patch(image, 70, struct.pack("<h", 77)), "cannot be read as NIfTI"),
    "image alone": ({}, lambda image, label: label.unlink(), "images/bad.nii.gz: has no label labels/bad.nii.gz"),
    "label alone": ({}, lambda image, label: image.unlink(), "labels/bad.nii.gz: has no image"),
    "NaN": ({"ct": np.where(LABELS, CT, np.float32("nan"))}, None, "prepare:NaN"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_told_and_the_good_case_goes_on(tmp_path, fault, monkeypatch):
    options, harm, reason = FAULTS[fault]
    data, results = tmp_path / "data", tmp_path / "results"
    write_case(data, image="good.nii.gz", label="good.nii.gz", labels=LABELS.astype(np.float64))
    write_case(data, image="bad.nii.gz", label="bad.nii.gz", **options)
    if harm:
        harm(data / "images" / "bad.nii.gz", data / "labels" / "bad.nii.gz")
    index = index_source("nifti", data)
    write_index(results / "index.tsv", index)
    # A layout of so few voxels would never pass; all of these faults show before.
    monkeypatch.setattr(compose, "_write", lambda config, source, row, folder: load_only(source, row))
    compose.run_prepare(Config(), results / "index.tsv", data, results, 0, 1, results / "cases-0.tsv")
    table = read_cases(results / "cases-0.tsv").set_index("case_id")
    assert table["status"].to_dict() == {"bad": "excluded", "good": "ok"}
    told = table.loc["bad", "reason"]
    assert reason.removeprefix("prepare:") in told
    assert str(tmp_path) not in told
    assert (index[0]["status"] == "ok") == reason.startswith("prepare:")


def load_only(source, row):
    nifti.load_scan(source, row)
    return {"qc": {"n_nodules": 1}, "sha256": ""}
