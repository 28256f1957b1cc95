"""Optimal k-means in one dimension, over distinct values with weights.

In one dimension the clusters of an optimal k-means are intervals, so that the best k of them are found exactly by a
dynamic programme (Wu 1991; Grønlund et al. 2017, the paper's references 36 and 10). A scan has a million voxels but a
few thousand distinct intensities: clustering those, each weighted by its voxels, gives the same clusters.
"""

from dataclasses import dataclass

import numpy as np

from mrgen.errors import UserError

__all__ = ["Clusters", "kmeans_1d"]

FAN = 4  # rows of the programme are solved at every FAN-th place first, and then between; speed alone depends on it


@dataclass(frozen=True)
class Clusters:
    """Clusters of ascending values.

    Attributes:
        labels: (n,) the cluster of each value, ascending from 0; no cluster is empty.
        first: (K,) where each cluster begins.
        means: (K,) weighted mean of each cluster.
        weights: (K,) its weight.
        cost: the weighted sum of squared distances to the means.
    """

    labels: np.ndarray
    first: np.ndarray
    means: np.ndarray
    weights: np.ndarray
    cost: float


def kmeans_1d(values: np.ndarray, weights: np.ndarray, k: int, groups: np.ndarray | None = None) -> Clusters:
    """The k intervals of least weighted squared error.

    Their cost is that of an optimal clustering up to rounding: the programme's sums have a relative error of some
    1e-15 of the values' weighted variance.

    Args:
        values: (n,) ascending, without repetition.
        weights: (n,) positive, such as the voxels that have the value.
        k: how many clusters.
        groups: (n,) ascending labels; each group is clustered apart, into ``k`` clusters or, where it has fewer values,
            one a value. Default: one group, which must have ``k`` values.

    Returns:
        The clusters, ascending, those of the first group first.

    Raises:
        UserError: fewer distinct values than clusters.
    """
    values = np.asarray(values, dtype=np.float64)
    weights = np.asarray(weights, dtype=np.float64)
    n = len(values)
    if k < 1 or n == 0 or len(weights) != n or weights.min() <= 0 or np.any(np.diff(values) <= 0):
        raise ValueError(f"k is {k}, {n} values; expected k of 1 or more, ascending values and a positive weight each")
    if groups is None and k > n:
        raise UserError(
            f"found {n} distinct intensities, expected {k} or more to form {k} clusters; ask for fewer clusters, or "
            "look whether the scan was saved in too few grey levels"
        )
    starts = np.zeros(1, np.intp) if groups is None else np.flatnonzero(np.diff(groups, prepend=groups[0] - 1))
    first = _boundaries(_centred(values, weights, starts), weights, starts, k)
    labels = np.zeros(n, np.intp)
    labels[first[1:]] = 1
    labels = labels.cumsum()
    totals = np.add.reduceat(weights, first)
    means = np.add.reduceat(weights * values, first) / totals
    return Clusters(labels, first, means, totals, float(weights @ (values - means[labels]) ** 2))


def _centred(values: np.ndarray, weights: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Values around the mean of their group, where sums of squares lose least to rounding."""
    means = np.add.reduceat(weights * values, starts) / np.add.reduceat(weights, starts)
    return values - np.repeat(means, np.diff(starts, append=len(values)))


def _boundaries(values: np.ndarray, weights: np.ndarray, starts: np.ndarray, k: int) -> np.ndarray:
    """Where the best clusters begin.

    D_q[i], the least cost of q clusters for a group's values up to i, is min_j D_{q-1}[j - 1] + cost(j, i), j being
    where the last cluster begins. The best j never falls when i grows, so that a row between two solved rows need look
    between their two j only; all rows of one stage, of all groups, are searched at once.
    """
    n = len(values)
    ends = np.append(starts[1:], n)
    start = np.repeat(starts, ends - starts)  # (n,) of the group that a value belongs to
    w, s, q = (np.concatenate([[0.0], np.cumsum(weights * values**power)]) for power in (0, 1, 2))
    rows = np.arange(n)
    d = q[1:] - q[start] - (s[1:] - s[start]) ** 2 / (w[1:] - w[start])  # D_1
    best_j = [start]
    stages = _stages(n)
    for clusters in range(2, min(k, int((ends - starts).max())) + 1):
        feasible = rows - start >= clusters - 1
        lowest = start + clusters - 1
        j_of, d_new = start.copy(), np.full(n, np.inf)
        # cost(j, i) = q_i - q_j - (s_i - s_j)² / (w_i - w_j), of which q_i is the same for every j
        before = np.concatenate([[np.inf], d[:-1]]) - q[:-1]
        for between, left, right in stages:
            keep = feasible[between]
            row = between[keep]
            if not len(row):
                continue
            low = np.maximum(j_of[left[keep]], lowest[row])
            high = np.where(right[keep] < n, np.minimum(j_of[np.minimum(right[keep], n - 1)], row), row)
            width = high - low + 1
            offset = np.cumsum(width) - width
            j = np.arange(width.sum()) + np.repeat(low - offset, width)
            cost = before[j] - (np.repeat(s[row + 1], width) - s[j]) ** 2 / (np.repeat(w[row + 1], width) - w[j])
            least = np.minimum.reduceat(cost, offset)
            hits = np.flatnonzero(cost == np.repeat(least, width))
            j_of[row] = j[hits[np.searchsorted(hits, offset)]]  # the first j of several equal ones
            d_new[row] = least + q[row + 1]
        d = d_new
        best_j.append(j_of)
    first = []
    for a, b in zip(starts, ends, strict=True):  # back through the programme, from each group's last value
        i, cuts = b, []
        for layer in best_j[min(k, b - a) - 1 :: -1]:
            i = layer[i - 1]
            cuts.append(i)
        first += cuts[::-1]
    return np.array(first)


def _stages(n: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Rows to solve in turn, and the solved rows at their left and right (n or more: none); row 0 needs no solving."""
    stages = []
    stride = 1
    while stride < n:
        stride *= FAN
    while stride > 1:
        step = stride // FAN
        between = np.arange(0, n, step)
        between = between[between % stride != 0]
        left = between // stride * stride
        stages.append((between, left, left + stride))
        stride = step
    return stages
