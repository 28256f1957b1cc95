"""From tissue to intensities: what each sequence shows, and how scanners and subjects differ.

Numbers are relative to white matter = 1 and stand for pure tissue; partial volume, noise and bias bring them to what is
measured on real scans. What a sequence cannot show is equal in its row: solid tumour has one intensity in t1, t2 and
flair, whether it enhances or not.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mrgen.data.phantom.anatomy import Anatomy
from mrgen.data.phantom.grid import FloatArray, sigmoid, smooth_noise

# fmt: off
#               csf   gm    edema  solid fluid enhancing wmh   infarct rim
SIGNAL: dict[str, dict[str, float]] = {
    tissue: dict(zip(("t1", "t1ce", "t2", "flair", "apt"), row, strict=True)) for tissue, row in {
        #              t1    t1ce  t2    flair apt
        "csf":        (0.36, 0.40, 2.55, 0.42, 1.20),
        "gm":         (0.76, 0.84, 1.38, 1.20, 1.05),
        "wm":         (1.00, 1.00, 1.00, 1.00, 1.00),
        "edema":      (0.80, 0.86, 1.68, 1.72, 1.25),
        "solid":      (0.69, 0.82, 1.88, 1.60, 1.70),
        "fluid":      (0.52, 0.50, 2.25, 1.05, 1.55),
        "enhancing":  (0.69, 1.65, 1.88, 1.60, 2.30),
        "wmh":        (0.81, 0.85, 1.50, 1.62, 1.10),
        "infarct":    (0.45, 0.50, 2.20, 0.60, 1.10),
        "rim":        (0.80, 0.85, 1.55, 1.45, 1.10),
        # outside the brain: fat and skin, bone, muscle
        "scalp":      (1.10, 1.15, 1.00, 0.75, 1.00),
        "bone":       (0.18, 0.20, 0.20, 0.18, 1.00),
        "muscle":     (0.60, 0.70, 0.50, 0.55, 1.00),
    }.items()
}
# fmt: on

# How much a value differs from subject to subject (log-normal). Fluid spans dark to bright in flair.
SPREAD = {"csf": 0.06, "gm": 0.025, "edema": 0.07, "solid": 0.08, "fluid": 0.12, "enhancing": 0.15, "wmh": 0.05}
FLUID_IN_FLAIR = (0.5, 1.55)


@dataclass(frozen=True)
class Scanner:
    """What a site's scanner does to every image.

    Args:
        contrast: sequence → exponent on the values above: below 1 flat, above 1 strong contrast.
        gain: sequence → intensity of white matter in the file.
        noise: standard deviation of the noise, relative to white matter.
        bias: amplitude (log) of the bias field.
        slab: sequence → blur along z in mm, of a scan in thick slices that was interpolated.
    """

    contrast: dict[str, float]
    gain: dict[str, float]
    noise: float
    bias: float
    slab: dict[str, float]

    @classmethod
    def of_site(cls, site: str, seed: int) -> Scanner:
        """The same site has the same scanner in every subject of a cohort."""
        rng = np.random.default_rng([seed, zlib.crc32(site.encode())])
        return cls(
            contrast={s: float(np.exp(rng.normal(0, 0.13))) for s in SIGNAL["wm"]},
            gain={s: float(np.exp(rng.normal(np.log(380), 0.45))) for s in SIGNAL["wm"]},
            noise=rng.uniform(0.025, 0.06),
            bias=rng.uniform(0.08, 0.20),
            slab={s: rng.uniform(0, 0.5) if s == "t1" else rng.uniform(0.2, 1.2) for s in SIGNAL["wm"]},
        )


def draw_values(
    rng: np.random.Generator, scanner: Scanner, sequences: Sequence[str], *, low_grade: bool = False
) -> dict[str, dict[str, float]]:
    """Intensities of the pure tissues in one subject: sequence → tissue → value relative to white matter.

    Args:
        rng: source of randomness; draws the same number whatever the sequences.
        scanner: the site's.
        sequences: which to return.
        low_grade: the tumour's metabolism is low, which apt alone shows.
    """
    wetness = rng.random()  # how fluid-like the tumour's fluid is: dark in flair, bright in t2
    values: dict[str, dict[str, float]] = {}
    for sequence in SIGNAL["wm"]:
        row = {}
        for tissue, table in SIGNAL.items():
            # one number, unless solid and enhancing differ in this sequence
            spread = SPREAD.get(tissue, 0.03 if tissue != "wm" else 0.0)
            row[tissue] = float(table[sequence] ** scanner.contrast[sequence] * np.exp(spread * rng.standard_normal()))
        if sequence == "flair":
            low, high = FLUID_IN_FLAIR
            row["fluid"] *= (high + (low - high) * wetness) / SIGNAL["fluid"]["flair"]
        if sequence == "apt" and low_grade:
            row["solid"] = 1 + 0.5 * (row["solid"] - 1)
        if sequence not in ("t1ce", "apt"):
            row["enhancing"] = row["solid"]
        row["edema"] = max(row["edema"], 1.22) if sequence in ("t2", "flair") else row["edema"]
        values[sequence] = row
    return {sequence: values[sequence] for sequence in sequences}


def render(
    rng: np.random.Generator,
    sequence: str,
    values: dict[str, float],
    scanner: Scanner,
    anatomy: Anatomy,
    lesions: dict[str, FloatArray],
    texture: FloatArray,
    *,
    skull: bool,
) -> tuple[FloatArray, FloatArray]:
    """One scan.

    Args:
        rng: source of randomness of this sequence alone.
        sequence: its name.
        values: tissue → value, of `draw_values`.
        scanner: the site's.
        anatomy: the subject.
        lesions: tissue → fraction, (X, Y, Z) each; together at most 1.
        texture: unevenness of the lesions that all sequences share, (X, Y, Z), about unit variance.
        skull: whether to add what lies outside the brain (and noise in the air); otherwise 0 outside.

    Returns:
        The image and the bias field that is in it, (X, Y, Z) float32.
    """
    from scipy import ndimage

    grid = anatomy.grid
    healthy = anatomy.csf * values["csf"] + anatomy.gm * values["gm"] + anatomy.wm * values["wm"]
    # iron, myelin and fibre direction make tissue uneven, and differently in each sequence
    # the outermost voxels hold dura and bone as well, or a bright ring of fluid would run around every brain
    healthy *= np.float32(0.45) + np.float32(0.55) * sigmoid((anatomy.depth - np.float32(1.2)) * 3)
    healthy *= 1 + np.float32(0.03) * smooth_noise(rng, grid, 24.0) + np.float32(0.02) * smooth_noise(rng, grid, 7.0)
    if sequence == "t1ce":
        # vessels and dura enhance too: brightness alone does not make a tumour
        sheets = np.exp(-((smooth_noise(rng, grid, 10.0) / np.float32(0.15)) ** 2))  # where they cut a sulcus: a thread
        there = sigmoid((smooth_noise(rng, grid, 14.0) - 0.4) * 5) * np.sqrt(anatomy.csf)
        healthy += np.float32(1.6) * sheets * there * ((anatomy.depth < 16) | (anatomy.ventricle < 0))

    own = smooth_noise(rng, grid, 9.0)
    signal = healthy * (1 - sum(lesions.values(), np.float32(0)))
    for tissue, fraction in lesions.items():
        uneven = np.float32(0.13 if tissue == "enhancing" else 0.08)
        # the same in solid and enhancing parts, or the one would show in the other's sequences
        uneven = np.float32(0.08) if sequence not in ("t1ce", "apt") else uneven
        signal += fraction * np.float32(values[tissue]) * (1 + uneven * (0.7 * texture + 0.7 * own))
    if skull:
        signal = _add_skull(rng, signal, values, anatomy)

    if sequence == "apt":  # read out in few, large voxels
        signal = ndimage.gaussian_filter(signal, 1.8 / grid.spacing)
    elif scanner.slab[sequence] > 0.2 * grid.spacing:
        signal = ndimage.gaussian_filter1d(signal, scanner.slab[sequence] / grid.spacing, axis=2)

    bias = np.exp(np.float32(scanner.bias) * smooth_noise(rng, grid, 95.0))
    sigma = np.float32(scanner.noise * (2.0 if sequence == "apt" else 1.0))
    real = signal * bias + sigma * rng.standard_normal(grid.shape, dtype=np.float32)
    imaginary = sigma * rng.standard_normal(grid.shape, dtype=np.float32)
    image = np.hypot(real, imaginary) * np.float32(scanner.gain[sequence])  # Rician
    if not skull:
        # brain extraction leaves exact zeros outside; inside nothing is zero, so that the brain is `image > 0`
        image = np.where(anatomy.brain, np.maximum(image, 1), 0)
    return image.astype(np.float32), bias


def _add_skull(rng: np.random.Generator, signal: FloatArray, values: dict[str, float], anatomy: Anatomy) -> FloatArray:
    """Fluid, bone, then scalp as shells around the brain, and something like muscle underneath."""
    grid = anatomy.grid
    out = np.maximum(-anatomy.depth, 0) + np.float32(0.8) * smooth_noise(rng, grid, 20.0)
    bone, scalp, air = (sigmoid((out - np.float32(edge)) / 0.5) for edge in (2.0, 7.5, 13.5))
    below = sigmoid((-45 - grid.axes()[2]) / 3)  # skull base and neck
    marrow = np.float32(values["bone"]) + np.float32(0.35) * sigmoid((smooth_noise(rng, grid, 6.0) - 0.4) * 4)
    soft = values["muscle"] * below * (1 + np.float32(0.3) * smooth_noise(rng, grid, 9.0)) + values["scalp"] * (
        1 - below
    )
    head = values["csf"] * (1 - bone) + marrow * (bone - scalp) + soft * (scalp - air)
    return np.where(anatomy.brain, signal, np.maximum(head, 0)).astype(np.float32)
