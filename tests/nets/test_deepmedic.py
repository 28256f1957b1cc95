import pytest
import torch
from torch import nn

from mrgen.nets.deepmedic import DeepMedic, PReLU

WIDTHS = (2, 2, 3, 3, 3, 3, 4, 4)


def deepmedic(**changes):
    """DeepMedic in eval mode with norms that have seen something."""
    torch.manual_seed(0)
    net = DeepMedic(2, 3, **{"widths": WIDTHS, "hidden": (5, 5), **changes})
    for norm in parts(net, nn.BatchNorm3d):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return net.eval().requires_grad_(False)


def shallow(**changes):
    return deepmedic(widths=(2, 2, 3), residual=(2,), **{"factors": (2, 3), **changes})


def parts(net, kind):
    return [module for module in net.modules() if isinstance(module, kind)]


def test_layers_are_those_of_deepmedics_default():
    with torch.device("meta"):
        net = DeepMedic(4, 4)
    assert len(net.pathways) == 3
    for pathway in net.pathways:
        convs = parts(pathway, nn.Conv3d)
        assert [conv.in_channels for conv in convs] == [4, 30, 30, 40, 40, 40, 40, 50]
        assert [conv.out_channels for conv in convs] == [30, 30, 40, 40, 40, 40, 50, 50]
        assert {(conv.kernel_size, conv.padding) for conv in convs} == {((3, 3, 3), (0, 0, 0))}
        assert len(parts(pathway, nn.BatchNorm3d)) == len(parts(pathway, nn.PReLU)) == 7  # not of the raw image
        assert pathway.residual == {4, 6, 8}
    convs = parts(net.head, nn.Conv3d)
    assert [(conv.in_channels, conv.out_channels) for conv in convs] == [(150, 250), (250, 250), (250, 4)]
    assert {conv.kernel_size for conv in convs} == {(1, 1, 1)}
    kinds = [type(layer).__name__ for layer in net.head]
    before = ["BatchNorm3d", "PReLU"]
    assert kinds == [*before, "Conv3d", *before, "Dropout", "Conv3d", *before, "Dropout", "Conv3d"]
    assert [layer.p for layer in parts(net.head, nn.Dropout)] == [0.5, 0.5]


@pytest.mark.parametrize(("factors", "margin", "grid"), [((), 8, 1), ((3,), 26, 3), ((2, 3), 26, 6), ((3, 5), 44, 15)])
def test_the_answer_is_smaller_by_the_margin(factors, margin, grid):
    net = deepmedic(factors=factors)
    assert (net.margin, net.reach, net.grid) == (margin, margin, grid)
    for size in ((1, 1, 1), (4, 2, 5)):
        assert net(torch.randn(1, 2, *(n + 2 * margin for n in size))).shape == (1, 3, *size)
    with pytest.raises(ValueError, match=f"must have {2 * margin + 1} voxels or more"):
        net(torch.randn(1, 2, 2 * margin + 1, 2 * margin, 2 * margin + 1))


def test_segments_of_37_and_45_voxels_answer_for_21_and_29():
    with torch.device("meta"):
        net = DeepMedic(4, 4)
        for segment, classified in ((37, 21), (45, 29)):
            side = classified + 2 * net.margin
            seen = [net._seen(torch.empty(1, 4, side, side, side), f, [classified] * 3).shape[-1] for f in (1, 3, 5)]
            assert seen == [segment, -(-classified // 3) + 16, -(-classified // 5) + 16]
            assert net(torch.empty(1, 4, side, side, side)).shape == (1, 4, *[classified] * 3)


@pytest.mark.parametrize("factors", [(), (3,), (2, 3), (3, 5)])
def test_an_output_voxel_sees_its_surroundings_up_to_the_margin(factors):
    """The margin is as small as it can be: the last voxel of it counts, for the first voxel of a block."""
    net = deepmedic(factors=factors)
    side = 1 + 2 * net.margin
    image = torch.randn(1, 2, side, side, side, requires_grad=True)
    net(image).square().sum().backward()
    largest = max((1, *factors))
    for axis in range(3):
        touched = image.grad[0].abs().sum(0).movedim(axis, 0).flatten(1).sum(1).nonzero()
        assert (int(touched.min()), int(touched.max())) == (net.margin - 8 * largest, side - 1)


def test_each_pathway_has_its_own_reach():
    """With all but one pathway silenced, the output depends on 17 · factor voxels along each axis."""
    for kept, factor in enumerate((1, 3, 5)):
        net = deepmedic()
        for i, pathway in enumerate(net.pathways):
            if i != kept:
                nn.init.zeros_(pathway.layers[0].weight)  # the first layer is all that sees the image
        side = 1 + 2 * net.margin
        image = torch.randn(1, 2, side, side, side, requires_grad=True)
        net(image).square().sum().backward()
        touched = image.grad[0].abs().sum(0).flatten(1).sum(1).nonzero()
        assert (int(touched.min()), int(touched.max())) == (net.margin - 8 * factor, net.margin + 9 * factor - 1)


def test_a_subsampled_pathway_sees_means():
    net = shallow(factors=(3,))
    image = torch.randn(1, 2, 27, 27, 27)  # the margin is 11
    seen = net._seen(image, 3, [5, 5, 5])
    assert seen.shape == (1, 2, 8, 8, 8)  # blocks of 3 for 5 voxels, and 3 layers on each side
    start = 11 - 3 * 3
    torch.testing.assert_close(seen[0, 1, 0, 0, 7], image[0, 1, start : start + 3, start : start + 3, -4:-1].mean())


def test_a_residual_connection_adds_the_input_of_the_layer_before():
    net = deepmedic(widths=(2, 2, 2, 3), residual=(4,), factors=())
    pathway, x = net.pathways[0], torch.randn(1, 2, 11, 11, 11)
    second = pathway.layers[1](pathway.layers[0](x))  # input of the third layer, of 2 feature maps
    expected = pathway.layers[3](pathway.layers[2](second))  # 3 feature maps
    expected[:, :2] += second[:, :, 2:-2, 2:-2, 2:-2]
    torch.testing.assert_close(pathway(x), expected)


# ----- dense ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [shallow, deepmedic])
def test_overlapping_segments_agree_on_what_both_answer(make):
    """The same weights give a voxel the same answer in segments of any size whose corners lie on one grid."""
    net = make()
    m, g, n = net.margin, net.grid, net.grid + 4
    image = torch.randn(1, 2, n + 2 * m, 3 + 2 * m, 2 + 2 * m)
    whole = net(image)  # (1, 3, n, 3, 2)
    moved = net(image[:, :, g:])  # begins a grid later
    torch.testing.assert_close(moved, whole[:, :, g:], atol=1e-5, rtol=1e-5)
    shorter = net(image[:, :, : n - 3 + 2 * m, : 1 + 2 * m])
    torch.testing.assert_close(shorter, whole[:, :, :-3, :1], atol=1e-5, rtol=1e-5)


def test_between_grid_positions_the_blocks_fall_differently():
    net, normal = shallow(), shallow(factors=())
    image = torch.randn(1, 2, *(6 + 2 * net.margin,) * 3)
    assert not torch.allclose(net(image[:, :, 1:]), net(image)[:, :, 1:], atol=1e-3)
    torch.testing.assert_close(normal(image[:, :, 1:]), normal(image)[:, :, 1:], atol=1e-5, rtol=1e-5)


def test_every_layer_learns():
    net = deepmedic(dropout=0.0).train().requires_grad_(True)
    net(torch.randn(2, 2, *(3 + 2 * net.margin,) * 3)).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


# ----- on a processor ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.channels_last_3d, torch.contiguous_format])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_prelu_is_pytorchs(layout, kind):
    torch.manual_seed(0)
    x, grad = (torch.randn(2, 5, 4, 3, 6).to(kind).to(memory_format=layout) for _ in range(2))
    x[0, 0, 0, 0] = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e4, -2.5])
    found = []
    for cls in (PReLU, nn.PReLU):
        layer, image = cls(5).to(kind), x.clone(memory_format=torch.preserve_format).requires_grad_()
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([0.25, -0.5, 1.5, 0.0, 2.0]))
        answer = layer(image)
        answer.backward(grad)
        found.append((answer, image.grad, layer.weight.grad))
    for ours, pytorchs in zip(*found, strict=True):
        torch.testing.assert_close(ours, pytorchs, rtol=2e-2 if kind is torch.bfloat16 else 1e-5, atol=1e-5)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][0].is_contiguous(memory_format=layout)


def test_the_gradient_of_prelu_is_that_of_finite_differences():
    torch.manual_seed(0)
    layer = PReLU(3).double()
    x = torch.randn(2, 3, 2, 2, 2, dtype=torch.float64).to(memory_format=torch.channels_last_3d).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(layer, {"weight": w}, (x,)), (x, layer.weight)
    )


def test_channels_last_is_the_same_network():
    net, image = deepmedic(dropout=0.0).train(), torch.randn(2, 2, *(3 + 2 * 44,) * 3)
    answers = []
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        net.to(memory_format=layout).requires_grad_(True).zero_grad()
        logits = net(image)
        logits.square().sum().backward()
        answers.append((logits.detach(), [p.grad.clone() for p in net.parameters()]))
    torch.testing.assert_close(answers[0][0], answers[1][0], rtol=1e-4, atol=1e-4)
    for contiguous, last in zip(answers[0][1], answers[1][1], strict=True):
        assert (contiguous - last).norm() <= 1e-3 * contiguous.norm() + 1e-3


@pytest.mark.parametrize("wrong", [{"factors": (1, 3)}, {"residual": (1,)}, {"residual": (9,)}])
def test_what_cannot_be_built_is_refused(wrong):
    with pytest.raises(ValueError, match="expected factors from 2 on, and layers from 2 to 8"):
        DeepMedic(2, 3, widths=WIDTHS, **wrong)
