import itertools

import numpy as np
import pytest

from mrgen.errors import UserError
from mrgen.papers.brain_clustering import kmeans
from mrgen.papers.brain_clustering.kmeans import kmeans_1d


def cost(values, weights, first):
    """Of intervals that begin at ``first``, straight from the definition."""
    parts = zip(np.split(values, first[1:]), np.split(weights, first[1:]), strict=True)
    return sum(float((w * (v - np.average(v, weights=w)) ** 2).sum()) for v, w in parts)


def least_of_all_partitions(values, weights, k):
    cuts = itertools.combinations(range(1, len(values)), k - 1)
    return min(cost(values, weights, [0, *c]) for c in cuts)


def histogram(n, seed=0):
    rng = np.random.default_rng(seed)
    voxels = np.concatenate([rng.normal(0.3, 0.08, 3 * n), rng.normal(0.6, 0.1, 5 * n), rng.uniform(0, 1, n)])
    counts = np.bincount((voxels.clip(0, 1) * n).astype(int))
    return np.flatnonzero(counts) / n, counts[counts > 0]


@pytest.mark.parametrize("seed", range(60))
def test_no_partition_is_better(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 10))
    values = np.sort(rng.choice(40, n, replace=False)).astype(float)
    weights = rng.integers(1, 9, n).astype(float)
    for k in range(1, n + 1):
        found = kmeans_1d(values, weights, k)
        assert found.cost == pytest.approx(least_of_all_partitions(values, weights, k), abs=1e-9)
        assert found.cost == pytest.approx(cost(values, weights, found.first), abs=1e-9)
        assert sorted(set(found.labels)) == list(range(k))
        for c in range(k):
            inside = found.labels == c
            assert found.means[c] == pytest.approx(np.average(values[inside], weights=weights[inside]))
            assert found.weights[c] == weights[inside].sum()


@pytest.mark.parametrize("seed", range(20))
def test_groups_are_clustered_apart_and_small_ones_give_a_cluster_a_value(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 9, 4)
    n = int(sizes.sum())
    values = np.sort(rng.choice(100, n, replace=False)).astype(float)
    weights = rng.integers(1, 9, n).astype(float)
    found = kmeans_1d(values, weights, 3, groups=np.repeat([2, 3, 5, 9], sizes))
    begin = np.cumsum(sizes) - sizes
    expected = [
        kmeans_1d(values[b : b + s], weights[b : b + s], min(3, int(s))) for b, s in zip(begin, sizes, strict=True)
    ]
    assert np.array_equal(found.first, np.concatenate([e.first + b for e, b in zip(expected, begin, strict=True)]))
    assert np.allclose(found.means, np.concatenate([e.means for e in expected]))
    assert found.cost == pytest.approx(sum(e.cost for e in expected))


@pytest.mark.parametrize(("n", "k"), [(50, 3), (700, 5), (700, 34), (3000, 6), (3000, 100)])
def test_it_costs_what_kmeans1d_costs_over_all_voxels(n, k):
    kmeans1d = pytest.importorskip("kmeans1d")
    values, counts = histogram(n)
    k = min(k, len(values))
    found = kmeans_1d(values, counts, k)
    voxels = np.repeat(values, counts)
    theirs = kmeans1d.cluster(voxels.tolist(), k)
    their_cost = float(((voxels - np.array(theirs.centroids)[theirs.clusters]) ** 2).sum())
    assert found.cost == pytest.approx(their_cost, rel=1e-9)


def test_the_order_in_which_rows_are_solved_changes_nothing(monkeypatch):
    values, counts = histogram(900)
    found = kmeans_1d(values, counts, 20)
    for fan in (2, 3, 16, 1000):
        monkeypatch.setattr(kmeans, "FAN", fan)
        other = kmeans_1d(values, counts, 20)
        assert np.array_equal(other.first, found.first)


def test_values_far_from_zero_lose_nothing():
    values, counts = histogram(300)
    near, far = kmeans_1d(values, counts, 12), kmeans_1d(values * 100 + 2**20, counts, 12)
    assert far.cost == pytest.approx(near.cost * 1e4, rel=1e-9)
    assert np.array_equal(near.first, far.first)


def test_of_equally_good_clusterings_the_same_one_is_found():
    values, counts = np.arange(3.0), np.ones(3)
    assert [kmeans_1d(values, counts, 2).labels.tolist() for _ in range(3)] == [[0, 1, 1]] * 3


def test_more_clusters_than_values_is_an_error_that_says_what_to_do():
    with pytest.raises(UserError, match=r"found 3 distinct intensities, expected 4 or more.*ask for fewer"):
        kmeans_1d(np.arange(3), np.ones(3), 4)


@pytest.mark.parametrize(
    ("values", "weights", "k"),
    [([1, 2], [1, 1], 0), ([], [], 1), ([2, 1], [1, 1], 1), ([1, 1], [1, 1], 1), ([1, 2], [1, 0], 1), ([1, 2], [1], 1)],
)
def test_what_is_no_histogram_is_refused(values, weights, k):
    with pytest.raises(ValueError, match="expected k of 1 or more, ascending values and a positive weight each"):
        kmeans_1d(np.array(values), np.array(weights), k)
