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

import torch
from omegaconf import DictConfig
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import Timer
from torch import Tensor

from mrgen.callbacks.preemption import RESUME
from mrgen.callbacks.provenance import KEY
from mrgen.errors import UserError
from mrgen.files import remove_leftovers
from mrgen.launch.checkpoints import read_checkpoint
from mrgen.launch.configs import read_config
from mrgen.launch.instantiate import plain
from mrgen.launch.memory import out_of_memory
from mrgen.launch.status import is_alive, read_status
from mrgen.launch.sweeps.resuming import is_free

__all__ = ["Restored", "SameStart", "Saved", "check_config", "is_finished", "newest", "only_here"]

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
        callbacks, version = content["callbacks"], content["pytorch-lightning_version"]
        mappings = [callbacks, *callbacks.values(), *loop.values(), content[KEY].get("training", {})]
    except (KeyError, TypeError, AttributeError):
        return None
    kinds = ((lists, list), (mappings, Mapping), ([version], str))
    complete = all(isinstance(value, kind) for values, kind in kinds for value in values)
    return stepped if complete and all(type(number) is int and number >= 0 for number in numbers) else None


class Restored(Callback):
    """Sees to it that Lightning takes all of a checkpoint's state: what is missing it would start anew in silence.

    Args:
        path: of the checkpoint.
    """

    def __init__(self, path: Path):
        self.path = path
        self._content: dict[str, Any] = {}
        self._complete = False

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._content = checkpoint

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compares with the optimizers and schedules that there are, which are not restored yet."""
        content, self._content = self._content, {}
        # A time limit, which is counted anew, may be one of this start alone.
        keys = [each.state_key for each in trainer.callbacks if each.state_dict() and not isinstance(each, Timer)]  # type: ignore[attr-defined]
        if lacking := [key for key in keys if key not in content["callbacks"]]:
            raise self._refusal(f"no state of {lacking[0].partition('{')[0]}")
        groups = [each.get("param_groups") if isinstance(each, dict) else None for each in content["optimizer_states"]]
        if not _alike(groups, [each.state_dict()["param_groups"] for each in trainer.optimizers]):
            raise self._refusal("other optimizers than the model has")
        if not all(map(_fit, content["optimizer_states"], trainer.optimizers)):
            raise self._refusal("an optimizer's state that does not fit its weights")
        if not _alike(content["lr_schedulers"], [each.scheduler.state_dict() for each in trainer.lr_scheduler_configs]):
            raise self._refusal("other schedules of the learning rate than the model has")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._complete = True

    def _refusal(self, found: str) -> UserError:
        return UserError(f"{self.path}: found {found}, expected what mrgen-train wrote; {REMEDY}")

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Around a training: whatever a library says of the checkpoint before the first batch becomes a UserError."""
        try:
            yield
        except Exception as error:
            if self._complete or isinstance(error, UserError) or out_of_memory(error):
                raise
            said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise self._refusal(f"a state that cannot be restored ({said})") from error


def _alike(found: Any, expected: Any) -> bool:
    """Whether a restored state has the form of the one that is there, whatever its numbers."""
    if isinstance(expected, Mapping):
        return (
            isinstance(found, Mapping)
            and found.keys() == expected.keys()
            and all(_alike(found[key], value) for key, value in expected.items())
        )
    if isinstance(expected, list | tuple):
        return isinstance(found, list | tuple) and len(found) == len(expected) and all(map(_alike, found, expected))
    if isinstance(expected, bool | str):
        return isinstance(found, type(expected))
    if isinstance(expected, int | float):
        return type(found) in (int, float) and found == found  # no NaN
    return True  # None, which stands for anything that comes later


def _fit(state: Mapping[str, Any], optimizer: Any) -> bool:
    """Whether what an optimizer keeps of each weight has the weight's shape, or is one number; and all of one kind."""
    weights = dict(enumerate(weight for group in optimizer.param_groups for weight in group["params"]))
    kept = state.get("state")
    if not isinstance(kept, Mapping) or not all(isinstance(of_one, Mapping) for of_one in kept.values()):
        return False
    shapes_fit = all(
        key in weights and (not isinstance(value, Tensor) or value.shape in (torch.Size(), weights[key].shape))
        for key, of_one in kept.items()
        for value in of_one.values()
    )
    return shapes_fit and len({frozenset(of_one) for of_one in kept.values()}) <= 1


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
