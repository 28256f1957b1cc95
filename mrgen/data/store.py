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
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mrgen.data.layouts import Layout
from mrgen.data.measures import bounding_box, statistics, stored_type
from mrgen.data.stored_subject import BRAIN, IMAGE, LABEL, STRUCTURE, Box, StoredSubject, to_original
from mrgen.data.stored_tables import (
    COHORT,
    SUBJECT,
    VERSION,
    checksums,
    find_damage,
    read_cohort,
    read_subjects,
    scan_subjects,
    table_checksum,
)
from mrgen.errors import UserError
from mrgen.files import open_without_links

_LEFTOVER = re.compile(r"\.(.+)\.[0-9a-f]{8}\.(partial|gone|old)")

__all__ = [
    "Box",
    "Store",
    "StoredSubject",
    "bounding_box",
    "cohort_table",
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
        hidden: how many there are that were prepared with others.

    Raises:
        UserError: the folder holds no store, one of another version, or a subject that is damaged: all tables, and the
            types and sizes of all arrays are looked at (0.5 s of 1,251 subjects).
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        cohort = read_cohort(self.path)
        if cohort is None:
            raise UserError(
                f"{path}: found no {COHORT}, expected a prepared store; run mrgen-prepare with the "
                "same data=… (and data.root, data.store), or set data.store"
            )
        self.name: str = cohort["name"]
        self.modalities: tuple[str, ...] = tuple(cohort["modalities"])
        try:
            self.layout = Layout.from_conf(cohort["layout"])
        except UserError as error:
            raise UserError(f"{self.path / COHORT}: {error}; run mrgen-prepare again to write it anew") from None
        tables, damaged = scan_subjects(self.path)
        shown = {id_: table for id_, table in tables.items() if table["settings"] == cohort["settings"]}
        self.hidden = len(tables) - len(shown)
        for id_, table in shown.items():
            other = table["modalities"] != cohort["modalities"]
            found = f"{SUBJECT}: other sequences than the store" if other else find_damage(self.path / id_, table)
            if found is not None:
                damaged[id_] = found
        if damaged:
            id_, found = next(iter(damaged.items()))
            more = f", and {len(damaged) - 1} more" if len(damaged) > 1 else ""
            raise UserError(
                f"{self.path / id_}: the prepared subject is damaged ({found}){more}; mrgen-prepare with the same "
                "data=… mends it (verify=true compares all voxels); of a synthetic cohort, delete its folder and "
                "generate anew"
            )
        self.subjects: dict[str, StoredSubject] = {
            id_: StoredSubject.from_table(self.path / id_, table) for id_, table in shown.items()
        }

    def __len__(self) -> int:
        return len(self.subjects)


def settings_digest(layout: Layout, modalities: Sequence[str]) -> str:
    """A digest of all that decides a subject's arrays beside its files."""
    deciding = [VERSION, list(modalities), sorted(layout.label_values), layout.skull_stripped]
    deciding += ["brain mask"] * bool(layout.brain)  # its files are the subject's
    return hashlib.sha256(json.dumps(deciding).encode()).hexdigest()[:16]


def cohort_table(layout: Layout, modalities: Sequence[str]) -> dict[str, Any]:
    """What `cohort.json` says of a cohort."""
    return {
        "version": VERSION,
        "name": layout.name,
        "modalities": list(modalities),
        "settings": settings_digest(layout, modalities),
        "layout": layout.to_conf(),
    }


def write_cohort(store: Path | str, layout: Layout, modalities: Sequence[str]) -> None:
    """Writes `cohort.json` in one step; subjects prepared with other settings disappear from `Store` by that."""
    store = Path(store)
    try:
        store.mkdir(parents=True, exist_ok=True)
        partial = store / f".{COHORT}.{uuid.uuid4().hex[:8]}"
        write_synced(partial, json.dumps(cohort_table(layout, modalities), indent=1).encode())
        os.replace(partial, store / COHORT)
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
    cohort: Mapping[str, Any] | None = None,
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
        cohort: what `cohort.json` will say (`cohort_table`), where it is not written yet.

    Returns:
        The subject as `Store` will show it.

    Raises:
        UserError: the store has no `cohort.json` or cannot be written.
    """
    store = Path(store)
    if not id or id.startswith(".") or "/" in id or "\0" in id or id in (COHORT, "generated.json"):
        raise ValueError(f"{id!r} is no name of a subject's folder")
    cohort = cohort or read_cohort(store)
    if cohort is None:
        raise UserError(f"{store}: found no {COHORT}, expected a store; write_cohort comes first")
    if image.ndim != 4 or image.shape[0] != len(cohort["modalities"]) or brain.shape != image.shape[1:]:
        raise ValueError(f"image {image.shape}, brain {brain.shape}: expected {len(cohort['modalities'])} channels")
    for name, array in (("label", label), ("structure", structure)):
        if array is not None and array.shape != brain.shape:
            raise ValueError(f"{name} {array.shape}: expected {brain.shape}")
    image, label = stored_type(image), None if label is None else label.astype(np.uint8)
    brain = np.ascontiguousarray(brain, dtype=np.bool_)
    arrays = {IMAGE: image, LABEL: label, BRAIN: brain.view(np.uint8), STRUCTURE: structure}
    if structure is not None:
        arrays[STRUCTURE] = np.ascontiguousarray(structure, dtype=np.bool_).view(np.uint8)
    given = {name: array for name, array in arrays.items() if array is not None}
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
        "checksums": checksums(given, cohort["modalities"]),
        "revision": uuid.uuid4().hex,
    }
    table["checksum"] = table_checksum(table)
    partial = store / f".{id}.{uuid.uuid4().hex[:8]}.partial"
    try:
        partial.mkdir()
        for name, array in given.items():
            with open(partial / name, "wb") as file:
                np.save(file, array, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
        write_synced(partial / SUBJECT, json.dumps(table, indent=1).encode())
        with _set_aside(store, id, "old"):
            os.rename(partial, store / id)
    except OSError as error:
        raise UserError(f"data.store={store}: {id} cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return StoredSubject.from_table(store / id, table)


def remove_subject(store: Path | str, id: str) -> None:
    """Takes a subject out of the store, if it is there: first out of sight in one step, then off the disk."""
    with _set_aside(Path(store), id, "gone"):
        pass


@contextmanager
def _set_aside(store: Path, id: str, why: str) -> Iterator[None]:
    """Takes what is at a subject's place out of sight, and off the disk once the block has ended well.

    Killed in between, what has the name `old` is put back by `remove_leftovers`, unless a new one is in its place.
    """
    if not id or id.startswith(".") or "/" in id:
        raise ValueError(f"{id!r} is no name of a subject's folder")
    aside = store / f".{id}.{uuid.uuid4().hex[:8]}.{why}"
    try:
        os.rename(store / id, aside)
    except FileNotFoundError:
        yield
        return
    try:
        yield
    except BaseException:
        if not os.path.lexists(store / id):
            os.rename(aside, store / id)
        raise
    _discard(aside)


def _discard(path: Path) -> None:
    """Off the disk; of a link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(store: Path | str) -> None:
    """Clears what a killed preparation left under hidden names. Nobody else may be writing to the store."""
    for path in Path(store).glob(".*"):
        if found := _LEFTOVER.fullmatch(path.name):
            if found[2] == "old" and not os.path.lexists(path.with_name(found[1])):
                os.rename(path, path.with_name(found[1]))
            else:
                _discard(path)
        elif path.name.startswith(f".{COHORT}."):
            _discard(path)


@contextmanager
def sole_writer(store: Path) -> Iterator[None]:
    """Refuses a second writer to one store, which is made; the system lets go of the lock when a process dies."""
    import fcntl

    try:
        store.mkdir(parents=True, exist_ok=True)
        handle = open_without_links(store / ".lock", os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise UserError(f"data.store={store}: cannot be written ({error.strerror}); choose another folder") from error
    with open(handle, "r+b") as lock:
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
