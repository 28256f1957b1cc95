"""Where false positives of white matter hyperintensities lie, and whether they widen a true lesion or stand apart.

Orbes-Arteaga et al. (section 3.2) see them in pictures "on the border of periventricular lesions" and "near to cortical
areas". These are rules that count them, on a T1 alone and without an atlas: coarse, but the same for every method.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mrgen.metrics.segmentation import _kept

__all__ = ["false_positive_volumes", "places"]

NEAR_VENTRICLES = 10.0  # mm, the usual rule that parts periventricular from deep white matter lesions
NEAR_SURFACE = 10.0  # mm
NEAR_LESION = 3.0  # mm
VENTRICLE_DEPTH = 20.0  # mm below the brain's surface: fluid that is nearer lies in sulci
VENTRICLE_RADIUS = 2.5  # mm, of the ball that fits in: fissures between the hemispheres are deep too, but narrow
VENTRICLE_ML = 0.5
SAMPLE = 20_000  # voxels that the tissue classes are fitted on
_ROUNDING = 1e-3  # mm: sides of 3 mm in a file's header may be 3.0000002


def places(t1: Tensor, brain: Tensor, spacing: Sequence[float]) -> dict[str, Tensor]:
    """Parts a volume into what is near the ventricles, what is near the brain's surface, and what lies deep between.

    Ventricles are the darkest of three classes of the T1, where that is deep, wide and large enough. The fourth
    ventricle and wide cisterns in the midline come with them; with voxels above 2.5 mm parts of fissures do too, since
    the width of a single voxel then passes. Where the field of view cuts the brain there is no surface.

    Args:
        t1: (X, Y, Z) of any scale, best corrected for its bias field, as the WMH challenge's are.
        brain: (X, Y, Z) bool; its holes count as brain.
        spacing: voxel sides in mm, one an axis.

    Returns:
        Bool masks (X, Y, Z) of which each voxel is in one: `periventricular`, brain within 10 mm of the ventricles (and
        these), empty where none are found; `cortical`, the rest within 10 mm of the brain's surface, and all that is
        not brain; `deep`, the rest.

    Raises:
        ValueError: the two are not of one shape, `brain` is not bool, or `spacing` does not fit them.
    """
    if t1.shape != brain.shape or brain.ndim != 3 or brain.dtype != torch.bool:
        raise ValueError(
            "expected a T1 and a bool brain mask, both (X, Y, Z), found "
            f"{tuple(t1.shape)} and {brain.dtype} {tuple(brain.shape)}"
        )
    sides = _sides(spacing)
    periventricular, deep = (np.zeros(brain.shape, dtype=bool) for _ in range(2))
    if brain.any():
        from scipy.ndimage import binary_fill_holes

        mask = brain.cpu().numpy()
        box = _box(mask, margin=1)  # the layer around the brain is where its surface is
        inside = binary_fill_holes(mask[box])
        depth = _distance(~inside, sides)
        ventricles = _ventricles(t1.detach().cpu().numpy()[box], inside, depth, sides)
        periventricular[box] = inside & (_distance(ventricles, sides) <= NEAR_VENTRICLES + _ROUNDING)
        deep[box] = ~periventricular[box] & (depth > NEAR_SURFACE + _ROUNDING)
    masks = {"periventricular": periventricular, "cortical": ~(periventricular | deep), "deep": deep}
    return {name: torch.from_numpy(mask).to(brain.device) for name, mask in masks.items()}


def false_positive_volumes(
    prediction: Tensor,
    reference: Tensor,
    places: Mapping[str, Tensor],
    spacing: Sequence[float],
    ignore: Tensor | None = None,
) -> dict[str, float]:
    """False positives by place, those at a lesion's border and those apart.

    Args:
        prediction: (X, Y, Z) bool.
        reference: (X, Y, Z) bool.
        places: (X, Y, Z) bool masks by name, see the function of that name.
        spacing: voxel sides in mm, one an axis.
        ignore: (X, Y, Z) bool, true where a voxel is removed from both.

    Returns:
        Millilitres, two for each place: `fp_{place}_border`, within 3 mm of a voxel of a reference lesion (centre to
        centre), and `fp_{place}_apart`, the others.

    Raises:
        ValueError: the masks are not bool or not of one shape, or `spacing` does not fit them.
    """
    sides = _sides(spacing)
    for mask in places.values():
        _kept(prediction, mask, None)  # refuses what does not fit
    predicted, there = (mask.cpu().numpy() for mask in _kept(prediction, reference, ignore))
    false, border = predicted & ~there, np.zeros(there.shape, dtype=bool)
    if there.any():
        box = _box(predicted | there, margin=0)
        border[box] = _distance(there[box], sides) <= NEAR_LESION + _ROUNDING
    voxel_ml = math.prod(sides) / 1000
    volumes = {}
    for name, mask in places.items():
        here = false & mask.cpu().numpy()
        volumes[f"fp_{name}_border"] = int(np.count_nonzero(here & border)) * voxel_ml
        volumes[f"fp_{name}_apart"] = int(np.count_nonzero(here & ~border)) * voxel_ml
    return volumes


def _ventricles(t1: np.ndarray, inside: np.ndarray, depth: np.ndarray, sides: Sequence[float]) -> np.ndarray:
    """(X, Y, Z) bool, within the brain; empty where there are none."""
    from scipy.ndimage import label

    fluid = _distance(~_darkest(t1, inside), sides)
    # An opening: what lies within the radius of where a ball of the radius fits.
    wide = (fluid > 0) & (_distance(fluid > VENTRICLE_RADIUS, sides) <= VENTRICLE_RADIUS)
    parts, _ = label(wide & (depth > VENTRICLE_DEPTH))
    volumes = np.bincount(parts.ravel()) * math.prod(sides) / 1000  # ml
    volumes[0] = 0  # what is no part
    return (volumes > VENTRICLE_ML)[parts]


def _darkest(t1: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """(X, Y, Z) bool, the darkest of three Gaussian classes of the brain; empty where there are not three values."""
    from sklearn.mixture import GaussianMixture

    values = t1[inside].astype(np.float64)
    sample = np.random.default_rng(0).choice(values, min(SAMPLE, values.size), replace=False)
    dark = np.zeros(inside.shape, dtype=bool)
    if len(np.unique(sample)) < 3:
        return dark
    # With one variance for all, classes are intervals; a wide class of its own variance takes grey matter as well.
    centre, spread = sample.mean(), sample.std()
    classes = GaussianMixture(3, covariance_type="tied", random_state=0).fit(((sample - centre) / spread)[:, None])
    dark[inside] = classes.predict(((values - centre) / spread)[:, None]) == classes.means_.argmin()
    return dark


def _distance(mask: np.ndarray, sides: Sequence[float]) -> np.ndarray:
    """(X, Y, Z) from each voxel to the nearest of the mask, mm; inf where the mask is empty."""
    from scipy.ndimage import distance_transform_edt

    return distance_transform_edt(~mask, sampling=sides) if mask.any() else np.full(mask.shape, np.inf)


def _box(mask: np.ndarray, *, margin: int) -> tuple[slice, ...]:
    """The bounding box and a margin, as far as the volume goes; the mask is not empty."""
    from scipy.ndimage import find_objects

    found = find_objects(mask.view(np.uint8))[0]
    return tuple(slice(max(0, side.start - margin), side.stop + margin) for side in found)


def _sides(spacing: Sequence[float]) -> list[float]:
    sides = [float(side) for side in spacing]
    if len(sides) != 3 or not all(side > 0 for side in sides):
        raise ValueError(f"expected 3 positive voxel sides in mm, found {sides}")
    return sides
