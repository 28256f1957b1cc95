"""Whether a run may go on in its folder, and from where."""

import errno
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf

from mrgen.callbacks.provenance import KEY
from mrgen.data.splits import Split
from mrgen.errors import UserError
from mrgen.files import read_metrics, write_json
from mrgen.launch import going_on, training
from mrgen.launch.going_on import SameStart, Saved, check_config, is_finished, newest, only_here
from mrgen.launch.status import is_alive, read_status
from mrgen.launch.sweeps import resuming
from mrgen.launch.training import fill_from_store, train
from mrgen.papers.rsnet import RSNet
from tests.launch.test_training import differences
from tests.launch.tools import TINY, Called, composed, signalled, tiny_run

Script = Callable[..., Called]


@pytest.fixture
def run_dir(rsnet_run: Path, tmp_path: Path) -> Path:
    """A finished run of one epoch."""
    return shutil.copytree(rsnet_run, tmp_path / "run")


def job(run_dir: Path, store: Path, *overrides: str) -> DictConfig:
    """The config of ``rsnet_run`` as a sweep composes it that is started again."""
    common = ("experiment=rsnet/rsnet", f"data.store='{store}'", "trainer.max_epochs=1", f"resume='{run_dir}'")
    return composed("train", *common, *TINY, *overrides)


# ----- finished ------------------------------------------------------------------------------------------------------


def test_a_finished_run_answers_at_once(run_dir: Path, phantom_store: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[Path] = []
    monkeypatch.setattr(training, "_train", lambda conf, run_dir, *_: asked.append(run_dir))
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    assert train(job(run_dir, phantom_store), run_dir) == run_dir
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    assert asked == []
    train(job(run_dir, phantom_store, "trainer.max_epochs=2"), run_dir)
    assert asked == [run_dir]


@pytest.mark.parametrize(
    ("overrides", "state", "finished"),
    [
        ((), "finished", True),
        ((), "failed", False),
        ((), "running", False),
        ((), "preempted", False),
        (("trainer.max_epochs=-1",), "finished", False),
        (("trainer.max_time=00:01:00:00",), "finished", False),
    ],
)
def test_more_epochs_or_another_time_go_on_with_a_finished_run(
    run_dir: Path, phantom_store: Path, overrides: tuple[str, ...], state: str, finished: bool
):
    write_json(run_dir / "status.json", {"state": state})
    assert is_finished(job(run_dir, phantom_store, *overrides), run_dir) is finished


# ----- another config ------------------------------------------------------------------------------------------------


def test_keys_that_differ_are_refused_with_both_values(run_dir: Path, phantom_store: Path):
    conf = job(
        run_dir, phantom_store, "seed=1", "model.filters=4", "trainer.devices=2", "+data.sampling.x=1", "monitor=null"
    )
    fill_from_store(conf)
    with pytest.raises(UserError) as error:
        check_config(conf, run_dir)
    told = str(error.value).partition("(")[2].partition(")")[0].split("; ")
    assert sorted(told) == [
        "data.sampling.x: absent there, 1 here",
        "data.seed: 0 there, 1 here",  # which follows it
        "model.filters: 2 there, 4 here",
        "monitor: val/loss there, null here",
        "seed: 0 there, 1 here",
        "trainer.devices: 1 there, 2 here",
    ]
    assert "leave these keys as they were, or train anew" in str(error.value)


def test_a_run_of_an_earlier_version_goes_on(run_dir: Path, phantom_store: Path):
    """Whose layout had no masks of one's own, and named no other collections."""
    saved = OmegaConf.load(run_dir / "config.yaml")
    for key in ("brain", "other_collections"):
        del saved.data.layout[key]
    del saved["trust"]
    OmegaConf.save(saved, run_dir / "config.yaml")
    conf = job(run_dir, phantom_store)
    fill_from_store(conf)
    check_config(conf, run_dir)


def test_what_changes_nothing_of_the_weights_may_differ(run_dir: Path, phantom_store: Path):
    free = (
        *("tracking=wandb", "tracking.project=other", "data.workers=1", "data.root=/elsewhere", "name=other"),
        *("trainer.max_epochs=9", "trainer.max_time=00:01:00:00", "trainer.log_every_n_steps=1", "plan=true"),
        *("trainer.accelerator=auto", "trainer.enable_progress_bar=false", "++launch.detach=true"),
        "++callbacks.images={seed: 3}",
    )
    conf = job(run_dir, phantom_store, *free)
    fill_from_store(conf)
    check_config(conf, run_dir)


def test_a_refused_run_stays_as_it_was(mrgen: Script, run_dir: Path):
    write_json(run_dir / "status.json", {"state": "preempted"})
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    called = mrgen("train", f"resume={run_dir}", "seed=5")
    assert called.code == 1
    assert "(seed: 0 there, 5 here)" in called.message
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_where_nothing_was_learned_yet_another_config_begins(
    tmp_path: Path, phantom_store: Path, monkeypatch: pytest.MonkeyPatch, last_words: list[Callable]
):
    """As one does whose first batch did not fit; nothing of the first attempt is left over."""
    run_dir = tmp_path / "run"

    def failing(self: RSNet, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1:
            raise MemoryError
        return step(self, batch, batch_idx)

    step = RSNet.training_step
    with monkeypatch.context() as patch:
        patch.setattr(RSNet, "training_step", failing)
        with pytest.raises(MemoryError):
            tiny_run(run_dir, phantom_store, "trainer.log_every_n_steps=1", "data.steps_per_epoch=3")
    assert [row["step"] for row in read_metrics(run_dir / "metrics.csv")] == ["0"]
    (run_dir / ".metrics.csv.123").write_text("half a li")
    other = ("data.steps_per_epoch=1", "seed=1", "data.split.val=0.5", f"resume='{run_dir}'")
    tiny_run(run_dir, phantom_store, "trainer.log_every_n_steps=5", *other)
    (row,) = read_metrics(run_dir / "metrics.csv")
    assert row["train/loss_epoch"] != ""
    assert "train/loss_step" not in row  # of the first attempt
    assert not (run_dir / ".metrics.csv.123").exists()
    assert len(Split.load(run_dir / "split.json").val) == 4
    assert read_status(run_dir)["state"] == "finished"


# ----- from where ----------------------------------------------------------------------------------------------------


def write_checkpoint(path: Path, steps: int) -> None:
    """Of a training that has just begun, as far as its content matters."""
    progress = {"current": {"processed": 0}}
    loops = {"fit_loop": {"epoch_loop.state_dict": {"_batches_that_stepped": steps}, "epoch_progress": progress}}
    lists: dict[str, Any] = {"optimizer_states": [], "lr_schedulers": [], "callbacks": {}, "state_dict": {}}
    data = {"modalities": ["t1"], "normalisation": {}}
    content = {
        "epoch": 0,
        "global_step": steps,
        "pytorch-lightning_version": pl.__version__,
        KEY: {"model": {"_target_": "mrgen.papers.rsnet.RSNet"}, "data": data},
        **lists,
    }
    path.parent.mkdir(exist_ok=True)
    torch.save({"loops": loops, "name": path.name, **content}, path)


@pytest.mark.parametrize(
    ("last", "resume", "name", "step"),
    [
        (8, None, "last.ckpt", 7),
        (None, 2, "resume.ckpt", 2),
        (8, 8, "resume.ckpt", 8),  # the first batch of the next epoch, whose step is not counted yet
        (8, 7, "last.ckpt", 7),  # saved in the validation behind the eighth, which was over before a kill
        (8, 5, "last.ckpt", 7),
    ],
)
def test_the_checkpoint_of_most_steps_is_taken(tmp_path: Path, last, resume, name: str, step: int):
    for file, steps in (("last", last), ("resume", resume)):
        if steps is not None:
            write_checkpoint(tmp_path / "checkpoints" / f"{file}.ckpt", steps)
    saved = newest(tmp_path)
    assert saved is not None
    assert (saved.path.name, saved.content["name"], saved.step) == (name, name, step)


def test_a_checkpoint_that_cannot_be_read_is_named(tmp_path: Path):
    write_checkpoint(tmp_path / "checkpoints" / "last.ckpt", 8)
    (tmp_path / "checkpoints" / "resume.ckpt").write_bytes(b"half")
    with pytest.raises(UserError, match=r"resume\.ckpt: cannot be read as a checkpoint of mrgen"):
        newest(tmp_path)


def test_ranks_that_found_different_checkpoints_do_not_train():
    strategy = SimpleNamespace(broadcast=lambda step: 7)
    trainer: Any = SimpleNamespace(strategy=strategy, global_rank=1)
    SameStart(7).setup(trainer, pl.LightningModule(), "fit")
    with pytest.raises(UserError, match=r"rank 1 found .* of step 3 and the first rank one of step 7.*start the run"):
        SameStart(3).setup(trainer, pl.LightningModule(), "fit")


def test_fewer_epochs_and_another_number_of_devices_are_refused(run_dir: Path):
    saved = newest(run_dir)
    assert isinstance(saved, Saved)
    for epochs in (1, 5, -1, None):
        saved.check(epochs=epochs, devices=1)
    with pytest.raises(UserError, match=r"trained for 1 epochs, and expected are 0; raise it"):
        saved.check(epochs=0, devices=1)
    with pytest.raises(UserError, match=r"trainer\.devices: .*last\.ckpt was trained on 1, and found are 2 here"):
        saved.check(epochs=2, devices=2)
    del saved.content[KEY]["training"]  # of an earlier version
    saved.check(epochs=2, devices=2)


def test_the_console_script_ends_with_143_and_the_next_goes_on(mrgen: Script, tmp_path: Path, phantom_store: Path):
    run_dir = tmp_path / "run"
    preset = ("experiment=rsnet/rsnet", f"data.store={phantom_store}", *TINY, "trainer.max_epochs=1")
    with signalled(RSNet, epoch=0, batch=0, number=signal.SIGTERM):
        called = mrgen("train", *preset, "data.steps_per_epoch=2", f"hydra.run.dir={run_dir}")
    assert (called.code, read_status(run_dir)["state"]) == (143, "preempted")
    assert "Traceback" not in called.err
    called = mrgen("train", f"resume={run_dir}")
    assert called.code == 0, called.err
    assert read_status(run_dir)["state"] == "finished"
    assert [path.name for path in (run_dir / "checkpoints").glob("resume*")] == []


RANK = """
import os, signal, mrgen.train
from mrgen.papers.rsnet import RSNet
step = RSNet.training_step
def told(self, batch, batch_idx):
    if os.environ.get("TOLD") == os.environ["LOCAL_RANK"] and (self.current_epoch, batch_idx) == (1, 1):
        os.kill(os.getpid(), signal.SIGUSR2)
    return step(self, batch, batch_idx)
RSNet.training_step = told
mrgen.train.main()
"""


def two_ranks(*arguments: str, told: int | None = None) -> list[int]:
    """Exit codes of two processes that train together, of which one may be told to end in its second epoch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"OMP_NUM_THREADS": "1"} | ({} if told is None else {"TOLD": str(told)})
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, *arguments], env=os.environ | common | {"LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    try:
        return [rank.wait(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.slow
@pytest.mark.parametrize("told", [0, 1])
def test_all_ranks_save_together_whichever_was_told(tmp_path: Path, phantom_store: Path, told: int):
    preset = (
        *("experiment=rsnet/rsnet", f"data.store={phantom_store}", *TINY, "trainer.max_epochs=2", "trainer=ddp"),
        *("data.steps_per_epoch=4", "data.split.val=0.25", "model.dropout=0.2", "augmentation=light"),
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert two_ranks(*preset, f"hydra.run.dir={whole}") == [0, 0]
    assert two_ranks(*preset, f"hydra.run.dir={parts}", told=told) == [143, 143]
    assert read_status(parts)["state"] == "preempted"
    assert two_ranks(f"resume={parts}") == [0, 0]
    a, b = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (whole, parts))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "loops"):
        assert differences(a[part], b[part]) == []
    for one, other in zip(*(read_metrics(run / "metrics.csv") for run in (whole, parts)), strict=True):
        assert one.keys() == other.keys()
        for key in one:  # the ranks' sums are averaged before the rest of the epoch is added, and behind it elsewhere
            assert one[key] == other[key] or float(one[key]) == pytest.approx(float(other[key]), rel=1e-6)


# ----- only one process ----------------------------------------------------------------------------------------------


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """As another process would hold it."""
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(handle)


def status(**changes: Any) -> dict[str, Any]:
    """Of a process that runs: the one that started this one's tests."""
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return {"state": "running", "host": socket.gethostname(), "pid": os.getppid(), "started": now, **changes}


def test_a_run_that_is_being_trained_is_not_trained_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(going_on, "WAIT", 0.3)
    write_json(tmp_path / "status.json", status(pid=7))
    with locked(tmp_path):
        said = r"is being trained by process 7 on .*; wait for its end, or end it first"
        with pytest.raises(UserError, match=said), only_here(tmp_path):
            pytest.fail("it was trained")
        with only_here(tmp_path, enabled=False):  # another rank of the same run
            pass
    with only_here(tmp_path):  # it was killed, and did not say so
        pass
    with only_here(tmp_path):
        pass


def test_who_has_waited_finds_what_the_other_one_left(
    run_dir: Path, phantom_store: Path, monkeypatch: pytest.MonkeyPatch
):
    (run_dir / "checkpoints").rename(run_dir / "later")

    def waited(run_dir: Path, **_: Any) -> Any:
        (run_dir / "later").rename(run_dir / "checkpoints")
        return nullcontext()

    monkeypatch.setattr(training, "only_here", waited)
    with pytest.raises(UserError, match="holds a finished or interrupted run"):
        train(job(run_dir, phantom_store, "seed=7", "resume=null"), run_dir)


def test_the_lock_of_a_killed_process_is_waited_for(tmp_path: Path):
    """Its loaders hold it until they notice."""
    child = os.fork()
    if not child:
        try:
            with locked(tmp_path):
                time.sleep(0.5)
        finally:
            os._exit(0)
    time.sleep(0.2)
    began = time.monotonic()
    with only_here(tmp_path):
        assert time.monotonic() - began < 5
    os.waitpid(child, 0)


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({}, True),
        ({"state": "failed"}, False),
        ({"host": "another"}, False),  # nobody can tell; SLURM starts a job again on another node
        ({"pid": 2**22 + 1}, False),  # no process has this number
        ({"started": "2001-01-01T00:00:00+0000"}, False),  # the number is that of a younger process
    ],
)
def test_without_locks_the_status_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], refused: bool
):
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    write_json(tmp_path / "status.json", status(**changes))
    if refused:
        with pytest.raises(UserError, match="is being trained by process"), only_here(tmp_path):
            pass
    else:
        with only_here(tmp_path):
            pass


def test_a_process_is_alive_as_far_as_this_machine_can_tell():
    assert is_alive(status())
    assert is_alive(status(host="another", pid=2**22 + 1))
    assert not is_alive(status(pid=2**22 + 1))
    assert not is_alive(status(started="2001-01-01T00:00:00+0000"))
    elsewhere = datetime.now(timezone(timedelta(hours=-11)))  # a shell with another TZ
    assert is_alive(status(pid=os.getpid(), started=elsewhere.strftime("%Y-%m-%dT%H:%M:%S%z")))


@pytest.mark.parametrize("name", ["run", "a run", "o'clock", 'the "best"', "ümlaut"])
def test_a_folder_may_be_quoted_as_hydra_would_have_it(tmp_path: Path, name: str):
    folder = tmp_path / name
    folder.mkdir()
    conf = "name: x\nmodel: {}\ntrainer: {}\ndata: {sampling: {_target_: mrgen.data.crops.BrainBox}}\n"
    (folder / "config.yaml").write_text(conf)
    plain = resuming.resumed([f"resume={folder}"])[2:]  # before them: the copy of the config
    assert f"resume={resuming.quoted(folder)}" in plain
    assert resuming.resumed([f"resume={resuming.quoted(folder)}"])[2:] == plain
    if '"' not in name:
        assert resuming.resumed([f'resume="{folder}"'])[2:] == plain


@pytest.mark.parametrize("content", [b"", b"[1", b"- 1", "name: é".encode("latin-1"), b"name: x", b"a: &a [1]\nb: *a"])
def test_a_damaged_config_is_refused_before_hydra_reads_it(tmp_path: Path, content: bytes):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.yaml: .*expected the config that mrgen-train wrote; put back a copy"):
        resuming.resumed([f"resume={tmp_path}"])
    assert (tmp_path / "config.yaml").read_bytes() == content


def test_a_picture_that_was_being_drawn_when_the_run_was_killed_is_removed(tmp_path: Path):
    for name in ("images", "estimator", "checkpoints"):
        (tmp_path / name).mkdir()
    left = [tmp_path / "images" / ".epoch-0010.png.0123abc", tmp_path / "estimator" / ".entries.npz.0f"]
    whole = tmp_path / "images" / "epoch-0005.png"
    for path in (*left, whole):
        path.write_bytes(b"")
    with only_here(tmp_path):
        pass
    assert whole.exists()
    assert not any(path.exists() for path in left)
