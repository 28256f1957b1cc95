import math

import pytest
import torch

from mrgen.losses.adversarial import discriminator_loss, feature_matching, generator_loss

REAL, FAKE = torch.tensor([[2.0, -1.0]]), torch.tensor([[0.5, 3.0]])


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_cross_entropy_by_hand():
    real = -(math.log(sigmoid(2.0)) + math.log(sigmoid(-1.0))) / 2
    fake = -(math.log(1 - sigmoid(0.5)) + math.log(1 - sigmoid(3.0))) / 2
    assert float(discriminator_loss(REAL, FAKE)) == pytest.approx((real + fake) / 2)
    assert float(generator_loss(FAKE)) == pytest.approx(-(math.log(sigmoid(0.5)) + math.log(sigmoid(3.0))) / 2)


def test_least_squares_by_hand():
    real, fake = (1.0**2 + 2.0**2) / 2, (0.5**2 + 3.0**2) / 2
    assert float(discriminator_loss(REAL, FAKE, least_squares=True)) == pytest.approx((real + fake) / 2)
    assert float(generator_loss(FAKE, least_squares=True)) == pytest.approx((0.5**2 + 2.0**2) / 2)


def test_who_cannot_tell_has_the_halved_loss():
    unsure = torch.zeros(1, 1, 3, 3, 3)
    assert float(discriminator_loss(unsure, unsure)) == pytest.approx(math.log(2))  # half of twice ln 2
    assert float(discriminator_loss(unsure + 0.5, unsure + 0.5, least_squares=True)) == pytest.approx(0.25)


@pytest.mark.parametrize("least_squares", [True, False])
def test_the_players_pull_in_opposite_directions(least_squares):
    real, fake = torch.zeros(2, 1, 2, requires_grad=True), torch.zeros(2, 1, 2, requires_grad=True)
    discriminator_loss(real, fake, least_squares=least_squares).backward()
    assert (real.grad < 0).all()  # descent raises the logits of real pairs
    assert (fake.grad >= 0).all()
    fake = torch.zeros(2, 1, 2, requires_grad=True)
    generator_loss(fake, least_squares=least_squares).backward()
    assert (fake.grad < 0).all()


def test_maps_of_different_sizes_count_as_means():
    torch.testing.assert_close(discriminator_loss(REAL.repeat(1, 5), FAKE), discriminator_loss(REAL, FAKE))


def test_logits_of_bfloat16_and_of_any_size_are_computed_in_float32():
    far = torch.tensor([[-200.0]])
    assert float(generator_loss(far)) == pytest.approx(200)  # a sigmoid would have been 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = discriminator_loss(REAL.bfloat16(), FAKE.bfloat16())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, discriminator_loss(REAL, FAKE))


# ----- feature matching ----------------------------------------------------------------------------------------------


def stages(*rows):
    return [torch.tensor(row).reshape(1, 1, -1) for row in rows]


def test_feature_matching_by_hand():
    real, fake = stages([1.0, 2.0], [0.0], [4.0]), stages([1.0, 5.0], [2.0], [1.0])
    assert float(feature_matching(real, fake)) == pytest.approx(3**2 / 2 + 2**2 + 3**2)
    assert float(feature_matching(real, fake, output=False)) == pytest.approx(3**2 / 2 + 2**2)


def test_feature_matching_of_absolute_distances_by_hand():
    """Pix2pixHD's, without the logits."""
    real, fake = stages([1.0, 2.0], [0.0], [4.0]), stages([1.0, 5.0], [-2.0], [1.0])
    assert float(feature_matching(real, fake, absolute=True)) == pytest.approx(3 / 2 + 2 + 3)
    assert float(feature_matching(real, fake, output=False, absolute=True)) == pytest.approx(3 / 2 + 2)


def test_feature_matching_is_nought_for_equal_features_and_squared():
    real = [torch.randn(2, 4, 5, 5), torch.randn(2, 1, 3, 3)]
    assert float(feature_matching(real, [feature.clone() for feature in real])) == 0
    once, twice = (feature_matching(real, [feature + step for feature in real]) for step in (0.5, 1.0))
    torch.testing.assert_close(twice, 4 * once)  # absolute distances would have doubled


def test_feature_matching_moves_the_fake_features_alone_towards_the_real_ones():
    real, fake = torch.ones(1, 2, 2, requires_grad=True), torch.zeros(1, 2, 2, requires_grad=True)
    feature_matching([real], [fake]).backward()
    assert real.grad is None
    torch.testing.assert_close(fake.grad, torch.full((1, 2, 2), -2 / 4))


def test_feature_matching_without_samples_is_nought_with_a_gradient_of_noughts():
    fake = torch.zeros(0, 4, 5, 5, requires_grad=True)
    loss = feature_matching([torch.zeros(0, 4, 5, 5)], [fake * 1])
    assert loss.item() == 0
    loss.backward()
    assert fake.grad.shape == fake.shape


def test_feature_matching_refuses_features_that_are_not_pairs():
    with pytest.raises(ValueError, match="features of equal shapes"):
        feature_matching([torch.zeros(1, 2, 3)], [torch.zeros(4, 2, 3)])
    with pytest.raises(ValueError):
        feature_matching([torch.zeros(1)] * 2, [torch.zeros(1)])


def test_feature_matching_of_bfloat16_is_computed_in_float32():
    real, fake = torch.randn(64, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    loss = feature_matching([real], [fake])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, (real.float() - fake.float()).square().mean())
