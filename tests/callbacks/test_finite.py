"""A training that has diverged ends as failed, and saves nothing of it."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from mrgen.callbacks.finite import FiniteLoss
from mrgen.errors import UserError
from mrgen.papers.rsnet import RSNet
from tests.launch.tools import composed, tiny_run


@contextmanager
def spoilt(method: str, when: Callable[[Any], bool], spoil: Callable[[Any, Any], Any]) -> Iterator[None]:
    """RS-Net, one of whose methods goes wrong."""
    as_it_is = getattr(RSNet, method)

    def wrong(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = as_it_is(self, *args, **kwargs)
        return spoil(self, result) if when(self) else result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RSNet, method, wrong)
        yield


def at(epoch: int, batch: int) -> Callable[[Any], bool]:
    def now(module: Any) -> bool:
        progress = module.trainer.fit_loop.epoch_loop.batch_progress.current
        return module.training and (module.current_epoch, progress.ready - 1) == (epoch, batch)

    return now


def infinite(module: Any, losses: dict[str, Any]) -> dict[str, Any]:
    return {**losses, "loss": losses["loss"] * torch.inf}


def test_a_loss_that_is_not_finite_ends_the_run_as_failed(tmp_path: Path, phantom_store: Path):
    run, told = (
        tmp_path / "run",
        r"the loss is not finite in step (\d+) \(epoch 2\).*last good checkpoint is .*last.ckpt",
    )
    with spoilt("losses", at(1, 1), infinite), pytest.raises(UserError, match=told) as raised:
        tiny_run(run, phantom_store, "trainer.max_epochs=3", "data.steps_per_epoch=3")
    assert "in step 4 " in str(raised.value)  # from 0 on: three of the first epoch, and the second of the next one
    assert "a lower model.lr or +trainer.gradient_clip_val=1, or look" in str(raised.value)
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed"
    assert "not finite in step 4" in status["reason"]
    for name in ("last", "best"):
        saved = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert saved["epoch"] == 0
        assert all(torch.isfinite(weight).all() for weight in saved["state_dict"].values())


def test_nothing_is_saved_of_weights_that_are_not_finite(tmp_path: Path, phantom_store: Path):
    """The last step's gradients can spoil them, when its loss was still finite."""

    def spoil(module: Any, result: Any) -> Any:
        with torch.no_grad():
            next(module.parameters())[0] = torch.nan
        return result

    run = tmp_path / "run"
    told = r"weights are not finite \(epoch 1\).*there is no checkpoint of before"
    with (
        spoilt("on_validation_epoch_end", lambda module: not module.trainer.sanity_checking, spoil),
        pytest.raises(UserError, match=told),
    ):
        tiny_run(run, phantom_store)
    assert not [*(run / "checkpoints").glob("*")]


def test_a_validation_that_is_not_finite_is_never_the_best(tmp_path: Path, phantom_store: Path):
    def spoil(module: Any, losses: dict[str, Any]) -> dict[str, Any]:
        return losses if module.training else {**losses, "loss": losses["loss"] * torch.nan}

    run = tmp_path / "run"
    told = "val/loss is not finite after step"
    with spoilt("losses", lambda module: not module.training, spoil), pytest.raises(UserError, match=told):
        tiny_run(run, phantom_store)
    assert not (run / "checkpoints" / "best.ckpt").exists()


def test_gradients_that_overflow_are_no_reason_to_end(tmp_path: Path, phantom_store: Path):
    """Under mixed precision the scaler leaves out their step; here the optimizer does, as it would."""

    def overflow(module: Any, result: Any) -> Any:
        next(module.parameters()).register_hook(lambda gradient: gradient * torch.inf)
        return result

    @contextmanager
    def skipping() -> Iterator[None]:
        step = torch.optim.Adam.step

        def scaled(self: Any, closure: Any = None) -> Any:
            loss = closure()
            grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            if all(torch.isfinite(grad).all() for grad in grads):
                step(self)
            return loss

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.Adam, "step", scaled)
            yield

    with skipping(), spoilt("on_fit_start", lambda module: True, overflow):
        tiny_run(tmp_path / "run", phantom_store)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"


def test_methods_that_step_by_themselves_are_watched_as_well(
    tmp_path: Path, phantom_store: Path, monkeypatch: pytest.MonkeyPatch
):
    from mrgen.launch.training import train
    from mrgen.papers.pix2pix import Pix2Pix

    step = Pix2Pix.training_step

    def wrong(self: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            batch = {**batch, "image": batch["image"] * torch.nan}
        step(self, batch, batch_idx)

    run = tmp_path / "run"
    run.mkdir()
    conf = composed("train", "experiment=smoke/pix2pix", f"data.store='{phantom_store}'", "tracking=csv")
    monkeypatch.setattr(Pix2Pix, "training_step", wrong)
    with pytest.raises(
        UserError, match=r"not finite in step 1 .*a lower model\.lr( or trainer\.precision=32-true)?, or look"
    ):
        train(conf, run)
    assert not (run / "checkpoints" / "best.ckpt").exists()


def test_ranks_end_together(tmp_path: Path):
    """One whose own loss is finite ends as well, because another one's is not."""
    from types import SimpleNamespace

    strategy = SimpleNamespace(reduce_boolean_decision=lambda own, all: True)
    trainer: Any = SimpleNamespace(
        strategy=strategy, default_root_dir=str(tmp_path), current_epoch=0, precision="32-true"
    )
    with pytest.raises(UserError, match="the loss is not finite on another device"):
        FiniteLoss().on_train_epoch_end(trainer, pl.LightningModule())
