"""DeepMedic: a segmenter that looks at the same place at several resolutions (Kamnitsas et al. 2017).

The judge of Baldini et al. (section 4.3). Its settings there are not public; the defaults here are those of DeepMedic's
own default configuration.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mrgen.nets.blocks import Dropout

__all__ = ["DeepMedic"]


class Pathway(nn.Module):
    """Valid convolutions of 3, with batch norm and PReLU before all but the first, and residual connections.

    Args:
        in_channels: number of input sequences.
        widths: feature maps of the layers.
        residual: layers, counted from 1, whose output gets the input of the layer before them added; where they have
            more feature maps, the first ones.
    """

    def __init__(self, in_channels: int, widths: Sequence[int], residual: Sequence[int]):
        super().__init__()
        self.residual = frozenset(residual)
        self.layers = nn.ModuleList([nn.Conv3d(in_channels, widths[0], kernel_size=3, bias=False)])
        for before, width in pairwise(widths):
            self.layers.append(nn.Sequential(*_activated(before), nn.Conv3d(before, width, kernel_size=3, bias=False)))

    def forward(self, x: Tensor) -> Tensor:  # (B, in, X, Y, Z) -> (B, last width, X − 2 · layers, …)
        earlier = x  # input of the layer before
        for number, layer in enumerate(self.layers, start=1):
            out = layer(x)  # every axis loses 2
            if number in self.residual:
                shared = earlier[:, :, 2:-2, 2:-2, 2:-2]
                out = out + F.pad(shared, (0, 0, 0, 0, 0, 0, 0, out.shape[1] - shared.shape[1]))  # of channels
            earlier, x = x, out
        return x


class DeepMedic(nn.Module):
    """A normal pathway and subsampled ones of the same form, side by side, and a head of 1×1×1 convolutions.

    A subsampled pathway sees means of f × f × f voxels, and each of its answers stands for that many. DeepMedic's own
    code takes the middle voxel of them; the mean costs nothing, lets every voxel count and keeps noise and fine texture
    from posing as coarse structure.

    The convolutions are valid: the input has the output's surroundings around it, and every pathway's part is cut out
    of it. The answer has ``margin`` voxels less on each side, and every size that leaves one voxel is legal. The blocks
    of f × f × f voxels are counted from the first output voxel, as DeepMedic counts them. In eval mode a voxel
    therefore has one answer in all segments whose corners lie a multiple of ``grid`` apart, the least common multiple
    of the factors, whatever their sizes; in between the blocks fall differently.

    Args:
        in_channels: number of input sequences.
        classes: number of classes, background included.
        widths: feature maps of each pathway's layers.
        hidden: feature maps of the head's layers.
        factors: of the subsampled pathways, along every axis.
        residual: layers with a residual connection, see ``Pathway``.
        dropout: before the head's last two layers.
        pad: surrounds the input with 0, which is the background, so that the answer has its size. For whole brains;
            patches have real surroundings.

    Attributes:
        reach: how many voxels away an input can still change an output: (layers + 1) · f − 1 of the largest factor.
        grid: see above.
        margin: voxels that the answer loses on each side: ``reach``, or 0 with ``pad``.
        divisor: with ``pad``, ``grid``, so that tiles fall on the same blocks as the whole volume does.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        *,
        widths: Sequence[int] = (30, 30, 40, 40, 40, 40, 50, 50),
        hidden: Sequence[int] = (250, 250),
        factors: Sequence[int] = (3, 5),
        residual: Sequence[int] = (4, 6, 8),
        dropout: float = 0.5,
        pad: bool = False,
    ):
        super().__init__()
        if any(factor < 2 for factor in factors) or any(not 2 <= layer <= len(widths) for layer in residual):
            raise ValueError(
                f"DeepMedic: factors are {list(factors)} and residual layers {list(residual)}; expected factors from "
                f"2 on, and layers from 2 to {len(widths)}"
            )
        self.factors = (1, *factors)
        self.layers = len(widths)
        self.grid = math.lcm(*factors)
        # A pathway's voxel looks `layers` blocks around its own, of which an output voxel may be the first.
        self.reach = (self.layers + 1) * max(self.factors) - 1
        self.margin, self.divisor = (0, self.grid) if pad else (self.reach, 1)
        self.pad = pad

        self.pathways = nn.ModuleList(Pathway(in_channels, widths, residual) for _ in self.factors)
        channels = [widths[-1] * len(self.factors), *hidden, classes]
        self.head = nn.Sequential()
        for i, (before, width) in enumerate(pairwise(channels)):
            last = i == len(hidden)
            self.head.extend(_activated(before))
            if i >= len(hidden) - 1:
                self.head.append(Dropout(dropout))
            self.head.append(nn.Conv3d(before, width, kernel_size=1, bias=last))

    def forward(self, x: Tensor) -> Tensor:  # (B, in, X, Y, Z) -> (B, classes, X − 2 · margin, …)
        if self.pad:
            x = F.pad(x, [self.reach] * 6)
        size = [n - 2 * self.reach for n in x.shape[2:]]
        if min(size) < 1:
            raise ValueError(
                f"DeepMedic: an axis must have {2 * self.reach + 1} voxels or more, got {tuple(x.shape[2:])}"
            )
        parts = []
        for pathway, factor in zip(self.pathways, self.factors, strict=True):
            part = pathway(self._seen(x, factor, size))  # (B, width, ⌈size / factor⌉, …)
            if factor > 1:
                part = F.interpolate(part, scale_factor=factor, mode="nearest")
            parts.append(part[:, :, : size[0], : size[1], : size[2]])
        return self.head(torch.cat(parts, dim=1))

    def _seen(self, x: Tensor, factor: int, size: Sequence[int]) -> Tensor:
        """What a pathway needs for outputs of this size: (B, in, ⌈size / factor⌉ + 2 · layers, …)."""
        start = self.reach - self.layers * factor
        for axis, n in enumerate(size, start=2):
            x = x.narrow(axis, start, (-(-n // factor) + 2 * self.layers) * factor)
        return x if factor == 1 else F.avg_pool3d(x, factor)


def _activated(channels: int) -> list[nn.Module]:
    return [nn.BatchNorm3d(channels), nn.PReLU(channels)]
