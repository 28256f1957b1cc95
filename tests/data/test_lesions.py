import numpy as np
import pytest
from scipy.ndimage import binary_dilation, center_of_mass
from scipy.ndimage import label as components

from mrgen.data.lesions import KINDS, enlarge, manipulate, mirror, move, shrink, transplant
from mrgen.data.phantom.subject import grow_subject
from mrgen.errors import UserError

X, Y = np.indices((80, 80))
CORE, EDEMA, ENHANCING, IGNORED = 1, 2, 3, 255


def disc(x, y, radius):
    return (X - x) ** 2 + (Y - y) ** 2 <= radius**2


def tumour(x, y, radius=9):
    """Enhancing within core within edema."""
    label = np.zeros(X.shape, np.uint8)
    for number, size in ((EDEMA, 1), (CORE, 0.7), (ENHANCING, 0.4)):
        label[disc(x, y, size * radius)] = number
    return label


def lesion(label):
    return (label > 0) & (label != IGNORED)


def nested(label):
    """Whether no edema is missing around the core and no core around what enhances, corners left aside."""
    core, enhancing = np.isin(label, (CORE, ENHANCING)), label == ENHANCING
    return not (binary_dilation(core) & ~lesion(label)).any() and not (binary_dilation(enhancing) & ~core).any()


BRAIN = disc(39.5, 39.5, 35)
LABEL = tumour(24, 40)
DONOR = np.flip(tumour(50, 30, 12), 1).copy()
DONOR[50, 45:55] = CORE  # so that it has a direction
for given in (BRAIN, LABEL, DONOR):
    given.setflags(write=False)  # whoever writes into what it is given fails


def done(kind, label, brain, donor=DONOR, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "mirror": lambda: mirror(label, brain),
        "move": lambda: move(label, brain, rng),
        "enlarge": lambda: enlarge(label, brain),
        "shrink": lambda: shrink(label, brain),
        "transplant": lambda: transplant(label, brain, donor, rng),
    }[kind]()


@pytest.fixture(scope="module")
def phantoms():
    """(label, brain) of two gliomas with three classes, volumes at 3 mm."""
    subjects = [grow_subject(seed=0, index=index, spacing=3.0, sequences=("t1",)) for index in (0, 2)]
    return [(np.where(s.label == 4, ENHANCING, s.label).astype(np.uint8), s.brain) for s in subjects]


def slices(phantoms):
    """Label, brain and a donor's slice: every third slice with a lesion."""
    for (label, brain), (donor, _) in zip(phantoms, phantoms[::-1], strict=True):
        largest = donor[..., lesion(donor).sum((0, 1)).argmax()]
        for z in np.flatnonzero(lesion(label).any((0, 1)))[::3]:
            yield label[..., z], brain[..., z], largest


# ----- on gliomas of the phantom -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_manipulated_phantom_is_a_label_map_with_its_lesion_inside_the_brain(phantoms, kind):
    volumes = [(label, brain, phantoms[1 - i][0]) for i, (label, brain) in enumerate(phantoms)]
    for label, brain, donor in [*volumes, *slices(phantoms)]:
        result = done(kind, label, brain, donor)
        assert (result.shape, result.dtype) == (label.shape, label.dtype)
        assert (result != label).any()
        assert not lesion(result)[~brain].any()
        source = donor if kind == "transplant" else label
        numbers, counts = np.unique(source, return_counts=True)
        assert set(np.unique(result)) <= set(numbers)
        assert set(np.unique(result)) >= set(numbers[counts > 8])  # none vanishes that was more than a few voxels
        wanted = lesion(source).sum() * {"enlarge": 2, "shrink": 0.5}.get(kind, 1)
        assert lesion(result).sum() >= 0.5 * wanted


def test_area_doubles_and_halves_in_slices_and_in_every_slice_of_a_volume(phantoms):
    for label, brain, *_ in [*phantoms, *slices(phantoms)]:
        area = lesion(label).sum((0, 1))
        assert (lesion(enlarge(label, brain)).sum((0, 1)) == 2 * area).all()
        assert (lesion(shrink(label, brain)).sum((0, 1)) == np.ceil(area / 2)).all()


def test_the_classes_of_a_volume_keep_their_shares(phantoms):
    for label, brain in phantoms:
        counts = np.bincount(label.ravel())[1:]
        for result in (enlarge(label, brain), shrink(label, brain)):
            shares = np.bincount(result.ravel())[1:] / lesion(result).sum()
            np.testing.assert_allclose(shares, counts / counts.sum(), atol=0.03)


# ----- by hand: discs in a disc --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_classes_stay_nested(kind):
    assert nested(LABEL)
    for x in (20, 25, 31, 39):
        label = tumour(x, 38)
        assert nested(done(kind, label, BRAIN))
        assert set(np.unique(done(kind, label, BRAIN))) == {0, CORE, EDEMA, ENHANCING}


@pytest.mark.parametrize(("resize", "factor"), [(enlarge, 2), (shrink, 0.5)])
def test_a_disc_becomes_the_disc_of_the_other_area_about_its_centre(resize, factor):
    label = tumour(38.2, 40.6, 20)
    result = resize(label, BRAIN)
    for classes in ((1, 2, 3), (1, 3), (3,)):
        old, new = np.isin(label, classes), np.isin(result, classes)
        assert new.sum() == pytest.approx(factor * old.sum(), rel=0.12)
        np.testing.assert_allclose(center_of_mass(new), (38.2, 40.6), atol=0.5)
    ideal = disc(38.2, 40.6, 20 * factor**0.5)
    assert (lesion(result) ^ ideal).sum() < 0.05 * ideal.sum()


def test_a_shape_keeps_its_proportions():
    label = np.zeros(X.shape, np.uint8)
    label[20:50, 36:44] = EDEMA  # 30 x 8
    label[20:50, 40:44] = CORE
    wide = np.argwhere(lesion(enlarge(label, BRAIN)))
    np.testing.assert_allclose(np.ptp(wide, 0) + 1, (42.4, 11.3), atol=1.5)
    result = shrink(label, BRAIN)
    np.testing.assert_allclose(np.ptp(np.argwhere(lesion(result)), 0) + 1, (21.2, 5.7), atol=1.5)
    assert (np.argwhere(result == CORE)[:, 1].min()) > np.argwhere(result == EDEMA)[:, 1].max() - 1  # still in front


def test_an_enlarged_lesion_at_the_brains_edge_grows_where_there_is_room():
    label = np.where(BRAIN, tumour(8, 40, 10), 0).astype(np.uint8)
    result = enlarge(label, BRAIN)
    assert lesion(result).sum() == 2 * lesion(label).sum()
    assert not lesion(result)[~BRAIN].any()
    assert components(lesion(result))[1] == 1
    assert lesion(result)[lesion(label)].all()


def test_several_lesions_keep_their_places():
    label = np.maximum(tumour(22, 30, 6), tumour(58, 52, 5))
    for result in (enlarge(label, BRAIN), shrink(label, BRAIN)):
        parts, number = components(lesion(result))
        assert number == 2
        np.testing.assert_allclose(center_of_mass(parts > 0, parts, (1, 2)), [(22, 30), (58, 52)], atol=0.5)


def test_a_slice_is_a_volume_of_one_slice():
    for kind in ("mirror", "enlarge", "shrink"):
        np.testing.assert_array_equal(done(kind, LABEL[..., None], BRAIN[..., None])[..., 0], done(kind, LABEL, BRAIN))


def test_a_tilted_lesion_is_scaled_about_one_line():
    """Slices of one lesion go apart from its centroid as they do from each other's; none jumps back to its own."""
    label = np.stack([tumour(x, 40, 5) for x in (32, 36, 40, 44, 48)], axis=-1)
    result = enlarge(label, np.repeat(BRAIN[..., None], 5, axis=2))
    centres = [center_of_mass(lesion(result[..., z]))[0] for z in range(5)]
    np.testing.assert_allclose(centres, 40 + np.sqrt(2) * np.array([-8, -4, 0, 4, 8]), atol=0.5)


def test_a_mirrored_lesion_lies_on_the_other_side_and_comes_back():
    result = mirror(LABEL, BRAIN)
    np.testing.assert_array_equal(result, LABEL[::-1])  # the brain's centre is that of the array
    np.testing.assert_array_equal(mirror(result, BRAIN), LABEL)


def test_the_mirror_stands_in_the_middle_of_the_brain_not_of_the_array():
    brain, label = disc(30, 40, 25), tumour(20, 40, 6)
    np.testing.assert_array_equal(mirror(label, brain), tumour(40, 40, 6))
    odd = np.delete(brain, 30, axis=0)  # between two voxels
    np.testing.assert_array_equal(mirror(np.delete(label, 79, axis=0), odd), np.delete(tumour(39, 40, 6), 79, axis=0))


def test_mirroring_a_phantom_twice_is_the_identity_where_nothing_was_clipped(phantoms):
    for label, brain in phantoms:
        once = mirror(label, brain)
        twice, clipped = mirror(once, brain), lesion(label).sum() - lesion(once).sum()
        assert (twice != label).sum() == clipped < 0.1 * lesion(label).sum()


def shape(label):
    """The lesion in its bounding box."""
    voxels = np.argwhere(lesion(label))
    return label[tuple(slice(a, b + 1) for a, b in zip(voxels.min(0), voxels.max(0), strict=True))]


def test_a_moved_lesion_keeps_its_shape_and_leaves_its_centre():
    centres = set()
    for seed in range(20):
        result = move(LABEL, BRAIN, np.random.default_rng(seed))
        np.testing.assert_array_equal(shape(result), shape(LABEL))  # there is room, so that nothing is clipped
        centres.add(center_of_mass(lesion(result)))
        assert np.hypot(*np.subtract(center_of_mass(lesion(result)), (24, 40))) > 8.5
    assert len(centres) == 20


def test_a_hollow_lesion_moves_too():
    """Its centre is free of lesion; the one place where it would stay what it was."""
    brain = disc(39.5, 39.5, 12)
    ring = np.where(brain & ~disc(39.5, 39.5, 8), EDEMA, 0).astype(np.uint8)
    ring[brain & (X == 40) & (Y == 40)] = 0
    assert all((move(ring, brain, np.random.default_rng(seed)) != ring).any() for seed in range(20))


def test_in_a_volume_lesions_move_along_z():
    label = np.zeros((20, 20, 20), np.uint8)
    label[9:11, 9:11, 9:11] = EDEMA
    moved = [move(label, label >= 0, np.random.default_rng(seed)) for seed in range(9)]
    assert len({np.argwhere(m)[:, 2].min() for m in moved}) > 3
    assert all(m.sum() == label.sum() for m in moved)


def test_a_transplant_has_the_donors_shape_at_the_place_of_the_own_lesion():
    result = transplant(LABEL, BRAIN, DONOR, np.random.default_rng(0))
    np.testing.assert_array_equal(shape(result), shape(DONOR))
    np.testing.assert_allclose(center_of_mass(lesion(result)), (24, 40), atol=1)


def test_a_donor_may_lie_on_another_grid_and_its_255_stays_behind():
    donor = np.pad(shape(DONOR), ((100, 3), (0, 40)))
    donor[0] = IGNORED
    np.testing.assert_array_equal(
        transplant(LABEL, BRAIN, donor, np.random.default_rng(0)),
        transplant(LABEL, BRAIN, DONOR, np.random.default_rng(0)),
    )


def test_a_donors_lesion_that_would_be_clipped_there_is_tried_elsewhere():
    label = np.where(BRAIN, tumour(6, 40, 3), 0).astype(np.uint8)
    result = transplant(label, BRAIN, DONOR, np.random.default_rng(0))
    np.testing.assert_array_equal(shape(result), shape(DONOR))
    assert center_of_mass(lesion(result))[0] > 12


def test_a_healthy_slice_can_receive_a_transplant():
    result = transplant(np.zeros_like(LABEL), BRAIN, DONOR, np.random.default_rng(0))
    np.testing.assert_array_equal(shape(result), shape(DONOR))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_ignored_stays_where_it_was(kind):
    label = LABEL.copy()
    label[~lesion(label) & ((X + 2 * Y) % 9 == 0)] = IGNORED  # in the brain and beyond it, on all ways
    for seed in range(5):
        result = done(kind, label, BRAIN, seed=seed)
        assert ((result == IGNORED) == (label == IGNORED)).all()
        assert (lesion(result) != lesion(label)).any()


# ----- what is impossible --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_without_lesion_there_is_nothing_to_manipulate(kind):
    for label in (np.zeros_like(LABEL), np.where(LABEL, IGNORED, 0)):
        with pytest.raises(UserError, match="the label holds no lesion"):
            done(kind, label, BRAIN)
    with pytest.raises(UserError, match="the brain is empty"):
        done(kind, LABEL, BRAIN & False)


def test_half_of_a_lesion_must_fit():
    away = BRAIN & ((X < 40) | ~disc(79 - 24, 40, 7))  # most of where the tumour would be mirrored is no brain
    with pytest.raises(
        UserError, match=r"lesions: 41% of the lesion would lie in the brain there, expected 50% or more"
    ):
        mirror(LABEL, away)
    assert lesion(mirror(LABEL, BRAIN & ((X < 40) | ~disc(79 - 24, 40, 6)))).sum() > 0.5 * lesion(LABEL).sum()
    with pytest.raises(UserError, match="of the lesion would lie in the brain there"):
        move(LABEL, disc(24, 40, 9) | disc(60, 40, 5), np.random.default_rng(0))
    with pytest.raises(UserError, match="of the lesion would lie in the brain there"):
        transplant(tumour(40, 40, 5), disc(40, 40, 7), tumour(40, 40, 20), np.random.default_rng(0))
    with pytest.raises(UserError, match="no voxel of brain is free of lesion"):
        move(LABEL, lesion(LABEL), np.random.default_rng(0))


def test_half_of_a_change_in_size_must_be_possible():
    """A tumour of 253 voxels."""
    assert lesion(LABEL).sum() == 253
    with pytest.raises(
        UserError, match=r"253 voxels of lesion would become 3\d\d, expected about 506; the brain has no"
    ):
        enlarge(LABEL, disc(24, 40, 10.5))
    assert 380 <= lesion(enlarge(LABEL, disc(24, 40, 11.5))).sum() < 506
    with pytest.raises(UserError, match=r"1 voxels of lesion would become 1, expected about 0\.5"):
        shrink(((X == 40) & (Y == 40)).astype(np.uint8), BRAIN)


def test_a_lesion_outside_the_brain_does_not_vanish_as_it_shrinks():
    with pytest.raises(UserError, match="253 voxels of lesion would become 0"):
        shrink(LABEL, disc(60, 40, 9))


def test_a_donor_needs_a_lesion_and_as_many_axes():
    with pytest.raises(UserError, match="the donor has no lesion to transplant"):
        transplant(LABEL, BRAIN, np.where(DONOR, IGNORED, 0), np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"expected a donor with 2 axes as the label has, found \(80, 80, 1\)"):
        transplant(LABEL, BRAIN, DONOR[..., None], np.random.default_rng(0))


@pytest.mark.parametrize(
    ("label", "brain"),
    [(LABEL, BRAIN[1:]), (LABEL, BRAIN.astype(np.uint8)), (LABEL / 2, BRAIN), (LABEL[0], BRAIN[0])],
)
def test_arrays_that_do_not_fit_are_a_mistake_of_the_caller(label, brain):
    for kind in KINDS:
        with pytest.raises(ValueError, match="expected whole numbers"):
            done(kind, label, brain)
    with pytest.raises(ValueError, match="expected whole numbers"):
        manipulate(label, brain, np.random.default_rng(0), donors=[DONOR])


# ----- one of them, drawn --------------------------------------------------------------------------------------------


def test_the_generator_decides_all():
    drawn = [
        [manipulate(LABEL, BRAIN, np.random.default_rng(seed), donors=[DONOR, LABEL]) for seed in range(20)]
        for _ in range(2)
    ]
    for (one, kind), (other, same) in zip(*drawn, strict=True):
        np.testing.assert_array_equal(one, other)
        assert kind == same
    assert {kind for _, kind in drawn[0]} == set(KINDS)


def test_every_kind_is_as_likely_as_the_others_and_does_what_it_says():
    rng, names = np.random.default_rng(0), []
    for _ in range(200):
        result, kind = manipulate(LABEL, BRAIN, rng, donors=[DONOR])
        names.append(kind)
        if kind in ("mirror", "enlarge", "shrink"):
            np.testing.assert_array_equal(result, done(kind, LABEL, BRAIN))
        else:
            np.testing.assert_array_equal(shape(result), shape(LABEL if kind == "move" else DONOR))
    assert min(names.count(kind) for kind in KINDS) > 25


def test_only_the_kinds_named_are_drawn():
    rng = np.random.default_rng(0)
    assert {manipulate(LABEL, BRAIN, rng, kinds=["mirror", "shrink"])[1] for _ in range(20)} == {"mirror", "shrink"}


def test_another_kind_where_the_one_drawn_is_impossible():
    brain = disc(24, 40, 10)  # no room for more
    for seed in range(9):
        result, kind = manipulate(LABEL, brain, np.random.default_rng(seed), kinds=("enlarge", "shrink"))
        assert kind == "shrink"
        np.testing.assert_array_equal(result, shrink(LABEL, brain))


def test_the_map_as_it_is_where_nothing_is_possible():
    for label, brain, kinds in (
        (LABEL, disc(24, 40, 10), ("enlarge",)),
        (np.zeros_like(LABEL), BRAIN, KINDS),  # a transplant would be possible
        (LABEL, BRAIN & False, KINDS),
    ):
        result, kind = manipulate(label, brain, np.random.default_rng(0), kinds=kinds, donors=[DONOR])
        np.testing.assert_array_equal(result, label)
        assert kind is None
        assert result is not label


def test_only_the_donor_that_is_drawn_is_read():
    class OnDisk(list):
        read = 0

        def __getitem__(self, i):
            self.read += 1
            return super().__getitem__(i)

    donors = OnDisk([DONOR] * 9)
    manipulate(LABEL, BRAIN, np.random.default_rng(0), kinds=["transplant"], donors=donors)
    assert donors.read == 1


def test_a_donor_without_lesion_is_no_transplant():
    result, kind = manipulate(
        LABEL, BRAIN, np.random.default_rng(0), kinds=["transplant"], donors=[np.zeros_like(LABEL)]
    )
    np.testing.assert_array_equal(result, LABEL)
    assert kind is None


@pytest.mark.parametrize("kinds", [[], ["mirror", "rotate"], "mirror"])
def test_unknown_kinds_are_refused(kinds):
    with pytest.raises(UserError, match="expected one or more of mirror, move, enlarge, shrink, transplant"):
        manipulate(LABEL, BRAIN, np.random.default_rng(0), kinds=kinds)


def test_transplants_need_donors():
    with pytest.raises(UserError, match="found no donors to transplant from"):
        manipulate(LABEL, BRAIN, np.random.default_rng(0))
