"""Finds the subjects of a cohort on disk, as its layout (`mrgen.data.layouts`) says."""

import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mrgen.data.folders import Folders, in_any_case, reached_once
from mrgen.data.layouts import FIELD_NAMES, Layout, read_layouts
from mrgen.data.patterns import search
from mrgen.data.subject_table import SubjectTable, read_tables
from mrgen.errors import UserError

__all__ = ["Layout", "Problem", "SubjectFiles", "find_subjects", "read_layouts", "recognise_layouts"]

RESERVED_IDS = ("cohort.json", "generated.json")  # files of a store, beside its subjects
_GRADES = {"hgg": "HGG", "lgg": "LGG"}  # in tables they are typed by hand
LONGEST_ID = 200  # bytes; a name has 255, of which the store adds some while it writes


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with one subject, in one line.

    Attributes:
        subject: its id (or the folder, where no id can be told).
        file: the file or folder that is at fault.
        message: what was found, what was expected, what to do.
        kind: a few words for the summary, such as "missing sequence".
        of_subject: False where it is of the cohort or the store as a whole, which are no rows of the report.
    """

    subject: str
    file: str
    message: str
    kind: str
    of_subject: bool = True

    def __str__(self) -> str:
        return printable(f"{self.subject}: {self.file}: {self.message}")


def printable(text: str) -> str:
    """Names of files as a terminal can show them: no line breaks, no control sequences, no bytes that are no text."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


@dataclass(frozen=True)
class SubjectFiles:
    """Where one subject's scans lie. `images` is in the order of the modalities asked for.

    `brain` is a mask that the user brings, where the layout has a pattern for it; `raw_id` is the id as files have it.
    """

    id: str
    patient: str
    grade: str | None
    site: str | None
    folder: Path
    images: dict[str, Path]
    label: Path | None
    brain: Path | None = None
    raw_id: str = ""


def find_subjects(
    layout: Layout,
    root: Path | str,
    modalities: Sequence[str] | None = None,
    *,
    known_layouts: Mapping[str, Layout] | None = None,
) -> tuple[list[SubjectFiles], list[Problem]]:
    """Walk a cohort's folders.

    Args:
        layout: the cohort's table.
        root: its folder; also one of a site or grade alone, or of a single subject.
        modalities: the sequences to look for; default: all of the layout's.
        known_layouts: others to try, for advice, when nothing matches.

    Returns:
        The subjects that have everything, sorted by id, and one problem for each file or folder that is missing,
        ambiguous or unreadable. A folder with a problem makes no subject; one without a label does. A second copy
        that lacks something is a problem beside the subject that has everything. What a table of grades does not say
        is a problem of the kind "note", which is none.

    Raises:
        UserError: no such root, an unknown or repeated modality, or nothing below the root matches.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"data.root={root}: no such folder; expected the folder that holds {layout.title}")
    if unknown := [m for m in modalities or () if m not in layout.images]:
        raise UserError(
            f"data.modalities: {layout.title} has no {', '.join(unknown)}; it has {', '.join(layout.images)}"
        )
    if repeated := [m for m in dict.fromkeys(modalities or ()) if list(modalities or ()).count(m) > 1]:
        raise UserError(f"data.modalities: found {', '.join(repeated)} more than once, expected each sequence once")
    folders = Folders(root, layout.exclude)
    names = list(modalities or layout.images)
    places = _places(layout, folders)
    table = SubjectTable()
    if layout.table and places:
        ids = {_raw_id(layout, folders, place, path) for place, path in places}
        table = read_tables(layout, folders.find(root, in_any_case(layout.table["files"])), ids)
    found = [_files_of(layout, folders, place, path, names, table) for place, path in places]
    subjects = [subject for subject, _ in found if subject is not None]
    problems = [problem for _, several in found for problem in several]
    broken = {Path(problem.file) for problem in problems}
    problems += [
        Problem(
            path.name, str(path), f"cannot be read ({why}), expected a folder; chmod u+rx or mount it", "unreadable"
        )
        for path, why in folders.unreadable.items()
        if path not in broken
    ]
    for kind, lines in (("table", table.problems), ("note", table.notes)):
        problems += [Problem("table", str(path), what, kind, of_subject=False) for path, what in lines.items()]
    if not subjects and all(problem.kind == "note" for problem in problems):
        raise UserError(_nothing_matches(layout, root, known_layouts or {}))
    subjects, duplicates = _without_duplicates(subjects)
    subjects, copies = _without_copies(subjects)
    return sorted(subjects, key=lambda s: s.id), problems + duplicates + copies


def recognise_layouts(root: Path | str, known_layouts: Mapping[str, Layout]) -> dict[str, int]:
    """How many subjects each layout finds below a root, best first; layouts that find none are left out."""
    counts = {}
    for name, layout in known_layouts.items():
        folders = Folders(Path(root), layout.exclude)
        counts[name] = sum(
            _has_image(layout, folders, path) and _other_collection(layout, folders, place) is None
            for place, path in _places(layout, folders)
        )
    return {name: n for name, n in sorted(counts.items(), key=lambda item: -item[1]) if n}


def _nothing_matches(layout: Layout, root: Path, known_layouts: Mapping[str, Layout]) -> str:
    line = f"data.root={root}: nothing matches {layout.title} (expected {', '.join(layout.subjects)})"
    others = recognise_layouts(root, {k: v for k, v in known_layouts.items() if v.name != layout.name})
    if others:
        name, n = next(iter(others.items()))
        title = known_layouts[name].title
        return f"{line}; the folder looks like {title} ({n} subject{'s' * (n != 1)}): use data={name}"
    try:
        seen = sorted(p.name for p in root.iterdir() if not p.name.startswith("."))
    except OSError as error:
        return f"{line}; the folder cannot be read ({error.strerror})"
    listed = ", ".join(seen[:3]) + (", …" if len(seen) > 3 else "") if seen else "nothing at all"
    return f"{line}; it holds {listed}. Point data.root at the unpacked cohort, or describe it in a layout of your own"


def _places(layout: Layout, folders: Folders) -> list[tuple[str, Path]]:
    """Subjects' folders (or files) with the path in which the fields are searched."""
    root = folders.root.resolve()
    above = (root.parent.name, root.name)
    for parents in ((), above[1:], above):  # the root itself may be a site's, a grade's or a subject's folder
        paths = list(dict.fromkeys(p for glob_ in layout.subjects for p in _matched(folders, glob_, parents)))
        # A folder that only wraps a match (Kaggle's BraTS 2021 nests a subject in its own name) or that merely looks
        # like one (a project folder called BraTS19_work) is no subject, as long as it holds no image itself.
        wraps = {parent for path in paths for parent in path.parents} & set(paths)
        kept = [p for p in paths if p not in wraps or _has_image(layout, folders, p)]
        inner = {p for p in kept if not wraps.isdisjoint(p.parents) and not set(kept).isdisjoint(p.parents)}
        kept = [p for p in kept if p not in inner and (not parents or _has_image(layout, folders, p))]
        kept = reached_once(kept, folders.root)
        if kept:
            return [("/".join((*parents, p.relative_to(folders.root).as_posix())).removesuffix("/."), p) for p in kept]
    return []


def _matched(folders: Folders, pattern: str, parents: Sequence[str]) -> list[Path]:
    """A pattern means folders; one with a dot in its last part (`imagesTr/*_0000.nii.gz`) may mean files."""
    files = "." in pattern.rsplit("/", 1)[-1]
    return [p for p in folders.find(folders.root, pattern, parents) if files or _is_folder(folders, p)]


def _has_image(layout: Layout, folders: Folders, path: Path) -> bool:
    raw_id = _raw_id(layout, folders, path.relative_to(folders.root).as_posix(), path)
    base = path if _is_folder(folders, path) else path.parent
    return any(
        folders.find_images(base, pattern.replace("{id}", glob.escape(raw_id)))
        for patterns in layout.images.values()
        for pattern in patterns
    )


def _files_of(
    layout: Layout, folders: Folders, place: str, path: Path, modalities: list[str], table: SubjectTable
) -> tuple[SubjectFiles | None, list[Problem]]:
    folder = path if _is_folder(folders, path) else path.parent
    raw_id = _raw_id(layout, folders, place, path)
    subject = subject_id(raw_id)
    if (refusal := _refused(layout, folders, place, raw_id, subject)) is not None:
        return None, [Problem(subject or path.name, str(path), *refusal)]
    values = {name: _value(layout, name, place, folders.root, table, raw_id) for name in FIELD_NAMES}
    folders.listing(folder)
    if folder in folders.unreadable:
        why = folders.unreadable[folder]
        message = f"cannot be read ({why}), expected the subject's folder; chmod u+rx or mount it"
        return None, [Problem(subject, str(folder), message, "unreadable folder")]
    problems: list[Problem] = []
    hits = {m: _first_match(folders, folder, layout.images[m], raw_id) for m in modalities}
    present = ",".join(m for m in modalities if hits[m][0])
    for modality, (files, patterns) in hits.items():
        if len(files) > 1:
            problems.append(_several(subject, modality, files, patterns))
        elif not files:
            advice = f"restore the file, or do without: data.modalities=[{present}]" if present else "restore the files"
            message = f"found no {modality}, expected {' or '.join(patterns)} ({layout.title}); {advice}"
            problems.append(Problem(subject, str(folder), message, f"missing sequence: {modality}"))
    labels, patterns = _first_match(folders, folder, layout.label, raw_id)
    if len(labels) > 1:
        problems.append(_several(subject, "label", labels, patterns))
    masks, patterns = _first_match(folders, folder, layout.brain, raw_id)
    if len(masks) > 1:
        problems.append(_several(subject, "brain", masks, patterns))
    elif layout.brain and not masks:
        message = f"found no brain mask, expected {' or '.join(patterns)}; make it, or take brain out of the layout"
        problems.append(Problem(subject, str(folder), message, "missing brain mask"))
    if problems:
        return None, problems
    images = {modality: files[0] for modality, (files, _) in hits.items()}
    return SubjectFiles(
        id=subject,
        patient=(values["patient"] or raw_id).replace("/", "_"),
        grade=_GRADES.get((values["grade"] or "").casefold(), values["grade"]),
        site=values["site"],
        folder=folder,
        images=images,
        label=labels[0] if labels else None,
        brain=masks[0] if masks else None,
        raw_id=raw_id,
    ), []


def subject_id(raw_id: str) -> str:
    """An id as the name of a folder."""
    return re.sub(r"[^\w.+-]+", "_", raw_id).strip("._")


def _refused(layout: Layout, folders: Folders, place: str, raw_id: str, subject: str) -> tuple[str, str] | None:
    """Why a folder is no subject of this cohort, whatever it holds: message and kind; None where it may be one."""
    if not subject or len(subject.encode()) > LONGEST_ID or subject in RESERVED_IDS:
        found = (
            f"found {raw_id!r}, which gives no name of a folder in the store" if len(raw_id) < 99 else "found a long id"
        )
        expected = f"expected letters or digits, up to {LONGEST_ID} bytes, and not {' or '.join(RESERVED_IDS)}"
        return f"{found}; {expected}; rename it, or set fields.id in the layout", "no id"
    if (advice := _other_collection(layout, folders, place)) is not None:
        return f"found a scan of another collection, expected {layout.title}; {advice}", "another collection"
    return None


def _other_collection(layout: Layout, folders: Folders, place: str) -> str | None:
    """Of a folder that looks like a subject of the cohort and is none: what the layout says to do."""
    where = f"layout {layout.name}: other_collections"
    texts = _texts(place, folders.root)
    found = (a for p, a in layout.other_collections.items() if any(search(p, text, where) for text in texts))
    return next(found, None)


def _first_match(folders: Folders, folder: Path, patterns: Sequence[str], raw_id: str) -> tuple[list[Path], list[str]]:
    for pattern in patterns:
        if hits := folders.find_images(folder, pattern.replace("{id}", glob.escape(raw_id))):
            return hits, [pattern.replace("{id}", raw_id)]
    return [], [pattern.replace("{id}", raw_id) for pattern in patterns]


def _several(subject: str, what: str, hits: list[Path], patterns: list[str]) -> Problem:
    names = ", ".join(p.name for p in hits[:4]) + (", …" if len(hits) > 4 else "")
    message = f"found {len(hits)} files for {what} ({names}), expected one {patterns[0]}; remove the others"
    return Problem(subject, str(hits[0].parent), message, "several files for one sequence")


def _without_duplicates(subjects: list[SubjectFiles]) -> tuple[list[SubjectFiles], list[Problem]]:
    """Which of two folders is the right one cannot be known, so neither is taken."""
    by_id: dict[str, list[SubjectFiles]] = {}
    for subject in subjects:
        by_id.setdefault(subject.id, []).append(subject)
    problems = [
        Problem(
            id_,
            str(same[0].folder),
            f"found the id {id_} {len(same)} times (also in {', '.join(str(s.folder) for s in same[1:])}), "
            "expected once; remove a copy or tell them apart with fields.id",
            "duplicate id",
        )
        for id_, same in by_id.items()
        if len(same) > 1
    ]
    return [same[0] for same in by_id.values() if len(same) == 1], problems


# What systems and people append to the name of a copy; a bare number is as often a visit's.
_COPY = re.compile(r"(.+?)[ _.-]*(?:\(\d+\)|(?:copy|kopie|copie|copia)(?: ?\(?\d+\)?)?|old|bak|backup)", re.IGNORECASE)


def _without_copies(subjects: list[SubjectFiles]) -> tuple[list[SubjectFiles], list[Problem]]:
    """`ID (1)`, `ID - Copy` and `ID_old` beside `ID` would be patients of their own, tested while `ID` trains.

    Copies whose voxels are the same are found whatever they are called; these may have been exported anew.
    """
    known = {subject.raw_id: subject for subject in subjects}
    kept, problems = [], []
    for subject in subjects:
        found = _COPY.fullmatch(subject.raw_id)
        original = known.get(found[1]) if found else None
        if original is None:
            kept.append(subject)
            continue
        message = (
            f"found what is called like a copy of {original.id} ({original.folder}), expected every scan once; remove "
            "it, or rename it where it is another scan"
        )
        problems.append(Problem(subject.id, str(subject.folder), message, "copy"))
    return kept, problems


def _is_folder(folders: Folders, path: Path) -> bool:
    return path == folders.root or path.name in folders.listing(path.parent)[1]


def _raw_id(layout: Layout, folders: Folders, place: str, path: Path) -> str:
    """The id as it stands in file names; slashes are still in it."""
    if found := _value(layout, "id", place, folders.root):
        return found
    if _is_folder(folders, path):
        return path.resolve().name if path == folders.root else path.name
    return path.name.split(".", 1)[0]


def _value(
    layout: Layout, name: str, place: str, root: Path, table: SubjectTable | None = None, raw_id: str = ""
) -> str | None:
    """What a field's rule finds in the subject's path, or in its row of the table."""
    rule = layout.fields.get(name, {})
    if "column" in rule:
        text = table.value(raw_id, rule["column"]) if table else ""
        texts = [text] if text else []
    else:
        texts = list(_texts(place, root)) if rule else []
    for text in texts:
        if "pattern" not in rule:
            return text
        if found := search(rule["pattern"], text, f"layout {layout.name}: fields.{name}"):
            return next((group for group in found.groups() if group), found.group())
    return None


def _texts(place: str, root: Path) -> tuple[str, str]:
    """A subject's path below the root, and the same with two folders above: data.root may point at …/HGG."""
    above = root.resolve()
    return place, f"{above.parent.name}/{above.name}/{place}"
