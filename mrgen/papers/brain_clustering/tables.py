"""What a training pair teaches: clusters, their matching, and the tables f_t (section 2, training steps 1 to 3)."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import linear_sum_assignment

from mrgen.errors import UserError
from mrgen.papers.brain_clustering.kmeans import kmeans_1d
from mrgen.papers.brain_clustering.preprocessing import Scan

__all__ = ["Entries", "Matching", "Table", "interpolate", "learn_pair", "merge"]

Matching = Literal["assignment", "conditional_mean"]


@dataclass(frozen=True)
class Entries:
    """What one training pair adds to the tables; all (R,), ordered by ``macro`` and ``key``.

    Attributes:
        macro: t, the source's macro cluster, by ascending mean.
        key: a1, mean source intensity of a micro cluster.
        value: a2, the target intensity that it becomes.
        voxels: voxels of the source's micro cluster.
        common: those of them that lie in the matched micro cluster of the target too.
    """

    macro: np.ndarray
    key: np.ndarray
    value: np.ndarray
    voxels: np.ndarray
    common: np.ndarray


def learn_pair(
    source: Scan,
    target: Scan,
    *,
    macro: int,
    micro: int,
    matching: Matching,
    names: tuple[str, str] = ("source", "target"),
) -> Entries:
    """Clusters and matches one pair (steps 1 to 3).

    Micro clusters are ``micro`` to a macro cluster, or one to each of its intensities where it has fewer [C]. A macro
    pair that the assignment had to form although no voxel is common to both has its micro clusters matched in ascending
    order, so that no table stays empty.

    Args:
        source: preprocessed, of any shape.
        target: the same voxels of the target.
        macro: macro clusters of each.
        micro: micro clusters of each macro cluster.
        matching: ``assignment``, the printed method: the value is the mean of the whole matched target micro cluster.
            ``conditional_mean``, ours: the value is the target's mean over the voxels of the source's micro cluster.
        names: of the two, for messages.

    Raises:
        UserError: no common foreground, or fewer distinct intensities than macro clusters.
    """
    both = (source.codes > 0) & (target.codes > 0)
    if not both.any():
        raise UserError(
            "found no voxel that is foreground in source and target both, expected scans of one brain on one grid; "
            "check that they are registered and that the brain mask is theirs"
        )
    a, b = (
        _Nested.of(scan.codes[both], scan.levels, macro, micro, name)
        for scan, name in zip((source, target), names, strict=True)
    )
    size = len(a.means), len(b.means)
    common = np.bincount(a.labels * size[1] + b.labels, minlength=size[0] * size[1]).reshape(size)  # micro × micro
    if matching == "conditional_mean":
        sums = np.bincount(a.labels, weights=target.levels[target.codes[both]], minlength=size[0])
        return Entries(a.macro, a.means, sums / a.voxels, a.voxels, a.voxels)
    rows, columns = _matched(common, a, b)
    return Entries(a.macro[rows], a.means[rows], b.means[columns], a.voxels[rows], common[rows, columns])


@dataclass(frozen=True)
class _Nested:
    """Macro and micro clusters of one scan: the micro label of each voxel, and of each micro cluster the rest."""

    labels: np.ndarray
    macro: np.ndarray
    means: np.ndarray
    voxels: np.ndarray

    @classmethod
    def of(cls, codes: np.ndarray, levels: np.ndarray, macro: int, micro: int, name: str) -> "_Nested":
        counts = np.bincount(codes, minlength=len(levels))
        used = np.flatnonzero(counts)
        try:
            outer = kmeans_1d(levels[used], counts[used], macro)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        inner = kmeans_1d(levels[used], counts[used], micro, groups=outer.labels)
        label_of = np.zeros(len(levels), np.intp)
        label_of[used] = inner.labels
        return cls(label_of[codes], outer.labels[inner.first], inner.means, inner.weights.astype(np.int64))


def _matched(common: np.ndarray, a: _Nested, b: _Nested) -> tuple[np.ndarray, np.ndarray]:
    """Micro clusters of source and target that belong together: macro first, and micro inside (step 2b)."""
    starts = [np.flatnonzero(np.diff(side.macro, prepend=-1)) for side in (a, b)]
    overlap = np.add.reduceat(np.add.reduceat(common, starts[0]), starts[1], axis=1)  # macro × macro
    rows, columns = [], []
    for i, j in zip(*linear_sum_assignment(overlap, maximize=True), strict=True):
        members = np.flatnonzero(a.macro == i), np.flatnonzero(b.macro == j)
        # Voxels of the block lie in both macro clusters. Of unequal counts the smaller is matched whole [C].
        row, column = linear_sum_assignment(common[np.ix_(*members)], maximize=True)
        rows.append(members[0][row])
        columns.append(members[1][column])
    return np.concatenate(rows), np.concatenate(columns)


class Table:
    """f_t: source intensity to target intensity, with how often each key was entered (equation 1)."""

    def __init__(self) -> None:
        self._rows: dict[float, tuple[float, int]] = {}

    def add(self, key: float, value: float) -> None:
        """f(a1) ← f(a1) + (a2 − f(a1)) / n. The authors' code has |a2 − f(a1)|, which can only rise: a mistake."""
        mean, n = self._rows.get(key, (0.0, 0))
        self._rows[key] = mean + (value - mean) / (n + 1), n + 1

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys, ascending, and values."""
        keys = sorted(self._rows)
        return np.array(keys), np.array([self._rows[key][0] for key in keys])


def merge(several: Iterable[Entries], macro: int) -> list[Table]:
    """The tables f_0 … f_{macro − 1} after all of the pairs, in order."""
    tables = [Table() for _ in range(macro)]
    for entries in several:
        for t, key, value in zip(entries.macro.tolist(), entries.key.tolist(), entries.value.tolist(), strict=True):
            tables[t].add(key, value)
    return tables


def interpolate(table: Table, x: np.ndarray) -> np.ndarray:
    """f_t(x): linear between the two rows around x; beyond the end rows in proportion, value · x / key [C]."""
    keys, values = table.arrays()
    inside = np.interp(x, keys, values)
    return np.where(x < keys[0], values[0] * x / keys[0], np.where(x > keys[-1], values[-1] * x / keys[-1], inside))
