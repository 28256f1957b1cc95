"""From stored intensities to what a network sees. A method chooses its normalisation in conf."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["MinMax", "Normalisation", "Stored", "ZScore"]

Statistics = Mapping[str, float]


class Normalisation(Protocol):
    """Maps stored intensities (C, X, Y, Z) to float32 of the same shape; ``scale`` names the result."""

    scale: str

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

    def __call__(self, image: Tensor, brain: Tensor, statistics: Sequence[Statistics]) -> Tensor:
        """Normalises; arguments as of ``ZScore``, which needs ``max`` of the statistics. A scan without signal is 0."""
        out = torch.empty(image.shape, dtype=torch.float32, device=image.device)
        for channel, source, s in zip(out, image, statistics, strict=True):
            channel.copy_(source).clamp_(min=0).div_(s["max"] if s["max"] > 0 else 1.0).mul_(brain)
        return out

    def training_scale(self, statistics: Sequence[Statistics]) -> tuple[float, float]:
        return 0.0, sum(s["max"] for s in statistics) / len(statistics)


class Stored:
    """Intensities as they are stored, background 0: for who normalises a subject in several ways."""

    scale = "stored"

    def __call__(self, image: Tensor, brain: Tensor, statistics: Sequence[Statistics]) -> Tensor:
        return image.float() * brain

    def training_scale(self, statistics: Sequence[Statistics]) -> tuple[float, float]:
        return 0.0, 1.0
