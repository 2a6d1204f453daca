"""Pages in HTML: one look, one kind of table, no script, no network. Each room keeps its own templates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


@dataclass(frozen=True)
class Shown:
    """A table as the page shows it: column heads and cells as text; numbers are set right."""

    heads: list[str]
    rows: list[list[str]]
    numeric: list[bool]


def render(template: str, **values: Any) -> str:
    """A page from a template, named by its path in the package ("verdict/report.html.jinja"); all text is escaped."""
    environment = Environment(
        loader=PackageLoader("lungddpm", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(template).render(**values)
