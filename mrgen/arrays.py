"""NumPy files of ours, which may be damaged: read without pickles, their sizes known before memory is taken."""

import io
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO
from zipfile import BadZipFile, ZipFile

import numpy as np

from mrgen.errors import UserError
from mrgen.files import open_to_read

__all__ = ["map_array", "read_arrays"]

SMALL = 2**26  # bytes that a file may unpack to, however small it is,
RATIO = 100  # and to how many times its size a larger one


def read_arrays(
    path: Path, kinds: Mapping[str, tuple[str, int]], *, expected: str, remedy: str
) -> dict[str, np.ndarray]:
    """Arrays of an npz file.

    Args:
        path: of the file.
        kinds: by name, what each may be: NumPy's letters for kinds of data (``f``, ``iu``), and the number of axes.
        expected: what the file should be, in a reader's words.
        remedy: what to do where it is not.

    Raises:
        UserError: it cannot be read, lacks one of them, or one is of another kind, or has numbers that are not finite.
    """
    try:
        with open_to_read(path) as file, ZipFile(file) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if lacking := [name for name in kinds if name not in members]:
                raise ValueError(f"no array {', '.join(lacking)}")
            most = max(SMALL, RATIO * os.fstat(file.fileno()).st_size)
            if sum(members[name].file_size for name in kinds) > most:
                raise ValueError(f"arrays of more than {most >> 20} MiB")
            arrays = {name: _array(archive.read(members[name])) for name in kinds}
    except (OSError, ValueError, EOFError, BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        found = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{path}: cannot be read ({found}), expected {expected}; {remedy}") from error
    for name, array in arrays.items():
        letters, axes = kinds[name]
        if array.dtype.kind not in letters or array.ndim != axes:
            raise UserError(f"{path}: found {name} of {array.dtype} {array.shape}, expected {expected}; {remedy}")
        if not np.isfinite(array).all():
            raise UserError(f"{path}: found numbers in {name} that are not finite, expected {expected}; {remedy}")
    return arrays


def _array(content: bytes) -> np.ndarray:
    """The array of an npy file, which is no longer and no shorter than its header says."""
    file = io.BytesIO(content)
    shape, dtype = _header(file)
    if len(content) - file.tell() != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{len(content)} bytes for {dtype} {shape}")
    return np.load(io.BytesIO(content), allow_pickle=False)


def _header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"version {version} of the format")
    try:
        shape, _, dtype = readers[version](file)
    except Exception as error:  # a header is Python's text of a dictionary, and ends in whatever its parser raises
        raise ValueError(f"a header that cannot be read ({type(error).__name__})") from error
    if dtype.hasobject or dtype.itemsize == 0 or min(shape, default=0) < 0:
        raise ValueError(f"{dtype} {shape}")
    return shape, dtype


def map_array(path: Path) -> np.ndarray:
    """An npy file's array, read as it is used.

    Raises:
        OSError: it cannot be opened, or is no file.
        ValueError: it holds no array of numbers, or its length is not what its header says.
    """
    with open_to_read(path) as file:
        shape, dtype = _header(file)
        if os.fstat(file.fileno()).st_size - file.tell() != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{os.fstat(file.fileno()).st_size} bytes, {dtype} {shape} in its header")
    return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
