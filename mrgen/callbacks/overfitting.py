"""The same batches in every epoch, to see whether a network learns at all."""

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.combined_loader import CombinedLoader

__all__ = ["SameBatches"]


class SameBatches(Callback):
    """Every epoch begins as the first one did: same samples, same crops, same augmentation.

    All three follow from the sampler's epoch. Lightning's own ``overfit_batches`` would replace the samplers.
    """

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for loader in CombinedLoader(trainer.train_dataloader).flattened:  # of unpaired sequences there are several
            loader.sampler.set_epoch(0)
