"""SAMR: axial slices of every sequence from a lesion mask and an atlas (Guo et al., MICCAI 2020).

A generator G makes all sequences of a slice from its label map and three slices of the atlas. Six discriminators, one
for background, normal brain and lesion at each of two scales, see their own region alone. A U-Net U finds the labels in
real and in synthetic slices, so that lesions keep their shape. A step improves the six, then G and U together.

Images are on [−1, 1], as G's tanh is. Where a number here is not the paper's, ``conf/model/samr.yaml`` says where it
comes from.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from mrgen.data.batch import Batch, label_map
from mrgen.losses.adversarial import discriminator_loss, feature_matching, generator_loss
from mrgen.losses.segmentation import generalised_dice
from mrgen.metrics.means import SubjectMeans
from mrgen.metrics.reconstruction import mae
from mrgen.nets.pix2pix import as_in_training
from mrgen.nets.samr import LabelWiseDiscriminators, SAMRGenerator, SegmentationUNet2d
from mrgen.protocols import Generated, LabelMaps

__all__ = ["SAMR", "regions"]

SLICES = 16  # that are computed at once where there are no gradients


def regions(labels: Tensor) -> Tensor:
    """Background, normal brain, and all classes of lesion as one: (B, 3, X, Y) bool of a ``label_map``."""
    return torch.stack([labels[:, 0] > 0, labels[:, 1] > 0, (labels[:, 2:] > 0).any(dim=1)], dim=1)


class SAMR(LightningModule):
    """Generator and segmentation module against six discriminators, one step of each side a batch.

    Trains with manual optimisation: Lightning counts two steps a batch, so that epochs should end the training, and
    neither clips gradients nor accumulates them. Several devices need ``strategy=ddp_find_unused_parameters_true``.

    The paper's ablations are ``stretch_out``, ``label_wise`` and ``atlas`` set to False, and ``shape_weight`` to 0,
    which leaves out U.

    Args:
        modalities: the batch's sequences, in order; all are synthesised.
        classes: names of the label's mapped classes, the first being no lesion.
        filters, cap, downs, blocks: of G; slices must be multiples of 2^downs, and twice that or more.
        norm: ``batch`` or ``instance``, in all networks.
        discriminator_filters: of each discriminator.
        unet_filters, unet_downs: of U; slices must be multiples of 2^unet_downs.
        stretch_out: a decoder for each sequence; else one for all.
        label_wise: discriminators for each region; else two ordinary ones, one a scale, on the whole slice.
        atlas: given to G and to the discriminators; else batches need none.
        feature_weight: λ1.
        match_output: the discriminators' logits are matched too, as printed; else the four stages before them alone.
        shape_weight: λ2.
        freeze_unet_on_synthetic: U learns from real slices alone, and G through U as it is; else U learns from
            synthetic ones too, as in equation 4, and may meet G halfway.
        least_squares: LSGAN's adversarial loss in place of cross entropy.
        lr, betas: of both Adams, one of the discriminators, one of G and U.
        constant_epochs, decay_epochs: the learning rate is constant at first and then falls linearly towards 0.

    Attributes:
        scale: of its images, [−1, 1].
        guides: what batches and generation need beside labels: the atlas, or nothing.
        divisor, smallest: what every axis of a slice must be a multiple of, and the least that it may be.
    """

    scale = "symmetric"

    def __init__(
        self,
        *,
        modalities: Sequence[str],
        classes: Sequence[str],
        filters: int = 8,
        cap: int = 512,
        downs: int = 5,
        blocks: int = 9,
        norm: Literal["batch", "instance"] = "batch",
        discriminator_filters: int = 64,
        unet_filters: int = 64,
        unet_downs: int = 5,
        stretch_out: bool = True,
        label_wise: bool = True,
        atlas: bool = True,
        feature_weight: float = 5.0,
        match_output: bool = True,
        shape_weight: float = 1.0,
        freeze_unet_on_synthetic: bool = False,
        least_squares: bool = False,
        lr: float = 2e-4,
        betas: Sequence[float] = (0.5, 0.999),
        constant_epochs: int = 250,
        decay_epochs: int = 250,
    ):
        super().__init__()
        self.automatic_optimization = False
        if len(classes) < 2:
            raise ValueError(f"classes are {list(classes)}; expected no lesion and one class of lesion or more")
        self.modalities, self.classes = tuple(modalities), tuple(classes)
        self.feature_weight, self.shape_weight, self.match_output = feature_weight, shape_weight, match_output
        self.freeze_unet_on_synthetic, self.least_squares = freeze_unet_on_synthetic, least_squares
        self.lr, self.betas = lr, (betas[0], betas[1])
        self.constant_epochs, self.decay_epochs = constant_epochs, decay_epochs

        self.guides: tuple[str, ...] = ("atlas",) if atlas else ()
        labels, sequences = len(classes) + 1, len(modalities)
        atlas_channels = 3 * sequences if atlas else 0
        self.generator = SAMRGenerator(
            labels=labels,
            sequences=sequences,
            atlas_channels=atlas_channels,
            filters=filters,
            cap=cap,
            downs=downs,
            blocks=blocks,
            norm=norm,
            stretch_out=stretch_out,
        )
        self.discriminators = LabelWiseDiscriminators(
            in_channels=labels + sequences + atlas_channels,
            regions=3 if label_wise else None,
            filters=discriminator_filters,
            norm=norm,
        )
        self.segmenter: SegmentationUNet2d | None = None
        if shape_weight:
            self.segmenter = SegmentationUNet2d(sequences, labels, filters=unet_filters, downs=unet_downs, norm=norm)
        self.divisor = 2 ** max(downs, unet_downs if shape_weight else 0)
        self.smallest = 2 * self.generator.divisor
        shapes = ["shape_real", "shape_synthetic"] if shape_weight else []
        self.val_means = SubjectMeans(["loss", "mae_brain", "mae_lesion", *shapes])

    def forward(self, labels: Tensor, atlas: Tensor | None = None) -> Tensor:
        """G: a ``label_map`` and the atlas (B, 3 · C, X, Y) to images (B, C, X, Y) in [−1, 1]."""
        return self.generator(labels, atlas).float()

    def discriminate(self, labels: Tensor, image: Tensor, atlas: Tensor | None) -> list[list[Tensor]]:
        """Features of every discriminator whose region some slice of the batch has; the same ones whatever the images.

        Args:
            labels: (B, L, X, Y), a ``label_map``; as below.
            image: (B, C, X, Y) in [−1, 1], real or synthetic.
            atlas: (B, 3 · C, X, Y); None without atlas.

        Returns:
            Of each of them five stages (n, channels, x, y), the last the logits, n being the slices with its region.
        """
        inputs = torch.cat([labels, image] if atlas is None else [labels, image, atlas], dim=1)
        if inputs.is_meta:  # a plan does not know who has a lesion: every slice has every region
            halved, scales = F.avg_pool2d(inputs, 2), self.discriminators.scales
            return [net(halved if k % scales else inputs) for k, net in enumerate(self.discriminators.discriminators)]
        features, _ = self.discriminators(inputs, regions(labels))
        # Of no slice a mean would be nan. Nor may gradients of zero reach an absent region's: Adam would move them on.
        return [stages for stages in features if len(stages[-1])]

    def _shape_error(self, labels: Tensor, image: Tensor) -> Tensor:
        """GDL(x, U(image)), equation 3."""
        assert self.segmenter is not None
        return generalised_dice(self.segmenter(image).float().softmax(dim=1), labels)

    # ----- the two sides -----------------------------------------------------------------------------------------

    def discriminator_loss(self, labels: Tensor, image: Tensor, made: Tensor, atlas: Tensor | None) -> Tensor:
        """Σ of equation 1 over the discriminators, each halved. Reaches G unless ``made`` is detached.

        Args:
            labels, image, atlas: as of ``discriminate``; the image is the real one.
            made: (B, C, X, Y), the synthetic one.
        """
        pairs = zip(self.discriminate(labels, image, atlas), self.discriminate(labels, made, atlas), strict=True)
        terms = [discriminator_loss(r[-1], f[-1], least_squares=self.least_squares) for r, f in pairs]
        return torch.stack(terms).sum()

    def generator_losses(self, labels: Tensor, image: Tensor, made: Tensor, atlas: Tensor | None) -> dict[str, Tensor]:
        """Equation 5, of G and U; the discriminators get no gradient. Arguments as above.

        Returns:
            ``loss`` = ``adversarial`` + λ1 · ``features`` + λ2 · (``shape_real`` + ``shape_synthetic``); without U
            there are no shapes.
        """
        with _frozen(self.discriminators):
            with torch.no_grad():
                real = self.discriminate(labels, image, atlas)
            fake = self.discriminate(labels, made, atlas)
        out = {
            "adversarial": torch.stack([generator_loss(f[-1], least_squares=self.least_squares) for f in fake]).sum(),
            "features": torch.stack(
                [feature_matching(r, f, output=self.match_output) for r, f in zip(real, fake, strict=True)]
            ).sum(),
        }
        loss = out["adversarial"] + self.feature_weight * out["features"]
        if self.segmenter is not None:
            out["shape_real"] = self._shape_error(labels, image)
            if self.freeze_unet_on_synthetic:
                with _frozen(self.segmenter):
                    out["shape_synthetic"] = self._shape_error(labels, made)
            else:
                out["shape_synthetic"] = self._shape_error(labels, made)
            loss = loss + self.shape_weight * (out["shape_real"] + out["shape_synthetic"])
        return {**out, "loss": loss}

    def discriminator_step(
        self, labels: Tensor, image: Tensor, made: Tensor, atlas: Tensor | None
    ) -> dict[str, Tensor]:
        """Improves the discriminators against a synthesis as it is."""
        loss = self.discriminator_loss(labels, image, made.detach(), atlas)
        self._descend(self.optimizers()[1], loss)  # type: ignore[index]
        return {"discriminator": loss.detach()}

    def generator_step(self, labels: Tensor, image: Tensor, made: Tensor, atlas: Tensor | None) -> dict[str, Tensor]:
        """Improves G and U against the discriminators as they are now."""
        losses = self.generator_losses(labels, image, made, atlas)
        self._descend(self.optimizers()[0], losses["loss"])  # type: ignore[index]
        return {name: loss.detach() for name, loss in losses.items()}

    def _descend(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    # ----- training ----------------------------------------------------------------------------------------------

    def parts(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """``label_map``, image (B, C, X, Y), and atlas (B, 3 · C, X, Y) or, without one, None."""
        atlas = batch.get("atlas") if self.generator.atlas_encoder is not None else None
        return label_map(batch["label"], batch["brain"], len(self.classes)), batch["image"], atlas

    def losses(self, batch: Batch, weights: Tensor | None = None) -> dict[str, Tensor]:
        """Both sides' losses added up in ``loss``: what a step costs, for ``plan=true``. No classes, no weights.

        A plan's batch has no atlas; one of its shape stands in.
        """
        labels, image, atlas = self.parts(batch)
        if image.is_meta and atlas is None and self.generator.atlas_encoder is not None:
            atlas = image.repeat(1, 3, 1, 1)
        made = self(labels, atlas)
        discriminator = self.discriminator_loss(labels, image, made.detach(), atlas)
        return {"loss": discriminator + self.generator_losses(labels, image, made, atlas)["loss"]}

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        labels, image, atlas = self.parts(batch)
        made = self(labels, atlas)  # once: the discriminators see its values, G is improved through them
        losses = self.discriminator_step(labels, image, made, atlas)
        losses |= self.generator_step(labels, image, made, atlas)
        size = image.shape[0]
        self.log("train/loss", losses.pop("loss"), on_epoch=True, prog_bar=True, batch_size=size, sync_dist=True)
        for name, loss in losses.items():
            self.log(f"train/{name}", loss, on_step=False, on_epoch=True, batch_size=size, sync_dist=True)

    def on_train_epoch_end(self) -> None:
        for scheduler in self.lr_schedulers():  # type: ignore[union-attr]
            scheduler.step()  # type: ignore[call-arg]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """All slices of one subject: errors on [−1, 1], and what U makes of real and of synthetic slices.

        ``loss`` is the error in the brain, which all ablations have.
        """
        labels, image, atlas = self.parts(batch)
        made = self.generate_slices(batch["label"], batch["brain"], atlas)
        inside = regions(labels)[:, 1:]  # (Z, 2, X, Y), normal brain and lesion
        brain, lesion = (_mae(made, image, mask) for mask in (inside.any(dim=1), inside[:, 1]))
        means: dict[str, float | Tensor] = {"loss": brain, "mae_brain": brain, "mae_lesion": lesion}
        if self.segmenter is not None:
            for name, images in (("shape_real", image), ("shape_synthetic", made)):
                logits = torch.cat([self.segmenter(part) for part in images.split(SLICES)])  # (Z, L, X, Y)
                means[name] = generalised_dice(logits.float().softmax(dim=1), labels)
        self.val_means.add(means)

    def on_validation_epoch_end(self) -> None:
        for name, mean in self.val_means.take().items():
            self.log(f"val/{name}", mean, prog_bar=name == "loss")

    def configure_optimizers(self) -> Any:
        def rate(epoch: int) -> float:
            """1 for the constant epochs, then down by equal steps that would reach 0 after the last one."""
            return max(0.0, 1 - max(0, epoch + 1 - self.constant_epochs) / (self.decay_epochs + 1))

        def side(name: str, *nets: nn.Module | None) -> dict[str, Any]:
            weights = [p for net in nets if net is not None for p in net.parameters()]
            optimizer = torch.optim.Adam(weights, lr=self.lr, betas=self.betas)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "name": f"lr-{name}"}}

        return [side("generator", self.generator, self.segmenter), side("discriminators", self.discriminators)]

    # ----- what generation calls ---------------------------------------------------------------------------------

    def generate(self, labels: Iterable[LabelMaps], seed: int) -> Iterator[Generated]:
        """``mrgen.protocols.Generator``. Nothing is drawn, so that the seed changes nothing."""
        for maps in labels:
            image = self.generate_slices(maps.label, maps.brain, maps.guides.get("atlas"))
            yield Generated(image, maps.label, maps.brain)

    @torch.no_grad()
    def generate_slices(self, label: Tensor, brain: Tensor, atlas: Tensor | None = None) -> Tensor:
        """Images of every sequence, of labels that may have been manipulated; a slice does not depend on the others.

        What lies outside the brain is as G makes it, near the background of its training images.

        Args:
            label: (Z, X, Y) int, mapped classes; in voxels of 255 G gets no label at all.
            brain: (Z, X, Y) bool.
            atlas: (Z, 3 · C, X, Y); None without atlas.

        Returns:
            (Z, C, X, Y) float32 in [−1, 1], channels in the order of ``modalities``.

        Raises:
            ValueError: an axis does not fit ``divisor``, or the atlas is missing or one too many.
        """
        parts = label_map(label, brain, len(self.classes)).split(SLICES)
        atlases: Sequence[Tensor | None] = [None] * len(parts) if atlas is None else atlas.split(SLICES)
        with as_in_training(self.generator, dropout=False, batch_statistics=False):
            return torch.cat([self(*part) for part in zip(parts, atlases, strict=True)])


@contextmanager
def _frozen(net: nn.Module) -> Iterator[None]:
    """Gradients pass through the network and do not stay there; its batch norms see the batch and do not note it."""
    net.requires_grad_(False)
    try:
        with as_in_training(net, dropout=True, batch_statistics=True):
            yield
    finally:
        net.requires_grad_(True)


def _mae(made: Tensor, image: Tensor, mask: Tensor) -> float:
    """Over the mask (Z, X, Y) in all sequences of images (Z, C, X, Y)."""
    everywhere = mask.unsqueeze(1).expand_as(image).flatten(0, 1)  # (Z · C, X, Y)
    return mae(made.flatten(0, 1), image.flatten(0, 1), everywhere)
