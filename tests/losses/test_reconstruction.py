import pytest
import torch
import torch.nn.functional as F

from mrgen.losses.reconstruction import weighted_mse


def case(seed=0):
    generator = torch.Generator().manual_seed(seed)
    prediction, target = torch.randn(2, 2, 1, 3, 4, 5, generator=generator)
    label = torch.randint(0, 3, (2, 3, 4, 5), generator=generator)
    label[:, :, 1] = 255
    return prediction, target, label


def test_by_hand():
    prediction = torch.tensor([[[1.0, 2.0, 3.0, 100.0]]])
    target = torch.tensor([[[0.0, 4.0, 3.5, 0.0]]])
    label = torch.tensor([[0, 1, 2, 255]])
    loss = weighted_mse(prediction, target, label, torch.tensor([1.0, 10.0, 4.0]))
    assert float(loss) == pytest.approx((1 * 1 + 10 * 4 + 4 * 0.25) / 3)
    assert float(weighted_mse(prediction, target, label)) == pytest.approx((1 + 4 + 0.25) / 3)


def test_without_weights_it_is_torchs_mean_over_the_counted_voxels():
    prediction, target, label = case()
    valid = (label != 255).unsqueeze(1)
    torch.testing.assert_close(weighted_mse(prediction, target, label), F.mse_loss(prediction[valid], target[valid]))
    assert torch.equal(weighted_mse(prediction, target, label, torch.ones(3)), weighted_mse(prediction, target, label))


def test_several_sequences_are_averaged():
    prediction, target, label = case()
    both = torch.cat([prediction, prediction + 1], 1), torch.cat([target, target], 1)
    weights = torch.tensor([1.0, 2.0, 5.0])
    one = weighted_mse(prediction, target, label, weights)
    other = weighted_mse(prediction + 1, target, label, weights)
    torch.testing.assert_close(weighted_mse(*both, label, weights), (one + other) / 2)


def test_gradient_is_weighted_and_skips_ignored_voxels_even_where_they_are_not_finite():
    prediction, target, label = case()
    target[(label == 255).unsqueeze(1)] = torch.inf
    prediction.requires_grad_()
    weights = torch.tensor([1.0, 2.0, 5.0])
    weighted_mse(prediction, target, label, weights).backward()
    valid = (label != 255).unsqueeze(1)
    scale = weights[label.masked_fill(label == 255, 0)].unsqueeze(1)
    expected = torch.where(valid, 2 * scale * (prediction.detach() - target), torch.zeros(())) / valid.sum()
    torch.testing.assert_close(prediction.grad, expected)


def test_ignored_voxels_alone_give_zero_with_a_gradient():
    prediction = torch.randn(1, 1, 4, requires_grad=True)
    loss = weighted_mse(prediction, torch.zeros(1, 1, 4), torch.full((1, 4), 255), torch.ones(2))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(prediction.grad, torch.zeros_like(prediction))


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_is_computed_in_float32(autocast):
    prediction, target, label = case()
    half = prediction.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = weighted_mse(half, target, label, torch.ones(3))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, weighted_mse(half.float(), target, label))


@pytest.mark.parametrize("shapes", [((2, 1, 4), (2, 4), (2, 4)), ((2, 1, 4), (2, 1, 4), (2, 1, 4))])
def test_shapes_that_would_broadcast_are_refused(shapes):
    prediction, target, label = shapes
    with pytest.raises(ValueError, match="label"):
        weighted_mse(torch.zeros(prediction), torch.zeros(target), torch.zeros(label, dtype=torch.int64))
