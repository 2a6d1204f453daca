"""The patient of an image: from a table, from a pattern in its name, or one patient per image."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable
from pathlib import Path, PureWindowsPath

from lungddpm.core.errors import InputError
from lungddpm.core.roles import PATIENT_COLUMNS
from lungddpm.sources.images.folders import case_name
from lungddpm.sources.images.settings import Images

_UNKNOWN = "n/a"
"""A missing value in tables of BIDS (specification 1.10, tabular files)."""
PatientOf = Callable[[Path], str]
"""From an image to its patient; raises InputError if it is not known."""


def patient_finder(top: Path, settings: Images, section: str = "source.images") -> PatientOf:
    """The function that finds the patient of an image.

    Args:
        top: folder of the data set.
        settings: table or pattern.
        section: key of these settings in the config, for messages.

    Raises:
        InputError: the table is missing, cannot be read, lacks a column, or gives a file two patients.
    """
    if settings.patient_table is not None:
        return _by_table(top / settings.patient_table, f"{section}.patient_table")
    if settings.patient_pattern is not None:
        return _by_pattern(settings.patient_pattern, f"{section}.patient_pattern")
    return lambda image: case_name(image.name)


def _by_table(table: Path, key: str) -> PatientOf:
    patients = _read_table(table, key)

    def patient_of(image: Path) -> str:
        if patient := patients.get(case_name(image.name)):
            return patient
        raise InputError(image, f"has no patient in {table.name}", "Add a row, or remove the image.")

    return patient_of


def _by_pattern(pattern: str, key: str) -> PatientOf:
    compiled = re.compile(pattern)

    def patient_of(image: Path) -> str:
        found = compiled.search(case_name(image.name))
        if found and found[1]:
            return found[1]
        raise InputError(image, f"does not match the pattern {pattern}", f"Change {key}, or the name.")

    return patient_of


def _read_table(table: Path, key: str) -> dict[str, str]:
    """Patients by case name."""
    try:
        text = table.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        remedy = f"{key} is looked up in the folder of the data set."
        raise InputError(table.absolute(), "does not exist", remedy) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(table.absolute(), f"cannot be read ({error})", "Save it as UTF-8 text.") from None
    rows = csv.DictReader(text.splitlines(), delimiter=_delimiter(text))
    columns = [column.strip() for column in rows.fieldnames or []]
    patient = next((column for column in PATIENT_COLUMNS if column in columns), "patient")
    if missing := [column for column in ("file", patient) if column not in columns]:
        problem = f"lacks the column {' and the column '.join(missing)} (it has {', '.join(columns) or 'none'})"
        raise InputError(table.absolute(), problem, "The first line must name the columns: file, patient.")
    rows.fieldnames = columns
    return _by_case(table, ((row["file"] or "", row[patient] or "") for row in rows))


def _by_case(table: Path, rows: Iterable[tuple[str, str]]) -> dict[str, str]:
    patients: dict[str, str] = {}
    for file, patient in rows:
        # A file may be given with its folder, in the notation of any system.
        name = case_name(PureWindowsPath(file.strip()).name)
        patient = "" if patient.strip() == _UNKNOWN else patient.strip()
        if patients.setdefault(name, patient) != patient:
            raise InputError(table.absolute(), f"gives {file.strip()} two patients", "Keep one of the rows.")
    return patients


def _delimiter(text: str) -> str:
    first = text.partition("\n")[0]
    return next((mark for mark in "\t;" if mark in first), ",")
