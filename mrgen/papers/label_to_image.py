"""The baselines of paper 2, axial slices of every sequence from a label map (Guo et al., MICCAI 2020, section 3).

- pix2pix (Isola et al. 2017): a U-Net against a PatchGAN that sees labels and images together; an L1 error holds the
  images near the real ones. Dropout is its only noise.
- pix2pixHD (Wang et al. 2018): the global generator against discriminators at two scales, least squares, and matched
  features of the discriminators in place of the L1 error. There is no perceptual loss: VGG sees three channels of
  photographs. There are no instances, and so no map of their edges.
- Shin et al. (2018): pix2pix whose label map also tells where cerebrospinal fluid, grey and white matter are.

One class is all three, by ``conf/model/label_*.yaml``, which say where their numbers come from. Images are on [−1, 1].
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
from mrgen.metrics.means import SubjectMeans
from mrgen.metrics.reconstruction import mae
from mrgen.nets.patchgan import PatchGAN
from mrgen.nets.pix2pix import UNetGenerator, as_in_training, init_normal
from mrgen.nets.samr import LabelWiseDiscriminators, SAMRGenerator
from mrgen.protocols import Generated, LabelMaps

__all__ = ["LabelToImage"]

SLICES = 16  # that are generated at once
TISSUES = 3  # cerebrospinal fluid, grey and white matter


class LabelToImage(LightningModule):
    """Generator and discriminators, one step of each side a batch.

    Trains with manual optimisation: Lightning counts two steps a batch, so that epochs should end the training, and
    neither clips gradients nor accumulates them. Several devices need ``strategy=ddp_find_unused_parameters_true``.

    ``unet`` is pix2pix's U-Net, whose upsampling is the additive one of ``mrgen.nets.pix2pix`` and not transposed
    convolutions, with its PatchGAN, both with batch norm. ``global`` is pix2pixHD's global generator with its
    discriminators, both with instance norm; layer by layer they are SAMR's networks with one encoder, one decoder and
    no regions, where the decoder brings the last of the residual blocks.

    Args:
        modalities: the batch's sequences, in order; all are synthesised.
        classes: names of the label's mapped classes, the first being no lesion.
        generator: ``unet`` or ``global``, with the discriminators that belong to it.
        tissue: the tissue probabilities stand beside the label map, for generator and discriminators.
        filters: of the generator; a multiple of 4 in the U-Net.
        downs: number of downsamplings; slices must be multiples of 2^downs, with ``global`` twice that or more. Up to
            five the U-Net has no dropout.
        dropout: of the U-Net.
        blocks: residual blocks of ``global``, 1 or more.
        discriminator_filters: of each discriminator.
        scales: discriminators of ``global``, each at half the resolution of the one before; the U-Net has one.
        l1_weight: of the L1 error.
        feature_weight: of the matched features.
        least_squares: LSGAN's adversarial loss in place of cross entropy.
        lr, betas: of both Adams.
        constant_epochs, decay_epochs: the learning rate is constant at first and then falls linearly towards 0.

    Attributes:
        scale: of its images, [−1, 1].
        guides: what batches and generation need beside labels: the tissue probabilities, or nothing.
        divisor, smallest: what every axis of a slice must be a multiple of, and the least that it may be.
    """

    scale = "symmetric"

    def __init__(
        self,
        *,
        modalities: Sequence[str],
        classes: Sequence[str],
        generator: Literal["unet", "global"] = "unet",
        tissue: bool = False,
        filters: int = 64,
        downs: int = 8,
        dropout: float = 0.5,
        blocks: int = 9,
        discriminator_filters: int = 64,
        scales: int = 2,
        l1_weight: float = 100.0,
        feature_weight: float = 0.0,
        least_squares: bool = False,
        lr: float = 2e-4,
        betas: Sequence[float] = (0.5, 0.999),
        constant_epochs: int = 100,
        decay_epochs: int = 100,
    ):
        super().__init__()
        self.automatic_optimization = False
        if len(classes) < 2:
            raise ValueError(f"classes are {list(classes)}; expected no lesion and one class of lesion or more")
        self.modalities, self.classes = tuple(modalities), tuple(classes)
        self.guides: tuple[str, ...] = ("tissue",) if tissue else ()
        self.l1_weight, self.feature_weight, self.least_squares = l1_weight, feature_weight, least_squares
        self.lr, self.betas = lr, (betas[0], betas[1])
        self.constant_epochs, self.decay_epochs = constant_epochs, decay_epochs

        sequences = len(modalities)
        condition = len(classes) + 1 + (TISSUES if tissue else 0)
        self.generator: UNetGenerator | SAMRGenerator
        self.discriminators: PatchGAN | LabelWiseDiscriminators
        if generator == "unet":
            self.generator = UNetGenerator(
                condition, sequences, dims=2, filters=filters, downs=downs, dropout=dropout
            ).apply(init_normal)
            self.discriminators = PatchGAN(condition + sequences, dims=2, filters=discriminator_filters)
            self.discriminators.apply(init_normal)
        elif generator == "global":
            self.generator = SAMRGenerator(
                labels=condition,
                sequences=sequences,
                atlas_channels=0,
                filters=filters,
                cap=filters * 2**downs,  # none
                downs=downs,
                blocks=blocks - 1,
                norm="instance",
                stretch_out=False,
            )
            self.discriminators = LabelWiseDiscriminators(
                in_channels=condition + sequences,
                regions=None,
                scales=scales,
                filters=discriminator_filters,
                norm="instance",
            )
        else:
            raise ValueError(f"generator is {generator!r}; expected unet or global")
        self.divisor = self.generator.divisor
        self.smallest = 24 if generator == "unet" else 2 * self.divisor  # of the PatchGAN, of the global generator
        self.val_means = SubjectMeans(["loss", "mae_brain", "mae_lesion"])

    def condition(self, labels: Tensor, tissue: Tensor | None) -> Tensor:
        """What both sides are given: the label map, and the tissue probabilities where the brain is normal.

        A lesion, which may have been put there, and the background have no tissue.

        Args:
            labels: (B, L, X, Y), a ``label_map``.
            tissue: (B, 3, X, Y), from 0 to 1; not looked at where the model does without.

        Returns:
            (B, L, X, Y), with tissue (B, L + 3, X, Y).

        Raises:
            ValueError: there are no tissue probabilities.
        """
        if not self.guides:
            return labels
        if tissue is None:
            raise ValueError("LabelToImage: built with tissue probabilities, got none")
        return torch.cat([labels, tissue * labels[:, 1:2]], dim=1)

    def forward(self, condition: Tensor) -> Tensor:
        """The generator: a ``condition`` to images (B, C, X, Y) in [−1, 1]."""
        return self.generator(condition).float()

    def discriminate(self, condition: Tensor, image: Tensor) -> list[list[Tensor]]:
        """Features of every discriminator, at full scale first.

        Args:
            condition: (B, L or L + 3, X, Y).
            image: (B, C, X, Y) in [−1, 1], real or synthetic.

        Returns:
            Of each of them five stages (B, channels, x, y), the last the logits.
        """
        if isinstance(self.discriminators, PatchGAN):
            return [self.discriminators.features(condition, image)]
        # Without regions there are no slices to pick, which a plan could not: it has no values.
        inputs, features = torch.cat([condition, image], dim=1), []
        for discriminator in self.discriminators.discriminators:
            features.append(discriminator(inputs))
            # -> (B, …, X / 2^scale, Y / 2^scale)
            inputs = F.avg_pool2d(inputs, kernel_size=3, stride=2, padding=1, count_include_pad=False)
        return features

    # ----- the two sides -----------------------------------------------------------------------------------------

    def discriminator_loss(self, condition: Tensor, image: Tensor, made: Tensor) -> Tensor:
        """Real pairs for real and synthesised ones for fake, halved; the sum over the discriminators.

        Args:
            condition, image: as of ``discriminate``; the image is the real one.
            made: (B, C, X, Y), the synthetic one; the loss reaches the generator unless it is detached.
        """
        pairs = zip(self.discriminate(condition, image), self.discriminate(condition, made), strict=True)
        return torch.stack(
            [discriminator_loss(real[-1], fake[-1], least_squares=self.least_squares) for real, fake in pairs]
        ).sum()

    def generator_losses(self, condition: Tensor, image: Tensor, made: Tensor) -> dict[str, Tensor]:
        """The generator's losses; the discriminators get no gradient. Arguments as above.

        Returns:
            ``loss`` = ``adversarial`` + ``l1_weight`` · ``l1`` + ``feature_weight`` · ``features``; what weighs nothing
            is left out.
        """
        with _frozen(self.discriminators):
            fake = self.discriminate(condition, made)
            adversarial = [generator_loss(stages[-1], least_squares=self.least_squares) for stages in fake]
            out = {"adversarial": torch.stack(adversarial).sum()}
            if self.feature_weight:
                with torch.no_grad():
                    real = self.discriminate(condition, image)
                # pix2pixHD's weights, 4 / (layers + 1) a stage and 1 / scales, with its three layers.
                matched = [
                    feature_matching(*pair, output=False, absolute=True) for pair in zip(real, fake, strict=True)
                ]
                out["features"] = torch.stack(matched).mean()
        loss = out["adversarial"]
        if self.l1_weight:
            out["l1"] = _l1(condition, image, made)
            loss = loss + self.l1_weight * out["l1"]
        if self.feature_weight:
            loss = loss + self.feature_weight * out["features"]
        return {**out, "loss": loss}

    def discriminator_step(self, condition: Tensor, image: Tensor, made: Tensor) -> dict[str, Tensor]:
        """Improves the discriminators against a synthesis as it is."""
        loss = self.discriminator_loss(condition, image, made.detach())
        self._descend(self.optimizers()[1], loss)  # type: ignore[index]
        return {"discriminator": loss.detach()}

    def generator_step(self, condition: Tensor, image: Tensor, made: Tensor) -> dict[str, Tensor]:
        """Improves the generator against the discriminators as they are now."""
        losses = self.generator_losses(condition, image, made)
        self._descend(self.optimizers()[0], losses["loss"])  # type: ignore[index]
        return {name: loss.detach() for name, loss in losses.items()}

    def _descend(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    # ----- training ----------------------------------------------------------------------------------------------

    def parts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """``condition`` and image (B, C, X, Y)."""
        labels = label_map(batch["label"], batch["brain"], len(self.classes))
        return self.condition(labels, batch.get("tissue")), batch["image"]

    def losses(self, batch: Batch, weights: Tensor | None = None) -> dict[str, Tensor]:
        """Both sides' losses added up in ``loss``: what a step costs, for ``plan=true``. No classes, no weights.

        A plan's batch has no tissue probabilities; some of their shape stand in.
        """
        image = batch["image"]
        if image.is_meta and self.guides and "tissue" not in batch:
            batch = {**batch, "tissue": image[:, :1].expand(-1, TISSUES, -1, -1)}
        condition, image = self.parts(batch)
        made = self(condition)
        discriminator = self.discriminator_loss(condition, image, made.detach())
        return {"loss": discriminator + self.generator_losses(condition, image, made)["loss"]}

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        condition, image = self.parts(batch)
        made = self(condition)  # once: the discriminators see its values, the generator is improved through them
        losses = self.discriminator_step(condition, image, made)
        losses |= self.generator_step(condition, image, made)
        size = image.shape[0]
        self.log("train/loss", losses.pop("loss"), on_epoch=True, prog_bar=True, batch_size=size, sync_dist=True)
        for name, loss in losses.items():
            self.log(f"train/{name}", loss, on_step=False, on_epoch=True, batch_size=size, sync_dist=True)

    def on_train_epoch_end(self) -> None:
        for scheduler in self.lr_schedulers():  # type: ignore[union-attr]
            scheduler.step()  # type: ignore[call-arg]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """All slices of one subject, generated with the same noise every time: errors on [−1, 1].

        ``loss`` is the error in the brain, as of SAMR.
        """
        made = self.generate_slices(batch["label"], batch["brain"], batch.get("tissue"), seed=0)
        labels = label_map(batch["label"], batch["brain"], len(self.classes))[:, 1:].bool()  # no background
        brain, lesion = (_mae(made, batch["image"], mask.any(dim=1)) for mask in (labels, labels[:, 1:]))
        self.val_means.add({"loss": brain, "mae_brain": brain, "mae_lesion": lesion})

    def on_validation_epoch_end(self) -> None:
        for name, mean in self.val_means.take().items():
            self.log(f"val/{name}", mean, prog_bar=name == "loss")

    def configure_optimizers(self) -> Any:
        def rate(epoch: int) -> float:
            """1 for the constant epochs, then down by equal steps that would reach 0 after the last one."""
            return max(0.0, 1 - max(0, epoch + 1 - self.constant_epochs) / (self.decay_epochs + 1))

        def side(name: str, net: nn.Module) -> dict[str, Any]:
            optimizer = torch.optim.Adam(net.parameters(), lr=self.lr, betas=self.betas)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "name": f"lr-{name}"}}

        return [side("generator", self.generator), side("discriminators", self.discriminators)]

    # ----- what generation calls ---------------------------------------------------------------------------------

    def generate(self, labels: Iterable[LabelMaps], seed: int) -> Iterator[Generated]:
        """``mrgen.protocols.Generator``. A subject's noise follows from the seed and from how many came before it."""
        seeds = torch.Generator().manual_seed(seed)
        for maps in labels:
            own = int(torch.randint(2**62, (), generator=seeds))
            image = self.generate_slices(maps.label, maps.brain, maps.guides.get("tissue"), seed=own)
            yield Generated(image, maps.label, maps.brain)

    @torch.no_grad()
    def generate_slices(self, label: Tensor, brain: Tensor, tissue: Tensor | None = None, *, seed: int) -> Tensor:
        """Images of every sequence, of labels that may have been manipulated. Nobody else's random numbers change.

        Pix2Pix tests with dropout, and so does this. It also tests with the batch statistics of the one image that it
        is given, as it was trained on; here batches hold several slices, whose statistics are not those of an almost
        empty one at the vertex. Batch norms use the training's running statistics, so that what a slice shows does not
        change another; of ``global`` each slice has always its own.

        Args:
            label: (Z, X, Y) int, mapped classes; in voxels of 255 the generator gets no label at all.
            brain: (Z, X, Y) bool.
            tissue: (Z, 3, X, Y), from 0 to 1; None where the model does without.
            seed: of the dropout; without dropout it changes nothing.

        Returns:
            (Z, C, X, Y) float32 in [−1, 1], channels in the order of ``modalities``.

        Raises:
            ValueError: an axis does not fit ``divisor``, or there are no tissue probabilities.
        """
        condition = self.condition(label_map(label, brain, len(self.classes)), tissue)
        with (
            torch.random.fork_rng([label.device] if label.is_cuda else []),
            as_in_training(self.generator, dropout=True, batch_statistics=False),
        ):
            torch.manual_seed(seed)
            return torch.cat([self(part) for part in condition.split(SLICES)])


@contextmanager
def _frozen(net: nn.Module) -> Iterator[None]:
    """Gradients pass through the network and do not stay there; its batch norms see the batch and do not note it."""
    net.requires_grad_(False)
    try:
        with as_in_training(net, dropout=True, batch_statistics=True):
            yield
    finally:
        net.requires_grad_(True)


def _l1(condition: Tensor, image: Tensor, made: Tensor) -> Tensor:
    """Mean of |y − ŷ| over the whole slice but for voxels of 255, which have no label; 0 where there are no others."""
    known = (condition != 0).any(dim=1, keepdim=True)  # (B, 1, X, Y)
    return (known * (image - made).abs()).sum() / (known.sum() * image.shape[1]).clamp(min=1)


def _mae(made: Tensor, image: Tensor, mask: Tensor) -> float:
    """Over the mask (Z, X, Y) in all sequences of images (Z, C, X, Y)."""
    everywhere = mask.unsqueeze(1).expand_as(image).flatten(0, 1)  # (Z · C, X, Y)
    return mae(made.flatten(0, 1), image.flatten(0, 1), everywhere)
