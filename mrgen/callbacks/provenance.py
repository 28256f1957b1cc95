"""What a checkpoint says of itself, in plain containers that ``weights_only=True`` loads."""

from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

__all__ = ["KEY", "Provenance"]

KEY = "mrgen"


class Provenance(Callback):
    """Stores with every checkpoint how to build the model again, what its numbers mean and how long it was trained.

    ``training`` is added to the content: ``epochs``, ``steps`` (batches, whatever the number of optimizers) and
    ``devices``, each of which had its own batch a step.

    Args:
        content: plain containers: ``version``, the resolved ``model`` config, ``data`` (modalities, labels,
            normalisation, intensity scales).
    """

    def __init__(self, content: dict[str, Any]):
        self.content = content

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        training = {
            "epochs": trainer.current_epoch + 1,
            # Not global_step, which counts every optimizer of a GAN.
            "steps": trainer.fit_loop.epoch_loop._batches_that_stepped,
            "devices": trainer.world_size,
        }
        checkpoint[KEY] = {**self.content, "training": training}
