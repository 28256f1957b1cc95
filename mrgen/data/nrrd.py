"""Reads NRRD files (.nrrd, .nhdr): every field of the header is followed, or the file refused."""

import re
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mrgen.data.image_file import AGAIN, BadFileError, Volume, beside, check_affine, check_size, opened, read_voxels
from mrgen.data.text_header import TO_RAS, floats, integers, lines

__all__ = ["nrrd_voxels", "read_nrrd"]

_INTEGERS = (  # as the format's definition spells them
    ("i1", "signed char, int8, int8_t"),
    ("u1", "uchar, unsigned char, uint8, uint8_t"),
    ("i2", "short, short int, signed short, signed short int, int16, int16_t"),
    ("u2", "ushort, unsigned short, unsigned short int, uint16, uint16_t"),
    ("i4", "int, signed int, int32, int32_t"),
    ("u4", "uint, unsigned int, uint32, uint32_t"),
    ("i8", "longlong, long long, long long int, signed long long, signed long long int, int64, int64_t"),
    ("u8", "ulonglong, unsigned long long, unsigned long long int, uint64, uint64_t"),
)
TYPES = {name: code for code, names in _INTEGERS for name in names.split(", ")} | {"float": "f4", "double": "f8"}
PACKINGS = {"raw": None, "gzip": "gzip", "gz": "gzip", "bzip2": "bzip2", "bz2": "bzip2"}
SPACES = {"ras": "right-anterior-superior", "las": "left-anterior-superior", "lps": "left-posterior-superior"}
UNITS = {"mm": 1.0, "": 1.0, "???": 1.0, "um": 1e-3, "μm": 1e-3, "cm": 10.0, "m": 1e3}
SYNONYMS = {"datafile": "data file", "lineskip": "line skip", "byteskip": "byte skip", "sampleunits": "sample units"}
REMARKS = ("content", "number", "min", "max", "sample units", "thicknesses", "labels", "centers", "centerings")
NEEDED = ("type", "dimension", "sizes", "encoding")
ORIENTATION = ("space", "space directions", "space origin")
FOLLOWED = (*NEEDED, *ORIENTATION, "endian", "kinds", "line skip", "byte skip", "space units", "data file")
VECTOR = re.compile(r"\(([^()]*)\)")


def read_nrrd(path: Path) -> Volume:
    """Reads an NRRD volume, with its voxels in the same file or in one beside it.

    Raises:
        BadFileError: it holds no volume that can be believed.
        OSError: it, or the file of its voxels, cannot be opened or read.
    """
    with opened(path) as file:
        fields = _fields(file, path)
        dtype = _dtype(fields)
        shape = tuple(integers(fields["sizes"], 3, "sizes"))
        needed = int(np.prod(shape, dtype=object)) * dtype.itemsize
        check_size(shape, needed)
        affine, notes = _affine(fields)
        if fields["encoding"].lower() not in PACKINGS:
            raise _unusable(f"encoding: {fields['encoding'][:60]}, expected one of {', '.join(PACKINGS)}")
        packing = PACKINGS[fields["encoding"].lower()]
        if (voxels := _voxels_file(path, fields)) is None:
            data = read_voxels(file, packing, needed)
        else:
            with opened(voxels) as other:
                data = read_voxels(other, packing, needed)
    return Volume(np.frombuffer(data, dtype).reshape(shape, order="F"), affine, notes)


def nrrd_voxels(path: Path) -> Path | None:
    """The file of an NRRD volume's voxels, None where they are in its own. Raises as ``read_nrrd``."""
    with opened(path) as file:
        return _voxels_file(path, _fields(file, path))


def _voxels_file(path: Path, fields: dict[str, str]) -> Path | None:
    return beside(path, fields["data file"]) if "data file" in fields else None


def _fields(file: BinaryIO, path: Path) -> dict[str, str]:
    fields: dict[str, str] = {}
    text = lines(file)
    if not re.fullmatch(r"NRRD000[1-5]", next(text, "").strip()):
        raise BadFileError("not an image", f"found no NRRD header, expected an NRRD volume ({path.suffix}); {AGAIN}")
    for line in map(str.strip, text):
        if not line:
            break
        if line.startswith("#") or ":=" in line:  # a comment; a remark of whoever wrote it
            continue
        key, mark, value = (part.strip() for part in line.partition(":"))
        key = SYNONYMS.get(key.lower(), key.lower())
        if not mark or key not in (*FOLLOWED, *REMARKS, "measurement frame"):
            raise _unusable(f"the field {line[:60]!r}, which has no meaning here")
        if key in fields:
            raise _unusable(f"{key} twice")
        fields[key] = value
    if missing := [key for key in NEEDED if key not in fields]:
        raise _unusable(f"without {', '.join(missing)}")
    if (n := integers(fields["dimension"], 1, "dimension")[0]) != 3:
        message = f"found {n} dimensions ({fields['sizes'][:60]}), expected a 3D volume; save the one meant"
        raise BadFileError("not 3D", message)
    kinds = fields.get("kinds", "domain domain domain").split()
    if len(kinds) != 3 or set(kinds) - {"domain", "space", "???"}:
        raise _unusable(f"kinds: {fields['kinds'][:60]}, expected domain domain domain")
    for key in ("line skip", "byte skip"):
        if fields.get(key, "0") != "0":
            raise _unusable(f"{key}: {fields[key][:60]}, expected 0")
    return fields


def _dtype(fields: dict[str, str]) -> np.dtype:
    if (code := TYPES.get(" ".join(fields["type"].lower().split()))) is None:
        raise _unusable(f"type: {fields['type'][:60]}, expected whole numbers, float or double")
    endian = fields.get("endian", "little" if code.endswith("1") else "none").lower()
    if endian not in ("little", "big"):
        raise _unusable(f"endian: {endian[:60]}, expected little or big")
    return np.dtype(("<" if endian == "little" else ">") + code)


def _affine(fields: dict[str, str]) -> tuple[np.ndarray, tuple[str, ...]]:
    if missing := [key for key in ORIENTATION if key not in fields]:
        message = f"found no {' nor '.join(missing)}, so nothing says where front and left are, expected them"
        raise BadFileError("unknown orientation", f"{message}; convert the scan again from its DICOM files")
    space = fields["space"].lower()
    if (space := SPACES.get(space, space)) not in TO_RAS:
        raise _unusable(f"space: {fields['space'][:60]}, expected one of {', '.join(TO_RAS)}")
    units = {unit.strip() for unit in fields.get("space units", '""').split('"')[1::2]}
    if len(units) != 1 or not units <= UNITS.keys():
        raise _unusable(f"space units: {fields['space units'][:60]}, expected mm for all three")
    (unit,) = units
    directions = VECTOR.findall(fields["space directions"])
    if len(directions) != 3 or VECTOR.sub("", fields["space directions"]).strip():
        raise _unusable(f"space directions: {fields['space directions'][:60]}, expected three vectors")
    if len(origin := VECTOR.findall(fields["space origin"])) != 1 or VECTOR.sub("", fields["space origin"]).strip():
        raise _unusable(f"space origin: {fields['space origin'][:60]}, expected a vector")
    affine = np.eye(4)
    vectors = [floats(vector.replace(",", " "), 3, "vector") for vector in (*directions, *origin)]
    affine[:3] = np.transpose(vectors) * UNITS[unit]
    affine = TO_RAS[space] @ affine
    check_affine(affine)
    return affine, () if UNITS[unit] == 1 else (f"found a header in {unit}; turned them into mm",)


def _unusable(why: str) -> BadFileError:
    return BadFileError("not an image", f"found an NRRD header that cannot be used ({why}); {AGAIN}")
