import pytest
import torch
from torch import nn

from mrgen.nets.blocks import ConvBlock3d
from mrgen.nets.unet3d import RegressionBlock, SegmentationBlock, SegmentationUNet3d, UNet3d


def dropouts(net):
    return [module for module in net.modules() if isinstance(module, nn.Dropout)]


@pytest.mark.parametrize(("levels", "divisor"), [(2, 2), (3, 4), (4, 8)])
def test_features_have_the_resolution_of_the_input(levels, divisor):
    net = UNet3d(3, filters=2, levels=levels)
    assert (net.divisor, net.out_channels) == (divisor, 2)
    size = (2 * divisor, 3 * divisor, 2 * divisor)
    assert net(torch.rand(2, 3, *size)).shape == (2, 2, *size)


def test_widths_double_from_level_to_level():
    net = UNet3d(3, filters=2, levels=4)
    assert [block[0][0].out_channels for block in net.down] == [2, 4, 8, 16]
    assert [block[0][0].in_channels for block in net.down] == [3, 2, 4, 8]


@pytest.mark.parametrize("size", [(12, 16, 16), (16, 12, 16), (16, 16, 12)])
def test_an_axis_that_pooling_would_cut_is_refused(size):
    with pytest.raises(ValueError, match="divisible by 8"):
        UNet3d(1, filters=2)(torch.rand(1, 1, *size))


@pytest.mark.parametrize("levels", [1, 9, 40])
def test_one_level_is_no_unet_and_forty_are_refused_before_they_are_built(levels: int):
    with pytest.raises(ValueError, match=f"levels is {levels}; expected 2 to 8"):
        UNet3d(1, levels=levels)


def test_every_level_and_every_skip_reaches_the_output():
    net = UNet3d(1, filters=2, levels=3, dropout=0.0)
    net(torch.rand(1, 1, 8, 8, 8)).square().sum().backward()
    for name, parameter in net.named_parameters():
        if name.endswith("bias") and name.startswith("up"):
            continue  # an instance norm follows: its mean takes most of a bias back
        assert parameter.grad.abs().sum() > 0, name
    # A skip is full resolution: a single voxel of the input moves its neighbourhood of the output even when the way
    # through the coarse levels is cut.
    net.eval()
    for up in net.up:
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
    image = torch.rand(1, 1, 8, 8, 8)
    assert net(image).std() > 0


def test_dropout_follows_every_level_and_is_gone_at_0():
    assert {layer.p for layer in dropouts(UNet3d(1, filters=2, levels=3, dropout=0.2))} == {0.2}
    assert len(dropouts(RegressionBlock(4))) == len(dropouts(SegmentationBlock(4, 4))) == 1
    net, image = UNet3d(1, filters=2, levels=3, dropout=0.2), torch.rand(1, 1, 8, 8, 8)
    calls = []
    net.dropout.register_forward_hook(lambda *_: calls.append(1))
    assert not torch.equal(net(image), net(image))
    assert len(calls) == 2 * 5  # 3 levels down, 2 up
    net = UNet3d(1, filters=2, levels=3, dropout=0.0)
    assert torch.equal(net(image), net(image))


def test_nothing_is_dropped_before_the_head():
    net, image = UNet3d(1, filters=2, levels=2, dropout=0.5), torch.rand(1, 1, 4, 4, 4)
    assert torch.equal(net.stem(image), net.stem(image))
    net.eval()
    assert torch.equal(net.head(net.stem(image)), net(image))


def test_a_block_normalises_each_subject_by_itself():
    block, image = ConvBlock3d(1, 3).eval(), torch.rand(2, 1, 6, 6, 6)
    torch.testing.assert_close(block(image)[:1], block(image[:1]))
    torch.testing.assert_close(block(5 * image), block(image), atol=1e-3, rtol=1e-3)


def test_regression_block_takes_the_extra_mri_or_none():
    latent, extra = torch.rand(1, 4, 6, 6, 6), torch.rand(1, 1, 6, 6, 6)
    assert RegressionBlock(4)(latent, extra).shape == (1, 1, 6, 6, 6)
    without = RegressionBlock(4, extra_channels=0)
    assert without(latent).shape == (1, 1, 6, 6, 6)
    assert without.body[0][0].in_channels == 4
    assert RegressionBlock(1)(latent[:, :1], extra).shape == (1, 1, 6, 6, 6)  # half of one channel is one
    with pytest.raises(RuntimeError):
        RegressionBlock(4)(latent)


def test_regression_is_linear_at_the_end():
    # z-scored targets are not confined to [0, 1] or [−1, 1]
    block = RegressionBlock(4)
    assert isinstance(block.body[-1], nn.Conv3d)
    with torch.no_grad():
        block.body[-1].bias += 100
    assert block(torch.rand(1, 4, 6, 6, 6), torch.rand(1, 1, 6, 6, 6)).mean() > 50


def test_segmentation_unet_gives_logits_of_every_class():
    net = SegmentationUNet3d(4, 3, filters=2, levels=3)
    assert net.divisor == 4
    logits = net(torch.rand(1, 4, 8, 8, 12))
    assert logits.shape == (1, 3, 8, 8, 12)
    assert not torch.allclose(logits.sum(dim=1), torch.ones(1, 8, 8, 12))  # logits, the softmax is the loss's
