"""From stored intensities to what a network sees. A method chooses its normalisation in conf."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mrgen.data.store import StoredSubject, statistics
from mrgen.errors import UserError

__all__ = [
    "Gaussian",
    "MinMax",
    "Normalisation",
    "Stored",
    "Symmetric",
    "ZScore",
    "known_ends",
    "measured_statistics",
    "stored_statistics",
]

Statistics = Mapping[str, float]


class Normalisation(Protocol):
    """Maps stored intensities (C, X, Y, Z) to float32 of the same shape.

    Attributes:
        scale: names the result.
        outside: what all outside the brain becomes; None where it is kept.
    """

    scale: str
    outside: float | None

    def __call__(self, image: Tensor, brain: Tensor, statistics: Sequence[Statistics]) -> Tensor: ...

    def training_scale(self, statistics: Sequence[Statistics]) -> tuple[float, float]:
        """(offset, factor) with intensity = offset + factor · value, averaged over subjects of one sequence."""
        ...


class ZScore:
    """Clip to the brain's 0.5 and 99.5 percentiles, zero mean and unit variance over brain voxels, background 0.

    The statistics were recorded over the whole brain when the cohort was prepared, so that a patch and the whole
    volume see the same numbers (RS-Net, preprocessing).
    """

    scale = "zscore"
    outside = 0.0

    def __call__(self, image: Tensor, brain: Tensor, statistics: Sequence[Statistics]) -> Tensor:
        """Normalises.

        Args:
            image: (C, X, Y, Z), stored type.
            brain: (X, Y, Z) bool.
            statistics: one mapping a sequence: ``p0_5``, ``p99_5``, ``clipped_mean``, ``clipped_std``.

        Returns:
            (C, X, Y, Z) float32.
        """
        out = torch.empty(image.shape, dtype=torch.float32, device=image.device)
        for channel, source, s in zip(out, image, statistics, strict=True):  # in place: one pass over memory a step
            channel.copy_(source).clamp_(s["p0_5"], s["p99_5"]).sub_(s["clipped_mean"])
            channel.div_(max(s["clipped_std"], 1e-6)).mul_(brain)
        return out

    def training_scale(self, statistics: Sequence[Statistics]) -> tuple[float, float]:
        count = len(statistics)
        return sum(s["clipped_mean"] for s in statistics) / count, sum(s["clipped_std"] for s in statistics) / count


class MinMax:
    """Background 0, the brain's brightest voxel 1 (Baldini et al., section 2).

    The minimum is the background's 0: small negative intensities, which interpolation leaves at a brain's edge, are set
    to it, since one such voxel would shift the whole scan.
    """

    scale = "unit"
    outside = 0.0
    top = "max"  # what becomes 1

    def __call__(self, image: Tensor, brain: Tensor, statistics: Sequence[Statistics]) -> Tensor:
        """Normalises; arguments as of ``ZScore``, which needs ``max`` of the statistics. A scan without signal is 0."""
        out = torch.empty(image.shape, dtype=torch.float32, device=image.device)
        for channel, source, s in zip(out, image, statistics, strict=True):
            channel.copy_(source).clamp_(min=0).div_(s["max"] if s["max"] > 0 else 1.0).mul_(brain)
        return out

    def training_scale(self, statistics: Sequence[Statistics]) -> tuple[float, float]:
        return 0.0, sum(s["max"] for s in statistics) / len(statistics)


class Symmetric:
    """−1 outside the brain and at intensity 0, 1 at the brain's 99.5th percentile and above: the range of a tanh.

    For networks that end in one. The percentile stands in for the maximum, which a few voxels decide. Intensities below
    0, which interpolation leaves at a brain's edge, become −1.
    """

    scale = "symmetric"
    outside = -1.0
    top = "p99_5"  # what becomes 1

    def __call__(self, image: Tensor, brain: Tensor, statistics: Sequence[Statistics]) -> Tensor:
        """As ``ZScore``, of whose statistics it needs ``p99_5``. A scan without signal is −1."""
        out = torch.empty(image.shape, dtype=torch.float32, device=image.device)
        for channel, source, s in zip(out, image, statistics, strict=True):
            high = s["p99_5"] if s["p99_5"] > 0 else 1.0
            channel.copy_(source).clamp_(0, high).mul_(2 / high).mul_(brain).sub_(1)
        return out

    def training_scale(self, statistics: Sequence[Statistics]) -> tuple[float, float]:
        half = sum(s["p99_5"] for s in statistics) / len(statistics) / 2
        return half, half


class Stored:
    """Intensities as they are stored: for who normalises a subject in several ways.

    Args:
        masked: with 0 outside the brain.
    """

    scale = "stored"

    def __init__(self, masked: bool = True):
        self.outside = 0.0 if masked else None

    def __call__(self, image: Tensor, brain: Tensor, statistics: Sequence[Statistics]) -> Tensor:
        return image.float() if self.outside is None else image.float() * brain

    def training_scale(self, statistics: Sequence[Statistics]) -> tuple[float, float]:
        return 0.0, 1.0


class Gaussian:
    """Zero mean and unit variance over the head; all voxels are kept, so that the background lies below −1 (Li et al.).

    The head of a sequence are its voxels from a threshold on, with their holes filled slice by slice.

    Args:
        thresholds: by sequence, in the scans' own intensities (WMH 2017: T1 30, FLAIR 70). None: the head is the
            prepared brain mask, as in skull-stripped cohorts.
        size: voxels along x and y around the middle of every slice, which alone are looked at ("after the crop"); None:
            whole slices.
        whole_slices: sites whose slices are looked at as a whole whatever ``size`` is.
    """

    scale = "gaussian"
    outside = None

    def __init__(
        self,
        thresholds: Mapping[str, float] | None = None,
        size: Sequence[int] | None = None,
        whole_slices: Sequence[str] = (),
    ):
        self.thresholds = None if thresholds is None else dict(thresholds)
        self.size, self.whole_slices = None if size is None else tuple(size[:2]), tuple(whole_slices)
        self._known: dict[tuple[Path, str, str], Statistics] = {}  # by subject, revision and sequence

    def __call__(self, image: Tensor, brain: Tensor, statistics: Sequence[Statistics]) -> Tensor:
        """Normalises; ``statistics`` as ``measure`` gives them, ``brain`` is not looked at."""
        out = torch.empty(image.shape, dtype=torch.float32, device=image.device)
        for channel, source, s in zip(out, image, statistics, strict=True):
            channel.copy_(source).sub_(s["head_mean"]).div_(s["head_std"])
        return out

    def measure(self, volume: np.ndarray, brain: np.ndarray, modality: str, site: str | None) -> Statistics:
        """``head_mean`` and ``head_std`` of one sequence.

        Args:
            volume: (X, Y, Z), stored intensities.
            brain: (X, Y, Z) bool.
            modality: its name.
            site: where it was scanned.

        Raises:
            UserError: no head, or one of a single value.
        """
        head = brain
        if self.thresholds is not None:
            if modality not in self.thresholds:
                raise UserError(
                    f"data.head names {', '.join(self.thresholds)}, not {modality}; add +data.head.{modality}=…, the "
                    "intensity from which on a voxel is head, or set data.head=null for the prepared brain mask"
                )
            head = _filled(volume >= self.thresholds[modality])
        if self.size is not None and site not in self.whole_slices:
            starts = [max((n - m) // 2, 0) for n, m in zip(volume.shape[:2], self.size, strict=True)]
            middle = tuple(slice(start, start + m) for start, m in zip(starts, self.size, strict=True))
            volume, head = volume[middle], head[middle]
        values = volume[head].astype(np.float64)
        if len(values) == 0 or values.std() == 0:
            asked = "the prepared brain mask" if self.thresholds is None else f"from {self.thresholds[modality]:g} on"
            raise UserError(
                f"{modality}: found {len(values)} voxels of head ({asked}) among values up to {volume.max():g}; set "
                "data.head to where the head begins in these intensities, or to null for the prepared brain mask"
            )
        return {"head_mean": float(values.mean()), "head_std": float(values.std())}

    def of(self, subject: StoredSubject, modality: str) -> Statistics:
        """``measure`` of a stored subject, once."""
        key = (subject.path, subject.revision, modality)
        if key not in self._known:
            volume = subject.read_image([modality])[0]
            try:
                self._known[key] = self.measure(volume, subject.read_brain(), modality, subject.site)
            except UserError as error:
                raise UserError(f"{subject.id}, {error}") from error
        return self._known[key]

    def training_scale(self, statistics: Sequence[Statistics]) -> tuple[float, float]:
        count = len(statistics)
        return sum(s["head_mean"] for s in statistics) / count, sum(s["head_std"] for s in statistics) / count


def stored_statistics(
    normalisation: Normalisation, subject: StoredSubject, modalities: Sequence[str]
) -> list[Statistics]:
    """What a normalisation needs of a prepared subject: recorded at preparation, or its own."""
    if isinstance(normalisation, Gaussian):
        return [normalisation.of(subject, name) for name in modalities]
    return [subject.statistics[name] for name in modalities]


def known_ends(
    training: Sequence[StoredSubject], scale: Mapping[str, Sequence[float]], top: str | None
) -> dict[str, dict[str, float]] | None:
    """By sequence, the statistics of synthetic subjects that normalisations set to 1: those of the training scans.

    Of the generator's own normalisation it is where its 1 lies; of another one the mean of the training scans, so that
    a segmenter on another scale sees as bright a scan as was made, and not one stretched to its own extremes.

    Args:
        training: what the generator was trained on.
        scale: (offset, factor) of every sequence: intensity = offset + factor · value.
        top: of ``StoredSubject.statistics``, which the generator's normalisation sets to 1; None where it sets none,
            and nothing is known.
    """
    if top is None:
        return None
    found: dict[str, dict[str, float]] = {}
    for name, line in scale.items():
        ends = (MinMax.top, Symmetric.top)
        means = {key: float(np.mean([subject.statistics[name][key] for subject in training])) for key in ends}
        found[name] = {**means, top: float(sum(line))}
    return found


def measured_statistics(
    normalisation: Normalisation, volume: np.ndarray, brain: np.ndarray, modality: str, site: str | None
) -> Statistics:
    """The same of a scan (X, Y, Z) that is in no store."""
    if isinstance(normalisation, Gaussian):
        return normalisation.measure(volume, brain, modality, site)
    return statistics(volume, brain)


def _filled(mask: np.ndarray) -> np.ndarray:
    """(X, Y, Z) with what each axial slice encloses: background that no path within the slice leads out of."""
    from scipy.ndimage import generate_binary_structure, label

    in_plane = generate_binary_structure(3, 1)
    in_plane[:, :, [0, 2]] = False
    parts, count = label(~mask, structure=in_plane)
    outside = np.zeros(count + 1, bool)
    for face in (parts[0], parts[-1], parts[:, 0], parts[:, -1]):
        outside[face.ravel()] = True
    return mask | ~outside[parts]
