"""A sweep's folder: which jobs it has (``sweep.json``), and what has become of them."""

import math
import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mrgen.errors import UserError
from mrgen.files import read_json, read_metrics, read_yaml, write_json
from mrgen.launch.cluster.slurm import OVER, job_states
from mrgen.launch.configs import EXPECTED, REMEDY, find_config
from mrgen.launch.ranks import is_estimator
from mrgen.launch.status import METRICS, UNREADABLE, check_metrics, has_begun, is_alive, seen_status
from mrgen.launch.sweeps.resuming import MULTIRUN

__all__ = [
    "Job",
    "Progress",
    "advise",
    "lies_below",
    "objective",
    "own_overrides",
    "read_jobs",
    "show",
    "sweep_status",
    "view",
    "write_jobs",
]

SWEEP = "sweep.json"
MOST = 10**6  # jobs
LOST = "its process is gone and left no word"
DASH = "–"


@dataclass(frozen=True)
class Job:
    """One job of a sweep.

    Attributes:
        number: its place in the sweep, from 0 on.
        name: of its run.
        overrides: what it was started with, by Hydra's grammar.
        folder: of its run, relative to the sweep's.
        slurm_id: as SLURM writes it (``12_0`` in an array), None where it does not run there.
    """

    number: int
    name: str
    overrides: tuple[str, ...]
    folder: str
    slurm_id: str | None = None


def write_jobs(sweep_dir: Path, jobs: Sequence[Job]) -> None:
    """Writes ``sweep.json``. Jobs that are there already stay, unless one of the same number is given."""
    sweep_dir.mkdir(parents=True, exist_ok=True)
    known = {job.number: job for job in read_jobs(sweep_dir)} if (sweep_dir / SWEEP).is_file() else {}
    known |= {job.number: job for job in jobs}
    write_json(sweep_dir / SWEEP, [asdict(known[number]) for number in sorted(known)])


def read_jobs(sweep_dir: Path) -> list[Job]:
    """The jobs of a sweep, in order.

    Raises:
        UserError: the folder holds no ``sweep.json``, or one that cannot be read.
    """
    path = sweep_dir / SWEEP
    if not path.is_file():
        if not sweep_dir.is_dir():
            raise UserError(f"{sweep_dir}: found no such folder; expected that of a sweep of mrgen-train (-m)")
        if (sweep_dir / MULTIRUN).is_file():
            raise UserError(f"{sweep_dir}: a sweep of an earlier version, without {SWEEP}; resume its runs one by one")
        raise UserError(f"{sweep_dir}: found no {SWEEP}; expected the folder of a sweep of mrgen-train (-m)")
    expected = "the list of a sweep's jobs"
    remedy = "put back a copy that is whole, or resume its runs one by one"
    content = read_json(path, expected=expected, remedy=remedy)
    if not isinstance(content, list) or (wrong := [job for job in content if not _is_job(job)]):
        found = f"{wrong[0]!r:.80}" if isinstance(content, list) else f"a {type(content).__name__}"
        raise UserError(f"{path}: found {found}, expected {expected}; {remedy}")
    if len({job["number"] for job in content}) < len(content):
        raise UserError(f"{path}: found two jobs of one number, expected {expected}; {remedy}")
    return [Job(**{**job, "overrides": tuple(job["overrides"])}) for job in content]


def lies_below(folder: str) -> bool:
    """Whether a relative path stays below where it starts."""
    return bool(folder) and not os.path.isabs(folder) and ".." not in Path(folder).parts


def _is_job(content: Any) -> bool:
    if not isinstance(content, dict) or {*content} - {field.name for field in fields(Job)}:
        return False
    number, overrides, slurm_id = (content.get(key) for key in ("number", "overrides", "slurm_id"))
    return (
        type(number) is int
        and 0 <= number < MOST
        and isinstance(overrides, list)
        and all(isinstance(text, str) and text.isprintable() for text in (content.get("name"), *overrides))
        and isinstance(content.get("folder"), str)
        and content["folder"].isprintable()
        and lies_below(content["folder"])
        and (slurm_id is None or isinstance(slurm_id, str))
    )


@dataclass(frozen=True)
class Progress:
    """How far a job is.

    Attributes:
        job: which one.
        state: waiting, running, finished, failed, preempted, or lost: it says that it runs, and its process is gone;
            unreadable where a file of its folder is damaged.
        reason: why it failed, or ended early.
        epoch: epochs that are done.
        epochs: epochs that it was to train for; None where it has none.
        monitor: the value that chooses its checkpoint, None without one.
        best: the least of it so far.
        folder: of its run.
    """

    job: Job
    state: str
    reason: str
    epoch: int
    epochs: int | None
    monitor: str | None
    best: float | None
    folder: Path


def sweep_status(sweep_dir: Path) -> list[Progress]:
    """What has become of the jobs of a sweep, in order. Asks SLURM for those of its jobs that have not ended.

    Raises:
        UserError: the folder is no sweep's.
    """
    jobs = read_jobs(sweep_dir)

    def status(job: Job) -> dict[str, Any]:
        return seen_status(sweep_dir / job.folder)

    # One that has failed may have been submitted again.
    asked = [job.slurm_id for job in jobs if job.slurm_id and status(job).get("state") != "finished"]
    states = job_states(asked) if asked else None
    # Read once more: a job may have ended between.
    return [
        _progress(job, sweep_dir / job.folder, status(job), states if job.slurm_id in asked else None) for job in jobs
    ]


def _progress(job: Job, folder: Path, status: dict[str, Any], slurm: dict[str, str] | None) -> Progress:
    """A job's progress; ``slurm`` has the states there, and is None where they do not matter or are not known."""
    try:
        return _read_progress(job, folder, status, slurm)
    except UserError as error:  # which is no reason to show nothing of the others
        return Progress(job, UNREADABLE, str(error), 0, None, None, None, folder)


def _read_progress(job: Job, folder: Path, status: dict[str, Any], slurm: dict[str, str] | None) -> Progress:
    """The same. Raises UserError where a file of the job's is damaged."""
    state, reason = str(status.get("state", "waiting")), ""
    if state != "finished" and slurm is not None:
        said = slurm.get(str(job.slurm_id), "COMPLETED")  # what it has forgotten has ended
        if said in OVER:
            if said != "COMPLETED" and state != "failed":
                state, reason = "failed", f"SLURM ended it: {said}"
            state = "failed" if state == "failed" else "lost"
        elif said == "RUNNING" or (said == "COMPLETING" and state != "failed"):
            state = "running"
        elif said != "COMPLETING" and state != "preempted":  # queued for the first time, or again
            state = "waiting"
    elif state == "running" and not is_alive(status):
        state = "lost"
    conf = _config(folder)
    monitor = conf.get("monitor")
    epochs = conf.get("trainer", {}).get("max_epochs")
    epochs = epochs if isinstance(epochs, int) else None  # what Hydra has not resolved yet
    rows = read_metrics(folder / METRICS)
    if not status and has_begun(folder):
        raise UserError(
            f"{folder}: found no status.json beside what was learned there; resume the run, which writes it"
        )
    check_metrics(folder, status)
    done = max((int(row["epoch"]) + 1 for row in rows if row.get("epoch")), default=0)
    return Progress(
        job,
        state,
        reason or _why(state, status),
        done,
        None if is_estimator(conf.get("model", {})) else epochs,
        monitor,
        _least(rows, monitor),
        folder,
    )


def _why(state: str, status: dict[str, Any]) -> str:
    if state in ("waiting", "running"):
        return ""  # what the status says of it is an earlier start's
    return str(status.get("reason") or status.get("stopped") or (LOST if state == "lost" else ""))


def objective(run_dir: Path) -> float | None:
    """The least value of a run's ``monitor`` in its ``metrics.csv``; None where there is none."""
    return _least(read_metrics(run_dir / METRICS), _config(run_dir).get("monitor"))


def _least(rows: Sequence[dict[str, str]], monitor: str | None) -> float | None:
    values = [float(row[monitor]) for row in rows if row.get(monitor)] if monitor else []
    return min((value for value in values if math.isfinite(value)), default=None)


def _config(run_dir: Path) -> dict[str, Any]:
    """The run's config, resolved once its data were found; ``{}`` where it has not begun."""
    if (path := find_config(run_dir)) is None:
        return {}
    conf = read_yaml(path, expected=EXPECTED, remedy=REMEDY)
    try:
        whole = isinstance(conf["model"], dict) and isinstance(conf["monitor"], str | None)
        whole = whole and isinstance(conf["trainer"]["max_epochs"], int | str | None)
    except (KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise UserError(f"{path}: found no model, monitor and trainer in it, expected {EXPECTED}; {REMEDY}")
    return conf


def own_overrides(jobs: Sequence[Job]) -> dict[int, list[str]]:
    """What each job was started with that not all of them were, by its number."""
    common = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set[str]()
    return {job.number: [override for override in job.overrides if override not in common] for job in jobs}


def show(sweep_dir: Path, jobs: Sequence[Progress]) -> None:
    """Prints a table of the jobs; of their overrides those that not all of them have."""
    from rich.console import Console
    from rich.table import Table

    own = own_overrides([row.job for row in jobs])
    table = Table()
    for column in ("job", "name", "state", "epoch", "best", "folder", "overrides"):
        table.add_column(column, justify="right" if column == "job" else "left", overflow="fold")
    for row in jobs:
        epoch = f"{row.epoch}/{row.epochs}" if row.epochs and row.epoch <= row.epochs else str(row.epoch)
        best = DASH if row.best is None else f"{row.best:.4g} ({row.monitor})"
        progress = (row.state, epoch if row.epochs else DASH, best)
        table.add_row(str(row.job.number), row.job.name, *progress, row.job.folder, " ".join(own[row.job.number]))
    print(f"sweep {sweep_dir}")
    console = Console(markup=False, highlight=False)
    (console if console.is_terminal else Console(width=160, markup=False, highlight=False)).print(table)


def advise(sweep_dir: Path, jobs: Sequence[Progress]) -> None:
    """Prints what there is to do with a sweep; nothing where it has finished, or runs without SLURM."""
    if any(row.state in ("waiting", "running", "preempted") and row.job.slurm_id for row in jobs):
        print(f"look at the jobs with: mrgen-evaluate {shlex.quote(f'sweep={sweep_dir}')}")
    elif any(row.state != "finished" for row in jobs) and not any(row.state == "running" for row in jobs):
        print(f"go on with: mrgen-train {shlex.quote(f'resume={sweep_dir}')}")


def view(sweep_dir: Path) -> None:
    """Prints how far the jobs of a sweep are, why some of them ended as they did, and how to go on."""
    jobs = sweep_status(sweep_dir)
    show(sweep_dir, jobs)
    for row in jobs:
        if row.reason:
            print(f"{row.job.folder}: {row.reason}")
    advise(sweep_dir, jobs)
