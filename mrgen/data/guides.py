"""What tells a generator of a slice's anatomy beside its labels: the training set's atlas, or tissue probabilities."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from mrgen.data.atlas import Atlas
from mrgen.data.normalisation import Normalisation
from mrgen.data.store import Box, StoredSubject
from mrgen.data.tissue import Tissue
from mrgen.errors import UserError
from mrgen.protocols import LabelMaps

__all__ = ["GUIDES", "Guide", "View", "fit_guides", "guide_slices", "label_maps", "load_guides", "save_guides"]

GUIDES = ("atlas", "tissue")


class View(Protocol):
    """A guide as it lies on one subject's voxels."""

    def crop(self, box: Box) -> np.ndarray:
        """(n, x, y, z) float32 of ((x0, x1), (y0, y1), (z0, z1)), ends exclusive, which may exceed the subject."""
        ...


class Guide(Protocol):
    """What is known of every subject's anatomy."""

    def on(self, subject: StoredSubject) -> View: ...


def fit_guides(
    names: Sequence[str], subjects: Sequence[StoredSubject], modalities: Sequence[str], normalisation: Normalisation
) -> dict[str, Guide]:
    """Guides by name.

    Args:
        names: of ``GUIDES``.
        subjects: those of training alone, which the atlas averages.
        modalities, normalisation: of the images that the guides go with.

    Raises:
        UserError: an unknown name, or as of ``Atlas.fit``.
    """
    _check(names)
    made: dict[str, Guide] = {}
    if "atlas" in names:
        made["atlas"] = Atlas.fit(subjects, modalities, normalisation)
    if "tissue" in names:
        made["tissue"] = Tissue()
    return made


def save_guides(guides: Mapping[str, Guide], folder: Path) -> None:
    """Writes what was learned from training subjects into a run's folder."""
    if isinstance(atlas := guides.get("atlas"), Atlas):
        atlas.save(folder)


def load_guides(names: Sequence[str], folder: Path) -> dict[str, Guide]:
    """The guides that training used; ``folder`` is the run's. Raises UserError as of ``Atlas.load``."""
    _check(names)
    return {name: Atlas.load(folder) if name == "atlas" else Tissue() for name in names}


def guide_slices(view: View, box: Box, step: int = 1) -> np.ndarray:
    """(z, n, x, y) float32: every ``step``-th axial slice of a box."""
    if step == 1:
        return np.moveaxis(view.crop(box), -1, 0)
    x, y, (low, high) = box
    return np.stack([view.crop((x, y, (z, z + 1)))[..., 0] for z in range(low, high, step)])


def label_maps(
    subject: StoredSubject, box: Box, lookup: np.ndarray, guides: Mapping[str, Guide], step: int = 1
) -> LabelMaps:
    """What a generator is given of a subject as it is.

    Args:
        subject: with a label.
        box: ((x0, x1), (y0, y1), (z0, z1)), ends exclusive, such as of ``mrgen.data.slices.SiteSlices``.
        lookup: (256,) from the cohort's own label numbers to classes.
        guides: by name.
        step: every so many slices of the box.
    """
    label, brain = (volume.transpose(2, 0, 1)[::step] for volume in (subject.read_label(box), subject.read_brain(box)))
    return LabelMaps(
        label=torch.from_numpy(lookup[label].astype(np.int64)),
        brain=torch.from_numpy(np.ascontiguousarray(brain)),
        guides={
            name: torch.from_numpy(np.ascontiguousarray(guide_slices(guide.on(subject), box, step)))
            for name, guide in guides.items()
        },
    )


def _check(names: Sequence[str]) -> None:
    if unknown := [name for name in names if name not in GUIDES]:
        raise UserError(f"guides: {', '.join(unknown)} is none; expected {' or '.join(GUIDES)}")
