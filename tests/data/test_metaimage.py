"""MetaImage: read as SimpleITK reads it where it is sound, and refused where ITK would make noise of it, or crash."""

import re
import zlib

import numpy as np
import pytest
from raw_scans import SHAPE, scan

from mrgen.data.reading import BadFileError, files_of, read_volume

C, S = np.cos(0.3), np.sin(0.3)
DIRECTIONS = {
    "LPS": np.eye(3),
    "RAI": np.diag([-1.0, -1, -1]),
    "turned": np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]]),
    "oblique": np.array([[C, -S, 0], [S, C, 0], [0, 0, 1]]),
}


def write(path, array=None, direction="LPS", compress=False):
    import SimpleITK

    image = SimpleITK.GetImageFromArray((scan() if array is None else array).T)
    image.SetSpacing((0.5, 1, 3))
    image.SetOrigin((7, -5, 2.5))
    image.SetDirection(DIRECTIONS[direction].ravel().tolist())
    SimpleITK.WriteImage(image, str(path), compress)
    return path


def simpleitk(path):
    """The array and the affine (RAS+) that SimpleITK makes of a file."""
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    image = SimpleITK.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return SimpleITK.GetArrayFromImage(image).T, np.diag([-1.0, -1, 1, 1]) @ affine


def change(path, key, value):
    """Sets a field of the header, adds one that is not there, or removes one (None)."""
    data = path.read_bytes()
    line = rb"(?m)^%s = .*\n" % key.encode()
    new = b"" if value is None else f"{key} = {value}\n".encode()
    path.write_bytes(re.sub(line, lambda _: new, data, count=1) if re.search(line, data) else new + data)


def refused(path):
    with pytest.raises(BadFileError) as caught:
        read_volume(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["scan.mha", "scan.mhd"])
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
    path = write(tmp_path / "scan.mha", (scan() % 120).astype(code))
    array, _ = simpleitk(path)
    np.testing.assert_array_equal(read_volume(path).array, array)
    assert read_volume(path).array.dtype == array.dtype


@pytest.mark.parametrize("key", ["BinaryDataByteOrderMSB", "ElementByteOrderMSB"])
def test_big_endian_voxels(tmp_path, key):
    path = write(tmp_path / "scan.mhd")
    change(path, "BinaryDataByteOrderMSB", None)
    change(path, key, "True")
    (tmp_path / "scan.raw").write_bytes(scan().astype(">i2").tobytes("F"))
    np.testing.assert_array_equal(read_volume(path).array, scan())
    np.testing.assert_array_equal(read_volume(path).array, simpleitk(path)[0])


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("NDims", "-1", "found -1 dimensions"),  # ends ITK's process
        ("NDims", "4", "found 4 dimensions"),
        ("NDims", "3.5", "found the number of dimensions '3.5', expected a number"),
        ("NDims", None, "without NDims"),
        ("DimSize", "16 18", "found the size '16 18', expected 3 numbers"),
        ("DimSize", "16 18 0", "found no voxels (16×18×0)"),
        ("DimSize", "-16 18 20", "found no voxels (-16×18×20)"),
        ("DimSize", "16 18 21", "found 11,520 bytes of voxels, expected 12,096"),
        ("DimSize", "16 18 19", "found more bytes of voxels than the 10,944"),
        ("DimSize", "99999999 99999999 99999999", "voxels, expected 536,870,912 or fewer"),
        ("ElementType", "MET_UCHAR", "found more bytes of voxels than the 5,760"),
        ("ElementType", "MET_FLOAT", "found 11,520 bytes of voxels, expected 23,040"),
        ("ElementType", "MET_SHORT_ARRAY", "ElementType = MET_SHORT_ARRAY"),
        ("ElementType", "MET_LONG", "ElementType = MET_LONG"),  # four bytes or eight
        ("ElementNumberOfChannels", "3", "found 3 numbers a voxel"),
        ("ElementSpacing", "1 1 0", "ElementSpacing = 1 1 0, expected sides above 0"),
        ("ElementSpacing", "1 1 -3", "expected sides above 0"),
        ("ElementSpacing", "1 1 nan", "found the spacing '1 1 nan', expected 3 numbers"),
        ("ElementSpacing", "1 1 1e300", "voxel sides of 1×1×inf mm"),
        ("ElementSpacing", "1_0 1 1", "found the spacing '1_0 1 1'"),
        ("ElementSpacing", None, "without ElementSpacing"),
        ("TransformMatrix", None, "found no TransformMatrix, so nothing says where front and left are"),
        ("TransformMatrix", "1 0 0 0 1 0 0 0 0", "expected rows of length 1"),
        ("TransformMatrix", "1 0 0 0.6 0.8 0 0 0 1", "from right angles"),
        ("TransformMatrix", "0 0 0 0 0 0 0 0 0", "expected rows of length 1"),
        ("Offset", "1e30 0 0", "an origin 1e+30 mm away"),
        ("Offset", None, "found no Offset"),
        ("Position", "0 0 0", "Offset twice"),
        ("HeaderSize", "10", "HeaderSize = 10, expected 0"),
        ("HeaderSize", "-1", "HeaderSize = -1, expected 0"),
        ("BinaryData", "False", "BinaryData = False, expected True"),
        ("BinaryDataByteOrderMSB", None, "without BinaryDataByteOrderMSB"),
        ("BinaryDataByteOrderMSB", "Maybe", "expected True or False"),
        ("CompressedData", "True", "found corrupt compressed voxels"),
        ("ElementToIntensityFunctionSlope", "2", "ElementToIntensityFunctionSlope = 2, expected 1"),
        ("DistanceUnits", "inch", "DistanceUnits = inch, expected mm, cm or um"),
        ("ObjectType", "Mesh", "ObjectType = Mesh, expected Image"),
        ("ElementDataFile", "LIST", "found voxels in several files"),
        ("ElementDataFile", "/dev/zero", "found voxels in '/dev/zero', expected a file in the header's own folder"),
        ("ElementDataFile", "../scan.raw", "found voxels in '../scan.raw'"),
        ("ElementDataFile", "other.raw", "its voxels in other.raw cannot be read (No such file or directory)"),
        ("ElementDataFile", None, "found no MetaImage header"),
    ],
)
@pytest.mark.parametrize("name", ["scan.mha", "scan.mhd"])
def test_each_field_is_followed_or_the_file_refused(tmp_path, name, key, value, fault):
    path = write(tmp_path / name)
    change(path, key, value)
    assert fault in refused(path)


def test_voxels_that_never_end_are_refused(tmp_path):
    path = write(tmp_path / "scan.mhd")
    (tmp_path / "scan.raw").unlink()
    (tmp_path / "scan.raw").symlink_to("/dev/zero")
    assert "found a pipe or a device" in refused(path)


def test_units_are_turned_into_mm_with_a_line(tmp_path):
    path = write(tmp_path / "scan.mha")
    change(path, "DistanceUnits", "cm")
    volume = read_volume(path)
    np.testing.assert_allclose(np.linalg.norm(volume.affine[:3, :3], axis=0), (5, 10, 30))
    assert volume.notes == ("found a header in cm; turned them into mm",)


def test_an_orientation_in_letters_that_is_not_the_matrixs(tmp_path):
    path = write(tmp_path / "scan.mha")
    change(path, "AnatomicalOrientation", "LPI")
    assert "found AnatomicalOrientation = LPI, but the TransformMatrix says RAI, expected the same" in refused(path)
    change(write(path, direction="RAI"), "AnatomicalOrientation", "RAI")  # some writers know no other
    assert read_volume(path).notes == (
        "found AnatomicalOrientation = RAI, but the TransformMatrix says LPS; took the matrix, as ITK does",
    )


def test_remarks_of_any_name_are_no_fault(tmp_path):
    """SimpleITK writes a converted file's whole NIfTI header, or DICOM tags, beside what it understands."""
    import SimpleITK

    image = SimpleITK.GetImageFromArray(scan().T)
    image.SetMetaData("0010|0010", "Doe^Jane = née Roe")
    image.SetMetaData("dim[0]", "3")
    SimpleITK.WriteImage(image, str(tmp_path / "scan.mha"))
    np.testing.assert_array_equal(read_volume(tmp_path / "scan.mha").array, scan())


def compressed(path, data):
    """A compressed MetaImage of what stands for its voxels."""
    header = write(path, compress=True).read_bytes().partition(b"LOCAL\n")[0]
    header = re.sub(rb"CompressedDataSize = \d+", b"CompressedDataSize = %d" % len(data), header)
    path.write_bytes(header + b"LOCAL\n" + data)
    return path


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (zlib.compress(scan().tobytes("F")[:-2]), "found 11,518 bytes of voxels, expected 11,520"),
        (zlib.compress(scan().tobytes("F") + b"\0"), "found more bytes of voxels than the 11,520"),
        (zlib.compress(scan().tobytes("F")) + b"more", "found 4 bytes behind the compressed voxels"),
        (zlib.compress(scan().tobytes("F"))[:-4], "found truncated compressed voxels"),
        (zlib.compress(scan().tobytes("F"))[:-4] + b"1234", "found corrupt compressed voxels"),
        (zlib.compress(bytes(50_000_000)), "found more bytes of"),
        (b"", "found truncated compressed voxels"),
    ],
)
def test_compressed_voxels_are_whole_and_nothing_else(tmp_path, data, fault):
    assert fault in refused(compressed(tmp_path / "scan.mha", data))


def test_a_compressed_size_that_is_not_the_datas_is_refused(tmp_path):
    path = compressed(tmp_path / "scan.mha", zlib.compress(scan().tobytes("F")))
    assert read_volume(path).array.shape == SHAPE
    change(path, "CompressedDataSize", "7")
    assert "CompressedDataSize = 7, expected" in refused(path)


@pytest.mark.parametrize("text", [b"", b"\n" * 99, "NDims = 3".encode("utf-16"), b"NDims = 3", b"\xff" * 200_000])
def test_what_is_no_header_is_said_to_be_none(tmp_path, text):
    (tmp_path / "scan.mha").write_bytes(text)
    assert "expected a MetaImage" in refused(tmp_path / "scan.mha")


def test_the_file_of_the_voxels_belongs_to_the_scan(tmp_path):
    """Or a second preparation would call a scan unchanged whose voxels are others."""
    assert files_of(write(tmp_path / "scan.mhd")) == [tmp_path / "scan.mhd", tmp_path / "scan.raw"]
    assert files_of(write(tmp_path / "scan.mha")) == [tmp_path / "scan.mha"]
    assert files_of(tmp_path / "gone.mhd") == [tmp_path / "gone.mhd"]
    assert files_of(tmp_path / "scan.nii.gz") == [tmp_path / "scan.nii.gz"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("AnatomicalOrientation", "LPS"),
        ("ElementDataFile", "./scan.raw"),
        ("BinaryData", None),
        ("ObjectType", None),
    ],
)
def test_what_other_writers_say_otherwise_or_leave_out_is_read_as_simpleitk_does(tmp_path, key, value):
    """Letters may say where the axes lead: to the left, the back and the top."""
    path = write(tmp_path / "scan.mhd")
    change(path, key, value)
    volume = read_volume(path)
    array, affine = simpleitk(path)
    np.testing.assert_array_equal(volume.array, array)
    np.testing.assert_allclose(volume.affine, affine)
    assert volume.notes == ()
