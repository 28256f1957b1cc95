import math

import numpy as np
import pytest
import torch
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity

from mrgen.metrics.reconstruction import mae, mse, psnr, ssim, unit_range


def pair(shape, seed=0):
    """A smooth reference, a noisy prediction, and an off-centre ellipsoid as mask."""
    rng = np.random.default_rng(seed)
    grids = np.meshgrid(*(np.linspace(0, 1, n) for n in shape), indexing="ij")
    reference = sum(np.sin(7 * g + i) for i, g in enumerate(grids)) + 0.1 * rng.normal(size=shape)
    prediction = 0.8 * reference + 0.4 * rng.normal(size=shape)
    mask = sum(((g - 0.45) / 0.3) ** 2 for g in grids) < 1
    return torch.tensor(prediction).float(), torch.tensor(reference).float(), torch.tensor(mask)


def skimage_ssim_map(prediction, reference, data_range):
    return structural_similarity(
        reference.double().numpy(),
        prediction.double().numpy(),
        data_range=data_range,
        full=True,
        gaussian_weights=True,
        use_sample_covariance=False,
    )[1]


@pytest.mark.parametrize("shape", [(20, 23, 26), (31, 40)])
def test_errors_agree_with_scikit_image(shape):
    prediction, reference, mask = pair(shape)
    p, r = prediction[mask].double().numpy(), reference[mask].double().numpy()
    assert mse(prediction, reference, mask) == pytest.approx(mean_squared_error(r, p), rel=1e-5)
    assert mae(prediction, reference, mask) == pytest.approx(np.abs(r - p).mean(), rel=1e-5)
    for data_range in (1, 5.5):
        expected = peak_signal_noise_ratio(r, p, data_range=data_range)
        assert psnr(prediction, reference, mask, data_range) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("shape", [(30, 23, 26), (12, 11, 40), (31, 40)])
@pytest.mark.parametrize("data_range", [1.0, 6.0])
def test_ssim_is_scikit_images_map_averaged_over_the_mask(shape, data_range):
    prediction, reference, mask = pair(shape)
    expected = skimage_ssim_map(prediction, reference, data_range)
    assert ssim(prediction, reference, mask, data_range) == pytest.approx(expected[mask.numpy()].mean(), abs=1e-5)
    everywhere = torch.ones_like(mask)
    assert ssim(prediction, reference, everywhere, data_range) == pytest.approx(expected.mean(), abs=1e-5)


@pytest.mark.parametrize("voxel", [(0, 0, 0), (29, 22, 25), (15, 3, 12), (4, 21, 6)])
def test_ssim_of_one_voxel_is_that_of_the_whole_volumes_map(voxel):
    # The bounding box is one voxel, so an error in the crop or in the mirroring shows in full.
    prediction, reference, _ = pair((30, 23, 26))
    mask = torch.zeros(30, 23, 26, dtype=torch.bool)
    mask[voxel] = True
    expected = skimage_ssim_map(prediction, reference, 2.0)[voxel]
    assert ssim(prediction, reference, mask, 2.0) == pytest.approx(expected, abs=1e-5)


def test_ssim_of_raw_intensities_keeps_its_precision():
    prediction, reference, mask = pair((20, 23, 26))
    prediction, reference = 900 + 300 * prediction, 900 + 300 * reference
    expected = skimage_ssim_map(prediction, reference, 2000.0)[mask.numpy()].mean()
    assert ssim(prediction, reference, mask, 2000.0) == pytest.approx(expected, abs=1e-5)


def test_identical_images():
    _, reference, mask = pair((12, 13, 14))
    assert mse(reference, reference, mask) == 0
    assert mae(reference, reference, mask) == 0
    assert psnr(reference, reference, mask, 1.0) == math.inf
    assert ssim(reference, reference, mask, 1.0) == pytest.approx(1, abs=1e-6)


def test_voxels_outside_the_mask_do_not_count():
    prediction, reference, mask = pair((20, 23, 26))
    before = [metric(prediction, reference, mask) for metric in (mse, mae)]
    prediction[~mask] = 1e6
    assert [metric(prediction, reference, mask) for metric in (mse, mae)] == before


def test_a_channel_axis_of_one_changes_nothing():
    prediction, reference, mask = pair((12, 13, 14))
    for images in ((prediction[None], reference[None], mask[None]), (prediction[None], reference[None], mask)):
        assert mse(*images) == mse(prediction, reference, mask)
        assert psnr(*images, 2.0) == psnr(prediction, reference, mask, 2.0)
        assert ssim(*images, 2.0) == ssim(prediction, reference, mask, 2.0)


def test_an_empty_mask_is_nan():
    prediction, reference, mask = pair((12, 13, 14))
    empty = torch.zeros_like(mask)
    values = [metric(prediction, reference, empty) for metric in (mse, mae)]
    values += [metric(prediction, reference, empty, 1.0) for metric in (psnr, ssim)]
    assert np.isnan(values).all()


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize("data_range", [0, -1.0, math.nan, math.inf])
def test_a_data_range_that_is_none_is_refused(metric, data_range):
    with pytest.raises(ValueError, match="data_range"):
        metric(*pair((12, 13, 14)), data_range)


def test_broadcasting_and_float_masks_are_refused():
    prediction, reference, mask = pair((12, 13, 14))
    with pytest.raises(ValueError, match="bool mask"):
        mse(prediction, reference, mask.float())
    with pytest.raises(ValueError, match=r"\(12, 13, 14\), \(13, 14\)"):
        mae(prediction, reference[0], mask)
    with pytest.raises(ValueError, match="found"):
        mse(prediction.expand(2, -1, -1, -1), reference.expand(2, -1, -1, -1), mask.expand(2, -1, -1, -1))


def test_every_image_is_rescaled_by_its_own_extremes():
    x = torch.tensor([[[0.0, 5, 10], [0, 2, 1]], [[4, 6, 8], [3, 3, 3]]])  # (subjects, sequences, voxels)
    expected = torch.tensor([[[0, 0.5, 1], [0, 1, 0.5]], [[0, 0.5, 1], [0, 0, 0]]])
    assert torch.equal(unit_range(x), expected)
    for shape in ((2, 2, 3, 1), (2, 2, 1, 3, 1)):  # slices, volumes
        assert torch.equal(unit_range(x.reshape(shape)), expected.reshape(shape))


def test_the_background_is_the_minimum_also_of_a_z_scored_image():
    assert unit_range(torch.tensor([[[0.0, -2, 1, 2, 0]]])).tolist() == [[[0, 0, 0.75, 1, 0]]]
    scan = torch.tensor([[[0.0, 100, 150, 400]]])  # its background is its minimum already
    assert torch.equal(unit_range(scan), scan / 400)
