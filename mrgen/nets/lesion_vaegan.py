"""The networks of the lesion VAE-GAN (Qu et al., section 2), whose layers are those of its authors' published code.

All convolutions keep the size but for their stride. An affine instance norm follows each, the last one before a
decoder's sigmoid included but not that of a discriminator, and then the authors' activation: a leaky ReLU clipped to
[0, 100], which is a ReLU with a cap. FD_f alone has no norms. ``width`` is the channels of the first layer, 64 in the
code. Upsampling is nearest.

First weights are He's normal ones, ours. The authors' encoders and decoders begin as blurs, all filters of a layer
alike but for 1e-6 of noise: ``blur_init`` does that.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = [
    "CodeDiscriminator",
    "ImageDecoder",
    "ImageDiscriminator",
    "ImageEncoder",
    "LatentDiscriminator",
    "LesionSegmentors",
    "Scheme",
    "StructureDecoder",
    "StructureDiscriminator",
    "StructureEncoder",
    "blur_init",
]

Scheme = Literal["single", "shared_encoder", "multiple"]
STAGES = 5  # of the structure encoder


def _conv(in_channels: int, out_channels: int, *, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, instance norm and activation; (B, in, X, Y) -> (B, out, ⌈X/stride⌉, ⌈Y/stride⌉)."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False),
        nn.InstanceNorm2d(out_channels, affine=True),
        nn.Hardtanh(0, 100),
    )


def _out(in_channels: int, out_channels: int, shift: float = 2.0) -> nn.Sequential:
    """A decoder's end: (B, in, X, Y) -> (B, out, X, Y) in (0, 1).

    An optimiser moves the shift of the norm by about a learning rate a step, and most pixels are far from one half. So
    it starts at −``shift`` in images and in the rarer classes, and at ``shift`` in the first of several.
    """
    norm = nn.InstanceNorm2d(out_channels, affine=True)
    nn.init.constant_(norm.weight, 2)
    nn.init.constant_(norm.bias, -shift)
    if out_channels > 1:
        nn.init.constant_(norm.bias[:1], shift)
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), norm, nn.Sigmoid())


def _first_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def blur_init(module: nn.Module) -> None:
    """The authors' first weights of a convolution in encoders and decoders: for ``Module.apply``."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 1 / module.weight[0].numel(), 1e-6)


class ImageEncoder(nn.Sequential):
    """EC, EC_R, the lesion encoders and MASK's: (B, in_channels, X, Y) -> code (B, 8 · width, X/4, Y/4).

    Args:
        in_channels: of the input.
        width: channels of the first layer.
        dropout: of the input's pixels (section 3.4).
    """

    def __init__(self, in_channels: int, width: int = 64, dropout: float = 0.0):
        super().__init__(
            nn.Dropout(dropout),
            _conv(in_channels, width),  # (B, w, X, Y)
            _conv(width, width),
            _conv(width, 2 * width, stride=2),  # (B, 2w, X/2, Y/2)
            _conv(2 * width, 4 * width),
            _conv(4 * width, 4 * width),
            _conv(4 * width, 8 * width, stride=2),  # (B, 8w, X/4, Y/4)
            _conv(8 * width, 8 * width),
        )
        self.apply(_first_weights)


class ImageDecoder(nn.Sequential):
    """DC, the lesion decoders and MASK's: (B, in_channels, X/4, Y/4) -> (B, out_channels, X, Y) in (0, 1).

    Args:
        in_channels: 8 · width of a code, and those of what is stacked with it.
        out_channels: 1 of an image, the classes of a lesion, 2 of a mask.
        width: of the encoder.
        first_norm: False leaves out the norm after the first convolution, which takes away all that a map of one value,
            stacked with the code, adds to it, but for what zero padding makes of it at the borders.
        shift: where the last norm starts: there in the first of several channels, at its negative in all others.
    """

    def __init__(
        self, in_channels: int, out_channels: int, width: int = 64, first_norm: bool = True, shift: float = 2.0
    ):
        double = nn.Upsample(scale_factor=2)
        first = _conv(in_channels, 8 * width)
        super().__init__(
            first if first_norm else nn.Sequential(first[0], first[2]),  # (B, 8w, X/4, Y/4)
            double,
            _conv(8 * width, 4 * width),  # (B, 4w, X/2, Y/2)
            _conv(4 * width, 4 * width),
            _conv(4 * width, 4 * width),
            double,
            _conv(4 * width, 2 * width),  # (B, 2w, X, Y)
            _conv(2 * width, 2 * width),
            _conv(2 * width, 2 * width),
            _conv(2 * width, width),
            _out(width, out_channels, shift),
        )
        self.apply(_first_weights)


def _sizes(size: Sequence[int], halvings: int) -> list[tuple[int, int]]:
    """What each stage leaves of a slice: 184 × 144, 92 × 72, 46 × 36, 23 × 18, 12 × 9, 6 × 5, or fewer halvings."""
    sizes = [(int(size[0]), int(size[1]))]
    for stage in range(STAGES):
        x, y = sizes[-1]
        sizes.append(((x + 1) // 2, (y + 1) // 2) if stage < halvings else (x, y))
    return sizes


class StructureEncoder(nn.Module):
    """EC_f: structure maps (B, 1, X, Y) to the mean and the log-variance of their codes, (B, latent) each.

    Args:
        size: (X, Y) of the maps.
        width: channels of the first layer.
        latent: numbers of a code, 4096 in the authors' code.
        dropout: of the input's pixels.
        deviation: the standard deviation of codes before any training.
        halvings: how many of the five stages halve the map; 5 in the authors' code, for their slices. Small slices need
            fewer: of 2 × 2 pixels an instance norm leaves next to nothing of a code, and the decoder learns one map.
    """

    def __init__(
        self,
        size: Sequence[int],
        width: int = 64,
        latent: int = 4096,
        dropout: float = 0.0,
        deviation: float = 1.0,
        halvings: int = STAGES,
    ):
        super().__init__()
        x, y = _sizes(size, halvings)[-1]
        strides = [2 if stage < halvings else 1 for stage in range(STAGES)]
        self.convolutions = nn.Sequential(
            nn.Dropout(dropout),
            _conv(1, width),
            _conv(width, 2 * width, stride=strides[0]),  # (B, 2w, X/2, Y/2)
            _conv(2 * width, 2 * width),
            _conv(2 * width, 4 * width, stride=strides[1]),  # (B, 4w, X/4, Y/4)
            _conv(4 * width, 4 * width),
            _conv(4 * width, 4 * width),
            _conv(4 * width, 6 * width, stride=strides[2]),  # (B, 6w, X/8, Y/8)
            _conv(6 * width, 6 * width),
            _conv(6 * width, 8 * width, stride=strides[3]),  # (B, 8w, X/16, Y/16)
            _conv(8 * width, 8 * width),
            _conv(8 * width, 12 * width, stride=strides[4]),  # (B, 12w, X/32, Y/32)
        )
        self.mean = nn.Linear(12 * width * x * y, latent)
        self.log_variance = nn.Linear(12 * width * x * y, latent)
        self.apply(_first_weights)
        nn.init.constant_(self.log_variance.bias, 2 * math.log(deviation))

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        features = self.convolutions(maps).flatten(1)
        return self.mean(features), self.log_variance(features)


class StructureDecoder(nn.Module):
    """DC_f: codes (B, latent) to scores (B, 2, X, Y) in (0, 1) of no edge and edge. Arguments as of the encoder."""

    def __init__(self, size: Sequence[int], width: int = 64, latent: int = 4096, halvings: int = STAGES):
        super().__init__()
        sizes = _sizes(size, halvings)
        self.coarse = (12 * width, *sizes[-1])
        pixels = math.prod(sizes[-1])
        self.dense = nn.Sequential(
            nn.Linear(latent, width * pixels), nn.Hardtanh(0, 100), nn.Linear(width * pixels, 12 * width * pixels)
        )
        self.convolutions = nn.Sequential(
            nn.Hardtanh(0, 100),
            _conv(12 * width, 12 * width),  # (B, 12w, X/32, Y/32)
            nn.Upsample(size=sizes[4]),
            _conv(12 * width, 8 * width),  # (B, 8w, X/16, Y/16)
            _conv(8 * width, 8 * width),
            nn.Upsample(size=sizes[3]),
            _conv(8 * width, 6 * width),  # (B, 6w, X/8, Y/8)
            _conv(6 * width, 6 * width),
            nn.Upsample(size=sizes[2]),
            _conv(6 * width, 6 * width),  # (B, 6w, X/4, Y/4)
            _conv(6 * width, 6 * width),
            nn.Upsample(size=sizes[1]),
            _conv(6 * width, 4 * width),  # (B, 4w, X/2, Y/2)
            _conv(4 * width, 4 * width),
            _conv(4 * width, 4 * width),
            nn.Upsample(size=sizes[0]),
            _conv(4 * width, 2 * width),  # (B, 2w, X, Y)
            _conv(2 * width, 2 * width),
            _conv(2 * width, 2 * width),
            _conv(2 * width, width),
            _out(width, 2),
        )
        self.apply(_first_weights)

    def forward(self, code: Tensor) -> Tensor:
        return self.convolutions(self.dense(code).unflatten(1, self.coarse))


# ----- discriminators of patches, for least squares -------------------------------------------------------------------


def _patches(in_channels: int, *layers: tuple[int, int, int], norm: bool = True) -> list[nn.Module]:
    """Layers of (kernel, channels, stride), and a convolution to one channel without norm and activation."""
    parts: list[nn.Module] = []
    for kernel, channels, stride in layers:
        if norm:
            parts.append(_conv(in_channels, channels, kernel=kernel, stride=stride))
        else:
            convolution = nn.Conv2d(in_channels, channels, kernel, stride=stride, padding=kernel // 2)
            parts.append(nn.Sequential(convolution, nn.Hardtanh(0, 100)))
        in_channels = channels
    return [*parts, nn.Conv2d(in_channels, 1, 3, padding=1)]


class StructureDiscriminator(nn.Sequential):
    """D_f: structure maps (B, 1, X, Y) to patches (B, 1, X/16, Y/16), 1 for maps of real slices."""

    def __init__(self, width: int = 64):
        w = width
        super().__init__(*_patches(1, (5, 2 * w, 2), (3, 4 * w, 2), (3, 8 * w, 2), (3, 8 * w, 2), (3, 4 * w, 1)))
        self.apply(_first_weights)


class LatentDiscriminator(nn.Sequential):
    """FD_f: codes as square images (B, 1, s, s) to patches (B, 1, s/2, s/2), 1 for those of the normal distribution.

    Without norms: behind one it could not see how large the numbers of a code are, of which it is to judge.
    """

    def __init__(self, width: int = 64):
        w = width
        layers = (7, 2 * w, 1), (7, 2 * w, 1), (5, 2 * w, 1), (5, 4 * w, 2), (3, 4 * w, 1)
        super().__init__(*_patches(1, *layers, norm=False))
        self.apply(_first_weights)


class ImageDiscriminator(nn.Module):
    """D: images (B, 1, X, Y) to two patches (B, 1, X/16, Y/16): real or fake, and the sequence's number, regressed."""

    def __init__(self, width: int = 64):
        super().__init__()
        w = width
        self.trunk = nn.Sequential(*_patches(1, (5, w, 2), (5, w, 2), (3, 2 * w, 2), (3, 2 * w, 2))[:-1])
        self.real = nn.Sequential(*_patches(2 * w, (3, w, 1)))
        self.category = nn.Sequential(*_patches(2 * w, (3, w, 1)))
        self.apply(_first_weights)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(images)
        return self.real(features), self.category(features)


class CodeDiscriminator(nn.Sequential):
    """FD: codes (B, in_channels, x, y) to patches (B, 1, x/4, y/4), 1 for those of real images."""

    def __init__(self, in_channels: int, width: int = 64):
        super().__init__(*_patches(in_channels, (7, width, 2), (5, width, 2), (3, width, 1), (3, width, 1)))
        self.apply(_first_weights)


# ----- lesions --------------------------------------------------------------------------------------------------------


class LesionSegmentors(nn.Module):
    """Labels from every sequence by itself, in one of three schemes (section 2.7, Fig. 6).

    Args:
        sequences: how many there are.
        classes: number of classes, background included.
        width: channels of the first layer.
        scheme: ``single``, one segmentor of all sequences; ``shared_encoder``, one encoder and a decoder a sequence;
            ``multiple``, a segmentor a sequence.
        dropout: of the input's pixels.
    """

    def __init__(
        self, sequences: int, classes: int, width: int = 64, scheme: Scheme = "multiple", dropout: float = 0.0
    ):
        super().__init__()
        if scheme not in ("single", "shared_encoder", "multiple"):
            raise ValueError(f"scheme is {scheme!r}; expected single, shared_encoder or multiple")
        encoders, decoders = {"single": (1, 1), "shared_encoder": (1, sequences), "multiple": (sequences, sequences)}[
            scheme
        ]
        self.encoders = nn.ModuleList(ImageEncoder(1, width, dropout) for _ in range(encoders))
        # 1 pixel in 30 is a lesion's, which is 1 / (1 + e^3.5).
        self.decoders = nn.ModuleList(ImageDecoder(8 * width, classes, width, shift=3.5) for _ in range(decoders))

    def forward(self, images: Tensor) -> Tensor:
        """Images (C, B, 1, X, Y) of C sequences to scores (C, B, classes, X, Y) in (0, 1) of each class."""
        return _each(self.decoders, _each(self.encoders, images))


def _each(nets: nn.ModuleList, inputs: Tensor) -> Tensor:
    """A network a sequence, or one for all of them at once; (C, B, …) both."""
    if len(nets) == 1:
        return nets[0](inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2])
    return torch.stack([net(part) for net, part in zip(nets, inputs, strict=True)])
