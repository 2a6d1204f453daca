"""The cohort on disk, in the format of LIDC-IDRI: one folder per patient with DICOM slices, one XML file with four
readers' marks, and `phantom.json`, which records the recipe and thus whether the patient must be made again."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np

from lungddpm.core.code import stage_fingerprint
from lungddpm.core.errors import InputError
from lungddpm.core.files import exclusive_lock, fingerprint, read_json, seed_from, write_json
from lungddpm.core.progress import LOG, Progress
from lungddpm.core.volume import Volume
from lungddpm.sources.phantom.nodules import Nodule
from lungddpm.sources.phantom.patient import Thorax, thorax
from lungddpm.sources.phantom.readers import Reading, outlines, read
from lungddpm.sources.phantom.scanner import LOWEST_HU, LPS_TO_RAS, PADDING_HU
from lungddpm.sources.phantom.settings import Phantom

if TYPE_CHECKING:
    from pydicom.uid import UID

_UIDS_OF_VERSION = "0.1.0"
"""In the recipe since UIDs were first drawn from it: no release moves them, and with them the seeds of the demo."""
_SAME_IN_ALL_SLICES = {
    "SpecificCharacterSet": "ISO_IR 100",
    "ImageType": ["DERIVED", "SECONDARY", "AXIAL"],
    # A fixed date, so that equal slices give identical files.
    **dict.fromkeys(("StudyDate", "SeriesDate", "ContentDate"), "20000101"),
    **dict.fromkeys(("StudyTime", "SeriesTime", "ContentTime"), "000000"),
    "AccessionNumber": "",
    "Modality": "CT",
    "Manufacturer": "lungddpm phantom",
    "ReferringPhysicianName": "",
    "SeriesDescription": "Procedural thorax, not a patient",
    "PatientBirthDate": "",
    "PatientSex": "",
    "BodyPartExamined": "CHEST",
    "KVP": 120,
    "PatientPosition": "HFS",
    "StudyID": "",
    "SeriesNumber": 1,
    "AcquisitionNumber": 1,
    "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
    "PositionReferenceIndicator": "",
    "SamplesPerPixel": 1,
    "PhotometricInterpretation": "MONOCHROME2",
    "BitsAllocated": 16,
    "BitsStored": 16,
    "HighBit": 15,
    "PixelRepresentation": 1,
    "PixelPaddingValue": PADDING_HU - LOWEST_HU,
    "WindowCenter": -600,
    "WindowWidth": 1500,
    "RescaleIntercept": LOWEST_HU,
    "RescaleSlope": 1,
    "RescaleType": "HU",
}


def write_cohort(settings: Phantom, seed: int, output: Path, threads: int = 1) -> None:
    """Write the phantom cohort as `<output>/PHANTOM-0001/<StudyUID>/<SeriesUID>/` with DICOM slices and one XML file.

    A patient depends on the seed, its number and the settings without `patients`: a cohort of 30 begins with the cohort
    of 20, and equal settings give identical files. Existing patients are kept, so that an interrupted
    run continues; patients beyond the requested number are removed.

    Args:
        settings: the config's `source.phantom`.
        seed: of the run.
        output: folder of the cohort.
        threads: patients made at once, each in a process of its own; the bytes do not depend on it.
    """
    wanted = {f"PHANTOM-{index:04d}": index for index in range(1, settings.patients + 1)}
    with exclusive_lock(output / ".lock", f"writing the phantom cohort into {output}"):
        # A killed run leaves a partial patient, whose slices would be indexed as another series.
        for leftover in output.glob(".PHANTOM-*"):
            shutil.rmtree(leftover)
        for folder in sorted(output.glob("PHANTOM-*")):
            if folder.name not in wanted and (folder / "phantom.json").is_file():
                LOG.info("phantom: %s is not in a cohort of %d and is removed", folder.name, settings.patients)
                shutil.rmtree(folder)
        with Progress("phantom patients", total=len(wanted)) as progress:
            jobs = [(output / name, settings, seed_from(seed, "phantom", index)) for name, index in wanted.items()]
            processes = min(threads, len(jobs))
            if processes == 1:
                for job in jobs:
                    _write_patient(*job)
                    progress.advance()
                return
            with ProcessPoolExecutor(processes, get_context("spawn"), _end_with_parent) as pool:
                for made in as_completed([pool.submit(_write_patient, *job) for job in jobs]):
                    made.result()
                    progress.advance()


def _end_with_parent() -> None:
    """Let this process end with its parent, however that ends: otherwise it would never stop."""
    parent = parent_process()
    if parent is not None:

        def wait() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=wait, daemon=True).start()


def _write_patient(folder: Path, parameters: Phantom, seed: int) -> None:
    recipe = {
        "version": _UIDS_OF_VERSION,
        "seed": seed,
        "parameters": parameters.model_dump(mode="json", exclude={"patients"}),
    }
    # The UIDs depend only on the recipe: other seeds depend on them, which changed code must not affect.
    uids_from = fingerprint(recipe)
    made_by = fingerprint([recipe, stage_fingerprint("simulate", "phantom")])
    if _is_written(folder, made_by):
        return
    truth = thorax(parameters, seed)
    readings = read(truth, seed_from(seed, "readers"))
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        patient = Path(temporary) / folder.name
        study_uid, series_uid, sop_uids = _uids(folder.name, uids_from, truth.ct.shape[2])
        series = patient / study_uid / series_uid
        series.mkdir(parents=True)
        for k, sop_uid in enumerate(sop_uids):
            _write_slice(series / f"{k + 1:06d}.dcm", truth.ct, k, folder.name, (study_uid, series_uid, sop_uid))
        xml = _readings_xml(truth, readings, (study_uid, series_uid), sop_uids)
        (series / "readings.xml").write_bytes(xml)
        write_json(patient / "phantom.json", {"fingerprint": made_by, **recipe})
        if folder.exists():
            shutil.rmtree(folder)
        patient.rename(folder)


def _is_written(folder: Path, expected: str) -> bool:
    try:
        return read_json(folder / "phantom.json")["fingerprint"] == expected
    except (InputError, KeyError):
        return False


def _uids(patient_id: str, recipe: str, slices: int) -> tuple[UID, UID, list[UID]]:
    """Study, series and slice UIDs, deterministic."""
    from pydicom.uid import generate_uid

    study, series, *of_slices = (generate_uid(entropy_srcs=[patient_id, recipe, str(i)]) for i in range(slices + 2))
    return study, series, of_slices


def _write_slice(path: Path, ct: Volume, k: int, patient_id: str, uids: tuple[UID, UID, UID]) -> None:
    """One CT Image Storage object."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import PYDICOM_IMPLEMENTATION_UID, CTImageStorage, ExplicitVRLittleEndian, generate_uid

    study_uid, series_uid, sop_uid = uids
    pixel_mm, _, thickness_mm = (round(float(s), 6) for s in ct.spacing_mm)
    x, y, z = (round(float(v), 4) for v in (ct.affine @ (0, 0, k, 1))[:3] * LPS_TO_RAS)
    image = Dataset()
    for keyword, value in _SAME_IN_ALL_SLICES.items():
        setattr(image, keyword, value)
    image.PatientName = image.PatientID = patient_id
    image.StudyInstanceUID = study_uid
    image.SeriesInstanceUID = series_uid
    image.SOPClassUID = CTImageStorage
    image.SOPInstanceUID = sop_uid
    image.FrameOfReferenceUID = generate_uid(entropy_srcs=[series_uid, "frame"])
    image.InstanceNumber = k + 1
    image.ImagePositionPatient = [x, y, z]
    image.SliceLocation = z
    image.SliceThickness = thickness_mm
    image.PixelSpacing = [pixel_mm, pixel_mm]
    image.Columns, image.Rows = ct.shape[:2]
    image.PixelData = (ct.array[:, :, k].T - LOWEST_HU).astype("<i2").tobytes()
    image["PixelData"].VR = "OW"
    image.file_meta = FileMetaDataset()
    image.file_meta.MediaStorageSOPClassUID = CTImageStorage
    image.file_meta.MediaStorageSOPInstanceUID = sop_uid
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.file_meta.ImplementationClassUID = PYDICOM_IMPLEMENTATION_UID
    image.save_as(path, enforce_file_format=True)


def _readings_xml(
    truth: Thorax, readings: tuple[Reading, ...], uids: tuple[str, str], sop_uids: Sequence[str]
) -> bytes:
    """The readings as an LIDC-IDRI message."""
    root = ElementTree.Element("LidcReadMessage", {"xmlns": "http://www.nih.gov"})
    header = ElementTree.SubElement(root, "ResponseHeader")
    _leaves(header, SeriesInstanceUid=uids[1], StudyInstanceUID=uids[0])
    for number, reading in enumerate(readings, start=1):
        session = ElementTree.SubElement(root, "readingSession")
        _leaves(session, annotationVersion="3.12", servicingRadiologistID=f"phantom-reader-{number}")
        _add_marks(session, truth, reading, sop_uids)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="UTF-8", xml_declaration=True)


def _add_marks(session: ElementTree.Element, truth: Thorax, reading: Reading, sop_uids: Sequence[str]) -> None:
    """Add the marks of one reader: nodules, small nodules, findings other than nodules."""
    affine = truth.ct.affine
    from_ras = np.linalg.inv(affine)

    def voxel_of(point_mm: np.ndarray) -> list[int]:
        return np.rint(from_ras[:3, :3] @ point_mm + from_ras[:3, 3]).astype(int).tolist()

    def add_slice(parent: ElementTree.Element, k: int) -> None:
        _leaves(parent, imageZposition=f"{affine[2, 2] * k + affine[2, 3]:.4f}", imageSOP_UID=sop_uids[k])

    def add_roi(parent: ElementTree.Element, k: int, points: Iterable[tuple[int, int]]) -> None:
        roi = ElementTree.SubElement(parent, "roi")
        add_slice(roi, k)
        _leaves(roi, inclusion="TRUE")
        for column, row in points:
            _leaves(ElementTree.SubElement(roi, "edgeMap"), xCoord=column, yCoord=row)

    for i, mask in reading.masks.items():
        nodule = ElementTree.SubElement(session, "unblindedReadNodule")
        _leaves(nodule, noduleID=f"Nodule {i + 1:03d}")
        _leaves(ElementTree.SubElement(nodule, "characteristics"), **_characteristics(truth.nodules[i]))
        for k in np.flatnonzero(mask.any(axis=(0, 1))).tolist():
            for outline in outlines(mask[:, :, k]):
                add_roi(nodule, k, outline)
    for i in reading.small_nodules:
        column, row, k = voxel_of(truth.small_nodules_mm[i])
        nodule = ElementTree.SubElement(session, "unblindedReadNodule")
        _leaves(nodule, noduleID=f"Small nodule {i + 1:03d}")
        add_roi(nodule, k, [(column, row)])
    for i in reading.distractors:
        column, row, k = voxel_of(truth.distractors_mm[i])
        finding = ElementTree.SubElement(session, "nonNodule")
        _leaves(finding, nonNoduleID=f"Non-nodule {i + 1:03d}")
        add_slice(finding, k)
        _leaves(ElementTree.SubElement(finding, "locus"), xCoord=column, yCoord=row)


def _leaves(parent: ElementTree.Element, **texts: object) -> None:
    for tag, text in texts.items():
        ElementTree.SubElement(parent, tag).text = str(text)


def _characteristics(nodule: Nodule) -> dict[str, int]:
    """LIDC's ratings; their scales are those of Armato et al. 2011, table II."""
    return {
        "subtlety": 3 if nodule.texture == "ground-glass" else 5,
        "internalStructure": 1,
        "calcification": 6,
        "sphericity": 5 if nodule.margin == "smooth" else 4,
        "margin": 3 if nodule.texture == "ground-glass" else 4 if nodule.margin == "spiculated" else 5,
        "lobulation": 4 if nodule.margin == "lobulated" else 1,
        "spiculation": 4 if nodule.margin == "spiculated" else 1,
        "texture": {"ground-glass": 1, "part-solid": 3, "solid": 5}[nodule.texture],
        "malignancy": 4 if nodule.margin == "spiculated" else 3,
    }
