"""Lesions of a label map: mirrored, moved, enlarged, shrunk, or replaced by another patient's.

SAMR synthesises scans from such maps to train segmenters on (Guo et al., MICCAI 2020, section 3 and Figure 3). How they
were made stands in a supplement that is not available; what is here is a reading of the text and the figure.

A label map is a volume (X, Y, Z) or an axial slice (X, Y) of whole numbers in canonical orientation, x from left to
right. 0 is no lesion, 255 is ignored, every other class is lesion. The functions return a new map and leave the one
that they are given as it was.

- All classes take one way together, so that what lay inside another class still does.
- Lesions are written into the brain alone and never over 255, which stays where it is: it is not the lesion's, and
  what lies below it is not known. What would come to lie elsewhere is clipped.
- Where the lesion was, 0 is left, normal brain.
- What is impossible raises `UserError`: who asks for one manipulation is told why there is none. `manipulate`, which a
  training loop calls, tries another one instead and in the end returns the map as it is.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from mrgen.data.batch import IGNORED
from mrgen.errors import UserError

__all__ = ["KINDS", "enlarge", "manipulate", "mirror", "move", "shrink", "transplant"]

KINDS = ("mirror", "move", "enlarge", "shrink", "transplant")
LEAST = 0.5  # share of what was asked for that has to remain
PLACES = 20  # drawn for a lesion that goes elsewhere


def manipulate(
    label: np.ndarray,
    brain: np.ndarray,
    rng: np.random.Generator,
    *,
    kinds: Sequence[str] = KINDS,
    donors: Sequence[np.ndarray] = (),
) -> tuple[np.ndarray, str | None]:
    """One manipulation, each kind as likely as the others; where the one drawn is impossible, another.

    A map without lesion stays one, though lesions could be transplanted: manipulated slices are with and without lesion
    in the same shares as the real ones.

    Args:
        label: (X, Y, Z) or (X, Y) classes.
        brain: bool, of the same shape.
        rng: decides all that is drawn.
        kinds: which of `KINDS` to draw from.
        donors: label maps with lesions of other patients, see `transplant`; the one that is drawn is read, no other.

    Returns:
        The new map and what was done, one of `KINDS`; or a copy of the map and None where nothing was possible.

    Raises:
        UserError: a kind is unknown, there is none, or donors are lacking for `transplant`.
        ValueError: the arrays do not fit each other.
    """
    if not kinds or not set(kinds) <= set(KINDS):
        raise UserError(f"lesions: found the manipulations {list(kinds)}; expected one or more of {', '.join(KINDS)}")
    if "transplant" in kinds and not len(donors):
        raise UserError(
            "lesions: found no donors to transplant from; give other patients' labels or leave transplant out"
        )
    _check(label, brain)
    ways: dict[str, Callable[[], np.ndarray]] = {
        "mirror": lambda: mirror(label, brain),
        "move": lambda: move(label, brain, rng),
        "enlarge": lambda: enlarge(label, brain),
        "shrink": lambda: shrink(label, brain),
        "transplant": lambda: transplant(label, brain, donors[int(rng.integers(len(donors)))], rng),
    }
    if _lesion(label).any():
        for kind in (kinds[i] for i in rng.permutation(len(kinds))):
            try:
                return ways[kind](), kind
            except UserError:
                continue
    return label.copy(), None


def mirror(label: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """The lesion reflected into the other half of the brain.

    The plane goes through the brain's centre, between two voxels or through one, so that voxels fall on voxels: twice
    is the identity where nothing is clipped. A lesion across the plane stays across it.

    Args:
        label: (X, Y, Z) or (X, Y) classes.
        brain: bool, of the same shape.

    Raises:
        UserError: there is no lesion, or more than half of it would be clipped.
        ValueError: the arrays do not fit each other.
    """
    voxels, classes = _voxels(label, brain)
    voxels[:, 0] = round(2 * np.nonzero(brain)[0].mean()) - voxels[:, 0]
    return _written(label, brain, voxels, classes)


def move(label: np.ndarray, brain: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The lesion shifted by whole voxels, its centre to a place in the brain where no lesion was.

    Args:
        label: (X, Y, Z) or (X, Y) classes; in a volume the lesion moves along z, too.
        brain: bool, of the same shape.
        rng: draws places, of which the first is taken that clips least.

    Raises:
        UserError: there is no lesion, or more than half of it would be clipped wherever it was tried.
        ValueError: the arrays do not fit each other.
    """
    voxels, classes = _voxels(label, brain)
    places = _elsewhere(label, brain, rng)
    places = places[(places != _centre(voxels)).any(1)]  # a lesion that is hollow may have its centre outside
    return _written(label, brain, _placed(label, brain, voxels, places), classes)


def transplant(label: np.ndarray, brain: np.ndarray, donor: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another patient's lesion in place of the own: shape, size and direction are the donor's.

    It lies where the own one was, centre on centre, so that the two need not share a grid; where it would be clipped
    there, or where no lesion was, at other places of the brain as well.

    Args:
        label: (X, Y, Z) or (X, Y) classes, with or without lesion.
        brain: bool, of the same shape.
        donor: the other patient's classes, of any shape with as many axes and the same voxel size; 255 stays behind.
        rng: draws places, of which the first is taken that clips least.

    Raises:
        UserError: the donor has no lesion, or more than half of it would be clipped wherever it was tried.
        ValueError: the arrays do not fit each other.
    """
    _check(label, brain)
    if donor.ndim != label.ndim:
        raise ValueError(f"expected a donor with {label.ndim} axes as the label has, found {donor.shape}")
    lesion = _lesion(donor)
    if not lesion.any():
        raise UserError("lesions: the donor has no lesion to transplant; take another")
    places = _elsewhere(label, brain, rng)
    if len(own := np.argwhere(_lesion(label))):
        places = np.concatenate([_centre(own)[None], places])
    return _written(label, brain, _placed(label, brain, np.argwhere(lesion), places), donor[lesion])


def enlarge(label: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """The lesion at twice its area, see `_scaled` (the paper's "increasing tumor size to 100%", read as by 100 %).

    Args:
        label: (X, Y, Z) or (X, Y) classes. In a volume the area doubles in each axial slice, and so does the volume:
            networks of slices see what they see of enlarged slices. Along z the lesion reaches as far as before.
        brain: bool, of the same shape.

    Raises:
        UserError: there is no lesion, or the brain has no room for half of what is to be added.
        ValueError: the arrays do not fit each other.
    """
    return _scaled(label, brain, 2.0)


def shrink(label: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """The lesion at half its area, see `_scaled`.

    Args:
        label: (X, Y, Z) or (X, Y) classes. In a volume the area halves in each axial slice; none loses its last voxel.
        brain: bool, of the same shape.

    Raises:
        UserError: there is no lesion, or it is too small to lose half of what it should.
        ValueError: the arrays do not fit each other.
    """
    return _scaled(label, brain, 0.5)


def _scaled(label: np.ndarray, brain: np.ndarray, factor: float) -> np.ndarray:
    """The lesion at `factor` times its area in each axial slice.

    Each connected lesion is scaled in the plane about its own centroid, in a volume about the line along z through it;
    scaled about a common centre, several lesions would leave their places. In each slice those voxels of free brain
    become lesion that lie deepest in the scaled lesions or, where these are clipped, nearest to them: the lesion grows
    where there is room until its area is right. Voxels take the class of the place that they come from, those beyond
    the lesion the class of its nearest voxel. A class of a few scattered voxels may vanish.
    """
    from scipy.ndimage import find_objects
    from scipy.ndimage import label as components

    _voxels(label, brain)  # refuses what has no lesion
    old, room = (a.reshape(*a.shape[:2], -1) for a in (label, _room(label, brain)))  # (X, Y, Z)
    new = np.where(_lesion(old), 0, old).astype(label.dtype)
    outside = np.full(old.shape, np.inf, np.float32)  # distance to the scaled lesions, negative within
    origin = np.zeros_like(old)  # class of the place that a voxel comes from
    parts, _ = components(_lesion(old), structure=np.ones((3, 3, 3)))
    for i, (x, y, z) in enumerate(find_objects(parts), start=1):
        reach = 2 + max(x.stop - x.start, y.stop - y.start) // 2  # room to grow, along an edge of the brain too
        near_x, near_y = (slice(max(0, side.start - reach), side.stop + reach) for side in (x, y))
        centre = np.argwhere(parts[near_x, near_y, z] == i)[:, :2].mean(0)
        for k in range(z.start, z.stop):
            place = (near_x, near_y, k)
            if (part := parts[place] == i).any():
                distance, classes = _stretched(part, old[place], centre, math.sqrt(factor))
                closer = distance < outside[place]
                outside[place][closer], origin[place][closer] = distance[closer], classes[closer]
    area = _lesion(old).sum((0, 1))  # (z,)
    asked = np.floor(area * factor + 0.5).astype(int)
    for k, voxels in enumerate(asked):
        free = np.flatnonzero(room[..., k] & np.isfinite(outside[..., k]))
        taken = free[np.argsort(outside[..., k].flat[free], kind="stable")][:voxels]
        new[..., k].flat[taken] = origin[..., k].flat[taken]
    before, after = int(area.sum()), int(_lesion(new).sum())
    if abs(after - factor * before) > (1 - LEAST) * abs(factor - 1) * before:
        raise UserError(
            f"lesions: {before} voxels of lesion would become {after}, expected about {factor * before:g}; the brain "
            "has no room for more, or the lesion no voxels to lose; choose another manipulation or another subject"
        )
    return new.reshape(label.shape)


def _stretched(part: np.ndarray, classes: np.ndarray, centre: np.ndarray, stretch: float) -> tuple[np.ndarray, ...]:
    """A slice (x, y) of one lesion, stretched about a centre: the distance to it, negative within, and the classes."""
    from scipy.ndimage import distance_transform_edt, map_coordinates

    around = centre[:, None, None]
    source = around + (np.indices(part.shape) - around) / stretch  # (2, x, y): where a voxel comes from
    to_part, nearest = distance_transform_edt(~part, return_indices=True)
    distance = map_coordinates(to_part - distance_transform_edt(part), source, order=1, cval=np.inf) * stretch
    x, y = (np.clip(np.rint(s), 0, n - 1).astype(int) for s, n in zip(source, part.shape, strict=True))
    return distance, classes[tuple(nearest[:, x, y])]


def _elsewhere(label: np.ndarray, brain: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(places, axes): voxels of brain without lesion; none where there are none."""
    free = np.argwhere(_room(label, brain) & (label == 0))
    return free[rng.integers(len(free), size=PLACES)] if len(free) else free


def _placed(label: np.ndarray, brain: np.ndarray, voxels: np.ndarray, places: np.ndarray) -> np.ndarray:
    """(voxels, axes): a lesion with its centre at the first of the places that clip least."""
    if not len(places):
        raise UserError("lesions: no voxel of brain is free of lesion; choose another manipulation or another subject")
    room = _room(label, brain)
    return max((voxels + place - _centre(voxels) for place in places), key=lambda moved: _fitting(moved, room).sum())


def _written(label: np.ndarray, brain: np.ndarray, voxels: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """The map with the lesion at other voxels, clipped, instead of where it was."""
    fitting = _fitting(voxels, _room(label, brain))
    if fitting.mean() < LEAST:
        raise UserError(
            f"lesions: {fitting.mean():.0%} of the lesion would lie in the brain there, expected {LEAST:.0%} or more; "
            "choose another manipulation or another subject"
        )
    written = np.where(_lesion(label), 0, label).astype(label.dtype)
    written[tuple(voxels[fitting].T)] = classes[fitting]
    return written


def _fitting(voxels: np.ndarray, room: np.ndarray) -> np.ndarray:
    """(voxels,) bool: which lie where a lesion may."""
    inside = np.all((voxels >= 0) & (voxels < room.shape), axis=1)
    inside[inside] = room[tuple(voxels[inside].T)]
    return inside


def _voxels(label: np.ndarray, brain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(voxels, axes) of the lesion and (voxels,) their classes."""
    _check(label, brain)
    lesion = _lesion(label)
    if not lesion.any() or not brain.any():
        lacking = "brain is empty" if lesion.any() else "label holds no lesion"
        raise UserError(f"lesions: the {lacking}, expected both to manipulate; choose another slice or subject")
    return np.argwhere(lesion), label[lesion]


def _centre(voxels: np.ndarray) -> np.ndarray:
    return np.rint(voxels.mean(0)).astype(int)


def _lesion(label: np.ndarray) -> np.ndarray:
    return np.logical_and(label > 0, label != IGNORED)


def _room(label: np.ndarray, brain: np.ndarray) -> np.ndarray:
    return brain & (label != IGNORED)


def _check(label: np.ndarray, brain: np.ndarray) -> None:
    if label.shape != brain.shape or label.ndim not in (2, 3) or brain.dtype != bool or label.dtype.kind not in "iu":
        raise ValueError(
            "expected whole numbers (X, Y, Z) or (X, Y) and a bool brain of the same shape, found "
            f"{label.dtype} {label.shape} and {brain.dtype} {brain.shape}"
        )
