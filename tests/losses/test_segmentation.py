import math

import pytest
import torch
import torch.nn.functional as F

from mrgen.losses.segmentation import class_weights, weighted_cross_entropy

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
