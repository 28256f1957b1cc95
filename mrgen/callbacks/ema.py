"""An exponential moving average of the networks, which is validated and saved in their place."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from mrgen.errors import UserError

__all__ = ["EMA"]


class EMA(WeightAveraging):
    """After batch k: average ← d · average + (1 − d) · weights, d = min(``decay``, (1 + k) / (10 + k)).

    The first batch's weights are the first average. With ``decay`` alone, short trainings would show little but them.

    Validation sees the average, and a checkpoint's ``state_dict`` holds it, so that whoever loads the run has it;
    ``current_model_state`` beside it is what training goes on from. Running statistics of batch norms are averaged as
    the weights are, which they belong to.

    As they are, and not averaged, stay networks with ``discriminator`` in their name, which nobody judges by; those in
    evaluation mode, which are frozen; whole numbers, and the module's own buffers. Where a training has several stages
    (the module's buffer ``stage``), each begins a new average, because it trains other networks.

    Args:
        decay: d, from 0 to below 1.

    Raises:
        UserError: it is anything else.
    """

    def __init__(self, decay: float = 0.999):
        if not 0 <= decay < 1:
            raise UserError(f"callbacks.ema.decay is {decay}; expected a number from 0 to below 1, such as 0.999")
        super().__init__(use_buffers=True, multi_avg_fn=self._average)
        self.decay = decay
        self._shown = False  # the average is in the module, and the weights where the average was

    def _average(self, averages: list[Tensor], weights: list[Tensor], count: Tensor) -> None:
        """One update in place, of tensors of one kind; ``count`` went before."""
        if not averages[0].is_floating_point():
            torch._foreach_copy_(averages, weights)
            return
        k = int(count)
        torch._foreach_lerp_(averages, weights, 1 - min(self.decay, (1 + k) / (10 + k)))

    @property
    def _averaged(self) -> LightningModule:
        assert self._average_model is not None
        module = self._average_model.module
        assert isinstance(module, LightningModule)
        return module

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(self._average_model, AveragedModel)
        self._average_model.to(pl_module.device)  # it was made before the module went to its device

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        assert self._average_model is not None
        stage = getattr(pl_module, "stage", None)
        if isinstance(stage, Tensor) and not torch.equal(stage, self._averaged.get_buffer("stage")):
            self._average_model.n_averaged.zero_()
        super().on_train_batch_end(trainer, pl_module, *batch)
        for name, net in pl_module.named_children():
            if "discriminator" in name or not net.training:
                self._averaged.get_submodule(name).load_state_dict(net.state_dict())
        for average, buffer in zip(self._averaged.buffers(False), pl_module.buffers(False), strict=True):
            average.copy_(buffer)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_epoch_start(trainer, pl_module)
        self._shown = True

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: the module's own hook comes after those of callbacks, and may keep the weights that it judged."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._hide(pl_module)

    @contextmanager
    def shown(self, pl_module: LightningModule) -> Iterator[None]:
        """The average in the module, for who looks at it between validations."""
        self._swap_models(pl_module)
        try:
            yield
        finally:
            self._swap_models(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._hide(pl_module)  # before anybody saves

    def _hide(self, pl_module: LightningModule) -> None:
        if self._shown:
            self._swap_models(pl_module)
        self._shown = False
