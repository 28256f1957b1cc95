"""The first stage: structure maps from noise, and the brain's mask from a structure map (section 2.3).

A variational autoencoder of structure maps, EC_f and DC_f, in which a discriminator of codes FD_f stands in for the KL
term: **random normal codes are true, encoded ones fake**. D_f tells maps of slices from decoded random codes. MASK
learns from a map where the brain ends, so that a lesion can be placed in a brain that no slice shows.

In the authors' code the argmax of DC_f's and of MASK's two channels stops the gradient, so that the adversarial term of
maps, of the largest weight, trains nothing, and of the reconstructions only the terms of probabilities train anything.
Here, as a deliberate repair, errors are of p = s1 / (s0 + s1), the share of the second channel; a generated map is
shown to D_f as 0 and 1 with the gradient of p.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from mrgen.data.batch import Batch
from mrgen.errors import UserError
from mrgen.metrics.means import SubjectMeans
from mrgen.metrics.segmentation import dice
from mrgen.nets.lesion_vaegan import (
    ImageDecoder,
    ImageEncoder,
    LatentDiscriminator,
    StructureDecoder,
    StructureDiscriminator,
    StructureEncoder,
    blur_init,
)
from mrgen.nets.pix2pix import as_in_training
from mrgen.papers.lesion_vaegan.maps import outside, outside_lesion, straight_through, structure_map

__all__ = ["TERMS", "StructureVAEGAN", "check_weights", "frozen"]

SLICES = 16  # that are computed at once where there are no gradients

# The losses' terms, each with a weight, as ``StructureVAEGAN.terms`` explains them.
TERMS = (
    "code_d",
    "map_d",
    "map_adversarial_code",
    "map_adversarial_map",
    "normal_mean",
    "normal_deviation",
    "map_reconstruction",
    "map_reconstruction_outside",
    "map_reconstruction_probability",
    "mask_reconstruction",
    "mask_reconstruction_f",
    "mask_reconstruction_f_r",
    "mask_reconstruction_f_g",
    "mask_reconstruction_probability",
)


class StructureVAEGAN(LightningModule):
    """VAE-GAN of structure maps and generator of masks. Every slice shows one sequence, drawn at random.

    Trains with manual optimisation: three optimisers, {EC_f, DC_f}, {MASK} and {D_f, FD_f}, step together from one
    forward and one backward pass, which no term takes to parameters of two of them. Lightning counts three steps a
    batch, so that epochs should end the training, and neither clips gradients nor accumulates them. Several devices
    need nothing but ``trainer=ddp``: every parameter has a gradient in every step.

    Args:
        modalities: the batch's sequences, in order.
        size: (X, Y) of slices, multiples of 4 from 36 on.
        weights: by name of ``TERMS``, all of them.
        width: channels of every network's first layer.
        latent: numbers of a code; a square, since FD_f sees a code as an image.
        dropout: of the input of EC_f and MASK.
        beta: of Algorithm 1.
        expand: p of Algorithm 2, pixels.
        init: of EC_f, DC_f and MASK; ``blur`` is the authors'.
        deviation: of codes before any training, above 0. From 1 on, DC_f may learn to take codes for noise.
        halvings: of maps on the way to codes, see ``StructureEncoder``.
        lr, betas: of the three Adams.

    Raises:
        UserError: sizes, ``latent`` or ``weights`` are not as above.

    Attributes:
        scale: of its images, [0, 1].
        guides: what batches need beside labels: nothing.
        divisor, smallest: what every axis of a slice must be a multiple of, and the least that it may be.
    """

    scale = "unit"
    guides: tuple[str, ...] = ()
    divisor = 4  # of MASK
    smallest = 36  # EC_f leaves 2 × 2 of it, and of a single number an instance norm makes 0

    def __init__(
        self,
        *,
        modalities: Sequence[str],
        size: Sequence[int],
        weights: Mapping[str, float],
        width: int = 64,
        latent: int = 4096,
        dropout: float = 0.1,
        beta: float = 0.07,
        expand: int = 5,
        init: Literal["normal", "blur"] = "normal",
        deviation: float = 1.0,
        halvings: int = 5,
        lr: float = 1e-4,
        betas: Sequence[float] = (0.5, 0.999),
    ):
        super().__init__()
        self.automatic_optimization = False
        if len(size) != 2 or any(n % self.divisor or n < self.smallest for n in size):
            raise UserError(
                f"data.sampling.size is {list(size)}; expected two multiples of {self.divisor} from {self.smallest} "
                "on; change it"
            )
        self.side = math.isqrt(max(latent, 0))
        if latent < 1 or self.side**2 != latent:
            raise UserError(f"model.latent is {latent}; expected a square number, such as 256 or 4096; change it")
        if not deviation > 0:
            raise UserError(f"model.deviation is {deviation}; expected a number above 0; change it")
        if not 1 <= halvings <= 5:
            raise UserError(f"model.halvings is {halvings}; expected a whole number from 1 to 5; change it")
        check_weights(weights, TERMS)
        self.modalities, self.size, self.latent = tuple(modalities), (int(size[0]), int(size[1])), latent
        self.weights = {name: float(weights[name]) for name in TERMS}
        self.beta, self.expand, self.lr, self.betas = beta, expand, lr, (betas[0], betas[1])

        self.encoder = StructureEncoder(size, width, latent, dropout, deviation, halvings)  # EC_f
        self.decoder = StructureDecoder(size, width, latent, halvings)  # DC_f
        mask_decoder = ImageDecoder(8 * width, 2, width, shift=0)
        self.mask_generator = nn.Sequential(ImageEncoder(1, width, dropout), mask_decoder)  # MASK
        self.map_discriminator = StructureDiscriminator(width)  # D_f
        self.code_discriminator = LatentDiscriminator(width)  # FD_f
        if init == "blur":
            for net in (self.encoder, self.decoder, self.mask_generator):
                net.apply(blur_init)
        self.val_means = SubjectMeans(["loss", "map_dice", "mask_dice"])

    # ----- the losses --------------------------------------------------------------------------------------------

    def maps(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """What training shows of slices: structure maps without the lesion's outline, and masks.

        Args:
            image: (B, 1, X, Y) in [0, 1].
            label: (B, X, Y) int, 0 being no lesion.

        Returns:
            f and mask, (B, 1, X, Y) each, 0 or 1; the mask is 1 outside the brain.
        """
        if image.shape[2:] != self.size:
            raise UserError(
                f"slices are {tuple(image.shape[2:])} pixels and the model was built for {self.size}; leave model.size "
                "at ${data.sampling.size}"
            )
        return structure_map(image, self.beta) * outside_lesion(label), outside(image, self.expand)

    def judge_codes(self, codes: Tensor) -> Tensor:
        """FD_f of codes (B, latent), which it sees as square images: patches (B, 1, s, s)."""
        return self.code_discriminator(codes.unflatten(1, (1, self.side, self.side))).float()

    def judge_maps(self, maps: Tensor) -> Tensor:
        """D_f of maps (B, 1, X, Y): patches (B, 1, x, y)."""
        return self.map_discriminator(maps).float()

    def terms(self, f: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """All terms of all losses, from one forward pass; each has gradients for those alone whom it trains.

        With z_f encoded, z_g random, f_r and f_g decoded from them, m_r and m_g the masks of f and f_g, and ‖·‖² a mean
        square:

        ================================  ============================================  ==============
        code_d                            ‖FD_f(z_g) − 1‖² + ‖FD_f(z_f)‖²               FD_f
        map_d                             ‖D_f(f) − 1‖² + ‖D_f(f_g)‖²                   D_f
        map_adversarial_code              ‖FD_f(z_f) − 1‖²                              EC_f
        map_adversarial_map               ‖D_f(f_g) − 1‖²                               DC_f
        normal_mean                       mean(μ)²                                      EC_f
        normal_deviation                  (mean(σ) − 1)²                                EC_f
        map_reconstruction                ‖f − f_r‖²                                    EC_f, DC_f
        map_reconstruction_outside        ‖f_r · mask‖²                                 EC_f, DC_f
        map_reconstruction_probability    ‖(1 − f, f) − (s0, s1)‖² of f_r               EC_f, DC_f
        mask_reconstruction               ‖mask − m_r‖²                                 MASK
        mask_reconstruction_f             ‖f · m_r‖²                                    MASK
        mask_reconstruction_f_r           ‖f_r · m_r‖²                                  MASK
        mask_reconstruction_f_g           ‖f_g · m_g‖²                                  MASK
        mask_reconstruction_probability   ‖(1 − mask, mask) − (s0, s1)‖² of m_r         MASK
        ================================  ============================================  ==============

        The two of probabilities are in the authors' code alone. m_g is of f_g, as there; the paper prints f.

        Args:
            f, mask: (B, 1, X, Y), as ``maps`` gives them.

        Returns:
            A float32 scalar, not weighted, by name in the order of ``TERMS``.
        """
        mean, log_variance = (part.float() for part in self.encoder(f))  # (B, latent) each
        deviation = (log_variance / 2).exp()
        z_f = mean + deviation * torch.randn_like(mean)
        z_g = torch.randn_like(mean)
        scores_r, scores_g = self.decoder(torch.cat([z_f, z_g])).float().chunk(2)  # (B, 2, X, Y) each
        p_r, f_g = _probability(scores_r), straight_through(_probability(scores_g))  # (B, 1, X, Y) each
        with frozen(self.code_discriminator, self.map_discriminator):
            fooled_code, fooled_map = self.judge_codes(z_f), self.judge_maps(f_g)
        f_r, f_g, z_f = (p_r > 0.5).to(f), f_g.detach(), z_f.detach()  # nobody is trained through them from here on
        code_true, code_fake = self.judge_codes(torch.cat([z_g, z_f])).chunk(2)
        map_true, map_fake = self.judge_maps(torch.cat([f, f_g])).chunk(2)
        scores_m, scores_mg = self.mask_generator(torch.cat([f, f_g])).float().chunk(2)  # (B, 2, X, Y) each
        m_r, m_g = _probability(scores_m), _probability(scores_mg)
        values = (
            _square(code_true - 1) + _square(code_fake),
            _square(map_true - 1) + _square(map_fake),
            _square(fooled_code - 1),
            _square(fooled_map - 1),
            mean.mean().square(),
            (deviation.mean() - 1).square(),
            _square(f - p_r),
            _square(p_r * mask),
            _square(torch.cat([1 - f, f], dim=1) - scores_r),
            _square(mask - m_r),
            _square(f * m_r),
            _square(f_r * m_r),
            _square(f_g * m_g),
            _square(torch.cat([1 - mask, mask], dim=1) - scores_m),
        )
        return dict(zip(TERMS, values, strict=True))

    def losses(self, batch: Batch, weights: Tensor | None = None) -> dict[str, Tensor]:
        """All ``terms`` of slices that show one sequence each, and ``loss``, their weighted sum. No class weights.

        Sequences and codes are drawn from torch's global generator.
        """
        image = batch["image"]  # (B, C, X, Y)
        count, sequences = image.shape[:2]
        shown = torch.randint(sequences, (count,), device=image.device)
        image = image[torch.arange(count, device=image.device), shown].unsqueeze(1)  # (B, 1, X, Y)
        terms = self.terms(*self.maps(image, batch["label"]))
        return {**terms, "loss": torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()}

    # ----- training ----------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        losses, optimizers = self.losses(batch), self.optimizers()
        for optimizer in optimizers:  # type: ignore[union-attr]
            optimizer.zero_grad()
        self.manual_backward(losses["loss"])
        for optimizer in optimizers:  # type: ignore[union-attr]
            optimizer.step()
        size = batch["image"].shape[0]
        loss = losses.pop("loss").detach()
        self.log("train/loss", loss, on_epoch=True, prog_bar=True, batch_size=size, sync_dist=True)
        for name, term in losses.items():
            self.log(f"train/{name}", term.detach(), on_step=False, on_epoch=True, batch_size=size, sync_dist=True)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """All slices of one subject, in all sequences: maps through their mean code and back, and masks.

        ``loss`` is ‖f − f_r‖², ``map_dice`` that of the edges, and ``mask_dice`` of the inside of the masks, the brain.
        """
        image = batch["image"].flatten(0, 1).unsqueeze(1)  # (Z · C, 1, X, Y)
        label = batch["label"].repeat_interleave(batch["image"].shape[1], dim=0)  # (Z · C, X, Y)
        found, errors = [], []
        for part in zip(image.split(SLICES), label.split(SLICES), strict=True):
            f, mask = self.maps(*part)
            p_r = _probability(self.decoder(self.encoder(f)[0]).float())
            m_r = _probability(self.mask_generator(f).float())
            errors.append((f - p_r).square().flatten(1).mean(dim=1))
            found.append(torch.stack([p_r > 0.5, f > 0.5, m_r <= 0.5, mask <= 0.5]))
        edges, true_edges, brain, true_brain = torch.cat(found, dim=1)
        means = {"map_dice": dice(edges, true_edges), "mask_dice": dice(brain, true_brain)}
        self.val_means.add({"loss": torch.cat(errors).mean(), **means})

    def on_validation_epoch_end(self) -> None:
        for name, mean in self.val_means.take().items():
            self.log(f"val/{name}", mean, prog_bar=name == "loss")

    def configure_optimizers(self) -> Any:
        groups = (
            (self.encoder, self.decoder),
            (self.mask_generator,),
            (self.map_discriminator, self.code_discriminator),
        )
        return [
            torch.optim.Adam([p for net in nets for p in net.parameters()], lr=self.lr, betas=self.betas)
            for nets in groups
        ]

    # ----- what generation calls ---------------------------------------------------------------------------------

    @torch.no_grad()
    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Structure maps of random codes.

        Args:
            count: how many.
            generator: on the processor, so that a seed draws the same codes on every device.

        Returns:
            (count, 1, X, Y) float32, 1 on edges and else 0.
        """
        codes = torch.randn(count, self.latent, generator=generator).to(self.device)
        with as_in_training(self.decoder, dropout=False, batch_statistics=False):
            return torch.cat([_second(self.decoder(part)) for part in codes.split(SLICES)])

    @torch.no_grad()
    def mask(self, maps: Tensor) -> Tensor:
        """MASK of structure maps (n, 1, X, Y): (n, 1, X, Y) float32, 1 outside the brain and else 0."""
        with as_in_training(self.mask_generator, dropout=False, batch_statistics=False):
            return torch.cat([_second(self.mask_generator(part)) for part in maps.split(SLICES)])

    @torch.no_grad()
    def realness(self, maps: Tensor) -> Tensor:
        """How real D_f takes structure maps (n, 1, X, Y) to be: (n,), the mean of its patches, near 1 for real ones."""
        return torch.cat([self.judge_maps(part).mean(dim=(1, 2, 3)) for part in maps.split(SLICES)])


def check_weights(weights: Mapping[str, Any], terms: Sequence[str]) -> None:
    """Raises UserError for anything but a number from 0 on for every term."""
    missing, unknown = [name for name in terms if name not in weights], [name for name in weights if name not in terms]
    if missing or unknown:
        found = "; ".join(
            f"{what} {', '.join(names)}" for what, names in (("lacks", missing), ("has also", unknown)) if names
        )
        raise UserError(f"model.weights {found}; expected one weight for each of {', '.join(terms)}")
    for name, weight in weights.items():
        if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise UserError(f"model.weights.{name} is {weight!r}; expected a number from 0 on")


def _probability(scores: Tensor) -> Tensor:
    """p = s1 / (s0 + s1) of scores (B, 2, X, Y) in (0, 1): (B, 1, X, Y); above a half where the argmax is 1."""
    return scores[:, 1:] / scores.sum(dim=1, keepdim=True).clamp(min=1e-6)


def _second(scores: Tensor) -> Tensor:
    """1 where the second of two scores (B, 2, X, Y) is the greater, else 0: (B, 1, X, Y) float32."""
    return scores.argmax(dim=1, keepdim=True).float()


def _square(error: Tensor) -> Tensor:
    """‖·‖² of the paper, a mean over the tensor in the authors' code."""
    return error.square().mean()


@contextmanager
def frozen(*nets: nn.Module) -> Iterator[None]:
    """Gradients pass through the networks and do not stay there."""
    for net in nets:
        net.requires_grad_(False)
    try:
        yield
    finally:
        for net in nets:
            net.requires_grad_(True)
