"""Where cerebrospinal fluid, grey and white matter lie, as probabilities: what Shin et al. add to the label map."""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from mrgen.data.alignment import mni_affine
from mrgen.data.store import Box, StoredSubject

__all__ = ["TISSUES", "Tissue", "TissueMaps"]

TISSUES = ("csf", "gm", "wm")
BLUR = 3.0  # mm (σ) of the priors: one affine brings lobes onto each other, not folds
STEP = 2  # mm between the blurred priors' voxels
FLOOR = 0.02  # least prior, before they are made to sum to 1: where head and template differ intensity decides
VOXELS = 200_000  # about, looked at to fit a mixture: four numbers need no more
ITERATIONS, TOLERANCE = 100, 1e-4  # the means' last step, in parts of the range of intensities
NARROWEST = 0.01  # least standard deviation, likewise: a scan without noise has one too


@dataclass(frozen=True, eq=False)
class TissueMaps:
    """Tissue probabilities of one subject, computed where and when ``crop`` asks: a few numbers, no volume.

    Attributes:
        subject: whose.
        pull: 4×4, its voxels to those of the priors.
        modality: the sequence that tells tissue.
        means: (3,), of its intensity in each of ``TISSUES``, as stored.
        deviation: the standard deviation that all three share.
    """

    subject: StoredSubject
    pull: np.ndarray
    modality: str
    means: np.ndarray
    deviation: float

    def crop(self, box: Box) -> np.ndarray:
        """Probabilities in a box. A lesion has the priors: what tissue would be there.

        Args:
            box: ((x0, x1), (y0, y1), (z0, z1)), ends exclusive; what exceeds the volume is 0.

        Returns:
            (3, x, y, z) float32 in the order of ``TISSUES``, of sum 1 in the brain and 0 outside.
        """
        subject, brain = self.subject, self.subject.read_brain(box)
        priors = _priors(self.pull, np.argwhere(brain).T + [[start] for start, _ in box])  # (3, n)
        values = subject.read_image([self.modality], box)[0][brain].clip(*_fences(subject, self.modality))  # (n,)
        told = _posterior(values, priors, self.means, self.deviation)
        if subject.labelled:
            told = np.where(subject.read_label(box)[brain] == 0, told, priors)
        out = np.zeros((len(TISSUES), *brain.shape), np.float32)
        out[:, brain] = told
        return out


@dataclass(frozen=True, eq=False)
class Tissue:
    """Tissue probabilities of any subject: an atlas' priors, refined by a Gaussian mixture on its T1.

    Shin et al. (SASHIMI 2018; "probability maps of white matter, gray matter and CSF", Guo et al., section 3) train a
    network on another cohort to segment the brain; this stands in for it, and nothing is trained or drawn. The MNI152
    template's grey and white matter (nilearn ships them; fluid is the rest) are laid on the subject by one affine and
    blurred. Voxel by voxel they are the mixing weights of three Gaussians of intensity, fitted to the healthy brain by
    expectation maximisation (Ashburner and Friston, NeuroImage 26, 2005: the mixture of Gaussians with spatial priors,
    without their deformation and bias field). The three share one variance: fluid with a wide one of its own would
    take the bright vessels too.

    A lesion neither teaches a tissue's intensity nor is told by its own: it may be moved away, and healthy tissue has
    to stand where it was.
    """

    _known: dict[tuple[Path, str], TissueMaps] = field(default_factory=dict, repr=False)  # by subject and revision

    def on(self, subject: StoredSubject) -> TissueMaps:
        """The maps of a subject: by its T1, or without one by its first sequence, the one it is aligned by.

        Computed once (two seconds, whatever the resolution) and kept; call this before loader processes start.

        Args:
            subject: labelled or not. All above 0 is lesion, the ignored 255 too; without a label nothing is.

        Raises:
            UserError: it cannot be aligned to the template.
        """
        key = subject.path, subject.revision
        if key not in self._known:
            _, affine = _template()
            pull = np.linalg.inv(affine) @ np.linalg.inv(mni_affine(subject)) @ subject.affine
            modality = "t1" if "t1" in subject.modalities else subject.modalities[0]
            self._known[key] = TissueMaps(subject, pull, modality, *_fitted(subject, pull, modality))
        return self._known[key]


@cache
def _template() -> tuple[np.ndarray, np.ndarray]:
    """Grey and white matter of MNI152, blurred, (2, 99, 117, 95) float32, and its affine; nothing is downloaded."""
    from nilearn import datasets
    from scipy.ndimage import gaussian_filter

    images = [datasets.load_mni152_gm_template(resolution=1), datasets.load_mni152_wm_template(resolution=1)]
    blurred = [gaussian_filter(np.asarray(image.dataobj, np.float32), BLUR) for image in images]  # voxels of 1 mm
    return np.stack([m[::STEP, ::STEP, ::STEP] for m in blurred]), images[0].affine @ np.diag([STEP, STEP, STEP, 1])


def _priors(pull: np.ndarray, voxels: np.ndarray) -> np.ndarray:
    """(3, n) of sum 1 at voxels (3, n) that ``pull`` takes to the template's; beyond its brain there is fluid."""
    from scipy.ndimage import map_coordinates

    places = pull[:3, :3] @ voxels + pull[:3, 3:]
    gm, wm = (map_coordinates(m, places, order=1) for m in _template()[0])
    priors = np.stack([1 - gm - wm, gm, wm]).clip(0) + FLOOR
    return priors / priors.sum(axis=0)


def _fences(subject: StoredSubject, modality: str) -> tuple[float, float]:
    """Tukey's: 1.5 interquartile ranges beyond the quartiles of the brain's intensities."""
    q1, q3 = (subject.statistics[modality][name] for name in ("q1", "q3"))
    return q1 - 1.5 * (q3 - q1), q3 + 1.5 * (q3 - q1)


def _fitted(subject: StoredSubject, pull: np.ndarray, modality: str) -> tuple[np.ndarray, float]:
    """Means (3,) of the tissues' intensities and the standard deviation that they share."""
    healthy = subject.read_brain()
    if subject.labelled:
        healthy &= subject.read_label() == 0
    voxels = np.argwhere(healthy)
    voxels = voxels[:: max(1, len(voxels) // VOXELS)].T  # (3, n)
    low, high = _fences(subject, modality)
    values = subject.read_image([modality])[0][tuple(voxels)].clip(low, high)  # (n,): vessels, fat, air are no tissue
    priors = told = _priors(pull, voxels)  # (3, n)
    extent = max(high - low, 1e-6)  # never 0, whatever the scan

    means = np.full(len(TISSUES), np.inf)
    for _ in range(ITERATIONS):
        before, weight = means, told.sum(axis=1).clip(1e-6)  # a brain without a healthy voxel has nothing to fit
        means = (told * values).sum(axis=1) / weight
        variance = (told * (values - means[:, None]) ** 2).sum() / weight.sum()
        deviation = max(float(np.sqrt(variance)), NARROWEST * extent)
        if np.abs(means - before).max() < TOLERANCE * extent:
            break
        told = _posterior(values, priors, means, deviation)
    return means, deviation


def _posterior(values: np.ndarray, priors: np.ndarray, means: np.ndarray, deviation: float) -> np.ndarray:
    """(3, n) of sum 1 from intensities (n,) and priors (3, n)."""
    from scipy.special import softmax

    return softmax(np.log(priors) - ((values - means[:, None]) / deviation) ** 2 / 2, axis=0)
