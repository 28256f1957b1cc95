"""What a store records of a subject's arrays, and how it holds them."""

import numpy as np

__all__ = ["bounding_box", "statistics", "stored_type"]


def stored_type(image: np.ndarray) -> np.ndarray:
    """Half the bytes of float32 where nothing is lost by it, as in every BraTS release."""
    limits = np.iinfo(np.int16)
    whole = np.issubdtype(image.dtype, np.integer) or all(bool(np.all(c == np.rint(c))) for c in image)
    fits = whole and image.min() >= limits.min and image.max() <= limits.max
    return np.ascontiguousarray(image, dtype=np.int16 if fits else np.float32)


def bounding_box(brain: np.ndarray) -> list[list[int]]:
    """[[x0, x1], [y0, y1], [z0, z1]] around an (X, Y, Z) mask, ends exclusive; the whole volume where it is empty."""
    box = []
    for axis in range(3):
        inside = np.flatnonzero(brain.any(axis=tuple(a for a in range(3) if a != axis)))
        box.append([int(inside[0]), int(inside[-1]) + 1] if len(inside) else [0, brain.shape[axis]])
    return box


_OF_BRAIN = ("min", "max", "mean", "std", "p0_5", "q1", "q3", "p99_5", "clipped_mean", "clipped_std")
STATISTICS = (*_OF_BRAIN, "volume_min", "volume_max")


def statistics(volume: np.ndarray, brain: np.ndarray) -> dict[str, float]:
    """What a normalisation needs of one sequence, see `StoredSubject.statistics`.

    Args:
        volume: (X, Y, Z) as `stored_type` leaves it.
        brain: (X, Y, Z) bool; where it is empty, the whole volume counts.
    """
    values = volume[brain].astype(np.float64) if brain.any() else volume.ravel().astype(np.float64)
    low, q1, q3, high = np.percentile(values, [0.5, 25, 75, 99.5])
    clipped = np.clip(values, low, high)
    named = {
        "min": values.min(),
        "max": values.max(),
        "mean": values.mean(),
        "std": values.std(),
        "p0_5": low,
        "q1": q1,
        "q3": q3,
        "p99_5": high,
        "clipped_mean": clipped.mean(),
        "clipped_std": clipped.std(),
        "volume_min": volume.min(),
        "volume_max": volume.max(),
    }
    return {name: float(value) for name, value in named.items()}
