"""PatchGAN: a discriminator that judges overlapping patches, in 3D and in 2D (Isola et al. 2017)."""

import torch
from torch import Tensor, nn

from mrgen.nets.blocks import check_range

__all__ = ["PatchGAN"]


class PatchGAN(nn.Module):
    """Logits of how real each patch of a target looks beside its source (Baldini et al., section 3).

    Convolutions of 4: ``layers`` with stride 2, the first without a norm, then two with stride 1, the last of one
    channel and without a sigmoid. Batch norm and LeakyReLU 0.2 between them. With three layers a logit sees 70 voxels
    along each axis, and the smallest image has 24.

    Args:
        in_channels: number of source and target images together.
        dims: 2 or 3 axes.
        filters: channels of the first convolution; they double up to eight times as many.
        layers: number of convolutions with stride 2.
    """

    def __init__(self, in_channels: int, *, dims: int = 3, filters: int = 64, layers: int = 3):
        super().__init__()
        conv, norm = {2: (nn.Conv2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.BatchNorm3d)}[dims]
        check_range("PatchGAN", 1, 10, layers=layers)
        widths = [filters * min(2**n, 8) for n in range(layers + 1)]  # 64, 128, 256, 512

        def stage(n: int) -> nn.Sequential:
            before, width = (in_channels, *widths)[n], widths[n]
            first, stride = n == 0, 2 if n < layers else 1
            layer = nn.Sequential(conv(before, width, kernel_size=4, stride=stride, padding=1, bias=first))
            if not first:
                layer.append(norm(width))
            return layer.append(nn.LeakyReLU(0.2, inplace=True))

        self.stages = nn.ModuleList(stage(n) for n in range(layers + 1))
        self.stages.append(conv(widths[-1], 1, kernel_size=4, padding=1))

    def features(self, source: Tensor, target: Tensor) -> list[Tensor]:
        """What each stage makes of the pair, for feature matching; the last is the map of logits.

        Args:
            source: (B, n, X, Y, Z), or (B, n, X, Y).
            target: (B, m, X, Y, Z), or (B, m, X, Y).
        """
        features = [torch.cat([source, target], dim=1)]
        for stage in self.stages:
            features.append(stage(features[-1]))
        return features[1:]

    def forward(self, source: Tensor, target: Tensor) -> Tensor:  # -> (B, 1, x, y, z), about an eighth along each axis
        return self.features(source, target)[-1]
