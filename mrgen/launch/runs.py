"""Finished runs, read back: the model as it was trained, its data config and its split."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import LightningModule

from mrgen.callbacks.provenance import KEY
from mrgen.data.splits import Split
from mrgen.errors import UserError
from mrgen.launch.instantiate import instantiate_mrgen, plain
from mrgen.launch.status import read_status
from mrgen.launch.training import channels_last

__all__ = ["Run", "load_run"]


@dataclass(frozen=True)
class Run:
    """One run folder.

    Attributes:
        path: the folder.
        checkpoint: the file that was loaded.
        model: the trained module, in eval mode, its parameters frozen.
        description: what the checkpoint says of model and data.
        conf: the resolved config.
        split: who was trained on.
    """

    path: Path
    checkpoint: Path
    model: LightningModule
    description: dict[str, Any]
    conf: DictConfig
    split: Split

    @property
    def tile(self) -> list[int] | None:
        """Voxels along x, y, z of the patches that the run was trained on, None where it saw whole brains."""
        sampling = plain(self.conf.data.sampling)
        return sampling["size"] if sampling["_target_"] == "mrgen.data.crops.RandomPatch" else None

    def check_scale(self) -> None:
        """Raises UserError where a synthesis is on another scale than the run's data.

        Its intensities could not be told then, and a segmenter of such data would be misled without a word.
        """
        made, known = getattr(self.model, "scale", None), instantiate_mrgen(self.description["data"]["normalisation"])
        if made != known.scale:
            raise UserError(
                f"{self.conf.name} makes values on the scale {made!r} and was trained on data on the scale "
                f"{known.scale!r}; its intensities cannot be told from the checkpoint"
            )

    def draw_samples(self, *, mc_samples: int | None = None, mc_batch: int | None = None) -> None:
        """Other Monte Carlo samples than the checkpoint's, as far as the model's constructor would take them.

        Args:
            mc_samples, mc_batch: of the model; None leaves its own.

        Raises:
            UserError: the model draws none, or refuses the number.
        """
        asked = {key: n for key, n in (("mc_samples", mc_samples), ("mc_batch", mc_batch)) if n is not None}
        if not asked:
            return
        said = ", ".join(f"{key}={n}" for key, n in asked.items())
        if lacking := [key for key in asked if not hasattr(self.model, key)]:
            raise UserError(f"{said}: {self.conf.name} has no {lacking[0]} and draws no samples; leave it out")
        as_asked = instantiate_mrgen({**self.description["model"], **asked})
        if asked.get("mc_samples") and not as_asked.mc_samples:
            raise UserError(f"{said}: {self.conf.name} was trained without dropout; leave it out")
        for key in asked:
            setattr(self.model, key, getattr(as_asked, key))


def load_run(path: str | Path) -> Run:
    """Loads a run.

    Args:
        path: a run folder (its best checkpoint is taken, or the last where the run had no validation) or a checkpoint
            file inside one.

    Raises:
        UserError: nothing there, a run that never saved, or a file that is no checkpoint of mrgen.
    """
    path = Path(str(path)).expanduser().absolute()  # Hydra reads a folder called 7 as a number
    if path.is_dir():
        folder, candidates = path, [path / "checkpoints" / f"{name}.ckpt" for name in ("best", "last")]
        checkpoint = next((file for file in candidates if file.is_file()), None)
        if checkpoint is None:
            status = read_status(path)
            reason = f": {status['reason']}" if "reason" in status else ""
            said = f"its status is {status['state']}{reason}" if status else "it is no run folder"
            raise UserError(f"{path}: no checkpoints/best.ckpt or last.ckpt; {said}")
    elif path.is_file():
        checkpoint, folder = path, path.parents[1]
    else:
        raise UserError(f"{path}: no such run folder or checkpoint")
    for needed in ("config.yaml", "split.json"):
        if not (folder / needed).is_file():
            raise UserError(
                f"{folder}: no {needed}; expected the folder that mrgen-train wrote around {checkpoint.name}"
            )
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
        description, weights = content[KEY], content["state_dict"]
        built, _ = description["model"], description["data"]
    except Exception as error:  # corrupt, truncated, foreign, or holding more than plain containers
        raise UserError(f"{checkpoint}: cannot be read as a checkpoint of mrgen ({type(error).__name__})") from error
    model = instantiate_mrgen(built)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # of another version of the network
        raise UserError(f"{checkpoint}: its weights do not fit the model that it describes ({error})") from error
    channels_last(model).eval().requires_grad_(False)
    conf = OmegaConf.load(folder / "config.yaml")
    assert isinstance(conf, DictConfig)
    return Run(folder, checkpoint, model, description, conf, Split.load(folder / "split.json"))
