"""Places in a head drawn by hand and in one of the phantom's, and false positives counted by hand."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt
from scipy.spatial import cKDTree

from mrgen.data.phantom.anatomy import draw_warp, grow_anatomy
from mrgen.data.phantom.grid import Grid
from mrgen.data.phantom.subject import BRATS_SHIFT, WMH_FIELDS_OF_VIEW, grow_subject, stream
from mrgen.evaluation.lesion_places import false_positive_volumes, places

RADIUS = 70.0  # mm, of the head drawn by hand
FLUID, GREY, WHITE = 0.5, 0.8, 1.0


def coordinates(spacing):
    """x, y, z in mm from the middle of a volume that holds the head and some air; no voxel lies in the middle."""
    halves = [math.ceil((RADIUS + 8) / side) for side in spacing]
    axes = [side * (torch.arange(2 * half) - half + 0.5) for half, side in zip(halves, spacing, strict=True)]
    return torch.meshgrid(*axes, indexing="ij")


def ball(spacing, centre, radii):
    parts = zip(coordinates(spacing), centre, radii, strict=True)
    return sum(((axis - middle) / radius) ** 2 for axis, middle, radius in parts) <= 1


def head(spacing=(2.0, 2.0, 3.0), dark=()):
    """T1 and brain mask: a ball of white matter, 6 mm of cortex around it, 3 mm of fluid, and dark ellipsoids."""
    shells = [ball(spacing, (0, 0, 0), (RADIUS - off,) * 3) for off in (0, 3, 9)]
    t1 = torch.zeros(shells[0].shape)
    for shell, value in zip(shells, (FLUID, GREY, WHITE), strict=True):
        t1[shell] = value
    for centre, radii in dark:
        t1[ball(spacing, centre, radii)] = FLUID
    noise = torch.randn(t1.shape, generator=torch.Generator().manual_seed(0))
    return t1 + 0.04 * noise, shells[0]


LEFT, RIGHT = ((-15, 0, 5), (7, 22, 9)), ((15, 0, 5), (7, 22, 9))


def within(mask, distance, spacing):
    return torch.from_numpy(distance_transform_edt(~mask.numpy(), sampling=spacing) <= distance)


# ----- places ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", [(2.0, 2.0, 3.0), (3.0, 3.0, 3.0), (1.2, 3.0, 2.0)])
def test_ventricles_surface_and_what_lies_between(spacing):
    t1, brain = head(spacing, [LEFT, RIGHT])
    found = places(t1, brain, spacing)
    assert list(found) == ["periventricular", "cortical", "deep"]
    ventricles = ball(spacing, *LEFT) | ball(spacing, *RIGHT)
    near = within(ventricles, 10, spacing)
    # Noise and rounding off the ventricles' thin ends shift the border by a voxel here and there.
    assert (found["periventricular"] ^ near).sum() < 0.1 * near.sum()
    assert found["periventricular"][ventricles].all()
    x, y, z = coordinates(spacing)
    depth = RADIUS - (x**2 + y**2 + z**2).sqrt()
    slack = max(spacing)
    assert found["cortical"][depth < 10 - slack].all()
    assert not found["cortical"][depth > 10 + slack].any()
    assert found["deep"][(depth > 10 + slack) & ~within(ventricles, 10 + 2 * slack, spacing)].all()


@pytest.mark.parametrize("dark", [(), (LEFT, RIGHT)])
def test_every_voxel_is_in_one_place(dark):
    t1, brain = head(dark=dark)
    found = places(t1, brain, (2, 2, 3))
    assert {mask.dtype for mask in found.values()} == {torch.bool}
    assert torch.equal(sum(mask.int() for mask in found.values()), torch.ones(brain.shape, dtype=torch.int32))
    assert found["cortical"][~brain].all()


@pytest.mark.parametrize(
    "dark",
    [
        ((0, 0, 20), (2, 50, 40)),  # a fissure in the midline: deep and long, but narrow
        ((0, 56, 0), (5, 5, 5)),  # a sulcus: wide, but near the surface
        ((0, 0, 0), (4, 4, 4)),  # a lacune: deep and wide, but small
    ],
)
def test_other_fluid_is_no_ventricle(dark):
    t1, brain = head(dark=[dark])
    assert not places(t1, brain, (2, 2, 3))["periventricular"].any()
    both = places(*head(dark=[LEFT, RIGHT, dark]), (2, 2, 3))
    alone = places(*head(dark=[LEFT, RIGHT]), (2, 2, 3))
    assert (both["periventricular"] ^ alone["periventricular"]).float().mean() < 0.005


def test_the_scale_of_the_t1_does_not_matter():
    t1, brain = head(dark=[LEFT, RIGHT])
    expected = places(t1, brain, (2, 2, 3))
    for scaled in (1000 * t1, 2 * t1 - 5, (t1.double() - 0.9) / 0.1, (100 * t1).short()):
        found = places(scaled, brain, (2, 2, 3))
        assert all((found[name] ^ expected[name]).float().mean() < 1e-3 for name in expected)


def test_the_same_twice():
    t1, brain = head(dark=[LEFT, RIGHT])
    one, other = (places(t1, brain, (2, 2, 3)) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_hole_in_the_mask_is_no_surface():
    """Ventricles are holes of some brain masks, and black where the skull was stripped by them."""
    t1, brain = head(dark=[LEFT, RIGHT])
    holes = brain & ~ball((2, 2, 3), *LEFT) & ~ball((2, 2, 3), *RIGHT)
    expected, found = places(t1, brain, (2, 2, 3)), places(t1, holes, (2, 2, 3))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    stripped = places(t1 * holes, holes, (2, 2, 3))["periventricular"]
    assert (stripped ^ expected["periventricular"]).float().mean() < 0.01


def test_where_the_field_of_view_ends_there_is_no_surface():
    t1, brain = head(dark=[LEFT, RIGHT])
    whole, half = brain.shape[2], brain.shape[2] // 2
    cut = places(t1[:, :, half:], brain[:, :, half:], (2, 2, 3))
    middle = cut["cortical"][brain.shape[0] // 2, brain.shape[1] // 2]  # a line up from the cut in the head's middle
    assert not middle[: (whole - half) // 2].any()
    assert middle[-1]


def test_heads_without_ventricles_have_two_places():
    t1, brain = head()
    flat, two = torch.full_like(t1, 3.0), torch.where(t1 > 0.9, 1.0, 0.8)
    noise = torch.randn(t1.shape, generator=torch.Generator().manual_seed(1))  # one class
    for image in (t1, flat, two, noise):
        found = places(image, brain, (2, 2, 3))
        assert not found["periventricular"].any()
        assert found["deep"].any()
        assert (found["cortical"] & brain).any()


@pytest.mark.parametrize("voxels", [0, 1, 2, 5])
def test_masks_of_hardly_anything(voxels, recwarn):
    t1, brain = torch.rand(9, 8, 7), torch.zeros(9, 8, 7, dtype=torch.bool)
    brain[0, 0, :voxels] = True
    assert places(t1, brain, (3, 3, 3))["cortical"].all()
    assert not recwarn.list


def test_a_brain_that_fills_its_volume_has_no_surface():
    found = places(torch.rand(12, 12, 12), torch.ones(12, 12, 12, dtype=torch.bool), (2, 2, 2))
    assert found["deep"].all()


@pytest.mark.parametrize("index", [0, 1])
def test_ventricles_of_the_phantom(index):
    """Against the anatomy it was drawn from, at 3 mm: fissures and the fourth ventricle come along, not more."""
    spacing = (3.0, 3.0, 3.0)
    subject = grow_subject(seed=0, index=index, spacing=3.0, pathology="wmh")
    warp = draw_warp(stream(0, index, "anatomy"), atrophy=stream(0, index, "age").uniform(0.4, 1.4))
    anatomy = grow_anatomy(warp, Grid.around(WMH_FIELDS_OF_VIEW[subject.site], 3.0, BRATS_SHIFT))
    t1, brain = torch.from_numpy(subject.images["t1"]), torch.from_numpy(subject.brain)
    zone = places(t1, brain, spacing)["periventricular"]
    true = torch.from_numpy(anatomy.ventricle < 0) & brain
    near = within(true, 10, spacing) & brain
    assert zone[true].float().mean() > 0.98
    assert zone[near].float().mean() > 0.9
    assert near[zone].float().mean() > 0.55
    # Dark, central, on both sides.
    core = torch.from_numpy(distance_transform_edt(zone.numpy(), sampling=spacing) > 12)
    assert t1[core].median() < t1[brain & ~zone].quantile(0.25)
    sides = core.nonzero()[:, 0] > brain.nonzero()[:, 0].float().mean()
    assert 0.3 < sides.float().mean() < 0.7
    off = (zone.nonzero().float().mean(0) - brain.nonzero().float().mean(0)) * torch.tensor(spacing)
    assert off[0].abs() < 6
    assert off.norm() < 20


# ----- false positives -------------------------------------------------------------------------------------------


def in_two(shape):
    low = torch.zeros(shape, dtype=torch.bool)
    low[: shape[0] // 2] = True
    return {"low": low, "high": ~low}


def test_false_positives_by_hand():
    prediction, reference = torch.zeros(2, 10, 4, 4, dtype=torch.bool)
    reference[2:4, 0, 0] = True
    prediction[2:8, 0, 0] = True  # 2 true, then 2, 4, 6 and 8 mm from the lesion
    prediction[9, 3, 3] = True
    prediction[2, 0, 2] = True  # two slices of 1.4 mm above
    spacing = (2, 1, 1.4)
    assert false_positive_volumes(prediction, reference, in_two(reference.shape), spacing) == pytest.approx(
        {
            "fp_low_border": 2 * 2.8e-3,  # one beside the lesion and the one above it
            "fp_low_apart": 0,
            "fp_high_border": 0,
            "fp_high_apart": 4 * 2.8e-3,
        }
    )


@pytest.mark.parametrize("side", [3.0, 2.9999998, 3.0000002])
def test_three_millimetres_are_within_three_millimetres_whatever_the_header_rounds_to(side):
    prediction, reference = torch.zeros(2, 6, 6, 6, dtype=torch.bool)
    reference[1, 1, 1], prediction[1, 1, 2], prediction[1, 2, 2] = True, True, True  # 3 and 4.2 mm away
    found = false_positive_volumes(prediction, reference, in_two(reference.shape), (side,) * 3)
    assert found["fp_low_border"] == pytest.approx(0.027)
    assert found["fp_low_apart"] == pytest.approx(0.027)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 3.0), (0.8, 1.7, 1.1)])
def test_borders_are_what_a_search_over_all_pairs_finds(spacing):
    generator = torch.Generator().manual_seed(0)
    prediction, reference = (torch.rand(12, 11, 10, generator=generator) > level for level in (0.9, 0.97))
    halves = in_two(reference.shape)
    false = prediction & ~reference
    tree = cKDTree(reference.nonzero().numpy() * np.array(spacing))
    expected = {}
    for name, mask in halves.items():
        distance, _ = tree.query((false & mask).nonzero().numpy() * np.array(spacing))
        for part, count in (("border", (distance <= 3).sum()), ("apart", (distance > 3).sum())):
            expected[f"fp_{name}_{part}"] = count * math.prod(spacing) / 1000
    assert min(expected.values()) > 0
    assert false_positive_volumes(prediction, reference, halves, spacing) == pytest.approx(expected)


def test_nothing_predicted_nothing_there():
    empty = torch.zeros(6, 6, 6, dtype=torch.bool)
    some = empty.clone()
    some[1, 1, :] = True
    halves = in_two(empty.shape)
    for prediction, reference in ((empty, empty), (empty, some), (some, some)):
        volumes = false_positive_volumes(prediction, reference, halves, (1, 1, 1))
        assert set(volumes.values()) == {0.0}
        assert {type(value) for value in volumes.values()} == {float}
    alone = false_positive_volumes(some, empty, halves, (1, 1, 1))  # no lesion, no border
    assert alone == pytest.approx({"fp_low_border": 0, "fp_low_apart": 0.006, "fp_high_border": 0, "fp_high_apart": 0})


def test_ignored_voxels_are_neither_false_nor_a_lesion_with_a_border():
    prediction, reference, ignore = torch.zeros(3, 6, 6, 6, dtype=torch.bool)
    prediction[1, 1, 1:4] = True
    reference[1, 1, 0] = True
    assert false_positive_volumes(prediction, reference, in_two(ignore.shape), (1, 1, 1), ignore)[
        "fp_low_border"
    ] == pytest.approx(0.003)
    ignore[1, 1, :2] = True
    found = false_positive_volumes(prediction, reference, in_two(ignore.shape), (1, 1, 1), ignore)
    assert found["fp_low_border"] == 0
    assert found["fp_low_apart"] == pytest.approx(0.002)


def test_all_false_positives_are_somewhere_in_a_head():
    t1, brain = head(dark=[LEFT, RIGHT])
    generator = torch.Generator().manual_seed(0)
    reference = within(ball((2, 2, 3), *LEFT), 4, (2, 2, 3)) & ~ball((2, 2, 3), *LEFT)
    prediction = within(ball((2, 2, 3), *LEFT), 6, (2, 2, 3)) & ~ball((2, 2, 3), *LEFT)
    prediction |= torch.rand(brain.shape, generator=generator) > 0.999
    volumes = false_positive_volumes(prediction, reference, places(t1, brain, (2, 2, 3)), (2, 2, 3))
    assert sum(volumes.values()) == pytest.approx(int((prediction & ~reference).sum()) * 0.012)
    assert list(volumes) == [
        f"fp_{a}_{b}" for a in ("periventricular", "cortical", "deep") for b in ("border", "apart")
    ]
    # The widened band is periventricular and at a border, single voxels are apart.
    assert volumes["fp_periventricular_border"] > 10 * volumes["fp_periventricular_apart"]
    assert volumes["fp_cortical_border"] == 0
    assert volumes["fp_cortical_apart"] > 0


def test_what_does_not_fit_is_refused():
    mask = torch.zeros(4, 4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="bool"):
        places(mask.float(), mask.long(), (1, 1, 1))
    with pytest.raises(ValueError, match=r"\(2, 4, 4\)"):
        places(mask.float()[:2], mask, (1, 1, 1))
    with pytest.raises(ValueError, match="3 positive voxel sides"):
        places(mask.float(), mask, (1, 1))
    with pytest.raises(ValueError, match="bool"):
        false_positive_volumes(mask.long(), mask, in_two(mask.shape), (1, 1, 1))
    with pytest.raises(ValueError, match="bool"):
        false_positive_volumes(mask, mask, {"all": mask[:2]}, (1, 1, 1))
    with pytest.raises(ValueError, match="3 positive voxel sides"):
        false_positive_volumes(mask, mask, in_two(mask.shape), (1, 0, 1))
