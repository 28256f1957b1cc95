"""What became of a damaged file: right, a clear sentence, or one of the endings that must not be."""

import fnmatch
import hashlib
import os
import re
import stat
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults.process import Ended
from tests.faults.watching import CANARY

__all__ = ["BAD", "OUTCOMES", "Outcome", "Product", "Tree", "judge", "named", "tree"]

OUTCOMES = ("right", "clear error", "untold", "unclear", "traceback", "hang", "silently wrong", "executed", "lost")
BAD = OUTCOMES[3:]
ALWAYS_WRITTEN = ("**/.lock", "**/status.json")  # also by a command that refuses
COMPLAINT = re.compile(r"\b(found|cannot|damaged|left out|is gone|anew|changed|no such|mended|restored)\b")
LONGEST = 3000  # characters of a message that somebody reads

Product = Mapping[str, str]  # what a command made: parts that a user would look at, by name, with a digest each
Tree = Mapping[str, str]


@dataclass(frozen=True)
class Outcome:
    """One of ``OUTCOMES``, and a line that says why."""

    name: str
    line: str


def tree(folder: Path) -> Tree:
    """Every file below a folder with a digest of its content, every link with its target."""
    found = {}
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                content = f"link to {os.readlink(path)}"
            elif not stat.S_ISREG(mode):
                content = "no file"
            elif path.stat().st_size > 1 << 30:  # a hole
                content = f"{path.stat().st_size} bytes"
            else:
                content = hashlib.sha1(path.read_bytes()).hexdigest()
            found[path.relative_to(folder).as_posix()] = content
    return found


def lost(before: Tree, after: Tree, writes: Sequence[str]) -> list[str]:
    """Files that are gone or others, although the command had no business with them."""
    changed = [path for path, content in before.items() if after.get(path) != content]
    return [path for path in changed if not any(fnmatch.fnmatch(path, glob) for glob in (*writes, *ALWAYS_WRITTEN))]


def named(message: str, names: Collection[str]) -> bool:
    """Whether a message names one of the names."""
    message = " ".join(message.split())  # tables fold long names
    return any(name in message or name in message.replace(" ", "") for name in names if name)


def judge(
    ended: Ended,
    *,
    expected: Product,
    found: Product,
    initial: Product,
    own: Collection[str],
    names: Collection[str],
    before: Tree,
    after: Tree,
    writes: Sequence[str],
    excused: bool,
) -> Outcome:
    """The outcome of one case.

    Args:
        ended: the command's end.
        expected: the product of undamaged files.
        found: that of the damaged ones.
        initial: what there was before the command.
        own: the parts that the damage may take away where the command says so; the others must be as expected.
        names: by which the message may name what is damaged.
        before, after: all files, but the damaged one.
        writes: globs of those that the command may write; where it refuses, it may write none.
        excused: whether the damage cannot be told from data.
    """
    last = _last_line(ended)
    if ended.forbidden:
        return Outcome("executed", ended.forbidden[0])
    if strangers := [path for path in after if CANARY in path and path not in before]:
        return Outcome("executed", f"made {strangers[0]}")
    if ended.hung:
        return Outcome("hang", f"still there after {ended.seconds:.0f} s; {last}")
    if ended.code < 0:
        return Outcome("traceback", f"ended by signal {-ended.code}; {last}")
    if "Traceback (most recent call last)" in ended.said or "Fatal Python error" in ended.said:
        return Outcome("traceback", last)
    if gone := lost(before, after, writes):
        return Outcome("lost", f"{gone[0]}; exit code {ended.code}; {last}")
    others = [part for part in expected if part not in own and found.get(part) != expected[part]]
    if others and set(own) != set(expected):
        return Outcome("lost", f"{others[0]}, which was not damaged; exit code {ended.code}; {last}")
    same = all(found.get(part) == expected[part] for part in own)
    if ended.code == 0 and same:
        return Outcome("right", last)
    said = named(ended.said, names)
    if ended.code:
        kept = {part: (expected[part], initial.get(part), None) for part in own}
        wrong = [part for part in own if found.get(part) not in kept[part] and not _is_damaged(found[part])]
        if wrong and not excused:
            return Outcome("silently wrong", f"{wrong[0]} is another, although it was refused; {last}")
        clear = said and ended.said.count("error: ") <= 1 and len(ended.err) < LONGEST
        return Outcome("clear error" if clear else "unclear", last)
    if said and all(part not in found or found[part] == expected[part] for part in own):  # left out, and told
        return Outcome("clear error", last)
    if said and not excused and _reported(ended, names):
        return Outcome("clear error", last)
    return Outcome("untold" if excused else "silently wrong", last)


def _is_damaged(content: str) -> bool:
    """Whether a part of a product could not be read: whoever looks at it sees that."""
    return content.startswith("damaged: ")


def _reported(ended: Ended, names: Collection[str]) -> bool:
    """Whether a line of its own, and not only a table's row, says what is wrong."""
    lines = [line for line in ended.said.splitlines() if not line.lstrip().startswith(("│", "┃", "─", "━"))]
    return any(named(line, names) and COMPLAINT.search(line) for line in lines)


def _last_line(ended: Ended) -> str:
    lines = [line.strip() for line in ended.err.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("resume with:", "preparing ", "checking "))] or [
        line.strip() for line in ended.out.splitlines() if line.strip()
    ]
    errors = [line for line in lines if line.startswith("error: ")]
    return " ".join((errors or lines or ["(nothing said)"])[-1].split())[:400]
