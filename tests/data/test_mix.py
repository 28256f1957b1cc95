"""All real slices and some synthetic ones: how many, which, how long, and nobody who is held out."""

import json

import numpy as np
import pytest

from mrgen.data.datamodule import CohortDataModule
from mrgen.data.normalisation import Symmetric
from mrgen.data.slices import SiteSlices
from mrgen.data.store import Store, write_cohort, write_subject
from mrgen.errors import UserError

MODALITIES = ("t1ce", "flair")
SPLIT = {"kind": "ratio", "val": 0.0, "test": 0.25}


def slices(**changes):
    return SiteSlices(**{"size": (48, 48), "dropped_elsewhere": 0.25, **changes})


@pytest.fixture(scope="module")
def split(phantom_store):
    return module(phantom_store, None).split


@pytest.fixture(scope="module")
def synthetic(phantom_store, split, tmp_path_factory):
    """Four subjects of 20 slices; every slice has its running number for all intensities."""
    folder, real = tmp_path_factory.mktemp("synthetic"), Store(phantom_store)
    write_cohort(folder, real.layout, MODALITIES)
    for i in range(4):
        image = np.broadcast_to(np.arange(20 * i + 1, 20 * i + 21, dtype=np.int16), (2, 48, 48, 20))
        brain = np.ones((48, 48, 20), bool)
        label = np.zeros((48, 48, 20), np.uint8)
        label[10:20, 10:20] = 4
        write_subject(folder, id=f"syn{i:04d}", image=image, brain=brain, label=label, affine=np.diag([5, 5, 5, 1]))
    record(folder, patients=[real.subjects[id].patient for id in split.train])
    return folder


def record(folder, **changes):
    said = {"version": 1, "method": "samr", "checkpoint": "sha256:0", "store": "brats2019", "patients": []}
    said |= {"subjects": 4, "slices": 80, "manipulations": ["mirror"], "seed": 0, "complete": True, **changes}
    (folder / "generated.json").write_text(json.dumps(said))


def module(store, mix, **changes):
    settings = {"split": SPLIT, "normalisation": Symmetric(), "sampling": slices(), "batch_size": 4, **changes}
    return CohortDataModule(store=store, modalities=MODALITIES, mix=mix, **settings)


def shown(data):
    """Numbers of the synthetic slices, and how many real ones there are."""
    dataset = data.train_dataloader().dataset
    numbers, real = [], 0
    for which in range(len(dataset)):
        sample = dataset[0, 0, which]
        if str(sample["subject"]).startswith("syn"):
            subject = data.mix.subjects[sample["subject"]]
            peak = subject.statistics["flair"]["p99_5"]
            numbers.append(round(float(sample["image"][1, 24, 24] + 1) * peak / 2))
        else:
            real += 1
    return numbers, real


def test_a_fraction_is_of_the_real_slices_and_none_is_shown_twice(phantom_store, synthetic):
    real = module(phantom_store, None).real_slices()
    fraction = 30 / real
    data = module(phantom_store, {"store": synthetic, "fraction": fraction})
    numbers, count = shown(data)
    assert count == real
    assert len(numbers) == len(set(numbers)) == 30
    assert data.mix.describe(real) == {
        "method": "samr",
        "fraction": fraction,
        "equal_steps": False,
        "real_slices": real,
        "synthetic_slices": 30,
        "patients": sorted(data.mix.made_from),
        "made": {"checkpoint": "sha256:0", "seed": 0, "slices": 80},
    }


def test_half_as_many_are_some_of_them(phantom_store, synthetic):
    real = module(phantom_store, None).real_slices()
    many, _ = shown(module(phantom_store, {"store": synthetic, "fraction": 60 / real}))
    few, _ = shown(module(phantom_store, {"store": synthetic, "fraction": 30 / real}))
    assert set(few) < set(many)
    other, _ = shown(module(phantom_store, {"store": synthetic, "fraction": 30 / real}, seed=1))
    assert set(other) != set(few)


def test_synthetic_slices_carry_their_label_and_all_are_shown_whatever_training_drops(phantom_store, synthetic):
    data = module(phantom_store, {"store": synthetic, "fraction": 80 / module(phantom_store, None).real_slices()})
    numbers, _ = shown(data)
    assert sorted(numbers) == pytest.approx(range(1, 81), abs=1)  # the outermost too; p99_5 is not the maximum
    dataset = data.train_dataloader().dataset
    sample = dataset[0, 0, len(dataset) - 1]
    assert int((sample["label"] == 3).sum()) == 100


def test_an_epoch_is_longer_by_the_synthetic_slices_or_as_long_as_without(phantom_store, synthetic):
    real = module(phantom_store, None).real_slices()
    alone = module(phantom_store, None).train_steps()
    mix = {"store": synthetic, "fraction": 60 / real}
    assert alone == -(-real // 4)
    assert module(phantom_store, mix).train_steps() == -(-(real + 60) // 4)
    assert module(phantom_store, {**mix, "equal_steps": True}).train_steps() == alone
    assert module(phantom_store, mix, steps_per_epoch=7).train_steps() == 7


def test_without_a_store_there_is_no_mix(phantom_store):
    assert module(phantom_store, {"store": None, "fraction": 1.0}).mix is None


def test_what_was_made_from_held_out_patients_is_refused(phantom_store, synthetic, split, tmp_path):
    held_out = Store(phantom_store).subjects[split.test[0]].patient
    copy = tmp_path / "copy"
    copy.mkdir()
    for entry in synthetic.iterdir():
        if entry.name != "generated.json":
            (copy / entry.name).symlink_to(entry)
    record(copy, patients=[held_out])
    with pytest.raises(UserError, match=rf"samr was trained on 1 of the 2 patients that are held out.*{held_out}"):
        module(phantom_store, {"store": copy})


def test_a_cohort_of_other_scans_is_refused(phantom_store, synthetic, tmp_path):
    for entry in synthetic.iterdir():
        if entry.name != "generated.json":
            (tmp_path / entry.name).symlink_to(entry)
    record(tmp_path, store="brats2015")
    with pytest.raises(UserError, match=r"made from brats2015, with pixels of 5 × 5 mm; the real cohort is brats2019"):
        module(phantom_store, {"store": tmp_path})


def test_an_unfinished_cohort_is_neither_mixed_nor_trained_on_alone(phantom_store, synthetic, tmp_path):
    for entry in synthetic.iterdir():
        if entry.name != "generated.json":
            (tmp_path / entry.name).symlink_to(entry)
    record(tmp_path, complete=False)
    for attempt in (lambda: module(phantom_store, {"store": tmp_path}), lambda: module(tmp_path, None)):
        with pytest.raises(UserError, match="its making was interrupted; run the same mrgen-synthesize again"):
            attempt()


def test_generators_are_trained_on_real_slices(phantom_store, synthetic):
    with pytest.raises(UserError, match=r"data\.mix is for segmenters"):
        module(phantom_store, {"store": synthetic}, guides=["atlas"])


def test_mistakes_are_found_before_training(phantom_store, synthetic, tmp_path):
    real = module(phantom_store, None).real_slices()
    with pytest.raises(UserError, match=r"holds 80; make more \(mrgen-synthesize … slices="):
        module(phantom_store, {"store": synthetic, "fraction": 100 / real})
    with pytest.raises(UserError, match=r"data\.mix\.fraction is 0"):
        module(phantom_store, {"store": synthetic, "fraction": 0})
    with pytest.raises(UserError, match="found no synthetic cohort there"):
        module(phantom_store, {"store": phantom_store})
    with pytest.raises(UserError, match="mrgen-synthesize"):
        module(phantom_store, {"store": tmp_path})
    with pytest.raises(UserError, match="without t2"):
        CohortDataModule(
            store=phantom_store,
            modalities=("t2", "flair"),
            split=SPLIT,
            normalisation=Symmetric(),
            sampling=slices(),
            mix={"store": synthetic},
        )
