"""What a predicted variance is worth: does it rank voxels by their error, and does it say how large the error is?

These are two questions. A variance that is ten times too small everywhere still ranks perfectly, and the mean squared
error at every voxel is calibrated without telling one voxel from another. So read the rank correlation and the
calibration curve together.

Both functions take floats and a bool `mask`, all (X, Y, Z) or (1, X, Y, Z), and look at the voxels of the mask alone.
"""

import math

import torch
from torch import Tensor

__all__ = ["calibration_bins", "rank_correlation"]


def rank_correlation(uncertainty: Tensor, error: Tensor, mask: Tensor) -> float:
    """Spearman's ρ of uncertainty and error over the mask: Pearson's correlation of ranks, ties at their mean rank.

    Only order counts: variance or standard deviation, absolute or squared error, give the same number.

    Args:
        uncertainty: (X, Y, Z) or (1, X, Y, Z), such as the variance; larger is less certain.
        error: shaped alike, not negative, such as the absolute error.
        mask: bool, shaped alike.

    Returns:
        From −1 to 1; nan for fewer than 3 voxels, where one side is constant, or where a value is nan.

    Raises:
        ValueError: the shapes differ or the mask is not bool.
    """
    from scipy.stats import rankdata

    pair = _inside(uncertainty, error, mask)
    count = pair.shape[1]
    if count < 3:
        return math.nan
    # The mean rank is known, and centred halves of whole numbers are exact: a constant side is exactly zero.
    x, y = (torch.from_numpy(rankdata(values.numpy())) - (count + 1) / 2 for values in pair)
    scale = math.sqrt(x.dot(x) * y.dot(y))
    return min(1.0, max(-1.0, float(x.dot(y)) / scale)) if scale > 0 else math.nan  # rounding may pass 1


def calibration_bins(
    variance: Tensor, squared_error: Tensor, mask: Tensor, bins: int = 20
) -> tuple[Tensor, Tensor, Tensor]:
    """Predicted variance against what it predicts, in bins of equally many voxels.

    A calibrated variance equals the mean squared error in every bin: of all voxels that claim the same variance, the
    expected squared error is that variance. This is the error-based calibration of Levi et al., "Evaluating and
    Calibrating Uncertainty Prediction in Regression Tasks" (arXiv 1905.11659, 2019; Sensors 2022), who compare the
    roots of both. The squared error holds the bias and, with real data, the noise of the target as well: the variance
    of MC dropout alone knows neither, and lies below.

    Args:
        variance: (X, Y, Z) or (1, X, Y, Z), in squared units of the image.
        squared_error: shaped alike, in the same units.
        mask: bool, shaped alike.
        bins: number of bins; the first ones hold one voxel more where the count does not divide.

    Returns:
        For each bin, from low to high variance and on the CPU, (bins,) mean variance and mean squared error (float64)
        and number of voxels (int64). Bins that stay empty, because the mask has fewer voxels, come last: nan, nan, 0.
        Voxels of equal variance may fall in different bins, by their order in the volume.

    Raises:
        ValueError: the shapes differ, the mask is not bool, or `bins` is below 1.
    """
    if bins < 1:
        raise ValueError(f"bins: expected at least 1, found {bins}")
    pair = _inside(variance, squared_error, mask)
    pair = pair[:, pair[0].argsort(stable=True)]
    parts = pair.tensor_split(bins, dim=1)
    means = torch.stack([part.mean(dim=1) for part in parts], dim=1)  # the mean of nothing is nan
    return means[0], means[1], torch.tensor([part.shape[1] for part in parts])


def _inside(first: Tensor, second: Tensor, mask: Tensor) -> Tensor:
    """(2, voxels) the two within the mask, float64 on the CPU; anything that would broadcast is refused."""
    a, b, m = (t[0] if t.ndim == 4 and t.shape[0] == 1 else t for t in (first, second, mask))
    if not a.shape == b.shape == m.shape or m.dtype != torch.bool or m.ndim != 3:
        raise ValueError(
            "expected uncertainty, error and a bool mask, all (X, Y, Z) or (1, X, Y, Z), found "
            f"{tuple(first.shape)}, {tuple(second.shape)} and {mask.dtype} {tuple(mask.shape)}"
        )
    return torch.stack([values.detach()[m].cpu().double() for values in (a, b)])
