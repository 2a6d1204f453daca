"""One table of all cases and one of all their nodules, from the tables of the shards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lungddpm.config.models import Config
from lungddpm.core.cases import (
    NODULE_COLUMNS,
    NODULES,
    excluded_alike,
    folder_of,
    internal,
    log_excluded,
    of_role,
    read_cases,
    write_cases,
)
from lungddpm.core.errors import InputError
from lungddpm.core.files import read_json, write_table
from lungddpm.core.progress import LOG, waiting
from lungddpm.core.roles import REFERENCE, ROLES

if TYPE_CHECKING:
    import pandas as pd


def run_collect(config: Config, tables: list[Path], output: Path) -> None:
    """Merge the shards' tables, and check that every role has usable cases.

    Rows are in order of case id, those without a patient last. Next to the merged table it writes `nodules.tsv`, with
    a row for each nodule of the usable cases.

    Args:
        config: `synthesis.place_nodules` is used; `roles` appears in messages.
        tables: case tables of all shards.
        output: merged table to write, in the folder of the cases.

    Raises:
        InputError: a role has no usable case, or none with a nodule where it needs one (references do not, if they get
            placed ones), or an external test set has none; the message gives the reasons for the exclusions. Or the
            `case.json` of a usable case is missing or damaged.
    """
    import pandas as pd

    merged = pd.concat([read_cases(table) for table in tables]).sort_values("case_id")
    merged = merged.sort_values("patient_id", key=lambda patients: patients == "", kind="stable")
    excluded = merged[merged["status"] != "ok"]
    log_excluded(merged.to_dict("records"))
    LOG.info("%d cases are usable, %d are excluded", len(merged) - len(excluded), len(excluded))
    for role in ROLES:
        gets_nodules = role == REFERENCE and config.synthesis.place_nodules
        _check_enough(of_role(internal(merged), role), f"roles.{role} = {getattr(config.roles, role)}", gets_nodules)
    for name in config.external_tests:
        _check_enough(merged[merged["data_set"] == name], f"external_tests.{name}", gets_nodules=False)
    with waiting("reading the nodules of all cases"):
        nodules = _nodules_of(merged[merged["status"] == "ok"], output)
    write_table(output.with_name(NODULES), nodules)
    write_cases(output, merged)


def _check_enough(members: pd.DataFrame, key: str, gets_nodules: bool) -> None:
    """Make sure that those of a role, or of an external test set, can do their part."""
    having = members[members["status"] == "ok"]
    if (having["n_nodules"] > 0).any() or (gets_nodules and not having.empty):
        return
    alike = excluded_alike(members[members["status"] != "ok"].to_dict("records"))
    why = "; ".join(f"{rows[0]['reason']} ({len(rows)} x)" for rows in alike)
    raise InputError(
        key,
        f"no usable case {'' if having.empty else 'with a nodule '}is left; excluded: {why or 'none'}",
        "Give it more patients, or fix the reasons for the exclusions. Then 'lungddpm run --forcerun index prepare' "
        "reads the scans again.",
    )


def _nodules_of(cases: pd.DataFrame, table: Path) -> pd.DataFrame:
    """One row per nodule (see `NODULE_COLUMNS`), from the records in the cases' folders."""
    import pandas as pd

    rows, remedy = [], "Delete the table of its case and run again."
    for _, case in cases.iterrows():
        path = folder_of(table, case).record
        record = read_json(path, remedy)
        try:
            nodules = record["qc"]["nodules"]
            rows += [
                {"case_id": case["case_id"], "patient_id": case["patient_id"], "nodule": number, **figures}
                for number, figures in enumerate(nodules, start=1)
            ]
        except (KeyError, TypeError) as error:
            raise InputError(path, f"does not describe the case's nodules ({error!r})", remedy) from None
    return pd.DataFrame(rows, columns=NODULE_COLUMNS)
