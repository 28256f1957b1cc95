"""One command in a process of its own: watched, limited, and killed where a case asks for it.

The process is forked from one that has imported everything and computed nothing: a command costs its work alone.
"""

import atexit
import importlib
import os
import resource
import signal
import sys
import time
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.faults.watching import watch

__all__ = ["NOTHING", "Ended", "Started", "preload", "run", "start"]

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 60.0  # seconds; the slowest command takes a twentieth
MEMORY = 3 << 30  # bytes of addresses beyond those of the parent


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: exit code; that of a signal is negative, as of ``subprocess``.
        out, err: what it printed.
        hung: it was killed because its time was over.
        seconds: it took.
        forbidden: what it did that no command may do, see ``watching``.
    """

    code: int
    out: str
    err: str
    hung: bool
    seconds: float
    forbidden: tuple[str, ...]

    @property
    def said(self) -> str:
        return self.out + self.err


NOTHING = Ended(0, "", "", False, 0.0, ())  # before a command has run


def preload() -> None:
    """Imports what the commands import, once for all of them. Nothing may be computed: a thread would not survive."""
    sys.dont_write_bytecode = True
    for name in (
        *("mrgen.prepare", "mrgen.train", "mrgen.evaluate", "mrgen.synthesize", "SimpleITK", "monai", "torchio"),
        *("mrgen.launch.preparing", "mrgen.launch.training", "mrgen.launch.synthesis.synthesizing"),
        *("mrgen.launch.judging.evaluating", "mrgen.launch.judging.sampling", "mrgen.launch.sweeps.jobs"),
        *("rich.progress", "rich.table", "matplotlib.figure", "nibabel", "nilearn", "torchmetrics", "scipy.ndimage"),
    ):
        importlib.import_module(name)


@dataclass
class Started:
    """A command that runs."""

    pid: int
    folder: Path
    began: float

    def tell(self, number: int, *, group: bool = True) -> None:
        """Sends a signal, to its children as well as a terminal and a batch system do."""
        with suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, number)

    def wait(self, limit: float = LIMIT) -> Ended:
        """Its end, which comes when its time is over at the latest."""
        hung, status = False, None
        while status is None:
            pid, found = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                status = found
            elif time.monotonic() - self.began > limit:
                hung = True
                self.tell(signal.SIGKILL)
                status = os.waitpid(self.pid, 0)[1]
            else:
                time.sleep(0.004)
        seconds = time.monotonic() - self.began
        self.tell(signal.SIGKILL)  # children that it left behind
        out, err, seen = (
            (self.folder / name).read_text(errors="replace") if (self.folder / name).is_file() else ""
            for name in ("out", "err", "forbidden")
        )
        code = os.waitstatus_to_exitcode(status)
        return Ended(code, out, err, hung, seconds, tuple(dict.fromkeys(seen.splitlines())))


def run(script: str, arguments: Sequence[str], here: Path, *, limit: float = LIMIT, **settings: object) -> Ended:
    """``start`` and ``wait``."""
    return start(script, arguments, here, **settings).wait(limit)  # type: ignore[arg-type]


def start(
    script: str,
    arguments: Sequence[str],
    here: Path,
    *,
    environment: Mapping[str, str] | None = None,
    file_size: int | None = None,
    second: bool = False,
) -> Started:
    """Starts ``mrgen-<script> arguments``.

    Args:
        script: prepare, train, synthesize or evaluate.
        arguments: of the command line.
        here: its working folder; it may write below this folder's parent and nowhere else.
        environment: further variables.
        file_size: bytes that a file may have; beyond them a write fails as on a full disk.
        second: whether another one runs in the folder at the same time.
    """
    notes = here.parent / ("notes of the second" if second else "notes")
    notes.mkdir(exist_ok=True)
    for path in notes.iterdir():
        path.unlink()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Started(pid, notes, time.monotonic())
    code = 1
    try:
        _enter(here, notes, environment or {}, file_size)
        watch(here.parent, notes / "forbidden")
        sys.argv = [f"mrgen-{script}", *arguments]
        code = _called(importlib.import_module(f"mrgen.{script}").main)
    finally:
        os._exit(code)


def _enter(here: Path, notes: Path, environment: Mapping[str, str], file_size: int | None) -> None:
    os.setsid()
    for name, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(notes / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115 (until the process ends)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.modules["__main__"] = types.ModuleType("__main__")  # or spawned workers would import the harness
    temporary = here.parent / "tmp"
    temporary.mkdir(exist_ok=True)
    os.chdir(here)
    os.environ.pop("HYDRA_FULL_ERROR", None)
    os.environ.update({"TMPDIR": str(temporary), "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"})
    os.environ.update({"PYTHONPATH": str(ROOT), **environment})  # of processes that the command starts
    import tempfile

    tempfile.tempdir = None
    addresses = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (addresses + MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if file_size is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does at its start
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.RLIM_INFINITY))


def _called(main: Callable[[], None]) -> int:
    """What the interpreter does around a script."""
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 130
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        code = code or 1
    return code & 0xFF
