"""Seconds that `lungddpm index` takes, the first time and again with its cache.

    python benchmarks/index_speed.py [--series 1000] [--slices 3] [--xml-files 1300] [--xml FILE ...]
    python benchmarks/index_speed.py --pairs 1000 [--suffix .nii.gz]

Makes a data set in a temporary folder: small CT series, each with an XML file, and a tree of XML files whose images are
elsewhere. With --xml, the XML files are copies of these in turn, each under the series of its place, so that reading
them costs what true ones cost; without, each holds one nodule. Then it indexes, and times parsing all of the XML files.

With --pairs, the data set is one in the form of the Medical Segmentation Decathlon instead: this many images of 16
voxels along each side with their labels, in the format of --suffix (.nii.gz, .nii, .nrrd, .mha, .mhd).
"""

import argparse
import itertools
import json
import re
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import SimpleITK
from pydicom import dcmwrite
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from lungddpm.sources.index import index_source, write_index
from lungddpm.sources.lidc import read_xml

SIDE = 32
UID = re.compile(rb"(<SeriesInstanceU[iI][dD]>)[0-9.]+")
SMALL_XML = b"""<LidcReadMessage xmlns="http://www.nih.gov">
<ResponseHeader><SeriesInstanceUid>0</SeriesInstanceUid></ResponseHeader>
<readingSession><unblindedReadNodule><characteristics><malignancy>3</malignancy></characteristics>
<roi><imageZposition>0</imageZposition><inclusion>TRUE</inclusion>
<edgeMap><xCoord>3</xCoord><yCoord>3</yCoord></edgeMap><edgeMap><xCoord>5</xCoord><yCoord>5</yCoord></edgeMap></roi>
</unblindedReadNodule></readingSession></LidcReadMessage>"""


def write_slice(path: Path, patient: str, series_uid: str, number: int) -> None:
    """One slice of 32 x 32 pixels and 2.5 mm."""
    image = Dataset()
    image.SOPClassUID, image.SOPInstanceUID = CTImageStorage, f"{series_uid}.{number}"
    image.Modality, image.PatientID, image.SeriesInstanceUID = "CT", patient, series_uid
    image.SliceThickness, image.PixelSpacing = 2.5, [0.7, 0.7]
    image.ImagePositionPatient, image.ImageOrientationPatient = [0, 0, 2.5 * number], [1, 0, 0, 0, 1, 0]
    image.Rows = image.Columns = SIDE
    image.SamplesPerPixel, image.PhotometricInterpretation, image.PixelRepresentation = 1, "MONOCHROME2", 1
    image.BitsAllocated, image.BitsStored, image.HighBit = 16, 16, 15
    image.RescaleSlope, image.RescaleIntercept = 1, -1024
    image.PixelData = bytes(2 * SIDE * SIDE)
    image.file_meta = FileMetaDataset()
    image.file_meta.MediaStorageSOPClassUID, image.file_meta.MediaStorageSOPInstanceUID = CTImageStorage, series_uid
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dcmwrite(path, image, enforce_file_format=True)


def write_data_set(top: Path, series: int, slices: int, xml_files: int, texts: list[bytes]) -> None:
    """As many series with XML beside their slices, and the rest of the XML files in a tree of its own."""
    for number, text in zip(range(max(series, xml_files)), itertools.cycle(texts), strict=False):
        uid = f"1.2.826.0.1.3680043.8.498.{number}"
        folder = top / f"P-{number:04d}" / "study" / uid if number < series else top / "xml" / str(number % 100)
        folder.mkdir(parents=True, exist_ok=True)
        for k in range(slices if number < series else 0):
            write_slice(folder / f"{k:06d}.dcm", f"P-{number:04d}", uid, k)
        if number < xml_files:
            (folder / f"{number}.xml").write_bytes(UID.sub(rb"\g<1>" + uid.encode(), text))


def write_pairs(top: Path, pairs: int, suffix: str) -> None:
    """Images and labels as the Decathlon has them."""
    rng = np.random.default_rng(0)
    for folder, high in (("imagesTr", 1000), ("labelsTr", 2)):
        (top / folder).mkdir(parents=True)
        for number in range(pairs):
            image = SimpleITK.GetImageFromArray(rng.integers(0, high, (16, 16, 16)).astype(np.int16))
            SimpleITK.WriteImage(image, str(top / folder / f"lung_{number:04d}{suffix}"), useCompression=True)
    (top / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "cancer"}}))


def timed(what: str, work: Callable[[], object]) -> None:
    """Say how long some work takes: by the clock, and on the processor, which others may share."""
    began, began_cpu = time.perf_counter(), time.process_time()
    work()
    print(f"{what}: {time.perf_counter() - began:.2f} s ({time.process_time() - began_cpu:.2f} s of CPU)", flush=True)


def time_index(kind: str, top: Path, cache: Path) -> None:
    """Index a data set, the first time and again."""

    def index() -> None:
        write_index(cache.with_name("index.tsv"), index_source(kind, top, cache))

    timed("index, first time", index)
    timed("index, unchanged", index)
    print(f"cache: {cache.stat().st_size / 1e6:.2f} MB")


def main() -> None:
    """Make the data set and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", type=int, default=1000)
    parser.add_argument("--slices", type=int, default=3)
    parser.add_argument("--xml-files", type=int, default=1300)
    parser.add_argument("--xml", type=Path, nargs="+", default=[])
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--suffix", default=".nii.gz")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        top, cache = Path(temporary, "data"), Path(temporary, "index.cache.json")
        if wanted.pairs is not None:
            write_pairs(top, wanted.pairs, wanted.suffix)
            print(f"{wanted.pairs} pairs of {wanted.suffix}")
            time_index("images", top, cache)
            return
        texts = [file.read_bytes() for file in wanted.xml] or [SMALL_XML]
        write_data_set(top, wanted.series, wanted.slices, wanted.xml_files, texts)
        xml_files = sorted(top.rglob("*.xml"))
        size_mb = sum(file.stat().st_size for file in xml_files) / 1e6
        print(
            f"{wanted.series} series of {wanted.slices} slices, {len(xml_files)} XML files of {size_mb:.0f} MB together"
        )
        time_index("lidc", top, cache)
        timed("parsing every XML file", lambda: deque(map(read_xml, xml_files), maxlen=0))


if __name__ == "__main__":
    main()
