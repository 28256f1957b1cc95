"""Errors on images of the range [0, 1], the scale of Baldini et al. (section 5.2)."""

import torch
from torch import Tensor

from mrgen.metrics.reconstruction import mse, unit_range
from mrgen.protocols import Synthesis

__all__ = ["rescaled", "unit_errors"]


def rescaled(image: Tensor, scale: str) -> Tensor:
    """An image (1, 1, X, Y, Z) with background 0, on a named scale, to [0, 1] by its own extremes.

    On the scales of intensities the background is the minimum, on others the darkest voxel of the brain.
    """
    return unit_range(image.clamp(min=0) if scale in ("unit", "stored") else image)


def unit_errors(synthesis: Synthesis, real: Tensor, brain: Tensor, tumour: Tensor) -> dict[str, float]:
    """Mean squared errors of one subject's synthesis.

    Args:
        synthesis: (1, 1, X, Y, Z).
        real: (1, 1, X, Y, Z) on [0, 1], see ``rescaled``.
        brain: (1, X, Y, Z) bool; outside it the synthesis does not count.
        tumour: (1, X, Y, Z) bool.

    Returns:
        ``own_mse_brain`` and ``own_mse_tumour``: the synthesis rescaled by its own extremes, over the union of both
        foregrounds and over the tumour (nan without one). Where it is on the scale ``unit`` already, also
        ``unit_mse_brain`` and ``unit_mse_tumour``: as it was made, so that a wrong range counts as an error.
    """
    made = synthesis.mean.float() * brain[:, None]
    values = {}
    for name, image in (("own", rescaled(made, synthesis.scale)), ("unit", made)):
        if name == "unit" and synthesis.scale != "unit":
            continue
        foreground = torch.logical_or(image > 0, real > 0)[0, 0]
        values[f"{name}_mse_brain"] = mse(image[0, 0], real[0, 0], foreground)
        values[f"{name}_mse_tumour"] = mse(image[0, 0], real[0, 0], tumour[0])
    return values
