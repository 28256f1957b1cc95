"""Reads one subject's scans and says, in one line each, what is wrong with them."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from mrgen.data.brain import find_brain, why_no_brain
from mrgen.data.cohorts import Layout, Problem, SubjectFiles
from mrgen.data.nifti import largest_shift
from mrgen.data.reading import BadFileError, read_volume

LARGEST_SHIFT = 0.1  # of the smallest voxel side: float32 headers differ by far less, misregistration by far more
OUTSIDE_MARGIN = 2  # voxels around the brain in which a label is still at its edge
LABEL_ROUNDING = 1e-3  # how far a label may be from a whole number: resampling and slopes leave 3.9999999991 for 4
LARGEST_OUTSIDE = 0.01  # of the labelled voxels: stray clicks of annotators are no reason to refuse a subject


@dataclass(frozen=True)
class LoadedSubject:
    """One subject's arrays in canonical orientation (RAS+).

    Attributes:
        volumes: one (X, Y, Z) array for each modality, intensities as in the files.
        label: (X, Y, Z) uint8, or None.
        brain: (X, Y, Z) bool.
        brain_method: see `mrgen.data.brain.find_brain`; `mask` where the user brings one.
        affine: 4×4, canonical voxels to RAS+ world.
        original_affine: 4×4, the files' voxels to RAS+ world.
        original_shape: the files' shape.
        notes: what a header left open or had wrong and was decided; no reason to leave the subject out.
    """

    volumes: dict[str, np.ndarray]
    label: np.ndarray | None
    brain: np.ndarray
    brain_method: str
    affine: np.ndarray
    original_affine: np.ndarray
    original_shape: tuple[int, ...]
    notes: tuple[Problem, ...] = ()


def check_subject(files: SubjectFiles, layout: Layout) -> tuple[LoadedSubject | None, list[Problem]]:
    """Loads one subject and checks it. Whatever goes wrong with it is a problem of this subject and of no other.

    Returns:
        The subject, or None where there is a problem; and every problem found, in the order of the sequences.
    """
    try:
        return _check(files, layout)
    except MemoryError:
        what, kind = "found scans that do not fit into memory; use fewer workers or a larger machine", "too large"
    except Exception as error:  # of a library, over something that no check of ours foresaw
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        what, kind = f"found scans that cannot be checked ({why}); look at them, or leave them out", "not checked"
    return None, [Problem(files.id, str(files.folder), what, kind)]


def grouped(notes: Iterable[Problem]) -> list[str]:
    """Lines for notes, one for all files of which the same is said: ``S1 and 83 more: flair.nii.gz and 3 more: …``."""
    several: dict[str, list[Problem]] = {}
    for note in notes:
        several.setdefault(note.message, []).append(note)
    lines = []
    for message, same in several.items():
        subjects, files = (
            {note.subject: 0 for note in same},
            [note for note in same if note.subject == same[0].subject],
        )
        lines.append(f"{_first(list(subjects))}: {_first([Path(note.file).name for note in files])}: {message}")
    return lines


def _first(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _check(files: SubjectFiles, layout: Layout) -> tuple[LoadedSubject | None, list[Problem]]:
    problems: list[Problem] = []
    notes: list[Problem] = []

    def blame(path: Path, kind: str, message: str) -> None:
        problems.append(Problem(files.id, str(path), message, kind))

    volumes: dict[str, np.ndarray] = {}
    label: np.ndarray | None = None
    mask: np.ndarray | None = None
    reference: tuple[Path, tuple[int, ...], np.ndarray] | None = None
    for name, path in (*files.images.items(), ("label", files.label), ("brain", files.brain)):
        if path is None:
            continue
        try:
            volume = read_volume(path)
            array, affine = volume.array, volume.affine
            notes += (Problem(files.id, str(path), text, "note") for text in volume.notes)
            if name == "label" and path is files.label:
                array = _checked_label(array, layout)
                label = array
            elif name == "brain" and path is files.brain:
                array = _checked_mask(array)
                mask = array
            else:
                _check_intensities(array)
                volumes[name] = array
        except BadFileError as error:
            blame(path, error.kind, str(error))
            continue
        if reference is None:
            reference = path, array.shape, affine
        elif array.shape != reference[1]:
            found, expected = ("×".join(map(str, shape)) for shape in (array.shape, reference[1]))
            blame(
                path,
                "shapes differ",
                f"found the shape {found}, expected {expected} as in {reference[0].name}; bring them onto one grid",
            )
        elif (shift := largest_shift(affine, reference[2], array.shape)) > LARGEST_SHIFT:
            blame(
                path,
                "affines differ",
                f"found an affine up to {shift:.3g} voxels off, expected that of {reference[0].name}; "
                "bring them onto one grid",
            )
    for (name, array), (other, same) in combinations(volumes.items(), 2):
        if np.array_equal(array, same):
            message = f"found the same voxels in {name} and {other}, expected two scans; restore the one meant"
            blame(files.images[other], "same voxels in two sequences", f"{message}, or mend the layout's patterns")
    if problems or reference is None:
        return None, problems
    affine, original_shape = reference[2], reference[1]
    canonical_affine, turn = _canonical(affine, original_shape)
    volumes = {name: turn(volume) for name, volume in volumes.items()}
    label = None if label is None else turn(label)
    spacing = np.linalg.norm(canonical_affine[:3, :3], axis=0)
    if mask is None or files.brain is None:
        brain, allowed, method = find_brain(list(volumes.values()), spacing, skull_stripped=layout.skull_stripped)
    else:
        brain = allowed = turn(mask)
        method = "mask"
        if (wrong := why_no_brain(brain, list(volumes.values()), skull_stripped=layout.skull_stripped)) is not None:
            blame(files.brain, "brain mask", wrong)
    if not brain.any():
        blame(next(iter(files.images.values())), "no brain", "found no brain, expected intensities above a background")
    elif label is not None and files.label is not None and (lost := _outside(label, allowed)):
        blame(
            files.label,
            "label outside the brain",
            f"found {lost} of {int((label > 0).sum())} labelled voxels outside the brain, expected less than "
            f"{LARGEST_OUTSIDE:.0%}; is it another subject's label, or flipped?",
        )
    if problems:
        return None, problems
    return LoadedSubject(volumes, label, brain, method, canonical_affine, affine, original_shape, tuple(notes)), []


def _check_intensities(array: np.ndarray) -> None:
    """As a store will hold them: what float64 can say may be infinite, or all the same, as float32."""
    if array.dtype.kind == "f":
        with np.errstate(over="ignore", under="ignore"):
            array = array.astype(np.float32, copy=False)
        if bad := array.size - int(np.isfinite(array).sum()):
            raise BadFileError(
                "NaN or infinite voxels",
                f"found {bad} NaN or infinite voxels, expected finite intensities; export it again",
            )
    if (lowest := array.min()) == array.max():
        what = "all-zero volume" if lowest == 0 else "constant volume"
        raise BadFileError(what, f"found {lowest:g} in every voxel, expected an image; restore it")


def _checked_label(array: np.ndarray, layout: Layout) -> np.ndarray:
    expected = ", ".join(map(str, layout.label_values))
    return _whole_numbers(
        array,
        set(layout.label_values),
        "label numbers",
        f"the label {{found}}, expected {expected} ({layout.title}); is the layout another year's?",
    )


def _checked_mask(array: np.ndarray) -> np.ndarray:
    mask = _whole_numbers(array, {0, 1}, "brain mask", "{found}, expected 0 and 1: a mask of the brain; binarise it")
    if not mask.any():
        raise BadFileError("brain mask", "found an empty mask, expected 1 in the brain; make it again")
    return mask.astype(np.bool_)


def _whole_numbers(array: np.ndarray, allowed: set[int], kind: str, message: str) -> np.ndarray:
    """(X, Y, Z) uint8 of numbers that are allowed, as far as rounding goes. Raises BadFileError for others."""
    values, counts = np.unique(array, return_counts=True)
    whole = np.rint(values)
    good = (np.abs(values - whole) <= LABEL_ROUNDING) & np.isin(whole, list(allowed))  # NaN is near nothing
    if not good.all():
        bad = [(v, n) for v, n in zip(values[~good], counts[~good].tolist(), strict=True)]
        found = [f"{_in_digits(v)} ({n} voxel{'s' * (n != 1)})" for v, n in bad[:4]]
        raise BadFileError(kind, "found " + message.format(found=", ".join(found) + ", …" * (len(bad) > 4)))
    return np.rint(array).astype(np.uint8)


def _in_digits(number: float) -> str:
    return f"{number:g}" if abs(number) > 1e9 else np.format_float_positional(number, trim="-")


def _canonical(affine: np.ndarray, shape: tuple[int, ...]):
    """The affine in canonical orientation, and the function that turns an array there."""
    from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

    turn = io_orientation(affine)
    return affine @ inv_ornt_aff(turn, shape), lambda array: np.ascontiguousarray(apply_orientation(array, turn))


def _outside(label: np.ndarray, allowed: np.ndarray) -> int:
    """Labelled voxels outside, margin included; 0 where they are too few to matter."""
    from scipy.ndimage import binary_dilation

    suspect = (label > 0) & ~allowed
    if suspect.any():
        suspect &= ~binary_dilation(allowed, iterations=OUTSIDE_MARGIN)
    lost = int(suspect.sum())
    return lost if lost > LARGEST_OUTSIDE * (label > 0).sum() else 0
