"""Axial slices, for networks of two dimensions."""

from collections.abc import Iterable, Sequence

import numpy as np

from mrgen.data.crops import Box, BrainBox, centred_box
from mrgen.data.store import StoredSubject
from mrgen.errors import UserError

__all__ = ["AxialSlice"]


class AxialSlice:
    """A random axial slice that holds brain, in a box of one size for the whole cohort, centred on each brain's box.

    Its samples have no z: image (C, X, Y), label and brain (X, Y).

    Args:
        size: voxels along x and y; None takes the smallest that hold every brain.
        divisor: both are multiples of this; a U-Net of n downsamplings needs 2^n.
    """

    def __init__(self, size: Sequence[int] | None = None, divisor: int = 8):
        if size is not None and (len(size) != 2 or any(n <= 0 or n % divisor for n in size)):
            raise UserError(
                f"data.sampling.size is {list(size)}; expected two multiples of {divisor} (data.sampling.divisor), "
                "along x and y, or null to fit the cohort"
            )
        self.size: tuple[int, ...] | None = None if size is None else tuple(int(n) for n in size)
        self.divisor = divisor

    def fit(self, subjects: Iterable[StoredSubject]) -> None:
        """Finds the size where none was given. Raises UserError where a brain does not fit into the given one."""
        whole = BrainBox(divisor=self.divisor)
        whole.fit(subjects)
        assert whole.size is not None
        needed = whole.size[:2]
        if self.size is None:
            self.size = needed
        elif any(n < least for n, least in zip(self.size, needed, strict=True)):
            raise UserError(
                f"data.sampling.size is {self.size} and would cut brains, which need {needed}; enlarge it, or set "
                "data.sampling.size=null to fit the cohort"
            )

    def __call__(self, subject: StoredSubject, rng: np.random.Generator) -> Box:
        assert self.size is not None, "fit() comes first"
        x, y, (low, high) = subject.brain_box
        for _ in range(1000):  # a brain may have gaps
            z = int(rng.integers(low, high))
            if subject.read_brain((x, y, (z, z + 1))).any():
                break
        x, y, _ = centred_box(subject.brain_box, (*self.size, 1))
        return x, y, (z, z + 1)
