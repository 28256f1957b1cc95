from collections.abc import Callable

import pytest
import torch
from torch import nn

from mrgen.nets.blocks import AvgPool3d, Dropout, InstanceNorm3d
from mrgen.nets.deepmedic import DeepMedic
from mrgen.nets.patchgan import PatchGAN
from mrgen.nets.pix2pix import ResNetGenerator, UNetGenerator
from mrgen.nets.samr import LabelWiseDiscriminators, SAMRGenerator, SegmentationUNet2d

LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last_3d}


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


def gradients(layer, x, upstream):
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = layer(x)
    out.backward(upstream)
    return out, x.grad, [parameter.grad for parameter in layer.parameters()]


# ----- layers that are quicker than PyTorch's must be the same layers ------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_instance_norm_is_that_of_pytorch(batch, layout):
    x = (5 + torch.randn(batch, 4, 6, 5, 4)).to(memory_format=layout)
    ours, theirs = InstanceNorm3d(4, affine=True), nn.InstanceNorm3d(4, affine=True)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_()
    theirs.load_state_dict(ours.state_dict())
    upstream = torch.randn(batch, 4, 6, 5, 4)
    for got, expected in zip(gradients(ours, x, upstream)[:2], gradients(theirs, x, upstream)[:2], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for got, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-4, atol=1e-4)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_instance_norm_keeps_the_layout_of_one_volume():
    x = torch.randn(1, 4, 6, 5, 4).to(memory_format=torch.channels_last_3d)
    assert InstanceNorm3d(4, affine=True)(x).is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("size", [(6, 4, 8), (7, 5, 4)])
def test_pooling_is_that_of_pytorch(size, layout):
    x = torch.randn(2, 3, *size).to(memory_format=layout)
    upstream = torch.randn(2, 3, *(n // 2 for n in size))
    for got, expected in zip(
        gradients(AvgPool3d(), x, upstream)[:2], gradients(nn.AvgPool3d(2), x, upstream)[:2], strict=True
    ):
        torch.testing.assert_close(got, expected)


# ----- dropout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.02, 0.3, 0.9])
def test_dropout_zeroes_its_share_and_scales_the_rest(p, layout):
    torch.manual_seed(0)
    x = torch.ones(2, 4, 30, 30, 30).to(memory_format=layout)
    out = Dropout(p)(x)
    assert out.stride() == x.stride()
    assert out.unique().tolist() == pytest.approx([0, 1 / (1 - p)])
    spread = (p * (1 - p) / x.numel()) ** 0.5
    assert float((out == 0).double().mean()) == pytest.approx(p, abs=4 * spread)
    assert torch.equal(x, torch.ones_like(x))


def test_dropped_values_are_independent_trials():
    """Every position is dropped as often, and a neighbour says nothing about the next."""
    torch.manual_seed(0)
    dropout, x, p, n = Dropout(0.2), torch.ones(50), 0.2, 20_000
    dropped = torch.stack([dropout(x) == 0 for _ in range(n)]).double()  # (n, 50)
    share = dropped.mean(0)
    assert (share - p).abs().max() < 4.5 * (p * (1 - p) / n) ** 0.5  # the first and the last position too
    centred = dropped - p
    for lag in (1, 2, 3, 7):
        correlation = (centred[:, :-lag] * centred[:, lag:]).mean() / (p * (1 - p))
        assert abs(float(correlation)) < 4.5 / (n * (50 - lag)) ** 0.5
    counts = dropped.sum(1)
    assert float(counts.var()) == pytest.approx(50 * p * (1 - p), rel=0.05)  # binomial


@pytest.mark.parametrize("upstream", LAYOUTS.values(), ids=LAYOUTS)
def test_dropouts_gradient_passes_where_the_value_passed(layout, upstream):
    """Also where the gradient lies in memory in another order than the values did."""
    torch.manual_seed(0)
    x = torch.rand(1, 2, 6, 5, 4).add(1).to(memory_format=layout).requires_grad_()
    out = Dropout(0.4)(x)
    grad = torch.rand(1, 2, 6, 5, 4).add(1).to(memory_format=upstream)
    out.backward(grad)
    torch.testing.assert_close(x.grad, torch.where(out == 0, 0.0, grad / 0.6))


def test_dropout_is_repeatable_by_seed_and_off_in_eval_mode():
    x, dropout = torch.rand(1, 2, 6, 6, 6), Dropout(0.4)
    first, second = ((torch.manual_seed(s), dropout(x))[1] for s in (3, 3))
    assert torch.equal(first, second)
    assert not torch.equal(first, dropout(x))
    assert torch.equal(dropout.eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    assert not Dropout(1.0)(x).any()
    half = Dropout(0.4)(x.bfloat16())
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "build",
    [
        lambda: UNetGenerator(1, filters=4, downs=40),
        lambda: ResNetGenerator(1, filters=4, blocks=10**6),
        lambda: SAMRGenerator(labels=2, sequences=1, atlas_channels=0, filters=4, downs=40),
        lambda: SAMRGenerator(labels=2, sequences=1, atlas_channels=0, filters=4, blocks=10**6),
        lambda: SegmentationUNet2d(1, 2, filters=4, downs=40),
        lambda: LabelWiseDiscriminators(in_channels=1, filters=4, scales=10**6),
        lambda: PatchGAN(1, filters=4, layers=40),
        lambda: DeepMedic(1, 2, widths=[2] * 1000),
    ],
)
def test_a_depth_that_no_network_has_is_refused_before_it_is_built(build: Callable[[], nn.Module]):
    with pytest.raises(ValueError, match=r"is \d+; expected \d to \d+"):
        build()
