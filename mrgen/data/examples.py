"""Fixed slices of fixed subjects, read as training shows them: for pictures of what a network makes of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from mrgen.data.batch import IGNORED
from mrgen.data.crops import BrainBox, Crop, LesionPatch, RandomPatch
from mrgen.data.datamodule import CohortDataModule
from mrgen.data.slices import AxialSlice, SiteSlices

__all__ = ["Example", "example_subjects", "read_example"]


@dataclass(frozen=True)
class Example:
    """Some axial slices of a subject.

    Attributes:
        subject: its id.
        numbers: of the slices within the scan, bottom up.
        batch: what a network is given, a ``mrgen.data.batch.Batch``: these slices, or one crop that holds them.
        depths: which z of a crop they are; None of slices.
    """

    subject: str
    numbers: tuple[int, ...]
    batch: dict[str, Any]
    depths: tuple[int, ...] | None

    def slices(self, tensor: Tensor) -> np.ndarray:
        """Of an answer (B, …, X, Y[, Z]) to the batch the slices, (n, …, X, Y)."""
        if self.depths is not None:
            tensor = tensor[0][..., list(self.depths)].movedim(-1, 0)
        return (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()


def example_subjects(datamodule: CohortDataModule, count: int) -> list[str]:
    """The first validation subjects by name; training ones where there are none."""
    return sorted(datamodule.split.val or datamodule.split.train)[:count]


def read_example(datamodule: CohortDataModule, subject: str, count: int) -> Example:
    """The slices with the largest lesion, spread over all that have one; else slices around the middle of the brain.

    Args:
        datamodule: whose sampling decides between slices, patches around the lesion and the whole brain.
        subject: id of one of its subjects.
        count: slices at most.
    """
    stored, sampling = datamodule.store.subjects[subject], datamodule.sampling
    if isinstance(sampling, SiteSlices):
        batch = datamodule.all_slices([subject])[0, 0, 0]
        chosen = _chosen(batch["label"], batch["brain"], count)
        first = sampling.tested(stored.shape).start
        kept = {name: part[chosen] for name, part in batch.items() if isinstance(part, Tensor)}
        batch = {**kept, "subject": [subject] * len(chosen)}
        return Example(subject, tuple(first + z for z in chosen), batch, None)
    crop: Crop = sampling
    if isinstance(sampling, RandomPatch | LesionPatch):
        crop = LesionPatch(sampling.size, sampling.divisor, lesion_share=1.0)
    elif isinstance(sampling, AxialSlice):
        assert sampling.size is not None
        assert datamodule.whole.size is not None
        crop = BrainBox((*sampling.size, datamodule.whole.size[2]), divisor=1)
    sample = datamodule.dataset([subject], crop=crop)[0, 0, 0]
    # As the dataset seeds the crop of its first sample.
    start = crop(stored, np.random.default_rng([datamodule.seed, 0, 0]))[2][0]
    chosen = _chosen(sample["label"].movedim(-1, 0), sample["brain"].movedim(-1, 0), count)
    numbers = tuple(start + z for z in chosen)
    batch = {name: part[None] for name, part in sample.items() if isinstance(part, Tensor)}
    batch["subject"] = [subject]
    if not isinstance(sampling, AxialSlice):
        return Example(subject, numbers, batch, tuple(chosen))
    for name in ("image", "label", "brain"):  # a slice is a sample
        batch[name] = batch[name][0][..., chosen].movedim(-1, 0).contiguous()
    batch["spacing"], batch["subject"] = batch["spacing"].expand(len(chosen), 3), [subject] * len(chosen)
    return Example(subject, numbers, batch, None)


def _chosen(label: Tensor, brain: Tensor, count: int) -> list[int]:
    """Which of slices (Z, X, Y) are shown, bottom up."""
    lesion = ((label > 0) & (label != IGNORED)).sum((1, 2)).numpy()
    if lesion.any():
        return [int(part[lesion[part].argmax()]) for part in _parts(np.flatnonzero(lesion), count)]
    inside = np.flatnonzero(brain.any(2).any(1).numpy())
    return [int(part[len(part) // 2]) for part in _parts(inside if len(inside) else np.arange(len(label)), count)]


def _parts(slices: np.ndarray, count: int) -> Sequence[np.ndarray]:
    return np.array_split(slices, min(count, len(slices)))
