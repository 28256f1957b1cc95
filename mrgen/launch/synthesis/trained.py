"""A trained method, as its checkpoint describes it: from a subject's scans to the bytes of its files."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from mrgen import __version__
from mrgen.data.checks import check_subject, grouped
from mrgen.data.cohorts import Layout, SubjectFiles
from mrgen.data.crops import Box
from mrgen.data.nifti import nifti_header
from mrgen.data.normalisation import measured_statistics
from mrgen.data.reading import files_of
from mrgen.data.store import bounding_box, settings_digest, stored_type
from mrgen.data.stored_subject import to_orientation
from mrgen.data.synthetic_files import nifti_bytes
from mrgen.errors import UserError
from mrgen.evaluation.inference import WholeSegmenter, WholeSynthesizer
from mrgen.launch.instantiate import plain
from mrgen.launch.runs import Run
from mrgen.launch.trainer import choose_precision
from mrgen.launch.training import checked_seed
from mrgen.protocols import Synthesis, Synthesizer

__all__ = ["Made", "Scans", "TrainedMethod", "choose_device", "inference_precision"]

SEGMENTATION = "segmentation"


@dataclass(frozen=True)
class Scans:
    """What the network and the files need of one subject. Arrays are canonical (RAS+).

    Attributes:
        id: the subject's.
        volumes: (1, 1, X, Y, Z) float32 for each source, normalised.
        brain: (X, Y, Z) bool.
        box: what the network sees, around the brain or of whole slices.
        affine: 4×4, the files' own voxels to RAS+ world.
        header: of the first source, None where it is no NIfTI.
        notes: lines on what the headers left open or had wrong.
    """

    id: str
    volumes: dict[str, Tensor]
    brain: np.ndarray
    box: Box
    affine: np.ndarray
    header: Any
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Made:
    """What a method makes of one subject's scans, canonical and on the processor.

    Attributes:
        synthesis: (1, 1, X, Y, Z) in the network's scale; None of a method that finds lesions alone.
        lesions: (X, Y, Z) uint8, 0 and 1; None of a method that writes none.
    """

    synthesis: Synthesis | None
    lesions: np.ndarray | None


class TrainedMethod:
    """The network, and all that the checkpoint says of its input and output.

    Args:
        run: loaded.
        conf: ``checkpoint``, ``mc_samples``, ``mc_batch``, ``precision``, ``device`` and ``seed`` of
            ``conf/synthesize.yaml``.

    Attributes:
        name: of the run.
        layout: of the cohort that it was trained on.
        sources: the sequences that it needs.
        makes: the sequence that it synthesises, ``segmentation``, or both.
        images: names of the images that it may write: ``t2_synthetic``, ``t2_variance``, ``segmentation``.

    Raises:
        UserError: a run that makes neither or is not trained far enough, or a setting that it cannot follow.
    """

    def __init__(self, run: Run, conf: DictConfig):
        model = run.model
        synthesizes, segments = isinstance(model, Synthesizer), getattr(model, "writes_segmentation", False)
        if not synthesizes and not segments:
            raise UserError(
                f"checkpoint={conf.checkpoint} is a {type(model).__name__}, which synthesises nothing; "
                "give a run of a synthesizer such as RS-Net"
            )
        self.name, self.layout = str(run.conf.name), Layout.from_conf(plain(run.conf.data.layout))
        self.sources = tuple(model.sources)
        self.makes: tuple[str, ...] = ()
        self.images: tuple[str, ...] = ()
        if synthesizes:
            run.check_scale()
            target = model.targets[0]
            self.makes, self.images = (target,), (f"{target}_synthetic", f"{target}_variance")
            self._offset, self._factor = run.intensity_scale(target)
        if segments:
            if hasattr(model, "check_trained"):  # in several stages
                model.check_trained()
            self.makes, self.images = (*self.makes, SEGMENTATION), (*self.images, SEGMENTATION)
        run.draw_samples(mc_samples=conf.mc_samples, mc_batch=conf.mc_batch)
        self._normalisation, self._view, self._slices = run.normalisation, run.view, run.slices
        self._mc_samples, self._seed = getattr(model, "mc_samples", None), checked_seed(conf.seed)
        self._checkpoint = run.checkpoint
        self._digest = run.digest()

        self._device = choose_device(conf.device)
        self._asked_precision, self._precision = conf.precision, inference_precision(conf.precision, self._device)
        self._synthesizer = run.synthesizer() if synthesizes else None
        self._segmenter = WholeSegmenter(model, run.tile) if segments else None
        if isinstance(model, nn.Module):
            model.to(self._device)

    def made_from(self, subject: SubjectFiles, layout: Layout) -> dict[str, Any]:
        """What decides a subject's files, in plain containers; its scans are not read.

        Raises:
            UserError: a scan is gone.
        """
        try:
            stats = {
                name + " voxels" * i: (part.name, part.stat())
                for name, path in subject.images.items()
                for i, part in enumerate(files_of(path))
            }
        except OSError as error:
            raise UserError(
                f"{subject.id}: cannot be read ({error.filename}: {error.strerror}), expected an image; restore it"
            ) from error
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
            header = nifti_header(subject.images[self.sources[0]])
        except OSError as error:
            raise UserError(f"{subject.id}: cannot be read ({error.strerror or error}); restore its scans") from error
        image = stored_type(np.stack([loaded.volumes[name] for name in self.sources]))  # (C, X, Y, Z)
        try:
            measured = [
                measured_statistics(self._normalisation, volume, loaded.brain, name, subject.site)
                for name, volume in zip(self.sources, image, strict=True)
            ]
        except UserError as error:  # whose advice is for trainings
            found = str(error).partition(";")[0]
            raise UserError(f"{subject.id}, {found}; expected intensities as in {self.layout.title}") from error
        normalised = self._normalisation(torch.from_numpy(image), torch.from_numpy(loaded.brain), measured)
        volumes = {name: normalised[None, i : i + 1] for i, name in enumerate(self.sources)}
        brain_box = bounding_box(loaded.brain)
        # Norms take their statistics from what they see, so it is as much as in training; more for a larger brain.
        box = self._view(brain_box, loaded.brain.shape, subject.site)
        return Scans(
            subject.id, volumes, loaded.brain, box, loaded.original_affine, header, tuple(grouped(loaded.notes))
        )

    def make(self, scans: Scans) -> Made:
        """What the method makes of a subject's scans.

        Raises:
            UserError: it does not fit into the device's memory, or is not finite.
        """
        synthesis, found = None, None
        torch.manual_seed(zlib.crc32(f"{self._seed} {scans.id}".encode()))  # the same whoever came before
        volumes = {name: volume.to(self._device) for name, volume in scans.volumes.items()}
        try:
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._precision == "bf16-mixed"):
                if isinstance(self._synthesizer, WholeSynthesizer):
                    synthesis = self._synthesizer.synthesize(volumes, scans.box)
                elif self._synthesizer is not None:
                    synthesis = self._synthesizer.synthesize(volumes)
                if self._segmenter is not None:
                    found = self._segmenter.segment(volumes, scans.box)
        except UserError as error:  # of an estimator: a scan that nothing can be made from
            raise UserError(f"{scans.id}: {error}") from error
        except torch.OutOfMemoryError as error:
            raise UserError(f"{scans.id}: {self._device} lacks the memory; free some, or use device=cpu") from error
        numbers = [*([synthesis.mean] if synthesis else []), *([found.probabilities] if found else [])]
        if not all(torch.isfinite(each).all() for each in numbers):
            raise UserError(
                f"{scans.id}: the network made NaN or infinite voxels with precision={self._precision}; "
                "try precision=32-true, then another checkpoint"
            )
        if synthesis is not None:
            variance = None if synthesis.variance is None else synthesis.variance.cpu()
            synthesis = Synthesis(synthesis.mean.cpu(), variance, synthesis.scale)
        return Made(synthesis, None if found is None else self._lesions(found.labels))

    def _lesions(self, labels: Tensor) -> np.ndarray:
        """(1, X, Y, Z) class numbers to (X, Y, Z) uint8, without lesions in the outermost slices as in evaluation."""
        lesions = (labels[0] > 0).cpu().numpy().astype(np.uint8)
        if self._slices is not None:
            tested = self._slices.tested(lesions.shape)
            lesions[..., : tested.start] = lesions[..., tested.stop :] = 0
        return lesions

    def files(self, scans: Scans, made: Made) -> tuple[dict[str, bytes], dict[str, Any]]:
        """What is to be written: NIfTI files by name, and the record.

        Intensities are those of the training cohort's target. Where the normalisation leaves 0 outside the brain, so
        does the synthesis; else it shows, not below 0, all that the network saw.
        """

        def nifti(volume: np.ndarray, what: str) -> bytes:
            title = f"mrgen {__version__}: {what}"
            return nifti_bytes(to_orientation(volume, scans.affine), scans.affine, title, scans.header)

        def in_intensities(values: Tensor, offset: float, factor: float) -> np.ndarray:
            with np.errstate(over="ignore", invalid="ignore"):  # which is looked at here
                volume = np.float32(offset) + np.float32(factor) * values[0, 0].float().numpy()
            if not np.isfinite(volume).all():
                raise UserError(
                    f"{scans.id}: intensities of {offset} + {factor} · the network's values are beyond what a file "
                    "holds; put back a checkpoint that is whole"
                )
            shown = scans.brain
            if self._normalisation.outside is None:
                shown, volume = _within(scans.box, volume.shape), np.maximum(volume, 0)
            return np.where(shown, volume, 0).astype(np.float32)

        images: dict[str, bytes] = {}
        record: dict[str, Any] = {"mrgen": __version__, "checkpoint": str(self._checkpoint)}
        if made.synthesis is not None:
            target = self.makes[0]
            mean = in_intensities(made.synthesis.mean, self._offset, self._factor)
            images[f"{target}_synthetic"] = nifti(mean, f"synthetic {target}")
            if made.synthesis.variance is not None:
                variance = in_intensities(made.synthesis.variance, 0, self._factor * self._factor)
                images[f"{target}_variance"] = nifti(variance, f"synthetic {target}, variance")
            scale = {"offset": self._offset, "factor": self._factor}
            record |= {"target": target, "intensity_scale": scale}
        if made.lesions is not None:
            images[SEGMENTATION] = nifti(made.lesions, SEGMENTATION)
        record |= {
            "precision": self._precision,
            "box": scans.box,
            # Memory was too short for one pass.
            "in_tiles": any(getattr(whole, "tiled", False) for whole in (self._synthesizer, self._segmenter)),
        }
        return images, record


def _within(box: Box, shape: Sequence[int]) -> np.ndarray:
    """(X, Y, Z) bool: where a box reaches, which may exceed the volume."""
    within = np.zeros(shape, bool)
    within[tuple(slice(max(start, 0), max(stop, 0)) for start, stop in box)] = True
    return within


def choose_device(asked: str) -> torch.device:
    """``auto`` is the GPU if there is one. Raises UserError for what is no device or not there."""
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


def inference_precision(asked: str, device: torch.device) -> str:
    """``bf16-mixed`` or ``32-true``, see ``choose_precision``. Raises UserError for any other."""
    precision = choose_precision(asked, device.type)
    if precision not in ("bf16-mixed", "32-true"):
        raise UserError(f"precision is {asked}; expected auto, bf16-mixed or 32-true")
    return precision
