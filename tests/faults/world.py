"""What is damaged: one small cohort in every file format, its store, and runs of every kind, made by the commands.

All paths are relative to one folder, a part of which is copied for every case, so that each begins with the same files.
"""

import csv
import shutil
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np

from tests.faults.process import Ended, run

__all__ = ["FORMATS", "build", "called", "train_arguments"]

CPU = ("trainer.accelerator=cpu", "trainer.precision=32-true", "tracking=csv", "++callbacks.images=null")
INFER = ("device=cpu", "precision=32-true")
BARE = ("trainer.enable_progress_bar=false", *CPU)
STORE = ("data.store=store", "data.root=cohort", "data.phantom.spacing=5", "data.phantom.subjects=8")
# A learning rate at which the second epoch is worse: the best checkpoint is another than the last.
RSNET = ("experiment=rsnet/rsnet", "model.filters=2", "model.levels=2", "model.mc_samples=2", "model.lr=0.3")
SNET = ("experiment=rsnet/snet", "model.net.filters=2", "model.net.levels=2")
CLUSTERING = ("experiment=smoke/clustering",)
SAMR = ("experiment=smoke/samr", "model.filters=2", "model.unet_filters=2", "model.discriminator_filters=2")
SAMR += ("data.modalities=[t1,t1ce,t2,flair]",)
FORMATS = {  # what one subject's scans are written as: the suffix, and whether the voxels are compressed
    "nifti": (".nii", False),
    "nifti gz": (".nii.gz", True),
    "metaimage": (".mha", False),
    "metaimage compressed": (".mha", True),
    "metaimage detached": (".mhd", False),
    "nrrd": (".nrrd", False),
    "nrrd gzip": (".nrrd", True),
    "nrrd detached": (".nhdr", False),
}
LAYOUT = """\
name: {name}
title: Scans as {name}
subjects: ["P*"]
fields: {{patient: "P[0-9]+"}}
images: {{t1: "*_t1{suffix}", t2: "*_t2{suffix}"}}
label: "*_seg{suffix}"
label_values: {{0: background, 1: core, 2: edema, 4: enhancing}}
skull_stripped: true
"""


def train_arguments(preset: Sequence[str], folder: str, *, epochs: int = 1) -> list[str]:
    """Arguments of mrgen-train for a tiny run in a folder."""
    return [*preset, *STORE, *BARE, f"hydra.run.dir={folder}", f"trainer.max_epochs={epochs}"]


def called(script: str, arguments: Sequence[str], here: Path) -> Ended:
    """A command that has to succeed."""
    ended = run(script, arguments, here)
    if ended.code or ended.forbidden:
        raise RuntimeError(f"mrgen-{script} {' '.join(arguments)}: {ended.code} {ended.forbidden}\n{ended.said}")
    return ended


def build(here: Path) -> None:
    """Makes everything in a folder, if it is not there."""
    if (here.parent / "built").is_file():
        return
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir(parents=True)
    called("prepare", ["data=phantom", *STORE, "workers=0"], here)
    for name, preset, epochs in (
        ("rsnet", RSNET, 2),
        ("snet", SNET, 1),
        ("clustering", CLUSTERING, 1),
        ("samr", SAMR, 1),
    ):
        called("train", train_arguments(preset, f"runs/{name}", epochs=epochs), here)
    sweep = ["-m", *RSNET, *STORE, *BARE, "trainer.max_epochs=1", "hydra.sweep.dir=sweep", "seed=0,1"]
    called("train", sweep, here)
    subjects = sorted((here / "cohort").glob("*/*/"))
    patients = here / "patients"
    for subject in subjects[:2]:
        shutil.copytree(subject, patients / subject.parent.name / subject.name)
    called("synthesize", ["checkpoint=runs/samr", "output=synthetic", "subjects=5", *INFER], here)
    called("synthesize", ["checkpoint=runs/rsnet", "input=patients", "output=made", *INFER], here)
    samples = ["experiment=samr/samples", "runs=[runs/samr]", "blind=true", *BARE, "hydra.run.dir=samples"]
    called("evaluate", samples, here)
    _answer(here / "samples" / "key" / "key.csv", here / "answers.csv")
    for name in FORMATS:
        place = f"scans/{name.replace(' ', '_')}"
        _write_scans(here / place, name, subjects[:2])
        own = ["data=own", f"data.layout={place}/layout.yaml", f"data.root={place}/raw", f"data.store={place}/store"]
        called("prepare", [*own, "workers=0"], here)
    (here.parent / "built").write_text("")


def _answer(key: Path, answers: Path) -> None:
    """A reader who takes every picture for real."""
    with key.open(newline="") as file:
        lines = [[line["sheet"], line["item"], line["letter"], "yes", ""] for line in csv.DictReader(file)]
    with answers.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["sheet", "item", "letter", "real", "most"], *lines])


def _write_scans(folder: Path, name: str, subjects: Sequence[Path]) -> None:
    """Two patients in one file format, and the layout that finds them."""
    suffix, compressed = FORMATS[name]
    for number, subject in enumerate(subjects, start=1):
        place = folder / "raw" / f"P{number}"
        place.mkdir(parents=True)
        for sequence in ("t1", "t2", "seg"):
            image = nibabel.load(next(subject.glob(f"*_{sequence}.nii*")))
            path = place / f"P{number}_{sequence}{suffix}"
            if name.startswith("nifti"):
                _nifti(image, path)
            else:
                _itk(image, path, compressed)
    (folder / "layout.yaml").write_text(LAYOUT.format(name=name.replace(" ", "_"), suffix=suffix))


def _nifti(image: nibabel.Nifti1Image, path: Path) -> None:
    written = nibabel.Nifti1Image(np.asanyarray(image.dataobj).astype(np.int16), image.affine)
    written.header.set_xyzt_units("mm")
    written.set_qform(image.affine, 1)
    written.set_sform(image.affine, 1)
    nibabel.save(written, path)


def _itk(image: nibabel.Nifti1Image, path: Path, compressed: bool) -> None:
    import SimpleITK

    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ image.affine  # ITK's world is LPS
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    written = SimpleITK.GetImageFromArray(np.asanyarray(image.dataobj).astype(np.int16).T)
    written.SetSpacing(spacing.tolist())
    written.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    written.SetOrigin(affine[:3, 3].tolist())
    SimpleITK.WriteImage(written, str(path), compressed)
