"""One subject, from seed to scans."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mrgen.data.phantom.anatomy import draw_warp, grow_anatomy, push_aside
from mrgen.data.phantom.contrast import Scanner, draw_values, render
from mrgen.data.phantom.grid import FloatArray, Grid, sigmoid, smooth_noise
from mrgen.data.phantom.hyperintensities import grow_hyperintensities
from mrgen.data.phantom.lesions import PLAN_SPACING, grow_tumour, plan_tumour

TUMOUR_SEQUENCES = ("t1", "t1ce", "t2", "flair")
WMH_SEQUENCES = ("t1", "flair")
TUMOUR_SITES = ("CBICA", "TCIA", "2013", "TMC")
# mm; Singapore's in-plane axes come in both orders, which the writer sees to
WMH_FIELDS_OF_VIEW = {
    "Utrecht": (230.0, 228.0, 144.0),
    "Singapore": (232.0, 256.0, 144.0),
    "Amsterdam/GE3T": (158.0, 250.0, 150.0),
}
BRATS_FIELD_OF_VIEW = (240.0, 240.0, 155.0)
BRATS_SHIFT = (0.0, 10.0, 1.0)  # the brain lies a little behind the middle of SRI24


@dataclass(frozen=True)
class PhantomSubject:
    """A subject on a RAS+ grid.

    Args:
        images: sequence → (X, Y, Z) float32.
        label: (X, Y, Z) uint8; tumour in BraTS 2019 numbers (0 background, 1 necrotic and non-enhancing core, 2 edema,
            4 enhancing); WMH 1, other pathology 2.
        native_label: the same in BraTS 2015 numbers (1 necrosis, 2 edema, 3 non-enhancing, 4 enhancing); WMH unchanged.
        brain: (X, Y, Z) bool.
        affine: (4, 4) voxel to RAS mm.
        grade: "HGG", "LGG" or None.
        site: where it was scanned.
        bias: sequence → the bias field in the image, (X, Y, Z) float32.
    """

    images: dict[str, FloatArray]
    label: np.ndarray
    native_label: np.ndarray
    brain: np.ndarray
    affine: np.ndarray
    grade: str | None
    site: str
    bias: dict[str, FloatArray]


def stream(seed: int, index: int, purpose: str) -> np.random.Generator:
    """A generator of its own for each purpose: drawing more for one thing leaves all others as they were."""
    return np.random.default_rng([seed, index, zlib.crc32(purpose.encode())])


def one_in(period: int, seed: int, index: int, purpose: str) -> bool:
    """True for exactly one subject in each run of `period`, at a random place: small cohorts keep the share."""
    return bool(stream(seed, index // period, purpose).integers(period) == index % period)


def identify(*, seed: int, index: int, pathology: str) -> tuple[str | None, str]:
    """Grade (None without a tumour) and site of a subject, without growing it."""
    if pathology == "wmh":
        sites = tuple(WMH_FIELDS_OF_VIEW)
        return None, sites[index % len(sites)]
    site = TUMOUR_SITES[stream(seed, index, "site").integers(len(TUMOUR_SITES))]
    return ("LGG" if one_in(4, seed, index, "grade") else "HGG"), site


def grow_subject(
    *,
    seed: int,
    index: int,
    spacing: float,
    pathology: str = "tumour",
    sequences: Sequence[str] | None = None,
    skull: bool | None = None,
    visit: int = 0,
    grade: str | None = None,
) -> PhantomSubject:
    """Grows subject number `index` of the cohort that `seed` names.

    Args:
        seed: of the cohort.
        index: of the subject; subjects are independent of each other and of how many there are.
        spacing: isotropic voxel size in mm.
        pathology: "tumour" or "wmh".
        sequences: by default t1, t1ce, t2, flair with a tumour and t1, flair with WMH.
        skull: by default without for tumour (the challenge strips it), with for WMH (the challenge does not).
        visit: 0, or 1 for a second scan of the same patient: the tumour has grown, scanner and contrast are new.
        grade: "HGG" or "LGG" instead of the one that is drawn; nothing else changes.
    """
    if pathology not in ("tumour", "wmh"):
        raise ValueError(f"pathology is {pathology!r}, expected 'tumour' or 'wmh'")
    tumour = pathology == "tumour"
    sequences = tuple(sequences or (TUMOUR_SEQUENCES if tumour else WMH_SEQUENCES))
    skull = (not tumour) if skull is None else skull

    drawn, site = identify(seed=seed, index=index, pathology=pathology)
    grade = grade or drawn
    grid = Grid.around(BRATS_FIELD_OF_VIEW if tumour else WMH_FIELDS_OF_VIEW[site], spacing, BRATS_SHIFT)
    coarse_grid = Grid.around((200.0, 240.0, 180.0), PLAN_SPACING)
    age = stream(seed, index, "age").uniform(0.0, 0.5) if tumour else stream(seed, index, "age").uniform(0.4, 1.4)
    warp = draw_warp(stream(seed, index, "anatomy"), atrophy=age)

    coarse = grow_anatomy(warp, coarse_grid)
    lesion_stream = stream(seed, index, "lesion")
    lesions: dict[str, FloatArray]
    if tumour:
        plan = plan_tumour(lesion_stream, coarse, low_grade=grade == "LGG", growth=1 + 0.35 * visit)
        warp = push_aside(warp, plan.centre, plan.radius, push_mm=0.22 * plan.radius)
        coarse, anatomy = grow_anatomy(warp, coarse_grid), grow_anatomy(warp, grid)
        grown = grow_tumour(plan, coarse, anatomy)
        native = grown.native_label() * anatomy.brain
        label = np.where(native == 3, 1, native).astype(np.uint8)
        solid = grown.core - grown.fluid - grown.enhancing
        lesions = {"edema": 0.95 * grown.edema, "solid": solid, "fluid": grown.fluid, "enhancing": grown.enhancing}
        # The white matter disease of age is as bright as edema and no tumour: intensity alone does not tell them apart.
        aged = grow_hyperintensities(stream(seed, index, "white matter"), anatomy, coarse, infarct=False)
        lesions["wmh"] = aged.wmh * (1 - sum(lesions.values(), np.float32(0)))
    else:
        anatomy = grow_anatomy(warp, grid)
        infarct = one_in(6, seed, index, "infarct")
        spots = grow_hyperintensities(lesion_stream, anatomy, coarse, infarct=infarct)
        label = native = spots.label() * anatomy.brain
        # some are faint: brightness differs from spot to spot
        shine = sigmoid(smooth_noise(lesion_stream, grid, 16.0) + 1.4)
        lesions = {"wmh": spots.wmh * shine, "infarct": spots.infarct, "rim": spots.rim}

    scanner = Scanner.of_site(site, seed)
    values = draw_values(stream(seed, index, f"contrast {visit}"), scanner, sequences, low_grade=grade == "LGG")
    texture = smooth_noise(stream(seed, index, "texture"), grid, 7.0)
    images, bias = {}, {}
    for sequence in sequences:
        images[sequence], bias[sequence] = render(
            stream(seed, index, f"{sequence} {visit}"),
            sequence,
            values[sequence],
            scanner,
            anatomy,
            lesions,
            texture,
            skull=skull,
        )
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = grid.origin
    return PhantomSubject(images, label, native, anatomy.brain, affine, grade, site, bias)
