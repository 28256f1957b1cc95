"""Reads NIfTI files: the header's own statements checked against each other and the file before a voxel is believed."""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mrgen.data.image_file import (
    AGAIN,
    BadFileError,
    Volume,
    affine_fault,
    check_size,
    filled,
    in_mm,
    opened,
    wrong_length,
)

__all__ = ["nifti_header", "read_nifti"]

GZIP = b"\x1f\x8b"
LARGEST_HEADER = 540
MAGIC = {348: b"n+1\0", 540: b"n+2\0\r\n\x1a\n"}
NUMBERS = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
OTHERS = {32: "complex", 128: "RGB", 1536: "float128", 1792: "complex", 2048: "complex", 2304: "RGBA"}
UNITS = {0: ("no unit", 1.0), 1: ("metres", 1e3), 2: ("mm", 1.0), 3: ("micrometres", 1e-3)}
MM = 2
NO_CODE = "no code"
NO_UNIT = "found no unit of length in the header; took mm"
TWO_SPACES = "found an sform and a qform of two spaces"
SAME_SIDES = 5e-3  # of a side: headers round 0.46875 mm to 0.47
SAME_PLACE = 0.5  # voxels, between the two affines of one header: quaternions near half a turn are that coarse


def read_nifti(path: Path) -> Volume:
    """Reads a NIfTI file of one part, gzipped or not, whatever its name.

    Raises:
        BadFileError: it holds no volume that can be believed.
        OSError: it cannot be opened or read.
    """
    with opened(path) as file, _unpacked(file) as (stream, packed):
        start = stream.read(LARGEST_HEADER)
        header = _header(start)
        (shape, dropped), dtype, offset = _shape(header), _dtype(header), _offset(header)
        needed = offset + int(np.prod(shape, dtype=object)) * dtype.itemsize
        check_size(shape, needed)
        affine, notes = _affine(header, shape)
        slope, inter, unscaled = _scaling(header)
        size = _size(file)
        if not packed and size != needed:
            raise wrong_length("image", size, needed)
        if size > needed + needed // 50 + 4096:  # nothing grows by that much when it is packed
            raise wrong_length("gzipped image", size, needed)
        data = filled(stream, needed, start, "image")
        more = len(start) > needed
        for _ in range(64):  # at the end the checksum is compared; damage that only looks like more has its own name
            if not stream.read(1 << 20):
                break
            more = True
        if more:
            raise wrong_length("image", needed + 1, needed)
    array = np.frombuffer(data, dtype, offset=offset).reshape(shape, order="F")
    if (slope, inter) != (1, 0):
        from nibabel.volumeutils import apply_read_scaling

        array = apply_read_scaling(array, slope, inter)
    return Volume(array, affine, (*dropped, *notes, *unscaled))


@np.errstate(all="ignore")
def nifti_header(path: Path) -> Any:
    """The header of a NIfTI file that ``read_nifti`` reads, without its extensions; None for any other.

    Returns:
        nibabel's header. Where its affines needed mending, both are the one that ``read_nifti`` returns, in mm.
    """
    try:
        with opened(path) as file, _unpacked(file) as (stream, _):
            header = _header(stream.read(LARGEST_HEADER))
        affine, notes = _affine(header, _shape(header)[0])
    except BadFileError:
        return None
    if not all(text.startswith((NO_UNIT, TWO_SPACES)) for text in notes):
        code = next(code for code in (int(header["sform_code"]), int(header["qform_code"])) if not _code_fault(code))
        header["pixdim"][0] = 1
        header.set_sform(affine, code)
        header.set_qform(affine, code)
        header["xyzt_units"] = int(header["xyzt_units"]) & 0x38 | MM  # the unit of time stays
    return header


@contextmanager
def _unpacked(file: BinaryIO) -> Iterator[tuple[Any, bool]]:
    """What a file holds, unpacked as it is read, and whether it was packed."""
    packed = file.read(2) == GZIP
    file.seek(0)
    if not packed:
        yield file, False
        return
    try:
        with gzip.GzipFile(fileobj=file) as stream:
            yield stream, True
    except EOFError:
        message = f"found a truncated gzip stream ({_size(file):,} bytes), expected a whole one; {AGAIN}"
        raise BadFileError("truncated gzip", message) from None
    except (zlib.error, gzip.BadGzipFile):
        message = f"found a corrupt gzip stream ({_size(file):,} bytes), expected a sound one; {AGAIN}"
        raise BadFileError("corrupt gzip", message) from None


def _size(file: BinaryIO) -> int:
    place = file.tell()
    size = file.seek(0, 2)
    file.seek(place)
    return size


def _header(start: bytes) -> Any:
    """nibabel's header; it repairs what it does not understand with a word on stderr, so it is told not to check."""
    import nibabel

    kinds = {348: nibabel.Nifti1Header, 540: nibabel.Nifti2Header}
    orders: dict[str, str] = {"<": "little", ">": "big"}
    for order, name in orders.items():
        length = int.from_bytes(start[:4], name)  # type: ignore[arg-type]
        if length in kinds and len(start) >= length:
            header = kinds[length](start[:length], endianness=order, check=False)
            break
    else:
        words = start[:16].decode("ascii", "replace").split("\n")[0]
        raise BadFileError("not an image", f"found no NIfTI header (it starts {words!r}), expected a NIfTI volume")
    magic = bytes(start[344:348] if length == 348 else start[4:12])
    if magic[:2] == b"ni":
        message = "found the header of a .hdr and .img pair, expected one file; convert it to .nii.gz"
        raise BadFileError("not an image", message)
    if magic != MAGIC[length]:
        message = f"found a header without NIfTI's mark ({magic!r}), perhaps ANALYZE's, expected NIfTI; convert it"
        raise BadFileError("not an image", message)
    return header


def _unusable(why: str) -> BadFileError:
    return BadFileError("not an image", f"found a NIfTI header that cannot be used ({why}); {AGAIN}")


def _shape(header: Any) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """(X, Y, Z), and a line where further axes of one step were dropped."""
    n, sides = int(header["dim"][0]), [int(side) for side in header["dim"][1:]]
    if not 1 <= n <= 7:
        raise _unusable(f"{n} dimensions")
    size = "×".join(map(str, sides[:n]))
    if n < 3 or any(side != 1 for side in sides[3:n]):
        raise BadFileError("not 3D", f"found {n} dimensions ({size}), expected a 3D volume; save the one meant")
    return tuple(sides[:3]), (f"found {n} dimensions ({size}); took the first three",) * (n > 3)


def _dtype(header: Any) -> np.dtype:
    code, bits = int(header["datatype"]), int(header["bitpix"])
    if code in OTHERS:
        raise BadFileError(
            "not an image", f"found {OTHERS[code]} voxels, expected one number a voxel; export it as grey"
        )
    if code not in NUMBERS:
        raise _unusable(f"data type {code}")
    dtype = np.dtype(header.endianness + NUMBERS[code])
    if bits != 8 * dtype.itemsize:
        raise _unusable(f"data type {code} has {8 * dtype.itemsize} bits, and the header says {bits}")
    return dtype


def _offset(header: Any) -> int:
    """Where the voxels start: behind the header, four bytes about extensions, and those."""
    offset, least = float(header["vox_offset"]), int(header["sizeof_hdr"]) + 4
    if not (offset >= least and offset.is_integer() and offset < 2**40):
        raise _unusable(f"its voxels start at byte {offset:g}, expected {least} or more")
    return int(offset)


def _scaling(header: Any) -> tuple[float, float, tuple[str, ...]]:
    """Slope and intercept, and a line where there are none although an intercept, or no number, was written."""
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    none = slope == 0 or np.isnan(slope)  # as the format and nibabel have it
    said = f"intensities are {slope:g} times the voxels plus {inter:g}"
    if np.isinf([slope, inter]).any() or (np.isnan(inter) and not none):
        raise _unusable(said)
    if none:
        return (
            1.0,
            0.0,
            () if slope == inter == 0 else (f"found a header in which {said}; took the voxels as they are",),
        )
    return slope, inter, ()


def _affine(header: Any, shape: tuple[int, ...]) -> tuple[np.ndarray, tuple[str, ...]]:
    """The affine from voxels to mm that the header's statements agree on, and what was decided.

    There are up to three: the sides (``pixdim``), a rotation (the qform, which uses those sides, so that it cannot
    bear them out) and a matrix (the sform). One of exact unit sides lacks them, beside a pixdim that has some.

    Raises:
        BadFileError: nothing in the file says which of two contradictory ones is right, or where the axes point.
    """
    code = int(header["xyzt_units"]) & 7
    if code not in UNITS:
        raise _unusable(f"unit of length {code}")
    unit, factor = UNITS[code]
    notes = {0: [NO_UNIT], 2: []}.get(code, [f"found a header in {unit}; turned them into mm"])
    pixdim = header["pixdim"][1:4].astype(float) * factor
    (sform, wrong_sform), (qform, wrong_qform) = _sform(header, factor), _qform(header, factor)
    if wrong_sform == wrong_qform == NO_CODE:
        message = (
            "found neither an sform nor a qform code, so nothing says where front and left are, expected one; set "
            "it, or export the scan again from its DICOM files"
        )
        raise BadFileError("unknown orientation", message)
    if sform is None and qform is None:
        found = f"an sform with {wrong_sform} and a qform with {wrong_qform}"
        raise BadFileError("no affine", f"found {found}, expected an affine in mm; mend the header or resample it")
    if sform is None:
        assert qform is not None
        if wrong_sform != NO_CODE:
            notes.append(f"found an sform with {wrong_sform}; took the qform, with sides of {in_mm(pixdim)}")
        return qform, tuple(notes)
    sides = np.linalg.norm(sform[:3, :3], axis=0)
    known = np.isfinite(pixdim) & (pixdim != 0)
    same = np.abs(np.abs(pixdim) - sides)[known] <= SAME_SIDES * sides[known]
    if qform is None:
        if not same.all():
            raise _sides_differ(sides, pixdim)
        if wrong_qform != NO_CODE or not known.all() or (pixdim < 0).any():
            what = f"a pixdim of {in_mm(pixdim)}" if wrong_qform == NO_CODE else f"a qform with {wrong_qform}"
            notes.append(f"found {what}; took the sform, with sides of {in_mm(sides)}")
        return sform, tuple(notes)
    if not same.all():
        if np.abs(sides - 1).max() > SAME_SIDES:
            raise _sides_differ(sides, pixdim)
        notes.append(f"found an sform without voxel sides, but a pixdim and a qform of {in_mm(pixdim)}; took the qform")
        return qform, tuple(notes)
    if (apart := largest_shift(sform, qform, shape)) > SAME_PLACE:
        if header["sform_code"] == header["qform_code"] or _axes(sform) != _axes(qform):
            message = (
                f"found an sform ({_axes(sform)}) and a qform ({_axes(qform)}) that lie up to {apart:.3g} voxels "
                "apart, expected the same place; remove the wrong one"
            )
            raise BadFileError("sform and qform differ", message)
        notes.append(f"{TWO_SPACES}, up to {apart:.3g} voxels apart; took the sform")
    return sform, tuple(notes)


def _sides_differ(sides: np.ndarray, pixdim: np.ndarray) -> BadFileError:
    message = f"found an sform with sides of {in_mm(sides)} beside a pixdim of {in_mm(pixdim)}, expected the same"
    return BadFileError("voxel sides differ", f"{message}; mend the header, or export the scan again")


def _sform(header: Any, factor: float) -> tuple[np.ndarray | None, str | None]:
    """The sform in mm, or None and why not."""
    if fault := _code_fault(int(header["sform_code"])):
        return None, fault
    affine = np.eye(4)
    affine[:3] = [header[name] for name in ("srow_x", "srow_y", "srow_z")]
    return _judged(affine, factor)


def _qform(header: Any, factor: float) -> tuple[np.ndarray | None, str | None]:
    """The qform in mm, or None and why not."""
    from nibabel.spatialimages import HeaderDataError

    if fault := _code_fault(int(header["qform_code"])):
        return None, fault
    header = header.copy()
    if header["pixdim"][0] == 0:  # which is to be read as 1
        header["pixdim"][0] = 1
    try:
        return _judged(header.get_qform(), factor)
    except (HeaderDataError, ValueError):  # of negative sides, of another handedness than ±1; of no rotation
        return None, f"a pixdim of {', '.join(f'{side:.4g}' for side in header['pixdim'][:4])} or no rotation"


def _code_fault(code: int) -> str | None:
    return NO_CODE if code == 0 else None if 1 <= code <= 5 else f"the unknown code {code}"


def _judged(affine: np.ndarray, factor: float) -> tuple[np.ndarray | None, str | None]:
    affine = np.diag([factor, factor, factor, 1.0]) @ affine.astype(float)
    fault = affine_fault(affine)
    return (None, fault) if fault else (affine, None)


def _axes(affine: np.ndarray) -> str:
    from nibabel.orientations import aff2axcodes

    return "".join(map(str, aff2axcodes(affine)))


def largest_shift(affine: np.ndarray, reference: np.ndarray, shape: tuple[int, ...]) -> float:
    """How far apart two affines put a corner of the volume, in voxels of the second."""
    corners = np.array([(x, y, z, 1) for x in (0, shape[0]) for y in (0, shape[1]) for z in (0, shape[2])]).T
    apart = np.linalg.norm(((affine - reference) @ corners)[:3], axis=0).max()
    return float(apart / np.linalg.norm(reference[:3, :3], axis=0).min())
