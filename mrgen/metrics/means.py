"""Means over subjects that stay right under DDP."""

from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor, nn
from torchmetrics import MeanMetric

__all__ = ["SubjectMeans"]


class SubjectMeans(nn.ModuleDict):
    """One running mean a name. Sums and counts are added up over ranks, so that every subject weighs the same.

    Args:
        names: the quantities; nan values are skipped, such as the error in a tumour that is not there.
    """

    def __init__(self, names: Sequence[str]):
        super().__init__({name: MeanMetric(nan_strategy="ignore") for name in names})

    def add(self, values: Mapping[str, float | Tensor]) -> None:
        """One subject's values."""
        for name, value in values.items():
            cast(MeanMetric, self[name]).update(value)

    def take(self) -> dict[str, Tensor]:
        """The means of all ranks, and a new start."""
        metrics = {name: cast(MeanMetric, metric) for name, metric in self.items()}
        means = {name: metric.compute() for name, metric in metrics.items()}
        for metric in metrics.values():
            metric.reset()
        return means
