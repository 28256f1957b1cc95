"""Hand-made scans and a small model for the tests of BrainClustering."""

import numpy as np

from mrgen.papers.brain_clustering import BrainClustering


def pair(seed=0, shape=(16, 14, 6), noise=6.0, target_noise=12.0, background=True):
    """A T1 of three tissues in a background of 0, and a T2 of the opposite order."""
    rng = np.random.default_rng(seed)
    tissue = (np.indices(shape)[0] * 3 // shape[0]).clip(0, 2)
    source = np.array([40, 80, 120])[tissue] + rng.normal(0, noise, shape)
    target = np.array([200, 110, 60])[tissue] + rng.normal(0, target_noise, shape)
    brain = np.zeros(shape, bool)
    edge = slice(2, -2) if background else slice(None)
    brain[edge, edge] = True
    return tuple((np.rint(v).clip(1) * brain).astype(np.int16) for v in (source, target))


def halves(left, right):
    """(6, 6, 2): two halves of one intensity, at whose border a 3×3 median changes nothing."""
    volume = np.full((6, 6, 2), left, np.int16)
    volume[3:] = right
    return volume


def clustering(**changes):
    return BrainClustering(**{"macro": 3, "micro_per_macro": 4, "remove_outliers": False, **changes})


def same(a, b):
    return all(
        np.array_equal(x, y) for f, g in zip(a.tables(), b.tables(), strict=True) for x, y in zip(f, g, strict=True)
    )
