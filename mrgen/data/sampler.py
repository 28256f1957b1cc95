"""Orders that are functions of (seed, epoch, index), so that a resumed run repeats an uninterrupted one."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

__all__ = ["EvaluationSampler", "Key", "TrainingSampler", "Turn"]

Key = tuple[int, int, int]  # (epoch, index within the epoch, subject): what seeds a sample's crop and augmentation


class Turn(NamedTuple):
    """A part of the subjects that has so many samples of a training to itself."""

    subjects: range
    samples: int


class TrainingSampler(Sampler[Key]):
    """Epochs of a fixed number of samples, drawn from an endless sequence of shuffled passes over the subjects.

    Every subject is seen once before any is seen twice, across epoch borders and across ranks. Where there are turns,
    one after the other, this holds of each; the last goes on for as long as the training does.

    Args:
        subjects: how many there are, or whose turn comes after whose.
        samples: samples of one epoch on one rank.
        seed: of the shuffling.
        rank: this process.
        world_size: number of processes; each takes every world_size-th sample of the common order.

    Attributes:
        start: samples that the next iteration leaves out: those of an epoch that a resumed run has seen. The one after
            it is whole again.
    """

    def __init__(self, subjects: int | Sequence[Turn], *, samples: int, seed: int, rank: int = 0, world_size: int = 1):
        self.turns = [Turn(range(subjects), 0)] if isinstance(subjects, int) else list(subjects)
        self.samples, self.seed = samples, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of every epoch, after a resume too."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.samples

    def __iter__(self) -> Iterator[Key]:
        start, self.start = self.start, 0
        first = self.epoch * self.samples * self.world_size
        mine = range(self.rank, self.samples * self.world_size, self.world_size)
        for i in mine[start:]:
            yield self.epoch, i, self._subject(first + i)

    def _subject(self, position: int) -> int:
        """The subject at a position in the whole training."""
        turn, *others = self.turns
        for following in others:
            if position < turn.samples:
                break
            position, turn = position - turn.samples, following
        pass_number, place = divmod(position, len(turn.subjects))
        return turn.subjects[int(_shuffled(self.seed, pass_number, len(turn.subjects))[place])]


@lru_cache(maxsize=16)
def _shuffled(seed: int, pass_number: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, pass_number]).permutation(count)


class EvaluationSampler(Sampler[Key]):
    """Every subject once, over all ranks together: no padding, so that distributed metrics count nobody twice."""

    def __init__(self, subjects: int, *, rank: int = 0, world_size: int = 1):
        self.mine = range(rank, subjects, world_size)

    def __len__(self) -> int:
        return len(self.mine)

    def __iter__(self) -> Iterator[Key]:
        return ((0, i, i) for i in self.mine)
