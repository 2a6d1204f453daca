"""The verdict in a terminal."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pandas as pd

from lungddpm.core.errors import InputError
from lungddpm.core.tables import DisplayTable
from lungddpm.core.text import format_number, styled
from lungddpm.evaluation.measures import deciding_measure
from lungddpm.report.sections import PARTLY, interval_text, outcome_of, p_text, show_checks
from lungddpm.verdict.answer import ANSWER
from lungddpm.verdict.instrument import COLUMNS, FAILED, NOT_MEASURED, PASSED
from lungddpm.verdict.tables import read_csv

_WIDTH = 100
_EXPLORATORY = "On external test sets (exploratory; the verdict is the one above):"
_MARKS = {PASSED: "+", PARTLY: "+", FAILED: "!", NOT_MEASURED: "?"}
_COLOURS = {PASSED: "green", PARTLY: "yellow", FAILED: "red", NOT_MEASURED: "yellow"}
_OF_ARM = [
    "arm", "baseline", "family", "mean", "difference", "ci_low", "ci_high", "p", "p_holm", "confidence", "verdict",
    "n_cases", "n_replicates", "sentence",
]  # fmt: skip
"""Columns of verdict.csv that `verdict_values` has for each arm."""


def verdict_table_text(results: Path) -> str:
    """The verdict as plain text for a terminal: the instrument check, whether the answer holds, the deciding measure
    of each arm in a table and in sentences, also on external test sets, and the path of the report.

    Raises:
        InputError: the run has no verdict yet.
    """
    verdict, instrument = _tables(results)
    measure = deciding_measure()
    rows = verdict[verdict["metric"] == measure.column].to_dict("records")
    table = DisplayTable(
        ["arm", measure.title, "difference", "CI", "p", "verdict"],
        [
            [
                row["arm"], format_number(row["mean"], ".3f"), format_number(row["difference"], "+.3f"),
                interval_text(row), p_text(row["p_holm"], 1 - row.get("confidence", 0.95)), row["verdict"],
            ]
            for row in rows
        ],
        [False, True, True, True, True, False],
    )  # fmt: skip
    checks = show_checks(instrument)
    lines = [f"{_MARKS[check.status]} {check.name}: {styled(check.status, _COLOURS[check.status])}" for check in checks]
    failed = [line["sentence"] for check in checks for line in check.lines if line["status"] == FAILED]
    lines += ["", *(_wrapped(text, "! ") for text in failed), _wrapped(outcome_of(instrument)["sentence"], "> ")]
    lines += ["", table.text(), ""]
    lines += [_wrapped(row["sentence"], "- ") for row in rows]
    if (found := _external_rows(results)) is not None:
        compared = found[found["arm"] != found["baseline"]]
        lines += ["", _EXPLORATORY, *(_wrapped(sentence, "- ") for sentence in compared["sentence"])]
    lines += [_wrapped(text, "! ") for text in _failed_externally(results)]
    return "\n".join([*lines, "", f"Report: {results / 'report.html'}"])


def _tables(results: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`verdict.csv` and `instrument.csv`.

    Raises:
        InputError: the run has no verdict yet.
    """
    path = results / "tables" / "verdict.csv"
    if not path.exists():
        remedy = "'lungddpm run' ends with it; 'lungddpm status' shows how far a run is."
        raise InputError(path, "does not exist", remedy)
    return read_csv(path), read_csv(path.with_name("instrument.csv"))


def _external_rows(results: Path) -> pd.DataFrame | None:
    """Rows of `external_verdict.csv` of the deciding measure; None if nothing was tested externally."""
    path = results / "tables" / "external_verdict.csv"
    if not path.exists():
        return None
    rows = read_csv(path)
    return rows[rows["metric"] == deciding_measure().column]


def _external_checks(results: Path) -> pd.DataFrame | None:
    """`external_instrument.csv`; None if the run has no external test set."""
    path = results / "tables" / "external_instrument.csv"
    return read_csv(path) if path.exists() else None


def _failed_externally(results: Path) -> list[str]:
    """The failed checks of every external test set, as sentences."""
    checks = _external_checks(results)
    if checks is None:
        return []
    failed = checks[checks["status"] == FAILED].to_dict("records")
    return [f"{row['data_set']}: {row['check']}: failed. {row['sentence']}" for row in failed]


def verdict_values(results: Path) -> dict[str, Any]:
    """The same for `--json`; the keys are those of docs/reference/command-line.md. What a run has not is NaN.

    Raises:
        InputError: the run has no verdict yet.
    """
    verdict, instrument = _tables(results)
    measure, outcome = deciding_measure(), outcome_of(instrument)
    rows = verdict[verdict["metric"] == measure.column]
    return {
        "results": results,
        "report": results / "report.html",
        "measure": measure.column,
        "answer": outcome["status"],
        "sentence": outcome["sentence"],
        "checks": _check_values(instrument[instrument["check"] != ANSWER]),
        "arms": _arm_values(rows),
        "external_tests": _external_values(results),
    }


def _check_values(checks: pd.DataFrame) -> list[dict[str, Any]]:
    return checks.reindex(columns=COLUMNS).fillna({"subject": ""}).to_dict("records")


def _arm_values(rows: pd.DataFrame) -> list[dict[str, Any]]:
    return rows.reindex(columns=_OF_ARM).to_dict("records")


def _external_values(results: Path) -> list[dict[str, Any]]:
    """Checks and arms of every external test set; one on which nothing was evaluated has no arms."""
    checks, rows = _external_checks(results), _external_rows(results)
    if checks is None:
        return []
    return [
        {
            "data_set": name,
            "checks": _check_values(of_set),
            "arms": [] if rows is None else _arm_values(rows[rows["data_set"] == name]),
        }
        for name, of_set in checks.groupby("data_set", sort=False)
    ]


def _wrapped(text: str, mark: str) -> str:
    return textwrap.fill(text, _WIDTH - 2, initial_indent=mark, subsequent_indent=" " * len(mark))
