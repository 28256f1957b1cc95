"""Dice and HD95 of the nested regions that challenges score (whole tumour, tumour core, enhancing tumour)."""

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

IGNORED = 255  # the label of voxels that no loss and no metric looks at
HD95_ONE_EMPTY = 373.13  # mm, where one of two masks is empty: the BraTS server's, the diagonal of 240×240×155 at 1 mm


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

    Raises:
        ValueError: the masks are not bool or not of one shape.
    """
    prediction, reference = _kept(prediction, reference, ignore)
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


def hd95(prediction: Tensor, reference: Tensor, spacing: Sequence[float], ignore: Tensor | None = None) -> float:
    """95th percentile Hausdorff distance: the larger of the two directed 95th percentiles (MONAI's definition).

    Distances go from every surface voxel of one mask to the nearest surface voxel of the other; a surface voxel is one
    of the mask with a neighbour across a face that is not, and the volume ends at its faces. Papers that average the
    two directions report smaller numbers.

    Args:
        prediction: (X, Y, Z) or (X, Y) bool.
        reference: bool, shaped alike.
        spacing: voxel sides in mm, one an axis.
        ignore: bool, shaped alike, true where a voxel is removed from both before surfaces are found.

    Returns:
        Millimetres. With the BraTS server's rule for what is not there: both empty 0, one empty 373.13.

    Raises:
        ValueError: the masks are not bool or not of one shape, or `spacing` does not fit them.
    """
    prediction, reference = _kept(prediction, reference, ignore)
    sides = [float(side) for side in spacing]
    if len(sides) != prediction.ndim or not all(side > 0 for side in sides):
        raise ValueError(f"expected {prediction.ndim} positive voxel sides in mm, found {sides}")
    if not (prediction.any() and reference.any()):
        return HD95_ONE_EMPTY if prediction.any() or reference.any() else 0.0
    from monai.metrics import compute_hausdorff_distance

    either = prediction | reference
    for axis in range(either.ndim):  # nothing outside the joint bounding box has a surface
        inside = either.any(dim=tuple(other for other in range(either.ndim) if other != axis)).nonzero()
        low, size = int(inside.min()), int(inside.max() - inside.min()) + 1
        prediction, reference = prediction.narrow(axis, low, size), reference.narrow(axis, low, size)
    one, other = (mask[None, None].cpu() for mask in (prediction, reference))  # (1, 1, …): one subject, one class
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of an argument that MONAI 1.5 and 1.6 deprecate and pass
        return float(compute_hausdorff_distance(one, other, include_background=True, percentile=95, spacing=sides))


def region_hd95(
    predicted_labels: Tensor,
    reference_labels: Tensor,
    regions: Mapping[str, Sequence[int]],
    spacing: Sequence[float],
) -> dict[str, float]:
    """HD95 of every region of one subject.

    Args:
        predicted_labels: (X, Y, Z) or (X, Y) integer labels.
        reference_labels: integer labels, shaped alike; 255 marks voxels that are removed from both.
        regions: the labels of each region, see `region_masks`.
        spacing: voxel sides in mm, one an axis.

    Returns:
        For each region its HD95 in mm, see `hd95`.
    """
    ignore = reference_labels == IGNORED
    predicted, reference = region_masks(predicted_labels, regions), region_masks(reference_labels, regions)
    return {name: hd95(predicted[name], reference[name], spacing, ignore) for name in regions}


def _kept(prediction: Tensor, reference: Tensor, ignore: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both masks without the ignored voxels; anything but bool masks of one shape is refused."""
    masks = [prediction, reference] if ignore is None else [prediction, reference, ignore]
    # `.bool()` on a label map would score the whole tumour, whatever region was meant.
    if any(mask.dtype != torch.bool or mask.shape != prediction.shape for mask in masks):
        found = ", ".join(f"{mask.dtype} {tuple(mask.shape)}" for mask in masks)
        raise ValueError(f"expected bool masks of one shape, found {found}")
    return (prediction, reference) if ignore is None else (prediction & ~ignore, reference & ~ignore)
