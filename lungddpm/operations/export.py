"""`lungddpm export dicom`: cases as DICOM, to be looked at in a PACS viewer.

The CT becomes a series, the layout and each prediction a SEG object that refers to it, by the optional package
`highdicom` (Bridge et al., Journal of Digital Imaging 35:1719-1737, 2022, doi 10.1007/s10278-022-00683-y). Nothing
passes for an examination: all is derived and has new UIDs, and synthetic CT has a patient of its own and is called
synthetic wherever a viewer looks. UIDs and dates follow from the case, so that a second export is byte-identical.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lungddpm import __version__, sources
from lungddpm.core.cases import CASES, CaseFolder, read_cases
from lungddpm.core.cohorts import PATTERN, Cohort
from lungddpm.core.errors import InputError, OutputError, UserError, printable
from lungddpm.core.files import fingerprint, read_json
from lungddpm.core.labels import Label
from lungddpm.core.progress import Progress
from lungddpm.core.text import plural
from lungddpm.core.volume import Volume, is_sheared

if TYPE_CHECKING:
    import pydicom
    from highdicom.seg import SegmentDescription

_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_LONGEST = 64
"""Characters of a name, an id or a title (LO, PN)."""
_MAKER, _MODEL = "lungddpm", "export dicom"
_STUDY = "lungddpm benchmark, not for clinical use"
_OWN_CODE = "synthetic-ct", "99LUNGDDPM", "Synthetic CT"
"""The standard has a code for no such derivation (CID 7203)."""
_NO_DATE, _NO_TIME = "20000101", "000000"
"""A SEG object needs a date; that of the export would make two exports differ."""
_CODES = {
    Label.LUNG: ("AnatomicalStructure", "Lung"),
    Label.NODULE: ("MorphologicallyAbnormalStructure", "Nodule"),
    Label.VESSEL: ("AnatomicalStructure", "BloodVessel"),
}
"""Category and type of the segments, by pydicom's names of SNOMED CT codes; nodules are those of LIDC-IDRI in the
Imaging Data Commons."""
_CT_SERIES, _LAYOUT_SERIES, _PREDICTION_SERIES = 1, 2, 3


@dataclass(frozen=True)
class Subject:
    """Whose CT it is, and how a viewer labels it.

    Attributes:
        name: of its folder.
        case_id: by which predictions call it.
        patient_id: the case's patient; a synthetic case is a patient of its own.
        patient_name: what viewers show at the top.
        title: of the CT series.
        derivation: how the CT came about, in a few clauses.
        synthetic: some or all of it was computed; None: not known here.
    """

    name: str
    case_id: str
    patient_id: str
    patient_name: str
    title: str
    derivation: str
    synthetic: bool | None


@dataclass(frozen=True)
class Mask:
    """What becomes a SEG object.

    Attributes:
        name: of its file.
        title: of its series.
        labels: uint8 `Label`, on the grid of the CT.
        classes: a segment each, whether there are such voxels or not.
        algorithm: that drew it.
        by_network: it is a network's prediction.
        series_number: of its series.
    """

    name: str
    title: str
    labels: Volume
    classes: tuple[Label, ...]
    algorithm: str
    by_network: bool
    series_number: int


def export_dicom(folders: Sequence[Path], output: Path, predictions: Sequence[Path] = ()) -> list[str]:
    """Write `<output>/<case>/CT/0001.dcm`, ..., `<output>/<case>/SEG/layout.dcm` and a SEG object for each prediction.

    Args:
        folders: of cases, real or synthetic; nothing is resampled.
        output: folder for all of them; made if it does not exist.
        predictions: folders with `<case>.nii.gz`, 1 for nodule, on the grid of the case.

    Returns:
        What was written, a line per case.

    Raises:
        UserError: `highdicom` is not installed.
        InputError: a folder is not a case or was changed, a CT does not fit into DICOM, or a prediction is missing,
            lies on another grid, or holds other values.
        OutputError: a case was exported there before.
    """
    _need_highdicom()
    titles = _titles(predictions)
    cases = [(CaseFolder(folder), subject_of(CaseFolder(folder))) for folder in folders]
    names = Counter(subject.name for _, subject in cases)
    if twice := [name for name, times in names.items() if times > 1]:
        raise InputError(twice[0], "is given more than once", "Give every case once.")
    for name in names:
        if (output / name).exists():
            raise OutputError(output / name, "already exists", "Delete it, or give another --output.")
    output.mkdir(parents=True, exist_ok=True)
    lines = []
    with Progress("export", total=len(cases)) as progress:
        for folder, subject in cases:
            ct, layout = _read(folder)
            masks = [_layout_mask(folder, layout, subject)]
            masks += [_prediction_mask(root, title, subject, layout) for root, title in titles.items()]
            with tempfile.TemporaryDirectory(dir=output, prefix=f".{subject.name}-") as temporary:
                _write(Path(temporary) / subject.name, ct, masks, subject)
                (Path(temporary) / subject.name).rename(output / subject.name)
            drawn = ", ".join(mask.name for mask in masks)
            lines.append(f"{output / subject.name}: {plural(ct.shape[2], 'slice')}; segmentations: {drawn}")
            progress.advance()
    return lines


def subject_of(folder: CaseFolder) -> Subject:
    """Whose CT is in the folder of a case, by the record beside it.

    Raises:
        InputError: there is no record, it is damaged, or CT or layout were changed since.
    """
    found = [record for record in (folder.sample_record, folder.record) if record.exists()]
    if not found:
        problem = f"is not a case folder: it has neither {folder.record.name} nor {folder.sample_record.name}"
        remedy = (
            "Give folders of results/cases/ or results/synthetic/; 'lungddpm synthesize' imports CT from elsewhere."
        )
        raise InputError(folder.path, problem, remedy)
    record = read_json(found[0])
    try:
        subject = _synthetic(record, folder) if found[0] == folder.sample_record else _real(record, folder)
        unchanged = record["sha256"] == folder.hash()
    except KeyError as error:
        raise InputError(found[0], f"lacks {error}", "Delete its folder and run the stage again.") from None
    if not unchanged:
        problem = f"does not match the hash in {found[0].name}"
        raise InputError(folder.path, problem, "Delete the folder and run the stage again.")
    return subject


def _synthetic(record: dict[str, Any], folder: CaseFolder) -> Subject:
    generator, sample, reference = record["generator"], record["sample_id"], record["reference_case_id"]
    # Generators give their samples the same names, also those for different numbers of real cases.
    cohort = folder.path.resolve().parent.name
    number = Cohort.parse(cohort).real_cases if re.fullmatch(PATTERN, cohort) else None
    origin = generator if number is None else f"{generator}-real{number}"
    name = _text(f"SYNTHETIC-{origin}-{sample}")
    derivation = (
        f"SYNTHETIC CT, not a patient: drawn by the generator {generator} "
        f"(reference case: {reference or 'none'}; layout: {record['layout_origin']}; fingerprint: "
        f"{record['fingerprint']})"
    )
    title = _text(f"SYNTHETIC CT, {generator}, not a patient")
    return Subject(name, sample, name, _text(f"SYNTHETIC^{origin} {sample}"), title, derivation, True)


def _real(record: dict[str, Any], folder: CaseFolder) -> Subject:
    patient = _text(record["patient_id"])
    derivation = f"resampled to the grid of a benchmark, from series {record['series_uid']}"
    names = folder.path.resolve().name, record["case_id"], patient, f"{patient}^"
    if _is_simulated(folder):
        derivation = f"COMPUTED thorax, not a patient: {derivation}"
        return Subject(*names, "COMPUTED CT, not a patient", derivation, True)
    return Subject(*names, "Resampled CT, not for clinical use", derivation, None)


def _is_simulated(folder: CaseFolder) -> bool:
    """Whether the source of a real case makes its own patients, by the table beside its folder."""
    table = folder.path.resolve().parent / CASES
    if not table.exists():
        return False
    rows = read_cases(table)
    found = set(rows.loc[rows["path"] == folder.path.resolve().name, "source"])
    return any(sources.source_of(kind).simulate is not None for kind in found & set(sources.names()))


def _titles(predictions: Sequence[Path]) -> dict[Path, str]:
    """What a folder of predictions is called: of a run's, the arm and the replicate."""
    titles = {}
    for folder in predictions:
        path = folder.resolve()
        of_run = path.name == "predictions" and path.parent.parent.name
        titles[folder] = f"{path.parent.parent.name}_{path.parent.name}" if of_run else path.name
        if not folder.is_dir():
            raise InputError(folder, "is not a folder", "Give a folder with <case>.nii.gz.")
    for title, times in Counter(titles.values()).items():
        if times > 1 or title == "layout":
            problem = f"a folder of predictions called '{title}' has the name of another segmentation"
            raise InputError("--predictions", problem, "Rename it.")
    return titles


def _read(folder: CaseFolder) -> tuple[Volume, Volume]:
    """CT and layout; the CT as int16, which DICOM holds without a loss."""
    ct, layout = folder.read()
    if is_sheared(ct.affine):
        raise InputError(folder.ct, "has sheared axes", "Resample it to an upright grid.")
    stored = np.iinfo(np.int16)
    if ct.array.min() < stored.min or ct.array.max() > stored.max or (np.rint(ct.array) != ct.array).any():
        raise InputError(folder.ct, "holds values other than whole numbers of 16 bits", "Store HU as int16.")
    return ct.like(ct.array.astype(np.int16)), layout


def _layout_mask(folder: CaseFolder, layout: Volume, subject: Subject) -> Mask:
    classes = tuple(label for label in _CODES if (layout.array == label).any())
    if not classes:
        raise InputError(folder.layout, "has no lung, nodule or vessel", "Give a case with a layout.")
    title = "Layout of SYNTHETIC CT" if subject.synthetic else "Layout"
    return Mask("layout", title, layout, classes, "lungddpm layouts", False, _LAYOUT_SERIES)


def _prediction_mask(root: Path, title: str, subject: Subject, layout: Volume) -> Mask:
    from lungddpm.evaluation.segmentation import read_mask

    found = read_mask(root / f"{subject.case_id}.nii.gz", layout).array
    labels = layout.like(np.where(found, np.uint8(Label.NODULE), np.uint8(Label.BACKGROUND)))
    return Mask(title, _text(f"Prediction, {title}"), labels, (Label.NODULE,), title, True, _PREDICTION_SERIES)


def _write(folder: Path, ct: Volume, masks: Sequence[Mask], subject: Subject) -> None:
    """Write one case into a folder that does not exist."""
    slices = ct_slices(ct, subject)
    (folder / "CT").mkdir(parents=True)
    for number, image in enumerate(slices, start=1):
        image.save_as(folder / "CT" / f"{number:04d}.dcm", enforce_file_format=True)
    (folder / "SEG").mkdir()
    for mask in masks:
        segmentation(mask, slices, subject).save_as(folder / "SEG" / f"{mask.name}.dcm", enforce_file_format=True)


def ct_slices(ct: Volume, subject: Subject) -> list[pydicom.Dataset]:
    """A CT Image Storage object for each slice, from feet to head; rows run to the patient's left, columns to the back.

    Args:
        ct: int16 HU, RAS+, without shear; oblique axes stay as they are.
        subject: whose CT it is.
    """
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import PYDICOM_IMPLEMENTATION_UID, CTImageStorage, ExplicitVRLittleEndian

    ct = _in_lps(ct)
    voxels = hashlib.sha256(ct.array.tobytes()).hexdigest()
    identity = fingerprint([__version__, asdict(subject), ct.shape, ct.affine, voxels])
    shared, to_lps = _shared_by_slices(ct, subject, identity), _RAS_TO_LPS @ ct.affine
    slices = []
    for k in range(ct.shape[2]):
        image = Dataset()
        image.update(shared)
        image.SOPClassUID, image.SOPInstanceUID = CTImageStorage, _uid(identity, "CT", k)
        image.InstanceNumber = k + 1
        image.ImagePositionPatient = _decimals((to_lps @ [0, 0, k, 1])[:3])
        image.PixelData = ct.array[:, :, k].T.astype("<i2").tobytes()
        image["PixelData"].VR = "OW"
        image.file_meta = FileMetaDataset()
        image.file_meta.MediaStorageSOPClassUID = CTImageStorage
        image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
        image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        image.file_meta.ImplementationClassUID = PYDICOM_IMPLEMENTATION_UID
        slices.append(image)
    return slices


def _shared_by_slices(ct: Volume, subject: Subject, identity: str) -> pydicom.Dataset:
    """What all slices of a CT have; required elements that are not known are empty."""
    from pydicom.dataset import Dataset
    from pydicom.sr.codedict import codes

    from lungddpm.core.drawing import LUNG_WINDOW_HU

    spacing_mm = ct.spacing_mm
    directions = (_RAS_TO_LPS @ ct.affine)[:3, :2] / spacing_mm[:2]
    resampling = codes.DCM.SpatialResampling
    derived_by = (
        _OWN_CODE if subject.synthetic else (resampling.value, resampling.scheme_designator, resampling.meaning)
    )
    low, high = LUNG_WINDOW_HU
    elements = {
        "SpecificCharacterSet": "ISO_IR 192",
        "ImageType": ["DERIVED", "SECONDARY", "AXIAL"],
        **({"SyntheticData": "YES"} if subject.synthetic else {}),
        **dict.fromkeys(("StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName", "StudyID"), ""),
        "Modality": "CT",
        "Manufacturer": _MAKER,
        "ManufacturerModelName": _MODEL,
        "SoftwareVersions": __version__,
        "StudyDescription": _STUDY,
        "SeriesDescription": subject.title,
        "DerivationDescription": subject.derivation,
        "DerivationCodeSequence": [_code(*(_OWN_CODE if subject.synthetic else derived_by))],
        "PatientName": subject.patient_name,
        "PatientID": subject.patient_id,
        "PatientBirthDate": "",
        "PatientSex": "",
        "PatientComments": subject.derivation,
        "ImageComments": subject.derivation,
        "KVP": None,
        "PatientPosition": "",
        "StudyInstanceUID": _uid(identity, "study"),
        "SeriesInstanceUID": _uid(identity, "series"),
        "SeriesNumber": _CT_SERIES,
        "AcquisitionNumber": None,
        "ImageOrientationPatient": _decimals(directions.T.ravel()),
        "FrameOfReferenceUID": _uid(identity, "frame of reference"),
        "PositionReferenceIndicator": "",
        # Between the centres of rows, then of columns.
        "PixelSpacing": _decimals(spacing_mm[[1, 0]]),
        "SliceThickness": _decimals(spacing_mm[2:])[0],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": ct.shape[1],
        "Columns": ct.shape[0],
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 1,
        "BurnedInAnnotation": "NO",
        "LossyImageCompression": "00",
        "WindowCenter": _decimals([(low + high) / 2])[0],
        "WindowWidth": _decimals([high - low])[0],
        "RescaleIntercept": 0,
        "RescaleSlope": 1,
        "RescaleType": "HU",
    }
    shared = Dataset()
    for keyword, value in elements.items():
        setattr(shared, keyword, value)
    return shared


def segmentation(mask: Mask, slices: Sequence[pydicom.Dataset], subject: Subject) -> pydicom.Dataset:
    """A binary SEG object, a segment per class, on the grid of a CT; only frames with voxels, unless there are none.

    Args:
        mask: what was drawn.
        slices: of `ct_slices`.
        subject: whose CT it is.
    """
    import highdicom

    labels, first = _in_lps(mask.labels).array, slices[0]
    voxels = np.stack([(labels == label).transpose(2, 1, 0) for label in mask.classes], axis=-1)
    described = [_segment(number, label, mask) for number, label in enumerate(mask.classes, start=1)]
    drawn = [mask.title, mask.algorithm, list(mask.classes), hashlib.sha256(labels.tobytes()).hexdigest()]
    identity = fingerprint([first.SeriesInstanceUID, *drawn])
    made = highdicom.seg.Segmentation(
        source_images=slices,
        pixel_array=voxels,
        segmentation_type="BINARY",
        segment_descriptions=described,
        series_instance_uid=_uid(identity, "series"),
        series_number=mask.series_number,
        series_description=mask.title,
        sop_instance_uid=_uid(identity, "SEG"),
        instance_number=1,
        manufacturer=_MAKER,
        manufacturer_model_name=_MODEL,
        software_versions=__version__,
        device_serial_number="none",
        content_label="PREDICTION" if mask.by_network else "LAYOUT",
        content_description=mask.title,
        content_date=_NO_DATE,
        content_time=_NO_TIME,
        omit_empty_frames=bool(voxels.any()),
    )
    if subject.synthetic:
        made.SyntheticData = "YES"
    # highdicom draws this UID, looks at the clock, and takes the writer of the CT for a scanner.
    for item in (*made.DimensionOrganizationSequence, *made.DimensionIndexSequence):
        item.DimensionOrganizationUID = _uid(identity, "dimensions")
    del made.InstanceCreationDate, made.InstanceCreationTime, made.ContributingEquipmentSequence
    return made


def _segment(number: int, label: Label, mask: Mask) -> SegmentDescription:
    import highdicom
    from pydicom.sr.codedict import codes

    from lungddpm.core.drawing import LABELS

    name, colour = LABELS[label]
    category, kind = _CODES[label]
    family = codes.DCM.ArtificialIntelligence if mask.by_network else codes.DCM.MorphologicalOperations
    # Nodules of a layout are those of readers, as they drew them or in another place.
    by_readers = label is Label.NODULE and not mask.by_network
    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=name,
        segmented_property_category=getattr(codes.SCT, category),
        segmented_property_type=getattr(codes.SCT, kind),
        algorithm_type="SEMIAUTOMATIC" if by_readers else "AUTOMATIC",
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(mask.algorithm, family, __version__),
        anatomic_regions=None if label is Label.LUNG else [codes.SCT.Lung],
        display_color=highdicom.color.CIELabColor.from_string(colour),
    )


def _in_lps(volume: Volume) -> Volume:
    """The same voxels with the first two axes reversed, from RAS+ to LPS+: viewers show rows and columns as they are
    stored. The affine still leads to RAS."""
    reverse = np.diag([-1.0, -1.0, 1.0, 1.0])
    reverse[:2, 3] = np.array(volume.shape[:2]) - 1
    return Volume(np.ascontiguousarray(volume.array[::-1, ::-1]), volume.affine @ reverse)


def _decimals(values: Iterable[float]) -> list[Any]:
    """Decimal strings (DS): as many digits as 16 characters hold."""
    from pydicom.valuerep import DSfloat

    return [DSfloat(float(value) + 0.0, auto_format=True) for value in values]


def _code(value: str, scheme: str, meaning: str) -> pydicom.Dataset:
    from pydicom.dataset import Dataset

    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def _uid(*names: str | int) -> str:
    """A UID that follows from what it names."""
    from pydicom.uid import generate_uid

    return str(generate_uid(entropy_srcs=[str(name) for name in names]))


def _text(text: str) -> str:
    """A name as DICOM holds it: no backslash, which parts values, no control characters, and `_LONGEST` at most.

    Of longer ones the end becomes a hash, so that two remain two.
    """
    text = re.sub(r"[\\\x00-\x1f\x7f]", "_", printable(text))
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 9]}-{fingerprint(text)[:8]}"


def _need_highdicom() -> None:
    try:
        importlib.import_module("highdicom")
    except ImportError as error:
        raise UserError("highdicom", f"is not installed ({error})", "Install it: pip install highdicom.") from None
