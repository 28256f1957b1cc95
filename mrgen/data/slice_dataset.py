"""Slices of a prepared cohort, held in memory: on disk a slice lies scattered over its whole volume."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mrgen.data.dataset import augmented
from mrgen.data.guides import Guide, guide_slices
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
    guides: dict[str, np.ndarray] = field(default_factory=dict)  # (Z, n, X, Y) float16 each


class _Stacks:
    """Reads, cuts and maps every subject once.

    Args:
        subjects, modalities, lookup, normalisation: as of ``mrgen.data.dataset.CropDataset``.
        slices: cuts the slices.
        shown: which slices of a subject are kept.
        guides: by name, what tells of a subject's anatomy beside its images.
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
        guides: Mapping[str, Guide] | None = None,
    ):
        self.normalisation = normalisation
        self.stacks = []
        shared: dict[tuple[str, Any], np.ndarray] = {}  # of guides that are the same for all subjects
        for subject in subjects:
            (x, y, _), kept = slices.box(subject.shape, subject.site), shown(subject)
            box, every = (x, y, (kept.start, kept.stop)), slice(None, None, kept.step)
            channels = [  # padded as Li et al. do; (Z, X, Y) each
                subject.read_image([name], box, fill=subject.statistics[name]["volume_min"])[0].transpose(2, 0, 1)[
                    every
                ]
                for name in modalities
            ]
            image = np.stack(channels, axis=1)  # (Z, C, X, Y)
            label = np.zeros((len(kept), *slices.size), np.uint8)
            if subject.labelled:
                label[:] = lookup[subject.read_label(box)].transpose(2, 0, 1)[every]
            brain = np.ascontiguousarray(subject.read_brain(box).transpose(2, 0, 1)[every])
            seen: dict[str, np.ndarray] = {}
            for name, guide in (guides or {}).items():
                view = guide.on(subject)
                key = (name, (box, kept.step) if view is guide else subject.id)
                if key not in shared:  # half precision: as much memory as the images
                    shared[key] = guide_slices(view, box, kept.step).astype(np.float16)
                seen[name] = shared[key]
            recorded = stored_statistics(normalisation, subject, modalities)
            self.stacks.append(_Stack(subject, image, label, brain, recorded, seen))

    def read(self, stack: _Stack, z: int, channels: slice = slice(None)) -> dict[str, Tensor]:
        """Image (C, X, Y), normalised, label (X, Y) and brain (X, Y) of the z-th kept slice; guides (n, X, Y)."""
        brain = torch.from_numpy(stack.brain[z].copy())
        stored = torch.from_numpy(stack.image[z, channels])
        image = self.normalisation(stored, brain, stack.statistics[channels])
        guides = {name: torch.from_numpy(slices[z].astype(np.float32)) for name, slices in stack.guides.items()}
        return {"image": image, "label": torch.from_numpy(stack.label[z]).long(), "brain": brain, **guides}


class SliceDataset(Dataset):
    """One slice a sample, in the form of ``mrgen.data.batch.Batch`` without the batch axis and without z.

    Args:
        subjects, augment, seed: as of ``mrgen.data.dataset.CropDataset``.
        slices: which there are, and how they are cut.
        whole: all slices of a subject are shown and not those of training alone: of subjects that were synthesised.
        **reading: ``modalities``, ``lookup`` and ``normalisation``, likewise; ``guides`` by name.
    """

    def __init__(
        self,
        subjects: Sequence[StoredSubject],
        *,
        slices: SiteSlices,
        augment: Callable[[Any], Any] | None = None,
        seed: int = 0,
        whole: bool = False,
        **reading: Any,
    ):
        self.augment, self.seed = augment, seed

        def shown(subject: StoredSubject) -> range:
            return range(subject.shape[2]) if whole else slices.training(subject.shape, subject.site)

        self._read = _Stacks(subjects, slices=slices, shown=shown, **reading)
        self.places = [(stack, z) for stack in self._read.stacks for z in range(len(stack.image))]

    def __len__(self) -> int:
        return len(self.places)

    def label(self, place: int) -> np.ndarray:
        """(X, Y) uint8, mapped: as it is on disk."""
        stack, z = self.places[place]
        return stack.label[z]

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index, place = key
        return self.sample(place, (self.augment, (self.seed, epoch, index)))

    def sample(
        self, place: int, *steps: tuple[Callable[[Any], Any] | None, Sequence[int]], channels: slice = slice(None)
    ) -> dict[str, Any]:
        """The slice at a place in these sequences, through TorchIO transforms, each with what it is seeded by."""
        return self.through(self.parts(place, channels), *steps) | self.named(place)

    def parts(self, place: int, channels: slice = slice(None)) -> dict[str, Tensor]:
        """Image (C, X, Y), normalised, label (X, Y) and brain (X, Y) of a place; guides (n, X, Y)."""
        return self._read.read(*self.places[place], channels)

    def named(self, place: int) -> dict[str, Any]:
        """Whose slice it is, and how large its voxels are."""
        return _named(self.places[place][0].subject)

    def through(
        self, parts: dict[str, Tensor], *steps: tuple[Callable[[Any], Any] | None, Sequence[int]]
    ) -> dict[str, Any]:
        """What TorchIO transforms make of ``parts``, each with what it is seeded by."""
        for transform, words in steps:
            if transform is None:
                continue
            seed = int(np.random.default_rng(words).integers(2**62))
            volumes = {name: part[..., None] for name, part in parts.items()}  # TorchIO knows volumes alone
            outside = self._read.normalisation.outside
            parts = {k: v[..., 0] for k, v in augmented(transform, volumes, seed=seed, outside=outside).items()}
        return parts


class SubjectSlices(Dataset):
    """All slices of one subject in which lesions may be predicted, as one batch (Z, …); arguments as above."""

    def __init__(self, subjects: Sequence[StoredSubject], *, slices: SiteSlices, **reading: Any):
        self._read = _Stacks(subjects, slices=slices, shown=lambda subject: slices.tested(subject.shape), **reading)

    def __len__(self) -> int:
        return len(self._read.stacks)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        stack = self._read.stacks[key[2]]
        slices = [self._read.read(stack, z) for z in range(len(stack.image))]
        parts = {name: torch.stack([part[name] for part in slices]) for name in slices[0]}  # (Z, C, X, Y) or (Z, X, Y)
        named = _named(stack.subject)
        spacing = named["spacing"].expand(len(slices), 3)
        return {**parts, "subject": [named["subject"]] * len(slices), "spacing": spacing}


def _named(subject: StoredSubject) -> dict[str, Any]:
    return {"subject": subject.id, "spacing": torch.tensor(subject.spacing, dtype=torch.float32)}
