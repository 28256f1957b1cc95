"""The average healthy brain of a training set, which tells a generator what anatomy a slice has (Guo et al.)."""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mrgen.arrays import read_arrays
from mrgen.data.alignment import mni_affine, mni_grid
from mrgen.data.normalisation import Normalisation, stored_statistics
from mrgen.data.store import Box, StoredSubject
from mrgen.errors import UserError
from mrgen.files import read_bytes, read_json, replacing

__all__ = ["Atlas"]

VERSION = 1
_ARRAYS, _TABLE = "atlas.npz", "atlas.json"
_KINDS = {"mean": ("f", 4), "background": ("f", 1), "affine": ("f", 2)}  # NumPy's kinds, and axes


@dataclass(frozen=True, eq=False)
class Atlas:
    """Voxelwise mean of normalised training subjects, their lesions left out ("group average", Guo et al., section 3).

    A cohort in one space (all subjects of one shape and affine, as BraTS in SRI24) is averaged as it is. Else every
    subject is aligned to the MNI152 T1 by one affine and the mean lies there; ``on`` then looks at it through a
    subject's own voxels. The authors build a deformable multivariate template, for which this mean stands in.

    Where all subjects have a lesion the nearest voxel that somebody fills stands in: tissue is likelier there than a
    hole. Where none has a voxel at all, outside every field of view, there is background.

    Attributes:
        mean: (C, X, Y, Z) float32, on the normalisation's scale.
        background: (C,) float32, what stands outside: the lowest intensity of a scan outside its brain, normalised.
        affine: 4×4, voxels of the mean to RAS+ world (mm); the subjects' own where they are in one space, else MNI.
        one_space: whether the training subjects are.
        modalities: the channels of the mean, in order.
        scale: names the normalisation's.
        patients, subjects: who was averaged: patients and ids, sorted.
        shape: (X, Y, Z) of the grid that is looked at.
        pull: 4×4, voxels of that grid to those of the mean; None: the mean's own.
    """

    mean: np.ndarray
    background: np.ndarray
    affine: np.ndarray
    one_space: bool
    modalities: tuple[str, ...]
    scale: str
    patients: tuple[str, ...]
    subjects: tuple[str, ...]
    shape: tuple[int, int, int]
    pull: np.ndarray | None = None
    _known: dict[tuple[Path, str], np.ndarray] = field(default_factory=dict, repr=False)  # by subject and revision

    @classmethod
    def fit(cls, subjects: Sequence[StoredSubject], modalities: Sequence[str], normalisation: Normalisation) -> "Atlas":
        """Averages subjects, which have to be those of training alone.

        Args:
            subjects: with labels: all above 0 is lesion, the ignored 255 too. Their order does not matter.
            modalities: sequences to average, in this order.
            normalisation: as of the images that the atlas goes with.

        Raises:
            UserError: no subject, one without a label or a sequence, or one that cannot be aligned.
        """
        if not subjects:
            raise UserError("atlas: found no training subjects, expected one or more; look at data.split")
        subjects = sorted(subjects, key=lambda subject: (subject.id, str(subject.path)))
        first, known = subjects[0], {}
        one_space = all(_on_grid(subject, first.shape, first.affine) for subject in subjects)
        shape, affine = first.shape, first.affine
        if not one_space:  # as fine as the finest scan, but not finer than the template
            shape, affine = mni_grid(max(1.0, min(min(subject.spacing) for subject in subjects)))
        total, background = np.zeros((len(modalities), *shape)), np.zeros(len(modalities))
        healthy, seen = np.zeros(shape), np.zeros(shape, bool)
        for subject in subjects:
            image, weight, lowest = _healthy(subject, modalities, normalisation)
            within = np.ones(subject.shape, np.float32)
            if not one_space:
                known[_key(subject)] = mni_affine(subject)
                pull = np.linalg.inv(subject.affine) @ known[_key(subject)] @ affine
                # The interpolated sum over the interpolated weight: lesions leak into no neighbour.
                image = np.stack([_resampled(channel, pull, shape) for channel in image])
                weight = _resampled(weight, pull, shape)
                within = _resampled(within, pull, shape, order=0)
            total += image
            healthy += weight
            seen |= within > 0
            background += lowest / len(subjects)
        return cls(
            mean=_mean(total, healthy, seen, background),
            background=background.astype(np.float32),
            affine=affine,
            one_space=one_space,
            modalities=tuple(modalities),
            scale=normalisation.scale,
            patients=tuple(sorted({subject.patient for subject in subjects})),
            subjects=tuple(subject.id for subject in subjects),
            shape=shape,
            _known=known,
        )

    def on(self, subject: StoredSubject) -> "Atlas":
        """The same atlas, looked at through a subject's voxels: resampled where and when ``crop`` or ``slices`` ask.

        In one space it is the atlas itself. Else the subject's alignment is computed once (about a second) and kept;
        call this before loader processes start, lest each computes its own.

        Raises:
            UserError: the training subjects are in one space and this one is on another grid; or it cannot be aligned.
        """
        if self.one_space:
            if not _on_grid(subject, self.shape, self.affine):
                raise UserError(
                    f"{subject.id}: found {_grid(subject.shape, subject.affine)}, expected the atlas's "
                    f"{_grid(self.shape, self.affine)}, because its training subjects are in one space; register the "
                    "scan to that space and prepare it anew, or train on the cohort that it comes from"
                )
            return self
        if _key(subject) not in self._known:
            self._known[_key(subject)] = mni_affine(subject)
        to_mni = np.linalg.inv(self._known[_key(subject)])
        return replace(self, shape=subject.shape, pull=np.linalg.inv(self.affine) @ to_mni @ subject.affine)

    def slices(self, z: int) -> np.ndarray:
        """Axial slices z − 1, z and z + 1 of every sequence; the outermost slice has itself for a missing neighbour.

        Returns:
            (3 · sequences, X, Y) float32, by sequence and then by slice: t1 at z − 1, z, z + 1, t1ce at z − 1, …
        """
        if not 0 <= z < self.shape[2]:
            raise IndexError(f"slice {z} of {self.shape[2]}")
        return self.crop(((0, self.shape[0]), (0, self.shape[1]), (z, z + 1)))[..., 0]

    def crop(self, box: Box) -> np.ndarray:
        """``slices`` for every z of a box.

        Args:
            box: ((x0, x1), (y0, y1), (z0, z1)), ends exclusive; what exceeds the volume is background.

        Returns:
            (3 · sequences, x, y, z) float32.
        """
        size = [stop - start for start, stop in box]
        inside = [(max(start, 0), min(stop, n)) for (start, stop), n in zip(box, self.shape, strict=True)]
        out = np.empty((len(self.mean), 3, *size), np.float32)
        out[...] = self.background[:, None, None, None, None]
        if all(start < stop for start, stop in inside):
            x, y, (low, high) = inside
            below, above = max(low - 1, 0), min(high + 1, self.shape[2])
            planes = self._read((x, y, (below, above)))  # (C, x, y, z and neighbours)
            neighbours = np.clip(np.arange(low, high)[:, None] + [-1, 0, 1], below, above - 1) - below  # (z, 3)
            place = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(inside, box, strict=True))
            out[(slice(None), slice(None), *place)] = np.moveaxis(planes[..., neighbours], -1, 1)
        return out.reshape(-1, *size)

    def _read(self, box: Box) -> np.ndarray:
        """(C, x, y, z) of a box within the volume."""
        if self.pull is None:
            return self.mean[(slice(None), *(slice(*ends) for ends in box))]
        pull = self.pull.copy()
        pull[:3, 3] += pull[:3, :3] @ [start for start, _ in box]
        shape = [stop - start for start, stop in box]
        return np.stack(
            [_resampled(c, pull, shape, outside=float(b)) for c, b in zip(self.mean, self.background, strict=True)]
        )

    def save(self, folder: Path | str) -> None:
        """Writes ``atlas.npz``, and ``atlas.json`` with who was averaged and how; the atlas itself, not a view of it.

        Raises:
            UserError: the folder cannot be written.
        """
        folder, arrays = Path(folder), io.BytesIO()
        np.savez_compressed(arrays, mean=self.mean, background=self.background, affine=self.affine)
        table = {
            "version": VERSION,
            "modalities": self.modalities,
            "scale": self.scale,
            "one_space": self.one_space,
            "shape": self.mean.shape[1:],
            "affine": self.affine.tolist(),  # to be read by people; `load` takes the exact one
            "patients": self.patients,
            "subjects": self.subjects,
            "sha256": hashlib.sha256(arrays.getbuffer()).hexdigest(),
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in ((_ARRAYS, arrays.getvalue()), (_TABLE, json.dumps(table, indent=1).encode())):
                with replacing(folder / name) as file:
                    file.write(content)
        except OSError as error:
            raise UserError(
                f"{folder}: the atlas cannot be written ({error.strerror or error}); choose another folder"
            ) from error

    @classmethod
    def load(cls, folder: Path | str) -> "Atlas":
        """What ``save`` wrote, bit for bit.

        Raises:
            UserError: nothing there, or damaged, or of another version.
        """
        folder = Path(folder)
        for name in (_TABLE, _ARRAYS):
            if not (folder / name).exists():
                raise UserError(
                    f"{folder}: found no {name}, expected the atlas that training saves with its run; give the folder "
                    "of a finished run, or train anew"
                )
        told: dict[str, str] = {"expected": "the atlas of a run", "remedy": "copy it again or train anew"}
        table = read_json(folder / _TABLE, **told)
        try:
            if table["version"] != VERSION:
                raise UserError(f"{folder}: found atlas version {table['version']}, expected {VERSION}; train anew")
            digest = hashlib.sha256(read_bytes(folder / _ARRAYS, **told)).hexdigest()
            if digest != table["sha256"]:
                raise ValueError(f"{_ARRAYS} is not what {_TABLE} was written for")
            arrays: dict[str, Any] = {**read_arrays(folder / _ARRAYS, _KINDS, **told)}
            known: dict[str, Any] = {
                name: tuple(table[name]) for name in ("modalities", "patients", "subjects", "shape")
            }
            if not isinstance(table["one_space"], bool) or not isinstance(table["scale"], str):
                raise ValueError(f"one_space {table['one_space']!r:.40} and scale {table['scale']!r:.40}")
            atlas = cls(**arrays, **known, one_space=table["one_space"], scale=table["scale"])
            sequences = len(atlas.modalities)
            if (
                atlas.mean.shape != (sequences, *atlas.shape)
                or atlas.background.shape != (sequences,)
                or atlas.affine.shape != (4, 4)
            ):
                raise ValueError(f"a mean of {atlas.mean.shape} for {sequences} sequences of {atlas.shape}")
            return atlas
        except (ValueError, KeyError, TypeError) as error:
            found = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{folder}: the atlas cannot be read ({found}); copy it again or train anew") from error


def _healthy(
    subject: StoredSubject, modalities: Sequence[str], normalisation: Normalisation
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image with 0 in lesions (C, X, Y, Z), 1 elsewhere and 0 in lesions (X, Y, Z), and background (C,), normalised."""
    healthy = (subject.read_label() == 0).astype(np.float32)
    image = torch.from_numpy(subject.read_image(modalities))
    known = stored_statistics(normalisation, subject, modalities)
    lowest = torch.tensor([subject.statistics[name]["volume_min"] for name in modalities])[:, None, None, None]
    lowest = normalisation(lowest, torch.zeros(1, 1, 1, dtype=torch.bool), known)
    image = normalisation(image, torch.from_numpy(subject.read_brain()), known)
    return image.numpy() * healthy, healthy, lowest.flatten().numpy()


def _mean(total: np.ndarray, healthy: np.ndarray, seen: np.ndarray, background: np.ndarray) -> np.ndarray:
    """(C, X, Y, Z) float32.

    Args:
        total: (C, X, Y, Z), sum of the healthy voxels.
        healthy: (X, Y, Z), how many these are; a part of one where they are interpolated.
        seen: (X, Y, Z) bool, within anybody's field of view.
        background: (C,).
    """
    from scipy.ndimage import distance_transform_edt

    filled = healthy > 1e-3
    mean = (total / np.where(filled, healthy, 1)).astype(np.float32)
    mean[:, ~filled] = background[:, None]
    if (holes := seen & ~filled).any() and filled.any():
        nearest = distance_transform_edt(~filled, return_distances=False, return_indices=True)
        mean[:, holes] = mean[(slice(None), *nearest[:, holes])]
    return mean


def _resampled(
    volume: np.ndarray, pull: np.ndarray, shape: Sequence[int], *, order: int = 1, outside: float = 0.0
) -> np.ndarray:
    """(X, Y, Z) float32 on a grid whose voxels ``pull`` (4×4) takes to the volume's."""
    from scipy.ndimage import affine_transform

    return affine_transform(
        volume, pull[:3, :3], pull[:3, 3], tuple(shape), np.float32, order, mode="constant", cval=outside
    )


def _on_grid(subject: StoredSubject, shape: Sequence[int], affine: np.ndarray) -> bool:
    return subject.shape == tuple(shape) and np.allclose(subject.affine, affine, rtol=0, atol=1e-3)  # mm


def _grid(shape: Sequence[int], affine: np.ndarray) -> str:
    sides = np.linalg.norm(affine[:3, :3], axis=0)
    return (
        f"{' × '.join(map(str, shape))} voxels of {' × '.join(f'{side:.3g}' for side in sides)} mm "
        f"from ({', '.join(f'{x:.5g}' for x in affine[:3, 3])}) mm on"
    )


def _key(subject: StoredSubject) -> tuple[Path, str]:
    return subject.path, subject.revision
