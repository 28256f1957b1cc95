"""How near a synthesised image is to the real one: MSE, MAE, PSNR and SSIM inside a mask, in 3D and in 2D.

All measures take `prediction` and `reference` as floats and `mask` as bool, each (X, Y, Z), (1, X, Y, Z) or (X, Y), and
return a Python float. An empty mask gives nan: a mean over subjects should skip it (`nanmean`), not count it as 0.

PSNR and SSIM depend on `data_range`, the span of intensities that counts as full scale, and nothing sensible can be
guessed for z-scored images; so it has no default. Fix it, the mask and the normalisation before comparing methods, and
do not let these numbers decide alone: SSIM can rise while usefulness falls, because smooth images score well and a
lesion is few voxels. The Dice of the swap comes first.
"""

import math

import torch
from torch import Tensor

_SIGMA = 1.5  # Wang et al. 2004: an 11-tap Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03
_RADIUS = 5


def unit_range(x: Tensor) -> Tensor:
    """Every image to [0, 1] by its own extremes; the background, which is 0, becomes the minimum.

    Without the latter the background of a z-scored image would be brighter than half of the brain.

    Args:
        x: (B, C, X, Y, Z) or (B, C, X, Y), floats.

    Returns:
        The same shape and type; 0 everywhere for an image of one value.
    """
    axes = tuple(range(2, x.ndim))
    low, high = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)  # (B, C, 1, 1, 1)
    x = torch.where(x == 0, low, x)
    return (x - low) / (high - low).clamp(min=torch.finfo(x.dtype).tiny)


def mse(prediction: Tensor, reference: Tensor, mask: Tensor) -> float:
    """Mean squared error over the mask; nan when the mask is empty."""
    prediction, reference, mask = _checked(prediction, reference, mask)
    return float((prediction[mask] - reference[mask]).square().mean(dtype=torch.float64))


def mae(prediction: Tensor, reference: Tensor, mask: Tensor) -> float:
    """Mean absolute error over the mask; nan when the mask is empty."""
    prediction, reference, mask = _checked(prediction, reference, mask)
    return float((prediction[mask] - reference[mask]).abs().mean(dtype=torch.float64))


def psnr(prediction: Tensor, reference: Tensor, mask: Tensor, data_range: float) -> float:
    """Peak signal-to-noise ratio over the mask, 10 log10(data_range² / MSE), in dB.

    Returns:
        inf for identical images, nan when the mask is empty.
    """
    _check_range(data_range)
    error = mse(prediction, reference, mask)
    return math.inf if error == 0 else 10 * math.log10(data_range**2 / error)


@torch.no_grad()
def ssim(prediction: Tensor, reference: Tensor, mask: Tensor, data_range: float) -> float:
    """Structural similarity (Wang et al. 2004), its map averaged over the mask.

    The window is a Gaussian of sigma 1.5 cut to 11 voxels along every axis, over a volume that is mirrored at its
    faces; variances are those of the population. The map is that of scikit-image's `structural_similarity(...,
    full=True, gaussian_weights=True, use_sample_covariance=False)`. Windows at the border of the mask look 5 voxels
    beyond it: a background of zeros that both images share makes them look alike there.

    Returns:
        From −1 to 1, 1 for identical images; nan when the mask is empty.
    """
    _check_range(data_range)
    prediction, reference, mask = _checked(prediction, reference, mask)
    if not mask.any():
        return math.nan
    volumes = torch.stack([prediction, reference])  # (2, X, Y[, Z])
    for axis in range(mask.ndim):
        # Keep the mask's bounding box and what its windows see. Mirroring by index makes the faces of the volume no
        # special case, and the result is exactly that of the whole volume.
        inside = mask.any(dim=tuple(other for other in range(mask.ndim) if other != axis)).nonzero()
        low, high = int(inside.min()), int(inside.max()) + 1
        volumes = volumes.index_select(
            axis + 1, _mirrored(low - _RADIUS, high + _RADIUS, mask.shape[axis], mask.device)
        )
        mask = mask.narrow(axis, low, high - low)
    x, y = volumes
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = (_window_mean(v) for v in (x, y, x * x, y * y, x * y))
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * (mean_xy - mean_x * mean_y) + c2) / (mean_xx - mean_x**2 + mean_yy - mean_y**2 + c2)
    return float((luminance * structure)[mask].mean(dtype=torch.float64))


def _window_mean(volume: Tensor) -> Tensor:
    """(X, Y[, Z]) averaged under the Gaussian window; every axis loses 2 · 5 voxels."""
    taps = [math.exp(-0.5 * (i / _SIGMA) ** 2) for i in range(-_RADIUS, _RADIUS + 1)]
    for axis in range(volume.ndim):
        size = volume.shape[axis] - 2 * _RADIUS
        # One axis after the other, as sums of shifted views: on a CPU five times as fast as conv3d with one channel.
        mean = torch.zeros_like(volume.narrow(axis, 0, size))
        for shift, tap in enumerate(taps):
            mean.add_(volume.narrow(axis, shift, size), alpha=tap / sum(taps))
        volume = mean
    return volume


def _mirrored(low: int, high: int, size: int, device: torch.device) -> Tensor:
    """Indices low to high − 1 of an axis continued as c b a | a b c | c b a, as SciPy's mode "reflect" does."""
    index = torch.arange(low, high, device=device) % (2 * size)
    return torch.where(index < size, index, 2 * size - 1 - index)


def _checked(prediction: Tensor, reference: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three without a channel axis, the images in float32; anything that would broadcast is refused."""
    x, y, m = (t[0] if t.ndim == 4 and t.shape[0] == 1 else t for t in (prediction, reference, mask))
    if not x.shape == y.shape == m.shape or m.dtype != torch.bool or m.ndim not in (2, 3):
        raise ValueError(
            "expected prediction, reference and a bool mask, all (X, Y, Z), (1, X, Y, Z) or (X, Y), found "
            f"{tuple(prediction.shape)}, {tuple(reference.shape)} and {mask.dtype} {tuple(mask.shape)}"
        )
    return x.detach().float(), y.detach().float(), m


def _check_range(data_range: float) -> None:
    if not 0 < data_range < math.inf:
        raise ValueError(f"data_range: expected a positive number, found {data_range}")
