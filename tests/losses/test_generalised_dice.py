import pytest
import torch
import torch.nn.functional as F

from mrgen.losses.segmentation import generalised_dice


def drawn(classes=5, size=(3, 8, 9)):
    torch.manual_seed(0)
    label = torch.randint(classes, size)
    return torch.randn(size[0], classes, *size[1:]).softmax(1), F.one_hot(label, classes).movedim(-1, 1)


def test_by_hand():
    one_hot = torch.tensor([[[1, 1, 0]], [[0, 0, 1]]]).movedim(1, 0)  # (1, 2, 3)
    probabilities = torch.tensor([[[0.9, 0.4, 0.2], [0.1, 0.6, 0.8]]])
    first = 1 - 2 * (0.9 + 0.4) / (1.5 + 2)
    second = 1 - 2 * 0.8 / (1.5 + 1)
    assert float(generalised_dice(probabilities, one_hot)) == pytest.approx((first + second) / 2)


def test_sums_go_over_the_batch():
    """Dice of the samples one by one, averaged, would be another number: an empty slice would count as much as any."""
    one_hot = torch.tensor([[[1.0, 1], [0, 0]], [[0, 0], [1, 1]]])  # (2, 2, 2)
    probabilities = torch.tensor([[[1.0, 0.5], [0, 0.5]], [[0.5, 0], [0.5, 1]]])
    assert float(generalised_dice(probabilities, one_hot)) == pytest.approx(1 - 2 * 1.5 / (2 + 2))


@pytest.mark.parametrize("size", [(3, 8, 9), (2, 4, 5, 6)])
def test_agrees_with_monai(size):
    from monai.losses import DiceLoss

    probabilities, one_hot = drawn(size=size)
    foreign = DiceLoss(batch=True, smooth_nr=0, smooth_dr=1e-7)
    torch.testing.assert_close(generalised_dice(probabilities, one_hot), foreign(probabilities, one_hot.float()))


def test_no_class_weights_a_rare_label_counts_as_a_common_one():
    one_hot = F.one_hot(torch.tensor([[0] * 99 + [1]]), 2).movedim(-1, 1).float()  # (1, 2, 100)
    rare_missed = torch.stack([torch.ones(1, 100), torch.zeros(1, 100)], 1)
    assert float(generalised_dice(rare_missed, one_hot)) == pytest.approx((1 - 2 * 99 / 199 + 1) / 2)


def test_nought_when_all_is_right_and_one_when_all_is_wrong():
    _, one_hot = drawn()
    assert float(generalised_dice(one_hot.float(), one_hot)) == pytest.approx(0, abs=1e-6)
    assert float(generalised_dice(one_hot.roll(1, dims=1).float(), one_hot)) == 1


def test_a_label_that_is_nowhere_is_a_constant_without_gradient():
    probabilities, one_hot = drawn()
    absent = torch.cat([one_hot, torch.zeros_like(one_hot[:, :1])], 1)
    more = torch.cat([probabilities, torch.full_like(probabilities[:, :1], 0.1)], 1).requires_grad_()
    loss = generalised_dice(more, absent)
    assert loss.item() == pytest.approx((5 * float(generalised_dice(probabilities, one_hot)) + 1) / 6)
    loss.backward()
    assert not more.grad[:, 5].any()
    assert more.grad[:, :5].any()


def test_voxels_of_no_label_do_not_count():
    probabilities, one_hot = drawn()
    kept = one_hot.clone()
    kept[:, :, 3:] = 0
    expected = generalised_dice(probabilities[:, :, :3], one_hot[:, :, :3])
    torch.testing.assert_close(generalised_dice(probabilities, kept), expected)
    nothing = torch.zeros_like(one_hot)
    assert generalised_dice(probabilities, nothing).isfinite()


def test_descent_raises_the_probability_of_the_right_label():
    probabilities, one_hot = drawn()
    probabilities.requires_grad_()
    generalised_dice(probabilities, one_hot).backward()
    assert (probabilities.grad[one_hot == 1] < 0).all()
    assert (probabilities.grad[one_hot == 0] > 0).all()


def test_bfloat16_is_computed_in_float32():
    probabilities, one_hot = drawn()
    half = probabilities.bfloat16()
    loss = generalised_dice(half, one_hot)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, generalised_dice(half.float(), one_hot))


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"one shape \(B, C, ...\)"):
        generalised_dice(torch.zeros(2, 5, 4, 4), torch.zeros(2, 1, 4, 4))
