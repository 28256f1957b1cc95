"""mrgen-synthesize on T1 alone: the FLAIR of the whole head and the white matter hyperintensities, on the scan."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from scipy.ndimage import binary_fill_holes

from mrgen.launch.runs import load_run
from mrgen.launch.training import train
from tests.launch.synthesis.synthesizing_tools import made
from tests.launch.tools import CPU, Called, composed

Script = Callable[..., Called]
SIZE = 48  # pixels along both axes of a slice
HEAD = 80  # intensity from which on a voxel is head and not air
# Where the slices of the phantom's sites are cut, along x and y of the canonical scan; what is below 0 is padding.
UTRECHT, SINGAPORE, GE3T = ((-1, 47), (-1, 47)), ((-1, 47), (1, 49)), ((-8, 40), (0, 48))
SUBJECTS = {  # Singapore 4 is stored with x and y swapped
    "Utrecht_0": ("Utrecht/0", UTRECHT),
    "Singapore_1": ("Singapore/1", SINGAPORE),
    "Singapore_4": ("Singapore/4", SINGAPORE),
    "GE3T_2": ("Amsterdam/GE3T/2", GE3T),
}
A = "Utrecht_0"


@pytest.fixture(scope="module")
def phantom(wmh_store: Path) -> Path:
    """A raw cohort in the layout of WMH 2017 (``cohort``) and its store (``store``). Read only."""
    return wmh_store.parent


def tiny(run_dir: Path, phantom: Path, model: str) -> Path:
    """A network of a few hundred parameters, trained for two steps."""
    data = (f"data.store='{phantom}/store'", f"data.sampling.size=[{SIZE},{SIZE}]", "data.batch_size=4")
    split = ("data.split.folds=2", "data.split.val=1", "data.steps_per_epoch=2", "trainer.max_epochs=1")
    head = f"data.normalisation.thresholds={{t1: {HEAD}, flair: 110}}"
    preset = ("experiment=joint_imputation/cross_validation", f"model={model}", "model.width=2", head)
    return train(composed("train", *preset, *data, *split, *CPU), run_dir)


@pytest.fixture(scope="module")
def joint_run(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only. Its segmenter, nearly constant after two steps, is made to find lesions in a part of the head."""
    run_dir = tiny(tmp_path_factory.mktemp("joint"), phantom, "joint")
    model = load_run(run_dir).model
    _, values = normalised(phantom, A)
    logits = model({"t1": torch.from_numpy(cut(values, 15, UTRECHT))[None, None]})[1]

    def decide(weights: dict[str, torch.Tensor]) -> None:
        weights["segmenter.last.bias"].sub_(logits.mean()).mul_(1000)
        weights["segmenter.last.weight"].mul_(1000)

    return changed(run_dir, decide)


@pytest.fixture(scope="module")
def offline_run(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("offline"), phantom, "offline")


@pytest.fixture(scope="module")
def unimodal_run(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("unimodal"), phantom, "unimodal")


def changed(run_dir: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Changes the weights of the best checkpoint."""
    path = run_dir / "checkpoints" / "best.ckpt"
    content = torch.load(path, weights_only=True)
    change(content["state_dict"])
    torch.save(content, path)
    return run_dir


def t1_alone(phantom: Path, root: Path, *ids: str) -> Path:
    """Subjects of whom nothing but the T1 is there."""
    for id in ids:
        place = SUBJECTS[id][0]
        (root / place / "pre").mkdir(parents=True)
        shutil.copy(phantom / "cohort" / place / "pre" / "T1.nii.gz", root / place / "pre")
    return root


def written(output: Path, id: str, name: str) -> nibabel.Nifti1Image:
    return nibabel.load(output / id / f"{id}_{name}.nii.gz")


def canonical(image: nibabel.Nifti1Image) -> np.ndarray:
    return np.asanyarray(nibabel.as_closest_canonical(image).dataobj)


def normalised(phantom: Path, id: str) -> tuple[nibabel.Nifti1Image, np.ndarray]:
    """A T1, and its canonical values as Li et al. normalise them: over the head, GE3T's before the crop."""
    place, (_, (back, front)) = SUBJECTS[id]
    scan = nibabel.load(phantom / "cohort" / place / "pre" / "T1.nii.gz")
    values = canonical(scan).astype(np.float64)
    head = np.stack([binary_fill_holes(values[..., z] >= HEAD) for z in range(values.shape[2])], axis=2)
    if "GE3T" not in id:
        head[:, : max(back, 0)] = head[:, front:] = False
    return scan, ((values - values[head].mean()) / values[head].std()).astype(np.float32)


def cut(values: np.ndarray, z: int, box: tuple[tuple[int, int], tuple[int, int]]) -> np.ndarray:
    """A slice of one size, filled up with the scan's minimum."""
    (x0, x1), (y0, y1) = box
    part = values[max(x0, 0) : x1, max(y0, 0) : y1, z]
    canvas = np.full((SIZE, SIZE), values.min(), np.float32)
    canvas[max(-x0, 0) :, max(-y0, 0) :][: part.shape[0], : part.shape[1]] = part
    return canvas


# ----- what is in the files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("id", SUBJECTS)
def test_flair_and_lesions_lie_on_the_t1_alone(phantom: Path, joint_run: Path, tmp_path: Path, id: str):
    """By hand, slice by slice: normalised, cut, through the network, and back in the training cohort's intensities."""
    output = made(joint_run, t1_alone(phantom, tmp_path / "scans", id), tmp_path / "out")
    assert sorted(path.name for path in (output / id).iterdir()) == [
        f"{id}_flair.json",
        f"{id}_flair_synthetic.nii.gz",
        f"{id}_segmentation.nii.gz",
    ]
    scan, values = normalised(phantom, id)
    flair, lesions = written(output, id, "flair_synthetic"), written(output, id, "segmentation")
    for image, kind in ((flair, np.float32), (lesions, np.uint8)):
        assert image.shape == scan.shape
        np.testing.assert_array_equal(image.affine, scan.affine)
        assert image.get_data_dtype() == kind

    run, box = load_run(joint_run), SUBJECTS[id][1]
    offset, factor = run.description["data"]["intensity_scale"]["flair"]
    (x0, x1), (y0, y1) = box
    seen = np.s_[max(x0, 0) : x1, max(y0, 0) : y1]
    back = np.s_[max(-x0, 0) :, max(-y0, 0) :]
    expected, logits = np.zeros(values.shape, np.float32), np.full(values.shape, -1, np.float32)
    for z in range(values.shape[2]):
        with torch.no_grad():
            imputed, found = run.model({"t1": torch.from_numpy(cut(values, z, box))[None, None]})
        x, y = expected[*seen, z].shape
        expected[*seen, z] = np.maximum(offset + factor * imputed[0, 0].numpy()[back][:x, :y], 0)
        if 4 <= z < values.shape[2] - 4:  # an eighth of 29 or 30 at each end, rounded up
            logits[*seen, z] = found[0, 0].numpy()[back][:x, :y]
    np.testing.assert_allclose(canonical(flair), expected, atol=1e-2)
    sure = np.abs(logits) > 1e-2  # of some hundred
    np.testing.assert_array_equal(canonical(lesions)[sure], (logits > 0)[sure])
    assert set(np.unique(canonical(lesions))) == {0, 1}
    assert sure.mean() > 0.99


def test_the_flair_shows_the_head_and_not_the_brain_alone(phantom: Path, joint_run: Path, tmp_path: Path):
    """Outside the brain too, but nothing where the slices do not reach: of Singapore's 51 rows they hold 48."""
    output = made(joint_run, t1_alone(phantom, tmp_path / "scans", "Singapore_4"), tmp_path / "out")
    flair = canonical(written(output, "Singapore_4", "flair_synthetic"))
    outside = ~np.load(next((phantom / "store").rglob("Singapore_4/brain.npy"))).astype(bool)
    assert outside[:, 1:49].any()
    assert (flair[:, 1:49][outside[:, 1:49]] > 0).mean() > 0.5
    assert not flair[:, :1].any()
    assert not flair[:, 49:].any()
    assert flair.min() == 0


def test_no_lesion_is_written_in_the_outermost_slices_or_beyond_the_slices(
    phantom: Path, joint_run: Path, tmp_path: Path
):
    """Of a segmenter that finds lesions everywhere."""
    run_dir = shutil.copytree(joint_run, tmp_path / "run")
    changed(run_dir, lambda weights: weights["segmenter.last.bias"].add_(1e6))
    output = made(run_dir, t1_alone(phantom, tmp_path / "scans", "GE3T_2"), tmp_path / "out")
    expected = np.zeros((32, 50, 30), bool)
    expected[:, :48, 4:26] = True
    np.testing.assert_array_equal(canonical(written(output, "GE3T_2", "segmentation")), expected)


def test_the_sites_of_one_cohort_and_a_subject_alone_give_the_same(phantom: Path, joint_run: Path, tmp_path: Path):
    """Which site it is, and so where the slices are cut, is told from the folders above."""
    root = t1_alone(phantom, tmp_path / "scans", *SUBJECTS)
    cohort, alone = (
        made(joint_run, folder, tmp_path / name)
        for folder, name in ((root, "cohort"), (root / SUBJECTS["GE3T_2"][0], "alone"))
    )
    assert sorted(path.name for path in cohort.iterdir()) == sorted(SUBJECTS)
    for name in ("flair_synthetic", "segmentation"):
        one, other = (np.asanyarray(written(output, "GE3T_2", name).dataobj) for output in (cohort, alone))
        np.testing.assert_array_equal(one, other)


# ----- which files there are -----------------------------------------------------------------------------------------


def test_both_are_named_listed_skipped_and_made_anew_together(phantom: Path, joint_run: Path, tmp_path: Path, capsys):
    root, output = t1_alone(phantom, tmp_path / "scans", A), tmp_path / "out"

    def said() -> list[str]:
        made(joint_run, root, output)
        return capsys.readouterr().out.splitlines()

    first = said()
    assert first[0] == f"joint ({joint_run}): t1 -> flair, segmentation"
    assert first[1].startswith(f"{A}: found t1; made flair, segmentation in ")
    record = json.loads((output / A / f"{A}_flair.json").read_text())
    assert record["files"] == [f"{A}_flair_synthetic.nii.gz", f"{A}_segmentation.nii.gz"]
    assert "skipped" in said()[1]
    (output / A / f"{A}_segmentation.nii.gz").unlink()
    assert f"made flair, segmentation anew ({A}_segmentation.nii.gz gone) in" in said()[1]


def test_a_segmentation_of_somebody_else_is_left_as_it_is(phantom: Path, joint_run: Path, tmp_path: Path, capsys):
    theirs = tmp_path / "out" / A / f"{A}_segmentation.nii.gz"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("drawn by hand")
    made(joint_run, t1_alone(phantom, tmp_path / "scans", A), tmp_path / "out", left_out=1)
    assert f"{A}: {theirs} is there, and mrgen-synthesize did not write it" in capsys.readouterr().out
    assert [path.read_text() for path in theirs.parent.iterdir()] == ["drawn by hand"]


def test_a_segmenter_of_lesions_writes_masks_alone(phantom: Path, unimodal_run: Path, tmp_path: Path, capsys):
    output = made(unimodal_run, t1_alone(phantom, tmp_path / "scans", A), tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"unimodal ({unimodal_run}): t1 -> segmentation"
    assert lines[1].startswith(f"{A}: found t1; made segmentation in ")
    assert {path.name for path in (output / A).iterdir()} == {f"{A}_segmentation.json", f"{A}_segmentation.nii.gz"}
    assert written(output, A, "segmentation").get_data_dtype() == np.uint8
    assert "intensity_scale" not in json.loads((output / A / f"{A}_segmentation.json").read_text())


def test_masks_of_two_methods_need_two_outputs(
    phantom: Path, joint_run: Path, unimodal_run: Path, tmp_path: Path, capsys
):
    root, output = t1_alone(phantom, tmp_path / "scans", A), tmp_path / "out"
    made(joint_run, root, output)
    before = written(output, A, "segmentation").dataobj[:].tobytes()
    made(unimodal_run, root, output, left_out=1)
    assert f"{A}_segmentation.nii.gz is there, and belongs to {A}_flair.json" in capsys.readouterr().out
    assert written(output, A, "segmentation").dataobj[:].tobytes() == before


# ----- what is refused -----------------------------------------------------------------------------------------------


def test_offline_synthesis_that_stopped_in_its_first_stage_is_refused_before_anything_is_written(
    mrgen: Script, phantom: Path, offline_run: Path, tmp_path: Path
):
    root = t1_alone(phantom, tmp_path / "scans", *SUBJECTS)
    run_dir = changed(shutil.copytree(offline_run, tmp_path / "run"), lambda weights: weights["stage"].zero_())
    called = mrgen("synthesize", f"checkpoint={run_dir}", f"input={root}", "output=out", "device=cpu")
    assert called.code == 1
    assert called.message.count("\n") == 1
    assert "stopped in its first stage, before its segmenter was trained; go on with it: resume=RUN" in called.message
    assert not (tmp_path / "out").exists()

    output = made(offline_run, root, tmp_path / "whole")
    assert written(output, A, "segmentation").shape == written(output, A, "flair_synthetic").shape


def test_a_t1_of_other_intensities_is_named_and_the_others_are_made(
    phantom: Path, joint_run: Path, tmp_path: Path, capsys
):
    """Scaled to 0 … 20, so that no voxel reaches what the head is told from air by."""
    root = t1_alone(phantom, tmp_path / "scans", A, "GE3T_2")
    path = root / SUBJECTS[A][0] / "pre" / "T1.nii.gz"
    scan = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image((scan.get_fdata() * 20 / scan.get_fdata().max()), scan.affine), path)
    made(joint_run, root, tmp_path / "out", left_out=1)
    out = capsys.readouterr().out
    said = (
        f"{A}, t1: found 0 voxels of head (from {HEAD} on) among values up to 20; expected intensities as in WMH 2017"
    )
    assert said in out.splitlines()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["GE3T_2"]


def test_monte_carlo_samples_are_refused(mrgen: Script, phantom: Path, unimodal_run: Path, tmp_path: Path):
    root = t1_alone(phantom, tmp_path / "scans", A)
    called = mrgen("synthesize", f"checkpoint={unimodal_run}", f"input={root}", "output=out", "mc_samples=4")
    assert called.code == 1
    assert "unimodal has no mc_samples and draws no samples; leave it out" in called.message
