"""Random numbers that are functions of (seed, step), so that a resumed run draws what an uninterrupted one would."""

from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer

__all__ = ["SeedSteps"]


class SeedSteps(Callback):
    """Seeds torch's generators before every training step, from the run's seed, the step and the rank.

    Dropout is the main consumer. Nothing has to be stored in a checkpoint.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        words = np.random.SeedSequence([self.seed, trainer.global_step, batch_idx, trainer.global_rank]).generate_state(
            2
        )
        torch.manual_seed(int(words[0]) << 31 ^ int(words[1]))
