"""A run ends that lags behind the median of its siblings, and no other."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from mrgen.callbacks.early_stopping import EarlyStopping
from mrgen.callbacks.median_stop import MedianStop, best_until
from mrgen.errors import UserError

MODEL = {"_target_": "mrgen.papers.rsnet.RSNet", "target": "t2", "segment": True, "lr": 2e-4, "betas": [0.9, 0.999]}
DATA = {"labels": "regions", "normalisation": {"_target_": "ZScore"}}


def run(sweep: Path, name: str, values: Sequence[float], **changes: Any) -> Path:
    """The folder of a run that validated once an epoch."""
    folder = sweep / name
    folder.mkdir(parents=True)
    conf = {
        "monitor": "val/loss",
        "model": MODEL,
        "data": {"labels": "regions", "normalisation": {"_target_": "ZScore"}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump({**conf, **changes}))
    (folder / "split.json").write_text(json.dumps({"train": ["a"], "val": changes.get("val", ["b", "c"]), "test": []}))
    rows = [f"{epoch},{10 * epoch},1.0,\n{epoch},{10 * epoch + 9},1.0,{v}\n" for epoch, v in enumerate(values)]
    (folder / "metrics.csv").write_text("epoch,step,train/loss_step,val/loss\n" + "".join(rows))
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    folder = tmp_path / "sweep"
    folder.mkdir()
    (folder / "sweep.json").write_text("[]")
    return folder


class Strategy:
    """Another rank hears what the first one decided."""

    def broadcast(self, value: Any) -> Any:
        return value


def ends_at(rule: MedianStop, run_dir: Path, values: Sequence[float], rank: int = 0) -> int | None:
    """The epoch after which the rule ends a run with these values."""
    for epoch, value in enumerate(values):
        trainer = SimpleNamespace(
            **{"sanity_checking": False, "callback_metrics": {"val/loss": torch.tensor(value)}, "should_stop": False},
            **{"is_global_zero": rank == 0, "default_root_dir": str(run_dir), "current_epoch": epoch},
            strategy=Strategy(),
        )
        rule.on_validation_end(trainer, None)  # type: ignore[arg-type]
        if trainer.should_stop:
            return epoch
    return None


def test_the_best_value_so_far_counts_and_not_the_last(tmp_path: Path):
    metrics = run(tmp_path, "a", [3.0, 1.0, 2.0, math.nan]) / "metrics.csv"
    assert [best_until(metrics, "val/loss", epoch) for epoch in range(5)] == [3.0, 1.0, 1.0, 1.0, None]
    assert best_until(run(tmp_path, "b", [math.nan]) / "metrics.csv", "val/loss", 0) == math.inf
    assert best_until(tmp_path / "c" / "metrics.csv", "val/loss", 0) is None
    assert best_until(metrics, "val/dice", 0) is None


def test_a_run_below_the_median_ends_and_says_why(sweep: Path):
    for name, values in {"0": [5, 4, 3], "1": [5, 3, 2], "2": [5, 2, 1]}.items():
        run(sweep, name, values)
    own = run(sweep, "3", [])
    rule = MedianStop("val/loss", warmup=0, siblings=3)
    assert ends_at(rule, own, [5.0, 3.5, 1.0]) == 1  # medians 5, 3, 2
    assert rule.stopped == "median_stop: val/loss 3.5 at best in 2 epochs, and the median of 3 siblings 3"
    assert ends_at(MedianStop("val/loss", warmup=0, siblings=3), own, [4.0, 9.0, 2.0]) == 1  # 4 is its best
    assert ends_at(MedianStop("val/loss", warmup=0, siblings=3), own, [3.0, 9.0, 2.0]) is None  # as good is no worse
    assert ends_at(MedianStop("val/loss", warmup=0, siblings=3), own, [math.nan]) == 0


def test_nothing_ends_in_the_warmup_or_before_enough_siblings_have_come_as_far(sweep: Path):
    run(sweep, "0", [1, 1, 1, 1])
    run(sweep, "1", [1, 1, 1])
    own = run(sweep, "2", [])
    bad = [9.0] * 5
    assert ends_at(MedianStop("val/loss", warmup=2, siblings=2), own, bad) == 2
    assert ends_at(MedianStop("val/loss", warmup=3, siblings=2), own, bad) is None
    assert ends_at(MedianStop("val/loss", warmup=3, siblings=1), own, bad) == 3
    assert ends_at(MedianStop("val/loss", warmup=0, siblings=3), own, bad) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"monitor": "val/dice"},
        {"val": ["b", "d"]},
        {"model": {**MODEL, "target": "flair"}},
        {"model": {**MODEL, "segment": False}},
        {"data": {**DATA, "labels": "native"}},
        {"data": {**DATA, "normalisation": {"_target_": "MinMax"}}},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_runs_that_answer_another_question_are_no_siblings(sweep: Path, changes: dict[str, Any]):
    run(sweep, "0", [1.0], **changes)
    own = run(sweep, "1", [], model={**MODEL, "lr": 1.0, "betas": [0.5, 0.9]})
    assert ends_at(MedianStop("val/loss", warmup=0, siblings=1), own, [9.0]) is None
    run(sweep, "2", [1.0])  # another learning rate alone
    assert ends_at(MedianStop("val/loss", warmup=0, siblings=1), own, [9.0]) == 0


def test_runs_outside_a_sweep_have_no_siblings(tmp_path: Path):
    run(tmp_path, "yesterday", [1.0])
    own = run(tmp_path, "today", [])
    assert ends_at(MedianStop("val/loss", warmup=0, siblings=1), own, [9.0]) is None


def test_the_first_rank_decides(sweep: Path):
    run(sweep, "0", [1.0])
    assert ends_at(MedianStop("val/loss", warmup=0, siblings=1), run(sweep, "1", []), [9.0], rank=1) is None


def test_a_resumed_run_knows_its_best(sweep: Path):
    run(sweep, "0", [2.0, 2.0])
    own = run(sweep, "1", [])
    rule, again = (MedianStop("val/loss", warmup=0, siblings=1) for _ in range(2))
    assert ends_at(rule, own, [1.0]) is None
    again.load_state_dict(rule.state_dict())
    assert ends_at(again, own, [9.0]) is None  # 1 is still the best


@pytest.mark.parametrize("cls", [MedianStop, EarlyStopping])
def test_without_a_monitor_that_can_be_followed_a_run_is_refused(cls: type):
    def setup(monitor: str | None, val: Sequence[str], stages: int = 1) -> None:
        trainer = SimpleNamespace(datamodule=SimpleNamespace(split=SimpleNamespace(val=val)), limit_val_batches=1.0)
        cls(monitor).setup(trainer, SimpleNamespace(stages=stages, val_means={"loss": 0, "dice": 0}), "fit")

    name = "early_stopping" if cls is EarlyStopping else "median_stop"
    with pytest.raises(UserError, match=rf"callbacks={name} follows the monitor, and this preset has none"):
        setup(None, ["a"])
    with pytest.raises(UserError, match=r"data\.split\.val=0 leaves nobody to validate on"):
        setup("val/loss", [])
    with pytest.raises(UserError, match=r"in the first of its 2 stages"):
        setup("val/loss", ["a"], stages=2)
    with pytest.raises(UserError, match=r"monitor is val/los; .* logs val/loss, val/dice: choose one of these"):
        setup("val/los", ["a"])


@pytest.mark.parametrize(
    ("cls", "name", "least"), [(MedianStop, "warmup", 0), (MedianStop, "siblings", 1), (EarlyStopping, "patience", 1)]
)
def test_numbers_that_cannot_be_are_a_sentence(cls: type, name: str, least: int):
    cls("val/loss", **{name: least})
    with pytest.raises(UserError, match=rf"\.{name} is {least - 1}; expected a whole number from {least} on"):
        cls("val/loss", **{name: least - 1})
