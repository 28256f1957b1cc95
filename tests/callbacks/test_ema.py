"""The average is what its formula says, and it is what is validated, saved and loaded."""

import copy
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mrgen.callbacks.ema import EMA
from mrgen.callbacks.images import Images
from mrgen.errors import UserError
from mrgen.launch.instantiate import instantiate
from mrgen.launch.runs import load_run
from tests.launch.test_training import assert_same_run, checkpoint, resumed
from tests.launch.test_training_paper3 import trained as trained_paper3
from tests.launch.test_training_paper5 import PIX2PIX
from tests.launch.test_training_paper5 import trained as trained_paper5
from tests.launch.tools import composed, tiny_run

Weights = dict[str, Tensor]


class Gan(pl.LightningModule):
    """A generator with a batch norm against a discriminator; notes its weights after every batch.

    The second epoch is a stage of its own where it has ``stages``: the generator is frozen, and a head is trained.
    """

    def __init__(self, optimizers: int = 2, stages: int = 1):
        super().__init__()
        self.count, self.stages = optimizers, stages
        self.automatic_optimization = optimizers == 1
        self.generator = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
        self.discriminator = nn.Linear(1, 1)
        self.head = nn.Linear(1, 1)
        self.register_buffer("stage", torch.tensor(0))
        self.after: list[Weights] = []
        self.validated: list[Weights] = []
        self.kept: list[Weights] = []

    def weights(self) -> Weights:
        return copy.deepcopy(dict(self.state_dict()))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.stages == 2 and self.current_epoch == 1:
            self.stage.fill_(1)
            self.generator.eval()
        made = self.generator(batch)
        loss = made.square().mean() + self.discriminator(made).square().mean() + self.head(made).square().mean()
        if not self.automatic_optimization:
            optimizers: Any = self.optimizers()
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in optimizers:
                optimizer.step()
        return loss

    def on_train_batch_end(self, *args: Any) -> None:  # after the callbacks'
        self.after.append(self.weights())

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validated.append(self.weights())
        self.log("val/loss", self.generator(batch).square().mean())

    def on_validation_epoch_end(self) -> None:
        self.kept.append(self.weights())

    def configure_optimizers(self) -> Any:
        if self.count == 1:
            return torch.optim.SGD(self.parameters(), 0.1)
        generator = [*self.generator.parameters(), *self.head.parameters()]
        return [torch.optim.SGD(part, 0.1) for part in (generator, self.discriminator.parameters())]


def fitted(model: Gan, *callbacks: pl.Callback, epochs: int = 2, val: bool = True) -> pl.Trainer:
    """Three batches an epoch."""
    samples = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[*callbacks],
        num_sanity_val_steps=0,
        **{f"enable_{what}": False for what in ("checkpointing", "progress_bar", "model_summary")},
        logger=False,
    )
    trainer.fit(model, DataLoader(samples, batch_size=4), DataLoader(samples, batch_size=12) if val else None)
    return trainer


def average(weights: list[Weights], name: str, decay: float) -> Tensor:
    value = weights[0][name]
    for k, now in enumerate(weights[1:], start=1):
        d = min(decay, (1 + k) / (10 + k))
        value = d * value + (1 - d) * now[name]
    return value


@pytest.mark.parametrize("optimizers", [1, 2])
def test_the_average_is_that_of_the_formula_whatever_the_number_of_optimizers(optimizers: int):
    """Lightning counts a step an optimizer; its own averaging of every second step would never begin in a GAN."""
    pl.seed_everything(0, verbose=False)
    model = Gan(optimizers)
    fitted(model, EMA(0.3), val=False)
    assert len(model.after) == 6
    for name in ("generator.0.weight", "generator.1.running_mean", "generator.1.running_var", "generator.2.bias"):
        torch.testing.assert_close(model.state_dict()[name], average(model.after, name, 0.3))
        assert not torch.equal(model.state_dict()[name], model.after[-1][name])
    assert int(model.generator[1].num_batches_tracked) == 6
    assert torch.equal(model.discriminator.weight, model.after[-1]["discriminator.weight"])


def test_validation_sees_the_average_and_training_goes_on_from_the_weights():
    pl.seed_everything(0, verbose=False)
    model, plain = Gan(), Gan()
    plain.load_state_dict(model.state_dict())
    fitted(model, EMA(0.3))
    for epoch, (seen, kept) in enumerate(zip(model.validated, model.kept, strict=True)):
        wanted = average(model.after[: 3 * epoch + 3], "generator.0.weight", 0.3)
        torch.testing.assert_close(seen["generator.0.weight"], wanted)
        assert torch.equal(kept["generator.0.weight"], seen["generator.0.weight"])  # what was judged
    without = EMA()
    without.should_update = lambda **_: False  # type: ignore[method-assign]
    fitted(plain, without)
    assert torch.equal(plain.after[-1]["generator.0.weight"], model.after[-1]["generator.0.weight"])


@pytest.mark.parametrize("val", [True, False])
def test_a_picture_is_of_the_average_whether_or_not_there_is_a_validation(monkeypatch: pytest.MonkeyPatch, val: bool):
    drawn: list[Weights] = []
    monkeypatch.setattr(Images, "_grid", lambda images, data, model: drawn.append(model.weights()))
    model, plain = Gan(), Gan()
    plain.load_state_dict(model.state_dict())
    fitted(model, Images(every_n_epochs=1), EMA(0.3), val=val)
    for epoch, seen in enumerate(drawn):
        wanted = average(model.after[: 3 * epoch + 3], "generator.0.weight", 0.3)
        torch.testing.assert_close(seen["generator.0.weight"], wanted)
    assert len(drawn) == 2
    fitted(plain, EMA(0.3), val=val)
    assert torch.equal(plain.after[-1]["generator.0.weight"], model.after[-1]["generator.0.weight"])


def test_a_stage_begins_a_new_average_and_a_frozen_network_stays_as_it_is():
    pl.seed_everything(0, verbose=False)
    model = Gan(stages=2)
    fitted(model, EMA(0.9))
    last = model.validated[-1]
    torch.testing.assert_close(last["head.weight"], average(model.after[3:], "head.weight", 0.9))
    assert torch.equal(last["generator.0.weight"], model.after[-1]["generator.0.weight"])
    assert int(last["stage"]) == 1


def test_a_validation_that_fails_gives_the_weights_back(monkeypatch: pytest.MonkeyPatch):
    """Whoever saves then must not take the average for the weights."""

    def failing(self: Gan, batch: Tensor, batch_idx: int) -> None:
        raise MemoryError

    monkeypatch.setattr(Gan, "validation_step", failing)
    model = Gan()
    with pytest.raises(MemoryError):
        fitted(model, EMA(0.3))
    assert torch.equal(model.generator[0].weight, model.after[-1]["generator.0.weight"])


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_that_averages_nothing_is_refused(decay: float):
    with pytest.raises(UserError, match=r"callbacks\.ema\.decay is .*; expected a number from 0 to below 1"):
        EMA(decay)


GANS = ("samr/samr", "samr/shin", "samr/pix2pixhd", "samr/pix2pix", "t1_to_t2/pix2pix", "t1_to_t2/pix2pix_slices")


@pytest.mark.parametrize("preset", [*GANS, "lesion_vaegan/structure", "lesion_vaegan/generation"])
def test_the_discriminators_of_every_gan_are_called_so(preset: str):
    """By their names they are left out of the average."""
    with torch.device("meta"):
        module = instantiate(composed("train", f"experiment={preset}").model)
    kinds = [(name, type(part).__name__) for name, part in module.named_modules()]
    judges = [name for name, kind in kinds if "Discriminator" in kind or kind == "PatchGAN"]
    assert judges
    assert all("discriminator" in name.partition(".")[0] for name in judges)
    assert [name for name, part in module.named_children() if "discriminator" not in name and len([*part.parameters()])]


# ----- as a user --------------------------------------------------------------------------------------------------

SHORT = ("callbacks=[ema]", "callbacks.ema.decay=0.5")
PATCHES = ("data/sampling=patch", "data.sampling.size=[16,16,16]", "data.steps_per_epoch=2")


def test_a_run_is_loaded_averaged_and_goes_on_from_its_weights(tmp_path: Path, phantom_store: Path):
    """Stopped in an epoch or in a validation: see test_preemption.py."""
    whole = tiny_run(tmp_path / "whole", phantom_store, *SHORT, *PATCHES, "trainer.max_epochs=2")
    saved = checkpoint(whole, "best")
    name = next(iter(saved["state_dict"]))
    assert not torch.equal(saved["state_dict"][name], saved["current_model_state"][name])
    loaded = load_run(whole).model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in saved["state_dict"].items())
    parts = tiny_run(tmp_path / "parts", phantom_store, *SHORT, *PATCHES, "trainer.max_epochs=1")
    resumed(parts, "trainer.max_epochs=2")
    assert_same_run(parts, whole)


def test_a_gan_keeps_its_discriminator(tmp_path: Path, phantom_store: Path):
    run = trained_paper5(tmp_path / "run", phantom_store, "pix2pix", *PIX2PIX, *SHORT)
    saved = checkpoint(run)
    average, current = saved["state_dict"], saved["current_model_state"]
    same = {
        part: [torch.equal(average[k], current[k]) for k in average if k.startswith(part)] for part in ("disc", "gen")
    }
    assert all(same["disc"])
    assert not any(same["gen"][:2])


def test_offline_synthesis_hands_the_averaged_imputer_on(tmp_path: Path, wmh_store: Path):
    """Its second stage trains on the imputer that was validated, and leaves it alone."""
    run = trained_paper3(tmp_path / "run", wmh_store, "offline", *SHORT)
    saved = checkpoint(run)
    average, current = saved["state_dict"], saved["current_model_state"]
    assert int(average["stage"]) == 1
    weights = [name for name in average if name.startswith("imputer.") and "running" not in name]
    assert all(torch.equal(average[name], current[name]) for name in weights)
    load_run(run).model.check_trained()
