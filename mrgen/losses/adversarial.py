"""What the two players of a generative adversarial network minimise.

Both take the discriminator's logits, without a sigmoid, of any shape: a PatchGAN's map counts as so many judgements.
Cross entropy is Pix2Pix's loss; ``least_squares`` is that of LSGAN (Mao et al. 2017), which compares a logit with 1 and
0 as it is.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["discriminator_loss", "feature_matching", "generator_loss"]


def discriminator_loss(real: Tensor, fake: Tensor, *, least_squares: bool = False) -> Tensor:
    """Half the sum of the two mean losses, of real pairs taken for fake and of fake ones taken for real.

    The half slows the discriminator down relative to the generator (Isola et al. 2017, section 3.3).

    Args:
        real: logits of real pairs.
        fake: logits of synthesised pairs, made from a detached synthesis.
        least_squares: LSGAN's loss in place of cross entropy.

    Returns:
        A float32 scalar; ln 2 (or 1/4) for a discriminator that cannot tell.
    """
    return (_distance(real, 1.0, least_squares) + _distance(fake, 0.0, least_squares)) / 2


def generator_loss(fake: Tensor, *, least_squares: bool = False) -> Tensor:
    """How far synthesised pairs are from being taken for real: −log D instead of log(1 − D), which would saturate.

    Args:
        fake: logits of synthesised pairs.
        least_squares: LSGAN's loss in place of cross entropy.

    Returns:
        A float32 scalar.
    """
    return _distance(fake, 1.0, least_squares)


def _distance(logits: Tensor, label: float, least_squares: bool) -> Tensor:
    logits = logits.float()
    loss = F.mse_loss if least_squares else F.binary_cross_entropy_with_logits
    return loss(logits, torch.full_like(logits, label))


def feature_matching(
    real: Sequence[Tensor], fake: Sequence[Tensor], *, output: bool = True, absolute: bool = False
) -> Tensor:
    """Distance of what a discriminator makes of real and of synthesised images, stage by stage.

    Equation 2 of SAMR (Guo et al. 2020): the mean square of each stage, summed over the stages, the logits included.
    Pix2pixHD (Wang et al. 2018), where the loss comes from, takes absolute distances and leaves the logits out.

    Args:
        real: the features of one discriminator, of any shapes, the logits last; they get no gradient.
        fake: shaped like ``real``. Both hold the samples that count and no others; there may be none.
        output: whether the last, the logits, counts too.
        absolute: mean absolute distances in place of mean squares.

    Returns:
        A float32 scalar; 0 with a gradient of zeros where no sample counts.
    """
    stages = list(zip(real, fake, strict=True))
    stages = stages if output else stages[:-1]
    # Broadcasting would compare one sample with all.
    if any(r.shape != f.shape for r, f in stages):
        raise ValueError(
            f"expected features of equal shapes, found {[tuple(r.shape) for r in real]} and "
            f"{[tuple(f.shape) for f in fake]}"
        )
    differences = [f.float() - r.detach().float() for r, f in stages]
    return torch.stack([(d.abs() if absolute else d.square()).sum() / max(d.numel(), 1) for d in differences]).sum()
