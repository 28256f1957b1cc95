"""What the tests of the launch side share: composing, tiny trainings, console scripts called in this process."""

import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from mrgen.launch.app import register_resolvers
from mrgen.launch.paths import CONF_DIR

# A network of a few thousand parameters, in the one precision whose results do not depend on the processor; without
# pictures, which take longer than the training.
CPU = ("trainer.accelerator=cpu", "trainer.precision=32-true", "tracking=csv", "++callbacks.images=null")
TINY = ("model.filters=2", "model.levels=2", "model.mc_samples=4", *CPU)
TINY_SNET = ("model.net.filters=2", "model.net.levels=2", *CPU)


def composed(config: str, *overrides: str) -> DictConfig:
    """The config that the console script would compose."""
    register_resolvers()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose(config, [*overrides])


def tiny_run(run_dir: Path, store: Path, *overrides: str, preset: str = "rsnet") -> Path:
    """Trains a tiny network for an epoch, unless the overrides say longer."""
    from mrgen.launch.training import train

    run_dir.mkdir(parents=True, exist_ok=True)
    narrow = TINY_SNET if preset == "snet" else TINY
    common = (f"experiment=rsnet/{preset}", f"data.store='{store}'", "trainer.max_epochs=1")
    return train(composed("train", *common, *narrow, *overrides), run_dir)


@contextmanager
def signalled(
    kind: type, *, epoch: int, batch: int, method: str = "training_step", number: int = signal.SIGUSR1
) -> Iterator[None]:
    """This process gets a signal in the step of this epoch and batch."""
    step = getattr(kind, method)

    def told(self: Any, data: Any, batch_idx: int) -> Any:
        if (self.current_epoch, batch_idx) == (epoch, batch):
            os.kill(os.getpid(), number)
        return step(self, data, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, method, told)
        yield


@dataclass(frozen=True)
class Called:
    """What a console script left: exit code, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """What stands after the one ``error:``."""
        assert self.err.count("error: ") == 1, self.err
        assert "Traceback" not in self.err
        return self.err.partition("error: ")[2]


def call(script: str, arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch, cwd: Path) -> Called:
    """``mrgen-<script> arguments`` in this process and in another working directory.

    Exceptions that would reach the user as a traceback come out of it.
    """
    monkeypatch.chdir(cwd)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # which run_app sets; so it is gone after the test
    monkeypatch.setattr(sys, "argv", [f"mrgen-{script}", *arguments])
    out, err, code = io.StringIO(), io.StringIO(), 0
    interrupt = signal.getsignal(signal.SIGINT)
    with redirect_stdout(out), redirect_stderr(err):
        try:
            import_module(f"mrgen.{script}").main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            signal.signal(signal.SIGINT, interrupt)
    return Called(code, out.getvalue(), err.getvalue())
