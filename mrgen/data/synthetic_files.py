"""A synthesised sequence on disk: there as a whole or not at all, and made again only where something changed.

    output/<id>/<id>_<target>_synthetic.nii.gz   voxel for voxel on the subject's own scans
    output/<id>/<id>_<target>_variance.nii.gz    likewise, where the method has a variance
    output/<id>/<id>_segmentation.nii.gz         likewise, where the method finds lesions
    output/<id>/<id>_<target>.json               what they were made from; that it is there means done

Everything is written under hidden names first, the json last. Where a killed process left a hidden json, the hidden
images beside it are whole and only have to be renamed; where it left none, they are cleared.
"""

import gzip
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from mrgen.errors import UserError
from mrgen.files import open_without_links, read_json

__all__ = ["SyntheticFiles", "nifti_bytes"]


class SyntheticFiles:
    """The files of one subject and one target.

    Args:
        output: folder of all subjects' folders; need not be there.
        id: the subject's.
        target: the synthesised sequence, or whatever else the json is to be named after.
        images: names of the images that there may be: ``t2_synthetic``, ``t2_variance``, ``segmentation``.
    """

    def __init__(self, output: Path, id: str, target: str, images: Sequence[str]):
        self.folder = output / id
        self.images = {name: self.folder / f"{id}_{name}.nii.gz" for name in images}
        self.record = self.folder / f"{id}_{target}.json"

    def why_make(self, made_from: Mapping[str, Any]) -> str | None:
        """Why the files are to be made, after clearing up behind a killed process.

        Args:
            made_from: what decides their content, plain containers as JSON holds them.

        Returns:
            None where they are there, made from the same; ``new``, or what changed: ``checkpoint changed``.

        Raises:
            UserError: one of the names is taken by a file that mrgen did not write, or wrote for another target.
        """
        if not self.folder.is_dir():
            return "new"
        with self._alone():
            self._finish_or_clear()
            record = self._ours()
        if record is None:
            return "new"
        if gone := [name for name in record["files"] if not (self.folder / name).is_file()]:
            return f"{', '.join(gone)} gone"
        before = record["made_from"]
        changed = [key for key in {**before, **made_from} if before.get(key) != made_from.get(key)]
        return f"{', '.join(changed)} changed" if changed else None

    def save(self, contents: Mapping[str, bytes], record: Mapping[str, Any]) -> None:
        """Writes the files in place of earlier ones.

        Args:
            contents: of the images that there are, by name; earlier ones of other names are removed.
            record: content of the json, with ``made_from``; ``files`` is added.

        Raises:
            UserError: the folder cannot be written, or as of ``why_make``.
        """
        images = {self.images[name]: content for name, content in contents.items()}
        table = json.dumps({**record, "files": [path.name for path in images]}, indent=1).encode()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._alone():
                self._finish_or_clear()
                self._ours()
                try:
                    for path, content in (*images.items(), (self.record, table)):
                        _write(_hidden(path), content)
                except BaseException:
                    self._clear()
                    with suppress(OSError):  # it holds something else
                        self.folder.rmdir()
                    raise
                self._finish_or_clear()
        except OSError as error:
            raise UserError(f"output: {self.folder} cannot be written ({error.strerror or error})") from error

    def _ours(self) -> dict[str, Any] | None:
        """The record of what is there, None where nothing is. Raises UserError for a file of somebody else."""
        record = _read(self.record)
        names = [] if record is None else [self.record.name, *record["files"]]
        for path in (*self.images.values(), self.record):
            if path.name not in names and os.path.lexists(path):
                records = {other.name: _read(other) for other in sorted(self.folder.glob("*.json"))}
                owner = next((name for name, other in records.items() if other and path.name in other["files"]), None)
                said = f"belongs to {owner}" if owner else "mrgen-synthesize did not write it"
                raise UserError(f"{path} is there, and {said}; move it away or choose another output")
        return record

    def _finish_or_clear(self) -> None:
        names = {path.name for path in self.images.values()}
        for hidden in self.folder.glob(".*.json.partial"):  # another target's too, if it has an image of our names
            record = _read(hidden)
            if record is not None and names & {*record["files"]}:
                self._finish(record, self.folder / hidden.name[1:].removesuffix(".partial"))
        self._clear()

    def _finish(self, record: Mapping[str, Any], path: Path) -> None:
        """Renames what a hidden record lists, and the record itself to ``path``."""
        earlier = _read(path)
        for image in (self.folder / name for name in record["files"]):
            if _hidden(image).is_file():
                os.replace(_hidden(image), image)
        for name in {*(earlier["files"] if earlier else ())} - {*record["files"]}:  # another number of samples, method
            (self.folder / name).unlink(missing_ok=True)
        os.replace(_hidden(path), path)

    def _clear(self) -> None:
        for path in (self.record, *self.images.values()):  # the json first: without the others it says nothing
            _hidden(path).unlink(missing_ok=True)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While it lasts no other process writes here, so that what is hidden is a dead one's."""
        import fcntl

        if self.folder.is_symlink():
            raise UserError(f"output: {self.folder} is a link; remove it, or choose another output")
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def _write(path: Path, content: bytes) -> None:
    """A new file, through no link, which the disk has as a whole."""
    path.unlink(missing_ok=True)
    with open(open_without_links(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _read(path: Path) -> dict[str, Any] | None:
    """A json of ours, or None where there is none, or half of one, or somebody else's."""
    try:
        record = read_json(path, expected="a record of mrgen-synthesize", remedy="move it away")
        ours = isinstance(record["made_from"], dict) and isinstance(record["files"], list)
        return record if ours and all(name == Path(name).name for name in record["files"]) else None
    except (UserError, ValueError, KeyError, TypeError):
        return None


def nifti_bytes(volume: np.ndarray, affine: np.ndarray, description: str, header: Any = None) -> bytes:
    """A gzipped NIfTI file.

    Args:
        volume: (X, Y, Z) float32, or uint8 of labels, axes as ``affine`` says.
        affine: 4×4, voxels to RAS+ world.
        description: what the file holds, at most 79 characters.
        header: of the scan that it overlays, whose units and codes are kept; None for a plain one.

    Returns:
        The file's content, the same for the same arguments.
    """
    import nibabel

    kind = nibabel.Nifti2Image if isinstance(header, nibabel.Nifti2Header) else nibabel.Nifti1Image
    if header is not None:
        header = header.copy()
        header.set_data_dtype(volume.dtype)
        header.set_slope_inter(1, 0)
        header.set_data_offset(0)  # there may have been extensions before the voxels
        header.set_intent("none")
        header["cal_min"] = header["cal_max"] = 0
    image = kind(volume, affine, header)
    if header is None:
        image.header.set_xyzt_units("mm")
    image.header["descrip"] = description
    # Level 1: at 9 float32 takes several times as long and is hardly smaller.
    return gzip.compress(image.to_bytes(), compresslevel=1, mtime=0)
