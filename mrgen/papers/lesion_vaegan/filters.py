"""What a synthetic slice of the lesion VAE-GAN has to pass: Algorithm 3, and segmentors that agree (section 2.8)."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.ndimage import binary_fill_holes, convolve
from torch import Tensor

from mrgen.errors import UserError
from mrgen.metrics.segmentation import index_dice, index_mse

__all__ = ["Selection", "agreement", "filled_outside", "outline_error"]

BLUR = np.outer([1, 2, 1], [1, 2, 1]) / 16  # OpenCV's Gaussian of 3 × 3
# Of a blurred map, ours: the least line and its neighbours are above it, and so is a gap of one pixel in it.
LINE = 0.2


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What a slice has to pass; ``conf/synthesize.yaml`` says where the numbers come from.

    Attributes:
        outline_error: the most that MASK and the filled outline of a structure map may differ, see ``outline_error``.
        realness: maps pass as well whose mean of D_f is so high; None leaves that out.
        map_tries: structure maps for each slice, on average over a subject, after which no further ones are drawn.
        label_tries: random labels that are tried on each map.
        dice: the least mean Dice of what the segmentors find, see ``agreement``.
        dice_tries: slices made for each that is wanted, on average over a subject, after which no further ones are.
        best: in place of ``dice``: this share of the slices is kept, those with the highest Dice.

    What is drawn depends on all but ``map_tries`` and ``dice_tries``, which say when to give up.

    Raises:
        UserError: a number out of its range.
    """

    outline_error: float = 0.048
    realness: float | None = 0.85
    map_tries: int = 50
    label_tries: int = 50
    dice: float = 0.95
    dice_tries: int = 20
    best: float | None = None

    def __post_init__(self) -> None:
        for name in ("map_tries", "label_tries", "dice_tries"):
            if type(number := getattr(self, name)) is not int or number < 1:
                raise UserError(f"selection.{name} is {number!r}; expected a whole number from 1 on")
        ranges = {"outline_error": "from 0 to 1", "dice": "from 0 to 1", "best": "above 0 and up to 1, or null"}
        for name, expected in (*ranges.items(), ("realness", "such as 0.85, or null")):
            number = getattr(self, name)
            if number is None and expected.endswith("null"):
                continue
            within = _is_number(number) and (name == "realness" or 0 <= number <= 1)
            if not within or (name == "best" and number == 0):
                raise UserError(f"selection.{name} is {number!r}; expected a number {expected}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def filled_outside(maps: Tensor) -> Tensor:
    """The mask of structure maps without a network: blur, threshold, fill the outer contours, invert (Algorithm 3).

    Args:
        maps: (n, 1, X, Y), 1 on edges.

    Returns:
        (n, 1, X, Y) float32 on the processor, 1 outside. Where the brain's contour is open, nothing is filled.
    """
    lines = [convolve(f, BLUR, mode="constant") > LINE for f in maps[:, 0].float().cpu().numpy()]
    inside = np.stack([binary_fill_holes(line) for line in lines])
    return torch.from_numpy(~inside).float()[:, None]


def outline_error(maps: Tensor, mask: Tensor) -> Tensor:
    """(n,) mean absolute error between MASK (n, 1, X, Y) and ``filled_outside``.

    The paper prints that maps are drawn again while it is at most the threshold. Its text and the authors' code mean
    the opposite: a map is used where its error is low.
    """
    return (filled_outside(maps) - mask.float().cpu()).abs().mean(dim=(1, 2, 3))


def agreement(found: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Dice and mean squared error of label numbers, (n,) each: the mean over the sequences.

    Args:
        found: (n, C, X, Y), what the segmentors find in every sequence.
        labels: (n, X, Y), what the slices were made from.
    """
    asked = labels[:, None].expand_as(found).flatten(0, 1)
    scores = (score(found.flatten(0, 1), asked).view(found.shape[:2]) for score in (index_dice, index_mse))
    dice, mse = (score.mean(dim=1).cpu() for score in scores)
    return dice, mse
