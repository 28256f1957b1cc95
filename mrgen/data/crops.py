"""Which part of a subject's volume a sample shows: the whole brain, or a random patch of it."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np

from mrgen.data.store import StoredSubject
from mrgen.errors import UserError

__all__ = ["BrainBox", "Crop", "LesionPatch", "RandomPatch", "WholeVolume", "centred_box", "surrounding_box"]

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


def surrounding_box(brain_box: Sequence[Sequence[int]], least: Sequence[int], divisor: int) -> Box:
    """A box around the middle of a brain that holds it: of `least` voxels, more where the brain needs them.

    Args:
        brain_box: (start, stop) of x, y, z, ends exclusive.
        least: voxels along x, y, z, such as of the box that a network was trained in; 0 for as few as possible.
        divisor: what the brain's own size is rounded up to a multiple of.
    """
    needed = [-(-(stop - start) // divisor) * divisor for start, stop in brain_box]
    return centred_box(brain_box, [max(pair) for pair in zip(least, needed, strict=True)])


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
        centre, starts = _brain_voxel(subject, rng), []
        for c, n, total in zip(centre, self.size, subject.shape, strict=True):
            starts.append((total - n) // 2 if total <= n else min(max(c - n // 2, 0), total - n))
        return tuple((start, start + n) for start, n in zip(starts, self.size, strict=True))  # type: ignore[return-value]


class LesionPatch:
    """A patch around a lesion voxel or around a brain voxel without lesion: DeepMedic's sampling.

    The patch is centred exactly and may exceed the volume, so that a network whose answer is smaller than its input
    sees around it what is really there, background beyond the volume.

    Args:
        size: voxels along x, y, z.
        divisor: what every axis must be a multiple of.
        lesion_share: probability of a lesion voxel. Any label number above 0 is one; a subject without lesion, or
            without label, always shows brain.
    """

    def __init__(self, size: Sequence[int] = (109, 109, 109), divisor: int = 1, lesion_share: float = 0.5):
        self.size = _checked_size(size, divisor)
        self.divisor = divisor
        if not 0 <= lesion_share <= 1:
            raise UserError(f"data.sampling.lesion_share is {lesion_share}; expected a probability from 0 to 1")
        self.lesion_share = lesion_share

    def __call__(self, subject: StoredSubject, rng: np.random.Generator) -> Box:
        lesion = _lesion_voxels(subject) if rng.random() < self.lesion_share else ()
        if len(lesion):
            centre = [int(c) for c in np.unravel_index(lesion[rng.integers(len(lesion))], subject.shape)]
        else:
            centre = _brain_voxel(subject, rng, lesion=False)
        starts = [c - n // 2 for c, n in zip(centre, self.size, strict=True)]
        return tuple((start, start + n) for start, n in zip(starts, self.size, strict=True))  # type: ignore[return-value]


def _brain_voxel(subject: StoredSubject, rng: np.random.Generator, lesion: bool = True) -> list[int]:
    """A brain voxel, found by trying voxels of a memory map; without ``lesion`` one that has no label."""
    for _ in range(1000):
        centre = [int(rng.integers(lo, hi)) for lo, hi in subject.brain_box]
        voxel = tuple((c, c + 1) for c in centre)
        if subject.read_brain(voxel).item() and (lesion or not _labelled_voxel(subject, voxel)):
            break
    return centre


def _labelled_voxel(subject: StoredSubject, voxel: Sequence[tuple[int, int]]) -> bool:
    return subject.labelled and bool(subject.read_label(voxel).item())


@lru_cache(maxsize=512)  # by subject and revision; a glioma at 1 mm takes about 0.4 MB
def _lesion_voxels(subject: StoredSubject) -> np.ndarray:
    """(N,) positions in the flattened volume."""
    if not subject.labelled:
        return np.empty(0, np.int32)
    return np.flatnonzero(subject.read_label()).astype(np.int32)


class WholeVolume:
    """All that was scanned, each subject on its own grid: for evaluation, one subject at a time."""

    size: tuple[int, ...] | None = None
    divisor = 1

    def __call__(self, subject: StoredSubject, rng: np.random.Generator) -> Box:
        x, y, z = subject.shape
        return (0, x), (0, y), (0, z)
