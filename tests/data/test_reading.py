"""Damaged files of every format: refused in one line, or read as they were; what a checksum covers is never wrong."""

import bz2
import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest
from raw_scans import BRATS_AFFINE, scan, write_nifti
from test_metaimage import write

from mrgen.data.reading import BadFileError, Volume, files_of, read_volume

MUTANTS = 120  # of each kind of file


def nifti2(path: Path) -> Path:
    nibabel.save(nibabel.Nifti2Image(scan(), BRATS_AFFINE), path)
    return path


def bzip2(path: Path) -> Path:
    header, _, voxels = write(path).read_bytes().partition(b"\n\n")
    path.write_bytes(header.replace(b"encoding: raw", b"encoding: bzip2") + b"\n\n" + bz2.compress(voxels))
    return path


KINDS = {
    "NIfTI": lambda folder: write_nifti(folder / "scan.nii", scan()),
    "NIfTI-2": lambda folder: nifti2(folder / "scan.nii"),
    "NIfTI, gzip": lambda folder: write_nifti(folder / "scan.nii.gz", scan()),
    "mha": lambda folder: write(folder / "scan.mha"),
    "mha, zlib": lambda folder: write(folder / "scan.mha", compress=True),
    "mhd": lambda folder: write(folder / "scan.mhd"),
    "mhd, zlib": lambda folder: write(folder / "scan.mhd", compress=True),
    "nrrd": lambda folder: write(folder / "scan.nrrd"),
    "nrrd, gzip": lambda folder: write(folder / "scan.nrrd", compress=True),
    "nrrd, bzip2": lambda folder: bzip2(folder / "scan.nrrd"),
    "nhdr": lambda folder: write(folder / "scan.nhdr"),
    "nhdr, gzip": lambda folder: write(folder / "scan.nhdr", compress=True),
}


def mutant(data: bytes, rng: np.random.Generator) -> bytes:
    """A few bits or bytes changed (mostly in the header), a part cut out, doubled or moved, the end cut or added to."""
    changed = bytearray(data)
    places = rng.integers(0, min(len(data), 600) if rng.random() < 0.7 else len(data), 3).tolist()
    match rng.integers(0, 6):
        case 0:
            for place in places[: int(rng.integers(1, 4))]:
                changed[place] ^= 1 << int(rng.integers(8))
        case 1:
            changed[places[0] : places[0] + 4] = rng.choice([b"\xff" * 4, bytes(4), b"\0\0\xc0\x7f", b"-1 9", b"\n\n"])
        case 2:
            del changed[int(rng.integers(0, len(data))) :]
        case 3:
            changed += bytes(rng.integers(0, 256, int(rng.integers(1, 99)), dtype=np.uint8))
        case 4:
            changed[places[0] : places[0] + int(rng.integers(1, 50))] = b""
        case _:
            changed[places[0] : places[0]] = data[places[1] : places[1] + int(rng.integers(1, 50))]
    return bytes(changed)


def read(path: Path) -> Volume | str:
    """The volume, or why it is refused. Any other error is a bug."""
    try:
        return read_volume(path)
    except BadFileError as error:
        return str(error)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("error")
def test_damage_is_refused_in_one_line(tmp_path, kind):
    path = KINDS[kind](tmp_path)
    sound = read_volume(path)
    rng = np.random.default_rng(0)
    parts = files_of(path)
    contents = [part.read_bytes() for part in parts]
    refused = 0
    for i in range(MUTANTS):
        part, content = parts[i % len(parts)], contents[i % len(parts)]
        part.write_bytes(mutant(content, rng))
        found = read(path)
        if isinstance(found, str):
            refused += 1
            assert "\n" not in found
            assert len(found) < 400
        elif kind == "NIfTI, gzip" or ("," in kind and part != path):  # all of the file is under the checksum
            np.testing.assert_array_equal(found.array, sound.array)
            np.testing.assert_array_equal(found.affine, sound.affine)
        part.write_bytes(content)
    assert refused > MUTANTS / 3


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "," in kind])
def test_a_flipped_bit_of_what_is_compressed_is_never_read_as_data(tmp_path, kind):
    path = KINDS[kind](tmp_path)
    sound, part = read_volume(path).array, files_of(path)[-1]
    content = part.read_bytes()
    for place in np.random.default_rng(1).integers(len(content) * 4, len(content) * 8, 60).tolist():
        broken = bytearray(content)
        broken[place // 8] ^= 1 << place % 8
        part.write_bytes(broken)
        found = read(path)
        assert isinstance(found, str) or np.array_equal(found.array, sound)


def test_the_content_and_not_the_name_tells_a_packed_nifti(tmp_path):
    packed = write_nifti(tmp_path / "scan.nii.gz", scan()).read_bytes()
    (tmp_path / "scan.img").write_bytes(packed)
    (tmp_path / "scan2.nii.gz").write_bytes(gzip.decompress(packed))
    for name in ("scan.img", "scan2.nii.gz"):
        np.testing.assert_array_equal(read_volume(tmp_path / name).array, scan())
