"""Glob patterns over folders of scans: one listing per folder, no folder read twice, no crash on one that cannot be."""

import os
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from fnmatch import translate
from functools import cache
from pathlib import Path

_MAGIC = re.compile(r"[*?\[]")
# What systems leave beside people's files: macOS's archives, Synology's and Windows's folders, a disk's repair shop.
_SYSTEM = {"__macosx", "@eadir", "#recycle", "#snapshot", "$recycle.bin", "system volume information", "lost+found"}
_SYSTEM |= {"@recycle", "@tmp", "@recently-snapshot", "~snapshot", "recycler"}
_SYSTEM_FILES = {"thumbs.db", "desktop.ini", "icon\r"}
_REPAIRED = re.compile(r"found\.[0-9]{3}", re.IGNORECASE)  # where Windows puts what it found
# What downloads and editors append to a name while, or after, a file is not the one meant.
_UNFINISHED = re.compile(r".*(\.(part|partial|filepart|crdownload|download|tmp|temp|bak|old|orig)|~)", re.IGNORECASE)
_KNOWN_SUFFIXES = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr")


@cache
def _segment(pattern: str) -> re.Pattern[str]:
    return re.compile(translate(pattern))


def _literal_start(pattern: str) -> str:
    found = _MAGIC.search(pattern)
    return pattern[: found.start()] if found else pattern


def matches(path: str, pattern: str) -> bool:
    """Whether a relative path with forward slashes fits a glob in which `**` stands for any number of folders."""
    return _matches(tuple(path.split("/")), tuple(pattern.split("/")))


def _matches(names: tuple[str, ...], segments: tuple[str, ...]) -> bool:
    if not segments:
        return not names
    if segments[0] == "**":
        return _matches(names, segments[1:]) or (bool(names) and _matches(names[1:], segments))
    return bool(names) and bool(_segment(segments[0]).match(names[0])) and _matches(names[1:], segments[1:])


def is_of_system(name: str) -> bool:
    """Whether a name is hidden, or one that systems give to what they leave behind."""
    return name.startswith(".") or name.casefold() in _SYSTEM | _SYSTEM_FILES or bool(_REPAIRED.fullmatch(name))


def in_any_case(pattern: str) -> str:
    """A glob whose last part means files however their names are capitalised."""
    start, slash, name = pattern.rpartition("/")
    either = (f"[{c.lower()}{c.upper()}]" if c.isalpha() else c for c in name)
    return start + slash + (name if "[" in name else "".join(either))


def reached_once(paths: Sequence[Path], root: Path) -> list[Path]:
    """Without the ways through a link (`latest` to `HGG`) to what is there under the same name anyway."""
    ways: dict[tuple[Path, str], Path] = {}
    for path in paths:
        place = path.resolve()
        direct = root.resolve() / path.relative_to(root) == place
        ways[place, path.name] = path if direct else ways.get((place, path.name), path)
    return sorted(ways.values())


class Folders:
    """The folders below one root, listed lazily and remembered.

    Hidden names (macOS leaves `._scan.nii.gz` behind) and what systems leave behind (`__MACOSX`) are not there for any
    pattern. Symbolic links are followed, unless they lead back to a folder that contains them.

    Args:
        root: the folder that patterns start from.
        exclude: globs, relative to `root`, of folders that are not entered.

    Attributes:
        unreadable: what could not be listed, with the system's reason.
    """

    def __init__(self, root: Path, exclude: Sequence[str] = ()) -> None:
        self.root = root
        self.exclude = tuple(exclude)
        self.unreadable: dict[Path, str] = {}
        self._listings: dict[Path, tuple[list[str], frozenset[str]]] = {}

    def listing(self, folder: Path) -> tuple[list[str], frozenset[str]]:
        """All names in a folder, sorted, and those among them that are folders themselves."""
        if folder not in self._listings:
            names, folders = [], set()
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        if is_of_system(entry.name):
                            continue
                        names.append(entry.name)
                        # Path.is_dir and not entry.is_dir, which raises over a link that leads to itself
                        if Path(entry.path).is_dir() if entry.is_symlink() else entry.is_dir():
                            if entry.is_symlink() and self._leads_back(folder, entry.name):
                                continue
                            folders.add(entry.name)
            except OSError as error:
                self.unreadable[folder] = error.strerror or type(error).__name__
            self._listings[folder] = sorted(names), frozenset(folders)
        return self._listings[folder]

    def find(self, base: Path, pattern: str, parents: Sequence[str] = ()) -> list[Path]:
        """Files and folders below `base` that fit a glob, in order.

        Args:
            base: where the pattern starts.
            pattern: a glob; `**` stands for any number of folders.
            parents: names to be read as folders above `base`: with `("Utrecht",)` the pattern `**/Utrecht/*` finds the
                children of a `base` that is itself called Utrecht.
        """
        segments = tuple(pattern.split("/"))
        starts = {0}
        for name in parents:
            starts = {
                after
                for i in _closure(starts, segments)
                if i < len(segments)
                for after in ([i] if segments[i] == "**" else [i + 1] if _segment(segments[i]).match(name) else [])
            }
        starts = _closure(starts, segments) if parents else starts
        found = [base] if parents and len(segments) in starts else []
        for start in sorted(starts):
            found.extend(self._find(base, segments[start:]))
        return sorted(dict.fromkeys(found))

    def find_images(self, base: Path, pattern: str) -> list[Path]:
        """The image files that a pattern means, relative to `base`, or to the root when it starts with `/`.

        Where it names a folder, the same last part is looked for inside: BraTS 2015 nests `…MR_T1.1/…MR_T1.1.mha`, and
        some copies wrap `…_t1.nii` in a folder called `…_t1.nii`. Text files beside an image do not count, nor halves
        of a download and an editor's copies. A folder with an image's name and none inside stands for itself: whoever
        reads it says what is wrong.
        """
        base, pattern = (self.root, pattern.lstrip("/")) if pattern.startswith("/") else (base, pattern)
        files: list[Path] = []
        for path in self.find(base, pattern):
            if path.name not in self.listing(path.parent)[1]:
                files.append(path)
                continue
            inside = self.find(path, pattern.rsplit("/", 1)[-1])
            inside = [file for file in inside if file.name not in self.listing(file.parent)[1]]
            files.extend(inside or [path] * path.name.lower().endswith(_KNOWN_SUFFIXES))
        files = [path for path in files if not _UNFINISHED.fullmatch(path.name)]
        return [path for path in files if path.name.lower().endswith(_KNOWN_SUFFIXES)] or files

    def _find(self, folder: Path, segments: tuple[str, ...]) -> Iterator[Path]:
        if not segments:
            return
        segment, rest = segments[0], segments[1:]
        names, folders = self.listing(folder)
        if segment == "**":
            yield from self._find(folder, rest or ("*",))
            for name in names:
                if name in folders and not self._excluded(folder / name):
                    yield from self._find(folder / name, segments)
            return
        for name in self._candidates(names, segment):
            path = folder / name
            if self._excluded(path):
                continue
            if not rest:
                yield path
            elif name in folders:
                yield from self._find(path, rest)

    @staticmethod
    def _candidates(names: list[str], segment: str) -> Iterator[str]:
        # Flat folders hold thousands of files: start at the pattern's literal beginning instead of at the first name.
        start = _literal_start(segment)
        for i in range(bisect_left(names, start), len(names)):
            name = names[i]
            if not name.startswith(start):
                return
            if _segment(segment).match(name):
                yield name

    def _excluded(self, path: Path) -> bool:
        if not self.exclude:
            return False
        relative = path.relative_to(self.root).as_posix()
        return any(matches(relative, pattern) for pattern in self.exclude)

    @staticmethod
    def _leads_back(folder: Path, name: str) -> bool:
        here = folder.resolve()
        return (folder / name).resolve() in (here, *here.parents)


def _closure(starts: set[int], segments: tuple[str, ...]) -> set[int]:
    """Positions in a pattern that are reached without consuming a name: `**` may stand for no folder at all."""
    reached = set(starts)
    for i in range(len(segments)):
        if i in reached and segments[i] == "**":
            reached.add(i + 1)
    return reached
