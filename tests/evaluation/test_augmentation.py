"""The judgement of augmentation: labels in whole volumes and in slices, through networks that see slices."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from mrgen.data.batch import IGNORED
from mrgen.data.normalisation import Symmetric, ZScore
from mrgen.data.slices import SiteSlices
from mrgen.data.store import Store
from mrgen.evaluation.augmentation import Augmentation
from mrgen.evaluation.cross_validation import Method
from mrgen.metrics.segmentation import HD95_ONE_EMPTY, dice, hd95, index_dice, index_mse
from mrgen.protocols import Segmentation

MODALITIES = ("t1", "flair")
CLASSES = ("background", "core", "edema", "enhancing")
LABELS = {name: [number] for number, name in enumerate(CLASSES) if number}
SLICES = SiteSlices(size=(56, 32), zeroed=0.2)  # wider than a scan at 5 mm, and shorter


class Bright(nn.Module):
    """Calls edema what is bright in the FLAIR, slice by slice; keeps the slices that it saw."""

    divisor, sources = 1, ("flair",)

    def __init__(self, above=0.2, number=2):
        super().__init__()
        self.above, self.number, self.saw = above, number, []

    def segment(self, volumes):
        flair = volumes["flair"]
        self.saw.append(flair.clone())
        labels = torch.where(flair[:, 0] > self.above, self.number, 0)
        return Segmentation(labels, nn.functional.one_hot(labels, len(CLASSES)).movedim(-1, 1).float())


def judged(
    store, models, *, ids=None, change=lambda batch: batch, normalisation=None, slices=SLICES, labels=LABELS, **judging
):
    """The steps of a test without a trainer, on the subjects' stored intensities."""
    subjects, batches = Store(store).subjects, []
    methods = {name: Method(model, normalisation or Symmetric(), slices) for name, model in models.items()}
    module = Augmentation(
        methods=methods, modalities=MODALITIES, labels=labels, subjects=subjects, shown="flair", **judging
    )
    for id in ids or list(subjects)[:1]:
        subject = subjects[id]
        label = torch.from_numpy(subject.read_label().astype(np.int64))
        batch = {
            "image": torch.from_numpy(subject.read_image(MODALITIES)).float()[None],
            "label": torch.where(label == 4, 3, label)[None],
            "brain": torch.from_numpy(np.ascontiguousarray(subject.read_brain()))[None],
            "subject": [id],
            "spacing": torch.tensor(subject.spacing)[None],
        }
        batches.append(change(batch))
        module.test_step(batches[-1], 0)
    module.on_test_epoch_end()
    return module, subjects, batches


def by_hand(subject, above=0.2):
    """(X, Y, Z): FLAIR from 0 to its 99.5th percentile on [−1, 1], where the slices show it; and their ends in y."""
    flair, brain = subject.read_image(["flair"])[0].astype(float), subject.read_brain()
    found = (2 * flair / subject.statistics["flair"]["p99_5"] - 1 > above) & brain
    (_, (y0, y1), _), ends = SLICES.box(subject.shape, None), math.ceil(0.2 * subject.shape[2])
    found[:, :y0] = found[:, y1:] = False
    found[..., :ends] = found[..., -ends:] = False
    return torch.from_numpy(found), (y0, y1)


def row_of(module, label):
    (row,) = [row for row in module.rows if row["label"] == label]
    return row


def test_labels_are_judged_in_volumes_and_in_slices(phantom_store):
    module, subjects, batches = judged(phantom_store, {"samr-1.0": Bright()})
    subject, label, brain = next(iter(subjects.values())), batches[0]["label"][0], batches[0]["brain"][0]
    predicted, (y0, y1) = by_hand(subject)
    assert subject.shape[0] < 56  # slices are padded along x and cut along y
    assert 0 < y0 < y1 < subject.shape[1]
    assert [row["label"] for row in module.rows] == ["core", "edema", "enhancing"]
    row, reference = row_of(module, "edema"), label == 2
    assert (row["subject"], row["patient"], row["input"]) == (subject.id, subject.patient, "samr-1.0")
    assert row["dice"] == pytest.approx(dice(predicted, reference), abs=1e-6)
    assert row["dice"] > 0.1
    assert row["hd95"] == pytest.approx(hd95(predicted, reference, subject.spacing))
    assert row["sensitivity"] == pytest.approx(float((predicted & reference).sum() / reference.sum()))
    voxels = 56 * 32 * subject.shape[2]  # of the slices, padding and all
    false = int((predicted & ~reference).sum())
    assert row["specificity"] == pytest.approx(1 - false / (voxels - int(reference[:, y0:y1].sum())))

    held = [z for z in range(subject.shape[2]) if brain[..., z].any()]
    each = [dice(predicted[..., z], reference[..., z]) for z in held]
    there = [bool(reference[..., z].any()) for z in held]
    found = [bool(predicted[..., z].any()) for z in held]
    assert (row["slices"], row["slices_there"]) == (len(held), sum(there))
    assert row["slices_missed"] == sum(a and not b for a, b in zip(there, found, strict=True))
    assert row["slices_false"] == sum(b and not a for a, b in zip(there, found, strict=True))
    assert row["slice_dice"] == pytest.approx(np.mean(each))
    assert row["slice_dice_there"] == pytest.approx(np.mean([d for d, t in zip(each, there, strict=True) if t]))
    flat = [hd95(predicted[..., z], reference[..., z], subject.spacing[:2]) for z in held]
    both = [d for d, t, f in zip(flat, there, found, strict=True) if t and f]
    assert (row["slice_hd95"], row["slice_hd95_both"]) == pytest.approx((np.mean(flat), np.median(both)))

    edema = [line for line in module.slices if line["label"] == "edema"]
    assert [line["slice"] for line in edema] == [z for z, t, f in zip(held, there, found, strict=True) if t or f]
    assert sum(line["reference"] for line in edema) == int(reference.sum())
    rest = len(held) - len(edema)  # what no line is of has nothing in it
    assert (sum(line["dice"] for line in edema) + rest) / len(held) == pytest.approx(row["slice_dice"])


def test_what_is_missing_follows_the_rules(phantom_store):
    def without_edema(batch):
        batch["label"][batch["label"] == 2] = 0
        return batch

    module, *_ = judged(phantom_store, {"bright": Bright()}, change=without_edema)
    edema, core = row_of(module, "edema"), row_of(module, "core")
    for row in (edema, core):  # predicted and not there, there and not predicted
        assert (row["dice"], row["hd95"], row["one_empty"]) == (0, pytest.approx(HD95_ONE_EMPTY), True)
    assert core["dice_there"] == 0
    assert math.isnan(edema["dice_there"])
    assert math.isnan(edema["sensitivity"])
    assert math.isnan(edema["slice_sensitivity"])
    assert math.isnan(edema["slice_dice_there"])
    assert math.isnan(edema["slice_hd95_both"])
    assert (core["sensitivity"], core["specificity"]) == (0, 1)
    assert core["slices_missed"] == core["slices_there"] > 0

    nothing, *_ = judged(phantom_store, {"none": Bright(above=2.0)}, change=without_edema)
    row = row_of(nothing, "edema")
    assert (row["dice"], row["hd95"], row["one_empty"], row["slice_dice"], row["slice_hd95"]) == (1, 0, False, 1, 0)


def test_ignored_voxels_are_in_neither(phantom_store):
    def ignored(batch):
        batch["label"][...] = IGNORED
        return batch

    module, *_ = judged(phantom_store, {"bright": Bright()}, change=ignored)
    row = row_of(module, "edema")
    assert (row["dice"], row["hd95"], row["one_empty"], row["slices_false"]) == (1, 0, False, 0)
    assert not module.slices


@pytest.mark.parametrize(("normalisation", "background"), [(Symmetric(), -1), (ZScore(), 0)])
def test_networks_see_slices_padded_with_the_background_of_training(phantom_store, normalisation, background):
    bright = Bright()
    _, subjects, _ = judged(phantom_store, {"bright": bright}, normalisation=normalisation)
    seen, subject = torch.cat(bright.saw)[:, 0], next(iter(subjects.values()))  # (Z, 56, 32)
    assert seen.shape == (len(SLICES.tested(subject.shape)), 56, 32)  # and no slice that nothing is predicted in
    (x0, _), *_ = SLICES.box(subject.shape, None)
    assert seen[:, :-x0].unique().tolist() == [background]
    assert seen.unique().numel() > 100


def test_pictures_keep_the_slice_with_the_most_lesion_of_every_subject(phantom_store):
    ids = list(Store(phantom_store).subjects)[:2]
    module, _, batches = judged(phantom_store, {"a-1.0": Bright(), "b-0.5": Bright(number=3)}, ids=ids)
    assert list(module.kept) == ids
    kept, label = module.kept[ids[1]], batches[1]["label"][0]
    z = int((label > 0).sum((0, 1)).argmax())
    assert torch.equal(kept["label"], label[..., z])
    assert torch.equal(kept["image"], batches[1]["image"][0, 1, ..., z])
    assert {name: set(part.unique().tolist()) for name, part in kept["predicted"].items()} == {
        "a-1.0": {0, 2},
        "b-0.5": {0, 3},
    }


def test_a_label_may_be_a_union_of_classes(phantom_store):
    regions = {"whole": [1, 2, 3], "enhancing": [3]}
    module, subjects, batches = judged(phantom_store, {"bright": Bright()}, labels=regions)
    predicted, _ = by_hand(next(iter(subjects.values())))
    assert [row["label"] for row in module.rows] == ["whole", "enhancing"]
    assert row_of(module, "whole")["dice"] == pytest.approx(dice(predicted, batches[0]["label"][0] > 0), abs=1e-6)
    assert not module.indices  # it does not label each sequence by itself


def test_slices_that_are_not_judged_are_ignored(phantom_store):
    module, subjects, batches = judged(phantom_store, {"bright": Bright()}, judged=lambda subject: range(12, 17))
    (predicted, _), label = by_hand(next(iter(subjects.values()))), batches[0]["label"][0]
    assert (label == 2)[..., 17:].any()
    row = row_of(module, "edema")
    assert row["dice"] == pytest.approx(dice(predicted[..., 12:17], label[..., 12:17] == 2), abs=1e-6)
    assert row["slices"] == 5
    assert {line["slice"] for line in module.slices} <= set(range(12, 17))
    (bright,) = (method.segmenter.model for method in module.methods)
    assert sum(len(part) for part in bright.saw) == 5


def test_the_picture_is_of_a_slice_that_is_judged(phantom_store):
    _, _, (batch,) = judged(phantom_store, {"bright": Bright()})
    areas = (batch["label"][0] > 0).sum((0, 1))
    most = int(areas.argmax())
    beside = range(most + 1, most + 4)
    module, *_ = judged(phantom_store, {"bright": Bright()}, judged=lambda subject: beside)
    (kept,), z = module.kept.values(), beside[int(areas[beside.start : beside.stop].argmax())]
    assert torch.equal(kept["label"], batch["label"][0, ..., z])
    assert kept["predicted"]["bright"].any()


def test_measures_are_those_that_are_wanted_and_their_numbers_the_same(phantom_store):
    full, few = (
        judged(phantom_store, {"bright": Bright()}, **measures)[0] for measures in ({}, {"measures": ("dice",)})
    )
    left_out = {f"{place}{key}" for place in ("", "slice_") for key in ("hd95", "sensitivity", "specificity")}
    for one, other in ((full.rows, few.rows), (full.slices, few.slices)):
        assert other == [{key: row[key] for key in row.keys() - left_out - {"slice_hd95_both"}} for row in one]


class Each(Bright):
    """Labels slices from each sequence by itself as well; keeps how many it was shown at a time."""

    sources = ("flair", "t1")

    def segment_all(self, volumes):
        together = self.segment(volumes)
        self.saw[-1] = volumes["t1"].shape[-1]
        each = {name: torch.where(image[:, 0] > self.above, self.number, 0) for name, image in volumes.items()}
        return together, each


def test_what_labels_each_sequence_is_judged_by_maps_of_label_numbers(phantom_store):
    each, slices = Each(), SiteSlices(size=(40, 32), dropped_elsewhere=0.2, step=2)

    def ignored(batch):
        batch["label"][..., 10] = IGNORED  # one of the slices that training shows, as a whole
        return batch

    module, subjects, batches = judged(phantom_store, {"row-1": each}, slices=slices, change=ignored)
    subject, label = next(iter(subjects.values())), batches[0]["label"][0]
    (x0, x1), (y0, y1), _ = slices.box(subject.shape, None)
    shown = [z for z in slices.training(subject.shape, None) if z != 10]
    assert len(shown) == len(slices.training(subject.shape, None)) - 1
    assert [row["sequence"] for row in module.indices] == ["flair", "t1"]
    for row in module.indices:
        image = subject.read_image([row["sequence"]])[0].astype(float)
        bright = 2 * image / subject.statistics[row["sequence"]]["p99_5"] - 1 > each.above
        found = torch.from_numpy(np.where(bright & subject.read_brain(), 2, 0))
        maps = [part[x0:x1, y0:y1, shown].movedim(-1, 0) for part in (found, label)]
        assert (row["subject"], row["patient"], row["input"]) == (subject.id, subject.patient, "row-1")
        assert row["slices"] == len(shown)
        assert row["index_dice"] == pytest.approx(float(index_dice(*maps).mean()), abs=1e-6)
        assert row["index_mse"] == pytest.approx(float(index_mse(*maps).mean()), abs=1e-6)
    assert max(each.saw) <= 8  # no more slices at a time than of other passes
    assert sum(each.saw) == len(slices.tested(subject.shape))  # each of them once


def test_what_labels_each_sequence_is_judged_in_volumes_as_all_others(phantom_store):
    slices = SiteSlices(size=(56, 32), dropped_elsewhere=0.1, zeroed=0.2)  # trained on more than is tested
    by_each, by_all = (judged(phantom_store, {"x": model}, slices=slices)[0] for model in (Each(), Bright()))
    assert by_each.rows == by_all.rows
    assert by_each.indices[0]["slices"] == len(slices.training(next(iter(by_each.subjects.values())).shape, None))
