import math

import pytest
import torch

from mrgen.losses.adversarial import discriminator_loss, generator_loss

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
