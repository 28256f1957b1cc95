"""What a preparation says of every subject: a table, a line for each problem, a summary."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mrgen.data.checks import grouped
from mrgen.data.cohorts import Problem, SubjectFiles, printable

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["Report", "Row", "finished", "render", "row_of"]


@dataclass(frozen=True)
class Row:
    """One line of the report's table.

    What is not known, of a subject that the walk already refused for example, is None.

    Attributes:
        status: prepared; unchanged; good (only checked); kept (the store has it from earlier, but its files have a
            problem now, or are gone); removed (from the store, of which it was asked); bad (not in the store).
        voxels: by sequence, checksums, of a subject that was only checked.
    """

    id: str
    patient: str
    grade: str | None
    site: str | None
    shape: tuple[int, ...] | None
    spacing: tuple[float, ...] | None
    labelled: bool | None
    status: str
    voxels: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass
class Report:
    """What a preparation did.

    Attributes:
        title: the cohort's name.
        store: where it was written, or None when it was only checked.
        rows: one for each subject found, by id.
        problems: one for each thing that is wrong.
        notes: one for each thing that a header left open or had wrong and that was decided; of subjects that are good.
        mended: by id, what was damaged in the store and was prepared anew.
        strict: whether a problem makes the exit code non-zero.
    """

    title: str
    store: Path | None
    strict: bool
    rows: list[Row] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[Problem] = field(default_factory=list)
    mended: dict[str, str] = field(default_factory=dict)

    @property
    def prepared(self) -> list[str]:
        """Ids written by this run."""
        return [row.id for row in self.rows if row.status == "prepared"]

    @property
    def unchanged(self) -> list[str]:
        """Ids that were there already, made from the same files with the same settings."""
        return [row.id for row in self.rows if row.status == "unchanged"]

    @property
    def bad(self) -> list[str]:
        """Ids (or folders) with a problem, which the store does not hold."""
        return [row.id for row in self.rows if row.status == "bad"]

    @property
    def kept(self) -> list[str]:
        """Ids that the store holds from earlier, although their files have a problem now or are gone."""
        return [row.id for row in self.rows if row.status == "kept"]

    @property
    def removed(self) -> list[str]:
        """Ids that were taken out of the store."""
        return [row.id for row in self.rows if row.status == "removed"]

    @property
    def usable(self) -> bool:
        """Whether any subject came out well."""
        return any(row.status in ("prepared", "unchanged", "good") for row in self.rows)

    @property
    def exit_code(self) -> int:
        """0; 1 where there are problems and `strict`, or no subject that is good."""
        return int(not self.usable or (bool(self.problems) and self.strict))

    @property
    def summary(self) -> str:
        """One line: how many subjects came out how."""
        counts = {status: sum(row.status == status for row in self.rows) for status in _STATUSES}
        words = [f"{n} {status}" for status, n in counts.items() if n]
        unlabelled = sum(row.status not in ("bad", "removed") and row.labelled is False for row in self.rows)
        line = f"{self.title}: {', '.join(words) or 'no subjects'}" + (
            f" ({unlabelled} unlabelled)" if unlabelled else ""
        )
        if self.problems:
            kinds: dict[str, int] = {}
            for problem in self.problems:
                kinds[problem.kind] = kinds.get(problem.kind, 0) + 1
            n = len(self.problems)
            line += f"; {n} problem{'s' * (n != 1)} ({', '.join(f'{k}: {v}' for k, v in kinds.items())})"
        if not self.usable:
            line += "; no subject came out well"
        elif self.problems and self.strict:
            line += "; strict=false goes on without them"
        return line


_STATUSES = ("prepared", "unchanged", "good", "kept", "removed", "bad")


def row_of(files: SubjectFiles, shape: Sequence[int] | None, spacing: Sequence[float] | None, status: str) -> Row:
    """A subject's line."""
    return Row(
        id=files.id,
        patient=files.patient,
        grade=files.grade,
        site=files.site,
        shape=tuple(shape) if shape else None,
        spacing=tuple(spacing) if spacing else None,
        labelled=files.label is not None,
        status=status,
    )


def finished(report: Report) -> Report:
    """The same with a row for whom the walk already refused, and in order: workers end in any."""
    known = {row.id for row in report.rows}
    refused = dict.fromkeys(problem.subject for problem in report.problems if problem.of_subject)  # by the walk
    report.rows += [Row(id, id, None, None, None, None, None, "bad") for id in refused if id not in known]
    report.rows.sort(key=lambda row: row.id)
    report.problems.sort(key=lambda problem: (not problem.of_subject, problem.subject))
    report.notes.sort(key=lambda note: note.subject)
    return report


def render(report: Report) -> "RenderableType":
    """The report for a terminal: a table of subjects, a line for each problem and kind of note, a summary."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    # Columns that say nothing are left out, so that a terminal of 80 columns holds the rest.
    visits = len({row.patient for row in report.rows}) < len(report.rows)
    columns: dict[str, list[str]] = {"subject": [row.id for row in report.rows]}
    if visits:
        columns["patient"] = [row.patient for row in report.rows]
    for name in ("grade", "site"):
        if any(getattr(row, name) for row in report.rows):
            columns[name] = [getattr(row, name) or "–" for row in report.rows]
    columns["shape"] = ["×".join(map(str, row.shape)) if row.shape else "–" for row in report.rows]
    columns["mm"] = ["×".join(f"{side:.3g}" for side in row.spacing) if row.spacing else "–" for row in report.rows]
    columns["label"] = [{True: "yes", False: "no", None: "–"}[row.labelled] for row in report.rows]
    columns["status"] = [row.status for row in report.rows]
    table = Table(title=report.title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, overflow="fold")
    for cells in zip(*columns.values(), strict=True):
        colour = {"bad": "red", "removed": "red", "kept": "yellow"}.get(cells[-1])
        table.add_row(*(Text(printable(cell)) for cell in cells), style=colour)
    lines = [Text(str(problem), style="red") for problem in report.problems]
    mended = {id: f"{id}: was damaged in the store ({found}); prepared anew" for id, found in report.mended.items()}
    lines += [Text(printable(line), style="yellow") for line in (*mended.values(), *grouped(report.notes))]
    return Group(table, *lines, Text(report.summary, style="bold"))
