"""The voxel grid a subject is grown on, and random smooth fields that look the same at every spacing.

Everything random that is smooth (warps, bias fields, lesion outlines) is drawn on control points a few millimetres to
centimetres apart, in a box that never changes, and only then evaluated on the grid. So one seed is one subject: at
3 mm and at 1 mm the same head appears, seen by a coarser or a finer scanner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[Any]  # float32; numpy types cannot follow it through broadcasting

# mm, around the brain's centre; larger than every challenge's field of view
BOX = np.array([280.0, 300.0, 240.0])


@dataclass(frozen=True)
class Grid:
    """An isotropic RAS+ grid in millimetres from the brain's centre.

    Args:
        shape: voxels along x (to the right), y (to the front), z (up).
        spacing: voxel size in mm.
        origin: position of voxel (0, 0, 0) in mm from the brain's centre.
    """

    shape: tuple[int, int, int]
    spacing: float
    origin: tuple[float, float, float]

    @classmethod
    def around(cls, field_of_view: Sequence[float], spacing: float, shift: Sequence[float] = (0.0, 0.0, 0.0)) -> Grid:
        """A grid of `field_of_view` mm whose middle lies `shift` mm from the brain's centre."""
        shape = tuple(round(extent / spacing) for extent in field_of_view)
        origin = tuple(s - spacing * (n - 1) / 2 for n, s in zip(shape, shift, strict=True))
        return cls(shape, spacing, origin)  # type: ignore[arg-type]

    def axis(self, dimension: int) -> NDArray[Any]:
        """Positions of the voxels along one axis, (N,), mm."""
        return self.origin[dimension] + self.spacing * np.arange(self.shape[dimension])

    def axes(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """x, y, z in mm as (X, 1, 1), (1, Y, 1), (1, 1, Z): they broadcast, so no dense coordinate volume is needed."""
        x, y, z = (self.axis(d).astype(np.float32) for d in range(3))
        return x[:, None, None], y[None, :, None], z[None, None, :]


def lattice_size(knot_mm: float) -> tuple[int, int, int]:
    """Control points that cover the box at one every `knot_mm`, the B-spline's border included."""
    nx, ny, nz = (int(n) for n in np.ceil(BOX / knot_mm) + 4)
    return nx, ny, nz


def lattice_grid(knot_mm: float) -> Grid:
    """The control points themselves, as a grid."""
    size = lattice_size(knot_mm)
    ox, oy, oz = (-knot_mm * (n - 1) / 2 for n in size)
    return Grid(size, knot_mm, (ox, oy, oz))


def spline(control: FloatArray, knot_mm: float, grid: Grid) -> FloatArray:
    """Uniform cubic B-spline through a lattice of control points, evaluated on a grid.

    Separable, and each weight matrix holds four numbers a row: three sparse products. A dense product would wake BLAS
    threads, which fight with our own and may sum in another order on another machine.

    Args:
        control: (A, B, C) control points, `lattice_size(knot_mm)` of them.
        knot_mm: their distance.
        grid: where to evaluate.

    Returns:
        (X, Y, Z) float32.
    """
    from scipy.sparse import csr_array

    out = control
    for dimension in range(3):
        size = control.shape[dimension]
        position = (grid.axis(dimension) + knot_mm * (size - 1) / 2) / knot_mm  # in knots
        t = np.abs(position[:, None] - np.arange(size)[None, :])
        weights = np.where(t < 1, 2 / 3 - t**2 + t**3 / 2, np.where(t < 2, (2 - t) ** 3 / 6, 0)).astype(np.float32)
        # the axis at hand comes first and goes last: after three turns they stand as before
        product = csr_array(weights) @ np.ascontiguousarray(out.reshape(size, -1))
        out = np.moveaxis(product.reshape(-1, *out.shape[1:]), 0, 2)
    return np.ascontiguousarray(out, dtype=np.float32)


def smooth_noise(rng: np.random.Generator, grid: Grid, scale_mm: float) -> FloatArray:
    """A random field of about zero mean and unit variance that varies over `scale_mm`, (X, Y, Z) float32."""
    control = rng.standard_normal(lattice_size(scale_mm), dtype=np.float32)
    return spline(control, scale_mm, grid) * np.float32(3.0)  # the spline averages: std 0.48 ** 1.5 = 1 / 3.0


def sigmoid(x: FloatArray) -> FloatArray:
    """Logistic function, (…) float32; the soft edge of everything that is grown."""
    return np.float32(0.5) * (np.float32(1.0) + np.tanh(np.float32(0.5) * x))
