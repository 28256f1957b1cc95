"""Layout tables as they come: from YAML of strangers, from a composed config, from a store. Data, whatever they say."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mrgen.errors import UserError
from mrgen.files import load_yaml, open_to_read

__all__ = ["mapping", "names", "number", "numbers", "plain_table", "read_table", "text", "truth", "word"]

LARGEST = 1 << 20  # bytes of a layout file
_MOST_ENTRIES, _DEEPEST = 10_000, 20  # a few kilobytes of YAML aliases stand for more than a machine holds


def read_table(path: Path) -> Any:
    """What a layout's YAML file holds.

    Raises:
        UserError: no file, or no YAML.
    """
    try:
        with open_to_read(path) as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}), expected a layout as YAML") from error
    if len(content) > LARGEST:
        raise UserError(f"{path}: found more than {LARGEST:,} bytes, expected a layout as YAML")
    try:
        return load_yaml(content.decode("utf-8"), aliases=True)
    except Exception as error:  # beside YAMLError whatever dates, numbers and depths of a damaged file lead to
        first = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: is no YAML ({first}), expected a layout; quote patterns that start with *") from error


def plain_table(conf: Any, where: str) -> Any:
    """Plain containers of a mapping, a config's node as well.

    Raises:
        UserError: an interpolation, which whoever composes it later would resolve; a text that is none; too much.
    """
    left = _MOST_ENTRIES

    def plain(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > _DEEPEST:
            raise UserError(f"{where}: is larger or deeper than a layout can be; expected the keys of docs/cohorts.md")
        if isinstance(value, Mapping):
            return {plain(key, depth + 1): plain(item, depth + 1) for key, item in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, str | bytes):
            return [plain(item, depth + 1) for item in value]
        if isinstance(value, str) and ("${" in value or not value.isprintable()):
            what = "an interpolation" if "${" in value else "characters that cannot be printed"
            raise UserError(f"{where}: found {what} in {value[:80]!r}, expected plain text; a layout is data")
        return value

    try:
        return plain(conf, 0)
    except UserError:
        raise
    except Exception as error:  # a config's node that cannot be resolved
        raise UserError(f"{where}: cannot be read ({' '.join(str(error).split())[:200]})") from error


# ----- values of one kind; `where` names the layout and the key ------------------------------------------------------


def _wrong(value: Any, where: str, expected: str) -> UserError:
    return UserError(f"{where} has the wrong form: found {str(value)[:80]!r}, expected {expected}; see docs/cohorts.md")


def mapping(value: Any, where: str, item: Callable[[Any, str], Any], key: Callable[[Any, str], Any] | None = None):
    """A mapping; ``item`` and ``key`` (default: ``text``) read what it holds. None is an empty one."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _wrong(value, where, "a mapping")
    read_key = key or text
    return {read_key(k, where): item(v, f"{where}.{k}") for k, v in value.items()}


def text(value: Any, where: str) -> str:
    """Text; YAML reads some of it as numbers."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise _wrong(value, where, "text")
    return str(value)


def word(value: Any, where: str) -> str:
    """Text that may be part of a file's name."""
    if not re.fullmatch(r"\w[\w.+-]*", text(value, where)):
        raise _wrong(value, where, "letters, digits and . _ + -")
    return str(value)


def number(value: Any, where: str) -> int:
    """A whole number; JSON makes text of those that are keys."""
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,9}", value):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 10**9:
        raise _wrong(value, where, "whole numbers")
    return value


def _list(value: Any, where: str, item: Callable[[Any, str], Any]) -> list[Any]:
    if not isinstance(value, list):
        raise _wrong(value, where, "a list")
    return [item(one, where) for one in value]


def names(value: Any, where: str) -> list[str]:
    """A list of texts."""
    return _list(value, where, text)


def numbers(value: Any, where: str) -> list[int]:
    """A list of whole numbers."""
    return _list(value, where, number)


def truth(value: Any, where: str) -> bool:
    """true or false, and no word that reads like it."""
    if not isinstance(value, bool):
        raise _wrong(value, where, "true or false")
    return value
