"""Each kind of bad input gives one clear line: subject, file, what was found, what was expected."""

import gzip
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from raw_scans import (
    BRATS_AFFINE,
    LAYOUTS,
    SHAPE,
    ellipsoid,
    head,
    lesion,
    scan,
    scan_of,
    write_brats2015_case,
    write_brats_case,
    write_nifti,
    write_wmh_case,
)

from mrgen.data.brain import background, find_brain
from mrgen.data.checks import check_subject, grouped
from mrgen.data.cohorts import Problem, find_subjects, read_layouts

SHIPPED = read_layouts(LAYOUTS)
SCANS = os.environ.get("MRGEN_SCANS")
ID = "BraTS19_X_1_1"


@pytest.fixture
def case(tmp_path):
    return write_brats_case(tmp_path / ID)


def check(root, layout="brats2019"):
    (files,), problems = find_subjects(SHIPPED[layout], root)
    assert not problems
    return check_subject(files, SHIPPED[layout])


def only_line(case, layout="brats2019"):
    subject, problems = check(case.parent, layout)
    assert subject is None
    (problem,) = problems
    assert "\n" not in str(problem)
    return str(problem)


def test_a_good_subject_has_no_problem_and_keeps_its_intensities(case):
    subject, problems = check(case.parent)
    assert not problems
    assert list(subject.volumes) == ["t1", "t1ce", "t2", "flair"]
    np.testing.assert_array_equal(subject.volumes["t2"], scan_of(case.name, "t2")[::-1, ::-1])  # LPS file, RAS array
    np.testing.assert_array_equal(subject.label, lesion()[::-1, ::-1])
    np.testing.assert_array_equal(subject.affine, [[1, 0, 0, -15], [0, 1, 0, 222], [0, 0, 1, 0], [0, 0, 0, 1]])
    np.testing.assert_array_equal(subject.original_affine, BRATS_AFFINE)
    np.testing.assert_array_equal(subject.brain, ellipsoid())


def test_truncated_gzip(case):
    path = case / f"{ID}_t2.nii.gz"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    size = f"{len(data) // 2:,}"
    assert only_line(case) == (
        f"{ID}: {path}: found a truncated gzip stream ({size} bytes), expected a whole one; copy it again"
    )


@pytest.mark.parametrize("place", [0.5, -6])  # inside the stream, and in the checksum, which nibabel never reads
def test_corrupt_gzip(case, place):
    path = case / f"{ID}_t2.nii.gz"
    data = bytearray(path.read_bytes())
    data[int(place * len(data)) if place > 0 else place] ^= 0xFF
    path.write_bytes(data)
    assert f"{ID}: {path}: found a corrupt gzip stream" in only_line(case)


def test_not_an_image(case):
    path = case / f"{ID}_t1ce.nii.gz"
    path.write_bytes(b"<html>404 not found</html>" * 40)
    assert only_line(case).startswith(
        f"{ID}: {path}: found no NIfTI header (it starts '<html>404 not fo'), expected a NIfTI volume"
    )
    path.write_bytes(gzip.compress(b"version https://git-lfs.github.com/spec/v1\n" * 20))
    assert "found no NIfTI header (it starts 'version https://'), expected a NIfTI volume" in only_line(case)
    path.write_bytes(b"")
    assert only_line(case) == f"{ID}: {path}: found an empty file, expected a NIfTI volume; copy it again"


def test_uncompressed_nifti_cut_short(tmp_path):
    case = write_brats_case(tmp_path / ID, suffix=".nii")
    path = case / f"{ID}_t1.nii"
    path.write_bytes(path.read_bytes()[:-1000])
    n = 352 + 2 * int(np.prod(SHAPE))
    assert only_line(case) == (f"{ID}: {path}: found {n - 1000:,} bytes of image, expected {n:,}; copy it again")


def test_damaged_header_is_no_traceback(case):
    path = case / f"{ID}_t1.nii.gz"
    data = bytearray(gzip.decompress(path.read_bytes()))
    data[70:72] = b"\xff\x7f"  # a data type that does not exist
    path.write_bytes(gzip.compress(bytes(data)))
    assert f"{path}: found a NIfTI header that cannot be used" in only_line(case)


def test_gzip_without_its_suffix_and_plain_nifti_with_it_are_read(case):
    plain = gzip.decompress((case / f"{ID}_t1.nii.gz").read_bytes())
    (case / f"{ID}_t1.nii.gz").write_bytes(plain)
    (case / f"{ID}_t2.nii.gz").rename(case / f"{ID}_t2.nii")
    assert check(case.parent)[1] == []


def test_shapes_differ(case):
    path = write_nifti(case / f"{ID}_flair.nii.gz", scan(3)[..., :-1])
    assert only_line(case) == (
        f"{ID}: {path}: found the shape 16×18×19, expected 16×18×20 as in {ID}_t1.nii.gz; bring them onto one grid"
    )


def test_affines_differ(case):
    moved = BRATS_AFFINE.copy()
    moved[2, 3] += 2
    path = write_nifti(case / f"{ID}_seg.nii.gz", lesion(), moved)
    assert only_line(case) == (
        f"{ID}: {path}: found an affine up to 2 voxels off, expected that of {ID}_t1.nii.gz; bring them onto one grid"
    )
    flipped = BRATS_AFFINE * [[-1], [1], [1], [1]]
    write_nifti(case / f"{ID}_seg.nii.gz", lesion(), flipped)
    assert "found an affine up to 32 voxels off" in only_line(case)


def test_small_float_differences_of_affines_are_tolerated(case):
    noise = np.random.default_rng(0).normal(0, 1e-4, (3, 4))
    write_nifti(case / f"{ID}_t2.nii.gz", scan(2), BRATS_AFFINE + np.vstack([noise, np.zeros(4)]))
    assert check(case.parent)[1] == []


def test_nan_and_infinite_voxels(case):
    volume = scan(1).astype(np.float32)
    volume[8, 8, 8], volume[0, 0, 0], volume[0, 0, 1] = np.nan, np.inf, -np.inf
    path = write_nifti(case / f"{ID}_t1ce.nii.gz", volume)
    assert only_line(case) == (
        f"{ID}: {path}: found 3 NaN or infinite voxels, expected finite intensities; export it again"
    )


def test_finite_is_what_the_store_can_hold(case):
    """float32: a slope of 1e38 makes numbers that only float64 can say."""
    path = write_nifti(case / f"{ID}_t2.nii.gz", scan(2))
    data = bytearray(gzip.decompress(path.read_bytes()))
    data[112:116] = np.float32(1e38).tobytes()  # scl_slope
    path.write_bytes(gzip.compress(bytes(data)))
    n = int((scan(2) > 3).sum())
    assert f"found {n} NaN or infinite voxels, expected finite intensities" in only_line(case)
    write_nifti(path, scan(2).astype(np.float64) * 1e300)
    assert f"found {n} NaN or infinite voxels" in only_line(case)
    write_nifti(path, scan(2).astype(np.float64) * 1e-300)
    assert "found 0 in every voxel" in only_line(case)


@pytest.mark.parametrize("value", [0, 7])
def test_volume_of_one_value(case, value):
    path = write_nifti(case / f"{ID}_flair.nii.gz", np.full(SHAPE, value, np.int16))
    assert only_line(case) == f"{ID}: {path}: found {value} in every voxel, expected an image; restore it"


def test_an_empty_label_is_a_finding_and_no_problem(case):
    write_nifti(case / f"{ID}_seg.nii.gz", np.zeros(SHAPE, np.uint8))
    subject, problems = check(case.parent)
    assert not problems
    assert subject.label.max() == 0


def test_label_numbers_outside_the_layouts_set(case):
    path = write_nifti(case / f"{ID}_seg.nii.gz", lesion((1, 2, 3)))
    assert only_line(case) == (
        f"{ID}: {path}: found the label 3 (4 voxels), expected 0, 1, 2, 4 (BraTS 2019); is the layout another year's?"
    )
    write_nifti(case / f"{ID}_seg.nii.gz", lesion().astype(np.float32) * 0.5)
    assert "found the label 0.5 (4 voxels), expected 0, 1, 2, 4" in only_line(case)


def test_labels_stored_as_floats_are_read(case):
    write_nifti(case / f"{ID}_seg.nii.gz", lesion().astype(np.float64))
    subject, problems = check(case.parent)
    assert not problems
    assert subject.label.dtype == np.uint8


def test_label_outside_the_brain(case):
    label = np.zeros(SHAPE, np.uint8)
    label[:2, :3, :2] = 4
    label[8, 8, 8] = 1
    path = write_nifti(case / f"{ID}_seg.nii.gz", label)
    assert only_line(case) == (
        f"{ID}: {path}: found 12 of 13 labelled voxels outside the brain, expected less than 1%; "
        "is it another subject's label, or flipped?"
    )


def test_label_at_the_brains_edge_is_tolerated(case):
    from scipy.ndimage import binary_dilation

    label = np.where(binary_dilation(ellipsoid(), iterations=1), 2, 0).astype(np.uint8)
    write_nifti(case / f"{ID}_seg.nii.gz", label)
    assert check(case.parent)[1] == []


def test_four_dimensions(case):
    path = write_nifti(case / f"{ID}_t1.nii.gz", np.stack([scan()] * 2, axis=-1))
    line = f"{ID}: {path}: found 4 dimensions (16×18×20×2), expected a 3D volume; save the one meant"
    assert only_line(case) == line


def test_colour_is_not_an_intensity(case):
    rgb = np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    path = write_nifti(case / f"{ID}_t1.nii.gz", rgb)
    assert f"{path}: found" in only_line(case)
    assert "expected one number a voxel" in only_line(case)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a\nlibrary's words"), "found scans that cannot be checked (ValueError: a library's words)"),
        (MemoryError(), "found scans that do not fit into memory; use fewer workers"),
    ],
)
def test_what_no_check_foresaw_costs_the_subject_and_no_other(case, monkeypatch, error, line):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr("mrgen.data.checks.find_brain", fail)
    assert f"{ID}: {case}: {line}" in only_line(case)


def test_what_a_header_left_open_is_a_note(case):
    subject, problems = check(case.parent)
    assert not problems
    assert [Path(note.file).name for note in subject.notes] == [
        f"{ID}_{name}.nii.gz" for name in ("t1", "t1ce", "t2", "flair", "seg")
    ]
    others = [Problem(f"S{i}", "/raw/x.nii", note.message, "note") for i in range(3) for note in subject.notes[:1]]
    assert grouped([*subject.notes, *others, Problem("S1", "/raw/y.nii", "found another thing", "note")]) == [
        f"{ID} and 3 more: {ID}_t1.nii.gz and 4 more: found no unit of length in the header; took mm",
        "S1: y.nii: found another thing",
    ]


def test_all_that_is_wrong_with_a_subject_is_said_at_once(case):
    write_nifti(case / f"{ID}_t2.nii.gz", np.zeros(SHAPE, np.int16))
    (case / f"{ID}_flair.nii.gz").write_bytes(b"")
    write_nifti(case / f"{ID}_seg.nii.gz", lesion((3,)))
    _, problems = check(case.parent)
    assert [p.kind for p in problems] == ["all-zero volume", "not an image", "label numbers"]


@pytest.mark.parametrize("compress", [True, False])
def test_damaged_metaimage(tmp_path, compress, capfd):
    from raw_scans import write_mha

    case = write_brats2015_case(tmp_path / "brats_tcia_pat105_0001", flat=True)
    path = write_mha(case / "VSD.Brain.XX.O.MR_T1.54513.mha", scan(), compress)
    data = path.read_bytes()
    path.write_bytes(data[:-500])
    line = only_line(case, "brats2015")
    assert line.startswith(f"brats_tcia_pat105_0001: {path}: found ")
    assert "truncated compressed voxels" in line if compress else "11,020 bytes of voxels, expected 11,520" in line
    if compress:  # SimpleITK would hand this out as noise
        broken = bytearray(data)
        broken[-1500] ^= 0xFF
        path.write_bytes(broken)
        assert "found corrupt compressed voxels" in only_line(case, "brats2015")
    path.write_bytes(b"hello\n")
    assert "found no MetaImage header, expected a MetaImage (.mha)" in only_line(case, "brats2015")
    path.write_bytes(data[: data.index(b"DimSize")] + b"DimSize = x y z\nElementDataFile = LOCAL\n")
    assert f"{path}: found " in only_line(case, "brats2015")
    assert capfd.readouterr().err == ""  # ITK talks to stderr past Python


def test_metaimage_is_turned_from_lps_and_zyx(tmp_path):
    write_brats2015_case(tmp_path / "brats_tcia_pat105_0001")
    subject, problems = check(tmp_path, "brats2015")
    assert not problems
    np.testing.assert_array_equal(
        subject.volumes["t1"],
        scan_of(f"{tmp_path.name}/brats_tcia_pat105_0001", "MR_T1", ("MR_Flair", "MR_T1"))[::-1, ::-1],
    )
    np.testing.assert_array_equal(np.diag(subject.original_affine), [-1, -1, 1, 1])


@pytest.mark.parametrize("level", [0, 50, -1000])
def test_brain_on_a_constant_background_that_need_not_be_zero(level):
    volume = scan().astype(np.int32) + level
    brain, _, method = find_brain([volume], (1, 1, 1), skull_stripped=True)
    np.testing.assert_array_equal(brain, ellipsoid())
    assert method == "background"
    assert background(volume)[0] == level


def test_brain_on_a_noisy_background():
    volume = scan() + np.random.default_rng(1).normal(0, 3, SHAPE)
    brain, _, _ = find_brain([volume], (1, 1, 1), skull_stripped=True)
    assert (brain != ellipsoid()).sum() <= 5


def test_brain_after_z_scoring_keeps_what_is_below_the_background():
    volume = np.where(ellipsoid(), (scan() - 500.0) / 230, 0)
    brain, _, _ = find_brain([volume], (1, 1, 1), skull_stripped=True)
    np.testing.assert_array_equal(brain, ellipsoid())


def test_ringing_at_the_edge_of_one_sequence_does_not_grow_the_brain_and_fluid_leaves_no_hole():
    from scipy.ndimage import binary_dilation

    ring = binary_dilation(ellipsoid()) & ~ellipsoid()
    flair = scan(0)
    flair[ring] = -45
    flair[7:9, 8:10, 9:11] = 0
    t1 = scan(1)
    t1[7:9, 8:10, 9:11] = 0
    brain, _, _ = find_brain([flair, t1], (1, 1, 1), skull_stripped=True)
    np.testing.assert_array_equal(brain, ellipsoid())


def test_one_sequence_with_a_shorter_field_of_view_does_not_cut_the_brain():
    cut = scan(0)
    cut[:, :, :8] = 0
    brain, _, _ = find_brain([scan(1), scan(2), cut], (1, 1, 1), skull_stripped=True)
    np.testing.assert_array_equal(brain, ellipsoid())


@pytest.mark.parametrize("scale", [1, 0.01, 40])
def test_brain_inside_skull_and_scalp_at_any_scale(scale):
    t1, flair, truth = head()
    brain, allowed, method = find_brain([t1 * float(scale), flair * float(scale)], (3, 3, 6), skull_stripped=False)
    assert method == "head"
    dice = 2 * (brain & truth).sum() / (brain.sum() + truth.sum())
    assert dice > 0.95
    assert allowed[truth].all()
    assert not brain[:4].any()


def test_head_whose_brain_cannot_be_told_apart_is_taken_whole():
    volume = np.random.default_rng(0).normal(500, 20, (20, 20, 20)) * ellipsoid((20, 20, 20), 0.2)
    brain, allowed, method = find_brain([volume], (1, 1, 1), skull_stripped=False)
    assert method == "head_filled"
    np.testing.assert_array_equal(brain, allowed)
    assert brain[10, 10, 10]


def test_wmh_subject_with_its_skull_passes(tmp_path):
    write_wmh_case(tmp_path / "Utrecht" / "0")
    subject, problems = check(tmp_path, "wmh2017")
    assert not problems
    assert subject.brain_method == "head"
    assert sorted(np.unique(subject.label)) == [0, 1, 2]


@pytest.mark.skipif(not SCANS, reason="MRGEN_SCANS is unset: real scans are not part of the repository")
def test_real_scan_with_negative_intensities_and_masks_that_differ():
    subject, problems = check(Path(SCANS) / "brats2019")
    assert not problems
    masks = [volume != 0 for volume in subject.volumes.values()]
    assert min(v.min() for v in subject.volumes.values()) < 0
    assert len({int(m.sum()) for m in masks}) == 4
    union, common = np.any(masks, axis=0), np.all(masks, axis=0)
    assert (union & ~common).sum() > 3000
    assert (common & ~subject.brain).sum() < 100
    assert (subject.brain & ~union).sum() < 100
    assert (subject.label[~subject.brain] > 0).sum() == 0


def test_one_scan_as_two_sequences_is_refused(tmp_path):
    """A copy over the other, or a glob that means both."""
    case = write_brats_case(tmp_path / "HGG" / "BraTS19_X_1_1")
    shutil.copy(case / f"{case.name}_t1.nii.gz", case / f"{case.name}_t2.nii.gz")
    (files,), _ = find_subjects(SHIPPED["brats2019"], tmp_path)
    subject, (problem,) = check_subject(files, SHIPPED["brats2019"])
    assert subject is None
    assert "found the same voxels in t1 and t2, expected two scans" in str(problem)


def test_a_label_beyond_all_measure_is_told_in_few_digits(case):
    write_nifti(case / f"{ID}_seg.nii.gz", lesion().astype(float) * 1e300)
    assert "found the label 1e+300 (" in only_line(case)
