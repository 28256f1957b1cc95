"""A table of results: printed, and kept as CSV and Markdown."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mrgen.files import write_text

__all__ = ["Table", "write_rows"]


@dataclass
class Table:
    """Rows of cells under named columns.

    Attributes:
        title: above the table.
        columns: names; the first columns name the row, the others hold numbers.
        rows: cells in the order of the columns, as strings.
        notes: printed under the table: what was measured on whom, and by which rule.
    """

    title: str
    columns: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def show(self) -> None:
        """Prints the table, in a terminal as wide as that, elsewhere in up to 200 columns."""
        from rich.console import Console
        from rich.table import Table as RichTable

        table = RichTable(title=self.title)
        for column in self.columns:
            table.add_column(column, overflow="fold")  # what does not fit goes on in a second line and is not cut
        for row in self.rows:
            table.add_row(*row)
        # Cells are no markup: rich would take "[inf, inf]" for a style and print nothing.
        terminal = Console().is_terminal
        console = Console(width=None if terminal else 200, markup=False, emoji=False, highlight=False)
        console.print(table, *self.notes, "", sep="\n")

    def markdown(self) -> str:
        """The table as Markdown."""
        lines = [f"### {self.title}", "", *(" | ".join(["", *cells, ""]).strip() for cells in [self.columns])]
        lines.append("|" + " --- |" * len(self.columns))
        lines += [" | ".join(["", *row, ""]).strip() for row in self.rows]
        return "\n".join([*lines, "", *(f"{note}  " for note in self.notes), ""])


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One CSV line a mapping; columns are the union of the keys, in order of appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
