"""Reads MetaImage files (.mha, .mhd): every statement of the header is followed, or the file refused.

ITK reads them too, but hands out damaged ones as noise, and some of their headers end its process.
"""

import re
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mrgen.data.image_file import AGAIN, BadFileError, Volume, beside, check_affine, check_size, opened, read_voxels
from mrgen.data.text_header import TO_RAS, floats, integers, lines

__all__ = ["metaimage_voxels", "read_metaimage"]

TYPES = {
    f"MET_{sign}{name}": np.dtype(f"{kind}{n}")
    for name, n in (("CHAR", 1), ("SHORT", 2), ("INT", 4), ("LONG_LONG", 8))
    for sign, kind in (("", "i"), ("U", "u"))
} | {"MET_FLOAT": np.dtype("f4"), "MET_DOUBLE": np.dtype("f8")}
SYNONYMS = {"Position": "Offset", "Origin": "Offset", "Orientation": "TransformMatrix", "Rotation": "TransformMatrix"}
SYNONYMS["ElementByteOrderMSB"] = "BinaryDataByteOrderMSB"
NEEDED = ("NDims", "DimSize", "ElementType", "ElementSpacing", "TransformMatrix", "Offset")
USED = (*NEEDED, "BinaryDataByteOrderMSB", "CompressedData", "CompressedDataSize", "DistanceUnits", "ElementDataFile")
# Fields that change what the voxels mean, with the only values that are followed. Others are remarks: ITK writes all
# that it knows of a scan's origin there, in any words.
FIXED = {
    "ObjectType": "Image",
    "BinaryData": "True",
    "ElementNumberOfChannels": "1",
    "HeaderSize": "0",
    "HeaderSizePerSlice": "0",
    "ElementToIntensityFunctionSlope": "1",
    "ElementToIntensityFunctionOffset": "0",
}
UNITS = {"mm": 1.0, "?": 1.0, "um": 1e-3, "cm": 10.0}


def read_metaimage(path: Path) -> Volume:
    """Reads a MetaImage, with its voxels in the same file or in one beside it.

    Raises:
        BadFileError: it holds no volume that can be believed.
        OSError: it, or the file of its voxels, cannot be opened or read.
    """
    with opened(path) as file:
        fields = _fields(file, path)
        dtype = _dtype(fields)
        shape = tuple(integers(fields["DimSize"], 3, "size"))
        needed = int(np.prod(shape, dtype=object)) * dtype.itemsize
        check_size(shape, needed)
        affine, notes = _affine(fields)
        packing = "zlib" if _flag(fields, "CompressedData") else None
        if (voxels := _voxels_file(path, fields)) is None:
            data = _voxels(file, fields, packing, needed)
        else:
            with opened(voxels) as other:
                data = _voxels(other, fields, packing, needed)
    return Volume(np.frombuffer(data, dtype).reshape(shape, order="F"), affine, notes)


def metaimage_voxels(path: Path) -> Path | None:
    """The file of a MetaImage's voxels, None where they are in its own. Raises as ``read_metaimage``."""
    with opened(path) as file:
        return _voxels_file(path, _fields(file, path))


def _voxels_file(path: Path, fields: dict[str, str]) -> Path | None:
    name = fields["ElementDataFile"]
    return None if name in ("LOCAL", "Local", "local") else beside(path, name)


def _fields(file: BinaryIO, path: Path) -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in lines(file):
        key, mark, value = (part.strip() for part in line.partition("="))
        key = SYNONYMS.get(key, key)
        if not mark and line.strip():
            break
        if key in fields and key in (*USED, *FIXED):
            raise _unusable(f"{key} twice")
        fields[key] = value
        if key == "ElementDataFile":
            break
    if not fields.keys() & {"NDims", "DimSize"} or "ElementDataFile" not in fields:
        raise BadFileError("not an image", f"found no MetaImage header, expected a MetaImage ({path.suffix}); {AGAIN}")
    if missing := [key for key in NEEDED if key not in fields]:
        if set(missing) <= {"TransformMatrix", "Offset"}:
            message = f"found no {' nor '.join(missing)}, so nothing says where front and left are, expected them"
            raise BadFileError("unknown orientation", f"{message}; convert the scan again from its DICOM files")
        raise _unusable(f"without {', '.join(missing)}")
    if (n := integers(fields["NDims"], 1, "number of dimensions")[0]) != 3:
        message = f"found {n} dimensions ({fields['DimSize'][:60]}), expected a 3D volume; save the one meant"
        raise BadFileError("not 3D", message)
    if fields.get("ElementNumberOfChannels", "1") != "1":
        channels = fields["ElementNumberOfChannels"][:20]
        raise BadFileError("not an image", f"found {channels} numbers a voxel, expected one; export it as grey")
    for key, only in FIXED.items():
        if key in fields and not _same(fields[key], only):
            raise _unusable(f"{key} = {fields[key][:60]}, expected {only}")
    return fields


def _same(value: str, only: str) -> bool:
    if only == "True":
        return value.lower() in ("true", "t", "1")
    return value == only or (only in "01" and bool(re.fullmatch(rf"{only}(\.0*)?", value)))


def _flag(fields: dict[str, str], key: str) -> bool:
    value = fields.get(key, "False").lower()
    if value not in ("true", "t", "1", "false", "f", "0"):
        raise _unusable(f"{key} = {value[:60]}, expected True or False")
    return value in ("true", "t", "1")


def _dtype(fields: dict[str, str]) -> np.dtype:
    if (dtype := TYPES.get(fields["ElementType"])) is None:
        raise _unusable(f"ElementType = {fields['ElementType'][:60]}, expected one of {', '.join(TYPES)}")
    if dtype.itemsize > 1 and "BinaryDataByteOrderMSB" not in fields:
        raise _unusable("without BinaryDataByteOrderMSB")
    return dtype.newbyteorder(">" if _flag(fields, "BinaryDataByteOrderMSB") else "<")


def _affine(fields: dict[str, str]) -> tuple[np.ndarray, tuple[str, ...]]:
    unit = fields.get("DistanceUnits", "mm")
    if unit not in UNITS:
        raise _unusable(f"DistanceUnits = {unit[:60]}, expected mm, cm or um")
    sides = floats(fields["ElementSpacing"], 3, "spacing")
    if min(sides) <= 0:
        raise _unusable(f"ElementSpacing = {fields['ElementSpacing'][:60]}, expected sides above 0")
    axes = np.reshape(floats(fields["TransformMatrix"], 9, "matrix"), (3, 3)).T  # a row is where an axis points
    affine = np.eye(4)
    affine[:3, :3] = axes * sides * UNITS[unit]
    affine[:3, 3] = np.multiply(floats(fields["Offset"], 3, "offset"), UNITS[unit])
    affine = TO_RAS["left-posterior-superior"] @ affine
    if np.abs(np.linalg.norm(axes, axis=0) - 1).max() > 1e-3:
        raise _unusable(f"TransformMatrix = {fields['TransformMatrix'][:60]}, expected rows of length 1")
    check_affine(affine)
    notes = [] if UNITS[unit] == 1 else [f"found a header in {unit}; turned them into mm"]
    if said := _contradiction(fields.get("AnatomicalOrientation", "?"), axes):
        notes.append(said)
    return affine, tuple(notes)


def _contradiction(code: str, axes: np.ndarray) -> str | None:
    """A line where the orientation in letters is not that of the matrix, which ITK reads alone.

    The letters say where an axis comes from or, of other writers, where it leads. Some put RAI whatever the matrix is.
    Other letters were meant, so that one of the two is damaged.
    """
    main = np.abs(axes).argmax(axis=0)
    if set(code) - set("RLAPIS") or np.abs(axes).max(axis=0).min() < 0.8:
        return None
    from_ = "".join(("RL", "AP", "IS")[world][int(axes[world, axis] < 0)] for axis, world in enumerate(main))
    if code == from_ or (code != "RAI" and code == from_.translate(str.maketrans("RLAPIS", "LRPASI"))):
        return None
    found = f"found AnatomicalOrientation = {code}, but the TransformMatrix says {from_}"
    if code != "RAI":
        raise BadFileError("unknown orientation", f"{found}, expected the same; {AGAIN}")
    return f"{found}; took the matrix, as ITK does"


def _voxels(file: BinaryIO, fields: dict[str, str], packing: str | None, needed: int) -> np.ndarray:
    start = file.tell()
    data = read_voxels(file, packing, needed)
    length = file.tell() - start
    if packing and "CompressedDataSize" in fields and fields["CompressedDataSize"] != str(length):
        raise _unusable(f"CompressedDataSize = {fields['CompressedDataSize'][:60]}, expected {length}")
    return data


def _unusable(why: str) -> BadFileError:
    return BadFileError("not an image", f"found a MetaImage header that cannot be used ({why}); {AGAIN}")
