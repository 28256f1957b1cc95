"""``mrgen-evaluate experiment=joint_imputation/tables``: folds and models in one table, and what is missing said."""

import csv
import shutil
from pathlib import Path

import pytest
import torch

from mrgen.data.splits import Split
from mrgen.data.store import Store
from mrgen.errors import UserError
from mrgen.files import write_json
from mrgen.launch.judging.cross_validating import cross_validate
from mrgen.launch.training import train
from tests.launch.tools import CPU, composed

TINY = (
    *("data.sampling.size=[48,48]", "data.batch_size=4", "data.steps_per_epoch=2", "data.split.folds=2"),
    *("data.split.val=1", "model.width=2", "trainer.max_epochs=1", *CPU),
)


def fold_of(folder: Path, store: Path, model: str, fold: int, *overrides: str) -> Path:
    folder.mkdir(parents=True)
    common = ("experiment=joint_imputation/cross_validation", f"data.store='{store}'", f"model={model}", f"fold={fold}")
    with_status = train(composed("train", *common, *TINY, *overrides), folder)
    return with_status


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, wmh_store: Path) -> Path:
    """Two folds of three models, as a sweep leaves them. Read only."""
    folder = tmp_path_factory.mktemp("sweep")
    for fold in (0, 1):
        for job, model in enumerate(("unimodal", "offline", "joint")):
            fold_of(folder / f"{3 * fold + job}_{model}", wmh_store, model, fold)
    return folder


def judged(out: Path, *overrides: str) -> Path:
    return cross_validate(
        composed("evaluate", "experiment=joint_imputation/tables", "trainer.accelerator=cpu", *overrides), out
    )


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_subject_is_tested_once_by_every_model(tmp_path: Path, sweep: Path, wmh_store: Path, capsys):
    out = judged(tmp_path / "out", f"sweep='{sweep}'", "smoke=true")
    found = rows(out / "subjects.csv")
    for model in ("unimodal", "offline", "joint"):
        assert sorted(row["subject"] for row in found if row["input"] == model) == sorted(Store(wmh_store).subjects)
    for row in found:
        split = Split.load(sweep / f"{3 * int(row['fold'])}_unimodal" / "split.json")
        assert row["subject"] in split.test
        assert row["subject"] not in split.train
    assert [(row["input"], row["n"]) for row in rows(out / "table.csv")] == [
        ("unimodal", "6"), ("offline", "6"), ("joint", "6")
    ]  # fmt: skip
    assert all(row["mae"] for row in found if row["input"] != "unimodal")
    text = (out / "table.md").read_text()
    assert text.startswith("### SMOKE RUN, not a result: cross-validation")
    assert "57.81 / 58.20 / 41.33" in text
    assert "MISSING" not in text
    assert str(sweep.parent) not in text  # no place on this machine
    for file in ("lesions.csv", "segmentation.png", "imputation.png", "places.png", "config.yaml"):
        assert (out / file).stat().st_size > 100
    assert "missing" not in capsys.readouterr().out


@pytest.mark.usefixtures("no_pictures")
def test_a_missing_fold_is_said_and_the_rest_printed(tmp_path: Path, sweep: Path, capsys):
    """One job never began, another failed: which, and why."""
    partial = tmp_path / "sweep"
    shutil.copytree(sweep, partial)
    shutil.rmtree(partial / "1_offline")
    write_json(partial / "5_joint" / "status.json", {"state": "failed", "reason": "OutOfMemoryError: 80 GiB"})
    out = judged(tmp_path / "out", f"sweep='{partial}'")
    said = capsys.readouterr().out
    assert "missing: offline, fold 0\n" in said
    assert "missing: joint, fold 1 (5_joint is failed: OutOfMemoryError: 80 GiB)" in said
    assert "MISSING: offline, fold 0." in (out / "table.md").read_text()
    assert [(row["input"], row["n"]) for row in rows(out / "table.csv")] == [
        ("unimodal", "6"), ("joint", "3"), ("offline", "3")
    ]  # fmt: skip


@pytest.mark.usefixtures("no_pictures")
def test_a_model_of_which_no_fold_is_there_is_missing_too(tmp_path: Path, sweep: Path, capsys):
    partial = tmp_path / "sweep"
    for run in ("0_unimodal", "3_unimodal", "1_offline"):
        shutil.copytree(sweep / run, partial / run)
    write_json(partial / "1_offline" / "status.json", {"state": "running"})
    judged(tmp_path / "out", f"sweep='{partial}'")
    assert "missing: offline, folds 0 (1_offline is running), 1\n" in capsys.readouterr().out


def test_one_run_alone_is_judged(tmp_path: Path, sweep: Path):
    """One fold of one model that imputes nothing: tables and figures without what is not there."""
    out = judged(tmp_path / "out", f"runs=['{sweep / '0_unimodal'}']")
    assert len(rows(out / "subjects.csv")) == 3
    assert not (out / "imputation.png").exists()
    assert (out / "segmentation.png").exists()


def test_two_cross_validations_of_one_name_are_refused(tmp_path: Path, sweep: Path, wmh_store: Path):
    other = fold_of(tmp_path / "other", wmh_store, "unimodal", 0, "data.split.seed=5")
    same = set(Split.load(other / "split.json").test) & set(Split.load(sweep / "0_unimodal" / "split.json").test)
    assert same  # of six subjects in two folds
    runs = ",".join(f"'{run}'" for run in (other, sweep / "0_unimodal", sweep / "3_unimodal"))
    with pytest.raises(UserError, match=r"unimodal would judge .* twice"):
        judged(tmp_path / "out", f"runs=[{runs}]")


def test_two_tasks_are_refused(tmp_path: Path, sweep: Path, wmh_store: Path):
    other = fold_of(tmp_path / "other", wmh_store, "unimodal", 1, "model.source=flair", "target=t1")
    with pytest.raises(UserError, match="the runs have several tasks: t1 from flair on "):
        judged(tmp_path / "out", f"runs=['{other}','{sweep / '0_unimodal'}']")


def test_other_kinds_of_runs_are_refused(tmp_path: Path, snet_run: Path):
    with pytest.raises(UserError, match="SegmenterModule, which finds no lesions in slices"):
        judged(tmp_path / "out", f"runs=['{snet_run}']")


def test_a_cross_validation_is_judged_on_its_own_folds(tmp_path: Path, sweep: Path):
    with pytest.raises(UserError, match="subjects is all; every run is judged on its own fold"):
        judged(tmp_path / "out", f"runs=['{sweep / '0_unimodal'}']", "subjects=all")


def test_a_subject_that_a_run_was_trained_on_is_refused(tmp_path: Path, sweep: Path):
    run = shutil.copytree(sweep / "0_unimodal", tmp_path / "run")
    split = Split.load(run / "split.json")
    Split(train=(*split.train, split.test[0]), val=split.val, test=split.test).save(run / "split.json")
    with pytest.raises(UserError, match=r"was trained on|stand in one set"):
        judged(tmp_path / "out", f"runs=['{run}']")


@pytest.mark.usefixtures("no_pictures")
def test_joint_imputation_stands_on_the_common_bench(tmp_path: Path, sweep: Path):
    """Its FLAIR is judged with all others' by experiment=t1_to_t2/swap."""
    from mrgen.launch.judging.evaluating import evaluate

    common = ("experiment=t1_to_t2/swap", f"runs=['{sweep / '2_joint'}']", "trainer.accelerator=cpu")
    found = rows(evaluate(composed("evaluate", *common), tmp_path / "out") / "subjects.csv")
    assert {row["input"] for row in found} == {"flair/joint"}
    assert all(0 <= float(row["own_mse_brain"]) <= 1 for row in found)


def test_a_run_that_stopped_in_its_first_stage_is_named_before_anything_is_judged(tmp_path: Path, sweep: Path):
    run = shutil.copytree(sweep / "1_offline", tmp_path / "early")
    saved = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    saved["state_dict"]["stage"].fill_(0)
    torch.save(saved, run / "checkpoints" / "best.ckpt")
    with pytest.raises(UserError, match=r"early: this run of offline synthesis stopped in its first stage"):
        judged(tmp_path / "out", f"runs=['{run}']")
