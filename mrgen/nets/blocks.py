"""Layers that several networks share."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["AvgPool3d", "ConvBlock3d", "Dropout", "InstanceNorm3d", "check_range"]


def check_range(network: str, least: int, most: int, **numbers: int) -> None:
    """Raises ValueError for a depth that no network has; building one of 40 levels would take all memory or days."""
    for what, number in numbers.items():
        if not least <= number <= most:
            raise ValueError(f"{network}: {what} is {number}; expected {least} to {most}")


class AvgPool3d(nn.Module):
    """2×2×2 average pooling, the same numbers as ``torch.nn.AvgPool3d(2)``.

    On a processor as a convolution: PyTorch's pooling leaves channels-last and bf16 there, and takes twenty times as
    long.
    """

    def forward(self, x: Tensor) -> Tensor:  # (B, C, X, Y, Z) -> (B, C, X/2, Y/2, Z/2)
        if x.device.type not in ("cpu", "meta"):
            return F.avg_pool3d(x, 2)
        weight = x.new_full((x.shape[1], 1, 2, 2, 2), 1 / 8)
        return F.conv3d(x, weight, stride=2, groups=x.shape[1])


class InstanceNorm3d(nn.InstanceNorm3d):
    """``torch.nn.InstanceNorm3d`` that keeps the memory layout of a single volume.

    PyTorch's copies channels-last input to another layout, and the next convolution copies it back. With a batch of one
    a batch norm computes the same and leaves the layout alone.
    """

    def forward(self, x: Tensor) -> Tensor:  # (B, C, X, Y, Z), the same out
        if x.shape[0] == 1 and not self.track_running_stats:
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        return super().forward(x)


class Dropout(nn.Dropout):
    """``torch.nn.Dropout`` that draws on a processor one random number a dropped value instead of one a value.

    The gaps between dropped values are geometric, so that their positions are those of independent trials. Drawing is
    a third of a forward pass of a narrow 3D U-Net otherwise.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not 0 < self.p < 1 or x.device.type != "cpu":
            return super().forward(x)
        return _Dropped.apply(x, self.p)


class _Dropped(torch.autograd.Function):
    """Positions are counted in the order of memory, so that the gradient must lie in memory as the output does."""

    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:
        dropped, ctx.scale = _positions(x.numel(), p), 1 / (1 - p)
        ctx.save_for_backward(dropped)
        out = x * ctx.scale
        ctx.stride = out.stride()
        out.as_strided((out.numel(),), (1,)).index_fill_(0, dropped, 0)  # a new tensor is dense
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        out = torch.empty_strided(grad.shape, ctx.stride, dtype=grad.dtype)
        torch.mul(grad, ctx.scale, out=out)
        out.as_strided((out.numel(),), (1,)).index_fill_(0, ctx.saved_tensors[0], 0)
        return out, None


def _positions(count: int, p: float) -> Tensor:
    """Sorted positions below ``count``, each there with probability ``p``, independently."""
    parts, last = [], -1
    while last < count:
        rest = count - last
        draws = int(p * rest + 4 * math.sqrt(p * rest)) + 8  # nearly always enough at once
        # Inverse transform; 1 − u is never 0, and a gap is at least 1.
        gaps = torch.rand(draws).neg_().add_(1).log_().div_(math.log1p(-p)).ceil_().clamp_(1, count + 1)
        part = gaps.long().cumsum_(0).add_(last)
        parts.append(part)
        last = int(part[-1])
    positions = torch.cat(parts) if len(parts) > 1 else parts[0]
    return positions[: int(torch.searchsorted(positions, count))]


class ConvBlock3d(nn.Sequential):
    """3×3×3 convolution, instance norm, LeakyReLU(0.01), and dropout where asked.

    Instance norm because whole volumes are trained with a batch of one. The convolution has no bias: the norm would
    remove it.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        dropout: probability that a voxel's activation is zeroed; 0 adds no layer.
    """

    def __init__(self, in_channels: int, out_channels: int, *, dropout: float = 0.0):
        layers: list[nn.Module] = [
            nn.Conv3d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
            InstanceNorm3d(out_channels, affine=True),
            nn.LeakyReLU(0.01, inplace=True),
        ]
        if dropout > 0:
            layers.append(Dropout(dropout))
        super().__init__(*layers)

    def forward(self, x: Tensor) -> Tensor:  # (B, in, X, Y, Z) -> (B, out, X, Y, Z)
        return super().forward(x)
