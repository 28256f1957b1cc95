import numpy as np
import pytest
import torch

from mrgen.data.normalisation import MinMax, Stored, ZScore
from mrgen.data.store import Store

MODALITIES = ("t1", "t1ce", "t2", "flair")


@pytest.fixture(scope="module")
def subjects(phantom_store):
    return list(Store(phantom_store).subjects.values())


def normalised(subject, box=None, modalities=MODALITIES):
    return ZScore()(
        torch.from_numpy(subject.read_image(modalities, box)),
        torch.from_numpy(subject.read_brain(box)),
        [subject.statistics[name] for name in modalities],
    )


def test_brain_has_mean_0_and_std_1_and_background_is_exactly_0(subjects):
    for subject in subjects[:3]:
        image, brain = normalised(subject), torch.from_numpy(subject.read_brain())
        assert image.dtype == torch.float32
        assert image.shape == (4, *subject.shape)
        for channel in image:
            assert float(channel[brain].mean()) == pytest.approx(0, abs=1e-4)
            assert float(channel[brain].std(correction=0)) == pytest.approx(1, abs=1e-4)
            assert torch.equal(channel[~brain], torch.zeros(int((~brain).sum())))


def test_intensities_beyond_the_brains_percentiles_are_clipped(subjects):
    image = subjects[0].read_image(["flair"])[0].astype(float)
    brain = subjects[0].read_brain()
    low, high = np.percentile(image[brain], [0.5, 99.5])
    assert image[brain].max() > high  # otherwise there is nothing to clip
    clipped = np.clip(image[brain], low, high)
    expected = (clipped - clipped.mean()) / clipped.std()
    got = normalised(subjects[0], modalities=["flair"])[0].numpy()[brain]
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_by_hand():
    image = torch.tensor([-50, 0, 10, 20, 90], dtype=torch.int16).view(1, 5, 1, 1)
    brain = torch.tensor([True, True, True, True, False]).view(5, 1, 1)
    statistics = {"p0_5": 0.0, "p99_5": 15.0, "clipped_mean": 5.0, "clipped_std": 10.0}
    out = ZScore()(image, brain, [statistics])
    assert out.flatten().tolist() == [-0.5, -0.5, 0.5, 1.0, 0.0]


@pytest.mark.parametrize("box", [((5, 21), (8, 24), (4, 20)), ((-4, 20), (30, 54), (16, 40))])
def test_a_patch_and_the_whole_volume_agree_voxel_for_voxel(subjects, box):
    whole = torch.nn.functional.pad(normalised(subjects[0]), [16] * 6)
    (x0, x1), (y0, y1), (z0, z1) = box
    expected = whole[:, x0 + 16 : x1 + 16, y0 + 16 : y1 + 16, z0 + 16 : z1 + 16]
    assert expected.any()
    assert torch.equal(normalised(subjects[0], box), expected)


def test_each_sequence_is_normalised_by_its_own_statistics_whatever_the_order(subjects):
    forwards, backwards = normalised(subjects[0]), normalised(subjects[0], modalities=MODALITIES[::-1])
    assert torch.equal(forwards, backwards.flip(0))


def test_the_input_is_left_as_it_was():
    image, brain = torch.rand(1, 4, 4, 4), torch.ones(4, 4, 4, dtype=torch.bool)
    before = image.clone()
    ZScore()(image, brain, [{"p0_5": 0.2, "p99_5": 0.8, "clipped_mean": 0.5, "clipped_std": 0.1}])
    assert torch.equal(image, before)


def test_a_constant_sequence_is_0_and_not_nan():
    statistics = {"p0_5": 7.0, "p99_5": 7.0, "clipped_mean": 7.0, "clipped_std": 0.0}
    out = ZScore()(torch.full((1, 2, 2, 2), 7), torch.ones(2, 2, 2, dtype=torch.bool), [statistics])
    assert torch.equal(out, torch.zeros(1, 2, 2, 2))


def test_statistics_must_be_as_many_as_sequences(subjects):
    with pytest.raises(ValueError):
        ZScore()(torch.zeros(2, 2, 2, 2), torch.ones(2, 2, 2, dtype=torch.bool), [subjects[0].statistics["t1"]])


def test_training_scale_brings_values_back_to_intensities(subjects):
    subject = subjects[0]
    s, brain = subject.statistics["t1"], subject.read_brain()
    offset, factor = ZScore().training_scale([s])
    intensities = offset + factor * normalised(subject, modalities=["t1"])[0].numpy()[brain]
    expected = subject.read_image(["t1"])[0][brain].clip(s["p0_5"], s["p99_5"])
    np.testing.assert_allclose(intensities, expected, rtol=1e-4)


def test_training_scale_of_several_subjects_is_right_on_average(subjects):
    zscore, several = ZScore(), [subject.statistics["t2"] for subject in subjects]
    offset, factor = zscore.training_scale(several)
    each = np.array([zscore.training_scale([s]) for s in several])
    assert np.ptp(each[:, 0]) > 0  # the subjects differ
    for value in (-1.0, 0.0, 2.0):
        assert offset + factor * value == pytest.approx(float((each[:, 0] + each[:, 1] * value).mean()))


# ----- min–max ---------------------------------------------------------------------------------------------------


def test_min_max_by_hand():
    image = torch.tensor([[-3, 0, 50, 200, 400]], dtype=torch.int16).reshape(1, 5, 1, 1)
    brain = torch.tensor([1, 1, 1, 1, 0], dtype=torch.bool).reshape(5, 1, 1)
    unit = MinMax()(image, brain, [{"max": 200.0}])  # the brain's maximum; 400 lies outside
    assert unit.flatten().tolist() == [0, 0, 0.25, 1, 0]
    assert MinMax().training_scale([{"max": 200.0}, {"max": 300.0}]) == (0, 250)


def test_min_max_of_a_scan_without_signal_is_0():
    image, brain = torch.zeros(1, 2, 2, 2), torch.ones(2, 2, 2, dtype=torch.bool)
    assert not MinMax()(image, brain, [{"max": 0.0}]).any()


def test_min_max_of_a_subject_reaches_1_in_every_sequence(subjects):
    for subject in subjects[:2]:
        brain = torch.from_numpy(subject.read_brain())
        unit = MinMax()(torch.from_numpy(subject.read_image()), brain, list(subject.statistics.values()))
        assert unit.dtype == torch.float32
        assert unit.amax((1, 2, 3)).tolist() == [1.0] * 4
        assert float(unit.min()) == 0


def test_stored_intensities_are_left_alone_within_the_brain(subjects):
    image, brain = torch.from_numpy(subjects[0].read_image()), torch.from_numpy(subjects[0].read_brain())
    stored = Stored()(image, brain, [])
    assert torch.equal(stored[:, brain], image[:, brain].float())
    assert not stored[:, ~brain].any()
