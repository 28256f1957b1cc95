"""Whether a run may be trained in its folder, and where it goes on."""

import fcntl
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from pytorch_lightning import Callback, LightningModule, Trainer

from mrgen.callbacks.preemption import RESUME
from mrgen.callbacks.provenance import KEY
from mrgen.errors import UserError
from mrgen.files import remove_leftovers
from mrgen.launch.checkpoints import read_checkpoint
from mrgen.launch.configs import read_config
from mrgen.launch.instantiate import plain
from mrgen.launch.status import is_alive, read_status
from mrgen.launch.sweeps.resuming import is_free

__all__ = ["SameStart", "Saved", "check_config", "is_finished", "newest", "only_here"]

REMEDY = (
    "put back a copy that is whole, or remove the file: the run goes on from the other one in that folder, or starts "
    "over"
)
WAIT = 10.0  # seconds: loaders of a process that was killed live on for half of it, and hold its lock


@dataclass(frozen=True)
class Saved:
    """What a run goes on from.

    Attributes:
        path: the checkpoint.
        content: of it.
        step: the last one of ``metrics.csv`` that it knows of. Rows count batches, not the steps of each optimizer.
    """

    path: Path
    content: dict[str, Any]
    step: int

    def check(self, *, epochs: int | None, devices: int) -> None:
        """Raises UserError where the trainer cannot go on with it.

        Args:
            epochs: of all stages of the training, -1 or None without an end.
            devices: all ranks.
        """
        done = self.content["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        if epochs is not None and 0 <= epochs < done:
            raise UserError(
                f"trainer.max_epochs is too low: {self.path} was trained for {done} epochs, and expected are {epochs}; "
                "raise it"
            )
        there = self.content[KEY].get("training", {}).get("devices", devices)
        if there != devices:
            raise UserError(
                f"trainer.devices: {self.path} was trained on {there}, and found are {devices} here, which would show "
                "other batches; go on with as many"
            )


def newest(run_dir: Path) -> Saved | None:
    """The checkpoint of most steps, that of an epoch's end or that of a preemption; None where there is none.

    Raises:
        UserError: it cannot be read.
    """
    found = None
    for name in ("last.ckpt", RESUME):
        path = run_dir / "checkpoints" / name
        if not os.path.lexists(path):
            continue
        content = read_checkpoint(path, remedy=REMEDY)
        steps = _steps(content)
        if steps is None:
            raise UserError(f"{path}: found no state of a training in it, expected a {name} of mrgen-train; {REMEDY}")
        # At the end of an epoch the batches are counted; in the middle of one the last of them is not yet.
        step = steps if name == RESUME else steps - 1
        if found is None or step > found.step:
            found = Saved(path, content, step)
    return found


def _steps(content: Mapping[str, Any]) -> int | None:
    """Batches that a checkpoint has seen; None where it does not say all that a training goes on from."""
    try:
        loop = content["loops"]["fit_loop"]
        stepped = loop["epoch_loop.state_dict"]["_batches_that_stepped"]
        numbers = [stepped, loop["epoch_progress"]["current"]["processed"], content["epoch"], content["global_step"]]
        lists = [content["optimizer_states"], content["lr_schedulers"]]
        mappings = [content["callbacks"], content[KEY].get("training", {})]
    except (KeyError, TypeError, AttributeError):
        return None
    kinds = ((numbers, int), (lists, list), (mappings, Mapping))
    return stepped if all(isinstance(value, kind) for values, kind in kinds for value in values) else None


class SameStart(Callback):
    """Ends ranks that would go on from different checkpoints: only the first one waits for another process's end.

    Args:
        step: from which this rank goes on, -1 from the start.
    """

    def __init__(self, step: int):
        self.step = step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if (first := trainer.strategy.broadcast(self.step)) != self.step:
            raise UserError(
                f"rank {trainer.global_rank} found a checkpoint of step {self.step} and the first rank one of step "
                f"{first}, because another process was still saving; start the run again"
            )


def _earlier(run_dir: Path) -> DictConfig | None:
    """The config that the run had."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        return None
    return read_config(path)


def check_config(conf: DictConfig, run_dir: Path) -> None:
    """Raises UserError where a run that has begun would go on as another one.

    Args:
        conf: composed, its data filled in from the store.
        run_dir: with the ``config.yaml`` of the run.
    """
    earlier = _earlier(run_dir)
    if earlier is None:
        return
    changed = _differences(plain(earlier), plain(conf))
    changed = {key: pair for key, pair in changed.items() if not is_free(key)}
    if changed:
        said = "; ".join(f"{key}: {_shown(old)} there, {_shown(new)} here" for key, (old, new) in changed.items())
        raise UserError(
            f"{run_dir}: the run began with another config ({said}); leave these keys as they were, or train anew in "
            "another folder"
        )


ABSENT = object()


def _differences(old: Any, new: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    """Both values of every key that differs, the key with points."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for name in dict.fromkeys((*old, *new)):
            below = f"{key}.{name}" if key else str(name)
            found |= _differences(old.get(name, ABSENT), new.get(name, ABSENT), below)
        return found
    return {} if old == new else {key: (old, new)}


def _shown(value: Any) -> str:
    return "absent" if value is ABSENT else "null" if value is None else str(value)


def is_finished(conf: DictConfig, run_dir: Path) -> bool:
    """Whether nothing is left to do: the run has finished, and is given no more epochs, nor another time."""
    # In this order: the first rank, which may be ahead, writes the status before the config.
    earlier = _earlier(run_dir)
    if read_status(run_dir).get("state") != "finished" or earlier is None:
        return False
    longer = _epochs(conf) > _epochs(earlier) or conf.trainer.get("max_time") != earlier.trainer.get("max_time")
    return not longer


def _epochs(conf: DictConfig) -> float:
    epochs = conf.trainer.max_epochs
    return math.inf if epochs in (None, -1) else epochs


@contextmanager
def only_here(run_dir: Path, *, use: str = "trained", enabled: bool = True) -> Iterator[None]:
    """Keeps other processes from training in a folder, or judging into it, and removes what a killed one left behind.

    A lock on the folder, which ends with the process however that ends. Where the file system has no such locks, the
    folder's status tells, of processes on this machine.

    Args:
        run_dir: the run's folder.
        use: what happens to it, for messages.
        enabled: False on every rank but the first.

    Raises:
        UserError: it is being trained.
    """
    if not enabled:
        yield
        return
    folder = os.open(run_dir, os.O_RDONLY)
    try:
        _lock(folder, run_dir, use)
        remove_leftovers(run_dir, *(run_dir / name for name in ("blind", "checkpoints", "estimator", "images", "key")))
        yield
    finally:
        with suppress(OSError):  # children that were forked have it open too
            fcntl.flock(folder, fcntl.LOCK_UN)
        os.close(folder)


def _lock(folder: int, run_dir: Path, use: str) -> None:
    until = time.monotonic() + WAIT
    while True:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > until:
                break
            time.sleep(0.2)
        except OSError:  # a network file system
            status = read_status(run_dir)
            here = status.get("host") == socket.gethostname() and status.get("pid") != os.getpid()
            if status.get("state") != "running" or not here or not is_alive(status):
                return
            break
    status = read_status(run_dir)
    who = f"process {status['pid']} on {status['host']}" if status.get("pid") else "another process"
    raise UserError(f"{run_dir}: is being {use} by {who}; wait for its end, or end it first")
