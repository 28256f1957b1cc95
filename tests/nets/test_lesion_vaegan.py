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


def test_small_slices_may_be_halved_less_often():
    encoder = StructureEncoder((64, 64), width=1, latent=9, halvings=3)
    decoder = StructureDecoder((64, 64), width=1, latent=9, halvings=3)
    assert encoder.convolutions(torch.rand(1, 1, 64, 64)).shape == (1, 12, 8, 8)
    assert decoder.coarse == (12, 8, 8)
    assert decoder(torch.zeros(1, 9)).shape == (1, 2, 64, 64)


def test_codes_begin_with_the_deviation_that_was_asked_for():
    encoder = StructureEncoder((64, 64), width=2, latent=2000, deviation=0.1)
    log_variance = encoder(torch.rand(1, 1, 64, 64))[1]
    assert log_variance.median().div(2).exp().item() == pytest.approx(0.1, rel=0.3)


def test_a_decoder_begins_where_most_pixels_are():
    torch.manual_seed(0)
    code = torch.rand(4, 16, 16, 16)
    images, classes = (ImageDecoder(16, channels, width=2)(code) for channels in (1, 3))
    assert images.mean() < 0.35
    assert (classes.argmax(dim=1) == 0).float().mean() > 0.8
    assert ImageDecoder(16, 2, width=2, shift=0)(code).mean().item() == pytest.approx(0.5, abs=0.05)


def test_only_codes_of_the_first_stage_are_judged_without_norms():
    assert not [layer for layer in LatentDiscriminator(2).modules() if isinstance(layer, nn.InstanceNorm2d)]
    patches = LatentDiscriminator(2)
    codes = torch.randn(1, 1, 16, 16)
    assert not torch.allclose(patches(codes), patches(3 * codes), atol=1e-2)  # it sees how large numbers are
