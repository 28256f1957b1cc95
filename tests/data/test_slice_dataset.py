"""Slices as Li et al. cut and normalise them, at their numbers and from phantoms."""

import numpy as np
import pytest
import torch
import torchio as tio

from mrgen.data.layouts import Layout
from mrgen.data.normalisation import Gaussian, ZScore
from mrgen.data.slice_dataset import SliceDataset, SubjectSlices
from mrgen.data.slices import SiteSlices
from mrgen.data.store import Store, write_cohort, write_subject
from mrgen.launch.paths import CONF_DIR

LAYOUT = Layout.from_conf(CONF_DIR / "data" / "layout" / "wmh2017.yaml")
BOTH = ("t1", "flair")
LI = {"t1": 30, "flair": 70}
SCANS = {"Utrecht": (240, 240, 8), "Singapore": (232, 256, 8), "GE3T": (132, 256, 8)}  # in-plane at full size
SITES = {"size": (200, 200), "front": {"GE3T": 0.8214}, "dropped": {"GE3T": 0.25}, "dropped_elsewhere": 0.125}


def slices(kind, subjects, *, cut=None, modalities=BOTH, normalisation=None, **more):
    return kind(
        subjects,
        modalities=modalities,
        lookup=LAYOUT.label_lookup("regions"),
        slices=cut or SiteSlices(**SITES, zeroed=0.125),
        normalisation=normalisation or Gaussian(LI, size=(200, 200), whole_slices=["GE3T"]),
        **more,
    )


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """One subject a site with noise of 200 to 899 in an ellipse of head and of 3 to 9 around it, lesions 1 and 2."""
    folder, subjects = tmp_path_factory.mktemp("heads"), {}
    write_cohort(folder, LAYOUT, BOTH)
    for seed, (site, shape) in enumerate(SCANS.items()):
        rng = np.random.default_rng(seed)
        x, y = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape[:2]), indexing="ij")
        head = np.broadcast_to((x**2 + (y / 0.7) ** 2 < 0.9)[..., None], shape)
        image = np.where(head, rng.integers(200, 900, (2, *shape)), rng.integers(3, 10, (2, *shape))).astype(np.int16)
        label = (head * rng.integers(0, 3, shape)).astype(np.uint8)
        subjects[site] = write_subject(
            folder, id=site, site=site, image=image, label=label, brain=head, affine=np.diag([1, 1, 3, 1])
        )
    return subjects


@pytest.fixture(scope="module")
def elderly(wmh_store):
    return list(Store(wmh_store).subjects.values())


def all_of(data):
    """Every slice of a dataset without augmentation, in order: image (N, C, X, Y), label and brain (N, X, Y)."""
    samples = [data[0, 0, i] for i in range(len(data))]
    return tuple(torch.stack([sample[key] for sample in samples]) for key in ("image", "label", "brain"))


# ----- what is cut and how it is normalised ----------------------------------------------------------------------


def cut_by_hand(volume, site):
    """Li's array arithmetic. (X, Y, Z) to (200, 200, Z), padded with NaN; y is flipped, as rows go to the back."""
    rows = volume[:, ::-1]
    if site == "GE3T":
        out = np.full((200, 200, volume.shape[2]), np.nan)
        out[34:166] = rows[:, 46:246]
    else:
        x, y = (volume.shape[0] - 200) // 2, (volume.shape[1] - 200) // 2
        out = rows[x : x + 200, y : y + 200].astype(float)
    return out[:, ::-1]


@pytest.mark.parametrize("site", SCANS)
def test_slices_of_a_site_by_hand(heads, site):
    """Statistics over the head (its holes do not matter here: there are none) after the crop, of GE3T before it."""
    subject = heads[site]
    data = slices(SubjectSlices, [subject], cut=SiteSlices(**SITES))
    image = data[0, 0, 0]["image"].numpy()
    assert image.dtype == np.float32
    assert image.shape == (8, 2, 200, 200)
    for channel, (name, threshold) in enumerate(LI.items()):
        scan = subject.read_image([name])[0].astype(float)
        shown = cut_by_hand(scan, site)
        looked_at = scan if site == "GE3T" else shown
        head = looked_at[looked_at >= threshold]
        expected = (shown - head.mean()) / head.std()
        smallest = (scan.min() - head.mean()) / head.std()  # of the normalised image, and not 0
        expected = np.where(np.isnan(expected), smallest, expected)
        np.testing.assert_allclose(image[:, channel].transpose(1, 2, 0), expected, atol=1e-5)
        assert smallest < -1
    if site == "GE3T":
        assert (image[:, :, :34] == image.min((0, 2, 3), keepdims=True)).all()
        assert (image[:, :, 166:] == image.min((0, 2, 3), keepdims=True)).all()
        assert not (image[:, :, 34:166] == image.min((0, 2, 3), keepdims=True)).all()


@pytest.mark.parametrize("site", SCANS)
def test_labels_and_brain_are_cut_alike(heads, site):
    subject = heads[site]
    batch = slices(SubjectSlices, [subject], cut=SiteSlices(**SITES))[0, 0, 0]
    for key, volume in (("label", subject.read_label()), ("brain", subject.read_brain())):
        expected = np.nan_to_num(cut_by_hand(volume, site)).transpose(2, 0, 1)
        if key == "label":
            expected[expected == 2] = 255
        assert np.array_equal(batch[key].numpy(), expected)
    assert (batch["label"].dtype, batch["brain"].dtype) == (torch.int64, torch.bool)
    assert set(batch["label"].unique().tolist()) == {0, 1, 255}


def test_slices_that_are_smaller_than_the_cut_are_padded_with_their_minimum(elderly):
    cut = SiteSlices((64, 80))
    for subject in elderly[:3]:
        x, y, _ = cut.box(subject.shape, subject.site)
        batch = slices(SubjectSlices, [subject], cut=cut)[0, 0, 0]
        outside = torch.ones(64, 80, dtype=torch.bool)
        outside[-x[0] : -x[0] + subject.shape[0], -y[0] : -y[0] + subject.shape[1]] = False
        assert outside.sum() == 64 * 80 - subject.shape[0] * subject.shape[1]
        for channel in range(2):
            values = batch["image"][:, channel]
            assert (values[:, outside] == values.min()).all()
            assert values.min() < -1
        assert not batch["label"][:, outside].any()
        assert not batch["brain"][:, outside].any()


# ----- which slices ----------------------------------------------------------------------------------------------


def test_training_shows_each_slice_but_the_outermost_and_validation_all_in_which_lesions_may_be(heads):
    data = slices(SliceDataset, list(heads.values()))
    assert [(stack.subject.id, z) for stack, z in data.places] == [
        *[("Utrecht", z) for z in range(6)],
        *[("Singapore", z) for z in range(6)],
        *[("GE3T", z) for z in range(4)],
    ]
    image, label, brain = all_of(data)
    for site, first, kept in (("Utrecht", 0, slice(1, 7)), ("Singapore", 6, slice(1, 7)), ("GE3T", 12, slice(2, 6))):
        whole = slices(SubjectSlices, [heads[site]], cut=SiteSlices(**SITES))[0, 0, 0]
        last = first + kept.stop - kept.start
        assert torch.equal(image[first:last], whole["image"][kept])
        assert torch.equal(label[first:last], whole["label"][kept])
        assert torch.equal(brain[first:last], whole["brain"][kept])
        tested = slices(SubjectSlices, [heads[site]])[0, 0, 0]
        assert torch.equal(tested["image"], whole["image"][1:7])


def test_samples_are_a_batch_without_z(elderly):
    cut = SiteSlices((48, 48), zeroed=0.125)
    sample = slices(SliceDataset, elderly, cut=cut)[0, 0, 40]
    assert {key: tuple(sample[key].shape) for key in ("image", "label", "brain", "spacing")} == {
        "image": (2, 48, 48),
        "label": (48, 48),
        "brain": (48, 48),
        "spacing": (3,),
    }
    assert sample["subject"] == elderly[1].id  # GE3T's 30 slices come first
    batch = slices(SubjectSlices, elderly, cut=cut)[0, 0, 1]
    assert {key: tuple(batch[key].shape) for key in ("image", "label", "brain", "spacing")} == {
        "image": (22, 2, 48, 48),
        "label": (22, 48, 48),
        "brain": (22, 48, 48),
        "spacing": (22, 3),
    }
    assert batch["subject"] == [elderly[1].id] * 22
    assert batch["spacing"][0].tolist() == [5, 5, 5]


def test_sequences_stand_in_the_order_asked_for_and_have_their_own_statistics(heads):
    both = slices(SubjectSlices, [heads["GE3T"]])[0, 0, 0]["image"]
    for order in (("flair", "t1"), ("flair",)):
        image = slices(SubjectSlices, [heads["GE3T"]], modalities=order)[0, 0, 0]["image"]
        assert torch.equal(image, both[:, [BOTH.index(name) for name in order]])


def test_other_pathology_is_ignored(elderly):
    subject = next(subject for subject in elderly if subject.label_counts.get(2))
    batch = slices(SubjectSlices, [subject], cut=SiteSlices((64, 64)))[0, 0, 0]
    assert int((batch["label"] == 255).sum()) == subject.label_counts[2]
    assert int((batch["label"] == 1).sum()) == subject.label_counts[1]


def test_an_unlabelled_subject_has_no_lesion(tmp_path):
    write_cohort(tmp_path, LAYOUT, BOTH)
    image = np.random.default_rng(0).integers(80, 99, (2, 20, 20, 3))
    subject = write_subject(tmp_path, id="a", image=image, brain=image[0] > 0, affine=np.eye(4))
    assert not all_of(slices(SliceDataset, [subject], cut=SiteSlices((16, 16))))[1].any()


# ----- both orders of Singapore's axes ---------------------------------------------------------------------------


def test_both_orders_of_singapores_axes_give_the_same_slices(tmp_path):
    """One subject, written with its in-plane axes as they are and swapped."""
    import nibabel

    from mrgen.data.phantom.layouts import LAYOUTS, Case
    from mrgen.data.phantom.subject import grow_subject
    from mrgen.data.preparation import prepare_cohort

    grown = grow_subject(seed=0, index=1, spacing=5, pathology="wmh")
    assert grown.site == "Singapore"
    shapes, subjects = [], []
    for number in (1, 4):  # even ones are swapped
        raw, store = tmp_path / f"raw{number}", tmp_path / f"store{number}"
        folder = raw / "Singapore" / str(number)
        folder.mkdir(parents=True)
        LAYOUTS["wmh2017"].write(grown, folder, Case(number, 1, 0, None, "Singapore"))
        shapes.append(nibabel.load(folder / "pre" / "T1.nii.gz").shape[:2])
        assert not prepare_cohort(LAYOUT, raw, store, workers=0, progress=False).problems
        subjects += Store(store).subjects.values()
    assert shapes[0] == shapes[1][::-1] != shapes[1]
    assert [subject.id for subject in subjects] == ["Singapore_1", "Singapore_4"]
    assert subjects[0].checksums == subjects[1].checksums  # turned the same way, they are one scan
    cut = SiteSlices((44, 48), zeroed=0.125)
    one, other = (slices(SubjectSlices, [subject], cut=cut)[0, 0, 0] for subject in subjects)
    for key in ("image", "label", "brain", "spacing"):
        assert torch.equal(one[key], other[key]), key
    assert one["label"].any()


# ----- augmentation and order ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("normalisation", "kept"), [(None, True), (ZScore(), False)])
def test_augmentation_keeps_a_background_that_is_no_mask(heads, normalisation, kept):
    """Gaussian's lies below −1 and is what the networks know from test; a normalisation that masks has 0 there."""
    subject = heads["Utrecht"]
    flip = tio.RandomFlip(axes=["LR"], flip_probability=1)
    plain = slices(SliceDataset, [subject], normalisation=normalisation)
    flipped = slices(SliceDataset, [subject], normalisation=normalisation, augment=flip)
    for name in ("image", "label", "brain"):
        got, expected = flipped[0, 0, 3][name], plain[0, 0, 3][name]
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        assert torch.equal(got, expected.flip(-2))
    noisy = slices(SliceDataset, [subject], normalisation=normalisation, augment=tio.RandomNoise(std=(0.1, 0.1)))
    outside = ~noisy[0, 0, 3]["brain"]
    background = noisy[0, 0, 3]["image"][:, outside]
    assert (float(background.mean()) < -1) == kept
    assert bool(background.any()) == kept


def test_labels_stay_labels_under_augmentation(heads):
    turned = slices(SliceDataset, [heads["Utrecht"]], augment=tio.RandomAffine(scales=0.1, degrees=20))[0, 0, 3]
    assert set(turned["label"].unique().tolist()) == {0, 1, 255}
    assert turned["brain"].dtype == torch.bool


def test_what_is_drawn_is_a_function_of_seed_epoch_and_index(heads):
    states = iter(range(9))

    def drawn(seed, key):
        data = slices(SliceDataset, [heads["Utrecht"]], augment=tio.RandomNoise(), seed=seed)
        torch.manual_seed(next(states))  # of the process, not of the sample
        return data[key]["image"]

    first = drawn(1, (2, 5, 3))
    assert torch.equal(drawn(1, (2, 5, 3)), first)
    for seed, key in ((2, (2, 5, 3)), (1, (3, 5, 3)), (1, (2, 6, 3))):
        assert not torch.equal(drawn(seed, key), first)


def test_reading_a_slice_leaves_the_dataset_as_it_was(heads):
    data = slices(SliceDataset, [heads["Utrecht"]])
    first = data[0, 0, 2]
    for name in ("image", "label", "brain"):
        first[name].zero_()
    again = data[1, 7, 2]
    assert again["image"].any()
    assert again["label"].any()
    assert again["brain"].any()
