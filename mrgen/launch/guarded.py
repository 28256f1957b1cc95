"""A logger whose end the training survives: a service that dies, hangs or has no disk costs its own record alone."""

import queue
import threading
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

__all__ = ["Guarded", "within"]

ANSWER = 30.0  # seconds that a call may take

T = TypeVar("T")


def within(seconds: float, call: Callable[[], T]) -> T:
    """What ``call`` returns or raises.

    Raises:
        TimeoutError: it takes longer; it is left to itself in a thread that ends with the process.
    """
    answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def answer() -> None:
        try:
            answers.put((call(), None))
        except BaseException as error:  # W&B has ended processes by SystemExit
            answers.put((None, error))

    threading.Thread(target=answer, daemon=True).start()
    try:
        value, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer in {seconds:g} seconds") from None
    if isinstance(error, Exception):
        raise error
    if error is not None:
        raise RuntimeError(f"it asked the process to end ({type(error).__name__}: {error})") from error
    return value


class Guarded(Logger):
    """Another logger that, once a call of it fails or takes too long, is not called again; it says so, and that once.

    Args:
        logger: to be guarded.
        title: of the service, for the message.
        release: lets go of a service that failed, so that the next run of the process gets a new one.

    Attributes:
        alive: whether it has not failed.
    """

    def __init__(self, logger: Logger, title: str, release: Callable[[], object] | None = None):
        super().__init__()
        self.logger, self.title, self.alive = logger, title, True
        self._release = release

    @property
    def name(self) -> str | None:
        return self.logger.name

    @property
    def version(self) -> int | str | None:
        return self.logger.version

    @property
    def save_dir(self) -> str | None:
        return self.logger.save_dir

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.attempt(partial(self.logger.log_metrics, dict(metrics), step))

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        self.attempt(partial(self.logger.log_hyperparams, params, *args, **kwargs))

    @rank_zero_only
    def log_picture(self, key: str, path: Path, step: int | None = None) -> None:
        """Shows a PNG file."""
        self.attempt(partial(self.logger.log_image, key, [str(path)], step))  # type: ignore[attr-defined]

    @rank_zero_only
    def log_table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Shows a table."""
        show = partial(self.logger.log_table, key, columns=list(columns))  # type: ignore[attr-defined]
        self.attempt(partial(show, data=[list(row) for row in rows]))

    @rank_zero_only
    def save(self) -> None:
        self.attempt(self.logger.save)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.attempt(partial(self.logger.finalize, status))

    def attempt(self, call: Callable[[], object], seconds: float | None = None) -> None:
        """Makes a call, unless one has failed before."""
        if not self.alive:
            return
        try:
            within(ANSWER if seconds is None else seconds, call)
        except Exception as error:
            self.alive = False
            reason = f"{type(error).__name__}: {error}".strip().rstrip(":")
            print(f"{self.title} failed ({reason}); the run goes on without it, metrics.csv has everything", flush=True)
            if self._release is not None:
                self._release()
