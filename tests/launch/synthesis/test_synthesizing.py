"""mrgen-synthesize: files that overlay their scans, in the training cohort's intensities, made once."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
import yaml

from mrgen.callbacks.provenance import KEY
from mrgen.data.store import Store
from mrgen.errors import UserError
from mrgen.launch.runs import Run, load_run
from mrgen.launch.training import build_datamodule
from tests.launch.synthesis.synthesizing_tools import (
    ONE_PASS,
    TWO_PASSES,
    A,
    B,
    copied,
    described,
    image,
    made,
    record,
    values,
)
from tests.launch.tools import Called

Script = Callable[..., Called]


@pytest.fixture
def scans_of_a(phantom_cohort: Path, tmp_path: Path) -> Path:
    """One subject's scans, to spoil, in a cohort's folder."""
    return copied(phantom_cohort, tmp_path / "scans", A)


@pytest.fixture
def run_dir(rsnet_run: Path, tmp_path: Path) -> Path:
    """A run to spoil."""
    return shutil.copytree(rsnet_run, tmp_path / "run")


# ----- where the voxels lie ------------------------------------------------------------------------------------------


def rotated(spacing: tuple[float, float, float]) -> np.ndarray:
    a, b = 0.3, 0.2
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = about_z @ about_x @ np.diag(spacing)
    affine[:3, 3] = (5, -70, 11)
    return affine


def written_as(source: Path, target: Path, codes: str, affine: np.ndarray) -> None:
    """Rewrites a subject's scans: voxels turned to axis codes, and placed in the world by a canonical affine."""
    from nibabel.orientations import axcodes2ornt, ornt_transform

    for path in source.glob("*.nii.gz"):
        canonical = nibabel.as_closest_canonical(nibabel.load(path))
        placed = nibabel.Nifti1Image(np.asanyarray(canonical.dataobj), affine)
        turned = placed.as_reoriented(ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes)))
        assert nibabel.aff2axcodes(turned.affine) == tuple(codes)
        target.mkdir(parents=True, exist_ok=True)
        nibabel.save(turned, target / path.name)


@pytest.mark.parametrize(
    ("codes", "affine"),
    [
        ("LPS", np.diag([5.0, 5, 5, 1])),
        ("PIR", np.diag([5.0, 5, 5, 1])),
        ("SLA", np.diag([5.0, 4, 7, 1])),
        ("RAS", rotated((5, 5, 5))),
        ("LIP", rotated((5, 4, 7))),
    ],
    ids=["LPS", "axes permuted", "anisotropic", "oblique", "oblique, anisotropic, permuted"],
)
def test_files_overlay_their_scans_in_every_orientation(
    rsnet_run: Path, phantom_cohort: Path, tmp_path: Path, codes: str, affine: np.ndarray
):
    source = next(phantom_cohort.glob(f"*/{A}"))
    written_as(source, tmp_path / "straight" / A, "RAS", affine)
    written_as(source, tmp_path / "turned" / A, codes, affine)
    straight = made(rsnet_run, tmp_path / "straight", tmp_path / "out_straight", *TWO_PASSES)
    turned = made(rsnet_run, tmp_path / "turned", tmp_path / "out_turned", *TWO_PASSES)
    scan = nibabel.load(tmp_path / "turned" / A / f"{A}_t1.nii.gz")
    for what in ("synthetic", "variance"):
        reference, found = image(straight, what=what), image(turned, what=what)
        assert found.shape == scan.shape
        np.testing.assert_array_equal(found.affine, scan.affine)
        assert found.get_data_dtype() == np.float32
        # Every voxel's place in the world, looked up in the volume that was never turned.
        voxels = np.stack([*np.indices(found.shape).reshape(3, -1), np.ones(np.prod(found.shape))])
        there = np.rint(np.linalg.inv(reference.affine) @ found.affine @ voxels)[:3].astype(int)
        expected = np.asanyarray(reference.dataobj)[tuple(there)].reshape(found.shape)
        np.testing.assert_array_equal(np.asanyarray(found.dataobj), expected)
    brain = np.asanyarray(scan.dataobj) > 0
    assert (values(turned)[brain] != 0).mean() > 0.95
    assert (values(turned)[~brain] == 0).mean() > 0.95


def test_a_mha_scan_is_overlaid_too(rsnet_run: Path, phantom_cohort: Path, tmp_path: Path, capsys):
    import SimpleITK

    folder = tmp_path / "scans" / "HGG" / "brats_tcia_pat001_0001"
    for name, shipped in (("t1", "MR_T1"), ("t1ce", "MR_T1c"), ("flair", "MR_Flair")):
        scan = SimpleITK.ReadImage(str(next(phantom_cohort.glob(f"*/{A}/*_{name}.nii.gz"))))
        path = folder / f"VSD.Brain.XX.O.{shipped}.1" / f"VSD.Brain.XX.O.{shipped}.1.mha"
        path.parent.mkdir(parents=True)
        SimpleITK.WriteImage(scan, str(path), True)
    output = made(rsnet_run, tmp_path / "scans", tmp_path / "out", *ONE_PASS)
    assert "layout: BraTS 2015; the run's own, BraTS 2019, matches nothing" in capsys.readouterr().out
    found = image(output, folder.name)
    scan = nibabel.load(next(phantom_cohort.glob(f"*/{A}/*_t1.nii.gz")))
    np.testing.assert_allclose(found.affine, scan.affine, atol=1e-5)
    assert int(found.header["qform_code"]) == 0  # a plain header
    reference = made(rsnet_run, copied(phantom_cohort, tmp_path / "nifti", A), tmp_path / "reference", *ONE_PASS)
    np.testing.assert_array_equal(np.asanyarray(found.dataobj), values(reference))


# ----- what the numbers mean -----------------------------------------------------------------------------------------


def test_the_network_sees_what_it_saw_in_training_and_intensities_are_the_training_cohorts(
    rsnet_run: Path, phantom_cohort: Path, phantom_store: Path, tmp_path: Path
):
    """By hand: the training's own data path, the network, offset and factor from the training subjects."""
    output = made(rsnet_run, copied(phantom_cohort, tmp_path / "scans", A), tmp_path / "out", *ONE_PASS)
    run, subjects = load_run(rsnet_run), Store(phantom_store).subjects
    box = run.description["data"]["box"]
    crop = {"_target_": "mrgen.data.crops.BrainBox", "size": box, "divisor": 2}
    data = build_datamodule(run.conf.data, sampling=crop, augmentation=[])
    assert data.whole.size == tuple(box)
    sample = data.dataset([A], crop=data.whole)[0, 0, 0]
    run.model.mc_samples = 0
    network = run.model.synthesize({name: sample["image"][None, i : i + 1] for i, name in enumerate(data.modalities)})

    statistics = [subjects[id].statistics["t2"] for id in run.split.train]
    offset = sum(s["clipped_mean"] for s in statistics) / len(statistics)
    factor = sum(s["clipped_std"] for s in statistics) / len(statistics)
    expected = np.where(sample["brain"].numpy(), offset + factor * network.mean[0, 0].numpy(), 0)

    found = np.asanyarray(nibabel.as_closest_canonical(image(output)).dataobj)
    start = [low for low, _ in record(output)["box"]]
    inside = subjects[A].read_brain()
    assert inside.any()
    places = np.argwhere(inside)
    np.testing.assert_allclose(found[inside], expected[tuple((places - start).T)], rtol=1e-4, atol=1e-2)
    assert not found[~inside].any()
    assert not (output / A / f"{A}_t2_variance.nii.gz").exists()
    assert record(output)["intensity_scale"] == pytest.approx({"offset": offset, "factor": factor})


def test_the_checkpoints_scale_turns_values_into_intensities(
    rsnet_run: Path, run_dir: Path, phantom_cohort: Path, tmp_path: Path
):
    scale = load_run(rsnet_run).description["data"]["intensity_scale"]
    described(run_dir, intensity_scale=scale | {"t2": [1000.0, 3.0]})
    root = copied(phantom_cohort, tmp_path / "scans", A)
    before = made(rsnet_run, root, tmp_path / "before", *TWO_PASSES)
    after = made(run_dir, root, tmp_path / "after", *TWO_PASSES)
    offset, factor = scale["t2"]
    brain = values(before) != 0
    np.testing.assert_allclose(values(after)[brain], 1000 + 3 * (values(before)[brain] - offset) / factor, rtol=1e-5)
    np.testing.assert_allclose(
        values(after, what="variance"), values(before, what="variance") * 9 / factor**2, rtol=1e-4
    )
    assert (values(before, what="variance")[brain] > 0).any()
    assert not values(after)[~brain].any()
    assert not values(after, what="variance")[~brain].any()
    descriptions = [image(after, what=what).header["descrip"].item().decode() for what in ("synthetic", "variance")]
    assert descriptions == ["mrgen 0.1.0: synthetic t2", "mrgen 0.1.0: synthetic t2, variance"]


@pytest.mark.parametrize("there", ["as it was", "another scan", "rubbish"])
def test_the_missing_sequence_and_the_label_are_not_looked_at(
    rsnet_run: Path, scans_of_a: Path, tmp_path: Path, there: str
):
    target, label = (scans_of_a / A / f"{A}_{name}.nii.gz" for name in ("t2", "seg"))
    if there == "another scan":
        scan = nibabel.load(target)
        nibabel.save(nibabel.Nifti1Image(np.full(scan.shape, 1000, np.int16), scan.affine), target)
    elif there == "rubbish":
        target.write_bytes(b"rubbish")
        label.write_bytes(b"rubbish")
        shutil.copy(label, label.with_name(f"{A}_2_seg.nii.gz"))  # two labels would puzzle mrgen-prepare
    output = made(rsnet_run, scans_of_a, tmp_path / "out", *TWO_PASSES)
    for path in (target, *scans_of_a.rglob("*_seg.nii.gz")):
        path.unlink()
    without = made(rsnet_run, scans_of_a, tmp_path / "without", *TWO_PASSES)
    for what in ("synthetic", "variance"):
        np.testing.assert_array_equal(values(output, what=what), values(without, what=what))


def test_bf16_is_chosen_by_conf_and_close(rsnet_run: Path, scans_of_a: Path, tmp_path: Path):
    exact = made(rsnet_run, scans_of_a, tmp_path / "exact", *ONE_PASS)
    fast = made(rsnet_run, scans_of_a, tmp_path / "fast", *ONE_PASS, "precision=bf16-mixed")
    difference = np.abs(values(fast) - values(exact))
    assert 0 < difference.max() < 0.1 * record(exact)["intensity_scale"]["factor"]
    assert [record(output)["precision"] for output in (exact, fast)] == ["32-true", "bf16-mixed"]


def test_samples_are_the_same_whoever_came_before(rsnet_run: Path, phantom_cohort: Path, tmp_path: Path):
    both = made(rsnet_run, copied(phantom_cohort, tmp_path / "both", A, B), tmp_path / "out_both", *TWO_PASSES)
    alone = made(rsnet_run, copied(phantom_cohort, tmp_path / "alone", B), tmp_path / "out_alone", *TWO_PASSES)
    other = made(rsnet_run, tmp_path / "alone", tmp_path / "out_other", "seed=1", *TWO_PASSES)
    np.testing.assert_array_equal(values(both, B), values(alone, B))
    np.testing.assert_array_equal(values(both, B, "variance"), values(alone, B, "variance"))
    assert (values(both, B) != values(other, B)).any()


def test_samples_can_be_asked_for(rsnet_run: Path, scans_of_a: Path, tmp_path: Path):
    output = made(rsnet_run, scans_of_a, tmp_path / "out", "mc_samples=3", "mc_batch=2")
    assert record(output)["made_from"]["mc_samples"] == 3
    assert values(output, what="variance").any()
    with pytest.raises(UserError, match="mc_samples is 1"):
        made(rsnet_run, scans_of_a, tmp_path / "out", "mc_samples=1")


def test_samples_of_a_method_that_draws_none(
    rsnet_run: Path, run_dir: Path, scans_of_a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = run_dir / "checkpoints" / "best.ckpt"
    content = torch.load(path, weights_only=True)
    content[KEY]["model"]["dropout"] = 0
    torch.save(content, path)
    with pytest.raises(UserError, match="mc_samples=4: rsnet-t2 was trained without dropout; leave it out"):
        made(run_dir, scans_of_a, tmp_path / "out", "mc_samples=4")

    def load_another_method(path: str) -> Run:
        run = load_run(path)
        del run.model.mc_samples, run.model.mc_batch
        return run

    monkeypatch.setattr("mrgen.launch.synthesis.synthesizing.load_run", load_another_method)
    with pytest.raises(UserError, match="mc_batch=2: rsnet-t2 has no mc_batch and draws no samples; leave it out"):
        made(rsnet_run, scans_of_a, tmp_path / "out", "mc_batch=2")


def test_the_box_is_the_trained_one_and_grows_for_a_larger_brain(
    rsnet_run: Path, run_dir: Path, scans_of_a: Path, tmp_path: Path
):
    def size(output: Path) -> list[int]:
        return [stop - start for start, stop in record(output)["box"]]

    trained = load_run(rsnet_run).description["data"]["box"]
    assert size(made(rsnet_run, scans_of_a, tmp_path / "as trained", *ONE_PASS)) == trained
    described(run_dir, box=[8, 64, 8])  # 64 is more than the volume has
    output = made(run_dir, scans_of_a, tmp_path / "small", *ONE_PASS)
    extent = np.ptp(np.argwhere(values(output)), axis=0) + 1
    assert size(output) == [-(-extent[0] // 2) * 2, 64, -(-extent[2] // 2) * 2]  # two levels: multiples of 2


def test_a_run_trained_on_patches_sees_patches(rsnet_run: Path, run_dir: Path, scans_of_a: Path, tmp_path: Path):
    conf = yaml.safe_load((run_dir / "config.yaml").read_text())
    conf["data"]["sampling"] = {"_target_": "mrgen.data.crops.RandomPatch", "size": [16, 24, 16], "divisor": 8}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(conf))
    patches = values(made(run_dir, scans_of_a, tmp_path / "patches", *ONE_PASS))
    whole = values(made(rsnet_run, scans_of_a, tmp_path / "whole", *ONE_PASS))
    assert ((patches != 0) == (whole != 0)).all()
    assert (patches != whole).any()  # norms took their statistics from patches


# ----- made once -----------------------------------------------------------------------------------------------------


def test_what_is_there_is_skipped_and_made_anew_when_something_changed(
    run_dir: Path, scans_of_a: Path, tmp_path: Path, capsys
):
    def said(*overrides: str) -> list[str]:
        made(run_dir, scans_of_a, tmp_path / "out", *ONE_PASS, *overrides)
        return capsys.readouterr().out.splitlines()

    first = said()
    assert first[0] == f"rsnet-t2 ({run_dir}): t1, t1ce, flair -> t2"
    assert first[1].startswith(f"{A}: found t1, t1ce, flair; made t2 in ")
    assert first[2] == f"1 made, 0 skipped, 0 left out: {tmp_path}/out"
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / A).iterdir()}
    assert len(times) == 2
    assert said()[1:] == [
        f"{A}: skipped, made before from the same scans and checkpoint",
        f"0 made, 1 skipped, 0 left out: {tmp_path}/out",
    ]
    assert {path: path.stat().st_mtime_ns for path in times} == times
    (scans_of_a / A / f"{A}_t2.nii.gz").unlink()  # which is no input
    assert "skipped" in said()[1]

    (scans_of_a / A / f"{A}_t1.nii.gz").touch()
    assert "made t2 anew (scans changed) in" in said()[1]
    described(run_dir, intensity_scale={"t2": [0.0, 1.0]})
    assert "made t2 anew (checkpoint changed) in" in said()[1]
    assert "made t2 anew (mc_samples changed) in" in said("mc_samples=2")[1]
    (tmp_path / "out" / A / f"{A}_t2_variance.nii.gz").unlink()
    assert f"made t2 anew ({A}_t2_variance.nii.gz gone) in" in said("mc_samples=2")[1]
    moved = shutil.move(run_dir, tmp_path / "moved")
    shutil.copytree(moved, run_dir)
    assert "skipped" in said("mc_samples=2")[1]


def test_two_targets_lie_beside_one_another(rsnet_run: Path, run_dir: Path, scans_of_a: Path, tmp_path: Path):
    """Their names differ, so that neither run takes the other's files for its own."""
    content = torch.load(run_dir / "checkpoints" / "best.ckpt", weights_only=True)
    content[KEY]["model"]["target"] = "t1"
    torch.save(content, run_dir / "checkpoints" / "best.ckpt")
    output = made(rsnet_run, scans_of_a, tmp_path / "out", *ONE_PASS)
    made(run_dir, scans_of_a, output, *ONE_PASS)
    assert {path.name for path in (output / A).iterdir()} == {
        f"{A}_{target}{rest}" for target in ("t1", "t2") for rest in (".json", "_synthetic.nii.gz")
    }


def test_a_full_disk_ends_it_and_leaves_nothing(
    mrgen: Script, rsnet_run: Path, scans_of_a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mrgen.data.synthetic_files._write", full)
        called = mrgen("synthesize", f"checkpoint={rsnet_run}", f"input={scans_of_a}", "output=out", *ONE_PASS)
    assert called.code == 1
    assert "cannot be written (No space left on device)" in called.message
    assert not list((tmp_path / "out").rglob("*"))


def test_a_file_of_somebody_else_is_left_as_it_is(rsnet_run: Path, phantom_cohort: Path, tmp_path: Path, capsys):
    root, output = copied(phantom_cohort, tmp_path / "scans", A, B), tmp_path / "out"
    theirs = output / A / f"{A}_t2_synthetic.nii.gz"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("by hand")
    made(rsnet_run, root, output, *ONE_PASS, left_out=1)
    assert theirs.read_text() == "by hand"
    assert f"{A}: {theirs} is there, and mrgen-synthesize did not write it; move it away" in capsys.readouterr().out
    assert values(output, B).any()


def test_intensities_that_no_file_holds_are_refused_before_one_is_written(
    rsnet_run: Path, phantom_cohort: Path, tmp_path: Path
):
    """An offset of 1e300 is finite, and infinite in the file's single precision."""
    run = described(shutil.copytree(rsnet_run, tmp_path / "run"), intensity_scale={"t2": [1e300, 1.0]})
    with pytest.raises(UserError, match="beyond what a file holds"):
        made(run, copied(phantom_cohort, tmp_path / "scans", A), tmp_path / "out", *ONE_PASS)
    assert not list((tmp_path / "out").glob("**/*.nii.gz"))
