"""The same batches in every epoch, to see whether a network learns at all."""

from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

__all__ = ["SameBatches"]


class SameBatches(Callback):
    """Every epoch begins as the first one did: same samples, same crops, same augmentation.

    All three follow from the sampler's epoch. Lightning's own ``overfit_batches`` would replace the samplers.
    """

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loaders: Any = trainer.train_dataloader
        for loader in getattr(loaders, "flattened", [loaders]):
            loader.sampler.set_epoch(0)
