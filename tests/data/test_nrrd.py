"""NRRD: read as SimpleITK reads it where it is sound, and refused where a field or a bit is not."""

import bz2
import gzip

import numpy as np
import pytest
from raw_scans import scan
from test_metaimage import DIRECTIONS, refused, simpleitk, write

from mrgen.data.reading import files_of, read_volume

HEADER = {
    "type": "short",
    "dimension": "3",
    "space": "left-posterior-superior",
    "sizes": "16 18 20",
    "space directions": "(0.5,0,0) (0,1,0) (0,0,3)",
    "kinds": "domain domain domain",
    "endian": "little",
    "encoding": "raw",
    "space origin": "(7,-5,2.5)",
}


def nrrd(path, data=None, **fields):
    """A file with fields changed, added (``_`` for blanks) or left out (None)."""
    table = {**HEADER, **{key.replace("_", " "): value for key, value in fields.items()}}
    lines = [f"{key}: {value}" for key, value in table.items() if value is not None]
    text = "\n".join(["NRRD0004", "# a comment", *lines, "who:=made it", "", ""])
    path.write_bytes(text.encode() + (scan().tobytes("F") if data is None else data))
    return path


@pytest.mark.parametrize("name", ["scan.nrrd", "scan.nhdr"])
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_geometry_and_voxels_are_simpleitks(tmp_path, name, compress, direction):
    path = write(tmp_path / name, direction=direction, compress=compress)
    volume = read_volume(path)
    array, affine = simpleitk(path)
    np.testing.assert_array_equal(volume.array, array)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-9)
    assert volume.notes == ()


@pytest.mark.parametrize("code", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
def test_every_type_of_number_is_simpleitks(tmp_path, code):
    path = write(tmp_path / "scan.nrrd", (scan() % 120).astype(code))
    array, _ = simpleitk(path)
    np.testing.assert_array_equal(read_volume(path).array, array)
    assert read_volume(path).array.dtype == array.dtype


@pytest.mark.parametrize(
    ("fields", "data"),
    [
        ({"space": "right-anterior-superior"}, None),
        ({"space": "LAS"}, None),
        ({"type": "int16_t", "endian": "big"}, scan().astype(">i2").tobytes("F")),
        ({"encoding": "gzip"}, gzip.compress(scan().tobytes("F"))),
        ({"encoding": "bzip2"}, bz2.compress(scan().tobytes("F"))),
    ],
)
def test_worlds_byte_orders_and_encodings(tmp_path, fields, data):
    path = nrrd(tmp_path / "scan.nrrd", data, **fields)
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.array, scan())
    if fields.get("encoding") != "bzip2":  # which SimpleITK's build lacks
        array, affine = simpleitk(path)
        np.testing.assert_array_equal(volume.array, array)
        np.testing.assert_allclose(volume.affine, affine, atol=1e-9)


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"dimension": "4"}, "found 4 dimensions (16 18 20)"),
        ({"dimension": "x"}, "found the dimension 'x', expected a number"),
        ({"sizes": "16 18 -20"}, "found no voxels (16×18×-20)"),
        ({"sizes": "16 18 21"}, "found 11,520 bytes of voxels, expected 12,096"),
        ({"sizes": "16 18 19"}, "found more bytes of voxels than the 10,944"),
        ({"sizes": "99999999 99999999 99999999"}, "expected 536,870,912 or fewer"),
        ({"type": "block"}, "type: block, expected whole numbers"),
        ({"type": "uchar"}, "found more bytes of voxels than the 5,760"),
        ({"endian": None}, "endian: none, expected little or big"),
        ({"encoding": "ascii"}, "encoding: ascii, expected one of raw, gzip"),
        ({"encoding": "gzip"}, "found corrupt compressed voxels"),
        ({"encoding": None}, "without encoding"),
        ({"space": None}, "found no space, so nothing says where front and left are"),
        ({"space": None, "space_dimension": "3"}, "the field 'space dimension: 3', which has no meaning here"),
        ({"space": "scanner-xyz"}, "space: scanner-xyz"),
        ({"space_directions": None, "spacings": "1 1 3"}, "the field 'spacings: 1 1 3'"),
        ({"space_directions": None}, "found no space directions"),
        ({"space_directions": "none (0,1,0) (0,0,1)"}, "expected three vectors"),
        ({"space_directions": "(1,0) (0,1,0) (0,0,1)"}, "found the vector '1 0', expected 3 numbers"),
        ({"space_directions": "(1,0,0) (0,1,0) (0,nan,1)"}, "found the vector '0 nan 1'"),
        ({"space_directions": "(1,0,0) (1,1,0) (0,0,1)"}, "from right angles"),
        ({"space_directions": "(1,0,0) (0,0,0) (0,0,1)"}, "voxel sides of 1×0×1 mm"),
        ({"space_origin": "(1e30,0,0)"}, "an origin 1e+30 mm away"),
        ({"space_origin": None}, "found no space origin"),
        ({"space_units": '"mm" "mm" "cm"'}, "expected mm for all three"),
        ({"kinds": "vector domain domain"}, "kinds: vector domain domain"),
        ({"byte_skip": "10"}, "byte skip: 10, expected 0"),
        ({"line_skip": "1"}, "line skip: 1, expected 0"),
        ({"old_min": "0"}, "the field 'old min: 0'"),
        ({"data_file": "LIST"}, "found voxels in several files"),
        ({"data_file": "/dev/zero"}, "found voxels in '/dev/zero'"),
        ({"datafile": "other.raw"}, "cannot be read (No such file or directory)"),
    ],
)
def test_each_field_is_followed_or_the_file_refused(tmp_path, fields, fault):
    assert fault in refused(nrrd(tmp_path / "scan.nrrd", **fields))


def test_a_field_that_stands_twice_is_refused(tmp_path):
    path = nrrd(tmp_path / "scan.nrrd")
    path.write_bytes(path.read_bytes().replace(b"# a comment", b"sizes: 18 16 20"))
    assert "sizes twice" in refused(path)


def test_units_are_turned_into_mm_with_a_line(tmp_path):
    volume = read_volume(nrrd(tmp_path / "scan.nrrd", space_units='"cm" "cm" "cm"'))
    expected = np.diag([-5.0, -10, 30, 1])
    expected[:3, 3] = -70, 50, 25
    np.testing.assert_allclose(volume.affine, expected)
    assert volume.notes == ("found a header in cm; turned them into mm",)


@pytest.mark.parametrize("encoding", ["gzip", "bzip2"])
def test_a_flipped_bit_of_compressed_voxels_is_found(tmp_path, encoding):
    """ITK takes one of four such files for sound, with thousands of wrong voxels."""
    pack = gzip.compress if encoding == "gzip" else bz2.compress
    data = pack(scan().tobytes("F"))
    path = tmp_path / "scan.nrrd"
    for place in np.random.default_rng(0).integers(10 * 8, len(data) * 8, 60):  # behind gzip's date and system
        broken = bytearray(data)
        broken[place // 8] ^= 1 << place % 8
        refused(nrrd(path, bytes(broken), encoding=encoding))
    for broken in (data[:-1], data + b"x", data[: len(data) // 2], b"", pack(bytes(50_000_000))):
        refused(nrrd(path, broken, encoding=encoding))


@pytest.mark.parametrize("text", [b"", b"NRRD0009\n", b"NRRD0004", "NRRD0004\n".encode("utf-16"), b"\n\n", b"x" * 99])
def test_what_is_no_header_is_said_to_be_none(tmp_path, text):
    (tmp_path / "scan.nrrd").write_bytes(text)
    assert "NRRD" in refused(tmp_path / "scan.nrrd")


def test_the_file_of_the_voxels_belongs_to_the_scan(tmp_path):
    assert files_of(write(tmp_path / "scan.nhdr")) == [tmp_path / "scan.nhdr", tmp_path / "scan.raw"]
    assert files_of(write(tmp_path / "scan.nrrd")) == [tmp_path / "scan.nrrd"]
