"""What a run says of itself: ``status.json`` in its folder, running, finished, preempted, or failed with the reason."""

import hashlib
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from mrgen.errors import Preempted, UserError
from mrgen.files import read_bytes, read_json, write_json
from mrgen.launch.memory import out_of_memory

__all__ = [
    "Outcome",
    "check_metrics",
    "has_begun",
    "is_alive",
    "read_status",
    "recorded",
    "runs_here",
    "seen_status",
]

STATES = ("running", "finished", "preempted", "failed")
METRICS = "metrics.csv"
UNREADABLE = "unreadable"
KINDS = {"metrics": str, "pid": int, "host": str, "started": str, "ended": str, "reason": str, "stopped": str}
LEARNED = ("checkpoints/last.ckpt", "checkpoints/resume.ckpt", "estimator/estimator.json")


def read_status(run_dir: Path) -> dict[str, Any]:
    """The run's status; ``{}`` where there is none.

    Raises:
        UserError: it is damaged.
    """
    path = run_dir / "status.json"
    if not os.path.lexists(path):
        return {}
    expected = "what the run says of itself"
    remedy = "remove the file, and resume the run: its checkpoints are what it goes on from"
    status = read_json(path, expected=expected, remedy=remedy)
    if not isinstance(status, dict):
        found: str | None = f"a {type(status).__name__}"
    elif status.get("state") not in STATES:
        found = f"the state {str(status.get('state', 'none'))[:60]!r}"
    else:
        wrong = [key for key, kind in KINDS.items() if key in status and not isinstance(status[key], kind)]
        found = f"{wrong[0]}: {str(status[wrong[0]])[:60]!r}" if wrong else None
    if found is not None:
        raise UserError(f"{path}: found {found}, expected {expected}; {remedy}")
    return status


def seen_status(run_dir: Path) -> dict[str, Any]:
    """The same for who looks at many runs: a damaged one is in the state ``unreadable``, and has the reason."""
    try:
        return read_status(run_dir)
    except UserError as error:
        return {"state": UNREADABLE, "reason": str(error)}


def has_begun(run_dir: Path) -> bool:
    """Whether the folder holds anything that was learned."""
    return any((run_dir / part).is_file() for part in LEARNED)


def runs_here(status: Mapping[str, Any]) -> bool:
    """Whether a process of this machine trains the run; False of another machine's, which cannot be asked."""
    return status.get("state") == "running" and status.get("host") == socket.gethostname() and is_alive(status)


def is_alive(status: Mapping[str, Any]) -> bool:
    """Whether the process that a status names runs, as far as this machine can tell; True of another machine's."""
    pid = status.get("pid")
    if status.get("host") != socket.gethostname() or not isinstance(pid, int):
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    with suppress(OSError, ValueError, KeyError, IndexError):  # elsewhere than on Linux the number alone must do
        # Behind the command's name, which may hold anything: field 22 of proc(5), its start in ticks since the boot.
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime ")).split()
        began = int(boot[1]) + ticks / os.sysconf("SC_CLK_TCK")
        # A process that is younger than the run got the number of one that has ended.
        return began < datetime.fromisoformat(status["started"]).timestamp() + 5
    return True


@dataclass
class Outcome:
    """What a run tells of itself while it is recorded.

    Attributes:
        begun: whether it has begun to train; what is refused before leaves an earlier status as it was.
        stopped: why it ended before its last epoch, where it finished nevertheless.
    """

    begun: bool = False
    stopped: str | None = None


@contextmanager
def recorded(run_dir: Path, *, command: str, enabled: bool = True) -> Iterator[Outcome]:
    """Keeps the status file true while a run is under way, and ends every failure with the line that resumes it.

    A run that was killed still says ``running``, with the process that it was.

    Args:
        run_dir: the run's folder.
        command: console script that resumes the run.
        enabled: False on every rank but the first.

    Yields:
        To be filled.
    """
    earlier = read_status(run_dir)
    status: dict[str, Any] = {
        "state": "running",
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
    outcome = Outcome()

    def save(**change: Any) -> None:
        status.update(change)
        if enabled:
            write_json(run_dir / "status.json", status)

    save()
    try:
        yield outcome
    except BaseException as error:
        with suppress(UserError, OSError):  # the disk is full, which may be what the run failed for
            if earlier and isinstance(error, UserError) and not outcome.begun:
                status = earlier
                save()
            else:
                save(**_ending(error), ended=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
        if enabled:
            _say_how_to_go_on(run_dir, command)
        if isinstance(error, SystemExit) and not error.code:  # Lightning's answer to SIGTERM would end with code 0
            raise SystemExit(143) from error
        raise
    stopped = {"stopped": outcome.stopped} if outcome.stopped else {}
    save(state="finished", ended=time.strftime("%Y-%m-%dT%H:%M:%S%z"), metrics=digest_of_metrics(run_dir), **stopped)


def digest_of_metrics(run_dir: Path) -> str:
    """SHA-256 of ``metrics.csv``, which a finished run keeps in its status; of nothing where there is none."""
    path = run_dir / METRICS
    if not os.path.lexists(path):
        return hashlib.sha256(b"").hexdigest()
    remedy = "put back a copy that is whole, or remove status.json: then the rows that are there count"
    return hashlib.sha256(read_bytes(path, expected="a run's metrics", remedy=remedy)).hexdigest()


def check_metrics(run_dir: Path, status: Mapping[str, Any]) -> None:
    """Raises UserError where the ``metrics.csv`` of a run that has finished is not as the run left it."""
    if status.get("state") == "finished" and status.get("metrics", digest := digest_of_metrics(run_dir)) != digest:
        raise UserError(
            f"{run_dir / METRICS}: found other rows than when the run finished (status.json has their checksum); put "
            "back a copy that is whole, or remove status.json: then the rows that are there count"
        )


def _ending(error: BaseException) -> dict[str, str]:
    """State and reason of a run that did not finish."""
    if isinstance(error, Preempted):
        return {"state": "preempted", "reason": error.reason}
    interrupted = isinstance(error, KeyboardInterrupt) or (
        isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt)  # Lightning's Ctrl-C
    )
    reason = "interrupted" if interrupted else f"{type(error).__name__}: {error}".strip().rstrip(":")
    if not isinstance(error, UserError) and (said := out_of_memory(error)):
        reason = f"{type(error).__name__}: {said}"
    return {"state": "failed", "reason": reason}


def _say_how_to_go_on(run_dir: Path, command: str) -> None:
    # Registered to run last: the error's own message or traceback is printed after the exception has left this frame.
    import atexit
    import shlex
    import sys

    if (run_dir.parent / "sweep.json").is_file():  # whose table says how to go on with all
        return
    line = f"resume with: {command} {shlex.quote(f'resume={run_dir}')}"
    if not any((run_dir / "checkpoints" / f"{name}.ckpt").is_file() for name in ("resume", "last")):
        line += "  (no checkpoint yet: it starts over)"
    # Where nothing had begun the folder may be gone by then.
    atexit.register(lambda: run_dir.is_dir() and print(line, file=sys.stderr, flush=True))
