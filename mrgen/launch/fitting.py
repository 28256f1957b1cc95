"""Methods without a network: learned in one pass over the training subjects, kept as an artefact."""

import errno
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning.loggers import Logger
from rich.progress import track

from mrgen.data.datamodule import CohortDataModule
from mrgen.data.store import StoredSubject
from mrgen.data.stored_subject import BRAIN, IMAGE
from mrgen.errors import UserError
from mrgen.evaluation.unit_scale import rescaled, unit_errors
from mrgen.files import open_to_read, write_json
from mrgen.papers.brain_clustering import Location, Pair
from mrgen.papers.brain_clustering.estimator import TABLE, Estimator
from mrgen.protocols import Synthesis

__all__ = ["DESCRIPTION", "ESTIMATOR", "file_sums", "fit"]

ESTIMATOR = Path("estimator") / TABLE  # below the run's folder
DESCRIPTION = "description.json"
LARGEST = 2**34  # bytes of a file of an artefact: tables, and scans that a search looks through


def check(estimator: Estimator, datamodule: CohortDataModule) -> None:
    """Raises UserError where the data cannot be what the estimator needs."""
    if missing := [name for name in (estimator.source, estimator.target) if name not in datamodule.modalities]:
        raise UserError(
            f"{type(estimator).__name__} makes {estimator.target} from {estimator.source}, and data.modalities has no "
            f"{', '.join(missing)} ({', '.join(datamodule.modalities)}); set target, model.source or data.modalities"
        )


def fit(
    estimator: Estimator,
    datamodule: CohortDataModule,
    run_dir: Path,
    *,
    description: dict[str, Any],
    loggers: Sequence[Logger],
) -> None:
    """Learns from the training subjects, judges the result on the validation subjects, and keeps the artefact.

    Args:
        estimator: unfitted.
        datamodule: of which the split and the stored subjects count.
        run_dir: gets ``estimator/`` and ``description.json``.
        description: what a checkpoint would say of model and data.
        loggers: get the means of the validation subjects' errors, named as those of Pix2Pix.
    """
    names = [estimator.source, estimator.target]

    def pairs() -> Iterator[Pair]:
        for subject in track(datamodule.training_subjects(), description=f"fitting {type(estimator).__name__}"):
            source, target = subject.read_image(names)  # (X, Y, Z) each
            place = subject.path.absolute()
            channel = subject.modalities.index(estimator.source)
            location = Location(str(place / IMAGE), channel, str(place / BRAIN))
            yield Pair(source, target, subject.read_brain(), subject.id, location)

    estimator.fit(pairs())
    validation = [datamodule.store.subjects[id] for id in datamodule.split.val]
    errors = [_errors(estimator, subject, names, datamodule.lookup) for subject in validation]
    if errors:
        if not all(np.isfinite(error["mse_brain"]) for error in errors):
            raise UserError(
                f"{type(estimator).__name__} makes values that are not finite of validation subjects; look for values "
                "in the data that no scan has"
            )
        known = {key: [error[key] for error in errors if np.isfinite(error[key])] for key in errors[0]}
        means = {f"val/{key}": float(np.mean(values)) for key, values in known.items() if values}
        for logger in loggers:
            logger.log_metrics({"epoch": 0, "val/loss": means["val/mse_brain"], **means}, 0)
            logger.save()
    write_json(run_dir / DESCRIPTION, description)
    artefact = run_dir / ESTIMATOR.parent
    estimator.save(artefact)  # a run that has it has finished; what is killed before the next line lacks sums alone
    write_json(run_dir / DESCRIPTION, {**description, "artefact": file_sums(artefact)})


def file_sums(folder: Path) -> dict[str, str]:
    """SHA-256 of a folder's files by their names."""
    return {path.name: file_sum(path) for path in sorted(folder.iterdir())}


def file_sum(path: Path) -> str:
    """SHA-256 of a file. Raises OSError where it is none, or larger than any artefact is."""
    with open_to_read(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > LARGEST:
            raise OSError(errno.EFBIG, f"{size:,} bytes", str(path))
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def _errors(estimator: Estimator, subject: StoredSubject, names: Sequence[str], lookup: np.ndarray) -> dict[str, float]:
    """Errors of one subject on [0, 1], the synthesis as it was made."""
    brain = torch.from_numpy(np.ascontiguousarray(subject.read_brain()))[None]  # (1, X, Y, Z)
    source, target = subject.read_image(names)
    tumour = torch.zeros_like(brain)
    if subject.labelled:
        label = lookup[subject.read_label()]
        tumour = torch.from_numpy((label > 0) & (label != 255))[None]
    try:
        made = torch.from_numpy(estimator.synthesize(source, brain[0].numpy()))[None, None]
    except UserError as error:
        raise UserError(f"{subject.id}: {error}") from error
    real = rescaled(torch.from_numpy(target.astype(np.float32))[None, None] * brain[:, None], "stored")
    errors = unit_errors(Synthesis(made, None, estimator.scale), real, brain, tumour)
    return {"mse_brain": errors["unit_mse_brain"], "mse_tumour": errors["unit_mse_tumour"]}
