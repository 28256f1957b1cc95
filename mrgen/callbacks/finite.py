"""A loss that is not finite ends the run as failed: whatever is learned from it is worth nothing."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from mrgen.errors import UserError

__all__ = ["FiniteLoss", "are_finite"]

HIGHEST_RATE = 1e30  # divided by a bias correction it is still a number of single precision

LAST = Path("checkpoints", "last.ckpt")


def are_finite(weights: Iterable[Tensor]) -> bool:
    """Whether all numbers of all of them are; whole numbers are. Their device is asked once."""
    # The least and the greatest tell of all, and take no memory.
    ends = [
        torch.isfinite(torch.stack(torch.aminmax(weight.detach()))).all()
        for weight in weights
        if weight.is_floating_point() and weight.numel()
    ]
    return not ends or bool(torch.stack(ends).all())


class FiniteLoss(Callback):
    """Ends a training whose losses or weights are not finite, on all ranks together, before it saves anything of them.

    Losses are what the step returns and what it logs as ``train/…``, so that methods with several optimizers are served
    as well. On a processor they are looked at after every step; a GPU notes the first bad step by itself, and is asked
    every ``log_every_n_steps`` and at the epoch's end. ``val/loss`` is looked at behind every validation, and the
    weights before every checkpoint.

    Gradients are nobody's business here: under mixed precision a step whose gradients overflow is left out, by design.
    """

    def __init__(self) -> None:
        self._first: Tensor | None = None  # the first step whose loss was not finite, as metrics.csv counts; -1: none

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
        if others := [rate for rate in rates if not 0 <= rate <= HIGHEST_RATE]:
            raise UserError(
                f"the learning rate is {others[0]}; expected one of 0 to {HIGHEST_RATE:g}, with which an optimizer can "
                "count; lower model.lr"
            )
        self._first = torch.full((), -1, dtype=torch.int64, device=pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._first is not None
        loop = trainer.fit_loop.epoch_loop
        logged = (metric for metric in loop._results.values() if metric.meta.name.startswith("train/"))
        # Sums over the epoch: one that is not finite stays so.
        losses = [metric.value.detach() for metric in logged if metric.is_tensor and metric.meta.is_mean_reduction]
        if isinstance(outputs, Mapping) and isinstance(loss := outputs.get("loss"), Tensor):
            losses.append(loss.detach().float())
        if losses:
            finite = torch.isfinite(torch.stack([loss.to(self._first.device) for loss in losses])).all()
            self._first = torch.where((self._first < 0) & ~finite, loop._batches_that_stepped, self._first)
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self._first.device.type == "cpu" or (batch_idx + 1) % every == 0:
            self._look(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer, pl_module)

    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = -1 if self._first is None else int(self._first)
        if trainer.strategy.reduce_boolean_decision(step >= 0, all=False):
            where = f"in step {step}" if step >= 0 else "on another device"
            raise UserError(_diverged(trainer, pl_module, f"the loss is not finite {where}"))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss = trainer.callback_metrics.get("val/loss")
        bad = not trainer.sanity_checking and loss is not None and not bool(torch.isfinite(loss))
        if trainer.strategy.reduce_boolean_decision(bad, all=False):
            step = trainer.fit_loop.epoch_loop._batches_that_stepped
            raise UserError(_diverged(trainer, pl_module, f"val/loss is not finite after step {step}"))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Raises UserError for weights that are not finite, in the place of a checkpoint of them."""
        if not are_finite(checkpoint["state_dict"].values()):
            raise UserError(_diverged(trainer, pl_module, "weights are not finite"))


def _diverged(trainer: Trainer, pl_module: LightningModule, what: str) -> str:
    """What was found, what is left, and what to try."""
    last = Path(trainer.default_root_dir) / LAST
    saved = f"the last good checkpoint is {last}" if last.is_file() else "there is no checkpoint of before"
    tries = ["a lower model.lr"]
    if pl_module.automatic_optimization:
        tries.append("+trainer.gradient_clip_val=1")
    if str(trainer.precision) != "32-true":
        tries.append("trainer.precision=32-true")
    return (
        f"{what} (epoch {trainer.current_epoch + 1}): the training has diverged; {saved}. Train anew with "
        f"{' or '.join(tries)}, or look for values in the data that no scan has"
    )
