"""Paper 2 through ``mrgen-train``: slices with an atlas that stays with the run, the judging U-Net, two processes."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from mrgen.data.atlas import Atlas
from mrgen.data.slices import SiteSlices
from mrgen.data.store import Store
from mrgen.errors import Preempted, UserError
from mrgen.launch.instantiate import instantiate
from mrgen.launch.runs import load_run
from mrgen.launch.training import _check_shapes, train
from mrgen.papers.label_to_image import LabelToImage
from mrgen.papers.samr import SAMR
from mrgen.protocols import Generator, Segmenter
from tests.launch.test_training import checkpoint, differences, moved, resumed
from tests.launch.tools import CPU, Called, composed, signalled

SLICES = ("data.sampling.size=[48,48]", "data.modalities=[t1,t1ce,t2,flair]", "data.batch_size=4")
SHORT = ("trainer.max_epochs=2", "data.steps_per_epoch=2", "trainer.log_every_n_steps=1", *CPU)
NARROW = ("model.filters=2", "model.downs=3", "model.blocks=1", "model.discriminator_filters=2")
UNET = ("model.unet_filters=2", "model.unet_downs=3")
ABLATIONS = ("samr", "no_stretch_out", "no_label_wise", "no_atlas", "no_shape")


def trained(run_dir: Path, store: Path, preset: str, *overrides: str) -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    common = (f"experiment=samr/{preset}", f"data.store='{store}'", *SLICES, *SHORT)
    return train(composed("train", *common, *overrides), run_dir)


@pytest.fixture(scope="module")
def runs(phantom_store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """SAMR and its four ablations, each trained for two epochs. Read only."""
    folder = tmp_path_factory.mktemp("paper2")
    return {name: trained(folder / name, phantom_store, name, *NARROW, *UNET) for name in ABLATIONS}


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_is_a_preset_and_every_run_a_generator(runs: dict[str, Path], name: str):
    run = load_run(runs[name])
    assert str(run.conf.name) == name
    assert run.checkpoint.name == "last.ckpt"
    assert isinstance(run.model, Generator)
    assert run.model.scale == run.normalisation.scale
    model = run.model
    found = {
        "no_stretch_out": len(model.generator.decoders) == 1,
        "no_label_wise": len(model.discriminators.discriminators) == 2,
        "no_atlas": model.guides == (),
        "no_shape": model.segmenter is None,
    }
    assert [key for key, holds in found.items() if holds] == [name] * (name != "samr")


def test_the_atlas_is_of_the_training_subjects_and_found_again(runs: dict[str, Path], phantom_store: Path):
    run = load_run(runs["samr"])
    atlas = run.guides["atlas"]
    assert isinstance(atlas, Atlas)
    assert atlas.subjects == tuple(sorted(run.split.train))
    assert not set(atlas.subjects) & set(run.split.test)
    assert atlas.modalities == ("t1", "t1ce", "t2", "flair")
    assert atlas.scale == "symmetric"
    assert atlas.mean.min() >= -1
    assert atlas.mean.max() <= 1
    assert not (runs["no_atlas"] / "atlas.npz").exists()
    assert load_run(runs["no_atlas"]).guides == {}


def test_a_checkpoint_says_what_an_epoch_was(runs: dict[str, Path], phantom_store: Path):
    run = load_run(runs["samr"])
    data, store = run.description["data"], Store(phantom_store)
    shown = [run.slices.training(store.subjects[id].shape, None) for id in run.split.train]
    assert data["slices"] == sum(map(len, shown))
    assert {each.step for each in shown} == {5}
    assert run.description["training"] == {"epochs": 2, "steps": 4, "devices": 1}
    assert data["mix"] is None


def test_a_resumed_run_keeps_its_atlas_and_repeats_an_uninterrupted_one(
    runs: dict[str, Path], phantom_store: Path, tmp_path: Path
):
    run = trained(tmp_path / "run", phantom_store, "samr", *NARROW, *UNET, "trainer.max_epochs=1")
    Atlas.load(run)  # it is there from the start
    before = (run / "atlas.npz").read_bytes()
    resumed(run, "trainer.max_epochs=2")
    assert (run / "atlas.npz").read_bytes() == before
    whole = runs["samr"]
    assert differences(moved(checkpoint(run), run), moved(checkpoint(whole), whole)) == []
    assert (run / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


def test_a_run_that_was_told_to_end_in_the_middle_of_an_epoch_goes_on_there(
    runs: dict[str, Path], phantom_store: Path, tmp_path: Path, last_words: list[Callable]
):
    with signalled(SAMR, epoch=1, batch=0), pytest.raises(Preempted, match="before batch 1 of epoch 1"):
        trained(tmp_path / "run", phantom_store, "samr", *NARROW, *UNET)
    run, whole = resumed(tmp_path / "run"), runs["samr"]
    assert differences(moved(checkpoint(run), run), moved(checkpoint(whole), whole)) == []
    assert (run / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data.sampling.size=[44,48]",), r"\[44, 48\]; the network needs multiples of 8 from 16 on; .*model\.downs"),
        (("model.downs=5", "data.sampling.size=[32,32]"), r"multiples of 32 from 64 on"),
        (("data.normalisation._target_=mrgen.data.normalisation.ZScore",), r"'symmetric'.*normalisation\.Symmetric"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_batch(
    phantom_store: Path, tmp_path: Path, overrides: tuple[str, ...], message: str
):
    with pytest.raises(UserError, match=message):
        trained(tmp_path, phantom_store, "samr", *NARROW, *UNET, *overrides)
    assert not (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize(
    ("preset", "size", "message"),
    [
        ("pix2pix", 16, r"multiples of 16 from 24 on"),
        ("pix2pixhd", 16, r"multiples of 16 from 32 on"),
        ("shin", 40, r"multiples of 16 from 24 on"),
    ],
)
def test_a_baseline_that_cannot_take_the_slices_says_so(preset: str, size: int, message: str):
    narrow = ("model.filters=4", "model.discriminator_filters=2", "model.downs=4")
    model = instantiate(composed("train", f"experiment=samr/{preset}", *narrow).model)
    with pytest.raises(UserError, match=message):
        _check_shapes(model, SimpleNamespace(sampling=SiteSlices(size=(size, size))))


@pytest.mark.parametrize("fraction", ["1", "1.0", "1.00"])
def test_a_mix_has_one_name_however_its_fraction_is_written(fraction: str):
    assert composed("train", "experiment=samr/unet_mixed", f"data.mix.fraction={fraction}").name == "samr-1.0"


def test_the_segmenter_sees_slices_and_judges_volumes(phantom_store: Path, tmp_path: Path):
    narrow = ("model.net.filters=2", "model.net.downs=3", "model.constant_epochs=1", "model.decay_epochs=1")
    run = load_run(trained(tmp_path, phantom_store, "unet", *narrow))
    assert isinstance(run.model, Segmenter)
    assert not isinstance(run.model, Generator)
    assert run.tile == [0, 0, 1]
    assert str(run.conf.name) == "real"
    volumes = {name: torch.randn(1, 1, 48, 48) for name in run.model.sources}
    found = run.model.segment(volumes)
    assert found.probabilities.shape == (1, 4, 48, 48)
    assert found.labels.shape == (1, 48, 48)


def test_its_learning_rate_is_constant_and_then_falls_linearly():
    shape = ("model.net.filters=2", "model.constant_epochs=2", "model.decay_epochs=3")
    built = instantiate(composed("train", "experiment=samr/unet", *shape).model)
    assert [built._falling(epoch) for epoch in range(6)] == pytest.approx([1, 1, 0.75, 0.5, 0.25, 0])


# ----- two processes ---------------------------------------------------------------------------------------------


class Slices(Dataset):
    """Noise with a brain; every third sample has a lesion, so that often one process alone has one."""

    def __len__(self):
        return 16

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        brain = torch.zeros(16, 16, dtype=torch.bool)
        brain[2:14, 2:14] = True
        label = torch.zeros(16, 16, dtype=torch.int64)
        if i % 3 == 0:
            label[5:9, 5:9] = 1
        image, atlas = (2 * torch.rand(n, 16, 16, generator=generator) - 1 for n in (2, 6))
        return {"image": image, "label": label, "brain": brain, "atlas": atlas}


class Keep(pl.Callback):
    """Writes what each process ends with, for the parent to read."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        torch.save(model.state_dict(), self.folder / f"{trainer.global_rank}.pt")
        steps = {"epochs": trainer.current_epoch, "steps": trainer.global_step}
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(steps))


SMALL = {
    SAMR: {"filters": 2, "downs": 2, "blocks": 1, "discriminator_filters": 2, "unet_filters": 2, "unet_downs": 2},
    LabelToImage: {"filters": 4, "downs": 3, "discriminator_filters": 2, "scales": 1, "generator": "global"},
}


@pytest.mark.slow
@pytest.mark.parametrize("cls", SMALL, ids=lambda cls: cls.__name__)
def test_two_processes_keep_both_players_in_step(cls: type[pl.LightningModule], tmp_path: Path):
    from torch.utils.data.distributed import DistributedSampler

    pl.seed_everything(0, verbose=False)
    model = cls(modalities=("t1", "t2"), classes=("background", "lesion"), lr=1e-2, **SMALL[cls])
    first = {name: value.clone() for name, value in model.state_dict().items()}
    # Each process shuffles for itself here: without what DDP does, they would end elsewhere.
    loader = DataLoader(Slices(), batch_size=2, sampler=DistributedSampler(Slices(), 2, rank=0, shuffle=True))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_spawn_find_unused_parameters_true",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Keep(tmp_path)],
    )
    trainer.fit(model, loader)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    weights = dict(model.named_parameters())
    assert all(torch.equal(one[name], other[name]) for name in weights)
    for player in ("generator", "discriminators", *(["segmenter"] if cls is SAMR else [])):
        moved = [not torch.equal(one[name], first[name]) for name in weights if name.startswith(player)]
        assert all(moved)
        assert moved
    assert all(json.loads((tmp_path / f"{rank}.json").read_text())["epochs"] == 2 for rank in (0, 1))
    assert all(bool(torch.isfinite(value).all()) for value in one.values())


# ----- as a user --------------------------------------------------------------------------------------------------


def test_the_phantom_of_paper_2_has_five_sequences(mrgen: Callable[..., Called], tmp_path: Path):
    called = mrgen("prepare", "data=phantom_apt", "data.phantom.subjects=2", "data.phantom.spacing=5")
    assert called.code == 0, called.err
    (store,) = (tmp_path / "stores").iterdir()
    subjects = list(Store(store).subjects.values())
    assert len(subjects) == 2
    assert subjects[0].modalities == ("t1", "t1ce", "t2", "flair", "apt")
    assert np.std(subjects[0].read_image(["apt"])) > 0
