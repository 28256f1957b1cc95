"""What goes with slices: cut as they are, of training subjects alone, the same after loading."""

import numpy as np
import pytest
import torch
import torchio as tio

from mrgen.data.atlas import Atlas
from mrgen.data.crops import BrainBox
from mrgen.data.datamodule import CohortDataModule
from mrgen.data.guides import fit_guides, guide_slices, label_maps, load_guides, save_guides
from mrgen.data.normalisation import Symmetric
from mrgen.data.slice_dataset import SliceDataset, SubjectSlices
from mrgen.data.slices import SiteSlices
from mrgen.data.store import Store
from mrgen.errors import UserError

BOTH = ("t1ce", "flair")
CUT = {"size": (48, 48), "dropped_elsewhere": 0.2}


@pytest.fixture(scope="module")
def store(phantom_store):
    return Store(phantom_store)


@pytest.fixture(scope="module")
def subjects(store):
    return list(store.subjects.values())


@pytest.fixture(scope="module")
def guides(subjects):
    return fit_guides(["atlas"], subjects[:5], BOTH, Symmetric())


def dataset(kind, store, subjects, guides, **cut):
    return kind(
        subjects,
        modalities=BOTH,
        lookup=store.layout.label_lookup("regions"),
        slices=SiteSlices(**CUT, **cut),
        normalisation=Symmetric(),
        guides=guides,
    )


@pytest.mark.parametrize("step", [1, 3])
def test_a_slice_comes_with_three_slices_of_the_atlas_at_its_place(store, subjects, guides, step):
    data = dataset(SliceDataset, store, subjects[5:6], guides, step=step)
    cut, subject = SiteSlices(**CUT, step=step), subjects[5]
    (x, y, _), shown = cut.box(subject.shape, None), cut.training(subject.shape, None)
    assert len(data) == len(shown)
    for index in (0, len(data) // 2, len(data) - 1):
        z = shown[index]
        sample = data[0, 0, index]
        expected = guides["atlas"].crop((x, y, (z, z + 1)))[..., 0]
        assert sample["atlas"].shape == (6, 48, 48)
        assert sample["atlas"].dtype == torch.float32
        assert np.allclose(sample["atlas"], expected, atol=2e-3)  # held in half precision
        assert np.array_equal(sample["brain"], subject.read_brain((x, y, (z, z + 1)))[..., 0])


def test_validation_sees_the_guides_of_all_slices(store, subjects, guides):
    batch = dataset(SubjectSlices, store, subjects[5:6], guides)[0, 0, 0]
    slices = subjects[5].shape[2]
    assert batch["image"].shape == (slices, 2, 48, 48)
    assert batch["atlas"].shape == (slices, 6, 48, 48)


def test_in_one_space_all_subjects_share_one_copy(store, subjects, guides):
    first, second = (stack.guides["atlas"] for stack in dataset(SliceDataset, store, subjects[:2], guides)._read.stacks)
    assert first is second


def test_what_is_shown_does_not_depend_on_the_step_of_reading(subjects, guides):
    box = ((8, 40), (8, 40), (5, 14))
    view = guides["atlas"].on(subjects[0])
    assert np.array_equal(guide_slices(view, box)[::3], guide_slices(view, box, 3))


def test_spatial_transforms_move_guides_along_and_intensities_leave_them(store, subjects, guides):
    plain = dataset(SliceDataset, store, subjects[5:6], guides)
    flipped = dataset(SliceDataset, store, subjects[5:6], guides)
    flipped.augment = tio.Compose([tio.Flip(axes=0), tio.Noise(mean=0.0, std=0.5, seed=1)])
    middle = len(plain) // 2
    one, other = plain[0, 0, middle], flipped[0, 0, middle]
    assert torch.equal(other["atlas"], one["atlas"].flip(1))
    assert torch.equal(other["label"], one["label"].flip(0))
    assert not torch.equal(other["image"], one["image"].flip(1))
    assert bool((other["image"][:, ~other["brain"]] == -1).all())  # the background of this scale


def test_what_comes_in_at_a_border_is_background_in_the_atlas_too(store, subjects, guides):
    data = dataset(SliceDataset, store, subjects[5:6], guides)
    data.augment = tio.Affine(scales=1, degrees=0, translation=(8, 0, 0))  # voxels: a tensor has sides of 1 mm
    middle = len(data) // 2
    plain = dataset(SliceDataset, store, subjects[5:6], guides)[0, 0, middle]["atlas"]
    moved = data[0, 0, middle]["atlas"]
    assert torch.allclose(moved[:, 8:], plain[:, :-8]) or torch.allclose(moved[:, :-8], plain[:, 8:])
    assert float(moved.min()) == pytest.approx(float(plain.min()))
    border = moved[:, :8] if torch.allclose(moved[:, 8:], plain[:, :-8]) else moved[:, -8:]
    assert torch.allclose(border, plain.min().expand_as(border))


def test_what_a_generator_is_given_is_what_training_saw(store, subjects, guides):
    cut, subject = SiteSlices(**CUT, step=2), subjects[6]
    x, y, _ = cut.box(subject.shape, None)
    shown = cut.training(subject.shape, None)
    maps = label_maps(subject, (x, y, (shown.start, shown.stop)), store.layout.label_lookup("regions"), guides, step=2)
    data = dataset(SliceDataset, store, [subject], guides, step=2)
    for z in range(len(data)):
        sample = data[0, 0, z]
        assert torch.equal(maps.label[z], sample["label"])
        assert torch.equal(maps.brain[z], sample["brain"])
        assert torch.allclose(maps.guides["atlas"][z], sample["atlas"], atol=2e-3)


def test_a_run_keeps_the_atlas_of_its_training_subjects(subjects, guides, tmp_path):
    save_guides(guides, tmp_path)
    loaded = load_guides(["atlas"], tmp_path)["atlas"]
    assert isinstance(loaded, Atlas)
    assert np.array_equal(loaded.mean, guides["atlas"].mean)
    assert loaded.subjects == tuple(sorted(subject.id for subject in subjects[:5]))
    with pytest.raises(UserError, match=r"atlas\.json"):
        load_guides(["atlas"], tmp_path / "other")


def test_guides_go_with_slices_alone(phantom_store):
    settings = {"split": {"kind": "ratio", "val": 0.25, "test": 0.0}, "normalisation": Symmetric()}
    with pytest.raises(UserError, match=r"a method with atlas needs axial slices; set data/sampling=slices"):
        CohortDataModule(store=phantom_store, modalities=BOTH, sampling=BrainBox(), guides=["atlas"], **settings)
    data = CohortDataModule(
        store=phantom_store, modalities=BOTH, sampling=SiteSlices(**CUT), guides=["atlas"], batch_size=3, **settings
    )
    batch = next(iter(data.train_dataloader()))
    assert batch["atlas"].shape == (3, 6, 48, 48)
    assert data.guides["atlas"].subjects == data.split.train
    validation = next(iter(data.val_dataloader()))
    assert validation["atlas"].shape[:2] == (len(validation["image"]), 6)


def test_a_guide_that_does_not_exist(subjects):
    with pytest.raises(UserError, match="expected atlas or tissue"):
        fit_guides(["map"], subjects, BOTH, Symmetric())
