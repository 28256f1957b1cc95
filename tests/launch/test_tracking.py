"""W&B and TensorBoard: one run a job, no prompt, and no service whose death a training would not survive."""

import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from mrgen.errors import Preempted, UserError
from mrgen.files import read_metrics
from mrgen.launch import guarded, tracking
from mrgen.launch.csv_logger import CsvLogger
from mrgen.launch.guarded import within
from mrgen.launch.status import read_status
from mrgen.launch.tracking import loggers, run_group, run_name, source_commit, track_results, wandb_mode
from mrgen.papers.rsnet import RSNet
from tests.launch.tools import TINY, composed


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user who has never heard of W&B, and who cannot be asked."""
    for name in [name for name in os.environ if name.startswith("WANDB_") and name != "WANDB_SERVICE"]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("NETRC", raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)

    def prompted(*_: object) -> str:
        raise AssertionError("W&B asked the user")

    monkeypatch.setattr("builtins.input", prompted)
    monkeypatch.setattr("sys.stdin", None)
    return home


def log_in(home: Path, machine: str = "api.wandb.ai") -> None:
    (home / ".netrc").write_text(f"machine {machine}\n  login user\n  password {'0' * 40}\n")
    (home / ".netrc").chmod(0o600)


# ----- which mode --------------------------------------------------------------------------------------------------


def test_nobody_logged_in_is_offline():
    assert wandb_mode() == "offline"


def test_a_key_is_online(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert wandb_mode() == "online"


def test_a_stored_login_is_online(nobody: Path):
    log_in(nobody)
    assert wandb_mode() == "online"


def test_a_login_elsewhere_is_offline(nobody: Path, monkeypatch: pytest.MonkeyPatch):
    log_in(nobody, "wandb.hospital.example")
    assert wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.hospital.example:8080")
    assert wandb_mode() == "online"


def test_a_login_at_a_server_of_ones_own_is_online(nobody: Path):
    """As ``wandb login --host`` leaves it, whose server stands in W&B's settings."""
    log_in(nobody, "wandb.hospital.example")
    (nobody / ".config" / "wandb").mkdir(parents=True)
    (nobody / ".config" / "wandb" / "settings").write_text(
        "[default]\nbase_url = https://wandb.hospital.example:8080\n"
    )
    assert wandb_mode() == "online"


def test_a_login_file_in_another_place(nobody: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    log_in(nobody)
    (nobody / ".netrc").rename(tmp_path / "netrc")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode() == "online"


def test_a_broken_login_file_is_offline(nobody: Path):
    (nobody / ".netrc").write_text("machine\nnonsense here")
    assert wandb_mode() == "offline"


@pytest.mark.parametrize(
    ("asked", "mode"), [*((name, name) for name in ("offline", "online", "disabled", "shared")), ("dryrun", "offline")]
)
def test_what_the_environment_says_counts(asked: str, mode: str, monkeypatch: pytest.MonkeyPatch, nobody: Path):
    log_in(nobody)
    monkeypatch.setenv("WANDB_MODE", asked)
    assert wandb_mode() == mode


@pytest.mark.parametrize("folder", [".config/wandb", "../wandb"])
def test_wandb_offline_counts_for_whoever_is_logged_in(nobody: Path, folder: str):
    """What the command writes, for the user and for the working directory."""
    log_in(nobody)
    (nobody / folder).mkdir(parents=True)
    (nobody / folder / "settings").write_text("[default]\nmode = offline\n")
    assert wandb_mode() == "offline"


@pytest.mark.parametrize(
    ("asked", "message"),
    [("of", r"WANDB_MODE is 'of'; expected one of online, .*offline"), ("online", r"nobody is logged in; call wandb")],
)
def test_a_mode_that_cannot_be_is_a_sentence(asked: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("WANDB_MODE", asked)
    with pytest.raises(UserError, match=message), loggers(composed("train", "experiment=rsnet/rsnet"), tmp_path):
        pass


# ----- what a run is called ------------------------------------------------------------------------------------------


def job(run_dir: Path, *overrides: str) -> Path:
    """A run's folder as Hydra leaves it."""
    (run_dir / ".hydra").mkdir(parents=True)
    (run_dir / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(list(overrides)))
    return run_dir


def test_a_run_is_named_by_preset_and_overrides(tmp_path: Path):
    silent = ("experiment=rsnet/rsnet", "tracking=csv", "tracking.group=a", "data.store=/a", "name=b")
    run_dir = job(tmp_path / "run", *silent, "model.lr=0.001", "+seed=1", "data/sampling=patch")
    assert run_name("rsnet-t2", run_dir) == "rsnet-t2 model.lr=0.001 +seed=1 data/sampling=patch"
    assert run_name("rsnet-t2", tmp_path) == "rsnet-t2"
    assert run_group(run_dir) is None


def test_jobs_of_a_sweep_are_one_group_and_named_first_by_what_differs(tmp_path: Path):
    common = ["experiment=rsnet/rsnet", f"data.modalities={'x' * 200}"]
    sweep = tmp_path / "sweep_1"
    runs = [job(sweep / f"{k}_rsnet-t2", *common, f"model.lr={lr}") for k, lr in enumerate(("1e-3", "1e-4"))]
    (sweep / "multirun.yaml").write_text(
        yaml.safe_dump({"hydra": {"overrides": {"task": [*common, "model.lr=1e-3,1e-4"]}}})
    )
    names = [run_name("rsnet-t2", run_dir) for run_dir in runs]
    assert names[0].startswith("rsnet-t2 model.lr=1e-3 data.modalities=xxx")
    assert [len(name) for name in names] == [128, 128]
    assert len(set(names)) == 2
    assert {run_group(run_dir) for run_dir in runs} == {"sweep_1"}


def test_the_commit_is_that_of_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert len((source_commit() or "0" * 40).removesuffix("-dirty")) == 40
    monkeypatch.setattr(tracking, "__file__", str(tmp_path / "tracking.py"))
    assert source_commit() is None
    monkeypatch.setenv("PATH", "")
    assert source_commit() is None


def test_a_repository_around_the_source_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """mrgen may be installed inside of somebody else's; what the environment says of a repository is ignored."""
    touched = tmp_path / "touched"
    hook = tmp_path / "hook"
    hook.write_text(f"#!/bin/sh\ntouch {touched}\n")
    hook.chmod(0o755)
    repository = tmp_path / "repository"
    repository.mkdir()

    def git(*arguments: str) -> None:
        user = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", "-C", str(repository), *user, *arguments], check=True, capture_output=True)

    git("init")
    (repository / "tracking.py").write_text("")
    git("add", "tracking.py")
    git("commit", "-m", "one")
    git("config", "core.fsmonitor", str(hook))
    git("config", "filter.evil.clean", str(hook))
    (repository / ".git" / "info").mkdir(exist_ok=True)
    (repository / ".git" / "info" / "attributes").write_text("*.py filter=evil\n")
    for name in ("post-index-change", "pre-commit", "post-checkout"):
        (repository / ".git" / "hooks" / name).write_bytes(hook.read_bytes())
        (repository / ".git" / "hooks" / name).chmod(0o755)
    (repository / "tracking.py").write_text("changed")
    monkeypatch.setattr(tracking, "__file__", str(repository / "tracking.py"))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert (source_commit() or "").endswith("-dirty")
    assert not touched.exists()
    (repository / "tracking.py").write_text("")
    assert len(source_commit() or "") == 40  # as it was committed
    assert not touched.exists()
    monkeypatch.delenv("GIT_DIR")
    git("status")  # it is a weapon, in other hands
    assert touched.exists()


# ----- a service in the tests' hands ---------------------------------------------------------------------------------


class Service:
    """Stands in for W&B: keeps what it is told, and fails or hangs where a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.begun: list[dict[str, Any]] = []
        self.told: list[tuple[str, Any]] = []
        self.does: dict[str, Callable[..., Any]] = {}
        self.mode = ""
        monkeypatch.setattr("wandb.init", self.init)
        monkeypatch.setattr("wandb.teardown", lambda: self.told.append(("teardown", None)))

    def init(self, **settings: Any) -> "Service":
        self.begun.append(settings)
        self.mode, self.id = settings["mode"], settings["id"]
        self.does.get(f"init {self.mode}", lambda: None)()
        return self

    def called(self, name: str, value: Any = None) -> None:
        self.told.append((name, value))
        self.does.get(name, lambda: None)()

    def log(self, values: dict[str, Any]) -> None:
        self.called("log", values)

    def finish(self, exit_code: int | None = None) -> None:
        self.called("finish", exit_code)

    def mark_preempting(self) -> None:
        self.called("mark_preempting")

    def define_metric(self, *names: Any, **settings: Any) -> None:
        pass

    @property
    def settings(self) -> SimpleNamespace:
        return SimpleNamespace(mode=self.mode)

    name, url = "a run", "https://wandb.example/a-run"


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    monkeypatch.setattr(guarded, "ANSWER", 0.2)
    for name in ("START", "END", "HURRY", "RELEASE"):
        monkeypatch.setattr(tracking, name, 0.2)
    monkeypatch.setattr(tracking, "GRACE", 0.0)
    return Service(monkeypatch)


@pytest.fixture
def conf() -> DictConfig:
    return composed("train", "experiment=rsnet/rsnet", "target=t2")


def fails() -> None:
    raise ConnectionResetError("Connection lost")


def hangs() -> None:
    time.sleep(3)


def log_an_epoch(services: list[Any], step: int = 1) -> None:
    for logger in services:
        logger.log_metrics({"epoch": 0, "val/loss": 0.5}, step)
        logger.save()


def test_what_a_run_is_told(tmp_path: Path, service: Service, conf: DictConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    run_dir = job(tmp_path / "sweep" / "0_rsnet t2", "experiment=rsnet/rsnet", "seed=1")
    (tmp_path / "sweep" / "sweep.json").write_text("[]")
    (run_dir / "split.json").write_text(json.dumps({"train": ["a"], "val": ["b"], "test": ["c"]}))
    (run_dir / "environment.json").write_text(json.dumps({"commit": "abc", "python": "3.11"}))
    with loggers(conf, run_dir) as (logger,):
        logger.log_metrics({"val/loss": 0.5}, 7)
    (begun,) = service.begun
    assert (begun["name"], begun["group"], begun["project"]) == ("rsnet-t2 seed=1", "sweep", "theirs")
    assert (begun["job_type"], begun["mode"]) == ("train", "offline")
    assert not begun["settings"].x_disable_stats  # W&B's system metrics
    assert begun["config"]["model"]["target"] == "t2"
    assert begun["config"]["split"] == {"train": ["a"], "val": ["b"], "test": ["c"]}
    assert begun["config"]["environment"]["commit"] == "abc"
    assert ("log", {"val/loss": 0.5, "trainer/global_step": 7}) in service.told
    conf.tracking.group = "mine"
    with loggers(conf, run_dir):
        pass
    assert service.begun[1]["group"] == "mine"


@pytest.mark.parametrize("kind", ["run", "offline-run"])
def test_a_run_goes_on_in_its_own_and_in_no_other_of_its_name(
    tmp_path: Path, service: Service, conf: DictConfig, kind: str
):
    here, elsewhere = (tmp_path / place / "sweep" / "0_rsnet-t2" for place in ("here", "elsewhere"))
    for folder in (here, elsewhere):
        with loggers(conf, folder):
            pass
    ids = [begun["id"] for begun in service.begun]
    assert len(set(ids)) == 2
    (here / "wandb" / f"{kind}-20260101_000000-{ids[0]}").mkdir(parents=True)
    (here / "wandb" / "latest-run").symlink_to(f"{kind}-20260101_000000-{ids[0]}")
    with loggers(conf, here):
        pass
    assert service.begun[2]["id"] == ids[0]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (None, [("finish", 0)]),
        (RuntimeError("no memory"), [("finish", 1)]),
        (KeyboardInterrupt(), [("finish", 1)]),
        (Preempted("SIGUSR1"), [("mark_preempting", None), ("finish", 1)]),  # not failed, by W&B's rule
    ],
)
def test_a_run_ends_with_the_task_as_the_task_ended(
    tmp_path: Path, service: Service, conf: DictConfig, error: BaseException | None, told: list[Any]
):
    def task() -> None:
        with loggers(conf, tmp_path):
            if error is not None:
                raise error

    if error is None:
        task()
    else:
        with pytest.raises(type(error)):
            task()
    assert service.told == told


def test_the_first_rank_alone_tracks(
    tmp_path: Path, service: Service, conf: DictConfig, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    csv = CsvLogger(tmp_path / "metrics.csv")
    conf.tracking.tensorboard = True
    with loggers(conf, tmp_path, [csv]) as tracked:
        assert tracked == [csv]
    assert service.begun == []
    assert not (tmp_path / "tensorboard").exists()


def test_disabled_tracks_nothing(tmp_path: Path, service: Service, conf: DictConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with loggers(conf, tmp_path) as services:
        assert services == []
    assert service.begun == []


@pytest.mark.parametrize("trouble", [fails, hangs])
def test_a_service_that_dies_or_hangs_is_left_alone(
    tmp_path: Path, service: Service, conf: DictConfig, trouble: Callable, capsys: pytest.CaptureFixture
):
    with loggers(conf, tmp_path, [CsvLogger(tmp_path / "metrics.csv")]) as tracked:
        log_an_epoch(tracked, step=1)
        service.does = {"log": trouble}
        log_an_epoch(tracked, step=2)
        log_an_epoch(tracked, step=3)
    assert [int(row["step"]) for row in read_metrics(tmp_path / "metrics.csv")] == [1, 2, 3]
    assert [name for name, _ in service.told] == ["log", "log", "finish", "teardown"]  # not told of the third
    out = capsys.readouterr().out
    assert out.count("W&B failed") == 1
    assert "metrics.csv has everything" in out


@pytest.mark.parametrize("trouble", [fails, hangs])
def test_a_run_that_cannot_begin_online_is_offline(
    tmp_path: Path, service: Service, conf: DictConfig, nobody: Path, trouble: Callable, capsys: pytest.CaptureFixture
):
    log_in(nobody)
    service.does = {"init online": trouble}
    with loggers(conf, tmp_path) as services:
        log_an_epoch(services)
    assert [begun["mode"] for begun in service.begun] == ["online", "offline"]
    assert [name for name, _ in service.told] == ["teardown", "log", "finish"]
    assert "tracked offline" in capsys.readouterr().out


def test_a_run_that_cannot_begin_at_all_has_its_csv(
    tmp_path: Path, service: Service, conf: DictConfig, capsys: pytest.CaptureFixture
):
    service.does = {"init offline": fails}
    csv = CsvLogger(tmp_path / "metrics.csv")
    with loggers(conf, tmp_path, [csv]) as tracked:
        assert tracked == [csv]
    assert "metrics.csv" in capsys.readouterr().out


@pytest.mark.parametrize("trouble", [fails, hangs])
def test_a_service_that_dies_at_the_end_keeps_nobody(
    tmp_path: Path, service: Service, conf: DictConfig, nobody: Path, trouble: Callable, capsys: pytest.CaptureFixture
):
    log_in(nobody)
    service.does = {"finish": trouble}
    here = tmp_path / "a run"
    (here / "wandb" / "run-20260101_000000-known").mkdir(parents=True)
    started = time.monotonic()
    with loggers(conf, here):
        pass
    assert time.monotonic() - started < 2.5
    out = capsys.readouterr().out
    # What is on the disk can be sent, and not without the option.
    assert f"wandb sync --include-online {shlex.quote(str(here / 'wandb' / 'run-20260101_000000-known'))}" in out
    assert service.url in out


def test_a_call_is_waited_for_no_longer_than_told():
    assert within(5, lambda: 3) == 3
    with pytest.raises(ConnectionResetError):
        within(5, fails)
    with pytest.raises(TimeoutError, match=r"no answer in 0\.05 seconds"):
        within(0.05, hangs)
    with pytest.raises(RuntimeError, match="asked the process to end"):
        within(5, lambda: exit(3))


# ----- W&B itself ----------------------------------------------------------------------------------------------------


def tracked_run(run_dir: Path, store: Path, *overrides: str) -> Path:
    from mrgen.launch.training import train

    run_dir.mkdir(parents=True)
    given = {override.partition("=")[0] for override in overrides}
    narrow = [override for override in TINY if override.strip("+").split("=")[0].split(".")[0] not in given]
    common = ("experiment=rsnet/rsnet", f"data.store='{store}'", "trainer.max_epochs=1", "trainer.log_every_n_steps=1")
    return train(composed("train", *common, *narrow, *overrides), run_dir)


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """The exit codes that W&B was told; the runs are real."""
    from wandb.sdk.wandb_run import Run

    codes: list[int | None] = []
    finish = Run.finish

    def told(run: Run, exit_code: int | None = None) -> None:
        codes.append(exit_code)
        finish(run, exit_code=exit_code)

    monkeypatch.setattr(Run, "finish", told)
    return codes


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What W&B was told when they began; the runs are real."""
    import wandb

    told: list[dict[str, Any]] = []
    init = wandb.init
    monkeypatch.setattr("wandb.init", lambda **settings: told.append(settings) or init(**settings))
    return told


def test_an_offline_run_lies_in_the_run_folder_and_says_how_to_send_it(
    tmp_path: Path, phantom_store: Path, begun: list[dict], ended: list[int], capfd: pytest.CaptureFixture
):
    import wandb

    run_dir = tracked_run(tmp_path / "rsnet t2", phantom_store, "tracking=wandb", "callbacks=[images]")
    assert ended == [0]
    assert wandb.run is None
    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    assert [file.suffix for file in folder.glob("*.wandb")] == [".wandb"]
    assert f"wandb sync '{folder}'" in capfd.readouterr().out
    (told,) = [settings["config"] for settings in begun]
    assert told["split"] == json.loads((run_dir / "split.json").read_text())
    assert told["environment"] == json.loads((run_dir / "environment.json").read_text())
    assert "commit" in told["environment"]
    assert [path.name.partition("_")[0] for path in folder.glob("files/media/images/*.png")] == ["images"]
    assert (run_dir / "metrics.csv").is_file()  # the source of truth is there all the same


def test_a_failed_run_is_marked_failed(
    tmp_path: Path, phantom_store: Path, ended: list[int], monkeypatch: pytest.MonkeyPatch, last_words: list[Callable]
):
    def broken(*_: object) -> None:
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(RSNet, "validation_step", broken)
    with pytest.raises(RuntimeError, match="the disk is full"):
        tracked_run(tmp_path / "run", phantom_store, "tracking=wandb")
    assert ended == [1]
    assert read_status(tmp_path / "run")["reason"] == "RuntimeError: the disk is full"


def services_of_this_process() -> Iterator[int]:
    """Of wandb-core, from the system's own list."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == os.getpid() and b"wandb-core" in (process / "cmdline").read_bytes():
                yield int(process.name)
        except (OSError, IndexError):
            continue


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="finds the service by Linux's list of processes")
def test_a_training_survives_that_its_service_is_killed(
    tmp_path: Path, phantom_store: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    validate, killed = RSNet.validation_step, []

    def killing(self: RSNet, *args: Any) -> None:
        if not killed:
            killed.extend(services_of_this_process())
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
        validate(self, *args)

    monkeypatch.setattr(RSNet, "validation_step", killing)
    run_dir = tracked_run(tmp_path / "run", phantom_store, "tracking=wandb", "trainer.max_epochs=2")
    assert len(killed) == 1
    assert read_status(run_dir)["state"] == "finished"
    assert [row["epoch"] for row in read_metrics(run_dir / "metrics.csv") if row["val/loss"]] == ["0", "1"]
    out = capfd.readouterr().out
    assert out.count("W&B failed (ConnectionResetError") == 1
    assert "wandb sync" in out  # what it had got until then
    conf = composed("train", "experiment=rsnet/rsnet")
    with loggers(conf, tmp_path / "next") as services:  # the next job of a sweep has a service again
        log_an_epoch(services)
        assert services[0].alive
    assert len(list((tmp_path / "next" / "wandb").glob("offline-run-*"))) == 1


# ----- TensorBoard ---------------------------------------------------------------------------------------------------


def test_tensorboard_stands_beside_the_csv(tmp_path: Path, phantom_store: Path, ended: list[int]):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = tracked_run(tmp_path / "run", phantom_store, "tracking=tensorboard", "callbacks=[images]")
    assert ended == []
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    (value,) = events.Scalars("val/loss")
    (row,) = [row for row in read_metrics(run_dir / "metrics.csv") if row["val/loss"]]
    assert (value.step, value.value) == (int(row["step"]), pytest.approx(float(row["val/loss"])))
    assert [image.step for image in events.Images("images")] == [value.step]
    assert "target: t2" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()


def test_without_the_package_tensorboard_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
        monkeypatch.setattr(f"lightning_fabric.loggers.tensorboard.{name}", False)
    with (
        pytest.raises(UserError, match=r"pip install mrgen\[tensorboard\]"),
        loggers(composed("train", "experiment=rsnet/rsnet", "tracking=tensorboard"), tmp_path),
    ):
        pass


# ----- results -------------------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder as ``mrgen-evaluate`` leaves it."""
    from matplotlib.figure import Figure

    folder = tmp_path / "results"
    (folder / "key").mkdir(parents=True)
    (folder / "table.csv").write_text("method,dice,region\nrsnet,0.8,WT\nrnet,\n")
    (folder / "empty.csv").write_text("")
    (folder / "key" / "key.csv").write_text("item,truth\n1,real\n")  # which would give a blind sheet's answers away
    Figure((1, 1)).savefig(folder / "figure.png")
    return folder


def test_results_are_tables_and_pictures_of_an_evaluation(results: Path, begun: list[dict], ended: list[int]):
    track_results(composed("evaluate", "experiment=rsnet/swap"), results)
    assert [settings["job_type"] for settings in begun] == ["evaluation"]
    assert ended == [0]
    (media,) = results.glob("wandb/offline-run-*/files/media")
    (table,) = media.glob("table/*.json")
    shown = json.loads(table.read_text())
    assert shown["columns"] == ["method", "dice", "region"]
    assert shown["data"] == [["rsnet", 0.8, "WT"], ["rnet", None, ""]]
    assert [path.name.partition("_")[0] for path in media.glob("images/*.png")] == ["figure"]


def test_results_in_tensorboard_and_in_nothing(results: Path, ended: list[int]):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track_results(composed("evaluate", "experiment=rsnet/swap", "tracking=csv"), results)
    assert not (results / "tensorboard").exists()
    track_results(composed("evaluate", "experiment=rsnet/swap", "tracking=tensorboard"), results)
    events = EventAccumulator(str(results / "tensorboard")).Reload()
    text = events.Tensors("table/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| rsnet | 0.8 | WT |" in text
    assert events.Tags()["images"] == ["figure"]
    assert ended == []


def test_mrgen_evaluate_shows_what_it_has_judged(mrgen: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    shown: list[Path] = []
    monkeypatch.setattr("mrgen.launch.judging.evaluating.evaluate", lambda conf, folder: folder)
    monkeypatch.setattr("mrgen.launch.tracking.track_results", lambda conf, folder: shown.append(folder))
    called = mrgen("evaluate", "experiment=rsnet/swap")
    assert called.code == 0, called.err
    (folder,) = shown
    assert f"results: {folder}" in called.out
