import math
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from mrgen.metrics.uncertainty import calibration_bins, rank_correlation


def volumes(shape=(12, 13, 14), seed=0):
    """A variance over three decades, normal errors of that variance, and a random half of the voxels as mask."""
    generator = torch.Generator().manual_seed(seed)
    variance = 10 ** (3 * torch.rand(shape, generator=generator) - 3)
    error = torch.randn(shape, generator=generator) * variance.sqrt()
    return variance, error, torch.rand(shape, generator=generator) < 0.5


def line(*values):
    return torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1)


def everywhere(volume):
    return torch.ones_like(volume, dtype=torch.bool)


@pytest.mark.parametrize("decimals", [6, 1])  # one decimal: most ranks are tied
def test_rank_correlation_is_scipys_over_the_mask(decimals):
    variance, error, mask = volumes()
    variance, error = variance.round(decimals=decimals), error.abs().round(decimals=decimals)
    expected = spearmanr(variance[mask].numpy(), error[mask].numpy()).statistic
    assert 0.2 < expected < 0.9
    assert rank_correlation(variance, error, mask) == pytest.approx(expected, abs=1e-12)
    assert rank_correlation(variance[None], error[None], mask[None]) == pytest.approx(expected, abs=1e-12)
    assert rank_correlation(variance, error, everywhere(mask)) != pytest.approx(expected, abs=1e-3)


def test_rank_correlation_by_hand():
    mask = everywhere(line(1, 2, 3, 4))
    assert rank_correlation(line(1, 2, 3, 4), line(0.1, 5, 6, 900), mask) == 1  # only order counts
    assert rank_correlation(line(1, 2, 3, 4), line(4, 3, 2, 1), mask) == -1
    # Ranks 1 2 3 4 and 1 3 2 4: 1 − 6 Σd² / (n (n² − 1)) = 1 − 12 / 60
    assert rank_correlation(line(1, 2, 3, 4), line(1, 3, 2, 4), mask) == pytest.approx(0.8)
    # A tie takes the mean rank: 1 2 3 4 against 1 2.5 2.5 4, covariance 4.5, squares 5 and 4.5
    assert rank_correlation(line(1, 2, 3, 4), line(1, 2, 2, 4), mask) == pytest.approx(4.5 / math.sqrt(5 * 4.5))


def test_rank_correlation_is_that_of_variance_or_deviation_and_of_any_power_of_the_error():
    variance, error, mask = (volume.double() if volume.is_floating_point() else volume for volume in volumes())
    rho = rank_correlation(variance, error.abs(), mask)
    assert rank_correlation(variance.sqrt(), error.square(), mask) == pytest.approx(rho, abs=1e-6)


@pytest.mark.parametrize(
    ("uncertainty", "error"),
    [
        (line(), line()),
        (line(1, 2), line(1, 2)),
        (line(1, 1, 1), line(1, 2, 3)),
        (line(1, 2, 3), line(7, 7, 7)),
        (line(1, 2, 3, math.nan), line(1, 2, 3, 4)),
    ],
)
def test_rank_correlation_is_nan_where_there_is_none(uncertainty, error):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(rank_correlation(uncertainty, error, everywhere(error)))


def test_rank_correlation_takes_half_precision_and_graphs():
    variance, error, mask = volumes()
    variance, error = variance.bfloat16().requires_grad_(), error.abs().bfloat16()
    expected = spearmanr(variance[mask].detach().float().numpy(), error[mask].float().numpy()).statistic
    assert rank_correlation(variance, error, mask) == pytest.approx(expected, abs=1e-12)


def test_bins_hold_the_means_of_voxels_sorted_by_variance():
    variance, error, mask = line(4, 1, 3, 2, 9), line(40, 10, 30, 20, 7), torch.tensor([1, 1, 1, 1, 0]).bool()
    means, errors, voxels = calibration_bins(variance, error, mask.reshape(-1, 1, 1), bins=2)
    assert means.tolist() == [1.5, 3.5]
    assert errors.tolist() == [15, 35]
    assert voxels.tolist() == [2, 2]
    assert (means.dtype, errors.dtype, voxels.dtype) == (torch.float64, torch.float64, torch.int64)


@pytest.mark.parametrize("bins", [1, 7, 20])
def test_bins_are_of_equal_count_and_lose_nothing(bins):
    variance, error, mask = volumes()
    squared = error.square()
    means, errors, voxels = calibration_bins(variance[None], squared[None], mask[None], bins=bins)
    assert voxels.shape == means.shape == errors.shape == (bins,)
    assert voxels.sum() == mask.sum()
    assert voxels.max() - voxels.min() <= 1
    assert (means.diff() > 0).all()
    for bin_means, volume in ((means, variance), (errors, squared)):
        assert float((bin_means * voxels).sum() / voxels.sum()) == pytest.approx(float(volume[mask].mean()), rel=1e-5)


def test_a_calibrated_variance_lies_on_the_identity_and_a_small_one_below():
    variance, error, _ = volumes((40, 40, 40))
    means, errors, _ = calibration_bins(variance, error.square(), everywhere(variance), bins=10)
    assert torch.allclose(errors, means, rtol=0.1)
    means, errors, _ = calibration_bins(variance / 4, error.square(), everywhere(variance), bins=10)
    assert torch.allclose(errors, 4 * means, rtol=0.1)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_bins_without_voxels_are_nan_and_last(count):
    variance = torch.arange(1.0, 6).reshape(5, 1, 1)
    means, errors, voxels = calibration_bins(variance, variance**2, variance <= count, bins=4)
    assert voxels.tolist() == [1] * count + [0] * (4 - count)
    assert means[:count].tolist() == list(range(1, count + 1))
    assert errors[:count].tolist() == [n**2 for n in range(1, count + 1)]
    assert means[count:].isnan().all()
    assert errors[count:].isnan().all()


@pytest.mark.parametrize("metric", [rank_correlation, calibration_bins])
@pytest.mark.parametrize(
    "shapes",
    [
        [(4, 5, 6), (4, 5, 1), (4, 5, 6)],
        [(4, 5, 6), (4, 5, 6), (1, 5, 6)],
        [(2, 4, 5, 6), (2, 4, 5, 6), (2, 4, 5, 6)],
        [(1, 1, 4, 5, 6), (1, 1, 4, 5, 6), (1, 1, 4, 5, 6)],
        [(4, 5), (4, 5), (4, 5)],
    ],
)
def test_shapes_that_would_broadcast_are_refused(metric, shapes):
    first, second, mask = (torch.ones(shape) for shape in shapes)
    with pytest.raises(ValueError, match="expected uncertainty, error and a bool mask"):
        metric(first, second, mask.bool())


@pytest.mark.parametrize("metric", [rank_correlation, calibration_bins])
def test_a_mask_of_numbers_is_refused(metric):
    volume = torch.ones(3, 3, 3)
    with pytest.raises(ValueError, match=r"found .* torch\.float32"):
        metric(volume, volume, volume)


@pytest.mark.parametrize("bins", [0, -1])
def test_no_bins_are_refused(bins):
    volume = torch.ones(3, 3, 3)
    with pytest.raises(ValueError, match="bins: expected at least 1"):
        calibration_bins(volume, volume, everywhere(volume), bins=bins)


def test_inputs_stay_as_they_are():
    variance, error, mask = volumes()
    before = variance.clone(), error.clone(), mask.clone()
    rank_correlation(variance, error, mask)
    calibration_bins(variance, error, mask)
    assert all(np.array_equal(now, then) for now, then in zip((variance, error, mask), before, strict=True))
