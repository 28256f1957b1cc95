"""RS-Net: synthesise a missing sequence and segment the tumour at once (Mehta and Arbel).

A 3D U-Net turns the acquired sequences into latent features at full resolution. A regression block makes the missing
sequence from them and from one of the input MRIs, a segmentation block labels the tumour, and one optimizer trains all
three, so that the features attend to the tumour. R-Net, the paper's baseline, has neither the segmentation block nor
the extra MRI.

The paper prints no channel counts, optimiser or loss weights. Where a number here is not the paper's,
``conf/model/rsnet.yaml`` says where it comes from.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor

from mrgen.data.batch import Batch, volumes
from mrgen.losses.reconstruction import weighted_mse
from mrgen.losses.segmentation import class_weights, weighted_cross_entropy
from mrgen.metrics.means import SubjectMeans
from mrgen.metrics.reconstruction import mse
from mrgen.metrics.segmentation import region_dice
from mrgen.nets.monte_carlo import mean_and_variance, only_dropout_active
from mrgen.nets.unet3d import RegressionBlock, SegmentationBlock, UNet3d
from mrgen.protocols import Segmentation, Synthesis, Volumes

__all__ = ["RSNet"]

# The sequence of nearest contrast, which the regression block sees beside the features; the paper says "one of the
# input MRIs" and not which.
NEAREST = {"t1": "t1ce", "t1ce": "t1", "t2": "flair", "flair": "t2"}


class RSNet(LightningModule):
    """RS-Net, and R-Net with ``segment=False, extra_mri=None``.

    Args:
        modalities: the batch's sequences, in order; all but the target are inputs.
        target: the sequence to synthesise.
        classes: names of the tumour classes, background first.
        regions: evaluation regions and their classes, such as ``{"ET": [3], "WT": [1, 2, 3], "TC": [1, 3]}``.
        segment: with the segmentation block (RS-Net) or without (R-Net).
        extra_mri: the input MRI that the regression block sees: ``nearest`` contrast, a sequence's name, or None.
        filters, levels, dropout: of the U-Net, see ``UNet3d``.
        segmentation_weight: λ of L = L_syn + λ · L_seg.
        class_weight_decay: r of w_c(e) = (Σ m / m_c) · r^e + 1; 1 is the paper's static rule.
        class_weight_cap: upper bound of Σ m / m_c.
        lr, betas: of Adam.
        lr_step, lr_gamma: the learning rate is multiplied by ``lr_gamma`` every ``lr_step`` epochs.
        mc_samples: Monte Carlo dropout passes of a synthesis, 20 in the paper; 0 is one pass with dropout off and no
            variance, as is any number where ``dropout`` is 0.
        mc_batch: how many of them are computed at once; on a processor more than 1 is slower.
    """

    scale = "zscore"

    def __init__(
        self,
        *,
        modalities: Sequence[str],
        target: str,
        classes: Sequence[str],
        regions: Mapping[str, Sequence[int]],
        segment: bool = True,
        extra_mri: str | None = "nearest",
        filters: int = 32,
        levels: int = 4,
        dropout: float = 0.05,
        segmentation_weight: float = 1.0,
        class_weight_decay: float = 1.0,
        class_weight_cap: float = 1000.0,
        lr: float = 2e-4,
        betas: Sequence[float] = (0.9, 0.999),
        lr_step: int = 50,
        lr_gamma: float = 0.75,
        mc_samples: int = 20,
        mc_batch: int = 1,
    ):
        super().__init__()
        if mc_samples < 0 or mc_samples == 1 or mc_batch < 1:
            raise ValueError(
                f"mc_samples is {mc_samples} and mc_batch {mc_batch}; expected 0 or at least 2, and at least 1"
            )
        self.modalities, self.target = tuple(modalities), target
        if target not in self.modalities or len(self.modalities) < 2:
            have = ", ".join(self.modalities)
            raise ValueError(f"target is {target!r}; expected one of {have}, with at least one other beside it")
        self.sources = tuple(name for name in self.modalities if name != target)
        self.targets = (target,)
        if extra_mri == "nearest":
            extra_mri = NEAREST.get(target)
            extra_mri = extra_mri if extra_mri in self.sources else self.sources[0]
        if extra_mri is not None and extra_mri not in self.sources:
            raise ValueError(f"extra_mri is {extra_mri!r}; expected nearest, null, or one of {', '.join(self.sources)}")
        self.extra_mri = extra_mri
        self.regions = {name: list(members) for name, members in regions.items()}
        self.segmentation_weight = segmentation_weight
        self.class_weight_decay, self.class_weight_cap = class_weight_decay, class_weight_cap
        self.lr, self.betas, self.lr_step, self.lr_gamma = lr, (betas[0], betas[1]), lr_step, lr_gamma
        self.mc_samples, self.mc_batch = mc_samples if dropout > 0 else 0, mc_batch

        self.unet = UNet3d(len(self.sources), filters=filters, levels=levels, dropout=dropout)
        self.regression = RegressionBlock(filters, extra_channels=int(extra_mri is not None), dropout=dropout)
        self.segmentation = SegmentationBlock(filters, len(classes), dropout=dropout) if segment else None
        self.divisor = self.unet.divisor

        # Voxels of each class in the training set; uniform until the datamodule is known.
        self.class_counts: Tensor
        self.register_buffer("class_counts", torch.ones(len(classes)), persistent=False)
        names = ["loss", "synthesis", "mse_brain", "mse_tumour"]
        names += ["segmentation", *(f"dice_{region}" for region in self.regions)] if segment else []
        self.val_means = SubjectMeans(names)

    # ----- the network -------------------------------------------------------------------------------------------

    def forward(self, volumes: Volumes) -> tuple[Tensor, Tensor | None]:
        """Synthesis (B, 1, X, Y, Z), z-scored, and class logits (B, C, X, Y, Z) or None."""
        latent = self.unet(self._inputs(volumes))  # (B, filters, X, Y, Z)
        logits = None if self.segmentation is None else self.segmentation(latent).float()
        return self.regression(latent, self._extra(volumes)).float(), logits

    def _inputs(self, volumes: Volumes) -> Tensor:
        return torch.cat([volumes[name] for name in self.sources], dim=1)  # (B, sources, X, Y, Z)

    def _extra(self, volumes: Volumes) -> Tensor | None:
        return None if self.extra_mri is None else volumes[self.extra_mri]

    # ----- training ----------------------------------------------------------------------------------------------

    def losses(self, batch: Batch, weights: Tensor | None) -> dict[str, Tensor]:
        """L = L_syn + λ · L_seg, both weighted by the tumour class of the voxel (section 2).

        Args:
            batch: as ``mrgen.data.batch.Batch``.
            weights: (C,) one weight a class, or None for uniform weights.

        Returns:
            ``loss``, its parts ``synthesis`` and ``segmentation``, and the outputs ``mean`` and ``logits``.
        """
        inputs = volumes(batch, self.modalities)
        mean, logits = self(inputs)
        out = {"mean": mean, "synthesis": weighted_mse(mean, inputs[self.target], batch["label"], weights)}
        out["loss"] = out["synthesis"]
        if logits is not None:
            out["logits"] = logits
            out["segmentation"] = weighted_cross_entropy(logits, batch["label"], weights)
            out["loss"] = out["loss"] + self.segmentation_weight * out["segmentation"]
        return out

    def on_fit_start(self) -> None:
        counts = self.trainer.datamodule.class_counts()  # type: ignore[attr-defined]
        self.class_counts.copy_(torch.tensor(counts, dtype=torch.float32))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        weights = class_weights(
            self.class_counts, epoch=self.current_epoch, decay=self.class_weight_decay, cap=self.class_weight_cap
        )
        losses = self.losses(batch, weights)
        size = batch["image"].shape[0]
        self.log("train/loss", losses["loss"], on_epoch=True, prog_bar=True, batch_size=size, sync_dist=True)
        for name in ("synthesis", "segmentation"):
            if name in losses:
                self.log(f"train/{name}", losses[name], on_step=False, on_epoch=True, batch_size=size, sync_dist=True)
        return losses["loss"]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        losses = self.losses(batch, weights=None)  # uniform: epochs compare whatever the schedule of the weights
        target = volumes(batch, self.modalities)[self.target]
        tumour = (batch["label"] > 0) & (batch["label"] < len(self.class_counts))
        parts = ("loss", "synthesis", "segmentation")
        values: dict[str, Any] = {name: losses[name] for name in parts if name in losses}
        # Validation batches hold one subject each.
        values["mse_brain"] = mse(losses["mean"][0], target[0], batch["brain"][0])
        values["mse_tumour"] = mse(losses["mean"][0], target[0], tumour[0])
        if "logits" in losses:
            dice = region_dice(losses["logits"].argmax(dim=1), batch["label"], self.regions)
            values |= {f"dice_{region}": value for region, value in dice.items()}
        self.val_means.add(values)

    def on_validation_epoch_end(self) -> None:
        for name, mean in self.val_means.take().items():
            self.log(f"val/{name}", mean, prog_bar=name == "loss")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr, betas=self.betas)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=self.lr_step, gamma=self.lr_gamma)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}

    # ----- what evaluation calls ---------------------------------------------------------------------------------

    @torch.no_grad()
    def synthesize(self, volumes: Volumes) -> Synthesis:
        """The missing sequence from ``sources``: mean and variance over Monte Carlo dropout samples (section 2).

        What lies before the first dropout is computed once, and the segmentation block not at all.
        """
        stem, extra = self.unet.stem(self._inputs(volumes)), self._extra(volumes)  # (B, filters, X, Y, Z)

        def draw(n: int) -> Tensor:
            latent = self.unet.head(torch.cat([stem] * n) if n > 1 else stem)  # (n · B, filters, X, Y, Z)
            repeated = torch.cat([extra] * n) if extra is not None and n > 1 else extra
            return self.regression(latent, repeated).unflatten(0, (n, -1))  # (n, B, 1, X, Y, Z)

        if not self.mc_samples:
            return Synthesis(mean=draw(1)[0].float(), variance=None, scale=self.scale)
        with only_dropout_active(self):
            mean, variance = mean_and_variance(draw, self.mc_samples, self.mc_batch)
        return Synthesis(mean=mean, variance=variance, scale=self.scale)

    @torch.no_grad()
    def segment(self, volumes: Volumes) -> Segmentation:
        """The tumour from ``sources``; dropout off. Raises ValueError for R-Net, which has no segmentation block."""
        if self.segmentation is None:
            raise ValueError("R-Net has no segmentation block")
        logits = self.segmentation(self.unet(self._inputs(volumes))).float()
        return Segmentation(labels=logits.argmax(dim=1), probabilities=logits.softmax(dim=1))
