"""Files that are there as a whole or not at all, and that follow no link; a damaged one ends in a sentence."""

import csv
import errno
import io
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
    "load_yaml",
    "open_to_read",
    "open_without_links",
    "read_bytes",
    "read_json",
    "read_metrics",
    "read_rows",
    "read_text",
    "read_yaml",
    "remove_leftovers",
    "replacing",
    "write_json",
    "write_text",
]

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # the disk, the user's share of it, what the process may write
# Of a process, or of a split. Nobody else's files are named like that.
LEFTOVER = re.compile(r"\..+\.(ckpt|csv|html|json|md|npy|npz|png|txt|yaml)\.[0-9a-f]+")
DEEPEST = 50  # levels of a YAML file
LARGEST = 2**28  # bytes of a file that is read as a whole: tables and settings, which are small


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
        if path.is_dir() and not path.is_symlink():
            raise UserError(f"{path}: found a folder, expected a file or nothing; remove it")
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


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or none, in UTF-8."""
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


def read_bytes(path: Path, *, expected: str, remedy: str) -> bytes:
    """The content of a small file of ours, which may be damaged.

    Args:
        path: of the file.
        expected: what it should be, in a reader's words.
        remedy: what to do where it is not.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with open_to_read(path) as file:
            if (size := os.fstat(file.fileno()).st_size) <= LARGEST:
                return file.read()
        found = f"{size >> 20} MiB"
    except (OSError, ValueError) as error:  # ValueError: its name cannot be one
        found = getattr(error, "strerror", None) or str(error)
    raise UserError(f"{path}: cannot be read ({found}), expected {expected}; {remedy}")


def read_text(path: Path, *, expected: str, remedy: str) -> str:
    """The text of a small UTF-8 file of ours. Arguments and errors as of ``read_bytes``."""
    content = read_bytes(path, expected=expected, remedy=remedy)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte {error.start} is no UTF-8"
    raise UserError(f"{path}: cannot be read ({found}), expected {expected}; {remedy}")


def read_json(path: Path, *, expected: str, remedy: str) -> Any:
    """The content of a JSON file of ours. Arguments and errors as of ``read_bytes``; also where it holds no JSON."""
    text = read_text(path, expected=expected, remedy=remedy)
    try:
        content = json.loads(text)
        json.dumps(content, ensure_ascii=False).encode()  # half of a character can be written down, and not be printed
        return content
    except (ValueError, RecursionError) as error:
        found = f"no JSON: {error}" if isinstance(error, ValueError) else "nested without an end"
        raise UserError(f"{path}: found {found}; expected {expected}; {remedy}") from None


def load_yaml(text: str, *, aliases: bool = False) -> Any:
    """The content of YAML, in a time that its length bounds: nested without an end, it would be read for hours.

    Args:
        text: of the file.
        aliases: whether it may have some; a few lines of them can be a content without an end.

    Raises:
        ValueError: aliases, or too many levels.
        yaml.YAMLError: it is no YAML.
    """
    import yaml

    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent) and not aliases:
            raise ValueError("an alias")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"more than {DEEPEST} levels")
    return yaml.safe_load(text)


def read_yaml(path: Path, *, expected: str, remedy: str) -> Any:
    """The content of a YAML file of ours, without aliases.

    Arguments and errors as of ``read_bytes``; also where it holds no YAML.
    """
    import yaml

    text = read_text(path, expected=expected, remedy=remedy)
    try:
        return load_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, AttributeError) as error:
        found = "nested without an end" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise UserError(f"{path}: found no YAML of ours ({found}); expected {expected}; {remedy}") from None


def read_rows(path: Path, *, expected: str, remedy: str) -> list[dict[str, str]]:
    """The rows of a CSV file of ours, by column. Arguments and errors as of ``read_bytes``.

    Also refused are columns of one name, and rows of more or fewer cells than there are columns; but where the file
    does not end with a line's end, as nothing that was written whole does, the line that was cut short is left out.
    """
    text = read_text(path, expected=expected, remedy=remedy).removeprefix("\ufeff")  # spreadsheets put it in front
    whole = text[: text.rfind("\n") + 1]
    try:
        if "\0" in text:
            raise csv.Error("bytes of 0")
        reader = csv.reader(io.StringIO(whole, newline=""), strict=True)
        columns = next(reader, [])
        rows = [row for row in reader if row]
        if len({*columns}) < len(columns):
            raise csv.Error("two columns of one name")
        for row in rows:
            if len(row) != len(columns):
                raise csv.Error(f"{len(row)} cells under {len(columns)} columns in line {rows.index(row) + 2}")
        return [dict(zip(columns, row, strict=True)) for row in rows]
    except csv.Error as error:
        raise UserError(f"{path}: found {error}; expected {expected}; {remedy}") from None


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows of a ``metrics.csv``; cells without a value are empty strings.

    A last line that was cut short is left out: a resumed run computes it again.

    Raises:
        UserError: it is damaged.
    """
    if not os.path.lexists(path):
        return []
    expected = "epochs, steps and metrics as a training wrote them"
    remedy = "put back a copy that is whole, or move the file away: the run goes on without its earlier rows"
    rows = read_rows(path, expected=expected, remedy=remedy)
    for line, row in enumerate(rows, start=2):
        wrong = next((name for name, cell in row.items() if not _is_value(name, cell)), None)
        if wrong is not None or "step" not in row:
            found = "no column step" if wrong is None else f"{wrong}={row[wrong]:.40} in line {line}"
            raise UserError(f"{path}: found {found}, expected {expected}; {remedy}")
    return rows


def _is_value(name: str, cell: str) -> bool:
    if name in ("step", "epoch"):
        return cell.isdecimal() or (name == "epoch" and not cell)
    try:
        return not cell or float(cell) is not None
    except ValueError:
        return False
