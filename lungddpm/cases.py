"""Cases on disk: the table and the folder that every room agrees on, real and synthetic alike.

<table>.tsv          one row a case, columns as in `COLUMNS`
<folder>/ct.nii.gz       int16 HU, RAS+, on the model grid
<folder>/layout.nii.gz   uint8 labels (see `lungddpm.layouts.Label`), same grid
<folder>/case.json       provenance (`sample.json` for synthetic cases)
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lungddpm.config import Config
from lungddpm.errors import ExcludedCaseError, InputError
from lungddpm.files import fingerprint, sha256_of, write_table
from lungddpm.layouts import Label
from lungddpm.progress import LOG
from lungddpm.volume import Volume, read_volume

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = [
    "case_id", "patient_id", "source", "role", "series_uid",
    "size_x", "size_y", "size_z", "spacing_x_mm", "spacing_y_mm", "spacing_z_mm",
    "n_nodules", "status", "reason", "path", "sha256",
]  # fmt: skip
"""`role` joins several by "+" under `roles.allow_shared_patients`; `status` is ok | excluded; `path` is relative to
the table's folder; `sha256` covers CT and layout (empty before they exist)."""


def read_cases(path: Path) -> pd.DataFrame:
    """Read a case table; text columns as str (never NaN), `n_nodules` as int.

    Raises:
        InputError: missing file or columns.
    """
    import pandas as pd

    try:
        table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    except FileNotFoundError:
        raise InputError(path, "does not exist", "Run the stage that writes it first (see lungddpm --help).") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise InputError(path, f"is not a table of cases ({error})", "Delete it and run again.") from None
    if missing := [column for column in COLUMNS if column not in table]:
        raise InputError(path, f"lacks the columns {', '.join(missing)}", "Delete it and run again.")
    numbers = {column: float for column in COLUMNS if column.startswith("spacing")}
    numbers |= {column: int for column in COLUMNS if column.startswith("size") or column == "n_nodules"}
    try:
        return table.astype(numbers)
    except ValueError as error:
        raise InputError(path, f"has a number that is none ({error})", "Delete it and run again.") from None


def write_cases(path: Path, rows: pd.DataFrame | Iterable[dict]) -> None:
    """Write a case table atomically, columns in the order of `COLUMNS`."""
    import pandas as pd

    write_table(path, pd.DataFrame(rows, columns=COLUMNS))


def usable(cases: pd.DataFrame, role: str) -> pd.DataFrame:
    """The cases of a role that were not excluded, in table order."""
    of_role = _of_role(cases, role)
    return of_role[of_role["status"] == "ok"]


def folder_of(table: Path, case: pd.Series) -> Path:
    """The folder that holds a row's CT and layout."""
    return Path(table).parent / case["path"]


def hash_case(folder: Path) -> str:
    """What the column `sha256` holds: one SHA-256 over CT and layout.

    Raises:
        InputError: a file is missing.
    """
    try:
        return fingerprint([sha256_of(folder / name) for name in ("ct.nii.gz", "layout.nii.gz")])
    except FileNotFoundError as error:
        raise InputError(error.filename, "does not exist", "Delete the table of its case and run again.") from None


def read_case(folder: Path) -> tuple[Volume, Volume]:
    """CT and layout of a case folder, checked against the contract.

    Returns:
        (ct, layout): int16 HU and uint8 labels on one grid.

    Raises:
        InputError: a file is missing or unreadable, or `check_case` finds a fault.
    """
    ct, layout = read_volume(folder / "ct.nii.gz"), read_volume(folder / "layout.nii.gz")
    check_case(ct, layout, folder)
    return ct, layout


def check_case(ct: Volume, layout: Volume, origin: Path | str) -> None:
    """Check the contract: CT and layout share a grid, the CT is finite and varies, the labels are known.

    Raises:
        ExcludedCaseError: naming `origin` and the first fault.
    """
    if ct.shape != layout.shape:
        raise ExcludedCaseError(
            origin, f"CT {ct.shape} and labels {layout.shape} differ in shape", "Export both on one grid."
        )
    if not ct.same_grid(layout):
        raise ExcludedCaseError(origin, "CT and labels have different affines", "Export both with one geometry.")
    if not np.isfinite(ct.array).all():
        raise ExcludedCaseError(origin, "the CT holds NaN or infinite values", "Export it in Hounsfield units.")
    if ct.array.min() == ct.array.max():
        raise ExcludedCaseError(origin, f"the CT is constant ({ct.array.flat[0]} HU)", "Export it anew.")
    unknown = np.setdiff1d(np.unique(layout.array), [int(label) for label in Label])
    if unknown.size:
        raise ExcludedCaseError(
            origin,
            f"the labels hold {', '.join(f'{value:g}' for value in unknown[:5])}, known are 0 to {max(Label)}",
            "Use 0 background, 1 lung, 2 nodule, 3 vessel.",
        )


def run_collect(config: Config, tables: list[Path], output: Path) -> None:
    """Merge the shards' tables, in order of case id, and make sure that every role can do its part.

    Args:
        config: `roles` stands in messages.
        tables: case tables of all shards.
        output: merged table to write.

    Raises:
        InputError: a role has no usable case, or none with a nodule; the message says why the others were excluded.
    """
    import pandas as pd

    merged = pd.concat([read_cases(table) for table in tables]).sort_values("case_id", kind="stable")
    excluded = merged[merged["status"] != "ok"]
    for case in excluded.itertuples():
        LOG.warning("%s is excluded: %s", case.case_id, case.reason)
    LOG.info("%d cases are usable, %d are excluded", len(merged) - len(excluded), len(excluded))
    for role in ("discovery", "reference", "test"):
        having = usable(merged, role)
        if (having["n_nodules"] > 0).any():
            continue
        reasons = _of_role(excluded, role)["reason"].value_counts()
        why = "; ".join(f"{reason} ({count} x)" for reason, count in reasons.items())
        raise InputError(
            f"roles.{role} = {getattr(config.roles, role)}",
            f"no usable case {'' if having.empty else 'with a nodule '}is left; excluded: {why or 'none'}",
            "Give the role more patients, or mend what the reasons name.",
        )
    write_cases(output, merged)


def _of_role(cases: pd.DataFrame, role: str) -> pd.DataFrame:
    return cases[cases["role"].map(lambda roles: role in roles.split("+")).astype(bool)]
