"""`lungddpm fetch lidc`: LIDC-IDRI from the Imaging Data Commons, as CT and the readers' SEG objects.

Files and sizes come from the index in the optional package `idc-index`; there is no network access before the
transfer. Fedorov et al., RadioGraphics 43:e230180, 2023, doi 10.1148/rg.230180.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from lungddpm.core.errors import InputError, OutputError, UserError
from lungddpm.core.files import write_text
from lungddpm.core.progress import Progress, waiting
from lungddpm.core.text import plural

if TYPE_CHECKING:
    import pandas as pd

LARGE_BYTES = 20 * 10**9
"""Larger downloads need confirmation."""
CONFIG = "lidc.yaml"
LICENCE = "CC BY 3.0 (https://creativecommons.org/licenses/by/3.0/)"
CITATIONS = (
    "Armato et al., Data From LIDC-IDRI, The Cancer Imaging Archive, 2015, doi 10.7937/K9/TCIA.2015.LO9QL9SX",
    "Armato et al., Medical Physics 38:915-931, 2011, doi 10.1118/1.3528204",
    "Fedorov et al., Standardized representation of the TCIA LIDC-IDRI annotations using DICOM, The Cancer Imaging "
    "Archive, 2018, doi 10.7937/TCIA.2018.h7umfurq",
    "Fedorov et al., RadioGraphics 43:e230180, 2023, doi 10.1148/rg.230180 (Imaging Data Commons)",
)
_COLLECTION, _READINGS = "lidc_idri", "dicom_lidc_idri_nodules"
_COLUMNS = {
    "collection_id": "collection",
    "analysis_result_id": "result",
    "PatientID": "patient",
    "StudyInstanceUID": "study",
    "SeriesInstanceUID": "series",
    "Modality": "modality",
    "instanceCount": "files",
    "series_size_MB": "megabytes",
}
_TEMPLATE = "%PatientID/%StudyInstanceUID/%Modality_%SeriesInstanceUID"

Transfer = Callable[[Sequence[str], Path], None]
"""Fetch series, by UID, into a folder, laid out as `Item.folder` says."""


@dataclass(frozen=True)
class Item:
    """One series to fetch."""

    patient: str
    study: str
    series: str
    modality: str
    files: int
    size: int
    """In bytes."""

    @property
    def folder(self) -> Path:
        """Its folder, relative to that of the data set."""
        return Path(self.patient, self.study, f"{self.modality}_{self.series}")

    def is_complete(self, output: Path) -> bool:
        """Whether it is there with the right number and size of files."""
        sizes = [file.stat().st_size for file in (output / self.folder).glob("*.dcm")]
        return (len(sizes), sum(sizes)) == (self.files, self.size)


def read_index() -> pd.DataFrame:
    """The series of LIDC-IDRI in the index of `idc-index`, with short names of columns.

    Raises:
        UserError: `idc-index` is not installed.
    """
    import pandas as pd

    try:
        from idc_index_data import IDC_INDEX_PARQUET_FILEPATH

        table = pd.read_parquet(
            IDC_INDEX_PARQUET_FILEPATH, columns=list(_COLUMNS), filters=[("collection_id", "==", _COLLECTION)]
        )
    except ImportError as error:
        raise UserError("idc-index", f"is not installed ({error})", "Install it: pip install idc-index.") from None
    return table.rename(columns=_COLUMNS)


def select(index: pd.DataFrame, patients: str) -> list[Item]:
    """The series to fetch: CT, and a SEG object for each reader and nodule.

    Args:
        index: from `read_index`.
        patients: a number of patients with nodules of at least 3 mm, in order of their ids; or comma-separated ids;
            or `all`, i.e. all with such nodules.

    Raises:
        InputError: no patients, or one that is not in the collection.
    """
    scans = index[(index["modality"] == "CT") & index["result"].isna()]
    drawn = index[(index["modality"] == "SEG") & (index["result"] == _READINGS)]
    with_nodules = sorted(set(scans["patient"]) & set(drawn["patient"]))
    if patients == "all":
        wanted = with_nodules
    elif patients.isdecimal():
        wanted = with_nodules[: int(patients)]
    else:
        wanted = sorted({name.strip() for name in patients.split(",") if name.strip()})
    if unknown := sorted(set(wanted) - set(scans["patient"])):
        shown = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        raise InputError(
            "--patients", f"names patients that are not in LIDC-IDRI ({shown})", "Ids look like LIDC-IDRI-0001."
        )
    if not wanted:
        raise InputError(
            "--patients", f"'{patients}' does not name a patient", "Give a number, comma-separated ids, or all."
        )
    items = [
        Item(row.patient, row.study, row.series, row.modality, int(row.files), round(row.megabytes * 10**6))
        for table in (scans, drawn)
        for row in table[table["patient"].isin(wanted)].itertuples()
    ]
    return sorted(items, key=lambda item: (item.patient, item.modality, item.series))


def describe(items: Sequence[Item], missing: Sequence[Item], output: Path) -> list[str]:
    """The plan, one line per fact."""
    patients = {item.patient for item in items}
    without = sorted(patients - {item.patient for item in items if item.modality == "SEG"})
    lines = [
        f"{plural(len(patients), 'patient')}: {sum(item.modality == 'CT' for item in items)} CT series, "
        f"{plural(sum(item.modality == 'SEG' for item in items), 'SEG object')}, "
        f"{plural(sum(item.files for item in items), 'file')}, {_gigabytes(items)}",
        f"here already: {len(items) - len(missing)} series; to fetch: {_gigabytes(missing)} into {output}",
    ]
    if without:
        lines.append(f"without a nodule of at least 3 mm, so the scan will not be used: {', '.join(without)}")
    return lines


def fetch(items: Sequence[Item], output: Path, transfer: Transfer) -> None:
    """Fetch incomplete series, patient by patient, and check number and size of their files.

    Complete series of an earlier call are kept; the files of an incomplete series are removed first.

    Raises:
        OutputError: the disk is too small.
        UserError: nothing arrived of the first patient, or series are incomplete after the transfer.
    """
    missing = [item for item in items if not item.is_complete(output)]
    output.mkdir(parents=True, exist_ok=True)
    needed, free = sum(item.size for item in missing), shutil.disk_usage(output).free
    if needed > free:
        problem = f"{needed / 10**9:.1f} GB are needed, {free / 10**9:.1f} GB are free"
        raise OutputError(output, problem, "Choose fewer patients, or another folder.")
    arrived = False
    with Progress("series", total=len(missing)) as progress:
        for patient, group in groupby(missing, key=lambda item: item.patient):
            of_patient = list(group)
            for item in of_patient:
                shutil.rmtree(output / item.folder, ignore_errors=True)
            with waiting(f"files of {patient}"):
                transfer([item.series for item in of_patient], output)
            arrived = arrived or any(any((output / item.folder).glob("*")) for item in of_patient)
            if not arrived:
                # The transfer only logs its errors: without a network, every patient would be tried in turn.
                raise UserError(patient, "none of its files arrived", "Check the network, or name other patients.")
            for _ in of_patient:
                progress.advance()
    if left := [item for item in missing if not item.is_complete(output)]:
        problem = f"{len(left)} of {len(missing)} series are incomplete"
        raise UserError(output / left[0].folder, problem, "Run the same command again: it fetches what is missing.")


def write_config(output: Path) -> Path:
    """Write the overlay that points to the folder, and return its path."""
    path = output / CONFIG
    # JSON is YAML, and quotes any character of a path.
    write_text(path, f"source: {{kind: lidc, path: {json.dumps(str(output.resolve()), ensure_ascii=False)}}}\n")
    return path


def by_idc(series: Sequence[str], folder: Path) -> None:
    """Fetch series through `idc-index`, which uses s5cmd and needs no account."""
    from idc_index import IDCClient

    IDCClient.client().download_from_selection(
        downloadDir=str(folder), seriesInstanceUID=list(series), dirTemplate=_TEMPLATE, show_progress_bar=False
    )


def _gigabytes(items: Sequence[Item]) -> str:
    return f"{sum(item.size for item in items) / 10**9:.2f} GB"
