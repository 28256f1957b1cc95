"""A run folder, and what stopping and going on does to it: nothing."""

import csv
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from mrgen.data.layouts import Layout
from mrgen.data.splits import Split
from mrgen.data.store import Store
from mrgen.errors import Preempted, UserError
from mrgen.files import read_metrics, write_json
from mrgen.launch.runs import load_run
from mrgen.launch.status import read_status
from mrgen.launch.trainer import choose_precision
from mrgen.launch.training import build_datamodule, fill_from_store, train
from mrgen.papers.rsnet import RSNet
from tests.launch.tools import TINY, Called, composed, signalled, tiny_run

# Everything that draws random numbers or keeps state between steps: dropout, augmentation, shuffling over the borders
# of epochs, Adam, a learning rate that falls every epoch, class weights that fall every epoch.
STATEFUL = (
    "data.batch_size=2",
    "data.steps_per_epoch=4",
    "augmentation=light",
    "model.dropout=0.2",
    "model.lr_step=1",
    "model.lr_gamma=0.5",
    "model.class_weight_decay=0.9",
    "trainer.log_every_n_steps=1",
    "seed=3",
)


def checkpoint(run_dir: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(run_dir / "checkpoints" / f"{name}.ckpt", map_location="cpu", weights_only=True)


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two nested containers differ by a single bit."""
    if type(a) is not type(b):
        return [f"{where}: {type(a).__name__} and {type(b).__name__}"]
    if isinstance(a, dict):
        found = [f"{where}: keys {sorted(map(str, a.keys() ^ b.keys()))}"] if a.keys() != b.keys() else []
        return found + [line for key in a.keys() & b.keys() for line in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list | tuple):
        found = [f"{where}: lengths {len(a)} and {len(b)}"] if len(a) != len(b) else []
        return found + [
            line for i, pair in enumerate(zip(a, b, strict=False)) for line in differences(*pair, f"{where}/{i}")
        ]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [where]


def moved(node: Any, folder: Path) -> Any:
    """The same with the run's folder called RUN, the only thing in which two equal runs may differ."""
    if isinstance(node, dict):
        return {moved(key, folder): moved(value, folder) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(moved(value, folder) for value in node)
    return node.replace(str(folder), "RUN") if isinstance(node, str) else node


def assert_same_run(a: Path, b: Path) -> None:
    """Weights, optimizer, schedules, loop counters, best scores and metrics, bit for bit."""
    for name in ("last", "best"):
        assert differences(moved(checkpoint(a, name), a), moved(checkpoint(b, name), b), name) == []
    assert (a / "metrics.csv").read_text() == (b / "metrics.csv").read_text()
    assert (a / "split.json").read_text() == (b / "split.json").read_text()


@pytest.fixture(scope="module")
def uninterrupted(phantom_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs at one go."""
    return tiny_run(tmp_path_factory.mktemp("whole") / "run", phantom_store, *STATEFUL, "trainer.max_epochs=2")


# ----- the run folder ----------------------------------------------------------------------------------------------


def test_a_run_folder_holds_all_that_a_run_was(uninterrupted: Path, phantom_store: Path):
    assert {path.name for path in uninterrupted.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "environment.json",
        "metrics.csv",
        "split.json",
        "status.json",
    }
    assert {path.name for path in (uninterrupted / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert read_status(uninterrupted)["state"] == "finished"
    config = (uninterrupted / "config.yaml").read_text()
    assert "${" not in config
    assert "dropout: 0.2" in config
    assert "clipped" not in config
    split = Split.load(uninterrupted / "split.json")
    assert [len(part) for part in (split.train, split.val, split.test)] == [5, 1, 2]
    environment = json.loads((uninterrupted / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__


def test_regions_are_numbered_for_the_labels_that_are_trained_on(tmp_path: Path, phantom_store: Path):
    """What a run keeps in its config is read again as it was, by a resumed run and by an evaluation."""
    for labels, enhancing in (("native", 4), ("regions", 3)):
        conf = composed("train", "experiment=rsnet/rsnet", f"data.store='{phantom_store}'", f"data.labels={labels}")
        fill_from_store(conf)
        assert {name: len(conf.model.regions[name]) for name in ("ET", "WT", "TC")} == {"ET": 1, "WT": 3, "TC": 2}
        assert list(conf.model.regions.ET) == [enhancing]
        assert len(conf.model.classes) == enhancing + 1
        OmegaConf.save(conf, tmp_path / "config.yaml", resolve=False)
        saved = OmegaConf.load(tmp_path / "config.yaml")
        fill_from_store(saved)
        assert saved.data == conf.data
        layout = Layout.from_conf(saved.data.layout)
        assert layout.numbered("regions") == Store(phantom_store).layout
        assert build_datamodule(saved.data).regions == layout.regions


def test_metrics_have_every_step_and_every_epoch(uninterrupted: Path):
    rows = read_metrics(uninterrupted / "metrics.csv")
    assert [(int(row["epoch"]), int(row["step"])) for row in rows] == [(step // 4, step) for step in range(8)]
    assert all(float(row["train/loss_step"]) > 0 for row in rows)
    for row in rows[3::4]:
        for column in ("train/loss_epoch", "train/synthesis", "train/segmentation", "val/loss", "val/dice_WT"):
            assert row[column] != ""
    rates = [float(row["lr-Adam"]) for row in rows if row["lr-Adam"]]
    assert rates == pytest.approx([2e-4, 1e-4])


def test_best_is_the_epoch_of_least_validation_loss(uninterrupted: Path):
    losses = [float(row["val/loss"]) for row in read_metrics(uninterrupted / "metrics.csv") if row["val/loss"]]
    assert checkpoint(uninterrupted, "best")["epoch"] == losses.index(min(losses))
    assert checkpoint(uninterrupted, "last")["epoch"] == 1


def test_without_validation_subjects_there_is_only_a_last_checkpoint(tmp_path: Path, phantom_store: Path):
    run_dir = tiny_run(tmp_path / "run", phantom_store, "data.split.val=0")
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["last.ckpt"]
    (row,) = [row for row in read_metrics(run_dir / "metrics.csv") if row["train/loss_epoch"]]
    assert "val/loss" not in row


def test_runs_of_another_seed_differ(uninterrupted: Path, tmp_path: Path, phantom_store: Path):
    """What the tests of resuming compare with can tell runs apart."""
    other = tiny_run(tmp_path / "other", phantom_store, *STATEFUL, "trainer.max_epochs=2", "seed=4")
    assert differences(checkpoint(other)["state_dict"], checkpoint(uninterrupted)["state_dict"])
    assert (other / "metrics.csv").read_text() != (uninterrupted / "metrics.csv").read_text()


# ----- failing -----------------------------------------------------------------------------------------------------


def stopped_in(monkeypatch: pytest.MonkeyPatch, *, epoch: int, batch: int, error: BaseException) -> None:
    """The training step of this epoch and batch raises."""
    step = RSNet.training_step

    def failing(self: RSNet, data: Any, batch_idx: int) -> Any:
        if (self.current_epoch, batch_idx) == (epoch, batch):
            raise error
        return step(self, data, batch_idx)

    monkeypatch.setattr(RSNet, "training_step", failing)


def resumed(run_dir: Path, *overrides: str) -> Path:
    """What ``mrgen-train resume=FOLDER`` trains, in this process."""
    from omegaconf import OmegaConf

    conf = OmegaConf.load(run_dir / "config.yaml")
    return train(OmegaConf.merge(conf, {"resume": str(run_dir)}, OmegaConf.from_dotlist([*overrides])), run_dir)


def test_a_failed_run_says_why_and_goes_on_as_if_nothing_had_happened(
    uninterrupted: Path, tmp_path: Path, phantom_store: Path, monkeypatch, last_words: list[Callable], capsys
):
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        stopped_in(patch, epoch=1, batch=2, error=MemoryError("no 12 GiB left"))
        with pytest.raises(MemoryError):
            tiny_run(run_dir, phantom_store, *STATEFUL, "trainer.max_epochs=2")
    status = read_status(run_dir)
    assert status["state"] == "failed"
    assert status["reason"].startswith("MemoryError: memory ran out (no 12 GiB left); in a training lower data.batch_")
    capsys.readouterr()
    last_words[-1]()
    assert capsys.readouterr().err == f"resume with: mrgen-train resume={run_dir}\n"
    assert checkpoint(run_dir)["epoch"] == 0

    resumed(run_dir)
    assert read_status(run_dir)["state"] == "finished"
    assert_same_run(run_dir, uninterrupted)


def test_ctrl_c_is_a_failure_that_can_be_resumed(
    uninterrupted: Path, tmp_path: Path, phantom_store: Path, monkeypatch, last_words: list[Callable]
):
    import signal

    handler = signal.getsignal(signal.SIGINT)
    run_dir = tmp_path / "run"
    try:
        with monkeypatch.context() as patch:
            stopped_in(patch, epoch=1, batch=0, error=KeyboardInterrupt())
            with pytest.raises(SystemExit) as end:
                tiny_run(run_dir, phantom_store, *STATEFUL, "trainer.max_epochs=2")
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores further ones
    assert end.value.code == 1
    assert (read_status(run_dir)["state"], read_status(run_dir)["reason"]) == ("failed", "interrupted")
    assert len(last_words) == 1
    resumed(run_dir)
    assert_same_run(run_dir, uninterrupted)


def test_a_run_that_stopped_after_an_epoch_goes_on_to_the_same_weights(
    uninterrupted: Path, tmp_path: Path, phantom_store: Path
):
    run_dir = tiny_run(tmp_path / "run", phantom_store, *STATEFUL, "trainer.max_epochs=1")
    resumed(run_dir, "trainer.max_epochs=2")
    assert_same_run(run_dir, uninterrupted)


def test_a_finished_run_resumed_stays_as_it_is(uninterrupted: Path, tmp_path: Path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    before = checkpoint(tmp_path / "run")
    resumed(tmp_path / "run")
    assert differences(checkpoint(tmp_path / "run"), before) == []
    assert (tmp_path / "run" / "metrics.csv").read_text() == (uninterrupted / "metrics.csv").read_text()


def test_a_run_that_was_told_to_end_in_the_middle_of_an_epoch_goes_on_there(
    uninterrupted: Path, tmp_path: Path, phantom_store: Path, last_words: list[Callable], capsys
):
    run_dir = tmp_path / "run"
    with signalled(RSNet, epoch=1, batch=1), pytest.raises(Preempted) as end:
        tiny_run(run_dir, phantom_store, *STATEFUL, "trainer.max_epochs=2")
    assert end.value.code == 143
    status = read_status(run_dir)
    assert (status["state"], status["reason"]) == ("preempted", "SIGUSR1, before batch 2 of epoch 1")
    assert checkpoint(run_dir, "resume")["global_step"] == 6
    assert load_run(run_dir).checkpoint.name in ("best.ckpt", "last.ckpt")
    capsys.readouterr()
    last_words[-1]()
    assert capsys.readouterr().err == f"resume with: mrgen-train resume={run_dir}\n"

    with counted_steps(RSNet) as steps:
        resumed(run_dir)
    assert steps == [(1, 2), (1, 3)]
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert read_status(run_dir)["state"] == "finished"
    assert_same_run(run_dir, uninterrupted)


@contextmanager
def counted_steps(kind: type) -> Iterator[list[tuple[int, int]]]:
    """Epoch and batch of every training step."""
    seen: list[tuple[int, int]] = []
    step = kind.training_step  # type: ignore[attr-defined]

    def noted(self: Any, batch: Any, batch_idx: int) -> Any:
        seen.append((self.current_epoch, batch_idx))
        return step(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "training_step", noted)
        yield seen


def test_a_run_that_is_killed_while_it_saves_keeps_the_checkpoint_of_before(
    uninterrupted: Path, tmp_path: Path, phantom_store: Path
):
    run_dir = tmp_path / "run"
    kill = """
import io, os, signal, sys, torch, mrgen.launch.checkpoints, mrgen.train
save, saved = torch.save, []
def killed(content, file):
    saved.append(os.readlink(f"/proc/self/fd/{file.fileno()}"))
    if sum("last.ckpt" in name for name in saved) < 2:
        return save(content, file)
    whole = io.BytesIO()
    save(content, whole)
    file.write(whole.getvalue()[: whole.tell() // 2])
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
mrgen.launch.checkpoints.torch.save = killed
mrgen.train.main()
"""
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    arguments = ["experiment=rsnet/rsnet", *TINY, *STATEFUL, "trainer.max_epochs=2", f"data.store={phantom_store}"]
    done = subprocess.run(
        [sys.executable, "-c", kill, *arguments, f"hydra.run.dir={run_dir}"], env=env, capture_output=True, text=True
    )
    assert done.returncode == -9, done.stderr
    (half,) = (path for path in (run_dir / "checkpoints").iterdir() if path.name.startswith("."))
    assert re.fullmatch(r"\.last\.ckpt\.[0-9a-f]+", half.name)
    assert checkpoint(run_dir)["epoch"] == 0
    resumed(run_dir)
    assert not half.exists()
    assert_same_run(run_dir, uninterrupted)


def test_a_killed_run_goes_on_to_the_weights_of_an_uninterrupted_one(
    uninterrupted: Path, tmp_path: Path, phantom_store: Path
):
    """Two real processes: one killed by SIGKILL in the middle of its second epoch, one that resumes it."""
    run_dir = tmp_path / "run"
    kill = """
import os, signal, mrgen.train
from mrgen.papers.rsnet import RSNet
step = RSNet.training_step
def killed(self, batch, batch_idx):
    if (self.current_epoch, batch_idx) == (1, 2):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, batch_idx)
RSNet.training_step = killed
mrgen.train.main()
"""
    # As many threads as here: sums are split among them.
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    arguments = ["experiment=rsnet/rsnet", *TINY, *STATEFUL, "trainer.max_epochs=2", f"data.store={phantom_store}"]
    done = subprocess.run(
        [sys.executable, "-c", kill, *arguments, f"hydra.run.dir={run_dir}"], env=env, capture_output=True, text=True
    )
    assert done.returncode == -9, done.stderr
    assert read_status(run_dir)["state"] == "running"  # nobody was left to say otherwise
    assert checkpoint(run_dir)["epoch"] == 0
    assert int(read_metrics(run_dir / "metrics.csv")[-1]["step"]) == 5  # two steps beyond the checkpoint

    script = Path(sys.executable).with_name("mrgen-train")
    done = subprocess.run([script, f"resume={run_dir}"], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "epoch 2/2" in done.stdout
    assert "epoch 1/2" not in done.stdout
    assert read_status(run_dir)["state"] == "finished"
    assert_same_run(run_dir, uninterrupted)


class Killed(BaseException):
    """Nobody expects it."""


def test_a_sweep_that_ended_in_its_second_job_goes_on_there(
    mrgen: Callable[..., Called], uninterrupted: Path, tmp_path: Path, phantom_store: Path, last_words: list[Callable]
):
    sweep, steps, step = tmp_path / "sweep", [], RSNet.training_step

    def killed(self: RSNet, data: Any, batch_idx: int) -> Any:
        steps.append((self.current_epoch, batch_idx))
        if len(steps) == 15:  # the second job's in its second epoch
            raise Killed
        return step(self, data, batch_idx)

    arguments = ("experiment=rsnet/rsnet", *TINY, *STATEFUL, "trainer.max_epochs=2", f"data.store={phantom_store}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RSNet, "training_step", killed)
        with pytest.raises(Killed):
            mrgen("train", "-m", *arguments, "seed=4,3", f"hydra.sweep.dir={sweep}")
    first, second = sweep / "0_rsnet-t2", sweep / "1_rsnet-t2"
    gone = {"state": "running", "pid": 2**22 + 1}  # as after a kill -9
    write_json(second / "status.json", read_status(second) | gone)
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file() and ".hydra" not in path.parts}
    with counted_steps(RSNet) as again:
        called = mrgen("train", f"resume={sweep}")
    assert called.code == 0, called.err
    assert again == [(1, batch) for batch in range(4)]
    assert {path: path.read_bytes() for path in before} == before
    assert_same_run(second, uninterrupted)


@pytest.mark.slow
def test_a_run_that_is_killed_whenever_it_happens_goes_on(uninterrupted: Path, tmp_path: Path, phantom_store: Path):
    """At random moments, of the start, a step, a validation or the end, until it has finished all the same."""
    run_dir = tmp_path / "run"
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    script = str(Path(sys.executable).with_name("mrgen-train"))
    preset = ["experiment=rsnet/rsnet", *TINY, *STATEFUL, "trainer.max_epochs=2", f"data.store={phantom_store}"]
    whole = [script, *preset, f"hydra.run.dir={tmp_path / 'timed'}"]
    began = time.monotonic()
    subprocess.run(whole, env=env, capture_output=True, check=True)
    lasts = time.monotonic() - began
    moments = random.Random(0)
    for kills in range(40):
        begun = (run_dir / "config.yaml").is_file()
        command = [script, f"resume={run_dir}"] if begun else [script, *preset, f"hydra.run.dir={run_dir}"]
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            said = process.communicate(timeout=moments.uniform(0.3, 1.1) * lasts)[1]
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            for name in ("last", "best"):
                if (run_dir / "checkpoints" / f"{name}.ckpt").is_file():
                    checkpoint(run_dir, name)
            if (run_dir / "split.json").is_file():
                Split.load(run_dir / "split.json")
            rows = read_metrics(run_dir / "metrics.csv")
            assert all(None not in row and None not in row.values() for row in rows)
            continue
        assert process.returncode == 0, said
        if kills > 3:
            break
        shutil.rmtree(run_dir)  # it was too quick
    assert_same_run(run_dir, uninterrupted)
    assert not [path for path in run_dir.rglob(".*") if path.is_file()]


# ----- what a resumed run must know ---------------------------------------------------------------------------------


def test_the_best_checkpoint_survives_a_resume(tmp_path: Path, phantom_store: Path, monkeypatch: pytest.MonkeyPatch):
    """Losses 3, 1, 2: the run resumed after the second epoch must know of the 1, or the 2 would take its place."""
    losses = [3.0, 1.0, 2.0]

    def given(self: RSNet, batch: Any, batch_idx: int) -> None:
        self.val_means.add({"loss": losses[self.current_epoch]})

    monkeypatch.setattr(RSNet, "validation_step", given)
    run_dir = tiny_run(tmp_path / "run", phantom_store, "trainer.max_epochs=2")
    shutil.copytree(run_dir, tmp_path / "copy")
    resumed(run_dir, "trainer.max_epochs=3")
    assert checkpoint(run_dir, "last")["epoch"] == 2
    assert checkpoint(run_dir, "best")["epoch"] == 1
    run_dir = resumed(tmp_path / "copy", "trainer.max_epochs=3")  # moved, or reached through a link
    assert checkpoint(run_dir, "last")["epoch"] == 2
    assert checkpoint(run_dir, "best")["epoch"] == 1


def test_a_resumed_run_keeps_its_split_although_the_store_has_grown(tmp_path: Path, phantom_store: Path):
    """Dealt out anew, a test subject could become one that is trained on."""
    store = tmp_path / "store"
    shutil.copytree(phantom_store, store)
    late = sorted(path.name for path in store.iterdir() if path.is_dir())[:2]
    for name in late:
        (store / name).rename(tmp_path / name)
    run_dir = tiny_run(tmp_path / "run", store)
    before = Split.load(run_dir / "split.json")
    for name in late:
        (tmp_path / name).rename(store / name)
    resumed(run_dir, "trainer.max_epochs=2")
    assert Split.load(run_dir / "split.json") == before
    fresh = tiny_run(tmp_path / "fresh", store)
    assert Split.load(fresh / "split.json") != before


@pytest.mark.parametrize(
    "damaged",
    [
        lambda whole: b"",
        lambda whole: b"no checkpoint",
        lambda whole: whole[:5000],
        lambda whole: whole[: len(whole) // 2] + 256 * b"x" + whole[len(whole) // 2 + 256 :],  # which torch loads
    ],
    ids=["empty", "other", "truncated", "overwritten"],
)
def test_a_last_checkpoint_that_cannot_be_read_is_one_sentence(
    rsnet_run: Path, tmp_path: Path, damaged: Callable[[bytes], bytes]
):
    shutil.copytree(rsnet_run, tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    last.write_bytes(damaged(last.read_bytes()))
    with pytest.raises(UserError, match=r"last.ckpt: cannot be read as a checkpoint of mrgen .*; put back"):
        resumed(tmp_path / "run", "trainer.max_epochs=2")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda c: c.update(optimizer_states=[]), "other optimizers"),
        (lambda c: c.update(optimizer_states=[{}]), "other optimizers"),
        (lambda c: c["optimizer_states"][0]["param_groups"][0].update(lr="x"), "other optimizers"),
        (lambda c: c["optimizer_states"][0]["state"][0].update(exp_avg=torch.zeros(7)), "does not fit its weights"),
        (lambda c: c["optimizer_states"][0]["state"][0].pop("exp_avg"), "does not fit its weights"),
        (lambda c: c.update(lr_schedulers=[]), "other schedules"),
        (lambda c: c["lr_schedulers"][0].update(last_epoch="x"), "other schedules"),
        (lambda c: c.update(callbacks={}), "no state of Checkpoint"),
        (lambda c: c["callbacks"].update({next(iter(c["callbacks"])): [1]}), "no state of a training"),
        (lambda c: c["callbacks"].update({next(iter(c["callbacks"])): {"x": 1}}), "cannot be restored .KeyError"),
        (lambda c: c.pop("pytorch-lightning_version"), "no state of a training"),
        (lambda c: c.update({"pytorch-lightning_version": None}), "no state of a training"),
        (lambda c: c.update({"pytorch-lightning_version": "x"}), "cannot be restored .InvalidVersion"),
        (lambda c: c["loops"]["fit_loop"].update({"epoch_loop.batch_progress": 3}), "no state of a training"),
        (lambda c: c["loops"]["fit_loop"].update({"epoch_loop.batch_progress": {}}), "cannot be restored"),
        (lambda c: c["loops"]["fit_loop"]["epoch_loop.state_dict"].update(_batches_that_stepped=-7), "no state of a"),
        (lambda c: c.update(epoch=True), "no state of a training"),
    ],
)
def test_a_last_checkpoint_of_which_a_part_is_another_is_one_sentence(
    rsnet_run: Path, tmp_path: Path, spoil: Callable[[dict[str, Any]], Any], said: str
):
    """Whole as a file, and not what a training can go on from: nothing of its state is started anew in silence."""
    shutil.copytree(rsnet_run, tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    spoil(content)
    torch.save(content, last)
    with pytest.raises(UserError, match=rf"last\.ckpt: found .*{said}.*; put back"):
        resumed(tmp_path / "run", "trainer.max_epochs=2")


def test_a_learning_rate_beyond_what_an_optimizer_can_count_with_is_one_sentence(tmp_path: Path, phantom_store: Path):
    """1e38 is a number of single precision, and Adam's first step of it, ten times as long, is none."""
    with pytest.raises(UserError, match=r"the learning rate is 1e\+38; expected .*lower model\.lr"):
        tiny_run(tmp_path / "run", phantom_store, "trainer.max_epochs=1", "model.lr=1e38")


def test_other_ranks_leave_the_status_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mrgen.launch.training.rank_zero_only.rank", 1)
    with pytest.raises(UserError, match="run mrgen-prepare"):
        tiny_run(tmp_path / "run", tmp_path / "no store")
    assert read_status(tmp_path / "run") == {}


# ----- settings ----------------------------------------------------------------------------------------------------


def test_precision_is_taken_as_asked_and_chosen_by_the_device_otherwise(monkeypatch: pytest.MonkeyPatch):
    assert choose_precision("16-mixed", "cpu") == "16-mixed"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    assert choose_precision("auto", "gpu") == "32-true"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert choose_precision("auto", "auto") == "bf16-mixed"
    for native in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda native=native: native, raising=False)
        assert choose_precision("auto", "cpu") == ("bf16-mixed" if native else "32-true")


def test_a_trainer_key_that_lightning_does_not_have_is_named(tmp_path: Path, phantom_store: Path):
    with pytest.raises(UserError, match=r"Trainer has no max_epoch; valid keys: accelerator, strategy, devices"):
        tiny_run(tmp_path / "run", phantom_store, "+trainer.max_epoch=3")


def test_metrics_csv_is_a_plain_csv(uninterrupted: Path):
    with (uninterrupted / "metrics.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header[:2] == ["epoch", "step"]
    assert {len(row) for row in rows} == {len(header)}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("model.filters=4", "the run began with another config (model.filters: 2 there, 4 here)"),
        ("trainer.accelerator=gpu", "PyTorch found no GPU on this machine"),
        ("trainer.max_time=12h", "trainer.max_time is '12h'; expected DD:HH:MM:SS"),
        ("trainer.max_epochs=two", "trainer.max_epochs is two; expected a whole number"),
    ],
)
def test_a_resume_that_is_refused_leaves_the_run_as_it_was(
    mrgen: Callable[..., Called], rsnet_run: Path, tmp_path: Path, asked: str, said: str
):
    run_dir = shutil.copytree(rsnet_run, tmp_path / "copy")
    before = {name: (run_dir / name).read_text() for name in ("config.yaml", "status.json", "metrics.csv")}
    called = mrgen("train", f"resume={run_dir}", "trainer.max_epochs=2", asked)
    assert called.code == 1
    assert said in called.message
    assert {name: (run_dir / name).read_text() for name in before} == before
