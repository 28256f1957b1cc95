"""Seeded damage that knows the headers: each field of NIfTI, MetaImage, NRRD and npy set to what it must not be."""

import random
import re

import nibabel
import numpy as np

from tests.faults.mutations import Mutator, Unfit

__all__ = ["metaimage_line", "nifti_field", "npy_header", "nrrd_line"]

NUMBERS = ("0", "-1", "1", "2", "3", "1e30", "-1e30", "nan", "inf", "99999999", "4294967296", "", "text", "1e-30")


def nifti_field(data: bytes, rng: random.Random) -> bytes:
    """One element of one field of a NIfTI-1 header at an extreme."""
    if len(data) < 352:
        raise Unfit
    header = np.frombuffer(data[:348], nibabel.nifti1.header_dtype).copy()
    name = rng.choice(header.dtype.names)
    values = header[name].reshape(-1)
    if values.dtype.kind == "S":
        values[rng.randrange(len(values))] = rng.randbytes(values.dtype.itemsize)
    elif values.dtype.kind == "f":
        number = rng.choice((0, -1, 1, 2, np.nan, np.inf, 1e30, -1e30, 1e38, 1e-30, 0.001, 1000))
        values[rng.randrange(len(values))] = number
    else:
        limits = np.iinfo(values.dtype)
        number = rng.choice((0, -1, 1, 2, 3, 4, 8, 16, 64, 128, 512, 1024, 2304, limits.max, limits.min))
        values[rng.randrange(len(values))] = min(max(number, limits.min), limits.max)
    return header.tobytes() + data[348:]


def _line(data: bytes, rng: random.Random, stop: int, separator: bytes) -> bytes:
    """Changes one ``key separator value`` line of a header that ends at ``stop``."""
    head, rest = data[:stop], data[stop:]
    lines = head.split(b"\n")
    places = [i for i, line in enumerate(lines) if separator in line]
    if not places:
        raise Unfit
    i = rng.choice(places)
    key, _, value = lines[i].partition(separator)
    how = rng.randrange(6)
    if how == 0:
        del lines[i]
    elif how == 1:
        lines.insert(i, lines[i])
    elif how == 2:
        words = value.split() or [b""]
        words[rng.randrange(len(words))] = rng.choice(NUMBERS).encode()
        lines[i] = key + separator + b" " + b" ".join(words)
    elif how == 3:
        lines[i] = key + separator + b" " + rng.choice(NUMBERS).encode()
    elif how == 4:
        lines[i] = key[: len(key) // 2] + separator + value
    else:
        lines[i] = key + separator + value + b" " + rng.choice((b"1", b"\x00", b"\xff\xfe", b"1 1 1 1", b"/dev/zero"))
    return b"\n".join(lines) + rest


def metaimage_line(data: bytes, rng: random.Random) -> bytes:
    """One line of a MetaImage header; ``ElementDataFile`` is the last one."""
    place = data.find(b"ElementDataFile")
    if place < 0:
        raise Unfit
    return _line(data, rng, data.index(b"\n", place), b"=")


def nrrd_line(data: bytes, rng: random.Random) -> bytes:
    """One line of an NRRD header, which ends with an empty one."""
    place = data.find(b"\n\n")
    return _line(data, rng, len(data) if place < 0 else place, b":")


def npy_header(data: bytes, rng: random.Random) -> bytes:
    """One entry of the header of an npy file."""
    if data[:6] != b"\x93NUMPY":
        raise Unfit
    size = int.from_bytes(data[8:10], "little")
    text, rest = data[10 : 10 + size].decode("latin-1"), data[10 + size :]
    how = rng.randrange(7)
    if how == 0:
        text = re.sub(r"'descr': '[^']*'", f"'descr': {rng.choice(TYPES)!r}", text)
    elif how == 1:
        text = text.replace("False", "True")
    elif how == 2:
        numbers = re.findall(r"\d+", text.partition("shape")[2])
        number = rng.choice(numbers)
        text = text.replace(number, rng.choice(("0", "1", "-1", "99999999999", str(int(number) + 1))), 1)
    elif how == 3:
        text = re.sub(r"\([^)]*\)", rng.choice(("()", "(1,)", "(2, 2)", "('a',)", "None")), text)
    elif how == 4:
        text = text.replace("'shape'", "'form'")
    elif how == 5:
        text = rng.choice(("{}", "[]", "", "{'descr': ", "__import__('os')", "{" * 500))
    else:
        return data[:6] + rng.choice((b"\x02\x00", b"\x03\x00", b"\x09\x00", b"\x00\x00")) + data[8:]
    text = text.rstrip().ljust(size - 1)[: max(size - 1, len(text.rstrip()))] + "\n"
    return data[:8] + len(text).to_bytes(2, "little") + text.encode("latin-1") + rest


TYPES = ("|O", "<f4", "<f8", "<i8", "|V8", "<U9", "|b1", "<c16", "nonsense", ">i2", "<M8[ns]")
_: tuple[Mutator, ...] = (nifti_field, metaimage_line, nrrd_line, npy_header)
