"""Slices of a prepared cohort, held in memory: on disk a slice lies scattered over its whole volume."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mrgen.data.dataset import augmented
from mrgen.data.normalisation import Normalisation, stored_statistics
from mrgen.data.sampler import Key
from mrgen.data.slices import SiteSlices
from mrgen.data.store import StoredSubject

__all__ = ["SliceDataset", "SubjectSlices"]


@dataclass(frozen=True)
class _Stack:
    """The slices of one subject in stored intensities, one after the other in memory."""

    subject: StoredSubject
    image: np.ndarray  # (Z, C, X, Y)
    label: np.ndarray  # (Z, X, Y) uint8, mapped
    brain: np.ndarray  # (Z, X, Y) bool
    statistics: list[Any]


class _Stacks:
    """Reads, cuts and maps every subject once.

    Args:
        subjects, modalities, lookup, normalisation: as of ``mrgen.data.dataset.CropDataset``.
        slices: cuts the slices.
        shown: which slices of a subject are kept.
    """

    def __init__(
        self,
        subjects: Sequence[StoredSubject],
        *,
        modalities: Sequence[str],
        lookup: np.ndarray,
        slices: SiteSlices,
        normalisation: Normalisation,
        shown: Callable[[StoredSubject], range],
    ):
        self.normalisation = normalisation
        self.stacks = []
        for subject in subjects:
            (x, y, _), kept = slices.box(subject.shape, subject.site), shown(subject)
            box = (x, y, (kept.start, kept.stop))
            channels = [  # padded as Li et al. do; (Z, X, Y) each
                subject.read_image([name], box, fill=subject.statistics[name]["volume_min"])[0].transpose(2, 0, 1)
                for name in modalities
            ]
            image = np.stack(channels, axis=1)  # (Z, C, X, Y)
            label = np.zeros((len(kept), *slices.size), np.uint8)
            if subject.labelled:
                label[:] = lookup[subject.read_label(box)].transpose(2, 0, 1)
            brain = np.ascontiguousarray(subject.read_brain(box).transpose(2, 0, 1))
            self.stacks.append(
                _Stack(subject, image, label, brain, stored_statistics(normalisation, subject, modalities))
            )

    def read(self, stack: _Stack, z: int) -> tuple[Tensor, Tensor, Tensor]:
        """Image (C, X, Y), normalised, label (X, Y) and brain (X, Y) of the z-th kept slice."""
        brain = torch.from_numpy(stack.brain[z].copy())
        image = self.normalisation(torch.from_numpy(stack.image[z]), brain, stack.statistics)
        return image, torch.from_numpy(stack.label[z]).long(), brain


class SliceDataset(Dataset):
    """One slice a sample, in the form of ``mrgen.data.batch.Batch`` without the batch axis and without z.

    Args:
        subjects, augment, seed: as of ``mrgen.data.dataset.CropDataset``.
        slices: which there are, and how they are cut.
        **reading: ``modalities``, ``lookup`` and ``normalisation``, likewise.
    """

    def __init__(
        self,
        subjects: Sequence[StoredSubject],
        *,
        slices: SiteSlices,
        augment: Callable[[Any], Any] | None = None,
        seed: int = 0,
        **reading: Any,
    ):
        self.augment, self.seed = augment, seed
        self._read = _Stacks(
            subjects, slices=slices, shown=lambda subject: slices.training(subject.shape, subject.site), **reading
        )
        self.places = [(stack, z) for stack in self._read.stacks for z in range(len(stack.image))]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index, which = key
        stack, z = self.places[which]
        image, label, brain = self._read.read(stack, z)
        if self.augment is not None:
            seed = int(np.random.default_rng([self.seed, epoch, index]).integers(2**62))
            volumes = image[..., None], label[..., None], brain[..., None]  # TorchIO knows volumes alone
            masked = self._read.normalisation.masked
            image, label, brain = (part[..., 0] for part in augmented(self.augment, *volumes, seed=seed, masked=masked))
        return {"image": image, "label": label, "brain": brain, **_named(stack.subject)}


class SubjectSlices(Dataset):
    """All slices of one subject in which lesions may be predicted, as one batch (Z, …); arguments as above."""

    def __init__(self, subjects: Sequence[StoredSubject], *, slices: SiteSlices, **reading: Any):
        self._read = _Stacks(subjects, slices=slices, shown=lambda subject: slices.tested(subject.shape), **reading)

    def __len__(self) -> int:
        return len(self._read.stacks)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        stack = self._read.stacks[key[2]]
        parts = zip(*(self._read.read(stack, z) for z in range(len(stack.image))), strict=True)
        image, label, brain = (torch.stack(part) for part in parts)  # (Z, C, X, Y), (Z, X, Y), (Z, X, Y)
        named = _named(stack.subject)
        spacing = named["spacing"].expand(len(image), 3)
        return {
            "image": image,
            "label": label,
            "brain": brain,
            "subject": [named["subject"]] * len(image),
            "spacing": spacing,
        }


def _named(subject: StoredSubject) -> dict[str, Any]:
    return {"subject": subject.id, "spacing": torch.tensor(subject.spacing, dtype=torch.float32)}
