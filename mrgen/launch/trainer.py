"""The Lightning trainer that the ``trainer`` config describes, and what every run needs around it."""

import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.errors import InstantiationException
from lightning_fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, RichProgressBar, Timer
from pytorch_lightning.loggers import Logger

from mrgen.callbacks.compiling import CompileNetworks
from mrgen.callbacks.console import EpochLine
from mrgen.callbacks.early_stopping import check_logged
from mrgen.callbacks.overfitting import SameBatches
from mrgen.errors import UserError
from mrgen.launch.checkpoints import WholeCheckpoints
from mrgen.launch.cluster.slurm import cluster_environment
from mrgen.launch.instantiate import instantiate, plain

__all__ = ["FAST", "Checkpoint", "build_trainer", "channels_last", "check_epochs", "choose_precision", "why_stopped"]

FAST = "trainer.fast_dev_run"  # why a run ended that was only tried


def choose_precision(asked: str, accelerator: str) -> str:
    """``auto`` becomes bf16-mixed where the GPU or the processor computes in bf16, 32-true elsewhere."""
    if asked != "auto":
        return asked
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    # Processors without AVX512-BF16 or AMX emulate bf16 and are slower with it.
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    native = native or getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    return "bf16-mixed" if native else "32-true"


def check_epochs(epochs: Any) -> None:
    """Raises UserError for a ``trainer.max_epochs`` that is no number of epochs; null and -1 are without an end."""
    if epochs is not None and (
        not isinstance(epochs, int) or isinstance(epochs, bool) or (epochs < 1 and epochs != -1)
    ):
        raise UserError(
            f"trainer.max_epochs is {epochs}; expected a whole number from 1 on, or null for a training without an end"
        )


def quiet() -> None:
    """Silences what Lightning says in every run and no user can act on."""
    import logging
    import warnings

    for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for part in (
        "isinstance.treespec, LeafSpec",
        "does not have many workers",
        "smaller than the logging interval",
        "exists and is not empty",
        "srun. command is available",
        "It is recommended to use .self.log.'val/",  # SubjectMeans has added up the ranks already
        "find_unused_parameters=True was specified",  # of methods in which all are used
        "callbacks used to create the checkpoint need",  # those that may be left out when a run goes on
        "Grad strides do not match bucket view strides",  # of kernels with one voxel
    ):
        warnings.filterwarnings("ignore", f".*{part}.*")


def channels_last(model: pl.LightningModule) -> pl.LightningModule:
    """Lays convolutions out channels last, which about halves the backward pass in bf16 on a processor."""
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    for weight in model.parameters():
        if weight.ndim in layouts:
            weight.data = weight.data.to(memory_format=layouts[weight.ndim])
    return model


def build_trainer(conf: DictConfig, run_dir: Path, *, callbacks: list[Callback], loggers: list[Logger]) -> pl.Trainer:
    """A Lightning trainer from the ``trainer`` config; its keys are Lightning's own, and ``compile``.

    Raises:
        UserError: a key that Lightning does not have, or a device, strategy, precision or duration that is not there.
    """
    quiet()
    settings = plain(conf)
    callbacks = [*callbacks, *_asked_for(settings)]
    accelerator = settings.get("accelerator", "auto")
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(
            f"trainer.accelerator is {accelerator}, and PyTorch found no GPU on this machine; leave it (and "
            "trainer=gpu) out, or install drivers and a PyTorch for GPUs"
        )
    settings["precision"] = choose_precision(settings.get("precision", "auto"), accelerator)
    if sys.stdout.isatty():
        callbacks = [*callbacks, RichProgressBar(leave=False)]
    elif settings.get("enable_progress_bar", True):  # a log file: one line an epoch instead of a moving bar
        settings["enable_progress_bar"] = False
        callbacks = [*callbacks, EpochLine()]
    try:
        return instantiate(
            {"_target_": "pytorch_lightning.Trainer", **settings},
            default_root_dir=str(run_dir),
            callbacks=callbacks,
            logger=loggers or False,
            use_distributed_sampler=False,  # ours know their rank
            plugins=[WholeCheckpoints(), *cluster_environment()],
            enable_model_summary=False,
        )
    except InstantiationException as error:
        if isinstance(error.__cause__, MisconfigurationException):
            asked = ", ".join(f"{key}={settings.get(key)}" for key in ("accelerator", "devices", "strategy"))
            raise UserError(f"the trainer of {asked}, …: {error.__cause__}") from error
        raise


def _asked_for(settings: dict[str, Any]) -> list[Callback]:
    """Takes from the settings what Lightning does not know, or does otherwise, and gives callbacks that do it."""
    callbacks: list[Callback] = []
    compiled = settings.pop("compile", False)
    if not isinstance(compiled, bool):
        raise UserError(f"trainer.compile is {compiled!r}; expected true or false")
    if compiled:
        callbacks.append(CompileNetworks())
    if batches := settings.pop("overfit_batches", 0):  # Lightning's would replace the samplers
        settings["limit_train_batches"] = batches
        callbacks.append(SameBatches())
    if (duration := settings.pop("max_time", None)) is not None:
        # After the last batch in time, as Lightning would have it, the rest of the epoch could never be trained on.
        try:
            callbacks.append(timer := Timer(duration, interval="epoch", verbose=False))
        except (MisconfigurationException, TypeError, AttributeError) as error:
            raise UserError(f"trainer.max_time is {duration!r}; expected DD:HH:MM:SS, such as 00:12:00:00") from error
        if not timer.time_remaining():
            raise UserError(f"trainer.max_time is {duration!r}; expected more than no time, or null for no limit")
    return callbacks


def why_stopped(trainer: Any) -> str | None:
    """Why a training that ended well did so before its last epoch; None where it did not."""
    if trainer.fast_dev_run:
        return f"{FAST}: one batch, and no checkpoint"
    if not trainer.should_stop or trainer.current_epoch == trainer.max_epochs:
        return None
    for callback in trainer.callbacks:
        if isinstance(callback, Timer) and (remaining := callback.time_remaining()) is not None and remaining <= 0:
            return f"trainer.max_time: {round(callback.time_elapsed())} s"
    return next((why for callback in trainer.callbacks if (why := getattr(callback, "stopped", None))), None)


class Checkpoint(ModelCheckpoint):
    """Lightning's, which forgets the best score when the run's folder is reached by another path than before.

    A monitor that is not logged is refused before the first batch, and not after the first epoch. A value of it that is
    not finite is never the best.
    """

    def check_monitor_top_k(self, trainer: pl.Trainer, current: torch.Tensor | None = None) -> bool:
        if current is not None and not bool(torch.isfinite(current)):
            return False
        return super().check_monitor_top_k(trainer, current)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.monitor is not None:
            check_logged(self.monitor, pl_module)
        super().setup(trainer, pl_module, stage)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def moved(path: Any) -> str:
            if path == "":
                return path
            if not isinstance(path, str) or Path(path).name != f"{self.filename}.ckpt":  # Lightning would remove it
                raise UserError(f"a checkpoint names {path!r:.80} as one; expected {self.filename}.ckpt; train anew")
            return str(Path(self.dirpath or "") / Path(path).name)

        state_dict = dict(state_dict, dirpath=self.dirpath)
        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            state_dict[key] = moved(state_dict[key])
        state_dict["best_k_models"] = {moved(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(state_dict)
