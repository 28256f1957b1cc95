"""Paper 3's judgement: whole volumes, by subject, through slices that are cut by site."""

import numpy as np
import pytest
import torch
from torch import nn

from mrgen.data.batch import IGNORED
from mrgen.data.normalisation import Gaussian
from mrgen.data.slices import SiteSlices
from mrgen.data.store import Store
from mrgen.evaluation.cross_validation import CrossValidation, Method
from mrgen.metrics.lesions import voxel_rates
from mrgen.protocols import Segmentation, Synthesis

MODALITIES = ("t1", "flair")
SLICES = SiteSlices(size=(36, 40), front={"GE3T": 0.8}, zeroed=0.3)


class Bright(nn.Module):
    """Finds what is bright in its sources' last sequence, slice by slice; keeps the slices that it saw."""

    divisor, pads_with_minimum = 1, True

    def __init__(self, *sources, above=1.5):
        super().__init__()
        self.sources, self.above, self.saw = sources, above, []

    def segment(self, volumes):
        last = volumes[self.sources[-1]]
        self.saw.append({name: volume.clone() for name, volume in volumes.items()})
        probability = (last > self.above).float()
        return Segmentation(probability[:, 0].long(), torch.cat([1 - probability, probability], dim=1))


class Halved(Bright):
    """Imputes a FLAIR that is half of the T1."""

    targets = ("flair",)

    def synthesize(self, volumes):
        return Synthesis(volumes["t1"] / 2, None, "gaussian")


def judged(store, methods, *, ids=None, change=lambda batch: batch, **settings):
    """The steps of a test without a trainer, on the subjects' stored intensities."""
    subjects = Store(store).subjects
    wrapped = {name: Method(model, Gaussian(), SLICES) for name, model in methods.items()}
    module = CrossValidation(
        methods=wrapped, modalities=MODALITIES, source="t1", target="flair", subjects=subjects, **settings
    )
    batches = []
    for id in ids or list(subjects):
        subject = subjects[id]
        label = torch.from_numpy(subject.read_label().astype(np.int64))
        batch = {
            "image": torch.from_numpy(subject.read_image(MODALITIES)).float()[None],
            "label": torch.where(label == 2, IGNORED, label)[None],
            "brain": torch.from_numpy(np.ascontiguousarray(subject.read_brain()))[None],
            "subject": [id],
            "spacing": torch.tensor(subject.spacing)[None],
        }
        batches.append(change(batch))
        module.test_step(batches[-1], 0)
    module.on_test_epoch_end()
    return module, subjects, batches


def normalised(subject, name):
    """By hand: z-scores over the brain, of all voxels."""
    volume, brain = subject.read_image([name])[0].astype(float), subject.read_brain()
    return torch.from_numpy((volume - volume[brain].mean()) / volume[brain].std())


def seen(subject):
    """By hand: the voxels that slices of 36 × 40 show, without three tenths at each end."""
    (x0, x1), (y0, y1), _ = SLICES.box(subject.shape, subject.site)
    mask, ends = torch.zeros(subject.shape, dtype=torch.bool), int(np.ceil(0.3 * subject.shape[2]))
    mask[max(x0, 0) : x1, max(y0, 0) : y1, ends:-ends] = True
    return mask


def test_lesions_are_counted_over_the_whole_volume(wmh_store):
    """What the cut slices and the outermost ones do not show is missed, and not left out."""
    module, subjects, batches = judged(wmh_store, {"bright": Bright("flair")}, fold=3)
    assert [row["subject"] for row in module.rows] == list(subjects)
    for row, batch in zip(module.rows, batches, strict=True):
        subject = subjects[row["subject"]]
        predicted = (normalised(subject, "flair") > 1.5) & seen(subject)
        label = batch["label"][0]
        expected = voxel_rates(predicted, label == 1, label == IGNORED)
        assert {key: row[key] for key in expected} == pytest.approx(expected, abs=0.02)
        assert (row["site"], row["fold"]) == (subject.site, 3)
        assert row["reference_ml"] == pytest.approx(float((label == 1).sum()) * np.prod(subject.spacing) / 1000)
        places = [value for key, value in row.items() if key.startswith("fp_")]
        assert sum(places) == pytest.approx(row["fpr"] * row["reference_ml"], rel=1e-4)
    assert len({row["subject"] for row in module.lesions}) == len(subjects)


def test_networks_see_slices_cut_by_site_and_padded_with_the_minimum(wmh_store):
    bright = Bright("flair")
    _, subjects, _ = judged(wmh_store, {"bright": bright}, ids=list(Store(wmh_store).subjects)[:1])
    (subject,) = [subjects[id] for id in list(subjects)[:1]]
    shown = torch.cat([volumes["flair"] for volumes in bright.saw])[:, 0]  # (Z, 36, 40)
    assert shown.shape == (subject.shape[2], 36, 40)
    volume, (x, y, _) = normalised(subject, "flair"), SLICES.box(subject.shape, subject.site)
    inside = volume[max(x[0], 0) : x[1], max(y[0], 0) : y[1]].movedim(2, 0)
    left, back = max(-x[0], 0), max(-y[0], 0)
    kept = shown[:, left : left + inside.shape[1], back : back + inside.shape[2]]
    assert torch.allclose(kept, inside.float(), atol=1e-4)
    assert inside.shape[1] < 36  # this site's scans are narrower
    assert torch.allclose(shown[:, :left], volume.min().float(), atol=1e-4)


def test_an_imputed_sequence_is_compared_where_slices_show_it(wmh_store):
    id = next(iter(Store(wmh_store).subjects))
    module, subjects, batches = judged(wmh_store, {"halved": Halved("t1"), "bright": Bright("flair")}, ids=[id])
    row, other = module.rows
    made, real = normalised(subjects[id], "t1") / 2, normalised(subjects[id], "flair")
    for where, mask in (("", seen(subjects[id])), ("_brain", seen(subjects[id]) & batches[0]["brain"][0])):
        mask = mask & (batches[0]["label"][0] != IGNORED)
        error = (made - real)[mask]
        assert row[f"mae{where}"] == pytest.approx(error.abs().mean().item(), rel=1e-4)
        assert row[f"psnr{where}"] == pytest.approx(-10 * np.log10(error.square().mean().item()), rel=1e-4)
    spread = real[seen(subjects[id]) & (batches[0]["label"][0] != IGNORED)]
    own = 20 * np.log10((spread.max() - spread.min()).item())
    assert row["psnr_own"] == pytest.approx(row["psnr"] + own, rel=1e-4)
    assert "mae" not in other


def test_any_class_is_lesion_and_other_pathology_none(wmh_store):
    """BraTS has three kinds of lesion; label 2 of WMH 2017 is in neither the prediction nor the reference."""
    id = next(iter(Store(wmh_store).subjects))
    methods = {"bright": Bright("flair")}
    before = judged(wmh_store, methods, ids=[id])[0].rows[0]

    def other_classes(batch):
        batch["label"][batch["label"] == 1] = 3
        return batch

    assert judged(wmh_store, methods, ids=[id], change=other_classes)[0].rows[0] == before

    def pathology(batch):
        batch["label"][...] = IGNORED
        return batch

    nothing = judged(wmh_store, methods, ids=[id], change=pathology)[0].rows[0]
    assert (nothing["dsc"], nothing["fpr"], nothing["predicted_ml"], nothing["hd95"]) == (1, 0, 0, 0)


def test_a_subject_without_lesions_has_numbers(wmh_store):
    def healthy(batch):
        batch["label"][...] = 0
        return batch

    id = next(iter(Store(wmh_store).subjects))
    module, *_ = judged(wmh_store, {"all": Bright("t1", above=-9.0)}, ids=[id], change=healthy, pictured=[id])
    (row,) = module.rows
    assert all(np.isfinite(value) for value in row.values() if isinstance(value, float))
    assert (row["dsc"], row["fpr"], row["fnr"]) == (0, 1, 0)
    assert not module.lesions
    assert module.kept[id]["load_ml"] == 0


def test_pictures_keep_the_slice_with_the_most_lesion(wmh_store):
    ids = list(Store(wmh_store).subjects)
    methods = {"halved": Halved("t1"), "bright": Bright("t1", "flair")}
    module, _, batches = judged(wmh_store, methods, ids=ids[:2], pictured=ids[1:])
    assert list(module.kept) == ids[1:2]
    kept, label = module.kept[ids[1]], batches[1]["label"][0]
    z = int((label == 1).sum((0, 1)).argmax())
    assert torch.equal(kept["label"], label[..., z])
    made, halved = kept["synthetic"]["halved"], kept["t1"] / 2
    shown = seen(Store(wmh_store).subjects[ids[1]])[..., z]
    assert torch.allclose(made[shown], halved[shown], atol=1e-4)
    assert made[~shown].unique().numel() == 1  # background
    assert set(kept["predicted"]) == {"halved", "bright"}
    assert set(kept["synthetic"]) == {"halved"}
