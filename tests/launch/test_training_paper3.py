"""Paper 3's four models through ``mrgen-train``: two optimizers, two stages, one split."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mrgen.errors import Preempted, UserError
from mrgen.files import read_metrics
from mrgen.launch.runs import load_run
from mrgen.launch.status import read_status
from mrgen.launch.training import train
from mrgen.papers.joint_imputation import JointImputation, OfflineImputation
from tests.launch.test_training import checkpoint, differences, resumed
from tests.launch.tools import CPU, composed, signalled

MODELS = ("joint", "offline", "unimodal", "upper_bound")
TINY = (
    *("data.sampling.size=[48,48]", "model.width=2", "trainer.max_epochs=2", "data.steps_per_epoch=2"),
    *("data.batch_size=4", "data.split.folds=3", "data.split.val=1", "trainer.log_every_n_steps=1", *CPU),
)


def trained(run_dir: Path, store: Path, model: str, *overrides: str) -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    preset = ("experiment=joint_imputation/cross_validation", f"model={model}", f"data.store='{store}'")
    return train(composed("train", *preset, *TINY, *overrides), run_dir)


@pytest.fixture(scope="module")
def runs(wmh_store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The four models, each trained for two epochs a stage. Read only."""
    folder = tmp_path_factory.mktemp("paper3")
    return {model: trained(folder / model, wmh_store, model) for model in MODELS}


def stopped_in(monkeypatch: pytest.MonkeyPatch, cls: type, *, epoch: int, batch: int) -> None:
    """The training step of this epoch and batch fails."""
    step = cls.training_step  # type: ignore[attr-defined]

    def failing(self: Any, data: Any, batch_idx: int) -> Any:
        if (self.current_epoch, batch_idx) == (epoch, batch):
            raise MemoryError("no 12 GiB left")
        return step(self, data, batch_idx)

    monkeypatch.setattr(cls, "training_step", failing)


# ----- what a run leaves -------------------------------------------------------------------------------------------

COLUMNS = {
    "joint": {"train/segmenter", "train/reconstruction", "train/segmentation", "val/reconstruction", "lr-Adam-1"},
    "offline": {"train/segmenter", "train/reconstruction", "val/reconstruction", "lr-Adam-1"},
    "unimodal": set(),
    "upper_bound": set(),
}


@pytest.mark.parametrize("model", MODELS)
def test_the_metrics_have_a_row_for_every_batch_and_the_losses_of_every_player(runs: dict[str, Path], model: str):
    """Lightning counts two steps a batch of the joint training; rows count batches."""
    rows = read_metrics(runs[model] / "metrics.csv")
    common = {"epoch", "step", "lr-Adam", "train/loss_step", "train/loss_epoch", "val/loss", "val/dice"}
    assert set(rows[0]) == common | {"val/segmentation"} | COLUMNS[model]
    epochs = 4 if model == "offline" else 2  # trainer.max_epochs of each stage
    assert [(int(row["epoch"]), int(row["step"])) for row in rows] == [(i // 2, i) for i in range(2 * epochs)]
    assert all(float(row["train/loss_step"]) > 0 for row in rows)
    for epoch, row in enumerate(rows[1::2]):
        first = model == "offline" and epoch < 2  # trains G alone
        assert float(row["val/loss"]) > 2 if first else 0 <= float(row["val/loss"]) < 1.1
        assert row["val/dice"] == "" if first else 0 <= float(row["val/dice"]) <= 1
        if model == "offline":
            assert (row["train/reconstruction"] == "", row["train/segmenter"] == "") == (not first, first)
    saved = checkpoint(runs[model])
    assert saved["epoch"] == epochs - 1
    assert saved["global_step"] == (8 if model == "joint" else 2 * epochs if model == "offline" else 4)
    assert read_status(runs[model])["state"] == "finished"


def test_the_best_checkpoint_of_offline_synthesis_is_of_its_second_stage(runs: dict[str, Path]):
    best = checkpoint(runs["offline"], "best")
    assert best["epoch"] >= 2
    assert int(best["state_dict"]["stage"]) == 1
    load_run(runs["offline"]).model.check_trained()


def test_the_imputer_of_offline_synthesis_is_the_same_in_all_of_its_second_stage(runs: dict[str, Path]):
    weights = [checkpoint(runs["offline"], name)["state_dict"] for name in ("best", "last")]
    imputers = [{k: v for k, v in part.items() if k.startswith("imputer.")} for part in weights]
    assert differences(*imputers) == []
    rows = [row for row in read_metrics(runs["offline"] / "metrics.csv") if row["val/reconstruction"]]
    assert rows[2]["val/reconstruction"] == rows[3]["val/reconstruction"]


def test_all_models_share_a_folds_split_and_folds_test_each_subject_once(
    runs: dict[str, Path], wmh_store: Path, tmp_path: Path
):
    splits = {model: json.loads((run / "split.json").read_text()) for model, run in runs.items()}
    assert all(split == splits["joint"] for split in splits.values())
    assert [len(splits["joint"][part]) for part in ("train", "val", "test")] == [3, 1, 2]
    tested = list(splits["joint"]["test"])
    for fold in (1, 2):
        run = trained(tmp_path / f"{fold}", wmh_store, "unimodal", f"fold={fold}", "trainer.max_epochs=1")
        tested += json.loads((run / "split.json").read_text())["test"]
    assert len(tested) == len(set(tested)) == 6


def test_a_run_knows_its_slices(runs: dict[str, Path]):
    run = load_run(runs["joint"])
    assert run.tile == [0, 0, 1]
    assert run.slices is not None
    assert run.slices.size == (48, 48)
    box = run.view(((5, 30), (5, 40), (2, 25)), (32, 50, 30), "GE3T")
    assert box == ((-8, 40), (0, 48), (0, 30))  # whatever the brain's; both rows of the surplus are cut in front


# ----- stopped and resumed -----------------------------------------------------------------------------------------


def assert_same_run(a: Path, b: Path) -> None:
    """Both checkpoints and the metrics, bit for bit."""
    for name in ("last", "best"):
        one, other = checkpoint(a, name), checkpoint(b, name)
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "loops", "epoch", "global_step"):
            assert differences(one[part], other[part], f"{name}/{part}") == []
    for name in ("metrics.csv", "split.json"):
        assert (a / name).read_text() == (b / name).read_text()


def test_a_joint_run_that_stopped_goes_on_to_the_same_weights_and_rows(
    runs: dict[str, Path], wmh_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last_words: list[Callable]
):
    with monkeypatch.context() as patch:
        stopped_in(patch, JointImputation, epoch=1, batch=1)
        with pytest.raises(MemoryError):
            trained(tmp_path / "run", wmh_store, "joint")
    assert checkpoint(tmp_path / "run")["epoch"] == 0
    resumed(tmp_path / "run")
    assert_same_run(tmp_path / "run", runs["joint"])


@pytest.mark.parametrize(
    ("epoch", "batch"),
    [(1, 1), (2, 0), (3, 1)],
    ids=["in the first stage", "between the stages", "in the second stage"],
)
def test_offline_synthesis_that_stopped_goes_on_to_the_same_weights_and_rows(
    runs: dict[str, Path],
    wmh_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    last_words: list[Callable],
    epoch: int,
    batch: int,
):
    with monkeypatch.context() as patch:
        stopped_in(patch, OfflineImputation, epoch=epoch, batch=batch)
        with pytest.raises(MemoryError):
            trained(tmp_path / "run", wmh_store, "offline")
    assert (checkpoint(tmp_path / "run")["epoch"], checkpoint(tmp_path / "run")["state_dict"]["stage"]) == (
        epoch - 1,
        epoch == 3,
    )
    if epoch < 3:
        with pytest.raises(UserError, match="stopped in its first stage"):
            load_run(tmp_path / "run").model.check_trained()
    resumed(tmp_path / "run")
    assert_same_run(tmp_path / "run", runs["offline"])


@pytest.mark.parametrize(("model", "kind", "epoch"), [("joint", JointImputation, 1), ("offline", OfflineImputation, 2)])
def test_a_run_that_was_told_to_end_in_the_middle_of_an_epoch_goes_on_there(
    runs: dict[str, Path],
    wmh_store: Path,
    tmp_path: Path,
    last_words: list[Callable],
    model: str,
    kind: type,
    epoch: int,
):
    """Two players; and two stages, in the first epoch of the second of them, which has got its imputer."""
    with signalled(kind, epoch=epoch, batch=0), pytest.raises(Preempted, match=f"before batch 1 of epoch {epoch}"):
        trained(tmp_path / "run", wmh_store, model)
    resumed(tmp_path / "run")
    assert_same_run(tmp_path / "run", runs[model])


@pytest.mark.parametrize("stopped", [None, (1, 1), (2, 0)])
def test_the_second_stage_gets_the_imputer_of_least_validation_error(
    wmh_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last_words: list[Callable], stopped: Any
):
    """Errors 0.1 and 0.2: C learns from the G of the first epoch, also in a run that was stopped after it."""
    imputers: dict[int, dict[str, torch.Tensor]] = {}

    def given(self: OfflineImputation, batch: Any, batch_idx: int) -> None:
        imputers[self.current_epoch] = {k: v.clone() for k, v in self.imputer.state_dict().items()}
        error = (0.1, 0.2, 0.1, 0.1)[self.current_epoch]
        loss = 1 + error if self.stage == 0 else 0.5
        self.val_means.add({"loss": loss, "reconstruction": error, "dice": 0.5, "segmentation": 0.5})

    monkeypatch.setattr(OfflineImputation, "validation_step", given)
    if stopped:
        with monkeypatch.context() as patch:
            stopped_in(patch, OfflineImputation, epoch=stopped[0], batch=stopped[1])
            with pytest.raises(MemoryError):
                trained(tmp_path / "run", wmh_store, "offline")
        resumed(tmp_path / "run")
    else:
        trained(tmp_path / "run", wmh_store, "offline")
    assert differences(imputers[1], imputers[0]) != []
    assert differences(imputers[2], imputers[0]) == []
    assert differences(imputers[3], imputers[0]) == []


# ----- what can be wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["joint", "offline"])
def test_another_scale_is_refused(wmh_store: Path, tmp_path: Path, model: str):
    other = (
        *("data.normalisation._target_=mrgen.data.normalisation.ZScore", "~data.normalisation.thresholds"),
        *("~data.normalisation.size", "~data.normalisation.whole_slices"),
    )
    message = (
        r"Imputation works on the scale 'gaussian' and data\.normalisation gives 'zscore'; "
        r"set data\.normalisation\._target_=mrgen\.data\.normalisation\.Gaussian"
    )
    with pytest.raises(UserError, match=message):
        trained(tmp_path / "run", wmh_store, model, *other)


def test_a_fold_that_there_is_not_is_refused(wmh_store: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"fold must be from 0 to 2 with 3 folds; found 3"):
        trained(tmp_path / "run", wmh_store, "joint", "fold=3")


def test_a_cohort_without_one_of_the_sites_is_refused(wmh_store: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"none of Philips_VU\. Unpack and prepare them"):
        trained(tmp_path / "run", wmh_store, "joint", "data.split.sites=[Utrecht,Philips_VU]")


def test_slices_that_would_cut_the_brain_are_refused(wmh_store: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"data\.sampling\.size=\[24, 24\], lose \d+% of the brain"):
        trained(tmp_path / "run", wmh_store, "joint", "data.sampling.size=[24,24]")


def test_stages_need_a_number_of_epochs(wmh_store: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"trainer\.max_epochs is -1; offline trains in 2 stages"):
        trained(tmp_path / "run", wmh_store, "offline", "trainer.max_epochs=-1")
