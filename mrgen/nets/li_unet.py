"""The 2D U-Net of Li et al., "Fully convolutional network ensembles for white matter hyperintensities segmentation in
MR images" (NeuroImage 2018), the winner of the WMH challenge 2017, with the batch norms that Orbes-Arteaga et al. add.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["LiUNet"]

WIDTHS = (1, 1.5, 2, 4, 8)  # of the five levels: 64, 96, 128, 256 and 512 in the paper


class LiUNet(nn.Module):
    """Five levels of two convolutions; sizes need not be even, because what is too large is cropped on the way up.

    The first two convolutions are 5 × 5, the second of the fourth level is 4 × 4, all others 3 × 3; each is followed by
    batch norm and ReLU. Down by 2 × 2 maximum, up by nearest neighbours. Of 200 pixels the levels have 200, 100, 50, 25
    and 12; upwards 24, 48, 96 and 192, which is filled up to 200 around the last, 1 × 1 convolution. Li et al. fill
    with zeros before it, so that the outermost pixels all answer the last bias. That is harmless in a segmentation; an
    imputer would be judged by it, so that here the outermost pixels answer as their nearest neighbour inside.

    Args:
        in_channels: of the images.
        width: channels of the first level, 64 in the paper; a multiple of 2.

    Attributes:
        smallest: the fewest pixels along an axis.
    """

    smallest = 16

    def __init__(self, in_channels: int, *, width: int = 64):
        super().__init__()
        if width < 2 or width % 2:
            raise ValueError(f"width is {width}; expected a multiple of 2 from 2 on")
        one, two, three, four, five = (int(width * factor) for factor in WIDTHS)
        self.down = nn.ModuleList(
            [
                nn.Sequential(_conv(in_channels, one, 5), _conv(one, one, 5)),
                nn.Sequential(_conv(one, two), _conv(two, two)),
                nn.Sequential(_conv(two, three), _conv(three, three)),
                nn.Sequential(_conv(three, four), _conv(four, four, 4)),
                nn.Sequential(_conv(four, five), _conv(five, five)),
            ]
        )
        self.up = nn.ModuleList(
            [
                nn.Sequential(_conv(five + four, four), _conv(four, four)),
                nn.Sequential(_conv(four + three, three), _conv(three, three)),
                nn.Sequential(_conv(three + two, two), _conv(two, two)),
                nn.Sequential(_conv(two + one, one), _conv(one, one)),
            ]
        )
        self.last = nn.Conv2d(one, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, X, Y) to (B, 1, X, Y), linear."""
        size, skips = x.shape[2:], []
        for level in self.down[:-1]:
            x = level(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)  # an odd last row or column is left out
        x = self.down[-1](x)  # (B, 8 · width, X // 16, Y // 16)
        for level in self.up:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = level(torch.cat([x, _fitted(skips.pop(), x.shape[2:])], dim=1))
        return _fitted(self.last(x), size)  # the same as filled up before it


def _fitted(x: Tensor, size: torch.Size) -> Tensor:
    """(B, C, X, Y) cut to a size, or filled up to it with the pixels of its edge; the odd pixel at the end.

    The backward pass of ``F.pad``'s replicating is another each time on a GPU, and wrong for inductor.
    """
    for axis, target in zip((2, 3), size, strict=True):
        surplus = x.shape[axis] - target
        front, back = int(surplus / 2), surplus - int(surplus / 2)  # towards 0: the rest is at the end
        if surplus > 0:
            x = x.narrow(axis, front, target)
        elif surplus < 0:
            edges = ((x.narrow(axis, 0, 1), -front), (x.narrow(axis, x.shape[axis] - 1, 1), -back))
            before, after = ([edge] * count for edge, count in edges)
            x = torch.cat([*before, x, *after], dim=axis)
    return x


def _conv(in_channels: int, channels: int, kernel: int = 3) -> nn.Sequential:
    """A convolution that keeps the size, batch norm, ReLU. An even kernel reaches one pixel further at the end."""
    pad = nn.ZeroPad2d(((kernel - 1) // 2, kernel // 2) * 2) if kernel % 2 == 0 else nn.Identity()
    conv = nn.Conv2d(in_channels, channels, kernel, padding=0 if kernel % 2 == 0 else kernel // 2, bias=False)
    return nn.Sequential(pad, conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
