"""Two of everything at once: one is refused or both are right, and nothing is torn."""

import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tests.faults.damaging import copy_parts
from tests.faults.killing import JOBS, leftovers, timed
from tests.faults.outcome import Outcome, lost, tree
from tests.faults.process import Ended, start

__all__ = ["attempts"]

LEFT_OUT = ("prepare, two workers",)


def attempts(world: Path, *, thorough: bool) -> list[tuple[str, str, Callable[[Path], tuple[str, Outcome]]]]:
    """Every command twice in one folder, the second a moment later; not thorough: once each."""
    return [
        (name, str(number), partial(_twice, name, number, world))
        for number in range(4 if thorough else 1)
        for name in JOBS
        if name not in LEFT_OUT
    ]


def _twice(name: str, number: int, world: Path, scratch: Path) -> tuple[str, Outcome]:
    job, rng = JOBS[name], random.Random(f"{name} {number}")
    _, whole, expected = timed(name, world)
    here = copy_parts(world, job.door, scratch)
    before = tree(here)
    later = 0.0 if number == 0 else rng.random() * whole
    # Their notes must not be one: each command has a folder of its own beside the shared one.
    running = [start(job.door.script, job.door.arguments, here)]
    time.sleep(later)
    running.append(start(job.door.script, job.door.arguments, here, second=True))
    ended = [each.wait() for each in running]
    what = f"the second {later:.2f} s later: exit codes {ended[0].code}, {ended[1].code}"
    if bad := _badly(ended):
        return what, bad
    if gone := lost(before, tree(here), job.door.writes):
        return what, Outcome("lost", f"{gone[0]} is gone or another")
    if (found := job.door.product(here, ended[0])) != expected:
        parts = [part for part in expected if found.get(part) != expected[part]] or [*found]
        return what, Outcome("silently wrong", f"{', '.join(parts[:3])} not as of one alone")
    if left := leftovers(here / job.output):
        return what, Outcome("lost", f"left behind: {left[0]}")
    return what, Outcome("right" if not any(each.code for each in ended) else "clear error", _said(ended))


def _badly(ended: Sequence[Ended]) -> Outcome | None:
    for each in ended:
        said = " ".join(each.said.split())[-300:]
        if each.hung:
            return Outcome("hang", said)
        if each.forbidden:
            return Outcome("executed", each.forbidden[0])
        if "Traceback" in each.said or each.code < 0:
            return Outcome("traceback", said)
        if each.code and each.said.count("error: ") != 1:
            return Outcome("unclear", said)
    if all(each.code for each in ended):
        return Outcome("lost", f"neither was let in: {_said(ended)}")
    return None


def _said(ended: Sequence[Ended]) -> str:
    return " / ".join(" ".join(each.err.split())[-150:] for each in ended)
