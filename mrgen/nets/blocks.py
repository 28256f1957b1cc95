"""Layers that several networks share."""

from torch import Tensor, nn

__all__ = ["ConvBlock3d"]


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
            nn.InstanceNorm3d(out_channels, affine=True),
            nn.LeakyReLU(0.01, inplace=True),
        ]
        if dropout > 0:
            layers.append(nn.Dropout(dropout))
        super().__init__(*layers)

    def forward(self, x: Tensor) -> Tensor:  # (B, in, X, Y, Z) -> (B, out, X, Y, Z)
        return super().forward(x)
