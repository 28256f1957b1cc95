"""Waiting for jobs of SLURM, and what became of each: by its own status file, and by SLURM where it left no word."""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mrgen.files import write_json
from mrgen.launch.cluster.slurm import OVER, job_states
from mrgen.launch.status import seen_status
from mrgen.launch.sweeps.jobs import Job

__all__ = ["LOGS", "conclude", "how_to_cancel", "wait"]

LOGS = ".submitit"  # submitit's folder in the sweep's, with a log for each task: 12_0_1_log.out
POLL = 30.0  # longest time between two questions to SLURM, in seconds
ENDS = ("finished", "failed", "preempted")
SYNC = 30.0  # seconds after which a file that another machine wrote is seen here


def how_to_cancel(entries: Sequence[Job]) -> str:
    """The command; an array is cancelled as a whole by its own number."""
    return " ".join(["scancel", *dict.fromkeys(str(entry.slurm_id).partition("_")[0] for entry in entries)])


def wait(entries: Sequence[Job]) -> dict[str, str]:
    """Until SLURM has none of the jobs any more; says how many wait and run whenever that changes.

    Returns:
        In which state each ended, by its id, as far as SLURM said: some minutes later it has forgotten.
    """
    ids = [str(entry.slurm_id) for entry in entries]
    ended: dict[str, str] = {}
    said, pause = "", 1.0
    try:
        while ids:
            states = job_states(ids)
            live = {job: state for job, state in (states or {}).items() if state not in OVER}
            ended |= {job: state for job, state in (states or {}).items() if state in OVER}
            waiting = sum(state == "PENDING" for state in live.values())
            line = f"{waiting} waiting, {len(live) - waiting} running, {len(ids) - len(live)} ended"
            if states is None:
                line = "squeue does not answer; it is asked again until it does"
            if line != said:
                print(f"SLURM: {line}", flush=True)
                said, pause = line, 1.0
            if states is not None and not live:
                break
            time.sleep(pause)
            pause = min(1.05 * pause, POLL)
    except KeyboardInterrupt:
        print(f"\nthe jobs go on without this command; cancel them with: {how_to_cancel(entries)}", file=sys.stderr)
        raise
    return ended


def conclude(entry: Job, sweep_dir: Path, before: Mapping[str, Any], ended: str) -> str | None:
    """How a job that SLURM has no longer ended; its status says so too, where the run could not write it itself.

    Args:
        entry: the job.
        sweep_dir: folder of its sweep.
        before: the run's status when the job was submitted.
        ended: its last state by SLURM.

    Returns:
        Why it failed; None where it finished.
    """
    run_dir, job = sweep_dir / entry.folder, str(entry.slurm_id)
    status, deadline = seen_status(run_dir), time.monotonic() + SYNC
    while ended == "COMPLETED" and status.get("state") not in ENDS and time.monotonic() < deadline:
        time.sleep(1)
        status = seen_status(run_dir)
    # Else it is what an earlier job left.
    state = status.get("state") if status != before or ended == "COMPLETED" else None
    if state == "finished":
        return None
    if state == "failed":
        return str(status["reason"])
    log, lines = _last_lines(sweep_dir / LOGS, job)
    if state == "preempted":
        reason = f"saved, and not started again: SLURM's job {job} is {ended}"
    else:
        reason = f"ended without a word: SLURM's job {job} is {ended}, its log is {log}"
    if status.get("state") != "finished":  # which it has, for fewer epochs
        ending = {"state": "failed", "reason": reason, "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        write_json(run_dir / "status.json", {**status, **ending})
    return "\n".join([reason, *(f"  | {line}" for line in lines)])


def _last_lines(folder: Path, job: str, number: int = 5) -> tuple[Path, list[str]]:
    """The log that tells most, of the first task where none speaks of an error, and its last lines."""
    texts = {log: log.read_text(errors="replace") for log in sorted(folder.glob(f"{job}_*_log.out"))}
    if not texts:
        return folder, []
    log = next((log for log, text in texts.items() if "error" in text.lower()), next(iter(texts)))
    return log, texts[log].strip().splitlines()[-number:]
