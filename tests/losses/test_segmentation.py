import math

import pytest
import torch
import torch.nn.functional as F

from mrgen.losses.segmentation import binary_cross_entropy, class_weights, soft_dice, weighted_cross_entropy

COUNTS = torch.tensor([900_000, 50_000, 40_000, 10_000])


def test_class_weights_by_hand():
    counts = torch.tensor([6, 3, 1])  # sum / count = 10/6, 10/3, 10
    raw = class_weights(counts, normalise=False)
    torch.testing.assert_close(raw, torch.tensor([10 / 6 + 1, 10 / 3 + 1, 11]))
    # The mean over the ten voxels is (6 · 16/6 + 3 · 13/3 + 1 · 11) / 10 = 4.
    torch.testing.assert_close(class_weights(counts), raw / 4)


@pytest.mark.parametrize("epoch", [0, 3, 50])
def test_mean_weight_of_a_training_voxel_is_one_at_every_epoch(epoch):
    weights = class_weights(COUNTS, epoch=epoch, decay=0.9)
    assert float((weights * COUNTS).sum() / COUNTS.sum()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("normalise", [True, False])
def test_a_rarer_class_never_weighs_less(normalise):
    counts = torch.randint(1, 1_000_000, (40,), generator=torch.Generator().manual_seed(0)).sort(descending=True).values
    for epoch in (0, 10):
        weights = class_weights(counts, epoch=epoch, decay=0.9, normalise=normalise)
        assert (weights.diff() >= 0).all()
        assert weights[-1] > weights[0]


def test_decay_ends_uniform_and_no_decay_is_static():
    torch.testing.assert_close(class_weights(COUNTS, epoch=500, decay=0.9), torch.ones(4))
    assert torch.equal(class_weights(COUNTS, epoch=500), class_weights(COUNTS))
    assert class_weights(COUNTS, epoch=5, decay=0.9).max() < class_weights(COUNTS).max()


def test_cap_bounds_rare_and_absent_classes():
    weights = class_weights(torch.tensor([999_999, 1, 0]), cap=50, normalise=False)
    assert weights.tolist() == pytest.approx([1 + 1_000_000 / 999_999, 51, 51])
    assert class_weights(torch.tensor([999_999, 1, 0])).isfinite().all()


def test_equal_counts_weigh_one():
    torch.testing.assert_close(class_weights(torch.tensor([7, 7, 7])), torch.ones(3))


@pytest.mark.parametrize("counts", [torch.zeros(3), torch.tensor([5, -1]), torch.ones(2, 2)])
def test_counts_that_are_none_are_refused(counts):
    with pytest.raises(ValueError, match="counts"):
        class_weights(counts)


def test_cross_entropy_by_hand():
    # Four voxels of two classes; log-probabilities are chosen, so that softmax gives them back.
    p = torch.tensor([0.5, 0.25, 0.9, 0.2])  # of class 1
    logits = torch.stack([1 - p, p]).log()[None]  # (1, 2, 4)
    label = torch.tensor([[1, 1, 0, 255]])
    expected = -(3 * math.log(0.5) + 3 * math.log(0.25) + 2 * math.log(0.1)) / 3
    assert float(weighted_cross_entropy(logits, label, torch.tensor([2.0, 3.0]))) == pytest.approx(expected, rel=1e-5)
    uniform = -(math.log(0.5) + math.log(0.25) + math.log(0.1)) / 3
    assert float(weighted_cross_entropy(logits, label)) == pytest.approx(uniform, rel=1e-5)


def volume(seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 4, 3, 4, 5, generator=generator)
    label = torch.randint(0, 4, (2, 3, 4, 5), generator=generator)
    label[:, 0] = 255
    return logits, label


def test_cross_entropy_agrees_with_unreduced_torch():
    logits, label = volume()
    weights = class_weights(COUNTS)
    valid = label != 255
    per_voxel = F.cross_entropy(logits, label.masked_fill(~valid, 0), reduction="none")
    expected = (per_voxel * weights[label.masked_fill(~valid, 0)])[valid].mean()
    torch.testing.assert_close(weighted_cross_entropy(logits, label, weights), expected)
    # and is not torch's own weighted mean
    assert not torch.isclose(expected, F.cross_entropy(logits, label, weight=weights, ignore_index=255))


def test_cross_entropy_gradient_is_weighted_and_skips_ignored_voxels():
    logits, label = volume()
    logits.requires_grad_()
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    weighted_cross_entropy(logits, label, weights).backward()
    # d/dlogits of −w log softmax = w (p − onehot), over the number of counted voxels
    valid = label != 255
    target = label.masked_fill(~valid, 0)
    onehot = F.one_hot(target, 4).movedim(-1, 1)
    expected = weights[target].unsqueeze(1) * (logits.detach().softmax(1) - onehot) * valid.unsqueeze(1) / valid.sum()
    torch.testing.assert_close(logits.grad, expected)


def test_cross_entropy_of_ignored_voxels_alone_is_zero_with_a_gradient():
    logits = torch.randn(1, 3, 4, requires_grad=True)
    loss = weighted_cross_entropy(logits, torch.full((1, 4), 255), torch.ones(3))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("autocast", [True, False])
def test_cross_entropy_of_bfloat16_is_computed_in_float32(autocast):
    logits, label = volume()
    half = logits.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = weighted_cross_entropy(half, label)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, weighted_cross_entropy(half.float(), label))


# ----- one class against the rest ----------------------------------------------------------------------------------

P = torch.tensor([0.8, 0.6, 0.1, 0.5])  # of lesion, in four voxels
FOUR = torch.tensor([[1, 0, 0, 2]])  # any class is lesion


def lesions(seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(3, 1, 6, 7, generator=generator)
    label = (torch.rand(3, 6, 7, generator=generator) < 0.3).long()
    label[:, 0] = 255
    return logits, label


def test_binary_cross_entropy_by_hand_has_both_terms():
    logits = P.logit()[None, None]  # (1, 1, 4)
    expected = -(math.log(0.8) + math.log(0.4) + math.log(0.9) + math.log(0.5)) / 4
    assert float(binary_cross_entropy(logits, FOUR)) == pytest.approx(expected, rel=1e-5)
    ignored = torch.tensor([[1, 0, 255, 1]])
    expected = -(math.log(0.8) + math.log(0.4) + math.log(0.5)) / 3
    assert float(binary_cross_entropy(logits, ignored)) == pytest.approx(expected, rel=1e-5)


def test_lesion_everywhere_is_no_answer_to_binary_cross_entropy():
    """It is to equation 4 as it is printed."""
    logits, label = lesions()
    assert binary_cross_entropy(torch.full_like(logits, 20), label) > binary_cross_entropy(logits, label)


def test_soft_dice_by_hand():
    logits = P.logit()[None, None]  # sum of P is 2, of which 1.3 lies in the lesion of 2 voxels
    assert float(soft_dice(logits, FOUR)) == pytest.approx(1 - (2 * 1.3 + 1) / (2 + 2 + 1), rel=1e-5)
    assert float(soft_dice(logits, FOUR, smooth=0.5)) == pytest.approx(1 - (2.6 + 0.5) / 4.5, rel=1e-5)
    ignored = torch.tensor([[1, 0, 255, 1]])
    assert float(soft_dice(logits, ignored)) == pytest.approx(1 - (2.6 + 1) / (1.9 + 2 + 1), rel=1e-5)


def test_soft_dice_of_a_batch_without_lesion_is_defined():
    logits = P.logit()[None, None]
    assert float(soft_dice(logits, torch.zeros(1, 4, dtype=torch.int64))) == pytest.approx(1 - 1 / (2 + 1), rel=1e-5)
    assert float(soft_dice(torch.full((1, 1, 4), -50.0), torch.zeros(1, 4, dtype=torch.int64))) == 0


def test_binary_cross_entropy_agrees_with_torch_on_the_voxels_that_count():
    logits, label = lesions()
    valid = label != 255
    expected = F.binary_cross_entropy(logits[:, 0][valid].sigmoid(), label[valid].float())
    torch.testing.assert_close(binary_cross_entropy(logits, label), expected)


def test_soft_dice_agrees_with_monai_on_the_voxels_that_count():
    from monai.losses import DiceLoss

    logits, label = lesions()
    valid = label != 255
    foreign = DiceLoss(sigmoid=True, batch=True, smooth_nr=1, smooth_dr=1)
    expected = foreign(logits[:, 0][valid][None, None], label[valid][None, None].float())
    torch.testing.assert_close(soft_dice(logits, label), expected)


def test_gradient_of_binary_cross_entropy_by_hand():
    logits, label = lesions()
    logits.requires_grad_()
    binary_cross_entropy(logits, label).backward()
    valid = (label != 255).unsqueeze(1)
    expected = (logits.detach().sigmoid() - (label == 1).unsqueeze(1).float()) * valid / valid.sum()
    torch.testing.assert_close(logits.grad, expected)


def test_gradient_of_soft_dice_by_hand():
    logits, label = lesions()
    logits.requires_grad_()
    soft_dice(logits, label).backward()
    valid, lesion = (label != 255).unsqueeze(1).float(), (label == 1).unsqueeze(1).float()
    p = logits.detach().sigmoid()
    above, below = 2 * (p * lesion).sum() + 1, (p * valid).sum() + lesion.sum() + 1
    by_probability = -(2 * lesion * below - above * valid) / below**2
    torch.testing.assert_close(logits.grad, by_probability * p * (1 - p))
    assert not logits.grad[:, :, 0].any()  # ignored


@pytest.mark.parametrize("loss", [binary_cross_entropy, soft_dice])
def test_what_is_ignored_changes_nothing(loss):
    logits, label = lesions()
    other = logits.clone()
    other[:, :, 0] = 7
    assert torch.equal(loss(logits, label), loss(other, label))


@pytest.mark.parametrize("loss", [binary_cross_entropy, soft_dice])
def test_ignored_voxels_alone_give_zero_with_a_gradient_of_zeros(loss):
    logits = torch.randn(1, 1, 4, requires_grad=True)
    value = loss(logits, torch.full((1, 4), 255))
    value.backward()
    assert value.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("loss", [binary_cross_entropy, soft_dice])
@pytest.mark.parametrize("shape", [(3, 6, 7), (3, 2, 6, 7), (1, 1, 6, 7)])
def test_shapes_that_would_be_broadcast_are_refused(loss, shape):
    with pytest.raises(ValueError, match=r"expected logits \(B, 1, \.\.\.\) and label \(B, \.\.\.\), found"):
        loss(torch.zeros(shape), lesions()[1])


@pytest.mark.parametrize("loss", [binary_cross_entropy, soft_dice])
def test_half_precision_is_computed_in_float32(loss):
    logits, label = lesions()
    half = logits.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(half, label)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(half.float(), label))
