"""Disks that are full: every write beyond a limit fails, then there is room again and the command is run once more."""

import os
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.faults.damaging import copy_parts
from tests.faults.killing import JOBS, finish, timed
from tests.faults.outcome import Outcome, tree
from tests.faults.process import Ended, run

__all__ = ["attempts"]

FILES = (2_000, 6_000, 40_000, 250_000)  # bytes that one file may have, that of the messages too
DISKS = ("40k", "200k", "700k")  # that a whole disk has
LEFT_OUT = ("prepare, two workers",)


def attempts(world: Path, *, thorough: bool) -> list[tuple[str, str, Callable[[Path], tuple[str, Outcome]]]]:
    """Every command on disks of several sizes; not thorough: on one, in turn of either kind."""
    found = []
    mounts = os.geteuid() == 0 and _can_mount(world.parent)
    for number, name in enumerate(name for name in JOBS if name not in LEFT_OUT):
        files, disks = FILES, DISKS if mounts else ()
        if not thorough:
            files, disks = (FILES[1:2], ()) if number % 2 or not mounts else ((), DISKS[1:2])
        found += [(name, f"files of {size} bytes", partial(_limited, name, size, world)) for size in files]
        found += [(name, f"disk of {size}", partial(_on_disk, name, size, world)) for size in disks]
    return found


def _can_mount(folder: Path) -> bool:
    place = folder / "mount"
    place.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], capture_output=True).returncode:
        return False
    subprocess.run(["umount", place], check=True)
    return True


def _limited(name: str, size: int, world: Path, scratch: Path) -> tuple[str, Outcome]:
    job = JOBS[name]
    expected = timed(name, world)[2]
    here = copy_parts(world, job.door, scratch)
    before = tree(here)
    ended = run(job.door.script, job.door.arguments, here, file_size=size)
    return "files end there", _refused(ended) or finish(job, here, before, expected)


def _on_disk(name: str, size: str, world: Path, scratch: Path) -> tuple[str, Outcome]:
    job = JOBS[name]
    expected = timed(name, world)[2]
    here = copy_parts(world, job.door, scratch)
    output = here / job.output
    held = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    output.mkdir(parents=True, exist_ok=True)
    before = tree(here)
    room = sum(map(len, held.values())) // 1000 + 8 * len(held) + int(size[:-1])
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}k", "tmpfs", output], check=True)
    try:
        for path, content in held.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        ended = run(job.door.script, job.door.arguments, here)
        if bad := _refused(ended):
            return "no room", bad
        subprocess.run(["mount", "-o", "remount,size=100m", output], check=True)
        return "no room", finish(job, here, before, expected)
    finally:
        subprocess.run(["umount", "-l", output], check=True)


def _refused(ended: Ended) -> Outcome | None:
    """What is wrong with a command's answer to a full disk; None where it had room, or said so in a sentence."""
    said = " ".join(ended.said.split())[-300:]
    if ended.hung:
        return Outcome("hang", said)
    if ended.forbidden:
        return Outcome("executed", ended.forbidden[0])
    if "Traceback" in ended.said or ended.code < 0:
        return Outcome("traceback", said)
    if ended.code == 0:
        return None
    room = any(word in ended.said for word in ("room", "space", "written", "too large", "full"))
    return None if room and ended.said.count("error: ") <= 1 else Outcome("unclear", said)
