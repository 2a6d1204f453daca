"""The phantom cohort's readers and files against the truth and against independent readers of files."""

import hashlib
import json
import shutil
import sys
import time
from pathlib import Path
from subprocess import DEVNULL, run
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import psutil
import pydicom
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from skimage.draw import polygon

from lungddpm.core.files import seed_from
from lungddpm.sources.index import index_source
from lungddpm.sources.phantom import load_scan, simulate
from lungddpm.sources.phantom.patient import Thorax
from lungddpm.sources.phantom.readers import Reading, outlinable, outlines, read
from lungddpm.sources.phantom.scanner import PADDING_HU
from lungddpm.sources.phantom.settings import Phantom

XML = "{http://www.nih.gov}"


@pytest.fixture(scope="module")
def readings(cohort_seeds: list[int], cohort_truths: list[Thorax]) -> tuple[Reading, ...]:
    """What the readers marked in the cohort's first patient."""
    return read(cohort_truths[0], seed_from(cohort_seeds[0], "readers"))


def series_folder(cohort: Path, patient_id: str) -> Path:
    (xml,) = (cohort / patient_id).glob("*/*/*.xml")
    return xml.parent


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def filled(points: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """LIDC's rule, independently: the polygon's inside less its listed points."""
    mask = np.zeros(shape, bool)
    mask[polygon(points[:, 0], points[:, 1], shape)] = True
    mask[points[:, 0], points[:, 1]] = False
    return mask


# ------------------------------------------------------------------ readers


@settings(max_examples=150, deadline=None)
@given(hnp.arrays(bool, (9, 9), elements=st.booleans()))
def test_outlines_enclose_any_mask(drawn: np.ndarray):
    mask = outlinable(np.pad(drawn, 3))
    assert (mask >= np.pad(drawn, 3)).all()
    chains = outlines(mask)
    decoded = np.any([np.zeros_like(mask), *(filled(chain, mask.shape) for chain in chains)], axis=0)
    np.testing.assert_array_equal(decoded, mask)
    for chain in chains:
        assert (chain[0] == chain[-1]).all()
        assert np.abs(np.diff(chain, axis=0)).max() == 1
        assert not mask[tuple(chain.T)].any()


def test_readers_agree_with_the_truth_but_not_wholly(patients: list[Thorax]):
    agreements = []
    for seed, truth in enumerate(patients):
        readings = read(truth, seed)
        assert len(readings) == 4
        for i, nodule in enumerate(truth.nodules):
            masks = [reading.masks[i] for reading in readings if i in reading.masks]
            assert masks
            overlaps = [dice(mask, nodule.mask) for mask in masks]
            assert min(overlaps) > 0.5
            agreements += overlaps
    assert 0.75 < np.mean(agreements) < 0.99


def test_xml_gives_back_the_readers_masks(cohort: Path, cohort_truths: list[Thorax], readings: tuple[Reading, ...]):
    truth = cohort_truths[0]
    folder = series_folder(cohort, "PHANTOM-0001")
    slices = {pydicom.dcmread(f).SOPInstanceUID: k for k, f in enumerate(sorted(folder.glob("*.dcm")))}
    root = ElementTree.parse(folder / "readings.xml").getroot()
    assert root.tag == f"{XML}LidcReadMessage"
    assert root.findtext(f"{XML}ResponseHeader/{XML}SeriesInstanceUid") == folder.name
    sessions = root.findall(f"{XML}readingSession")
    assert len(sessions) == 4
    for session, reading in zip(sessions, readings, strict=True):
        outlined, dots = [], 0
        for element in session.findall(f"{XML}unblindedReadNodule"):
            mask = np.zeros(truth.ct.shape, bool)
            for roi in element.findall(f"{XML}roi"):
                k = slices[roi.findtext(f"{XML}imageSOP_UID")]
                z_mm = (truth.ct.affine @ (0, 0, k, 1))[2]
                assert float(roi.findtext(f"{XML}imageZposition")) == pytest.approx(z_mm, abs=1e-3)
                points = [(int(p[0].text), int(p[1].text)) for p in roi.findall(f"{XML}edgeMap")]
                mask[:, :, k] |= filled(np.array(points), mask.shape[:2])
            if element.find(f"{XML}characteristics") is None:
                assert len(element.findall(f"{XML}roi/{XML}edgeMap")) == 1
                dots += 1
            else:
                outlined.append(mask)
        assert len(outlined) == len(reading.masks)
        for mask, drawn in zip(outlined, reading.masks.values(), strict=True):
            np.testing.assert_array_equal(mask, drawn)
        assert dots == len(reading.small_nodules)
        assert len(session.findall(f"{XML}nonNodule")) == len(reading.distractors)
    first, second = (readings[i].masks for i in (0, 1))
    assert any((first[i] != second[i]).any() for i in first.keys() & second.keys())


# ------------------------------------------------------------------ files


def test_simpleitk_reads_back_the_scan(cohort: Path, cohort_truths: list[Thorax]):
    truth = cohort_truths[1]
    folder = series_folder(cohort, "PHANTOM-0002")
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0), truth.ct.array)
    np.testing.assert_allclose(image.GetSpacing(), truth.ct.spacing_mm, atol=1e-6)
    np.testing.assert_allclose(np.array(image.GetOrigin()) * (-1, -1, 1), truth.ct.affine[:3, 3], atol=1e-3)
    np.testing.assert_allclose(image.GetDirection(), np.eye(3).ravel())


def test_slices_are_valid_ct_images(cohort: Path, small: Phantom):
    folder = series_folder(cohort, "PHANTOM-0001")
    images = [pydicom.dcmread(f) for f in sorted(folder.glob("*.dcm"))]
    first = images[0]
    assert (first.Modality, first.PatientID) == ("CT", "PHANTOM-0001")
    assert first.SOPClassUID == first.file_meta.MediaStorageSOPClassUID == pydicom.uid.CTImageStorage
    assert (first.StudyInstanceUID, first.SeriesInstanceUID) == (folder.parent.name, folder.name)
    assert len({image.SOPInstanceUID for image in images}) == len(images)
    assert {image.FrameOfReferenceUID for image in images} == {first.FrameOfReferenceUID}
    assert float(first.PixelPaddingValue * first.RescaleSlope + first.RescaleIntercept) == PADDING_HU
    steps = np.diff([float(image.ImagePositionPatient[2]) for image in images])
    np.testing.assert_allclose(steps, small.slice_mm, atol=1e-3)


def test_the_source_reads_its_own_cohort(cohort: Path, cohort_truths: list[Thorax], readings: tuple[Reading, ...]):
    index = pd.DataFrame(index_source("phantom", cohort))
    assert index["case_id"].tolist() == ["PHANTOM-0001", "PHANTOM-0002"]
    assert (index["status"] == "ok").all()
    case = index.iloc[0]
    truth = cohort_truths[0]
    scan = load_scan(cohort, case)
    assert scan.ct.same_grid(truth.ct)
    np.testing.assert_array_equal(np.maximum(scan.ct.array, -1024), np.maximum(truth.ct.array, -1024))
    assert len(scan.annotations) == sum(len(reading.masks) for reading in readings)


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }


def test_interrupted_run_continues_and_is_byte_identical(write_small, cohort: Path, tmp_path: Path):
    output = tmp_path / "again"
    shutil.copytree(cohort / "PHANTOM-0001", output / "PHANTOM-0001")
    kept = series_folder(output, "PHANTOM-0001") / "000001.dcm"
    modified = kept.stat().st_mtime_ns
    # What a killed run may leave: a patient without its record, and a temporary folder.
    (output / "PHANTOM-0002").mkdir()
    (output / ".PHANTOM-0002-abc" / "PHANTOM-0002").mkdir(parents=True)
    write_small(output, 2)
    assert kept.stat().st_mtime_ns == modified
    assert hashes(output) == hashes(cohort)
    assert sorted(p.name for p in output.iterdir()) == [".lock", "PHANTOM-0001", "PHANTOM-0002"]


def test_processes_share_the_patients_and_write_the_same_bytes(write_small, cohort: Path, tmp_path: Path):
    write_small(tmp_path / "cohort", 2, threads=3)
    assert hashes(tmp_path / "cohort") == hashes(cohort)


def test_processes_end_with_the_one_that_started_them(tmp_path: Path):
    script = tmp_path / "write.py"
    script.write_text(
        "import sys; from pathlib import Path; from lungddpm.sources.phantom.cohort import write_cohort\n"
        "from lungddpm.sources.phantom.settings import Phantom\n"
        "if __name__ == '__main__': write_cohort(Phantom(patients=50), 1, Path(sys.argv[1]), 2)\n"
    )
    started = psutil.Popen([sys.executable, script, tmp_path / "cohort"], stdout=DEVNULL, stderr=DEVNULL)
    while not list((tmp_path / "cohort").glob(".PHANTOM-*")):
        assert started.is_running()
        time.sleep(0.1)
    children = started.children(recursive=True)
    assert len(children) >= 2
    started.kill()
    _, left = psutil.wait_procs(children, timeout=1800)  # only so that a failure ends
    assert not left


def test_smaller_cohort_is_the_beginning_of_a_larger_one(write_small, cohort: Path, tmp_path: Path):
    output = tmp_path / "cohort"
    shutil.copytree(cohort, output)
    write_small(output, 1)
    assert sorted(p.name for p in output.iterdir()) == [".lock", "PHANTOM-0001"]
    assert hashes(output / "PHANTOM-0001") == hashes(cohort / "PHANTOM-0001")


def test_other_parameters_replace_a_patient(write_small, cohort: Path, tmp_path: Path):
    output = tmp_path / "cohort"
    shutil.copytree(cohort / "PHANTOM-0001", output / "PHANTOM-0001")
    before = json.loads((output / "PHANTOM-0001" / "phantom.json").read_text())
    write_small(output, 1, noise_hu=5.0)
    after = json.loads((output / "PHANTOM-0001" / "phantom.json").read_text())
    assert before["fingerprint"] != after["fingerprint"]
    assert len(list((output / "PHANTOM-0001").glob("*/*/*.xml"))) == 1


def test_changed_code_makes_a_patient_again_with_the_same_uids(write_small, cohort: Path, tmp_path, monkeypatch):
    output = tmp_path / "cohort"
    shutil.copytree(cohort / "PHANTOM-0001", output / "PHANTOM-0001")
    drawn = series_folder(output, "PHANTOM-0001") / "000001.dcm"
    truth = drawn.read_bytes()
    drawn.write_bytes(b"what the former code drew")
    write_small(output, 1)
    assert drawn.read_bytes() == b"what the former code drew"
    monkeypatch.setattr("lungddpm.sources.phantom.cohort.stage_fingerprint", lambda stage, name: f"edited {stage}")
    write_small(output, 1)
    assert drawn.read_bytes() == truth


def test_uids_stay_those_of_the_first_version(tmp_path: Path, monkeypatch):
    """As 0.1.0 wrote them: roles, folds and noise of the demo hang on them, and a release is not to move its result."""
    monkeypatch.setattr("lungddpm.__version__", "9.9.9")
    simulate(Phantom(patients=1, matrix=64, pixel_mm=5, slice_mm=40), 7, tmp_path)
    study = "1.2.826.0.1.3680043.8.498.32314735779972584890992170122386817282"
    series = "1.2.826.0.1.3680043.8.498.15882393259857534995884336947791531391"
    assert (tmp_path / "PHANTOM-0001" / study / series).is_dir()


def test_a_field_of_view_that_holds_no_chest_is_refused():
    with pytest.raises(ValueError, match="a chest needs 300"):
        Phantom(matrix=64, pixel_mm=2.2)


def test_the_source_is_light_to_import():
    code = (
        "import sys; import lungddpm.sources.phantom\n"
        "sys.exit(' '.join({'pydicom', 'nibabel', 'scipy', 'skimage', 'torch'} & set(sys.modules)))"
    )
    assert run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == ""
