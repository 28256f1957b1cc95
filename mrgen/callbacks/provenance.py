"""What a checkpoint says of itself, in plain containers that ``weights_only=True`` loads."""

from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

__all__ = ["KEY", "Provenance"]

KEY = "mrgen"


class Provenance(Callback):
    """Stores with every checkpoint how to build the model again and what its numbers mean.

    Args:
        content: plain containers: ``version``, the resolved ``model`` config, ``data`` (modalities, labels,
            normalisation, intensity scales).
    """

    def __init__(self, content: dict[str, Any]):
        self.content = content

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = self.content
