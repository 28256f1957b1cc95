"""A run that is told to end saves in the middle of its epoch, from where it goes on as if nothing had happened."""

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from mrgen.errors import Preempted

__all__ = ["RESUME", "Preemption"]

RESUME = "resume.ckpt"
SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)


class Preemption(Callback):
    """Answers SIGUSR1, SIGUSR2 and SIGTERM: saves ``resume.ckpt`` and ends the run by ``Preempted``.

    The signals' handler only notes them: whatever it did in the middle of a step, other ranks would not be doing. All
    ranks look at what they noted before every batch, and where they validate, and save together.

    What was begun stays begun: a resumed run shows the batches that are left of the epoch, validates where it was about
    to, and logs the epoch's means over all of its batches. Beyond Lightning's, the checkpoint holds the sums behind
    these means; sums are the same whichever side is added to the other, so that they are exact.

    To be given to the trainer behind all callbacks that change the model; as a context it gives the handlers back.

    Args:
        folder: gets ``resume.ckpt``, which is deleted once the run has saved at the end of an epoch.
        requeue: asks for the run to be started again, on the first rank, once it is saved; returns whether it will.
            After a SIGTERM as well, by which many sites preempt: a job that ends by itself then is not started again
            by SLURM. Whether somebody cancelled the run is for it to find out.
    """

    def __init__(self, folder: Path, requeue: Callable[[], bool] | None = None):
        self.path, self.requeue = folder / RESUME, requeue
        self._received: set[signal.Signals] = set()
        self._handlers: dict[signal.Signals, Any] = {}
        self._place: str | None = None  # where the run is to be saved: before a "batch", or a "validation"
        self._validated: dict[str, int] = {}  # Lightning's count of validation batches where a validation began
        self._together = 0  # batches of a validation that all ranks have
        self._sums: dict[str, dict[str, Any]] = {}  # of the epoch before it was resumed, until they are added
        self._validates = False  # resumed in a validation

    # ----- signals -----------------------------------------------------------------------------------------------

    def __enter__(self) -> "Preemption":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handlers = {}

    def _note(self, number: int, frame: Any) -> None:
        self._received.add(signal.Signals(number))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        # Lightning's own handlers broadcast between ranks wherever these are, and end the run without saving.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        if threading.current_thread() is threading.main_thread() and not self._handlers:
            self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _asked(self, trainer: Trainer) -> bool:
        """Whether any rank was told to end. Every rank has to ask."""
        return trainer.strategy.reduce_boolean_decision(bool(self._received), all=False)

    # ----- where a run may end -----------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        whole_step = batch_idx % trainer.accumulate_grad_batches == 0  # gradients are not saved
        if whole_step and self._asked(trainer):
            # Before the first batch there is nothing that the end of the last epoch has not saved.
            self._end(f"before batch {batch_idx} of epoch {trainer.current_epoch}", "batch" if batch_idx else None)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
        if self._validates:  # what on_save_checkpoint() added
            progress.total.ready -= 1
            progress.total.started -= 1  # type: ignore[attr-defined]
            self._validates = False
        self._validated = progress.total.state_dict()
        count = trainer.num_val_batches
        batches = torch.tensor(sum(count) if isinstance(count, list) else count, device=trainer.strategy.root_device)
        self._together = int(trainer.strategy.reduce(batches, reduce_op="min"))
        self._leave_validation(trainer)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *which: int
    ) -> None:
        if not trainer.sanity_checking and batch_idx < self._together:  # ranks without a batch would not answer
            self._leave_validation(trainer)

    def _leave_validation(self, trainer: Trainer) -> None:
        """Ends the run here, to begin the validation anew; not where it is the last thing that the run does."""
        if self._asked(trainer) and not trainer.should_stop:
            self._end(f"in the validation of epoch {trainer.current_epoch}", "validation")

    def _end(self, where: str, place: str | None) -> None:
        self._place = place
        names = ", ".join(sorted(number.name for number in self._received)) or "a signal to another rank"
        raise Preempted(f"{names}, {where}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves. Only now, when callbacks that have put other weights into the model have taken them out again."""
        if not isinstance(exception, Preempted):
            return
        if self._place:
            self._sums = self._sums_so_far(trainer)
            trainer.save_checkpoint(self.path)
            self._place = None
        if trainer.is_global_zero and self.requeue and self.requeue():
            exception.reason += "; queued again"

    # ----- what is saved -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._sums, "validates": self._place == "validation"} if self._place else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._sums, self._validates = state_dict["sums"], state_dict["validates"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Makes Lightning's counters those of a place from which it goes on."""
        loops = checkpoint["loops"]["fit_loop"]
        if self._place == "batch":  # as at the end of the batch before
            progress = loops["epoch_loop.batch_progress"]
            for counts in (progress["total"], progress["current"]):
                counts["ready"] -= 1
                counts["completed"] -= 1
            progress["is_last_batch"] = False
            loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
            for loader in loops["state_dict"]["combined_loader"]:
                loader["batches"] -= 1
        elif self._place == "validation":  # as in the first batch of it, from which Lightning goes back to its start
            counts = self._validated
            begun = {"ready": counts["ready"] + 1, "started": counts["started"] + 1}
            loops["epoch_loop.val_loop.batch_progress"] = {
                "total": {**counts, **begun},
                "current": dict.fromkeys(counts, 0),
                "is_last_batch": False,
            }

    # ----- means over an epoch -----------------------------------------------------------------------------------

    def _sums_so_far(self, trainer: Trainer) -> dict[str, dict[str, Any]]:
        """Sum and count behind every mean over the epoch so far, of all ranks where Lightning would reduce it."""
        sums = dict(self._sums)  # resumed, and told to end again before a batch was over
        for key, metric in trainer.fit_loop.epoch_loop._results.items():
            if metric.is_tensor and metric.meta.on_epoch and metric.meta.is_mean_reduction and not metric.has_reset:
                sums[key] = {
                    "name": metric.meta.forked_name(False),
                    "sum": metric.meta.sync(metric.value.clone()).cpu(),
                    "count": metric.meta.sync(metric.cumulated_batch_size.clone()).cpu(),
                }
        return sums

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Adds what the epoch had before it was resumed, as soon as its first batch is counted."""
        for key, metric in trainer.fit_loop.epoch_loop._results.items():
            if key in self._sums and not metric.has_reset:
                earlier = self._sums.pop(key)
                metric.value = metric.value + earlier["sum"].to(metric.value.device)
                metric.cumulated_batch_size = metric.cumulated_batch_size + earlier["count"].to(metric.value.device)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs means to which no batch was added: the epoch was resumed in its validation."""
        for earlier in self._sums.values():
            mean = earlier["sum"] / earlier["count"]
            pl_module.log(earlier["name"], mean.to(pl_module.device), sync_dist=True)
        self._sums = {}

    # ----- the end of an epoch ------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._forget(trainer)  # not called where an epoch goes on

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._forget(trainer)

    def _forget(self, trainer: Trainer) -> None:
        """Deletes the checkpoint of an epoch that is over, at whose end another one was saved."""
        if trainer.is_global_zero:
            self.path.unlink(missing_ok=True)
