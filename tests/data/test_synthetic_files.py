"""A synthesised sequence's files: whole or not there, whatever happens, and nobody else's are touched."""

import gzip
import json
import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
from raw_scans import BRATS_AFFINE, scan

from mrgen.data import synthetic_files
from mrgen.data.nifti import nifti_header
from mrgen.data.synthetic_files import SyntheticFiles, nifti_bytes
from mrgen.errors import UserError

OLD, NEW = {"made_from": {"checkpoint": "old"}}, {"made_from": {"checkpoint": "new"}}
MEAN, VARIANCE = "t2_synthetic", "t2_variance"


@pytest.fixture
def files(tmp_path: Path) -> SyntheticFiles:
    return SyntheticFiles(tmp_path / "out", "A", "t2", [MEAN, VARIANCE])


def seen(files: SyntheticFiles) -> dict[str, bytes]:
    """What lies in the subject's folder under names that are not hidden."""
    return {path.name: path.read_bytes() for path in files.folder.glob("[!.]*")} if files.folder.is_dir() else {}


# ----- why to make ---------------------------------------------------------------------------------------------------


def test_files_are_made_once_and_again_when_something_changed(files: SyntheticFiles):
    assert files.why_make(OLD["made_from"]) == "new"
    files.save({MEAN: b"mean", VARIANCE: b"variance"}, OLD)
    assert sorted(seen(files)) == ["A_t2.json", "A_t2_synthetic.nii.gz", "A_t2_variance.nii.gz"]
    assert json.loads(files.record.read_text())["files"] == ["A_t2_synthetic.nii.gz", "A_t2_variance.nii.gz"]
    assert files.why_make(OLD["made_from"]) is None
    assert files.why_make({**OLD["made_from"], "seed": 1}) == "seed changed"
    assert files.why_make(NEW["made_from"]) == "checkpoint changed"
    files.images[VARIANCE].unlink()
    assert files.why_make(OLD["made_from"]) == "A_t2_variance.nii.gz gone"


def test_a_variance_that_is_no_longer_made_goes(files: SyntheticFiles):
    files.save({MEAN: b"mean", VARIANCE: b"variance"}, OLD)
    files.save({MEAN: b"mean"}, NEW)
    assert sorted(seen(files)) == ["A_t2.json", "A_t2_synthetic.nii.gz"]
    assert files.why_make(NEW["made_from"]) is None


@pytest.mark.parametrize("name", [MEAN, VARIANCE, "record"])
def test_a_file_of_somebody_else_is_never_overwritten(files: SyntheticFiles, name: str):
    path = {**files.images, "record": files.record}[name]
    files.folder.mkdir(parents=True)
    path.write_text('{"made": "by hand"}')
    with pytest.raises(UserError, match=rf"{path.name} is there, and mrgen-synthesize did not write it; move it away"):
        files.why_make(OLD["made_from"])


def test_a_foreign_variance_beside_our_mean_is_somebody_elses_too(files: SyntheticFiles):
    files.save({MEAN: b"mean"}, OLD)
    files.images[VARIANCE].write_bytes(b"theirs")
    with pytest.raises(UserError, match="did not write it"):
        files.why_make(NEW["made_from"])


@pytest.mark.parametrize("listed", ["../../theirs", 3, ["A"]])
def test_a_json_that_lists_other_than_names_is_not_ours(files: SyntheticFiles, listed: object):
    """Whatever our json lists is removed with what is made anew."""
    files.folder.mkdir(parents=True)
    files.record.write_text(json.dumps({**OLD, "files": [listed]}))
    with pytest.raises(UserError, match=r"A_t2.json is there, and mrgen-synthesize did not write it"):
        files.why_make(NEW["made_from"])


# ----- a segmentation beside them, whose name several targets share ---------------------------------------------------


@pytest.fixture
def three(tmp_path: Path) -> SyntheticFiles:
    return SyntheticFiles(tmp_path / "out", "A", "t2", [MEAN, VARIANCE, "segmentation"])


def test_a_segmentation_is_one_of_the_files(three: SyntheticFiles):
    three.save({MEAN: b"mean", "segmentation": b"lesions"}, OLD)
    assert sorted(seen(three)) == ["A_segmentation.nii.gz", "A_t2.json", "A_t2_synthetic.nii.gz"]
    assert json.loads(three.record.read_text())["files"] == ["A_t2_synthetic.nii.gz", "A_segmentation.nii.gz"]
    three.images["segmentation"].unlink()
    assert three.why_make(OLD["made_from"]) == "A_segmentation.nii.gz gone"


def test_a_segmentation_goes_with_the_synthesis_that_it_belonged_to(three: SyntheticFiles, files: SyntheticFiles):
    """Made anew by a method that finds no lesions, whose own files do not include it."""
    three.save({MEAN: b"mean", "segmentation": b"lesions"}, OLD)
    files.save({MEAN: b"mean"}, NEW)
    assert sorted(seen(files)) == ["A_t2.json", "A_t2_synthetic.nii.gz"]


def test_a_segmentation_of_another_target_stays_and_is_named(three: SyntheticFiles):
    alone = SyntheticFiles(three.folder.parent, "A", "segmentation", ["segmentation"])
    three.save({MEAN: b"mean", "segmentation": b"lesions"}, OLD)
    said = r"A_segmentation.nii.gz is there, and belongs to A_t2.json; move it away or choose another output"
    with pytest.raises(UserError, match=said):
        alone.why_make(NEW["made_from"])
    with pytest.raises(UserError, match=said):
        alone.save({"segmentation": b"others"}, NEW)
    assert three.images["segmentation"].read_bytes() == b"lesions"
    assert sorted(seen(three)) == ["A_segmentation.nii.gz", "A_t2.json", "A_t2_synthetic.nii.gz"]


def test_a_segmentation_that_another_target_left_hidden_stays_its_own(three: SyntheticFiles):
    """All was written and not all renamed when it was killed; its json must not come to list another's mask."""
    alone = SyntheticFiles(three.folder.parent, "A", "segmentation", ["segmentation"])
    three.save({MEAN: b"mean", "segmentation": b"lesions"}, OLD)
    three.images["segmentation"].rename(three.folder / ".A_segmentation.nii.gz.partial")
    three.record.rename(three.folder / ".A_t2.json.partial")
    with pytest.raises(UserError, match=r"belongs to A_t2.json"):
        alone.why_make(NEW["made_from"])
    assert three.why_make(OLD["made_from"]) is None
    assert three.images["segmentation"].read_bytes() == b"lesions"


def test_a_segmentation_of_somebody_else_does_not_disturb_who_makes_none(files: SyntheticFiles):
    files.folder.mkdir(parents=True)
    (files.folder / "A_segmentation.nii.gz").write_bytes(b"theirs")
    files.save({MEAN: b"mean"}, OLD)
    files.save({MEAN: b"mean"}, NEW)
    assert (files.folder / "A_segmentation.nii.gz").read_bytes() == b"theirs"


# ----- whole or not at all -------------------------------------------------------------------------------------------


def killed_at(files: SyntheticFiles, step: int) -> bool:
    """Saves NEW in a process that dies after so many writes and renames, and half way through the last write."""
    child = os.fork()
    if child == 0:
        left = step
        write, replace = synthetic_files._write, os.replace

        def dying_write(path: Path, content: bytes) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                path.write_bytes(content[: len(content) // 2])
                os._exit(9)
            write(path, content)

        def dying_replace(source: Path, target: Path) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                os._exit(9)
            replace(source, target)

        synthetic_files._write, os.replace = dying_write, dying_replace
        files.save({MEAN: b"new mean", "segmentation": b"new lesions"}, NEW)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("before", [False, True], ids=["first time", "anew"])
def test_killed_at_any_moment_no_half_file_is_seen_and_the_next_run_goes_on(tmp_path: Path, before: bool):
    steps = 0
    while True:
        files = SyntheticFiles(tmp_path / str(steps), "A", "t2", [MEAN, VARIANCE, "segmentation"])
        if before:
            files.save({MEAN: b"old mean", VARIANCE: b"old variance"}, OLD)
        if not killed_at(files, steps):
            break
        steps += 1
        assert set(seen(files).values()) - {files.record.read_bytes() if before else b""} <= {
            b"old mean",
            b"old variance",
            b"new mean",
            b"new lesions",
        }
        reason = files.why_make(NEW["made_from"])  # the next run, which clears up
        assert not list(files.folder.glob(".*"))
        now = [seen(files).get(path.name) for path in files.images.values()]
        if reason is None:
            assert now == [b"new mean", None, b"new lesions"]
        else:
            assert reason == ("checkpoint changed" if before else "new")
            assert now == ([b"old mean", b"old variance", None] if before else [None, None, None])
            files.save({MEAN: b"new mean", "segmentation": b"new lesions"}, NEW)
            assert files.why_make(NEW["made_from"]) is None
    assert steps == 6  # three writes, three renames


def test_a_write_that_fails_leaves_nothing(files: SyntheticFiles, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=r"A cannot be written \(No space left on device\)"):
        files.save({MEAN: b"mean", VARIANCE: b"variance"}, OLD)
    assert not files.folder.exists()


def test_files_that_cannot_be_renamed_now_are_renamed_by_the_next_run(
    files: SyntheticFiles, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(UserError, match="cannot be written"):
            files.save({MEAN: b"mean", VARIANCE: b"variance"}, OLD)
    assert seen(files) == {}
    assert files.why_make(OLD["made_from"]) is None
    assert len(seen(files)) == 3


def test_an_output_that_is_a_file(files: SyntheticFiles):
    files.folder.parent.write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        files.save({MEAN: b"mean"}, OLD)


# ----- NIfTI ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_scans_header_is_kept_but_for_what_its_numbers_meant(tmp_path: Path, kind: type, suffix: str):
    source = kind(scan(), BRATS_AFFINE)
    header = source.header
    header.set_sform(BRATS_AFFINE, code="mni")
    header.set_qform(BRATS_AFFINE, code="scanner")
    header.set_xyzt_units("mm", "sec")
    header.set_slope_inter(2, 5)
    header.set_intent("label")
    header["cal_max"] = 900
    header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"of a patient"))
    nibabel.save(source, tmp_path / f"scan{suffix}")

    values = scan(1).astype(np.float32) / 3
    content = nifti_bytes(values, BRATS_AFFINE, "synthetic", nifti_header(tmp_path / f"scan{suffix}"))
    (tmp_path / "synthetic.nii.gz").write_bytes(content)
    image = nibabel.load(tmp_path / "synthetic.nii.gz")
    assert isinstance(image, kind)
    np.testing.assert_array_equal(np.asanyarray(image.dataobj), values)
    np.testing.assert_array_equal(image.affine, BRATS_AFFINE)
    made = image.header
    assert (int(made["sform_code"]), int(made["qform_code"])) == (4, 1)
    assert made.get_xyzt_units() == ("mm", "sec")
    assert made.get_data_dtype() == np.float32
    assert (float(made["cal_max"]), made.get_intent()[0], len(made.extensions)) == (0, "none", 0)
    assert made["descrip"].item() == b"synthetic"


def test_labels_are_bytes_whatever_the_scan_was(tmp_path: Path):
    header = nibabel.Nifti1Image(scan().astype(np.float32), BRATS_AFFINE).header
    labels = (scan() > 0).astype(np.uint8)
    for beside in (header, None):
        image = nibabel.Nifti1Image.from_bytes(gzip.decompress(nifti_bytes(labels, BRATS_AFFINE, "lesions", beside)))
        assert image.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(np.asanyarray(image.dataobj), labels)


def test_what_is_no_nifti_has_no_header_and_the_same_content_makes_the_same_file(tmp_path: Path):
    (tmp_path / "scan.mha").write_bytes(b"ObjectType = Image\n")
    assert nifti_header(tmp_path / "scan.mha") is None
    first, second = (nifti_bytes(scan().astype(np.float32), BRATS_AFFINE, "synthetic") for _ in range(2))
    assert first == second
    image = nibabel.Nifti1Image.from_bytes(gzip.decompress(first))
    np.testing.assert_array_equal(image.affine, BRATS_AFFINE)
    assert image.header.get_xyzt_units()[0] == "mm"
