"""Reads one subject's scans and says, in one line each, what is wrong with them."""

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mrgen.data.brain import find_brain, why_no_brain
from mrgen.data.cohorts import Layout, Problem, SubjectFiles

ITK_SUFFIXES = (".mha", ".mhd", ".nrrd", ".nhdr")
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
    """

    volumes: dict[str, np.ndarray]
    label: np.ndarray | None
    brain: np.ndarray
    brain_method: str
    affine: np.ndarray
    original_affine: np.ndarray
    original_shape: tuple[int, ...]


class BadFileError(Exception):
    """A file that holds no usable volume. `kind` names the fault; the message says found, expected and what to do."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def read_volume(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads an image file by its content: NIfTI, gzipped or not, whatever its name; MetaImage and NRRD by name.

    Returns:
        (X, Y, Z) array, scaled where the header says so, and the 4×4 affine from voxels to RAS+ world (mm).

    Raises:
        BadFileError: truncated, corrupt, no image, not 3D, not one number a voxel, or without a usable affine.
    """
    try:
        if path.name.lower().endswith(ITK_SUFFIXES):
            array, affine = _read_itk(path)
        else:
            array, affine = _read_nifti(path)
    except OSError as error:
        raise BadFileError(
            "unreadable file", f"cannot be read ({error.strerror or error}), expected an image"
        ) from None
    size = "×".join(map(str, array.shape))
    if array.dtype.kind not in "biuf":
        raise BadFileError(
            "not an image", f"found {array.dtype} voxels, expected one number a voxel; export it as grey"
        )
    if array.ndim != 3:
        raise BadFileError(
            "not 3D", f"found {array.ndim} dimensions ({size}), expected a 3D volume; save the one meant"
        )
    if 0 in array.shape:
        raise BadFileError("not an image", f"found no voxels ({size}), expected a 3D volume; restore it")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-6:
        raise BadFileError(
            "no affine", "found an affine that cannot be inverted, expected voxel sides; mend the header"
        )
    return array, affine


def check_subject(files: SubjectFiles, layout: Layout) -> tuple[LoadedSubject | None, list[Problem]]:
    """Loads one subject and checks it.

    Returns:
        The subject, or None where there is a problem; and every problem found, in the order of the sequences.
    """
    problems: list[Problem] = []

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
            array, affine = read_volume(path)
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
        elif (shift := _largest_shift(affine, reference[2], array.shape)) > LARGEST_SHIFT:
            blame(
                path,
                "affines differ",
                f"found an affine up to {shift:.3g} voxels off, expected that of {reference[0].name}; "
                "bring them onto one grid",
            )
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
    return LoadedSubject(volumes, label, brain, method, canonical_affine, affine, original_shape), []


def _check_intensities(array: np.ndarray) -> None:
    if array.dtype.kind == "f" and (bad := array.size - int(np.isfinite(array).sum())):
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
        found = [f"{np.format_float_positional(v, trim='-')} ({n} voxel{'s' * (n != 1)})" for v, n in bad[:4]]
        raise BadFileError(kind, "found " + message.format(found=", ".join(found) + ", …" * (len(bad) > 4)))
    return np.rint(array).astype(np.uint8)


def _largest_shift(affine: np.ndarray, reference: np.ndarray, shape: tuple[int, ...]) -> float:
    """How far apart two affines put a corner of the volume, in voxels."""
    corners = np.array([(x, y, z, 1) for x in (0, shape[0]) for y in (0, shape[1]) for z in (0, shape[2])]).T
    apart = np.linalg.norm(((affine - reference) @ corners)[:3], axis=0).max()
    return float(apart / np.linalg.norm(reference[:3, :3], axis=0).min())


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


def _read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    import nibabel

    data = path.read_bytes()
    if not data:
        raise BadFileError("not an image", "found an empty file, expected a NIfTI volume; copy it again")
    if data[:2] == b"\x1f\x8b":
        size = f"{len(data):,} bytes"
        try:
            data = gzip.decompress(data)  # to the end, unlike nibabel: only so are CRC and length checked
        except EOFError:
            raise BadFileError(
                "truncated gzip", f"found a truncated gzip stream ({size}), expected a whole one; copy it again"
            ) from None
        except (zlib.error, gzip.BadGzipFile):
            raise BadFileError(
                "corrupt gzip", f"found a corrupt gzip stream ({size}), expected a sound one; copy it again"
            ) from None
    header_sizes = {int.from_bytes(data[:4], order) for order in ("little", "big")}  # type: ignore[arg-type]
    kinds = {348: nibabel.Nifti1Image, 540: nibabel.Nifti2Image}
    kind = next((kinds[size] for size in header_sizes if size in kinds), None)
    if kind is None or len(data) < 352:
        start = data[:16].decode("ascii", "replace").split("\n")[0]
        raise BadFileError("not an image", f"found no NIfTI header (it starts {start!r}), expected a NIfTI volume")
    try:
        image = kind.from_bytes(data)
        offset: int = image.dataobj.offset  # type: ignore[attr-defined]
        needed = offset + int(np.prod(image.shape)) * image.get_data_dtype().itemsize
        if len(data) < needed:
            raise BadFileError(
                "truncated file", f"found {len(data):,} bytes of image, expected {needed:,}; copy it again"
            )
        return np.asanyarray(image.dataobj), np.asarray(image.affine, dtype=float)
    except BadFileError:
        raise
    except Exception as error:  # whatever nibabel says of a damaged header is the file's fault, and one line's worth
        why = " ".join(str(error).split())[:120]
        raise BadFileError("not an image", f"found a NIfTI header that cannot be used ({why}); copy it again") from None


def _read_itk(path: Path) -> tuple[np.ndarray, np.ndarray]:
    import SimpleITK

    if path.suffix.lower() in (".mha", ".mhd"):
        _check_metaimage(path)
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        image = SimpleITK.ReadImage(str(path))
    except RuntimeError:
        message = f"found nothing that reads as {path.suffix[1:]}, expected a 3D volume; copy it again"
        raise BadFileError("not an image", message) from None
    array = SimpleITK.GetArrayFromImage(image)
    if image.GetNumberOfComponentsPerPixel() > 1:
        n = image.GetNumberOfComponentsPerPixel()
        raise BadFileError("not an image", f"found {n} numbers a voxel, expected one; export it as grey")
    if image.GetDimension() != 3:
        size = "×".join(map(str, image.GetSize()))
        raise BadFileError(
            "not 3D", f"found {image.GetDimension()} dimensions ({size}), expected a 3D volume; save the one meant"
        )
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return array.T, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # ITK's world is LPS, and its arrays are z y x


_METAIMAGE_BYTES = {
    f"MET_{sign}{name}": n
    for name, n in (("CHAR", 1), ("SHORT", 2), ("INT", 4), ("LONG_LONG", 8), ("FLOAT", 4), ("DOUBLE", 8))
    for sign in ("", "U")
}


def _check_metaimage(path: Path) -> None:
    """Whether a MetaImage has all its voxels; SimpleITK reads damaged compressed ones as noise without a word."""
    with open(path, "rb") as file:
        start = file.read(1 << 16)
        head, mark, rest = start.partition(b"ElementDataFile")
        pairs = (line.split("=", 1) for line in head.decode("latin-1").splitlines() if "=" in line)
        header = {key.strip(): value.strip() for key, value in pairs}
        data_file = rest.partition(b"\n")[0].decode("latin-1").strip(" =\r")
        if not mark or "DimSize" not in header:
            what = "an empty file" if not start else "no MetaImage header"
            raise BadFileError("not an image", f"found {what}, expected a MetaImage ({path.suffix}); copy it again")
        if data_file == "LOCAL":
            file.seek(len(head) + len(mark) + rest.index(b"\n") + 1)
            data = file.read()
        else:
            data = (path.parent / data_file).read_bytes()
    if header.get("CompressedData", "False").lower() == "true":
        inflate = zlib.decompressobj(zlib.MAX_WBITS | 32)
        try:
            data = inflate.decompress(data)
        except zlib.error:
            raise BadFileError(
                "corrupt compression", "found corrupt compressed voxels, expected sound ones; copy it again"
            ) from None
        if not inflate.eof:
            raise BadFileError("truncated file", "found truncated compressed voxels, expected all; copy it again")
    width = _METAIMAGE_BYTES.get(header.get("ElementType", ""), 0)  # 0: of unknown width, left to SimpleITK
    try:
        sides = [int(n) for n in header["DimSize"].split()]
        needed = int(np.prod(sides)) * width * int(header.get("ElementNumberOfChannels", 1))
    except ValueError:
        message = f"found the size {header['DimSize']!r}, expected three numbers; copy it again"
        raise BadFileError("not an image", message) from None
    if len(data) < needed:
        raise BadFileError("truncated file", f"found {len(data):,} bytes of voxels, expected {needed:,}; copy it again")
