"""Patterns from layouts, which strangers may have written: each is checked, and none searches without an end."""

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mrgen.errors import UserError

__all__ = ["check_expression", "checked_globs", "search"]

LONGEST = 500  # characters of a pattern
LONGEST_SEARCH = 1.0  # seconds; the slowest honest pattern takes microseconds
_ANY_FOLDERS = 4  # `**` in one glob: each further one multiplies the ways to match


def checked_globs(value: Any, where: str) -> tuple[str, ...]:
    """One glob or several, none of which leaves its folder.

    Args:
        value: text or a list of texts; None is none.
        where: file and key, for messages.

    Raises:
        UserError: what is no such pattern.
    """
    patterns = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(patterns, list | tuple):
        raise UserError(f"{where}: found {value!r}, expected a glob such as '*_t1.nii*', or a list of them")
    return tuple(_glob(pattern, where) for pattern in patterns)


def _glob(pattern: Any, where: str) -> str:
    if not isinstance(pattern, str) or not pattern.strip("/") or {"..", "."} & set(pattern.split("/")):
        raise UserError(f"{where}: {pattern!r} is no glob pattern; expected something like '*_t1.nii*'")
    pattern = re.sub(r"\*\*(?:/\*\*)+", "**", pattern)  # any number of folders, once or many times over
    if len(pattern) > LONGEST or pattern.split("/").count("**") > _ANY_FOLDERS:
        raise UserError(
            f"{where}: {pattern[:60]!r} is too long; expected up to {LONGEST} characters and {_ANY_FOLDERS} times **"
        )
    return pattern


def check_expression(pattern: str, where: str) -> None:
    """Raises UserError for what is no regular expression."""
    if len(pattern) > LONGEST:
        raise UserError(f"{where}: found a pattern of {len(pattern)} characters, expected up to {LONGEST}")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"{where}: {pattern!r} is no regular expression: {error}") from error


def search(pattern: str, text: str, where: str) -> re.Match[str] | None:
    """``re.search`` that gives up: nested repetitions such as ``(a+)+$`` take longer than anybody lives.

    Raises:
        UserError: it took longer than ``LONGEST_SEARCH``.
    """
    try:
        with _limited(LONGEST_SEARCH):
            return re.search(pattern, text)
    except TimeoutError:
        raise UserError(
            f"{where}: {pattern!r} takes longer than {LONGEST_SEARCH:g} s on {text[:80]!r}; write it without nested "
            "repetitions"
        ) from None


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    # Python's engine looks for signals while it searches. They reach the main thread alone, where layouts are read.
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)  # whoever else waits for an alarm gets it, a little late
        signal.signal(signal.SIGALRM, before)
