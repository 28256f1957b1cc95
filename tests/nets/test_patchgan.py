import pytest
import torch
from torch import nn

from mrgen.nets.patchgan import PatchGAN


def parts(net, kind):
    return [module for module in net.modules() if isinstance(module, kind)]


@pytest.mark.parametrize(("dims", "conv", "norm"), [(2, nn.Conv2d, nn.BatchNorm2d), (3, nn.Conv3d, nn.BatchNorm3d)])
def test_layers_are_those_of_the_paper(dims, conv, norm):
    net = PatchGAN(2, dims=dims)
    convs = parts(net, conv)
    assert [layer.in_channels for layer in convs] == [2, 64, 128, 256, 512]
    assert [layer.out_channels for layer in convs] == [64, 128, 256, 512, 1]
    assert [layer.stride[0] for layer in convs] == [2, 2, 2, 1, 1]
    assert {(layer.kernel_size[0], layer.padding[0]) for layer in convs} == {(4, 1)}
    assert [len(parts(stage, norm)) for stage in net.stages] == [0, 1, 1, 1, 0]
    assert [layer.bias is not None for layer in convs] == [True, False, False, False, True]
    assert [layer.negative_slope for layer in parts(net, nn.LeakyReLU)] == [0.2] * 4
    assert not parts(net, nn.Sigmoid)


def test_the_map_has_one_logit_a_patch():
    with torch.device("meta"):
        assert PatchGAN(2)(torch.empty(1, 1, 128, 64, 24), torch.empty(1, 1, 128, 64, 24)).shape == (1, 1, 14, 6, 1)
        assert PatchGAN(5, dims=2)(torch.empty(3, 4, 256, 256), torch.empty(3, 1, 256, 256)).shape == (3, 1, 30, 30)
        assert PatchGAN(2, layers=1)(torch.empty(1, 1, 6, 6, 6), torch.empty(1, 1, 6, 6, 6)).shape == (1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match=r"layers is .*; expected 1 to 10"):
        PatchGAN(2, layers=0)


def test_a_logit_sees_seventy_voxels_of_source_and_target():
    net = PatchGAN(2, dims=2, filters=4).eval()
    source, target = torch.randn(1, 1, 8, 256), torch.randn(1, 1, 8, 256)
    source, target = (x.expand(1, 1, 48, 256).clone().requires_grad_() for x in (source[:, :, :1], target[:, :, :1]))
    logits = net(source, target)
    logits[0, 0, 1, 15].backward()
    for image in (source, target):
        columns = image.grad[0, 0].abs().sum(0).nonzero()
        assert int(columns.max() - columns.min()) + 1 == 70


def test_features_are_what_each_stage_makes_and_end_with_the_logits():
    net = PatchGAN(3, filters=4, layers=2).eval()
    source, target = torch.randn(2, 2, 16, 16, 16), torch.randn(2, 1, 16, 16, 16)
    features = net.features(source, target)
    assert [tuple(feature.shape[:3]) for feature in features] == [(2, 4, 8), (2, 8, 4), (2, 16, 3), (2, 1, 2)]
    assert torch.equal(features[-1], net(source, target))
    assert torch.equal(features[0], net.stages[0](torch.cat([source, target], 1)))  # unharmed by the stages after it
    assert torch.equal(features[1], net.stages[1](features[0]))
