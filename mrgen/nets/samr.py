"""SAMR's networks (Guo et al., MICCAI 2020, section 2): a lesion mask and an atlas to slices of every sequence.

Kernels, paddings and the number of blocks, where the paper is silent, are those of its authors' published networks; the
generator's widths, which neither gives, are ours. ``norm`` is ``batch``, as in the paper, or ``instance``, which has no
weights of its own. First weights as in pix2pix.
"""

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mrgen.nets.blocks import check_range
from mrgen.nets.pix2pix import init_normal

__all__ = ["LabelWiseDiscriminators", "SAMRGenerator", "SegmentationUNet2d"]

Norm = Literal["batch", "instance"]
NORM = {"batch": nn.BatchNorm2d, "instance": nn.InstanceNorm2d}


class SAMRGenerator(nn.Module):
    """Mask encoder, atlas encoder, residual blocks, and one decoder a sequence: "stretch-out up-sampling" (Fig. 1a).

    An encoder is a convolution of 7 and ``downs`` strided ones of 3, which double the channels up to ``cap``. The two
    latent maps are concatenated. A decoder is one more residual block, ``downs`` transposed convolutions of 3 that
    mirror an encoder at twice its width, a convolution of 7 and tanh. Norm and ReLU after every layer but the last.

    The default depth is the paper's, whose 256 × 256 become 8 × 8. Of smaller images take fewer: five halvings of
    64 × 64 leave 2 × 2, three leave 8 × 8.

    Args:
        labels: channels of the label map: background, normal brain and the lesion's classes; 5 in the paper.
        sequences: number of images out; 5 in the paper.
        atlas_channels: of the atlas, 3 adjacent slices of every sequence; 15 in the paper. 0 leaves its encoder out,
            which halves the latent map and all that follows: the ablation "w/o atlas".
        filters: channels at full resolution in an encoder. With 64, as in pix2pixHD, five doublings are 2048 channels.
        cap: the most channels in an encoder.
        downs: number of downsamplings, 1 or more.
        blocks: number of residual blocks before the decoders.
        norm: ``batch`` or ``instance``.
        stretch_out: False has one decoder for all sequences: the ablation "w/o stretch-out".

    Attributes:
        divisor: 2^downs; every axis must be a multiple of it, and at least two.
    """

    def __init__(
        self,
        *,
        labels: int,
        sequences: int,
        atlas_channels: int,
        filters: int = 8,
        cap: int = 512,
        downs: int = 5,
        blocks: int = 9,
        norm: Norm = "batch",
        stretch_out: bool = True,
    ):
        super().__init__()
        _check("SAMRGenerator", norm, filters=filters, cap=cap)
        check_range("SAMRGenerator", 1, 10, downs=downs)
        check_range("SAMRGenerator", 0, 64, blocks=blocks)
        self.divisor = 2**downs
        widths = [min(filters * 2**level, cap) for level in range(downs + 1)]
        wide = [2 * width if atlas_channels else width for width in widths]  # of what follows both encoders
        self.mask_encoder = _encoder(labels, widths, norm)
        self.atlas_encoder = _encoder(atlas_channels, widths, norm) if atlas_channels else None
        self.blocks = nn.Sequential(*(_ResidualBlock(wide[-1], norm) for _ in range(blocks)))
        self.decoders = nn.ModuleList(
            _decoder(wide, channels, norm) for channels in ([1] * sequences if stretch_out else [sequences])
        )
        self.apply(init_normal)

    def forward(self, label_map: Tensor, atlas: Tensor | None = None) -> Tensor:
        """Images in [−1, 1], (B, sequences, X, Y).

        Args:
            label_map: (B, labels, X, Y) float, one-hot.
            atlas: (B, atlas_channels, X, Y); None where there is no atlas encoder, and only there.

        Raises:
            ValueError: the axes do not fit ``divisor``, or the atlas is missing or one too many.
        """
        # Of one row there is nothing to reflect.
        if any(size % self.divisor or size < 2 * self.divisor for size in label_map.shape[2:]):
            raise ValueError(
                f"SAMRGenerator: every axis must be divisible by {self.divisor} and at least {2 * self.divisor}, "
                f"got {tuple(label_map.shape[2:])}"
            )
        if (atlas is None) != (self.atlas_encoder is None):
            found = "none" if atlas is None else f"one of {atlas.shape[1]} channels"
            raise ValueError(f"SAMRGenerator: built with{'out' * (self.atlas_encoder is None)} an atlas, got {found}")
        latent = self.mask_encoder(label_map)  # (B, width, X / divisor, Y / divisor)
        if self.atlas_encoder is not None:
            latent = torch.cat([latent, self.atlas_encoder(atlas)], dim=1)  # (B, 2 · width, …)
        latent = self.blocks(latent)
        return torch.cat([decoder(latent) for decoder in self.decoders], dim=1)


class LabelWiseDiscriminators(nn.Module):
    """A PatchGAN of its own for every region and scale (section 2, "Multi-scale Label-wise Discriminators").

    Each sees its region alone: all channels of its input, label map, images and atlas, are zero elsewhere. Only then
    is the input halved for the second scale. Without a lesion in a slice those of the lesion have nothing to judge;
    such a sample never enters them, so that it changes no loss, no gradient and no batch statistics.

    Args:
        in_channels: channels of the label map, the images and the atlas together; 25 in the paper.
        regions: number of regions; 3 in the paper: background, normal brain, lesion. None has ordinary discriminators
            on unmasked input: the ablation "w/o label-wise D".
        scales: discriminators a region, each at half the resolution of the one before.
        filters: channels of the first convolution; they double up to eight times as many.
        norm: ``batch`` or ``instance``.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        regions: int | None = 3,
        scales: int = 2,
        filters: int = 64,
        norm: Norm = "batch",
    ):
        super().__init__()
        _check("LabelWiseDiscriminators", norm, filters=filters, regions=1 if regions is None else regions)
        check_range("LabelWiseDiscriminators", 1, 8, scales=scales)
        self.regions, self.scales = regions, scales
        self.discriminators = nn.ModuleList(
            _PatchGAN(in_channels, filters, norm) for _ in range((regions or 1) * scales)
        )
        self.apply(init_normal)

    def forward(self, inputs: Tensor, masks: Tensor | None = None) -> tuple[list[list[Tensor]], Tensor]:
        """What each stage of each discriminator makes of the samples in which its region is present.

        A mean over the logits of a region that is in no sample is nan: leave such a discriminator out of a loss.

        Args:
            inputs: (B, in_channels, X, Y): label map, images and atlas concatenated.
            masks: (B, regions, X, Y) bool, from the label map; of real and synthetic images the same. Without regions
                they are not looked at.

        Returns:
            A list for each discriminator, scale after scale of the first region, then of the next: the features
            (n, channels, x, y) of five stages, the last the logits, n being the number of samples with the region, 0
            where there is none. And which samples those are, (B, regions) bool; (B, 1), all True, without regions.
        """
        if self.regions is None:
            masks = inputs.new_ones(len(inputs), 1, *inputs.shape[2:], dtype=torch.bool)
        expected = (len(inputs), self.regions or 1, *inputs.shape[2:])
        if masks is None or masks.shape != expected:
            found = None if masks is None else tuple(masks.shape)
            raise ValueError(f"LabelWiseDiscriminators: expected masks of shape {expected}, found {found}")
        present = masks.flatten(2).any(dim=2)  # (B, regions)
        features = []
        for k, discriminator in enumerate(self.discriminators):
            region, scale = divmod(k, self.scales)
            if scale == 0:
                here = present[:, region]
                x = inputs[here].where(masks[here, region].unsqueeze(1), 0.0)  # (n, in, X, Y)
            else:  # -> (n, in, X / 2^scale, Y / 2^scale)
                x = F.avg_pool2d(x, kernel_size=3, stride=2, padding=1, count_include_pad=False)
            features.append(discriminator(x))
        return features, present


class SegmentationUNet2d(nn.Module):
    """The U-Net of pix2pix as a segmenter (Fig. 1c): images to the logits of every label.

    Down: LeakyReLU 0.2, convolution of 4 with stride 2, norm; the first and the innermost have no norm. Up: ReLU,
    transposed convolution of 4, norm, and the skip of the same resolution. The paper's softmax is left to the loss.

    Args:
        in_channels: number of images.
        classes: number of labels, background included.
        filters: channels of the first level; the widest has eight times as many.
        downs: number of downsamplings, 2 or more.
        norm: ``batch`` or ``instance``.

    Attributes:
        divisor: 2^downs; every axis must be a multiple of it.
    """

    def __init__(self, in_channels: int, classes: int, *, filters: int = 64, downs: int = 5, norm: Norm = "batch"):
        super().__init__()
        _check("SegmentationUNet2d", norm, filters=filters)
        check_range("SegmentationUNet2d", 2, 10, downs=downs)
        self.divisor = 2**downs
        widths = [filters * min(2**level, 8) for level in range(downs)]
        bias = norm == "instance"  # as in pix2pix

        def down(level: int) -> nn.Sequential:
            before, width = (in_channels, *widths)[level], widths[level]
            conv = nn.Conv2d(before, width, kernel_size=4, stride=2, padding=1, bias=bias)
            # Not in place: the skip holds the same tensor.
            block = nn.Sequential(nn.LeakyReLU(0.2), conv) if level else nn.Sequential(conv)
            return block.append(NORM[norm](width)) if 0 < level < downs - 1 else block

        def up(level: int) -> nn.Sequential:
            below = widths[level] if level == downs - 1 else 2 * widths[level]  # the innermost has no skip
            above = (classes, *widths)[level]
            conv = nn.ConvTranspose2d(below, above, kernel_size=4, stride=2, padding=1, bias=bias or level == 0)
            block = nn.Sequential(nn.ReLU(inplace=True), conv)
            return block.append(NORM[norm](above)) if level else block

        self.down = nn.ModuleList(down(level) for level in range(downs))
        self.up = nn.ModuleList(up(level) for level in reversed(range(downs)))  # the innermost first
        self.apply(init_normal)

    def forward(self, x: Tensor) -> Tensor:  # (B, in, X, Y) -> (B, labels, X, Y), logits
        if any(size % self.divisor for size in x.shape[2:]):
            raise ValueError(
                f"SegmentationUNet2d: every axis must be divisible by {self.divisor}, got {tuple(x.shape[2:])}"
            )
        skips: list[Tensor] = []
        for down in self.down:
            x = down(x)  # (B, width, X / 2^level, Y / 2^level)
            skips.append(x)
        x = self.up[0](skips.pop())
        for up in self.up[1:]:
            x = up(torch.cat([skips.pop(), x], dim=1))
        return x


class _ResidualBlock(nn.Module):
    """Two reflect-padded convolutions of 3 with norms, a ReLU between them, and the input added."""

    def __init__(self, channels: int, norm: Norm):
        super().__init__()
        second = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect", bias=False)
        self.body = nn.Sequential(*_reflected(channels, channels, 3, norm), second, NORM[norm](channels))

    def forward(self, x: Tensor) -> Tensor:  # (B, channels, X, Y), the same out
        return x + self.body(x)


class _PatchGAN(nn.Module):
    """The five stages of a 2D `mrgen.nets.patchgan.PatchGAN`, with a padding of 2: 256 × 256 give 35 × 35 logits."""

    def __init__(self, in_channels: int, filters: int, norm: Norm):
        super().__init__()
        widths = [filters, 2 * filters, 4 * filters, 8 * filters]

        def stage(n: int) -> nn.Sequential:
            before, width, stride = (in_channels, *widths)[n], widths[n], 2 if n < 3 else 1
            layer = nn.Sequential(nn.Conv2d(before, width, kernel_size=4, stride=stride, padding=2, bias=n == 0))
            if n:  # a bias would be removed by the norm
                layer.append(NORM[norm](width))
            return layer.append(nn.LeakyReLU(0.2, inplace=True))

        self.stages = nn.ModuleList(stage(n) for n in range(4))
        self.stages.append(nn.Conv2d(widths[-1], 1, kernel_size=4, padding=2))

    def forward(self, x: Tensor) -> list[Tensor]:  # (B, in, X, Y) -> five of (B, width, x, y), the last of one channel
        features = [x]
        for stage in self.stages:
            features.append(stage(features[-1]))
        return features[1:]


def _encoder(in_channels: int, widths: list[int], norm: Norm) -> nn.Sequential:
    """(B, in, X, Y) -> (B, widths[-1], X / 2^n, Y / 2^n), n being one less than there are widths."""
    layers = _reflected(in_channels, widths[0], 7, norm)
    for before, width in pairwise(widths):
        conv = nn.Conv2d(before, width, kernel_size=3, stride=2, padding=1, bias=False)
        layers += [conv, NORM[norm](width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _decoder(widths: list[int], out_channels: int, norm: Norm) -> nn.Sequential:
    """(B, widths[-1], X / 2^n, Y / 2^n) -> (B, out, X, Y) in [−1, 1]: a residual block, then an encoder backwards."""
    layers: list[nn.Module] = [_ResidualBlock(widths[-1], norm)]
    for below, width in pairwise(reversed(widths)):
        conv = nn.ConvTranspose2d(below, width, kernel_size=3, stride=2, padding=1, output_padding=1, bias=False)
        layers += [conv, NORM[norm](width), nn.ReLU(inplace=True)]
    last = nn.Conv2d(widths[0], out_channels, kernel_size=7, padding=3, padding_mode="reflect")
    return nn.Sequential(*layers, last, nn.Tanh())


def _reflected(in_channels: int, out_channels: int, kernel: int, norm: Norm) -> list[nn.Module]:
    """Reflect-padded convolution, norm, ReLU. No bias: either norm would remove it."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, padding_mode="reflect", bias=False)
    return [conv, NORM[norm](out_channels), nn.ReLU(inplace=True)]


def _check(name: str, norm: str, **numbers: int) -> None:
    if norm not in NORM:
        raise ValueError(f"{name}: norm is {norm!r}; expected one of {', '.join(NORM)}")
    for what, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name}: {what} is {number}; expected 1 or more")
