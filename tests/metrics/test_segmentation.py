import math

import numpy as np
import pytest
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance
from scipy import ndimage
from scipy.spatial import distance

from mrgen.metrics.segmentation import (
    HD95_ONE_EMPTY,
    dice,
    hd95,
    hd95_directed,
    index_dice,
    index_mse,
    region_dice,
    region_hd95,
    region_hd95_directed,
    region_masks,
    sensitivity,
    specificity,
)

REGIONS = {"WT": [1, 2, 3], "TC": [1, 3], "ET": [3]}


def labels(seed, shape=(6, 7, 8)):
    return torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(seed))


def test_region_masks_are_unions_of_labels():
    masks = region_masks(torch.tensor([0, 1, 2, 3, 255]), REGIONS)
    assert list(masks) == ["WT", "TC", "ET"]
    assert masks["WT"].tolist() == [False, True, True, True, False]
    assert masks["TC"].tolist() == [False, True, False, True, False]
    assert masks["ET"].tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("seed", range(4))
def test_dice_agrees_with_scipy_and_monai(seed):
    prediction, reference = labels(seed) == 1, labels(seed + 100) <= seed
    ours = dice(prediction, reference)
    assert ours == pytest.approx(1 - distance.dice(prediction.flatten().numpy(), reference.flatten().numpy()))
    assert ours == pytest.approx(compute_dice(prediction[None, None].float(), reference[None, None].float()).item())
    assert 0 < ours < 1


def test_dice_by_hand():
    prediction = torch.tensor([True, True, True, False, False])
    reference = torch.tensor([False, True, True, True, False])
    assert dice(prediction, reference) == pytest.approx(2 * 2 / 6)
    assert dice(prediction, prediction) == 1


def test_empty_regions_follow_the_brats_server():
    empty, some = torch.zeros(5, dtype=torch.bool), torch.tensor([True, False, False, False, False])
    assert dice(empty, empty) == 1
    assert dice(some, empty) == 0
    assert dice(empty, some) == 0


def test_ignored_voxels_count_in_neither():
    prediction = torch.tensor([True, True, False, False])
    reference = torch.tensor([True, False, True, False])
    assert dice(prediction, reference) == pytest.approx(0.5)
    assert dice(prediction, reference, torch.tensor([False, True, False, False])) == pytest.approx(2 / 3)
    assert dice(prediction, reference, torch.tensor([False, False, True, False])) == pytest.approx(2 / 3)
    assert dice(prediction, reference, torch.ones(4, dtype=torch.bool)) == 1  # nothing left: both are empty


def test_region_dice_is_the_dice_of_the_kept_voxels():
    predicted, reference = labels(0), labels(1)
    reference[2] = 255
    kept = reference != 255
    scores = region_dice(predicted, reference, REGIONS)
    assert list(scores) == list(REGIONS)
    for name, members in REGIONS.items():
        p, r = torch.isin(predicted, torch.tensor(members)), torch.isin(reference, torch.tensor(members))
        assert scores[name] == pytest.approx(1 - distance.dice(p[kept].numpy(), r[kept].numpy()))
    # What is predicted at an ignored voxel changes nothing.
    predicted[2] = 3
    assert region_dice(predicted, reference, REGIONS) == scores


def test_region_absent_from_both_scores_one():
    scores = region_dice(torch.tensor([0, 2, 2]), torch.tensor([0, 2, 0]), REGIONS)
    assert scores == {"WT": pytest.approx(2 / 3), "TC": 1, "ET": 1}


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [(torch.tensor([1, 2]), torch.tensor([True, True])), (torch.ones(2, 1) > 0, torch.ones(1, 2) > 0)],
)
def test_label_maps_and_broadcasting_are_refused(prediction, reference):
    with pytest.raises(ValueError, match="bool"):
        dice(prediction, reference)


# ----- HD95 ------------------------------------------------------------------------------------------------------


def blobs(seed, shape=(14, 12, 10), threshold=0.12):
    """A mask of a few connected lumps, some of them at the volume's faces."""
    noise = torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.avg_pool3d(noise, 3, stride=1, padding=1)[0, 0] > threshold


def by_brute_force(prediction, reference, spacing):
    """Every surface voxel against every other."""

    def surface(mask):  # voxels with a neighbour across a face outside the mask, or outside the volume
        return np.argwhere(mask & ~ndimage.binary_erosion(mask)) * np.asarray(spacing)

    distances = distance.cdist(surface(prediction.numpy()), surface(reference.numpy()))
    return max(np.percentile(distances.min(axis=axis), 95) for axis in (0, 1))


@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.5, 1.0, 3.0), (3.0, 0.7, 0.7)])
@pytest.mark.parametrize("seed", range(3))
def test_hd95_is_what_brute_force_finds(seed, spacing):
    prediction, reference = blobs(seed), blobs(seed + 50, threshold=0.3)
    expected = by_brute_force(prediction, reference, spacing)
    assert hd95(prediction, reference, spacing) == pytest.approx(expected, rel=1e-6)
    assert hd95(reference, prediction, spacing) == pytest.approx(expected, rel=1e-6)
    assert expected > 0


def by_distance_transform(start, goal, spacing):
    """The directed 95th percentile: distances to the goal's surface, read off at the start's surface."""
    surfaces = [mask.numpy() & ~ndimage.binary_erosion(mask.numpy()) for mask in (start, goal)]
    return np.percentile(ndimage.distance_transform_edt(~surfaces[1], sampling=spacing)[surfaces[0]], 95)


@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.5, 1.0, 3.0)])
@pytest.mark.parametrize("seed", range(3))
def test_both_directions_are_what_a_distance_transform_finds(seed, spacing):
    prediction, reference = blobs(seed), blobs(seed + 50, threshold=0.3)
    there, back = hd95_directed(prediction, reference, spacing)
    assert there == pytest.approx(by_distance_transform(prediction, reference, spacing), rel=1e-6)
    assert back == pytest.approx(by_distance_transform(reference, prediction, spacing), rel=1e-6)
    assert there != back
    assert hd95(prediction, reference, spacing) == max(there, back)
    assert hd95_directed(reference, prediction, spacing) == (back, there)


def test_the_directions_are_monais():
    masks = [blobs(seed)[None, None].float() for seed in (0, 51)]
    settings = {"include_background": True, "percentile": 95, "spacing": (1.0, 2.0, 3.0), "directed": True}
    expected = tuple(compute_hausdorff_distance(*pair, **settings).item() for pair in (masks, masks[::-1]))
    assert hd95_directed(blobs(0), blobs(51), (1, 2, 3)) == expected


def test_the_directions_by_hand():
    prediction, reference = torch.zeros(2, 30, 5, 5, dtype=torch.bool)
    prediction[4, 2, 2], reference[5:25, 2, 2] = True, True
    # The prediction's one voxel has a neighbour in the reference; the reference's 20 lie 1 to 20 away.
    there, back = hd95_directed(prediction, reference, (1, 1, 1))
    assert (there, back) == pytest.approx((1, 19.05))
    assert (there + back) / 2 == pytest.approx(10.025)  # Plastimatch's, as paper 5 prints


def test_the_directions_of_empty_regions_keep_the_rule_in_maximum_and_mean():
    empty = torch.zeros(4, 4, 4, dtype=torch.bool)
    some = empty.clone()
    some[1, 1, 1] = True
    assert hd95_directed(empty, empty, (1, 1, 1)) == (0, 0)
    assert hd95_directed(some, empty, (1, 1, 1)) == hd95_directed(empty, some, (1, 1, 1)) == (HD95_ONE_EMPTY,) * 2


def test_hd95_by_hand():
    line = torch.zeros(30, 5, 5, dtype=torch.bool)
    prediction, reference = line.clone(), line.clone()
    prediction[4, 2, 2], reference[10, 2, 2] = True, True
    for axis, side in enumerate((0.5, 1.0, 3.0)):  # six voxels apart along each axis in turn
        apart = prediction.movedim(0, axis), reference.movedim(0, axis)
        assert hd95(*apart, (0.5, 1.0, 3.0)) == pytest.approx(6 * side)
    reference[5:25, 2, 2] = True
    # From the reference's 20 voxels 1 to 20 away, the 95th percentile lies between the last two: 1 + 0.95 · 19.
    # From the prediction's voxel it is 1, and the larger direction counts.
    assert hd95(prediction, reference, (1, 1, 1)) == pytest.approx(19.05)
    assert hd95(reference, prediction, (1, 1, 1)) == pytest.approx(19.05)
    assert hd95(reference, reference, (1, 1, 1)) == 0


def test_hd95_of_the_joint_box_is_that_of_the_whole_volume():
    """What is cropped away has no surface; a mask at the volume's face has one there all the same."""
    spacing = (0.9, 1.1, 2.0)
    for corner in ((0, 0, 0), (9, 3, 5), (22, 20, 14)):  # at faces, and amid the volume
        masks = [torch.zeros(36, 32, 24, dtype=torch.bool) for _ in range(2)]
        for mask, seed in zip(masks, (1, 51), strict=True):
            mask[tuple(slice(a, a + n) for a, n in zip(corner, (14, 12, 10), strict=True))] = blobs(seed)
        whole = [mask[None, None].float() for mask in masks]
        uncropped = compute_hausdorff_distance(*whole, include_background=True, percentile=95, spacing=spacing)
        assert hd95(*masks, spacing) == uncropped.item()
        assert uncropped.item() == pytest.approx(by_brute_force(*masks, spacing), rel=1e-6)


def test_hd95_of_slices():
    one, other = torch.zeros(2, 9, 9, dtype=torch.bool)
    one[2, 2], other[5, 6] = True, True
    assert hd95(one, other, (1, 1)) == pytest.approx(5)


def test_hd95_of_empty_regions_follows_the_brats_server():
    empty = torch.zeros(4, 4, 4, dtype=torch.bool)
    some = empty.clone()
    some[1, 1, 1] = True
    assert hd95(empty, empty, (1, 1, 1)) == 0
    assert hd95(some, empty, (1, 1, 1)) == hd95(empty, some, (2, 2, 2)) == HD95_ONE_EMPTY
    assert math.hypot(240, 240, 155) == pytest.approx(HD95_ONE_EMPTY, abs=0.005)


def test_ignored_voxels_have_no_surface():
    prediction, reference = torch.zeros(2, 20, 4, 4, dtype=torch.bool)
    prediction[[2, 15], 1, 1] = True
    reference[3, 1, 1] = True
    assert hd95(prediction, reference, (1, 1, 1)) > 11
    ignore = torch.zeros_like(reference)
    ignore[10:] = True
    assert hd95(prediction, reference, (1, 1, 1), ignore) == 1
    assert hd95(prediction, reference, (1, 1, 1), ~torch.zeros_like(reference)) == 0  # nothing left: both are empty


def test_region_hd95_is_the_hd95_of_each_region():
    predicted, reference = labels(0), labels(1)
    reference[2] = 255
    spacing, ignore = (1.0, 2.0, 0.5), reference == 255
    found = region_hd95(predicted, reference, REGIONS, spacing)
    assert list(found) == list(REGIONS)
    masks = region_masks(predicted, REGIONS), region_masks(reference, REGIONS)
    assert found == {name: hd95(masks[0][name], masks[1][name], spacing, ignore) for name in REGIONS}
    predicted[2] = 3  # at ignored voxels
    assert region_hd95(predicted, reference, REGIONS, spacing) == found
    only = region_hd95(torch.full((3, 3, 3), 2), torch.full((3, 3, 3), 2), REGIONS, spacing)
    assert only == {"WT": 0, "TC": 0, "ET": 0}


def test_the_directions_of_each_region():
    predicted, reference = labels(0), labels(1)
    reference[2] = 255
    spacing, ignore = (1.0, 2.0, 0.5), reference == 255
    found = region_hd95_directed(predicted, reference, REGIONS, spacing)
    masks = region_masks(predicted, REGIONS), region_masks(reference, REGIONS)
    assert found == {name: hd95_directed(masks[0][name], masks[1][name], spacing, ignore) for name in REGIONS}
    assert region_hd95(predicted, reference, REGIONS, spacing) == {name: max(pair) for name, pair in found.items()}


def test_hd95_says_nothing_of_its_library(recwarn):
    hd95(blobs(0), blobs(1), (1, 1, 1))
    assert not [warning for warning in recwarn if "monai" in str(warning.filename)]


@pytest.mark.parametrize("spacing", [(1, 1), (1, 1, 0), (1, 1, float("nan"))])
def test_a_spacing_that_does_not_fit_is_refused(spacing):
    with pytest.raises(ValueError, match="expected 3 positive voxel sides in mm"):
        hd95(blobs(0), blobs(1), spacing)


def test_hd95_refuses_label_maps():
    with pytest.raises(ValueError, match="bool"):
        hd95(labels(0), labels(1), (1, 1, 1))


# ----- sensitivity and specificity --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_sensitivity_and_specificity_agree_with_torchmetrics(seed):
    from torchmetrics.functional.classification import binary_recall, binary_specificity

    prediction, reference = labels(seed) == 1, labels(seed + 100) <= seed
    assert sensitivity(prediction, reference) == pytest.approx(binary_recall(prediction, reference).item())
    assert specificity(prediction, reference) == pytest.approx(binary_specificity(prediction, reference).item())


def test_sensitivity_and_specificity_by_hand():
    prediction = torch.tensor([True, True, False, False, False, True])
    reference = torch.tensor([True, False, True, True, False, False])
    ignore = torch.tensor([False, False, False, True, False, True])
    assert sensitivity(prediction, reference) == pytest.approx(1 / 3)
    assert specificity(prediction, reference) == pytest.approx(1 / 3)
    assert sensitivity(prediction, reference, ignore) == pytest.approx(1 / 2)
    assert specificity(prediction, reference, ignore) == pytest.approx(1 / 2)  # the ignored one is no negative
    assert specificity(prediction, reference, ignore, beyond=8) == pytest.approx(9 / 10)


def test_without_anything_to_find_there_is_no_sensitivity():
    empty, full = torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
    assert math.isnan(sensitivity(full, empty))
    assert math.isnan(specificity(full, full))
    assert sensitivity(empty, full) == 0
    assert specificity(full, empty) == 0


def test_index_maps_by_hand():
    predicted = torch.tensor([[[0, 1], [4, 0]], [[0, 0], [0, 0]], [[1, 0], [0, 0]]])
    reference = torch.tensor([[[0, 2], [4, 1]], [[0, 0], [0, 0]], [[0, 0], [0, 0]]])
    expected = [2 * (2 + 16) / (1 + 16 + 4 + 16 + 1), 1, 1e-5 / (1 + 1e-5)]  # an empty slice that stays empty is right
    assert index_dice(predicted, reference).tolist() == pytest.approx(expected, abs=1e-6)
    assert index_mse(predicted, reference).tolist() == [(1 + 1) / 4, 0, 1 / 4]


def test_index_maps_against_numpy():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, (2, 7, 9, 8))
    dices = [(2 * (x * y).sum() + 1e-5) / ((x**2).sum() + (y**2).sum() + 1e-5) for x, y in zip(a, b, strict=True)]
    assert index_dice(torch.from_numpy(a), torch.from_numpy(b)).tolist() == pytest.approx(dices)
    assert index_mse(torch.from_numpy(a), torch.from_numpy(b)).tolist() == pytest.approx(((a - b) ** 2).mean((1, 2)))


def test_what_is_ignored_is_in_neither_index_map():
    predicted = torch.tensor([[[3, 1], [2, 0]], [[1, 1], [1, 1]]], dtype=torch.uint8)
    reference = torch.tensor([[[255, 1], [2, 0]], [[255, 255], [255, 255]]], dtype=torch.uint8)
    assert index_dice(predicted, reference).tolist() == [1, 1]
    first, second = index_mse(predicted, reference).tolist()
    assert first == 0
    assert math.isnan(second)
    with pytest.raises(ValueError, match="one shape"):
        index_dice(predicted, reference[:1])
