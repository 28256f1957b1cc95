"""The challenges' folders and file names, written as they ship."""

from __future__ import annotations

import csv
import gzip
import io
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mrgen.data.phantom.subject import PhantomSubject
from mrgen.files import write_text

# In the cohorts that have follow-ups, every fifth case is the second visit of the patient before it.
VISIT_PERIOD = 5


@dataclass(frozen=True)
class Case:
    """One case of a cohort, before it is grown.

    Args:
        number: of the case in the cohort, from 0.
        patient: the number its seeds come from; two visits share it.
        visit: 0 or 1.
        grade: "HGG", "LGG" or None.
        site: where it is scanned.
    """

    number: int
    patient: int
    visit: int
    grade: str | None
    site: str


Writer = Callable[[PhantomSubject, Path, Case], None]


@dataclass(frozen=True)
class Layout:
    """How a challenge lays out its cases.

    Args:
        pathology: "tumour" or "wmh".
        folder: the case's folder below the root.
        write: writes the files of a case into a folder; `Path.name` of `folder` starts their names.
        visits: whether some patients come twice.
        mapping: the column of `name_mapping.csv` that holds the case's name, in the challenges that ship that table.
    """

    pathology: str
    folder: Callable[[Case], str]
    write: Writer
    visits: bool = False
    mapping: str | None = None

    def patient_and_visit(self, number: int) -> tuple[int, int]:
        """Whose scan case `number` is, and which."""
        second = self.visits and number % VISIT_PERIOD == VISIT_PERIOD - 1
        return (number - 1, 1) if second else (number, 0)


# --- BraTS 2017 to 2023: NIfTI, one folder a case --------------------------------------------------------------------


def brats_nifti(
    folder: Callable[[Case], str], *, separator: str = "_", enhancing: int = 4, new_names: bool = False, **more: object
) -> Layout:
    """A layout with files `<case><separator><sequence>.nii.gz`.

    Args:
        folder: the case's folder below the root.
        separator: before the sequence.
        enhancing: label number of enhancing tumour.
        new_names: t1n, t1c, t2w, t2f instead of t1, t1ce, t2, flair.
        more: passed on to `Layout`.
    """
    names = {"t1": "t1n", "t1ce": "t1c", "t2": "t2w", "flair": "t2f"} if new_names else {}

    def write(subject: PhantomSubject, target: Path, case: Case) -> None:
        stem = folder(case).rsplit("/", 1)[-1] + separator
        # L, P, S as in the challenge: x and y run backwards, from this corner
        spacing = float(subject.affine[0, 0])
        affine = np.diag([-spacing, -spacing, spacing, 1.0])
        affine[1, 3] = spacing * (subject.label.shape[1] - 1)
        for sequence, image in subject.images.items():
            save_nifti(target / f"{stem}{names.get(sequence, sequence)}.nii.gz", int16(image)[::-1, ::-1], affine)
        label = np.where(subject.label == 4, enhancing, subject.label).astype(np.uint8)
        save_nifti(target / f"{stem}seg.nii.gz", label[::-1, ::-1], affine)

    return Layout("tumour", folder, write, **more)  # type: ignore[arg-type]


def by_grade(prefix: str) -> Callable[[Case], str]:
    """`HGG/<prefix>_<site>_<id>_1`; CBICA counts in letters, the others in numbers."""

    def folder(case: Case) -> str:
        a, n = string.ascii_uppercase, case.patient
        number = f"A{a[n // 26 % 26]}{a[n % 26]}" if case.site == "CBICA" else f"{100 + n}"
        return f"{case.grade}/{prefix}_{case.site}_{number}_1"

    return folder


# --- BraTS 2015: MetaImage, a folder around each file ----------------------------------------------------------------


def folder_2015(case: Case) -> str:
    """`brats_tcia_patNNN_TTTT`, TTTT being the visit; patients of 2013 come once."""
    if case.site == "2013" and case.patient % VISIT_PERIOD != VISIT_PERIOD - 2:
        return f"{case.grade}/brats_2013_pat{case.patient:04d}_1"
    return f"{case.grade}/brats_tcia_pat{case.patient:03d}_{1 + 89 * case.visit:04d}"


def write_2015(subject: PhantomSubject, target: Path, case: Case) -> None:
    """`VSD.Brain.XX.O.MR_T1.<id>/VSD.Brain.XX.O.MR_T1.<id>.mha` and so on; labels in 2015 numbers."""
    import SimpleITK

    spacing = float(subject.affine[0, 0])
    names = {"t1": "MR_T1", "t1ce": "MR_T1c", "t2": "MR_T2", "flair": "MR_Flair", "apt": "MR_APT"}
    volumes = {f"VSD.Brain.XX.O.{names[s]}": int16(image) for s, image in subject.images.items()}
    volumes["VSD.Brain_3more.XX.O.OT"] = subject.native_label
    for offset, (kind, volume) in enumerate(volumes.items()):
        name = f"{kind}.{54000 + 10 * case.number + offset}"
        (target / name).mkdir()
        # MetaImage means L, P, S by an identity direction, so x and y run backwards here too
        image = SimpleITK.GetImageFromArray(np.ascontiguousarray(volume[::-1, ::-1].T))
        image.SetSpacing([spacing] * 3)
        image.SetOrigin([0.0, -spacing * (volume.shape[1] - 1), 0.0])
        SimpleITK.WriteImage(image, str(target / name / f"{name}.mha"), True, 1)


# --- WMH 2017 --------------------------------------------------------------------------------------------------------


def write_wmh(subject: PhantomSubject, target: Path, case: Case) -> None:
    """`orig/` as scanned, `pre/` after a bias correction that leaves a little, `wmh.nii.gz` beside them."""
    names = {"t1": ("T1", "3DT1"), "flair": ("FLAIR",)}
    # Singapore's scans come with both orders of the in-plane axes
    swapped = subject.site == "Singapore" and case.number % 2 == 0

    def save(path: Path, volume: np.ndarray) -> None:
        affine = subject.affine
        if swapped:
            volume, affine = volume.swapaxes(0, 1), affine[:, [1, 0, 2, 3]]
        path.parent.mkdir(exist_ok=True)
        save_nifti(path, volume, affine)

    for sequence, image in subject.images.items():
        corrected = image / subject.bias[sequence] ** np.float32(0.85)
        for name in names[sequence]:
            save(target / "orig" / f"{name}.nii.gz", int16(image))
            save(target / "pre" / f"{name}.nii.gz", int16(corrected))
    save(target / "wmh.nii.gz", subject.label)


# --- all of them -----------------------------------------------------------------------------------------------------

LAYOUTS = {
    "brats2015": Layout("tumour", folder_2015, write_2015, visits=True),
    "brats2017": brats_nifti(by_grade("Brats17")),
    "brats2018": brats_nifti(by_grade("Brats18"), mapping="BraTS_2018_subject_ID"),
    "brats2019": brats_nifti(by_grade("BraTS19"), mapping="BraTS_2019_subject_ID"),
    "brats2020": brats_nifti(lambda c: f"BraTS20_Training_{c.number + 1:03d}", mapping="BraTS_2020_subject_ID"),
    "brats2021": brats_nifti(lambda c: f"BraTS2021_{c.number:05d}"),
    "brats2023": brats_nifti(
        lambda c: f"BraTS-GLI-{c.patient:05d}-{c.visit:03d}", separator="-", enhancing=3, new_names=True, visits=True
    ),
    "wmh2017": Layout("wmh", lambda c: f"{c.site}/{c.number}", write_wmh),
}


def write_mapping(layout: Layout, cases: list[Case], root: Path) -> None:
    """`name_mapping.csv`, from which grade and site are read where folders do not tell them."""
    if layout.mapping is None:
        return
    columns = ["Grade", "BraTS_2018_subject_ID", "BraTS_2019_subject_ID", "BraTS_2020_subject_ID"]
    columns = columns[: columns.index(layout.mapping) + 1]
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, columns, restval="NA")
    table.writeheader()
    for case in cases:
        row = {"Grade": str(case.grade), layout.mapping: layout.folder(case).rsplit("/", 1)[-1]}
        if layout.mapping == "BraTS_2020_subject_ID":  # the site stands in last year's name alone
            row["BraTS_2019_subject_ID"] = by_grade("BraTS19")(case).rsplit("/", 1)[-1]
        table.writerow(row)
    write_text(root / "name_mapping.csv", text.getvalue())


def int16(image: np.ndarray) -> np.ndarray:
    """Rounded to the challenges' data type."""
    return np.clip(np.rint(image), 0, 32767).astype(np.int16)


def save_nifti(path: Path, volume: np.ndarray, affine: np.ndarray) -> None:
    """A `.nii.gz` that is the same, byte for byte, whenever it is written: no time in the gzip header."""
    import nibabel

    image = nibabel.Nifti1Image(np.ascontiguousarray(volume), affine)
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    image.header.set_xyzt_units("mm")
    # level 1 takes a third of the default's time for a few per cent more space
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))
