from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torchio as tio

from mrgen.data.batch import volumes
from mrgen.data.crops import BrainBox, RandomPatch
from mrgen.data.datamodule import CohortDataModule
from mrgen.data.layouts import Layout
from mrgen.data.normalisation import Gaussian, ZScore
from mrgen.data.sampler import TrainingSampler
from mrgen.data.slices import SiteSlices
from mrgen.data.store import Store, write_cohort, write_subject
from mrgen.errors import UserError
from mrgen.launch.paths import CONF_DIR

MODALITIES = ("t1", "t1ce", "t2", "flair")
SPLIT = {"kind": "ratio", "val": 0.25, "test": 0.25}  # of 8 subjects: 4, 2 and 2


def make(store, **changes):
    settings = {
        "modalities": MODALITIES,
        "split": SPLIT,
        "normalisation": ZScore(),
        "sampling": BrainBox(),
        **changes,
    }
    return CohortDataModule(store=store, **settings)


def written(folder, layout, labels, *, modalities=("t1", "flair")):
    """A store of 8×8×8 subjects with a 6×6×6 brain and these label values, listed by number: {label: voxels}."""
    write_cohort(folder, Layout.from_conf(CONF_DIR / "data" / "layout" / f"{layout}.yaml"), modalities)
    brain = np.zeros((8, 8, 8), bool)
    brain[1:7, 1:7, 1:7] = True
    for i, counts in enumerate(labels):
        image = np.random.default_rng(i).integers(1, 100, (len(modalities), 8, 8, 8)) * brain
        label = None
        if counts is not None:
            inside, values = np.flatnonzero(brain), [n for n, count in counts.items() for _ in range(count)]
            label = np.zeros(brain.size, np.uint8)
            label[inside[: len(values)]] = values
            label = label.reshape(brain.shape)
        write_subject(folder, id=f"s{i}", image=image, brain=brain, label=label, affine=np.eye(4))
    return folder


def attach(datamodule, rank, world_size):
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    datamodule.trainer = SimpleNamespace(global_rank=rank, world_size=world_size, strategy=strategy)
    return datamodule


# ----- the batch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", ["train_dataloader", "val_dataloader", "test_dataloader"])
def test_batches_are_what_every_method_takes(phantom_store, loader):
    datamodule = make(phantom_store, modalities=("flair", "t1"))
    batch = next(iter(getattr(datamodule, loader)()))
    size = datamodule.whole.size
    assert set(batch) == {"image", "label", "brain", "subject", "spacing"}
    assert (batch["image"].dtype, tuple(batch["image"].shape)) == (torch.float32, (1, 2, *size))
    assert (batch["label"].dtype, tuple(batch["label"].shape)) == (torch.int64, (1, *size))
    assert (batch["brain"].dtype, tuple(batch["brain"].shape)) == (torch.bool, (1, *size))
    assert isinstance(batch["subject"], list)
    assert batch["subject"][0] in datamodule.store.subjects
    assert (batch["spacing"].dtype, batch["spacing"].tolist()) == (torch.float32, [[5, 5, 5]])


def test_volumes_name_the_channels_in_the_order_of_modalities(phantom_store):
    named = {}
    for order in (MODALITIES, MODALITIES[::-1]):
        datamodule = make(phantom_store, modalities=order)
        named[order] = volumes(next(iter(datamodule.test_dataloader())), order)
    for name in MODALITIES:
        assert named[MODALITIES][name].shape[1] == 1
        assert torch.equal(named[MODALITIES][name], named[MODALITIES[::-1]][name])
    assert not torch.equal(named[MODALITIES]["t1"], named[MODALITIES]["flair"])


def test_training_and_validation_see_patches_and_testing_whole_brains(phantom_store):
    datamodule = make(phantom_store, sampling=RandomPatch((16, 16, 16), divisor=16), batch_size=3)
    assert next(iter(datamodule.train_dataloader()))["image"].shape == (3, 4, 16, 16, 16)
    assert next(iter(datamodule.val_dataloader()))["image"].shape == (1, 4, 16, 16, 16)
    brain = next(iter(datamodule.test_dataloader()))
    assert brain["image"].shape == (1, 4, *datamodule.whole.size)
    assert all(n % 16 == 0 for n in datamodule.whole.size)
    assert int(brain["brain"].sum()) == datamodule.store.subjects[brain["subject"][0]].read_brain().sum()


def test_validation_is_the_same_in_every_epoch(phantom_store):
    # Otherwise a checkpoint could be the best for an easy crop.
    datamodule = make(phantom_store, sampling=RandomPatch((8, 8, 8)), augmentation=[tio.RandomAffine()])
    loader = datamodule.val_dataloader()
    first, second = ([batch["image"] for batch in loader] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b["image"]) for a, b in zip(first, datamodule.val_dataloader(), strict=True))


def test_only_training_is_augmented(phantom_store):
    augmented = make(phantom_store, augmentation=[tio.RandomFlip(axes=["LR"], flip_probability=1)])
    plain = make(phantom_store)
    for got, expected in zip(augmented.train_dataloader(), plain.train_dataloader(), strict=True):
        assert got["subject"] == expected["subject"]
        assert torch.equal(got["image"], expected["image"].flip(2))  # (B, C, X, Y, Z)
    for got, expected in zip(augmented.val_dataloader(), plain.val_dataloader(), strict=True):
        assert torch.equal(got["image"], expected["image"])


def test_each_set_shows_its_own_subjects_once(phantom_store):
    datamodule = make(phantom_store)
    for part in ("train", "val", "test"):
        seen = [id for batch in getattr(datamodule, f"{part}_dataloader")() for id in batch["subject"]]
        assert sorted(seen) == sorted(getattr(datamodule.split, part))
    assert sum(len(getattr(datamodule.split, part)) for part in ("train", "val", "test")) == 8


def test_loader_processes_change_nothing(phantom_store):
    crop = {"sampling": RandomPatch((8, 8, 8)), "augmentation": [tio.RandomAffine()]}
    alone, workers = make(phantom_store, **crop), make(phantom_store, workers=1, **crop)
    for a, b in zip(alone.train_dataloader(), workers.train_dataloader(), strict=True):
        assert a["subject"] == b["subject"]
        assert torch.equal(a["image"], b["image"])


# ----- what a method must know of its training set ------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [BrainBox(), BrainBox((48, 48, 40)), RandomPatch((16, 16, 16))])
def test_class_counts_are_those_of_the_training_subjects_boxes(phantom_store, sampling):
    datamodule = make(phantom_store, sampling=sampling)
    counted = np.zeros(4, int)
    seen = datamodule.dataset(datamodule.split.train, crop=datamodule.whole)
    for i in range(len(seen)):
        counted += np.bincount(seen[0, i, i]["label"].numpy().ravel(), minlength=4)
    assert datamodule.class_counts() == counted.tolist()
    assert counted.all()


def test_class_counts_by_hand_leave_ignored_voxels_out(tmp_path):
    # WMH 2017: 2 is other pathology, of no class. The box is 8³ = 512 voxels a subject.
    store = written(tmp_path, "wmh2017", [{1: 10, 2: 5}, {1: 20}, {2: 7}, {1: 200}])
    split = {"kind": "explicit", "train": ["s0", "s1", "s2"], "val": ["s3"], "test": []}
    datamodule = make(store, modalities=("flair",), split=split)
    assert datamodule.class_counts() == [3 * 512 - 30 - 12, 30]
    labels = torch.cat([batch["label"].flatten() for batch in datamodule.train_dataloader()])
    assert labels.bincount()[[0, 1, 255]].tolist() == [*datamodule.class_counts(), 12]


def test_native_labels_have_their_own_classes(phantom_store):
    datamodule = make(phantom_store, labels="native")
    assert len(datamodule.class_counts()) == len(datamodule.classes) == 5
    assert datamodule.class_counts()[3] == 0  # BraTS 2019 has no label 3
    regions = make(phantom_store).class_counts()
    assert datamodule.class_counts()[4] == regions[3]


def test_intensity_scale_is_that_of_the_training_subjects(phantom_store):
    datamodule = make(phantom_store)
    statistics = [datamodule.store.subjects[id].statistics["t2"] for id in datamodule.split.train]
    expected = [np.mean([s[key] for s in statistics]) for key in ("clipped_mean", "clipped_std")]
    assert datamodule.intensity_scale("t2") == pytest.approx(expected)


# ----- steps, ranks, order ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch_size", "steps", "world_size", "expected"),
    [(1, None, 1, 4), (3, None, 1, 2), (1, None, 2, 2), (2, None, 3, 1), (8, None, 4, 1), (2, 5, 1, 5), (2, 5, 2, 5)],
)
def test_steps_of_an_epoch(phantom_store, batch_size, steps, world_size, expected):
    datamodule = make(phantom_store, batch_size=batch_size, steps_per_epoch=steps)
    assert datamodule.train_steps(world_size) == expected
    assert len(attach(datamodule, 0, world_size).train_dataloader()) == expected


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_subjects(phantom_store, world_size):
    split = {"kind": "ratio", "val": 0.375, "test": 0.0}  # 5 and 3
    ranks = [attach(make(phantom_store, split=split), rank, world_size) for rank in range(world_size)]
    ids = ranks[0].split
    evaluated = [id for rank in ranks for batch in rank.val_dataloader() for id in batch["subject"]]
    assert sorted(evaluated) == sorted(ids.val)
    trained = [[batch["subject"] for batch in rank.train_dataloader()] for rank in ranks]
    assert len({len(steps) for steps in trained}) == 1  # no rank waits for another's gradient
    seen = [id for step in zip(*trained, strict=True) for ids_ in step for id in ids_]
    assert set(seen) == set(ids.train)
    assert len(set(seen[: len(ids.train)])) == len(ids.train)  # all once before any twice


class Recorder(pl.LightningModule):
    """Notes what the training loop hands it."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch["subject"], float(batch["image"].sum())))
        return self.weight * batch["image"].mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(store, folder, epochs, ckpt_path=None):
    recorder = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )
    datamodule = make(
        store, sampling=RandomPatch((8, 8, 8)), steps_per_epoch=3, augmentation=[tio.RandomAffine()], seed=5
    )
    trainer.fit(recorder, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    return recorder.seen, datamodule


def test_a_resumed_training_sees_what_an_uninterrupted_one_sees(phantom_store, tmp_path):
    uninterrupted, datamodule = fit(phantom_store, tmp_path / "a", 4)
    first, _ = fit(phantom_store, tmp_path / "b", 2)
    rest, _ = fit(phantom_store, tmp_path / "b", 4, ckpt_path=tmp_path / "b" / "2.ckpt")
    assert first + rest == uninterrupted
    assert len({numbers for *_, numbers in uninterrupted}) == 12  # crops and augmentation differ from step to step
    sampler, expected = TrainingSampler(4, samples=3, seed=5), []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        expected += [(epoch, [datamodule.split.train[which]]) for *_, which in sampler]
    assert [entry[:2] for entry in uninterrupted] == expected


# ----- slices by site ------------------------------------------------------------------------------------------------


def sliced(store, **changes):
    """By site 30, 29 and 29 slices of two subjects; 3 of each end are no training and 4 no validation."""
    settings = {
        "modalities": ("t1", "flair"),
        "split": {"kind": "folds", "folds": 2, "fold": 0, "val": 1, "stratify": "site"},
        "normalisation": Gaussian({"t1": 80, "flair": 110}, size=(48, 48), whole_slices=["GE3T"]),
        "sampling": SiteSlices((48, 48), front={"GE3T": 0.8}, dropped_elsewhere=0.1, zeroed=0.125),
        "batch_size": 4,
        **changes,
    }
    return make(store, **settings)


def test_a_sample_of_training_is_a_slice_and_a_batch_of_validation_a_subject(wmh_store):
    datamodule = sliced(wmh_store)
    assert [len(part) for part in (datamodule.split.train, datamodule.split.val, datamodule.split.test)] == [2, 1, 3]
    batch = next(iter(datamodule.train_dataloader()))
    assert (batch["image"].dtype, tuple(batch["image"].shape)) == (torch.float32, (4, 2, 48, 48))
    assert (batch["label"].dtype, tuple(batch["label"].shape)) == (torch.int64, (4, 48, 48))
    assert (batch["brain"].dtype, tuple(batch["brain"].shape)) == (torch.bool, (4, 48, 48))
    assert tuple(batch["spacing"].shape) == (4, 3)
    (whole,) = datamodule.val_dataloader()
    shown = len(datamodule.sampling.tested(datamodule.store.subjects[datamodule.split.val[0]].shape))
    assert tuple(whole["image"].shape) == (shown, 2, 48, 48)
    assert whole["subject"] == [datamodule.split.val[0]] * shown
    (test, *_) = datamodule.test_dataloader()
    assert test["image"].ndim == 5  # whole volumes, which an evaluation cuts itself


def test_an_epoch_of_slices_shows_each_of_the_training_subjects_once(wmh_store):
    datamodule = sliced(wmh_store, batch_size=1)
    expected = {
        subject.id: len(datamodule.sampling.training(subject.shape, subject.site))
        for subject in datamodule.training_subjects()
    }
    assert set(expected.values()) <= {23, 24}
    loader = datamodule.train_dataloader()
    assert len(loader) == datamodule.train_steps() == sum(expected.values())
    seen, images = [], set()
    for batch in loader:
        seen += batch["subject"]
        images.add(batch["image"].numpy().tobytes())
    assert {id: seen.count(id) for id in expected} == expected
    assert len(images) == sum(expected.values())
    assert seen != sorted(seen)
    for world_size, batch_size in ((1, 4), (2, 5)):
        datamodule = sliced(wmh_store, batch_size=batch_size)
        assert datamodule.train_steps(world_size) == -(-sum(expected.values()) // (batch_size * world_size))
    assert sliced(wmh_store, steps_per_epoch=7).train_steps() == 7


def test_slices_are_a_function_of_seed_epoch_and_index(wmh_store):
    """Two processes, or one that was resumed, see the same; another seed or epoch does not."""

    def shown(seed, epoch):
        datamodule = sliced(wmh_store, seed=seed, steps_per_epoch=3, augmentation=[tio.RandomNoise()])
        loader = datamodule.train_dataloader()
        loader.sampler.set_epoch(epoch)
        return torch.cat([batch["image"] for batch in loader])

    first = shown(0, 1)
    assert torch.equal(shown(0, 1), first)
    assert not torch.equal(shown(0, 2), first)
    assert not torch.equal(shown(1, 1), first)


def test_ranks_share_the_slices(wmh_store):
    ranks = [attach(sliced(wmh_store, batch_size=1), rank, 2) for rank in range(2)]
    seen = [batch["image"].numpy().tobytes() for rank in ranks for batch in rank.train_dataloader()]
    datamodule = ranks[0]
    slices = sum(len(datamodule.sampling.training(s.shape, s.site)) for s in datamodule.training_subjects())
    assert len(set(seen)) == slices <= len(seen) <= slices + 1


def test_only_slices_of_training_are_augmented(wmh_store):
    plain, flipped = (
        sliced(wmh_store, augmentation=augmentation)
        for augmentation in (None, [tio.RandomFlip(axes=["LR"], flip_probability=1)])
    )
    for got, expected in zip(flipped.train_dataloader(), plain.train_dataloader(), strict=True):
        assert torch.equal(got["image"], expected["image"].flip(2))  # (B, C, X, Y)
        assert torch.equal(got["label"], expected["label"].flip(1))
    for got, expected in zip(flipped.val_dataloader(), plain.val_dataloader(), strict=True):
        assert torch.equal(got["image"], expected["image"])


def test_the_scale_of_slices_is_that_of_the_training_subjects_heads(wmh_store):
    datamodule = sliced(wmh_store)
    heads = [datamodule.normalisation.of(subject, "flair") for subject in datamodule.training_subjects()]
    expected = [np.mean([head[key] for head in heads]) for key in ("head_mean", "head_std")]
    assert datamodule.intensity_scale("flair") == pytest.approx(expected)


def test_slices_through_the_brain_are_found_before_training(wmh_store):
    with pytest.raises(UserError, match=r"lose \d+% of the brain; enlarge the size, or set data\.sampling\.front"):
        sliced(wmh_store, sampling=SiteSlices((24, 24)))


def test_a_site_without_subjects_is_found_before_training(wmh_store):
    split = {"kind": "folds", "folds": 2, "val": 1, "stratify": "site", "sites": ["Utrecht", "Philips_VU"]}
    with pytest.raises(UserError, match=r"found GE3T \(2\), Singapore \(2\), Utrecht \(2\), none of Philips_VU"):
        sliced(wmh_store, split=split)


def test_thresholds_that_find_no_head_are_found_before_training(wmh_store):
    datamodule = sliced(wmh_store, normalisation=Gaussian({"t1": 80, "flair": 30000}))
    with pytest.raises(UserError, match=r"flair: found 0 voxels of head \(from 30000 on\)"):
        datamodule.intensity_scale("flair")
    with pytest.raises(UserError, match=r"flair: found 0 voxels of head \(from 30000 on\)"):
        datamodule.train_dataloader()


# ----- what can be wrong -----------------------------------------------------------------------------------------


def test_a_sequence_that_the_store_lacks_is_named(phantom_store):
    with pytest.raises(UserError, match="prepared with t1, t1ce, t2, flair, without apt, pd;"):
        make(phantom_store, modalities=("t1", "apt", "pd"))


def test_labels_that_the_layout_does_not_know(phantom_store):
    with pytest.raises(UserError, match="no labels 'lobes'; valid names are regions, native"):
        make(phantom_store, labels="lobes")


def test_labels_without_names_of_classes(phantom_store, monkeypatch):
    monkeypatch.setattr(Layout, "label_lookup", lambda self, labels: np.zeros(256, np.uint8))
    with pytest.raises(UserError, match=r"data\.labels=lobes: BraTS 2019 names classes for regions, native alone"):
        make(phantom_store, labels="lobes")


def test_a_store_without_any_label_cannot_train(tmp_path):
    store = written(tmp_path, "brats2019", [None, None])
    with pytest.raises(UserError, match="none of 2 subjects has a label"):
        make(store, modalities=("t1",))


def test_unlabelled_subjects_take_no_part(tmp_path):
    store = written(tmp_path, "brats2019", [{1: 9}, None, {2: 9}, None])
    split = make(store, modalities=("t1",), split={"kind": "ratio", "val": 0.5, "test": 0.0}).split
    assert sorted(split.train + split.val) == ["s0", "s2"]
    with pytest.raises(UserError, match="s1"):
        make(store, modalities=("t1",), split={"kind": "explicit", "train": ["s0", "s1"], "val": [], "test": []})


def test_one_scan_under_two_names_may_not_stand_on_two_sides(tmp_path):
    store = written(tmp_path, "brats2019", [{1: 9}, {2: 9}, {4: 9}])
    first = Store(store).subjects["s0"]
    arrays = {"image": first.read_image(), "brain": first.read_brain(), "label": first.read_label()}
    write_subject(store, id="s0_again", affine=np.eye(4), **arrays)
    split = {"kind": "explicit", "train": ["s0", "s1"], "val": ["s0_again"], "test": ["s2"]}
    with pytest.raises(UserError, match=r"s0_again \(val\) and s0 \(train\) hold the same voxels \(t1, flair\)"):
        make(store, modalities=("t1",), split=split)
    make(store, modalities=("t1",), split={**split, "train": ["s0", "s0_again"], "val": ["s1"]})


def test_a_store_without_a_subject_of_its_settings_says_to_prepare(tmp_path):
    store = written(tmp_path, "brats2019", [{1: 9}])
    write_cohort(store, Store(store).layout, ["flair"])
    with pytest.raises(UserError, match="holds no prepared subject, but 1 of other settings; run mrgen-prepare"):
        make(store, modalities=("flair",))


def test_a_split_without_training_subjects(phantom_store):
    with pytest.raises(UserError, match=r"data\.split leaves no subject for training"):
        make(phantom_store, split={"kind": "explicit", "train": [], "val": list(Store(phantom_store).subjects)})


def test_a_box_that_cuts_a_brain_is_found_before_training(phantom_store):
    with pytest.raises(UserError, match="which would cut it"):
        make(phantom_store, sampling=BrainBox((24, 24, 24)))


def test_subjects_of_other_settings_are_left_out_with_a_line(tmp_path, capsys):
    """A preparation that was stopped while it replaced them leaves some."""
    store = written(tmp_path, "brats2019", [{1: 5}] * 8)
    cohort = tmp_path / "cohort.json"
    now = cohort.read_text()
    cohort.write_text(now.replace('"settings": "', '"settings": "0'))
    write_subject(store, id="s8", image=np.ones((2, 8, 8, 8)), brain=np.ones((8, 8, 8), bool), affine=np.eye(4))
    cohort.write_text(now)
    assert len(make(store, modalities=("t1",)).store.subjects) == 8
    assert f"{store}: 1 prepared subjects of other settings are left out; mrgen-prepare" in capsys.readouterr().out
