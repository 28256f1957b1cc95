import numpy as np
import pytest
from omegaconf import OmegaConf

from mrgen.data.layouts import Layout
from mrgen.data.normalisation import Gaussian
from mrgen.data.slices import AxialSlice, SiteSlices
from mrgen.data.store import Store, write_cohort, write_subject
from mrgen.errors import UserError
from mrgen.launch.instantiate import instantiate
from mrgen.launch.paths import CONF_DIR
from tests.launch.tools import composed


def brain(x, y, z, size):
    mask = np.zeros((20, 24, 16), bool)
    mask[x : x + size[0], y : y + size[1], z : z + size[2]] = True
    return mask


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    """Two brains of different sizes and places, the second with a gap between z = 5 and z = 9."""
    folder = tmp_path_factory.mktemp("slices")
    write_cohort(folder, Layout.from_conf(CONF_DIR / "data" / "layout" / "brats2019.yaml"), ["t1"])
    masks = {"a": brain(2, 3, 2, (9, 13, 10)), "b": brain(8, 10, 4, (7, 5, 8))}
    masks["b"][:, :, 5:9] = False
    for id, mask in masks.items():
        write_subject(folder, id=id, image=mask[None].astype(np.int16), brain=mask, affine=np.eye(4))
    return list(Store(folder).subjects.values())


def fitted(subjects, **settings):
    crop = AxialSlice(**settings)
    crop.fit(subjects)
    return crop


def test_the_box_holds_every_brain_along_x_and_y_and_is_a_multiple(subjects):
    assert fitted(subjects, divisor=1).size == (9, 13)
    assert fitted(subjects, divisor=4).size == (12, 16)
    assert fitted(subjects, size=[16, 24], divisor=8).size == (16, 24)


def test_a_box_that_would_cut_a_brain_is_refused(subjects):
    with pytest.raises(UserError, match=r"would cut brains, which need \(12, 16\)"):
        fitted(subjects, size=[12, 12], divisor=4)


@pytest.mark.parametrize("size", [[8], [8, 8, 8], [8, 12], [0, 8]])
def test_a_size_is_two_multiples_of_the_divisor(size):
    with pytest.raises(UserError, match="expected two multiples of 8"):
        AxialSlice(size=size)


def test_slices_are_one_voxel_thick_and_centred_on_the_brain(subjects):
    crop = fitted(subjects, divisor=4)
    for subject in subjects:
        x, y, (start, stop) = crop(subject, np.random.default_rng(0))
        assert (x[1] - x[0], y[1] - y[0], stop - start) == (12, 16, 1)
        for (low, high), (inner, outer) in zip((x, y), subject.brain_box[:2], strict=True):
            assert low <= inner
            assert outer <= high
            assert abs((low + high) - (inner + outer)) <= 1


def test_every_slice_with_brain_comes_up_and_no_other(subjects):
    crop, rng = fitted(subjects), np.random.default_rng(0)
    for subject in subjects:
        seen = {crop(subject, rng)[2][0] for _ in range(200)}
        assert seen == set(np.flatnonzero(subject.read_brain().any((0, 1))).tolist())


def test_the_generator_decides(subjects):
    crop = fitted(subjects)
    drawn = [[crop(subjects[0], np.random.default_rng(seed))[2] for seed in range(9)] for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 1


# ----- by site, as Li et al. -----------------------------------------------------------------------------------------

# Their scans in canonical orientation: x to the right, y to the front, z up.
SCANS = {"Utrecht": (240, 240, 48), "Singapore": (232, 256, 48), "GE3T": (132, 256, 83)}


@pytest.fixture(scope="module")
def li():
    """The preset's."""
    return instantiate(OmegaConf.load(CONF_DIR / "data" / "sampling" / "site_slices.yaml"))


def test_utrecht_and_singapore_are_cut_around_the_middle(li):
    assert li.box(SCANS["Utrecht"], "Utrecht") == ((20, 220), (20, 220), (0, 48))
    assert li.box(SCANS["Singapore"], "Singapore") == ((16, 216), (28, 228), (0, 48))


def test_ge3t_loses_46_rows_in_front_and_10_behind_and_gets_34_columns_on_each_side(li):
    (left, right), (back, front), z = li.box(SCANS["GE3T"], "GE3T")
    assert (256 - front, back) == (46, 10)
    assert (-left, right - 132) == (34, 34)
    assert z == (0, 83)


def test_a_site_that_is_not_named_is_cut_around_the_middle(li):
    for site in ("Philips_VU", None, ""):
        assert li.box(SCANS["GE3T"], site) == ((-34, 166), (28, 228), (0, 83))


def test_training_shows_38_of_48_slices_and_63_of_83(li):
    assert [li.training(SCANS[site], site) for site in SCANS] == [range(5, 43), range(5, 43), range(10, 73)]


def test_lesions_are_predicted_in_all_but_6_of_48_and_11_of_83_slices_at_each_end(li):
    assert [li.tested(SCANS[site]) for site in SCANS] == [range(6, 42), range(6, 42), range(11, 72)]


@pytest.mark.parametrize("site", ["GE3T", "Utrecht"])
@pytest.mark.parametrize("shape", [(199, 200), (17, 190), (200, 201), (3, 1), (300, 400)])
def test_a_cut_has_the_size_asked_for_whatever_the_scan(li, site, shape):
    x, y, z = li.box((*shape, 7), site)
    assert [stop - start for start, stop in (x, y, z)] == [200, 200, 7]
    for (start, stop), n in zip((x, y), shape, strict=True):
        if n <= 200:  # all of it, padding as even as can be
            assert abs(-start - (stop - n)) <= 1
            assert start <= 0 <= n <= stop
        else:
            assert 0 <= start < stop <= n


@pytest.mark.parametrize("surplus", range(12))
def test_the_slices_are_those_whose_head_is_measured(surplus):
    """``Gaussian`` takes its statistics "after the crop": the same one, also where an odd voxel is left over."""
    shape = (30 + surplus, 41 + surplus, 2)
    scan = np.arange(1, 1 + np.prod(shape)).reshape(shape)
    x, y, _ = SiteSlices((30, 41)).box(shape, "Utrecht")
    shown = scan[slice(*x), slice(*y)]
    measured = Gaussian({"t1": 1}, size=(30, 41)).measure(scan, scan > 0, "t1", "Utrecht")
    assert measured == {"head_mean": pytest.approx(shown.mean()), "head_std": pytest.approx(shown.std())}


def test_a_cut_through_the_brain_is_refused(subjects):
    """The first brain fills rows 3 to 16 of 24; 16 rows from the middle are 4 to 20."""
    with pytest.raises(UserError) as error:
        SiteSlices((16, 16)).fit(subjects)
    assert str(error.value) == (
        "a: slices of 20 × 24 voxels, cut to data.sampling.size=[16, 16], lose 8% of the brain; enlarge the size, or "
        "set data.sampling.front for the site"
    )
    SiteSlices((20, 18)).fit(subjects)


def test_a_twentieth_of_a_brain_may_be_lost(tmp_path):
    """Li's cut of GE3T does take a few voxels of the largest heads."""
    write_cohort(tmp_path, Layout.from_conf(CONF_DIR / "data" / "layout" / "wmh2017.yaml"), ["t1"])
    mask = np.zeros((20, 24, 4), bool)
    mask[2:18, 3:19] = True  # 16 rows
    subject = write_subject(tmp_path, id="a", image=mask[None] * 9, brain=mask, affine=np.eye(4), site="GE3T")
    mask[2:3, 3:23] = True  # 4 voxels of 260 in rows that the cut takes
    other = write_subject(tmp_path, id="b", image=mask[None] * 9, brain=mask, affine=np.eye(4), site="GE3T")
    slices = SiteSlices((16, 16), front={"GE3T": 5 / 8})  # 5 rows of the surplus of 8 in front, 3 behind
    assert slices.box((20, 24, 4), "GE3T")[1] == (3, 19)
    slices.fit([subject, other])
    with pytest.raises(UserError, match=r"a: .* lose 6% of the brain"):
        SiteSlices((16, 16)).fit([subject])  # around the middle: rows 4 to 20


def test_slices_that_are_smaller_than_the_cut_lose_nothing(subjects):
    SiteSlices((200, 200)).fit(subjects)


def test_shares_that_leave_no_slice_are_refused(subjects):
    for name in ("dropped_elsewhere", "zeroed"):
        with pytest.raises(
            UserError, match=rf"a: data\.sampling\.{name[:6]}\w* leaves none of its 16 slices; lower it"
        ):
            SiteSlices((32, 32), **{name: 0.5}).fit(subjects)


@pytest.mark.parametrize("size", [[200], [200, 200, 1], [15, 200], [200, 0]])
def test_a_size_is_two_numbers_that_the_network_takes(size):
    with pytest.raises(UserError, match=r"data\.sampling\.size is .* expected two numbers from 16 on, along x and y"):
        SiteSlices(size)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"front": {"GE3T": 1.5}}, r"shares of front are \[1\.5\]; expected 0 to 1"),
        ({"dropped": {"GE3T": 0.6}}, r"shares of dropped are \[0\.6, 0\.0, 0\.0\]; expected 0 to 0\.5"),
        ({"dropped_elsewhere": -0.1}, r"shares of dropped are \[-0\.1, 0\.0\]; expected 0 to 0\.5"),
        ({"zeroed": 1}, r"shares of dropped are \[0\.0, 1\]; expected 0 to 0\.5"),
        ({"front_elsewhere": 1.5}, r"shares of front are \[1\.5\]; expected 0 to 1"),
        ({"dropped_elsewhere": [0.6, 0.4]}, r"dropped_elsewhere is \[0\.6, 0\.4\]; .* together below 1"),
        ({"dropped_elsewhere": [0.1, -0.1]}, r"dropped_elsewhere is \[0\.1, -0\.1\]; .* from 0 on"),
        ({"zeroed": [0.1, 0.1, 0.1]}, r"zeroed is \[0\.1, 0\.1, 0\.1\]; expected one share, or two"),
    ],
)
def test_shares_are_shares(wrong, message):
    with pytest.raises(UserError, match=message):
        SiteSlices((200, 200), **wrong)


def test_training_may_show_every_so_many_slices():
    cut = SiteSlices(size=(64, 64), dropped_elsewhere=0.1, step=5)
    assert list(cut.training((80, 80, 52), None)) == [5, 10, 15, 20, 25, 30, 35, 40, 45]
    assert cut.tested((80, 80, 52)) == range(52)
    with pytest.raises(UserError, match=r"data\.sampling\.step is 0"):
        SiteSlices(step=0)


# ----- BraTS 2015, as Qu et al. ---------------------------------------------------------------------------------------


def axial50(name):
    return instantiate(composed("train", f"data/sampling={name}").data.sampling)


@pytest.mark.parametrize("name", ["axial50", "axial50_cropped"])
def test_fifty_slices_of_155_are_trained_on_and_tested(name):
    cut = axial50(name)
    for slices in (cut.training((240, 240, 155), "tcia"), cut.tested((240, 240, 155))):
        assert slices == range(55, 105)
    assert cut.training((160, 160, 103), None) == range(37, 70)  # the phantom's, at 1.5 mm
    for height in (44, 52, 78, 155):
        assert cut.tested((240, 240, height)) == cut.training((240, 240, height), None)


def test_slices_are_whole_or_cut_as_the_authors_cut_the_stored_array():
    """Of the array as the challenge stores it, L, P, S: rows run from front to back, columns from right to left."""
    assert axial50("axial50").box((240, 240, 155), "tcia") == ((0, 240), (0, 240), (0, 155))
    stored = np.arange(240 * 240).reshape(240, 240)  # rows, columns
    canonical = stored.T[::-1, ::-1]  # x to the right, y to the front
    x, y, _ = axial50("axial50_cropped").box((240, 240, 155), "tcia")
    assert np.array_equal(canonical[slice(*x), slice(*y)][::-1, ::-1].T, stored[38:222, 48:192])


def test_a_share_in_front_of_all_sites_gives_way_to_one_of_a_site():
    cut = SiteSlices((16, 16), front={"GE3T": 0.25}, front_elsewhere=0.75)
    assert [cut.box((16, 24, 1), site)[1] for site in ("GE3T", "Utrecht", None)] == [(6, 22), (2, 18), (2, 18)]
    assert cut.box((16, 12, 1), None)[1] == (-2, 14)  # what is too short is padded on both sides


def test_a_pair_of_shares_counts_from_below_and_above():
    cut = SiteSlices((16, 16), dropped={"GE3T": 0.25}, dropped_elsewhere=[0.5, 0.1], zeroed=(0.0, 0.31))
    assert cut.training((16, 16, 20), None) == range(10, 18)
    assert cut.training((16, 16, 20), "GE3T") == range(5, 15)
    assert cut.tested((16, 16, 20)) == range(14)
    assert SiteSlices((16, 16), zeroed=0.31).tested((16, 16, 20)) == range(7, 13)  # one share: up
