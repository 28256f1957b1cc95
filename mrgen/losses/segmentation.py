"""Cross entropy in which a rare class counts for more, and the class weights that say how much more.

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
