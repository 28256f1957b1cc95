"""White matter hyperintensities: caps and bands along the ventricles, and many small spots deeper in the white matter.

Some subjects carry another pathology too (a cortical infarct), which the WMH challenge marks with 2 and ignores.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mrgen.data.phantom.anatomy import Anatomy
from mrgen.data.phantom.grid import FloatArray, sigmoid, smooth_noise


@dataclass(frozen=True)
class Hyperintensities:
    """Fractions of altered tissue, every map (X, Y, Z) float32 in 0 to 1.

    Args:
        wmh: white matter hyperintensities.
        infarct: old cortical infarct: fluid with a bright rim.
        rim: that rim.
    """

    wmh: FloatArray
    infarct: FloatArray
    rim: FloatArray

    def label(self) -> np.ndarray:
        """(X, Y, Z) uint8: 1 WMH, 2 other pathology, grown by a voxel in plane; 1 wins, as in the challenge."""
        from scipy import ndimage

        in_plane = ndimage.generate_binary_structure(3, 1)
        in_plane[:, :, [0, 2]] = False
        other = ndimage.binary_dilation(self.infarct + self.rim > 0.5, in_plane)
        label = np.where(other, 2, 0).astype(np.uint8)
        label[self.wmh > 0.5] = 1
        return label


def grow_hyperintensities(
    rng: np.random.Generator, anatomy: Anatomy, plan: Anatomy, *, infarct: bool
) -> Hyperintensities:
    """Grows the lesions of one subject.

    Args:
        rng: source of randomness; nothing drawn from it depends on the spacing.
        anatomy: the subject on the grid that is wanted.
        plan: the same on a coarse grid of fixed spacing, on which the spots are placed.
        infarct: whether the subject has the other pathology too.
    """
    grid = anatomy.grid
    load = float(np.clip(np.exp(rng.normal(0.0, 0.6)), 0.3, 3.5))  # few spots … confluent disease

    # periventricular: a band whose width wanders, wider at the frontal and occipital horns (the caps)
    edge = 0.35 * max(grid.spacing, 1.0)
    horns = sigmoid((anatomy.front - 18) / 5) + sigmoid((-58 - anatomy.front) / 6)
    width = np.float32(1.9 * load) * np.exp(0.45 * smooth_noise(rng, grid, 14.0)) * (1 + 1.6 * horns) - np.float32(0.5)
    wmh = sigmoid((np.minimum(width, 14) - anatomy.ventricle) / edge) * sigmoid((anatomy.ventricle - 0.3) / edge)

    # deep and subcortical spots
    weight = (
        plan.wm**2 * sigmoid((plan.depth - 7) / 1.5) * sigmoid((plan.ventricle - 3) / 1) * (plan.grid.axes()[2] > -12)
    )
    weight = weight * np.exp(-plan.ventricle / 14)  # commoner near the ventricles
    count = rng.poisson(35 * load)
    places = rng.choice(weight.size, size=count, p=(weight / weight.sum(dtype=np.float64)).ravel().astype(np.float64))
    for place in places:
        voxel = np.array(np.unravel_index(place, weight.shape))
        centre = np.array(plan.grid.origin) + plan.grid.spacing * (voxel + rng.uniform(-0.5, 0.5, 3))
        radius = float(np.clip(np.exp(rng.normal(np.log(1.9), 0.4)), 1.0, 6.0))
        _add_ball(wmh, anatomy, centre, radius * np.exp(0.25 * rng.standard_normal(3)), edge)
    # white matter alone; next to the ventricles the template calls the partial volume grey
    white = anatomy.wm + anatomy.gm * np.exp(-np.maximum(anatomy.ventricle, 0) / 2)
    wmh *= np.clip(1.25 * white - 0.1, 0, 1)

    dead, rim = np.zeros_like(wmh), np.zeros_like(wmh)
    if infarct:
        weight = plan.gm * sigmoid((plan.ventricle - 12) / 2) * (plan.depth > 3) * (plan.grid.axes()[2] > -12)
        place = rng.choice(weight.size, p=(weight / weight.sum(dtype=np.float64)).ravel().astype(np.float64))
        centre = np.array(plan.grid.origin) + plan.grid.spacing * np.array(np.unravel_index(place, weight.shape))
        radii = rng.uniform(7, 14) * np.exp(0.3 * rng.standard_normal(3))
        whole = np.zeros_like(wmh)
        _add_ball(whole, anatomy, centre, radii, edge)
        _add_ball(dead, anatomy, centre, 0.7 * radii, edge)
        whole, dead = whole * anatomy.brain, dead * anatomy.brain
        rim, wmh = whole * (1 - dead), wmh * (1 - whole)
    return Hyperintensities(wmh, dead, rim)


def _add_ball(fraction: FloatArray, anatomy: Anatomy, centre: np.ndarray, radii: np.ndarray, edge: float) -> None:
    """Adds a soft ellipsoid (mm) to a fraction map in place, touching only the voxels around it."""
    grid, reach = anatomy.grid, float(radii.max()) + 4 * edge
    window = []
    for d in range(3):
        first = int(np.floor((centre[d] - reach - grid.origin[d]) / grid.spacing))
        last = int(np.ceil((centre[d] + reach - grid.origin[d]) / grid.spacing))
        window.append(slice(max(first, 0), max(min(last + 1, grid.shape[d]), 0)))
    x, y, z = (
        ((grid.axis(d)[window[d]] - centre[d]) / radii[d])
        .astype(np.float32)
        .reshape([-1 if a == d else 1 for a in range(3)])
        for d in range(3)
    )
    ball = sigmoid((1 - np.sqrt(x**2 + y**2 + z**2)) * np.float32(radii.mean() / edge))
    part = tuple(window)
    fraction[part] = np.maximum(fraction[part], ball)
