"""Damage that cannot be told from data, because the damaged file is what a sound one with another content would be."""

import csv
import io
import json
import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.faults.products import content
from tests.faults.texts import same_form as same_containers

SECONDS = 20
__all__ = ["forked", "never", "same_array", "same_form", "same_reading"]


def never(path: Path, before: bytes, here: Path) -> bool:
    """The file has checksums, its own or the product's: whatever was changed can be found."""
    return False


def same_array(path: Path, before: bytes, here: Path) -> bool:
    """An npy file of the same shape and type, which has no checksum; ``verify=true`` compares those of preparation."""
    try:
        after = np.load(io.BytesIO(content(path)), allow_pickle=False)
    except Exception:
        return False
    was = np.load(io.BytesIO(before), allow_pickle=False)
    return path.stat().st_size == len(before) and after.shape == was.shape and after.dtype == was.dtype


def same_form(path: Path, before: bytes, here: Path) -> bool:
    """A text file with the same keys, types and columns: somebody may have meant it."""
    try:
        text = content(path).decode("utf-8")
        if path.suffix == ".csv":
            return _same_columns(before.decode(), text)
        read = json.loads if path.suffix == ".json" else yaml.safe_load
        return same_containers(read(before), read(text))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return False


def _same_columns(before: str, after: str) -> bool:
    if not after.isascii() or "\x00" in after or not after.endswith("\n"):
        return False
    was, rows = (list(csv.reader(io.StringIO(text, newline=""))) for text in (before, after))
    if not rows or rows[0] != was[0] or any(len(row) != len(was[0]) for row in rows):
        return False
    return all(_kind(cell) in {_kind(row[i]) for row in was[1:]} for row in rows[1:] for i, cell in enumerate(row))


def _kind(cell: str) -> str:
    try:
        number = float(cell)
    except ValueError:
        return "text" if cell else "nothing"
    return "number" if np.isfinite(number) and abs(number) < 1e12 else "no number"


def same_reading(path: Path, before: bytes, here: Path) -> bool:
    """A scan without a checksum that another reader reads without complaint, on the grid of the subject's others.

    Whether the store then holds what that reader reads is compared as well.
    """
    try:
        content(path)
    except OSError:
        return False
    marks = (b"CompressedData = True", b"encoding: gz")
    compressed = before[:2] == b"\x1f\x8b" or any(mark in before[:2000] for mark in marks)
    if compressed and not _header_only(path, before):
        return False
    return bool(forked(lambda: _agrees(path, here)))


def _header_only(path: Path, before: bytes) -> bool:
    """Whether a gzipped file is a sound one still: it was compressed with its damage, and the sums are right."""
    import gzip
    import zlib

    try:
        gzip.decompress(content(path))
        return before[:2] == b"\x1f\x8b"
    except (OSError, EOFError, zlib.error):
        return False


def _agrees(path: Path, here: Path) -> bool:
    if path.suffix == ".raw":  # read through its header
        path = next(other for other in (path.with_suffix(".mhd"), path.with_suffix(".nhdr")) if other.is_file())
    sequence = path.name.split("_")[1].split(".")[0]
    stored = path.parents[2] / "store" / path.parent.name
    table = json.loads((stored / "subject.json").read_text())
    other = path.with_name(path.name.replace(f"_{sequence}.", "_t2." if sequence != "t2" else "_t1."))
    volume, affine = _read(path)
    reference, place = _read(other)
    if volume.shape != reference.shape or not np.allclose(affine, place, atol=0.5):
        return False
    if sequence == "seg":
        return np.array_equal(np.sort(np.load(stored / "label.npy"), axis=None), np.sort(volume, axis=None))
    kept = np.load(stored / "image.npy")[table["modalities"].index(sequence)]
    return np.allclose(np.sort(kept, axis=None), np.sort(volume, axis=None), rtol=1e-5)


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if path.name.endswith((".nii", ".nii.gz")):
        import nibabel

        image: Any = nibabel.load(path)
        return np.asanyarray(image.dataobj), image.affine
    import SimpleITK

    read = SimpleITK.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(read.GetDirection(), (3, 3)) * read.GetSpacing()
    affine[:3, 3] = read.GetOrigin()
    return SimpleITK.GetArrayFromImage(read).T, affine


def forked(function: Callable[[], Any]) -> Any:
    """What a function returns, called in a process that it may crash; None where it does."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reading)
            signal.alarm(SECONDS)
            with os.fdopen(writing, "wb") as file:
                pickle.dump(function(), file)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        content = file.read()
    os.waitpid(pid, 0)
    return pickle.loads(content) if content else None
