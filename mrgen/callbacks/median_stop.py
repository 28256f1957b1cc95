"""Ends a run of a sweep that lags behind its siblings."""

import math
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from mrgen.callbacks.early_stopping import check_monitor
from mrgen.errors import UserError
from mrgen.files import read_json, read_metrics, read_yaml

__all__ = ["MedianStop", "best_until"]


def best_until(metrics: Path, monitor: str, epoch: int) -> float | None:
    """The least value of a metric up to an epoch; None where the run has not come as far.

    Args:
        metrics: a run's ``metrics.csv``; there may be none yet.
        monitor: name of the metric. Values that are no numbers (nan) count as infinite.
        epoch: from 0 on.
    """
    rows = [(int(row["epoch"]), float(row[monitor])) for row in read_metrics(metrics) if row.get(monitor)]
    if not rows or rows[-1][0] < epoch:
        return None
    return min((value for at, value in rows if at <= epoch and not math.isnan(value)), default=math.inf)


class MedianStop(Callback):
    """The median rule, from the ``metrics.csv`` of the runs in the sweep's folder.

    After a validation, a run is ended whose best value so far is worse than the median of its siblings' best values at
    the same epoch. Siblings, whether they still run or have ended, are those that answer the same question: the same
    validation subjects, normalisation, labels, monitor, and model apart from its numbers. Another target, fold or
    method is no sibling. Outside a sweep there are none.

    Args:
        monitor: a metric of validation, whose least value is best. What is swept must not weigh in it.
        warmup: epochs in which no run is ended.
        siblings: how many must have reached the epoch.

    Raises:
        UserError: a number that is none of these.

    Attributes:
        stopped: why it ended the training; None where it did not.
    """

    def __init__(self, monitor: str | None, warmup: int = 10, siblings: int = 3):
        for name, value, least in (("warmup", warmup, 0), ("siblings", siblings, 1)):
            if value < least:
                raise UserError(f"callbacks.median_stop.{name} is {value}; expected a whole number from {least} on")
        self.monitor, self.warmup, self.siblings = monitor or "", warmup, siblings
        self.best = math.inf
        self.stopped: str | None = None
        self._questions: dict[Path, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_monitor("median_stop", self.monitor, trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or getattr(trainer, "fast_dev_run", False):
            return
        value = float(trainer.callback_metrics[self.monitor])
        self.best = value if value < self.best else self.best  # never nan
        lag = self._lag(Path(trainer.default_root_dir), trainer.current_epoch) if trainer.is_global_zero else None
        self.stopped = trainer.strategy.broadcast(lag)  # the others may see other files
        if self.stopped:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "stopped": self.stopped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.stopped = state_dict["best"], state_dict["stopped"]

    def _lag(self, run_dir: Path, epoch: int) -> str | None:
        """Why the run is to be ended after this epoch."""
        if epoch < self.warmup:
            return None
        bests = []
        for sibling in self._siblings(run_dir):
            with suppress(UserError):  # a damaged file of another run is no reason to end this one
                if (best := best_until(sibling / "metrics.csv", self.monitor, epoch)) is not None:
                    bests.append(best)
        if len(bests) < self.siblings or self.best <= median(bests):
            return None
        return (
            f"median_stop: {self.monitor} {self.best:.4g} at best in {epoch + 1} epochs, and the median of "
            f"{len(bests)} siblings {median(bests):.4g}"
        )

    def _siblings(self, run_dir: Path) -> list[Path]:
        sweep = run_dir.parent
        if not any((sweep / name).is_file() for name in ("sweep.json", "multirun.yaml")):
            return []  # runs of one name that have nothing else to do with each other
        others = [path.parent for path in sorted(sweep.glob("*/metrics.csv")) if path.parent.name != run_dir.name]
        own = self._question(run_dir)
        return [] if own is None else [other for other in others if self._question(other) == own]

    def _question(self, run_dir: Path) -> Any:
        """What runs must agree in to be compared; None where its files are damaged.

        Written once in every run's folder, before its first metrics.
        """
        if run_dir not in self._questions:
            self._questions[run_dir] = _asked(run_dir)
        return self._questions[run_dir]


def _asked(run_dir: Path) -> Any:
    with suppress(UserError, KeyError, TypeError):
        told: dict[str, str] = {"expected": "what a run wrote of itself", "remedy": "put back a copy that is whole"}
        conf = read_yaml(run_dir / "config.yaml", **told)
        data = {key: conf["data"][key] for key in ("labels", "normalisation")}
        val = read_json(run_dir / "split.json", **told)["val"]
        return conf["monitor"], sorted(val), data, _without_numbers(conf["model"])
    return None


def _without_numbers(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _without_numbers(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_without_numbers(value) for value in node]
    return 0 if isinstance(node, int | float) and not isinstance(node, bool) else node
