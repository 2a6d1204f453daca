"""Cases on disk: the tables and folders shared by all rooms, for real and synthetic cases.

<table>.tsv              one row per case, columns as in `COLUMNS`
nodules.tsv              one row per nodule of a usable case, columns as in `NODULE_COLUMNS`
<folder>/ct.nii.gz       int16 HU, RAS+, on the model grid
<folder>/layout.nii.gz   uint8 labels (see `lungddpm.core.labels`), same grid
<folder>/nodules.nii.gz  uint8 numbers of the nodules in the scan's own resolution, cropped; real cases only
<folder>/qc.png          picture of the layout over the scan; real cases only
<folder>/case.json       provenance and quality figures (`sample.json` for synthetic cases)
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from lungddpm.core.errors import ExcludedCaseError, InputError
from lungddpm.core.files import fingerprint, read_json, sha256_of, write_table
from lungddpm.core.labels import Label
from lungddpm.core.progress import LOG
from lungddpm.core.roles import INTERNAL, roles_of
from lungddpm.core.volume import AIR_HU, Volume, read_volume

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = [
    "case_id", "patient_id", "source", "data_set", "role", "series_uid",
    "size_x", "size_y", "size_z", "spacing_x_mm", "spacing_y_mm", "spacing_z_mm",
    "n_nodules", "status", "reason", "path", "sha256",
]  # fmt: skip
"""`data_set` is `INTERNAL`, or the name of an external test set; `role` joins several by "+" under
`roles.allow_shared_patients`; `status` is ok | excluded; `path` is relative to the table's folder; `sha256` covers CT
and layout (empty before they exist)."""
CASES = "cases.tsv"
"""Name of the table of all real cases, in the folder of the cases."""
NODULES = "nodules.tsv"
"""Name of the table of their nodules, beside it."""
_EXAMPLES = 3
LARGEST_HU = 3071
"""Range of 12 bits with air at -1024."""

CHARACTERISTICS = (
    "subtlety", "internal_structure", "calcification", "sphericity", "margin",
    "lobulation", "spiculation", "texture", "malignancy",
)  # fmt: skip
"""Characteristics rated by the readers of LIDC-IDRI, from 1 to 5 (6 for calcification); `internal_structure` goes up to
4."""
RATINGS = ("texture", "malignancy", "subtlety")
"""Those that affect whether a nodule is found; copied with the nodule to samples and lesions."""

NODULE_COLUMNS = [
    "case_id", "patient_id", "nodule", "readers", "flagged", "volume_mm3", "equivalent_diameter_mm", "long_axis_mm",
    "short_axis_mm", "elongation", "centroid_x_mm", "centroid_y_mm", "centroid_z_mm", *CHARACTERISTICS,
    "touches_pleura", "touches_vessel", "share_in_or_touching_lungs", "layout_volume_mm3", "volume_error", "notes",
]  # fmt: skip
"""`nodule` is its value in `nodules.nii.gz`; axes and elongation are those of `extent.Extent`; the position is in
patient coordinates, RAS+; characteristics are medians over the readers, empty if nobody rated; `notes` reports
irregular contours."""

OWN, PLACED, JITTERED, ADDED = "reference", "placed", "jittered", "added"
"""Origin of a sample's layout: the reference's own; nodules placed in a reference that has none; the reference's
nodules moved; the reference's nodules unchanged, with additional ones."""


def read_cases(path: Path) -> pd.DataFrame:
    """Read a case table; text columns as str (never NaN), `n_nodules` as int (0 if not counted).

    Raises:
        InputError: missing file or columns, or a file that was truncated.
    """
    import pandas as pd

    try:
        text = Path(path).read_text(encoding="utf-8")
        table = pd.read_csv(StringIO(text), sep="\t", dtype=str, keep_default_na=False)
    except FileNotFoundError:
        raise InputError(path, "does not exist", "Run the stage that writes it first (see lungddpm --help).") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise InputError(path, f"is not a table of cases ({error})", "Delete it and run again.") from None
    if not text.endswith("\n"):
        raise InputError(path, "is truncated", "Delete it and run again.")
    if missing := [column for column in COLUMNS if column not in table]:
        raise InputError(path, f"lacks the columns {', '.join(missing)}", "Delete it and run again.")
    table["n_nodules"] = table["n_nodules"].replace("", "0")
    numbers: dict[str, type] = {column: float for column in COLUMNS if column.startswith("spacing")}
    numbers |= {column: int for column in COLUMNS if column.startswith("size") or column == "n_nodules"}
    try:
        return table.astype(numbers)
    except ValueError as error:
        raise InputError(path, f"has an invalid number ({error})", "Delete it and run again.") from None


def write_cases(path: Path, rows: pd.DataFrame | Iterable[dict]) -> None:
    """Write a case table atomically, columns in the order of `COLUMNS`."""
    import pandas as pd

    write_table(path, pd.DataFrame(rows, columns=COLUMNS))


def usable(cases: pd.DataFrame, role: str) -> pd.DataFrame:
    """The cases of a role that were not excluded, in table order."""
    chosen = of_role(cases, role)
    return chosen[chosen["status"] == "ok"]


@dataclass(frozen=True)
class CaseFolder:
    """The folder of one case, real or synthetic; the only place that defines the names of its files."""

    path: Path

    CT: ClassVar = "ct.nii.gz"
    LAYOUT: ClassVar = "layout.nii.gz"

    @property
    def ct(self) -> Path:
        """int16 HU, on the model grid."""
        return self.path / self.CT

    @property
    def layout(self) -> Path:
        """uint8 labels, on the grid of the CT."""
        return self.path / self.LAYOUT

    @property
    def nodules(self) -> Path:
        """Numbers of the nodules in the scan's own resolution; real cases with nodules only."""
        return self.path / "nodules.nii.gz"

    @property
    def picture(self) -> Path:
        """The layout drawn over the scan; real cases only."""
        return self.path / "qc.png"

    @property
    def record(self) -> Path:
        """Provenance and quality figures of a real case, written last."""
        return self.path / "case.json"

    @property
    def sample_record(self) -> Path:
        """Provenance of a synthetic case, written last."""
        return self.path / "sample.json"

    def nodule_figures(self) -> list[dict]:
        """The nodules in `case.json`, by number from 1; empty if the case was made elsewhere.

        Raises:
            InputError: it is damaged.
        """
        record = read_json(self.record) if self.record.exists() else {}
        return record.get("qc", {}).get("nodules", [])

    def hash(self) -> str:
        """The value of the column `sha256`: one SHA-256 over CT and layout.

        Raises:
            InputError: a file is missing.
        """
        try:
            return fingerprint([sha256_of(self.ct), sha256_of(self.layout)])
        except FileNotFoundError as error:
            raise InputError(error.filename, "does not exist", "Delete the table of its case and run again.") from None

    def read(self) -> tuple[Volume, Volume]:
        """CT and layout, checked against the contract.

        Returns:
            (ct, layout): int16 HU and uint8 labels on one grid.

        Raises:
            InputError: a file is missing or unreadable, or `check_case` finds an error.
        """
        ct, layout = read_volume(self.ct), read_volume(self.layout)
        check_case(ct, layout, self.path)
        return ct, layout


def folder_of(table: Path, case: pd.Series) -> CaseFolder:
    """The folder of a row of a case table."""
    return CaseFolder(Path(table).parent / case["path"])


def unchanged_folder_of(table: Path, case: pd.Series) -> CaseFolder:
    """CT and layout, checked against the row's `sha256`.

    Raises:
        InputError: a file is missing, or its hash differs from the table.
    """
    folder = folder_of(table, case)
    if folder.hash() != case["sha256"]:
        problem = f"does not match its hash in {table}"
        raise InputError(folder.path, problem, "Delete the table and run again.")
    return folder


def hash_voxels(ct: Volume) -> str:
    """SHA-256 of the HU of a CT, which identifies a scan whatever its file, header and compression.

    HU are rounded and clipped to 12 bits: padding has various values below air, and metal above.

    Args:
        ct: HU, in canonical orientation.
    """
    digest = hashlib.sha256(repr(ct.shape).encode())
    for number in range(ct.shape[2]):
        digest.update(np.rint(np.clip(ct.array[..., number], AIR_HU, LARGEST_HU)).astype("<i2").tobytes())
    return digest.hexdigest()


def check_case(ct: Volume, layout: Volume, origin: Path | str) -> None:
    """Check the contract: CT and layout share a grid, the CT is finite and varies, the labels are known.

    Raises:
        ExcludedCaseError: naming `origin` and the first error.
    """
    if ct.shape != layout.shape:
        raise ExcludedCaseError(
            origin, f"CT {ct.shape} and labels {layout.shape} differ in shape", "Export both on the same grid."
        )
    if not ct.same_grid(layout):
        raise ExcludedCaseError(origin, "CT and labels have different affines", "Export both with the same geometry.")
    if not np.isfinite(ct.array).all():
        raise ExcludedCaseError(origin, "the CT has NaN or infinite values", "Export it in Hounsfield units.")
    if ct.array.min() == ct.array.max():
        raise ExcludedCaseError(origin, f"the CT is constant ({ct.array.flat[0]} HU)", "Export it again.")
    unknown = np.setdiff1d(np.unique(layout.array), [int(label) for label in Label])
    if unknown.size:
        raise ExcludedCaseError(
            origin,
            f"the labels contain {', '.join(f'{value:g}' for value in unknown[:5])}, allowed are 0 to {max(Label)}",
            "Use 0 background, 1 lung, 2 nodule, 3 vessel.",
        )


def excluded_alike(rows: Iterable[Mapping]) -> list[list[Mapping]]:
    """The excluded rows of a case table, grouped by kind of reason, the most frequent kind first.

    Reasons are of the same kind if they differ only in the file name and in numbers.
    """
    kinds: dict[str, list[Mapping]] = defaultdict(list)
    for row in rows:
        if row["status"] != "ok":
            words = (row["reason"].partition(": ")[2] or row["reason"]).split()
            kinds[" ".join(word for word in words if not any(map(str.isdigit, word)))].append(row)
    return sorted(kinds.values(), key=len, reverse=True)


def log_excluded(rows: Iterable[Mapping]) -> None:
    """Log which cases are excluded and why, one line per kind of reason."""
    for alike in excluded_alike(rows):
        named = ", ".join(row["case_id"] for row in alike[:_EXAMPLES])
        more = f" and {len(alike) - _EXAMPLES} more" if len(alike) > _EXAMPLES else ""
        action = "excluded" if len(alike) == 1 else "excluded for reasons such as"
        LOG.warning("%s%s: %s: %s", named, more, action, alike[0]["reason"])


def internal(cases: pd.DataFrame) -> pd.DataFrame:
    """The cases that are not of an external test set, in table order."""
    return cases[cases["data_set"] == INTERNAL]


def of_role(cases: pd.DataFrame, role: str) -> pd.DataFrame:
    """The cases of a role, including excluded ones, in table order."""
    return cases[cases["role"].map(lambda cell: role in roles_of(cell)).astype(bool)]
