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
from mrgen.evaluation.swap import Swap
from mrgen.evaluation.swap_tables import swap_tables
from mrgen.metrics.reconstruction import mae, mse, psnr, ssim
from mrgen.metrics.segmentation import region_dice, region_hd95_directed
from mrgen.nets.unet3d import SegmentationUNet3d
from mrgen.papers.rsnet import RSNet
from mrgen.protocols import Segmenter, Synthesis, Synthesizer
from mrgen.segmenter import SegmenterModule
from tests.evaluation.tools import MODALITIES, REGIONS, Made, Thresholds, example, run, seeded

CLASSES = ("background", "necrotic core", "edema", "enhancing")


def perfect(target, batches):
    """Returns the real sequence of the subject whose turn it is."""
    real = iter([volumes(batch, MODALITIES)[target] for batch in batches])
    return Made(target, lambda _: next(real))


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


def overlap(row):
    return {key: value for key, value in row.items() if key.startswith(("dice_", "hd95_"))}


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
        assert overlap(real) == overlap(swapped)
        assert 0 < real["dice_WT"] < 1
        assert 0 < real["hd95_WT"] < 40
        for where in ("brain", "tumour"):
            assert swapped[f"mse_{where}"] == swapped[f"mae_{where}"] == 0
            assert swapped[f"ssim_{where}"] == pytest.approx(1, abs=1e-6)
            assert swapped[f"psnr_{where}"] == math.inf
        assert set(real) == {"subject", "input", *overlap(real)}  # a real sequence has no error
        measures = ("dice", "hd95", "hd95_mean")
        assert set(overlap(real)) == {f"{measure}_{region}" for measure in measures for region in REGIONS}
        for region in REGIONS:  # with the segmentation of the real sequences it agrees in every voxel
            assert swapped[f"agree_dice_{region}"] == 1
            assert swapped[f"agree_hd95_{region}"] == swapped[f"agree_hd95_mean_{region}"] == 0
        assert not [key for key in swapped if "variance" in key or "rank" in key]  # nothing claims to know its error
    assert swap.calibration == []


def test_a_row_by_hand():
    batch = example()
    synthetic = batch["image"][:, 3:] * 0.5 + 0.1
    swap, _ = run({"flair/half": Made("flair", lambda _: synthetic)}, [batch])
    real, row = swap.rows
    enters = synthetic * batch["brain"][:, None]
    label = batch["label"]
    for got, flair in ((real, batch["image"][:, 3]), (row, enters[:, 0])):
        predicted = torch.where(batch["image"][:, 1] > 1.0, 3, torch.where(flair > 0.8, 2, 0))
        dice = region_dice(predicted[0], label[0], REGIONS)
        distances = region_hd95_directed(predicted[0], label[0], REGIONS, (1, 2, 3))  # in the batch's mm
        assert overlap(got) == {
            **{f"dice_{name}": value for name, value in dice.items()},
            **{f"hd95_{name}": max(pair) for name, pair in distances.items()},
            **{f"hd95_mean_{name}": sum(pair) / 2 for name, pair in distances.items()},
        }
    assert overlap(real) != overlap(row)
    inside = batch["image"][:, 3][batch["brain"]]
    data_range = float(inside.max() - inside.min())
    for where, mask in (("brain", batch["brain"]), ("tumour", label > 0)):
        pair = enters[0, 0], batch["image"][0, 3]
        assert row[f"mse_{where}"] == mse(*pair, mask[0])
        assert row[f"mae_{where}"] == mae(*pair, mask[0])
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
    assert (real["hd95_ET"], real["hd95_WT"]) == (0.0, 373.13)
    assert (swapped["hd95_ET"], swapped["hd95_WT"]) == (0.0, 0.0)


def test_a_subject_without_lesion_has_no_error_in_it_and_the_mean_skips_it():
    batches = [example("a"), example("b", seed=1, lesion=False)]
    swap, _ = run({"t1/x": Made("t1", lambda v: 0.5 * v["t2"], doubt=lambda v: v["t2"].square())}, batches)
    a, b = swap.rows[1], swap.rows[3]
    for metric in ("mse", "mae", "psnr", "ssim", "variance"):
        assert math.isfinite(a[f"{metric}_tumour"])
        assert math.isnan(b[f"{metric}_tumour"])
        assert math.isfinite(b[f"{metric}_brain"])
    assert math.isfinite(b["rank_correlation"])
    table = swap_tables(swap.rows, regions=["WT"], title="")["synthesis"]
    brain, tumour = [dict(zip(table.columns, line, strict=True)) for line in table.rows]
    assert (tumour["in"], tumour["n"], tumour["MSE"]) == ("tumour", "1", f"{a['mse_tumour']:.3f}")
    assert (brain["in"], brain["n"]) == ("brain", "2")
    assert brain["MSE"].startswith(f"{(a['mse_brain'] + b['mse_brain']) / 2:.3f} [")


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
    assert swap.rows == rows  # dropout draws the same again, and a second test does not add to the first
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


def test_a_pictured_subject_without_lesion_shows_where_most_brain_is():
    batch = example(lesion=False)
    batch["brain"][:, 2, :, :7] = batch["brain"][:, 2, :, 8:] = False
    swap, _ = run({"t1/x": Made("t1", lambda v: v["t2"])}, [batch], pictured="a")
    assert torch.equal(swap.slices["t1/x"]["real"], batch["image"][0, 0, :, :, 7])


# ----- several devices -------------------------------------------------------------------------------------------


def test_rows_and_slices_of_all_ranks_come_together(monkeypatch):
    batches = [example("a"), example("b", seed=1), example("c", seed=2)]
    synthesizers = {"t1/x": seeded("t1")}
    alone, _ = run(synthesizers, batches, pictured="b")
    ranks = [run(synthesizers, batches[rank::2], pictured="b")[0] for rank in range(2)]
    assert not ranks[0].slices  # subject b is the other rank's
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    held = [(swap.rows, swap.calibration, swap.slices) for swap in ranks]
    for swap in ranks:

        def gather(parts, mine, swap=swap):
            assert all(a is b for a, b in zip(mine, (swap.rows, swap.calibration, swap.slices), strict=True))
            parts[:] = held

        monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
        swap.on_test_epoch_end()
        assert swap.rows == alone.rows
        assert swap.calibration == alone.calibration
        assert len(alone.calibration) == 3 * 20
        assert swap.slices.keys() == alone.slices.keys()


class HalfFlair:
    """Picklable, for the spawned processes; draws like dropout."""

    sources, targets = ("t1", "flair"), ("t1ce",)

    def synthesize(self, volumes):
        half = 0.5 * volumes["flair"]
        return Synthesis(mean=half + 0.1 * torch.rand_like(half), variance=torch.rand_like(half), scale="zscore")


class Keep(pl.Callback):
    """Writes what each rank has in the end, for the parent to read."""

    def __init__(self, folder):
        self.folder = folder

    def on_test_end(self, trainer, swap):
        slices = {name: kept["label"].tolist() for name, kept in swap.slices.items()}
        kept = {"rows": swap.rows, "calibration": swap.calibration, "slices": slices}
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
    assert len(alone["calibration"]) == 3 * 20
    assert first == second == alone
