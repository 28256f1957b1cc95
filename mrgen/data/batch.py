"""The batch: what every dataset yields and every method takes."""

from collections.abc import Sequence
from typing import TypedDict

from torch import Tensor

__all__ = ["IGNORED", "Batch", "volumes"]

IGNORED = 255  # label of voxels that no loss and no metric counts (other pathology in WMH 2017)


class Batch(TypedDict):
    """One batch. Axes are RAS+, x y z; the sequences stand in the order of ``data.modalities``. Slices have no Z.

    Attributes:
        image: (B, C, X, Y, Z) float32, normalised.
        label: (B, X, Y, Z) int64, the mapped class, 255 where ignored.
        brain: (B, X, Y, Z) bool.
        subject: B ids.
        spacing: (B, 3) float32, voxel sides in mm along x, y, z.
    """

    image: Tensor
    label: Tensor
    brain: Tensor
    subject: list[str]
    spacing: Tensor


def volumes(batch: Batch, modalities: Sequence[str]) -> dict[str, Tensor]:
    """Views of the batch's image by sequence name, each (B, 1, X, Y, Z)."""
    return {name: batch["image"][:, i : i + 1] for i, name in enumerate(modalities)}
