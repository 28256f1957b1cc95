"""A run that is told to end, wherever it is, goes on as if it had not been."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from mrgen.callbacks.determinism import SeedSteps
from mrgen.callbacks.ema import EMA
from mrgen.callbacks.preemption import Preemption
from mrgen.data.loader import ResumableLoader
from mrgen.data.sampler import EvaluationSampler, TrainingSampler
from mrgen.errors import Preempted
from mrgen.launch.csv_logger import CsvLogger
from tests.launch.test_training import differences

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:Detected call of .lr_scheduler")

STEPS, SUBJECTS = 6, 3  # batches of an epoch, and of a validation


class Numbers:
    """Samples of a TrainingSampler or an EvaluationSampler, a number each."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, key: tuple[int, int, int]) -> torch.Tensor:
        return torch.tensor([key[2] / 3 + key[1] / 7])


class Toy(pl.LightningModule):
    """Draws random numbers in training and validation, logs means, and has an optimizer and a schedule with a state."""

    def __init__(self, manual: bool = False, tell: tuple[str, int, int] | None = None, number: int = signal.SIGUSR1):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(1, 3), torch.nn.Dropout(0.3), torch.nn.Linear(3, 1))
        self.automatic_optimization = not manual
        self.tell, self.number = tell, number

    def _told(self, place: str, batch_idx: int) -> None:
        if self.tell == (place, self.current_epoch, batch_idx):
            os.kill(os.getpid(), self.number)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor | None:
        self._told("train", batch_idx)
        loss = (self.net(batch) - batch.square()).square().mean()
        if not self.automatic_optimization:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
        self.log("train/loss", loss, on_step=True, on_epoch=True, batch_size=len(batch))
        self.log("train/half", loss / 2, on_step=False, on_epoch=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self._told("val", batch_idx)
        self.log("val/loss", self.net(batch).square().mean() + torch.rand(()), batch_size=1)

    def on_train_epoch_end(self) -> None:
        self._told("epoch end", 0)
        if not self.automatic_optimization:
            for scheduler in self.lr_schedulers():
                scheduler.step()

    def configure_optimizers(self) -> Any:
        parts = [self.net] if self.automatic_optimization else [self.net[0], self.net[2]]
        optimizers = [torch.optim.Adam(part.parameters(), lr=0.05) for part in parts]
        return optimizers, [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5) for optimizer in optimizers]


def fit(
    folder: Path,
    module: Toy,
    *,
    resume: Path | None = None,
    workers: int = 0,
    requeue: Any = None,
    callbacks: Callable[[], list[pl.Callback]] = list,
    epochs: int = 2,
    **settings: Any,
) -> None:
    sampler = TrainingSampler(5, samples=2 * STEPS, seed=0)
    train = ResumableLoader(
        Numbers(), batch_size=2, sampler=sampler, num_workers=workers, persistent_workers=workers > 0
    )
    val = DataLoader(Numbers(), batch_size=1, sampler=EvaluationSampler(SUBJECTS))
    logger = CsvLogger(folder / "metrics.csv")
    with Preemption(folder, requeue) as preemption:
        last = ModelCheckpoint(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False)
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            logger=logger,
            callbacks=[SeedSteps(0), *callbacks(), preemption, last],
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            **settings,
        )
        if resume is not None:
            content = torch.load(resume, weights_only=True)
            logger.go_on_from(content["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"])
        trainer.fit(module, train, val, ckpt_path=resume, weights_only=True)


def assert_same(folder: Path, whole: Path, *, counters: bool = True) -> None:
    """Weights, optimizers, schedules, metrics and Lightning's counters, bit for bit."""
    a, b = (torch.load(run / "last.ckpt", weights_only=True) for run in (folder, whole))
    parts = ("state_dict", "optimizer_states", "lr_schedulers", *(["loops"] * counters))
    assert {part: differences(a[part], b[part]) for part in parts} == {part: [] for part in parts}
    assert (folder / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


def assert_goes_on(
    folder: Path, whole: Path, tell: tuple[str, int, int], *, manual: bool = False, **settings: Any
) -> str:
    """Told at a place, a run ends as if it had not been told; gives what it ended by the first time."""
    counters = settings.pop("counters", True)
    with pytest.raises(Preempted) as end:
        fit(folder, Toy(manual, tell), **settings)
    fit(folder, Toy(manual), resume=folder / "resume.ckpt", **settings)
    assert not (folder / "resume.ckpt").exists()
    assert_same(folder, whole, counters=counters)
    assert end.value.code == 143
    return end.value.reason


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Uninterrupted, with one optimizer, and with two that are stepped by hand."""
    folders = {manual: tmp_path_factory.mktemp("whole") for manual in (False, True)}
    for manual, folder in folders.items():
        fit(folder, Toy(manual))
    return folders


@pytest.mark.parametrize("manual", [False, True], ids=["one optimizer", "two players"])
@pytest.mark.parametrize(
    ("tell", "where"),
    [
        (("train", 0, 0), "before batch 1 of epoch 0"),
        (("train", 1, 3), "before batch 4 of epoch 1"),
        (("train", 1, STEPS - 2), f"before batch {STEPS - 1} of epoch 1"),
        (("train", 1, STEPS - 1), "in the validation of epoch 1"),
        (("val", 0, 1), "in the validation of epoch 0"),
    ],
)
def test_weights_and_metrics_are_those_of_an_uninterrupted_run(tmp_path: Path, whole, manual: bool, tell, where: str):
    assert assert_goes_on(tmp_path, whole[manual], tell, manual=manual) == f"SIGUSR1, {where}"


def test_with_workers_that_have_fetched_ahead(tmp_path: Path, whole: dict[bool, Path]):
    assert_goes_on(tmp_path, whole[False], ("train", 1, 2), workers=1)


def test_gradients_that_are_being_accumulated_are_waited_for(tmp_path: Path):
    fit(tmp_path / "whole", Toy(), accumulate_grad_batches=3)
    told = assert_goes_on(tmp_path / "parts", tmp_path / "whole", ("train", 0, 1), accumulate_grad_batches=3)
    assert told == "SIGUSR1, before batch 3 of epoch 0"


def test_where_an_epoch_is_validated_twice(tmp_path: Path):
    """No validation is left out and none is repeated, before one, in one and behind one."""
    fit(tmp_path / "whole", Toy(), val_check_interval=3)
    for name, tell in enumerate((("train", 1, 2), ("val", 1, 0), ("train", 1, 3))):
        assert_goes_on(tmp_path / str(name), tmp_path / "whole", tell, counters=False, val_check_interval=3)


def test_told_again_and_again(tmp_path: Path, whole: dict[bool, Path]):
    """At the first batch after a start as well, so that sums are handed on that nothing was added to."""
    resume = None
    for tell in (("train", 0, 2), ("train", 0, 3), ("train", 0, 5), ("val", 0, 0), ("train", 1, 0)):
        with pytest.raises(Preempted):
            fit(tmp_path, Toy(tell=tell), resume=resume)
        resume = tmp_path / "resume.ckpt"
    fit(tmp_path, Toy(), resume=resume)
    assert_same(tmp_path, whole[False])


def test_between_two_epochs_the_last_checkpoint_is_all_there_is_to_save(tmp_path: Path):
    with pytest.raises(Preempted, match="before batch 0 of epoch 1"):
        fit(tmp_path, Toy(tell=("epoch end", 0, 0)))
    assert (tmp_path / "last.ckpt").is_file()
    assert not (tmp_path / "resume.ckpt").exists()


def test_a_run_that_has_nothing_left_to_do_ends_as_it_would(tmp_path: Path):
    fit(tmp_path, Toy(tell=("epoch end", 1, 0)))
    assert not (tmp_path / "resume.ckpt").exists()


class Shown(pl.Callback):
    """Other weights are validated, as an average of them would be."""

    kept: dict[str, Any] | None = None

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.kept = {name: value.clone() for name, value in pl_module.state_dict().items()}
        for value in pl_module.parameters():
            value.data.zero_()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.kept is not None:
            pl_module.load_state_dict(self.kept)
        self.kept = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.on_validation_end(trainer, pl_module)


@pytest.mark.parametrize("callback", [Shown, lambda: EMA(0.5)], ids=["other weights", "an average"])
def test_weights_that_are_in_the_model_for_its_validation_are_not_saved(tmp_path: Path, callback: Callable):
    fit(tmp_path / "whole", Toy(), callbacks=lambda: [callback()])
    for name, tell in enumerate((("val", 0, 1), ("train", 1, 3))):
        assert_goes_on(tmp_path / str(name), tmp_path / "whole", tell, callbacks=lambda: [callback()])


# ----- signals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM])
def test_it_asks_to_be_started_again_once_it_is_saved(tmp_path: Path, number: int):
    saved: list[bool] = []

    def requeue() -> bool:
        saved.append((tmp_path / "resume.ckpt").is_file())
        return True

    with pytest.raises(Preempted) as end:
        fit(tmp_path, Toy(tell=("train", 0, 1), number=number), requeue=requeue)
    assert saved == [True]
    assert "queued again" in end.value.reason
    assert (tmp_path / "resume.ckpt").is_file()


def test_further_signals_while_it_saves_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save = pl.Trainer.save_checkpoint

    def disturbed(self: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGTERM):
            os.kill(os.getpid(), number)
        save(self, *args, **kwargs)

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", disturbed)
    with pytest.raises(Preempted):
        fit(tmp_path, Toy(tell=("train", 0, 1)))
    assert torch.load(tmp_path / "resume.ckpt", weights_only=True)["epoch"] == 0


def test_handlers_are_those_of_before_again_and_lightnings_never_there(tmp_path: Path):
    """Whatever else is there, a SIGTERM reaches nobody but the callback: others would end the run without saving."""
    called: list[int] = []
    seen: list[Any] = []

    class Look(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            seen.append(signal.getsignal(signal.SIGTERM))

    numbers = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, frame: called.append(number)) for number in numbers}
    ours = {number: signal.getsignal(number) for number in numbers}
    try:
        with pytest.raises(Preempted):
            fit(tmp_path, Toy(tell=("train", 0, 1), number=signal.SIGTERM), callbacks=lambda: [Look()])
        assert {number: signal.getsignal(number) for number in numbers} == ours
        assert called == []
        assert seen[0].__func__ is Preemption._note
        fit(tmp_path / "other", Toy(), epochs=1)
        assert {number: signal.getsignal(number) for number in numbers} == ours
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
