"""Joint imputation of FLAIR and segmentation of white matter hyperintensities (Orbes-Arteaga et al.).

An imputer G makes the FLAIR from the T1, a segmenter C finds the lesions in the T1 and that synthetic FLAIR. Both are
the 2D U-Net of Li et al. and take turns on every batch: C learns from what G makes, G from the real FLAIR and, through
C, from the lesions. C never sees a real FLAIR; after training a T1 is enough.

The paper compares this with the same two networks trained one after the other (offline synthesis) and with C on the T1
alone (Unimodal). C on T1 and real FLAIR, the upper bound, is ours.

Where a number here is not the paper's, ``conf/model/joint.yaml`` says where it comes from.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from mrgen.data.batch import IGNORED, Batch, volumes
from mrgen.errors import UserError
from mrgen.losses.reconstruction import weighted_mse
from mrgen.losses.segmentation import binary_cross_entropy, soft_dice
from mrgen.metrics.means import SubjectMeans
from mrgen.metrics.segmentation import dice
from mrgen.nets.li_unet import LiUNet
from mrgen.protocols import Segmentation, Synthesis, Volumes

__all__ = ["JointImputation", "LesionSegmentation", "OfflineImputation"]

LOSSES = {"cross_entropy": binary_cross_entropy, "dice": soft_dice}
SLICES = 16  # of a validation subject that are computed at once


class JointImputation(LightningModule):
    """Imputer and segmenter, one step of each a batch.

    Trains with manual optimisation: Lightning counts two steps a batch, so that epochs should end the training, and
    neither clips gradients nor accumulates them. Several devices need ``strategy=ddp_find_unused_parameters_true``.

    Args:
        modalities: the batch's sequences, in order.
        source: the sequence that there is at test.
        target: the sequence to impute.
        width: of both networks, see ``LiUNet``.
        slope: of the LeakyReLU at G's end, for which a normalised FLAIR below its mean is negative.
        segmentation_loss: ``cross_entropy`` (binary, equation 4) or ``dice`` (soft, of Li et al.), for both players.
        seg_weight: of the segmentation term in G's loss, 1 in equation 5.
        lr, betas: of both Adams.

    Attributes:
        scale: of its syntheses, that of ``mrgen.data.normalisation.Gaussian``.
        pads_with_minimum: what exceeds a scan is filled with its minimum, as Li et al. do, and not with 0.
        writes_segmentation: ``mrgen-synthesize`` writes the lesions too.
        stages: of a training, each of ``trainer.max_epochs`` epochs; ``stage``, from 0, is saved in checkpoints.
    """

    scale = "gaussian"
    pads_with_minimum = True
    writes_segmentation = True
    divisor = 1
    stages = 1

    def __init__(
        self,
        *,
        modalities: Sequence[str],
        target: str,
        source: str = "t1",
        width: int = 64,
        slope: float = 0.3,
        segmentation_loss: Literal["cross_entropy", "dice"] = "cross_entropy",
        seg_weight: float = 1.0,
        lr: float = 2e-4,
        betas: Sequence[float] = (0.9, 0.999),
    ):
        super().__init__()
        self.automatic_optimization = False
        _check_sequences(modalities, source, target)
        self.modalities, self.sources, self.targets = tuple(modalities), (source,), (target,)
        self.slope, self.seg_weight, self.lr, self.betas = slope, seg_weight, lr, (betas[0], betas[1])
        self.segmentation_loss = LOSSES[segmentation_loss]
        self.imputer = LiUNet(1, width=width)
        self.segmenter = LiUNet(2, width=width)
        self.stage: Tensor
        self.register_buffer("stage", torch.tensor(0))
        self.val_means = SubjectMeans(["loss", "dice", "segmentation", "reconstruction"])

    def forward(self, volumes: Volumes) -> tuple[Tensor, Tensor]:
        """Synthetic target and lesion logits, each (B, 1, X, Y)."""
        source = volumes[self.sources[0]]
        made = self.impute(source)
        return made, self.find(source, made)

    def impute(self, source: Tensor) -> Tensor:
        """G: (B, 1, X, Y) to (B, 1, X, Y)."""
        return F.leaky_relu(self.imputer(source).float(), self.slope)

    def find(self, source: Tensor, made: Tensor) -> Tensor:
        """C: the T1 and a FLAIR that G made, each (B, 1, X, Y), to lesion logits (B, 1, X, Y)."""
        return self.segmenter(torch.cat([source, made], dim=1)).float()

    # ----- the two players ---------------------------------------------------------------------------------------

    def segmenter_loss(self, source: Tensor, made: Tensor, label: Tensor) -> Tensor:
        """L_C (equation 4). Reaches the imputer unless ``made`` is detached.

        Args:
            source, made: (B, 1, X, Y), the real T1 and the synthetic FLAIR; ``target`` below is the real one.
            label: (B, X, Y); any class is lesion, 255 does not count.
        """
        return self.segmentation_loss(self.find(source, made), label)

    def imputer_losses(self, source: Tensor, target: Tensor, made: Tensor, label: Tensor) -> dict[str, Tensor]:
        """L_G (equation 5): ``loss`` = ``reconstruction`` + seg_weight · ``segmentation``; arguments as above."""
        out = {
            "reconstruction": weighted_mse(made, target, label),
            "segmentation": self.segmenter_loss(source, made, label),
        }
        out["loss"] = out["reconstruction"] + self.seg_weight * out["segmentation"]
        return out

    def segmenter_step(self, source: Tensor, made: Tensor, label: Tensor) -> dict[str, Tensor]:
        """Improves C on a synthesis as it is."""
        loss = self.segmenter_loss(source, made.detach(), label)
        self._descend(self.optimizers()[1], loss)  # type: ignore[index]
        return {"segmenter": loss.detach()}

    def imputer_step(self, source: Tensor, target: Tensor, made: Tensor, label: Tensor) -> dict[str, Tensor]:
        """Improves G, through C as it is now."""
        with _frozen(self.segmenter):
            losses = self.imputer_losses(source, target, made, label)
            self._descend(self.optimizers()[0], losses["loss"])  # type: ignore[index]
        return {name: loss.detach() for name, loss in losses.items()}

    def _descend(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    # ----- training ----------------------------------------------------------------------------------------------

    def parts(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Source and target, each (B, 1, X, Y), and label (B, X, Y)."""
        inputs = volumes(batch, self.modalities)
        return inputs[self.sources[0]], inputs[self.targets[0]], batch["label"]

    def losses(self, batch: Batch, weights: Tensor | None = None) -> dict[str, Tensor]:
        """Both players' losses added up in ``loss``: what a step costs, for ``plan=true``. No classes, no weights."""
        source, target, label = self.parts(batch)
        made = self.impute(source)
        segmenter = self.segmenter_loss(source, made.detach(), label)
        return {"loss": segmenter + self.imputer_losses(source, target, made, label)["loss"]}

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        source, target, label = self.parts(batch)
        made = self.impute(source)  # once: C sees its values, G is improved through them
        losses = self.segmenter_step(source, made, label)
        losses |= self.imputer_step(source, target, made, label)
        self._log_losses(losses, source.shape[0])

    def _log_losses(self, losses: dict[str, Tensor], size: int) -> None:
        self.log("train/loss", losses.pop("loss"), on_epoch=True, prog_bar=True, batch_size=size, sync_dist=True)
        for name, loss in losses.items():
            self.log(f"train/{name}", loss, on_step=False, on_epoch=True, batch_size=size, sync_dist=True)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """All slices of one subject; ``loss`` chooses the best epoch."""
        source, target, label = self.parts(batch)
        made, logits = self._in_parts(source)
        self.val_means.add(
            {**_scores(logits, label, self.segmentation_loss), "reconstruction": weighted_mse(made, target, label)}
        )

    def _in_parts(self, source: Tensor) -> tuple[Tensor, Tensor]:
        made, logits = zip(*(self({self.sources[0]: part}) for part in source.split(SLICES)), strict=True)
        return torch.cat(made), torch.cat(logits)

    def on_validation_epoch_end(self) -> None:
        _log_means(self)

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.Adam(net.parameters(), lr=self.lr, betas=self.betas) for net in (self.imputer, self.segmenter)
        ]

    # ----- what evaluation calls ---------------------------------------------------------------------------------

    @torch.no_grad()
    def synthesize(self, volumes: Volumes) -> Synthesis:
        """The target from the source, (B, 1, X, Y)."""
        return Synthesis(mean=self.impute(volumes[self.sources[0]]), variance=None, scale=self.scale)

    @torch.no_grad()
    def segment(self, volumes: Volumes) -> Segmentation:
        """The lesions from the source alone: labels 0 and 1, (B, X, Y), where lesion is the likelier."""
        return _segmentation(self(volumes)[1])


class OfflineImputation(JointImputation):
    """The baseline "offline synthesis": G on the reconstruction error alone, then frozen, then C on what it makes.

    Both stages have ``trainer.max_epochs`` epochs in one run, so that each network sees as many batches as in the joint
    training. C gets the G with the least error on the validation subjects, or the last one where there are none.
    """

    stages = 2

    def setup(self, stage: str) -> None:
        self.best: dict[str, Any] = {}  # G of the least validation error so far: ``error``, and its ``weights``

    def on_train_epoch_start(self) -> None:
        epochs = int(self.trainer.max_epochs or 0) // self.stages
        if self.current_epoch >= epochs and self.stage == 0:  # and never back, whatever a resumed run's epochs
            self.stage.fill_(1)
            if self.best:
                self.imputer.load_state_dict(self.best["weights"])
                self.best = {}

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        source, target, label = self.parts(batch)
        if self.stage == 0:
            loss = weighted_mse(self.impute(source), target, label)
            self._descend(self.optimizers()[0], loss)  # type: ignore[index]
            losses = {"loss": loss.detach(), "reconstruction": loss.detach()}
        else:
            self.imputer.eval()  # frozen as at test, its running statistics too
            with torch.no_grad():
                made = self.impute(source)
            losses = self.segmenter_step(source, made, label)
            losses["loss"] = losses["segmenter"]
        self._log_losses(losses, source.shape[0])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if self.stage == 1:
            return super().validation_step(batch, batch_idx)
        source, target, label = self.parts(batch)
        error = weighted_mse(torch.cat([self.impute(part) for part in source.split(SLICES)]), target, label)
        # Above what 1 − Dice can be: no checkpoint of the first stage may pass for the best.
        none = torch.nan  # is skipped
        self.val_means.add({"loss": 2 + error, "reconstruction": error, "dice": none, "segmentation": none})

    def on_validation_epoch_end(self) -> None:
        error = float(_log_means(self)["reconstruction"])
        if self.stage == 0 and error < self.best.get("error", torch.inf):
            self.best = {"error": error, "weights": {name: w.clone() for name, w in self.imputer.state_dict().items()}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["best_imputer"] = self.best

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.best = checkpoint["best_imputer"]

    def check_trained(self) -> None:
        """Raises UserError for a checkpoint of the first stage, whose C is untrained."""
        if self.stage == 0:
            raise UserError(
                "this run of offline synthesis stopped in its first stage, before its segmenter was trained; "
                "go on with it: resume=RUN"
            )

    def segment(self, volumes: Volumes) -> Segmentation:
        """As of the joint method, once ``check_trained``."""
        self.check_trained()
        return super().segment(volumes)


class LesionSegmentation(LightningModule):
    """C alone: on the T1 (the paper's Unimodal), or on T1 and real FLAIR (the upper bound, ours).

    Args:
        modalities, source, target, width, segmentation_loss, lr, betas: as of ``JointImputation``.
        sees_target: with the real target as a second input.

    Attributes:
        pads_with_minimum, writes_segmentation: as of ``JointImputation``.
    """

    pads_with_minimum = True
    writes_segmentation = True
    divisor = 1

    def __init__(
        self,
        *,
        modalities: Sequence[str],
        target: str,
        source: str = "t1",
        sees_target: bool = False,
        width: int = 64,
        segmentation_loss: Literal["cross_entropy", "dice"] = "cross_entropy",
        lr: float = 2e-4,
        betas: Sequence[float] = (0.9, 0.999),
    ):
        super().__init__()
        _check_sequences(modalities, source, target)
        self.modalities, self.sources = tuple(modalities), (source, target) if sees_target else (source,)
        self.lr, self.betas = lr, (betas[0], betas[1])
        self.segmentation_loss = LOSSES[segmentation_loss]
        self.segmenter = LiUNet(len(self.sources), width=width)
        self.val_means = SubjectMeans(["loss", "dice", "segmentation"])

    def forward(self, volumes: Volumes) -> Tensor:
        """Lesion logits (B, 1, X, Y)."""
        return self.segmenter(torch.cat([volumes[name] for name in self.sources], dim=1)).float()

    def losses(self, batch: Batch, weights: Tensor | None = None) -> dict[str, Tensor]:
        """``loss`` (equation 4); no class weights."""
        return {"loss": self.segmentation_loss(self(volumes(batch, self.modalities)), batch["label"])}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.losses(batch)["loss"]
        size = batch["image"].shape[0]
        self.log("train/loss", loss, on_epoch=True, prog_bar=True, batch_size=size, sync_dist=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """All slices of one subject; ``loss`` chooses the best epoch."""
        parts = [self(volumes({**batch, "image": part}, self.modalities)) for part in batch["image"].split(SLICES)]
        logits = torch.cat(parts)  # (slices, 1, X, Y)
        self.val_means.add(_scores(logits, batch["label"], self.segmentation_loss))

    def on_validation_epoch_end(self) -> None:
        _log_means(self)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.lr, betas=self.betas)

    @torch.no_grad()
    def segment(self, volumes: Volumes) -> Segmentation:
        """The lesions: labels 0 and 1, (B, X, Y), where lesion is the likelier."""
        return _segmentation(self(volumes))


@contextmanager
def _frozen(net: nn.Module) -> Iterator[None]:
    """Gradients pass through the network and do not stay there; its batch norms see the batch and do not note it."""
    norms = [layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]
    net.requires_grad_(False)
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        net.requires_grad_(True)
        for norm in norms:
            norm.track_running_stats = True


def _check_sequences(modalities: Sequence[str], source: str, target: str) -> None:
    if source == target or not {source, target} <= set(modalities):
        raise ValueError(
            f"source is {source!r} and target is {target!r}; expected two different ones of {', '.join(modalities)}"
        )


def _scores(logits: Tensor, label: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> dict[str, float]:
    """Of all slices (Z, 1, X, Y) of a subject: ``dice``, ``segmentation``, and ``loss``, which is 1 − Dice.

    As long as no lesion is found anywhere, all epochs have a Dice of 0, and a trace of the segmentation loss decides.
    """
    score, segmentation = dice(logits[:, 0] > 0, label > 0, label == IGNORED), float(loss(logits, label))
    return {"dice": score, "segmentation": segmentation, "loss": 1 - score + 1e-4 * segmentation}


def _segmentation(logits: Tensor) -> Segmentation:
    probability = logits.sigmoid()  # (B, 1, X, Y)
    return Segmentation(
        labels=(logits[:, 0] > 0).long(), probabilities=torch.cat([1 - probability, probability], dim=1)
    )


def _log_means(module: Any) -> dict[str, Tensor]:
    means = module.val_means.take()
    for name, mean in means.items():
        if not torch.isnan(mean):  # the first stage of two has no segmentation
            module.log(f"val/{name}", mean, prog_bar=name == "loss")
    return means
