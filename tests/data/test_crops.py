import numpy as np
import pytest

from mrgen.data.crops import BrainBox, LesionPatch, RandomPatch
from mrgen.data.layouts import Layout
from mrgen.data.store import Store, write_cohort, write_subject
from mrgen.errors import UserError
from mrgen.launch.paths import CONF_DIR

RNG = np.random.default_rng(0)  # BrainBox does not draw


def stored(folder, brain, id="A", label=None):
    """A subject whose image numbers its voxels, so that a crop shows where it came from."""
    write_cohort(folder, Layout.from_conf(CONF_DIR / "data" / "layout" / "brats2019.yaml"), ["t1"])
    label = np.zeros(brain.shape, np.uint8) if label is None else label
    image = np.arange(1, brain.size + 1, dtype=np.int16).reshape(1, *brain.shape)
    return write_subject(folder, id=id, image=image, brain=brain, label=label, affine=np.eye(4))


def box_of_ones(shape, *ranges):
    brain = np.zeros(shape, bool)
    brain[tuple(slice(*r) for r in ranges)] = True
    return brain


@pytest.mark.parametrize("divisor", [1, 4, 8, 16])
def test_brain_box_holds_every_brain_of_the_cohort_in_one_size(phantom_store, divisor):
    subjects = list(Store(phantom_store).subjects.values())
    crop = BrainBox(divisor=divisor)
    crop.fit(subjects)
    largest = np.max([[b - a for a, b in s.brain_box] for s in subjects], axis=0)
    for size, extent in zip(crop.size, largest, strict=True):
        assert size % divisor == 0
        assert extent <= size < extent + divisor  # as small as can be
    for subject in subjects:
        box = crop(subject, RNG)
        assert tuple(b - a for a, b in box) == crop.size
        inside = subject.read_brain(box)
        assert inside.shape == crop.size
        assert inside.sum() == subject.read_brain().sum()  # nothing is cut


def test_brain_box_is_centred_on_the_brain(phantom_store):
    subjects = list(Store(phantom_store).subjects.values())
    crop = BrainBox(size=(48, 48, 48))
    crop.fit(subjects)
    for subject in subjects:
        for (start, stop), (low, high) in zip(crop(subject, RNG), subject.brain_box, strict=True):
            assert abs((low - start) - (stop - high)) <= 1


def test_a_given_size_is_kept(phantom_store):
    crop = BrainBox(size=(40, 48, 40), divisor=8)
    crop.fit(Store(phantom_store).subjects.values())
    assert crop.size == (40, 48, 40)


def test_a_size_that_would_cut_a_brain_names_the_subject(tmp_path):
    small = stored(tmp_path, box_of_ones((20, 20, 20), (6, 12), (6, 12), (6, 12)), "small")
    large = stored(tmp_path, box_of_ones((20, 20, 20), (6, 12), (2, 11), (6, 12)), "large")
    BrainBox(size=(8, 16, 8)).fit([small, large])
    with pytest.raises(UserError, match=r"^large: the brain spans \(6, 9, 6\) voxels and .* \(8, 8, 8\)"):
        BrainBox(size=(8, 8, 8)).fit([small, large])


@pytest.mark.parametrize("size", [(8, 8), (8, 8, 12), (8, 8, 0), (8, 8, -8)])
@pytest.mark.parametrize("crop", [BrainBox, RandomPatch, LesionPatch])
def test_sizes_that_no_network_takes_are_refused(crop, size):
    with pytest.raises(UserError, match="expected three multiples of 8"):
        crop(size=size, divisor=8)


def test_a_box_that_exceeds_the_volume_is_padded(tmp_path):
    subject = stored(tmp_path, box_of_ones((6, 5, 4), (0, 6), (0, 5), (0, 4)))
    crop = BrainBox(divisor=8)
    crop.fit([subject])
    box = crop(subject, RNG)
    assert crop.size == (8, 8, 8)
    assert box == ((-1, 7), (-2, 6), (-2, 6))
    padded = np.pad(subject.read_image(), [(0, 0), (1, 1), (2, 1), (2, 2)])
    assert np.array_equal(subject.read_image(box=box), padded)
    assert subject.read_brain(box).sum() == 6 * 5 * 4


def ring(shape=(32, 32, 32)):
    """A hollow brain whose box is mostly no brain: a patch centred anywhere in the box would miss it."""
    brain = box_of_ones(shape, (10, 22), (10, 22), (10, 22))
    brain[11:21, 11:21, 11:21] = False
    return brain


def test_every_patch_is_centred_on_a_brain_voxel(tmp_path):
    subject, crop = stored(tmp_path, ring()), RandomPatch(size=(8, 8, 8))
    brain, rng = subject.read_brain(), np.random.default_rng(0)
    for _ in range(100):
        box = crop(subject, rng)
        assert brain[tuple(start + 4 for start, _ in box)]


def test_no_patch_of_a_real_cohort_is_empty_or_leaves_the_volume(phantom_store):
    crop, rng = RandomPatch(size=(16, 16, 16)), np.random.default_rng(0)
    for subject in Store(phantom_store).subjects.values():
        for _ in range(20):
            box = crop(subject, rng)
            assert all(a >= 0 and b <= n and b - a == 16 for (a, b), n in zip(box, subject.shape, strict=True))
            assert subject.read_brain(box).any()


def test_every_brain_voxel_can_be_the_centre(tmp_path):
    brain = np.zeros((24, 24, 24), bool)
    wanted = {(10, 10, 10), (13, 10, 10), (10, 13, 13), (13, 13, 13)}
    for voxel in wanted:
        brain[voxel] = True
    subject, crop, rng = stored(tmp_path, brain), RandomPatch(size=(8, 8, 8)), np.random.default_rng(0)
    assert {tuple(start + 4 for start, _ in crop(subject, rng)) for _ in range(60)} == wanted


def test_near_a_border_the_patch_is_pushed_back_and_still_holds_its_centre(tmp_path):
    brain = np.zeros((20, 20, 20), bool)
    brain[0, 19, 10] = True
    box = RandomPatch(size=(8, 8, 8))(stored(tmp_path, brain), np.random.default_rng(0))
    assert box == ((0, 8), (12, 20), (6, 14))


def test_an_axis_shorter_than_the_patch_is_padded_on_both_sides(tmp_path):
    subject = stored(tmp_path, box_of_ones((4, 20, 8), (0, 4), (0, 20), (0, 8)))
    crop, rng = RandomPatch(size=(8, 8, 8)), np.random.default_rng(0)
    for _ in range(10):
        x, y, z = crop(subject, rng)
        assert x == (-2, 6)
        assert z == (0, 8)
        assert y[0] >= 0
        assert y[1] <= 20
    image = subject.read_image(box=(x, y, z))[0]
    assert not image[:2].any()
    assert not image[6:].any()
    assert image[2:6].all()


def test_patches_are_a_function_of_the_generator(tmp_path):
    subject, crop = stored(tmp_path, ring()), RandomPatch(size=(8, 8, 8))
    drawn = [[crop(subject, rng) for _ in range(5)] for rng in map(np.random.default_rng, (1, 1, 2))]
    assert drawn[0] == drawn[1] != drawn[2]


# ----- lesions -------------------------------------------------------------------------------------------------------


def with_lesion(folder, share=0.5):
    """A brain of 12³ voxels with three lesion voxels of different numbers, and its sampling."""
    brain = box_of_ones((20, 18, 16), (4, 16), (3, 15), (2, 14))
    label = np.zeros(brain.shape, np.uint8)
    label[4, 3, 2], label[10, 10, 10], label[11, 10, 9] = 1, 4, 2
    return stored(folder, brain, label=label), LesionPatch(size=(9, 7, 5), lesion_share=share)


def centres(crop, subject, count=200, seed=0):
    rng = np.random.default_rng(seed)
    boxes = [crop(subject, rng) for _ in range(count)]
    assert all(tuple(b - a for a, b in box) == crop.size for box in boxes)
    return [tuple(start + n // 2 for (start, _), n in zip(box, crop.size, strict=True)) for box in boxes]


def test_every_lesion_voxel_of_any_number_can_be_the_centre_and_a_patch_may_leave_the_volume(tmp_path):
    subject, crop = with_lesion(tmp_path, share=1.0)
    drawn = centres(crop, subject)
    assert set(drawn) == {(4, 3, 2), (10, 10, 10), (11, 10, 9)}
    counts = [drawn.count(voxel) for voxel in set(drawn)]
    assert min(counts) > 200 / 3 - 4 * (200 * 2 / 9) ** 0.5
    wide = LesionPatch(size=(9, 9, 9), lesion_share=1.0)
    boxes = [wide(subject, np.random.default_rng(seed)) for seed in range(20)]
    assert set(boxes) == {tuple((c - 4, c + 5) for c in voxel) for voxel in set(drawn)}
    image = subject.read_image(box=((0, 9), (-1, 8), (-2, 7)))[0]
    assert not image[:, :1].any()
    assert not image[:, :, :2].any()
    assert image[:, 1:, 2:].all()


def test_the_other_patches_are_centred_on_brain_without_lesion(tmp_path):
    subject, crop = with_lesion(tmp_path, share=0.0)
    brain, label = subject.read_brain(), subject.read_label()
    drawn = centres(crop, subject)
    assert all(brain[voxel] and not label[voxel] for voxel in drawn)
    assert len(set(drawn)) > 150
    lesion = box_of_ones(brain.shape, (4, 16), (3, 15), (2, 13)).astype(np.uint8)  # all but one slice of the brain
    mostly = stored(tmp_path, brain, "mostly", lesion)
    assert {z for _, _, z in centres(crop, mostly)} == {13}


def test_half_of_the_patches_show_lesions(tmp_path):
    subject, crop = with_lesion(tmp_path)
    drawn = sum(bool(subject.read_label()[voxel]) for voxel in centres(crop, subject, count=400))
    assert abs(drawn - 200) < 4 * 10  # four standard deviations


def test_a_subject_without_lesion_or_label_shows_brain(tmp_path):
    brain = ring()
    without = stored(tmp_path, brain)
    unlabelled = write_subject(
        tmp_path, id="B", image=brain[None].astype(np.int16), brain=brain, label=None, affine=np.eye(4)
    )
    for subject in (without, unlabelled):
        assert all(brain[voxel] for voxel in centres(LesionPatch(size=(8, 8, 8), lesion_share=1.0), subject, 30))


def test_a_subject_prepared_anew_has_other_lesions(tmp_path):
    subject, crop = with_lesion(tmp_path, share=1.0)
    assert len(set(centres(crop, subject))) == 3
    label = np.zeros(subject.shape, np.uint8)
    label[7, 7, 7] = 1
    assert set(centres(crop, stored(tmp_path, subject.read_brain(), label=label))) == {(7, 7, 7)}


def test_lesion_patches_are_a_function_of_the_generator(tmp_path):
    subject, crop = with_lesion(tmp_path)
    assert centres(crop, subject, seed=1) == centres(crop, subject, seed=1) != centres(crop, subject, seed=2)


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_that_is_no_probability_is_refused(share):
    with pytest.raises(UserError, match="expected a probability from 0 to 1"):
        LesionPatch(lesion_share=share)
