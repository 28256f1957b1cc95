import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mrgen.nets.li_unet import LiUNet

# Kernel, input and output channels of Li's network of two images, in the order of computation.
CONVOLUTIONS = [
    *[(5, 2, 64), (5, 64, 64)],
    *[(3, 64, 96), (3, 96, 96)],
    *[(3, 96, 128), (3, 128, 128)],
    *[(3, 128, 256), (4, 256, 256)],
    *[(3, 256, 512), (3, 512, 512)],
    *[(3, 512 + 256, 256), (3, 256, 256)],
    *[(3, 256 + 128, 128), (3, 128, 128)],
    *[(3, 128 + 96, 96), (3, 96, 96)],
    *[(3, 96 + 64, 64), (3, 64, 64)],
]
DIRAC = torch.zeros(1, 1, 9, 9)
DIRAC[..., 4, 4] = 1


def network(in_channels=1, width=2):
    torch.manual_seed(0)
    return LiUNet(in_channels, width=width)


def seen(net, module, *inputs):
    """What a part of the network was given and what it answered."""
    calls = []
    hook = module.register_forward_hook(lambda _, given, answer: calls.append((given[0], answer)))
    net(*inputs)
    hook.remove()
    ((given, answer),) = calls
    return given, answer


def convolutions(net):
    return [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]


# ----- the paper's network -----------------------------------------------------------------------------------------


def test_kernels_and_widths_are_those_of_li():
    with torch.device("meta"):
        *layers, last = convolutions(LiUNet(2, width=64))
    assert [(layer.kernel_size[0], layer.in_channels, layer.out_channels) for layer in layers] == CONVOLUTIONS
    assert all(layer.kernel_size[0] == layer.kernel_size[1] for layer in layers)
    assert (last.kernel_size, last.in_channels, last.out_channels) == ((1, 1), 64, 1)


def test_parameters_by_hand():
    by_hand = sum(k * k * given * made + 2 * made for k, given, made in CONVOLUTIONS)  # batch norm: scale and shift
    by_hand += 64 + 1  # the last convolution alone has a bias, which a batch norm would take back
    with torch.device("meta"):
        both, one = LiUNet(2, width=64), LiUNet(1, width=64)
    assert sum(p.numel() for p in both.parameters()) == by_hand == 8_745_409
    assert by_hand - sum(p.numel() for p in one.parameters()) == 5 * 5 * 64  # G has one input channel


def test_every_convolution_but_the_last_is_followed_by_batch_norm_and_relu():
    layers = [m for m in network().modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.ReLU)]
    assert [type(layer) for layer in layers] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 18 + [nn.Conv2d]


def test_batch_norm_comes_before_relu():
    """The other way round its answers had mean 0, and half of them were negative."""
    net, images = network().train(), torch.randn(2, 1, 32, 32)
    normalised, answer = (seen(net, net.down[0][0][i], images)[1] for i in (2, 3))
    answer, normalised = answer.detach(), F.relu(normalised.detach())
    assert torch.equal(answer, normalised)
    given = seen(net, net.down[0][0][2], images)[0]
    expected = (given - given.mean((0, 2, 3), keepdim=True)) / (given.var((0, 2, 3), False, True) + 1e-5).sqrt()
    torch.testing.assert_close(answer, F.relu(expected), atol=1e-5, rtol=1e-5)


# ----- the 4 × 4 convolution ---------------------------------------------------------------------------------------


def four(net):
    """Zero padding and convolution of the second block of the fourth level, without batch norm and ReLU."""
    return net.down[3][1][:2]


def test_the_even_kernel_sees_one_pixel_before_and_two_after():
    """'same' of TensorFlow. A pixel that is seen one before and two after answers from two before to one after."""
    layer = four(network())
    conv = nn.Conv2d(1, 1, 4, bias=False)
    nn.init.ones_(conv.weight)
    answered = conv(layer[0](DIRAC))[0, 0]
    assert answered.shape == (9, 9)
    assert answered.nonzero().tolist() == [[x, y] for x in range(2, 6) for y in range(2, 6)]  # the impulse is at 4, 4


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_the_even_convolution_is_torchs_own_same():
    layer = four(network())
    images = torch.randn(2, layer[1].in_channels, 12, 7)
    torch.testing.assert_close(layer(images), F.conv2d(images, layer[1].weight, padding="same"))


def test_the_odd_ones_are_centred():
    net = network()
    for block, reach in ((net.down[0][0], 2), (net.down[1][0], 1)):
        conv = block[:2]
        nn.init.ones_(conv[1].weight)
        answered = conv(DIRAC.expand(1, conv[1].in_channels, 9, 9))[0, 0].nonzero()
        assert (answered.amin(0).tolist(), answered.amax(0).tolist()) == ([4 - reach] * 2, [4 + reach] * 2)


# ----- sizes -------------------------------------------------------------------------------------------------------


def test_levels_of_200_pixels_are_odd_below():
    net = network().eval()
    image = torch.randn(1, 1, 200, 200)
    assert [seen(net, level, image)[1].shape[2] for level in net.down] == [200, 100, 50, 25, 12]
    assert [seen(net, level, image)[1].shape[2] for level in net.up] == [24, 48, 96, 192]


def test_the_way_up_joins_each_level_with_what_the_way_down_had_there_cropped():
    net = network().eval()
    image = torch.randn(1, 1, 200, 200)
    below = seen(net, net.down[4], image)[1]
    for up, down, lost in zip(net.up, reversed(net.down[:4]), (1, 2, 4, 8), strict=True):
        joined, (_, skip) = seen(net, up, image)[0], seen(net, down, image)
        start = lost // 2  # an odd pixel is lost at the end
        end = skip.shape[2] - (lost - start)
        assert torch.equal(joined[:, : below.shape[1]], below.repeat_interleave(2, 2).repeat_interleave(2, 3))
        assert torch.equal(joined[:, below.shape[1] :], skip[:, :, start:end, start:end])
        below = seen(net, up, image)[1]


@pytest.mark.parametrize("size", [(16, 16), (17, 31), (32, 48), (100, 100), (132, 83)])
def test_any_size_from_16_on_keeps_its_size(size):
    net = network(2).eval()
    assert net(torch.randn(3, 2, *size)).shape == (3, 1, *size)


def test_16_is_the_smallest():
    net = network().eval()
    assert net.smallest == 16
    assert seen(net, net.down[4], torch.randn(1, 1, 16, 16))[1].shape[2:] == (1, 1)
    for size in ((15, 64), (64, 15)):
        with pytest.raises(RuntimeError):
            net(torch.randn(1, 1, *size))


def test_the_border_of_200_pixels_answers_as_its_nearest_neighbour_inside():
    """192 pixels come up. Zeros there, as of Li, would give all of the border one answer."""
    net = network().eval()
    answer = net(torch.randn(1, 1, 200, 200))[0, 0]
    nearest = torch.arange(200).clamp(4, 195)
    assert torch.equal(answer, answer[nearest][:, nearest])
    assert len(answer[:4].unique()) > 100


def test_the_odd_pixel_of_the_border_is_at_the_end():
    net = network().eval()
    answer = net(torch.randn(1, 1, 35, 48))[0, 0]  # 32 and 48 come up
    assert torch.equal(answer[:1], answer[1:2])
    assert torch.equal(answer[33:], answer[32:33].expand(2, 48))
    assert not torch.equal(answer[31], answer[32])


def test_multiples_of_16_have_no_border():
    net = network().eval()
    image = torch.randn(1, 1, 48, 64)
    assert torch.equal(net(image), seen(net, net.last, image)[1])


# ----- the rest ----------------------------------------------------------------------------------------------------


def test_the_answer_is_linear_so_that_who_uses_it_chooses_the_end():
    net = network().eval()
    nn.init.zeros_(net.last.weight)
    nn.init.constant_(net.last.bias, -3)
    assert (net(torch.randn(1, 1, 16, 16)) == -3).all()


def test_widths_keep_lis_proportions():
    assert [level[1][1].out_channels for level in network(width=8).down] == [8, 12, 16, 32, 64]


@pytest.mark.parametrize("width", [0, 1, 7])
def test_a_width_that_has_no_half_is_refused(width):
    with pytest.raises(ValueError, match=f"width is {width}; expected a multiple of 2 from 2 on"):
        LiUNet(1, width=width)


def test_every_weight_gets_a_gradient():
    net = network(2)
    net(torch.randn(2, 2, 40, 50)).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())
