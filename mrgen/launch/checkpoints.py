"""How checkpoints are written."""

from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import TorchCheckpointIO

from mrgen.files import replacing

__all__ = ["WholeCheckpoints"]


class WholeCheckpoints(TorchCheckpointIO):
    """Every checkpoint is whole at every moment.

    Lightning's own are written to the system's folder of temporary files and moved from there, which is a copy, and can
    be cut short, where the run's folder is on another file system.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Raises UserError where the disk is full; the checkpoint that was there before stays."""
        if storage_options is not None:
            raise TypeError("checkpoints are files; found storage_options")
        with replacing(Path(path)) as file:
            torch.save(checkpoint, file)
