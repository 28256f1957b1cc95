import numpy as np
import pytest
import torch
from scipy import ndimage

from mrgen.errors import UserError
from mrgen.papers.brain_clustering import BrainClustering, Complementary, Constant, Nothing, Random
from mrgen.protocols import Synthesizer


def scan(seed=0, shape=(12, 10, 6)):
    rng = np.random.default_rng(seed)
    volume = rng.integers(20, 101, shape).astype(np.int16)
    volume[:3], volume[:, :, 0] = 0, 0
    return volume


@pytest.mark.parametrize("kind", [Complementary, Random, Constant, Nothing])
def test_every_baseline_is_an_estimator_like_the_others(tmp_path, kind):
    source, target = scan(0), scan(1)
    model = kind(source="t1ce", target="flair").fit([(source, target)])
    assert isinstance(model, Synthesizer)
    assert (model.sources, model.targets) == (("t1ce",), ("flair",))
    made = model.synthesize(source)
    assert (made.shape, made.dtype) == (source.shape, np.float32)
    assert np.isfinite(made).all()
    tensors = model.synthesize({"t1ce": torch.from_numpy(source.astype(np.float32))[None, None]})
    assert tensors.scale == "unit"
    assert np.array_equal(tensors.mean[0, 0].numpy(), made)
    model.save(tmp_path)
    again = kind.load(tmp_path)
    assert np.array_equal(again.synthesize(source), made)
    assert again.settings() == model.settings()
    with pytest.raises(UserError, match=f"found {kind.__name__} 1, expected BrainClustering 1"):
        BrainClustering.load(tmp_path)


def test_complementary_mirrors_the_foreground_after_the_outlier_step():
    source = scan()
    source[5, 5, 3] = 1000
    foreground = (source > 0) & (source < 1000)
    mirrored = np.where(foreground, source[foreground].min() + 100.0 - source, 0) / 100
    expected = ndimage.median_filter(mirrored, size=(3, 3, 1), mode="nearest")
    assert np.allclose(Complementary().synthesize(source), expected)


def test_complementary_as_printed_makes_the_background_brightest():
    source = scan()
    assert np.allclose(Complementary(over="all").synthesize(source), 1 - source / source.max())


def test_random_is_uniform_on_the_foreground_and_the_same_again():
    source = scan(shape=(40, 40, 12))
    made = Random(seed=3).synthesize(source)
    assert np.array_equal(made > 0, source > 0)
    assert made[source > 0].mean() == pytest.approx(0.5, abs=0.01)
    assert made[source > 0].var() == pytest.approx(1 / 12, abs=0.003)
    assert np.array_equal(Random(seed=3).synthesize(source), made)
    assert not np.array_equal(Random(seed=4).synthesize(source), made)


def test_constant_is_the_mean_of_the_training_targets_foreground():
    first, second = np.zeros((4, 4, 2), np.int16), np.zeros((4, 4, 2), np.int16)
    first[:2], first[2] = 50, 100  # 50 50 100: 2/3 of its maximum
    second[0] = 10  # 1
    made = Constant().fit([(first, first), (first, second)]).synthesize(scan())
    assert np.allclose(made, np.where(scan() > 0, (2 / 3 + 1) / 2, 0))


def test_constant_must_be_fitted():
    with pytest.raises(ValueError, match="not fitted"):
        Constant().synthesize(scan())
    with pytest.raises(UserError, match="found no training pair"):
        Constant().fit([])


def test_nothing_is_zeros():
    assert not Nothing().synthesize(scan()).any()


@pytest.mark.parametrize("kind", [Complementary, Random, Constant])
def test_a_mask_says_what_is_brain(kind):
    source = scan()
    brain = source > 0
    model = kind().fit([(source, source)])
    assert np.array_equal(model.synthesize(np.where(brain, source, 55), brain), model.synthesize(source))


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="over is voxels; expected foreground or all"):
        Complementary(over="voxels")
