import numpy as np
import pytest
from scipy import ndimage

from mrgen.errors import UserError
from mrgen.papers.brain_clustering.preprocessing import foreground_box, median_per_slice, preprocess, quantile


def scan(seed=0, shape=(9, 8, 7)):
    """Whole numbers around 100, some bright outliers, background 0 at two faces."""
    rng = np.random.default_rng(seed)
    volume = rng.normal(100, 15, shape).round().clip(1).astype(np.int16)
    volume[rng.random(shape) < 0.02] = 400
    volume[0], volume[:, :, -1] = 0, 0
    return volume


def unit(volume, **settings):
    done = preprocess(volume, **{"remove_outliers": True, **settings})
    return done.levels[done.codes]


def as_printed(volume):
    """Standardise over the foreground, the outlier step, min–max: word for word."""
    foreground = volume > 0
    standard = (volume - volume[foreground].mean()) / volume[foreground].std()
    q1, q3 = np.percentile(standard[foreground], [25, 75])
    standard[standard > q3 + 1.5 * (q3 - q1)] = standard.min()
    return (standard - standard.min()) / (standard.max() - standard.min())


# ----- intensities ------------------------------------------------------------------------------------------------


def test_outliers_become_background_and_the_rest_min_max():
    volume = np.array([[[0, 1, 2, 3, 4, 100]]])  # Q1 2, Q3 4, cut 7
    assert unit(volume).tolist() == [[[0, 0.25, 0.5, 0.75, 1, 0]]]
    assert unit(volume, remove_outliers=False).tolist() == [[[0, 0.01, 0.02, 0.03, 0.04, 1]]]


def test_the_quartiles_are_those_of_the_foreground():
    volume = np.array([[[0] * 100 + [1, 2, 3, 4, 100]]])  # over all voxels Q3 is 0 and every voxel would go
    assert unit(volume)[0, 0, 100:].tolist() == [0.25, 0.5, 0.75, 1, 0]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", [np.int16, np.int32, np.float32, np.float64])
def test_standardising_first_changes_nothing(seed, kind):
    volume = scan(seed)
    assert (volume == 400).any()
    assert np.allclose(unit(volume.astype(kind)), as_printed(volume.astype(float)), atol=1e-12)


@pytest.mark.parametrize("kind", [np.int16, np.float32])
def test_scaling_alone_does_the_same(kind):
    volume = scan().astype(kind)
    volume[3, 3, 3] = -4
    done = preprocess(volume, remove_outliers=True)
    assert np.allclose(done.scaling(volume), done.levels[done.codes], atol=1e-6)
    assert np.array_equal(np.bincount(done.codes.ravel(), minlength=len(done.counts))[1:], done.counts[1:])


def test_ringing_below_zero_is_background_and_does_not_shift_the_scan():
    volume = scan()
    expected = unit(volume)
    volume[0, 0, :3] = (-50, -20, -1)
    assert np.array_equal(unit(volume), expected)


def test_a_float_scan_of_few_intensities_is_exact():
    volume = scan() / np.float32(759)
    done = preprocess(volume, remove_outliers=True)
    assert done.quantisation == 0
    assert np.count_nonzero(done.counts) == len(np.unique(unit(scan()))) - 1


@pytest.mark.parametrize("levels", [64, 4096])
def test_a_float_scan_of_many_intensities_is_quantised_and_says_so(levels):
    rng = np.random.default_rng(0)
    volume = rng.uniform(0, 7, 300_000).astype(np.float32)
    volume[:1000] = 0
    done = preprocess(volume, remove_outliers=False, levels=levels)
    assert done.quantisation == 1 / levels
    assert np.abs(done.levels[done.codes] - volume / volume.max()).max() < done.quantisation
    assert np.count_nonzero(done.counts) <= levels
    means = np.bincount(done.codes, weights=volume)[1:] / np.bincount(done.codes)[1:]  # of a level's voxels: exact
    assert np.allclose(done.levels[1:] * volume.max(), means)


@pytest.mark.parametrize("q", [0, 0.25, 0.3, 0.75, 0.999, 1])
def test_quantiles_of_counts_are_numpys(q):
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 100):
        values, counts = np.arange(n) ** 1.5, rng.integers(0, 5, n)
        counts[-1] += 1
        assert quantile(values, counts, (q,))[0] == pytest.approx(np.quantile(np.repeat(values, counts), q))


@pytest.mark.parametrize(
    ("volume", "message"),
    [
        (np.zeros((2, 2, 2)), "found no voxel above the background"),
        (np.zeros((2, 2, 2), np.int16) - 3, "found no voxel above the background"),
        (np.zeros((0,)), "found no voxel above the background"),
        (np.array([[[0.0, 1.0, np.nan]]]), "found NaN or infinite"),
        (np.array([[[0.0, 1.0, np.inf]]]), "found NaN or infinite"),
        (np.array([[[-1.0, 0.0, 1.0]]]), "found 50% of the non-zero voxels below 0.*not z-scores"),
    ],
)
def test_what_is_no_scan_is_refused(volume, message):
    with pytest.raises(UserError, match=message):
        preprocess(volume, remove_outliers=True)


def test_the_box_is_around_what_is_both_bright_and_brain():
    volume, brain = np.zeros((5, 6, 7)), np.zeros((5, 6, 7), bool)
    volume[1:4, 2:5, 0:6], brain[2:5, :, 3:] = 1, True
    assert foreground_box(volume, None) == ((1, 4), (2, 5), (0, 6))
    assert foreground_box(volume, brain) == ((2, 4), (2, 5), (3, 6))
    assert foreground_box(volume * 0, None) == ((0, 5), (0, 6), (0, 7))


# ----- the median -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 8, 7), (1, 1, 1), (1, 5, 3), (40, 2, 1), (64, 50, 30)])
@pytest.mark.parametrize("kind", [np.uint16, np.float32])
def test_the_median_is_scipys_in_every_axial_slice(shape, kind):
    volume = np.random.default_rng(0).integers(0, 60, shape).astype(kind)
    assert np.array_equal(median_per_slice(volume), ndimage.median_filter(volume, size=(3, 3, 1), mode="nearest"))


def test_the_median_is_2d():
    volume = np.zeros((5, 5, 5), np.uint16)
    volume[:, :, 2] = 1  # a bright slice between dark ones: a 3D median would lose it
    assert np.array_equal(median_per_slice(volume), volume)
    volume[2, 2, :] = 9  # a line along z is a speck in every slice: a 3D median would see no more of it
    assert median_per_slice(volume).max() == 1
