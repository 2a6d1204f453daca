"""Small DICOM series and reader XML, written as LIDC-IDRI has them, for the tests of what reads them."""

import numpy as np
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import pack_bits
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    RLELossless,
    RTStructureSetStorage,
    SegmentationStorage,
    generate_uid,
)

from lungddpm.core.errors import ExcludedCaseError
from lungddpm.sources import lidc
from lungddpm.sources.index import Cache, index_source

SQUARE = [(3, 3), (4, 3), (5, 3), (5, 4), (5, 5), (4, 5), (3, 5), (3, 4)]
SLICES, ROWS, COLUMNS = 5, 12, 10
SPACING = (0.7, 0.8, 2.5)
STORED = np.random.default_rng(1).integers(0, 3000, (COLUMNS, ROWS, SLICES))
UPRIGHT = np.eye(3)


def write_slice(path, k, *, series="1.2.3", patient="P-01", axes=UPRIGHT, syntax=ExplicitVRLittleEndian, **changes):
    """Slice k of `STORED`: `axes` holds the direction cosines of row, column and normal as columns (LPS)."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian if syntax == RLELossless else syntax
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = f"{series}.{k + 1}"
    dataset.Modality, dataset.PatientID, dataset.SeriesInstanceUID = "CT", patient, series
    dataset.ImageOrientationPatient = [*axes[:, 0].tolist(), *axes[:, 1].tolist()]
    dataset.ImagePositionPatient = (np.array([-20.0, -30.0, -40.0]) + axes[:, 2] * k * SPACING[2]).tolist()
    dataset.PixelSpacing, dataset.SliceThickness = [SPACING[1], SPACING[0]], "3.0"
    dataset.InstanceNumber = 100 - 7 * k
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = ROWS, COLUMNS, 1
    dataset.PhotometricInterpretation, dataset.PixelRepresentation = "MONOCHROME2", 1
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit = 15
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024
    dataset.PixelData = STORED[:, :, k % SLICES].T.astype("<i2").tobytes()
    for keyword, value in changes.items():
        setattr(dataset, keyword, value)
    if syntax == RLELossless:
        dataset.compress(RLELossless)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)


def write_series(folder, slices=range(SLICES), **options):
    for k in slices:
        # File names run against the order of the slices.
        write_slice(folder / f"{90 - k:06d}.dcm", k, **options)
    return folder


def item(**elements):
    dataset = Dataset()
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    return dataset


def enhance(folder, order=range(SLICES), *, shared_rescale=True, syntax=None, change=lambda dataset: None):
    """Join the slices of a folder, in this order, into one Enhanced CT file."""
    files = sorted(folder.glob("*.dcm"), reverse=True)
    slices = [dcmread(files[k]) for k in order]
    joined = dcmread(files[0])
    joined.SOPClassUID = joined.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2.1"
    joined.NumberOfFrames = len(slices)
    joined.PixelData = b"".join(one.PixelData for one in slices)
    shared, frames = Dataset(), []
    shared.PlaneOrientationSequence = [item(ImageOrientationPatient=joined.ImageOrientationPatient)]
    shared.PixelMeasuresSequence = [item(PixelSpacing=joined.PixelSpacing, SliceThickness="3.0")]
    for k, one in zip(order, slices, strict=True):
        groups = item(PlanePositionSequence=[item(ImagePositionPatient=one.ImagePositionPatient)])
        intercept, slope = (-1024, 1) if shared_rescale else (-1024 - 10 * k, 1 + k)
        transform = [item(RescaleIntercept=intercept, RescaleSlope=slope, RescaleType="HU")]
        (shared if shared_rescale else groups).PixelValueTransformationSequence = transform
        frames.append(groups)
    joined.SharedFunctionalGroupsSequence, joined.PerFrameFunctionalGroupsSequence = [shared], frames
    for keyword in (
        "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "RescaleSlope",
        "RescaleIntercept",
    ):  # fmt: skip
        delattr(joined, keyword)
    if syntax:
        joined.compress(syntax)
    change(joined)
    for file in files:
        file.unlink()
    joined.save_as(folder / "enhanced.dcm")


def roi(k, points=SQUARE, series="1.2.3", z=None, inclusion="TRUE"):
    edges = "".join(f"<edgeMap><xCoord>{x}</xCoord><yCoord>{y}</yCoord></edgeMap>" for x, y in points)
    z = -40 + k * SPACING[2] if z is None else z
    return (
        f"<roi><imageZposition>{z} </imageZposition><imageSOP_UID>{series}.{k + 1}</imageSOP_UID>"
        f"<inclusion>{inclusion}</inclusion>{edges}</roi>"
    )


def nodule(*rois, rating=4):
    return (
        f"<unblindedReadNodule><noduleID>n</noduleID><characteristics><malignancy>{rating}</malignancy>"
        f"</characteristics>{''.join(rois)}</unblindedReadNodule>"
    )


def xml(*sessions, series="1.2.3", root="LidcReadMessage"):
    return (
        f'<?xml version="1.0" encoding="UTF-8"?>\r\n<{root} uid="9" xmlns="http://www.nih.gov"><ResponseHeader>'
        f"<CTSeriesInstanceUid>5.5</CTSeriesInstanceUid><SeriesInstanceUid>{series}</SeriesInstanceUid>"
        f"</ResponseHeader>{''.join(f'<readingSession>{s}</readingSession>' for s in sessions)}</{root}>"
    )


def write_case(top, patient="P-01", series="1.2.3", **options):
    folder = write_series(top / patient / "a study" / series, series=series, patient=patient, **options)
    (folder / "reads.xml").write_text(xml(nodule(roi(1, series=series), roi(2, series=series)), series=series))
    return folder


def write_seg(path, masks, *, ct="1.2.3", slices=range(SLICES), change=lambda dataset: None):
    """A SEG object as IDC has them: bits, and frames of the slices with voxels only.

    `masks`: by segment label, bool of (columns, rows, slices).
    """
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = SegmentationStorage
    uid = generate_uid(entropy_srcs=[str(path)])
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = uid
    dataset.Modality, dataset.PatientID, dataset.SeriesInstanceUID = "SEG", "P-01", f"9.{ct}"
    dataset.SegmentationType = "BINARY"
    dataset.ReferencedSeriesSequence = [item(SeriesInstanceUID=ct)]
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = ROWS, COLUMNS, 1
    dataset.PhotometricInterpretation, dataset.PixelRepresentation = "MONOCHROME2", 0
    dataset.BitsAllocated = dataset.BitsStored = 1
    dataset.HighBit = 0
    dataset.SegmentSequence, frames, bits = [], [], []
    for number, (label, mask) in enumerate(masks.items(), start=1):
        dataset.SegmentSequence.append(item(SegmentNumber=number, SegmentLabel=label))
        for k in slices:
            if mask[:, :, k].any():
                position = [-20, -30, -40 + k * SPACING[2]]
                frames.append(
                    item(
                        SegmentIdentificationSequence=[item(ReferencedSegmentNumber=number)],
                        PlanePositionSequence=[item(ImagePositionPatient=position)],
                    )
                )
                bits.append(mask[:, :, k].T)
    shared = item(
        PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
        PixelMeasuresSequence=[item(PixelSpacing=[SPACING[1], SPACING[0]], SliceThickness="3.0")],
    )
    dataset.SharedFunctionalGroupsSequence, dataset.PerFrameFunctionalGroupsSequence = [shared], frames
    dataset.NumberOfFrames = len(frames)
    dataset.PixelData = pack_bits(np.array(bits, bool))
    change(dataset)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def write_rtstruct(path, contours, *, ct="1.2.3", change=lambda dataset: None):
    """An RTSTRUCT object as planning systems export them.

    `contours`: by ROI name, a list of (n, 3) points in mm (LPS).
    """
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = RTStructureSetStorage
    uid = generate_uid(entropy_srcs=[str(path)])
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = uid
    dataset.Modality, dataset.PatientID, dataset.SeriesInstanceUID = "RTSTRUCT", "P-01", f"8.{ct}"
    studies = [item(RTReferencedSeriesSequence=[item(SeriesInstanceUID=ct)])]
    dataset.ReferencedFrameOfReferenceSequence = [item(RTReferencedStudySequence=studies)]
    dataset.StructureSetROISequence, dataset.ROIContourSequence = [], []
    for number, (name, polygons) in enumerate(contours.items(), start=1):
        dataset.StructureSetROISequence.append(item(ROINumber=number, ROIName=name))
        drawn = [
            item(
                ContourGeometricType="CLOSED_PLANAR",
                NumberOfContourPoints=len(points),
                ContourData=[f"{value:.6f}" for value in np.ravel(points)],
            )
            for points in polygons
        ]
        dataset.ROIContourSequence.append(item(ReferencedROINumber=number, ContourSequence=drawn))
    change(dataset)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def outcomes_of_damage(top, file):
    """What becomes of series 1.2.3 when bytes of its object with annotations are changed or cut off, 80 times."""
    intact, rng = file.read_bytes(), np.random.default_rng(5)
    outcomes = set()
    for _ in range(80):
        damaged = bytearray(intact)
        for at in rng.integers(140, len(intact), rng.integers(1, 6)):
            damaged[at] = rng.integers(256)
        file.write_bytes(damaged[: rng.integers(140, len(intact))] if rng.random() < 0.3 else damaged)
        rows = [row for row in index_source("lidc", top) if row["series_uid"] == "1.2.3"]
        if rows[0]["status"] == "ok":
            try:
                (annotation,) = lidc.load_scan(top, rows[0]).annotations
                outcomes.add("read" if annotation.region.mask.any() else "empty")
            except ExcludedCaseError:
                outcomes.add("excluded")
        else:
            outcomes.add("index")
    return outcomes


def find(top):
    return lidc.find_series(top, Cache(None, "lidc"))


def only(top):
    (series,) = find(top)
    return series


def load(top):
    case, *_ = index_source("lidc", top)
    return lidc.load_scan(top, case)
