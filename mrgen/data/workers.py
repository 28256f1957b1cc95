"""Work on many items in processes of their own, where the death of one costs the item that it worked on."""

import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

__all__ = ["in_processes"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_processes(
    items: Iterable[Item], task: Callable[[Item], Result], workers: int
) -> Iterator[tuple[Item, Result | None]]:
    """Each item with what ``task`` makes of it, as they are done, or None where the process was killed or crashed.

    A worker that dies takes the whole pool with it: those in work are tried again, each in a process of its own, and
    the others go on in a new pool.

    Args:
        items: sent to the processes, like ``task``.
        task: whatever it raises ends the work, once the other items in work are finished.
        workers: processes, 1 or more.
    """
    waiting = deque(items)
    while waiting:
        for suspect in (yield from _until_one_dies(waiting, task, workers)):
            if (yield from _until_one_dies(deque([suspect]), task, 1)):
                yield suspect, None


def _until_one_dies(
    waiting: deque[Item], task: Callable[[Item], Result], workers: int
) -> Generator[tuple[Item, Result | None], None, list[Item]]:
    """Takes items from ``waiting``, no more at once than there are workers, and returns those in work at a death."""
    running: dict[Future[Result], Item] = {}
    # spawn: a fork of a process with threads (rich's, torch's) may hang
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_ignore_interrupts) as pool:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    running[pool.submit(task, waiting[0])] = waiting[0]
                    waiting.popleft()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    result = future.result()
                    yield running.pop(future), result
        except BrokenProcessPool:
            pass
        finally:
            pool.shutdown(wait=True, cancel_futures=True)  # what runs is finished, what waits is dropped
    return list(running.values())


def _ignore_interrupts() -> None:
    # Ctrl-C reaches the whole process group; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
