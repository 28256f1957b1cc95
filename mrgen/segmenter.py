"""The downstream segmenter that papers are judged by: one LightningModule around any segmentation network.

With ``mrgen.nets.unet3d.SegmentationUNet3d`` it is S-Net (RS-Net, section 3), "similar to RS-Net but modified such that
the synthesis convolution block is removed", trained once on four real sequences and never on a synthetic one. With
``mrgen.nets.deepmedic.DeepMedic`` it is the judge of Baldini et al., trained on segments; with the two-dimensional
``mrgen.nets.samr.SegmentationUNet2d`` that of Guo et al., trained on slices.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from mrgen.data.batch import Batch, volumes
from mrgen.errors import UserError
from mrgen.losses.segmentation import class_weights, weighted_cross_entropy
from mrgen.metrics.means import SubjectMeans
from mrgen.metrics.segmentation import region_dice
from mrgen.protocols import Segmentation, Volumes

__all__ = ["SegmenterModule"]


class SegmenterModule(LightningModule):
    """Trains a network with cross entropy.

    Args:
        net: called with ``in_channels`` and ``classes``, returns the network: (B, in_channels, X, Y, Z) to logits
            (B, classes, X, Y, Z), or both without Z. It may say its ``divisor``, what every axis must be a multiple
            of; its ``margin``, voxels that the logits lose on each side; its ``reach`` and its ``grid``, see below.
        modalities: the batch's sequences, all of which are inputs.
        classes: names of the classes, background first.
        regions: evaluation regions and their classes.
        class_weighted: weighs rare classes more; False where the sampling balances them.
        class_weight_decay, class_weight_cap: of the class weights, see ``mrgen.losses.segmentation.class_weights``.
        optimizer: ``adam`` or ``rmsprop``.
        lr: the learning rate.
        betas: of Adam.
        rho, eps, momentum: of RMSProp: decay of the mean square g², what is added to its root, and the decay of the
            velocity. It is PyTorch's, velocity ← momentum · velocity + gradient / (√g² + eps); see
            ``conf/model/deepmedic.yaml`` for how DeepMedic's differs.
        lr_step, lr_gamma: the learning rate is multiplied by ``lr_gamma`` every ``lr_step`` epochs,
        lr_milestones: or after these numbers of epochs, where they are given;
        constant_epochs, decay_epochs: or, where these are, it is constant at first and then falls linearly towards 0.
        l1, l2: weights of the sums of |w| and w² over the weights of all convolutions, which training adds to the loss.
            What is logged and validated is the cross entropy alone.

    Attributes:
        margin: of the network, 0 without. Training and validation compare with the middle of the label.
        divisor: what every axis of a training crop must be a multiple of.
        reach: how many voxels away an input can still change an output, or None where there is no such bound.
        grid: crops whose corners lie multiples of this apart have equal answers where they overlap; None: ``divisor``.
    """

    def __init__(
        self,
        *,
        net: Callable[..., nn.Module],
        modalities: Sequence[str],
        classes: Sequence[str],
        regions: Mapping[str, Sequence[int]],
        class_weighted: bool = True,
        class_weight_decay: float = 1.0,
        class_weight_cap: float = 1000.0,
        optimizer: Literal["adam", "rmsprop"] = "adam",
        lr: float = 2e-4,
        betas: Sequence[float] = (0.9, 0.999),
        rho: float = 0.9,
        eps: float = 1e-8,
        momentum: float = 0.0,
        lr_step: int = 50,
        lr_gamma: float = 0.75,
        lr_milestones: Sequence[int] | None = None,
        constant_epochs: int | None = None,
        decay_epochs: int = 0,
        l1: float = 0.0,
        l2: float = 0.0,
    ):
        super().__init__()
        if optimizer not in ("adam", "rmsprop"):
            raise UserError(f"model.optimizer is {optimizer!r}; expected adam or rmsprop")
        self.modalities = self.sources = tuple(modalities)
        self.net = net(in_channels=len(self.sources), classes=len(classes))
        self.margin = int(getattr(self.net, "margin", 0))
        self.divisor = int(getattr(self.net, "divisor", 1))
        self.reach, self.grid = getattr(self.net, "reach", None), getattr(self.net, "grid", None)
        self.regions = {name: list(members) for name, members in regions.items()}
        self.class_weighted = class_weighted
        self.class_weight_decay, self.class_weight_cap = class_weight_decay, class_weight_cap
        self.optimizer, self.lr, self.betas = optimizer, lr, (betas[0], betas[1])
        self.rho, self.eps, self.momentum = rho, eps, momentum
        self.lr_step, self.lr_gamma, self.lr_milestones = lr_step, lr_gamma, lr_milestones
        self.constant_epochs, self.decay_epochs = constant_epochs, decay_epochs
        self.l1, self.l2 = l1, l2
        self.class_counts: Tensor
        self.register_buffer("class_counts", torch.ones(len(classes)), persistent=False)
        names = ["loss", *(f"dice_{region}" for region in self.regions)]
        self.val_means = SubjectMeans(names)

    def forward(self, volumes: Volumes) -> Tensor:
        """Class logits (B, C, X − 2 · margin, …)."""
        return self.net(torch.cat([volumes[name] for name in self.sources], dim=1)).float()

    def losses(self, batch: Batch, weights: Tensor | None) -> dict[str, Tensor]:
        """``loss``, ``logits`` and the ``label`` that they answer for; ``weights`` (C,) or None for uniform weights.

        Raises:
            UserError: the network's margin leaves nothing of the crop.
        """
        crop = tuple(batch["label"].shape[1:])
        if min(crop) <= 2 * self.margin:
            raise UserError(
                f"crops are {crop} voxels and the network's answer loses {self.margin} on each side; "
                f"set data.sampling.size to {2 * self.margin + 1} or more along every axis"
            )
        logits = self(volumes(batch, self.modalities))
        label = F.pad(batch["label"], [-self.margin] * 6)  # (B, X − 2 · margin, …)
        return {"loss": weighted_cross_entropy(logits, label, weights), "logits": logits, "label": label}

    def penalty(self) -> Tensor:
        """l1 · Σ |w| + l2 · Σ w² over the convolutions; all other parameters are vectors or scalars."""
        weights = torch.cat([p.flatten() for p in self.net.parameters() if p.ndim > 1])
        return self.l1 * weights.abs().sum() + self.l2 * weights.square().sum()

    def on_fit_start(self) -> None:
        counts = self.trainer.datamodule.class_counts()  # type: ignore[attr-defined]
        self.class_counts.copy_(torch.tensor(counts, dtype=torch.float32))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        weights = None
        if self.class_weighted:
            weights = class_weights(
                self.class_counts, epoch=self.current_epoch, decay=self.class_weight_decay, cap=self.class_weight_cap
            )
        loss = self.losses(batch, weights)["loss"]
        size = batch["image"].shape[0]
        self.log("train/loss", loss, on_epoch=True, prog_bar=True, batch_size=size, sync_dist=True)
        return loss + self.penalty() if self.l1 or self.l2 else loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        losses = self.losses(batch, weights=None)  # uniform: epochs compare whatever the schedule of the weights
        dice = region_dice(losses["logits"].argmax(dim=1), losses["label"], self.regions)
        self.val_means.add({"loss": losses["loss"], **{f"dice_{region}": value for region, value in dice.items()}})

    def on_validation_epoch_end(self) -> None:
        for name, mean in self.val_means.take().items():
            self.log(f"val/{name}", mean, prog_bar=name == "loss")

    def configure_optimizers(self) -> Any:
        optimizer: torch.optim.Optimizer
        if self.optimizer == "adam":
            optimizer = torch.optim.Adam(self.parameters(), lr=self.lr, betas=self.betas)
        else:
            optimizer = torch.optim.RMSprop(
                self.parameters(), lr=self.lr, alpha=self.rho, eps=self.eps, momentum=self.momentum
            )
        scheduler: torch.optim.lr_scheduler.LRScheduler
        if self.constant_epochs is not None:
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._falling)
        elif self.lr_milestones is None:
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=self.lr_step, gamma=self.lr_gamma)
        else:
            scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(self.lr_milestones), gamma=self.lr_gamma)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}

    def _falling(self, epoch: int) -> float:
        """1 for the constant epochs, then down by equal steps that would reach 0 after the last one."""
        assert self.constant_epochs is not None
        return max(0.0, 1 - max(0, epoch + 1 - self.constant_epochs) / (self.decay_epochs + 1))

    @torch.no_grad()
    def segment(self, volumes: Volumes) -> Segmentation:
        """Labels and probabilities of whole volumes, around which there is background."""
        if self.margin:
            volumes = {name: F.pad(volumes[name], [self.margin] * 6) for name in self.sources}
        logits = self(volumes)
        return Segmentation(labels=logits.argmax(dim=1), probabilities=logits.softmax(dim=1))
