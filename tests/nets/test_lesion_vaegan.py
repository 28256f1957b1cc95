"""Shapes of the authors' slices and of others, norms and activations as the published code has them."""

import pytest
import torch
from torch import nn

from mrgen.nets.lesion_vaegan import (
    CodeDiscriminator,
    ImageDecoder,
    ImageDiscriminator,
    ImageEncoder,
    LatentDiscriminator,
    StructureDecoder,
    StructureDiscriminator,
    StructureEncoder,
)


def test_shapes_are_those_of_the_authors_slices():
    x = torch.rand(1, 1, 184, 144)
    code = ImageEncoder(1, width=2)(x)
    assert code.shape == (1, 16, 46, 36)
    assert ImageDecoder(16 + 4, 1, width=2)(torch.cat([code, code[:, :4]], dim=1)).shape == x.shape
    assert CodeDiscriminator(16, width=2)(code).shape == (1, 1, 12, 9)
    real, category = ImageDiscriminator(width=2)(x)
    assert real.shape == category.shape == (1, 1, 12, 9)
    assert StructureDiscriminator(width=2)(x).shape == (1, 1, 12, 9)
    assert LatentDiscriminator(width=2)(torch.rand(1, 1, 64, 64)).shape == (1, 1, 32, 32)


@pytest.mark.parametrize(
    ("size", "coarse"), [((184, 144), (6, 5)), ((240, 240), (8, 8)), ((64, 64), (2, 2)), ((36, 40), (2, 2))]
)
def test_a_structure_map_comes_back_in_its_size(size: tuple[int, int], coarse: tuple[int, int]):
    encoder, decoder = StructureEncoder(size, width=2, latent=9), StructureDecoder(size, width=2, latent=9)
    assert encoder.mean.in_features == encoder.log_variance.in_features == 24 * coarse[0] * coarse[1]
    mean, log_variance = encoder(torch.rand(2, 1, *size))
    assert mean.shape == log_variance.shape == (2, 9)
    scores = decoder(mean)
    assert scores.shape == (2, 2, *size)
    assert scores.min() >= 0
    assert scores.max() <= 1


def test_widths_are_those_of_the_published_code():
    def widths(net: nn.Module) -> list[int]:
        return [layer.out_channels for layer in net.modules() if isinstance(layer, nn.Conv2d)]

    assert widths(ImageEncoder(1)) == [64, 64, 128, 256, 256, 512, 512]
    assert widths(ImageDecoder(516, 1)) == [512, 256, 256, 256, 128, 128, 128, 64, 1]
    size = (32, 32)  # small, for its dense layers
    assert widths(StructureEncoder(size, latent=4)) == [64, 128, 128, 256, 256, 256, 384, 384, 512, 512, 768]
    decoder = widths(StructureDecoder(size, latent=4))
    assert decoder == [768, 512, 512, 384, 384, 384, 384, 256, 256, 256, 128, 128, 128, 64, 2]
    assert widths(StructureDiscriminator()) == [128, 256, 512, 512, 256, 1]
    assert widths(LatentDiscriminator()) == [128, 128, 128, 256, 256, 1]
    assert widths(ImageDiscriminator()) == [64, 64, 128, 128, 64, 1, 64, 1]
    assert widths(CodeDiscriminator(512)) == [64, 64, 64, 64, 1]


@pytest.mark.parametrize(
    ("net", "last"), [(ImageDecoder(2, 3, width=2), nn.Sigmoid), (StructureDiscriminator(2), nn.Conv2d)]
)
def test_a_norm_follows_every_convolution_but_a_discriminators_last(net: nn.Module, last: type):
    layers = [layer for layer in net.modules() if not list(layer.children())]
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        if isinstance(layer, nn.Conv2d) and following is not None:
            assert isinstance(following, nn.InstanceNorm2d)
            assert following.affine
    assert isinstance(layers[-1], last)


def test_the_activation_is_a_capped_relu():
    activations = [layer for layer in ImageEncoder(1, width=2).modules() if isinstance(layer, nn.Hardtanh)]
    assert activations[0](torch.tensor([-5.0, 3.0, 400.0])).tolist() == [0, 3, 100]
