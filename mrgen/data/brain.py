"""Where the brain is: one mask a subject, from the intensities of all its sequences."""

from collections.abc import Sequence

import numpy as np


def find_brain(
    volumes: Sequence[np.ndarray], spacing: Sequence[float], *, skull_stripped: bool
) -> tuple[np.ndarray, np.ndarray, str]:
    """The brain of a subject.

    Args:
        volumes: one (X, Y, Z) array for each sequence, on one grid, of any scale.
        spacing: voxel sides in mm.
        skull_stripped: whether everything but the brain was removed from the scans.

    Returns:
        The mask, (X, Y, Z) bool; the region in which labels may lie, likewise (the head, where there is one); and how
        the mask was found: `background` (all that differs from it), `head` (freed of skull and scalp), `head_filled`
        (everything inside the head, where the brain could not be told from the rest).
    """
    if skull_stripped:
        brain = _not_background(volumes)
        return brain, brain, "background"
    head = _head(volumes)
    brain = _brain_in_head(volumes, spacing, head)
    if brain.sum() < 0.2 * head.sum():
        return head, head, "head_filled"
    return brain, head, "head"


def why_no_brain(mask: np.ndarray, volumes: Sequence[np.ndarray], *, skull_stripped: bool) -> str | None:
    """Why a mask that somebody made cannot be of this brain: flipped, of another subject, of the whole grid.

    Args:
        mask: (X, Y, Z) bool.
        volumes: one (X, Y, Z) array for each sequence, on the mask's grid.
        skull_stripped: whether everything but the brain was removed from the scans.

    Returns:
        What was found, what was expected and what to do; None for a mask that may be right.
    """
    if mask.mean() > 0.95:
        return f"found a mask of {mask.mean():.0%} of the grid, expected the brain alone; make it again"
    levels = [background(volume) for volume in volumes]
    pairs = zip(volumes, levels, strict=True)
    scanned = np.any([np.abs(volume - np.float32(level)) > tolerance for volume, (level, tolerance) in pairs], axis=0)
    inside = float(scanned[mask].mean())
    held = float(mask[scanned].mean()) if scanned.any() else 0.0
    if inside < 0.5 or (skull_stripped and held < 0.5):
        return (
            f"found a mask of which {inside:.0%} is no background, and which holds {held:.0%} of what is none, "
            "expected this subject's brain; is it another's, or flipped?"
        )
    return None


def _not_background(volumes: Sequence[np.ndarray]) -> np.ndarray:
    """At least half of the sequences differ from their background; large connected parts, holes filled.

    Half, because a mask of one sequence may be cut (field of view) or frayed (interpolation) where others are not;
    holes, because fluid may be as dark as the background.
    """
    votes = np.zeros(volumes[0].shape, dtype=np.uint8)
    for volume in volumes:
        level, tolerance = background(volume)
        above = volume > level + tolerance
        below = volume < level - tolerance
        # After z-scoring much of a brain is as far below a background of 0 as the rest is above it. Ringing of an
        # interpolation at the brain's edge is below it too, but little, and no brain.
        signed = _mass(volume, below, level) > 0.1 * _mass(volume, above, level)
        votes += above | below if signed else above
    return _large_parts_filled(2 * votes >= len(volumes))


def _mass(volume: np.ndarray, where: np.ndarray, level: float) -> float:
    return float(np.abs(volume[where].astype(np.float64) - level).sum())


def background(volume: np.ndarray) -> tuple[float, float]:
    """The intensity of the background, which need not be 0, and how far a voxel may be from it and still belong to it.

    The level is the commonest value of the volume's six faces, or, where noise makes none common, their median. The
    tolerance is 0.5 % of the range of the rest, or more where the faces are noisy.
    """
    faces = np.concatenate([volume[[0, -1]].ravel(), volume[:, [0, -1]].ravel(), volume[:, :, [0, -1]].ravel()])
    values, counts = np.unique(faces, return_counts=True)
    level = float(values[counts.argmax()])
    if counts.max() < 0.2 * faces.size:
        values, counts = np.unique(volume, return_counts=True)  # a crop whose faces cut through the brain
        level = float(values[counts.argmax()] if counts.max() > 0.05 * volume.size else np.median(faces))
    near = np.abs(faces - level)
    noise = 1.4826 * float(np.median(near)) if (near > 0).mean() > 0.2 else 0.0
    sample = np.abs(volume[::2, ::2, ::2].astype(np.float32) - level)
    sample = sample[sample > 4 * noise]
    return level, max(0.005 * float(np.percentile(sample, 99)) if sample.size else 0.0, 4 * noise)


def _head(volumes: Sequence[np.ndarray]) -> np.ndarray:
    """Tissue in any sequence, holes filled: everything inside the skin."""
    from scipy.ndimage import binary_closing

    tissue = np.any([volume > 0.5 * _otsu(volume) for volume in volumes], axis=0)
    return _large_parts_filled(binary_closing(tissue, iterations=1) | tissue, by_slice=True)


def _brain_in_head(volumes: Sequence[np.ndarray], spacing: Sequence[float], head: np.ndarray) -> np.ndarray:
    """Opening: what is thicker than 8 mm and largest is brain; scalp and eyes are thinner and apart.

    Skull and fluid are dark in T1 and in FLAIR, which parts the brain from the scalp. The core is grown back into the
    tissue around it; closing by 5 mm and filling take sulci and ventricles in.
    """
    from scipy.ndimage import binary_opening, distance_transform_edt

    tissue = sum((volume > _otsu(volume)).astype(np.uint8) for volume in volumes) * 2 > len(volumes)
    core = _largest(distance_transform_edt(tissue, sampling=spacing) > 4)
    if not core.any():
        return core
    brain = (distance_transform_edt(~core, sampling=spacing) <= 6) & tissue
    near = np.pad(distance_transform_edt(~brain, sampling=spacing) <= 5, 1)
    closed = (distance_transform_edt(near, sampling=spacing) > 5)[1:-1, 1:-1, 1:-1]
    return _large_parts_filled(binary_opening((closed | brain) & head), by_slice=True)


def _otsu(volume: np.ndarray) -> float:
    """The threshold that parts air from tissue best (largest variance between the two)."""
    low, high = np.percentile(volume[::2, ::2, ::2], [0.5, 99.5])
    counts, edges = np.histogram(np.clip(volume, low, high), bins=256)
    centres, weight = (edges[1:] + edges[:-1]) / 2, counts.cumsum()
    total, mass = weight[-1], (counts * centres).cumsum()
    below, above = weight[:-1], total - weight[:-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (mass[:-1] / below - (mass[-1] - mass[:-1]) / above) ** 2
    return float(edges[1:-1][np.nan_to_num(between).argmax()])


def _largest(mask: np.ndarray) -> np.ndarray:
    from scipy.ndimage import label

    parts, n = label(mask)
    return parts == np.bincount(parts.ravel())[1:].argmax() + 1 if n else mask


def _large_parts_filled(mask: np.ndarray, *, by_slice: bool = False) -> np.ndarray:
    """Connected parts of at least a tenth of the largest, with their holes filled."""
    from scipy.ndimage import binary_fill_holes, find_objects, label

    box = find_objects(mask.astype(np.uint8))
    if not box:
        return mask
    inside = mask[box[0]]
    parts, _ = label(inside)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    kept = binary_fill_holes((sizes >= 0.1 * sizes.max())[parts])
    if by_slice:  # ventricles open downwards, but in an axial slice they are closed
        kept = np.stack([binary_fill_holes(kept[:, :, z]) for z in range(kept.shape[2])], axis=2)
    whole = np.zeros_like(mask)
    whole[box[0]] = kept
    return whole
