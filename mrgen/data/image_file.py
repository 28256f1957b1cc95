"""What every reader of image files needs: a file that is one, its size before memory is taken, a sane affine."""

import bz2
import os
import stat
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mrgen.data.memory import free_memory

LARGEST_VOLUME = 2**29  # voxels; a whole head at 0.25 mm, the finest scanned alive, has fewer
USUAL_VOLUME = 2**25  # voxels, 320³; up to it a scan is tried whatever is free, for other workers give theirs back
WORKING_BYTES = 64  # that checking and masking take for each voxel at their peak, measured, beyond the file's own
SIDES = (0.05, 50.0)  # mm, of a voxel; metres or micrometres called mm lie outside
FARTHEST = 1e5  # mm from the origin
LARGEST_SHEAR = 1e-3  # cosine between two axes: headers of four digits have less, gantry tilts far more
AGAIN = "copy it again"


class BadFileError(Exception):
    """A file that holds no usable volume. `kind` names the fault; the message says found, expected and what to do."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Volume:
    """What an image file holds.

    Attributes:
        array: (X, Y, Z), scaled where the header says so.
        affine: 4×4, voxels to RAS+ world (mm).
        notes: what the header left open or had wrong and was decided, one sentence each.
    """

    array: np.ndarray
    affine: np.ndarray
    notes: tuple[str, ...] = ()


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """An image file for reading, and nothing that only looks like one: a pipe would wait, a device never end.

    Raises:
        BadFileError: no regular file, an empty one, or one that another process changed in the meantime.
        OSError: as of ``os.open``.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        before = os.fstat(handle)
        if not stat.S_ISREG(before.st_mode):
            kind = "a folder" if stat.S_ISDIR(before.st_mode) else "a pipe or a device"
            raise BadFileError("not an image", f"found {kind}, expected an image file; restore it")
        if not before.st_size:
            raise BadFileError("not an image", f"found an empty file, expected {_kind(path)}; {AGAIN}")
        with open(handle, "rb", closefd=False) as file:
            yield file
        after = os.fstat(handle)
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            message = "found a file that changed while it was read, expected one that is done; run again"
            raise BadFileError("file changed", message)
    finally:
        os.close(handle)


def _kind(path: Path) -> str:
    kinds = {".mha": "a MetaImage", ".mhd": "a MetaImage", ".nrrd": "an NRRD volume", ".nhdr": "an NRRD volume"}
    return kinds.get(path.suffix.lower(), "a NIfTI volume")


def beside(path: Path, name: str) -> Path:
    """The file of voxels that a header names, which has to lie beside it.

    Raises:
        BadFileError: the name leads elsewhere, or means several files.
    """
    if name.split() and (name.split()[0].upper() == "LIST" or "%" in name):
        raise BadFileError(
            "voxels in other files", f"found voxels in several files ({name!r}), expected one; join them"
        )
    name = name.removeprefix("./")
    if not name or name != Path(name).name or name in (".", "..") or "\\" in name or "\0" in name:
        message = f"found voxels in {name!r}, expected a file in the header's own folder; move it there"
        raise BadFileError("voxels in other files", message)
    return path.with_name(name)


def check_size(shape: Sequence[int], needed: int) -> None:
    """Refuses what would not fit, before any memory is taken.

    Args:
        shape: (X, Y, Z) as the header claims.
        needed: bytes that the file unpacks to.

    Raises:
        BadFileError: no voxels, more than any scan has, or more than the machine can hold now.
    """
    size = "×".join(map(str, shape))
    if any(n < 1 for n in shape):
        raise BadFileError("not an image", f"found no voxels ({size}), expected a 3D volume; restore it")
    voxels = int(np.prod([int(n) for n in shape], dtype=object))
    if voxels > LARGEST_VOLUME:
        message = f"found a header that claims {size} voxels, expected {LARGEST_VOLUME:,} or fewer; resample it"
        raise BadFileError("too large", message)
    taken, free = needed + WORKING_BYTES * voxels, free_memory()
    if voxels > USUAL_VOLUME and free is not None and taken > free:
        message = (
            f"found a header that claims {size} voxels, which take {taken / 1e9:.1f} GB of memory, expected at most "
            f"the {free / 1e9:.1f} GB that are free; use fewer workers or a larger machine"
        )
        raise BadFileError("too large", message)


def read_voxels(file: BinaryIO, packing: str | None, needed: int) -> np.ndarray:
    """All that follows in a file, which has to be exactly the voxels.

    Args:
        file: at the voxels' start.
        packing: None, ``zlib`` (or gzip, whichever it is), ``gzip`` or ``bzip2``; unpacked to the end, where the
            checksum is, and never to more than a byte beyond ``needed``.
        needed: bytes of all voxels.

    Returns:
        (needed,) uint8.

    Raises:
        BadFileError: too few, too many, or damaged.
    """
    there = os.fstat(file.fileno()).st_size - file.tell()
    if packing is None:
        if there != needed:
            raise wrong_length("voxels", there, needed)
        return filled(file, needed)
    if there > needed + needed // 50 + 4096:  # nothing grows by that much when it is packed
        raise wrong_length("compressed voxels", there, needed)
    unpack = bz2.BZ2Decompressor() if packing == "bzip2" else zlib.decompressobj(31 if packing == "gzip" else 47)
    try:
        data = unpack.decompress(file.read(), needed + 1)
    except (zlib.error, OSError, ValueError):
        message = f"found corrupt compressed voxels, expected sound ones; {AGAIN}"
        raise BadFileError("corrupt compression", message) from None
    if not unpack.eof and len(data) <= needed:
        raise BadFileError("truncated file", f"found truncated compressed voxels, expected all; {AGAIN}")
    if len(data) != needed:
        raise wrong_length("voxels", len(data), needed)
    if unpack.unused_data:
        n = len(unpack.unused_data)
        raise BadFileError("too much data", f"found {n:,} bytes behind the compressed voxels, expected none; {AGAIN}")
    return np.frombuffer(data, np.uint8)


def filled(file: Any, needed: int, start: bytes = b"", what: str = "voxels") -> np.ndarray:
    """Reads up to a length.

    Args:
        file: with ``readinto``, read no further than that.
        needed: bytes, those of ``start`` included.
        start: what was read before.
        what: they are, in a message.

    Raises:
        BadFileError: the file ends before.
    """
    data: Any = np.empty(needed, np.uint8)  # takes memory only where it is written to
    data[: len(start)] = np.frombuffer(start, np.uint8)[:needed]
    done = min(len(start), needed)
    while done < needed and (n := file.readinto(memoryview(data)[done : done + (1 << 24)])):
        done += n
    if done < needed:
        raise wrong_length(what, done, needed)
    return data


def wrong_length(what: str, found: int, needed: int) -> BadFileError:
    """The error for a file that holds another number of bytes than its header claims."""
    if found < needed:
        return BadFileError("truncated file", f"found {found:,} bytes of {what}, expected {needed:,}; {AGAIN}")
    message = f"found more bytes of {what} than the {needed:,} of the header's size and data type; {AGAIN}"
    return BadFileError("too much data", message)


def affine_fault(affine: np.ndarray) -> str | None:
    """Why a 4×4 from voxels to mm cannot be a scan's, in a few words, or None where it can."""
    if not np.isfinite(affine).all():
        return "numbers that are not finite"
    sides = np.linalg.norm(affine[:3, :3], axis=0)
    if not (SIDES[0] <= sides.min() and sides.max() <= SIDES[1]):
        return f"voxel sides of {in_mm(sides)}"
    if (farthest := float(np.abs(affine[:3, 3]).max())) > FARTHEST:
        return f"an origin {farthest:g} mm away"
    axes = affine[:3, :3] / sides
    if (shear := float(np.abs(axes.T @ axes - np.eye(3)).max())) > LARGEST_SHEAR:
        return f"axes {np.degrees(np.arcsin(min(shear, 1.0))):.2g}° from right angles"
    return None


def check_affine(affine: np.ndarray) -> None:
    """Raises BadFileError for an affine that cannot be a scan's."""
    if fault := affine_fault(affine):
        message = f"found an affine with {fault}, expected voxel sides of {SIDES[0]:g} to {SIDES[1]:g} mm at right "
        raise BadFileError("no affine", message + "angles; mend the header or resample it")


def in_mm(sides: Sequence[float] | np.ndarray) -> str:
    """Voxel sides for a message: ``1×1×5 mm``."""
    return "×".join(f"{side:.4g}" for side in sides) + " mm"
