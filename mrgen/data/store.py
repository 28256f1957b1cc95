"""The prepared store: one folder a subject, readable crop by crop without loading a volume.

    store/cohort.json       version, name, modalities, layout, settings (a digest; see below)
    store/<id>/image.npy    (C, X, Y, Z) C order, int16 where all sequences are whole numbers in its range, else float32
    store/<id>/label.npy    (X, Y, Z) uint8, the cohort's own label numbers; absent for unlabelled subjects
    store/<id>/brain.npy    (X, Y, Z) uint8, 0 or 1; one mask for all sequences
    store/<id>/structure.npy  likewise, the structure maps of a synthetic subject that was made from some
    store/<id>/subject.json everything else

Axes are canonical: RAS+, x y z. A subject's folder is written under a hidden name beside its place and then renamed, so
that it is there as a whole or not at all. `settings` is a digest of what decides the arrays (modalities, label numbers,
kind of brain mask, version of the preparation); a subject whose digest is not the cohort's was prepared otherwise and
is not shown.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mrgen.data.layouts import Layout
from mrgen.data.stored_subject import BRAIN, IMAGE, LABEL, STRUCTURE, Box, StoredSubject, to_original
from mrgen.errors import UserError

VERSION = 1
_SUBJECT, _COHORT = "subject.json", "cohort.json"

__all__ = [
    "Box",
    "Store",
    "StoredSubject",
    "bounding_box",
    "read_cohort",
    "read_subjects",
    "remove_leftovers",
    "remove_subject",
    "settings_digest",
    "sole_writer",
    "statistics",
    "stored_type",
    "to_original",
    "write_cohort",
    "write_subject",
    "write_synced",
]


class Store:
    """A prepared cohort.

    Args:
        path: the folder that `mrgen-prepare` wrote.

    Attributes:
        path: the folder.
        name: the layout's name, such as `brats2019`.
        modalities: the order of the channels in `image.npy`.
        layout: the cohort's table, with label maps, classes and regions.
        subjects: complete subjects prepared with the cohort's present settings, by id, sorted.

    Raises:
        UserError: the folder holds no store, or one of another version.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        cohort = read_cohort(self.path)
        if cohort is None:
            raise UserError(
                f"{path}: found no {_COHORT}, expected a prepared store; run mrgen-prepare with the "
                "same data=… (and data.root, data.store), or set data.store"
            )
        self.name: str = cohort["name"]
        self.modalities: tuple[str, ...] = tuple(cohort["modalities"])
        self.layout = Layout.from_conf(cohort["layout"])
        self.subjects: dict[str, StoredSubject] = {
            id_: StoredSubject.from_table(self.path / id_, table)
            for id_, table in read_subjects(self.path).items()
            if table["settings"] == cohort["settings"]
        }

    def __len__(self) -> int:
        return len(self.subjects)


def settings_digest(layout: Layout, modalities: Sequence[str]) -> str:
    """A digest of all that decides a subject's arrays beside its files."""
    deciding = [VERSION, list(modalities), sorted(layout.label_values), layout.skull_stripped]
    return hashlib.sha256(json.dumps(deciding).encode()).hexdigest()[:16]


def read_cohort(store: Path | str) -> dict[str, Any] | None:
    """`cohort.json` as a dict, or None where there is none.

    Raises:
        UserError: it cannot be read, or its version is another.
    """
    path = Path(store) / _COHORT
    try:
        cohort = json.loads(path.read_text(encoding="utf-8"))
        version = cohort["version"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as a store's table ({type(error).__name__}); prepare anew") from error
    if version != VERSION:
        raise UserError(f"{path}: found store version {version}, expected {VERSION}; prepare into a new data.store")
    return cohort


def read_subjects(store: Path | str) -> dict[str, dict[str, Any]]:
    """The `subject.json` of every complete subject, by id, sorted; also of those prepared with other settings."""
    tables = {}
    with os.scandir(store) as entries:
        folders = sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
    for name in folders:
        try:
            tables[name] = json.loads((Path(store) / name / _SUBJECT).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            continue  # not ours, or damaged by hand: such a subject counts as not prepared
    return tables


def write_cohort(store: Path | str, layout: Layout, modalities: Sequence[str]) -> None:
    """Writes `cohort.json` in one step; subjects prepared with other settings disappear from `Store` by that."""
    store = Path(store)
    table = {
        "version": VERSION,
        "name": layout.name,
        "modalities": list(modalities),
        "settings": settings_digest(layout, modalities),
        "layout": layout.to_conf(),
    }
    try:
        store.mkdir(parents=True, exist_ok=True)
        partial = store / f".{_COHORT}.{uuid.uuid4().hex[:8]}"
        write_synced(partial, json.dumps(table, indent=1).encode())
        os.replace(partial, store / _COHORT)
    except OSError as error:
        raise UserError(f"data.store={store}: cannot be written ({error.strerror}); choose another folder") from error


def write_subject(
    store: Path | str,
    *,
    id: str,
    image: np.ndarray,
    brain: np.ndarray,
    affine: np.ndarray,
    label: np.ndarray | None = None,
    structure: np.ndarray | None = None,
    patient: str | None = None,
    grade: str | None = None,
    site: str | None = None,
    original_affine: np.ndarray | None = None,
    original_shape: Sequence[int] | None = None,
    brain_method: str = "given",
    source: Mapping[str, Any] | None = None,
    known: Mapping[str, Mapping[str, float]] | None = None,
) -> StoredSubject:
    """Writes one subject as a whole, in place of an earlier one of its id.

    Args:
        store: a folder with a `cohort.json` (`write_cohort`), which says what the channels are.
        id: the name of its folder.
        image: (C, X, Y, Z), canonical orientation, channels in the order of the cohort's modalities.
        brain: (X, Y, Z), true inside the brain.
        affine: 4×4, voxels to RAS+ world.
        label: (X, Y, Z), the cohort's own label numbers, or None.
        structure: (X, Y, Z), true on edges, of a synthetic subject that was made from structure maps; or None.
        patient: default: the id.
        grade: or None.
        site: or None.
        original_affine: that of the file the subject came from; default: `affine`.
        original_shape: likewise; default: that of the image.
        brain_method: how the mask came about.
        source: a fingerprint of what the subject was made from, kept in `subject.json`.
        known: by sequence, statistics that are not to be measured: a synthetic image is normalised by the percentile of
            the scale that it was made on, lest it be stretched to its own.

    Returns:
        The subject as `Store` will show it.

    Raises:
        UserError: the store has no `cohort.json` or cannot be written.
    """
    store = Path(store)
    cohort = read_cohort(store)
    if cohort is None:
        raise UserError(f"{store}: found no {_COHORT}, expected a store; write_cohort comes first")
    if image.ndim != 4 or image.shape[0] != len(cohort["modalities"]) or brain.shape != image.shape[1:]:
        raise ValueError(f"image {image.shape}, brain {brain.shape}: expected {len(cohort['modalities'])} channels")
    for name, array in (("label", label), ("structure", structure)):
        if array is not None and array.shape != brain.shape:
            raise ValueError(f"{name} {array.shape}: expected {brain.shape}")
    image, label = stored_type(image), None if label is None else label.astype(np.uint8)
    brain = np.ascontiguousarray(brain, dtype=np.bool_)
    table = {
        "id": id,
        "patient": patient or id,
        "grade": grade,
        "site": site,
        "modalities": cohort["modalities"],
        "shape": list(brain.shape),
        "spacing": [float(side) for side in np.linalg.norm(np.asarray(affine)[:3, :3], axis=0)],
        "affine": np.asarray(affine, dtype=float).tolist(),
        "original_affine": np.asarray(affine if original_affine is None else original_affine, dtype=float).tolist(),
        "original_shape": [int(n) for n in (original_shape or brain.shape)],
        "brain_box": bounding_box(brain),
        "statistics": {
            m: {**statistics(image[i], brain), **(known or {}).get(m, {})} for i, m in enumerate(cohort["modalities"])
        },
        "label_counts": None
        if label is None
        else {str(n): int(count) for n, count in enumerate(np.bincount(label.ravel())) if count},
        "brain_method": brain_method,
        "settings": cohort["settings"],
        "source": dict(source or {}),
        "revision": uuid.uuid4().hex,
    }
    partial = store / f".{id}.{uuid.uuid4().hex[:8]}.partial"
    try:
        partial.mkdir()
        edges = None if structure is None else np.ascontiguousarray(structure, dtype=np.bool_).view(np.uint8)
        for name, array in ((IMAGE, image), (LABEL, label), (BRAIN, brain.view(np.uint8)), (STRUCTURE, edges)):
            if array is not None:
                with open(partial / name, "wb") as file:
                    np.save(file, array, allow_pickle=False)
                    file.flush()
                    os.fsync(file.fileno())
        write_synced(partial / _SUBJECT, json.dumps(table, indent=1).encode())
        remove_subject(store, id)
        os.rename(partial, store / id)
    except OSError as error:
        raise UserError(f"data.store={store}: {id} cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return StoredSubject.from_table(store / id, table)


def remove_subject(store: Path | str, id: str) -> None:
    """Takes a subject out of the store, if it is there: first out of sight in one step, then off the disk."""
    gone = Path(store) / f".{id}.{uuid.uuid4().hex[:8]}.gone"
    try:
        os.rename(Path(store) / id, gone)
    except FileNotFoundError:
        return
    shutil.rmtree(gone, ignore_errors=True)


def remove_leftovers(store: Path | str) -> None:
    """Clears what a killed preparation left under hidden names. Nobody else may be writing to the store."""
    for path in Path(store).glob(".*"):
        if path.name.endswith((".partial", ".gone")):
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(f".{_COHORT}."):
            path.unlink(missing_ok=True)


@contextmanager
def sole_writer(store: Path) -> Iterator[None]:
    """Refuses a second writer to one store, which is made; the system lets go of the lock when a process dies."""
    import fcntl

    try:
        store.mkdir(parents=True, exist_ok=True)
        lock = open(store / ".lock", "w")  # noqa: SIM115 (closed below, whatever happens)
    except OSError as error:
        raise UserError(f"data.store={store}: cannot be written ({error.strerror}); choose another folder") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"data.store={store}: another process is writing to it; wait for it to end") from None
        except OSError:
            pass  # some network file systems have no locks
        yield


def write_synced(path: Path, data: bytes) -> None:
    """Writes a file and waits until the disk has it, so that a rename afterwards never outruns its content."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def stored_type(image: np.ndarray) -> np.ndarray:
    """Half the bytes of float32 where nothing is lost by it, as in every BraTS release."""
    limits = np.iinfo(np.int16)
    whole = np.issubdtype(image.dtype, np.integer) or all(bool(np.all(c == np.rint(c))) for c in image)
    fits = whole and image.min() >= limits.min and image.max() <= limits.max
    return np.ascontiguousarray(image, dtype=np.int16 if fits else np.float32)


def bounding_box(brain: np.ndarray) -> list[list[int]]:
    """[[x0, x1], [y0, y1], [z0, z1]] around an (X, Y, Z) mask, ends exclusive; the whole volume where it is empty."""
    box = []
    for axis in range(3):
        inside = np.flatnonzero(brain.any(axis=tuple(a for a in range(3) if a != axis)))
        box.append([int(inside[0]), int(inside[-1]) + 1] if len(inside) else [0, brain.shape[axis]])
    return box


def statistics(volume: np.ndarray, brain: np.ndarray) -> dict[str, float]:
    """What a normalisation needs of one sequence, see `StoredSubject.statistics`.

    Args:
        volume: (X, Y, Z) as `stored_type` leaves it.
        brain: (X, Y, Z) bool; where it is empty, the whole volume counts.
    """
    values = volume[brain].astype(np.float64) if brain.any() else volume.ravel().astype(np.float64)
    low, q1, q3, high = np.percentile(values, [0.5, 25, 75, 99.5])
    clipped = np.clip(values, low, high)
    named = {
        "min": values.min(),
        "max": values.max(),
        "mean": values.mean(),
        "std": values.std(),
        "p0_5": low,
        "q1": q1,
        "q3": q3,
        "p99_5": high,
        "clipped_mean": clipped.mean(),
        "clipped_std": clipped.std(),
        "volume_min": volume.min(),
        "volume_max": volume.max(),
    }
    return {name: float(value) for name, value in named.items()}
