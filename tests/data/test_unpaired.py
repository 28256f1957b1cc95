"""Batches of one sequence each: shuffled apart, over slices that are held once, with lesions of other slices."""

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torchio as tio

from mrgen.data.datamodule import CohortDataModule
from mrgen.data.layouts import Layout
from mrgen.data.normalisation import MinMax
from mrgen.data.slices import SiteSlices
from mrgen.data.store import write_cohort, write_subject
from mrgen.errors import UserError
from mrgen.launch.paths import CONF_DIR

MODALITIES = ("t1", "t2", "flair")
SIZE = 16
ALL = {"kind": "ratio", "val": 0.0, "test": 0.0}


def written(folder, *, subjects=3, slices=4, lesions=((2, 1), (0, 3), (0, 0))):
    """Subjects whose voxels are 100 · subject + 10 · slice + sequence + 1; the s-th has lesions in slices of these."""
    write_cohort(folder, Layout.from_conf(CONF_DIR / "data" / "layout" / "brats2015.yaml"), MODALITIES)
    for s in range(subjects):
        number = 100 * s + 10 * np.arange(slices) + np.arange(len(MODALITIES))[:, None] + 1  # (C, Z)
        image = np.broadcast_to(number[:, None, None].astype(np.int16), (len(MODALITIES), SIZE, SIZE, slices)).copy()
        image[:, 0, 0, 0] = 1000  # so that MinMax divides every scan by the same
        label = np.zeros((SIZE, SIZE, slices), np.uint8)
        for row, z in enumerate(lesions[s]):
            if z:
                label[4 + row : 8, 4 : 5 + z, z] = 1 + s
        brain = np.ones(label.shape, bool)
        write_subject(folder, id=f"s{s}", image=image, brain=brain, label=label, affine=np.eye(4))
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return written(tmp_path_factory.mktemp("unpaired"))


def make(store, **changes):
    settings = {"split": ALL, "labels": "native", "sampling": SiteSlices((SIZE, SIZE)), "unpaired": True, **changes}
    return CohortDataModule(store=store, modalities=MODALITIES, normalisation=MinMax(), **settings)


def numbers(batch):
    """100 · subject + 10 · slice + sequence of each image."""
    return [round(float(value) * 1000) - 1 for value in batch["image"][:, 0, 8, 8]]


class Looker(pl.LightningModule):
    """Trains nothing and keeps what it was shown."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def training_step(self, batch, index):
        self.seen.append({name: numbers(part) for name, part in batch.items()})
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def fit(module, data, *, epochs, resume=None):
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, data, ckpt_path=resume)
    return trainer


def test_a_batch_is_of_one_sequence_and_has_lesions_of_other_slices(store):
    data = make(store, batch_size=2)
    batch = next(iter(data.train_dataloader()))[0]
    assert list(batch) == list(MODALITIES)
    for channel, part in enumerate(batch.values()):
        assert set(part) == {"image", "label", "brain", "subject", "spacing", "lesions"}
        assert tuple(part["image"].shape) == (2, 1, SIZE, SIZE)
        assert all(number % 10 == channel for number in numbers(part))  # of its own sequence
        assert tuple(part["lesions"].shape) == (2, 8, SIZE, SIZE)
        assert part["lesions"].dtype == torch.uint8
        assert (part["label"].dtype, tuple(part["label"].shape)) == (torch.int64, (2, SIZE, SIZE))


def test_lightning_shuffles_every_epoch_anew_and_every_sequence_apart(store, tmp_path):
    """Each epoch shows every slice of each sequence once, in an order of its own; a resumed run goes on with it."""
    looker = Looker()
    fit(looker, make(store), epochs=2)
    assert len(looker.seen) == 2 * 12
    orders = {}
    for epoch in range(2):
        for channel, name in enumerate(MODALITIES):
            shown = [step[name][0] - channel for step in looker.seen[12 * epoch : 12 * epoch + 12]]
            assert sorted(shown) == [100 * s + 10 * z for s in range(3) for z in range(4)]
            orders[epoch, name] = tuple(shown)
    assert len(set(orders.values())) == 6

    first, second = Looker(), Looker()
    fit(first, make(store), epochs=1).save_checkpoint(tmp_path / "one.ckpt")
    fit(second, make(store), epochs=2, resume=tmp_path / "one.ckpt")
    assert first.seen + second.seen == looker.seen
    other = Looker()
    fit(other, make(store, seed=1), epochs=1)
    assert other.seen != first.seen


def test_lesions_are_those_of_slices_that_have_one_and_never_the_slices_own(store):
    """Three slices have a lesion, each of another shape; the cohort's fourth class is there, as labels are native."""
    data = make(store, batch_size=12)
    (batch,) = [part for part, *_ in data.train_dataloader()]
    shapes = {label.numpy().tobytes() for part in batch.values() for label in part["label"].to(torch.uint8)}
    shapes -= {bytes(SIZE * SIZE)}
    assert len(shapes) == 3
    for part in batch.values():
        for label, lesions in zip(part["label"].to(torch.uint8), part["lesions"], strict=True):
            drawn = {lesion.numpy().tobytes() for lesion in lesions}
            assert drawn <= shapes - {label.numpy().tobytes()}
    chosen = [part["lesions"].numpy().tobytes() for part in batch.values()]
    assert len(set(chosen)) == 3  # each sequence draws its own
    again = next(iter(make(store, batch_size=12).train_dataloader()))[0]
    assert [part["lesions"].numpy().tobytes() for part in again.values()] == chosen


def test_slices_are_held_once(store):
    data = make(store)
    datasets = [loader.dataset for loader in data.train_dataloader().flattened]
    assert len(datasets) == 3
    assert all(dataset.slices is data.training_slices for dataset in datasets)


def test_augmentation_moves_image_label_and_brain_together_and_not_the_lesions(store):
    flip = [tio.RandomFlip(axes=["LR"], flip_probability=1)]
    plain, flipped = (
        next(iter(make(store, batch_size=12, augmentation=change).train_dataloader()))[0] for change in (None, flip)
    )
    for name in MODALITIES:
        assert torch.equal(flipped[name]["label"], plain[name]["label"].flip(1))
        assert torch.equal(flipped[name]["image"], plain[name]["image"].flip(2))
        assert torch.equal(flipped[name]["lesions"], plain[name]["lesions"])


def test_validation_stays_paired(store):
    split = {"kind": "explicit", "train": ["s0", "s1"], "val": ["s2"], "test": []}
    (batch,) = make(store, split=split).val_dataloader()
    assert tuple(batch["image"].shape) == (4, 3, SIZE, SIZE)
    assert "lesions" not in batch


@pytest.mark.parametrize(("lesions", "count"), [(((0, 0),) * 3, 0), (((2, 2), (0, 0), (0, 0)), 1)])
def test_without_two_slices_with_a_lesion_nothing_is_trained(tmp_path, lesions, count):
    with pytest.raises(UserError, match=rf"{count} of 12 training slices have a lesion; expected two at least"):
        make(written(tmp_path, lesions=lesions))


def test_sequences_are_unpaired_in_slices_alone(store):
    from mrgen.data.crops import BrainBox

    with pytest.raises(UserError, match="needs axial slices"):
        make(store, sampling=BrainBox())
