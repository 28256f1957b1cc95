"""What the clustering and the baselines share: arrays and tensors in, unit intensities out, an artefact on disk."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self, overload

import numpy as np
import torch

from mrgen.errors import UserError
from mrgen.files import read_json, write_text
from mrgen.papers.brain_clustering.search import Location
from mrgen.protocols import Synthesis, Volumes

__all__ = ["Estimator", "Pair"]

VERSION = 1
TABLE = "estimator.json"
NOT_FINITE = "{} has learned values that are not finite; look for values in the training subjects that no scan has"


class Pair(NamedTuple):
    """One training subject.

    Attributes:
        source: (X, Y, Z), background 0.
        target: likewise.
        brain: (X, Y, Z) bool; what lies outside is background. None: whatever is above 0 is brain.
        id: whose it is, for messages; default: its number.
        location: where the source lies on disk, so that a Search artefact need not copy it.
    """

    source: np.ndarray
    target: np.ndarray
    brain: np.ndarray | None = None
    id: str | None = None
    location: Location | None = None


class Estimator(ABC):
    """Makes one sequence from another without a network.

    Args:
        source: the sequence that is there.
        target: the sequence to make.

    Attributes:
        sources, targets: as ``mrgen.protocols.Synthesizer`` has them.
    """

    scale = "unit"

    def __init__(self, *, source: str = "t1", target: str = "t2"):
        if source == target:
            raise ValueError(f"source and target are both {source}; expected two sequences")
        self.source, self.target = source, target
        self.sources, self.targets = (source,), (target,)

    @abstractmethod
    def fit(self, pairs: Iterable[Pair | tuple[np.ndarray, ...]]) -> Self:
        """Learns from pairs, of which it holds one at a time; a tuple may end after its target or its mask."""

    @abstractmethod
    def _synthesize(self, volume: np.ndarray, brain: np.ndarray | None) -> np.ndarray:
        """(X, Y, Z) float32 unit intensities."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments."""

    @overload
    def synthesize(self, volumes: np.ndarray, brain: np.ndarray | None = None) -> np.ndarray: ...
    @overload
    def synthesize(self, volumes: Volumes) -> Synthesis: ...
    def synthesize(self, volumes: np.ndarray | Volumes, brain: np.ndarray | None = None) -> np.ndarray | Synthesis:
        """The target, in unit intensities.

        Args:
            volumes: (X, Y, Z) array of the source; or, as ``mrgen.protocols.Synthesizer`` has it, a mapping from
                sequence to (B, 1, X, Y, Z) tensor. Background 0; stored intensities or a min–max normalisation.
            brain: (X, Y, Z) bool mask of an array, or None: whatever is above 0 is brain, as for tensors.

        Returns:
            Float32 of the same shape; for a mapping, as a ``Synthesis`` on the tensor's device.

        Raises:
            UserError: a scan that nothing can be made from, such as an empty one.
        """
        if not isinstance(volumes, Mapping):
            return self._synthesize(*_checked(volumes, brain))
        batch = volumes[self.source]
        if batch.ndim != 5 or batch.shape[1] != 1:
            raise ValueError(f"{self.source} has the shape {tuple(batch.shape)}; expected (B, 1, X, Y, Z)")
        made = [self._synthesize(one[0].float().cpu().numpy(), None) for one in batch.detach()]
        mean = torch.from_numpy(np.stack(made)[:, None]).to(batch.device)
        return Synthesis(mean=mean, variance=None, scale=self.scale)

    # ----- the artefact: JSON, and npz and npy files without objects ----------------------------------------------

    def save(self, folder: Path | str) -> None:
        """Writes the artefact; the JSON comes last and as a whole, so that a folder that has one is complete."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TABLE).unlink(missing_ok=True)
        table = {"kind": type(self).__name__, "version": VERSION, "settings": self.settings()}
        state = self._save_state(folder)
        try:
            text = json.dumps({**table, "state": state}, indent=1, allow_nan=False)
        except ValueError as error:
            raise UserError(NOT_FINITE.format(type(self).__name__)) from error
        write_text(folder / TABLE, text)

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """What ``save`` wrote.

        Raises:
            UserError: no such artefact, another estimator's, or one of another version.
        """
        folder = Path(folder).absolute()
        expected = f"a fitted {cls.__name__}"
        table = read_json(folder / TABLE, expected=expected, remedy="fit anew")
        try:
            kind, version, settings, state = (table[key] for key in ("kind", "version", "settings", "state"))
            if (kind, version) != (cls.__name__, VERSION):
                found = f"{kind} {version}" if f"{kind}{version}".isalnum() else repr((kind, version))
                raise UserError(f"{folder}: found {found:.80}, expected {cls.__name__} {VERSION}; fit anew")
            model = cls(**settings)
            model._load_state(folder, state)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            found = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{folder / TABLE}: cannot be read ({found}), expected {expected}; fit anew") from error
        return model

    def _save_state(self, folder: Path) -> dict[str, Any]:
        return {}

    def _load_state(self, folder: Path, state: Mapping[str, Any]) -> None:  # noqa: B027 (there is nothing to read)
        pass


def _checked(volume: np.ndarray, brain: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    volume = np.asarray(volume)
    if volume.ndim != 3 or (brain is not None and np.shape(brain) != volume.shape):
        raise ValueError(
            f"found a volume of {volume.shape} and a mask of {None if brain is None else np.shape(brain)}; expected "
            "(X, Y, Z) both"
        )
    return volume, None if brain is None else np.asarray(brain, dtype=bool)
