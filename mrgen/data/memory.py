"""How much memory is left to this process."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["free_memory"]


def free_memory() -> int | None:
    """Bytes that may be taken before the machine, or this process's container, runs short; None where nobody knows."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    return max(0, min([free, *_free_in_groups()]))


def _free_in_groups() -> Iterator[int]:
    """What this process's control groups leave it: a container or a SLURM job may be allowed less than the machine."""
    root = Path("/sys/fs/cgroup")
    try:
        line = next(text for text in Path("/proc/self/cgroup").read_text().splitlines() if text.startswith("0::"))
    except (OSError, StopIteration):
        return
    own = root / line.removeprefix("0::").lstrip("/")
    for group in (own, *own.parents):
        if root not in (group, *group.parents):
            return
        with suppress(OSError, KeyError, ValueError):  # none there, or "max"
            allowed = int((group / "memory.max").read_text())
            taken = dict(row.split() for row in (group / "memory.stat").read_text().splitlines())["anon"]
            yield allowed - int(taken)
