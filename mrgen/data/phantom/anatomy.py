"""A subject's healthy anatomy: the MNI152 maps of the nilearn wheel, bent into somebody's own head.

The template is symmetric and an average. What makes a subject of it: an affine scaling, a random warp without symmetry
at three scales (lobes, gyri, folds), ventricles and sulci of a size of one's own, and a tumour's mass effect.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from mrgen.data.phantom.grid import FloatArray, Grid, lattice_grid, smooth_noise, spline

PAD = 24  # mm of air around the template: room for a skull
MNI_CENTRE = np.array([0.0, -17.0, 5.0])  # middle of the MNI152 brain's extent, mm
MNI_ORIGIN = np.array([-98.0, -134.0, -72.0]) - PAD  # of the padded 1 mm maps
# MNI152 is larger than a head, above all in height; these bring it to the size that BraTS has in SRI24 (1.6 l)
HEAD_SIZE = np.array([0.99, 0.97, 0.84])
WARP_KNOT = 5.0  # mm between the warp's control points


@dataclass(frozen=True)
class Atlas:
    """The template, padded, float32: tissue (245, 281, 237) at 1 mm, all else (123, 141, 119) at 2 mm.

    Args:
        gm: grey matter fraction.
        wm: white matter fraction.
        depth: distance to the brain's surface in mm, positive inside.
        ventricle: distance to the ventricles in mm, negative inside.
        swell: (3, …) direction in which the ventricles open, at most 1.
    """

    gm: FloatArray
    wm: FloatArray
    depth: FloatArray
    ventricle: FloatArray
    swell: FloatArray


@dataclass(frozen=True)
class Anatomy:
    """Tissue of one subject on one grid, every map (X, Y, Z) float32.

    Args:
        grid: the grid.
        gm, wm, csf: tissue fractions; they sum to 1 inside the brain and to 0 outside.
        depth: about the distance to the brain's surface in mm, positive inside.
        ventricle: about the distance to the ventricles in mm, negative inside.
        front: MNI y coordinate in mm, by which lesions find the frontal and occipital horns.
    """

    grid: Grid
    gm: FloatArray
    wm: FloatArray
    csf: FloatArray
    depth: FloatArray
    ventricle: FloatArray
    front: FloatArray

    @property
    def brain(self) -> np.ndarray:
        """(X, Y, Z) bool: brain and the fluid that touches it."""
        return self.depth > 0


@dataclass(frozen=True)
class Warp:
    """From a subject's millimetres to MNI millimetres.

    Args:
        scale: (3,) size of the head relative to `HEAD_SIZE`.
        control: (3, A, B, C) displacement in mm at control points `WARP_KNOT` apart.
        sulci: how far the sulci are open: a factor on the fluid fraction.
        stripping: seed of the brain extraction's own irregularities.
    """

    scale: np.ndarray
    control: FloatArray
    sulci: float
    stripping: int


@functools.lru_cache(maxsize=1)
def load_template() -> Atlas:
    """Reads the maps (a few seconds, once a process); nothing is downloaded."""
    from nilearn import datasets
    from scipy import ndimage

    def read(name: str) -> np.ndarray:
        return np.pad(np.asarray(getattr(datasets, name)(resolution=1).dataobj), PAD)

    gm, wm = (read(f"load_mni152_{tissue}_template").astype(np.float32) for tissue in ("gm", "wm"))
    mask = read("load_mni152_brain_mask") > 0

    # distances on every other voxel: they are smooth, and it takes a tenth of the time
    half = (slice(None, None, 2),) * 3
    # a little of the fluid around the mask, as brain extraction leaves it on real scans
    depth = _signed_distance(mask[half]) + 0.5
    # lateral and third ventricle: the bodies of fluid of a millilitre or more in the middle of the brain, without the
    # cisterns behind the brainstem, into which the third one seems to open
    x, y, z = _mni_axes(depth.shape)
    middle = (abs(x) < 46) & (y > -62) & (y < 44) & (z > -16) & (z < 36) & ~((abs(x) < 13) & (y < -27) & (z < 14))
    components, _ = ndimage.label(((gm + wm)[half] < 0.45) & (depth > 12) & middle)
    sizes = np.bincount(components.ravel())
    sizes[0] = 0
    inside = (sizes >= 125)[components]  # 8 mm³ a voxel
    swell = np.stack(np.gradient(ndimage.gaussian_filter(inside.astype(np.float32), 3)))
    swell /= np.abs(swell).max()
    return Atlas(gm, wm, depth.astype(np.float32), -_signed_distance(inside).astype(np.float32), swell)


def _mni_axes(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """MNI coordinates of the 2 mm maps, (X, 1, 1), (1, Y, 1), (1, 1, Z), mm."""
    x, y, z = (MNI_ORIGIN[d] + 2 * np.arange(n) for d, n in enumerate(shape))
    return x[:, None, None], y[None, :, None], z[None, None, :]


def _signed_distance(inside: np.ndarray) -> np.ndarray:
    """Distance to the border on a 2 mm grid in mm, positive inside."""
    from scipy import ndimage

    return 2 * (ndimage.distance_transform_edt(inside) - ndimage.distance_transform_edt(~inside))


@functools.lru_cache(maxsize=4)
def tissue_at(spacing: float) -> tuple[FloatArray, FloatArray]:
    """Grey and white matter, blurred as voxels of this size average them."""
    from scipy import ndimage

    atlas = load_template()
    sigma = 0.35 * np.sqrt(max(spacing**2 - 1, 0))
    return ndimage.gaussian_filter(atlas.gm, sigma), ndimage.gaussian_filter(atlas.wm, sigma)


def draw_warp(rng: np.random.Generator, *, atrophy: float) -> Warp:
    """Draws a subject's shape.

    Args:
        rng: source of randomness.
        atrophy: 0 for a young brain; 1 opens ventricles and sulci as in the elderly of the WMH challenge.
    """
    from scipy import ndimage

    lattice = lattice_grid(WARP_KNOT)
    control = np.zeros((3, *lattice.shape), np.float32)
    x, y, z = lattice.axes()
    brain = (x / 72) ** 2 + (y / 87) ** 2 + (z / 68) ** 2 < 1
    for axis in range(3):
        # amplitude in mm at each scale; the slopes stay below 1, so that nothing folds over
        for scale_mm, amplitude in ((60.0, 4.0), (28.0, 2.0), (13.0, 1.2)):
            control[axis] += amplitude * smooth_noise(rng, lattice, scale_mm)
        control[axis] -= control[axis][brain].mean()  # a shape, not a shift
    scale = 1 + 0.03 * np.clip(rng.standard_normal(3), -1.5, 1.5)
    ventricles = rng.normal(1.5 + 3.0 * atrophy, 1.5)
    sulci = float(np.exp(rng.normal(0.9 + 0.5 * atrophy, 0.3)))

    # to open the ventricles, points around them look further inwards (the warp is a pull-back)
    axes = lattice.axes()
    at = [MNI_CENTRE[d] + axes[d] / (HEAD_SIZE[d] * scale[d]) - MNI_ORIGIN[d] + control[d] for d in range(3)]
    at = [0.5 * a for a in at]  # the map has 2 mm voxels
    for axis in range(3):
        control[axis] += ventricles * ndimage.map_coordinates(load_template().swell[axis], at, order=1)
    return Warp(scale, control, sulci, int(rng.integers(2**31)))


def push_aside(warp: Warp, centre: np.ndarray, radius_mm: float, push_mm: float) -> Warp:
    """A tumour's mass effect: tissue around `centre` (mm) gives way by up to `push_mm`."""
    x, y, z = lattice_grid(WARP_KNOT).axes()
    offset = (x - centre[0], y - centre[1], z - centre[2])
    distance = np.sqrt(sum(o**2 for o in offset)) + 1e-3
    # nothing at the centre, most at the tumour's edge, fading over as far again
    strength = push_mm * np.minimum(distance / radius_mm, 1) * np.exp(-np.maximum(distance - radius_mm, 0) / radius_mm)
    control = warp.control - np.stack([strength * o / distance for o in offset]).astype(np.float32)
    return Warp(warp.scale, control, warp.sulci, warp.stripping)


def grow_anatomy(warp: Warp, grid: Grid) -> Anatomy:
    """Tissue fractions of the warped head on a grid.

    Args:
        warp: the subject's shape.
        grid: where to sample.
    """
    from scipy import ndimage

    axes = grid.axes()
    coordinates = np.empty((3, *grid.shape), np.float32)
    for d in range(3):
        mni = MNI_CENTRE[d] + axes[d] / (HEAD_SIZE[d] * warp.scale[d]) + spline(warp.control[d], WARP_KNOT, grid)
        coordinates[d] = mni - MNI_ORIGIN[d]

    def sample(volume: FloatArray, outside: float) -> FloatArray:
        return ndimage.map_coordinates(volume, coordinates, order=1, cval=outside, output=np.float32)

    atlas = load_template()
    gm, wm = (sample(volume, 0.0) for volume in tissue_at(grid.spacing))
    mni_y = coordinates[1] + np.float32(MNI_ORIGIN[1])
    coordinates *= 0.5  # these maps have 2 mm voxels
    depth, ventricle = sample(atlas.depth, -99.0), sample(atlas.ventricle, 99.0)

    # brain extraction cuts here a little closer, there a little wider
    depth += np.float32(0.6) * smooth_noise(np.random.default_rng(warp.stripping), grid, 15.0) * (np.abs(depth) < 12)

    # The template averages 152 cortices. A power sharpens the borders to one person's, the factor opens the sulci.
    csf = np.clip(1 - gm - wm, 0, 1)
    sharp = 1.5
    gm, wm, csf = gm**sharp, wm**sharp, warp.sulci * csf**sharp
    norm = (depth > 0) / np.maximum(gm + wm + csf, np.float32(1e-6))
    return Anatomy(grid, gm * norm, wm * norm, csf * norm, depth, ventricle, mni_y)
