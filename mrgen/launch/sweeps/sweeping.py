"""What a process does while it runs a sweep: lists the jobs, lets none of them end the others, and sums up."""

import functools
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from mrgen.errors import UserError
from mrgen.launch import app
from mrgen.launch.build import check_data, trust
from mrgen.launch.instantiate import plain
from mrgen.launch.ranks import is_rank, record_failure
from mrgen.launch.status import UNREADABLE, has_begun, runs_here, seen_status
from mrgen.launch.sweeps.jobs import (
    SWEEP,
    Job,
    advise,
    lies_below,
    own_overrides,
    read_jobs,
    show,
    sweep_status,
    write_jobs,
)
from mrgen.launch.sweeps.resuming import MULTIRUN, as_written, refuse_links, settled

__all__ = ["JobList", "NoLinks", "check_objective", "kept", "table_at_the_end"]


@dataclass
class _Sweep:
    """The one that this process runs."""

    folder: Path | None = None
    failed: dict[str, str] = field(default_factory=dict)  # folder of a job: why


_sweep = _Sweep()


class JobList(Callback):
    """Hydra's callback that refuses folders in which something else lies, before Hydra writes there.

    Of a sweep it writes ``sweep.json``: the basic sweeper's jobs at once, others as they start.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Makes the run's folder, or says why not."""
        if config.plan or config.resume or is_rank():
            return
        with _refused():
            HydraConfig.instance().set_config(config)  # the folder's name may need it
            folder = Path(config.hydra.run.dir).absolute()
            if has_begun(folder):
                raise UserError(
                    f"{folder} holds a finished or interrupted run; give another folder, or go on with resume={folder}"
                )
            folder.mkdir(parents=True, exist_ok=True)
            for name in (".hydra", "checkpoints", "estimator", "images"):
                refuse_links(folder / name)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Composes every job, so that one with a wrong name is refused before the first trains."""
        if OmegaConf.select(config, "plan"):
            return
        with _refused():
            _check_search(config)
            jobs = _listed(config) if _is_basic(config.hydra) else []
            folder = Path(config.hydra.sweep.dir).absolute()
            _check_folder(config, folder)
            folder.mkdir(parents=True, exist_ok=True)
            refuse_links(folder.resolve())
            OmegaConf.save(config, folder / MULTIRUN)  # only the basic sweeper does
            _add(folder, jobs)
        _sweep.folder = folder
        print(f"sweep {folder}" + (f": {len(jobs)} jobs" if jobs else ""), flush=True)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Of a plan nothing is left, unless its user has named the folder."""
        if config.plan and app.TOKEN in (folder := Path(config.hydra.sweep.dir)).name:
            shutil.rmtree(folder, ignore_errors=True)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Adds a job that was drawn just now, and completes its config."""
        if config.hydra.mode == RunMode.MULTIRUN and not config.plan:
            own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
            if config.resume:  # of which the folder said what is trained
                with _refused():
                    check_data(plain(own), Path(config.hydra.sweep.dir, MULTIRUN))
            sweep_dir = Path(config.hydra.sweep.dir).absolute()
            folder = os.path.relpath(config.hydra.runtime.output_dir, sweep_dir)
            with _refused():
                job = _job(config, config.hydra.job.num, as_written(config.hydra.overrides.task), folder)
            # Launchers may start jobs at the same time, in processes that would write the file at the same time.
            if job not in [replace(known, slurm_id=None) for known in read_jobs(sweep_dir)]:
                _add(sweep_dir, [job])
            if hidden := config.hydra.output_subdir:  # from where other processes start the job
                OmegaConf.save(settled(own), Path(config.hydra.runtime.output_dir, hidden, "config.yaml"))


class NoLinks(Callback):
    """Hydra's callback that keeps Hydra from writing its configs through links, in a folder that somebody else made."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Ends the process where such a link is."""
        if config.hydra.output_subdir is not None:
            with _refused():
                HydraConfig.instance().set_config(config)
                for name in (config.hydra.output_subdir, "blind", "key"):
                    refuse_links(Path(config.hydra.run.dir).absolute() / name)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """The same of a sweep."""
        with _refused():
            refuse_links(Path(config.hydra.sweep.dir).absolute() / MULTIRUN)


@contextmanager
def _refused() -> Iterator[None]:
    """Ends the process where its user can mend what is wrong; Hydra would warn of a callback, and go on."""
    try:
        yield
    except Exception as error:
        said = app.sentence(error)
        if said is None and isinstance(error, OSError):
            place, reason = error.filename or "the folder", error.strerror or error
            said = f"{place}: {reason}; set MRGEN_RUNS or hydra.run.dir to where a folder can be made"
        if said is None:
            raise
        app.fail(said)


def _check_search(config: DictConfig) -> None:
    """Raises UserError for a sweeper that has nothing to choose from, or nothing to choose by."""
    sweeper = config.hydra.sweeper
    if _is_basic(config.hydra):
        return
    parse = OverridesParser.create().parse_overrides
    ranges = any(override.is_sweep_override() for override in parse(as_written(config.hydra.overrides.task)))
    if not (ranges or sweeper.get("params") or sweeper.get("search_space")):
        raise UserError(
            "the sweeper has nothing to search; give ranges such as 'model.lr=tag(log,interval(1e-4,1e-2))', or a "
            "preset that has some, experiment=rsnet/search"
        )
    if config.monitor is None:
        raise UserError(f"{config.name} has no monitor, and the sweeper needs a value to make small: monitor=val/loss")


def _check_folder(config: DictConfig, folder: Path) -> None:
    """Raises UserError where another sweep has begun, whose jobs this one would take for its own, or replace."""
    if not (folder / SWEEP).is_file():
        return
    jobs = [(job, seen_status(folder / job.folder)) for job in read_jobs(folder)]
    if OmegaConf.is_interpolation(config, "resume"):
        if live := [job.folder for job, status in jobs if not job.slurm_id and runs_here(status)]:
            raise UserError(f"{folder}: {', '.join(live)} still runs; wait for the sweep's end, or end it first")
    elif any(job.slurm_id or status for job, status in jobs):
        raise UserError(f"{folder} holds a sweep; give another folder, or go on with resume={folder}")


def _add(sweep_dir: Path, jobs: Sequence[Job]) -> None:
    """To the list, with the numbers that SLURM gave them when they were last submitted."""
    ids = {job.number: job.slurm_id for job in read_jobs(sweep_dir)} if (sweep_dir / SWEEP).is_file() else {}
    write_jobs(sweep_dir, [replace(job, slurm_id=ids.get(job.number)) for job in jobs])


def _taken_from_slurm(sweep_dir: Path, number: int) -> None:
    """Whatever SLURM once knew of it."""
    own = [job for job in read_jobs(sweep_dir) if job.number == number and job.slurm_id is not None]
    if own:
        write_jobs(sweep_dir, [replace(job, slurm_id=None) for job in own])


def _job(config: DictConfig, number: int, overrides: Sequence[str], folder: str) -> Job:
    if not lies_below(folder):
        raise UserError(f"name={config.name}: the job's folder would be {folder}, which is not the sweep's; change it")
    return Job(number, str(config.name), tuple(o for o in overrides if not o.startswith("resume=")), folder)


def _is_basic(hydra: Any) -> bool:
    return str(hydra.sweeper._target_).endswith(".BasicSweeper")


def _listed(config: DictConfig) -> list[Job]:
    """The jobs of Hydra's basic sweeper."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra

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
        trust(conf.trust)
        environment = dict(os.environ)
        run_dir = Path(hydra.runtime.output_dir)
        try:
            if conf.resume:  # whatever Hydra made of what the folder says
                check_data(plain(conf), run_dir)
            if not conf.plan:
                _taken_from_slurm(Path(hydra.sweep.dir), hydra.job.num)
                own = own_overrides(read_jobs(Path(hydra.sweep.dir))).get(hydra.job.num, [])
                print(" ".join([f"job {hydra.job.num} ({conf.name}):", *own]), flush=True)
            value = task(conf)
            if value is None and not conf.plan and not _is_basic(hydra):
                raise UserError(
                    f"{conf.monitor} has no finite value in metrics.csv, and the sweeper needs one; give the run "
                    "validation subjects (data.split.val), or another monitor"
                )
            return value
        except Exception as error:
            said = app.sentence(error)
            if said is None:
                traceback.print_exception(error)
            reason = f"{type(error).__name__}: {error}"
            print(f"job {hydra.job.num} ({conf.name}) failed: {said or reason}", file=sys.stderr, flush=True)
            if not isinstance(error, app.Reported) and not conf.plan:  # which was recorded then
                record_failure(run_dir, reason)
            _sweep.failed[os.path.relpath(run_dir, hydra.sweep.dir)] = said or reason
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
    launcher = str(hydra.runtime.choices.get("hydra/launcher"))
    if hydra.mode == RunMode.RUN and launcher != "basic":
        raise UserError(f"hydra/launcher={launcher} starts the jobs of a sweep; add -m")
    if conf.launch.detach and launcher != "slurm" and not (conf.resume and hydra.mode == RunMode.RUN) and not is_rank():
        raise UserError("launch.detach=true leaves jobs to SLURM; add -m hydra/launcher=slurm")
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
        failed = {r.job.folder: r.reason for r in rows if r.state in ("failed", "lost", UNREADABLE)} | failed
        if failed and all(row.job.folder in failed for row in rows) and not isinstance(ended, SystemExit):
            ended = None  # a sweeper that found nothing to choose from
        if begun:
            advise(folder, rows)
        sys.stdout.flush()
    if failed:
        jobs = "\n".join(f"  {name}: {reason}" for name, reason in failed.items())
        number = f"{len(failed)} of {len(rows)}" if folder is not None else str(len(failed))
        print(f"error: {number} jobs of the sweep failed:\n{jobs}", file=sys.stderr)
    if ended is not None:
        raise ended
    if failed:
        sys.exit(1)
