"""The Lightning trainer that the ``trainer`` config describes, and what every run needs around it."""

import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, RichProgressBar
from pytorch_lightning.loggers import Logger

from mrgen.callbacks.console import EpochLine
from mrgen.launch.instantiate import instantiate, plain

__all__ = ["Checkpoint", "build_trainer", "channels_last", "choose_precision"]


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


def quiet() -> None:
    """Silences what Lightning says in every run and no user can act on."""
    import logging
    import warnings

    for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for part in (
        "isinstance.treespec, LeafSpec",
        "does not have many workers",
        "smaller than the logging interval",
        "exists and is not empty",
        "srun. command is available",
        "It is recommended to use .self.log.'val/",  # SubjectMeans has added up the ranks already
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
    """A Lightning trainer from the ``trainer`` config; its keys are Lightning's own."""
    quiet()
    settings = plain(conf)
    settings["precision"] = choose_precision(settings.get("precision", "auto"), settings.get("accelerator", "auto"))
    if sys.stdout.isatty():
        callbacks = [*callbacks, RichProgressBar(leave=False)]
    elif settings.get("enable_progress_bar", True):  # a log file: one line an epoch instead of a moving bar
        settings["enable_progress_bar"] = False
        callbacks = [*callbacks, EpochLine()]
    return instantiate(
        {"_target_": "pytorch_lightning.Trainer", **settings},
        default_root_dir=str(run_dir),
        callbacks=callbacks,
        logger=loggers or False,
        use_distributed_sampler=False,  # ours know their rank
        enable_model_summary=False,
    )


class Checkpoint(ModelCheckpoint):
    """Lightning's, which forgets the best score when the run's folder is reached by another path than before."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def moved(path: str) -> str:
            return str(Path(self.dirpath or "") / Path(path).name) if path else path

        state_dict = dict(state_dict, dirpath=self.dirpath)
        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            state_dict[key] = moved(state_dict[key])
        state_dict["best_k_models"] = {moved(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(state_dict)
