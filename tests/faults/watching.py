"""What a command must never do, whatever the files say that it reads: seen by Python's audit events.

It may start Python and git, write below its own folder, and nothing else of the kinds that are looked at here.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["CANARY", "watch"]

CANARY = "canary"  # a name in every hostile payload: whoever opens, makes or runs it has executed one
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Places of paths among the arguments of an event, and of their folders' descriptors.
CHANGES = {
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.rename": ((0, 2), (1, 3)),
    "os.truncate": ((0, None),),
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
    "os.link": ((0, 2), (1, 3)),
    "os.symlink": ((1, 2),),
    "shutil.rmtree": ((0, 1),),
    "shutil.move": ((0, None), (1, None)),
    "shutil.copyfile": ((1, None),),
}
ALWAYS = {
    *("os.system", "os.exec", "os.symlink", "pickle.find_class", "socket.connect"),
    *("ftplib.connect", "urllib.Request"),
}
PROGRAMS = {"git", "uname", "lscpu", "nvidia-smi", "ldconfig", "gcc", "scontrol", "squeue", "sacct"}
DEVICES = ("/dev/null", "/dev/tty", "/dev/shm/", "/proc/self/")


def watch(folder: Path, notes: Path) -> None:
    """Notes what the process does that it must not, until it ends.

    Args:
        folder: below which it may write.
        notes: a file that gets one line for each such thing.
    """
    allowed = (os.path.realpath(folder) + os.sep, *DEVICES)
    handle = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    inside = False

    def note(text: str) -> None:
        os.write(handle, (text.replace("\n", " ")[:300] + "\n").encode(errors="replace"))

    def beyond(path: Any, descriptor: Any = None, *, follow: bool = True) -> bool:
        if isinstance(path, int):
            return False
        name = os.fsdecode(path)
        if isinstance(descriptor, int) and descriptor >= 0:
            name = os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), name)
        if follow:
            real = os.path.realpath(name)
        else:
            real = os.path.join(os.path.realpath(os.path.dirname(os.path.abspath(name))), os.path.basename(name))
        return not real.startswith(allowed) and real + os.sep not in allowed

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal inside
        if inside or (event not in CHANGES and event not in ALWAYS and event not in ("open", "subprocess.Popen")):
            return
        inside = True
        try:
            _look(event, arguments, beyond, note)
        finally:
            inside = False

    sys.addaudithook(look)


def _look(event: str, arguments: tuple[Any, ...], beyond: Callable[..., bool], note: Callable[[str], None]) -> None:
    if event == "open":
        path, _, flags = arguments
        writes = isinstance(flags, int) and flags & WRITING and path is not None
        if writes and beyond(path, follow=not flags & (os.O_NOFOLLOW | os.O_EXCL)):
            note(f"wrote to {path!r}")
        return
    if event == "subprocess.Popen":
        program = os.path.basename(os.fsdecode(arguments[0] or arguments[1][0]))
        if (program not in PROGRAMS and not program.startswith("python")) or CANARY in str(arguments[1]):
            note(f"started {arguments[1]}")
        return
    if event == "pickle.find_class":
        if not _own_pickle():
            note(f"unpickled {arguments[0]}.{arguments[1]}")
        return
    if event in ALWAYS and not (event == "socket.connect" and isinstance(arguments[1], str | bytes)):
        note(f"{event} {arguments!r}")
        return
    for place, folder in CHANGES.get(event, ()):
        if beyond(arguments[place], arguments[folder] if folder is not None else None, follow=False):
            note(f"{event} {arguments[place]!r}")


def _own_pickle() -> bool:
    """Whether a pickle comes from one of our own processes and not from a file."""
    frame = sys._getframe(2)
    while frame is not None:
        if "multiprocessing" in frame.f_code.co_filename or "copy.py" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False
