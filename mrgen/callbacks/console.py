"""One line an epoch, for logs that no terminal shows."""

import time

from pytorch_lightning import Callback, LightningModule, Trainer

__all__ = ["EpochLine"]


class EpochLine(Callback):
    """Prints losses and seconds at the end of every training epoch, on the first rank."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = time.monotonic()  # of an epoch that was begun before, its rest

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        metrics = trainer.callback_metrics
        shown = {"train": metrics.get("train/loss_epoch"), "val": metrics.get("val/loss")}
        losses = "  ".join(f"{name} {value:.4f}" for name, value in shown.items() if value is not None)
        seconds = time.monotonic() - self.started
        print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {losses}  {seconds:.1f} s", flush=True)
