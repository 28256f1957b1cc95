"""Samples of a prepared cohort: crop, normalise, augment."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mrgen.data.crops import Crop
from mrgen.data.normalisation import Normalisation, stored_statistics
from mrgen.data.sampler import Key
from mrgen.data.slices import AxialSlice
from mrgen.data.store import StoredSubject

__all__ = ["CropDataset", "augmented"]


class CropDataset(Dataset):
    """One crop of one subject a sample, in the form of ``mrgen.data.batch.Batch`` without the batch axis.

    A slice has no z axis, but keeps the three numbers of its spacing.

    Args:
        subjects: prepared subjects; one without a label has no lesion.
        modalities: sequences to read, in this order.
        lookup: (256,) table from a cohort's own label numbers to class indices.
        crop: chooses the box.
        normalisation: applied with the subject's recorded statistics.
        augment: a TorchIO transform of a ``torchio.Subject`` with ``image``, ``label`` and ``brain``, or None.
        seed: with (epoch, index) it seeds the crop and the augmentation.
    """

    def __init__(
        self,
        subjects: Sequence[StoredSubject],
        *,
        modalities: Sequence[str],
        lookup: np.ndarray,
        crop: Crop,
        normalisation: Normalisation,
        augment: Callable[[Any], Any] | None = None,
        seed: int = 0,
    ):
        self.subjects, self.modalities = list(subjects), tuple(modalities)
        self.crop, self.normalisation, self.augment, self.seed = crop, normalisation, augment, seed
        self.lookup = lookup.astype(np.int64)

    def __len__(self) -> int:
        return len(self.subjects)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index, which = key
        subject = self.subjects[which]
        rng = np.random.default_rng([self.seed, epoch, index])
        box = self.crop(subject, rng)
        brain = torch.from_numpy(np.ascontiguousarray(subject.read_brain(box)))  # (X, Y, Z)
        image = self.normalisation(
            torch.from_numpy(subject.read_image(self.modalities, box)),
            brain,
            stored_statistics(self.normalisation, subject, self.modalities),
        )  # (C, X, Y, Z)
        label = torch.zeros(brain.shape, dtype=torch.int64)  # (X, Y, Z)
        if subject.labelled:
            label = torch.from_numpy(self.lookup[subject.read_label(box)])
        if self.augment is not None:
            seed = int(rng.integers(2**62))
            parts = {"image": image, "label": label, "brain": brain}
            parts = augmented(self.augment, parts, seed=seed, outside=self.normalisation.outside)
            image, label, brain = parts["image"], parts["label"], parts["brain"]
        if isinstance(self.crop, AxialSlice):  # only now: TorchIO knows volumes alone
            image, label, brain = (t.squeeze(-1) for t in (image, label, brain))  # (C, X, Y), (X, Y), (X, Y)
        # The grid is the scan's own: a transform moves what lies on it and not its voxels.
        spacing = torch.tensor(subject.spacing, dtype=torch.float32)  # (3,)
        return {"image": image, "label": label, "brain": brain, "subject": subject.id, "spacing": spacing}


def augmented(
    augment: Callable[[Any], Any], parts: Mapping[str, Tensor], *, seed: int, outside: float | None
) -> dict[str, Tensor]:
    """A sample through a TorchIO transform.

    Args:
        augment: of a ``torchio.Subject`` with ``image``, ``label``, ``brain`` and the guides.
        parts: ``image`` (C, X, Y, Z) float32, ``label`` (X, Y, Z) int64, ``brain`` (X, Y, Z) bool; whatever else there
            is, (n, X, Y, Z) float32, moves along and keeps its values.
        seed: of what it draws.
        outside: what all outside the brain is and has to stay; None where it is not of one value.
    """
    import torchio as tio

    guides = {name: part for name, part in parts.items() if name not in ("image", "label", "brain")}
    subject = tio.Subject(
        image=tio.ScalarImage(tensor=parts["image"]),
        label=tio.LabelMap(tensor=parts["label"][None].to(torch.int16)),
        brain=tio.LabelMap(tensor=parts["brain"][None].to(torch.uint8)),
        # As label maps no noise reaches them; and what comes in at a border is 0, which has to be their least value.
        **{name: tio.LabelMap(tensor=part - part.min()) for name, part in guides.items()},
    )
    with torch.random.fork_rng(devices=[]):  # TorchIO draws from torch's global generator
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPU's generator too
        subject = augment(subject)
    brain = subject["brain"].data[0].bool().contiguous()
    image = subject["image"].data.float().contiguous()
    if outside is not None:  # noise reaches the background and TorchIO pads with the image's minimum
        image = torch.where(brain, image, outside)
    label = subject["label"].data[0].long().contiguous()
    moved = {name: (subject[name].data.float() + part.min()).contiguous() for name, part in guides.items()}
    return {"image": image, "label": label, "brain": brain, **moved}
