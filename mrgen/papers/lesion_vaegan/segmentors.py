"""Segmentors of lesions, each of one sequence: guides of generation, and judges of what it is worth (Qu et al., 2.7).

Every sequence is segmented by itself, by a regression of the one-hot label. The three schemes are those of
``mrgen.nets.lesion_vaegan.LesionSegmentors``. Trained alone, here, they are the judges of Tables 1 and 2.
"""

from collections.abc import Sequence
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor
from torch.nn import functional as F

from mrgen.data.batch import IGNORED, Batch
from mrgen.metrics.means import SubjectMeans
from mrgen.metrics.segmentation import index_dice, index_mse
from mrgen.nets.lesion_vaegan import LesionSegmentors, Scheme
from mrgen.protocols import Segmentation, Volumes

__all__ = ["LesionSegmentation", "check_class_weights", "lesion_loss"]


def lesion_loss(scores: Tensor, label: Tensor, class_weights: Sequence[float], index_weight: float) -> Tensor:
    """Σ ‖label_i − label_{r,i}‖² over the sequences (``loss_{lesion,1}``, ``loss_{lesion,2}``, ``loss_segmentation``).

    The authors' code compares index maps as well, through an argmax without a gradient. Here the index is the mean of
    the classes' numbers, weighted with their scores: a deliberate repair.

    Args:
        scores: (C, B, n, X, Y) in (0, 1) of C sequences and n classes.
        label: (C, B, X, Y), or (B, X, Y) where all sequences show the same; 255 is left out.
        class_weights: of background, first class, and so on; the last one holds for all further ones.
        index_weight: of the squared error of the index over n − 1.
    """
    classes = scores.shape[2]
    known = (label != IGNORED)[..., None, :, :]  # (…, 1, X, Y)
    numbers = torch.arange(classes, device=scores.device)[:, None, None]
    wanted = (label[..., None, :, :] == numbers).float()  # (…, n, X, Y)
    weights = scores.new_tensor([class_weights[min(k, len(class_weights) - 1)] for k in range(classes)])
    error = ((scores - wanted).square() * known).mean(dim=(-2, -1))  # (C, B, n)
    index = (scores * numbers).sum(dim=2) / scores.sum(dim=2).clamp(min=1e-6)  # (C, B, X, Y)
    off = ((index - label).square() * known[..., 0, :, :]).mean() / max(classes - 1, 1) ** 2
    return len(scores) * ((error * weights).sum(dim=2).mean() + index_weight * off)


def check_class_weights(weights: Sequence[float]) -> None:
    """Raises ValueError for none, and for negative ones."""
    if not weights or min(weights) < 0:
        raise ValueError(f"class_weights are {list(weights)}; expected one number from 0 on, or more")


class LesionSegmentation(LightningModule):
    """Trains the segmentors of all sequences, on the same slices.

    Args:
        modalities: the batch's sequences, each of which is segmented.
        classes: names of the label's mapped classes, the first being no lesion.
        width: channels of the first layer.
        scheme: of ``LesionSegmentors``.
        dropout: of the input's pixels.
        class_weights, index_weight: of ``lesion_loss``.
        lr, betas: of Adam.

    Attributes:
        divisor: every axis of a slice must be a multiple of it.
    """

    divisor = 4

    def __init__(
        self,
        *,
        modalities: Sequence[str],
        classes: Sequence[str],
        width: int = 64,
        scheme: Scheme = "multiple",
        dropout: float = 0.1,
        class_weights: Sequence[float] = (1.0, 5.0, 15.0),
        index_weight: float = 5.0,
        lr: float = 1e-4,
        betas: Sequence[float] = (0.5, 0.999),
    ):
        super().__init__()
        check_class_weights(class_weights)
        self.modalities = self.sources = tuple(modalities)
        self.classes = tuple(classes)
        self.scheme = scheme
        self.segmentors = LesionSegmentors(len(self.sources), len(self.classes), width, scheme, dropout)
        self.class_weights, self.index_weight = list(class_weights), index_weight
        self.lr, self.betas = lr, (betas[0], betas[1])
        self.val_means = SubjectMeans(["loss", "dice", "mse"])

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, X, Y) of all sequences to scores (C, B, classes, X, Y)."""
        return self.segmentors(images.transpose(0, 1)[:, :, None]).float()

    def losses(self, batch: Batch, weights: Tensor | None = None) -> dict[str, Tensor]:
        """``loss`` and ``scores``; ``weights`` is for segmenters that weigh classes by their counts."""
        scores = self(batch["image"])
        return {"loss": lesion_loss(scores, batch["label"], self.class_weights, self.index_weight), "scores": scores}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.losses(batch)["loss"]
        size = batch["image"].shape[0]
        self.log("train/loss", loss, on_epoch=True, prog_bar=True, batch_size=size, sync_dist=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """All slices of one subject; Dice and squared error of index maps, means over slices and sequences."""
        losses = self.losses(batch)
        found = losses["scores"].argmax(dim=2)  # (C, Z, X, Y)
        values = [(index_dice(one, batch["label"]), index_mse(one, batch["label"])) for one in found]
        dice, mse = (torch.stack(part).mean() for part in zip(*values, strict=True))
        self.val_means.add({"loss": losses["loss"], "dice": dice, "mse": mse})

    def on_validation_epoch_end(self) -> None:
        for name, mean in self.val_means.take().items():
            self.log(f"val/{name}", mean, prog_bar=name == "loss")

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.lr, betas=self.betas)

    # ----- whole volumes -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _scores(self, volumes: Volumes) -> Tensor:
        """(C, B, classes, X, Y[, Z]) of volumes (B, 1, X, Y[, Z])."""
        images = torch.stack([volumes[name] for name in self.sources])  # (C, B, 1, X, Y[, Z])
        if images.ndim == 5:
            return self.segmentors(images).float()
        slices = images.movedim(-1, 2)  # (C, B, Z, 1, X, Y)
        scores = self.segmentors(slices.flatten(1, 2)).float().unflatten(1, slices.shape[1:3])
        return scores.movedim(2, -1)

    def segment(self, volumes: Volumes) -> Segmentation:
        """Labels of the mean score over the sequences, and these scores over their sum."""
        return self.segment_all(volumes)[0]

    def segment_each(self, volumes: Volumes) -> dict[str, Tensor]:
        """By sequence, the labels (B, X, Y[, Z]) that it shows by itself, as the paper judges them (section 3.4)."""
        return self.segment_all(volumes)[1]

    def segment_all(self, volumes: Volumes) -> tuple[Segmentation, dict[str, Tensor]]:
        """What ``segment`` and ``segment_each`` answer, of one pass."""
        scores = self._scores(volumes)  # (C, B, classes, X, Y[, Z])
        mean = scores.mean(dim=0)
        together = Segmentation(labels=mean.argmax(dim=1), probabilities=F.normalize(mean, p=1.0, dim=1))
        return together, dict(zip(self.sources, scores.argmax(dim=2), strict=True))
