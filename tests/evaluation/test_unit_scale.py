"""Errors on [0, 1], by hand on four voxels."""

import math

import pytest
import torch

from mrgen.evaluation.unit_scale import rescaled, unit_errors
from mrgen.protocols import Synthesis


def line(*values):
    return torch.tensor(values, dtype=torch.float32).reshape(1, 1, -1, 1, 1)


def mask(*values):
    return torch.tensor(values, dtype=torch.bool).reshape(1, -1, 1, 1)


def test_intensities_are_divided_by_their_maximum_and_small_negative_ones_are_background():
    assert torch.equal(rescaled(line(-5, 0, 50, 200), "stored"), line(0, 0, 0.25, 1))
    assert torch.equal(rescaled(line(-0.1, 0, 0.2, 0.4), "unit"), line(0, 0, 0.5, 1))


def test_the_background_of_other_scales_becomes_the_darkest_voxel():
    assert torch.equal(rescaled(line(0, -1, 0, 3), "zscore"), line(0, 0, 0, 1))


def test_errors_by_hand():
    """Background, then three brain voxels of which the last two are tumour."""
    real = line(0, 0.2, 0.5, 1)
    made = Synthesis(line(0.7, 0.2, 0.3, 0.4), None, "unit")  # half as bright as it should be; 0.7 lies outside
    errors = unit_errors(made, real, mask(0, 1, 1, 1), mask(0, 0, 1, 1))
    assert errors["unit_mse_brain"] == pytest.approx((0 + 0.2**2 + 0.6**2) / 3)
    assert errors["unit_mse_tumour"] == pytest.approx((0.2**2 + 0.6**2) / 2)
    assert errors["own_mse_brain"] == pytest.approx((0.3**2 + 0.25**2 + 0) / 3)
    assert errors["own_mse_tumour"] == pytest.approx((0.25**2 + 0) / 2)


def test_the_union_of_foregrounds_counts_and_not_the_brain():
    """A voxel that is background in both images is in neither foreground, although it lies in the brain."""
    made = Synthesis(line(0, 0, 0.5, 1), None, "unit")
    errors = unit_errors(made, line(0, 0.4, 0, 1), mask(1, 1, 1, 1), mask(0, 0, 0, 0))
    assert errors["own_mse_brain"] == pytest.approx((0.4**2 + 0.5**2 + 0) / 3)
    assert math.isnan(errors["own_mse_tumour"])


def test_other_scales_have_no_error_as_made():
    errors = unit_errors(
        Synthesis(line(0, -1, 1, 3), None, "zscore"), line(0, 0, 0.5, 1), mask(0, 1, 1, 1), mask(0, 0, 0, 1)
    )
    assert set(errors) == {"own_mse_brain", "own_mse_tumour"}
    assert errors["own_mse_brain"] == 0
