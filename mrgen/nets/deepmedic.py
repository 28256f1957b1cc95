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

from mrgen.nets.blocks import Dropout, check_range

__all__ = ["DeepMedic"]


class PReLU(nn.PReLU):
    """``torch.nn.PReLU``, the same numbers, without PyTorch's detours on a processor.

    In channels last its slopes are looked up a voxel at a time there, and its gradient takes a branch a number, which
    together is almost half of a training step in bf16.
    """

    def forward(self, x: Tensor) -> Tensor:  # (B, C, X, Y, Z), the same out
        if x.device.type != "cpu" or not x.is_contiguous(memory_format=torch.channels_last_3d):
            return super().forward(x)
        return _Bent.apply(x, self.weight.to(x.dtype))


class _Bent(torch.autograd.Function):
    """Works on planes of Y · Z · C numbers, which lie in one piece and have one long row of slopes."""

    @staticmethod
    def forward(ctx, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(x, slope)
        planes = x.movedim(1, -1).flatten(0, 1).flatten(1)  # (B · X, Y · Z · C), no copy
        out = F.prelu(planes, slope.repeat(x.shape[3] * x.shape[4]))
        return out.view(x.movedim(1, -1).shape).movedim(-1, 1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, slope = ctx.saved_tensors
        plane = slope.view(-1, 1, 1).expand(-1, *x.shape[3:])[:, None]  # (C, 1, Y, Z)
        plane = plane[None].contiguous(memory_format=torch.channels_last_3d)
        straight = torch.ops.aten.threshold_backward(grad, x, 0)  # ReLU's gradient: that of x > 0
        bent = grad - straight
        return straight.addcmul_(bent, plane), bent.mul_(x).sum((0, 2, 3, 4))


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
                more = out.shape[1] - earlier.shape[1]
                out = out + F.pad(earlier, [-2] * 6 + [0, more])  # cuts space and fills channels, layout kept
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

    Attributes:
        reach: how many voxels away an input can still change an output: (layers + 1) · f − 1 of the largest factor.
        grid: see above.
        margin: voxels that the answer loses on each side, ``reach``.
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
    ):
        super().__init__()
        if any(factor < 2 for factor in factors) or any(not 2 <= layer <= len(widths) for layer in residual):
            raise ValueError(
                f"DeepMedic: factors are {list(factors)} and residual layers {list(residual)}; expected factors from "
                f"2 on, and layers from 2 to {len(widths)}"
            )
        check_range("DeepMedic", 1, 64, widths=len(widths), hidden=len(hidden) + 1, factors=len(factors) + 1)
        self.factors = (1, *factors)
        self.layers = len(widths)
        self.grid = math.lcm(*factors)
        # A pathway's voxel looks `layers` blocks around its own, of which an output voxel may be the first.
        self.margin = self.reach = (self.layers + 1) * max(self.factors) - 1

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
            parts.append(F.pad(part, [n for a in (4, 3, 2) for n in (0, size[a - 2] - part.shape[a])]))  # cuts
        return self.head(torch.cat(parts, dim=1))

    def _seen(self, x: Tensor, factor: int, size: Sequence[int]) -> Tensor:
        """What a pathway needs for outputs of this size: (B, in, ⌈size / factor⌉ + 2 · layers, …)."""
        start = self.reach - self.layers * factor
        for axis, n in enumerate(size, start=2):
            x = x.narrow(axis, start, (-(-n // factor) + 2 * self.layers) * factor)
        if factor > 1:  # as F.avg_pool3d, which is slower
            for axis in (2, 3, 4):
                x = x.unflatten(axis, (-1, factor)).mean(axis + 1)
        return x


def _activated(channels: int) -> list[nn.Module]:
    return [nn.BatchNorm3d(channels), PReLU(channels)]
