"""Ends a training whose monitor does not improve any more."""

from typing import Any

import pytorch_lightning.callbacks
from pytorch_lightning import LightningModule, Trainer

from mrgen.errors import UserError

__all__ = ["EarlyStopping", "check_logged", "check_monitor"]


def check_logged(monitor: str, module: Any) -> None:
    """Raises UserError for a monitor that a method's validation does not log."""
    names = [f"val/{name}" for name in module.val_means]
    if monitor not in names:
        raise UserError(f"monitor is {monitor}; {type(module).__name__} logs {', '.join(names)}: choose one of these")


def check_monitor(name: str, monitor: str | None, trainer: Any, module: LightningModule) -> None:
    """Raises UserError where a callback cannot follow the monitor, before the first batch.

    Args:
        name: of the callback, in the group ``callbacks``.
        monitor: a metric of validation whose least value is best, or None.
        trainer: with the datamodule.
        module: what is trained.
    """
    if not monitor:
        raise UserError(
            f"callbacks={name} follows the monitor, and this preset has none: its last epoch counts; set "
            f"monitor=val/loss (and data.split.val, where that is 0), or leave {name} out"
        )
    if not trainer.datamodule.split.val:
        raise UserError(
            f"callbacks={name} follows {monitor}, and data.split.val=0 leaves nobody to validate on; raise it, or "
            f"leave {name} out"
        )
    if trainer.limit_val_batches == 0:
        raise UserError(
            f"callbacks={name} follows {monitor}, and trainer.limit_val_batches=0 (trainer=debug) validates nothing; "
            f"leave {name} out"
        )
    if (stages := getattr(module, "stages", 1)) > 1:
        raise UserError(
            f"callbacks={name} would end {type(module).__name__} in the first of its {stages} stages; leave {name} out"
        )
    check_logged(monitor, module)


class EarlyStopping(pytorch_lightning.callbacks.EarlyStopping):
    """Lightning's, of the run's monitor; also ends a training whose monitor is not finite.

    Args:
        monitor: a metric of validation, whose least value is best.
        patience: validations without improvement until the end.
        min_delta: the least improvement that counts.

    Raises:
        UserError: a patience below 1.

    Attributes:
        stopped: why it ended the training; None where it did not.
    """

    def __init__(self, monitor: str | None, patience: int = 20, min_delta: float = 0.0):
        if patience < 1:
            raise UserError(f"callbacks.early_stopping.patience is {patience}; expected a whole number from 1 on")
        # None is refused in setup(), where it is known what is trained.
        super().__init__(monitor or "", patience=patience, min_delta=min_delta, check_on_train_epoch_end=False)

    @property
    def stopped(self) -> str | None:
        if self.stopping_reason_message is None:
            return None
        return f"early_stopping: {self.stopping_reason_message.removesuffix(' Signaling Trainer to stop.')}"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            check_monitor("early_stopping", self.monitor, trainer, pl_module)
        super().setup(trainer, pl_module, stage)
