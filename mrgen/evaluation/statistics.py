"""How sure a mean over subjects is, and whether a difference between two methods may be chance.

The subject is the unit throughout: voxels and slices of one subject are no independent observations. What varies here
is the sample of subjects; how much another training of the same network would differ is not in these numbers.
"""

import math
from collections.abc import Sequence

import numpy as np

__all__ = ["bootstrap_interval", "holm", "paired_wilcoxon"]

FEWEST = 6  # of fewer pairs no two-sided signed-rank test can fall below 0.05: its smallest p is 2 / 2^n


def bootstrap_interval(
    values: Sequence[float], *, level: float = 0.95, resamples: int = 9999, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval for the mean over subjects.

    Bias-corrected and accelerated (BCa; Efron, "Better Bootstrap Confidence Intervals", JASA 1987), because scores are
    skewed: Dice piles up at 0 and 1, errors have a tail, and the percentile interval ignores that. Of few subjects
    every bootstrap interval is too narrow.

    Args:
        values: one a subject; nan values are skipped.
        level: between 0 and 1.
        resamples: number of bootstrap samples.
        seed: the interval is a function of the values and of this.

    Returns:
        (low, high). Values that are all equal give themselves; fewer than 2 values, or infinite ones, (nan, nan).
    """
    from scipy.stats import bootstrap

    sample = np.asarray(values, dtype=float)
    sample = sample[~np.isnan(sample)]
    if len(sample) < 2:
        return math.nan, math.nan
    if np.allclose(sample, sample[0], rtol=1e-12, atol=0):
        return float(sample.min()), float(sample.max())
    if np.isinf(sample).any():
        return math.nan, math.nan
    found = bootstrap(
        (sample,),
        np.mean,
        confidence_level=level,
        n_resamples=resamples,
        method="BCa",
        random_state=np.random.default_rng(seed),  # `rng` from SciPy 1.15 on, which still takes this name
    ).confidence_interval
    return float(found.low), float(found.high)


def paired_wilcoxon(values: Sequence[float], reference: Sequence[float]) -> float | None:
    """Two-sided p of the Wilcoxon signed-rank test over subjects, as ``scipy.stats.wilcoxon`` computes it.

    Subjects without a difference are dropped (Wilcoxon's own rule); few subjects without ties exactly.

    Args:
        values: one a subject.
        reference: the same subjects in the same order; subjects with a nan in either are skipped.

    Returns:
        From 0 to 1; 1 where no subject differs; None where fewer than 6 subjects have both values.

    Raises:
        ValueError: the two differ in length.
    """
    from scipy.stats import wilcoxon

    x, y = np.asarray(values, dtype=float), np.asarray(reference, dtype=float)
    if x.shape != y.shape:
        raise ValueError(f"expected the same subjects twice, found {len(x)} and {len(y)} values")
    both = ~(np.isnan(x) | np.isnan(y))
    x, y = x[both], y[both]
    if len(x) < FEWEST:
        return None
    return 1.0 if np.array_equal(x, y) else float(wilcoxon(x, y).pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment, which keeps the chance of any false positive in the family below the level.

    The smallest of m p-values is multiplied by m, the next by m − 1, and so on; none may fall below the one before it
    ("A Simple Sequentially Rejective Multiple Test Procedure", Scand J Stat 1979).

    Args:
        p_values: the family; None where there was no test, which does not count.

    Returns:
        In the order given, from 0 to 1, None where None was.
    """
    adjusted: list[float | None] = [None] * len(p_values)
    tested = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    largest = 0.0
    for rank, (p, i) in enumerate(tested):
        largest = min(1.0, max(largest, p * (len(tested) - rank)))
        adjusted[i] = largest
    return adjusted
