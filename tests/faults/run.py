"""``make faults``: damages, attacks, kills and starves the four commands, and writes the table of docs/reliability.md.

    python -m tests.faults.run FOLDER [--mutants 2000] [--kills 200] [--jobs 2] [--report FILE] [--only WORD]

What has been tried is kept in FOLDER/results.jsonl; another start goes on from there, unless the code has changed.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults.outcome import BAD, Outcome
from tests.faults.process import preload

__all__ = ["Case", "main", "try_all"]

LONGEST = 400  # seconds; a case has several commands, each of which has a limit of its own
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Case:
    """One thing to try.

    Attributes:
        group, name: a row of the table, and the case of it.
        call: is given a folder of its own, and returns what was done and what became of it.
        known: a function and its arguments, whose cached result the case asks for; called before processes fork.
    """

    group: str
    name: str
    call: Callable[[Path], tuple[str, Outcome]]
    known: tuple[Any, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.group}/{self.name}"


def cases(world: Path, *, mutants: int, kills: int) -> list[Case]:
    """Everything that is tried, in an order that meets every kind early.

    Args:
        world: what is damaged.
        mutants: damaged files, at least one of every kind.
        kills: of all commands together.
    """
    from tests.faults import contention, damaging, disk, hostile, killing
    from tests.faults.doors import KINDS

    found = []
    for seed in range(max(1, -(-mutants // len(KINDS)))):
        for kind in KINDS:
            call = partial(damaging.damage, kind.name, seed, world)
            found.append(Case(f"damaged: {kind.name}", str(seed), call, (damaging.expected, kind.door, world)))
    thorough = mutants > 500
    for door, name, call in hostile.attempts(world, thorough=thorough):
        found.append(Case(f"hostile: {door}", name, call))
    for group, attempts in (
        ("disk full", disk.attempts(world, thorough=thorough)),
        ("at once", contention.attempts(world, thorough=thorough)),
        ("killed", killing.attempts(world, kills)),
    ):
        found += [Case(f"{group}: {job}", name, call, (killing.timed, job, world)) for job, name, call in attempts]
    return found


def code_digest() -> str:
    """Of what is tried and of what tries it."""
    digest = hashlib.sha256()
    for folder in ("mrgen", "conf", "hydra_plugins", "tests/faults"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix in (".py", ".yaml"):
                digest.update(path.read_bytes())
    return digest.hexdigest()


def _try(case: Case, folder: Path) -> dict[str, Any]:
    began = time.monotonic()
    scratch = folder / "scratch" / f"{os.getpid()}"
    try:
        what, outcome = case.call(scratch)
    except Exception:
        what, outcome = "the harness", Outcome("unclear", traceback.format_exc().replace("\n", " | ")[-800:])
    seconds = round(time.monotonic() - began, 2)
    shutil.rmtree(scratch, ignore_errors=True)
    return {"group": case.group, "case": case.name, "what": what, **asdict(outcome), "seconds": seconds}


_CASES: list[Case] = []  # known to the workers, which are forked


def _numbered(number: int, folder: Path) -> dict[str, Any]:
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(LONGEST)
    try:
        return _try(_CASES[number], folder)
    finally:
        signal.alarm(0)


def _too_long(*_: object) -> None:
    raise TimeoutError(f"a case took more than {LONGEST} s: the harness waits for something")


def try_all(folder: Path, todo: list[Case], jobs: int) -> Iterator[dict[str, Any]]:
    """Runs cases in so many processes, which are forked from this one."""
    for function, *arguments in dict.fromkeys(case.known for case in todo if case.known):
        function(*arguments)
    _CASES[:] = todo
    with multiprocessing.get_context("fork").Pool(jobs, maxtasksperchild=50) as pool:
        yield from pool.imap_unordered(partial(_numbered, folder=folder), range(len(todo)))


def results(folder: Path, *, mutants: int, kills: int, jobs: int, only: str = "") -> list[dict[str, Any]]:
    """The results of all cases; those of an earlier start with the same code are not run again."""
    from tests.faults.world import build

    preload()
    folder.mkdir(parents=True, exist_ok=True)
    log, stamp = folder / "results.jsonl", folder / "code"
    if not stamp.is_file() or stamp.read_text() != code_digest():
        shutil.rmtree(folder / "world", ignore_errors=True)
        log.unlink(missing_ok=True)
        stamp.write_text(code_digest())
    build(folder / "world" / "here")
    known = {}
    if log.is_file():
        lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
        known = {f"{line['group']}/{line['case']}": line for line in lines}
    wanted = [case for case in cases(folder / "world" / "here", mutants=mutants, kills=kills) if only in case.key]
    done = [known[case.key] for case in wanted if case.key in known]
    todo = [case for case in wanted if case.key not in known]
    began = time.monotonic()
    with log.open("a") as file:
        for number, line in enumerate(try_all(folder, todo, jobs), start=1):
            file.write(json.dumps(line) + "\n")
            file.flush()
            done.append(line)
            if line["name"] in BAD:
                print(f"{line['group']} {line['case']}: {line['what']}: {line['name']}: {line['line']}", flush=True)
            if number % 50 == 0:
                print(f"{number} of {len(todo)}, {time.monotonic() - began:.0f} s", flush=True)
    return done


def main() -> None:
    """The command."""
    from tests.faults.table import findings, write_table

    parser = argparse.ArgumentParser(description="Damages, attacks, kills and starves the four commands.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mutants", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--report", type=Path, help="Markdown file whose table is replaced")
    parser.add_argument("--findings", type=Path, help="Markdown file of what must not be, by cause")
    parser.add_argument("--only", default="", help="groups that hold this word")
    arguments = parser.parse_args()
    done = results(
        arguments.folder.resolve(),
        mutants=arguments.mutants,
        kills=arguments.kills,
        jobs=arguments.jobs,
        only=arguments.only,
    )
    text = write_table(done, arguments.report)
    print(text)
    if arguments.findings:
        arguments.findings.write_text(findings(done), encoding="utf-8")
    sys.exit(any(line["name"] in BAD for line in done))


if __name__ == "__main__":
    main()
