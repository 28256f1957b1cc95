"""Files that are there as a whole or not at all, and that follow no link; a damaged one ends in a sentence."""

import errno
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from mrgen.errors import UserError

__all__ = [
    "open_to_read",
    "open_without_links",
    "read_json",
    "read_text",
    "remove_leftovers",
    "replacing",
    "write_json",
]

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # the disk, the user's share of it, what the process may write
# Of a process, or of a split. Nobody else's files are named like that.
LEFTOVER = re.compile(r"\..+\.(ckpt|csv|json|png|yaml)\.[0-9a-f]+")


def open_without_links(path: Path, flags: int) -> int:
    """``os.open`` that neither follows a link nor waits at a pipe: the folder may be somebody else's.

    Args:
        path: of the file; made with the usual mode where ``flags`` say so.
        flags: of ``os.open``.

    Raises:
        UserError: something other than a file is there.
        OSError: as ``os.open``.
    """
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EMLINK, errno.ENXIO, errno.EISDIR):
            raise
        kind = "a link" if path.is_symlink() else "a folder" if path.is_dir() else "a pipe"
        raise UserError(f"{path}: found {kind}, expected a file or nothing; remove it") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UserError(f"{path}: found a pipe or a device, expected a file or nothing; remove it")
    return handle


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` in one step, once the block has ended well and the disk has everything.

    It lies beside ``path`` until then: from another file system it would be copied, which takes many steps. A link at
    ``path`` is replaced, and what it points to stays as it is.

    Args:
        path: to be written; its folder is made.

    Raises:
        UserError: the disk is full. What was at ``path`` is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        handle = open_without_links(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        with open(handle, "w+b") as file:
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


def write_json(path: Path, content: Any) -> None:
    """Writes a whole file or none."""
    text = json.dumps(content, indent=2) + "\n"
    with replacing(path) as file:
        file.write(text.encode())


def open_to_read(path: Path) -> BinaryIO:
    """A file, opened for reading where reading ends: neither a pipe, which waits, nor a device.

    Raises:
        OSError: it cannot be opened; EINVAL where it is no file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(mode := os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "a folder" if stat.S_ISDIR(mode) else "a pipe or a device", str(path))
    return open(handle, "rb")


def read_text(path: Path, *, expected: str, remedy: str) -> str:
    """The text of a small UTF-8 file of ours, which may be damaged.

    Args:
        path: of the file.
        expected: what it should be, in a reader's words.
        remedy: what to do where it is not.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with open_to_read(path) as file:
            return file.read().decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte {error.start} is no UTF-8"
    except OSError as error:
        found = error.strerror or str(error)
    raise UserError(f"{path}: cannot be read ({found}), expected {expected}; {remedy}")


def read_json(path: Path, *, expected: str, remedy: str) -> Any:
    """The content of a JSON file of ours, which may be damaged.

    Args:
        path, expected, remedy: see ``read_text``.

    Raises:
        UserError: it cannot be read, or holds no JSON.
    """
    text = read_text(path, expected=expected, remedy=remedy)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        found = f"no JSON: {error}" if isinstance(error, ValueError) else "nested without an end"
        raise UserError(f"{path}: found {found}; expected {expected}; {remedy}") from None
