"""Orders that are functions of (seed, epoch, index), so that a resumed run repeats an uninterrupted one."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

__all__ = ["EvaluationSampler", "Key", "TrainingSampler"]

Key = tuple[int, int, int]  # (epoch, index within the epoch, subject): what seeds a sample's crop and augmentation


class TrainingSampler(Sampler[Key]):
    """Epochs of a fixed number of samples, drawn from an endless sequence of shuffled passes over the subjects.

    Every subject is seen once before any is seen twice, across epoch borders and across ranks.

    Args:
        subjects: how many there are.
        samples: samples of one epoch on one rank.
        seed: of the shuffling.
        rank: this process.
        world_size: number of processes; each takes every world_size-th sample of the common order.
    """

    def __init__(self, subjects: int, *, samples: int, seed: int, rank: int = 0, world_size: int = 1):
        self.subjects, self.samples, self.seed = subjects, samples, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of every epoch, after a resume too."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.samples

    def __iter__(self) -> Iterator[Key]:
        first = self.epoch * self.samples * self.world_size
        shuffled, current = None, -1
        for i in range(self.rank, self.samples * self.world_size, self.world_size):
            pass_number, position = divmod(first + i, self.subjects)
            if pass_number != current:
                shuffled = np.random.default_rng([self.seed, pass_number]).permutation(self.subjects)
                current = pass_number
            assert shuffled is not None
            yield self.epoch, i, int(shuffled[position])


class EvaluationSampler(Sampler[Key]):
    """Every subject once, over all ranks together: no padding, so that distributed metrics count nobody twice."""

    def __init__(self, subjects: int, *, rank: int = 0, world_size: int = 1):
        self.mine = range(rank, subjects, world_size)

    def __len__(self) -> int:
        return len(self.mine)

    def __iter__(self) -> Iterator[Key]:
        return ((0, i, i) for i in self.mine)
