"""Cases as DICOM: read back with SimpleITK, by hand, with highdicom's tables of the standard, and by our own source."""

import itertools
import sys

import numpy as np
import pytest
import SimpleITK
from highdicom._standard_utils import check_required_attributes, get_iod_module_map
from pydicom import dcmread
from pydicom.pixels import unpack_bits
from pydicom.uid import CTImageStorage, SegmentationStorage
from typer.testing import CliRunner

from lungddpm import cli
from lungddpm.core.cases import CaseFolder, write_cases
from lungddpm.core.errors import InputError, OutputError, UserError
from lungddpm.core.files import write_json
from lungddpm.core.labels import Label
from lungddpm.core.volume import Volume, read_volume, write_volume
from lungddpm.operations.export import export_dicom
from lungddpm.sources import lidc
from lungddpm.sources.index import index_source

SHAPE = (9, 7, 5)
NAME = "SYNTHETIC-lung_ddpm-P-1_s000"
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0])


def turned(degrees, axis):
    """A rotation about an axis of the patient."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    one, other = {0: (1, 2), 1: (2, 0), 2: (0, 1)}[axis]
    matrix = np.eye(3)
    matrix[[one, one, other, other], [one, other, one, other]] = c, -s, s, c
    return matrix


UPRIGHT = np.diag([0.703125, 0.8, 2.5])
AXES = {
    "upright": UPRIGHT,
    "flipped": UPRIGHT @ np.diag([-1, -1, -1]),
    "mirrored": UPRIGHT @ np.diag([-1, 1, 1]),
    "oblique": turned(20, 0) @ turned(-12, 1) @ turned(7, 2) @ UPRIGHT,
    "oblique and flipped": turned(20, 0) @ turned(33, 2) @ UPRIGHT @ np.diag([-1, -1, 1]),
}


def affine_of(axes):
    affine = np.eye(4)
    affine[:3, :3] = axes
    affine[:3, 3] = -123.456789012, 45.678, 1 / 3
    return affine


def write_case(top, axes=UPRIGHT, *, seed=0, synthetic=True, hu=None, name="P-1_s000", **record):
    """A case of noise that reaches both ends of 16 bits, with scattered labels."""
    rng = np.random.default_rng(seed)
    if hu is None:
        hu = rng.integers(-1024, 3072, SHAPE).astype(np.int16)
        hu.flat[:2] = -32768, 32767
    labels = rng.choice([0, 0, 1, 2, 3], SHAPE).astype(np.uint8)
    labels[..., 0] = labels[0] = 0
    folder = CaseFolder(top / name)
    write_volume(folder.ct, Volume(hu, affine_of(axes)))
    write_volume(folder.layout, Volume(labels, affine_of(axes)))
    if synthetic:
        made = {"sample_id": name, "generator": "lung_ddpm", "layout_origin": "placed", "fingerprint": "f00"}
        write_json(folder.sample_record, made | {"reference_case_id": "P-1", "sha256": folder.hash()} | record)
    else:
        made = {"case_id": name, "patient_id": "P-1", "series_uid": "1.2.3"}
        write_json(folder.record, made | {"sha256": folder.hash()} | record)
    return folder


def write_prediction(folder, case, mask):
    write_volume(folder / f"{case.path.name}.nii.gz", read_volume(case.layout).like(mask.astype(np.uint8)))


def places_lps(volume, chosen):
    """Where these voxels lie, (n, 3), in mm."""
    at = np.argwhere(chosen) @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    return at @ RAS_TO_LPS


def in_order(places):
    return places[np.lexsort(np.round(places, 4).T)]


def segments(path):
    """Places, (n, 3), of the voxels of each segment by its label: PS3.3, C.7.6.2.1.1, frame by frame."""
    seg = dcmread(path)
    shape = int(seg.NumberOfFrames), seg.Rows, seg.Columns
    frames = unpack_bits(seg.PixelData)[: np.prod(shape)].reshape(shape)
    (shared,) = seg.SharedFunctionalGroupsSequence
    along = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float).reshape(2, 3)
    row_mm, column_mm = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
    found = {int(segment.SegmentNumber): [] for segment in seg.SegmentSequence}
    for frame, groups in zip(frames, seg.PerFrameFunctionalGroupsSequence, strict=True):
        rows, columns = np.nonzero(frame)
        first = np.array(groups.PlanePositionSequence[0].ImagePositionPatient, float)
        identified = groups if "SegmentIdentificationSequence" in groups else shared
        number = int(identified.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        found[number].append(first + np.outer(columns * column_mm, along[0]) + np.outer(rows * row_mm, along[1]))
    return {segment.SegmentLabel: np.concatenate(found[int(segment.SegmentNumber)]) for segment in seg.SegmentSequence}


def slices(folder):
    return [dcmread(file) for file in sorted((folder / "CT").glob("*.dcm"))]


def contents(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*.dcm")}


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_simpleitk_finds_every_hu_at_its_place(tmp_path, axes):
    case = write_case(tmp_path, axes)
    export_dicom([case.path], tmp_path / "out")
    folder = str(tmp_path / "out" / NAME / "CT")
    image = SimpleITK.ReadImage(SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(folder))
    written = read_volume(case.ct)
    assert sorted(image.GetSize()) == sorted(written.shape)
    for index in itertools.product(*map(range, written.shape)):
        place = (written.affine @ [*index, 1])[:3] @ RAS_TO_LPS
        at = image.TransformPhysicalPointToContinuousIndex(place)
        assert at == pytest.approx(np.rint(at), abs=1e-6)
        assert image[[round(x) for x in at]] == written.array[index]
    assert np.sort(image.GetSpacing()) == pytest.approx(np.sort(written.spacing_mm), abs=1e-9)


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_layout_and_prediction_lie_where_they_were(tmp_path, axes):
    case = write_case(tmp_path, axes)
    layout = read_volume(case.layout)
    drawn = np.random.default_rng(5).random(layout.shape) < 0.1
    write_prediction(tmp_path / "real/fold0_seed1/predictions", case, drawn)
    export_dicom([case.path], tmp_path / "out", [tmp_path / "real/fold0_seed1/predictions"])
    found = segments(tmp_path / "out" / NAME / "SEG/layout.dcm")
    found |= {"prediction": segments(tmp_path / "out" / NAME / "SEG/real_fold0_seed1.dcm")["nodule"]}
    expected = {label.name.lower(): layout.array == label for label in Label if label} | {"prediction": drawn}
    assert list(found) == list(expected)
    for name, chosen in expected.items():
        np.testing.assert_allclose(in_order(found[name]), in_order(places_lps(layout, chosen)), atol=1e-6)


def test_our_own_source_reads_the_export_of_a_real_case(tmp_path):
    """As if it were a scan of LIDC-IDRI as IDC has it, the segment renamed to an annotation."""
    case = write_case(tmp_path / "case", AXES["oblique"], synthetic=False, name="P-1-a")
    layout = read_volume(case.layout)
    write_prediction(tmp_path / "real/fold0_seed1/predictions", case, layout.array == Label.NODULE)
    export_dicom([case.path], tmp_path / "out", [tmp_path / "real/fold0_seed1/predictions"])
    (tmp_path / "out" / "P-1-a" / "SEG/layout.dcm").unlink()
    seg = dcmread(tmp_path / "out" / "P-1-a" / "SEG/real_fold0_seed1.dcm")
    seg.SegmentSequence[0].SegmentLabel = "Nodule 1 - Annotation 7"
    seg.save_as(tmp_path / "out" / "P-1-a" / "SEG/real_fold0_seed1.dcm")
    (row,) = index_source("lidc", tmp_path / "out")
    scan = lidc.load_scan(tmp_path / "out", row)
    ct = scan.ct.canonical()
    # Below air it takes values for padding.
    np.testing.assert_array_equal(ct.array, np.maximum(read_volume(case.ct).array, -1024))
    np.testing.assert_allclose(ct.affine, layout.affine, atol=1e-9)
    (annotation,) = scan.annotations
    mask = np.zeros(scan.ct.shape, bool)
    box = zip(annotation.region.corner, annotation.region.mask.shape, strict=True)
    mask[tuple(slice(first, first + n) for first, n in box)] = annotation.region.mask
    np.testing.assert_array_equal(scan.ct.like(mask).canonical().array, layout.array == Label.NODULE)


def test_our_own_source_takes_no_synthetic_ct_for_a_scan(tmp_path):
    synthetic, real = write_case(tmp_path), write_case(tmp_path, synthetic=False, name="P-1-a")
    export_dicom([synthetic.path, real.path], tmp_path / "out")
    reasons = {row["path"]: row["reason"] for row in index_source("lidc", tmp_path / "out") if row["path"]}
    assert f"{NAME}/CT/0001.dcm: is marked as synthetic CT" in reasons[f"{NAME}/CT"]
    assert "synthetic" not in reasons["P-1-a/CT"]


def test_viewers_show_slices_upright(tmp_path):
    """Rows to the patient's left, columns to the back, slices from feet to head, whatever the file had."""
    for name, axes in AXES.items():
        case = write_case(tmp_path / name, axes)
        export_dicom([case.path], tmp_path / name / "out")
        images = slices(tmp_path / name / "out" / NAME)
        row, column = np.array(images[0].ImageOrientationPatient, float).reshape(2, 3)
        assert (row.argmax(), column.argmax()) == (0, 1)
        assert images[0].ImagePositionPatient[2] < images[-1].ImagePositionPatient[2]
        assert [int(image.InstanceNumber) for image in images] == [1, 2, 3, 4, 5]


def test_synthetic_ct_is_called_so_wherever_a_viewer_looks(tmp_path):
    case = write_case(tmp_path)
    export_dicom([case.path], tmp_path / "out")
    images = slices(tmp_path / "out" / NAME)
    seg = dcmread(tmp_path / "out" / NAME / "SEG/layout.dcm")
    for image in images:
        assert image.ImageType[:2] == ["DERIVED", "SECONDARY"]
        shown = (image.PatientName, image.PatientID, image.SeriesDescription, image.ImageComments)
        assert all("SYNTHETIC" in str(text) for text in (*shown, image.DerivationDescription, image.PatientComments))
        assert "P-1" in image.DerivationDescription
        assert "not for clinical use" in image.StudyDescription
        assert image.DerivationCodeSequence[0].CodeMeaning == "Synthetic CT"
    for dataset in (*images, seg):
        assert dataset.SyntheticData == "YES"
        unknown = ("StudyDate", "StudyTime", "AccessionNumber", "PatientBirthDate", "PatientSex")
        assert not any(dataset[keyword].value for keyword in unknown)
        assert dataset.PatientID == NAME
        assert dataset.StudyInstanceUID == images[0].StudyInstanceUID
        assert dataset.FrameOfReferenceUID == images[0].FrameOfReferenceUID


def test_real_cases_keep_their_patient_and_are_derived(tmp_path):
    case = write_case(tmp_path, synthetic=False, name="P-1-a")
    export_dicom([case.path], tmp_path / "out")
    image = slices(tmp_path / "out/P-1-a")[0]
    assert (image.PatientID, str(image.PatientName)) == ("P-1", "P-1^")
    assert image.ImageType[:2] == ["DERIVED", "SECONDARY"]
    assert "SyntheticData" not in image
    assert "series 1.2.3" in image.DerivationDescription
    assert image.DerivationCodeSequence[0].CodeMeaning == "Spatial resampling"
    assert image.SeriesInstanceUID != "1.2.3"


@pytest.mark.parametrize(("source", "computed"), [("phantom", True), ("lidc", False), ("of a colleague", False)])
def test_patients_that_a_source_computes_are_called_so(tmp_path, source, computed):
    case = write_case(tmp_path, synthetic=False, name="P-1-a")
    sizes = {f"size_{axis}": 1 for axis in "xyz"} | {f"spacing_{axis}_mm": 1.0 for axis in "xyz"} | {"n_nodules": 0}
    write_cases(tmp_path / "cases.tsv", [{"case_id": "P-1-a", "path": "P-1-a", "source": source, **sizes}])
    export_dicom([case.path], tmp_path / "out")
    image = slices(tmp_path / "out/P-1-a")[0]
    assert (image.get("SyntheticData") == "YES") is computed
    assert ("not a patient" in image.SeriesDescription) is computed


def test_segments_have_standard_codes_and_say_who_drew_them(tmp_path):
    """Codes as in CID 7150 and 7151; Nodule is what LIDC-IDRI's readings have in the Imaging Data Commons."""
    case = write_case(tmp_path)
    write_prediction(tmp_path / "mine", case, read_volume(case.layout).array == Label.NODULE)
    export_dicom([case.path], tmp_path / "out", [tmp_path / "mine"])
    layout, prediction = (dcmread(tmp_path / "out" / NAME / "SEG" / f"{name}.dcm") for name in ("layout", "mine"))

    def facts(segment):
        (kind,) = segment.SegmentedPropertyTypeCodeSequence
        return segment.SegmentLabel, kind.CodeValue, kind.CodingSchemeDesignator, segment.SegmentAlgorithmType

    assert [facts(segment) for segment in layout.SegmentSequence] == [
        ("lung", "39607008", "SCT", "AUTOMATIC"),
        ("nodule", "27925004", "SCT", "SEMIAUTOMATIC"),
        ("vessel", "59820001", "SCT", "AUTOMATIC"),
    ]
    (segment,) = prediction.SegmentSequence
    assert facts(segment) == ("nodule", "27925004", "SCT", "AUTOMATIC")
    assert segment.SegmentAlgorithmName == "mine"
    of_ct = slices(tmp_path / "out" / NAME)
    for seg in (layout, prediction):
        (referenced,) = seg.ReferencedSeriesSequence
        assert referenced.SeriesInstanceUID == of_ct[0].SeriesInstanceUID
        named = {item.ReferencedSOPInstanceUID for item in referenced.ReferencedInstanceSequence}
        assert named <= {image.SOPInstanceUID for image in of_ct}
    assert len({of_ct[0].SeriesInstanceUID, layout.SeriesInstanceUID, prediction.SeriesInstanceUID}) == 3


def test_files_have_what_the_standard_requires(tmp_path):
    case = write_case(tmp_path)
    export_dicom([case.path], tmp_path / "out")
    modules = get_iod_module_map()
    seg = dcmread(tmp_path / "out" / NAME / "SEG/layout.dcm")
    for dataset, uid, iod in (
        (slices(tmp_path / "out" / NAME)[0], CTImageStorage, "ct-image"),
        (seg, SegmentationStorage, "segmentation"),
    ):
        assert dataset.SOPClassUID == uid
        for module in modules[iod]:
            # What frames share or not, that check cannot see.
            if module["usage"] == "M" and "functional-groups" not in module["key"]:
                check_required_attributes(dataset, module=module["key"])


def test_a_second_export_is_byte_identical_and_another_ct_other_uids(tmp_path):
    case = write_case(tmp_path)
    write_prediction(tmp_path / "mine", case, read_volume(case.layout).array == Label.NODULE)
    for out in ("one", "two"):
        export_dicom([case.path], tmp_path / out, [tmp_path / "mine"])
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "one")) == SHAPE[2] + 2
    uids = {dcmread(file).SOPInstanceUID for file in (tmp_path / "one").rglob("*.dcm")}
    assert len(uids) == SHAPE[2] + 2
    changed = read_volume(case.ct)
    changed.array[4, 3, 2] += 1
    other = write_case(tmp_path / "other", hu=changed.array)
    export_dicom([other.path], tmp_path / "three")
    assert uids.isdisjoint(dcmread(file).SOPInstanceUID for file in (tmp_path / "three").rglob("*.dcm"))


def test_a_segmenter_that_found_nothing_has_an_empty_segment(tmp_path):
    case = write_case(tmp_path)
    write_prediction(tmp_path / "mine", case, np.zeros(SHAPE, bool))
    export_dicom([case.path], tmp_path / "out", [tmp_path / "mine"])
    found = segments(tmp_path / "out" / NAME / "SEG/mine.dcm")
    assert {name: len(places) for name, places in found.items()} == {"nodule": 0}


def test_long_and_odd_names_fit_and_stay_apart(tmp_path):
    cases = [write_case(tmp_path, name="P-1" + "x" * 70 + end) for end in "ab"]
    odd = write_case(tmp_path, synthetic=False, name="odd", patient_id="M\\ü\n")
    export_dicom([case.path for case in (*cases, odd)], tmp_path / "out")
    ids = [image.PatientID for image in (slices(folder)[0] for folder in sorted((tmp_path / "out").iterdir()))]
    assert len(set(ids)) == 3
    assert max(map(len, ids)) == 64
    assert "M_ü_" in ids


def test_samples_of_all_cohorts_of_a_generator_stay_apart(tmp_path):
    sample = "P-1_fold0_seed0_s000"
    cohorts = ["all-fold0_seed0", "real4-fold0_seed0", "real12-fold0_seed0"]
    # Some generators give the same CT to all of them.
    cases = [write_case(tmp_path / "synthetic/lung_ddpm" / cohort, name=sample) for cohort in cohorts]
    export_dicom([case.path for case in cases], tmp_path / "out")
    names = [f"SYNTHETIC-lung_ddpm-{number}P-1_fold0_seed0_s000" for number in ("", "real4-", "real12-")]
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(names)
    files = [slices(tmp_path / "out" / name)[0] for name in names]
    assert [file.PatientID for file in files] == names
    assert len({file.PatientName for file in files}) == len({file.StudyInstanceUID for file in files}) == 3
    assert len({file.SOPInstanceUID for file in files}) == 3


def test_without_highdicom_nothing_is_written(tmp_path, monkeypatch):
    case = write_case(tmp_path)
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(UserError, match=r"highdicom: is not installed .*pip install highdicom"):
        export_dicom([case.path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_earlier_export_stays_as_it_is(tmp_path):
    case, new = write_case(tmp_path), write_case(tmp_path, name="P-2_s000")
    export_dicom([case.path], tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(OutputError, match=f"{NAME}: already exists. Delete it"):
        export_dicom([new.path, case.path], tmp_path / "out")
    assert contents(tmp_path / "out") == before
    with pytest.raises(InputError, match=f"{NAME}: is given more than once"):
        export_dicom([case.path, case.path], tmp_path / "elsewhere")


def nothing_known(case, predictions):
    case.sample_record.unlink()


def edited(case, predictions):
    write_volume(case.ct, read_volume(case.ct).like(np.ones(SHAPE, np.int16)))


def incomplete_record(case, predictions):
    write_json(case.sample_record, {"sample_id": "P-1_s000"})


def rewrite(case, ct, labels=None):
    write_volume(case.ct, ct)
    if labels is not None:
        write_volume(case.layout, labels)
    record = {"sample_id": "P-1_s000", "generator": "g", "layout_origin": "placed", "fingerprint": "f00"}
    write_json(case.sample_record, record | {"reference_case_id": None, "sha256": case.hash()})


def fractions(case, predictions):
    ct = read_volume(case.ct)
    rewrite(case, ct.like(ct.array + np.float32(0.5)))


def too_large(case, predictions):
    ct = read_volume(case.ct)
    rewrite(case, ct.like(ct.array.astype(np.int32) + 1))


def sheared(case, predictions):
    shear = np.eye(4)
    shear[1, 2] = 0.4
    ct, layout = read_volume(case.ct), read_volume(case.layout)
    rewrite(case, Volume(ct.array, ct.affine @ shear), Volume(layout.array, layout.affine @ shear))


def nothing_drawn(case, predictions):
    ct, layout = read_volume(case.ct), read_volume(case.layout)
    rewrite(case, ct, layout.like(layout.array * 0))


def no_prediction(case, predictions):
    (predictions / "P-1_s000.nii.gz").unlink()


def elsewhere(case, predictions):
    mask = read_volume(predictions / "P-1_s000.nii.gz")
    write_volume(predictions / "P-1_s000.nii.gz", Volume(mask.array, mask.affine + 1))


def labels_of_its_own(case, predictions):
    mask = read_volume(predictions / "P-1_s000.nii.gz")
    write_volume(predictions / "P-1_s000.nii.gz", mask.like(mask.array + np.uint8(1)))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (nothing_known, "P-1_s000: is not a case"),
        (edited, r"P-1_s000: does not match the hash in sample\.json"),
        (incomplete_record, r"sample\.json: lacks 'generator'"),
        (fractions, r"ct\.nii\.gz: holds values other than whole numbers of 16 bits"),
        (too_large, r"ct\.nii\.gz: holds values other than whole numbers of 16 bits"),
        (sheared, r"ct\.nii\.gz: has sheared axes"),
        (nothing_drawn, r"layout\.nii\.gz: has no lung, nodule or vessel"),
        (no_prediction, r"P-1_s000\.nii\.gz: does not exist"),
        (elsewhere, "is not on the grid of its case"),
        (labels_of_its_own, "has the label 2"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_left(tmp_path, spoil, message):
    case = write_case(tmp_path)
    write_prediction(tmp_path / "mine", case, read_volume(case.layout).array == Label.NODULE)
    spoil(case, tmp_path / "mine")
    with pytest.raises(InputError, match=message):
        export_dicom([case.path], tmp_path / "out", [tmp_path / "mine"])
    assert not list((tmp_path / "out").glob("*"))


def test_folders_of_predictions_need_names_of_their_own(tmp_path):
    case = write_case(tmp_path)
    for folder in ("a/mine", "b/mine", "layout"):
        (tmp_path / folder).mkdir(parents=True)
    for folders in (["a/mine", "b/mine"], ["layout"]):
        with pytest.raises(InputError, match="has the name of another segmentation"):
            export_dicom([case.path], tmp_path / "out", [tmp_path / folder for folder in folders])
    with pytest.raises(InputError, match="none: is not a folder"):
        export_dicom([case.path], tmp_path / "out", [tmp_path / "none"])


def test_the_command_says_what_it_wrote(tmp_path):
    case = write_case(tmp_path)
    run = CliRunner().invoke(cli.app, ["export", "dicom", str(case.path), "--output", str(tmp_path / "out")])
    assert run.exit_code == 0, run.output
    assert f"{NAME}: 5 slices; segmentations: layout" in run.output
