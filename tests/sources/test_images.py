"""Image files: NIfTI written here with nibabel, and the 8-bit samples published with Lung-DDPM where they are."""

import gzip
import struct

import nibabel
import numpy as np
import pandas as pd
import pytest

from lungddpm.arms.splits import assign_roles
from lungddpm.config.models import Config, Roles
from lungddpm.core.cases import read_cases
from lungddpm.core.errors import ExcludedCaseError
from lungddpm.core.volume import is_sheared, write_volume
from lungddpm.layouts import compose
from lungddpm.layouts.nodules import centroid_mm
from lungddpm.sources import images
from lungddpm.sources.index import Cache, index_source, read_index, write_index

SHAPE = (8, 7, 6)
AFFINE = np.diag([0.7, 0.8, 2.5, 1.0])
CT = np.random.default_rng(2).integers(-1000, 2000, SHAPE).astype(np.int16)
LABELS = np.random.default_rng(8).integers(0, 4, SHAPE).astype(np.uint8)
"""One nodule, without a speck."""


def save(path, array, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def write_case(top, ct=CT, labels=LABELS, image="a_0000.nii.gz", label="a.nii.gz", **label_options):
    save(top / "images" / image, ct)
    save(top / "labels" / label, labels, **label_options)


def find(top):
    return images.find_series(top, Cache(None, "images"))


def load(top):
    return images.load_scan(top, index_source("images", top)[0])


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
    assert (series.n_nodules, index_source("images", tmp_path)[0]["n_nodules"]) == (None, "")
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
        ({"affine": np.diag([0.7, 0.8, 2.6, 1])}, "labels/a.nii.gz: has a different affine"),
        ({"label": "b.nii.gz"}, "images/a_0000.nii.gz: has no label"),
        (
            {"ct": np.stack([CT, CT], -1)},
            "images/a_0000.nii.gz: has 4 dimensions instead of 3 (its shape is (8, 7, 6, 2)",
        ),
        ({"ct": np.stack([CT] * 3, -1)[:, :, :, None]}, "images/a_0000.nii.gz: has 5 dimensions instead of 3"),
        ({"labels": LABELS[:, :, 0]}, "labels/a.nii.gz: has 2 dimensions instead of 3"),
    ],
)
def test_headers_that_do_not_fit_keep_a_row_with_the_reason(tmp_path, options, reason):
    write_case(tmp_path, **options)
    write_case(tmp_path, image="good.nii.gz", label="good.nii.gz")
    index = pd.DataFrame(index_source("images", tmp_path)).set_index("case_id")
    assert index["status"][["a", "good"]].tolist() == ["excluded", "ok"]
    assert index["reason"]["a"].startswith(reason)


NAN = np.where(LABELS > 0, CT, np.float32(np.nan))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"ct": NAN}, "NaN"),
        ({"ct": np.full(SHAPE, 40, np.int16)}, "constant"),
        ({"labels": LABELS + 3}, "labels contain 4"),
        ({"labels": LABELS.astype(np.float32) / 2}, "labels contain 0.5"),
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


TAILS = {"none": b"", "zeros": bytes(100), "junk": b"junk" * 9, "another member": gzip.compress(bytes(100))}


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
def test_what_follows_the_voxels_is_ignored(tmp_path, tail):
    write_case(tmp_path)
    file = tmp_path / "images" / "a_0000.nii.gz"
    content = gzip.decompress(file.read_bytes())
    # In two parts, as some tools pack in blocks.
    file.write_bytes(gzip.compress(content[:500]) + gzip.compress(content[500:]) + tail)
    expect(load(tmp_path))


def test_two_images_of_one_name_are_excluded(tmp_path):
    write_case(tmp_path, image="a.nii.gz")
    write_case(tmp_path)
    assert [(series.case_id, series.excluded) for series in find(tmp_path)] == [
        ("a", "images/a.nii.gz: exists more than once (images/a_0000.nii.gz). Keep one copy of it."),
        ("a_2", "images/a_0000.nii.gz: exists more than once (images/a.nii.gz). Keep one copy of it."),
    ]


def test_a_label_spelled_in_another_case_than_its_image_is_a_missing_pair(tmp_path):
    write_case(tmp_path, image="Anna.nii.gz", label="anna.nii.gz")
    write_case(tmp_path, image="ben.nii.gz", label="ben.nii.gz")
    rows = {row["path"]: row for row in index_source("images", tmp_path)}
    assert rows["images/ben.nii.gz"]["status"] == "ok"
    assert rows["images/Anna.nii.gz"]["reason"].startswith("images/Anna.nii.gz: has no label labels/Anna.nii.gz")
    assert rows["labels/anna.nii.gz"]["reason"].startswith("labels/anna.nii.gz: has no image of its name")
    # A label alone is not a scan of any patient.
    assert [rows[path]["patient_id"] for path in ("images/Anna.nii.gz", "labels/anna.nii.gz")] == ["Anna", ""]


def test_published_samples_are_not_hounsfield(tmp_path, shared_data):
    for folder, name in (("images", "reference"), ("labels", "layout")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "case0.nii.gz").symlink_to(shared_data / "published-samples" / f"case0_{name}.nii.gz")
    with pytest.raises(ExcludedCaseError, match="not in Hounsfield units: it has 8-bit grey values"):
        compose.build_case(load(tmp_path), Config())


def test_metal_and_padding_together_do_not_overflow(tmp_path):
    ct = CT.copy()
    ct[0, 0, :2] = [-3024, 31000]
    write_case(tmp_path, ct=ct)
    assert load(tmp_path).ct.array[0, 0, :2].tolist() == [-1024, 31000]


def test_normalised_values_are_not_rounded_away(tmp_path):
    ct = (CT.astype(np.float32) + 1024) / 4096
    write_case(tmp_path, ct=ct)
    np.testing.assert_array_equal(load(tmp_path).ct.array, ct)


def test_roles_do_not_claim_to_know_the_nodules(tmp_path, caplog):
    caplog.set_level("INFO")
    for name in "abc":
        write_case(tmp_path, image=f"{name}.nii.gz", label=f"{name}.nii.gz")
    rows = assign_roles(index_source("images", tmp_path), Roles(discovery=1, reference=1, test=1), seed=1)
    assert "role test: 1 patient, nodules not counted yet" in caplog.messages
    write_index(tmp_path / "index.tsv", rows)
    assert read_index(tmp_path / "index.tsv")["n_nodules"].tolist() == [0, 0, 0]


def patch(file, offset, value):
    """Overwrite bytes of a compressed file, such as a field of the header (NIfTI-1, nifti1.h)."""
    content = bytearray(gzip.decompress(file.read_bytes()))
    content[offset : offset + len(value)] = value
    file.write_bytes(gzip.compress(bytes(content)))


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-20])


def flip_a_bit(file):
    """Of one voxel; only gzip's checksum can tell, as every value is possible."""
    packed = bytearray(gzip.compress(gzip.decompress(file.read_bytes()), compresslevel=0))  # bytes as they are
    packed[-100] ^= 1
    file.write_bytes(packed)


COLOURS = np.zeros(SHAPE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
SIZES, PIXDIM, SLOPE, UNITS, SROW_X, SROW_Y = 40, 76, 112, 123, 280, 296
LARGE = {"ct": np.tile(CT, (4, 4, 4)), "labels": np.tile(LABELS, (4, 4, 4))}
HUGE = struct.pack("<3h", 32767, 32767, 32767)
# What is written instead of a good pair, what is done to image and label, and the reason: in the index or, after
# "prepare:", in the case table.
ERRORS = {
    "singular affine": ({}, lambda image, label: patch(image, SROW_Y, bytes(16)), "affine that cannot be inverted"),
    "affine that is not a number": ({}, lambda image, label: patch(image, SROW_X, b"\0\0\xc0\x7f"), "be inverted"),
    "singular label": ({}, lambda image, label: patch(label, SROW_Y, bytes(16)), "labels/bad.nii.gz: has an affine"),
    "4D": ({"ct": np.stack([CT, CT], -1)}, None, "images/bad.nii.gz: has 4 dimensions"),
    "4D label": ({"labels": np.stack([LABELS] * 2, -1)}, None, "labels/bad.nii.gz: has 4 dimensions"),
    "colours": ({"ct": COLOURS}, None, "has colours or complex numbers"),
    "half labels": ({"labels": LABELS / np.float32(2)}, None, "prepare:labels contain 0.5"),
    "labels with NaN": ({"labels": np.where(LABELS, LABELS, np.float32("nan"))}, None, "prepare:contain nan"),
    "image truncated": (LARGE, lambda image, label: cut_short(image), "prepare:images/bad.nii.gz: cannot be read"),
    "label truncated": (LARGE, lambda image, label: cut_short(label), "prepare:labels/bad.nii.gz: cannot be read"),
    "image damaged": (LARGE, lambda image, label: flip_a_bit(image), "prepare:images/bad.nii.gz: cannot be read"),
    "label damaged": (LARGE, lambda image, label: flip_a_bit(label), "prepare:labels/bad.nii.gz: cannot be read"),
    "small image damaged": ({}, lambda image, label: flip_a_bit(image), "prepare:images/bad.nii.gz: cannot be read"),
    "far more than the voxels": (
        {}, lambda image, label: append_packed(image, 600), "prepare:unpacks to far more than its header claims",
    ),
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


def append_packed(file, mebibytes):
    """Further members of gzip, of zeros; a reader takes them for the end of the same content."""
    file.write_bytes(file.read_bytes() + mebibytes * gzip.compress(bytes(1 << 20)))


@pytest.mark.parametrize("error", ERRORS)
def test_each_error_is_reported_and_the_good_case_continues(tmp_path, error, monkeypatch):
    options, harm, reason = ERRORS[error]
    data, results = tmp_path / "data", tmp_path / "results"
    write_case(data, image="good.nii.gz", label="good.nii.gz", labels=LABELS.astype(np.float64))
    write_case(data, image="bad.nii.gz", label="bad.nii.gz", **options)
    if harm:
        harm(data / "images" / "bad.nii.gz", data / "labels" / "bad.nii.gz")
    index = index_source("images", data)
    write_index(results / "index.tsv", index)
    # A layout of so few voxels would never pass; all of these errors are found before that.
    monkeypatch.setattr(compose, "_write", lambda config, source, row, folder: load_only(source, row))
    compose.run_prepare(Config(), results / "index.tsv", data, results, 0, 1, results / "cases-0.tsv")
    table = read_cases(results / "cases-0.tsv").set_index("case_id")
    assert table["status"].to_dict() == {"bad": "excluded", "good": "ok"}
    reported = table.loc["bad", "reason"]
    assert reason.removeprefix("prepare:") in reported
    assert str(tmp_path) not in reported
    (row,) = (row for row in index if row["case_id"] == "bad")
    assert (row["status"] == "ok") == reason.startswith("prepare:")


def load_only(source, row):
    images.load_scan(source, row)
    return {"qc": {"n_nodules": 1}, "sha256": ""}


def expect(scan, ct=CT, labels=LABELS, affine=AFFINE):
    np.testing.assert_array_equal(scan.ct.array, ct)
    np.testing.assert_array_equal(scan.labels, labels)
    np.testing.assert_allclose(scan.ct.affine, affine, atol=1e-4)
    assert scan.ct.array.dtype == np.int16
    assert scan.ct.array.dtype.isnative
    assert scan.labels.dtype == np.uint8


@pytest.mark.parametrize("odd", [(1,), (1, 1)])
@pytest.mark.parametrize("which", ["ct", "labels", "both"])
def test_dimensions_of_length_one_are_dropped_and_noted(tmp_path, odd, which):
    ct = CT.reshape(SHAPE + odd) if which != "labels" else CT
    labels = LABELS.reshape(SHAPE + odd) if which != "ct" else LABELS
    write_case(tmp_path, ct=ct, labels=labels)
    scan = load(tmp_path)
    expect(scan)
    assert len(scan.notes) == (2 if which == "both" else 1)
    assert all("dimensions of length 1 were dropped" in note for note in scan.notes)


LOW, HIGH = np.nextafter(np.float32(1), np.float32(0)), 1.0000001
FLOAT_LABELS = {
    "a hair below and above": lambda labels: np.choose(labels, [0, LOW, 1.9999998, 3.0000002]).astype(np.float32),
    "float64": lambda labels: np.choose(labels, [-1e-7, HIGH, 2.0000001, 2.9999999]),
    "almost a thousandth": lambda labels: np.choose(labels, [0.0009, 1.0009, 1.9991, 3.0009]),
    "int16": lambda labels: labels.astype(np.int16),
    "big-endian": lambda labels: labels.astype(">f4"),
}  # fmt: skip


@pytest.mark.parametrize("case", FLOAT_LABELS)
def test_labels_beside_whole_numbers_are_those_numbers(tmp_path, case):
    write_case(tmp_path, labels=FLOAT_LABELS[case](LABELS))
    expect(load(tmp_path))


@pytest.mark.parametrize("header_type", [np.int16, np.uint8, np.int8])
@pytest.mark.parametrize("largest", [1, 2, 3])
def test_float_labels_that_were_scaled_into_an_integer_header(tmp_path, header_type, largest):
    write_case(tmp_path)
    labels, file = np.minimum(LABELS, largest), tmp_path / "labels" / "a.nii.gz"
    header = nibabel.Nifti1Image(LABELS.astype(header_type), AFFINE).header
    nibabel.save(nibabel.Nifti1Image(labels.astype(np.float64), AFFINE, header), file)
    assert nibabel.load(file).dataobj.slope != 1
    expect(load(tmp_path), labels=labels)


@pytest.mark.parametrize("value", [1.002, 0.5, -1, 4, 256, 300.0, np.nan, np.inf])
def test_labels_with_invalid_values_are_reported(tmp_path, value):
    labels = LABELS.astype(np.float64)
    labels[3, 3, 3] = value
    write_case(tmp_path, labels=labels)
    with pytest.raises(
        ExcludedCaseError, match=f"labels contain {value:g}, allowed are 0 background, 1 lung, 2 nodule, 3 vessel"
    ):
        load(tmp_path)


def write_with(file, array, sform=None, qform=None, codes=(1, 1)):
    """With exactly these affines in the header."""
    image = nibabel.Nifti1Image(array, None)
    image.header.set_zooms(AFFINE.diagonal()[:3])
    image.set_sform(sform, codes[0] if sform is not None else 0)
    image.set_qform(qform, codes[1] if qform is not None else 0)
    file.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, file)


def moved(mm):
    affine = AFFINE.copy()
    affine[:3, 3] += mm
    return affine


NOTHING = np.zeros((4, 4))
NOTHING[3, 3] = 1
CENTRED = np.array([[1, 0, 0, -3.5], [0, 1, 0, -3], [0, 0, 1, -2.5], [0, 0, 0, 1]])
RULES = {
    "both agree": ({"sform": AFFINE, "qform": AFFINE}, AFFINE, ""),
    "only sform": ({"sform": AFFINE}, AFFINE, ""),
    "only qform": ({"qform": AFFINE}, AFFINE, ""),
    "rounded": ({"sform": AFFINE, "qform": moved(0.02)}, AFFINE, ""),
    "they disagree": ({"sform": moved(7), "qform": AFFINE}, moved(7), "disagree by up to 7 mm: the sform is used"),
    "sform of nothing": ({"sform": NOTHING, "qform": AFFINE}, AFFINE, "only its qform is invertible"),
    # The middle of 8 x 7 x 6 voxels is the origin.
    "neither": ({}, AFFINE @ CENTRED, "neither sform nor qform is set"),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_which_affine_holds(tmp_path, rule):
    header, affine, note = RULES[rule]
    for folder, array in (("images", CT), ("labels", LABELS)):
        write_with(tmp_path / folder / "a.nii.gz", array, **header)
    scan = load(tmp_path)
    if rule == "neither":
        # x points to the left: the first voxel is the rightmost.
        expect(scan, CT[::-1], LABELS[::-1], affine)
    else:
        expect(scan, affine=affine)
    assert (note in scan.notes[0]) if note else scan.notes == ()


@pytest.mark.parametrize("role", ["images", "labels"])
@pytest.mark.parametrize("coded", [{}, {"qform": AFFINE}])
def test_a_header_without_voxel_size_is_refused(tmp_path, coded, role):
    for folder, array in (("images", CT), ("labels", LABELS)):
        write_with(tmp_path / folder / "a.nii.gz", array, **coded)
    patch(tmp_path / role / "a.nii.gz", PIXDIM + 3 * 4, bytes(4))
    reason = find(tmp_path)[0].excluded
    assert reason.startswith(f"{role}/a.nii.gz: has no voxel size (pixdim is 0.7, 0.8, 0). Write the file with")


def test_an_sform_gives_the_voxel_size_where_pixdim_does_not(tmp_path):
    for folder, array in (("images", CT), ("labels", LABELS)):
        write_with(tmp_path / folder / "a.nii.gz", array, sform=moved(7), qform=AFFINE)
        patch(tmp_path / folder / "a.nii.gz", PIXDIM + 4, bytes(12))
    scan = load(tmp_path)
    expect(scan, affine=moved(7))
    assert scan.notes == ()


UNIT_CODES = {"unknown": (0, 1.0), "metre": (1, 1000.0), "millimetre": (2, 1.0), "micron": (3, 0.001), "none": (7, 1.0)}


@pytest.mark.parametrize("unit", UNIT_CODES)
@pytest.mark.parametrize("coded", ["sform", "qform", "neither"])
def test_lengths_are_converted_to_mm(tmp_path, unit, coded):
    code, mm = UNIT_CODES[unit]
    stored = np.diag([*AFFINE.diagonal()[:3] / mm, 1.0])
    write_with(tmp_path / "images" / "a.nii.gz", CT, sform=stored if coded == "sform" else None)
    image = tmp_path / "images" / "a.nii.gz"
    patch(image, PIXDIM + 4, struct.pack("<3f", *stored.diagonal()[:3]))
    patch(image, UNITS, bytes([code + 8]))  # with seconds
    if coded == "qform":
        patch(image, 252, struct.pack("<h", 1))
    write_with(tmp_path / "labels" / "a.nii.gz", LABELS, sform=None if coded == "neither" else AFFINE)
    (series,) = find(tmp_path)
    assert series.excluded == ""
    np.testing.assert_allclose(series.spacing_mm, AFFINE.diagonal()[:3], rtol=1e-5)
    notes = " ".join(load(tmp_path).notes)
    assert ("its lengths were converted to mm" in notes) == (mm != 1)


PAIRS = {
    "label has a qform only": ({"sform": moved(3), "qform": moved(3)}, {"qform": moved(3)}),
    "label has the CT's qform": ({"sform": moved(9), "qform": AFFINE}, {"qform": AFFINE}),
    "CT has a qform only": ({"qform": AFFINE}, {"sform": AFFINE}),
    "label is rounded": ({"sform": AFFINE}, {"sform": AFFINE + np.diag([0.004, -0.004, 0.03, 0])}),
}  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS)
def test_labels_whose_header_says_less_or_was_rounded(tmp_path, pair):
    ours, theirs = PAIRS[pair]
    write_with(tmp_path / "images" / "a.nii.gz", CT, **ours)
    write_with(tmp_path / "labels" / "a.nii.gz", LABELS, **theirs)
    assert find(tmp_path)[0].excluded == ""
    expect(load(tmp_path), affine=ours.get("sform", ours.get("qform")))


def test_labels_stored_along_other_axes_are_turned(tmp_path):
    write_with(tmp_path / "images" / "a.nii.gz", CT, sform=moved(9), qform=AFFINE)
    turn = np.array([[0, -1, 0, 7], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])
    stored = LABELS.transpose(2, 0, 1)[:, ::-1]
    write_with(tmp_path / "labels" / "a.nii.gz", stored, qform=AFFINE @ turn)
    expect(load(tmp_path), affine=moved(9))


def test_labels_half_a_millimetre_beside_are_refused(tmp_path):
    write_with(tmp_path / "images" / "a.nii.gz", CT, sform=AFFINE)
    write_with(tmp_path / "labels" / "a.nii.gz", LABELS, sform=moved(0.5))
    assert "has a different affine" in find(tmp_path)[0].excluded


@pytest.mark.parametrize("slope", [0.0, float("nan")])
def test_an_invalid_slope_scales_nothing(tmp_path, slope):
    write_case(tmp_path)
    patch(tmp_path / "images" / "a_0000.nii.gz", SLOPE, struct.pack("<f", slope))
    expect(load(tmp_path))


def test_big_endian_files(tmp_path):
    for folder, array in (("images", CT), ("labels", LABELS)):
        image = nibabel.Nifti1Image(array, AFFINE, nibabel.Nifti1Header(endianness=">"))
        image.set_data_dtype(array.dtype.newbyteorder(">"))
        (tmp_path / folder).mkdir()
        nibabel.save(image, tmp_path / folder / "a.nii.gz")
    assert gzip.decompress((tmp_path / "images" / "a.nii.gz").read_bytes())[:4] == b"\0\0\x01\x5c"
    expect(load(tmp_path))


BALL = (60, 52, 30)


def sheared_ball(plane_tilts, flips):
    """A ball of 12 mm of label 2 in soft tissue, on a grid that a gantry tilted by 18 degrees leaves."""
    angle = np.radians(18)
    affine = np.diag([1.5, 1.5, 2.5, 1.0])
    lean = [0, np.cos(angle), np.sin(angle)] if plane_tilts else [0, np.sin(angle), np.cos(angle)]
    affine[:3, 1 if plane_tilts else 2] = np.array(lean) * affine[1 if plane_tilts else 2, 1 if plane_tilts else 2]
    affine = affine @ np.diag([*flips, 1.0])
    centre = (affine @ [28.3, 25.1, 15.4, 1])[:3]
    places = np.moveaxis(np.indices(BALL), 0, -1) @ affine[:3, :3].T + affine[:3, 3]
    ball = np.linalg.norm(places - centre, axis=-1) < 12
    return affine, centre, np.where(ball, 40, -800).astype(np.int16), np.where(ball, 2, 1).astype(np.uint8)


@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, -1, 1)])
@pytest.mark.parametrize("plane_tilts", [True, False])
@pytest.mark.parametrize("label_header", ["sform", "qform", "both"])
def test_sheared_axes_become_upright_with_everything_at_its_place(tmp_path, plane_tilts, flips, label_header):
    affine, centre, ct, labels = sheared_ball(plane_tilts, flips)
    write_with(tmp_path / "images" / "a.nii.gz", ct, sform=affine, qform=affine)
    stored = {"sform": affine, "qform": affine} if label_header == "both" else {label_header: affine}
    write_with(tmp_path / "labels" / "a.nii.gz", labels, **stored)
    assert find(tmp_path)[0].excluded == ""
    scan = load(tmp_path)
    axes = scan.ct.affine[:3, :3] / scan.ct.spacing_mm
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-9)
    assert scan.labels.shape == scan.ct.shape
    # The nearest of voxels of 1.5 mm.
    np.testing.assert_allclose(centroid_mm(scan.ct.like(scan.labels == 2)), centre, atol=0.2)
    weight = np.clip(scan.ct.array + 800, 0, None)
    index = np.array([(axis * weight).sum() for axis in np.indices(weight.shape)]) / weight.sum()
    np.testing.assert_allclose((scan.ct.affine @ [*index, 1])[:3], centre, atol=0.05)
    volume_mm3 = np.count_nonzero(scan.labels == 2) * scan.ct.voxel_mm3
    assert volume_mm3 == pytest.approx(4 / 3 * np.pi * 12**3, rel=0.03)
    assert set(np.unique(scan.labels)) == {0, 1, 2}
    assert scan.ct.array.min() == -1024
    write_volume(tmp_path / "written.nii.gz", scan.ct)
    written = nibabel.load(tmp_path / "written.nii.gz")
    np.testing.assert_allclose(written.get_sform(), written.get_qform(), atol=1e-4)
    assert any("sheared by 18.0 degrees (tilted gantry)" in note for note in scan.notes)
    assert any("sform and qform disagree" in note for note in scan.notes)


def test_sheared_values_that_are_not_hounsfield_keep_their_range(tmp_path):
    affine, _, ct, labels = sheared_ball(True, (1, 1, 1))
    write_with(tmp_path / "images" / "a.nii.gz", ((ct + 1024) / 4095).astype(np.float32), sform=affine)
    write_with(tmp_path / "labels" / "a.nii.gz", labels, sform=affine)
    scan = load(tmp_path)
    assert not is_sheared(scan.ct.affine)
    assert scan.ct.array.shape == scan.labels.shape
    assert scan.ct.array.min() == pytest.approx(224 / 4095)
    assert scan.ct.array.max() <= 1064 / 4095 + 1e-6


def test_axes_that_are_only_rotated_stay_as_they_are(tmp_path):
    angle = np.radians(12)
    about_x = np.eye(4)
    about_x[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    oblique = about_x @ AFFINE
    write_with(tmp_path / "images" / "a.nii.gz", CT, sform=oblique, qform=oblique)
    write_with(tmp_path / "labels" / "a.nii.gz", LABELS, sform=np.round(oblique, 3))
    scan = load(tmp_path)
    expect(scan, affine=oblique)
    assert scan.notes == ()


def test_a_shear_without_end_is_reported(tmp_path):
    affine = np.diag([1e-6, 1.0, 1e6, 1.0])
    affine[0, 2] = 1e6
    write_case(tmp_path)
    save(tmp_path / "images" / "a_0000.nii.gz", CT, affine)
    assert "sheared by 45 degrees, too much" in find(tmp_path)[0].excluded
