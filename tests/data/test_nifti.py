"""NIfTI: what a header says twice has to agree; what it leaves open is decided with a word, or refused."""

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest
from raw_scans import SHAPE, scan

from mrgen.data.nifti import nifti_header
from mrgen.data.reading import BadFileError, read_volume

AFFINE = np.array([[-1.0, 0, 0, 3], [0, -1, 0, 4], [0, 0, 5, 5], [0, 0, 0, 1]])  # 5 mm slices
NO_UNIT = "found no unit of length in the header; took mm"


def content(sform=AFFINE, *, sform_code=1, qform_code=1, kind=nibabel.Nifti1Header, order="<", voxels=None, **fields):
    """A NIfTI file. Its qform is ``AFFINE``; ``fields`` are set last, ``sides`` being the three of pixdim."""
    voxels = scan() if voxels is None else voxels
    header = kind(endianness=order)
    header.set_data_shape(voxels.shape)
    header.set_data_dtype(voxels.dtype)
    header.set_qform(AFFINE, 1)
    for name, row in zip(("srow_x", "srow_y", "srow_z"), sform, strict=False):
        header[name] = row
    header["sform_code"], header["qform_code"], header["xyzt_units"] = sform_code, qform_code, 2
    header["vox_offset"] = int(header["sizeof_hdr"]) + 4
    header["scl_slope"], header["scl_inter"] = 1, 0
    if kind is nibabel.Nifti1Header:
        header["magic"] = b"n+1"
    if "sides" in fields:
        header["pixdim"][1:4] = fields.pop("sides")
    for name, value in fields.items():
        header[name] = value
    return header.binaryblock + bytes(4) + voxels.astype(voxels.dtype.newbyteorder(order)).tobytes("F")


def read(path: Path, data: bytes):
    path.write_bytes(data)
    return read_volume(path)


def refused(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(BadFileError) as caught:
        read_volume(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(params=["scan.nii", "scan.nii.gz"])
def pack(request, tmp_path):
    """A path, and the function that makes a file's content of what it holds."""
    return tmp_path / request.param, gzip.compress if request.param.endswith("gz") else bytes


def changed(scale=1.0, x=-1.0, shift=0.0, shear=0.0, entry=None):
    affine = AFFINE * [[scale], [scale], [scale], [1]]
    affine[0, 0], affine[0, 1] = x * scale, shear
    affine[0, 3] += shift
    if entry is not None:
        affine[0, 0] = entry
    return affine


UNIT_SIDES = np.diag([-1.0, -1, 1, 1])
UNIT_SIDES[:3, 3] = AFFINE[:3, 3]


@pytest.mark.parametrize("kind", [nibabel.Nifti1Header, nibabel.Nifti2Header])
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_sound_file_is_read_in_either_version_and_byte_order(tmp_path, kind, order):
    volume = read(tmp_path / "scan.nii", content(kind=kind, order=order))
    np.testing.assert_array_equal(volume.array, scan())
    np.testing.assert_array_equal(volume.affine, AFFINE)
    assert volume.notes == ()


@pytest.mark.parametrize(
    ("fields", "note"),
    [
        ({"xyzt_units": 0}, NO_UNIT),
        ({"sform": UNIT_SIDES}, "found an sform without voxel sides, but a pixdim and a qform of 1×1×5 mm; took the"),
        ({"sform": changed(entry=1e30)}, "found an sform with voxel sides of 1e+30×1×5 mm; took the qform"),
        ({"sform": changed(shift=1e30)}, "found an sform with an origin 1e+30 mm away; took the qform"),
        ({"sform": changed(entry=np.nan)}, "found an sform with numbers that are not finite; took the qform"),
        ({"sform": changed(shear=0.1)}, "found an sform with axes 5.7° from right angles; took the qform"),
        ({"sform_code": 77}, "found an sform with the unknown code 77; took the qform"),
        ({"sides": (1, 1, 0), "qform_code": 0}, "found a pixdim of 1×1×0 mm; took the sform, with sides of 1×1×5 mm"),
        ({"sides": (1, 1, -5), "qform_code": 0}, "found a pixdim of 1×1×-5 mm; took the sform"),
        ({"sides": (1, 1, np.nan)}, "found a qform with numbers that are not finite; took the sform"),
        ({"sides": (0, 0, 0)}, "found a qform with voxel sides of 0×0×0 mm; took the sform"),
        ({"quatern_b": 2}, "or no rotation; took the sform"),
    ],
)
def test_where_the_file_says_what_is_right_it_is_taken_with_a_line(tmp_path, fields, note):
    volume = read(tmp_path / "scan.nii", content(**fields))
    np.testing.assert_allclose(volume.affine, AFFINE)
    (text,) = volume.notes
    assert note in text


@pytest.mark.parametrize(("code", "name", "in_unit"), [(1, "metres", 1e-3), (3, "micrometres", 1e3)])
def test_other_units_become_mm_with_a_line(tmp_path, code, name, in_unit):
    sides, sform = np.array([1, 1, 5]) * in_unit, changed(in_unit)
    volume = read(tmp_path / "scan.nii", content(sform, sides=sides, xyzt_units=code, qform_code=0))
    np.testing.assert_allclose(volume.affine, AFFINE, rtol=1e-6)
    assert volume.notes == (f"found a header in {name}; turned them into mm",)
    header = nifti_header(tmp_path / "scan.nii")  # what is synthesised from it says mm, and means them
    assert header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(header.get_sform(), AFFINE, rtol=1e-6)
    np.testing.assert_allclose(header.get_zooms(), (1, 1, 5))


def test_a_mended_header_is_what_a_synthesis_is_written_with(tmp_path):
    (tmp_path / "scan.nii").write_bytes(content(UNIT_SIDES, sform_code=4))
    header = nifti_header(tmp_path / "scan.nii")
    np.testing.assert_allclose(header.get_sform(), AFFINE)
    np.testing.assert_allclose(header.get_qform(), AFFINE)


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"sform_code": 0, "qform_code": 0}, "found neither an sform nor a qform code"),
        ({"sform": UNIT_SIDES, "qform_code": 0}, "sform with sides of 1×1×1 mm beside a pixdim of 1×1×5 mm"),
        ({"sform": changed(2)}, "found an sform with sides of 2×2×10 mm beside a pixdim of 1×1×5 mm"),
        ({"sform": changed(x=1)}, r"an sform (RPS) and a qform (LPS) that lie up to 32 voxels apart"),
        ({"sform": changed(x=1), "sform_code": 4}, "found an sform (RPS) and a qform (LPS)"),
        ({"sform": changed(shift=30)}, "that lie up to 30 voxels apart"),
        ({"sides": (1, 1, 0), "sform_code": 0}, "a qform with voxel sides of 1×1×0 mm, expected an affine in mm"),
        ({"sform": changed(entry=1e30), "qform_code": 0}, "found an sform with voxel sides of 1e+30×1×5 mm and a"),
        ({"sform": changed(shear=0.1), "qform_code": 0}, "found an sform with axes 5.7° from right angles"),
        ({"sform": changed(entry=0), "qform_code": 0}, "found an sform with voxel sides of 0×1×5 mm"),
        ({"xyzt_units": 1}, "voxel sides of 1000×1000×5000 mm"),  # mm that are called metres
        ({"sides": (1e-3, 1e-3, 5e-3), "sform_code": 0, "xyzt_units": 0}, "voxel sides of 0.001×0.001×0.005 mm"),
        ({"xyzt_units": 5}, "unit of length 5"),
    ],
)
def test_where_nothing_says_what_is_right_it_is_refused(tmp_path, fields, fault):
    assert fault in refused(tmp_path / "scan.nii", content(**fields))


def test_an_sform_and_a_qform_of_two_spaces_are_both_kept_and_the_first_is_read(tmp_path):
    volume = read(tmp_path / "scan.nii", content(changed(shift=30), sform_code=4))
    np.testing.assert_array_equal(volume.affine, changed(shift=30))
    assert volume.notes == ("found an sform and a qform of two spaces, up to 30 voxels apart; took the sform",)
    header = nifti_header(tmp_path / "scan.nii")
    np.testing.assert_allclose(header.get_qform(), AFFINE)


@pytest.mark.parametrize(
    ("fields", "differs"),
    [
        ({}, "nothing"),
        ({"xyzt_units": 1, "sform": changed(1e-3), "sides": (1e-3, 1e-3, 5e-3), "qform_code": 0}, "nothing"),
        ({"sform": UNIT_SIDES}, "nothing"),  # nibabel reads 1 mm slices
        ({"sides": (0, 0, 0)}, "sides"),  # SimpleITK makes them 1 mm, whatever the sform says
        ({"sides": (1, 1, -5)}, "direction"),  # SimpleITK turns the third axis around
        ({"sform": changed(shift=30), "sform_code": 4}, "origin"),  # SimpleITK takes the qform
    ],
)
def test_where_simpleitk_reads_the_same_header_otherwise(tmp_path, fields, differs):
    import SimpleITK

    ours = read(tmp_path / "scan.nii", content(**fields)).affine
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    image = SimpleITK.ReadImage(str(tmp_path / "scan.nii"))
    sides = np.linalg.norm(ours[:3, :3], axis=0)
    to_ras = np.diag([-1, -1, 1])
    theirs = {
        "sides": (image.GetSpacing(), sides),
        "direction": (to_ras @ np.reshape(image.GetDirection(), (3, 3)), ours[:3, :3] / sides),
        "origin": (to_ras @ image.GetOrigin(), ours[:3, 3]),
    }
    unequal = {name for name, pair in theirs.items() if not np.allclose(*pair, atol=1e-4)}
    assert unequal == {differs} - {"nothing"}


def test_without_a_code_nibabel_and_simpleitk_disagree_on_where_the_front_is(tmp_path):
    import SimpleITK

    assert "nothing says where front and left are" in refused(
        tmp_path / "scan.nii", content(sform_code=0, qform_code=0)
    )
    guess = nibabel.load(tmp_path / "scan.nii").affine
    image = SimpleITK.ReadImage(str(tmp_path / "scan.nii"))
    front = -np.reshape(image.GetDirection(), (3, 3))[1, 1]  # of the world in which y points there
    assert (np.sign(guess[1, 1]), front) == (1, -1)


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"vox_offset": 0}, "its voxels start at byte 0, expected 352 or more"),
        ({"vox_offset": 348}, "its voxels start at byte 348"),
        ({"vox_offset": np.nan}, "its voxels start at byte nan"),
        ({"vox_offset": 353.5}, "its voxels start at byte 353.5"),
        ({"vox_offset": 368}, "found 11,872 bytes of image, expected 11,888"),
        ({"datatype": 2}, "data type 2 has 8 bits, and the header says 16"),
        ({"datatype": 2, "bitpix": 8}, "found more bytes of image than the 6,112"),
        ({"datatype": 16, "bitpix": 32}, "found 11,872 bytes of image, expected 23,392"),
        ({"datatype": 32767}, "data type 32767"),
        ({"datatype": 128, "bitpix": 24}, "found RGB voxels, expected one number a voxel"),
        ({"scl_slope": np.inf}, "intensities are inf times"),
        ({"scl_slope": 2, "scl_inter": np.nan}, "intensities are 2 times the voxels plus nan"),
        ({"scl_slope": np.nan, "scl_inter": -np.inf}, "intensities are nan times the voxels plus -inf"),
        ({"dim": (4, 16, 18, 10, 2, 1, 1, 1)}, "found 4 dimensions (16×18×10×2), expected a 3D volume"),
        ({"dim": (5, 16, 18, 10, 1, 2, 1, 1)}, "found 5 dimensions (16×18×10×1×2), expected a 3D volume"),
        ({"magic": b"ni1"}, "found the header of a .hdr and .img pair"),
        ({"magic": b""}, "found a header without NIfTI's mark"),
        ({"dim": (3, 16, 18, 19, 1, 1, 1, 1)}, "found more bytes of image than the 11,296"),
        ({"dim": (3, -16, 18, 20, 1, 1, 1, 1)}, "found no voxels (-16×18×20)"),
        ({"dim": (9, 16, 18, 20, 1, 1, 1, 1)}, "9 dimensions"),
    ],
)
def test_what_a_header_says_of_its_voxels_is_true_or_the_file_refused(pack, fields, fault):
    path, packed = pack
    assert fault in refused(path, packed(content(**fields)))


@pytest.mark.parametrize("behind", [b"\0", b"more", bytes(5000)])
def test_more_data_than_the_header_claims_is_refused(pack, behind):
    path, packed = pack
    assert "found more bytes of image than the 11,872 of" in refused(path, packed(content() + behind))


def test_what_follows_a_gzip_stream_is_refused_and_a_second_member_read(tmp_path):
    data = content()
    assert "corrupt gzip" in refused(tmp_path / "scan.nii.gz", gzip.compress(data) + b"more")
    read(tmp_path / "scan.nii.gz", gzip.compress(data[:5000]) + gzip.compress(data[5000:]))


def test_extensions_lie_between_header_and_voxels(tmp_path):
    data = content(vox_offset=384)
    extension = bytes([1, 0, 0, 0]) + (32).to_bytes(4, "little") + (6).to_bytes(4, "little") + b"of a patient".ljust(24)
    np.testing.assert_array_equal(read(tmp_path / "scan.nii", data[:348] + extension + data[352:]).array, scan())


def test_scaled_intensities_are_read_as_nibabel_does(tmp_path):
    path = tmp_path / "scan.nii"
    volume = read(path, content(scl_slope=0.37, scl_inter=-12))
    theirs = np.asanyarray(nibabel.load(path).dataobj)
    np.testing.assert_array_equal(volume.array, theirs)
    assert volume.array.dtype == theirs.dtype


@pytest.mark.parametrize(
    ("slope", "inter", "said"),
    [(0, 0, False), (np.nan, 0, True), (np.nan, np.nan, True), (0, 5, True), (0, np.nan, True)],
)
def test_a_slope_that_is_0_or_no_number_means_no_scaling(tmp_path, slope, inter, said):
    volume = read(tmp_path / "scan.nii", content(scl_slope=slope, scl_inter=inter))
    np.testing.assert_array_equal(volume.array, scan())
    assert [note.endswith("; took the voxels as they are") for note in volume.notes] == [True] * said


@pytest.mark.parametrize("dim", [(4, 16, 18, 20, 1, 1, 1, 1), (5, 16, 18, 20, 1, 1, 1, 1), (4, 16, 18, 20, 1, 0, 0, 0)])
def test_further_axes_of_one_step_are_dropped_with_a_line(tmp_path, dim):
    volume = read(tmp_path / "scan.nii", content(dim=dim))
    np.testing.assert_array_equal(volume.array, scan())
    size = "×".join(map(str, dim[1 : 1 + dim[0]]))
    assert volume.notes == (f"found {dim[0]} dimensions ({size}); took the first three",)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (content() + bytes(100_000_000), "image than the 11,872"),
        (content(dim=(3, 32767, 32767, 32767, 1, 1, 1, 1)), "claims 32767×32767×32767 voxels, expected 536,870,912"),
    ],
    ids=["hidden", "claimed"],
)
def test_a_bomb_takes_no_memory(tmp_path, data, fault):
    import tracemalloc

    packed = gzip.compress(data, 1)
    tracemalloc.start()
    try:
        assert fault in refused(tmp_path / "scan.nii.gz", packed)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_the_memory_at_hand_is_known_before_any_is_taken(tmp_path, monkeypatch):
    data = content(dim=(3, 512, 512, 512, 1, 1, 1, 1))  # 0.3 GB of int16, and 8.6 GB to work with
    monkeypatch.setattr("mrgen.data.image_file.free_memory", lambda: 4_000_000_000)
    assert refused(tmp_path / "scan.nii", data) == (
        "found a header that claims 512×512×512 voxels, which take 8.9 GB of memory, expected at most the 4.0 GB that "
        "are free; use fewer workers or a larger machine"
    )
    monkeypatch.setattr("mrgen.data.image_file.free_memory", lambda: 9_000_000_000)
    assert "found 11,872 bytes of image, expected 268,435,808" in refused(tmp_path / "scan.nii", data)
    monkeypatch.setattr("mrgen.data.image_file.free_memory", lambda: 0)
    assert read(tmp_path / "scan.nii", content()).array.shape == SHAPE


def test_a_pair_of_which_only_the_voxels_are_named_is_no_image(tmp_path):
    assert "found no NIfTI header" in refused(tmp_path / "scan.img", scan().tobytes())
