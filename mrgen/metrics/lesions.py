"""How well white matter hyperintensities are segmented: by voxel, by volume and by lesion.

All functions take bool masks (X, Y, Z), `prediction` and `reference`, and optionally `ignore`, true where a voxel is
removed from both before anything is counted (the WMH challenge's label 2, other pathology). They raise `ValueError`
where the masks are not bool or not of one shape.

A subject without lesions has numbers, never nan. Both empty is perfect. With an empty reference all that is predicted
is false: FPR, FDR and the volume difference are 1, nothing is missed, and Dice and F1 are 0. An empty prediction has
no false positives and misses everything.

A lesion is a connected component in 3D, joined across faces, edges and corners as in the WMH challenge's own script.
"""

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from mrgen.metrics.segmentation import _kept

__all__ = ["lesion_detection", "lesion_sizes", "volume_difference", "voxel_rates"]

_CONNECTIVITY = 3  # across edges and corners as well as faces; 1 would be faces alone


def voxel_rates(prediction: Tensor, reference: Tensor, ignore: Tensor | None = None) -> dict[str, float]:
    """Dice and the rates of false voxels.

    Orbes-Arteaga et al. print FPR and FNR without a definition. Of those that could be meant, their numbers fit both
    relative to the reference; false positives over all true negatives would be below 1 % everywhere.

    Args:
        prediction: (X, Y, Z) bool.
        reference: (X, Y, Z) bool.
        ignore: (X, Y, Z) bool, removed from both.

    Returns:
        `dsc`, 2 TP / (2 TP + FP + FN); `fpr`, FP / (TP + FN), which may exceed 1; `fnr`, FN / (TP + FN); and `fdr`,
        FP / (TP + FP).

    Raises:
        ValueError: the masks are not bool or not of one shape.
    """
    prediction, reference = _kept(prediction, reference, ignore)
    predicted, there, true = (int(mask.sum()) for mask in (prediction, reference, prediction & reference))
    return {
        "dsc": _ratio(2 * true, predicted + there, empty=1.0),
        "fpr": _ratio(predicted - true, there, empty=float(predicted > 0)),
        "fnr": _ratio(there - true, there, empty=0.0),
        "fdr": _ratio(predicted - true, predicted, empty=0.0),
    }


def volume_difference(prediction: Tensor, reference: Tensor, ignore: Tensor | None = None) -> float:
    """|P − R| / R, the WMH challenge's absolute volume difference as a fraction.

    Args:
        prediction: (X, Y, Z) bool.
        reference: (X, Y, Z) bool.
        ignore: (X, Y, Z) bool, removed from both.

    Returns:
        From 0 up, 1 where nothing is predicted; without a reference 0 or, where something is predicted, 1.

    Raises:
        ValueError: the masks are not bool or not of one shape.
    """
    prediction, reference = _kept(prediction, reference, ignore)
    predicted, there = int(prediction.sum()), int(reference.sum())
    return _ratio(abs(predicted - there), there, empty=float(predicted > 0))


def lesion_detection(prediction: Tensor, reference: Tensor, ignore: Tensor | None = None) -> dict[str, float]:
    """Whole lesions found and whole components that are false, by the WMH challenge's rule of any overlap.

    A reference lesion is found where any voxel of it is predicted; a predicted component is true where any voxel of it
    lies in the reference. One large component may so find many lesions, and a lesion make many components true.

    Args:
        prediction: (X, Y, Z) bool.
        reference: (X, Y, Z) bool.
        ignore: (X, Y, Z) bool, removed from both; what it cuts apart becomes several lesions.

    Returns:
        From 0 to 1: `lesion_recall`, lesions found of all; `lesion_f1`, the harmonic mean of recall and the share of
        true components; `lesion_fpr`, false components of all that are predicted.

    Raises:
        ValueError: the masks are not bool or not of one shape.
    """
    predicted, there = _cropped(*_kept(prediction, reference, ignore))
    lesions, components = _overlaps(there, predicted)[1], _overlaps(predicted, there)[1]
    found, true = int((lesions > 0).sum()), int((components > 0).sum())
    recall = _ratio(found, len(lesions), empty=1.0)
    precision = _ratio(true, len(components), empty=1.0)
    return {
        "lesion_recall": recall,
        "lesion_f1": _ratio(2 * precision * recall, precision + recall, empty=0.0),
        "lesion_fpr": _ratio(len(components) - true, len(components), empty=0.0),
    }


def lesion_sizes(
    prediction: Tensor, reference: Tensor, spacing: Sequence[float], ignore: Tensor | None = None
) -> list[dict[str, float | bool]]:
    """Each reference lesion, how large it is and how much of it is predicted.

    Args:
        prediction: (X, Y, Z) bool.
        reference: (X, Y, Z) bool.
        spacing: voxel sides in mm, one an axis.
        ignore: (X, Y, Z) bool, removed from both; what it cuts apart becomes several lesions.

    Returns:
        One mapping a lesion, in the order of the volume: `volume_ml`; `found`, whether any voxel of it is predicted;
        `share`, the fraction of its voxels that are, from 0 to 1. Empty without lesions.

    Raises:
        ValueError: the masks are not bool or not of one shape, or `spacing` does not fit them.
    """
    sides = [float(side) for side in spacing]
    if len(sides) != reference.ndim or not all(side > 0 for side in sides):
        raise ValueError(f"expected {reference.ndim} positive voxel sides in mm, found {sides}")
    predicted, there = _cropped(*_kept(prediction, reference, ignore))
    voxel_ml = math.prod(sides) / 1000
    return [
        {"volume_ml": int(size) * voxel_ml, "found": bool(covered > 0), "share": int(covered) / int(size)}
        for size, covered in zip(*_overlaps(there, predicted), strict=True)
    ]


def _ratio(part: float, whole: float, *, empty: float) -> float:
    return float(part / whole) if whole else empty


def _cropped(prediction: Tensor, reference: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Both within their joint bounding box: lesions fill a small part of a volume, and labelling takes time."""
    from scipy.ndimage import find_objects

    predicted, there = prediction.cpu().numpy(), reference.cpu().numpy()
    boxes = find_objects((predicted | there).view(np.uint8))
    return (predicted[boxes[0]], there[boxes[0]]) if boxes else (predicted, there)


def _overlaps(mask: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each component of a mask, (components,) its number of voxels and how many of them lie in the other mask."""
    from scipy.ndimage import generate_binary_structure, label

    components, count = label(mask, generate_binary_structure(mask.ndim, _CONNECTIVITY))
    sizes = np.bincount(components[mask], minlength=count + 1)[1:]  # 0 is no component
    return sizes, np.bincount(components[mask & other], minlength=count + 1)[1:]
