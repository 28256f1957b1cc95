import json
import weakref
from itertools import product

import numpy as np
import pytest
import torch

from mrgen.errors import UserError
from mrgen.papers.brain_clustering import BrainClustering, Pair
from mrgen.protocols import Synthesizer
from tests.papers.brain_clustering_tools import clustering, halves, pair, same

# ----- settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("macro", "total"), [(3, 102), (4, 100), (5, 100), (6, 102)])
def test_the_micro_count_is_a_total_of_about_100(macro, total):
    assert BrainClustering(macro=macro).micro == total / macro
    assert BrainClustering(macro=macro, micro_total=2 * macro).micro == 2
    assert BrainClustering(macro=macro, micro_per_macro=100).micro == 100


def test_the_table_of_one_pair_has_as_many_rows_as_micro_clusters():
    source, target = pair(shape=(60, 60, 12), noise=12, target_noise=24)
    total = clustering(micro_per_macro=None, micro_total=30).fit([(source, target)])
    assert [len(keys) for keys, _ in total.tables()] == [10, 10, 10]
    each = clustering(micro_per_macro=20).fit([(source, target)])
    assert [len(keys) for keys, _ in each.tables()] == [20, 20, 20]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"macro": 3, "micro_total": 100}, "micro_total is 100, expected a multiple of macro=3, such as 99"),
        ({"macro": 5, "micro_total": 0}, "such as 5"),
        ({"micro_total": 100, "micro_per_macro": 20}, "give one of them"),
        ({"micro_per_macro": 0}, "micro_per_macro is 0"),
        ({"macro": 0}, "macro is 0"),
        ({"width": 0}, "width 0"),
        ({"levels": 10**5}, "levels 100000"),
        ({"mode": "test"}, "mode is test .*expected train or search"),
        ({"matching": "greedy"}, "matching greedy; .*assignment or conditional_mean"),
        ({"source": "t2"}, "source and target are both t2"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        BrainClustering(**settings)


def test_settings_are_keyword_only():
    with pytest.raises(TypeError):
        BrainClustering("t1")


# ----- fit and query ----------------------------------------------------------------------------------------------


def test_a_query_by_hand():
    model = BrainClustering(macro=2, micro_per_macro=1, remove_outliers=False)
    model.fit([(halves(40, 100), halves(200, 60))])  # f_0: 0.4 → 1, f_1: 1 → 0.3
    assert np.allclose(model.synthesize(halves(40, 100)), halves(200, 60) / 200)
    assert np.allclose(model.synthesize(halves(80, 160)), halves(250, 60) / 200)  # 0.5 is beyond 0.4: 1 · 0.5 / 0.4


def test_the_source_alone_loses_its_outliers():
    model = BrainClustering(macro=2, micro_per_macro=1)
    source, target = halves(40, 100), halves(200, 60)
    source[1, 1, 0], target[2, 2, 1] = 1000, 260
    model.fit([(source, target)])
    (keys, values), _ = model.tables()
    bright = (34 * 200 + 260) / 35 / 260  # the target keeps its outlier
    assert (keys, values) == (pytest.approx([0.4]), pytest.approx([bright]))
    made = model.synthesize(source)
    assert made[1, 1, 0] == pytest.approx(bright)  # a hole of one voxel is filled by the median
    assert made.max() == pytest.approx(bright)


def test_the_median_looks_at_the_slice_and_fills_the_background_too():
    model = BrainClustering(macro=1, micro_per_macro=1, remove_outliers=False)
    volume = np.zeros((5, 5, 3), np.int16)
    volume[:, :3, 1] = 100
    volume[2, 2, 1] = 0  # a corner of the background with five bright voxels around it
    made = model.fit([(volume, volume)]).synthesize(volume)
    assert made[2, 2, 1] == 1
    assert np.array_equal(made[:, :, [0, 2]], np.zeros((5, 5, 2)))


def test_a_mask_says_what_is_brain():
    source, target = pair()
    brain = source > 0
    model = clustering().fit([(source, target)])
    dirty = [np.where(brain, v, 77).astype(np.int16) for v in (source, target)]
    masked = clustering().fit([(*dirty, brain)])
    assert same(model, masked)
    assert np.array_equal(masked.synthesize(dirty[0], brain), model.synthesize(source))


def test_fitting_in_parts_is_fitting_at_once():
    pairs = [pair(seed) for seed in range(3)]
    at_once = clustering().fit(pairs)
    parts = clustering().fit(pairs[:1]).partial_fit(pairs[1:2])
    parts.synthesize(pairs[0][0])
    assert same(parts.partial_fit(pairs[2:]), at_once)
    assert same(at_once.fit(pairs[:1]), clustering().fit(pairs[:1]))  # fit forgets what was before


def test_fit_holds_one_pair_at_a_time():
    alive = []

    def several():
        for seed in range(3):
            assert all(reference() is None for reference in alive)
            source, target = pair(seed)
            alive[:] = [weakref.ref(source), weakref.ref(target)]
            yield source, target
            del source, target

    assert len(clustering().fit(several()).subjects) == 3


def test_the_same_scans_give_the_same_synthesis_in_every_type_and_memory_order():
    source, target = pair()
    expected = clustering().fit([(source, target)]).synthesize(source)
    for kind, order in product((np.uint16, np.int32, np.float32, np.float64), "CF"):
        s, t = (np.array(v, dtype=kind, order=order) for v in (source, target))
        assert np.allclose(clustering().fit([(s, t)]).synthesize(s), expected, atol=1e-6)
    assert expected.dtype == np.float32
    scaled = [(v / v.max()).astype(np.float32) for v in (source, target)]  # min–max beforehand changes nothing
    assert np.allclose(clustering().fit([scaled]).synthesize(scaled[0]), expected, atol=1e-6)


def test_it_learns_what_is_there_to_learn():
    model = BrainClustering(macro=3).fit([pair(seed) for seed in range(4)])
    source, target = pair(9)
    real, brain = target / target.max(), target > 0
    made = model.synthesize(source)
    assert np.mean((made - real)[brain] ** 2) < 0.5 * real[brain].var()
    assert 0 < model.subjects[0].agreement < 1


def test_quantised_scans_say_so():
    source, target = pair(shape=(40, 40, 12))
    noisy = source * np.random.default_rng(0).uniform(0.99, 1.01, source.shape)
    model = clustering(levels=256).fit([(source, target), (noisy, target)])
    assert [s.quantisation for s in model.subjects] == [0, 1 / 256]
    assert (model.query(source).quantisation, model.query(noisy).quantisation) == (0, 1 / 256)


# ----- conditional mean (ours) -------------------------------------------------------------------------------------


def test_the_conditional_mean_has_a_lower_error_and_survives_scaling_by_its_own_maximum():
    pairs = [pair(seed, shape=(60, 50, 10), target_noise=60) for seed in range(3)]
    source, target = pair(9, shape=(60, 50, 10), target_noise=60)
    real, brain = target / target.max(), source > 0
    printed = clustering().fit(pairs)
    ours = clustering(matching="conditional_mean").fit(pairs)
    errors = {}
    for name, model in (("printed", printed), ("ours", ours)):
        made = model.synthesize(source)
        errors[name] = [np.mean((scaled - real)[brain] ** 2) for scaled in (made, made / made.max())]
    assert errors["ours"][0] < errors["printed"][0]
    assert errors["ours"][1] == pytest.approx(errors["ours"][0])
    made = ours.synthesize(source)
    assert made.max() == pytest.approx(np.mean([s.reach for s in ours.subjects]))
    assert np.mean(made[brain] > max(values.max() for _, values in ours.tables())) < 0.01


def test_the_conditional_mean_of_a_few_broad_levels_is_left_as_it_is():
    model = BrainClustering(macro=2, micro_per_macro=1, remove_outliers=False, matching="conditional_mean")
    target = halves(200, 60)
    target[0] = 100
    made = model.fit([(halves(40, 100), target)]).synthesize(halves(40, 100))
    assert np.unique(made) == pytest.approx([60 / 200, (24 * 200 + 12 * 100) / 36 / 200])


# ----- protocol and artefact --------------------------------------------------------------------------------------


def test_it_answers_the_protocol_with_tensors():
    model = clustering(source="t1ce", target="flair").fit([pair()])
    assert isinstance(model, Synthesizer)
    assert (model.sources, model.targets) == (("t1ce",), ("flair",))
    volumes = np.stack([pair(seed)[0] for seed in (1, 2)]).astype(np.float32)[:, None]
    made = model.synthesize({"t1ce": torch.from_numpy(volumes), "t1": torch.zeros(1)})
    assert (made.scale, made.variance, made.mean.dtype) == ("unit", None, torch.float32)
    assert made.mean.shape == (2, 1, 16, 14, 6)
    for one, volume in zip(made.mean[:, 0], volumes[:, 0], strict=True):
        assert np.array_equal(one.numpy(), model.synthesize(volume))
    with pytest.raises(ValueError, match=r"expected \(B, 1, X, Y, Z\)"):
        model.synthesize({"t1ce": torch.zeros(1, 2, 3, 3, 3)})


@pytest.mark.parametrize("mode", ["train", "search"])
@pytest.mark.parametrize("matching", ["assignment", "conditional_mean"])
def test_an_artefact_comes_back_as_it_was(tmp_path, mode, matching):
    model = clustering(mode=mode, matching=matching, width=2, source="t1ce", levels=100)
    model.fit([Pair(*pair(seed), None, f"p{seed}") for seed in range(3)]).save(tmp_path)
    again = BrainClustering.load(str(tmp_path))
    assert again.settings() == model.settings()
    assert [s.id for s in again.subjects] == ["p0", "p1", "p2"]
    query = pair(9)[0]
    assert np.array_equal(again.synthesize(query), model.synthesize(query))
    assert same(again.partial_fit([pair(4)]), model.partial_fit([pair(4)]))
    again.save(tmp_path)  # over the first
    assert len(BrainClustering.load(tmp_path).subjects) == 4


def test_an_artefact_holds_no_objects(tmp_path):
    clustering(mode="search").fit([pair()]).save(tmp_path)
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".npz", ".npy"}
    with np.load(tmp_path / "entries.npz", allow_pickle=False) as file:
        assert all(file[name].dtype != object for name in file)
    np.save(tmp_path / "source_0000.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read"):
        BrainClustering.load(tmp_path).synthesize(pair()[0])


def test_what_is_no_artefact_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"estimator\.json: cannot be read .*expected a fitted BrainClustering"):
        BrainClustering.load(tmp_path)
    clustering().fit([pair()]).save(tmp_path)
    file = tmp_path / "estimator.json"
    table = json.loads(file.read_text())
    for changes, message in (({"kind": "Random"}, "found Random 1"), ({"version": 2}, "found BrainClustering 2")):
        file.write_text(json.dumps({**table, **changes}))
        with pytest.raises(UserError, match=message):
            BrainClustering.load(tmp_path)
    file.write_text(json.dumps(table))
    (tmp_path / "entries.npz").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        BrainClustering.load(tmp_path)


def test_an_unfitted_model_says_so(tmp_path):
    with pytest.raises(ValueError, match="not fitted"):
        BrainClustering().synthesize(pair()[0])
    with pytest.raises(ValueError, match="not fitted"):
        BrainClustering().save(tmp_path)
    with pytest.raises(UserError, match="found no training pair"):
        BrainClustering().fit([])


# ----- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (halves(40, 100), halves(60, 70), "patient7: t1: found 2 distinct intensities, expected 3 or more"),
        (pair(shape=(6, 6, 2), background=False)[0], halves(60, 70), "patient7: t2: found 2 distinct intensities"),
        (halves(0, 0), halves(60, 70), "patient7: t1: found no voxel above the background"),
        (halves(60, 70), halves(0, 0), "patient7: t2: found no voxel above the background"),
        (halves(60, 0), halves(0, 70), "patient7: found no voxel that is foreground in source and target both"),
        (halves(60, 70), halves(60, 70)[:5], r"patient7: found arrays of \(6, 6, 2\), \(5, 6, 2\)"),
        (halves(60, 70)[0], halves(60, 70)[0], r"patient7: found arrays of \(6, 2\), \(6, 2\)"),
        (halves(60, 70) * np.nan, halves(60, 70), "patient7: t1: found"),
        (halves(-60, 70), halves(60, 70), "patient7: t1: found 50% .*not z-scores"),
    ],
)
def test_a_pair_that_teaches_nothing_is_named(source, target, message):
    with pytest.raises(UserError, match=message):
        clustering().fit([Pair(source, target, None, "patient7")])


def test_a_brain_mask_that_is_empty_is_named():
    with pytest.raises(UserError, match="0: t1: found no voxel above the background"):
        clustering().fit([(*pair(), np.zeros((16, 14, 6), bool))])


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (halves(40, 100), "found 2 distinct intensities, expected 3 or more"),
        (halves(0, 0), "found no voxel above the background"),
        (halves(0, 0) + np.nan, "found NaN"),
    ],
)
@pytest.mark.parametrize("mode", ["train", "search"])
def test_a_query_that_nothing_can_be_made_from_is_refused(query, message, mode):
    with pytest.raises(UserError, match=message):
        clustering(mode=mode).fit([pair(shape=(6, 6, 2), background=False)]).synthesize(query)


def test_a_query_must_be_a_volume():
    model = clustering().fit([pair()])
    with pytest.raises(ValueError, match=r"expected \(X, Y, Z\) both"):
        model.synthesize(pair()[0][0])
    with pytest.raises(ValueError, match=r"expected \(X, Y, Z\) both"):
        model.synthesize(pair()[0], np.ones((3, 3, 3), bool))


@pytest.mark.parametrize("matching", ["assignment", "conditional_mean"])
@pytest.mark.parametrize("seed", range(12))
def test_a_synthesis_is_always_finite(seed, matching):
    rng = np.random.default_rng(seed)

    def odd():
        volume = rng.exponential(float(rng.choice([1e-6, 1, 1e6])), (7, 6, 5)) * (rng.random((7, 6, 5)) < 0.7)
        return volume.round() if rng.random() < 0.5 and volume.max() > 50 else volume

    macro = int(rng.integers(1, 7))
    model = BrainClustering(macro=macro, matching=matching, mode=["train", "search"][seed % 2], width=2)
    made = model.fit([(odd(), odd()) for _ in range(3)]).synthesize(odd())
    assert np.isfinite(made).all()
    assert made.min() >= 0
