"""Tiny scans written the way challenges ship them: an ellipsoid brain on background 0, with a lesion inside."""

import zlib
from pathlib import Path

import numpy as np

SHAPE = (16, 18, 20)
BRATS_AFFINE = np.array([[-1.0, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]])  # LPS, as BraTS ships
LAYOUTS = Path(__file__).parents[2] / "conf" / "data" / "layout"


def ellipsoid(shape=SHAPE, size=0.38):
    """A bool mask around the middle, `size` of each side in half axes."""
    axes = [(np.arange(n) - (n - 1) / 2) / (size * n) for n in shape]
    return sum(axis**2 for axis in np.meshgrid(*axes, indexing="ij")) <= 1


def scan(seed=0, shape=SHAPE):
    """(X, Y, Z) int16: 100 to 900 in the brain, 0 outside."""
    return (np.random.default_rng(seed).integers(100, 900, shape) * ellipsoid(shape)).astype(np.int16)


def lesion(values=(1, 2, 4), shape=SHAPE):
    """(X, Y, Z) uint8: a few voxels of each value in the middle of the brain."""
    label = np.zeros(shape, np.uint8)
    x, y, z = (n // 2 for n in shape)
    for i, value in enumerate(values):
        label[x - 1 : x + 1, y - 1 : y + 1, z - 2 + i] = value
    return label


def write_nifti(path, array, affine=BRATS_AFFINE):
    import nibabel

    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def write_mha(path, array, compress=True):
    """`array` is x y z with ITK's (LPS) axes along it."""
    import SimpleITK

    path.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array.T), str(path), compress)
    return path


def scan_of(id, name, names=("t1", "t1ce", "t2", "flair")):
    """What `write_brats_case` writes: every subject has voxels of its own."""
    return scan(zlib.crc32(id.encode()) % 10**6 * 10 + names.index(name))


def write_brats_case(folder, *, label=(1, 2, 4), names=("t1", "t1ce", "t2", "flair"), joint="_", suffix=".nii.gz"):
    """`folder`/<name of folder>_t1.nii.gz and so on; `label=None` leaves it out, as validation folders do."""
    for name in names:
        write_nifti(folder / f"{folder.name}{joint}{name}{suffix}", scan_of(folder.name, name, names))
    if label is not None:
        write_nifti(folder / f"{folder.name}{joint}seg{suffix}", lesion(label))
    return folder


def write_brats2015_case(folder, *, flat=False, label=True):
    """One folder a sequence, as shipped, or all files in one."""
    number, names = 54512, ("MR_Flair", "MR_T1", "MR_T1c", "MR_T2")
    for i, name in enumerate(names):
        stem = f"VSD.Brain.XX.O.{name}.{number + i}"
        volume = scan_of(f"{folder.parent.name}/{folder.name}", name, names)
        write_mha(folder / ("" if flat else stem) / f"{stem}.mha", volume)
    if label:
        stem = "VSD.Brain_3more.XX.O.OT.54517"
        write_mha(folder / ("" if flat else stem) / f"{stem}.mha", lesion((1, 2, 3, 4)))
    return folder


def head(shape=(64, 72, 24), seed=0):
    """T1- and FLAIR-like volumes of a head with scalp and skull, in noisy air; spacing 3×3×6 mm.

    Returns:
        The two volumes and the brain's mask.
    """
    rng = np.random.default_rng(seed)
    skin, skull, dura = ellipsoid(shape, 0.46), ellipsoid(shape, 0.42), ellipsoid(shape, 0.36)
    brain, ventricle = ellipsoid(shape, 0.33), ellipsoid(shape, 0.08)
    t1, flair = np.zeros(shape), np.zeros(shape)
    for mask, in_t1, in_flair in (
        (skin, 900, 500),
        (skull, 60, 40),
        (dura, 150, 80),
        (brain, 600, 450),
        (ventricle, 150, 80),
    ):
        t1[mask], flair[mask] = in_t1, in_flair
    noisy = [np.hypot(v + rng.normal(0, 15, shape), rng.normal(0, 15, shape)) for v in (t1, flair)]
    return noisy[0].astype(np.int16), noisy[1].astype(np.int16), brain


HEAD_AFFINE = np.diag([3.0, 3.0, 6.0, 1.0])


def write_wmh_case(folder, *, label=(1, 2), nested=None):
    t1, flair, _ = head(seed=zlib.crc32(folder.name.encode()))
    write_nifti(folder / "pre" / "T1.nii.gz", t1, HEAD_AFFINE)
    write_nifti(folder / "pre" / "FLAIR.nii.gz", flair, HEAD_AFFINE)
    write_nifti(folder / "pre" / "3DT1.nii.gz", scan())
    write_nifti(folder / "orig" / "T1.nii.gz", t1, HEAD_AFFINE)
    if label:
        write_nifti(folder / "wmh.nii.gz", lesion(label, t1.shape), HEAD_AFFINE)
    return folder
