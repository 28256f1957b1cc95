"""What a process does while it runs a sweep: lists the jobs, lets none of them end the others, and sums up."""

import functools
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from mrgen.errors import UserError
from mrgen.launch import app
from mrgen.launch.ranks import record_failure
from mrgen.launch.resuming import MULTIRUN, as_written
from mrgen.launch.sweeps import SWEEP, Job, read_jobs, show, sweep_status, write_jobs

__all__ = ["JobList", "check_objective", "kept", "table_at_the_end"]


@dataclass
class _Sweep:
    """The one that this process runs."""

    folder: Path | None = None
    failed: dict[str, str] = field(default_factory=dict)  # folder of a job: why


_sweep = _Sweep()


class JobList(Callback):
    """Hydra's callback that writes ``sweep.json``: the basic sweeper's jobs at once, others as they start."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Composes every job, so that one with a wrong name is refused before the first trains."""
        if OmegaConf.select(config, "plan"):
            return
        try:
            jobs = _listed(config) if _is_basic(config.hydra) else []
            folder = Path(config.hydra.sweep.dir).absolute()
        except Exception as error:  # Hydra would warn and go on
            if (said := app.sentence(error)) is None:
                raise
            app.fail(said)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, folder / MULTIRUN)  # only the basic sweeper does
        _add(folder, jobs)
        _sweep.folder = folder

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Adds a job that was drawn just now."""
        if config.hydra.mode == RunMode.MULTIRUN and not config.plan:
            sweep_dir = Path(config.hydra.sweep.dir).absolute()
            folder = os.path.relpath(config.hydra.runtime.output_dir, sweep_dir)
            job = _job(config, config.hydra.job.num, as_written(config.hydra.overrides.task), folder)
            # Launchers may start jobs at the same time, in processes that would write the file at the same time.
            if job not in [replace(known, slurm_id=None) for known in read_jobs(sweep_dir)]:
                _add(sweep_dir, [job])


def _add(sweep_dir: Path, jobs: Sequence[Job]) -> None:
    """To the list, with the numbers that SLURM gave them when they were last submitted."""
    ids = {job.number: job.slurm_id for job in read_jobs(sweep_dir)} if (sweep_dir / SWEEP).is_file() else {}
    write_jobs(sweep_dir, [replace(job, slurm_id=ids.get(job.number)) for job in jobs])


def _runs_here(sweep_dir: Path, number: int) -> None:
    """Whatever SLURM once knew of it."""
    own = [job for job in read_jobs(sweep_dir) if job.number == number and job.slurm_id is not None]
    if own:
        write_jobs(sweep_dir, [replace(job, slurm_id=None) for job in own])


def _job(config: DictConfig, number: int, overrides: Sequence[str], folder: str) -> Job:
    return Job(number, str(config.name), tuple(o for o in overrides if not o.startswith("resume=")), folder)


def _is_basic(hydra: Any) -> bool:
    return str(hydra.sweeper._target_).endswith(".BasicSweeper")


def _listed(config: DictConfig) -> list[Job]:
    """The jobs of Hydra's basic sweeper."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    loader = GlobalHydra.instance().config_loader()
    swept = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    overrides = OverridesParser.create(loader).parse_overrides([*swept, *as_written(config.hydra.overrides.task)])
    jobs = []
    for number, own in enumerate(BasicSweeper.split_arguments(overrides, None)[0]):
        composed = loader.load_sweep_config(config, own)
        with open_dict(composed):
            composed.hydra.job.num = number
        jobs.append(_job(composed, number, own, str(composed.hydra.sweep.subdir)))
    return jobs


def kept(task: Callable[[DictConfig], float | None]) -> Callable[[DictConfig], float | None]:
    """A task whose failure, in a sweep, is told, written down and not the next job's.

    Environment variables that a job sets end with it.
    """

    @functools.wraps(task)
    def job(conf: DictConfig) -> float | None:
        hydra = HydraConfig.get()
        if hydra.mode != RunMode.MULTIRUN:
            return task(conf)
        environment = dict(os.environ)
        try:
            if not conf.plan:
                _runs_here(Path(hydra.sweep.dir), hydra.job.num)
            value = task(conf)
            if value is None and not conf.plan and not _is_basic(hydra):
                raise UserError(
                    f"{conf.monitor} has no finite value in metrics.csv, and the sweeper needs one; give the run "
                    "validation subjects (data.split.val), or another monitor"
                )
            return value
        except Exception as error:
            said = app.sentence(error)
            run_dir = Path(hydra.runtime.output_dir)
            if said is None:
                traceback.print_exception(error)
            reason = f"{type(error).__name__}: {error}"
            print(f"job {hydra.job.num} ({conf.name}) failed: {said or reason}", file=sys.stderr, flush=True)
            if not isinstance(error, app.Reported):  # which was recorded then
                record_failure(run_dir, reason)
            _sweep.failed[run_dir.name] = said or reason
            if _is_basic(hydra):
                return None  # it would raise the failure once all jobs of a batch are done, and start no other batch
            raise app.Reported(said or reason) from error  # others must know that a trial failed
        finally:
            for name in os.environ.keys() - environment.keys():
                del os.environ[name]
            os.environ.update(environment)

    return job


def check_objective(conf: DictConfig) -> None:
    """Raises UserError for a preset that is a sweep, started as one run, and for a sweeper without its ``monitor``."""
    hydra = HydraConfig.get()
    if hydra.mode == RunMode.RUN and (swept := hydra.sweeper.get("params")):
        preset, keys = f"experiment={hydra.runtime.choices.get('experiment')}", ", ".join(map(str, swept))
        raise UserError(f"{preset} is a sweep over {keys}; start it with -m: mrgen-train -m {preset}")
    if hydra.mode == RunMode.MULTIRUN and not _is_basic(hydra) and conf.monitor is None:
        raise UserError(f"{conf.name} has no monitor, and the sweeper needs a value to make small: monitor=val/loss")


@contextmanager
def table_at_the_end() -> Iterator[None]:
    """Around a sweep: at its end a table of its jobs, and exit code 1 where some of them failed."""
    _sweep.folder, _sweep.failed = None, {}
    ended: BaseException | None = None
    try:
        yield
    except BaseException as error:
        ended = error
    failed = dict(_sweep.failed)
    if (folder := _sweep.folder) is not None:
        rows = sweep_status(folder)
        begun = bool(failed) or any(row.state != "waiting" or row.job.slurm_id for row in rows)
        if begun:
            show(folder, rows)
        failed = {r.job.folder: r.reason for r in rows if r.state in ("failed", "lost")} | failed
        if failed and all(row.job.folder in failed for row in rows) and not isinstance(ended, SystemExit):
            ended = None  # a sweeper that found nothing to choose from
        if any(row.state in ("waiting", "running", "preempted") and row.job.slurm_id for row in rows):
            print(f"look at the jobs with: mrgen-evaluate {shlex.quote(f'sweep={folder}')}")
        elif begun and any(row.state != "finished" for row in rows):
            print(f"go on with: mrgen-train {shlex.quote(f'resume={folder}')}")
        sys.stdout.flush()
    if failed:
        jobs = "\n".join(f"  {name}: {reason}" for name, reason in failed.items())
        number = f"{len(failed)} of {len(rows)}" if folder is not None else str(len(failed))
        print(f"error: {number} jobs of the sweep failed:\n{jobs}", file=sys.stderr)
    if ended is not None:
        raise ended
    if failed:
        sys.exit(1)
