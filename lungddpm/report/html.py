"""Pages in HTML: one look, one kind of table, nothing from the network. Each room keeps its own templates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lungddpm.core.cases import excluded_alike
from lungddpm.core.tables import DisplayTable

if TYPE_CHECKING:
    import pandas as pd

_SINGLY = 30
"""Up to this many excluded cases have a row each; beyond it, cases with the same kind of reason share one."""


def render(template: str, **values: Any) -> str:
    """A page from a template, named by its file ("report.html.jinja"); all text is escaped."""
    environment = Environment(
        loader=PackageLoader("lungddpm.report", "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(template).render(**values)


def show_excluded(case_table: pd.DataFrame) -> DisplayTable | None:
    """The excluded rows of a case table with their reasons, one row per kind of reason if there are many; None if there
    are none."""
    excluded = case_table[case_table["status"] != "ok"].to_dict("records")
    if not excluded:
        return None
    if len(excluded) <= _SINGLY:
        rows = [[row["case_id"], row["patient_id"], row["reason"]] for row in excluded]
        return DisplayTable(["case", "patient", "reason"], rows, [False] * 3)
    rows = [
        [str(len(alike)), alike[0]["reason"], ", ".join(row["case_id"] for row in alike[:3])]
        for alike in excluded_alike(excluded)
    ]
    return DisplayTable(["cases", "reason of the first", "for example"], rows, [True, False, False])
