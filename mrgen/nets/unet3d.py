"""The 3D U-Net under RS-Net, R-Net and S-Net, and the two blocks that stand on it."""

import torch
from torch import Tensor, nn

from mrgen.nets.blocks import AvgPool3d, ConvBlock3d, Dropout, check_range

__all__ = ["RegressionBlock", "SegmentationBlock", "SegmentationUNet3d", "UNet3d"]


class UNet3d(nn.Module):
    """Volumes to latent features at full resolution (RS-Net, section 2).

    ``levels`` resolution levels of ``filters · 2^n`` channels: two convolution blocks and dropout each, average pooling
    on the way down, transposed convolutions and skip connections on the way up. The paper names "a modified 3D U-Net"
    and no numbers; these follow the same laboratory's sibling networks.

    ``forward`` is ``head`` after ``stem``: what lies before the first dropout is the same in every Monte Carlo sample.

    Args:
        in_channels: number of input sequences.
        filters: channels of the first level and of the output.
        levels: resolution levels; every axis of the input must be divisible by ``divisor`` = 2^(levels − 1).
        dropout: probability after each level (Monte Carlo dropout needs it above 0).
    """

    def __init__(self, in_channels: int, *, filters: int = 32, levels: int = 4, dropout: float = 0.05):
        super().__init__()
        check_range("UNet3d", 2, 8, levels=levels)
        if filters < 1 or not 0 <= dropout < 1:
            raise ValueError(
                f"UNet3d: filters is {filters} and dropout {dropout}; expected 1 or more, and 0 to below 1"
            )
        self.out_channels = filters
        self.divisor = 2 ** (levels - 1)
        widths = [filters * 2**level for level in range(levels)]

        def double(in_channels: int, out_channels: int) -> nn.Sequential:
            return nn.Sequential(ConvBlock3d(in_channels, out_channels), ConvBlock3d(out_channels, out_channels))

        self.down = nn.ModuleList(double(i, o) for i, o in zip([in_channels, *widths[:-1]], widths, strict=True))
        self.pool = AvgPool3d()
        upwards = list(zip(reversed(widths[1:]), reversed(widths[:-1]), strict=True))  # (deep, shallow) pairs
        self.up = nn.ModuleList(
            nn.ConvTranspose3d(deep, shallow, kernel_size=3, stride=2, padding=1, output_padding=1)
            for deep, shallow in upwards
        )
        self.merge = nn.ModuleList(double(2 * shallow, shallow) for _, shallow in upwards)
        self.dropout = Dropout(dropout)

    def stem(self, x: Tensor) -> Tensor:  # (B, in, X, Y, Z) -> (B, filters, X, Y, Z)
        """The first level, up to its dropout."""
        if any(size % self.divisor for size in x.shape[2:]):
            raise ValueError(f"UNet3d: every axis must be divisible by {self.divisor}, got {tuple(x.shape[2:])}")
        return self.down[0](x)

    def head(self, x: Tensor) -> Tensor:  # (B, filters, X, Y, Z) of the stem -> (B, filters, X, Y, Z)
        """Everything from the first dropout on."""
        x = self.dropout(x)
        skips: list[Tensor] = []
        for block in self.down[1:]:
            skips.append(x)
            x = self.dropout(block(self.pool(x)))  # (B, filters · 2^level, X / 2^level, …)
        for up, merge in zip(self.up, self.merge, strict=True):
            x = self.dropout(merge(torch.cat([skips.pop(), up(x)], dim=1)))
        return x

    def forward(self, x: Tensor) -> Tensor:  # (B, in, X, Y, Z) -> (B, filters, X, Y, Z)
        return self.head(self.stem(x))


class RegressionBlock(nn.Module):
    """Latent features, and one input MRI where the network has it, to the missing sequence (RS-Net, section 2).

    Linear output: the targets are z-scored.

    Args:
        in_channels: latent channels.
        extra_channels: 1 when one of the input MRIs is concatenated (RS-Net), 0 without it (R-Net).
        dropout: probability after the first convolution.
    """

    def __init__(self, in_channels: int, *, extra_channels: int = 1, dropout: float = 0.05):
        super().__init__()
        # In a network of 8 filters, 4 channels behind a norm over brain and air hardly learn: the squared error in
        # the brain was still 0.9 after 120 steps, with 8 channels it was 0.4.
        half = max(min(in_channels, 8), in_channels // 2)
        self.body = nn.Sequential(
            ConvBlock3d(in_channels + extra_channels, in_channels, dropout=dropout),
            ConvBlock3d(in_channels, half),
            nn.Conv3d(half, 1, kernel_size=1),
        )

    def forward(self, latent: Tensor, extra: Tensor | None = None) -> Tensor:  # -> (B, 1, X, Y, Z)
        # In one type: concatenating half with single precision would compute the whole block in single.
        return self.body(latent if extra is None else torch.cat([latent, extra.to(latent.dtype)], dim=1))


class SegmentationBlock(nn.Sequential):
    """Latent features to class logits (RS-Net, section 2).

    Args:
        in_channels: latent channels.
        classes: number of classes, background included.
        dropout: probability after the first convolution.
    """

    def __init__(self, in_channels: int, classes: int, *, dropout: float = 0.05):
        super().__init__(
            ConvBlock3d(in_channels, in_channels, dropout=dropout),
            nn.Conv3d(in_channels, classes, kernel_size=1),
        )

    def forward(self, latent: Tensor) -> Tensor:  # (B, in, X, Y, Z) -> (B, classes, X, Y, Z)
        return super().forward(latent)


class SegmentationUNet3d(nn.Module):
    """S-Net: the U-Net with the segmentation block alone (RS-Net, section 3). Arguments as ``UNet3d``."""

    def __init__(self, in_channels: int, classes: int, *, filters: int = 32, levels: int = 4, dropout: float = 0.05):
        super().__init__()
        self.unet = UNet3d(in_channels, filters=filters, levels=levels, dropout=dropout)
        self.segmentation = SegmentationBlock(filters, classes, dropout=dropout)
        self.divisor = self.unet.divisor

    def forward(self, x: Tensor) -> Tensor:  # (B, in, X, Y, Z) -> (B, classes, X, Y, Z)
        return self.segmentation(self.unet(x))
