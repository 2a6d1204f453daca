"""Tables for display, for pages and for the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from io import StringIO


@dataclass(frozen=True)
class DisplayTable:
    """A table for display: heads and cells as text."""

    heads: list[str]
    rows: list[list[str]]
    numeric: list[bool]
    """For each column: whether it is right-aligned, like numbers."""

    def text(self, width: int = 200) -> str:
        """For a terminal, in columns without lines; lines have at most `width` characters."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, padding=(0, 2, 0, 0), header_style="")
        for head, numeric in zip(self.heads, self.numeric, strict=True):
            table.add_column(Text(head), justify="right" if numeric else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*map(Text, row))
        printed = StringIO()
        Console(file=printed, width=width, no_color=True, highlight=False).print(table)
        return "\n".join(line.rstrip() for line in printed.getvalue().splitlines())
