"""Dice of labels and of the nested regions that challenges score (whole tumour, tumour core, enhancing tumour)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

IGNORED = 255  # the label of voxels that no loss and no metric looks at


def region_masks(labels: Tensor, regions: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """One mask per region, where a region is a union of labels.

    Args:
        labels: (...) integer labels.
        regions: the labels of each region, e.g. {"WT": [1, 2, 3], "TC": [1, 3], "ET": [3]}.

    Returns:
        For each region, in the order given, a bool tensor shaped like `labels`.
    """
    return {
        name: torch.isin(labels, torch.as_tensor(list(members), dtype=labels.dtype, device=labels.device))
        for name, members in regions.items()
    }


def dice(prediction: Tensor, reference: Tensor, ignore: Tensor | None = None) -> float:
    """2 |P ∩ R| / (|P| + |R|), with the BraTS server's rule for what is not there.

    Both empty scores 1 and one empty scores 0: a subject without enhancing tumour is a case to get right, not to skip.

    Args:
        prediction: (...) bool.
        reference: (...) bool, shaped alike.
        ignore: (...) bool, true where a voxel is removed from both before anything is counted.

    Returns:
        A number from 0 to 1.
    """
    masks = [prediction, reference] if ignore is None else [prediction, reference, ignore]
    # `.bool()` on a label map would score the whole tumour, whatever region was meant.
    if any(mask.dtype != torch.bool or mask.shape != prediction.shape for mask in masks):
        found = ", ".join(f"{mask.dtype} {tuple(mask.shape)}" for mask in masks)
        raise ValueError(f"dice: expected bool masks of one shape, found {found}")
    if ignore is not None:
        prediction, reference = prediction & ~ignore, reference & ~ignore
    size = int(prediction.sum()) + int(reference.sum())
    return 2 * int((prediction & reference).sum()) / size if size else 1.0


def region_dice(
    predicted_labels: Tensor, reference_labels: Tensor, regions: Mapping[str, Sequence[int]]
) -> dict[str, float]:
    """Dice of every region of one subject.

    Args:
        predicted_labels: (...) integer labels.
        reference_labels: (...) integer labels; 255 marks voxels that are removed from both.
        regions: the labels of each region, see `region_masks`.

    Returns:
        For each region its Dice, from 0 to 1.
    """
    ignore = reference_labels == IGNORED
    predicted, reference = region_masks(predicted_labels, regions), region_masks(reference_labels, regions)
    return {name: dice(predicted[name], reference[name], ignore) for name in regions}
