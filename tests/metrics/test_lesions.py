import numpy as np
import pytest
import SimpleITK as sitk
import torch

from mrgen.metrics.lesions import lesion_detection, lesion_sizes, volume_difference, voxel_rates

SHAPE = (14, 12, 10)


def blobs(seed, shape=SHAPE, threshold=0.25):
    """A mask of some connected lumps, some of them at the volume's faces."""
    noise = torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.avg_pool3d(noise, 3, stride=1, padding=1)[0, 0] > threshold


def voxels(*places):
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    for place in places:
        mask[place] = True
    return mask


def image(mask):
    return sitk.GetImageFromArray(mask.numpy().astype(np.uint8))


def everything(prediction, reference, ignore=None):
    return {
        **voxel_rates(prediction, reference, ignore),
        "avd": volume_difference(prediction, reference, ignore),
        **lesion_detection(prediction, reference, ignore),
    }


# ----- voxels ----------------------------------------------------------------------------------------------------


def test_rates_by_hand():
    reference = voxels((0, 0, 0), (0, 0, 1))
    prediction = voxels((0, 0, 1), (5, 5, 5), (5, 5, 6), (5, 5, 7))  # one true, three false, one missed
    rates = voxel_rates(prediction, reference)
    assert rates == {"dsc": 2 / 6, "fpr": 3 / 2, "fnr": 1 / 2, "fdr": 3 / 4}
    assert volume_difference(prediction, reference) == (4 - 2) / 2


def test_the_volume_difference_does_not_say_where_and_counts_too_little_as_too_much():
    reference = voxels((0, 0, slice(0, 4)))
    assert volume_difference(voxels((9, 9, slice(0, 4))), reference) == 0
    assert volume_difference(voxels((0, 0, slice(0, 3))), reference) == volume_difference(
        voxels((0, 0, slice(0, 5))), reference
    )


@pytest.mark.parametrize("seed", range(5))
def test_rates_are_those_of_simpleitk(seed):
    prediction, reference = blobs(seed), blobs(seed + 50) | blobs(seed, threshold=0.5)
    # Of a source and a target; what it calls the false negative error is the share of the target outside the source.
    overlap, backwards = sitk.LabelOverlapMeasuresImageFilter(), sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(image(prediction), image(reference))
    backwards.Execute(image(reference), image(prediction))
    rates = voxel_rates(prediction, reference)
    assert rates["dsc"] == pytest.approx(overlap.GetDiceCoefficient())
    assert rates["fnr"] == pytest.approx(overlap.GetFalseNegativeError())
    assert rates["fdr"] == pytest.approx(backwards.GetFalseNegativeError())
    # SimpleITK has no false positives relative to the reference; they follow from volume and misses.
    sizes = int(prediction.sum()), int(reference.sum())
    assert rates["fpr"] == pytest.approx(rates["fdr"] * sizes[0] / sizes[1])
    similarity = overlap.GetVolumeSimilarity()  # 2 (source − target) / (source + target)
    assert volume_difference(prediction, reference) == pytest.approx(abs(similarity) * sum(sizes) / 2 / sizes[1])


@pytest.mark.parametrize("seed", range(3))
def test_dice_follows_from_both_rates(seed):
    """In one subject; of means over subjects it does not, which is how the paper's definition was inferred."""
    rates = voxel_rates(blobs(seed), blobs(seed + 50))
    assert rates["dsc"] == pytest.approx(2 * (1 - rates["fnr"]) / (2 - rates["fnr"] + rates["fpr"]))


# ----- lesions ---------------------------------------------------------------------------------------------------


def test_lesions_by_hand():
    """Three lesions, two of them found, one by a single voxel; two false components and two true ones."""
    reference = voxels((0, 0, slice(0, 4)), (4, slice(0, 5), 0), (9, 9, 9))
    prediction = voxels((0, 0, 0), (4, slice(3, 7), 0), (7, 7, slice(0, 5)), (12, 0, 0))
    found = lesion_detection(prediction, reference)
    recall, precision = 2 / 3, 2 / 4
    assert found["lesion_recall"] == recall
    assert found["lesion_fpr"] == 1 - precision
    assert found["lesion_f1"] == pytest.approx(2 * precision * recall / (precision + recall))


def test_one_component_finds_all_the_lesions_it_covers_and_one_lesion_makes_all_its_components_true():
    two, bridge = voxels((0, 0, 0), (0, 0, 2)), voxels((0, 0, slice(0, 3)))
    assert lesion_detection(bridge, two) == {"lesion_recall": 1, "lesion_f1": 1, "lesion_fpr": 0}
    assert lesion_detection(two, bridge) == {"lesion_recall": 1, "lesion_f1": 1, "lesion_fpr": 0}


def test_faces_edges_and_corners_join_voxels():
    nothing = voxels()
    for other, count in (((3, 3, 4), 1), ((3, 4, 4), 1), ((4, 4, 4), 1), ((3, 3, 5), 2)):
        assert len(lesion_sizes(nothing, voxels((3, 3, 3), other), (1, 1, 1))) == count


def test_a_component_beside_a_lesion_is_false():
    """Overlap counts, not neighbourhood."""
    found = lesion_detection(voxels((0, 0, 1)), voxels((0, 0, 0)))
    assert found == {"lesion_recall": 0, "lesion_f1": 0, "lesion_fpr": 1}


def detected(mask, other):
    """Numbers of components of a mask and of those that overlap the other, by SimpleITK's labels."""
    components = sitk.ConnectedComponent(image(mask), True)  # fully connected
    inside = sitk.GetArrayFromImage(sitk.Mask(components, image(other)))
    return int(sitk.GetArrayFromImage(components).max()), len(np.unique(inside[inside > 0]))


@pytest.mark.parametrize("seed", range(8))
def test_lesions_are_those_of_simpleitk(seed):
    prediction, reference = (blobs(seed + more, (22, 20, 18), threshold=0.33) for more in (0, 50))
    lesions, found = detected(reference, prediction)
    components, true = detected(prediction, reference)
    assert 0 < found < lesions
    assert 0 < true < components
    ours = lesion_detection(prediction, reference)
    assert ours["lesion_recall"] == pytest.approx(found / lesions)
    assert ours["lesion_fpr"] == pytest.approx(1 - true / components)
    precision, recall = true / components, found / lesions
    assert ours["lesion_f1"] == pytest.approx(2 * precision * recall / (precision + recall))


@pytest.mark.parametrize("seed", range(4))
def test_sizes_are_those_of_simpleitk(seed):
    prediction, reference, sides = blobs(seed, threshold=0.3), blobs(seed + 50, threshold=0.3), (0.9, 1.2, 3.0)
    reference_image, prediction_image = image(reference), image(prediction)
    for each in (reference_image, prediction_image):
        each.SetSpacing(sides[::-1])  # its arrays are (z, y, x)
    shapes, covered = sitk.LabelShapeStatisticsImageFilter(), sitk.LabelStatisticsImageFilter()
    components = sitk.ConnectedComponent(reference_image, True)
    shapes.Execute(components)
    covered.Execute(prediction_image, components)
    theirs = sorted((shapes.GetPhysicalSize(n) / 1000, covered.GetMean(n)) for n in shapes.GetLabels())
    ours = lesion_sizes(prediction, reference, sides)
    assert len(ours) > 3
    pairs = sorted((lesion["volume_ml"], lesion["share"]) for lesion in ours)
    assert np.allclose(pairs, theirs, rtol=1e-9, atol=1e-12)
    assert all(lesion["found"] == (lesion["share"] > 0) for lesion in ours)
    assert np.mean([lesion["found"] for lesion in ours]) == pytest.approx(
        lesion_detection(prediction, reference)["lesion_recall"]
    )


def test_sizes_by_hand():
    reference, prediction = voxels((0, 0, slice(0, 4)), (9, 9, 9)), voxels((0, 0, 3), (5, 5, 5))
    assert lesion_sizes(prediction, reference, (1, 2, 5)) == [
        {"volume_ml": pytest.approx(0.04), "found": True, "share": 0.25},
        {"volume_ml": pytest.approx(0.01), "found": False, "share": 0},
    ]
    assert lesion_sizes(prediction, voxels(), (1, 2, 5)) == []


# ----- what is not there -----------------------------------------------------------------------------------------


def test_subjects_without_lesions_have_numbers():
    empty, some = voxels(), voxels((1, 1, 1), (2, 2, slice(3, 9)))
    zero = dict.fromkeys(("dsc", "fpr", "fnr", "fdr", "avd", "lesion_recall", "lesion_f1", "lesion_fpr"), 0)
    assert everything(empty, empty) == {**zero, "dsc": 1, "lesion_recall": 1, "lesion_f1": 1}
    assert everything(some, empty) == {**zero, "fpr": 1, "fdr": 1, "avd": 1, "lesion_recall": 1, "lesion_fpr": 1}
    assert everything(empty, some) == {**zero, "fnr": 1, "avd": 1}
    assert everything(some, some) == {**zero, "dsc": 1, "lesion_recall": 1, "lesion_f1": 1}


def test_all_numbers_are_python_floats():
    """For CSV and JSON."""
    for prediction in (voxels(), blobs(0)):
        assert {type(value) for value in everything(prediction, blobs(1)).values()} == {float}
        lesion = lesion_sizes(prediction, blobs(1), (1, 1, 1))[0]
        assert [type(lesion[key]) for key in ("volume_ml", "found", "share")] == [float, bool, float]


# ----- other pathology -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_ignored_voxels_are_in_neither_mask(seed):
    prediction, reference, ignore = blobs(seed), blobs(seed + 50), blobs(seed + 80)
    without = prediction & ~ignore, reference & ~ignore
    assert everything(prediction, reference, ignore) == everything(*without)
    assert everything(prediction, reference, ignore) != everything(prediction, reference)
    assert lesion_sizes(prediction, reference, (1, 1, 3), ignore) == lesion_sizes(*without, (1, 1, 3))
    assert everything(prediction, reference, ~voxels())["dsc"] == 1  # nothing left: both are empty


def test_a_lesion_that_is_cut_by_what_is_ignored_becomes_two():
    reference, ignore = voxels((0, 0, slice(0, 5))), voxels((0, 0, 2))
    assert lesion_detection(voxels((0, 0, 0)), reference, ignore)["lesion_recall"] == 0.5
    assert [lesion["share"] for lesion in lesion_sizes(voxels((0, 0, 0)), reference, (1, 1, 1), ignore)] == [0.5, 0]


# ----- the volume around -----------------------------------------------------------------------------------------


def test_where_the_lesions_lie_in_a_volume_changes_nothing():
    """Only their joint bounding box is looked at."""
    prediction, reference = blobs(3), blobs(53)
    expected = everything(prediction, reference), lesion_sizes(prediction, reference, (1, 1, 3))
    for corner in ((0, 0, 0), (9, 3, 5), (22, 20, 14)):
        masks = torch.zeros(2, 36, 32, 24, dtype=torch.bool)
        at = tuple(slice(a, a + n) for a, n in zip(corner, SHAPE, strict=True))
        masks[0][at], masks[1][at] = prediction, reference
        assert (everything(*masks), lesion_sizes(*masks, (1, 1, 3))) == expected


def test_views_are_read_and_arguments_left_alone():
    prediction, reference = blobs(0), blobs(50)
    before = prediction.clone(), reference.clone()
    turned = everything(prediction.permute(2, 0, 1), reference.permute(2, 0, 1))
    assert turned == everything(prediction, reference)
    assert torch.equal(prediction, before[0])
    assert torch.equal(reference, before[1])


# ----- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", [voxel_rates, volume_difference, lesion_detection])
def test_label_maps_and_broadcasting_are_refused(measure):
    with pytest.raises(ValueError, match="bool"):
        measure(blobs(0).long(), blobs(1))
    with pytest.raises(ValueError, match="bool"):
        measure(blobs(0), blobs(1)[:1])
    with pytest.raises(ValueError, match="bool"):
        measure(blobs(0), blobs(1), blobs(2).long())


@pytest.mark.parametrize("spacing", [(1, 1), (1, 1, 0), (1, 1, float("nan"))])
def test_a_spacing_that_does_not_fit_is_refused(spacing):
    with pytest.raises(ValueError, match="expected 3 positive voxel sides in mm"):
        lesion_sizes(blobs(0), blobs(1), spacing)
