"""Stage 2: from a structure map and a lesion label to registered images of all sequences (Qu et al., 2.4 to 2.7).

Real slices are encoded by EC into codes that know no sequence, and decoded by DC into the sequence that a one-hot map
names: reconstruction and translation ("stage 2a"). A map with a label fused into it is encoded by EC_R into such a
code, which DC turns into every sequence: generation ("2b"). Both are one step. Discriminators tell real images from
made ones, and their sequence; a discriminator of codes tells EC's from EC_R's; segmentors that learn on real slices
alone ask that made lesions are found where the label has them.

Training is unpaired: the slices of a step's sequences come from different places. Images are on [0, 1].
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from mrgen.data.batch import Batch
from mrgen.metrics.means import SubjectMeans
from mrgen.metrics.reconstruction import mae
from mrgen.nets.lesion_vaegan import (
    CodeDiscriminator,
    ImageDiscriminator,
    LesionSegmentors,
    Scheme,
    blur_init,
)
from mrgen.papers.lesion_vaegan.generator import Generator, Made, Real
from mrgen.papers.lesion_vaegan.maps import fits, outside, outside_lesion, structure_map
from mrgen.papers.lesion_vaegan.segmentors import check_class_weights, lesion_loss
from mrgen.papers.lesion_vaegan.structure import check_weights, frozen

__all__ = ["LesionVAEGAN"]

# The page's terms by who is trained with them; conf/model/lesion_vaegan.yaml has their weights and formulas.
DISCRIMINATOR = (
    "d1_translated",
    "d1_category",
    "d1_code",
    "d2_real",
    "d2_real_category",
    "d2_synthetic",
    "d2_synthetic_category",
    "d2_code",
)
GENERATOR = (
    "g1_adversarial",
    "g1_category",
    "reconstruction",
    "cycle",
    "cycle_pairs",
    "semantic1",
    "semantic1_pairs",
    "g2_adversarial",
    "g2_category",
    "g2_code",
    "structure",
    "structure_pairs",
    "lesion2",
    "registration",
    "registration_pairs",
    "semantic2",
    "semantic2_pairs",
    "background_reconstructed",
    "background_translated",
    "background_synthetic",
)
SEGMENTOR = ("lesion1",)
SLICES = 16  # that are computed at once where there are no gradients


class LesionVAEGAN(LightningModule):
    """Generator, discriminators and segmentors, stepped together from one forward pass, as in the authors' code.

    Trains with manual optimisation: Lightning counts three steps a batch, so that epochs should end the training, and
    neither clips gradients nor accumulates them. Several devices need nothing but ``trainer=ddp`` as long as no weight
    leaves a whole network out.

    Args:
        modalities: the sequences, two or more.
        classes: names of the label's mapped classes, the first being no lesion.
        weights: of every term in ``DISCRIMINATOR``, ``GENERATOR`` and ``SEGMENTOR``; 0 leaves a term out.
        lesion1_class_weights, lesion1_index_weight: of ``lesion_loss`` on real slices;
        lesion2_class_weights, lesion2_index_weight: and on synthetic ones.
        width: channels of the first layer of encoders, decoders and segmentors.
        discriminator_width: of the discriminators.
        scheme: of the segmentors, see ``LesionSegmentors``.
        dropout: of the encoders' and segmentors' input pixels.
        init: ``normal``, or ``blur`` for the authors' first weights.
        label_share: of a label's one-hot channel in the fused map; the structure map has the rest.
        norm_after_map: as published, an instance norm follows the convolution in DC that sees the sequences' one-hot
            maps, of which it leaves nothing but at the borders. Left out: a deliberate repair.
        beta, tau: of ``structure_map``.
        expand: of the brains' masks, in pixels, see ``outside``.
        lr, betas: of all three Adams.

    Attributes:
        scale: of its images, [0, 1].
        unpaired: training batches are one of each sequence.
        divisor, smallest: what every axis of a slice must be a multiple of, and the least that it may be.
    """

    scale = "unit"
    guides: tuple[str, ...] = ()
    unpaired = True
    divisor = 4
    smallest = 20  # D leaves 2 × 2 of it, and of a single number an instance norm makes 0

    def __init__(
        self,
        *,
        modalities: Sequence[str],
        classes: Sequence[str],
        weights: Mapping[str, float],
        lesion1_class_weights: Sequence[float] = (1.0, 5.0, 15.0),
        lesion1_index_weight: float = 5.0,
        lesion2_class_weights: Sequence[float] = (2.5, 25.0, 125.0),
        lesion2_index_weight: float = 125.0,
        width: int = 64,
        discriminator_width: int = 64,
        scheme: Scheme = "multiple",
        dropout: float = 0.1,
        init: Literal["normal", "blur"] = "normal",
        label_share: float = 0.2,
        norm_after_map: bool = False,
        beta: float = 0.12,
        tau: float = 0.02,
        expand: int = 5,
        lr: float = 1e-4,
        betas: Sequence[float] = (0.5, 0.999),
    ):
        super().__init__()
        self.automatic_optimization = False
        terms = (*DISCRIMINATOR, *GENERATOR, *SEGMENTOR)
        check_weights(weights, terms)
        if not (tau > 0 and expand >= 0 and 0 <= label_share <= 1):
            raise ValueError(
                f"tau is {tau}, expand {expand} and label_share {label_share}; expected tau above 0, expand from "
                "0 on and label_share from 0 to 1"
            )
        if len(modalities) < 2 or len(classes) < 2:
            raise ValueError(
                f"modalities are {list(modalities)} and classes {list(classes)}; expected two sequences or more, and "
                "no lesion and one class of lesion or more"
            )
        self.modalities, self.classes, self.weights = tuple(modalities), tuple(classes), dict(weights)
        check_class_weights(lesion1_class_weights)
        check_class_weights(lesion2_class_weights)
        self.lesion1: dict[str, Any] = {
            "class_weights": list(lesion1_class_weights),
            "index_weight": lesion1_index_weight,
        }
        self.lesion2: dict[str, Any] = {
            "class_weights": list(lesion2_class_weights),
            "index_weight": lesion2_index_weight,
        }
        self.scheme = scheme
        self.beta, self.tau, self.expand = beta, tau, expand
        self.lr, self.betas = lr, (betas[0], betas[1])

        sequences = len(self.modalities)
        self.generator = Generator(sequences, len(self.classes), width, dropout, label_share, norm_after_map)
        if init == "blur":
            self.generator.apply(blur_init)
        self.discriminator = ImageDiscriminator(discriminator_width)  # D
        self.code_discriminator = CodeDiscriminator(8 * width, discriminator_width)  # FD
        self.segmentors = LesionSegmentors(sequences, len(self.classes), width, scheme, dropout)
        self.pairs = self.generator.pairs
        self.val_means = SubjectMeans(["loss", "mae_reconstructed", "mae_translated", "mae_synthetic"])

    def forward(self, real: Real) -> Made:
        """All that is made of a step's slices."""
        return self.generator(real)

    @torch.no_grad()
    def synthesise(self, structure: Tensor, lesion: Tensor) -> Tensor:
        """Images of all sequences from maps (n, 1, X, Y) and labels (n, X, Y): (n, C, X, Y) in (0, 1)."""
        sequences, parts = len(self.modalities), []
        for maps, labels in zip(structure.split(SLICES), lesion.split(SLICES), strict=True):
            code = self.generator.fusion_encoder(self.generator.fuse(maps, labels))
            images = self.generator.decode(code.expand(sequences, *code.shape), range(sequences))  # (C, b, 1, X, Y)
            parts.append(images[:, :, 0].transpose(0, 1))
        return torch.cat(parts)

    # ----- losses, by who is trained with them -------------------------------------------------------------------

    def discriminator_terms(self, real: Real, made: Made) -> dict[str, Tensor]:
        """loss_{d,1} and loss_{d,2}, which reach D and FD alone. Real codes are true, fused ones fake."""
        sequences, pairs = len(self.modalities), len(self.pairs)
        images = torch.cat([real.image, made.translated.detach(), made.synthetic.detach()]).flatten(0, 1)
        patches = (part.float().unflatten(0, (-1, real.image.shape[1])) for part in self.discriminator(images))
        (d, d_t, d_g), (c, c_t, c_g) = (part.split([sequences, pairs, sequences]) for part in patches)
        own, targets = self._numbers(made.code)
        code = self.code_discriminator(made.code.detach().flatten(0, 1)).float()
        code_g = self.code_discriminator(made.code_g.detach()).float()
        return {
            "d1_translated": _sum(d_t),
            "d1_category": _sum(c_t - targets),
            "d1_code": sequences * (code - 1).square().mean(),
            "d2_real": _sum(d - 1),
            "d2_real_category": _sum(c - own),
            "d2_synthetic": _sum(d_g),
            "d2_synthetic_category": _sum(c_g - own),
            "d2_code": code_g.square().mean(),
        }

    def generator_terms(self, real: Real, made: Made) -> dict[str, Tensor]:
        """All other losses but that of the segmentors; they reach EC, EC_R and DC alone."""
        sequences, pairs = len(self.modalities), len(self.pairs)
        sources = [j for j, _ in self.pairs]
        by_target = sorted(range(pairs), key=lambda p: self.pairs[p][1])  # the order of translations to a target
        own, targets = self._numbers(made.code)
        with frozen(self.discriminator, self.code_discriminator, self.segmentors):
            images = torch.cat([made.translated, made.synthetic]).flatten(0, 1)
            patches = (part.float().unflatten(0, (-1, real.image.shape[1])) for part in self.discriminator(images))
            (d_t, d_g), (c_t, c_g) = (part.split([pairs, sequences]) for part in patches)
            code_g = self.code_discriminator(made.code_g).float()
            scores = self.segmentors(made.synthetic).float()

        edges = structure_map(made.synthetic.flatten(0, 1), self.beta, self.tau).unflatten(0, made.synthetic.shape[:2])
        edges = edges * outside_lesion(real.lesion)  # (C, B, 1, X, Y); the lesion has edges of its own
        wanted = real.structure * outside_lesion(real.lesion)
        codes, again = made.code.float(), made.recode.float()
        fused, again_g = made.code_g.float(), made.recode_g.float()
        air = outside(real.image.flatten(0, 1), self.expand).unflatten(0, real.image.shape[:2])  # (C, B, 1, X, Y)
        apart = (sequences, sequences - 1)  # pairs by source, or by target
        return {
            "g1_adversarial": _sum(d_t - 1),
            "g1_category": _sum(c_t - targets),
            "reconstruction": _sum(real.image - made.reconstructed),
            "cycle": _sum(real.image[sources] - made.cycled),
            "cycle_pairs": _between(made.cycled.unflatten(0, apart)),
            "semantic1": _sum(codes[sources] - again),
            "semantic1_pairs": _between(again.unflatten(0, apart)),
            "g2_adversarial": _sum(d_g - 1),
            "g2_category": _sum(c_g - own),
            "g2_code": (code_g - 1).square().mean(),
            "structure": _sum(wanted - edges),
            "structure_pairs": _between(edges[None]),
            "lesion2": lesion_loss(scores, real.lesion, **self.lesion2),
            "registration": _sum(made.synthetic[[i for _, i in self.pairs]] - made.translated_g),
            "registration_pairs": _between(made.translated_g[by_target].unflatten(0, apart)),
            "semantic2": _sum(fused - again_g),
            "semantic2_pairs": _between(again_g[None]),
            "background_reconstructed": _sum(made.reconstructed * air),
            "background_translated": _sum(made.translated * air[sources]),
            "background_synthetic": _sum(made.synthetic * real.mask) + _sum(made.translated_g * real.mask),
        }

    def segmentor_terms(self, real: Real) -> dict[str, Tensor]:
        """loss_{lesion,1}, which reaches the segmentors alone, and these see real slices alone."""
        return {"lesion1": lesion_loss(self.segmentors(real.image).float(), real.label, **self.lesion1)}

    def _numbers(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The sequences' numbers (C, 1, 1, 1, 1), which D's category head regresses, and the pairs' targets."""
        own = torch.arange(len(self.modalities), device=like.device, dtype=torch.float32)[:, None, None, None, None]
        return own, own[[i for _, i in self.pairs]]

    def terms(self, real: Real) -> dict[str, Tensor]:
        """All of them, unweighted, from one forward pass."""
        made = self(real)
        return self.discriminator_terms(real, made) | self.generator_terms(real, made) | self.segmentor_terms(real)

    # ----- training ----------------------------------------------------------------------------------------------

    def real(self, batch: Mapping[str, Batch]) -> Real:
        """A step's slices; each map is of one sequence at random, with the first lesion that lies within its brain.

        Where none of the lesions that came with it does, the slice keeps its own.
        """
        parts = [batch[name] for name in self.modalities]
        image = torch.stack([part["image"] for part in parts])  # (C, B, 1, X, Y)
        label = torch.stack([part["label"] for part in parts])  # (C, B, X, Y)
        offered = torch.stack([part["lesions"] for part in parts])  # (C, B, K, X, Y)
        size = image.shape[1]
        shown = torch.randint(len(parts), (size,), device=image.device), torch.arange(size, device=image.device)
        mask = outside(image[shown], self.expand)
        candidates = torch.cat([offered[shown], label[shown][:, None].to(offered.dtype)], dim=1)  # (B, K + 1, X, Y)
        fitting = torch.stack([fits(mask, one) for one in candidates.unbind(dim=1)], dim=1)  # (B, K + 1)
        fitting[:, -1] = True
        chosen = fitting.int().argmax(dim=1)  # the first that fits
        lesion = candidates[shown[1], chosen].long()
        structure = structure_map(image[shown], self.beta, self.tau) * outside_lesion(label[shown])
        return Real(image, label, structure, mask, lesion)

    def losses(self, batch: Batch, weights: Tensor | None = None) -> dict[str, Tensor]:
        """All weighted terms in ``loss``: what a step costs, for ``plan=true``, whose batch is a paired one."""
        named: dict[str, Any] = {
            name: {**batch, "image": batch["image"][:, i : i + 1], "lesions": batch["label"][:, None]}
            for i, name in enumerate(self.modalities)
        }
        terms = self.terms(self.real(named))
        return {"loss": torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()}

    def training_step(self, batch: Mapping[str, Batch], batch_idx: int) -> None:
        real = self.real(batch)
        terms = self.terms(real)
        weighted = {name: self.weights[name] * term for name, term in terms.items()}
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        # No term reaches two groups' parameters, so that one backward pass serves all three.
        self.manual_backward(torch.stack([term for name, term in weighted.items() if self.weights[name]]).sum())
        for optimizer in optimizers:
            optimizer.step()
        size = real.image.shape[1]
        loss = torch.stack([weighted[name] for name in GENERATOR]).sum()
        self.log("train/loss", loss.detach(), on_epoch=True, prog_bar=True, batch_size=size, sync_dist=True)
        for name, term in terms.items():
            self.log(f"train/{name}", term.detach(), on_step=False, on_epoch=True, batch_size=size, sync_dist=True)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """All slices of one subject, whose sequences belong together: errors within the brain, on [0, 1].

        ``mae_translated`` is the mean over all pairs, ``mae_synthetic`` that from the map and the label of the first
        sequence; ``loss`` is the former.
        """
        image, brain = batch["image"], batch["brain"]  # (Z, C, X, Y), (Z, X, Y)
        sequences, stacked = len(self.modalities), image.transpose(0, 1)[:, :, None]  # (C, Z, 1, X, Y)
        made: list[tuple[Tensor, Tensor, Tensor]] = []
        for part, label in zip(stacked.split(SLICES, dim=1), batch["label"].split(SLICES), strict=True):
            code = self.generator.encode(part)
            pairs = torch.cat([self.generator.decode(code[[j]], [i]) for j, i in self.pairs])  # (P, b, 1, X, Y)
            structure = structure_map(part[0], self.beta, self.tau) * outside_lesion(label)
            synthetic = self.synthesise(structure, label)[:, :, None].transpose(0, 1)
            made.append((self.generator.decode(code, range(sequences)), pairs, synthetic))
        reconstructed, translated, synthetic = (torch.cat(parts, dim=1) for parts in zip(*made, strict=True))
        means: dict[str, float | Tensor] = {}
        for name, images, wanted in (
            ("reconstructed", reconstructed, stacked),
            ("translated", translated, stacked[[i for _, i in self.pairs]]),
            ("synthetic", synthetic, stacked),
        ):
            errors = [
                mae(one[:, 0], other[:, 0], brain) for one, other in zip(images, wanted, strict=True)
            ]  # (Z, X, Y) each
            means[f"mae_{name}"] = torch.stack([torch.as_tensor(error) for error in errors]).mean()
        self.val_means.add({"loss": means["mae_translated"], **means})

    def on_validation_epoch_end(self) -> None:
        for name, mean in self.val_means.take().items():
            self.log(f"val/{name}", mean, prog_bar=name == "loss")

    def configure_optimizers(self) -> Any:
        def side(*nets: nn.Module) -> torch.optim.Optimizer:
            parameters = [p for net in nets for p in net.parameters()]
            return torch.optim.Adam(parameters, lr=self.lr, betas=self.betas)

        return [
            side(self.generator),
            side(self.discriminator, self.code_discriminator),
            side(self.segmentors),
        ]


def _sum(error: Tensor) -> Tensor:
    """Σ ‖·‖² over the first axis, each the mean over the rest."""
    return error.square().flatten(1).mean(dim=1).sum()


def _between(images: Tensor) -> Tensor:
    """Σ ‖a_j − a_k‖² over ordered pairs along the second axis, summed over the first; 0 of one alone.

    Of n such images the sum is 2 n² times their variance.
    """
    n = images.shape[1]
    return 2 * n**2 * images.var(dim=1, unbiased=False).flatten(1).mean(dim=1).sum()
