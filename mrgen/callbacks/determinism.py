"""Random numbers that are functions of (seed, step), so that a resumed run draws what an uninterrupted one would."""

from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer

__all__ = ["SeedSteps"]


class SeedSteps(Callback):
    """Seeds torch's generators before every training step and validation, from the run's seed, the step and the rank.

    Dropout is the main consumer. Nothing has to be stored in a checkpoint.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._seed(trainer, batch_idx)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seed(trainer, 2**32 - 1)  # no batch has this number

    def _seed(self, trainer: Trainer, number: int) -> None:
        entropy = [self.seed, trainer.global_step, number, trainer.global_rank]
        words = np.random.SeedSequence(entropy).generate_state(2)
        torch.manual_seed(int(words[0]) << 31 ^ int(words[1]))
