"""From a scan to unit intensities, and the median filter at the end (SPEC 5 a1: preprocessing, query).

The background is 0. A scan becomes codes, one for each distinct intensity, so that everything after this works on the
few thousand intensities and not on the million voxels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mrgen.errors import UserError

__all__ = ["Box", "Scaling", "Scan", "foreground_box", "median_per_slice", "preprocess", "quantile"]

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]

CODES = 2**16 - 1  # the most levels that a scan may have
NEGATIVE = 0.1  # share of a scan's voxels below 0 that cannot be ringing any more: the scan was standardised


@dataclass(frozen=True)
class Scaling:
    """How stored intensities become unit ones: 0 up to the background and above the cut, else over ``top``."""

    cut: float
    top: float

    def __call__(self, volume: np.ndarray) -> np.ndarray:
        """Float32 in [0, 1], of the shape of ``volume``."""
        unit = volume.astype(np.float32)
        unit[(unit <= 0) | (volume > np.float64(self.cut))] = 0
        unit /= np.float32(self.top)
        return unit


@dataclass(frozen=True)
class Scan:
    """A preprocessed scan.

    Attributes:
        codes: uint16, of the scan's shape: the place of each voxel's intensity in ``levels``; 0 is background.
        levels: unit intensity of each code, ascending where a code is in use.
        counts: voxels of each code.
        scaling: how the intensities were scaled.
        quantisation: how far, in units of the range, an intensity may have been moved; 0: not at all.
    """

    codes: np.ndarray
    levels: np.ndarray
    counts: np.ndarray
    scaling: Scaling
    quantisation: float


def preprocess(volume: np.ndarray, *, remove_outliers: bool, levels: int = 4096) -> Scan:
    """Min–max to 0..1; with the outlier step, intensities above Q3 + 1.5 · IQR of the foreground become background.

    The printed method standardises first, which changes neither what lies above the cut nor the min–max image, and is
    left out. The minimum is the background, 0: small negative intensities, which interpolation leaves at a brain's
    edge, count as background, since one such voxel would otherwise shift a whole scan.

    Whole numbers, and floats of which no two distinct ones are closer than about 1/65535 of the range, are kept as they
    are. Other floats are quantised into ``levels`` equal steps, each represented by the mean of its voxels: no
    intensity moves by 1/``levels`` of the range or more, and by no more does quantisation change the root of the least
    mean squared distance to k cluster means.

    Args:
        volume: intensities, 0 in the background.
        remove_outliers: the outlier step; the paper takes it for the source alone [C].
        levels: steps of a quantised scan.

    Raises:
        UserError: no foreground, values that are not finite, or a standardised scan.
    """
    top = float(volume.max()) if volume.size else 0.0
    if not np.isfinite(top):
        raise UserError("found NaN or infinite intensities, expected finite ones; mend the scan")
    if top <= 0:
        raise UserError("found no voxel above the background (0), expected a brain; check the scan and its mask")
    below, above = np.count_nonzero(volume < 0), np.count_nonzero(volume > 0)
    if below > NEGATIVE * (below + above):
        raise UserError(
            f"found {below / (below + above):.0%} of the non-zero voxels below 0, expected a background of 0 and a "
            "brain above it; take stored intensities or a min–max normalisation, not z-scores"
        )
    codes, values = _coded(volume, top)
    if values is not None:
        counts = np.bincount(codes.ravel(), minlength=len(values))
        counts[0] = 0
        cut = _cut(*quantile(values, counts, (0.25, 0.75))) if remove_outliers else float("inf")
        counts[values > cut] = 0
        last = np.flatnonzero(counts)[-1]  # there is one: Q3 itself stays
        codes[codes > last] = 0
        return Scan(codes, values / values[last], counts, Scaling(cut, float(values[last])), 0.0)
    cut = _cut(*np.quantile(volume[volume > 0], (0.25, 0.75))) if remove_outliers else float("inf")
    kept = np.where(volume <= np.float64(cut), volume, 0).clip(0).astype(np.float64)
    top = float(kept.max())
    codes = np.ceil(kept * (levels / top)).clip(0, levels).astype(np.uint16)
    counts = np.bincount(codes.ravel(), minlength=levels + 1)
    values = np.bincount(codes.ravel(), weights=kept.ravel(), minlength=levels + 1) / counts.clip(1)
    counts[0] = 0
    return Scan(codes, values / top, counts, Scaling(cut, top), 1 / levels)


def _coded(volume: np.ndarray, top: float) -> tuple[np.ndarray, np.ndarray | None]:
    """uint16 codes and the intensity of each; None for the intensities where codes cannot tell all of them apart."""
    if not np.issubdtype(volume.dtype, np.floating) and top <= CODES:
        return np.maximum(volume, 0).astype(np.uint16), np.arange(top + 1)
    foreground = volume > 0
    inside = volume[foreground].astype(np.float64)
    buckets = np.ceil(inside * (CODES / top)).clip(1, CODES).astype(np.uint16)
    values = np.zeros(CODES + 1)
    values[buckets] = inside
    codes = np.zeros(volume.shape, np.uint16)
    codes[foreground] = buckets
    return codes, values if np.array_equal(values[buckets], inside) else None


def _cut(q1: float, q3: float) -> float:
    return float(q3 + 1.5 * (q3 - q1))


def quantile(values: np.ndarray, counts: np.ndarray, q: Sequence[float]) -> np.ndarray:
    """``np.quantile`` of values, ascending where counted, that stand for ``counts`` voxels each."""
    last = counts.cumsum()
    place = np.asarray(q) * (last[-1] - 1)
    low, high = (values[np.searchsorted(last, side(place), side="right")] for side in (np.floor, np.ceil))
    return low + (high - low) * (place - np.floor(place))


def foreground_box(volume: np.ndarray, brain: np.ndarray | None) -> Box:
    """Around the voxels of an (X, Y, Z) volume that lie in the brain mask and above the background, ends exclusive.

    Where there are none it is the whole volume.
    """
    mask = volume > 0 if brain is None else (volume > 0) & brain
    plane: np.ndarray = np.any(mask, axis=2)
    x, y = _extent(np.any(plane, axis=1)), _extent(np.any(plane, axis=0))
    return x, y, _extent(np.any(mask[slice(*x), slice(*y)], axis=(0, 1)))


def _extent(line: np.ndarray) -> tuple[int, int]:
    inside = np.flatnonzero(line)
    return (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, len(line))


def median_per_slice(volume: np.ndarray) -> np.ndarray:
    """The 3×3 median of every axial slice (the last axis) of an (X, Y, Z) array, edges repeated.

    Each column of three is sorted once; the median of nine is then the median of the greatest of the three least, the
    median of the three middle ones and the least of the three greatest. Integers are fastest.
    """
    x, y, z = volume.shape
    padded = np.pad(volume, ((1, 1), (1, 1), (0, 0)), mode="edge").reshape(x + 2, (y + 2) * z)
    out = np.empty((x, y * z), volume.dtype)
    step = max(1, 2**17 // padded[0].nbytes)  # a slab and its neighbours stay in the processor's cache
    for i in range(0, x, step):
        slab = padded[i : i + step + 2]
        low, middle, high = _sorted3(slab[:-2], slab[1:-1], slab[2:])
        # A step along y is z elements further in the flattened row.
        left, centre, right = slice(None, -2 * z), slice(z, -z), slice(2 * z, None)
        greatest = np.maximum(np.maximum(low[:, left], low[:, centre]), low[:, right])
        least = np.minimum(np.minimum(high[:, left], high[:, centre]), high[:, right])
        out[i : i + step] = _median3(greatest, _median3(middle[:, left], middle[:, centre], middle[:, right]), least)
    return out.reshape(volume.shape)


def _sorted3(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    low, high = np.minimum(a, b), np.maximum(a, b)
    middle = np.minimum(high, c)
    return np.minimum(low, middle), np.maximum(low, middle), np.maximum(high, c)


def _median3(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return np.maximum(np.minimum(a, b), np.minimum(np.maximum(a, b), c))
