"""All real slices and some synthetic ones: how many, which, how long, and nobody who is held out."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

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
        "real": 1.0,
        "real_slices": real,
        "enhanced_slices": 0,
        "synthetic_slices": 30,
        "order": "random",
        "samples": None,
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


# ----- amounts and orders, as Qu et al. vary them --------------------------------------------------------------------


class Halve:
    """Stands for a transform: halves the distance to the background and adds a random number of its seed."""

    def __call__(self, subject):
        subject["image"].set_data((subject["image"].data - 1) / 2 + 0.001 * torch.rand(1))
        subject["label"].set_data(subject["label"].data.flip(1))
        return subject


def attach(data, rank, world_size, *, epochs):
    """As Lightning does, on one of several devices."""
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size, strategy=strategy, max_epochs=epochs)
    return data


def samples(data):
    dataset = data.train_dataloader().dataset
    return [dataset[0, 0, which] for which in range(len(dataset))]


def images(some):
    return {sample["image"].numpy().tobytes() for sample in some}


def test_some_real_slices_are_some_of_more(phantom_store):
    everything = module(phantom_store, None)
    real = everything.real_slices()
    few, more, other = (
        samples(module(phantom_store, {"real": share}, seed=seed)) for share, seed in ((0.1, 0), (0.2, 0), (0.1, 1))
    )
    assert (len(few), len(more)) == (round(0.1 * real), round(0.2 * real))
    assert images(few) < images(more) < images(samples(everything))
    assert images(other) != images(few)
    assert len({sample["subject"] for sample in more}) > 2  # slices are drawn, not subjects


def test_real_slices_may_be_left_out_altogether(phantom_store, synthetic):
    real = module(phantom_store, None).real_slices()
    mix = {"store": synthetic, "fraction": 40 / real, "real": 0, "equal_steps": True}
    data = module(phantom_store, mix)
    numbers, count = shown(data)
    assert (len(numbers), count) == (40, 0)
    assert data.train_steps() == module(phantom_store, None).train_steps()
    assert sum(data.class_counts()) > 0  # of the training set, whatever of it is shown
    assert data.mix.describe(real)["real_slices"] == 0


def test_every_mix_is_trained_as_long_as_all_real_slices(phantom_store, synthetic):
    """Of equal steps; else an epoch shows every slice of the mix once."""
    real = module(phantom_store, None).real_slices()
    mix = {"store": synthetic, "fraction": 60 / real, "real": 0.5, "enhanced": 1.5, "enhancement": [Halve()]}
    total = round(0.5 * real) + round(1.5 * real) + 60
    assert module(phantom_store, mix).train_steps() == -(-total // 4)
    assert module(phantom_store, {**mix, "equal_steps": True}).train_steps() == -(-real // 4)


def test_enhanced_slices_are_a_fixed_set_in_which_every_real_one_comes_up_before_any_comes_twice(phantom_store):
    changed = {"enhancement": [Halve()]}
    data = module(phantom_store, {"enhanced": 1.5, **changed})
    real = data.real_slices()
    seen = samples(data)
    assert len(seen) == real + round(1.5 * real)
    originals = {(s["subject"], s["brain"].numpy().tobytes()): s for s in seen[:real]}
    enhanced = seen[real:]
    shifts = []
    for sample in enhanced:
        of = originals[sample["subject"], sample["brain"].numpy().tobytes()]
        difference = (sample["image"] - (of["image"] - 1) / 2)[:, sample["brain"]]
        assert difference.abs().max() < 2e-3  # the shift, and half precision
        shifts.append(round(float(difference.mean()), 7))
        assert (sample["image"][:, ~sample["brain"]] == -1).all()
        assert torch.equal(sample["label"], of["label"].flip(0))
    assert len(set(shifts)) > 0.9 * len(shifts)  # each by a seed of its own
    first = [(s["subject"], s["brain"].numpy().tobytes()) for s in enhanced[:real]]
    assert len(set(first)) == len(originals) > 0.9 * real
    dataset = data.train_dataloader().dataset
    assert torch.equal(dataset[7, 3, real]["image"], dataset[0, 0, real]["image"])  # in every epoch the same
    fewer = samples(module(phantom_store, {"enhanced": 0.5, **changed}))[real:]
    assert images(fewer) < images(enhanced)


@pytest.mark.parametrize(("kept", "calls"), [(2**32, 1), (0, 3)])
def test_an_enhanced_slice_is_made_once_where_there_is_room_for_it(phantom_store, monkeypatch, kept, calls):
    monkeypatch.setattr("mrgen.data.mix.KEPT", kept)
    seen = []

    class Counted(Halve):
        def __call__(self, subject):
            seen.append(subject)
            return super().__call__(subject)

    data = module(phantom_store, {"enhanced": 0.1, "enhancement": [Counted()]})
    dataset = data.train_dataloader().dataset
    looks = [dataset[epoch, 0, data.real_slices()] for epoch in range(3)]
    assert len(seen) == calls
    for look in looks:
        assert torch.equal(look["image"], looks[0]["image"])
        assert (look["image"].dtype, look["label"].dtype) == (torch.float32, torch.int64)
        look["label"][:], look["brain"][:] = 7, False  # nobody's but this sample's
    assert int(dataset[4, 0, data.real_slices()]["label"].max()) < 7


def test_an_order_divides_a_number_of_samples_that_is_described(phantom_store, synthetic):
    real = module(phantom_store, None).real_slices()
    mix = {"store": synthetic, "fraction": 30 / real, "equal_steps": True}
    data = module(phantom_store, {**mix, "order": "synthetic_first"})
    assert data.ordered_samples(3) == 3 * 4 * -(-real // 4)
    assert data.mix.describe(real, data.ordered_samples(3))["samples"] == data.ordered_samples(3)
    assert module(phantom_store, mix).ordered_samples(3) is None
    assert module(phantom_store, None).ordered_samples(None) is None


def test_amounts_are_described(phantom_store):
    data = module(phantom_store, {"enhanced": 0.5, "enhancement": [Halve()], "real": 0.5})
    real = data.real_slices()
    assert data.mix.describe(real) == {
        "method": None,
        "fraction": 0.0,
        "equal_steps": False,
        "real": 0.5,
        "real_slices": round(0.5 * real),
        "enhanced_slices": round(0.5 * real),
        "synthetic_slices": 0,
        "order": "random",
        "samples": None,
        "patients": [],
        "made": None,
    }


@pytest.mark.parametrize("order", ["synthetic_first", "real_first"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_one_kind_comes_before_the_other_in_the_whole_training(phantom_store, synthetic, order, world_size):
    """The first S / (R + S) of all samples are synthetic, in endless shuffled passes; on all devices, and resumed."""
    real, epochs = module(phantom_store, None).real_slices(), 3
    mix = {"store": synthetic, "fraction": 30 / real, "real": 0.1, "equal_steps": True, "order": order}
    kept = round(0.1 * real)

    def epoch(number):
        loaders = []
        for rank in range(world_size):
            data = attach(module(phantom_store, mix), rank, world_size, epochs=epochs)
            loaders.append(data.train_dataloader().sampler)
            loaders[-1].set_epoch(number)
        return [which for step in zip(*loaders, strict=True) for _, _, which in step]

    shown = [which for number in range(epochs) for which in epoch(number)]
    assert len(shown) == epochs * -(-real // (4 * world_size)) * 4 * world_size
    synthetic_ones = [which >= kept for which in shown]
    count = round(len(shown) * 30 / (kept + 30))
    first = order == "synthetic_first"
    border = count if first else len(shown) - count
    assert synthetic_ones == [first] * border + [not first] * (len(shown) - border)
    parts = [[which for which in shown if (which >= kept) == kind] for kind in (False, True)]
    for part, size in zip(parts, (kept, 30), strict=True):
        for start in range(0, len(part), size):
            assert len(set(part[start : start + size])) == len(part[start : start + size])
    assert epoch(2) == shown[-len(shown) // 3 :]


def test_enhanced_slices_are_of_the_real_kind(phantom_store, synthetic):
    real = module(phantom_store, None).real_slices()
    mix = {"store": synthetic, "fraction": 30 / real, "enhanced": 0.5, "enhancement": [Halve()]}
    made = module(phantom_store, {**mix, "order": "synthetic_first"}).mix
    kept = real + round(0.5 * real)
    assert [turn.subjects for turn in made.turns(real, 1000)] == [range(kept, kept + 30), range(kept)]
    assert sum(turn.samples for turn in made.turns(real, 1000)) == 1000


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ({"real": 0}, r"data\.mix\.real is 0 and data\.mix\.store null, which leaves no slice"),
        ({"real": 1.1}, r"data\.mix\.real is 1\.1; expected a number, 0 to 1"),
        ({"real": "half"}, r"data\.mix\.real is 'half'; expected a number, 0 to 1"),
        ({"enhanced": -1}, r"data\.mix\.enhanced is -1; expected a number, 0 or more"),
        ({"enhanced": 1}, r"data\.mix\.enhanced is 1, which needs data\.mix\.enhancement"),
        ({"order": "synthetic_first"}, r"order is synthetic_first, and there are no synthetic slices; .*\.mix\.store"),
        ({"order": "backwards"}, r"order is 'backwards'; expected one of random, synthetic_first, real_first"),
    ],
)
def test_amounts_that_are_none_are_refused(phantom_store, mix, message):
    with pytest.raises(UserError, match=message):
        module(phantom_store, mix)


def test_orders_and_enhancement_need_real_slices(phantom_store, synthetic):
    with pytest.raises(UserError, match=r"order is real_first, and there are no real slices; .* set data\.mix\.real"):
        module(phantom_store, {"store": synthetic, "real": 0, "order": "real_first"})
    with pytest.raises(UserError, match=r"enhanced is 1, which needs real slices, data\.mix\.real"):
        module(phantom_store, {"store": synthetic, "real": 0, "enhanced": 1, "enhancement": [Halve()]})


def test_an_order_needs_an_end(phantom_store, synthetic):
    real = module(phantom_store, None).real_slices()
    mix = {"store": synthetic, "fraction": 30 / real, "order": "real_first"}
    data = attach(module(phantom_store, mix), 0, 1, epochs=-1)
    with pytest.raises(UserError, match=r"trainer\.max_epochs is -1; data\.mix\.order=real_first divides the whole"):
        data.train_dataloader()


def test_unpaired_slices_are_real(phantom_store, synthetic):
    with pytest.raises(UserError, match=r"data\.mix is for segmenters"):
        module(phantom_store, {"store": synthetic}, unpaired=True)
