import pytest
import torch
from monai.metrics import compute_dice
from scipy.spatial import distance

from mrgen.metrics.segmentation import dice, region_dice, region_masks

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
