"""A loader that goes on in the middle of an epoch."""

import signal
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

__all__ = ["ResumableLoader", "ignore_signals"]


def ignore_signals(worker: int) -> None:
    """For the start of a loader process: what tells a run to end is for the process that trains.

    SLURM sends it to all of them, and a run whose loaders die of it fails before it has saved. They end with the
    process that trains, whatever its end.
    """
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class ResumableLoader(DataLoader):
    """Batches of a ``TrainingSampler``; its length is that of whole epochs.

    Lightning keeps its state in every checkpoint, and restores it from one that was saved in the middle of an epoch.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._begin = 0  # batches of the next epoch that are left out
        self._shown = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._shown, self._begin = self._begin, 0
        return self._batches()

    def _batches(self) -> Iterator[Any]:
        # A generator: workers fetch ahead, and Lightning makes the first iterator before it tells the sampler's epoch.
        self.sampler.start = self._shown * self.batch_size  # type: ignore[attr-defined, operator]
        for batch in super().__iter__():
            self._shown += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """``batches`` of the epoch that have been shown."""
        return {"batches": self._shown}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begins the next iteration behind them."""
        self._begin = state["batches"]
