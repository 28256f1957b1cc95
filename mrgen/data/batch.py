"""The batch: what every dataset yields and every method takes."""

from collections.abc import Sequence
from typing import NotRequired, TypedDict

import torch
from torch import Tensor

__all__ = ["IGNORED", "Batch", "label_map", "volumes"]

IGNORED = 255  # label of voxels that no loss and no metric counts (other pathology in WMH 2017)


class Batch(TypedDict):
    """One batch. Axes are RAS+, x y z; the sequences stand in the order of ``data.modalities``. Slices have no Z.

    Attributes:
        image: (B, C, X, Y, Z) float32, normalised.
        label: (B, X, Y, Z) int64, the mapped class, 255 where ignored.
        brain: (B, X, Y, Z) bool.
        subject: B ids.
        spacing: (B, 3) float32, voxel sides in mm along x, y, z.
        atlas: of slices, where data.guides names it: (B, 3 · C, X, Y) float32, three slices of every sequence of
            ``mrgen.data.atlas.Atlas``, on the image's scale.
        tissue: likewise, (B, 3, X, Y) float32, probabilities of CSF, grey and white matter, see ``mrgen.data.tissue``.
        lesions: where sequences are unpaired and a batch is of one, C = 1: (B, 8, X, Y) uint8, mapped labels of other
            slices that have a lesion.
    """

    image: Tensor
    label: Tensor
    brain: Tensor
    subject: list[str]
    spacing: Tensor
    atlas: NotRequired[Tensor]
    tissue: NotRequired[Tensor]
    lesions: NotRequired[Tensor]


def volumes(batch: Batch, modalities: Sequence[str]) -> dict[str, Tensor]:
    """Views of the batch's image by sequence name, each (B, 1, X, Y, Z)."""
    return {name: batch["image"][:, i : i + 1] for i, name in enumerate(modalities)}


def label_map(label: Tensor, brain: Tensor, classes: int) -> Tensor:
    """One-hot map of background, normal brain and each class of lesion.

    Lesion is lesion even where the brain mask has a gap. Voxels of 255 have no label, 0 in every channel: what they are
    is not known. They are in no region, and the generalised Dice leaves them out.

    Args:
        label: (B, X, Y) int, mapped classes, 0 being no lesion.
        brain: (B, X, Y) bool.
        classes: number of mapped classes, 0 included.

    Returns:
        (B, classes + 1, X, Y) float32.
    """
    lesion = [label == number for number in range(1, classes)]
    return torch.stack([(label == 0) & ~brain, (label == 0) & brain, *lesion], dim=1).float()
