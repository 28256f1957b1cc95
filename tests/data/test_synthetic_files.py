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
from mrgen.data.synthetic_files import SyntheticFiles, nifti_bytes, read_header
from mrgen.errors import UserError

OLD, NEW = {"made_from": {"checkpoint": "old"}}, {"made_from": {"checkpoint": "new"}}


@pytest.fixture
def files(tmp_path: Path) -> SyntheticFiles:
    return SyntheticFiles(tmp_path / "out", "A", "t2")


def seen(files: SyntheticFiles) -> dict[str, bytes]:
    """What lies in the subject's folder under names that are not hidden."""
    return {path.name: path.read_bytes() for path in files.folder.glob("[!.]*")} if files.folder.is_dir() else {}


# ----- why to make ---------------------------------------------------------------------------------------------------


def test_files_are_made_once_and_again_when_something_changed(files: SyntheticFiles):
    assert files.why_make(OLD["made_from"]) == "new"
    files.save(b"mean", b"variance", OLD)
    assert sorted(seen(files)) == ["A_t2.json", "A_t2_synthetic.nii.gz", "A_t2_variance.nii.gz"]
    assert json.loads(files.record.read_text())["files"] == ["A_t2_synthetic.nii.gz", "A_t2_variance.nii.gz"]
    assert files.why_make(OLD["made_from"]) is None
    assert files.why_make({**OLD["made_from"], "seed": 1}) == "seed changed"
    assert files.why_make(NEW["made_from"]) == "checkpoint changed"
    files.variance.unlink()
    assert files.why_make(OLD["made_from"]) == "A_t2_variance.nii.gz gone"


def test_a_variance_that_is_no_longer_made_goes(files: SyntheticFiles):
    files.save(b"mean", b"variance", OLD)
    files.save(b"mean", None, NEW)
    assert sorted(seen(files)) == ["A_t2.json", "A_t2_synthetic.nii.gz"]
    assert files.why_make(NEW["made_from"]) is None


@pytest.mark.parametrize("name", ["mean", "variance", "record"])
def test_a_file_of_somebody_else_is_never_overwritten(files: SyntheticFiles, name: str):
    path = getattr(files, name)
    files.folder.mkdir(parents=True)
    path.write_text('{"made": "by hand"}')
    with pytest.raises(UserError, match=rf"{path.name} is there, and mrgen-synthesize did not write it; move it away"):
        files.why_make(OLD["made_from"])


def test_a_foreign_variance_beside_our_mean_is_somebody_elses_too(files: SyntheticFiles):
    files.save(b"mean", None, OLD)
    files.variance.write_bytes(b"theirs")
    with pytest.raises(UserError, match="did not write it"):
        files.why_make(NEW["made_from"])


# ----- whole or not at all -------------------------------------------------------------------------------------------


def killed_at(files: SyntheticFiles, step: int) -> bool:
    """Saves NEW in a process that dies after so many writes and renames, and half way through the last write."""
    child = os.fork()
    if child == 0:
        left = step
        write, replace = synthetic_files.write_synced, os.replace

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

        synthetic_files.write_synced, os.replace = dying_write, dying_replace
        files.save(b"new mean", b"new variance", NEW)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("before", [False, True], ids=["first time", "anew"])
def test_killed_at_any_moment_no_half_file_is_seen_and_the_next_run_goes_on(tmp_path: Path, before: bool):
    steps = 0
    while True:
        files = SyntheticFiles(tmp_path / str(steps), "A", "t2")
        if before:
            files.save(b"old mean", b"old variance", OLD)
        if not killed_at(files, steps):
            break
        steps += 1
        assert set(seen(files).values()) - {files.record.read_bytes() if before else b""} <= {
            b"old mean",
            b"old variance",
            b"new mean",
            b"new variance",
        }
        reason = files.why_make(NEW["made_from"])  # the next run, which clears up
        assert not list(files.folder.glob(".*"))
        now = [seen(files).get(path.name) for path in (files.mean, files.variance)]
        if reason is None:
            assert now == [b"new mean", b"new variance"]
        else:
            assert reason == ("checkpoint changed" if before else "new")
            assert now == ([b"old mean", b"old variance"] if before else [None, None])
            files.save(b"new mean", b"new variance", NEW)
            assert files.why_make(NEW["made_from"]) is None
    assert steps == 6  # three writes, three renames


def test_a_write_that_fails_leaves_nothing(files: SyntheticFiles, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=r"A cannot be written \(No space left on device\)"):
        files.save(b"mean", b"variance", OLD)
    assert not files.folder.exists()


def test_files_that_cannot_be_renamed_now_are_renamed_by_the_next_run(
    files: SyntheticFiles, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(UserError, match="cannot be written"):
            files.save(b"mean", b"variance", OLD)
    assert seen(files) == {}
    assert files.why_make(OLD["made_from"]) is None
    assert len(seen(files)) == 3


def test_an_output_that_is_a_file(files: SyntheticFiles):
    files.folder.parent.write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        files.save(b"mean", None, OLD)


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
    content = nifti_bytes(values, BRATS_AFFINE, "synthetic", read_header(tmp_path / f"scan{suffix}"))
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


def test_a_header_without_an_affine_stays_without_one(tmp_path: Path):
    """An old ANALYZE export: the scan and its synthesis are placed alike, by whatever rule a viewer has."""
    source = nibabel.Nifti1Image(scan(), None)
    nibabel.save(source, tmp_path / "scan.nii")
    source = nibabel.load(tmp_path / "scan.nii")
    content = nifti_bytes(scan().astype(np.float32), source.affine, "synthetic", read_header(tmp_path / "scan.nii"))
    image = nibabel.Nifti1Image.from_bytes(gzip.decompress(content))
    assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (0, 0)
    np.testing.assert_array_equal(image.affine, source.affine)


def test_what_is_no_nifti_has_no_header_and_the_same_content_makes_the_same_file(tmp_path: Path):
    (tmp_path / "scan.mha").write_bytes(b"ObjectType = Image\n")
    assert read_header(tmp_path / "scan.mha") is None
    first, second = (nifti_bytes(scan().astype(np.float32), BRATS_AFFINE, "synthetic") for _ in range(2))
    assert first == second
    image = nibabel.Nifti1Image.from_bytes(gzip.decompress(first))
    np.testing.assert_array_equal(image.affine, BRATS_AFFINE)
    assert image.header.get_xyzt_units()[0] == "mm"
