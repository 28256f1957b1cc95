"""What becomes of a store's subjects when its cohort is prepared again: nothing is lost that was not asked for."""

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mrgen.data.cohorts import Problem, SubjectFiles
from mrgen.data.folders import is_of_system
from mrgen.data.identity import Scan, twins
from mrgen.data.layouts import Layout
from mrgen.data.reading import files_of
from mrgen.data.report import Report, Row, row_of
from mrgen.data.store import remove_leftovers, remove_subject, settings_digest
from mrgen.data.stored_subject import LABEL
from mrgen.data.stored_tables import FILES, DamagedError, find_damage, read_cohort, scan_subjects
from mrgen.errors import UserError

__all__ = ["Before", "fingerprint", "look", "refuse_twins", "settle", "waiting"]


@dataclass
class Before:
    """A store before it is prepared again.

    Attributes:
        tables: by id, the `subject.json` of subjects that are whole.
        damaged: by id, what was found of the others.
        known: by id, the `subject.json` that can be read, of damaged ones as well.
        cohort: what was found where `cohort.json` was damaged, else None.
        unchecked: ids of the whole ones that are to be verified and have no checksums.
        digest, modalities: settings of the preparation that is to come, and its sequences.
        replaces: whether those that can be seen now will be replaced by subjects of other settings.
    """

    tables: dict[str, dict[str, Any]]
    damaged: dict[str, str]
    known: dict[str, dict[str, Any]]
    cohort: str | None
    digest: str
    modalities: list[str]
    replaces: bool
    unchecked: frozenset[str] = frozenset()

    def is_good(self, id: str) -> bool:
        """Whether the store has the subject, whole, with the present settings and their sequences in order."""
        table = self.tables.get(id, {})
        return table.get("settings") == self.digest and table["modalities"] == self.modalities


def look(
    store: Path,
    layout: Layout,
    modalities: Sequence[str],
    ids: set[str],
    *,
    prune: bool,
    verify: bool,
    workers: int | None,
) -> Before:
    """Looks at a store that is there already, and refuses what would lose it.

    Args:
        store: a folder, perhaps empty, that nobody else writes to.
        layout, modalities: of the preparation that is to come.
        ids: whom it may prepare.
        prune: whether a store of other settings may be replaced.
        verify: whether every voxel is read.
        workers: threads for that.

    Raises:
        UserError: it is of another cohort, or of other settings and `prune` does not hold.
    """
    remove_leftovers(store)
    cohort, found = None, None
    try:
        cohort = read_cohort(store)
    except DamagedError as error:
        found = str(error).split("; ")[0].removeprefix(f"{store}/")
    if cohort is not None and cohort["name"] != layout.name:
        raise UserError(
            f"data.store={store}: found a store of {cohort['name']}, expected {layout.name} or none; "
            "choose another data.store or delete it"
        )
    tables, damaged = scan_subjects(store)
    if cohort is None and (tables or damaged) and ids.isdisjoint({*tables, *damaged}):
        raise UserError(
            f"data.store={store}: found {len({*tables, *damaged})} subjects without a usable cohort.json, none of "
            "which lies below data.root; choose another data.store or delete it"
        )
    digest = settings_digest(layout, modalities)
    shown = digest if cohort is None else cohort["settings"]
    other = [table for table in tables.values() if table["settings"] != digest]
    replaces = bool(other) if cohort is None else shown != digest and any(t["settings"] == shown for t in other)
    if replaces and not prune:
        raise UserError(_other_settings(store, other, layout, modalities, cohort))
    threads = workers or os.cpu_count() or 1

    def damage(id: str) -> str | None:
        return find_damage(store / id, tables[id], contents=verify)

    with ThreadPoolExecutor(threads) as pool:  # checksums let go of the interpreter's lock
        results = dict(zip(tables, pool.map(damage, tables), strict=True))
    known = tables
    damaged |= {id: why for id, why in results.items() if why is not None}
    tables = {id: table for id, table in tables.items() if id not in damaged}
    unchecked = frozenset(id for id, table in tables.items() if verify and not table.get("checksums"))
    return Before(tables, damaged, known, found, digest, list(modalities), replaces, unchecked)


def _other_settings(
    store: Path,
    tables: Sequence[Mapping[str, Any]],
    layout: Layout,
    modalities: Sequence[str],
    cohort: Mapping[str, Any] | None,
) -> str:
    had = tables[0]["modalities"] if cohort is None else cohort["modalities"]
    start = f"data.store={store}: holds {len(tables)} subjects prepared with "
    if had != list(modalities):
        kept = f"data.modalities=[{','.join(had)}]"
        return (
            f"{start}{', '.join(had)}, and {', '.join(modalities)} are asked for; {kept} keeps them, another "
            "data.store=… makes a store beside them, prune=true replaces them"
        )
    return (
        f"{start}other settings (label_values, skull_stripped or brain of the layout) than {layout.title} has now; "
        "put the layout back to keep them, another data.store=… makes a store beside them, prune=true replaces them"
    )


def _places(table: Mapping[str, Any], root: Path) -> list[tuple[Path, bool]]:
    """Where a subject's files lay below the root, and whether they are the same still, there or above.

    The root may have been the cohort's folder and now be that of a grade or a site, or one more below.
    """
    files = table["source"].get("files")
    found = []
    for place in files.values() if isinstance(files, dict) else ():
        try:
            name, size, changed = place
            same = any(_size_and_change(base / name) == (size, changed) for base in (root, *_above(root)))
            found.append((root / name, same))
        except (TypeError, ValueError):
            return []  # not made by a preparation
    return found


def _above(root: Path) -> Sequence[Path]:
    return list(root.resolve().parents)[:2]


def _source_is_gone(table: Mapping[str, Any], root: Path, taken: Mapping[Path, str], *, known_root: bool) -> bool:
    """Whether what a subject was made from is no longer there, or is another file now.

    Args:
        table: its `subject.json`.
        root: of the cohort.
        taken: by file, whose it is now: where it has become another subject's, this one is gone.
        known_root: whether the root is that of the preparation; below another nothing is missing.
    """
    for path, same in _places(table, root):
        if taken.get(path, table["id"]) != table["id"]:
            return True
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            if known_root and not same:
                return True
        except (OSError, ValueError):
            return False  # cannot be told
        else:
            if not same:
                return True
    return False


def _is_occupied(folder: Path) -> bool:
    """Whether somebody's own files lie where a subject would be written, and would be lost."""
    if folder.is_symlink() or not folder.exists():
        return False
    return not folder.is_dir() or any(name not in FILES and not is_of_system(name) for name in os.listdir(folder))


def fingerprint(files: SubjectFiles, root: Path) -> dict[str, Any]:
    """What a subject is made from: its fields, and each file's place, size and time of change."""
    others = {"label": files.label, "brain": files.brain}
    paths = {**files.images, **{name: path for name, path in others.items() if path is not None}}
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


def _completed(files: SubjectFiles, known: Mapping[str, Any], layout: Layout, *, prune: bool) -> SubjectFiles:
    """What the store knows of a subject and nothing says any more: a table may have lost it, or a folder its name."""
    told = {"patient": None if files.patient == files.raw_id else files.patient, "grade": files.grade}
    told["site"] = files.site
    lost = [name for name, value in told.items() if value is None and known[name] is not None]
    by_table = [name for name in lost if "column" in layout.fields.get(name, {})]
    kept = by_table if prune else [name for name in lost if name in by_table or name != "patient"]
    return replace(files, **{name: known[name] for name in kept})


def waiting(
    report: Report, subjects: Sequence[SubjectFiles], before: Before, root: Path, layout: Layout, *, prune: bool
) -> list[SubjectFiles]:
    """Who is to be prepared; the others get their rows. A label that the store has is let go with `prune` alone."""
    assert report.store is not None
    todo = []
    for files in subjects:
        table = before.tables.get(files.id)
        if files.id in before.damaged:
            report.mended[files.id] = before.damaged[files.id]
        known = before.known.get(files.id)
        if known is not None:
            files = _completed(files, known, layout, prune=prune)
        had_label = (report.store / files.id / LABEL).is_file() if known is None else known["label_counts"] is not None
        loses_label = had_label and files.label is None
        source = fingerprint(files, root)
        same = table is not None and before.is_good(files.id) and table["source"] == source
        if table is not None and same and files.id not in before.unchecked:
            report.rows.append(row_of(files, table["shape"], table["spacing"], "unchanged"))
        elif _is_occupied(report.store / files.id):
            message = "found files that are not of a store, expected a prepared subject or nothing; move them away"
            report.rows.append(row_of(files, None, None, "bad"))
            report.problems.append(Problem(files.id, str(report.store / files.id), message, "foreign files"))
        elif loses_label and not prune:
            message = (
                "found no label, expected one, as the store has; restore it, or let the store's go with prune=true"
            )
            report.rows.append(replace(row_of(files, None, None, "bad"), labelled=True))  # the store's
            report.problems.append(Problem(files.id, str(files.folder), message, "missing label"))
        else:
            if loses_label:
                message = "found no label any more; the store's is let go, as prune=true says"
                report.notes.append(Problem(files.id, str(files.folder), message, "note"))
            todo.append(files)
    return todo


def settle(report: Report, subjects: Sequence[SubjectFiles], before: Before, root: Path, *, prune: bool) -> None:
    """What becomes of subjects that the store had and that did not come out well now."""
    assert report.store is not None
    taken = {
        path: files.id for files in subjects for path in (*files.images.values(), files.label, files.brain) if path
    }
    # Somebody's files lie where they were: the root is that of the preparation, and what is missing below it is gone.
    known_root = any(path.exists() for table in before.tables.values() for path, _ in _places(table, root))
    rows = {row.id: row for row in report.rows}
    told = {problem.subject for problem in report.problems}
    vanished = []
    for id in sorted({*before.tables, *before.damaged}):
        if id in rows and rows[id].status != "bad":
            continue
        table = before.tables.get(id)
        if table is None:
            gone = known_root or id in told
        else:
            gone = _source_is_gone(table, root, taken, known_root=known_root)
            gone = gone or (not before.is_good(id) and id in told)  # seen, and with no good files of these settings
        if id not in told and table is not None:
            vanished.append(id)
        if table is None:
            rows.setdefault(id, Row(id, id, None, None, None, None, None, "bad"))
            message = f"found a damaged copy in the store ({before.damaged[id]}), and no good files to mend it from; "
            message += "restore them, or take it out of the store with prune=true"
            report.problems.append(Problem(id, str(report.store / id), message, "damaged in the store"))
            report.mended.pop(id, None)
        if prune and report.usable and gone:
            remove_subject(report.store, id)
            status = "removed"
        else:
            status = "kept" if before.is_good(id) else "bad"
        if table is not None and id not in rows:
            shape, spacing, labelled = tuple(table["shape"]), tuple(table["spacing"]), table["label_counts"] is not None
            rows[id] = Row(id, table["patient"], table["grade"], table["site"], shape, spacing, labelled, status)
        rows[id] = replace(rows[id], status=status)
    report.rows = list(rows.values())
    vanished = [id for id in vanished if rows[id].status != "removed"]
    if vanished:
        names = ", ".join(vanished[:3]) + (", …" if len(vanished) > 3 else "")
        message = (
            f"found {len(vanished)} prepared subjects ({names}) that no longer lie below data.root={root}, "
            "expected them there; they stay in the store, and prune=true takes those out whose files are gone"
        )
        store = str(report.store)
        report.problems.append(Problem("store", store, message, "no longer below the root", of_subject=False))


def refuse_twins(report: Report, scans: Sequence[Scan], known: Iterable[str] = ()) -> list[str]:
    """Reports subjects with the same voxels; those that are not `known` become bad, and their ids are returned."""
    bad: dict[str, None] = {}
    known = set(known)
    for pair in twins(scans):
        *ids, sequences = pair
        for id, other in (ids, reversed(ids)):
            advice = "remove the copy" + ("; or prune=true, where one was renamed" if known else "")
            same = f"found the same voxels ({', '.join(sequences)}) as in {other}"
            message = f"{same}, expected every scan under one id; {advice}"
            report.problems.append(Problem(id, id, message, "same voxels under two ids"))
            if id not in known:
                bad[id] = None
    report.rows = [replace(row, status="bad") if row.id in bad else row for row in report.rows]
    return list(bad)
