import math
import warnings

import numpy as np
import pytest
from scipy import stats

from mrgen.evaluation.statistics import bootstrap_interval, holm, paired_wilcoxon


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def scores(n=30, seed=0):
    return np.random.default_rng(seed).beta(5, 1, n)


# ----- the interval ----------------------------------------------------------------------------------------------


def test_the_interval_is_scipys_bca():
    values = scores()
    expected = stats.bootstrap(
        (values,), np.mean, method="BCa", n_resamples=2000, random_state=np.random.default_rng(3)
    ).confidence_interval
    assert bootstrap_interval(values, resamples=2000, seed=3) == (expected.low, expected.high)
    low, high = bootstrap_interval(values)
    assert low < values.mean() < high


def test_the_interval_is_a_function_of_values_and_seed():
    values = list(scores())
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values) != bootstrap_interval(values, seed=1)


def test_a_level_is_what_the_interval_covers():
    """Of many samples about 95 in 100 intervals hold the true mean; a higher level gives a wider interval."""
    held = 0
    for seed in range(200):
        low, high = bootstrap_interval(np.random.default_rng(seed).normal(2, 1, 40), resamples=500)
        held += low <= 2 <= high
    assert 180 <= held <= 197
    narrow, wide = bootstrap_interval(scores(), level=0.5), bootstrap_interval(scores(), level=0.99)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_nan_values_are_skipped():
    values = list(scores())
    assert bootstrap_interval([math.nan, *values, math.nan]) == bootstrap_interval(values)


@pytest.mark.parametrize("values", [[], [0.5], [math.nan, 0.5], [1.0, 2.0, math.inf]])
def test_no_interval_where_none_can_be(values):
    assert all(math.isnan(bound) for bound in bootstrap_interval(values))


def test_equal_values_are_their_own_interval():
    assert bootstrap_interval([0.7] * 5) == (0.7, 0.7)
    assert bootstrap_interval([0.0, 0.0]) == (0, 0)
    assert bootstrap_interval([0.3, 0.1 + 0.2]) == (0.3, 0.1 + 0.2)  # equal but for rounding


@pytest.mark.parametrize("values", [[0, 1], [0, 0, 0, 0, 1], [1, 1, 0.5], [0] * 45 + [373.13]])
def test_few_and_lopsided_values_have_an_interval_within_their_range(values):
    low, high = bootstrap_interval(values)
    assert min(values) <= low <= np.mean(values) <= high <= max(values)


# ----- the test --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [6, 13, 40, 80])
def test_p_is_scipys(n):
    x, y = scores(n), scores(n, seed=1)
    assert paired_wilcoxon(x, y) == stats.wilcoxon(x, y).pvalue == paired_wilcoxon(y, x)


def test_p_by_hand():
    """All of six differ the same way: of 2^6 equally likely patterns of signs, two are as extreme."""
    assert paired_wilcoxon([1, 2, 3, 4, 5, 6], [0] * 6) == 2 / 64


def test_subjects_count_where_both_values_are():
    x, y = list(scores(12)), list(scores(12, seed=1))
    x[3] = y[7] = math.nan
    kept = [i for i in range(12) if i not in (3, 7)]
    assert paired_wilcoxon(x, y) == stats.wilcoxon([x[i] for i in kept], [y[i] for i in kept]).pvalue


def test_fewer_than_six_pairs_are_not_tested():
    assert paired_wilcoxon([1, 2, 3, 4, 5], [0] * 5) is None
    assert paired_wilcoxon([1, 2, 3, 4, 5, math.nan], [0] * 6) is None
    assert paired_wilcoxon([], []) is None


def test_no_difference_anywhere_is_p_1():
    assert paired_wilcoxon(scores(8), scores(8)) == 1.0
    assert paired_wilcoxon([0, 0, 0, 0, 0, 1], [0] * 6) == 1.0


def test_other_subjects_are_refused():
    with pytest.raises(ValueError, match="found 2 and 3 values"):
        paired_wilcoxon([1, 2], [1, 2, 3])


# ----- the adjustment --------------------------------------------------------------------------------------------


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx(
        [0.03, 0.06, 0.06, 0.02]
    )  # 3 · 0.01, –, 2 · 0.03, 4 · 0.005


def test_holm_is_its_definition():
    """Rejected at a level is what the step-down procedure rejects at it."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        p_values = rng.beta(0.3, 2, size=rng.integers(1, 9)).tolist()
        for level in (0.01, 0.05, 0.2):
            rejected = set()
            for step, i in enumerate(np.argsort(p_values)):
                if p_values[i] > level / (len(p_values) - step):
                    break
                rejected.add(int(i))
            assert {i for i, p in enumerate(holm(p_values)) if p <= level} == rejected


def test_holm_is_monotone_capped_and_leaves_a_single_test_alone():
    p_values = [0.9, 0.5, 0.02, 0.02, 0.6]
    adjusted = holm(p_values)
    assert [adjusted[i] for i in np.argsort(p_values)] == sorted(adjusted)
    assert adjusted == pytest.approx([1, 1, 0.1, 0.1, 1])
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


def test_what_was_not_tested_does_not_count():
    assert holm([None, 0.01, None, 0.04]) == [None, pytest.approx(0.02), None, pytest.approx(0.04)]
    assert holm([None, None]) == [None, None]
