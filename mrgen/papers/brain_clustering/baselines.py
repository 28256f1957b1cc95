"""What any method must beat: the paper's Complementary and Random, and Constant and Nothing, which are ours."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from mrgen.errors import UserError
from mrgen.papers.brain_clustering.estimator import Estimator, Pair
from mrgen.papers.brain_clustering.preprocessing import median_per_slice, preprocess
from mrgen.papers.brain_clustering.search import finite

__all__ = ["Complementary", "Constant", "Nothing", "Random"]


class _Untrained(Estimator):
    """A baseline that learns nothing; ``fit`` does not even look at the pairs."""

    def fit(self, pairs: Iterable[Pair | tuple[np.ndarray, ...]] = ()) -> Self:
        return self

    def settings(self) -> dict[str, Any]:
        return {"source": self.source, "target": self.target}


class Complementary(_Untrained):
    """min + max − x (section 1).

    Args:
        source, target: any two sequences.
        over: ``foreground`` is the code's: over the source's foreground after the outlier step, median filtered [C].
            ``all`` is the printed formula: over all voxels, by which the background becomes the brightest.
    """

    def __init__(self, *, source: str = "t1", target: str = "t2", over: Literal["foreground", "all"] = "foreground"):
        super().__init__(source=source, target=target)
        if over not in ("foreground", "all"):
            raise ValueError(f"over is {over}; expected foreground or all")
        self.over = over

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "over": self.over}

    def _synthesize(self, volume: np.ndarray, brain: np.ndarray | None) -> np.ndarray:
        volume = _masked(volume, brain)
        if self.over == "all":
            return 1 - preprocess(volume, remove_outliers=False).scaling(volume)  # min and max are 0 and 1
        scan = preprocess(volume, remove_outliers=True)
        used = scan.levels[scan.counts > 0]
        made = np.where(scan.counts > 0, used[0] + used[-1] - scan.levels, 0).astype(np.float32)
        return median_per_slice(made[scan.codes])


class Random(_Untrained):
    """Uniformly distributed values in [0, 1) on all non-background voxels (section 4), the same for the same scan.

    Args:
        source, target: any two sequences.
        seed: of the values, together with the number of non-background voxels, so that subjects differ.
    """

    def __init__(self, *, source: str = "t1", target: str = "t2", seed: int = 0):
        super().__init__(source=source, target=target)
        self.seed = seed

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "seed": self.seed}

    def _synthesize(self, volume: np.ndarray, brain: np.ndarray | None) -> np.ndarray:
        foreground = _masked(volume, brain) > 0
        n = int(foreground.sum())
        out = np.zeros(volume.shape, np.float32)
        out[foreground] = np.random.default_rng((self.seed, n)).random(n, dtype=np.float32)
        return out


class Constant(Estimator):
    """The training targets' mean unit intensity on all non-background voxels of the source.

    Attributes:
        mean: over training subjects, of the mean over each one's foreground.
    """

    def __init__(self, *, source: str = "t1", target: str = "t2"):
        super().__init__(source=source, target=target)
        self.mean: float | None = None

    def settings(self) -> dict[str, Any]:
        return {"source": self.source, "target": self.target}

    def fit(self, pairs: Iterable[Pair | tuple[np.ndarray, ...]]) -> Self:
        means: list[float] = []
        for pair in pairs:
            brain = pair[2] if len(pair) > 2 else None
            try:
                scan = preprocess(_masked(pair[1], brain), remove_outliers=False)
            except UserError as error:
                raise UserError(f"{pair[3] if len(pair) > 3 else len(means)}: {self.target}: {error}") from error
            means.append(float(scan.counts @ scan.levels / scan.counts.sum()))
        if not means:
            raise UserError("found no training pair, expected one or more")
        self.mean = float(np.mean(means))
        return self

    def _synthesize(self, volume: np.ndarray, brain: np.ndarray | None) -> np.ndarray:
        if self.mean is None:
            raise ValueError("not fitted yet; call fit or load first")
        return np.where(_masked(volume, brain) > 0, self.mean, 0).astype(np.float32)

    def _save_state(self, folder: Path) -> dict[str, Any]:
        return {"mean": self.mean}

    def _load_state(self, folder: Path, state: Mapping[str, Any]) -> None:
        self.mean = finite(state["mean"])


class Nothing(_Untrained):
    """Zeros: the sequence is left out."""

    def _synthesize(self, volume: np.ndarray, brain: np.ndarray | None) -> np.ndarray:
        return np.zeros(volume.shape, np.float32)


def _masked(volume: np.ndarray, brain: np.ndarray | None) -> np.ndarray:
    return volume if brain is None else np.where(brain, volume, 0)
