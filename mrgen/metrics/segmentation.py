"""Dice, HD95, sensitivity and specificity of a mask, such as a label or one of the nested regions that challenges score
(whole tumour, tumour core, enhancing tumour); and of whole maps of label numbers."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

IGNORED = 255  # the label of voxels that no loss and no metric looks at
INDEX_EPS = 1e-5  # of Qu et al.'s code, which makes two empty maps score 1
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

    Papers that average the two directions report smaller numbers.

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
    return max(hd95_directed(prediction, reference, spacing, ignore))


def hd95_directed(
    prediction: Tensor, reference: Tensor, spacing: Sequence[float], ignore: Tensor | None = None
) -> tuple[float, float]:
    """Both directed 95th percentiles from one computation: their maximum is `hd95`, their mean Plastimatch's.

    Distances go from every surface voxel of one mask to the nearest surface voxel of the other; a surface voxel is one
    of the mask with a neighbour across a face that is not, and the volume ends at its faces.

    Args:
        prediction: as in `hd95`.
        reference: as in `hd95`.
        spacing: as in `hd95`.
        ignore: as in `hd95`.

    Returns:
        Millimetres, (from the prediction to the reference, from the reference to the prediction). Both empty (0, 0),
        one empty (373.13, 373.13), so that maximum and mean keep the rule.

    Raises:
        ValueError: as in `hd95`.
    """
    prediction, reference = _kept(prediction, reference, ignore)
    sides = [float(side) for side in spacing]
    if len(sides) != prediction.ndim or not all(side > 0 for side in sides):
        raise ValueError(f"expected {prediction.ndim} positive voxel sides in mm, found {sides}")
    if not (prediction.any() and reference.any()):
        distance = HD95_ONE_EMPTY if prediction.any() or reference.any() else 0.0
        return distance, distance
    from monai.metrics.utils import get_mask_edges, get_surface_distance

    either = prediction | reference
    for axis in range(either.ndim):  # nothing outside the joint bounding box has a surface
        inside = either.any(dim=tuple(other for other in range(either.ndim) if other != axis)).nonzero()
        low, size = int(inside.min()), int(inside.max() - inside.min()) + 1
        prediction, reference = prediction.narrow(axis, low, size), reference.narrow(axis, low, size)
    one, other = get_mask_edges(prediction.cpu(), reference.cpu())[:2]
    pairs = (one, other), (other, one)
    distances = [torch.as_tensor(get_surface_distance(*pair, spacing=sides)) for pair in pairs]
    there, back = (float(torch.quantile(each, 0.95).float()) for each in distances)
    return there, back


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
    directed = region_hd95_directed(predicted_labels, reference_labels, regions, spacing)
    return {name: max(pair) for name, pair in directed.items()}


def region_hd95_directed(
    predicted_labels: Tensor,
    reference_labels: Tensor,
    regions: Mapping[str, Sequence[int]],
    spacing: Sequence[float],
) -> dict[str, tuple[float, float]]:
    """Both directed 95th percentiles of every region of one subject.

    Args:
        predicted_labels: as in `region_hd95`.
        reference_labels: as in `region_hd95`.
        regions: as in `region_hd95`.
        spacing: as in `region_hd95`.

    Returns:
        For each region the pair of `hd95_directed`, in mm.
    """
    ignore = reference_labels == IGNORED
    predicted, reference = region_masks(predicted_labels, regions), region_masks(reference_labels, regions)
    return {name: hd95_directed(predicted[name], reference[name], spacing, ignore) for name in regions}


def sensitivity(prediction: Tensor, reference: Tensor, ignore: Tensor | None = None) -> float:
    """TP / (TP + FN), the share of the reference that is found.

    Args:
        prediction: (...) bool.
        reference: (...) bool, shaped alike.
        ignore: (...) bool, true where a voxel is removed from both.

    Returns:
        A number from 0 to 1; nan where the reference is empty, so that nothing could be found.

    Raises:
        ValueError: the masks are not bool or not of one shape.
    """
    prediction, reference = _kept(prediction, reference, ignore)
    there = int(reference.sum())
    return int((prediction & reference).sum()) / there if there else math.nan


def specificity(prediction: Tensor, reference: Tensor, ignore: Tensor | None = None, *, beyond: int = 0) -> float:
    """TN / (TN + FP), the share of what is not the reference that is left alone.

    It depends on how much is looked at: of a whole image most voxels are far from any lesion.

    Args:
        prediction: (...) bool.
        reference: (...) bool, shaped alike.
        ignore: (...) bool, true where a voxel is removed from both and is no true negative either.
        beyond: number of further voxels that are looked at and in neither, such as the padding of a slice.

    Returns:
        A number from 0 to 1; nan where everything is the reference.

    Raises:
        ValueError: the masks are not bool or not of one shape.
    """
    prediction, reference = _kept(prediction, reference, ignore)
    ignored = 0 if ignore is None else int(ignore.sum())
    negative = reference.numel() + beyond - ignored - int(reference.sum())
    return 1 - int((prediction & ~reference).sum()) / negative if negative else math.nan


def index_dice(predicted: Tensor, reference: Tensor) -> Tensor:
    """Qu et al.'s "Dice" of maps of label numbers, (2 Σab + ε) / (Σa² + Σb² + ε) with ε = 1e-5, as in their code.

    It weighs a voxel by its label's number: where both maps know one class it is the ordinary Dice, else it is not, and
    an enhancing voxel (4) that is called necrotic (1) counts as nearly missed.

    Args:
        predicted: (n, ...) label numbers, maps along the first axis.
        reference: shaped alike; 255 marks voxels that are removed from both.

    Returns:
        (n,) float64 from 0 to 1; 1 where both maps are empty.

    Raises:
        ValueError: the two are not of one shape.
    """
    a, b = _index_maps(predicted, reference)
    return (2 * (a * b).sum(dim=1) + INDEX_EPS) / ((a**2).sum(dim=1) + (b**2).sum(dim=1) + INDEX_EPS)


def index_mse(predicted: Tensor, reference: Tensor) -> Tensor:
    """Qu et al.'s mean squared error of maps of label numbers, over all voxels of a map.

    Args:
        predicted: as in `index_dice`.
        reference: as in `index_dice`.

    Returns:
        (n,) float64, at least 0; nan where all voxels of a map are ignored.

    Raises:
        ValueError: as in `index_dice`.
    """
    a, b = _index_maps(predicted, reference)
    kept = (reference != IGNORED).flatten(1).sum(dim=1)
    return ((a - b) ** 2).sum(dim=1) / kept


def _index_maps(predicted: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Both as (n, voxels) float64, 0 where ignored."""
    if predicted.shape != reference.shape or predicted.ndim < 2:
        raise ValueError(f"expected maps of one shape, found {tuple(predicted.shape)} and {tuple(reference.shape)}")
    ignored = reference == IGNORED
    a, b = (part.masked_fill(ignored, 0).flatten(1).double() for part in (predicted, reference))
    return a, b


def _kept(prediction: Tensor, reference: Tensor, ignore: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both masks without the ignored voxels; anything but bool masks of one shape is refused."""
    masks = [prediction, reference] if ignore is None else [prediction, reference, ignore]
    # `.bool()` on a label map would score the whole tumour, whatever region was meant.
    if any(mask.dtype != torch.bool or mask.shape != prediction.shape for mask in masks):
        found = ", ".join(f"{mask.dtype} {tuple(mask.shape)}" for mask in masks)
        raise ValueError(f"expected bool masks of one shape, found {found}")
    return (prediction, reference) if ignore is None else (prediction & ~ignore, reference & ~ignore)
