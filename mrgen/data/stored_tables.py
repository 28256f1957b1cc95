"""What a store says of itself, and whether its files are what it says: damage is found before anybody reads voxels."""

import hashlib
import io
import json
import math
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mrgen.data.folders import is_of_system
from mrgen.data.measures import STATISTICS
from mrgen.data.stored_subject import BRAIN, IMAGE, LABEL, STRUCTURE
from mrgen.errors import UserError
from mrgen.files import open_to_read, read_json

__all__ = [
    "COHORT",
    "FILES",
    "SUBJECT",
    "VERSION",
    "DamagedError",
    "checksums",
    "find_damage",
    "read_cohort",
    "read_subjects",
    "scan_subjects",
]

VERSION = 1
SUBJECT, COHORT = "subject.json", "cohort.json"
_ARRAYS = {IMAGE: ("int16", "float32"), LABEL: ("uint8",), BRAIN: ("uint8", "bool"), STRUCTURE: ("uint8", "bool")}
FILES = {SUBJECT, *_ARRAYS}


class DamagedError(UserError):
    """A table of a store that cannot be used, and that a preparation writes anew."""


def read_cohort(store: Path | str) -> dict[str, Any] | None:
    """`cohort.json` as a dict, or None where there is none.

    Raises:
        DamagedError: it cannot be read.
        UserError: its version is another, or it is a folder.
    """
    path = Path(store) / COHORT
    if not os.path.lexists(path):
        return None
    if path.is_dir() and not path.is_symlink():  # somebody's; no preparation would replace it
        raise UserError(f"{path}: found a folder, expected a store's table; move it away and run mrgen-prepare")
    remedy = "mrgen-prepare with the same data=… writes it anew; a synthetic cohort is generated anew"
    try:
        cohort = read_json(path, expected="a store's table", remedy=remedy)
    except UserError as error:
        raise DamagedError(str(error)) from None
    wrong = "no mapping" if not isinstance(cohort, dict) else None
    if wrong is None and cohort.get("version") != VERSION:
        if isinstance(cohort.get("version"), int):
            found = f"found store version {cohort['version']!r:.20}, expected {VERSION}"
            raise UserError(f"{path}: {found}; prepare into a new data.store")
        wrong = "no version"
    for key, fits in _COHORT_KEYS.items():
        if wrong is None and not fits(cohort.get(key)):
            wrong = f"{key}: {cohort.get(key)!r:.80}"
    if wrong is not None:
        raise DamagedError(f"{path}: cannot be read as a store's table ({wrong}); {remedy}")
    return cohort  # type: ignore[no-any-return]


def read_subjects(store: Path | str) -> dict[str, dict[str, Any]]:
    """The `subject.json` of every complete subject, by id, sorted; also of those prepared with other settings."""
    return scan_subjects(store)[0]


def scan_subjects(store: Path | str) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """All subjects of a store, also those prepared with other settings.

    Returns:
        The `subject.json` of each by id, sorted; and, of those whose table cannot be used, what was found. Folders that
        hold no file of ours are no subjects.
    """
    tables: dict[str, dict[str, Any]] = {}
    damaged: dict[str, str] = {}
    try:
        with os.scandir(store) as entries:
            names = sorted(entry.name for entry in entries if not is_of_system(entry.name))
    except OSError as error:
        raise UserError(f"data.store={store}: cannot be read ({error.strerror}); expected a prepared store") from error
    for name in names:
        folder = Path(store) / name
        if not folder.is_dir():
            continue
        if not os.path.lexists(folder / SUBJECT):
            if any(os.path.lexists(folder / file) for file in _ARRAYS):
                damaged[name] = f"no {SUBJECT}"
            continue
        try:
            table = read_json(folder / SUBJECT, expected="", remedy="")
        except UserError as error:
            found = re.split("[,;] expected", str(error).removeprefix(f"{folder / SUBJECT}: "))[0]
            damaged[name] = f"{SUBJECT}: {found}"
            continue
        if (wrong := _wrong(table, name)) is None:
            tables[name] = table
        else:
            damaged[name] = f"{SUBJECT}: {wrong}"
    return tables, damaged


# ----- tables ---------------------------------------------------------------------------------------------------------


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value)) and len(set(value)) == len(value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e300 < value < 1e300  # not isinstance: true is an int


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(_is_count(n) and 0 < n < 1 << 20 for n in value)


def _is_affine(value: Any) -> bool:
    rows = isinstance(value, list) and len(value) == 4 and all(isinstance(row, list) and len(row) == 4 for row in value)
    if not rows or not all(_is_number(number) for row in value for number in row):
        return False
    (a, b, c, _), (d, e, f, _), (g, h, i, _), _ = value
    return bool(a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g))  # it can be inverted


def _is_box(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(isinstance(pair, list) and len(pair) == 2 and all(map(_is_count, pair)) for pair in value)
        and all(a < b for a, b in value)
    )


def _are_statistics(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(named, dict) and set(STATISTICS) <= named.keys() and all(map(_is_number, named.values()))
        for named in value.values()
    )


def _are_checksums(value: Any) -> bool:
    """A text by file, and for the image one by sequence."""
    return isinstance(value, dict) and all(
        isinstance(of, dict) and all(map(_is_text, of.values())) if name == IMAGE else _is_text(of)
        for name, of in value.items()
    )


def _are_counts(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict) and all(k.isdecimal() and int(k) < 256 and _is_count(n) for k, n in value.items())
    )


_COHORT_KEYS = {
    "name": _is_text,
    "modalities": _is_texts,
    "settings": _is_text,
    "layout": lambda value: isinstance(value, dict),
}
_KEYS = {
    "patient": _is_text,
    "grade": lambda value: value is None or _is_text(value),
    "site": lambda value: value is None or _is_text(value),
    "modalities": _is_texts,
    "shape": _is_shape,
    "spacing": lambda value: (
        isinstance(value, list) and len(value) == 3 and all(_is_number(n) and n > 0 for n in value)
    ),
    "affine": _is_affine,
    "original_affine": _is_affine,
    "original_shape": _is_shape,
    "brain_box": _is_box,
    "statistics": _are_statistics,
    "label_counts": _are_counts,
    "brain_method": _is_text,
    "settings": _is_text,
    "source": lambda value: isinstance(value, dict),
    "revision": _is_text,
}


def _wrong(table: Any, name: str) -> str | None:
    """What makes a `subject.json` unusable; None where it is fine."""
    if not isinstance(table, dict):
        return "no mapping"
    if table.get("id") != name:
        return f"it is of {table.get('id')!r:.80}"
    for key, fits in _KEYS.items():
        if key not in table or not fits(table[key]):
            return f"{key}: {table[key]!r:.80}" if key in table else f"no {key}"
    if set(table["statistics"]) != set(table["modalities"]):
        return "statistics of other sequences"
    if any(b > n for (_, b), n in zip(table["brain_box"], table["shape"], strict=True)):
        return f"brain_box: {table['brain_box']} in a volume of {table['shape']}"
    if not _are_checksums(table.get("checksums", {})):
        return f"checksums: {table['checksums']!r:.80}"
    if "checksum" in table and table["checksum"] != table_checksum(table):
        return "other values than were written"
    return None


# ----- arrays ---------------------------------------------------------------------------------------------------------


def checksums(arrays: Mapping[str, np.ndarray], modalities: tuple[str, ...] | list[str]) -> dict[str, Any]:
    """SHA-256 of what the arrays hold: for each sequence of the image, and for each other array.

    Sequences are hashed as float32, whatever they are stored as: the same scan has the same checksum beside others.

    Args:
        arrays: by file; the image (C, X, Y, Z), the others (X, Y, Z).
        modalities: of the image's channels.
    """
    found: dict[str, Any] = {name: _checksum(a, "u1") for name, a in arrays.items() if name != IMAGE}
    if IMAGE in arrays:
        found[IMAGE] = {m: _checksum(a, "<f4") for m, a in zip(modalities, arrays[IMAGE], strict=True)}
    return found


def table_checksum(table: Mapping[str, Any]) -> str:
    """SHA-256 of a `subject.json` but for this number itself."""
    rest = {key: value for key, value in table.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _checksum(array: np.ndarray, kind: str) -> str:
    digest = hashlib.sha256(str(array.shape).encode())
    digest.update(np.ascontiguousarray(array, dtype=kind).data)
    return digest.hexdigest()


def find_damage(folder: Path, table: Mapping[str, Any], *, contents: bool = False) -> str | None:
    """What is wrong with a subject's arrays; None where they are what its table says.

    Args:
        folder: the subject's.
        table: its `subject.json`, of `scan_subjects`.
        contents: whether to read every voxel and compare checksums, where there are some; else types, shapes and sizes
            alone.
    """
    shape = tuple(table["shape"])
    recorded = table.get("checksums", {})
    present = [IMAGE, BRAIN]
    present += [LABEL] * (table["label_counts"] is not None)
    present += [STRUCTURE] * (STRUCTURE in recorded or (folder / STRUCTURE).exists())
    arrays = {}
    for name in present:
        expected = (len(table["modalities"]), *shape) if name == IMAGE else shape
        try:
            if (wrong := _array_damage(folder / name, expected, _ARRAYS[name])) is not None:
                return f"{name}: {wrong}"
            if contents:
                arrays[name] = np.load(folder / name, mmap_mode="r", allow_pickle=False)
        except OSError as error:
            return f"{name}: {error.strerror or error}"
        except Exception as error:  # whatever NumPy says of a damaged header
            return f"{name}: no array ({' '.join(str(error).split())[:80]})"
    if not contents:
        return None
    for name, now in checksums(arrays, table["modalities"]).items():
        if recorded and recorded.get(name) != now:
            return f"{name}: other voxels than were prepared"
    return None


def _array_damage(path: Path, shape: tuple[int, ...], kinds: tuple[str, ...]) -> str | None:
    with open_to_read(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(128)
        for kind in kinds:  # parsing headers takes longer than all the rest
            header, needed = _as_saved(shape, kind)
            if start.startswith(header):
                return None if size == needed else f"{size:,} bytes, expected {needed:,}"
        file.seek(0)
        version = np.lib.format.read_magic(file)
        if version != (1, 0):  # all that np.save writes of plain arrays
            return f"format {version[0]}.{version[1]}, expected 1.0"
        found, fortran, found_kind = np.lib.format.read_array_header_1_0(file)
        needed = file.tell() + math.prod(shape) * found_kind.itemsize
    if found_kind.name not in kinds or found_kind.byteorder == ">":
        return f"{found_kind} numbers, expected {' or '.join(kinds)}"
    if found != shape or fortran:
        return f"shape {found}{' by columns' if fortran else ''}, expected {shape}"
    return None if size == needed else f"{size:,} bytes, expected {needed:,}"


@lru_cache(maxsize=64)
def _as_saved(shape: tuple[int, ...], kind: str) -> tuple[bytes, int]:
    """The header that np.save writes, and the size of the file."""
    header = io.BytesIO()
    layout = {"descr": np.dtype(kind).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, layout)
    return header.getvalue(), len(header.getvalue()) + math.prod(shape) * np.dtype(kind).itemsize
