"""Random lesion labels for synthetic cohorts: "the original set of labels", randomly changed (Qu et al., section 2.8).

Two operations of those that the authors' code chooses from: rotate, flip, shift by 2 to 5 pixels, shrink by 2 to 7.
"""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import affine_transform

from mrgen.errors import UserError

__all__ = ["OPERATIONS", "RandomLabel", "random_label"]

OPERATIONS = ("rotate", "flip", "shift", "shrink")
AT_ONCE = 2  # operations on a label
SHIFT, SHRINK = (2, 5), (2, 7)  # pixels, ends included
TRIES = 200


@dataclass(frozen=True)
class RandomLabel:
    """A label that was changed.

    Attributes:
        label: (X, Y), classes.
        source: the place of the label that it was, in what it was drawn from.
        operations: what was done, in this order.
    """

    label: np.ndarray
    source: int
    operations: tuple[str, ...]


def random_label(pool: np.ndarray, rng: np.random.Generator) -> RandomLabel:
    """One of the labels after two different operations; its lesion is neither lost nor cut at the border.

    Both are one map of the plane, so that pixels are looked up once, the nearest one.

    Args:
        pool: (K, X, Y) classes, every one with a lesion.
        rng: draws the label, the operations and how far they go; anew where the lesion was lost or cut.

    Raises:
        UserError: every lesion that was drawn was lost or cut: it fills the slice, or is hardly a pixel.
    """
    size = np.array(pool.shape[1:])
    for _ in range(TRIES):
        source = int(rng.integers(len(pool)))
        operations = tuple(OPERATIONS[k] for k in rng.choice(len(OPERATIONS), AT_ONCE, replace=False))
        matrix, offset = np.eye(2), np.zeros(2)
        for operation in operations:
            turn, move = _drawn(operation, size, rng)
            matrix, offset = turn @ matrix, turn @ offset + move
        changed = _changed(pool[source], matrix, offset)
        if changed is not None:
            return RandomLabel(changed, source, operations)
    raise UserError(
        f"{TRIES} random labels had lesions that were cut at the border of the slice or lost; expected lesions of some "
        "pixels that leave room around them: enlarge data.sampling.size, or train on slices with such lesions"
    )


def _drawn(operation: str, size: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(2, 2) and (2,): where an operation takes a pixel, as seen from the middle of the slice."""
    still = np.zeros(2)
    if operation == "rotate":
        cos, sin = np.cos(angle := rng.uniform(0, 2 * np.pi)), np.sin(angle)
        return np.array([[cos, -sin], [sin, cos]]), still
    if operation == "flip":
        return np.diag([-1.0, 1.0] if rng.integers(2) else [1.0, -1.0]), still
    if operation == "shift":
        return np.eye(2), rng.integers(SHIFT[0], SHIFT[1], size=2, endpoint=True) * rng.choice([-1, 1], size=2)
    return np.diag(1 - rng.integers(SHRINK[0], SHRINK[1], endpoint=True) / size), still


def _changed(label: np.ndarray, matrix: np.ndarray, offset: np.ndarray) -> np.ndarray | None:
    """The label after a map of the plane; None where its lesion is lost or cut."""
    size = np.array(label.shape)
    middle = (size - 1) / 2
    there = (np.argwhere(label) - middle) @ matrix.T + offset + middle  # (pixels, 2)
    if np.any(there < -0.5) or np.any(there > size - 0.5):
        return None
    back = np.linalg.inv(matrix)  # SciPy asks where a pixel comes from
    changed = affine_transform(label, back, middle - back @ (middle + offset), order=0, prefilter=False)
    return changed if changed.any() else None
