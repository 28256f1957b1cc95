"""Gliomas, grown into a subject's anatomy.

What a sequence can show decides how the parts depend on each other. Outline, fluid pockets and edema are visible
without contrast agent; where the tumour enhances is drawn from a stream of its own and is visible with it alone.
Nothing visible in t1, t2 and flair, the grade included, tells whether a core enhances or which part of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mrgen.data.phantom.anatomy import Anatomy
from mrgen.data.phantom.grid import FloatArray, Grid, sigmoid, smooth_noise

PLAN_SPACING = 4.0  # mm; volumes and thresholds are set on this grid, so that they hold at every spacing


@dataclass(frozen=True)
class Tumour:
    """Fractions of tumour tissue, every map (X, Y, Z) float32 in 0 to 1.

    Args:
        core: solid tumour and fluid pockets together.
        fluid: necrosis (cysts, in a low grade) inside the core.
        enhancing: the part of the solid tumour that takes up contrast agent.
        edema: infiltrated and swollen white matter around the core.
    """

    core: FloatArray
    fluid: FloatArray
    enhancing: FloatArray
    edema: FloatArray

    def native_label(self) -> np.ndarray:
        """(X, Y, Z) uint8 in BraTS 2015 numbers: 1 necrosis, 2 edema, 3 non-enhancing, 4 enhancing."""
        label = np.where(self.edema > 0.45, 2, 0).astype(np.uint8)
        core = self.core > 0.5
        label[core] = 3
        label[core & (self.enhancing > 0.5)] = 4
        label[core & (self.fluid > 0.5)] = 1
        return label


@dataclass(frozen=True)
class TumourPlan:
    """Where a tumour sits and how large it is; what both visits of a patient share.

    Args:
        centre: (3,) mm from the brain's centre.
        stretch: (3, 3) matrix that makes the ball an ellipsoid.
        core_ml, edema_ml: volumes.
        fluid_share: of the core.
        enhancing_share: of the solid tumour; 0 in a low grade.
        seeds: of the visible shape and of the enhancement.
    """

    centre: np.ndarray
    stretch: np.ndarray
    core_ml: float
    edema_ml: float
    fluid_share: float
    enhancing_share: float
    seeds: tuple[int, int]

    @property
    def radius(self) -> float:
        """Of a ball of the core's volume, mm."""
        return (self.core_ml * 1000 * 3 / (4 * np.pi)) ** (1 / 3)


def plan_tumour(rng: np.random.Generator, anatomy: Anatomy, *, low_grade: bool, growth: float = 1.0) -> TumourPlan:
    """Draws place and size.

    Args:
        rng: source of randomness.
        anatomy: the subject at `PLAN_SPACING`.
        low_grade: without enhancement; changes nothing that is drawn here, so the visible tumour is the same.
        growth: volume relative to the first visit.
    """
    from scipy import ndimage

    total = float(np.clip(np.exp(rng.normal(np.log(85), 0.55)), 14, 220))
    core_ml = total * rng.uniform(0.2, 0.65)
    radius = (core_ml * 1000 * 3 / (4 * np.pi)) ** (1 / 3)

    # gliomas arise in white matter of the hemispheres, far enough inside for the core to fit
    z = anatomy.grid.axes()[2]
    deep = sigmoid((anatomy.depth - 0.55 * radius - 4) / 2) * sigmoid((anatomy.ventricle - 0.4 * radius) / 2)
    weight = ndimage.gaussian_filter(anatomy.wm, 1) * deep * (z > -12) + 1e-12 * anatomy.brain
    index = rng.choice(weight.size, p=(weight / weight.sum()).ravel().astype(np.float64))
    voxel = np.array(np.unravel_index(index, weight.shape))
    centre = np.array(anatomy.grid.origin) + PLAN_SPACING * (voxel + rng.uniform(-0.5, 0.5, 3))

    rotation = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    stretch = rotation @ np.diag(np.exp(0.22 * rng.standard_normal(3))) @ rotation.T
    fluid = rng.uniform(0.12, 0.5) if rng.random() < 0.85 else 0.0
    seeds = rng.integers(2**31, size=2)
    enhancing = float(np.clip(rng.beta(2.5, 2.5), 0.15, 0.8))  # drawn in every case: the stream stays the same
    return TumourPlan(
        centre=centre,
        stretch=stretch,
        core_ml=core_ml * growth,
        edema_ml=(total - core_ml) * growth,
        fluid_share=fluid,
        enhancing_share=0.0 if low_grade else enhancing,
        seeds=(int(seeds[0]), int(seeds[1])),
    )


def grow_tumour(plan: TumourPlan, coarse: Anatomy, anatomy: Anatomy) -> Tumour:
    """Grows a planned tumour.

    Args:
        plan: place and size.
        coarse: the subject (mass effect included) at `PLAN_SPACING`; fixes thresholds from volumes.
        anatomy: the same subject on the grid that is wanted.
    """
    # the same fields on both grids, from the same seeds
    guide, fields = (_Fields.of(plan, a.grid) for a in (coarse, anatomy))
    voxel_ml = PLAN_SPACING**3 / 1000
    edge = 0.45 * max(anatomy.grid.spacing, 1.0)  # mm, half-width of a border: partial volume

    # core: a bumpy ellipsoid, cut to the volume that was planned, outside the ventricles
    room = (coarse.depth > 0) & (coarse.ventricle > 0)
    level = _threshold(-guide.outline[room], np.ones(room.sum()), plan.core_ml / voxel_ml)
    inside = fields.outline + level  # mm outside the core's surface
    allowed = sigmoid((anatomy.depth - 1) / edge) * sigmoid(anatomy.ventricle / edge)
    core = sigmoid(-inside / edge) * allowed

    # fluid pockets: deep inside and where the noise says so
    depth, coarse_depth = -inside, -(guide.outline + level)
    coarse_core = room & (coarse_depth > 0)
    fluid = np.zeros_like(core)
    wall = float(plan.radius)
    if plan.fluid_share > 0:
        wet = coarse_depth + guide.pockets
        wall = _threshold(wet[coarse_core], np.ones(coarse_core.sum()), plan.fluid_share * coarse_core.sum())
        fluid = core * sigmoid((depth + fields.pockets - wall) / edge)

    # enhancement: a ragged band at a random depth of the solid tumour, a rim as often as not
    enhancing = np.zeros_like(core)
    if plan.enhancing_share > 0:
        solid = coarse_core & (coarse_depth + guide.pockets < wall)
        uptake = guide.enhancement(coarse_depth, wall)
        cut = _threshold(uptake[solid], np.ones(solid.sum()), plan.enhancing_share * solid.sum())
        enhancing = (core - fluid) * sigmoid((fields.enhancement(depth, wall) - cut) * 5 / edge)

    edema = _grow_edema(plan, coarse, anatomy, guide, fields, coarse_core)
    return Tumour(core, fluid, enhancing, edema * (1 - core))


@dataclass(frozen=True)
class _Fields:
    """Random fields of one tumour on one grid, (X, Y, Z) float32, all but the last in mm."""

    outline: FloatArray
    pockets: FloatArray
    infiltration: FloatArray
    uptake: FloatArray
    band: tuple[float, float]

    @classmethod
    def of(cls, plan: TumourPlan, grid: Grid) -> _Fields:
        visible, hidden = (np.random.default_rng(seed) for seed in plan.seeds)
        axes = grid.axes()
        offset = [axes[d] - np.float32(plan.centre[d]) for d in range(3)]
        stretched = [sum(np.float32(plan.stretch[r, d]) * offset[d] for d in range(3)) for r in range(3)]
        distance = np.sqrt(sum(s**2 for s in stretched))
        r = plan.radius
        bumps = 0.26 * r * smooth_noise(visible, grid, 18.0) + 0.09 * r * smooth_noise(visible, grid, 9.0)
        pockets = 2.2 * smooth_noise(visible, grid, 11.0) + 0.8 * smooth_noise(visible, grid, 6.0)
        infiltration = smooth_noise(visible, grid, 16.0)
        uptake = smooth_noise(hidden, grid, 13.0) + 0.5 * smooth_noise(hidden, grid, 6.0)
        band = (hidden.uniform(0.0, 1.0), hidden.uniform(1.0, 2.5))
        return cls(distance - r + bumps, pockets, infiltration, uptake, band)

    def enhancement(self, depth: FloatArray, wall: float) -> FloatArray:
        """Uptake, highest in a band somewhere between the core's surface and its fluid."""
        where, weight = self.band
        relative = np.clip((depth + self.pockets) / max(wall, 1.0), -0.5, 1.5)
        return self.uptake - weight * np.abs(relative - np.float32(where)) * 2


def _grow_edema(
    plan: TumourPlan, coarse: Anatomy, anatomy: Anatomy, guide: _Fields, fields: _Fields, core: np.ndarray
) -> FloatArray:
    """Edema as diffusion from the core: fast in white matter, slow in grey, none in fluid (Swanson's glioma model)."""
    conductance = coarse.wm + 0.08 * coarse.gm
    cells = core.astype(np.float32)
    for _ in range(90):
        flow = np.zeros_like(cells)
        for axis in range(3):
            here, there = [slice(None)] * 3, [slice(None)] * 3
            here[axis], there[axis] = slice(None, -1), slice(1, None)
            a, b = tuple(here), tuple(there)
            step = np.minimum(conductance[a], conductance[b]) * (cells[b] - cells[a])
            flow[a] += step
            flow[b] -= step
        cells = np.maximum(cells + 0.16 * flow, core)  # the core keeps feeding
    reach = np.log(np.maximum(cells, 1e-12))  # falls by about 1 every few mm

    outside = ~core & (coarse.depth > 0)
    score = reach + 0.6 * guide.infiltration
    level = _threshold(score[outside], coarse.wm[outside], plan.edema_ml * 1000 / PLAN_SPACING**3)

    at = [(anatomy.grid.axis(d) - coarse.grid.origin[d]) / PLAN_SPACING for d in range(3)]
    fine = _linear(reach, at)
    spread = sigmoid((fine + 0.6 * fields.infiltration - np.float32(level)) / 0.35)
    white = np.clip(anatomy.wm * 1.15 + 0.12 * anatomy.gm, 0, 1)  # spares cortex and ventricles
    return spread * white


def _linear(volume: FloatArray, at: list[np.ndarray]) -> FloatArray:
    """Separable linear interpolation at the voxel positions `at`, one (N,) array an axis."""
    for axis, position in enumerate(at):
        position = np.clip(position, 0, volume.shape[axis] - 1)
        low = np.minimum(position.astype(int), volume.shape[axis] - 2)
        shape = [1, 1, 1]
        shape[axis] = -1
        t = (position - low).astype(np.float32).reshape(shape)
        volume = np.take(volume, low, axis) * (1 - t) + np.take(volume, low + 1, axis) * t
    return volume


def _threshold(values: np.ndarray, weights: np.ndarray, wanted: float) -> float:
    """The value above which the weights sum to `wanted`; between two voxels, it is interpolated."""
    order = np.argsort(values)[::-1]
    return float(np.interp(wanted, np.cumsum(weights[order]), values[order]))
