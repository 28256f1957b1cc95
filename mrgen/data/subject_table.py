"""The table that some challenges ship beside their scans (`name_mapping.csv`): grades and sites by subject."""

import csv
import io
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from mrgen.data.layouts import Layout
from mrgen.files import open_to_read

__all__ = ["SubjectTable", "read_tables"]

LARGEST = 64 << 20  # bytes; the challenges' tables have some kilobytes
_DELIMITERS = ",;\t|"
_EMPTY = {"", "na", "n/a", "nan", "none"}


@dataclass
class SubjectTable:
    """Rows by subject, and what is wrong with the files that they come from.

    Attributes:
        rows: by id, values by column; columns are named as `column_name` leaves them.
        problems: by file, what was found, what was expected and what to do.
        notes: likewise, what the tables do not say; files without a column may be another part of the challenge.
    """

    rows: dict[str, dict[str, str]] = field(default_factory=dict)
    problems: dict[Path, str] = field(default_factory=dict)
    notes: dict[Path, str] = field(default_factory=dict)

    def value(self, id: str, column: str) -> str:
        """What a row says in a column, or nothing."""
        return self.rows.get(id, {}).get(column_name(column), "")


def column_name(name: str) -> str:
    """Column names as they are compared: whoever edited the table may have changed case or blanks."""
    return _plain(name).casefold()


def _plain(cell: str) -> str:
    """Without blanks around it and characters of no width, which nobody sees."""
    return " ".join("".join(c for c in cell if unicodedata.category(c) != "Cf").split())


def read_tables(layout: Layout, paths: Iterable[Path], subjects: Iterable[str]) -> SubjectTable:
    """Reads the tables of a cohort, whatever program saved them.

    Args:
        layout: says which columns count.
        paths: the files; several complete one another.
        subjects: ids that rows are looked for.
    """
    table, known = SubjectTable(), set(subjects)
    id_column = layout.table["id"]
    wanted = [rule["column"] for rule in layout.fields.values() if "column" in rule]
    id_name, names = column_name(id_column), [column_name(name) for name in wanted]
    for path in (paths := list(paths)):
        try:
            columns, lines = _read(path, id_name)
        except OSError as error:
            table.problems[path] = _lost(f"cannot be read ({error.strerror or error})", wanted)
            continue
        except (ValueError, csv.Error) as error:
            table.problems[path] = _lost(f"is no table ({error})", wanted)
            continue
        ids = dict.fromkeys(line[id_name] for line in lines)
        found = ", ".join(columns[:8])
        if id_name not in columns:
            table.problems[path] = _lost(f"found the columns {found}, expected {id_column} as well", wanted)
        elif known.isdisjoint(ids):
            some = ", ".join(list(ids)[:3]) or "no row"
            table.problems[path] = _lost(
                f"found {some} in {id_column}, expected ids of subjects below the root", wanted
            )
        elif lacking := [name for name in wanted if column_name(name) not in columns]:
            table.notes[path] = f"found the columns {found}, expected {', '.join(lacking)} as well, not known without"
        for line in lines:  # a row twice in one file may contradict itself as well
            name = line[id_name]
            row = table.rows.setdefault(name, {})
            told = {column: value for column, value in line.items() if value.casefold() not in _EMPTY}
            other = [c for c in names if c in row and c in told and row[c].casefold() != told[c].casefold()]
            if other and name in known:
                what = f"found {told[other[0]]} for {name} in {other[0]}, where another row says {row[other[0]]}"
                table.problems.setdefault(path, _lost(what, wanted))
                continue
            row.update(told)
    pattern = Path(layout.table["files"])
    grade = layout.fields.get("grade", {}).get("column")
    if not paths:
        table.notes[pattern] = f"found no such table, so {' and '.join(wanted)} of the subjects are not known"
    elif grade and not table.problems and not table.notes:
        unknown = sorted(id for id in known if not table.value(id, grade))
        if unknown:
            some = ", ".join(unknown[:3]) + (", …" if len(unknown) > 3 else "")
            table.notes[pattern] = f"found no row or no {grade} for {len(unknown)} of {len(known)} subjects ({some})"
    return table


def _lost(what: str, wanted: list[str]) -> str:
    return f"{what}; without it {' and '.join(wanted) or 'its columns'} of the subjects are not known. Mend the table"


def _read(path: Path, id_column: str) -> tuple[list[str], list[dict[str, str]]]:
    """Column names, and the rows that have an id. Raises OSError, ValueError and csv.Error."""
    with open_to_read(path) as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"more than {LARGEST:,} bytes")
    text = _decoded(content)
    first = next((line for line in text.splitlines() if line.strip()), "")
    if first.casefold().startswith("sep=") and len(first) == 5:  # Excel's own first line
        text = text.partition(first)[2].lstrip("\r\n")
        first = next((line for line in text.splitlines() if line.strip()), "")

    def columns(delimiter: str) -> list[str]:
        return [column_name(name) for name in next(csv.reader([first], delimiter=delimiter, skipinitialspace=True), [])]

    delimiter = max(_DELIMITERS, key=lambda d: (id_column in columns(d), len(columns(d))))
    names = columns(delimiter)
    while names and not names[-1]:
        names.pop()
    if repeated := sorted({name for name in names if name and names.count(name) > 1}):
        raise ValueError(f"the column {repeated[0]} twice")
    rows = []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    next((cells for cells in reader if any(cell.strip() for cell in cells)), None)  # the header
    for cells in reader:
        if any("\n" in cell for cell in cells):
            raise ValueError("a quotation mark is not closed")
        cells = [_plain(cell) for cell in cells]
        if not any(cells):
            continue
        if len(cells) < len(names) or any(cells[len(names) :]):
            raise ValueError(f"{len(cells)} cells in line {reader.line_num}, where the header has {len(names)}")
        row = {name: cell for name, cell in zip(names, cells, strict=False) if name}
        if row.get(id_column):
            rows.append(row)
    return [name for name in names if name], rows


def _decoded(content: bytes) -> str:
    """Text in one of the encodings that spreadsheets save."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = content.decode("utf-16")
    elif content[1::2].count(0) > len(content) // 4:
        text = content.decode("utf-16-le")
    elif content[::2].count(0) > len(content) // 4:
        text = content.decode("utf-16-be")
    else:
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = content.decode("cp1252", errors="replace")
    if "\0" in text:
        raise ValueError("it holds NUL bytes")
    return text
