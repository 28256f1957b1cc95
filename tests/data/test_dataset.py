import numpy as np
import pytest
import torch
import torchio as tio

from mrgen.data.crops import BrainBox, RandomPatch
from mrgen.data.dataset import CropDataset
from mrgen.data.layouts import Layout
from mrgen.data.normalisation import ZScore
from mrgen.data.slices import AxialSlice
from mrgen.data.store import Store, write_cohort, write_subject
from mrgen.launch.paths import CONF_DIR

MODALITIES = ("t1", "t1ce", "t2", "flair")
LAYOUT = Layout.from_conf(CONF_DIR / "data" / "layout" / "brats2019.yaml")


def dataset(subjects, *, crop=None, modalities=MODALITIES, labels="regions", augment=None, seed=0):
    if crop is None:
        crop = BrainBox()
        crop.fit(subjects)
    lookup = LAYOUT.label_lookup(labels)
    return CropDataset(
        subjects,
        modalities=modalities,
        lookup=lookup,
        crop=crop,
        normalisation=ZScore(),
        augment=augment,
        seed=seed,
    )


@pytest.fixture(scope="module")
def subjects(phantom_store):
    return list(Store(phantom_store).subjects.values())


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    """A subject whose intensity says label and brain of its voxel: 0, 10 + label within the brain."""
    folder = tmp_path_factory.mktemp("coded")
    write_cohort(folder, LAYOUT, ["t1"])
    brain, label = np.zeros((24, 24, 24), bool), np.zeros((24, 24, 24), np.uint8)
    brain[3:21, 5:20, 4:19] = True
    brain[3:9, 14:20, 12:19] = False  # no axis is one of symmetry
    label[5:11, 6:12, 6:15], label[6:9, 7:10, 8:12], label[7:8, 8:9, 9:11] = 2, 1, 4
    image = np.where(brain, 10 + label, 0)[None].astype(np.int16)
    return write_subject(folder, id="coded", image=image, brain=brain, label=label, affine=np.eye(4))


def test_a_sample_is_what_the_batch_promises(subjects):
    sample = dataset(subjects)[0, 0, 2]
    size = (32, 40, 32)
    assert sample["image"].dtype == torch.float32
    assert sample["image"].shape == (4, *size)
    assert (sample["label"].dtype, sample["label"].shape) == (torch.int64, size)
    assert (sample["brain"].dtype, sample["brain"].shape) == (torch.bool, size)
    assert sample["subject"] == subjects[2].id
    assert sample["spacing"].dtype == torch.float32
    assert sample["spacing"].tolist() == list(subjects[2].spacing) == [5, 5, 5]


def test_spacing_is_the_scans_own_along_x_y_z_whatever_the_augmentation(tmp_path):
    write_cohort(tmp_path, LAYOUT, ["t1"])
    brain = np.ones((8, 8, 8), bool)
    scan = {
        "image": np.arange(512, dtype=np.int16).reshape(1, 8, 8, 8),
        "brain": brain,
        "label": brain.astype(np.uint8),
    }
    subject = write_subject(tmp_path, id="thick", affine=np.diag([0.5, 1, 3, 1]), **scan)
    turn = tio.RandomAffine(scales=0.5, degrees=90)
    for augment in (None, turn):
        sample = dataset([subject], modalities=("t1",), augment=augment)[0, 0, 0]
        assert sample["spacing"].tolist() == [0.5, 1, 3]


def test_labels_are_mapped_and_the_stores_own_number_4_becomes_class_3(subjects):
    subject = subjects[0]
    assert subject.label_counts[4] > 0
    data = dataset(subjects)
    own, mapped = subject.read_label(data.crop(subject, None)), data[0, 0, 0]["label"].numpy()
    assert set(np.unique(mapped)) == {0, 1, 2, 3}
    for number, class_index in {0: 0, 1: 1, 2: 2, 4: 3}.items():
        assert np.array_equal(mapped == class_index, own == number)
    assert set(np.unique(dataset(subjects, labels="native")[0, 0, 0]["label"])) == {0, 1, 2, 4}


def test_channels_stand_in_the_order_asked_for(subjects):
    image = dataset(subjects)[0, 0, 0]["image"]
    two = dataset(subjects, modalities=("flair", "t1"))[0, 0, 0]["image"]
    assert torch.equal(two, image[[3, 0]])


def test_the_crop_shows_image_label_and_brain_of_the_same_place(coded):
    data = dataset([coded], crop=RandomPatch(size=(8, 8, 8)), modalities=("t1",))
    for index in range(20):
        agree(data[0, index, 0], coded)


def agree(sample, coded):
    """The intensity of every voxel is the one that its label and its brain mask have."""
    s = coded.statistics["t1"]
    code = {0: 10.0, 1: 11.0, 2: 12.0, 3: 14.0}
    expected = torch.zeros(sample["label"].shape)
    for label, value in code.items():
        value = (min(max(value, s["p0_5"]), s["p99_5"]) - s["clipped_mean"]) / s["clipped_std"]
        expected[(sample["label"] == label) & sample["brain"]] = value
    torch.testing.assert_close(sample["image"][0], expected, atol=1e-4, rtol=0)


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in ("image", "label", "brain"))


@pytest.mark.parametrize("augment", [None, tio.RandomAffine(degrees=20)], ids=["plain", "augmented"])
def test_a_sample_is_a_function_of_seed_epoch_index_and_subject(subjects, augment):
    crop = RandomPatch(size=(8, 8, 8))
    make = {seed: dataset(subjects, crop=crop, augment=augment, seed=seed) for seed in (0, 1)}
    first = make[0][3, 5, 1]
    make[0][0, 0, 0], torch.rand(3)  # what was drawn before is of no account
    assert same(first, make[0][3, 5, 1])
    assert same(first, dataset(subjects, crop=crop, augment=augment)[3, 5, 1])
    for other in (make[1][3, 5, 1], make[0][4, 5, 1], make[0][3, 6, 1]):
        assert not same(first, other)


def test_a_flip_moves_image_label_and_brain_together(coded):
    plain = dataset([coded], modalities=("t1",))[0, 0, 0]
    flipped = dataset([coded], modalities=("t1",), augment=tio.RandomFlip(axes=["LR"], flip_probability=1))[0, 0, 0]
    for key, axis in (("image", 1), ("label", 0), ("brain", 0)):  # left–right is x
        assert torch.equal(flipped[key], plain[key].flip(axis))
        assert not torch.equal(flipped[key], plain[key])
        assert flipped[key].dtype == plain[key].dtype


def test_an_affine_transform_moves_image_label_and_brain_together(coded):
    turn = tio.RandomAffine(scales=0.2, degrees=30, image_interpolation="nearest")
    data = dataset([coded], modalities=("t1",), augment=turn)
    plain = dataset([coded], modalities=("t1",))[0, 0, 0]
    for index in range(5):
        sample = data[0, index, 0]
        assert not torch.equal(sample["label"], plain["label"])
        assert set(sample["label"].unique().tolist()) <= {0, 1, 2, 3}
        agree(sample, coded)


def test_labels_and_brain_are_never_interpolated(coded):
    smooth, nearest = [
        dataset([coded], modalities=("t1",), augment=tio.RandomAffine(degrees=30, image_interpolation=how))[0, 0, 0]
        for how in ("linear", "nearest")
    ]
    assert torch.equal(smooth["label"], nearest["label"])
    assert torch.equal(smooth["brain"], nearest["brain"])
    assert not torch.equal(smooth["image"], nearest["image"])


def test_background_stays_0_under_rotation_and_noise(subjects):
    # TorchIO fills what a rotation brings in with the image's minimum, the darkest brain voxel of a z-scored image.
    augment = tio.Compose([tio.RandomAffine(scales=0.3, degrees=30), tio.RandomNoise(std=(0.1, 0.1))])
    data = dataset(subjects, augment=augment)
    for index in range(3):
        sample = data[0, index, index]
        assert not sample["image"][:, ~sample["brain"]].any()
        assert sample["image"][:, sample["brain"]].all()  # and the brain does not


def test_augmentation_leaves_the_global_generators_untouched(subjects):
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002  it is the legacy global state that must not move
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    dataset(subjects, augment=tio.RandomAffine())[0, 0, 0]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


def test_length_is_the_number_of_subjects(subjects):
    assert len(dataset(subjects[:3])) == 3


@pytest.mark.parametrize("augment", [None, tio.RandomFlip(axes=["LR", "AP"], flip_probability=1)])
def test_a_slice_has_no_z_and_is_that_of_the_volume(coded, augment):
    crop = AxialSlice(divisor=4)
    crop.fit([coded])
    data = dataset([coded], crop=crop, modalities=("t1",), augment=augment)
    for index in range(5):
        sample = data[0, index, 0]
        assert (sample["image"].shape, sample["label"].shape, sample["brain"].shape) == ((1, 20, 16), *[(20, 16)] * 2)
        assert (sample["label"].dtype, sample["brain"].dtype) == (torch.int64, torch.bool)
        assert sample["spacing"].shape == (3,)
        agree(sample, coded)
        (x, y, (z, _)) = crop(coded, np.random.default_rng([0, 0, index]))
        brain = torch.from_numpy(coded.read_brain((x, y, (z, z + 1)))[:, :, 0])
        assert torch.equal(sample["brain"], brain if augment is None else brain.flip(0, 1))
