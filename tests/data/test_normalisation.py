import numpy as np
import pytest
import torch

from mrgen.data.normalisation import (
    Gaussian,
    MinMax,
    Stored,
    Symmetric,
    ZScore,
    measured_statistics,
    stored_statistics,
)
from mrgen.data.store import Store, write_subject
from mrgen.errors import UserError

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
    assert torch.equal(Stored(masked=False)(image + 1, brain, []), image.float() + 1)


def test_normalisations_say_whether_the_background_is_0():
    assert [kind().outside for kind in (ZScore, MinMax, Stored, Symmetric, Gaussian)] == [0, 0, 0, -1, None]
    assert Stored(masked=False).outside is None


# ----- Gaussian, of Li et al. ------------------------------------------------------------------------------------

LI = {"t1": 30, "flair": 70}  # where a head begins


@pytest.fixture(scope="module")
def elderly(wmh_store):
    return list(Store(wmh_store).subjects.values())


def volume_of(*rows):
    """One slice, (X, Y, 1)."""
    return np.array(rows, np.int16)[..., None]


def test_gaussian_by_hand():
    """The head is a frame of 40 and 60 around a dark hole of 10, which counts; the 5 and 25 outside do not."""
    scan = volume_of([5, 5, 5, 5, 5], [25, 40, 60, 40, 5], [5, 60, 10, 60, 5], [5, 40, 60, 40, 5], [5, 5, 5, 5, 5])
    head = [40, 60, 40, 60, 10, 60, 40, 60, 40]
    brain = np.zeros(scan.shape, bool)
    found = Gaussian(LI).measure(scan, brain, "t1", None)
    assert found == {"head_mean": pytest.approx(np.mean(head)), "head_std": pytest.approx(np.std(head))}
    out = Gaussian(LI)(torch.from_numpy(scan)[None], torch.from_numpy(brain), [found])
    assert out.dtype == torch.float32
    np.testing.assert_allclose(out[0].numpy(), (scan - np.mean(head)) / np.std(head), rtol=1e-6)


def test_a_voxel_of_the_threshold_is_head():
    scan = volume_of([29, 30, 90], [0, 0, 0], [0, 0, 0])
    assert Gaussian(LI).measure(scan, scan > 0, "t1", None)["head_mean"] == 60


def test_holes_are_filled_slice_by_slice_as_scipy_does():
    """A hole that is open above or below is closed in its slice; one that touches the slice's end is none."""
    from scipy.ndimage import binary_fill_holes

    rng = np.random.default_rng(0)
    scan = np.where(rng.random((14, 15, 12)) < 0.62, rng.integers(30, 99, (14, 15, 12)), 0)
    filled = np.stack([binary_fill_holes(scan[..., z] >= 30) for z in range(12)], axis=2)
    assert (filled & (scan < 30)).sum() > 20  # holes there are
    assert not np.array_equal(filled, binary_fill_holes(scan >= 30))  # and it matters where
    found = Gaussian(LI).measure(scan, np.zeros(scan.shape, bool), "t1", None)
    assert found == {
        "head_mean": pytest.approx(scan[filled].mean()),
        "head_std": pytest.approx(scan[filled].std()),
    }


def test_sequences_have_heads_and_statistics_of_their_own(elderly):
    from scipy.ndimage import binary_fill_holes

    gaussian = Gaussian(LI)
    for subject in elderly[:2]:
        for name, threshold in LI.items():
            scan = subject.read_image([name])[0]
            head = np.stack([binary_fill_holes(part >= threshold) for part in scan.transpose(2, 0, 1)], axis=2)
            expected = {"head_mean": scan[head].mean(), "head_std": scan[head].std()}
            assert gaussian.of(subject, name) == pytest.approx(expected)
            assert stored_statistics(gaussian, subject, [name]) == [gaussian.of(subject, name)]


def test_the_head_has_mean_0_and_std_1_and_the_background_stays_below(elderly):
    """Li et al. normalise all voxels; 0 in the background would be a head's own mean."""
    gaussian, subject = Gaussian(LI), elderly[0]
    scan = torch.from_numpy(subject.read_image(["t1", "flair"]))
    out = gaussian(scan, torch.from_numpy(subject.read_brain()), stored_statistics(gaussian, subject, ["t1", "flair"]))
    for channel, image, threshold in zip(out, scan, LI.values(), strict=True):
        above = channel[image >= threshold]  # without the holes
        assert float(above.mean()) == pytest.approx(0, abs=0.1)
        assert float(above.std()) == pytest.approx(1, abs=0.1)
        assert (channel[image == image.min()] == channel.min()).all()
        assert float(channel.min()) < -1
        order = image.flatten().argsort()
        assert (channel.flatten()[order].diff() >= 0).all()  # of every voxel, nothing clipped


def coded(shape=(20, 24, 3)):
    """Every voxel is head, and each has a value of its own."""
    return np.arange(100, 100 + np.prod(shape)).reshape(shape)


@pytest.mark.parametrize("shape", [(20, 24, 3), (21, 23, 3), (19, 25, 2), (22, 17, 2)])
def test_statistics_are_taken_after_the_crop_around_the_middle(shape):
    scan = coded(shape)
    x, y = (max((n - m) // 2, 0) for n, m in zip(shape, (12, 18), strict=False))
    middle = scan[x : x + 12, y : y + 18]
    found = Gaussian(LI, size=(12, 18)).measure(scan, scan > 0, "t1", "Utrecht")
    assert found == {"head_mean": pytest.approx(middle.mean()), "head_std": pytest.approx(middle.std())}


def test_statistics_of_sites_that_are_cut_off_the_middle_are_those_of_whole_slices():
    scan = coded()
    gaussian = Gaussian(LI, size=(12, 18), whole_slices=["GE3T"])
    assert gaussian.measure(scan, scan > 0, "t1", "GE3T") == {
        "head_mean": pytest.approx(scan.mean()),
        "head_std": pytest.approx(scan.std()),
    }
    for site in ("Utrecht", "Singapore", None):
        assert gaussian.measure(scan, scan > 0, "t1", site) == Gaussian(LI, (12, 18)).measure(scan, scan > 0, "t1", "")
    assert gaussian.measure(scan, scan > 0, "t1", "Utrecht") != gaussian.measure(scan, scan > 0, "t1", "GE3T")


def test_holes_are_filled_before_the_crop_opens_them():
    scan = np.full((9, 9, 1), 50)
    scan[3:6, 2:7] = 0  # reaches the end of the crop but not of the slice
    found = Gaussian(LI, size=(5, 5)).measure(scan, scan > 0, "t1", None)
    assert found["head_mean"] == pytest.approx(50 * (25 - 15) / 25)


def test_without_thresholds_the_prepared_brain_is_the_head(subjects):
    """Skull-stripped cohorts, of which nobody knows the unit."""
    subject = subjects[0]
    found = Gaussian().of(subject, "flair")
    recorded = subject.statistics["flair"]
    assert found == pytest.approx({"head_mean": recorded["mean"], "head_std": recorded["std"]})


def test_a_scan_in_no_store_is_measured_alike(elderly):
    subject = elderly[0]
    scan, brain = subject.read_image(["t1"])[0], subject.read_brain()
    for normalisation in (Gaussian(LI, (40, 40)), ZScore()):
        expected = stored_statistics(normalisation, subject, ["t1"])
        assert [measured_statistics(normalisation, scan, brain, "t1", subject.site)] == expected


def test_a_subject_is_measured_once_and_anew_when_it_was_prepared_anew(tmp_path, wmh_store, monkeypatch):
    from mrgen.data.store import read_cohort, write_cohort

    layout = Store(wmh_store).layout
    write_cohort(tmp_path, layout, read_cohort(wmh_store)["modalities"])

    def written(value):
        image = np.full((2, 4, 4, 2), value)
        image[:, 0] += 50
        return write_subject(tmp_path, id="a", image=image, brain=image[0] > 0, affine=np.eye(4))

    measured = []
    measure = Gaussian.measure
    monkeypatch.setattr(Gaussian, "measure", lambda self, *a: measured.append(a[2]) or measure(self, *a))
    gaussian = Gaussian(LI)
    before = written(100)
    for _ in range(3):
        assert gaussian.of(before, "t1")["head_mean"] == 112.5
    assert measured == ["t1"]
    assert gaussian.of(written(200), "t1")["head_mean"] == 212.5
    gaussian.of(before, "flair")
    assert measured == ["t1", "t1", "flair"]


def test_gaussian_training_scale_brings_values_back_on_average(elderly):
    gaussian = Gaussian(LI)
    several = [gaussian.of(subject, "flair") for subject in elderly]
    offset, factor = gaussian.training_scale(several)
    assert offset == pytest.approx(np.mean([s["head_mean"] for s in several]))
    assert factor == pytest.approx(np.mean([s["head_std"] for s in several]))
    offset, factor = gaussian.training_scale(several[:1])
    scan = torch.from_numpy(elderly[0].read_image(["flair"]))
    np.testing.assert_allclose(offset + factor * gaussian(scan, scan[0] > 0, several[:1]), scan, atol=1e-2)


def test_thresholds_that_find_no_head_name_the_subject(elderly):
    subject = elderly[0]
    message = (
        rf"^{subject.id}, flair: found 0 voxels of head \(from 30000 on\) among values up to \d+; set data\.head to "
        "where the head begins in these intensities, or to null for the prepared brain mask"
    )
    with pytest.raises(UserError, match=message):
        Gaussian({"t1": 30, "flair": 30000}).of(subject, "flair")


def test_a_head_of_one_value_is_refused():
    with pytest.raises(UserError, match=r"t1: found 18 voxels of head \(from 30 on\) among values up to 80"):
        Gaussian(LI).measure(np.full((3, 3, 2), 80), np.ones((3, 3, 2), bool), "t1", None)
    with pytest.raises(UserError, match=r"t1: found 0 voxels of head \(the prepared brain mask\)"):
        Gaussian().measure(coded(), np.zeros(coded().shape, bool), "t1", None)


def test_a_sequence_without_a_threshold_is_named():
    with pytest.raises(UserError, match=r"data\.head names t1, flair, not t2; add \+data\.head\.t2=…"):
        Gaussian(LI).measure(coded(), coded() > 0, "t2", None)


def test_gaussian_leaves_its_input_as_it_was_and_wants_statistics_for_every_sequence():
    image = torch.rand(2, 3, 3, 3)
    before, one = image.clone(), {"head_mean": 0.5, "head_std": 0.1}
    Gaussian()(image, image[0] > 0, [one, one])
    assert torch.equal(image, before)
    with pytest.raises(ValueError):
        Gaussian()(image, image[0] > 0, [one])


def test_symmetric_spans_the_range_of_a_tanh_and_leaves_its_background_alone():
    image = torch.tensor([[[[0, 50, 100, 200, 300, -20, 70]]]], dtype=torch.int16)  # (1, 1, 1, 7)
    brain = torch.tensor([[[True] * 6 + [False]]])
    made = Symmetric()(image, brain, [{"p99_5": 200.0}])
    assert made.flatten().tolist() == pytest.approx([-1, -0.5, 0, 1, 1, -1, -1])
    assert Symmetric()(image, brain, [{"p99_5": 0.0}]).isfinite().all()


def test_symmetric_values_come_back_as_the_training_sets_mean_intensities():
    offset, factor = Symmetric().training_scale([{"p99_5": 200.0}, {"p99_5": 400.0}])
    assert [offset + factor * value for value in (-1, 0, 1)] == [0, 150, 300]
