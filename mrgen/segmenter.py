"""The downstream segmenter that papers are judged by: one LightningModule around any segmentation network.

With ``mrgen.nets.unet3d.SegmentationUNet3d`` it is S-Net (RS-Net, section 3), "similar to RS-Net but modified such that
the synthesis convolution block is removed", trained once on four real sequences and never on a synthetic one.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from mrgen.data.batch import Batch, volumes
from mrgen.losses.segmentation import class_weights, weighted_cross_entropy
from mrgen.metrics.means import SubjectMeans
from mrgen.metrics.segmentation import region_dice
from mrgen.protocols import Segmentation, Volumes

__all__ = ["SegmenterModule"]


class SegmenterModule(LightningModule):
    """Trains a network with class-weighted cross-entropy.

    Args:
        net: called with ``in_channels`` and ``classes``, returns the network: (B, in_channels, X, Y, Z) to logits
            (B, classes, X, Y, Z); its ``divisor`` is what every axis must be a multiple of.
        modalities: the batch's sequences, all of which are inputs.
        classes: names of the classes, background first.
        regions: evaluation regions and their classes.
        class_weight_decay, class_weight_cap: of the class weights, see ``mrgen.losses.segmentation.class_weights``.
        lr, betas: of Adam.
        lr_step, lr_gamma: the learning rate is multiplied by ``lr_gamma`` every ``lr_step`` epochs.
    """

    def __init__(
        self,
        *,
        net: Callable[..., nn.Module],
        modalities: Sequence[str],
        classes: Sequence[str],
        regions: Mapping[str, Sequence[int]],
        class_weight_decay: float = 1.0,
        class_weight_cap: float = 1000.0,
        lr: float = 2e-4,
        betas: Sequence[float] = (0.9, 0.999),
        lr_step: int = 50,
        lr_gamma: float = 0.75,
    ):
        super().__init__()
        self.modalities = self.sources = tuple(modalities)
        self.net = net(in_channels=len(self.sources), classes=len(classes))
        self.divisor = int(getattr(self.net, "divisor", 1))
        self.regions = {name: list(members) for name, members in regions.items()}
        self.class_weight_decay, self.class_weight_cap = class_weight_decay, class_weight_cap
        self.lr, self.betas, self.lr_step, self.lr_gamma = lr, (betas[0], betas[1]), lr_step, lr_gamma
        self.class_counts: Tensor
        self.register_buffer("class_counts", torch.ones(len(classes)), persistent=False)
        names = ["loss", *(f"dice_{region}" for region in self.regions)]
        self.val_means = SubjectMeans(names)

    def forward(self, volumes: Volumes) -> Tensor:
        """Class logits (B, C, X, Y, Z)."""
        return self.net(torch.cat([volumes[name] for name in self.sources], dim=1)).float()

    def losses(self, batch: Batch, weights: Tensor | None) -> dict[str, Tensor]:
        """``loss`` and ``logits``; ``weights`` (C,) or None for uniform weights."""
        logits = self(volumes(batch, self.modalities))
        return {"loss": weighted_cross_entropy(logits, batch["label"], weights), "logits": logits}

    def on_fit_start(self) -> None:
        counts = self.trainer.datamodule.class_counts()  # type: ignore[attr-defined]
        self.class_counts.copy_(torch.tensor(counts, dtype=torch.float32))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        weights = class_weights(
            self.class_counts, epoch=self.current_epoch, decay=self.class_weight_decay, cap=self.class_weight_cap
        )
        loss = self.losses(batch, weights)["loss"]
        size = batch["image"].shape[0]
        self.log("train/loss", loss, on_epoch=True, prog_bar=True, batch_size=size, sync_dist=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        losses = self.losses(batch, weights=None)  # uniform: epochs compare whatever the schedule of the weights
        dice = region_dice(losses["logits"].argmax(dim=1), batch["label"], self.regions)
        self.val_means.add({"loss": losses["loss"], **{f"dice_{region}": value for region, value in dice.items()}})

    def on_validation_epoch_end(self) -> None:
        for name, mean in self.val_means.take().items():
            self.log(f"val/{name}", mean, prog_bar=name == "loss")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr, betas=self.betas)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=self.lr_step, gamma=self.lr_gamma)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}

    @torch.no_grad()
    def segment(self, volumes: Volumes) -> Segmentation:
        """Labels and probabilities of whole volumes."""
        logits = self(volumes)
        return Segmentation(labels=logits.argmax(dim=1), probabilities=logits.softmax(dim=1))
