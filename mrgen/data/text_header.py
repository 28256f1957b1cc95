"""What the headers in words, MetaImage's and NRRD's, have in common: lines, numbers, and where their axes point."""

import re
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from mrgen.data.image_file import AGAIN, BadFileError

LONGEST_HEADER = 1 << 16  # bytes; what is no header at all may be one endless line
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)  # float() takes 1_0 and infinity too
WHOLE = re.compile(r"[+-]?\d{1,18}", re.ASCII)

# By the directions in which a world's axes point, as NRRD names them; ITK's is left-posterior-superior.
TO_RAS = {
    "right-anterior-superior": np.eye(4),
    "left-anterior-superior": np.diag([-1.0, 1.0, 1.0, 1.0]),
    "left-posterior-superior": np.diag([-1.0, -1.0, 1.0, 1.0]),
}


def lines(file: BinaryIO) -> Iterator[str]:
    """The lines of a header at a file's start, the file being behind each as it comes."""
    left = LONGEST_HEADER
    while left > 0 and (line := file.readline(left)):
        left -= len(line)
        yield line.decode("utf-8", "replace")


def floats(text: str, n: int, what: str) -> list[float]:
    """``n`` finite numbers between blanks. Raises BadFileError for anything else."""
    numbers = [float(word) for word in text.split() if NUMBER.fullmatch(word)]
    if len(numbers) != len(text.split()) or len(numbers) != n or not np.isfinite(numbers).all():
        raise _no_numbers(text, n, what)
    return numbers


def integers(text: str, n: int, what: str) -> list[int]:
    """``n`` whole numbers between blanks. Raises BadFileError for anything else."""
    if not all(map(WHOLE.fullmatch, text.split())) or len(text.split()) != n:
        raise _no_numbers(text, n, what)
    return [int(word) for word in text.split()]


def _no_numbers(text: str, n: int, what: str) -> BadFileError:
    expected = "a number" if n == 1 else f"{n} numbers"
    return BadFileError("not an image", f"found the {what} {text[:60]!r}, expected {expected}; {AGAIN}")
