"""A trained synthesizer, as its checkpoint describes it: from a subject's scans to the bytes of its files."""

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from mrgen import __version__
from mrgen.data.checks import check_subject
from mrgen.data.cohorts import Layout, SubjectFiles
from mrgen.data.crops import Box, surrounding_box
from mrgen.data.store import bounding_box, settings_digest, statistics, stored_type
from mrgen.data.stored_subject import to_orientation
from mrgen.data.synthetic_files import nifti_bytes, read_header
from mrgen.errors import UserError
from mrgen.evaluation.inference import WholeSynthesizer
from mrgen.launch.instantiate import instantiate_mrgen, plain
from mrgen.launch.runs import load_run
from mrgen.launch.training import checked_seed, choose_precision
from mrgen.protocols import Synthesis, Synthesizer

__all__ = ["Scans", "TrainedSynthesizer"]


@dataclass(frozen=True)
class Scans:
    """What the network and the files need of one subject. Arrays are canonical (RAS+).

    Attributes:
        id: the subject's.
        volumes: (1, 1, X, Y, Z) float32 for each source, normalised.
        brain: (X, Y, Z) bool.
        box: around the brain, what the network sees.
        affine: 4×4, the files' own voxels to RAS+ world.
        header: of the first source, None where it is no NIfTI.
    """

    id: str
    volumes: dict[str, Tensor]
    brain: np.ndarray
    box: Box
    affine: np.ndarray
    header: Any


class TrainedSynthesizer:
    """The network, and all that the checkpoint says of its input and output.

    Args:
        conf: ``checkpoint``, ``mc_samples``, ``mc_batch``, ``precision``, ``device`` and ``seed`` of
            ``conf/synthesize.yaml``.

    Attributes:
        name: of the run.
        layout: of the cohort that it was trained on.
        sources: the sequences that it needs.
        target: the one that it makes.

    Raises:
        UserError: no such run, one that synthesises nothing, or a setting that it cannot follow.
    """

    def __init__(self, conf: DictConfig):
        run = load_run(conf.checkpoint)
        model = run.model
        if not isinstance(model, Synthesizer):
            raise UserError(
                f"checkpoint={conf.checkpoint} is a {type(model).__name__}, which synthesises nothing; "
                "give a run of a synthesizer such as RS-Net"
            )
        self.name, self.layout = str(run.conf.name), Layout.from_conf(plain(run.conf.data.layout))
        self.sources, self.target = tuple(model.sources), model.targets[0]
        run.check_scale()
        run.draw_samples(mc_samples=conf.mc_samples, mc_batch=conf.mc_batch)
        data = run.description["data"]
        self._normalisation = instantiate_mrgen(data["normalisation"])
        self._offset, self._factor = data["intensity_scale"][self.target]
        self._trained_box, self._divisor = run.box, int(getattr(run.synthesizer(), "divisor", 1))
        self._mc_samples, self._seed = getattr(model, "mc_samples", None), checked_seed(conf.seed)
        self._checkpoint = run.checkpoint
        self._digest = run.digest()

        self._device = _device(conf.device)
        self._asked_precision, self._precision = conf.precision, choose_precision(conf.precision, self._device.type)
        if self._precision not in ("bf16-mixed", "32-true"):
            raise UserError(f"precision is {conf.precision}; expected auto, bf16-mixed or 32-true")
        self._model = run.synthesizer()
        if isinstance(self._model, WholeSynthesizer):
            self._model.to(self._device)

    def made_from(self, subject: SubjectFiles, layout: Layout) -> dict[str, Any]:
        """What decides a subject's files, in plain containers; its scans are not read.

        Raises:
            UserError: a scan is gone.
        """
        try:
            stats = {name: (path.name, path.stat()) for name, path in subject.images.items()}
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be read ({error.strerror}), expected an image") from error
        return {
            "checkpoint": f"sha256:{self._digest}",
            "scans": {
                name: {"file": file, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
                for name, (file, stat) in stats.items()
            },
            "preparation": settings_digest(layout, self.sources),
            "mc_samples": self._mc_samples,
            "seed": self._seed,
            "precision": self._asked_precision,
        }

    def read(self, subject: SubjectFiles, layout: Layout) -> Scans:
        """Checks and normalises a subject's scans.

        Raises:
            UserError: one line for everything that is wrong with them.
        """
        try:
            loaded, problems = check_subject(subject, layout)
            if loaded is None:
                raise UserError("\n".join(map(str, problems)))
            header = read_header(subject.images[self.sources[0]])
        except OSError as error:
            raise UserError(f"{subject.id}: cannot be read ({error.strerror or error}); restore its scans") from error
        image = stored_type(np.stack([loaded.volumes[name] for name in self.sources]))  # (C, X, Y, Z)
        normalised = self._normalisation(
            torch.from_numpy(image),
            torch.from_numpy(loaded.brain),
            [statistics(volume, loaded.brain) for volume in image],
        )
        volumes = {name: normalised[None, i : i + 1] for i, name in enumerate(self.sources)}
        brain_box = bounding_box(loaded.brain)
        # Norms take their statistics from what they see, so it is as much as in training; more for a larger brain.
        box = surrounding_box(brain_box, self._trained_box, self._divisor)
        return Scans(subject.id, volumes, loaded.brain, box, loaded.original_affine, header)

    def synthesize(self, scans: Scans) -> Synthesis:
        """The synthesis in the network's scale, (1, 1, X, Y, Z) on the processor.

        Raises:
            UserError: it does not fit into the device's memory, or is not finite.
        """
        torch.manual_seed(zlib.crc32(f"{self._seed} {scans.id}".encode()))  # the same whoever came before
        volumes = {name: volume.to(self._device) for name, volume in scans.volumes.items()}
        try:
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._precision == "bf16-mixed"):
                if isinstance(self._model, WholeSynthesizer):
                    made = self._model.synthesize(volumes, scans.box)
                else:
                    made = self._model.synthesize(volumes)
        except UserError as error:  # of an estimator: a scan that nothing can be made from
            raise UserError(f"{scans.id}: {error}") from error
        except torch.OutOfMemoryError as error:
            raise UserError(f"{scans.id}: {self._device} lacks the memory; free some, or use device=cpu") from error
        if not torch.isfinite(made.mean).all():
            raise UserError(
                f"{scans.id}: the network made NaN or infinite voxels with precision={self._precision}; "
                "try precision=32-true, then another checkpoint"
            )
        return Synthesis(made.mean.cpu(), None if made.variance is None else made.variance.cpu(), made.scale)

    def files(self, scans: Scans, synthesis: Synthesis) -> tuple[bytes, bytes | None, dict[str, Any]]:
        """What is to be written: NIfTI files of the synthesis and of its variance, None without one, and the record.

        Intensities are those of the training cohort's target; the background is 0.
        """
        title = f"mrgen {__version__}: synthetic {self.target}"

        def nifti(values: Tensor, offset: float, factor: float, title: str) -> bytes:
            volume = np.where(scans.brain, offset + factor * values[0, 0].float().numpy(), 0).astype(np.float32)
            return nifti_bytes(to_orientation(volume, scans.affine), scans.affine, title, scans.header)

        variance = None
        if synthesis.variance is not None:
            variance = nifti(synthesis.variance, 0, self._factor**2, f"{title}, variance")
        record = {
            "mrgen": __version__,
            "checkpoint": str(self._checkpoint),
            "target": self.target,
            "intensity_scale": {"offset": self._offset, "factor": self._factor},
            "precision": self._precision,
            "box": scans.box,
            "in_tiles": getattr(self._model, "tiled", False),  # memory was too short for one pass
        }
        return nifti(synthesis.mean, self._offset, self._factor, title), variance, record


def _device(asked: str) -> torch.device:
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"device is {asked}; expected auto, cpu, cuda or cuda:0")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device is {asked}; {torch.cuda.device_count()} CUDA devices are there; try device=auto")
    return device
