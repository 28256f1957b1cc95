"""Squared error in which a rare tissue counts for more."""

import torch
from torch import Tensor

IGNORED = 255  # the label of voxels that no loss and no metric looks at


def weighted_mse(prediction: Tensor, target: Tensor, label: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean over voxels of w[label] · (target − prediction)², RS-Net's synthesis loss.

    A plain mean hardly notices an enhancing core of a thousandth of the brain; the tumour-class weights of
    `mrgen.losses.segmentation.class_weights` make it count. R-Net, which does not segment, is trained with it too.

    Args:
        prediction: (B, N, ...) of any float type, N synthesised sequences (RS-Net: 1); computed in float32.
        target: shaped like `prediction`.
        label: (B, ...) int64, 0 to C − 1, or 255 for voxels that count neither in the sum nor in the mean.
        weights: (C,); None weighs all classes alike.

    Returns:
        A float32 scalar, the mean over voxels and sequences. When every voxel is ignored it is 0, with a gradient of
        zeros.
    """
    # Broadcasting would turn a missing channel axis into a loss over all pairs of subjects.
    if prediction.shape != target.shape or label.shape != prediction.shape[:1] + prediction.shape[2:]:
        raise ValueError(
            "expected prediction and target (B, N, ...) and label (B, ...), found "
            f"{tuple(prediction.shape)}, {tuple(target.shape)} and {tuple(label.shape)}"
        )
    valid = (label != IGNORED).unsqueeze(1)  # (B, 1, ...)
    difference = prediction.float() - target.float()
    error = torch.where(valid, difference, difference.new_zeros(())).square()
    if weights is not None:
        weights = weights.to(prediction.device, torch.float32)
        error = error * weights[label.masked_fill(label == IGNORED, 0)].unsqueeze(1)
    return error.sum() / (valid.sum() * prediction.shape[1]).clamp(min=1)
