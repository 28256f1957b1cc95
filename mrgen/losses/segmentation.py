"""Losses of a segmentation: cross entropy in which a rare class counts for more, and the class weights that say how
much more; and for one class against the rest binary cross entropy and soft Dice.

RS-Net (Mehta and Arbel) trains on brains in which the enhancing core is about one voxel in a thousand. The weights
below are its tumour-class weights; `mrgen.losses.reconstruction` uses the same ones for the synthesis error.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = 255  # the label of voxels that no loss and no metric looks at


def class_weights(
    counts: Tensor, *, epoch: int = 0, decay: float = 1.0, cap: float = 1000.0, normalise: bool = True
) -> Tensor:
    """Weights that grow as a class has fewer voxels, and that may fade over the epochs.

    With m_c voxels of class c, epoch e and decay r,

        w_c(e) = min(sum_j m_j / m_c, cap) · r^e + 1,

    the rule of RS-Net (the paper states it in words; formula and cap are ours). r = 1 is the paper's static weighting;
    with r < 1 rare classes lead at first and all weights are equal in the end. Classes of equal count weigh the same.

    Args:
        counts: (C,) voxels of each class in the training set, not negative. A class without voxels gets the cap.
        epoch: e, from 0.
        decay: r, in [0, 1].
        cap: upper bound of sum_j m_j / m_c, so that a handful of voxels cannot own the gradient.
        normalise: divide by the mean weight of a training voxel, sum_c m_c w_c / sum_c m_c. Otherwise the loss shrinks
            with the weights, and a decay of the weights is a decay of the learning rate too.

    Returns:
        (C,) float32 on the device of `counts`, positive. All ones when all counts are equal and `normalise` is set.
    """
    voxels = counts.to(torch.float64)
    if voxels.ndim != 1 or bool((voxels < 0).any()) or not voxels.sum() > 0:
        raise ValueError(f"counts: expected (C,) voxel numbers with a positive sum, found {counts.tolist()}")
    ratio = (voxels.sum() / voxels).clamp(max=cap)  # m_c = 0 gives inf, hence the cap
    weights = ratio * decay**epoch + 1
    if normalise:
        weights = weights / ((voxels * weights).sum() / voxels.sum())
    return weights.to(torch.float32)


def weighted_cross_entropy(logits: Tensor, label: Tensor, weights: Tensor | None = None) -> Tensor:
    """− mean over voxels of w[label] · log p(label), RS-Net's segmentation loss.

    The mean divides by the number of voxels. `torch.nn.CrossEntropyLoss(weight=...)` divides by the sum of the weights
    instead, which takes back in every batch what the weights gave: a crop of background alone would weigh as much as
    one full of tumour.

    Args:
        logits: (B, C, ...) of any float type; computed in float32.
        label: (B, ...) int64, 0 to C − 1, or 255 for voxels that count neither in the sum nor in the mean.
        weights: (C,), see `class_weights`; None weighs all classes alike.

    Returns:
        A float32 scalar. When every voxel is ignored it is 0, with a gradient of zeros.
    """
    if weights is not None:
        weights = weights.to(logits.device, torch.float32)
    loss = F.cross_entropy(logits.float(), label, weight=weights, ignore_index=IGNORED, reduction="none")
    return loss.sum() / (label != IGNORED).sum().clamp(min=1)


def binary_cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Mean over voxels of − l log p − (1 − l) log(1 − p), l being 1 in any lesion.

    Equation 4 of Orbes-Arteaga et al. prints the first term alone, which a network that answers 1 everywhere minimises.

    Args:
        logits: (B, 1, ...) of any float type; computed in float32.
        label: (B, ...) int; 0 is no lesion, 255 counts neither in the sum nor in the mean.

    Returns:
        A float32 scalar. When every voxel is ignored it is 0, with a gradient of zeros.
    """
    lesion, valid = _lesion(logits, label)
    loss = F.binary_cross_entropy_with_logits(logits.float(), lesion, weight=valid, reduction="sum")
    return loss / valid.sum().clamp(min=1)


def soft_dice(logits: Tensor, label: Tensor, smooth: float = 1.0) -> Tensor:
    """1 − (2 Σ p l + s) / (Σ p + Σ l + s) over the whole batch: the loss of Li et al.

    Args:
        logits: (B, 1, ...) of any float type; computed in float32.
        label: (B, ...) int; 0 is no lesion, 255 does not count.
        smooth: s, which makes a batch without lesion a defined one.

    Returns:
        A float32 scalar from 0 to 1.
    """
    lesion, valid = _lesion(logits, label)
    probability = logits.float().sigmoid() * valid
    return 1 - (2 * (probability * lesion).sum() + smooth) / (probability.sum() + lesion.sum() + smooth)


def _lesion(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """1 where there is lesion, and 1 where voxels count; both like the logits."""
    # Broadcasting would turn a missing channel axis into a loss over all pairs of samples.
    if logits.shape != (label.shape[0], 1, *label.shape[1:]):
        raise ValueError(
            f"expected logits (B, 1, ...) and label (B, ...), found {tuple(logits.shape)} and {tuple(label.shape)}"
        )
    valid = (label != IGNORED).unsqueeze(1)
    return ((label > 0).unsqueeze(1) & valid).float(), valid.float()


def generalised_dice(probabilities: Tensor, one_hot: Tensor, eps: float = 1e-7) -> Tensor:
    """Mean over labels of 1 − 2 Σ p r / (Σ p + Σ r + ε), the sums over batch and space: SAMR's equation 3.

    Guo et al. call it the generalised Dice loss, but print it without the class weights of that loss, and so it is
    here. A label that is nowhere in the batch adds a constant without gradient.

    Args:
        probabilities: (B, C, ...) of any float type, after softmax; computed in float32.
        one_hot: (B, C, ...) of any type, 1 in the channel of a voxel's label. A voxel of none (label 255) is 0 in all
            and does not count.
        eps: makes a label that is neither there nor predicted a defined one.

    Returns:
        A float32 scalar from 0 to 1.
    """
    if probabilities.shape != one_hot.shape:
        raise ValueError(
            f"expected probabilities and one_hot of one shape (B, C, ...), found {tuple(probabilities.shape)} and "
            f"{tuple(one_hot.shape)}"
        )
    reference = one_hot.float()
    predicted = probabilities.float() * reference.sum(dim=1, keepdim=True)  # 0 where no label is
    space = [0, *range(2, reference.ndim)]
    both = (predicted * reference).sum(space)  # (C,)
    return (1 - 2 * both / (predicted.sum(space) + reference.sum(space) + eps)).mean()
