"""Pix2Pix in 3D: one sequence from another, by default T2 from T1 (Baldini et al., section 3).

A generator, a UNet-128 or a 6-block ResNet, is trained against a PatchGAN that sees source and target together. An L1
error over the brain and a squared error over the tumour hold it near the real target. The paper's 32 models are the two
generators with all pairs of weights of these two terms from {0, 100, 500, 1000}; with both 0 it is a pure GAN.

Volumes are scaled by their own extremes, to [−1, 1] for the networks and to [0, 1] for everybody else: per crop and
after the augmentation in training, per volume in synthesis; the background of 0 is the minimum. In 2D, slices stay on
the scale of their volume, which the data path's min–max normalisation gives them.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from mrgen.data.batch import IGNORED, Batch, volumes
from mrgen.losses.adversarial import discriminator_loss, generator_loss
from mrgen.metrics.means import SubjectMeans
from mrgen.metrics.reconstruction import mse, unit_range
from mrgen.nets.patchgan import PatchGAN
from mrgen.nets.pix2pix import ResNetGenerator, UNetGenerator, as_in_training, init_normal
from mrgen.protocols import Synthesis, Volumes

__all__ = ["Pix2Pix", "brain_l1", "tumour_error"]


def brain_l1(made: Tensor, target: Tensor, label: Tensor) -> Tensor:
    """Mean of |y − ŷ| over the target's brain: its voxels above the crop's minimum, not those of the source.

    Args:
        made: (B, 1, X, Y, Z), ŷ.
        target: (B, 1, X, Y, Z), y.
        label: (B, X, Y, Z); voxels of 255 do not count.

    Returns:
        A scalar, 0 for a crop of one value.
    """
    low = target.amin(tuple(range(1, target.ndim)), keepdim=True)
    mask = (target > low) & (label != IGNORED).unsqueeze(1)
    return (mask * (target - made).abs()).sum() / mask.sum().clamp(min=1)


def tumour_error(made: Tensor, target: Tensor, label: Tensor) -> Tensor:
    """Mean of (y − ŷ)² over the tumour, whatever its class.

    The paper's equation 4 masks the generator's input; the authors' code masks its output, and so does this.

    Args:
        made: (B, 1, X, Y, Z), ŷ.
        target: (B, 1, X, Y, Z), y.
        label: (B, X, Y, Z); 0 is no tumour, and voxels of 255 do not count.

    Returns:
        A scalar, 0 for a crop without tumour.
    """
    tumour = _tumour(label).unsqueeze(1)
    return (tumour * (target - made)).square().sum() / tumour.sum().clamp(min=1)


def _tumour(label: Tensor) -> Tensor:
    return (label > 0) & (label != IGNORED)


class Pix2Pix(LightningModule):
    """Generator and discriminator, one step of each a batch.

    Trains with manual optimisation: Lightning counts two steps a batch, so that epochs should end the training, and
    neither clips gradients nor accumulates them. Several devices need ``strategy=ddp_find_unused_parameters_true``.

    Args:
        modalities: the batch's sequences, in order.
        target: the sequence to synthesise.
        sources: the sequences that it is made from.
        generator: ``unet`` or ``resnet``.
        dims: 3 for volumes, 2 for axial slices; below, what is (B, …, X, Y, Z) is then (B, …, X, Y).
        filters, dropout: of the generator.
        downs: of the UNet; crops must be multiples of 2^downs.
        blocks: of the ResNet.
        discriminator_filters, discriminator_layers: of the PatchGAN; crops must have 3 · 2^layers voxels or more along
            every axis.
        l1_weight: λ.
        tumour_weight: γ.
        least_squares: LSGAN's adversarial loss in place of cross entropy.
        lr, betas: of both Adams.
        constant_epochs, decay_epochs: the learning rate is constant at first and then falls linearly towards 0.
        dropout_at_test: keep dropout active in synthesis, as Pix2Pix does.
        batch_statistics_at_test: let batch norms use a test volume's own statistics, as Pix2Pix does, and not the
            training's running ones.

    Attributes:
        scale: of its syntheses, [0, 1].
        sees_whole: at test it is given whole volumes, whatever crops it was trained on; in 2D slices.
        divisor: what every axis that the generator sees must be a multiple of.
    """

    scale = "unit"
    sees_whole = True

    def __init__(
        self,
        *,
        modalities: Sequence[str],
        target: str,
        sources: Sequence[str] = ("t1",),
        generator: Literal["unet", "resnet"] = "unet",
        dims: int = 3,
        filters: int = 64,
        dropout: float = 0.5,
        downs: int = 7,
        blocks: int = 6,
        discriminator_filters: int = 64,
        discriminator_layers: int = 3,
        l1_weight: float = 100.0,
        tumour_weight: float = 0.0,
        least_squares: bool = False,
        lr: float = 2e-4,
        betas: Sequence[float] = (0.5, 0.999),
        constant_epochs: int = 100,
        decay_epochs: int = 100,
        dropout_at_test: bool = True,
        batch_statistics_at_test: bool = True,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.modalities, self.sources, self.targets = tuple(modalities), tuple(sources), (target,)
        wanted = (*self.sources, target)
        if not self.sources or len(set(wanted)) < len(wanted) or not set(wanted) <= set(self.modalities):
            raise ValueError(
                f"sources are {list(self.sources)} and target is {target!r}; expected different ones of "
                f"{', '.join(self.modalities)}"
            )
        self.l1_weight, self.tumour_weight, self.least_squares = l1_weight, tumour_weight, least_squares
        self.lr, self.betas = lr, (betas[0], betas[1])
        self.constant_epochs, self.decay_epochs = constant_epochs, decay_epochs
        self.dropout_at_test, self.batch_statistics_at_test = dropout_at_test, batch_statistics_at_test

        self.generator: UNetGenerator | ResNetGenerator
        if generator == "unet":
            self.generator = UNetGenerator(len(sources), dims=dims, filters=filters, downs=downs, dropout=dropout)
        elif generator == "resnet":
            self.generator = ResNetGenerator(len(sources), dims=dims, filters=filters, blocks=blocks, dropout=dropout)
        else:
            raise ValueError(f"generator is {generator!r}; expected unet or resnet")
        self.discriminator = PatchGAN(
            len(sources) + 1, dims=dims, filters=discriminator_filters, layers=discriminator_layers
        )
        self.apply(init_normal)
        self.dims, self.sees_whole = dims, dims == 3
        self.divisor = self.generator.divisor
        self.val_means = SubjectMeans(["loss", "mse_brain", "mse_tumour"])

    @property
    def family(self) -> str:
        """``unet`` or ``resnet``: of each the best models are chosen on the validation subjects (section 5.2)."""
        return "unet" if isinstance(self.generator, UNetGenerator) else "resnet"

    def forward(self, volumes: Volumes) -> Tensor:
        """Synthesis (B, 1, X, Y, Z) in [−1, 1]."""
        return self.generator(self._scaled(volumes, self.sources)).float()

    def _scaled(self, volumes: Volumes, names: Sequence[str]) -> Tensor:
        x = torch.cat([volumes[name] for name in names], dim=1)  # (B, names, X, Y, Z)
        # A slice by its own extremes would be as bright at the vertex as in the middle.
        return 2 * (unit_range(x) if self.dims == 3 else x.clamp(0, 1)) - 1

    # ----- the two players ---------------------------------------------------------------------------------------

    def discriminator_loss(self, source: Tensor, target: Tensor, made: Tensor) -> Tensor:
        """Real pairs for real and synthesised ones for fake, halved. Reaches the generator unless ``made`` is detached.

        Args:
            source: (B, sources, X, Y, Z) in [−1, 1].
            target: (B, 1, X, Y, Z), the real one.
            made: (B, 1, X, Y, Z), the synthesised one.
        """
        real, fake = self.discriminator(source, target), self.discriminator(source, made)
        return discriminator_loss(real, fake, least_squares=self.least_squares)

    def generator_losses(self, source: Tensor, target: Tensor, made: Tensor, label: Tensor) -> dict[str, Tensor]:
        """``loss`` = ``adversarial`` + λ · ``l1`` + γ · ``tumour`` (equations 2 to 4); arguments as above."""
        fake = self.discriminator(source, made)
        out = {
            "adversarial": generator_loss(fake, least_squares=self.least_squares),
            "l1": brain_l1(made, target, label),
            "tumour": tumour_error(made, target, label),
        }
        out["loss"] = out["adversarial"] + self.l1_weight * out["l1"] + self.tumour_weight * out["tumour"]
        return out

    def discriminator_step(self, source: Tensor, target: Tensor, made: Tensor) -> dict[str, Tensor]:
        """Improves the discriminator against a synthesis as it is."""
        loss = self.discriminator_loss(source, target, made.detach())
        self._descend(self.optimizers()[1], loss)  # type: ignore[index]
        return {"discriminator": loss.detach()}

    def generator_step(self, source: Tensor, target: Tensor, made: Tensor, label: Tensor) -> dict[str, Tensor]:
        """Improves the generator against the discriminator as it is."""
        self.discriminator.requires_grad_(False)  # gradients pass through it and need not stay there
        losses = self.generator_losses(source, target, made, label)
        self._descend(self.optimizers()[0], losses["loss"])  # type: ignore[index]
        self.discriminator.requires_grad_(True)
        return {name: loss.detach() for name, loss in losses.items()}

    def _descend(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    # ----- training ----------------------------------------------------------------------------------------------

    def pair(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Source (B, sources, X, Y, Z) and target (B, 1, X, Y, Z), each scaled to [−1, 1] by its crop's extremes."""
        inputs = volumes(batch, self.modalities)
        return self._scaled(inputs, self.sources), self._scaled(inputs, self.targets)

    def losses(self, batch: Batch, weights: Tensor | None = None) -> dict[str, Tensor]:
        """Both players' losses added up in ``loss``: what a step costs, for ``plan=true``. No classes, no weights."""
        source, target = self.pair(batch)
        made = self.generator(source).float()
        discriminator = self.discriminator_loss(source, target, made.detach())
        return {"loss": discriminator + self.generator_losses(source, target, made, batch["label"])["loss"]}

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        source, target = self.pair(batch)
        made = self.generator(source).float()
        losses = self.discriminator_step(source, target, made)
        losses |= self.generator_step(source, target, made, batch["label"])
        size = source.shape[0]
        self.log("train/loss", losses.pop("loss"), on_epoch=True, prog_bar=True, batch_size=size, sync_dist=True)
        for name, loss in losses.items():
            self.log(f"train/{name}", loss, on_step=False, on_epoch=True, batch_size=size, sync_dist=True)

    def on_train_epoch_end(self) -> None:
        for scheduler in self.lr_schedulers():  # type: ignore[union-attr]
            scheduler.step()  # type: ignore[call-arg]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Mean squared errors on [0, 1] of a synthesis as at test; the one in the brain chooses the best epoch."""
        inputs = volumes(batch, self.modalities)
        made, target = self.synthesize(inputs).mean, (self._scaled(inputs, self.targets) + 1) / 2
        # Validation batches hold one subject each.
        brain = mse(made[0, 0], target[0, 0], batch["brain"][0])
        tumour = mse(made[0, 0], target[0, 0], _tumour(batch["label"])[0])
        self.val_means.add({"loss": brain, "mse_brain": brain, "mse_tumour": tumour})

    def on_validation_epoch_end(self) -> None:
        for name, mean in self.val_means.take().items():
            self.log(f"val/{name}", mean, prog_bar=name == "loss")

    def configure_optimizers(self) -> Any:
        def rate(epoch: int) -> float:
            """1 for the constant epochs, then down by equal steps that would reach 0 after the last one."""
            return max(0.0, 1 - max(0, epoch + 1 - self.constant_epochs) / (self.decay_epochs + 1))

        def player(net: nn.Module, name: str) -> dict[str, Any]:
            optimizer = torch.optim.Adam(net.parameters(), lr=self.lr, betas=self.betas)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "name": f"lr-{name}"}}

        return [player(self.generator, "generator"), player(self.discriminator, "discriminator")]

    # ----- what evaluation calls ---------------------------------------------------------------------------------

    @torch.no_grad()
    def synthesize(self, volumes: Volumes) -> Synthesis:
        """The target from ``sources`` in [0, 1], each scaled by its own extremes; 0, the minimum, outside their brain.

        Give it whole volumes: extremes and batch statistics of a patch are not those of the volume.
        """
        source = self._scaled(volumes, self.sources)
        with as_in_training(
            self.generator, dropout=self.dropout_at_test, batch_statistics=self.batch_statistics_at_test
        ):
            unit = (self.generator(source).float() + 1) / 2
        brain = (source > -1).any(dim=1, keepdim=True)  # (B, 1, X, Y, Z)
        return Synthesis(mean=torch.where(brain, unit, 0.0), variance=None, scale=self.scale)
