"""Split files: which patients have a role, as a user or a publication lists them."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from lungddpm.core.errors import ConfigError
from lungddpm.core.roles import PATIENT_COLUMNS, ROLES

_TABLES = {".csv", ".tsv"}
_KNOWN = ", ".join(ROLES)


def read_split(path: Path, role: str) -> list[str]:
    """The patients to whom a split file gives a role, in its order.

    A table (.csv, .tsv) has the columns `patient_id` (or one of the other `PATIENT_COLUMNS`) and `role`. Any other
    file has one patient per line, all of the role that it is named for; empty lines, and those that begin with `#`, do
    not count.

    Args:
        path: of the file, UTF-8; a relative one starts in the working directory.
        role: one of `core.roles.ROLES`.

    Raises:
        ConfigError: the file is missing or not text, lacks a column, has a row without a patient or with another role,
            has a patient twice, or nobody of this role.
    """
    text, is_table = _text_of(path), path.suffix.lower() in _TABLES
    rows = list(_rows_of_table(path, text) if is_table else _lines(text, role))
    first: dict[str, tuple[int, str]] = {}
    for line, patient, given in rows:
        if patient in first:
            before, other = first[patient]
            twice = "twice" if given == other else f"as {other} and as {given}"
            raise ConfigError(path, f"has {patient} {twice}, in lines {before} and {line}", "Keep one of them.")
        first[patient] = (line, given)
    patients = [patient for _, patient, given in rows if given == role]
    if not patients:
        raise ConfigError(path, f"has no patient for roles.{role}", "Name another file, or a number of patients.")
    return patients


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        remedy = "Give a number, a list of patients, or the path of a split file (it starts in the working directory)."
        raise ConfigError(path, "does not exist", remedy) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(path, f"cannot be read ({error})", "Save it as UTF-8 text.") from None


def _lines(text: str, role: str) -> Iterator[tuple[int, str, str]]:
    """Number of the line, patient and role of every line that counts."""
    for number, line in enumerate(text.splitlines(), start=1):
        if (patient := line.strip()) and not patient.startswith("#"):
            yield number, patient, role


def _rows_of_table(path: Path, text: str) -> Iterator[tuple[int, str, str]]:
    """The same of every row of a table."""
    heads = text.partition("\n")[0]
    rows = csv.DictReader(text.splitlines(), delimiter=next((mark for mark in "\t;" if mark in heads), ","))
    columns = rows.fieldnames = [column.strip() for column in rows.fieldnames or []]
    of_patient = next((name for name in PATIENT_COLUMNS if name in columns), None)
    if of_patient is None or "role" not in columns:
        missing = "role" if of_patient else PATIENT_COLUMNS[0]
        problem = f"has no column {missing} (it has {', '.join(columns) or 'none'})"
        raise ConfigError(path, problem, "Its first line names the columns: patient_id, role.")
    for row in rows:
        patient, role = ((row[column] or "").strip() for column in (of_patient, "role"))
        if not patient:
            raise ConfigError(path, f"has no patient in line {rows.line_num}", "Add the patient, or remove the line.")
        if role not in ROLES:
            problem = f"has the role '{role}' in line {rows.line_num}"
            raise ConfigError(path, problem, f"Roles are {_KNOWN}; remove the rows of other patients.")
        yield rows.line_num, patient, role
