"""One prepared subject: its table in memory, its arrays on disk and read crop by crop."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mrgen.errors import UserError

Box = Sequence[tuple[int, int]]
IMAGE, LABEL, BRAIN, STRUCTURE = "image.npy", "label.npy", "brain.npy", "structure.npy"


@dataclass(frozen=True)
class StoredSubject:
    """One subject: its table in memory, its arrays on disk.

    Attributes:
        path: the subject's folder.
        id: unique in the store.
        patient: whose scan it is; splits are by patient.
        grade: HGG, LGG or None.
        site: where it was scanned, or None.
        modalities: the channels of the image, in order.
        shape: (X, Y, Z) in canonical orientation.
        spacing: voxel sides in mm, in canonical orientation.
        affine: 4×4, canonical voxels to RAS+ world (mm).
        original_affine: 4×4, the file's own voxels to RAS+ world.
        original_shape: the file's own shape.
        brain_box: ((x0, x1), (y0, y1), (z0, z1)) around the brain, ends exclusive.
        statistics: for each modality, over the brain: min, max, mean, std, p0_5, p99_5 (percentiles), q1, q3,
            clipped_mean, clipped_std (after clipping to the two percentiles); over all voxels: volume_min, volume_max.
        label_counts: voxels of each label number, 0 included; None for an unlabelled subject.
        brain_method: how the brain was found: `background`, `head`, `head_filled` (see `mrgen.data.brain`), `mask` (a
            file of the user's) or `given`.
        revision: changes with every preparation.
        checksums: by file, and of the image by sequence, what `mrgen.data.stored_tables.checksums` says of the voxels;
            empty where they were prepared before checksums were recorded.
    """

    path: Path
    id: str
    patient: str
    grade: str | None
    site: str | None
    modalities: tuple[str, ...]
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    affine: np.ndarray = field(repr=False, compare=False)
    original_affine: np.ndarray = field(repr=False, compare=False)
    original_shape: tuple[int, int, int]
    brain_box: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    statistics: dict[str, dict[str, float]] = field(repr=False, compare=False)
    label_counts: dict[int, int] | None = field(repr=False, compare=False)
    brain_method: str
    revision: str
    checksums: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_table(cls, path: Path, table: Mapping[str, Any]) -> "StoredSubject":
        counts = table["label_counts"]
        return cls(
            path=path,
            id=table["id"],
            patient=table["patient"],
            grade=table["grade"],
            site=table["site"],
            modalities=tuple(table["modalities"]),
            shape=tuple(table["shape"]),
            spacing=tuple(table["spacing"]),
            affine=np.array(table["affine"]),
            original_affine=np.array(table["original_affine"]),
            original_shape=tuple(table["original_shape"]),
            brain_box=tuple((int(a), int(b)) for a, b in table["brain_box"]),  # type: ignore[arg-type]
            statistics=table["statistics"],
            label_counts=None if counts is None else {int(k): int(v) for k, v in counts.items()},
            brain_method=table["brain_method"],
            revision=table["revision"],
            checksums=table.get("checksums", {}),
        )

    @property
    def labelled(self) -> bool:
        """Whether there is a label."""
        return self.label_counts is not None

    def read_image(
        self,
        modalities: Sequence[str] | None = None,
        box: Box | None = None,
        out: np.ndarray | None = None,
        fill: float = 0,
    ) -> np.ndarray:
        """A crop of the image, read from disk alone.

        Args:
            modalities: the channels wanted, in order; default: all.
            box: ((x0, x1), (y0, y1), (z0, z1)), ends exclusive; what exceeds the volume is filled. Default: all.
            out: (C, x, y, z) array to fill and return, of any type that holds the stored one (float32 always does).
                Reusing one is what keeps worker processes from page-faulting fresh memory for every crop.
            fill: value outside the volume.

        Returns:
            (C, x, y, z) of the stored type, or `out`.

        Raises:
            UserError: the store lacks a modality.
        """
        wanted = self.modalities if modalities is None else tuple(modalities)
        if unknown := [m for m in wanted if m not in self.modalities]:
            raise UserError(f"{self.id}: the store holds {', '.join(self.modalities)}, not {', '.join(unknown)}")
        image = _opened(str(self.path / IMAGE), self.revision)
        if wanted == self.modalities:
            return _crop(image, box, out, fill)
        shape = tuple(b - a for a, b in box) if box is not None else self.shape
        out = np.empty((len(wanted), *shape), dtype=image.dtype) if out is None else out
        for channel, modality in zip(out, wanted, strict=True):
            i = self.modalities.index(modality)
            _crop(image[i : i + 1], box, channel[None], fill)
        return out

    def read_label(self, box: Box | None = None, out: np.ndarray | None = None, fill: int = 0) -> np.ndarray:
        """(x, y, z) uint8, the cohort's own label numbers; see `read_image`.

        Raises:
            UserError: the subject is unlabelled.
        """
        if not self.labelled:
            raise UserError(f"{self.id} has no label; leave unlabelled subjects out of what needs one")
        label = _opened(str(self.path / LABEL), self.revision)
        return _crop(label[None], box, None if out is None else out[None], fill)[0]

    def read_brain(self, box: Box | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """(x, y, z) bool, the brain mask that all sequences share; False outside the volume; see `read_image`."""
        brain = _opened(str(self.path / BRAIN), self.revision).view(np.bool_)
        return _crop(brain[None], box, None if out is None else out[None], False)[0]

    def read_structure(self, box: Box | None = None) -> np.ndarray:
        """(x, y, z) bool, the structure maps that a synthetic subject was made from; see `read_image`.

        Raises:
            UserError: it was made from none, or is a scan.
        """
        if not (self.path / STRUCTURE).is_file():
            raise UserError(f"{self.id} has no structure maps, which a lesion VAE-GAN's synthetic subjects have alone")
        return _crop(_opened(str(self.path / STRUCTURE), self.revision).view(np.bool_)[None], box, None, False)[0]


@lru_cache(maxsize=256)  # each mapping holds a file descriptor, and a BraTS 2021 store has 3753 files
def _opened(path: str, revision: str) -> np.ndarray:
    # `revision` is in the key so that a subject prepared anew is not read through the old mapping. The plain ndarray
    # view slices faster than np.memmap, whose __array_finalize__ runs for every slice.
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
    except Exception as error:  # damaged since the store was opened; whatever NumPy says of it
        found = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
        raise UserError(
            f"{path}: the prepared subject is damaged ({found}); mrgen-prepare with the same data=… mends it, "
            "verify=true compares all voxels"
        ) from error


def _crop(array: np.ndarray, box: Box | None, out: np.ndarray | None, fill: float) -> np.ndarray:
    """Copies `box` of a (C, X, Y, Z) array; voxels outside the volume get `fill`."""
    if box is None:
        box = [(0, n) for n in array.shape[1:]]
    shape = (array.shape[0], *(b - a for a, b in box))
    if out is None:
        out = np.empty(shape, dtype=array.dtype)
    elif out.shape != shape:
        raise ValueError(f"out has the shape {out.shape}, the crop {shape}")
    inside = [(max(a, 0), min(b, n)) for (a, b), n in zip(box, array.shape[1:], strict=True)]
    if inside == [(a, b) for a, b in box]:
        source, target = array, out
    else:
        out[...] = fill
        if any(a >= b for a, b in inside):
            return out
        source = array
        target = out[(slice(None), *(slice(i - a, j - a) for (i, j), (a, _) in zip(inside, box, strict=True)))]
    np.copyto(target, source[(slice(None), *(slice(a, b) for a, b in inside))])
    return out


def to_original(array: np.ndarray, subject: StoredSubject) -> np.ndarray:
    """Turns an array in canonical orientation back to that of the subject's files.

    Args:
        array: (..., X, Y, Z) in canonical orientation, of the subject's whole volume.
        subject: whose `original_affine` belongs to the result.

    Returns:
        (..., *original_shape); written with `subject.original_affine` it overlays the input.
    """
    if array.shape[-3:] != subject.shape:
        raise ValueError(f"expected (..., {', '.join(map(str, subject.shape))}), found {array.shape}")
    return to_orientation(array, subject.original_affine)


def to_orientation(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Turns an array in canonical orientation to that of an affine.

    Args:
        array: (..., X, Y, Z) in canonical orientation (RAS+).
        affine: 4×4, voxels to RAS+ world, of the file that the array belongs to.

    Returns:
        The same voxels with axes permuted and flipped, of that file's shape.
    """
    from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

    turn = ornt_transform(axcodes2ornt("RAS"), io_orientation(affine))
    spatial_first = np.moveaxis(array, (-3, -2, -1), (0, 1, 2))
    return np.ascontiguousarray(np.moveaxis(apply_orientation(spatial_first, turn), (0, 1, 2), (-3, -2, -1)))
