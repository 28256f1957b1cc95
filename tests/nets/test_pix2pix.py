import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mrgen.nets.pix2pix import CONV, AdditiveUpsampling, ResNetGenerator, UNetGenerator, as_in_training, init_normal

SMALL = {2: (16, 32), 3: (16, 32, 16)}


def parts(net, kind):
    return [module for module in net.modules() if isinstance(module, kind)]


def plainly(x, mode):
    """Linear additive upsampling as it is described: upsample all channels, then add up each group of 4."""
    up = F.interpolate(x, scale_factor=2, mode=mode, align_corners=False)
    return torch.stack([up[:, i::4] for i in range(4)]).sum(0)


# ----- upsampling ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dims", "mode"), [(2, "bilinear"), (3, "trilinear")])
def test_adding_up_before_upsampling_gives_the_same_numbers(dims, mode):
    upsampling = AdditiveUpsampling(16, 5, dims=dims)
    first, second = torch.randn(2, 12, *SMALL[dims]), torch.randn(2, 4, *SMALL[dims])
    out = upsampling(first, second)
    assert out.shape == (2, 5, *(2 * n for n in SMALL[dims]))
    torch.testing.assert_close(out, upsampling.conv(plainly(torch.cat([first, second], 1), mode)), atol=1e-4, rtol=1e-4)


def test_nothing_is_upsampled_with_more_than_a_quarter_of_the_channels(monkeypatch):
    seen, interpolate = [], F.interpolate
    monkeypatch.setattr(F, "interpolate", lambda x, **kw: (seen.append(x.shape[1]), interpolate(x, **kw))[1])
    UNetGenerator(1, filters=8, downs=3)(torch.randn(1, 1, 8, 8, 8))
    assert seen == [32 // 4, 2 * 16 // 4, 2 * 8 // 4]


@pytest.mark.parametrize("make", [UNetGenerator, ResNetGenerator])
@pytest.mark.parametrize("filters", [0, 2, 6])
def test_widths_must_fall_into_groups_of_four(make, filters):
    with pytest.raises(ValueError, match="expected a multiple of 4"):
        make(1, filters=filters)


def test_a_convolution_to_one_channel_is_pytorchs_with_its_gradients():
    for settings in ({"kernel_size": 3, "padding": 1}, {"kernel_size": 7, "padding": 3, "padding_mode": "reflect"}):
        ours, theirs = CONV[3](4, 1, **settings), nn.Conv3d(4, 1, **settings)
        theirs.load_state_dict(ours.state_dict())
        image = torch.randn(2, 4, 6, 5, 8)
        results = []
        for conv in (ours, theirs):
            x = image.clone().requires_grad_()
            out = conv(x)
            out.square().sum().backward()
            results.append((out, x.grad, conv.weight.grad, conv.bias.grad))
        for own, reference in zip(*results, strict=True):
            torch.testing.assert_close(own, reference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_four_add_up_neighbouring_channels(dtype):
    upsampling, x = (
        AdditiveUpsampling(8, 4),
        torch.arange(8.0, dtype=dtype).reshape(1, 8, 1, 1, 1).expand(1, 8, 2, 3, 4),
    )
    sums = upsampling._sums_of_four(x)
    assert (sums.shape, sums.dtype) == ((1, 2, 2, 3, 4), dtype)
    assert torch.equal(sums[0, :, 1, 2, 3].float(), torch.tensor([0.0 + 1 + 2 + 3, 4 + 5 + 6 + 7]))


# ----- UNet ----------------------------------------------------------------------------------------------------------


def test_unet_128_has_the_widths_norms_and_dropouts_of_the_paper():
    with torch.device("meta"):
        net = UNetGenerator(1)
        convs = [parts(level, nn.Conv3d)[0] for level in net.down]
        assert [conv.out_channels for conv in convs] == [64, 128, 256, 512, 512, 512, 512]
        assert {(conv.kernel_size, conv.stride, conv.padding) for conv in convs} == {((4,) * 3, (2,) * 3, (1,) * 3)}
        assert [len(parts(level, nn.BatchNorm3d)) for level in net.down] == [0, 1, 1, 1, 1, 1, 0]
        assert [len(parts(level, nn.LeakyReLU)) for level in net.down] == [0, 1, 1, 1, 1, 1, 1]
        assert {layer.negative_slope for layer in parts(net, nn.LeakyReLU)} == {0.2}
        ups = [parts(level, nn.Conv3d)[0] for level in net.up]
        # A quarter of what comes from below and of the skip; the innermost has no skip.
        assert [conv.in_channels for conv in ups] == [128, 256, 256, 256, 128, 64, 32]
        assert [conv.out_channels for conv in ups] == [512, 512, 512, 256, 128, 64, 1]
        assert [len(parts(level, nn.BatchNorm3d)) for level in net.up] == [1, 1, 1, 1, 1, 1, 0]
        assert [[layer.p for layer in parts(level, nn.Dropout)] for level in net.up] == [
            [],
            [0.5],
            [0.5],
            [],
            [],
            [],
            [],
        ]
        assert [layer.bias is not None for layer in (*convs, *ups)] == [False] * 13 + [True]
        assert net.divisor == 128
        assert net(torch.empty(1, 1, 128, 128, 128)).shape == (1, 1, 128, 128, 128)
        assert net(torch.empty(1, 1, 256, 128, 256)).shape == (1, 1, 256, 128, 256)


@pytest.mark.parametrize("downs", [2, 4, 6])
@pytest.mark.parametrize("dims", [2, 3])
def test_unet_answers_as_a_plain_reading_of_it_does(dims, downs):
    torch.manual_seed(0)
    net = UNetGenerator(2, 3, dims=dims, filters=4, downs=downs, dropout=0.0).train()
    image = torch.randn(1, 2, *(2**downs,) * (dims - 1), 2 ** (downs + 1))

    def down(level, x):
        block = net.down[level]
        for layer in block:
            x = F.leaky_relu(x, 0.2) if isinstance(layer, nn.LeakyReLU) else layer(x)
        return x

    def block(level, x):
        """A level and all below it, the skip concatenated to what comes back."""
        below = down(level, x)
        if level < downs - 1:
            below = torch.cat([below, block(level + 1, below)], dim=1)
        up = net.up[downs - 1 - level]
        mode = {2: "bilinear", 3: "trilinear"}[dims]
        return up.after(up.upsampling.conv(plainly(F.relu(below), mode)))

    with torch.no_grad():
        torch.testing.assert_close(net(image), torch.tanh(block(0, image)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("downs", "drops"), [(5, 0), (6, 1), (7, 2), (8, 3)])
def test_dropout_stands_between_the_levels_of_full_width(downs, drops):
    with torch.device("meta"):
        assert len(parts(UNetGenerator(1, filters=4, downs=downs), nn.Dropout)) == drops
        assert not parts(UNetGenerator(1, filters=4, downs=downs, dropout=0.0), nn.Dropout)


def test_every_layer_of_the_unet_learns():
    net = UNetGenerator(1, filters=4, downs=4)
    net(torch.randn(1, 1, 16, 16, 16)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in net.parameters())


def test_the_unet_answers_the_same_without_gradients_and_leaves_its_input_alone():
    net, image = UNetGenerator(1, filters=4, downs=4), torch.randn(1, 1, 16, 16, 16)
    before = image.clone()
    with torch.no_grad():
        first, again = net(image), net(image)  # there the ReLUs are in place
    assert torch.equal(image, before)
    assert torch.equal(first, again)
    torch.testing.assert_close(first, net(image).detach())


@pytest.mark.parametrize("size", [(12, 16, 16), (16, 16, 20)])
def test_an_axis_that_does_not_halve_so_often_is_refused(size):
    with pytest.raises(ValueError, match="divisible by 8"):
        UNetGenerator(1, filters=4, downs=3)(torch.randn(1, 1, *size))
    with pytest.raises(ValueError, match="divisible by 4"):
        ResNetGenerator(1, filters=4, blocks=1)(torch.randn(1, 1, *size[:2], 6))
    with pytest.raises(ValueError, match=r"downs is .*; expected 2 to 10"):
        UNetGenerator(1, downs=1)


# ----- ResNet --------------------------------------------------------------------------------------------------------


def test_the_resnet_has_the_widths_norms_and_dropouts_of_the_paper():
    with torch.device("meta"):
        net = ResNetGenerator(1)
        convs = parts(net, nn.Conv3d)
        assert [conv.out_channels for conv in convs] == [64, 128, 256, *[256] * 12, 128, 64, 1]
        assert [conv.in_channels for conv in convs] == [1, 64, 128, *[256] * 12, 64, 32, 64]
        assert [conv.kernel_size[0] for conv in convs] == [7, *[3] * 16, 7]
        assert [conv.stride[0] for conv in convs] == [1, 2, 2, *[1] * 15]
        reflected = [conv.padding_mode == "reflect" for conv in convs]
        assert reflected == [True, False, False, *[True] * 12, False, False, True]
        assert [conv.bias is not None for conv in convs] == [False] * 17 + [True]
        assert len(parts(net, nn.BatchNorm3d)) == len(convs) - 1  # none after the last
        assert [layer.p for layer in parts(net, nn.Dropout)] == [0.5] * 6
        assert net.divisor == 4
        assert net(torch.empty(1, 1, 24, 20, 156)).shape == (1, 1, 24, 20, 156)


@pytest.mark.parametrize("dims", [2, 3])
def test_a_block_whose_second_norm_is_0_passes_its_input_on(dims):
    net = ResNetGenerator(2, 3, dims=dims, filters=4, blocks=2)
    image = torch.randn(1, 2, *SMALL[dims])
    out = net(image)
    assert out.shape == (1, 3, *SMALL[dims])
    block = net.body[9]
    nn.init.zeros_(block.body[-1].weight)
    nn.init.zeros_(block.body[-1].bias)
    x = torch.randn(1, 16, *(8,) * dims)
    assert torch.equal(block(x), x)


# ----- both ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [UNetGenerator, ResNetGenerator])
def test_answers_lie_between_minus_1_and_1(make):
    net = make(1, filters=4, **({"downs": 3} if make is UNetGenerator else {"blocks": 1}))
    out = net(100 * torch.randn(2, 1, 8, 8, 8))
    assert out.abs().max() <= 1
    assert out.std() > 0


def test_first_weights_are_pix2pixs():
    torch.manual_seed(0)
    net = ResNetGenerator(1, filters=8, blocks=2).apply(init_normal).requires_grad_(False)
    for conv in parts(net, nn.Conv3d)[2:-1]:
        assert float(conv.weight.std()) == pytest.approx(0.02, rel=0.1)
        assert abs(float(conv.weight.mean())) < 0.001
    assert not parts(net, nn.Conv3d)[-1].bias.any()
    weights = torch.cat([norm.weight for norm in parts(net, nn.BatchNorm3d)])
    assert float(weights.mean()) == pytest.approx(1, abs=0.01)
    assert float(weights.std()) == pytest.approx(0.02, rel=0.3)
    assert not any(norm.bias.any() for norm in parts(net, nn.BatchNorm3d))


@pytest.mark.parametrize("dropout", [True, False])
@pytest.mark.parametrize("batch_statistics", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_as_in_training_draws_and_normalises_as_asked_and_leaves_no_trace(dropout, batch_statistics, training):
    torch.manual_seed(0)
    net = ResNetGenerator(1, filters=4, blocks=1).train()
    net(torch.randn(2, 1, 8, 8, 8))  # running statistics of something
    net.train(training)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    image = 5 + torch.randn(1, 1, 8, 8, 8)
    with torch.no_grad(), as_in_training(net, dropout=dropout, batch_statistics=batch_statistics):
        first, second = net(image), net(image)
        scaled = net.body[:2](3 * image), net.body[:2](image)  # convolution and norm
    assert torch.equal(first, second) != dropout
    assert torch.allclose(*scaled, atol=1e-3) == batch_statistics
    assert {module.training for module in net.modules()} == {training}
    assert all(norm.track_running_stats for norm in parts(net, nn.BatchNorm3d))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
