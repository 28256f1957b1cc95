"""What a run says of itself: ``status.json`` in its folder, running, finished, or failed with the reason."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["read_status", "recorded", "write_json"]


def write_json(path: Path, content: Any) -> None:
    """Writes a whole file or none."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)


def read_status(run_dir: Path) -> dict[str, Any]:
    """The run's status; ``{}`` where there is none."""
    path = run_dir / "status.json"
    return json.loads(path.read_text()) if path.is_file() else {}


@contextmanager
def recorded(run_dir: Path, *, command: str, enabled: bool = True) -> Iterator[None]:
    """Keeps the status file true while a run is under way, and ends every failure with the line that resumes it.

    A run that was killed still says ``running``, with the process that it was.

    Args:
        run_dir: the run's folder.
        command: console script that resumes the run.
        enabled: False on every rank but the first.
    """
    status: dict[str, Any] = {
        "state": "running",
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }

    def save(**change: Any) -> None:
        status.update(change)
        if enabled:
            write_json(run_dir / "status.json", status)

    save()
    try:
        yield
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt) or (
            isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt)  # Lightning's Ctrl-C
        )
        reason = "interrupted" if interrupted else f"{type(error).__name__}: {error}".strip().rstrip(":")
        save(state="failed", reason=reason, ended=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
        if enabled:
            _say_how_to_go_on(run_dir, command)
        if isinstance(error, SystemExit) and not error.code:  # Lightning's answer to SIGTERM would end with code 0
            raise SystemExit(143) from error
        raise
    save(state="finished", ended=time.strftime("%Y-%m-%dT%H:%M:%S%z"))


def _say_how_to_go_on(run_dir: Path, command: str) -> None:
    # Registered to run last: the error's own message or traceback is printed after the exception has left this frame.
    import atexit
    import shlex
    import sys

    line = f"resume with: {command} {shlex.quote(f'resume={run_dir}')}"
    if not (run_dir / "checkpoints" / "last.ckpt").is_file():
        line += "  (no checkpoint yet: it starts over)"
    atexit.register(lambda: print(line, file=sys.stderr, flush=True))
