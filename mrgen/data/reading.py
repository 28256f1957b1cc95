"""Reads an image file of any format that cohorts come in. Nothing that a file may hold ends the process."""

from pathlib import Path

import numpy as np

from mrgen.data.image_file import BadFileError, Volume
from mrgen.data.metaimage import metaimage_voxels, read_metaimage
from mrgen.data.nifti import read_nifti
from mrgen.data.nrrd import nrrd_voxels, read_nrrd

__all__ = ["BadFileError", "Volume", "files_of", "read_volume"]

BY_NAME = {".mha": read_metaimage, ".mhd": read_metaimage, ".nrrd": read_nrrd, ".nhdr": read_nrrd}
VOXELS = {".mha": metaimage_voxels, ".mhd": metaimage_voxels, ".nrrd": nrrd_voxels, ".nhdr": nrrd_voxels}


@np.errstate(all="ignore")  # what a damaged header computes to is judged, not warned of
def read_volume(path: Path) -> Volume:
    """Reads an image file by its content: NIfTI, gzipped or not, whatever its name; MetaImage and NRRD by name.

    What the file says twice has to agree, what is compressed is read to its checksum, and no memory is taken for what
    is not there or does not fit.

    Raises:
        BadFileError: no image, damaged, not 3D, not one number a voxel, too large, or without a usable affine.
    """
    try:
        return BY_NAME.get(path.suffix.lower(), read_nifti)(path)
    except OSError as error:
        other = error.filename is not None and Path(error.filename) != path
        which = f"its voxels in {Path(error.filename).name} cannot" if other else "cannot"
        message = f"{which} be read ({error.strerror or error}), expected an image"
        raise BadFileError("unreadable file", message) from None
    except MemoryError:
        message = "found a volume that does not fit into memory; use fewer workers or a larger machine"
        raise BadFileError("too large", message) from None


def files_of(path: Path) -> list[Path]:
    """An image file, and the one beside it that its header names for the voxels; alone where it cannot be read."""
    try:
        voxels = VOXELS[path.suffix.lower()](path) if path.suffix.lower() in VOXELS else None
    except (BadFileError, OSError):  # what reads it says so
        voxels = None
    return [path] if voxels is None else [path, voxels]
