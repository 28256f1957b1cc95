"""Slices of one sequence each: for methods that see no two sequences of one slice together (Qu et al., section 2.4)."""

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from mrgen.data.sampler import Key
from mrgen.data.slice_dataset import SliceDataset
from mrgen.errors import UserError

__all__ = ["SequenceSlices", "slices_with_lesion"]

CANDIDATES = 8  # lesions that come with a slice: the first that fits into its brain is taken, and not every one does


class SequenceSlices(Dataset):
    """One sequence of slices that several of these share, and lesions of other slices beside each.

    A sample is one of ``SliceDataset`` with ``image`` (1, X, Y) and ``lesions`` (8, X, Y) uint8: the mapped labels of
    other slices, as they are on disk. Augmentation moves image, label and brain, and not them.

    Args:
        slices: those of all sequences, held once.
        channel: which of their sequences.
        lesioned: places in ``slices`` that have a lesion, from two on, so that every slice has another.
        seed: of this sequence; with (epoch, index) it seeds the augmentation and the choice of the lesions.
    """

    def __init__(self, slices: SliceDataset, channel: int, lesioned: np.ndarray, *, seed: int):
        self.slices, self.channel, self.lesioned, self.seed = slices, channel, lesioned, seed

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index, which = key
        one = slice(self.channel, self.channel + 1)
        others = self.lesioned[self.lesioned != which]
        rng = np.random.default_rng([self.seed, epoch, index])
        chosen = rng.choice(others, CANDIDATES, replace=len(others) < CANDIDATES)
        lesions = np.stack([self.slices.label(int(place)) for place in chosen])  # (8, X, Y)
        augment = self.slices.augment, (self.seed, epoch, index)
        return {**self.slices.sample(which, augment, channels=one), "lesions": torch.from_numpy(lesions)}


def slices_with_lesion(slices: SliceDataset) -> np.ndarray:
    """Places of the slices with a voxel of a lesion, (n,) int. Raises UserError below two."""
    found = [((label := slices.label(place)) > 0) & (label < 255) for place in range(len(slices))]
    lesioned = np.flatnonzero([lesion.any() for lesion in found])
    if len(lesioned) < 2:
        raise UserError(
            f"{len(lesioned)} of {len(slices)} training slices have a lesion; expected two at least, since the lesion "
            "of another slice is put into each: widen data.sampling, or train on subjects with lesions"
        )
    return lesioned
