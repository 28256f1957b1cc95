"""Commands that are killed and run again: the end is that of an uninterrupted one, and nothing is left behind."""

import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from tests.faults.damaging import copy_parts
from tests.faults.doors import Door
from tests.faults.outcome import Outcome, Product, lost, tree
from tests.faults.process import NOTHING, Ended, run, start
from tests.faults.products import images, of_store, tables, weights
from tests.faults.world import BARE, CLUSTERING, INFER, RSNET, STORE, train_arguments

__all__ = ["JOBS", "Job", "attempts", "finish", "leftovers", "timed"]

LEFT = re.compile(r"(^|/)\.[^/]*(\.partial|\.gone|\.[0-9a-f]{6,})(/|$)|\.tmp$")


@dataclass(frozen=True)
class Job:
    """A command that takes a while.

    Attributes:
        door: the command and what it makes.
        again: arguments that go on with it; the same ones where there are none.
        output: the folder that it writes to.
    """

    door: Door
    output: str
    again: tuple[str, ...] = ()


def _train(preset: tuple[str, ...], epochs: int) -> Job:
    arguments = tuple(train_arguments(preset, "new", epochs=epochs))
    return Job(Door("train", arguments, ("store",), ("new/*",), weights("new")), "new", ("resume=new",))


def _prepare(workers: int) -> Job:
    arguments = ("data=phantom", *STORE, "data.store=fresh", f"workers={workers}")
    return Job(Door("prepare", arguments, ("cohort",), ("fresh/*",), of_store("fresh"), True), "fresh")


RESUME = ("resume=runs/rsnet", "trainer.max_epochs=5")
JUDGE = ("experiment=rsnet/swap", "segmenter=runs/snet", "runs=[runs/rsnet]", *BARE, "hydra.run.dir=judged")
JOBS: dict[str, Job] = {
    "prepare": _prepare(0),
    "train": _train(RSNET, 4),
    "train, resumed": Job(
        Door("train", RESUME, ("store", "runs/rsnet"), ("runs/rsnet/*",), weights("runs/rsnet")), "runs/rsnet"
    ),
    "synthesize": Job(
        Door(
            *("synthesize", ("checkpoint=runs/rsnet", "input=cohort", "output=new", "mc_samples=8", *INFER)),
            *(("runs/rsnet", "cohort"), ("new/*",), images("new")),
        ),
        "new",
    ),
    "evaluate": Job(
        Door(
            *("evaluate", JUDGE, ("store", "runs/rsnet", "runs/snet"), ("judged/*",)),
            tables("judged", "table.csv", "subjects.csv", "calibration.csv"),
        ),
        "judged",
    ),
    "train, clustering": _train(CLUSTERING, 1),
    "synthesize, generator": Job(
        Door(
            *("synthesize", ("checkpoint=runs/samr", "output=new", "subjects=5", *INFER)),
            *(("store", "runs/samr"), ("new/*",), of_store("new")),
        ),
        "new",
    ),
    "prepare, two workers": _prepare(2),
}
SELDOM = ("prepare, two workers",)  # whose processes import everything anew


def leftovers(folder: Path) -> list[str]:
    """Hidden files that a killed process was writing."""
    return [path for path in tree(folder) if LEFT.search(path)]


def attempts(world: Path, kills: int) -> list[tuple[str, str, Callable[[Path], tuple[str, Outcome]]]]:
    """So many kills, dealt out over the commands; most by SIGKILL, the others as a user or a queue ends a command."""
    deck = [name for name in JOBS if name not in SELDOM] * 6 + list(SELDOM)
    how = ("KILL", "KILL", "TERM", "KILL", "INT", "KILL", "KILL", "INT twice")
    counts: Counter[str] = Counter()
    found = []
    for place in range(kills):
        name = deck[place % len(deck)]
        call = partial(_killed, name, how[place % len(how)], counts[name], world)
        found.append((name, f"{counts[name]}", call))
        counts[name] += 1
    return found


@cache
def timed(name: str, world: Path) -> tuple[float, float, Product]:
    """When a command first writes, when it ends, and what it makes if nobody ends it."""
    job = JOBS[name]
    here = copy_parts(world, job.door, world.parent / f"timing of {os.getpid()}")
    before = _newest(here / job.output)
    began = time.monotonic()
    running = start(job.door.script, job.door.arguments, here)
    while _newest(here / job.output) == before and time.monotonic() - began < 30:
        time.sleep(0.01)
    first = time.monotonic() - began
    ended = running.wait()
    if ended.code:
        raise RuntimeError(f"mrgen-{job.door.script} {job.door.arguments}: {ended.code}\n{ended.said}")
    product = job.door.product(here, ended)
    shutil.rmtree(here.parent)
    return first, ended.seconds, product


def _newest(folder: Path) -> int:
    return max((path.lstat().st_mtime_ns for path in (folder, *folder.rglob("*")) if path.exists()), default=0)


def _killed(name: str, how: str, number: int, world: Path, scratch: Path) -> tuple[str, Outcome]:
    job, rng = JOBS[name], random.Random(f"{name} {number}")
    first, whole, expected = timed(name, world)
    here = copy_parts(world, job.door, scratch)
    before = tree(here)
    moment = first * 0.7 + rng.random() * (whole - first * 0.7)
    what = f"{how} after {moment:.2f} of {whole:.2f} s"
    running = start(job.door.script, job.door.arguments, here)
    time.sleep(moment)
    running.tell(getattr(signal, f"SIG{how.partition(' ')[0]}"))
    if how == "INT twice":
        time.sleep(0.05 + 0.2 * rng.random())
        running.tell(signal.SIGINT)
    ended = running.wait()
    if bad := _ended_badly(ended, how):
        return what, bad
    torn = [part for part, content in job.door.product(here, ended).items() if content.startswith("damaged: ")]
    if torn:
        return what, Outcome("lost", f"{torn[0]} is torn after {how}")
    return what, finish(job, here, before, expected)


def _ended_badly(ended: Ended, how: str) -> Outcome | None:
    said = " ".join(ended.err.split())[-300:]
    if ended.hung:
        return Outcome("hang", f"did not end by {how}; {said}")
    if ended.forbidden:
        return Outcome("executed", ended.forbidden[0])
    if how != "KILL" and ("Traceback" in ended.said or ended.said.count("error: ") > 1):
        return Outcome("traceback", said)
    if how.startswith("INT") and ended.code not in (0, 1, 130):
        return Outcome("unclear", f"exit code {ended.code}; {said}")
    return None


def finish(job: Job, here: Path, before: dict[str, str], expected: Product) -> Outcome:
    """Runs a command again that was ended in its middle, and judges what it then leaves."""
    ended: Ended = NOTHING
    for arguments in filter(None, (job.again, job.door.arguments)):
        ended = run(job.door.script, arguments, here)
        if ended.code == 0 or "Traceback" in ended.said or ended.hung:
            break  # else there was nothing to go on with
    said = " ".join(ended.said.split())[-300:]
    if ended.hung:
        return Outcome("hang", said)
    if "Traceback" in ended.said or ended.code < 0:
        return Outcome("traceback", f"when run again: {said}")
    if gone := lost(before, tree(here), job.door.writes):
        return Outcome("lost", f"{gone[0]} is gone or another")
    if ended.code:
        return Outcome("lost", f"cannot be run again: {said}")
    found = job.door.product(here, ended)
    if found != expected:
        parts = [part for part in expected if found.get(part) != expected[part]] or [*found]
        return Outcome("silently wrong", f"{', '.join(parts[:3])} not as of an uninterrupted one")
    if left := leftovers(here / job.output):
        return Outcome("lost", f"left behind: {left[0]}")
    return Outcome("right", said[-120:])
