import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from mrgen.papers.brain_clustering.preprocessing import preprocess
from mrgen.papers.brain_clustering.tables import Table, interpolate, learn_pair, merge


def learned(voxels, *, macro, micro, matching="assignment"):
    """Entries of hand-made (source, target) voxels as (macro, key, value), in hundredths of the range."""
    source, target = (preprocess(np.array(side), remove_outliers=False) for side in zip(*voxels, strict=True))
    assert (source.scaling.top, target.scaling.top) == (100, 100)  # so that unit intensities read as hundredths
    entries = learn_pair(source, target, macro=macro, micro=micro, matching=matching)
    rows = zip(entries.macro.tolist(), entries.key * 100, entries.value * 100, strict=True)
    return [(t, round(key, 6), round(value, 6)) for t, key, value in rows]


# ----- a training pair (section 2, steps 1 to 3) -------------------------------------------------------------------


def test_dark_in_one_sequence_may_be_bright_in_the_other():
    voxels = [(30, 100)] * 3 + [(100, 40)] * 3
    assert learned(voxels, macro=2, micro=1) == [(0, 30, 100), (1, 100, 40)]


def test_the_matching_is_the_best_of_all_and_not_each_clusters_own():
    voxels = [(30, 40)] * 5 + [(30, 100)] * 4 + [(100, 40)] * 4  # both source clusters overlap most with 40
    assert learned(voxels, macro=2, micro=1) == [(0, 30, 100), (1, 100, 40)]
    assert learned(voxels, macro=1, micro=2) == [(0, 30, 100), (0, 100, 40)]


def test_the_value_is_the_mean_of_the_whole_matched_micro_cluster():
    voxels = [(50, 20)] * 5 + [(100, 100)] * 5 + [(100, 26)]  # 26 is in the cluster of 20, by another source cluster
    assert learned(voxels, macro=1, micro=2) == [(0, 50, 21), (0, 100, 100)]
    conditional = learned(voxels, macro=1, micro=2, matching="conditional_mean")
    assert conditional == [(0, 50, 20), (0, 100, round((5 * 100 + 26) / 6, 6))]


def test_voxels_of_one_scan_alone_do_not_count():
    voxels = [(50, 20)] * 5 + [(100, 100)] * 5
    assert learned([*voxels, *[(60, 0)] * 9, *[(0, 40)] * 9], macro=1, micro=2) == learned(voxels, macro=1, micro=2)


def test_a_macro_cluster_of_fewer_intensities_has_a_micro_cluster_for_each():
    voxels = [(10, 90), (12, 95), (14, 100), (100, 10)] * 2
    assert learned(voxels, macro=2, micro=3) == [(0, 10, 90), (0, 12, 95), (0, 14, 100), (1, 100, 10)]


def test_of_unequal_numbers_of_micro_clusters_the_smaller_is_matched_whole():
    voxels = [(10, 90), (12, 90), (14, 90), (14, 90), (90, 90), (100, 100)]
    assert learned(voxels, macro=1, micro=9) == [(0, 14, 90), (0, 100, 100)]


def test_a_macro_pair_without_common_voxels_is_matched_all_the_same():
    voxels = [(30, 40)] * 9 + [(30, 100)] * 1 + [(100, 40)] * 2  # 9 + 0 is more than 1 + 2
    assert learned(voxels, macro=2, micro=1) == [(0, 30, 40), (1, 100, 100)]


def as_printed(source, target, macro, micro):
    """Steps 1 to 3 over voxels, by sets of voxels, with k-means of the package that the authors use."""
    kmeans1d = pytest.importorskip("kmeans1d")

    def clusters(values, members, k):
        labels = np.array(kmeans1d.cluster(values[members].tolist(), k).clusters)
        return [members[labels == c] for c in range(k)]

    def match(these, those):
        overlap = np.array([[len(np.intersect1d(a, b)) for b in those] for a in these])
        return zip(*linear_sum_assignment(-overlap), strict=True)

    voxels = np.arange(len(source))
    macros = clusters(source, voxels, macro), clusters(target, voxels, macro)
    entries = []
    for i, j in match(*macros):
        both = np.intersect1d(macros[0][i], macros[1][j])
        these, those = clusters(source, macros[0][i], micro), clusters(target, macros[1][j], micro)
        common = [np.intersect1d(a, both) for a in these], [np.intersect1d(b, both) for b in those]
        entries += [(i, source[these[a]].mean(), target[those[b]].mean()) for a, b in match(*common)]
    return np.array(sorted(entries))


@pytest.mark.parametrize("seed", range(4))
def test_it_is_what_the_paper_does_voxel_by_voxel(seed):
    rng = np.random.default_rng(seed)
    source = rng.integers(1, 200, 6000)
    target = (400 - source + rng.normal(0, 20, 6000)).round().astype(int)
    scans = [preprocess(side, remove_outliers=False) for side in (source, target)]
    entries = learn_pair(*scans, macro=3, micro=5, matching="assignment")
    found = np.stack([entries.macro, entries.key, entries.value], axis=1)
    assert np.allclose(found, as_printed(source / source.max(), target / target.max(), 3, 5))
    assert np.all(entries.common <= entries.voxels)
    assert entries.voxels.sum() == 6000


# ----- tables -----------------------------------------------------------------------------------------------------


def test_the_running_mean_falls_as_well_as_rises():
    table = Table()
    for value, expected in ((0.8, 0.8), (0.2, 0.5), (0.5, 0.5), (0.9, 0.6)):  # |a2 − f| would give 0.8, 1.1, 1.3 …
        table.add(0.25, value)
        keys, values = table.arrays()
        assert keys.tolist() == [0.25]
        assert values[0] == pytest.approx(expected)


def test_between_rows_it_is_linear_and_beyond_them_proportional():
    table = Table()
    table.add(0.4, 0.8)
    table.add(0.2, 0.6)
    assert interpolate(table, np.array([0.2, 0.25, 0.3, 0.4])) == pytest.approx([0.6, 0.65, 0.7, 0.8])
    assert interpolate(table, np.array([0.1, 0.05])) == pytest.approx([0.3, 0.15])  # 0.6 · x / 0.2
    assert interpolate(table, np.array([0.5, 1.0])) == pytest.approx([1.0, 2.0])  # 0.8 · x / 0.4


def test_every_macro_cluster_has_its_own_table_over_all_pairs():
    pairs = [[(30, 100)] * 3 + [(100, 40)] * 3, [(30, 50)] * 3 + [(40, 50)] + [(100, 100)] * 3]
    several = []
    for voxels in pairs:
        scans = [preprocess(np.array(side), remove_outliers=False) for side in zip(*voxels, strict=True)]
        several.append(learn_pair(*scans, macro=2, micro=1, matching="assignment"))
    (keys0, values0), (keys1, values1) = (table.arrays() for table in merge(several, 2))
    assert (keys0, values0) == (pytest.approx([0.3, 0.325]), pytest.approx([1.0, 0.5]))
    assert (keys1, values1) == (pytest.approx([1.0]), pytest.approx([0.7]))  # one key twice: (0.4 + 1) / 2
