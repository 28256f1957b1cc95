"""Axial slices, for networks of two dimensions."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from mrgen.data.crops import Box, BrainBox, centred_box
from mrgen.data.store import StoredSubject
from mrgen.errors import UserError

__all__ = ["AxialSlice", "SiteSlices"]


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


class SiteSlices:
    """All axial slices of a scan, cut or padded to one size as Li et al. do for each site of WMH 2017.

    Slices are cut around their middle, but those of a site named in ``front`` more in front than behind. Axes that are
    too short are padded on both sides. An epoch shows every slice once but the outermost ones, which hold no lesions.

    Li et al. cut rows 46 to 246 of GE3T's 256. What is at the start of the array is not said; here it is the front,
    because the brain lies behind the middle of a head, and so long a piece behind would take its occipital lobe.

    Args:
        size: voxels along x and y.
        front: by site, the share of the surplus along y that is cut in front.
        front_elsewhere: the same of all other sites; None: half.
        dropped: by site, the share of the slices that is left out at each end in training.
        dropped_elsewhere: the same of all other sites; or a pair of shares, below and above.
        zeroed: share of the slices at each end in which no lesion is predicted at test, rounded up as Li et
            al. do; or such a pair, rounded as those of training are.
        step: training shows every so many slices, where neighbours are all but copies of each other.
    """

    divisor = 1
    smallest = 16  # pixels that Li's network needs
    cut = 0.05  # of a brain's voxels that a cut may lose

    def __init__(
        self,
        size: Sequence[int] = (200, 200),
        front: Mapping[str, float] | None = None,
        dropped: Mapping[str, float] | None = None,
        dropped_elsewhere: float | Sequence[float] = 0.0,
        zeroed: float | Sequence[float] = 0.0,
        step: int = 1,
        front_elsewhere: float | None = None,
    ):
        if len(size) != 2 or min(size) < self.smallest:
            raise UserError(
                f"data.sampling.size is {list(size)}; expected two numbers from {self.smallest} on, along x and y"
            )
        self.size: tuple[int, ...] = (int(size[0]), int(size[1]))
        self.front, self.dropped = dict(front or {}), dict(dropped or {})
        self.front_elsewhere = front_elsewhere
        pairs = {"dropped_elsewhere": dropped_elsewhere, "zeroed": zeroed}
        self.dropped_elsewhere, self.zeroed = (_ends(name, share) for name, share in pairs.items())
        self.rounded_up = not isinstance(zeroed, Sequence)
        if step < 1:
            raise UserError(f"data.sampling.step is {step}; expected a whole number from 1 on")
        self.step = step
        elsewhere = [] if front_elsewhere is None else [front_elsewhere]
        alike = [share for share in pairs.values() if not isinstance(share, Sequence)]
        shares = {"front": [*self.front.values(), *elsewhere], "dropped": [*self.dropped.values(), *alike]}
        for name, most in (("front", 1.0), ("dropped", 0.5)):
            if any(not 0 <= share <= most for share in shares[name]):
                raise UserError(f"data.sampling: shares of {name} are {shares[name]}; expected 0 to {most:g}")

    def fit(self, subjects: Iterable[StoredSubject]) -> None:
        """Raises UserError for a subject that would lose a twentieth of its brain or all slices."""
        for subject in subjects:
            (x0, x1), (y0, y1), _ = self.box(subject.shape, subject.site)
            brain = subject.read_brain()
            kept = brain[max(x0, 0) : x1, max(y0, 0) : y1].sum() / max(brain.sum(), 1)
            if brain.any() and kept < 1 - self.cut:
                raise UserError(
                    f"{subject.id}: slices of {subject.shape[0]} × {subject.shape[1]} voxels, cut to "
                    f"data.sampling.size={list(self.size)}, lose {1 - kept:.0%} of the brain; enlarge the size, or set "
                    "data.sampling.front for the site"
                )
            left = {
                "dropped": self.training(subject.shape, subject.site),
                "zeroed": self.tested(subject.shape),
            }
            if none := [name for name, slices in left.items() if not len(slices)]:
                raise UserError(
                    f"{subject.id}: data.sampling.{none[0]} leaves none of its {subject.shape[2]} slices; lower it"
                )

    def box(self, shape: Sequence[int], site: str | None) -> Box:
        """Where a scan's slices are cut; may exceed the scan.

        Args:
            shape: (X, Y, Z) in canonical orientation: x to the right, y to the front.
            site: where it was scanned.
        """
        (x, y, z), (wide, long) = shape[:3], self.size
        surplus = y - long
        front = -(-surplus // 2)  # so that an odd voxel is cut where `Gaussian` and x cut it
        share = self.front.get(site or "", self.front_elsewhere)
        if surplus > 0 and share is not None:
            front = round(surplus * share)
        left, back = (x - wide) // 2, surplus - front
        return (left, left + wide), (back, back + long), (0, z)

    def training(self, shape: Sequence[int], site: str | None) -> range:
        """The slices of a scan that training shows."""
        share = self.dropped.get(site or "")
        below, above = (round(shape[2] * end) for end in (self.dropped_elsewhere if share is None else (share, share)))
        return range(below, shape[2] - above, self.step)

    def tested(self, shape: Sequence[int]) -> range:
        """The slices of a scan in which lesions may be predicted."""
        ends = [round(shape[2] * end, 6) for end in self.zeroed]
        below, above = (math.ceil(end) if self.rounded_up else round(end) for end in ends)
        return range(below, shape[2] - above)


def _ends(name: str, share: float | Sequence[float]) -> tuple[float, float]:
    """The shares below and above. Raises UserError for what is no pair of shares that leaves something between."""
    if not isinstance(share, Sequence):
        return share, share
    if len(share) != 2 or min(share) < 0 or sum(share) >= 1:
        raise UserError(
            f"data.sampling.{name} is {list(share)}; expected one share, or two, below and above, from 0 on and "
            "together below 1"
        )
    return share[0], share[1]
