"""Paper 4 through ``mrgen-train``: its stages killed and resumed, on real scans, on two processes."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from mrgen.data.layouts import Layout
from mrgen.data.preparation import prepare_cohort
from mrgen.errors import Preempted
from mrgen.files import read_metrics
from mrgen.launch.paths import CONF_DIR
from mrgen.launch.runs import load_run
from mrgen.launch.training import train
from mrgen.papers.lesion_vaegan.generation import LesionVAEGAN
from mrgen.papers.lesion_vaegan.structure import StructureVAEGAN
from tests.launch.test_training import checkpoint, resumed
from tests.launch.test_training_paper2 import Keep
from tests.launch.test_training_paper3 import assert_same_run, stopped_in
from tests.launch.tools import CPU, composed, signalled

STAGES = {"structure": StructureVAEGAN, "generation": LesionVAEGAN}
SMALL = {
    "structure": ("model.width=1", "model.latent=4", "model.halvings=3"),
    "generation": ("model.width=1", "model.discriminator_width=1"),
    "availability": ("model.width=1",),
}
TINY = (
    *("data.sampling.size=[48,48]", "trainer.max_epochs=2", "data.steps_per_epoch=2", "data.batch_size=1"),
    *("data.split.test=0.25", "data.split.val=0.25", "monitor=val/loss", "trainer.log_every_n_steps=1", *CPU),
)


def trained(run_dir: Path, store: Path, preset: str, *overrides: str) -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    chosen = (f"experiment=lesion_vaegan/{preset}", f"data.store='{store}'", *SMALL[preset], *TINY, *overrides)
    return train(composed("train", *chosen), run_dir)


@pytest.fixture(scope="module")
def runs(phantom_store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both stages, each trained for two epochs. Read only."""
    folder = tmp_path_factory.mktemp("paper4")
    return {stage: trained(folder / stage, phantom_store, stage) for stage in STAGES}


@pytest.mark.parametrize("stage", STAGES)
def test_the_metrics_have_a_row_for_every_batch_and_a_column_for_every_term(runs: dict[str, Path], stage: str):
    """Lightning counts three steps a batch; rows count batches."""
    rows = read_metrics(runs[stage] / "metrics.csv")
    assert [(int(row["epoch"]), int(row["step"])) for row in rows] == [(i // 2, i) for i in range(4)]
    model = load_run(runs[stage]).model
    assert {f"train/{term}" for term in model.weights} <= set(rows[0])
    assert all(float(rows[1][f"train/{term}"]) >= 0 for term in model.weights)
    assert float(rows[1]["val/loss"]) > 0
    assert checkpoint(runs[stage])["global_step"] == 12


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_stopped_goes_on_to_the_same_weights_and_rows(
    runs: dict[str, Path],
    phantom_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    last_words: list[Callable],
    stage: str,
):
    with monkeypatch.context() as patch:
        stopped_in(patch, STAGES[stage], epoch=1, batch=1)
        with pytest.raises(MemoryError):
            trained(tmp_path / "run", phantom_store, stage)
    assert checkpoint(tmp_path / "run")["epoch"] == 0
    resumed(tmp_path / "run")
    assert_same_run(tmp_path / "run", runs[stage])


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_was_told_to_end_in_the_middle_of_an_epoch_goes_on_there(
    runs: dict[str, Path], phantom_store: Path, tmp_path: Path, last_words: list[Callable], stage: str
):
    """With batches of one sequence each in the second stage, all of which go on."""
    with signalled(STAGES[stage], epoch=1, batch=0), pytest.raises(Preempted, match="before batch 1 of epoch 1"):
        trained(tmp_path / "run", phantom_store, stage)
    resumed(tmp_path / "run")
    assert_same_run(tmp_path / "run", runs[stage])


@pytest.mark.parametrize("preset", SMALL)
def test_real_scans_of_two_sequences(real_store: Path, tmp_path: Path, preset: str):
    """T1ce and FLAIR of four BraTS 2015 cases with their five labels, 240 × 240: the presets and no code."""
    chosen = (
        f"experiment=lesion_vaegan/{preset}",
        f"data.store='{real_store}'",
        *("data.modalities=[t1ce,flair]", "data.split.test=0.25", "trainer.max_epochs=1", "data.steps_per_epoch=1"),
        *("data.batch_size=1", "row=2" if preset == "availability" else "seed=0", *SMALL[preset], *CPU),
    )
    (tmp_path / "run").mkdir()
    run = load_run(train(composed("train", *chosen), tmp_path / "run"))
    assert run.model.modalities == ("t1ce", "flair")
    assert len(run.description["data"]["classes"]) == 5
    assert run.slices.training((240, 240, 155), None) == range(55, 105)
    assert run.slices.size == (240, 240)


@pytest.fixture(scope="module")
def real_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = os.environ.get("MRGEN_SCANS")
    root = Path(folder or "/nowhere") / "brats2015" / "BRATS2015_Training"
    if not root.is_dir():
        pytest.skip("MRGEN_SCANS does not name a folder of real scans with BraTS 2015")
    layout = Layout.from_conf(CONF_DIR / "data" / "layout" / "brats2015.yaml")
    store = tmp_path_factory.mktemp("real") / "store"
    report = prepare_cohort(layout, root, store, modalities=["t1ce", "flair"], workers=0, progress=False)
    assert not report.problems, report.problems
    return store


# ----- two processes ---------------------------------------------------------------------------------------------


class Slices(Dataset):
    """Noise with a brain and a lesion; of one sequence each where a stage is unpaired."""

    def __init__(self, unpaired: bool):
        self.unpaired = unpaired

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(i)
        brain = torch.zeros(40, 40, dtype=torch.bool)
        brain[4:36, 4:36] = True
        label = torch.zeros(40, 40, dtype=torch.int64)
        label[10:16, 10:16] = 1
        images = torch.rand(2, 40, 40, generator=generator) * brain
        if not self.unpaired:
            return {"image": images, "label": label, "brain": brain}
        lesions = label.roll(4, dims=0)[None].to(torch.uint8)
        parts = {"label": label, "brain": brain, "lesions": lesions}
        return {name: {"image": images[i : i + 1], **parts} for i, name in enumerate(("t1", "t2"))}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_keep_all_players_in_step(stage: str, tmp_path: Path):
    """Plain DDP, which allows no parameter without a gradient."""
    from torch.utils.data.distributed import DistributedSampler

    pl.seed_everything(0, verbose=False)
    weights = dict(composed("train", f"experiment=lesion_vaegan/{stage}").model.weights)
    small: dict[str, Any] = {"width": 2, "weights": weights, "lr": 1e-2}
    if stage == "structure":
        model: pl.LightningModule = StructureVAEGAN(modalities=("t1", "t2"), size=(40, 40), latent=4, **small)
    else:
        classes = ("background", "lesion")
        model = LesionVAEGAN(modalities=("t1", "t2"), classes=classes, discriminator_width=2, **small)
    first = {name: value.clone() for name, value in model.state_dict().items()}
    slices = Slices(stage == "generation")
    loader = DataLoader(slices, batch_size=2, sampler=DistributedSampler(slices, 2, rank=0, shuffle=True))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_spawn",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Keep(tmp_path)],
    )
    trainer.fit(model, loader)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    named = dict(model.named_parameters())
    assert all(torch.equal(one[name], other[name]) for name in named)
    for player in {name.partition(".")[0] for name in named}:
        assert any(not torch.equal(one[name], first[name]) for name in named if name.startswith(player))
    assert all(bool(torch.isfinite(value).all()) for value in one.values())
