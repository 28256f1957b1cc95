"""Pix2Pix's generators, UNet-128 and the 6-block ResNet, in 3D and in 2D (Baldini et al., section 3).

Both take images scaled to [−1, 1] and answer in that range. Their only noise is dropout.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mrgen.nets.blocks import Dropout, check_range

__all__ = ["AdditiveUpsampling", "ResNetGenerator", "UNetGenerator", "as_in_training", "init_normal"]


class _Conv3d(nn.Conv3d):
    """``torch.nn.Conv3d``, the same numbers; on a processor with a second channel of zeros where one is wanted.

    oneDNN takes seven times as long for one output channel as for two, with a kernel of 3.
    """

    def forward(self, x: Tensor) -> Tensor:  # (B, in, X, Y, Z) -> (B, out, …)
        if self.out_channels > 1 or x.device.type != "cpu":
            return super().forward(x)
        bias = None if self.bias is None else torch.cat([self.bias, torch.zeros_like(self.bias)])
        return self._conv_forward(x, torch.cat([self.weight, torch.zeros_like(self.weight)]), bias)[:, :1]


CONV = {2: nn.Conv2d, 3: _Conv3d}
NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
LINEAR = {2: "bilinear", 3: "trilinear"}
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


class AdditiveUpsampling(nn.Module):
    """Linear additive upsampling in place of a transposed convolution, which leaves checkerboards (Wojna et al. 2017).

    Linear upsampling by 2, the sum of each group of 4 adjacent channels, a convolution of 3. Upsampling and sum are
    both linear and commute: the sum comes first, so that nothing is upsampled that is not kept.

    Args:
        in_channels: of all parts together; a multiple of 4 in each.
        out_channels: of the result.
        dims: 2 or 3 axes.
        bias: whether the convolution has one; not where a norm follows, which would remove it.
    """

    def __init__(self, in_channels: int, out_channels: int, *, dims: int = 3, bias: bool = False):
        super().__init__()
        self.dims = dims
        self.conv = CONV[dims](in_channels // 4, out_channels, kernel_size=3, padding=1, bias=bias)

    def forward(self, *parts: Tensor) -> Tensor:  # (B, n, X, Y, Z) each, as if concatenated -> (B, out, 2X, 2Y, 2Z)
        x = torch.cat([self._sums_of_four(part) for part in parts], dim=1)  # (B, in / 4, X, Y, Z)
        x = x.contiguous(memory_format=CHANNELS_LAST[self.dims])  # else interpolation is four times as slow on a CPU
        return self.conv(F.interpolate(x, scale_factor=2, mode=LINEAR[self.dims]))

    def _sums_of_four(self, x: Tensor) -> Tensor:  # (B, n, X, Y, Z) -> (B, n / 4, X, Y, Z)
        """As a convolution of 1 with fixed weights: a tenth of the time of a sum, and it keeps the layout."""
        ones = torch.eye(x.shape[1] // 4, dtype=x.dtype, device=x.device).repeat_interleave(4, dim=1)  # (n / 4, n)
        conv = F.conv3d if self.dims == 3 else F.conv2d
        return conv(x, ones[(..., *(None,) * self.dims)])


class _Up(nn.Module):
    """ReLU and additive upsampling of what comes from below and of the skip, then norm and dropout where there are."""

    def __init__(self, in_channels: int, out_channels: int, *, dims: int, norm: bool = True, dropout: float = 0.0):
        super().__init__()
        self.upsampling = AdditiveUpsampling(in_channels, out_channels, dims=dims, bias=not norm)
        self.after = nn.Sequential()
        if norm:
            self.after.append(NORM[dims](out_channels))
        if dropout > 0:
            self.after.append(Dropout(dropout))

    def forward(self, *parts: Tensor) -> Tensor:  # (B, n, X, Y, Z) each -> (B, out, 2X, 2Y, 2Z)
        # Without gradients nobody needs the parts any more.
        return self.after(self.upsampling(*(F.relu(part, inplace=not torch.is_grad_enabled()) for part in parts)))


class UNetGenerator(nn.Module):
    """UNet-128 at its defaults: seven strided convolutions down to 1/128, seven additive upsamplings back.

    Widths 64, 128, 256, then 512. Down: LeakyReLU 0.2, convolution of 4 with stride 2, batch norm; the first and the
    innermost have no norm. Up: ReLU, additive upsampling, batch norm, and the skip of the same resolution. Dropout
    where both sides of a block have the full width, but for the innermost: in two blocks of seven.

    Args:
        in_channels: number of source images.
        out_channels: number of target images.
        dims: 2 or 3 axes.
        filters: channels of the first level, a multiple of 4; the widest has eight times as many.
        downs: number of downsamplings, 2 or more; every axis must be divisible by ``divisor`` = 2^downs. Up to five
            there is no dropout, as in Pix2Pix.
        dropout: its probability.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 1,
        *,
        dims: int = 3,
        filters: int = 64,
        downs: int = 7,
        dropout: float = 0.5,
    ):
        super().__init__()
        _check_filters("UNetGenerator", filters)
        check_range("UNetGenerator", 2, 10, downs=downs)
        self.divisor = 2**downs
        widest = 8 * filters
        widths = [min(filters * 2**level, widest) for level in range(downs)]

        def down(level: int) -> nn.Sequential:
            before, width = (in_channels, *widths)[level], widths[level]
            conv = CONV[dims](before, width, kernel_size=4, stride=2, padding=1, bias=False)
            # In place although the skip holds the same tensor: the ReLU that follows it there sees no difference.
            block = nn.Sequential(nn.LeakyReLU(0.2, inplace=True), conv) if level else nn.Sequential(conv)
            return block.append(NORM[dims](width)) if 0 < level < downs - 1 else block

        def up(level: int) -> _Up:
            innermost = level == downs - 1
            above, width = (out_channels, *widths)[level], widths[level]
            drops = level > 0 and not innermost and above == width == widest
            return _Up(
                width if innermost else 2 * width, above, dims=dims, norm=level > 0, dropout=dropout if drops else 0.0
            )

        self.down = nn.ModuleList(down(level) for level in range(downs))
        self.up = nn.ModuleList(up(level) for level in reversed(range(downs)))  # the innermost first

    def forward(self, x: Tensor) -> Tensor:  # (B, in, X, Y, Z) -> (B, out, X, Y, Z) in [−1, 1]
        _check_axes("UNetGenerator", x, self.divisor)
        skips: list[Tensor] = []
        for down in self.down:
            x = down(x)  # (B, width, X / 2^level, …)
            skips.append(x)
        x = self.up[0](skips.pop())
        for up in self.up[1:]:
            x = up(skips.pop(), x)
        return torch.tanh(x)


class ResidualBlock(nn.Module):
    """Two reflect-padded convolutions of 3 with batch norm, dropout between them, and the input added."""

    def __init__(self, channels: int, *, dims: int, dropout: float):
        super().__init__()
        conv, norm, relu = _reflected(channels, channels, kernel=3, dims=dims)
        second, second_norm, _ = _reflected(channels, channels, kernel=3, dims=dims)
        self.body = nn.Sequential(conv, norm, relu, Dropout(dropout), second, second_norm)

    def forward(self, x: Tensor) -> Tensor:  # (B, channels, X, Y, Z), the same out
        return x + self.body(x)


class ResNetGenerator(nn.Module):
    """Convolution of 7, two strided convolutions, residual blocks, two additive upsamplings, convolution of 7, tanh.

    Args:
        in_channels: number of source images.
        out_channels: number of target images.
        dims: 2 or 3 axes; every one must be divisible by ``divisor`` = 4.
        filters: channels at full resolution, a multiple of 4; the blocks have four times as many.
        blocks: number of residual blocks.
        dropout: its probability, in the blocks.
    """

    divisor = 4

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 1,
        *,
        dims: int = 3,
        filters: int = 64,
        blocks: int = 6,
        dropout: float = 0.5,
    ):
        super().__init__()
        _check_filters("ResNetGenerator", filters)
        check_range("ResNetGenerator", 0, 64, blocks=blocks)

        def half(channels: int) -> list[nn.Module]:  # (B, n, X, Y, Z) -> (B, 2n, X/2, Y/2, Z/2)
            conv = CONV[dims](channels, 2 * channels, kernel_size=3, stride=2, padding=1, bias=False)
            return [conv, NORM[dims](2 * channels), nn.ReLU(inplace=True)]

        def double(channels: int) -> list[nn.Module]:  # (B, n, X, Y, Z) -> (B, n/2, 2X, 2Y, 2Z)
            upsampling = AdditiveUpsampling(channels, channels // 2, dims=dims)
            return [upsampling, NORM[dims](channels // 2), nn.ReLU(inplace=True)]

        self.body = nn.Sequential(
            *_reflected(in_channels, filters, kernel=7, dims=dims),
            *half(filters),
            *half(2 * filters),
            *(ResidualBlock(4 * filters, dims=dims, dropout=dropout) for _ in range(blocks)),
            *double(4 * filters),
            *double(2 * filters),
            CONV[dims](filters, out_channels, kernel_size=7, padding=3, padding_mode="reflect"),
            nn.Tanh(),
        )

    def forward(self, x: Tensor) -> Tensor:  # (B, in, X, Y, Z) -> (B, out, X, Y, Z) in [−1, 1]
        _check_axes("ResNetGenerator", x, self.divisor)
        return self.body(x)


def _reflected(in_channels: int, out_channels: int, kernel: int, dims: int) -> list[nn.Module]:
    """Reflect-padded convolution, batch norm, ReLU."""
    conv = CONV[dims](in_channels, out_channels, kernel, padding=kernel // 2, padding_mode="reflect", bias=False)
    return [conv, NORM[dims](out_channels), nn.ReLU(inplace=True)]


def _check_filters(name: str, filters: int) -> None:
    if filters < 4 or filters % 4:
        raise ValueError(f"{name}: filters is {filters}; expected a multiple of 4, as upsampling adds up 4 channels")


def _check_axes(name: str, x: Tensor, divisor: int) -> None:
    if any(size % divisor for size in x.shape[2:]):
        raise ValueError(f"{name}: every axis must be divisible by {divisor}, got {tuple(x.shape[2:])}")


def init_normal(module: nn.Module) -> None:
    """Pix2Pix's first weights, for ``net.apply``: N(0, 0.02) for convolutions, N(1, 0.02) for norms, no biases."""
    if isinstance(module, nn.modules.conv._ConvNd | nn.modules.batchnorm._BatchNorm):
        nn.init.normal_(module.weight, float(isinstance(module, nn.modules.batchnorm._BatchNorm)), 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@contextmanager
def as_in_training(net: nn.Module, *, dropout: bool, batch_statistics: bool) -> Iterator[None]:
    """Eval mode, but for dropout and for the statistics of batch norms where asked; afterwards all is as it was.

    Pix2Pix tests in training mode. ``net.train()`` would also have every test image change the running statistics.
    """
    before = {module: (module.training, getattr(module, "track_running_stats", None)) for module in net.modules()}
    net.eval()
    for module in before:
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.training = dropout
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and batch_statistics:
            module.training, module.track_running_stats = True, False
    try:
        yield
    finally:
        for module, (training, tracked) in before.items():
            module.training = training
            if tracked is not None:
                module.track_running_stats = tracked
