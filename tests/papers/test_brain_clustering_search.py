from pathlib import Path

import numpy as np
import pytest

from mrgen.data.layouts import Layout
from mrgen.data.store import Store, write_cohort, write_subject
from mrgen.data.stored_subject import BRAIN, IMAGE
from mrgen.errors import UserError
from mrgen.papers.brain_clustering import BrainClustering, Location, Pair
from mrgen.papers.brain_clustering.preprocessing import preprocess
from tests.papers.brain_clustering_tools import clustering, pair


def unit_error(a, b):
    return np.mean((a / a.max() - b / b.max()) ** 2)  # over the whole volume, background included


def test_search_trains_on_the_nearest_sources():
    pairs = [pair(seed, noise=4 + seed) for seed in range(6)]
    pairs[2] = tuple(np.roll(v, 2, axis=0) for v in pairs[2])  # the same tissue elsewhere is far away
    query = pair(9, noise=4)[0]
    nearest = np.argsort([unit_error(query, source) for source, _ in pairs])
    model = clustering(mode="search", width=3).fit(pairs)
    answer = model.query(query)
    assert answer.subjects == tuple(str(i) for i in nearest[:3])
    trained = clustering().fit([pairs[i] for i in nearest[:3]])
    assert np.array_equal(answer.volume, trained.synthesize(query))
    assert not np.array_equal(answer.volume, clustering().fit(pairs).synthesize(query))


def test_the_distance_is_the_mse_of_preprocessed_volumes_over_all_voxels():
    source, target = pair(0)
    source[3, 3, 3] = 900  # an outlier, gone after preprocessing
    query = pair(1)[0]
    model = clustering(mode="search", remove_outliers=True).fit([(source, target)])
    units = [preprocess(v, remove_outliers=True) for v in (query, source)]
    a, b = (u.levels[u.codes] for u in units)
    box = ((2, 14), (2, 12), (0, 6))
    assert model.subjects[0].scan.squared_error(a, box) == pytest.approx(np.mean((a - b) ** 2), rel=1e-5)


def test_with_fewer_training_subjects_than_asked_for_search_takes_all():
    model = clustering(mode="search", width=10).fit([pair(0), pair(1)])
    assert sorted(model.query(pair(2)[0]).subjects) == ["0", "1"]


def stored(folder, seed, mask):
    """A pair whose source lies as a prepared store has it: channels first, mask as uint8 beside it."""
    source, target = pair(seed)
    brain = np.zeros(source.shape, bool)
    brain[3:-2, 2:-3] = True
    np.save(folder / f"{seed}.npy", np.stack([target, source]))
    np.save(folder / f"{seed}_brain.npy", brain.astype(np.uint8))
    location = Location(str(folder / f"{seed}.npy"), 1, str(folder / f"{seed}_brain.npy") if mask else None)
    return Pair(source, target, brain if mask else None, f"patient{seed}", location)


@pytest.mark.parametrize("mask", [True, False])
def test_search_reads_the_training_volumes_from_where_they_lie(tmp_path, mask):
    pairs = [stored(tmp_path, seed, mask) for seed in range(4)]
    query = pair(9)[0]
    model = clustering(mode="search", width=2).fit(pairs)
    in_memory = clustering(mode="search", width=2).fit([p._replace(location=None) for p in pairs])
    model.save(tmp_path / "artefact")
    again = BrainClustering.load(tmp_path / "artefact")
    assert not list((tmp_path / "artefact").glob("*.npy"))
    expected = in_memory.query(query)
    assert expected.subjects[0].startswith("patient")
    for one in (model, again):
        answer = one.query(query)
        assert answer.subjects == expected.subjects
        assert np.array_equal(answer.volume, expected.volume)


def test_a_prepared_stores_arrays_are_such_places(tmp_path):
    layout = Layout.from_conf(Path(__file__).parents[2] / "conf" / "data" / "layout" / "brats2019.yaml")
    write_cohort(tmp_path, layout, ("t2", "t1"))
    pairs = []
    for seed in range(3):
        source, target = pair(seed)
        write_subject(tmp_path, id=f"s{seed}", image=np.stack([target, source]), brain=source > 0, affine=np.eye(4))
    for id_, subject in Store(tmp_path).subjects.items():
        image = subject.read_image(["t1", "t2"])
        location = Location(str(subject.path / IMAGE), subject.modalities.index("t1"), str(subject.path / BRAIN))
        pairs.append(Pair(*image, subject.read_brain(), id_, location))
    query = pair(1)[0]
    assert clustering(mode="search", width=2).fit(pairs).query(query).subjects[0] == "s1"


def test_search_without_locations_keeps_the_volumes_in_the_artefact(tmp_path):
    model = clustering(mode="search", width=2).fit([pair(seed) for seed in range(3)])
    query = pair(9)[0]
    model.save(tmp_path / "a")
    for old, new in (("a", "b"), ("b", "c")):
        again = BrainClustering.load((tmp_path / old).rename(tmp_path / new))
        assert np.array_equal(again.synthesize(query), model.synthesize(query))
        again.save(tmp_path / new)


def test_search_says_what_is_missing(tmp_path):
    model = clustering(mode="search").fit([stored(tmp_path, 0, True)])
    with pytest.raises(UserError, match=r"found a query of \(8, 9, 5\), expected \(16, 14, 6\)"):
        model.synthesize(pair(shape=(8, 9, 5), background=False)[0])
    np.save(tmp_path / "0.npy", np.zeros((2, 3, 3, 3)))
    with pytest.raises(UserError, match=r"found \(3, 3, 3\), expected \(16, 14, 6\) as in training"):
        model.synthesize(pair(1)[0])
    (tmp_path / "0.npy").write_text("no array")
    with pytest.raises(UserError, match="cannot be read"):
        model.synthesize(pair(1)[0])
    (tmp_path / "0.npy").unlink()
    with pytest.raises(UserError, match=r"cannot be read .*mode=train"):
        model.synthesize(pair(1)[0])
    with pytest.raises(ValueError, match="expected both"):
        model.partial_fit([stored(tmp_path, 1, True)._replace(brain=None)])
    trained = clustering().fit([pair(0)])
    trained.mode = "search"
    with pytest.raises(UserError, match="learned with mode=train"):
        trained.synthesize(pair(1)[0])
