"""From a raw cohort to a store: walk, check, turn, mask, write; in parallel, and again only where something changed."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mrgen.data.checks import check_subject
from mrgen.data.cohorts import Layout, Problem, SubjectFiles, find_subjects
from mrgen.data.identity import Scan, scan_of
from mrgen.data.report import Report, Row, finished, render, row_of
from mrgen.data.store import (
    StoredSubject,
    cohort_table,
    read_subjects,
    remove_subject,
    sole_writer,
    stored_type,
    write_cohort,
    write_subject,
)
from mrgen.data.stored_subject import IMAGE
from mrgen.data.stored_tables import checksums
from mrgen.data.upkeep import fingerprint, look, refuse_twins, settle, waiting
from mrgen.data.workers import in_processes
from mrgen.errors import UserError

__all__ = ["Report", "Row", "fingerprint", "prepare_cohort", "render"]


def prepare_cohort(
    layout: Layout,
    root: Path | str,
    store: Path | str | None,
    *,
    modalities: Sequence[str] | None = None,
    workers: int | None = None,
    check: bool = False,
    strict: bool = True,
    prune: bool = False,
    verify: bool = False,
    known_layouts: Mapping[str, Layout] | None = None,
    progress: bool = True,
) -> Report:
    """Checks a cohort and prepares what is new or changed.

    A subject with a problem is left out. What the store has of it from earlier stays there and is reported, as does a
    subject that no longer lies below the root: the root may be the wrong one. What is damaged in the store is prepared
    anew. A store of another cohort is refused, and one of other modalities or label numbers, before anything is
    touched. Two subjects with the same voxels are refused. Stopped at any moment, the store holds whole subjects only,
    and the next run goes on from there.

    Args:
        layout: the cohort's table.
        root: its folder.
        store: where to write; not looked at with `check`.
        modalities: the sequences wanted, in order; default: all of the layout's.
        workers: processes; default: the cores at hand; 0: in this process.
        check: only check.
        strict: whether problems make the report's exit code non-zero; without one good subject it always is.
        prune: take subjects out of the store whose files are gone, or were replaced by bad ones; and replace a store of
            other modalities or label numbers.
        verify: compare all voxels of the store with their checksums; subjects without are prepared anew.
        known_layouts: others to suggest when nothing below the root matches.
        progress: whether to show a bar on stderr.

    Returns:
        What was done and what is wrong.

    Raises:
        UserError: no root, nothing that matches, no store to write to, a store of another cohort or of other settings,
            or one that another process is preparing.
        KeyboardInterrupt: the user's, once the subjects in work are finished.
    """
    modalities = list(modalities or layout.images)
    subjects, problems = find_subjects(layout, root, modalities, known_layouts=known_layouts)
    notes = [problem for problem in problems if problem.kind == "note"]
    problems = [problem for problem in problems if problem.kind != "note"]
    if check:
        report = Report(layout.title, None, strict, problems=problems, notes=notes)
        _run(report, subjects, _Task(layout, Path(root), None), workers, progress)
        refuse_twins(report, [Scan(row.id, row.voxels, {}) for row in report.rows if row.status == "good"])
        return finished(report)
    if store is None:
        raise UserError("data.store is not set; expected a folder for the prepared cohort")
    store, root = Path(store), Path(root)
    report = Report(layout.title, store, strict, problems=problems, notes=notes)
    with sole_writer(store):
        ids = {files.id for files in subjects} | {problem.subject for problem in problems}
        before = look(store, layout, modalities, ids, prune=prune, verify=verify, workers=workers)
        if before.cohort is not None:
            report.mended["the cohort's table"] = before.cohort
        todo = waiting(report, subjects, before, root, layout, prune=prune)
        task = _Task(layout, root, store, cohort_table(layout, modalities))
        while before.replaces and todo and not report.prepared:  # what can be seen is hidden once there is better
            _run(report, [todo.pop(0)], task, workers, progress)
        if not before.replaces or report.prepared:
            write_cohort(store, layout, modalities)
        _run(report, todo, task, workers, progress)
        settle(report, subjects, before, root, prune=prune)
        tables = {id: table for id, table in read_subjects(store).items() if table["settings"] == before.digest}
        scans = [scan_of(StoredSubject.from_table(store / id, table)) for id, table in tables.items()]
        for id in refuse_twins(report, scans, {*before.tables, *before.damaged}):
            remove_subject(store, id)
    return finished(report)


_Result = tuple[Row, list[Problem], Sequence[Problem]]  # of one subject: its row, problems and notes


@dataclass(frozen=True)
class _Task:
    """What a worker does with each subject; small, for it is sent with every one."""

    layout: Layout
    root: Path
    store: Path | None
    cohort: Mapping[str, Any] | None = None

    def __call__(self, files: SubjectFiles) -> "_Result":
        try:
            return self._prepared(files)
        except MemoryError:
            what = "found scans that do not fit into memory; use fewer workers or a larger machine"
            return row_of(files, None, None, "bad"), [Problem(files.id, str(files.folder), what, "too large")], ()

    def _prepared(self, files: SubjectFiles) -> "_Result":
        source = fingerprint(files, self.root)  # before reading: a file that changes meanwhile is read again
        subject, problems = check_subject(files, self.layout)
        if subject is None:
            return row_of(files, None, None, "bad"), problems, ()
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
                cohort=self.cohort,
            )
            return row_of(files, subject.brain.shape, spacing, "prepared"), [], subject.notes
        image = stored_type(np.stack(list(subject.volumes.values())))
        voxels = checksums({IMAGE: image}, list(subject.volumes))[IMAGE]
        return replace(row_of(files, subject.brain.shape, spacing, "good"), voxels=voxels), [], subject.notes


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
            result = row_of(files, None, None, "bad"), [problem], ()
        yield result
