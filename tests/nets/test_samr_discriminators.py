from itertools import combinations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mrgen.losses.adversarial import discriminator_loss, feature_matching, generator_loss
from mrgen.nets.patchgan import PatchGAN
from mrgen.nets.samr import LabelWiseDiscriminators

LESION = 2  # the third region


def parts(net, kind):
    return [module for module in net.modules() if isinstance(module, kind)]


def count(net):
    return sum(weight.numel() for weight in net.parameters())


@pytest.fixture
def six():
    torch.manual_seed(0)
    return LabelWiseDiscriminators(in_channels=4, filters=2)


def regions(shape=(2, 24, 24)):
    """Background around a brain with a lesion in it, of which some lies on odd rows and columns."""
    masks = torch.zeros(shape[0], 3, *shape[1:], dtype=torch.bool)
    masks[:, 1, 4:-4, 4:-4] = True
    masks[:, 2, 9:14, 11:17] = True
    masks[:, 1] &= ~masks[:, 2]
    masks[:, 0] = ~masks[:, 1:].any(1)
    return masks


def test_layers_are_those_of_the_paper():
    with torch.device("meta"):
        net = LabelWiseDiscriminators(in_channels=25)
        assert len(net.discriminators) == 6
        for discriminator in net.discriminators:
            convs = parts(discriminator, nn.Conv2d)
            assert [conv.in_channels for conv in convs] == [25, 64, 128, 256, 512]
            assert [conv.out_channels for conv in convs] == [64, 128, 256, 512, 1]
            assert [conv.stride[0] for conv in convs] == [2, 2, 2, 1, 1]
            assert {(conv.kernel_size[0], conv.padding[0]) for conv in convs} == {(4, 2)}
            assert [len(parts(stage, nn.BatchNorm2d)) for stage in discriminator.stages] == [0, 1, 1, 1, 0]
        sizes = [tuple(x.shape[1:]) for x in net.discriminators[0](torch.empty(1, 25, 256, 256))]
        assert sizes == [(64, 129, 129), (128, 65, 65), (256, 33, 33), (512, 34, 34), (1, 35, 35)]
        # Convolutions; the biases of the first and of the last; two numbers a channel of three norms.
        weights = 16 * (25 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512) + 64 + 1 + 2 * (128 + 256 + 512)
        assert count(net) == 6 * weights
        assert not parts(LabelWiseDiscriminators(in_channels=25, norm="instance"), nn.BatchNorm2d)


def test_stages_are_those_of_the_patch_gan_but_for_the_padding(six):
    patch_gan = PatchGAN(4, dims=2, filters=2)
    patch_gan.load_state_dict(six.discriminators[0].state_dict())
    for conv in parts(patch_gan, nn.Conv2d):
        conv.padding = (2, 2)
    source, target = torch.randn(2, 3, 24, 24), torch.randn(2, 1, 24, 24)
    inputs = torch.cat([source, target], 1)
    for ours, theirs in zip(six.discriminators[0](inputs), patch_gan.features(source, target), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_six_have_different_weights_and_learn_apart(six):
    for one, other in combinations(six.discriminators, 2):
        assert not any(a is b for a in one.parameters() for b in other.parameters())
        assert not torch.equal(one.stages[0][0].weight, other.stages[0][0].weight)
    features, _ = six(torch.randn(2, 4, 24, 24), regions())
    features[3][-1].sum().backward()
    assert [net.stages[-1].weight.grad is not None for net in six.discriminators] == [k == 3 for k in range(6)]


@pytest.mark.parametrize("outside", ["random", "nan"])
@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("region", [0, 1, 2])
def test_a_discriminator_answers_the_same_when_anything_outside_its_region_changes(region, norm, outside):
    net = LabelWiseDiscriminators(in_channels=4, filters=2, norm=norm)  # in training mode
    inputs, masks = torch.randn(2, 4, 24, 24), regions()
    other = torch.randn_like(inputs) if outside == "random" else torch.full_like(inputs, torch.nan)
    changed = torch.where(masks[:, region, None], inputs, other)
    before, after = net(inputs, masks)[0], net(changed, masks)[0]
    for k in range(6):
        same = all(torch.equal(x, y) for x, y in zip(before[k], after[k], strict=True))
        assert same == (k // 2 == region)  # at both scales


@pytest.mark.parametrize("channel", range(4))  # of the label map, the images and the atlas alike
def test_every_channel_counts_inside_the_region_and_none_outside(six, channel):
    inputs, masks = torch.randn(2, 4, 24, 24, requires_grad=True), regions()
    for k, features in enumerate(six(inputs, masks)[0]):
        (grad,) = torch.autograd.grad(sum((f * torch.randn_like(f)).sum() for f in features), inputs, retain_graph=True)
        assert torch.equal(grad[:, channel] != 0, masks[:, k // 2])


def test_inputs_are_halved_after_they_are_masked(six):
    seen = []
    for discriminator in six.discriminators:
        discriminator.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    inputs, masks = torch.ones(1, 4, 24, 24), torch.zeros(1, 3, 24, 24, dtype=torch.bool)
    masks[:, LESION, 7, 8:10] = True
    masks[:, 0] = True
    six(inputs, masks)
    assert torch.equal(seen[0], inputs)
    assert torch.equal(seen[1], torch.ones(1, 4, 12, 12))  # the padding does not count in a mean
    assert [tuple(x.shape) for x in seen[2:4]] == [(0, 4, 24, 24), (0, 4, 12, 12)]
    # Row 7 lies in the windows around rows 6 and 8; column 8 in that of 8, column 9 in those of 8 and of 10.
    expected = torch.zeros(12, 12)
    expected[3:5, 4], expected[3:5, 5] = 2 / 9, 1 / 9
    torch.testing.assert_close(seen[5], expected.expand(1, 4, 12, 12))


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_a_sample_without_the_region_contributes_nothing(norm):
    net = LabelWiseDiscriminators(in_channels=4, filters=2, norm=norm)
    inputs, masks = torch.randn(3, 4, 24, 24), regions((3, 24, 24))
    masks[1, LESION] = False
    features, present = net(inputs, masks)
    assert present.tolist() == [[True, True, True], [True, True, False], [True, True, True]]
    assert [len(f[-1]) for f in features] == [3, 3, 3, 3, 2, 2]
    alone, _ = net(inputs[[0, 2]], masks[[0, 2]])
    for k in (4, 5):  # not even through the batch's statistics
        for x, y in zip(features[k], alone[k], strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_a_region_that_is_in_no_sample_gives_no_nan_and_no_gradient(norm):
    net = LabelWiseDiscriminators(in_channels=4, filters=2, norm=norm)
    real, masks = torch.randn(2, 4, 24, 24), regions()
    masks[:, LESION] = False
    fake = torch.randn(2, 4, 24, 24, requires_grad=True)
    buffers = {name: x.clone() for name, x in net.discriminators[4].named_buffers() if "running" in name}
    theirs, ours = net(real, masks)[0], net(fake, masks)[0]
    assert [tuple(x.shape[:2]) for x in ours[4]] == [(0, 2), (0, 4), (0, 8), (0, 16), (0, 1)]
    feature_matching(theirs[4], ours[4]).backward(retain_graph=True)
    assert not fake.grad.any()
    loss = torch.stack([feature_matching(r, f) for r, f in zip(theirs, ours, strict=True)]).sum()
    loss = loss + sum(generator_loss(f[-1]) for f in ours if len(f[-1]))
    loss = loss + sum(discriminator_loss(r[-1], f[-1]) for r, f in zip(theirs, ours, strict=True) if len(f[-1]))
    loss.backward()
    assert loss.isfinite()
    assert fake.grad.isfinite().all()
    assert fake.grad.any()
    for k, discriminator in enumerate(net.discriminators):
        grads = [weight.grad for weight in discriminator.parameters()]
        # There, so that processes that have the region and processes that have not agree on what is learnt.
        assert all(grad is not None and grad.isfinite().all() for grad in grads)
        assert any(grad is not None and grad.any() for grad in grads) == (k < 4)
    for name, before in buffers.items():
        assert torch.equal(net.discriminators[4].get_buffer(name), before)


def test_images_masks_and_label_map_are_left_as_they_are(six):
    inputs, masks = torch.randn(2, 4, 24, 24), regions()
    before = inputs.clone(), masks.clone()
    first = six.eval()(inputs, masks)[0]
    assert torch.equal(inputs, before[0])
    assert torch.equal(masks, before[1])
    for one, again in zip(first, six(inputs, masks)[0], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, again, strict=True))


def test_without_regions_two_ordinary_discriminators_see_all():
    net = LabelWiseDiscriminators(in_channels=4, regions=None, filters=2)
    inputs = torch.randn(2, 4, 24, 24, requires_grad=True)
    features, present = net(inputs)
    assert len(features) == 2
    assert [len(f) for f in features] == [5, 5]
    assert present.tolist() == [[True], [True]]
    sum((x * torch.randn_like(x)).sum() for f in features for x in f).backward()
    assert (inputs.grad != 0).all()
    masked, _ = net(inputs, regions())  # so that a training step is the same with and without them
    assert all(torch.equal(x, y) for f, g in zip(features, masked, strict=True) for x, y in zip(f, g, strict=True))
    for x, y in zip(
        features[1], net.discriminators[1](F.avg_pool2d(inputs, 3, 2, 1, count_include_pad=False)), strict=True
    ):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(("number", "scales"), [(4, 2), (1, 3), (2, 1)])
def test_as_many_regions_and_scales_as_wanted(number, scales):
    net = LabelWiseDiscriminators(in_channels=4, regions=number, scales=scales, filters=2)
    features, present = net(torch.randn(1, 4, 25, 31), torch.ones(1, number, 25, 31, dtype=torch.bool))  # odd sizes
    assert present.shape == (1, number)
    assert [f[0].shape[2] for f in features] == [13, 7, 4][:scales] * number  # of 25, 13 and 7 rows


def test_discriminators_say_what_does_not_fit(six):
    inputs = torch.empty(2, 4, 24, 24)
    with pytest.raises(ValueError, match=r"expected masks of shape \(2, 3, 24, 24\), found None"):
        six(inputs)
    with pytest.raises(ValueError, match=r"found \(2, 5, 24, 24\)"):
        six(inputs, torch.ones(2, 5, 24, 24, dtype=torch.bool))
    for settings in ({"regions": 0}, {"scales": 0}, {"filters": 0}):
        with pytest.raises(ValueError, match="is 0; expected 1 "):
            LabelWiseDiscriminators(in_channels=4, **settings)


def test_matching_features_is_zero_for_identical_images_and_moves_the_fake_ones_alone(six):
    images, masks = torch.randn(2, 4, 24, 24), regions()
    real, fake = images.clone().requires_grad_(), images.clone().requires_grad_()
    for theirs, ours in zip(six(real, masks)[0], six(fake, masks)[0], strict=True):
        assert feature_matching(theirs, ours).item() == 0
    fake = (images + 0.1 * masks[:, LESION, None]).requires_grad_()
    losses = [feature_matching(*pair) for pair in zip(six(real, masks)[0], six(fake, masks)[0], strict=True)]
    assert [loss.item() > 0 for loss in losses] == [False] * 4 + [True] * 2  # the lesion differs, nothing else does
    sum(losses).backward()
    assert real.grad is None
    assert torch.equal(fake.grad.any(1), masks[:, LESION])
