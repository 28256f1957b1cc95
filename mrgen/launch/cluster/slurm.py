"""What SLURM says of its jobs, and what a process inside of one does: it trains, and asks to be queued again.

Nothing heavy is imported here: a job must be able to answer a signal from its first moments on.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mrgen.errors import UserError

__all__ = [
    "OVER",
    "SIGNALS",
    "ask",
    "cluster_environment",
    "job_states",
    "queue_states",
    "requeue",
    "run_rank",
    "step_tasks",
]

# USR2 is what the launcher asks SLURM for, before the time is over and at a preemption; sites that send no signal of
# the job's own at a preemption send TERM; USR1 is Lightning's convention.
SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
# States of jobs that will not run again; all others wait, run or are about to do either.
OVER = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT"),
}

# How often a job may be queued again, in the environment of the launcher's jobs. A batch script of the user's own would
# start from its first line, and is not queued again by us.
MAX_REQUEUES = "MRGEN_MAX_REQUEUES"


def ask(*command: str) -> str | None:
    """What a command of SLURM answers; None where it is not there, fails, or says nothing for a minute."""
    # Defaults of the user's own would leave partitions and jobs out.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SINFO_", "SQUEUE_"))}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def job_states(ids: Collection[str]) -> dict[str, str] | None:
    """The states of jobs by SLURM's names, by squeue: sacct answers only where a site keeps accounts.

    Args:
        ids: as SLURM writes them, ``12`` or ``12_0`` in an array.

    Returns:
        ``RUNNING``, ``CANCELLED``, … by id, of jobs that SLURM remembers, which it does for some minutes after their
        end; None where squeue does not answer.
    """
    answer = ask("squeue", "--me", "--array", "--noheader", "--states=all", "--format=%i %T")
    if answer is None:
        return None
    states = dict(line.split() for line in answer.splitlines() if len(line.split()) == 2)
    return {job: states[job] for job in ids if job in states}


def queue_states(ids: Collection[str]) -> dict[str, str] | None:
    """The same of those jobs that are not over: ``PENDING``, ``RUNNING``, ``COMPLETING`` and the like."""
    states = job_states(ids) if ids else {}
    return None if states is None else {job: state for job, state in states.items() if state not in OVER}


def step_tasks() -> int:
    """How many processes ``srun`` started beside this one, itself included; 1 in a shell and outside of SLURM."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))  # SLURM_NTASKS speaks of the job, which may be a shell's


def cluster_environment() -> list[Any]:
    """What Lightning must be told inside of a job of SLURM: which processes are ranks, and that requeueing is ours.

    Left to itself it takes the job's name for a sign of an interactive shell, takes every task for a rank otherwise,
    and saves inside of the signal's handler, which hangs where several processes train.

    Returns:
        A plugin for ``pytorch_lightning.Trainer``; none outside of SLURM and under torchrun.

    Raises:
        UserError: SLURM was not told how many of several tasks a node has.
    """
    if "SLURM_JOB_ID" not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        return []
    from pytorch_lightning.plugins.environments import LightningEnvironment, SLURMEnvironment

    if step_tasks() == 1:
        return [LightningEnvironment()]
    if "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise UserError(f"SLURM started {step_tasks()} tasks; say how many a node has with --ntasks-per-node")
    return [SLURMEnvironment(auto_requeue=False)]


def run_rank(run_dir: str, max_requeues: int) -> None:
    """One task of a job of the launcher: trains the folder's saved config in this process, and goes on where it can.

    Until training has handlers of its own, and after it, a signal ends the process: rank 0 asks for the job to be
    queued again, and the next start finds what was saved, or that nothing is left to do.

    Args:
        run_dir: folder of the run.
        max_requeues: how often the job may be started again.
    """
    os.environ[MAX_REQUEUES] = str(max_requeues)
    for number in SIGNALS:
        signal.signal(number, _leave)
    # They were held back from the interpreter's start on (see submission.HELD_BACK), and come now.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    # Where SLURM does not bind tasks to processors each would start a thread for every one of the node.
    os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))

    from mrgen.launch.ranks import rank_arguments
    from mrgen.launch.sweeps.resuming import quoted
    from mrgen.train import main

    folder = Path(run_dir)
    sys.argv = ["mrgen-train", *rank_arguments(folder), f"resume={quoted(folder)}"]
    main()


def _leave(number: int, frame: Any) -> None:
    if os.environ.get("SLURM_PROCID", "0") != "0":
        return  # rank 0, which has got the signal as well, decides: it leaves or saves, and needs this rank for that
    again = requeue()
    print(
        f"{signal.Signals(number).name}: " + ("queued again" if again else "this process ends"),
        file=sys.stderr,
        flush=True,
    )
    os._exit(128 + number)  # never 0: SLURM would call the job COMPLETED


def requeue() -> bool:
    """Asks SLURM to start this process's job again once it has ended; it may end it at once.

    Returns:
        Whether it will: not where the job was not submitted by the launcher, has been started again
        ``launch.max_requeues`` times, or is ending anyway, because somebody cancelled it, or SLURM queues it again
        itself.
    """
    environment = os.environ
    if "SLURM_JOB_ID" not in environment:
        return False
    if int(environment.get("SLURM_RESTART_COUNT", 0)) >= int(environment.get(MAX_REQUEUES, 0)):
        return False
    # Of an array by both numbers: the job's own may be the whole array's.
    array = environment.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{environment['SLURM_ARRAY_TASK_ID']}" if array else environment["SLURM_JOB_ID"]
    # A cancelled job that is queued again comes back.
    state = re.search(r"JobState=(\w+)", ask("scontrol", "--oneliner", "show", "job", job) or "")
    if state is None or state[1] != "RUNNING":
        return False
    return ask("scontrol", "requeue", job) is not None
