import numpy as np
import pytest

from mrgen.data.layouts import Layout
from mrgen.data.slices import AxialSlice
from mrgen.data.store import Store, write_cohort, write_subject
from mrgen.errors import UserError
from mrgen.launch.paths import CONF_DIR


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
