import json
import math
from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from mrgen.data.batch import volumes
from mrgen.data.crops import BrainBox
from mrgen.data.datamodule import CohortDataModule
from mrgen.data.normalisation import ZScore
from mrgen.evaluation.swap import Swap, swap_table
from mrgen.metrics.reconstruction import mse, psnr, ssim
from mrgen.metrics.segmentation import region_dice
from mrgen.nets.unet3d import SegmentationUNet3d
from mrgen.papers.rsnet import RSNet
from mrgen.protocols import Segmentation, Segmenter, Synthesis, Synthesizer
from mrgen.segmenter import SegmenterModule

MODALITIES = ("t1", "t1ce", "t2", "flair")
CLASSES = ("background", "necrotic core", "edema", "enhancing")
REGIONS = {"ET": [3], "WT": [1, 2, 3], "TC": [1, 3]}


class Thresholds:
    """A segmenter that is no network: edema where FLAIR is bright, enhancement where T1ce is. Keeps what it saw."""

    sources = ("flair", "t1ce")

    def __init__(self):
        self.saw = []

    def segment(self, volumes):
        self.saw.append({name: volume.clone() for name, volume in volumes.items()})
        labels = torch.where(volumes["flair"][:, 0] > 0.8, 2, 0)
        labels = torch.where(volumes["t1ce"][:, 0] > 1.0, 3, labels)
        return Segmentation(labels=labels, probabilities=torch.nn.functional.one_hot(labels, 4).movedim(-1, 1).float())


class Made:
    """A synthesiser that is no network: ``make`` of the sources' volumes. Keeps what it saw."""

    def __init__(self, target, make, sources=None):
        self.targets = (target,)
        self.sources = tuple(sources or (name for name in MODALITIES if name != target))
        self.make, self.saw = make, []

    def synthesize(self, volumes):
        self.saw.append(set(volumes))
        return Synthesis(mean=self.make(volumes), variance=None, scale="zscore")


def perfect(target, batches):
    """Returns the real sequence of the subject whose turn it is."""
    real = iter([volumes(batch, MODALITIES)[target] for batch in batches])
    return Made(target, lambda _: next(real))


def example(subject="a", seed=0, lesion=True, size=12):
    """z-scored noise within a brain, 0 outside; labels that the thresholds find in part."""
    generator = torch.Generator().manual_seed(seed)
    brain = torch.zeros(1, size, size, size, dtype=torch.bool)
    brain[:, 1:-1, 2:-2, 1:-2] = True
    image = torch.randn(1, 4, size, size, size, generator=generator) * brain[:, None]
    label = torch.zeros(1, size, size, size, dtype=torch.int64)
    if lesion:
        label[:, 3:9, 4:9, 3:8] = torch.where(image[:, 1, 3:9, 4:9, 3:8] > 0.5, 3, 2)
        label[:, 3, 4, 3:8] = 1
    return {"image": image, "label": label, "brain": brain, "subject": [subject]}


def run(synthesizers, batches, segmenter=None, **settings):
    """The steps of a test without a trainer."""
    segmenter = segmenter or Thresholds()
    swap = Swap(segmenter=segmenter, synthesizers=synthesizers, modalities=MODALITIES, regions=REGIONS, **settings)
    for i, batch in enumerate(batches):
        swap.test_step(batch, i)
    swap.on_test_epoch_end()
    return swap, segmenter


def trainer(**settings):
    return pl.Trainer(
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        accelerator="cpu",
        **settings,
    )


def dice(row):
    return {key: value for key, value in row.items() if key.startswith("dice_")}


def test_the_fakes_answer_the_protocols():
    assert isinstance(Thresholds(), Segmenter)
    assert isinstance(Made("t1", None), Synthesizer)


# ----- what a row says -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", MODALITIES)
def test_a_perfect_synthesis_scores_what_the_real_sequence_scores(target):
    batches = [example("a"), example("b", seed=1)]
    swap, _ = run({f"{target}/perfect": perfect(target, batches)}, batches)
    assert [(row["subject"], row["input"]) for row in swap.rows] == [
        (subject, name) for subject in "ab" for name in ("real", f"{target}/perfect")
    ]
    for real, swapped in zip(swap.rows[::2], swap.rows[1::2], strict=True):
        assert dice(real) == dice(swapped)
        assert 0 < real["dice_WT"] < 1
        for where in ("brain", "tumour"):
            assert swapped[f"mse_{where}"] == 0
            assert swapped[f"ssim_{where}"] == pytest.approx(1, abs=1e-6)
            assert swapped[f"psnr_{where}"] == math.inf
        assert set(real) == {"subject", "input", *dice(real)}  # a real sequence has no error


def test_a_row_by_hand():
    batch = example()
    synthetic = batch["image"][:, 3:] * 0.5 + 0.1
    swap, _ = run({"flair/half": Made("flair", lambda _: synthetic)}, [batch])
    real, row = swap.rows
    enters = synthetic * batch["brain"][:, None]
    label = batch["label"]
    for got, flair in ((real, batch["image"][:, 3]), (row, enters[:, 0])):
        predicted = torch.where(batch["image"][:, 1] > 1.0, 3, torch.where(flair > 0.8, 2, 0))
        assert dice(got) == {f"dice_{name}": value for name, value in region_dice(predicted, label, REGIONS).items()}
    assert dice(real) != dice(row)
    inside = batch["image"][:, 3][batch["brain"]]
    data_range = float(inside.max() - inside.min())
    for where, mask in (("brain", batch["brain"]), ("tumour", label > 0)):
        pair = enters[0, 0], batch["image"][0, 3]
        assert row[f"mse_{where}"] == mse(*pair, mask[0])
        assert row[f"psnr_{where}"] == psnr(*pair, mask[0], data_range=data_range)
        assert row[f"ssim_{where}"] == ssim(*pair, mask[0], data_range=data_range)
    assert row["mse_brain"] != row["mse_tumour"]


def test_a_bias_is_not_normalised_away():
    batch = example()
    biased = Made("flair", lambda _: batch["image"][:, 3:] + 3)
    swap, segmenter = run({"flair/biased": biased}, [batch])
    assert swap.rows[1]["mse_brain"] == pytest.approx(9, rel=1e-4)
    inside = batch["brain"][:, None]
    torch.testing.assert_close(segmenter.saw[1]["flair"][inside], (batch["image"][:, 3:] + 3)[inside])


def test_the_tumour_is_every_labelled_voxel_but_the_ignored():
    batch = example()
    batch["label"][:, 3:9, 4:6, 3:8] = 255
    error = torch.zeros(1, 1, 12, 12, 12)
    error[0, 0][batch["label"][0] == 255] = 100.0  # only where nobody looks
    error[0, 0][batch["label"][0] == 3] = 2.0
    swap, _ = run({"t2/x": Made("t2", lambda _: batch["image"][:, 2:3] + error)}, [batch])
    tumour, enhancing = [int(torch.isin(batch["label"], torch.tensor(n)).sum()) for n in ([1, 2, 3], [3])]
    assert swap.rows[1]["mse_tumour"] == pytest.approx(4 * enhancing / tumour, rel=1e-4)


def test_a_region_empty_in_both_maps_scores_1_and_in_one_0():
    batch = example(lesion=False)
    nothing = Made("flair", lambda v: torch.zeros_like(v["t1"]))
    batch["image"][:, 1] = 0  # nothing enhances, neither in the scan nor in the segmentation
    swap, _ = run({"flair/nothing": nothing}, [batch])
    real, swapped = swap.rows
    assert (real["dice_ET"], real["dice_WT"]) == (1.0, 0.0)
    assert (swapped["dice_ET"], swapped["dice_WT"]) == (1.0, 1.0)


def test_a_subject_without_lesion_has_no_error_in_it_and_the_mean_skips_it():
    batches = [example("a"), example("b", seed=1, lesion=False)]
    swap, _ = run({"t1/x": Made("t1", lambda v: 0.5 * v["t2"])}, batches)
    a, b = swap.rows[1], swap.rows[3]
    for metric in ("mse", "psnr", "ssim"):
        assert math.isfinite(a[f"{metric}_tumour"])
        assert math.isnan(b[f"{metric}_tumour"])
        assert math.isfinite(b[f"{metric}_brain"])
    table = swap_table(swap.rows, regions=["WT"], title="")
    row = dict(zip(table.columns, table.rows[1], strict=True))
    assert row["MSE tumour"] == f"{a['mse_tumour']:.3f}"
    assert row["MSE brain"] == f"{(a['mse_brain'] + b['mse_brain']) / 2:.3f}"


# ----- what segmenter and synthesisers see ------------------------------------------------------------------------


def test_only_the_target_is_swapped_and_its_background_is_0():
    batch = example()
    made = torch.full((1, 1, 12, 12, 12), 0.7)
    _, segmenter = run({"flair/x": Made("flair", lambda _: made), "t1ce/y": Made("t1ce", lambda _: made)}, [batch])
    real, flair, t1ce = segmenter.saw
    expected = made * batch["brain"][:, None]
    inputs = volumes(batch, MODALITIES)
    for saw, swapped in ((real, ()), (flair, ("flair",)), (t1ce, ("t1ce",))):
        assert set(saw) == {"flair", "t1ce"}  # its sources and no more
        for name, volume in saw.items():
            assert torch.equal(volume, expected if name in swapped else inputs[name])


def test_a_synthesiser_gets_its_sources_alone():
    synthesizer = Made("t1", lambda v: v["flair"], sources=("flair", "t2"))
    run({"t1/x": synthesizer}, [example()])
    assert synthesizer.saw == [{"flair", "t2"}]  # never the target


def test_the_real_scans_are_segmented_once_a_subject():
    batches = [example("a"), example("b", seed=1)]
    synthesizers = {f"{target}/x": Made(target, lambda v: v["t2"], sources=("t2",)) for target in ("t1", "flair")}
    swap, segmenter = run(synthesizers, batches)
    assert len(segmenter.saw) == 2 * (1 + 2)
    assert [row["input"] for row in swap.rows] == ["real", "t1/x", "flair/x"] * 2


def test_networks_are_frozen_and_estimators_stay_as_they_are():
    torch.manual_seed(0)
    net = partial(SegmentationUNet3d, filters=2, levels=2, dropout=0.3)
    segmenter = SegmenterModule(net=net, modalities=MODALITIES, classes=CLASSES, regions=REGIONS)
    settings = {"modalities": MODALITIES, "classes": CLASSES, "regions": REGIONS, "filters": 2, "levels": 2}
    rsnet = RSNet(target="t1ce", dropout=0.3, **settings)
    models = {"segmenter": segmenter, "rsnet": rsnet}
    before = {name: {k: v.clone() for k, v in m.state_dict().items()} for name, m in models.items()}
    swap = Swap(
        segmenter=segmenter,
        synthesizers={"t1ce/rsnet": rsnet, "t1ce/copy": Made("t1ce", lambda v: v["t1"])},
        modalities=MODALITIES,
        regions=REGIONS,
    )
    assert len(swap.networks) == 2
    tests, loader = trainer(), DataLoader([example()], batch_size=None)
    tests.test(swap, loader, verbose=False)
    rows = swap.rows
    for name, model in models.items():
        after = model.state_dict()
        assert before[name].keys() == after.keys()
        assert all(torch.equal(value, after[key]) for key, value in before[name].items())
        assert not any(parameter.requires_grad for parameter in model.parameters())
    tests.test(swap, loader, verbose=False)
    assert swap.rows == rows  # dropout is off, and a second test does not add to the first
    assert [row["input"] for row in rows] == ["real", "t1ce/rsnet", "t1ce/copy"]


# ----- slices for the figure --------------------------------------------------------------------------------------


def test_slices_of_the_pictured_subject_alone_at_its_largest_lesion():
    a, b = example("a"), example("b", seed=1)
    b["label"][:] = 0
    b["label"][0, 2:10, 2:10, 9] = 2
    b["label"][0, :, :, 0] = 255  # ignored: no lesion
    swap, segmenter = run({"flair/x": Made("flair", lambda v: v["t2"])}, [a, b], pictured="b")
    assert set(swap.slices) == {"real", "flair/x"}
    assert set(swap.slices["real"]) == {"label", "predicted"}
    kept = swap.slices["flair/x"]
    assert torch.equal(kept["label"], b["label"][0, :, :, 9])
    assert torch.equal(kept["real"], b["image"][0, 3, :, :, 9])
    assert torch.equal(kept["synthetic"], (b["image"][0, 2] * b["brain"][0])[:, :, 9])
    assert torch.equal(kept["predicted"], segmenter.segment(segmenter.saw[3]).labels[0, :, :, 9])
    assert not run({}, [a])[0].slices


def test_a_pictured_subject_without_lesion_shows_its_middle():
    batch = example(lesion=False)
    swap, _ = run({"t1/x": Made("t1", lambda v: v["t2"])}, [batch], pictured="a")
    assert torch.equal(swap.slices["t1/x"]["real"], batch["image"][0, 0, :, :, 6])


# ----- several devices -------------------------------------------------------------------------------------------


def test_rows_and_slices_of_all_ranks_come_together(monkeypatch):
    batches = [example("a"), example("b", seed=1), example("c", seed=2)]
    synthesizers = {"t1/x": Made("t1", lambda v: v["t2"])}
    alone, _ = run(synthesizers, batches, pictured="b")
    ranks = [run(synthesizers, batches[rank::2], pictured="b")[0] for rank in range(2)]
    assert not ranks[0].slices  # subject b is the other rank's
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    held = [(swap.rows, swap.slices) for swap in ranks]
    for swap in ranks:

        def gather(parts, mine, swap=swap):
            assert mine == (swap.rows, swap.slices)
            parts[:] = held

        monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
        swap.on_test_epoch_end()
        assert swap.rows == alone.rows
        assert swap.slices.keys() == alone.slices.keys()


class HalfFlair:
    """Picklable, for the spawned processes."""

    sources, targets = ("t1", "flair"), ("t1ce",)

    def synthesize(self, volumes):
        return Synthesis(mean=0.5 * volumes["flair"], variance=None, scale="zscore")


class Keep(pl.Callback):
    """Writes what each rank has in the end, for the parent to read."""

    def __init__(self, folder):
        self.folder = folder

    def on_test_end(self, trainer, swap):
        kept = {"rows": swap.rows, "slices": {n: s["label"].tolist() for n, s in swap.slices.items()}}
        (self.folder / f"{trainer.world_size}_{trainer.global_rank}.json").write_text(json.dumps(kept))


@pytest.mark.slow
def test_two_processes_count_every_subject_once(phantom_store, tmp_path: Path):
    # Three subjects on two ranks: a padding sampler would count one of them twice.
    datamodule = CohortDataModule(
        store=phantom_store,
        modalities=MODALITIES,
        split={"kind": "ratio", "val": 0.0, "test": 0.375},
        normalisation=ZScore(),
        sampling=BrainBox(),
    )
    assert len(datamodule.split.test) == 3
    for devices in ({"devices": 1}, {"devices": 2, "strategy": "ddp_spawn"}):
        swap = Swap(
            segmenter=Thresholds(),
            synthesizers={"t1ce/half": HalfFlair()},
            modalities=MODALITIES,
            regions=REGIONS,
            pictured=datamodule.split.test[1],  # the second rank's
        )
        trainer(callbacks=[Keep(tmp_path)], **devices).test(swap, datamodule=datamodule, verbose=False)
    alone, first, second = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1_0", "2_0", "2_1")]
    assert [row["subject"] for row in alone["rows"]] == [id for id in datamodule.split.test for _ in range(2)]
    assert first == second == alone
