"""Which part of a subject's volume a sample shows: the whole brain, or a random patch of it."""

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from mrgen.data.store import StoredSubject
from mrgen.errors import UserError

__all__ = ["BrainBox", "Crop", "RandomPatch", "centred_box"]

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]  # (start, stop) of x, y, z; may exceed the volume


class Crop(Protocol):
    """Chooses boxes, all of one ``size``, every axis a multiple of ``divisor``."""

    size: tuple[int, ...] | None
    divisor: int

    def __call__(self, subject: StoredSubject, rng: np.random.Generator) -> Box: ...


def _checked_size(size: Sequence[int], divisor: int) -> tuple[int, ...]:
    if len(size) != 3 or any(n <= 0 or n % divisor for n in size):
        raise UserError(
            f"data.sampling.size is {list(size)}; expected three multiples of {divisor} (data.sampling.divisor)"
        )
    return tuple(int(n) for n in size)


def centred_box(brain_box: Sequence[Sequence[int]], size: Sequence[int]) -> Box:
    """A box of `size` voxels around the middle of a brain's box, ends exclusive."""
    starts = [(lo + hi - n) // 2 for (lo, hi), n in zip(brain_box, size, strict=True)]
    return tuple((start, start + n) for start, n in zip(starts, size, strict=True))  # type: ignore[return-value]


class BrainBox:
    """The whole brain in a box of one size for the whole cohort, centred on each subject's brain.

    Args:
        size: voxels along x, y, z; None takes the smallest box that holds every brain. RS-Net's at 1 mm is
            184 × 200 × 152.
        divisor: every axis is rounded up to a multiple of this; a U-Net of n levels needs 2^(n − 1).
    """

    def __init__(self, size: Sequence[int] | None = None, divisor: int = 8):
        self.size = None if size is None else _checked_size(size, divisor)
        self.divisor = divisor

    def fit(self, subjects: Iterable[StoredSubject]) -> None:
        """Finds the size where none was given. Raises UserError where a brain does not fit into the given one."""
        largest = np.zeros(3, int)
        for subject in subjects:
            extent = np.array([stop - start for start, stop in subject.brain_box])
            if self.size is not None and (extent > self.size).any():
                raise UserError(
                    f"{subject.id}: the brain spans {tuple(extent.tolist())} voxels and data.sampling.size is "
                    f"{self.size}, which would cut it; enlarge it, or set data.sampling.size=null to fit the cohort"
                )
            largest = np.maximum(largest, extent)
        if self.size is None:
            self.size = tuple(int(-(-n // self.divisor) * self.divisor) for n in largest)

    def __call__(self, subject: StoredSubject, rng: np.random.Generator) -> Box:
        assert self.size is not None, "fit() comes first"
        return centred_box(subject.brain_box, self.size)


class RandomPatch:
    """A patch of fixed size whose centre is a brain voxel, so that none is empty background.

    Near a border the patch is pushed back into the volume; an axis shorter than the patch is padded on both sides.

    Args:
        size: voxels along x, y, z.
        divisor: what every axis must be a multiple of.
    """

    def __init__(self, size: Sequence[int] = (96, 96, 96), divisor: int = 8):
        self.size = _checked_size(size, divisor)
        self.divisor = divisor

    def __call__(self, subject: StoredSubject, rng: np.random.Generator) -> Box:
        for _ in range(1000):
            centre = [int(rng.integers(lo, hi)) for lo, hi in subject.brain_box]
            if subject.read_brain(tuple((c, c + 1) for c in centre)).item():  # one voxel of a memory map
                break
        starts = []
        for c, n, total in zip(centre, self.size, subject.shape, strict=True):
            starts.append((total - n) // 2 if total <= n else min(max(c - n // 2, 0), total - n))
        return tuple((start, start + n) for start, n in zip(starts, self.size, strict=True))  # type: ignore[return-value]
