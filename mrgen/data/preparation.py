"""From a raw cohort to a store: walk, check, turn, mask, write; in parallel, and again only where something changed."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mrgen.data.checks import check_subject, grouped
from mrgen.data.cohorts import Layout, Problem, SubjectFiles, find_subjects
from mrgen.data.reading import files_of
from mrgen.data.store import (
    read_cohort,
    read_subjects,
    remove_leftovers,
    remove_subject,
    settings_digest,
    sole_writer,
    write_cohort,
    write_subject,
)
from mrgen.data.workers import in_processes
from mrgen.errors import UserError

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Row:
    """One line of the report's table. `status`: prepared, unchanged, good (only checked) or bad.

    What is not known, of a subject that the walk already refused for example, is None.
    """

    id: str
    patient: str
    grade: str | None
    site: str | None
    shape: tuple[int, ...] | None
    spacing: tuple[float, ...] | None
    labelled: bool | None
    status: str


@dataclass
class Report:
    """What a preparation did.

    Attributes:
        title: the cohort's name.
        store: where it was written, or None when it was only checked.
        rows: one for each subject found, by id.
        problems: one for each thing that is wrong.
        notes: one for each thing that a header left open or had wrong and that was decided; of subjects that are good.
        strict: whether a problem makes the exit code non-zero.
    """

    title: str
    store: Path | None
    strict: bool
    rows: list[Row] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[Problem] = field(default_factory=list)

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
        return list(dict.fromkeys(problem.subject for problem in self.problems))

    @property
    def exit_code(self) -> int:
        """0, or 1 where there are problems and `strict`."""
        return int(bool(self.problems) and self.strict)

    @property
    def summary(self) -> str:
        """One line: how many subjects came out how."""
        counts = {status: sum(row.status == status for row in self.rows) for status in _STATUSES}
        words = [f"{n} {status}" for status, n in counts.items() if n]
        unlabelled = sum(row.status != "bad" and not row.labelled for row in self.rows)
        line = f"{self.title}: {', '.join(words) or 'no subjects'}" + (
            f" ({unlabelled} unlabelled)" if unlabelled else ""
        )
        if self.problems:
            kinds: dict[str, int] = {}
            for problem in self.problems:
                kinds[problem.kind] = kinds.get(problem.kind, 0) + 1
            n = len(self.problems)
            line += f"; {n} problem{'s' * (n != 1)} ({', '.join(f'{k}: {v}' for k, v in kinds.items())})"
            if self.strict:
                line += "; strict=false goes on without them"
        return line


_STATUSES = ("prepared", "unchanged", "good", "bad")


def prepare_cohort(
    layout: Layout,
    root: Path | str,
    store: Path | str | None,
    *,
    modalities: Sequence[str] | None = None,
    workers: int | None = None,
    check: bool = False,
    strict: bool = True,
    known_layouts: Mapping[str, Layout] | None = None,
    progress: bool = True,
) -> Report:
    """Checks a cohort and prepares what is new or changed.

    A subject with a problem is left out, and an earlier copy of it is taken out of the store, so that nobody trains on
    what is known to be bad. Other modalities or label numbers than last time make every subject of the store invisible
    at once and visible again one by one as they are prepared anew. A store of another cohort is refused. Subjects of
    the store that no longer lie below the root are kept and reported: the root may be the wrong one. Stopped at any
    moment, the store holds whole subjects only, and the next run goes on from there.

    Args:
        layout: the cohort's table.
        root: its folder.
        store: where to write; not looked at with `check`.
        modalities: the sequences wanted, in order; default: all of the layout's.
        workers: processes; default: the cores at hand; 0: in this process.
        check: only check.
        strict: whether problems make the report's exit code non-zero.
        known_layouts: others to suggest when nothing below the root matches.
        progress: whether to show a bar on stderr.

    Returns:
        What was done and what is wrong.

    Raises:
        UserError: no root, nothing that matches, no store to write to, a store of another cohort, or one that another
            process is preparing.
        KeyboardInterrupt: the user's, once the subjects in work are finished.
    """
    modalities = list(modalities or layout.images)
    subjects, problems = find_subjects(layout, root, modalities, known_layouts=known_layouts)
    if check:
        report = Report(layout.title, None, strict, problems=problems)
        _run(report, subjects, _Task(layout, Path(root), None), workers, progress)
        return _finished(report)
    if store is None:
        raise UserError("data.store is not set; expected a folder for the prepared cohort")
    store = Path(store)
    report = Report(layout.title, store, strict, problems=problems)
    with sole_writer(store):
        earlier = read_cohort(store)
        if earlier is not None and earlier["name"] != layout.name:
            raise UserError(
                f"data.store={store}: found a store of {earlier['name']}, expected {layout.name} or none; "
                "choose another data.store or delete it"
            )
        write_cohort(store, layout, modalities)
        remove_leftovers(store)
        stored = read_subjects(store)
        for id_ in {problem.subject for problem in problems} & set(stored):
            remove_subject(store, id_)
        digest = settings_digest(layout, modalities)
        todo = []
        for files in subjects:
            table = stored.get(files.id)
            if table and table["settings"] == digest and table["source"] == fingerprint(files, Path(root)):
                report.rows.append(_row(files, table["shape"], table["spacing"], "unchanged"))
            else:
                todo.append(files)
        _run(report, todo, _Task(layout, Path(root), store), workers, progress)
        vanished = sorted(set(stored) - {s.id for s in subjects} - {p.subject for p in problems})
        if vanished:
            names = ", ".join(vanished[:3]) + (", …" if len(vanished) > 3 else "")
            message = (
                f"found {len(vanished)} prepared subjects ({names}) that no longer lie below data.root={root}, "
                "expected them there; they stay in the store until you delete their folders"
            )
            report.problems.append(Problem("store", str(store), message, "no longer below the root"))
    return _finished(report)


def fingerprint(files: SubjectFiles, root: Path) -> dict[str, Any]:
    """What a subject is made from: its fields, and each file's place, size and time of change."""
    paths = {**files.images, **({"label": files.label} if files.label else {})}
    parts = {name + " voxels" * n: part for name, path in paths.items() for n, part in enumerate(files_of(path))}
    return {
        "fields": [files.patient, files.grade, files.site],
        "files": {name: [path.relative_to(root).as_posix(), *_size_and_change(path)] for name, path in parts.items()},
    }


def _size_and_change(path: Path) -> tuple[int | None, int | None]:
    try:
        stat = path.stat()
    except OSError:  # it vanished; what reads it says so
        return None, None
    return stat.st_size, stat.st_mtime_ns


def render(report: Report) -> "RenderableType":
    """The report for a terminal: a table of subjects, a line for each problem and each kind of note, a summary."""
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
        table.add_row(*map(Text, cells), style="red" if cells[-1] == "bad" else None)
    lines = [Text(str(problem), style="red") for problem in report.problems]
    lines += [Text(line, style="yellow") for line in grouped(report.notes)]
    return Group(table, *lines, Text(report.summary, style="bold"))


_Result = tuple[Row, list[Problem], Sequence[Problem]]  # of one subject: its row, problems and notes


@dataclass(frozen=True)
class _Task:
    """What a worker does with each subject; small, for it is sent with every one."""

    layout: Layout
    root: Path
    store: Path | None

    def __call__(self, files: SubjectFiles) -> "_Result":
        try:
            return self._prepared(files)
        except MemoryError:
            what = "found scans that do not fit into memory; use fewer workers or a larger machine"
            return _row(files, None, None, "bad"), [Problem(files.id, str(files.folder), what, "too large")], ()

    def _prepared(self, files: SubjectFiles) -> "_Result":
        source = fingerprint(files, self.root)  # before reading: a file that changes meanwhile is read again
        subject, problems = check_subject(files, self.layout)
        if subject is None:
            if self.store is not None:
                remove_subject(self.store, files.id)
            return _row(files, None, None, "bad"), problems, ()
        spacing = np.linalg.norm(subject.affine[:3, :3], axis=0).tolist()
        if self.store is not None:
            write_subject(
                self.store,
                id=files.id,
                patient=files.patient,
                grade=files.grade,
                site=files.site,
                image=np.stack(list(subject.volumes.values())),
                label=subject.label,
                brain=subject.brain,
                brain_method=subject.brain_method,
                affine=subject.affine,
                original_affine=subject.original_affine,
                original_shape=subject.original_shape,
                source=source,
            )
        status = "prepared" if self.store is not None else "good"
        return _row(files, subject.brain.shape, spacing, status), [], subject.notes


def _row(files: SubjectFiles, shape: Sequence[int] | None, spacing: Sequence[float] | None, status: str) -> Row:
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


def _finished(report: Report) -> Report:
    known = {row.id for row in report.rows} | {"store"}
    for subject in report.bad:  # those that the walk already refused
        if subject not in known:
            report.rows.append(Row(subject, subject, None, None, None, None, None, "bad"))
    report.rows.sort(key=lambda row: row.id)
    report.problems.sort(key=lambda problem: (problem.subject == "store", problem.subject))  # workers end in any order
    report.notes.sort(key=lambda note: note.subject)
    return report


def _run(report: Report, subjects: list[SubjectFiles], task: _Task, workers: int | None, progress: bool) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[last]}"),
    )
    verb = "checking" if task.store is None else "preparing"
    with Progress(*columns, console=Console(stderr=True), disable=not progress or not subjects) as bar:
        line = bar.add_task(f"{verb} {report.title}", total=len(subjects), last="")
        results: Iterable[_Result]
        results = map(task, subjects) if workers == 0 else _in_parallel(subjects, task, min(workers, len(subjects)))
        for row, problems, notes in results:
            report.rows.append(row)
            report.problems.extend(problems)
            report.notes.extend(notes)
            bar.update(line, advance=1, last=row.id)


def _in_parallel(subjects: list[SubjectFiles], task: _Task, workers: int) -> Iterator[_Result]:
    what = "ended the process that read it, probably for want of memory; look at its files, or use fewer workers"
    for files, result in in_processes(subjects, task, workers):
        if result is None:
            problem = Problem(files.id, str(files.folder), what, "process ended")
            result = _row(files, None, None, "bad"), [problem], ()
        yield result
