"""Synthetic cohorts: which subjects a generator makes, of whose brain and whose lesion, and how a store holds them.

    store/cohort.json, store/<id>/…   as of every prepared cohort (``mrgen.data.store``)
    store/generated.json              what made it, and whether it is complete

A synthetic subject has the brain of a training subject (its anatomy) and a lesion that was manipulated (Guo et al.,
MICCAI 2020, section 3); its slices are those that training showed the generator. It is filed under the patient whose
lesion it has. Labels are the cohort's own numbers, so that its layout reads them.

The lesion VAE-GAN draws brains from noise. There the training subject is the donor of the lesions alone, and lends the
synthetic one its number of slices and its affine; its slices are no neighbours of each other.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch

from mrgen.data.batch import IGNORED
from mrgen.data.crops import Box
from mrgen.data.guides import Guide, label_maps
from mrgen.data.layouts import Layout
from mrgen.data.lesions import manipulate
from mrgen.data.slices import SiteSlices
from mrgen.data.store import StoredSubject, write_subject
from mrgen.errors import UserError
from mrgen.files import read_json, write_text
from mrgen.protocols import Generated, LabelMaps

__all__ = [
    "Lesion",
    "Planned",
    "draw_lesion",
    "generator_seed",
    "maps_of",
    "own_numbers",
    "plan_subjects",
    "prepared_digest",
    "read_generated",
    "synthetic_layout",
    "write_generated",
    "write_synthetic",
]

VERSION = 1
_TABLE = "generated.json"
_KEYS = ("complete", "method", "checkpoint", "store", "patients", "subjects", "slices", "manipulations", "seed")
_KINDS = {"complete": bool, "patients": list, "subjects": int, "slices": int}
# Streams of random numbers beside the lesions' own, which is (seed, number).
_ORDER, _GENERATOR = 1, 2


def read_generated(store: Path | str) -> dict[str, Any] | None:
    """What ``generated.json`` of a store says; None where there is none and the store is no synthetic one.

    Returns:
        ``complete`` (False while it is being made, and where that was interrupted), ``method`` (the generator's run),
        ``checkpoint`` (``sha256:…``), ``store`` (name of the real cohort), ``patients`` (all that the generator was
        trained on), ``subjects`` and ``slices`` (how many there are once it is complete), ``manipulations``, ``seed``,
        and what else the method says; a lesion VAE-GAN's ``scheme``, ``selection``, ``exhausted`` and, once complete,
        ``filters``.

    Raises:
        UserError: it is damaged or of another version.
    """
    path = Path(store) / _TABLE
    if not path.exists():
        return None
    expected, remedy = "a synthetic cohort's table", "delete the folder and generate anew"
    table = read_json(path, expected=expected, remedy=remedy)
    if not isinstance(table, dict) or "version" not in table:
        raise UserError(f"{path}: found no version in it, expected {expected}; {remedy}")
    if not isinstance(table.get("complete", True), bool) or not isinstance(table.get("patients", []), list):
        raise UserError(f"{path}: found complete or patients of another type, expected {expected}; {remedy}")
    version = table["version"]
    lacking = [key for key in _KEYS if key not in table]
    if version != VERSION or lacking:
        found = f"version {version}" + (f" without {', '.join(lacking)}" if lacking else "")
        raise UserError(f"{path}: found {found}, expected version {VERSION}; generate into a new folder")
    if wrong := [key for key, kind in _KINDS.items() if not isinstance(table[key], kind)]:
        found = f"{wrong[0]}: {str(table[wrong[0]])[:60]!r}"
        raise UserError(f"{path}: found {found}, expected {expected}; {remedy}")
    return table


def write_generated(store: Path | str, table: Mapping[str, Any]) -> None:
    """Writes ``generated.json`` in one step; ``table`` as of ``read_generated``. Raises UserError where it cannot."""
    path = Path(store) / _TABLE
    try:
        write_text(path, json.dumps({"version": VERSION, **table}, indent=1))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); choose another output") from error


def synthetic_layout(layout: Layout) -> Layout:
    """The real cohort's labels under another name, so that no real scan is prepared among synthetic ones."""
    return replace(layout, name="synthetic", title=f"{layout.title}, synthetic")


def prepared_digest(subjects: Iterable[StoredSubject]) -> str:
    """Tells whether subjects are as they were, none prepared anew."""
    known = sorted((subject.id, subject.revision) for subject in subjects)
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]


# ----- which subjects ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """A synthetic subject that is to be made.

    Attributes:
        number: from 0.
        anatomy: whose brain it has.
        box: what training shows of that one's volume, from its first slice to behind its last.
        z: those slices, all of which are made.
        kept: which of them the subject has, by their place in ``z``.
    """

    number: int
    anatomy: StoredSubject
    box: Box
    z: range
    kept: tuple[int, ...]

    @property
    def id(self) -> str:
        return f"syn{self.number:04d}_{self.anatomy.id}"

    @property
    def slices(self) -> list[int]:
        """What it has, as slices of the anatomy's volume."""
        return [self.z[place] for place in self.kept]


def plan_subjects(
    training: Sequence[StoredSubject],
    sampling: SiteSlices,
    *,
    seed: int,
    subjects: int | None = None,
    slices: int | None = None,
    without: Collection[str] = (),
) -> list[Planned]:
    """Which subjects to make: one of every training subject's brain, in an order of chance, and so on in another one.

    A longer plan begins with the shorter one, but that slices may have trimmed its last subject.

    Args:
        training: in any order.
        sampling: what training shows of them.
        seed: of the order.
        subjects: how many.
        slices: how many in all, in place of a number of subjects: the last one keeps as many as are needed, evenly
            spread. One of the two is None.
        without: subjects that could not be made, by id; later ones take their place.
    """
    anatomies = sorted(training, key=lambda subject: subject.id)
    plan: list[Planned] = []
    order: list[int] = []
    left, number = slices, -1
    while (left is None and len(plan) < (subjects or 0)) or (left or 0) > 0:
        number += 1
        turn, place = divmod(number, len(anatomies))
        if place == 0:
            order = np.random.default_rng([seed, turn, _ORDER]).permutation(len(anatomies)).tolist()
        anatomy = anatomies[order[place]]
        x, y, _ = sampling.box(anatomy.shape, anatomy.site)
        z = sampling.training(anatomy.shape, anatomy.site)
        kept = len(z) if left is None else min(left, len(z))
        places = tuple((2 * k + 1) * len(z) // (2 * kept) for k in range(kept))
        planned = Planned(number, anatomy, (x, y, (z.start, z.stop)), z, places)
        if planned.id not in without:
            plan.append(planned)
            left = None if left is None else left - kept
    return plan


# ----- whose lesion --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lesion:
    """The labels that a synthetic subject is made from.

    Attributes:
        label: (X, Y, Z) uint8, mapped classes in the anatomy's whole volume.
        manipulation: one of ``mrgen.data.lesions.KINDS``, or None where the labels are as they were.
        subject: whose lesion it is: the anatomy's own, or the donor's where it was transplanted.
    """

    label: np.ndarray
    manipulation: str | None
    subject: StoredSubject


class _Donors(Sequence[np.ndarray]):
    """Mapped labels of subjects; one is read when it is drawn, and ``drawn`` says whose it was."""

    def __init__(self, subjects: Sequence[StoredSubject], lookup: np.ndarray):
        self.subjects, self.lookup = subjects, lookup
        self.drawn: StoredSubject | None = None

    def __len__(self) -> int:
        return len(self.subjects)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | Sequence[np.ndarray]:
        if isinstance(index, slice):
            return _Donors(self.subjects[index], self.lookup)
        self.drawn = self.subjects[index]
        return self.lookup[self.drawn.read_label()]


def draw_lesion(
    planned: Planned, training: Sequence[StoredSubject], lookup: np.ndarray, *, kinds: Sequence[str], seed: int
) -> Lesion:
    """Manipulates the anatomy's labels; what is drawn depends on the seed and the subject's number alone.

    Args:
        planned: the subject.
        training: who may give a lesion: those of other patients that have one, on voxels of the same size.
        lookup: (256,) from the cohort's own label numbers to classes.
        kinds: of ``mrgen.data.lesions.KINDS``; none leaves labels as they are. Without a donor none is transplanted.
        seed: of the cohort.
    """
    anatomy = planned.anatomy
    label = lookup[anatomy.read_label()]
    donors = _Donors([subject for subject in training if _may_give(subject, anatomy, lookup)], lookup)
    usable = [kind for kind in kinds if kind != "transplant" or len(donors)]
    if not usable:
        return Lesion(label, None, anatomy)
    rng = np.random.default_rng([seed, planned.number])
    label, done = manipulate(label, anatomy.read_brain(), rng, kinds=usable, donors=donors)
    return Lesion(label, done, donors.drawn if done == "transplant" and donors.drawn is not None else anatomy)


def _may_give(subject: StoredSubject, anatomy: StoredSubject, lookup: np.ndarray) -> bool:
    lesion = (lookup[number] for number in subject.label_counts or ())
    return (
        subject.patient != anatomy.patient
        and any(0 < mapped != IGNORED for mapped in lesion)
        and np.allclose(subject.spacing, anatomy.spacing, rtol=1e-2)
    )


# ----- what the generator gets, and what it gives ---------------------------------------------------------------------


def maps_of(planned: Planned, lesion: Lesion, lookup: np.ndarray, guides: Mapping[str, Guide]) -> LabelMaps:
    """Every slice that training shows of the anatomy, with the manipulated labels."""
    maps = label_maps(planned.anatomy, planned.box, lookup, guides, planned.z.step)
    # Padded to hold the box, of which the label's volume is a part along x and y, or that is a part of it.
    pads = [
        (max(-start, 0), max(stop - n, 0)) for (start, stop), n in zip(planned.box, lesion.label.shape, strict=True)
    ]
    cut = tuple(slice(start + pad, stop + pad) for (start, stop), (pad, _) in zip(planned.box, pads, strict=True))
    label = np.pad(lesion.label, pads)[cut].transpose(2, 0, 1)[:: planned.z.step]  # (Z, X, Y)
    return replace(maps, label=torch.from_numpy(label.astype(np.int64)))


def generator_seed(planned: Planned, seed: int) -> int:
    """What a generator that draws is to draw from, of a subject of the cohort."""
    return int(np.random.default_rng([seed, planned.number, _GENERATOR]).integers(2**31))


def write_synthetic(
    store: Path | str,
    planned: Planned,
    lesion: Lesion,
    made: Generated,
    *,
    scale: Mapping[str, Sequence[float]],
    numbers: np.ndarray,
    known: Mapping[str, Mapping[str, float]] | None = None,
) -> StoredSubject:
    """Writes a synthetic subject, with the slices that it keeps.

    Its statistics' upper ends are not its own but the training scans' (``mrgen.data.normalisation.known_ends``), so
    that a normalisation reads back what the generator made, as bright as it made it.

    Args:
        store: with a ``cohort.json`` of the generator's sequences.
        planned, lesion: what it was made from.
        made: of all slices of ``planned``.
        scale: (offset, factor) of every sequence in order: intensity = offset + factor · value.
        numbers: (256,) from classes to the cohort's own label numbers, see ``own_numbers``.
        known: by sequence, of ``StoredSubject.statistics``, what is not to be measured on the synthetic scan.
    """
    kept = list(planned.kept)
    brain = made.brain[kept].permute(1, 2, 0).numpy()  # (X, Y, Z)
    label = numbers[made.label[kept].permute(1, 2, 0).numpy()]
    offset, factor = (np.array(part, np.float32)[:, None, None, None] for part in zip(*scale.values(), strict=True))
    image = offset + factor * made.image[kept].permute(1, 2, 3, 0).numpy()  # (C, X, Y, Z)
    structure = None if made.structure is None else made.structure[kept].permute(1, 2, 0).numpy()
    told: dict[str, Any] = {"filters": dict(made.filters)} if made.filters else {}
    if made.records:
        told["records"] = [made.records[place] for place in kept]
    anatomy, z = planned.anatomy, planned.slices
    return write_subject(
        store,
        id=planned.id,
        image=np.where(brain, image, 0),
        label=label,
        structure=structure,
        brain=brain,
        affine=anatomy.affine @ _cut(planned),
        patient=lesion.subject.patient,
        grade=lesion.subject.grade,
        site=anatomy.site,
        source={
            "number": planned.number,
            "anatomy": anatomy.id,
            "lesion": lesion.subject.id,
            "manipulation": lesion.manipulation,
            "slices": z,
            **told,
        },
        known=known,
    )


def own_numbers(lookup: np.ndarray) -> np.ndarray:
    """(256,) uint8 from mapped classes, 255 included, to an own label number of each; the least where there are some.

    Args:
        lookup: (256,) the other way, with 0 for 0.
    """
    numbers = np.zeros(256, np.uint8)
    mapped, first = np.unique(lookup, return_index=True)
    numbers[mapped] = first
    return numbers


def _cut(planned: Planned) -> np.ndarray:
    """4×4, voxels of the synthetic subject to those of its anatomy; of slices left out here and there the mean gap."""
    cut, z = np.eye(4), planned.slices
    cut[:3, 3] = [planned.box[0][0], planned.box[1][0], z[0]]
    cut[2, 2] = (z[-1] - z[0]) / (len(z) - 1) if len(z) > 1 else planned.z.step
    return cut
