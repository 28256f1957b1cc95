"""Finished runs, read back: the model as it was trained, its data config and its split."""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from pytorch_lightning import LightningModule
from torch import nn

from mrgen.callbacks.provenance import KEY
from mrgen.data.crops import Box, surrounding_box
from mrgen.data.guides import Guide, load_guides
from mrgen.data.normalisation import Normalisation
from mrgen.data.slices import SiteSlices
from mrgen.data.splits import Split
from mrgen.errors import UserError
from mrgen.evaluation.inference import WholeSynthesizer
from mrgen.files import read_json, read_metrics
from mrgen.launch.build import MODELS, NORMALISATIONS, SAMPLINGS, build
from mrgen.launch.checkpoints import check_description, load_weights, read_checkpoint
from mrgen.launch.configs import read_config
from mrgen.launch.fitting import DESCRIPTION, ESTIMATOR, file_sum
from mrgen.launch.instantiate import plain
from mrgen.launch.status import METRICS, read_status, seen_status
from mrgen.launch.trainer import channels_last
from mrgen.papers.brain_clustering.estimator import Estimator
from mrgen.protocols import Synthesizer

__all__ = ["Run", "load_run"]

REMEDY = "put back a copy that is whole, give another checkpoint of the run, or train anew"


@dataclass(frozen=True)
class Run:
    """One run folder.

    Attributes:
        path: the folder.
        checkpoint: the file that was loaded; of an estimator the table of its artefact.
        model: the trained module, in eval mode, its parameters frozen; or a fitted estimator.
        description: what the checkpoint says of model and data.
        conf: the resolved config.
        split: who was trained on.
    """

    path: Path
    checkpoint: Path
    model: Any
    description: dict[str, Any]
    conf: DictConfig
    split: Split

    @property
    def _sampling(self) -> str:
        """What the network was trained to see, where its answer depends on that.

        It does not where it answers the same in patches (a ``reach``, and no norms over the sample), where the method
        tests on whole brains whatever it saw, and without a network.
        """
        free = getattr(self.model, "sees_whole", False) or getattr(self.model, "reach", None) is not None
        return "" if free or not isinstance(self.model, nn.Module) else str(self.conf.data.sampling._target_)

    @property
    def tile(self) -> list[int] | None:
        """Voxels along x, y, z of the patches that the network is to see, 0 for a whole axis; None for whole brains."""
        if self._sampling.endswith((".AxialSlice", ".SiteSlices")):
            return [0, 0, 1]
        return plain(self.conf.data.sampling.size) if self._sampling.endswith(".RandomPatch") else None

    @property
    def slices(self) -> SiteSlices | None:
        """How the network was shown the slices of a site; None where it was shown something else."""
        if not self._sampling.endswith(".SiteSlices"):
            return None
        return build(self.conf.data.sampling, SAMPLINGS, where=self.path / "config.yaml")

    @property
    def normalisation(self) -> Normalisation:
        """Of its training."""
        return build(self.description["data"]["normalisation"], NORMALISATIONS, where=self.checkpoint)

    @property
    def guides(self) -> dict[str, Guide]:
        """What the model needs beside labels, as training knew it. Raises UserError where it is gone."""
        return load_guides(getattr(self.model, "guides", ()), self.path)

    def view(self, brain_box: Sequence[Sequence[int]], shape: Sequence[int], site: str | None) -> Box:
        """What a network is to see of a subject: (start, stop) of x, y, z.

        Its slices as they were cut in training, or a box around the brain, as large as in training where that was a
        box, and larger where the brain is.

        Args:
            brain_box: around the brain.
            shape: (X, Y, Z) of the volume.
            site: where it was scanned.
        """
        if (slices := self.slices) is not None:
            return slices.box(shape, site)
        boxed = self._sampling.endswith(".BrainBox")
        if boxed and not self.description["data"].get("box"):
            raise UserError(
                f"{self.checkpoint}: found no data.box in its description, expected that of a training by BrainBox; "
                f"{REMEDY}"
            )
        grid = getattr(self.model, "grid", None)
        divisor = int(getattr(self.model, "divisor", 1) if grid is None else grid)
        return surrounding_box(brain_box, self.description["data"]["box"] if boxed else (0, 0, 0), divisor)

    def intensity_scale(self, modality: str) -> tuple[float, float]:
        """(offset, factor) from values of a sequence to intensities. Raises UserError where they are not told."""
        known = self.description["data"].get("intensity_scale", {})
        if modality not in known:
            raise UserError(
                f"{self.checkpoint}: found no data.intensity_scale of {modality} in its description, expected an "
                f"offset and a factor; {REMEDY}"
            )
        offset, factor = known[modality]
        return offset, factor

    def synthesizer(self) -> Synthesizer:
        """The model as it is given whole volumes: networks see what they were trained to see, estimators the volume."""
        network = isinstance(self.model, nn.Module)
        return WholeSynthesizer(self.model, self.tile) if network else self.model

    def digest(self) -> str:
        """SHA-256 of the checkpoint, or of all files of an estimator's artefact."""
        files = [self.checkpoint] if isinstance(self.model, nn.Module) else sorted(self.checkpoint.parent.iterdir())
        digest = hashlib.sha256()
        for path in files:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def check_finished(self, key: str, asked: Any) -> None:
        """Raises UserError for the folder of a run that has not ended; its checkpoint's file is taken as it is.

        Args:
            key: the setting that named the run.
            asked: its value.
        """
        state = read_status(self.path).get("state")
        if state != "finished" and self.path == Path(str(asked)).expanduser().absolute():
            raise UserError(
                f"{key}={asked}: {self.conf.name} is {state or 'of unknown state'} and not finished; go on with it "
                f"(mrgen-train resume={asked}), or give the checkpoint's file to generate from it as it is"
            )

    def check_scale(self) -> None:
        """Raises UserError where a synthesis is on another scale than the run's data.

        Its intensities could not be told then, and a segmenter of such data would be misled without a word.
        """
        made, known = getattr(self.model, "scale", None), self.normalisation
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
        as_asked = build({**self.description["model"], **asked}, MODELS, where=self.checkpoint)
        if asked.get("mc_samples") and not as_asked.mc_samples:
            raise UserError(f"{said}: {self.conf.name} was trained without dropout; leave it out")
        for key in asked:
            setattr(self.model, key, getattr(as_asked, key))


def load_run(path: str | Path) -> Run:
    """Loads a run.

    Args:
        path: a run folder (its best checkpoint is taken, or the last where the run had no validation; or its
            estimator), or one of these files inside one.

    Raises:
        UserError: nothing there, a run that never saved, or a file that is no checkpoint of mrgen.
    """
    path = Path(str(path)).expanduser().absolute()  # Hydra reads a folder called 7 as a number
    if path.is_dir():
        folder = path
        candidates = [path / "checkpoints" / "best.ckpt", path / "checkpoints" / "last.ckpt", path / ESTIMATOR]
        checkpoint = next((file for file in candidates if os.path.lexists(file)), None)
        if checkpoint is None:
            status = seen_status(path)
            reason = f": {status['reason']}" if "reason" in status else ""
            said = f"its status is {status['state']}{reason}" if status else "it is no run folder"
            raise UserError(f"{path}: no checkpoints/best.ckpt or last.ckpt and no {ESTIMATOR}; {said}")
    elif path.is_file():
        checkpoint, folder = path, path.parent.parent
    else:
        raise UserError(f"{path}: no such run folder or checkpoint")
    for needed in ("config.yaml", "split.json"):
        if not (folder / needed).is_file():
            raise UserError(
                f"{folder}: no {needed}; expected the folder that mrgen-train wrote around {checkpoint.name}"
            )
    conf, split = read_config(folder / "config.yaml"), Split.load(folder / "split.json")
    if path == folder and checkpoint.name == "last.ckpt" and _chose_best(conf, folder):
        raise UserError(
            f"{folder}: no checkpoints/best.ckpt, which the run's validation chose; put back a copy, or name the last "
            f"one: {checkpoint}"
        )
    model, description = (_load_estimator if checkpoint.name == ESTIMATOR.name else _load_network)(checkpoint, folder)
    return Run(folder, checkpoint, model, description, conf, split)


def _chose_best(conf: DictConfig, folder: Path) -> bool:
    """Whether a run has finished in which a validation chose a checkpoint: its monitor had a value."""
    monitor = conf.get("monitor")
    if not monitor or seen_status(folder).get("state") != "finished":
        return False
    cells = [row.get(monitor) for row in read_metrics(folder / METRICS)]
    return any(cell and math.isfinite(float(cell)) for cell in cells)


def _load_network(checkpoint: Path, folder: Path) -> tuple[Any, dict[str, Any]]:
    content = read_checkpoint(checkpoint, remedy=REMEDY)
    description, weights = content[KEY], content["state_dict"]
    model = build(description["model"], MODELS, where=checkpoint)
    if not isinstance(model, LightningModule):
        raise UserError(f"{checkpoint}: found {type(model).__name__} in it, expected a network; {REMEDY}")
    try:
        load_weights(model, weights)
    except RuntimeError as error:  # of another version of the network
        said = " ".join(str(error).split())[:300]
        raise UserError(
            f"{checkpoint}: its weights do not fit the model that it describes ({said}); {REMEDY}"
        ) from error
    channels_last(model).eval().requires_grad_(False)
    return model, description


def _load_estimator(artefact: Path, folder: Path) -> tuple[Any, dict[str, Any]]:
    path = folder / DESCRIPTION
    expected, remedy = f"what mrgen-train wrote beside {artefact}", "put back a copy that is whole, or fit anew"
    description = read_json(path, expected=expected, remedy=remedy)
    check_description(description, path, remedy=remedy)
    _check_sums(description.get("artefact", {}), artefact.parent, path, remedy)
    estimator = build(description["model"], MODELS, where=path)
    if not isinstance(estimator, Estimator):
        raise UserError(
            f"{path}: found {type(estimator).__name__} in it, expected a method without a network; {remedy}"
        )
    table = read_json(artefact, expected=f"a fitted {type(estimator).__name__}", remedy=remedy)
    settings = table.get("settings") if isinstance(table, dict) else None
    if not _same(settings, estimator.settings()):
        raise UserError(
            f"{artefact}: found settings of {settings!r:.200}, expected those of {path}, "
            f"{estimator.settings()!r:.200}; {remedy}"
        )
    return type(estimator).load(artefact.parent), description


def _same(some: Any, others: Any) -> bool:
    """Whether they are written alike, 5 and 5.0 or 1 and true are not."""
    return json.dumps(some, sort_keys=True) == json.dumps(others, sort_keys=True)


def _check_sums(sums: Any, folder: Path, path: Path, remedy: str) -> None:
    """Raises UserError where a file of an artefact is not the one that was written; older descriptions name none."""
    if not isinstance(sums, dict):
        raise UserError(f"{path}: found an artefact of {sums!r:.60}, expected sums of its files; {remedy}")
    for name, digest in sums.items():
        try:
            same = file_sum(folder / Path(name).name) == digest
        except OSError as error:
            raise UserError(f"{folder / name}: cannot be read ({error.strerror}); {remedy}") from None
        if not same:
            raise UserError(
                f"{folder}: found another {name!r} than the one that {path.name} has the SHA-256 of; {remedy}"
            )
