"""NumPy files that may be damaged: arrays as they were written, or one sentence."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mrgen.arrays import map_array, read_arrays
from mrgen.errors import UserError

KINDS = {"rows": ("iu", 1), "key": ("f", 1)}
WHOLE = {"rows": np.array([2, 1]), "key": np.array([0.5, 0.25, 1.0])}


def read(path: Path) -> dict[str, np.ndarray]:
    return read_arrays(path, KINDS, expected="the tables", remedy="fit anew")


def test_arrays_come_back(tmp_path: Path):
    np.savez_compressed(tmp_path / "x.npz", **WHOLE)
    arrays = read(tmp_path / "x.npz")
    assert arrays.keys() == WHOLE.keys()
    assert all(np.array_equal(arrays[name], WHOLE[name]) for name in WHOLE)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(b"rows.npy") + 60] ^= 1
    path.write_bytes(content)


def bombed(path: Path) -> None:
    """A megabyte that unpacks to a gigabyte of zeros."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("key.npy", "w") as part:
        np.lib.format.write_array_header_1_0(part, {"descr": "<f8", "fortran_order": False, "shape": (2**27,)})
        for _ in range(2**10):
            part.write(bytes(2**20))
    with zipfile.ZipFile(path, "a") as archive, archive.open("rows.npy", "w") as part:
        np.lib.format.write_array(part, WHOLE["rows"])


def lying(path: Path) -> None:
    """Its header says more than there is."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in WHOLE.items():
            with archive.open(f"{name}.npy", "w") as part:
                header = {"descr": array.dtype.str, "fortran_order": False, "shape": (2**40,)}
                np.lib.format.write_array_header_1_0(part, header)
                part.write(array.tobytes())


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (Path.unlink, "No such file"),
        (truncated, "not a zip file"),
        (flipped, "cannot be read"),
        (bombed, "arrays of more than"),
        (lying, r"bytes for .* \(1099511627776,\)"),
        (lambda path: np.savez(path, rows=WHOLE["rows"]), "no array key"),
        (lambda path: np.savez(path, **{**WHOLE, "key": np.array(["a"])}), "found key of <U1"),
        (lambda path: np.savez(path, **{**WHOLE, "key": np.ones((3, 1))}), r"found key of float64 \(3, 1\)"),
        (lambda path: np.savez(path, **{**WHOLE, "key": np.array([np.nan])}), "not finite"),
        (lambda path: np.savez(path, **{**WHOLE, "key": np.array([{}], dtype=object)}), "object"),
    ],
)
def test_what_is_damaged_is_one_sentence(tmp_path: Path, spoil: Callable[[Path], Any], said: str):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, **WHOLE)
    spoil(path)
    with pytest.raises(UserError, match=rf"x\.npz: .*{said}.*expected the tables; fit anew"):
        read(path)


def test_an_array_is_mapped_as_a_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "x.npy"
    np.save(path, np.arange(12.0).reshape(3, 4))
    assert np.array_equal(map_array(path), np.arange(12.0).reshape(3, 4))
    whole = path.read_bytes()
    for damaged in (whole[:-8], whole + bytes(8), whole[:60], b""):
        path.write_bytes(damaged)
        with pytest.raises((ValueError, EOFError)):
            map_array(path)
