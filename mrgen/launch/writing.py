"""Files that are there as a whole or not at all, whenever the process is killed or the disk is full."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mrgen.errors import UserError

__all__ = ["remove_leftovers", "replacing"]

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # the disk, the user's share of it, what the process may write
LEFTOVER = re.compile(r"\..+\.(ckpt|csv|json|yaml)\.[0-9a-f]+")  # of a process, or of a split


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` in one step, once the block has ended well and the disk has everything.

    It lies beside ``path`` until then: from another file system it would be copied, which takes many steps.

    Args:
        path: to be written; its folder is made.

    Raises:
        UserError: the disk is full. What was at ``path`` is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if (reason := _full(error)) is None:
            raise
        raise UserError(
            f"{path}: cannot be written ({reason}); what was saved before is whole. Make room and go on with the run"
        ) from error


def _full(error: BaseException | None) -> str | None:
    """What the system says of the disk, somewhere behind an error; torch puts one of its own in front."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return os.strerror(error.errno)
        error = error.__cause__ or error.__context__
    return None


def remove_leftovers(*folders: Path) -> None:
    """Removes from the folders what processes were writing when they were killed. Nobody may write to them."""
    for folder in folders:
        for path in folder.glob(".*"):
            if LEFTOVER.fullmatch(path.name):
                path.unlink(missing_ok=True)
