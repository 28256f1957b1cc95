"""Weights & Biases: online only with credentials, never a prompt, ended with an exit code, files in the run folder."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mrgen.launch.status import read_status
from mrgen.launch.tracking import wandb_mode
from mrgen.papers.rsnet import RSNet
from tests.launch.tools import TINY, composed


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user who has never heard of W&B, and who cannot be asked."""
    import os

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("NETRC", raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))

    def prompted(*_: object) -> str:
        raise AssertionError("W&B asked the user")

    monkeypatch.setattr("builtins.input", prompted)
    monkeypatch.setattr("sys.stdin", None)
    return home


def log_in(home: Path, machine: str) -> None:
    (home / ".netrc").write_text(f"machine {machine}\n  login user\n  password {'0' * 40}\n")
    (home / ".netrc").chmod(0o600)


# ----- which mode --------------------------------------------------------------------------------------------------


def test_nobody_logged_in_is_offline():
    assert wandb_mode() == "offline"


def test_a_key_is_online(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert wandb_mode() == "online"


def test_a_stored_login_is_online(nobody: Path):
    log_in(nobody, "api.wandb.ai")
    assert wandb_mode() == "online"


def test_a_login_elsewhere_is_offline(nobody: Path, monkeypatch: pytest.MonkeyPatch):
    log_in(nobody, "wandb.hospital.example")
    assert wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.hospital.example:8080")
    assert wandb_mode() == "online"


def test_a_login_file_in_another_place(nobody: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    log_in(nobody, "api.wandb.ai")
    (nobody / ".netrc").rename(tmp_path / "netrc")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode() == "online"


def test_a_broken_login_file_is_offline(nobody: Path):
    (nobody / ".netrc").write_text("machine\nnonsense here")
    assert wandb_mode() == "offline"


@pytest.mark.parametrize("mode", ["offline", "online", "disabled", "shared"])
def test_what_the_environment_says_counts(mode: str, monkeypatch: pytest.MonkeyPatch, nobody: Path):
    log_in(nobody, "api.wandb.ai")
    monkeypatch.setenv("WANDB_MODE", mode)
    assert wandb_mode() == mode


# ----- runs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The exit codes that W&B was told; the runs are real."""
    import wandb

    codes: list[int] = []
    finish = wandb.finish

    def told(exit_code: int) -> None:
        codes.append(exit_code)
        finish(exit_code=exit_code)

    monkeypatch.setattr(wandb, "finish", told)
    return codes


def tracked(run_dir: Path, store: Path) -> Path:
    from mrgen.launch.training import train

    run_dir.mkdir(parents=True)
    narrow = [override for override in TINY if not override.startswith("tracking")]
    return train(
        composed("train", "experiment=rsnet/rsnet", f"data.store='{store}'", "trainer.max_epochs=1", *narrow), run_dir
    )


def test_an_offline_run_lies_in_the_run_folder_and_says_how_to_send_it(
    tmp_path: Path, phantom_store: Path, ended: list[int], capfd: pytest.CaptureFixture
):
    import wandb

    run_dir = tracked(tmp_path / "runs" / "rsnet t2" / "a#1", phantom_store)  # characters that no W&B id may hold
    assert ended == [0]
    assert wandb.run is None
    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    assert [file.suffix for file in folder.glob("*.wandb")] == [".wandb"]
    assert folder.name.endswith("-rsnet-t2-a-1")
    assert f"wandb sync {folder}" in capfd.readouterr().out
    assert not (Path.cwd() / "wandb").exists() or run_dir not in (Path.cwd() / "wandb").parents
    assert (run_dir / "metrics.csv").is_file()  # the source of truth is there all the same


def test_a_failed_run_is_marked_failed(
    tmp_path: Path, phantom_store: Path, ended: list[int], monkeypatch: pytest.MonkeyPatch, last_words: list[Callable]
):
    def broken(*_: object) -> None:
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(RSNet, "validation_step", broken)
    with pytest.raises(RuntimeError, match="the disk is full"):
        tracked(tmp_path / "run", phantom_store)
    assert ended == [1]
    assert read_status(tmp_path / "run")["reason"] == "RuntimeError: the disk is full"


def test_disabled_tracks_nothing(
    tmp_path: Path, phantom_store: Path, ended: list[int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run_dir = tracked(tmp_path / "run", phantom_store)
    assert ended == []
    assert not (run_dir / "wandb").exists()
    assert (run_dir / "metrics.csv").is_file()
