import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mrgen.nets.samr import LabelWiseDiscriminators, SAMRGenerator, SegmentationUNet2d


def parts(net, *kinds):
    return [module for module in net.modules() if isinstance(module, kinds)]


def count(net):
    return sum(weight.numel() for weight in net.parameters())


def one_hot(shape=(2, 5, 16, 16)):
    """Label maps of pixels drawn at random."""
    return F.one_hot(torch.randint(shape[1], (shape[0], *shape[2:])), shape[1]).movedim(-1, 1).float()


def narrow(**settings):
    return SAMRGenerator(
        **{"labels": 5, "sequences": 3, "atlas_channels": 9, "filters": 2, "downs": 2, "blocks": 2} | settings
    )


# ----- generator -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("downs", "size"), [(5, 256), (5, 64), (3, 64)])
def test_slices_of_every_sequence_come_out(downs, size):
    with torch.device("meta"):
        net = SAMRGenerator(labels=5, sequences=5, atlas_channels=15, downs=downs)
        assert net.divisor == 2**downs
        assert net(torch.empty(8, 5, size, size), torch.empty(8, 15, size, size)).shape == (8, 5, size, size)
        brats = SAMRGenerator(labels=4, sequences=2, atlas_channels=6, downs=downs)
        assert brats(torch.empty(1, 4, size, 2 * size), torch.empty(1, 6, size, 2 * size)).shape == (
            1,
            2,
            size,
            2 * size,
        )


def by_hand(*, labels, sequences, atlas, filters, cap, downs, blocks, stretch_out):
    """The number of weights of the generator, with two a channel in every norm."""

    def encoder(channels):
        return channels * w[0] * 49 + 2 * w[0] + sum(w[i] * w[i + 1] * 9 + 2 * w[i + 1] for i in range(downs))

    w = [min(filters * 2**i, cap) for i in range(downs + 1)]
    v = [(2 if atlas else 1) * width for width in w]
    block = 2 * (v[-1] ** 2 * 9 + 2 * v[-1])
    up = block + sum(v[i + 1] * v[i] * 9 + 2 * v[i] for i in range(downs))
    last = v[0] * 49 + 1  # for each sequence
    encoders = encoder(labels) + (encoder(atlas) if atlas else 0)
    return encoders + blocks * block + (sequences if stretch_out else 1) * up + sequences * last


@pytest.mark.parametrize("downs", [5, 3])
@pytest.mark.parametrize("stretch_out", [True, False])
@pytest.mark.parametrize("atlas", [15, 0])
@pytest.mark.parametrize(("filters", "cap"), [(8, 512), (32, 64)])
def test_it_has_as_many_weights_as_counted_by_hand(downs, stretch_out, atlas, filters, cap):
    widths = {"filters": filters, "cap": cap, "downs": downs, "blocks": 9, "stretch_out": stretch_out}
    with torch.device("meta"):
        net = SAMRGenerator(labels=5, sequences=5, atlas_channels=atlas, **widths)
    assert count(net) == by_hand(labels=5, sequences=5, atlas=atlas, **widths)


def test_the_defaults_have_seventy_five_million_weights_and_a_fourth_of_them_without_atlas():
    with torch.device("meta"):
        assert count(SAMRGenerator(labels=5, sequences=5, atlas_channels=15)) == 74_750_005
        assert count(SAMRGenerator(labels=5, sequences=5, atlas_channels=0)) == 18_893_813


def test_encoders_and_decoders_mirror_each_other():
    net = narrow(filters=4, cap=16, downs=3)
    for encoder, channels in ((net.mask_encoder, 5), (net.atlas_encoder, 9)):
        convs = parts(encoder, nn.Conv2d)
        assert [conv.in_channels for conv in convs] == [channels, 4, 8, 16]
        assert [conv.out_channels for conv in convs] == [4, 8, 16, 16]  # the cap
        assert [(conv.kernel_size[0], conv.stride[0]) for conv in convs] == [(7, 1)] + [(3, 2)] * 3
        assert [len(parts(encoder, kind)) for kind in (nn.BatchNorm2d, nn.ReLU)] == [4, 4]
    assert [conv.out_channels for conv in parts(net.blocks, nn.Conv2d)] == [32] * 4
    for decoder in net.decoders:
        ups = parts(decoder, nn.ConvTranspose2d)
        assert [up.in_channels for up in ups] == [32, 32, 16]
        assert [up.out_channels for up in ups] == [32, 16, 8]
        assert [conv.out_channels for conv in parts(decoder, nn.Conv2d)] == [32, 32, 1]  # residual block, last layer
        assert isinstance(decoder[-1], nn.Tanh)
        assert not isinstance(decoder[-2], nn.BatchNorm2d)


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_it_answers_as_a_plain_reading_of_it_does(norm):
    torch.manual_seed(0)
    net = narrow(norm=norm)
    label_map, atlas = one_hot(), torch.randn(2, 9, 16, 16)

    def standardised(x):  # at their first weights norms are nearly the identity; here they are made so
        axes = (0, 2, 3) if norm == "batch" else (2, 3)
        return (x - x.mean(axes, keepdim=True)) / (x.var(axes, keepdim=True, unbiased=False) + 1e-5).sqrt()

    def reflected(x, conv):
        p = conv.kernel_size[0] // 2
        return F.conv2d(F.pad(x, (p, p, p, p), mode="reflect"), conv.weight, conv.bias)

    def encoded(x, encoder):
        first, *rest = parts(encoder, nn.Conv2d)
        x = standardised(reflected(x, first)).relu()
        for conv in rest:
            x = standardised(F.conv2d(x, conv.weight, stride=2, padding=1)).relu()
        return x

    def block(x, convs):
        return x + standardised(reflected(standardised(reflected(x, convs[0])).relu(), convs[1]))

    for layer in parts(net, nn.BatchNorm2d):
        nn.init.ones_(layer.weight)
    with torch.no_grad():
        x = torch.cat([encoded(label_map, net.mask_encoder), encoded(atlas, net.atlas_encoder)], dim=1)
        convs = parts(net.blocks, nn.Conv2d)
        x = block(block(x, convs[:2]), convs[2:])
        images = []
        for decoder in net.decoders:
            *inner, last = parts(decoder, nn.Conv2d)
            y = block(x, inner)
            for up in parts(decoder, nn.ConvTranspose2d):
                y = standardised(F.conv_transpose2d(y, up.weight, stride=2, padding=1, output_padding=1)).relu()
            images.append(reflected(y, last).tanh())
        torch.testing.assert_close(net(label_map, atlas), torch.cat(images, 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stretch_out", [True, False])
@pytest.mark.parametrize("atlas_channels", [9, 0])
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_every_weight_of_every_ablation_learns(stretch_out, atlas_channels, norm):
    net = narrow(stretch_out=stretch_out, atlas_channels=atlas_channels, norm=norm)
    atlas = torch.randn(2, atlas_channels, 16, 16) if atlas_channels else None
    images = net(one_hot(), atlas)
    assert images.shape == (2, 3, 16, 16)
    assert images.detach().abs().max() <= 1
    (images * torch.randn_like(images)).sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in net.parameters())


def test_each_sequence_has_a_branch_of_its_own():
    net = narrow()
    assert len(net.decoders) == 3
    net(one_hot(), torch.randn(2, 9, 16, 16))[:, 1].square().sum().backward()
    assert [bool(decoder[-2].weight.grad.any()) for decoder in net.decoders] == [False, True, False]
    assert len(narrow(stretch_out=False).decoders) == 1


def test_label_map_and_atlas_decide_and_are_left_as_they_are():
    net = narrow().eval()
    label_map, atlas = one_hot(), torch.randn(2, 9, 16, 16)
    before = label_map.clone(), atlas.clone()
    images = net(label_map, atlas)
    assert torch.equal(label_map, before[0])
    assert torch.equal(atlas, before[1])
    assert torch.equal(net(label_map, atlas), images)
    assert not torch.equal(net(label_map.flip(2), atlas), images)
    assert not torch.equal(net(label_map, atlas.flip(2)), images)


def test_generator_says_what_does_not_fit():
    with pytest.raises(ValueError, match=r"divisible by 4 and at least 8, got \(16, 18\)"):
        narrow()(one_hot((1, 5, 16, 18)), torch.empty(1, 9, 16, 18))
    with pytest.raises(ValueError, match=r"divisible by 4 and at least 8, got \(4, 8\)"):  # nothing to reflect
        narrow()(one_hot((1, 5, 4, 8)), torch.empty(1, 9, 4, 8))
    assert narrow()(one_hot((1, 5, 8, 8)), torch.zeros(1, 9, 8, 8)).isfinite().all()
    with pytest.raises(ValueError, match="built with an atlas, got none"):
        narrow()(one_hot())
    with pytest.raises(ValueError, match="built without an atlas, got one of 9 channels"):
        narrow(atlas_channels=0)(one_hot(), torch.empty(2, 9, 16, 16))
    with pytest.raises(ValueError, match="norm is 'layer'; expected one of batch, instance"):
        narrow(norm="layer")
    with pytest.raises(ValueError, match="downs is 0; expected 1 to 10"):
        narrow(downs=0)


# ----- segmentation --------------------------------------------------------------------------------------------------


def test_unet_has_the_widths_and_norms_of_pix2pix():
    with torch.device("meta"):
        net = SegmentationUNet2d(5, 4)
        downs, ups = parts(net.down, nn.Conv2d), parts(net.up, nn.ConvTranspose2d)
        assert [conv.out_channels for conv in downs] == [64, 128, 256, 512, 512]
        assert [conv.in_channels for conv in ups] == [512, 1024, 512, 256, 128]
        assert [conv.out_channels for conv in ups] == [512, 256, 128, 64, 4]
        assert {(conv.kernel_size[0], conv.stride[0], conv.padding[0]) for conv in (*downs, *ups)} == {(4, 2, 1)}
        assert [len(parts(block, nn.BatchNorm2d)) for block in (*net.down, *net.up)] == [0, 1, 1, 1, 0, 1, 1, 1, 1, 0]
        assert [conv.bias is not None for conv in (*downs, *ups)] == [False] * 9 + [True]
        assert net(torch.empty(2, 5, 256, 192)).shape == (2, 4, 256, 192)
        assert net.divisor == 32
        biased = SegmentationUNet2d(5, 4, norm="instance")
        assert all(conv.bias is not None for conv in parts(biased, nn.Conv2d, nn.ConvTranspose2d))


@pytest.mark.parametrize("downs", [2, 3, 5])
def test_unet_answers_as_a_plain_reading_of_it_does(downs):
    torch.manual_seed(0)
    net = SegmentationUNet2d(2, 3, filters=2, downs=downs)
    image = torch.randn(2, 2, 32, 64)

    def block(level, x):
        """A level and all below it, the skip concatenated to what comes back."""
        x = nn.Sequential(*(net.down[level]))(x)
        if level < downs - 1:
            x = torch.cat([x, block(level + 1, x)], dim=1)
        return net.up[downs - 1 - level](x.clone())

    with torch.no_grad():
        torch.testing.assert_close(net(image), block(0, image))


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_every_weight_of_the_unet_learns_and_logits_come_out(norm):
    net = SegmentationUNet2d(2, 3, filters=2, downs=3, norm=norm)
    logits = net(torch.randn(2, 2, 16, 24))
    assert not torch.allclose(logits.sum(1), torch.ones(2, 16, 24))  # no probabilities
    (logits * torch.randn_like(logits)).sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in net.parameters())


def test_unet_says_what_does_not_fit():
    with pytest.raises(ValueError, match=r"divisible by 32, got \(64, 48\)"):
        SegmentationUNet2d(1, 2, filters=2)(torch.empty(1, 1, 64, 48))
    with pytest.raises(ValueError, match="downs is 1; expected 2 to 10"):
        SegmentationUNet2d(1, 2, downs=1)
    assert SegmentationUNet2d(1, 2, filters=2)(torch.randn(1, 1, 32, 32)).isfinite().all()  # 1 × 1 innermost


# ----- first weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: narrow(filters=16),
        lambda: LabelWiseDiscriminators(in_channels=4, filters=16),
        lambda: SegmentationUNet2d(2, 3, filters=16, downs=3),
    ],
)
def test_first_weights_are_drawn_around_nought_and_norms_around_one(make):
    torch.manual_seed(0)
    net = make()
    for mean, layers in ((0, parts(net, nn.Conv2d, nn.ConvTranspose2d)), (1, parts(net, nn.BatchNorm2d))):
        weights = torch.cat([layer.weight.detach().flatten() for layer in layers])
        assert float(weights.mean()) == pytest.approx(mean, abs=4 * 0.02 / math.sqrt(len(weights)))
        assert float(weights.std()) == pytest.approx(0.02, rel=4 / math.sqrt(len(weights)))
        assert all(layer.bias is None or not layer.bias.any() for layer in layers)
