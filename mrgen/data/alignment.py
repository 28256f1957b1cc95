"""Where a head lies in MNI space: one affine a subject, for cohorts that are not in one space."""

from functools import cache
from typing import Any

import numpy as np

from mrgen.data.store import StoredSubject
from mrgen.errors import UserError

__all__ = ["mni_affine", "mni_grid"]

SIDE = 4.0  # mm, of the voxels compared: twelve parameters need no finer ones
MARGIN = 8.0  # mm around the template's brain, compared too
LEVELS = ((2, 8.0), (1, 4.0))  # of the pyramid: (shrink factor, smoothing in mm)
BINS = 32  # of the joint histogram
OVERLAP = 0.4  # least Dice with the template's brain: half a brain has 0.67, a head with its face about 0.55


def mni_grid(side: float) -> tuple[tuple[int, int, int], np.ndarray]:
    """Shape and affine (4×4, voxels to MNI mm, RAS+) of a grid over MNI152's field of view.

    Args:
        side: of its voxels in mm.
    """
    volume, affine = _template()
    extent = np.array(volume.shape)  # mm: the template has 1 mm voxels
    shape = np.ceil(extent / side).astype(int)
    grid = np.diag([side, side, side, 1.0])
    grid[:3, 3] = affine[:3, 3] + ((extent - 1) - (shape - 1) * side) / 2  # one middle for both
    return tuple(shape.tolist()), grid


def mni_affine(subject: StoredSubject) -> np.ndarray:
    """Registers a subject's brain to the MNI152 T1 that nilearn ships: by its T1, or without one its first sequence.

    Twelve parameters from the centres of mass on, by Mattes' mutual information, coarse to fine. All voxels around the
    template's brain are compared, in one thread, so that nothing is drawn and sums have one order: one scan, the same
    bits. About a second, whatever the scan's resolution.

    Args:
        subject: whose brain mask hides what the template has not.

    Returns:
        (4, 4), from MNI's millimetres to the subject's, both RAS+.

    Raises:
        UserError: the scan has no brain, or none that fits.
    """
    import SimpleITK

    name = "t1" if "t1" in subject.modalities else subject.modalities[0]
    failed = f"{subject.id}: its {name} could not be aligned to the MNI152 T1"
    advice = "look at the scan and its brain mask; prepare it anew or leave it out"
    volume = subject.read_image([name])[0].astype(np.float32)
    volume = np.where(subject.read_brain(), volume - volume.min(), 0)
    if not volume.any():
        raise UserError(f"{failed}: found nothing in the brain mask, expected a brain; {advice}")
    fixed, near = _fixed()
    moving = _coarse(volume, subject.affine)
    transform = SimpleITK.AffineTransform(
        SimpleITK.CenteredTransformInitializer(
            fixed, moving, SimpleITK.AffineTransform(3), SimpleITK.CenteredTransformInitializerFilter.MOMENTS
        )
    )
    method = SimpleITK.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(BINS)
    method.SetMetricFixedMask(near)
    method.SetInterpolator(SimpleITK.sitkLinear)
    # steps that shrink slowly: with ITK's 0.5 heads turned by 30° stop half way
    method.SetOptimizerAsRegularStepGradientDescent(2.0, 0.01, 300, relaxationFactor=0.9)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([factor for factor, _ in LEVELS])
    method.SetSmoothingSigmasPerLevel([sigma for _, sigma in LEVELS])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetInitialTransform(transform, inPlace=True)
    threads = SimpleITK.ProcessObject.GetGlobalDefaultNumberOfThreads()
    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)  # the metric takes its number from nowhere else
    try:
        method.Execute(fixed, moving)
    except RuntimeError as error:
        raise UserError(f"{failed}: SimpleITK's registration gave up; {advice}") from error
    finally:
        SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)

    found = np.eye(4)
    found[:3, :3] = np.reshape(transform.GetMatrix(), (3, 3))
    found[:3, 3] = transform.TransformPoint((0.0, 0.0, 0.0))
    brains = [SimpleITK.GetArrayViewFromImage(i) > 0 for i in (fixed, SimpleITK.Resample(moving, fixed, transform))]
    overlap = 2 * np.logical_and(*brains).sum() / np.sum(brains)
    if overlap < OVERLAP:
        raise UserError(
            f"{failed}: their brains overlap by a Dice of {overlap:.2f}, expected {OVERLAP} or more; {advice}"
        )
    return found


def _template() -> tuple[np.ndarray, np.ndarray]:
    """MNI152's T1 without its skull, (197, 233, 189) float32 at 1 mm, and its affine; nothing is downloaded."""
    from nilearn.datasets import load_mni152_template

    image = load_mni152_template(resolution=1)  # kept by nilearn
    return np.asarray(image.dataobj, dtype=np.float32), np.asarray(image.affine, dtype=float)


@cache
def _fixed() -> tuple[Any, Any]:
    """The template at ``SIDE`` and the mask of its brain with ``MARGIN``, as SimpleITK's images."""
    import SimpleITK

    image = _coarse(*_template())
    return image, SimpleITK.BinaryDilate(image > 0.05, [round(MARGIN / SIDE)] * 3)


def _coarse(volume: np.ndarray, affine: np.ndarray) -> Any:
    """(X, Y, Z) as an image of SimpleITK with voxels of about ``SIDE``.

    ITK calls its world LPS and ours is RAS, but a registration only asks that both images lie in one.
    """
    import SimpleITK

    sides = np.linalg.norm(affine[:3, :3], axis=0)
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(volume.T))
    image.SetSpacing(sides.tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection((affine[:3, :3] / sides).ravel().tolist())
    return SimpleITK.BinShrink(image, [max(1, round(SIDE / side)) for side in sides])
