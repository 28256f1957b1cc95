"""Several devices: one process each, all with the job's config; however they end, none is left."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from mrgen.callbacks.provenance import KEY
from mrgen.errors import UserError
from mrgen.files import write_json
from mrgen.launch import app, ranks
from mrgen.launch.status import read_status
from mrgen.launch.sweeps.resuming import quoted
from tests.launch.test_training import checkpoint, differences
from tests.launch.tools import TINY, Called, composed

Script = Callable[..., Called]
DDP = ("trainer=ddp", "trainer.accelerator=cpu")


def seen(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(run_dir.glob("rank*.json"))]


def conf_of(target: str) -> Any:
    return composed("train", f"target={target}", *DDP)


def gone(pid: int) -> bool:
    """Whether no such process runs any more; one that nobody has waited for has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """No long wait for ranks that hang."""
    monkeypatch.setattr(ranks, "GRACE", 0.3)
    monkeypatch.setattr(ranks, "STOP", 0.3)


# ----- together ----------------------------------------------------------------------------------------------------


def test_every_rank_has_the_same_config_in_one_folder_and_the_parent_stays_as_it_was(
    stand_in: None, mrgen: Script, tmp_path: Path
):
    before = dict(os.environ)
    folder = tmp_path / "a run, 'quoted'=yes"
    called = mrgen("train", "target=t1", "model.lr=0.5", *DDP, f"hydra.run.dir={quoted(folder)}")
    assert called.code == 0, called.err
    first, second = seen(folder)
    assert first["conf"] == second["conf"]
    assert first["conf"]["model"]["lr"] == 0.5
    assert first["environment"] == second["environment"]
    assert first["environment"]["WORLD_SIZE"] == "2"
    assert len({first["pid"], second["pid"], os.getpid()}) == 3
    assert read_status(folder)["state"] == "finished"
    assert dict(os.environ) == {**before, "HYDRA_FULL_ERROR": "1"}


def test_one_rank_of_ddp_has_a_process_of_its_own(stand_in: None, mrgen: Script, tmp_path: Path):
    """Lightning leaves rank and port in the environment, where the next job would take them for its own."""
    assert mrgen("train", "target=t1", *DDP, "trainer.devices=1", "hydra.run.dir=run").code == 0
    (only,) = seen(tmp_path / "run")
    assert only["pid"] != os.getpid()
    assert only["environment"]["WORLD_SIZE"] == "1"


def test_one_device_trains_in_the_process_itself(stand_in: None, mrgen: Script, tmp_path: Path):
    assert mrgen("train", "target=t1", "trainer.accelerator=cpu", "hydra.run.dir=run").code == 0
    assert seen(tmp_path / "run")[0]["pid"] == os.getpid()


def test_cores_are_shared_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    assert ranks._environment(5)["OMP_NUM_THREADS"] == "2"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert ranks._environment(5)["OMP_NUM_THREADS"] == "7"


def test_ports_are_fresh():
    assert len({ranks._environment(2)["MASTER_PORT"] for _ in range(5)}) > 1


def test_a_method_without_a_network_is_fitted_in_one_process(stand_in: None, mrgen: Script, tmp_path: Path):
    called = mrgen("train", "experiment=t1_to_t2/clustering", "+model.lr=1", *DDP, "hydra.run.dir=run")
    assert called.code == 0, called.err
    assert "has no network and is fitted in one process" in called.out
    assert [one["pid"] for one in seen(tmp_path / "run")] == [os.getpid()]


# ----- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "count"), [(3, 3), ("3", 3), ([0, 2], 2), ("0,2", 2), ("4,", 1), ("auto", 1), (-1, 1)]
)
def test_devices_are_counted_in_lightnings_notations(devices: Any, count: int):
    accelerator = "gpu" if isinstance(devices, list) or "," in str(devices) else "cpu"
    assert ranks.count_devices(OmegaConf.create({"devices": devices, "accelerator": accelerator})) == count


@pytest.mark.parametrize("devices", [0, -2, 1.5, "two", "0,0", [], None, True])
def test_devices_that_are_none_are_refused(devices: Any):
    with pytest.raises(UserError, match=r"trainer.devices is .*; expected a number from 1 on, auto, or a list of GPUs"):
        ranks.count_devices(OmegaConf.create({"devices": devices, "accelerator": "auto"}))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["trainer.num_nodes=2"], "starts processes on one machine; use hydra/launcher=slurm"),
        (["trainer.strategy=ddp_spawn"], "mrgen-train starts the processes itself: trainer.strategy=ddp"),
        (["trainer.devices=[0,1]", "trainer.accelerator=cpu"], "names GPUs; the CPU takes a number"),
    ],
)
def test_what_cannot_be_started_here_is_refused(settings: list[str], said: str):
    with pytest.raises(UserError, match=said):
        ranks.needs_processes(composed("train", *(f"+{s}" if "num_nodes" in s else s for s in settings)))


def test_ranks_of_torchrun_start_no_others_and_must_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name, value in {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    run = HydraConf(mode=RunMode.RUN)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", OmegaConf.create({"hydra": run}))
    conf = conf_of("t1")
    assert not ranks.needs_processes(conf)
    assert not ranks.first_rank()
    ranks.check_ranks(conf, tmp_path)
    with pytest.raises(UserError, match=r"into a folder of its own; give them one: hydra\.run\.dir=FOLDER"):
        ranks.check_ranks(conf, tmp_path / f"2020-01-01_{app.TOKEN}")
    conf.trainer.devices = 1
    with pytest.raises(UserError, match=r"2 processes were started for trainer\.devices=1 on 1 machine"):
        ranks.check_ranks(conf, tmp_path)
    HydraConfig.get().mode = RunMode.MULTIRUN
    with pytest.raises(UserError, match="a sweep starts its own processes"):
        ranks.check_ranks(conf, tmp_path)


# ----- failures ----------------------------------------------------------------------------------------------------


def test_what_all_ranks_refuse_is_one_sentence(stand_in: None, mrgen: Script, tmp_path: Path, capfd):
    called = mrgen("train", "target=wrong", *DDP, "hydra.run.dir=run")
    assert called.code == 1
    assert called.message.strip() == "a wrong setting"
    said = capfd.readouterr()
    assert "wrong setting" not in said.out + said.err  # of the ranks themselves
    assert read_status(tmp_path / "run")["reason"] == "UserError: a wrong setting"


def test_a_rank_that_fails_alone_is_named_and_the_others_end(stand_in: None, tmp_path: Path):
    with pytest.raises(UserError, match=r"^rank 1 of 2: no store here$"):
        ranks.train_on_devices(conf_of("wrong_in_one"), tmp_path)
    assert all(gone(one["pid"]) for one in seen(tmp_path))
    status = read_status(tmp_path)
    assert (status["state"], status["reason"]) == ("failed", "rank 1 of 2: UserError: no store here")


def test_a_rank_that_is_killed_is_what_the_others_errors_follow_from(stand_in: None, tmp_path: Path):
    with pytest.raises(app.Reported, match=r"^rank 1 of 2 was ended by SIGKILL, as where memory runs out$"):
        ranks.train_on_devices(conf_of("killed"), tmp_path)
    assert read_status(tmp_path)["reason"].startswith("rank 1 of 2 was ended by SIGKILL")


def test_a_bug_keeps_its_traceback(stand_in: None, tmp_path: Path, capsys):
    with pytest.raises(app.Reported, match=r"^RuntimeError: a bug$"):
        ranks.train_on_devices(conf_of("bug"), tmp_path)
    said = capsys.readouterr().err
    assert said.count("Traceback") == 1
    assert "in _bug" in said


def test_a_failure_is_not_written_over_what_another_process_does_in_the_folder(tmp_path: Path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    status = {"state": "running", "host": socket.gethostname(), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    for pid, state in ((os.getppid(), "running"), (os.getpid(), "failed"), (ended.pid, "failed")):
        write_json(tmp_path / "status.json", {**status, "pid": pid})
        ranks.record_failure(tmp_path, "is being trained by another process")
        assert read_status(tmp_path)["state"] == state


def test_a_failure_that_cannot_be_written_is_told_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> None:
        raise UserError("no room")

    monkeypatch.setattr(ranks, "write_json", full)
    ranks.record_failure(tmp_path, "rank 1 of 2: last.ckpt cannot be written")


# ----- signals -----------------------------------------------------------------------------------------------------


def later(what: Callable[[], object], run_dir: Path) -> threading.Thread:
    """Does something once all ranks train."""

    def wait() -> None:
        while len(seen_or_none(run_dir)) < 2:
            time.sleep(0.02)
        what()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def seen_or_none(run_dir: Path) -> list[dict[str, Any]]:
    try:
        return seen(run_dir)
    except ValueError:  # half written
        return []


@pytest.mark.parametrize(
    ("target", "number", "raised", "reason"),
    [
        ("hangs", signal.SIGTERM, SystemExit, "ended by SIGTERM"),
        ("patient", signal.SIGINT, KeyboardInterrupt, "interrupted"),
    ],
)
def test_a_signal_to_the_parent_ends_all_ranks(
    stand_in: None, tmp_path: Path, target: str, number: signal.Signals, raised: type[BaseException], reason: str
):
    handler = signal.default_int_handler  # whatever the shell that started the tests lets them ignore
    before = signal.signal(number, handler)
    try:
        thread = later(lambda: os.kill(os.getpid(), number), tmp_path)
        with pytest.raises(raised) as ended:
            ranks.train_on_devices(conf_of(target), tmp_path)
        thread.join()
        assert signal.getsignal(number) == handler
    finally:
        signal.signal(number, before)
    assert all(gone(one["pid"]) for one in seen(tmp_path))
    assert read_status(tmp_path)["state"] == "failed"
    assert read_status(tmp_path)["reason"] == reason
    assert raised is KeyboardInterrupt or ended.value.code == 143


def test_what_nohup_ignores_stays_ignored():
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ranks._forwarding([]) as received:
            os.kill(os.getpid(), signal.SIGHUP)
        assert received == []
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, handler)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_ranks_do_not_outlive_a_parent_that_was_killed(stand_in: None, tmp_path: Path):
    arguments = [sys.executable, "-m", "mrgen.train", "target=hangs", *DDP, f"hydra.run.dir='{tmp_path}/run'"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}  # where it leaves its own
    parent = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    later(parent.kill, tmp_path / "run").join()
    parent.wait()
    deadline = time.monotonic() + 5
    while not all(gone(one["pid"]) for one in seen(tmp_path / "run")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert all(gone(one["pid"]) for one in seen(tmp_path / "run"))


# ----- for real ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_job_of_a_sweep_on_two_processes_has_the_weights_of_a_run_of_its_own(
    mrgen: Script, phantom_store: Path, tmp_path: Path
):
    short = ("trainer.max_epochs=2", "data.split.val=0.3", "callbacks=[]", f"data.store={quoted(phantom_store)}")
    common = ("experiment=rsnet/rsnet", *TINY, *DDP, *short)
    assert mrgen("train", "-m", "target=t3,t1,t2", *common, "hydra.sweep.dir=sweep").code == 1  # there is no t3
    assert mrgen("train", "target=t2", *common, "hydra.run.dir=run").code == 0
    alone, job = tmp_path / "run", tmp_path / "sweep" / "2_rsnet-t2"
    assert differences(checkpoint(alone)["state_dict"], checkpoint(job)["state_dict"]) == []
    assert (alone / "metrics.csv").read_text() == (job / "metrics.csv").read_text()
    other = checkpoint(tmp_path / "sweep" / "1_rsnet-t1")
    assert other[KEY]["training"]["devices"] == 2
    assert other[KEY]["model"]["target"] == "t1"
