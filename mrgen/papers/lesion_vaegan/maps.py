"""Structure maps and masks: Algorithms 1 and 2 of Qu et al. (sections 2.2 and 2.3).

As published, thresholds and argmax stop every gradient, so that the adversarial loss of generated maps, the structure
loss and the losses of masks train nothing in the authors' code. Here a threshold keeps its hard value and has the
gradient of a soft one: a deliberate repair.
"""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["fits", "outside", "outside_lesion", "straight_through", "structure_map"]

_SOBEL = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))


def straight_through(soft: Tensor) -> Tensor:
    """1 where ``soft`` exceeds a half and else 0, with the gradient of ``soft`` itself."""
    return (soft > 0.5).to(soft.dtype) + (soft - soft.detach())  # in brackets: exactly 0


def structure_map(image: Tensor, beta: float, tau: float = 0.02) -> Tensor:
    """Algorithm 1: edges of both signs and directions that stand out of a slice's mean.

    The lesser and the greater of the two edge images of Sobel's operator are scaled to [0, 1] in each slice, as in the
    authors' code, before their means are compared with them.

    Args:
        image: (B, 1, X, Y), any range; its border is mirrored.
        beta: how far from the mean an edge is; 0.07 in the first stage and 0.12 in the second.
        tau: the gradient is that of sigmoid((distance − beta) / tau).

    Returns:
        (B, 1, X, Y), 1 on edges and else 0.
    """
    image = image.float()
    kernel = image.new_tensor(_SOBEL)
    kernels = torch.stack([kernel, kernel.T])[:, None]  # (2, 1, 3, 3)
    # Differences of neighbours are lost in half precision; of the device of plans autocast knows nothing.
    with nullcontext() if image.is_meta else torch.autocast(image.device.type, enabled=False):
        edges = F.conv2d(F.pad(image, (1, 1, 1, 1), mode="reflect"), kernels)  # (B, 2, X, Y)
    least, most = _scaled(edges.amin(dim=1, keepdim=True)), _scaled(edges.amax(dim=1, keepdim=True))
    below = least.mean(dim=(2, 3), keepdim=True) - least
    above = most - most.mean(dim=(2, 3), keepdim=True)
    stands_out = torch.maximum(below, above)  # either exceeds beta
    return straight_through(torch.sigmoid((stands_out - beta) / tau))


def _scaled(image: Tensor) -> Tensor:
    """(B, 1, X, Y) to [0, 1] in each slice; an even slice is 0."""
    low, high = image.amin(dim=(2, 3), keepdim=True), image.amax(dim=(2, 3), keepdim=True)
    return (image - low) / (high - low).clamp(min=1e-6)


def outside(image: Tensor, expand: int = 0) -> Tensor:
    """Algorithm 2: 1 where an image is 0 or less, outside the brain, and 0 inside.

    Args:
        image: (B, 1, X, Y).
        expand: pixels by which the mask is enlarged, and then cut back to its size around its middle.

    Returns:
        (B, 1, X, Y) float32.
    """
    mask = (image <= 0).float()
    if not expand:
        return mask
    x, y = mask.shape[2:]
    before = expand // 2
    enlarged = F.interpolate(mask, size=(x + expand, y + expand), mode="nearest")
    return enlarged[:, :, before : before + x, before : before + y]


def outside_lesion(label: Tensor) -> Tensor:
    """Algorithm 2 of a label (B, X, Y): (B, 1, X, Y) float32, 1 where there is no lesion."""
    return (label == 0).float()[:, None]


def fits(mask: Tensor, label: Tensor) -> Tensor:
    """Whether a lesion lies within a brain (section 2.8).

    Args:
        mask: (B, 1, X, Y), 1 outside the brain.
        label: (B, X, Y), 0 being no lesion.

    Returns:
        (B,) bool.
    """
    return ((mask[:, 0] > 0.5) & (label != 0)).flatten(1).sum(dim=1) == 0
