"""From a sweep to SLURM's queue: a folder and a config for each job, and an array of those that need the same."""

import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.types import HydraContext
from omegaconf import DictConfig, open_dict

from mrgen.errors import UserError
from mrgen.launch.app import Reported
from mrgen.launch.cluster.resources import Resources, check_partition, checked_settings, derive, partitions, whole
from mrgen.launch.cluster.slurm import ask, queue_states, run_rank
from mrgen.launch.cluster.waiting import LOGS, conclude, how_to_cancel, wait
from mrgen.launch.status import seen_status
from mrgen.launch.sweeps.jobs import Job, objective, read_jobs, write_jobs

__all__ = ["launch"]

# A signal that comes before a process can answer it would end it. It is held back from here until run_rank is reached:
# a mask is kept where a program replaces itself by another.
HELD_BACK = (
    "import os, signal, sys; "
    "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM}); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)
# Of the environment, by sbatch, to options of a batch script that has them; conf/hydra/launcher/slurm.yaml reads some.
PREFERRED = {
    *("SBATCH_ACCOUNT", "SBATCH_ARRAY_INX", "SBATCH_CONSTRAINT", "SBATCH_ERROR", "SBATCH_GPUS", "SBATCH_GPUS_PER_NODE"),
    *("SBATCH_GPUS_PER_TASK", "SBATCH_JOB_NAME", "SBATCH_MEM_PER_CPU", "SBATCH_MEM_PER_GPU", "SBATCH_MEM_PER_NODE"),
    *("SBATCH_NO_REQUEUE", "SBATCH_OPEN_MODE", "SBATCH_OUTPUT", "SBATCH_PARTITION", "SBATCH_QOS", "SBATCH_SIGNAL"),
    *("SBATCH_TIMELIMIT", "SBATCH_WAIT"),
}


def launch(
    settings: Mapping[str, Any],
    config: DictConfig,
    hydra_context: HydraContext,
    job_overrides: Sequence[Sequence[str]],
    *,
    first: int,
) -> list[JobReturn]:
    """Submits a sweep's jobs, and waits for them unless ``launch.detach`` is set.

    Jobs that SLURM still has from an earlier call for the same folder are waited for and not submitted again.

    Args:
        settings: keys of ``conf/hydra/launcher/slurm.yaml``.
        config: of the sweep.
        hydra_context: composes the jobs' configs.
        job_overrides: one list a job.
        first: number of the first of them in the sweep.

    Returns:
        One a job: with its objective, or with None where it failed, or nobody waited.

    Raises:
        UserError: a job cannot be run there, or asks for what contradicts itself; nothing has been submitted.
    """
    setup_globals()
    settings = checked_settings(settings)
    jobs = [_compose(config, hydra_context, overrides, number) for number, overrides in enumerate(job_overrides, first)]
    detach = any(conf.launch.detach for conf in jobs)
    _check(settings, config, jobs, detach=detach)
    resources = [derive(conf, settings) for conf in jobs]
    if (known := partitions()) is not None:
        asked = {"partition": settings["partition"] or "", "gpu_type": settings["gpu_type"]}
        for needed in dict.fromkeys(resources):
            check_partition(needed, known, minutes=settings["timeout_min"], **asked)

    sweep_dir = Path(config.hydra.sweep.dir).absolute()
    returns = [_make_folder(conf, hydra_context) for conf in jobs]
    entries = _not_over(sweep_dir, range(first, first + len(jobs)))
    before = [seen_status(sweep_dir / entry.folder) for entry in entries]
    new = [
        place
        for place, (entry, result) in enumerate(zip(entries, returns, strict=True))
        if entry.slurm_id is None and not _is_finished(result, before[place], sweep_dir / entry.folder)
    ]
    ids = _submit(
        [str(sweep_dir / entries[place].folder) for place in new],
        [resources[place] for place in new],
        [jobs[place].launch.max_requeues for place in new],
        settings,
        sweep_dir,
    )
    for place, slurm_id in zip(new, ids, strict=True):
        entries[place] = replace(entries[place], slurm_id=slurm_id)
    write_jobs(sweep_dir, entries)
    if queued := [entry for entry in entries if entry.slurm_id]:
        print(f"{len(new)} jobs submitted to SLURM; cancel them with: {how_to_cancel(queued)}", flush=True)
    if not detach:
        ended = wait(queued)
        for result, entry, old in zip(returns, entries, before, strict=True):
            _conclude(result, entry, sweep_dir, old, ended)
    return returns


def _not_over(sweep_dir: Path, numbers: Iterable[int]) -> list[Job]:
    """The jobs of these numbers, with the ids of those that SLURM still has: two of one folder would not get along.

    Raises:
        UserError: it cannot be known.
    """
    known = {job.number: job for job in read_jobs(sweep_dir)}
    jobs = [known[number] for number in numbers]
    if (states := queue_states([job.slurm_id for job in jobs if job.slurm_id])) is None:
        raise UserError(
            f"{sweep_dir} holds jobs that were submitted before, and squeue does not answer whether they still run; "
            "try again once it does"
        )
    return [replace(job, slurm_id=job.slurm_id if job.slurm_id in states else None) for job in jobs]


def _is_finished(result: JobReturn, status: Mapping[str, Any], run_dir: Path) -> bool:
    if status.get("state") != "finished" or result.cfg is None:
        return False
    from mrgen.launch.going_on import is_finished  # imports torch

    return is_finished(result.cfg, run_dir)


def _conclude(
    result: JobReturn, entry: Job, sweep_dir: Path, before: Mapping[str, Any], ended: Mapping[str, str]
) -> None:
    """Puts a job's end into what Hydra's sweeper is given."""
    assert result.hydra_cfg is not None
    job = entry.slurm_id
    reason = conclude(entry, sweep_dir, before, ended.get(job, "forgotten")) if job else None
    if reason is not None:
        print(f"job {entry.number} ({entry.name}) failed: {reason}", file=sys.stderr, flush=True)
    run_dir = sweep_dir / entry.folder
    result.return_value = None if reason else objective(run_dir)
    # The basic sweeper asks for no value, and its table of the jobs tells of failures, but for that of a run which has
    # finished, and was to go on for more epochs.
    told = reason is None or seen_status(run_dir).get("state") == "failed"
    if result.return_value is None and not (told and _is_basic(result.hydra_cfg)):
        result.status, result.return_value = JobStatus.FAILED, Reported(reason or "no value")


def _is_basic(config: DictConfig) -> bool:
    return str(config.hydra.sweeper._target_).endswith(".BasicSweeper")


def _compose(config: DictConfig, hydra_context: HydraContext, overrides: Sequence[str], number: int) -> DictConfig:
    conf = hydra_context.config_loader.load_sweep_config(config, list(overrides))
    with open_dict(conf):
        conf.hydra.job.id = conf.hydra.job.num = number
    return conf


def _check(settings: Mapping[str, Any], config: DictConfig, jobs: Sequence[DictConfig], *, detach: bool) -> None:
    """Raises UserError for what no cluster could do."""
    if config.hydra.job.name != "mrgen-train" or any("evaluation" in conf for conf in jobs):
        raise UserError("hydra/launcher=slurm submits trainings; leave it out, and -m runs the jobs one after another")
    for conf in jobs:
        whole("launch.max_requeues", conf.launch.max_requeues, 0)
    if any(conf.plan for conf in jobs):
        raise UserError("plan=true shows at once what a run costs; leave hydra/launcher=slurm out")
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise UserError(
            "hydra/launcher=slurm: found no sbatch and srun on the PATH; submit where they are, on a login node of the "
            "cluster, or use hydra/launcher=local"
        )
    if not _is_basic(config) and any(conf.monitor is None for conf in jobs):
        raise UserError("the sweeper needs a value to make small: set monitor=val/loss")
    if detach and not _is_basic(config):
        sweeper = config.hydra.sweeper._target_.rpartition(".")[2]
        raise UserError(
            f"launch.detach=true: {sweeper} chooses jobs by the results of earlier ones and has to "
            "wait for them; leave launch.detach out, and keep the command running, in tmux, say"
        )


def _make_folder(conf: DictConfig, hydra_context: HydraContext) -> JobReturn:
    """The job's folder with its config, as Hydra makes them; it trains nothing yet."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(conf)
    try:
        return run_job(
            task_function=lambda _: None,
            config=conf,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
            hydra_context=hydra_context,
            configure_logging=False,
        )
    finally:
        HydraConfig.instance().cfg = before


def _submit(
    folders: Sequence[str],
    resources: Sequence[Resources],
    max_requeues: Sequence[int],
    settings: Mapping[str, Any],
    sweep_dir: Path,
) -> list[str]:
    """Puts jobs into the queue, those that need the same into one array.

    Returns:
        Their ids, in the order of ``folders``.
    """
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    python = shlex.join([sys.executable, "-I", "-S", "-c", HELD_BACK])
    ids: dict[int, str] = {}
    with _outside_of_jobs():
        for needed in dict.fromkeys(resources):
            places = [place for place, its in enumerate(resources) if its == needed]
            # Not a folder for each job: it would be made when the job, which writes its log there, may have begun.
            executor = SlurmExecutor(sweep_dir / LOGS, python=python)
            executor.update_parameters(**_parameters(needed, settings))
            try:
                jobs = executor.map_array(run_rank, [folders[p] for p in places], [max_requeues[p] for p in places])
            except BaseException as error:
                if ids:  # all or nothing: nobody would know of them
                    ask("scancel", *ids.values())
                if isinstance(error, FailedJobError | FailedSubmissionError):
                    raise UserError(f"sbatch refused the job: {str(error).strip()}") from error
                raise
            ids |= {place: job.job_id for place, job in zip(places, jobs, strict=True)}
    return [ids[place] for place in range(len(folders))]


def _parameters(needed: Resources, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of submitit's executor, whose names are sbatch's."""
    gpus = {"gpus_per_node": f"{t}:{needed.gpus_per_node}" if (t := settings["gpu_type"]) else needed.gpus_per_node}
    asked = {key: settings[key] for key in ("partition", "account", "qos", "constraint") if settings[key]}
    # Sites may have switched requeueing off for jobs that do not ask for it.
    more = {"requeue": True, **settings["additional_parameters"]}
    return {
        "job_name": settings["name"],
        "time": settings["timeout_min"],
        "nodes": needed.nodes,
        "ntasks_per_node": needed.tasks_per_node,
        "cpus_per_task": needed.cpus_per_task,
        **({"mem": f"{round(1024 * needed.mem_gb)}MB"} if needed.mem_gb else {}),
        **(gpus if needed.gpus_per_node else {}),
        **asked,
        "signal_delay_s": settings["signal_delay_s"],
        "array_parallelism": settings["array_parallelism"],
        "setup": settings["setup"] or None,
        "additional_parameters": {key: value for key, value in more.items() if value not in (None, False)},
        "stderr_to_stdout": True,
        # Since SLURM 22.05 srun does not take the number from sbatch. And a rank that ends alone would leave the others
        # waiting for it until the time is over.
        "srun_args": [f"--cpus-per-task={needed.cpus_per_task}", "--kill-on-bad-exit=1"],
    }


@contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Hides the job that this process is in, an interactive one, say: sbatch hands the environment on to new jobs.

    And variables that sbatch would prefer to what the batch script says.
    """
    hidden = ("SLURM_", "SLURMD_", "SRUN_", "MASTER_", "WORLD_SIZE", "LOCAL_RANK", "RANK")
    kept = {n: v for n, v in os.environ.items() if (n.startswith(hidden) and n != "SLURM_CONF") or n in PREFERRED}
    for name in kept:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(kept)
